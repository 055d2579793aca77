"""ChipNet's arguments: their rules, the presets, and what to say of a soft phase that cannot work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_prune.checks import check_bool, check_choice, check_fraction, check_positive, is_number

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
        "refit_consumers": False,
        "weight_rate": 1.0,
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


def check_sum(begin: int | float, prune_fraction: int | float) -> None:
    """Raise ValueError if two fractions of a fit end beyond it."""
    if isinstance(begin, float) and isinstance(prune_fraction, float) and begin + prune_fraction > 1:
        raise ValueError(
            f"`begin` + `prune_fraction` must not exceed 1, got {begin} + {prune_fraction}. Lower one of them."
        )


def check_weight(name: str, value: Any) -> float:
    """Return the weight of a loss as float if it is finite and not negative, else raise ValueError."""
    if not is_number(value) or value < 0:
        raise ValueError(f"`{name}` must be a finite number >= 0, got {value!r}.")
    return float(value)


def check_chosen(chosen: Mapping[str, Any], round_to: Any) -> dict[str, Any]:
    """Return the values of the arguments that a preset may choose.

    Args:
        chosen: by name, as given or as the preset has them.
        round_to: the argument of this name.
    Raises:
        ValueError: one breaks its rule.
    """
    rate, coupling = chosen["weight_rate"], check_choice("coupling", chosen["coupling"], COUPLINGS)
    if not is_number(rate) or not 0 <= rate <= 1:
        raise ValueError(f"`weight_rate` must be a number in [0, 1], got {rate!r}. 1 leaves gradients as they are.")
    if coupling == "per_layer" and round_to != 1:
        raise ValueError(f"`round_to` must be 1 with coupling='per_layer', got {round_to}. Use coupling='graph'.")
    gate_lr, min_keep = chosen["gate_lr"], chosen["min_keep"]
    return {
        "coupling": coupling,
        "bn_soft": check_choice("bn_soft", chosen["bn_soft"], NORM_MODES),
        "weight_rate": float(rate),
        "ste_last": check_fraction("ste_last", chosen["ste_last"]),
        "min_keep": None if min_keep is None else check_fraction("min_keep", min_keep),
        "fold": check_bool("fold", chosen["fold"]),
        "gate_lr": None if gate_lr is None else check_positive("gate_lr", gate_lr),
        "refit_consumers": check_bool("refit_consumers", chosen["refit_consumers"]),
    }


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
