"""Scores to masks with exact counts: over the whole network, layer by layer, with a floor per layer, N:M.

Every function is pure. A score is higher for a weight that is kept longer; a mask is bool, True = kept.
Selection equals a stable descending sort: the k best stay, equal scores are settled by parameter order, then by
index. It is done by a partial selection (`kthvalue`) whose ties are resolved by position, in linear time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_prune.checks import check_fraction

Scope = Literal["global", "layer"]


def kept_count(total: int, sparsity: float) -> int:
    """Return how many of `total` weights stay: total - floor(sparsity * total + 1e-9).

    The small constant undoes the binary rounding of decimal fractions, so that 0.9 of 10 is 9.

    Args:
        total: number of weights, >= 0.
        sparsity: pruned fraction, in [0, 1).
    """
    return total - math.floor(sparsity * total + 1e-9)


def keep_top(
    scores: Mapping[str, Tensor],
    sparsity: float,
    scope: Scope = "global",
    layer_floor: float = 0.0,
    alive: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Keep the highest scores, exactly `kept_count` of them.

    Args:
        scores: finite scores by parameter name, each of any shape S.
        sparsity: fraction pruned of all weights (dead ones count as pruned), in [0, 1).
        scope: "global" ranks all weights together; "layer" prunes the same fraction of every tensor.
        layer_floor: fraction of each tensor that stays whatever its rank, in [0, 1); rounded up to whole weights.
        alive: bool masks of shape S; weights that are False are gone already and stay so.
    Returns:
        bool masks under the same names, each of shape S. If fewer weights are alive than the target keeps,
        all of them stay.
    Raises:
        ValueError: a score is not finite, or the floors keep more than the target allows (over all tensors, or in one
            tensor with scope="layer").
    """
    check_fraction("sparsity", sparsity)
    check_fraction("layer_floor", layer_floor)
    check_scope(scope)
    check_scores(scores)
    ranks = {name: _rankable(score, None if alive is None else alive.get(name)) for name, score in scores.items()}
    if scope == "layer":
        _check_layer_floors(ranks, sparsity, layer_floor)
        return {
            name: _keep_best(rank, kept_count(rank.numel(), sparsity)).view(scores[name].shape)
            for name, rank in ranks.items()
        }
    return _keep_globally(scores, ranks, sparsity, layer_floor)


def keep_n_of_m(
    scores: Mapping[str, Tensor], n: int, m: int, alive: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """Keep the n highest of every m consecutive scores along the flattened input dimension of each tensor.

    Args:
        scores: finite scores by parameter name, each of shape (out, ...); the input dimension is all that follows.
        n: weights kept in each group, 1 <= n <= m.
        m: group size, >= 2.
        alive: bool masks; weights that are False are gone already (a group then keeps at most n of the others).
    Returns:
        bool masks under the same names, and the names whose input dimension m does not divide: these stay dense.
    Raises:
        ValueError: a score is not finite, or n and m do not fit.
    """
    if not (isinstance(n, int) and isinstance(m, int) and m >= 2 and 1 <= n <= m):
        raise ValueError(f"an N:M pattern needs integers 1 <= N <= M and M >= 2, got {n}:{m}. Write for example '2:4'.")
    check_scores(scores)
    masks, dense = {}, []
    for name, score in scores.items():
        living = None if alive is None else alive.get(name)
        if score.dim() < 2 or math.prod(score.shape[1:]) % m:
            dense.append(name)
            masks[name] = torch.ones_like(score, dtype=torch.bool) if living is None else living.clone()
            continue
        groups = _rankable(score, living).view(-1, m)
        order = groups.sort(dim=1, descending=True, stable=True).indices
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, :n], True)
        masks[name] = (mask & (groups > -math.inf)).view(score.shape)
    return masks, dense


