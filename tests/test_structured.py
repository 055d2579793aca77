"""Channels under a budget: Magnitude and RandomPruning in a Trainer, by prune(), and in the receipt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integration.test_distributed import ddp, without_norm
from integration.test_resume import each_checkpoint, train
from integration.toys import QUIET, STEPS, Toy, fit, same, toy, toy_data, toy_loader, toy_loss, weights_of
from torch import Tensor, nn

from lightning_prune import Magnitude, MaskManager, RandomPruning, prune, shrink
from lightning_prune.channels import Channels, shares
from lightning_prune.cost import KINDS, CostModel
from lightning_prune.dependency import channel_groups
from lightning_prune.shrink import removable_units, report_of

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*use of fork")]
METHODS = [Magnitude, RandomPruning]


class Wide(Toy):
    """The toy with enough channels for a budget to be met closely."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.conv = nn.Conv2d(1, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.hidden = nn.Linear(256, 24)
        self.head = nn.Linear(24, 3)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(3))


def cost_of(module: nn.Module, kind: str) -> tuple[int, int]:
    """Dense cost and that of the units which masks leave."""
    groups = channel_groups(module, images())
    costs = CostModel(groups)
    kept = {name: int(mask.sum()) for name, mask in removable_units(module, groups).items()}
    return costs.cost(kind), costs.cost(kind, kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", METHODS)
@pytest.mark.parametrize("budget", [0.9, 0.5, 0.23])
def test_the_budget_is_met_within_one_channel(make: Any, kind: str, budget: float) -> None:
    module = toy(kind=Wide).eval()
    prune(module, make(budget=budget, budget_type=kind, refit_consumers=False), example_input=images())
    dense, left = cost_of(module, kind)
    groups = channel_groups(toy(kind=Wide).eval(), images())
    costs = CostModel(groups)
    dearest = max(costs.cost(kind) - costs.cost(kind, {group.name: len(group) - 1}) for group in groups)
    assert budget * dense - dearest < left <= budget * dense


def test_a_channel_scores_the_mean_norm_of_its_slabs() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        net[0].bias.copy_(torch.tensor([1.0, -2.0]))
        net[2].weight.copy_(torch.tensor([[6.0, -3.0]]))
    selected = {name: torch.ones_like(net.get_parameter(name), dtype=torch.bool) for name in ("0.weight", "2.weight")}
    channels = Channels(net, channel_groups(net, torch.zeros(1, 2)), selected)
    (scores,) = channels.unit_norms().values()
    assert scores.tolist() == pytest.approx([(5 + 1 + 6) / 3, (1 + 2 + 3) / 3])


def test_the_weakest_channel_goes_from_every_parameter() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        net[0].weight[1] = 0.001
        net[0].bias[1] = 0.001
        net[2].weight[0, 1] = 0.001
    prune(net, Magnitude(budget=0.5, budget_type="channels"), example_input=torch.zeros(1, 2))
    masks = MaskManager.of(net).masks
    assert masks["0.weight"].tolist() == [[True, True], [False, False]]
    assert masks["0.bias"].tolist() == [True, False]
    assert masks["2.weight"].tolist() == [[True, False]]
    assert net[0].bias.tolist()[1] == 0.0


def test_shares_take_the_same_part_of_every_group() -> None:
    ranked = shares({"a": torch.tensor([5.0, 9.0]), "b": torch.tensor([0.1, 0.3, 0.2, 0.2])})
    assert ranked["a"].tolist() == [0.5, 1.0]
    assert ranked["b"].tolist() == [0.25, 1.0, 0.5, 0.75]


def test_scope_layer_keeps_the_same_part_of_every_group() -> None:
    module = toy(kind=Wide)
    prune(module, Magnitude(budget=0.5, budget_type="channels", scope="layer"), example_input=images())
    kept = [int(mask.sum()) for mask in removable_units(module, channel_groups(module, images())).values()]
    assert kept == [8, 12]


def test_min_keep_and_round_to_hold_in_every_group() -> None:
    module = toy(kind=Wide)
    prune(module, Magnitude(budget=0.3, budget_type="params", min_keep=4, round_to=4), example_input=images())
    kept = [int(mask.sum()) for mask in removable_units(module, channel_groups(module, images())).values()]
    assert min(kept) >= 4
    assert [count % 4 for count in kept] == [0, 0]


@pytest.mark.parametrize("make", METHODS)
def test_in_a_trainer_channels_stay_gone_and_the_receipt_tells_real_costs(make: Any) -> None:
    module = toy(kind=Wide)
    callback = make(budget=0.5, budget_type="flops", at=1)
    fit(module, callback, max_epochs=2)
    masks = MaskManager.of(module).masks
    assert all(bool((weights_of(module)[name][~mask] == 0).all()) for name, mask in masks.items())
    reached = callback.receipt.reached
    assert callback.receipt.requested == {"budget": 0.5, "budget_type": "flops"}
    small = shrink(module, images())
    assert reached["flops"]["pruned"] <= 0.5 * reached["flops"]["dense"]
    assert reached["params"]["pruned"] == sum(p.numel() for p in small.parameters())
    assert (reached["channels"]["dense"], reached["channels"]["pruned"]) == cost_of(module, "channels")
    assert report_of(small).refused == {}
    assert callback.receipt.milliseconds["exported"]["median"] > 0
    assert callback.receipt.bytes["pruned"] < callback.receipt.bytes["dense"]


def test_rounds_of_falling_budgets_go_on_from_what_is_left() -> None:
    module = toy(kind=Wide)
    callback = Magnitude(budget_type="channels", at=[("start", 0.8), (1, 0.5)], refit_consumers=False)
    fit(module, callback, max_epochs=2)
    assert [event["requested"] for event in callback.history] == [0.8, 0.5]
    assert cost_of(module, "channels") == (40, 20)


@pytest.mark.parametrize("make", METHODS)
def test_resumed_between_two_budgets_equals_never_stopped(make: Any, tmp_path: Path) -> None:
    def pruner() -> Any:
        return make(budget_type="flops", at=[("start", 0.9), (1, 0.7), (2, 0.5)], measure=False)

    whole = train([pruner()])
    train([pruner(), each_checkpoint(tmp_path)], enable_checkpointing=True)
    resumed = train([pruner()], resume=tmp_path / f"epoch=1-step={STEPS + 3}.ckpt")
    assert all(same(one, two) for one, two in zip(whole, resumed, strict=True))


def test_two_processes_remove_the_same_channels(tmp_path: Path) -> None:
    one, two = ddp(tmp_path, Magnitude(budget=0.5, budget_type="flops", at=1, measure=False), max_epochs=2)
    assert same(one["masks"], two["masks"])
    assert same(without_norm(one["weights"]), without_norm(two["weights"]))
    assert not one["masks"]["conv.weight"].all() or not one["masks"]["hidden.weight"].all()


def test_channels_that_are_gone_count_as_gone() -> None:
    module = toy(kind=Wide)
    prune(module, RandomPruning(budget=0.6, budget_type="channels"), example_input=images())
    first = removable_units(module, channel_groups(module, images()))
    prune(module, Magnitude(budget=0.5, budget_type="channels"), example_input=images())
    second = removable_units(module, channel_groups(module, images()))
    assert cost_of(module, "channels") == (40, 20)
    assert all(not bool((second[name] & ~first[name]).any()) for name in first)


def test_a_sparsity_after_a_budget_counts_all_that_is_gone() -> None:
    module = toy(kind=Wide)
    prune(module, Magnitude(budget=0.7, budget_type="params"), example_input=images())
    receipt = prune(module, Magnitude(sparsity=0.9))
    selected = ("conv.weight", "hidden.weight", "head.weight")
    kept = sum(int(MaskManager.of(module).masks[name].sum()) for name in selected)
    total = sum(module.get_parameter(name).numel() for name in selected)
    assert kept == total - int(0.9 * total + 1e-9)
    assert receipt.requested == {"sparsity": 0.9}


def test_a_refit_lowers_the_error_of_the_next_layer() -> None:
    errors = {}
    for refit in (False, True):
        module, dense = toy(kind=Wide).eval(), toy(kind=Wide).eval()
        batches = list(toy_loader())
        prune(module, RandomPruning(budget=0.5, budget_type="channels", refit_consumers=refit), batches, toy_loss)
        data = toy_data().tensors[0]
        errors[refit] = (module(data) - dense(data)).square().mean().item()
    assert errors[True] < errors[False]


def test_a_failed_trace_changes_nothing() -> None:
    module = toy(kind=Wide)
    before = weights_of(module)
    with pytest.raises(ValueError, match="must be accepted"):
        prune(module, Magnitude(budget=0.5), example_input=torch.zeros(1, 2, 3))
    assert same(before, weights_of(module))
    assert not MaskManager.of(module).masks


def test_without_data_or_example_it_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="needs data"):
        prune(toy(kind=Wide), Magnitude(budget=0.5))


