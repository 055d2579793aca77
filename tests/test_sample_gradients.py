"""Gradient rows: the fast ways equal the plain loop, rows average samples, batches are cut and joined."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune.batches import join_batches, regroup, slice_batch
from lightning_prune.objective import Objective
from lightning_prune.sample_gradients import GradientSource, gradient_rows


def loss(module: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1])


def weights(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.dim() > 1]


def batches_of(inputs: Tensor, labels: Tensor, size: int) -> Callable[[int | None], Iterator[Any]]:
    return lambda count: ((inputs[i : i + size], labels[i : i + size]) for i in range(0, len(inputs), size))


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2, groups=4), nn.ReLU(True), nn.Dropout(0.5),
        nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4 * 9, 5),
    ).double()  # fmt: skip


def objective(module: nn.Module, shape: tuple[int, ...], count: int = 30, size: int = 8) -> Objective:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, *shape, generator=generator).double()
    labels = torch.randint(5, (count,), generator=generator)
    return Objective(module, batches_of(inputs, labels, size), loss)


@pytest.mark.parametrize("way", ["outer", "vmap", "auto"])
@pytest.mark.parametrize("samples", [1, 3, 10])
def test_fast_ways_equal_the_loop(way: str, samples: int) -> None:
    net = conv_net()
    names = weights(net)
    expected = gradient_rows(objective(net, (2, 8, 8)), names, 50, samples, torch.float64, "loop")
    got = gradient_rows(objective(net, (2, 8, 8)), names, 50, samples, torch.float64, way)
    assert got.shape == (30 // samples, sum(net.get_parameter(name).numel() for name in names))
    assert torch.allclose(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("length", [9, 40, 130])  # positions of an output on both sides of where the way changes
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, padding=1),
        nn.Conv1d(4, 6, 4, stride=2, dilation=2, padding=3, groups=2),
        nn.Conv2d(4, 6, (3, 1), stride=(1, 2), padding=(2, 0), groups=2),
        nn.Conv2d(4, 4, (1, 3), dilation=(1, 2), padding=(0, 2), groups=4),
    ],
)
def test_convolutions_of_any_shape_equal_the_loop(layer: nn.Module, length: int, samples: int) -> None:
    shape = (4, length) if isinstance(layer, nn.Conv1d) else (4, 5, length // 5 + 3)
    net = nn.Sequential(layer, nn.Flatten(2), nn.AdaptiveAvgPool1d(3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(5))
    net.double()(torch.zeros(1, *shape).double())
    rows = [
        gradient_rows(objective(net, shape), ["0.weight"], 6, samples, torch.float64, way) for way in ("loop", "outer")
    ]
    assert torch.allclose(rows[0], rows[1], rtol=0, atol=1e-12)


def test_linear_layers_over_sequences_equal_the_loop() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(torch.tanh(self.inner(x))).mean(1)

    torch.manual_seed(0)
    net = Words().double()
    names = ["inner.weight", "outer.weight"]
    rows = [gradient_rows(objective(net, (6, 3)), names, 9, 2, torch.float64, way) for way in ("loop", "outer")]
    assert torch.allclose(rows[0], rows[1], rtol=0, atol=1e-12)


def test_a_layer_called_twice_adds_both_calls() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(5, 5)
    net = nn.Sequential(shared, nn.Tanh(), shared).double()
    rows = [gradient_rows(objective(net, (5,)), ["0.weight"], 9, 1, torch.float64, way) for way in ("loop", "auto")]
    assert torch.allclose(rows[0], rows[1], rtol=0, atol=1e-12)


def test_the_mean_of_all_rows_is_the_full_batch_gradient() -> None:
    net = conv_net()
    names = weights(net)
    source = objective(net, (2, 8, 8), count=12, size=12)
    rows = gradient_rows(source, names, 12, 1, torch.float64)
    net.eval()
    (batch,) = source.batches(None)
    grads = torch.autograd.grad(loss(net, batch), [net.get_parameter(name) for name in names])
    assert torch.allclose(rows.mean(0), torch.cat([grad.flatten() for grad in grads]), rtol=0, atol=1e-12)


def test_a_sum_reduced_loss_falls_back_to_rows_that_equal_the_loop() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 5).double()
    source = objective(net, (4,))
    source.loss_fn = lambda module, batch: functional.cross_entropy(module(batch[0]), batch[1], reduction="sum")
    rows = [gradient_rows(source, ["weight"], 7, 3, torch.float64, way) for way in ("loop", "auto")]
    assert torch.allclose(rows[0], rows[1], rtol=0, atol=1e-12)


def test_a_loss_with_python_control_flow_falls_back_to_the_loop() -> None:
    class Plain(nn.Module):  # no linear layer, so no outer products
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(-1, 1, 20).view(4, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    net = Plain().double()
    source = objective(net, (4,))

    def branching(module: nn.Module, batch: Any) -> Tensor:
        value = functional.cross_entropy(module(batch[0]), batch[1])
        return value * 2 if value.detach().item() > 1 else value

    source.loss_fn = branching
    rows = [gradient_rows(source, ["weight"], 7, 2, torch.float64, way) for way in ("loop", "auto")]
    assert torch.equal(rows[0], rows[1])


def test_nothing_of_the_module_changes() -> None:
    net = conv_net().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.get_rng_state()
    gradient_rows(objective(net, (2, 8, 8)), weights(net), 8, 2)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert net.training
    assert torch.equal(state, torch.get_rng_state())
    assert not net[0]._forward_hooks


def test_storage_in_bfloat16_rounds_the_rows() -> None:
    net = conv_net()
    exact = gradient_rows(objective(net, (2, 8, 8)), weights(net), 8, 2, torch.float64)
    stored = gradient_rows(objective(net, (2, 8, 8)), weights(net), 8, 2, torch.bfloat16)
    assert stored.dtype == torch.bfloat16
    assert torch.allclose(stored.double(), exact, rtol=1e-2, atol=1e-6)


def test_batches_are_joined_and_cut_into_whole_rows() -> None:
    source = [torch.arange(i, i + 5) for i in range(0, 20, 5)]
    parts = list(regroup(source, rows=6, samples_per_row=3, chunk_rows=lambda: 4))
    assert [count for _, count in parts] == [4, 2]
    assert torch.cat([part for part, _ in parts]).tolist() == list(range(18))


def test_ragged_batches_give_the_whole_rows_they_have() -> None:
    source = [torch.zeros(5, 2), torch.ones(4, 3)]
    parts = list(regroup(source, rows=9, samples_per_row=2, chunk_rows=lambda: 8))
    assert [(tuple(part.shape), count) for part, count in parts] == [((4, 2), 2), ((4, 3), 2)]


def test_slicing_leaves_what_is_no_sample_alone() -> None:
    batch = {"x": torch.arange(6).view(3, 2), "scale": torch.tensor(2.0), "tag": "a"}
    part = slice_batch(batch, 1, 3)
    assert part["x"].tolist() == [[2, 3], [4, 5]]
    assert part["scale"].item() == 2.0
    assert part["tag"] == "a"
    assert join_batches(batch, part)["x"].shape == (5, 2)


def test_too_few_samples_for_a_row_are_refused() -> None:
    net = nn.Linear(4, 5).double()
    with pytest.raises(ValueError, match="fewer than `samples_per_row`=31"):
        gradient_rows(objective(net, (4,)), ["weight"], 3, 31)


def test_a_loss_that_fails_on_whole_batches_too_is_the_users_own_error() -> None:
    net = nn.Linear(4, 5)
    source = Objective(net, lambda count: ["text"], loss)
    with pytest.raises(TypeError, match="must be Tensor, not str"):
        gradient_rows(source, ["weight"], 3, 1)


class Graphs:
    """Stands for a batch without a batch dimension: its loss is one number for all that it holds."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def test_where_batches_cannot_be_cut_a_row_is_a_whole_batch() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 5).double()
    graphs = [Graphs(torch.randn(3, 4).double()) for _ in range(4)]

    def pooled(module: nn.Module, batch: Any) -> Tensor:
        return module(batch.x).square().sum()

    with GradientSource(Objective(net, lambda count: iter(graphs), pooled), ["weight"]) as stream:
        with pytest.warns(UserWarning, match="each gradient row is one whole batch"):
            plan = stream.plan(9, 16)
        assert plan == (4, 1)
        rows = stream.rows(3, 16, torch.float64)
        value, mean = stream.mean(2)
    expected = [torch.autograd.grad(pooled(net, graph), net.weight)[0].flatten() for graph in graphs]
    assert torch.allclose(rows, torch.stack(expected[:3]))
    assert torch.allclose(mean.double(), (expected[3] + expected[0]) / 2)
    assert value == pytest.approx((pooled(net, graphs[3]) + pooled(net, graphs[0])).item() / 2)
    assert stream.whole is True


