"""EMA and SWA end exactly sparse: they copy weights from before a mask appeared back into the module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.toys import QUIET, STEPS, Toy, Watch, fit, leaks, make_trainer, masks_of, toy, toy_loader
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging

from lightning_prune import GradualMagnitude, Magnitude, RandomPruning

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:.*training ended before its last planned step"),
    pytest.mark.filterwarnings("ignore:The checkpoint was not created with WeightAveraging"),
]

METHODS: dict[str, Callable[[], Any]] = {
    "start": lambda: Magnitude(0.5, measure=False),
    "mid-training": lambda: Magnitude(0.5, at=0.5, measure=False),
    "second-epoch": lambda: Magnitude(0.5, at=1, measure=False),
    "end": lambda: Magnitude(0.5, at="end", measure=False),
    "gradual": lambda: GradualMagnitude(0.5, every_n_steps=1, measure=False),
}


class WithoutNorm(Toy):
    """SWA adds an epoch for BatchNorm statistics; this module needs none."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.norm = torch.nn.Identity()


AVERAGES: dict[str, tuple[type[Toy], Callable[[], Any]]] = {
    "ema": (Toy, lambda: EMAWeightAveraging(decay=0.9)),
    "ema-late": (Toy, lambda: EMAWeightAveraging(decay=0.9, update_starting_at_step=STEPS + 2)),
    "mean": (Toy, WeightAveraging),
    "swa": (WithoutNorm, lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)),
    "swa-norm": (Toy, lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)),
}


def ordered(order: str, method: Callback, average: Callback) -> list[Callback]:
    return [method, average] if order == "pruning-first" else [average, method]


@pytest.fixture(params=["pruning-first", "average-first"])
def order(request: pytest.FixtureRequest) -> str:
    return request.param


PAIRS = [(method, "ema") for method in METHODS] + [
    ("mid-training", average) for average in AVERAGES if average != "ema"
]


@pytest.mark.parametrize(("method", "average"), PAIRS)
def test_the_averaged_module_is_exactly_sparse(method: str, average: str, order: str) -> None:
    kind, make_average = AVERAGES[average]
    module, watch = toy(kind=kind), Watch()
    fit(module, *ordered(order, METHODS[method](), make_average()), watch, max_epochs=3)
    kept = sum(int(mask.sum()) for mask in masks_of(module).values())
    assert kept == Toy.TOTAL // 2
    assert watch.found == [] == leaks(module)


@pytest.mark.parametrize("method", ["mid-training", "gradual"])
def test_both_copies_in_the_checkpoint_are_sparse(method: str, order: str, tmp_path: Path) -> None:
    module = toy()
    saver = ModelCheckpoint(tmp_path, filename="last", save_top_k=1, every_n_train_steps=1)
    fit(module, *ordered(order, METHODS[method](), EMAWeightAveraging(decay=0.9)), saver, enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    masks = checkpoint["callbacks"]["lightning_prune." + ("magnitude" if method != "gradual" else "gradual_magnitude")][
        "masks"
    ]
    assert sum(int((~mask).sum()) for mask in masks.values()) == Toy.TOTAL // 2
    for copy in ("state_dict", "current_model_state"):
        assert [name for name, mask in masks.items() if checkpoint[copy][name][~mask].any()] == []


@pytest.mark.parametrize("average", ["ema", "ema-late", "swa"])
def test_the_average_is_sparse_after_a_resume(average: str, order: str, tmp_path: Path) -> None:
    kind, make_average = AVERAGES[average]

    def callbacks() -> list[Callback]:
        return ordered(order, Magnitude(0.5, at=1, measure=False), make_average())

    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(toy(kind=kind), *callbacks(), saver, enable_checkpointing=True, max_epochs=4)
    module = toy(seed=5, kind=kind)
    fit(module, *callbacks(), ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=4)
    assert sum(int((~mask).sum()) for mask in masks_of(module).values()) == Toy.TOTAL // 2
    assert leaks(module) == []


@pytest.mark.parametrize("average", ["ema", "ema-late", "swa"])
def test_an_average_added_on_resume_is_sparse(average: str, order: str, tmp_path: Path) -> None:
    kind, make_average = AVERAGES[average]
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(toy(kind=kind), Magnitude(0.5, measure=False), saver, enable_checkpointing=True)
    module = toy(seed=5, kind=kind)
    callbacks = ordered(order, Magnitude(0.5, measure=False), make_average())
    fit(module, *callbacks, ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=3)
    assert leaks(module) == []


class Stop(Callback):
    """Ends a fit early, as EarlyStopping does."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= STEPS


@pytest.mark.parametrize("position", range(3))
def test_two_methods_of_which_one_prunes_late_end_sparse_under_an_average(position: int) -> None:
    module = toy()
    callbacks: list[Callback] = [
        Magnitude(0.3, measure=False),
        RandomPruning(0.6, at="end", scope="global", measure=False),
    ]
    callbacks.insert(position, EMAWeightAveraging(decay=0.5))
    fit(module, *callbacks, Stop())
    assert sum(int((~mask).sum()) for mask in masks_of(module).values()) == round(0.6 * Toy.TOTAL)
    assert leaks(module) == []


def test_without_the_shadow_rule_an_average_brings_weights_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: this is what happens to pruning that does not know of averages."""
    monkeypatch.setattr("lightning_prune.callback.shadow_modules", lambda trainer: [])
    module = toy()
    fit(module, Magnitude(0.5, at=1, measure=False), EMAWeightAveraging(decay=0.9))
    assert set(leaks(module)) == set(masks_of(module))


def test_lightning_still_keeps_its_average_where_it_is_looked_for() -> None:
    """`_average_model` is private: if it moves, masks would no longer reach it and nothing else would say so."""
    for kind, make_average in AVERAGES.values():
        average = make_average()
        trainer = make_trainer(average)
        trainer.fit(toy(kind=kind), toy_loader())
        assert isinstance(average._average_model, torch.nn.Module)


def test_validation_under_an_average_sees_sparse_weights() -> None:
    found = []

    class Validated(Callback):
        def on_validation_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            found.append(leaks(pl_module))

    module = toy()
    trainer = make_trainer(Magnitude(0.5, at=0.25, measure=False), EMAWeightAveraging(decay=0.9), Validated())
    trainer.fit(module, toy_loader(), toy_loader())
    assert found == [[]] * len(found)
    assert len(found) >= 2 * STEPS
