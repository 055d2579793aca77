"""Rules of operators that combine positions: normalisation, reductions, scans, pooling and resampling."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_prune._dependency.labels import Label, LabelledTensor
from lightning_prune._dependency.walk import Walk, rule, words

_REDUCTIONS = words(
    """
    mean amax amin aminmax var std logsumexp norm linalg_vector_norm prod argmax argmin any all var_mean
    std_mean median nanmedian mode count_nonzero nansum nanmean sum quantile
    """
)
_SCANS = words(
    """
    softmax log_softmax _softmax _log_softmax _safe_softmax softmin cumsum cumprod cummax cummin
    logcumsumexp sort argsort flip roll
    """
)
_LOCAL = words(
    """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d
    upsample_trilinear3d upsample_bicubic2d lp_pool2d max_pool1d_with_indices max_pool2d_with_indices
    max_pool3d_with_indices _adaptive_avg_pool2d _adaptive_avg_pool3d _upsample_bilinear2d_aa
    _upsample_bicubic2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
    reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
    """
)


def dims_of(dims: Any, rank: int) -> list[int]:
    """Return dims as non-negative ints; None or an empty list is every dim."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(rank))
    return [dim % rank for dim in (dims if isinstance(dims, (list, tuple)) else [dims])] if rank else []


def _outputs(walk: Walk, labels: Sequence[Label]) -> Any:
    """Give every output tensor of the step the same labels."""
    if isinstance(walk.spec, list):
        return [LabelledTensor(spec.shape, labels) for spec in walk.spec]
    return LabelledTensor(walk.shape, labels)


@rule(*_REDUCTIONS)
def reduction(walk: Walk, tensor: LabelledTensor, *args: Any, **kwargs: Any) -> Any:
    """The reduced dims are read whole; a sum of (activation x weight) is a contraction instead."""
    reduced = dims_of(_reduced_dims(walk.step.op, args, kwargs), len(tensor))
    for dim in reduced:
        if walk.step.op in ("sum", "nansum") and tensor.zeros[dim] is not None and tensor.labels[dim] is not None:
            walk.consume(tensor.labels[dim], tensor.zeros[dim])
        else:
            walk.freeze(tensor.labels[dim])
    kept = len(walk.shape) == len(tensor)
    labels = [None if d in reduced else tensor.labels[d] for d in range(len(tensor)) if kept or d not in reduced]
    return _outputs(walk, labels)


