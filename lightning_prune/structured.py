"""StructuredOneShot: one-shot methods that may remove whole channels until a cost is within its budget."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune._dependency.calls import copy_of
from lightning_prune.channels import Channels
from lightning_prune.checks import check_bool, check_budget, check_choice, check_integer
from lightning_prune.context import Context, Proposal
from lightning_prune.cost import KINDS, Kind
from lightning_prune.masks import full
from lightning_prune.oneshot import OneShotPruning
from lightning_prune.repair import batch_size, refit_consumers
from lightning_prune.sandbox import untouched
from lightning_prune.schedules import parse_at
from lightning_prune.targets import named_tensors

__all__ = ["StructuredOneShot", "refit_proposal"]

REFIT_SAMPLES = 512  # a consumer has at most a few thousand features, and positions of one picture count singly


class StructuredOneShot(OneShotPruning):
    """A one-shot method that removes single weights to a sparsity, or whole channels to a budget.

    Args:
        sparsity: pruned fraction of the selected weights, in [0, 1); None with a budget or with pairs in `at`.
        at: when; see `OneShotPruning`. With a `budget_type`, pairs are (when, budget), and budgets fall.
        budget: fraction of the dense cost that may remain, in (0, 1]; channels are removed until it is met.
        budget_type: which cost: "params", "flops", "volume" or "channels"; None with a budget: "flops".
        min_keep: channels every group keeps at least, >= 1.
        round_to: round kept channels down to a multiple of this (8 or 16 runs faster), >= 1.
        refit_consumers: with a budget, refit the weights that read removed channels by least squares on calibration data.
        **common: see `PruningCallback`.
    Raises:
        ValueError: an argument breaks its rule, or both or neither of `sparsity` and `budget` are given.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        at: Any = "start",
        budget: float | None = None,
        budget_type: Kind | None = None,
        min_keep: int = 1,
        round_to: int = 1,
        refit_consumers: bool = True,
        **common: Any,
    ) -> None:
        self.budget: float | None = None
        self.budget_type: Kind | None = None
        structured = budget is not None or budget_type is not None
        paired = not isinstance(at, (str, int, float))
        _check_one_target(sparsity, budget, structured, paired)
        if not structured:
            super().__init__(sparsity, at, **common)
        else:
            given = None if budget is None else check_budget("budget", budget)
            super().__init__(0.0, "start", **common)  # checks what all methods share; the moments follow
            self.at, self.moments = at, parse_at(at, given, budgets=True)
            self.sparsity = None  # type: ignore[assignment]  # what counts is the budget
            self.budget = self.moments[-1].target
            check_choice("budget_type", budget_type or "flops", get_args(Kind))
            self.budget_type = budget_type or "flops"
        self.min_keep = check_integer("min_keep", min_keep, 1)
        self.round_to = check_integer("round_to", round_to, 1)
        self.refit_consumers = check_bool("refit_consumers", refit_consumers)

    @property
    def structured(self) -> bool:
        """Whether channels are removed, not single weights."""
        return self.budget_type is not None

    @property
    @override
    def final_target(self) -> float:
        """The sparsity or the budget this method ends at."""
        return self.moments[-1].target

    @property
    @override
    def requested(self) -> dict[str, Any]:
        """What the receipt says was asked."""
        if self.structured:
            return {"budget": self.budget, "budget_type": self.budget_type}
        return {"sparsity": self.sparsity}

    @abstractmethod
    def propose_weights(self, context: Context) -> Proposal:
        """Return masks of single weights for the sparsity `context.target`."""

    @abstractmethod
    def unit_scores(self, context: Context, channels: Channels) -> Mapping[str, Tensor]:
        """Return a score for every unit by group name, each of shape (units,); higher is kept longer."""

    @override
    def propose(self, context: Context) -> Proposal:
        """Propose single weights or channels."""
        return self.propose_channels(context) if self.structured else self.propose_weights(context)

    def propose_channels(self, context: Context) -> Proposal:
        """Remove the channels of lowest score until the cost is within `context.target`, and refit their consumers."""
        channels = Channels.of(context)
        scores = self.unit_scores(context, channels)
        kept = channels.within(scores, context.target, self.budget_type or "flops", self.min_keep, self.round_to)
        proposal = Proposal(channels.masks(kept), notes=channels.notes(kept))
        return refit_proposal(context, proposal) if self.refit_consumers else proposal


