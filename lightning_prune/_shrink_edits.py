"""Attributes of custom modules that may hold the length of a cut dim, and the modules a group runs through."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from lightning_prune._dependency.groups import ChannelGroup
from lightning_prune._dependency.labels import labelled
from lightning_prune._dependency.trace import Graph, Step
from lightning_prune._dependency.walk import Walk, words
from lightning_prune._shrink_plan import AttributeEdit, replaced_lengths
from lightning_prune.dependency import ChannelGroups

# operators whose arguments are sizes that the code computes
_BUILDS_SHAPES = frozenset(
    words(
        """
        view reshape _unsafe_view unflatten expand split split_with_sizes chunk tensor_split slice narrow zeros ones
        full empty rand randn new_zeros new_empty new_full new_ones repeat repeat_interleave arange group_norm unfold
        pixel_shuffle broadcast_to tile lstm gru rnn_tanh rnn_relu pad constant_pad_nd conv1d conv2d conv3d layer_norm
        rms_norm einsum scaled_dot_product_attention
        """
    )
)
_OWN = ("_parameters", "_buffers", "_modules", "training")


@dataclass
class Reach:
    """Where a group runs through.

    Attributes:
        builders: paths of modules that build shapes from its dims, and owners of its tensors: where edits may be.
        paths: paths of all modules that touch it.
        labels: labels of its dims, one per length and content.
    """

    builders: list[str]
    paths: list[str]
    labels: list[np.ndarray]


def reaches(groups: ChannelGroups) -> list[Reach]:
    """Return where each group runs through, by one pass over the graphs."""
    return _Survey(groups).run()


class _Survey:
    def __init__(self, groups: ChannelGroups) -> None:
        self.groups, self.analysis = groups, groups.analysis
        self.walk: Walk = groups.analysis.walk
        self.group_of = np.full(self.walk.cells.count, -1, np.int64)
        for index, group in enumerate(groups):
            self.group_of[list(group.units)] = index
        self.known: dict[int, list[int]] = {}
        self.builders: list[dict[str, None]] = [{} for _ in groups]
        self.paths: list[dict[str, None]] = [{} for _ in groups]
        self.labels: list[dict[int, np.ndarray]] = [{} for _ in groups]

    def run(self) -> list[Reach]:
        for graph, values in zip(self.analysis.graphs, self.walk.values, strict=True):
            for step in _steps(graph):
                self._visit(step, graph, values)
        recorded = any(graph.origin == "make_fx" for graph in self.analysis.graphs)
        for index, group in enumerate(self.groups):
            for name in group.parameters():
                for alias in self._aliases(name):
                    self._own(index, alias, recorded)
        return [
            Reach(list(b), list(p), list(labels.values()))
            for b, p, labels in zip(self.builders, self.paths, self.labels, strict=True)
        ]

    def _visit(self, step: Step, graph: Graph, values: dict[fx.Node, Any]) -> None:
        touched: dict[int, None] = {}
        nodes = [step.node, *step.node.all_input_nodes]
        for tensor in labelled([values.get(node) for node in nodes]):
            for label in tensor.labels:
                if label is None:
                    continue
                for index in self._groups_in(label):
                    touched[index] = None
                    self.labels[index].setdefault(id(label), label)
        for index in touched:
            self.paths[index].setdefault(step.path or graph.source.path)
            if step.op in _BUILDS_SHAPES:
                self.builders[index].update(dict.fromkeys(step.parents))

    def _groups_in(self, label: np.ndarray) -> list[int]:
        if id(label) not in self.known:
            found = np.unique(self.group_of[self.walk.cells.find(label)])
            self.known[id(label)] = found[found >= 0].tolist()
        return self.known[id(label)]

    def _aliases(self, first: str) -> list[str]:
        return [name for name, known in self.walk.aliases.items() if known == first]

    def _own(self, index: int, name: str, recorded: bool) -> None:
        """Owners of tensors; a graph without a module stack knows nothing more, so their parents too."""
        owner = name.rpartition(".")[0]
        self.builders[index].setdefault(owner)
        self.paths[index].setdefault(owner)
        if recorded and "." in owner:
            self.builders[index].setdefault(owner.rpartition(".")[0])


def _steps(graph: Graph) -> Iterator[Step]:
    for step in graph.steps:
        yield step
        if step.inner is not None:
            yield from _steps(step.inner)


def new_lengths(walk: Walk, labels: Sequence[np.ndarray], removed: np.ndarray) -> dict[int, int]:
    """Return old length -> new length of labelled dims; the first dim of a length decides.

    Args:
        walk: the analysis.
        labels: labels of dims.
        removed: ids of all removed units.
    """
    lengths: dict[int, int] = {}
    for label in labels:
        if len(label) not in lengths:
            lengths[len(label)] = int((~np.isin(walk.cells.find(label), removed)).sum())
    return {old: new for old, new in lengths.items() if old != new}


def candidate_names(module: nn.Module, lengths: dict[int, int]) -> list[str]:
    """Return attributes of one module that an edit of these lengths would change."""
    names = []
    for name, value in vars(module).items():
        if name in _OWN or isinstance(value, (Tensor, np.ndarray)):
            continue
        new = replaced_lengths(value, lengths)
        if new is not value and new != value:
            names.append(name)
    return names


def pattern(path: str) -> str:
    """Return a path with its digits replaced: repeated blocks share decisions."""
    return re.sub(r"\d+", "#", path)


def signature(group: ChannelGroup) -> tuple[tuple[str, int], ...]:
    """Return what groups of repeated blocks have in common."""
    return tuple(sorted({(pattern(name), dim) for name, dim in group.slices}))


def common_path(paths: Iterable[str]) -> str:
    """Return the path of the innermost module that holds all of them."""
    parts = [path.split(".") if path else [] for path in paths]
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


Names = frozenset[tuple[str, str]]  # (path pattern, attribute)


def edits_for(
    module: nn.Module, reach: Reach, lengths: dict[int, int], wanted: Names | None
) -> dict[tuple[str, str], AttributeEdit]:
    """Return the edits of one group by (path, attribute); `wanted` None takes every candidate."""
    found = {}
    for path in reach.builders:
        try:
            owner = module.get_submodule(path)
        except AttributeError:  # a path of a functional call
            continue
        for name in candidate_names(owner, lengths):
            if wanted is None or (pattern(path), name) in wanted:
                pairs = tuple(sorted(lengths.items()))
                found[path, name] = AttributeEdit(path, name, pairs)
    return found
