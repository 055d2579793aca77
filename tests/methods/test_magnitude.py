"""Magnitude pruning: one-shot, N:M and gradual, by hand arithmetic and against a plain sort."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn, tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import GradualMagnitude, Magnitude, MaskManager, prune
from lightning_prune.context import Context, event_generator
from lightning_prune.methods.magnitude import magnitude_scores, parse_pattern
from lightning_prune.schedules import Position
from lightning_prune.selection import kept_count


def context(weights: dict[str, Tensor], target: float, alive: dict[str, Tensor] | None = None) -> Context:
    """What a method sees at one event."""

    def no_objective() -> Any:
        raise AssertionError("magnitude pruning needs no loss")

    return Context(
        module=nn.Identity(),
        weights=weights,
        alive=alive or {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()},
        target=target,
        event=0,
        generator=event_generator(0, 0),
        make_objective=no_objective,
    )


def test_the_score_is_the_absolute_value_in_the_weights_own_type():
    scores = magnitude_scores({"a": tensor([-2.0, 1.0]), "b": tensor([[-0.5]], dtype=torch.bfloat16)})
    assert scores["a"].tolist() == [2.0, 1.0]
    assert scores["b"].tolist() == [[0.5]]
    assert scores["b"].dtype == torch.bfloat16


def test_scores_carry_no_gradient():
    assert not magnitude_scores({"a": nn.Parameter(tensor([-2.0]))})["a"].requires_grad


def test_half_sparsity_keeps_the_two_largest():
    proposal = Magnitude(sparsity=0.5).propose(context({"fc.weight": tensor([[3.0, -1.0], [0.5, -2.0]])}, 0.5))
    assert proposal.masks["fc.weight"].tolist() == [[True, False], [False, True]]
    assert proposal.weights is None
    assert proposal.notes == []


def test_weights_pruned_before_count_and_stay_gone():
    weights = {"w": tensor([9.0, 1.0, 2.0, 3.0])}
    alive = {"w": tensor([False, True, True, True])}
    assert Magnitude(sparsity=0.5).propose(context(weights, 0.5, alive)).masks["w"].tolist() == [
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("make", [Magnitude, GradualMagnitude])
def test_scope_and_floor_reach_the_selection(make):
    weights = {"strong": tensor([5.0, 6.0]), "weak": tensor([1.0, 2.0])}
    ask = context(weights, 0.5)
    assert not make(sparsity=0.5).propose(ask).masks["weak"].any()
    assert make(sparsity=0.5, scope="layer").propose(ask).masks["weak"].tolist() == [False, True]
    assert make(sparsity=0.5, layer_floor=0.5).propose(ask).masks["weak"].tolist() == [False, True]


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.5, 0.9, 0.98, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_network_is_pruned_to_the_exact_count(sparsity, dtype):
    net = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 7)).to(dtype)
    dense = torch.cat([net[0].weight.flatten(), net[1].weight.flatten()]).abs().tolist()
    prune(net, Magnitude(sparsity=sparsity))
    kept = torch.cat([mask.flatten() for mask in MaskManager.of(net).masks.values()]).tolist()
    count = kept_count(1480, sparsity)
    assert sum(kept) == count
    expected = sorted(range(1480), key=lambda i: -dense[i])[:count]
    assert sorted(i for i, keep in enumerate(kept) if keep) == sorted(expected)


def test_all_zero_weights_are_pruned_by_order():
    layer = nn.Linear(4, 2, bias=False)
    nn.init.zeros_(layer.weight)
    prune(layer, Magnitude(sparsity=0.5))
    assert MaskManager.of(layer).masks["weight"].tolist() == [[True] * 4, [False] * 4]


def test_weights_that_are_not_finite_are_refused_and_nothing_changes():
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"'weight' must be finite, got 1 NaN or infinite values of 8"):
        prune(layer, Magnitude(sparsity=0.5))
    assert torch.equal(layer.weight.nan_to_num(7.0), before.nan_to_num(7.0))
    assert MaskManager.of(layer).masks == {}


# N:M


def test_two_of_four_keeps_the_two_largest_of_every_four():
    weights = {"w": tensor([[1.0, -4.0, 3.0, 2.0], [-8.0, 7.0, 6.0, 5.0]])}
    proposal = Magnitude(pattern="2:4").propose(context(weights, 0.5))
    assert proposal.masks["w"].tolist() == [[False, True, True, False], [True, True, False, False]]


def test_groups_run_over_the_flattened_input_dimension_of_a_convolution():
    conv = nn.Conv2d(4, 2, 3)
    prune(conv, Magnitude(pattern="1:4"))
    groups = conv.weight.detach().view(-1, 4)
    assert (groups != 0).sum(1).eq(1).all()


def test_a_layer_that_the_pattern_does_not_fit_stays_dense_and_is_named():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    receipt = prune(net, Magnitude(pattern="2:4"))
    masks = MaskManager.of(net).masks
    assert masks["0.weight"].all()
    assert int(masks["2.weight"].sum()) == 16
    assert "0.weight stays dense: 4 does not divide its input dimension." in receipt.notes


def test_a_pattern_that_fits_no_layer_is_refused():
    with pytest.raises(
        ValueError, match="`pattern`='2:4' fits no selected tensor: 4 divides no input dimension of weight"
    ):
        prune(nn.Linear(6, 8), Magnitude(pattern="2:4"))


def test_a_pattern_fixes_the_sparsity():
    assert Magnitude(pattern="1:4").sparsity == 0.75
    assert Magnitude(pattern="2:4").final_target == 0.5


@pytest.mark.parametrize(("text", "parsed"), [("2:4", (2, 4)), (" 1 : 8 ", (1, 8)), ("4:16", (4, 16)), (None, None)])
def test_a_pattern_is_two_counts(text, parsed):
    assert parse_pattern(text) == parsed


@pytest.mark.parametrize("text", ["2-4", "4:2", "0:4", "4:4", "2:4:8", "a:b", "2:", "", 124, "²:4", "-1:4", 0.5])
def test_another_pattern_is_refused(text):
    with pytest.raises(
        ValueError, match=r"`pattern` must be 'N:M' with 1 <= N < M, such as '2:4' \(in quotes in YAML\)"
    ):
        Magnitude(pattern=text)


# constructors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 90}, r"`sparsity` must be in \[0, 1\), got 90\. Give a fraction, not a percentage"),
        ({"sparsity": -0.1}, r"got -0\.1"),
        ({"sparsity": 1.0}, r"got 1\.0"),
        ({"sparsity": float("nan")}, "got nan"),
        ({"sparsity": "0.5"}, "got '0.5'"),
        ({}, "`sparsity` must be in .*, got None"),
        ({"sparsity": 0.5, "at": [("start", 0.5)]}, "`sparsity` must be left out when `at` lists"),
        ({"sparsity": 0.5, "at": 1.5}, "`at` must be"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "`sparsity` must be left out with `pattern`='2:4'"),
        ({"pattern": "2:4", "scope": "layer"}, "`scope` and `layer_floor` must be left out with `pattern`"),
        ({"pattern": "2:4", "layer_floor": 0.1}, "`scope` and `layer_floor` must be left out with `pattern`"),
        ({"sparsity": 0.5, "scope": "all"}, "`scope` must be 'global' or 'layer', got 'all'"),
        ({"sparsity": 0.5, "layer_floor": -0.1}, "`layer_floor` must be in"),
        ({"sparsity": 0.9, "layer_floor": 0.2}, r"`layer_floor` must not exceed 1 - `sparsity` = 0\.1, got 0\.2"),
    ],
)
def test_arguments_of_one_shot_pruning_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Magnitude(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 90}, "Give a fraction, not a percentage"),
        ({"initial_sparsity": 0.95}, r"`initial_sparsity` must not exceed `sparsity`=0\.9, got 0\.95"),
        ({"initial_sparsity": -0.1}, "`initial_sparsity` must be in"),
        ({"begin": -1}, "`begin` must be an int >= 0"),
        ({"end": 1.5}, "`end` must be an int >= 0"),
        ({"begin": 0.5, "end": 0.25}, r"`begin` must not lie after `end`, got 0\.5 and 0\.25"),
        ({"begin": 20, "end": 10}, "`begin` must not lie after `end`, got 20 and 10"),
        ({"every_n_steps": 0}, r"`every_n_steps` must be an integer >= 1, got 0\. It counts optimizer steps"),
        ({"every_n_steps": 2.0}, "`every_n_steps` must be an integer"),
        ({"schedule": "cosine"}, "`schedule` must be one of 'cubic'"),
        ({"scope": "all"}, "`scope` must be"),
        ({"layer_floor": 0.2}, "`layer_floor` must not exceed 1 - `sparsity`"),
    ],
)
def test_arguments_of_gradual_pruning_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradualMagnitude(**{"sparsity": 0.9, **arguments})


# gradual pruning


def fit_stub(**facts: Any) -> Any:
    return SimpleNamespace(**{"fast_dev_run": False, **facts})


def bound(method: GradualMagnitude, total: int | None, step: int = 0, resumed: bool = False) -> GradualMagnitude:
    method.check_fit(fit_stub(), Position(step, 0, total_steps=total), resumed)
    return method


def simulate(method: GradualMagnitude, total: int) -> list[tuple[int, float]]:
    """Ask after every step of a fit, as the callback does; return what was due."""
    bound(method, total)
    acted = []
    for step in range(total + 1):
        position = Position(step, 0, step / total, total, ended=step == total)
        target = method.due(position)
        if target is not None:
            acted.append((step, target))
            method.mark_done(position)
    return acted


def test_ten_updates_follow_the_cubic_law_of_the_paper():
    acted = simulate(GradualMagnitude(sparsity=0.9, begin=0, end=100, every_n_steps=10), 130)
    expected = [0, 0.2439, 0.4392, 0.5913, 0.7056, 0.7875, 0.8424, 0.8757, 0.8928, 0.8991, 0.9]
    assert [step for step, _ in acted] == list(range(0, 101, 10))
    assert [target for _, target in acted] == pytest.approx(expected, abs=1e-12)
    assert acted[-1][1] == 0.9


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"begin": 5, "end": 12, "every_n_steps": 3}, [5, 8, 11, 12]),
        ({"begin": 0.25, "end": 0.5, "every_n_steps": 100}, [5, 10]),
        ({"begin": 7, "end": 7, "every_n_steps": 1}, [7]),
        ({"begin": 0.0, "end": 1.0, "every_n_steps": 8}, [0, 8, 16, 20]),
    ],
)
def test_the_final_sparsity_is_reached_at_the_end_exactly_and_kept(arguments, steps):
    method = GradualMagnitude(sparsity=0.8, initial_sparsity=0.1, **arguments)
    acted = simulate(method, 20)
    assert [step for step, _ in acted] == steps
    assert acted[-1][1] == 0.8
    assert len(steps) == 1 or acted[0][1] == 0.1
    assert method.finished


def test_a_step_that_is_asked_about_twice_is_acted_on_once():
    method = bound(GradualMagnitude(sparsity=0.8, begin=0, end=10, every_n_steps=5), 20)
    position = Position(5, 0, 0.25, 20)
    assert method.due(position) is not None
    method.mark_done(position)
    assert method.due(position) is None


def test_steps_that_were_jumped_over_are_caught_up_once():
    method = bound(GradualMagnitude(sparsity=0.8, begin=0, end=10, every_n_steps=2), 20)
    late = Position(7, 0, 0.35, 20)
    assert method.due(late) == pytest.approx(method.sparsity_at(7))
    method.mark_done(late)
    assert method.due(Position(7, 0, 0.35, 20)) is None
    assert method.due(Position(8, 0, 0.4, 20)) == pytest.approx(method.sparsity_at(8))


def test_a_fit_that_stops_early_ends_at_the_final_sparsity():
    method = bound(GradualMagnitude(sparsity=0.8, begin=0, end=10, every_n_steps=5), 20)
    assert method.due(Position(3, 0, 1.0, 20, ended=True)) == 0.8


def test_nothing_is_due_before_a_fit_is_known():
    assert GradualMagnitude(sparsity=0.8).due(Position(0, 0)) is None


@pytest.mark.parametrize(
    ("arguments", "total", "message"),
    [
        ({"end": 30}, 20, "`end` must lie within the fit of 20 optimizer steps, got 30"),
        ({"begin": 18, "end": 0.5}, 20, "`begin` must not lie after `end`, got steps 18 and 10"),
        ({"end": 0.5}, None, "is a fraction of the fit, whose length is not known"),
    ],
)
def test_a_fit_that_cannot_hold_the_ramp_is_refused(arguments, total, message):
    with pytest.raises(MisconfigurationException, match=message):
        bound(GradualMagnitude(sparsity=0.8, **{"begin": 0, **arguments}), total)


def test_a_fit_that_goes_on_from_a_dense_checkpoint_past_begin_is_refused():
    method = GradualMagnitude(sparsity=0.8, begin=2, end=10)
    with pytest.raises(MisconfigurationException, match=r"`begin` \(step 2\) lies before step 5"):
        bound(method, 20, step=5)
    assert bound(method, 20, step=5, resumed=True).due(Position(5, 0, 0.25, 20)) is not None


def test_a_trial_run_of_one_batch_reaches_the_final_sparsity():
    method = GradualMagnitude(sparsity=0.8, begin=100, end=1000)
    method.check_fit(fit_stub(fast_dev_run=1), Position(0, 0, total_steps=1), False)
    assert method.due(Position(1, 0, 1.0, 1, ended=True)) == 0.8


class Regression(LightningModule):
    """1000 weights in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(50, 20)

    def training_step(self, batch: Any) -> Tensor:
        return self.layer(batch[0]).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)


def test_a_fit_meets_the_exact_count_at_every_update():
    method = GradualMagnitude(sparsity=0.9, begin=0, end=10, every_n_steps=1, measure=False)
    module = Regression()
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[method], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(12, 50)), batch_size=1))
    expected = [1000, 757, 561, 409, 295, 213, 158, 125, 108, 101, 100]
    assert [event["kept"] for event in method.history] == expected
    assert [event["step"] for event in method.history] == list(range(11))
    assert int((module.layer.weight != 0).sum()) == 100
