"""ChipNet's gates as pure functions: the two maps, the two losses, the annealing.

One number psi per gate. With x = sigmoid(beta psi),

    z = H(x) = 1 - exp(-gamma x) + x exp(-gamma)

is what multiplies the channel. H(0) = 0, H(1) = 1, and H is strictly increasing and concave, so H(x) >= x with equality
only at 0 and 1. The step of a large gamma is at x = 0, not at 0.5: annealing turns gates on, and one that ends off has
travelled far to the negative side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BETA, BETA_STEP, BETA_MAX = 1.0, 0.02, 6.0
GAMMA, GAMMA_FACTOR, GAMMA_MAX = 2.0, math.sqrt(2.0), 256.0
TAU, TAU_GROWTH, TAU_MAX = 10.0, 100.0, 60.0


@dataclass(frozen=True)
class Temperature:
    """How sharp the gates are: slope beta of the logistic, step gamma of the Heaviside, slope tau of the count."""

    beta: float
    gamma: float
    tau: float


def anneal(step: int, soft_steps: int, stages: int = 20) -> Temperature:
    """Return the temperature after `step` of `soft_steps` optimizer steps.

    In stage k = floor(stages t / N): beta = min(6, 1 + 0.02 k), gamma = min(256, 2 * 2^(k/2)), both counted as if there
    were 20 stages; tau = min(60, 10 + 100 t / N) grows with every step.

    The stages are discrete on purpose: where gamma grows at every step, gates ride along at z = 0.5.

    Args:
        step: optimizer steps done, clamped to [0, soft_steps - 1].
        soft_steps: length of the soft phase, >= 1.
        stages: number of stages, >= 1.
    Returns:
        The temperature.
    """
    step = min(max(step, 0), soft_steps - 1)
    level = stage_of(step, soft_steps, stages) * 20 / stages
    beta = min(BETA_MAX, BETA + BETA_STEP * level)
    gamma = min(GAMMA_MAX, GAMMA * GAMMA_FACTOR**level)
    return Temperature(beta, gamma, min(TAU_MAX, TAU + TAU_GROWTH * step / soft_steps))


def stage_of(step: int, soft_steps: int, stages: int = 20) -> int:
    """Return the stage floor(stages t / N) of a step, in [0, stages]."""
    return stages * min(max(step, 0), soft_steps) // soft_steps


def logistic(psi: Tensor, beta: float) -> Tensor:
    """Return x = 1 / (1 + exp(-beta psi)), finite with a finite gradient for every psi.

    Args:
        psi: float, any shape.
        beta: slope, > 0.
    Returns:
        x in [0, 1], of psi's shape and dtype.
    """
    return torch.sigmoid(beta * psi)


def heaviside(x: Tensor, gamma: float) -> Tensor:
    """Return z = 1 - exp(-gamma x) + x exp(-gamma), without losing the digits of small z.

    Args:
        x: float in [0, 1], any shape.
        gamma: sharpness, >= 0; 0 is the identity, infinity the step at 0+.
    Returns:
        z in [x, 1], of x's shape and dtype.
    """
    power = -gamma * x
    # either form alone loses digits: 1 - exp those of a small z, expm1 (through its result + 1) those of a small slope
    return torch.where(power > -1.0, -torch.expm1(power), 1 - torch.exp(power)) + x * math.exp(-gamma)


def gate_values(psi: Tensor, temperature: Temperature) -> tuple[Tensor, Tensor]:
    """Return (x, z) of gates psi, in float32 or wider whatever autocast says."""
    with torch.autocast(psi.device.type, enabled=False):
        x = logistic(psi, temperature.beta)
        return x, heaviside(x, temperature.gamma)


def crispness_loss(x: Tensor, z: Tensor) -> Tensor:
    """Return L_c = mean over all gates of (z - x)^2: zero if and only if every gate is 0 or 1.

    Args:
        x, z: results of `gate_values`, of shape (gates,).
    Returns:
        A scalar >= 0.
    """
    return (z - x).square().mean()


def crispness_turn(gamma: float) -> float:
    """Return x* = -ln((1 - exp(-gamma)) / gamma) / gamma, where H' = 1: gates above it go to 1, below it to 0.

    Args:
        gamma: sharpness, > 0.
    """
    return -math.log(-math.expm1(-gamma) / gamma) / gamma


def soft_counts(z: Tensor, tau: float) -> Tensor:
    """Return m = 1 / (1 + exp(-tau (z - 0.5))): how much of each gate the soft budget counts as kept.

    Args:
        z: gates in [0, 1], of shape (gates,).
        tau: slope, > 0.
    Returns:
        m in (0, 1), of z's shape and dtype.
    """
    return torch.sigmoid(tau * (z - 0.5))


def budget_loss(share: Tensor, budget: float) -> Tensor:
    """Return L_b = (V - V_0)^2; two-sided, so that an unused budget costs too.

    Args:
        share: remaining fraction V of the dense cost, a scalar.
        budget: the fraction V_0 that may remain, in (0, 1].
    """
    return (share - budget).square()
