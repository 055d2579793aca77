"""A physically smaller module, verified against the masked one and never broken.

Units whose consumers are all zero are cut out of every tensor they run through. The cut is run on a copy with random
float64 parameters and compared with the mask, in eval and train mode, at two batch sizes, with a backward pass; a group
that cannot be verified stays whole and is named. The caller's module is not touched.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_prune._dependency.calls import Call, copy_of
from lightning_prune._dependency.groups import ChannelGroup
from lightning_prune._dependency.walk import tensors_by_name
from lightning_prune._shrink_blocks import Blocks, unblock
from lightning_prune._shrink_edits import reaches
from lightning_prune._shrink_hybrid import Graphs
from lightning_prune._shrink_plan import AttributeEdit, CutPlan, plan_for
from lightning_prune._shrink_probe import Removed, make_probe, mask_units, sensitivities
from lightning_prune._shrink_search import Outcome, Search
from lightning_prune._shrink_strict import agree
from lightning_prune.checks import check_integer, check_positive
from lightning_prune.dependency import ChannelGroups, channel_groups
from lightning_prune.files import replacing
from lightning_prune.masks import MaskManager

__all__ = [
    "AttributeEdit",
    "CutPlan",
    "ShrinkReport",
    "load_shrunk",
    "removable_units",
    "report_of",
    "save_shrunk",
    "shrink",
]

FORMAT = "lightning_prune.shrunk"
_SENSITIVITY = 1000  # a mask must move the outputs this many times more than the cut may
_PROBES = 4  # random points at which a dead unit may come alive
_EXACT = 1e-13  # what float64 arithmetic itself may add

_reports: weakref.WeakKeyDictionary[nn.Module, ShrinkReport] = weakref.WeakKeyDictionary()


@dataclass
class ShrinkReport:
    """What a shrink did.

    Attributes:
        units: (before, after) by group name, for every group that lost units.
        refused: group name -> why it stayed whole though units could leave.
        frozen: (parameter, dim) -> why positions of it are in no group.
        params: (before, after) numbers of parameters.
        error: largest relative difference between cut and mask on the probe.
        sensitivity: by group, how much its mask moves the outputs; far above `error`.
        probe: parameters and precision of the comparison.
        trials: comparisons made.
        seconds: time taken.
        routes: "eager" or "hybrid" by group.
        plan: the cut as plain data.
        notes: sentences.
    """

    units: dict[str, tuple[int, int]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    frozen: dict[tuple[str, int], str] = field(default_factory=dict)
    params: tuple[int, int] = (0, 0)
    error: float = 0.0
    sensitivity: dict[str, float] = field(default_factory=dict)
    probe: str = ""
    trials: int = 0
    seconds: float = 0.0
    routes: dict[str, str] = field(default_factory=dict)
    plan: CutPlan = field(default_factory=CutPlan)
    notes: list[str] = field(default_factory=list)

    def sentences(self) -> list[str]:
        """Return the report in plain words, for a receipt."""
        lines = [f"{len(self.units)} of {len(self.units) + len(self.refused)} groups with removable units were cut."]
        lines += [f"Group {name!r} stayed whole: {why}." for name, why in self.refused.items()]
        return [*lines, *self.notes]


def shrink(
    module: nn.Module,
    example_input: Any,
    units: Mapping[str, Tensor] | None = None,
    groups: ChannelGroups | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    extra_inputs: Sequence[Any] = (),
    round_to: int = 1,
    time_limit: float = 120.0,
    routes: Sequence[str] = ("eager", "hybrid"),
) -> nn.Module:
    """Return a smaller copy of a module without the units that are masked.

    Args:
        module: any module; it stays as it is.
        example_input: arguments of forward, or a LightningModule's batch; see `channel_groups`.
        units: bool masks by group name, True = kept, each of shape (units,). None: units whose consumers are all zero.
        groups: result of `channel_groups` for this module, to save time.
        example_kwargs: further named arguments of forward.
        extra_inputs: further examples; the cut must agree on all.
        round_to: keep further masked units until kept units x positions per unit is a multiple of this (8 or 16), >= 1.
        time_limit: seconds of this thread's processor time (a busy machine changes nothing) after which no new trial
            starts; what is verified by then is cut, > 0.
        routes: ways to try in this order: "eager" cuts the module itself, "hybrid" also replaces sub-modules whose code
            cannot follow by their own shrunk graph.
    Returns:
        A copy that runs; `report_of(copy)` tells what was cut, what was refused and why. Without anything to cut, a copy.
    Raises:
        ValueError: an argument breaks its rule, or the module cannot be copied, traced or run; nothing was changed.
    """
    started = time.monotonic()
    check_integer("round_to", round_to, 1)
    check_positive("time_limit", time_limit)
    if groups is None:
        groups = channel_groups(module, example_input, example_kwargs, extra_inputs)
    removed = _removed(module, groups, units, round_to)
    report = ShrinkReport(frozen=dict(groups.report.frozen), notes=list(groups.report.notes))
    if removed:
        small = _verified(module, groups, removed, report, time.thread_time() + time_limit, routes)
    else:
        small = copy_of(module)
        report.notes.append("No unit was masked, so nothing was cut.")
    report.params = (_numel(module), _numel(small))
    report.seconds = time.monotonic() - started
    _reports[small] = report
    return small


def report_of(module: nn.Module) -> ShrinkReport:
    """Return the report of a module that `shrink` or `load_shrunk` returned.

    Raises:
        ValueError: the module did not come from there.
    """
    if module not in _reports:
        raise ValueError(f"`module` must come from shrink or load_shrunk, got a plain {type(module).__name__}.")
    return _reports[module]


def removable_units(module: nn.Module, groups: ChannelGroups) -> dict[str, Tensor]:
    """Return for every group which units are kept: those with a consumer weight that is not zero (or not masked).

    Where the module carries masks (`MaskManager`), they decide: a weight that is zero by chance or initialization stays.

    Returns:
        bool masks by group name, True = kept, each of shape (units,); at least one unit is kept.
    """
    tensors = tensors_by_name(module)
    masks = MaskManager.of(module).masks
    kept = {}
    for group in groups:
        alive = torch.zeros(len(group), dtype=torch.bool)
        for name, dim in group.consumers:
            weight = tensors[name].detach()
            used = masks[name].to(weight.device) & (weight != 0) if masks and name in masks else weight != 0
            if masks and name not in masks:
                used = torch.ones_like(used)
            others = [d for d in range(used.dim()) if d != dim]
            along = (used.sum(others) if others else used).cpu() > 0
            alive |= along[torch.as_tensor(group.slices[name, dim])].any(1)
        if not alive.any():
            alive[0] = True
        kept[group.name] = alive
    return kept


def save_shrunk(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a shrunk module's weights and widths to one safetensors file; no pickle is involved.

    Raises:
        ValueError: the module did not come from `shrink` or `load_shrunk`.
    """
    plan = report_of(module).plan
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, Tensor):
            held = tensor.detach().cpu()
            key = held.untyped_storage().data_ptr()
            tensors[name] = held.clone().contiguous() if key in seen else held.contiguous()
            seen.add(key)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": FORMAT, "version": "1", "plan": plan.to_json()})


