"""Periods, caps, ranking and fading: pure arithmetic, without a Trainer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prox_cases import group_table
from torch import Tensor, nn, tensor

from lightning_prune.methods._hspg_plan import (
    Target,
    boundaries,
    caps,
    cubic_share,
    linear_share,
    normalised,
    removable,
)
from lightning_prune.methods._hspg_target import TargetHalfSpace
from lightning_prune.methods._hspg_variants import Dhspg, Hesso, hesso_saliency, penalty_window, redundancy
from lightning_prune.methods._prox_parts import GroupPart

BLOCKS = tensor([0, 0, 0, 0, 1, 1])


def test_periods_end_evenly_and_the_last_at_the_end() -> None:
    assert boundaries(10, 30, 4) == [15, 20, 25, 30]
    assert boundaries(0, 3, 10) == [1, 2, 3]
    assert boundaries(5, 5, 3) == [5]
    assert boundaries(1, 8, 3) == [4, 6, 8]


def test_shares_rise_to_one() -> None:
    assert [cubic_share(p) for p in (0.0, 0.5, 1.0)] == [0.0, 0.875, 1.0]
    assert [linear_share(p) for p in (0.0, 0.5, 1.5)] == [0.0, 0.5, 1.0]


def test_caps_respect_the_ratio_what_is_kept_and_what_is_gone() -> None:
    assert caps([10, 16, 1, 4], 0.9, 1, [0, 0, 0, 0]) == [9, 14, 0, 3]
    assert caps([10, 16], 1.0, 4, [0, 0]) == [6, 12]
    assert caps([10, 3], 0.5, 8, [7, 0]) == [7, 0]


def test_scores_are_compared_within_their_block() -> None:
    scores = tensor([1.0, 3.0, 8.0, 4.0, 10.0, 30.0])
    live = tensor([True, True, False, True, True, True])
    found = normalised(scores, BLOCKS, live)
    assert found[live].tolist() == pytest.approx([1 / (8 / 3), 3 / (8 / 3), 4 / (8 / 3), 0.5, 1.5])
    assert normalised(torch.zeros(6), BLOCKS, live).tolist() == [0.0] * 6


def test_the_lowest_leave_first_and_blocks_keep_what_they_must() -> None:
    scores = tensor([5.0, 1.0, 4.0, 0.0, 2.0, 1.0])
    gone = tensor([False, False, False, True, False, False])
    assert removable(scores, BLOCKS, gone, [3, 1]) == [1, 5, 2]
    assert removable(torch.zeros(6), BLOCKS, torch.zeros(6, dtype=torch.bool), [2, 2]) == [0, 1, 4, 5]


# targets


@pytest.mark.parametrize(("sparsity", "count"), [(0.0, 0), (0.1, 10), (0.29, 29), (0.5, 50), (0.7, 70), (0.9, 90)])
def test_the_count_is_exact_for_every_sparsity(sparsity: float, count: int) -> None:
    target = Target(["a", "b"], [60, 40], sparsity)
    nothing = torch.zeros(100, dtype=torch.bool)
    assert len(target.chosen(range(100), torch.zeros(100).long(), nothing, 1.0)) == count
    some = nothing.clone()
    some[:5] = True
    assert len(target.chosen(range(5, 100), torch.zeros(100).long(), some, 1.0)) == max(count - 5, 0)


def test_parts_of_a_target_follow_the_schedule() -> None:
    target, nothing = Target(["a"], [40], 0.5), torch.zeros(40, dtype=torch.bool)
    assert [len(target.chosen(range(40), nothing.long(), nothing, s)) for s in (0.0, 0.25, 1.0)] == [0, 5, 20]
    assert [target.at(share) for share in (0.0, 0.5, 1.0)] == [0.0, 0.25, 0.5]
    assert Target(["a"], [40], budget=0.4).at(0.5) == 0.7


class Costs:
    """Block a costs 10 a group, block b 1."""

    def cost(self, kind: str, kept: Any = None) -> int:
        kept = {"a": 4, "b": 2} if kept is None else kept
        return 10 * kept["a"] + kept["b"]


def test_a_budget_stops_at_the_first_removal_that_meets_it() -> None:
    target = Target(["a", "b"], [4, 2], budget=0.5, costs=Costs())  # type: ignore[arg-type]
    nothing = torch.zeros(6, dtype=torch.bool)
    assert target.chosen([4, 0, 1, 5, 2], BLOCKS, nothing, 1.0) == [4, 0, 1]  # 42 -> 41 -> 31 -> 21
    assert target.chosen([4, 0, 1, 5, 2], BLOCKS, nothing, 0.5) == [4, 0]  # 0.75 of 42 is 31.5
    assert target.chosen([4, 5], BLOCKS, tensor([True, True, False, False, False, False]), 1.0) == [4]


def test_a_sparsity_beyond_the_caps_is_refused_with_the_blocks_and_what_can_be_reached() -> None:
    target = Target(["conv1", "conv2"], [10, 4], 0.9)
    with pytest.raises(
        ValueError, match=r"`sparsity`=0.9 asks for 12 of 14 channels, but at most 11 .*conv1 9 of 10, conv2 2"
    ):
        target.check([9, 2], "Raise `max_ratio`.")
    with pytest.raises(ValueError, match=r"0\.7857 can be reached\. Raise `max_ratio`\."):
        target.check([9, 2], "Raise `max_ratio`.")
    target.check([10, 3], "")


def test_a_budget_beyond_the_caps_is_refused_with_what_remains() -> None:
    target = Target(["a", "b"], [4, 2], budget=0.1, costs=Costs())  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"`budget`=0.1 of flops cannot be reached: .*\(a 3 of 4, b 1 of 2\), 0\.2619 remains"
    ):
        target.check([3, 1], "")
    target.check([4, 2], "")


# fading


def engine(kind: Any, weights: nn.Parameter, size: int, target: float, **arguments: Any) -> Any:
    """An engine on a vector of groups, stepped by SGD at rate 0.1."""
    part = GroupPart(torch.optim.SGD([weights], lr=0.1), group_table(weights, size))
    groups = part.table.count
    plan = {"begin": 1, "ends": [5], "share": linear_share, "target": Target(["groups"], [groups], target)}
    return kind(layout=SimpleNamespace(parts=[part], channels=None), **{**plan, **arguments})


def advance(removal: Any, weights: nn.Parameter, step: int, gradient: Tensor | None = None) -> Tensor:
    """One optimizer step with a removal around it."""
    (part,) = removal.parts
    weights.grad = torch.zeros_like(weights) if gradient is None else gradient
    removal.before(part, step)
    part.optimizer.step()
    removal.after(part, step)
    removal.advance(step + 1)
    return weights.detach().clone()


def test_a_chosen_group_fades_evenly_to_zero_and_the_others_stay() -> None:
    weights = nn.Parameter(tensor([1.0, 1.0, 4.0, 4.0]))
    removal = engine(TargetHalfSpace, weights, 2, 0.5, saliency="magnitude")
    seen = [advance(removal, weights, step) for step in range(5)]
    assert [float(values[0]) for values in seen] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert all(values[2:].tolist() == [4.0, 4.0] for values in seen)
    assert removal.parts[0].zero.tolist() == [True, False]


def test_fading_reaches_zero_against_a_gradient_that_grows_the_group() -> None:
    weights = nn.Parameter(tensor([1.0, 1.0, 4.0, 4.0]))
    removal = engine(TargetHalfSpace, weights, 2, 0.5, saliency="magnitude")
    gradient = tensor([-3.0, -3.0, 0.0, 0.0])
    seen = [advance(removal, weights, step, gradient) for step in range(5)]
    assert float(seen[3][0]) > 0.0
    assert seen[4].tolist() == [0.0, 0.0, 4.0, 4.0]


def test_a_group_that_crosses_its_half_space_is_gone_early_and_for_good() -> None:
    weights = nn.Parameter(tensor([1.0, 1.0, 4.0, 4.0]))
    removal = engine(TargetHalfSpace, weights, 2, 0.5, saliency="magnitude")
    advance(removal, weights, 0)
    crossed = advance(removal, weights, 1, tensor([20.0, 20.0, 0.0, 0.0]))
    assert crossed.tolist() == [0.0, 0.0, 4.0, 4.0]
    assert advance(removal, weights, 2, tensor([-20.0, -20.0, 0.0, 0.0])).tolist() == [0.0, 0.0, 4.0, 4.0]


def test_a_wide_half_space_zeroes_sooner() -> None:
    ends = []
    for eps in (0.0, 0.9):
        weights = nn.Parameter(tensor([1.0, 1.0, 4.0, 4.0]))
        removal = engine(TargetHalfSpace, weights, 2, 0.5, saliency="magnitude", eps=eps)
        seen = [advance(removal, weights, step) for step in range(5)]
        ends.append([float(values[0]) for values in seen].index(0.0))
    assert ends == [4, 1]


def test_the_saliency_is_the_running_mean_of_the_inner_product_with_the_gradient() -> None:
    weights = nn.Parameter(tensor([1.0, -2.0, 3.0, 4.0]))
    removal = engine(TargetHalfSpace, weights, 2, 0.5, beta=0.5, begin=9, ends=[10])
    gradient = tensor([0.5, 0.25, -1.0, 0.5])
    advance(removal, weights, 0, gradient.clone())
    assert removal.running[0].tolist() == pytest.approx([0.0, 0.5])  # half of |0.5 - 0.5| and of |-3 + 2|
    after = weights.detach().clone().view(2, 2)
    advance(removal, weights, 1, gradient.clone())
    second = (after * gradient.view(2, 2)).sum(1).abs()
    assert removal.running[0].tolist() == pytest.approx((0.5 * tensor([0.0, 0.5]) + 0.5 * second).tolist())


def test_the_group_the_loss_depends_on_least_is_chosen() -> None:
    weights = nn.Parameter(tensor([9.0, 9.0, 1.0, 1.0]))
    removal = engine(TargetHalfSpace, weights, 2, 0.5)
    advance(removal, weights, 0, tensor([0.0, 0.01, 2.0, 2.0]))
    assert removal.leaving[0].tolist() == [True, False]


def test_hesso_multiplies_by_what_is_left_of_the_period() -> None:
    weights = nn.Parameter(tensor([1.0, 1.0, 4.0, 4.0]))
    removal = engine(Hesso, weights, 2, 0.5)
    seen = [advance(removal, weights, step) for step in range(5)]
    assert [float(values[0]) for values in seen] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


def test_hesso_saliency_by_hand() -> None:
    products, sizes, steps, entries = tensor([3.0, -4.0]), tensor([3.0, 4.0]), tensor([1.0, 2.0]), tensor([1.0, 2.0])
    criteria = [[3.0, 4.0], [3.0, 2.0], [2.0, 0.5], [3.0, 4.0], [4.5, 8.0]]
    expected = sum(0.2 * tensor(c) / tensor(c).norm() for c in criteria)
    assert hesso_saliency(products, sizes, steps, entries).tolist() == pytest.approx(expected.tolist())
    assert hesso_saliency(*(torch.zeros(2) for _ in range(3)), entries).isfinite().all()


def test_small_groups_that_the_step_shrinks_are_redundant() -> None:
    products, sizes, steps = tensor([1.0, -1.0, 0.0]), tensor([1.0, 1.0, 1.0]), torch.ones(3)
    found = redundancy(products, sizes, steps, torch.ones(3))
    assert found.argsort(descending=True).tolist() == [0, 2, 1]
    assert redundancy(torch.zeros(2), tensor([0.1, 1.0]), torch.ones(2), torch.ones(2)).argmax() == 0


def test_a_penalty_inside_the_window_shrinks_the_group_and_lowers_the_loss() -> None:
    x, d = torch.randn(5000, 4).double(), torch.randn(5000, 4).double()
    growing = (x * d).sum(1) < 0
    x, d = x[growing], d[growing]
    low, high = penalty_window((x * d).sum(1), x.norm(dim=1), d.norm(dim=1))
    change = -(d + (0.5 * (low + high) / x.norm(dim=1)).unsqueeze(1) * x)
    assert bool((low <= high).all())
    assert bool(((x * change).sum(1) <= 1e-12).all())
    assert bool(((d * change).sum(1) <= 1e-12).all())


def dhspg(weights: nn.Parameter, target: float, **arguments: Any) -> Any:
    return engine(
        Dhspg, weights, 2, target, penalty=1.0, amplify=2.0, ceiling=10.0, eps=0.9, tolerance=0.5, **arguments
    )


def test_dhspg_shrinks_the_redundant_and_leaves_the_others_alone() -> None:
    weights = nn.Parameter(tensor([0.4, 0.4, 1.0, 1.0, 4.0, 4.0, 5.0, 5.0]))
    removal = dhspg(weights, 0.25)
    seen = [advance(removal, weights, step) for step in range(4)]
    assert removal.leaving[0].tolist() == [True, True, True, False]
    assert seen[1][:2].norm() < seen[0][:2].norm()
    assert seen[1][:2].tolist() == [0.0, 0.0]  # 0.1 of its norm 0.57 is more than a tenth: outside the half-space
    assert seen[3][6:].tolist() == [5.0, 5.0]


def test_dhspg_never_zeroes_more_than_asked_and_then_lets_all_train() -> None:
    weights = nn.Parameter(tensor([0.4, 0.4, 0.3, 0.3, 0.35, 0.35, 5.0, 5.0]))
    removal = dhspg(weights, 0.5)
    advance(removal, weights, 0)
    advance(removal, weights, 1)
    assert removal.parts[0].zero.tolist() == [
        False,
        True,
        True,
        False,
    ]  # the two smallest ratios of the three that left
    before = weights.detach()[:2].clone()
    assert torch.equal(advance(removal, weights, 2)[:2], before)
