"""The l0-constrained quadratic behind CHITA: its data, its objective, and products with the gradient matrix.

Benbaki, Chen, Meng, Hazimeh, Ponomareva, Zhao, Mazumder, "Fast as CHITA: Neural Network Pruning with Combinatorial
Optimization", ICML 2023, section 3. With A of shape (n, p), d = w - w_bar and mu = n * ridge / 2,

    f(w) = 1/2 |A d|^2 + mu |d|^2 + q.d,    q = alpha A^T 1   or   q = n alpha g.

Departures from the paper: the first-order term may come from an explicit mean gradient g (a large batch of its own)
instead of the row mean A^T 1 / n; columns that are zero stay in the problem, the ridge decides about them.

Numerics: vectors of length p live in float32 (float64 if A does), vectors of length n and n x n matrices in float64.
No array of n x p beyond A itself is ever made: A is read in column chunks, or whole by a matrix-vector product.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_prune.checks import check_positive

_FLOATS = (torch.float64, torch.float32, torch.bfloat16)
_CPU_CHUNK = 1 << 20  # numbers in a working copy of columns: 4 MiB in float32, which stays in the outer cache
_GPU_CHUNK = 1 << 24
_NARROW = 32  # below this width, copies cost less than the loop over them
_POWER_STEPS = 64


@dataclass(frozen=True, eq=False)
class Quadratic:
    """Hold one pruning problem: the local model of the loss around `center`.

    Args:
        rows: gradient matrix A of shape (n, p), n >= 1; each row is the gradient of a batch-mean loss; float32,
            float64 or bfloat16 (storage only; arithmetic is float32), on any device.
        center: current weights w_bar of shape (p,).
        ridge: lambda > 0 per row; the solver sees mu = n * ridge / 2.
        step: alpha >= 0, weight of the first-order term; 0 leaves it out, 1 / (samples per row) balances it with A.
        gradient: mean gradient of shape (p,) to use instead of the mean of the rows; None uses the rows.
        alive: bool of shape (p,); False marks weights that are gone and may not return. None: all may stay.
        gram: A A^T of shape (n, n) in float64 if it is known already (see `gram_matrix`).
        chunk: columns of A copied at a time, >= 1; None chooses a few MiB.
    Raises:
        ValueError: shapes that do not fit, a value out of range, or a row that is not finite (its index is named).
    """

    rows: Tensor
    center: Tensor
    ridge: float
    step: float = 0.0
    gradient: Tensor | None = None
    alive: Tensor | None = None
    gram: Tensor | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        _check_rows(self.rows)
        check_positive("ridge", self.ridge)
        if not 0 <= self.step < float("inf"):
            raise ValueError(f"`step` must be finite and >= 0, got {self.step}. Give 1 / (samples per row), or 0.")
        for name in ("center", "gradient", "alive"):
            self._settle(name, getattr(self, name))
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"`chunk` must be >= 1 column, got {self.chunk}. Leave it None to choose by memory.")
        if self.gram is not None and self.gram.shape != (self.n, self.n):
            raise ValueError(f"`gram` must have shape {(self.n, self.n)}, got {tuple(self.gram.shape)}. Give A A^T.")

    def _settle(self, name: str, value: Tensor | None) -> None:
        """Check a vector of length p and bring it to the working type and the device of A."""
        if value is None:
            return
        if value.shape != (self.p,):
            raise ValueError(f"`{name}` must have shape ({self.p},), as wide as `rows`, got {tuple(value.shape)}.")
        dtype = torch.bool if name == "alive" else self.dtype
        value = value.detach().to(device=self.rows.device, dtype=dtype)
        if not torch.isfinite(value).all():
            raise ValueError(f"`{name}` must be finite, got NaN or infinite values. Check the weights and the loss.")
        object.__setattr__(self, name, value)

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.rows.shape[0]

    @property
    def p(self) -> int:
        """Number of weights."""
        return self.rows.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the vectors of length p: float64 if A is, else float32."""
        return torch.float64 if self.rows.dtype == torch.float64 else torch.float32

    @property
    def damping(self) -> float:
        """2 mu = n * ridge, what the ridge adds to the diagonal of A^T A."""
        return self.n * self.ridge

    @cached_property
    def shift(self) -> float:
        """The part of the first-order term that lies in the row space: q = shift A^T 1 + `linear`."""
        return self.step if self.gradient is None else 0.0

    @cached_property
    def linear(self) -> Tensor | None:
        """The part of the first-order term given as a vector: n alpha g of shape (p,), or None."""
        return None if self.gradient is None or self.step == 0 else self.gradient * (self.n * self.step)

    @property
    def first_order(self) -> bool:
        """Whether there is a first-order term."""
        return self.step > 0

    def forward(self, vector: Tensor) -> Tensor:
        """Return A v in float64, shape (n, ...), for v of shape (p, ...) in the working type."""
        if vector.dim() == 2:
            vector = vector.T.contiguous().T  # column by column, which thin products read several times faster
        if self.rows.dtype == self.dtype:
            return (self.rows @ vector).double()
        total = vector.new_zeros(self.n, *vector.shape[1:])
        for begin, part in self.column_chunks():
            total += part @ vector[begin : begin + part.shape[1]]
        return total.double()

    def adjoint(self, vector: Tensor) -> Tensor:
        """Return A^T z in the working type, shape (p, ...), for z of shape (n, ...)."""
        vector = vector.to(self.dtype)
        vector = vector.T.contiguous() if vector.dim() == 2 else vector
        if self.rows.dtype == self.dtype:
            return (vector @ self.rows).T if vector.dim() == 2 else vector @ self.rows
        image = vector.new_empty(
            *vector.shape[:-1], self.p
        )  # a list of parts would keep the allocator from reusing copies
        for begin, part in self.column_chunks():
            image[..., begin : begin + part.shape[1]] = vector @ part
        return image.T if vector.dim() == 2 else image

    def among(self, alive: Tensor) -> Quadratic:
        """Return the same problem with other weights alive, without checking A again."""
        return self._with(alive=alive)

    def repair(self) -> Quadratic:
        """Return the same problem without its first-order term, without checking A again."""
        return self._with(step=0.0)

    def with_ridge(self, ridge: float) -> Quadratic:
        """Return the same problem with another ridge, without checking A again."""
        return self._with(ridge=ridge)

    def _with(self, **changes: Any) -> Quadratic:
        other = copy(self)
        for name in ("shift", "linear"):
            other.__dict__.pop(name, None)  # cached from the fields that change
        for name, value in changes.items():
            object.__setattr__(other, name, value)
        return other

    def column_chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first column, columns in the working type) over all of A."""
        width = self.width
        for begin in range(0, self.p, width):
            yield begin, self.rows[:, begin : begin + width].to(self.dtype)

    @property
    def width(self) -> int:
        """Columns copied at a time."""
        if self.chunk is not None:
            return self.chunk
        most = (_CPU_CHUNK if self.rows.device.type == "cpu" else _GPU_CHUNK) // self.n
        return max(1, min(most, max(_NARROW, self.p // 16)))


def _check_rows(rows: Tensor) -> None:
    if rows.dim() != 2 or rows.shape[0] < 1 or rows.dtype not in _FLOATS:
        raise ValueError(
            f"`rows` must be a float32, float64 or bfloat16 matrix with at least one row, got {tuple(rows.shape)} of "
            f"{rows.dtype}. Give one gradient per row."
        )
    norms = squared_row_norms(rows)
    if not torch.isfinite(norms).all():
        bad = int((~torch.isfinite(norms)).nonzero()[0])
        raise ValueError(f"`rows` must be finite, got NaN or infinite values in row {bad}. Check that batch's loss.")


def squared_row_norms(rows: Tensor) -> Tensor:
    """Return |a_i|^2 of every row in float64, shape (n,), for A of shape (n, p)."""
    if rows.dtype != torch.bfloat16:
        return torch.linalg.vector_norm(rows, dim=1).double().square()
    total = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    for part in rows.split(max(1, _CPU_CHUNK // rows.shape[0]), dim=1):  # the whole in float32 would be a second matrix
        total += part.float().square().sum(1)
    return total


def relative_ridge(rows: Tensor, factor: float) -> float:
    """Return a ridge in units of the gradients: factor |A|_F^2 / n.

    Args:
        rows: gradient matrix of shape (n, p).
        factor: multiple of the mean squared row norm, > 0; useful values lie in 1e-4 to 1e-2.
    Returns:
        The ridge; `factor` itself if every gradient is zero, since the problem then has no scale.
    """
    scale = float(squared_row_norms(rows).mean())
    return factor * scale if scale > 0 else factor


def keep_largest(scores: Tensor, k: int, alive: Tensor | None = None) -> Tensor:
    """Mark the k largest scores; of equal ones the lower index stays.

    Equal to the first k of a stable descending sort, in linear time and without waiting for the device.

    Args:
        scores: finite, shape (p,).
        k: number kept, 0 <= k <= number alive.
        alive: bool of shape (p,); entries that are False are never kept.
    Returns:
        bool mask of shape (p,) with exactly k True entries.
    """
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if alive is not None:
        scores = scores.masked_fill(~alive, -torch.inf)
    threshold = scores.kthvalue(scores.numel() - k + 1).values
    above = scores > threshold
    ties = scores == threshold
    return above | (ties & (ties.cumsum(0) <= k - above.sum()))


def check_count(problem: Quadratic, k: int) -> None:
    """Raise ValueError unless 0 <= k <= number of weights that may be kept."""
    most = problem.p if problem.alive is None else int(problem.alive.sum())
    if not 0 <= k <= most:
        raise ValueError(
            f"`k` must lie in [0, {most}], the number of weights alive, got {k}. Lower the sparsity target."
        )


def objective(problem: Quadratic, weights: Tensor) -> float:
    """Return f(w) relative to f(w_bar) = 0.

    Args:
        problem: the quadratic.
        weights: w of shape (p,).
    """
    move = weights - problem.center
    return float(move_objective(problem, move, problem.forward(move)))


def move_objective(problem: Quadratic, move: Tensor, image: Tensor) -> Tensor:
    """Return f as a float64 scalar from d = w - w_bar of shape (p,) and its image A d of shape (n,)."""
    value = 0.5 * image.square().sum() + 0.5 * problem.damping * move.double().square().sum()
    if problem.shift:
        value = value + problem.shift * image.sum()
    if problem.linear is not None:
        value = value + (problem.linear.double() * move).sum()
    return value


def gradient(problem: Quadratic, move: Tensor, image: Tensor) -> Tensor:
    """Return the gradient of f, A^T (A d + shift) + linear + 2 mu d, of shape (p,), from d and its image A d."""
    result = problem.adjoint(image + problem.shift).add_(move, alpha=problem.damping)
    return result if problem.linear is None else result.add_(problem.linear)


def magnitude_support(problem: Quadratic, k: int) -> Tensor:
    """Mark the k weights of largest magnitude among those alive; bool of shape (p,)."""
    return keep_largest(problem.center.abs(), k, problem.alive)


def largest_eigenvalue(problem: Quadratic) -> float:
    """Return the largest eigenvalue of A A^T by power iteration: on the Gram matrix if known, else through A.

    A lower bound within a percent or so, which is enough for a step size.
    """
    vector = torch.linspace(1.0, 2.0, problem.n, dtype=torch.float64, device=problem.rows.device)
    value, before = 0.0, -1.0
    for _ in range(_POWER_STEPS):
        vector = vector / vector.norm().clamp_min(1e-300)
        image = problem.gram @ vector if problem.gram is not None else problem.forward(problem.adjoint(vector))
        before, value = value, float(vector @ image)
        if abs(value - before) <= 1e-3 * value:
            break
        vector = image
    return value
