"""The removals of HESSO and DHSPG, on the periods, groups and exact counts of TargetHSPG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.context import Context, Proposal
from lightning_prune.methods._hspg_plan import removable, to_multiples
from lightning_prune.methods._hspg_target import Removal
from lightning_prune.methods._prox_parts import GroupPart
from lightning_prune.methods._prox_scale import has_metric

__all__ = ["Dhspg", "Hesso", "StepRemoval", "hesso_saliency", "penalty_window", "redundancy"]


def unit(values: Tensor) -> Tensor:
    """Return a vector divided by its L2 norm; zeros stay."""
    return values / torch.linalg.vector_norm(values).clamp_min(torch.finfo(values.dtype).tiny)


def cosine(products: Tensor, sizes: Tensor, steps: Tensor) -> Tensor:
    """Return <x, d> / (||x|| ||d||), 0 where either is zero."""
    lengths = sizes * steps
    return torch.where(lengths > 0, products / lengths, torch.zeros_like(products))


def hesso_saliency(products: Tensor, sizes: Tensor, steps: Tensor, entries: Tensor) -> Tensor:
    """Return HESSO's importance of every group: the mean of five criteria, each divided by its norm over all groups.

    The criteria are ||x||, ||x|| / |g|, cos(x, d) + 1, |<x, d>| and <x, d>^2 / 2.

    Args:
        products: <x_g, d_g> with d the direction of the step, of shape (G,).
        sizes: ||x_g||, likewise.
        steps: ||d_g||, likewise.
        entries: |g|, likewise.
    """
    criteria = [
        sizes, sizes / entries, cosine(products, sizes, steps) + 1.0, products.abs(), 0.5 * products.square(),
    ]  # fmt: skip
    return 0.2 * torch.stack([unit(criterion) for criterion in criteria]).sum(dim=0)


def redundancy(products: Tensor, sizes: Tensor, steps: Tensor, entries: Tensor) -> Tensor:
    """Return DHSPG's redundancy of every group: half its cosine with the step, half the inverse of its mean size."""
    inverse = 1.0 / (sizes / entries + 1e-6)
    return 0.5 * unit(cosine(products, sizes, steps)) + 0.5 * unit(inverse)


