"""A tensor as the analysis sees it: its shape, a label per dim, and what makes its slabs zero."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_prune._dependency.cells import Cell

Label = Cell | None  # the cells of a dim's positions; None: the dim never changes
Slab = tuple[str, int]  # (parameter, dim): one slice of the parameter along the dim for each position
ZeroSet = frozenset[Slab] | None


@dataclass(frozen=True)
class TensorSpec:
    """The traced shape of a tensor; a data-dependent size is a large number of its own."""

    shape: tuple[int, ...]


class LabelledTensor:
    """A tensor during the walk.

    Attributes:
        shape: sizes as traced.
        labels: per dim the cells of its positions, or None.
        zeros: per dim the slabs which, set to zero, make this tensor's slab at the same position zero; or None.
    """

    __slots__ = ("labels", "shape", "zeros")

    def __init__(
        self,
        shape: Iterable[int],
        labels: Sequence[Label] | None = None,
        zeros: Sequence[ZeroSet] | None = None,
    ) -> None:
        self.shape = tuple(shape)
        rank = len(self.shape)
        self.labels: list[Label] = [None] * rank if labels is None else list(labels)
        self.zeros: list[ZeroSet] = [None] * rank if zeros is None else list(zeros)
        for dim, size in enumerate(self.shape):
            if size <= 1:
                self.labels[dim] = None

    def __len__(self) -> int:
        return len(self.shape)

    def keep(self, dims: Sequence[int]) -> LabelledTensor:
        """Return the tensor with only these dims, in this order."""
        return LabelledTensor(
            [self.shape[d] for d in dims], [self.labels[d] for d in dims], [self.zeros[d] for d in dims]
        )

    def replace(self, dim: int, size: int, label: Label, zero: ZeroSet = None) -> LabelledTensor:
        """Return the tensor with another size, label and zero-set at `dim`."""
        result = self.keep(range(len(self)))
        result.shape = (*self.shape[:dim], size, *self.shape[dim + 1 :])
        result.labels[dim] = label if size > 1 else None
        result.zeros[dim] = zero
        return result


def labelled(value: Any) -> Iterator[LabelledTensor]:
    """Yield the labelled tensors in nested lists, tuples and dicts, in order."""
    if isinstance(value, LabelledTensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from labelled(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from labelled(item)


def joined(zeros: Iterable[ZeroSet]) -> ZeroSet:
    """Return the union of zero-sets, or None if one of them is missing."""
    found = list(zeros)
    if not found or any(zero is None for zero in found):
        return None
    return frozenset().union(*(zero for zero in found if zero is not None))
