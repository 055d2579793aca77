"""The exact minimiser of CHITA's quadratic on a fixed support, in the dual form that does not cancel.

With S the support, rho = A_{S^c} w_bar_{S^c} the damage done by pruning, and the first-order term split as
q = A^T c + y, the minimiser is d_S = w_S - w_bar_S with

    dual (|S| >= n):   (A_S A_S^T + 2 mu I) z = rho - c + A_S y_S / (2 mu),     d_S = A_S^T z - y_S / (2 mu)
    primal (|S| < n):  (A_S^T A_S + 2 mu I) d_S = A_S^T rho - q_S

Any split gives the same d in exact arithmetic. Rows alone have c = alpha 1 and y = 0: no large terms meet. An
explicit gradient q has c = (A_S A_S^T + 2 mu I)^{-1} A_S q_S, after which A_S y_S = 2 mu c up to rounding, and the
second solve removes what that rounding put into the row space, where plain Woodbury would magnify it by 1 / (2 mu).
What remains is the rounding of q itself outside the row space, eps |q| / (2 mu), as large as that of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_prune.methods._chita_problem import Quadratic

_ROW_BLOCK = 128  # a Gram matrix is built below its diagonal only, in stripes of this many rows
ADVICE = "Choose a larger `ridge`."


@dataclass(frozen=True, eq=False)
class SupportSystem:
    """Hold a support and its Gram matrix, which serve every ridge.

    Attributes:
        support: bool mask of shape (p,), True = kept.
        index: the kept positions in ascending order, shape (k,).
        dual: True if `gram` is A_S A_S^T of shape (n, n), False if it is A_S^T A_S of shape (k, k).
        gram: symmetric float64 matrix of which only the lower triangle is read.
    """

    support: Tensor
    index: Tensor
    dual: bool
    gram: Tensor

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of the Gram matrix."""
        values, vectors = torch.linalg.eigh(self.gram)
        return values, vectors


def gram_matrix(problem: Quadratic, columns: Tensor | None = None) -> Tensor:
    """Return A_C A_C^T for a set of columns, summed in float64 over column chunks.

    Args:
        problem: the quadratic with A of shape (n, p).
        columns: positions C, any order; None takes all columns.
    Returns:
        Symmetric float64 matrix of shape (n, n).
    """
    total = torch.zeros(problem.n, problem.n, dtype=torch.float64, device=problem.rows.device)
    _add_gram(total, problem, columns)
    return total.tril_().add_(total.tril(-1).T)


def support_system(problem: Quadratic, support: Tensor, near: SupportSystem | None = None) -> SupportSystem:
    """Build the system of a support by the cheapest way: from it, from its complement, or from a near support.

    Args:
        problem: the quadratic; its `gram`, if present, allows the way through the complement.
        support: bool mask of shape (p,).
        near: system of another support of the same problem, whose Gram matrix is updated by the columns that differ.
    Returns:
        The system: k x k where the support has fewer columns than A has rows, else n x n.
    """
    index = support.nonzero().flatten()
    if index.numel() < problem.n:
        return SupportSystem(support, index, False, _primal_gram(problem, index))
    empty = index[:0]
    ways: list[tuple[Tensor | None, Tensor, Tensor]] = [(None, empty, index)]
    if problem.gram is not None:
        ways.append((problem.gram, (~support).nonzero().flatten(), empty))
    if near is not None and near.dual:
        leave, enter = near.support & ~support, support & ~near.support
        ways.append((near.gram, leave.nonzero().flatten(), enter.nonzero().flatten()))
    base, minus, plus = min(ways, key=lambda way: way[1].numel() + way[2].numel())
    if base is None:
        gram = torch.zeros(problem.n, problem.n, dtype=torch.float64, device=problem.rows.device)
    else:
        gram = base.to(torch.float64, copy=True)
    _add_gram(gram, problem, minus, sign=-1.0)
    _add_gram(gram, problem, plus)
    return SupportSystem(support, index, True, gram)


def solve_support(problem: Quadratic, support: Tensor) -> Tensor:
    """Return the minimiser of f over the weights that vanish outside a support, shape (p,).

    Args:
        problem: the quadratic.
        support: bool mask of shape (p,), True = kept.
    Raises:
        ValueError: the ridge is too small for the precision at hand.
    """
    return solve_system(problem, support_system(problem, support))[0]


