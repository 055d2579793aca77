"""The solvers of CHITA's quadratic against closed forms and brute force, and what must not change their answer."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from chita_oracles import SOLVERS, draw, hessian, mask_of, mixed, naive_solve, naive_value, random_mask, slope
from torch import Tensor

from lightning_prune.methods._chita_exact import solve_support
from lightning_prune.methods._chita_iht import hard_threshold_step, line_search_step, start_point
from lightning_prune.methods._chita_problem import Quadratic, keep_largest, magnitude_support, objective
from lightning_prune.methods._chita_solver import solve_bso, solve_iht

# --- closed forms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0.0, 0.3])
def test_orthonormal_columns_are_solved_by_one_threshold_step_from_anywhere(step: float) -> None:
    for seed in range(10):
        base = draw(seed, n=15, p=9, step=step)
        problem = Quadratic(torch.linalg.qr(base.rows)[0] * 3.0, base.center, base.ridge, step)
        damped = 9.0 + problem.n * problem.ridge
        target = problem.center - slope(problem) / damped
        expected = target * keep_largest(target.abs(), 4)
        start = torch.randn(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        reached, support = hard_threshold_step(problem, start, 1 / damped, 4)
        torch.testing.assert_close(reached, expected)
        assert int(support.sum()) == 4
        torch.testing.assert_close(solve_iht(problem, 4).weights, expected)


@pytest.mark.parametrize("step", [0.0, 0.3])
def test_orthogonal_columns_of_unequal_norm_keep_what_costs_most(step: float) -> None:
    for seed in range(20):
        base = draw(seed, n=15, p=9, step=step)
        norms = torch.linspace(0.1, 4.0, 9, dtype=torch.float64)[
            torch.randperm(9, generator=torch.Generator().manual_seed(seed))
        ]
        problem = Quadratic(torch.linalg.qr(base.rows)[0] * norms, base.center, base.ridge, step)
        damped = norms.square() + problem.n * problem.ridge
        target = problem.center - slope(problem) / damped
        optimum = naive_value(problem, target * keep_largest(damped * target.square(), 4))
        solution = solve_iht(problem, 4, rounds=12)
        assert solution.objective >= optimum - 1e-9
        assert solution.objective == pytest.approx(optimum, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_no_gradients_leave_exactly_magnitude_pruning(solver) -> None:
    center = torch.tensor([3.0, -1.0, 0.5, -2.0, 0.0, 1.0, 4.0, 0.1])
    solution = solver(Quadratic(torch.zeros(3, 8), center, ridge=1.0, step=0.5), 4)
    assert solution.weights.tolist() == [3.0, -1.0, 0.0, -2.0, 0.0, 0.0, 4.0, 0.0]
    assert solution.support.tolist() == [True, True, False, True, False, False, True, False]
    assert solution.objective == pytest.approx(solution.magnitude_objective)


def test_an_overwhelming_ridge_leaves_magnitude_pruning() -> None:
    problem = draw(3, ridge=1e12)
    solution = solve_iht(problem, 5)
    torch.testing.assert_close(solution.weights, problem.center * magnitude_support(problem, 5), rtol=1e-9, atol=0.0)


def test_deleting_one_weight_is_the_optimal_brain_surgeon() -> None:
    for seed in range(20):
        problem = draw(seed)
        inverse = torch.linalg.inv(hessian(problem))
        saliency = problem.center.square() / (2 * inverse.diagonal())
        q = int(saliency.argmin())
        expected = problem.center - problem.center[q] * inverse[:, q] / inverse[q, q]
        support = torch.arange(12) != q
        weights = solve_support(problem, support)
        torch.testing.assert_close(weights, expected.masked_fill(~support, 0.0))
        assert objective(problem, weights) == pytest.approx(float(saliency[q]))
        assert solve_iht(problem, 11).objective >= float(saliency[q]) - 1e-9


def test_deleting_any_set_is_the_block_form_of_the_surgeon() -> None:
    for seed, problem in enumerate(mixed(30)):
        gone = ~random_mask(12, 1 + seed % 11, seed)
        inverse = torch.linalg.inv(hessian(problem))
        free = problem.center - inverse @ slope(problem)
        block = torch.linalg.inv(inverse[gone][:, gone])
        expected = (free - inverse[:, gone] @ block @ free[gone]).masked_fill(gone, 0.0)
        weights = solve_support(problem, ~gone)
        torch.testing.assert_close(weights, expected)
        if problem.step == 0:
            saliency = 0.5 * problem.center[gone] @ block @ problem.center[gone]
            assert objective(problem, weights) == pytest.approx(float(saliency))


def test_sherman_morrison_over_the_rows_gives_the_same_solution() -> None:
    problem = draw(5, n=6, p=20, step=0.2, own=True)
    inverse = torch.eye(20, dtype=torch.float64) / (6 * problem.ridge)
    for row in problem.rows:
        image = inverse @ row
        inverse = inverse - torch.outer(image, image) / (1 + row @ image)
    expected = problem.center - inverse @ slope(problem)
    torch.testing.assert_close(solve_support(problem, torch.ones(20, dtype=torch.bool)), expected)


# --- brute force ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_nothing_beats_the_optimum_over_all_supports(solver) -> None:
    for problem in mixed(9, n=5, p=8):
        best = min(naive_value(problem, naive_solve(problem, mask_of(8, kept))) for kept in combinations(range(8), 4))
        solution = solver(problem, 4)
        assert solution.objective >= best - 1e-9
        assert solution.objective == pytest.approx(naive_value(problem, solution.weights), abs=1e-9)


def test_thresholding_is_never_worse_than_magnitude_and_usually_finds_the_optimum() -> None:
    hits = magnitude_hits = 0
    for problem in (draw(seed) for seed in range(25)):
        best = min(float(problem_value) for problem_value in _all_values(problem, 6))
        plain = naive_value(problem, naive_solve(problem, magnitude_support(problem, 6)))
        found = solve_iht(problem, 6, rounds=10).objective
        assert best - 1e-9 <= found <= plain + 1e-9
        hits, magnitude_hits = hits + (found < best + 1e-9), magnitude_hits + (plain < best + 1e-9)
    assert hits > 2 * magnitude_hits


def _all_values(problem: Quadratic, k: int) -> Tensor:
    """f at the exact solution of every support of size k, without a first-order term, in one batch."""
    supports = torch.stack([mask_of(problem.p, kept) for kept in combinations(range(problem.p), k)])
    inverse = torch.linalg.inv(hessian(problem))
    gone = (~supports).nonzero()[:, 1].view(len(supports), -1)
    blocks = inverse[gone[:, :, None], gone[:, None, :]]
    weights = problem.center[gone]
    return 0.5 * (weights * torch.linalg.solve(blocks, weights)).sum(1)


# --- invariants -------------------------------------------------------------------------------------------------


def test_line_search_steps_never_raise_the_objective_and_track_it() -> None:
    moves = 0
    for problem in mixed(24):
        point = start_point(problem, magnitude_support(problem, 5))
        for _ in range(15):
            after = line_search_step(problem, point, 5)
            if after is None:
                break
            assert after.value <= point.value + 1e-12
            assert after.value == pytest.approx(naive_value(problem, problem.center + after.move), abs=1e-8)
            assert int(after.support.sum()) == 5
            moves += not torch.equal(after.support, point.support)
            point = after
    assert moves > 0


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_every_count_from_none_to_all_is_kept_exactly(solver) -> None:
    for problem in mixed(3):
        for k in range(13):
            solution = solver(problem, k)
            assert int(solution.support.sum()) == k
            assert torch.isfinite(solution.weights).all()
            assert not solution.weights[~solution.support].any()
            assert solution.movement == pytest.approx(float((solution.weights - problem.center).norm()))


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_sparse_enough_vector_is_returned_as_it_is_and_twice_is_once(solver) -> None:
    for seed in range(5):
        problem = draw(seed)
        sparse = Quadratic(problem.rows, problem.center * random_mask(12, 4, seed), problem.ridge)
        solution = solver(sparse, 6)
        assert torch.equal(solution.weights, sparse.center)
        assert solution.objective == 0.0
        assert int(solution.support.sum()) == 6
        once = solver(problem, 6)
        again = solver(Quadratic(problem.rows, once.weights, problem.ridge), 6)
        assert torch.equal(again.weights, once.weights)
        assert torch.equal(again.support, once.support)


@pytest.mark.parametrize("solver", [solve_iht, solve_bso])
def test_permuting_coordinates_permutes_the_solution(solver) -> None:
    for seed, problem in enumerate(mixed(12)):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        gradient = None if problem.gradient is None else problem.gradient[order]
        other = Quadratic(problem.rows[:, order], problem.center[order], problem.ridge, problem.step, gradient)
        torch.testing.assert_close(solver(other, 5).weights, solver(problem, 5).weights[order])


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_flipping_signs_scaling_gradients_and_doubling_rows_change_nothing_else(solver) -> None:
    for seed, problem in enumerate(mixed(12)):
        weights, step, own = solver(problem, 5).weights, problem.step, problem.gradient
        sign = 1.0 - 2.0 * random_mask(12, 5, seed).double()
        signed = None if own is None else own * sign
        flipped = Quadratic(problem.rows * sign, problem.center * sign, problem.ridge, step, signed)
        torch.testing.assert_close(solver(flipped, 5).weights, weights * sign)
        # with c A, c alpha and c^2 lambda, f grows by c^2; a gradient of its own scales with the rows
        scaled = Quadratic(
            problem.rows * 3, problem.center, problem.ridge * 9, step * 3, None if own is None else own * 3
        )
        torch.testing.assert_close(solver(scaled, 5).weights, weights)
        doubled = Quadratic(problem.rows.repeat(2, 1), problem.center, problem.ridge, step, own)
        torch.testing.assert_close(solver(doubled, 5).weights, weights)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_dead_weights_never_return(solver) -> None:
    for seed, problem in enumerate(mixed(9)):
        alive = random_mask(12, 7, seed)
        args = (problem.rows, problem.center * alive, problem.ridge, problem.step, problem.gradient)
        for k in (0, 4, 7):
            solution = solver(Quadratic(*args, alive=alive), k)
            assert int(solution.support.sum()) == k
            assert not (solution.support & ~alive).any()


def test_zero_columns_stay_and_are_decided_by_the_ridge() -> None:
    problem = draw(1)
    rows = problem.rows.clone()
    rows[:, 3] = 0.0
    center = problem.center.clone()
    center[3] = 1e3
    solution = solve_iht(Quadratic(rows, center, problem.ridge), 4)
    assert solution.support[3]
    assert float(solution.weights[3]) == 1e3


def test_kept_weights_that_are_zero_are_still_kept() -> None:
    solution = solve_iht(Quadratic(torch.ones(2, 5), torch.tensor([0.0, 2.0, 0.0, 0.0, 1.0]), 0.1), 4)
    assert solution.support.tolist() == [True, True, True, False, True]


# --- ties -------------------------------------------------------------------------------------------------------


def test_the_largest_are_those_of_a_stable_sort_with_ties_to_the_lower_index() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        scores = torch.randint(0, 4, (15,), generator=generator).float()
        alive = torch.rand(15, generator=generator) < 0.7
        for k in range(int(alive.sum()) + 1):
            ranked = torch.where(alive, scores, -1.0).sort(descending=True, stable=True).indices[:k]
            assert keep_largest(scores, k, alive).nonzero().flatten().tolist() == sorted(ranked.tolist())
