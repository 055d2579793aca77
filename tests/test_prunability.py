"""Prunability: hand-made losses with known answers, a module that stays as it was, and the callback in a fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune import Magnitude
from lightning_prune.prunability import Prunability, measure_prunability, prunability


def distance(target: Mapping[str, Tensor], base: float = 1.0):
    """A loss that grows with every weight that differs from its target."""

    def loss(weights: Mapping[str, Tensor]) -> float:
        return base + sum(float((weights[name] - value).abs().sum()) for name, value in target.items())

    return loss


def test_half_of_the_weights_are_zero_and_the_rest_is_needed() -> None:
    weights = {"a": torch.tensor([3.0, 0.0, -2.0, 0.0]), "b": torch.tensor([[0.0, 5.0], [0.0, 1.0]])}
    result = prunability(distance(weights), weights)
    # 8 weights: a fraction above 3/8 keeps four of them, which is all that matter
    assert 0.375 < result.value <= 0.4
    assert result.curve[0] == (1.0, 1.0)


def test_a_network_of_which_half_is_exactly_zero_has_prunability_one_half() -> None:
    weights = {"a": torch.arange(1.0, 1001.0), "zeros": torch.zeros(10, 100)}
    result = prunability(distance(weights), weights)
    assert result.value == pytest.approx(0.5, abs=0.05 / 2**6)  # what six bisections of a step of 0.05 tell apart


@pytest.mark.parametrize("base", [0.0, 1.0, float("inf"), float("nan")])
def test_keeping_everything_is_always_feasible(base: float) -> None:
    weights = {"a": torch.arange(1.0, 1001.0)}
    result = prunability(lambda held: base if bool((held["a"] == weights["a"]).all()) else float("nan"), weights)
    assert result.value == pytest.approx(1.0, abs=0.05 / 2**5)
    assert result.curve[0][0] == 1.0


def test_everything_is_needed() -> None:
    weights = {"a": torch.arange(1.0, 1001.0)}
    assert prunability(distance(weights), weights).value > 0.98


def test_nothing_is_needed() -> None:
    weights = {"a": torch.ones(10)}
    assert prunability(lambda held: 1.0, weights).value == 0.0


def test_the_order_of_weights_does_not_matter() -> None:
    weights = {"a": torch.randn(200)}
    turned = {"a": weights["a"].flip(0)}
    first, second = prunability(distance(weights, 20.0), weights), prunability(distance(turned, 20.0), turned)
    assert first.value == second.value
    assert 0.05 < first.value < 0.95


def test_dead_weights_lower_it() -> None:
    weights = {"a": torch.randn(100)}
    more = {**weights, "dead": torch.zeros(100)}
    assert prunability(distance(weights), more).value < prunability(distance(weights), weights).value


def test_duplicated_dead_neurons_lower_it() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(64, 6)

    def network(dead: int) -> nn.Sequential:
        torch.manual_seed(1)
        first, last = nn.Linear(6, 8), nn.Linear(8, 3)
        more, wide = nn.Linear(6, 8 + dead), nn.Linear(8 + dead, 3)
        with torch.no_grad():
            more.weight[:8], more.bias[:8] = first.weight, first.bias
            more.weight[8:], more.bias[8:] = first.weight[0] / 1e3, -1e3  # copies that the ReLU never lets through
            wide.weight[:, :8], wide.weight[:, 8:], wide.bias[:] = last.weight, 0.0, last.bias
        return nn.Sequential(more, nn.ReLU(), wide)

    with torch.no_grad():
        classes = network(0)(inputs).argmax(1)
        assert torch.allclose(network(8)(inputs), network(0)(inputs))

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    alone, wide = (measure_prunability(network(dead), [(inputs, classes)], loss) for dead in (0, 8))
    assert wide.value < 0.75 * alone.value
    assert wide.loss == pytest.approx(alone.loss, rel=1e-5)


def test_the_first_failure_counts_not_a_later_success() -> None:
    weights = {"a": torch.arange(1.0, 101.0)}

    def loss(held: Mapping[str, Tensor]) -> float:
        kept = float((held["a"] != 0).float().mean())
        return 2.0 if 0.6 < kept < 0.8 else 1.0

    assert prunability(loss, weights).value == pytest.approx(0.8, abs=0.02)


def test_the_absolute_tolerance_is_a_floor() -> None:
    weights = {"a": torch.ones(100)}
    relative = prunability(distance(weights, 1e-3), weights)
    absolute = prunability(distance(weights, 1e-3), weights, absolute=50.0)
    assert relative.tolerance == pytest.approx(1e-4)
    assert relative.value > 0.98
    assert absolute.value == pytest.approx(0.5, abs=0.02)


def test_layerwise_keeps_the_same_fraction_of_every_tensor() -> None:
    weights = {"large": torch.full((100,), 5.0), "small": torch.full((100,), 0.1)}
    seen: list[tuple[int, int]] = []

    def loss(held: Mapping[str, Tensor]) -> float:
        seen.append((int((held["large"] != 0).sum()), int((held["small"] != 0).sum())))
        return 1.0

    prunability(loss, weights, variant="magnitude_layerwise")
    assert all(large == small for large, small in seen)


def test_random_averages_five_draws() -> None:
    calls: list[int] = []
    weights = {"a": torch.ones(100)}

    def loss(held: Mapping[str, Tensor]) -> float:
        calls.append(int((held["a"] != 0).sum()))
        return 1.0

    result = prunability(loss, weights, variant="random")
    assert len(calls) == 1 + 5 * 20
    assert calls[1:6] == [95] * 5
    assert result.value == 0.0


def test_perturbed_weights_are_those_that_would_go() -> None:
    weights = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    changed: list[Tensor] = []

    def loss(held: Mapping[str, Tensor]) -> float:
        changed.append(held["a"] != weights["a"])
        return 1.0

    prunability(loss, weights, variant="perturb")
    halfway = changed[1 + 9]  # kept 0.5
    assert halfway.tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "other"}, "`variant` must be one of"), ({"relative": -1.0}, "`relative` must be"),
        ({"absolute": float("nan")}, "`absolute` must be"), ({"noise": 0.0}, "`noise` must be"),
        ({"seed": -1}, "`seed` must be"),
    ],
)  # fmt: skip
def test_arguments_that_break_their_rule_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prunability(lambda held: 1.0, {"a": torch.ones(2)}, **settings)


def test_no_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="`weights` is empty"):
        prunability(lambda held: 1.0, {})


def test_the_module_stays_as_it_was() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2)).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    data = [(torch.randn(16, 4), torch.randint(2, (16,))) for _ in range(4)]

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    first = measure_prunability(network, data, loss, samples=40)
    assert first.samples == 48  # whole batches
    assert first == measure_prunability(network, data, loss, samples=40)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(module.training for module in network.modules())
    with torch.no_grad():
        network.eval()
        by_hand = sum(float(loss(network, batch)) for batch in data[:3]) / 3
    assert first.loss == pytest.approx(by_hand, rel=1e-5)


def test_no_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no batch to measure on"):
        measure_prunability(nn.Linear(2, 2), [], lambda module, batch: module(batch).sum())


def fit(module: Any, loader: DataLoader, folder: Path, *callbacks: Any) -> None:
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=str(folder), enable_checkpointing=False,
        callbacks=list(callbacks), **quiet,
    )  # fmt: skip
    trainer.fit(module, loader)


@pytest.mark.parametrize("first", ["pruner", "prunability"])
def test_the_callback_writes_into_the_receipt(tiny: Any, loader: DataLoader, tmp_path: Path, first: str) -> None:
    pruner, measure = Magnitude(sparsity=0.5, measure=False), Prunability(absolute=0.05, samples=24)
    fit(tiny, loader, tmp_path, *((pruner, measure) if first == "pruner" else (measure, pruner)))
    assert measure.result is not None
    assert 0 <= measure.result.value <= 0.52  # half of the weights are gone already
    assert [note for note in pruner.receipt.notes if note.startswith("Prunability")] == [measure.result.sentence()]
    held = json.loads((tmp_path / "prunability_pruned.json").read_text())
    assert held["value"] == measure.result.value


def test_the_callback_leaves_training_bitwise_unchanged(tiny_class: Any, dataset: Any, tmp_path: Path) -> None:
    states = []
    for callbacks in ([], [Prunability(when="fit_start", samples=8)]):
        torch.manual_seed(3)
        module = tiny_class()
        fit(module, DataLoader(dataset, batch_size=4, shuffle=True), tmp_path, *callbacks)
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert (tmp_path / "prunability.json").exists()


@pytest.mark.parametrize("settings", [{"when": "start"}, {"variant": "x"}, {"samples": 0}, {"seed": -1}])
def test_the_callback_refuses_wrong_arguments(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}` must be"):
        Prunability(**settings)


def test_the_receipt_of_a_dense_run_tells_its_prunability(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_module

    from lightning_prune import Receipt, pipeline

    quick = [
        "data.subset=100", "dense.max_epochs=1", "trainer.accelerator=cpu", "measure.seconds=0.05", "pruning=none",
        "trainer.enable_progress_bar=false", "callbacks.progress=null", "callbacks=analysis", "callbacks.sensitivity=null",
    ]  # fmt: skip
    with initialize_config_module("lightning_prune.conf", version_base="1.3"):
        cfg = compose("prune", overrides=quick)
    cfg.trainer.default_root_dir = cfg.callbacks.checkpoint.dirpath = str(tmp_path)
    pipeline.run(cfg, tmp_path)
    notes = Receipt.load(tmp_path / "receipt.json").notes
    value = json.loads((tmp_path / "prunability.json").read_text())["value"]
    assert [note for note in notes if note.startswith(f"Before pruning: Prunability {value:.4g}")]
