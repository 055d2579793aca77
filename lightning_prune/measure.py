"""What a module costs, measured: FLOPs of one forward pass, parameters, bytes on disk, milliseconds.

Everything here runs a module in eval mode without gradients and leaves it as it was: training flags, random
number generators and gradients are untouched.
"""

from __future__ import annotations

import random
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

__all__ = [
    "MAX_COMPRESSED_BYTES",
    "Timing",
    "count_flops",
    "count_parameters",
    "file_bytes",
    "flop_blind_spots",
    "forward_inputs_batch_size",
    "measure_milliseconds",
    "weight_bytes",
]

MAX_COMPRESSED_BYTES = 512 * 2**20  # zlib reads about 25 MB/s: beyond this a receipt would wait for 20 s
_CHUNK = 2**20

_BLIND_MODULES = (nn.RNNBase, nn.MultiheadAttention, nn.EmbeddingBag, nn.Bilinear)
_BLIND_OPERATORS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": "scaled_dot_product_attention",
    "aten::mkldnn_rnn_layer": "LSTM",
    "aten::_cudnn_rnn": "recurrent layer (cuDNN)",
    "aten::_embedding_bag": "EmbeddingBag",
    "aten::_embedding_bag_forward_only": "EmbeddingBag",
    "aten::_trilinear": "Bilinear",
    "aten::_cdist_forward": "cdist",
    "aten::mv": "matrix-vector product",
    "aten::addmv": "matrix-vector product",
}


@dataclass(frozen=True)
class Timing:
    """Wall-clock milliseconds of one forward pass.

    Args:
        median: middle of the measured times, ms, >= 0.
        low: their 10th percentile, ms.
        high: their 90th percentile, ms.
        batch_size: first dimension of the first input tensor; None when no input has one.
        threads: CPU threads torch was allowed to use.
        repeats: measured passes, >= 1.
    """

    median: float
    low: float
    high: float
    batch_size: int | None
    threads: int
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)


def count_flops(module: nn.Module, args: Any, kwargs: Mapping[str, Any] | None = None) -> int:
    """Count the floating point operations of one forward pass: 2 per multiply-add, over all matrix products.

    The counter sees matrix products and convolutions. It does not see element-wise operations, normalisation,
    pooling and look-ups. Scaled dot-product attention on the CPU, LSTM on the CPU and all recurrent layers on
    cuDNN report 0 (`flop_blind_spots` names what is there). Sparse matrices count as if they were dense. The
    fused kernel of `nn.TransformerEncoderLayer`, which would hide the whole layer, is off meanwhile.

    Args:
        module: any module; it runs once, in eval mode and without gradients.
        args: positional inputs of `forward`, a tuple or list; anything else is taken as the only input.
        kwargs: named inputs of `forward`.

    Returns:
        FLOPs of the whole batch, >= 0.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), _inference([module]):
            # the counter's module hooks may fire twice around a compiled module; its operators still run once
            warnings.filterwarnings("ignore", message=r"Using `torch\.compile\(module\)` when there are global hooks")
            with FlopCounterMode(display=False) as counter:
                module(*_positional(args), **dict(kwargs or {}))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops())


def flop_blind_spots(module: nn.Module, args: Any = None, kwargs: Mapping[str, Any] | None = None) -> list[str]:
    """Name what `count_flops` does not see, or sees only on some devices.

    Args:
        module: any module; without inputs only the types of its sub-modules are looked at.
        args: inputs as for `count_flops`. With `args` or `kwargs` one forward pass also finds functional
            calls, such as attention written with `scaled_dot_product_attention`.
        kwargs: named inputs of `forward`.

    Returns:
        Sorted names, each once: types of sub-modules ("LSTM") and functions ("scaled_dot_product_attention").
    """
    names = {type(part).__name__ for part in module.modules() if isinstance(part, _BLIND_MODULES)}
    if args is not None or kwargs is not None:
        with _inference([module]), _OperatorNames() as spy:
            module(*_positional(() if args is None else args), **dict(kwargs or {}))
        names |= {_BLIND_OPERATORS[name] for name in spy.names if name in _BLIND_OPERATORS}
    return sorted(names)


class _OperatorNames(TorchDispatchMode):
    """Collect the names of the operators that run, as "aten::name"."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def count_parameters(module: nn.Module) -> int:
    """Count the parameters of a module, each tied tensor once.

    Raises:
        ValueError: if a lazy parameter has no shape yet.
    """
    named = dict(module.named_parameters())
    for name, parameter in named.items():
        if is_lazy(parameter):
            raise ValueError(f"`module` must have shapes, got the lazy parameter {name!r}. Run one batch first.")
    return sum(tensor.numel() for tensor in _distinct(named).values())


