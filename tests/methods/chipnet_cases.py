"""What the tests of ChipNet share: a callback for short fits, and what it looks like after every batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from integration.toys import (
    STEPS,
    fit,
    toy,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_prune import ChipNet

SOFT = STEPS  # half of a two-epoch fit


def chipnet(budget: float = 0.5, **arguments: Any) -> ChipNet:
    return ChipNet(budget, **{"gate_lr": 5.0, "measure": False, "refit_bn_batches": 2, **arguments})


class Trace(Callback):
    """Keeps psi, the temperature and the norm's statistics after every batch."""

    def __init__(self, callback: ChipNet) -> None:
        self.callback = callback
        self.psi: list[Tensor] = []
        self.gammas: list[float] = []
        self.means: list[Tensor] = []
        self.flags: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        soft = self.callback._soft
        psi = self.callback.psi if soft is None else soft.gates.psi
        self.psi.append(psi.detach().cpu().clone())
        self.gammas.append(float("inf") if soft is None else soft.gates.temperature.gamma)
        self.means.append(pl_module.norm.running_mean.clone())
        self.flags.append(pl_module.norm.training)


def traced(module: Any = None, callback: ChipNet | None = None, **settings: Any) -> tuple[Any, ChipNet, Trace]:
    module = toy() if module is None else module
    callback = chipnet() if callback is None else callback
    trace = Trace(callback)
    fit(module, callback, trace, **settings)
    return module, callback, trace


class Saver(ModelCheckpoint):
    """Keeps a checkpoint of every step."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
