"""ProsPr's meta-gradient against closed forms, autograd through the unrolled inner loop, and differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.test_prospr_memory import peak_megabytes
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_prune.curvature import Losses, point_of, replayed_losses
from lightning_prune.methods.prospr import InnerSGD, Store, meta_gradient, prospr_scores
from lightning_prune.methods.snip import snip_scores
from lightning_prune.objective import Objective

Point = dict[str, Tensor]
LossAt = Callable[[int, Mapping[str, Tensor]], Tensor]
SGD_VARIANTS = {
    "plain": {},
    "weight decay": {"weight_decay": 0.03},
    "momentum": {"momentum": 0.9},
    "momentum and weight decay": {"momentum": 0.9, "weight_decay": 0.03},
    "nesterov and weight decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.03},
}


def losses_of(function: LossAt, backend: str = "reverse_over_reverse") -> Losses:
    """The losses L_t(theta) = function(t, theta), each in one part."""
    return Losses(lambda step: [lambda theta: function(step, theta)], backend=backend)


def unrolled(
    function: LossAt, start: Mapping[str, Tensor], sgd: InnerSGD, trained: list[str] | None = None
) -> dict[str, Tensor]:
    """Naive oracle: differentiate through torch-style SGD steps kept in one graph."""
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    trained = list(leaves) if trained is None else trained
    point: Point = dict(leaves)
    buffers: Point = {}
    for step in range(sgd.steps):
        slopes = torch.autograd.grad(
            function(step, point), [point[n] for n in trained], create_graph=True, materialize_grads=True
        )
        for name, slope in zip(trained, slopes, strict=True):
            pull = slope + sgd.weight_decay * point[name]
            if sgd.momentum:
                first = pull.detach() if sgd.detach_first_momentum else pull
                buffers[name] = first if step == 0 else sgd.momentum * buffers[name] + pull
                pull = pull + sgd.momentum * buffers[name] if sgd.nesterov else buffers[name]
            point[name] = point[name] - sgd.lr * pull
    loss = function(sgd.steps, point)
    values = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, values, strict=True))


def relative_difference(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """Largest difference over all entries, in units of the largest entry of `two`."""
    largest = max(float(value.abs().max()) for value in two.values())
    return max(float((one[name] - two[name]).abs().max()) for name in two) / largest


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


def quadratics(count: int, seed: int = 0) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Distinct symmetric A_t, vectors b_t and a start, in float64; the A_t do not commute."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(count, 5, 6, generator=generator, dtype=torch.float64)
    matrices = [a[:, :5] @ a[:, :5].T / 5 for a in random]
    assert float((matrices[0] @ matrices[1] - matrices[1] @ matrices[0]).abs().max()) > 0.1
    return matrices, [a[:, 5] for a in random], torch.randn(5, generator=generator, dtype=torch.float64)


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


class Network(LightningModule):
    """Any network with cross-entropy as a LightningModule."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


class Recurrent(nn.Module):
    """An LSTM whose last state is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, sequence: Tensor) -> Tensor:
        return self.head(self.lstm(sequence)[0][:, -1])


class Attention(nn.Module):
    """One pre-norm attention layer with a fused kernel in ordinary use."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(tokens)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(mixed.transpose(1, 2).flatten(2).mean(dim=1))