def solve_system(problem: Quadratic, system: SupportSystem, ridges: Sequence[float] | None = None) -> Tensor:
    """Solve on one support for one ridge or for many at the price of one.

    Args:
        problem: the quadratic.
        system: its support with the Gram matrix.
        ridges: ridges > 0 to solve for; None takes the problem's own. More than one share an eigendecomposition.
    Returns:
        Weights of shape (number of ridges, p) in the working type, 0 outside the support.
    Raises:
        ValueError: the damped Gram matrix is not positive, or the result is not finite.
    """
    damping = [problem.n * ridge for ridge in (ridges if ridges is not None else (problem.ridge,))]
    if not system.index.numel():
        return problem.center.new_zeros(len(damping), problem.p)
    scale = torch.tensor(damping, dtype=torch.float64, device=problem.rows.device)
    invert = inverse(system, scale)
    rho = problem.forward(problem.center.masked_fill(system.support, 0.0))[:, None]
    move = (_dual if system.dual else _primal)(problem, system, rho, scale, invert)
    weights = move.T.contiguous()  # in place from here on: for many weights these are the largest vectors
    weights.add_(problem.center).masked_fill_(~system.support, 0.0)
    if not all(bool(torch.isfinite(one).all()) for one in weights):
        raise ValueError(f"the weights solved with ridge {min(damping) / problem.n:.3g} are not finite. {ADVICE}")
    return weights


def _dual(problem: Quadratic, system: SupportSystem, rho: Tensor, damping: Tensor, invert: _Inverse) -> Tensor:
    """d of shape (p, r) by the n x n form; entries outside the support are arbitrary."""
    target = rho - problem.shift
    if problem.linear is None:
        return problem.adjoint(invert(target.expand(-1, damping.numel())))
    kept = system.support[:, None]
    linear = problem.linear[:, None] * kept
    rows_part = invert(problem.forward(linear).expand(-1, damping.numel()))
    rest = (linear - problem.adjoint(rows_part)) * kept
    image = invert(target - rows_part + problem.forward(rest) / damping)
    return problem.adjoint(image) - rest / damping.to(problem.dtype)


def _primal(problem: Quadratic, system: SupportSystem, rho: Tensor, damping: Tensor, invert: _Inverse) -> Tensor:
    """d of shape (p, r) by the k x k form; entries outside the support are 0."""
    target = rho.new_zeros(system.index.numel(), 1)
    for begin, panel in _row_panels(problem, system.index):
        target += panel.double().T @ (rho - problem.shift)[begin : begin + panel.shape[0]]
    if problem.linear is not None:
        target -= problem.linear[system.index, None]
    solved = invert(target.expand(-1, damping.numel()))
    move = problem.center.new_zeros(damping.numel(), problem.p).T
    move[system.index] = solved.to(problem.dtype)
    return move


_Inverse = Callable[[Tensor], Tensor]


def inverse(system: SupportSystem, damping: Tensor) -> _Inverse:
    """Return B -> (G + damping_j I)^{-1} b_j for every column j: one Cholesky factor, or one eigendecomposition."""
    if damping.numel() == 1:
        damped = system.gram.clone()
        damped.diagonal().add_(damping)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info):
            raise ValueError(f"the Gram matrix of the gradients plus the ridge is not positive. {ADVICE}")
        return lambda right: torch.cholesky_solve(right, factor)
    values, vectors = system.spectrum
    spectrum = values[:, None] + damping
    if not bool((spectrum > 0).all()):
        raise ValueError(f"the Gram matrix of the gradients plus the ridge is not positive. {ADVICE}")
    return lambda right: vectors @ ((vectors.T @ right) / spectrum)


def _add_gram(total: Tensor, problem: Quadratic, columns: Tensor | None, sign: float = 1.0) -> None:
    """Add sign * A_C A_C^T to the lower triangle of `total` (what it leaves above the diagonal has no meaning)."""
    part = torch.zeros(total.shape, dtype=problem.dtype, device=total.device)
    for panel in _panels(problem, columns):
        for begin in range(0, problem.n, _ROW_BLOCK):
            end = min(begin + _ROW_BLOCK, problem.n)
            torch.mm(panel[begin:end], panel[:end].T, out=part[begin:end, :end])
        total.add_(part, alpha=sign)


def _panels(problem: Quadratic, columns: Tensor | None) -> Iterator[Tensor]:
    """Yield the columns a chunk at a time in the working type, gathered into one buffer that is used again."""
    if columns is None:
        yield from (part for _, part in problem.column_chunks())
        return
    if not columns.numel():
        return
    buffer = problem.rows.new_empty(problem.n * min(problem.width, columns.numel()))
    for index in columns.split(problem.width):
        target = buffer[: problem.n * index.numel()].view(problem.n, -1)
        yield torch.index_select(problem.rows, 1, index, out=target).to(problem.dtype)


def _primal_gram(problem: Quadratic, index: Tensor) -> Tensor:
    """A_S^T A_S of shape (k, k) in float64, summed over chunks of rows."""
    total = torch.zeros(index.numel(), index.numel(), dtype=torch.float64, device=problem.rows.device)
    for _, panel in _row_panels(problem, index):
        total += panel.T @ panel
    return total


def _row_panels(problem: Quadratic, index: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, A_S for a chunk of rows in the working type); meant for |S| < n."""
    height = max(1, problem.width * problem.n // max(1, index.numel()))
    for begin in range(0, problem.n, height):
        yield begin, problem.rows[begin : begin + height].index_select(1, index).to(problem.dtype)
