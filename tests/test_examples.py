"""Every example runs as its first line says and prints what the documentation quotes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_prune import Receipt
from lightning_prune.receipt import layer_counts, reached_counts

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PROGRAMS = sorted(
    path for path in EXAMPLES.rglob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)
SLOW = pytest.mark.slow  # every example runs once without it


def run(program: str, *arguments: str, folder: Path) -> str:
    """Run an example in an empty folder outside the checkout; return what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH", "")) if path)
    command = [sys.executable, str(EXAMPLES / program), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def cells(output: str, label: str) -> list[str]:
    """Return the cells of the last table row that begins with a label (a receipt may have one too)."""
    row = [line for line in output.splitlines() if re.match(rf"\W*{re.escape(label)}\s+│", line)][-1]
    return [cell.strip() for cell in row.strip("│ ").split("│")][1:]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_every_example_opens_with_the_command_that_runs_it(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f'"""`python {path.relative_to(ROOT)}')
    described = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    assert str(path.parent.relative_to(ROOT) if path.parent != EXAMPLES else path.relative_to(ROOT)) in described


def test_the_callback_example_keeps_a_tenth_of_the_weights(tmp_path: Path) -> None:
    output = run("callback_in_trainer.py", "--epochs", "4", folder=tmp_path)
    assert cells(output, "weights kept") == ["33,744", "3,375"]
    assert cells(output, "state_dict keys") == ["22", "the same"]
    dense, pruned = map(float, cells(output, "test accuracy"))
    assert dense > 0.5
    assert 0 < pruned <= 1


def test_the_channels_example_ends_with_the_same_network_made_smaller(tmp_path: Path) -> None:
    output = run("prune_channels.py", "--epochs", "2", folder=tmp_path)
    masked, smaller = re.findall(r"test accuracy: masked ([\d.]+), smaller ([\d.]+)", output)[0]
    assert masked == smaller
    kept = [tuple(map(int, found)) for found in re.findall(r"(\d+) of (\d+) channels$", output, re.M)]
    assert kept
    assert all(0 < after < before for after, before in kept)
    size = int(re.findall(r"small.safetensors: (\d+) bytes", output)[0])
    assert size == (tmp_path / "small.safetensors").stat().st_size


def test_the_finetuning_example_writes_a_checkpoint_that_a_dense_class_reads(tmp_path: Path) -> None:
    output = run("finetune_from_checkpoint.py", "--epochs", "2", "--dense-epochs", "3", folder=tmp_path)
    (total,) = cells(output, "selected weights")
    (zeros,) = cells(output, "exact zeros among them, read back")
    selected, pruned = (int(text.replace(",", "")) for text in (total, zeros))
    assert pruned == int(0.8 * selected)
    state = torch.load(tmp_path / "outputs/finetune/pruned.ckpt", weights_only=True)["state_dict"]
    weights = [
        tensor for name, tensor in state.items() if re.search(r"embed\.weight|in_proj_w|linear\d\.w|out_proj\.w", name)
    ]
    assert sum(weight.numel() for weight in weights) == selected
    assert sum(int((weight == 0).sum()) for weight in weights) == pruned
    assert (tmp_path / "outputs/finetune/masks.safetensors").stat().st_size > selected


@pytest.mark.parametrize(
    ("overrides", "sparsity"),
    [
        (["pruning=halfway"], 0.8),
        pytest.param(["trainer=from_config", "pruning=random", "callbacks.pruning.scope=global"], 0.9, marks=SLOW),
        pytest.param(["pruning=none"], 0.0, marks=SLOW),
    ],
    ids=["own-choice", "list-in-yaml", "none"],
)
def test_the_hydra_application_prunes_as_its_configuration_says(
    tmp_path: Path, overrides: list[str], sparsity: float
) -> None:
    output = run("hydra_app/app.py", *overrides, "trainer.max_epochs=2", "data.length=600", folder=tmp_path)
    total = 32 + 4 * 32 * 32 * 3 + 32 * 12
    assert float(cells(output, "sparsity")[0]) == pytest.approx(int(sparsity * total + 1e-9) / total, abs=1e-6)
    assert (tmp_path / "outputs").is_dir()


def test_the_comparison_prints_what_its_page_quotes(tmp_path: Path) -> None:
    output = run("compare_model_pruning.py", "--no-cost", "--markdown", folder=tmp_path)
    rows = [line for line in output.splitlines() if line.startswith("|")]
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    assert len(rows) > 8
    assert [row for row in rows if row not in page] == []


@SLOW
def test_the_comparison_measures_the_cost_of_a_step(tmp_path: Path) -> None:
    output = run("compare_model_pruning.py", "--only-cost", "--rounds", "1", "--markdown", folder=tmp_path)
    rows = [line for line in output.splitlines() if line.startswith("| MLP") or line.startswith("| ResNet")]
    assert len(rows) == 2
    assert all(re.fullmatch(r"\|[^|]+\|( \d+\.\d\d \[\d+\.\d\d to \d+\.\d\d\] \|){3}", row) for row in rows)


def test_the_batchnorm_example_restores_accuracy_by_new_statistics(tmp_path: Path) -> None:
    output = run("batchnorm_after_pruning.py", "--seeds", "1", "--epochs", "4", folder=tmp_path)
    dense, pruned, measured, _ = (float(cell.split()[0]) for cell in cells(output, "0.8"))
    assert dense > 80
    assert pruned < measured


def receipt(method: str, sparsity: float, seed: int, accuracy: float, **arguments: object) -> Receipt:
    mask = torch.arange(10) >= round(10 * sparsity)
    return Receipt(
        method=method,
        arguments={"sparsity": sparsity, "seed": 0, **arguments},
        seed=seed,
        requested={"sparsity": sparsity},
        reached=reached_counts({"w": mask}),
        layers=layer_counts({"w": mask}),
        accuracy={"dense": 0.9 + 0.01 * seed, "pruned": 0.1, "finetuned": accuracy},
        bytes={"dense": 1000, "pruned": 1000, "compressed": 250},
    )


def test_the_collector_takes_mean_and_spread_over_seeds(tmp_path: Path) -> None:
    for number, (method, sparsity, seed, accuracy) in enumerate(
        [
            ("random", 0.5, 0, 0.7),
            ("random", 0.5, 1, 0.8),
            ("magnitude", 0.5, 0, 0.85),
            ("magnitude", 0.9, 0, 0.6),
        ]
    ):
        receipt(method, sparsity, seed, accuracy).save(tmp_path / "runs" / str(number), picture=False)
    output = run("collect_receipts.py", "runs", "--markdown", folder=tmp_path)
    assert "| sparsity | dense | random | magnitude |" in output
    assert "| 0.5 | 90.50 ± 0.71 | 75.00 ± 7.07 | 85.00 |" in output
    assert "| 0.9 | 90.00 | - | 60.00 |" in output
    assert "| 0.9 | - | 25.00 |" in run(
        "collect_receipts.py", "runs", "--markdown", "--value", "compressed", folder=tmp_path
    )


def test_the_collector_tells_runs_apart_by_the_arguments_that_differ(tmp_path: Path) -> None:
    for number, scope in enumerate(["global", "layer"]):
        receipt("magnitude", 0.5, 0, 0.7 + 0.1 * number, scope=scope).save(tmp_path / str(number), picture=False)
    output = run("collect_receipts.py", ".", folder=tmp_path)
    assert "magnitude scope=global" in output
    assert "magnitude scope=layer" in output
