"""CHITA++: prune in stages, each with a quadratic centred at the weights of the one before.

Benbaki et al., ICML 2023, section 3.4 (schedules) and M-FAC (Frantar, Kurtic, Alistarh, NeurIPS 2021) for the
geometric schedule.

Departures from the paper: a stage solves for several ridges at the price of one and takes the one with the lowest loss
on calibration samples, and a larger one still where the true loss rises far beyond what the quadratic says; it may
measure weights in units of their gradients (`metric`), so that neither the choice of the support nor the ridge depends
on the scale of a layer; a stage that does worse on calibration samples than the largest weights alone gives way to them;
and the kept weights are refitted after each stage (see `_chita_refit`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_prune.checks import check_choice, check_fraction, check_integer, check_positive
from lightning_prune.methods._chita_block import block_bounds, solve_blocks
from lightning_prune.methods._chita_exact import solve_system, support_system
from lightning_prune.methods._chita_iht import diagonal
from lightning_prune.methods._chita_obs import obs_support, single_updates
from lightning_prune.methods._chita_problem import (
    Quadratic,
    check_count,
    keep_largest,
    magnitude_support,
    squared_row_norms,
)
from lightning_prune.methods._chita_refit import Gradient, Loss, RefitSettings, Refitter
from lightning_prune.methods._chita_solver import solve_iht, stepped_support
from lightning_prune.selection import kept_count

SCHEDULES = ("exp", "poly", "linear", "const", "mfac")
ALGORITHMS = ("iht", "bso", "block", "obs", "woodfisher")
_BEYOND = 3.0  # a loss that rises by more than this multiple of what the quadratic says has left its region
_LARGER = 2  # times the ridge is then raised tenfold, at most
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
        ridges: ridges to try, ascending, in units of the mean squared row norm of A, each > 0.
        metric: weights and gradients are measured in units of the root mean square gradient of each weight to this
            power, in [0, 1]; 0 leaves them alone.
        first_order: whether the stage also steps along the gradient, not only repairs what it prunes.
        algorithm: "bso" (one exact solve), "iht" (hard thresholding and swaps first), "block" (exact solves in blocks),
            "obs" (scores of single weights, then one exact solve) or "woodfisher" (the same scores, and the sum of the
            updates of single weights).
        refit: steps along fresh gradients after the solve.
        shares: shares of the first-order step to try, each in [0, 1].
        block_size: weights in a block of "block", >= 1.
    """

    ridges: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    metric: float = 0.5
    first_order: bool = True
    algorithm: str = "bso"
    refit: RefitSettings = field(default_factory=RefitSettings)
    shares: tuple[float, ...] = (1.0, 0.0)
    block_size: int = 500

    def __post_init__(self) -> None:
        if not self.ridges:
            raise ValueError("`ridges` must hold at least one ridge, got none. Give for example (1e-4, 1e-3).")
        for ridge in self.ridges:
            check_positive("ridges", ridge)
        if not self.shares or not all(0 <= share <= 1 for share in self.shares):
            raise ValueError(f"`shares` must hold values in [0, 1], got {self.shares}. (1.0,) takes the whole step.")
        if not 0 <= self.metric <= 1:
            raise ValueError(f"`metric` must be in [0, 1], got {self.metric}. 0 leaves weights in their own units.")
        check_choice("algorithm", self.algorithm, ALGORITHMS)
        check_integer("block_size", self.block_size, 1)


@dataclass(frozen=True, eq=False)
class Stage:
    """What one stage did.

    Attributes:
        weights: shape (p,), 0 outside the support.
        support: bool of shape (p,), exactly the number asked for.
        ridge: the ridge taken, in units of the mean squared row norm; nan where the largest weights were kept as they are.
        share: the share of the first-order step taken; 0 without one.
        loss: calibration loss after the solve.
        expected: rise of the loss that the quadratic expected.
        returned: kept weights that were 0 before.
    """

    weights: Tensor
    support: Tensor
    ridge: float
    share: float
    loss: float
    expected: float
    returned: int


