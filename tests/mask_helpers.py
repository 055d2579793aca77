"""Helpers of the mask tests: a small network, random masks, snapshots, steps as a Trainer takes them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.masks import MaskManager, full
from lightning_prune.targets import named_tensors


def small_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


def random_masks(module: nn.Module, density: float = 0.5, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(parameter.shape, generator=generator) < density
        for name, parameter in named_tensors(module).items()
        if name.endswith("weight")
    }


def snapshot(module: nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything a failing call might have changed, copied."""
    manager = MaskManager.of(module)
    return copy.deepcopy(
        {
            "state": module.state_dict(),
            "masks": manager.masks,
            "version": [manager.version],
            "optimizers": [list(optimizer.state.values()) for optimizer in optimizers],
        }
    )


def assert_equal_trees(one: Any, two: Any) -> None:
    """Bit for bit: tensors by their values, everything else by equality."""
    if isinstance(one, Tensor):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert list(one) == list(two)
        for key in one:
            assert_equal_trees(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            assert_equal_trees(left, right)
    else:
        assert one == two


def pruned_values(module: nn.Module) -> Tensor:
    parameters = named_tensors(module)
    masks = MaskManager.of(module).masks
    return torch.cat([full(parameters[name].detach())[~mask.cpu()].flatten() for name, mask in masks.items()])


def train(
    module: nn.Module, optimizer: torch.optim.Optimizer, steps: int, watch: Callable[[], None] = lambda: None
) -> list[float]:
    """Steps as a Trainer takes them: backward, gradient mask, step."""
    inputs, targets = torch.randn(16, 6), torch.randint(3, (16,))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(inputs).float(), targets)
        loss.backward()
        MaskManager.of(module).mask_gradients(optimizer)
        return loss

    losses = []
    for _ in range(steps):
        losses.append(float(optimizer.step(closure).detach()))
        watch()
    return losses


def nothing_kept(shape: tuple[int, ...] = (8, 6)) -> Tensor:
    """A mask that prunes everything."""
    return torch.zeros(shape, dtype=torch.bool)
