"""The main job's network: pruned in one shot with and without new BatchNorm statistics, and fine-tuned, beside controls.

`pytest -m benchmark -s tests/benchmarks/test_chita_digits.py`

The small convolutional network of `lightning-prune`, 15 dense epochs on scikit-learn's digits per seed; each method
prunes a copy, which then trains for 10 epochs.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning.pytorch import Trainer, seed_everything
from rich.console import Console
from rich.table import Table

from lightning_prune import CHITA, Magnitude, RandomPruning, prune
from lightning_prune.objective import calibration_loader

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(3600), pytest.mark.filterwarnings("ignore")]
SEEDS, SPARSITIES = (0, 1, 2), (0.9,)
METHODS: dict[str, Any] = {
    "random": lambda s, bn: RandomPruning(s, refit_bn=bn, measure=False),
    "magnitude": lambda s, bn: Magnitude(s, refit_bn=bn, measure=False),
    "CHITA, refits=0": lambda s, bn: CHITA(s, refit_bn=bn, refits=0, measure=False),
    "CHITA": lambda s, bn: CHITA(s, refit_bn=bn, measure=False),
}


def trainer(epochs: int, *callbacks: Any) -> Trainer:
    return Trainer(
        max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip


def accuracy(model: Any, data: Any) -> float:
    return 100 * trainer(1).test(model, data.test_dataloader(), verbose=False)[0]["test_accuracy"]


def mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ({max(values) - min(values):.2f})"


def test_pruned_and_fine_tuned_beside_the_controls() -> None:
    torch.set_num_threads(1)
    with initialize_config_module("lightning_prune.conf", version_base="1.3"):
        cfg = compose("prune")
    found: dict[tuple[str, float], list[tuple[float, ...]]] = {}
    dense: list[float] = []
    for seed in SEEDS:
        seed_everything(seed, verbose=False)
        model, data = instantiate(cfg.model), instantiate(cfg.data)
        data.setup("fit")
        trainer(15).fit(model, data.train_dataloader())
        dense.append(accuracy(model, data))
        for name, make in METHODS.items():
            for sparsity in SPARSITIES:
                stale, pruned = copy.deepcopy(model), copy.deepcopy(model)
                prune(stale, make(sparsity, False), calibration_loader(data.train_dataloader(), seed))
                started = time.process_time()
                prune(pruned, method := make(sparsity, True), calibration_loader(data.train_dataloader(), seed))
                seconds, once = time.process_time() - started, accuracy(pruned, data)
                trainer(10, method).fit(pruned, data.train_dataloader())
                row = (accuracy(stale, data), once, accuracy(pruned, data), seconds)
                found.setdefault((name, sparsity), []).append(row)
    table = Table(title=f"Test accuracy in %, mean of seeds 0-2 (range); dense {mean(dense)}")
    for column in ("method", "sparsity", "pruned, refit_bn=False", "pruned", "fine-tuned", "pruning s"):
        table.add_column(column)
    for (name, sparsity), rows in found.items():
        old, once, tuned, seconds = (list(values) for values in zip(*rows, strict=True))
        cells = [name, str(sparsity), mean(old), mean(once), mean(tuned), f"{statistics.median(seconds):.1f}"]
        table.add_row(*cells)
        Console(width=120).print("| " + " | ".join(cells) + " |")
    Console(width=120).print(table)
    best = {name: statistics.mean(row[1] for row in found[name, 0.9]) for name in METHODS}
    assert best["CHITA"] > best["magnitude"] > best["random"]
