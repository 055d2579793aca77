"""The wheel and the source checkout both serve the configurations to Hydra, outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
APP = """
import hydra, lightning_prune
from lightning_prune import instantiate_callbacks

@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    print("package", lightning_prune.__file__)
    print("made", type(instantiate_callbacks(cfg.callbacks)[0]).__name__)

main()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(ROOT),
    ]
    done = subprocess.run(build, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def run_app(folder: Path, path: str) -> str:
    (folder / "app.py").write_text(APP)
    done = subprocess.run(
        [sys.executable, "app.py", "+pruning=magnitude", "hydra.run.dir=out"],
        cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_package_plugin_and_configurations(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configurations = {f"lightning_prune/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert names >= configurations
    assert {"lightning_prune/py.typed", "hydra_plugins/lightning_prune_plugin/__init__.py"} <= names
    assert "hydra_plugins/__init__.py" not in names  # a namespace that other plugins share
    assert not any(name.startswith(("conf/", "tests/")) for name in names)


def test_an_application_outside_the_checkout_runs_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    output = run_app(tmp_path, str(site))
    assert f"package {site}" in output
    assert "made Magnitude" in output


def test_an_application_outside_the_checkout_runs_from_the_source(tmp_path: Path) -> None:
    output = run_app(tmp_path, str(ROOT))
    assert f"package {ROOT}" in output
    assert "made Magnitude" in output
