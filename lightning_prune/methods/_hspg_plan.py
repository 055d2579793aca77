"""Which groups leave when: periods, caps per block, and how many removals a target needs. Pure, on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.cost import CostModel, Kind

__all__ = ["Target", "boundaries", "caps", "cubic_share", "linear_share", "normalised", "removable", "to_multiples"]


def boundaries(begin: int, end: int, periods: int) -> list[int]:
    """Return the steps at which periods end: the last is `end`, those of no length fall away."""
    return sorted({begin + math.ceil((end - begin) * (p + 1) / periods) for p in range(periods)} | {end})


def cubic_share(progress: float) -> float:
    """Share of the removals done: 1 - (1 - progress)^3, fast first."""
    return 1.0 if progress >= 1.0 else 1.0 - (1.0 - progress) ** 3


def linear_share(progress: float) -> float:
    """Share of the removals done, the same number in every period."""
    return min(1.0, progress)


def caps(units: Sequence[int], max_ratio: float, min_keep: int, gone: Sequence[int]) -> list[int]:
    """Return how many groups each block may lose in all: min(floor(max_ratio C), C - min_keep), or what it has lost."""
    allowed = [min(math.floor(max_ratio * count + 1e-9), count - min(min_keep, count)) for count in units]
    return [max(cap, lost) for cap, lost in zip(allowed, gone, strict=True)]


def normalised(scores: Tensor, block_of: Tensor, live: Tensor) -> Tensor:
    """Divide every score by the mean over the live groups of its block; a block of zeros keeps them.

    Args:
        scores: >= 0, of shape (G,).
        block_of: int64 of shape (G,).
        live: bool of shape (G,).
    """
    count = int(block_of.max()) + 1
    sums = torch.zeros(count, dtype=scores.dtype).index_add_(0, block_of, scores * live)
    sizes = torch.zeros(count, dtype=scores.dtype).index_add_(0, block_of, live.to(scores.dtype))
    means = sums / sizes.clamp_min(1.0)
    return scores / torch.where(means > 0, means, torch.ones_like(means))[block_of]


def removable(scores: Tensor, block_of: Tensor, gone: Tensor, limits: Sequence[int]) -> list[int]:
    """Return the groups that may still leave, from the lowest score up; ties by lower number.

    Args:
        scores: finite, of shape (G,).
        block_of: int64 of shape (G,).
        gone: bool of shape (G,).
        limits: groups that each block may lose in all.
    """
    left = [limit - int(gone[block_of == block].sum()) for block, limit in enumerate(limits)]
    order = []
    for group in torch.sort(scores.double(), stable=True).indices.tolist():
        block = int(block_of[group])
        if not gone[group] and left[block] > 0:
            left[block] -= 1
            order.append(group)
    return order


def to_multiples(order: Sequence[int], taken: Tensor, block_of: Tensor, multiples: Sequence[int]) -> list[int]:
    """Return further groups to take, so that every block that loses any keeps a multiple, where it may lose so many.

    Args:
        order: groups that may leave, those to leave first in front (some may be taken).
        taken: bool of shape (G,): gone or chosen.
        block_of: int64 of shape (G,).
        multiples: >= 1, one per block.
    """
    rest: dict[int, list[int]] = {}
    for group in order:
        if not taken[group]:
            rest.setdefault(int(block_of[group]), []).append(group)
    found = []
    for block, multiple in enumerate(multiples):
        inside = block_of == block
        kept = int((inside & ~taken).sum())
        excess, spare = kept % multiple, rest.get(block, [])
        if kept < int(inside.sum()) and excess < kept and excess <= len(spare):
            found += spare[:excess]
    return found


@dataclass(frozen=True)
class Target:
    """A fraction of groups to remove, or a budget of what may remain of a cost.

    Attributes:
        names, units: the blocks.
        sparsity: removed fraction of the groups, in [0, 1); None with a budget.
        budget: remaining fraction of the cost, in (0, 1].
        kind: which cost.
        costs: the cost model; only with a budget.
    """

    names: Sequence[str]
    units: Sequence[int]
    sparsity: float | None = None
    budget: float | None = None
    kind: Kind = "flops"
    costs: CostModel | None = None

    @property
    def total(self) -> int:
        """Number of groups."""
        return sum(self.units)

    def at(self, share: float) -> float:
        """Return the sparsity or budget asked for when this share of the removals is due."""
        if self.sparsity is not None:
            return self.sparsity * share
        assert self.budget is not None
        return 1.0 - (1.0 - self.budget) * share

    def chosen(self, order: Sequence[int], block_of: Tensor, gone: Tensor, share: float) -> list[int]:
        """Return the first groups of `order` that the target needs removed on top of `gone` when `share` is due."""
        count = self._count(gone, share) if self.sparsity is not None else self._within(order, block_of, gone, share)
        return list(order[:count])

    def check(self, limits: Sequence[int], remedy: str) -> None:
        """Raise ValueError if the target cannot be reached within the limits of the blocks.

        Args:
            limits: groups each block may lose in all.
            remedy: what sets the limits and can be changed, a sentence.
        """
        most = sum(limits)
        blocks = ", ".join(
            f"{name} {limit} of {units}"
            for name, limit, units in list(zip(self.names, limits, self.units, strict=True))[:8]
        )
        if self.sparsity is not None:
            wanted = math.floor(self.sparsity * self.total + 1e-9)
            if wanted > most:
                raise ValueError(
                    f"`sparsity`={self.sparsity} asks for {wanted} of {self.total} channels, but at most {most} may leave "
                    f"({blocks}): {most / self.total:.4f} can be reached. {remedy}"
                )
            return
        assert self.costs is not None
        assert self.budget is not None
        kept = {name: units - limit for name, units, limit in zip(self.names, self.units, limits, strict=True)}
        least = self.costs.cost(self.kind, kept) / self.costs.cost(self.kind)
        if least > self.budget + 1e-9:
            raise ValueError(
                f"`budget`={self.budget} of {self.kind} cannot be reached: if each block loses what it may ({blocks}), "
                f"{least:.4f} remains. {remedy}"
            )

    def _count(self, gone: Tensor, share: float) -> int:
        final = math.floor((self.sparsity or 0.0) * self.total + 1e-9)
        return max(0, (final if share >= 1.0 else round(final * share)) - int(gone.sum()))

    def _within(self, order: Sequence[int], block_of: Tensor, gone: Tensor, share: float) -> int:
        """The fewest removals in order with which the cost is within the budget."""
        assert self.costs is not None
        allowed = self.at(share) * self.costs.cost(self.kind) + 1e-9
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._cost(order[:middle], block_of, gone) <= allowed else (middle + 1, high)
        return low

    def _cost(self, removed: Sequence[int], block_of: Tensor, gone: Tensor) -> float:
        assert self.costs is not None
        lost = torch.bincount(block_of[gone], minlength=len(self.units))
        lost += torch.bincount(block_of[list(removed)], minlength=len(self.units)) if removed else 0
        kept = zip(self.names, self.units, lost.tolist(), strict=True)
        return self.costs.cost(self.kind, {name: units - gone for name, units, gone in kept})
