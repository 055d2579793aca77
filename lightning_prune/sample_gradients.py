"""Gradient rows: one row per group of m samples, as a matrix (n x p), faster than n backward passes.

Three ways, tried in this order; the first one whose rows equal a plain loop on a probe is used for all rows:

- *outer*: one forward and backward pass per chunk. For a linear layer or convolution the gradient of a row is the
  product of the layer's inputs and output gradients, summed over the samples of the row: one batched product per layer.
- *vmap*: `torch.func.vmap` of `torch.func.grad` over single-row batches.
- *loop*: one backward pass per row; works wherever a loss of a slice of the batch can be had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune._layer_rows import NotOuter, Recorder
from lightning_prune.batch_norm import batch_norms
from lightning_prune.batches import batch_length, map_batch, regroup, slice_batch
from lightning_prune.checks import check_choice, check_integer
from lightning_prune.masks import full
from lightning_prune.objective import Objective, buffers_of, evaluate
from lightning_prune.targets import named_tensors

WAYS = ("auto", "outer", "vmap", "loop")
_FIRST_CHUNK = 256  # samples in one pass until it is known what a sample costs
_CHUNK_BYTES = 64 * 2**20  # unfolded activations in one pass
_TOLERANCE = 1e-4  # float32 rows of the fast ways against the loop, relative to the largest entry


def gradient_rows(
    objective: Objective,
    names: Sequence[str],
    rows: int,
    samples_per_row: int = 1,
    dtype: torch.dtype = torch.float32,
    way: str = "auto",
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
    Returns:
        A, shape (min(n, samples available // m), p), on the device of the parameters.
    Raises:
        ValueError: fewer samples than one row needs, a batch that cannot be cut into samples, or a gradient that is not
            finite (the row is named).
    """
    with GradientSource(objective, names, way) as source:
        return source.rows(rows, samples_per_row, dtype)


