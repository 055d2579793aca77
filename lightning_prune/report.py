"""Fill a receipt from what is in force: masks, events, bytes on disk, and (given an input) FLOPs and milliseconds."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prune._dependency.calls import copy_of
from lightning_prune.callback import PruningCallback
from lightning_prune.masks import DTensor, MaskManager
from lightning_prune.measure import (
    count_flops,
    count_parameters,
    file_bytes,
    flop_blind_spots,
    measure_milliseconds,
)
from lightning_prune.receipt import Receipt, honest_notes, layer_counts, reached_counts
from lightning_prune.smaller import Smaller, smaller_copy
from lightning_prune.targets import named_tensors

Example = tuple[tuple[Any, ...], dict[str, Any]]
_FILE_LIMIT = 64 * 2**20  # a callback measures a file of the weights up to this size; the command line has no limit
_TIMING_SECONDS = 1.0
NOTHING_SMALLER = Smaller()


def arguments_of(method: object) -> dict[str, Any]:
    """Return the constructor arguments of a callback as plain values (each is stored under its own name)."""
    names: dict[str, None] = {}
    ours = {base.__module__.split(".")[0] for base in (type(method), PruningCallback)}
    for base in type(method).__mro__:
        if "__init__" in vars(base) and base.__module__.split(".")[0] in ours:
            names.update(
                dict.fromkeys(
                    p.name
                    for p in inspect.signature(vars(base)["__init__"]).parameters.values()
                    if p.kind is not p.VAR_KEYWORD
                )
            )
    names.pop("self", None)
    return {name: _plain(getattr(method, name)) for name in names if hasattr(method, name)}


def fit_receipt(
    method: PruningCallback,
    module: nn.Module,
    example: Example | None,
    max_seconds: float = _TIMING_SECONDS,
    smaller: Smaller | None = None,
) -> Receipt:
    """Return the receipt of a pruned module.

    Args:
        method: the callback that pruned it; its history tells what was asked and when.
        module: the masked module.
        example: (args, kwargs) of one forward call; None leaves FLOPs and milliseconds open.
        max_seconds: time to spend on measuring milliseconds, > 0.
        smaller: result of `smaller_copy` for this module and example; None makes one if the method removes channels.
    """
    if smaller is None:
        smaller = Smaller()
        if example is not None and method.removes_channels:
            smaller = smaller_copy(module, _on_device(example, module))
    receipt = cost_receipt(module, example, max_seconds, smaller)
    if smaller.module is not None and "budget_type" in method.requested:
        receipt.reached["params"]["pruned"] = count_parameters(smaller.module)
    receipt.method = method.method
    receipt.arguments = arguments_of(method)
    receipt.seed = method.seed
    receipt.requested = method.requested
    receipt.certificate = next((e["certificate"] for e in reversed(method.history) if e["certificate"]), None)
    receipt.repair = "; ".join(dict.fromkeys(text for event in method.history for text in event["repairs"])) or None
    notes = [note for event in method.history for note in event["notes"]] + receipt.notes
    receipt.notes = list(dict.fromkeys([*notes, *honest_notes(receipt)]))
    return receipt


def cost_receipt(
    module: nn.Module,
    example: Example | None,
    max_seconds: float = _TIMING_SECONDS,
    smaller: Smaller = NOTHING_SMALLER,
) -> Receipt:
    """Return a receipt of what a module costs now, masked or not, without a method; arguments as in `fit_receipt`.

    Pruned parameters are those that are not zero; FLOPs, bytes and milliseconds are those of the smaller copy, if any.
    """
    masks = MaskManager.of(module).masks
    total = count_parameters(module)
    removed = sum(int((~mask).sum()) for mask in masks.values())
    flops, milliseconds, notes = (
        (None, {}, []) if example is None else _run_costs(module, example, max_seconds, smaller)
    )
    return Receipt(
        method="none",
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        reached=reached_counts(masks, params={"dense": total, "pruned": total - removed}, flops=flops, **smaller.costs),
        layers=layer_counts(masks),
        bytes=_bytes(module, smaller.module),
        milliseconds=milliseconds,
        notes=[*smaller.notes, *notes],
    )


def dense_twin(module: nn.Module) -> nn.Module:
    """Return a copy whose pruned weights hold numbers again: what the module cost before pruning, for timing only."""
    twin = copy_of(module)
    masks = MaskManager.of(module).masks
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in named_tensors(twin).items():
            if name in masks:
                filler = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.01
                parameter.copy_(torch.where(masks[name].to(parameter.device), parameter, filler))
    return twin


def _run_costs(
    module: nn.Module, example: Example, max_seconds: float, smaller: Smaller
) -> tuple[dict[str, int] | None, dict[str, Any], list[str]]:
    """FLOPs and milliseconds; a module that cannot be run or copied here costs a note, never the run."""
    args, kwargs = _on_device(example, module)
    try:
        dense = count_flops(module, args, kwargs)
        pruned = dense if smaller.module is None else count_flops(smaller.module, args, kwargs)
        turns = {"dense": module}
        if MaskManager.of(module).masks:
            turns = {"dense": dense_twin(module), "masked": module}
        if smaller.module is not None:
            turns["exported"] = smaller.module
        times = measure_milliseconds(turns, args, kwargs, repeats=30, max_seconds=max_seconds)
        blind = flop_blind_spots(module, args, kwargs)
    except Exception as error:  # any user code may run in forward; the training result must survive it
        return None, {}, [f"FLOPs and milliseconds were not measured: {type(error).__name__}: {error}"]
    notes = [f"The FLOP counter does not see: {', '.join(blind)}."] if blind else []
    return {"dense": dense, "pruned": pruned}, {name: time.to_dict() for name, time in times.items()}, notes


def _on_device(example: Example, module: nn.Module) -> Example:
    from lightning_prune.objective import to_device

    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return to_device(example[0], device), to_device(example[1], device)


def _bytes(module: nn.Module, smaller: nn.Module | None) -> dict[str, int | None]:
    dense, pruned = _state(module), _state(module if smaller is None else smaller)
    if any(isinstance(tensor, DTensor) for tensor in dense.values()):
        return {"dense": None, "pruned": None, "compressed": None}
    small = _size(dense) <= _FILE_LIMIT
    plain = file_bytes(dense, compress=False) if small else _size(dense)
    return {
        "dense": plain,
        "pruned": plain if smaller is None else file_bytes(pruned, compress=False) if small else _size(pruned),
        "compressed": file_bytes(pruned, compress=True) if small else None,
    }


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in module.state_dict().items() if isinstance(tensor, torch.Tensor)}


def _size(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _plain(value: Any) -> Any:
    """JSON values of constructor arguments; objects become their type's name."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return getattr(value, "__qualname__", type(value).__qualname__)
