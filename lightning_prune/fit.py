"""Facts about a running Trainer, read in one place: position, calibration batches, ranks, averaged copies, loggers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_prune.context import Proposal
from lightning_prune.objective import calibration_loader, map_loaders, read_batches
from lightning_prune.schedules import Position


def position_of(trainer: Trainer, pl_module: LightningModule, over: bool = False) -> Position:
    """Return where the fit stands.

    Steps are optimizer steps; with manual optimization, where one batch may step several optimizers several times,
    they are training batches. The length is None if it cannot be known (`max_epochs=-1`, a data stream without length).

    Args:
        over: the fit has ended, be it before its planned length.
    """
    automatic = pl_module.automatic_optimization
    step = trainer.global_step if automatic else trainer.fit_loop.epoch_loop.total_batch_idx + 1
    total = total_steps(trainer, pl_module)
    progress = None if total is None else min(1.0, step / total)
    ended = over or (total is not None and step >= total) or 0 < trainer.max_steps <= trainer.global_step
    return Position(step, trainer.current_epoch, 1.0 if over else progress, total, ended)


def total_steps(trainer: Trainer, pl_module: LightningModule) -> int | None:
    """Return the optimizer steps (batches, with manual optimization) of the whole fit; None if that is not known."""
    limits = [] if trainer.max_steps < 1 or not pl_module.automatic_optimization else [trainer.max_steps]
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        whole = steps_before_epoch(trainer, pl_module, trainer.max_epochs)
        limits += [] if whole is None else [whole]
    return min(limits, default=None)


def steps_before_epoch(trainer: Trainer, pl_module: LightningModule, epoch: int) -> int | None:
    """Return the steps taken when `epoch` epochs are done, at the accumulation each of them uses; None if not known.

    Every epoch is taken to be as long as the current one: what a reloaded data set will hold is not known in advance.
    """
    batches = trainer.num_training_batches
    if not math.isfinite(batches):
        return None
    if not pl_module.automatic_optimization:
        return epoch * int(batches)
    schedules = [c for c in trainer.callbacks if hasattr(c, "get_accumulate_grad_batches")]
    if not schedules:
        return epoch * math.ceil(batches / trainer.accumulate_grad_batches)
    return sum(math.ceil(batches / schedules[0].get_accumulate_grad_batches(done)) for done in range(epoch))


def check_strategy(trainer: Trainer) -> None:
    """Raise MisconfigurationException for strategies whose optimizer step cannot be masked."""
    name = type(trainer.strategy).__name__
    if "DeepSpeed" in name or name == "FSDPStrategy":
        raise MisconfigurationException(
            f"{name} partitions weights and steps them by itself, so masks cannot be enforced. Use 'ddp' or "
            "ModelParallelStrategy (FSDP2)."
        )


def check_optimizers(optimizers: Sequence[Any]) -> None:
    """Raise MisconfigurationException for optimizers whose steps cannot be followed."""
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer) or not hasattr(optimizer, "_optimizer_step_post_hooks"):
            raise MisconfigurationException(
                f"masks are enforced by a hook after each optimizer step, and {type(optimizer).__name__} has none. Derive it "
                "from torch.optim.Optimizer and call super().__init__."
            )


def calibration_source(
    trainer: Trainer, pl_module: LightningModule, loaders: Any, seed: int, event: int
) -> Callable[[int | None], Iterable[Any]]:
    """Return a function that reads batches of the training set (or of `loaders`) without disturbing the run.

    Every rank reads its own share; batches pass through the module's transfer hooks to its device, as in training.
    """
    source = trainer.train_dataloader if loaders is None else loaders
    if source is None:
        raise MisconfigurationException(
            "there is no training dataloader to calibrate on. Give `calibration_dataloader`."
        )
    seed = seed * 1_000_003 + event

    def batches(count: int | None) -> Iterable[Any]:
        own = map_loaders(source, lambda leaf: calibration_loader(leaf, seed, trainer.global_rank, trainer.world_size))
        for batch in read_batches(own, count, seed):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    return batches


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Return the mean of `tensor` over all ranks; on one process the tensor itself."""
    if _ranks() == 1:
        return tensor
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total / _ranks()


def same_on_all_ranks(proposal: Proposal, device: torch.device) -> Proposal:
    """Return rank 0's proposal on every rank: scores differ in the last bit between ranks, masks must not."""
    if _ranks() == 1:
        return proposal
    masks = {name: _from_first_rank(mask.to(device, torch.uint8)).bool() for name, mask in proposal.masks.items()}
    # a repair judges by a rank's own data, so that ranks may differ in which weights they propose
    given = None if proposal.weights is None else {name: value.dtype for name, value in proposal.weights.items()}
    said: list[Any] = [given, proposal.notes, proposal.certificate, proposal.repairs]
    torch.distributed.broadcast_object_list(said, src=0, device=device)
    if said[0] is None:
        return Proposal(masks, None, *said[1:])
    own = proposal.weights or {}
    weights = {
        name: _from_first_rank(
            own[name].to(device) if name in own else torch.zeros(masks[name].shape, dtype=dtype, device=device)
        )
        for name, dtype in said[0].items()
    }
    return Proposal(masks, weights, *said[1:])


def _from_first_rank(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
    torch.distributed.broadcast(tensor, src=0)
    return tensor


def _ranks() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def shadow_modules(trainer: Trainer) -> list[nn.Module]:
    """Return the averaged copies that EMA and SWA callbacks hold; unmasked they would bring pruned weights back."""
    averages = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
    return [getattr(average, "module", average) for average in averages if isinstance(average, nn.Module)]


def log_event(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Send one-off values to all loggers now (`LightningModule.log` would hold them back until the epoch ends)."""
    if not trainer.barebones:
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=trainer.global_step)


class ForwardRecorder:
    """Remembers the arguments of the first forward call of a module, to time it and count its FLOPs later."""

    def __init__(self) -> None:
        self.example: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._handle: Any = None

    def watch(self, module: nn.Module) -> None:
        """Take `example_input_array` if the module has one, else record the next forward call."""
        given = getattr(module, "example_input_array", None)
        if given is not None:
            self.example = (
                ((), dict(given))
                if isinstance(given, Mapping)
                else (given if isinstance(given, tuple) else (given,), {})
            )
        elif self.example is None and self._handle is None and getattr(module, "_compiled_call_impl", None) is None:
            self._handle = module.register_forward_pre_hook(self._record, with_kwargs=True)

    def forget(self) -> None:
        """Remove the hook; the example stays."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "forward" in module.__dict__:  # a strategy has put training_step in its place for this call
            return
        self.example = (_detached(args), _detached(kwargs))
        self.forget()


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {key: _detached(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_detached(item) for item in value)
    return value


def loss_scale(trainer: Trainer) -> float:
    """Return what a gradient scaler has multiplied the loss by; 1.0 without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def same_optimizer(one: Any, two: Any) -> bool:
    """Whether two optimizers, or Lightning's wrappers of them, are the same."""
    return getattr(one, "optimizer", one) is getattr(two, "optimizer", two)