class GradientSource:
    """Gradients of one objective at any weights, from a stream of samples that goes on from call to call.

    Use it as a context: inside, the module is in the sandbox and in eval mode. The stream starts over when the data are
    used up; one call never uses a sample twice.

    Args:
        objective: the loss and its batches.
        names: canonical parameter names; their flattened entries are the p columns, in this order.
        way: "auto", or one of "outer", "vmap", "loop".
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
        self._fill: Callable[[Any, Tensor], None] | None = None
        self._stack = ExitStack()
        self._stream: Iterator[Any] = iter(())
        self.rows_given = 0  # rows of the smallest matrix so far
        self.samples_used = 0
        self._held: Any = None
        self._rest: Any = None  # of a batch that one call did not use up
        self._position = 0  # samples read in this pass
        self._length: int | None = None  # of a pass, once one has been read

    def __enter__(self) -> GradientSource:
        self.step = self._stack.enter_context(self.objective.open())
        self.step.eval()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def available(self, limit: int) -> int:
        """Return how many samples one pass over the data has, counted up to `limit`."""
        count = 0
        for batch in self.objective.batches(None):
            count += batch_length(batch)
            if count >= limit:
                break
        return min(count, limit)

    def at(self, flat: Tensor) -> None:
        """Evaluate at other values of the named parameters from now on; `flat` has shape (p,)."""
        with torch.no_grad():
            for name, part in zip(self.names, flat.split(self.sizes), strict=True):
                self.parameters[name].copy_(part.view_as(self.parameters[name]))

    def rows(self, rows: int, samples_per_row: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix of `gradient_rows` from the next samples of the stream."""
        check_integer("rows", rows, 1)
        self.samples = check_integer("samples_per_row", samples_per_row, 1)
        matrix = torch.empty(rows, self.width, dtype=dtype, device=self.device)
        done = 0
        for batch, count in regroup(self._next_pass(), rows, self.samples, lambda: max(1, self.chunk // self.samples)):
            fill = self._choose(batch)
            part = matrix[done : done + count]
            fill(batch, part)
            _check_rows(part, done)
            done += count
            self.samples_used += count * samples_per_row
            self.objective.advance()
        if not done:
            raise ValueError(
                f"there are fewer than `samples_per_row`={samples_per_row} calibration samples. "
                "Give a larger dataloader."
            )
        self.rows_given = min(done, self.rows_given or done)
        return matrix[:done]

    def mean(self, samples: int, check: bool = True) -> tuple[float, Tensor]:
        """Return (mean loss, its gradient of shape (p,)) over the next `samples` samples, or all there are.

        Args:
            samples: >= 1.
            check: refuse a loss or gradient that is not finite; a search for weights would rather see it.
        Raises:
            ValueError: there is no sample, or a loss or gradient is not finite.
        """
        wanted = [self.parameters[name] for name in self.names]
        total = torch.zeros(self.width, device=self.device)
        loss_sum, seen = 0.0, 0
        for batch, count in self._take(check_integer("samples", samples, 1)):
            loss = evaluate(self.step, self.parameters, self.buffers, batch, seen, check)
            grads = torch.autograd.grad(loss, wanted, allow_unused=True)
            flat = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, grads, strict=True)]
            total.add_(torch.cat([g.flatten() for g in flat]), alpha=count)
            self.samples_used += count
            loss_sum, seen = loss_sum + count * float(loss.detach()), seen + count
            self.objective.advance()
        if not seen:
            raise ValueError("there is no calibration sample. Give a dataloader with at least one batch.")
        if check and not bool(torch.isfinite(total).all()):
            raise ValueError("the mean gradient of the calibration samples is not finite. Check loss and data.")
        return loss_sum / seen, total.div_(seen)

    def held_loss(self, samples: int) -> float:
        """Return the mean loss over a batch of at most `samples` samples that is drawn once and then kept."""
        if self._held is None:
            self._held = next((batch for batch, _ in self._take(check_integer("samples", samples, 1))), None)
            if self._held is None:
                raise ValueError("there is no calibration sample. Give a dataloader with at least one batch.")
        with torch.no_grad():
            return float(evaluate(self.step, self.parameters, self.buffers, self._held, check=False))

    def refit_batch_norm(self, samples: int) -> None:
        """Re-estimate the BatchNorm statistics that gradients are taken with, at the current weights.

        The live module keeps its own; without BatchNorm nothing happens.

        Args:
            samples: calibration samples, >= 1.
        """
        module: nn.Module = self.step.get_submodule("module")
        norms = batch_norms(module)
        if not norms:
            return
        momenta = [norm.momentum for norm in norms]
        ours = {id(norm) for norm in norms}  # not `in norms`: to compare two torchmetrics makes a new, true one
        for path, norm in module.named_modules():
            if id(norm) in ours:
                for name, value in (("running_mean", 0.0), ("running_var", 1.0), ("num_batches_tracked", 0)):
                    self.buffers[f"{path}.{name}" if path else name].fill_(value)
                norm.momentum = None  # a plain mean over all batches
                norm.train()
        try:
            with torch.no_grad():
                for index, (batch, count) in enumerate(self._take(check_integer("samples", samples, 1))):
                    if count > 1 or not index:  # one sample has no variance, and a batch of a rest is easily one
                        evaluate(self.step, self.parameters, self.buffers, batch, check=False)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
                norm.eval()

    def _take(self, samples: int) -> Iterator[tuple[Any, int]]:
        """Parts of the stream that add up to `samples`; what is left of the last batch waits for the next call."""
        for batch in self._next_pass():
            length, used = batch_length(batch), 0
            while used < length and samples:
                count = min(samples, self.chunk, length - used)
                yield slice_batch(batch, used, used + count), count
                used, samples = used + count, samples - count
            if not samples:
                self._rest = slice_batch(batch, used, length) if used < length else None
                return

    def _next_pass(self) -> Iterator[Any]:
        """Batches from where the stream stands, at most as many samples as one pass over the data has."""
        given, restarted = 0, False
        if self._rest is not None:
            batch, self._rest = self._rest, None
            given = batch_length(batch)
            yield batch
        while self._length is None or given < self._length:
            batch = next(self._stream, None)
            if batch is not None:
                given, self._position = given + batch_length(batch), self._position + batch_length(batch)
                yield batch
            elif restarted:
                return
            else:
                self._length = self._position or None
                self._stream, self._position, restarted = iter(self.objective.batches(None)), 0, True

    def _choose(self, batch: Any) -> Callable[[Any, Tensor], None]:
        """The fastest way that agrees with the loop on the first rows of `batch`; chosen once."""
        if self._fill is None:
            ways = {"outer": self.outer, "vmap": self.vmap, "loop": self.loop}
            self._fill = self.loop if self.way == "auto" else ways[self.way]
            if self.way == "auto":
                self._fill = next((fill for fill in (self.outer, self.vmap) if self._agrees(fill, batch)), self.loop)
        return self._fill

    def loop(self, batch: Any, out: Tensor) -> None:
        """One backward pass per row."""
        wanted = [self.parameters[name] for name in self.names]
        for row in range(len(out)):
            part = slice_batch(batch, row * self.samples, (row + 1) * self.samples)
            loss = evaluate(self.step, self.parameters, self.buffers, part, row)
            grads = torch.autograd.grad(loss, wanted, allow_unused=True)
            flat = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, grads, strict=True)]
            out[row] = torch.cat([g.flatten() for g in flat])

    def vmap(self, batch: Any, out: Tensor) -> None:
        """All rows at once; a row is a batch of its own along a new leading dimension."""
        rows = map_batch(batch, lambda tensor: tensor.unflatten(0, (len(out), self.samples)))
        wanted = {name: self.parameters[name].detach() for name in self.names}
        others = {name: p.detach() for name, p in self.parameters.items() if name not in wanted}

        def loss(chosen: Mapping[str, Tensor], part: Any) -> Tensor:
            return evaluate(self.step, {**others, **chosen}, self.buffers, part, check=False)

        grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(wanted, rows)
        for name, column in zip(self.names, out.split(self.sizes, dim=1), strict=True):
            column.copy_(grads[name].flatten(1))

    def outer(self, batch: Any, out: Tensor) -> None:
        """One pass over all rows; layer inputs times layer output gradients, summed within each row."""
        with Recorder(self.step, self.names) as recorder:
            loss = evaluate(self.step, self.parameters, self.buffers, batch)
            calls = recorder.calls
            per_sample = sum(call.bytes for call in calls) / batch_length(batch)
            self.chunk = int(min(4096, max(self.samples, _CHUNK_BYTES / max(1.0, per_sample))))
            grads = torch.autograd.grad(loss, [call.output for call in calls], allow_unused=True)
        columns = dict(zip(self.names, out.split(self.sizes, dim=1), strict=True))
        out.zero_()
        for call, grad in zip(calls, grads, strict=True):
            if grad is not None:
                # the loss is a mean over all rows, a row is a mean over its own samples
                columns[call.name].add_(call.rows(grad.detach(), len(out)).flatten(1), alpha=len(out))

    def _agrees(self, fill: Callable[[Any, Tensor], None], batch: Any) -> bool:
        count = min(2, batch_length(batch) // self.samples)
        probe = slice_batch(batch, 0, count * self.samples)
        expected, got = (torch.zeros(count, self.width, device=self.device) for _ in range(2))
        self.loop(probe, expected)
        try:
            fill(probe, got)
        except (RuntimeError, ValueError, TypeError, NotImplementedError, NotOuter):
            return False  # the module does not allow this way; the loop will do
        return bool((got - expected).abs().max() <= _TOLERANCE * expected.abs().max().clamp_min(1e-12))


def _check_rows(part: Tensor, first: int) -> None:
    finite = torch.isfinite(part).all(dim=1)
    if not bool(finite.all()):
        bad = first + int((~finite).nonzero()[0])
        raise ValueError(f"gradient row {bad} is not finite. Check the loss on that part of the calibration data.")
