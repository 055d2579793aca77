"""Output channels that can be proved independent, read from the graph that autograd records of the loss.

A channel of a convolution or linear layer is a unit of its own if its values reach, through operations that work on
each channel apart and keep zero at zero, only the inputs of other convolutions and linear layers. What cannot be proved
(a residual sum, a concatenation, a grouped convolution, an unknown operation) is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Masks = dict[str, Tensor]

_NORMS = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")
_LINEAR = {"AddmmBackward0": (1, 2, 0), "MmBackward0": (0, 1, None)}  # positions of input, weight and bias
_PASSING = {
    "ReluBackward0", "LeakyReluBackward0", "EluBackward0", "CeluBackward0", "GeluBackward0", "SiluBackward0",
    "MishBackward0", "TanhBackward0", "HardswishBackward0", "MaxPool2DWithIndicesBackward0",
    "MaxPool3DWithIndicesBackward0", "AvgPool2DBackward0", "AvgPool3DBackward0", "AdaptiveAvgPool2DBackward0",
    "AdaptiveAvgPool3DBackward0", "AdaptiveMaxPool2DBackward0", "AdaptiveMaxPool3DBackward0", "NativeDropoutBackward0",
    "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "SqueezeBackward0", "SqueezeBackward1",
    "SqueezeBackward2", "UnsqueezeBackward0", "CloneBackward0", "ToCopyBackward0",
}  # fmt: skip


@dataclass(frozen=True)
class ChannelGroup:
    """The output channels of one layer, each removed as a whole.

    Attributes:
        name: the layer's weight, of shape (channels, ...).
        gate: parameters whose entry or row k is scaled by the gate of channel k.
        members: parameters whose entry or row k is zero once channel k is removed.
        consumers: weights whose inputs are these channels: (name, consecutive inputs per channel).
    """

    name: str
    gate: tuple[str, ...]
    members: tuple[str, ...]
    consumers: tuple[tuple[str, int], ...] = ()


def prove_channels(
    loss: Tensor, leaves: Mapping[str, Tensor], selected: Sequence[str], gate: str
) -> tuple[list[ChannelGroup], list[str]]:
    """Return the channel groups of the selected weights, and the weights whose outputs meet the loss directly.

    Args:
        loss: scalar with its graph.
        leaves: the parameters it was computed from, by name.
        selected: names of the weights to group.
        gate: "output" places the gate after the norm that follows the layer, "weight" on the layer's weight.
    Raises:
        ValueError: a selected weight cannot be proved to have independent channels; each is named with the reason.
    """
    graph = _Graph(loss, leaves)
    groups, outputs, refused = [], [], []
    for name in selected:
        try:
            layer = graph.layer_of(name)
            if graph.meets_loss(layer):
                outputs.append(name)
            else:
                groups.append(graph.group_of(name, layer, gate))
        except _Unproved as reason:
            refused.append(f"{name!r} ({reason})")
    if refused:
        raise ValueError(
            f"`structured`=True cannot prove independent channels for {', '.join(refused)}. Leave these out with "
            "`exclude`, or use structured=False."
        )
    if not groups:
        raise ValueError(
            f"`structured`=True finds no channel to prune: {', '.join(outputs)} feed the loss directly. "
            "Use structured=False."
        )
    return groups, outputs


class _Unproved(Exception):
    """Why the channels of a weight cannot be taken as independent."""


class _Graph:
    """Who uses what in the recorded graph of a loss."""

    def __init__(self, loss: Tensor, leaves: Mapping[str, Tensor]) -> None:
        self.root: Any = loss.grad_fn
        self.shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
        self.users: dict[Any, list[tuple[Any, int]]] = {}
        self.names: dict[Any, str] = {}
        self.nodes: dict[str, Any] = {}
        known = {id(leaf): name for name, leaf in leaves.items()}
        seen, stack = {self.root}, [self.root]
        while stack:
            node = stack.pop()
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in known:
                self.names[node] = known[id(variable)]
                self.nodes[known[id(variable)]] = node
            for position, (child, _) in enumerate(node.next_functions if node is not None else ()):
                if child is not None:
                    self.users.setdefault(child, []).append((node, position))
                    if child not in seen:
                        seen.add(child)
                        stack.append(child)

    def layer_of(self, name: str) -> Any:
        """The node of the one layer that owns a weight."""
        if name not in self.nodes:
            raise _Unproved("the loss does not depend on it")
        uses = self.users[self.nodes[name]]
        if len(uses) == 1 and uses[0][0].name() == "TBackward0":
            uses = self.users[uses[0][0]]
        if len(uses) != 1:
            raise _Unproved(f"it is used {len(uses)} times")
        node, position = uses[0]
        if node.name() == "ConvolutionBackward0" and position == 1:
            if node._saved_groups != 1 or node._saved_transposed:
                raise _Unproved("a grouped or transposed convolution")
            return node
        if node.name() in _LINEAR and position == _LINEAR[node.name()][1]:
            return node
        raise _Unproved(f"it is used by {node.name()}")

    def meets_loss(self, layer: Any) -> bool:
        """Whether a path leads from the layer to the loss without another convolution or linear layer."""
        seen, stack = {layer}, [layer]
        while stack:
            node = stack.pop()
            if node is self.root:
                return True
            for user, position in self.users.get(node, []):
                if user not in seen and not _consumes(user, position):
                    seen.add(user)
                    stack.append(user)
        return False

    def group_of(self, name: str, layer: Any, gate: str) -> ChannelGroup:
        bias = self._parameter(
            layer, 2 if layer.name() == "ConvolutionBackward0" else _LINEAR[layer.name()][2]
        )
        own = (name,) if bias is None else (name, bias)
        users = self.users[layer]
        norm = users[0][0] if len(users) == 1 and users[0][0].name() in _NORMS and users[0][1] == 0 else None
        after: tuple[str, ...] = ()
        if norm is not None:
            scale, shift = self._parameter(norm, 1), self._parameter(norm, 2)
            if scale is None or shift is None:
                raise _Unproved("the norm after it has no weight and bias of its own")
            after = (scale, shift)
        consumers = tuple(self._consumers(layer if norm is None else norm, self.shapes[name][0]))
        gated = (name,) if gate == "weight" else after or own
        return ChannelGroup(name, gated, own + after, consumers)

    def _parameter(self, node: Any, position: int | None) -> str | None:
        """Name of the parameter that enters a node at a position; None if there is none."""
        if position is None or node.next_functions[position][0] is None:
            return None
        source = node.next_functions[position][0]
        if source not in self.names or len(self.users[source]) != 1:
            raise _Unproved("its bias or norm is shared or computed")
        return self.names[source]

    def _consumers(self, node: Any, channels: int) -> Iterator[tuple[str, int]]:
        seen, stack = {node}, [node]
        while stack:
            for user, position in self.users.get(stack.pop(), []):
                if _consumes(user, position):
                    yield self._consumer(user, channels)
                elif not _passes(user):
                    raise _Unproved(f"its output enters {user.name()}")
                elif user not in seen:
                    seen.add(user)
                    stack.append(user)

    def _consumer(self, node: Any, channels: int) -> tuple[str, int]:
        convolves = node.name() == "ConvolutionBackward0"
        source = node.next_functions[1 if convolves else _LINEAR[node.name()][1]][0]
        if not convolves and source is not None and source.name() == "TBackward0":
            source = source.next_functions[0][0]
        name = self.names.get(source)
        if name is None:
            raise _Unproved("its output enters a layer whose weight is computed")
        inputs = self.shapes[name][1]
        if (convolves and node._saved_groups != 1) or inputs % channels:
            raise _Unproved(f"its output enters {name!r}, a grouped layer")
        return name, inputs // channels


def _consumes(node: Any, position: int) -> bool:
    if node.name() == "ConvolutionBackward0":
        return position == 0
    return node.name() in _LINEAR and position == _LINEAR[node.name()][0]


def _passes(node: Any) -> bool:
    """Whether a node works on each channel apart and keeps a channel that is zero at zero."""
    kind = node.name()
    if kind in ("MulBackward0", "DivBackward0"):  # by a constant
        return node.next_functions[0][0] is not None and (
            len(node.next_functions) == 1 or node.next_functions[1][0] is None
        )
    if kind == "HardtanhBackward0":
        return node._saved_min_val <= 0 <= node._saved_max_val
    if kind == "MeanBackward1":
        rank = len(node._saved_self_sym_sizes)
        dims = [dim - 2**64 if dim >= 2**63 else dim for dim in node._saved_dim or ()]
        return bool(dims) and not {dim % rank for dim in dims} & {0, 1}
    return kind in _PASSING


def _per_channel(value: Tensor) -> Tensor:
    return value.flatten(1).sum(dim=1) if value.dim() > 1 else value


class ChannelUnits:
    """The channels of proved groups, as what a ranking keeps or removes.

    Args:
        groups: the groups.
        outputs: selected weights that keep all their channels.
        shapes: shape of every parameter of the network.
        alive: bool masks of the selected weights.
    """

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        outputs: Sequence[str],
        shapes: Mapping[str, tuple[int, ...]],
        alive: Mapping[str, Tensor],
    ) -> None:
        self.groups, self.outputs, self.shapes, self.weights_alive = groups, outputs, shapes, alive
        self.alive = {group.name: alive[group.name].flatten(1).any(dim=1) for group in groups}
        self.wanted = list(dict.fromkeys(name for group in groups for name in group.gate))

    def scores(self, signed: Mapping[str, Tensor]) -> Masks:
        """|sum over a channel's gated entries of theta_0 * meta-gradient|, one number per channel, by group."""
        return {
            group.name: torch.stack([_per_channel(signed[name]) for name in group.gate]).sum(dim=0).abs()
            for group in self.groups
        }

    def expand(self, kept: Mapping[str, Tensor]) -> Masks:
        """Masks of all parameters concerned from bool (channels,) by group."""
        masks = {name: self.weights_alive[name] for name in self.outputs}
        for group in self.groups:
            for name in group.members:
                rows = (
                    kept[group.name].view(-1, *[1] * (len(self.shapes[name]) - 1)).expand(self.shapes[name])
                )
                masks[name] = rows & self.weights_alive[name] if name in self.weights_alive else rows.clone()
        return masks

    def notes(self, kept: Mapping[str, Tensor]) -> list[str]:
        """Sentences for the receipt: channels kept, parameters left once the others are cut out."""
        left, total = (
            sum(int(mask.sum()) for mask in kept.values()),
            sum(mask.numel() for mask in kept.values()),
        )
        after, before = (
            self._parameters_after(kept),
            sum(torch.Size(shape).numel() for shape in self.shapes.values()),
        )
        notes = [
            f"{left} of {total} output channels are kept; cut out, {after} of {before} parameters are left."
        ]
        if self.outputs:
            notes.append(f"{', '.join(self.outputs)}: outputs of the network, all kept.")
        return notes

    def _parameters_after(self, kept: Mapping[str, Tensor]) -> int:
        rows = {name: int(kept[group.name].sum()) for group in self.groups for name in group.members}
        columns = {
            name: int(kept[group.name].sum()) * block
            for group in self.groups
            for name, block in group.consumers
        }
        total = 0
        for name, whole in self.shapes.items():
            shape = list(whole)
            if name in rows:
                shape[0] = rows[name]
            if name in columns:
                shape[1] = columns[name]
            total += torch.Size(shape).numel()
        return total
