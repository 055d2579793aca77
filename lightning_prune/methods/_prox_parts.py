"""Part: the tensors under a penalty that one optimizer updates, and how far its steps go in each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.methods._prox_groups import GroupTable
from lightning_prune.methods._prox_scale import has_metric, metric_of, momentum_gain

WARM = 1_000_000  # steps taken by a momentum buffer that was there before us

__all__ = ["GroupPart", "Part", "tensor_parts"]


class Part:
    """Tensors that one optimizer updates.

    Args:
        optimizer: any; a penalty needs one that `check_steps` accepts.
        tensors: some of its parameters.
        names: theirs, for the log.
    Attributes:
        previous: copies of the tensors as they were before the current step, where something needs them.
        steps: steps taken, for the warm-up of momentum.
    """

    def __init__(self, optimizer: Optimizer, tensors: Sequence[Tensor], names: Sequence[str] = ()) -> None:
        self.optimizer, self.tensors, self.names = optimizer, list(tensors), list(names)
        place = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self.group_of = [place[id(tensor)] for tensor in self.tensors]
        self.previous: list[Tensor] = []
        self.steps = WARM if any("momentum_buffer" in state for state in optimizer.state.values()) else 0

    @torch.no_grad()
    def remember(self) -> None:
        """Copy the tensors into `previous`."""
        if not self.previous:
            self.previous = [torch.empty_like(tensor) for tensor in self.tensors]
        torch._foreach_copy_(self.previous, [tensor.detach() for tensor in self.tensors])

    def moved(self) -> tuple[bool, ...]:
        """Whether each tensor had a gradient, and a learning rate above 0, in this step."""
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        return tuple(t.grad is not None and rates[at] > 0.0 for t, at in zip(self.tensors, self.group_of, strict=True))

    def rate(self, index: int) -> float:
        """Return the learning rate a of tensor `index`."""
        return float(self._group(index)["lr"])

    def lengths(self) -> list[float]:
        """Return a * kappa of each tensor for the step just taken."""
        gains = [float(group["lr"]) * momentum_gain(group, max(1, self.steps)) for group in self.optimizer.param_groups]
        return [gains[index] for index in self.group_of]

    def metric(self, indices: Sequence[int]) -> list[Tensor] | None:
        """Return D of the tensors at `indices`, which have moved; None for SGD, whose metric is 1."""
        if not has_metric(self.optimizer):
            return None
        found: dict[int, Tensor] = {}
        for place, group in enumerate(self.optimizer.param_groups):
            ours = [index for index in indices if self.group_of[index] == place]
            if ours:
                metrics = metric_of(self.optimizer, group, [self.tensors[index] for index in ours])
                found.update(zip(ours, metrics, strict=True))
        return [found[index] for index in indices]

    def stepped(self) -> list[int]:
        """Return the indices of tensors whose metric is known: all of SGD's, others once they have moved."""
        if not has_metric(self.optimizer):
            return list(range(len(self.tensors)))
        return [index for index, tensor in enumerate(self.tensors) if self.optimizer.state.get(tensor)]

    def _group(self, index: int) -> dict[str, Any]:
        return self.optimizer.param_groups[self.group_of[index]]


class GroupPart(Part):
    """Groups whose tensors one optimizer updates.

    Attributes:
        table: the groups.
        zero: bool of shape (G,): groups that are held at zero.
        weight: factor of each group's penalty, of shape (G,).
        keep: groups that each block keeps whatever the penalty, int64 of shape (blocks,); None: none.
    """

    keep: Tensor | None = None

    def __init__(self, optimizer: Optimizer, table: GroupTable) -> None:
        super().__init__(optimizer, table.tensors)
        self.table = table
        self.zero = torch.zeros(table.count, dtype=torch.bool, device=table.device)
        self.weight = torch.ones(table.count, dtype=table.dtype, device=table.device)
        self._active: tuple[tuple[bool, ...], Tensor | None] | None = None

    def active(self) -> Tensor | None:
        """Return which groups have moved with all their tensors, bool of shape (G,); None: every one."""
        moved = self.moved()
        if self._active is None or self._active[0] != moved:
            still = [index for index, flag in enumerate(moved) if not flag]
            self._active = (moved, ~self.table.has_tensor[still].any(dim=0) if still else None)
        return self._active[1]

    def gradients(self) -> list[Tensor]:
        """Return the gradients, zeros where a tensor has none."""
        return [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in self.tensors]

    def norms(self) -> Tensor:
        """Return ||x_g|| of every group, of shape (G,)."""
        weights = [tensor.detach() for tensor in self.tensors]
        return self.table.dot(weights, weights).sqrt()

    def nonzero(self) -> Tensor:
        """Return which groups hold an entry that is not exactly zero: bool of shape (G,); squares would underflow."""
        return self.table.sums([(tensor.detach() != 0).to(self.table.dtype) for tensor in self.tensors]) > 0


def tensor_parts(tensors: Mapping[str, Tensor], optimizers: Sequence[Optimizer]) -> list[Part]:
    """Return the named tensors by the optimizer that updates them; those of none are left alone.

    Raises:
        ValueError: no optimizer updates any of them.
    """
    parts = []
    for optimizer in optimizers:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        ours = {name: tensor for name, tensor in tensors.items() if id(tensor) in held}
        if ours:
            parts.append(Part(optimizer, list(ours.values()), list(ours)))
    if not parts:
        raise ValueError(f"no optimizer updates any of {', '.join(list(tensors)[:5])}. Train them, or choose others.")
    return parts
