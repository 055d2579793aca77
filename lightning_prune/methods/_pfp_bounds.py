"""How many draws an error needs and the reverse: Bernstein's bound for sampling by sensitivity, and what a sample shows.

With N events, L = ln(2 N / delta) and u = K S L / m,

    eps(m) = u/3 + sqrt((u/3)^2 + 2 u)   <=>   m(eps) = K S L (2 + 2 eps / 3) / eps^2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "bernstein_error",
    "calibration_samples",
    "draws_for_distinct",
    "draws_for_error",
    "error_of_draws",
    "expected_distinct",
    "log_events",
    "upper_rate",
]

_HALVINGS = 200


def log_events(events: int, delta: float) -> float:
    """Return L = ln(2 N / delta) for N events that shall all hold with probability 1 - delta."""
    return math.log(2 * max(1, events) / delta)


def error_of_draws(draws: float, total: float, log_term: float, scale: float = 1.0) -> float:
    """Return eps(m), the relative error that m draws keep to.

    Args:
        draws: m > 0.
        total: S, the sum of sensitivities.
        log_term: L, from `log_events`.
        scale: K >= 1; 1 on the calibration data itself.
    """
    share = scale * total * log_term / draws
    return share / 3 + math.sqrt((share / 3) ** 2 + 2 * share)


def draws_for_error(error: float, total: float, log_term: float, scale: float = 1.0) -> float:
    """Return m(eps), as a real number; arguments as in `error_of_draws`, error > 0."""
    return scale * total * log_term * (2 + 2 * error / 3) / error**2


def bernstein_error(variance: float, bound: float, log_term: float) -> float:
    """Return R L / 3 + sqrt((R L / 3)^2 + 2 V L) for a sum of variance V whose terms stay within R of their means."""
    part = bound * log_term / 3
    return part + math.sqrt(part**2 + 2 * variance * log_term)


def expected_distinct(probabilities: Tensor, draws: float) -> float:
    """Return E[u](m) = sum_j 1 - (1 - p_j)^m, the expected number of distinct units in m draws with replacement.

    Args:
        probabilities: p >= 0, (units,).
        draws: m >= 0; any real number.
    """
    if draws <= 0:
        return 0.0
    return float(-torch.expm1(draws * torch.log1p(-probabilities.double().clamp(0, 1))).sum())


def draws_for_distinct(probabilities: Tensor, distinct: float) -> int:
    """Return the fewest draws m with E[u](m) >= distinct.

    Args:
        probabilities: p >= 0, (units,).
        distinct: number of units, > 0 and below the number of units with p > 0.
    Raises:
        ValueError: so many units are never expected.
    """
    possible = int((probabilities > 0).sum())
    if not 0 < distinct < possible:
        raise ValueError(
            f"`distinct` must be in (0, {possible}), the units with a probability above 0, got {distinct}. "
            "Keep all of them without drawing."
        )
    high = 1
    while expected_distinct(probabilities, high) < distinct - 1e-12:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        enough = expected_distinct(probabilities, middle) >= distinct - 1e-12
        low, high = (low, middle) if enough else (middle, high)
    return high


def calibration_samples(largest: int, outputs: int, delta: float, scale: float = 3.0) -> int:
    """Return n = ceil(C ln(8 eta* eta / delta)), the samples after which g_j(x) <= K s_j is promised (the paper's assumption).

    Args:
        largest: eta*, outputs (channels x positions) of the largest layer.
        outputs: eta, outputs of all layers.
        delta: probability of failure, in (0, 1).
        scale: C > 0.
    """
    return math.ceil(scale * math.log(8 * max(1, largest) * max(1, outputs) / delta))


def upper_rate(count: int, trials: int, confidence: float = 0.95) -> float | None:
    """Return the upper limit of Clopper and Pearson for a rate of which `count` of `trials` were seen; None without trials."""
    if not trials:
        return None
    if count >= trials:
        return 1.0
    low, high = count / trials, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(count, trials, middle) > 1 - confidence else (low, middle)
    return high


def _at_most(count: int, trials: int, rate: float) -> float:
    """P(Binomial(trials, rate) <= count)."""
    if not 0 < rate < 1:
        return float(rate == 0)
    logs = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        + k * math.log(rate) + (trials - k) * math.log1p(-rate)
        for k in range(count + 1)
    ]  # fmt: skip
    return math.fsum(math.exp(value) for value in logs)
