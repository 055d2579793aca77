"""A LightningModule that trains any classifier network.

Hyperparameters stay empty on purpose: a module or a `functools.partial` in them would make every checkpoint
unreadable with `weights_only=True`. Load one by `LitClassifier.load_from_checkpoint(path, network=...)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import (
    LRSchedulerConfigType,
    OptimizerLRScheduler,
    OptimizerLRSchedulerConfig,
)
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune.checks import check_choice, check_integer

__all__ = ["LitClassifier"]


class LitClassifier(pl.LightningModule):
    """Train a network to tell classes apart; log `train_loss`, and loss and accuracy as `val_*` and `test_*`.

    Args:
        network: from inputs (N, ...) to logits (N, num_classes).
        optimizer: called with the trainable parameters, such as a `functools.partial` of an optimizer class
            (in YAML: `_partial_: true`); None: SGD with learning rate 0.1 and momentum 0.9.
        scheduler: called with the optimizer, and with `total_steps`, the optimizer steps of the fit, if it
            has an argument of this name that is not set yet; None: a constant learning rate.
        scheduler_interval: when the scheduler steps: after every "epoch" or every optimizer "step".
        loss: from logits (N, num_classes) and classes (N,) to a scalar; None: cross-entropy.
        num_classes: number of classes, >= 2; None: the outputs of the network's last linear layer.
        input_shape: shape of one input without the batch, such as (1, 28, 28), for `example_input_array`;
            None: the `input_shape` of the data module, if it has one.
    Raises:
        ValueError: if `optimizer` or `scheduler` is no callable, `scheduler_interval` is unknown, or
            `num_classes` is below 2, or None and the network has no linear layer.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable | None = None,
        scheduler: Callable | None = None,
        scheduler_interval: str = "epoch",
        loss: nn.Module | None = None,
        num_classes: int | None = None,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_factory("optimizer", optimizer)
        check_factory("scheduler", scheduler)
        self.scheduler_interval = check_choice("scheduler_interval", scheduler_interval, ("epoch", "step"))
        self.num_classes = count_classes(network) if num_classes is None else num_classes
        check_integer("num_classes", self.num_classes, 2)
        self.network = network
        self._sharded = False  # Lightning calls `configure_model` once per fit, validation and test
        self.make_optimizer = default_optimizer if optimizer is None else optimizer
        self.make_scheduler = scheduler
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        self.val_accuracy = MulticlassAccuracy(self.num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(self.num_classes, average="micro")
        if input_shape is not None:
            self.example_input_array = example_input(input_shape)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (N, ...) -> logits (N, num_classes)."""
        return self.network(x)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of one batch of (inputs (N, ...), classes (N,)), a scalar."""
        inputs, classes = batch
        loss = self.loss(self(inputs), classes)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log `val_loss` and `val_accuracy` over the epoch."""
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log `test_loss` and `test_accuracy` over the epoch."""
        self._evaluate(batch, "test", self.test_accuracy)

    def _evaluate(self, batch: Sequence[Tensor], stage: str, accuracy: MulticlassAccuracy) -> None:
        inputs, classes = batch
        logits = self(inputs)
        accuracy.update(logits, classes)
        self.log(f"{stage}_loss", self.loss(logits, classes), sync_dist=True)
        self.log(f"{stage}_accuracy", accuracy, prog_bar=True)

    def setup(self, stage: str) -> None:
        """Take the example input from the data module's `input_shape` if none was given."""
        data = getattr(self.trainer, "datamodule", None)  # absent if the fit was given loaders
        shape = getattr(data, "input_shape", None)
        if self.example_input_array is None and shape is not None:
            self.example_input_array = example_input(shape)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Call the factories on the trainable parameters; Lightning does so at the start of every fit."""
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer, **self._length_arguments(self.make_scheduler))
        # only ReduceLROnPlateau reads the monitor
        config = LRSchedulerConfigType(scheduler=scheduler, interval=self.scheduler_interval, monitor="val_loss")
        return OptimizerLRSchedulerConfig(optimizer=optimizer, lr_scheduler=config)

    def configure_model(self) -> None:
        """Shard the network's parameters if the strategy brings a device mesh (FSDP2), else do nothing."""
        if self.device_mesh is None or self._sharded:
            return
        from torch.distributed.fsdp import fully_shard

        # by default the outermost module stays gathered after a forward pass: `parameters()` would then be
        # copies that the optimizer does not know, and a mask applied between two batches would be lost
        fully_shard(self.network, mesh=self.device_mesh["data_parallel"], reshard_after_forward=True)
        self._sharded = True

    def _length_arguments(self, factory: Callable) -> dict[str, int]:
        if not wants_total_steps(factory):
            return {}
        if self.scheduler_interval != "step":
            raise ValueError(
                f"`scheduler_interval` must be 'step' for a scheduler that is given `total_steps`, "
                f"got {self.scheduler_interval!r}. Set it to 'step', or give `total_steps` yourself."
            )
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("`max_epochs` must be finite for a scheduler that is given `total_steps`, got -1.")
        return {"total_steps": int(steps)}


def example_input(shape: Sequence[int]) -> Tensor:
    """Make two inputs of zeros, (2, *shape) as float32.

    Two: BatchNorm refuses a single sample in training, and tracers take a batch of one as constant.
    """
    return torch.zeros(2, *shape)


def default_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
    """Build SGD with learning rate 0.1 and momentum 0.9."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def check_factory(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is None or callable."""
    if value is not None and not callable(value):
        raise ValueError(
            f"`{name}` must be a callable that builds it, got {type(value).__name__}. "
            f"Give a functools.partial; in YAML add `_partial_: true`."
        )


def count_classes(network: nn.Module) -> int:
    """Read the number of classes off the last linear layer.

    Args:
        network: a module with at least one `nn.Linear`.
    Returns:
        The outputs of the last linear layer in the order of `network.modules()`.
    Raises:
        ValueError: if there is none.
    """
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(
            f"`num_classes` must be given for a network without nn.Linear to read it from, "
            f"got None for {type(network).__name__}."
        )
    return linear[-1].out_features


def wants_total_steps(factory: Callable) -> bool:
    """Tell whether `factory` has an argument `total_steps` that is not set yet.

    Args:
        factory: a function, a class, or a `functools.partial` of one.
    Returns:
        True if the length of the fit has to be filled in.
    """
    if "total_steps" in getattr(factory, "keywords", {}):
        return False
    return "total_steps" in inspect.signature(factory).parameters
