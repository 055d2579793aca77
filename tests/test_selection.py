"""Scores to masks: exact counts, ties, floors, scopes, against naive oracles."""

from __future__ import annotations

import itertools
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, tensor

from lightning_prune.selection import (
    check_scope,
    check_scores,
    count_kept,
    keep_n_of_m,
    keep_top,
    kept_count,
    shuffle_within_layer,
)

SPARSITIES = ["0", "0.1", "0.29", "0.5", "0.9", "0.98", "0.999"]


def naive_keep_top(scores, sparsity, scope="global", layer_floor=0.0, alive=None):
    """Stable sort in plain Python: floors first, then the best of the rest, dead weights never."""
    masks = {name: [False] * score.numel() for name, score in scores.items()}
    living = {
        name: [True] * score.numel() if alive is None or name not in alive else alive[name].flatten().tolist()
        for name, score in scores.items()
    }
    flat = {name: score.flatten().tolist() for name, score in scores.items()}

    def take(entries, count):
        for name, index in sorted(entries, key=lambda entry: -flat[entry[0]][entry[1]])[: max(count, 0)]:
            masks[name][index] = True

    def kept(names):
        return sum(sum(masks[name]) for name in names)

    def free(names):
        return [(n, i) for n in names for i in range(len(flat[n])) if living[n][i] and not masks[n][i]]

    for name in scores:
        take(free([name]), math.ceil(Fraction(str(layer_floor)) * len(flat[name])))
    for names in [[name] for name in scores] if scope == "layer" else [list(scores)]:
        total = sum(len(flat[name]) for name in names)
        target = total - math.floor(Fraction(str(sparsity)) * total)
        if kept(names) > target:
            raise ValueError("floor")
        take(free(names), target - kept(names))
    return {name: tensor(mask, dtype=torch.bool).view(scores[name].shape) for name, mask in masks.items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_the_count_is_exact_for_every_size_up_to_a_million(sparsity):
    exact = Fraction(sparsity)
    sizes = np.arange(1, 1_000_001, dtype=np.int64)
    expected = sizes - sizes * exact.numerator // exact.denominator
    counted = [kept_count(n, float(sparsity)) for n in range(1, 1_000_001)]
    assert np.array_equal(np.array(counted), expected)


def test_the_count_of_hand_examples():
    assert kept_count(10, 0.9) == 1
    assert kept_count(100, 0.29) == 71
    assert kept_count(3, 0.5) == 2
    assert kept_count(1, 0.999) == 1
    assert kept_count(0, 0.5) == 0


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 99, 1000, 1_000_000])
def test_the_mask_keeps_exactly_the_count(size, sparsity):
    scores = {"w": torch.rand(size)}
    mask = keep_top(scores, float(sparsity))["w"]
    assert int(mask.sum()) == size - math.floor(Fraction(sparsity) * size)
    if 0 < int(mask.sum()) < size:
        assert scores["w"][mask].min() >= scores["w"][~mask].max()


def test_half_sparsity_keeps_the_two_largest():
    masks = keep_top({"w": tensor([[3.0, 1.0], [0.5, 2.0]])}, 0.5)
    assert masks["w"].tolist() == [[True, False], [False, True]]


def test_global_scope_empties_a_weak_layer_and_layer_scope_does_not():
    scores = {"strong": tensor([5.0, 6.0]), "weak": tensor([1.0, 2.0])}
    assert {n: m.tolist() for n, m in keep_top(scores, 0.5).items()} == {"strong": [True, True], "weak": [False, False]}
    assert {n: m.tolist() for n, m in keep_top(scores, 0.5, scope="layer").items()} == {
        "strong": [False, True],
        "weak": [False, True],
    }


def test_a_floor_of_half_keeps_the_best_of_the_weak_layer():
    scores = {"strong": tensor([5.0, 6.0]), "weak": tensor([1.0, 2.0])}
    masks = keep_top(scores, 0.5, layer_floor=0.5)
    assert masks["strong"].tolist() == [False, True]
    assert masks["weak"].tolist() == [False, True]


