"""Callbacks from a Hydra configuration: the Trainer wants a list, configurations hold a mapping."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_prune.checks import check_fraction

KNOB = "sparsity"


def instantiate_callbacks(cfg: Any) -> list[Any]:
    """Return the callbacks of a configuration, in its order.

    Args:
        cfg: a mapping of names, or a list, of nodes with `_target_`; null and empty nodes are dropped (an experiment
            takes a callback away by setting it to null). Ready-made callbacks pass through.
    Returns:
        A plain list for `Trainer(callbacks=...)`.
    Raises:
        ValueError: an entry is neither empty nor a node with `_target_`.
    """
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    if OmegaConf.is_config(cfg):
        cfg = OmegaConf.to_container(cfg, resolve=True)
    if not cfg:
        return []
    entries = (
        list(cfg.items())
        if isinstance(cfg, Mapping)
        else list(enumerate(cfg))
        if _is_list(cfg)
        else [("callbacks", cfg)]
    )
    callbacks = []
    for name, node in entries:
        if node is None or node == {}:
            continue
        if isinstance(node, Mapping):
            if set(node) == {KNOB}:
                continue  # the common knob without a method: pruning=none
            if "_target_" not in node:
                raise ValueError(
                    f"callback {name!r} must have a `_target_`, got keys {sorted(map(str, node))}. "
                    "Choose a group file (pruning=chita, without '+') or set it to null."
                )
            node = instantiate(with_common_knob(node), _convert_="all")
        elif isinstance(node, (str, int, float, Sequence)):
            raise ValueError(
                f"callback {name!r} must be a node with `_target_`, got {node!r}. Write pruning={node}, without '+'."
            )
        callbacks.append(node)
    return callbacks


def with_common_knob(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return a callback's node whose `sparsity` means what its method understands.

    A method without an argument `sparsity` is given budget = 1 - sparsity; null leaves its budget as it is. So one sweep
    over `callbacks.pruning.sparsity` serves all methods.

    Args:
        node: `_target_` and arguments, resolved.
    Raises:
        ValueError: a sparsity is given, and the method takes neither a sparsity nor a budget.
    """
    plain = dict(node)
    if KNOB not in plain:
        return plain
    taken = _arguments_of(plain["_target_"])
    if taken is None or KNOB in taken:
        return plain
    sparsity = plain.pop(KNOB)
    if sparsity is None:
        return plain
    if "budget" not in taken:
        raise ValueError(
            f"`sparsity`={sparsity!r} cannot be set for {plain['_target_']}, which takes neither a sparsity nor a budget. "
            "Leave it out and set the method's own arguments."
        )
    return {**plain, "budget": round(1 - check_fraction(KNOB, sparsity), 12)}


def _arguments_of(target: Any) -> set[str] | None:
    """Names of all constructor arguments up the inheritance; None where they cannot be told."""
    from hydra.utils import get_object

    kind = get_object(target) if isinstance(target, str) else target
    if not isinstance(kind, type):
        return None
    names: set[str] = set()
    for base in kind.__mro__:
        if "__init__" in vars(base):
            parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
            names.update(parameter.name for parameter in parameters)
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                return names
    return names


def _is_list(cfg: Any) -> bool:
    return isinstance(cfg, Sequence) and not isinstance(cfg, str)
