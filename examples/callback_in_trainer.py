"""`python examples/callback_in_trainer.py` : pruning as one more callback of a Trainer.

A digit classifier with two losses (classes and reconstruction) is trained twice from the same seed:
dense, and with `GradualMagnitude` in the list of callbacks. Module, data and the other callbacks are the
same in both fits.
"""

from __future__ import annotations

import argparse
import warnings

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune import GradualMagnitude, MaskManager
from lightning_prune.recipes.data import Digits


class DigitsWithReconstruction(LightningModule):
    """Classify 8 x 8 digits and rebuild them from the same 32 features; both losses train these."""

    def __init__(self, learning_rate: float = 2e-3, reconstruction_weight: float = 0.3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.example_input_array = torch.zeros(2, 1, 8, 8)  # one forward call, for the receipt's FLOPs and milliseconds
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 32), nn.ReLU(),
        )  # fmt: skip
        self.classifier = nn.Linear(32, 10)
        self.decoder = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64))
        self.test_accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) -> logits (N, 10)."""
        return self.classifier(self.encoder(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        features = self.encoder(images)
        classes = nn.functional.cross_entropy(self.classifier(features), labels)
        pixels = nn.functional.mse_loss(self.decoder(features), images.flatten(1))
        self.log_dict({"loss_classes": classes, "loss_pixels": pixels})
        return classes + self.hparams.reconstruction_weight * pixels

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.test_accuracy.update(self(images), labels)
        self.log("test_accuracy", self.test_accuracy)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate, weight_decay=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(epochs: int, seed: int, extra: list[Callback]) -> tuple[DigitsWithReconstruction, float]:
    """Fit with an ordinary project's callbacks and those in `extra`; return the module and its accuracy."""
    seed_everything(seed, verbose=False)
    model, data = DigitsWithReconstruction(), Digits()
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[LearningRateMonitor(), *extra],
        logger=CSVLogger("outputs", name="callback_in_trainer"),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    return model, trainer.test(model, datamodule=data, verbose=False)[0]["test_accuracy"]


def main() -> None:
    """Train dense and pruned, and print both side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.9, help="pruned fraction of the weights, in [0, 1)")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")

    dense, dense_accuracy = train(given.epochs, given.seed, [])
    pruning = GradualMagnitude(given.sparsity, begin=0.1, end=0.7, every_n_steps=10)
    pruned, pruned_accuracy = train(given.epochs, given.seed, [pruning])

    table = Table(title="The same module, data and Trainer, with and without the callback")
    for column in ("", "dense", "pruned"):
        table.add_column(column, justify="left" if not column else "right")
    kept, total = MaskManager.of(pruned).counts()
    table.add_row("test accuracy", f"{dense_accuracy:.4f}", f"{pruned_accuracy:.4f}")
    table.add_row("weights kept", f"{total:,}", f"{kept:,}")
    table.add_row("sparsity", "0", f"{MaskManager.of(pruned).sparsity():.6g}")
    table.add_row("mask updates", "0", str(len(pruning.history)))
    same = dense.state_dict().keys() == pruned.state_dict().keys()
    table.add_row("state_dict keys", str(len(dense.state_dict())), "the same" if same else "others")
    Console().print(table)


if __name__ == "__main__":
    main()
