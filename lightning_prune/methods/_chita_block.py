"""Block-wise least squares for CHITA: the Hessian of each block alone, one global step.

Benbaki et al., ICML 2023, section 3.3 and the appendix on large networks. The support is chosen over the whole
network; the kept weights of a block B then move along (A_B^T A_B + 2 mu I)^{-1} applied to the gradient of f, which
is exact where the columns of different blocks are orthogonal.

Departures from the paper: blocks of similar size are solved together as one batch. The blocks see the gradient of the
whole f, and the lengths of the two moves, the repair of what pruning broke and the first-order step, minimise f
exactly in the plane they span. Blocks that each aim at the whole decrease can therefore not add up to too long a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lightning_prune.methods._chita_exact import ADVICE
from lightning_prune.methods._chita_problem import Quadratic


def block_bounds(sizes: Sequence[int], block_size: int) -> list[tuple[int, int]]:
    """Cut the flat vector into blocks that never cross a tensor.

    A tensor of s entries gives max(1, s // block_size) blocks of equal size; the last one takes the remainder.

    Args:
        sizes: entries of each tensor, in order, each >= 1.
        block_size: entries wished for in a block, >= 1.
    Returns:
        (begin, end) of every block, in order, covering all entries once.
    Raises:
        ValueError: `block_size` or a size is below 1.
    """
    if block_size < 1:
        raise ValueError(f"`block_size` must be >= 1 weight, got {block_size}. A few hundred is usual.")
    if any(size < 1 for size in sizes):
        raise ValueError(f"`sizes` must be >= 1 each, got {list(sizes)}. Leave out empty tensors.")
    bounds: list[tuple[int, int]] = []
    begin = 0
    for size in sizes:
        count = max(1, size // block_size)
        cuts = [begin + i * (size // count) for i in range(count)] + [begin + size]
        bounds += pairwise(cuts)
        begin += size
    return bounds


def solve_blocks(problem: Quadratic, support: Tensor, bounds: Sequence[tuple[int, int]]) -> Tensor:
    """Refit the kept weights block by block.

    Args:
        problem: the quadratic.
        support: bool mask of shape (p,), True = kept.
        bounds: (begin, end) of the blocks, from `block_bounds`.
    Returns:
        Weights of shape (p,), 0 outside the support.
    Raises:
        ValueError: the ridge is too small for the precision at hand.
    """
    start = -problem.center.masked_fill(support, 0.0)
    rights = [problem.adjoint(-problem.forward(start))]
    if problem.first_order:
        linear = problem.linear
        rights.append(-(problem.adjoint(_ones(problem) * problem.shift) if linear is None else linear))
    moves = _solve_batches(problem, support, bounds, torch.stack(rights, 1) * support[:, None])
    length = _plane_minimum(problem, start, moves)
    weights = torch.where(support, problem.center + moves @ length, 0.0)
    if not torch.isfinite(weights).all():
        raise ValueError(f"the weights solved block by block are not finite. {ADVICE}")
    return weights


def _ones(problem: Quadratic) -> Tensor:
    return torch.ones(problem.n, dtype=torch.float64, device=problem.rows.device)


def _plane_minimum(problem: Quadratic, start: Tensor, moves: Tensor) -> Tensor:
    """The lengths t that minimise f(w_bar + start + moves t), in the working type, shape (number of moves,)."""
    image = problem.forward(moves)
    wide = moves.double()
    curvature = image.T @ image + problem.damping * (wide.T @ wide)
    slope = image.T @ (problem.forward(start) + problem.shift) + problem.damping * (wide.T @ start.double())
    if problem.linear is not None:
        slope = slope + wide.T @ problem.linear.double()
    return -(torch.linalg.pinv(curvature, hermitian=True) @ slope).to(problem.dtype)


def _solve_batches(problem: Quadratic, support: Tensor, bounds: Sequence[tuple[int, int]], right: Tensor) -> Tensor:
    """(A_B^T A_B + 2 mu I)^{-1} right_B for the kept entries of every block, 0 elsewhere; shape (p, r)."""
    solved = torch.zeros_like(right)
    for index, valid in _batches(problem, support, bounds):
        shape = index.shape
        panel = problem.rows.index_select(1, index.flatten()).to(problem.dtype).view(problem.n, *shape)
        target = (right[index.flatten()].view(*shape, -1) * valid[..., None]).double()
        answer = (_primal if shape[1] <= problem.n else _dual)(panel.movedim(0, 1), valid, target, problem.damping)
        solved[index[valid]] = answer[valid].to(problem.dtype)
    return solved


def _primal(panel: Tensor, valid: Tensor, target: Tensor, damping: float) -> Tensor:
    """(X^T X + damping I)^{-1} target for X of shape (b, n, k), k <= n, without its padding; target (b, k, r)."""
    gram = (panel.mT @ panel).double()
    gram *= valid[:, :, None] & valid[:, None, :]
    gram.diagonal(dim1=1, dim2=2).add_(damping)
    return torch.cholesky_solve(target, _factor(gram))


def _dual(panel: Tensor, valid: Tensor, target: Tensor, damping: float) -> Tensor:
    """The same for k > n: (target - X^T (X X^T + damping I)^{-1} X target) / damping."""
    panel = panel * valid[:, None]
    gram = (panel @ panel.mT).double()
    gram.diagonal(dim1=1, dim2=2).add_(damping)
    inner = torch.cholesky_solve((panel @ target.to(panel.dtype)).double(), _factor(gram))
    return (target - (panel.mT @ inner.to(panel.dtype)).double()) / damping


def _factor(gram: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(gram)
    if bool(info.any()):
        raise ValueError(f"the Gram matrix of a block plus the ridge is not positive. {ADVICE}")
    return factor


def _batches(problem: Quadratic, support: Tensor, bounds: Sequence[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (kept positions padded with position 0, which of them are real), each of shape (blocks, most kept).

    Blocks are taken by falling number of kept entries, as many at a time as fill one chunk of columns.
    """
    device = support.device
    starts = torch.tensor([begin for begin, _ in bounds], device=device)
    kept = support.nonzero().flatten()
    owner = torch.searchsorted(starts, kept, right=True) - 1
    counts = torch.bincount(owner, minlength=len(bounds))
    first = counts.cumsum(0) - counts
    order = counts.argsort(descending=True, stable=True)
    sizes = counts[order].tolist()
    position = 0
    while position < len(sizes) and sizes[position]:
        most = sizes[position]
        blocks = order[position : position + max(1, problem.width // most)]
        slots = torch.arange(most, device=device)
        valid = slots < counts[blocks, None]
        yield kept[torch.where(valid, first[blocks, None] + slots, 0)], valid
        position += blocks.numel()
