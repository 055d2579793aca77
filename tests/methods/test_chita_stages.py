"""Stage schedules, one stage of pruning, and the refits between stages, on toys whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from chita_oracles import draw, hessian, random_mask, slope
from torch import Tensor

from lightning_prune.methods._chita_exact import support_system
from lightning_prune.methods._chita_problem import Quadratic, keep_largest, relative_ridge
from lightning_prune.methods._chita_refit import Metric, RefitSettings, line_search, refit
from lightning_prune.methods._chita_solver import solve_bso, solve_iht
from lightning_prune.methods._chita_stages import (
    SCHEDULES,
    Stage,
    StageSettings,
    gradient_scale,
    run_stage,
    run_stages,
    stage_sparsities,
)

PLAIN = RefitSettings(count=0)


# --- schedules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("exp", [0.1, 0.633333333, 0.9]),
        ("poly", [0.1, 0.8, 0.9]),
        ("linear", [0.1, 0.5, 0.9]),
        ("const", [0.9, 0.9, 0.9]),
        ("mfac", [0.567325, 0.791992, 0.9]),
    ],
)
def test_three_stages_from_a_tenth_to_nine_tenths(schedule: str, expected: list[float]) -> None:
    # mfac by hand: 1 - 0.9 (1/9)^(1/3) = 0.567325, 1 - 0.9 (1/9)^(2/3) = 0.791992
    assert stage_sparsities(schedule, 3, 0.9, start=0.1) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sparsity_never_falls_and_ends_at_the_target_exactly(schedule: str) -> None:
    for stages in (1, 2, 5, 15, 60):
        for sparsity in (0.0, 0.05, 0.3, 0.98):
            levels = stage_sparsities(schedule, stages, sparsity, start=0.1, polish=2)
            assert levels == sorted(levels)
            assert len(levels) == stages + 2
            assert levels[-3:] == [sparsity] * 3
            assert min(levels) >= min(0.1, sparsity) - 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cubic", 3, 0.9), "`schedule` must be one of 'exp'"),
        (("exp", 0, 0.9), "`stages` must be an integer >= 1, got 0"),
        (("exp", 3, 1.0), r"`sparsity` must be in \[0, 1\), got 1.0"),
        (("exp", 3, 0.9, 1.5), r"`start` must be in \[0, 1\), got 1.5"),
        (("exp", 3, 0.9, 0.1, -1), "`polish` must be an integer >= 0, got -1"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage_sparsities(*arguments)


# --- refits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [3, 8, 9, 40, 60])
def test_the_metric_applies_the_dense_inverse_on_the_support(k: int) -> None:
    # p = 60, n = 8: primal below 8; above, columns are copied up to 60 / 8 and read in place beyond
    for p in (60, 400):
        problem = draw(k, p=p, step=0.3)
        support = random_mask(p, k, k)
        gradient = torch.randn(p, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        expected = torch.zeros(p, dtype=torch.float64)
        own = Quadratic(problem.rows, problem.center, problem.ridge, 0.3, gradient)
        expected[support] = -torch.linalg.solve(hessian(problem)[support][:, support], slope(own)[support])
        torch.testing.assert_close(Metric(problem, support_system(problem, support)).direction(gradient), expected)


class Bowl:
    """1/2 (w - target)^T D (w - target) + 1 with D diagonal: its loss, and its gradient without noise."""

    def __init__(self, target: Tensor, stiffness: Tensor) -> None:
        self.target, self.stiffness, self.calls = target, stiffness, 0

    def loss(self, weights: Tensor) -> float:
        return float(0.5 * (self.stiffness * (weights - self.target).square()).sum()) + 1.0

    def gradient(self, weights: Tensor) -> tuple[float, Tensor]:
        self.calls += 1
        return self.loss(weights), self.stiffness * (weights - self.target)


BOWL = (torch.tensor([1.0, -2.0, 3.0, 0.5]), torch.tensor([1.0, 4.0, 0.25, 2.0]))


def test_one_refit_in_the_true_metric_reaches_the_minimum_on_the_support() -> None:
    bowl, support = Bowl(*BOWL), torch.tensor([True, False, True, True])
    once = RefitSettings(count=1, length=1.0, average=False)
    done = refit(torch.zeros(4), lambda g: -g / bowl.stiffness * support, bowl.gradient, bowl.loss, once)
    torch.testing.assert_close(done.weights, bowl.target * support)
    assert (done.length, done.troubles, bowl.calls) == (1.0, 0, 1)


@pytest.mark.parametrize("guess", [1.0, 0.01, 30.0])
def test_refits_in_a_metric_that_is_far_off_still_descend_on_the_support(guess: float) -> None:
    bowl, support = Bowl(*BOWL), torch.tensor([True, False, True, True])
    settings = RefitSettings(count=60, momentum=0.5)
    done = refit(torch.zeros(4), lambda g: -100 * g * support, bowl.gradient, bowl.loss, settings, guess)
    torch.testing.assert_close(done.weights, bowl.target * support, rtol=0.05, atol=0.05)
    assert float(done.weights[1]) == 0.0


@pytest.mark.parametrize(
    ("count", "average", "expected"), [(1, True, 1.0), (4, True, 3.5), (5, True, 4.0), (5, False, 5.0)]
)
def test_the_second_half_of_the_steps_is_averaged(count: int, average: bool, expected: float) -> None:
    # a constant slope of 1 along which the loss always falls by little: every step has the length 1 of the line search
    settings = RefitSettings(count=count, momentum=0.0, length=1.0, final_length=1.0, average=average)
    losses = {1.0: -1.0, 0.0: 0.0}  # anything but the first guess is worse
    done = refit(
        torch.zeros(1),
        lambda g: g,
        lambda w: (1.0, torch.ones(1)),
        lambda w: losses.get(float(w), 1.0),
        settings,
    )
    assert float(done.weights) == expected


def test_momentum_and_falling_length_follow_their_formula() -> None:
    # lengths 1, 0.75, 0.5, 0.25 and v <- v / 2 + length: 1, 1.25, 1.125, 0.8125
    settings = RefitSettings(count=4, momentum=0.5, length=1.0, final_length=0.0, average=False)
    losses = {1.0: -1.0, 0.0: 0.0}
    done = refit(
        torch.zeros(1),
        lambda g: g,
        lambda w: (1.0, torch.ones(1)),
        lambda w: losses.get(float(w), 1.0),
        settings,
    )
    assert float(done.weights) == pytest.approx(1 + 1.25 + 1.125 + 0.8125)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 50.0])
def test_a_batch_far_above_the_best_takes_the_good_weights_back(bad: float) -> None:
    bowl = Bowl(*BOWL)

    def gradient(weights: Tensor) -> tuple[float, Tensor]:
        value, slope_ = bowl.gradient(weights)
        return (bad, slope_ * math.nan) if bowl.calls == 5 else (value, slope_)

    settings = RefitSettings(count=30, momentum=0.0, length=1.0)
    done = refit(torch.zeros(4), lambda g: -0.2 * g, gradient, bowl.loss, settings)
    assert done.troubles == 1
    assert bowl.loss(done.weights) < bowl.loss(torch.zeros(4))


def test_a_loss_that_explodes_every_time_ends_where_it_began() -> None:
    values = iter([1.0] + [9.0] * 50)
    settings = RefitSettings(count=20, average=False)
    start = torch.ones(2)
    done = refit(start, lambda g: -g, lambda w: (next(values), torch.ones(2)), lambda w: 1.0, settings)
    assert torch.equal(done.weights, start)
    assert done.troubles == 19


def test_no_refits_leave_the_weights_and_ask_for_no_gradient() -> None:
    done = refit(torch.ones(2), lambda g: g, lambda w: pytest.fail("asked"), lambda w: 0.0, PLAIN, guess=0.5)
    assert done.weights.tolist() == [1.0, 1.0]
    assert done.length == 0.5


@pytest.mark.parametrize(("best", "guess"), [(1.0, 1.0), (8.0, 1.0), (0.0625, 1.0), (2.0, 0.125)])
def test_the_line_search_finds_the_power_of_two_at_the_minimum(best: float, guess: float) -> None:
    found = line_search(torch.zeros(1), torch.ones(1), lambda w: (float(w) - best) ** 2 if w < 100 else math.nan, guess)
    assert found == best


def test_the_line_search_keeps_the_guess_where_nothing_lowers_the_loss() -> None:
    assert line_search(torch.zeros(1), torch.ones(1), lambda w: float(w), guess=2.0) == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": -1}, "`count` must be an integer >= 0"),
        ({"ridge": 0.0}, "`ridge` must be a finite number above 0"),
        ({"momentum": 1.0}, r"`momentum` must be in \[0, 1\)"),
        ({"length": 0.0}, "`length` must be a finite number above 0"),
        ({"final_length": 1.5}, r"`final_length` must be in \[0, 1\], got 1.5"),
    ],
)
def test_refit_settings_out_of_range_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RefitSettings(**change)


# --- one stage --------------------------------------------------------------------------------------------------


def stage_of(problem: Quadratic, k: int, samples: int = 4, loss: Callable[[Tensor], float] = lambda w: 0.0, **settings):
    given = StageSettings(**{"metric": 0.0, "refit": PLAIN} | settings)
    rows = problem.rows.clone()
    unused = pytest.fail
    return run_stage(
        problem.center, k, rows, samples, unused, loss, given, problem.alive, mean_gradient=problem.gradient
    )


@pytest.mark.parametrize(("algorithm", "solver"), [("bso", solve_bso), ("iht", solve_iht)])
@pytest.mark.parametrize("own", [False, True])
def test_a_stage_without_metric_and_refits_is_the_solver(algorithm: str, solver, own: bool) -> None:
    base = draw(4, own=own)
    ridge = relative_ridge(base.rows, 1e-3)
    problem = Quadratic(base.rows, base.center, ridge, 0.25, base.gradient)
    stage, solution = stage_of(problem, 5, ridges=(1e-3,), algorithm=algorithm), solver(problem, 5)
    torch.testing.assert_close(stage.weights, solution.weights)
    assert torch.equal(stage.support, solution.support)
    assert stage.movement == pytest.approx(solution.movement)
    assert stage.ridge == 1e-3


def test_without_the_first_order_term_a_stage_only_repairs() -> None:
    problem = draw(4)
    expected = solve_bso(Quadratic(problem.rows, problem.center, relative_ridge(problem.rows, 1e-3)), 5)
    stage = stage_of(problem, 5, ridges=(1e-3,), first_order=False)
    torch.testing.assert_close(stage.weights, expected.weights)


def test_the_ridge_with_the_lowest_calibration_loss_is_taken() -> None:
    problem, ridges = draw(4), (1e-3, 1e-1, 10.0)
    each = [stage_of(problem, 5, ridges=(ridge,), first_order=False).weights for ridge in ridges]
    for wanted, weights in zip(ridges, each, strict=True):
        near = lambda w, goal=weights: float((w - goal).norm())  # noqa: E731
        stage = stage_of(problem, 5, ridges=ridges, first_order=False, loss=near)
        assert stage.ridge == wanted
        torch.testing.assert_close(stage.weights, weights)
        assert stage.solved_loss == pytest.approx(0.0, abs=1e-9)


def test_a_calibration_loss_that_is_not_finite_is_never_taken() -> None:
    problem = draw(4)
    values = iter([math.nan, 3.0, math.inf])
    stage = stage_of(problem, 5, ridges=(1e-3, 1e-1, 10.0), shares=(1.0,), loss=lambda w: next(values))
    assert stage.ridge == 1e-1


@pytest.mark.parametrize("own", [False, True])
def test_the_share_of_the_first_order_step_is_chosen_by_calibration_loss(own: bool) -> None:
    problem = draw(4, own=own)
    full, none = (stage_of(problem, 12, first_order=first).weights for first in (True, False))
    for share in (1.0, 0.25, 0.0):
        goal = none + share * (full - none)
        stage = stage_of(problem, 12, loss=lambda w, goal=goal: float((w - goal).norm()))
        assert stage.share == share
        torch.testing.assert_close(stage.weights, goal)


@pytest.mark.parametrize("refits", [PLAIN, RefitSettings(count=3)])
def test_in_units_of_the_gradients_the_scale_of_a_layer_does_not_matter(refits: RefitSettings) -> None:
    for seed in range(5):
        problem, sizes = draw(seed), torch.tensor([5.0] * 6 + [0.2] * 6, dtype=torch.float64)
        pull = torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        settings = StageSettings(metric=1.0, refit=refits)

        def run(unit: Tensor, problem=problem, settings=settings, pull=pull) -> Stage:
            # the same function of w / unit, so gradients are divided by the unit
            def gradient(w: Tensor) -> tuple[float, Tensor]:
                return loss(w), (w / unit - pull) / unit

            def loss(w: Tensor) -> float:
                return float(0.5 * (w / unit - pull).square().sum())

            return run_stage(problem.center * unit, 5, problem.rows / unit, 4, gradient, loss, settings)

        one, other = run(torch.ones(12, dtype=torch.float64)), run(sizes)
        assert torch.equal(one.support, other.support)
        torch.testing.assert_close(other.weights, one.weights * sizes)


def test_the_gradient_scale_is_the_normalised_size_of_each_column_to_a_power() -> None:
    rows = torch.tensor([[3.0, 1.0, 0.0], [4.0, 1.0, 0.0]])
    # column norms 5, sqrt 2, 0; their mean 2.138; the last is floored at a hundredth of it
    sizes = torch.tensor([5.0, 2**0.5, 0.0]) / ((5 + 2**0.5) / 3)
    expected = sizes.clamp_min(0.01) ** 0.5
    torch.testing.assert_close(gradient_scale(rows, 0.5), expected / expected.mean())
    assert gradient_scale(rows, 0.0) is None
    assert gradient_scale(torch.zeros(2, 3), 0.5) is None


def test_a_stage_keeps_the_count_respects_the_dead_and_reports_returns() -> None:
    problem = draw(7)
    alive = random_mask(12, 9, 1)
    center = problem.center * alive
    center[alive.nonzero()[0]] = 0.0
    for k in (0, 4, 9):
        stage = stage_of(Quadratic(problem.rows, center, 1.0, alive=alive), k)
        assert int(stage.support.sum()) == k
        assert not (stage.support & ~alive).any()
        assert not stage.weights[~stage.support].any()
        assert stage.returned == int(k == 9)  # the ninth weight alive is the one that was 0
    with pytest.raises(ValueError, match=r"`k` must lie in \[0, 9\]"):
        stage_of(Quadratic(problem.rows, center, 1.0, alive=alive), 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ridges": ()}, "`ridges` must hold at least one ridge"),
        ({"ridges": (1e-3, 0.0)}, "`ridges` must be a finite number above 0"),
        ({"metric": -0.1}, r"`metric` must be in \[0, 1\], got -0.1"),
        ({"shares": ()}, r"`shares` must hold values in \[0, 1\], got \(\)"),
        ({"shares": (1.0, 2.0)}, r"`shares` must hold values in \[0, 1\], got"),
        ({"algorithm": "cd"}, "`algorithm` must be one of 'bso', 'iht'"),
    ],
)
def test_stage_settings_out_of_range_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StageSettings(**change)


# --- many stages on a small classifier --------------------------------------------------------------------------


class SoftmaxRegression:
    """Ten features, of which three matter, and four classes; gradients by hand, batches by a generator."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(2000, 10, generator=generator)
        truth = torch.zeros(4, 10)
        truth[:, :3] = 2 * torch.randn(4, 3, generator=generator)
        self.y = (self.x @ truth.T + torch.randn(2000, 4, generator=generator)).argmax(1)
        self.generator = generator
        self.start = truth + 0.7 * torch.randn(4, 10, generator=generator)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        index = torch.randint(1000, (count,), generator=self.generator)
        return self.x[index], self.y[index]

    def loss(self, weights: Tensor, part: slice = slice(1000, None)) -> float:
        return float(torch.nn.functional.cross_entropy(self.x[part] @ weights.view(4, 10).T, self.y[part]))

    def rows(self, weights: Tensor) -> Tensor:
        x, y = self.draw(120)
        error = (x @ weights.view(4, 10).T).softmax(1) - torch.nn.functional.one_hot(y, 4)
        return (error[:, :, None] * x[:, None]).flatten(1).view(30, 4, 40).mean(1)

    def gradient(self, weights: Tensor) -> tuple[float, Tensor]:
        x, y = self.draw(200)
        logits = x @ weights.view(4, 10).T
        error = logits.softmax(1) - torch.nn.functional.one_hot(y, 4)
        return float(torch.nn.functional.cross_entropy(logits, y)), (error.T @ x).flatten() / 200


