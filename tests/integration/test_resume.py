"""Killed at any moment and resumed equals never killed, bit for bit; checkpoints that do not fit are refused."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.contract import NAMES, Spec, read_spec
from integration.toys import (
    QUIET,
    STEPS,
    ResumableLoader,
    Toy,
    TwoOptimizers,
    Watch,
    fit,
    leaks,
    make_trainer,
    masks_of,
    optimizers,
    same,
    toy,
    toy_loader,
    weights_of,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_prune import GradualMagnitude, Magnitude, MaskManager, RandomPruning, RNGState

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:.*use of fork"),
    pytest.mark.filterwarnings("ignore:.* left no weight in"),  # a penalty on a toy
]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork (POSIX)")

EPOCHS = 3
KILL_STEP = 9  # in the middle of the second epoch


class Scheduled(Toy):
    """With a learning rate that changes at every step."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


def train(callbacks: list[Callback], folder: Path | None = None, resume: Path | None = None, **settings: Any) -> Any:
    """Run (or go on with) the same training; a resumed one starts from other weights and other random states."""
    dropout, optimizer = settings.pop("dropout", 0.0), settings.pop("optimizer", "sgd")
    seed = 0 if resume is None else 99
    module = toy(seed, kind=Scheduled, make_optimizer=optimizers[optimizer], dropout=dropout)
    torch.manual_seed(seed + 1)
    if folder is not None:
        callbacks = [*callbacks, last_checkpoint(folder)]
    loader = settings.pop("loader", None) or ResumableLoader()
    common = {"max_epochs": EPOCHS, "gradient_clip_val": 0.5, "enable_checkpointing": folder is not None}
    trainer = fit(module, *callbacks, loader=loader, ckpt_path=resume, **{**common, **settings})
    state = trainer.optimizers[0].state_dict(), trainer.lr_scheduler_configs[0].scheduler.state_dict()
    return weights_of(module), masks_of(module), *state


def last_checkpoint(folder: Path, **arguments: Any) -> ModelCheckpoint:
    """Overwrite one file after every step."""
    arguments = {"every_n_train_steps": 1, "filename": "last", "enable_version_counter": False, **arguments}
    return ModelCheckpoint(folder, **arguments)


def each_checkpoint(folder: Path, **arguments: Any) -> ModelCheckpoint:
    """Keep every file."""
    return last_checkpoint(folder, filename="{epoch}-{step}", save_top_k=-1, **arguments)


