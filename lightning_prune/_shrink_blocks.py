"""Blocked groups by the hybrid route: find the sub-module that blocks each, and verify its shrunk graph in its place."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from lightning_prune._dependency.calls import copy_of
from lightning_prune._dependency.groups import ChannelGroup
from lightning_prune._shrink_edits import common_path, pattern
from lightning_prune._shrink_hybrid import Recipe, describe_call, install
from lightning_prune._shrink_plan import CutPlan
from lightning_prune._shrink_probe import captured, difference, masked, run
from lightning_prune._shrink_search import Outcome, Search
from lightning_prune._shrink_strict import strict_fault


@dataclass
class Blocks:
    """What the hybrid route found.

    Attributes:
        accepted: groups that are cut by it.
        recipes: sub-modules to replace, by path.
        refused: group name -> why not.
    """

    accepted: list[ChannelGroup] = field(default_factory=list)
    recipes: dict[str, Recipe] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def unblock(search: Search, outcome: Outcome, plan: CutPlan) -> Blocks:
    """Try to cut the groups that the eager route refused.

    Args:
        search: the finished eager search.
        outcome: what it found.
        plan: the eager plan.
    """
    return _Route(search, outcome, plan).run()


class _Route:
    def __init__(self, search: Search, outcome: Outcome, plan: CutPlan) -> None:
        self.search, self.outcome, self.plan, self.found = search, outcome, plan, Blocks()
        self.base = copy_of(search.probe.module)
        plan._cut(self.base, "")
        self.failed: dict[str, str] = {}
        self.graphs: dict[Any, Any] = {}
        self.alone: set[str] = set()  # blocks that look alike but have a graph of their own

    def run(self) -> Blocks:
        members = self._by_path()
        if not members:
            return self.found
        calls = captured(self.base, sorted(members), self.search.probe.calls)
        recipes: dict[str, Recipe] = {}
        for path, groups in members.items():
            why = self.failed.get(pattern(path), "")
            if not why and time.monotonic() > self.search.deadline:
                why = "the time limit was spent"
            if not why:
                why = self._try_block(path, groups, calls.get(path), recipes)
            if why:
                self.failed.setdefault(pattern(path), why)
                self.found.refused.update({group.name: why for group in groups})
        self._take_all(recipes, members)
        return self.found

    def _by_path(self) -> dict[str, list[ChannelGroup]]:
        """Refused groups by the innermost callable sub-module that holds each; nested ones join the outer."""
        names = set(self.outcome.refused)
        scopes = {g.name: self.search._scopes[g.name] for g in self.search.wanted if g.name in names}
        paths = sorted({path for path in scopes.values() if path}, key=len)
        outer = {p: next(q for q in paths if common_path([p, q]) == q) for p in paths}
        members: dict[str, list[ChannelGroup]] = defaultdict(list)
        for group in self.search.wanted:
            if scopes.get(group.name):
                members[outer[scopes[group.name]]].append(group)
        return members

    def _try_block(self, path: str, groups: list[ChannelGroup], call: Any, recipes: dict[str, Recipe]) -> str:
        """Compare the replaced sub-module with the masked one on its own inputs; return what is wrong."""
        if call is None:
            return "its sub-module is not called by itself"
        moved = [self._moved(group) for group in groups]
        try:
            recipe: Recipe = {"input": describe_call(call), "kept": self._kept(path, moved)}
            error = self._error(path, call, recipe, moved)
            if error > self.search.probe.tolerance:
                self.alone.add(path)
                error = self._error(path, call, recipe, moved)
        except Exception as failure:  # export, analysis and rewriting may fail in any way
            return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:160]}"
        if error > self.search.probe.tolerance:
            return f"its shrunk graph differs from the mask by {error:.1e}"
        recipes[path] = recipe
        return ""

    def _error(self, path: str, call: Any, recipe: Recipe, moved: list[ChannelGroup]) -> float:
        part, holder = self.base.get_submodule(path), nn.Module()
        holder.inner = copy_of(part)
        with masked(part, moved, self.search.removed, path):
            expected = run(part, [call])
        install(holder, "inner", recipe, None if path in self.alone else self.graphs)
        return difference(expected, run(holder.inner.eval(), [call]))

    def _moved(self, group: ChannelGroup) -> ChannelGroup:
        """The group with its positions counted after the eager cut."""
        slices = {}
        for (name, dim), positions in group.slices.items():
            kept = self.plan.kept.get(name, {}).get(dim)
            slices[name, dim] = positions if kept is None else np.searchsorted(np.asarray(kept), positions)
        return ChannelGroup(group.name, group.units, slices, group.consumers, group.producers)

    def _kept(self, path: str, groups: Sequence[ChannelGroup]) -> dict[str, dict[str, list[int]]]:
        gone: dict[str, dict[int, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
        for group in groups:
            for (name, dim), positions in group.slices.items():
                gone[name][dim].append(positions[list(self.search.removed[group.name])].ravel())
        sizes = dict(self.base.get_submodule(path).named_parameters(remove_duplicate=False))
        sizes.update(self.base.get_submodule(path).named_buffers(remove_duplicate=False))
        kept: dict[str, dict[str, list[int]]] = {}
        for name, dims in gone.items():
            own = name[len(path) + 1 :]
            kept[own] = {
                str(dim): np.setdiff1d(np.arange(sizes[own].shape[dim]), np.concatenate(at)).tolist()
                for dim, at in dims.items()
            }
        return kept

    def _take_all(self, recipes: Mapping[str, Recipe], members: Mapping[str, list[ChannelGroup]]) -> None:
        """Check all replacements together; where they fail, take them one by one as long as they agree."""
        if recipes and not self._fault(recipes, members):
            self._accept(recipes, members)
            return
        taken: dict[str, Recipe] = {}
        for path, recipe in recipes.items():
            late = time.monotonic() > self.search.deadline
            why = "the time limit was spent" if late else self._fault({**taken, path: recipe}, members)
            if why:
                self.found.refused.update({group.name: why for group in members[path]})
            else:
                taken[path] = recipe
        self._accept(taken, members)

    def _accept(self, recipes: Mapping[str, Recipe], members: Mapping[str, list[ChannelGroup]]) -> None:
        self.found.recipes = {path: {**recipe, "alone": path in self.alone} for path, recipe in recipes.items()}
        self.found.accepted = [group for path in recipes for group in members[path]]

    def _fault(self, recipes: Mapping[str, Recipe], members: Mapping[str, list[ChannelGroup]]) -> str:
        probe, removed = self.search.probe, self.search.removed
        groups = [*self.outcome.accepted, *(group for path in recipes for group in members[path])]
        cut = copy_of(self.base)
        try:
            for path, recipe in recipes.items():
                install(cut, path, recipe, None if path in self.alone else self.graphs)
            cut.eval()
            with masked(probe.module, groups, removed):
                expected = run(probe.module, probe.calls)
            error = difference(expected, run(cut, probe.calls))
            if error > probe.tolerance:
                return f"with its shrunk graph the outputs differ from the mask by {error:.1e}"
            fault = strict_fault(probe, cut, groups, removed)
        except Exception as failure:  # the replaced module may fail in the company of others
            return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:160]}"
        if not fault:
            self.outcome.error = max(self.outcome.error, error)
        return fault
