"""ProsPr's meta-gradient on networks against autograd through the unrolled inner loop, and against differences."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks.test_prospr_memory import peak_megabytes
from methods.prospr_cases import (
    NETWORKS,
    SGD_VARIANTS,
    Network,
    objective_of,
    opened,
    relative_difference,
    unrolled,
)
from torch import Tensor, nn

from lightning_prune.curvature import Losses, point_of, replayed_losses
from lightning_prune.methods.prospr import InnerSGD, Store, meta_gradient, prospr_scores
from lightning_prune.methods.snip import snip_scores
from lightning_prune.objective import Objective


@pytest.mark.parametrize("variant", SGD_VARIANTS)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_reverse_sweep_equals_autograd_through_the_unrolled_graph(network: str, variant: str) -> None:
    sgd = InnerSGD(steps=3, lr=0.2, **SGD_VARIANTS[variant])
    with opened(network) as (losses, start):
        value, history = meta_gradient(losses, start, sgd, list(start))
        expected = unrolled(lambda step, theta: losses.parts(step)[0](theta), start, sgd)
    assert len(history) == 4
    assert relative_difference(value, expected) < 1e-12


@pytest.mark.parametrize("variant", SGD_VARIANTS)
@pytest.mark.parametrize("network", [name for name in NETWORKS if name != "spectral norm"])
def test_forward_over_reverse_equals_autograd_through_the_unrolled_graph(network: str, variant: str) -> None:
    sgd = InnerSGD(steps=2, lr=0.2, **SGD_VARIANTS[variant])
    with opened(network, "forward_over_reverse") as (losses, start):
        value, _ = meta_gradient(losses, start, sgd, list(start))
        expected = unrolled(lambda step, theta: losses.parts(step)[0](theta), start, sgd)
    assert relative_difference(value, expected) < 1e-12


def test_an_operation_without_a_forward_derivative_is_refused_with_advice() -> None:
    with (
        opened("spectral norm", "forward_over_reverse") as (losses, start),
        pytest.raises(ValueError, match="Use backend='reverse_over_reverse' or mode='first_order'"),
    ):
        meta_gradient(losses, start, InnerSGD(steps=1), list(start))


def test_the_score_is_the_derivative_of_the_meta_loss_by_a_multiplier() -> None:
    sgd = InnerSGD(steps=3, lr=0.2, momentum=0.9, weight_decay=5e-4)
    with opened("batch norm and dropout") as (losses, start):
        name = "network.4.weight"
        scores = prospr_scores(losses, start, sgd, [name])[name]

        def meta_loss(entry: int, multiplier: float) -> float:
            moved = {key: value.clone() for key, value in start.items()}
            moved[name].view(-1)[entry] *= multiplier
            return meta_gradient(losses, moved, sgd, [name], mode="first_order")[1][-1]

        for entry in scores.flatten().topk(5).indices.tolist():
            slope = (meta_loss(entry, 1 + 1e-6) - meta_loss(entry, 1 - 1e-6)) / 2e-6
            assert abs(slope) == pytest.approx(float(scores.view(-1)[entry]), rel=1e-5)


def test_first_order_is_the_gradient_after_the_inner_steps() -> None:
    sgd = InnerSGD(steps=4, lr=0.2, momentum=0.9, nesterov=True, weight_decay=0.01)
    with opened("convolution") as (losses, start):
        value, _ = meta_gradient(losses, start, sgd, list(start), mode="first_order")
        optimized = [v.clone().requires_grad_() for v in start.values()]
        optimizer = torch.optim.SGD(optimized, lr=0.2, momentum=0.9, nesterov=True, weight_decay=0.01)
        for step in range(5):
            optimizer.zero_grad()
            losses.parts(step)[0](dict(zip(start, optimized, strict=True))).backward()
            if step < 4:
                optimizer.step()
    expected = {name: leaf.grad for name, leaf in zip(start, optimized, strict=True)}
    assert relative_difference(value, expected) < 1e-13


def test_detached_first_momentum_equals_first_order_after_one_step() -> None:
    sgd = InnerSGD(steps=1, lr=0.2, momentum=0.9, detach_first_momentum=True)
    with opened("convolution") as (losses, start):
        full, _ = meta_gradient(losses, start, sgd, list(start))
        first, _ = meta_gradient(losses, start, sgd, list(start), mode="first_order")
    assert all(torch.equal(full[name], first[name]) for name in start)


def test_detached_first_momentum_equals_the_unrolled_graph_with_a_constant_buffer() -> None:
    sgd = InnerSGD(steps=3, lr=0.2, momentum=0.9, detach_first_momentum=True)
    with opened("convolution") as (losses, start):
        value, _ = meta_gradient(losses, start, sgd, list(start))
        expected = unrolled(lambda step, theta: losses.parts(step)[0](theta), start, sgd)
    assert relative_difference(value, expected) < 1e-12


def test_no_inner_step_gives_the_scores_of_snip_exactly() -> None:
    with opened("batch norm and dropout") as (losses, start):
        ours = prospr_scores(losses, start, InnerSGD(steps=0, lr=7.0, momentum=0.5))
        snip = snip_scores(losses, start)
    assert all(torch.equal(ours[name], snip[name]) for name in start)


def test_a_larger_loss_with_a_smaller_rate_only_scales_the_scores() -> None:
    with opened("batch norm and dropout") as (losses, start):
        plain = prospr_scores(losses, start, InnerSGD(3, 0.2, 0.9, weight_decay=0.01))
        louder = Losses(lambda step: [lambda theta: 4 * losses.parts(step)[0](theta)])
        scaled = prospr_scores(louder, start, InnerSGD(3, 0.2 / 4, 0.9, weight_decay=4 * 0.01))
    assert all(torch.equal(scaled[name], 4 * plain[name]) for name in start)  # 4 is a power of two


def test_frozen_weights_are_scored_but_not_trained() -> None:
    sgd = InnerSGD(steps=3, lr=0.2, momentum=0.9, weight_decay=0.01)
    with opened("convolution") as (losses, start):
        trained = [name for name in start if name != "network.0.weight"]
        value, _ = meta_gradient(losses, start, sgd, list(start), dict.fromkeys(trained))
        expected = unrolled(lambda step, theta: losses.parts(step)[0](theta), start, sgd, trained)
    assert float(value["network.0.weight"].abs().max()) > 0
    assert relative_difference(value, expected) < 1e-12


def test_pruned_entries_stay_zero_in_the_inner_loop() -> None:
    sgd = InnerSGD(steps=3, lr=0.2, momentum=0.9, weight_decay=0.01)
    with opened("convolution") as (losses, start):
        mask = torch.rand(start["network.4.weight"].shape) < 0.5
        start["network.4.weight"] *= mask
        moving = {name: mask if name == "network.4.weight" else None for name in start}
        value, _ = meta_gradient(losses, start, sgd, list(start), moving)

        def masked(step: int, theta: Mapping[str, Tensor]) -> Tensor:
            return losses.parts(step)[0]({**theta, "network.4.weight": theta["network.4.weight"] * mask})

        expected = unrolled(masked, start, sgd)
    value["network.4.weight"] = value["network.4.weight"] * mask
    assert relative_difference(value, expected) < 1e-12


def test_only_the_wanted_names_are_returned_and_they_do_not_depend_on_it() -> None:
    sgd = InnerSGD(steps=2, lr=0.2, momentum=0.9)
    with opened("convolution") as (losses, start):
        every, _ = meta_gradient(losses, start, sgd, list(start))
        some, _ = meta_gradient(losses, start, sgd, ["network.4.weight"])
    assert list(some) == ["network.4.weight"]
    assert relative_difference(some, {"network.4.weight": every["network.4.weight"]}) < 1e-14


def test_slices_of_a_batch_give_its_meta_gradient() -> None:
    sgd = InnerSGD(steps=3, lr=0.2, momentum=0.9)
    with opened("convolution") as (losses, start):
        whole, _ = meta_gradient(losses, start, sgd, list(start))
    with opened("convolution", micro_batch_size=4) as (losses, _):
        assert len(losses.parts(0)) == 2
        sliced, _ = meta_gradient(losses, start, sgd, list(start))
    assert relative_difference(sliced, whole) < 1e-13


def test_fused_attention_needs_the_kernel_that_has_second_derivatives() -> None:
    make, shape = NETWORKS["layer norm and attention"]
    objective = objective_of(make(), shape)
    for second_order in (True, False):
        with replayed_losses(objective, seed=5, second_order=second_order) as losses:
            path, start = losses(objective.batches(2)), point_of(objective.module)
            with nullcontext() if second_order else pytest.raises(ValueError, match="Use mode='first_order'"):
                meta_gradient(path, start, InnerSGD(steps=1), list(start))


def test_memory_grows_by_parameters_and_not_by_graphs_with_every_step(tmp_path: Path) -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 3),
    )
    data = [(torch.randn(64, 1, 8, 8), torch.arange(64) % 3)] * 17
    objective = Objective(Network(network), lambda count: data[:count])
    size = sum(4 * parameter.numel() for parameter in network.parameters()) / 1e6
    peaks = []
    with replayed_losses(objective, seed=5, second_order=True) as losses:
        start = point_of(objective.module)
        for steps in (1, 16):
            call = partial(meta_gradient, losses(data), start, InnerSGD(steps, 0.01, 0.9), list(start))
            peaks.append(peak_megabytes(call, tmp_path / "trace.json"))
    assert peaks[0] > 10 * size  # activations, not parameters, fill the memory of this network
    assert peaks[1] < 1.3 * peaks[0]
    assert peaks[1] < 1.5 * peaks[0] + 16 * size


def test_a_trajectory_kept_elsewhere_gives_the_same_bits() -> None:
    sgd = InnerSGD(steps=3, lr=0.2, momentum=0.9)
    store = Store("cpu")
    with opened("convolution") as (losses, start):
        here, _ = meta_gradient(losses, start, sgd, list(start))
        there, _ = meta_gradient(losses, start, sgd, list(start), store=store)
    assert store.kept == []
    assert all(torch.equal(here[name], there[name]) for name in start)
