"""ProximalCallback: a method that acts after every optimizer step for a stretch of a fit, and leaves masks behind.

Phases, in optimizer steps: nothing before `begin`; from `begin` to `end` the method's penalty or projection after every
step; at `end` what is zero is handed to the MaskManager, and the rest of the fit is fine-tuning without any penalty.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.callback import PruningCallback
from lightning_prune.checks import check_integer, is_number
from lightning_prune.context import Context, Proposal
from lightning_prune.fit import calibration_source, log_event, mean_over_ranks, position_of, same_on_all_ranks
from lightning_prune.masks import MaskManager, check_finite
from lightning_prune.methods._prox_report import mean_loss, support
from lightning_prune.methods._prox_scale import check_steps, future_rates, reach
from lightning_prune.objective import Objective
from lightning_prune.schedules import Position, Ramp, check_bound
from lightning_prune.targets import select

__all__ = ["ProximalCallback", "check_penalty", "schedulers_of"]

METRIC_STEPS = 10  # steps after which the second moments of Adam are good enough to settle a penalty by


def check_penalty(value: Any) -> float | str:
    """Return a penalty: a finite number >= 0, or "auto".

    Raises:
        ValueError: anything else.
    """
    if value == "auto" or (is_number(value) and value >= 0):
        return "auto" if value == "auto" else float(value)
    raise ValueError(f"`penalty` must be a finite number >= 0 or 'auto', got {value!r}. Give a number such as 1e-3.")


class ProximalCallback(PruningCallback):
    """What the sparse proximal methods share.

    Args:
        begin: first step acted on, int (optimizer steps) or float in [0, 1] (fraction of the fit).
        end: when the zeros become masks, likewise, after `begin`.
        objective_batches: calibration batches (>= 0) on which loss + penalty is evaluated for the loggers at the end of
            periods and epochs, in eval mode; 0: it is not.
        **common: see `PruningCallback`.
    Raises:
        ValueError: an argument breaks its rule.
    """

    shards: ClassVar[bool] = False
    needs_step_scale: bool = False  # whether a threshold must match the optimizer's steps
    by_default: bool = False  # whether the penalty is the published one, which nobody asked for

    def __init__(self, begin: int | float, end: int | float, objective_batches: int = 4, **common: Any) -> None:
        super().__init__(**common)
        self.objective_batches = check_integer("objective_batches", objective_batches, 0)
        self.begin, self.end = check_bound("begin", begin), check_bound("end", end)
        if type(begin) is type(end) and begin >= end:
            raise ValueError(f"`begin` must lie before `end`, got {begin} and {end}.")
        self._ramp = Ramp(self.begin, self.end, 1)

    @property
    @override
    def removes_channels(self) -> bool:
        """True unless single weights are penalized."""
        return bool(getattr(self, "structured", True))

    @override
    def reset(self) -> None:
        super().reset()
        self._step = 0  # real optimizer steps of this fit (batches, with manual optimization)
        self._moved = False
        self._over = False  # whether the fit has ended
        self._complete = False
        self._zeros = 0  # when this was last logged
        self._logged = -1  # the step at which it was
        self._no_loss = False  # whether the loss could not be evaluated
        self._bounds: tuple[int, int] | None = None
        self._saved: dict[str, Any] | None = None
        self._engine: Any = None
        self._handles: list[Any] = []

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_engine": None, "_handles": [], "_saved": None}

    @property
    def bounds(self) -> tuple[int, int]:
        """First step acted on and the step of the freeze, in optimizer steps of this fit."""
        return self._bounds or (0, 1)

    # what a method answers

    @abstractmethod
    def make_engine(self, context: Context, trainer: Trainer) -> Any:
        """Return what acts on the optimizers' steps, a `Penalty` or a `Removal`."""

    def settle(self, trainer: Trainer) -> None:
        """Settle the penalty once: at `begin`, or after some steps where the optimizer's metric must be seen first."""
        begin, end = self.bounds
        wait = min(METRIC_STEPS, max(1, (end - begin) // 10)) if self._engine.learns_metric else 0
        if self._engine.settled or self._step < begin + wait:
            return
        report = self._engine.settle(self.reaches(trainer))
        log_event(trainer, {f"prune/{name}": value for name, value in report.items()})
        if report["penalty"] > 0.0:
            self._report(report, end)

    def _report(self, report: Mapping[str, float], end: int) -> None:
        budget, median = report["shrink_budget"], report["median"]
        rank_zero_info(
            f"{self.method}: penalty {report['penalty']:.4g}; until step {end} it takes a norm of {budget:.4g} from what no "
            f"gradient defends (median norm {median:.4g}): {report['reachable']:.0%} could become zero"
        )
        if budget < median and not self.by_default:
            rank_zero_warn(
                f"{self.method}: `penalty`={report['penalty']:.4g} takes a norm of {budget:.4g} at most until step {end}, less "
                f"than the median norm {median:.4g}: {report['reachable']:.0%} can become zero. Raise `penalty` (or use "
                "'auto'), the learning rate or `end`."
            )

    # the fit

    @override
    def check_fit(self, trainer: Trainer, position: Position, resumed: bool) -> None:
        for optimizer in trainer.optimizers:
            check_steps(optimizer, self.needs_step_scale)
        for name, weight in select(trainer.lightning_module, self.include, self.exclude).items():
            check_finite(name, weight.detach())
        self._bounds = self._bounds_of(trainer, position)
        if self._saved is None:  # no state of this fit: its clock starts where the fit stands
            self._step = position.step
        if position.step > self._bounds[0] and not resumed and not self.finished:
            raise MisconfigurationException(
                f"`begin` (step {self._bounds[0]}) lies before step {position.step}, at which this fit goes on from a "
                "checkpoint that was not pruned. Load the weights without `ckpt_path` (a fit of its own), or choose a "
                "later `begin`."
            )

    def _bounds_of(self, trainer: Trainer, position: Position) -> tuple[int, int]:
        if trainer.fast_dev_run:
            return 0, max(1, position.total_steps or 1)
        try:
            begin, end = self._ramp.bounds(position.total_steps)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        return begin, max(end, begin + 1)

    def steps_of(self, name: str, position: Position, trainer: Trainer) -> int:
        """Return the argument `name`, a number of steps or a fraction of the fit, in steps.

        Raises:
            MisconfigurationException: it is a fraction, and the length of the fit is not known.
        """
        value = getattr(self, name)
        if isinstance(value, int):
            return value
        if trainer.fast_dev_run:
            return 0
        if position.total_steps is None:
            raise MisconfigurationException(
                f"`{name}`={value} is a fraction of the fit, whose length is not known (max_epochs or max_steps is -1). "
                "Give an int (optimizer steps)."
            )
        return round(value * position.total_steps)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unhook(pl_module)
        self._saved = None  # what a checkpoint holds comes back below; a fit of its own starts its clock anew
        super().on_train_start(trainer, pl_module)
        if self.finished:
            return
        self._engine = self.make_engine(self._context(trainer, pl_module, 0.0), trainer)
        if self._saved is not None:
            self._engine.load_state_dict(self._saved)
            self._saved = None
        self._handles = [part.optimizer.register_step_pre_hook(self._before_step) for part in self._engine.parts]
        self._engine.agree = lambda mask: same_on_all_ranks(Proposal({"": mask}), pl_module.device).masks[""].cpu()
        MaskManager.of(pl_module).projections.append(self._after_step)
        self._advance(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._engine is not None and (self._moved or not pl_module.automatic_optimization):
            self._moved = False
            manual = not pl_module.automatic_optimization
            self._step = position_of(trainer, pl_module).step if manual else self._step + 1
        events = self.events
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.events > events:
            self._log_support(trainer, pl_module)
        if self.finished:
            self._unhook(pl_module)
        self._advance(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._step > self.bounds[0]:
            self._log_support(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        events = self.events
        super().on_train_end(trainer, pl_module)
        if self.events > events:
            self._log_support(trainer, pl_module)

    @override
    def due(self, position: Position) -> float | None:
        """The engine's target when it has something to commit; the final one when the fit ends before that."""
        if self._engine is None or self.finished:
            return None
        self._over = position.ended
        if self._over:
            return float(self._engine.final_target)
        return float(self._engine.target) if self._engine.due(self._step) else None

    @property
    @override
    def finished(self) -> bool:
        return self._complete

    @override
    def mark_done(self, position: Position) -> None:
        super().mark_done(position)
        self._complete = self._engine.committed(self._over)

    @override
    def propose(self, context: Context) -> Proposal:
        """Propose what the engine holds at zero."""
        if self._engine is None:
            raise ValueError(
                f"{self.method} works while a network is trained. Add it to a Trainer's callbacks, or use a one-shot method."
            )
        return self._engine.propose(context, self._over)

    @override
    def extra_state(self) -> dict[str, Any]:
        return {
            "step": self._step,
            "complete": self._complete,
            "zeros": self._zeros,
            "engine": None if self.finished else self._engine_state(),
        }

    @override
    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self._step, self._complete, self._saved = int(state["step"]), bool(state["complete"]), state["engine"]
        self._zeros = int(state.get("zeros", 0))

    def reaches(self, trainer: Trainer) -> dict[Optimizer, list[float]]:
        """Return sum_t a_t kappa_t from now to `end` for every param group (kappa = 1 where none is matched)."""
        left = max(0, self.bounds[1] - self._step)
        found = {}
        for part in self._engine.parts:
            optimizer = part.optimizer
            rates = future_rates(optimizer, schedulers_of(trainer, optimizer), left)
            groups = zip(rates, optimizer.param_groups, strict=True)
            matched = self.needs_step_scale
            found[optimizer] = [reach(rate, group if matched else {}, part.steps) for rate, group in groups]
        return found

    def _engine_state(self) -> dict[str, Any] | None:
        return self._saved if self._engine is None else self._engine.state_dict()

    def _advance(self, trainer: Trainer) -> None:
        if self._engine is not None and self._step >= self.bounds[0]:
            self._engine.advance(self._step)
            self.settle(trainer)

    def _log_support(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send what is zero, the penalty and the objective to the loggers, once per step."""
        if self._engine is None or self._logged == self._step or trainer.barebones or not trainer.loggers:
            return
        zeros = self._engine.zeros()
        values = support(zeros, self._engine.unit, self._zeros)
        self._zeros, self._logged = int(values["prune/zeros"]), self._step
        penalized = self._engine.penalized()
        if penalized is not None:
            values["prune/penalty"] = self._engine.value
        loss = None if self._no_loss or not self.objective_batches else self._loss(trainer, pl_module)
        if loss is not None:
            values["prune/objective"] = loss + (penalized or 0.0)
        log_event(trainer, values)

    def _loss(self, trainer: Trainer, pl_module: LightningModule) -> float | None:
        """The loss in eval mode on the same few calibration batches every time; None where it cannot be had."""
        try:
            source = calibration_source(trainer, pl_module, self.calibration_dataloader, self.seed, 0)
            objective = Objective(pl_module, source, self.loss_fn, trainer, mean_over_ranks, seed=self.seed)
            return mean_loss(objective, self.objective_batches)
        except Exception as error:  # a training must survive a number for its log that cannot be had
            expected = isinstance(error, (ValueError, MisconfigurationException))  # a loss that no method could use
            say = rank_zero_info if expected else rank_zero_warn
            say(f"{self.method}: `prune/objective` is not logged ({type(error).__name__}: {error}).")
            self._no_loss = True
            return None

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for part in self._parts_of(optimizer):
            self._engine.before(part, self._step)

    def _after_step(self, optimizer: Optimizer) -> None:
        skipped = getattr(optimizer, "found_inf", None)  # an optimizer that looks at the gradient scale by itself
        if isinstance(skipped, torch.Tensor) and bool(skipped):
            return
        for part in self._parts_of(optimizer):
            self._moved = True
            self._engine.after(part, self._step)

    def _parts_of(self, optimizer: Optimizer) -> list[Any]:
        return [] if self._engine is None else [part for part in self._engine.parts if part.optimizer is optimizer]

    def _unhook(self, pl_module: LightningModule) -> None:
        self._saved = self._engine_state() if not self.finished else None
        for handle in self._handles:
            handle.remove()
        self._engine, self._handles = None, []
        projections = MaskManager.of(pl_module).projections
        if self._after_step in projections:
            projections.remove(self._after_step)

    @override
    def _release(self, pl_module: LightningModule) -> None:
        self._unhook(pl_module)
        super()._release(pl_module)


def schedulers_of(trainer: Trainer, optimizer: Optimizer) -> list[tuple[Any, int]]:
    """The learning rate schedulers of an optimizer, with the optimizer steps between two of their own."""
    if not trainer.lightning_module.automatic_optimization:
        return []  # stepped by the user's code; the rate is taken to stay
    batches = trainer.num_training_batches
    epoch = max(1, int(batches // trainer.accumulate_grad_batches)) if batches != float("inf") else 10**9
    found = []
    for config in trainer.lr_scheduler_configs:
        if config.scheduler.optimizer is optimizer and not config.reduce_on_plateau:
            found.append((config.scheduler, config.frequency * (1 if config.interval == "step" else epoch)))
    return found