def refit_proposal(
    context: Context, proposal: Proposal, samples: int = REFIT_SAMPLES, teacher: nn.Module | None = None
) -> Proposal:
    """Give a proposal the least-squares weights of the layers that read removed channels; the module is not changed.

    Every refit layer needs a mask in the proposal. Without calibration data the proposal says so and stays as it is.

    Args:
        context: the pruning event.
        proposal: masks of whole channels, and new weights if the method has any.
        samples: calibration samples to read, >= 2.
        teacher: whose outputs the refit layers shall give again, of the module's names and shapes; None: the module as
            it is before the event.
    Returns:
        The same proposal with `weights` and a sentence in `repairs`.
    """
    try:
        batches = _some_batches(context, samples)
    except ValueError as error:
        proposal.notes.append(f"Consumers of removed channels were not refit: {error}")
        return proposal
    with _twin(context.module, context.module) as pruned, _twin(teacher or context.module, context.module) as dense:
        tensors = named_tensors(pruned)
        with torch.no_grad():
            for name, mask in proposal.masks.items():
                value = (proposal.weights or {}).get(name, tensors[name])
                tensors[name].copy_(value * mask)
        trainer = context.objective.trainer

        def run(module: nn.Module, batch: Any) -> None:
            with untouched(module, trainer), torch.no_grad():
                context.objective.run(module, batch)

        report = refit_consumers(pruned, dense, batches, run)
        fresh = {f"{name}.weight" for name in report.refit} & set(proposal.masks)
        weights = {name: full(tensors[name].detach()).clone() for name in sorted(fresh)}
    proposal.weights = {**(proposal.weights or {}), **weights} or None
    proposal.repairs.append(
        f"{len(report.refit)} consumers refit by least squares on {len(batches)} batches"
        + (f", {len(report.skipped)} left as they were" if report.skipped else "")
    )
    return proposal


def _some_batches(context: Context, samples: int) -> list[Any]:
    """Calibration batches of about so many samples, at least two of them: one fits, another judges."""
    batches: list[Any] = []
    for batch in context.objective.batches(None):
        batches.append(batch)
        if len(batches) > 1 and sum(map(batch_size, batches)) >= samples:
            break
    if not batches:
        raise ValueError("there is no calibration batch. Give a dataloader with at least one batch.")
    return batches


@contextmanager
def _twin(module: nn.Module, original: nn.Module) -> Iterator[nn.Module]:
    """A copy of a module that knows the Trainer of the original while it is used; `module` may be a copy itself."""
    twin = copy_of(module)
    held = original.__dict__.get("_trainer")
    if held is not None:
        twin.__dict__["_trainer"] = held
    try:
        yield twin
    finally:
        if held is not None:
            twin.__dict__["_trainer"] = None


def _check_one_target(sparsity: Any, budget: Any, structured: bool, paired: bool) -> None:
    if paired and budget is not None:
        raise ValueError(
            f"`budget` must be left out when `at` lists (when, budget) pairs, got {budget!r}. Give `budget_type`."
        )
    if structured and sparsity is not None:
        raise ValueError(
            f"`sparsity` must be left out with a budget (of {', '.join(KINDS)}), which counts channels, got {sparsity!r}."
        )
    if structured and budget is None and not paired:
        raise ValueError(
            "`budget` must be in (0, 1] with a `budget_type`, got None. Give the fraction that may remain."
        )