def test_equal_scores_are_settled_by_parameter_order_then_index():
    scores = {"first": torch.ones(2, 2), "second": torch.ones(3)}
    masks = keep_top(scores, 0.29)  # 7 weights, 5 kept
    assert masks["first"].all()
    assert masks["second"].tolist() == [True, False, False]


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("value", [0.0, -0.0, 3.0])
def test_all_equal_scores_keep_the_first_ones(sparsity, value):
    mask = keep_top({"w": torch.full((10, 10), value)}, float(sparsity))["w"].flatten()
    kept = kept_count(100, float(sparsity))
    assert mask[:kept].all()
    assert not mask[kept:].any()


def test_minus_zero_ties_with_zero():
    mask = keep_top({"w": tensor([-0.0, 0.0, -0.0, 0.0])}, 0.5)["w"]
    assert mask.tolist() == [True, True, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_scores_with_few_distinct_values_keep_the_exact_count(dtype):
    scores = {"w": torch.randn(100_000).abs().to(dtype)}
    assert scores["w"].unique().numel() < 10_000
    mask = keep_top(scores, 0.9)["w"]
    assert int(mask.sum()) == 10_000
    assert same({"w": mask}, keep_top({"w": scores["w"].float()}, 0.9))


def test_float64_scores_that_differ_below_float32_are_told_apart():
    scores = {"w": tensor([1.0, 1.0 + 1e-12, 1.0 + 2e-12, 1.0], dtype=torch.float64)}
    assert keep_top(scores, 0.5)["w"].tolist() == [False, True, True, False]


def test_integer_scores_are_ranked():
    assert keep_top({"w": tensor([3, 1, 2, 5])}, 0.5)["w"].tolist() == [True, False, False, True]


def test_a_transposed_tensor_is_ranked_in_its_own_order():
    score = torch.ones(2, 3).t()
    assert keep_top({"w": score}, 0.5)["w"].tolist() == [[True, True], [True, False], [False, False]]


def random_case(generator: torch.Generator):
    """Layers of odd shapes, scores on a coarse grid (ties everywhere), now and then dead weights."""
    shapes = [(3, 4), (5,), (2, 2, 3), (1,), (7, 2)]
    picked = [
        shapes[i]
        for i in torch.randperm(5, generator=generator)[: 1 + int(torch.randint(4, (1,), generator=generator))]
    ]
    levels = [1, 2, 5, 1000][int(torch.randint(4, (1,), generator=generator))]
    scores, alive = {}, {}
    for index, shape in enumerate(picked):
        scores[f"layer{index}"] = torch.randint(levels, shape, generator=generator).float() - 1
        alive[f"layer{index}"] = torch.rand(shape, generator=generator) < 0.7
    return scores, alive


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("layer_floor", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("dead", [False, True])
def test_selection_equals_a_naive_stable_sort(scope, layer_floor, dead):
    generator = torch.Generator().manual_seed(1)
    outcomes = set()
    for _, sparsity in itertools.product(range(12), map(float, SPARSITIES)):
        scores, alive = random_case(generator)
        given = alive if dead else None
        try:
            expected = naive_keep_top(scores, sparsity, scope, layer_floor, given)
        except ValueError:
            with pytest.raises(ValueError, match="`layer_floor`"):
                keep_top(scores, sparsity, scope, layer_floor, given)
            outcomes.add("refused")
            continue
        assert same(keep_top(scores, sparsity, scope, layer_floor, given), expected)
        outcomes.add("equal")
    assert outcomes == ({"equal", "refused"} if layer_floor else {"equal"})


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("layer_floor", [0.0, 0.001])
def test_masks_are_nested_when_sparsity_grows(scope, layer_floor):
    scores = {"a": torch.randint(5, (40, 30)).float(), "b": torch.randint(5, (7, 11)).float()}
    if layer_floor and scope == "layer":
        layer_floor = 0.0005
    before = None
    for sparsity in map(float, SPARSITIES[:-1]):
        masks = keep_top(scores, sparsity, scope, layer_floor)
        if before is not None:
            assert all(not bool((masks[name] & ~before[name]).any()) for name in masks)
        before = masks


def test_dead_weights_count_as_pruned_and_never_return():
    scores = {"w": tensor([9.0, 8.0, 1.0, 2.0])}
    alive = {"w": tensor([False, True, True, True])}
    assert keep_top(scores, 0.5, alive=alive)["w"].tolist() == [False, True, False, True]
    assert keep_top(scores, 0.0, alive=alive)["w"].tolist() == [False, True, True, True]


def test_fewer_living_weights_than_the_target_all_stay():
    alive = {"w": tensor([False, False, False, True])}
    assert keep_top({"w": torch.arange(4.0)}, 0.5, alive=alive)["w"].tolist() == [False, False, False, True]


def test_the_arguments_are_left_alone():
    scores, alive = {"w": torch.rand(4, 4)}, {"w": torch.rand(4, 4) < 0.5}
    copies = scores["w"].clone(), alive["w"].clone()
    masks = keep_top(scores, 0.5, alive=alive)
    masks["w"].fill_(True)
    assert torch.equal(scores["w"], copies[0])
    assert torch.equal(alive["w"], copies[1])


@pytest.mark.parametrize(("scope", "where"), [("global", ""), ("layer", " of 'b'")])
def test_an_infeasible_floor_names_the_sparsity_that_works(scope, where):
    scores = {"a": torch.rand(10), "b": torch.rand(7), "c": torch.rand(10)}
    with pytest.raises(ValueError, match=rf"`layer_floor`=0\.3 keeps \d weights{where}, more than the \d") as caught:
        keep_top(scores, 0.9, scope, layer_floor=0.3)
    advised = float(re.search(r"at most ([0-9.]+)\.", str(caught.value)).group(1))
    masks = keep_top(scores, advised, scope, layer_floor=0.3)
    assert {name: int(mask.sum()) >= 3 for name, mask in masks.items()} == {"a": True, "b": True, "c": True}


def test_a_floor_counts_only_living_weights():
    scores, alive = {"w": torch.arange(10.0)}, {"w": torch.arange(10) == 4}
    assert keep_top(scores, 0.9, "layer", layer_floor=0.5, alive=alive)["w"].nonzero().tolist() == [[4]]


def test_the_advised_sparsity_is_rounded_down_for_large_networks():
    scores = {"w": torch.zeros(7_000_001)}
    with pytest.raises(ValueError, match="`layer_floor`") as caught:
        keep_top(scores, 0.9, layer_floor=1 / 7)
    advised = float(re.search(r"at most ([0-9.]+)\.", str(caught.value)).group(1))
    assert kept_count(7_000_001, advised) >= 1_000_001


def test_a_layer_floor_above_the_target_is_refused_in_layer_scope():
    with pytest.raises(ValueError, match=r"keeps 2 weights of 'w', more than the 1 that `sparsity`=0\.9 allows"):
        keep_top({"w": torch.rand(10)}, 0.9, scope="layer", layer_floor=0.2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_refused_with_its_layer_and_count(bad):
    scores = {"fine": torch.rand(2), "broken": tensor([1.0, bad, bad])}
    with pytest.raises(ValueError, match="the scores of 'broken' must be finite, got 2 NaN or infinite values of 3"):
        keep_top(scores, 0.5)
    with pytest.raises(ValueError, match="'broken' must be finite"):
        keep_n_of_m(scores, 2, 4)


def test_no_scores_at_all_are_refused():
    with pytest.raises(ValueError, match="nothing to prune"):
        check_scores({})


@pytest.mark.parametrize("sparsity", [90, 1.0, -0.1, math.nan, "0.5"])
def test_a_sparsity_out_of_range_is_refused(sparsity):
    with pytest.raises(ValueError, match="`sparsity` must be in"):
        keep_top({"w": torch.rand(4)}, sparsity)


def test_a_floor_out_of_range_is_refused():
    with pytest.raises(ValueError, match="`layer_floor` must be in"):
        keep_top({"w": torch.rand(4)}, 0.5, layer_floor=1.0)


def test_another_scope_is_refused():
    check_scope("global")
    with pytest.raises(ValueError, match="`scope` must be 'global' or 'layer', got 'local'"):
        keep_top({"w": torch.rand(4)}, 0.5, scope="local")


def naive_n_of_m(score: Tensor, n: int, m: int, alive: Tensor) -> Tensor:
    rows = score.reshape(score.shape[0], -1).tolist()
    living = alive.reshape(score.shape[0], -1).tolist()
    mask = []
    for row, life in zip(rows, living, strict=True):
        kept = [False] * len(row)
        for start in range(0, len(row), m):
            group = sorted(range(start, start + m), key=lambda i: -row[i] if life[i] else math.inf)
            for i in group[:n]:
                kept[i] = life[i]
        mask.append(kept)
    return tensor(mask).view(score.shape)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 3)])
