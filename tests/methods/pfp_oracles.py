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


def entropy(module: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1])


def spread(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms weights, biases and statistics that differ per channel, as training does, and leave no unit dead."""
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        if isinstance(child, (nn.BatchNorm2d, nn.BatchNorm1d)):
            child.weight.data = torch.rand(child.weight.shape, generator=generator) + 0.5
            child.bias.data = torch.rand(child.bias.shape, generator=generator) + 0.5
            child.running_mean = 0.1 * torch.randn(child.bias.shape, generator=generator)
            child.running_var = torch.rand(child.bias.shape, generator=generator) + 0.5
        elif getattr(child, "bias", None) is not None:
            child.bias.data += 1.0
    return module


def chain() -> nn.Module:
    """conv - norm - ReLU - pool - conv - ReLU - flatten - linear - ReLU - linear on images of 1 x 6 x 6."""
    torch.manual_seed(0)
    module = spread(
        nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(54, 12), nn.ReLU(), nn.Linear(12, 3),
        )
    )  # fmt: skip
    module[7].bias.data += 3.0  # type: ignore[index]
    return module


class Residual(nn.Module):
    """A stem, a residual block with norms, a pointwise and a depthwise convolution, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.point, self.point_norm = nn.Conv2d(6, 10, 1, bias=False), nn.BatchNorm2d(10)
        self.depth, self.depth_norm = nn.Conv2d(10, 10, 3, groups=10, bias=False), nn.BatchNorm2d(10)
        self.head = nn.Linear(10, 3)

    def forward(self, images: Tensor) -> Tensor:
        stream = torch.relu(self.stem_norm(self.stem(images)))
        stream = torch.relu(stream + self.norm(self.conv(stream)))
        wide = torch.relu(self.point_norm(self.point(stream)))
        return self.head(torch.relu(self.depth_norm(self.depth(wide))).mean((2, 3)))


class Concatenated(nn.Module):
    """Two branches side by side, read by one convolution and flattened into one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(1, 4, 1)
        self.join = nn.Conv2d(10, 5, 3, stride=2)
        self.head = nn.Linear(20, 3)

    def forward(self, images: Tensor) -> Tensor:
        both = torch.cat([torch.relu(self.left(images)), torch.relu(self.right(images))], dim=1)
        return self.head(torch.relu(self.join(both)).flatten(1))


def residual() -> nn.Module:
    torch.manual_seed(1)
    return spread(Residual())


def concatenated() -> nn.Module:
    torch.manual_seed(2)
    return Concatenated()


NETS = {"chain": chain, "residual": residual, "concatenated": concatenated}


def batches(count: int = 8, size: int = 8, seed: int = 1) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            torch.randn(size, 1, 6, 6, generator=generator),
            torch.arange(size) % 3 if number % 2 else torch.arange(size) % 2,
        ]
        for number in range(count)
    ]
