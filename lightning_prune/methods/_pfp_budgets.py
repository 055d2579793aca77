"""Units per group from one number: a common error for all groups, found by bisection with the exact cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.methods._pfp_bounds import draws_for_error, expected_distinct

__all__ = ["Allocation", "Demand", "allocate", "counts_at", "rounded_down"]

_LOW, _HIGH, _HALVINGS = 1e-8, 1e8, 200
Cost = Callable[[Mapping[str, int]], int]


@dataclass(frozen=True)
class Demand:
    """What a group asks for.

    Attributes:
        scores: sensitivities s >= 0, (units,); units of 0 always go.
        log_term: L = ln(2 N / delta) of the group.
        floor: units that stay in any case, >= 1.
    """

    scores: Tensor
    log_term: float
    floor: int = 1

    @property
    def living(self) -> int:
        """Units with s > 0."""
        return int((self.scores > 0).sum())

    @property
    def total(self) -> float:
        """S."""
        return float(self.scores.double().sum())

    def count(self, error: float, scale: float) -> int:
        """k = ceil(E[u](m(eps))), within the floor and the living units."""
        draws = draws_for_error(error, self.total, self.log_term, scale)
        expected = expected_distinct(self.scores.double() / self.total, draws)
        return min(self.living, max(math.ceil(expected - 1e-9), self.floor))


@dataclass(frozen=True)
class Allocation:
    """Units per group.

    Attributes:
        counts: units kept by group name.
        error: the common eps.
    """

    counts: dict[str, int]
    error: float


def counts_at(demands: Mapping[str, Demand], error: float, scale: float = 3.0) -> dict[str, int]:
    """Return the units every group keeps at a common error eps > 0."""
    return {name: demand.count(error, scale) for name, demand in demands.items()}


def allocate(demands: Mapping[str, Demand], cost: Cost, limit: float, scale: float = 3.0) -> Allocation:
    """Spend a budget: the smallest common error whose units cost no more, then single units that still fit.

    Args:
        demands: by group name.
        cost: exact cost of so many units per group.
        limit: the cost must not exceed it.
        scale: K of `draws_for_error`; it moves the error, hardly the counts.
    Raises:
        ValueError: the cheapest counts cost more; nothing else was tried.
    """
    low, high = math.log(_LOW), math.log(_HIGH)
    most, least = counts_at(demands, _LOW, scale), counts_at(demands, _HIGH, scale)
    if cost(most) <= limit:
        return Allocation(most, _LOW)
    if cost(least) > limit:
        raise ValueError(f"{cost(least)} remain with {sum(least.values())} units")
    for _ in range(_HALVINGS):
        if most == least:
            break
        middle = (low + high) / 2
        counts = counts_at(demands, math.exp(middle), scale)
        if cost(counts) <= limit:
            high, least = middle, counts
        else:
            low, most = middle, counts
    return Allocation(_topped_up(demands, cost, limit, least), math.exp(high))


def _topped_up(demands: Mapping[str, Demand], cost: Cost, limit: float, counts: dict[str, int]) -> dict[str, int]:
    """Add the unit of the largest next sensitivity that fits, until none does."""
    ranked = {name: torch.sort(d.scores.double(), descending=True).values.tolist() for name, d in demands.items()}
    counts = dict(counts)
    while True:
        open_ones = [name for name in counts if counts[name] < demands[name].living]
        for name in sorted(open_ones, key=lambda name: -ranked[name][counts[name]]):
            tried = {**counts, name: counts[name] + 1}
            if cost(tried) <= limit:
                counts = tried
                break
        else:
            return counts


def rounded_down(
    counts: Mapping[str, int], shapes: Mapping[str, tuple[int, int]], round_to: int, min_keep: int = 1
) -> dict[str, int]:
    """Keep fewer units where kept units x positions per unit then is a multiple, and that leaves any.

    Args:
        counts: units kept by group name.
        shapes: (units, positions per unit) by group name.
        round_to: the multiple, >= 1.
        min_keep: groups do not fall below so many units.
    """
    rounded = {}
    for name, count in counts.items():
        units, width = shapes[name]
        step = round_to // math.gcd(round_to, width)
        wanted = count // step * step
        rounded[name] = count if count == units or wanted < max(min_keep, 1) else wanted
    return rounded
