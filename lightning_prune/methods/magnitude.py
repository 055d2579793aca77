"""Magnitude pruning: one-shot, N:M, and gradual.

One-shot and N:M are the classical baselines (Han et al., "Learning both weights and connections", NeurIPS 2015;
Mishra et al., "Accelerating sparse deep neural networks", arXiv:2104.08378, 2021).
Gradual: Zhu and Gupta, "To prune, or not to prune", arXiv:1710.01878, 2017, equation 1.

Departures from Zhu and Gupta: weights are ranked over the whole network unless `scope="layer"`; a pruned weight stays
pruned (their masks may be revised at every update).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_prune.callback import PruningCallback
from lightning_prune.channels import Channels, shares
from lightning_prune.checks import check_fraction, check_integer
from lightning_prune.context import Context, Proposal
from lightning_prune.schedules import SCHEDULES, Position, Ramp, check_bound, check_schedule
from lightning_prune.selection import Scope, check_layer_floor, check_scope, keep_n_of_m, keep_top
from lightning_prune.structured import StructuredOneShot

__all__ = ["GradualMagnitude", "Magnitude", "magnitude_scores", "parse_pattern"]


def magnitude_scores(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Score every weight by its magnitude |w|.

    Args:
        weights: parameters by name, each of any shape S.
    Returns:
        Scores >= 0 under the same names, each of shape S and of the weight's dtype.
    """
    return {name: weight.detach().abs() for name, weight in weights.items()}


def parse_pattern(pattern: str | None) -> tuple[int, int] | None:
    """Return (N, M) of "N:M", None of None.

    Raises:
        ValueError: any other text, or not 1 <= N < M.
    """
    if pattern is None:
        return None
    parts = pattern.split(":") if isinstance(pattern, str) else []
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts) or not 1 <= int(parts[0]) < int(parts[1]):
        raise ValueError(
            f"`pattern` must be 'N:M' with 1 <= N < M, such as '2:4' (in quotes in YAML), got {pattern!r}."
        )
    return int(parts[0]), int(parts[1])


class Magnitude(StructuredOneShot):
    """Remove the smallest weights at once, all but the N largest of every M, or the weakest channels under a budget.

    Args:
        sparsity: pruned fraction of the selected weights, in [0, 1); None with a `pattern`, a budget or pairs in `at`.
        at: when; see `StructuredOneShot`.
        scope: "global" ranks all weights (or channels) together, "layer" prunes the same fraction of every tensor (or
            channel group).
        layer_floor: fraction of every tensor that stays in any case, in [0, 1 - sparsity].
        pattern: "N:M" keeps the N largest of every M consecutive weights along the flattened input dimension; tensors
            whose input dimension M does not divide stay dense and are named in the receipt.
        **common: `budget` and what goes with it, see `StructuredOneShot`; and see `PruningCallback`. A channel's score is
            the L2 norm of its slab in each parameter it runs through, averaged over these.
    Raises:
        ValueError: an argument breaks its rule, both or neither of `sparsity` and `pattern` are given, or `scope` or
            `layer_floor` with a `pattern`.
    """

    method: ClassVar[str] = "magnitude"

    def __init__(
        self,
        sparsity: float | None = None,
        at: Any = "start",
        scope: Scope = "global",
        layer_floor: float = 0.0,
        pattern: str | None = None,
        **common: Any,
    ) -> None:
        shape = parse_pattern(pattern)
        if shape is not None:
            if sparsity is not None:
                raise ValueError(
                    f"`sparsity` must be left out with `pattern`={pattern!r}, which fixes it, got {sparsity!r}."
                )
            if common.get("budget") is not None or common.get("budget_type") is not None:
                raise ValueError(
                    f"`budget` must be left out with `pattern`={pattern!r}, which removes no channel, got "
                    f"{common.get('budget')!r}."
                )
            if scope != "global" or layer_floor:
                raise ValueError(
                    f"`scope` and `layer_floor` must be left out with `pattern`={pattern!r}, which sets the count of "
                    f"every group, got {scope!r} and {layer_floor!r}."
                )
            sparsity = 1.0 - shape[0] / shape[1]
        super().__init__(sparsity, at, **common)
        check_scope(scope)
        self.scope: Scope = scope
        self.layer_floor = check_layer_floor(layer_floor, self.sparsity or 0.0)
        self.pattern = pattern

    @override
    def unit_scores(self, context: Context, channels: Channels) -> dict[str, Tensor]:
        """Mean L2 norm of each unit's slabs."""
        scores = channels.unit_norms()
        return shares(scores) if self.scope == "layer" else scores

    @override
    def propose_weights(self, context: Context) -> Proposal:
        """Keep the largest |w|."""
        scores = magnitude_scores(context.weights)
        shape = parse_pattern(self.pattern)
        if shape is None:
            return Proposal(keep_top(scores, context.target, self.scope, self.layer_floor, context.alive))
        masks, dense = keep_n_of_m(scores, *shape, context.alive)
        if len(dense) == len(masks):
            raise ValueError(
                f"`pattern`={self.pattern!r} fits no selected tensor: {shape[1]} divides no input dimension of "
                f"{', '.join(dense)}."
            )
        return Proposal(
            masks,
            notes=[f"{name} stays dense: {shape[1]} does not divide its input dimension." for name in dense],
        )


