"""CHITA on the trained 784-40-20-10 network, whole MNIST, no training but the stages, beside its controls.

`pytest -m benchmark -s tests/benchmarks/test_chita_mlpnet.py` (needs LIGHTNING_PRUNE_DATA)

The controls spend the same samples in other ways: on SGD after magnitude pruning, or on the same refits after stages that
keep the largest weights as they are. LIGHTNING_PRUNE_ROWS names a JSON-lines file that keeps what is measured; a run that
finds a line there does not measure it again. LIGHTNING_PRUNE_ONLY=text measures the rows whose name has that text.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune import CHITA, Magnitude, MaskManager, RandomPruning, prune
from lightning_prune.objective import calibration_loader
from lightning_prune.recipes.data import MNIST
from lightning_prune.recipes.networks import mlpnet

FOLDER = Path(os.environ.get("LIGHTNING_PRUNE_DATA", ""))
pytestmark = [
    pytest.mark.benchmark,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(
        not (FOLDER / "mlpnet_mnist.safetensors").is_file(),
        reason="needs MNIST and mlpnet_mnist.safetensors in LIGHTNING_PRUNE_DATA",
    ),
]
SEEDS, SPARSITIES = (0, 1, 2), (0.5, 0.8, 0.9, 0.95, 0.98)
STEPS, BATCH = 720, 128  # 92,160 samples, about as many as CHITA reads
RATES = (0.03, 0.1, 0.3)  # of SGD; the best one on validation data counts
NOTHING_MOVES: dict[str, Any] = {"ridge": 1e12, "first_order": False, "metric": 0.0}
METHODS: dict[str, Callable[[float, int], Any]] = {
    "random": lambda s, seed: RandomPruning(s, seed=seed, measure=False),
    "magnitude": lambda s, seed: Magnitude(s, measure=False),
    "magnitude, then SGD": lambda s, seed: Magnitude(s, measure=False),
    "magnitude in the same stages, same refits": lambda s, seed: CHITA(s, seed=seed, measure=False, **NOTHING_MOVES),
    "CHITA, `stages=1, refits=0, num_grads=1000`": lambda s, seed: CHITA(
        s, seed=seed, stages=1, refits=0, num_grads=1000, measure=False
    ),
    "CHITA, `stages=1, num_grads=32, refits=100`": lambda s, seed: CHITA(
        s, seed=seed, stages=1, num_grads=32, refits=100, measure=False
    ),
    "CHITA, `stages=1`": lambda s, seed: CHITA(s, seed=seed, stages=1, measure=False),
    "CHITA, `refits=400`": lambda s, seed: CHITA(s, seed=seed, refits=400, measure=False),
    "CHITA": lambda s, seed: CHITA(s, seed=seed, measure=False),
    "CHITA, `stages=15, refits=4000`": lambda s, seed: CHITA(s, seed=seed, stages=15, refits=4000, measure=False),
}


def loss(module: nn.Module, batch: list[Tensor]) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1])


def sgd(pruned: nn.Module, train: list[Tensor], seed: int, rate: float) -> nn.Module:
    """A copy after steps of momentum SGD whose length falls linearly, on what is kept."""
    masks, net = MaskManager.of(pruned).masks, copy.deepcopy(pruned)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, nesterov=True)
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(seed)).repeat(2)
    for step, index in zip(range(STEPS), order.split(BATCH), strict=False):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / STEPS)
        optimizer.zero_grad()
        loss(net, [part[index] for part in train]).backward()
        optimizer.step()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.mul_(masks[name])
    return net


def accuracy(net: nn.Module, data: list[Tensor]) -> float:
    with torch.no_grad():
        return 100 * float((net(data[0]).argmax(1) == data[1]).float().mean())


def loop_seconds(train: list[Tensor]) -> float:
    """A plain loop of 1,000 gradients of 16 samples: what any machine can be compared by."""
    net = mlpnet()
    weights = list(net.parameters())
    started = time.process_time()
    for row in range(1000):
        part = slice(16 * row, 16 * row + 16)
        gradients = torch.autograd.grad(loss(net, [train[0][part], train[1][part]]), weights)
        torch.cat([gradient.flatten() for gradient in gradients])
    return time.process_time() - started


class Rows:
    """Lines measured before, and the file they go to."""

    def __init__(self) -> None:
        name = os.environ.get("LIGHTNING_PRUNE_ROWS")
        self.path = Path(name) if name else None
        lines = self.path.read_text().splitlines() if self.path and self.path.is_file() else []
        self.known = {tuple(row["key"]): row for row in map(json.loads, lines)}

    def get(self, key: tuple[str, float, int], make: Callable[[], dict[str, float]]) -> dict[str, float]:
        if key not in self.known:
            self.known[key] = {"key": key, **make()}
            if self.path:
                with self.path.open("a") as file:
                    file.write(json.dumps(self.known[key]) + "\n")
        return self.known[key]


def test_accuracy_and_seconds_beside_the_controls() -> None:
    torch.set_num_threads(1)
    data = MNIST(batch_size=2000)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    loaders = calibration_loader(data.train_dataloader(), 0), data.val_dataloader(), data.test_dataloader()
    train, val, test = ([torch.cat(parts) for parts in zip(*loader, strict=True)] for loader in loaders)
    weights, rows = load_file(FOLDER / "mlpnet_mnist.safetensors"), Rows()

    def measure(name: str, sparsity: float, seed: int) -> dict[str, float]:
        net = mlpnet()
        net.load_state_dict(weights)
        loader = calibration_loader(data.train_dataloader(), seed)
        started = time.process_time()
        receipt = prune(net, METHODS[name](sparsity, seed), loader, loss)
        seconds = time.process_time() - started
        assert receipt.reached["kept"] == 32_360 - int(sparsity * 32_360 + 1e-9)
        if name.endswith("SGD"):
            started = time.process_time()
            net = max((sgd(net, train, seed, rate) for rate in RATES), key=lambda n: accuracy(n, val))
            seconds += (time.process_time() - started) / len(RATES)
        return {"accuracy": accuracy(net, test), "seconds": seconds, "loop": loop_seconds(train)}

    console, loops = Console(width=160, soft_wrap=True), []
    console.print("| method | " + " | ".join(map(str, SPARSITIES)) + " |")
    for name in (name for name in METHODS if os.environ.get("LIGHTNING_PRUNE_ONLY", "") in name):
        cells = []
        for sparsity in SPARSITIES:
            found = [
                rows.get((name, sparsity, seed), lambda s=sparsity, n=name, i=seed: measure(n, s, i)) for seed in SEEDS
            ]
            accuracies, seconds = ([row[key] for row in found] for key in ("accuracy", "seconds"))
            loops += [row["loop"] for row in found]
            spread = max(accuracies) - min(accuracies)
            cells.append(f"{statistics.mean(accuracies):.2f} ({spread:.2f}), {statistics.median(seconds):.1f} s")
        console.print(f"| {name} | " + " | ".join(cells) + " |")
    console.print(f"a plain loop of 1,000 gradients of 16 samples: {statistics.median(loops):.2f} s")
