"""Costs as sums of products of lengths, each length affine in the numbers of kept units."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

Length = tuple[int, tuple[tuple[int, int], ...]]  # (fixed positions, ((group, positions per unit), ...))


class Polynomial:
    """A sum of c * n_1(k) * n_2(k) * ... over products of lengths."""

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self._terms: Counter[tuple[Length, ...]] = Counter()
        self._cache: Any = None

    def add(self, lengths: Iterable[Length], factor: int = 1) -> None:
        """Add factor times the product of lengths; those that never change go into the factor."""
        varying = []
        for length in lengths:
            if length[1]:
                varying.append(length)
            else:
                factor *= length[0]
        self._terms[tuple(sorted(varying))] += factor
        self._cache = None

    def exact(self, kept: Sequence[int]) -> int:
        """Return the value at integer k."""
        total = 0
        for lengths, factor in self._terms.items():
            total += factor * math.prod(fixed + sum(a * kept[g] for g, a in parts) for fixed, parts in lengths)
        return total

    def soft(self, kept: Tensor) -> Tensor:
        """Return the value at k of shape (groups,), differentiable."""
        fixed, slopes, places, factors = (kept.new_tensor(a) for a in self._arrays())
        lengths = fixed + slopes @ kept
        return (lengths[places.long()].prod(dim=1) * factors).sum()

    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Lengths as fixed + slopes k, and for each term the places of its lengths, padded with the length 1."""
        if self._cache is None:
            order: dict[Length, int] = {(1, ()): 0}
            for lengths in self._terms:
                for length in lengths:
                    order.setdefault(length, len(order))
            slopes = np.zeros((len(order), self._groups))
            for (_, parts), row in order.items():
                for group, positions in parts:
                    slopes[row, group] = positions
            degree = max((len(lengths) for lengths in self._terms), default=0)
            places = np.zeros((len(self._terms), max(degree, 1)))
            for row, lengths in enumerate(self._terms):
                places[row, : len(lengths)] = [order[length] for length in lengths]
            factors = np.array([float(factor) for factor in self._terms.values()])
            self._cache = (np.array([float(fixed) for fixed, _ in order]), slopes, places, factors)
        return self._cache
