"""Rules of look-ups and message passing: the indexed dim is read by number, the others are free."""

from __future__ import annotations

from typing import Any

from lightning_prune._dependency.labels import Label, LabelledTensor
from lightning_prune._dependency.walk import Walk, rule

_BY_NUMBER = "its positions are looked up by number"


@rule("embedding")
def embedding(walk: Walk, weight: LabelledTensor, index: LabelledTensor, *_: Any, **__: Any) -> LabelledTensor:
    """The vocabulary stays, the width is free."""
    walk.freeze(weight.labels[0], _BY_NUMBER)
    walk.produce(weight.labels[1], weight.zeros[1])
    return LabelledTensor(walk.shape, [*index.labels, weight.labels[1]])


@rule("index")
def index(walk: Walk, tensor: LabelledTensor, indices: list[Any]) -> LabelledTensor:
    """Advanced indexing: dims with an index tensor are replaced by its dims."""
    indices = indices + [None] * (len(tensor) - len(indices))
    where = [dim for dim, item in enumerate(indices) if isinstance(item, LabelledTensor)]
    for dim in where:
        walk.freeze(tensor.labels[dim], _BY_NUMBER)
        walk.freeze_tensor(indices[dim], _BY_NUMBER)
    if not where or 0 in walk.shape:
        return walk.opaque(tensor)
    rest = [dim for dim in range(len(tensor)) if dim not in where]
    adjacent = where == list(range(where[0], where[-1] + 1))
    place, added = (where[0] if adjacent else 0), len(walk.shape) - len(rest)
    result = LabelledTensor(walk.shape)
    for number, dim in enumerate(rest):
        at = number if number < place else number + added
        result.labels[at], result.zeros[at] = tensor.labels[dim], tensor.zeros[dim]
    return result


@rule("index_select")
def index_select(walk: Walk, tensor: LabelledTensor, dim: int, positions: LabelledTensor) -> LabelledTensor:
    """Positions of one dim in another order or number."""
    dim = dim % len(tensor)
    walk.freeze(tensor.labels[dim], _BY_NUMBER)
    return tensor.replace(dim, walk.shape[dim], None)


@rule(
    "gather",
    "scatter",
    "scatter_add",
    "scatter_reduce",
    "index_add",
    "index_copy",
    "index_fill",
    "take_along_dim",
)
def along(walk: Walk, tensor: LabelledTensor, dim: int, *args: Any, **kwargs: Any) -> LabelledTensor:
    """Read or write along one dim; the other dims of all tensors go together."""
    dim, rank = dim % len(tensor), len(tensor)
    others = [t for t in (*args, *kwargs.values()) if isinstance(t, LabelledTensor) and len(t) == rank]
    for operand in (tensor, *others):
        walk.freeze(operand.labels[dim], _BY_NUMBER)
    labels = [None if place == dim else _common(walk, [tensor, *others], place) for place in range(rank)]
    return LabelledTensor(walk.shape, labels)


def _common(walk: Walk, operands: list[LabelledTensor], dim: int) -> Label:
    label, size = operands[0].labels[dim], operands[0].shape[dim]
    for operand in operands[1:]:
        if operand.shape[dim] == size:
            label = walk.unify(label, operand.labels[dim])
        else:
            walk.freeze(label, _BY_NUMBER)
            walk.freeze(operand.labels[dim], _BY_NUMBER)
            label = None
    return label
