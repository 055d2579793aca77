"""Tuners before a fit, interruptions within it, further fits and other models after it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.toys import (
    QUIET,
    STEPS,
    Toy,
    Watch,
    fit,
    kept_of,
    leaks,
    make_trainer,
    masks_of,
    same,
    toy,
    toy_data,
    toy_loader,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_prune import GradualMagnitude, Magnitude, MaskManager

pytestmark = QUIET


def magnitude(at: Any = "start", sparsity: float = 0.5, **arguments: Any) -> Magnitude:
    return Magnitude(sparsity, at=at, measure=False, **arguments)


def gradual() -> GradualMagnitude:
    return GradualMagnitude(0.5, every_n_steps=1, measure=False)


class Tuned(Toy):
    """With the attributes that Lightning's tuners look for."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.lr, self.batch_size = 0.05, 2

    def train_dataloader(self) -> DataLoader:
        return DataLoader(toy_data(), batch_size=self.batch_size)

    val_dataloader = train_dataloader

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuners write their temporary checkpoints into the working folder."""
    monkeypatch.chdir(tmp_path)


tuning = pytest.mark.filterwarnings("ignore:.*weights_only")


@tuning
@pytest.mark.usefixtures("in_folder")
@pytest.mark.parametrize("make", [magnitude, lambda: magnitude(1), gradual])
@pytest.mark.parametrize(
    "tuner", [lambda: LearningRateFinder(num_training_steps=5), lambda: BatchSizeFinder("power", max_trials=1)]
)
def test_a_tuner_before_the_fit_disturbs_nothing(tuner: Callable[[], Any], make: Callable[[], Any]) -> None:
    module, callback, watch = toy(kind=Tuned), make(), Watch()
    trainer = make_trainer(callback, tuner(), watch)
    trainer.fit(module)
    assert kept_of(module, masks_of(module)) == Toy.TOTAL // 2
    assert watch.steps == trainer.global_step
    assert watch.found == [] == leaks(module)
    assert callback.history[-1]["step"] <= trainer.global_step


@tuning
@pytest.mark.usefixtures("in_folder")
def test_the_learning_rate_finder_keeps_masks_from_zeros() -> None:
    module = toy(kind=Tuned)
    with torch.no_grad():
        module.hidden.weight[:6] = 0
    callback = magnitude("end", 0.1, masks_from_zeros=True)
    make_trainer(callback, LearningRateFinder(num_training_steps=5)).fit(module)
    assert not module.hidden.weight[:6].any()


@tuning
@pytest.mark.usefixtures("in_folder")
def test_the_learning_rate_finder_does_not_hide_that_the_model_is_another() -> None:
    callback = magnitude()
    make_trainer(callback).fit(toy(kind=Tuned))
    other = toy(seed=1, kind=Tuned)
    with pytest.raises(MisconfigurationException, match="has pruned another module"):
        make_trainer(callback, LearningRateFinder(num_training_steps=5)).fit(other)
    assert masks_of(other) == {}


@tuning
@pytest.mark.usefixtures("in_folder")
def test_the_learning_rate_finder_in_a_second_fit_keeps_the_masks() -> None:
    module, callback, watch = toy(kind=Tuned), magnitude(), Watch()
    make_trainer(callback).fit(module)
    masks = masks_of(module)
    make_trainer(callback, LearningRateFinder(num_training_steps=5), watch).fit(module)
    assert same(masks_of(module), masks)
    assert watch.found == [] == leaks(module)
    assert len(callback.history) == 1


def test_an_interrupt_leaves_no_hook_behind() -> None:
    class Interrupt(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 3:
                raise KeyboardInterrupt

    module = toy()
    trainer = make_trainer(magnitude(), Interrupt())
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(module, toy_loader())
    assert all(not optimizer._optimizer_step_post_hooks for optimizer in trainer.optimizers)
    assert leaks(module) == []


def test_a_callback_that_has_pruned_nothing_yet_serves_another_model() -> None:
    class Boom(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("the user's own error")

    callback = magnitude(1)
    with pytest.raises(RuntimeError, match="own error"):
        fit(toy(), callback, Boom())
    other = toy(seed=1)
    fit(other, callback)
    assert kept_of(other, masks_of(other)) == Toy.TOTAL // 2


def test_masks_can_be_carried_over_to_another_model() -> None:
    callback, old, new, watch = magnitude(), toy(), toy(seed=1), Watch()
    fit(old, callback)
    MaskManager.of(new).set_masks(MaskManager.of(old).masks)
    fit(new, callback, watch)
    assert same(masks_of(new), masks_of(old))
    assert watch.found == []
    assert watch.pruned_steps == 2 * STEPS


@pytest.mark.parametrize("replacement", [torch.nn.Linear(12, 5), torch.nn.Sequential(torch.nn.Linear(12, 3))])
def test_a_layer_replaced_after_pruning_is_named(replacement: Any) -> None:
    module = toy()
    fit(module, magnitude())
    module.head = replacement
    with pytest.raises((ValueError, RuntimeError), match=r"head\.weight"):
        fit(module, magnitude(name="second"))


def test_a_pruned_model_dies_when_it_is_dropped() -> None:
    """Lightning's own callback was blamed for holding on to a copy of the model of every fit."""
    module = toy()
    fit(module, magnitude())
    memory = [weakref.ref(module), *(weakref.ref(parameter) for parameter in module.parameters())]
    del module
    gc.collect()
    assert [reference() for reference in memory] == [None] * len(memory)


def test_a_fit_without_batches_says_that_nothing_was_pruned() -> None:
    module = toy()
    with pytest.warns(UserWarning, match="had no training batch, so nothing was pruned"):
        fit(module, Magnitude(0.5, measure=False), max_epochs=0)
    assert not MaskManager.of(module).masks