def penalty_window(products: Tensor, sizes: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Return (low, high) of the penalties that shrink a group that its step d would grow while f still descends.

    low = -<x, d> / ||x|| and high = -||d||^2 ||x|| / <x, d>, for <x, d> < 0; low <= high by Cauchy and Schwarz.

    Args:
        products, sizes, steps: <x, d>, ||x||, ||d||, each of shape (G,).
    """
    safe = torch.where(products < 0, products, -torch.ones_like(products))
    return -safe / sizes, -steps.square() * sizes / safe


class StepRemoval(Removal):
    """A removal that chooses by one step: its weights and its direction d = (x' - x) / a."""

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        self.seen = [torch.zeros(3, part.table.count).to(part.table.sizes) for part in self.parts]

    def measure(self, index: int, part: GroupPart, step: int) -> None:
        """Keep <x, d>, ||x|| and ||d|| of the step before a choice."""
        if step + 1 not in (self.begin, *self.ends):
            return
        direction = directions(part)
        found = [
            part.table.dot(part.previous, direction),
            part.table.dot(part.previous, part.previous).sqrt(),
            part.table.dot(direction, direction).sqrt(),
        ]
        self.seen[index] = torch.stack(found)

    def measured(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return <x, d>, ||x||, ||d|| and |g| of all groups; current norms and no step where none has been seen."""
        products, sizes, steps = torch.cat([seen.cpu() for seen in self.seen], dim=1)
        if not bool(sizes.any()):
            sizes = torch.cat([part.norms().cpu() for part in self.parts])
        return products, sizes, steps, torch.cat([part.table.sizes.cpu() for part in self.parts])

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {**super().state_dict(), "seen": [seen.cpu().clone() for seen in self.seen]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        super().load_state_dict(state)
        self.seen = [seen.to(part.table.device) for seen, part in zip(state["seen"], self.parts, strict=True)]


class Hesso(StepRemoval):
    """HESSO: the same number of groups in every period, by one step's saliency, faded linearly while the step is normal."""

    def scores(self) -> Tensor:
        """HESSO's importance."""
        return hesso_saliency(*self.measured())

    def fade(self, index: int, part: GroupPart, left: int) -> None:
        """x_g <- (left - 1) / left x_g: linear decay, 0 at the period's end."""
        keep = 1.0 - self.leaving[index].to(part.table.dtype) / left
        part.table.scale_(keep)


class Dhspg(StepRemoval):
    """DHSPG: one choice of redundant groups, a penalty for each that shrinks it, half-space projections until enough are zero.

    Args:
        penalty: lambda, > 0; "auto": what takes twice their median norm from the candidates until the end.
        amplify, ceiling: A and C: a group that its step would grow gets clip(A low, lambda, C lambda), halfway into the window
            (low, high) where that lies above it.
        eps: of the half-space, in [0, 1).
        tolerance: fraction of the groups chosen beyond the target, >= 0.
        **common: see `Removal`; one period.
    Attributes:
        value: lambda in force.
    """

    def __init__(
        self, penalty: float | str, amplify: float, ceiling: float, eps: float, tolerance: float, **common: Any
    ) -> None:
        super().__init__(**common)
        self.auto, self.value = penalty == "auto", 0.0 if isinstance(penalty, str) else penalty
        self.amplify, self.ceiling, self.eps, self.tolerance = amplify, ceiling, eps, tolerance
        self.wanted = math.floor((self.goal.sparsity or 0.0) * self.goal.total + 1e-9)
        self._settled = False

    @property
    def settled(self) -> bool:
        """Whether the penalty is in force; there is none before the candidates are chosen."""
        return self._settled or not self._chosen

    def settle(self, reaches: Mapping[Optimizer, Sequence[float]]) -> dict[str, float]:
        """Put the penalty in force, and say what it can do to the candidates; see `Penalty.settle`.

        Args:
            reaches: sum_t a_t of every param group, by optimizer.
        """
        sizes = torch.cat([part.norms()[out].cpu() for part, out in zip(self.parts, self.leaving, strict=True)])
        median = float(sizes.median()) if len(sizes) else 0.0
        longest = max((max(reach, default=0.0) for reach in reaches.values()), default=0.0)
        if self.auto:
            self.value = 2.0 * median / max(longest, 1e-300)
        rate = max(float(group["lr"]) for part in self.parts for group in part.optimizer.param_groups)
        budget = self.value * (longest + rate / (1.0 - self.eps))  # what one step shrinks by 1 - eps is zeroed
        reachable = float((sizes <= budget).double().mean()) if len(sizes) else 0.0
        self._settled = True
        return {"penalty": self.value, "shrink_budget": budget, "median": median, "reachable": reachable}

    def penalized(self) -> float:
        """Return penalty * sum of the candidates' norms."""
        return self.value * sum(
            float((part.norms() * out).sum()) for part, out in zip(self.parts, self.leaving, strict=True)
        )

    def scores(self) -> Tensor:
        """The most redundant leave first."""
        return -redundancy(*self.measured())

    def choose(self, last: bool = False) -> None:
        """Choose the candidates once: the most redundant groups, some more than the target needs."""
        if self._chosen:
            return
        zero = torch.cat([part.zero.cpu() for part in self.parts])
        count = int(self.goal.total * min(self.goal.sparsity + self.tolerance, 0.999)) if self.goal.sparsity else 0
        order = removable(self.scores(), self._block_of(), zero, self.limits)
        chosen = torch.zeros_like(zero)
        chosen[order[: max(max(count, self.wanted) - int(zero.sum()), 0)]] = True
        parts = self.agree(chosen).split([part.table.count for part in self.parts])
        self.leaving = [new.to(part.zero.device) for new, part in zip(parts, self.parts, strict=True)]
        self._chosen, self._busy = True, bool(chosen.any()) or bool(zero.any())

    def fade(self, index: int, part: GroupPart, left: int) -> None:
        """Penalize the candidates, zero those that leave their half-space, as long as zeros are missing."""
        table, missing = part.table, self.wanted - sum(other.zero.sum() for other in self.parts)
        squares = table.dot(part.previous, part.previous)
        sizes, direction = squares.sqrt(), directions(part)
        products = table.dot(part.previous, direction)
        steps = table.dot(direction, direction).sqrt()
        low, high = penalty_window(products, sizes, steps)
        penalty = (self.amplify * low).clamp(self.value, self.value * self.ceiling)
        penalty = torch.where(penalty >= high, 0.5 * (low + high), penalty)
        penalty = torch.where(products < 0, penalty, torch.full_like(penalty, self.value))
        active = self.leaving[index] & ~part.zero & (missing > 0)
        share = torch.where(active & (sizes > 0), penalty / sizes, torch.zeros_like(sizes))
        weights = [tensor.detach() for tensor in part.tensors]
        rates = [part.rate(i) for i in range(len(weights))]
        steps_of = torch._foreach_mul(part.previous, table.spread(share, outside=0.0))
        torch._foreach_sub_(weights, torch._foreach_mul(steps_of, rates))
        ratio = torch.where(
            squares > 0, table.dot(weights, part.previous) / squares, torch.full_like(squares, -math.inf)
        )
        leaving = active & (ratio < self.eps)
        ranks = torch.argsort(torch.argsort(torch.where(leaving, ratio, torch.full_like(ratio, math.inf))))
        part.zero = part.zero | (leaving & (ranks < missing))

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {**super().state_dict(), "value": self.value, "settled": self._settled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        super().load_state_dict(state)
        self.value, self._settled = float(state["value"]), bool(state["settled"])

    def finish(self, index: int, part: GroupPart) -> None:
        """Nothing: there are more candidates than the target needs."""

    def propose(self, context: Context, over: bool) -> Proposal:
        """Keep what is not zero; if zeros are missing, the candidates of least norm go too."""
        self.choose()
        zero = torch.cat([part.zero.cpu() for part in self.parts])
        candidates = torch.cat([out.cpu() for out in self.leaving]) & ~zero
        sizes = torch.cat([(part.norms() / part.table.sizes.sqrt()).cpu() for part in self.parts])
        order = torch.sort(torch.where(candidates, sizes, torch.full_like(sizes, math.inf)), stable=True).indices
        gone = torch.zeros_like(zero)
        gone[order[: max(self.wanted - int(zero.sum()), 0)]] = True
        block_of = self._block_of()
        spare = removable(sizes, block_of, zero | gone, self.limits)
        gone[to_multiples(spare, zero | gone, block_of, self.multiples)] = True
        parts = self.agree(gone).split([part.table.count for part in self.parts])
        self.leaving = [out.to(part.zero.device) for out, part in zip(parts, self.parts, strict=True)]
        self._chosen = True
        proposal = super().propose(context, over=False)
        proposal.notes.append(f"{int(gone.sum())} channels were still not zero at the end and were cut by their norm.")
        return proposal


def directions(part: GroupPart) -> list[Tensor]:
    """Return d = (x' - x) / a of the step just taken, shaped like the tensors; not for a rate of 0."""
    moved = torch._foreach_sub(part.previous, [tensor.detach() for tensor in part.tensors])
    rates: Sequence[float] = [max(part.rate(index), 1e-300) for index in range(len(part.tensors))]
    torch._foreach_div_(moved, list(rates))
    return list(moved)


def published_penalty(parts: Sequence[GroupPart]) -> tuple[float, float, float]:
    """Return (lambda, A, C) as published: for optimizers that scale every weight's step, and for SGD."""
    return (1e-2, 20.0, 1e3) if any(has_metric(part.optimizer) for part in parts) else (1e-3, 2.0, 10.0)
