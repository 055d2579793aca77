"""Stage schedules, one stage of pruning, and the refits between stages, on toys whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from chita_oracles import draw, hessian, naive_solve, random_mask
from torch import Tensor

from lightning_prune.methods._chita_obs import inverse_diagonal, obs_support, single_updates
from lightning_prune.methods._chita_problem import Quadratic, keep_largest, relative_ridge
from lightning_prune.methods._chita_refit import Moments, RefitSettings, Refitter, kept_sizes, refit_counts
from lightning_prune.methods._chita_solver import solve_block, solve_bso, solve_iht
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


class Bowl:
    """1/2 (w - target)^T D (w - target) + 1 with D diagonal: its loss, and its gradient without noise."""

    def __init__(self) -> None:
        self.target, self.stiffness = torch.tensor([1.0, -2.0, 3.0, 0.5]), torch.tensor([1.0, 4.0, 0.25, 2.0])
        self.calls = 0

    def loss(self, weights: Tensor) -> float:
        return float(0.5 * (self.stiffness * (weights - self.target).square()).sum()) + 1.0

    def gradient(self, weights: Tensor) -> tuple[float, Tensor]:
        self.calls += 1
        return self.loss(weights), self.stiffness * (weights - self.target)


START, SUPPORT = torch.tensor([2.0, 0.0, 1.0, 2.0]), torch.tensor([True, False, True, True])


def refitted(settings: RefitSettings, bowl: Bowl, stages: int = 1, **change: Any) -> tuple[Tensor, Refitter]:
    refitter = Refitter(settings, [4], stages)
    given = {"gradient": bowl.gradient, "loss": bowl.loss} | change
    return refitter.refit(START, SUPPORT, given["gradient"], given["loss"], given["loss"](START)), refitter


@pytest.mark.parametrize(
    ("count", "stages", "expected"),
    [(600, 1, [600]), (600, 4, [100, 100, 100, 300]), (7, 3, [1, 1, 5]), (0, 2, [0, 0])],
)
def test_half_of_the_steps_follow_the_last_stage(count: int, stages: int, expected: list[int]) -> None:
    assert refit_counts(count, stages) == expected


def test_the_direction_is_that_of_adam() -> None:
    weights = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer = torch.optim.Adam([weights], lr=0.1, betas=(0.8, 0.99), eps=1e-12)
    moments, mine = Moments(weights.detach(), 0.8, 0.99), weights.detach().clone()
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        weights.grad = torch.randn(3, generator=generator)
        optimizer.step()
        mine -= 0.1 * moments.direction(weights.grad)
        torch.testing.assert_close(mine, weights.detach())


def test_a_weight_without_gradient_does_not_move() -> None:
    assert Moments(torch.ones(2), 0.9, 0.999).direction(torch.tensor([0.0, 1.0])).tolist() == [0.0, pytest.approx(1.0)]


def test_a_copy_of_the_moments_goes_its_own_way() -> None:
    moments = Moments(torch.zeros(1), 0.5, 0.5)
    moments.direction(torch.ones(1))
    other = moments.copy()
    other.direction(torch.tensor([-4.0]))
    assert (moments.steps, other.steps) == (1, 2)
    assert (float(moments.mean), float(moments.square)) == (0.5, 0.5)


def test_sizes_are_those_of_the_kept_weights_of_each_tensor() -> None:
    weights = torch.tensor([3.0, 0.0, 4.0, 0.0, 0.0, -2.0])
    support = torch.tensor([True, False, True, True, False, True])
    # sqrt((9 + 16) / 2) in the first tensor, sqrt((0 + 4) / 2) in the second
    expected = [12.5**0.5, 0.0, 12.5**0.5, 2**0.5, 0.0, 2**0.5]
    assert kept_sizes(weights, support, [3, 3]).tolist() == pytest.approx(expected)
    assert kept_sizes(weights * 0, support * False, [3, 3]).tolist() == [0.0] * 6


def test_steps_fall_linearly_from_the_length_in_units_of_the_weights() -> None:
    # a constant gradient: every direction is 1, so the lengths 1, 3/4, 1/2, 1/4 of 0.1 rms add up to 0.25 rms
    settings = RefitSettings(count=4, momentum=0.0, length=0.1)
    done, _ = refitted(settings, Bowl(), gradient=lambda w: (1.0, torch.ones(4)), loss=lambda w: 1.0)
    rms = ((4 + 1 + 4) / 3) ** 0.5
    torch.testing.assert_close(done, (START - 0.25 * rms) * SUPPORT)


def test_refits_reach_the_minimum_on_the_support() -> None:
    bowl = Bowl()
    done, refitter = refitted(RefitSettings(count=300), bowl)
    torch.testing.assert_close(done, bowl.target * SUPPORT, rtol=0.02, atol=0.02)
    assert (bowl.calls, refitter.troubles) == (300, 0)


def test_the_length_falls_over_all_stages_and_moments_go_on() -> None:
    settings, lengths = RefitSettings(count=4, length=0.1, momentum=0.0), []
    refitter, weights = Refitter(settings, [1], 2), torch.ones(1)
    for _ in range(2):
        before = weights.clone()
        weights = refitter.refit(
            weights, torch.ones(1, dtype=torch.bool), lambda w: (1.0, torch.ones(1)), lambda w: 1.0, 1.0
        )
        lengths.append(float((before - weights) / before))
    assert lengths == pytest.approx([0.1 * (1 + 0.75), 0.1 * (0.5 + 0.25)])
    assert refitter._moments is not None
    assert refitter._moments.steps == 4


def test_steps_that_raise_the_loss_are_taken_back_and_tried_half_as_long() -> None:
    bowl = Bowl()
    # from the minimum every step leads up; 12 steps of full length far, of a quarter hardly
    limit = bowl.loss(bowl.target * SUPPORT) + 1e-9
    refitter = Refitter(RefitSettings(count=12), [4], 1)
    done = refitter.refit(bowl.target * SUPPORT, SUPPORT, lambda w: (1.0, torch.ones(4)), bowl.loss, limit)
    assert bowl.loss(done) <= limit
    assert torch.equal(done, bowl.target * SUPPORT)
    assert refitter.troubles == 3
    assert refitter.length == pytest.approx(0.1 / 8)
    assert refitter._moments is None or refitter._moments.steps == 0


def test_between_stages_the_loss_may_rise_by_the_noise_of_long_steps() -> None:
    for stages, moved in ((1, False), (2, True)):
        losses = iter([1.0] + [1.9] * 9)
        settings = RefitSettings(count=4)
        done, _ = refitted(settings, Bowl(), stages, loss=lambda w, losses=losses: next(losses))
        assert bool((done != START).any()) is moved


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_without_a_finite_loss_ends_the_try(bad: float) -> None:
    bowl = Bowl()

    def gradient(weights: Tensor) -> tuple[float, Tensor]:
        value, slope_ = bowl.gradient(weights)
        return (bad, slope_ * math.nan) if bowl.calls == 5 else (value, slope_)

    done, refitter = refitted(RefitSettings(count=100), bowl, gradient=gradient)
    assert refitter.troubles == 1
    assert bowl.loss(done) < bowl.loss(START)
    assert torch.isfinite(done).all()


def test_no_refits_leave_the_weights_and_ask_for_no_gradient() -> None:
    done, _ = refitted(PLAIN, Bowl(), gradient=lambda w: pytest.fail("asked"))
    assert torch.equal(done, START)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": -1}, "`count` must be an integer >= 0"),
        ({"length": 0.0}, "`length` must be a finite number above 0"),
        ({"last": 1.0}, r"`last` must be in \[0, 1\)"),
        ({"momentum": 1.0}, r"`momentum` must be in \[0, 1\)"),
        ({"memory": -0.1}, r"`memory` must be in \[0, 1\)"),
    ],
)
def test_refit_settings_out_of_range_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RefitSettings(**change)


# --- one stage --------------------------------------------------------------------------------------------------


def stage_of(problem: Quadratic, k: int, samples: int = 4, loss: Callable[[Tensor], float] = lambda w: 0.0, **settings):
    given = StageSettings(**{"metric": 0.0, "shares": (1.0,), "ridges": (1e-3,)} | settings)
    rows = problem.rows.clone()
    return run_stage(problem.center, k, rows, samples, loss, given, problem.alive, mean_gradient=problem.gradient)


@pytest.mark.parametrize(
    ("algorithm", "solver"),
    [("bso", solve_bso), ("iht", solve_iht), ("block", lambda problem, k: solve_block(problem, k, [12]))],
)
@pytest.mark.parametrize("own", [False, True])
def test_a_stage_without_metric_and_choice_is_the_solver(algorithm: str, solver, own: bool) -> None:
    base = draw(4, own=own)
    ridge = relative_ridge(base.rows, 1e-3)
    problem = Quadratic(base.rows, base.center, ridge, 0.25, base.gradient)
    stage, solution = stage_of(problem, 5, ridges=(1e-3,), algorithm=algorithm), solver(problem, 5)
    torch.testing.assert_close(stage.weights, solution.weights)
    assert torch.equal(stage.support, solution.support)
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
        assert stage.loss == pytest.approx(0.0, abs=1e-9)


def test_a_calibration_loss_that_is_not_finite_is_never_taken() -> None:
    problem = draw(4)
    values = iter([math.nan, 3.0, math.inf])
    stage = stage_of(problem, 5, ridges=(1e-3, 1e-1, 10.0), shares=(1.0,), loss=lambda w: next(values))
    assert stage.ridge == 1e-1


@pytest.mark.parametrize("own", [False, True])
def test_the_share_of_the_first_order_step_is_chosen_by_calibration_loss(own: bool) -> None:
    problem, shares = draw(4, own=own), (1.0, 0.25, 0.0)
    full, none = (stage_of(problem, 12, first_order=first).weights for first in (True, False))
    for share in shares:
        goal = none + share * (full - none)
        stage = stage_of(problem, 12, shares=shares, loss=lambda w, goal=goal: float((w - goal).norm()))
        assert stage.share == share
        torch.testing.assert_close(stage.weights, goal)


@pytest.mark.parametrize(("rise", "larger"), [(0.0, 0), (1e3, 2)])
def test_a_loss_far_above_what_the_quadratic_expects_asks_for_larger_ridges(rise: float, larger: int) -> None:
    problem, seen = draw(4), []

    def loss(weights: Tensor) -> float:
        if torch.equal(weights, problem.center):
            return 1.0
        seen.append(weights)
        return 1.0 + rise / len(seen)  # the last one asked about is the best

    stage = stage_of(problem, 5, ridges=(1e-3, 1e-2), first_order=False, loss=loss)
    assert len(seen) == 2 + larger
    assert stage.ridge == pytest.approx(1e-2 * 10**larger if rise else 1e-3)
    if larger:
        expected = stage_of(problem, 5, ridges=(1.0,), first_order=False)
        torch.testing.assert_close(stage.weights, expected.weights)


@pytest.mark.parametrize("own", [False, True])
def test_the_expected_rise_is_the_quadratic_per_sample(own: bool) -> None:
    problem, samples = draw(4, own=own), 4
    stage = stage_of(problem, 5, samples, ridges=(1e-3, 1e-2), loss=lambda w: float(w.norm()))
    move = stage.weights - problem.center
    rows = problem.rows
    gradient = rows.mean(0) if problem.gradient is None else problem.gradient
    # curvature: per-sample Fisher matrix, m / n of that of the rows
    expected = gradient @ move + 0.5 * samples / problem.n * (rows @ move).square().sum()
    assert stage.expected == pytest.approx(float(expected))


@pytest.mark.parametrize("refits", [0, 3])
def test_in_units_of_the_gradients_the_scale_of_a_layer_does_not_matter(refits: int) -> None:
    for seed in range(5):
        problem, sizes = draw(seed), torch.tensor([5.0] * 6 + [0.2] * 6, dtype=torch.float64)
        pull = torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        settings = StageSettings(metric=1.0, refit=RefitSettings(count=refits))

        def run(unit: Tensor, problem=problem, settings=settings, pull=pull) -> Stage:
            # the same function of w / unit, so gradients are divided by the unit
            def loss(w: Tensor) -> float:
                return float(0.5 * (w / unit - pull).square().sum())

            def gradient(w: Tensor) -> tuple[float, Tensor]:
                return loss(w), (w / unit - pull) / unit

            stage = run_stage(problem.center * unit, 5, problem.rows / unit, 4, loss, settings)
            weights = Refitter(settings.refit, [6, 6], 1).refit(stage.weights, stage.support, gradient, loss, math.inf)
            return replace(stage, weights=weights)

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
        ({"algorithm": "cd"}, "`algorithm` must be one of 'iht', 'bso', 'block', 'obs', 'woodfisher'"),
        ({"block_size": 0}, "`block_size` must be an integer >= 1, got 0"),
    ],
)
def test_stage_settings_out_of_range_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StageSettings(**change)


# --- scores of single weights ---------------------------------------------------------------------------------------


def test_the_diagonal_of_the_inverse_is_the_dense_one() -> None:
    for problem in (draw(0), draw(1, n=3, p=400), draw(2, n=30, p=12), draw(3, n=5, p=7, ridge=1e-6)):
        expected = torch.linalg.inv(hessian(problem)).diagonal()
        torch.testing.assert_close(inverse_diagonal(problem), expected, rtol=1e-6, atol=0.0)


def test_the_weight_whose_deletion_costs_least_goes_first() -> None:
    for seed in range(20):
        problem = draw(seed)
        costs = []
        for q in range(12):
            weights = naive_solve(problem, torch.arange(12) != q)
            move = weights - problem.center
            costs.append(float(0.5 * move @ hessian(problem) @ move))
        ranked = torch.tensor(costs).argsort()
        for k in (11, 7):
            assert set((~obs_support(problem, k)).nonzero().flatten().tolist()) == set(ranked[: 12 - k].tolist())


def test_dead_weights_never_return_by_their_scores() -> None:
    problem = draw(5)
    alive = random_mask(12, 7, 3)
    assert torch.equal(obs_support(problem.among(alive), 7), alive)


@pytest.mark.parametrize("step", [0.0, 0.25])
def test_single_updates_are_summed_by_the_formula(step: float) -> None:
    for seed in range(5):
        problem, support = draw(seed, step=step), random_mask(12, 8, seed)
        inverse, expected = torch.linalg.inv(hessian(problem)), problem.center.clone()
        for q in (~support).nonzero().flatten():
            expected -= problem.center[q] * inverse[:, q] / inverse[q, q]
        torch.testing.assert_close(single_updates(problem, support), expected * support)


def test_one_deleted_weight_is_the_exact_solve() -> None:
    problem = draw(6)
    support = torch.arange(12) != 3
    torch.testing.assert_close(single_updates(problem, support), naive_solve(problem, support))


def test_scores_refuse_a_gram_matrix_that_is_not_positive() -> None:
    same_rows = Quadratic(torch.ones(3, 5), torch.ones(5), ridge=1e-300)
    with pytest.raises(ValueError, match=r"is not positive. Choose a larger `ridge`"):
        inverse_diagonal(same_rows)


def test_the_stage_takes_scores_with_the_exact_solve_or_with_single_updates() -> None:
    base = draw(4)
    problem = Quadratic(base.rows, base.center, relative_ridge(base.rows, 1e-3))
    support = obs_support(problem, 5)
    joint, single = (stage_of(problem, 5, algorithm=name, first_order=False) for name in ("obs", "woodfisher"))
    assert torch.equal(joint.support, support)
    assert torch.equal(single.support, support)
    torch.testing.assert_close(joint.weights, naive_solve(problem, support))
    torch.testing.assert_close(single.weights, single_updates(problem, support))


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

    def rows(self, weights: Tensor) -> tuple[Tensor, int]:
        x, y = self.draw(120)
        error = (x @ weights.view(4, 10).T).softmax(1) - torch.nn.functional.one_hot(y, 4)
        return (error[:, :, None] * x[:, None]).flatten(1).view(30, 4, 40).mean(1), 4

    def gradient(self, weights: Tensor) -> tuple[float, Tensor]:
        x, y = self.draw(200)
        logits = x @ weights.view(4, 10).T
        error = logits.softmax(1) - torch.nn.functional.one_hot(y, 4)
        return float(torch.nn.functional.cross_entropy(logits, y)), (error.T @ x).flatten() / 200


def final_loss(task: SoftmaxRegression, stages: int, refits: int) -> tuple[float, list[Stage]]:
    settings = StageSettings(ridges=(1e-3, 1e-2, 1e-1), refit=RefitSettings(count=refits))
    levels = stage_sparsities("exp", stages, 0.8)
    done = list(run_stages(task.start.flatten(), levels, task.rows, task.gradient, task.loss, settings))
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

    def rows(weights: Tensor) -> tuple[Tensor, int]:
        seen.append(weights.clone())
        return task.rows(weights)

    plan = (task.start.flatten(), [0.5, 0.8], rows, task.gradient, task.loss, StageSettings(refit=PLAIN))
    first, last = run_stages(*plan)
    assert torch.equal(seen[0], task.start.flatten())
    assert torch.equal(seen[1], first.weights)
    assert int(last.support.sum()) == 8


def test_a_stage_that_does_worse_than_the_largest_weights_gives_way_to_them() -> None:
    task = SoftmaxRegression(0)
    start = task.start.flatten()
    kept = keep_largest(start.abs(), 8)

    def loss(weights: Tensor) -> float:
        return 1.0 if torch.equal(weights, start * kept) else 2.0

    (stage,) = run_stages(start, [0.8], task.rows, task.gradient, loss, StageSettings(refit=PLAIN))
    assert torch.equal(stage.weights, start * kept)
    assert torch.equal(stage.support, kept)
    assert math.isnan(stage.ridge)


def test_the_gradient_of_a_batch_of_its_own_is_asked_for_at_the_weights_of_each_stage() -> None:
    task, seen = SoftmaxRegression(0), []

    def mean(weights: Tensor) -> Tensor:
        seen.append(weights.clone())
        return task.gradient(weights)[1]

    plan = (task.start.flatten(), [0.5, 0.8], task.rows, task.gradient, task.loss)
    stages = list(run_stages(*plan, StageSettings(refit=PLAIN), mean=mean))
    assert torch.equal(seen[1], stages[0].weights)
    list(run_stages(*plan, StageSettings(refit=PLAIN, first_order=False), mean=mean))
    assert len(seen) == 2
