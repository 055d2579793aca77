"""Repair after structured pruning: least-squares refit of consumers, then re-estimation of BatchNorm statistics.

A consumer that lost inputs is refit to the dense network's outputs. With A the features the dense consumer reads, X those
the pruned one reads, K the features it keeps, and W the dense weight:

    W'[:, K] = W (A X_K^T) (X_K X_K^T + damping * mean(diag) I)^-1

Consumers are refit in the order in which they run, each on the inputs of the network repaired so far. A refit stays only
if it lowers the error on batches that it has not seen.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.batch_norm import batch_norms, refit_batch_norm
from lightning_prune.checks import check_integer, check_positive
from lightning_prune.sandbox import untouched
from lightning_prune.targets import canonical_name

__all__ = ["RepairReport", "reestimate_batch_norm", "refit_consumers", "repair"]

Run = Callable[[nn.Module, Any], Any]
MAX_FEATURES = 4096  # a Gram matrix above this is skipped
_HELD_OUT = 4  # every fourth batch judges the refit


@dataclass
class RepairReport:
    """What a repair did, as plain values for the receipt.

    Attributes:
        refit: consumer -> (before, after): relative squared error of its outputs on held-out batches.
        skipped: consumer -> why it was not refit.
        batch_norm: names of re-estimated BatchNorm layers.
        samples: samples used for the statistics.
    """

    refit: dict[str, tuple[float, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    batch_norm: list[str] = field(default_factory=list)
    samples: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = asdict(self)
        values["refit"] = {name: list(errors) for name, errors in self.refit.items()}
        return values


def repair(
    module: nn.Module,
    dense: nn.Module,
    batches: Sequence[Any],
    refit: bool = True,
    batch_norm: bool = True,
    run: Run | None = None,
    damping: float = 1e-3,
    max_samples: int = 2000,
) -> RepairReport:
    """Refit the consumers of removed units, then re-estimate BatchNorm, in place.

    Args:
        module: the pruned module with its zeros, of the dense shapes.
        dense: the module before pruning; it is only run.
        batches: batches, read several times; at least one.
        refit: whether to refit consumers; it needs two batches or more.
        batch_norm: whether to re-estimate running statistics.
        run: `run(module, batch)` makes one forward pass; None finds out how (see `refit_consumers`).
        damping: ridge of the refit relative to the mean squared feature, > 0.
        max_samples: samples after which the statistics are settled, >= 1.
    Returns:
        What was done.
    Raises:
        ValueError: an argument breaks its rule; nothing was changed.
    """
    report = refit_consumers(module, dense, batches, run, damping) if refit else RepairReport()
    if batch_norm:
        found = reestimate_batch_norm(module, batches, run, max_samples)
        report.batch_norm, report.samples = found.batch_norm, found.samples
    return report


def reestimate_batch_norm(
    module: nn.Module, batches: Iterable[Any], run: Run | None = None, max_samples: int = 2000
) -> RepairReport:
    """Replace the running statistics of every BatchNorm by averages over batches, in place.

    Args:
        module: any module; only its BatchNorm layers run in train mode, and only their statistics change.
        batches: batches.
        run: `run(module, batch)` makes one forward pass.
        max_samples: no further batch is read after this many samples, >= 1.
    Returns:
        Names of the layers and the number of samples; no names without BatchNorm.
    Raises:
        ValueError: there is no batch, or one does not fit; the statistics are as they were then.
    """
    check_integer("max_samples", max_samples, 1)
    found = {id(norm) for norm in batch_norms(module)}
    names = [canonical_name(name) for name, child in module.named_modules() if id(child) in found]
    samples = 0

    def limited() -> Iterator[Any]:
        nonlocal samples
        for batch in batches:
            yield batch
            samples += batch_size(batch)
            if samples >= max_samples:
                return

    try:
        refit_batch_norm(module, run or run_batch, limited())
    except Exception as error:
        raise ValueError(f"BatchNorm could not be re-estimated: {error} The statistics are as they were.") from error
    return RepairReport(batch_norm=names, samples=samples)


def refit_consumers(
    module: nn.Module, dense: nn.Module, batches: Sequence[Any], run: Run | None = None, damping: float = 1e-3
) -> RepairReport:
    """Refit every linear layer and plain convolution that lost whole inputs, in place, in the order in which they run.

    Rows and columns that are zero stay zero. Every fourth batch (the last, of fewer) judges: a refit that does not lower
    the error there is taken back.

    Args:
        module: the pruned module with its zeros, of the dense shapes.
        dense: the module before pruning, of the same names.
        batches: at least two batches for a refit.
        run: `run(module, batch)` makes one forward pass. None: a tensor is the only argument, a dict goes by name or as one
            argument, a tuple goes by place or gives its first entry; a LightningModule makes its validation or training step.
        damping: ridge relative to the mean squared feature, > 0.
    Returns:
        Errors before and after by consumer, and what was skipped and why.
    Raises:
        ValueError: `damping` is not above 0, there is no batch, or `dense` is another model.
    """
    check_positive("damping", damping)
    batches = list(batches)
    if not batches:
        raise ValueError("`batches` must hold at least one batch, got none.")
    report = RepairReport()
    pairs = _consumers(module, dense)
    order = _call_order(dense, {name: teacher for name, (_, teacher) in pairs.items()}, batches[0], run or run_batch)
    for name in order:
        layer, teacher = pairs[name]
        why = _why_not(layer, len(batches))
        if why:
            report.skipped[name] = why
            continue
        moments = _moments(module, dense, layer, teacher, batches, run or run_batch)
        errors = _refit(layer, teacher, moments, damping)
        if errors[1] < errors[0]:
            report.refit[name] = errors
        else:
            report.skipped[name] = "a refit does not lower the error on held-out batches"
    return report


def run_batch(module: nn.Module, batch: Any) -> Any:
    """Make one forward pass on a batch, however the module takes it."""
    if hasattr(module, "training_step") and not isinstance(batch, Tensor):
        step = "validation_step" if _overrides(module, "validation_step") else "training_step"
        with untouched(module), torch.no_grad():
            return getattr(module, step)(batch, 0)
    if isinstance(batch, Mapping):
        names = inspect.signature(module.forward).parameters
        return module(**batch) if set(batch) <= set(names) else module(batch)
    if isinstance(batch, (tuple, list)):
        return module(*batch) if _takes(module, batch) else module(batch[0])
    return module(batch)


def batch_size(batch: Any) -> int:
    """Return the first dimension of the first tensor in a batch, at least 1."""
    if isinstance(batch, Tensor):
        return int(batch.shape[0]) if batch.dim() else 1
    items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return next((batch_size(item) for item in items), 1)


def _overrides(module: nn.Module, name: str) -> bool:
    """Whether a LightningModule has its own step; the base class's does nothing."""
    method = getattr(type(module), name, None)
    return method is not None and not getattr(method, "__module__", "").startswith(("lightning.", "pytorch_lightning."))


