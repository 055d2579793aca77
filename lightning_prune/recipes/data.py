"""Data modules of small images, held in memory: `Digits`, `MNIST`, `FashionMNIST`, `CIFAR10`, `RandomData`.

Splits are drawn by `seed`. The order of the training batches is not: it comes from the global random
generator, so that `seed_everything` fixes it, as everywhere in Lightning.

Files are looked for in `root`, else in the folder named by the variable LIGHTNING_PRUNE_DATA, else in `data`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_prune.checks import check_fraction, check_integer
from lightning_prune.recipes.image_data import ImageData, Pair, Splits
from lightning_prune.recipes.image_files import CIFAR10, MNIST, FashionMNIST

__all__ = ["CIFAR10", "MNIST", "Digits", "FashionMNIST", "ImageData", "RandomData"]


class Digits(ImageData):
    """The 1,797 digits of 8 x 8 pixels that scikit-learn brings along, split by class proportions.

    Pixels 0 to 16 are divided by 16 and standardised by mean and deviation of the whole set.

    Args:
        batch_size: samples in a batch, >= 1.
        num_workers: processes that prepare batches, >= 0.
        val_fraction: fraction of all samples for validation, in (0, 1).
        test_fraction: fraction of all samples for the test, in (0, 1).
        seed: draws the splits and the subset.
        subset: number of training samples to use, >= 1; None: all.
    Raises:
        ValueError: if an argument is out of range, or the two fractions leave nothing to train on.
    """

    input_shape = (1, 8, 8)
    mean, std = 0.3053, 0.3760  # of all pixels / 16

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int = 0,
        subset: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, subset)
        for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if not check_fraction(name, value):
                raise ValueError(f"`{name}` must be above 0, got {value!r}. Every class needs a sample in every part.")
        if val_fraction + test_fraction >= 1:
            raise ValueError(
                f"`val_fraction` + `test_fraction` must be below 1, got {val_fraction + test_fraction}. "
                f"Leave something to train on."
            )
        self.val_fraction, self.test_fraction = val_fraction, test_fraction

    def load(self) -> Splits:
        """Read the embedded digits and split them."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        x = ((torch.tensor(digits.images, dtype=torch.float32) / 16 - self.mean) / self.std).unsqueeze(1)
        y = digits.target
        rest, test = train_test_split(range(len(y)), test_size=self.test_fraction, stratify=y, random_state=self.seed)
        val_fraction = self.val_fraction / (1 - self.test_fraction)
        train, val = train_test_split(rest, test_size=val_fraction, stratify=y[rest], random_state=self.seed)
        y = torch.tensor(y, dtype=torch.int64)
        return Splits(*((x[part], y[part]) for part in (train, val, test)))


class RandomData(ImageData):
    """Normal noise with random classes, for measuring speed; nothing can be learned from it but the noise.

    Args:
        shape: shape of one input, such as (3, 224, 224).
        num_classes: number of classes, >= 2.
        train_samples: samples of the training part, >= 1.
        val_samples: samples of the validation part, >= 1.
        test_samples: samples of the test part, >= 1.
        batch_size: samples in a batch, >= 1.
        num_workers: processes that prepare batches, >= 0.
        seed: draws everything.
        subset: number of training samples to use, >= 1; None: all.
    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        shape: Sequence[int] = (3, 32, 32),
        num_classes: int = 10,
        train_samples: int = 1024,
        val_samples: int = 256,
        test_samples: int = 256,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        subset: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, subset)
        self.input_shape = tuple(check_integer("shape", size, 1) for size in shape)
        self.num_classes = check_integer("num_classes", num_classes, 2)
        named = (
            ("train_samples", train_samples),
            ("val_samples", val_samples),
            ("test_samples", test_samples),
        )
        self.sizes = [check_integer(name, value, 1) for name, value in named]

    def load(self) -> Splits:
        """Draw the three parts, one after the other, from one generator."""
        generator = torch.Generator().manual_seed(self.seed)
        return Splits(*(self._draw(size, generator) for size in self.sizes))

    def _draw(self, size: int, generator: torch.Generator) -> Pair:
        inputs = torch.randn(size, *self.input_shape, generator=generator)
        return inputs, torch.randint(0, self.num_classes, (size,), generator=generator)
