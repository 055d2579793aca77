"""The examples on modules nobody here wrote run and cut what they prune; each wants a package of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.zoo


@pytest.mark.parametrize(
    ("program", "package"),
    [
        ("transformers_classifier.py", "transformers"), ("segmentation.py", "transformers"),
        ("nbeats_forecaster.py", "pytorch_forecasting"),
    ],
)  # fmt: skip
def test_the_example_prunes_and_shrinks(program: str, package: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}, in an environment of its own")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / program), "--epochs", "1"], cwd=tmp_path, capture_output=True,
        text=True, timeout=280, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    dense, small = (
        int(number.replace(",", ""))
        for number in re.search(r"parameters: dense ([\d,]+), shrunk ([\d,]+)", done.stdout).groups()
    )
    assert small < 0.75 * dense
    assert "asked for at most 0.5 of the" in done.stdout  # the receipt
    pruned, shrunk = re.search(r"pruned ([\d.]+), shrunk ([\d.]+)", done.stdout).groups()
    assert float(shrunk) == pytest.approx(float(pruned), abs=0.01)


def test_every_foreign_example_is_short() -> None:
    for program in ("transformers_classifier.py", "segmentation.py", "nbeats_forecaster.py"):
        assert len((ROOT / "examples" / program).read_text(encoding="utf-8").splitlines()) < 80
