"""`python examples/segmentation.py` : a Hugging Face SegFormer that finds discs, at half of its FLOPs (`transformers`).

Small and randomly initialized, it learns generated pictures, loses channels, is fine-tuned, and is cut to a smaller network.
"""

from __future__ import annotations

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from lightning_prune import Magnitude, shrink

SIZE = 32


def pictures(count: int, seed: int) -> DataLoader:
    """Return noisy pictures with a bright disc each, and the disc's pixels."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randint(8, SIZE - 8, (count, 2, 1, 1), generator=generator)
    radius = torch.randint(4, 9, (count, 1, 1), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    disc = (rows - centre[:, 0]) ** 2 + (columns - centre[:, 1]) ** 2 < radius**2
    noise = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return DataLoader(TensorDataset(disc[:, None] + 0.5 * noise, disc.long()), batch_size=16, shuffle=seed == 0)


class Segmenter(LightningModule):
    """A SegFormer of two stages around which only the loss is written."""

    def __init__(self) -> None:
        super().__init__()
        self.network = SegformerForSemanticSegmentation(SegformerConfig(
            num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[32, 64], patch_sizes=[3, 3],
            strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[4, 4], decoder_hidden_size=64, num_labels=2,
        ))  # fmt: skip
        self.example_input_array = torch.zeros(2, 3, SIZE, SIZE)

    def forward(self, images: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(self.network(images).logits, size=(SIZE, SIZE), mode="bilinear")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


@torch.no_grad()
def overlap(model: LightningModule, loader: DataLoader) -> float:
    """Return the intersection over union of the discs."""
    model.eval()
    found, true = (torch.cat(part) for part in zip(*((model(x).argmax(1) > 0, y > 0) for x, y in loader), strict=True))
    return int((found & true).sum()) / int((found | true).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4, help="epochs of dense training, and of fine-tuning")
    epochs = parser.parse_args().epochs
    seed_everything(0, verbose=False)
    train, test, model = pictures(256, 0), pictures(64, 1), Segmenter()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    Trainer(max_epochs=epochs, **quiet).fit(model, train)
    dense, pruning = overlap(model, test), Magnitude(budget=0.5, budget_type="flops", min_keep=4)
    Trainer(max_epochs=epochs, callbacks=[pruning], **quiet).fit(model, train)  # ends with its receipt
    small = shrink(model, next(iter(test))[0])
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in (model, small)]
    print(f"overlap: dense {dense:.3f}, pruned {overlap(model, test):.3f}, shrunk {overlap(small, test):.3f}")
    print(f"parameters: dense {sizes[0]:,}, shrunk {sizes[1]:,}")


if __name__ == "__main__":
    main()
