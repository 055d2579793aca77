"""The hybrid route: a sub-module whose code cannot follow a cut runs as its own shrunk graph.

Typically the code reshapes by the width of its input. The sub-module is exported alone with a free batch size, analysed,
and the constants of its graph are rewritten. Its parameters stay where they are, under their names.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from lightning_prune._dependency.calls import Call, copied, copy_of
from lightning_prune._dependency.search import analyse
from lightning_prune._dependency.trace import quiet, read_program
from lightning_prune._dependency.walk import Walk, tensors_by_name
from lightning_prune._shrink_modules import dropout_rates, refresh
from lightning_prune._shrink_program import Rewriter

# {"input": described call, "kept": {tensor: {dim: positions}}, "share": name of the graph, blocks that run alike have
# one; "one": whether eval and train mode have one; "free": "all" sizes of the inputs, or "batch"}
Recipe = dict[str, Any]
Graphs = dict[tuple[Any, ...], Any]  # made before, by what they depend on
_FREE = object()  # an input of which a graph takes nothing for granted
_DTYPES = {str(d): d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
                               torch.bool, torch.uint8)}  # fmt: skip


class GraphModule(nn.Module):
    """Runs the exported graphs of a sub-module on the parameters it takes over; made by `install`."""

    _graphs: dict[bool, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the current mode."""
        graph, names, fixed, spec, out_spec = self._graphs[self.training]
        flat, found = pytree.tree_flatten((args, kwargs))
        if found != spec:
            raise ValueError(
                f"the inputs of a shrunk graph must have the structure it was traced with: {spec}, got {found}."
            )
        for traced, value in zip(fixed, flat, strict=True):
            _check_fixed(traced, value)
        held, given = tensors_by_name(self), iter(flat)
        values = [next(given) if name is None else held[name] for name in names]
        return pytree.tree_unflatten(list(graph(*values)), out_spec)


def _check_fixed(traced: Any, value: Any) -> None:
    """Refuse what the graph holds as a constant: sizes that are not free, and arguments that are no tensors."""
    if not isinstance(traced, tuple):
        same = traced is _FREE or (type(value) is type(traced) and value == traced)
    else:
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        same = len(shape) == len(traced) and all(a in (None, b) for a, b in zip(traced, shape, strict=True))
    if not same:
        shown = [size or "any" for size in traced] if isinstance(traced, tuple) else traced
        got = list(value.shape) if isinstance(value, Tensor) else value
        raise ValueError(
            f"the inputs of a shrunk graph must have the sizes it was traced with, {shown}, got {got}. "
            "Shrink with an example of the sizes that are used."
        )


def describe_call(call: Call) -> Any:
    """Return the call as plain data: shapes and dtypes for tensors.

    Raises:
        ValueError: an argument is neither a tensor nor plain.
    """
    return [_describe(list(call.args)), _describe(call.kwargs)]


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": [str(value.dtype), list(value.shape)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_describe(item) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _describe(item) for key, item in value.items()}}
    raise ValueError(f"an argument of type {type(value).__name__} cannot be stored")


def with_batch_of_two(described: Any) -> Any:
    """Return a described call with a first dim of 2 where it is 1."""
    if isinstance(described, list):
        return [with_batch_of_two(item) for item in described]
    (kind, content), *_ = described.items()
    if kind == "tensor":
        dtype, shape = content
        return {kind: [dtype, [2, *shape[1:]] if shape[:1] == [1] else shape]}
    if kind == "dict":
        return {kind: {key: with_batch_of_two(item) for key, item in content.items()}}
    return {kind: with_batch_of_two(content)} if kind in ("list", "tuple") else described


