"""Pruning beside everything else a Trainer does: when it acts, what it refuses, what it leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.toys import (
    QUIET,
    STEPS,
    RandomTrace,
    Toy,
    TwoOptimizers,
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
    weights_of,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune import GradualMagnitude, Magnitude, RandomPruning
from lightning_prune.context import Context, Proposal

pytestmark = [
    *QUIET,
]

LATE = "training ended before its last planned step; pruning now"


def magnitude(at: Any = "start", sparsity: float = 0.5, **arguments: Any) -> Magnitude:
    return Magnitude(sparsity, at=at, measure=False, **arguments)


def gradual(**arguments: Any) -> GradualMagnitude:
    return GradualMagnitude(**{"sparsity": 0.5, "every_n_steps": 1, "measure": False, **arguments})


class StopAt(Callback):
    """Asks for the end of the fit, as EarlyStopping does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


class Stream(IterableDataset):
    """Training data without a length."""

    def __iter__(self) -> Any:
        return iter(toy_data())


# when


@pytest.mark.parametrize(
    ("at", "step", "epoch"),
    [("start", 0, 0), (0, 0, 0), (1, STEPS, 1), (0.25, 3, 0), (0.3, 4, 0), (0.5, STEPS, None), ("end", 2 * STEPS, 1)],
)
def test_each_form_of_at_acts_at_its_moment(at: Any, step: int, epoch: int | None) -> None:
    callback = magnitude(at)
    fit(toy(), callback)
    (event,) = callback.history
    assert event["step"] == step
    assert epoch is None or event["epoch"] == epoch


def test_pairs_act_in_turn_and_never_regrow() -> None:
    callback, module = Magnitude(at=[("start", 0.25), (1, 0.5), (0.75, 0.6), ("end", 0.75)], measure=False), toy()
    watch = Watch()
    fit(module, callback, watch)
    assert [(event["step"], event["kept"]) for event in callback.history] == [(0, 630), (6, 420), (9, 336), (12, 210)]
    assert watch.found == [] == leaks(module)


def test_gradual_pruning_follows_its_schedule_in_optimizer_steps() -> None:
    callback = gradual(sparsity=0.8, begin=2, end=8, every_n_steps=3, schedule="linear")
    fit(toy(), callback, accumulate_grad_batches=2, max_epochs=4)
    assert [event["step"] for event in callback.history] == [2, 5, 8]
    assert [event["kept"] for event in callback.history] == [840, 840 - 336, 840 - 672]


@pytest.mark.parametrize("make", [lambda: magnitude(1), lambda: magnitude(0.9), lambda: magnitude("end"), gradual])
def test_a_fit_that_stops_early_prunes_at_the_end_and_says_so(make: Callable[[], Any]) -> None:
    module, callback = toy(), make()
    with pytest.warns(UserWarning, match=LATE):
        fit(module, callback, StopAt(3))
    assert callback.history[-1]["step"] == 3
    assert kept_of(module, masks_of(module)) == Toy.TOTAL // 2
    assert callback.receipt.reached["kept"] == Toy.TOTAL // 2


def test_early_stopping_before_the_moment_prunes_at_the_end() -> None:
    module, callback = toy(), magnitude(8)
    stopping = EarlyStopping("val_loss", min_delta=1e9, patience=1, verbose=False)
    trainer = make_trainer(callback, stopping, max_epochs=10)
    with pytest.warns(UserWarning, match=LATE):
        trainer.fit(module, toy_loader(), toy_loader())
    assert trainer.current_epoch == 2
    assert kept_of(module, masks_of(module)) == Toy.TOTAL // 2


def test_a_stream_without_length_is_pruned_at_its_end() -> None:
    module, callback = toy(), magnitude("end")
    with pytest.warns(UserWarning, match=LATE):  # nobody knows which step is the last one
        fit(module, callback, loader=DataLoader(Stream(), batch_size=4))
    assert [event["step"] for event in callback.history] == [2 * STEPS]
    assert leaks(module) == []


