"""Gradual CHITA with fine-tuning beside gradual and one-shot magnitude pruning, random pruning and the dense network.

`LIGHTNING_PRUNE_DATA=... pytest -m benchmark -s tests/benchmarks/test_chita_gradual.py`

ResNet-20 of width 8 on 5,000 pictures of Fashion-MNIST, averaged to 14 x 14 pixels. Per seed one dense network of 6
epochs, from which every row starts; every row trains for 6 more epochs. An epoch is 50 steps of 50 pictures. Gradual rows
prune after 0, 1, 2 and 3 epochs (poly from 0.5) under restarting cosines, one-shot rows before the first step under one
cosine. Every result is a line of `chita_gradual.jsonl` in the folder LIGHTNING_PRUNE_RESULTS, where a second run finds
what is done.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_prune import CHITA, Magnitude, RandomPruning
from lightning_prune.methods._chita_stages import stage_sparsities
from lightning_prune.recipes.classifier import LitClassifier
from lightning_prune.recipes.data import FashionMNIST
from lightning_prune.recipes.networks import resnet20
from lightning_prune.recipes.schedules import restarting_cosine, warmup_cosine

FOLDER = Path(os.environ.get("LIGHTNING_PRUNE_DATA", ""))
pytestmark = [
    pytest.mark.benchmark,
    pytest.mark.timeout(7200),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not (FOLDER / "fashion_mnist").is_dir(), reason="needs Fashion-MNIST in LIGHTNING_PRUNE_DATA"),
]
SEEDS, SPARSITIES = (0, 1, 2), (0.9, 0.95, 0.98)
EPOCHS, STEPS, PRUNINGS = 6, 50, 4
PEAK = 0.1


def pairs(sparsity: float) -> list[tuple[Any, float]]:
    """When and how far the gradual rows prune: poly from 0.5 over the first epochs."""
    levels = stage_sparsities("poly", PRUNINGS, sparsity, start=0.5)
    return [("start" if epoch == 0 else epoch, level) for epoch, level in enumerate(levels)]


# `refits=0`: the training steps are those of the fit, as many in every row
FISHER: dict[str, Any] = {"num_grads": 250, "grad_batch": 4, "refits": 0, "measure": False, "refit_bn_batches": 10}


METHODS: dict[str, Any] = {
    "random, one-shot": lambda s: RandomPruning(s, measure=False, refit_bn=True, refit_bn_batches=10),
    "magnitude, one-shot": lambda s: Magnitude(s, measure=False, refit_bn=True, refit_bn_batches=10),
    "magnitude, gradual": lambda s: Magnitude(at=pairs(s), measure=False, refit_bn=True, refit_bn_batches=10),
    "CHITA, one-shot": lambda s: CHITA(s, **FISHER),
    "CHITA, gradual": lambda s: CHITA(at=pairs(s), stages=1, first_order=False, **FISHER),
    "CHITA, gradual, scores": lambda s: CHITA(
        at=pairs(s), stages=1, first_order=False, algorithm="obs", metric=0.5, **FISHER
    ),
}


def module(gradual: bool) -> LitClassifier:
    cosines = partial(restarting_cosine, restarts=PRUNINGS - 1, interval_fraction=1 / EPOCHS)
    return LitClassifier(
        nn.Sequential(nn.AvgPool2d(2), resnet20(in_channels=1, width=8)),
        optimizer=partial(torch.optim.SGD, lr=PEAK, momentum=0.9, weight_decay=5e-4),
        scheduler=cosines if gradual else partial(warmup_cosine, warmup_fraction=0.0),
        scheduler_interval="step",
    )


def fit(net: LitClassifier, data: FashionMNIST, callbacks: list[Any]) -> tuple[float, float]:
    """Train; returns test accuracy in % and processor seconds."""
    trainer = Trainer(
        max_epochs=EPOCHS, callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, limit_train_batches=STEPS,
    )  # fmt: skip
    started = time.process_time()
    trainer.fit(net, train_dataloaders=data.train_dataloader())
    seconds = time.process_time() - started
    (result,) = trainer.test(net, data.test_dataloader(), verbose=False)
    return 100 * result["test_accuracy"], seconds


class Results:
    """Lines of results, found again by a later run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def find(self, **key: Any) -> dict[str, Any] | None:
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def dense_network(seed: int, data: FashionMNIST, results: Results) -> dict[str, Any]:
    """The state every row of this seed starts from, trained once."""
    path = results.path.with_name(f"chita_gradual_dense_{seed}.pt")
    if not path.exists():
        seed_everything(seed, verbose=False)
        net = module(gradual=False)
        accuracy, seconds = fit(net, data, [])
        torch.save(net.state_dict(), path)
        results.add({"method": "dense", "sparsity": 0.0, "seed": seed, "accuracy": accuracy, "seconds": seconds})
    return torch.load(path, weights_only=True)


def one(name: str, sparsity: float, seed: int, data: FashionMNIST, state: dict[str, Any], results: Results) -> None:
    seed_everything(seed + 100, verbose=False)
    net = module(gradual="gradual" in name)
    net.load_state_dict(state)
    callbacks = [] if name.startswith("dense") else [METHODS[name](sparsity)]
    accuracy, seconds = fit(net, data, callbacks)
    row: dict[str, Any] = {"method": name, "sparsity": sparsity, "seed": seed, "accuracy": accuracy, "seconds": seconds}
    for callback in callbacks:
        last = callback.history[-1]
        assert abs(last["sparsity"] - sparsity) < 1e-3  # random pruning rounds layer by layer
        row["pruning_seconds"] = sum(event["seconds"] for event in callback.history)
        row["notes"] = [note for event in callback.history for note in event["notes"]]
    results.add(row)


def cell(results: Results, name: str, sparsity: float) -> str:
    values = [row["accuracy"] for row in results.rows if (row["method"], row["sparsity"]) == (name, sparsity)]
    return f"{statistics.mean(values):.2f} ({max(values) - min(values):.2f})" if values else "-"


def test_gradual_chita_beside_its_controls(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder = Path(os.environ.get("LIGHTNING_PRUNE_RESULTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder / "chita_gradual.jsonl")
    data = FashionMNIST(subset=5000, batch_size=50)
    data.prepare_data()
    data.setup("fit")
    for seed in SEEDS:
        state = dense_network(seed, data, results)
        wanted = [("dense, as long again", 0.0), *((name, s) for s in SPARSITIES for name in METHODS)]
        for name, sparsity in wanted:
            if results.find(method=name, sparsity=sparsity, seed=seed) is None:
                one(name, sparsity, seed, data, state, results)
                Console(width=120).print(results.rows[-1])
    table = Table(title="Test accuracy in %, mean of seeds 0-2 (range)")
    for column in ("method", "dense", *map(str, SPARSITIES)):
        table.add_column(column)
    for name in ("dense", "dense, as long again"):
        table.add_row(name, cell(results, name, 0.0))
    for name in METHODS:
        table.add_row(name, "", *(cell(results, name, sparsity) for sparsity in SPARSITIES))
    Console(width=120).print(table)
    assert all(0 <= row["accuracy"] <= 100 for row in results.rows)
