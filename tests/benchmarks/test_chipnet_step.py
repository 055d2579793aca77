"""What a training step costs with soft gates on the network: dense and gated in one run.

`pytest -m benchmark -s tests/benchmarks/test_chipnet_step.py`
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import show, take_turns
from torch import Tensor, nn

from lightning_prune.channels import Channels
from lightning_prune.dependency import channel_groups
from lightning_prune.methods._chipnet_hooks import GatedReads, find_places, misread
from lightning_prune.methods._chipnet_layout import build_layout
from lightning_prune.methods._chipnet_training import GateTraining, Plan, initial_psi
from lightning_prune.recipes.residual import resnet20
from lightning_prune.targets import select

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(1200)]
BATCH, STEPS = 64, 10_000


def gated(net: nn.Module, inputs: Tensor, hard_from: int, frozen: bool = True) -> GateTraining:
    """Put gates on a network as the callback does."""
    selected = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in select(net).items()}
    channels = Channels(net, channel_groups(net, inputs[:2]), selected)
    layout = build_layout(channels)
    called, _ = misread(net, layout.slots, layout.size, channels.all_groups.analysis.calls)
    parameters = dict(net.named_parameters())
    reads = GatedReads(layout.slots, {s.name: parameters[s.name].dim() for s in layout.slots}, torch.device("cpu"))
    plan = Plan(0.25, "flops", STEPS, 20, 40 / STEPS, 30.0, 10.0, hard_from, 0.1, 1, True)
    gates = GateTraining(layout, reads, plan, initial_psi(layout.size, torch.Generator().manual_seed(0)))
    reads.install(find_places(net, layout.slots, called)[0])
    if frozen:
        reads.freeze_norms(net)
    return gates


def step_of(net: nn.Module, inputs: Tensor, before: Callable[[], Any] = lambda: None) -> Callable[[], None]:
    labels = torch.arange(len(inputs)) % 10
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        before()
        optimizer.step()

    return step


def moved(gates: GateTraining) -> Callable[[], Any]:
    def move() -> None:
        gates.update(gates.reads.take_gradient(gates.layout.size))
        gates.go_to(gates.step + 1)

    return move


def test_a_gated_step_costs_little_more_than_a_dense_one() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dense, inputs = resnet20(), torch.randn(BATCH, 3, 32, 32)
    steps = {"dense": step_of(dense, inputs)}
    for name, hard_from, frozen in (
        ("soft gates", STEPS, True), ("soft gates, bn_soft=train", STEPS, False), ("straight-through tail", 0, True),
    ):  # fmt: skip
        net = copy.deepcopy(dense)
        gates = gated(net, inputs, hard_from, frozen)
        steps[name] = step_of(net, inputs, moved(gates))
        before = gates.psi.detach().clone()
        steps[name]()
        assert not torch.equal(gates.psi, before)
    title = f"one training step, ResNet-20, batch {BATCH}, 1 thread"
    show(title, take_turns(steps, rounds=15, warmup=2), {name: 1.10 for name in steps if name != "dense"})
