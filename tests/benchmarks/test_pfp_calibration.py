"""Sensitivities of ResNet-20 on 128 images of 3 x 32 x 32, one thread: seconds of processor time, and peak memory by batches.

`pytest -m benchmark -s tests/benchmarks/test_pfp_calibration.py`
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.channels import Channels
from lightning_prune.dependency import channel_groups
from lightning_prune.methods._pfp_evidence import Shares, calibrate
from lightning_prune.methods._pfp_streams import Stream, consumers_of
from lightning_prune.objective import Objective
from lightning_prune.recipes.residual import resnet20

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(1200)]
BATCH, SECONDS, MEGABYTES = 16, 30.0, 16.0


def loss(module: nn.Module, batch: list[Tensor]) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1])


def images(count: int) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield [torch.randn(BATCH, 3, 32, 32, generator=generator), torch.zeros(BATCH, dtype=torch.int64)]


def peak() -> float:
    """Largest memory of this process so far, in MB; ru_maxrss counts kilobytes on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_calibration_takes_seconds_and_memory_does_not_grow_with_batches() -> None:
    torch.set_num_threads(1)
    net = resnet20().eval()
    groups = channel_groups(net, torch.zeros(2, 3, 32, 32))
    selected = {name: torch.ones_like(p, dtype=torch.bool) for name, p in net.named_parameters() if p.dim() > 1}
    watched, _ = consumers_of(Channels(net, groups, selected))
    stream = Stream(Objective(net, lambda count: images(count or 8), loss), watched)
    calibrate(stream, images(1), Shares())
    first = peak()
    started = time.process_time()
    calibrate(stream, images(8), Shares())
    seconds = time.process_time() - started
    second = peak()
    Console(width=120).print(
        f"{len(watched)} readers, 128 images: {seconds:.1f} s of processor time (budget {SECONDS:.0f}); peak memory "
        f"{first:.0f} MB after 1 batch, {second:.0f} MB after 8 more"
    )
    assert seconds <= SECONDS
    assert second - first <= MEGABYTES
