"""Gates on a live module: parameters are scaled while the modules that read them run, and only then.

A hook before a module's forward puts w * z in the place of w, a hook after it (also after an error) puts w back: class,
parameter objects, names and state dict never change, and what an optimizer, a checkpoint or an averaged copy sees is w.
A unit's gate sits on the weights that read it, which is exact whatever lies between: activation, norm, depthwise layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune._dependency.calls import Call, copy_of, tensors_in
from lightning_prune.batch_norm import batch_norms
from lightning_prune.methods._chipnet_layout import Slot
from lightning_prune.targets import aliases, canonical_name

Places = dict[nn.Module, list[tuple[str, str, int]]]  # host -> (holder's path below it, attribute, index of the slot)


class _Swap:
    """The pair of hooks of one module; it knows the module by its argument alone, so that a deep copy works."""

    def __init__(self, entries: Sequence[tuple[str, str, int]], scales: Sequence[Tensor]) -> None:
        self.entries, self.scales = entries, scales
        self.saved: list[list[tuple[nn.Module, str, Any]]] = []

    def before(self, module: nn.Module, args: Any) -> None:
        """Put scaled parameters in place."""
        kept: list[tuple[nn.Module, str, Any]] = []
        self.saved.append(kept)
        for path, attribute, index in self.entries:
            holder = module.get_submodule(path)
            weight = holder._parameters[attribute]
            assert weight is not None
            kept.append((holder, attribute, weight))
            holder._parameters[attribute] = weight * self.scales[index].to(weight.dtype)  # type: ignore[assignment]

    def after(self, module: nn.Module, args: Any, result: Any) -> None:
        """Put the parameters back."""
        for holder, attribute, weight in reversed(self.saved.pop() if self.saved else []):
            holder._parameters[attribute] = weight


class _Frozen:
    """The pair of hooks around BatchNorm layers: they use their running statistics and leave them alone."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths
        self.frozen = True
        self.saved: list[list[tuple[nn.Module, bool]]] = []

    def before(self, module: nn.Module, args: Any) -> None:
        """Evaluate as in eval mode."""
        norms = [module.get_submodule(path) for path in self.paths] if self.frozen else []
        self.saved.append([(norm, norm.training) for norm in norms])
        for norm in norms:
            norm.training = False

    def after(self, module: nn.Module, args: Any, result: Any) -> None:
        """Put each layer's own flag back."""
        for norm, flag in self.saved.pop() if self.saved else []:
            norm.training = flag


