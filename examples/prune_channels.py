"""`python examples/prune_channels.py` : a network with residual branches loses half of its FLOPs and becomes smaller.

Ten dense epochs, channels removed to a budget of FLOPs inside the same fit, ten epochs of fine-tuning. Then the smaller
network is cut out, saved with its widths, and rebuilt from the file.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from lightning_prune import Magnitude, load_shrunk, shrink
from lightning_prune.recipes.data import Digits
from lightning_prune.shrink import report_of, save_shrunk


class ResidualNet(LightningModule):
    """Two branches that are added, so that their channels can only leave together."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.outer = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) -> logits (N, 10)."""
        features = self.stem(images)
        features = torch.relu(features + self.outer(self.inner(features)))
        return self.head(features.mean(dim=(2, 3)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def accuracy(network: nn.Module, data: Digits) -> float:
    """Return the part of the test images that are named rightly."""
    with torch.no_grad():
        right = [network(images).argmax(1) == labels for images, labels in data.test_dataloader()]
    return torch.cat(right).float().mean().item()


def main() -> None:
    """Train, prune in the middle, shrink, save, load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--budget", type=float, default=0.5)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers")
    seed_everything(0, verbose=False)
    data, model = Digits(), ResidualNet()
    pruner = Magnitude(budget=arguments.budget, budget_type="flops", scope="layer", at=0.5)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    Trainer(max_epochs=arguments.epochs, accelerator="cpu", callbacks=[pruner], **quiet).fit(model, datamodule=data)

    model.eval()
    example = next(iter(data.test_dataloader()))[0][:1]
    small = shrink(model, example)
    save_shrunk(small, "small.safetensors")
    again = load_shrunk(ResidualNet, "small.safetensors").eval()
    for group, (before, after) in report_of(small).units.items():
        print(f"{group}: {after} of {before} channels")
    print(f"test accuracy: masked {accuracy(model, data):.4f}, smaller {accuracy(again, data):.4f}")
    print(f"small.safetensors: {Path('small.safetensors').stat().st_size} bytes")


if __name__ == "__main__":
    main()
