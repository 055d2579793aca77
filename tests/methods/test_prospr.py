"""ProsPr's meta-gradient against closed forms; losses that explode; arguments that are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from methods.prospr_cases import (
    losses_of,
    pruner,
    quadratics,
    relative_difference,
    unrolled,
)
from torch import Tensor

from lightning_prune.methods.prospr import InnerSGD, meta_gradient, prospr_scores


def scalar_score(mode: str = "full", **sgd: Any) -> float:
    """|w_0 dL/dw_0| for L = a/2 (w - 1)^2 on every batch, a = 2, w_0 = 3, eta = 0.1."""
    losses = losses_of(lambda step, theta: (theta["w"] - 1.0).square())
    start = {"w": torch.tensor(3.0, dtype=torch.float64)}
    return float(prospr_scores(losses, start, InnerSGD(lr=0.1, **sgd), mode=mode)["w"])


@pytest.mark.parametrize(
    ("expected", "arguments"),
    [
        (12.0, {"steps": 0}),
        (12.0, {"steps": 0, "momentum": 0.9, "weight_decay": 0.5}),
        (7.68, {"steps": 1}),
        (3.145728, {"steps": 3}),
        (6.144, {"steps": 3, "mode": "first_order"}),
        (7.68, {"steps": 1, "momentum": 0.9}),
        (0.046128, {"steps": 3, "momentum": 0.9}),
        (4.6128, {"steps": 1, "momentum": 0.9, "nesterov": True}),
        (0.1408818708480, {"steps": 3, "momentum": 0.9, "nesterov": True}),
        (3.1147489931387, {"steps": 3, "weight_decay": 0.01}),
        (9.6, {"steps": 1, "momentum": 0.9, "detach_first_momentum": True}),
        (0.34224, {"steps": 3, "momentum": 0.9, "detach_first_momentum": True}),
    ],
)
def test_scalar_quadratic_has_its_closed_form(expected: float, arguments: dict[str, Any]) -> None:
    assert scalar_score(**arguments) == pytest.approx(expected, rel=1e-12)


def test_quadratics_that_do_not_commute_give_the_product_in_the_right_order() -> None:
    steps, lr = 4, 0.2
    matrices, vectors, start = quadratics(steps + 1)
    losses = losses_of(lambda t, theta: 0.5 * theta["w"] @ matrices[t] @ theta["w"] - vectors[t] @ theta["w"])
    w, jacobians = start, []
    for a, b in zip(matrices[:-1], vectors[:-1], strict=True):
        w = w - lr * (a @ w - b)
        jacobians.append(torch.eye(5, dtype=torch.float64) - lr * a)
    adjoint = matrices[-1] @ w - vectors[-1]
    for jacobian in reversed(jacobians):
        adjoint = jacobian @ adjoint
    value, _ = meta_gradient(losses, {"w": start}, InnerSGD(steps, lr), ["w"])
    assert relative_difference(value, {"w": adjoint}) < 1e-14


def test_momentum_on_a_quadratic_gives_the_power_of_its_companion_matrix() -> None:
    a, lr, momentum, steps, w = 1.7, 0.3, 0.8, 5, 2.5
    step = torch.tensor([[1 - lr * a, -lr * momentum], [a, momentum]], dtype=torch.float64)
    power = torch.linalg.matrix_power(step, steps)
    error = float(power[0, 0]) * (w - 1.0)
    losses = losses_of(lambda t, theta: 0.5 * a * (theta["w"] - 1.0).square())
    start = {"w": torch.tensor(w, dtype=torch.float64)}
    score = prospr_scores(losses, start, InnerSGD(steps, lr, momentum))["w"]
    assert float(score) == pytest.approx(abs(w * a * error * float(power[0, 0])), rel=1e-13)


@pytest.mark.parametrize("steps", [0, 1, 8])
def test_the_sweep_is_exact_for_few_and_for_many_steps(steps: int) -> None:
    sgd = InnerSGD(steps, lr=0.1, momentum=0.9)
    matrices, vectors, start = quadratics(9)

    def loss(step: int, theta: Mapping[str, Tensor]) -> Tensor:
        return (0.5 * theta["w"] @ matrices[step] @ theta["w"] - vectors[step] @ theta["w"]).sin()

    value, _ = meta_gradient(losses_of(loss), {"w": start}, sgd, ["w"])
    assert relative_difference(value, unrolled(loss, {"w": start}, sgd)) < 1e-13


def test_a_loss_that_is_linear_has_no_curvature() -> None:
    losses = losses_of(lambda step, theta: 3 * theta["w"].sum() + 0 * theta["idle"].sum())
    start = {"w": torch.tensor([1.0, 2.0]), "idle": torch.tensor([5.0])}
    assert losses.product(0, start, start)["w"].tolist() == [0.0, 0.0]
    assert prospr_scores(losses, start, InnerSGD(2, 0.1))["w"].tolist() == [3.0, 6.0]
    assert prospr_scores(losses, start, InnerSGD(2, 0.1))["idle"].tolist() == [0.0]


def test_an_exploding_inner_loop_names_the_step_and_advises_a_smaller_rate() -> None:
    losses = losses_of(lambda step, theta: theta["w"].square().sum().exp())
    start = {"w": torch.tensor([2.0])}
    with pytest.raises(ValueError, match=r"not finite after 1 of 3 inner steps, got .*Choose `inner_lr` below 0.5"):
        meta_gradient(losses, start, InnerSGD(3, 0.5), ["w"])


def test_a_loss_that_is_not_finite_at_the_start_blames_the_data() -> None:
    losses = losses_of(lambda step, theta: theta["w"].sum().log())
    with pytest.raises(ValueError, match=r"before the first inner step, got nan\. Check loss and data"):
        meta_gradient(losses, {"w": torch.tensor([-1.0])}, InnerSGD(3, 0.5), ["w"])


def test_an_overflow_on_the_way_back_names_the_step() -> None:
    flat = torch.tensor([1.0])  # no slope at the start, hence no motion, but a curvature that multiplies up
    losses = losses_of(lambda t, theta: theta["w"].sum() if t == 2 else 1e25 * (theta["w"] - flat).square().sum())
    with pytest.raises(ValueError, match=r"not finite at inner step 0 of 2\. Choose `inner_lr` below 1"):
        meta_gradient(losses, {"w": torch.tensor([1.0])}, InnerSGD(2, 1.0), ["w"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "`steps` must be an integer >= 0, got -1"),
        ({"steps": 1.5}, "`steps` must be an integer >= 0, got 1.5"),
        ({"inner_lr": 0}, "`inner_lr` must be a finite number above 0, got 0"),
        ({"inner_lr": float("nan")}, "`inner_lr` must be a finite number above 0, got nan"),
        ({"inner_lr": float("inf")}, "`inner_lr` must be a finite number above 0, got inf"),
        ({"inner_momentum": 1.0}, r"`inner_momentum` must be in \[0, 1\), got 1.0"),
        ({"inner_weight_decay": -0.1}, "`inner_weight_decay` must be a finite number >= 0, got -0.1"),
        ({"inner_nesterov": True, "inner_momentum": 0.0}, "`inner_nesterov` must be false without momentum"),
        ({"inner_nesterov": True, "detach_first_momentum": True}, "`detach_first_momentum` must be false"),
        ({"mode": "second_order"}, "`mode` must be one of 'full', 'first_order'"),
        ({"structured": "yes"}, "`structured` must be true or false"),
        ({"gate": "input"}, "`gate` must be one of 'output', 'weight'"),
        ({"new_data": 1}, "`new_data` must be true or false"),
        ({"rounds": 0}, "`rounds` must be an integer >= 1"),
        ({"samples": 0}, "`samples` must be an integer >= 1"),
        ({"batch_size": 0}, "`batch_size` must be an integer >= 1"),
        ({"backend": "differences"}, "`backend` must be one of"),
        ({"sparsity": 90.0}, r"`sparsity` must be in \[0, 1\), got 90.0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruner(**{"sparsity": 0.5, **arguments})