def _rebuild(described: Any, like: Tensor) -> Any:
    kind, content = next(iter(described.items()))
    if kind == "tensor":
        dtype = _DTYPES[content[0]]
        dtype = like.dtype if dtype.is_floating_point else dtype
        return torch.zeros(content[1], dtype=dtype, device=like.device)
    if kind == "dict":
        return {key: _rebuild(item, like) for key, item in content.items()}
    if kind in ("list", "tuple"):
        items = [_rebuild(item, like) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content


def install(module: nn.Module, path: str, recipe: Recipe, graphs: Graphs) -> None:
    """Replace the sub-module at `path` by its own shrunk graph.

    Args:
        module: the module that holds it.
        path: where it is; "" is the module itself, which then keeps its object and gets a class of its own.
        recipe: how it is called and which positions of its tensors are kept.
        graphs: graphs made before, used again for modules alike; those made now are added.
    Raises:
        ValueError: its graph does not have the same units, or it cannot be exported.
    """
    inner = module.get_submodule(path)
    made = shrunk_graphs(inner, recipe, graphs)
    _cut(inner, recipe["kept"])
    if not path:
        _feed(module, made)
        kind: Any = type(module)
        module.__class__ = _running(kind)
        return
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, _backed(inner, made))


def shrunk_graphs(inner: nn.Module, recipe: Recipe, graphs: Graphs) -> dict[bool, Any]:
    """Return the shrunk graphs of eval and train mode: known ones, those of another precision, or new ones."""
    like = next(inner.parameters())
    made: dict[bool, Any] = {}
    for training in (False, True):
        if training and recipe["one"]:
            made[True] = made[False]
            continue
        key = (like.dtype, recipe["share"], training, training and next(dropout_rates(inner), None) is not None)
        twin = next((other for other in graphs if other[1:] == key[1:]), None)
        if key not in graphs and twin is not None:
            graphs[key] = _in_precision(graphs[twin], twin[0], like.dtype)
        elif key not in graphs:
            args, kwargs = (_rebuild(part, like) for part in recipe["input"])
            graphs[key] = _shrunk_graph(inner, Call("", tuple(args), kwargs), recipe, training)
        made[training] = graphs[key]
    return made


def _in_precision(made: tuple[Any, ...], old: torch.dtype, new: torch.dtype) -> tuple[Any, ...]:
    """A graph whose tensors of one precision get another."""
    graph, *rest, constants = made
    graph = copy.deepcopy(graph)
    for node in graph.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(lambda v: new if v is old else v, (node.args, dict(node.kwargs)))
    graph.recompile()
    cast = {name: tensor.to(new) if tensor.dtype == old else tensor for name, tensor in constants.items()}
    return (graph, *rest, cast)


def _backed(inner: nn.Module, graphs: dict[bool, Any]) -> GraphModule:
    """Give the tensors and children of a module to one that runs graphs."""
    backed = GraphModule()
    for store in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        backed.__dict__[store] = inner.__dict__[store]
    _feed(backed, graphs)
    backed.training = inner.training
    return backed


def _feed(module: nn.Module, graphs: dict[bool, Any]) -> None:
    """Give a module graphs and the constants they read."""
    for training, (*_, constants) in graphs.items():
        for name, constant in constants.items():
            module.register_buffer(f"{name}_{int(training)}", constant, persistent=False)
    module.__dict__["_graphs"] = {training: graph[:-1] for training, graph in graphs.items()}


@functools.cache
def _running(kind: Any) -> Any:
    """A subclass whose forward runs graphs; everything else (the steps of a LightningModule) is inherited."""
    return kind if issubclass(kind, GraphModule) else type(f"Shrunk{kind.__name__}", (GraphModule, kind), {})


def _shrunk_graph(inner: nn.Module, call: Call, recipe: Recipe, training: bool) -> tuple[Any, ...]:
    program = _export(inner, call, training, recipe["free"])
    graph = read_program(program)
    walk = analyse([graph], inner)
    removed = _roots(walk, recipe["kept"])
    Rewriter(walk, graph, walk.values[0], removed).run()
    return _runnable(program, training)


def _export(inner: nn.Module, call: Call, training: bool, free: str) -> Any:
    with quiet():
        args, kwargs = copied((call.args, call.kwargs))
        twin = copy_of(inner).train(training)
        bound = inspect.signature(twin.forward).bind(*args, **kwargs)
        dynamic = pytree.tree_map(functools.partial(_free_sizes, free=free), dict(bound.arguments))
        return torch.export.export(twin, args, kwargs, dynamic_shapes=dynamic, strict=False)


def _free_sizes(value: Any, free: str) -> Any:
    if not isinstance(value, Tensor):
        return None
    return tuple(Dim.AUTO if free == "all" or dim == 0 else Dim.STATIC for dim in range(value.dim()))


