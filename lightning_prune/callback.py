"""PruningCallback: the only code that knows Lightning's hooks and checkpoints.

A method subclasses it and answers two questions: `due` (is it time, and how sparse?) and `propose` (which weights
stay?). Everything else is settled here: binding after restore, enforcement through the shared MaskManager, state, ranks,
logs.
"""

from __future__ import annotations

import time
import weakref
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.batch_norm import batch_norms
from lightning_prune.checks import check_bool, check_integer
from lightning_prune.context import Context, Proposal, changes, describe_event, event_generator
from lightning_prune.fit import (
    ForwardRecorder,
    calibration_source,
    check_optimizers,
    check_strategy,
    log_event,
    mean_over_ranks,
    position_of,
    same_on_all_ranks,
    shadow_modules,
)
from lightning_prune.masks import DTensor, MaskManager, full
from lightning_prune.objective import Objective
from lightning_prune.schedules import Position
from lightning_prune.targets import check_patterns, select

STATE_VERSION = 1
RNG_STATE_KEY = "lightning_prune.rng_state"


class PruningCallback(Callback):
    """What all methods share. Methods subclass it or `OneShotPruning`.

    Args:
        include: names or patterns of what may be pruned (see `targets.select`); None: the weights of all linear
            layers and convolutions.
        exclude: names or patterns of what may not.
        loss_fn: `loss_fn(module, batch) -> scalar tensor` for methods that need a loss; None: `training_step`.
        calibration_dataloader: batches for methods that need data; None: the training set, read separately.
        seed: of everything random in the method, >= 0.
        mask_gradients: zero the gradients of pruned weights before each step; the weights are zeroed after it anyway.
        masks_from_zeros: take exact zeros of the selected weights as pruned when the fit starts.
        name: sets this callback apart from another one of the same class in one Trainer.
        measure: time the module and count its FLOPs for the receipt when training ends.
        refit_bn: re-estimate BatchNorm statistics after every pruning event (of a module that has any).
        refit_bn_batches: calibration batches for that, >= 1.
    Raises:
        ValueError: an argument breaks its rule.
    """

    method: ClassVar[str] = ""  # constant, so that renaming a class does not orphan its checkpoints
    shards: ClassVar[bool] = True  # whether the method works on sharded (DTensor) parameters
    prunes_trained: ClassVar[bool] = True  # False for methods that prune at initialization

    def __init__(
        self,
        include: Sequence[str] | str | None = None,
        exclude: Sequence[str] | str = (),
        loss_fn: Any = None,
        calibration_dataloader: Any = None,
        seed: int = 0,
        mask_gradients: bool = True,
        masks_from_zeros: bool = False,
        name: str | None = None,
        measure: bool = True,
        refit_bn: bool = False,
        refit_bn_batches: int = 40,
    ) -> None:
        super().__init__()
        self.include = check_patterns("include", include)
        self.exclude = check_patterns("exclude", exclude) or ()
        self.loss_fn = loss_fn
        self.calibration_dataloader = calibration_dataloader
        self.seed = check_integer("seed", seed, 0)
        self.mask_gradients = check_bool("mask_gradients", mask_gradients)
        self.masks_from_zeros = check_bool("masks_from_zeros", masks_from_zeros)
        self.measure = check_bool("measure", measure)
        self.refit_bn = check_bool("refit_bn", refit_bn)
        self.refit_bn_batches = check_integer("refit_bn_batches", refit_bn_batches, 1)
        self.name = None if name is None else str(name)
        self.receipt: Any = None
        self.reset()

    @property
    @override
    def state_key(self) -> str:
        """Key of this callback's state in checkpoints."""
        return f"lightning_prune.{self.name or self.method}"

    @property
    def final_target(self) -> float:
        """The sparsity (or budget) this method ends at."""
        return float(getattr(self, "sparsity", 0.0))

    @property
    def requested(self) -> dict[str, Any]:
        """What the receipt says was asked: {"sparsity"}, or {"budget", "budget_type"} of what may remain."""
        return {"sparsity": self.final_target}

    @property
    def removes_channels(self) -> bool:
        """Whether whole channels go, so that the receipt is about a smaller module."""
        return "budget_type" in self.requested

    @abstractmethod
    def due(self, position: Position) -> float | None:
        """Return the target to prune to now, or None. Asked at the start, after every epoch and every batch."""

    @abstractmethod
    def propose(self, context: Context) -> Proposal:
        """Return masks (and optionally values) for `context.target`; change nothing."""

    def mark_done(self, position: Position) -> None:
        """Called after a proposal is committed."""
        self.events += 1
        self.last_step = position.step

    def check_fit(self, trainer: Trainer, position: Position, resumed: bool) -> None:
        """Raise MisconfigurationException if this fit can never reach a moment at which the method acts."""

    def reset(self) -> None:
        """Forget everything about the model pruned before, so that this callback can prune another one."""
        self.events = 0
        self.last_step = -1
        self.history: list[dict[str, Any]] = []
        self._pending: dict[str, Any] | None = None
        self._bound: weakref.ref[nn.Module] | None = None
        self._fitting: weakref.ref[nn.Module] | None = None
        self._primary: bool = getattr(self, "_primary", True)
        self._started = False
        self._recorder = ForwardRecorder()
        self.receipt = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickled callback keeps what it did, not the module it did it to."""
        return {**self.__dict__, "_bound": None, "_fitting": None, "_recorder": ForwardRecorder()}

    # Lightning's hooks, in the order in which they run

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_strategy(trainer)
        self._fitting = weakref.ref(pl_module)
        self._started = False
        self._primary = next(c for c in trainer.callbacks if isinstance(c, PruningCallback)) is self
        if self._primary:
            MaskManager.of(pl_module).detach()

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        ours = {callback.state_key for callback in trainer.callbacks if isinstance(callback, PruningCallback)}
        held = {key for key in checkpoint.get("callbacks", {}) if str(key).startswith("lightning_prune.")}
        held.discard(RNG_STATE_KEY)
        if not held:  # a dense checkpoint: what this module and this callback have been through since is undone
            fitting = self._fitting
            self.reset()
            self._fitting = fitting
            MaskManager.of(pl_module).clear()
        if held - ours:
            raise MisconfigurationException(
                f"the checkpoint was pruned by {sorted(held)}, but this Trainer holds {sorted(ours)}. Use the same pruning "
                "callbacks to resume; to go on from its weights, load them without `ckpt_path` and set masks_from_zeros=True."
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._pending is not None:
            return self._pending
        module = self._module_of_this_fit()
        if module is None:
            return {"version": STATE_VERSION, "method": self.method, "bound": False}
        masks = MaskManager.of(module).state_dict() if self._primary else {}
        return {
            "version": STATE_VERSION,
            "method": self.method,
            "bound": True,
            "primary": self._primary,
            "done": self.finished,
            "events": self.events,
            "last_step": self.last_step,
            "history": [dict(event) for event in self.history],
            "masks": masks,
            **self.extra_state(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # kept until on_train_start, when the module is whole; one saved before that (by a learning rate finder) is empty
        self._pending = dict(state_dict) if state_dict.get("bound", True) else None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = True
        check_optimizers(trainer.optimizers)
        targets = select(pl_module, self.include, self.exclude)
        self._check_module(pl_module, targets)
        resumed = self._pending is not None or self.events > 0
        manager = MaskManager.of(pl_module)
        if self._pending is not None:
            self._restore(manager)
        self._bound = weakref.ref(pl_module)
        self.check_fit(trainer, position_of(trainer, pl_module), resumed)
        manager.attach(trainer.optimizers, mask_state=False)
        manager.shadows = lambda: shadow_modules(trainer)
        if self.masks_from_zeros and not resumed and not manager.masks:
            manager.set_masks({name: full(weight.detach()) != 0 for name, weight in targets.items()})
        self._recorder.watch(pl_module)
        self._act(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._act(trainer, pl_module)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._primary and self.mask_gradients:
            MaskManager.of(pl_module).mask_gradients(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._act(trainer, pl_module)
        if self._primary:
            MaskManager.of(pl_module).apply_unowned()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.due(position_of(trainer, pl_module, over=True)) is not None:
            rank_zero_warn(
                f"{self.method}: training ended before its last planned step; pruning now. Metrics logged and checkpoints "
                "written so far are those of the network before."
            )
            self._act(trainer, pl_module, over=True)
        self._recorder.forget()
        MaskManager.of(pl_module).settle()
        self._write_receipt(trainer, pl_module)
        # enforcement lasts until teardown: other callbacks may still prune, or copy averaged weights, after this one

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            if not self._started and not self.finished:
                rank_zero_warn(
                    f"{self.method}: the fit had no training batch, so nothing was pruned. "
                    "Prune without training by lightning_prune.prune(module, method)."
                )
            self._release(pl_module)

    # how they are served

    def prepare_repair(self, context: Context, proposal: Proposal) -> bool:
        """Whether `repair` has something to do; raises before anything has changed if it could not be done."""
        if not changes(context, proposal) or not self.refit_bn or not batch_norms(context.module):
            return False
        context.objective.check_batches()
        return True

    def repair(self, context: Context, proposal: Proposal) -> None:
        """Called after a proposal is in force: what can be put right without training; says so in its notes."""
        used = context.objective.refit_batch_norm(self.refit_bn_batches)
        proposal.repairs.append(f"BatchNorm statistics re-estimated on {used} batches")

    @property
    def finished(self) -> bool:
        """Whether no further event will come."""
        return self.events > 0

    def extra_state(self) -> dict[str, Any]:
        """Further plain values for the checkpoint (tensors, str, int, float, bool, None, list, tuple, dict)."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `extra_state` gave."""

    def _module_of_this_fit(self) -> nn.Module | None:
        """The bound module, unless another fit with another module has begun."""
        module = None if self._bound is None else self._bound()
        return module if self._fitting is None or self._fitting() is module else None

    def _check_module(self, pl_module: LightningModule, targets: Mapping[str, nn.Parameter]) -> None:
        if not self.shards and any(isinstance(p, DTensor) for p in targets.values()):
            raise MisconfigurationException(
                f"{self.method} cannot score sharded parameters (FSDP). Prune before sharding with `prune(...)`, or use "
                "a magnitude method."
            )
        another = self._bound is not None and self._bound() is not pl_module
        if another and self.events > 0 and self._pending is None and not MaskManager.of(pl_module).masks:
            raise MisconfigurationException(
                f"this {type(self).__name__} has pruned another module. Call its reset() to prune this one anew, or carry "
                "the masks over: MaskManager.of(new).set_masks(MaskManager.of(old).masks)."
            )

    def _restore(self, manager: MaskManager) -> None:
        state, self._pending = self._pending or {}, None
        if state.get("method") != self.method:
            raise MisconfigurationException(
                f"the checkpoint's state {self.state_key!r} is of method {state.get('method')!r}, this callback is "
                f"{self.method!r}. Use the same method to resume, or another `name`."
            )
        if state["primary"]:  # the one that holds the masks of all; none in force is a state too
            manager.load_state_dict(state["masks"])
        self.events, self.last_step = int(state["events"]), int(state["last_step"])
        self.history = [dict(event) for event in state["history"]]
        self.load_extra_state(state)

    def _act(self, trainer: Trainer, pl_module: LightningModule, over: bool = False) -> None:
        position = position_of(trainer, pl_module, over)
        target = self.due(position)
        if target is None:
            return
        started = time.perf_counter()
        manager = MaskManager.of(pl_module)
        context = self._context(trainer, pl_module, target)
        proposal = same_on_all_ranks(self.propose(context), pl_module.device)
        repairable = self.prepare_repair(context, proposal)
        manager.set_masks(proposal.masks, proposal.weights)
        if repairable:
            self.repair(context, proposal)
        self.mark_done(position)
        self.history.append(describe_event(manager, proposal, target, position, time.perf_counter() - started))
        self._announce(trainer, self.history[-1])

    def _context(self, trainer: Trainer, pl_module: LightningModule, target: float) -> Context:
        targets = select(pl_module, self.include, self.exclude)
        bar = trainer.progress_bar_callback
        return Context(
            module=pl_module,
            weights={name: full(weight.detach()) for name, weight in targets.items()},
            alive=MaskManager.of(pl_module).alive(targets),
            target=target,
            event=self.events,
            generator=event_generator(self.seed, self.events),
            make_objective=lambda: Objective(
                pl_module,
                calibration_source(trainer, pl_module, self.calibration_dataloader, self.seed, self.events),
                self.loss_fn,
                trainer,
                mean_over_ranks,
                seed=self.seed,
            ),
            example=self._recorder.example,
            show_progress=trainer.is_global_zero and bar is not None and bar.is_enabled,
        )

    def _announce(self, trainer: Trainer, event: Mapping[str, Any]) -> None:
        kind = self.requested.get("budget_type")
        asked = f"at most {event['requested']:.6g} of the {kind}" if kind else f"{event['requested']:.6g}"
        rank_zero_info(
            f"{self.method}: asked {asked}, got sparsity {event['sparsity']:.6g} "
            f"({event['kept']} of {event['total']} weights kept) at step {event['step']} in {event['seconds']:.2f} s"
        )
        if event["emptied"]:
            rank_zero_warn(
                f"{self.method} left no weight in {', '.join(event['emptied'])}: nothing passes through a layer that is "
                "all zero. Keep a part of every layer (`layer_floor`, `min_keep_per_layer`) or lower the sparsity."
            )
        log_event(trainer, {"prune/sparsity": event["sparsity"], "prune/n_active": float(event["kept"])})

    def _write_receipt(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from lightning_prune.report import fit_receipt  # it reads this module's classes

        if not trainer.is_global_zero:
            return
        sharded = any(isinstance(parameter, DTensor) for parameter in pl_module.parameters())
        example = self._recorder.example if self.measure and not sharded else None
        try:
            self.receipt = fit_receipt(self, pl_module, example)
        except Exception as error:  # a finished training must survive a receipt that cannot be written
            rank_zero_warn(f"{self.method}: no receipt could be written ({type(error).__name__}: {error}).")
            return
        if self.measure and not trainer.barebones:
            self.receipt.show()

    def _release(self, pl_module: LightningModule) -> None:
        self._recorder.forget()
        MaskManager.of(pl_module).detach()
