"""Penalties that act after every optimizer step: l1 on single weights, l2 on groups; prox, orthant and half-space stages.

Both know how far their steps can still carry a weight (the shrink budget), and settle `penalty="auto"` by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.context import Context, Proposal
from lightning_prune.methods._prox_blocks import Layout, load_zeros, zeros_of
from lightning_prune.methods._prox_operators import (
    metric_group_prox,
    outside_half_space,
    shrink_factors,
    soft_threshold_,
)
from lightning_prune.methods._prox_parts import GroupPart, Part
from lightning_prune.methods._prox_report import Zeros, group_zeros
from lightning_prune.methods._prox_scale import has_metric

__all__ = ["GroupPenalty", "L1Penalty", "Penalty", "Stage", "Trial"]

Stage = Literal["off", "prox", "projected"]
Trial = Literal["prox", "subgradient"]


class Penalty:
    """What l1 and group penalties share.

    Args:
        parts: one per optimizer.
        stage_at: step index (>= 0) -> what to do after that step: nothing, the prox, or the projected step that lets no
            zero revive (orthant, half-space).
        asked: the penalty, >= 0, or "auto".
        factor: of "auto", > 0; see `settle`.
        eps: of the projected step.
        deadline: step at which what is zero becomes masks.
    Attributes:
        value: the penalty in force, >= 0; 0 does nothing at all.
        unit: what is penalized, "weight" or "group".
        settled: whether `settle` has been called.
    """

    unit = "weight"

    def __init__(
        self,
        parts: Sequence[Any],
        stage_at: Callable[[int], Stage],
        asked: float | str = "auto",
        factor: float = 2.0,
        eps: float = 0.0,
        deadline: int = 2**62,
    ) -> None:
        self.deadline = deadline
        self.parts, self.stage_at, self.asked, self.factor, self.eps = list(parts), stage_at, asked, factor, eps
        self.value = 0.0 if isinstance(asked, str) else asked
        self.settled = False

    @property
    def target(self) -> float:
        """What a pruning event says was asked: the penalty."""
        return self.value

    @property
    def final_target(self) -> float:
        """The same."""
        return self.value

    def due(self, step: int) -> bool:
        """Whether what is zero becomes masks now."""
        return step >= self.deadline

    def committed(self, over: bool) -> bool:
        """Called when it has; True: that was all."""
        return True

    @property
    def learns_metric(self) -> bool:
        """Whether an optimizer's metric has to be seen before the penalty can be settled."""
        return any(has_metric(part.optimizer) for part in self.parts)

    def settle(self, reaches: Mapping[Optimizer, Sequence[float]]) -> dict[str, float]:
        """Put the penalty in force, and say what it can do until it is lifted.

        "auto" is factor * median_g (||D x_g|| / (w_g sum_t a_t kappa_t)): a group that no gradient defends loses
        `factor` times the median norm.

        Args:
            reaches: sum_t a_t kappa_t of every param group, by optimizer.
        Returns:
            "penalty", "shrink_budget" (the norm it takes at most from a group of weight 1, in the optimizer's metric),
            "median" (of the norms, likewise) and "reachable" (the fraction of groups, or weights, that it can bring to
            zero where no gradient defends them).
        """
        ratios = torch.cat([self.ratios(part, reaches[part.optimizer]) for part in self.parts])
        median = float(ratios.median()) if len(ratios) else 0.0
        if self.asked == "auto":
            self.value = self.factor * median
        longest = max((max(reach, default=0.0) for reach in reaches.values()), default=0.0)
        within = float((ratios <= self.value).double().mean()) if len(ratios) else 0.0
        self.settled = True
        budget = self.value * longest
        return {"penalty": self.value, "shrink_budget": budget, "median": median * longest, "reachable": within}

    def advance(self, step: int) -> None:
        """Nothing is chosen between steps."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"value": self.value, "settled": self.settled, "steps": [part.steps for part in self.parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.value, self.settled = float(state["value"]), bool(state["settled"])
        for part, steps in zip(self.parts, state["steps"], strict=True):
            part.steps = int(steps)

    def ratios(self, part: Any, reach: Sequence[float]) -> Tensor:
        """Return the penalty at which each weight or group could just become zero."""
        raise NotImplementedError

    def zeros(self) -> Zeros:
        """Return how many weights or groups of each tensor or block are exactly zero."""
        raise NotImplementedError

    def penalized(self) -> float:
        """Return penalty * Omega(x) of the weights as they are."""
        raise NotImplementedError

    def propose(self, context: Context, over: bool) -> Proposal:
        """Return masks of what is not zero now."""
        raise NotImplementedError

    def before(self, part: Any, step: int) -> None:
        """Keep what the step after this needs."""
        if self.value > 0.0 and self.stage_at(step) == "projected":
            part.remember()

    @torch.no_grad()
    def after(self, part: Any, step: int) -> None:
        """Act after a step of `part.optimizer`, the one with index `step`."""
        part.steps += 1
        stage = self.stage_at(step)
        if self.value == 0.0 or stage == "off":
            return
        if stage == "prox" or not part.previous:
            self.prox(part)
        else:
            self.project(part)

    def prox(self, part: Any) -> Tensor | None:
        """Apply the prox that matches the optimizer's step."""
        raise NotImplementedError

    def project(self, part: Any) -> None:
        """Apply the step that lets no zero revive."""
        raise NotImplementedError


