"""HSPG: half-space stochastic projected gradient; whole channels go to zero while the network trains.

Chen, Wang, Ding, Ji, Yi, Zhu, "Half-Space Proximal Stochastic Gradient Method for Group-Sparsity Regularized Problem",
arXiv:2009.12078, 2020, algorithms 1 and 2; used for compression by Chen et al., "Neural Network Compression via Sparse
Optimization", arXiv:2011.04868, 2020, and Chen et al., "Only Train Once", NeurIPS 2021.

With a penalty: proximal steps until `switch`, then in every step

    trial  z = prox(x - a d)     and    z_g <- 0 for good    unless <z_g, x_g> > eps ||x_g||^2

With a sparsity or a budget, the same projection with an exact target (TargetHSPG): channels of the least running saliency
|<x_g, gradient_g>| are chosen in periods (a cubic schedule), faded by x_g <- x_g - d_g - x_g / (steps left), and gone early
when they leave the half-space; no penalty has to be found.

Departures from the papers: the trial is the prox matched to the optimizer's step (`trial="subgradient"` is the published one);
penalty, momentum and Adam's metric as in Prox-SGD; groups are the channels of the dependency graph; the largest of each
layer, as many as must stay, see no penalty; at `end` zeros become masks and the penalty is lifted. The target form is ours.
It removes floor(sparsity * channels) channels, as all methods here count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, get_args

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.checks import check_bool, check_budget, check_choice, check_fraction, check_integer, check_positive
from lightning_prune.context import Context, Proposal
from lightning_prune.cost import Kind
from lightning_prune.methods._hspg_periods import check_ratio, periods_of, propose_target
from lightning_prune.methods._hspg_plan import cubic_share
from lightning_prune.methods._hspg_switch import SwitchWatch
from lightning_prune.methods._hspg_target import Removal, TargetHalfSpace
from lightning_prune.methods._prox_blocks import Layout, group_parts
from lightning_prune.methods._prox_callback import ProximalCallback, check_penalty, schedulers_of
from lightning_prune.methods._prox_operators import outside_half_space
from lightning_prune.methods._prox_penalties import GroupPenalty, Stage
from lightning_prune.methods._prox_scale import future_rates
from lightning_prune.methods._prox_weights import GROUP_WEIGHTS, protect, weigh
from lightning_prune.schedules import Position, check_bound

__all__ = ["HSPG", "outside_half_space"]


class HSPG(ProximalCallback):
    """Bring channels to zero by half-space projections: exactly as many as asked, or as many as a penalty does.

    Give one of `sparsity`, `budget` and `penalty`.

    Args:
        sparsity: removed fraction of the channels that take part, in [0, 1).
        penalty: lambda >= 0 of penalty * sum_g w_g ||x_g||, or "auto"; see `ProxSGD`.
        budget: fraction of the dense cost that may remain, in (0, 1].
        budget_type: which cost: "params", "flops", "volume" or "channels"; None: "flops".
        begin: first step acted on, int (optimizer steps) or float in [0, 1] (fraction of the fit); None: 0.1 with a target,
            which measures before it chooses, 0.0 with a penalty.
        end: when the target is met, or the zeros of a penalty become masks, likewise.
        eps: of the half-space, in [0, 1); larger zeroes more.
        periods: of a target: how often channels are chosen, >= 1.
        saliency: of a target: "taylor" (running mean of |<x_g, gradient_g>|) or "magnitude" (||x_g|| / sqrt |g|).
        beta: of the running mean, in [0, 1).
        normalise: of a target: "block" compares channels by their share of their layer's mean, "global" as they are.
        max_ratio: fraction of a layer's channels that may be removed, in (0, 1].
        min_keep: channels every layer keeps at least, >= 1 (with a penalty >= 0).
        round_to: of a target: round each layer's kept channels down to a multiple of this in the end (8 or 16 runs faster),
            >= 1.
        refit_consumers: of a target: refit the weights that read channels cut before they are zero, by least squares on
            calibration data.
        switch: of a penalty: first half-space step, int or float as `begin`.
        trial: of a penalty: "prox" or "subgradient" (published).
        group_weight: of a penalty: w_g: "sqrt_size", "none" or "flops".
        auto_factor: of penalty "auto", > 0; see `ProxSGD`.
        **common: see `PruningCallback`.
    Raises:
        ValueError: an argument breaks its rule, or not exactly one of `sparsity`, `budget` and `penalty` is given.
    """

    method: ClassVar[str] = "hspg"

    def __init__(
        self,
        sparsity: float | None = None,
        penalty: float | str | None = None,
        budget: float | None = None,
        budget_type: Kind | None = None,
        begin: int | float | None = None,
        end: int | float = 0.5,
        eps: float = 0.0,
        periods: int = 10,
        saliency: str = "taylor",
        beta: float = 0.95,
        normalise: str = "block",
        max_ratio: float = 0.9,
        min_keep: int = 1,
        round_to: int = 1,
        refit_consumers: bool = False,
        switch: int | float = 0.25,
        trial: str = "prox",
        group_weight: str = "sqrt_size",
        auto_factor: float = 2.0,
        **common: Any,
    ) -> None:
        _check_one(sparsity, penalty, budget, budget_type)
        _check_no_target_for(penalty, round_to, refit_consumers)
        first = (0.1 if penalty is None else 0.0) if begin is None else begin
        super().__init__(first, end, **common)
        self.begin = begin  # type: ignore[assignment]  # as it was given
        self.sparsity = None if sparsity is None else check_fraction("sparsity", sparsity)
        self.penalty = None if penalty is None else check_penalty(penalty)
        self.needs_step_scale = penalty is not None
        self.budget = None if budget is None else check_budget("budget", budget)
        self.budget_type: Kind | None = budget_type
        if budget is not None:
            check_choice("budget_type", budget_type or "flops", get_args(Kind))
            self.budget_type = budget_type or "flops"
        self.eps = check_fraction("eps", eps)
        self.periods = check_integer("periods", periods, 1)
        self.saliency = check_choice("saliency", saliency, ("taylor", "magnitude"))
        self.beta = check_fraction("beta", beta)
        self.normalise = check_choice("normalise", normalise, ("block", "global"))
        self.max_ratio = check_ratio(max_ratio)
        self.min_keep = check_integer("min_keep", min_keep, 1 if penalty is None else 0)
        self.round_to = check_integer("round_to", round_to, 1)
        self.refit_consumers = check_bool("refit_consumers", refit_consumers)
        self.switch = check_bound("switch", switch)
        self.trial = check_choice("trial", trial, ("prox", "subgradient"))
        self.group_weight = check_choice("group_weight", group_weight, GROUP_WEIGHTS)
        self.auto_factor = check_positive("auto_factor", auto_factor)

    @property
    @override
    def final_target(self) -> float:
        if self.budget is not None:
            return self.budget
        return self.sparsity if self.sparsity is not None else 0.0

    @property
    @override
    def requested(self) -> dict[str, Any]:
        if self.penalty is not None:
            return {"penalty": self.penalty}
        if self.budget is not None:
            return {"budget": self.budget, "budget_type": self.budget_type}
        return {"channel_sparsity": self.sparsity}

    @override
    def make_engine(self, context: Context, trainer: Trainer) -> GroupPenalty | Removal:
        layout = group_parts(context, trainer.optimizers)
        if self.penalty is None:
            return self.removal(layout)
        weigh(layout, self.group_weight)
        protect(layout, self.max_ratio, self.min_keep)
        return GroupPenalty(
            layout, "subgradient" if self.trial == "subgradient" else "prox", stage_at=self.stage_at, asked=self.penalty,
            factor=self.auto_factor, eps=self.eps, deadline=self.bounds[1],
        )  # fmt: skip

    def removal(self, layout: Layout) -> Removal:
        """Return the engine of the target form."""
        plan = periods_of(layout, self.bounds, self.periods, self.sparsity, self.budget, self.budget_type)
        return TargetHalfSpace(
            self.saliency, self.beta, self.normalise, self.eps, share=cubic_share, max_ratio=self.max_ratio,
            min_keep=self.min_keep, round_to=self.round_to, **plan,
        )  # fmt: skip

    def stage_at(self, step: int) -> Stage:
        """Return what follows the step with this index: prox, then half-space."""
        begin, end = self.bounds
        if not begin <= step < end:
            return "off"
        return "projected" if step >= self._switch else "prox"

    @override
    def propose(self, context: Context) -> Proposal:
        """Propose what the engine holds at zero; without training, the channels of least magnitude."""
        if self.penalty is not None:
            return super().propose(context)
        return propose_target(self._engine, self.removal, context, self._over, self.refit_consumers)

    @override
    def check_fit(self, trainer: Trainer, position: Position, resumed: bool) -> None:
        super().check_fit(trainer, position, resumed)
        self._switch = 0 if self.penalty is None else self.steps_of("switch", position, trainer)
        if self.penalty is not None and self._switch >= self.bounds[1] and not trainer.fast_dev_run:
            raise MisconfigurationException(
                f"`switch` (step {self._switch}) must lie before `end` (step {self.bounds[1]}): no half-space step would be "
                "taken. Lower `switch`, or use ProxSGD."
            )
        if self.penalty is not None and not resumed:
            self._watch = SwitchWatch(self._switch)
            for optimizer in trainer.optimizers:
                steps = self._switch - position.step + 1
                self._watch.foresee(future_rates(optimizer, schedulers_of(trainer, optimizer), steps))

    @override
    def reset(self) -> None:
        super().reset()
        self._watch = SwitchWatch()

    @override
    def extra_state(self) -> dict[str, Any]:
        return {**super().extra_state(), "watch": self._watch.state_dict()}

    @override
    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        super().load_extra_state(state)
        self._watch = SwitchWatch(**state.get("watch", {}))

    @override
    def _after_step(self, optimizer: Optimizer) -> None:
        if self.penalty is not None and self._engine is not None:
            parts = [part.optimizer for part in self._engine.parts]
            if optimizer in parts:
                self._watch.see(parts.index(optimizer), optimizer, self._step)
        super()._after_step(optimizer)


def _check_one(sparsity: Any, penalty: Any, budget: Any, budget_type: Any) -> None:
    given = {"sparsity": sparsity, "budget": budget, "penalty": penalty}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(
            f"exactly one of `sparsity`, `budget` and `penalty` must be given, got {', '.join(named) or 'none'}. A sparsity or "
            "a budget is met exactly; a penalty gives what it gives."
        )
    if budget_type is not None and budget is None:
        raise ValueError(f"`budget_type` must be left out without `budget`, got {budget_type!r}.")


def _check_no_target_for(penalty: Any, round_to: Any, refit_consumers: Any) -> None:
    if penalty is not None and (round_to != 1 or refit_consumers is not False):
        name, value = ("round_to", round_to) if round_to != 1 else ("refit_consumers", refit_consumers)
        raise ValueError(
            f"`{name}` must be left out with a `penalty`, got {value!r}: what it brings to zero is zero already, and no more. "
            "Give a `sparsity` or a `budget`."
        )
