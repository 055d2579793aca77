"""Walk traced graphs: every operator merges or freezes cells by its rule; what no rule covers is frozen whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_prune._dependency.cells import Cell, Cells
from lightning_prune._dependency.labels import Label, LabelledTensor, Slab, TensorSpec, ZeroSet, labelled
from lightning_prune._dependency.trace import Graph, Step

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of operators, by base name ("linear", "my_kernel").

    The function is called as `function(walk, *args, **kwargs)` with the operator's own arguments, tensors as
    `LabelledTensor`. It returns a `LabelledTensor` per output tensor, of exactly the traced shape.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def words(text: str) -> tuple[str, ...]:
    """Return the names in a text, separated by white space."""
    return tuple(text.split())


@dataclass
class Decision:
    """A choice between unit axes at a reshape.

    Attributes:
        key: (graph, step, block) at which it was taken.
        kind: (operator, block, output shape): decisions of one kind are tried together.
        options: number of alternatives.
        chosen: the one taken.
        cells: what the choice labels; all frozen means that another choice may do better.
    """

    key: tuple[Any, ...]
    kind: tuple[Any, ...]
    options: int
    chosen: int
    cells: Cell | None = None


class Walk:
    """One analysis of all graphs of a module under given choices.

    Attributes:
        cells: classes of positions.
        tensors: parameters and buffers by first name.
        aliases: every name of a parameter or buffer -> the first one seen.
        consumers: (label, zero-set) per contraction: zeroing these slabs is what removal means.
        producers: (label, zero-set) of the free dims of weights.
        decisions: choices met.
        unknown: operators without a rule that froze something, with counts.
        freezers: operators that froze parameter dims, with counts.
        faults: rules that raised or gave a wrong shape, in words.
        values: per graph, the labelled output of every step by node.
    """

    def __init__(
        self,
        graphs: Sequence[Graph],
        module: nn.Module,
        choices: Mapping[Any, int],
        pinned: Iterable[str] = (),
    ) -> None:
        self.cells = Cells()
        self.choices = choices
        self.tensors: dict[str, LabelledTensor] = {}
        self.aliases: dict[str, str] = {}
        self.parameters: set[str] = set()
        self.consumers: list[tuple[Cell, frozenset[Slab]]] = []
        self.producers: list[tuple[Cell, frozenset[Slab]]] = []
        self.decisions: list[Decision] = []
        self.unknown: Counter[str] = Counter()
        self.freezers: Counter[str] = Counter()
        self.faults: list[str] = []
        self.values: list[dict[fx.Node, Any]] = []
        self._held = tensors_by_name(module)
        self._first: dict[int, str] = {}
        for name, tensor in self._held.items():
            self._first.setdefault(id(tensor), name)
        for index, graph in enumerate(graphs):
            self._graph_index = index
            self.values.append({})
            self._walk_graph(graph)
        for name in pinned:
            if name in self.aliases:
                self.freeze_tensor(self.tensors[self.aliases[name]], "it was excluded by name")

    # what rules use

    @property
    def spec(self) -> Any:
        """The traced output of the current step: `TensorSpec`, or a list of them."""
        return self.step.spec

    @property
    def shape(self) -> tuple[int, ...]:
        """The traced shape of the (first) output of the current step."""
        spec = self.spec[0] if isinstance(self.spec, list) else self.spec
        return tuple(spec.shape)

    def freeze(self, label: Label, why: str = "") -> None:
        """Keep all positions of a dim, for a reason."""
        if label is None or not len(label):
            return
        if self.cells.freeze(label, why or f"{self.step.op} reads all positions of it together"):
            self.freezers[self.step.op] += 1

    def freeze_tensor(self, tensor: LabelledTensor, why: str = "") -> None:
        """Keep every dim of a tensor."""
        for label in tensor.labels:
            self.freeze(label, why)

    def unify(self, first: Label, second: Label) -> Label:
        """Make two dims of equal length go together; one that never changes freezes the other."""
        if first is None and second is None:
            return None
        if first is None or second is None or len(first) != len(second):
            for label in (first, second):
                self.freeze(label, f"{self.step.op} combines it with a dim that never changes")
            return None
        self.cells.union(first, second)
        return first

    def broadcast(self, tensors: Sequence[LabelledTensor], shape: Sequence[int]) -> list[Label]:
        """Unify dims from the right where they have full size; dims of size one impose nothing."""
        result: list[Label] = []
        for dim, size in enumerate(shape):
            found = []
            for tensor in tensors:
                own = dim - len(shape) + len(tensor)
                if own >= 0 and tensor.shape[own] == size and size > 1:
                    found.append(tensor.labels[own])
            label = found[0] if found else None
            for other in found[1:]:
                label = self.unify(label, other)
            if label is None:
                for other in found:
                    self.freeze(other, f"{self.step.op} combines it with a dim that never changes")
            result.append(label)
        return result

    def consume(self, label: Label, zeros: ZeroSet) -> None:
        """Record that zeroing `zeros` along `label` removes its positions from a sum."""
        if label is not None and zeros is not None:
            self.consumers.append((label, zeros))

    def produce(self, label: Label, zeros: ZeroSet) -> None:
        """Record that `label` is a free dim of a weight."""
        if label is not None and zeros is not None:
            self.producers.append((label, zeros))

    def fresh(self, spec: Any) -> Any:
        """Return outputs whose dims never change."""
        if isinstance(spec, TensorSpec):
            return LabelledTensor(spec.shape)
        return [self.fresh(item) for item in spec] if isinstance(spec, (list, tuple)) else spec

    def opaque(self, *inputs: Any) -> Any:
        """Freeze everything that is read and return outputs that never change: nothing is guessed."""
        touched = False
        for tensor in labelled(list(inputs)):
            for label in tensor.labels:
                if label is not None:
                    free = ~self.cells.is_frozen(label) & self.cells.is_real(label)
                    touched = touched or bool(free.any())
            self.freeze_tensor(tensor, f"the operator {self.step.op} has no rule")
        if touched:
            self.unknown[self.step.op] += 1
        return self.fresh(self.spec)

    def decide(self, block: int, what: str, cells: Sequence[Cell | None]) -> Decision:
        """Choose one of several unit axes; the search over analyses says which."""
        key = (self._graph_index, self.step.name, block, what)
        chosen = min(self.choices.get(key, 0), len(cells) - 1)
        kind = (self.step.op, block, what, tuple(self.shape))
        self.decisions.append(Decision(key, kind, len(cells), chosen, cells[chosen]))
        return self.decisions[-1]

    # the walk

    def _walk_graph(self, graph: Graph) -> None:
        values: dict[fx.Node, Any] = self.values[-1]
        for node, name, is_parameter, spec in graph.inputs:
            values[node] = self._input(name, is_parameter, spec)
        outputs = self._run(graph, values)
        for output, fixed in zip(outputs, graph.fixed, strict=False):
            if fixed:
                for tensor in labelled([output]):
                    self.freeze_tensor(tensor, "it is an output of the module")

    def _input(self, name: str | None, is_parameter: bool, spec: Any) -> Any:
        if not isinstance(spec, TensorSpec):
            return spec
        held = None if name is None else self._held.get(name)
        if name is None or held is None or tuple(held.shape) != spec.shape:
            return LabelledTensor(spec.shape)
        first = self._first[id(held)]
        self.aliases[name] = first
        if first not in self.tensors:
            labels = [self.cells.new(size, real=is_parameter) for size in spec.shape]
            zeros = [frozenset({(first, dim)}) if is_parameter else None for dim in range(len(spec.shape))]
            self.tensors[first] = LabelledTensor(spec.shape, labels, zeros)
            if is_parameter:
                self.parameters.add(first)
        return self.tensors[first]

    def _run(self, graph: Graph, values: dict[fx.Node, Any]) -> list[Any]:
        for node, constant in graph.constants.items():
            is_tensor = isinstance(constant, Tensor)
            values[node] = LabelledTensor(constant.shape) if is_tensor else constant
        for step in graph.steps:
            self.step = step
            args = tuple(_resolve(value, values) for value in step.args)
            kwargs = {name: _resolve(value, values) for name, value in step.kwargs.items()}
            values[step.node] = self._apply(step, args, kwargs, values)
        return [_resolve(output, values) for output in graph.outputs]

    def _apply(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any], values: dict[fx.Node, Any]) -> Any:
        if step.op == "getitem" and not isinstance(args[0], LabelledTensor):
            return args[0][args[1]] if isinstance(args[0], (list, tuple)) else self.fresh(step.spec)
        if step.inner is not None:
            return self._wrapped(step.inner, args, values)
        if not _holds_tensor(step.spec) and not any(True for _ in labelled([args, kwargs])):
            return step.spec
        function = _rule_of(step)
        if function is None:
            return self.opaque(args, kwargs)
        try:
            result = function(self, *args, **kwargs)
        except Exception as error:  # a rule that fails must never end the analysis
            self.faults.append(f"{step.op}: {type(error).__name__}: {error}")
            return self.opaque(args, kwargs)
        if not _fits(step.spec, result):
            self.faults.append(f"{step.op}: the rule gave another shape than {step.spec}")
            return self.opaque(args, kwargs, result)
        return result

    def _wrapped(self, inner: Graph, args: tuple[Any, ...], values: dict[fx.Node, Any]) -> list[Any]:
        place = next(index for index, value in enumerate(args) if isinstance(value, fx.GraphModule))
        outer = self.step
        for (node, _, _, _), value in zip(inner.inputs, args[place + 1 :], strict=False):
            values[node] = value
        result = self._run(inner, values)
        self.step = outer
        return result


def _rule_of(step: Step) -> Rule | None:
    if step.op in RULES:
        return RULES[step.op]
    if isinstance(step.target, torch._ops.OpOverload) and torch.Tag.pointwise in step.target.tags:
        return RULES["pointwise"]
    return None


def _resolve(value: Any, values: Mapping[fx.Node, Any]) -> Any:
    if isinstance(value, fx.Node):
        return values[value]
    if isinstance(value, (list, tuple)):
        return [_resolve(item, values) for item in value]
    if isinstance(value, dict):
        return {key: _resolve(item, values) for key, item in value.items()}
    return value


def _holds_tensor(spec: Any) -> bool:
    return isinstance(spec, TensorSpec) or (isinstance(spec, list) and any(_holds_tensor(item) for item in spec))


def _fits(spec: Any, result: Any) -> bool:
    """Whether a rule reproduced the traced shapes, with labels as long as their dims."""
    if isinstance(spec, list):
        return isinstance(result, (list, tuple)) and len(result) == len(spec) and all(map(_fits, spec, result))
    if not isinstance(spec, TensorSpec):
        return True
    if not isinstance(result, LabelledTensor) or result.shape != spec.shape:
        return False
    return all(label is None or len(label) == size for label, size in zip(result.labels, result.shape, strict=True))


def tensors_by_name(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters, then buffers, under every name they have."""
    held: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    held.update(module.named_buffers(remove_duplicate=False))
    return held
