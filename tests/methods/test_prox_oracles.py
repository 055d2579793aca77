"""The penalties around real optimizers reach the optima that independent solvers find; with a naive threshold they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from prox_cases import Make, descend, group_penalty, lasso_problem, quadratic, solve_lasso, start
from sklearn.linear_model import Lasso
from torch import Tensor

from lightning_prune.methods._prox_operators import group_soft_threshold
from lightning_prune.methods._prox_penalties import Stage
from lightning_prune.methods._prox_scale import future_rates, metric_of, momentum_gain

SGD, Adam = torch.optim.SGD, torch.optim.Adam
OPTIMIZERS: dict[str, tuple[Make, int]] = {
    "sgd": (lambda p: SGD(p, lr=0.1), 500),
    "momentum .5": (lambda p: SGD(p, lr=0.1, momentum=0.5), 500),
    "momentum .9": (lambda p: SGD(p, lr=0.05, momentum=0.9), 700),
    "nesterov": (lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True), 700),
    "dampening": (lambda p: SGD(p, lr=0.05, momentum=0.9, dampening=0.5), 700),
    "adam": (lambda p: Adam(p, lr=0.02, betas=(0.9, 0.95)), 1500),
    "amsgrad-free adamw": (lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.9, 0.95), weight_decay=0.0), 1500),
    "rmsprop with momentum": (lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.95, momentum=0.5), 1500),
}
MOMENTA = ["momentum .5", "momentum .9", "nesterov", "dampening"]


def lasso_optimum() -> Tensor:
    features, targets = lasso_problem()
    solver = Lasso(alpha=0.1, fit_intercept=False, tol=1e-14, max_iter=100_000)
    return torch.tensor(solver.fit(features, targets).coef_)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_lasso_optimum_is_reached_with_its_support(name: str) -> None:
    make, steps = OPTIMIZERS[name]
    found, optimum = solve_lasso(make, 0.1, steps), lasso_optimum()
    assert float((found - optimum).abs().max()) < 1e-8
    assert torch.equal(found != 0, optimum != 0)
    assert int((optimum != 0).sum()) == 6


@pytest.mark.parametrize("name", MOMENTA)
def test_the_learning_rate_alone_as_threshold_solves_another_problem(name: str) -> None:
    make, steps = OPTIMIZERS[name]
    found, optimum = solve_lasso(make, 0.1, steps, matched=False), lasso_optimum()
    assert float((found - optimum).abs().max()) > 1e-2
    assert int((found != 0).sum()) > 6


def test_adam_without_its_metric_solves_another_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    make, steps = OPTIMIZERS["adam"]
    monkeypatch.setattr("lightning_prune.methods._prox_parts.has_metric", lambda optimizer: False)
    assert int((solve_lasso(make, 0.1, steps) != 0).sum()) > 6


# groups


def orthonormal(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """60 samples of 20 features with X'X / n = I."""
    features = np.linalg.qr(rng.standard_normal((60, 20)))[0] * np.sqrt(60)
    return features, features @ np.repeat([1.0, 0.0, -0.6, 0.1, 0.0], 4) + rng.standard_normal(60)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_group_lasso_of_orthonormal_features_is_one_threshold(momentum: float) -> None:
    features, targets = orthonormal(np.random.default_rng(2))
    weights = start(20)
    penalty = group_penalty(
        lambda p: SGD(p, lr=0.1, momentum=momentum), weights, 4, stage_at=lambda step: "prox", asked=0.5
    )
    descend(weights, penalty.parts[0].optimizer, penalty, quadratic(features, targets), 600)
    moment = torch.tensor(features.T @ targets / 60).view(-1, 4)
    expected = group_soft_threshold(moment, 0.5)
    assert torch.allclose(weights.detach().view(-1, 4), expected, rtol=0, atol=1e-12)
    assert 0 < int((expected.norm(dim=1) == 0).sum()) < 5


def group_lasso() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    features, truth = rng.standard_normal((150, 32)), np.zeros(32)
    truth[:12] = 1.5 * rng.standard_normal(12)
    return features, features @ truth + rng.standard_normal(150)


def group_objective(weights: Tensor, penalty: float) -> float:
    features, targets = group_lasso()
    residual = torch.tensor(features) @ weights - torch.tensor(targets)
    return float(0.5 * residual.square().mean() + penalty * weights.view(-1, 4).norm(dim=1).sum())


def fista(penalty: float, steps: int = 1500) -> Tensor:
    """An independent solver of the group lasso."""
    features, targets = group_lasso()
    gradient, length = quadratic(features, targets), float(np.linalg.eigvalsh(features.T @ features / 150).max())
    w = v = torch.zeros(32, dtype=torch.float64)
    t = 1.0
    for _ in range(steps):
        new = group_soft_threshold((v - gradient(v, 0) / length).view(-1, 4), penalty / length).flatten()
        momentum = (1 + (1 + 4 * t * t) ** 0.5) / 2
        w, v, t = new, new + (t - 1) / momentum * (new - w), momentum
    return w


def solve_group_lasso(stage_at: Callable[[int], Stage], **arguments: Any) -> Tensor:
    weights = start(32)
    make: Make = lambda p: Adam(p, lr=0.03, betas=(0.9, 0.95))  # noqa: E731
    penalty = group_penalty(make, weights, 4, stage_at=stage_at, asked=0.35, **arguments)
    descend(
        weights, penalty.parts[0].optimizer, penalty, quadratic(*group_lasso()), 2000,
        rate=lambda step: 0.03 / (1 + step / 500),
    )  # fmt: skip
    return weights.detach()


