"""Random states: a method draws from none of the global ones, and `RNGState` saves and restores all of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integration.contract import NAMES, read_spec
from integration.toys import QUIET, RandomTrace, fit, same, toy, toy_loader, weights_of
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune import RNGState
from lightning_prune.sandbox import rng_states

pytestmark = QUIET

LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: toy_loader(shuffle=True),
    "own-generator": lambda: toy_loader(shuffle=True, generator=torch.Generator().manual_seed(5)),
    "worker": lambda: toy_loader(shuffle=True, num_workers=1),
    "persistent-worker": lambda: toy_loader(shuffle=True, num_workers=1, persistent_workers=True),
}


def traced(make_loader: Callable[[], Any], *callbacks: Any) -> Any:
    """Train with dropout; return the weights, every batch and every random state on the way."""
    module, trace = toy(dropout=0.3), RandomTrace()
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    fit(module, *callbacks, trace, loader=make_loader())
    return weights_of(module), trace.states


@pytest.mark.parametrize(
    "loader", [pytest.param(name, marks=[pytest.mark.slow] if "worker" in name else []) for name in LOADERS]
)
@pytest.mark.parametrize("name", NAMES)
def test_reading_data_for_scores_disturbs_no_order_and_no_random_state(name: str, loader: str) -> None:
    spec = read_spec(name)
    spec.needs("sparsity")
    assert same(traced(LOADERS[loader], spec.build(sparsity=0.0)), traced(LOADERS[loader]))


def test_saving_random_states_draws_nothing(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    module, trace = toy(dropout=0.3), RandomTrace()
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    fit(module, RNGState(), saver, trace, loader=LOADERS["shuffled"](), enable_checkpointing=True)
    assert same((weights_of(module), trace.states), traced(LOADERS["shuffled"]))


def test_every_global_generator_is_saved_and_restored(tmp_path: Path) -> None:
    trainer = fit(toy(), RNGState())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = rng_states()
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    assert not same(rng_states(), saved)
    fit(toy(), RNGState(), trace := RandomTrace(), ckpt_path=tmp_path / "end.ckpt", max_epochs=3)
    rng = RNGState()
    rng.load_state_dict(torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"][rng.state_key])
    assert trace.states  # the third epoch did run
    held = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"][rng.state_key]["ranks"][0]
    assert same(tuple(held["python"][1]), saved["python"][1])
    assert same(held["numpy"], saved["numpy"])
    assert same(held["torch"], saved["torch"])


@pytest.mark.parametrize("draw", [random.random, lambda: float(np.random.rand()), lambda: float(torch.rand(()))])
def test_the_draws_after_a_resume_are_those_of_the_unbroken_run(draw: Callable[[], float], tmp_path: Path) -> None:
    from lightning.pytorch import Callback

    class Draws(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_end(self, *args: Any) -> None:
            self.seen.append(draw())

    def run(*more: Any, seed: int, **settings: Any) -> list[float]:
        random.seed(seed)
        np.random.seed(seed)
        module, draws = toy(seed), Draws()
        fit(module, RNGState(), draws, *more, **settings)
        return draws.seen

    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = run(saver, seed=1, enable_checkpointing=True)
    resumed = run(seed=2, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert resumed == whole[len(whole) // 2 :]
    assert len(set(whole)) == len(whole)
