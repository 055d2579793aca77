"""The sandbox: a step run inside it leaves no trace, also when it raises."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall

from lightning_prune.sandbox import isolated_rng, rng_states, seed_all, set_rng_states, untouched


class Failure(Exception):
    """Raised by the body of a sandbox."""


@contextmanager
def expected(failure: bool) -> Iterator[None]:
    """Let the body end well, or in a Failure."""
    if failure:
        with pytest.raises(Failure):
            yield
    else:
        yield


def draws() -> tuple[float, float, float, float]:
    """The next number of each global generator (a normal one leaves half of a pair behind)."""
    return random.gauss(0, 1), np.random.normal(), float(torch.rand(1)), float(torch.randn(1))


@pytest.mark.parametrize("failure", [False, True])
def test_random_states_are_restored(failure):
    draws()
    with isolated_rng():
        following = draws()
    with expected(failure), isolated_rng():
        seed_all(5)
        assert draws() != following
        if failure:
            raise Failure
    assert draws() == following


def test_the_same_seed_gives_the_same_numbers_everywhere():
    with isolated_rng():
        seed_all(3)
        first = draws()
        seed_all(3)
        assert draws() == first
        seed_all(4)
        assert draws() != first


@pytest.mark.parametrize("seed", [2**32 + 1, 2**64 + 7])
def test_seeds_of_any_size_are_taken(seed):
    with isolated_rng():
        seed_all(seed)
        first = draws()
        seed_all(seed)
        assert draws() == first


def test_states_survive_a_checkpoint_without_unpickling_code(tmp_path):
    draws()
    torch.save(rng_states(), tmp_path / "states.ckpt")
    following = draws()
    set_rng_states(torch.load(tmp_path / "states.ckpt", weights_only=True))
    assert draws() == following


@pytest.mark.parametrize("failure", [False, True])
def test_training_flags_of_every_submodule_are_restored(failure):
    net = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(1)))
    net[1].eval()
    net[1][1].train()
    before = [module.training for module in net.modules()]
    with expected(failure), untouched(net):
        net.train()
        net[0].eval()
        if failure:
            raise Failure
    assert [module.training for module in net.modules()] == before


def test_gradients_are_enabled_inside_and_the_mode_is_restored():
    with torch.no_grad():
        with untouched(nn.Linear(1, 1)):
            assert torch.is_grad_enabled()
        assert not torch.is_grad_enabled()


# metrics


class Metrics(nn.Module):
    """Metrics as users hold them: one, one with list states, and a collection that shares states."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()
        self.values = CatMetric()
        self.scores = MetricCollection(
            [MulticlassAccuracy(3), MulticlassPrecision(3, average="micro"), MulticlassRecall(3, average="micro")]
        )

    def update(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        guesses, labels = (torch.randint(3, (20,), generator=generator) for _ in range(2))
        self.mean.update(guesses.float())
        self.values(guesses.float())
        self.scores.update(guesses, labels)  # an update forms groups that share states, a call does not

    def results(self) -> list[Any]:
        return [self.mean.compute(), self.values.compute(), self.scores.compute()]


class CatMetric(MeanMetric):
    """A metric with a list state, and a counter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("seen", default=[], dist_reduce_fx="cat")
        self.calls = 0

    def update(self, value: Tensor) -> None:
        super().update(value)
        self.seen.append(value)
        self.calls += 1


def flat(results: list[Any]) -> list[float]:
    return [float(value) for item in results for value in (item.values() if isinstance(item, dict) else [item])]


@pytest.mark.parametrize("failure", [False, True])
@pytest.mark.parametrize("updates_before", [0, 1, 2])
@pytest.mark.parametrize("computed_before", [False, True])
def test_metrics_go_on_as_if_nothing_had_been_counted(failure, updates_before, computed_before):
    metrics, control = Metrics(), Metrics()
    for seed in range(updates_before):
        metrics.update(seed)
        control.update(seed)
    if computed_before and updates_before:
        assert flat(metrics.results()) == flat(control.results())
    with expected(failure), untouched(metrics):
        metrics.update(99)
        metrics.results()
        metrics.update(98)
        if failure:
            raise Failure
    assert metrics.values.calls == control.values.calls
    if updates_before:
        assert flat(metrics.results()) == flat(control.results())
    for seed in (10, 11):
        metrics.update(seed)
        control.update(seed)
        assert flat(metrics.results()) == flat(control.results())
    assert metrics.mean._update_count == control.mean._update_count == updates_before + 2
    assert [len(metrics.values.seen), len(control.values.seen)] == [updates_before + 2] * 2


def test_a_collection_that_shares_states_still_shares_them_afterwards():
    metrics = Metrics()
    metrics.update(0)
    groups = copy.deepcopy(metrics.scores.compute_groups)
    first, second = metrics.scores._modules["MulticlassPrecision"], metrics.scores._modules["MulticlassRecall"]
    assert first.tp is second.tp
    with untouched(metrics):
        metrics.update(1)
    assert first.tp is second.tp
    assert metrics.scores.compute_groups == groups


def test_a_collection_that_shared_nothing_yet_shares_nothing_afterwards():
    metrics = Metrics()
    with untouched(metrics):
        metrics.update(1)
        assert len(metrics.scores.compute_groups) == 2
    assert len(metrics.scores.compute_groups) == 3


# logging


class Logging(LightningModule):
    """Logs in its step, through itself and through a LightningModule inside."""

    def __init__(self, inner: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        if inner:
            self.inner = Logging(inner=False)

    def training_step(self, batch: Any) -> None:
        self.log("loss", 1.0, on_step=True)
        self.log_dict({"a": 1.0})
        if hasattr(self, "inner"):
            self.inner.training_step(batch)


@pytest.mark.parametrize("wrap", [lambda module: module, lambda module: torch.compile(module, backend="eager")])
def test_logging_is_muted_inside_and_whole_again_outside(wrap):
    module = Logging()
    before = {name: vars(child).keys() for name, child in module.named_modules()}
    wrapped = wrap(module)
    with pytest.warns(UserWarning, match=r"self\.log"):
        wrapped.training_step(None)  # without a Trainer it warns
    with untouched(wrapped):
        wrapped.training_step(None)  # warnings are errors here
    assert {name: vars(child).keys() for name, child in module.named_modules()} == before
    with pytest.warns(UserWarning, match=r"self\.log"):
        wrapped.training_step(None)


def test_a_log_of_the_users_own_making_is_put_back():
    module, lines = Logging(inner=False), []
    module.__dict__["log"] = lambda name, value, **_: lines.append(name)
    with untouched(module):
        module.training_step(None)
    assert lines == []
    module.log("mine", 1.0)
    assert lines == ["mine"]


def test_a_plain_module_keeps_a_method_that_happens_to_be_called_log():
    class Logarithm(nn.Module):
        def log(self, value: Tensor) -> Tensor:
            return value.log()

    module = Logarithm()
    with untouched(module):
        assert float(module.log(torch.ones(1))) == 0.0


@pytest.mark.parametrize("failure", [False, True])
def test_loggers_of_the_trainer_are_silent_inside(failure):
    loggers = [SimpleNamespace(name="one"), SimpleNamespace(name="two")]
    trainer = SimpleNamespace(loggers=list(loggers))
    with expected(failure), untouched(Logging(inner=False), trainer):
        assert all(isinstance(logger, DummyLogger) for logger in trainer.loggers)
        trainer.loggers[1].log_metrics({"a": 1.0}, 3)
        trainer.loggers[0].experiment.add_scalar("a", 1.0)
        if failure:
            raise Failure
    assert trainer.loggers == loggers


def test_a_trainer_without_loggers_is_left_without(tiny):
    trainer = SimpleNamespace(loggers=[])
    with untouched(tiny, trainer):
        assert trainer.loggers == []
    assert trainer.loggers == []
