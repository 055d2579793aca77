"""Proximal operators against hand arithmetic, brute force and optimality conditions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, tensor

from lightning_prune.methods._prox_groups import Block, GroupTable, Piece
from lightning_prune.methods._prox_operators import (
    group_soft_threshold,
    metric_group_prox,
    orthant_step,
    outside_half_space,
    shrink_factors,
    soft_threshold,
    soft_threshold_,
)


def rows(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def positive(count: int, size: int, decades: float, seed: int = 1) -> Tensor:
    """Numbers spread evenly over so many decades around 1."""
    draw = torch.rand(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return 10 ** (decades * (draw - 0.5))


# soft threshold


def test_soft_threshold_takes_the_threshold_from_each_magnitude() -> None:
    assert soft_threshold(tensor([3.0, 0.5, -0.5, -3.0, 0.0]), 1.0).tolist() == [2.0, 0.0, 0.0, -2.0, 0.0]
    assert soft_threshold(tensor([2.0, 0.3, -1.7]), 0.7).tolist() == pytest.approx([1.3, 0.0, -1.0])


def test_soft_threshold_gives_positive_zeros() -> None:
    assert not soft_threshold(tensor([-0.5, 0.5, -0.0]), 1.0).signbit().any()


@pytest.mark.parametrize("value", [3.0, 0.4, -0.7, -2.2])
def test_soft_threshold_is_where_the_objective_is_smallest_on_a_grid(value: float) -> None:
    grid = torch.linspace(-4, 4, 80001, dtype=torch.float64)
    best = grid[(0.5 * (grid - value).square() + 0.7 * grid.abs()).argmin()]
    assert float(soft_threshold(tensor(value, dtype=torch.float64), 0.7)) == pytest.approx(float(best), abs=1e-4)


def test_soft_threshold_of_many_tensors_equals_that_of_each() -> None:
    values, thresholds = [rows(3, 4), rows(2, 2, 5)], [positive(3, 4, 2), positive(2, 2, 2)]
    expected = [soft_threshold(value, 0.3) for value in values]
    each = [soft_threshold(value, threshold) for value, threshold in zip(values, thresholds, strict=True)]
    one, two = [value.clone() for value in values], [value.clone() for value in values]
    soft_threshold_(one, 0.3)
    soft_threshold_(two, thresholds)
    assert all(torch.equal(a, b) for a, b in zip(one, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(two, each, strict=True))


# groups


def test_group_soft_threshold_shortens_a_group_along_itself() -> None:
    assert group_soft_threshold(tensor([[3.0, 4.0]]), 2.5).tolist() == [[1.5, 2.0]]
    assert group_soft_threshold(tensor([[3.0, 4.0]]), 5.0).tolist() == [[0.0, 0.0]]
    assert group_soft_threshold(torch.zeros(1, 2), 0.5).tolist() == [[0.0, 0.0]]
    assert shrink_factors(tensor([0.0, 2.0]), 0.0).tolist() == [0.0, 1.0]


def test_group_soft_threshold_is_the_minimiser_that_lbfgs_finds() -> None:
    values = rows(5, 4)
    found = values.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([found], max_iter=200, tolerance_grad=1e-14, tolerance_change=1e-16)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (found - values).square().sum() + 0.4 * found.norm(dim=1).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(found.detach(), group_soft_threshold(values, 0.4), rtol=0, atol=1e-8)


@pytest.mark.parametrize("decades", [0.0, 2.0, 4.0])
def test_metric_prox_satisfies_its_optimality_condition(decades: float) -> None:
    values, metric = rows(300, 12), positive(300, 12, decades)
    norms = (metric * values).norm(dim=1)
    threshold = norms * torch.linspace(0.05, 1.2, 300, dtype=torch.float64)
    found = metric_group_prox(values, metric, threshold)
    alive = found.norm(dim=1) > 0
    residual = metric * (found - values) + (threshold / found.norm(dim=1)).unsqueeze(1) * found
    assert 0 < int(alive.sum()) < 300
    assert float((residual[alive].norm(dim=1) / norms[alive]).max()) < 1e-12
    assert torch.equal(alive, norms > threshold)


def test_metric_prox_with_an_even_metric_is_the_plain_prox() -> None:
    values = rows(50, 6)
    found = metric_group_prox(values, torch.full_like(values, 2.5), torch.full((50,), 1.5, dtype=torch.float64))
    assert torch.allclose(found, group_soft_threshold(values, 1.5 / 2.5), rtol=0, atol=1e-14)


def test_metric_prox_without_a_threshold_or_without_values_changes_nothing() -> None:
    values, metric = rows(4, 3), positive(4, 3, 2)
    assert torch.allclose(metric_group_prox(values, metric, torch.zeros(4, dtype=torch.float64)), values, atol=1e-14)
    empty = metric_group_prox(torch.zeros(2, 3), torch.ones(2, 3), tensor([0.0, 1.0]))
    assert empty.tolist() == [[0.0] * 3] * 2


def test_metric_prox_holds_in_single_precision() -> None:
    values, metric = rows(100, 8).float(), positive(100, 8, 3).float()
    threshold = 0.5 * (metric * values).norm(dim=1)
    exact = metric_group_prox(values.double(), metric.double(), threshold.double())
    assert torch.allclose(metric_group_prox(values, metric, threshold).double(), exact, rtol=1e-4, atol=1e-6)


# half-space and orthant


def half_space(previous: float, gradient: float, eps: float) -> float:
    """One step at learning rate 0.1 with penalty 0.5, by the published formula, for one number."""
    x = tensor([previous])
    trial = x - 0.1 * gradient - 0.1 * 0.5 * x.sign()
    gone = outside_half_space(trial * x, x * x, eps, strict=True)
    return float(torch.where(gone, 0.0, trial))


@pytest.mark.parametrize(
    ("previous", "gradient", "eps", "expected"),
    [(1.0, 5.0, 0.0, 0.45), (1.0, 20.0, 0.0, 0.0), (1.0, 5.0, 0.6, 0.0), (-1.0, -20.0, 0.0, 0.0)]
    + [(0.0, gradient, 0.0, 0.0) for gradient in (-7.0, 0.0, 3.0)],
)
def test_half_space_step_by_hand(previous: float, gradient: float, eps: float, expected: float) -> None:
    assert half_space(previous, gradient, eps) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_what_the_prox_zeroes_the_half_space_zeroes_too(eps: float) -> None:
    x, step = rows(20000, 3), rows(20000, 3, 2)
    by_prox = group_soft_threshold(x - step, 0.5).norm(dim=1) == 0
    trial = x - step - 0.5 * x / x.norm(dim=1, keepdim=True)
    by_half_space = outside_half_space((trial * x).sum(1), (x * x).sum(1), eps, strict=True)
    assert int(by_prox.sum()) > 100
    assert not (by_prox & ~by_half_space).any()
    assert int(by_half_space.sum()) > 5 * int(by_prox.sum())


def test_single_entries_make_the_half_space_step_the_orthant_step_bit_for_bit() -> None:
    x, u = rows(1, 5000).flatten(), rows(1, 5000, 3).flatten()
    x[::7] = 0.0
    trial = u - 0.4 * x.sign()
    gone = outside_half_space(trial * x, x * x, 0.0, strict=True) | (trial * x == 0)
    assert torch.equal(torch.where(gone, torch.zeros_like(trial), trial), orthant_step(u, x, 0.4))


def test_orthant_step_lets_no_zero_revive_and_zeroes_what_would_cross() -> None:
    previous, values = tensor([1.0, -1.0, 0.0, 2.0]), tensor([0.5, 0.1, 3.0, 0.3])
    assert orthant_step(values, previous, 0.2).tolist() == pytest.approx([0.3, 0.0, 0.0, 0.1])
    assert orthant_step(values, previous, 0.2, eps=0.2).tolist() == pytest.approx([0.3, 0.0, 0.0, 0.0])


# the table of groups


def two_blocks() -> GroupTable:
    """Rows 0 to 2 of a matrix with a bias each; columns of another matrix in pairs, and entries 3, 4 of the bias."""
    matrix, bias, other = rows(4, 3), rows(1, 5, 7).flatten(), rows(2, 4, 8)
    first = Block("first", 3, (Piece(0, 0, torch.arange(3).view(3, 1)), Piece(1, 0, torch.arange(3).view(3, 1))))
    second = Block("second", 2, (Piece(2, 1, tensor([[0, 2], [1, 3]])), Piece(1, 0, tensor([[4], [3]]))))
    return GroupTable([first, second], [matrix, bias, other])


def entries(table: GroupTable) -> list[list[float]]:
    """The entries of every group, collected by hand."""
    matrix, bias, other = table.tensors
    found = [[*matrix[row].tolist(), float(bias[row])] for row in range(3)]
    return found + [
        [*other[:, columns].T.flatten().tolist(), float(bias[at])] for columns, at in (([0, 2], 4), ([1, 3], 3))
    ]


def test_group_sums_equal_a_loop() -> None:
    table = two_blocks()
    squares = [sum(value * value for value in group) for group in entries(table)]
    assert table.dot(table.tensors, table.tensors).tolist() == pytest.approx(squares, abs=1e-12)
    assert table.sizes.tolist() == [4, 4, 4, 5, 5]
    assert table.block_of.tolist() == [0, 0, 0, 1, 1]


def test_block_matrices_hold_each_groups_entries_and_go_back() -> None:
    table = two_blocks()
    before = [tensor.clone() for tensor in table.tensors]
    found = [row for matrix in table.matrices(table.tensors) for row in matrix.tolist()]
    assert [sorted(row) for row in found] == [sorted(group) for group in entries(table)]
    table.write_([2.0 * matrix for matrix in table.matrices(table.tensors)])
    assert torch.equal(table.tensors[0][:3], 2.0 * before[0][:3])
    assert torch.equal(table.tensors[0][3], before[0][3])
    assert torch.equal(table.tensors[1], 2.0 * before[1])


def test_scaling_touches_the_entries_of_each_group_alone() -> None:
    table = two_blocks()
    before = [tensor.clone() for tensor in table.tensors]
    table.scale_(tensor([1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64))
    assert table.tensors[0][1].tolist() == [0.0] * 3
    assert torch.equal(table.tensors[0][[0, 2, 3]], before[0][[0, 2, 3]])
    assert table.tensors[2][:, [0, 2]].tolist() == [[0.0] * 2] * 2
    assert (table.tensors[1] == 0).tolist() == [False, True, False, False, True]


def test_a_vector_over_groups_goes_into_blocks_and_back() -> None:
    table = two_blocks()
    numbers = torch.arange(5)
    assert {name: part.tolist() for name, part in table.by_block(numbers).items()} == {
        "first": [0, 1, 2], "second": [3, 4],
    }  # fmt: skip
    assert torch.equal(table.joined(table.by_block(numbers)), numbers)


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (Piece(0, 1, torch.arange(2).view(2, 1)), "crosses another block"),
        (Piece(0, 0, tensor([[0], [3]])), "shares entries with another block"),
    ],
)
def test_overlapping_groups_are_refused(piece: Piece, message: str) -> None:
    first = Block("first", 2, (Piece(0, 0, torch.arange(2).view(2, 1)),))
    with pytest.raises(ValueError, match=message):
        GroupTable([first, Block("second", 2, (piece,))], [rows(4, 4)])
