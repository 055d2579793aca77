"""Iterative hard thresholding for CHITA's quadratic: which weights stay.

Benbaki et al., ICML 2023, section 3: the support-aware step rule and the active set. One step is
w <- HT_k(w - tau grad f(w)), and f never rises. The image A (w - w_bar) follows each step by the columns that join or
leave the support, since on the others the move is tau times one known product.

Departure from the paper: gradient steps hardly change a support once the step fits the largest curvature of A. After
the exact solve on the support, `swap_rounds` therefore take the same step in the metric of the diagonal of the
Hessian, h_j = |a_j|^2 + 2 mu: with u = sqrt(h) w, HT_k(u - tau grad_u f) trades the insiders that cost least,
h_i w_i^2 / 2, for the outsiders that gain most, (grad_j f)^2 / (2 h_j), and is solved exactly again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_prune.methods._chita_exact import SupportSystem, solve_system, support_system
from lightning_prune.methods._chita_problem import Quadratic, gradient, keep_largest, move_objective

_ACTIVE = 1.5  # size of the active set in units of k
_GATHER = 8  # columns of the active set are copied when they are fewer than p / _GATHER
_GATHERED = 1 << 26  # and make no more numbers than these: A may be larger than memory
_DOUBLINGS = 6
_FROZEN = 2  # steps in a row that leave the support alone, after which the exact solve does better
_SHORTEST = 0.2  # step length in the diagonal metric below which no swap is tried


@dataclass(frozen=True, eq=False)
class Point:
    """A feasible point: d = w - w_bar and its support of shape (p,), the image A d of shape (n,), and f."""

    move: Tensor
    support: Tensor
    image: Tensor
    value: float


@dataclass(frozen=True, eq=False)
class Solved:
    """A support with its exact minimiser: its Gram matrix, the weights of shape (p,), and f."""

    system: SupportSystem
    weights: Tensor
    value: float


def hard_threshold_step(problem: Quadratic, weights: Tensor, tau: float, k: int) -> tuple[Tensor, Tensor]:
    """Take one step HT_k(w - tau grad f(w)) of fixed length.

    Args:
        problem: the quadratic.
        weights: w of shape (p,), dense or not.
        tau: step length > 0.
        k: number of weights kept.
    Returns:
        The new weights and their support (bool), each of shape (p,).
    """
    move = weights - problem.center
    moved = weights - tau * gradient(problem, move, problem.forward(move))
    support = keep_largest(moved.abs(), k, problem.alive)
    return moved * support, support


def start_point(problem: Quadratic, support: Tensor) -> Point:
    """Return the point that keeps w_bar on a support of shape (p,) and is 0 elsewhere."""
    move = -problem.center.masked_fill(support, 0.0)
    image = problem.forward(move)
    return Point(move, support, image, float(move_objective(problem, move, image)))


def threshold_support(problem: Quadratic, support: Tensor, steps: int, tolerance: float = 1e-7) -> tuple[Tensor, int]:
    """Run line-search steps of hard thresholding on the active set around a support.

    Args:
        problem: the quadratic.
        support: bool of shape (p,), the start, with at least one True entry.
        steps: most steps taken, >= 0.
        tolerance: relative fall of f below which the steps end.
    Returns:
        The support reached, bool of shape (p,), and the number of steps accepted.
    """
    k = int(support.sum())
    moved = problem.center if not problem.first_order else _first_step(problem, support)
    size = min(int(_ACTIVE * k), problem.p if problem.alive is None else int(problem.alive.sum()))
    active = keep_largest(moved.abs(), max(size, k), problem.alive) | support
    panel, offset, index = _restrict(problem, active)
    point = start_point(panel, support if index is None else support[index])
    if offset is not None:
        image = point.image + offset
        point = replace(point, image=image, value=float(move_objective(panel, point.move, image)))
    point, done = descend(panel, point, k, steps, tolerance)
    if index is None:
        return point.support, done
    return torch.zeros_like(support).index_put_((index,), point.support), done


def descend(problem: Quadratic, point: Point, k: int, steps: int, tolerance: float) -> tuple[Point, int]:
    """Take line-search steps until f stalls or the support stays as it is; return the last point and their number."""
    frozen = 0
    for done in range(steps):
        after = line_search_step(problem, point, k)
        if after is None:
            return point, done
        frozen = frozen + 1 if after.support is point.support else 0
        gain, point = point.value - after.value, after
        if frozen == _FROZEN or gain <= tolerance * abs(point.value):
            return point, done + 1
    return point, steps


def line_search_step(problem: Quadratic, point: Point, k: int) -> Point | None:
    """Take the support-aware step; None if none lowers f.

    With the support frozen, f falls most at tau* = |G_S|^2 / (|A_S G_S|^2 + 2 mu |G_S|^2). If an outsider would
    overtake an insider before (at tau_c), step lengths from tau_c on are doubled as long as f falls.
    """
    slope = gradient(problem, point.move, point.image)
    inner = slope * point.support
    image = problem.forward(inner)
    power = inner.double().square().sum()
    best = power / (image.square().sum() + problem.damping * power)
    steep, exact, change = torch.stack([power, best, _first_change(problem, point, slope)]).tolist()
    if not steep > 0:
        return None
    if exact < change:
        move = point.move - exact * inner
        return Point(move, point.support, point.image - exact * image, point.value - 0.5 * exact * steep)
    tau, found = change / (1 + 1e-4), point
    for _ in range(_DOUBLINGS):
        trial = _trial(problem, point, k, tau, slope, image)
        if not trial.value < found.value:
            break
        found, tau = trial, 2 * tau
    return None if found is point else found


def swap_rounds(problem: Quadratic, start: Solved, k: int, rounds: int, tolerance: float = 1e-3) -> tuple[Solved, int]:
    """Trade weak insiders for strong outsiders while the exact optimum on the support falls.

    Args:
        problem: the quadratic.
        start: a solved support.
        k: number of weights kept.
        rounds: most exact solves spent, >= 0.
        tolerance: fall of f, relative to its size, below which the rounds end.
    Returns:
        The best support found, solved, and the number of rounds accepted.
    """
    metric = diagonal(problem).sqrt()
    best, tau, accepted = start, 1.0, 0
    for _ in range(rounds):
        move = best.weights - problem.center
        slope = gradient(problem, move, problem.forward(move))
        support = keep_largest((metric * best.weights - tau * slope / metric).abs(), k, problem.alive)
        if torch.equal(support, best.system.support):
            break
        trial = solve(problem, support, best.system)
        if trial.value < best.value:
            gain, best, accepted = best.value - trial.value, trial, accepted + 1
            if gain <= tolerance * abs(best.value):
                break
        elif (tau := tau / 2) < _SHORTEST:
            break
    return best, accepted


def solve(problem: Quadratic, support: Tensor, near: SupportSystem | None = None) -> Solved:
    """Solve exactly on a support; `near` is the system of a similar one, whose Gram matrix is then updated."""
    system = support_system(problem, support, near)
    weights = solve_system(problem, system)[0]
    move = weights - problem.center
    return Solved(system, weights, float(move_objective(problem, move, problem.forward(move))))


def diagonal(problem: Quadratic) -> Tensor:
    """Return the diagonal of the Hessian, |a_j|^2 + 2 mu, of shape (p,)."""
    total = problem.center.new_full((problem.p,), problem.damping)
    for rows in problem.rows.split(max(1, problem.width * problem.n // problem.p)):
        total += rows.to(problem.dtype).square().sum(0)
    return total


def _first_step(problem: Quadratic, support: Tensor) -> Tensor:
    """w_bar after the steepest-descent step that is best for the support."""
    still = torch.zeros_like(problem.center)
    slope = gradient(problem, still, torch.zeros(problem.n, dtype=torch.float64, device=still.device))
    return problem.center - frozen_step(problem, slope, support) * slope


def frozen_step(problem: Quadratic, slope: Tensor, support: Tensor) -> Tensor:
    """tau* = |G_S|^2 / (|A_S G_S|^2 + 2 mu |G_S|^2) as a scalar tensor in the working type."""
    inner = slope * support
    power = inner.double().square().sum()
    curvature = problem.forward(inner).square().sum() + problem.damping * power
    return torch.where(power > 0, power / curvature, 0.0).to(problem.dtype)


def _restrict(problem: Quadratic, active: Tensor) -> tuple[Quadratic, Tensor | None, Tensor | None]:
    """The problem on the active columns, the image of the others at 0, and the positions of the columns.

    Few columns are copied; many stay where they are and are told apart by `alive` (offset and positions: None).
    """
    index = active.nonzero().flatten()
    if _GATHER * index.numel() > problem.p or index.numel() * problem.n > _GATHERED:
        return problem.among(active), None, None
    panel = replace(
        problem,
        rows=problem.rows.index_select(1, index),
        center=problem.center[index],
        gradient=None if problem.gradient is None else problem.gradient[index],
        alive=None,
        gram=None,
    )
    return panel, -problem.forward(problem.center.masked_fill(active, 0.0)), index


def _first_change(problem: Quadratic, point: Point, slope: Tensor) -> Tensor:
    """tau_c: the step length at which the best outsider overtakes the first insider; inf if none ever does."""
    outside = ~point.support if problem.alive is None else problem.alive & ~point.support
    weights, steep = problem.center + point.move, slope.abs()
    rival = steep.masked_fill(~outside, 0.0).max()
    closing = torch.where(weights.sign() == slope.sign(), rival + steep, rival - steep)
    times = torch.where(point.support & (closing > 0), weights.abs() / closing, torch.inf)
    return torch.where(outside.any(), times.min(), torch.inf).double()


def _trial(problem: Quadratic, point: Point, k: int, tau: float, slope: Tensor, image: Tensor) -> Point:
    """The thresholded point at step length tau; `image` is A times the slope on the support."""
    moved = problem.center + point.move - tau * slope
    support = keep_largest(moved.abs(), k, problem.alive)
    move = moved * support - problem.center
    after = point.image - tau * image
    changed = (support != point.support).nonzero().flatten()
    if changed.numel():
        frozen = point.move - tau * slope * point.support
        for index in changed.split(problem.width):
            columns = problem.rows.index_select(1, index).to(problem.dtype)
            after = after + (columns @ (move - frozen)[index]).double()
    return Point(move, support, after, float(move_objective(problem, move, after)))
