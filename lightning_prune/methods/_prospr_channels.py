"""Channels as what ProsPr keeps or removes: groups of the dependency graph, each channel with one gate.

The gate of a channel sits where its layer's output leaves: on weight and bias of the BatchNorm that follows the layer, on
row and bias of a layer without one. Before BatchNorm a scale has no effect on the loss, so a gate there measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.channels import Channels
from lightning_prune.curvature import graph_nodes
from lightning_prune.dependency import ChannelGroup, ChannelGroups

Masks = dict[str, Tensor]
Slab = tuple[str, int]

GATES = ("output", "weight", "consumer")
_NORMS = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")
_WEIGHT_AT = {"ConvolutionBackward0": 1, "AddmmBackward0": 2, "MmBackward0": 1}


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


class ChannelUnits(Channels):
    """The channels of a module's groups, as what ProsPr's ranking keeps or removes.

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
        super().__init__(module, groups, selected)
        device = next(iter(selected.values())).device
        self.alive = {name: living.to(device) for name, living in self.alive.items()}
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
        return self.masks(kept)

    def _per_channel(self, signed: Mapping[str, Tensor], group: ChannelGroup, slab: Slab) -> Tensor:
        name, dim = slab
        value = signed[name].movedim(dim, 0).flatten(1).sum(dim=1) if signed[name].dim() > 1 else signed[name]
        return value[torch.as_tensor(group.slices[slab], device=value.device)].sum(dim=1)
