"""Fixtures shared by all tests: small modules, small loaders, one thread."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class TinyModule(LightningModule):
    """A classifier with a convolution, BatchNorm, dropout and two linear layers; every optimizer fits.

    Prunable: conv.weight (4, 1, 3, 3) = 36, hidden.weight (8, 16) = 128, head.weight (3, 8) = 24, 188 in all.
    """

    def __init__(self, make_optimizer: Any = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.make_optimizer = make_optimizer
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.pool = nn.AvgPool2d(2)
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.pool(torch.relu(self.norm(self.conv(images)))).flatten(1)
        return self.head(self.dropout(torch.relu(self.hidden(features))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        if self.make_optimizer is not None:
            return self.make_optimizer(self.parameters())
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Bitwise comparisons and busy machines both want one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same global random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> TinyModule:
    """A fresh `TinyModule` without dropout."""
    return TinyModule()


@pytest.fixture
def tiny_class() -> type[TinyModule]:
    """The class of `tiny`, for other optimizers, dropout or a subclass."""
    return TinyModule


@pytest.fixture
def dataset() -> TensorDataset:
    """24 images of 1 x 4 x 4 with labels in {0, 1, 2}, the same in every test."""
    generator = torch.Generator().manual_seed(7)
    return TensorDataset(torch.randn(24, 1, 4, 4, generator=generator), torch.arange(24) % 3)


@pytest.fixture
def loader(dataset: TensorDataset) -> DataLoader:
    """Six batches of four, shuffled by the global generator as a user's loader is."""
    return DataLoader(dataset, batch_size=4, shuffle=True)
