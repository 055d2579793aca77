"""GroupTable: disjoint groups of entries spread over many tensors, with sums and products over groups.

One group is all that makes one channel: rows of weights, biases and norm scales. Groups of one block (the channels of one
set of layers) have the same size, so that a block is also a dense (channels, size) matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Block", "GroupTable", "Piece"]


@dataclass(frozen=True)
class Piece:
    """What a block has in one tensor.

    Attributes:
        tensor: its index in the table's list.
        dim: the dim whose positions belong to groups.
        positions: int64 of shape (units, positions per unit), no position twice.
    """

    tensor: int
    dim: int
    positions: Tensor


@dataclass(frozen=True)
class Block:
    """Groups of equal size that belong together: the channels of a channel group."""

    name: str
    units: int
    pieces: tuple[Piece, ...]


class GroupTable:
    """Groups of entries of a list of tensors, numbered block by block.

    Args:
        blocks: disjoint; every tensor belongs to groups along one dim only.
        tensors: what the pieces point at.
    Attributes:
        blocks, tensors: what was given.
        count: number of groups G.
        sizes: entries per group, float of shape (G,).
        block_of: index of each group's block, int64 of shape (G,).
        dtype: of all sums: float64 if a tensor has it, else float32.
    Raises:
        ValueError: an entry belongs to two groups.
    """

    def __init__(self, blocks: Sequence[Block], tensors: Sequence[Tensor]) -> None:
        self.blocks, self.tensors = tuple(blocks), list(tensors)
        self.device = self.tensors[0].device
        self.dtype = torch.float64 if any(t.dtype == torch.float64 for t in self.tensors) else torch.float32
        units = [block.units for block in self.blocks]
        self.count = sum(units)
        self.block_of = torch.repeat_interleave(torch.arange(len(units)), torch.tensor(units)).to(self.device)
        self._units = units
        self._at = {id(piece): self._gathered(piece) for block in self.blocks for piece in block.pieces}
        self._slots, self._place = self._slots_of(units)
        dims = self._dims()
        self._dims_of = [dims.get(index, 0) for index in range(len(self.tensors))]
        self._sums_over = [[d for d in range(t.dim()) if d != at] for t, at in zip(tensors, self._dims_of, strict=True)]
        owners = self._owners()
        self._lengths = [len(owner) for owner in owners]
        self._rows = torch.cat(owners).to(self.device)
        self._padded = _padded(torch.cat(owners), self.count).to(self.device)
        self._one = torch.ones(1, dtype=self.dtype, device=self.device)
        self._zero = torch.zeros(1, dtype=self.dtype, device=self.device)
        self.sizes = self.sums([torch.ones_like(t, dtype=self.dtype) for t in self.tensors])
        self.has_tensor = self._incidence(owners)

    def sums(self, values: Sequence[Tensor]) -> Tensor:
        """Return the sum of every group's entries, of shape (G,); `values` are shaped like the tensors."""
        rows = [v.to(self.dtype).sum(over) if over else v for v, over in zip(values, self._sums_over, strict=True)]
        return torch.cat([*(row.to(self.dtype) for row in rows), self._zero])[self._padded].sum(dim=1)

    def dot(self, one: Sequence[Tensor], two: Sequence[Tensor]) -> Tensor:
        """Return <one_g, two_g> for every group, of shape (G,), summed in `dtype`."""
        if any(t.dtype != self.dtype for t in (*one, *two)):
            one, two = [t.to(self.dtype) for t in one], [t.to(self.dtype) for t in two]
        return self.sums(torch._foreach_mul(list(one), list(two)))

    def spread(self, values: Tensor, outside: float = 1.0) -> list[Tensor]:
        """Return for every tensor a view that broadcasts each group's number (shape (G,)) to its entries."""
        rows = torch.cat([values.to(self.dtype), self._one * outside])[self._rows].split(self._lengths)
        return [
            row.to(t.dtype).view([-1 if d == at else 1 for d in range(t.dim())])
            for row, t, at in zip(rows, self.tensors, self._dims_of, strict=True)
        ]

    def without(self, going: Tensor, sizes: Tensor, keep: Tensor | None) -> Tensor:
        """Return `going` without the largest groups of it that blocks must keep.

        Args:
            going: bool of shape (G,): groups about to be zeroed (those that are zero already among them).
            sizes: >= 0, of shape (G,); of several the larger one stays, ties by lower number.
            keep: int64 of shape (blocks,): groups that each block keeps at least; None: no block keeps any.
        """
        if keep is None:
            return going
        infinite = torch.full_like(sizes, torch.inf)
        ranked = torch.cat([torch.where(going, sizes, infinite), -infinite[:1]])[self._slots]
        ranks = ranked.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return going & (ranks >= keep.unsqueeze(1)).flatten()[self._place]

    @torch.no_grad()
    def scale_(self, factors: Tensor) -> None:
        """Multiply every group of the tensors by its factor (shape (G,)) in place."""
        torch._foreach_mul_(self.tensors, self.spread(factors))

    def matrices(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return each block's entries of `values` (shaped like the tensors), of shape (units, size), in `dtype`."""
        return [torch.cat([self._part(values, piece) for piece in block.pieces], dim=1) for block in self.blocks]

    @torch.no_grad()
    def write_(self, matrices: Sequence[Tensor]) -> None:
        """Write what `matrices` gives back into the tensors."""
        for block, matrix in zip(self.blocks, matrices, strict=True):
            parts = matrix.split([self._width(piece) for piece in block.pieces], dim=1)
            for piece, part in zip(block.pieces, parts, strict=True):
                target, at = _front(self.tensors[piece.tensor].detach(), piece.dim), self._at[id(piece)]
                rows = part.reshape(-1, *target.shape[1:])
                if at is None:
                    target.copy_(rows)
                else:
                    target.index_copy_(0, at, rows.to(target.dtype))

    def by_block(self, values: Tensor) -> dict[str, Tensor]:
        """Return a vector of shape (G,) cut into blocks, by name, each of shape (units,)."""
        parts = values.split(self._units)
        return {block.name: part for block, part in zip(self.blocks, parts, strict=True)}

    def joined(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return what `by_block` was given."""
        return torch.cat([parts[block.name].to(self.device) for block in self.blocks])

    def _part(self, values: Sequence[Tensor], piece: Piece) -> Tensor:
        rows, at = _front(values[piece.tensor], piece.dim), self._at[id(piece)]
        return (rows if at is None else rows.index_select(0, at)).reshape(len(piece.positions), -1).to(self.dtype)

    def _gathered(self, piece: Piece) -> Tensor | None:
        """Positions of a piece on the device; None: all of its tensor in order, which needs no gathering."""
        at, size = piece.positions.flatten(), self.tensors[piece.tensor].shape[piece.dim]
        return None if torch.equal(at.cpu(), torch.arange(size)) else at.to(self.device)

    def _width(self, piece: Piece) -> int:
        tensor = self.tensors[piece.tensor]
        return piece.positions.shape[1] * tensor.numel() // tensor.shape[piece.dim]

    def _slots_of(self, units: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Groups of every block in a row each, padded with G; and where each group stands in them, flattened."""
        slots = torch.full((len(units), max(units)), self.count)
        slots[torch.arange(max(units)) < torch.tensor(units).unsqueeze(1)] = torch.arange(self.count)
        return slots.to(self.device), (slots.flatten() < self.count).nonzero().flatten().to(self.device)

    def _dims(self) -> dict[int, int]:
        dims: dict[int, int] = {}
        for block in self.blocks:
            for piece in block.pieces:
                if dims.setdefault(piece.tensor, piece.dim) != piece.dim:
                    raise ValueError(f"`blocks`: {block.name!r} crosses another block inside one tensor. Leave it out.")
        return dims

    def _owners(self) -> list[Tensor]:
        """The group of every row of every tensor, G where it has none."""
        owners = [
            torch.full((t.shape[at] if t.dim() else 1,), self.count)
            for t, at in zip(self.tensors, self._dims_of, strict=True)
        ]
        first = 0
        for block in self.blocks:
            numbers = torch.arange(first, first + block.units)
            for piece in block.pieces:
                at = piece.positions.flatten().cpu()
                if bool((owners[piece.tensor][at] != self.count).any()):
                    raise ValueError(f"`blocks`: {block.name!r} shares entries with another block. Leave it out.")
                owners[piece.tensor][at] = numbers.repeat_interleave(piece.positions.shape[1])
            first += block.units
        return owners

    def _incidence(self, owners: Sequence[Tensor]) -> Tensor:
        """Whether a group has entries in a tensor: bool of shape (tensors, G)."""
        found = torch.zeros(len(owners), self.count + 1, dtype=torch.bool)
        for index, owner in enumerate(owners):
            found[index, owner] = True
        return found[:, : self.count].to(self.device)


def _front(tensor: Tensor, dim: int) -> Tensor:
    return tensor.movedim(dim, 0) if dim else tensor


def _padded(rows: Tensor, count: int) -> Tensor:
    """Row numbers of every group, padded with the number after the last: int64 of shape (count, most rows)."""
    order = torch.sort(rows, stable=True).indices
    sizes = torch.bincount(rows, minlength=count + 1)[:count]
    table = torch.full((count, int(sizes.max()) if count else 0), len(rows))
    starts = torch.cumsum(sizes, 0) - sizes
    for group in range(count):
        table[group, : sizes[group]] = order[starts[group] : starts[group] + sizes[group]]
    return table
