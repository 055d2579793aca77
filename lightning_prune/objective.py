"""A module's loss as a pure function of its parameters, gradients of it, and batches to evaluate it on.

Methods never touch the live module: the loss is evaluated by `torch.func.functional_call` on detached clones of
parameters and buffers, inside the sandbox of `sandbox.py`; `torch.autograd.grad` is used throughout, never `backward`,
so `.grad` and the hooks of distributed wrappers stay out of it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from lightning_prune.batch_norm import refit_batch_norm
from lightning_prune.masks import full
from lightning_prune.sandbox import isolated_rng, rng_states, seed_all, set_rng_states, untouched
from lightning_prune.targets import canonical_name, named_tensors

LossFunction = Callable[[nn.Module, Any], Tensor]
Batches = Callable[[int | None], Iterable[Any]]
_POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
)


class _Step(nn.Module):
    """Wraps a module so that `functional_call` reaches its loss instead of its `forward`."""

    def __init__(self, module: nn.Module, loss_fn: LossFunction | None) -> None:
        super().__init__()
        self.module = module
        self.loss_fn = loss_fn

    def forward(self, batch: Any, batch_idx: int) -> Tensor:
        if self.loss_fn is not None:
            return _as_loss(self.loss_fn(self.module, batch), "loss_fn")
        step: Any = self.module.training_step
        positional = [p for p in inspect.signature(step).parameters.values() if p.kind in _POSITIONAL]
        takes_index = len(positional) > 1 or any(p.kind is p.VAR_POSITIONAL for p in positional)
        return _as_loss(step(batch, batch_idx) if takes_index else step(batch), "training_step")


@dataclass
class Objective:
    """The loss of a module on calibration batches.

    Attributes:
        module: the live module; it is never changed.
        batches: returns at most so many batches (None: all of one pass), on the module's device.
        loss_fn: `loss_fn(module, batch) -> scalar`; None takes the module's own `training_step`.
        trainer: the Trainer whose loggers are muted and whose ranks share the work; None without one.
        reduce: averages a tensor over all ranks in place; identity on one process.
        copies: score on a deep copy instead of the live module.
        seed: of dropout and augmentation while scoring, >= 0.
        advance: called once per batch, for progress bars.
    """

    module: nn.Module
    batches: Batches
    loss_fn: LossFunction | None = None
    trainer: Any = None
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    copies: bool = False
    seed: int = 0
    advance: Callable[[], None] = lambda: None
    _step: nn.Module | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_loss(self.module, self.loss_fn)

    @contextmanager
    def open(self) -> Iterator[nn.Module]:
        """Yield the wrapped step inside the sandbox; compiled code runs eagerly, on the module or on a copy of it."""
        module = copy.deepcopy(self.module) if self.copies else self.module
        with untouched(module, self.trainer), _eagerly():
            seed_all(self.seed)
            yield _Step(module, self.loss_fn)

    def parameters(self) -> dict[str, Tensor]:
        """Detached float clones of all parameters by canonical name (a tied tensor once), requiring gradients."""
        return {name: _differentiable(full(p.detach())) for name, p in named_tensors(self.module).items()}

    def run(self, module: nn.Module, batch: Any) -> Tensor:
        """Return the loss of `module`, the live one or a copy, on a batch; the caller keeps the sandbox."""
        return _Step(module, self.loss_fn)(batch, 0)

    def check_batches(self) -> None:
        """Raise ValueError if not even one calibration batch can be read."""
        if next(iter(self.batches(1)), None) is None:
            raise ValueError("there is no calibration batch. Give a dataloader with at least one batch.")

    def refit_batch_norm(self, count: int) -> int:
        """Re-estimate the live module's BatchNorm statistics on at most `count` batches; returns how many were used."""

        with _eagerly():
            return refit_batch_norm(self.module, self.run, self.batches(count), self.trainer, self.reduce)

    def gradients(self, names: Sequence[str], count: int | None = None) -> dict[str, Tensor]:
        """Return the gradient of the mean batch loss for the named parameters.

        Args:
            names: canonical parameter names.
            count: number of batches; None takes one pass.
        Returns:
            gradients by name, each of its parameter's shape and at least float32, averaged over batches and ranks.
        Raises:
            ValueError: there is no batch, or a loss or gradient is not finite (the batch is named), or the loss does
                not depend on the parameters.
        """
        total: dict[str, Tensor] = {}
        seen = 0
        with self.open() as step:
            parameters = self.parameters()
            wanted = [parameters[name] for name in names]
            for index, batch in enumerate(self.batches(count)):
                loss = evaluate(step, parameters, buffers_of(self.module), batch, index)
                if not loss.requires_grad:
                    raise ValueError(
                        f"the loss of calibration batch {index} does not depend on the parameters. Return it without "
                        "`.detach()` or `torch.no_grad()`."
                    )
                grads = torch.autograd.grad(loss, wanted, allow_unused=True)
                for name, grad in zip(names, grads, strict=True):
                    grad = torch.zeros_like(parameters[name]) if grad is None else grad
                    if not bool(torch.isfinite(grad).all()):
                        raise ValueError(
                            f"the gradient of {name!r} on calibration batch {index} is not finite. Check loss and data."
                        )
                    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))  # 16 bit sums lose small terms
                    total[name] = total[name].add_(grad) if name in total else grad.clone()
                seen += 1
                self.advance()
        if not seen:
            raise ValueError("there is no calibration batch. Give a dataloader with at least one batch.")
        return {name: self.reduce(value / seen) for name, value in total.items()}


