"""Prune any PyTorch Lightning model by adding a callback to its Trainer.

Names are imported on first use: Hydra imports this package at every start, so it must not import torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# public name -> module that defines it (relative to this package)
_EXPORTS = {
    "GraSP": "methods.grasp",
    "CHITA": "methods.chita",
    "DHSPG": "methods.dhspg",
    "ChipNet": "methods.chipnet",
    "GradualMagnitude": "methods.magnitude",
    "HSPG": "methods.hspg",
    "HESSO": "methods.hesso",
    "Magnitude": "methods.magnitude",
    "MaskManager": "masks",
    "OBProxSGD": "methods.obprox_sgd",
    "ProsPr": "methods.prospr",
    "ProxSGD": "methods.prox_sgd",
    "ProvableFilterPruning": "methods.pfp",
    "Prunability": "prunability",
    "PruningCallback": "callback",
    "RNGState": "rng",
    "RandomPruning": "methods.random",
    "Receipt": "receipt",
    "SNIP": "methods.snip",
    "SensitivityScan": "sensitivity",
    "SiPP": "methods.sipp",
    "SynFlow": "methods.synflow",
    "channel_groups": "dependency",
    "instantiate_callbacks": "instantiate",
    "load_shrunk": "shrink",
    "prune": "standalone",
    "shrink": "shrink",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _alias_source_configs() -> None:
    """Make `lightning_prune.conf` importable from a source checkout, where `conf/` lies beside the package.

    A wheel holds the folder inside the package; an editable install does not, and Hydra asks for it by name.
    """
    package = Path(__file__).parent
    source = package.parent / "conf" / "__init__.py"
    name = f"{__name__}.conf"
    if (package / "conf").is_dir() or not source.exists() or name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, source, submodule_search_locations=[str(source.parent)])
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_alias_source_configs()
