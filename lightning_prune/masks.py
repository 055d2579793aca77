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
Pairs = tuple[list[Tensor], list[Tensor]]

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
        self._pairs: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[int, Pairs]]
        self._pairs = weakref.WeakKeyDictionary()
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
        return 0.0 if total == 0 else (total - kept) / total  # one rounding, as in the receipt

    def set_masks(
        self, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None, regrow: bool = False
    ) -> None:
        """Commit masks: intersect them with those in force, zero the weights, their optimizer state and their shadows.

        Args:
            masks: bool, by parameter name (any name of a tied tensor), each of its parameter's shape.
            weights: new values for kept weights by the same names and shapes; None keeps the values.
            regrow: replace the masks in force instead of intersecting; weights that come back start at 0.
        Raises:
            ValueError: unknown name, wrong shape or dtype, weights without a mask, or non-finite weights; nothing has
                changed then.
        """
        parameters = named_tensors(self.module)
        masks = self._checked_masks(masks, parameters)
        values = {
            name: like(value, parameters[name])  # finite in the parameter's own dtype, or refused
            for name, value in self._checked(weights or {}, parameters, "weights").items()
        }
        for name in values.keys() - masks.keys():
            raise ValueError(f"`weights` entry {name!r} comes without a mask. Give both, or neither.")
        for name in masks:
            check_finite(name, values.get(name, parameters[name].detach()))
        merged = {
            name: mask if regrow or name not in self._masks else mask & self._masks[name].to(mask.device)
            for name, mask in masks.items()
        }
        self._commit(parameters, {**self._masks, **merged}, values)

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
    def apply_unowned(self) -> None:
        """Zero pruned weights that no attached optimizer updates: averaged teachers and the like, moved by other code."""
        owned = {id(p) for o in self._optimizers for group in o.param_groups for p in group["params"]}
        parameters = named_tensors(self.module)
        for name, mask in self._runtime.items():
            if id(parameters[name]) not in owned:
                parameters[name].mul_(mask)

    @torch.no_grad()
    def settle(self) -> None:
        """Write +0.0 into pruned weights: a product leaves -0.0 where they were negative, which compresses badly."""
        for weight, mask in zip(*self._find_pairs(None), strict=True):
            _zero_pruned(weight, mask)

    @torch.no_grad()
    def mask_gradients(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Zero the gradients of pruned weights; parameters without a gradient are passed over."""
        weights, masks = self._pairs_of(optimizer)
        found = [(w.grad, m) for w, m in zip(weights, masks, strict=True) if w.grad is not None]
        if found:
            torch._foreach_mul_([grad for grad, _ in found], [mask for _, mask in found])

    def attach(self, optimizers: Sequence[torch.optim.Optimizer], mask_state: bool = True) -> None:
        """Enforce the masks after every step of `optimizers`, with one post hook each, from now on.

        Args:
            optimizers: all that update the module.
            mask_state: zero their state for pruned weights too; a resume leaves it, bit for bit, as it was saved.
        """
        parameters = named_tensors(self.module)
        self._runtime = self._in_layout_of(parameters, self._masks)
        self._remove_hooks()
        self._optimizers = list(dict.fromkeys(optimizers))
        self._handles = [o.register_step_post_hook(self._after_step) for o in self._optimizers]
        if mask_state:
            self._write(parameters, {})
        else:
            self.apply()

    def detach(self) -> None:
        """Remove every hook, projection and averaged copy; masks and weights stay as they are."""
        self._remove_hooks()
        self.shadows, self.projections = tuple, []

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizers = [], []
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
            ValueError: the file is damaged, holds something else, or belongs to another model; nothing has changed
                then.
        """
        self.set_masks(read_masks(path), regrow=regrow)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the masks as bool CPU tensors."""
        return {name: mask.cpu().clone() for name, mask in self._masks.items()}

    def load_state_dict(self, masks: Mapping[str, Tensor]) -> None:
        """Put exactly these masks in force, whatever was before (a checkpoint may lie in the past)."""
        parameters = named_tensors(self.module)
        checked = self._checked_masks(masks, parameters)
        for name in checked:
            check_finite(name, parameters[name].detach())
        self._commit(parameters, checked, {})

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for project in self.projections:
            project(optimizer)
        self.apply(optimizer)

    def _checked(self, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
        first = aliases(self.module)
        checked: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise ValueError(f"`{what}` entry {name!r} must be a tensor, got {type(tensor).__name__}.")
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
            if key in checked and not torch.equal(checked[key], tensor):
                raise ValueError(f"`{what}` names the tied tensor {key!r} twice with different values. Give one.")
            checked[key] = tensor
        return checked

    def _checked_masks(self, masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of `masks` by canonical name on the parameters' devices."""
        checked = self._checked(masks, parameters, "masks")
        for name, mask in checked.items():
            if mask.dtype != torch.bool:
                raise ValueError(
                    f"mask {name!r} must be bool (True = kept), got {mask.dtype}. Compare or cast it first."
                )
        return {name: mask.detach().to(local(parameters[name]).device).clone() for name, mask in checked.items()}

    def _commit(
        self,
        parameters: Mapping[str, nn.Parameter],
        masks: dict[str, Tensor],
        values: Mapping[str, Tensor],
    ) -> None:
        """Put exactly `masks` in force; all that can fail comes before the first change."""
        runtime = self._in_layout_of(parameters, masks)
        self._masks, self._runtime = masks, runtime
        self._write(parameters, values)
        self.version += 1

    def _in_layout_of(self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks in the weights' dtype, device and strides: `foreach` is slow on mixed dtypes and on bool."""
        for name, mask in masks.items():
            if name not in parameters or parameters[name].shape != mask.shape:
                raise RuntimeError(
                    f"{name!r} has been removed or reshaped since it was masked. Call MaskManager.of(module).clear()."
                )
        return {name: like(mask, parameters[name]) for name, mask in masks.items()}

    def _pairs_of(self, optimizer: torch.optim.Optimizer | None) -> Pairs:
        """(weights, masks) that `optimizer` updates; tensors without a pruned entry cost nothing."""
        if optimizer is None:
            return self._find_pairs(None)
        size = sum(len(group["params"]) for group in optimizer.param_groups)  # grows when layers are unfrozen
        cached = self._pairs.get(optimizer)
        if cached is None or cached[0] != size:
            owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
            cached = self._pairs[optimizer] = (size, self._find_pairs(owned))
        return cached[1]

    def _find_pairs(self, owned: set[int] | None) -> Pairs:
        parameters = named_tensors(self.module)
        names = [
            name
            for name, mask in self._masks.items()
            if (owned is None or id(parameters[name]) in owned) and not bool(mask.all())
        ]
        for name in names:
            weight, mask = parameters[name], self._runtime[name]
            if (mask.dtype, mask.device) != (weight.dtype, weight.device):  # the module has been moved or cast since
                self._runtime[name] = like(self._masks[name], weight)
        return [parameters[name] for name in names], [self._runtime[name] for name in names]

    @torch.no_grad()
    def _write(self, parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
        self._pairs.clear()
        for name, value in values.items():
            parameters[name].copy_(value)
        self.settle()
        for optimizer in self._optimizers:
            for name, mask in self._runtime.items():
                for state in optimizer.state.get(parameters[name], {}).values():
                    if isinstance(state, Tensor) and state.shape == mask.shape:
                        _zero_pruned(state, mask)
            if isinstance(optimizer, torch.optim.LBFGS):
                self._mask_curvature(optimizer)
        for shadow in self.shadows():
            for name, parameter in named_tensors(shadow).items():
                if name in self._masks and parameter.shape == self._masks[name].shape:
                    _zero_pruned(parameter, like(self._masks[name], parameter))

    def _mask_curvature(self, optimizer: torch.optim.LBFGS) -> None:
        """LBFGS keeps directions of all parameters end to end; unmasked they move dead weights in its line search."""
        masks = {id(p): self._runtime[name] for name, p in named_tensors(self.module).items() if name in self._runtime}
        updated = [p for group in optimizer.param_groups for p in group["params"]]
        flat = torch.cat([masks.get(id(p), torch.ones_like(p)).flatten() for p in updated])
        for state in optimizer.state.values():
            for value in state.values():
                for tensor in value if isinstance(value, list) else [value]:
                    if isinstance(tensor, Tensor) and tensor.shape == flat.shape:
                        _zero_pruned(tensor, flat)


def _zero_pruned(tensor: Tensor, mask: Tensor) -> None:
    """Zero where `mask` is 0, in place: also an infinite second moment, which a product would turn into NaN."""
    if tensor.is_floating_point():
        local(tensor).masked_fill_(local(mask) == 0, 0)


def read_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the bool masks of a file written by `MaskManager.save`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged, or no mask file.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no mask file {os.fspath(path)!r}. Write one with MaskManager.of(module).save(path).")
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
    """Return a copy of a full tensor in the dtype, device, strides and sharding of `parameter`."""
    tensor = tensor.detach()
    if isinstance(parameter, DTensor):
        tensor = tensor.to(device=local(parameter).device, dtype=parameter.dtype)
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return torch.empty_like(parameter, requires_grad=False).copy_(tensor)