@pytest.mark.parametrize("shape", [(3, 24), (4, 8, 3, 3), (2, 6, 4)])
@pytest.mark.parametrize("dead", [False, True])
def test_n_of_m_equals_a_naive_loop(n, m, shape, dead):
    score = torch.randint(4, shape).float()
    alive = torch.rand(shape) < 0.6 if dead else torch.ones(shape, dtype=torch.bool)
    masks, dense = keep_n_of_m({"w": score}, n, m, {"w": alive} if dead else None)
    assert dense == []
    assert torch.equal(masks["w"], naive_n_of_m(score, n, m, alive))
    if not dead:
        assert masks["w"].view(-1, m).sum(1).eq(n).all()


def test_two_of_four_takes_the_lower_index_of_equal_scores():
    masks, _ = keep_n_of_m({"w": tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 2.0, 2.0, 2.0]])}, 2, 4)
    assert masks["w"].tolist() == [[True, True, False, False, False, True, True, False]]


def test_no_other_choice_of_two_of_four_keeps_more_magnitude():
    score = torch.rand(5, 8)
    kept = (score * keep_n_of_m({"w": score}, 2, 4)[0]["w"]).view(-1, 4).sum(1)
    for pair in itertools.combinations(range(4), 2):
        assert (kept >= score.view(-1, 4)[:, pair].sum(1)).all()


