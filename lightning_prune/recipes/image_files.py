"""Data modules of image files: `MNIST`, `FashionMNIST`, `CIFAR10`."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

from lightning_prune.checks import check_bool, check_integer
from lightning_prune.recipes import files
from lightning_prune.recipes.image_data import ImageData, Pair, Splits, hold_out, standardise

__all__ = ["CIFAR10", "MNIST", "FashionMNIST", "FileData", "crop_and_flip"]


class FileData(ImageData):
    """Data module of files in a folder, downloaded if asked.

    Args:
        root: folder of all data sets; None: the variable LIGHTNING_PRUNE_DATA, else `data`.
        batch_size: samples in a batch, >= 1.
        num_workers: processes that prepare batches, >= 0.
        val_size: training samples held out for validation, >= 1.
        seed: draws the split and the subset.
        download: fetch missing files from the public mirrors and check their SHA-256.
        mirror: address of a folder to download from instead of the public mirrors.
        checksums: SHA-256 by file name, for files that differ from the public ones.
        subset: number of training samples to use, >= 1; None: all.
    Raises:
        ValueError: if an argument is out of range or `checksums` names an unknown file.
    """

    names: ClassVar[tuple[str, ...]]
    places: ClassVar[tuple[str, ...]]
    mirrors: ClassVar[tuple[str, ...]]
    known: ClassVar[Mapping[str, str]]
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        val_size: int = 5000,
        seed: int = 0,
        download: bool = False,
        mirror: str | None = None,
        checksums: dict[str, str] | None = None,
        subset: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, subset)
        self.root, self.mirror = root, mirror
        self.val_size = check_integer("val_size", val_size, 1)
        self.download = check_bool("download", download)
        self.checksums = {**self.known, **(checksums or {})}
        if unknown := sorted(set(self.checksums) - set(self.known)):
            raise ValueError(f"`checksums` must name files among {', '.join(self.known)}, got {', '.join(unknown)}.")

    @property
    def folders(self) -> list[Path]:
        """Folders searched, in order; downloads go into the first."""
        return [files.data_root(self.root) / place for place in self.places]

    def prepare_data(self) -> None:
        """Download what is missing if `download` is true; Lightning calls this once per machine."""
        if self.download and files.find_folder(self.folders, self.names) is None:
            self.fetch(self.folders[0])

    def fetch(self, folder: Path) -> None:
        """Download the files into `folder`."""
        for name, checksum in self.checksums.items():
            if files.find_file(folder, name.removesuffix(".gz")) is None:
                files.download_file(self.urls(name), folder / name, checksum)

    def urls(self, name: str) -> list[str]:
        """Addresses of one file, in the order to try."""
        return [f"{mirror.rstrip('/')}/{name}" for mirror in ([self.mirror] if self.mirror else self.mirrors)]

    def find(self) -> Path:
        """Return the folder that holds all files.

        Raises:
            FileNotFoundError: if there is none.
        """
        folder = files.find_folder(self.folders, self.names)
        if folder is None:
            raise FileNotFoundError(
                f"{type(self).__name__} is in none of {', '.join(map(str, self.folders))}; "
                f"expected the files {', '.join(self.names)} (or .gz). "
                f"Put them there, name their folder in data.root or in the variable {files.VARIABLE}, "
                f"or let them be downloaded with data.download=true."
            )
        return folder

    def read(self, folder: Path) -> tuple[Pair, Pair]:
        """Read the training and the test files: images (N, C, H, W) as uint8 and classes (N,) as int64."""
        raise NotImplementedError(f"{type(self).__name__} must define `read`.")

    def load(self) -> Splits:
        """Read and standardise the files and hold the validation part out."""
        (x, y), test = self.read(self.find())
        train, val = hold_out((x, y), self.val_size, self.seed)
        return Splits(*((standardise(part[0], self.mean, self.std), part[1]) for part in (train, val, test)))


class MNIST(FileData):
    """The 70,000 handwritten digits of 28 x 28 pixels of LeCun, Cortes and Burges; IDX files, gzipped or not.

    Looked for in `mnist` and `MNIST/raw` of the root and in the root itself. Arguments: see `FileData`.
    """

    input_shape = (1, 28, 28)
    names = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )
    places: ClassVar[tuple[str, ...]] = ("mnist", "MNIST/raw", ".")
    mirrors = (
        "https://storage.googleapis.com/cvdf-datasets/mnist",
        "https://ossci-datasets.s3.amazonaws.com/mnist",
    )
    known: ClassVar[Mapping[str, str]] = {
        "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ed6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    }
    mean, std = (0.1307,), (0.3081,)

    def read(self, folder: Path) -> tuple[Pair, Pair]:
        """Read the four IDX files.

        Raises:
            ValueError: if a file is damaged, or images and labels do not fit together.
        """
        train_images, train_labels, test_images, test_labels = (self._read(folder, name) for name in self.names)
        return self._pair(train_images, train_labels), self._pair(test_images, test_labels)

    def _read(self, folder: Path, name: str) -> Tensor:
        path = files.find_file(folder, name)
        assert path is not None  # `find` saw it
        return files.read_idx(path)

    def _pair(self, images: Tensor, labels: Tensor) -> Pair:
        if images.shape[1:] != self.input_shape[1:] or labels.shape != images.shape[:1] or labels.max() > 9:
            raise ValueError(
                f"{type(self).__name__} must have images (N, 28, 28) and N labels 0 to 9, got shapes "
                f"{tuple(images.shape)} and {tuple(labels.shape)}. Do all files come from the same set?"
            )
        return images.unsqueeze(1), labels.long()


class FashionMNIST(MNIST):
    """70,000 pictures of clothes, 28 x 28 pixels; IDX files, gzipped or not.

    Xiao, Rasul, Vollgraf, "Fashion-MNIST", 2017, arXiv:1708.07747. Looked for in `fashion_mnist` and
    `FashionMNIST/raw` of the root. Arguments: see `FileData`.
    """

    places = ("fashion_mnist", "FashionMNIST/raw")
    mirrors = (
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    )
    known: ClassVar[Mapping[str, str]] = {
        "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    }
    mean, std = (0.2860,), (0.3530,)


class CIFAR10(FileData):
    """60,000 colour pictures of 32 x 32 pixels in ten classes; the Python batches.

    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. Looked for in
    `cifar-10-batches-py` of the root and of its folder `cifar10`. Takes 0.7 GB of memory.

    Args:
        root: folder of all data sets; None: the variable LIGHTNING_PRUNE_DATA, else `data`.
        batch_size: samples in a batch, >= 1.
        num_workers: processes that prepare batches, >= 0.
        val_size: training samples held out for validation, >= 1.
        seed: draws the split and the subset.
        download: fetch missing files from the public mirror and check their SHA-256.
        mirror: address of a folder to download from instead of the public mirror.
        checksums: SHA-256 by file name, for an archive that differs from the public one.
        subset: number of training samples to use, >= 1; None: all.
        augment: see `crop_and_flip`; for the training batches only.
    Raises:
        ValueError: if an argument is out of range or `checksums` names an unknown file.
    """

    input_shape = (3, 32, 32)
    names = (*(f"data_batch_{index}" for index in range(1, 6)), "test_batch")
    places = ("cifar-10-batches-py", "cifar10/cifar-10-batches-py")
    mirrors = ("https://www.cs.toronto.edu/~kriz",)
    known: ClassVar[Mapping[str, str]] = {
        "cifar-10-python.tar.gz": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
    }
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        val_size: int = 5000,
        seed: int = 0,
        download: bool = False,
        mirror: str | None = None,
        checksums: dict[str, str] | None = None,
        subset: int | None = None,
        augment: bool = True,
    ) -> None:
        super().__init__(root, batch_size, num_workers, val_size, seed, download, mirror, checksums, subset)
        self.augment = check_bool("augment", augment)

    def train_collate(self) -> Callable | None:
        """Stack and augment the training samples, or only stack them."""
        return augmented_batch if self.augment else None

    def fetch(self, folder: Path) -> None:
        """Download the archive and unpack the six batches into `folder`."""
        (name, checksum), *_ = self.checksums.items()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download.") as temporary:
            archive = Path(temporary, name)
            files.download_file(self.urls(name), archive, checksum)
            with tarfile.open(archive, "r:gz") as tar:
                for batch in self.names:
                    self._unpack(tar, archive, batch, folder)

    def _unpack(self, tar: tarfile.TarFile, archive: Path, batch: str, folder: Path) -> None:
        # single members by their names: nothing in the archive can choose where it lands
        member = f"cifar-10-batches-py/{batch}"
        source = tar.extractfile(member) if member in tar.getnames() else None
        if source is None:
            raise ValueError(f"`{archive}` must hold {batch} as a regular file. Pass the archive of the public mirror.")
        with source, files.replacing(folder / batch) as target:
            shutil.copyfileobj(source, target)

    def read(self, folder: Path) -> tuple[Pair, Pair]:
        """Read the five training batches and the test batch.

        Raises:
            ValueError: if a file is damaged or a label is above 9.
        """
        *train, test = (self._read(folder / name) for name in self.names)
        return (torch.cat([x for x, _ in train]), torch.cat([y for _, y in train])), test

    def _read(self, path: Path) -> Pair:
        images, labels = files.read_cifar_batch(path)
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= 9:
            raise ValueError(f"`{path}` must have labels 0 to 9, got {int(labels.min())} to {int(labels.max())}.")
        return images, labels


def crop_and_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Shift every image by up to `padding` pixels and mirror it with probability 1/2.

    Zeros, which are the mean colour of standardised images, fill the border. Random numbers come from the
    global generator. He et al., CVPR 2016, section 4.2.

    Args:
        images: (N, C, H, W), of any dtype.
        padding: largest shift in pixels, >= 0.
    Returns:
        (N, C, H, W) of the same dtype.
    """
    count, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, count, 1))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    sample = torch.arange(count)[:, None, None]
    # an index, a slice and two indices: the indexed axes come first, channels last
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def augmented_batch(samples: Sequence[Pair]) -> list[Tensor]:
    """Stack samples into a batch of images (N, C, H, W) and classes (N,) and augment the images."""
    images, classes = default_collate(list(samples))
    return [crop_and_flip(images), classes]
