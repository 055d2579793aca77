"""The command itself, in processes of its own: help, Ctrl-C, a sweep, a user's own Hydra application."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_prune.receipt import Receipt

QUICK = [
    "data.subset=256",
    "dense.max_epochs=1",
    "trainer.max_epochs=1",
    "measure.seconds=0.05",
    "trainer.accelerator=cpu",
]

CHEAP = ["callbacks.pruning.num_grads=40", "callbacks.pruning.refits=2", "callbacks.pruning.refit_samples=64"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "error::DeprecationWarning:lightning_prune", "-m", "lightning_prune.cli", *arguments]


def finish(folder: Path, *arguments: str) -> str:
    done = subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_help_explains_groups_and_overrides(tmp_path: Path) -> None:
    text = finish(tmp_path, "--help")
    listed = next(line for line in text.splitlines() if line.startswith("pruning: "))
    assert {"chita", "magnitude", "gradual_magnitude", "random", "none"} <= set(
        listed.removeprefix("pruning: ").split(", ")
    )
    assert "callbacks.pruning.sparsity=0.95" in text
    assert "resume=" in text


def test_one_run_prints_one_table(tmp_path: Path) -> None:
    text = finish(tmp_path, *QUICK, "hydra.run.dir=run", "callbacks.progress=null", "trainer.enable_progress_bar=false")
    assert text.count("ms per batch") == 1
    assert "Zeros in dense tensors do not make this model faster." in text
    assert "GPU available" not in text
    receipt = Receipt.load(tmp_path / "run" / "receipt.json")
    assert receipt.command.endswith("trainer.enable_progress_bar=false")
    assert (receipt.method, receipt.requested["sparsity"]) == ("chita", 0.9)


def test_a_sweep_runs_every_job(tmp_path: Path) -> None:
    finish(
        tmp_path,
        "-m",
        *QUICK,
        "hydra.sweep.dir=sweep",
        "pruning=magnitude,random",
        "callbacks.pruning.sparsity=0.5,0.8",
    )
    receipts = [Receipt.load(path) for path in sorted((tmp_path / "sweep").glob("*/receipt.json"))]
    got = {(receipt.method, receipt.requested["sparsity"]) for receipt in receipts}
    assert got == {("magnitude", 0.5), ("magnitude", 0.8), ("random", 0.5), ("random", 0.8)}


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(*QUICK, *CHEAP, "hydra.run.dir=run", "trainer.max_epochs=100000"),
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    run = tmp_path / "run"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not _started_pruning(run):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "resume=run/interrupted.ckpt" in output
    saved = torch.load(run / "interrupted.ckpt", weights_only=True)
    epochs = int(saved["epoch"]) + 2
    finish(
        tmp_path, *QUICK, *CHEAP, "hydra.run.dir=rest", f"trainer.max_epochs={epochs}", "resume=run/interrupted.ckpt"
    )
    assert Receipt.load(tmp_path / "rest" / "receipt.json").reached["sparsity"] == pytest.approx(0.9, abs=1e-4)


def _started_pruning(run: Path) -> bool:
    """Whether the pruned fit has saved an epoch after the dense one was done."""
    dense, last = run / "dense.ckpt", run / "last.ckpt"
    return dense.exists() and last.exists() and os.path.getmtime(last) > os.path.getmtime(dense)


def test_a_users_own_hydra_application_finds_the_configurations(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("defaults: [_self_, {pruning: magnitude}]\ncallbacks: {}\n")
    (tmp_path / "app.py").write_text(
        "import hydra\n"
        "from lightning_prune import instantiate_callbacks\n"
        "@hydra.main(version_base='1.3', config_path='conf', config_name='config')\n"
        "def main(cfg):\n"
        "    callbacks = instantiate_callbacks(cfg.callbacks)\n"
        "    print('made', type(callbacks[0]).__name__, callbacks[0].sparsity)\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "app.py", "callbacks.pruning.sparsity=0.7", "hydra.run.dir=out"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "made Magnitude 0.7" in done.stdout, done.stdout + done.stderr
