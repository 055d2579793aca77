"""A probe: a copy with generic random parameters in float64, on which a cut is compared with a mask.

Trained or default values hide errors: with a layer scale of 1e-6 or a last norm of zeros any wrong cut would pass.
"""

from __future__ import annotations

import collections
import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_prune._dependency.calls import Call, copy_of, tensors_in
from lightning_prune._dependency.groups import ChannelGroup
from lightning_prune._dependency.trace import quiet
from lightning_prune._dependency.walk import tensors_by_name
from lightning_prune._shrink_modules import dropout_rates

Removed = Mapping[str, Sequence[int]]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


@dataclass
class Probe:
    """A module to verify cuts on.

    Attributes:
        module: the copy, in eval mode.
        calls: how it is run, in its precision.
        dtype: float64, or float32 where the module runs in no other.
        origin: "random" or "initial" parameters.
    """

    module: nn.Module
    calls: list[Call]
    dtype: torch.dtype
    origin: str

    @property
    def tolerance(self) -> float:
        """Largest relative difference that counts as equal."""
        return TOLERANCE[self.dtype]


def make_probe(module: nn.Module, calls: Sequence[Call], seed: int = 0) -> Probe:
    """Return a probe whose outputs are finite and not all zero.

    Raises:
        ValueError: there is none in any precision.
    """
    reasons = []
    for origin, dtype in (("random", torch.float64), ("initial", torch.float64), ("initial", torch.float32)):
        copy = copy_of(module)
        if origin == "random":
            randomise(copy, seed)
        copy, cast = (
            copy.to(dtype),
            [call.map(partial(_cast, dtype=dtype)) for call in calls],
        )
        probe = Probe(without_dropout(copy).eval(), cast, dtype, origin)
        try:
            outputs = run(probe.module, probe.calls)
        except Exception as error:  # any user code may fail in another precision
            reasons.append(f"{origin} {dtype}: {type(error).__name__}: {error}")
            continue
        if _is_telling(outputs):
            return probe
        reasons.append(f"{origin} {dtype}: the outputs are not finite, or all zero")
    raise ValueError(
        f"`module` must give finite outputs to be verified, got {'; '.join(reasons)[:600]}. Nothing was changed."
    )


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> None:
    """Move to a generic point: normal / sqrt(fan-in) for matrices, uniform(0.5, 1.5) for vectors and statistics."""
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    statistics = [b for n, b in module.named_buffers() if n.rsplit(".", 1)[-1] in ("running_mean", "running_var")]
    for tensor in (*module.parameters(), *statistics):
        if id(tensor) in done or not tensor.is_floating_point() or not tensor.numel():
            continue
        done.add(id(tensor))
        if tensor.dim() >= 2 and tensor.shape[0] > 1:
            scale = math.sqrt(max(1, tensor.numel() // tensor.shape[0]))
            values = torch.randn(tensor.shape, generator=generator) / scale
        else:
            values = torch.rand(tensor.shape, generator=generator) + 0.5
        tensor.data.copy_(values)


def without_dropout(module: nn.Module) -> nn.Module:
    """Set dropout rates to zero: noise of another shape is other noise."""
    for child, name in dropout_rates(module):
        child.__dict__[name] = 0.0
    return module


def run(module: nn.Module, calls: Sequence[Call], grad: bool = False, seed: int = 0) -> list[Tensor]:
    """Return all output tensors of all calls; every run of one seed starts from the same random state."""
    outputs: list[Tensor] = []
    with quiet(tracing=False), attributes_kept(module), torch.set_grad_enabled(grad):
        for call in calls:
            torch.manual_seed(seed)
            outputs += tensors_in(call.run(module))
    return outputs


@contextlib.contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Undo what a forward pass stores in attributes: a cached tensor would be stale after a cut."""
    saved = [
        (child, {name: _shallow(name, value) for name, value in vars(child).items()}) for child in module.modules()
    ]
    try:
        yield
    finally:
        for child, attributes in saved:
            child.__dict__.clear()
            child.__dict__.update(attributes)


def _shallow(name: str, value: Any) -> Any:
    """A copy of a plain container; those of hooks stay, since handles point at them."""
    plain = type(value) in (dict, list, set, collections.OrderedDict) and "hook" not in name
    return value.copy() if plain else value


def difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Return the largest max|a - b| / max|a| over the tensors; inf if shapes or non-finite positions differ."""
    if len(first) != len(second) or any(a.shape != b.shape for a, b in zip(first, second, strict=True)):
        return math.inf
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        if not a.is_floating_point() or not a.numel():
            continue
        if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
            return math.inf
        a, b = (torch.nan_to_num(t.detach().double(), nan=0.0, posinf=0.0, neginf=0.0) for t in (a, b))
        scale = a.abs().max().clamp_min(1e-30)
        worst = max(worst, float((a - b).abs().max() / scale))
    return worst


@contextlib.contextmanager
def masked(module: nn.Module, groups: Sequence[ChannelGroup], removed: Removed, prefix: str = "") -> Iterator[None]:
    """Zero the consumer slabs of removed units inside the block, and put the values back."""
    tensors = tensors_by_name(module)
    saved: dict[str, Tensor] = {}
    for name, dim, positions in _consumer_slabs(groups, removed):
        own = name[len(prefix) + 1 :] if prefix else name
        if own not in saved:
            saved[own] = tensors[own].data
            tensors[own].data = saved[own].clone()
        tensors[own].data.index_fill_(dim, positions.to(saved[own].device), 0)
    try:
        yield
    finally:
        for name, data in saved.items():
            tensors[name].data = data


@torch.no_grad()
def mask_units(module: nn.Module, groups: Sequence[ChannelGroup], removed: Removed) -> None:
    """Zero the consumer slabs of removed units."""
    tensors = tensors_by_name(module)
    for name, dim, positions in _consumer_slabs(groups, removed):
        tensors[name].data.index_fill_(dim, positions.to(tensors[name].device), 0)


def sensitivities(probe: Probe, groups: Sequence[ChannelGroup], removed: Removed) -> dict[str, float]:
    """Return how much the outputs move when each group's units are masked, relative to the outputs.

    One backward pass gives the first order of all groups, sqrt(sum over units of <gradient, weight>^2).
    """
    tensors = tensors_by_name(probe.module)
    wanted = {name for group in groups for name, _ in group.consumers}
    flags = {name: tensors[name].requires_grad for name in wanted}
    for name in wanted:
        tensors[name].requires_grad_(True)
    try:
        outputs = [t for t in run(probe.module, probe.calls, grad=True) if t.is_floating_point() and t.requires_grad]
        generator = torch.Generator().manual_seed(1)
        total = sum(_projection(t, generator) for t in outputs)
        inputs = [tensors[name] for name in wanted]
        found = torch.autograd.grad(total, inputs, allow_unused=True)  # type: ignore[arg-type]
        products = {
            name: (tensor.detach() * gradient)
            for name, tensor, gradient in zip(wanted, inputs, found, strict=True)
            if gradient is not None
        }
        return {group.name: _first_order(group, removed, products) for group in groups}
    finally:
        for name, flag in flags.items():
            tensors[name].requires_grad_(flag)


def _first_order(group: ChannelGroup, removed: Removed, products: Mapping[str, Tensor]) -> float:
    effects = torch.zeros(len(group), dtype=torch.float64)
    for name, dim in group.consumers:
        if name not in products:
            continue
        others = [d for d in range(products[name].dim()) if d != dim]
        along = products[name].sum(others) if others else products[name]
        effects += along.double().cpu()[torch.as_tensor(group.slices[name, dim])].sum(1)
    return float(torch.linalg.vector_norm(effects[list(removed[group.name])]))


def _projection(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A random mean of an output, relative to its largest entry."""
    finite = torch.where(torch.isfinite(tensor), tensor, torch.zeros_like(tensor))
    weights = torch.randn(tensor.shape, generator=generator).to(tensor) / math.sqrt(max(1, tensor.numel()))
    return (finite * weights).sum() / finite.detach().abs().max().clamp_min(1e-30)


def larger_batch(calls: Sequence[Call]) -> list[Call] | None:
    """Return the calls with every tensor of the batch size doubled along its first dim; None without a batch."""
    size = batch_size(calls)
    if size is None:
        return None
    return [call.map(lambda t: torch.cat([t, t]) if t.dim() and t.shape[0] == size else t) for call in calls]


def batch_size(calls: Sequence[Call]) -> int | None:
    """Return the first size of the first tensor that has one."""
    found = (t.shape[0] for call in calls for t in tensors_in((call.args, call.kwargs)) if t.dim())
    return next(found, None)


def captured(module: nn.Module, paths: Sequence[str], calls: Sequence[Call]) -> dict[str, Call]:
    """Run the calls once and return the arguments of the first call of each sub-module."""
    found: dict[str, Call] = {}

    def record(path: str, args: Any, kwargs: Any) -> None:
        if path not in found:
            args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
            found[path] = Call("", args, kwargs)

    handles = [
        module.get_submodule(path).register_forward_pre_hook(
            lambda _, args, kwargs, path=path: record(path, args, kwargs), with_kwargs=True
        )
        for path in paths
    ]
    try:
        run(module, calls)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _consumer_slabs(groups: Sequence[ChannelGroup], removed: Removed) -> Iterator[tuple[str, int, Tensor]]:
    for group in groups:
        gone = list(removed.get(group.name, ()))
        if gone:
            for name, dim in sorted(group.consumers):
                yield name, dim, torch.as_tensor(group.slices[name, dim][gone].ravel())


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _is_telling(outputs: Sequence[Tensor]) -> bool:
    """Whether the outputs hold no NaN (masks may hold inf) and some number other than zero."""
    floating = [t for t in outputs if t.is_floating_point() and t.numel()]
    if any(bool(torch.isnan(t).any()) for t in floating):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return any(bool((torch.isfinite(t) & (t != 0)).any()) for t in floating)
