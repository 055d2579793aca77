"""What a cut must stand beside agreeing in eval mode: train mode, another batch size, a backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lightning_prune._dependency.calls import Call, copy_of
from lightning_prune._dependency.groups import ChannelGroup
from lightning_prune._shrink_probe import Probe, Removed, difference, larger_batch, masked, run


def strict_fault(probe: Probe, cut: nn.Module, groups: Sequence[ChannelGroup], removed: Removed) -> str:
    """Return what is wrong with a cut of the probe, in words; empty if nothing is.

    Args:
        probe: the whole module; it is masked during the comparisons and left as it was.
        cut: the cut copy, in eval mode; its running statistics may change.
        groups: the groups that were cut.
        removed: indices of removed units by group name.
    """
    more = larger_batch(probe.calls)
    if more is not None:
        fault = _batch_fault(probe, cut, groups, removed, more)
        if fault:
            return fault
    return _train_fault(probe, cut, groups, removed)


def _batch_fault(
    probe: Probe, cut: nn.Module, groups: Sequence[ChannelGroup], removed: Removed, calls: Sequence[Call]
) -> str:
    with masked(probe.module, groups, removed):
        expected = _attempt(probe.module, calls)
    if expected is None:
        return ""  # the module itself takes no such batch
    error = difference(expected, run(cut, calls))
    return "" if error <= probe.tolerance else f"at twice the batch the cut differs from the mask by {error:.1e}"


def _train_fault(probe: Probe, cut: nn.Module, groups: Sequence[ChannelGroup], removed: Removed) -> str:
    with in_train_mode(probe.module), masked(probe.module, groups, removed):
        expected = _attempt(probe.module, probe.calls)
    if expected is None:
        return ""  # the module itself does not run in train mode (a batch of one through BatchNorm)
    cut.train()
    outputs = run(cut, probe.calls, grad=True)
    error = difference(expected, outputs)
    shapes = [tuple(a.shape) == tuple(b.shape) for a, b in zip(expected, outputs, strict=False)]
    if error > probe.tolerance and not (all(shapes) and _is_random(probe)):
        return f"in train mode the cut differs from the mask by {error:.1e}"
    total = [t.sum() for t in outputs if t.requires_grad and t.is_floating_point()]
    if total:
        torch.stack([value.double() for value in total]).sum().backward()
    cut.eval()
    return ""


def _is_random(probe: Probe) -> bool:
    """Whether train mode draws noise that depends on shapes, so that outputs cannot be compared."""
    with in_train_mode(probe.module):
        first, second = (run(probe.module, probe.calls, seed=seed) for seed in (0, 1))
    return difference(first, second) > probe.tolerance


@contextlib.contextmanager
def in_train_mode(module: nn.Module) -> Iterator[None]:
    """Train mode inside the block; flags and buffers (running statistics) come back as they were."""
    flags = {child: child.training for child in module.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    module.train()
    try:
        yield
    finally:
        for child, flag in flags.items():
            child.training = flag
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _attempt(module: nn.Module, calls: Sequence[Call]) -> list[Tensor] | None:
    try:
        return run(module, calls)
    except Exception:  # the caller asks whether the module can run this way at all
        return None


def agree(first: nn.Module, second: nn.Module, calls: Sequence[Call]) -> bool:
    """Whether two real modules give the same outputs: in their own precision, or else in float64."""
    expected, found = run(first, calls), run(second, calls)
    if any(not bool(torch.isfinite(t).all()) for t in expected if t.is_floating_point()):
        return True  # nothing can be compared; the probe was
    if difference(expected, found) <= 1e-4:
        return True
    wide = [call.map(lambda t: t.double() if t.is_floating_point() else t) for call in calls]
    try:
        pair = [run(copy_of(module).double(), wide) for module in (first, second)]
    except Exception:
        return difference(expected, found) <= 1e-2
    return difference(*pair) <= 1e-6
