"""Which sub-modules run alike: their steps in the traced graphs, written so that blocks that differ in names only agree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import fx

from lightning_prune._dependency.trace import Graph, Step

Print = tuple[str, ...]


class Fingerprints:
    """What each sub-module does in eval and in train mode, read off the graphs of the whole module once.

    Args:
        graphs: traced calls of the module, in eval and train mode.
        paths: sub-modules to describe; none of them inside another.
    """

    def __init__(self, graphs: Sequence[Graph], paths: Iterable[str]) -> None:
        self._prints: dict[tuple[str, bool], list[str]] = {(path, mode): [] for path in paths for mode in (False, True)}
        self._paths = [path for path, training in self._prints if not training]
        for graph in graphs:
            self._read(graph)

    def of(self, path: str, training: bool) -> Print:
        """Return the steps of a sub-module in one mode, as text."""
        return tuple(self._prints[path, training])

    def same_in_both_modes(self, path: str) -> bool:
        """Whether a sub-module does in train mode exactly what it does in eval mode."""
        return bool(self.of(path, False)) and self.of(path, False) == self.of(path, True)

    def _read(self, graph: Graph) -> None:
        sources = {node: name for node, name, _, _ in graph.inputs if name is not None}
        writers = {path: _Writer(path, sources) for path in self._paths}
        for step in _steps(graph):
            path = self._enclosing(step.path)
            if path is not None:
                self._prints[path, graph.training].append(writers[path].line(step))

    def _enclosing(self, inner: str) -> str | None:
        parts = inner.split(".")
        return next((p for end in range(1, len(parts) + 1) if (p := ".".join(parts[:end])) in set(self._paths)), None)


class _Writer:
    """Writes steps with values numbered in the order in which they appear."""

    def __init__(self, path: str, sources: dict[fx.Node, str]) -> None:
        self.dot, self.sources = f"{path}.", sources
        self.numbers: dict[fx.Node, int] = {}

    def line(self, step: Step) -> str:
        kwargs = sorted(step.kwargs.items())
        text = f"{step.target} {self._text(_settled(step))} {self._text(kwargs)} -> {step.spec}"
        return f"{text} {self._text(step.node)}"

    def _text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            name = self.sources.get(value, "")
            if name.startswith(self.dot):
                return f"%{name[len(self.dot) :]}"
            return f"%{self.numbers.setdefault(value, len(self.numbers))}"
        if isinstance(value, (list, tuple)):
            return f"({', '.join(self._text(item) for item in value)})"
        return repr(value)


def _settled(step: Step) -> tuple[Any, ...]:
    """The arguments; dropout at rate 0 is the same in both modes."""
    if step.op == "dropout" and len(step.args) == 3 and step.args[1] == 0:
        return (*step.args[:2], False)
    return step.args


def _steps(graph: Graph) -> Iterator[Step]:
    for step in graph.steps:
        yield step
        if step.inner is not None:
            yield from _steps(step.inner)
