"""Learning-rate schedules that are given the length of the fit."""

from __future__ import annotations

import functools
import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_prune.checks import check_fraction, check_integer

__all__ = ["cosine_factor", "restarting_cosine", "restarting_factor", "warmup_cosine"]


def cosine_factor(step: int, total_steps: int, warmup_steps: int) -> float:
    """Compute the factor of the learning rate: a linear rise to 1, then half a cosine down to 0.

    (step + 1) / (warmup + 1) up to step = warmup, then
    (1 + cos(pi * (step - warmup) / (total - warmup))) / 2.

    Args:
        step: optimizer steps taken; clamped to [0, total_steps].
        total_steps: optimizer steps of the fit, > warmup_steps.
        warmup_steps: optimizer steps of the rise, >= 0.
    Returns:
        A factor in [0, 1]; exactly 0 from `total_steps` on.
    """
    step = min(max(step, 0), total_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2


def warmup_cosine(optimizer: Optimizer, total_steps: int, warmup_fraction: float = 0.1) -> LambdaLR:
    """Let the learning rate rise linearly, then fall along half a cosine to 0 at the end of the fit.

    Loshchilov and Hutter, "SGDR", ICLR 2017, arXiv:1608.03983, equation 5 with one cycle; the rise is
    Goyal et al., arXiv:1706.02677, section 2.2. To be stepped after every optimizer step.

    Args:
        optimizer: the optimizer whose learning rates are the peak.
        total_steps: optimizer steps of the fit, >= 1.
        warmup_fraction: fraction of the fit spent rising, in [0, 1).
    Returns:
        The scheduler.
    Raises:
        ValueError: if an argument is out of range.
    """
    check_integer("total_steps", total_steps, 1)
    warmup_steps = int(check_fraction("warmup_fraction", warmup_fraction) * total_steps)
    factor = functools.partial(cosine_factor, total_steps=total_steps, warmup_steps=warmup_steps)
    return LambdaLR(optimizer, factor)


def restarting_factor(
    step: int, total_steps: int, restarts: int, interval: int, final_factor: float, warmup_steps: int = 0
) -> float:
    """Compute the factor of the learning rate: `restarts` short cosines of equal length, then one over what is left.

    With e the steps since the cosine began and L its length: final + (1 - final) (1 + cos(pi e / L)) / 2.

    Args:
        step: optimizer steps taken; clamped to [0, total_steps].
        total_steps: optimizer steps of the fit, > warmup_steps + restarts * interval.
        restarts: short cosines, >= 0.
        interval: optimizer steps of each, >= 1.
        final_factor: what a cosine falls to, in [0, 1).
        warmup_steps: optimizer steps at the peak before the first cosine, >= 0.
    Returns:
        A factor in [final_factor, 1].
    """
    step, total_steps = min(max(step, 0), total_steps) - warmup_steps, total_steps - warmup_steps
    if step < 0:
        return 1.0
    begin = min(step // interval, restarts) * interval
    length = interval if begin < restarts * interval else total_steps - begin
    return final_factor + (1 - final_factor) * (1 + math.cos(math.pi * (step - begin) / length)) / 2


def restarting_cosine(
    optimizer: Optimizer,
    total_steps: int,
    restarts: int = 6,
    interval_fraction: float = 0.12,
    final_factor: float = 1e-4,
    warmup_fraction: float = 0.0,
) -> LambdaLR:
    """Let the learning rate fall along a cosine after each of several prunings, and once more over the rest of the fit.

    Benbaki et al., "Fast as CHITA", ICML 2023, their gradual pruning: `restarts` + 1 prunings at equal distances; the
    defaults are 7 prunings at 0, 12, ..., 72 of 100 epochs, and rates from 0.1 to 1e-5. Departure: the rate follows the
    cosine from step to step, not from epoch to epoch. To be stepped after every optimizer step.

    Args:
        optimizer: the optimizer whose learning rates are the peak.
        total_steps: optimizer steps of the fit, >= 1.
        restarts: short cosines, one less than there are prunings, >= 0.
        interval_fraction: fraction of the fit from one pruning to the next, in [0, 1).
        final_factor: what a cosine falls to, as a fraction of the peak, in [0, 1).
        warmup_fraction: fraction of the fit spent at the peak before the first cosine, in [0, 1).
    Returns:
        The scheduler.
    Raises:
        ValueError: if an argument is out of range, or the intervals leave nothing of the fit.
    """
    check_integer("total_steps", total_steps, 1)
    check_integer("restarts", restarts, 0)
    check_fraction("final_factor", final_factor)
    interval = max(1, round(check_fraction("interval_fraction", interval_fraction) * total_steps))
    warmup_steps = int(check_fraction("warmup_fraction", warmup_fraction) * total_steps)
    if warmup_steps + restarts * interval >= total_steps:
        raise ValueError(
            f"`restarts` * `interval_fraction` must leave a part of the fit, got {restarts} intervals of {interval} of "
            f"{total_steps} steps. Lower one of them."
        )
    arguments: dict[str, Any] = {
        "restarts": restarts, "interval": interval, "final_factor": final_factor, "warmup_steps": warmup_steps,
    }  # fmt: skip
    return LambdaLR(optimizer, functools.partial(restarting_factor, total_steps=total_steps, **arguments))
