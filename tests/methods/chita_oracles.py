"""Random pruning problems and dense float64 answers to them, shared by the tests of CHITA's solvers."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.methods._chita_problem import Quadratic
from lightning_prune.methods._chita_solver import solve_block, solve_bso, solve_iht

SOLVERS = {
    "iht": solve_iht,
    "bso": solve_bso,
    "block": lambda problem, k: solve_block(problem, k, [problem.p // 2, problem.p - problem.p // 2], 4),
}


def draw(seed: int, n: int = 8, p: int = 12, ridge: float = 0.0125, step: float = 0.0, own: bool = False) -> Quadratic:
    """A random problem in float64; the default ridge is mu = 0.05 at n = 8."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, p, generator=generator, dtype=torch.float64)
    center = torch.randn(p, generator=generator, dtype=torch.float64)
    gradient = torch.randn(p, generator=generator, dtype=torch.float64) if own else None
    return Quadratic(rows, center, ridge, step, gradient)


def mixed(count: int, **shape: int) -> list[Quadratic]:
    """Random problems without a first-order term, with the row mean, and with a gradient of its own in turn."""
    return [draw(seed, step=(seed % 3 > 0) * 0.3, own=seed % 3 == 2, **shape) for seed in range(count)]


def hessian(problem: Quadratic) -> Tensor:
    rows = problem.rows.double()
    return rows.T @ rows + problem.n * problem.ridge * torch.eye(problem.p, dtype=torch.float64)


def slope(problem: Quadratic) -> Tensor:
    mean = problem.rows.double().mean(0) if problem.gradient is None else problem.gradient.double()
    return problem.n * problem.step * mean


def naive_value(problem: Quadratic, weights: Tensor) -> float:
    move = weights.double() - problem.center.double()
    return float(0.5 * move @ hessian(problem) @ move + slope(problem) @ move)


def naive_solve(problem: Quadratic, support: Tensor) -> Tensor:
    """Dense normal equations for w on the support, everything else 0."""
    matrix, center = hessian(problem), problem.center.double()
    right = (matrix @ center - slope(problem))[support]
    weights = torch.zeros_like(center)
    weights[support] = torch.linalg.solve(matrix[support][:, support], right)
    return weights


def mask_of(p: int, kept: tuple[int, ...]) -> Tensor:
    return torch.zeros(p, dtype=torch.bool).index_fill_(0, torch.tensor(kept, dtype=torch.long), True)


def random_mask(p: int, k: int, seed: int) -> Tensor:
    return mask_of(p, tuple(torch.randperm(p, generator=torch.Generator().manual_seed(seed))[:k].tolist()))
