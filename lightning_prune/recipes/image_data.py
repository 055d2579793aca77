"""Base of the data modules of images in memory, and the pure functions that split and scale them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.checks import check_integer

__all__ = ["ImageData", "Splits", "hold_out", "standardise", "take"]

Pair = tuple[Tensor, Tensor]


class Splits(NamedTuple):
    """Inputs (N, C, H, W) as float32 and classes (N,) as int64 of the three parts."""

    train: Pair
    val: Pair
    test: Pair


class ImageData(pl.LightningDataModule):
    """Data module of images in memory; a subclass loads them.

    Args:
        batch_size: samples in a batch, >= 1.
        num_workers: processes that prepare batches, >= 0; they persist between epochs. 0 is fastest here.
        seed: draws the splits and the subset.
        subset: number of training samples to use, >= 1; None: all.
    Raises:
        ValueError: if an argument is out of range.
    """

    num_classes: int = 10
    input_shape: tuple[int, ...]

    def __init__(self, batch_size: int = 128, num_workers: int = 0, seed: int = 0, subset: int | None = None) -> None:
        super().__init__()
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self.num_workers = check_integer("num_workers", num_workers, 0)
        self.seed = check_integer("seed", seed, 0)
        self.subset = None if subset is None else check_integer("subset", subset, 1)
        self.parts: Splits | None = None

    def load(self) -> Splits:
        """Read, normalise and split the data; called once."""
        raise NotImplementedError(f"{type(self).__name__} must define `load`.")

    def setup(self, stage: str | None = None) -> None:
        """Load the data at the first call, whatever the stage."""
        if self.parts is not None:
            return
        parts = self.load()
        if self.subset is not None:
            parts = parts._replace(train=take(parts.train, self.subset, self.seed))
        self.parts = parts

    def train_dataloader(self) -> DataLoader:
        """Batches (x (N, C, H, W), y (N,)) in an order drawn from the global random generator."""
        return self._loader("train", shuffle=True, collate_fn=self.train_collate())

    def val_dataloader(self) -> DataLoader:
        """Batches of the validation part, in a fixed order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        """Batches of the test part, in a fixed order."""
        return self._loader("test")

    def train_collate(self) -> Callable | None:
        """How training samples become a batch; None: they are stacked."""
        return None

    def _loader(self, part: str, **options: Any) -> DataLoader:
        if self.parts is None:
            raise RuntimeError(f"{type(self).__name__} holds no data yet. Call `prepare_data()` and `setup()` first.")
        return DataLoader(
            TensorDataset(*getattr(self.parts, part)),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            **options,
        )


def take(pair: Pair, count: int, seed: int) -> Pair:
    """Take the first `count` samples after a seeded shuffle.

    Args:
        pair: inputs (N, ...) and classes (N,).
        count: samples to take, in [1, N].
        seed: draws the shuffle.
    Returns:
        Inputs (count, ...) and classes (count,).
    Raises:
        ValueError: if there are fewer than `count` samples.
    """
    total = len(pair[1])
    if count > total:
        raise ValueError(
            f"`subset` must be at most the {total} training samples, got {count}. Lower it or leave it out."
        )
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
    return pair[0][chosen], pair[1][chosen]


def hold_out(pair: Pair, val_size: int, seed: int) -> tuple[Pair, Pair]:
    """Draw `val_size` samples for validation; the others train.

    Args:
        pair: inputs (N, ...) and classes (N,).
        val_size: samples of the validation part, in [1, N).
        seed: draws the split.
    Returns:
        The training and the validation part.
    Raises:
        ValueError: if no sample is left to train on.
    """
    total = len(pair[1])
    if val_size >= total:
        raise ValueError(f"`val_size` must be below the {total} samples of the training file, got {val_size}.")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    val, train = order[:val_size], order[val_size:]
    return (pair[0][train], pair[1][train]), (pair[0][val], pair[1][val])


def standardise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Compute (x / 255 - mean) / std per channel.

    Args:
        images: (N, C, H, W) as uint8.
        mean: C means of x / 255.
        std: C standard deviations of x / 255, > 0.
    Returns:
        (N, C, H, W) as float32.
    """
    shape = (1, -1, 1, 1)
    scaled = images.float().div_(255)  # in place from here: one float copy of the data is large enough
    return scaled.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))