def test_tensors_that_m_does_not_divide_stay_as_they_are_and_are_named():
    alive = {"odd": torch.rand(4, 6) < 0.5}
    scores = {"fits": torch.rand(4, 8), "odd": torch.rand(4, 6), "vector": torch.rand(8)}
    masks, dense = keep_n_of_m(scores, 2, 4, alive)
    assert dense == ["odd", "vector"]
    assert torch.equal(masks["odd"], alive["odd"])
    assert masks["vector"].all()
    assert int(masks["fits"].sum()) == 16


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (1, 1), (2.0, 4), ("2", "4")])
def test_counts_that_fit_no_group_are_refused(n, m):
    with pytest.raises(ValueError, match="an N:M pattern needs integers 1 <= N <= M and M >= 2"):
        keep_n_of_m({"w": torch.rand(4, 4)}, n, m)


def test_shuffling_keeps_the_rate_of_every_layer_and_changes_the_choice():
    masks = keep_top({"a": torch.arange(50.0), "b": torch.arange(20.0).view(4, 5)}, 0.5)
    shuffled = shuffle_within_layer(masks, torch.Generator().manual_seed(3))
    again = shuffle_within_layer(masks, torch.Generator().manual_seed(3))
    assert {n: int(m.sum()) for n, m in shuffled.items()} == {n: int(m.sum()) for n, m in masks.items()}
    assert same(shuffled, again)
    assert not same(shuffled, masks)


def test_kept_and_total_are_counted_over_all_masks():
    assert count_kept({"a": tensor([True, False]), "b": tensor([[True], [True], [False]])}) == (3, 5)
    assert count_kept({}) == (0, 0)
