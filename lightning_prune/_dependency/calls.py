"""How a module is run: the arguments of its forward, or of the sub-modules a LightningModule's steps call."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_prune.sandbox import untouched

_STEPS = ("training_step", "validation_step")


@dataclass(frozen=True)
class Call:
    """One way to run a module: `module.get_submodule(path)(*args, **kwargs)`."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def run(self, module: nn.Module) -> Any:
        """Run the (sub-)module with these arguments."""
        return module.get_submodule(self.path)(*copied(self.args), **copied(self.kwargs))

    def map(self, function: Any) -> Call:
        """Return the call with `function` applied to every tensor among its arguments."""
        args, kwargs = pytree.tree_map_only(Tensor, function, (self.args, self.kwargs))
        return Call(self.path, args, kwargs)

    def describe(self) -> str:
        """Return the arguments' types and shapes in words."""
        words = [_describe(value) for value in self.args]
        words += [f"{name}={_describe(value)}" for name, value in self.kwargs.items()]
        return f"({', '.join(words)})"


def copied(tree: Any) -> Any:
    """Return the arguments with every tensor cloned: a module may write to its input."""
    return pytree.tree_map_only(Tensor, torch.clone, tree)


def copy_of(module: nn.Module) -> nn.Module:
    """Return a deep copy without gradients; a LightningModule's Trainer is left out.

    Raises:
        ValueError: the module cannot be copied.
    """
    with detached(module):
        memo: dict[int, Any] = {}
        for parameter in module.parameters():
            if parameter.grad is not None:
                memo[id(parameter.grad)] = None
        for child in module.modules():  # a metric keeps its last value with its graph, which deepcopy refuses
            for value in child.__dict__.values():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    memo[id(value)] = value.detach().clone()
        try:
            return copy.deepcopy(module, memo)
        except Exception as error:
            raise ValueError(
                f"`module` must be copyable, got {type(module).__name__}: {type(error).__name__}: {error}. "
                "Nothing was changed. Shrink before its first forward pass, or remove what cannot be copied."
            ) from error


@contextlib.contextmanager
def detached(module: nn.Module) -> Iterator[None]:
    """Take Trainer and Fabric references off a LightningModule (they would be copied along) and put them back."""
    saved = []
    for child in module.modules():
        for name in ("_trainer", "_fabric"):
            if child.__dict__.get(name) is not None:
                saved.append((child.__dict__, name, child.__dict__[name]))
                child.__dict__[name] = None
    try:
        yield
    finally:
        for attributes, name, value in saved:
            attributes[name] = value


def calls_of(module: nn.Module, example_input: Any, example_kwargs: Mapping[str, Any] | None = None) -> list[Call]:
    """Return how `module` is run with an example input.

    A tensor, or a tuple or list of arguments, goes to `forward`; a dict goes there by name where `forward` has these
    names, as one argument otherwise. With a LightningModule, a tuple, list or dict is taken as a batch: its steps run
    on a copy and what they call is recorded.

    Args:
        module: any module.
        example_input: a tensor, a tuple or list of arguments, a dict, or a batch of a LightningModule's loader.
        example_kwargs: further named arguments of forward.
    Raises:
        ValueError: the module does not accept the input.
    """
    if _is_lightning(module) and not isinstance(example_input, Tensor) and example_kwargs is None:
        found = _recorded(module, example_input)
        if found:
            return found
    args, kwargs = _arguments(module, example_input)
    call = Call("", args, {**kwargs, **dict(example_kwargs or {})})
    _check_accepted(module, call)
    return [call]


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested containers, dataclasses and plain objects, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    if isinstance(value, (str, bytes, int, float, nn.Module, type)) or not hasattr(value, "__dict__"):
        return []
    return [tensor for item in vars(value).values() for tensor in tensors_in(item)]


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_describe(item) for item in value) + ")"
    return type(value).__name__


def _is_lightning(module: nn.Module) -> bool:
    return hasattr(module, "training_step") and hasattr(module, "configure_optimizers")


def _arguments(module: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, (tuple, list)) and not hasattr(example, "_fields"):
        return tuple(example), {}
    if isinstance(example, Mapping) and example and all(isinstance(key, str) for key in example):
        names = inspect.signature(module.forward).parameters
        if set(example) <= set(names):
            return (), dict(example)
    return (example,), {}


def _check_accepted(module: nn.Module, call: Call) -> None:
    probe = copy_of(module)
    try:
        with untouched(probe), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call.run(probe.eval())
    except Exception as error:
        raise ValueError(
            f"`example_input` must be accepted by {type(module).__name__}.forward, got {call.describe()}; forward "
            f"raised {type(error).__name__}: {error}. Give the arguments of one forward call. Nothing was changed."
        ) from error


def _recorded(module: nn.Module, batch: Any) -> list[Call]:
    """Run the module's steps on a copy and record the outermost module calls, each once."""
    found: dict[tuple[str, str], Call] = {}
    for step in _STEPS:
        if not hasattr(module, step):
            continue
        probe = copy_of(module)
        with untouched(probe), warnings.catch_warnings(), _recording(probe) as calls:
            warnings.simplefilter("ignore")
            with contextlib.suppress(Exception):  # steps may need a Trainer; what they called before counts
                run = getattr(probe, step)
                run(copied(batch), *[0] * (len(inspect.signature(run).parameters) > 1))
        for call in calls:
            found.setdefault((call.path, call.describe()), call)
    return _runnable(module, list(found.values()))


def _runnable(module: nn.Module, calls: list[Call]) -> list[Call]:
    """Leave out calls that raise, such as those of a step that took the input apart in a wrong way."""
    good = []
    for call in calls:
        try:
            _check_accepted(module, call)
        except ValueError:
            continue
        good.append(call)
    return good


@contextlib.contextmanager
def _recording(module: nn.Module) -> Iterator[list[Call]]:
    """Collect the calls of `module` or its sub-modules that no other recorded call encloses.

    A LightningModule whose step calls `self(x)` gives its own forward; one whose step calls `self.net(x)` gives `net`.
    """
    calls: list[Call] = []
    depth = [0]

    def enter(path: str, args: Any, kwargs: Any) -> None:
        if depth[0] == 0:
            calls.append(Call(path, _detached(args), _detached(kwargs)))
        depth[0] += 1

    def leave(*_: Any) -> None:
        depth[0] -= 1

    handles = []
    for path, child in _with_parameters(module):
        handles.append(child.register_forward_pre_hook(lambda _, a, k, path=path: enter(path, a, k), with_kwargs=True))
        handles.append(child.register_forward_hook(leave, always_call=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _with_parameters(module: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    for path, child in module.named_modules():
        if next(child.parameters(), None) is not None and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield path, child


def _detached(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), tree)
