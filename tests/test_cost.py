"""Costs as functions of kept units: against counts of the shrunk module, and against hand arithmetic."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "dependency"))
from dependency_nets import NETS, conv, images, pooled

from lightning_prune.cost import CostModel, units_within_budget
from lightning_prune.dependency import channel_groups
from lightning_prune.measure import count_flops, count_parameters
from lightning_prune.shrink import shrink


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l, self.o = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.l(x)[0])


def two_layers() -> tuple[nn.Module, Tensor]:
    """Linear 6 -> 8 -> 3: 6 * 8 + 8 + 8 * 3 + 3 = 83 parameters."""
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6)


def halves(groups: Any, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in groups:
        count = int(torch.randint(1, len(group) + 1, (), generator=generator))
        kept[group.name] = torch.randperm(len(group), generator=generator) < count
    return kept


@pytest.mark.parametrize("name", [name for name in NETS if NETS[name][2] and name != "width_from_input"])
def test_predictions_equal_the_counts_of_the_shrunk_module(name):
    factory, example, _ = NETS[name]
    module, inputs = factory(), example()
    groups = channel_groups(module, inputs)
    costs = CostModel(groups)
    assert costs.params() == count_parameters(module)
    assert costs.counted_flops() == count_flops(module, inputs)
    units = halves(groups)
    small = shrink(module, inputs, units, groups)
    kept = {name: int(mask.sum()) for name, mask in units.items()}
    assert costs.params(kept) == count_parameters(small)
    assert costs.counted_flops(kept) == count_flops(small, inputs)
    assert costs.channels(kept) == sum(kept.values())


def test_two_layers_by_hand():
    module, x = two_layers()
    costs = CostModel(channel_groups(module, x))
    assert costs.params([5]) == 6 * 5 + 5 + 5 * 3 + 3
    assert costs.flops([5]) == 2 * 4 * (6 * 5 + 5 * 3)
    assert costs.volume([5]) == 4 * (5 + 5 + 3)
    assert costs.channels([5]) == 5
    assert costs.unseen == ()


def test_volume_counts_no_views_and_no_dropout():
    module = nn.Sequential(conv(3, 4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(256, 5))
    costs = CostModel(channel_groups(module, images()))
    assert costs.volume() == 2 * (4 * 64 + 5)


def test_residual_streams_cost_the_square_of_their_width():
    factory, example, _ = NETS["residual"]
    costs = CostModel(channel_groups(factory(), example()))
    marginal = [costs.params({"a": k}) - costs.params({"a": k - 1}) for k in (8, 5)]
    assert marginal == [3 * 9 + 1 + 2 * 8 * 9] * 2
    assert costs.params({"a": 3, "b": 2}) == 3 * (27 + 1) + 2 * 2 * (3 * 9 + 1) + 5 * 2 + 5


def test_recurrent_layers_that_the_counter_misses_are_counted_and_named():
    module, x = Lstm(), torch.randn(2, 5, 6)
    costs = CostModel(channel_groups(module, x))
    assert costs.unseen == ("lstm",)
    assert costs.flops() - costs.counted_flops() == 2 * 2 * 5 * (4 * 8 * 6 + 4 * 8 * 8)
    assert costs.counted_flops() == count_flops(module, x)


def test_attention_that_the_counter_misses_is_counted_and_named():
    factory, example, _ = NETS["heads"]
    costs = CostModel(channel_groups(factory(), example()))
    assert costs.unseen == ("scaled_dot_product_attention",)
    assert costs.flops([2]) - costs.counted_flops([2]) == 2 * 2 * (2 * 2 * 5 * 5 * 4)


@pytest.mark.parametrize("kind", ["params", "flops", "volume", "channels"])
def test_soft_costs_equal_exact_ones_and_have_their_slope(kind):
    factory, example, _ = NETS["squeeze_excite"]
    costs = CostModel(channel_groups(factory(), example()))
    kept = torch.tensor([5.0, 3.0], dtype=torch.float64, requires_grad=True)
    value = costs.cost(kind, kept)
    assert float(value.detach()) == costs.cost(kind, [5, 3])
    value.backward()
    step = 1e-6
    for index in range(2):
        above, below = ([5.0, 3.0], [5.0, 3.0])
        above[index] += step
        below[index] -= step
        up, down = (float(costs.cost(kind, torch.tensor(k, dtype=torch.float64))) for k in (above, below))
        assert kept.grad is not None
        assert float(kept.grad[index]) == pytest.approx((up - down) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("kind", ["params", "flops", "volume", "channels"])
@pytest.mark.parametrize("seed", range(5))
def test_budgets_are_met_and_the_last_unit_was_needed(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    factory, example, _ = NETS[["residual", "concatenated", "flattened", "grouped", "tied"][seed]]
    groups = channel_groups(factory(), example())
    costs = CostModel(groups)
    scores = {group.name: torch.rand(len(group), generator=generator) for group in groups}
    floor = costs.cost(kind, dict.fromkeys(scores, 1)) / costs.cost(kind)
    budget = floor + (1 - floor) * float(torch.rand((), generator=generator))
    kept = units_within_budget(scores, costs, budget, kind)
    counts = {name: int(mask.sum()) for name, mask in kept.items()}
    target = budget * costs.cost(kind)
    assert costs.cost(kind, counts) <= target + 1e-6
    removed = [(float(scores[name][unit]), name) for name in kept for unit in torch.nonzero(~kept[name]).ravel()]
    if removed:
        last = max(removed)[1]
        assert costs.cost(kind, {**counts, last: counts[last] + 1}) > target


def test_lowest_scores_leave_first():
    module, x = two_layers()
    costs = CostModel(channel_groups(module, x))
    scores = {"0": torch.tensor([5.0, 1.0, 7.0, 3.0, 2.0, 8.0, 6.0, 4.0])}
    kept = units_within_budget(scores, costs, 0.5, "channels")
    assert kept["0"].tolist() == [True, False, True, False, False, True, True, False]


def test_every_group_keeps_its_minimum():
    module, x = two_layers()
    costs = CostModel(channel_groups(module, x))
    kept = units_within_budget({"0": torch.arange(8.0)}, costs, 0.4, "channels", min_keep=3)
    assert kept["0"].tolist() == [False] * 5 + [True] * 3


def test_rounding_stays_within_the_budget():
    module, x = two_layers()
    costs = CostModel(channel_groups(module, x))
    kept = units_within_budget({"0": torch.arange(8.0)}, costs, 0.9, "channels", round_to=4)
    assert int(kept["0"].sum()) == 4


def test_whole_budget_keeps_all():
    module, x = two_layers()
    costs = CostModel(channel_groups(module, x))
    assert units_within_budget({"0": torch.arange(8.0)}, costs, 1.0)["0"].all()


def test_unreachable_budget_names_the_smallest_reachable_value():
    module, x = two_layers()
    costs = CostModel(channel_groups(module, x))
    with pytest.raises(ValueError, match=r"`budget` must be at least 0.1566 .*13 of 83 remain, got 0.1"):
        units_within_budget({"0": torch.arange(8.0)}, costs, 0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0.0}, r"`budget` must be in \(0, 1\]"),
        ({"budget": 50}, r"`budget` must be in \(0, 1\]"),
        ({"kind": "joules"}, "`kind` must be one of"),
        ({"min_keep": 0}, "`min_keep` must be an integer >= 1"),
        ({"round_to": 0}, "`round_to` must be an integer >= 1"),
        ({"scores": {"0": torch.zeros(7)}}, r"must have shape \(8,\), got \(7,\)"),
        ({"scores": {"9": torch.zeros(8)}}, "must be one of the groups"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    module, x = two_layers()
    arguments: dict[str, Any] = {"scores": {"0": torch.arange(8.0)}, "budget": 0.5, **changes}
    with pytest.raises(ValueError, match=message):
        units_within_budget(costs=CostModel(channel_groups(module, x)), **arguments)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([1, 2], "must have one entry for each of 1 groups, got 2"),
        ([9], "must be in 0 to 8 for group '0', got 9"),
        ({"z": 1}, "must name groups"),
        (torch.ones(2), r"must have shape \(1,\)"),
    ],
)
def test_wrong_counts_are_refused(kept, message):
    module, x = two_layers()
    with pytest.raises(ValueError, match=message):
        CostModel(channel_groups(module, x)).params(kept)


def test_unknown_cost_is_refused():
    module, x = two_layers()
    with pytest.raises(ValueError, match="`kind` must be one of"):
        CostModel(channel_groups(module, x)).cost("joules")  # type: ignore[arg-type]


def test_parameters_outside_the_graph_are_counted():
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.spare = conv(3, 4), nn.Linear(4, 2), nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(pooled(self.a(x)))

    module = Spare()
    assert CostModel(channel_groups(module, images())).params() == count_parameters(module)
