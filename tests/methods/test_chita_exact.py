"""The exact solve on a support, its precision and memory, the block-wise solve, and input that is refused."""

from __future__ import annotations

import pytest
import torch
from chita_oracles import SOLVERS, draw, mixed, naive_solve, naive_value, random_mask
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.methods._chita_block import block_bounds
from lightning_prune.methods._chita_exact import gram_matrix, solve_support, solve_system, support_system
from lightning_prune.methods._chita_problem import Quadratic, largest_eigenvalue, relative_ridge
from lightning_prune.methods._chita_solver import solve_block, solve_bso, solve_iht, with_gram

# --- the exact solve --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 7, 8, 9, 20, 30])
def test_primal_and_dual_forms_equal_dense_algebra_around_the_number_of_rows(k: int) -> None:
    for seed in range(9):
        problem = draw(seed, n=8, p=30, step=(seed % 3 > 0) * 0.3, own=seed % 3 == 2)
        support = random_mask(30, k, seed)
        torch.testing.assert_close(solve_support(problem, support), naive_solve(problem, support))


@pytest.mark.parametrize("factor", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("first_order", ["none", "rows", "own", "own in the row space"])
@pytest.mark.parametrize("k", [39, 40, 41, 300])
def test_single_precision_agrees_with_double(factor: float, first_order: str, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    rows = torch.randn(40, 10, generator=generator) @ torch.randn(10, 400, generator=generator)
    rows = rows + 0.1 * torch.randn(40, 400, generator=generator)
    center = torch.randn(400, generator=generator)
    gradient = {"own": torch.randn(400, generator=generator), "own in the row space": rows.mean(0)}.get(first_order)
    step = 0.0 if first_order == "none" else 0.1
    problem = Quadratic(rows, center, relative_ridge(rows, factor), step, gradient)
    support = random_mask(400, k, k)
    wide = Quadratic(
        rows.double(), center.double(), problem.ridge, step, None if gradient is None else gradient.double()
    )
    expected = naive_solve(wide, support)
    error = (solve_support(problem, support).double() - expected).norm() / expected.norm()
    assert float(error) < 1e-4


def test_many_ridges_share_one_support_and_equal_single_solves() -> None:
    for k in (5, 20):
        for seed in range(3):
            problem = draw(seed, p=30, step=(seed > 0) * 0.3, own=seed == 2)
            ridges = [1e-3, 0.1, 10.0]
            together = solve_system(problem, support_system(problem, random_mask(30, k, seed)), ridges)
            for ridge, weights in zip(ridges, together, strict=True):
                single = Quadratic(problem.rows, problem.center, ridge, problem.step, problem.gradient)
                torch.testing.assert_close(weights, naive_solve(single, random_mask(30, k, seed)))


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_column_chunks_and_every_way_to_the_gram_matrix_agree(chunk: int) -> None:
    base = draw(2, n=5, p=30)
    problem = Quadratic(base.rows, base.center, base.ridge, chunk=chunk)
    support, near = random_mask(30, 22, 1), random_mask(30, 22, 1)
    near[near.nonzero()[0]] = False
    rows = base.rows[:, support]
    whole = with_gram(problem)
    torch.testing.assert_close(gram_matrix(problem), base.rows @ base.rows.T)
    torch.testing.assert_close(
        largest_eigenvalue(whole), float(torch.linalg.matrix_norm(base.rows, 2) ** 2), rtol=0.02, atol=0
    )
    torch.testing.assert_close(largest_eigenvalue(problem), largest_eigenvalue(whole))
    for given, close in ((problem, None), (whole, None), (problem, support_system(problem, near))):
        gram = support_system(given, support, close).gram
        torch.testing.assert_close(gram.tril(), (rows @ rows.T).tril())


def test_half_precision_storage_solves_the_rounded_problem() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 200, generator=generator).bfloat16()
    center = torch.randn(200, generator=generator)
    half, full = (Quadratic(r, center, 0.01, 0.1, chunk=17) for r in (rows, rows.float()))
    for k in (4, 100):
        weights = solve_iht(half, k).weights
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights, solve_iht(full, k).weights, rtol=1e-4, atol=1e-5)


