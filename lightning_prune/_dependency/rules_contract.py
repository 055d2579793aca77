"""Rules of sums of products: linear maps, matrix products, convolutions, attention, recurrent layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_prune._dependency.labels import Label, LabelledTensor, ZeroSet
from lightning_prune._dependency.walk import Walk, rule

_NO_WEIGHT = "it is summed against another activation, so no weight could be zeroed in its place"


def contract(walk: Walk, first: LabelledTensor, dim: int, second: LabelledTensor, other: int) -> None:
    """Sum over one dim of each operand: a removed term is (finite) x 0 if one side has a weight to zero."""
    if first.shape[dim] <= 1:
        return
    if first.zeros[dim] is None and second.zeros[other] is None:
        walk.freeze(first.labels[dim], _NO_WEIGHT)
        walk.freeze(second.labels[other], _NO_WEIGHT)
        return
    label = walk.unify(first.labels[dim], second.labels[other])
    walk.consume(label, second.zeros[other] if second.zeros[other] is not None else first.zeros[dim])


def _free(walk: Walk, tensor: LabelledTensor, dim: int) -> Label:
    """A free dim of an operand; that of a weight makes it a producer."""
    walk.produce(tensor.labels[dim], tensor.zeros[dim])
    return tensor.labels[dim]


@rule("linear")
def linear(
    walk: Walk, tensor: LabelledTensor, weight: LabelledTensor, bias: LabelledTensor | None = None
) -> LabelledTensor:
    """x W^T + b: inputs with weight columns, outputs with weight rows and the bias."""
    contract(walk, tensor, len(tensor) - 1, weight, len(weight) - 1)
    if len(weight) == 1:
        return LabelledTensor(tensor.shape[:-1], tensor.labels[:-1])
    out = _free(walk, weight, 0)
    if bias is not None:
        out = walk.unify(out, bias.labels[0])
    return LabelledTensor((*tensor.shape[:-1], weight.shape[0]), [*tensor.labels[:-1], out])


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner_product")
def matmul(walk: Walk, first: LabelledTensor, second: LabelledTensor, shape: Any = None) -> LabelledTensor:
    """Last dim of the first with the last but one of the second; batch dims broadcast, outer dims are free."""
    contract(walk, first, len(first) - 1, second, max(len(second) - 2, 0))
    shape = walk.shape if shape is None else shape
    outer = (len(first) > 1) + (len(second) > 1)
    batch = list(shape[: len(shape) - outer])
    operands = [first.keep(range(max(len(first) - 2, 0))), second.keep(range(max(len(second) - 2, 0)))]
    labels = walk.broadcast(operands, batch) if batch else []
    if len(first) > 1:
        labels.append(_free(walk, first, len(first) - 2))
    if len(second) > 1:
        labels.append(_free(walk, second, len(second) - 1))
    return LabelledTensor(shape, labels)


@rule("addmm", "baddbmm", "addmv")
def addmm(walk: Walk, bias: LabelledTensor, first: LabelledTensor, second: LabelledTensor, **_: Any) -> LabelledTensor:
    """b + A B."""
    product = matmul(walk, first, second)
    return LabelledTensor(product.shape, walk.broadcast([bias, product], product.shape))


@rule("_grouped_mm", "grouped_mm", "grouped_mm_fallback")
def grouped_mm(walk: Walk, first: LabelledTensor, second: LabelledTensor, offs: Any = None, *_: Any, **__: Any) -> Any:
    """Rows of the first meet the matrix of their expert: (tokens, in) x (experts, in, out)."""
    if len(walk.shape) != 2 or len(second) != 3:
        return walk.opaque(first, second)
    contract(walk, first, len(first) - 1, second, len(second) - 2)
    return LabelledTensor(walk.shape, [first.labels[0], _free(walk, second, len(second) - 1)])


@rule("einsum")
def einsum(walk: Walk, equation: str, operands: list[LabelledTensor], **kwargs: Any) -> Any:
    """One or two operands without ellipsis or repeated letters; letters absent from the result are summed."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    plain = arrow and "." not in equation and len(terms) <= 2 and all(len(set(t)) == len(t) for t in terms)
    if not plain:
        return walk.opaque(operands)
    labels = {}
    for letter in dict.fromkeys("".join(terms)):
        found = [(t, term.index(letter)) for term, t in zip(terms, operands, strict=True) if letter in term]
        size = max(t.shape[dim] for t, dim in found)
        labels[letter] = _einsum_letter(walk, [f for f in found if f[0].shape[f[1]] == size], letter in result)
    return LabelledTensor(walk.shape, [labels[letter] for letter in result])


def _einsum_letter(walk: Walk, found: list[tuple[LabelledTensor, int]], kept: bool) -> Label:
    if not kept:
        if len(found) == 2:
            contract(walk, *found[0], *found[1])
        else:
            walk.freeze(found[0][0].labels[found[0][1]])
        return None
    label = _free(walk, *found[0])
    for tensor, dim in found[1:]:
        label = walk.unify(label, _free(walk, tensor, dim))
    return label


