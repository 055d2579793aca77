"""CutPlan: what a shrink cuts, as plain data; it replays on a fresh module, its optimizer state and averaged copies."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune._dependency.groups import ChannelGroup
from lightning_prune._dependency.walk import tensors_by_name
from lightning_prune._shrink_hybrid import Graphs, install, narrowed
from lightning_prune._shrink_modules import refresh

VERSION = 1


@dataclass(frozen=True)
class AttributeEdit:
    """Old lengths in one attribute of a module (an int, or ints in a short list, tuple or dict) become new ones."""

    path: str
    name: str
    lengths: tuple[tuple[int, int], ...]


@dataclass
class CutPlan:
    """What to keep of a module.

    Attributes:
        shapes: shape of every parameter and buffer that is cut, before.
        kept: kept positions by tensor name and dim, sorted.
        edits: attributes of custom modules that change.
        units: (before, after) units by group name.
        replaced: modules that run as their own shrunk graph: path -> how it was traced.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    kept: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    edits: list[AttributeEdit] = field(default_factory=list)
    units: dict[str, tuple[int, int]] = field(default_factory=dict)
    replaced: dict[str, Any] = field(default_factory=dict)

    def check(self, module: nn.Module) -> None:
        """Raise ValueError unless `module` has the tensors this plan cuts, in the shapes it knows."""
        tensors = tensors_by_name(module)
        for name, shape in self.shapes.items():
            found = tensors.get(name)
            if found is None or tuple(found.shape) != tuple(shape):
                what = "nothing" if found is None else f"shape {tuple(found.shape)}"
                raise ValueError(
                    f"`module` must have {name!r} of shape {tuple(shape)}, got {what}. The plan belongs to another "
                    "model, or was applied already. Nothing was changed."
                )

    @torch.no_grad()
    def apply(self, module: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> nn.Module:
        """Cut a module in place, with the state of its optimizers.

        Parameter objects, names, ties and hooks stay; gradients are dropped.

        Args:
            module: the module the plan was made for, or one built alike.
            optimizers: optimizers of its parameters; state tensors of a parameter's shape are cut like it.
        Returns:
            `module`.
        Raises:
            ValueError: the module is another one; nothing was changed then.
        """
        self.check(module)
        for optimizer in optimizers:
            self.cut_state(module, optimizer)
        return self._apply(module, {})

    @torch.no_grad()
    def cut_state(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Cut the optimizer's state of every cut parameter.

        State of the parameter's shape is cut like it, factored state (size 1 in some dims) along its other dims; all
        else (step counts) is kept.
        """
        for name, tensor in tensors_by_name(module).items():
            for key, value in optimizer.state.get(tensor, {}).items():
                if isinstance(value, Tensor) and _is_shaped_like(value, tensor):
                    optimizer.state[tensor][key] = self.narrow(name, value)

    def narrow(self, name: str, tensor: Tensor) -> Tensor:
        """Return the kept positions of a tensor shaped like parameter or buffer `name`; itself if nothing is cut."""
        for dims in (self.kept.get(name, {}), *self._replaced_dims(name)):
            full = {dim: at for dim, at in dims.items() if tensor.shape[int(dim)] > 1}
            tensor = narrowed(tensor, full) if full else tensor
        return tensor

    def cuts(self, name: str, dim: int) -> Iterator[Sequence[int]]:
        """Yield the kept positions of one dim, cut by cut."""
        if dim in self.kept.get(name, {}):
            yield self.kept[name][dim]
        for dims in self._replaced_dims(name):
            if str(dim) in dims:
                yield dims[str(dim)]

    def _replaced_dims(self, name: str) -> Iterator[Mapping[Any, Sequence[int]]]:
        """Positions kept, after the cuts before, in the modules that run as their own graphs."""
        for path, recipe in self.replaced.items():
            dot = f"{path}." if path else ""
            if name.startswith(dot) and name[len(dot) :] in recipe["kept"]:
                yield recipe["kept"][name[len(dot) :]]

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        edits = [[edit.path, edit.name, [list(pair) for pair in edit.lengths]] for edit in self.edits]
        return json.dumps(
            {
                "version": VERSION,
                "shapes": {name: list(shape) for name, shape in self.shapes.items()},
                "kept": self.kept,
                "edits": edits,
                "units": self.units,
                "replaced": self.replaced,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> CutPlan:
        """Return the plan written by `to_json`.

        Raises:
            ValueError: the text is no plan, or of a later version.
        """
        try:
            values = json.loads(text)
            if values["version"] > VERSION:
                raise ValueError(f"the plan has version {values['version']}, this package reads up to {VERSION}.")
            return cls(
                {name: tuple(shape) for name, shape in values["shapes"].items()},
                {n: {int(dim): list(at) for dim, at in dims.items()} for n, dims in values["kept"].items()},
                [AttributeEdit(p, n, tuple((int(a), int(b)) for a, b in pairs)) for p, n, pairs in values["edits"]],
                {name: (int(before), int(after)) for name, (before, after) in values["units"].items()},
                dict(values["replaced"]),
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"the text must be a cut plan, got {text[:40]!r} ({type(error).__name__}).") from error

    @torch.no_grad()
    def _apply(self, module: nn.Module, graphs: Graphs) -> nn.Module:
        """Cut a module that fits; graphs of sub-modules made before are used again."""
        self._cut(module, "")
        for path, recipe in self.replaced.items():
            install(module, path, recipe, graphs)
        return module

    def _cut(self, module: nn.Module, prefix: str) -> None:
        """Cut the tensors below `prefix`; `module` is the sub-module there."""
        dot = f"{prefix}." if prefix else ""
        tensors = tensors_by_name(module)
        touched: dict[nn.Module, dict[str, tuple[int, ...]]] = {}
        owners = _owners(module)
        for name in self.shapes:
            if not name.startswith(dot):
                continue
            tensor = tensors[name[len(dot) :]]
            for owner, own_name in owners[id(tensor)]:
                touched.setdefault(owner, {})[own_name] = tuple(tensor.shape)
            tensor.data = narrowed(tensor.data, self.kept[name])
            tensor.grad = None
        for owner, before in touched.items():
            refresh(owner, before)
        for edit in self.edits:
            inside = edit.path == prefix or edit.path.startswith(dot)
            if inside:
                apply_edit(module.get_submodule(edit.path[len(dot) :] if edit.path != prefix else ""), edit)


def _is_shaped_like(value: Tensor, tensor: Tensor) -> bool:
    """Whether the sizes are those of `tensor`, or 1."""
    return value.dim() == tensor.dim() and all(a in (1, b) for a, b in zip(value.shape, tensor.shape, strict=True))


def plan_for(
    groups: Sequence[ChannelGroup],
    removed: Mapping[str, Sequence[int]],
    shapes: Mapping[str, tuple[int, ...]],
    edits: Sequence[AttributeEdit] = (),
) -> CutPlan:
    """Return the plan that removes units.

    Args:
        groups: the groups of the module.
        removed: indices of removed units by group name.
        shapes: shape of every parameter and buffer by first name.
        edits: attributes of custom modules that change.
    """
    dropped: dict[str, dict[int, list[np.ndarray]]] = {}
    units = {}
    for group in groups:
        gone = list(removed.get(group.name, ()))
        if not gone:
            continue
        units[group.name] = (len(group), len(group) - len(gone))
        for (name, dim), positions in group.slices.items():
            dropped.setdefault(name, {}).setdefault(dim, []).append(positions[gone].ravel())
    kept = {
        name: {dim: np.setdiff1d(np.arange(shapes[name][dim]), np.concatenate(at)).tolist() for dim, at in dims.items()}
        for name, dims in dropped.items()
    }
    return CutPlan({name: tuple(shapes[name]) for name in kept}, kept, list(edits), units)


def apply_edit(module: nn.Module, edit: AttributeEdit) -> None:
    """Change one attribute; `nn.MultiheadAttention` keeps its own."""
    if not isinstance(module, nn.MultiheadAttention) and edit.name in module.__dict__:
        module.__dict__[edit.name] = replaced_lengths(module.__dict__[edit.name], dict(edit.lengths))


def replaced_lengths(value: Any, lengths: Mapping[int, int]) -> Any:
    """Return the value with ints exchanged, also in short lists, tuples and dicts with text keys; bool is no int."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return lengths.get(value, value)
    if type(value) in (list, tuple, torch.Size) and len(value) < _SHORT:
        return type(value)(replaced_lengths(item, lengths) for item in value)
    if type(value) is dict and len(value) < _SHORT and all(isinstance(key, str) for key in value):
        return {key: replaced_lengths(item, lengths) for key, item in value.items()}
    return value


_SHORT = 64


def _owners(module: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for child in module.modules():
        for name, tensor in (*child._parameters.items(), *child._buffers.items()):
            if tensor is not None:
                found.setdefault(id(tensor), []).append((child, name))
    return found