class KillMidEpoch(Callback):
    """Ends the process without a chance to clean up, some steps after the checkpoint that is resumed from."""

    def on_before_zero_grad(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == KILL_STEP:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_inside_a_save() -> None:
    """Make the write of the checkpoint of step `KILL_STEP` end the process halfway through the file."""
    from fsspec.implementations.local import LocalFileOpener

    write, calls = LocalFileOpener.write, []

    def half(self: Any, data: bytes, *args: Any) -> int:
        calls.append(len(data))
        if len(calls) < KILL_STEP:
            return write(self, data, *args)
        self.f.write(data[: len(data) // 2])
        self.f.flush()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")

    LocalFileOpener.write = half


def in_a_process_that_is_killed(work: Callable[[], Any]) -> None:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def with_events_on_both_sides(spec: Spec) -> Any:
    """Prune before the kill and after it; three events where the method's moments can be chosen."""
    if "at" in spec.arguments and spec.arguments.get("budget") is not None:
        return spec.build(budget=None, at=[("start", 0.9), (1, 0.7), (2, 0.5)])
    if "at" in spec.arguments:
        return spec.build(sparsity=None, at=[("start", 0.2), (1, 0.4), (2, 0.6)])
    return spec.build()


@needs_fork
@pytest.mark.parametrize(("optimizer", "moment"), [("sgd", "mid-epoch"), ("adamw", "inside-a-save")])
@pytest.mark.parametrize("name", NAMES)
def test_killed_and_resumed_equals_never_killed(name: str, optimizer: str, moment: str, tmp_path: Path) -> None:
    spec = read_spec(name)
    settings = {"optimizer": optimizer, "dropout": 0.4}

    def callbacks() -> list[Callback]:
        return [with_events_on_both_sides(spec), RNGState()]

    def dies() -> None:
        if moment == "inside-a-save":
            kill_inside_a_save()
        killer = [KillMidEpoch()] if moment == "mid-epoch" else []
        train([*callbacks(), *killer], tmp_path, **settings)

    in_a_process_that_is_killed(dies)
    resumed_from = torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"]
    assert resumed_from == (KILL_STEP if moment == "mid-epoch" else KILL_STEP - 1)
    whole = train(callbacks(), **settings)
    resumed = train(callbacks(), resume=tmp_path / "last.ckpt", **settings)
    for one, two, what in zip(whole, resumed, ("weights", "masks", "optimizer", "scheduler"), strict=True):
        assert same(one, two), what


FRESH_INTERPRETER = """
import sys, pathlib, torch
from integration import test_resume as t
stage, folder = sys.argv[1], pathlib.Path(sys.argv[2])
torch.set_num_threads(1)
callbacks = [t.gradual(), t.RNGState()]
if stage == "killed":
    t.train([*callbacks, t.KillMidEpoch()], folder, dropout=0.4)
torch.save(t.train(callbacks, resume=folder / "last.ckpt" if stage == "resumed" else None, dropout=0.4), folder / stage)
"""


@pytest.mark.slow
def test_killed_and_resumed_by_another_interpreter_equals_never_killed(tmp_path: Path) -> None:
    codes, results = {}, {}
    for stage in ("killed", "resumed", "whole"):
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-c", FRESH_INTERPRETER, stage, str(tmp_path)]
        codes[stage] = subprocess.run(command, env=environment, check=False, capture_output=True).returncode
    assert codes == {"killed": -signal.SIGKILL, "resumed": 0, "whole": 0}
    for stage in ("resumed", "whole"):
        results[stage] = torch.load(tmp_path / stage, weights_only=True)
    assert same(results["resumed"], results["whole"])


@pytest.fixture
def step_checkpoints(tmp_path: Path) -> Callable[..., dict[int, Path]]:
    """Train with a checkpoint of every step; return the files by step."""

    def run(callbacks: list[Callback], **settings: Any) -> dict[int, Path]:
        train([*callbacks, each_checkpoint(tmp_path)], enable_checkpointing=True, **settings)
        return {int(path.stem.partition("step=")[2]): path for path in tmp_path.glob("*.ckpt")}

    return run


def gradual() -> GradualMagnitude:
    return GradualMagnitude(0.8, every_n_steps=2, end=0.9, measure=False)


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path.with_name("changed.ckpt"))
    return path.with_name("changed.ckpt")


def test_every_step_can_be_resumed_from(step_checkpoints: Any) -> None:
    whole, paths = train([gradual()]), step_checkpoints([gradual()])
    assert sorted(paths) == list(range(1, EPOCHS * STEPS + 1))
    assert [step for step in range(1, EPOCHS * STEPS) if not same(train([gradual()], resume=paths[step]), whole)] == []


@pytest.mark.parametrize("step", [2, 3, STEPS - 1, STEPS, STEPS + 1])
def test_validation_in_between_breaks_no_resume(step: int, tmp_path: Path) -> None:
    """Validation makes an iterator too, which draws from the global generator."""

    def run(*more: Callback, resume: Path | None = None) -> Any:
        module = toy(0 if resume is None else 9, dropout=0.4)
        trainer = make_trainer(gradual(), RNGState(), *more, val_check_interval=0.5, enable_checkpointing=bool(more))
        trainer.fit(module, ResumableLoader(), toy_loader(), ckpt_path=resume)
        return weights_of(module), masks_of(module), trainer.optimizers[0].state_dict()

    whole = run(each_checkpoint(tmp_path))
    (path,) = tmp_path.glob(f"*step={step}.ckpt")
    assert same(run(resume=path), whole)


def test_without_the_saved_masks_the_run_ends_elsewhere(step_checkpoints: Any) -> None:
    """The negative control: the masks in the checkpoint are what makes the two runs equal."""
    path = step_checkpoints([gradual()])[KILL_STEP]
    changed = rewritten(path, lambda ckpt: ckpt["callbacks"]["lightning_prune.gradual_magnitude"]["masks"].clear())
    assert same(train([gradual()], resume=path), train([gradual()]))
    assert not same(train([gradual()], resume=changed)[0], train([gradual()])[0])


def test_without_the_saved_state_the_fit_is_refused(step_checkpoints: Any) -> None:
    path = rewritten(step_checkpoints([gradual()])[KILL_STEP], lambda checkpoint: checkpoint["callbacks"].clear())
    with pytest.raises(MisconfigurationException, match=r"lies before step 9.*not pruned"):
        train([gradual()], resume=path)


def test_without_rng_state_dropout_ends_elsewhere(step_checkpoints: Any) -> None:
    """The negative control of `RNGState`."""
    path = step_checkpoints([gradual(), RNGState()], dropout=0.4)[KILL_STEP]
    whole = train([gradual(), RNGState()], dropout=0.4)
    assert same(train([gradual(), RNGState()], resume=path, dropout=0.4), whole)
    assert not same(train([gradual()], resume=path, dropout=0.4)[0], whole[0])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_boundary_resumes_with_a_plain_loader(tmp_path: Path, shuffle: bool, dropout: float) -> None:
    """The loader draws its order (and a seed for its workers) from the global generator when an epoch starts."""

    def run(*more: Callback, resume: Path | None = None) -> Any:
        callbacks = [gradual(), RNGState(), *more]
        settings = {"loader": toy_loader(shuffle), "dropout": dropout, "enable_checkpointing": bool(more)}
        return train(callbacks, resume=resume, **settings)

    whole = run(each_checkpoint(tmp_path, every_n_train_steps=None, every_n_epochs=1))
    assert same(run(resume=tmp_path / f"epoch=0-step={STEPS}.ckpt"), whole)
    assert same(run(resume=tmp_path / f"epoch=1-step={2 * STEPS}.ckpt"), whole)


def test_rng_state_of_a_tested_checkpoint_does_not_enter_the_next_fit(tmp_path: Path) -> None:
    module, rng = toy(dropout=0.4), RNGState()
    trainer = fit(module, rng)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    trainer.test(module, toy_loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    weights = []
    for callbacks in ([rng], []):
        module.load_state_dict(torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"])
        torch.manual_seed(5)
        fit(module, *callbacks)
        weights.append(weights_of(module))
    assert same(*weights)


@pytest.mark.parametrize("optimizer", sorted(optimizers))
def test_unmasked_gradients_resume_as_well(step_checkpoints: Any, optimizer: str) -> None:
    """Momentum of pruned weights lives on with `mask_gradients=False`; Muon mixes it into the others."""

    def method() -> Magnitude:
        return Magnitude(0.5, mask_gradients=False, measure=False)

    path = step_checkpoints([method()], optimizer=optimizer)[KILL_STEP]
    assert same(train([method()], resume=path, optimizer=optimizer), train([method()], optimizer=optimizer))


def test_repaired_norms_resume_as_well(step_checkpoints: Any) -> None:
    def method() -> Magnitude:
        return Magnitude(0.5, at=1, refit_bn=True, measure=False)

    whole, paths = train([method()]), step_checkpoints([method()])
    steps = (STEPS - 1, STEPS, STEPS + 1, 2 * STEPS)
    assert [step for step in steps if not same(train([method()], resume=paths[step]), whole)] == []
    assert not same(train([Magnitude(0.5, at=1, measure=False)])[0], whole[0])  # the repair did something


def test_manual_optimization_resumes(tmp_path: Path) -> None:
    def run(resume: Path | None = None) -> Any:
        module = toy(0 if resume is None else 9, kind=TwoOptimizers)
        callbacks = [] if resume else [each_checkpoint(tmp_path)]
        settings = {"enable_checkpointing": not resume, "loader": ResumableLoader(), "ckpt_path": resume}
        trainer = fit(module, GradualMagnitude(0.8, every_n_steps=1, measure=False), *callbacks, **settings)
        return weights_of(module), [optimizer.state_dict() for optimizer in trainer.optimizers]

    whole = run()
    (path,) = tmp_path.glob(f"*step={3 * 4}.ckpt")  # three optimizer steps per batch, four batches
    assert same(run(path), whole)


def test_going_back_to_an_earlier_checkpoint_in_one_process_undoes_later_masks(step_checkpoints: Any) -> None:
    def method() -> Magnitude:
        return Magnitude(0.5, at=2, measure=False)

    module = toy(kind=Scheduled)
    settings = {"max_epochs": EPOCHS, "gradient_clip_val": 0.5}
    path = step_checkpoints([method()])[STEPS]
    fit(module, method(), loader=ResumableLoader(), **settings)
    first = weights_of(module)
    watch = Watch()
    fit(module, method(), watch, loader=ResumableLoader(), ckpt_path=path, **settings)
    assert watch.pruned_steps == STEPS  # those of the last epoch
    assert same(weights_of(module), first)


def test_a_dense_checkpoint_frees_a_masked_module(step_checkpoints: Any) -> None:
    path = step_checkpoints([])[KILL_STEP]
    module = toy(kind=Scheduled)
    settings = {"max_epochs": EPOCHS, "gradient_clip_val": 0.5}
    fit(module, Magnitude(0.9, measure=False), **settings)
    fit(module, Magnitude(0.5, at=2, measure=False), loader=ResumableLoader(), ckpt_path=path, **settings)
    assert same((weights_of(module), masks_of(module)), train([Magnitude(0.5, at=2, measure=False)])[:2])


def test_going_back_frees_a_tensor_that_was_pruned_later() -> None:
    module = toy()
    manager = MaskManager.of(module)
    early = {"head.weight": torch.rand(3, 12) > 0.5}
    manager.set_masks(early)
    weights = weights_of(module)
    manager.set_masks({"hidden.weight": torch.rand(12, 64) > 0.5})
    module.load_state_dict(weights)  # what the Trainer does before the callback's state is bound
    manager.load_state_dict(early)
    assert same(manager.masks, early)
    assert same(weights_of(module), weights)


def test_weights_alone_go_on_sparse_with_masks_from_zeros(tmp_path: Path) -> None:
    module = toy()
    saved = last_checkpoint(tmp_path, save_weights_only=True)
    fit(module, Magnitude(0.5, measure=False), saved, enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    other, watch = toy(seed=3), Watch()
    other.load_state_dict(checkpoint["state_dict"])
    fit(other, Magnitude(0.5, masks_from_zeros=True, measure=False), watch)
    assert watch.found == []
    assert same(masks_of(other), masks_of(module))


def test_a_fit_that_goes_on_longer_never_prunes_again(step_checkpoints: Any) -> None:
    path = step_checkpoints([Magnitude(0.5, at=0.5, measure=False)])[EPOCHS * STEPS]
    callback = Magnitude(0.5, at=0.5, measure=False)
    weights, masks, *_ = train([callback], resume=path, max_epochs=3 * EPOCHS)
    saved = torch.load(path, weights_only=True)["callbacks"]["lightning_prune.magnitude"]["masks"]
    assert [event["step"] for event in callback.history] == [STEPS * EPOCHS // 2]
    assert same(masks, saved)
    assert all(not weights[name][~mask].any() for name, mask in masks.items())


# checkpoints that do not fit


def test_a_checkpoint_of_another_method_is_refused(step_checkpoints: Any) -> None:
    path = step_checkpoints([gradual()])[KILL_STEP]
    with pytest.raises(
        MisconfigurationException, match=r"pruned by \['lightning_prune.gradual_magnitude'\].*masks_from"
    ):
        train([Magnitude(0.5, at=2, measure=False)], resume=path)


def test_a_checkpoint_of_another_method_under_the_same_name_is_refused(step_checkpoints: Any) -> None:
    path = step_checkpoints([Magnitude(0.5, at=1, name="mine", measure=False)])[KILL_STEP]
    with pytest.raises(MisconfigurationException, match="is of method 'magnitude', this callback is 'random'"):
        train([RandomPruning(0.5, at=2, name="mine", measure=False)], resume=path)


def test_a_dense_checkpoint_past_the_moment_is_refused(step_checkpoints: Any) -> None:
    path = step_checkpoints([])[KILL_STEP]
    with pytest.raises(MisconfigurationException, match=r"`at`='start' lies before step 9.*without `ckpt_path`"):
        train([Magnitude(0.5, measure=False)], resume=path)


def test_a_dense_checkpoint_before_the_moment_is_pruned_in_time(step_checkpoints: Any) -> None:
    path = step_checkpoints([])[KILL_STEP]
    callback = Magnitude(0.5, at=2, measure=False)
    whole = train([Magnitude(0.5, at=2, measure=False)])
    assert same(train([callback], resume=path), whole)
    assert [event["step"] for event in callback.history] == [2 * STEPS]


def test_a_refused_checkpoint_leaves_the_next_fit_alone(step_checkpoints: Any) -> None:
    path = step_checkpoints([gradual()])[KILL_STEP]
    module, callback = toy(), Magnitude(0.5, measure=False)
    with pytest.raises(MisconfigurationException, match="pruned by"):
        fit(module, callback, ckpt_path=path)
    fresh = toy(seed=2)
    fit(fresh, callback)
    assert leaks(fresh) == []
    assert len(callback.history) == 1