class GatedReads:
    """Scales on the slots of a module, one leaf tensor per slot; autograd collects their gradients.

    Attributes:
        scales: per slot, of the parameter's number of dims, with size 1 in all dims but the slot's.
    """

    def __init__(self, slots: Sequence[Slot], ranks: Mapping[str, int], device: torch.device) -> None:
        self.slots = tuple(slots)
        self.index = torch.cat([slot.gates for slot in slots]).to(device)
        self._flat = torch.ones(len(self.index), device=device)
        ends = itertools.accumulate(len(slot.gates) for slot in slots)
        self.scales = [
            self._flat[end - len(slot.gates) : end].view(_shape(slot, ranks[slot.name])).detach().requires_grad_()
            for slot, end in zip(slots, ends, strict=True)
        ]
        self._handles: list[Any] = []
        self._frozen: list[_Frozen] = []

    @torch.no_grad()
    def set(self, z: Tensor) -> None:
        """Scale by these gates from now on.

        Args:
            z: of shape (gates,).
        """
        self._flat.copy_(torch.cat([z, z.new_ones(1)])[self.index])

    def take_gradient(self, gates: int) -> Tensor:
        """Return the gradient of the gates that has come together since the last call, and forget it.

        Returns:
            float32 of shape (gates,).
        """
        grads = [torch.zeros_like(s) if s.grad is None else s.grad for s in self.scales]
        total = self._flat.new_zeros(gates + 1).index_add_(0, self.index, torch.cat([g.flatten() for g in grads]))
        for scale in self.scales:
            scale.grad = None
        return total[:gates]

    def install(self, places: Places) -> None:
        """Hook the scales into the modules that `find_places` has found."""
        for host, entries in places.items():
            swap = _Swap(entries, self.scales)
            self._handles.append(host.register_forward_pre_hook(swap.before))
            self._handles.append(host.register_forward_hook(swap.after, always_call=True))

    def freeze_norms(self, module: nn.Module) -> None:
        """Make BatchNorm use its running statistics, whatever mode the module is in."""
        finder, norms = _HostFinder(module, None), set(map(id, batch_norms(module)))
        hosts: dict[nn.Module, list[str]] = {}
        for name, child in module.named_modules():
            place = finder.host_of(canonical_name(name)) if id(child) in norms else None
            if place is not None:
                hosts.setdefault(place[0], []).append(place[1])
        for host, paths in hosts.items():
            frozen = _Frozen(paths)
            self._frozen.append(frozen)
            self._handles.append(host.register_forward_pre_hook(frozen.before))
            self._handles.append(host.register_forward_hook(frozen.after, always_call=True))

    @contextmanager
    def thawed(self) -> Iterator[None]:
        """Let frozen BatchNorm layers follow their own mode for a while, to measure their statistics."""
        for frozen in self._frozen:
            frozen.frozen = False
        try:
            yield
        finally:
            for frozen in self._frozen:
                frozen.frozen = True

    def remove(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._frozen = [], []


def _shape(slot: Slot, rank: int) -> list[int]:
    return [len(slot.gates) if dim == slot.dim else 1 for dim in range(rank)]


class _HostFinder:
    """Finds around which module's call something below it can be changed.

    That is the module itself or, if it is never called (a projection inside attention) or runs as compiled code (which is
    blind to hooks that come later), the nearest one above it that is called and is not compiled.
    """

    def __init__(self, module: nn.Module, called: Iterable[str] | None) -> None:
        self.called = None if called is None else set(called)
        self.outer: dict[str, tuple[str, nn.Module]] = {}
        self.inner: dict[str, str] = {}
        self.compiled: set[str] = set()
        for raw, child in module.named_modules(remove_duplicate=False):
            name = canonical_name(raw)
            self.outer.setdefault(name, (raw, child))
            self.inner[name] = raw
            if raw.endswith("_orig_mod") or getattr(child, "_compiled_call_impl", None) is not None:
                self.compiled.add(name)

    def host_of(self, path: str) -> tuple[nn.Module, str] | None:
        """Return the module to hook, and the path from it to the one at `path`; None if there is none."""
        host: str | None = path
        above = [".".join(path.split(".")[:end]) for end in range(path.count(".") + 2)] if path else [""]
        outermost = next((name for name in above if name in self.compiled), None)
        if outermost is not None:
            host = _parent(outermost)
        while host is not None and self.called is not None and host not in self.called:
            host = _parent(host)
        if host is None:
            return None
        raw, module = self.outer[host]
        return module, self.inner[path][len(raw) :].lstrip(".")


def _parent(path: str) -> str | None:
    return path.rpartition(".")[0] if path else None


def find_places(module: nn.Module, slots: Sequence[Slot], called: Iterable[str]) -> tuple[Places, list[str]]:
    """Return around which modules each slot's parameter must be scaled.

    Args:
        module: the module.
        slots: what is scaled.
        called: canonical names of the modules whose forward runs.
    Returns:
        entries by module, and the names of parameters for which no module is called.
    """
    finder, first = _HostFinder(module, called), aliases(module)
    places: Places = {}
    homeless = []
    for index, slot in enumerate(slots):
        seen: set[tuple[int, str]] = set()
        for alias in (name for name, own in first.items() if own == slot.name):
            path, _, attribute = alias.rpartition(".")
            place = finder.host_of(path)
            if place is None:
                homeless.append(slot.name)
                continue
            holder = id(place[0].get_submodule(place[1]))
            if (holder, attribute) not in seen:  # a layer registered twice is one layer
                seen.add((holder, attribute))
                places.setdefault(place[0], []).append((place[1], attribute, index))
    return places, list(dict.fromkeys(homeless))


def called_modules(module: nn.Module, calls: Sequence[Call]) -> set[str]:
    """Return the canonical names of the modules whose forward runs in these calls; run it on a copy."""
    found: set[str] = set()
    handles = [
        child.register_forward_pre_hook(partial(_note, found, canonical_name(name)))
        for name, child in module.named_modules(remove_duplicate=False)
    ]
    try:
        _outputs(module, calls)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _note(found: set[str], name: str, module: nn.Module, args: Any) -> None:
    found.add(name)


def misread(module: nn.Module, slots: Sequence[Slot], gates: int, calls: Sequence[Call]) -> tuple[set[str], list[str]]:
    """Check on a copy that the scales reach every read of the parameters.

    Half of the gates are set to 0, once by the hooks and once in the weights themselves: outputs must be equal.

    Args:
        module: the live module; it is not changed.
        slots: what is scaled.
        gates: number of gates.
        calls: how the module is run.
    Returns:
        names of the modules that are called, and of the parameters that are read past the hooks.
    """
    copy = copy_of(module).eval()
    called = called_modules(copy, calls)
    _, homeless = find_places(copy, slots, called)
    wrong = list(homeless)
    rest = [slot for slot in slots if slot.name not in homeless]
    if rest and not _agree(copy, rest, gates, calls, called):
        names = dict.fromkeys(slot.name for slot in rest)
        wrong += [
            name
            for name in names
            if not _agree(copy, [slot for slot in rest if slot.name == name], gates, calls, called)
        ]
    return called, wrong


def _agree(copy: nn.Module, slots: Sequence[Slot], gates: int, calls: Sequence[Call], called: set[str]) -> bool:
    z = torch.rand(gates, generator=torch.Generator().manual_seed(0)).round()
    parameters = dict(copy.named_parameters())
    parameters = {canonical_name(name): parameter for name, parameter in parameters.items()}
    device = next(iter(parameters.values())).device
    reads = GatedReads(slots, {slot.name: parameters[slot.name].dim() for slot in slots}, device)
    reads.set(z.to(device))
    places, _ = find_places(copy, slots, called)
    reads.install(places)
    try:
        ours = _outputs(copy, calls)
    finally:
        reads.remove()
    saved = {slot.name: parameters[slot.name].detach().clone() for slot in slots}
    with torch.no_grad():
        for slot, scale in zip(slots, reads.scales, strict=True):
            parameters[slot.name].mul_(scale.detach())
        theirs = _outputs(copy, calls)
        for name, value in saved.items():
            parameters[name].copy_(value)
    return len(ours) == len(theirs) and all(
        torch.allclose(one, two, rtol=1e-4, atol=1e-5, equal_nan=True) for one, two in zip(ours, theirs, strict=True)
    )


def _outputs(module: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _eagerly():
        torch.manual_seed(0)
        return [tensor.float() for call in calls for tensor in tensors_in(call.run(module))]


def _eagerly() -> Any:
    """Compiled code is blind to hooks that come after it; torch before 2.6 cannot set it aside."""
    stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if stance is None else stance("force_eager")
