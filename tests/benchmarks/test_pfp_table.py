"""Channels of a ResNet-8 of width 8 under a budget without retraining: PFP beside structured magnitude and random.

`LIGHTNING_PRUNE_DATA=... pytest -m benchmark -s tests/benchmarks/test_pfp_table.py`
LIGHTNING_PRUNE_ROWS names a file of JSON lines: rows are appended as they come, and a second run skips those it finds.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Magnitude, MaskManager, ProvableFilterPruning, RandomPruning, prune
from lightning_prune.objective import calibration_loader
from lightning_prune.recipes.data import MNIST, FashionMNIST
from lightning_prune.recipes.residual import ResNet

FOLDER = Path(os.environ.get("LIGHTNING_PRUNE_DATA", ""))
SETS: dict[str, Any] = {"mnist": MNIST, "fashion_mnist": FashionMNIST}
pytestmark = [
    pytest.mark.benchmark,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(
        not all((FOLDER / name).is_dir() for name in SETS),
        reason="needs mnist and fashion_mnist in LIGHTNING_PRUNE_DATA",
    ),
]
SEEDS, LEVELS = (0, 1, 2), (0.75, 0.5, 0.25)
DENSE_STEPS, TUNE_STEPS, BATCH = 300, 25, 128
CALIBRATION = 6  # batches of 64, for all methods alike


def pfp(budget: float, seed: int, repaired: bool) -> ProvableFilterPruning:
    return ProvableFilterPruning(
        budget, budget_type="channels", reconstruct="ls" if repaired else "none", refit_bn=repaired, n_holdout=64, seed=seed,
        measure=False,
    )  # fmt: skip


def control(kind: Any) -> Any:
    def make(budget: float, seed: int, repaired: bool) -> Any:
        return kind(
            budget=budget, budget_type="channels", scope="layer", refit_consumers=repaired, refit_bn=repaired, seed=seed,
            measure=False,
        )  # fmt: skip

    return make


METHODS: dict[str, Any] = {
    "PFP": pfp,
    "magnitude": control(Magnitude),
    "random": control(RandomPruning),
}


def loss(module: nn.Module, batch: list[Tensor]) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1])


def small(images: Tensor) -> Tensor:
    """28 x 28 to 14 x 14 by means: a quarter of the work."""
    return functional.avg_pool2d(images, 2)


def tensors(name: str) -> tuple[DataLoader, tuple[Tensor, Tensor]]:
    data = SETS[name](batch_size=1000, subset=12000)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    train, test = (
        [torch.cat(parts) for parts in zip(*loader, strict=True)]
        for loader in (data.train_dataloader(), data.test_dataloader())
    )
    loader = DataLoader(TensorDataset(small(train[0]), train[1]), batch_size=BATCH, shuffle=True)
    return loader, (small(test[0][:2000]), test[1][:2000])


def accuracy(net: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    net.eval()
    with torch.no_grad():
        found = torch.cat([net(part).argmax(1) for part in test[0].split(500)])
    return float((found == test[1]).double().mean()) * 100


def train(net: nn.Module, loader: DataLoader, steps: int, rate: float, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.2)
    manager = MaskManager.of(net)
    manager.attach([optimizer])
    net.train()
    for _, batch in zip(range(steps), endless(loader), strict=False):
        optimizer.zero_grad()
        loss(net, batch).backward()
        manager.mask_gradients(optimizer)
        optimizer.step()
        schedule.step()
    manager.detach()


def endless(loader: DataLoader) -> Iterator[Any]:
    while True:
        yield from loader


class Rows:
    """Results that survive a stop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.held = {tuple(row["key"]): row["accuracy"] for row in map(json.loads, lines)}

    def add(self, key: tuple[Any, ...], value: float) -> None:
        self.held[key] = value
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "accuracy": value}) + "\n")


def fill(rows: Rows, name: str, seed: int) -> None:
    wanted = [(method, level) for method in METHODS for level in LEVELS]
    if all((name, seed, *key, "tuned") in rows.held for key in wanted):
        return
    torch.manual_seed(seed)
    loader, test = tensors(name)
    dense = ResNet(1, in_channels=1, num_classes=10, width=8, shortcut="B")
    train(dense, loader, DENSE_STEPS, 0.1, seed)
    rows.add((name, seed, "dense", 1.0, "raw"), accuracy(dense, test))
    calibration = list(islice(calibration_loader(DataLoader(loader.dataset, batch_size=64), seed), CALIBRATION))
    for method, level in wanted:
        if (name, seed, method, level, "tuned") in rows.held:
            continue
        for repaired in (False, True):
            net = copy.deepcopy(dense)
            receipt = prune(net, METHODS[method](level, seed, repaired), calibration, loss)
            assert receipt.reached["kept"] < receipt.reached["total"]
            rows.add((name, seed, method, level, "repaired" if repaired else "raw"), accuracy(net, test))
        train(net, loader, TUNE_STEPS, 0.02, seed)
        rows.add((name, seed, method, level, "tuned"), accuracy(net, test))


def cell(rows: Rows, name: str, method: str, level: float, stage: str) -> str:
    found = [rows.held[name, seed, method, level, stage] for seed in SEEDS]
    return f"{statistics.mean(found):.1f} ({max(found) - min(found):.1f})"


def test_accuracy_beside_the_controls(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    rows = Rows(Path(os.environ.get("LIGHTNING_PRUNE_ROWS", tmp_path / "rows.jsonl")))
    for seed in SEEDS:
        for name in SETS:
            fill(rows, name, seed)
    for name in SETS:
        dense = cell(rows, name, "dense", 1.0, "raw")
        table = Table(title=f"{name}: test accuracy in %, mean of seeds 0-2 (spread); dense {dense}")
        for column in ("units kept", "method", "no repair", "repaired", f"{TUNE_STEPS} steps"):
            table.add_column(column)
        for level in LEVELS:
            for method in METHODS:
                table.add_row(
                    f"{level:.0%}", method, *(cell(rows, name, method, level, s) for s in ("raw", "repaired", "tuned"))
                )
        Console(width=120).print(table)
