"""Provable filter pruning: keep units by sampling from their sensitivities, with one number for all layers and a certificate.

Liebenwein, Baykal, Lang, Feldman and Rus, "Provable filter pruning for efficient neural networks", ICLR 2020.

The sensitivity of unit j is the largest share it has in any output of a layer that reads it, over calibration samples and
positions. m draws from p = s / S, reweighed by n_j / (m p_j), keep every output within eps(m) of its sum of absolute
contributions. All groups share one eps, which follows from the budget by bisection.

Departures from the paper and its program: contributions are absolute values (one part instead of a split by sign, which
gives the same bound with smaller sensitivities; `mode="split"` is theirs); a unit's share is summed over its kernel, as the
bound needs; units leave a whole channel group at once, by the largest sensitivity over its readers; the budget counts the
exact cost of the smaller network; the bound is Bernstein's, on the calibration data, where theirs carries constants that
only hold under an assumption; after the choice the readers are refit by least squares and BatchNorm is re-estimated, unless
told otherwise, because that decides accuracy far more than the criterion does.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, ClassVar, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_prune.channels import Channels
from lightning_prune.checks import check_budget, check_choice, check_integer, check_positive, is_number
from lightning_prune.context import Context, Proposal
from lightning_prune.cost import Kind
from lightning_prune.methods._pfp_bounds import (
    calibration_samples,
    draws_for_distinct,
    draws_for_error,
    error_of_draws,
    expected_distinct,
)
from lightning_prune.methods._pfp_budgets import Allocation, Demand, allocate, counts_at, rounded_down
from lightning_prune.methods._pfp_certificate import Certificate, GroupCertificate, Measured, fingerprint
from lightning_prune.methods._pfp_evidence import answers, calibrate, measure
from lightning_prune.methods._pfp_kernel import MODES, REDUCTIONS, Reader, dropped_mass, error_moments, unit_shares
from lightning_prune.methods._pfp_round import Round, summary
from lightning_prune.methods._pfp_sampling import (
    HT_SAMPLERS,
    VARIANTS,
    Choice,
    choose,
    inclusion_probabilities,
    systematic,
)
from lightning_prune.methods._pfp_streams import leave_out, scaled_weights
from lightning_prune.oneshot import PruningAtMoments
from lightning_prune.schedules import parse_at
from lightning_prune.structured import refit_proposal

__all__ = [
    "Certificate",
    "Choice",
    "Demand",
    "GroupCertificate",
    "Measured",
    "ProvableFilterPruning",
    "Reader",
    "allocate",
    "calibration_samples",
    "choose",
    "draws_for_distinct",
    "draws_for_error",
    "dropped_mass",
    "error_moments",
    "error_of_draws",
    "expected_distinct",
    "fingerprint",
    "inclusion_probabilities",
    "systematic",
    "unit_shares",
]

RECONSTRUCTIONS = ("ls", "reweigh", "none")


class ProvableFilterPruning(PruningAtMoments):
    """Remove channels by sensitivity until a cost is within its budget, and say what is known about the error.

    Args:
        budget: fraction of the dense cost that may remain, in (0, 1]; None with an epsilon or with pairs in `at`.
        epsilon: relative error that every layer shall keep to, > 0; the cost then follows. Not with a budget.
        budget_type: which cost: "params", "flops", "volume" or "channels".
        at: when; see `OneShotPruning`. Pairs are (when, budget), and budgets fall; every round calibrates anew.
        variant: "top" keeps the most sensitive units; "ht" includes each with a probability and divides by it; "rand" draws
            with replacement; "hybrid" keeps the surest and draws the rest.
        mode: "abs" compares absolute contributions; "split" positive and negative ones apart, as the authors do.
        reduction: over positions: "max", which the bound needs, or "mean".
        n_calib: calibration samples, >= 1; None: as many as `delta` asks for, at most 512.
        n_holdout: samples after them, on which the certificate is checked, >= 0.
        delta: probability with which a bound may fail, in (0, 1), shared by all groups.
        margin: K: unseen samples are taken to stay below K times the sensitivities, >= 1.
        max_patches: output positions per sample to look at, drawn at random, >= 1; None for all.
        max_elems: entries of the largest temporary tensor, >= 1.
        ht_sampler: "systematic" keeps exact counts; "poisson" decides unit by unit, so that the bound is strict.
        reconstruct: "ls" refits the readers by least squares; "reweigh" scales them by gamma; "none" leaves them.
        min_keep: units every group keeps at least, >= 1.
        round_to: round kept units down to a multiple of this, >= 1.
        refit_bn: re-estimate BatchNorm statistics afterwards.
        **common: see `PruningCallback`.
    Attributes:
        certificate: that of the last event; None before it.
    Raises:
        ValueError: an argument breaks its rule, or both or neither of `budget` and `epsilon` are given.
    """

    method: ClassVar[str] = "pfp"
    shards: ClassVar[bool] = False

    def __init__(
        self,
        budget: float | None = None,
        epsilon: float | None = None,
        budget_type: Kind = "params",
        at: Any = "start",
        variant: str = "top",
        mode: str = "abs",
        reduction: str = "max",
        n_calib: int | None = None,
        n_holdout: int = 256,
        delta: float = 1e-2,
        margin: float = 3.0,
        max_patches: int | None = None,
        max_elems: int = 2**24,
        ht_sampler: str = "systematic",
        reconstruct: str = "ls",
        min_keep: int = 1,
        round_to: int = 1,
        refit_bn: bool = True,
        **common: Any,
    ) -> None:
        paired = not isinstance(at, (str, int, float))
        _check_one_target(budget, epsilon, paired)
        super().__init__(refit_bn=refit_bn, **common)
        given = epsilon if budget is None else check_budget("budget", budget)
        self.epsilon = None if epsilon is None else check_positive("epsilon", epsilon)
        self.at, self.moments = at, parse_at(at, given, budgets=True)
        self.budget = None if epsilon is not None else self.moments[-1].target
        self.budget_type: Kind = check_choice("budget_type", budget_type, get_args(Kind))  # type: ignore[assignment]
        self.variant = check_choice("variant", variant, VARIANTS)
        self.mode = check_choice("mode", mode, MODES)
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)
        self.n_calib = None if n_calib is None else check_integer("n_calib", n_calib, 1)
        self.n_holdout = check_integer("n_holdout", n_holdout, 0)
        self.delta = _check_delta(delta)
        self.margin = _check_margin(margin)
        self.max_patches = None if max_patches is None else check_integer("max_patches", max_patches, 1)
        self.max_elems = check_integer("max_elems", max_elems, 1)
        self.ht_sampler = check_choice("ht_sampler", ht_sampler, HT_SAMPLERS)
        self.reconstruct = check_choice("reconstruct", reconstruct, RECONSTRUCTIONS)
        self.min_keep = check_integer("min_keep", min_keep, 1)
        self.round_to = check_integer("round_to", round_to, 1)

    @property
    @override
    def final_target(self) -> float:
        """The budget (or epsilon) this method ends at."""
        return self.moments[-1].target

    @property
    @override
    def requested(self) -> dict[str, Any]:
        """What the receipt says was asked."""
        if self.epsilon is not None:
            return {"epsilon": self.epsilon}
        return {"budget": self.budget, "budget_type": self.budget_type}

    @property
    @override
    def removes_channels(self) -> bool:
        """Always, also where an epsilon was asked for and no budget."""
        return True

    @property
    def certificate(self) -> Certificate | None:
        """The certificate of the last event, stale if the module's weights have moved since."""
        values = self.history[-1]["certificate"] if self.history else None
        if values is None:
            return None
        found, module = Certificate.from_dict(values), self._certified() if self._certified else None
        if module is not None and not found.check(module):
            values["stale"] = True
        return found

    @override
    def reset(self) -> None:
        super().reset()
        self._certified: weakref.ref[nn.Module] | None = None
        self._round: Round | None = None

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_certified": None, "_round": None}

    @override
    def propose(self, context: Context) -> Proposal:
        """Keep the units that the sensitivities choose, within the budget, with a certificate."""
        channels = Channels.of(context)
        self._round = work = Round.of(self, context, channels)
        found = calibrate(work.stream, work.samples.calibration, work.shares)
        demands = work.demands(found, self)
        allocation = self._allocation(context, channels, demands, work)
        choices = {
            name: choose(demands[name].scores, count, self.variant, context.generator, self.ht_sampler)
            for name, count in allocation.counts.items()
        }
        kept = {name: choice.kept for name, choice in choices.items()}
        proposal = Proposal(channels.masks(kept), notes=channels.notes(kept))
        certificate = work.certificate(self, found, demands, allocation, choices, channels)
        changed = any(
            not torch.equal(mask, context.alive[name]) for name, mask in proposal.masks.items() if name in context.alive
        )
        if changed:
            self._reconstruct(context, proposal, choices, certificate)
        certificate.fingerprint = fingerprint(context.module)
        proposal.certificate = certificate.to_dict()
        proposal.notes.append(summary(certificate))
        self._certified = weakref.ref(context.module)
        return proposal

    @override
    def prepare_repair(self, context: Context, proposal: Proposal) -> bool:
        """The certificate is completed after the commit even where there is no BatchNorm to re-estimate."""
        self._refits_bn = super().prepare_repair(context, proposal)
        return True

    @override
    def repair(self, context: Context, proposal: Proposal) -> None:
        """Re-estimate BatchNorm, then measure what changed on hold-out samples."""
        if self._refits_bn:
            super().repair(context, proposal)
        work, self._round = self._round, None
        if work is None or proposal.certificate is None:
            return
        held = work.samples.holdout
        found = measure(work.before, answers(context.objective, held), work.samples.held)
        certificate = Certificate.from_dict(proposal.certificate)
        certificate.measured, certificate.fingerprint = found, fingerprint(context.module)
        proposal.certificate = certificate.to_dict()
        rank_zero_info(str(certificate))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        for event in self.history:
            if event["certificate"] and trainer.global_step > event["step"]:
                event["certificate"]["stale"] = True

    def _allocation(
        self, context: Context, channels: Channels, demands: Mapping[str, Demand], work: Round
    ) -> Allocation:
        if self.epsilon is not None:
            return Allocation(counts_at(demands, self.epsilon, self.margin), self.epsilon)
        whole = {name: int(channels.alive[name].sum()) for name in work.uncovered if name in channels.alive}

        def cost(counts: Mapping[str, int]) -> int:
            return int(channels.costs.cost(self.budget_type, {**whole, **counts}))

        dense = channels.costs.cost(self.budget_type)
        try:
            found = allocate(demands, cost, context.target * dense + 1e-9, self.margin)
        except ValueError as error:
            least = cost(counts_at(demands, 1e8, self.margin))
            raise ValueError(
                f"`budget` must be at least {least / dense:.4f} for {self.budget_type!r}: with {self.min_keep} unit(s) kept "
                f"per group {least} of {dense} remain, got {context.target}. Raise it or lower `min_keep`."
            ) from error
        shapes = {group.name: (len(group), group.width) for group in channels.groups}
        return Allocation(rounded_down(found.counts, shapes, self.round_to, self.min_keep), found.error)

    def _reconstruct(
        self, context: Context, proposal: Proposal, choices: Mapping[str, Choice], certificate: Certificate
    ) -> None:
        """New weights of the readers: least squares, or the scales that keep sums unbiased, or none."""
        work = self._round
        if self.reconstruct == "ls" and work is not None:
            leave_out(context.objective, work.samples.used)
            refit_proposal(context, proposal)
            fresh = set(proposal.weights or {})
            for group in certificate.groups:
                if any(f"{c.name}.weight" in fresh for c in work.stream.consumers if c.group == group.name):
                    group.after_refit()
        elif self.reconstruct == "reweigh" and work is not None:
            scales = {name: choice.scales for name, choice in choices.items()}
            proposal.weights = scaled_weights(work.stream.consumers, scales, context.weights) or None
        elif self.reconstruct == "none":
            for group in certificate.groups:
                if choices[group.name].drawn:
                    group.covered, group.reason = False, "reconstruct='none' leaves out the scales that the bound needs"


def _check_delta(delta: Any) -> float:
    if not is_number(delta) or not 0 < delta < 1:
        raise ValueError(f"`delta` must be in (0, 1), a probability of failure such as 0.01, got {delta!r}.")
    return float(delta)


def _check_margin(margin: Any) -> float:
    if not is_number(margin) or margin < 1:
        raise ValueError(f"`margin` must be a number >= 1, the K of the paper, got {margin!r}. The paper takes 3.")
    return float(margin)


def _check_one_target(budget: Any, epsilon: Any, paired: bool) -> None:
    if budget is not None and epsilon is not None:
        raise ValueError(
            f"`budget` and `epsilon` exclude each other, got {budget!r} and {epsilon!r}. Give one of them."
        )
    if paired and (budget is not None or epsilon is not None):
        raise ValueError(
            f"`budget` and `epsilon` must be left out when `at` lists (when, budget) pairs, got {budget!r} and {epsilon!r}."
        )
    if budget is None and epsilon is None and not paired:
        raise ValueError(
            "`budget` or `epsilon` must be given, got neither. Give budget=0.5 to keep half of the parameters."
        )
