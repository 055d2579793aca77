"""How many weights every row keeps: a convex allocation by water-filling, and the choice inside a row.

A row is the weights of one output of one sign. m draws from p = s / S keep its sum within f(m) of itself:

    f(m) = (u + sqrt(u^2 + 12 u)) / 2,   u = alpha / (3 m),   alpha = 2 C S ln(8 (P + 1) k / delta).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.methods._pfp_sampling import inclusion_probabilities, systematic

__all__ = ["Rows", "choose_rows", "row_error", "whole_numbers", "water_filling"]

CONSTANT = 3.0  # C, which is K too
_HALVINGS = 60
_STEPS = 16
_LEAST = 1e-6


@dataclass(frozen=True)
class Rows:
    """All rows of a network.

    Attributes:
        alpha: (rows,), float64, > 0.
        limits: weights of the row with s > 0, float64, >= 1.
        costs: l, the weight of the row's error in the sum, float64, > 0.
    """

    alpha: Tensor
    limits: Tensor
    costs: Tensor


def row_error(alpha: Tensor, draws: Tensor) -> Tensor:
    """Return f(m), the relative error of m draws.

    Args:
        alpha: > 0, (rows,).
        draws: m > 0, (rows,).
    """
    share = alpha / (3 * draws)
    return (share + (share.square() + 12 * share).sqrt()) / 2


def _gain(rows: Rows, draws: Tensor) -> Tensor:
    """-l f'(m): what one more weight is worth; it falls with m."""
    share = rows.alpha / (3 * draws)
    return rows.costs * share / (2 * draws) * (1 + (2 * share + 12) / (2 * (share.square() + 12 * share).sqrt()))


def water_filling(rows: Rows, budget: float) -> Tensor:
    """Return m that minimises sum_i l_i f_i(m_i) with sum m_i = budget and 0 < m_i <= limit_i.

    Args:
        rows: all rows.
        budget: > 0; at least the sum of the limits means all of them.
    Returns:
        float64 (rows,).
    """
    if budget >= float(rows.limits.sum()):
        return rows.limits.clone()
    low, high = (
        math.log(float(_gain(rows, rows.limits).min())),
        math.log(float(_gain(rows, 0 * rows.alpha + _LEAST).max())),
    )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        spent = float(_at_price(rows, math.exp(middle)).sum())
        low, high = (middle, high) if spent > budget else (low, middle)
    return _at_price(rows, math.exp(high))


def _at_price(rows: Rows, price: float) -> Tensor:
    """m at which one more weight is worth the price, within the limits.

    The worth is 3 l / (2 alpha) h(u) with h(u) = u^2 (1 + (u + 6) / sqrt(u^2 + 12 u)), and ln h has a slope between 1.5 and
    2 in ln u: steps of slope 1.75 shrink the error at least sevenfold each.
    """
    wanted = (2 * price * rows.alpha / (3 * rows.costs)).log()
    place = wanted / 1.75
    for _ in range(_STEPS):
        share = place.exp()
        height = 2 * place + (1 + (share + 6) / (share.square() + 12 * share).sqrt()).log()
        place = place - (height - wanted) / 1.75
    return torch.minimum((rows.alpha / (3 * place.exp())).clamp_min(_LEAST), rows.limits)


def whole_numbers(amounts: Tensor, limits: Tensor, total: int) -> Tensor:
    """Round amounts to whole numbers of a given sum: floors, then the largest remainders.

    Args:
        amounts: >= 0, (rows,).
        limits: whole numbers that must not be exceeded, (rows,).
        total: the sum; at most that of the limits.
    Returns:
        int64 (rows,).
    """
    counts = torch.minimum(amounts.floor(), limits).to(torch.int64)
    order = torch.sort(amounts - amounts.floor(), descending=True, stable=True).indices
    while int(counts.sum()) < total:
        room = order[counts[order] < limits[order]][: total - int(counts.sum())]
        counts[room] += 1
    while int(counts.sum()) > total:
        spare = order.flip(0)
        spare = spare[counts[spare] > 0][: int(counts.sum()) - total]
        counts[spare] -= 1
    return counts


def choose_rows(
    scores: Tensor, rows: Tensor, counts: Tensor, errors: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Keep so many weights of every row, by chance or the largest.

    Args:
        scores: s >= 0, (weights,), float64.
        rows: int64 (weights,), the row of every weight.
        counts: int64 (rows,).
        errors: f(m) by row: where C times the scores dropped is no larger, the largest stay unscaled; None: always by chance.
        generator: CPU source of randomness.
    Returns:
        scales (weights,), float64: 0 of a removed weight, 1 / probability of one kept by chance.
    """
    order = torch.argsort(rows, stable=True)
    sizes = torch.bincount(rows, minlength=len(counts)).tolist()
    scales = torch.zeros_like(scores)
    for number, members in enumerate(order.split(sizes)):
        count, own = int(counts[number]), scores[members]
        if count >= int((own > 0).sum()):
            scales[members] = (own > 0).double()
        elif count > 0:
            scales[members] = _scales(own, count, None if errors is None else float(errors[number]), generator)
    return scales


def _scales(scores: Tensor, count: int, error: float | None, generator: torch.Generator) -> Tensor:
    ranked = torch.sort(scores, descending=True, stable=True)
    if error is not None and CONSTANT * float(ranked.values[count:].sum()) <= error:
        kept = torch.zeros_like(scores)
        kept[ranked.indices[:count]] = 1.0
        return kept
    odds = inclusion_probabilities(scores, count)
    taken = systematic(odds, generator)
    return torch.where(taken, 1 / odds.clamp_min(1e-300), 0.0)
