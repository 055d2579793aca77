"""Graphs of a module, by torch.export in eval and in train mode, as lists of steps that are cheap to walk again."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import operator
import types
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from lightning_prune._dependency.calls import Call, copied, copy_of, tensors_in
from lightning_prune._dependency.cells import MAX_CELLS
from lightning_prune._dependency.labels import TensorSpec
from lightning_prune.sandbox import isolated_rng

_WRAPPER = "wrap"  # autocast, no_grad: the inner graph is walked as if written in place


@dataclass
class Step:
    """One call in a graph.

    Attributes:
        name: the node's name, unique in its graph.
        op: operator without overload and trailing underscore, such as "linear".
        target: what the node calls.
        args, kwargs: its arguments; other nodes stand for their values.
        spec: `TensorSpec` per output tensor, in the shape of the output.
        path: module whose code ran it, "" for the root or when unknown.
        parents: paths of the two innermost modules running it.
        inner: the graph inside a wrapper.
    """

    node: fx.Node
    name: str
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    spec: Any
    path: str
    parents: tuple[str, ...]
    inner: Graph | None = None


@dataclass
class Graph:
    """A traced call of a module, ready to be walked.

    Attributes:
        inputs: (node, parameter or buffer name or None, whether it is a parameter, spec) per placeholder.
        steps: calls in order.
        constants: tensors and modules held by the graph itself, by node.
        outputs: nodes of the output, flat.
        fixed: per output whether the user sees it (buffer updates are not seen).
        source: the call that was traced.
        origin: "export", "draft_export" or "make_fx".
        training: whether it was traced in train mode.
        program: the ExportedProgram, or the GraphModule of make_fx.
        reason: why the ways before `origin` failed, in torch's words.
    """

    inputs: list[tuple[fx.Node, str | None, bool, Any]]
    steps: list[Step]
    constants: dict[fx.Node, Any]
    outputs: list[Any]
    fixed: list[bool]
    source: Call = field(default_factory=lambda: Call("", ()))
    origin: str = "export"
    training: bool = False
    program: Any = None
    reason: str = ""

    def read(self) -> set[str]:
        """Return names of parameters and buffers that some step reads."""
        return {name for node, name, _, _ in self.inputs if name is not None and node.users}


def trace(module: nn.Module, call: Call, training: bool) -> Graph:
    """Export one call of `module`; torch.export first, then two recorders of a single path.

    Raises:
        ValueError: every way failed; the text holds torch's reason for each.
    """
    reasons = []
    for origin, export in _WAYS:
        try:
            with quiet():
                program = export(copy_of(module.get_submodule(call.path)).train(training), call)
            graph = read_program(program, call.path)
        except Exception as error:  # any user code may fail in any way while traced
            reasons.append(f"{origin}: {type(error).__name__}: {_first_line(error)}")
            continue
        graph.source, graph.origin, graph.training, graph.program = call, origin, training, program
        graph.reason = "; ".join(reasons)
        return graph
    raise ValueError(
        f"`module` must be traceable, got {type(module).__name__}. " + "; ".join(reasons) + ". Nothing was changed."
    )


def read_program(program: Any, prefix: str = "") -> Graph:
    """Turn an exported program into a `Graph`; names of parameters get the path of the traced sub-module in front."""
    program.graph_module.graph.eliminate_dead_code()
    by_name = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    graph = _read(program.graph_module)
    dot = f"{prefix}." if prefix else ""
    for index, (node, _, _, spec) in enumerate(graph.inputs):
        kind, target = by_name[node.name].kind, by_name[node.name].target
        if kind in (InputKind.PARAMETER, InputKind.BUFFER):
            graph.inputs[index] = (node, dot + target, kind == InputKind.PARAMETER, spec)
    seen = (OutputKind.USER_OUTPUT, OutputKind.LOSS_OUTPUT)
    graph.fixed = [spec.kind in seen for spec in program.graph_signature.output_specs]
    for step in graph.steps:
        step.parents = tuple(f"{dot}{path}".rstrip(".") for path in step.parents)
        step.path = step.parents[-1] if step.parents else ""
    return graph


@contextlib.contextmanager
def quiet(tracing: bool = True) -> Iterator[None]:
    """Run without torch's warnings and prints, without the fused encoder, and leave every generator as it was.

    torch's causal-mask detector is a branch on data that only picks a kernel; while tracing it answers by its own
    argument. Outside it must answer truly: with a float32 mask the kernels differ in float64.
    """
    transformer = nn.modules.transformer
    detect, fused = transformer._detect_is_causal_mask, torch.backends.mha.get_fastpath_enabled()
    level = logging.root.manager.disable
    if tracing:
        transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    torch.backends.mha.set_fastpath_enabled(False)
    logging.disable(logging.CRITICAL)
    try:
        with isolated_rng(), warnings.catch_warnings(), _silent():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        torch.backends.mha.set_fastpath_enabled(fused)
        transformer._detect_is_causal_mask = detect


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """An export that fails prints the graph so far."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _export(module: nn.Module, call: Call) -> Any:
    return torch.export.export(module, copied(call.args), copied(call.kwargs), strict=False)


def _draft_export(module: nn.Module, call: Call) -> Any:
    with torch.no_grad(), _without_log_files():
        return torch.export.draft_export(module, copied(call.args), copied(call.kwargs), strict=False)


