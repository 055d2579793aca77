"""Blocked groups by the hybrid route: find the sub-module that blocks each, and verify its shrunk graph in its place."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from lightning_prune._dependency.calls import Call, copy_of
from lightning_prune._dependency.groups import ChannelGroup
from lightning_prune._dependency.walk import tensors_by_name
from lightning_prune._shrink_alike import Fingerprints
from lightning_prune._shrink_edits import common_path
from lightning_prune._shrink_hybrid import Graphs, Recipe, describe_call, install, shrunk_graphs, with_batch_of_two
from lightning_prune._shrink_plan import CutPlan
from lightning_prune._shrink_probe import batch_size, captured, difference, masked, run
from lightning_prune._shrink_search import Outcome, Search
from lightning_prune._shrink_strict import strict_fault


@dataclass
class Blocks:
    """What the hybrid route found.

    Attributes:
        accepted: groups that are cut by it.
        recipes: sub-modules to replace, by path.
        refused: group name -> why not.
        notes: sentences about what is new.
    """

    accepted: list[ChannelGroup] = field(default_factory=list)
    recipes: dict[str, Recipe] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


_FREE_STEPS = 400  # a whole module of more steps is exported with fixed sizes: free ones take minutes


def unblock(search: Search, outcome: Outcome, plan: CutPlan, module: nn.Module, graphs: Graphs) -> Blocks:
    """Try to cut the groups that the eager route refused.

    Args:
        search: the finished eager search.
        outcome: what it found.
        plan: the eager plan.
        module: the real module; it stays as it is.
        graphs: receives the shrunk graphs, for the real cut.
    """
    return _Route(search, outcome, plan, module, graphs).run()


class _Route:
    def __init__(self, search: Search, outcome: Outcome, plan: CutPlan, module: nn.Module, graphs: Graphs) -> None:
        self.search, self.outcome, self.plan, self.graphs = search, outcome, plan, graphs
        self.found = Blocks()
        self.base, self.real = copy_of(search.probe.module), copy_of(module)
        for copy in (self.base, self.real):
            plan._cut(copy, "")
        self.failed: dict[Any, str] = {}
        self.made: dict[str, str] = {}  # "all" or "batch" sizes free, by shared graph
        self.slowest = 0.0  # seconds of the slowest export with free sizes

    def run(self) -> Blocks:
        self.run_blocks()
        self.run_whole()
        return self.found

    def run_blocks(self) -> None:
        """Try the sub-modules that hold refused groups."""
        members = self._by_path()
        if not members:
            return
        calls = captured(self.base, sorted(members), self.search.probe.calls)
        recipes: dict[str, Recipe] = {}
        drafts, kinds = self._drafts(members, calls)
        for path, groups in members.items():
            why = self.found.refused.get(groups[0].name) or self.failed.get(kinds.get(path), "")
            if not why and time.thread_time() > self.search.deadline:
                why = "the time limit was spent"
            if not why:
                new = {kinds[other] for other in drafts if other not in recipes}
                why = self._try_block(path, groups, calls[path], drafts[path], len(new))
                if not why:
                    recipes[path] = drafts[path]
            if why:
                self.failed.setdefault(kinds.get(path), why)
                self.found.refused.update({group.name: why for group in groups})
        self._take_all(recipes, members)

    def run_whole(self) -> None:
        """Try the module itself as one graph, for refused groups that no sub-module holds."""
        groups = [g for g in self.search.wanted if g.name in self.outcome.refused and not self.search._scopes[g.name]]
        calls = self.search.probe.calls
        late = time.thread_time() > self.search.deadline
        if not groups or late or len(calls) != 1 or calls[0].path:
            return
        for copy in (self.base, self.real):
            for path, recipe in self.found.recipes.items():
                install(copy, path, recipe, self.graphs)
        members = {"": [self._moved(group) for group in groups]}
        try:
            steps = len(self.search.graphs[0].steps)
            kept = self._kept("", members[""])
            recipe = {"input": describe_call(calls[0]), "kept": kept, "share": "", "one": False,
                      "free": "all" if steps <= _FREE_STEPS else "batch"}  # fmt: skip
            self._export("", recipe)
            why = self._fault({"": recipe}, members)
        except Exception as failure:  # export, analysis and rewriting may fail in any way
            why = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:160]}"
        if why:
            eager = self.outcome.refused
            self.found.refused.update({g.name: f"{eager[g.name]}; as one graph: {why}" for g in groups})
            return
        self.found.recipes[""] = recipe
        self.found.accepted += groups
        sizes = "" if recipe["free"] == "all" else "; sizes of its inputs are fixed but for the first dim"
        self.found.notes.append(f"The whole module runs as one exported graph{sizes}.")

    def _drafts(
        self, members: Mapping[str, list[ChannelGroup]], calls: Mapping[str, Call]
    ) -> tuple[dict[str, Recipe], dict[str, Any]]:
        """Recipes by path, and what tells blocks apart that cannot share a graph."""
        prints = Fingerprints(self.search.graphs, members)
        drafts: dict[str, Recipe] = {}
        kinds: dict[str, Any] = {}
        first: dict[Any, str] = {}
        for path, groups in members.items():
            try:
                if path not in calls:
                    raise ValueError("its sub-module is not called by itself")
                described, kept = describe_call(calls[path]), self._kept(path, [self._moved(g) for g in groups])
            except Exception as failure:
                self.found.refused.update({group.name: str(failure) for group in groups})
                continue
            inner = self.base.get_submodule(path)
            counts = tuple((name, dim, len(at)) for name, dims in kept.items() for dim, at in dims.items())
            shapes = tuple((name, tuple(tensor.shape)) for name, tensor in tensors_by_name(inner).items())
            steps = (prints.of(path, False), prints.of(path, True))
            kinds[path] = (type(inner), repr(described), counts, shapes, steps)
            share, one = first.setdefault(kinds[path], path), prints.same_in_both_modes(path)
            drafts[path] = {"input": described, "kept": kept, "share": share, "one": one, "free": "all"}
        return drafts, kinds

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

    def _try_block(self, path: str, groups: list[ChannelGroup], call: Call, recipe: Recipe, kinds: int) -> str:
        """Compare the replaced sub-module with the masked one on its own inputs; return what is wrong."""
        moved = [self._moved(group) for group in groups]
        try:
            self._make(path, recipe, kinds)
            error = self._error(path, call, recipe, moved)
            if error > self.search.probe.tolerance and recipe["share"] != path:
                recipe["share"] = path
                self._make(path, recipe, kinds)
                error = self._error(path, call, recipe, moved)
        except Exception as failure:  # export, analysis and rewriting may fail in any way
            return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:160]}"
        if error > self.search.probe.tolerance:
            return f"its shrunk graph differs from the mask by {error:.1e}"
        return ""

    def _make(self, path: str, recipe: Recipe, kinds: int) -> None:
        """Make the graphs in the real precision; where time would not do for all kinds, sizes but the batch are fixed."""
        known = self.made.get(recipe["share"])
        left = self.search.deadline - time.thread_time()
        recipe["free"] = known or ("all" if kinds * self.slowest < left else "batch")
        started = time.thread_time()
        self._export(path, recipe)
        if known is None and recipe["free"] == "all":
            self.slowest = max(self.slowest, time.thread_time() - started)
        self.made[recipe["share"]] = recipe["free"]

    def _export(self, path: str, recipe: Recipe) -> None:
        """Make the graphs; a batch of one would be taken for a constant, so it is traced as two where that runs."""
        inner, described = self.real.get_submodule(path), recipe["input"]
        if batch_size(self.search.probe.calls) == 1:
            recipe["input"] = with_batch_of_two(described)
            try:
                shrunk_graphs(inner, recipe, self.graphs)
                return
            except Exception:  # the sub-module takes no such batch
                recipe["input"] = described
        shrunk_graphs(inner, recipe, self.graphs)

    def _error(self, path: str, call: Call, recipe: Recipe, moved: list[ChannelGroup]) -> float:
        part, holder = self.base.get_submodule(path), nn.Module()
        holder.inner = copy_of(part)
        with masked(part, moved, self.search.removed, path):
            expected = run(part, [call])
        install(holder, "inner", recipe, self.graphs)
        return difference(expected, run(holder.inner.eval(), [call]))

    def _moved(self, group: ChannelGroup) -> ChannelGroup:
        """The group with its positions counted after the cuts so far."""
        slices = {}
        done = CutPlan(kept=self.plan.kept, replaced=self.found.recipes)
        for (name, dim), positions in group.slices.items():
            for kept in done.cuts(name, dim):
                positions = np.searchsorted(np.asarray(kept), positions)
            slices[name, dim] = positions
        return ChannelGroup(group.name, group.units, slices, group.consumers, group.producers)

    def _kept(self, path: str, groups: Sequence[ChannelGroup]) -> dict[str, dict[str, list[int]]]:
        gone: dict[str, dict[int, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
        for group in groups:
            for (name, dim), positions in group.slices.items():
                gone[name][dim].append(positions[list(self.search.removed[group.name])].ravel())
        sizes = tensors_by_name(self.base.get_submodule(path))
        kept: dict[str, dict[str, list[int]]] = {}
        for name, dims in gone.items():
            own = name[len(path) + 1 :] if path else name
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
            late = time.thread_time() > self.search.deadline
            why = "the time limit was spent" if late else self._fault({**taken, path: recipe}, members)
            if why:
                self.found.refused.update({group.name: why for group in members[path]})
            else:
                taken[path] = recipe
        self._accept(taken, members)

    def _accept(self, recipes: Mapping[str, Recipe], members: Mapping[str, list[ChannelGroup]]) -> None:
        self.found.recipes = dict(recipes)
        self.found.accepted = [group for path in recipes for group in members[path]]

    def _fault(self, recipes: Mapping[str, Recipe], members: Mapping[str, list[ChannelGroup]]) -> str:
        probe, removed = self.search.probe, self.search.removed
        now = {group.name for path in recipes for group in members[path]}
        before = {group.name for group in (*self.outcome.accepted, *self.found.accepted)}
        groups = [group for group in self.search.wanted if group.name in now | before]
        cut = copy_of(self.base)
        try:
            for path, recipe in recipes.items():
                install(cut, path, recipe, self.graphs)
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
