"""LitClassifier: what it logs, optimizers and schedulers, checkpoints, sharding."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.recipes.classifier import LitClassifier, count_classes, wants_total_steps
from lightning_prune.recipes.data import Digits, RandomData
from lightning_prune.recipes.networks import convnet, mlpnet
from lightning_prune.recipes.schedules import warmup_cosine


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"max_epochs": 1, "accelerator": "cpu", "enable_checkpointing": False, **quiet, **options}
    return pl.Trainer(default_root_dir=str(folder), **settings)


def noise(batch_size: int = 8) -> RandomData:
    return RandomData((1, 8, 8), train_samples=16, val_samples=10, test_samples=6, batch_size=batch_size)


def small(**options: Any) -> LitClassifier:
    return LitClassifier(convnet(width=2), **options)


def test_one_epoch_on_digits_improves_loss_and_accuracy(tmp_path: Path):
    model, data = small(), Digits(batch_size=32, subset=320)
    before = trainer(tmp_path).validate(model, data, verbose=False)[0]
    trainer(tmp_path).fit(model, data)
    after = trainer(tmp_path).validate(model, data, verbose=False)[0]
    assert after["val_loss"] < before["val_loss"]
    assert after["val_accuracy"] > before["val_accuracy"]


def test_fit_and_test_log_the_five_names(tmp_path: Path):
    model, run = small(), trainer(tmp_path)
    run.fit(model, noise())
    assert set(run.callback_metrics) == {"train_loss", "val_loss", "val_accuracy"}
    assert set(run.test(model, noise(), verbose=False)[0]) == {"test_loss", "test_accuracy"}


def test_logged_loss_and_accuracy_are_those_of_all_samples_at_once(tmp_path: Path):
    model, data = small(), noise(batch_size=4)
    logged = trainer(tmp_path).test(model, data, verbose=False)[0]
    inputs, classes = data.parts.test
    model.eval()
    with torch.no_grad():
        logits = model(inputs)
    # six samples in batches of four and two: a mean of batch means would differ
    assert logged["test_loss"] == pytest.approx(nn.functional.cross_entropy(logits, classes).item(), rel=1e-5)
    assert logged["test_accuracy"] == pytest.approx((logits.argmax(1) == classes).float().mean().item())


def test_the_loss_module_is_used(tmp_path: Path):
    model = small(loss=nn.CrossEntropyLoss(label_smoothing=0.5))
    batch = (torch.randn(4, 1, 8, 8), torch.arange(4))
    expected = nn.functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.5)
    assert model.loss(model(batch[0]), batch[1]) == expected
    trainer(tmp_path).fit(model, noise())
    assert model.trainer.callback_metrics["train_loss"] > 0


def test_without_arguments_the_optimizer_is_sgd_with_momentum():
    optimizer = small().configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (0.1, 0.9)


def test_the_optimizer_gets_the_trainable_parameters_only():
    model = small(optimizer=functools.partial(torch.optim.AdamW, lr=0.5))
    model.network.classifier.weight.requires_grad_(False)
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    given = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert given == {id(p) for p in model.network.parameters()} - {id(model.network.classifier.weight)}


def test_a_step_scheduler_that_asks_for_it_is_given_the_length_of_the_fit(tmp_path: Path):
    asked = []

    def make(optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
        asked.append(total_steps)
        return warmup_cosine(optimizer, total_steps, warmup_fraction=0.5)

    model = small(scheduler=make, scheduler_interval="step")
    trainer(tmp_path, max_epochs=3, accumulate_grad_batches=2).fit(model, noise(batch_size=4))
    # four batches an epoch, two per optimizer step, three epochs
    assert asked == [6]
    assert model.lr_schedulers().get_last_lr() == [0.0]


def test_torchs_one_cycle_is_given_the_length_of_the_fit(tmp_path: Path):
    model = small(scheduler=functools.partial(OneCycleLR, max_lr=0.1), scheduler_interval="step")
    trainer(tmp_path, max_epochs=2).fit(model, noise())
    assert model.lr_schedulers().total_steps == 4


def test_a_length_given_by_the_user_stays(tmp_path: Path):
    model = small(scheduler=functools.partial(warmup_cosine, total_steps=100), scheduler_interval="step")
    trainer(tmp_path).fit(model, noise())
    assert model.lr_schedulers().get_last_lr() == [pytest.approx(0.1 * 3 / 11)]


def test_an_epoch_scheduler_steps_once_an_epoch(tmp_path: Path):
    model = small(scheduler=functools.partial(StepLR, step_size=1, gamma=0.1))
    trainer(tmp_path, max_epochs=2).fit(model, noise())
    assert model.lr_schedulers().get_last_lr() == [pytest.approx(0.1 * 0.1**2)]


def test_a_plateau_scheduler_watches_the_validation_loss(tmp_path: Path):
    model = small(scheduler=functools.partial(ReduceLROnPlateau, patience=0))
    run = trainer(tmp_path)
    run.fit(model, noise())
    assert model.lr_schedulers().best == pytest.approx(run.callback_metrics["val_loss"].item())


@pytest.mark.parametrize(
    ("factory", "wanted"),
    [
        (warmup_cosine, True),
        (functools.partial(warmup_cosine, warmup_fraction=0.2), True),
        (functools.partial(warmup_cosine, total_steps=5), False),
        (OneCycleLR, True),
        (functools.partial(CosineAnnealingLR, T_max=5), False),
    ],
)
def test_the_length_is_filled_in_where_it_is_missing(factory: Any, wanted: bool):
    assert wants_total_steps(factory) is wanted


def test_a_scheduler_of_known_length_per_epoch_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"`scheduler_interval` must be 'step' .* got 'epoch'"):
        trainer(tmp_path).fit(small(scheduler=warmup_cosine), noise())


@pytest.mark.filterwarnings("ignore:`max_epochs` was not set")
def test_a_scheduler_of_known_length_without_an_end_is_refused(tmp_path: Path):
    model = small(scheduler=warmup_cosine, scheduler_interval="step")
    with pytest.raises(ValueError, match="`max_epochs` must be finite"):
        trainer(tmp_path, max_epochs=-1).fit(model, noise())


@pytest.mark.parametrize("argument", ["optimizer", "scheduler"])
def test_an_object_instead_of_a_factory_is_refused(argument: str):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match=f"`{argument}` must be a callable .*, got SGD.*_partial_: true"):
        small(**{argument: optimizer})


def test_an_unknown_interval_is_refused():
    with pytest.raises(ValueError, match="`scheduler_interval` must be one of 'epoch', 'step', got 'batch'"):
        small(scheduler_interval="batch")


def test_a_single_class_is_refused():
    with pytest.raises(ValueError, match="`num_classes` must be an integer >= 2, got 1"):
        small(num_classes=1)


def test_the_number_of_classes_is_read_off_the_last_linear_layer():
    assert count_classes(nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 4), nn.ReLU())) == 4


def test_a_network_without_linear_layer_needs_the_number_of_classes():
    network = nn.Conv2d(1, 3, 8)
    with pytest.raises(ValueError, match=r"`num_classes` must be given .* got None for Conv2d"):
        LitClassifier(network)
    assert LitClassifier(network, num_classes=3).num_classes == 3


def test_a_checkpoint_holds_plain_values_only_and_restores_the_network(tmp_path: Path):
    make = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    model = small(optimizer=make, scheduler=warmup_cosine, scheduler_interval="step")
    run = trainer(tmp_path)
    run.fit(model, noise())
    run.save_checkpoint(tmp_path / "model.ckpt")
    content = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert set(content["state_dict"]) == {f"network.{name}" for name in model.network.state_dict()}
    restored = LitClassifier.load_from_checkpoint(tmp_path / "model.ckpt", network=convnet(width=2))
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(restored.eval()(x), model.eval()(x))


def test_a_resumed_fit_equals_an_uninterrupted_one(tmp_path: Path):
    class Ordered(RandomData):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(TensorDataset(*self.parts.train), batch_size=8)

    def fit(model: LitClassifier, epochs: int, **options: Any) -> pl.Trainer:
        run = trainer(tmp_path, max_epochs=epochs)
        run.fit(model, Ordered((1, 8, 8), train_samples=16), **options)
        return run

    def fresh() -> LitClassifier:
        torch.manual_seed(1)
        return small(scheduler=functools.partial(warmup_cosine, total_steps=8), scheduler_interval="step")

    whole, first, second = fresh(), fresh(), fresh()
    fit(whole, 4)
    fit(first, 2).save_checkpoint(tmp_path / "half.ckpt")
    fit(second, 4, ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_the_same_seed_gives_the_same_weights(tmp_path: Path):
    models = []
    for _ in range(2):
        torch.manual_seed(4)
        models.append(small())
        trainer(tmp_path).fit(models[-1], noise())
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_example_input_has_the_given_shape():
    assert small(input_shape=[1, 9, 9]).example_input_array.shape == (2, 1, 9, 9)


def test_the_example_input_is_taken_from_the_data_module(tmp_path: Path):
    model = small()
    assert model.example_input_array is None
    trainer(tmp_path).fit(model, noise())
    assert model.example_input_array.shape == (2, 1, 8, 8)


def test_a_given_example_input_wins_over_the_data_module(tmp_path: Path):
    model = small(input_shape=(1, 16, 16))
    trainer(tmp_path).fit(model, noise())
    assert model.example_input_array.shape == (2, 1, 16, 16)


def test_loaders_instead_of_a_data_module_leave_no_example_input(tmp_path: Path):
    model, data = LitClassifier(mlpnet((4, 3))), RandomData((4,), 3, train_samples=8)
    data.setup()
    trainer(tmp_path).fit(model, data.train_dataloader(), data.val_dataloader())
    assert model.example_input_array is None


def test_the_network_is_sharded_once_if_the_strategy_has_a_mesh(monkeypatch: pytest.MonkeyPatch):
    calls = []
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, **how: calls.append((module, how)), raising=False)
    model = small()
    model.configure_model()
    assert calls == []
    model._device_mesh = {"data_parallel": "replicas"}
    model.configure_model()
    model.configure_model()
    assert calls == [(model.network, {"mesh": "replicas", "reshard_after_forward": True})]


SHARDED = """
import warnings; warnings.simplefilter("ignore")
import sys, torch, lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_prune.recipes.classifier import LitClassifier
from lightning_prune.recipes.data import RandomData
from lightning_prune.recipes.networks import convnet

torch.manual_seed(0)
strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
model = LitClassifier(convnet(width=2))
trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=2, logger=False,
                     enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)
trainer.fit(model, RandomData((1, 8, 8), train_samples=32, batch_size=8))
assert all(hasattr(p, "full_tensor") for p in model.network.parameters())
trainer.save_checkpoint(sys.argv[1] + "/model.ckpt")
"""


@pytest.mark.slow
def test_two_processes_train_a_sharded_network_whose_checkpoint_fits_the_plain_one(tmp_path: Path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    LitClassifier.load_from_checkpoint(tmp_path / "model.ckpt", network=convnet(width=2))