def test_epochs_work_in_an_endless_fit() -> None:
    callback = magnitude(1)
    fit(toy(), callback, StopAt(10), max_epochs=-1)
    assert [event["step"] for event in callback.history] == [STEPS]


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda: magnitude(0.5), {"max_epochs": -1}, r"`at`=0.5 is a fraction of the fit, whose length is not known"),
        (gradual, {"max_epochs": -1}, r"is a fraction of the fit, whose length is not known"),
        (lambda: magnitude(2), {"max_epochs": 2}, r"`at`=2 .*lies beyond the fit"),
        (lambda: magnitude(5), {"max_epochs": 10, "max_steps": 4}, r"`at`=5 .*lies beyond the fit"),
        (lambda: magnitude(5), {"max_epochs": -1, "max_steps": 4}, r"`at`=5 .*lies beyond the fit"),
        (lambda: Magnitude(at=[(1, 0.1), (7, 0.2)], measure=False), {}, r"`at`=7 .*lies beyond the fit"),
        (
            lambda: Magnitude(at=[(3, 0.1), (0.5, 0.2)], measure=False),
            {"max_epochs": 4},
            r"3 \(step 18\) comes after 0.5 ",
        ),
        (lambda: gradual(end=100), {}, r"`end` must lie within the fit of 12 optimizer steps, got 100"),
        (lambda: gradual(begin=11, end=0.5), {}, r"`begin` must not lie after `end`, got steps 11 and 6"),
    ],
)
def test_a_moment_that_never_comes_is_refused_before_anything_changed(
    make: Callable[[], Any], settings: dict[str, Any], message: str
) -> None:
    module = toy()
    before = weights_of(module)
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, make(), **settings)
    assert same(weights_of(module), before)
    assert masks_of(module) == {}


@pytest.mark.parametrize(
    ("kind", "make_loader", "message"),
    [
        (Toy, lambda: DataLoader(Stream(), batch_size=4), "calibration needs a map-style DataLoader"),
        (TwoOptimizers, toy_loader, r"optimizes by itself.*loss_fn"),
    ],
)
def test_a_repair_that_cannot_be_done_is_refused_before_anything_changed(
    kind: type[Toy], make_loader: Callable[[], Any], message: str
) -> None:
    module, callback = toy(kind=kind), magnitude(refit_bn=True)
    before = weights_of(module)
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        fit(module, callback, loader=make_loader())
    assert same(weights_of(module), before)
    assert masks_of(module) == {}


@pytest.mark.parametrize("refit_bn", [False, True])
def test_repair_disturbs_no_order_and_no_random_state(refit_bn: bool) -> None:
    traces = []
    for repaired in (False, refit_bn):
        module, trace = toy(dropout=0.3), RandomTrace()
        torch.manual_seed(5)
        fit(module, magnitude(1, refit_bn=repaired), trace, loader=toy_loader(shuffle=True))
        traces.append(trace.states)
    assert same(*traces)


@pytest.mark.parametrize("make", [lambda: magnitude(10), lambda: magnitude("end"), lambda: gradual(end=4000)])
def test_a_fast_dev_run_tries_the_wiring(make: Callable[[], Any]) -> None:
    module = toy()
    fit(module, make(), fast_dev_run=True)
    assert kept_of(module, masks_of(module)) == Toy.TOTAL // 2


# together


def test_a_second_method_counts_what_the_first_pruned() -> None:
    module, watch = toy(), Watch()
    first, second = magnitude(), RandomPruning(0.9, at=1, scope="global", measure=False)
    fit(module, first, second, watch)
    assert (first.history[-1]["kept"], second.history[-1]["kept"]) == (420, 84)
    assert kept_of(module, masks_of(module)) == 84
    assert watch.found == [] == leaks(module)


