"""The share of a single weight in its output, by the sign of the weight and of what it multiplies.

g_ij(x) = max or mean over positions P of  w_ij a_j[P] / sum of the w_ik a_k[P] of the same signs,
s_ij = max over x of g_ij(x).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.batches import batch_length, slice_batch
from lightning_prune.methods._pfp_kernel import MAX_ELEMENTS, Reader
from lightning_prune.methods._pfp_streams import evaluating, reduce_over_ranks
from lightning_prune.objective import Objective
from lightning_prune.targets import canonical_name

__all__ = ["equal_input_shares", "layers_of", "sensitivities", "some_samples", "weight_shares"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TINY = 1e-12


def weight_shares(reader: Reader, inputs: Tensor, reduction: str = "mean", max_elements: int = MAX_ELEMENTS) -> Tensor:
    """Return s_ij, the largest share over samples of every weight.

    Args:
        reader: the layer, from `Reader.events`.
        inputs: (samples, inputs, *positions), padded, from `Reader.events`.
        reduction: over positions, "mean" or "max".
        max_elements: entries of the largest temporary tensor.
    Returns:
        (outputs, inputs * kernel), in [0, 1], of the input's dtype.
    """
    weight = reader.weight.flatten(1)
    shares = torch.zeros_like(weight)
    signs = (1, -1) if bool((inputs < 0).any()) else (1,)
    for sign in signs:
        part = (sign * inputs).clamp_min(0)
        rows = reader.patches(part)  # (samples, positions, inputs * kernel)
        for own in (1, -1):
            chosen = (own * weight).clamp_min(0)
            totals = rows @ chosen.T
            inverse = torch.where(totals > _TINY * totals.max(), totals, torch.inf).reciprocal_()
            found = _reduced(rows, inverse, reduction, max_elements) * chosen
            shares = torch.maximum(shares, found)
    return shares.clamp_(0, 1)


def _reduced(rows: Tensor, inverse: Tensor, reduction: str, max_elements: int) -> Tensor:
    """Max over samples of the max or mean over positions of a_j / U_i: (outputs, inputs * kernel)."""
    if reduction == "mean":
        return (inverse.transpose(1, 2) @ rows).amax(0) / rows.shape[1]
    found = rows.new_zeros(inverse.shape[2], rows.shape[2])
    flat, scale = rows.flatten(0, 1), inverse.flatten(0, 1)
    step = max(1, max_elements // max(1, flat.numel()))
    for first in range(0, scale.shape[1], step):
        some = scale[:, first : first + step]
        found[first : first + step] = (some[:, :, None] * flat[:, None]).amax(0)
    return found


def layers_of(module: nn.Module, names: Iterable[str]) -> dict[str, list[nn.Module]]:
    """Return the linear layers and convolutions that hold each named weight; perhaps none."""
    wanted = {id(parameter): canonical_name(name) for name, parameter in module.named_parameters()}
    found: dict[str, list[nn.Module]] = {name: [] for name in names}
    for child in module.modules():
        weight = child._parameters.get("weight")
        name = wanted.get(id(weight)) if weight is not None else None
        if name in found and isinstance(child, (nn.Linear, *_CONVOLUTIONS)):
            found[name].append(child)
    return found


def sensitivities(
    objective: Objective,
    layers: Mapping[str, list[nn.Module]],
    batches: Iterable[Any],
    reduction: str,
    max_patches: int | None = None,
    seed: int = 0,
    max_elements: int = MAX_ELEMENTS,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return s_ij of all weights and the positions per sample of their layers, batch by batch.

    Args:
        objective: the module and how it is run.
        layers: by weight name, from `layers_of`.
        batches: calibration batches.
        reduction: see `weight_shares`.
        max_patches: random positions per sample; None for all.
        seed: of that choice.
        max_elements: see `weight_shares`.
    Returns:
        scores by weight name, each of the weight's shape, and positions by weight name; without layers that are not called.
    Raises:
        ValueError: a weight or an input is not finite.
    """
    scores: dict[str, Tensor] = {}
    positions: dict[str, int] = {}
    generator = torch.Generator().manual_seed(seed)

    def watch(name: str, layer: Any) -> Any:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs, parts = args[0] if args else kwargs["input"], []
            for reader, channels in _parts(layer, name):
                own, rows = reader.events(_channels(inputs, reader, channels))
                positions[name] = own.patches(rows[:1]).shape[1]
                if max_patches is not None:
                    own, rows = own.sampled(rows, max_patches, generator)
                parts.append(_by_samples(own, rows, reduction, max_elements))
            found = torch.cat(parts).view(layer.weight.shape)
            scores[name] = torch.maximum(scores[name], found) if name in scores else found

        return look

    with ExitStack() as stack:
        for name, holders in layers.items():
            for layer in holders:
                stack.callback(layer.register_forward_pre_hook(watch(name, layer), with_kwargs=True).remove)
        step = stack.enter_context(evaluating(objective))
        for batch in batches:
            step(batch)
    return {name: reduce_over_ranks(scores[name], "MAX") for name in layers if name in scores}, positions