def run_stages(
    weights: Tensor,
    sparsities: Sequence[float],
    rows: Callable[[Tensor], tuple[Tensor, int]],
    gradient: Gradient,
    loss: Loss,
    settings: StageSettings,
    alive: Tensor | None = None,
    sizes: Sequence[int] | None = None,
    mean: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Stage]:
    """Prune stage by stage; yield each stage when it is done, with its kept weights refitted.

    Args:
        weights: w_bar, shape (p,).
        sparsities: pruned fraction of the p weights after each stage, from `stage_sparsities`.
        rows: weights -> gradient matrix (n, p) over fresh samples, and samples in each row; the stage overwrites it.
        gradient: weights -> (mean loss, mean gradient of shape (p,)) over a fresh batch.
        loss: weights -> mean loss over calibration samples that stay the same.
        settings: how a stage prunes.
        alive: bool of shape (p,); weights that are False are gone and do not return.
        sizes: entries of each tensor in the flat vector, in order; None takes it as one tensor.
        mean: weights -> gradient of shape (p,) from a batch of its own; None takes the mean of the rows.
    """
    sizes = [weights.numel()] if sizes is None else list(sizes)
    refitter = Refitter(settings.refit, sizes, len(sparsities))
    for sparsity in sparsities:
        k = min(kept_count(weights.numel(), sparsity), weights.numel() if alive is None else int(alive.sum()))
        own = mean(weights) if mean is not None and settings.first_order else None
        stage = run_stage(weights, k, *rows(weights), loss, settings, alive, own, sizes)
        stage = _unless_worse(stage, weights, k, loss, alive)
        weights = refitter.refit(stage.weights, stage.support, gradient, loss, stage.loss)
        yield replace(stage, weights=weights)


def _unless_worse(stage: Stage, weights: Tensor, k: int, loss: Loss, alive: Tensor | None) -> Stage:
    """The stage; where the quadratic does not hold so far out, the largest weights as they are."""
    kept = keep_largest(weights.abs(), k, alive)
    plain = loss(weights * kept)
    if stage.loss <= plain or not math.isfinite(plain):
        return stage
    returned = int((kept & (weights == 0)).sum())
    return Stage(weights * kept, kept, math.nan, 0.0, plain, math.nan, returned)


def run_stage(
    weights: Tensor,
    k: int,
    rows: Tensor,
    samples_per_row: int,
    loss: Loss,
    settings: StageSettings,
    alive: Tensor | None = None,
    mean_gradient: Tensor | None = None,
    sizes: Sequence[int] | None = None,
) -> Stage:
    """Prune once: choose the support, then the values on it.

    Args:
        weights: w_bar, shape (p,).
        k: number of weights kept.
        rows: gradient matrix (n, p) at w_bar; overwritten.
        samples_per_row: m >= 1.
        loss: weights -> mean loss over calibration samples that stay the same.
        settings: how to prune.
        alive: bool of shape (p,); weights that are False are gone and do not return.
        mean_gradient: gradient at w_bar, shape (p,), from a batch of its own; None takes the mean of the rows.
        sizes: entries of each tensor in the flat vector, in order; None takes it as one tensor.
    Raises:
        ValueError: `k` is out of range, rows are not finite, or every ridge is too small for the precision at hand.
    """
    weights = weights.float() if weights.dtype in (torch.float16, torch.bfloat16) else weights
    step = 1.0 / check_integer("samples_per_row", samples_per_row, 1)
    scale = gradient_scale(rows, settings.metric)
    if scale is not None:
        for row in rows:  # at once, rows in bfloat16 would be copied to float32 as a whole
            row.div_(scale)
        mean_gradient = None if mean_gradient is None else mean_gradient / scale
    unit = float(squared_row_norms(rows).mean()) or 1.0
    center = weights if scale is None else weights * scale
    used = step if settings.first_order else 0.0
    problem = Quadratic(rows, center, settings.ridges[0] * unit, used, mean_gradient if used else None, alive)
    check_count(problem, k)
    support = choose_support(problem, k, settings.algorithm)
    solver = _Solver(problem, support, settings, unit, scale, sizes)
    best = solver.best(loss, lambda: loss(weights), step)
    returned = int((support & (weights == 0)).sum())
    return Stage(best.weights, support, best.ridge, best.share, best.loss, best.expected, returned)


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


