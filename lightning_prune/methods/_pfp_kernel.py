"""What every input unit of a layer contributes to its outputs, without storing patches.

For output i at position P of sample x, t_ij is the contribution of unit j and u_ij >= |t_ij| that of absolute values:

    t_ij = <W_ij, a_j[P]>,   u_ij = <|W_ij|, |a_j|[P]>,   U_i = sum_j u_ij.

One grouped convolution makes t or u of a chunk of units at all outputs and positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MODES = ("abs", "split")
REDUCTIONS = ("max", "mean")
MAX_ELEMENTS = 2**24
_TINY = 1e-12  # outputs below this share of the largest one count as zero
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Reader:
    """A linear layer or plain convolution, as the reader of units.

    Attributes:
        weight: (outputs, inputs, *kernel), detached; no kernel dims for a linear layer.
        units: int (units, positions per unit), positions along the inputs.
        padding: of the input, as `F.pad` takes it; empty for none.
        padding_mode: "constant" (zeros), "reflect", "replicate" or "circular".
        stride: per spatial dim.
        dilation: per spatial dim.
        name: of the layer, for messages.
    """

    weight: Tensor
    units: Tensor
    padding: tuple[int, ...] = ()
    padding_mode: str = "constant"
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    name: str = "layer"

    @classmethod
    def of(cls, layer: nn.Module, units: Any, name: str = "layer") -> Reader:
        """Make the reader of a layer.

        Raises:
            ValueError: it is neither linear nor a convolution of one group, or its weight is not finite.
        """
        weight = getattr(layer, "weight", None)
        plain = isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and layer.groups == 1
        if not isinstance(weight, Tensor) or not (plain or isinstance(layer, nn.Linear)):
            raise ValueError(
                f"`layer` must be linear or a convolution of one group, got {type(layer).__name__} {name!r}."
            )
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"the weight of {name!r} is not finite. Check the training run.")
        units = torch.as_tensor(units, dtype=torch.int64, device=weight.device)
        if not plain:
            return cls(weight.detach(), units, name=name)
        conv: Any = layer
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        padding = tuple(conv._reversed_padding_repeated_twice)
        return cls(weight.detach(), units, padding, mode, conv.stride, conv.dilation, name)

    def events(self, inputs: Tensor) -> tuple[Reader, Tensor]:
        """Return the reader in at least float32 and its input as (samples, inputs, *padded positions).

        Raises:
            ValueError: the input is not finite; the layer is named.
        """
        inputs = inputs.detach()
        if not bool(torch.isfinite(inputs).all()):
            raise ValueError(f"the input of {self.name!r} is not finite on a calibration batch. Check model and data.")
        dtype = torch.promote_types(torch.promote_types(inputs.dtype, self.weight.dtype), torch.float32)
        inputs, own = inputs.to(dtype), replace(self, weight=self.weight.to(dtype))
        spatial = len(self.stride)
        if not spatial:
            inputs = inputs[None] if inputs.dim() == 1 else inputs
            return own, inputs.reshape(inputs.shape[0], -1, inputs.shape[-1]).transpose(1, 2)
        inputs = inputs if inputs.dim() == spatial + 2 else inputs[None]
        if any(self.padding):
            inputs = F.pad(inputs, self.padding, mode=self.padding_mode)
        return replace(own, padding=()), inputs

    def sampled(self, inputs: Tensor, count: int, generator: torch.Generator) -> tuple[Reader, Tensor]:
        """Return a linear reader of `count` random patches per sample, without replacement; of all if there are fewer.

        Args:
            inputs: result of `events`.
        """
        patches = self._patches(inputs)
        places = patches.shape[1 : 1 + max(1, len(self.stride))]
        if places.numel() <= count:
            return self, inputs
        chosen = torch.stack([torch.randperm(places.numel(), generator=generator)[:count] for _ in inputs])
        where = torch.unravel_index(chosen.to(inputs.device), places)
        samples = torch.arange(len(inputs), device=inputs.device)[:, None]
        index = (samples, *where)
        rows = patches[index].flatten(2)
        taps = self.weight[0, 0].numel()
        units = (self.units[..., None] * taps + torch.arange(taps, device=self.units.device)).flatten(1)
        flat = replace(self, weight=self.weight.flatten(1), units=units, stride=(), dilation=())
        return flat, rows.transpose(1, 2)

    def patches(self, inputs: Tensor) -> Tensor:
        """Return all patches, (samples, positions, inputs * kernel); a copy for convolutions.

        Args:
            inputs: (samples, inputs, *positions), padded.
        """
        return self._patches(inputs).flatten(1 + max(1, len(self.stride))).flatten(1, -2)

    def _patches(self, inputs: Tensor) -> Tensor:
        """A view (samples, *positions, inputs, *kernel)."""
        spatial, view = len(self.stride), inputs
        if not spatial:
            return inputs.transpose(1, 2)
        for axis in range(spatial):
            size = self.dilation[axis] * (self.weight.shape[2 + axis] - 1) + 1
            view = view.unfold(2 + axis, size, self.stride[axis])[..., :: self.dilation[axis]]
        return view.permute(0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial))

    def total(self, inputs: Tensor, weight: Tensor | None = None) -> Tensor:
        """Apply the weight (or another of its shape), without bias.

        Args:
            inputs: (samples, inputs, *positions), padded.
        Returns:
            (samples, outputs, positions).
        """
        weight = self.weight if weight is None else weight
        if not self.stride:
            return weight @ inputs
        convolution: Any = _CONVOLUTIONS[len(self.stride)]
        return convolution(inputs, weight, None, self.stride, 0, self.dilation).flatten(2)

    def each(self, inputs: Tensor, weight: Tensor, chunk: slice) -> Tensor:
        """Apply the weight to every unit of a chunk alone.

        Args:
            inputs: (samples, parts * inputs, *positions), padded; `parts` copies one after the other.
            weight: (outputs, parts * inputs, *kernel).
            chunk: which units.
        Returns:
            (samples, units of the chunk, outputs, positions).
        """
        units = self.units[chunk]
        parts = weight.shape[1] // self.weight.shape[1]
        units = torch.cat([units + part * self.weight.shape[1] for part in range(parts)], dim=1)
        count, width = units.shape
        taken = weight[:, units.flatten()].unflatten(1, (count, width)).transpose(0, 1)
        read = inputs[:, units.flatten()]
        if not self.stride:
            return torch.einsum("bjwp,jiw->bjip", read.unflatten(1, (count, width)), taken)
        convolution: Any = _CONVOLUTIONS[len(self.stride)]
        result = convolution(read, taken.flatten(0, 1), None, self.stride, 0, self.dilation, count)
        return result.flatten(2).unflatten(1, (count, -1))

    def chunks(
        self, inputs: Tensor, max_elements: int = MAX_ELEMENTS, weight: Tensor | None = None
    ) -> Iterator[tuple[slice, slice]]:
        """Yield (samples, units) so that no result of `each` has more than `max_elements`, where one unit allows that."""
        positions = self.total(inputs[:1], weight).shape[-1]
        per_unit = max(1, self.weight.shape[0] * positions)
        samples = min(len(inputs), max(1, max_elements // per_unit))
        units = max(1, max_elements // (per_unit * samples))
        for first in range(0, len(inputs), samples):
            for unit in range(0, len(self.units), units):
                yield slice(first, first + samples), slice(unit, unit + units)


@dataclass(frozen=True)
class Parts:
    """Non-negative terms whose shares are taken separately: one part of absolute values, or two by the sign of a term.

    Attributes:
        inputs: (samples, copies * inputs, *positions).
        weights: per part (outputs, copies * inputs, *kernel).
    """

    inputs: Tensor
    weights: tuple[Tensor, ...]

    @classmethod
    def of(cls, reader: Reader, inputs: Tensor, mode: str) -> Parts:
        """Absolute values (mode "abs"), or positive terms W+ a+ + W- a- and negative ones (mode "split")."""
        weight = reader.weight
        if mode == "abs":
            return cls(inputs.abs(), (weight.abs(),))
        up, down = weight.clamp_min(0), (-weight).clamp_min(0)
        if not bool((inputs < 0).any()):
            return cls(inputs, (up, down))
        both = torch.cat([inputs.clamp_min(0), (-inputs).clamp_min(0)], dim=1)
        return cls(both, (torch.cat([up, down], dim=1), torch.cat([down, up], dim=1)))


def unit_shares(
    reader: Reader, inputs: Tensor, mode: str = "abs", reduction: str = "max", max_elements: int = MAX_ELEMENTS
) -> Tensor:
    """Return g_j(x) = max over outputs, patches and parts of (contribution of unit j) / (sum over all inputs).

    Args:
        reader: the layer, from `Reader.events`.
        inputs: (samples, inputs, *positions), padded, from `Reader.events`.
        mode: "abs" (one part) or "split" (positive and negative terms apart).
        reduction: over patches; "mean" is the mean over patches, then the largest over outputs.
        max_elements: entries of the largest temporary tensor.
    Returns:
        (samples, units), in [0, 1], of the input's dtype.
    """
    shares = inputs.new_zeros(len(inputs), len(reader.units))
    parts = Parts.of(reader, inputs, mode)
    for weight in parts.weights:
        inverse = _inverse(reader.total(parts.inputs, weight))[:, None]
        for rows, units in reader.chunks(parts.inputs, max_elements, weight):
            ratios = reader.each(parts.inputs[rows], weight, units).mul_(inverse[rows])
            found = ratios.amax((2, 3)) if reduction == "max" else ratios.mean(3).amax(2)
            shares[rows, units] = torch.maximum(shares[rows, units], found)
    return shares.clamp_(0, 1)


def dropped_mass(reader: Reader, inputs: Tensor, kept: Tensor) -> Tensor:
    """Return D_i(x, P) = sum of u_ij over the units dropped / U_i, which bounds |z^_i - z_i| / U_i when they leave.

    Args:
        reader: the layer, from `Reader.events`.
        inputs: (samples, inputs, *positions), padded.
        kept: bool (units,).
    Returns:
        (samples, outputs, positions), in [0, 1].
    """
    positive, weight = inputs.abs(), reader.weight.abs()
    inverse = _inverse(reader.total(positive, weight))
    gone = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[reader.units[~kept.to(weight.device)].flatten()] = True
    shape = (1, -1, *(1 for _ in weight.shape[2:]))
    return (reader.total(positive, weight * gone.view(shape)) * inverse).clamp_(0, 1)


def error_moments(
    reader: Reader, inputs: Tensor, factors: Tensor, draws: float | None, max_elements: int = MAX_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """Return second moments of the error of a reweighed sum, relative to U_i, at every output and position.

    raw = sum_j f_j t_ij^2 / U_i^2;   variance = raw - (sum_{f_j > 0} t_ij)^2 / (m U_i^2) with m draws, else raw.

    Args:
        reader: the layer, from `Reader.events`.
        inputs: (samples, inputs, *positions), padded.
        factors: f (units,) >= 0: 1 / (m p_j) of drawn units, (1 - pi_j) / pi_j of independent ones, 0 of sure ones.
        draws: m; None for independent inclusion.
        max_elements: entries of the largest temporary tensor.
    Returns:
        raw and variance, each (samples, outputs, positions), >= 0.
    """
    inverse = _inverse(reader.total(inputs.abs(), reader.weight.abs()))
    raw, drawn = torch.zeros_like(inverse), torch.zeros_like(inverse)
    factors = factors.to(inputs)
    for rows, units in reader.chunks(inputs, max_elements):
        terms = reader.each(inputs[rows], reader.weight, units) * inverse[rows, None]
        some = factors[units].view(-1, 1, 1)
        raw[rows] += (terms.square() * some).sum(1)
        drawn[rows] += (terms * (some > 0)).sum(1)
    variance = raw if draws is None else (raw - drawn.square() / draws).clamp_min(0)
    return raw, variance


def _inverse(total: Tensor) -> Tensor:
    """1 / U where U counts, else 0."""
    floor = _TINY * float(total.max()) if total.numel() else 0.0
    return torch.where(total > floor, total, torch.inf).reciprocal_()
