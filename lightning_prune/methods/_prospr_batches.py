"""Batches for scoring, drawn in order, pass after pass; the seed of its noise; a bar for the long ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_prune.batches import batch_length, join_batches, slice_batch
from lightning_prune.checks import check_integer
from lightning_prune.objective import Objective


def check_optional(name: str, value: Any) -> int | None:
    """Return `value` if it is None or an int of at least 1, else raise ValueError."""
    return None if value is None else check_integer(name, value, 1)


def noise_seed(generator: torch.Generator) -> int:
    """Draw a seed for dropout while scoring from a pruning event's own generator."""
    return int(torch.randint(2**31, (1,), generator=generator))


class BatchStream:
    """Batches of the calibration data in order, one pass after another.

    Attributes:
        passes: passes begun; above 1, batches have been met again.
    """

    def __init__(self, objective: Objective, batch_size: int | None = None) -> None:
        self.passes = 0
        self._source = self._batches(objective, batch_size)

    def take(self, count: int) -> list[Any]:
        """Return the next `count` batches; raise ValueError if there is no batch at all."""
        return [next(self._source) for _ in range(count)]

    def notes(self) -> list[str]:
        """A sentence for the receipt if the data did not suffice for distinct batches."""
        if self.passes < 2:
            return []
        return [
            f"The calibration data were read {self.passes} times: one pass holds too few batches for distinct ones."
        ]

    def _batches(self, objective: Objective, batch_size: int | None) -> Iterator[Any]:
        while True:
            self.passes += 1
            found = False
            for batch in resized(objective.batches(None), batch_size):
                found = True
                yield batch
            if not found:
                raise ValueError("there is no calibration batch. Give a dataloader with at least one batch.")


def resized(batches: Any, size: int | None) -> Iterator[Any]:
    """Cut and join batches to `size` samples each (None leaves them); what is left at the end comes last, smaller.

    Args:
        batches: batches of any length whose tensors share their first dimension.
        size: samples per batch, >= 1.
    """
    if size is None:
        yield from batches
        return
    held: Any = None
    for batch in batches:
        joined = batch if held is None else join_batches(held, batch)
        if joined is None:  # shapes differ (padding): they cannot share a batch
            yield held
            joined = batch
        held, length = joined, batch_length(joined)
        begin = 0
        while length - begin >= size:
            yield slice_batch(joined, begin, begin + size)
            begin += size
        held = slice_batch(joined, begin, length) if begin < length else None
    if held is not None:
        yield held


@contextmanager
def progress(description: str, total: int, show: bool) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each of `total` units of work; a bar appears only if it takes a few seconds."""
    bar = _LateBar(description, total) if show else None
    try:
        yield (lambda: None) if bar is None else bar.advance
    finally:
        if bar is not None:
            bar.close()


class _LateBar:
    """A rich bar that shows itself once `patience` seconds have passed and as many are to come."""

    patience = 2.0

    def __init__(self, description: str, total: int) -> None:
        self.description, self.total, self.done = description, total, 0
        self.started = time.perf_counter()
        self.bar: Any = None
        self.refused = False

    def advance(self) -> None:
        self.done += 1
        passed = time.perf_counter() - self.started
        late = passed > self.patience and passed / self.done * (self.total - self.done) > self.patience
        if self.bar is None and late and not self.refused:
            self._show()
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()

    def _show(self) -> None:
        from rich.errors import LiveError
        from rich.progress import Progress

        bar = Progress(transient=True)
        bar.add_task(self.description, total=self.total)
        try:
            bar.start()
        except LiveError:  # an older rich draws one live display at a time, and the Trainer's comes first
            self.refused = True
            return
        self.bar = bar
