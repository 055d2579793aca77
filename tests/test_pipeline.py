"""The main job: what it leaves behind, checkpoint in and out, resume, and what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file

from lightning_prune import pipeline
from lightning_prune.masks import read_masks
from lightning_prune.receipt import Receipt
from lightning_prune.recipes.networks import mlpnet

QUICK = [
    "data.subset=256", "dense.max_epochs=1", "trainer.max_epochs=1", "trainer.accelerator=cpu", "measure.seconds=0.05",
    "trainer.enable_progress_bar=false", "callbacks.progress=null",
]  # fmt: skip


CHEAP = ["callbacks.pruning.num_grads=40", "callbacks.pruning.refits=2", "callbacks.pruning.refit_samples=64"]


def composed(folder: Path, overrides: Sequence[str] = ()) -> DictConfig:
    with initialize_config_module("lightning_prune.conf", version_base="1.3"):
        cfg = compose("prune", overrides=[*QUICK, *overrides])
    # outside a Hydra run there is no run folder to interpolate
    cfg.trainer.default_root_dir = str(folder)
    cfg.callbacks.checkpoint.dirpath = str(folder)
    return cfg


def run(folder: Path, *overrides: str) -> Receipt:
    pipeline.run(composed(folder, overrides), folder)
    return Receipt.load(folder / "receipt.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run(folder)
    return folder


def test_the_run_leaves_every_file(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "receipt.json", "receipt.md", "receipt.png", "dense.ckpt", "pruned.ckpt", "masks.safetensors", "model.safetensors",
    }  # fmt: skip


def test_the_receipt_can_be_recomputed_from_the_files(finished: Path) -> None:
    receipt = json.loads((finished / "receipt.json").read_text())
    weights, masks = load_file(finished / "model.safetensors"), read_masks(finished / "masks.safetensors")
    kept = sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    assert (receipt["reached"]["kept"], receipt["reached"]["total"]) == (kept, total)
    assert kept == total - int(0.9 * total + 1e-9)
    assert all(bool((weights[name][~mask] == 0).all()) for name, mask in masks.items())
    assert {layer["name"]: layer["kept"] for layer in receipt["layers"]} == {n: int(m.sum()) for n, m in masks.items()}
    assert receipt["reached"]["params"]["dense"] - receipt["reached"]["params"]["pruned"] == total - kept
    assert receipt["bytes"]["dense"] > receipt["bytes"]["compressed"] > 0
    assert all(0 <= receipt["accuracy"][stage] <= 1 for stage in ("dense", "pruned", "finetuned"))
    assert "Zeros in dense tensors do not make this model faster." in receipt["notes"]


def test_the_pruned_checkpoint_loads_strictly_into_the_dense_model(finished: Path) -> None:
    dense = torch.load(finished / "dense.ckpt", weights_only=True)["state_dict"]
    pruned = torch.load(finished / "pruned.ckpt", weights_only=True)["state_dict"]
    assert dense.keys() == pruned.keys()
    assert all(dense[name].shape == pruned[name].shape for name in dense)


def test_a_trained_checkpoint_skips_dense_training(finished: Path, tmp_path: Path) -> None:
    receipt = run(tmp_path, f"ckpt_path={finished / 'dense.ckpt'}", "callbacks.pruning.sparsity=0.5", *CHEAP)
    assert not (tmp_path / "dense.ckpt").exists()
    assert receipt.requested["sparsity"] == 0.5
    assert receipt.accuracy["dense"] == Receipt.load(finished / "receipt.json").accuracy["dense"]


def test_the_method_of_the_command_is_chita_at_nine_tenths(finished: Path) -> None:
    receipt = Receipt.load(finished / "receipt.json")
    assert (receipt.method, receipt.requested) == ("chita", {"sparsity": 0.9})
    assert receipt.repair is not None
    assert receipt.repair.startswith("BatchNorm statistics re-estimated on ")
    assert any("gradient rows" in note for note in receipt.notes)
    assert receipt.certificate is None


def test_pruning_at_the_end_leaves_nothing_to_fine_tune(tmp_path: Path) -> None:
    receipt = run(tmp_path, *CHEAP, "callbacks.pruning.at=end")
    assert receipt.reached["sparsity"] == pytest.approx(0.9, abs=1e-4)
    assert receipt.accuracy["pruned"] == receipt.accuracy["finetuned"]


def test_pruning_in_rounds_fine_tunes_in_between(finished: Path, tmp_path: Path) -> None:
    rounds = "callbacks.pruning.at=[[start,0.5],[1,0.8],[2,0.95]]"
    given = ["callbacks.pruning.sparsity=null", "trainer.max_epochs=3", f"ckpt_path={finished / 'dense.ckpt'}"]
    receipt = run(tmp_path, *CHEAP, rounds, *given)
    total = receipt.reached["total"]
    assert receipt.reached["kept"] == total - int(0.95 * total + 1e-9)
    state = torch.load(tmp_path / "pruned.ckpt", weights_only=True)["callbacks"]["lightning_prune.chita"]
    assert [event["requested"] for event in state["history"]] == [0.5, 0.8, 0.95]
    assert [event["epoch"] for event in state["history"]] == [0, 1, 2]


def test_removed_channels_leave_a_smaller_file_that_can_be_fine_tuned(finished: Path, tmp_path: Path) -> None:
    dense = f"ckpt_path={finished / 'dense.ckpt'}"
    budget = ["pruning=magnitude", "callbacks.pruning.sparsity=null", "callbacks.pruning.budget=0.5"]
    receipt = run(tmp_path / "first", *budget, "callbacks.pruning.budget_type=params", dense)
    file = tmp_path / "first" / "model.safetensors"
    numbers = sum(tensor.numel() for name, tensor in load_file(file).items() if "running" not in name)
    params = receipt.reached["params"]
    assert params["pruned"] <= 0.5 * params["dense"]
    assert abs(numbers - params["pruned"]) < 10  # counters of BatchNorm are in the file too
    assert receipt.bytes["pruned"] == file.stat().st_size < receipt.bytes["dense"]
    assert receipt.milliseconds["exported"] is not None
    again = run(tmp_path / "second", "pruning=none", f"ckpt_path={file}")
    assert again.accuracy["dense"] == pytest.approx(receipt.accuracy["finetuned"])


def test_a_safetensors_file_of_the_bare_network_is_taken(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = mlpnet(sizes=(64, 40, 20, 10))
    save_file(network.state_dict(), tmp_path / "net.safetensors")
    receipt = run(
        tmp_path / "run", f"ckpt_path={tmp_path / 'net.safetensors'}", "model=mlpnet", "model.network.sizes=[64,40,20,10]",
        "model.input_shape=[1,8,8]", "trainer.max_epochs=1",
    )  # fmt: skip
    assert receipt.reached["total"] == 64 * 40 + 40 * 20 + 20 * 10


def test_pruning_none_trains_dense(tmp_path: Path) -> None:
    receipt = run(tmp_path, "pruning=none")
    assert receipt.method == "none"
    assert receipt.reached["sparsity"] == 0
    assert receipt.accuracy["dense"] is not None
    assert not (tmp_path / "masks.safetensors").exists()
    assert not (tmp_path / "pruned.ckpt").exists()


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "whole"
    run(whole, *CHEAP, "trainer.max_epochs=3")

    class Stop(pipeline.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1 and trainer.max_epochs == 3:
                raise RuntimeError("power cut")

    made = pipeline.instantiate_callbacks
    monkeypatch.setattr(pipeline, "instantiate_callbacks", lambda cfg: [*made(cfg), Stop()])
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "cut", *CHEAP, "trainer.max_epochs=3")
    monkeypatch.undo()
    receipt = run(tmp_path / "rest", *CHEAP, "trainer.max_epochs=3", f"resume={tmp_path / 'cut' / 'last.ckpt'}")
    one, two = load_file(whole / "model.safetensors"), load_file(tmp_path / "rest" / "model.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (tmp_path / "cut" / "interrupted.ckpt").exists()
    assert receipt.accuracy["dense"] == Receipt.load(whole / "receipt.json").accuracy["dense"]


def test_a_checkpoint_of_another_model_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="belongs to another model"):
        run(tmp_path, f"ckpt_path={finished / 'dense.ckpt'}", "model.network.width=4")


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`ckpt_path` must be an existing file"):
        run(tmp_path, f"ckpt_path={tmp_path / 'no.ckpt'}")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"\x10" * 30)
    with pytest.raises(ValueError, match="cannot be read"):
        run(tmp_path / "run", f"ckpt_path={tmp_path / 'bad.safetensors'}")


@pytest.mark.skipif(
    "LIGHTNING_PRUNE_DATA" not in os.environ,
    reason="needs MNIST: set LIGHTNING_PRUNE_DATA to the folder that holds mnist/",
)
def test_the_shipped_mlpnet_has_its_stated_accuracy(tmp_path: Path) -> None:
    weights = Path(os.environ["LIGHTNING_PRUNE_DATA"]) / "mlpnet_mnist.safetensors"
    if not weights.exists():
        pytest.skip("mlpnet_mnist.safetensors is not in LIGHTNING_PRUNE_DATA")
    receipt = run(tmp_path, "data=mnist", "model=mlpnet", f"ckpt_path={weights}", "data.subset=1000")
    assert receipt.accuracy["dense"] == pytest.approx(0.9397, abs=2e-4)
    assert receipt.reached["total"] == 32_360
