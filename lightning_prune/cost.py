"""What a module costs as a function of how many units of each group are kept, without running anything.

A dim has length n(k) = n_fixed + sum_g a_g k_g, with k_g the kept units of group g and a_g the positions of a unit in
it. Parameters, FLOPs and activation volume are sums of products of such lengths: exact in integers, and differentiable
when k is a float tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx

from lightning_prune._dependency.flops import FLOPS
from lightning_prune._dependency.labels import LabelledTensor, labelled
from lightning_prune._dependency.polynomial import Length, Polynomial
from lightning_prune._dependency.trace import Graph, Step
from lightning_prune.checks import check_budget, check_choice, check_integer
from lightning_prune.dependency import ChannelGroups
from lightning_prune.selection import check_scores

Kind = Literal["params", "flops", "volume", "channels"]
KINDS: tuple[Kind, ...] = ("params", "flops", "volume", "channels")
Kept = Mapping[str, int] | Sequence[int] | Tensor


class CostModel:
    """Costs of a module under any number of kept units.

    Parameters count every distinct tensor once. FLOPs are 2 per multiply-add of matrix products and convolutions, as
    `torch.utils.flop_counter` counts them, plus those of fused attention and recurrent layers, which the counter
    reports as 0 on the CPU; `unseen` names them and `counted_flops` leaves them out. Volume is the number of elements
    of all results that are not views. Channels are kept units. FLOPs and volume hold for the example batch the groups
    were traced with.

    Attributes:
        groups: what the costs are functions of.
        unseen: operators whose FLOPs `torch.utils.flop_counter` does not see.
    """

    def __init__(self, groups: ChannelGroups) -> None:
        self.groups = groups
        self.unseen: tuple[str, ...] = ()
        self._group_of = _group_of(groups)
        self._lengths: dict[int, Length] = {}
        self._polynomials = {name: Polynomial(len(groups)) for name in (*KINDS, "unseen")}
        self._add_parameters()
        self._add_activity()
        for index in range(len(groups)):
            self._polynomials["channels"].add([(0, ((index, 1),))])

    @property
    def dense(self) -> list[int]:
        """Units per group before anything is removed."""
        return [len(group) for group in self.groups]

    def params(self, kept: Kept | None = None) -> Any:
        """Return the number of parameters; see `cost`."""
        return self.cost("params", kept)

    def flops(self, kept: Kept | None = None) -> Any:
        """Return FLOPs of one forward pass on the example batch; see `cost`."""
        return self.cost("flops", kept)

    def counted_flops(self, kept: Kept | None = None) -> Any:
        """Return the FLOPs that `torch.utils.flop_counter` sees; see `cost`."""
        return self.cost("flops", kept) - self._value("unseen", kept)

    def volume(self, kept: Kept | None = None) -> Any:
        """Return the number of activation elements on the example batch; see `cost`."""
        return self.cost("volume", kept)

    def channels(self, kept: Kept | None = None) -> Any:
        """Return the number of kept units; see `cost`."""
        return self.cost("channels", kept)

    def cost(self, kind: Kind, kept: Kept | None = None) -> Any:
        """Return one cost.

        Args:
            kind: "params", "flops", "volume" or "channels".
            kept: units kept: an int per group by name (groups left out are whole) or in order; or a float tensor of
                shape (groups,), for soft gates. None: all.
        Returns:
            An int; for a tensor a scalar tensor of its dtype, with gradients.
        Raises:
            ValueError: an unknown kind or group, or a wrong number of groups.
        """
        check_choice("kind", kind, KINDS)
        return self._value(kind, kept)

    def _value(self, name: str, kept: Kept | None) -> Any:
        if isinstance(kept, Tensor):
            if kept.shape != (len(self.groups),):
                raise ValueError(
                    f"`kept` must have shape ({len(self.groups)},), one entry per group, got {tuple(kept.shape)}."
                )
            return self._polynomials[name].soft(kept)
        return self._polynomials[name].exact(self.counts(kept))

    def counts(self, kept: Mapping[str, int] | Sequence[int] | None) -> list[int]:
        """Return kept units per group in order.

        Raises:
            ValueError: an unknown group, a wrong number of groups, or a count outside 0 to the group's units.
        """
        if kept is None:
            return self.dense
        if isinstance(kept, Mapping):
            names = {group.name: index for index, group in enumerate(self.groups)}
            counts = self.dense
            for name, count in kept.items():
                if name not in names:
                    raise ValueError(f"`kept` must name groups ({', '.join(list(names)[:20])}), got {name!r}.")
                counts[names[name]] = int(count)
        else:
            counts = [int(count) for count in kept]
        if len(counts) != len(self.groups):
            raise ValueError(f"`kept` must have one entry for each of {len(self.groups)} groups, got {len(counts)}.")
        for group, count in zip(self.groups, counts, strict=True):
            if not 0 <= count <= len(group):
                raise ValueError(f"`kept` must be in 0 to {len(group)} for group {group.name!r}, got {count}.")
        return counts

    # how the polynomials are read off the labels

    def _add_parameters(self) -> None:
        walk = self.groups.analysis.walk
        module_sizes = self.groups.analysis.sizes
        for name, shape in module_sizes.items():
            tensor = walk.tensors.get(name)
            if tensor is None:
                self._polynomials["params"].add([], math.prod(shape))
            else:
                self._polynomials["params"].add(self._dims(tensor))

    def _add_activity(self) -> None:
        analysis, unseen = self.groups.analysis, set()
        for graph, values in zip(analysis.graphs, analysis.walk.values, strict=True):
            if graph.training:
                continue
            for step in _all_steps(graph):
                if step.inner is None:
                    self._add_volume(step, values[step.node])
                    if self._add_flops(step, values):
                        unseen.add(step.op)
        self.unseen = tuple(sorted(unseen))

    def _add_volume(self, step: Step, value: Any) -> None:
        if _makes_no_memory(step):
            return
        for tensor in labelled([value]):
            self._polynomials["volume"].add(self._dims(tensor))

    def _add_flops(self, step: Step, values: dict[fx.Node, Any]) -> bool:
        """Add the FLOPs of a step; return whether torch's counter does not see them."""
        counter = FLOPS.get(step.op)
        if counter is None:
            return False
        arguments = [_value_of(argument, values) for argument in step.args]
        result = next(iter(labelled([values[step.node]])), None)
        if result is None:
            return False
        seen, terms = counter(arguments, result)
        for factor, dims in terms:
            lengths = [self._length(tensor, dim) for tensor, dim in dims]
            self._polynomials["flops"].add(lengths, factor)
            if not seen:
                self._polynomials["unseen"].add(lengths, factor)
        return not seen and bool(terms)

    def _dims(self, tensor: LabelledTensor) -> list[Length]:
        return [self._length(tensor, dim) for dim in range(len(tensor))]

    def _length(self, tensor: LabelledTensor, dim: int) -> Length:
        label = tensor.labels[dim]
        if label is None:
            return tensor.shape[dim], ()
        if id(label) not in self._lengths:
            groups = self._group_of[self.groups.analysis.walk.cells.find(label)]
            found, counts = np.unique(groups[groups >= 0], return_counts=True)
            parts = tuple(
                (int(g), round(int(n) / len(self.groups[int(g)]))) for g, n in zip(found, counts, strict=True)
            )
            self._lengths[id(label)] = (int((groups < 0).sum()), parts)
        return self._lengths[id(label)]


