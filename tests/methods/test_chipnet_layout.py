"""The flat vector of gates: exact costs, a budget that is kept to one unit, and masks that equal the smaller network."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from chipnet_nets import FAMILIES, channels_of, example, layout_of, random_gates, scrambled

from lightning_prune.cost import KINDS, Kind, units_within_budget
from lightning_prune.masks import MaskManager
from lightning_prune.measure import count_flops, count_parameters
from lightning_prune.methods._chipnet_layout import (
    build_layout,
    floor_within,
    protected_gates,
    rounded,
    smallest_share,
    uniform_width,
)
from lightning_prune.methods.chipnet import harden
from lightning_prune.shrink import shrink

RANDOM = 2


@pytest.mark.parametrize("name", FAMILIES)
def test_hard_costs_equal_those_of_the_smaller_network(name: str) -> None:
    module, inputs = scrambled(name), example()
    channels = channels_of(module)
    layout = build_layout(channels)
    for seed in range(RANDOM):
        gates = random_gates(layout, seed)
        small = shrink(module, inputs, layout.kept(gates), channels.all_groups)
        assert layout.hard_cost(gates, "params") == count_parameters(small)
        assert layout.hard_cost(gates, "flops") == count_flops(small, (inputs,))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_masked_network_equals_the_smaller_one(name: str) -> None:
    module, inputs = scrambled(name), example()
    channels = channels_of(module)
    layout = build_layout(channels)
    kept = layout.kept(random_gates(layout, 0))
    small = shrink(module, inputs, kept, channels.all_groups)
    MaskManager.of(module).set_masks(channels.masks(kept))
    torch.testing.assert_close(small(inputs), module(inputs), rtol=1e-4, atol=1e-5)
    assert sum(int(mask.sum()) for mask in kept.values()) < layout.size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["residual", "depthwise", "concatenated"])
def test_the_gradient_of_the_budget_equals_differences(name: str, kind: Kind) -> None:
    layout = layout_of(name)
    whole = torch.ones(layout.size, dtype=torch.float64)
    assert float(layout.share(whole, kind)) == 1.0
    m = torch.rand(layout.size, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    (slope,) = torch.autograd.grad(layout.share(m, kind), m)
    for index in (0, layout.size // 2, layout.size - 1):
        step = torch.zeros_like(m)
        step[index] = 1e-6
        difference = (layout.share(m.detach() + step, kind) - layout.share(m.detach() - step, kind)) / 2e-6
        assert float(slope[index]) == pytest.approx(float(difference), rel=1e-5)
    assert bool((slope > 0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_budget_is_kept_to_one_unit(name: str, kind: Kind) -> None:
    layout = layout_of(name)
    dense = layout.costs.cost(kind)
    for seed, budget in enumerate((0.4, 0.6, 0.9)):
        psi = torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))
        gates = harden(layout, psi, budget, kind)
        assert layout.hard_cost(gates, kind) <= budget * dense
        last = int(psi.masked_fill(gates, -torch.inf).argmax())
        gates[last] = True
        assert layout.hard_cost(gates, kind) > budget * dense


@pytest.mark.parametrize("kind", KINDS)
def test_the_prefixes_of_the_ranking_are_those_of_the_general_search(kind: Kind) -> None:
    """`units_within_budget` is another program for the same promise."""
    layout = layout_of("residual")
    psi = torch.randn(layout.size, generator=torch.Generator().manual_seed(5))
    names = [group.name for group in layout.costs.groups]
    scores = {name: psi[layout.group_of_unit == index] for index, name in enumerate(names)}
    expected = units_within_budget(scores, layout.costs, 0.5, kind)
    ours = layout.kept(harden(layout, psi, 0.5, kind))
    assert all(torch.equal(ours[name], expected[name]) for name in names)


@pytest.mark.parametrize("psi", [torch.zeros, lambda n: torch.full((n,), 50.0)], ids=["tied", "saturated"])
@pytest.mark.parametrize("min_keep", [0.0, 0.1, 0.4])
def test_every_group_keeps_its_share_also_where_all_gates_are_tied(psi: object, min_keep: float) -> None:
    layout = layout_of("residual")
    values = psi(layout.size)  # type: ignore[operator]
    gates = harden(layout, values, 0.5, "params", min_keep)
    assert layout.hard_cost(gates, "params") <= 0.5 * layout.costs.params()
    for segment in layout.segments.unique():
        members = gates[layout.segments == segment]
        assert int(members.sum()) >= max(1, math.ceil(min_keep * len(members)))


def test_the_largest_of_every_group_are_protected() -> None:
    psi, segments = torch.tensor([0.0, 3.0, 1.0, 2.0, 5.0, 5.0]), torch.tensor([0, 0, 0, 0, 1, 1])
    assert protected_gates(psi, segments, 0.0).tolist() == [False, True, False, False, True, False]
    assert protected_gates(psi, segments, 0.5).tolist() == [False, True, False, True, True, False]


def test_a_share_that_is_whole_is_not_rounded_up() -> None:
    """ceil(0.1 * 30) is 3, although 0.1 * 30 = 3.0000000000000004 in floating point."""
    assert int(protected_gates(torch.arange(30.0), torch.zeros(30), 0.1).sum()) == 3


def test_a_whole_budget_keeps_all() -> None:
    layout = layout_of("flattened")
    assert bool(harden(layout, torch.randn(layout.size), 1.0, "flops").all())


def test_a_budget_below_the_smallest_cost_is_refused_with_that_cost() -> None:
    layout = layout_of("residual")
    only = protected_gates(torch.zeros(layout.size), layout.segments, 0.5)
    smallest = layout.hard_cost(only, "channels") / layout.size
    with pytest.raises(ValueError, match=f"`budget` must be at least {smallest:.4f} for 'channels'.*got 0.3"):
        harden(layout, torch.zeros(layout.size), 0.3, "channels", 0.5)


def test_rounding_drops_the_smallest_psi() -> None:
    layout = layout_of("residual")
    psi = torch.arange(layout.size).float()
    gates = harden(layout, psi, 0.8, "channels")
    even = rounded(layout, gates, psi, 2)
    assert bool((even <= gates).all())
    for index, group in enumerate(layout.costs.groups):
        members = layout.group_of_unit == index
        assert int(even[members].sum()) % 2 == 0 or int(even[members].sum()) in (1, len(group))
        assert bool((psi[members][even[members]].min() > psi[members][gates[members] & ~even[members]]).all())


# one gate per channel of every norm


def test_a_stream_leaves_only_where_all_its_contributors_are_off() -> None:
    """The norms on a residual stream have gates of their own; a unit is kept while one of them is on."""
    layout = layout_of("residual", "per_layer")
    assert layout.size > len(layout.group_of_unit)
    unit = int(torch.bincount(layout.units).argmax())
    mine = layout.units == unit
    assert int(mine.sum()) > 1
    gates = torch.ones(layout.size, dtype=torch.bool)
    gates[mine.nonzero().flatten()[1:]] = False
    assert layout.hard_cost(gates, "channels") == len(layout.group_of_unit)
    gates[mine] = False
    assert layout.hard_cost(gates, "channels") == len(layout.group_of_unit) - 1


def test_soft_units_are_the_union_of_their_gates() -> None:
    """1 - (1 - 0.5) (1 - 0.2) = 0.6."""
    layout = layout_of("residual", "per_layer")
    unit = int(torch.bincount(layout.units).argmax())
    mine = (layout.units == unit).nonzero().flatten()
    gates = torch.zeros(layout.size, dtype=torch.float64)
    gates[mine[:2]] = torch.tensor([0.5, 0.2], dtype=torch.float64)
    assert float(layout.units_kept(gates)[unit]) == pytest.approx(0.6)


@pytest.mark.parametrize("name", FAMILIES)
def test_gates_of_norms_scale_weight_and_bias_together(name: str) -> None:
    layout = layout_of(name, "per_layer")
    by_name = {slot.name: slot.gates for slot in layout.slots}
    norms = [key for key in by_name if key.endswith(".bias")]
    assert norms
    assert all(torch.equal(by_name[key], by_name[key.removesuffix("bias") + "weight"]) for key in norms)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [0.1, 0.5, 0.9])
def test_the_uniform_width_meets_the_budget(kind: Kind, budget: float) -> None:
    layout = layout_of("residual")
    width = uniform_width(layout, budget, kind)
    share = layout.share(torch.full((layout.size,), width, dtype=torch.float64), kind)
    assert float(share) == pytest.approx(budget, abs=1e-4) or (width < 1e-5 and float(share) > budget)


def test_every_group_keeps_half_of_the_uniform_width_unless_that_costs_too_much() -> None:
    layout = layout_of("residual")
    assert floor_within(layout, 0.5, "channels") == pytest.approx(0.25, abs=1e-5)
    floor = floor_within(layout, 0.5, "flops")
    assert floor == pytest.approx(uniform_width(layout, 0.5, "flops") / 2)
    least = smallest_share(layout, "flops", 0.0)
    assert smallest_share(layout, "flops", uniform_width(layout, least, "flops") / 2) > least
    assert floor_within(layout, least, "flops") == 0.0  # one channel of every group is all that fits
