"""A sweep from the command line: its table, dense networks shared by seed, finished jobs skipped, failures named."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lightning_prune import sweep
from lightning_prune.masks import read_masks
from lightning_prune.receipt import Receipt

QUICK = [
    "data.subset=200", "dense.max_epochs=1", "trainer.max_epochs=1", "trainer.accelerator=cpu", "measure.seconds=0.05",
    "trainer.enable_progress_bar=false", "callbacks.progress=null",
]  # fmt: skip
GRID = ["pruning=magnitude,random", "seed=0,1", "hydra.sweep.dir=runs"]


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "lightning_prune.cli", "-m", *QUICK, *arguments]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep of two methods, two sparsities and two seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    done = command(folder, *GRID, "callbacks.pruning.sparsity=0.5,0.9")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs"


def receipts(folder: Path) -> dict[str, Receipt]:
    return {str(path.parent.relative_to(folder)): Receipt.load(path) for path in folder.rglob("receipt.json")}


def table(page: str, column: str) -> list[dict[str, str]]:
    """The rows of the first table that has a column of this name."""
    for block in page.split("\n\n"):
        lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        if lines and column in lines[0]:
            return [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]
    raise AssertionError(f"no table has a column {column!r}")


def test_the_sweep_leaves_its_tables_and_pictures(swept: Path) -> None:
    assert {"sweep.csv", "sweep.md", "pareto.png", "pareto.svg"} <= {path.name for path in swept.iterdir()}
    assert (swept / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (swept / "pareto.svg").read_text(encoding="utf-8")[:2000]


def test_the_table_equals_a_recomputation_from_the_receipts(swept: Path) -> None:
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for place, receipt in receipts(swept).items():
        if receipt.method in ("magnitude", "random"):
            groups[receipt.method, f"{receipt.requested['sparsity']:g}"].append(receipt.accuracy["finetuned"])
        elif receipt.method == "shuffled":
            owner = Receipt.load(swept / Path(place).parent / "receipt.json")
            groups["shuffled", f"{owner.requested['sparsity']:g}"].append(receipt.accuracy["finetuned"])
    rows = table((swept / "sweep.md").read_text(encoding="utf-8"), "fine-tuned")
    assert len(rows) == 4

    def told(values: list[float]) -> str:
        spread = statistics.stdev(values)
        return f"{100 * statistics.fmean(values):.2f}" + (f" ± {100 * spread:.2f}" if spread else "")

    for row in rows:
        assert row["seeds"] == "2"
        assert row["fine-tuned"] == told(groups[row["method"], row["asked"]])
        if row["method"] == "magnitude":
            assert row["shuffled"] == told(groups["shuffled", row["asked"]])
            assert row["random"] == told(groups["random", row["asked"]])
        else:
            assert row["not better than"] == "(control)"


def test_the_csv_holds_every_figure_of_every_receipt(swept: Path) -> None:
    with (swept / "sweep.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["job"]: row for row in csv.DictReader(file)}
    known = receipts(swept)
    assert rows.keys() == known.keys()
    assert len(rows) == 8 + 4 + 2  # jobs, controls of the four magnitude runs, dense networks
    for job, receipt in known.items():
        row = rows[job]
        assert row["status"] == "finished"
        assert (int(row["seed"]), int(row["kept"]), int(row["total"])) == (
            receipt.seed, receipt.reached["kept"], receipt.reached["total"],
        )  # fmt: skip
        for stage in ("dense", "pruned", "finetuned"):
            value = receipt.accuracy[stage]
            assert row[f"accuracy_{stage}"] == ("" if value is None else str(value))
        assert int(row["bytes_compressed"]) == receipt.bytes["compressed"]
        assert float(row["flops_dense"]) == receipt.reached["flops"]["dense"]


def test_the_dense_network_is_trained_once_per_seed_and_shared(swept: Path) -> None:
    dense = {receipt.seed: receipt for receipt in receipts(swept).values() if receipt.method == "none"}
    assert sorted(dense) == [0, 1]
    assert len(list(swept.rglob("dense.ckpt"))) == 2
    for receipt in receipts(swept).values():
        assert receipt.accuracy["dense"] == dense[receipt.seed].accuracy["dense"]


def test_the_control_keeps_as_many_weights_in_every_layer_elsewhere(swept: Path) -> None:
    controls = sorted(swept.glob("*/control_shuffled"))
    assert len(controls) == 4
    for control in controls:
        own, shuffled = read_masks(control.parent / "masks.safetensors"), read_masks(control / "masks.safetensors")
        assert {name: int(mask.sum()) for name, mask in own.items()} == {
            name: int(mask.sum()) for name, mask in shuffled.items()
        }
        assert any(bool((own[name] != shuffled[name]).any()) for name in own)
        weights = load_file(control / "model.safetensors")
        assert all(bool((weights[name][~mask] == 0).all()) for name, mask in shuffled.items())


@pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is None, reason="needs hydra-joblib-launcher"
)
def test_a_second_sweep_skips_what_is_done_and_names_what_fails(swept: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in swept.rglob("receipt.json")}
    broken = next(swept.glob("random-0.9-seed1-*"))
    facts = json.loads((broken / "job.json").read_text())
    (broken / "job.json").write_text(json.dumps({**facts, "status": "running"}))  # as a kill leaves it
    (broken / "receipt.json").unlink()
    done = command(
        swept.parent,
        *GRID,
        "callbacks.pruning.sparsity=0.5,0.9,1.5",
        "sweep.controls=[shuffled,random]",  # other controls, the same jobs
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    after = {path: path.stat().st_mtime_ns for path in swept.rglob("receipt.json")}
    assert {path for path in after if after[path] != before[path]} == {broken / "receipt.json"}
    page = (swept / "sweep.md").read_text(encoding="utf-8")
    failed = table(page, "status")
    assert len(failed) == 4
    assert all("`sparsity` must be in [0, 1), got 1.5" in row["error"] for row in failed)
    assert {row["status"] for row in failed} == {"failed"}
    assert "18 runs: 14 finished, 4 failed" in page


def test_the_report_is_rebuilt_from_an_interrupted_sweep(
    swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for number, source in enumerate(sorted(path.parent for path in swept.glob("magnitude-*/receipt.json"))[:2]):
        place = tmp_path / f"job{number}"
        place.mkdir()
        (place / "receipt.json").write_bytes((source / "receipt.json").read_bytes())
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "job.json").write_text(
        json.dumps({"status": "running", "overrides": ["pruning=random", "seed=3"]})
    )
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "receipt.json").write_text("{")
    assert sweep.main([str(tmp_path)]) == 1
    assert "2 finished, 1 failed, 1 unfinished" in capsys.readouterr().out
    failed = {row["run"]: row for row in table((tmp_path / "sweep.md").read_text(encoding="utf-8"), "status")}
    assert failed["killed"]["error"] == "still running, or killed"
    assert failed["killed"]["overrides"] == "pruning=random seed=3"
    assert failed["damaged"]["error"].startswith("unreadable receipt")


def test_a_folder_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="`folder` must hold runs"):
        sweep.collect(tmp_path)
    with pytest.raises(FileNotFoundError, match="`folder` must be an existing folder"):
        sweep.collect(tmp_path / "none")
    with pytest.raises(SystemExit) as stopped:
        sweep.main([str(tmp_path)])
    assert stopped.value.code == 2
    assert re.search("must hold runs", capsys.readouterr().err)
