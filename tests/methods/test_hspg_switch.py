"""HSPG warns where half-space steps begin only after the learning rate has decayed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.toys import QUIET, ResumableLoader, Toy, fit, toy
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune import HSPG

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.* left no weight in")]
LATE = r"hspg: `switch` \(step {}\) comes after the learning rate has fallen from 0\.05 to 0\.0{}"


def scheduled(make: Callable[[Any], Any], interval: str = "step") -> Any:
    """A toy whose learning rate of 0.05 follows a schedule."""

    class Scheduled(Toy):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            return [optimizer], [{"scheduler": make(optimizer), "interval": interval}]

    return toy(kind=Scheduled)


def method(switch: int | float, end: int = 11) -> HSPG:
    return HSPG(penalty="auto", switch=switch, end=end, measure=False)


def steps(factor: float, at: int) -> Callable[[Any], Any]:
    return lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [at], factor)


def rising(optimizer: Any) -> Any:
    """A warm-up over six steps, then constant."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 6))


@pytest.mark.parametrize(
    ("make", "interval", "switch", "rate"),
    [
        (steps(0.1, 4), "step", 5, "05"),
        (steps(0.5, 4), "step", 4, "25"),  # the first step at the lower rate
        (steps(0.1, 1), "epoch", 8, "05"),
        (lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12), "step", 8, "125"),
    ],
)
def test_a_switch_after_the_decay_is_warned_about_when_the_fit_starts(
    make: Any, interval: str, switch: int, rate: str
) -> None:
    module, first = scheduled(make, interval), FirstBatch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first.caught = caught
        fit(module, method(switch), first)
    assert any(re.match(LATE.format(switch, rate), str(warning.message)) for warning in caught)
    late = [warning for warning in caught if "comes after the learning rate" in str(warning.message)]
    assert len(late) == 1
    assert first.seen == 1


class FirstBatch(Callback):
    """Counts the warnings there are before the first batch."""

    caught: Any = ()
    seen = -1

    def on_train_batch_start(self, *args: Any) -> None:
        if self.seen < 0:
            self.seen = sum("comes after the learning rate" in str(warning.message) for warning in self.caught)


@pytest.mark.parametrize(
    ("make", "switch"),
    [
        (steps(0.1, 4), 3),
        (rising, 3),
        (rising, 8),
        (lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12), 0.25),
        (lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0), 9),
    ],
)
def test_a_switch_before_the_decay_or_in_a_warm_up_is_not(make: Any, switch: int | float) -> None:
    fit(scheduled(make), method(switch))  # a warning would be an error here


def test_a_target_has_no_switch_to_warn_about() -> None:
    fit(scheduled(steps(0.1, 1)), HSPG(0.5, measure=False))


class Lowering(Callback):
    """Divides the learning rate by ten before a step, without any scheduler."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.at:
            trainer.optimizers[0].param_groups[0]["lr"] *= 0.1


def constant() -> Any:
    return toy(make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05))


def test_a_decay_without_a_scheduler_is_seen_at_the_switch() -> None:
    with pytest.warns(UserWarning, match=LATE.format(5, "05")):
        fit(constant(), method(5), Lowering(3))
    fit(constant(), method(3), Lowering(5))


def test_the_highest_rate_survives_a_resume(tmp_path: Path) -> None:
    def run(**settings: Any) -> None:
        saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        callbacks = (method(6), saver, Lowering(3))
        fit(constant(), *callbacks, loader=ResumableLoader(), enable_checkpointing=True, **settings)

    with pytest.warns(UserWarning, match=LATE.format(6, "05")):
        run()
    with pytest.warns(UserWarning, match=LATE.format(6, "05")):
        run(ckpt_path=tmp_path / "step=5.ckpt")
    run(ckpt_path=tmp_path / "step=8.ckpt")
