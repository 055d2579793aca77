"""What a sparse proximal fit tells its loggers at the end of periods and epochs: zeros by block, and f + penalty."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_prune.methods._prox_parts import GroupPart
from lightning_prune.objective import Objective, buffers_of, evaluate

__all__ = ["Zeros", "group_zeros", "mean_loss", "support"]

Zeros = dict[str, tuple[int, int]]  # name of a block or tensor -> (zeros, all) of its groups or entries


def group_zeros(parts: Sequence[GroupPart]) -> Zeros:
    """Return how many groups of every block are exactly zero, in all their entries; one read from the device."""
    found = {name: zero for part in parts for name, zero in part.table.by_block(~part.nonzero()).items()}
    counts = torch.stack([zero.sum().cpu() for zero in found.values()]).tolist()
    return {name: (count, len(zero)) for (name, zero), count in zip(found.items(), counts, strict=True)}


def support(zeros: Zeros, unit: str, before: int) -> dict[str, float]:
    """Return the numbers to log: sparsity of groups (or weights), zeros in all, new ones, and those of every block.

    Args:
        zeros: (zeros, all) by name.
        unit: "group" or "weight".
        before: zeros when this was last said, >= 0.
    """
    count, total = sum(zero for zero, _ in zeros.values()), sum(size for _, size in zeros.values())
    values = {f"prune/{unit}_sparsity": count / total, "prune/zeros": count, "prune/new_zeros": count - before}
    values.update({f"prune/zeros/{name}": zero for name, (zero, _) in zeros.items()})
    return {name: float(value) for name, value in values.items()}


def mean_loss(objective: Objective, count: int) -> float:
    """Return the mean loss over at most `count` calibration batches and all ranks, in eval mode, without gradients.

    Args:
        objective: the module's loss; the module and its random states are as before afterwards.
        count: >= 1.
    Raises:
        ValueError: there is no batch.
    """
    module = objective.module
    with objective.open() as step, torch.no_grad():
        module.eval()  # the sandbox puts every flag back
        parameters = {name: value.detach() for name, value in objective.parameters().items()}
        losses = [
            evaluate(step, parameters, buffers_of(module), batch, index, check=False).float()
            for index, batch in enumerate(objective.batches(count))
        ]
        if not losses:
            raise ValueError("there is no calibration batch. Give a dataloader with at least one batch.")
        return float(objective.reduce(torch.stack(losses).mean()))
