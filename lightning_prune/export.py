"""Pruned modules for other places: safetensors, ONNX, torch.export programs, sparse linear layers where they are faster.

Every export is run once and compared with the module, and timed in turns with it: dense, masked, exported.
"""

from __future__ import annotations

import importlib
import inspect
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lightning_prune._dependency.calls import Call, calls_of, copied, copy_of, tensors_in
from lightning_prune._dependency.trace import quiet
from lightning_prune._shrink_probe import captured, difference, run
from lightning_prune.checks import check_positive
from lightning_prune.files import replacing
from lightning_prune.masks import MaskManager
from lightning_prune.measure import measure_milliseconds

__all__ = ["CsrLinear", "Export", "PackedLinear", "to_onnx", "to_program", "to_safetensors", "to_sparse"]

_TOLERANCE = 1e-3  # relative; other runtimes add in another order
_WINS = 1.05  # a sparse layer replaces a dense one when it is at least this many times faster


@dataclass
class Export:
    """What was exported.

    Attributes:
        kind: "safetensors", "onnx", "program" or "sparse".
        path: the file; None for "sparse".
        bytes: its size; None for "sparse".
        error: largest relative difference to the module's outputs; 0 where nothing was computed.
        milliseconds: timings under "dense", "masked" and "exported", as in the receipt.
        notes: sentences for the receipt.
    """

    kind: str
    path: str | None = None
    bytes: int | None = None
    error: float = 0.0
    milliseconds: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def to_safetensors(module: nn.Module, path: str | os.PathLike[str]) -> Export:
    """Write the state of a module to a safetensors file; tensors that share memory are written in full.

    Raises:
        ValueError: the module's state holds something else than tensors.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"`module` must hold tensors only, got {type(tensor).__name__} in {name!r}.")
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    return Export("safetensors", str(path), Path(path).stat().st_size)


def to_program(module: nn.Module, example_input: Any, path: str | os.PathLike[str], max_seconds: float = 2.0) -> Export:
    """Export to a `torch.export` program file with a free batch size where the module allows one.

    Args:
        module: any module; it is copied in eval mode.
        example_input: arguments of forward, as for `channel_groups`.
        path: the file, usually *.pt2; `torch.export.load(path).module()` runs it.
        max_seconds: time spent on measuring, > 0.
    Raises:
        ValueError: it cannot be exported, or gives other outputs; no file is written then.
    """
    check_positive("max_seconds", max_seconds)
    call = _one_call(module, example_input)
    try:
        with quiet():
            program = _exported(copy_of(module).eval(), call)
    except Exception as error:  # any user code may fail in any way while traced
        raise ValueError(
            f"`module` must be exportable, got {type(module).__name__}: {type(error).__name__}: {error}"
        ) from error
    runner = _Runner(program.module())
    export = _checked(Export("program", str(path)), module, runner, call, max_seconds)
    with replacing(path) as temporary, quiet():
        target = temporary.with_suffix(".pt2")
        torch.export.save(program, target)
        os.replace(target, temporary)
    export.bytes = Path(path).stat().st_size
    return export


def to_onnx(
    module: nn.Module,
    example_input: Any,
    path: str | os.PathLike[str],
    opset: int = 17,
    max_seconds: float = 2.0,
) -> Export:
    """Export to an ONNX file with a free batch size, and check it with onnxruntime against torch.

    Args:
        module: any module; it is copied in eval mode, on the CPU.
        example_input: arguments of forward, as for `channel_groups`.
        path: the file.
        opset: version of the operator set, >= 9.
        max_seconds: time spent on measuring, > 0.
    Raises:
        RuntimeError: onnx or onnxruntime is not installed.
        ValueError: it cannot be exported, or gives other outputs; no file is written then.
    """
    check_positive("max_seconds", max_seconds)
    runtime = _require("onnxruntime")
    _require("onnx")
    call = _one_call(module, example_input).map(Tensor.cpu)
    plain = copy_of(module).cpu().eval()
    with replacing(path) as temporary:
        try:
            _write_onnx(plain, call, temporary, opset)
        except Exception as error:  # the exporter raises many types
            raise ValueError(
                f"`module` must be exportable to ONNX, got {type(module).__name__}: {type(error).__name__}: {error}"
            ) from error
        session = runtime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        export = _checked(Export("onnx", str(path)), plain, _Session(session), call, max_seconds, module)
    export.bytes = Path(path).stat().st_size
    return export


def to_sparse(
    module: nn.Module, example_input: Any, min_sparsity: float = 0.5, max_seconds: float = 2.0
) -> tuple[nn.Module, Export]:
    """Return a copy in which sparse linear layers run in CSR or packed form wherever that is faster here and now.

    Args:
        module: any module; its zeros count.
        example_input: arguments of forward, as for `channel_groups`; the timing holds for its batch size.
        min_sparsity: layers below this sparsity stay dense untried, in [0, 1).
        max_seconds: time spent on measuring, > 0.
    Returns:
        The copy and what was decided for each layer, in words.
    """
    check_positive("max_seconds", max_seconds)
    call = _one_call(module, example_input)
    small, export = copy_of(module).eval(), Export("sparse")
    layers = {name: m for name, m in small.named_modules() if type(m) is nn.Linear and name}
    sparse = {n: m for n, m in layers.items() if float((m.weight == 0).float().mean()) >= min_sparsity}
    inputs = captured(small, list(sparse), [call]) if sparse else {}
    for name, layer in sparse.items():
        if name in inputs:
            chosen, sentence = _fastest(name, layer, inputs[name].args[0], max_seconds / len(sparse))
            export.notes.append(sentence)
            parent, _, own = name.rpartition(".")
            setattr(small.get_submodule(parent), own, chosen)
    if not sparse:
        export.notes.append(f"No linear layer has a sparsity of {min_sparsity} or more; all stay dense.")
    return small, _checked(export, module, small, call, max_seconds)


class CsrLinear(nn.Module):
    """A linear layer whose weight is a CSR matrix.

    Args:
        layer: the dense layer; its zeros are left out.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
            weight = layer.weight.detach().to_sparse_csr()
        self.register_buffer("rows", weight.crow_indices())
        self.register_buffer("columns", weight.col_indices())
        self.register_buffer("values", weight.values())
        self.bias = layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, inputs: Tensor) -> Tensor:
        """Return x W^T + b for inputs of shape (..., in_features)."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
            weight = torch.sparse_csr_tensor(
                self.rows,
                self.columns,
                self.values,
                (self.out_features, self.in_features),
                check_invariants=False,
            )
        product = (weight @ inputs.reshape(-1, self.in_features).T).T
        product = product if self.bias is None else product + self.bias
        return product.reshape(*inputs.shape[:-1], self.out_features)


class PackedLinear(nn.Module):
    """A linear layer without the inputs and outputs whose weights are all zero.

    Args:
        layer: the dense layer.
    """

    inputs: Tensor
    outputs: Tensor
    base: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        used = layer.weight.detach() != 0
        self.register_buffer("inputs", torch.nonzero(used.any(0)).ravel())
        self.register_buffer("outputs", torch.nonzero(used.any(1)).ravel())
        self.weight = nn.Parameter(layer.weight.detach()[self.outputs][:, self.inputs].clone())
        base = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach().clone()
        self.register_buffer("base", base)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return x W^T + b for inputs of shape (..., in_features)."""
        result = self.base.expand(*inputs.shape[:-1], -1).clone()
        result[..., self.outputs] += F.linear(inputs.index_select(-1, self.inputs), self.weight)
        return result


