"""What a method is given when it is asked for a proposal, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.masks import MaskManager
from lightning_prune.objective import Objective
from lightning_prune.schedules import Position


@dataclass
class Context:
    """The state of a module at the moment a method is asked to prune it.

    Attributes:
        module: the live module; a method reads it and never writes it.
        weights: selected parameters by canonical name, detached, whole (not sharded).
        alive: bool masks in force, of the same names and shapes; pruned weights are False.
        target: sparsity asked of all selected weights, in [0, 1) (or a budget, for methods that take one).
        event: number of proposals committed before this one by this method.
        generator: CPU source of randomness, seeded by (seed, event); the global one is never used.
        make_objective: builds the loss on calibration batches; only methods that need a loss call it.
        example: (args, kwargs) of one forward call, where known.
        show_progress: whether this process draws progress bars.
    """

    module: nn.Module
    weights: Mapping[str, Tensor]
    alive: Mapping[str, Tensor]
    target: float
    event: int
    generator: torch.Generator
    make_objective: Callable[[], Objective]
    example: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    show_progress: bool = False

    @cached_property
    def objective(self) -> Objective:
        """The loss of the module on calibration batches, made at first use."""
        return self.make_objective()


@dataclass
class Proposal:
    """What a method wants committed.

    Attributes:
        masks: bool masks by canonical name, True = kept, each of its weight's shape.
        weights: new values for kept weights by the same names; None leaves the values.
        notes: plain sentences for the receipt.
        certificate: a guarantee in plain JSON values, where the method gives one.
        repairs: what was put right after the commit, for the receipt.
    """

    masks: Mapping[str, Tensor]
    weights: Mapping[str, Tensor] | None = None
    notes: list[str] = field(default_factory=list)
    certificate: dict[str, Any] | None = None
    repairs: list[str] = field(default_factory=list)


def changes(context: Context, proposal: Proposal) -> bool:
    """Whether a proposal moves a weight or removes one more than the masks in force, of any parameter, do."""
    before = {**MaskManager.of(context.module).masks, **context.alive}
    return proposal.weights is not None or any(
        not (torch.equal(mask, before[name]) if name in before else bool(mask.all()))
        for name, mask in proposal.masks.items()
    )


def event_generator(seed: int, event: int) -> torch.Generator:
    """Return a CPU generator for one pruning event: no state to save, equal after every resume."""
    return torch.Generator().manual_seed((seed * 1_000_003 + event) % 2**63)


def describe_event(
    manager: MaskManager, proposal: Proposal, target: float, position: Position, seconds: float
) -> dict[str, Any]:
    """Return a committed proposal in plain values: what was asked, what is in force now."""
    kept, total = manager.counts()
    masks = manager.masks
    return {
        "requested": float(target),
        "sparsity": manager.sparsity(),
        "kept": kept,
        "total": total,
        "step": position.step,
        "epoch": position.epoch,
        "seconds": seconds,
        "emptied": [name for name in proposal.masks if name in masks and not bool(masks[name].any())],
        "notes": list(proposal.notes),
        "certificate": proposal.certificate,
        "repairs": list(proposal.repairs),
    }
