"""Which groups can be cut, and with which attribute edits: trials on a probe, each compared with the mask.

Repeated blocks share one decision, and a block is tried alone, on the inputs it gets inside the module, so that the
search does not grow with the square of the depth.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_prune._dependency.calls import Call, copy_of
from lightning_prune._dependency.groups import ChannelGroup
from lightning_prune._shrink_edits import (
    Names,
    Reach,
    common_path,
    edits_for,
    new_lengths,
    pattern,
    signature,
)
from lightning_prune._shrink_plan import AttributeEdit, CutPlan, plan_for
from lightning_prune._shrink_probe import Probe, Removed, captured, difference, masked, run
from lightning_prune._shrink_strict import strict_fault
from lightning_prune.dependency import ChannelGroups

_TRIALS = 24  # combinations of edits tried for one kind of group
_ALL = None  # policy: every candidate edit
_NONE: Names = frozenset()
Policy = Names | None


@dataclass
class Outcome:
    """What a search found.

    Attributes:
        accepted: groups whose cut agrees with the mask, all together.
        edits: the attribute edits it needs.
        refused: group name -> why not.
        error: relative difference of the accepted cut.
        trials: comparisons made.
    """

    accepted: list[ChannelGroup]
    edits: list[AttributeEdit]
    refused: dict[str, str] = field(default_factory=dict)
    error: float = 0.0
    trials: int = 0


class Search:
    """Find the largest set of groups whose cut is verified on a probe.

    Args:
        groups: all groups of the module.
        wanted: those of them that lose units.
        removed: indices of removed units by group name.
        reach: where each of `groups` runs through.
        probe: the module to verify on.
        deadline: `time.thread_time()` after which no new trial starts.
    """

    def __init__(
        self,
        groups: ChannelGroups,
        wanted: Sequence[ChannelGroup],
        removed: Removed,
        reach: Sequence[Reach],
        probe: Probe,
        shapes: Mapping[str, tuple[int, ...]],
        deadline: float,
    ) -> None:
        self.graphs = groups.analysis.graphs
        self.walk, self.probe, self.removed, self.deadline = groups.analysis.walk, probe, removed, deadline
        self.shapes = shapes
        self.reach = {group.name: r for group, r in zip(groups, reach, strict=True)}
        self.kinds: dict[Any, list[ChannelGroup]] = defaultdict(list)
        for group in wanted:
            self.kinds[signature(group)].append(group)
        self.wanted = list(wanted)
        self.outcome = Outcome([], [])
        self._scopes = {group.name: self._scope(group) for group in wanted}
        self._inputs: dict[str, Call] | None = None
        self._references: dict[tuple[str, tuple[str, ...]], list[Tensor]] = {}
        self._policies_taken: dict[Any, Policy] = {}
        self._last = ""

    def run(self) -> Outcome:
        """Search; see `Outcome`."""
        for policy in (_NONE, _ALL):
            policies: dict[Any, Policy] = dict.fromkeys(self.kinds, policy)
            if self._try(self.wanted, policies, strict=True):
                if policy == _NONE:
                    return self._accept(self.wanted, policies)
                return self._finish(self.wanted, self._minimal(policies))
        policies = self._decide_kinds()
        candidates = [group for kind in policies for group in self.kinds[kind]]
        return self._finish(candidates, policies)

    def edits(self, groups: Sequence[ChannelGroup], policies: Mapping[Any, Policy]) -> list[AttributeEdit]:
        """Return the edits of these groups under their kinds' policies; lengths count all units they lose."""
        gone = self._gone(groups)
        found: dict[tuple[str, str], AttributeEdit] = {}
        for group in groups:
            policy = policies.get(signature(group), _NONE)
            if policy == _NONE:
                continue
            reach = self.reach[group.name]
            for key, edit in edits_for(
                self.probe.module, reach, new_lengths(self.walk, reach.labels, gone), policy
            ).items():
                found[key] = _both(found[key], edit) if key in found else edit
        return list(found.values())

    def plan(self, groups: Sequence[ChannelGroup], edits: Sequence[AttributeEdit]) -> CutPlan:
        """Return the plan that cuts these groups."""
        return plan_for(groups, {g.name: self.removed[g.name] for g in groups}, self.shapes, edits)

    def use(self, probe: Probe) -> None:
        """Go on with another probe of the same module."""
        self.probe, self._inputs = probe, None
        self._references.clear()

    def confirm(self, outcome: Outcome) -> bool:
        """Whether what is accepted still agrees; lengths of edits follow the units that are really lost."""
        outcome.edits = self.edits(outcome.accepted, self._policies_taken)
        return not outcome.accepted or self._try(outcome.accepted, self._policies_taken, strict=True)

    # decisions

    def _decide_kinds(self) -> dict[Any, Policy]:
        """Find for every kind of group the edits with which its first group can be cut alone."""
        policies: dict[Any, Policy] = {}
        for kind, members in self.kinds.items():
            first = members[0]
            for policy in self._policies(first):
                if time.thread_time() > self.deadline:
                    self._refuse(members, "the time limit was spent")
                    break
                if self._try([first], {kind: policy}, self._scopes[first.name]):
                    policies[kind] = policy
                    break
            else:
                self._refuse(members, self._last)
        return self._minimal(policies)

    def _policies(self, group: ChannelGroup) -> Iterator[Policy]:
        """No edit, all, all but one, single ones, pairs, all but two."""
        yield _NONE
        yield _ALL
        names = self._names(group)
        ones, twos = (
            [frozenset({name}) for name in names],
            [frozenset(p) for p in itertools.combinations(names, 2)],
        )
        every = frozenset(names)
        combinations = [*(every - one for one in ones), *ones, *twos, *(every - two for two in twos)]
        yield from itertools.islice((c for c in dict.fromkeys(combinations) if c not in (_NONE, every)), _TRIALS)

    def _names(self, group: ChannelGroup) -> list[tuple[str, str]]:
        reach = self.reach[group.name]
        lengths = new_lengths(self.walk, reach.labels, self._gone([group]))
        found = edits_for(self.probe.module, reach, lengths, _ALL)
        return list(dict.fromkeys((pattern(path), name) for path, name in found))

    def _minimal(self, policies: Mapping[Any, Policy]) -> dict[Any, Policy]:
        """Drop edits that are not needed: one that changes nothing seen is still a wrong number in an attribute."""
        result: dict[Any, Policy] = dict(policies)
        for kind, policy in policies.items():
            first, kept = self.kinds[kind][0], policy
            if policy == _NONE:
                continue
            names = self._names(first)
            kept = frozenset(names) if policy is _ALL else policy
            for candidate in (_NONE, *(frozenset({name}) for name in names)):
                if candidate == kept or len(kept) == 0 or time.thread_time() > self.deadline:
                    break
                smaller = candidate if candidate == _NONE else kept - candidate
                if self._try([first], {kind: smaller}, self._scopes[first.name]):
                    kept = smaller
            result[kind] = kept
        return result

    def _grow(
        self, accepted: list[ChannelGroup], candidates: list[ChannelGroup], policies: Mapping[Any, Policy]
    ) -> list[ChannelGroup]:
        """Add as many candidates as agree together; halve those that do not."""
        if not candidates:
            return accepted
        if time.thread_time() > self.deadline:
            self._refuse(candidates, "the time limit was spent")
            return accepted
        if self._try([*accepted, *candidates], policies, strict=True):
            return [*accepted, *candidates]
        if len(candidates) == 1:
            self._refuse(candidates, f"not together with other groups: {self._last}")
            return accepted
        half = len(candidates) // 2
        accepted = self._grow(accepted, candidates[:half], policies)
        return self._grow(accepted, candidates[half:], policies)

    def _finish(self, candidates: list[ChannelGroup], policies: Mapping[Any, Policy]) -> Outcome:
        """Take all candidates that agree together in every respect; edits that were dropped may be needed together."""
        accepted: list[ChannelGroup] = []
        for chosen in (policies, dict.fromkeys(self.kinds, _ALL)):
            if candidates and self._try(candidates, chosen, strict=True):
                accepted, policies = candidates, chosen
                break
        else:
            accepted = self._grow([], candidates, policies)
        return self._accept(accepted, policies)

    def _accept(self, accepted: list[ChannelGroup], policies: Mapping[Any, Policy]) -> Outcome:
        self._policies_taken = dict(policies)
        self.outcome.accepted, self.outcome.edits = accepted, self.edits(accepted, policies)
        return self.outcome

    def _refuse(self, groups: Sequence[ChannelGroup], why: str) -> None:
        for group in groups:
            self.outcome.refused[group.name] = why

    # trials

    def _try(
        self,
        groups: Sequence[ChannelGroup],
        policies: Mapping[Any, Policy],
        scope: str = "",
        strict: bool = False,
    ) -> bool:
        """Whether cutting these groups agrees with masking them, inside the module at `scope`.

        A strict trial also asks for agreement in train mode and at another batch size, and for a backward pass.
        """
        self.outcome.trials += 1
        plan = self.plan(groups, self.edits(groups, policies))
        calls = self._calls(scope)
        if calls is None:
            scope, calls = "", self.probe.calls
        expected = self._reference(groups, scope, calls)
        cut = copy_of(self.probe.module.get_submodule(scope))
        try:
            plan._cut(cut, scope)
            error = difference(expected, run(cut, calls))
            fault = "" if error <= self.probe.tolerance else f"the cut differs from the mask by {error:.1e}"
            if not fault and strict:
                fault = strict_fault(self.probe, cut, groups, self.removed)
        except Exception as failure:  # a wrong cut raises wherever the module's code meets it
            fault = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:160]}"
        if fault:
            self._last = fault
            return False
        self.outcome.error = error
        return True

    def _reference(self, groups: Sequence[ChannelGroup], scope: str, calls: Sequence[Call]) -> list[Tensor]:
        key = (scope, tuple(group.name for group in groups))
        if key not in self._references:
            self._references.clear()
            part = self.probe.module.get_submodule(scope)
            with masked(part, groups, self.removed, scope):
                self._references[key] = run(part, calls)
        return self._references[key]

    def _calls(self, scope: str) -> list[Call] | None:
        """How the module at `scope` is called inside the probe; None if it is not, or cannot run alone."""
        if not scope:
            return self.probe.calls
        if self._inputs is None:
            paths = sorted({path for path in self._scopes.values() if path})
            self._inputs = captured(self.probe.module, paths, self.probe.calls)
        return [self._inputs[scope]] if scope in self._inputs else None

    def _scope(self, group: ChannelGroup) -> str:
        """The innermost module that a group does not leave and that can be called."""
        path = common_path(self.reach[group.name].paths)
        while path and isinstance(
            self.probe.module.get_submodule(path), (nn.ModuleList, nn.ModuleDict, nn.ParameterList)
        ):
            path = path.rpartition(".")[0]
        return path

    def _gone(self, groups: Sequence[ChannelGroup]) -> np.ndarray:
        units = [np.asarray(group.units)[list(self.removed[group.name])] for group in groups]
        return np.concatenate(units) if units else np.zeros(0, np.int64)


def _both(first: AttributeEdit, second: AttributeEdit) -> AttributeEdit:
    lengths = {**dict(first.lengths), **dict(second.lengths)}
    return AttributeEdit(first.path, first.name, tuple(sorted(lengths.items())))