class _Runner(nn.Module):
    """Something callable as a module; an exported program refuses `eval()` itself."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__["function"] = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["function"](*args, **kwargs)


class _Session(nn.Module):
    """An onnxruntime session as a module."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.__dict__["session"] = session
        self.__dict__["names"] = [entry.name for entry in session.get_inputs()]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = tensors_in((args, kwargs))
        feed = {name: value.numpy() for name, value in zip(self.__dict__["names"], given, strict=True)}
        return [torch.from_numpy(value) for value in self.__dict__["session"].run(None, feed)]


def _one_call(module: nn.Module, example: Any) -> Call:
    """The call of forward itself; the steps of a LightningModule are not exported."""
    calls = [call for call in calls_of(module, example) if not call.path]
    if not calls:
        raise ValueError(
            "`example_input` must lead to a call of forward, got a batch whose step calls sub-modules only."
        )
    return calls[0]


def _exported(module: nn.Module, call: Call) -> Any:
    """With free sizes if the module allows any, else for the example's sizes."""
    args, kwargs = copied((call.args, call.kwargs))
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    free = pytree.tree_map(
        lambda v: (torch.export.Dim.AUTO,) + (None,) * (v.dim() - 1) if isinstance(v, Tensor) and v.dim() else None,
        dict(bound.arguments),
    )
    try:
        return torch.export.export(module, args, kwargs, dynamic_shapes=free, strict=False)
    except Exception:
        return torch.export.export(module, args, kwargs, strict=False)