def convolutional(norm: bool, dropout: float) -> nn.Module:
    """Two convolutions and a linear layer on images of 2 x 6 x 6."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(4, 5, 3, bias=False),
        nn.BatchNorm2d(5) if norm else nn.Identity(),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(20, 3),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution": (lambda: convolutional(False, 0.0), (2, 6, 6)),
    "batch norm and dropout": (lambda: convolutional(True, 0.3), (2, 6, 6)),
    "spectral norm": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)
        ),
        (6,),
    ),
    "lstm": (Recurrent, (4, 3)),
    "layer norm and attention": (Attention, (5, 8)),
}


def objective_of(network: nn.Module, shape: tuple[int, ...], batches: int = 5, size: int = 6) -> Objective:
    """The loss of a float64 network on batches that are the same at every call."""
    generator = torch.Generator().manual_seed(3)
    data = [
        (torch.randn(size, *shape, generator=generator, dtype=torch.float64), torch.arange(size) % 3)
        for _ in range(batches)
    ]
    return Objective(Network(network).double(), lambda count: data[:count])


@contextmanager
def opened(
    network: str, backend: str = "reverse_over_reverse", **arguments: Any
) -> Iterator[tuple[Losses, Point]]:
    """The losses of a named network on five batches, and its parameters."""
    make, shape = NETWORKS[network]
    objective = objective_of(make(), shape)
    with replayed_losses(objective, seed=5, second_order=True, backend=backend, **arguments) as losses:
        yield losses(objective.batches(5)), point_of(objective.module)


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


@pytest.mark.parametrize("steps", [0, 1, 8])
def test_the_sweep_is_exact_for_few_and_for_many_steps(steps: int) -> None:
    sgd = InnerSGD(steps, lr=0.1, momentum=0.9)
    matrices, vectors, start = quadratics(9)

    def loss(step: int, theta: Mapping[str, Tensor]) -> Tensor:
        return (0.5 * theta["w"] @ matrices[step] @ theta["w"] - vectors[step] @ theta["w"]).sin()

    value, _ = meta_gradient(losses_of(loss), {"w": start}, sgd, ["w"])
    assert relative_difference(value, unrolled(loss, {"w": start}, sgd)) < 1e-13


def test_the_score_is_the_derivative_of_the_meta_loss_by_a_multiplier() -> None:
    sgd = InnerSGD(steps=3, lr=0.2, momentum=0.9, weight_decay=5e-4)
    with opened("batch norm and dropout") as (losses, start):
        name = "network.4.weight"
        scores = prospr_scores(losses, start, sgd, [name])[name]
        largest = int(scores.argmax())

        def meta_loss(multiplier: float) -> float:
            moved = {key: value.clone() for key, value in start.items()}
            moved[name].view(-1)[largest] *= multiplier
            return meta_gradient(losses, moved, sgd, [name], mode="first_order")[1][-1]

        slope = (meta_loss(1 + 1e-6) - meta_loss(1 - 1e-6)) / 2e-6
    assert abs(slope) == pytest.approx(float(scores.max()), rel=1e-5)


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
        scaled = prospr_scores(louder, start, InnerSGD(3, 0.05, 0.9, weight_decay=0.04))
    assert all(torch.allclose(scaled[name], 4 * plain[name], rtol=1e-13, atol=0) for name in start)


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


def test_a_loss_that_is_linear_has_no_curvature() -> None:
    losses = losses_of(lambda step, theta: 3 * theta["w"].sum() + 0 * theta["idle"].sum())
    start = {"w": torch.tensor([1.0, 2.0]), "idle": torch.tensor([5.0])}
    assert losses.product(0, start, start)["w"].tolist() == [0.0, 0.0]
    assert prospr_scores(losses, start, InnerSGD(2, 0.1))["w"].tolist() == [3.0, 6.0]
    assert prospr_scores(losses, start, InnerSGD(2, 0.1))["idle"].tolist() == [0.0]


def test_an_exploding_inner_loop_names_the_step_and_advises_a_smaller_rate() -> None:
    losses = losses_of(lambda step, theta: theta["w"].square().sum().exp())
    start = {"w": torch.tensor([2.0])}
    with pytest.raises(
        ValueError, match=r"not finite after 1 of 3 inner steps, got .*Choose `inner_lr` below 0.5"
    ):
        meta_gradient(losses, start, InnerSGD(3, 0.5), ["w"])


def test_a_loss_that_is_not_finite_at_the_start_blames_the_data() -> None:
    losses = losses_of(lambda step, theta: theta["w"].sum().log())
    with pytest.raises(ValueError, match=r"before the first inner step, got nan\. Check loss and data"):
        meta_gradient(losses, {"w": torch.tensor([-1.0])}, InnerSGD(3, 0.5), ["w"])


def test_an_overflow_on_the_way_back_names_the_step() -> None:
    flat = torch.tensor([1.0])  # no slope at the start, hence no motion, but a curvature that multiplies up
    losses = losses_of(
        lambda t, theta: theta["w"].sum() if t == 2 else 1e25 * (theta["w"] - flat).square().sum()
    )
    with pytest.raises(ValueError, match=r"not finite at inner step 0 of 2\. Choose `inner_lr` below 1"):
        meta_gradient(losses, {"w": torch.tensor([1.0])}, InnerSGD(2, 1.0), ["w"])
