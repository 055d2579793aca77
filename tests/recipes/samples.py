"""Small files in the formats of MNIST and CIFAR-10, written by hand."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import tarfile
from pathlib import Path

import torch
from torch import Tensor


def idx_bytes(values: Tensor) -> bytes:
    """Encode a uint8 tensor as an IDX file."""
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.numpy().tobytes()


def random_images(count: int, seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Draw images (count, *shape) as uint8 and labels 0 to 9 as uint8."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 10, (count,), generator=generator, dtype=torch.uint8)


def write_mnist(folder: Path, train: int = 20, test: int = 6, gz: bool = True) -> dict[str, Tensor]:
    """Write the four files of a small MNIST; return their contents by name."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {}
    for prefix, count in (("train", train), ("t10k", test)):
        images, labels = random_images(count, count, 28, 28)
        contents[f"{prefix}-images-idx3-ubyte"] = images
        contents[f"{prefix}-labels-idx1-ubyte"] = labels
    for name, values in contents.items():
        if gz:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(values)))
        else:
            (folder / name).write_bytes(idx_bytes(values))
    return contents


def python2_string(text: bytes) -> bytes:
    """Encode a string as Python 2's pickle does: SHORT_BINSTRING or BINSTRING."""
    return (b"U" + bytes([len(text)]) if len(text) < 256 else b"T" + struct.pack("<i", len(text))) + text


def cifar_bytes(images: Tensor, labels: Tensor, dtype: bytes = b"u1", fortran: bool = False) -> bytes:
    """Encode images (N, 3072) and labels (N,) with the opcodes that Python 2 and old NumPy wrote."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + b"K\x00\x85" + python2_string(b"b")
    ) + b"\x87R"
    kind = b"cnumpy\ndtype\n" + python2_string(dtype) + b"K\x00K\x01\x87R"
    kind += b"(K\x03" + python2_string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"J" + struct.pack("<i", images.shape[0]) + b"J" + struct.pack("<i", images.shape[1]) + b"\x86"
    state = b"(K\x01" + shape + kind + (b"\x88" if fortran else b"\x89") + python2_string(images.numpy().tobytes())
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels.tolist()) + b"e"
    entries = python2_string(b"data") + array + state + b"tb" + python2_string(b"labels") + listed
    return b"\x80\x02}(" + entries + b"u."


def write_cifar(folder: Path, count: int = 8) -> dict[str, tuple[Tensor, Tensor]]:
    """Write the six batches of a small CIFAR-10; return their contents by name."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {}
    for seed, name in enumerate([*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]):
        contents[name] = random_images(count, seed, 3072)
        (folder / name).write_bytes(cifar_bytes(*contents[name]))
    return contents


def write_cifar_archive(path: Path, source: Path) -> str:
    """Pack the batches of `source` as CIFAR's archive; return its SHA-256."""
    with tarfile.open(path, "w:gz") as tar:
        for file in sorted(source.iterdir()):
            info = tarfile.TarInfo(f"cifar-10-batches-py/{file.name}")
            info.size = file.stat().st_size
            tar.addfile(info, io.BytesIO(file.read_bytes()))
    return sha256(path)


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
