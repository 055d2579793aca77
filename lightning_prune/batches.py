"""Batches as trees of tensors: how long they are, how to cut them, join them and cut them into whole rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def regroup(batches: Any, rows: int, samples_per_row: int, chunk_rows: Callable[[], int]) -> Iterator[tuple[Any, int]]:
    """Yield (batch, number of rows in it), cut and joined from `batches` so that rows never straddle two of them.

    Args:
        batches: batches of any length.
        rows: rows to yield in all, at most.
        samples_per_row: samples in one row.
        chunk_rows: returns the most rows in one yielded batch; asked anew for each, since the first one may teach it.
    """
    held: Any = None
    left = rows
    for batch in batches:
        joined = batch if held is None else join_batches(held, batch)
        if joined is None:  # ragged batches: each gives the whole rows it has
            yield from _rows_of(held, min(left, chunk_rows(), batch_length(held) // samples_per_row), samples_per_row)
            left -= min(left, chunk_rows(), batch_length(held) // samples_per_row)
            joined = batch
        held = joined
        while left and batch_length(held) >= (size := min(left, chunk_rows()) * samples_per_row):
            yield slice_batch(held, 0, size), size // samples_per_row
            left -= size // samples_per_row
            held = slice_batch(held, size, batch_length(held))
        if not left:
            return
    if held is not None:
        yield from _rows_of(held, min(left, batch_length(held) // samples_per_row), samples_per_row)


def _rows_of(batch: Any, count: int, samples_per_row: int) -> Iterator[tuple[Any, int]]:
    if count:
        yield slice_batch(batch, 0, count * samples_per_row), count


def batch_length(batch: Any) -> int:
    """Return the number of samples: the first dimension of the first tensor in the batch.

    Raises:
        ValueError: there is no tensor with a first dimension.
    """
    lengths = [tensor.shape[0] for tensor in _tensors(batch) if tensor.dim()]
    if not lengths:
        raise ValueError(
            "a calibration batch has no tensor with a batch dimension. Give `loss_fn` and a loader of plain tensors."
        )
    return int(lengths[0])


def sample_count(batch: Any) -> int:
    """Return the number of samples in a batch; 1 where that cannot be told."""
    try:
        return batch_length(batch)
    except ValueError:
        return 1


def count_samples(batches: Iterable[Any], limit: int) -> int:
    """Return how many samples the batches have; reading stops once there are `limit`."""
    count = 0
    for batch in batches:
        count += sample_count(batch)
        if count >= limit:
            break
    return count


def slice_batch(batch: Any, start: int, stop: int) -> Any:
    """Return samples start..stop-1 of every tensor that has the batch's length; everything else as it is."""
    length = batch_length(batch)
    return map_batch(batch, lambda tensor: tensor[start:stop], length)


def join_batches(one: Any, two: Any) -> Any:
    """Return the samples of `one` followed by those of `two`; None if their tensors differ in number or shape."""
    first, second = list(_tensors(one)), list(_tensors(two))
    same = len(first) == len(second) and all(a.shape[1:] == b.shape[1:] for a, b in zip(first, second, strict=True))
    if not same:
        return None
    joined = iter([torch.cat([a, b]) if a.dim() else a for a, b in zip(first, second, strict=True)])
    return map_batch(one, lambda tensor: next(joined))


def joined(parts: Iterable[tuple[Any, int, int]], most: int) -> Iterator[tuple[Any, int, int]]:
    """Yield (batch, samples in it, index) with neighbours joined while they fit into `most` samples; the last index stays."""
    held: tuple[Any, int, int] | None = None
    for part, count, index in parts:
        both = None if held is None or held[1] + count > most else join_batches(held[0], part)
        if held is not None and both is None:
            yield held
        held = (part, count, index) if held is None or both is None else (both, held[1] + count, index)
    if held is not None:
        yield held


def map_batch(batch: Any, function: Callable[[Tensor], Tensor], length: int | None = None) -> Any:
    """Apply `function` to every tensor of the tree (only to those of first dimension `length`, if given)."""
    if isinstance(batch, Tensor):
        return function(batch) if length is None or (batch.dim() and batch.shape[0] == length) else batch
    if isinstance(batch, Mapping):
        return {key: map_batch(value, function, length) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_batch(value, function, length) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map_batch(value, function, length) for value in batch)
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _tensors(value)
