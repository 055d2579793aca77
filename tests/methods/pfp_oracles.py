"""Naive counterparts of what PFP computes, and the networks its tests prune."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def patches_of(layer: Any, inputs: Tensor) -> Tensor:
    """Im2col of a layer's input: (samples, positions, inputs, kernel)."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(len(inputs), -1, inputs.shape[-1], 1)
    pad = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = functional.pad(inputs, pad, mode=mode)
    columns = functional.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
    return columns.transpose(1, 2).unflatten(2, (inputs.shape[1], -1))


def terms_of(layer: Any, inputs: Tensor, units: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Signed, absolute, positive and negative contributions, each (samples, outputs, positions, units)."""
    patches, weight = patches_of(layer, inputs), layer.weight.detach().flatten(2) if layer.weight.dim() > 2 else None
    weight = layer.weight.detach()[..., None] if weight is None else weight
    single = torch.einsum("bpck,ick->bipck", patches, weight)

    def per_unit(values: Tensor) -> Tensor:
        return torch.stack([values[..., positions, :].sum((-1, -2)) for positions in units], dim=-1)

    return tuple(map(per_unit, (single, single.abs(), single.clamp_min(0), (-single).clamp_min(0))))  # type: ignore


def naive_shares(layer: Any, inputs: Tensor, units: Tensor, mode: str, reduction: str = "max") -> Tensor:
    """(samples, units) by the definition, from im2col."""
    every = torch.arange(inputs.shape[1] if layer.weight.dim() > 2 else inputs.shape[-1])[:, None]
    _, mass, up, down = terms_of(layer, inputs, units)
    _, all_mass, all_up, all_down = (part.sum(-1, keepdim=True) for part in terms_of(layer, inputs, every))
    parts = [(mass, all_mass)] if mode == "abs" else [(up, all_up), (down, all_down)]
    shares = []
    for part, whole in parts:
        ratio = torch.where(whole > 1e-12 * whole.max(), part / whole, 0.0)
        shares.append(ratio.amax((1, 2)) if reduction == "max" else ratio.mean(2).amax(1))
    return torch.stack(shares).amax(0)
