"""Networks of every family that ChipNet must prune exactly, and their channels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.channels import Channels
from lightning_prune.dependency import channel_groups
from lightning_prune.methods._chipnet_layout import Layout, build_layout
from lightning_prune.recipes.residual import PreActResNet, ResNet
from lightning_prune.targets import select


class Chain(nn.Module):
    """Convolutions with BatchNorm and an activation, flattened into a linear layer."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.activation = activation
        self.a, self.b = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1, bias=False)
        self.na, self.nb = nn.BatchNorm2d(6), nn.BatchNorm2d(5)
        self.fc = nn.Linear(5 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.na(self.a(x)))
        return self.fc(self.activation(self.nb(self.b(x))).flatten(1))


class Depthwise(nn.Module):
    """Expansion, depthwise convolution, projection; a norm after each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.point, self.fc = nn.Conv2d(6, 8, 1), nn.Linear(8, 3)
        self.n1, self.n2, self.n3 = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.n2(self.deep(F.relu6(self.n1(self.stem(x))))))
        return self.fc(F.relu(self.n3(self.point(x))).mean((2, 3)))


class Dense(nn.Module):
    """Each layer reads all before it, concatenated, through a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(size, 4, 3, padding=1) for size in (1, 4, 8))
        self.nb, self.nc, self.nf = nn.BatchNorm2d(4), nn.BatchNorm2d(8), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = torch.cat([x, self.b(F.relu(self.nb(x)))], 1)
        x = torch.cat([x, self.c(F.relu(self.nc(x)))], 1)
        return self.fc(F.relu(self.nf(x)).mean((2, 3)))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: ResNet(1, 1, 3, 4, "A"),
    "residual_projected": lambda: ResNet(1, 1, 3, 4, "B"),
    "preactivation": lambda: PreActResNet(1, 1, 3, 4, (4, 8, 16), "B"),
    "flattened": Chain,
    "sigmoid": lambda: Chain(torch.sigmoid),
    "depthwise": Depthwise,
    "concatenated": Dense,
}


def example(batch: int = 2) -> Tensor:
    return torch.randn(batch, 1, 6, 6, generator=torch.Generator().manual_seed(3))


def scrambled(name: str) -> nn.Module:
    """A network whose norms have statistics and biases that hide nothing."""
    torch.manual_seed(0)
    module = FAMILIES[name]()
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            for tensor in (child.weight, child.bias, child.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(child.running_var, 0.5, 2.0)
    return module.eval()


def channels_of(module: nn.Module, inputs: Any = None) -> Channels:
    groups = channel_groups(module, example() if inputs is None else inputs)
    selected = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in select(module).items()}
    return Channels(module, groups, selected)


@functools.cache
def layout_of(name: str, coupling: str = "graph") -> Layout:
    return build_layout(channels_of(scrambled(name)), coupling)


def random_gates(layout: Layout, seed: int) -> Tensor:
    """Binary gates of which every segment has one at least."""
    generator = torch.Generator().manual_seed(seed)
    gates = torch.rand(layout.size, generator=generator) < 0.5
    for segment in layout.segments.unique():
        members = (layout.segments == segment).nonzero().flatten()
        gates[members[torch.randint(len(members), (), generator=generator)]] = True
    return gates