def _takes(module: nn.Module, arguments: Sequence[Any]) -> bool:
    try:
        inspect.signature(module.forward).bind(*arguments)
    except TypeError:
        return False
    parameters = inspect.signature(module.forward).parameters.values()
    return not any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters) or len(arguments) == 1


def _consumers(module: nn.Module, dense: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Layers that lost whole inputs, with their dense twins."""
    twins: dict[str, Any] = {canonical_name(name): child for name, child in dense.named_modules()}
    found = {}
    children: list[tuple[str, Any]] = list(module.named_modules())
    for path, layer in children:
        name = canonical_name(path)
        if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            continue
        twin = twins.get(name)
        if twin is None or twin.weight.shape != layer.weight.shape:
            raise ValueError(f"`dense` must be the module before pruning, got no layer {name!r} of the same shape.")
        if not bool(_kept_inputs(layer).all()) and bool((_kept_inputs(twin) & ~_kept_inputs(layer)).any()):
            found[name] = (layer, twin)
    return found


def _call_order(dense: nn.Module, layers: Mapping[str, nn.Module], batch: Any, run: Run) -> list[str]:
    order: dict[str, None] = {}
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: order.setdefault(name)) for name, layer in layers.items()
    ]
    try:
        with _quietly(dense):
            run(dense, batch)
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


def _why_not(layer: Any, batches: int) -> str:
    kept = _kept_inputs(layer)
    if batches < 2:
        return "one batch cannot both fit and judge"
    if not isinstance(layer, nn.Linear) and (layer.groups != 1 or layer.padding_mode != "zeros"):
        return "grouped convolutions and padding other than zeros are not refit"
    features = layer.weight[0].numel()
    if features > MAX_FEATURES:
        return f"it reads {features} features, more than {MAX_FEATURES}"
    weight = layer.weight.detach()[:, kept]
    alive = weight.flatten(1).any(1)
    if bool((weight[alive] == 0).any()):
        return "its kept inputs hold single zeros, which a refit would fill"
    if not bool(kept.any()):
        return "no input is left"
    return ""


@dataclass
class _Moments:
    """Second moments of features: pruned (X X^T), dense times pruned (A X^T), dense (A A^T); to fit and to judge."""

    fit: tuple[Tensor, Tensor, Tensor]
    judge: tuple[Tensor, Tensor, Tensor]


def _moments(
    module: nn.Module,
    dense: nn.Module,
    layer: Any,
    teacher: Any,
    batches: Sequence[Any],
    run: Run,
) -> _Moments:
    size = layer.weight[0].numel()
    sums = [[layer.weight.new_zeros(size, size, dtype=torch.float64) for _ in range(3)] for _ in range(2)]
    for index, batch in enumerate(batches):
        pruned = _inputs(module, layer, batch, run)
        full = _inputs(dense, teacher, batch, run)
        every = min(_HELD_OUT, len(batches))
        judge = index % every == every - 1
        for x, a in zip(pruned, full, strict=True):
            x, a = features(layer, x).double(), features(teacher, a).double()
            for total, product in zip(sums[judge], (x.T @ x, a.T @ x, a.T @ a), strict=True):
                total += product
    return _Moments(tuple(sums[0]), tuple(sums[1]))


def features(layer: Any, inputs: Tensor) -> Tensor:
    """Return what a layer's weight is multiplied with.

    Args:
        layer: Linear, or a convolution of one group with zero padding.
        inputs: its input.
    Returns:
        (positions, in * kernel), the order of `weight.flatten(1)`.
    """
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1])
    spatial = len(layer.kernel_size)
    inputs = inputs if inputs.dim() == spatial + 2 else inputs[None]
    patches = F.pad(inputs, layer._reversed_padding_repeated_twice)
    for axis in range(spatial):
        kernel, dilation, stride = layer.kernel_size[axis], layer.dilation[axis], layer.stride[axis]
        patches = patches.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    order = [0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial)]
    patches = patches.permute(order)
    return patches.reshape(-1, layer.weight[0].numel())


def _inputs(module: nn.Module, layer: nn.Module, batch: Any, run: Run) -> list[Tensor]:
    found: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    try:
        with _quietly(module):
            run(module, batch)
    finally:
        handle.remove()
    return found


@contextmanager
def _quietly(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; flags come back."""
    flags = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, flag in flags.items():
            child.training = flag


@torch.no_grad()
def _refit(layer: Any, teacher: Any, moments: _Moments, damping: float) -> tuple[float, float]:
    """Set the kept columns of the rows that are alive; take it back unless held-out batches agree."""
    weight, target = layer.weight, teacher.weight.detach().flatten(1).double()
    kept = _kept_inputs(layer).repeat_interleave(weight[0, 0].numel())
    gram, cross, _ = moments.fit
    own = gram[kept][:, kept]
    ridge = damping * own.diagonal().mean().clamp_min(1e-30)
    right = own + ridge * torch.eye(len(own), dtype=own.dtype, device=own.device)
    before = weight.detach().clone()
    alive = before.flatten(1).any(1)
    solved = torch.linalg.solve(right, (target @ cross[:, kept]).T).T
    fresh = before.flatten(1).double()
    rows = torch.nonzero(alive).ravel()
    fresh[rows[:, None], torch.nonzero(kept).ravel()] = solved[alive]
    errors = tuple(_error(w, target, moments.judge, alive) for w in (before.flatten(1).double(), fresh))
    if errors[1] < errors[0] and bool(torch.isfinite(fresh).all()):
        weight.copy_(fresh.view_as(weight).to(weight.dtype))
    return errors[0], errors[1]


def _error(weight: Tensor, target: Tensor, moments: tuple[Tensor, Tensor, Tensor], alive: Tensor) -> float:
    """|W' X - W A|^2 / |W A|^2 over the rows that are alive."""
    gram, cross, full = moments
    weight, target = weight[alive], target[alive]
    scale = ((target @ full) * target).sum()
    missed = ((weight @ gram) * weight).sum() - 2 * ((target @ cross) * weight).sum() + scale
    return float(missed / scale.clamp_min(1e-300))


def _kept_inputs(layer: Any) -> Tensor:
    """Bool per input channel: some weight that reads it is not zero."""
    weight = layer.weight.detach()
    return (weight != 0).transpose(0, 1).flatten(1).any(1)
