"""prune(): the same core without a Trainer, for a notebook or a module that is trained elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lightning_prune.callback import PruningCallback
from lightning_prune.context import Context, describe_event, event_generator
from lightning_prune.masks import MaskManager, full
from lightning_prune.objective import LossFunction, Objective, to_device
from lightning_prune.receipt import Receipt
from lightning_prune.report import fit_receipt
from lightning_prune.schedules import Position
from lightning_prune.targets import select


def prune(
    module: nn.Module,
    method: PruningCallback,
    dataloader: Iterable[Any] | None = None,
    loss_fn: LossFunction | None = None,
    example_input: Any = None,
) -> Receipt:
    """Prune `module` in place to the method's final target, at once.

    The masks are in `MaskManager.of(module)`; they hold while a Trainer trains the module with a pruning callback, or
    where `MaskManager.of(module).attach([optimizer])` enforces them in a loop of one's own.

    Args:
        module: any module, on any device.
        method: a pruning callback; its schedule is skipped, `sparsity` is reached in one event.
        dataloader: batches for methods that need a loss; each is moved to the module's device.
        loss_fn: `loss_fn(module, batch) -> scalar tensor`; None: the method's own, else `module.training_step`.
        example_input: arguments of one forward call (a tensor or a tuple), to count FLOPs and milliseconds.
    Returns:
        The receipt: what was asked and what was got.
    Raises:
        ValueError: an argument or the module does not fit the method; the module is unchanged then.
    """
    if not isinstance(method, PruningCallback):
        raise ValueError(f"`method` must be a pruning callback such as Magnitude(sparsity=0.9), got {method!r}.")
    if not isinstance(module, nn.Module):
        raise ValueError(f"`module` must be a torch.nn.Module, got {type(module).__name__}.")
    started = time.perf_counter()
    targets = select(module, method.include, method.exclude)
    manager = MaskManager.of(module)
    target = method.final_target
    context = Context(
        module=module,
        weights={name: full(weight.detach()) for name, weight in targets.items()},
        alive=manager.alive(targets),
        target=target,
        event=0,
        generator=event_generator(method.seed, 0),
        make_objective=lambda: Objective(
            module, _source(module, dataloader, method), loss_fn or method.loss_fn, seed=method.seed
        ),
        example=_as_arguments(example_input),
        show_progress=False,
    )
    proposal = method.propose(context)
    repairable = method.prepare_repair(context, proposal)
    manager.set_masks(proposal.masks, proposal.weights)
    if repairable:
        method.repair(context, proposal)
    event = describe_event(manager, proposal, target, Position(0, 0), time.perf_counter() - started)
    method.history.append(event)
    return fit_receipt(method, module, context.example)


def _source(module: nn.Module, dataloader: Iterable[Any] | None, method: PruningCallback) -> Any:
    given = method.calibration_dataloader if dataloader is None else dataloader
    if given is None:
        raise ValueError(f"{method.method} needs data. Give `dataloader`.")
    device = next((p.device for p in module.parameters()), torch.device("cpu"))

    def batches(count: int | None) -> Iterator[Any]:
        for index, batch in enumerate(given):
            if count is not None and index >= count:
                return
            yield to_device(batch, device)

    return batches


def _as_arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if example is None:
        return None
    return (example if isinstance(example, tuple) else (example,)), {}