def test_a_loss_that_takes_one_batch_size_only_has_rows_of_that_size() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 5).double()
    source = objective(net, (4,), count=24, size=8)
    source.loss_fn = lambda module, batch: loss(module, (batch[0].view(8, 4), batch[1]))
    with GradientSource(source, ["weight"]) as stream:
        with pytest.warns(UserWarning, match=r"cannot be had \(RuntimeError: shape '\[8, 4\]'"):
            plan = stream.plan(9, 2)
        assert plan == (3, 8)
        rows = stream.rows(9, 2, torch.float64)
        assert stream.samples == 8
        assert stream.mean(5)[1].shape == (20,)
    batches = list(source.batches(None))
    assert torch.allclose(rows[2], torch.autograd.grad(loss(net, batches[2]), net.weight)[0].flatten())


@pytest.mark.parametrize(("rows", "samples"), [(9, 1), (5, 1), (9, 3), (2, 16)])
def test_the_plan_is_what_the_data_have(rows: int, samples: int) -> None:
    net = nn.Linear(4, 5).double()
    with GradientSource(objective(net, (4,), count=7, size=2), ["weight"]) as stream:
        planned = stream.plan(rows, samples)
        assert planned == {(9, 1): (7, 1), (5, 1): (5, 1), (9, 3): (7, 1), (2, 16): (2, 3)}[rows, samples]
        assert len(stream.rows(*planned)) == planned[0]


