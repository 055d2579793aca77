"""CHITA on ResNet-20 (268,336 of its weights): seconds for gradients and solve, memory and accuracy, beside magnitude.

`pytest -m benchmark -s tests/benchmarks/test_chita_resnet20.py` (needs LIGHTNING_PRUNE_DATA; LIGHTNING_PRUNE_ONLY=text
measures the lines whose name has that text)

The pictures are Fashion-MNIST, padded to 32 x 32 pixels in three channels; the network has seen them for 80 steps. What a
gradient or a solve costs does not depend on the pictures; the accuracies are no claim about CIFAR-10.
"""

from __future__ import annotations

import copy
import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import CHITA, Magnitude, prune
from lightning_prune.methods import _chita_stages
from lightning_prune.objective import calibration_loader
from lightning_prune.recipes.data import FashionMNIST
from lightning_prune.recipes.networks import resnet20
from lightning_prune.sample_gradients import GradientSource

FOLDER = Path(os.environ.get("LIGHTNING_PRUNE_DATA", ""))
pytestmark = [
    pytest.mark.benchmark,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not (FOLDER / "fashion_mnist").is_dir(), reason="needs Fashion-MNIST in LIGHTNING_PRUNE_DATA"),
]
DENSE_STEPS, SEED = 80, 0
ONE_STAGE: dict[str, Any] = {"stages": 1, "num_grads": 500, "grad_batch": 1, "refits": 0}
FEW: dict[str, Any] = {"grad_batch": 1, "refit_samples": 64}
METHODS: dict[str, Any] = {
    "magnitude": lambda s: Magnitude(s, refit_bn=True, refit_bn_batches=8, measure=False),
    "one stage of 500 x 1, no refits": lambda s: chita(s, **ONE_STAGE),
    "one stage of 500 x 1, no refits, `iht`": lambda s: chita(s, algorithm="iht", **ONE_STAGE),
    "one stage of 64 x 1, no refits": lambda s: chita(s, stages=1, num_grads=64, refits=0, grad_batch=1),
    "one stage of 16 x 1, 2 refits": lambda s: chita(
        s, 4, stages=1, num_grads=16, refits=2, grad_batch=1, refit_samples=32
    ),
    "one stage of 32 x 1, 3 refits": lambda s: chita(
        s, 4, stages=1, num_grads=32, refits=3, grad_batch=1, refit_samples=32
    ),
    "one stage of 64 x 1, 10 refits": lambda s: chita(s, 10, stages=1, num_grads=64, refits=10, **FEW),
    "2 stages of 32 x 1, 24 refits": lambda s: chita(s, 6, stages=2, num_grads=32, refits=24, **FEW),
    "15 stages of 200 x 8, no refits": lambda s: chita(
        s, stages=15, num_grads=200, grad_batch=8, refits=0, schedule="exp"
    ),
}


def chita(sparsity: float, statistics: int = 8, **arguments: Any) -> CHITA:
    """CHITA with one ridge, and BatchNorm statistics from so many batches."""
    return CHITA(sparsity, ridge=1e-4, refit_bn_batches=statistics, measure=False, **arguments)


def loss(module: nn.Module, batch: list[Tensor]) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1])


def pictures(loader: Any, count: int) -> TensorDataset:
    """The first `count` samples in a fixed order, as colour pictures of CIFAR's size."""
    parts = [(x, y) for x, y in calibration_loader(loader, 0)]
    x, y = (torch.cat(tensors)[:count] for tensors in zip(*parts, strict=True))
    return TensorDataset(functional.pad(x, (2, 2, 2, 2), value=float(x.min())).expand(-1, 3, -1, -1).contiguous(), y)


def trained(train: DataLoader) -> nn.Module:
    torch.manual_seed(SEED)
    net = resnet20()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for step, batch in zip(range(DENSE_STEPS), train, strict=False):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / DENSE_STEPS)
        optimizer.zero_grad()
        loss(net, batch).backward()
        optimizer.step()
    optimizer.zero_grad()
    return net


class Clock:
    """Adds up the processor seconds of some functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds: dict[str, float] = {"rows": 0.0, "solve": 0.0}
        monkeypatch.setattr(GradientSource, "rows", self.timed("rows", GradientSource.rows))
        monkeypatch.setattr(_chita_stages, "run_stage", self.timed("solve", _chita_stages.run_stage))

    def timed(self, key: str, call: Any) -> Any:
        def wrapped(*arguments: Any, **more: Any) -> Any:
            started = time.process_time()
            result = call(*arguments, **more)
            self.seconds[key] += time.process_time() - started
            return result

        return wrapped


def test_seconds_memory_and_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    data = FashionMNIST(batch_size=2000)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    train = DataLoader(pictures(data.train_dataloader(), 10_000), batch_size=64, shuffle=True)
    test = pictures(data.test_dataloader(), 1000).tensors
    dense = trained(train).eval()
    console = Console(width=160, soft_wrap=True)
    console.print(
        "| method | sparsity | accuracy % | gradient rows s | solve s | whole run s | peak of the process GiB |"
    )
    for sparsity in (0.9,):
        for name, make in METHODS.items():
            if os.environ.get("LIGHTNING_PRUNE_ONLY", "") not in name:
                continue
            net, clock = copy.deepcopy(dense), Clock(monkeypatch)
            started = time.process_time()
            receipt = prune(net, make(sparsity), calibration_loader(train, SEED), loss)
            seconds = time.process_time() - started
            monkeypatch.undo()
            with torch.no_grad():
                accuracy = 100 * float((net.eval()(test[0]).argmax(1) == test[1]).float().mean())
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            console.print(
                f"| {name} | {sparsity} | {accuracy:.1f} | {clock.seconds['rows']:.1f} | {clock.seconds['solve']:.1f} | "
                f"{seconds:.1f} | {peak:.1f} |"
            )
            total = receipt.reached["total"]
            assert total == 268_336
            assert receipt.reached["kept"] == total - int(sparsity * total + 1e-9)