def _write_onnx(module: nn.Module, call: Call, path: Path, opset: int) -> None:
    count = len(tensors_in((call.args, call.kwargs)))
    names = [f"input_{index}" for index in range(count)]
    axes = {name: {0: "batch"} for name, t in zip(names, tensors_in((call.args, call.kwargs)), strict=True) if t.dim()}
    with quiet(), torch.no_grad():
        torch.onnx.export(
            module, copied(call.args), str(path), kwargs=copied(call.kwargs), dynamo=False, opset_version=opset,
            input_names=names, dynamic_axes=axes,
        )  # fmt: skip


def _checked(
    export: Export,
    module: nn.Module,
    exported: nn.Module,
    call: Call,
    max_seconds: float,
    masked: nn.Module | None = None,
) -> Export:
    """Compare outputs and time all three in turns."""
    twin = copy_of(module).eval()
    expected = [t for t in run(twin, [call]) if t.is_floating_point()]
    found = [t for t in run(exported, [call]) if t.is_floating_point()]
    export.error = difference(expected, found)
    if not export.error <= _TOLERANCE:
        raise ValueError(f"the export differs from the module by {export.error:.1e}. Nothing was written.")
    modules = {"masked": twin, "exported": exported}
    if MaskManager.of(masked or module).masks:
        modules = {"dense": _without_zeros(masked or module), **modules}
    times = measure_milliseconds(modules, call.args, call.kwargs, repeats=20, max_seconds=max_seconds)
    export.milliseconds = {name: timing.to_dict() for name, timing in times.items()}
    return export


def _without_zeros(module: nn.Module) -> nn.Module:
    """A copy whose zeros hold numbers, to time what the module cost before it was pruned."""
    twin = copy_of(module).eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter[parameter == 0] = 1e-3
    return twin


def _fastest(name: str, layer: nn.Linear, inputs: Tensor, seconds: float) -> tuple[nn.Module, str]:
    """Time the dense layer, CSR and packed form in turns on the layer's own input."""
    forms: dict[str, nn.Module] = {"dense": layer, "CSR": CsrLinear(layer), "packed": PackedLinear(layer)}
    times = _medians(forms, inputs, seconds)
    best = min(forms, key=lambda form: times[form])
    words = ", ".join(f"{form} {1e3 * value:.3f} ms" for form, value in times.items())
    if best == "dense" or times["dense"] < _WINS * times[best]:
        return layer, f"{name} stays dense: {words}."
    return forms[best], f"{name} runs in {best} form: {words}."


@torch.no_grad()
def _medians(forms: Mapping[str, nn.Module], inputs: Tensor, seconds: float, rounds: int = 30) -> dict[str, float]:
    found: dict[str, list[float]] = {form: [] for form in forms}
    stop = time.perf_counter() + seconds
    for index in range(rounds):
        for form, module in forms.items():
            start = time.perf_counter()
            module(inputs)
            found[form].append(time.perf_counter() - start)
        if index >= 2 and time.perf_counter() > stop:
            break
    return {form: statistics.median(values[1:]) for form, values in found.items()}


def _require(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeError(f"ONNX export needs {name}. Install it with pip install 'lightning-prune[onnx]'.") from error
