"""What `import lightning_prune` costs beyond Python itself (Hydra imports it at every start).

`pytest -m benchmark -s tests/benchmarks/test_import_time.py`
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from harness import show, take_turns

pytestmark = pytest.mark.benchmark


def _run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_costs_little_beyond_python_itself() -> None:
    results = take_turns(
        {"python": lambda: _run("pass"), "import lightning_prune": lambda: _run("import lightning_prune")}, rounds=15
    )
    show("start of a process; the budget is 50 ms beyond Python itself", results)
    assert results["import lightning_prune"].median > 0
