"""Calibration as a stream: forward hooks on the layers that read the units, one batch at a time, nothing kept of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.batches import batch_length, slice_batch
from lightning_prune.channels import Channels
from lightning_prune.dependency import ChannelGroup
from lightning_prune.methods._pfp_bounds import calibration_samples
from lightning_prune.methods._pfp_kernel import Reader
from lightning_prune.objective import Objective
from lightning_prune.targets import canonical_name

MOST_SAMPLES = 512  # of a calibration whose size follows from delta

Visit = Callable[["Consumer", Reader, Tensor], None]


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer that reads the units of a group.

    Attributes:
        group: name of the group.
        layer: the live layer.
        name: its qualified name.
        units: int (units, positions per unit), positions along its inputs.
    """

    group: str
    layer: nn.Module
    name: str
    units: Tensor


def consumers_of(channels: Channels) -> tuple[list[Consumer], dict[str, str]]:
    """Return the layers that read the groups' units, and why the other groups cannot be measured.

    Returns:
        Consumers of the groups all of whose readers are linear layers or plain convolutions; group name -> reason.
    """
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, child in channels.module.named_modules():
        for leaf, parameter in child._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((canonical_name(path), child, leaf))
    tensors = {canonical_name(name): parameter for name, parameter in channels.module.named_parameters()}
    found: list[Consumer] = []
    refused: dict[str, str] = {}
    for group in channels.groups:
        own: list[Consumer] = []
        for name, dim in sorted(group.consumers):
            holders = owners.get(id(tensors.get(name)), [])
            reason = _why_not(name, dim, holders)
            if reason:
                refused[group.name] = reason
            else:
                own.append(_consumer(group, (name, dim), *holders[0][:2]))
        if group.name not in refused:
            found += own
    return found, refused


def _why_not(name: str, dim: int, holders: list[tuple[str, nn.Module, str]]) -> str:
    """Why a reader cannot be measured; empty if it can."""
    if len(holders) != 1:
        return f"{name!r} is shared by {len(holders)} layers"
    _, layer, leaf = holders[0]
    plain = isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and layer.groups == 1
    if leaf != "weight" or dim != 1 or not (plain or isinstance(layer, nn.Linear)):
        return f"{name!r} reads it other than as inputs of a linear layer or a convolution of one group"
    return ""


def _consumer(group: ChannelGroup, slab: tuple[str, int], path: str, layer: nn.Module) -> Consumer:
    return Consumer(group.name, layer, path, torch.as_tensor(group.slices[slab], dtype=torch.int64))


@dataclass
class Stream:
    """Runs batches through the module in eval mode and shows every consumer's input.

    Attributes:
        objective: the module and how it is run.
        consumers: which layers are watched.
        max_patches: random output positions per sample; None for all.
        seed: of the choice of positions; the same pass sees the same ones.
    """

    objective: Objective
    consumers: list[Consumer]
    max_patches: int | None = None
    seed: int = 0

    def show(self, batches: Iterable[Any], visit: Visit, after: Callable[[Any], None] = lambda batch: None) -> None:
        """Call `visit(consumer, reader, inputs)` for every call of every consumer, `after(batch)` after every batch."""
        generator = torch.Generator().manual_seed(self.seed)

        def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = args[0] if args else kwargs["input"]
            for consumer in by_layer[layer]:
                reader, rows = Reader.of(layer, consumer.units, consumer.name).events(inputs)
                if self.max_patches is not None:
                    reader, rows = reader.sampled(rows, self.max_patches, generator)
                visit(consumer, reader, rows)

        by_layer: dict[nn.Module, list[Consumer]] = {}
        for consumer in self.consumers:
            by_layer.setdefault(consumer.layer, []).append(consumer)
        with ExitStack() as stack:
            for layer in by_layer:
                handle = layer.register_forward_pre_hook(look, with_kwargs=True)
                stack.callback(handle.remove)
            step = stack.enter_context(evaluating(self.objective))
            for batch in batches:
                step(batch)
                after(batch)

    def shapes(self, batch: Any) -> dict[Consumer, int]:
        """Return the outputs (channels x positions) per sample of every consumer that a batch reaches."""
        some = slice_batch(batch, 0, 2)
        found: dict[Consumer, int] = {}

        def note(consumer: Consumer, reader: Reader, inputs: Tensor) -> None:
            size = reader.total(inputs[:1]).numel() * len(inputs) // min(2, batch_length(batch))
            found[consumer] = found.get(consumer, 0) + size

        self.show([some], note)
        return found


@contextmanager
def evaluating(objective: Objective) -> Iterator[Callable[[Any], Any]]:
    """Yield a function that runs the module on a batch in eval mode, without gradients or autocast, and returns the loss."""
    with objective.open() as wrapped, torch.no_grad():
        wrapped.eval()
        device = next((p.device for p in objective.module.parameters()), torch.device("cpu"))
        with torch.autocast(device.type, enabled=False):
            yield lambda batch: wrapped(batch, 0)


@dataclass
class Samples:
    """Calibration and hold-out samples, disjoint.

    Attributes:
        calibration: batches, `size` samples in all.
        holdout: batches that come after them; perhaps none.
        size: calibration samples.
        promised: samples after which margin * s_j bounds unseen samples, by the paper's assumption.
        used: (first, last + 1) places of the batches that gave the hold-out.
    """

    calibration: list[Any]
    holdout: list[Any]
    size: int
    promised: int
    used: tuple[int, int] = (0, 0)

    @property
    def held(self) -> int:
        """Hold-out samples."""
        return sum(map(batch_length, self.holdout))


