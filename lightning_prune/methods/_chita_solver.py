"""Solvers of CHITA's l0-constrained quadratic, from a problem and a count to weights, support and certificate.

Benbaki, Chen, Meng, Hazimeh, Ponomareva, Zhao, Mazumder, "Fast as CHITA: Neural Network Pruning with Combinatorial
Optimization", ICML 2023: hard thresholding with an active set (`solve_iht`), the fast heuristic with one exact solve
(`solve_bso`), and its block-wise form for large networks (`solve_block`).

Departures from the paper: every solver ends with an exact solve on its support; hard thresholding goes on with swaps
in the metric of the diagonal, and its result is never worse than magnitude pruning followed by the exact solve; the
step of `solve_bso` is accepted where it leaves the support alone (the smallest kept weight against the largest other),
and falls back to the magnitude support where no step lowers f.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_prune.checks import check_integer
from lightning_prune.methods._chita_block import block_bounds, solve_blocks
from lightning_prune.methods._chita_exact import gram_matrix
from lightning_prune.methods._chita_iht import (
    Solved,
    frozen_step,
    solve,
    start_point,
    swap_rounds,
    threshold_support,
)
from lightning_prune.methods._chita_problem import (
    Quadratic,
    check_count,
    gradient,
    keep_largest,
    magnitude_support,
    objective,
)

_STRETCH = 4.0  # the step that may change the support is first cut, then stretched by this factor
_CUTS, _STRETCHES = 10, 5


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver returns.

    Attributes:
        weights: shape (p,), 0 outside the support.
        support: bool of shape (p,), exactly k True entries; a kept weight may be 0.
        objective: f at `weights`, in units where f(w_bar) = 0.
        magnitude_objective: f at magnitude pruning with nothing repaired, for comparison.
        steps: accepted changes of the support (gradient steps and swap rounds).
        movement: |w - w_bar|.
    """

    weights: Tensor
    support: Tensor
    objective: float
    magnitude_objective: float
    steps: int
    movement: float


def with_gram(problem: Quadratic) -> Quadratic:
    """Return the problem with its Gram matrix, which serves every k and ridge of the same rows."""
    return replace(problem, gram=gram_matrix(problem))


def solve_iht(problem: Quadratic, k: int, steps: int = 10, rounds: int = 4) -> Solution:
    """Minimise f over |w|_0 <= k by hard thresholding, swaps and exact solves.

    Args:
        problem: the quadratic.
        k: number of weights kept, 0 <= k <= number alive.
        steps: most gradient steps on the active set, >= 0.
        rounds: most swap rounds, >= 0; each costs one exact solve on a support that differs little.
    Returns:
        The best solution met, never worse than magnitude pruning followed by the exact solve.
    Raises:
        ValueError: `k`, `steps` or `rounds` is out of range, or the ridge is too small for the precision at hand.
    """
    check_count(problem, k)
    check_integer("steps", steps, 0)
    check_integer("rounds", rounds, 0)
    first = magnitude_support(problem, k)
    best, done = solve(problem, first), 0
    if 0 < k < problem.p and steps:
        support, done = threshold_support(problem, first, steps)
        if not torch.equal(support, first):
            other = solve(problem, support, best.system)
            best = other if other.value < best.value else best
    if 0 < k < problem.p:
        best, swaps = swap_rounds(problem, best, k, rounds)
        done += swaps
    return _solution(problem, best, first, done)


def solve_bso(problem: Quadratic, k: int) -> Solution:
    """Choose the support by magnitude, or after one gradient step where there is one, and solve exactly on it.

    Args:
        problem: the quadratic.
        k: number of weights kept, 0 <= k <= number alive.
    Raises:
        ValueError: `k` is out of range, or the ridge is too small for the precision at hand.
    """
    check_count(problem, k)
    first = magnitude_support(problem, k)
    support = stepped_support(problem, first, k)
    return _solution(problem, solve(problem, support), first, int(support is not first))


def solve_block(problem: Quadratic, k: int, sizes: Sequence[int], block_size: int = 500) -> Solution:
    """Choose the support as `solve_bso` does over all tensors, and refit it block by block.

    Args:
        problem: the quadratic.
        k: number of weights kept, 0 <= k <= number alive.
        sizes: entries of each tensor in the flat vector, in order; they add up to p.
        block_size: entries wished for in a block, >= 1.
    Raises:
        ValueError: an argument is out of range, or the ridge is too small for the precision at hand.
    """
    check_count(problem, k)
    if sum(sizes) != problem.p:
        raise ValueError(f"`sizes` must add up to the {problem.p} weights of `rows`, got {sum(sizes)}.")
    bounds = block_bounds(sizes, block_size)
    first = magnitude_support(problem, k)
    support = stepped_support(problem, first, k)
    weights = solve_blocks(problem, support, bounds)
    return _describe(problem, weights, support, objective(problem, weights), first, int(support is not first))


def stepped_support(problem: Quadratic, support: Tensor, k: int) -> Tensor:
    """Return the support after one support-aware gradient step from w_bar; the given one where none is better.

    Args:
        problem: the quadratic.
        support: the magnitude support, bool of shape (p,).
        k: number of weights kept.
    """
    if not problem.first_order or not 0 < k < problem.p:
        return support
    still = torch.zeros_like(problem.center)
    slope = gradient(problem, still, torch.zeros(problem.n, dtype=torch.float64, device=still.device))
    tau = float(frozen_step(problem, slope, support))
    best, value = support, start_point(problem, support).value
    others = ~support if problem.alive is None else problem.alive & ~support
    for _ in range(_CUTS):
        moved = (problem.center - tau * slope).abs_()
        if bool(moved.masked_fill(~support, torch.inf).min() > moved.masked_fill(~others, -torch.inf).max()):
            break  # the support stays
        tau /= _STRETCH
    for _ in range(_STRETCHES):
        trial, weights = _moved_support(problem, slope, tau, k)
        after = objective(problem, weights)
        if not after < value:
            break
        best, value, tau = (support if torch.equal(trial, support) else trial), after, _STRETCH * tau
    return best


def _moved_support(problem: Quadratic, slope: Tensor, tau: float, k: int) -> tuple[Tensor, Tensor]:
    """HT_k(w_bar - tau slope): its support and its weights."""
    moved = problem.center - tau * slope
    support = keep_largest(moved.abs(), k, problem.alive)
    return support, moved * support


def _solution(problem: Quadratic, solved: Solved, first: Tensor, steps: int) -> Solution:
    return _describe(problem, solved.weights, solved.system.support, solved.value, first, steps)


def _describe(
    problem: Quadratic, weights: Tensor, support: Tensor, value: float, first: Tensor, steps: int
) -> Solution:
    baseline = start_point(problem, first).value
    return Solution(weights, support, value, baseline, steps, float((weights - problem.center).norm()))