def final_loss(task: SoftmaxRegression, stages: int, refits: int) -> tuple[float, list[Stage]]:
    settings = StageSettings(ridges=(1e-3, 1e-2, 1e-1), refit=RefitSettings(count=refits))
    levels = stage_sparsities("exp", stages, 0.8)
    done = list(run_stages(task.start.flatten(), levels, task.rows, 4, task.gradient, task.loss, settings))
    return task.loss(done[-1].weights), done


def test_stages_keep_their_counts_and_more_of_them_with_refits_lose_least() -> None:
    totals = torch.zeros(4)
    for seed in range(6):
        task = SoftmaxRegression(seed)
        weights = task.start.flatten()
        magnitude = task.loss(weights * keep_largest(weights.abs(), 8))
        one, many, fitted = (final_loss(task, *plan) for plan in ((1, 0), (8, 0), (8, 20)))
        assert [int(stage.support.sum()) for stage in many[1]][-1] == 8
        assert all(torch.equal(stage.weights != 0, stage.support) for stage in many[1] + fitted[1])
        totals += torch.tensor([magnitude, one[0], many[0], fitted[0]])
    magnitude_loss, one_loss, many_loss, fitted_loss = totals.tolist()
    assert fitted_loss < many_loss < one_loss
    assert many_loss < magnitude_loss


def test_stages_start_where_the_last_one_ended() -> None:
    task, seen = SoftmaxRegression(0), []

    def rows(weights: Tensor) -> Tensor:
        seen.append(weights.clone())
        return task.rows(weights)

    plan = (task.start.flatten(), [0.5, 0.8], rows, 4, task.gradient, task.loss, StageSettings(refit=PLAIN))
    first, last = run_stages(*plan)
    assert torch.equal(seen[0], task.start.flatten())
    assert torch.equal(seen[1], first.weights)
    assert int(last.support.sum()) == 8
