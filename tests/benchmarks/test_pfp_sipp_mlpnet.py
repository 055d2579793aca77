"""SiPP on the trained 784-40-20-10 network, whole MNIST, no retraining, beside magnitude and random.

`LIGHTNING_PRUNE_DATA=... pytest -m benchmark -s tests/benchmarks/test_pfp_sipp_mlpnet.py`
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune import Magnitude, RandomPruning, SiPP, prune
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
SEEDS, SPARSITIES = (0, 1, 2), (0.5, 0.8, 0.9)


def sipp(variant: str) -> Any:
    return lambda sparsity, seed: SiPP(sparsity, variant=variant, seed=seed, measure=False)


METHODS: dict[str, Any] = {
    "random": lambda sparsity, seed: RandomPruning(sparsity, seed=seed, measure=False),
    "magnitude": lambda sparsity, seed: Magnitude(sparsity, measure=False),
    "SiPP, deterministic": sipp("deterministic"),
    "SiPP, sampled": sipp("sampled"),
    "SiPP, hybrid": sipp("hybrid"),
}


def loss(module: nn.Module, batch: list[Tensor]) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1])


def test_accuracy_beside_the_controls() -> None:
    torch.set_num_threads(1)
    data = MNIST(batch_size=256)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    test = [torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True)]
    weights = load_file(FOLDER / "mlpnet_mnist.safetensors")
    table = Table(title="MLPNet, MNIST test accuracy in %, no retraining, mean of seeds 0-2 (spread)")
    for column in ("method", *map(str, SPARSITIES)):
        table.add_column(column)
    for name, make in METHODS.items():
        cells = []
        for sparsity in SPARSITIES:
            found = []
            for seed in SEEDS:
                net = mlpnet()
                net.load_state_dict(weights)
                receipt = prune(net, make(sparsity, seed), calibration_loader(data.train_dataloader(), seed), loss)
                assert receipt.reached["kept"] == 32_360 - int(sparsity * 32_360 + 1e-9)
                with torch.no_grad():
                    found.append(float((net(test[0]).argmax(1) == test[1]).float().mean()) * 100)
            cells.append(f"{statistics.mean(found):.2f} ({max(found) - min(found):.2f})")
        table.add_row(name, *cells)
    Console(width=120).print(table)