def test_no_sample_at_all_is_refused() -> None:
    net = nn.Linear(4, 5).double()
    with (
        GradientSource(objective(net, (4,), count=0), ["weight"]) as stream,
        pytest.raises(ValueError, match="there is no calibration sample"),
    ):
        stream.plan(3, 1)


def odd_batches(bad: int) -> tuple[nn.Module, Objective]:
    """Batches of 3 samples; sample `bad` has an infinite input. The loss is finite for all others."""
    torch.manual_seed(0)
    inputs = torch.randn(15, 4).double()
    inputs[bad] = float("inf")
    net = nn.Linear(4, 5).double()
    return net, Objective(net, batches_of(inputs, torch.zeros(15, dtype=torch.long), 3), loss)


@pytest.mark.parametrize("way", ["auto", "outer", "vmap", "loop"])
@pytest.mark.parametrize(
    ("bad", "samples", "which"), [(0, 1, "batch 0"), (10, 1, "batch 3"), (10, 4, "batch(es)? 2|3")]
)
def test_a_gradient_that_is_not_finite_names_its_batch(way: str, bad: int, samples: int, which: str) -> None:
    _, source = odd_batches(bad)
    with pytest.raises(ValueError, match=rf"calibration ({which}).* is not finite"):
        gradient_rows(source, ["weight"], 15 // samples, samples, way=way)


def test_a_mean_gradient_that_is_not_finite_names_its_batch() -> None:
    _, source = odd_batches(7)
    with GradientSource(source, ["weight"]) as stream, pytest.raises(ValueError, match=r"batch 2 is not finite"):
        stream.mean(15)


@pytest.mark.parametrize(("argument", "value"), [("rows", 0), ("samples_per_row", 0), ("way", "magic")])
def test_bad_arguments_are_named(argument: str, value: Any) -> None:
    net = nn.Linear(4, 5).double()
    arguments = {"rows": 2, "samples_per_row": 1, "way": "auto", argument: value}
    with pytest.raises(ValueError, match=f"`{argument}`"):
        gradient_rows(objective(net, (4,)), ["weight"], **arguments)


def test_a_source_goes_on_where_it_stopped_and_starts_over_at_the_end() -> None:
    net = nn.Linear(4, 5).double()
    source = objective(net, (4,), count=10, size=5)
    whole = gradient_rows(source, ["weight"], 10, 1, torch.float64)
    with GradientSource(source, ["weight"]) as stream:
        parts = [stream.rows(5, 1, torch.float64) for _ in range(3)]
    assert torch.allclose(torch.cat(parts[:2]), whole, rtol=0, atol=1e-12)
    assert torch.allclose(parts[2], whole[:5], rtol=0, atol=1e-12)


def test_one_call_never_uses_a_sample_twice() -> None:
    net = nn.Linear(4, 5).double()
    with GradientSource(objective(net, (4,), count=10, size=5), ["weight"]) as stream:
        assert len(stream.rows(5, 1)) == 5
        assert len(stream.rows(50, 1)) <= 10
        assert len(stream.rows(50, 1)) == 10


def test_a_source_evaluates_at_other_weights_and_leaves_the_module_alone() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 5).double()
    source = objective(net, (4,), count=10, size=5)
    before = net.weight.detach().clone()
    with GradientSource(source, ["weight"]) as stream:
        stream.at(torch.zeros(20, dtype=torch.float64))
        value, grad = stream.mean(10)
    (first, second) = source.batches(None)
    zero = nn.Linear(4, 5).double()
    with torch.no_grad():
        zero.weight.zero_()
        zero.bias.copy_(net.bias)
    expected = (loss(zero, first) + loss(zero, second)) / 2
    assert value == pytest.approx(float(expected.detach()), abs=1e-12)
    assert torch.allclose(grad, torch.autograd.grad(expected, zero.weight)[0].flatten().float(), atol=1e-6)
    assert torch.equal(net.weight, before)