def weight_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Count the bytes the values of tensors take: sum of numel * element size, each tied tensor once.

    Args:
        tensors: dense tensors by name, for instance a `state_dict`, of any shape and dtype.

    Returns:
        Bytes >= 0, without names or any file header.

    Raises:
        ValueError: if a tensor is sparse or has no data (meta device).
    """
    _check_dense(tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in _distinct(tensors).values())


def file_bytes(tensors: Mapping[str, Tensor], compress: bool, max_bytes: int = MAX_COMPRESSED_BYTES) -> int | None:
    """Measure how large a safetensors file of these tensors is, by writing it; tied tensors are written once.

    Args:
        tensors: dense tensors by name, of any shape and dtype.
        compress: measure the same bytes after zlib (level 6) instead, which is where zeros save space.
        max_bytes: compress no more than this many bytes of values, >= 0.

    Returns:
        Bytes > 0; None when `compress` is asked of more than `max_bytes`.

    Raises:
        ValueError: if a tensor is sparse or has no data, or if `max_bytes` is negative.
    """
    if max_bytes < 0:
        raise ValueError(f"`max_bytes` must be >= 0 bytes, got {max_bytes}. Give 0 to compress nothing.")
    size = weight_bytes(tensors)
    if compress and size > max_bytes:
        return None
    with tempfile.TemporaryDirectory(prefix="lightning_prune_") as folder:
        path = Path(folder) / "model.safetensors"
        save_file(_writable(_distinct(tensors)), path)
        return _compressed_bytes(path) if compress else path.stat().st_size


def measure_milliseconds(
    modules: Mapping[str, nn.Module],
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    repeats: int = 30,
    warmup: int = 3,
    max_seconds: float = 3.0,
) -> dict[str, Timing]:
    """Time forward passes of several modules in turns (A B A B): a slow moment of the machine hits them all.

    Args:
        modules: modules by name, all taking the same inputs; they run in eval mode, without gradients.
        args: positional inputs of `forward`, a tuple or list; anything else is taken as the only input.
        kwargs: named inputs of `forward`.
        repeats: rounds to measure, >= 1; each round runs every module once.
        warmup: rounds run before, not measured, >= 0.
        max_seconds: no new round starts after this many seconds, > 0; one round is always measured.

    Returns:
        A `Timing` under each name of `modules`.

    Raises:
        ValueError: if `modules` is empty, or a count or the time limit is out of range.
    """
    _check_timing_arguments(modules, repeats, warmup, max_seconds)
    positional, named = _positional(args), dict(kwargs or {})
    wait = _synchroniser(modules.values())
    stop = time.perf_counter() + max_seconds
    rounds: list[dict[str, float]] = []
    with _inference(modules.values()):
        for _ in range(warmup):
            if time.perf_counter() < stop:
                _time_round(modules, positional, named, wait)
        while len(rounds) < repeats and (not rounds or time.perf_counter() < stop):
            rounds.append(_time_round(modules, positional, named, wait))
    size, threads = forward_inputs_batch_size(positional, named), torch.get_num_threads()
    return {name: _summary([seconds[name] for seconds in rounds], size, threads) for name in modules}


def forward_inputs_batch_size(args: Any, kwargs: Mapping[str, Any] | None = None) -> int | None:
    """Return the first dimension of the first tensor that has one, also inside lists, tuples and mappings.

    Args:
        args: positional inputs, a tuple or list; anything else is taken as the only input.
        kwargs: named inputs, looked at after `args`.

    Returns:
        Samples in the batch >= 0; None when no tensor with a dimension is found.
    """
    sizes = (int(tensor.shape[0]) for tensor in _tensors((_positional(args), kwargs or {})) if tensor.dim() > 0)
    return next(sizes, None)


def _check_timing_arguments(modules: Mapping[str, nn.Module], repeats: int, warmup: int, max_seconds: float) -> None:
    if not modules:
        raise ValueError("`modules` must hold at least one module, got none. Give {'dense': module}.")
    if repeats < 1:
        raise ValueError(f"`repeats` must be >= 1 round, got {repeats}. Leave the timing out to measure nothing.")
    if warmup < 0:
        raise ValueError(f"`warmup` must be >= 0 rounds, got {warmup}. Give 0 for no warm-up.")
    if not max_seconds > 0:
        raise ValueError(f"`max_seconds` must be > 0 seconds, got {max_seconds}. One round is always measured.")


def _time_round(
    modules: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any], wait: Callable[[], None]
) -> dict[str, float]:
    """Run every module once, in order; seconds by name."""
    seconds = {}
    for name, module in modules.items():
        wait()
        start = time.perf_counter()
        module(*args, **kwargs)
        wait()
        seconds[name] = time.perf_counter() - start
    return seconds


def _summary(seconds: list[float], batch_size: int | None, threads: int) -> Timing:
    low, median, high = (float(value) for value in np.quantile(np.array(seconds) * 1e3, [0.1, 0.5, 0.9]))
    return Timing(median, low, high, batch_size, threads, repeats=len(seconds))


def _cuda_devices(modules: Iterable[nn.Module]) -> list[torch.device]:
    parts = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sorted({part.device for part in parts if part.device.type == "cuda"}, key=str)


def _synchroniser(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Return a function that waits until the modules' GPUs are idle: kernels run behind the Python code."""
    devices = _cuda_devices(modules)

    def wait() -> None:
        for device in devices:
            torch.cuda.synchronize(device)

    return wait


