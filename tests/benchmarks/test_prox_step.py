"""What proximal steps, half-space steps and target removals cost per training step of ResNet-20, all in one run.

`pytest -m benchmark -s tests/benchmarks/test_prox_step.py`
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Measured, show
from torch import nn

from lightning_prune.context import Context, event_generator
from lightning_prune.masks import MaskManager
from lightning_prune.methods._hspg_periods import periods_of
from lightning_prune.methods._hspg_plan import cubic_share
from lightning_prune.methods._hspg_target import TargetHalfSpace
from lightning_prune.methods._hspg_variants import Dhspg, Hesso
from lightning_prune.methods._prox_blocks import Layout, group_parts
from lightning_prune.methods._prox_parts import tensor_parts
from lightning_prune.methods._prox_penalties import GroupPenalty, L1Penalty
from lightning_prune.methods._prox_weights import protect, weigh
from lightning_prune.recipes.networks import resnet20
from lightning_prune.targets import select

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(1200)]
BATCH, BUDGET, FAR = 128, 0.02, 10**9


def no_objective() -> Any:
    raise ValueError("no data here")


def context_of(net: nn.Module) -> Context:
    targets = select(net)
    return Context(
        net, {name: weight.detach() for name, weight in targets.items()}, MaskManager.of(net).alive(targets), 0.0, 0,
        event_generator(0, 0), no_objective, ((torch.randn(2, 3, 32, 32),), {}),
    )  # fmt: skip


def engines(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """One engine of every mode on the same network, each in the middle of its work."""
    context = context_of(net)

    def layout() -> Layout:
        found = group_parts(context, [optimizer])
        weigh(found, "sqrt_size")
        protect(found, 0.9, 1)
        return found

    def removal(kind: Any, **arguments: Any) -> Any:
        one = layout()
        plan = periods_of(one, (0, FAR), 1, 0.5)
        engine = kind(share=cubic_share, **plan, **arguments)
        for part in engine.parts:
            engine.before(part, 0)
            engine.after(part, 0)
        engine.choose()
        return engine

    parts = tensor_parts(select(net), [optimizer])
    tiny: dict[str, Any] = {"asked": 1e-12}
    found = {
        "ProxSGD": L1Penalty(parts=parts, stage_at=lambda step: "prox", **tiny),
        "OBProxSGD, orthant": L1Penalty(parts=parts, stage_at=lambda step: "projected", eps=0.0, **tiny),
        "ProxSGD, structured": GroupPenalty(layout(), stage_at=lambda step: "prox", **tiny),
        "HSPG, half-space": GroupPenalty(layout(), stage_at=lambda step: "projected", **tiny),
        "HSPG, subgradient": GroupPenalty(layout(), trial="subgradient", stage_at=lambda step: "projected", **tiny),
        "HSPG, target": removal(TargetHalfSpace),
        "HESSO": removal(Hesso),
        "DHSPG": removal(Dhspg, penalty=1e-12, amplify=1.0, ceiling=1.0, eps=0.0, tolerance=0.05),
    }
    return found


def around(engine: Any) -> Callable[[], None]:
    """What the hooks of one optimizer step do."""

    def hooks() -> None:
        for part in engine.parts:
            engine.before(part, 1)
            engine.after(part, 1)

    return hooks


def in_processor_time(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, Measured]:
    """`harness.take_turns` in processor time, which other work on the machine stretches less.

    The ratio is that of the least times: what else runs empties caches, and only ever adds.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()  # caches warm, as in training the optimizer has just touched the weights
            started = time.process_time()
            call()
            times[name].append(1e3 * (time.process_time() - started))
    first = min(times["training step"])
    return {name: Measured(statistics.median(t), min(t), max(t), min(t) / first) for name, t in times.items()}


@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.SGD(p, lr=1e-9, momentum=0.9), lambda p: torch.optim.Adam(p, lr=1e-9)],
    ids=["SGD", "Adam"],
)
def test_every_mode_costs_little_beside_a_training_step(make: Callable[..., torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = resnet20()
    inputs, labels, optimizer = torch.randn(BATCH, 3, 32, 32), torch.arange(BATCH) % 10, make(net.parameters())

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()

    step()
    hooks = {name: around(engine) for name, engine in engines(net, optimizer).items()}
    results = in_processor_time({"training step": step, **hooks}, rounds=8)
    title = f"hooks of one step, ResNet-20, batch {BATCH}, {type(optimizer).__name__}, 1 thread"
    show(title, results, dict.fromkeys(hooks, BUDGET))
    assert all(math.isfinite(result.ratio) for result in results.values())
