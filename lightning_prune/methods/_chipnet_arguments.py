"""ChipNet's arguments: their rules, the presets, and what to say of a soft phase that cannot work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_prune.checks import check_choice, is_number

COUPLINGS = ("graph", "per_layer")
NORM_MODES = ("frozen", "train")
CROSSING = 10.0  # psi has to travel about this far for a gate to end off
FEW_STEPS = 100
PRESETS: dict[str, dict[str, Any]] = {
    "reference": {
        "coupling": "per_layer",
        "bn_soft": "train",
        "ste_last": 0.0,
        "min_keep": 0.0,
        "fold": False,
        "gate_lr": 1e-3,
        "refit_bn": False,
    }
}


def with_preset(preset: str | None, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given arguments; of those left at their defaults, a preset's values.

    Raises:
        ValueError: there is no such preset.
    """
    if preset is None:
        return dict(given)
    check_choice("preset", preset, tuple(PRESETS))
    return {**given, **{name: value for name, value in PRESETS[preset].items() if given[name] == defaults[name]}}


def check_length(name: str, value: Any) -> int | float:
    """Return a length: a float in (0, 1] (fraction of the fit) or an int >= 1 (optimizer steps)."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if isinstance(value, float) and 0.0 < value <= 1.0:
        return value
    raise ValueError(
        f"`{name}` must be a float in (0, 1] (fraction of the fit) or an int >= 1 (optimizer steps), got {value!r}."
    )


def check_weight(name: str, value: Any) -> float:
    """Return the weight of a loss as float if it is finite and not negative, else raise ValueError."""
    if not is_number(value) or value < 0:
        raise ValueError(f"`{name}` must be a finite number >= 0, got {value!r}.")
    return float(value)


def travel_warning(soft_steps: int, rate: float, travel: float, given: bool) -> str | None:
    """Return what to say when gates cannot cross, or have few steps to do it in; None if all is well.

    Args:
        soft_steps: optimizer steps of the soft phase, >= 1.
        rate: AdamW's step size for psi, > 0.
        travel: how far psi is meant to move, > 0.
        given: whether the step size was chosen by hand.
    """
    if rate * soft_steps < CROSSING:
        return (
            f"the gates cannot cross: {soft_steps} soft steps of {rate:g} move psi by at most {rate * soft_steps:.3g}, and a "
            f"gate that ends off travels {CROSSING:g} at least, so all may end on. Use gate_lr="
            f"{max(travel, 40.0) / soft_steps:.3g}, or train longer."
        )
    if soft_steps < FEW_STEPS and not given:
        return (
            f"{soft_steps} soft steps are few (below {FEW_STEPS}); the step size that still works is {rate:.3g} per step. "
            f"Train longer, or give gate_lr={rate:.3g} to accept it."
        )
    return None
