"""Channels as what a method keeps or removes: the groups of a module that may be pruned, their costs and their masks.

A structured method ranks units (channels, heads, hidden units) by group; everything else it needs is here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.context import Context
from lightning_prune.cost import CostModel, Kind, units_within_budget
from lightning_prune.dependency import ChannelGroup, ChannelGroups, channel_groups
from lightning_prune.objective import buffers_of, evaluate
from lightning_prune.selection import check_scores
from lightning_prune.shrink import removable_units
from lightning_prune.targets import canonical_name, named_tensors

__all__ = ["Channels", "forward_arguments", "shares", "trace_channels"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_SHOWN = 5
_CALL_IT = " Let it call `module(...)`, or prune single weights."


class Channels:
    """The channel groups of a module that take part in pruning.

    A group takes part if all weights it runs through are selected; the others stay whole.

    Args:
        module: the live module; what is masked already counts as removed.
        all_groups: its channel groups.
        selected: bool masks in force, by canonical name, of the weights that may be pruned.
    Attributes:
        module, all_groups, selected: what was given.
        groups: those that take part.
        alive: bool masks by group name, each of shape (units,) on the CPU: units that are not gone yet.
        sizes: shape of every parameter by name.
    Raises:
        ValueError: no group takes part.
    """

    def __init__(self, module: nn.Module, all_groups: ChannelGroups, selected: Mapping[str, Tensor]) -> None:
        self.module, self.all_groups, self.selected = module, all_groups, selected
        self.sizes = {canonical_name(name): shape for name, shape in all_groups.analysis.sizes.items()}
        self.groups = [group for group in map(_canonical, all_groups) if not self._outsiders(group)]
        if not self.groups:
            raise ValueError(f"there is no channel to prune: {self._why_none()}. Prune single weights instead.")
        living = removable_units(module, all_groups)
        self.alive = {group.name: living[group.name] for group in self.groups}

    @classmethod
    def of(cls, context: Context) -> Channels:
        """Trace the module of a pruning event.

        Raises:
            ValueError: it cannot be traced, or no group takes part.
        """
        return cls(context.module, trace_channels(context), context.alive)

    @cached_property
    def costs(self) -> CostModel:
        """Costs of the module as functions of how many units of each group are kept."""
        return CostModel(self.all_groups)

    def masks(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return masks of all parameters the units run through, and of all selected weights.

        Args:
            kept: bool by group name, True = kept, each of shape (units,); groups left out stay whole.
        Returns:
            bool masks by parameter name, of the parameters' shapes, on the selected weights' device.
        """
        masks = {name: mask.clone() for name, mask in self.selected.items()}
        device = next(iter(masks.values())).device
        for group in self.groups:
            if group.name not in kept:
                continue
            gone = (~kept[group.name]).nonzero().flatten().cpu()
            for (name, dim), positions in group.slices.items():
                if name in self.sizes and len(gone):
                    mask = masks.setdefault(name, torch.ones(self.sizes[name], dtype=torch.bool, device=device))
                    mask.index_fill_(dim, torch.as_tensor(positions)[gone].flatten().to(device), False)
        return masks

    def within(
        self, scores: Mapping[str, Tensor], budget: float, kind: Kind = "flops", min_keep: int = 1, round_to: int = 1
    ) -> dict[str, Tensor]:
        """Remove the units of lowest score until a cost is within its budget; units gone before count as gone.

        Args:
            scores: finite scores by group name, each of shape (units,); higher is kept longer.
            budget: fraction of the dense cost that may remain, in (0, 1].
            kind: "params", "flops", "volume" or "channels".
            min_keep: units every group keeps at least, >= 1.
            round_to: round kept channels down to a multiple of this, >= 1.
        Returns:
            bool masks by group name, True = kept, each of shape (units,) on the CPU.
        Raises:
            ValueError: see `units_within_budget`.
        """
        check_scores(scores)
        lowest = min(float(score.min()) for score in scores.values()) - 1.0
        ranked = {
            name: score.detach().double().cpu().masked_fill(~self.alive[name], lowest) for name, score in scores.items()
        }
        kept = units_within_budget(ranked, self.costs, budget, kind, min_keep, round_to)
        return {name: mask & self.alive[name] for name, mask in kept.items()}

    def unit_norms(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Score every unit by the L2 norm of its slab in each parameter it runs through, averaged over these.

        Args:
            weights: parameters by canonical name; None: those of the module.
        Returns:
            float64 scores >= 0 by group name, each of shape (units,) on the CPU.
        """
        weights = named_tensors(self.module) if weights is None else weights
        return {group.name: self._norms(group, weights) for group in self.groups}

    def counts(self, kept: Mapping[str, Tensor]) -> dict[str, int]:
        """Return the number of kept units by group name, for `costs`."""
        return {name: int(mask.sum()) for name, mask in kept.items()}

    def notes(self, kept: Mapping[str, Tensor]) -> list[str]:
        """Return sentences for the receipt: channels kept, what is left once the others are cut out, what stays whole."""
        counts = self.counts(kept)
        total = sum(len(group) for group in self.groups)
        notes = [
            f"{sum(counts.values())} of {total} channels are kept. With the others cut out, {self.costs.params(counts):,} "
            f"of {self.costs.params():,} parameters and "
            f"{self.costs.flops(counts) / max(1, self.costs.flops()):.4f} of the FLOPs are left."
        ]
        whole = self._whole()
        if whole:
            more = f" and {len(whole) - _SHOWN} more" if len(whole) > _SHOWN else ""
            notes.append(f"The outputs of {', '.join(whole[:_SHOWN])}{more} stay whole.")
        return notes

    def _norms(self, group: ChannelGroup, weights: Mapping[str, Tensor]) -> Tensor:
        slabs = [(slab, at) for slab, at in group.slices.items() if slab[0] in self.sizes]
        total = torch.zeros(len(group), dtype=torch.float64)
        for (name, dim), positions in slabs:
            square = weights[name].detach().double().square().movedim(dim, 0)
            total += square.reshape(len(square), -1).sum(1).cpu()[torch.as_tensor(positions)].sum(1).sqrt()
        return total / len(slabs)

    def _outsiders(self, group: ChannelGroup) -> list[str]:
        """Weights of a group that may not be pruned."""
        return [name for name in group.parameters() if len(self.sizes.get(name, ())) > 1 and name not in self.selected]

    def _whole(self) -> list[str]:
        """Selected weights that lose no output channel."""
        made = {name for group in self.groups for name, dim in group.slices if (name, dim) not in group.consumers}
        return [name for name in self.selected if name not in made]

    def _why_none(self) -> str:
        outsiders = [name for group in self.all_groups for name in self._outsiders(_canonical(group))]
        if outsiders:
            return f"every group of channels runs through weights that are not selected, such as {outsiders[0]!r}"
        frozen = self.all_groups.report.frozen
        reasons = [f"{name!r}: {frozen.get((name, 0), 'its channels are in no group')}" for name in self.selected]
        return "; ".join(reasons[:_SHOWN])


def _canonical(group: ChannelGroup) -> ChannelGroup:
    """Return the group under names without the parts that `torch.compile` inserts, as masks have them."""
    return replace(
        group,
        slices={(canonical_name(name), dim): at for (name, dim), at in group.slices.items()},
        consumers=frozenset((canonical_name(name), dim) for name, dim in group.consumers),
        producers=frozenset((canonical_name(name), dim) for name, dim in group.producers),
    )


def shares(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return every unit's rank in its own group as a share of it: a budget then takes the same part of every group.

    Args:
        scores: by group name, each of shape (units,); ties by lower index.
    Returns:
        float64 scores in (0, 1] under the same names, of the same shapes.
    """
    ranked = {}
    for name, score in scores.items():
        rank = torch.empty(len(score), dtype=torch.float64)
        rank[torch.sort(score.detach().cpu(), stable=True).indices] = torch.arange(1, len(score) + 1).double()
        ranked[name] = rank / len(score)
    return ranked


def trace_channels(context: Context) -> ChannelGroups:
    """Return the channel groups of a pruning event's module, traced as its loss or its example runs it.

    A LightningModule is traced on a calibration batch by its own steps, with a `loss_fn` as that calls forward; a module
    without data on the example of one forward call.

    Raises:
        ValueError: the module cannot be traced, or there is neither data nor an example.
    """
    try:
        objective = context.objective
        batches: Sequence[Any] = list(objective.batches(1))
    except ValueError:  # no data or no loss: the example will do
        if context.example is None:
            raise
        objective, batches = None, ()
    if objective is not None and batches and objective.loss_fn is None:
        return channel_groups(context.module, batches[0])
    args, kwargs = forward_arguments(context, _CALL_IT) if batches else _example(context)
    return channel_groups(context.module, args, kwargs)


def _example(context: Context) -> Arguments:
    if context.example is None:
        raise ValueError("there is no calibration batch. Give a dataloader with at least one batch.")
    return context.example


def forward_arguments(context: Context, advice: str = "") -> Arguments:
    """Return what the module's forward is given when its loss is computed on the first calibration batch.

    Args:
        context: the module and its loss.
        advice: what to do where the loss does not call forward, a sentence.
    Raises:
        ValueError: there is no batch, or the loss does not call forward.
    """
    seen: list[Arguments] = []
    batch = next(iter(context.objective.batches(1)), None)
    if batch is None:
        raise ValueError("there is no calibration batch. Give a dataloader with at least one batch.")
    handle = context.module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True, prepend=True
    )
    try:
        with context.objective.open() as step, torch.no_grad():
            evaluate(step, context.objective.parameters(), buffers_of(context.module), batch)
    finally:
        handle.remove()
    if not seen:
        raise ValueError("the input cannot be seen: the loss does not call the module's forward." + advice)
    return seen[0]
