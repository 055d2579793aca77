"""A matrix in a memory-mapped scratch file, where it is larger than memory.

The file is unlinked as soon as it is open: nothing of it is left on the disk, however the process ends. Its pages are the
system's to write out and to drop; they are no memory of the process.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def check_folder(name: str, folder: Any) -> str:
    """Return `folder` as a string if files can be made in it.

    Args:
        name: of the argument, for messages.
        folder: path of a folder.
    Raises:
        ValueError: it is no path, or no folder that can be written to.
    """
    if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
        raise ValueError(
            f"`{name}` must be the path of a folder, got {folder!r}. Give one on a disk with room, or null."
        )
    if not Path(folder).is_dir():
        raise ValueError(f"`{name}` must be a folder that exists, got {os.fspath(folder)!r}. Create it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(
            f"`{name}` must be a folder that can be written to, got {os.fspath(folder)!r}. Choose another."
        )
    return str(os.fspath(folder))


def free_disk(folder: str) -> int:
    """Return the bytes that this process may still write into a folder."""
    return shutil.disk_usage(folder).free


def empty_matrix(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device, folder: str | None = None
) -> Tensor:
    """Return an uninitialized matrix of shape (rows, columns) in memory, or in a scratch file that lives as long as it.

    Args:
        rows: >= 1.
        columns: >= 1.
        dtype: of the entries.
        device: where it lies, unless there is a file.
        folder: of the scratch file; the matrix is then one of the CPU. None: in memory.
    Raises:
        ValueError: the folder has no room for it.
    """
    if folder is None:
        return torch.empty(rows, columns, dtype=dtype, device=device)
    size = rows * columns * dtype.itemsize
    with tempfile.TemporaryFile(dir=folder, prefix="lightning_prune_") as file:
        try:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not a signal at some later write
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError as error:
            raise ValueError(
                f"`offload`={folder!r} has no room for {size / 2**30:.1f} GiB of gradients ({error}). Give a folder on "
                "a larger disk, lower `num_grads`, or use grad_dtype='bfloat16'."
            ) from error
        mapped = mmap.mmap(file.fileno(), size)  # keeps the file open, and the tensor keeps it
    return torch.frombuffer(mapped, dtype=dtype).view(rows, columns)
