"""HSPG, HESSO and DHSPG around a Trainer: exact targets, supports that only grow, resume, what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hspg_cases import FORMS, GROUPS, TARGETS, widths
from integration.toys import (
    QUIET,
    TwoOptimizers,
    fit,
    leaks,
    masks_of,
    same,
    sgd,
    toy,
    toy_loader,
    toy_loss,
    weights_of,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_prune import DHSPG, HESSO, HSPG, OBProxSGD, prune, shrink
from lightning_prune.cost import CostModel
from lightning_prune.dependency import channel_groups

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.* left no weight in")]
# exact targets


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("sparsity", [0.1, 0.29, 0.5, 0.7, 0.85])
def test_exactly_the_asked_number_of_channels_goes_and_no_layer_is_emptied(name: str, sparsity: float) -> None:
    module = toy()
    fit(module, TARGETS[name](sparsity, end=8))
    conv, hidden = widths(module)
    assert conv + hidden == GROUPS - math.floor(sparsity * GROUPS + 1e-9)
    assert conv >= 1
    assert hidden >= 1


@pytest.mark.parametrize("periods", [1, 3, 5, 40])
@pytest.mark.parametrize("kind", [HSPG, HESSO])
def test_the_target_is_met_at_the_deadline_whatever_the_periods(kind: Any, periods: int) -> None:
    module, callback = toy(), kind(0.5, begin=2, end=9, periods=periods, measure=False)
    fit(module, callback)
    assert sum(widths(module)) == GROUPS // 2
    assert callback.history[-1]["step"] == 9
    assert len(callback.history) == min(periods, 7)
    assert [event["requested"] for event in callback.history] == sorted(
        event["requested"] for event in callback.history
    )
    assert callback.history[-1]["requested"] == 0.5
    assert callback.receipt.requested == {"channel_sparsity": 0.5}


@pytest.mark.parametrize("kind", ["params", "flops", "volume", "channels"])
def test_a_budget_is_met_and_the_last_channel_was_needed(kind: Any) -> None:
    module, callback = toy(), HSPG(budget=0.5, budget_type=kind, end=8, measure=False)
    fit(module, callback)
    images = next(iter(toy_loader()))[0]
    costs = CostModel(channel_groups(toy(), images))
    names = [group.name for group in costs.groups]
    conv, hidden = widths(module)
    left = costs.cost(kind, dict(zip(names, (conv, hidden), strict=True))) / costs.cost(kind)
    more = [
        costs.cost(kind, dict(zip(names, counts, strict=True))) / costs.cost(kind)
        for counts in ((conv + 1, hidden), (conv, hidden + 1))
        if counts[0] <= 4 and counts[1] <= 12
    ]
    assert left <= 0.5 + 1e-9
    assert max(more) > 0.5
    assert callback.receipt.requested == {"budget": 0.5, "budget_type": kind}


def test_any_optimizer_with_a_step_will_do_for_a_target() -> None:
    module = toy(make_optimizer=lambda p: torch.optim.Adagrad(p, lr=0.05))
    fit(module, HSPG(0.5, measure=False))
    assert sum(widths(module)) == GROUPS // 2


def test_a_trained_network_is_pruned_from_the_first_step_after_one_measured() -> None:
    module, callback = toy(), HSPG(0.5, begin=0, end=3, periods=2, measure=False)
    fit(module, callback)
    assert [event["step"] for event in callback.history] == [2, 3]


def test_channels_that_go_are_cut_out_without_changing_the_network() -> None:
    module = toy()
    fit(module, HSPG(0.5, measure=False))
    module.eval()
    images = next(iter(toy_loader()))[0]
    smaller = shrink(module, images)
    assert (smaller.conv.out_channels, smaller.hidden.out_features) == widths(module)
    assert torch.allclose(smaller(images), module(images), atol=1e-5)


def test_without_training_the_smallest_channels_go_at_once() -> None:
    module = toy()
    with torch.no_grad():
        module.hidden.weight[:6] *= 0.01
        module.hidden.bias[:6] *= 0.01
    prune(module, HSPG(0.375, measure=False), toy_loader(), loss_fn=toy_loss)
    assert not masks_of(module)["hidden.weight"][:6].any()
    assert masks_of(module)["hidden.weight"][6:].any(1).all()


def test_pruned_channels_count_towards_a_later_target() -> None:
    module = toy()
    fit(module, HSPG(0.25, measure=False))
    first = masks_of(module)
    fit(module, HSPG(0.5, measure=False, name="second"))
    assert sum(widths(module)) == GROUPS // 2
    assert all(not masks_of(module)[name][~mask].any() for name, mask in first.items())


def test_with_too_few_zeros_dhspg_cuts_the_rest_and_says_so() -> None:
    callback = DHSPG(0.5, penalty=1e-9, eps=0.0, measure=False)
    with pytest.warns(UserWarning, match=r"`penalty`=1e-09 takes a norm of .*: 0% can become zero"):
        fit(toy(), callback)
    assert any(note.startswith("8 channels were still not zero at the end") for note in callback.history[-1]["notes"])


def test_with_a_strong_penalty_dhspg_cuts_nothing_at_the_end() -> None:
    callback = DHSPG(0.5, penalty=1.0, begin=1, end=11, measure=False)
    fit(toy(), callback)
    assert any(note.startswith("0 channels were still not zero") for note in callback.history[-1]["notes"])


# supports


def test_skipped_steps_of_the_scaler_only_delay_the_target() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=1000)
    module = toy()
    fit(module, HSPG(0.5, measure=False), plugins=[MixedPrecision("16-mixed", device="cpu", scaler=scaler)])
    assert sum(widths(module)) == GROUPS // 2


@pytest.mark.parametrize("form", ["hspg", "hesso", "dhspg", "prox trial"])
def test_manual_optimization_of_two_optimizers(form: str) -> None:
    module = toy(kind=TwoOptimizers)
    callback = FORMS[form](loss_fn=toy_loss, end=8)
    fit(module, callback)
    assert leaks(module) == []
    assert callback.finished
    if form != "prox trial":
        assert sum(widths(module)) == GROUPS // 2


# published penalty


def test_orthant_stages_come_in_cycles_or_for_good() -> None:
    stages = []
    for rest in (None, 2):
        callback = OBProxSGD(0.1, begin=1, prox_steps=3, orthant_steps=rest, end=9)
        callback._bounds, callback._cycle = (1, 9), (3, rest)
        stages.append([callback.stage_at(step) for step in range(10)])
    assert stages[0] == ["off", *["prox"] * 3, *["projected"] * 5, "off"]
    assert stages[1] == ["off", *["prox"] * 3, *["projected"] * 2, *["prox"] * 3, "off"]


def test_half_space_steps_begin_at_the_switch() -> None:
    callback = HSPG(penalty=0.1, begin=1, switch=3, end=6)
    callback._bounds, callback._switch = (1, 6), 3
    assert [callback.stage_at(step) for step in range(7)] == ["off", "prox", "prox", *["projected"] * 3, "off"]


@pytest.mark.parametrize("trial", ["prox", "subgradient"])
def test_a_wide_half_space_zeroes_more_channels(trial: str) -> None:
    counts = []
    for eps in (0.0, 0.9):
        module = toy()
        fit(module, HSPG(penalty="auto", auto_factor=1.0, switch=2, end=8, eps=eps, trial=trial, measure=False))
        counts.append(sum(widths(module)))
    assert counts[1] < counts[0]


def test_no_penalty_is_training_without_the_callback_in_every_stage() -> None:
    runs = []
    for callbacks in ([], [HSPG(penalty=0.0, switch=2, eps=0.9, measure=False)], [OBProxSGD(0.0, measure=False)]):
        module = toy()
        fit(module, *callbacks)
        runs.append(weights_of(module))
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])


# what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of `sparsity`, `budget` and `penalty` must be given, got none"),
        ({"sparsity": 0.5, "penalty": 0.1}, "must be given, got sparsity, penalty"),
        ({"sparsity": 0.5, "budget": 0.5}, "must be given, got sparsity, budget"),
        ({"sparsity": 0.5, "budget_type": "flops"}, "`budget_type` must be left out without `budget`"),
        ({"sparsity": 90}, r"`sparsity` must be in \[0, 1\)"),
        ({"budget": 0.0}, r"`budget` must be in \(0, 1\]"),
        ({"budget": 0.5, "budget_type": "time"}, "`budget_type` must be one of"),
        ({"penalty": -0.1}, "`penalty` must be a finite number >= 0"),
        ({"penalty": math.nan}, "`penalty` must be a finite number >= 0"),
        ({"sparsity": 0.5, "eps": 1.0}, r"`eps` must be in \[0, 1\)"),
        ({"sparsity": 0.5, "eps": -0.1}, r"`eps` must be in \[0, 1\)"),
        ({"sparsity": 0.5, "periods": 0}, "`periods` must be an integer >= 1"),
        ({"sparsity": 0.5, "saliency": "size"}, "`saliency` must be one of"),
        ({"sparsity": 0.5, "normalise": "layer"}, "`normalise` must be one of"),
        ({"sparsity": 0.5, "beta": 1.0}, r"`beta` must be in \[0, 1\)"),
        ({"sparsity": 0.5, "max_ratio": 0.0}, r"`max_ratio` must be in \(0, 1\]"),
        ({"sparsity": 0.5, "min_keep": 0}, "`min_keep` must be an integer >= 1"),
        ({"penalty": 0.1, "trial": "both"}, "`trial` must be one of"),
        ({"penalty": 0.1, "switch": -1}, "`switch` must be an int >= 0"),
        ({"penalty": 0.1, "group_weight": "x"}, "`group_weight` must be one of"),
        ({"penalty": 0.1, "auto_factor": -1}, "`auto_factor` must be a finite number above 0"),
        ({"sparsity": 0.5, "begin": 0.6}, "`begin` must lie before `end`"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HSPG(**arguments)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OBProxSGD(-1), "`penalty` must be a finite number >= 0"),
        (lambda: OBProxSGD(0.1, eps=1.0), r"`eps` must be in \[0, 1\)"),
        (lambda: OBProxSGD(0.1, prox_steps=1.5), "`prox_steps` must be an int >= 0"),
        (lambda: OBProxSGD(0.1, orthant_steps=-2), "`orthant_steps` must be an int >= 0"),
        (lambda: OBProxSGD(0.1, auto_factor=0), "`auto_factor` must be a finite number above 0"),
        (lambda: HESSO(1.0), r"`sparsity` must be in \[0, 1\)"),
        (lambda: HESSO(0.5, periods=0), "`periods` must be an integer >= 1"),
        (lambda: HESSO(0.5, max_ratio=2.0), r"`max_ratio` must be in \(0, 1\]"),
        (lambda: DHSPG(0.5, penalty=0.0), "`penalty` must be a finite number above 0"),
        (lambda: DHSPG(0.5, eps=1.0), r"`eps` must be in \[0, 1\)"),
        (lambda: DHSPG(0.5, tolerance=1.0), r"`tolerance` must be in \[0, 1\)"),
        (lambda: DHSPG(-0.5), r"`sparsity` must be in \[0, 1\)"),
    ],
)
def test_arguments_of_the_variants_out_of_range_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_target_beyond_the_caps_is_refused_before_the_first_step() -> None:
    module = toy()
    before = weights_of(module)
    with pytest.raises(
        ValueError, match=r"asks for 15 of 16 channels, but at most 13 .*conv 3 of 4, hidden 10 of 12.*0\.8125"
    ):
        fit(module, HSPG(0.95, measure=False))
    with pytest.raises(ValueError, match=r"`budget`=0.01 of params cannot be reached"):
        fit(module, HSPG(budget=0.01, budget_type="params", measure=False))
    assert same(weights_of(module), before)


def test_a_switch_after_the_end_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"`switch` \(step 9\) must lie before `end` \(step 6\)"):
        fit(toy(), HSPG(penalty=0.1, switch=9, measure=False))


def test_a_fraction_of_a_fit_of_unknown_length_is_refused() -> None:
    for callback in (HSPG(penalty=0.1, begin=1, end=5), OBProxSGD(0.1, begin=1, end=5)):
        with pytest.raises(MisconfigurationException, match=r"is a fraction of the fit, whose length is not known"):
            fit(toy(), callback, max_epochs=-1)


@pytest.mark.parametrize("build", [lambda: HSPG(penalty=0.1), lambda: OBProxSGD(0.1)])
def test_a_penalty_needs_an_optimizer_whose_steps_are_known(build: Any) -> None:
    module = toy(make_optimizer=lambda p: torch.optim.Adagrad(p, lr=0.1))
    with pytest.raises(MisconfigurationException, match=r"known scale .* got Adagrad.*target form"):
        fit(module, build())


def test_lbfgs_is_refused_in_the_target_form_too() -> None:
    with pytest.raises(MisconfigurationException, match="LBFGS evaluates the loss several times"):
        fit(toy(make_optimizer=lambda p: torch.optim.LBFGS(p)), HSPG(0.5))


class Halves(TwoOptimizers):
    """Weights in one optimizer, the rest in another."""

    def configure_optimizers(self) -> Any:
        weights = [p for p in self.parameters() if p.dim() > 1]
        return sgd(weights), sgd([p for p in self.parameters() if p.dim() == 1])


def test_a_channel_in_two_optimizers_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"channels of 'conv' lie in tensors of two optimizers"):
        fit(toy(kind=Halves), HSPG(0.5, loss_fn=toy_loss))