class L1Penalty(Penalty):
    """penalty * ||x||_1: prox steps, and orthant steps of OBProx-SG."""

    parts: list[Part]

    @override
    def zeros(self) -> Zeros:
        every = [(name, tensor) for part in self.parts for name, tensor in zip(part.names, part.tensors, strict=True)]
        counts = torch.stack([(tensor.detach() == 0).sum().cpu() for _, tensor in every]).tolist()
        return {name: (count, tensor.numel()) for (name, tensor), count in zip(every, counts, strict=True)}

    @override
    def penalized(self) -> float:
        return self.value * sum(float(tensor.detach().abs().sum()) for part in self.parts for tensor in part.tensors)

    @override
    def propose(self, context: Context, over: bool) -> Proposal:
        if self.value == 0.0:
            return Proposal(dict(context.alive))
        return Proposal({name: context.alive[name] & (weight != 0) for name, weight in context.weights.items()})

    @override
    def prox(self, part: Part) -> None:
        """x <- soft(x, a kappa penalty / D)."""
        for indices, threshold in self._by_length(part):
            tensors = [part.tensors[index].detach() for index in indices]
            metric = part.metric(indices)
            soft_threshold_(tensors, threshold if metric is None else _divided(threshold, metric))

    @override
    def project(self, part: Part) -> None:
        """Take the orthant step; see `_prox_operators.orthant_step`."""
        for indices, threshold in self._by_length(part):
            tensors = [part.tensors[index].detach() for index in indices]
            signs = torch._foreach_sign([part.previous[index] for index in indices])
            metric = part.metric(indices)
            if metric is None:
                torch._foreach_sub_(tensors, torch._foreach_mul(signs, threshold))
            else:
                torch._foreach_addcmul_(tensors, signs, _divided(threshold, metric), -1.0)
            for tensor, side in zip(tensors, torch._foreach_mul(tensors, signs), strict=True):
                tensor.masked_fill_(side <= self.eps, 0.0)

    @override
    def ratios(self, part: Part, reach: Sequence[float]) -> Tensor:
        """Return the penalty at which each weight could just become zero: |x_i| D_i / reach; 1-D, of nonzero weights."""
        indices = part.stepped()
        metric = part.metric(indices)
        found = [torch.zeros(0)]
        for place, index in enumerate(indices):
            size = part.tensors[index].detach().abs().float()
            scaled = size if metric is None else size * metric[place].float()
            found.append(scaled[size > 0].cpu() / max(reach[part.group_of[index]], 1e-300))
        return torch.cat(found)

    def _by_length(self, part: Part) -> list[tuple[list[int], float]]:
        """Tensors that moved, by equal thresholds a kappa penalty."""
        found: dict[float, list[int]] = {}
        for index, (length, moved) in enumerate(zip(part.lengths(), part.moved(), strict=True)):
            if moved:
                found.setdefault(length * self.value, []).append(index)
        return [(indices, threshold) for threshold, indices in found.items()]


