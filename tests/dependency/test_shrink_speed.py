"""Speed and memory of shrinking, and of what is shrunk; run with -m benchmark."""

from __future__ import annotations

import resource
import time

import pytest
import torch
from torch import nn

from lightning_prune.cost import CostModel, units_within_budget
from lightning_prune.dependency import channel_groups
from lightning_prune.measure import measure_milliseconds
from lightning_prune.recipes.networks import resnet20, vgg16_bn
from lightning_prune.shrink import shrink

pytestmark = pytest.mark.benchmark


@pytest.mark.parametrize("factory", [resnet20, vgg16_bn])
def test_half_the_flops_run_in_two_thirds_of_the_time(factory):
    module, x = factory().eval(), torch.randn(16, 3, 32, 32)
    groups = channel_groups(module, x)
    scores = {group.name: torch.rand(len(group)) for group in groups}
    units = units_within_budget(scores, CostModel(groups), 0.5, "flops", round_to=8)
    small = shrink(module, x, units, groups)
    times = measure_milliseconds({"dense": module, "small": small}, x, repeats=20, max_seconds=20.0)
    assert times["dense"].median / times["small"].median >= 1.5


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
        )  # fmt: skip
        same = stride == 1 and inputs == 4 * width
        way = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
        self.shortcut = nn.Identity() if same else way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.body(x) + self.shortcut(x)).relu()


def resnet50() -> nn.Module:
    """ResNet-50 for images of 224 x 224: 25.6 million parameters."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks: list[nn.Module] = []
    inputs = 64
    for stage, (depth, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)]):
        for index in range(depth):
            blocks.append(Bottleneck(inputs, width, 2 if index == 0 and stage else 1))
            inputs = 4 * width
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def test_resnet50_is_analysed_and_shrunk_within_its_budget():
    module, x = resnet50(), torch.randn(1, 3, 224, 224)
    channel_groups(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), torch.randn(2, 2))  # imports of torch.export
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    groups = channel_groups(module, x)
    units = {group.name: torch.arange(len(group)) < len(group) // 2 for group in groups}
    small = shrink(module, x, units, groups)
    seconds = time.process_time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024**2
    assert sum(p.numel() for p in small.parameters()) < 0.3 * 25.6e6
    assert seconds <= 12, f"{seconds:.1f} s"
    assert grown <= 1.0, f"{grown:.2f} GB"
