"""What enforcing masks costs per training step: ours, `nn.utils.prune` and Lightning's `ModelPruning`, in one run.

`pytest -m benchmark -s tests/benchmarks/test_enforcement.py`
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from harness import show, take_turns
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from lightning_prune.masks import MaskManager
from lightning_prune.methods.magnitude import Magnitude, magnitude_scores
from lightning_prune.selection import keep_top
from lightning_prune.standalone import prune
from lightning_prune.targets import select

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(1200)]
SPARSITY = 0.9


def wide_mlp() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10))
    return net, torch.randn(64, 784)


def conv_net() -> tuple[nn.Module, Tensor]:
    from lightning_prune.recipes.networks import resnet20

    return resnet20(), torch.randn(32, 3, 32, 32)


def dense_step(net: nn.Module, inputs: Tensor) -> Callable[[], None]:
    return _step(net, inputs, lambda optimizer: None)


def our_step(net: nn.Module, inputs: Tensor) -> Callable[[], None]:
    manager = MaskManager.of(net)
    return _step(net, inputs, lambda optimizer: manager.attach([optimizer]), manager.mask_gradients)


def _step(
    net: nn.Module,
    inputs: Tensor,
    attach: Callable[[torch.optim.Optimizer], object],
    before: Callable[[torch.optim.Optimizer], object] = lambda optimizer: None,
) -> Callable[[], None]:
    labels = torch.arange(len(inputs)) % 10
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    attach(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        before(optimizer)
        optimizer.step()

    return step


def _torch_pruned(net: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """The same masks as `nn.utils.prune` (which Lightning's ModelPruning uses) puts them: reparametrized weights."""
    for name, mask in masks.items():
        torch_prune.custom_from_mask(net.get_submodule(name.rpartition(".")[0]), "weight", mask)
    return net


@pytest.mark.parametrize(("build", "budget"), [(wide_mlp, 1.15), (conv_net, 1.02)])
def test_enforcing_masks_costs_little_per_step(build: Callable[[], tuple[nn.Module, Tensor]], budget: float) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dense, inputs = build()
    ours, theirs = copy.deepcopy(dense), copy.deepcopy(dense)
    prune(ours, Magnitude(SPARSITY, measure=False))
    _torch_pruned(theirs, MaskManager.of(ours).masks)
    steps = {
        "dense": dense_step(dense, inputs),
        "lightning_prune": our_step(ours, inputs),
        "nn.utils.prune / ModelPruning": dense_step(theirs, inputs),
    }
    show(f"one training step, {build.__name__}, 1 thread", take_turns(steps), {"lightning_prune": budget})
    weights = dict(ours.named_parameters())
    assert all(bool((weights[name][~mask] == 0).all()) for name, mask in MaskManager.of(ours).masks.items())


def test_selecting_among_25_million_weights_costs_about_a_sort() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    scores = {f"layer{i}": torch.rand(5_000_000) for i in range(5)}
    flat = torch.cat(list(scores.values()))
    count = int(0.9 * flat.numel())
    calls = {
        "torch.kthvalue": lambda: flat.kthvalue(count),
        "torch.sort": lambda: flat.sort(),
        "keep_top, global": lambda: keep_top(scores, SPARSITY),
    }
    show("global top-k of 25 M scores, 1 thread", take_turns(calls, rounds=3, warmup=1), {"keep_top, global": 2.0})
    assert sum(int(mask.sum()) for mask in keep_top(scores, SPARSITY).values()) == flat.numel() - count


def test_scoring_by_magnitude_is_a_small_part_of_a_step() -> None:
    net, inputs = conv_net()
    weights = select(net)
    calls = {
        "training step": dense_step(net, inputs),
        "magnitude mask": lambda: keep_top(magnitude_scores(weights), SPARSITY),
    }
    results = take_turns(calls, rounds=10)
    show("one mask update of gradual pruning, ResNet-20", results)
    assert results["magnitude mask"].median > 0