def load_shrunk(factory: Callable[[], nn.Module], path: str | os.PathLike[str]) -> nn.Module:
    """Build the dense module, cut it to the stored widths and load the stored weights.

    Args:
        factory: makes the dense module, untrained.
        path: a file written by `save_shrunk`.
    Returns:
        The shrunk module.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or holds something else, or `factory` makes another model.
    """
    metadata, tensors = _read(path)
    plan = CutPlan.from_json(metadata.get("plan", ""))
    module = factory()
    if not isinstance(module, nn.Module):
        raise ValueError(f"`factory` must return a torch.nn.Module, got {type(module).__name__}.")
    before = _numel(module)
    plan.apply(module)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"`factory` must make the model the file was saved from: {error}") from error
    _reports[module] = ShrinkReport(units=dict(plan.units), plan=plan, params=(before, _numel(module)))
    return module


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {os.fspath(path)!r}. Write one with save_shrunk(module, path).")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{os.fspath(path)!r} is truncated or no safetensors file ({error}).") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{os.fspath(path)!r} holds no shrunk module (format {metadata.get('format')!r}). Save with save_shrunk."
        )
    return metadata, tensors


def _removed(
    module: nn.Module, groups: ChannelGroups, units: Mapping[str, Tensor] | None, round_to: int
) -> dict[str, list[int]]:
    """Indices of units to remove by group name, without groups that lose none."""
    masks = removable_units(module, groups) if units is None else _checked(units, groups)
    removed = {}
    for group in groups:
        if group.name not in masks:
            continue
        mask = masks[group.name].cpu().clone()
        _round_up(mask, group, round_to)
        gone = torch.nonzero(~mask).ravel().tolist()
        if gone:
            removed[group.name] = gone
    return removed


