"""The common knob of a sweep over methods that remove weights and methods that remove channels.

`callbacks.pruning.sparsity=0.9` takes 90 % of the selected weights from the first. The same number has to mean something
for the second, some of which are given a budget of parameters, some a budget of FLOPs, some a fraction of channels: in a
sweep all of them are given a budget of the one cost that `sweep.budget_type` names, and stand in one table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from hydra.errors import InstantiationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from omegaconf import DictConfig, OmegaConf

from lightning_prune.callback import PruningCallback
from lightning_prune.checks import check_choice
from lightning_prune.cost import KINDS
from lightning_prune.instantiate import KNOB, instantiate_callbacks

_PRUNING = "callbacks.pruning"
_OWN_TARGETS = ("budget", "budget_type", "penalty", "epsilon")


def with_one_cost(cfg: DictConfig, overrides: Iterable[str]) -> DictConfig:
    """Return the configuration of a job in which a method that removes channels is given a budget for its sparsity.

    Nothing changes where the job sets no sparsity, or sets a target of the method's own, where the method takes no budget,
    and with `sweep.budget_type=null`.

    Args:
        cfg: the composed configuration of a job.
        overrides: what sets the job apart.
    Raises:
        ValueError: `sweep.budget_type` is no cost.
    """
    kind = OmegaConf.select(cfg, "sweep.budget_type")
    if kind is None:
        return cfg
    check_choice("sweep.budget_type", kind, KINDS)
    given = {item.lstrip("+").partition("=")[0] for item in overrides}
    if f"{_PRUNING}.{KNOB}" not in given or any(f"{_PRUNING}.{name}" in given for name in _OWN_TARGETS):
        return cfg
    sparsity = OmegaConf.select(cfg, f"{_PRUNING}.{KNOB}")
    if not isinstance(sparsity, (int, float)) or not _takes_a_budget_of_channels(cfg):
        return cfg
    plain = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))
    plain["callbacks"]["pruning"].update({KNOB: None, "budget": round(1 - sparsity, 12), "budget_type": kind})
    rank_zero_info(
        f"This method removes channels: sparsity {sparsity:g} is a budget of {1 - sparsity:g} of the {kind} "
        "(sweep.budget_type)."
    )
    return OmegaConf.create(plain)


def swept_methods(overrides: Sequence[str]) -> set[str]:
    """Return the choices of `pruning=...` in the overrides of a whole sweep, such as {"chita", "random"}."""
    choices = [item.partition("=")[2] for item in overrides if item.lstrip("+").startswith("pruning=")]
    return {name.strip() for choice in choices for name in choice.split(",")}


def pruner_of(cfg: DictConfig) -> PruningCallback | None:
    """Return the method of a job, built to be looked at; None where there is none.

    Raises:
        InstantiationException, ValueError: an argument breaks its rule.
    """
    node = OmegaConf.select(cfg, _PRUNING)
    built = instantiate_callbacks([OmegaConf.to_container(node, resolve=True)] if node else [])
    return next((pruner for pruner in built if isinstance(pruner, PruningCallback)), None)


def _takes_a_budget_of_channels(cfg: DictConfig) -> bool:
    """Whether the method removes channels and has arguments for a budget; a wrong argument is the job's to complain of."""
    node = cfg.callbacks.pruning
    if "budget_type" not in node or "budget" not in node:
        return False
    try:
        pruner = pruner_of(cfg)
    except (InstantiationException, ValueError):
        return False
    return pruner is not None and pruner.removes_channels