@contextlib.contextmanager
def _without_log_files() -> Iterator[None]:
    """draft_export leaves an open log file behind; close and remove it."""
    home: Any = importlib.import_module("torch.export._draft_export")
    original, made = getattr(home, "CaptureStructuredTrace", None), []
    if original is None:
        yield
        return

    class Recorded(original):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    home.CaptureStructuredTrace = Recorded
    try:
        yield
    finally:
        home.CaptureStructuredTrace = original
        for handler in made:
            stream = getattr(handler, "stream", None)
            path = getattr(handler, "_stream_path", None) or getattr(stream, "name", None)
            handler.close()
            if stream is not None:
                stream.close()
            if isinstance(path, str):  # a stream on a bare descriptor is named by its number
                Path(path).unlink(missing_ok=True)


def _make_fx(module: nn.Module, call: Call) -> Any:
    """Record real tensors: sizes and branches become constants of this input."""
    from torch.func import functional_call

    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    names, values = [*parameters, *buffers], [*parameters.values(), *buffers.values()]
    flat, structure = pytree.tree_flatten((call.args, call.kwargs))
    places = [index for index, item in enumerate(flat) if isinstance(item, Tensor)]

    def run(state: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
        items = list(flat)
        for place, tensor in zip(places, inputs, strict=True):
            items[place] = tensor
        args, kwargs = pytree.tree_unflatten(items, structure)
        return tensors_in(functional_call(module, dict(zip(names, state, strict=True)), args, kwargs))

    from torch.fx.experimental.proxy_tensor import make_fx

    tracer = make_fx(
        run, tracing_mode="real", pre_dispatch=True,
        _allow_non_fake_inputs=True, _error_on_data_dependent_ops=False,
    )  # fmt: skip
    with torch.no_grad():
        graph_module = tracer([value.detach() for value in values], [flat[place].clone() for place in places])
    return _as_program(graph_module, names, len(parameters))


def _as_program(graph_module: fx.GraphModule, names: Sequence[str], parameters: int) -> Any:
    """Give a recorded graph the signature of an exported program."""
    space = types.SimpleNamespace
    nodes = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    inputs = []
    for index, node in enumerate(nodes):
        known = InputKind.PARAMETER if index < parameters else InputKind.BUFFER
        kind = known if index < len(names) else InputKind.USER_INPUT
        target = names[index] if index < len(names) else None
        inputs.append(space(arg=space(name=node.name), kind=kind, target=target))
    output = next(node for node in graph_module.graph.nodes if node.op == "output")
    outputs = [space(kind=OutputKind.USER_OUTPUT) for _ in _flat(output.args[0])]
    signature = space(input_specs=inputs, output_specs=outputs)
    return space(graph_module=graph_module, graph=graph_module.graph, graph_signature=signature)


_WAYS: tuple[tuple[str, Callable[[nn.Module, Call], Any]], ...] = (
    ("export", _export), ("draft_export", _draft_export), ("make_fx", _make_fx),
)  # fmt: skip


def _read(graph_module: fx.GraphModule) -> Graph:
    graph = Graph([], [], {}, [], [])
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            graph.inputs.append((node, None, False, spec_of(node.meta.get("val"))))
        elif node.op == "get_attr":
            value: Any = graph_module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            graph.constants[node] = value
        elif node.op == "output":
            graph.outputs = _flat(node.args[0])
        else:
            graph.steps.append(_step(node, graph_module))
    return graph


def _step(node: fx.Node, owner: fx.GraphModule) -> Step:
    parents = _module_paths(node)
    step = Step(
        node, node.name, operator_name(node.target), node.target, node.args, dict(node.kwargs),
        spec_of(node.meta.get("val")), parents[-1] if parents else "", parents,
    )  # fmt: skip
    if isinstance(node.target, torch._ops.HigherOrderOperator) and _WRAPPER in node.target.name():
        inner = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
        modules = [getattr(owner, str(a.target)) for a in inner]
        modules = [module for module in modules if isinstance(module, fx.GraphModule)]
        if len(modules) == 1:
            modules[0].graph.eliminate_dead_code()
            step.inner = _read(modules[0])
    return step


def operator_name(target: Any) -> str:
    """Return an operator's name without overload and in-place underscore: aten.add_.Tensor is "add"."""
    if target is operator.getitem:
        return "getitem"
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", str(target))
    name = target._schema.name.split("::")[1]
    return name.strip("_") if name.startswith("__") else name.rstrip("_") or name


def spec_of(value: Any) -> Any:
    """Return the traced value with every tensor as a `TensorSpec`."""
    if isinstance(value, Tensor):
        return TensorSpec(tuple(size_of(size) for size in value.shape))
    if isinstance(value, (tuple, list)):
        return [spec_of(item) for item in value]
    return value


def size_of(size: Any) -> int:
    """Return a size as int: a symbol's hint, or a large number of its own when the size depends on data."""
    if isinstance(size, int):
        return size
    hint = size.node.hint if size.node.has_hint() else None
    return int(hint) if hint is not None else MAX_CELLS + zlib.crc32(str(size.node.expr).encode()) % 10**6


def _module_paths(node: fx.Node) -> tuple[str, ...]:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path).removeprefix("L['self']").lstrip(".") for path, _ in stack.values()]
    return tuple(paths[-2:])


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [item for entry in value for item in _flat(entry)]
    return [value]


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")[:300]
