"""Proximal operators of sparse penalties, exact, and the half-space projection; pure functions of tensors.

A prox is prox(u) = argmin_x 1/2 sum_i D_i (x_i - u_i)^2 + t penalty(x), with D the metric of the step that made u.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# on 1 / sqrt(s(r)), nearly linear in r; with a metric over four decades 1e-10 of r at worst in double, 1e-5 in single precision
NEWTON_STEPS = {torch.float64: 5}
FEWER_STEPS = 4


def soft_threshold(values: Tensor, threshold: float | Tensor) -> Tensor:
    """Return the prox of t ||x||_1: sign(u) max(|u| - t, 0) = u - clamp(u, -t, t), which gives +0.0.

    Args:
        values: u, of any shape.
        threshold: t >= 0, one number or a tensor that broadcasts (t / D_i in a diagonal metric D).
    Returns:
        A tensor of the shape and dtype of `values`.
    """
    if not isinstance(threshold, Tensor):
        return values - values.clamp(-threshold, threshold)
    return values - torch.minimum(torch.maximum(values, -threshold), threshold)


@torch.no_grad()
def soft_threshold_(values: Sequence[Tensor], thresholds: float | Sequence[Tensor]) -> None:
    """Apply `soft_threshold` in place to many tensors at once.

    Args:
        values: tensors of any shapes.
        thresholds: t >= 0 for all, or one tensor for each, of its shape.
    """
    inner: Sequence[Tensor]
    if isinstance(thresholds, float):
        inner = torch._foreach_clamp_max(list(values), thresholds)
        torch._foreach_clamp_min_(inner, -thresholds)
    else:
        inner = torch._foreach_minimum(list(values), list(thresholds))
        torch._foreach_maximum_(inner, torch._foreach_neg(list(thresholds)))
    torch._foreach_sub_(list(values), inner)


def shrink_factors(norms: Tensor, thresholds: float | Tensor) -> Tensor:
    """Return max(1 - t / ||u_g||, 0) for every group, 0 where ||u_g|| = 0.

    Args:
        norms: ||u_g|| >= 0, of any shape.
        thresholds: t >= 0, one number or of the same shape.
    """
    factors = (1.0 - thresholds / norms).clamp_min(0.0)
    return torch.where(norms > 0, factors, torch.zeros_like(factors))


def group_soft_threshold(values: Tensor, threshold: float | Tensor) -> Tensor:
    """Return the prox of t ||x||_2 of every row: max(1 - t / ||u||, 0) u; a zero row stays zero.

    Args:
        values: u, of shape (groups, size).
        threshold: t >= 0, one number or of shape (groups,).
    Returns:
        A tensor of shape (groups, size).
    """
    return values * shrink_factors(torch.linalg.vector_norm(values, dim=1), threshold).unsqueeze(1)


def metric_group_prox(values: Tensor, metric: Tensor, threshold: Tensor) -> Tensor:
    """Return argmin_x 1/2 sum_i D_i (x_i - u_i)^2 + t ||x||_2 of every row.

    With b = D u: x = 0 where ||b|| <= t, else x_i = b_i / (D_i + t / r), where r = ||x|| is the root of
    s(r) = sum_i (b_i / (D_i r + t))^2 = 1. As 1 / sqrt(s) is concave and nearly linear, Newton's method on it from a lower
    bound of r rises to the root in a few steps.

    Args:
        values: u, of shape (groups, size).
        metric: D > 0, of shape (groups, size).
        threshold: t >= 0, of shape (groups,).
    Returns:
        A tensor of shape (groups, size).
    """
    scaled = metric * values
    norms = torch.linalg.vector_norm(scaled, dim=1)
    root = ((norms - threshold) / metric.amax(dim=1)).clamp_min_(0.0)
    for _ in range(NEWTON_STEPS.get(values.dtype, FEWER_STEPS)):
        offset = threshold / root
        inverse = (metric + offset.unsqueeze(1)).reciprocal_()
        squares = (scaled * inverse).square_()
        total = squares.sum(dim=1)
        slope = total - offset * torch.linalg.vecdot(squares, inverse)  # sum_i x_i^2 D_i / (D_i + t / r)
        root = torch.where(slope > 0, root + total * (total.sqrt() - root) / slope, root)
    shrunk = scaled.div_(metric + (threshold / root).unsqueeze(1))
    return shrunk.masked_fill_((norms <= threshold).unsqueeze(1), 0.0)


def outside_half_space(products: Tensor, squares: Tensor, eps: float, strict: bool) -> Tensor:
    """Return which groups leave the half-space <z_g, x_g> >= eps ||x_g||^2 of their previous value x_g.

    Args:
        products: <z_g, x_g> of trial and previous value, of any shape.
        squares: ||x_g||^2, of the same shape.
        eps: in [0, 1); larger is more aggressive.
        strict: the published test `<`; else `<=`, so that what a prox has put to zero counts. A group that was zero
            counts in both.
    Returns:
        bool of the same shape, True = to be zeroed.
    """
    bound = eps * squares
    return (products < bound) | (squares == 0) if strict else products <= bound


def orthant_step(values: Tensor, previous: Tensor, threshold: float | Tensor, eps: float = 0.0) -> Tensor:
    """Return the orthant step of OBProx-SG: descend the l1 norm inside the orthant of x, zero what would leave it.

    z = u - t sign(x) where sign(x) z > eps, else 0: a zero stays zero.

    Args:
        values: u, the weights after the optimizer's step, of any shape.
        previous: x, those before it, of the same shape.
        threshold: t >= 0, one number or a tensor that broadcasts.
        eps: >= 0.
    """
    signs = previous.sign()
    trial = values - threshold * signs
    return torch.where(trial * signs > eps, trial, torch.zeros_like(trial))