def _roots(walk: Walk, kept: Mapping[str, Any]) -> list[int]:
    """Return the classes that hold exactly the positions to remove; ValueError if there are none such."""
    roots: set[int] = set()
    gone: dict[tuple[str, int], np.ndarray] = {}
    for name, dims in kept.items():
        for dim, positions in dims.items():
            tensor = walk.tensors.get(name)
            label = None if tensor is None else tensor.labels[int(dim)]
            if label is None:
                raise ValueError(f"{name!r} has no free positions in the sub-module's own graph")
            gone[name, int(dim)] = np.setdiff1d(np.arange(len(label)), positions)
            roots.update(walk.cells.find(label[gone[name, int(dim)]]).tolist())
    removed = np.asarray(sorted(roots))
    if walk.cells.is_frozen(removed).any():
        raise ValueError("the units are frozen in the sub-module's own graph")
    for name, tensor in walk.tensors.items():
        for dim, label in enumerate(tensor.labels):
            if label is not None:
                found = np.nonzero(np.isin(walk.cells.find(label), removed))[0]
                if not np.array_equal(found, gone.get((name, dim), found[:0])):
                    raise ValueError("the sub-module's own graph has other units")
    return sorted(roots)


def _runnable(program: Any, training: bool) -> tuple[Any, ...]:
    """The graph with what `GraphModule.forward` needs to feed it."""
    names: list[str | None] = []
    fixed: list[Any] = []
    constants: dict[str, Tensor] = {}
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    for spec in program.graph_signature.input_specs:
        own: str | None = None
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            own = spec.target
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            key = f"_constant_{len(constants)}"
            constants[key], own = program.constants[spec.target], f"{key}_{int(training)}"
        elif spec.kind != InputKind.USER_INPUT:
            raise ValueError(f"an input of kind {spec.kind.name} cannot be fed")
        names.append(own)
        if own is None:
            fixed.append(_fixed_part(spec.arg, values.get(spec.arg.name)))
    if any(spec.kind != OutputKind.USER_OUTPUT for spec in program.graph_signature.output_specs):
        raise ValueError("the sub-module updates buffers outside its graph")
    graph_module = program.graph_module
    for node in list(graph_module.graph.nodes):
        if _is_guard(node):
            graph_module.graph.erase_node(node)
    graph_module.recompile()
    return graph_module, names, fixed, program.call_spec.in_spec, program.call_spec.out_spec, constants


def _fixed_part(argument: Any, value: Any) -> Any:
    """What a graph takes for granted of an input: sizes (None is free), or the value of one that is no tensor."""
    if isinstance(value, Tensor):
        return tuple(_fixed_size(size) for size in value.shape)
    return argument.value if hasattr(argument, "value") else _FREE


def _fixed_size(size: Any) -> int | None:
    """The number that a size is, or was found to be while tracing; None for a free one."""
    if isinstance(size, int):
        return size
    expression = size.node.shape_env.replace(size.node.expr)
    return int(expression) if expression.is_number else None


def _is_guard(node: fx.Node) -> bool:
    """Assertions on sizes of the traced example; the rewritten sizes are others."""
    return node.op == "call_function" and not node.users and "assert" in str(node.target)


@torch.no_grad()
def _cut(inner: nn.Module, kept: Mapping[str, Any]) -> None:
    tensors = tensors_by_name(inner)
    before: dict[nn.Module, dict[str, tuple[int, ...]]] = {}
    owners = {id(t): (child, n) for child in inner.modules() for n, t in child.named_parameters(recurse=False)}
    for name, dims in kept.items():
        tensor = tensors[name]
        if id(tensor) in owners:
            child, own = owners[id(tensor)]
            before.setdefault(child, {})[own] = tuple(tensor.shape)
        tensor.data = narrowed(tensor.data, dims)
        tensor.grad = None
    for child, shapes in before.items():
        refresh(child, shapes)


def narrowed(tensor: Tensor, dims: Mapping[Any, Sequence[int]]) -> Tensor:
    """Return the kept positions of a tensor along some dims."""
    for dim, positions in dims.items():
        tensor = tensor.index_select(int(dim), torch.as_tensor(np.asarray(positions, np.int64), device=tensor.device))
    return tensor.clone(memory_format=torch.preserve_format)