def shuffle_within_layer(masks: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Permute every mask inside its own tensor: the layer rates stay, the choice becomes random.

    Args:
        masks: bool masks of any shapes.
        generator: CPU source of randomness.
    Returns:
        bool masks of the same shapes with the same number of True entries each.
    """
    return {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=generator).to(mask.device)].view(mask.shape)
        for name, mask in masks.items()
    }


def count_kept(masks: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return (kept, total) over all masks."""
    return sum(int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())


def check_scores(scores: Mapping[str, Tensor]) -> None:
    """Raise ValueError if there is nothing to rank or a score is NaN or infinite."""
    if not scores:
        raise ValueError("`scores` is empty: there is nothing to prune. Check `include` and `exclude`.")
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            bad = int((~torch.isfinite(score)).sum())
            raise ValueError(
                f"the scores of {name!r} must be finite, got {bad} NaN or infinite values of {score.numel()}. "
                "Check the weights and the loss for overflow before pruning."
            )


def check_scope(scope: str) -> None:
    """Raise ValueError unless `scope` is "global" or "layer"."""
    if scope not in ("global", "layer"):
        raise ValueError(f"`scope` must be 'global' or 'layer', got {scope!r}.")


def check_layer_floor(layer_floor: Any, sparsity: float) -> float:
    """Return `layer_floor` as a fraction of each tensor that `sparsity` leaves room for, else raise ValueError."""
    floor = check_fraction("layer_floor", layer_floor)
    if floor > 1 - sparsity + 1e-9:
        raise ValueError(
            f"`layer_floor` must not exceed 1 - `sparsity` = {1 - sparsity:.6g}, got {layer_floor}. Lower one of them."
        )
    return floor


def _rankable(score: Tensor, alive: Tensor | None) -> Tensor:
    """Flat scores in at least float32 (bf16 has too few distinct values only if it was computed so), dead = -inf."""
    flat = score.detach().flatten()
    flat = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
    return flat if alive is None else flat.masked_fill(~alive.flatten().to(flat.device), -math.inf)


def _floor_count(rank: Tensor, layer_floor: float) -> int:
    return math.ceil(layer_floor * rank.numel() - 1e-9)


def _check_layer_floors(ranks: Mapping[str, Tensor], sparsity: float, layer_floor: float) -> None:
    """Raise for the tensor whose floor allows the lowest sparsity, so that the advice serves them all."""
    if not layer_floor:
        return
    held = {name: int(_keep_best(rank, _floor_count(rank, layer_floor)).sum()) for name, rank in ranks.items()}
    worst = max(ranks, key=lambda name: held[name] / max(1, ranks[name].numel()))
    for name in (worst, *ranks):
        total = ranks[name].numel()
        _check_floor(held[name], kept_count(total, sparsity), total, sparsity, layer_floor, f" of {name!r}")


def _check_floor(held: int, target: int, total: int, sparsity: float, layer_floor: float, where: str = "") -> None:
    if held > target:
        reachable = math.floor((1 - held / total) * 1e6) / 1e6  # rounded down: the advice must work
        raise ValueError(
            f"`layer_floor`={layer_floor} keeps {held} weights{where}, more than the {target} that "
            f"`sparsity`={sparsity} allows. Lower `layer_floor` or ask for a sparsity of at most {reachable}."
        )


def _keep_best(rank: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` best entries of a flat tensor; -inf entries never stay; ties by lower index."""
    n = rank.numel()
    if count <= 0:
        return torch.zeros_like(rank, dtype=torch.bool)
    if count >= n:
        return rank > -math.inf
    threshold = _kth_value(rank, n - count + 1)
    if threshold == -math.inf:
        return rank > -math.inf
    mask = rank > threshold
    ties = (rank == threshold).nonzero().flatten()
    mask[ties[: count - int(mask.sum())]] = True
    return mask


def _kth_value(values: Tensor, k: int) -> Tensor:
    """The k-th smallest value; `kthvalue` refuses deterministic mode on a GPU for the sake of its indices."""
    if values.is_cuda and torch.are_deterministic_algorithms_enabled():
        return values.sort().values[k - 1]
    return values.kthvalue(k).values


def _keep_globally(
    scores: Mapping[str, Tensor], ranks: dict[str, Tensor], sparsity: float, layer_floor: float
) -> dict[str, Tensor]:
    sizes = [rank.numel() for rank in ranks.values()]
    target = kept_count(sum(sizes), sparsity)
    device = next(iter(ranks.values())).device
    reserved = (
        {name: _keep_best(rank, _floor_count(rank, layer_floor)) for name, rank in ranks.items()} if layer_floor else {}
    )
    held = sum(int(mask.sum()) for mask in reserved.values())
    _check_floor(held, target, sum(sizes), sparsity, layer_floor)
    free = [rank.masked_fill(reserved[name], -math.inf) if reserved else rank for name, rank in ranks.items()]
    best = _keep_best(torch.cat([rank.to(device) for rank in free]), target - held)
    masks = {}
    for (name, score), part in zip(scores.items(), best.split(sizes), strict=True):
        mask = part.to(score.device)
        masks[name] = (mask | reserved[name] if reserved else mask).view(score.shape).clone()
    return masks