def _reduced_dims(op: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if "dim" in kwargs:
        return kwargs["dim"]
    place = 1 if op in ("norm", "linalg_vector_norm", "quantile") else 0  # the order, or the quantile, comes first
    value = args[place] if len(args) > place else None
    if op == "norm" and len(args) > 1 and not isinstance(args[1], (list, tuple)):
        value = None
    return None if isinstance(value, bool) or not isinstance(value, (int, list, tuple)) else value


@rule(*_SCANS)
def scan(walk: Walk, tensor: LabelledTensor, *args: Any, **kwargs: Any) -> Any:
    """The dim is read in order or as a whole; the others are free."""
    dims = dims_of(_scanned_dims(walk.step.op, args, kwargs), len(tensor))
    for dim in dims:
        walk.freeze(tensor.labels[dim])
    return _outputs(walk, [None if d in dims else label for d, label in enumerate(tensor.labels)])


def _scanned_dims(op: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    for name in ("dim", "dims"):
        if name in kwargs:
            return kwargs[name]
    if op == "flip":
        return args[-1]
    if op == "roll":
        return args[1] if len(args) > 1 else None
    return next((a for a in args if isinstance(a, int) and not isinstance(a, bool)), -1)


@rule("topk", "kthvalue")
def top(walk: Walk, tensor: LabelledTensor, k: Any, dim: int = -1, *_: Any, **__: Any) -> Any:
    """Ranks along one dim."""
    place = dim % len(tensor)
    walk.freeze(tensor.labels[place])
    kept = len(walk.shape) == len(tensor)
    return _outputs(
        walk, [None if d == place else label for d, label in enumerate(tensor.labels) if kept or d != place]
    )


@rule("tril", "triu", "_fft_r2c", "_fft_c2c", "_fft_c2r", "fft_fft", "fft_ifft")
def last_dims(walk: Walk, tensor: LabelledTensor, *args: Any, **kwargs: Any) -> LabelledTensor:
    """Triangles read the last two dims; a transform those it names."""
    dims = [len(tensor) - 2, len(tensor) - 1]
    if "fft" in walk.step.op:
        named = (
            args[0] if walk.step.op.startswith("_") and args else kwargs.get("dim", args[1] if len(args) > 1 else -1)
        )
        dims = dims_of(named, len(tensor))
    for dim in dims:
        walk.freeze(tensor.labels[dim])
    return LabelledTensor(walk.shape, [None if d in dims else label for d, label in enumerate(tensor.labels)])


@rule("cosine_similarity", "pairwise_distance")
def similarity(walk: Walk, first: LabelledTensor, second: LabelledTensor, dim: int = 1, *_: Any, **__: Any) -> Any:
    """Two tensors compared along one dim, read whole."""
    rank = max(len(first), len(second))
    shape = [max(a, b) for a, b in zip(first.shape, second.shape, strict=True)]
    labels = walk.broadcast([first, second], shape)
    place = (dim if walk.step.op == "cosine_similarity" else -1) % rank
    walk.freeze(labels[place])
    return LabelledTensor(walk.shape, [label for d, label in enumerate(labels) if d != place])


@rule("batch_norm", "_native_batch_norm_legit", "native_batch_norm", "_batch_norm_no_update")
def batch_norm(
    walk: Walk, tensor: LabelledTensor, weight: Any = None, bias: Any = None, mean: Any = None, variance: Any = None,
    training: bool = False, *_: Any, **__: Any,
) -> Any:  # fmt: skip
    """Statistics are per channel; in training they read all other dims."""
    _per_channel(walk, tensor, (weight, bias, mean, variance))
    if training:
        for dim, label in enumerate(tensor.labels):
            if dim != 1:
                walk.freeze(label, "batch statistics read it whole")
    if isinstance(walk.spec, list):
        return [LabelledTensor(s.shape, tensor.labels if s.shape == tensor.shape else None) for s in walk.spec]
    return LabelledTensor(walk.shape, tensor.labels)


@rule("instance_norm")
def instance_norm(
    walk: Walk, tensor: LabelledTensor, weight: Any = None, bias: Any = None, mean: Any = None, variance: Any = None,
    *_: Any, **__: Any,
) -> LabelledTensor:  # fmt: skip
    """Statistics are per sample and channel."""
    _per_channel(walk, tensor, (weight, bias, mean, variance))
    for label in tensor.labels[2:]:
        walk.freeze(label)
    return LabelledTensor(tensor.shape, tensor.labels)


def _per_channel(walk: Walk, tensor: LabelledTensor, vectors: Sequence[Any]) -> None:
    for vector in vectors:
        if isinstance(vector, LabelledTensor) and tensor.shape[1] > 1:
            walk.unify(tensor.labels[1], vector.labels[0])


@rule("layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(walk: Walk, tensor: LabelledTensor, shape: Sequence[int], *vectors: Any, **named: Any) -> Any:
    """The normalised dims are read whole."""
    first = len(tensor) - len(shape)
    why = "a layer norm takes its mean or scale over all of it"
    for vector in (*vectors, *named.values()):
        if isinstance(vector, LabelledTensor):
            walk.freeze_tensor(vector, why)
    for label in tensor.labels[first:]:
        walk.freeze(label, why)
    labels = [*tensor.labels[:first], *[None] * len(shape)]
    if isinstance(walk.spec, list):
        return [LabelledTensor(s.shape, labels if s.shape == tensor.shape else None) for s in walk.spec]
    return LabelledTensor(walk.shape, labels)


@rule("group_norm")
def group_norm(
    walk: Walk, tensor: LabelledTensor, groups: int, weight: Any = None, bias: Any = None, *_: Any, **__: Any
) -> LabelledTensor:
    """The channels of a norm group go together; a single group is read whole."""
    _per_channel(walk, tensor, (weight, bias))
    for label in tensor.labels[2:]:
        walk.freeze(label, "a group norm takes its mean over it")
    channels = tensor.labels[1]
    if channels is not None and groups == 1:
        walk.freeze(channels, "a group norm of one group takes its mean over all of it")
        channels = None
    elif channels is not None:
        width = len(channels) // groups
        walk.cells.union(channels, np.repeat(channels[::width], width))
    return LabelledTensor(tensor.shape, [tensor.labels[0], channels, *[None] * (len(tensor) - 2)])


@rule(*_LOCAL)
def local(walk: Walk, tensor: LabelledTensor, *args: Any, **kwargs: Any) -> Any:
    """Channel by channel; neighbours along the spatial dims are read."""
    spatial = _spatial_rank(walk.step.op)
    keep = max(len(tensor) - spatial, 0)
    for label in tensor.labels[keep:]:
        walk.freeze(label, f"{walk.step.op} reads neighbours along it")
    labels = [*tensor.labels[:keep], *[None] * (len(tensor) - keep)]
    return _outputs(walk, labels)


def _spatial_rank(op: str) -> int:
    """Return the number in names such as max_pool2d_with_indices."""
    return int(re.search(r"(\d)d", op).group(1))  # type: ignore[union-attr]


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sample(walk: Walk, tensor: LabelledTensor, grid: LabelledTensor, *_: Any, **__: Any) -> LabelledTensor:
    """Samples between neighbours, channel by channel, at places the grid says."""
    for label in (*tensor.labels[2:], *grid.labels[1:]):
        walk.freeze(label)
    return LabelledTensor(walk.shape, [*tensor.labels[:2], *[None] * (len(tensor) - 2)])


@rule("cross_entropy_loss", "nll_loss", "nll_loss_nd", "mse_loss", "l1_loss", "huber_loss", "smooth_l1_loss",
      "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div")  # fmt: skip
def loss(walk: Walk, *args: Any, **kwargs: Any) -> Any:
    """A loss compares whole outputs."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, LabelledTensor):
            walk.freeze_tensor(value, "a loss compares it with a target")
    return walk.fresh(walk.spec)