def evaluate(
    step: nn.Module,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    batch: Any,
    index: int = 0,
    check: bool = True,
) -> Tensor:
    """Return the loss of the wrapped step as a function of parameters (canonical names) and buffers."""
    named = live_names(step, {f"module.{name}": value for name, value in (*parameters.items(), *buffers.items())})
    loss = torch.func.functional_call(step, named, (batch, index), tie_weights=False)
    if check:
        check_finite(loss, index)
    return loss


def check_finite(loss: Tensor, index: int) -> None:
    """Raise ValueError if a loss is not finite; `index` is that of its calibration batch."""
    if not bool(torch.isfinite(loss)):
        raise ValueError(
            f"the loss of calibration batch {index} is not finite, got {loss.detach().item()}. Check loss and data."
        )


def live_names(module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the values by one full name per place that holds their tensor, ready for `functional_call`.

    A tensor tied between modules gets one name in each of them; a module registered under two names gets one. Left to
    itself (`tie_weights=True`) `functional_call` swaps the second kind twice and leaves a copy in the live module.

    Args:
        module: the module to call.
        values: stand-ins by canonical name (any name of a tied tensor).
    """
    everything = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    live = {canonical_name(name): tensor for name, tensor in everything}
    stand_in = {id(live[canonical_name(name)]): value for name, value in values.items()}
    return {
        f"{path}.{name}" if path else name: stand_in[id(tensor)]
        for path, child in module.named_modules()
        for name, tensor in (*child._parameters.items(), *child._buffers.items())
        if tensor is not None and id(tensor) in stand_in
    }


def _eagerly() -> AbstractContextManager[Any]:
    """Compiled code cannot be differentiated twice; torch before 2.6 has no way to run it eagerly."""
    stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if stance is None else stance("force_eager")


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Return clones of all buffers, so that BatchNorm statistics written during scoring are thrown away."""
    return {name: buffer.detach().clone() for name, buffer in module.named_buffers()}


def check_loss(module: nn.Module, loss_fn: LossFunction | None) -> None:
    """Raise ValueError if no scalar loss of `module` can be had without the user's help."""
    advice = "Give `loss_fn(module, batch) -> scalar tensor`."
    if loss_fn is not None:
        if not callable(loss_fn):
            raise ValueError(f"`loss_fn` must be callable, got {loss_fn!r}. {advice}")
        return
    step = getattr(module, "training_step", None)
    if step is None:
        raise ValueError(f"{type(module).__name__} has no `training_step` to take a loss from. {advice}")
    if getattr(module, "automatic_optimization", True) is False:
        raise ValueError(
            f"the `training_step` of {type(module).__name__} optimizes by itself (manual optimization). {advice}"
        )
    if "dataloader_iter" in inspect.signature(step).parameters:
        raise ValueError(f"a `training_step` that takes `dataloader_iter` cannot be given single batches. {advice}")


def calibration_loader(loader: DataLoader, seed: int, rank: int = 0, world_size: int = 1) -> DataLoader:
    """Return a DataLoader over the same data, in an order of its own; reading it leaves `loader` alone.

    Args:
        loader: a map-style DataLoader.
        seed: of the permutation, >= 0; equal on all ranks, which read disjoint shares.
        rank, world_size: this process among all.
    Raises:
        ValueError: `loader` is no map-style DataLoader, or the size of its batches is not known.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"calibration needs a map-style DataLoader, got {type(loader).__name__}"
            f"{' over an IterableDataset' if isinstance(loader, DataLoader) else ''}. Give `calibration_dataloader`."
        )
    generator = torch.Generator().manual_seed(seed % 2**63)
    data = _restricted(loader)
    sampler: Sampler = RandomSampler(data, generator=generator)  # type: ignore[arg-type]
    if world_size > 1:
        sampler = DistributedSampler(data, world_size, rank, shuffle=True, seed=seed)
    batches: dict[str, Any] = {"batch_size": None, "sampler": sampler}
    if loader.batch_sampler is not None:
        size = getattr(loader.batch_sampler, "batch_size", None)
        if size is None:
            raise ValueError(
                f"calibration cannot tell the batch size of the batch sampler {type(loader.batch_sampler).__name__}. "
                "Give it an attribute `batch_size`, or give `calibration_dataloader`."
            )
        drop_last = bool(getattr(loader.batch_sampler, "drop_last", False))
        batches = {"batch_sampler": BatchSampler(sampler, size, drop_last)}
    collate = loader.collate_fn
    if isinstance(data, TensorDataset) and collate is default_collate and loader.batch_sampler is not None:
        data, collate = _WholeBatches(data), list
    return DataLoader(data, collate_fn=collate, num_workers=0, generator=generator, **batches)


class _WholeBatches(Dataset):
    """Rows of a TensorDataset by one index per tensor instead of one per sample: the same batches, many times faster."""

    def __init__(self, data: TensorDataset) -> None:
        self.tensors = data.tensors

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        index = torch.tensor(indices)
        return [tensor.index_select(0, index.to(tensor.device)) for tensor in self.tensors]

    def __len__(self) -> int:
        return len(self.tensors[0])


def _restricted(loader: DataLoader) -> Dataset:
    """The data that `loader` reads: a SubsetRandomSampler leaves samples out, often those for validation."""
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    return Subset(loader.dataset, list(sampler.indices)) if isinstance(sampler, SubsetRandomSampler) else loader.dataset


def read_batches(loaders: Any, count: int | None, seed: int = 0) -> Iterator[Any]:
    """Yield at most `count` batches of a tree (loader, list or dict of loaders) of calibration loaders.

    Batches are drawn under random states of their own: augmentation in the data set leaves the run alone.
    """
    with isolated_rng():
        seed_all(seed)
        own = rng_states()
    leaves = _leaves(loaders)
    if not leaves:
        return
    with isolated_rng():  # making an iterator draws a base seed
        iterators = [iter(leaf) for leaf in leaves]
    drawn = 0
    while count is None or drawn < count:
        with isolated_rng():
            set_rng_states(own)
            try:
                items = [next(iterator) for iterator in iterators]
            except StopIteration:
                return
            own = rng_states()
        yield _like_tree(loaders, iter(items))
        drawn += 1


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with every tensor in its tuples, lists and dicts on `device`."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def _as_loss(output: Any, origin: str) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(type(loss).__name__)
        raise ValueError(
            f"`{origin}` must return a scalar loss tensor, got {shape}. Give `loss_fn(module, batch) -> scalar tensor`."
        )
    return loss.reshape(())


def _differentiable(parameter: Tensor) -> Tensor:
    return parameter.clone().requires_grad_(parameter.is_floating_point())


def _leaves(tree: Any) -> list[Iterable[Any]]:
    if isinstance(tree, Mapping):
        return [leaf for value in tree.values() for leaf in _leaves(value)]
    if isinstance(tree, (list, tuple)):
        return [leaf for value in tree for leaf in _leaves(value)]
    return [tree]


def _like_tree(tree: Any, items: Iterator[Any]) -> Any:
    if isinstance(tree, Mapping):
        return {key: _like_tree(value, items) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_like_tree(value, items) for value in tree)
    return next(items)


def map_loaders(tree: Any, function: Callable[[Any], Any]) -> Any:
    """Return the tree with `function` applied to every loader in it."""
    if isinstance(tree, Mapping):
        return {key: map_loaders(value, function) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)) and not isinstance(tree, Dataset):
        return type(tree)(map_loaders(value, function) for value in tree)
    return function(tree)
