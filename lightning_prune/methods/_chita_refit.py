"""Refits between two prunings: steps along fresh gradients in the metric of a stage's Fisher matrix.

A stage of multi-stage CHITA pays for its gradient matrix A and the Gram matrix of its support once. On a fixed support
the quadratic of Benbaki et al. (ICML 2023, section 3) can be centred anew at the weights reached, with the gradient g
of a fresh batch and the A at hand; its minimiser is a step along

    -(A_S^T A_S + 2 mu I)^{-1} n alpha g_S,

a Newton step with a Hessian that lags behind. It costs one mean gradient and two triangular solves. These steps are
not in the paper: they use more training samples than one stage of it, and `Refit` counts them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.checks import check_fraction, check_integer, check_positive
from lightning_prune.methods._chita_exact import SupportSystem, inverse
from lightning_prune.methods._chita_problem import Quadratic

Gradient = Callable[[Tensor], tuple[float, Tensor]]
Loss = Callable[[Tensor], float]

_GATHER = 8  # columns of the support are copied when they are fewer than p / _GATHER
_STRETCH = 6  # times a step length is doubled or halved at most
_SMOOTH = 0.2  # weight of the newest batch in the running loss
_TROUBLE = 2.0  # a batch loss above this multiple of the best running loss takes the last good weights back


@dataclass(frozen=True)
class RefitSettings:
    """How to refit.

    Attributes:
        count: steps, >= 0.
        ridge: ridge of the metric in units of the mean squared row norm of A, > 0.
        momentum: share of the last step kept, in [0, 1).
        length: fraction of the step length that a line search finds along the first direction, > 0.
        final_length: step length at the end of the refits in units of that at their start, in [0, 1].
        average: whether to return the mean of the second half of the steps instead of the last one.
    """

    count: int = 40
    ridge: float = 3e-4
    momentum: float = 0.8
    length: float = 0.8
    final_length: float = 0.5
    average: bool = True

    def __post_init__(self) -> None:
        check_integer("count", self.count, 0)
        check_positive("ridge", self.ridge)
        check_fraction("momentum", self.momentum)
        check_positive("length", self.length)
        if not 0 <= self.final_length <= 1:
            raise ValueError(f"`final_length` must be in [0, 1], got {self.final_length}. 1 keeps the length.")


class Metric:
    """Apply -(A_S^T A_S + 2 mu I)^{-1} n alpha to gradients, with one factorisation.

    Args:
        problem: the quadratic; its `step` is alpha, its `ridge` the ridge of the metric.
        system: the support with its Gram matrix.
    Raises:
        ValueError: the ridge is too small for the precision at hand.
    """

    def __init__(self, problem: Quadratic, system: SupportSystem) -> None:
        self.problem, self.system = problem, system
        self.invert = inverse(system.gram, torch.tensor([problem.damping], device=problem.rows.device))
        few = _GATHER * system.index.numel() <= problem.p
        self.panel = problem.rows.index_select(1, system.index).to(problem.dtype) if few and system.dual else None

    def direction(self, gradient: Tensor) -> Tensor:
        """Return the step for a mean gradient of shape (p,); shape (p,), 0 outside the support."""
        index = self.system.index
        right = gradient.to(self.problem.dtype)[index] * (self.problem.n * self.problem.step)
        moved = torch.zeros_like(self.problem.center)
        moved[index] = -(self._dual(right) if self.system.dual else self._solve(right))
        return moved

    def _solve(self, right: Tensor) -> Tensor:
        return self.invert(right.double()[:, None])[:, 0].to(right.dtype)

    def _dual(self, right: Tensor) -> Tensor:
        """(right - A_S^T (A_S A_S^T + 2 mu I)^{-1} A_S right) / (2 mu) for `right` of shape (k,)."""
        if self.panel is not None:
            image = self._solve(self.panel @ right)
            return (right - image @ self.panel) / self.problem.damping
        spread = torch.zeros_like(self.problem.center)
        spread[self.system.index] = right
        image = self.invert(self.problem.forward(spread)[:, None])[:, 0]
        return (right - self.problem.adjoint(image)[self.system.index]) / self.problem.damping


@dataclass(frozen=True, eq=False)
class Refitted:
    """What `refit` returns: weights of shape (p,), the line search's step length, and how often it had to turn back."""

    weights: Tensor
    length: float
    troubles: int


def refit(
    weights: Tensor,
    metric: Callable[[Tensor], Tensor],
    gradient: Gradient,
    loss: Loss,
    settings: RefitSettings,
    guess: float = 1.0,
) -> Refitted:
    """Step along fresh gradients on a fixed support, with momentum and a step length found by line search.

    v <- momentum v + length_t metric(g(w)),  w <- w + v. A batch whose loss is far above the best seen, or not finite,
    takes the best weights back and halves the length.

    Args:
        weights: start, shape (p,).
        metric: gradient of shape (p,) -> descent direction of shape (p,), 0 outside the support.
        gradient: weights -> (mean loss, mean gradient of shape (p,)) over a fresh batch of training samples.
        loss: weights -> mean loss over calibration samples that stay the same.
        settings: how many steps, and how.
        guess: step length from which the line search starts, > 0; the length of the last stage saves evaluations.
    """
    safe, best, running, half = weights, math.inf, math.nan, settings.count // 2
    velocity, mean, troubles, length = torch.zeros_like(weights), torch.zeros_like(weights), 0, guess
    for done in range(settings.count):
        value, slope = gradient(weights)
        if done and not value < _TROUBLE * best:
            troubles += 1
            weights, velocity, running, length = safe, torch.zeros_like(weights), best, length / 2
        else:
            running = running + _SMOOTH * (value - running) if done else value
            if running <= best:
                safe, best = weights, running
            direction = metric(slope)
            if not done:
                guess = line_search(weights, direction, loss, guess)
                length = settings.length * guess
            now = length * (1 + (settings.final_length - 1) * done / settings.count)
            velocity = settings.momentum * velocity + now * direction
            weights = weights + velocity
        if done >= half:
            mean += (weights - mean) / (done - half + 1)
    return Refitted(mean if settings.average and settings.count else weights, guess, troubles)


def line_search(weights: Tensor, direction: Tensor, loss: Loss, guess: float = 1.0) -> float:
    """Return a length guess * 2^i at which the loss along a direction is lowest, by doubling or halving.

    The length changes by at most a factor of 64 either way, and stays at the guess if nothing lowers the loss: on few
    calibration samples a direction that helps may look as if it did not.

    Args:
        weights: where to start, shape (p,).
        direction: shape (p,).
        loss: weights -> loss; values that are not finite count as infinitely high.
        guess: first length tried, > 0.
    """

    def at(length: float) -> float:
        value = loss(weights + length * direction)
        return value if math.isfinite(value) else math.inf

    length, value, factor = guess, at(guess), 2.0
    if not (after := at(2 * length)) < value:
        factor, after = 0.5, at(length / 2)
    for _ in range(_STRETCH):
        if not (after < value or after == math.inf):
            break
        length, value = factor * length, after
        after = at(factor * length)
    return length if value < loss(weights) else guess
