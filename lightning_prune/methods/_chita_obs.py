"""Optimal brain surgeon on the gradient matrix: scores of single weights, and the update that WoodFisher and M-FAC make.

With H = A^T A + 2 mu I and its inverse never formed (L L^T = A A^T + 2 mu I, a_q the columns of A):

    [H^-1]_qq = (1 - |L^-1 a_q|^2) / (2 mu),    score_q = w_q^2 / (2 [H^-1]_qq)

Singh and Alistarh, "WoodFisher", NeurIPS 2020, equations 3 and 4; Frantar, Kurtic and Alistarh, "M-FAC", NeurIPS 2021,
prune the same way over several stages of a geometric schedule. The first-order term has no part in either.

Departure from WoodFisher: the Fisher matrix is whole, not made of blocks along the diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.methods._chita_exact import ADVICE, gram_matrix
from lightning_prune.methods._chita_problem import Quadratic, keep_largest


def inverse_diagonal(problem: Quadratic) -> Tensor:
    """Return the diagonal of H^-1 in float64, shape (p,).

    Raises:
        ValueError: the ridge is too small for the precision at hand.
    """
    gram = (problem.gram if problem.gram is not None else gram_matrix(problem)).clone()
    gram.diagonal().add_(problem.damping)
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info):
        raise ValueError(f"the Gram matrix of the gradients plus the ridge is not positive. {ADVICE}")
    parts = [
        torch.linalg.solve_triangular(factor, part.double(), upper=False).square_().sum(0)
        for _, part in problem.column_chunks()
    ]
    # what rounding takes off a weight that the rows determine almost wholly must not make it negative
    floor = torch.finfo(problem.dtype).eps
    return (1 - torch.cat(parts)).clamp_min_(floor) / problem.damping


def obs_support(problem: Quadratic, k: int) -> Tensor:
    """Return the k weights with the largest scores among those alive; bool of shape (p,)."""
    scores = problem.center.double().square() / (2 * inverse_diagonal(problem))
    return keep_largest(scores, k, problem.alive)


def single_updates(problem: Quadratic, support: Tensor) -> Tensor:
    """Return w_bar minus the sum of the updates that each pruned weight would ask for alone, shape (p,).

    w = w_bar - sum_{q pruned} w_q / [H^-1]_qq H^-1 e_q, then 0 outside the support. Pruned weights do not see each
    other, which is where this differs from the exact solve.

    Args:
        problem: the quadratic.
        support: bool of shape (p,), True = kept.
    """
    pull = (problem.center / inverse_diagonal(problem).to(problem.dtype)).masked_fill(support, 0.0)
    gram = (problem.gram if problem.gram is not None else gram_matrix(problem)).clone()
    gram.diagonal().add_(problem.damping)
    image = torch.cholesky_solve(problem.forward(pull)[:, None], torch.linalg.cholesky(gram))[:, 0]
    moved = (pull - problem.adjoint(image)) / problem.damping
    return (problem.center - moved).masked_fill(~support, 0.0)
