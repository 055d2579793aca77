"""`python examples/finetune_from_checkpoint.py` : checkpoint in, pruned checkpoint out.

A small transformer that reads a digit row by row is trained dense (or taken from `--checkpoint`), pruned at
once, fine-tuned, saved, and read back into the dense class by code that knows nothing of pruning.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune import Magnitude, MaskManager, RNGState
from lightning_prune.recipes.data import Digits


class RowTransformer(LightningModule):
    """Read an 8 x 8 image as a sentence of eight rows and name the digit."""

    def __init__(self, width: int = 48, heads: int = 4, layers: int = 2, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(torch.randn(8, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) -> logits (N, 10)."""
        return self.head(self.encoder(self.embed(images.squeeze(1)) + self.position).mean(dim=1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val_accuracy")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test_accuracy")

    def _evaluate(self, batch: list[Tensor], name: str) -> None:
        self.accuracy.update(self(batch[0]), batch[1])
        self.log(name, self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)


def make_trainer(epochs: int, folder: Path, *callbacks: Callback) -> Trainer:
    """Return a quiet CPU Trainer."""
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **quiet)


def train_dense(data: Digits, epochs: int, folder: Path) -> Path:
    """Train from scratch and return the checkpoint with the best validation accuracy."""
    best = ModelCheckpoint(folder, filename="dense", monitor="val_accuracy", mode="max", enable_version_counter=False)
    make_trainer(epochs, folder, best).fit(RowTransformer(), datamodule=data)
    return Path(best.best_model_path)


def accuracy_of(model: LightningModule, data: Digits, folder: Path) -> float:
    """Return the test accuracy."""
    tester = make_trainer(1, folder)
    return tester.test(model, datamodule=data, verbose=False)[0]["test_accuracy"]


def main() -> None:
    """Dense checkpoint -> pruned and fine-tuned checkpoint -> dense class."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="a trained RowTransformer; without it one is trained")
    parser.add_argument("--sparsity", type=float, default=0.8, help="pruned fraction of the weights, in [0, 1)")
    parser.add_argument("--dense-epochs", type=int, default=12, help="of dense training, without --checkpoint")
    parser.add_argument("--epochs", type=int, default=6, help="of fine-tuning")
    parser.add_argument("--folder", type=Path, default=Path("outputs/finetune"))
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*(does not have many workers|exists and is not empty).*")
    seed_everything(0, verbose=False)
    data = Digits()

    checkpoint = given.checkpoint or train_dense(data, given.dense_epochs, given.folder)
    dense = RowTransformer.load_from_checkpoint(checkpoint, learning_rate=1e-3)
    accuracies = {"dense checkpoint": accuracy_of(dense, data, given.folder)}

    # attention keeps query, key and value in one plain parameter: it is pruned when it is named
    attention = [name for name, _ in dense.named_parameters() if name.endswith("in_proj_weight")]
    pruning = Magnitude(given.sparsity, include=["embed", "encoder", *attention], layer_floor=0.02)
    trainer = make_trainer(given.epochs, given.folder, pruning, RNGState())
    trainer.fit(dense, datamodule=data)
    trainer.save_checkpoint(given.folder / "pruned.ckpt")
    MaskManager.of(dense).save(given.folder / "masks.safetensors")

    read_back = RowTransformer.load_from_checkpoint(given.folder / "pruned.ckpt")  # strict, and without a callback
    accuracies["pruned checkpoint, read back"] = accuracy_of(read_back, data, given.folder)

    table = Table(title=f"{given.folder / 'pruned.ckpt'}")
    table.add_column("")
    table.add_column("value", justify="right")
    for name, value in accuracies.items():
        table.add_row(f"test accuracy, {name}", f"{value:.4f}")
    weights = dict(read_back.named_parameters())
    masks = MaskManager.of(dense).masks
    zeros = sum(int((weights[name] == 0).sum()) for name in masks)
    table.add_row("selected weights", f"{sum(mask.numel() for mask in masks.values()):,}")
    table.add_row("exact zeros among them, read back", f"{zeros:,}")
    table.add_row("sparsity", f"{MaskManager.of(dense).sparsity():.6g}")
    Console().print(table)
    Console().print(*pruning.receipt.notes, sep="\n")


if __name__ == "__main__":
    main()
