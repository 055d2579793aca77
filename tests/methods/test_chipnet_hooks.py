"""Gates on a live module: exact in value and gradient, gone without a trace, and blind to what they cannot scale."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).parent))
from chipnet_nets import FAMILIES, Chain, channels_of, example, random_gates, scrambled

from lightning_prune.masks import MaskManager
from lightning_prune.methods._chipnet_hooks import GatedReads, called_modules, find_places, misread
from lightning_prune.methods._chipnet_layout import Layout, build_layout


def gate(module: nn.Module, coupling: str = "graph", inputs: Any = None) -> tuple[Layout, GatedReads]:
    channels = channels_of(module, inputs)
    layout = build_layout(channels, coupling)
    called, wrong = misread(module, layout.slots, layout.size, channels.all_groups.analysis.calls)
    assert wrong == []
    parameters = dict(module.named_parameters())
    ranks = {slot.name: parameters[slot.name].dim() for slot in layout.slots}
    reads = GatedReads(layout.slots, ranks, torch.device("cpu"))
    reads.install(find_places(module, layout.slots, called)[0])
    return layout, reads


@pytest.mark.parametrize("name", FAMILIES)
def test_binary_gates_equal_the_masks(name: str) -> None:
    module, inputs = scrambled(name), example()
    masked = copy.deepcopy(module)
    layout, reads = gate(module)
    gates = random_gates(layout, 1)
    reads.set(gates.float())
    channels = channels_of(masked)
    MaskManager.of(masked).set_masks(channels.masks(layout.kept(gates)))
    torch.testing.assert_close(module(inputs), masked(inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["residual", "flattened", "concatenated"])
def test_soft_gates_have_the_gradient_of_scaled_weights(name: str) -> None:
    """Against `functional_call` with w * z written out, in 64 bit."""
    module, inputs = scrambled(name).double(), example().double()
    channels = channels_of(module, inputs)
    layout = build_layout(channels)
    z = torch.rand(layout.size, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
    flat = torch.cat([z, z.new_ones(1)])
    weights = dict(module.named_parameters())
    for slot in layout.slots:
        shape = [len(slot.gates) if dim == slot.dim else 1 for dim in range(weights[slot.name].dim())]
        weights[slot.name] = weights[slot.name] * flat[slot.gates].view(shape)
    expected = functional_call(module, weights, (inputs,))
    (slope,) = torch.autograd.grad(expected.square().sum(), z)
    _, reads = gate(module, inputs=inputs)
    reads.set(z.detach().float())
    found = module(inputs)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reads.take_gradient(layout.size).double(), slope, rtol=1e-4, atol=1e-4)
    assert not reads.take_gradient(layout.size).any()


def test_gates_on_norms_scale_their_output() -> None:
    """BatchNorm with (weight z, bias z) is z * BatchNorm(x), in value and gradient."""
    module = scrambled("flattened").double()
    layout, reads = gate(module, "per_layer", example().double())
    z = torch.rand(layout.size, generator=torch.Generator().manual_seed(0)).double()
    reads.scales = [scale.detach().double().requires_grad_() for scale in reads.scales]
    for handles in module.modules():
        for hook in handles._forward_pre_hooks.values():
            hook.__self__.scales = reads.scales
    flat = torch.cat([z, z.new_ones(1)])
    x = torch.randn(2, 6, 6, 6, generator=torch.Generator().manual_seed(1)).double()
    plain = nn.functional.batch_norm(
        x, module.na.running_mean, module.na.running_var, module.na.weight, module.na.bias, eps=module.na.eps
    )
    mine = {slot.name: (slot, scale) for slot, scale in zip(layout.slots, reads.scales, strict=True)}
    (slot, weight), (_, bias) = mine["na.weight"], mine["na.bias"]
    with torch.no_grad():
        weight.copy_(flat[slot.gates])
        bias.copy_(flat[slot.gates])
    ours = module.na(x)
    torch.testing.assert_close(ours, plain * flat[slot.gates].view(1, -1, 1, 1), rtol=1e-12, atol=1e-12)
    ours.square().sum().backward()
    by_hand = (2 * plain * plain * flat[slot.gates].view(1, -1, 1, 1)).sum((0, 2, 3))
    torch.testing.assert_close(weight.grad + bias.grad, by_hand.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("coupling", ["graph", "per_layer"])
def test_nothing_of_the_module_changes_and_nothing_stays_behind(coupling: str) -> None:
    module, inputs = scrambled("residual"), example()
    before, keys = module(inputs), list(module.state_dict())
    parameters = [(name, id(parameter)) for name, parameter in module.named_parameters()]
    layout, reads = gate(module, coupling)
    reads.set(torch.rand(layout.size))
    reads.freeze_norms(module)
    assert not torch.equal(module(inputs), before)
    assert list(module.state_dict()) == keys
    assert [(name, id(parameter)) for name, parameter in module.named_parameters()] == parameters
    reads.remove()
    assert torch.equal(module(inputs), before)
    assert all(not child._forward_hooks and not child._forward_pre_hooks for child in module.modules())


def test_an_error_in_forward_leaves_the_parameters_in_place() -> None:
    module = scrambled("flattened")
    parameters = [(name, id(parameter)) for name, parameter in module.named_parameters()]
    gate(module)
    with pytest.raises(RuntimeError):
        module(torch.zeros(2, 3, 6, 6))
    with pytest.raises(RuntimeError):
        module.fc(torch.zeros(2, 7))
    assert [(name, id(parameter)) for name, parameter in module.named_parameters()] == parameters


def test_a_copy_of_a_gated_module_works_on_its_own() -> None:
    module, inputs = scrambled("flattened"), example()
    layout, reads = gate(module)
    reads.set(torch.rand(layout.size))
    twin = copy.deepcopy(module)
    expected = module(inputs)
    with torch.no_grad():
        module.fc.weight.zero_()
    torch.testing.assert_close(twin(inputs), expected)


@pytest.mark.parametrize("training", [True, False])
def test_frozen_norms_leave_statistics_and_flags_alone(training: bool) -> None:
    module = scrambled("flattened").train()
    module.nb.train(training)
    _, reads = gate(module)
    statistics = {name: tensor.clone() for name, tensor in module.named_buffers()}
    reads.freeze_norms(module)
    module(example())
    assert all(torch.equal(tensor, statistics[name]) for name, tensor in module.named_buffers())
    assert (module.na.training, module.nb.training) == (True, training)
    reads.remove()
    module(example())
    assert not torch.equal(module.na.running_mean, statistics["na.running_mean"])
    assert torch.equal(module.nb.running_mean, statistics["nb.running_mean"]) is not training


@torch.no_grad()
def test_a_norm_in_train_mode_undoes_a_gate_and_a_frozen_one_does_not() -> None:
    """A whole group at z = 0.1 changes nothing to speak of where the next norm divides its scale out."""
    torch.manual_seed(0)
    module = Chain().train()
    inputs = torch.randn(32, 1, 6, 6)
    for _ in range(100):
        module(inputs)  # statistics of these very inputs
    layout, reads = gate(module, inputs=inputs)
    group = layout.costs.groups[0].name
    assert group == "a"  # what b reads, in front of the norm nb
    z = torch.where(layout.group_of_unit == 0, 0.1, 1.0)
    changes = []
    for frozen in (False, True):
        if frozen:
            reads.freeze_norms(module)
        reads.set(torch.ones(layout.size))
        plain = module(inputs)
        reads.set(z)
        changes.append(float((module(inputs) - plain).norm() / plain.norm()))
    assert changes[0] < 1e-2 < changes[1]


# what hooks cannot reach


class Attention(nn.Module):
    """The output projection inside attention is read by the module above it, which is never told."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x, x, x, need_weights=False)[0]
        return self.head(x + self.down(self.up(x).relu()))


def test_a_projection_that_is_never_called_is_scaled_by_the_module_above_it() -> None:
    module, inputs = Attention().eval(), torch.randn(2, 5, 8)
    channels = channels_of(module, inputs)
    calls = channels.all_groups.analysis.calls
    assert "mix.out_proj" not in called_modules(copy.deepcopy(module), calls)
    layout = build_layout(channels)
    assert misread(module, layout.slots, layout.size, calls)[1] == []


class Sneaky(nn.Module):
    """Reads a weight past the module that holds it, which is called too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = self.b(x) + nn.functional.linear(x.square(), self.b.weight)
        return self.d(self.c(x.relu()).relu())


def test_weights_read_past_their_module_are_found() -> None:
    module, inputs = Sneaky(), torch.randn(4, 6)
    channels = channels_of(module, inputs)
    layout = build_layout(channels)
    assert misread(module, layout.slots, layout.size, channels.all_groups.analysis.calls)[1] == ["b.weight"]
