"""BatchNorm after pruning: statistics that were gathered before it are wrong, and one-shot accuracy collapses.

Averaging them anew over a few dozen batches needs no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.sandbox import untouched


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers that keep running statistics."""
    return [child for child in module.modules() if isinstance(child, _BatchNorm) and child.running_mean is not None]


def _norms(module: nn.Module) -> dict[str, Any]:
    return dict(named_batch_norms(module))


def named_batch_norms(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of `batch_norms` by their path in the module."""
    ours = {id(norm) for norm in batch_norms(module)}  # not `in`: to compare two torchmetrics makes a new, true one
    return {path: child for path, child in module.named_modules() if id(child) in ours}


Statistics = dict[str, tuple[Tensor, Tensor]]


def statistics_of(module: nn.Module) -> Statistics:
    """Return copies of the running mean and variance of every layer of `batch_norms`, by its path."""
    return {path: (norm.running_mean.clone(), norm.running_var.clone()) for path, norm in _norms(module).items()}


@torch.no_grad()
def keep_function(module: nn.Module, old: Statistics, new: Statistics) -> None:
    """Give BatchNorm layers new running statistics, and weights and biases under which they compute what they did.

    With mean m and deviation s, weight * s_new / s_old and bias + weight_old (m_new - m_old) / s_old undo the change in eval
    mode; in train mode a layer starts near its function of before if the new statistics are those of its inputs. Layers
    without weight and bias get the new statistics alone.

    Args:
        module: holds the layers; changed in place.
        old: the statistics under which the layers' function is kept; see `statistics_of`.
        new: those they get, under the same paths.
    """
    for path, norm in _norms(module).items():
        (mean, var), (new_mean, new_var) = old[path], new[path]
        if norm.affine:
            deviation = (var + norm.eps).sqrt()
            norm.bias += norm.weight * (new_mean - mean) / deviation
            norm.weight *= (new_var + norm.eps).sqrt() / deviation
        norm.running_mean.copy_(new_mean)
        norm.running_var.copy_(new_var)


@contextmanager
def averaging(norms: Mapping[str, nn.Module], buffers: Mapping[str, Tensor]) -> Iterator[None]:
    """Start statistics anew as plain means over the batches to come, in stand-ins for the layers' buffers.

    Args:
        norms: layers by path, from `named_batch_norms`.
        buffers: stand-ins by the path of the buffer.
    """
    momenta = [norm.momentum for norm in norms.values()]
    for path, norm in norms.items():
        for name, value in (("running_mean", 0.0), ("running_var", 1.0), ("num_batches_tracked", 0)):
            buffers[f"{path}.{name}" if path else name].fill_(value)
        norm.momentum = None  # type: ignore[assignment]
    try:
        with in_training(norms.values()):
            yield
    finally:
        for norm, momentum in zip(norms.values(), momenta, strict=True):
            norm.momentum = momentum


@contextmanager
def in_training(norms: Iterable[nn.Module]) -> Iterator[None]:
    """Put layers in training mode for a while, then in eval mode."""
    norms = list(norms)
    for norm in norms:
        norm.train()
    try:
        yield
    finally:
        for norm in norms:
            norm.eval()


@torch.no_grad()
def refit_batch_norm(
    module: nn.Module,
    run: Callable[[nn.Module, Any], Any],
    batches: Iterable[Any],
    trainer: Any = None,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> int:
    """Replace the running statistics of every BatchNorm layer by their plain mean over batches.

    Everything but BatchNorm is in eval mode meanwhile (dropout is off); logging, metrics, training flags and random states
    are left as they were. If `run` raises, the old statistics come back.

    Args:
        module: the pruned module.
        run: `run(module, batch)`, a forward pass; its result is not used.
        batches: batches on the module's device, each of at least two samples.
        trainer: its Trainer, whose loggers are muted.
        reduce: averages a tensor over all ranks; identity on one process.
    Returns:
        The number of batches used; 0 if there is no BatchNorm layer (nothing is run then).
    Raises:
        ValueError: there are BatchNorm layers but no batch.
    """
    norms = batch_norms(module)
    if not norms:
        return 0
    saved = [(norm, norm.momentum, _statistics(norm)) for norm in norms]
    used, done = 0, False
    try:
        with untouched(module, trainer), torch.no_grad():
            module.eval()
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain mean over all batches
                norm.train()
            for batch in batches:
                run(module, batch)
                used += 1
        if not used:
            raise ValueError("`batches` must hold at least one batch, got none. Give a dataloader, or refit_bn=False.")
        done = True
    finally:
        for norm, momentum, old in saved:
            norm.momentum = momentum
            if not done:
                _put_back(norm, old)
    for norm, _, old in saved:
        for name in ("running_mean", "running_var"):
            value = getattr(norm, name)
            value.copy_(reduce(value.clone()))
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.copy_(old["num_batches_tracked"])  # a count of training steps, not of ours
    return used


def _statistics(norm: _BatchNorm) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)}


def _put_back(norm: _BatchNorm, old: dict[str, Tensor]) -> None:
    for name, value in old.items():
        getattr(norm, name).copy_(value)