@contextmanager
def _inference(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run in eval mode without gradients; training flags and random generators come back as they were.

    Not `torch.inference_mode`: a module that caches a tensor (position tables) could not train with it later.
    """
    modules = list(modules)
    flags = {part: part.training for module in modules for part in module.modules()}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=_cuda_devices(modules)), torch.no_grad():
        try:
            for module in modules:
                module.eval()
            yield
        finally:
            for part, training in flags.items():
                part.training = training
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _positional(args: Any) -> tuple[Any, ...]:
    return tuple(args) if isinstance(args, (tuple, list)) else (args,)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep the first of the tensors that lie on the same memory."""
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        first.setdefault(_memory(tensor), name)
    return {name: tensors[name] for name in first.values()}


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """Return what makes two tensors one: the memory they lie on, or the object itself where it has none."""
    tensor = getattr(tensor, "_local_tensor", tensor)  # a sharded tensor has no memory of its own
    if tensor.layout is not torch.strided or tensor.numel() == 0 or tensor.untyped_storage().data_ptr() == 0:
        return (id(tensor),)
    start = tensor.untyped_storage().data_ptr()
    return (str(tensor.device), start, tensor.storage_offset(), tensor.numel(), tensor.dtype)


def _check_dense(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            raise ValueError(f"`tensors` must be dense, got {tensor.layout} for {name!r}. Give values and indices.")
        if tensor.is_meta:
            raise ValueError(f"`tensors` must hold data, got a meta tensor for {name!r}. Materialise it first.")


def _writable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give every tensor what safetensors asks for: real, contiguous, and no memory shared with another."""
    taken: set[tuple[torch.device, int]] = set()
    result = {}
    for name, tensor in tensors.items():
        value = tensor.detach().resolve_conj().resolve_neg()
        value = torch.view_as_real(value) if value.is_complex() else value
        storage = (value.device, value.untyped_storage().data_ptr())
        shared = storage in taken
        result[name] = value.clone(memory_format=torch.contiguous_format) if shared else value.contiguous()
        taken.add(storage)
    return result


def _compressed_bytes(path: Path) -> int:
    """Count the bytes of a file after zlib level 6, a chunk at a time."""
    packer, size = zlib.compressobj(6), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size += len(packer.compress(chunk))
    return size + len(packer.flush())
