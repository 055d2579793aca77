"""From classes of cells to groups of units that may leave."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_prune._dependency.cells import Cell
from lightning_prune._dependency.labels import Slab
from lightning_prune._dependency.walk import Walk

MIN_UNITS = 2  # a group of one unit cannot lose any


@dataclass(frozen=True)
class ChannelGroup:
    """Units that may leave a module, each from every tensor it runs through; all cost the same.

    Attributes:
        name: the first producer's module, such as "layer1.0.conv1"; unique among the groups of a module.
        units: an id per unit, in the order of positions of the first slice.
        slices: (parameter or buffer, dim) -> positions of each unit, int of shape (units, positions per unit).
        consumers: (parameter, dim) whose slabs read the units; zeroing a unit's slabs there is what masking it means.
        producers: (parameter, dim) whose slabs make the units.
    """

    name: str
    units: tuple[int, ...]
    slices: dict[Slab, NDArray[np.int64]]
    consumers: frozenset[Slab]
    producers: frozenset[Slab]

    def __len__(self) -> int:
        return len(self.units)

    @property
    def pass_throughs(self) -> frozenset[Slab]:
        """(tensor, dim) through which the units only pass: norms, depthwise convolutions, scales."""
        return frozenset(self.slices) - self.consumers - self.producers

    @property
    def width(self) -> int:
        """Positions per unit in the widest slice."""
        return max(positions.shape[1] for positions in self.slices.values())

    def parameters(self) -> tuple[str, ...]:
        """Return the names of all tensors the units run through, each once."""
        return tuple(dict.fromkeys(name for name, _ in self.slices))


def close(walk: Walk) -> None:
    """Freeze every class with a sum that no weight holding the class could zero."""
    holds = {
        (name, dim): np.unique(walk.cells.find(label))
        for name, tensor in walk.tensors.items()
        for dim, label in enumerate(tensor.labels)
        if label is not None
    }
    nothing = np.zeros(0, np.int64)
    for label, slabs in walk.consumers:
        roots = np.unique(walk.cells.find(label))
        held = np.concatenate([nothing, *(holds.get(slab, nothing) for slab in slabs)])
        walk.cells.freeze(np.setdiff1d(roots, held), "a sum over it has no weight that could be zeroed")


def free_classes(walk: Walk) -> NDArray[np.bool_]:
    """Return per cell id whether it is the root of a class that may leave, alone or not."""
    consumed = np.zeros(walk.cells.count, bool)
    for label, slabs in walk.consumers:
        for name, dim in slabs:
            held = walk.tensors[name].labels[dim]
            if held is not None:
                roots = np.intersect1d(walk.cells.find(label), walk.cells.find(held))
                consumed[roots] = True
    every = np.arange(walk.cells.count)
    return consumed & ~walk.cells.is_frozen(every) & (walk.cells.find(every) == every)


def prunable_classes(walk: Walk) -> NDArray[np.bool_]:
    """Return per cell id whether it is the root of a unit in a group of at least `MIN_UNITS`."""
    free = free_classes(walk)
    code = np.zeros(walk.cells.count, np.uint64)
    for number, (_, label) in enumerate(_labelled_dims(walk)):
        roots, counts = np.unique(walk.cells.find(label), return_counts=True)
        weight = np.uint64((number * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64 | 1)
        code[roots] += weight * counts.astype(np.uint64)
    roots = np.nonzero(free)[0]
    _, group, sizes = np.unique(code[roots], return_inverse=True, return_counts=True)
    free[roots[sizes[group] < MIN_UNITS]] = False
    return free


def prunable_elements(walk: Walk) -> int:
    """Count parameter elements inside at least one group: the score of an analysis."""
    prunable, total = prunable_classes(walk), 0
    for name in walk.parameters:
        tensor = walk.tensors[name]
        fixed = 1
        for size, label in zip(tensor.shape, tensor.labels, strict=True):
            fixed *= size if label is None else int((~prunable[walk.cells.find(label)]).sum())
        total += int(np.prod(tensor.shape)) - fixed
    return total


def build_groups(walk: Walk) -> list[ChannelGroup]:
    """Return the groups: units that occupy the same number of positions in the same tensors."""
    prunable = prunable_classes(walk)
    places = _places(walk, prunable)
    consumers, producers = _slabs_by_class(walk, walk.consumers), _slabs_by_class(walk, walk.producers)
    by_key: dict[tuple[tuple[Slab, int], ...], list[int]] = defaultdict(list)
    for root in sorted(places):
        by_key[tuple((slab, len(at)) for slab, at in places[root].items())].append(root)
    groups: list[ChannelGroup] = []
    taken: dict[str, int] = defaultdict(int)
    for key, roots in by_key.items():
        if len(roots) < MIN_UNITS:
            continue
        slabs = [slab for slab, _ in key]
        used = frozenset().union(*(consumers[root] for root in roots)) & set(slabs)
        made = frozenset().union(*(producers[root] for root in roots)) & set(slabs)
        name = _name(slabs, made)
        taken[name] += 1
        unique = name if taken[name] == 1 else f"{name}#{taken[name]}"
        slices = {slab: np.stack([places[root][slab] for root in roots]) for slab in slabs}
        groups.append(ChannelGroup(unique, tuple(roots), slices, used, made))
    return groups


def frozen_dims(walk: Walk, groups: list[ChannelGroup]) -> dict[Slab, str]:
    """Return for every parameter dim with positions in no group why they may not be removed."""
    inside = {unit for group in groups for unit in group.units}
    reasons: dict[Slab, str] = {}
    for (name, dim), label in _labelled_dims(walk):
        if name not in walk.parameters:
            continue
        roots = np.unique(walk.cells.find(label))
        rest = [int(root) for root in roots if int(root) not in inside]
        if rest:
            frozen = [root for root in rest if walk.cells.is_frozen(np.array([root]))[0]]
            reasons[name, dim] = (
                walk.cells.reason(frozen[0]) if frozen else "no weight reads it, or it would be a group of one unit"
            )
    return reasons


def _labelled_dims(walk: Walk) -> Iterator[tuple[Slab, Cell]]:
    for name, tensor in walk.tensors.items():
        for dim, label in enumerate(tensor.labels):
            if label is not None:
                yield (name, dim), label


def _places(walk: Walk, prunable: NDArray[np.bool_]) -> dict[int, dict[Slab, NDArray[np.int64]]]:
    """Positions of every prunable class in every tensor dim."""
    places: dict[int, dict[Slab, NDArray[np.int64]]] = defaultdict(dict)
    for slab, label in _labelled_dims(walk):
        roots = walk.cells.find(label)
        order = np.argsort(roots, kind="stable")
        found, starts = np.unique(roots[order], return_index=True)
        for root, positions in zip(found.tolist(), np.split(order, starts[1:]), strict=True):
            if prunable[root]:
                places[root][slab] = positions
    return places


def _slabs_by_class(walk: Walk, records: list[tuple[Cell, frozenset[Slab]]]) -> dict[int, frozenset[Slab]]:
    found: dict[int, frozenset[Slab]] = defaultdict(frozenset)
    for label, slabs in records:
        for root in np.unique(walk.cells.find(label)).tolist():
            found[root] |= slabs
    return found


def _name(slabs: list[Slab], producers: frozenset[Slab]) -> str:
    """The module of the first producer; a weight before a bias."""
    made = [slab for slab in slabs if slab in producers] or slabs
    return next((name for name, _ in made if name.endswith("weight")), made[0][0]).rpartition(".")[0] or "root"
