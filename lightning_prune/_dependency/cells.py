"""Cells: a union-find over the positions of tensor dims, with frozen classes and the reason of each freeze.

A class of cells is a set of positions that can only leave together. A frozen class may not leave at all. Whole numpy
arrays are merged at once; the smallest cell of a class is its root, so the result does not depend on visiting order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Cell = NDArray[np.int64]
MAX_CELLS = 10**7  # a longer dim (a data-dependent size) gets no cells and stays whole
_FIXED = 0  # the cell of a single position that never leaves, such as padding


class Cells:
    """Positions in classes; each class knows whether it is frozen, why, and whether a parameter holds it."""

    def __init__(self) -> None:
        self._parent = np.zeros(1 << 12, np.int64)
        self._frozen = np.zeros(1 << 12, bool)
        self._real = np.zeros(1 << 12, bool)
        self._reason = np.zeros(1 << 12, np.int32)
        self._reasons: dict[str, int] = {"": 0, "it meets a position that never leaves": 1}
        self._frozen[_FIXED], self._reason[_FIXED] = True, 1
        self.count = 1

    def new(self, length: int, real: bool = False) -> Cell | None:
        """Return `length` fresh cells of shape (length,); None for a dim of one position or of unknown size."""
        if length <= 1 or length >= MAX_CELLS:
            return None
        while self.count + length > len(self._parent):
            self._grow()
        cells = np.arange(self.count, self.count + length)
        self._parent[cells], self._real[cells] = cells, real
        self.count += length
        return cells

    def find(self, cells: Cell) -> Cell:
        """Return the root of each cell, same shape."""
        roots = self._parent[cells]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                self._parent[cells] = roots
                return roots
            roots = above

    def union(self, first: Cell, second: Cell) -> None:
        """Merge the classes of first[i] and second[i] for every i; a fixed position freezes its partner."""
        left, right = self.find(first).reshape(-1), self.find(second).reshape(-1)
        fixed = (left == _FIXED) | (right == _FIXED)
        if fixed.any():
            self.freeze(np.maximum(left, right)[fixed], "it meets a position that never leaves")
            left, right = left[~fixed], right[~fixed]
        different = left != right
        left, right = left[different], right[different]
        if not len(left):
            return
        roots = np.unique(np.concatenate([left, right]))
        while len(left):
            np.minimum.at(self._parent, np.maximum(left, right), np.minimum(left, right))
            left, right = self.find(left), self.find(right)
            different = left != right
            left, right = left[different], right[different]
        self._inherit(roots)

    def freeze(self, cells: Cell, why: str) -> int:
        """Freeze the classes of `cells`; return how many classes that a parameter holds were still free."""
        roots = np.unique(self.find(cells))
        roots = roots[~self._frozen[roots]]
        self._frozen[roots] = True
        self._reason[roots] = self._reasons.setdefault(why, len(self._reasons))
        return int(self._real[roots].sum())

    def is_frozen(self, cells: Cell) -> NDArray[np.bool_]:
        """Return whether each cell is in a frozen class, same shape."""
        return self._frozen[self.find(cells)]

    def is_real(self, cells: Cell) -> NDArray[np.bool_]:
        """Return whether each cell is in a class that a parameter holds, same shape."""
        return self._real[self.find(cells)]

    def reason(self, cell: int) -> str:
        """Return why the class of a cell is frozen; empty for a free one."""
        code = int(self._reason[self.find(np.array([cell]))[0]])
        return next(text for text, number in self._reasons.items() if number == code)

    def _inherit(self, old_roots: Cell) -> None:
        """Pass flags of merged roots on to the root they now belong to."""
        new_roots = self.find(old_roots)
        frozen = self._frozen[old_roots]
        self._real[new_roots[self._real[old_roots]]] = True
        first = frozen & ~self._frozen[new_roots]
        self._reason[new_roots[first]] = self._reason[old_roots[first]]
        self._frozen[new_roots[frozen]] = True

    def _grow(self) -> None:
        for name in ("_parent", "_frozen", "_real", "_reason"):
            array = getattr(self, name)
            setattr(self, name, np.concatenate([array, np.zeros_like(array)]))
