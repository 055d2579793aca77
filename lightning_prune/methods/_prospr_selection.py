"""What the methods that prune at initialization share: a minimum per layer, rounds, the shuffled control.

All functions take scores and masks by name, whether an entry is a weight or a channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_prune.checks import check_bool, check_integer
from lightning_prune.oneshot import OneShotPruning
from lightning_prune.schedules import geometric
from lightning_prune.selection import (
    Scope,
    check_scope,
    check_scores,
    keep_top,
    kept_count,
    shuffle_within_layer,
)

Masks = dict[str, Tensor]
_THIN = 0.01  # a layer below this density is named


def keep_with_minimum(
    scores: Mapping[str, Tensor], sparsity: float, scope: Scope, minimum: int, alive: Mapping[str, Tensor]
) -> Masks:
    """Keep the highest scores, exactly as many as `keep_top`, and in every tensor at least its best `minimum`.

    Args:
        scores: finite scores by name, each of any shape S.
        sparsity: fraction pruned of all entries, in [0, 1).
        scope: "global" or "layer".
        minimum: entries that every tensor keeps (all of those alive if it has fewer), >= 0.
        alive: bool masks of shape S; entries that are False are gone already.
    Returns:
        bool masks of shape S under the same names.
    Raises:
        ValueError: a score is not finite, or the minima together exceed what the sparsity allows.
    """
    check_scores(scores)
    reserved = {name: _best(score, alive[name], minimum) for name, score in scores.items()}
    _check_minimum(reserved, sparsity, scope, minimum)
    raised = {name: _raised(score, reserved[name]) for name, score in scores.items()}
    return keep_top(raised, sparsity, scope, alive=alive)


def _best(score: Tensor, alive: Tensor, minimum: int) -> Tensor:
    """Bool mask of the `minimum` best entries alive; equal scores by lower index."""
    chosen = torch.zeros_like(alive)
    count = min(minimum, int(alive.sum()))
    if count:
        living = alive.flatten().nonzero().flatten()
        order = score.flatten()[living].argsort(descending=True, stable=True)
        chosen.view(-1)[living[order[:count]]] = True
    return chosen


def _check_minimum(reserved: Masks, sparsity: float, scope: Scope, minimum: int) -> None:
    held = {name: int(mask.sum()) for name, mask in reserved.items()}
    sizes = {name: mask.numel() for name, mask in reserved.items()}
    pairs = [(f"the {len(held)} tensors", sum(held.values()), sum(sizes.values()))]
    if scope == "layer":
        pairs = [(repr(name), held[name], sizes[name]) for name in held]
    for where, count, size in pairs:
        if count > kept_count(size, sparsity):
            raise ValueError(
                f"`min_keep_per_layer`={minimum} keeps {count} entries of {where}, more than the "
                f"{kept_count(size, sparsity)} that sparsity {sparsity:.6g} allows. Lower it, or ask for a "
                f"sparsity of at most {1 - count / size:.6g}."
            )


def _raised(score: Tensor, reserved: Tensor) -> Tensor:
    """Scores in at least float32 with the reserved entries above all others."""
    score = score if score.dtype in (torch.float32, torch.float64) else score.float()
    return score.masked_fill(reserved, torch.finfo(score.dtype).max)


def prune_in_rounds(
    score: Callable[[Masks], Mapping[str, Tensor]],
    keep: Callable[[Mapping[str, Tensor], float, Masks], Masks],
    alive: Mapping[str, Tensor],
    sparsity: float,
    rounds: int,
    regrow: bool = False,
) -> Masks:
    """Score, prune a little, score the masked network again: after round t of T the density is d_0 (d / d_0)^(t/T).

    Args:
        score: masks in force -> scores by name.
        keep: (scores, sparsity, masks that may stay) -> masks.
        alive: bool masks before the first round; their density is d_0.
        sparsity: 1 - d, reached exactly in the last round, in [0, 1).
        rounds: T, >= 1.
        regrow: entries pruned in an earlier round may return (never those dead before the first).
    Returns:
        bool masks by name.
    """
    masks = dict(alive)
    total = sum(mask.numel() for mask in masks.values())
    begin = 1.0 - sum(int(mask.sum()) for mask in masks.values()) / total
    for done in range(1, rounds + 1):
        level = sparsity if begin >= 1.0 else geometric(done / rounds, begin, sparsity)
        masks = keep(score(masks), max(0.0, level), dict(alive) if regrow else masks)
    return masks


def shuffled(masks: Mapping[str, Tensor], alive: Mapping[str, Tensor], generator: torch.Generator) -> Masks:
    """Permute every mask among the entries of its tensor that were alive: the layer rates stay, the choice is random.

    Args:
        masks: bool masks; True only where `alive` is.
        alive: bool masks of the same names and shapes.
        generator: CPU source of randomness.
    """
    moved = shuffle_within_layer({name: mask[alive[name]] for name, mask in masks.items()}, generator)
    result = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    for name, mask in result.items():
        mask[alive[name]] = moved[name]
    return result


def thin_layers(masks: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors that keep less than 1 % of their entries."""
    return [name for name, mask in masks.items() if int(mask.sum()) < _THIN * mask.numel()]


class InitialPruning(OneShotPruning):
    """A method that scores the network once, before training; subclasses say how.

    Args:
        sparsity: pruned fraction of the selected weights, in [0, 1); None with pairs in `at`.
        at: when; see `OneShotPruning`.
        scope: "global" ranks all weights together, "layer" prunes the same fraction of every tensor.
        min_keep_per_layer: weights that every tensor keeps whatever their rank, >= 0; the count in all stays exact.
        shuffle_within_layer: permute the mask inside every tensor: the control that keeps only the layer rates.
        **common: see `PruningCallback`.
    Raises:
        ValueError: an argument breaks its rule.
    """

    prunes_trained: ClassVar[bool] = False
    shards: ClassVar[bool] = False

    def __init__(
        self,
        sparsity: float | None = None,
        at: Any = "start",
        scope: Scope = "global",
        min_keep_per_layer: int = 1,
        shuffle_within_layer: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(sparsity=sparsity, at=at, **common)
        check_scope(scope)
        self.scope: Scope = scope
        self.min_keep_per_layer = check_integer("min_keep_per_layer", min_keep_per_layer, 0)
        self.shuffle_within_layer = check_bool("shuffle_within_layer", shuffle_within_layer)

    def keep(
        self,
        scores: Mapping[str, Tensor],
        sparsity: float,
        alive: Mapping[str, Tensor],
        minimum: int | None = None,
    ) -> Masks:
        """Masks of the highest scores by this callback's scope and minimum (or another minimum)."""
        least = self.min_keep_per_layer if minimum is None else minimum
        return keep_with_minimum(scores, sparsity, self.scope, least, alive)

    def settle(self, masks: Masks, alive: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Masks, list[str]]:
        """Final masks, shuffled if asked, and notes on them; thin layers are named."""
        notes = []
        if self.shuffle_within_layer:
            masks = shuffled(masks, alive, generator)
            notes = ["The masks were shuffled inside every tensor: a control, not the method itself."]
        thin = [name for name in thin_layers(masks) if bool(masks[name].any())]  # empty ones are named by the base
        if thin:
            rank_zero_warn(
                f"{self.method} keeps less than 1 % of {', '.join(thin)}. Raise `min_keep_per_layer`, lower the "
                "sparsity, or use scope='layer'."
            )
        return masks, notes
