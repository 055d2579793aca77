"""Gradient rows: one row per group of m samples, as a matrix (n x p), faster than n backward passes.

Three ways, tried in this order; the first one whose rows equal a plain loop on a probe is used for all rows:

- *outer*: one forward and backward pass per chunk. For a linear layer or convolution the gradient of a row is the
  product of the layer's inputs and output gradients, summed over the samples of the row: one batched product per layer.
- *vmap*: `torch.func.vmap` of `torch.func.grad` over single-row batches.
- *loop*: one backward pass per row; works wherever a loss of a slice of the batch can be had.

Where the loss of a part of a batch cannot be had (graphs, batches of one size only), a row is one whole batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from lightning_prune._layer_rows import NotOuter, Recorder, check_rows
from lightning_prune._scratch import empty_matrix
from lightning_prune.batch_norm import averaging, batch_norms, in_training, named_batch_norms
from lightning_prune.batches import batch_length, joined, map_batch, regroup, sample_count, slice_batch
from lightning_prune.checks import check_choice, check_integer
from lightning_prune.masks import full
from lightning_prune.objective import Objective, buffers_of, check_finite, evaluate, live_names
from lightning_prune.targets import named_tensors

Fill = Callable[[Any, Tensor, Tensor], None]  # (batch, rows to fill, index of the batch each sample came from)
WAYS = ("auto", "outer", "vmap", "loop")
_FIRST_CHUNK = 256  # samples in one pass until it is known what a sample costs
_FIRST_ROWS = 2  # rows of the first pass, which shows what a row costs
_CHUNK_BYTES = 64 * 2**20  # unfolded activations in one pass, and row gradients before they reach the matrix
_TOLERANCE = 1e-4  # float32 rows of the fast ways against the loop, relative to the largest entry


def gradient_rows(
    objective: Objective,
    names: Sequence[str],
    rows: int,
    samples_per_row: int = 1,
    dtype: torch.dtype = torch.float32,
    way: str = "auto",
    offload: str | None = None,
) -> Tensor:
    """Return the matrix A whose row i is the gradient of the mean loss of the i-th group of samples.

    The module is in eval mode (BatchNorm uses its running statistics, dropout is off): rows are independent.

    Args:
        objective: the loss and its batches; samples are taken in the order in which they come.
        names: canonical parameter names; their flattened entries are the columns, in this order.
        rows: number of rows n, >= 1.
        samples_per_row: samples averaged in one row (m), >= 1.
        dtype: storage of A; gradients are computed in the parameters' dtype.
        way: "auto", or one of "outer", "vmap", "loop".
        offload: folder for a scratch file that holds A, where it is larger than memory; None holds it in memory.
    Returns:
        A, shape (min(n, samples available // m), p), on the device of the parameters, or the CPU's with `offload`.
    Raises:
        ValueError: fewer samples than one row needs, or a loss or gradient that is not finite (the batch is named).
    """
    with GradientSource(objective, names, way) as source:
        return source.rows(rows, samples_per_row, dtype, offload)


class GradientSource:
    """Gradients of one objective at any weights, from a stream of samples that goes on from call to call.

    Use it as a context: inside, the module is in the sandbox and in eval mode. The stream starts over when the data are
    used up; one call never uses a sample twice.

    Args:
        objective: the loss and its batches.
        names: canonical parameter names; their flattened entries are the p columns, in this order.
        way: "auto", or one of "outer", "vmap", "loop".
    Attributes:
        samples: samples averaged in one row of the last matrix (the mean number, where rows are whole batches).
        whole: whether rows are whole batches, because the loss of a part of one cannot be had; None: not known yet.
        rows_given: rows of the smallest matrix so far.
        samples_used: samples read so far.
    """

    def __init__(self, objective: Objective, names: Sequence[str], way: str = "auto") -> None:
        self.objective, self.names = objective, list(names)
        self.way = check_choice("way", way, WAYS)
        self.parameters = {
            name: full(p.detach()).clone().requires_grad_(name in set(names))
            for name, p in named_tensors(objective.module).items()
        }
        self.buffers = buffers_of(objective.module)
        self.sizes = [self.parameters[name].numel() for name in names]
        self.width = sum(self.sizes)
        self.device = self.parameters[self.names[0]].device
        self.chunk = _FIRST_CHUNK
        self._fill: Fill | None = None
        self._stack = ExitStack()
        self._stream: Iterator[Any] = iter(())
        self.samples, self.rows_given, self.samples_used = 1, 0, 0
        self.whole: bool | None = None
        self._held: list[tuple[Any, int]] = []  # (part, samples in it)
        self._named: dict[str, Tensor] | None = None
        self._rest: tuple[Any, int] | None = None  # of a batch that one call did not use up
        self._index = 0  # of the next batch in this pass
        self._position = 0  # samples read in this pass
        self._largest = 0  # samples in the largest batch so far
        self._length: int | None = None  # of a pass, once one has been read

    def __enter__(self) -> GradientSource:
        self.step = self._stack.enter_context(self.objective.open())
        self.step.eval()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def plan(self, rows: int, samples_per_row: int) -> tuple[int, int]:
        """Return (rows, samples in each) that one pass over the data allows: many rows come before large ones.

        Args:
            rows: rows wished for, >= 1.
            samples_per_row: samples wished for in each, >= 1; without effect where rows are whole batches.
        Raises:
            ValueError: there is no sample.
        """
        self._check_cut(samples_per_row)
        limit, samples, count = rows * samples_per_row, 0, 0
        for batch in self.objective.batches(None):
            samples, count = samples + sample_count(batch), count + 1
            if (count >= rows) if self.whole else (samples >= limit):
                break
        if self.whole:
            return min(rows, count), max(1, samples // count)
        return min(rows, samples), min(samples_per_row, max(1, samples // rows))

    def at(self, flat: Tensor) -> None:
        """Evaluate at other values of the named parameters from now on; `flat` has shape (p,)."""
        with torch.no_grad():
            for name, part in zip(self.names, flat.split(self.sizes), strict=True):
                self.parameters[name].copy_(part.view_as(self.parameters[name]))

    def rows(
        self, rows: int, samples_per_row: int, dtype: torch.dtype = torch.float32, offload: str | None = None
    ) -> Tensor:
        """Return the matrix of `gradient_rows` from the next samples of the stream."""
        check_integer("rows", rows, 1)
        self.samples = check_integer("samples_per_row", samples_per_row, 1)
        self._check_cut(samples_per_row)
        matrix = empty_matrix(rows, self.width, dtype, self.device, offload)
        done = self._whole_rows(matrix) if self.whole else self._cut_rows(matrix)
        if not done:
            raise ValueError(
                f"there are fewer than `samples_per_row`={samples_per_row} calibration samples. "
                "Give a larger dataloader."
            )
        self.rows_given = min(done, self.rows_given or done)
        return matrix[:done]

    def _cut_rows(self, matrix: Tensor) -> int:
        """Fill rows of `self.samples` samples; returns how many there are."""
        done, chunk = 0, lambda: max(1, self.chunk // self.samples) if self._fill else _FIRST_ROWS
        labelled = ((batch, torch.full((batch_length(batch),), index)) for batch, index in self._next_pass())
        for (batch, origin), count in regroup(labelled, len(matrix), self.samples, chunk):
            part, origins = matrix[done : done + count], origin[: count * self.samples].view(count, self.samples)
            own = part if part.device == self.device else torch.empty_like(part, device=self.device)
            self._choose(batch, origins)(batch, own, origins)
            check_rows(own, origins)
            if own is not part:
                part.copy_(own)
            done += count
            self.samples_used += count * self.samples
            self.objective.advance()
        return done

    def _whole_rows(self, matrix: Tensor) -> int:
        """Fill one row per batch; returns how many there are."""
        done, seen = 0, 0
        for batch, index in self._next_pass():
            origin = torch.tensor([[index]])
            self._fill_row(batch, matrix[done], index)
            check_rows(matrix[done : done + 1], origin)
            done, seen = done + 1, seen + sample_count(batch)
            self.objective.advance()
            if done == len(matrix):
                break
        self.samples_used += seen
        self.samples = max(1, seen // max(1, done))
        return done

    def _check_cut(self, samples: int) -> None:
        """Find out once, on the first batch, whether the loss of a part of a batch can be had."""
        if self.whole is not None:
            return
        batch, index = next(self._next_pass(), (None, 0))
        if batch is None:
            raise ValueError("there is no calibration sample. Give a dataloader with at least one batch.")
        self._rest = (batch, index)
        try:
            evaluate(self.step, self.parameters, self.buffers, slice_batch(batch, 0, samples), index, check=False)
            self.whole = False
        except Exception as error:  # any user code may run in a loss; where the whole batch has none, it is theirs
            evaluate(self.step, self.parameters, self.buffers, batch, index)
            self.whole = True
            warnings.warn(
                f"the loss of a part of a calibration batch cannot be had ({type(error).__name__}: {error}), so each "
                "gradient row is one whole batch. Give `calibration_dataloader` with small batches, or a `loss_fn` that "
                "takes any number of samples.",
                stacklevel=2,
            )

    def mean(self, samples: int, check: bool = True, train_norms: bool = False) -> tuple[float, Tensor]:
        """Return (mean loss, its gradient of shape (p,)) over the next `samples` samples, or all there are.

        Args:
            samples: >= 1.
            check: refuse a loss or gradient that is not finite; a search for weights would rather see it.
            train_norms: BatchNorm takes the statistics of the batch, as in training.
        Raises:
            ValueError: there is no sample, or a loss or gradient is not finite (the batch is named).
        """
        total = torch.zeros(self.width, device=self.device)
        loss_sum, seen = 0.0, 0
        norms = batch_norms(self.step.get_submodule("module")) if train_norms else []
        with in_training(norms):
            # a batch that is not finite can be named only if it is not joined to its neighbours
            for batch, count, index in self._take(samples) if check else self._joined(samples):
                if train_norms and count == 1 and seen:
                    continue  # one sample has no variance
                loss, flat = self._gradient(batch, index, check)
                if check:
                    check_rows(flat[None], torch.tensor([[index]]))
                total.add_(flat, alpha=count)
                self.samples_used += count
                loss_sum, seen = loss_sum + count * float(loss), seen + count
                self.objective.advance()
        if not seen:
            raise ValueError("there is no calibration sample. Give a dataloader with at least one batch.")
        return loss_sum / seen, total.div_(seen)

    def held_loss(self, samples: int, train_norms: bool = False) -> float:
        """Return the mean loss over at most `samples` >= 1 samples that are drawn once and kept; arguments as in `mean`."""
        if not self._held:
            self._held = [(batch, count) for batch, count, _ in self._joined(samples)]
        norms = batch_norms(self.step.get_submodule("module")) if train_norms else []
        with torch.no_grad(), in_training(norms):
            losses = [float(self._loss(batch, 0, False)) * count for batch, count in self._held]
        return sum(losses) / sum(count for _, count in self._held)

    def refit_batch_norm(self, samples: int) -> None:
        """Re-estimate the BatchNorm statistics that gradients are taken with, at the current weights.

        The live module keeps its own; without BatchNorm nothing happens.

        Args:
            samples: calibration samples, >= 1.
        """
        norms = named_batch_norms(self.step.get_submodule("module"))
        if not norms:
            return
        self._check_cut(2)  # while BatchNorm takes any number of samples
        with torch.no_grad(), averaging(norms, self.buffers):
            for number, (batch, count, _) in enumerate(self._take(samples)):
                if count > 1 or not number:  # one sample has no variance, and a batch of a rest is easily one
                    self._loss(batch, 0, False)

    def _take(self, samples: int) -> Iterator[tuple[Any, int, int]]:
        """Yield (part, samples in it, index of its batch) for parts of the stream that add up to `samples`.

        What is left of the last batch waits for the next call; where batches cannot be cut, the last one is given whole.
        """
        check_integer("samples", samples, 1)
        self._check_cut(1)
        for batch, index in self._next_pass():
            length = sample_count(batch)
            count = length if self.whole else min(samples, length)
            yield (batch if count == length else slice_batch(batch, 0, count)), count, index
            samples -= count
            if samples <= 0:
                self._rest = (slice_batch(batch, count, length), index) if count < length else None
                return

    def _joined(self, samples: int) -> Iterator[tuple[Any, int, int]]:
        """What `_take` yields, small parts joined: to no more than the data's own batches have, or what rows take."""
        parts = self._take(samples)
        return parts if self.whole else joined(parts, max(self.chunk, self._largest))

    def _next_pass(self) -> Iterator[tuple[Any, int]]:
        """Batches and their indices from where the stream stands, at most as many samples as one pass has."""
        given, restarted = 0, False
        if self._rest is not None:
            (batch, index), self._rest = self._rest, None
            given = sample_count(batch)
            yield batch, index
        while self._length is None or given < self._length:
            batch = next(self._stream, None)
            if batch is not None:
                count = sample_count(batch)
                given, self._position, self._largest = given + count, self._position + count, max(self._largest, count)
                self._index += 1
                yield batch, self._index - 1
            elif restarted:
                return
            else:
                self._length = self._position or None
                self._stream, self._position, restarted = iter(self.objective.batches(None)), 0, True
                self._index = 0

    def _choose(self, batch: Any, origins: Tensor) -> Fill:
        """The fastest way that agrees with the loop on the first rows of `batch`; chosen once."""
        if self._fill is None:
            ways: dict[str, Fill] = {"outer": self.outer, "vmap": self.vmap, "loop": self.loop}
            self._fill = self.loop if self.way == "auto" else ways[self.way]
            if self.way == "auto":
                fast = (fill for fill in (self.outer, self.vmap) if self._agrees(fill, batch, origins))
                self._fill = next(fast, self.loop)
        return self._fill

    def loop(self, batch: Any, out: Tensor, origins: Tensor) -> None:
        """One backward pass per row."""
        for row in range(len(out)):
            part = slice_batch(batch, row * self.samples, (row + 1) * self.samples)
            self._fill_row(part, out[row], int(origins[row, 0]))

    def _fill_row(self, batch: Any, out: Tensor, index: int) -> None:
        out.copy_(self._gradient(batch, index)[1])

    def _loss(self, batch: Any, index: int, check: bool = True) -> Tensor:
        """`evaluate` at the present weights; the names are looked up once, for small networks cost less than that."""
        if self._named is None:
            values = {f"module.{name}": value for name, value in (*self.parameters.items(), *self.buffers.items())}
            self._named = live_names(self.step, values)
        loss = torch.func.functional_call(self.step, self._named, (batch, index), tie_weights=False)
        if check:
            check_finite(loss, index)
        return loss

    def _gradient(self, batch: Any, index: int, check: bool = True) -> tuple[Tensor, Tensor]:
        """(loss, its gradient of shape (p,)) of one batch by one backward pass."""
        wanted = [self.parameters[name] for name in self.names]
        loss = self._loss(batch, index, check)
        if not loss.requires_grad:
            raise ValueError(
                f"the loss of calibration batch {index} does not depend on the parameters. Return it without "
                "`.detach()` or `torch.no_grad()`."
            )
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        flat = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, grads, strict=True)]
        return loss.detach(), torch.cat([g.flatten() for g in flat])

    def vmap(self, batch: Any, out: Tensor, origins: Tensor) -> None:
        """All rows at once; a row is a batch of its own along a new leading dimension."""
        self.chunk = self.samples * self._rows_at_once(self.width)
        rows = map_batch(batch, lambda tensor: tensor.unflatten(0, (len(out), self.samples)))
        wanted = {name: self.parameters[name].detach() for name in self.names}
        others = {name: p.detach() for name, p in self.parameters.items() if name not in wanted}

        def loss(chosen: Mapping[str, Tensor], part: Any) -> Tensor:
            return evaluate(self.step, {**others, **chosen}, self.buffers, part, check=False)

        grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(wanted, rows)
        for name, column in zip(self.names, out.split(self.sizes, dim=1), strict=True):
            column.copy_(grads[name].flatten(1))

    def outer(self, batch: Any, out: Tensor, origins: Tensor) -> None:
        """One pass over all rows; layer inputs times layer output gradients, summed within each row."""
        with Recorder(self.step, self.names) as recorder:
            loss = evaluate(self.step, self.parameters, self.buffers, batch, check=False)  # the rows are checked
            calls = recorder.calls
            per_sample = sum(call.bytes(len(out)) for call in calls) / batch_length(batch)
            most = self.samples * self._rows_at_once(max(self.sizes))
            self.chunk = int(min(4096, most, max(self.samples, _CHUNK_BYTES / max(1.0, per_sample))))
            grads = torch.autograd.grad(loss, [call.output for call in calls], allow_unused=True)
        columns = dict(zip(self.names, out.split(self.sizes, dim=1), strict=True))
        out.zero_()
        for call, grad in zip(calls, grads, strict=True):
            if grad is not None:
                # the loss is a mean over all rows, a row is a mean over its own samples
                columns[call.name].add_(call.rows(grad.detach(), len(out)).flatten(1), alpha=len(out))

    def _rows_at_once(self, width: int) -> int:
        """Rows of `width` gradients that fit beside the matrix before they are copied into it."""
        return max(1, min(_FIRST_CHUNK, _CHUNK_BYTES // (4 * width)))

    def _agrees(self, fill: Fill, batch: Any, origins: Tensor) -> bool:
        count = min(2, batch_length(batch) // self.samples)
        probe = slice_batch(batch, 0, count * self.samples)
        expected, got = (torch.zeros(count, self.width, device=self.device) for _ in range(2))
        self.loop(probe, expected, origins)
        try:
            fill(probe, got, origins)
        except (RuntimeError, ValueError, TypeError, NotImplementedError, NotOuter):
            return False  # the module does not allow this way; the loop will do
        return bool((got - expected).abs().max() <= _TOLERANCE * expected.abs().max().clamp_min(1e-12))
