"""Which channels go together: units of any `nn.Module` that may be removed, and for the rest a reason.

The module is exported to graphs of elementary operators. Each position of each dim of each tensor is a cell; every
operator merges cells that can only leave together, or freezes those that cannot leave. A class of cells that stays
free and is read by a weight is a unit (a channel, a head, a hidden unit). Removing units S from every tensor equals
the full module in which the weights that read S are zero:

    shrunk(x) = module with consumers[S] = 0 (x)

An unknown operator freezes what it touches; nothing is guessed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, overload

from torch import nn

from lightning_prune._dependency.calls import Call, calls_of
from lightning_prune._dependency.groups import ChannelGroup, build_groups, frozen_dims
from lightning_prune._dependency.labels import LabelledTensor, Slab
from lightning_prune._dependency.search import analyse
from lightning_prune._dependency.trace import Graph, trace
from lightning_prune._dependency.walk import Walk, rule
from lightning_prune.checks import check_positive
from lightning_prune.targets import aliases, canonical_name, check_patterns

__all__ = ["ChannelGroup", "ChannelGroups", "DependencyReport", "LabelledTensor", "channel_groups", "rule"]


@dataclass
class DependencyReport:
    """What the analysis found beside the groups.

    Attributes:
        frozen: (parameter, dim) -> why (some of) its positions may not be removed.
        unknown: operators without a rule that froze something -> how often.
        freezers: operators that froze parameter dims -> how often.
        unread: trainable parameters that no graph reads; they stay as they are.
        faults: rules that failed and were treated as unknown, in words.
        origins: how each call was traced: "export", "draft_export" or "make_fx", in eval and train mode.
        notes: sentences about what was not done and why.
    """

    frozen: dict[Slab, str] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)
    freezers: dict[str, int] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class Analysis:
    """Everything later stages need: how the module was run, its graphs, the walk over them, its parameters' shapes."""

    calls: list[Call]
    graphs: list[Graph]
    walk: Walk
    sizes: dict[str, tuple[int, ...]]


class ChannelGroups(Sequence[ChannelGroup]):
    """The groups of a module, in the order of its graph, with a report.

    Attributes:
        report: reasons for all that may not be removed.
        analysis: the traced graphs and their labels, for costs and shrinking.
    """

    def __init__(self, groups: Sequence[ChannelGroup], report: DependencyReport, analysis: Analysis) -> None:
        self._groups = tuple(groups)
        self.report = report
        self.analysis = analysis

    @overload
    def __getitem__(self, index: int) -> ChannelGroup: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ChannelGroup]: ...
    def __getitem__(self, index: int | slice) -> ChannelGroup | Sequence[ChannelGroup]:
        return self._groups[index]

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self._groups)

    def named(self, name: str) -> ChannelGroup:
        """Return the group of that name.

        Raises:
            ValueError: there is none.
        """
        for group in self._groups:
            if group.name == name:
                return group
        names = ", ".join(group.name for group in self._groups[:20]) or "none"
        raise ValueError(f"`name` must be one of the groups ({names}), got {name!r}.")


def channel_groups(
    module: nn.Module,
    example_input: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    extra_inputs: Sequence[Any] = (),
    exclude: Sequence[str] | str = (),
    time_limit: float = 20.0,
    train_mode: bool = True,
) -> ChannelGroups:
    """Find the units of a module that may be removed together.

    The module is traced in eval and in train mode on copies; it is not changed. With a LightningModule, `example_input`
    may be a batch of its own loader: its steps run on a copy, and what they call is traced.

    Args:
        module: any module whose parameters have shapes.
        example_input: a tensor, a tuple of arguments, a dict of named arguments, or a LightningModule's batch.
        example_kwargs: further named arguments of forward.
        extra_inputs: further examples (other code paths); constraints of all examples add up.
        exclude: names or patterns of parameters or modules none of whose dims may change.
        time_limit: seconds of this thread's processor time after which no further choice of unit axes is tried, > 0.
        train_mode: trace train mode too; without it a module that is only ever run in eval mode may offer more.
    Returns:
        The groups, possibly none, with a report of what may not be removed and why.
    Raises:
        ValueError: the module cannot be copied or traced, or does not accept the example; nothing was changed.
    """
    check_positive("time_limit", time_limit)
    _check_module(module)
    calls = calls_of(module, example_input, example_kwargs)
    for extra in extra_inputs:
        calls += calls_of(module, extra)
    graphs, notes = _trace_all(module, calls, train_mode)
    pinned = _excluded(module, check_patterns("exclude", exclude) or ())
    walk = analyse(graphs, module, pinned, time_limit)
    groups = build_groups(walk)
    unread = _unread(module, graphs)
    notes += _fallbacks(graphs)
    if unread and any(graph.origin != "export" for graph in graphs):
        notes.append(
            "Only one recorded path could be traced, and it does not read every trainable parameter "
            f"({', '.join(unread[:5])}): another path may exist, so no group is offered."
        )
        groups = []
    report = DependencyReport(
        frozen_dims(walk, groups), dict(walk.unknown.most_common()), dict(walk.freezers.most_common()), unread,
        tuple(dict.fromkeys(walk.faults)),
        tuple(f"{graph.origin} ({'train' if graph.training else 'eval'})" for graph in graphs), tuple(notes),
    )  # fmt: skip
    sizes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
    return ChannelGroups(groups, report, Analysis(calls, graphs, walk, sizes))


def _check_module(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise ValueError(f"`module` must be a torch.nn.Module, got {type(module).__name__}.")
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"`module` must have shapes, got the lazy parameter {name!r}. Run one batch first.")


def _trace_all(module: nn.Module, calls: Sequence[Call], train_mode: bool) -> tuple[list[Graph], list[str]]:
    """Trace every call in eval and train mode; a module that cannot run in train mode is analysed in eval mode only."""
    graphs, notes = [], []
    for call in calls:
        graphs.append(trace(module, call, training=False))
        if not train_mode:
            continue
        try:
            graphs.append(trace(module, call, training=True))
        except ValueError as error:
            notes.append(f"Train mode was not analysed: {error}")
    for note in notes:
        warnings.warn(note, stacklevel=3)
    return graphs, notes


def _fallbacks(graphs: Sequence[Graph]) -> list[str]:
    """Say which recorder took over where torch.export failed, and why it failed."""
    found = {graph.origin: graph.reason for graph in graphs if graph.origin != "export"}
    return [f"The graph was recorded by {origin}, which sees one path only ({why})." for origin, why in found.items()]


def _excluded(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    names = aliases(module)
    found = [name for name in names if any(_matches(pattern, name) for pattern in patterns)]
    for pattern in patterns:
        if not any(_matches(pattern, name) for name in names):
            raise ValueError(
                f"`exclude` pattern {pattern!r} matches no parameter or module. "
                f"Parameters: {', '.join(list(names)[:20])}."
            )
    return found


def _matches(pattern: str, name: str) -> bool:
    """Whether a shell pattern matches a parameter or a module above it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _unread(module: nn.Module, graphs: Sequence[Graph]) -> tuple[str, ...]:
    first = aliases(module)
    read = {first.get(canonical_name(name)) for graph in graphs for name in graph.read()}
    trainable = {canonical_name(name) for name, p in module.named_parameters() if p.requires_grad}
    return tuple(sorted(trainable - read))