def test_statistics_of_a_source_are_those_of_the_current_weights() -> None:
    net = conv_net().eval()
    source = objective(net, (2, 8, 8), count=16, size=8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with GradientSource(source, ["0.weight"]) as stream:
        stream.at(torch.zeros(net[0].weight.numel(), dtype=torch.float64))
        stream.refit_batch_norm(16)
        mean = stream.buffers["1.running_mean"].clone()
        stream.at(net[0].weight.detach().flatten())
        stream.refit_batch_norm(16)
    assert bool((mean == 0).all())  # a convolution of zeros without bias
    inner = torch.cat([net[0](batch[0]) for batch in source.batches(None)])
    assert torch.allclose(stream.buffers["1.running_mean"], inner.mean((0, 2, 3)).detach())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert (net[1].momentum, net[1].training) == (0.1, False)


def test_statistics_are_found_beside_metrics_and_without_a_batch_of_one() -> None:
    class Measured(nn.Module):  # comparing two metrics makes a third one, which counts as true
        def __init__(self) -> None:
            super().__init__()
            self.accuracy = MulticlassAccuracy(5)
            self.inner, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.inner(x))

    net = Measured().double()
    source = objective(net, (4,), count=9, size=4)  # batches of 4, 4 and 1
    with GradientSource(source, ["inner.weight"]) as stream:
        stream.refit_batch_norm(9)
    first, second, _ = source.batches(None)
    means = [net.inner(batch[0]).mean(0).detach() for batch in (first, second)]
    assert torch.allclose(stream.buffers["norm.running_mean"], (means[0] + means[1]) / 2)


def test_the_held_loss_is_the_mean_over_samples_of_several_batches_and_stays() -> None:
    net = nn.Linear(4, 5).double()
    source = objective(net, (4,), count=12, size=5)  # batches of 5, 5 and 2
    with GradientSource(source, ["weight"]) as stream:
        first = stream.held_loss(8)
        stream.mean(4)
        assert stream.held_loss(8) == first
    (x, y), (more, labels) = list(source.batches(None))[:2]
    whole = loss(net, (torch.cat([x, more[:3]]), torch.cat([y, labels[:3]])))
    assert first == pytest.approx(whole.item(), rel=1e-12)
