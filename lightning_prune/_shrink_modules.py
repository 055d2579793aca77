"""Attributes of torch's own modules after their tensors were cut, and attention narrower than its stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_Shapes = Mapping[str, tuple[int, ...]]


def refresh(module: nn.Module, before: _Shapes) -> None:
    """Set the size attributes of a torch module from the new shapes of its tensors.

    Args:
        module: any module; one that is not known is left alone.
        before: shapes before the cut of its own tensors that were cut.
    """
    for kind, update in _UPDATES:
        if isinstance(module, kind):
            update(module, before)
            return


def _convolution(module: Any, before: _Shapes) -> None:
    weight = module.weight
    old = before.get("weight", tuple(weight.shape))
    depthwise = module.groups > 1 and module.groups == module.in_channels
    if module.transposed:
        module.groups = weight.shape[0] if depthwise else module.groups
        module.in_channels, module.out_channels = weight.shape[0], weight.shape[1] * module.groups
    else:
        if depthwise:  # out = multiplier * groups
            module.groups = weight.shape[0] // (old[0] // module.groups)
        module.in_channels, module.out_channels = weight.shape[1] * module.groups, weight.shape[0]


def _linear(module: Any, before: _Shapes) -> None:
    module.out_features, module.in_features = module.weight.shape


def _bilinear(module: Any, before: _Shapes) -> None:
    module.out_features, module.in1_features, module.in2_features = module.weight.shape


def _statistics(module: Any, before: _Shapes) -> None:
    vector = module.weight if module.weight is not None else module.running_mean
    if vector is not None:
        module.num_features = vector.shape[0]


def _group_norm(module: Any, before: _Shapes) -> None:
    channels = module.weight.shape[0]
    module.num_groups = max(1, module.num_groups * channels // module.num_channels)
    module.num_channels = channels


def _embedding(module: Any, before: _Shapes) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


def _slope(module: Any, before: _Shapes) -> None:
    module.num_parameters = module.weight.shape[0]


def _recurrent(module: Any, before: _Shapes) -> None:
    module.hidden_size = module.weight_hh_l0.shape[1]
    module.input_size = module.weight_ih_l0.shape[1]


def _recurrent_cell(module: Any, before: _Shapes) -> None:
    module.hidden_size, module.input_size = module.weight_hh.shape[1], module.weight_ih.shape[1]


def _attention(module: nn.MultiheadAttention, before: _Shapes) -> None:
    name = next((n for n in ("in_proj_weight", "q_proj_weight") if n in before), None)
    if name is None:
        return
    module.num_heads = module.num_heads * getattr(module, name).shape[0] // before[name][0]
    module._qkv_same_embed_dim = False  # keeps encoder layers off their fused kernel, which knows one width only
    if type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn:
        module.__class__ = NarrowMultiheadAttention


def dropout_rates(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the attributes of `module` and its children that are dropout rates above 0, as (owner, name)."""
    for child in module.modules():
        drops = any(word in type(child).__name__ for word in ("Drop", "StochasticDepth"))
        for name, value in list(vars(child).items()):
            if isinstance(value, float) and value and ("drop" in name.lower() or (drops and name == "p")):
                yield child, name


_UPDATES: tuple[tuple[type | tuple[type, ...], Callable[[Any, _Shapes], None]], ...] = (
    (nn.modules.conv._ConvNd, _convolution),
    (nn.Bilinear, _bilinear),
    (nn.Linear, _linear),
    (nn.modules.batchnorm._NormBase, _statistics),
    (nn.GroupNorm, _group_norm),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    (nn.PReLU, _slope),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _recurrent_cell),
    (nn.MultiheadAttention, _attention),
)


class NarrowMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose inner width is num_heads * head_dim rather than embed_dim.

    It is never built: a shrunk `nn.MultiheadAttention` takes this class, and keeps its parameters and their names.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `nn.MultiheadAttention` does.

        Args:
            query: (L, N, E), or (N, L, E) with batch_first, or (L, E).
            key, value: likewise with length S.
            key_padding_mask: bool or float, (N, S); True or -inf hides a key.
            need_weights: return the attention weights too.
            attn_mask: bool or float, (L, S) or (N * heads, L, S).
            average_attn_weights: average them over the heads.
            is_causal: a hint only; the mask decides.
        Returns:
            The output of query's shape, and weights of shape (N, L, S), (N, heads, L, S) or None.
        """
        batched, batch_axis = query.dim() == 3, 0 if self.batch_first else 1
        streams = [t if batched else t.unsqueeze(batch_axis) for t in (query, key, value)]
        streams = [t if self.batch_first else t.transpose(0, 1) for t in streams]
        q, k, v = self._heads(streams)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.head_dim) + self._bias(q, attn_mask, key_padding_mask)
        weights = scores.softmax(-1)
        mixed = F.dropout(weights, self.dropout, self.training) @ v
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        output = output if self.batch_first else output.transpose(0, 1)
        shown = (weights.mean(1) if average_attn_weights else weights) if need_weights else None
        if not batched:
            output, shown = output.squeeze(batch_axis), None if shown is None else shown.squeeze(0)
        return output, shown

    def _heads(self, streams: list[Tensor]) -> list[Tensor]:
        """Project to (N, heads, length, head_dim)."""
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [
            F.linear(stream, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for stream, weight, bias in zip(streams, weights, biases, strict=True)
        ]

    def _bias(self, like: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
        """Both masks as numbers added to the scores."""
        total = torch.zeros((), dtype=like.dtype, device=like.device)
        if attn_mask is not None:
            mask = _as_numbers(attn_mask, like)
            total = total + (mask if mask.dim() == 2 else mask.view(like.shape[0], -1, *mask.shape[1:]))
        if key_padding_mask is not None:
            total = total + _as_numbers(key_padding_mask, like)[:, None, None]
        return total


def _as_numbers(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, -math.inf)