class GradualMagnitude(PruningCallback):
    """Remove the smallest weights step by step while the network trains.

    Args:
        sparsity: pruned fraction of the selected weights at `end`, in [0, 1).
        begin: first update, int (optimizer steps) or float in [0, 1] (fraction of the fit).
        end: last update, likewise; the final sparsity is reached here exactly.
        every_n_steps: optimizer steps between two mask updates, >= 1.
        schedule: "cubic" (the paper's), "linear", "geometric" or "constant".
        initial_sparsity: sparsity at `begin`, in [0, sparsity].
        scope: "global" ranks all weights together, "layer" prunes the same fraction of every tensor.
        layer_floor: fraction of every tensor that stays in any case, in [0, 1 - sparsity].
        **common: see `PruningCallback`.
    Raises:
        ValueError: an argument breaks its rule.
    """

    method: ClassVar[str] = "gradual_magnitude"

    def __init__(
        self,
        sparsity: float,
        begin: int | float = 0.0,
        end: int | float = 0.75,
        every_n_steps: int = 100,
        schedule: str = "cubic",
        initial_sparsity: float = 0.0,
        scope: Scope = "global",
        layer_floor: float = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.sparsity = check_fraction("sparsity", sparsity)
        self.initial_sparsity = check_fraction("initial_sparsity", initial_sparsity)
        if self.initial_sparsity > self.sparsity:
            raise ValueError(f"`initial_sparsity` must not exceed `sparsity`={sparsity}, got {initial_sparsity}.")
        self.begin, self.end = check_bound("begin", begin), check_bound("end", end)
        self.every_n_steps = check_integer("every_n_steps", every_n_steps, 1, "It counts optimizer steps.")
        if type(begin) is type(end) and begin > end:
            raise ValueError(f"`begin` must not lie after `end`, got {begin} and {end}.")
        self.schedule = check_schedule(schedule)
        check_scope(scope)
        self.scope: Scope = scope
        self.layer_floor = check_layer_floor(layer_floor, self.sparsity)
        self._ramp = Ramp(self.begin, self.end, self.every_n_steps)
        self._bounds: tuple[int, int] | None = None

    @property
    @override
    def finished(self) -> bool:
        return self._bounds is not None and self.last_step >= self._bounds[1]

    @override
    def check_fit(self, trainer: Trainer, position: Position, resumed: bool) -> None:
        if trainer.fast_dev_run:
            self._bounds = (0, position.total_steps or 1)
            return
        try:
            self._bounds = self._ramp.bounds(position.total_steps)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        if position.step > self._bounds[0] and not resumed:
            raise MisconfigurationException(
                f"`begin` (step {self._bounds[0]}) lies before step {position.step}, at which this fit goes on from a "
                "checkpoint that was not pruned. Load the weights without `ckpt_path` (a fit of its own), or choose a "
                "later `begin`."
            )

    @override
    def due(self, position: Position) -> float | None:
        """The schedule's value at a grid point that has not been acted on; the final one at the end."""
        if self._bounds is None or self.finished:
            return None
        if position.ended:
            return self.sparsity
        coming = self._ramp.next_due(self.last_step, self._bounds)
        return None if coming is None or position.step < coming else self.sparsity_at(position.step)

    def sparsity_at(self, step: int) -> float:
        """Return the sparsity that the schedule asks for after `step` optimizer steps of the current fit."""
        begin, end = self._bounds or (0, 1)
        progress = 1.0 if step >= end else (step - begin) / (end - begin)
        return SCHEDULES[self.schedule](progress, self.initial_sparsity, self.sparsity)

    @override
    def propose(self, context: Context) -> Proposal:
        """Keep the largest |w|."""
        return Proposal(
            keep_top(magnitude_scores(context.weights), context.target, self.scope, self.layer_floor, context.alive)
        )
