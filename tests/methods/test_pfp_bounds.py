"""PFP without a network: the hand case of the sensitivities, sampling, bounds, budgets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from methods.pfp_oracles import naive_shares
from torch import Tensor, nn

from lightning_prune.methods._pfp_bounds import (
    bernstein_error,
    calibration_samples,
    draws_for_distinct,
    draws_for_error,
    error_of_draws,
    expected_distinct,
    log_events,
    upper_rate,
)
from lightning_prune.methods._pfp_budgets import Demand, allocate, counts_at
from lightning_prune.methods._pfp_kernel import Reader, dropped_mass, error_moments, unit_shares
from lightning_prune.methods._pfp_sampling import choose, inclusion_probabilities, systematic

HAND = tuple[Tensor, Tensor]
INPUTS = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 1.0]], dtype=torch.float64)


def linear(rows: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), dtype=torch.float64)
    layer.weight.data = torch.tensor(rows, dtype=torch.float64)
    return layer


def shares(layer: nn.Module, inputs: Tensor, mode: str = "abs", **options: Any) -> Tensor:
    units = torch.arange(layer.weight.shape[1])[:, None]
    return unit_shares(*Reader.of(layer, units).events(inputs), mode, **options)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# sensitivities, by hand


@pytest.mark.parametrize("mode", ["abs", "split"])
def test_the_hand_case(mode: str) -> None:
    score = shares(linear([[1, 2, 3], [4, 0, 4]]), INPUTS, mode).amax(0)
    assert score.tolist() == pytest.approx([2 / 3, 1 / 3, 3 / 5], rel=1e-12)
    assert float(score.sum()) == pytest.approx(1.6, rel=1e-12)
    assert (score / score.sum()).tolist() == pytest.approx([0.41667, 0.20833, 0.375], abs=5e-6)


def test_signs_leave_absolute_sensitivities_and_saturate_split_ones() -> None:
    layer = linear([[1, -2, 3], [4, 0, -4]])
    assert shares(layer, INPUTS).amax(0).tolist() == pytest.approx([2 / 3, 1 / 3, 3 / 5], rel=1e-12)
    assert shares(layer, INPUTS, "split").amax(0).tolist() == [1.0, 1.0, 1.0]


def test_dropping_the_middle_unit_costs_its_sensitivity() -> None:
    reader = Reader.of(linear([[1, 2, 3], [4, 0, 4]]), torch.arange(3)[:, None])
    mass = dropped_mass(*reader.events(INPUTS), torch.tensor([True, False, True]))
    assert mass.shape == (2, 2, 1)
    assert float(mass[0, 0]) == pytest.approx(1 / 3, rel=1e-12)
    assert mass.flatten()[1:].tolist() == [0.0, 0.0, 0.0]


def test_the_mean_over_patches_is_taken_before_the_largest_output() -> None:
    tokens = INPUTS[None]  # one sample of two positions
    score = shares(linear([[1, 2, 3], [4, 0, 4]]), tokens, reduction="mean")[0]
    by_row = torch.tensor(
        [[(1 / 6 + 2 / 5) / 2, (1 / 3 + 0) / 2, (1 / 2 + 3 / 5) / 2], [(1 / 2 + 2 / 3) / 2, 0, 5 / 12]]
    )
    assert score.tolist() == pytest.approx(by_row.amax(0).tolist(), rel=1e-6)


# draws and distinct units


def test_draws_in_the_hand_case() -> None:
    odds = torch.tensor([2 / 3, 1 / 3, 3 / 5], dtype=torch.float64) / 1.6
    assert expected_distinct(odds, 2) == pytest.approx(1.6424, abs=5e-5)
    assert expected_distinct(odds, 3) == pytest.approx(2.0612, abs=5e-5)
    assert draws_for_distinct(odds, 2) == 3


def test_equal_units_need_the_draws_of_the_closed_form() -> None:
    assert draws_for_distinct(torch.full((64,), 1 / 64), 32) == 45
    assert math.ceil(math.log(64 / 32) / math.log(64 / 63)) == 45


def test_more_distinct_units_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`distinct` must be in \(0, 2\), .* got 2\. Keep all of them"):
        draws_for_distinct(torch.tensor([0.5, 0.5, 0.0]), 2)


def test_certain_and_impossible_units_are_counted_exactly() -> None:
    assert expected_distinct(torch.tensor([1.0, 0.0]), 5) == 1.0
    assert expected_distinct(torch.tensor([0.5, 0.5]), 0) == 0.0


# bounds


def test_the_bound_of_the_hand_case() -> None:
    log_term = log_events(4, 0.05)
    assert log_term == pytest.approx(5.0752, abs=5e-5)
    assert 1.6 * log_term / 100 == pytest.approx(0.081203, abs=5e-7)
    error = error_of_draws(100, 1.6, log_term)
    assert error == pytest.approx(0.43097, abs=5e-6)
    assert draws_for_error(error, 1.6, log_term) == pytest.approx(100, rel=1e-9)


def test_three_times_the_sensitivity_needs_three_times_the_draws() -> None:
    assert draws_for_error(0.3, 2.0, 5.0, scale=3.0) == pytest.approx(3 * draws_for_error(0.3, 2.0, 5.0), rel=1e-12)


def test_bernstein_with_the_largest_variance_is_the_formula() -> None:
    total, draws, log_term = 1.6, 100, 5.0
    assert bernstein_error(total / draws, total / draws, log_term) == pytest.approx(
        error_of_draws(draws, total, log_term), rel=1e-12
    )


def test_resnet20_on_cifar_needs_183_samples() -> None:
    assert calibration_samples(16384, 188426, 1e-16) == 183


def test_no_violation_in_n_leaves_the_known_limit() -> None:
    assert upper_rate(0, 59) == pytest.approx(1 - 0.05 ** (1 / 59), rel=1e-9)
    assert upper_rate(2, 10) == pytest.approx(0.50690, abs=1e-5)  # tables of the binomial distribution
    assert upper_rate(7, 7) == 1.0
    assert upper_rate(0, 0) is None


# choices


SCORES = torch.tensor([0.9, 0.5, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64)


def test_the_largest_are_kept_as_they_are() -> None:
    choice = choose(SCORES, 2, "top", generator())
    assert choice.scales.tolist() == [1, 1, 0, 0, 0, 0]
    assert (choice.draws, choice.drawn) == (None, 0)


def test_inclusion_probabilities_sum_to_the_count() -> None:
    odds = inclusion_probabilities(SCORES, 3)
    # the first is sure: 2 / (0.5 + 0.3 + 0.2 + 0.1) * 0.5 < 1 <= 3 / 2 * 0.9
    assert odds.tolist() == pytest.approx([1, 2 / 1.1 * 0.5, 2 / 1.1 * 0.3, 2 / 1.1 * 0.2, 2 / 1.1 * 0.1, 0], rel=1e-12)


def test_equal_units_are_included_alike() -> None:
    assert inclusion_probabilities(torch.full((64,), 0.4), 32).tolist() == pytest.approx([0.5] * 64, rel=1e-12)


def test_systematic_sampling_keeps_exactly_as_many_and_each_as_often_as_it_should() -> None:
    odds, source = inclusion_probabilities(SCORES, 3), generator()
    taken = torch.stack([systematic(odds, source) for _ in range(1500)])
    assert set(taken.sum(1).tolist()) == {3}
    deviation = (odds * (1 - odds) / 1500).sqrt()
    assert bool(((taken.double().mean(0) - odds).abs() <= 4.5 * deviation + 1e-12).all())


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(
    ("variant", "sampler"),
    [("top", "systematic"), ("ht", "systematic"), ("ht", "poisson"), ("rand", "systematic"), ("hybrid", "systematic")],
)
def test_a_unit_without_sensitivity_is_never_kept(variant: str, sampler: str, count: int) -> None:
    source = generator()
    kept = torch.stack([choose(SCORES, count, variant, source, sampler).kept for _ in range(60)])
    assert not bool(kept[:, -1].any())
    assert int(kept.sum(1).min()) >= 1


@pytest.mark.parametrize("variant", ["top", "ht"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_counts_are_exact(variant: str, count: int) -> None:
    source = generator()
    assert {int(choose(SCORES, count, variant, source).kept.sum()) for _ in range(60)} == {count}


@pytest.mark.parametrize("variant", ["rand", "hybrid"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_drawn_counts_are_not_exceeded_on_average(variant: str, count: int) -> None:
    source = generator()
    kept = torch.tensor([float(choose(SCORES, count, variant, source).kept.sum()) for _ in range(400)])
    assert count - 1.2 <= float(kept.mean()) <= count + 0.15


@pytest.mark.parametrize("variant", ["top", "ht", "rand", "hybrid"])
def test_all_living_units_are_kept_without_drawing(variant: str) -> None:
    choice = choose(SCORES, 5, variant, generator())
    assert choice.scales.tolist() == [1, 1, 1, 1, 1, 0]
    assert choice.drawn == 0


@pytest.mark.parametrize(("variant", "sampler"), [("ht", "systematic"), ("ht", "poisson"), ("rand", "systematic")])
def test_scales_have_mean_one(variant: str, sampler: str) -> None:
    source, runs = generator(), 1200
    scales = torch.stack([choose(SCORES, 3, variant, source, sampler).scales for _ in range(runs)])[:, :5]
    assert bool(((scales.mean(0) - 1).abs() <= 4.5 * scales.std(0) / math.sqrt(runs) + 1e-12).all())


def test_the_sure_units_of_a_hybrid_are_not_scaled() -> None:
    scores = torch.tensor([5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    choice = choose(scores, 4, "hybrid", generator())
    assert float(choice.scales[0]) == 1.0
    assert float(choice.factors[0]) == 0.0
    assert choice.drawn == 7


def test_a_seed_settles_a_draw_and_another_one_changes_it() -> None:
    scores = torch.rand(64, generator=generator(), dtype=torch.float64)
    for variant in ("ht", "rand", "hybrid"):
        one, same, other = (choose(scores, 20, variant, generator(seed)).kept for seed in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
    assert torch.equal(choose(scores, 20, "top", generator(1)).kept, choose(scores, 20, "top", generator(2)).kept)


# the reweighed estimator


def layer_and_units(eta: int = 64, outputs: int = 20, samples: int = 16) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(eta, outputs, dtype=torch.float64).requires_grad_(False)
    return layer, torch.randn(samples, eta, dtype=torch.float64) * torch.rand(eta, dtype=torch.float64)


@pytest.mark.parametrize(("variant", "sampler"), [("rand", "systematic"), ("ht", "poisson"), ("hybrid", "systematic")])
def test_the_reweighed_estimator_is_unbiased_and_its_variance_is_the_formula(variant: str, sampler: str) -> None:
    layer, inputs = layer_and_units()
    reader, rows = Reader.of(layer, torch.arange(64)[:, None]).events(inputs)
    scores, source, runs = unit_shares(reader, rows).amax(0), generator(3), 2000
    first = choose(scores, 32, variant, source, sampler)
    _, variance = error_moments(reader, rows, first.factors, first.draws)
    scale = inputs.abs() @ layer.weight.abs().T
    exact = inputs @ layer.weight.T
    scales = torch.stack([choose(scores, 32, variant, source, sampler).scales for _ in range(runs)])
    found = torch.einsum("bj,rj,ij->rbi", inputs, scales, layer.weight) - exact  # (runs, samples, outputs)
    expected = variance[..., 0] * scale.square()
    assert float((found.mean(0) / (expected / runs).sqrt()).abs().max()) < 4.5
    assert 0.97 < float(found.square().mean() / expected.mean()) < 1.03


def test_violations_of_the_bound_stay_below_delta_over_1000_seeds() -> None:
    layer, inputs = layer_and_units()
    reader, rows = Reader.of(layer, torch.arange(64)[:, None]).events(inputs)
    scores = unit_shares(reader, rows).amax(0)
    scale, exact = inputs.abs() @ layer.weight.abs().T, inputs @ layer.weight.T
    delta, log_term = 0.1, log_events(exact.numel(), 0.1)
    drawn = choose(scores, 32, "rand", generator())
    raw, _ = error_moments(reader, rows, drawn.factors, drawn.draws)
    formula = error_of_draws(drawn.draws or 0, float(scores.sum()), log_term)
    sharp = bernstein_error(float(raw.max()), drawn.bound, log_term)
    assert sharp <= formula
    scales = torch.stack([choose(scores, 32, "rand", generator(seed)).scales for seed in range(1000)])
    errors = ((torch.einsum("bj,rj,ij->rbi", inputs, scales, layer.weight) - exact).abs() / scale).amax((1, 2))
    assert int((errors > sharp).sum()) <= delta * 1000
    assert float(errors.max()) > 0.2 * sharp  # a bound that nothing comes near would prove nothing


def test_the_bound_of_independent_inclusion_holds_on_300_seeds() -> None:
    layer, inputs = layer_and_units(eta=256)
    reader, rows = Reader.of(layer, torch.arange(256)[:, None]).events(inputs)
    scores = unit_shares(reader, rows).amax(0)
    scale, exact = inputs.abs() @ layer.weight.abs().T, inputs @ layer.weight.T
    first = choose(scores, 128, "ht", generator(), "poisson")
    raw, variance = error_moments(reader, rows, first.factors, first.draws)
    assert torch.equal(raw, variance)
    error = bernstein_error(float(raw.max()), first.bound, log_events(exact.numel(), 0.1))
    scales = torch.stack([choose(scores, 128, "ht", generator(seed), "poisson").scales for seed in range(300)])
    errors = ((torch.einsum("bj,rj,ij->rbi", inputs, scales, layer.weight) - exact).abs() / scale).amax((1, 2))
    assert int((errors > error).sum()) == 0


def test_the_error_of_the_largest_stays_below_the_dropped_mass_below_the_dropped_sum() -> None:
    layer, inputs = layer_and_units()
    reader, rows = Reader.of(layer, torch.arange(64)[:, None]).events(inputs)
    scores = unit_shares(reader, rows).amax(0)
    kept = choose(scores, 20, "top", generator()).kept
    error = (inputs * ~kept) @ layer.weight.T
    relative = error.abs() / (inputs.abs() @ layer.weight.abs().T)
    mass = dropped_mass(reader, rows, kept)[..., 0]
    assert bool((relative <= mass + 1e-12).all())
    assert float(mass.max()) <= float(scores[~kept].sum())
    assert float(mass.max()) < 1


def test_a_fresh_sample_exceeds_the_largest_of_n_once_in_n_plus_1() -> None:
    samples = torch.rand(4000, 51, generator=generator(), dtype=torch.float64)
    share = float((samples[:, 50] > samples[:, :50].amax(1)).double().mean())
    assert share == pytest.approx(1 / 51, abs=4.5 * math.sqrt(1 / 51 / 4000))


# budgets


def demands() -> dict[str, Demand]:
    torch.manual_seed(1)
    wide = torch.rand(40, dtype=torch.float64).square()
    return {"narrow": Demand(torch.rand(10, dtype=torch.float64), 12.0), "wide": Demand(wide / 4, 12.0, floor=2)}


def cost(counts: Any) -> int:
    return 3 * counts["narrow"] + counts["narrow"] * counts["wide"] + 5 * counts["wide"]


@pytest.mark.parametrize("share", [0.2, 0.35, 0.5, 0.8, 0.97])
def test_a_budget_is_met_from_below_by_less_than_one_unit(share: float) -> None:
    full = cost({"narrow": 10, "wide": 40})
    found = allocate(demands(), cost, share * full).counts
    assert cost(found) <= share * full
    for name, count in found.items():
        if count < demands()[name].living:
            assert cost({**found, name: count + 1}) > share * full


def test_counts_never_grow_with_the_error() -> None:
    errors = [10 ** (power / 4) for power in range(-8, 12)]
    sizes = [cost(counts_at(demands(), error)) for error in errors]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


def test_the_whole_budget_keeps_all_living_units() -> None:
    scores = torch.tensor([1.0, 0.5, 0.0])
    found = allocate({"a": Demand(scores, 5.0)}, lambda counts: counts["a"], 3)
    assert found.counts == {"a": 2}


def test_a_dead_unit_is_not_topped_up() -> None:
    scores = torch.tensor([1.0, 0.5, 0.0])
    assert allocate({"a": Demand(scores, 5.0)}, lambda counts: counts["a"], 2.5).counts == {"a": 2}


def test_the_floor_stands_against_the_error() -> None:
    assert counts_at(demands(), 1e8) == {"narrow": 1, "wide": 2}


def test_a_budget_below_the_floors_is_refused() -> None:
    with pytest.raises(ValueError, match="15 remain with 3 units"):
        allocate(demands(), cost, 14)


def test_wide_concentrated_groups_lose_more() -> None:
    flat, steep = torch.full((32,), 0.5), torch.tensor([0.9, 0.8] + [0.01] * 30)
    found = allocate({"flat": Demand(flat, 9.0), "steep": Demand(steep, 9.0)}, lambda c: sum(c.values()), 32).counts
    assert sum(found.values()) == 32
    assert found["flat"] > found["steep"]


def test_naive_and_fast_shares_agree_on_the_hand_case() -> None:
    layer = linear([[1, -2, 3], [4, 0, -4]])
    for mode in ("abs", "split"):
        naive = naive_shares(layer, INPUTS, torch.arange(3)[:, None], mode)
        assert torch.allclose(shares(layer, INPUTS, mode), naive, rtol=0, atol=1e-14)
