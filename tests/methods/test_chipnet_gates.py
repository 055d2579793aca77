"""ChipNet's maps, losses and schedule against hand arithmetic, closed forms and differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_prune.methods.chipnet import (
    Temperature,
    anneal,
    budget_loss,
    crispness_loss,
    crispness_turn,
    gate_values,
    heaviside,
    logistic,
    soft_counts,
)

GAMMAS = (2.0, 8.0, 32.0, 256.0)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("gamma", [1e-12, *GAMMAS])
def test_both_ends_of_the_heaviside_are_fixed(gamma: float) -> None:
    ends = heaviside(numbers(0.0, 1.0), gamma)
    assert ends[0] == 0
    torch.testing.assert_close(ends[1], torch.tensor(1.0, dtype=torch.float64), rtol=1e-15, atol=0)


def test_gamma_zero_is_the_identity() -> None:
    x = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert float((heaviside(x, 1e-12) - x).abs().max()) < 1e-12


@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_heaviside_grows_and_lies_above_the_diagonal(gamma: float) -> None:
    x = torch.linspace(0, 1, 1001, dtype=torch.float64)
    z = heaviside(x, gamma)
    assert bool((z.diff() >= 0).all())
    assert bool((z[1:-1] > x[1:-1]).all())


def test_gates_start_at_seven_tenths() -> None:
    """x = 1 / (1 + exp(-0.005)) = 0.50125; z = 1 - exp(-1.0025) + 0.50125 exp(-2) = 0.70088."""
    _, z = gate_values(torch.tensor([0.005]), Temperature(beta=1.0, gamma=2.0, tau=10.0))
    assert z.dtype == torch.float32
    assert float(z) == pytest.approx(0.70088, abs=1e-5)


def test_a_large_gamma_steps_at_zero_and_not_at_one_half() -> None:
    assert float(heaviside(numbers(0.0217), 256.0)) == pytest.approx(0.9961, abs=1e-4)


def test_a_large_beta_steps_at_zero() -> None:
    assert logistic(numbers(-0.5, 0.5), 1e4).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("psi", [-1e4, -100.0, -12.0, 0.0, 12.0, 1e4])
def test_values_and_slopes_are_finite_and_match_the_closed_form(psi: float, gamma: float) -> None:
    """z = 1 - e^(-gamma x) + x e^-gamma in 64 bit; dz/dpsi = (gamma e^(-gamma x) + e^-gamma) beta x (1 - x)."""
    beta, wide = 1.38, torch.tensor(psi, dtype=torch.float64)
    x64 = torch.sigmoid(beta * wide)
    expected = 1 - torch.exp(-gamma * x64) + x64 * math.exp(-gamma)
    slope = (gamma * torch.exp(-gamma * x64) + math.exp(-gamma)) * beta * x64 * (1 - x64)
    leaf = torch.tensor(psi, requires_grad=True)
    _, z = gate_values(leaf, Temperature(beta, gamma, 10.0))
    (grad,) = torch.autograd.grad(z, leaf)
    assert math.isfinite(float(z.detach()))
    torch.testing.assert_close(z.detach().double(), expected, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(grad.double(), slope, rtol=1e-5, atol=6e-8)  # one unit in the last place of x at 1


def test_small_gates_keep_their_digits() -> None:
    """At psi = -12, x = 6e-6: 1 - exp(-gamma x) would have two digits left in 32 bit."""
    psi, temperature = torch.tensor(-12.0), Temperature(1.0, 2.0, 10.0)
    _, narrow = gate_values(psi, temperature)
    _, wide = gate_values(psi.double(), temperature)
    assert float(narrow) == pytest.approx(float(wide), rel=1e-6)


def test_autocast_does_not_round_the_gates() -> None:
    psi, temperature = torch.linspace(-3, 3, 50), Temperature(1.0, 2.0, 10.0)
    _, plain = gate_values(psi, temperature)
    with torch.autocast("cpu", torch.bfloat16):
        _, cast = gate_values(psi, temperature)
    assert torch.equal(plain, cast)


# crispness


@pytest.mark.parametrize("gamma", GAMMAS)
def test_crispness_is_zero_for_binary_gates_and_only_for_them(gamma: float) -> None:
    binary = numbers(0.0, 1.0, 1.0, 0.0)
    assert float(crispness_loss(binary, heaviside(binary, gamma))) < 1e-30
    for grey in (1e-3, 0.3, 0.99):
        x = numbers(0.0, grey)
        assert float(crispness_loss(x, heaviside(x, gamma))) > 0


@pytest.mark.parametrize(("gamma", "turn"), list(zip(GAMMAS, (0.419, 0.260, 0.108, 0.0217), strict=True)))
def test_crispness_turns_where_the_slope_is_one(gamma: float, turn: float) -> None:
    assert crispness_turn(gamma) == pytest.approx(turn, abs=1e-3)
    x = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    gap = (heaviside(x, gamma) - x).square()
    assert float(x[gap.argmax()]) == pytest.approx(crispness_turn(gamma), abs=1e-4)
    for shift, sign in ((-1e-3, 1), (1e-3, -1)):
        leaf = numbers(crispness_turn(gamma) + shift).requires_grad_()
        crispness_loss(leaf, heaviside(leaf, gamma)).backward()
        assert leaf.grad is not None
        assert math.copysign(1, float(leaf.grad)) == sign


def test_crispness_is_one_mean_over_all_gates() -> None:
    x, z = numbers(0.0, 0.5, 0.5, 1.0), numbers(0.0, 0.7, 0.9, 1.0)
    assert float(crispness_loss(x, z)) == pytest.approx((0.04 + 0.16) / 4)


# budget


def test_the_budget_loss_is_two_sided() -> None:
    assert float(budget_loss(torch.tensor(0.3), 0.5)) == pytest.approx(0.04)
    assert float(budget_loss(torch.tensor(0.7), 0.5)) == pytest.approx(0.04)


def test_soft_counts_are_half_at_one_half() -> None:
    """1 / (1 + exp(-10 * 0.2)) = 0.8808."""
    assert soft_counts(numbers(0.5, 0.7), 10.0).tolist() == pytest.approx([0.5, 0.8808], abs=1e-4)


# schedule


@pytest.mark.parametrize(
    ("stage", "beta", "gamma"),
    [(0, 1.0, 2.0), (1, 1.02, 2.828427), (13, 1.26, 181.02), (14, 1.28, 256.0), (19, 1.38, 256.0)],
)
@pytest.mark.parametrize("soft_steps", [20, 37, 10_000])
def test_stages_have_the_values_of_the_paper_at_any_length(
    stage: int, beta: float, gamma: float, soft_steps: int
) -> None:
    step = math.ceil(stage * soft_steps / 20)
    temperature = anneal(step, soft_steps)
    assert (temperature.beta, temperature.gamma) == (pytest.approx(beta), pytest.approx(gamma, abs=0.01))


@pytest.mark.parametrize("soft_steps", [20, 37, 1000])
def test_temperatures_change_in_twenty_jumps(soft_steps: int) -> None:
    gammas = [anneal(step, soft_steps).gamma for step in range(soft_steps)]
    betas = [anneal(step, soft_steps).beta for step in range(soft_steps)]
    assert len(set(betas)) == 20
    assert gammas == sorted(gammas)
    assert gammas[-1] == 256.0


def test_tau_grows_with_every_step_to_sixty_at_half() -> None:
    taus = [anneal(step, 100).tau for step in range(100)]
    assert taus[0] == 10.0
    assert taus[25] == pytest.approx(35.0)
    assert taus[50:] == [60.0] * 50


def test_steps_beyond_the_soft_phase_stay_in_its_last_stage() -> None:
    assert anneal(1000, 100) == anneal(99, 100)
    assert anneal(-1, 100) == anneal(0, 100)


def test_fewer_stages_end_where_twenty_do() -> None:
    """10 stages jump by two of the twenty: the last one is stage 18."""
    assert anneal(99, 100, stages=10).beta == pytest.approx(1.36)
