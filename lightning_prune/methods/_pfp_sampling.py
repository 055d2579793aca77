"""Which units of a group stay, and by how much their readers are scaled, so that the sum keeps its mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.methods._pfp_bounds import draws_for_distinct, expected_distinct

__all__ = ["VARIANTS", "Choice", "choose", "inclusion_probabilities", "systematic"]

VARIANTS = ("top", "ht", "rand", "hybrid")
HT_SAMPLERS = ("systematic", "poisson")


@dataclass(frozen=True)
class Choice:
    """The outcome of one choice in a group.

    Attributes:
        scales: gamma (units,), float64: 0 of a removed unit, 1 of one that is kept as it is.
        factors: second moment of (gamma_j - 1) or its raw bound by unit, float64; 0 where nothing is drawn. See
            `error_moments`.
        draws: m with replacement; None otherwise.
        drawn: units that were subject to chance.
        bound: R, the largest |(gamma_j - 1) u_ij / U_i| of one draw.
    """

    scales: Tensor
    factors: Tensor
    draws: int | None = None
    drawn: int = 0
    bound: float = 0.0

    @property
    def kept(self) -> Tensor:
        """Bool (units,)."""
        return self.scales > 0


def choose(scores: Tensor, count: int, variant: str, generator: torch.Generator, sampler: str = "systematic") -> Choice:
    """Choose `count` units of a group by their sensitivities.

    "top": the largest, unscaled. "ht": included with pi_j = min(1, c s_j), scaled by 1 / pi_j. "rand": m draws with
    replacement from p = s / S, scaled by n_j / (m p_j). "hybrid": the largest unscaled, the rest drawn like "rand".

    Args:
        scores: s >= 0, (units,); a unit of 0 is never kept.
        count: units to keep, >= 1; for "rand", "hybrid" and the sampler "poisson" in expectation, at most.
        variant: see above.
        generator: CPU source of randomness.
        sampler: of "ht": "systematic" keeps exactly `count` units, "poisson" decides unit by unit.
    Returns:
        The choice; with no fewer units asked for than there are with s > 0, all of these, unscaled.
    """
    scores = scores.double().cpu()
    if count >= int((scores > 0).sum()):
        return _plain(scores > 0)
    if variant == "top":
        return _plain(_largest(scores, count))
    if variant == "ht":
        return _horvitz_thompson(scores, count, generator, sampler)
    if variant == "rand":
        return _with_replacement(scores, torch.zeros_like(scores, dtype=torch.bool), count, generator)
    return _with_replacement(scores, _sure(scores, count), count, generator)


def inclusion_probabilities(scores: Tensor, count: int) -> Tensor:
    """Return pi_j = min(1, c s_j) with c so that they sum to `count`.

    Args:
        scores: s >= 0, (units,).
        count: in 1 .. number of units with s > 0.
    Returns:
        float64 (units,).
    """
    scores = scores.double()
    ranked = scores.sort(descending=True).values
    rest = ranked.flip(0).cumsum(0).flip(0)  # rest[r]: sum of all from place r on
    places = torch.arange(len(scores))
    fits = (count - places) * ranked <= rest * (1 + 1e-12)
    sure = int(fits.nonzero()[0])  # at the latest at place count - 1
    return (scores * ((count - sure) / rest[sure])).clamp_max(1)


def systematic(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Include unit j with probability pi_j, exactly sum(pi) units in all, in a random order.

    Args:
        probabilities: pi in [0, 1] (units,), of an integer sum.
        generator: CPU source of randomness.
    Returns:
        bool (units,).
    """
    order = torch.randperm(len(probabilities), generator=generator)
    start = float(torch.rand((), generator=generator, dtype=torch.float64))
    ends = probabilities.double()[order].cumsum(0)
    ends = ends * (round(float(ends[-1])) / float(ends[-1]))  # rounding must not lose the last unit
    passed = torch.floor(ends + start).diff(prepend=torch.zeros(1, dtype=torch.float64))
    taken = torch.zeros(len(probabilities), dtype=torch.bool)
    taken[order] = (passed > 0) & (probabilities[order] > 0)
    return taken


def _plain(kept: Tensor) -> Choice:
    return Choice(kept.double(), torch.zeros(len(kept), dtype=torch.float64))


def _largest(scores: Tensor, count: int) -> Tensor:
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[torch.sort(scores, descending=True, stable=True).indices[:count]] = True
    return kept & (scores > 0)


def _horvitz_thompson(scores: Tensor, count: int, generator: torch.Generator, sampler: str) -> Choice:
    odds = inclusion_probabilities(scores, count)
    if sampler == "systematic":
        kept = systematic(odds, generator)
    else:
        kept = torch.rand(len(odds), generator=generator, dtype=torch.float64) < odds
        if not bool(kept.any()):  # a group cannot lose all its units
            kept = _largest(scores, 1)
    chance = (odds > 0) & (odds < 1)
    weight = torch.where(odds > 0, 1 / odds.clamp_min(1e-300), 0.0)
    reach = scores * torch.maximum(torch.ones_like(scores), weight - 1)
    bound = float(reach[chance].max()) if bool(chance.any()) else 0.0
    return Choice(torch.where(kept, weight, 0.0), torch.where(chance, weight - 1, 0.0), None, int(chance.sum()), bound)


def _sure(scores: Tensor, count: int) -> Tensor:
    """The units that every set of draws would hit: p_j >= 1 / m, with m draws for `count` distinct ones."""
    odds = scores / scores.sum()
    return _largest(scores, min(count, int((odds >= 1 / draws_for_distinct(odds, count)).sum())))


def _with_replacement(scores: Tensor, sure: Tensor, count: int, generator: torch.Generator) -> Choice:
    """Keep the sure units, draw the others so that no more than `count` distinct ones are expected in all."""
    rest = torch.where(sure, 0.0, scores)
    wanted = count - int(sure.sum())
    if wanted < 1:
        return _plain(sure)
    odds = rest / rest.sum()
    draws = draws_for_distinct(odds, wanted)
    if draws > 1 and expected_distinct(odds, draws) > wanted + 1e-9:
        draws -= 1
    counts = torch.bincount(
        torch.multinomial(odds, draws, replacement=True, generator=generator), minlength=len(odds)
    ).double()
    expected = draws * odds
    scales = torch.where(expected > 0, counts / expected.clamp_min(1e-300), 0.0)
    factors = torch.where(expected > 0, 1 / expected.clamp_min(1e-300), 0.0)
    return Choice(scales + sure, factors, draws, int((rest > 0).sum()), float(rest.sum()) / draws)
