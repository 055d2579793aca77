"""An exported graph cut to fewer units: the constants of steps that build shapes are rewritten from the labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import fx

from lightning_prune._dependency.labels import Label, LabelledTensor, labelled
from lightning_prune._dependency.trace import Graph, Step
from lightning_prune._dependency.walk import Walk

_SIZED = (
    "view", "reshape", "_unsafe_view", "expand", "full", "zeros", "ones", "new_zeros", "new_ones", "new_full",
    "empty", "new_empty", "rand", "randn", "broadcast_to",
)  # fmt: skip


class Rewriter:
    """Rewrite the nodes of one graph for units that are gone.

    Args:
        walk: the analysis that labelled the graph.
        graph: the graph; its nodes are changed.
        values: labelled outputs by node.
        removed: roots of the removed units.
    """

    def __init__(self, walk: Walk, graph: Graph, values: Mapping[fx.Node, Any], removed: Sequence[int]) -> None:
        self.walk, self.graph, self.values = walk, graph, values
        self.removed = np.asarray(sorted(removed))

    def run(self) -> None:
        """Change every node whose arguments hold a length that shrinks."""
        for step in _steps(self.graph):
            result = list(labelled([self.values.get(step.node)]))
            inputs = [self._of(node) for node in step.node.all_input_nodes]
            tensors = [t for t in (*result, *inputs) if isinstance(t, LabelledTensor)]
            if not any(self._shrinks(label) for tensor in tensors for label in tensor.labels):
                continue
            change = _CHANGES.get(step.op)
            if change is not None:
                step.node.args = tuple(change(self, step, list(step.node.args), result))

    def kept(self, label: Label) -> np.ndarray:
        """Return which positions of a dim stay."""
        assert label is not None
        return ~np.isin(self.walk.cells.find(label), self.removed)

    def sizes(self, tensor: LabelledTensor) -> list[int]:
        """Return the shape after the cut."""
        return [
            size if label is None else int(self.kept(label).sum())
            for size, label in zip(tensor.shape, tensor.labels, strict=True)
        ]

    def first(self, step: Step) -> LabelledTensor:
        """Return the labelled first argument of a step."""
        value = self._of(step.node.args[0])
        if not isinstance(value, LabelledTensor):
            raise ValueError(f"the first argument of {step.op} must be a tensor")
        return value

    def _of(self, node: Any) -> Any:
        return self.values.get(node) if isinstance(node, fx.Node) else None

    def _shrinks(self, label: Label) -> bool:
        return label is not None and not bool(self.kept(label).all())


def _sizes(r: Rewriter, step: Step, args: list[Any], result: list[LabelledTensor]) -> list[Any]:
    place = next((index for index, value in enumerate(args) if isinstance(value, (list, tuple))), None)
    if place is not None:
        new = r.sizes(result[0])
        args[place] = [
            old if not isinstance(old, int) or old == -1 or fresh == size else fresh
            for old, fresh, size in zip(args[place], new, result[0].shape, strict=True)
        ]
    return args


def _unflatten(r: Rewriter, step: Step, args: list[Any], result: list[LabelledTensor]) -> list[Any]:
    dim, new = args[1] % len(r.first(step)), r.sizes(result[0])
    fresh = new[dim : dim + len(args[2])]
    args[2] = [old if not isinstance(old, int) or old == -1 else n for old, n in zip(args[2], fresh, strict=True)]
    return args


def _split(r: Rewriter, step: Step, args: list[Any], result: list[LabelledTensor]) -> list[Any]:
    dim = (args[2] if len(args) > 2 else step.kwargs.get("dim", 0)) % len(result[0])
    lengths = [r.sizes(part)[dim] for part in result]
    args[1] = lengths if isinstance(args[1], (list, tuple)) else lengths[0]
    return args


def _slice(r: Rewriter, step: Step, args: list[Any], result: list[LabelledTensor]) -> list[Any]:
    """A bound becomes the number of kept positions before it."""
    tensor = r.first(step)
    label = tensor.labels[(args[1] if len(args) > 1 else 0) % len(tensor)]
    if label is None:
        return args
    kept = r.kept(label)
    for place in (2, 3):
        bound = args[place] if len(args) > place else None
        if isinstance(bound, int) and bound < len(kept):
            args[place] = int(kept[:bound].sum()) if bound >= 0 else -int(kept[bound:].sum())
    return args


def _convolution(r: Rewriter, step: Step, args: list[Any], result: list[LabelledTensor]) -> list[Any]:
    """A depthwise convolution has as many groups as channels."""
    tensor, weight = r.first(step), r._of(args[1])
    channel = len(tensor) - len(weight) + 1
    if len(args) > 6 and args[6] > 1 and args[6] == tensor.shape[channel]:
        args[6] = r.sizes(tensor)[channel]
    return args


def _group_norm(r: Rewriter, step: Step, args: list[Any], result: list[LabelledTensor]) -> list[Any]:
    tensor = r.first(step)
    args[1] = max(1, args[1] * r.sizes(tensor)[1] // tensor.shape[1])
    return args


_Change = Callable[[Rewriter, Step, list[Any], list[LabelledTensor]], list[Any]]
_CHANGES: dict[str, _Change] = {
    **dict.fromkeys(_SIZED, _sizes),
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    "unflatten": _unflatten,
    "slice": _slice,
    "group_norm": _group_norm,
}


def _steps(graph: Graph) -> Iterator[Step]:
    for step in graph.steps:
        yield step
        if step.inner is not None:
            yield from _steps(step.inner)
