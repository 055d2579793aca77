"""Channels as what ProsPr keeps or removes: groups of the dependency graph, each channel with one gate.

The gate of a channel sits where its layer's output leaves: on weight and bias of the BatchNorm that follows the layer, on
row and bias of a layer without one. Before BatchNorm a scale has no effect on the loss, so a gate there measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.cost import CostModel
from lightning_prune.curvature import graph_nodes
from lightning_prune.dependency import ChannelGroup, ChannelGroups
from lightning_prune.shrink import removable_units

Masks = dict[str, Tensor]
Slab = tuple[str, int]

GATES = ("output", "weight", "consumer")
_NORMS = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")
_WEIGHT_AT = {"ConvolutionBackward0": 1, "AddmmBackward0": 2, "MmBackward0": 1}
_SHOWN = 5


def norms_after(loss: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Return the weights of layers whose output goes straight into BatchNorm -> weight and bias of that norm.

    Args:
        loss: scalar with its graph.
        leaves: the parameters it was computed from, by name.
    Returns:
        parameter names; an empty tuple where the norm has no weight and bias.
    """
    known = {id(leaf): name for name, leaf in leaves.items()}
    found: dict[str, tuple[str, ...]] = {}
    for node in graph_nodes([loss]):
        if node.name() in _NORMS:
            layer, *parameters = (source for source, _ in node.next_functions)
            weight = _parameter(layer.next_functions[_WEIGHT_AT[layer.name()]][0], known) if _is_layer(layer) else None
            if weight is not None:
                names = (_parameter(source, known) for source in parameters)
                found[weight] = (*found.get(weight, ()), *(name for name in names if name is not None))
    return found


def _is_layer(node: Any) -> bool:
    return node is not None and node.name() in _WEIGHT_AT


def _parameter(node: Any, known: Mapping[int, str]) -> str | None:
    """Name of the parameter that a node of the graph holds, through a transposition."""
    if node is not None and node.name() == "TBackward0":
        node = node.next_functions[0][0]
    return known.get(id(getattr(node, "variable", None)))


def gated_slabs(
    group: ChannelGroup, sizes: Mapping[str, tuple[int, ...]], norms: Mapping[str, tuple[str, ...]], gate: str
) -> list[Slab]:
    """Return the (parameter, dim) whose entries at a channel are scaled by its gate.

    Args:
        group: channels that leave together.
        sizes: shape of every parameter.
        norms: result of `norms_after`.
        gate: "output", "weight" (the layers' weights alone) or "consumer" (the weights that read the channels).
    """
    layers = [slab for slab in group.slices if slab not in group.consumers and len(sizes.get(slab[0], ())) > 1]
    if gate == "weight" and layers:
        return layers
    chosen: list[Slab] = []
    for name, dim in layers if gate == "output" else ():
        if name in norms:
            chosen += [(norm, 0) for norm in norms[name]]
        else:
            bias = (name.removesuffix("weight") + "bias", 0)
            chosen += [(name, dim), *([bias] if bias in group.slices else [])]
    return list(dict.fromkeys(chosen)) or sorted(group.consumers)


class ChannelUnits:
    """The channels of a module's groups, as what a ranking keeps or removes.

    A group takes part if all weights it runs through are selected; the others stay whole.

    Args:
        module: the live module; what is masked already counts as removed.
        groups: its channel groups.
        norms: result of `norms_after`.
        gate: see `gated_slabs`.
        selected: bool masks in force, by name, of the weights that may be pruned.
    Raises:
        ValueError: no group takes part.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: ChannelGroups,
        norms: Mapping[str, tuple[str, ...]],
        gate: str,
        selected: Mapping[str, Tensor],
    ) -> None:
        self.all_groups, self.selected, self.sizes = groups, selected, groups.analysis.sizes
        self.groups = [group for group in groups if self._outsiders(group) == []]
        if not self.groups:
            raise ValueError(f"`structured`=True finds no channel to prune: {self._why_none()}. Use structured=False.")
        living = removable_units(module, groups)
        self.device = next(iter(selected.values())).device
        self.alive = {group.name: living[group.name].to(self.device) for group in self.groups}
        self.gates = {group.name: gated_slabs(group, self.sizes, norms, gate) for group in self.groups}
        self.wanted = list(dict.fromkeys(name for slabs in self.gates.values() for name, _ in slabs))

    def scores(self, signed: Mapping[str, Tensor]) -> Masks:
        """|sum over a channel's gated entries of theta_0 * meta-gradient|, one number per channel, by group."""
        return {
            group.name: torch.stack([self._per_channel(signed, group, slab) for slab in self.gates[group.name]])
            .sum(dim=0)
            .abs()
            for group in self.groups
        }

    def expand(self, kept: Mapping[str, Tensor]) -> Masks:
        """Masks of all parameters the channels run through, and of all selected weights."""
        masks = {name: mask.clone() for name, mask in self.selected.items()}
        for group in self.groups:
            gone = (~kept[group.name]).nonzero().flatten().cpu()
            for (name, dim), positions in group.slices.items():
                if name in self.sizes:
                    mask = masks.setdefault(name, torch.ones(self.sizes[name], dtype=torch.bool, device=self.device))
                    mask.index_fill_(dim, torch.as_tensor(positions)[gone].flatten().to(self.device), False)
        return masks

    def notes(self, kept: Mapping[str, Tensor]) -> list[str]:
        """Sentences for the receipt: channels kept, what is left once the others are cut out, what stays whole."""
        counts = {name: int(mask.sum()) for name, mask in kept.items()}
        total = sum(len(group) for group in self.groups)
        costs = CostModel(self.all_groups)
        notes = [
            f"{sum(counts.values())} of {total} channels are kept. With the others cut out, {costs.params(counts):,} of "
            f"{costs.params():,} parameters and {costs.flops(counts) / max(1, costs.flops()):.4f} of the FLOPs are left."
        ]
        whole = self._whole()
        if whole:
            more = f" and {len(whole) - _SHOWN} more" if len(whole) > _SHOWN else ""
            notes.append(f"The outputs of {', '.join(whole[:_SHOWN])}{more} stay whole.")
        return notes

    def _per_channel(self, signed: Mapping[str, Tensor], group: ChannelGroup, slab: Slab) -> Tensor:
        name, dim = slab
        value = signed[name].movedim(dim, 0).flatten(1).sum(dim=1) if signed[name].dim() > 1 else signed[name]
        return value[torch.as_tensor(group.slices[slab], device=value.device)].sum(dim=1)

    def _outsiders(self, group: ChannelGroup) -> list[str]:
        """Weights of a group that may not be pruned."""
        return [name for name in group.parameters() if len(self.sizes.get(name, ())) > 1 and name not in self.selected]

    def _whole(self) -> list[str]:
        """Selected weights that lose no output channel."""
        made = {name for group in self.groups for name, dim in group.slices if (name, dim) not in group.consumers}
        return [name for name in self.selected if name not in made]

    def _why_none(self) -> str:
        outsiders = [name for group in self.all_groups for name in self._outsiders(group)]
        if outsiders:
            return f"every group of channels runs through weights that are not selected, such as {outsiders[0]!r}"
        frozen = self.all_groups.report.frozen
        reasons = [f"{name!r}: {frozen.get((name, 0), 'its channels are in no group')}" for name in self.selected]
        return "; ".join(reasons[:_SHOWN])
