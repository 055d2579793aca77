"""Whether CHITA's gradient matrix and what its solver takes beside it fit into what is free, told before any work."""

from __future__ import annotations

import torch

from lightning_prune._scratch import free_disk

_VECTORS = 32  # vectors of p numbers that a stage of several ridges and its refits hold at once: measured 23 to 30
_CHUNKS = 1 << 29  # bytes: columns and gradients on their way from and to a matrix in a file


def check_memory(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    in_blocks: bool = False,
    offloaded: bool = False,
) -> None:
    """Raise ValueError if the gradient matrix and what the solver takes beside it would not fit into what is free.

    Beside n p numbers: a quarter of them for working copies, or 32 vectors of p numbers if that is more, and three n x n
    matrices of float64, which a solve in blocks does without. A matrix in a file takes no memory and no copy of a share
    of it, only chunks of a fixed size.

    Args:
        rows: n, >= 1.
        columns: p, >= 1.
        dtype: storage of the matrix.
        device: where it will lie.
        in_blocks: whether the solve goes block by block.
        offloaded: whether the matrix lies in a file.
    Raises:
        ValueError: more is needed than is free.
    """
    size, vectors = rows * columns * dtype.itemsize, _VECTORS * 4 * columns
    needed = vectors + _CHUNKS if offloaded else size + max(size // 4, vectors)
    needed += 0 if in_blocks else 3 * 8 * rows**2
    free = free_bytes(device)
    if free is not None and needed > free:
        file = "" if offloaded else "offload='FOLDER' (the matrix in a file on a disk), "
        raise ValueError(
            f"`num_grads`={rows} gradients of {columns} weights need about {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free. Lower `num_grads`, use grad_dtype='bfloat16' (half as much), {file}or "
            "algorithm='block' (no matrix of `num_grads` x `num_grads`), or prune layers in turn with `include`."
        )


def check_disk(rows: int, columns: int, dtype: torch.dtype, folder: str) -> None:
    """Raise ValueError if a gradient matrix of shape (rows, columns) would not fit into what is free in a folder."""
    needed, free = rows * columns * dtype.itemsize, free_disk(folder)
    if needed > free:
        raise ValueError(
            f"`offload`={folder!r} has {free / 2**30:.1f} GiB free, and `num_grads`={rows} gradients of {columns} weights "
            f"need {needed / 2**30:.1f} GiB. Give a folder on a larger disk, lower `num_grads`, or use "
            "grad_dtype='bfloat16' (half as much)."
        )


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes; None where it cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
