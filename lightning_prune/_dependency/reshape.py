"""Labels through view, reshape, flatten, squeeze: which axis of a block of dims carries the units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_prune._dependency.cells import MAX_CELLS, Cell
from lightning_prune._dependency.labels import Label, LabelledTensor, ZeroSet
from lightning_prune._dependency.walk import Walk, rule

_SMALL = 3  # axes this short are rarely units: (3, heads, width) means query, key and value

# a block: dims of the input and of the output with equal products
Block = tuple[list[int], list[int]]


@rule(
    "view", "reshape", "flatten", "unflatten", "_unsafe_view", "squeeze", "unsqueeze", "view_as", "reshape_as",
    "_reshape_copy", "view_copy", "_reshape_alias", "squeeze_copy", "unsqueeze_copy", "ravel", "atleast_2d",
)  # fmt: skip
def reshape(walk: Walk, tensor: LabelledTensor, *_: object, **__: object) -> LabelledTensor:
    """The same numbers under another shape: labels follow block by block."""
    result = LabelledTensor(walk.shape)
    if 0 in tensor.shape:
        return result
    for number, (before, after) in enumerate(blocks(tensor.shape, walk.shape)):
        if len(before) == len(after) == 1:
            result.labels[after[0]] = tensor.labels[before[0]]
            result.zeros[after[0]] = tensor.zeros[before[0]]
        elif any(tensor.labels[dim] is not None for dim in before):
            _reshape_block(walk, tensor, result, number, before, after)
    return result


def blocks(before: Sequence[int], after: Sequence[int]) -> list[Block]:
    """Cut two shapes of equal product into minimal blocks of equal product; dims of size one are left out.

    Args:
        before: sizes, each >= 1.
        after: sizes, each >= 1.
    Returns:
        (dims of `before`, dims of `after`) per block, from the left.
    """
    left = [dim for dim, size in enumerate(before) if size != 1]
    right = [dim for dim, size in enumerate(after) if size != 1]
    found, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        a, b = [left[i]], [right[j]]
        i, j = i + 1, j + 1
        while (have := math.prod(before[d] for d in a)) != (want := math.prod(after[d] for d in b)):
            if have < want:
                a.append(left[i])
                i += 1
            else:
                b.append(right[j])
                j += 1
        found.append((a, b))
    return found


@dataclass
class _Flat:
    """A block as one flat dim: its cells in the input's shape, and the zero-set of the axis they follow."""

    cells: Cell
    zero: ZeroSet


def _reshape_block(
    walk: Walk,
    tensor: LabelledTensor,
    result: LabelledTensor,
    number: int,
    before: list[int],
    after: list[int],
) -> None:
    if math.prod(tensor.shape[dim] for dim in before) >= MAX_CELLS:
        for dim in before:
            walk.freeze(tensor.labels[dim], "a reshape of unknown size")
        return
    flat = _merged(walk, tensor, number, before)
    if flat is None:
        return
    if len(after) == 1:
        result.labels[after[0]], result.zeros[after[0]] = flat.cells.reshape(-1).copy(), flat.zero
        return
    grid = flat.cells.reshape([result.shape[dim] for dim in after])
    axis = _axis_it_follows(walk, grid)
    if axis is None:
        axis = _split(walk, grid, number)
    result.labels[after[axis]] = np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1)[:, 0].copy()
    result.zeros[after[axis]] = flat.zero


def _merged(walk: Walk, tensor: LabelledTensor, number: int, dims: list[int]) -> _Flat | None:
    """One labelled factor survives a merge, repeated over the others; the other labelled factors stay whole."""
    live = [dim for dim in dims if _is_live(walk, tensor.labels[dim])]
    if not live:
        return None
    live.sort(key=lambda dim: (not _is_real(walk, tensor.labels[dim]), tensor.shape[dim] <= _SMALL, dim))
    chosen = live[0]
    if len(live) > 1:
        chosen = live[walk.decide(number, "merge", [tensor.labels[dim] for dim in live]).chosen]
    for dim in dims:
        if dim != chosen:
            walk.freeze(tensor.labels[dim], "it is merged with another axis that was chosen as the unit")
    label = tensor.labels[chosen]
    assert label is not None
    shape = [tensor.shape[dim] for dim in dims]
    cells = np.broadcast_to(label.reshape([-1 if dim == chosen else 1 for dim in dims]), shape)
    return _Flat(cells, tensor.zeros[chosen])


def _axis_it_follows(walk: Walk, grid: Cell) -> int | None:
    """Return the axis whose index alone decides the class, if there is one."""
    roots = walk.cells.find(np.ascontiguousarray(grid))
    for axis, size in enumerate(grid.shape):
        rows = np.moveaxis(roots, axis, 0).reshape(size, -1)
        if (rows == rows[:, :1]).all():
            return axis
    return None


def _split(walk: Walk, grid: Cell, number: int) -> int:
    """Choose the axis that carries the units; positions with the same index along it go together."""
    order = sorted(range(grid.ndim), key=lambda axis: (grid.shape[axis] <= _SMALL, axis))
    rows = [np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1) for axis in order]
    decision = walk.decide(number, "split", [None] * len(order))
    chosen = rows[decision.chosen]
    walk.cells.union(chosen.reshape(-1), np.repeat(chosen[:, 0], chosen.shape[1]))
    decision.cells = chosen[:, 0]
    return order[decision.chosen]


def _is_live(walk: Walk, label: Label) -> bool:
    return label is not None and not bool(walk.cells.is_frozen(label).all())


def _is_real(walk: Walk, label: Label) -> bool:
    return label is not None and bool(walk.cells.is_real(label).any())
