"""A method as its YAML describes it: what the contract tests are run over."""

from __future__ import annotations

import functools
import importlib
import inspect
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize
from integration.toys import expected_kept, masks_of
from omegaconf import OmegaConf

from lightning_prune.callback import PruningCallback

FOLDER = files("lightning_prune.conf").joinpath("pruning")
NAMES = sorted(
    Path(entry.name).stem for entry in FOLDER.iterdir() if entry.name.endswith(".yaml") and entry.name != "none.yaml"
)
# small values for arguments of these names, whatever the method
SMALL = {
    "sparsity": 0.5, "budget": 0.5, "measure": False, "every_n_steps": 1, "rounds": 2, "steps": 2,
    "num_grads": 8, "refits": 2, "refit_samples": 8, "refit_bn_batches": 2, "n_holdout": 4, "stages": 2,
}  # fmt: skip
FEW = {"n_calib": 8, "gate_lr": 10.0}  # likewise, also where the YAML leaves it to the data


@dataclass(frozen=True)
class Spec:
    """A method as its YAML describes it."""

    name: str
    kind: type[PruningCallback]
    arguments: dict[str, Any]

    @property
    def small(self) -> dict[str, Any]:
        """The small values of those arguments that the method has and that its YAML sets."""
        few = {key: value for key, value in FEW.items() if key in self.arguments}
        return {**few, **{key: value for key, value in SMALL.items() if self.arguments.get(key) is not None}}

    def build(self, **arguments: Any) -> Any:
        return self.kind(**{**self.arguments, **self.small, **arguments})

    @property
    def counts_weights(self) -> bool:
        """Whether `sparsity` is a fraction of single weights (not of channels)."""
        return "sparsity" in self.arguments and not self.removes_channels

    @property
    def removes_channels(self) -> bool:
        """Whether it removes whole channels as its YAML sets it."""
        return self.build().removes_channels

    def needs_weight_counts(self) -> None:
        if not self.counts_weights:
            pytest.skip(f"{self.name} takes no sparsity of single weights")

    def needs(self, argument: str) -> None:
        if argument not in self.arguments:
            pytest.skip(f"{self.name} takes no `{argument}`")


def compose_pruning(name: str) -> Any:
    """Compose as an application does that knows nothing of this package but its group name."""
    with initialize(version_base="1.3", config_path=None):
        return compose(overrides=[f"+pruning={name}"])


def signature_of(kind: type) -> dict[str, inspect.Parameter]:
    """Collect the constructor's arguments; `**common` goes on to the next constructor up the MRO."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind is not parameter.VAR_KEYWORD:
                found.setdefault(parameter.name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


@functools.cache
def read_spec(name: str) -> Spec:
    """Read a YAML through Hydra, once."""
    node = OmegaConf.to_container(compose_pruning(name).callbacks.pruning, resolve=True)
    module, _, kind = node["_target_"].rpartition(".")
    arguments = {key: value for key, value in node.items() if not key.startswith("_")}
    return Spec(name, getattr(importlib.import_module(module), kind), arguments)


def target_kept(callback: Any, module: Any) -> int:
    """Count by the written rule, over all weights or tensor by tensor as the method's scope says."""
    sizes = [mask.numel() for mask in masks_of(module).values()]
    groups = sizes if getattr(callback, "scope", "global") == "layer" else [sum(sizes)]
    return sum(expected_kept(size, callback.sparsity) for size in groups)
