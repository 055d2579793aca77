"""The soft phase on a live module: gates are put on it, looked at after every stage, and taken off again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune._dependency.calls import copy_of
from lightning_prune.batch_norm import Statistics, keep_function, statistics_of
from lightning_prune.channels import Channels
from lightning_prune.context import Context, Proposal
from lightning_prune.masks import MaskManager, check_finite
from lightning_prune.methods._chipnet_hooks import GatedReads, find_places, misread
from lightning_prune.methods._chipnet_layout import (
    Layout,
    build_layout,
    floor_within,
    smallest_share,
    unreachable,
)
from lightning_prune.methods._chipnet_stages import StageProbe, certificate_of, scaled_weights
from lightning_prune.methods._chipnet_training import GateTraining, Plan, initial_psi
from lightning_prune.structured import refit_proposal
from lightning_prune.targets import named_tensors


@dataclass
class SoftPhase:
    """Gates on a module.

    Attributes:
        channels: the channel groups.
        gates: their training.
        probe: compares soft and hard gates.
        notes: sentences for the receipt.
    """

    channels: Channels
    gates: GateTraining
    probe: StageProbe
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return what the gates look like now, soft and hard."""
        return {**self.gates.describe(), **self.probe.losses(self.gates)}

    def proposal(self, context: Context, records: list[dict[str, Any]], refit: bool) -> Proposal:
        """Return the masks of the gates that do not fit into the budget, and the weights with the others folded in.

        Args:
            context: the pruning event.
            records: what was kept of the stages.
            refit: whether the layers that read removed channels are refit to the network with its soft gates.
        """
        module, hard = context.module, self.gates.hard()
        kept = self.gates.layout.kept(hard)
        masks = self.channels.masks(kept)
        parameters = named_tensors(module)
        self._mask_slots(masks, hard, parameters)
        weights = None
        if self.gates.plan.fold:
            weights = scaled_weights(self.gates, parameters)
            for name, weight in weights.items():
                masks.setdefault(name, torch.ones(weight.shape, dtype=torch.bool, device=weight.device))
        notes = [*self.channels.notes(kept), *self.notes]
        proposal = Proposal(masks, weights, notes, certificate_of(self.gates, hard, records))
        # a network that went through the straight-through tail has learned without the removed channels
        tail = self.gates.plan.hard_from < self.gates.plan.soft_steps
        return self._refit(context, proposal) if refit and not tail else proposal

    def _refit(self, context: Context, proposal: Proposal) -> Proposal:
        """Refit what reads removed channels to the outputs of the soft network; both have their gates in the weights."""
        reads = self.gates.reads
        try:
            reads.set(torch.ones_like(self.gates.psi))
            teacher = copy_of(context.module)
            tensors = named_tensors(teacher)
            with torch.no_grad():
                for name, value in scaled_weights(self.gates, tensors).items():
                    tensors[name].copy_(value)
            return refit_proposal(context, proposal, teacher=teacher)
        finally:
            self.gates.refresh()

    def close(self, module: nn.Module) -> Tensor:
        """Take the gates off a module whose weights have taken them over; averaged copies take them over too.

        Returns:
            psi as it ended, of shape (gates,), on the CPU.
        """
        self.gates.reads.remove()
        if self.gates.plan.fold:
            for shadow in MaskManager.of(module).shadows():
                tensors = named_tensors(shadow)
                with torch.no_grad():
                    for name, value in scaled_weights(self.gates, tensors).items():
                        tensors[name].copy_(value)
        return self.gates.psi.detach().cpu().clone()

    def _mask_slots(self, masks: dict[str, Tensor], hard: Tensor, parameters: Mapping[str, Tensor]) -> None:
        """Mask what single gates scale, also where other gates keep the unit."""
        device = next(iter(masks.values())).device
        stays = torch.cat([hard, hard.new_ones(1)])
        for slot in self.gates.layout.slots:
            gone = (~stays[slot.gates]).nonzero().flatten()
            if len(gone):
                whole = torch.ones(parameters[slot.name].shape, dtype=torch.bool, device=device)
                masks.setdefault(slot.name, whole).index_fill_(slot.dim, gone.to(device), False)


def open_gates(
    context: Context,
    plan: Plan,
    coupling: str,
    stage_batches: int,
    frozen: bool,
    settle: int,
    step: int,
    saved: Any,
) -> SoftPhase:
    """Put gates on the module of a pruning event; nothing has changed if this fails.

    Args:
        context: the module, its loss and its masks.
        plan: what the gates are trained for.
        coupling: see `build_layout`.
        stage_batches: see `StageProbe`.
        frozen: whether BatchNorm statistics are frozen.
        settle: batches on which they are measured before that, under the gates' first values; 0: not at all.
        step: optimizer steps of the soft phase already done.
        saved: `GateTraining.state` of a checkpoint; None: new gates.
    Returns:
        The open soft phase.
    Raises:
        ValueError: there is nothing to gate, the budget cannot be reached, weights are not finite, or the checkpoint
            belongs to another model.
    """
    module = context.module
    for name, weight in context.weights.items():
        check_finite(name, weight)
    channels = Channels.of(context)
    layout, called, notes = _readable_layout(channels, coupling)
    floor = floor_within(layout, plan.budget, plan.kind) if plan.min_keep is None else plan.min_keep
    if plan.budget < smallest_share(layout, plan.kind, floor) - 1e-12:
        raise ValueError(unreachable(layout, plan.budget, plan.kind, floor))
    plan = replace(plan, min_keep=floor)
    parameters = named_tensors(module)
    ranks = {slot.name: parameters[slot.name].dim() for slot in layout.slots}
    device = parameters[layout.slots[0].name].device
    reads = GatedReads(layout.slots, ranks, device)
    gates = GateTraining(layout, reads, plan, initial_psi(layout.size, context.generator).to(device))
    if saved is not None:
        gates.load(saved)
    gates.go_to(step)
    phase = SoftPhase(channels, gates, StageProbe.of(context, stage_batches), notes)
    reads.install(find_places(module, layout.slots, called)[0])
    try:
        if frozen and settle and saved is None:
            context.objective.refit_batch_norm(settle)
    except Exception:
        reads.remove()
        raise
    if frozen:
        reads.freeze_norms(module)
    return phase


def _readable_layout(channels: Channels, coupling: str) -> tuple[Layout, set[str], list[str]]:
    """The layout without groups whose weights are read past the hooks, the modules that are called, and what to say."""
    module, calls = channels.module, channels.all_groups.analysis.calls
    layout = build_layout(channels, coupling)
    called, wrong = misread(module, layout.slots, layout.size, calls)
    if not wrong:
        return layout, called, []
    out = [group.name for group in channels.groups if {name for name, _ in group.slices} & set(wrong)]
    layout = build_layout(channels, coupling, out)
    reason = "their weights are read outside of the modules that hold them"
    if not layout.size:
        raise ValueError(f"there is no channel to gate in {', '.join(out[:5])}: {reason}. Use Magnitude(budget=...).")
    return layout, called, [f"{', '.join(out)} have no gates and stay whole: {reason}."]


def keep_functions(module: nn.Module, old: Statistics) -> None:
    """Let a module and its averaged copies compute with its new BatchNorm statistics what they did under their own.

    Args:
        module: its statistics are new.
        old: those it had.
    """
    new = statistics_of(module)
    keep_function(module, old, new)
    for shadow in MaskManager.of(module).shadows():
        keep_function(shadow, statistics_of(shadow), new)
