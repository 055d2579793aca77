"""A sweep ended by a real kill in the middle of a job: what is finished stays, the same command does the rest."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_sweep import QUICK, receipts, table

from lightning_prune import sweep

LINE = [
    sys.executable, "-m", "lightning_prune.cli", "-m", *QUICK, "trainer.max_epochs=2", "sweep.controls=[shuffled]",
    "pruning=random,magnitude", "callbacks.pruning.sparsity=0.9", "seed=0,1", "hydra.sweep.dir=runs",
]  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a system with SIGKILL"),
]


def status(folder: Path) -> str:
    try:
        return str(json.loads((folder / "job.json").read_text(encoding="utf-8"))["status"])
    except (OSError, ValueError):
        return ""


def killed_in(folder: Path, pattern: str) -> Path:
    """Start the sweep and kill its process as soon as a job that fits `pattern` is running; return that job's folder."""
    process = subprocess.Popen(LINE, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 240
        while time.monotonic() < end and process.poll() is None:
            for place in (folder / "runs").glob(pattern):
                if status(place) == "running":
                    os.kill(process.pid, signal.SIGKILL)
                    process.wait(30)
                    assert status(place) == "running"
                    return place
            time.sleep(0.01)
        raise AssertionError(f"no job {pattern!r} was seen running; exit code {process.poll()}")
    finally:
        process.kill()
        process.wait(30)


@pytest.mark.timeout(600)
def test_a_killed_sweep_is_usable_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    runs = tmp_path / "runs"
    lost = killed_in(tmp_path, "magnitude-0.9-seed0-*")
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("receipt.json")}
    assert len(before) == 2 + 2  # both random jobs, both dense networks
    assert not (runs / "sweep.md").exists()

    assert sweep.main([str(runs)]) == 1  # the table of what is there, without the command
    assert "4 finished, 1 unfinished" in capsys.readouterr().out
    (row,) = table((runs / "sweep.md").read_text(encoding="utf-8"), "status")
    assert (row["run"], row["error"]) == (lost.name, "still running, or killed")
    assert "pruning=magnitude callbacks.pruning.sparsity=0.9 seed=0" in row["overrides"]

    done = subprocess.run(LINE, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    after = {path: path.stat().st_mtime_ns for path in runs.rglob("receipt.json")}
    assert {path: after[path] for path in before} == before  # finished jobs were skipped
    assert lost / "receipt.json" in after
    assert len(after) == 4 + 2 + 2  # and two controls

    page = (runs / "sweep.md").read_text(encoding="utf-8")
    assert "8 runs: 8 finished." in page
    for row in table(page, "fine-tuned"):
        values = [held.accuracy["finetuned"] for held in receipts(runs).values() if held.method == row["method"]]
        assert len(values) == 2
        spread = statistics.stdev(values)
        told = f"{100 * statistics.fmean(values):.2f}" + (f" ± {100 * spread:.2f}" if spread else "")
        assert row["fine-tuned"] == told


@pytest.mark.timeout(600)
def test_a_kill_while_the_dense_network_trains_leaves_no_lock(tmp_path: Path) -> None:
    lost = killed_in(tmp_path, "dense/seed0-*")
    done = subprocess.run(LINE, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert status(lost) == "finished"
    assert "8 runs: 8 finished." in (tmp_path / "runs" / "sweep.md").read_text(encoding="utf-8")
