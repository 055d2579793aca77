"""Random networks of the operators that have rules, random units: cut equals mask, and what is refused stays whole."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune._shrink_probe import mask_units
from lightning_prune.cost import CostModel
from lightning_prune.dependency import channel_groups
from lightning_prune.measure import count_flops, count_parameters
from lightning_prune.shrink import report_of, shrink


class Fuzzed(nn.Module):
    """Random blocks on images, then a head; some of them freeze what they touch."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.kinds, self.blocks, width = [], nn.ModuleList(), draw.choice([4, 8])
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        for _ in range(draw.randint(2, 5)):
            kind = draw.choice(list(_BLOCKS))
            block, width = _BLOCKS[kind][0](draw, width)
            self.kinds.append(kind)
            self.blocks.append(block)
        self.flat = draw.random() < 0.5
        self.head = nn.Linear(width * (16 if self.flat else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for kind, block in zip(self.kinds, self.blocks, strict=True):
            x = _BLOCKS[kind][1](block, x)
        x = F.adaptive_avg_pool2d(x, 4)
        return self.head(x.flatten(1) if self.flat else x.mean((2, 3)))


def _conv(inputs: int, outputs: int, groups: int = 1, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups)


def _plain(draw: random.Random, width: int) -> tuple[nn.Module, int]:
    out = draw.choice([4, 6, 8])
    norm = draw.choice([nn.BatchNorm2d(out), nn.GroupNorm(2, out), nn.Identity(), nn.InstanceNorm2d(out, affine=True)])
    return nn.Sequential(_conv(width, out), norm, draw.choice([nn.ReLU(), nn.PReLU(out), nn.Sigmoid()])), out


def _residual(draw: random.Random, width: int) -> tuple[nn.Module, int]:
    inner = draw.choice([4, 6])
    return nn.Sequential(_conv(width, inner), nn.BatchNorm2d(inner), nn.ReLU(), _conv(inner, width)), width


def _pair(draw: random.Random, width: int) -> tuple[nn.Module, int]:
    first, second = draw.choice([2, 4]), draw.choice([4, 6])
    return nn.ModuleList([_conv(width, first), _conv(width, second)]), first + second


def _inverted(draw: random.Random, width: int) -> tuple[nn.Module, int]:
    wide, out = 2 * width, draw.choice([4, 8])
    return nn.Sequential(_conv(width, wide, size=1), nn.ReLU6(), _conv(wide, wide, wide), _conv(wide, out, size=1)), out


def _grouped(draw: random.Random, width: int) -> tuple[nn.Module, int]:
    return nn.Sequential(_conv(width, 8), nn.ReLU(), _conv(8, 12, 4), _conv(12, 4)), 4


def _gate(draw: random.Random, width: int) -> tuple[nn.Module, int]:
    return _conv(width, 16), 8


def _scaled(draw: random.Random, width: int) -> tuple[nn.Module, int]:
    return nn.ModuleList([nn.Linear(width, 4), nn.Linear(4, width)]), width


def _shuffled(draw: random.Random, width: int) -> tuple[nn.Module, int]:
    return nn.Sequential(_conv(width, 16), nn.PixelShuffle(2), nn.AvgPool2d(2)), 4


def _apply_residual(block: Any, x: Tensor) -> Tensor:
    return (x + block(x)).relu()


def _apply_pair(block: Any, x: Tensor) -> Tensor:
    return torch.cat([block[0](x).relu(), block[1](x)], 1)


def _apply_gate(block: Any, x: Tensor) -> Tensor:
    gate, value = block(x).chunk(2, 1)
    return gate.sigmoid() * value


def _apply_scaled(block: Any, x: Tensor) -> Tensor:
    return x * block[1](block[0](x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]


def _apply_softmax(block: Any, x: Tensor) -> Tensor:
    return block(x).softmax(1)


def _apply_place(block: Any, x: Tensor) -> Tensor:
    x = block(x)
    return x + torch.arange(x.shape[1], dtype=x.dtype)[None, :, None, None]


def _apply_slice(block: Any, x: Tensor) -> Tensor:
    x = block(x)
    return torch.cat([x[:, :3], x[:, 3:]], 1)


def _apply_transposed(block: Any, x: Tensor) -> Tensor:
    return block(x.flatten(2).transpose(1, 2)).relu().transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])


_BLOCKS: dict[str, tuple[Any, Any]] = {
    "plain": (_plain, lambda block, x: block(x)),
    "residual": (_residual, _apply_residual),
    "pair": (_pair, _apply_pair),
    "inverted": (_inverted, lambda block, x: block(x)),
    "grouped": (_grouped, lambda block, x: block(x)),
    "gate": (_gate, _apply_gate),
    "scaled": (_scaled, _apply_scaled),
    "shuffled": (_shuffled, lambda block, x: block(x)),
    "softmax": (lambda draw, width: (_conv(width, 6), 6), _apply_softmax),
    "place": (lambda draw, width: (_conv(width, 6), 6), _apply_place),
    "slice": (lambda draw, width: (_conv(width, 8), 8), _apply_slice),
    "tokens": (lambda draw, width: (nn.Linear(width, 6), 6), _apply_transposed),
}


def check(seed: int) -> None:
    torch.manual_seed(seed)
    module, x = Fuzzed(seed).double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    groups = channel_groups(module, x)
    assert groups.report.faults == ()
    units = {}
    for group in groups:
        mask = torch.rand(len(group)) < 0.5
        mask[int(torch.randint(len(group), ()))] = True
        units[group.name] = mask
    before = copy.deepcopy(module.state_dict())
    small = shrink(module, x, units, groups)
    report = report_of(small)
    gone = {name: torch.nonzero(~units[name]).ravel().tolist() for name in report.units}
    masked = copy.deepcopy(module)
    mask_units(masked, list(groups), gone)
    for training in (False, True):
        expected, found = (m.train(training)(x).detach() for m in (masked, small))
        assert float((expected - found).abs().max() / expected.abs().max()) < 1e-10
    kept = {name: int(mask.sum()) for name, mask in units.items() if name in report.units}
    costs = CostModel(groups)
    assert costs.params(kept) == count_parameters(small)
    assert costs.counted_flops(kept) == count_flops(small, x)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert report.refused == {}


@pytest.mark.parametrize("seed", range(12))
def test_random_networks(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12, 120))
def test_many_random_networks(seed):
    check(seed)
