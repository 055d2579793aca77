"""Progress of a fit -> value: sparsity over time, and the moments at which one-shot methods act.

Schedules are total: progress is clamped to [0, 1], the first and the last value are reached exactly and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from lightning_prune.checks import check_budget, check_choice, check_fraction, is_number

When = str | int | float


def cubic(progress: float, initial: float, final: float) -> float:
    """Zhu and Gupta (2017), equation 1: final + (initial - final) (1 - progress)^3."""
    return _between(1.0 - (1.0 - _clamp(progress)) ** 3, initial, final)


def linear(progress: float, initial: float, final: float) -> float:
    """Straight line from `initial` to `final`."""
    return _between(_clamp(progress), initial, final)


def geometric(progress: float, initial: float, final: float) -> float:
    """Density falls by the same factor in equal times: 1 - (1 - initial) ((1 - final) / (1 - initial))^progress."""
    progress = _clamp(progress)
    if progress in (0.0, 1.0):
        return final if progress else initial
    return 1.0 - (1.0 - initial) * ((1.0 - final) / (1.0 - initial)) ** progress


def constant(progress: float, initial: float, final: float) -> float:
    """The final value at once."""
    return final


SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "cubic": cubic, "linear": linear, "geometric": geometric, "constant": constant,
}  # fmt: skip


def check_schedule(name: Any) -> str:
    """Return `name` if it is a schedule, else raise ValueError."""
    return check_choice("schedule", name, tuple(SCHEDULES))


def _clamp(progress: float) -> float:
    return min(1.0, max(0.0, progress))


def _between(share: float, initial: float, final: float) -> float:
    """initial + share (final - initial) for a share in [0, 1], with both ends free of rounding."""
    return initial if share == 0.0 else final - (1.0 - share) * (final - initial)


@dataclass(frozen=True)
class Position:
    """Where a fit stands, in every unit a user may count in.

    Attributes:
        step: optimizer steps taken, >= 0 (`trainer.global_step`).
        epoch: epochs finished, >= 0.
        progress: fraction of the fit done, in [0, 1]; None if the length of the fit is not known.
        total_steps: optimizer steps of the whole fit; None if not known.
        ended: whether the last optimizer step is done.
    """

    step: int
    epoch: int
    progress: float | None = None
    total_steps: int | None = None
    ended: bool = False


@dataclass(frozen=True)
class Moment:
    """When a one-shot method acts, and how sparse the network is from then on."""

    when: When
    target: float

    def reached(self, position: Position) -> bool:
        """Whether the fit stands at this moment or past it (at the end of the fit every moment has come)."""
        if self.when == "start" or position.ended:
            return True
        if self.when == "end":
            return False
        if isinstance(self.when, float):
            return position.progress is not None and position.progress >= self.when - 1e-9
        return position.epoch >= int(self.when)

    def is_past(self, position: Position) -> bool:
        """Whether this moment lies before the position, so that a fit that goes on from there has missed it."""
        if isinstance(self.when, int):
            return self.when < position.epoch
        return self.when != "end" and self.reached(position)


def parse_at(at: Any, target: float | None, budgets: bool = False) -> tuple[Moment, ...]:
    """Turn the argument `at` into moments in order.

    Args:
        at: "start", "end", an int (epochs done, >= 0), a float in (0, 1) (fraction of the fit), or a list of
            (when, target) pairs with growing sparsity.
        target: the sparsity used unless `at` is a list of pairs.
        budgets: targets are remaining fractions in (0, 1], which fall.
    Raises:
        ValueError: any other form, or pairs whose order or targets do not grow.
    """
    if isinstance(at, str) or is_number(at):
        return (Moment(_check_when(at), 0.0 if target is None else target),)
    if (
        not isinstance(at, Sequence)
        or not at
        or not all(isinstance(p, Sequence) and not isinstance(p, str) and len(p) == 2 for p in at)
    ):
        raise ValueError(
            "`at` must be 'start', 'end', an int (epochs), a float in (0, 1) (fraction of the fit) or a list of "
            f"(when, {'budget' if budgets else 'sparsity'}) pairs, got {at!r}."
        )
    check = check_budget if budgets else check_fraction
    moments = tuple(Moment(_check_when(when), check("at", value)) for when, value in at)
    for one, two in combinations(moments, 2):
        if budgets and two.target > one.target:
            raise ValueError(f"`at` must list budgets that do not grow, got {one.target} before {two.target}.")
        if not budgets and two.target < one.target:
            raise ValueError(f"`at` must list sparsities that do not fall, got {one.target} before {two.target}.")
        units = {type(one.when), type(two.when)}  # epochs and fractions compare only in a fit of known length
        if units != {int, float} and _order(two.when) <= _order(one.when):
            raise ValueError(f"`at` must list moments in order, got {one.when!r} before {two.when!r}.")
    return moments


def _order(when: When) -> float:
    return {"start": -1.0, "end": float("inf")}[when] if isinstance(when, str) else float(when)


def _check_when(when: Any) -> When:
    if isinstance(when, str):
        return check_choice("at", when, ("start", "end"))
    if isinstance(when, int) and not isinstance(when, bool) and when >= 0:
        return when
    if isinstance(when, float) and 0.0 < when < 1.0:
        return when
    raise ValueError(
        f"`at` must be an int >= 0 (epochs done) or a float in (0, 1) (fraction of the fit), got {when!r}. "
        "Use 'start' or 'end' for the two ends."
    )


@dataclass(frozen=True)
class Ramp:
    """A stretch of a fit over which something grows: from `begin` to `end`, acting every `every_n_steps`.

    Bounds are int (optimizer steps) or float (fraction of the fit).
    """

    begin: int | float
    end: int | float
    every_n_steps: int

    def bounds(self, total_steps: int | None) -> tuple[int, int]:
        """Return (begin, end) in optimizer steps.

        Raises:
            ValueError: a fraction is asked of a fit without a known length, or begin lies after end, or beyond the fit.
        """
        begin, end = (self._to_step(name, total_steps) for name in ("begin", "end"))
        if begin > end:
            raise ValueError(
                f"`begin` must not lie after `end`, got steps {begin} and {end}. Lower `begin` or raise `end`."
            )
        if total_steps is not None and end > total_steps:
            raise ValueError(
                f"`end` must lie within the fit of {total_steps} optimizer steps, got {end}. "
                "Lower `end` or train longer."
            )
        return begin, end

    def next_due(self, step: int, bounds: tuple[int, int]) -> int | None:
        """Return the first step after `step` at which to act; None past the end, which is always acted on."""
        begin, end = bounds
        if step >= end:
            return None
        if step < begin:
            return begin
        return min(end, begin + ((step - begin) // self.every_n_steps + 1) * self.every_n_steps)

    def _to_step(self, name: str, total_steps: int | None) -> int:
        bound = getattr(self, name)
        if isinstance(bound, int):
            return bound
        if total_steps is None:
            raise ValueError(
                f"`{name}`={bound} is a fraction of the fit, whose length is not known (max_epochs or max_steps is -1)."
                " Give an int (optimizer steps)."
            )
        return round(bound * total_steps)


def check_bound(name: str, value: Any) -> int | float:
    """Return a ramp bound: an int >= 0 (optimizer steps) or a float in [0, 1] (fraction of the fit)."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, float) and 0.0 <= value <= 1.0:
        return value
    raise ValueError(
        f"`{name}` must be an int >= 0 (optimizer steps) or a float in [0, 1] (fraction of the fit), got {value!r}."
    )
