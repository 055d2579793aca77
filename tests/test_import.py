"""The package imports nothing heavy: Hydra imports it at every start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lightning_prune

ROOT = Path(lightning_prune.__file__).parent.parent
HEAVY = ("torch", "lightning", "torchmetrics", "numpy", "safetensors", "sklearn", "rich", "hydra", "omegaconf")


def run(code: str) -> str:
    """Run code in a fresh interpreter, in which this package is found and nothing else is imported."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, lightning_prune; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert run(code) == "[]"


def test_the_search_path_plugin_imports_nothing_heavy_but_hydra():
    code = (
        "import sys, hydra_plugins.lightning_prune_plugin; "
        f"print([name for name in {HEAVY[:-2]!r} if name in sys.modules])"
    )
    assert run(code) == "[]"


def test_listing_the_names_imports_nothing_heavy():
    code = "import sys, lightning_prune; dir(lightning_prune); print('torch' in sys.modules)"
    assert run(code) == "False"


def test_the_configurations_are_importable_from_a_source_checkout():
    code = (
        "import importlib.resources as r, lightning_prune; "
        "print((r.files('lightning_prune.conf') / 'pruning' / 'magnitude.yaml').is_file())"
    )
    assert run(code) == "True"


def test_the_public_names_are_listed():
    names = dir(lightning_prune)
    assert set(lightning_prune.__all__) <= set(names)
    assert {"GradualMagnitude", "Magnitude", "MaskManager", "RandomPruning", "Receipt", "RNGState", "prune"} <= set(
        names
    )
    assert names == sorted(set(names))


@pytest.mark.parametrize("name", lightning_prune.__all__)
def test_every_public_name_is_there(name):
    value = getattr(lightning_prune, name)
    assert value is getattr(lightning_prune, name)
    if name != "__version__":
        assert callable(value)
        assert value.__name__.rpartition(".")[2] == name  # a function of its module's name may be that module, callable


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'lightning_prune' has no attribute 'Prune'"):
        _ = lightning_prune.Prune
    assert not hasattr(lightning_prune, "chita")
