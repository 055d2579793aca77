"""Channels of many kinds of networks are brought to zero and cut out without a change; what cannot be is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from integration.toys import QUIET, fit, leaks
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import DHSPG, HESSO, HSPG, ProxSGD, shrink

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.* left no weight in")]


def block(before: int, after: int, **settings: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False, **settings), nn.BatchNorm2d(after), nn.ReLU()
    )


class Net(LightningModule):
    """Six classes of 3 x 8 x 8 images, by `features` and a head on their mean."""

    width = 8

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = block(3, 8), block(8, 8)
        self.head = nn.Linear(self.width, 6)

    def features(self, images: Tensor) -> Tensor:
        return self.second(self.first(images))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean(dim=(2, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)


class Residual(Net):
    def features(self, images: Tensor) -> Tensor:
        images = self.first(images)
        return torch.relu(images + self.second(images))


class Concat(Net):
    width = 16

    def features(self, images: Tensor) -> Tensor:
        images = self.first(images)
        return torch.cat([images, self.second(images)], dim=1)


class Depthwise(Net):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Sequential(block(8, 8, groups=8), block(8, 8))


class Flattened(Net):
    width = 8 * 16

    def forward(self, images: Tensor) -> Tensor:
        return self.head(nn.functional.max_pool2d(self.features(images), 2).flatten(1))


class PreActivation(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

    def features(self, images: Tensor) -> Tensor:
        images = self.first(images)
        return images + self.second(images)


class Transposed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2), nn.BatchNorm2d(8), nn.ReLU())


class GroupNormalised(Net):
    """Channels that share a norm go together."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU())


KINDS = [Net, Residual, Concat, Depthwise, Flattened, PreActivation, Transposed, GroupNormalised]


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(24, 3, 8, 8, generator=generator), torch.arange(24) % 6), batch_size=4)


def trained(kind: Callable[[], Net], *callbacks: Any) -> Any:
    torch.manual_seed(0)
    module = kind()
    fit(module, *callbacks, loader=loader())
    return module.eval()


@torch.no_grad()
def moved(smaller: nn.Module, module: nn.Module, images: Tensor) -> float:
    """How far apart the outputs are."""
    return float((smaller(images) - module(images)).abs().max())


def convolutions(module: nn.Module) -> int:
    """Weights in convolutions."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "method",
    [lambda: HSPG(0.5, measure=False), lambda: HESSO(0.5, measure=False), lambda: DHSPG(0.5, measure=False)],
    ids=["hspg", "hesso", "dhspg"],
)
def test_zero_channels_are_cut_out_without_changing_the_network(kind: Any, method: Any) -> None:
    module = trained(kind, method())
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    smaller = shrink(module, images)
    assert leaks(module) == []
    assert convolutions(smaller) < convolutions(module)
    assert moved(smaller, module, images) <= 1e-5


class Between(Net):
    """Something of its own between the two blocks."""

    between: Callable[[], nn.Module] = staticmethod(nn.Identity)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), type(self).between())


class Sigmoid(Between):
    between = nn.Sigmoid


class Softplus(Between):
    between = nn.Softplus


class Normalised(Between):
    """A LayerNorm over all channels: one that is zero still counts in its mean."""

    between = staticmethod(lambda: nn.LayerNorm([8, 8, 8]))


@pytest.mark.parametrize("kind", [Sigmoid, Softplus, Normalised])
def test_channels_that_zero_weights_do_not_make_zero_stay_whole(kind: Any) -> None:
    method = HSPG(0.5, measure=False)
    module = trained(kind, method)
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    assert bool((module.first[0].weight.detach() != 0).flatten(1).any(1).all())
    assert int((module.second[0].weight.detach() != 0).flatten(1).any(1).sum()) == 4
    assert moved(shrink(module, images), module, images) <= 1e-5
    said = " ".join(method.history[-1]["notes"])
    assert "stay whole" in said
    assert "first.0" in said
    assert said.startswith(f"{4 if kind is Normalised else 12} of {8 if kind is Normalised else 16} channels are kept")


@pytest.mark.parametrize("factor", [2.0, 20.0])
@pytest.mark.parametrize("build", [HSPG, ProxSGD])
def test_no_penalty_empties_a_layer_behind_a_norm(build: Any, factor: float) -> None:
    more = {"structured": True} if build is ProxSGD else {}
    module = trained(Residual, build(penalty="auto", auto_factor=factor, measure=False, **more))
    kept = int((module.second[0].weight.detach() != 0).flatten(1).any(1).sum())
    assert kept >= 1
    if factor == 20.0:
        assert kept == 1  # of 8 channels floor(0.9 * 8) = 7 may go


def test_the_channels_that_must_stay_see_no_penalty() -> None:
    """After one step: the largest of four is where the optimizer left it, the others are shorter."""
    from prox_cases import group_penalty

    weights = nn.Parameter(torch.tensor([3.0, 4.0, 1.0, 0.0, 0.0, 2.0, 0.3, 0.4]).double())
    penalty = group_penalty(lambda p: torch.optim.SGD(p, lr=0.1), weights, 2, stage_at=lambda step: "prox", asked=6.0)
    penalty.parts[0].keep = torch.tensor([1])
    weights.grad = torch.zeros(8).double()
    penalty.after(penalty.parts[0], 0)
    assert weights.tolist() == pytest.approx([3.0, 4.0, 0.4, 0.0, 0.0, 1.4, 0.0, 0.0])


@pytest.mark.parametrize("trial", ["prox", "subgradient"])
@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.Adam(p, lr=0.1)])
def test_a_half_space_step_leaves_each_block_what_it_must_keep(trial: Any, make: Any) -> None:
    from prox_cases import group_penalty

    weights = nn.Parameter(torch.linspace(0.1, 0.8, 8).double())
    penalty = group_penalty(make, weights, 2, stage_at=lambda step: "projected", asked=50.0, trial=trial)
    (part,) = penalty.parts
    part.keep = torch.tensor([2])
    for index in range(6):
        weights.grad = torch.full(
            (8,), 9.0 if index == 0 else -1e-3
        ).double()  # the first step turns every group around
        penalty.before(part, index)
        part.optimizer.step()
        penalty.after(part, index)
    assert int((weights.detach().view(4, 2) != 0).any(1).sum()) >= 2
    assert int(part.zero.sum()) == 2