def equal_input_shares(weight: Tensor) -> Tensor:
    """Return the shares of a weight whose inputs are all equal: |w_ij| / sum of the |w_ik| of the same sign.

    Args:
        weight: (outputs, ...).
    Returns:
        Of the weight's shape, in [0, 1], of at least float32.
    Raises:
        ValueError: the weight is not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("a weight that no calibration batch reaches is not finite. Check the training run.")
    flat = weight.detach().flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
    up, down = flat.clamp_min(0), (-flat).clamp_min(0)
    parts = [part / part.sum(1, keepdim=True).clamp_min(1e-30) for part in (up, down)]
    return (parts[0] + parts[1]).view(weight.shape)


def some_samples(objective: Objective, count: int) -> list[Any]:
    """Return batches of `count` calibration samples, or of all there are.

    Raises:
        ValueError: there is no batch.
    """
    found: list[Any] = []
    for batch in objective.batches(None):
        left = count - sum(map(batch_length, found))
        found.append(batch if batch_length(batch) <= left else slice_batch(batch, 0, left))
        if batch_length(batch) >= left:
            break
    if not found:
        raise ValueError("there is no calibration batch. Give a dataloader with at least one batch.")
    return found


def _by_samples(reader: Reader, inputs: Tensor, reduction: str, max_elements: int) -> Tensor:
    """`weight_shares` over chunks of samples, so that the patches of no chunk exceed `max_elements`."""
    each = reader.patches(inputs[:1]).numel()
    step = max(1, max_elements // max(1, each))
    chunks = [weight_shares(reader, part, reduction, max_elements) for part in inputs.split(step)]
    return torch.stack(chunks).amax(0)


def _parts(layer: Any, name: str) -> Iterator[tuple[Reader, slice]]:
    """A reader for every group of a convolution, with its input channels."""
    groups = getattr(layer, "groups", 1)
    if groups == 1:
        yield Reader.of(layer, torch.zeros(0, 1), name), slice(None)
        return
    weight = layer.weight.detach()
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"the weight of {name!r} is not finite. Check the training run.")
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    whole = Reader(
        weight, torch.zeros(0, 1, dtype=torch.int64), tuple(layer._reversed_padding_repeated_twice), mode, layer.stride,
        layer.dilation, name,
    )  # fmt: skip
    width = weight.shape[1]
    for number, part in enumerate(weight.chunk(groups)):
        yield replace(whole, weight=part), slice(number * width, (number + 1) * width)


def _channels(inputs: Tensor, reader: Reader, channels: slice) -> Tensor:
    if not reader.stride:
        return inputs
    batched = inputs if inputs.dim() == len(reader.stride) + 2 else inputs[None]
    return batched[:, channels]
