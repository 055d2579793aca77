"""Rules of operators that move positions: permute, split, join, repeat, pad, shuffle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_prune._dependency.cells import MAX_CELLS
from lightning_prune._dependency.labels import Label, LabelledTensor, joined
from lightning_prune._dependency.walk import Walk, rule


@rule("permute", "permute_copy")
def permute(walk: Walk, tensor: LabelledTensor, dims: Sequence[int]) -> LabelledTensor:
    """Dims in another order."""
    return tensor.keep([dim % len(tensor) for dim in dims])


@rule("transpose", "swapaxes", "swapdims", "transpose_copy")
def transpose(walk: Walk, tensor: LabelledTensor, first: int, second: int) -> LabelledTensor:
    """Two dims exchanged."""
    order = list(range(len(tensor)))
    if order:
        first, second = first % len(order), second % len(order)
        order[first], order[second] = second, first
    return tensor.keep(order)


@rule("t", "numpy_T", "matrix_H", "adjoint", "mT", "t_copy")
def reversed_dims(walk: Walk, tensor: LabelledTensor) -> LabelledTensor:
    """The last two dims exchanged (all dims for T)."""
    if walk.step.op == "numpy_T":
        return tensor.keep(list(range(len(tensor)))[::-1])
    return transpose(walk, tensor, -1, -2) if len(tensor) > 1 else tensor


@rule("movedim", "moveaxis")
def movedim(walk: Walk, tensor: LabelledTensor, source: Any, destination: Any) -> LabelledTensor:
    """Dims moved to other places, the rest in order."""
    rank = len(tensor)
    sources = [dim % rank for dim in (source if isinstance(source, list) else [source])]
    places = [dim % rank for dim in (destination if isinstance(destination, list) else [destination])]
    moved = dict(zip(places, sources, strict=True))
    rest = iter([dim for dim in range(rank) if dim not in sources])
    return tensor.keep([moved[place] if place in moved else next(rest) for place in range(rank)])


@rule("expand", "broadcast_to", "expand_as", "expand_copy")
def expand(walk: Walk, tensor: LabelledTensor, *_: Any, **__: Any) -> LabelledTensor:
    """Copies of one position are equal, so any of them may leave: fresh cells."""
    return _expanded(walk, tensor, walk.shape)


@rule("broadcast_tensors")
def broadcast_tensors(walk: Walk, tensors: list[LabelledTensor]) -> list[LabelledTensor]:
    """Each tensor expanded to the common shape."""
    return [_expanded(walk, tensor, spec.shape) for tensor, spec in zip(tensors, walk.spec, strict=True)]


def _expanded(walk: Walk, tensor: LabelledTensor, shape: Sequence[int]) -> LabelledTensor:
    result, offset = LabelledTensor(shape), len(shape) - len(tensor)
    for dim, size in enumerate(shape):
        own = dim - offset
        if own >= 0 and tensor.shape[own] == size:
            result.labels[dim], result.zeros[dim] = tensor.labels[own], tensor.zeros[own]
        else:
            result.labels[dim] = walk.cells.new(size)
    return result


@rule("repeat", "tile")
def repeat(walk: Walk, tensor: LabelledTensor, times: Sequence[int]) -> LabelledTensor:
    """The label repeated as a whole."""
    rank = len(walk.shape)
    times = [1] * (rank - len(times)) + list(times)
    result, offset = LabelledTensor(walk.shape), rank - len(tensor)
    for dim, count in enumerate(times):
        own = dim - offset
        label, size = (tensor.labels[own], tensor.shape[own]) if own >= 0 else (None, 1)
        if size == 1 and count > 1:
            result.labels[dim] = walk.cells.new(walk.shape[dim])
        elif label is not None:
            result.labels[dim], result.zeros[dim] = np.tile(label, count), tensor.zeros[own]
    return result


@rule("repeat_interleave")
def repeat_interleave(walk: Walk, tensor: LabelledTensor, repeats: Any = None, dim: Any = None, **_: Any) -> Any:
    """Each position repeated in place."""
    if not isinstance(repeats, int) or dim is None:
        return walk.opaque(tensor)
    dim, label = dim % len(tensor), tensor.labels[dim % len(tensor)]
    size = tensor.shape[dim] * repeats
    new = walk.cells.new(size) if tensor.shape[dim] == 1 else None if label is None else np.repeat(label, repeats)
    return tensor.replace(dim, size, new, tensor.zeros[dim] if label is not None else None)


@rule("cat", "concat", "concatenate")
def cat(walk: Walk, tensors: list[LabelledTensor], dim: int = 0) -> LabelledTensor:
    """Labels joined along the dim; parts that never change get fixed positions; other dims go together."""
    tensors = [tensor for tensor in tensors if tensor.shape != (0,)]
    result, dim = LabelledTensor(walk.shape), dim % len(walk.shape)
    for place, size in enumerate(walk.shape):
        if place == dim:
            result.labels[place] = _joined(walk, tensors, place)
        else:
            parts = [LabelledTensor((size,), [tensor.labels[place]]) for tensor in tensors]
            result.labels[place] = walk.broadcast(parts, (size,))[0]
        result.zeros[place] = joined(tensor.zeros[place] for tensor in tensors)
    return result


def _joined(walk: Walk, tensors: list[LabelledTensor], dim: int) -> Label:
    if all(tensor.labels[dim] is None for tensor in tensors):
        return None
    if any(tensor.shape[dim] >= MAX_CELLS for tensor in tensors):
        for tensor in tensors:
            walk.freeze(tensor.labels[dim], "it is joined with a part of unknown size")
        return None
    parts = [(tensor.labels[dim], tensor.shape[dim]) for tensor in tensors]
    return np.concatenate([np.zeros(size, np.int64) if label is None else label for label, size in parts])


@rule("stack")
def stack(walk: Walk, tensors: list[LabelledTensor], dim: int = 0) -> LabelledTensor:
    """A new dim whose positions are constants of the code."""
    dim = dim % len(walk.shape)
    labels = walk.broadcast(tensors, tensors[0].shape)
    zeros = [joined(tensor.zeros[place] for tensor in tensors) for place in range(len(tensors[0]))]
    return LabelledTensor(walk.shape, [*labels[:dim], None, *labels[dim:]], [*zeros[:dim], None, *zeros[dim:]])


@rule("unbind", "unsafe_unbind")
def unbind(walk: Walk, tensor: LabelledTensor, dim: int = 0) -> list[LabelledTensor]:
    """One tensor per position."""
    part = select(walk, tensor, dim, 0)
    return [part for _ in walk.spec]


@rule("select", "select_copy")
def select(walk: Walk, tensor: LabelledTensor, dim: int, index: Any) -> LabelledTensor:
    """One position, a constant of the code."""
    dim = dim % len(tensor)
    walk.freeze(tensor.labels[dim], "the code picks one position of it by number")
    return tensor.keep([place for place in range(len(tensor)) if place != dim])


@rule(
    "split",
    "split_with_sizes",
    "chunk",
    "tensor_split",
    "unsafe_split",
    "unsafe_chunk",
    "split_with_sizes_copy",
)
def split(walk: Walk, tensor: LabelledTensor, sizes: Any, dim: int = 0) -> list[LabelledTensor]:
    """Equal parts shrink alike, as the code will cut them again; unequal parts are left to verification."""
    dim = dim % len(tensor)
    lengths = [spec.shape[dim] for spec in walk.spec]
    label, zero = tensor.labels[dim], tensor.zeros[dim]
    if label is not None and len(lengths) > 1 and lengths[0] == 1:
        walk.freeze(label, "the code takes it apart position by position")
    elif label is not None and len(set(lengths)) == 1:
        walk.cells.union(label, np.tile(label[: lengths[0]], len(lengths)))
    ends = np.cumsum(lengths)
    return [
        tensor.replace(dim, int(n), None if label is None else label[end - n : end], zero)
        for n, end in zip(lengths, ends, strict=True)
    ]


@rule("slice", "narrow", "slice_copy")
def slice_(
    walk: Walk, tensor: LabelledTensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> LabelledTensor:
    """A slice at a multiple of its length is one of several equal parts; any other keeps the dim whole."""
    dim = dim % len(tensor)
    label, size = tensor.labels[dim], walk.shape[dim]
    if walk.step.op == "narrow":
        end = None if start is None or not isinstance(end, int) else start + end
    if label is None or size >= tensor.shape[dim]:
        return tensor.replace(dim, size, label, tensor.zeros[dim])
    if not all(value is None or isinstance(value, int) for value in (start, end)):
        walk.freeze(label, "the code slices it at a place that depends on data")
        return tensor.replace(dim, size, None)
    part, first = label[slice(start, end, step)], slice(start, end, step).indices(len(label))[0]
    if step != 1 or size <= 1 or len(label) % size or first % size:
        walk.freeze(label, "the code slices it at fixed places")
    else:
        walk.cells.union(label, np.tile(label[:size], len(label) // size))
    return tensor.replace(dim, size, part, tensor.zeros[dim])


@rule("glu")
def glu(walk: Walk, tensor: LabelledTensor, dim: int = -1) -> LabelledTensor:
    """Value i and gate i go together."""
    dim = dim % len(tensor)
    label, half = tensor.labels[dim], tensor.shape[dim] // 2
    if label is not None:
        walk.cells.union(label[:half], label[half:])
    result = tensor.replace(dim, half, None if label is None else label[:half])
    return LabelledTensor(result.shape, result.labels)


@rule("pad", "constant_pad_nd")
def pad(walk: Walk, tensor: LabelledTensor, widths: Sequence[int], mode: str = "constant", value: Any = None) -> Any:
    """Padding keeps its size, as the code says; its positions are fixed."""
    labels = list(tensor.labels)
    for index in range(len(widths) // 2):
        dim, left, right = len(labels) - 1 - index, widths[2 * index], widths[2 * index + 1]
        label = labels[dim]
        if label is None or (left == 0 and right == 0):
            continue
        if left < 0 or right < 0 or (isinstance(mode, str) and mode != "constant"):
            walk.freeze(label, "it is padded with copies of itself or cut at its ends")
            labels[dim] = None
        else:
            labels[dim] = np.concatenate([np.zeros(left, np.int64), label, np.zeros(right, np.int64)])
    return LabelledTensor(walk.shape, labels)


@rule("pixel_shuffle")
def pixel_shuffle(walk: Walk, tensor: LabelledTensor, factor: int) -> LabelledTensor:
    """factor^2 neighbouring channels become one."""
    dim, area = len(tensor) - 3, factor * factor
    label = tensor.labels[dim]
    for other in tensor.labels[dim + 1 :]:
        walk.freeze(other)
    if label is not None:
        walk.cells.union(label, np.repeat(label[::area], area))
        label = label[::area].copy()
    return LabelledTensor(walk.shape, [*tensor.labels[:dim], label, None, None])


@rule("pixel_unshuffle")
def pixel_unshuffle(walk: Walk, tensor: LabelledTensor, factor: int) -> LabelledTensor:
    """One channel becomes factor^2."""
    dim = len(tensor) - 3
    for other in tensor.labels[dim + 1 :]:
        walk.freeze(other)
    label = tensor.labels[dim]
    return LabelledTensor(
        walk.shape,
        [*tensor.labels[:dim], None if label is None else np.repeat(label, factor * factor), None, None],
    )


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(walk: Walk, tensor: LabelledTensor, groups: int) -> LabelledTensor:
    """Channel (g, i) moves to (i, g); all groups shrink alike."""
    label = tensor.labels[1]
    if label is not None:
        width = len(label) // groups
        walk.cells.union(label, np.tile(label[:width], groups))
        label = label.reshape(groups, width).T.reshape(-1).copy()
    return LabelledTensor(tensor.shape, [tensor.labels[0], label, *tensor.labels[2:]])


@rule("im2col")
def im2col(walk: Walk, tensor: LabelledTensor, kernel: Sequence[int], *_: Any, **__: Any) -> LabelledTensor:
    """Channel c becomes the kernel's patch of c."""
    dim = len(tensor) - 3
    for other in tensor.labels[dim + 1 :]:
        walk.freeze(other)
    label = tensor.labels[dim]
    repeated = None if label is None else np.repeat(label, kernel[0] * kernel[1])
    return LabelledTensor(walk.shape, [*tensor.labels[:dim], repeated, None])


@rule("unfold")
def unfold(walk: Walk, tensor: LabelledTensor, dim: int, size: int, step: int) -> LabelledTensor:
    """Sliding windows along one dim."""
    dim = dim % len(tensor)
    walk.freeze(tensor.labels[dim])
    return LabelledTensor(walk.shape, [*tensor.labels[:dim], None, *tensor.labels[dim + 1 :], None])


@rule("view_as_complex", "view_as_real")
def complex_view(walk: Walk, tensor: LabelledTensor) -> LabelledTensor:
    """Pairs of real numbers as complex ones, and back."""
    if walk.step.op == "view_as_real":
        return LabelledTensor(walk.shape, [*tensor.labels, None])
    walk.freeze(tensor.labels[-1])
    return LabelledTensor(walk.shape, tensor.labels[:-1])
