"""Rules of operators that read position i to make position i, and of operators that create tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_prune._dependency.labels import LabelledTensor, TensorSpec, ZeroSet, joined, labelled
from lightning_prune._dependency.walk import Walk, rule, words

# pointwise operators that torch does not tag as such, or that are composed of tagged ones
_UNTAGGED = words(
    """
    add sub mul div where masked_fill pow maximum minimum eq ne lt gt le ge logical_and logical_or
    logical_not lerp addcmul addcdiv rsub clamp clamp_min clamp_max copy floor_divide remainder fmod atan2
    true_divide sigmoid tanh relu exp log sqrt rsqrt erf abs neg square reciprocal floor ceil round trunc
    sign isnan isinf isfinite log1p expm1 softsign log_sigmoid hardshrink softshrink tanhshrink xlogy and or
    xor invert relu6 hardswish hardsigmoid celu selu elu leaky_relu rrelu rrelu_with_noise softplus gelu
    silu mish hardtanh threshold logit cos sin fill zero normal uniform exponential bernoulli clone
    contiguous detach alias to _to_copy dropout alpha_dropout feature_dropout feature_alpha_dropout
    native_dropout lift_fresh lift_fresh_copy type_as zeros_like ones_like full_like rand_like randn_like
    randint_like empty_like float double half long int bool detach_copy requires_grad nan_to_num conj
    resolve_conj resolve_neg _autocast_to_full_precision _autocast_to_reduced_precision polar complex real
    imag angle dequantize
    """
)

# f(0) = 0 in one operand: the slab of the result is zero where that of the operand is
_ZERO_KEEPING = words(
    """
    clone contiguous detach alias to _to_copy neg type_as float double half relu tanh abs detach_copy
    lift_fresh lift_fresh_copy _autocast_to_full_precision _autocast_to_reduced_precision
    """
)
_SAME_CONTENT = "zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor empty_strided"
_OWN_CONTENT = (
    "arange rand randn eye linspace logspace tril_indices triu_indices randint new_tensor randperm hann_window "
    "hamming_window tensor"
)


@rule("pointwise", *_UNTAGGED)
def pointwise(walk: Walk, *args: Any, **kwargs: Any) -> Any:
    """Dims of full size go together, aligned from the right."""
    tensors = list(labelled([args, kwargs]))
    if isinstance(walk.spec, list):
        full = next((t for t in tensors if t.shape == walk.shape), None)
        if full is None:
            return walk.opaque(args, kwargs)
        return [
            LabelledTensor(spec.shape, full.labels) if spec.shape == full.shape else walk.fresh(spec)
            for spec in walk.spec
        ]
    if not isinstance(walk.spec, TensorSpec):
        return walk.opaque(args, kwargs)
    labels = walk.broadcast(tensors, walk.shape)
    return LabelledTensor(walk.shape, labels, _zeros(walk.step.op, tensors, walk.shape))


def _zeros(op: str, tensors: Sequence[LabelledTensor], shape: Sequence[int]) -> list[ZeroSet]:
    if op in ("mul", "div"):  # a product is zero where one factor is, a quotient where its numerator is
        factors = tensors if op == "mul" else tensors[:1]
        return [_first_zero(factors, dim, shape) for dim in range(len(shape))]
    if op in ("add", "sub"):
        if len(tensors) < 2:  # x + 1 is not zero where x is
            return [None] * len(shape)
        return [joined(_aligned(t, dim, shape) for t in tensors) for dim in range(len(shape))]
    if op in _ZERO_KEEPING and tensors:
        return [_aligned(tensors[0], dim, shape) for dim in range(len(shape))]
    return [None] * len(shape)


def _aligned(tensor: LabelledTensor, dim: int, shape: Sequence[int]) -> ZeroSet:
    own = dim - len(shape) + len(tensor)
    return tensor.zeros[own] if own >= 0 and tensor.shape[own] == shape[dim] else None


def _first_zero(factors: Sequence[LabelledTensor], dim: int, shape: Sequence[int]) -> ZeroSet:
    found = [zero for t in factors if (zero := _aligned(t, dim, shape)) is not None]
    return frozenset().union(*found) if found else None


@rule("prelu", "_prelu_kernel")
def prelu(walk: Walk, tensor: LabelledTensor, weight: LabelledTensor) -> LabelledTensor:
    """A slope per channel goes with its channel (dim 1)."""
    if len(weight) == 1 and weight.shape[0] > 1:
        walk.unify(tensor.labels[min(1, len(tensor) - 1)], weight.labels[0])
        return LabelledTensor(tensor.shape, tensor.labels)
    return LabelledTensor(walk.shape, walk.broadcast([tensor, weight], walk.shape))


@rule("max", "min")
def extremum(walk: Walk, tensor: LabelledTensor, other: Any = None, *args: Any, **kwargs: Any) -> Any:
    """With a second tensor pointwise, else a reduction."""
    from lightning_prune._dependency.rules_norm import reduction

    if isinstance(other, LabelledTensor):
        return pointwise(walk, tensor, other)
    return reduction(walk, tensor, other, *args, **kwargs)


@rule(*_SAME_CONTENT.split())
def same_content(walk: Walk, *args: Any, **kwargs: Any) -> LabelledTensor:
    """A constant fill is equal at all positions, so any of them may leave."""
    return LabelledTensor(walk.shape, [walk.cells.new(size) for size in walk.shape])


@rule(*_OWN_CONTENT.split())
def own_content(walk: Walk, *args: Any, **kwargs: Any) -> LabelledTensor:
    """The content depends on the position: cutting it would need other numbers."""
    return walk.fresh(walk.spec)


@rule(
    "_assert_tensor_metadata",
    "_assert_async",
    "_assert_scalar",
    "sym_size",
    "size",
    "item",
    "_local_scalar_dense",
)
def no_tensor(walk: Walk, *args: Any, **kwargs: Any) -> Any:
    """Nothing is computed that later steps read as a tensor; a value read from a tensor fixes it."""
    if walk.step.op in ("item", "_local_scalar_dense"):
        return walk.opaque(args, kwargs)
    return walk.spec