def test_adam_reaches_the_group_lasso_optimum_that_fista_finds() -> None:
    found, optimum = solve_group_lasso(lambda step: "prox"), fista(0.35)
    assert float((found - optimum).abs().max()) < 1e-8
    assert 0 < int((optimum.view(-1, 4).norm(dim=1) == 0).sum()) < 8


def test_half_space_steps_under_adam_keep_exactly_the_optimal_support() -> None:
    found = solve_group_lasso(lambda step: "prox" if step < 700 else "projected")
    optimum = fista(0.35)
    assert group_objective(found, 0.35) - group_objective(optimum, 0.35) < 1e-10
    assert torch.equal(found.view(-1, 4).norm(dim=1) > 0, optimum.view(-1, 4).norm(dim=1) > 0)


@pytest.mark.parametrize("seed", range(6))
def test_under_gradient_noise_the_half_space_is_sparser_than_the_prox_at_a_lower_objective(seed: int) -> None:
    (prox, prox_zero), (hspg, hspg_zero) = (logistic_group_lasso(seed, projected) for projected in (False, True))
    assert prox_zero == 0.0
    assert hspg_zero >= 0.3
    assert hspg < prox


def logistic_group_lasso(seed: int, projected: bool) -> tuple[float, float]:
    """Train on batches of 32 at a constant rate; returns the objective and the fraction of zero groups of 40."""
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(500, 200, dtype=torch.float64, generator=rng)
    truth = torch.zeros(200, dtype=torch.float64)
    truth[:25] = torch.randn(25, dtype=torch.float64, generator=rng)
    labels = (torch.rand(500, dtype=torch.float64, generator=rng) < torch.sigmoid(features @ truth)).double()
    batches = [batch for _ in range(40) for batch in torch.randperm(500, generator=rng)[:480].view(15, 32)]
    weights = torch.nn.Parameter(0.1 * torch.randn(200, dtype=torch.float64, generator=rng))
    switch = len(batches) // 2
    penalty = group_penalty(
        lambda p: SGD(p, lr=0.1), weights, 5, asked=0.03,
        stage_at=lambda step: "projected" if projected and step >= switch else "prox",
    )  # fmt: skip

    def gradient(w: Tensor, step: int) -> Tensor:
        x, y = features[batches[step]], labels[batches[step]]
        return x.T @ (torch.sigmoid(x @ w) - y) / len(y)

    descend(weights, penalty.parts[0].optimizer, penalty, gradient, len(batches))
    found = weights.detach()
    norms = found.view(-1, 5).norm(dim=1)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(features @ found, labels)
    return float(loss + 0.03 * norms.sum()), float((norms == 0).double().mean())


# how far steps go


@pytest.mark.parametrize(
    "settings",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.5, "dampening": 0.3}],
    ids=str,
)
def test_the_gain_is_what_a_constant_gradient_moves_at_every_step(settings: dict[str, Any]) -> None:
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = SGD([weight], lr=1.0, **settings)
    for step in range(1, 40):
        before, weight.grad = weight.item(), torch.ones(1, dtype=torch.float64)
        optimizer.step()
        assert momentum_gain(optimizer.param_groups[0], step) == pytest.approx(before - weight.item(), abs=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: Adam(p, lr=1.0),
        lambda p: Adam(p, lr=1.0, amsgrad=True),
        lambda p: torch.optim.AdamW(p, lr=1.0, weight_decay=0.0),
        lambda p: torch.optim.RMSprop(p, lr=1.0),
    ],
)
def test_the_metric_is_what_divides_a_constant_gradient(make: Make) -> None:
    weights = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer, gradient = make([weights]), torch.tensor([0.1, -2.0, 30.0], dtype=torch.float64)
    for _ in range(7):
        before, weights.grad = weights.detach().clone(), gradient.clone()
        optimizer.step()
        (metric,) = metric_of(optimizer, optimizer.param_groups[0], [weights])
        assert torch.allclose((before - weights.detach()) * metric, gradient, rtol=1e-12)


def test_the_centered_metric_subtracts_the_mean_gradient() -> None:
    weights = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.RMSprop([weights], lr=1.0, centered=True)
    for step in range(5):
        before, weights.grad = weights.detach().clone(), torch.tensor([0.1, -2.0, 30.0]).double() * (1 + step % 2)
        optimizer.step()
        (metric,) = metric_of(optimizer, optimizer.param_groups[0], [weights])
        assert torch.allclose((before - weights.detach()) * metric, weights.grad, rtol=1e-9)


def test_learning_rates_are_run_ahead_without_touching_the_run() -> None:
    weights = torch.nn.Parameter(torch.zeros(1))
    optimizer = SGD([weights], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    assert future_rates(optimizer, [(scheduler, 1)], 5)[0] == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01])
    assert future_rates(optimizer, [(scheduler, 2)], 5)[0] == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.1])
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert scheduler.last_epoch == 0


def test_a_scheduler_that_waits_for_a_metric_counts_as_constant() -> None:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    assert future_rates(optimizer, [(scheduler, 1)], 3) == [[0.5, 0.5, 0.5]]
