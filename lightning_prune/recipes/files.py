"""Data files: where they lie, how they are downloaded, and how IDX files and CIFAR's pickles are read.

IDX: two zero bytes, a type code (8 = uint8), the number of dimensions, each dimension as a big-endian 32-bit
integer, then the values in C order. See LeCun, Cortes, Burges, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import math
import os
import pickle
import struct
import urllib.error
import urllib.request
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["data_root", "download_file", "find_file", "find_folder", "read_cifar_batch", "read_idx"]

VARIABLE = "LIGHTNING_PRUNE_DATA"
_AGAIN = "Delete it and fetch it again."
_CHUNK = 1 << 20  # bytes read at a time


def data_root(root: str | os.PathLike[str] | None) -> Path:
    """Return the folder of all data sets: `root`, else the variable LIGHTNING_PRUNE_DATA, else `data`."""
    return Path(root or os.environ.get(VARIABLE) or "data").expanduser()


def find_file(folder: Path, name: str) -> Path | None:
    """Return `folder/name` or `folder/name.gz`, whichever is there first, else None."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def find_folder(folders: Sequence[Path], names: Sequence[str]) -> Path | None:
    """Return the first folder that holds every one of `names`, plain or with `.gz`, else None."""
    return next((folder for folder in folders if all(find_file(folder, name) for name in names)), None)


def read_idx(path: Path) -> Tensor:
    """Read a file in IDX format, plain or gzipped (by its suffix `.gz`).

    Args:
        path: a file of unsigned bytes.
    Returns:
        The values as uint8, of the shape written in the file.
    Raises:
        ValueError: if the file is no IDX file of bytes, is truncated, damaged or too long.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"`{path}` must be a whole gzip file: {error}. {_AGAIN}") from error
    return _parse_idx(content, path)


def _parse_idx(content: bytes, path: Path) -> Tensor:
    magic = content[:4]
    if len(magic) < 4 or magic[:3] != b"\0\0\x08" or magic[3] == 0:
        raise ValueError(f"`{path}` must start as an IDX file of bytes (00 00 08 ..), got {magic.hex(' ')!r}. {_AGAIN}")
    start = 4 + 4 * magic[3]
    if len(content) < start:
        raise ValueError(f"`{path}` must name {magic[3]} dimensions, got {len(content)} bytes in all. {_AGAIN}")
    shape = struct.unpack(f">{magic[3]}I", content[4:start])
    values = bytearray(content[start:])
    if len(values) != math.prod(shape):
        raise ValueError(
            f"`{path}` must hold {math.prod(shape)} bytes for its shape {shape}, got {len(values)}. {_AGAIN}"
        )
    return torch.from_numpy(np.frombuffer(values, dtype=np.uint8).reshape(shape))


class _Stub:
    """Stands for every global that a CIFAR pickle names: remembers arguments and state, and does nothing."""

    __slots__ = ("args", "state")

    def __init__(self, *args: Any) -> None:
        self.args, self.state = args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler of plain containers, numbers, text and NumPy arrays; NumPy itself is never called.

    The three globals by which an array is pickled become stubs; any other is refused.
    """

    allowed = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        """Return the stub for an allowed global."""
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return _Stub


def read_cifar_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Read one of CIFAR's Python batches without executing anything that it names.

    Args:
        path: a pickled dict with `data`, a (N, 3072) array of bytes, and `labels`, N integers.
    Returns:
        Images (N, 3, 32, 32) as uint8 and classes (N,) as int64.
    Raises:
        ValueError: if the file is damaged, names anything but NumPy arrays, or has other contents.
    """
    try:
        # Python 2 wrote the files: its strings are bytes
        content = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        entries = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        images = _bytes_of(entries["data"])
        labels = torch.tensor(entries["labels"], dtype=torch.int64)
        if images.shape != (len(labels), 3072) or labels.ndim != 1:
            raise ValueError(f"shapes {tuple(images.shape)} and {tuple(labels.shape)}")
    except Exception as error:  # a damaged pickle can raise any exception
        raise ValueError(f"`{path}` must be a batch of CIFAR-10 for Python: {error}. {_AGAIN}") from error
    return images.reshape(-1, 3, 32, 32), labels


def _bytes_of(array: Any) -> Tensor:
    """Rebuild a pickled array of bytes in C order from its stub."""
    _, shape, dtype, fortran_order, values = array.state
    if fortran_order or dtype.args[0] not in ("u1", b"u1"):
        raise ValueError(f"an array of bytes in C order is expected, got {dtype.args[0]!r}")
    return torch.from_numpy(np.frombuffer(bytearray(values), dtype=np.uint8).reshape(shape))


@contextmanager
def replacing(target: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that becomes `target` if the block succeeds and vanishes if not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # not `tempfile`: its files are readable by their owner alone, and data folders are often shared
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        with temporary.open("xb") as stream:
            yield stream
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def download_file(urls: Sequence[str], target: Path, sha256: str | None) -> None:
    """Download a file from the first mirror that answers, check it, and only then give it its name.

    Args:
        urls: addresses of the same file.
        target: where to put it; its folder is made.
        sha256: expected SHA-256 in hexadecimal.
    Raises:
        ValueError: if `sha256` is missing (before anything is fetched) or differs from the file's.
        ConnectionError: if no mirror answers.
    """
    if not sha256:
        raise ValueError(
            f"`checksums` must hold the SHA-256 of {target.name} before it is downloaded, got {sha256!r}. "
            f"Add it (data.checksums.'{target.name}'=...), or put the file into {target.parent} yourself."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    for url in urls:
        try:
            return _fetch(url, target, sha256)
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            failures.append(f"{url}: {error}")
    raise ConnectionError(
        f"{target.name} could not be downloaded ({'; '.join(failures)}). Put it into {target.parent} yourself."
    )


def _fetch(url: str, target: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with replacing(target) as output, urllib.request.urlopen(url, timeout=60) as source:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            output.write(chunk)
        if digest.hexdigest() != sha256.lower():
            raise ValueError(
                f"{target.name} from {url} must have the SHA-256 {sha256}, got {digest.hexdigest()}. "
                f"The file differs from the one expected; if you trust it, pass its own in `checksums`."
            )
