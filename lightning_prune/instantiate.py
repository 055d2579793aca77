"""Callbacks from a Hydra configuration: the Trainer wants a list, configurations hold a mapping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


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
            if "_target_" not in node:
                raise ValueError(
                    f"callback {name!r} must have a `_target_`, got keys {sorted(map(str, node))}. "
                    "Choose a group file (pruning=chita, without '+') or set it to null."
                )
            node = instantiate(node, _convert_="all")
        elif isinstance(node, (str, int, float, Sequence)):
            raise ValueError(
                f"callback {name!r} must be a node with `_target_`, got {node!r}. Write pruning={node}, without '+'."
            )
        callbacks.append(node)
    return callbacks


def _is_list(cfg: Any) -> bool:
    return isinstance(cfg, Sequence) and not isinstance(cfg, str)
