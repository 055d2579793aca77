"""The numbers of a certificate: passes over calibration and hold-out samples before and after units leave."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_prune.batches import batch_length
from lightning_prune.methods._pfp_bounds import bernstein_error, error_of_draws, upper_rate
from lightning_prune.methods._pfp_certificate import GroupCertificate, Measured
from lightning_prune.methods._pfp_kernel import Reader, dropped_mass, error_moments, unit_shares
from lightning_prune.methods._pfp_sampling import Choice
from lightning_prune.methods._pfp_streams import (
    Consumer,
    Gathered,
    Stream,
    evaluating,
    per_sample,
    reduce_over_ranks,
)
from lightning_prune.objective import Objective

__all__ = ["Shares", "answers", "calibrate", "fill_bounds", "fill_holdout", "fill_masses", "measure"]


@dataclass(frozen=True)
class Shares:
    """How shares are taken: see `unit_shares`."""

    mode: str = "abs"
    reduction: str = "max"
    max_elements: int = 2**24

    @property
    def parts(self) -> int:
        """Parts whose shares are taken separately."""
        return 1 if self.mode == "abs" else 2

    def of(self, reader: Reader, inputs: Tensor) -> Tensor:
        """(samples, units)."""
        return unit_shares(reader, inputs, self.mode, self.reduction, self.max_elements)


def calibrate(stream: Stream, batches: Iterable[Any], how: Shares) -> Gathered:
    """Return s_j = max over samples and consumers of g_j(x) by group, and the number of events, batch by batch."""
    found = Gathered()

    def visit(consumer: Consumer, reader: Reader, inputs: Tensor) -> None:
        found.raise_to(consumer.group, how.of(reader, inputs).amax(0))
        outputs = reader.total(inputs[:1]).numel() * len(inputs)
        found.events[consumer.group] = found.events.get(consumer.group, 0) + outputs * how.parts

    stream.show(batches, visit)
    return found.over_ranks()


def fill_masses(
    stream: Stream, batches: Sequence[Any], kept: Mapping[str, Tensor], groups: Mapping[str, GroupCertificate]
) -> None:
    """Write the largest dropped mass on calibration batches."""
    found = Gathered()

    def visit(consumer: Consumer, reader: Reader, inputs: Tensor) -> None:
        if not bool(kept[consumer.group].all()):
            found.raise_to(consumer.group, dropped_mass(reader, inputs, kept[consumer.group]).max())

    stream.show(batches, visit)
    for name, value in found.over_ranks().values.items():
        groups[name].dropped_calibration = float(value)


def fill_bounds(
    stream: Stream,
    batches: Sequence[Any],
    choices: Mapping[str, Choice],
    log_terms: Mapping[str, float],
    groups: Mapping[str, GroupCertificate],
    max_elements: int,
) -> None:
    """Write eps by formula and by exact variance, and the expected error, of groups in which chance decided."""
    drawn = {name: choice for name, choice in choices.items() if choice.drawn}
    largest, sums, counts = Gathered(), defaultdict[str, float](float), defaultdict[str, int](int)

    def visit(consumer: Consumer, reader: Reader, inputs: Tensor) -> None:
        choice = drawn.get(consumer.group)
        if choice is None:
            return
        raw, variance = error_moments(reader, inputs, choice.factors, choice.draws, max_elements)
        rms = variance.sqrt()
        largest.raise_to(consumer.group, torch.stack([raw.max(), rms.max()]))
        sums[consumer.group] += float(rms.sum())
        counts[consumer.group] += rms.numel()

    if drawn:
        stream.show(batches, visit)
    for name, value in largest.over_ranks().values.items():
        choice, group = drawn[name], groups[name]
        group.rms_max, group.rms_mean = float(value[1]), sums[name] / max(1, counts[name])
        group.error_exact = bernstein_error(float(value[0]), choice.bound, log_terms[name])
        if choice.draws is not None:
            total = choice.bound * choice.draws  # of the units that were subject to chance
            group.error = error_of_draws(choice.draws, total, log_terms[name])
            group.error_unseen = error_of_draws(choice.draws, total, log_terms[name], group.margin)


def fill_holdout(
    stream: Stream,
    batches: Sequence[Any],
    how: Shares,
    scores: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    groups: Mapping[str, GroupCertificate],
) -> None:
    """Write dropped mass and violations of g_j <= K s_j on hold-out batches."""
    pending: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    masses: dict[str, list[Tensor]] = defaultdict(list)

    def visit(consumer: Consumer, reader: Reader, inputs: Tensor) -> None:
        shares = how.of(reader, inputs).double().cpu()
        mass = dropped_mass(reader, inputs, kept[consumer.group]).flatten(1).amax(1).double().cpu()
        pending[consumer.group].append((shares, mass))

    def after(batch: Any) -> None:
        samples = batch_length(batch)
        for name, seen in pending.items():
            limit = groups[name].margin * scores[name] * (1 + 1e-6)  # single precision, batch by batch
            over = torch.stack([(per_sample(shares, samples) > limit).any(1) for shares, _ in seen if len(shares)])
            groups[name].violations += int(over.any(0).sum())
            groups[name].holdout += over.shape[1]
            masses[name].append(torch.stack([per_sample(mass[:, None], samples)[:, 0] for _, mass in seen]).amax(0))
        pending.clear()

    stream.show(batches, visit, after)
    for name, group in groups.items():
        group.violations = int(reduce_over_ranks(torch.tensor(group.violations), "SUM"))
        group.holdout = int(reduce_over_ranks(torch.tensor(group.holdout), "SUM"))
        group.violations_upper95 = upper_rate(group.violations, group.holdout)
        if masses[name]:
            every = torch.cat(masses[name])
            group.dropped_holdout = float(every.max())
            group.dropped_holdout_q95 = float(every.sort().values[int(0.95 * (len(every) - 1))])


@dataclass
class Answers:
    """What a module says about batches.

    Attributes:
        loss: mean loss by sample.
        outputs: (samples, ...) of the module's forward; None if it is not called once per batch, or gives no tensor.
        classes: right answers, int (samples,); None where the batch has none.
    """

    loss: float
    outputs: Tensor | None = None
    classes: Tensor | None = None


def answers(objective: Objective, batches: Sequence[Any]) -> Answers | None:
    """Return what the live module says in eval mode; None without batches."""
    if not batches:
        return None
    outputs: list[Any] = []
    classes: list[Any] = []
    loss, samples, seen = 0.0, 0, list[Any]()
    handle = objective.module.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        with evaluating(objective) as step:
            for batch in batches:
                seen.clear()
                size = batch_length(batch)
                loss += float(step(batch)) * size
                samples += size
                outputs.append(_only(seen, size))
                classes.append(_classes(batch, outputs[-1]))
    finally:
        handle.remove()
    return Answers(loss / samples, _joined(outputs), _joined(classes))


def measure(before: Answers | None, after: Answers | None, samples: int) -> Measured:
    """Compare what was said before and after."""
    if before is None or after is None:
        return Measured()
    found = Measured(samples, before.loss, after.loss)
    one, two = before.outputs, after.outputs
    if one is None or two is None or one.shape != two.shape:
        return found
    change, size = (two - one).abs(), float(one.abs().mean())
    if size > 0:
        found.change_mean, found.change_max = float(change.mean()) / size, float(change.max()) / size
    if one.dim() == 2 and one.shape[1] > 1:
        found.agreement = float((one.argmax(1) == two.argmax(1)).double().mean())
        if before.classes is not None:
            right = [float((out.argmax(1) == before.classes).double().mean()) for out in (one, two)]
            found.accuracy_before, found.accuracy_after = right
    return found


def _only(seen: list[Any], size: int) -> Tensor | None:
    """The single output of a batch, if it is one tensor with a row per sample."""
    if len(seen) != 1 or not isinstance(seen[0], Tensor) or seen[0].dim() < 1 or len(seen[0]) != size:
        return None
    return seen[0].detach().double().cpu()


def _classes(batch: Any, output: Tensor | None) -> Tensor | None:
    """The class of every sample, if the batch's second entry looks like one."""
    found = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    if output is None or not isinstance(found, Tensor) or found.is_floating_point() or found.shape != output.shape[:1]:
        return None
    return found.cpu()


def _joined(parts: list[Any]) -> Tensor | None:
    if any(part is None for part in parts) or len({part.shape[1:] for part in parts}) != 1:
        return None
    return torch.cat(parts)
