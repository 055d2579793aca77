"""Learning-rate schedules that are given the length of the fit."""

from __future__ import annotations

import functools
import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_prune.checks import check_fraction, check_integer

__all__ = ["cosine_factor", "warmup_cosine"]


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
