"""Run a LightningModule's own step from a callback and leave no trace of it.

A step logs, updates metrics, draws random numbers and (BatchNorm) writes buffers. Inside `untouched` all of it is
undone or muted, lists and counters that the step keeps as attributes included. Not undone is what a step does to objects
further away (a file, a global); score on a copy then.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torchmetrics import Metric, MetricCollection

_LOGGING = ("log", "log_dict")
_CONTAINERS = (list, dict, set, deque)
_VALUES = (int, float, complex, str, bytes, bool, tuple, type(None))
_TORCHS_OWN = frozenset(nn.Module().__dict__) - {"training"}


@contextmanager
def untouched(module: nn.Module, trainer: Any = None) -> Iterator[None]:
    """Restore RNG states, training flags, metrics, gradients' mode and logging of `module` when the block ends.

    Args:
        module: the module whose step is run inside the block; a LightningModule's `log` is muted.
        trainer: its Trainer, whose loggers are muted; None without a Trainer.
    """
    with ExitStack() as stack:
        stack.enter_context(isolated_rng())
        stack.enter_context(_training_flags(module))
        stack.enter_context(_plain_attributes(module))
        stack.enter_context(_metric_states(module))
        stack.enter_context(_muted_logging(module, trainer))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Restore the states of Python's, NumPy's and torch's (CPU and CUDA) generators, also when the block raises."""
    states = rng_states()
    try:
        yield
    finally:
        set_rng_states(states)


def rng_states() -> dict[str, Any]:
    """Return all global RNG states as plain types and tensors (a checkpoint loads them with weights_only=True)."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_rng_states(states: dict[str, Any]) -> None:
    """Put the states of `rng_states` back."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators; use it only where `isolated_rng` restores them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)


@contextmanager
def _training_flags(module: nn.Module) -> Iterator[None]:
    flags = [(child, child.training) for child in module.modules()]
    try:
        yield
    finally:
        for child, flag in flags:
            child.training = flag  # not train(flag): it would recurse over children set otherwise


@contextmanager
def _plain_attributes(module: nn.Module) -> Iterator[None]:
    """Lists, dicts, sets and plain values that hang on modules: a step that collects its outputs must not collect ours."""
    kept = [
        (child.__dict__, _plain_part(child.__dict__)) for child in module.modules() if not isinstance(child, Metric)
    ]
    try:
        yield
    finally:
        for attributes, before in kept:
            for name in _plain_part(attributes).keys() - before.keys():
                del attributes[name]
            for name, (value, content) in before.items():
                _refill(value, content)
                attributes[name] = value


def _plain_part(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        name: (value, copy.copy(value) if isinstance(value, _CONTAINERS) else None)
        for name, value in attributes.items()
        if isinstance(value, (*_CONTAINERS, *_VALUES)) and name not in _TORCHS_OWN
    }


def _refill(value: Any, content: Any) -> None:
    """Put the old content back into a container, which others may hold too."""
    if isinstance(value, list):
        value[:] = content
    elif isinstance(value, deque):
        value.clear()
        value.extend(content)
    elif isinstance(value, (dict, set)):
        value.clear()
        value.update(content)


@contextmanager
def _metric_states(module: nn.Module) -> Iterator[None]:
    """torchmetrics objects count in attributes, which a collection shares between its members.

    The block works on copies; binding the old objects again afterwards keeps what was shared shared.
    """
    saved = [(child, dict(vars(child))) for child in module.modules() if isinstance(child, (Metric, MetricCollection))]
    for metric, attributes in saved:
        for name in (*attributes.get("_defaults", ()), "_groups"):
            if name in attributes:
                metric.__dict__[name] = _copied(attributes[name])
    try:
        yield
    finally:
        for metric, attributes in saved:
            for name in vars(metric).keys() - attributes.keys():
                del metric.__dict__[name]
            metric.__dict__.update(attributes)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


@contextmanager
def _muted_logging(module: nn.Module, trainer: Any) -> Iterator[None]:
    """Only LightningModules are muted (also nested ones, which log too): elsewhere `log` may be anything."""
    muted = [vars(child) for child in module.modules() if _is_lightning(child)]
    shadowed = [{name: own[name] for name in _LOGGING if name in own} for own in muted]
    loggers = list(trainer.loggers) if trainer is not None else []
    for own in muted:
        own.update(dict.fromkeys(_LOGGING, _ignore))
    if loggers:
        trainer.loggers = _dummy_loggers(len(loggers))
    try:
        yield
    finally:
        for own, before in zip(muted, shadowed, strict=True):
            for name in _LOGGING:
                own.pop(name, None)
            own.update(before)
        if loggers:
            trainer.loggers = loggers


def _is_lightning(module: nn.Module) -> bool:
    return any(base.__name__ == "LightningModule" for base in type(module).__mro__)


def _dummy_loggers(count: int) -> list[Any]:
    from lightning.pytorch.loggers.logger import DummyLogger

    return [DummyLogger() for _ in range(count)]


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands in for `self.log` while a method scores."""