def test_a_budget_below_what_stays_is_refused_with_the_smallest_one() -> None:
    with pytest.raises(ValueError, match=r"`budget` must be at least 0\.\d+ for 'flops'"):
        prune(toy(kind=Wide), Magnitude(budget=0.001, budget_type="flops"), example_input=images())


def test_groups_outside_the_selection_stay_whole() -> None:
    module = toy(kind=Wide)
    prune(module, Magnitude(budget=0.8, budget_type="channels", include=["hidden", "head"]), example_input=images())
    assert "conv.weight" not in MaskManager.of(module).masks
    assert cost_of(module, "channels") == (40, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0.0}, r"`budget` must be in \(0, 1\]"),
        ({"budget": 50}, r"`budget` must be in \(0, 1\]"),
        ({"budget": 0.5, "sparsity": 0.5}, "`sparsity` must be left out with a budget"),
        ({"budget_type": "flops"}, r"`budget` must be in \(0, 1\] with a `budget_type`"),
        ({"budget": 0.5, "budget_type": "watts"}, "`budget_type` must be one of"),
        ({"budget": 0.5, "budget_type": "flops", "at": [(0, 0.5)]}, "`budget` must be left out when `at` lists"),
        ({"budget_type": "flops", "at": [(0, 0.5), (1, 0.8)]}, "budgets that do not grow"),
        ({"budget": 0.5, "min_keep": 0}, "`min_keep` must be an integer >= 1"),
        ({"budget": 0.5, "round_to": 0}, "`round_to` must be an integer >= 1"),
        ({"budget": 0.5, "refit_consumers": 1}, "`refit_consumers` must be true or false"),
        ({}, r"`sparsity` must be in \[0, 1\)"),
    ],
)
@pytest.mark.parametrize("make", METHODS)
def test_bad_arguments_are_refused(make: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_a_pattern_removes_no_channel() -> None:
    with pytest.raises(ValueError, match="`budget` must be left out with `pattern`"):
        Magnitude(pattern="2:4", budget=0.5)
