"""`python examples/batchnorm_after_pruning.py` : what a network with BatchNorm needs after one-shot pruning.

BatchNorm remembers the mean and variance of activations that pruned weights no longer produce. A digit
classifier is trained and pruned by magnitude: as it is, with these statistics measured again
(`refit_bn=True`; no weight changes), or with one epoch of fine-tuning. The table shows the test accuracy.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import warnings
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table

from lightning_prune import Magnitude, prune
from lightning_prune.recipes.classifier import LitClassifier
from lightning_prune.recipes.data import Digits
from lightning_prune.recipes.networks import convnet

COLUMNS = ("dense", "pruned", "pruned, refit_bn=True", "pruned, one epoch of fine-tuning")


def make_trainer(epochs: int, *callbacks: Magnitude) -> Trainer:
    """Return a silent CPU Trainer."""
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    return Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **quiet)


def accuracy(module: LightningModule, data: Digits) -> float:
    """Return the test accuracy."""
    return make_trainer(1).test(module, datamodule=data, verbose=False)[0]["test_accuracy"]


def train_dense(data: Digits, seed: int, epochs: int) -> LitClassifier:
    """Train a dense network."""
    seed_everything(seed, verbose=False)
    dense = LitClassifier(convnet(), partial(torch.optim.SGD, lr=0.05, momentum=0.9))
    make_trainer(epochs).fit(dense, datamodule=data)
    return dense


def accuracies(dense: LitClassifier, data: Digits, sparsity: float) -> list[float]:
    """Return the test accuracy dense, pruned, with new statistics, and after one epoch of fine-tuning."""
    pruned, refitted, tuned = (copy.deepcopy(dense) for _ in range(3))
    prune(pruned, Magnitude(sparsity))
    prune(refitted, Magnitude(sparsity, refit_bn=True), data.train_dataloader())
    tuned.make_optimizer = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    make_trainer(1, Magnitude(sparsity, measure=False)).fit(tuned, datamodule=data)
    return [accuracy(module, data) for module in (dense, pruned, refitted, tuned)]


def main() -> None:
    """Print a row per sparsity."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of dense networks, >= 1")
    parser.add_argument("--epochs", type=int, default=6, help="of dense training")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # more only get in each other's way in so small a network
    data = Digits()
    networks = [train_dense(data, seed, given.epochs) for seed in range(given.seeds)]
    table = Table(title=f"test accuracy in percent, mean (lowest to highest) of {given.seeds} seeds")
    for column in ("sparsity", *COLUMNS):
        table.add_column(column, justify="right")
    for sparsity in (0.5, 0.7, 0.8, 0.9):
        columns = zip(*(accuracies(dense, data, sparsity) for dense in networks), strict=True)
        cells = [f"{100 * statistics.mean(c):.1f} ({100 * min(c):.1f} to {100 * max(c):.1f})" for c in columns]
        table.add_row(f"{sparsity:g}", *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
