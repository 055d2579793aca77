"""FLOPs of operators as products of dims: 2 per multiply-add.

Each counter returns whether `torch.utils.flop_counter` sees the operator, and terms (factor, dims whose lengths are
multiplied).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_prune._dependency.labels import LabelledTensor, labelled

Dim = tuple[LabelledTensor, int]
Terms = list[tuple[int, list[Dim]]]  # (factor, dims whose lengths are multiplied)


def _every(tensor: LabelledTensor, first: int = 0) -> list[Dim]:
    return [(tensor, dim) for dim in range(first, len(tensor))]


def _linear_flops(arguments: list[Any], result: LabelledTensor) -> tuple[bool, Terms]:
    tensor, weight = arguments[:2]
    return len(tensor) > 1 and len(weight) > 1, [(2, [*_every(result), (tensor, len(tensor) - 1)])]


def _addmm_flops(arguments: list[Any], result: LabelledTensor) -> tuple[bool, Terms]:
    return _linear_flops(arguments[1:], result)


def _convolution_flops(arguments: list[Any], result: LabelledTensor) -> tuple[bool, Terms]:
    return True, [(2, [*_every(result), *_every(arguments[1], 1)])]


def _transposed_flops(arguments: list[Any], result: LabelledTensor) -> tuple[bool, Terms]:
    return True, [(2, [*_every(arguments[0]), *_every(arguments[1], 1)])]


def _generic_convolution_flops(arguments: list[Any], result: LabelledTensor) -> tuple[bool, Terms]:
    return (_transposed_flops if arguments[6] else _convolution_flops)(arguments, result)


def _einsum_flops(arguments: list[Any], result: LabelledTensor) -> tuple[bool, Terms]:
    inputs, _, kept = arguments[0].replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2 or "." in inputs or not (set(terms[0]) & set(terms[1])) - set(kept):
        return True, []
    dims = {letter: (t, dim) for term, t in zip(terms, arguments[1], strict=True) for dim, letter in enumerate(term)}
    return True, [(2, list(dims.values()))]


def _attention_flops(arguments: list[Any], result: LabelledTensor) -> tuple[bool, Terms]:
    query, key = arguments[:2]
    scores = [*_every(result)[:-1], (key, len(key) - 2)]
    return False, [(2, [*scores, (query, len(query) - 1)]), (2, [*scores, (result, len(result) - 1)])]


def _recurrent_flops(arguments: list[Any], result: LabelledTensor) -> tuple[bool, Terms]:
    return True, _recurrent_terms(arguments, result)


def _fused_recurrent_flops(arguments: list[Any], result: LabelledTensor) -> tuple[bool, Terms]:
    return False, _recurrent_terms(arguments, result)


def _cell_flops(arguments: list[Any], result: LabelledTensor) -> tuple[bool, Terms]:
    return True, [(2, [(result, 0), *_every(weight)]) for weight in arguments[2:4]]


def _recurrent_terms(arguments: list[Any], result: LabelledTensor) -> Terms:
    weights = [tensor for tensor in labelled([arguments[2]]) if len(tensor) == 2]
    return [(2, [*_every(result)[:-1], *_every(weight)]) for weight in weights]


FLOPS: dict[str, Callable[[list[Any], LabelledTensor], tuple[bool, Terms]]] = {
    **dict.fromkeys(("linear", "matmul", "mm", "bmm", "mv"), _linear_flops),
    **dict.fromkeys(("addmm", "baddbmm"), _addmm_flops),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution_flops),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed_flops),
    **dict.fromkeys(("convolution", "_convolution"), _generic_convolution_flops),
    **dict.fromkeys(("gru", "rnn_tanh", "rnn_relu"), _recurrent_flops),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _cell_flops),
    "lstm": _fused_recurrent_flops,
    "einsum": _einsum_flops,
    "scaled_dot_product_attention": _attention_flops,
}