def _checked(units: Mapping[str, Tensor], groups: ChannelGroups) -> dict[str, Tensor]:
    for name, mask in units.items():
        group = groups.named(name)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (len(group),):
            what = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"`units` of group {name!r} must be a bool tensor (True = kept) of shape ({len(group)},), got {what}."
            )
        if not mask.any():
            raise ValueError(f"`units` of group {name!r} must keep at least one unit, got none.")
    return dict(units)


def _round_up(mask: Tensor, group: ChannelGroup, round_to: int) -> None:
    """Keep further units, the first ones that would leave, until the kept positions are a multiple."""
    for unit in torch.nonzero(~mask).ravel().tolist():
        if int(mask.sum()) * group.width % round_to == 0:
            return
        mask[unit] = True


def _verified(
    module: nn.Module,
    groups: ChannelGroups,
    removed: Removed,
    report: ShrinkReport,
    deadline: float,
    routes: Sequence[str],
) -> nn.Module:
    """Search for the cut that agrees with the mask, apply it to a copy, and compare the real modules once more."""
    calls = groups.analysis.calls
    wanted = [group for group in groups if group.name in removed]
    probe = make_probe(module, calls)
    report.probe = f"{probe.origin} parameters in {str(probe.dtype).removeprefix('torch.')}"
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_by_name(module).items()}
    search = Search(groups, wanted, removed, reaches(groups), probe, shapes, deadline)
    outcome = search.run()
    _drop_insensitive(search, outcome, module, calls, report)
    plan = plan_for(outcome.accepted, removed, shapes, outcome.edits)
    graphs: Graphs = {}
    blocks = unblock(search, outcome, plan, module, graphs) if "hybrid" in routes and outcome.refused else Blocks()
    for group in blocks.accepted:
        del outcome.refused[group.name]
        plan.units[group.name] = (len(group), len(group) - len(removed[group.name]))
    if blocks.accepted:
        report.sensitivity.update(sensitivities(search.probe, blocks.accepted, removed))
    plan.replaced = dict(blocks.recipes)
    report.notes += blocks.notes
    report.refused.update({**outcome.refused, **blocks.refused})
    report.error, report.trials = outcome.error, outcome.trials
    accepted = [*outcome.accepted, *blocks.accepted]
    small = copy_of(module)
    plan._apply(small, graphs)
    reference = copy_of(module)
    mask_units(reference, accepted, removed)
    if not agree(reference.eval(), small.eval(), calls):
        report.refused.update(
            {g.name: "the real parameters gave another output after the cut" for g in outcome.accepted}
        )
        return copy_of(module)
    _restore_modes(small, module)
    report.plan, report.units = plan, dict(plan.units)
    report.routes = {group.name: "eager" for group in outcome.accepted}
    report.routes.update({group.name: "hybrid" for group in blocks.accepted})
    return small


def _drop_insensitive(
    search: Search, outcome: Outcome, module: nn.Module, calls: Sequence[Call], report: ShrinkReport
) -> None:
    """Refuse groups whose mask moves the outputs too little for the comparison to mean anything.

    A unit may be dead on one probe by chance (a ReLU below zero), so that others are drawn before a group is refused.
    """
    weak = _insensitive(search, outcome, report)
    for seed in range(1, _PROBES):
        if not weak:
            return
        search.use(make_probe(module, calls, seed))
        if search.confirm(outcome):
            weak &= _insensitive(search, outcome, report)
    if weak:
        outcome.accepted = [group for group in outcome.accepted if group.name not in weak]
        why = "its units do not move the outputs, so a comparison proves nothing"
        outcome.refused.update(dict.fromkeys(weak, why))
        outcome.accepted = outcome.accepted if search.confirm(outcome) else []


def _insensitive(search: Search, outcome: Outcome, report: ShrinkReport) -> set[str]:
    found = sensitivities(search.probe, outcome.accepted, search.removed) if outcome.accepted else {}
    for name, value in found.items():
        report.sensitivity[name] = max(value, report.sensitivity.get(name, 0.0))
    floor = _SENSITIVITY * max(outcome.error, _EXACT)
    return {name for name, value in found.items() if value <= floor}


def _restore_modes(module: nn.Module, like: nn.Module) -> None:
    """Give every sub-module the training flag of its original."""
    flags = {path: child.training for path, child in like.named_modules()}
    for path, child in module.named_modules():
        child.training = flags.get(path, child.training)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class _CallableModule(types.ModuleType):
    """This module under the package's name `shrink`, which is also the function's: calling either works."""

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        return shrink(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
