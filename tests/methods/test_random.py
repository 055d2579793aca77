"""Random pruning: exact counts, independent of everything but the seed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_prune import MaskManager, RandomPruning, prune
from lightning_prune.context import event_generator
from lightning_prune.methods.random import random_scores


def masks_of(method: RandomPruning, module: nn.Module) -> dict[str, torch.Tensor]:
    prune(module, method)
    return MaskManager.of(module).masks


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 30, bias=False), nn.Linear(30, 10, bias=False))


def test_scores_are_uniform_and_follow_the_generator():
    weights = {"a": torch.zeros(100, 100, dtype=torch.bfloat16), "b": torch.zeros(3)}
    scores = random_scores(weights, event_generator(0, 0))
    assert {name: (score.dtype, score.shape) for name, score in scores.items()} == {
        "a": (torch.float32, (100, 100)),
        "b": (torch.float32, (3,)),
    }
    assert scores["a"].min() >= 0.0
    assert scores["a"].max() < 1.0
    assert abs(scores["a"].mean() - 0.5) < 5 / (100 * 12**0.5)  # five standard errors
    assert torch.equal(scores["a"], random_scores(weights, event_generator(0, 0))["a"])


def test_every_layer_loses_the_same_fraction_by_default():
    masks = masks_of(RandomPruning(sparsity=0.9), two_layers())
    assert [int(mask.sum()) for mask in masks.values()] == [60, 30]


def test_the_global_scope_meets_the_count_over_all_layers_only():
    masks = masks_of(RandomPruning(sparsity=0.9, scope="global"), two_layers())
    counts = [int(mask.sum()) for mask in masks.values()]
    assert sum(counts) == 90
    assert counts != [60, 30]


def test_a_floor_keeps_a_part_of_every_layer():
    net = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(2, 2, bias=False))
    masks = masks_of(RandomPruning(sparsity=0.99, scope="global", layer_floor=0.005), net)
    assert int(masks["1.weight"].sum()) >= 1
    assert sum(int(mask.sum()) for mask in masks.values()) == 10004 - int(0.99 * 10004)


def test_the_same_seed_gives_the_same_masks_whatever_the_weights_and_the_global_generator():
    one = masks_of(RandomPruning(sparsity=0.5, seed=3), two_layers())
    torch.rand(5)
    two = masks_of(RandomPruning(sparsity=0.5, seed=3), two_layers())
    other = masks_of(RandomPruning(sparsity=0.5, seed=4), two_layers())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_the_global_generator_is_left_alone():
    net, state = two_layers(), torch.get_rng_state()
    prune(net, RandomPruning(sparsity=0.5))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_second_event_prunes_only_living_weights():
    net = two_layers()
    before = masks_of(RandomPruning(sparsity=0.5), net)
    after = masks_of(RandomPruning(sparsity=0.9, seed=1), net)
    assert all(not bool((after[name] & ~before[name]).any()) for name in after)
    assert MaskManager.of(net).counts() == (90, 900)


@pytest.mark.parametrize("seed", [0, 2**62, 2**80])
def test_any_seed_is_taken(seed):
    assert MaskManager.of(net := two_layers()).masks == {}
    assert int(masks_of(RandomPruning(sparsity=0.5, seed=seed), net)["1.weight"].sum()) == 150


def test_events_of_one_seed_differ():
    one, two = (torch.rand(4, generator=event_generator(0, event)) for event in (0, 1))
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 90}, r"`sparsity` must be in \[0, 1\), got 90\. Give a fraction"),
        ({"sparsity": -0.1}, "`sparsity` must be in"),
        ({"sparsity": 1.0}, "`sparsity` must be in"),
        ({"sparsity": float("nan")}, "`sparsity` must be in"),
        ({"sparsity": "0.5"}, "`sparsity` must be in"),
        ({}, "`sparsity` must be in"),
        ({"sparsity": 0.5, "scope": "channel"}, "`scope` must be 'global' or 'layer'"),
        ({"sparsity": 0.5, "layer_floor": 1}, "`layer_floor` must be in"),
        ({"sparsity": 0.5, "seed": -1}, "`seed` must be an integer >= 0"),
        ({"sparsity": 0.5, "at": "later"}, "`at` must be one of"),
        ({"sparsity": 0.5, "at": [(1, 0.5)]}, "`sparsity` must be left out when `at` lists"),
        ({"sparsity": 0.5, "include": 3}, "`include` must hold names"),
        ({"sparsity": 0.5, "mask_gradients": 1}, "`mask_gradients` must be true or false"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RandomPruning(**arguments)