def choose_support(problem: Quadratic, k: int, algorithm: str) -> Tensor:
    """Return the k weights that an algorithm keeps; bool of shape (p,)."""
    if algorithm == "iht":
        return solve_iht(problem, k).support
    if algorithm in ("obs", "woodfisher"):
        return obs_support(problem, k)
    return stepped_support(problem, magnitude_support(problem, k), k)


@dataclass(frozen=True, eq=False)
class _Candidate:
    weights: Tensor
    ridge: float
    share: float
    loss: float
    expected: float


class _Solver:
    """Values on one support, for several ridges and shares of the first-order step, compared by calibration loss."""

    def __init__(
        self,
        problem: Quadratic,
        support: Tensor,
        settings: StageSettings,
        unit: float,
        scale: Tensor | None,
        sizes: Sequence[int] | None,
    ) -> None:
        self.problem, self.support, self.settings, self.unit, self.scale = problem, support, settings, unit, scale
        self.sizes = [problem.p] if sizes is None else list(sizes)
        self.joint = settings.algorithm not in ("block", "woodfisher")
        self.system = support_system(problem, support) if self.joint else None
        whole = not problem.first_order or settings.algorithm == "woodfisher"
        self.shares = (0.0,) if whole else settings.shares

    def best(self, loss: Loss, before: Callable[[], float], step: float) -> _Candidate:
        """The candidate with the lowest loss; ten times the largest ridge as well where it rose beyond the model."""
        ridges, own = self.settings.ridges, len(self.settings.ridges) == 1
        best = self.lowest(loss, ridges, step)
        for _ in range(0 if own else _LARGER):
            if best.ridge < ridges[-1] or not best.loss - before() > _BEYOND * max(best.expected, 0.0):
                break
            ridges = (10 * ridges[-1],)
            other = self.lowest(loss, ridges, step)
            best = other if other.loss < best.loss else best
        return best

    def lowest(self, loss: Loss, ridges: Sequence[float], step: float) -> _Candidate:
        """The candidate with the lowest loss over some ridges; a loss that is not finite is the highest."""
        best: _Candidate | None = None
        for one in self.candidates(ridges):
            value = loss(one.weights)
            if best is None or value < best.loss or not math.isfinite(best.loss):
                best = replace(one, loss=value)
        assert best is not None
        return replace(best, expected=self.expected_rise(best.weights, step))

    def candidates(self, ridges: Sequence[float]) -> Iterator[_Candidate]:
        """The solution is affine in the first-order term: two solves give every share."""
        whole = self.solve(self.problem, ridges)
        plain = self.problem.repair() if self.problem.first_order else None
        base = whole if plain is None or set(self.shares) == {1.0} else self.solve(plain, ridges)
        for ridge, full, repaired in zip(ridges, whole, base, strict=True):
            for share in self.shares:
                weights = full if full is repaired else torch.lerp(repaired, full, share)
                weights = weights if self.scale is None else weights / self.scale
                yield _Candidate(weights, ridge, share, math.nan, math.nan)

    def solve(self, problem: Quadratic, ridges: Sequence[float]) -> Sequence[Tensor]:
        """The values for each ridge, each of shape (p,)."""
        values = [ridge * self.unit for ridge in ridges]
        if self.system is not None:
            return list(solve_system(problem, self.system, values))
        damped = [problem.with_ridge(value) for value in values]
        if self.settings.algorithm == "woodfisher":
            return [single_updates(one, self.support) for one in damped]
        bounds = block_bounds(self.sizes, self.settings.block_size)
        return [solve_blocks(one, self.support, bounds) for one in damped]

    def expected_rise(self, weights: Tensor, step: float) -> float:
        """What the quadratic says the mean loss rises by: (1/n) 1^T A d + (m / 2n) |A d|^2."""
        move = (weights if self.scale is None else weights * self.scale) - self.problem.center
        image = self.problem.forward(move)
        own = self.problem.linear
        slope = image.mean() if own is None else (own.double() * move).sum() / (self.problem.n * self.problem.step)
        return float(slope + 0.5 * image.square().mean() / step)
