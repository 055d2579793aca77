"""CHITA on the trained 784-40-20-10 network, whole MNIST, no training but the stages, beside its controls.

`pytest -m benchmark -s tests/benchmarks/test_chita_mlpnet.py` (needs LIGHTNING_PRUNE_DATA)
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune import CHITA, Magnitude, RandomPruning, prune
from lightning_prune.objective import calibration_loader
from lightning_prune.recipes.data import MNIST
from lightning_prune.recipes.networks import mlpnet

FOLDER = Path(os.environ.get("LIGHTNING_PRUNE_DATA", ""))
pytestmark = [
    pytest.mark.benchmark,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not (FOLDER / "mlpnet_mnist.safetensors").is_file(),
        reason="needs MNIST and mlpnet_mnist.safetensors in LIGHTNING_PRUNE_DATA",
    ),
]
SEEDS, SPARSITIES = (0, 1, 2), (0.5, 0.9, 0.98)
METHODS: dict[str, Any] = {
    "random": lambda s, seed: RandomPruning(s, seed=seed, measure=False),
    "magnitude": lambda s, seed: Magnitude(s, measure=False),
    "CHITA, refits=0": lambda s, seed: CHITA(s, seed=seed, refits=0, measure=False),
    "CHITA": lambda s, seed: CHITA(s, seed=seed, measure=False),
    "CHITA, stages=15": lambda s, seed: CHITA(s, seed=seed, stages=15, measure=False),
}


def loss(module: nn.Module, batch: list[Tensor]) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1])


def test_accuracy_and_seconds_beside_the_controls() -> None:
    torch.set_num_threads(1)
    data = MNIST(batch_size=2000)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    test = [torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True)]
    weights = load_file(FOLDER / "mlpnet_mnist.safetensors")
    table = Table(title="MLPNet, MNIST test accuracy in %, mean of seeds 0-2 (spread), CPU seconds, 1 thread")
    for column in ("method", *map(str, SPARSITIES)):
        table.add_column(column)
    for name, make in METHODS.items():
        cells = []
        for sparsity in SPARSITIES:
            results, seconds = [], []
            for seed in SEEDS:
                net = mlpnet()
                net.load_state_dict(weights)
                started = time.process_time()
                receipt = prune(net, make(sparsity, seed), calibration_loader(data.train_dataloader(), seed), loss)
                seconds.append(time.process_time() - started)
                with torch.no_grad():
                    results.append(float((net(test[0]).argmax(1) == test[1]).float().mean()) * 100)
                assert receipt.reached["kept"] == 32_360 - int(sparsity * 32_360 + 1e-9)
            cells.append(
                f"{statistics.mean(results):.2f} ({max(results) - min(results):.2f}), {statistics.median(seconds):.1f} s"
            )
        table.add_row(name, *cells)
        Console(width=120).print(name, *cells)
    Console(width=120).print(table)
