"""One flat vector of gates over all channel groups: which tensor entries each gate scales, what it costs, who stays.

Hardening keeps a promise: gates leave in the order of psi, the masks of longer prefixes lie inside those of shorter ones,
so cost is monotone and a binary search finds the shortest prefix within the budget:

    cost(m_k) <= V_0 < cost(m_{k-1}).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.channels import Channels
from lightning_prune.cost import CostModel, Kind
from lightning_prune.dependency import ChannelGroup

Slab = tuple[str, int]


@dataclass(frozen=True)
class Slot:
    """A dim of a parameter whose positions are scaled by gates.

    Attributes:
        name: the parameter.
        dim: which of its dims.
        gates: the gate of every position, int64 of shape (size of the dim,); the number of gates stands for "none".
    """

    name: str
    dim: int
    gates: Tensor


@dataclass(frozen=True)
class Layout:
    """The gates of a module.

    Attributes:
        groups: names of the channel groups that have gates, in order.
        units: the unit of every gate, int64 of shape (gates,); several gates may share one.
        group_of_unit: index of every unit's group in the cost model, int64 of shape (units,).
        place_of_unit: index of every unit in its group, int64 of shape (units,).
        segments: what each gate competes in for its place (a group, or a layer), int64 of shape (gates,).
        slots: what the gates scale.
        fixed: kept units of every group of the cost model that have no gate, float64 of shape (all groups,).
        costs: the cost model.
    """

    groups: tuple[str, ...]
    units: Tensor
    group_of_unit: Tensor
    place_of_unit: Tensor
    segments: Tensor
    slots: tuple[Slot, ...]
    fixed: Tensor
    costs: CostModel

    @property
    def size(self) -> int:
        """The number of gates."""
        return len(self.units)

    @property
    def signature(self) -> list[list[object]]:
        """What a checkpoint must agree with: names and sizes of all groups with gates."""
        sizes = torch.bincount(self.group_of_unit, minlength=len(self.fixed)).tolist()
        names = [group.name for group in self.costs.groups]
        return [[names[index], size] for index, size in enumerate(sizes) if size] + [["gates", self.size]]

    def units_kept(self, gates: Tensor) -> Tensor:
        """Return how much of each unit is kept: 1 - prod(1 - m) over its gates, the gate itself where it is alone.

        Args:
            gates: m of shape (gates,), float in [0, 1].
        Returns:
            float of shape (units,), of the same dtype.
        """
        if self.size == len(self.group_of_unit):
            return gates
        gone = gates.new_ones(len(self.group_of_unit))
        return 1 - gone.scatter_reduce(0, self.units.to(gates.device), 1 - gates, "prod")

    def share(self, gates: Tensor, kind: Kind) -> Tensor:
        """Return the remaining fraction V of a cost for soft gates, with gradients.

        Args:
            gates: m of shape (gates,), float64 on the CPU, in [0, 1].
            kind: which cost.
        """
        kept = self.fixed.index_add(0, self.group_of_unit, self.units_kept(gates))
        return self.costs.cost(kind, kept) / self.costs.cost(kind)

    def hard_cost(self, gates: Tensor, kind: Kind) -> int:
        """Return a cost for binary gates, exactly.

        Args:
            gates: bool of shape (gates,), on the CPU.
            kind: which cost.
        """
        kept = self.units_kept(gates.double()) > 0.5
        counts = torch.bincount(self.group_of_unit[kept], minlength=len(self.fixed))
        return int(self.costs.cost(kind, (counts + self.fixed.long()).tolist()))

    def kept(self, gates: Tensor) -> dict[str, Tensor]:
        """Return bool masks by group name, True = kept, each of shape (units of the group,), for binary gates."""
        alive = self.units_kept(gates.double()) > 0.5
        masks = {}
        for index, group in enumerate(self.costs.groups):
            if group.name in self.groups:
                masks[group.name] = torch.zeros(len(group), dtype=torch.bool)
                masks[group.name][self.place_of_unit[alive & (self.group_of_unit == index)]] = True
        return masks


def build_layout(channels: Channels, coupling: str = "graph", left_out: Sequence[str] = ()) -> Layout:
    """Return the gates of a module's channels.

    Args:
        channels: the groups that take part; units that are gone already have no gate.
        coupling: "graph": one gate per unit, on the weights that read it; "per_layer": one per channel of every
            BatchNorm layer, on its weight and bias (on the readers where a group has no such layer).
        left_out: names of groups that get no gates.
    """
    total = len(channels.all_groups)
    fixed = torch.tensor([float(len(group)) for group in channels.all_groups], dtype=torch.float64)
    columns: dict[str, list[Tensor]] = {"units": [], "groups": [], "places": [], "segments": []}
    pieces: dict[Slab, list[tuple[Tensor, Tensor]]] = {}
    names, gates, units, segments = [], 0, 0, 0
    own_groups = {group.name: group for group in channels.groups}
    for index in range(total):
        group = own_groups.get(channels.all_groups[index].name)
        if group is None or group.name in left_out:
            continue
        names.append(group.name)
        fixed[index] = 0
        places = channels.alive[group.name].nonzero().flatten()
        own = torch.arange(units, units + len(places))
        columns["groups"].append(torch.full_like(own, index))
        columns["places"].append(places)
        for layer in _gated_layers(group, channels, coupling):
            positions = torch.as_tensor(group.slices[layer[0]])[places]
            per_unit = positions.shape[1] if coupling == "per_layer" and layer[0] not in group.consumers else 1
            numbers = gates + torch.arange(len(places) * per_unit).view(len(places), per_unit)
            columns["units"].append(own.repeat_interleave(per_unit))
            columns["segments"].append(torch.full((numbers.numel(),), segments))
            for slab in layer:
                at = torch.as_tensor(group.slices[slab])[places]
                pieces.setdefault(slab, []).append((at.flatten(), numbers.expand_as(at).flatten()))
            gates, segments = gates + numbers.numel(), segments + 1
        units += len(places)
    slots = tuple(_slot(slab, parts, channels, gates) for slab, parts in pieces.items())
    joined = {name: torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long) for name, parts in columns.items()}
    return Layout(
        tuple(names),
        joined["units"],
        joined["groups"],
        joined["places"],
        joined["segments"],
        slots,
        fixed,
        channels.costs,
    )


def _gated_layers(group: ChannelGroup, channels: Channels, coupling: str) -> list[list[Slab]]:
    """The slabs that share gates: all readers of a group, or weight and bias of each norm it runs through."""
    readers = [slab for slab in group.slices if slab in group.consumers]
    if coupling == "graph":
        return [readers]
    norms: dict[str, list[Slab]] = {}
    for name, dim in group.slices:
        if len(channels.sizes.get(name, ())) == 1 and name.rpartition(".")[0] in _norms_of(channels):
            norms.setdefault(name.rpartition(".")[0], []).append((name, dim))
    return list(norms.values()) or [readers]


def _norms_of(channels: Channels) -> set[str]:
    """Return the names of the BatchNorm layers that have weight and bias."""
    modules = channels.module.named_modules()
    return {
        name for name, module in modules if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.affine
    }


def _slot(slab: Slab, parts: Sequence[tuple[Tensor, Tensor]], channels: Channels, none: int) -> Slot:
    gates = torch.full((channels.sizes[slab[0]][slab[1]],), none)
    for positions, numbers in parts:
        gates[positions] = numbers
    return Slot(*slab, gates)


def protected_gates(psi: Tensor, segments: Tensor, min_keep: float) -> Tensor:
    """Return which gates stay in any case: the largest psi of every segment, ceil(min_keep n) of n, at least one.

    Args:
        psi: of shape (gates,).
        segments: int64 of shape (gates,).
        min_keep: fraction in [0, 1).
    Returns:
        bool of shape (gates,); ties go to the lower index.
    """
    stays = torch.zeros(len(psi), dtype=torch.bool)
    for segment in segments.unique().tolist():
        members = (segments == segment).nonzero().flatten()
        count = max(1, math.ceil(min_keep * len(members) - 1e-9))
        ranked = torch.sort(psi[members], stable=True, descending=True).indices
        stays[members[ranked[:count]]] = True
    return stays


def smallest_share(layout: Layout, kind: Kind, min_keep: float) -> float:
    """Return the fraction of a cost that remains when only the protected gates stay."""
    stays = protected_gates(torch.zeros(layout.size), layout.segments, min_keep)
    return layout.hard_cost(stays, kind) / layout.costs.cost(kind)


def uniform_width(layout: Layout, budget: float, kind: Kind) -> float:
    """Return the part w of every unit at which a cost meets its budget: the network of uniform width that fits.

    Args:
        layout: the gates and their costs.
        budget: fraction of the dense cost that may remain, in (0, 1].
        kind: which cost.
    Returns:
        w in [0, 1], to 1e-6.
    """
    units = torch.ones(len(layout.group_of_unit), dtype=torch.float64)

    def cost(width: float) -> float:
        kept = layout.fixed.index_add(0, layout.group_of_unit, width * units)
        return float(layout.costs.cost(kind, kept)) / layout.costs.cost(kind)

    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low


def floor_within(layout: Layout, budget: float, kind: Kind) -> float:
    """Return the default of `min_keep`: half of the uniform width, or 0 where that many protected gates cost too much."""
    floor = uniform_width(layout, budget, kind) / 2
    return floor if smallest_share(layout, kind, floor) <= budget else 0.0


def harden(layout: Layout, psi: Tensor, budget: float, kind: Kind, min_keep: float = 0.0) -> Tensor:
    """Return which gates stay: as many of the largest psi as the budget allows.

    Gates are ranked by psi and never by z, which has ties at 1. Ties of psi leave by lower index first.

    Args:
        layout: the gates and their costs.
        psi: float of shape (gates,).
        budget: fraction of the dense cost that may remain, in (0, 1].
        kind: which cost.
        min_keep: fraction of every segment that stays in any case, in [0, 1); at least one gate of each does.
    Returns:
        bool of shape (gates,) on the CPU, True = kept.
    Raises:
        ValueError: the protected gates alone cost more than the budget.
    """
    psi = psi.detach().double().cpu()
    stays = protected_gates(psi, layout.segments, min_keep)
    limit = budget * layout.costs.cost(kind) + 1e-9
    order = torch.sort(psi, stable=True).indices
    order = order[~stays[order]]
    if layout.hard_cost(stays, kind) > limit:
        raise ValueError(unreachable(layout, budget, kind, min_keep))

    def after(removed: int) -> Tensor:
        gates = torch.ones(layout.size, dtype=torch.bool)
        gates[order[:removed]] = False
        return gates

    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if layout.hard_cost(after(middle), kind) <= limit else (middle + 1, high)
    return after(low)


def unreachable(layout: Layout, budget: float, kind: Kind, min_keep: float) -> str:
    """Return what to say of a budget below the smallest cost that can be reached."""
    smallest = smallest_share(layout, kind, min_keep)
    return (
        f"`budget` must be at least {smallest:.4f} for {kind!r}: with `min_keep`={min_keep:g} (and one channel) of every "
        f"group that much remains, got {budget}. Raise it or lower `min_keep`."
    )


def rounded(layout: Layout, gates: Tensor, psi: Tensor, round_to: int) -> Tensor:
    """Return the gates with further ones off until kept positions of every group are a multiple, where any are left.

    Args:
        layout: gates, one per unit.
        gates: bool of shape (gates,), on the CPU.
        psi: float of shape (gates,).
        round_to: >= 1.
    """
    gates, psi = gates.clone(), psi.detach().cpu()
    for index, group in enumerate(layout.costs.groups):
        members = (layout.group_of_unit == index).nonzero().flatten()
        kept = members[gates[members]]
        step = round_to // math.gcd(round_to, group.width)
        wanted = len(kept) // step * step
        if 0 < wanted < len(kept) < len(group):
            gates[kept[torch.sort(psi[kept], stable=True).indices[: len(kept) - wanted]]] = False
    return gates
