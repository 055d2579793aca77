"""Row gradients of linear layers and convolutions as one batched product of layer inputs and output gradients.

For a layer y = W x the gradient of the loss of one row is the sum of dL/dy x^T over the samples (and positions) of the
row; one forward and backward pass over all rows gives every factor. A convolution's product is that of its patches, or
on a processor the weight gradient of one grouped convolution, a group per row, which never writes the patches out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from lightning_prune.targets import canonical_name

_POSITIONS = 64  # of the output in one row, from which on a grouped convolution is faster than patches


class NotOuter(Exception):
    """A layer whose row gradients are no plain product of inputs and output gradients."""


class Call:
    """One call of a linear layer or convolution: its input, and the output whose gradient is asked for."""

    def __init__(self, name: str, layer: nn.Module, given: Tensor, output: Tensor) -> None:
        self.name, self.layer, self.output = name, layer, output
        self.given, self.version = given.detach(), given._version

    def bytes(self, rows: int) -> int:
        """Bytes of the input, unfolded into patches where a convolution needs them."""
        kernel = math.prod(getattr(self.layer, "kernel_size", (1,)))
        kernel = 2 if not isinstance(self.layer, nn.Linear) and _grouped(self.output, rows) else kernel
        return self.given.numel() * kernel * self.given.element_size()

    def rows(self, grad: Tensor, rows: int) -> Tensor:
        """Sum of (output gradient x input) over the samples of each row, shape (rows, *weight.shape)."""
        if self.given._version != self.version:
            raise NotOuter(f"the input of {self.name} was overwritten in place")
        if isinstance(self.layer, nn.Linear):
            given, grads = (tensor.reshape(rows, -1, tensor.shape[-1]) for tensor in (self.given, grad))
            return torch.bmm(grads.transpose(1, 2), given)
        return _convolution_rows(self.layer, self.given, grad, rows)


def _convolution_rows(layer: Any, given: Tensor, grad: Tensor, rows: int) -> Tensor:
    """Row gradients of a 1-d or 2-d convolution; its patches meet its output gradients in one batched product."""
    if isinstance(layer, nn.Conv1d):
        given, grad = given.unsqueeze(2), grad.unsqueeze(2)
    pair = (lambda value: (value[0], value[0])) if isinstance(layer, nn.Conv1d) else (lambda value: value)
    kernel, stride, dilation = (
        (1, v[0]) if isinstance(layer, nn.Conv1d) else v for v in (layer.kernel_size, layer.stride, layer.dilation)
    )
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise NotOuter("padding by name or by copies")
    padding = (0, layer.padding[0]) if isinstance(layer, nn.Conv1d) else pair(layer.padding)
    if _grouped(grad, rows):
        shape = (rows * layer.out_channels, layer.in_channels // layer.groups, *kernel)
        given, grad = _rows_as_channels(given, rows), _rows_as_channels(grad, rows)
        product = conv2d_weight(given, shape, grad, stride, padding, dilation, rows * layer.groups)
        return product.reshape(rows, *layer.weight.shape)
    patches = functional.unfold(given, kernel, dilation, padding, stride)
    groups, outputs = layer.groups, layer.out_channels // layer.groups
    patches = patches.view(rows, -1, groups, patches.shape[1] // groups, patches.shape[2])
    grads = grad.reshape(rows, -1, groups, outputs, patches.shape[-1])
    product = torch.einsum("rsgol,rsgil->rgoi", grads, patches)
    return product.reshape(rows, *layer.weight.shape)


def _grouped(output: Tensor, rows: int) -> bool:
    """Whether a grouped convolution is the faster way to the rows of a layer with this output."""
    positions = output[0, 0].numel() * (len(output) // rows)
    return output.device.type == "cpu" and positions >= _POSITIONS


def _rows_as_channels(tensor: Tensor, rows: int) -> Tensor:
    """(rows x samples, channels, ...) as (samples, rows x channels, ...)."""
    return tensor.unflatten(0, (rows, -1)).transpose(0, 1).flatten(1, 2)


class Recorder:
    """Records the calls of the layers that own the named weights; raises where a name has no such layer."""

    def __init__(self, step: nn.Module, names: Sequence[str]) -> None:
        self.calls: list[Call] = []
        self._handles: list[Any] = []
        wanted, owners = set(names), set()
        for path, layer in step.named_modules(remove_duplicate=False):
            name = canonical_name(f"{path}.weight").removeprefix("module.")
            if name in wanted and name not in owners and isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                owners.add(name)
                self._handles.append(layer.register_forward_hook(self._record(name)))
        if owners != wanted or _shared(step, wanted):
            self.__exit__()
            raise NotOuter(f"no linear layer or convolution of its own for {sorted(wanted - owners)}")

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _record(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            self.calls.append(Call(name, layer, args[0], output))
            return output.clone()  # an in-place activation then leaves the recorded output alone

        return hook


def _shared(step: nn.Module, wanted: set[str]) -> bool:
    """Whether a wanted weight is reached by a second name: its gradient would miss that layer's calls."""
    seen: dict[int, int] = {}
    chosen = set()
    for name, parameter in step.named_parameters(remove_duplicate=False):
        seen[id(parameter)] = seen.get(id(parameter), 0) + 1
        if canonical_name(name).removeprefix("module.") in wanted:
            chosen.add(id(parameter))
    return any(seen[key] > 1 for key in chosen)


def check_rows(part: Tensor, origins: Tensor) -> None:
    """Raise ValueError if a row is not finite; `origins` has the index of the batch of each sample in each row."""
    finite = torch.isfinite(part.sum(dim=1))  # much faster than entry by entry
    if not bool(finite.all()):
        first, last = origins[int((~finite).nonzero()[0])].aminmax()
        which = f"batch {int(first)}" if first == last else f"batches {int(first)} to {int(last)}"
        raise ValueError(f"the gradient of calibration {which} is not finite. Check the loss and the data there.")
