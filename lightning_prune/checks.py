"""Argument checks shared by all modules: each names the argument, the rule, the value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def is_number(value: Any) -> bool:
    """Whether `value` is a finite int or float (bool and str are not numbers)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_fraction(name: str, value: Any) -> float:
    """Return `value` as float if it lies in [0, 1), else raise ValueError."""
    if not is_number(value) or not 0 <= value < 1:
        remedy = (
            " Give a fraction, not a percentage."
            if is_number(value) and 1 < value <= 100
            else " Give a number such as 0.9."
        )
        raise ValueError(f"`{name}` must be in [0, 1), got {value!r}.{remedy}")
    return float(value)


def check_budget(name: str, value: Any) -> float:
    """Return `value` as float if it lies in (0, 1], else raise ValueError."""
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError(f"`{name}` must be in (0, 1], the fraction of the cost that remains, got {value!r}.")
    return float(value)


def check_integer(name: str, value: Any, minimum: int, remedy: str = "") -> int:
    """Return `value` if it is an int of at least `minimum`, else raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"`{name}` must be an integer >= {minimum}, got {value!r}. {remedy}".rstrip())
    return value


def check_positive(name: str, value: Any) -> float:
    """Return `value` as float if it is a finite number above 0, else raise ValueError."""
    if not is_number(value) or value <= 0:
        raise ValueError(f"`{name}` must be a finite number above 0, got {value!r}.")
    return float(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return `value` if it is one of `choices`, else raise ValueError."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    return str(value)


def check_bool(name: str, value: Any) -> bool:
    """Return `value` if it is a bool, else raise ValueError."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be true or false, got {value!r}.")
    return value