def read_samples(stream: Stream, size: int | None, holdout: int, delta: float) -> tuple[Samples, dict[Consumer, int]]:
    """Read calibration samples, then hold-out samples from the batches after them.

    Args:
        stream: what is watched.
        size: calibration samples; None: as many as delta promises, at most `MOST_SAMPLES`.
        holdout: hold-out samples wanted; fewer if the data ends.
        delta: probability of failure, in (0, 1).
    Returns:
        The samples, and the outputs per sample of every consumer that is reached.
    Raises:
        ValueError: there is no batch, or there are too few calibration samples.
    """
    batches = iter(stream.objective.batches(None))
    first = next(batches, None)
    if first is None:
        raise ValueError("there is no calibration batch. Give a dataloader with at least one batch.")
    shapes = stream.shapes(first)
    promised = calibration_samples(max(shapes.values(), default=1), sum(shapes.values()) or 1, delta)
    wanted = min(promised, MOST_SAMPLES) if size is None else size
    place, taken = 0, [first]
    while sum(map(batch_length, taken)) < wanted:
        batch = next(batches, None)
        if batch is None:
            break
        taken.append(batch)
        place += 1
    found = sum(map(batch_length, taken))
    if found < wanted:
        why = f"`delta`={delta} promises something from" if size is None else "`n_calib` asks for"
        raise ValueError(
            f"there are too few calibration samples: {why} {wanted}, the dataloader has {found}. Give more data, or set "
            f"`n_calib`={found}; the certificate then says what is not promised."
        )
    calibration = _cut(taken, wanted)
    start = place + 1
    kept: list[Any] = []
    while sum(map(batch_length, kept)) < holdout and (batch := next(batches, None)) is not None:
        kept.append(batch)
    return Samples(calibration, _cut(kept, holdout), wanted, promised, (start, start + len(kept))), shapes


def _cut(batches: list[Any], samples: int) -> list[Any]:
    """The batches without what is beyond so many samples."""
    found: list[Any] = []
    for batch in batches:
        left = samples - sum(map(batch_length, found))
        if left > 0:
            found.append(batch if batch_length(batch) <= left else slice_batch(batch, 0, left))
    return found


def leave_out(objective: Objective, places: tuple[int, int]) -> None:
    """Make the objective read no hold-out batch any more, so that a repair cannot learn from what judges it."""
    whole = objective.batches

    def batches(count: int | None) -> Iterator[Any]:
        given = 0
        for place, batch in enumerate(whole(None)):
            if count is not None and given >= count:
                return
            if not places[0] <= place < places[1]:
                given += 1
                yield batch

    objective.batches = batches


@dataclass
class Gathered:
    """Per-group results of a pass.

    Attributes:
        values: largest value seen by group.
        events: (sample, output, position, part) events by group.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)

    def raise_to(self, group: str, value: Tensor) -> None:
        """Keep the larger one of what is held and `value`, entry by entry."""
        value = value.detach().double().cpu()
        self.values[group] = torch.maximum(self.values[group], value) if group in self.values else value

    def over_ranks(self) -> Gathered:
        """Return the largest values and the sums of events over all ranks."""
        return Gathered(
            {name: reduce_over_ranks(value, "MAX") for name, value in self.values.items()},
            {name: int(reduce_over_ranks(torch.tensor(count), "SUM")) for name, count in self.events.items()},
        )


def reduce_over_ranks(value: Tensor, operation: str) -> Tensor:
    """Return the sum or maximum of a tensor over all ranks; on one process the tensor itself."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return value
    device = torch.device("cuda") if distributed.get_backend() == "nccl" else torch.device("cpu")
    moved = value.to(device, copy=True)
    distributed.all_reduce(moved, getattr(distributed.ReduceOp, operation))
    return moved.to(value.device)


def per_sample(values: Tensor, samples: int) -> Tensor:
    """Return the largest value of every sample where rows are samples times something (frames, windows).

    Args:
        values: (rows, ...).
        samples: samples in the batch.
    Returns:
        (samples, ...); the largest of all for every sample if rows cannot be told apart.
    """
    if len(values) % samples:
        return values.amax(0, keepdim=True).expand(samples, *values.shape[1:])
    return values.unflatten(0, (samples, -1)).amax(1)


def scaled_weights(
    consumers: Iterable[Consumer], scales: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the weights that read reweighed units, each unit's slab times its gamma.

    Args:
        consumers: who reads.
        scales: gamma by group name, each of shape (units,).
        weights: by parameter name, of the parameters' shapes.
    Returns:
        new values by parameter name, of the same shapes and dtypes, only where something changes.
    """
    changed: dict[str, Tensor] = {}
    for consumer in consumers:
        gamma = scales.get(consumer.group)
        if gamma is None or bool((gamma == 1).all() | ((gamma == 0) | (gamma == 1)).all()):
            continue
        name = f"{consumer.name}.weight" if consumer.name else "weight"
        weight = changed.get(name, weights[name]).detach()
        factors = torch.ones(weight.shape[1], dtype=torch.float64)
        factors[consumer.units] = torch.where(gamma > 0, gamma, 1.0)[:, None]
        shape = (1, -1, *(1 for _ in weight.shape[2:]))
        changed[name] = (weight.double() * factors.view(shape).to(weight.device)).to(weight.dtype)
    return changed