def units_within_budget(
    scores: Mapping[str, Tensor],
    costs: CostModel,
    budget: float,
    kind: Kind = "params",
    min_keep: int = 1,
    round_to: int = 1,
) -> dict[str, Tensor]:
    """Remove the units of lowest score, one by one, until a cost is within its budget.

    cost(kept) <= budget * cost(all), and the last unit removed was needed for it.

    Args:
        scores: finite scores by group name, each of shape (units,); higher is kept longer. Groups left out stay whole.
        costs: the cost model of the groups.
        budget: fraction of the dense cost that may remain, in (0, 1].
        kind: which cost.
        min_keep: units every group keeps at least, >= 1.
        round_to: round the kept positions of a group's widest slice down to a multiple of this (8 or 16), >= 1.
    Returns:
        bool masks by group name, True = kept, each of shape (units,).
    Raises:
        ValueError: an argument breaks its rule, or the budget is below what can be reached (that value is named).
    """
    _check_budget(scores, costs, budget, kind, min_keep, round_to)
    floors = {name: min(min_keep, len(score)) for name, score in scores.items()}
    order = _removal_order(scores, floors)
    target = budget * costs.cost(kind) + 1e-9
    smallest = costs.cost(kind, floors)
    if smallest > target:
        raise ValueError(
            f"`budget` must be at least {smallest / costs.cost(kind):.4f} for {kind!r}: with {min_keep} unit(s) kept "
            f"per group {smallest} of {costs.cost(kind)} remain, got {budget}. Raise it or lower `min_keep`."
        )

    def masks(removed: int) -> dict[str, Tensor]:
        kept = {name: torch.ones(len(score), dtype=torch.bool) for name, score in scores.items()}
        for name, unit in order[:removed]:
            kept[name][unit] = False
        return kept

    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        counts = {name: int(mask.sum()) for name, mask in masks(middle).items()}
        low, high = (low, middle) if costs.cost(kind, counts) <= target else (middle + 1, high)
    return _rounded(masks(low), scores, costs, round_to, min_keep)