class GroupPenalty(Penalty):
    """penalty * sum_g w_g ||x_g||_2: prox steps, and half-space steps of HSPG.

    Args:
        layout: the groups and where they come from; None: only `parts`, for a loop without masks.
        trial: what a half-space step tests and keeps: "prox" of the optimizer's step, or its "subgradient" step.
        **common: see `Penalty`.
    """

    parts: list[GroupPart]
    unit = "group"

    def __init__(self, layout: Layout | None = None, trial: Trial = "prox", **common: Any) -> None:
        if layout is not None:
            common["parts"] = layout.parts
        super().__init__(**common)
        self.layout, self.trial = layout, trial

    @override
    def zeros(self) -> Zeros:
        return group_zeros(self.parts)

    @override
    def penalized(self) -> float:
        return self.value * sum(float((part.weight * part.norms()).sum()) for part in self.parts)

    @override
    def propose(self, context: Context, over: bool) -> Proposal:
        assert self.layout is not None
        kept = {}
        for part in self.parts:
            stays = ~part.zero & part.nonzero() if self.value > 0.0 else ~part.zero
            kept.update({name: mask.cpu() for name, mask in part.table.by_block(stays).items()})
        channels = self.layout.channels
        return Proposal(channels.masks(kept), notes=[*self.layout.notes(kept)])

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "zero": zeros_of(self.parts)}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        load_zeros(self.parts, state["zero"])

    @override
    def prox(self, part: GroupPart) -> Tensor:
        """x_g <- prox of a kappa penalty w_g ||x_g|| in the metric of the optimizer; returns the new norms.

        The largest groups of every block, as many as it must keep, see no penalty.
        """
        active, lengths = part.active(), part.lengths()
        threshold = self.value * part.weight
        if active is not None:
            threshold = threshold * active
        metric = _metric_or_none(part)
        even = len(set(lengths)) == 1
        if even:  # a threshold t in the metric D / a is the threshold a t in the metric D
            threshold = lengths[0] * threshold
        if even and metric is None:
            norms = part.table.dot(part.tensors, part.tensors).sqrt_()
            factors = shrink_factors(norms, _spared(part, norms, threshold))
            part.table.scale_(factors)
            return norms * factors
        matrices = part.table.matrices([tensor.detach() for tensor in part.tensors])
        metrics = part.table.matrices(metric if even and metric else _over(part.tensors, metric, lengths))
        if part.keep is not None:
            scaled = [_row_norms(metric * matrix) for metric, matrix in zip(metrics, matrices, strict=True)]
            threshold = _spared(part, torch.cat(scaled), threshold)
        thresholds = part.table.by_block(threshold).values()
        found = [metric_group_prox(*each) for each in zip(matrices, metrics, thresholds, strict=True)]
        part.table.write_(found)
        return torch.cat([_row_norms(matrix) for matrix in found])

    @override
    def project(self, part: GroupPart) -> None:
        """Take the half-space step: a trial, then zero every group that leaves its half-space, for good."""
        squares = part.table.dot(part.previous, part.previous)
        sizes = self.prox(part) if self.trial == "prox" else self._subgradient(part, squares)
        products = part.table.dot([tensor.detach() for tensor in part.tensors], part.previous)
        leaving = outside_half_space(products, squares, self.eps, self.trial == "subgradient")
        active = part.active()
        leaving = part.zero | (leaving if active is None else leaving & active)
        part.zero = part.zero | part.table.without(leaving, sizes, part.keep)
        part.table.scale_((~part.zero).to(part.table.dtype))

    @override
    def ratios(self, part: GroupPart, reach: Sequence[float]) -> Tensor:
        """Return the penalty at which each group could just become zero: ||D x||_g / (w_g reach); 1-D, of live groups."""
        if len(part.stepped()) < len(part.tensors):
            return torch.zeros(0)
        metric = _metric_or_none(part)
        reaches = [max(reach[index], 1e-300) for index in part.group_of]
        scaled = torch._foreach_mul(
            _over(part.tensors, metric, reaches), [tensor.detach().to(part.table.dtype) for tensor in part.tensors]
        )
        norms = part.table.dot(scaled, scaled).sqrt_() / part.weight
        return norms[norms > 0].cpu()

    def _subgradient(self, part: GroupPart, squares: Tensor) -> Tensor:
        """x_g <- x_g - a kappa penalty w_g / D x_g' / ||x_g'||, with x' the previous value; returns the new norms."""
        share = self.value * part.weight * torch.where(squares > 0, squares.rsqrt(), 0.0)
        active = part.active()
        if active is not None:
            share = share * active
        steps = torch._foreach_mul(part.previous, part.table.spread(share, outside=0.0))
        inverse = _over(part.tensors, _metric_or_none(part), part.lengths())
        torch._foreach_addcdiv_([tensor.detach() for tensor in part.tensors], steps, inverse, -1.0)
        return part.table.dot(part.tensors, part.tensors).sqrt_()


def _spared(part: GroupPart, norms: Tensor, threshold: Tensor) -> Tensor:
    """Thresholds, 0 for the largest groups of every block, as many as it keeps."""
    if part.keep is None:
        return threshold
    return threshold * part.table.without(torch.ones_like(part.zero), norms, part.keep)


def _row_norms(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=1)


def _metric_or_none(part: Part) -> list[Tensor] | None:
    """D of all tensors; 1 for those that have not moved yet, whose groups are not active."""
    known = part.stepped()
    metric = part.metric(known)
    if metric is None:
        return None
    by_index = dict(zip(known, metric, strict=True))
    return [by_index[i] if i in by_index else torch.ones_like(tensor) for i, tensor in enumerate(part.tensors)]


def _over(tensors: Sequence[Tensor], metric: Sequence[Tensor] | None, lengths: Sequence[float]) -> list[Tensor]:
    """D_j / length_j of every tensor, of its shape; D_j where the length is 0, as its groups are not active."""
    base = [torch.ones_like(tensor) for tensor in tensors] if metric is None else list(metric)
    return list(torch._foreach_div(base, [length or 1.0 for length in lengths]))


def _divided(threshold: float, metric: Sequence[Tensor]) -> list[Tensor]:
    inverse = torch._foreach_reciprocal(list(metric))
    torch._foreach_mul_(inverse, threshold)
    return list(inverse)
