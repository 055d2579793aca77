"""Gradual CHITA: prune - train - prune, with the learning rate at its peak at every pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from methods.prospr_cases import QUIET, same, trainer_of
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_prune import CHITA, MaskManager, instantiate_callbacks
from lightning_prune.methods._chita_stages import stage_sparsities
from lightning_prune.recipes.schedules import restarting_factor

pytestmark = QUIET
PAIRS = [("start", 0.5), (1, 0.75), (2, 0.9)]
SETTINGS: dict[str, Any] = {"num_grads": 8, "grad_batch": 2, "refits": 0, "refit_samples": 8, "first_order": False}


def gradual(**changes: Any) -> CHITA:
    return CHITA(at=PAIRS, measure=False, refit_bn_batches=2, **{**SETTINGS, **changes})


class Watch(Callback):
    """Masks and weights after every step."""

    def __init__(self) -> None:
        self.masks: list[dict[str, Tensor]] = []
        self.kept: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        manager = MaskManager.of(pl_module)
        self.masks.append(manager.masks)
        self.kept.append(manager.counts()[0])
        for name, mask in manager.masks.items():
            assert not pl_module.get_parameter(name)[~mask].any()


@pytest.mark.parametrize("algorithm", ["bso", "iht", "block"])
def test_every_round_prunes_to_its_count_and_nothing_returns(algorithm: str, tiny: Any, loader: DataLoader) -> None:
    callback, watch = gradual(algorithm=algorithm), Watch()
    trainer_of(callback, watch, max_epochs=3).fit(tiny, loader)
    steps = len(loader)
    # floor of 0.5, 0.75 and 0.9 times 188 are gone; a callback that acts after an epoch is seen from its last step on
    assert [event["kept"] for event in callback.history] == [94, 47, 19]
    assert [event["step"] for event in callback.history] == [0, steps, 2 * steps]
    assert sorted(set(watch.kept), reverse=True) == [94, 47, 19]
    for before, after in zip(watch.masks, watch.masks[1:], strict=False):
        assert all(bool((before[name] | ~after[name]).all()) for name in after)


def test_momentum_of_pruned_weights_is_cleared(tiny: Any, loader: DataLoader) -> None:
    seen: list[bool] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            momentum = trainer.optimizers[0].state[pl_module.hidden.weight]["momentum_buffer"]
            seen.append(bool(momentum[~MaskManager.of(pl_module).masks["hidden.weight"]].any()))

    trainer_of(gradual(), Look(), max_epochs=3).fit(tiny, loader)
    assert seen
    assert not any(seen)


def test_a_run_cut_between_two_rounds_goes_on_to_the_same_bits(
    tiny_class: Any, loader: DataLoader, tmp_path: Path
) -> None:
    plain = DataLoader(loader.dataset, batch_size=4)
    torch.manual_seed(0)
    start = tiny_class().state_dict()

    def fit(folder: str, resume: str | None = None) -> Any:
        module = tiny_class()
        module.load_state_dict(start)
        saver = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        trainer_of(gradual(), saver, max_epochs=4, enable_checkpointing=True).fit(
            module, plain, ckpt_path=resume, weights_only=True
        )
        return module

    whole = fit("whole")
    rest = fit("rest", str(tmp_path / "whole" / "epoch=1.ckpt"))
    assert same(dict(whole.state_dict()), dict(rest.state_dict()))
    assert MaskManager.of(rest).counts() == (19, 188)


def test_the_experiment_follows_the_papers_schedule() -> None:
    with initialize_config_module("lightning_prune.conf", version_base="1.3"):
        cfg = compose("prune", overrides=["experiment=chita_gradual"])
    cfg.callbacks = {"pruning": cfg.callbacks.pruning}
    (callback,) = instantiate_callbacks(cfg.callbacks)
    assert (callback.first_order, callback.refits, callback.stages) == (False, 0, 1)
    epochs = [0 if when == "start" else int(when) for when, _ in callback.at]
    levels = stage_sparsities("poly", len(callback.at), 0.9, start=0.5)
    assert [level for _, level in callback.at] == pytest.approx(levels, abs=1e-4)
    # 100 epochs with prunings at 0, 12, ..., 72 in the paper; a quarter of it here, with the peak at every pruning
    total, schedule = int(cfg.trainer.max_epochs), cfg.model.scheduler
    assert [4 * epoch for epoch in epochs] == list(range(0, 73, 12))
    interval = round(schedule.interval_fraction * total)
    factors = [
        restarting_factor(epoch, total, schedule.restarts, interval, schedule.final_factor) for epoch in range(total)
    ]
    assert [epoch for epoch, factor in enumerate(factors) if factor == 1.0] == epochs
