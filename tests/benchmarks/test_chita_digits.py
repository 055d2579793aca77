"""The main job's network, pruned in one shot with and without new BatchNorm statistics, beside its controls.

`pytest -m benchmark -s tests/benchmarks/test_chita_digits.py`

The small convolutional network of `lightning-prune`, 15 dense epochs on scikit-learn's digits per seed; each method
prunes a copy without `refit_bn`, then does by hand what `refit_bn` would have done. Nothing is fine-tuned.
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
from lightning_prune.objective import Objective, calibration_loader

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(3600), pytest.mark.filterwarnings("ignore")]
SEEDS, SPARSITIES = (0, 1, 2), (0.9,)
METHODS: dict[str, Any] = {
    "random": lambda s: RandomPruning(s, measure=False),
    "magnitude": lambda s: Magnitude(s, measure=False),
    "CHITA, refits=0": lambda s: CHITA(s, refit_bn=False, refits=0, measure=False),
    "CHITA": lambda s: CHITA(s, refit_bn=False, measure=False),
}


def trainer(epochs: int) -> Trainer:
    return Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip


def accuracy(model: Any, data: Any) -> float:
    return 100 * trainer(1).test(model, data.test_dataloader(), verbose=False)[0]["test_accuracy"]


def mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ({max(values) - min(values):.2f})"


def test_new_statistics_restore_what_pruning_broke() -> None:
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
                net, loader = copy.deepcopy(model), calibration_loader(data.train_dataloader(), seed)
                started = time.process_time()
                prune(net, make(sparsity), loader)
                seconds, stale = time.process_time() - started, accuracy(net, data)
                Objective(net, lambda count, loader=loader: iter(loader)).refit_batch_norm(40)
                found.setdefault((name, sparsity), []).append((stale, accuracy(net, data), seconds))
    table = Table(title=f"Test accuracy in %, mean of seeds 0-2 (range); dense {mean(dense)}")
    for column in ("method", "sparsity", "refit_bn=False", "refit_bn=True", "pruning s"):
        table.add_column(column)
    for (name, sparsity), rows in found.items():
        stale, fresh, seconds = (list(values) for values in zip(*rows, strict=True))
        cells = [name, str(sparsity), mean(stale), mean(fresh), f"{statistics.median(seconds):.1f}"]
        table.add_row(*cells)
        Console(width=120).print("| " + " | ".join(cells) + " |")
    Console(width=120).print(table)
    best = {name: statistics.mean(row[1] for row in found[name, 0.9]) for name in METHODS}
    assert best["CHITA"] > best["magnitude"] > best["random"]
