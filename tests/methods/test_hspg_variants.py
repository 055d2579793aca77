"""The published rules of DHSPG and HESSO, one by one, by hand and against plain loops."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prox_cases import group_table
from torch import Tensor, nn, tensor

from lightning_prune import DHSPG, HESSO
from lightning_prune.methods._hspg_plan import Target, linear_share
from lightning_prune.methods._hspg_variants import Dhspg, Hesso, published_penalty, redundancy
from lightning_prune.methods._prox_parts import GroupPart

RATE = 0.1


def part_of(weights: nn.Parameter, size: int = 2, momentum: float = 0.0) -> GroupPart:
    return GroupPart(torch.optim.SGD([weights], lr=RATE, momentum=momentum), group_table(weights, size))


def engine(kind: Any, part: GroupPart, target: float, ends: tuple[int, ...] = (9,), **arguments: Any) -> Any:
    goal = Target(["groups"], [part.table.count], target)
    plan = {"begin": 1, "ends": list(ends), "share": linear_share, "target": goal}
    return kind(layout=SimpleNamespace(parts=[part], channels=None), **{**plan, **arguments})


def dhspg(part: GroupPart, target: float, penalty: Any = 1.0, **arguments: Any) -> Dhspg:
    published = {"amplify": 2.0, "ceiling": 10.0, "eps": 0.0, "tolerance": 0.05}
    return engine(Dhspg, part, target, penalty=penalty, **{**published, **arguments})


def step(removal: Any, index: int, gradient: Tensor) -> Tensor:
    (part,) = removal.parts
    (weights,) = part.tensors
    weights.grad = gradient.clone()
    removal.before(part, index)
    part.optimizer.step()
    removal.after(part, index)
    removal.advance(index + 1)
    return weights.detach().clone()


def groups(count: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(2 * count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


# DHSPG


def test_redundancy_by_hand() -> None:
    """Half the cosine, half 1 / (||x|| / |g| + 1e-6), each over its norm over all groups."""
    products, sizes, steps, entries = tensor([2.0, -3.0]), tensor([2.0, 6.0]), tensor([1.0, 1.0]), tensor([4.0, 3.0])
    cosines, inverses = [1.0, -0.5], [1 / (0.5 + 1e-6), 1 / (2.0 + 1e-6)]
    expected = [
        0.5 * c / math.hypot(*cosines) + 0.5 * i / math.hypot(*inverses) for c, i in zip(cosines, inverses, strict=True)
    ]
    assert redundancy(products, sizes, steps, entries).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("target", "tolerance", "count"), [(0.5, 0.05, 11), (0.29, 0.05, 6), (0.98, 0.05, 19), (0.0, 0.05, 0)]
)
def test_the_candidates_are_the_most_redundant_some_more_than_asked(
    target: float, tolerance: float, count: int
) -> None:
    """int(G min(s + tolerance, .999)) of G = 20 groups, chosen once."""
    part = part_of(groups(20))
    removal = dhspg(part, target, tolerance=tolerance, eps=0.0, penalty=1e-9)
    gradient = groups(20, seed=1).detach()
    step(removal, 0, gradient)
    products, sizes, steps, entries = removal.measured()
    order = redundancy(products, sizes, steps, entries).argsort(descending=True)
    assert sorted(order[:count].tolist()) == removal.leaving[0].nonzero().flatten().tolist()
    chosen = removal.leaving[0].clone()
    for index in (1, 2, 3):
        step(removal, index, -gradient)
    assert torch.equal(removal.leaving[0], chosen)


def published(x: Tensor, d: Tensor, lam: float, amplify: float, ceiling: float) -> float:
    """The penalty of one candidate, as section 4 of the paper and its program have it."""
    product, size, length = float(x @ d), float(x.norm()), float(d.norm())
    if product >= 0:
        return lam
    low, high = -product / size, -(length**2) * size / product
    assert low <= high + 1e-12
    penalty = min(max(amplify * low, lam), lam * ceiling)
    return (low + high) / 2 if penalty >= high else penalty


def test_every_candidate_gets_the_published_penalty() -> None:
    part = part_of(groups(40))
    removal = dhspg(part, 0.9, penalty=0.2)
    step(removal, 0, torch.zeros(80, dtype=torch.float64))
    kinds = set()
    for index in range(1, 4):
        before, gradient = part.tensors[0].detach().clone(), groups(40, seed=index).detach()
        zero, candidates = part.zero.clone(), removal.leaving[0].clone()
        after = step(removal, index, gradient)
        for g in range(40):
            x, d, now = (values.view(-1, 2)[g] for values in (before, gradient, after))
            if zero[g] or not candidates[g]:
                assert torch.allclose(now, torch.zeros(2).double() if zero[g] else x - RATE * d)
                continue
            penalty = published(x, d, 0.2, 2.0, 10.0)
            kinds.add((penalty == 0.2, penalty == 2.0, float(x @ d) < 0))
            trial = x - RATE * d - RATE * penalty * x / x.norm()
            assert torch.allclose(now, trial if float(trial @ x) >= 0 else torch.zeros(2).double(), atol=1e-12)
    assert len(kinds) >= 3  # the plain penalty, growing groups, and one of the bounds


def test_a_window_that_the_amplified_penalty_would_leave_is_met_halfway() -> None:
    """x = (1, 0), d = (-1, 1): low 1, high 2; 2 low is at the bound, so 1.5: x shrinks while the loss falls."""
    weights = nn.Parameter(tensor([1.0, 0.0, 9.0, 9.0]).double())
    part = part_of(weights)
    removal = dhspg(part, 0.5, penalty=0.1, ceiling=100.0)
    step(removal, 0, torch.zeros(4).double())
    assert removal.leaving[0].tolist() == [True, False]
    after = step(removal, 1, tensor([-1.0, 1.0, 0.0, 0.0]).double())
    assert after[:2].tolist() == pytest.approx([1.0 + RATE - RATE * 1.5, -RATE])


def test_the_half_space_of_a_candidate_is_as_wide_as_eps() -> None:
    """Shrunk by 0.1 of a norm of 1: gone for eps 0.95, kept for 0.9."""
    for eps, left in ((0.95, 0.0), (0.85, 0.9)):
        weights = nn.Parameter(tensor([1.0, 0.0, 9.0, 9.0]).double())
        removal = dhspg(part_of(weights), 0.5, eps=eps)
        step(removal, 0, torch.zeros(4).double())
        assert step(removal, 1, torch.zeros(4).double())[0] == pytest.approx(left)


def test_once_the_target_is_reached_no_candidate_is_penalized_and_zeros_are_held() -> None:
    weights = nn.Parameter(tensor([0.05, 0.0, 1.0, 0.0, 9.0, 9.0, 9.0, 9.0]).double())
    part = part_of(weights)
    removal = dhspg(part, 0.25, tolerance=0.3)
    step(removal, 0, torch.zeros(8).double())
    assert removal.leaving[0].tolist() == [True, True, False, False]
    step(removal, 1, torch.zeros(8).double())
    assert part.zero.tolist() == [True, False, False, False]
    before = weights.detach().clone()
    pulling = tensor([-5.0, -5.0, 0.3, 0.0, 0.0, 0.0, 0.0, 0.0]).double()
    after = step(removal, 2, pulling)
    assert after[:2].tolist() == [0.0, 0.0]
    assert torch.equal(after[2:], before[2:] - RATE * pulling[2:])


def test_the_published_constants_follow_the_optimizer() -> None:
    sgd, adam = part_of(groups(2)), GroupPart(torch.optim.AdamW([w := groups(2)]), group_table(w, 2))
    assert published_penalty([sgd]) == (1e-3, 2.0, 10.0)
    assert published_penalty([adam]) == (1e-2, 20.0, 1e3)
    defaults = inspect.signature(DHSPG).parameters
    assert (defaults["eps"].default, defaults["tolerance"].default, defaults["penalty"].default) == (0.9, 0.05, None)


def test_the_published_penalty_shrinks_by_what_the_budget_says_and_zeroes_nothing_in_a_short_fit() -> None:
    """480 steps at rate 0.1 and lambda 1e-3 take 0.048 of a norm; with eps 0 nothing of norm 1 is near zero."""
    weights = nn.Parameter(tensor([1.0, 0.0, 9.0, 9.0]).double())
    part = part_of(weights)
    removal = dhspg(part, 0.5, penalty=1e-3, ends=(481,))
    step(removal, 0, torch.zeros(4).double())
    report = removal.settle({part.optimizer: [480 * RATE]})
    for index in range(1, 481):
        step(removal, index, torch.zeros(4).double())
    assert float(weights.detach()[0]) == pytest.approx(1.0 - 480 * RATE * 1e-3)
    assert report["shrink_budget"] == pytest.approx(481 * RATE * 1e-3)
    assert report["reachable"] == 0.0
    assert not part.zero.any()


def test_auto_takes_twice_the_median_norm_of_the_candidates() -> None:
    weights = nn.Parameter(tensor([1.0, 0.0, 2.0, 0.0, 9.0, 9.0, 9.0, 9.0]).double())
    part = part_of(weights)
    removal = dhspg(part, 0.5, penalty="auto", ends=(12,))
    assert removal.settled
    step(removal, 0, torch.zeros(8).double())
    assert not removal.settled
    report = removal.settle({part.optimizer: [10 * RATE]})
    assert removal.settled
    assert removal.value == pytest.approx(2.0 * 1.0 / (10 * RATE))  # torch's median of two is the lower
    assert report["reachable"] == 1.0
    for index in range(1, 12):  # the step after the tenth zeroes what is left of rounding
        step(removal, index, torch.zeros(8).double())
    assert part.zero.tolist() == [True, True, False, False]


# HESSO


def test_hesso_fades_by_three_quarters_a_half_a_quarter_and_nothing_for_five_steps() -> None:
    """The choice falls after the first of five steps; four remain: (left - 1) / left of what there is each time."""
    weights = nn.Parameter(tensor([1.0, 1.0, 4.0, 4.0]))
    removal = engine(Hesso, part_of(weights), 0.5, ends=(5,))
    seen = [step(removal, index, torch.zeros(4)) for index in range(5)]
    assert [float(values[0]) for values in seen] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert all(values[2:].tolist() == [4.0, 4.0] for values in seen)


def test_hesso_applies_the_whole_step_before_it_fades() -> None:
    weights = nn.Parameter(tensor([1.0, 1.0, 4.0, 4.0]))
    removal = engine(Hesso, part_of(weights), 0.5, ends=(5,))
    step(removal, 0, torch.zeros(4))
    after = step(removal, 1, tensor([-2.0, -2.0, 1.0, 1.0]))
    assert after.tolist() == pytest.approx([0.75 * 1.2, 0.75 * 1.2, 3.9, 3.9])


def test_hesso_takes_even_periods_and_the_last_takes_the_rest() -> None:
    part = part_of(groups(23))
    removal = engine(Hesso, part, 10 / 23, ends=(4, 8, 12))
    counts = []
    for index in range(12):
        step(removal, index, torch.zeros(46).double())
        if removal.due(index + 1):
            removal.committed(over=False)
            counts.append(int(part.zero.sum()))
            removal.advance(index + 1)
    assert counts == [3, 7, 10]


def test_hesso_ranks_by_the_current_minibatch_alone() -> None:
    """The step before a choice decides, whatever came before it."""
    scores = []
    for first in (1.0, -8.0):
        weights = nn.Parameter(tensor([1.0, 1.0, 1.0, 1.0]).double())
        removal = engine(Hesso, part_of(weights), 0.5, begin=2, ends=(9,))
        step(removal, 0, torch.full((4,), first).double())
        with torch.no_grad():
            weights.fill_(1.0)
        step(removal, 1, tensor([0.1, 0.1, 3.0, 3.0]).double())
        scores.append(removal.scores())
        assert removal.leaving[0].tolist() == [True, False]
    assert torch.equal(*scores)


def test_hesso_is_done_by_a_quarter_of_the_fit_by_default() -> None:
    defaults = inspect.signature(HESSO).parameters
    assert (defaults["begin"].default, defaults["end"].default, defaults["periods"].default) == (0.1, 0.25, 10)
