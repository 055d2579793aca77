"""Lightning's own `ModelPruning` on the same module: what it does, and what this package does instead."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.toys import QUIET, Toy, fit, kept_of, toy
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import nn

from lightning_prune import Magnitude

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*FutureWarning")]

NAMES = ("conv", "hidden", "head")
WEIGHTS = [f"{name}.weight" for name in NAMES]


class CountZeros(ModelPruning):
    """Lightning's callback on the three weights that ours selects, with a note of the zeros after every epoch."""

    def __init__(self, module: Toy, permanent: bool = True) -> None:
        pairs = [(getattr(module, name), "weight") for name in NAMES]
        super().__init__("l1_unstructured", pairs, amount=0.5, make_pruning_permanent=permanent)
        self.sparsities: list[float] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        zeros = sum(int((getattr(pl_module, name).weight == 0).sum()) for name in NAMES)
        self.sparsities.append(zeros / Toy.TOTAL)


def zeros(module: nn.Module) -> int:
    return Toy.TOTAL - kept_of(module, WEIGHTS)


def saver(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)


def test_a_fixed_amount_compounds_in_lightning_and_not_here() -> None:
    module = toy()
    theirs = CountZeros(module)
    fit(module, theirs, max_epochs=3)
    assert theirs.sparsities == pytest.approx([0.5, 0.75, 0.875], abs=2 / Toy.TOTAL)
    ours = toy()
    fit(ours, Magnitude(0.5, measure=False), max_epochs=3)
    assert zeros(ours) == Toy.TOTAL // 2


def test_a_resume_loses_the_masks_in_lightning_and_not_here(tmp_path: Path) -> None:
    """`make_pruning_permanent` writes a dense checkpoint; what follows trains all weights again."""
    module = toy()
    fit(module, CountZeros(module), saver(tmp_path / "theirs"), enable_checkpointing=True)
    checkpoint = tmp_path / "theirs" / "epoch=1.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert sum(int((saved[name] == 0).sum()) for name in WEIGHTS) == pytest.approx(0.75 * Toy.TOTAL, abs=2)
    resumed = toy(seed=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(resumed, ckpt_path=checkpoint, max_epochs=3)
    assert zeros(resumed) < 0.1 * Toy.TOTAL

    ours = toy()
    fit(ours, Magnitude(0.5, measure=False), saver(tmp_path / "ours"), enable_checkpointing=True)
    resumed = toy(seed=5)
    fit(resumed, Magnitude(0.5, measure=False), ckpt_path=tmp_path / "ours" / "epoch=1.ckpt", max_epochs=3)
    assert zeros(resumed) == Toy.TOTAL // 2


def test_a_checkpoint_does_not_load_into_the_dense_module_in_lightning_and_does_here(tmp_path: Path) -> None:
    module = toy()
    trainer = fit(module, CountZeros(module, permanent=False))
    trainer.save_checkpoint(tmp_path / "theirs.ckpt")
    with pytest.raises(RuntimeError, match="Missing key"):
        toy().load_state_dict(torch.load(tmp_path / "theirs.ckpt", weights_only=True)["state_dict"])
    trainer = fit(toy(), Magnitude(0.5, measure=False))
    trainer.save_checkpoint(tmp_path / "ours.ckpt")
    toy().load_state_dict(torch.load(tmp_path / "ours.ckpt", weights_only=True)["state_dict"])
