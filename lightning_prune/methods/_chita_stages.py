"""CHITA++: prune in stages, each with a quadratic centred at the weights of the one before.

Benbaki et al., ICML 2023, section 3.4 (schedules) and M-FAC (Frantar, Kurtic, Alistarh, NeurIPS 2021) for the
geometric schedule.

Departures from the paper: a stage may solve for several ridges at the price of one and take the one with the lowest
loss on calibration samples; it may measure weights in units of their gradients (`metric`), so that neither the choice
of the support nor the ridge depends on the scale of a layer; and it may refit the kept weights (see `_chita_refit`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_prune.checks import check_choice, check_fraction, check_integer, check_positive
from lightning_prune.methods._chita_exact import SupportSystem, solve_system, support_system
from lightning_prune.methods._chita_iht import diagonal
from lightning_prune.methods._chita_problem import (
    Quadratic,
    check_count,
    magnitude_support,
    squared_row_norms,
)
from lightning_prune.methods._chita_refit import Gradient, Loss, Metric, RefitSettings, Refitted, refit
from lightning_prune.methods._chita_solver import solve_iht, stepped_support
from lightning_prune.selection import kept_count

SCHEDULES = ("exp", "poly", "linear", "const", "mfac")
_FLOOR = 1e-2  # least gradient size in units of the mean, where weights are measured in units of their gradients


def stage_sparsities(schedule: str, stages: int, sparsity: float, start: float = 0.1, polish: int = 0) -> list[float]:
    """Return the sparsity after each stage.

    With T stages, t = 0..T-1, from s0 = min(start, sparsity) to s:

        exp     s0 + (s - s0) 2^(T-1) / (2^(T-1) - 1) (1 - 2^-t)
        poly    s + (s0 - s) (1 - t / (T-1))^3
        linear  s0 + (s - s0) t / (T-1)
        const   s
        mfac    1 - (1 - s0) ((1 - s) / (1 - s0))^((t+1) / T)

    Args:
        schedule: one of the names above.
        stages: T, >= 1; a single stage goes to s at once.
        sparsity: s, in [0, 1).
        start: s0, in [0, 1).
        polish: further stages at s, >= 0.
    Returns:
        T + polish values that never fall and end at s exactly.
    Raises:
        ValueError: an argument is out of range.
    """
    check_choice("schedule", schedule, SCHEDULES)
    check_integer("stages", stages, 1)
    check_integer("polish", polish, 0)
    s, s0 = check_fraction("sparsity", sparsity), min(check_fraction("start", start), sparsity)
    last = stages - 1
    shapes: dict[str, Callable[[int], float]] = {
        "exp": lambda t: s0 + (s - s0) * 2**last / (2**last - 1) * (1 - 2.0**-t),
        "poly": lambda t: s + (s0 - s) * (1 - t / last) ** 3,
        "linear": lambda t: s0 + (s - s0) * t / last,
        "const": lambda t: s,
        "mfac": lambda t: 1 - (1 - s0) * ((1 - s) / (1 - s0)) ** ((t + 1) / stages),
    }
    return [min(shapes[schedule](t), s) for t in range(last)] + [s] * (1 + polish)


@dataclass(frozen=True)
class StageSettings:
    """How one stage prunes.

    Attributes:
        ridges: ridges to try, in units of the mean squared row norm of A, each > 0.
        metric: weights and gradients are measured in units of the root mean square gradient of each weight to this
            power, in [0, 1]; 0 leaves them alone.
        first_order: whether the stage also steps along the gradient, not only repairs what it prunes.
        algorithm: "bso" (one exact solve) or "iht" (hard thresholding and swaps first).
        refit: steps along fresh gradients after the solve.
        shares: shares of the first-order step to try, each in [0, 1].
    """

    ridges: tuple[float, ...] = (1e-4,)
    metric: float = 0.75
    first_order: bool = True
    algorithm: str = "bso"
    refit: RefitSettings = field(default_factory=RefitSettings)
    shares: tuple[float, ...] = (1.0, 0.25, 0.0)

    def __post_init__(self) -> None:
        if not self.ridges:
            raise ValueError("`ridges` must hold at least one ridge, got none. Give for example (1e-4, 1e-3).")
        for ridge in self.ridges:
            check_positive("ridges", ridge)
        if not self.shares or not all(0 <= share <= 1 for share in self.shares):
            raise ValueError(f"`shares` must hold values in [0, 1], got {self.shares}. (1.0,) takes the whole step.")
        if not 0 <= self.metric <= 1:
            raise ValueError(f"`metric` must be in [0, 1], got {self.metric}. 0 leaves weights in their own units.")
        check_choice("algorithm", self.algorithm, ("bso", "iht"))


@dataclass(frozen=True, eq=False)
class Stage:
    """What one stage did.

    Attributes:
        weights: shape (p,), 0 outside the support.
        support: bool of shape (p,), exactly the number asked for.
        ridge: the ridge taken, in units of the mean squared row norm.
        share: the share of the first-order step taken; 0 without one.
        solved_loss: calibration loss after the exact solve; nan if there was nothing to choose.
        movement: |w - w_bar|.
        returned: kept weights that were 0 before.
        length: step length of the refits' line search, the guess for the next stage.
        troubles: how often the refits turned back.
    """

    weights: Tensor
    support: Tensor
    ridge: float
    share: float
    solved_loss: float
    movement: float
    returned: int
    length: float
    troubles: int


def run_stages(
    weights: Tensor,
    sparsities: Sequence[float],
    rows: Callable[[Tensor], Tensor],
    samples_per_row: int,
    gradient: Gradient,
    loss: Loss,
    settings: StageSettings,
    alive: Tensor | None = None,
) -> Iterator[Stage]:
    """Prune stage by stage; yield each stage when it is done.

    Args:
        weights: w_bar, shape (p,).
        sparsities: pruned fraction of the p weights after each stage, from `stage_sparsities`.
        rows: weights -> gradient matrix (n, p) over fresh samples; the stage overwrites it.
        samples_per_row: m >= 1, samples averaged in one row.
        gradient: weights -> (mean loss, mean gradient of shape (p,)) over a fresh batch.
        loss: weights -> mean loss over calibration samples that stay the same.
        settings: how a stage prunes.
        alive: bool of shape (p,); weights that are False are gone and do not return.
    """
    length = 1.0
    for sparsity in sparsities:
        k = kept_count(weights.numel(), sparsity)
        stage = run_stage(weights, k, rows(weights), samples_per_row, gradient, loss, settings, alive, length)
        yield stage
        weights, length = stage.weights, stage.length


def run_stage(
    weights: Tensor,
    k: int,
    rows: Tensor,
    samples_per_row: int,
    gradient: Gradient,
    loss: Loss,
    settings: StageSettings,
    alive: Tensor | None = None,
    guess: float = 1.0,
    mean_gradient: Tensor | None = None,
) -> Stage:
    """Prune once: choose the support, solve on it, refit.

    Args:
        weights: w_bar, shape (p,).
        k: number of weights kept.
        rows: gradient matrix (n, p) at w_bar; overwritten.
        samples_per_row: m >= 1.
        gradient: weights -> (mean loss, mean gradient of shape (p,)) over a fresh batch.
        loss: weights -> mean loss over calibration samples that stay the same.
        settings: how to prune.
        alive: bool of shape (p,); weights that are False are gone and do not return.
        guess: where the refits' line search starts.
        mean_gradient: gradient at w_bar, shape (p,), from a batch of its own; None takes the mean of the rows.
    Raises:
        ValueError: `k` is out of range, rows are not finite, or every ridge is too small for the precision at hand.
    """
    weights = weights.float() if weights.dtype in (torch.float16, torch.bfloat16) else weights
    step = 1.0 / check_integer("samples_per_row", samples_per_row, 1)
    scale = gradient_scale(rows, settings.metric)
    if scale is not None:
        rows.div_(scale)
        mean_gradient = None if mean_gradient is None else mean_gradient / scale
    unit = float(squared_row_norms(rows).mean()) or 1.0
    center = weights if scale is None else weights * scale
    used = step if settings.first_order else 0.0
    problem = Quadratic(rows, center, settings.ridges[0] * unit, used, mean_gradient if used else None, alive)
    check_count(problem, k)
    system = _choose(problem, k, settings.algorithm)
    solved = _best_solution(problem, system, settings, unit, scale, loss)
    fitted = Refitted(solved.weights, guess, 0)
    if settings.refit.count and k:
        metric = Metric(problem.damped(settings.refit.ridge * unit, step), system)
        fitted = refit(solved.weights, _scaled(metric, scale), gradient, loss, settings.refit, guess)
    returned = int((system.support & (weights == 0)).sum())
    movement = float((fitted.weights - weights).norm())
    return Stage(
        fitted.weights, system.support, solved.ridge, solved.share, solved.loss, movement, returned,
        fitted.length, fitted.troubles,
    )  # fmt: skip


def gradient_scale(rows: Tensor, power: float) -> Tensor | None:
    """Return (rms gradient of each weight / mean over the weights)^power, floored, of shape (p,); None for power 0.

    Args:
        rows: gradient matrix of shape (n, p).
        power: exponent in [0, 1].
    """
    if power == 0:
        return None
    one = Quadratic(rows, rows.new_zeros(rows.shape[1]), ridge=1.0)
    size = (diagonal(one) - one.damping).clamp_min_(0.0).sqrt_()
    mean = size.mean()
    if not mean > 0:
        return None
    scale = (size / mean).clamp_min_(_FLOOR).pow_(power)
    return scale / scale.mean()


def _choose(problem: Quadratic, k: int, algorithm: str) -> SupportSystem:
    """The support and its system."""
    if algorithm == "iht":
        return support_system(problem, solve_iht(problem, k).support)
    return support_system(problem, stepped_support(problem, magnitude_support(problem, k), k))


@dataclass(frozen=True, eq=False)
class _Candidate:
    weights: Tensor
    ridge: float
    share: float
    loss: float


def _best_solution(
    problem: Quadratic,
    system: SupportSystem,
    settings: StageSettings,
    unit: float,
    scale: Tensor | None,
    loss: Loss,
) -> _Candidate:
    """The exact solution with the lowest calibration loss over ridges and shares of the first-order step.

    The solution is affine in the first-order term, so that two solves give every share.
    """
    ridges = [ridge * unit for ridge in settings.ridges]
    whole = solve_system(problem, system, ridges)
    shares = settings.shares if problem.first_order else (0.0,)
    repaired = (
        whole if set(shares) <= {1.0} or not problem.first_order else solve_system(problem.repair(), system, ridges)
    )
    best = None
    for ridge, full, base in zip(settings.ridges, whole, repaired, strict=True):
        for share in shares:
            weights = base + share * (full - base) if full is not base else full
            weights = weights if scale is None else weights / scale
            if len(ridges) == len(shares) == 1:
                return _Candidate(weights, ridge, share, math.nan)
            value = loss(weights)
            if best is None or value < best.loss or math.isnan(best.loss):
                best = _Candidate(weights, ridge, share, value)
    assert best is not None
    return best


def _scaled(metric: Metric, scale: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The direction in the weights' own units."""
    return metric.direction if scale is None else lambda gradient: metric.direction(gradient / scale) / scale
