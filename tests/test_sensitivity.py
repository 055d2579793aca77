"""The sensitivity scan: hand-made networks, a naive loop as oracle, and the callback in a fit."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune import Magnitude, prune
from lightning_prune.sensitivity import SensitivityScan, accuracy, check_sparsities, heat_map, scan_sensitivity


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).eval()


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(20, 6, generator=generator), torch.randint(3, (20,), generator=generator)) for _ in range(3)]


def test_each_value_is_that_of_a_network_with_one_pruned_layer() -> None:
    held = scan_sensitivity(network(), data(), sparsities=(0.5, 0.9), groups=False)
    for name, values in held.layers.items():
        for sparsity, value in zip((0.5, 0.9), values, strict=True):
            other = network()
            prune(other, Magnitude(sparsity=sparsity, include=[name]))
            correct = sum(int((other(x).argmax(1) == y).sum()) for x, y in data())
            assert value == pytest.approx(correct / 60)
    assert list(held.layers) == ["0.weight", "3.weight"]
    assert held.samples == 60


def test_a_group_is_pruned_by_whole_units() -> None:
    held = scan_sensitivity(network(), data(), sparsities=(0.5,))
    assert list(held.groups) == ["0"]
    module = network()
    norms = [
        (module[0].weight.norm(dim=1) + module[3].weight.norm(dim=0) + module[0].bias.abs()
         + module[1].weight.abs() + module[1].bias.abs())
    ]  # fmt: skip
    removed = torch.sort(norms[0], stable=True).indices[:8]
    with torch.no_grad():
        module[3].weight[:, removed] = 0
        correct = sum(int((module(x).argmax(1) == y).sum()) for x, y in data())
    assert held.groups["0"] == [pytest.approx(correct / 60)]


def test_the_module_stays_as_it_was() -> None:
    module = network().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    scan_sensitivity(module, data(), sparsities=(0.9,))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert module.training


def test_every_batch_is_read_once() -> None:
    read: list[int] = []

    class Loader:
        def __iter__(self) -> Any:
            for number, batch in enumerate(data()):
                read.append(number)
                yield batch

    scan_sensitivity(network(), Loader(), sparsities=(0.5, 0.9))
    assert read == [0, 1, 2]


def test_the_loss_is_measured_without_a_metric() -> None:
    def loss(module: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    held = scan_sensitivity(network(), data(), None, loss, sparsities=(0.5,), groups=False)
    assert held.metric == "loss"
    assert held.dense == pytest.approx(sum(float(loss(network(), batch).detach()) for batch in data()) / 3, rel=1e-5)


def test_a_module_that_cannot_be_traced_is_scanned_by_layers() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if float(x.detach().sum().item()) > -1e9 else x

    held = scan_sensitivity(Odd(), data(), sparsities=(0.5,))
    assert list(held.layers) == ["layer.weight"]
    assert held.groups == {}
    assert held.notes
    assert held.notes[0].startswith("Groups of channels were not scanned")


def test_accuracy_counts_the_largest_logit() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    assert float(accuracy(nn.Identity(), (logits, torch.tensor([1, 0, 0])))) == pytest.approx(2 / 3)


def test_the_tables_hold_every_value(tmp_path: Path) -> None:
    held = scan_sensitivity(network(), data(), sparsities=(0.5, 0.9))
    written = held.save(tmp_path)
    assert {path.name for path in written} >= {"sensitivity.json", "sensitivity.md", "sensitivity.csv"}
    with (tmp_path / "sensitivity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in rows] == [value for _, row in held.rows() for value in row]
    assert json.loads((tmp_path / "sensitivity.json").read_text())["layers"] == held.layers
    for value in held.layers["0.weight"]:
        assert f"{value:.4f}" in (tmp_path / "sensitivity.md").read_text()


def test_the_heat_map_is_a_picture() -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    picture = heat_map(scan_sensitivity(network(), data(), sparsities=(0.5, 0.9)))
    assert picture is not None
    assert picture[:4] == b"\x89PNG"


@pytest.mark.parametrize("sparsities", [[], 0.5, "0.5", [1.5]])
def test_wrong_sparsities_are_refused(sparsities: Any) -> None:
    with pytest.raises(ValueError, match="`sparsities` must"):
        check_sparsities(sparsities)


@pytest.mark.parametrize("settings", [{"when": "x"}, {"metric": "x"}, {"samples": 0}, {"groups": 1}, {"seed": -1}])
def test_the_callback_refuses_wrong_arguments(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}` must be"):
        SensitivityScan(**settings)


@pytest.mark.filterwarnings("ignore:.*left no weight in")
def test_the_callback_writes_its_tables_at_the_end_of_a_fit(tiny: Any, loader: DataLoader, tmp_path: Path) -> None:
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    scan = SensitivityScan(metric="loss", sparsities=[0.5], groups=False)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=str(tmp_path), enable_checkpointing=False,
        callbacks=[Magnitude(sparsity=0.5, measure=False), scan], **quiet,
    )  # fmt: skip
    trainer.fit(tiny, loader)
    assert scan.result is not None
    assert len(scan.result.layers) > 1
    assert (tmp_path / "sensitivity_pruned.md").exists()