def test_the_second_mask_lies_within_the_first() -> None:
    seen = []

    class Masks(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append(masks_of(pl_module))

    fit(toy(), magnitude(), RandomPruning(0.9, at=1, scope="global", measure=False), Masks())
    early, late = seen[0], seen[-1]
    assert not same(early, late)
    assert all(not (late[name] & ~early[name]).any() for name in early)


class Careless(Magnitude):
    """A user's method that does not look at what is pruned already."""

    method = "careless"

    def propose(self, context: Context) -> Proposal:
        return Proposal({name: torch.rand(weight.shape) < 0.5 for name, weight in context.weights.items()})


def test_a_method_that_ignores_earlier_masks_regrows_nothing() -> None:
    module, first = toy(), {}

    class Early(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            first.setdefault("masks", masks_of(pl_module))

    fit(module, magnitude(), Careless(0.5, at=1, measure=False), Early())
    late = masks_of(module)
    assert all(not (late[name] & ~early).any() for name, early in first["masks"].items())
    assert kept_of(module, late) < 300  # about half of half
    assert leaks(module) == []


def test_a_second_method_with_a_lower_target_prunes_no_more() -> None:
    module = toy()
    fit(module, magnitude(sparsity=0.9, layer_floor=0.05), RandomPruning(0.5, at=1, scope="global", measure=False))
    assert kept_of(module, masks_of(module)) == 84


@pytest.mark.parametrize("order", [1, -1])
def test_two_methods_resume_whatever_their_order(order: int, tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        return [magnitude(0.25), RandomPruning(0.9, at=0.75, scope="global", measure=False)]

    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module, resumed = toy(), toy(seed=4)
    fit(module, *callbacks(), saver, enable_checkpointing=True)
    fit(resumed, *callbacks()[::order], ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(masks_of(resumed), masks_of(module))
    assert same(weights_of(resumed), weights_of(module))


def test_two_callbacks_of_one_class_need_names() -> None:
    with pytest.raises(RuntimeError, match="state_key"):
        make_trainer(magnitude(include="hidden"), magnitude(include="head"))
    module = toy()
    fit(module, magnitude(include="hidden", name="hidden"), magnitude(1, 0.75, include="head", name="head"))
    kept = {name: int(mask.sum()) for name, mask in masks_of(module).items()}
    assert kept == {"hidden.weight": 384, "head.weight": 9}


def test_callbacks_of_the_module_itself_are_served() -> None:
    class Configured(Toy):
        def configure_callbacks(self) -> Any:
            return [magnitude()]

    module, watch = toy(kind=Configured), Watch()
    fit(module, watch)
    assert watch.pruned_steps == 2 * STEPS
    assert watch.found == []


# checkpoints and metrics


@pytest.mark.parametrize("make", [lambda: magnitude(1), lambda: gradual(every_n_steps=STEPS, end=0.5)])
def test_the_monitored_metric_is_that_of_the_saved_weights(make: Callable[[], Any], tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, filename="{epoch}")
    trainer = make_trainer(make(), saver, enable_checkpointing=True, max_epochs=3)
    trainer.fit(toy(), toy_loader(), toy_loader())
    assert len(saver.best_k_models) == 3
    for path, logged in saver.best_k_models.items():
        module = toy(seed=8)
        module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        (measured,) = make_trainer().validate(module, toy_loader(), verbose=False)
        assert measured["val_loss"] == pytest.approx(float(logged), rel=1e-6)


def test_testing_a_checkpoint_changes_no_mask_and_no_schedule(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module, callback = toy(), magnitude(1)
    trainer = fit(module, callback, saver, enable_checkpointing=True)
    before = masks_of(module), copy.deepcopy(callback.history), callback.events
    for epoch in (0, 1):
        path = tmp_path / f"epoch={epoch}.ckpt"
        trainer.test(module, toy_loader(), ckpt_path=path, verbose=False, weights_only=True)
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert same({name: module.state_dict()[name] for name in saved}, dict(saved))
        assert same((masks_of(module), callback.history, callback.events), before)
    fit(module, callback)
    assert kept_of(module, masks_of(module)) == Toy.TOTAL // 2
    assert leaks(module) == []


def test_events_reach_the_logger_when_they_happen(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    fit(toy(), magnitude(1), logger=logger, log_every_n_steps=1)
    lines = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    events = [row for row in rows if row["prune/sparsity"]]
    assert [(float(row["prune/sparsity"]), float(row["prune/n_active"]), int(row["step"])) for row in events] == [
        (0.5, 420.0, STEPS)
    ]


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_a_barebones_trainer_prunes_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    module = toy()
    trainer = make_trainer(Magnitude(0.5), barebones=True, logger=None, enable_progress_bar=None)
    trainer.fit(module, toy_loader())
    assert kept_of(module, masks_of(module)) == Toy.TOTAL // 2
    assert "magnitude" not in capsys.readouterr().out


def test_an_emptied_layer_is_named() -> None:
    module = toy()
    with torch.no_grad():
        module.conv.weight.mul_(1e-6)
    with pytest.warns(UserWarning, match=r"left no weight in conv.weight.*layer_floor"):
        fit(module, magnitude())
