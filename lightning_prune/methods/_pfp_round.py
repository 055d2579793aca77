"""One pruning event of PFP: what it reads, what it watches, and what can be said before the commit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_prune.channels import Channels
from lightning_prune.context import Context
from lightning_prune.methods._pfp_bounds import log_events
from lightning_prune.methods._pfp_budgets import Allocation, Demand
from lightning_prune.methods._pfp_certificate import Certificate, GroupCertificate
from lightning_prune.methods._pfp_evidence import Answers, Shares, answers, fill_bounds, fill_holdout, fill_masses
from lightning_prune.methods._pfp_sampling import Choice
from lightning_prune.methods._pfp_streams import Consumer, Gathered, Samples, Stream, consumers_of, read_samples

if TYPE_CHECKING:
    from lightning_prune.methods.pfp import ProvableFilterPruning


@dataclass
class Round:
    """What one event reads and watches.

    Attributes:
        stream: the module and the layers that read the groups' units.
        samples: calibration and hold-out samples.
        shares: how shares are taken.
        uncovered: group -> why it stays whole.
        before: what the module says about the hold-out samples before anything changes.
    """

    stream: Stream
    samples: Samples
    shares: Shares
    uncovered: dict[str, str]
    before: Answers | None

    @classmethod
    def of(cls, method: ProvableFilterPruning, context: Context, channels: Channels) -> Round:
        """Find the readers, read the samples, ask the dense network about the hold-out ones."""
        watched, refused = consumers_of(channels)
        stream = Stream(context.objective, watched, method.max_patches, method.seed)
        _check_some(watched, refused)
        samples, shapes = read_samples(stream, method.n_calib, method.n_holdout, method.delta)
        missed = {
            c.group: f"{c.name!r} reads it, but is not called on calibration data" for c in watched if c not in shapes
        }
        refused.update(missed)
        stream.consumers = [consumer for consumer in watched if consumer.group not in missed]
        _check_some(stream.consumers, refused)
        shares = Shares(method.mode, method.reduction, method.max_elems)
        return cls(stream, samples, shares, refused, answers(context.objective, samples.holdout))

    def demands(self, found: Gathered, method: ProvableFilterPruning) -> dict[str, Demand]:
        """Sensitivities and the size of the event space of every group."""
        delta = method.delta / len(found.values)
        demands = {}
        for name, scores in found.values.items():
            if not bool((scores > 0).any()):
                raise ValueError(
                    f"group {name!r} is dead: none of its {len(scores)} units reaches a reader on {self.samples.size} "
                    f"calibration samples. Leave it out with `exclude`, or give other data."
                )
            floor = min(method.min_keep, len(scores))
            demands[name] = Demand(scores, log_events(found.events[name], delta), floor)
        return demands

    def certificate(
        self,
        method: ProvableFilterPruning,
        found: Gathered,
        demands: Mapping[str, Demand],
        allocation: Allocation,
        choices: Mapping[str, Choice],
        channels: Channels,
    ) -> Certificate:
        """Everything that can be said before the commit."""
        kept = {name: choice.kept for name, choice in choices.items()}
        groups = {
            name: GroupCertificate(
                name, len(demand.scores), int(kept[name].sum()), method.mode, method.reduction, method.variant,
                demand.total, self.samples.size, found.events[name], method.delta / len(demands), method.margin,
                choices[name].draws, dropped_sum=float(demand.scores[~kept[name]].sum()),
            )
            for name, demand in demands.items()
        }  # fmt: skip
        calibration = self.samples.calibration
        fill_masses(self.stream, calibration, kept, groups)
        if method.reduction == "max":
            terms = {name: demand.log_term for name, demand in demands.items()}
            fill_bounds(self.stream, calibration, choices, terms, groups, method.max_elems)
        fill_holdout(self.stream, self.samples.holdout, self.shares, found.values, kept, groups)
        for name, group in groups.items():
            _judge(group, choices[name], method)
        whole = {name: int(channels.alive[name].sum()) for name in self.uncovered if name in channels.alive}
        counts, kind = {**whole, **channels.counts(kept)}, method.budget_type
        costs = channels.costs
        frozen = channels.all_groups.report.frozen
        fixed = {name: frozen[name, 0] for name in channels.selected if (name, 0) in frozen}
        return Certificate(
            list(groups.values()), {**self.uncovered, **fixed}, method.requested,
            costs.cost(kind, counts) / costs.cost(kind),
            {"dense": costs.params(), "pruned": costs.params(counts)},
            {"dense": costs.flops(), "pruned": costs.flops(counts)},
            allocation.error, method.seed, self.samples.promised, notes=self._notes(method),
        )  # fmt: skip

    def _notes(self, method: ProvableFilterPruning) -> list[str]:
        notes = []
        if self.samples.size < self.samples.promised:
            notes.append(
                f"{self.samples.size} calibration samples promise nothing about unseen ones: delta {method.delta:g} asks for "
                f"{self.samples.promised}."
            )
        if method.max_patches is not None:
            notes.append(f"Sensitivities and bounds speak of {method.max_patches} random positions per sample.")
        return notes


def _judge(group: GroupCertificate, choice: Choice, method: ProvableFilterPruning) -> None:
    """Whether a bound holds for the weights that are proposed, and why."""
    group.covered = True
    if method.reduction == "mean":
        group.covered, group.reason = False, "reduction='mean' measures no largest share, so nothing bounds the error"
    elif not choice.drawn:
        group.reason = "nothing was drawn: on the calibration data the error is at most the dropped mass"
    elif method.variant == "ht" and method.ht_sampler == "systematic":
        group.covered = False
        group.reason = (
            "systematic inclusions are correlated, so eps is an estimate; ht_sampler='poisson' makes it a bound"
        )
    else:
        group.reason = "Bernstein's bound, for all events on the calibration data at once"
    bound = group.bound
    group.vacuous = bound is not None and bound >= 1


def _check_some(consumers: list[Consumer], refused: Mapping[str, str]) -> None:
    if not consumers:
        reasons = "; ".join(f"{name!r}: {why}" for name, why in list(refused.items())[:5])
        raise ValueError(f"no channel group can be measured: {reasons}. Prune by Magnitude(budget=...) instead.")


def summary(certificate: Certificate) -> str:
    """Return the certificate in one sentence, for the receipt's notes."""
    cut = [group for group in certificate.groups if group.kept < group.units]
    vacuous = sum(group.covered and group.vacuous for group in cut)
    useful = sum(group.covered for group in cut) - vacuous
    rest = list(dict.fromkeys(group.reason for group in cut if not group.covered))
    why = f" ({'; '.join(rest)})" if rest else ""
    return (
        f"Certificate: of {len(cut)} groups that lost units, {useful} have a bound below 1, {vacuous} a vacuous one, "
        f"{len(cut) - useful - vacuous} none{why}; {len(certificate.uncovered)} tensors or groups stay whole, with reasons."
    )