def _check_budget(
    scores: Mapping[str, Tensor], costs: CostModel, budget: Any, kind: str, min_keep: int, round_to: int
) -> None:
    check_budget("budget", budget)
    check_choice("kind", kind, KINDS)
    check_integer("min_keep", min_keep, 1)
    check_integer("round_to", round_to, 1)
    check_scores(scores)
    for name, score in scores.items():
        units = len(costs.groups.named(name))
        if score.shape != (units,):
            raise ValueError(f"`scores` of group {name!r} must have shape ({units},), got {tuple(score.shape)}.")


def _removal_order(scores: Mapping[str, Tensor], floors: Mapping[str, int]) -> list[tuple[str, int]]:
    """Units from the lowest score up, without the best ones that a group keeps anyway; ties by group, then unit."""
    entries = []
    for place, (name, score) in enumerate(scores.items()):
        ranked = torch.sort(score.detach().double().cpu(), stable=True, descending=True).indices.tolist()
        entries += [(float(score[unit]), place, unit, name) for unit in ranked[floors[name] :]]
    return [(name, unit) for _, _, unit, name in sorted(entries, key=lambda entry: entry[:3])]


def _rounded(
    masks: dict[str, Tensor], scores: Mapping[str, Tensor], costs: CostModel, round_to: int, min_keep: int
) -> dict[str, Tensor]:
    """Drop further units until kept units x positions per unit is a multiple, where that leaves any."""
    if round_to == 1:
        return masks
    for name, mask in masks.items():
        group = costs.groups.named(name)
        step = round_to // math.gcd(round_to, group.width)
        kept = int(mask.sum())
        wanted = kept // step * step
        if kept == len(group) or wanted < max(min_keep, 1):
            continue
        worst = sorted(torch.nonzero(mask).ravel().tolist(), key=lambda unit: float(scores[name][unit]))
        mask[worst[: kept - wanted]] = False
    return masks


def _group_of(groups: ChannelGroups) -> np.ndarray:
    result = np.full(groups.analysis.walk.cells.count, -1, np.int64)
    for index, group in enumerate(groups):
        result[list(group.units)] = index
    return result


def _all_steps(graph: Graph) -> Iterator[Step]:
    for step in graph.steps:
        yield step
        if step.inner is not None:
            yield from _all_steps(step.inner)


def _value_of(argument: Any, values: dict[fx.Node, Any]) -> Any:
    if isinstance(argument, fx.Node):
        return values[argument]
    return [_value_of(item, values) for item in argument] if isinstance(argument, (list, tuple)) else argument


def _makes_no_memory(step: Step) -> bool:
    """Views, in-place operators, and dropout, which is the identity in eval mode."""
    if not isinstance(step.target, torch._ops.OpOverload) or "dropout" in step.op:
        return True
    return any(returned.alias_info is not None for returned in step.target._schema.returns)
