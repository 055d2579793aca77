"""One way to measure: variants take turns, step by step, in one process; the result is a table of ratios to the first."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Measured:
    """Milliseconds per call of one variant, and its ratio to the first variant, round by round."""

    median: float
    low: float
    high: float
    ratio: float


def take_turns(variants: Mapping[str, Callable[[], object]], rounds: int = 40, warmup: int = 5) -> dict[str, Measured]:
    """Call every variant once per round, in turns; machine drift then hits all of them alike.

    Args:
        variants: callables by name; the first is the reference.
        rounds: measured rounds, >= 2.
        warmup: rounds before that which are not measured.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + rounds):
        for name, call in variants.items():
            started = time.perf_counter()
            call()
            if turn >= warmup:
                times[name].append((time.perf_counter() - started) * 1e3)
    reference = times[next(iter(variants))]
    return {name: _summary(values, reference) for name, values in times.items()}


def _summary(values: list[float], reference: list[float]) -> Measured:
    deciles = statistics.quantiles(values, n=10)
    ratio = statistics.median(one / two for one, two in zip(values, reference, strict=True))
    return Measured(statistics.median(values), deciles[0], deciles[-1], ratio)


def show(title: str, results: Mapping[str, Measured], budgets: Mapping[str, float] | None = None) -> None:
    """Print a table; a budget is the largest ratio a variant should have."""
    table = Table(title=title)
    for column in ("variant", "ms, median", "10 % - 90 %", "ratio to first", "budget"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, result in results.items():
        budget = (budgets or {}).get(name)
        verdict = "" if budget is None else f"{budget:.2f} {'met' if result.ratio <= budget else 'MISSED'}"
        table.add_row(
            name, f"{result.median:.3f}", f"{result.low:.3f} - {result.high:.3f}", f"{result.ratio:.3f}", verdict
        )
    Console(width=110).print(table)