@rule("bilinear")
def bilinear(
    walk: Walk, first: LabelledTensor, second: LabelledTensor, weight: LabelledTensor, bias: Any = None
) -> Any:
    """y_o = x1^T W_o x2: both inputs are summed against the weight."""
    contract(walk, first, len(first) - 1, weight, 1)
    contract(walk, second, len(second) - 1, weight, 2)
    out = _free(walk, weight, 0)
    if bias is not None:
        out = walk.unify(out, bias.labels[0])
    lead = walk.broadcast([first.keep(range(len(first) - 1)), second.keep(range(len(second) - 1))], walk.shape[:-1])
    return LabelledTensor(walk.shape, [*lead, out])


@rule("scaled_dot_product_attention")
def attention(
    walk: Walk,
    query: LabelledTensor,
    key: LabelledTensor,
    value: LabelledTensor,
    attn_mask: LabelledTensor | None = None,
    *_: Any,
    **__: Any,
) -> LabelledTensor:
    """Batch and head dims go together; the width of q and k sets the scale, so it stays; that of v is free."""
    width = "attention scales by this width, and no weight of q x k could be zeroed in its place"
    for label in (query.labels[-1], key.labels[-1]):
        walk.freeze(label, width)
    walk.freeze(key.labels[-2])
    walk.freeze(value.labels[-2])
    batch = walk.shape[:-2]
    operands = [_repeated_heads(tensor, batch) for tensor in (query, key, value)]
    if attn_mask is not None:
        walk.freeze(attn_mask.labels[-1])
        if len(attn_mask) > 1:
            walk.freeze(attn_mask.labels[-2])
        operands.append(attn_mask.keep(range(max(len(attn_mask) - 2, 0))))
    return LabelledTensor(walk.shape, [*walk.broadcast(operands, batch), query.labels[-2], value.labels[-1]])


