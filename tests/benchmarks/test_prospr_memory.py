"""Peak memory and time of ProsPr's reverse sweep against a graph through all inner steps.

    pytest -m benchmark tests/benchmarks/test_prospr_memory.py -s

Network: four convolutions with BatchNorm (32, 32, 64, 64 channels) and a linear layer on 8 x 8 inputs, batches of 128,
momentum 0.9, float32, one thread. Peak: bytes allocated at once during the call, counted by torch's profiler. Time:
of this process alone, best of three.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.curvature import Losses, point_of, replayed_losses
from lightning_prune.methods.prospr import InnerSGD, meta_gradient
from lightning_prune.objective import Objective

STEPS = (1, 3, 8, 16)
BATCH = 128
ROUNDS = 3


def network() -> nn.Module:
    layers: list[nn.Module] = []
    channels = 1
    for width in (32, 32, 64, 64):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def entropy(module: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


@pytest.fixture
def opened() -> Iterator[tuple[Losses, dict[str, Tensor], list[str]]]:
    """Losses on 17 batches, the parameters, the names of the weights."""
    torch.manual_seed(0)
    module = network()
    data = [(torch.randn(BATCH, 1, 8, 8), torch.randint(10, (BATCH,))) for _ in range(max(STEPS) + 1)]
    objective = Objective(module, lambda count: data[:count], entropy)
    with replayed_losses(objective, 0, second_order=True) as losses:
        yield losses(data), point_of(module), [name for name, p in module.named_parameters() if p.dim() > 1]


def unrolled(losses: Losses, start: Mapping[str, Tensor], sgd: InnerSGD, wanted: list[str]) -> dict[str, Tensor]:
    """The same meta-gradient by one graph through all steps (plain momentum)."""
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    point: dict[str, Tensor] = dict(leaves)
    velocity: dict[str, Tensor] = {}
    for step in range(sgd.steps):
        slopes = torch.autograd.grad(losses.parts(step)[0](point), list(point.values()), create_graph=True)
        for name, slope in zip(leaves, slopes, strict=True):
            velocity[name] = sgd.momentum * velocity[name] + slope if step else slope
            point[name] = point[name] - sgd.lr * velocity[name]
    loss = losses.parts(sgd.steps)[0](point)
    return dict(zip(wanted, torch.autograd.grad(loss, [leaves[name] for name in wanted]), strict=True))


def peak_megabytes(call: Callable[[], Any], trace: Path) -> float:
    """Largest sum of bytes that `call` held at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    profile.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        highest = max(highest, held)
    return highest / 1e6


def seconds(call: Callable[[], Any]) -> float:
    """Processor time of a call; what else runs on the machine does not count."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(1200)]


def test_memory_does_not_grow_with_inner_steps_as_the_unrolled_graph_does(opened: Any, tmp_path: Path) -> None:
    losses, start, wanted = opened
    peaks: dict[str, list[float]] = {"unrolled graph": [], "reverse sweep": [], "first order": []}
    rows = []
    for steps in STEPS:
        sgd = InnerSGD(steps, 0.05, 0.9)
        calls: dict[str, Callable[[], dict[str, Tensor]]] = {
            "unrolled graph": partial(unrolled, losses, start, sgd, wanted),
            "reverse sweep": lambda sgd=sgd: meta_gradient(losses, start, sgd, wanted)[0],
            "first order": lambda sgd=sgd: meta_gradient(losses, start, sgd, wanted, mode="first_order")[0],
        }
        ours, theirs = calls["reverse sweep"](), calls["unrolled graph"]()
        largest = max(float(value.abs().max()) for value in theirs.values())
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in wanted) < 1e-4 * largest
        times = {name: min(seconds(call) for _ in range(ROUNDS)) for name, call in calls.items()}
        for name, call in calls.items():
            peaks[name].append(peak_megabytes(call, tmp_path / "trace.json"))
        cells = [f"{peaks[name][-1]:.1f} MB, {times[name]:.2f} s" for name in calls]
        ratio = times["reverse sweep"] / times["unrolled graph"]
        rows.append(f"| {steps} | {' | '.join(cells)} | {ratio:.2f} |")
    print(f"\n| steps | {' | '.join(peaks)} | time, sweep / unrolled |\n|---|---|---|---|---|", *rows, sep="\n")
    assert peaks["reverse sweep"][-1] <= 1.3 * peaks["reverse sweep"][0]
    assert peaks["unrolled graph"][-1] >= 5 * peaks["unrolled graph"][0]
    assert ratio <= 1.4
