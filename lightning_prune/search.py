"""Find the highest sparsity (or the lowest budget) whose fine-tuned accuracy stays within a drop.

One evaluation prunes to a target, fine-tunes and validates. Accuracy falls nearly monotonically with sparsity, so the
target is found by bisection on the logarithm of what is kept. The problem, a constraint on accuracy met with at most ten
evaluations, is that of Joseph et al., "A programmable approach to neural network compression", IEEE Micro 40(5), 2020.

Departures: bisection instead of Bayesian optimization; a margin of one standard error, since a bisection without it
returns slightly infeasible points on noisy accuracies; the final point is measured again with another seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_prune.checks import check_fraction, check_integer, is_number

__all__ = ["Point", "SearchResult", "find_highest", "standard_error"]


@dataclass(kw_only=True)
class Point:
    """One evaluation.

    Attributes:
        sparsity: the target, or 1 - budget for methods that take one.
        accuracy: validation accuracy after fine-tuning, as a fraction; None if the evaluation failed.
        needed: the accuracy at which it counts as feasible, margin included.
        feasible: whether the accuracy is at least what was needed.
        seed: of the evaluation.
        role: "search" or "confirmation".
        test_accuracy: on the test set, where it was measured.
        error: why it failed.
        folder: where its files are.
        settings: what was set, by key of the configuration.
    """

    sparsity: float
    accuracy: float | None
    needed: float
    feasible: bool
    seed: int = 0
    role: str = "search"
    test_accuracy: float | None = None
    error: str = ""
    folder: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: the returned point: the highest sparsity that was measured feasible; None if none was.
        confirmed: whether a second measurement with another seed was feasible too; None if none was made.
        points: every evaluation in the order in which it was made.
        bracket: (highest feasible, lowest infeasible) sparsity at the end.
    """

    best: Point | None
    confirmed: bool | None
    points: list[Point] = field(default_factory=list)
    bracket: tuple[float, float] = (0.0, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def standard_error(accuracy: float, samples: int | None) -> float:
    """Return the standard error of an accuracy, sqrt(a (1 - a) / n); 0 where the number of samples is not known.

    Args:
        accuracy: a, a fraction in [0, 1].
        samples: n, samples it was measured on, >= 1.
    """
    clipped = min(max(accuracy, 0.0), 1.0)
    return math.sqrt(clipped * (1 - clipped) / samples) if samples else 0.0


def find_highest(
    evaluate: Callable[[float, str], Point],
    max_sparsity: float = 0.99,
    max_evaluations: int = 10,
    tolerance: float = 0.05,
    confirm: bool = True,
) -> SearchResult:
    """Find the highest sparsity that is measured feasible, by bisection on log(1 - sparsity).

    The upper end is taken as infeasible and never measured; sparsity 0 is taken as feasible and never returned. Two
    evaluations are held back for confirmation. A point whose confirmation fails is given up for the next lower feasible one.

    Args:
        evaluate: (sparsity, role) -> the measured point; role is "search" or "confirmation".
        max_sparsity: upper end of the search, in (0, 1).
        max_evaluations: evaluations in all, >= 1.
        tolerance: the search ends when what the two ends of the bracket keep differs by less than this fraction, > 0.
        confirm: measure the best point again, in another way, before it is returned.
    Returns:
        The best point that was measured feasible, and all evaluations.
    Raises:
        ValueError: an argument breaks its rule.
    """
    if check_fraction("max_sparsity", max_sparsity) == 0:
        raise ValueError("`max_sparsity` must be in (0, 1), got 0. There is nothing to search.")
    check_integer("max_evaluations", max_evaluations, 1)
    if not is_number(tolerance) or tolerance <= 0:
        raise ValueError(f"`tolerance` must be above 0, got {tolerance!r}. Give a fraction such as 0.05.")
    points: list[Point] = []
    held_back = 2 if confirm and max_evaluations > 3 else 1 if confirm and max_evaluations > 1 else 0
    low, high = 0.0, max_sparsity
    while len(points) < max_evaluations - held_back and (1 - low) / (1 - high) > 1 + tolerance:
        point = evaluate(midpoint(low, high), "search")
        points.append(point)
        low, high = (point.sparsity, high) if point.feasible else (low, point.sparsity)
    best, confirmed = _confirmed(evaluate, points, max_evaluations, confirm)
    return SearchResult(best=best, confirmed=confirmed, points=points, bracket=(low, high))


def midpoint(low: float, high: float) -> float:
    """Return the sparsity whose kept fraction is the geometric mean of those of two others, to four digits if that fits.

    Args:
        low: a sparsity in [0, high).
        high: a sparsity in (low, 1).
    """
    middle = 1 - math.sqrt((1 - low) * (1 - high))
    rounded = round(middle, 4)
    return rounded if low < rounded < high else middle


def _confirmed(
    evaluate: Callable[[float, str], Point], points: list[Point], max_evaluations: int, confirm: bool
) -> tuple[Point | None, bool | None]:
    """The highest feasible point whose confirmation did not fail; one that could not be confirmed is said to be so."""
    candidates = sorted((point for point in points if point.feasible), key=lambda point: -point.sparsity)
    for candidate in candidates:
        if not confirm or len(points) >= max_evaluations:
            return candidate, None
        second = evaluate(candidate.sparsity, "confirmation")
        points.append(second)
        if second.feasible:
            return candidate, True
    return None, None
