"""Models that nobody here wrote lose half of each group's units at random, and agree with their masked selves.

    pytest -m zoo tests/dependency/test_zoo.py

runs in an environment of its own; see `zoo_models` for the libraries. Each case prints what was removed, and what was
refused and why; with LIGHTNING_PRUNE_ZOO=rows.jsonl it also adds a row to that file.
"""

from __future__ import annotations

import copy
import json
import os
import time
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo_models import MODELS

from lightning_prune._dependency.calls import tensors_in
from lightning_prune._dependency.groups import prunable_elements
from lightning_prune._shrink_probe import Probe, difference, larger_batch, make_probe, mask_units, run
from lightning_prune.cost import CostModel
from lightning_prune.dependency import ChannelGroups, channel_groups
from lightning_prune.measure import count_parameters
from lightning_prune.shrink import report_of, shrink

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]

ROWS: dict[str, dict[str, Any]] = {}


def half_of(groups: ChannelGroups) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        group.name: torch.randperm(len(group), generator=generator) < max(1, round(len(group) / 2)) for group in groups
    }


def twins(probe: Probe, groups: ChannelGroups, units: dict[str, Tensor], small: nn.Module) -> tuple[nn.Module, ...]:
    """The probe with the units masked that were cut, and the probe cut by the same plan."""
    plan = report_of(small).plan
    reference = copy.deepcopy(probe.module)
    mask_units(reference, list(groups), {n: torch.nonzero(~units[n]).ravel().tolist() for n in plan.units})
    return reference, plan.apply(probe.module).eval()


def worst_error(probe: Probe, reference: nn.Module, cut: nn.Module) -> dict[str, float | None]:
    """Relative errors in eval mode, at twice the batch and in train mode; None where the model itself cannot run."""
    found: dict[str, float | None] = {"eval": difference(run(reference, probe.calls), run(cut, probe.calls))}
    more = larger_batch(probe.calls)
    for name, calls, training in (("batch", more, False), ("train", probe.calls, True)):
        try:
            expected = run(reference.train(training), calls or [])
            again = run(reference, calls or [], seed=1)
        except Exception:
            expected = again = []
        comparable = bool(expected) and difference(expected, again) == 0.0  # not where dropout draws noise
        found[name] = difference(expected, run(cut.train(training), calls or [])) if comparable else None
    return found


def backward(module: nn.Module, inputs: Sequence[Any], training: bool) -> list[tuple[int, ...]]:
    """Run forward and backward on the real module; return the shapes of its outputs."""
    module.train(training)
    outputs = [t for t in tensors_in(module(*inputs)) if t.is_floating_point()]
    sum(t.sum() for t in outputs if t.requires_grad).backward()
    return [tuple(t.shape) for t in outputs]


def examined(name: str) -> dict[str, Any]:
    """Shrink one model to half its units and compare."""
    torch.manual_seed(0)
    module, inputs = MODELS[name]()
    module.eval()
    started = time.process_time()
    groups = channel_groups(module, inputs)
    analysed = time.process_time()
    units = half_of(groups)
    small = shrink(module, inputs, units, groups, time_limit=400.0)
    shrunk = time.process_time()
    report = report_of(small)
    probe = make_probe(module, groups.analysis.calls)
    errors = worst_error(probe, *twins(probe, groups, units, small)) if report.units else {}
    kept = {name: int(units[name].sum()) for name in report.units}
    in_groups, (before, after) = prunable_elements(groups.analysis.walk), report.params
    return {
        "model": name, "groups": len(groups), "cut": len(report.units), "refused": report.refused,
        "routes": sorted(set(report.routes.values())), "params": before, "kept": after / before,
        "kept_in_groups": 1 - (before - after) / max(1, in_groups), "errors": errors, "probe": report.probe,
        "counted": CostModel(groups).params(kept) == count_parameters(small), "faults": groups.report.faults,
        "unknown": groups.report.unknown, "notes": report.notes, "trials": report.trials,
        "shapes": [backward(m, inputs, mode) for m in (module, small) for mode in (False, True)],
        "seconds": [round(analysed - started, 1), round(shrunk - analysed, 1)],
    }  # fmt: skip


def describe(row: dict[str, Any]) -> str:
    lines = [
        f"\n{row['model']}: {row['cut']} of {row['groups']} groups cut by {', '.join(row['routes']) or 'nothing'}, "
        f"{row['kept']:.2f} of all parameters kept, {row['kept_in_groups']:.2f} of those in groups; {row['errors']}"
    ]
    return "\n".join([*lines, *(f"  {group} stayed whole: {why}" for group, why in row["refused"].items())])


@pytest.mark.parametrize("name", MODELS)
def test_a_foreign_model_loses_half_its_units_and_agrees_with_its_mask(name, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = ROWS[name] = examined(name)
    with capsys.disabled():
        print(describe(row))
    if "LIGHTNING_PRUNE_ZOO" in os.environ:
        with open(os.environ["LIGHTNING_PRUNE_ZOO"], "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    assert row["faults"] == ()
    assert row["counted"]
    floor = 1e-9 if "float64" in row["probe"] else 1e-5  # grouped expert products have no float64 kernel
    assert all(error is None or error < floor for error in row["errors"].values()), row["errors"]
    whole, small = row["shapes"][:2], row["shapes"][2:]
    assert whole == small


def test_nearly_all_models_get_smaller():
    if len(ROWS) < len(MODELS):
        pytest.skip(f"only {len(ROWS)} of {len(MODELS)} models ran")
    assert sum(row["kept"] <= 0.85 for row in ROWS.values()) >= 80
    assert sum(row["kept_in_groups"] <= 0.6 for row in ROWS.values()) >= 82