class LargestResult(TorchDispatchMode):
    """Remembers the most bytes any operation returned in new storage."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_of_any_solver_copies_a_quarter_of_the_gradients(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 4096, generator=generator).to(dtype)
    problem = Quadratic(rows, torch.randn(4096, generator=generator), 0.1, 0.1)
    for k in (40, 400, 3000):
        for solver in (solve_iht, solve_bso, lambda q, k: solve_block(q, k, [4096], 128)):
            with LargestResult() as largest:
                solver(problem, k)
            assert largest.bytes <= 0.25 * rows.numel() * rows.element_size()


# --- blocks -----------------------------------------------------------------------------------------------------


def test_block_bounds_follow_the_tensors_and_the_last_block_takes_the_remainder() -> None:
    assert block_bounds([7, 3, 10], 3) == [(0, 3), (3, 7), (7, 10), (10, 13), (13, 16), (16, 20)]
    assert block_bounds([2], 500) == [(0, 2)]


def test_one_block_over_everything_is_the_full_solve() -> None:
    for problem in mixed(12):
        for k in (3, 8, 12):
            block, full = solve_block(problem, k, [12], 12), solve_bso(problem, k)
            torch.testing.assert_close(block.weights, full.weights)
            assert block.objective == pytest.approx(full.objective, abs=1e-9)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_blocks_whose_columns_are_orthogonal_to_each_other_give_the_full_solve(size: int) -> None:
    for seed in range(6):
        base = draw(seed, n=4, p=12, step=(seed % 3 > 0) * 0.3, own=seed % 3 == 2)
        rows = torch.block_diag(*base.rows.split(size, dim=1))
        problem = Quadratic(rows, base.center, base.ridge, base.step, base.gradient)
        torch.testing.assert_close(solve_block(problem, 7, [12], size).weights, solve_bso(problem, 7).weights)


def test_blocks_never_do_worse_than_leaving_the_kept_weights_alone() -> None:
    for problem in mixed(12, n=20, p=60):
        support = solve_bso(problem, 30).support
        for size in (5, 60):
            solution = solve_block(problem, 30, [40, 20], size)
            assert torch.equal(solution.support, support)
            assert solution.objective <= naive_value(problem, problem.center * support) + 1e-9


# --- bad input --------------------------------------------------------------------------------------------------


def test_a_row_that_is_not_finite_is_named() -> None:
    rows = torch.ones(4, 3)
    rows[2, 1] = torch.nan
    with pytest.raises(ValueError, match="row 2"):
        Quadratic(rows, torch.ones(3), 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.ones(0, 3)}, "at least one row"),
        ({"rows": torch.ones(2, 3, dtype=torch.long)}, "float32, float64 or bfloat16"),
        ({"ridge": 0.0}, "`ridge` must be a finite number above 0, got 0.0"),
        ({"step": -1.0}, "`step` must be finite and >= 0, got -1.0"),
        ({"center": torch.ones(4)}, r"`center` must have shape \(3,\)"),
        ({"center": torch.tensor([1.0, torch.inf, 0.0])}, "`center` must be finite"),
        ({"gradient": torch.ones(2)}, r"`gradient` must have shape \(3,\)"),
        ({"alive": torch.ones(2, dtype=torch.bool)}, r"`alive` must have shape \(3,\)"),
        ({"gram": torch.ones(3, 3)}, r"`gram` must have shape \(2, 2\)"),
        ({"chunk": 0}, "`chunk` must be >= 1 column, got 0"),
    ],
)
def test_a_problem_that_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quadratic(**{"rows": torch.ones(2, 3), "center": torch.ones(3), "ridge": 0.1} | change)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_more_weights_than_are_alive_are_refused(solver) -> None:
    problem = Quadratic(torch.ones(2, 4), torch.ones(4), 0.1, alive=torch.tensor([True, True, False, True]))
    with pytest.raises(ValueError, match=r"`k` must lie in \[0, 3\], the number of weights alive, got 4"):
        solver(problem, 4)


@pytest.mark.parametrize("k", [3, 20])
def test_a_ridge_below_the_precision_is_refused_with_advice(k: int) -> None:
    rows = torch.full((6, 30), 1e8)
    problem = Quadratic(rows, torch.ones(30), 1e-30)
    with pytest.raises(ValueError, match="larger `ridge`"):
        solve_support(problem, random_mask(30, k, 0))
    with pytest.raises(ValueError, match="larger `ridge`"):
        solve_block(problem, k, [30], 30)


def test_an_overflowing_solution_is_refused_with_advice() -> None:
    problem = Quadratic(torch.zeros(2, 5), torch.ones(5), 1e-38, 1.0, torch.full((5,), 1e30))
    for solve in (
        lambda: solve_support(problem, random_mask(5, 3, 0)),
        lambda: solve_block(problem, 3, [5], 5),
    ):
        with pytest.raises(ValueError, match=r"not finite.*larger `ridge`"):
            solve()


def test_sizes_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="`sizes` must add up to the 12 weights of `rows`, got 11"):
        solve_block(draw(0), 3, [5, 6])


@pytest.mark.parametrize(
    ("sizes", "size", "name"), [([4], 0, "`block_size` must be >= 1"), ([4, 0], 2, "`sizes` must be >= 1")]
)
def test_empty_blocks_are_refused(sizes: list[int], size: int, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        block_bounds(sizes, size)
