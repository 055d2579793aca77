"""MaskManager: the only code that writes a mask or zeroes a weight.

Masks multiply plain weights in place. Parameter objects, their names and the module's type never change, so a pruned
checkpoint is a dense checkpoint with zeros. The invariant, for every masked weight w with mask m:

    w = m * w     after every optimizer step, after every change of m, in every averaged copy of w.

It needs two products per optimizer step, each one `torch._foreach_mul_`: gradients before the step (momentum and
curvature estimates then never see dead weights) and weights after it (optimizers such as Muon leak otherwise).
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_prune.files import replacing
from lightning_prune.selection import count_kept
from lightning_prune.targets import aliases, canonical_name, named_tensors

try:
    from torch.distributed.tensor import DTensor, distribute_tensor
except ImportError:  # torch 2.4 keeps it in a private place
    from torch.distributed._tensor import DTensor, distribute_tensor

FORMAT = "lightning_prune.masks"
Projection = Callable[[torch.optim.Optimizer], None]

_managers: weakref.WeakKeyDictionary[nn.Module, MaskManager] = weakref.WeakKeyDictionary()


class MaskManager:
    """The masks of one module, shared by all pruning callbacks; get it with `MaskManager.of(module)`.

    Attributes:
        version: number of mask changes so far.
        projections: run in order after every optimizer step, before the masks (proximal steps live here).
        shadows: returns averaged copies of the module (EMA, SWA) that must carry the same zeros.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._masks: dict[str, Tensor] = {}
        self._runtime: dict[str, Tensor] = {}
        self._pairs: dict[int, tuple[list[nn.Parameter], list[Tensor]]] = {}
        self._handles: list[Any] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        self.version = 0
        self.projections: list[Projection] = []
        self.shadows: Callable[[], Iterable[nn.Module]] = tuple

    @classmethod
    def of(cls, module: nn.Module) -> MaskManager:
        """Return the manager of `module` (a compiled module shares that of the module inside), made at first use."""
        module = getattr(module, "_orig_mod", module)
        if module not in _managers:
            _managers[module] = cls(module)
        return _managers[module]

    @property
    def module(self) -> nn.Module:
        """The module whose weights are masked."""
        module = self._module()
        if module is None:
            raise RuntimeError("the module of this MaskManager no longer exists. Keep a reference to it.")
        return module

    @property
    def masks(self) -> dict[str, Tensor]:
        """Bool masks by canonical parameter name, True = kept, each of its parameter's (full) shape; copies."""
        return {name: mask.clone() for name, mask in self._masks.items()}

    def counts(self) -> tuple[int, int]:
        """Return (kept, total) over all masked tensors."""
        return count_kept(self._masks)

    def sparsity(self) -> float:
        """Return the pruned fraction of all masked tensors, in [0, 1]; 0 if there is no mask."""
        kept, total = self.counts()
        return 0.0 if total == 0 else 1.0 - kept / total

    def set_masks(
        self, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None, regrow: bool = False
    ) -> None:
        """Commit masks: intersect them with those in force, zero the weights, their optimizer state and their shadows.

        Args:
            masks: bool, by parameter name (any name of a tied tensor), each of its parameter's shape.
            weights: new values for kept weights by the same names and shapes; None keeps the values.
            regrow: replace the masks in force instead of intersecting; weights that come back start at 0.
        Raises:
            ValueError: unknown name, wrong shape or dtype, or non-finite weights; nothing has changed then.
        """
        parameters = named_tensors(self.module)
        masks = self._checked(masks, parameters, "masks")
        values = self._checked(weights or {}, parameters, "weights")
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise ValueError(
                    f"mask {name!r} must be bool (True = kept), got {mask.dtype}. Compare or cast it first."
                )
            check_finite(name, values.get(name, parameters[name].detach()))
        merged = {}
        for name, mask in masks.items():
            mask = mask.detach().to(local(parameters[name]).device).clone()
            merged[name] = (
                mask if regrow or name not in self._masks else mask & self._masks[name].to(mask.device)
            )
        self._masks.update(merged)
        self._build_runtime(parameters)
        self._write(parameters, {name: value for name, value in values.items() if name in merged})
        self.version += 1

    def clear(self) -> None:
        """Forget all masks; weights keep their values and may grow from now on."""
        self._masks.clear()
        self._runtime.clear()
        self._pairs.clear()
        self.version += 1

    def alive(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a bool mask for each of `parameters`: the one in force, else all True."""
        return {
            name: self._masks[name].clone()
            if name in self._masks
            else torch.ones(parameter.shape, dtype=torch.bool, device=local(parameter).device)
            for name, parameter in parameters.items()
        }

    @torch.no_grad()
    def apply(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Zero the pruned weights (only those that `optimizer` updates, if given)."""
        weights, masks = self._pairs_of(optimizer)
        if weights:
            torch._foreach_mul_(weights, masks)

    @torch.no_grad()
    def mask_gradients(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Zero the gradients of pruned weights; parameters without a gradient are passed over."""
        weights, masks = self._pairs_of(optimizer)
        found = [(w.grad, m) for w, m in zip(weights, masks, strict=True) if w.grad is not None]
        if found:
            torch._foreach_mul_([grad for grad, _ in found], [mask for _, mask in found])

    def attach(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Enforce the masks after every step of `optimizers`, with one post hook each, from now on."""
        self.detach()
        self._optimizers = list(optimizers)
        self._handles = [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]
        self._build_runtime(named_tensors(self.module))
        self._write(named_tensors(self.module), {})

    def detach(self) -> None:
        """Remove every hook; masks and weights stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizers, self.shadows, self.projections = [], [], tuple, []
        self._pairs.clear()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all masks to a safetensors file (bool tensors by name), through a temporary name."""
        with replacing(path) as temporary:
            masks = {name: mask.cpu().contiguous() for name, mask in self._masks.items()}
            save_file(masks, temporary, metadata={"format": FORMAT, "version": "1"})

    def load(self, path: str | os.PathLike[str], regrow: bool = False) -> None:
        """Commit the masks of a file written by `save`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, holds something else, or belongs to another model; nothing has changed then.
        """
        self.set_masks(read_masks(path), regrow=regrow)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the masks as bool CPU tensors."""
        return {name: mask.cpu().clone() for name, mask in self._masks.items()}

    def load_state_dict(self, masks: Mapping[str, Tensor]) -> None:
        """Put exactly these masks in force, whatever was before (a checkpoint may lie in the past)."""
        keep = self._checked(masks, named_tensors(self.module), "masks")
        self.set_masks(masks, regrow=True)
        for name in self._masks.keys() - keep.keys():
            del self._masks[name], self._runtime[name]
        self._pairs.clear()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for project in self.projections:
            project(optimizer)
        self.apply(optimizer)

    def _checked(
        self, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], what: str
    ) -> dict[str, Tensor]:
        first = aliases(self.module)
        checked = {}
        for name, tensor in tensors.items():
            key = first.get(canonical_name(name))
            if key is None:
                seen = ", ".join(list(parameters)[:20])
                raise ValueError(
                    f"`{what}` name {name!r} is no parameter of {type(self.module).__name__}. Parameters: {seen}."
                )
            if tensor.shape != parameters[key].shape:
                raise ValueError(
                    f"`{what}` entry {name!r} must have the parameter's shape {tuple(parameters[key].shape)}, "
                    f"got {tuple(tensor.shape)}. It belongs to another model."
                )
            checked[key] = tensor
        return checked

    def _build_runtime(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Masks in the weights' own dtype, device and layout: `foreach` is slow on mixed dtypes, bool multiplies slowly."""
        self._pairs.clear()
        for name, mask in self._masks.items():
            self._runtime[name] = like(mask, parameters[name])

    def _pairs_of(self, optimizer: torch.optim.Optimizer | None) -> tuple[list[nn.Parameter], list[Tensor]]:
        """(weights, masks) that `optimizer` updates; tensors without a pruned entry cost nothing."""
        if id(optimizer) not in self._pairs:
            owned = (
                None
                if optimizer is None
                else {id(p) for group in optimizer.param_groups for p in group["params"]}
            )
            parameters = named_tensors(self.module)
            names = [
                name
                for name, mask in self._masks.items()
                if (owned is None or id(parameters[name]) in owned) and not bool(mask.all())
            ]
            self._pairs[id(optimizer)] = (
                [parameters[name] for name in names],
                [self._runtime[name] for name in names],
            )
        return self._pairs[id(optimizer)]

    @torch.no_grad()
    def _write(self, parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            parameters[name].copy_(like(value, parameters[name]))
        self.apply()
        for name, mask in self._runtime.items():
            for optimizer in self._optimizers:
                for state in optimizer.state.get(parameters[name], {}).values():
                    if isinstance(state, Tensor) and state.shape == mask.shape:
                        state.mul_(mask.to(state.dtype))
        for shadow in self.shadows():
            self._mask_shadow(shadow)

    def _mask_shadow(self, shadow: nn.Module) -> None:
        for name, parameter in named_tensors(shadow).items():
            if name in self._masks and parameter.shape == self._masks[name].shape:
                parameter.mul_(like(self._masks[name], parameter))


def read_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the bool masks of a file written by `MaskManager.save`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged, or no mask file.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"no mask file {os.fspath(path)!r}. Write one with MaskManager.of(module).save(path)."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            masks = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(
            f"{os.fspath(path)!r} is truncated or no safetensors file ({error}). Save the masks again."
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{os.fspath(path)!r} holds no masks (format {metadata.get('format')!r}). Save with MaskManager.save."
        )
    return masks


def check_finite(name: str, weight: Tensor) -> None:
    """Raise ValueError if a weight is NaN or infinite: 0 * NaN is NaN, so a mask could not prune it."""
    if not bool(torch.isfinite(local(weight)).all()):
        raise ValueError(
            f"the weights of {name!r} must be finite to be pruned, got NaN or infinite values. Repair the model first."
        )


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a DTensor on every rank (a collective call), any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a full tensor in the dtype, device and sharding of `parameter`."""
    tensor = tensor.detach().to(device=local(parameter).device, dtype=parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor
