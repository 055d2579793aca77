"""`python examples/transformers_classifier.py` : halve the FLOPs of a Hugging Face BERT with `pip install transformers`.

Small and randomly initialized, it learns generated "sentences" (which of two words comes more often?), loses heads and hidden
units, is fine-tuned, and is cut to a physically smaller network with the same outputs.
"""

from __future__ import annotations

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from lightning_prune import Magnitude, shrink

WORDS, LENGTH = 50, 24


def sentences(count: int, seed: int) -> DataLoader:
    """Return sentences of word numbers, and whether word 1 comes more often than word 2."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, WORDS, (count, LENGTH), generator=generator)
    marks, favourite = torch.rand(count, LENGTH, generator=generator), torch.randint(2, (count, 1), generator=generator)
    words = torch.where(marks < 0.3, 1 + favourite, torch.where(marks < 0.4, 2 - favourite, words))
    labels = ((words == 1).sum(1) > (words == 2).sum(1)).long()
    return DataLoader(TensorDataset(words, labels), batch_size=32, shuffle=seed == 0)


class Classifier(LightningModule):
    """A BERT of two layers around which only the loss is written."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=WORDS, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
            max_position_embeddings=LENGTH, num_labels=2, attn_implementation="eager",
        )  # fmt: skip
        self.bert = BertForSequenceClassification(config)
        self.example_input_array = torch.zeros(2, LENGTH, dtype=torch.long)

    def forward(self, words: Tensor) -> Tensor:
        return self.bert(input_ids=words).logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@torch.no_grad()
def accuracy(model: LightningModule, loader: DataLoader) -> float:
    """Return the fraction of sentences told right."""
    model.eval()
    return sum(int((model(words).argmax(1) == labels).sum()) for words, labels in loader) / len(loader.dataset)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4, help="epochs of dense training, and of fine-tuning")
    epochs = parser.parse_args().epochs
    seed_everything(0, verbose=False)
    train, test, model = sentences(1024, 0), sentences(512, 1), Classifier()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    Trainer(max_epochs=epochs, **quiet).fit(model, train)
    dense, pruning = accuracy(model, test), Magnitude(budget=0.5, budget_type="flops", min_keep=4)
    Trainer(max_epochs=epochs, callbacks=[pruning], **quiet).fit(model, train)  # ends with its receipt
    small = shrink(model, next(iter(test))[0])
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in (model, small)]
    print(f"accuracy: dense {dense:.3f}, pruned {accuracy(model, test):.3f}, shrunk {accuracy(small, test):.3f}")
    print(f"parameters: dense {sizes[0]:,}, shrunk {sizes[1]:,}")


if __name__ == "__main__":
    main()
