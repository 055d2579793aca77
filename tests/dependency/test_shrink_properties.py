"""Masks, budgets and targets chosen by hypothesis: shrunk equals masked, budgets hold, predicted counts are exact."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from dependency_nets import NETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_shrink import error, masked_copy
from torch import Tensor, nn

from lightning_prune.cost import KINDS, CostModel, units_within_budget
from lightning_prune.dependency import ChannelGroups, channel_groups
from lightning_prune.measure import count_flops, count_parameters
from lightning_prune.shrink import report_of, shrink

PRUNABLE = [name for name in NETS if NETS[name][2] and name != "width_from_input"]  # see test_shrink_hybrid
few = settings(max_examples=3, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
many = settings(few, max_examples=20)


@cache
def analysed(name: str) -> tuple[nn.Module, tuple[Any, ...], ChannelGroups, CostModel]:
    torch.manual_seed(0)
    factory, example, _ = NETS[name]
    module, inputs = factory(), example()
    groups = channel_groups(module, inputs)
    return module, inputs, groups, CostModel(groups)


@st.composite
def masks(draw: st.DrawFn, groups: ChannelGroups) -> dict[str, Tensor]:
    """Any masks that keep a unit of every group; some groups may be left out."""
    found = {}
    for group in groups:
        kept = draw(st.lists(st.booleans(), min_size=len(group), max_size=len(group)).filter(any))
        if draw(st.integers(0, 3)):
            found[group.name] = torch.tensor(kept)
    return found


def whole(groups: ChannelGroups, units: dict[str, Tensor]) -> dict[str, Tensor]:
    return {group.name: units.get(group.name, torch.ones(len(group), dtype=torch.bool)) for group in groups}


@pytest.mark.parametrize("name", PRUNABLE)
@given(data=st.data())
@few
def test_shrunk_equals_masked_under_any_masks(name, data):
    module, inputs, groups, costs = analysed(name)
    units = data.draw(masks(groups))
    small = shrink(module, inputs, units, groups)
    assert report_of(small).refused == {}
    kept = {name: int(mask.sum()) for name, mask in units.items()}
    assert costs.params(kept) == count_parameters(small)
    assert costs.counted_flops(kept) == count_flops(small, inputs)
    reference = masked_copy(module, groups, whole(groups, units))
    assert error(reference.eval()(*inputs), small.eval()(*inputs)) < 1e-5
    wide = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    assert error(reference.double()(*wide), small.double()(*wide)) < 1e-9


@given(seed=st.integers(0, 2**31), kind=st.sampled_from(KINDS), part=st.floats(0.0, 1.0), round_to=st.integers(1, 4))
@pytest.mark.parametrize("name", PRUNABLE)
@many
def test_a_budget_is_never_exceeded_and_the_last_unit_was_needed(name, seed, kind, part, round_to):
    _, _, groups, costs = analysed(name)
    generator = torch.Generator().manual_seed(seed)
    scores = {group.name: torch.rand(len(group), generator=generator) for group in groups}
    dense, smallest = costs.cost(kind), costs.cost(kind, dict.fromkeys(scores, 1))
    budget = min(1.0, (smallest + part * (dense - smallest)) / dense)
    exact = units_within_budget(scores, costs, budget, kind)
    counts = {name: int(mask.sum()) for name, mask in exact.items()}
    assert costs.cost(kind, counts) <= budget * dense + 1e-6
    gone = [(float(scores[name][unit]), name) for name in exact for unit in torch.nonzero(~exact[name]).ravel()]
    if gone:
        _, last = max(gone)
        assert costs.cost(kind, {**counts, last: counts[last] + 1}) > budget * dense
    rounded = units_within_budget(scores, costs, budget, kind, round_to=round_to)
    assert all(bool((mask <= exact[name]).all()) and bool(mask.any()) for name, mask in rounded.items())


@pytest.mark.parametrize("name", ["residual", "grouped", "heads", "tied"])
@given(part=st.floats(0.1, 1.0), kind=st.sampled_from(KINDS))
@few
def test_the_module_cut_to_a_budget_costs_what_was_predicted(name, part, kind):
    module, inputs, groups, costs = analysed(name)
    scores = {group.name: torch.rand(len(group)) for group in groups}
    dense, smallest = costs.cost(kind), costs.cost(kind, dict.fromkeys(scores, 1))
    budget = min(1.0, (smallest + part * (dense - smallest)) / dense)
    units = units_within_budget(scores, costs, budget, kind)
    small = shrink(module, inputs, units, groups)
    counts = {name: int(mask.sum()) for name, mask in units.items()}
    assert count_parameters(small) == costs.params(counts)
    assert count_flops(small, inputs) == costs.counted_flops(counts)
    if kind == "params":
        assert count_parameters(small) <= budget * count_parameters(module) + 1e-6
