"""From channel groups to what a group penalty or projection acts on: one GroupPart per optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.channels import Channels
from lightning_prune.context import Context
from lightning_prune.dependency import ChannelGroup
from lightning_prune.methods._prox_groups import Block, GroupTable, Piece
from lightning_prune.methods._prox_parts import GroupPart
from lightning_prune.objective import buffers_of, evaluate
from lightning_prune.targets import named_tensors

Slab = tuple[str, int]

__all__ = ["Layout", "group_parts", "load_zeros", "made_slabs", "not_zero_invariant", "zeros_of"]

_TOLERANCE = 1e-5  # of the loss, where zeroing what makes channels should equal zeroing what reads them
_SHIFTS = (0.3, -0.3, 0.0)  # of running means: a norm without weight shows at 1, an activation unless a ReLU hides it


@dataclass(frozen=True)
class Layout:
    """The groups of a fit.

    Attributes:
        channels: where they come from.
        parts: one per optimizer that trains any.
        left_out: name of a channel group that stays whole -> why.
    """

    channels: Channels
    parts: list[GroupPart]
    left_out: dict[str, str]

    def notes(self, kept: Mapping[str, Tensor]) -> list[str]:
        """Return sentences for the receipt; `kept` are bool masks of the groups that take part."""
        left_out = [f"The channels of {name} stay whole: {reason}." for name, reason in self.left_out.items()]
        return [*self.channels.notes({**self.channels.alive, **kept}), *left_out]


def made_slabs(group: ChannelGroup, channels: Channels) -> list[Slab]:
    """Return the (parameter, dim) that make a group's channels or that these pass through: all but its consumers."""
    return [slab for slab in group.slices if slab not in group.consumers and slab[0] in channels.sizes]


def group_parts(context: Context, optimizers: Sequence[Optimizer]) -> Layout:
    """Return the groups of a module by the optimizer that trains them.

    Args:
        context: the module, its selected weights and its data.
        optimizers: all that update the module.
    Raises:
        ValueError: no channel can be pruned.
        MisconfigurationException: the tensors of one group are in two optimizers.
    """
    channels = Channels.of(context)
    parameters = named_tensors(context.module)
    left_out = not_zero_invariant(context, channels)
    taken: dict[str, int] = {}
    chosen: dict[int, list[ChannelGroup]] = {}
    for group in channels.groups:
        slabs = made_slabs(group, channels)
        owner = _owner(group.name, slabs, parameters, optimizers)
        reason = left_out.get(group.name) or _obstacle(slabs, parameters, owner, taken)
        if reason or owner is None:
            left_out[group.name] = reason or ""
            continue
        taken.update(slabs)
        chosen.setdefault(owner, []).append(group)
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ValueError(f"there is no channel to prune ({reasons}). Prune single weights instead.")
    parts = [_part(optimizers[owner], chosen[owner], channels, parameters) for owner in sorted(chosen)]
    return Layout(channels, parts, left_out)


def not_zero_invariant(context: Context, channels: Channels) -> dict[str, str]:
    """Return the groups whose channels are not zero when all that makes them is, with the reason.

    Their activation has f(0) != 0, or a norm without weight follows: taking the channel away would change the network
    even after it has been driven to zero. Each is tried on one batch.
    """
    try:
        batch = next(iter(context.objective.batches(1)))
    except (ValueError, StopIteration):
        return {}  # traced on an example alone
    shifted = [
        {n: b + shift if n.endswith("running_mean") else b for n, b in buffers_of(context.module).items()}
        for shift in _SHIFTS
    ]
    modes = {module: module.training for module in context.module.modules()}
    with context.objective.open() as step, torch.no_grad():
        parameters = {name: value.detach() for name, value in context.objective.parameters().items()}

        def changes(groups: Sequence[ChannelGroup]) -> bool:
            made = _zeroed(parameters, groups, channels, consumers=False)
            both = _zeroed(made, groups, channels, consumers=True)
            for buffers in shifted:
                one, two = (evaluate(step, values, buffers, batch, check=False) for values in (made, both))
                if bool((one - two).abs() > _TOLERANCE * one.abs().clamp_min(1e-3)):
                    return True
            return False

        try:
            context.module.eval()
            found = [group for group in channels.groups if changes([group])] if changes(channels.groups) else []
        finally:
            for module, training in modes.items():
                module.training = training
    reason = "they are not zero when all that makes them is (an activation with f(0) != 0, or a norm without weight)"
    return {group.name: reason for group in found}