def _repeated_heads(tensor: LabelledTensor, batch: tuple[int, ...]) -> LabelledTensor:
    """Batch and head dims, key and value heads repeated to the number of query heads."""
    lead = tensor.keep(range(len(tensor) - 2))
    if not batch or lead.shape[-1] in (1, batch[-1]):
        return lead
    label = lead.labels[-1]
    repeated = None if label is None else np.repeat(label, batch[-1] // lead.shape[-1])
    return lead.replace(len(lead) - 1, batch[-1], repeated)


@rule("conv1d", "conv2d", "conv3d")
def convolution(
    walk: Walk,
    tensor: LabelledTensor,
    weight: LabelledTensor,
    bias: LabelledTensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> LabelledTensor:
    """Convolution of (..., C, *spatial) with a weight (out, C / groups, *kernel)."""
    return _convolve(walk, tensor, weight, bias, groups, transposed=False)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(
    walk: Walk,
    tensor: LabelledTensor,
    weight: LabelledTensor,
    bias: LabelledTensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> LabelledTensor:
    """Transposed convolution with a weight (C, out / groups, *kernel)."""
    return _convolve(walk, tensor, weight, bias, groups, transposed=True)


@rule("convolution", "_convolution")
def generic_convolution(
    walk: Walk, tensor: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, *_: Any,
) -> LabelledTensor:  # fmt: skip
    """The decomposed form of both."""
    return _convolve(walk, tensor, weight, bias, groups, transposed)


def _convolve(
    walk: Walk, tensor: LabelledTensor, weight: LabelledTensor, bias: Any, groups: int, transposed: bool
) -> LabelledTensor:
    channel = len(tensor) - (len(weight) - 2) - 1
    for label in (*tensor.labels[channel + 1 :], *weight.labels[2:]):
        walk.freeze(label, "a convolution reads neighbours along it")
    if groups == 1:
        inner, outer = (0, 1) if transposed else (1, 0)
        contract(walk, tensor, channel, weight, inner)
        out = _free(walk, weight, outer)
    elif tensor.shape[channel] == groups and (not transposed or weight.shape[1] == 1):
        out = _depthwise(walk, tensor.labels[channel], weight.labels[0], transposed)
    elif transposed:
        for label in (tensor.labels[channel], *weight.labels[:2]):
            walk.freeze(label, "a grouped transposed convolution stays whole")
        out = None
    else:
        out = _grouped(walk, tensor, channel, weight, groups)
    if bias is not None:
        out = walk.unify(out, bias.labels[0])
    spatial = len(weight) - 2
    return LabelledTensor(walk.shape, [*tensor.labels[:channel], out, *[None] * spatial])


def _depthwise(walk: Walk, label: Label, rows: Label, transposed: bool) -> Label:
    """Channel j makes channels j m .. j m + m - 1."""
    if label is None or rows is None:
        walk.freeze(label, "its convolution's channels never change")
        walk.freeze(rows, "its convolution's channels never change")
        return None
    walk.cells.union(label if transposed else np.repeat(label, len(rows) // len(label)), rows)
    return rows


def _grouped(walk: Walk, tensor: LabelledTensor, channel: int, weight: LabelledTensor, groups: int) -> Label:
    """Position i of every group goes together, so that all groups shrink alike and their number stays."""
    label, columns, rows = tensor.labels[channel], weight.labels[1], weight.labels[0]
    if label is None or columns is None or weight.zeros[1] is None:
        walk.freeze(label, "its grouped convolution's inputs never change")
        walk.freeze(columns, "its grouped convolution's inputs never change")
    else:
        walk.cells.union(label, np.tile(columns, groups))
        walk.consume(label, weight.zeros[1])
    if rows is not None:
        if len(rows) == groups:
            walk.freeze(rows, "each group of its convolution has one output")
            return None
        walk.cells.union(rows, np.tile(rows[: len(rows) // groups], groups))
        walk.produce(rows, weight.zeros[0])
    return rows


@rule("lstm")
def lstm(walk: Walk, tensor: LabelledTensor, states: Any, weights: Any, *args: Any) -> Any:
    """Four gates; states h and c."""
    return _recurrent(walk, 4, tensor, states, weights, *args)


@rule("gru")
def gru(walk: Walk, tensor: LabelledTensor, states: Any, weights: Any, *args: Any) -> Any:
    """Three gates; state h."""
    return _recurrent(walk, 3, tensor, states, weights, *args)


@rule("rnn_tanh", "rnn_relu")
def plain_recurrence(walk: Walk, tensor: LabelledTensor, states: Any, weights: Any, *args: Any) -> Any:
    """One gate; state h."""
    return _recurrent(walk, 1, tensor, states, weights, *args)


def _recurrent(
    walk: Walk, gates: int, tensor: LabelledTensor, states: Any, weights: Any, has_biases: bool = True,
    layers: int = 1, dropout: float = 0.0, train: bool = False, bidirectional: bool = False, *_: Any,
) -> Any:  # fmt: skip
    """Hidden i = row i of each gate of both weights and biases = column i of weight_hh; all layers go together."""
    directions, each = (2 if bidirectional else 1), (4 if has_biases else 2)
    if isinstance(weights, LabelledTensor) or len(weights) != layers * directions * each:
        return walk.opaque(tensor, states, weights)  # packed sequences and projections
    current, zero, hidden = tensor.labels[-1], tensor.zeros[-1], []
    for layer in range(layers):
        parts = []
        for direction in range(directions):
            start = (layer * directions + direction) * each
            parts.append(_cell_of(walk, gates, current, zero, weights[start : start + each]))
        hidden += parts
        known = [part for part in parts if part is not None]
        current = np.concatenate(known) if len(known) == len(parts) else None
        zero = None
    for label in (
        *hidden[1:],
        *(s.labels[-1] for s in ([states] if isinstance(states, LabelledTensor) else states)),
    ):
        walk.unify(hidden[0], label)
    outputs = [LabelledTensor(walk.shape, [*tensor.labels[:-1], current])]
    for spec in walk.spec[1:]:
        outputs.append(LabelledTensor(spec.shape, [*[None] * (len(spec.shape) - 1), hidden[0]]))
    return outputs


def _cell_of(walk: Walk, gates: int, current: Label, zero: ZeroSet, weights: list[LabelledTensor]) -> Label:
    inner, hidden, *biases = weights
    contract_label = walk.unify(current, inner.labels[1])
    walk.consume(contract_label, inner.zeros[1])
    label = hidden.labels[1]
    if label is None:
        for tensor in weights:
            walk.freeze(tensor.labels[0], "a recurrent layer of one hidden unit stays whole")
        return None
    for tensor in (inner, hidden, *biases):
        if tensor.labels[0] is not None:
            walk.cells.union(tensor.labels[0], np.tile(label, gates))
    walk.produce(label, inner.zeros[0])
    walk.consume(label, hidden.zeros[1])
    return label


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def recurrent_cell(
    walk: Walk, tensor: LabelledTensor, states: Any, inner: LabelledTensor, hidden: LabelledTensor, *biases: Any
) -> Any:
    """One step of a recurrent layer; its states keep their units from step to step."""
    gates = hidden.shape[0] // hidden.shape[1]
    weights = [inner, hidden, *(bias for bias in biases if bias is not None)]
    label = _cell_of(walk, gates, tensor.labels[-1], tensor.zeros[-1], weights)
    for state in [states] if isinstance(states, LabelledTensor) else states:
        label = walk.unify(label, state.labels[-1])
    outputs = [
        LabelledTensor(spec.shape, [tensor.labels[0], label][-len(spec.shape) :])
        for spec in (walk.spec if isinstance(walk.spec, list) else [walk.spec])
    ]
    return outputs if isinstance(walk.spec, list) else outputs[0]
