"""ChipNet: train a gate per channel towards 0 or 1 under a budget, then keep what fits.

Tiwari, Bamba, Chavan and Gupta, "ChipNet: budget-aware pruning with Heaviside continuous approximations", ICLR 2021,
arXiv:2102.07156.

Loss + 30 (V - V_0)^2 + 10 mean (z - x)^2 is minimized over weights and gates while the gates are annealed (see
`_chipnet_gates.py`); then gates leave in the order of psi until the cost is within the budget.

Departures from the authors' program: gates sit on the weights that read a channel, one per unit of the dependency graph,
so that removal is exact on any network (`coupling="per_layer"` has one per channel of every BatchNorm layer, as theirs);
the soft and the hard budget are the same function, that of `cost.py`; psi travels 40 in the soft phase however short it is
(theirs has a fixed step size, with which gates of a short phase all end on). BatchNorm statistics are measured under the
first gates and then frozen (in train mode the next norm divides a gate out, so that gates near 0 stay functional until they
are cut), and weights move slowly meanwhile. Every group keeps half of the uniform width at least: gradients of single gates
favour what hurts at once, and would leave hardly anything of some layers. When gates become hard, the kept ones are folded
into the weights, what read removed channels is refit to the soft network by least squares, and new statistics leave the
function as it is. The hard budget is met exactly, never exceeded.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.batch_norm import batch_norms, statistics_of
from lightning_prune.callback import PruningCallback
from lightning_prune.checks import (
    check_bool,
    check_budget,
    check_choice,
    check_integer,
    check_positive,
)
from lightning_prune.context import Context, Proposal
from lightning_prune.cost import KINDS, Kind
from lightning_prune.fit import log_event, loss_scale, mean_over_ranks, position_of, same_optimizer
from lightning_prune.methods._chipnet_arguments import (
    check_chosen,
    check_length,
    check_sum,
    check_weight,
    travel_warning,
    with_preset,
)
from lightning_prune.methods._chipnet_gates import (
    Temperature,
    anneal,
    budget_loss,
    crispness_loss,
    crispness_turn,
    gate_values,
    heaviside,
    logistic,
    soft_counts,
    stage_of,
)
from lightning_prune.methods._chipnet_layout import harden
from lightning_prune.methods._chipnet_session import SoftPhase, keep_functions, open_gates
from lightning_prune.methods._chipnet_training import Plan, scale_gradients
from lightning_prune.schedules import Position, check_bound

__all__ = [
    "ChipNet",
    "Temperature",
    "anneal",
    "budget_loss",
    "crispness_loss",
    "crispness_turn",
    "gate_values",
    "harden",
    "heaviside",
    "logistic",
    "soft_counts",
]


class ChipNet(PruningCallback):
    """Train a gate per channel while the network trains, and remove channels until a cost is within its budget.

    Args:
        budget: fraction of the dense cost that may remain, in (0, 1]; never exceeded, met to one channel's cost.
        budget_type: which cost: "flops", "params", "volume" (activations) or "channels".
        prune_fraction: length of the soft phase, float in (0, 1] (fraction of the fit) or int >= 1 (optimizer steps).
        begin: when it starts, float in [0, 1) (fraction of the fit) or int >= 0 (optimizer steps).
        stages: annealing stages, >= 1.
        travel: how far AdamW can move psi in the soft phase, > 0; from 30 to 60 works, below 10 gates cannot cross.
        gate_lr: AdamW's step size for psi, > 0; None: travel / soft steps.
        w_budget: weight of the budget loss, >= 0.
        w_crisp: weight of the crispness loss, >= 0.
        bn_soft: BatchNorm while gates are soft: "frozen" uses the running statistics, "train" those of the batch.
        weight_rate: the gradients of the module's weights are multiplied by this while gates are soft, in [0, 1]: frozen
            statistics do not bear the steps of a usual learning rate. SGD's steps shrink with it, Adam's do not.
        ste_last: last fraction of the soft phase in which the forward pass is hard, the backward pass soft, in [0, 1).
        min_keep: fraction of every group that stays in any case, in [0, 1); one channel of each does at least. None: half
            of what a network of uniform width keeps within the budget.
        round_to: round kept channels down to a multiple of this (8 or 16 runs faster), >= 1.
        fold: multiply the gates that stay into the weights; else they jump to 1.
        coupling: "graph": one gate per unit, on the weights that read it; "per_layer": one per channel of every
            BatchNorm layer.
        stage_batches: calibration batches on which soft and hard loss are compared at the end of every stage, >= 0.
        hard_validation: validate with hard gates while they are soft, so that the monitored metric is the hard one.
        preset: "reference" takes the authors' settings for every argument that is left at its default.
        refit_bn: re-estimate BatchNorm statistics before they are frozen, and when the gates become hard.
        refit_consumers: when they become hard, refit what reads removed channels to the soft network by least squares
            (not after a straight-through tail, in which it has learned to do without them).
        **common: see `PruningCallback`.
    Raises:
        ValueError: an argument breaks its rule.
    """

    method: ClassVar[str] = "chipnet"
    shards: ClassVar[bool] = False

    # what a preset may choose
    coupling: str
    bn_soft: str
    weight_rate: float
    ste_last: float
    min_keep: float | None
    fold: bool
    gate_lr: float | None
    refit_consumers: bool

    def __init__(
        self,
        budget: float,
        budget_type: Kind = "flops",
        prune_fraction: int | float = 0.5,
        begin: int | float = 0.0,
        stages: int = 20,
        travel: float = 40.0,
        gate_lr: float | None = None,
        w_budget: float = 30.0,
        w_crisp: float = 10.0,
        bn_soft: str = "frozen",
        weight_rate: float = 0.1,
        ste_last: float = 0.0,
        min_keep: float | None = None,
        round_to: int = 1,
        fold: bool = True,
        coupling: str = "graph",
        stage_batches: int = 2,
        hard_validation: bool = True,
        preset: str | None = None,
        refit_bn: bool = True,
        refit_consumers: bool = True,
        **common: Any,
    ) -> None:
        given = {
            "coupling": coupling, "bn_soft": bn_soft, "ste_last": ste_last, "min_keep": min_keep, "fold": fold,
            "gate_lr": gate_lr, "refit_bn": refit_bn, "refit_consumers": refit_consumers, "weight_rate": weight_rate,
        }  # fmt: skip
        parameters = inspect.signature(ChipNet.__init__).parameters
        chosen = with_preset(preset, given, {name: parameters[name].default for name in given})
        super().__init__(refit_bn=chosen.pop("refit_bn"), **common)
        vars(self).update(check_chosen(chosen, round_to))
        self.budget = check_budget("budget", budget)
        check_choice("budget_type", budget_type, KINDS)
        self.budget_type: Kind = budget_type
        self.prune_fraction = check_length("prune_fraction", prune_fraction)
        self.begin = check_bound("begin", begin)
        check_sum(self.begin, self.prune_fraction)
        self.stages = check_integer("stages", stages, 1)
        self.travel = check_positive("travel", travel)
        self.w_budget, self.w_crisp = check_weight("w_budget", w_budget), check_weight("w_crisp", w_crisp)
        self.round_to = check_integer("round_to", round_to, 1)
        self.stage_batches = check_integer("stage_batches", stage_batches, 0)
        self.hard_validation = check_bool("hard_validation", hard_validation)
        self.preset = preset

    @override
    def reset(self) -> None:
        super().reset()
        self._forget_gates()
        self._bounds: tuple[int, int] | None = None
        self.psi: Tensor | None = None

    def _forget_gates(self) -> None:
        """Drop everything about a soft phase; hooks are taken off."""
        if getattr(self, "_soft", None) is not None:
            self._soft.gates.reads.remove()  # type: ignore[union-attr]
        self._soft: SoftPhase | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._stepped = -1
        self.stage_records: list[dict[str, Any]] = []

    @override
    def __getstate__(self) -> dict[str, Any]:
        """Copies keep what was done and learned, not the gates on a module."""
        return {**super().__getstate__(), "_soft": None}

    # what a pruning callback is asked

    @property
    @override
    def final_target(self) -> float:
        return self.budget

    @property
    @override
    def requested(self) -> dict[str, Any]:
        return {"budget": self.budget, "budget_type": self.budget_type}

    @override
    def check_fit(self, trainer: Trainer, position: Position, resumed: bool) -> None:
        if self.finished:
            return
        self._bounds = self._bounds_of(position)
        begin, end = self._bounds
        if trainer.fast_dev_run:
            return
        if position.total_steps is not None and end > position.total_steps:
            raise MisconfigurationException(
                f"`begin` and `prune_fraction` end the soft phase after step {end}, beyond the fit of "
                f"{position.total_steps} optimizer steps. Lower them or train longer."
            )
        if position.step > begin and not resumed:
            raise MisconfigurationException(
                f"`begin` (step {begin}) lies before step {position.step}, at which this fit goes on from a checkpoint "
                "that was not pruned. Load the weights without `ckpt_path` (a fit of its own), or choose a later `begin`."
            )
        warning = travel_warning(end - begin, self._rate(end - begin), self.travel, self.gate_lr is not None)
        if warning and not resumed:
            rank_zero_warn(f"{self.method}: {warning}")

    def _bounds_of(self, position: Position) -> tuple[int, int]:
        """First step of the soft phase and the step at which gates become hard."""
        total = position.total_steps
        if total is None and not (isinstance(self.begin, int) and isinstance(self.prune_fraction, int)):
            raise MisconfigurationException(
                "`begin` and `prune_fraction` must be ints (optimizer steps) in a fit whose length is not known (max_epochs "
                f"or max_steps is -1), got {self.begin} and {self.prune_fraction}."
            )
        begin, length = (
            bound if isinstance(bound, int) else round(bound * (total or 0))
            for bound in (self.begin, self.prune_fraction)
        )
        return begin, begin + max(1, length)

    def _rate(self, soft_steps: int) -> float:
        return self.travel / soft_steps if self.gate_lr is None else self.gate_lr

    @override
    def due(self, position: Position) -> float | None:
        """The budget at the end of the soft phase, or of a fit that ends in it."""
        if self._soft is None or self.finished or self._bounds is None:
            return None
        return self.budget if position.ended or position.step >= self._bounds[1] else None

    @override
    def propose(self, context: Context) -> Proposal:
        """Keep the gates of largest psi that fit into the budget, and fold their z into the weights that they scale."""
        if self._soft is None:
            raise ValueError(
                "ChipNet learns its gates in a fit, so it cannot prune at once. Give it to a Trainer, or use "
                "Magnitude(budget=...)."
            )
        return self._soft.proposal(context, self.stage_records, self.refit_consumers)

    @override
    def repair(self, context: Context, proposal: Proposal) -> None:
        self._close(context.module)
        old = statistics_of(context.module)
        super().repair(context, proposal)
        if self.bn_soft == "frozen":  # the network has learned under the old statistics
            keep_functions(context.module, old)
            proposal.repairs.append("the layers' weights moved with them, so that the function stayed")

    @override
    def mark_done(self, position: Position) -> None:
        module = None if self._bound is None else self._bound()
        if module is not None:
            self._close(module)
        super().mark_done(position)

    @override
    def extra_state(self) -> dict[str, Any]:
        return {
            "gates": None if self._soft is None else self._soft.gates.state(),
            "stage_records": [dict(record) for record in self.stage_records],
            "psi": None if self.psi is None else self.psi.clone(),
        }

    @override
    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self._loaded = state["gates"]
        self.stage_records = [dict(record) for record in state["stage_records"]]
        self.psi = state["psi"]

    # the soft phase, in the order of Lightning's hooks

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not self.finished:
            self._forget_gates()  # of a fit that was broken off

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._move(trainer, pl_module)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._soft is None:
            return
        scale_gradients(optimizer, self.weight_rate)
        gates = self._soft.gates
        gradient = gates.reads.take_gradient(gates.layout.size)
        # the gates follow the loss of the first optimizer, once per step however often its closure runs
        if same_optimizer(optimizer, trainer.optimizers[0]) and trainer.global_step != self._stepped:
            self._stepped = trainer.global_step
            scale = loss_scale(trainer)
            if not gates.update(mean_over_ranks(gradient / scale)) and scale == 1.0:
                raise ValueError(
                    f"the gradient of the gates is not finite at step {trainer.global_step}: training diverges. Networks with "
                    "frozen BatchNorm statistics do not bear large steps: lower `weight_rate` or the learning rate (0.001 "
                    "for AdamW), or set bn_soft='train'."
                )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._move(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._soft is not None and self.hard_validation:
            self._soft.gates.refresh(hard=True)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._soft is not None:
            self._soft.gates.refresh()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if not self.finished:
            rank_zero_warn(f"{self.method}: training ended before `begin`, so nothing was pruned.")

    @override
    def _release(self, pl_module: LightningModule) -> None:
        if self._soft is not None:
            self._soft.gates.reads.remove()
        super()._release(pl_module)

    # how it is done

    def _move(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the soft phase when it begins; anneal while it lasts; look at the gates at the end of every stage."""
        if self.finished or self._bounds is None:
            return
        begin, end = self._bounds
        step = position_of(trainer, pl_module).step
        if self._soft is not None:
            self._anneal(trainer, min(step, end) - begin)
        elif begin <= step:
            self._open(trainer, pl_module, min(step, end) - begin)

    def _open(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        begin, end = self._bounds or (0, 1)
        context, plan = self._context(trainer, pl_module, self.budget), self._plan(end - begin)
        if self.refit_bn and batch_norms(pl_module):
            context.objective.check_batches()
        frozen, settle = self.bn_soft == "frozen", self.refit_bn_batches if self.refit_bn else 0
        self._soft = open_gates(context, plan, self.coupling, self.stage_batches, frozen, settle, step, self._loaded)
        self._loaded = None

    def _plan(self, soft_steps: int) -> Plan:
        return Plan(
            self.budget, self.budget_type, soft_steps, self.stages, self._rate(soft_steps), self.w_budget, self.w_crisp,
            round((1 - self.ste_last) * soft_steps) if self.ste_last else soft_steps + 1,
            self.min_keep, self.round_to, self.fold,
        )  # fmt: skip

    def _anneal(self, trainer: Trainer, step: int) -> None:
        """Go on to a step; where a stage ends, log and keep what the gates look like, soft and hard."""
        assert self._soft is not None
        gates = self._soft.gates
        if stage_of(step, gates.plan.soft_steps, self.stages) > gates.stage:
            self.stage_records.append(record := self._soft.record())
            log_event(trainer, {f"prune/{k}": float(v) for k, v in record.items() if isinstance(v, (int, float))})
        gates.go_to(step)

    def _close(self, module: nn.Module) -> None:
        if self._soft is not None:
            self.psi = self._soft.close(module)
            self._soft = None