def _zeroed(
    parameters: Mapping[str, Tensor], groups: Sequence[ChannelGroup], channels: Channels, consumers: bool
) -> dict[str, Tensor]:
    """Parameters with every second unit of the groups zeroed in what makes them, or in what reads them."""
    changed = dict(parameters)
    for group in groups:
        slabs = [s for s in group.consumers if s[0] in channels.sizes] if consumers else made_slabs(group, channels)
        for name, dim in slabs:
            at = torch.as_tensor(group.slices[name, dim])[::2].flatten().to(changed[name].device)
            changed[name] = changed[name].index_fill(dim, at, 0.0)
    return changed


def _owner(
    name: str, slabs: Sequence[Slab], parameters: Mapping[str, nn.Parameter], optimizers: Sequence[Optimizer]
) -> int | None:
    """The optimizer that trains a group's tensors; None if none does."""
    held = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in optimizers]
    found = {index: tensor for tensor, _ in slabs for index, ids in enumerate(held) if id(parameters[tensor]) in ids}
    if len(found) > 1:
        one, two = list(found.values())[:2]
        raise MisconfigurationException(
            f"the channels of {name!r} lie in tensors of two optimizers ({one!r}, {two!r}), so that no step moves a whole "
            f"channel. Put them into one optimizer, or leave the group out with exclude=[{one!r}]."
        )
    return next(iter(found), None)


def _obstacle(
    slabs: Sequence[Slab], parameters: Mapping[str, nn.Parameter], owner: int | None, taken: Mapping[str, int]
) -> str | None:
    if owner is None:
        return "no optimizer trains them"
    frozen = [name for name, _ in slabs if not parameters[name].requires_grad]
    if frozen:
        return f"{frozen[0]} is frozen"
    dims: dict[str, int] = {}
    crossed = [name for name, dim in slabs if taken.get(name, dim) != dim or dims.setdefault(name, dim) != dim]
    return f"they cross another group inside {crossed[0]}" if crossed else None


def _part(
    optimizer: Optimizer,
    groups: Sequence[ChannelGroup],
    channels: Channels,
    parameters: Mapping[str, nn.Parameter],
) -> GroupPart:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names: dict[str, int] = {}
    blocks = []
    for group in groups:
        pieces = []
        for name, dim in made_slabs(group, channels):
            if id(parameters[name]) in held:  # the others go with the channel when it is frozen
                positions = torch.as_tensor(group.slices[name, dim])
                pieces.append(Piece(names.setdefault(name, len(names)), dim, positions))
        blocks.append(Block(group.name, len(group), tuple(pieces)))
    part = GroupPart(optimizer, GroupTable(blocks, [parameters[name] for name in names]))
    part.zero = ~part.table.joined(channels.alive)
    return part


def zeros_of(parts: Sequence[GroupPart]) -> dict[str, Tensor]:
    """Return which groups are held at zero, by block, as bool CPU tensors for a checkpoint."""
    return {name: zero.cpu().clone() for part in parts for name, zero in part.table.by_block(part.zero).items()}


def load_zeros(parts: Sequence[GroupPart], zeros: Mapping[str, Tensor]) -> None:
    """Take back what `zeros_of` gave.

    Raises:
        MisconfigurationException: the groups have other names or sizes: the network or its optimizers have changed.
    """
    expected = {block.name: block.units for part in parts for block in part.table.blocks}
    found = {name: len(zero) for name, zero in zeros.items()}
    if expected != found:
        raise MisconfigurationException(
            f"the checkpoint's channel groups {found} are not those of this network {expected}. Resume with the same "
            "network, optimizers, `include` and `exclude`."
        )
    for part in parts:
        part.zero = part.table.joined(zeros)
