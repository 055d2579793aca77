"""Speed of what is shrunk, and of shrinking: latency at half the FLOPs, ResNet-50 within its budget, growth with depth.

`pytest -m benchmark -s tests/benchmarks/test_shrink_speed.py`
"""

from __future__ import annotations

import resource
import time

import pytest
import torch
from harness import show, take_turns
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_prune.cost import CostModel, units_within_budget
from lightning_prune.dependency import channel_groups
from lightning_prune.recipes.networks import resnet20, vgg16_bn
from lightning_prune.shrink import report_of, shrink

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("factory", [resnet20, vgg16_bn])
def test_half_the_flops_run_in_two_thirds_of_the_time(factory):
    module, x = factory().eval(), torch.randn(16, 3, 32, 32)
    groups = channel_groups(module, x)
    costs = CostModel(groups)
    scores = {group.name: torch.rand(len(group)) for group in groups}
    modules = {"dense": module}
    for multiple in (8, 16):
        units = units_within_budget(scores, costs, 0.5, "flops", round_to=multiple)
        share = costs.flops({name: int(mask.sum()) for name, mask in units.items()}) / costs.flops()
        modules[f"multiples of {multiple}: {share:.3f} of the FLOPs"] = shrink(module, x, units, groups).eval()
    with torch.no_grad():
        results = take_turns({name: lambda net=net: net(x) for name, net in modules.items()}, rounds=30, warmup=3)
    show(f"{factory.__name__}, batch 16, one thread", results, dict.fromkeys(list(modules)[1:], 2 / 3))
    assert min(result.ratio for result in results.values()) <= 2 / 3


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

    def forward(self, x: Tensor) -> Tensor:
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
    analysed = time.process_time() - start
    units = {group.name: torch.arange(len(group)) < len(group) // 2 for group in groups}
    small = shrink(module, x, units, groups)
    seconds = time.process_time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024**2
    Console(width=110).print(
        f"ResNet-50: {analysed:.1f} s to trace and analyse, {seconds - analysed:.1f} s to shrink and verify "
        f"(processor time, one thread), {grown:.2f} GB beyond the model; "
        f"{sum(p.numel() for p in small.parameters()) / 1e6:.1f} M of 25.6 M parameters kept"
    )
    assert sum(p.numel() for p in small.parameters()) < 0.3 * 25.6e6
    assert seconds <= 12, f"{seconds:.1f} s"
    assert grown <= 1.0, f"{grown:.2f} GB"


class Block(nn.Module):
    """A transformer block; its attention reshapes by the width of its input, or by an attribute."""

    def __init__(self, by_input: bool) -> None:
        super().__init__()
        self.by_input, self.heads = by_input, 4
        self.first, self.second = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads, each = (4, width // 4) if self.by_input else (self.heads, 8)
        q, k, v = self.qkv(self.first(x)).reshape(batch, length, 3, heads, each).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, heads * each))
        return x + self.down(self.up(self.second(x)).relu())


@pytest.mark.parametrize("by_input", [False, True], ids=["eager", "hybrid"])
def test_time_grows_no_faster_than_depth(by_input):
    table = Table(title="processor seconds, one thread; half the heads and hidden units leave")
    for column in ("blocks", "groups", "analysis", "shrink", "trials"):
        table.add_column(column, justify="right")
    seconds = {}
    for depth in (2, 4, 8, 16):
        module, x = nn.Sequential(*[Block(by_input) for _ in range(depth)]), torch.randn(2, 6, 32)
        start = time.process_time()
        groups = channel_groups(module, x)
        analysed = time.process_time()
        small = shrink(module, x, {group.name: torch.arange(len(group)) % 2 == 0 for group in groups}, groups)
        seconds[depth] = (analysed - start, time.process_time() - analysed)
        assert report_of(small).refused == {}
        table.add_row(str(depth), str(len(groups)), *(f"{s:.2f}" for s in seconds[depth]), str(report_of(small).trials))
    Console(width=110).print(table)
    assert sum(seconds[16]) <= 2.0 * 16 / 8 * sum(seconds[8])
