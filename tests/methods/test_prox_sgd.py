"""ProxSGD around a Trainer: phases, masks, resume, the shrink budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integration.toys import (
    QUIET,
    STEPS,
    ResumableLoader,
    Toy,
    TwoOptimizers,
    fit,
    leaks,
    masks_of,
    optimizers,
    same,
    sgd,
    toy,
    toy_loader,
    toy_loss,
    weights_of,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from prox_cases import Lines
from torch import nn

from lightning_prune import ProxSGD, shrink

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.* left no weight in")]
FORMS = pytest.mark.parametrize("structured", [False, True], ids=["weights", "channels"])


class Supports(Callback):
    """Keeps which weights are zero after every batch."""

    def __init__(self, method: Any) -> None:
        self.method, self.seen, self.steps = method, [], []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append(torch.cat([p.detach().flatten() == 0 for p in pl_module.parameters()]))
        self.steps.append((self.method._step, trainer.global_step))


def method(penalty: Any = "auto", **arguments: Any) -> ProxSGD:
    return ProxSGD(penalty, measure=False, **arguments)


# phases


@FORMS
def test_zeros_become_masks_at_the_end_of_the_phase_and_stay(structured: bool) -> None:
    callback = method(structured=structured, begin=2, end=8)
    module, supports = toy(), Supports(callback)
    fit(module, callback, supports)
    assert [event["step"] for event in callback.history] == [8]
    counts = [int(seen.sum()) for seen in supports.seen]
    assert counts[0] == counts[1] == 0 < counts[7]
    assert all(torch.equal(seen, supports.seen[8]) for seen in supports.seen[8:])
    assert sum(int((~mask).sum()) for mask in masks_of(module).values()) == counts[-1]
    assert leaks(module) == []


def test_no_weight_is_lost_by_the_freeze() -> None:
    callback = method(end=8)
    module, supports = toy(), Supports(callback)
    fit(module, callback, supports)
    masks = masks_of(module)
    zeros = {name: p.detach() == 0 for name, p in module.named_parameters()}
    assert all(torch.equal(zeros[name], ~mask) for name, mask in masks.items())


def test_the_penalty_is_lifted_after_the_freeze() -> None:
    """What was kept grows again without it, while a penalty up to the last step holds it down."""
    sizes = []
    for end in (4, 11):
        module = toy()
        fit(module, method(0.2, end=end))
        sizes.append(float(module.head.weight.detach().norm()))
    assert sizes[0] > sizes[1]


def test_a_zero_channel_is_zero_in_all_that_makes_it_and_shrinks_away() -> None:
    module = toy()
    with torch.no_grad():  # two channels and eight units start small
        for name, parameter in list(module.named_parameters())[:6]:
            parameter[: 8 if "hidden" in name else 2] *= 0.1
    fit(module, method(structured=True, end=8, group_weight="none"))
    masks = masks_of(module)
    gone = ~masks["conv.weight"].flatten(1).any(1)
    assert gone.any()
    assert not gone.all()
    assert all(not module.get_parameter(f"norm.{kind}").detach()[gone].any() for kind in ("weight", "bias"))
    assert set(masks) >= {"conv.weight", "conv.bias", "norm.weight", "norm.bias", "hidden.weight"}
    module.eval()
    images = next(iter(toy_loader()))[0]
    smaller = shrink(module, images)
    assert smaller.conv.out_channels == int((~gone).sum())
    assert torch.allclose(smaller(images), module(images), atol=1e-6)


def test_a_fit_that_ends_early_still_freezes() -> None:
    module, callback = toy(), method(end=9)
    with pytest.warns(UserWarning, match="training ended before its last planned step"):
        fit(module, callback, Stop())
    assert callback.finished
    assert int((~masks_of(module)["hidden.weight"]).sum()) > 0


class Stop(Callback):
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= 7


# the clock


def test_the_clock_is_the_global_step() -> None:
    callback = method(end=8)
    supports = Supports(callback)
    fit(toy(), callback, supports)
    assert [own for own, step in supports.steps[:8]] == [step for own, step in supports.steps[:8]] == list(range(1, 9))


def test_accumulation_takes_one_proximal_step_per_optimizer_step() -> None:
    callback = method(end=1.0)
    calls: list[int] = []
    module = toy()
    spy(callback, calls)
    fit(module, callback, accumulate_grad_batches=3)
    assert calls == [0, 1, 2, 3]


def spy(callback: ProxSGD, calls: list[int]) -> None:
    """Note at which steps the engine acts."""
    make = callback.make_engine

    def noting(*args: Any) -> Any:
        engine = make(*args)
        after = engine.after
        engine.after = lambda part, step: (calls.append(step), after(part, step))
        return engine

    callback.make_engine = noting  # type: ignore[method-assign]


def test_steps_that_the_scaler_skips_change_no_weight_and_no_clock() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=1000)
    callback, calls = method(end=1.0), []
    spy(callback, calls)
    supports = Supports(callback)
    trainer = fit(toy(), callback, supports, plugins=[MixedPrecision("16-mixed", device="cpu", scaler=scaler)])
    assert 0 < len(calls) < trainer.global_step == 2 * STEPS
    assert calls == list(range(len(calls)))


def test_a_fused_optimizer_that_found_an_overflow_is_left_alone() -> None:
    callback = method(5.0, end=1.0)
    module = toy(make_optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, fused=True))
    calls: list[int] = []
    spy(callback, calls)
    fit(module, callback, Overflow(), max_epochs=1)
    assert calls == [0, 1, 2, 3]


class Overflow(Callback):
    """Sets what `GradScaler` sets on an optimizer that looks at it by itself."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        trainer.optimizers[0].found_inf = torch.tensor(float(batch_idx in (1, 2)))


def test_every_optimizer_steps_its_own_channels_under_manual_optimization() -> None:
    module = toy(kind=TwoOptimizers)
    callback = method(structured=True, loss_fn=toy_loss, end=6)
    fit(module, callback)
    masks = masks_of(module)
    assert callback.history[0]["step"] == 6
    assert not masks["conv.weight"].all() or not masks["hidden.weight"].all()
    assert leaks(module) == []


# no-op and resume


@FORMS
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_no_penalty_is_training_without_the_callback(structured: bool, name: str) -> None:
    runs = []
    for callbacks in ([], [method(0.0, structured=structured)]):
        module = toy(make_optimizer=optimizers[name], dropout=0.2)
        trainer = fit(module, *callbacks, loader=toy_loader(shuffle=True))
        runs.append((weights_of(module), trainer.optimizers[0].state_dict(), trainer.callback_metrics))
    assert same(runs[0], runs[1])


@FORMS
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_resume_is_bitwise_in_every_phase(structured: bool, name: str, tmp_path: Path) -> None:
    def run(**settings: Any) -> Any:
        module = toy(make_optimizer=optimizers[name])
        callback = method(structured=structured, begin=2, end=8)
        saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        trainer = fit(module, callback, saver, loader=ResumableLoader(), enable_checkpointing=True, **settings)
        return weights_of(module), masks_of(module), trainer.optimizers[0].state_dict()

    whole = run()
    for step in (1, 2, 5, 8):
        assert same(run(ckpt_path=tmp_path / f"step={step}.ckpt"), whole)


def test_another_network_cannot_take_the_state(tmp_path: Path) -> None:
    callback = method(structured=True, end=8)
    fit(toy(), callback, ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1), enable_checkpointing=True)
    path = min(tmp_path.glob("*.ckpt"), key=lambda path: torch.load(path, weights_only=True)["global_step"])
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"][callback.state_key]["engine"]["zero"]["conv"] = torch.ones(5, dtype=torch.bool)
    torch.save(checkpoint, path)
    with pytest.raises(MisconfigurationException, match=r"channel groups .* are not those of this network"):
        fit(toy(), method(structured=True, end=8), ckpt_path=path)


# penalty="auto" and the shrink budget


def test_auto_takes_the_asked_multiple_of_the_median_norm() -> None:
    logger = Lines()
    module = toy(make_optimizer=lambda p: torch.optim.SGD(p, lr=0.05))
    weights = torch.cat(
        [module.get_parameter(f"{name}.weight").detach().flatten() for name in ("conv", "hidden", "head")]
    )
    fit(module, method(end=8, auto_factor=3.0), logger=logger)
    values = {key: value for line in logger.lines for key, value in line.items()}
    assert values["prune/shrink_budget"] == pytest.approx(3 * float(weights.abs().median()), rel=1e-6)
    assert values["prune/penalty"] == pytest.approx(values["prune/shrink_budget"] / (8 * 0.05), rel=1e-6)
    assert 0.8 < values["prune/reachable"] <= 1.0


def test_the_budget_follows_the_schedule_of_the_learning_rate() -> None:
    logger = Lines()
    module = toy(kind=Decaying)
    fit(module, method(1.0, end=8), logger=logger)
    values = {key: value for line in logger.lines for key, value in line.items()}
    assert values["prune/shrink_budget"] == pytest.approx(0.05 * 6 + 0.005 * 2, rel=1e-6)


class Decaying(Toy):
    """Its learning rate falls to a tenth after each epoch of 6 steps."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def test_a_penalty_that_can_bring_nothing_to_zero_is_warned_about() -> None:
    with pytest.warns(UserWarning, match=r"`penalty`=1e-06 takes a norm of .* less than the median norm .*: 0% can"):
        fit(toy(), method(1e-6, structured=True))


def test_a_large_penalty_is_not_warned_about() -> None:
    module = toy()
    fit(module, method(10.0, structured=True))  # a warning would be an error here
    assert int((~masks_of(module)["hidden.weight"]).sum()) > 0


# channels that cannot be driven to zero


class Sigmoids(Toy):
    """Its hidden units are 1/2 where their weights are zero."""

    def forward(self, images: Any) -> Any:
        features = torch.relu(self.norm(self.conv(images))).flatten(1)
        return self.head(torch.sigmoid(self.hidden(features)))


def test_units_that_are_not_zero_at_zero_weights_stay_whole_and_are_named() -> None:
    module, callback = toy(kind=Sigmoids), method(structured=True, auto_factor=1.5)
    fit(module, callback)
    assert "hidden.bias" not in masks_of(module)
    assert "head.weight" not in masks_of(module) or masks_of(module)["head.weight"].all()
    assert any(
        note.startswith("The channels of hidden stay whole: they are not zero when")
        for note in callback.history[0]["notes"]
    )


def test_frozen_channels_stay_whole_and_are_named() -> None:
    module, callback = toy(), method(structured=True)
    module.hidden.weight.requires_grad_(False)
    fit(module, callback)
    assert any(
        "The channels of hidden stay whole: hidden.weight is frozen" in note for note in callback.history[0]["notes"]
    )


# parameter groups and weights of groups


def test_different_learning_rates_inside_a_channel_are_a_metric() -> None:
    """With rates of 0.1 and 0.02 the channel's prox is that of the metric (10, 50)."""
    from lightning_prune.methods._prox_groups import Block, GroupTable, Piece
    from lightning_prune.methods._prox_operators import metric_group_prox
    from lightning_prune.methods._prox_parts import GroupPart
    from lightning_prune.methods._prox_penalties import GroupPenalty

    weight, bias = nn.Parameter(torch.randn(3, 4).double()), nn.Parameter(torch.randn(3).double())
    rows = torch.arange(3).view(3, 1)
    table = GroupTable([Block("layer", 3, (Piece(0, 0, rows), Piece(1, 0, rows)))], [weight, bias])
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 0.1}, {"params": [bias], "lr": 0.02}])
    penalty = GroupPenalty(parts=[GroupPart(optimizer, table)], stage_at=lambda step: "prox", asked=2.0)
    before = torch.cat([weight, bias.unsqueeze(1)], dim=1).detach().clone()
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
    optimizer.step()
    penalty.after(penalty.parts[0], 0)
    metric = torch.tensor([10.0] * 4 + [50.0]).double().expand(3, 5)
    expected = metric_group_prox(before, metric, torch.full((3,), 2.0).double())
    assert torch.allclose(torch.cat([weight, bias.unsqueeze(1)], dim=1).detach(), expected, atol=1e-12)


@pytest.mark.parametrize("rule", ["sqrt_size", "none", "flops"])
def test_weights_of_groups_have_mean_one(rule: str) -> None:
    found: list[torch.Tensor] = []
    callback = method(structured=True, group_weight=rule)
    make = callback.make_engine

    def noting(*args: Any) -> Any:
        engine = make(*args)
        found.extend(part.weight for part in engine.parts)
        return engine

    callback.make_engine = noting  # type: ignore[method-assign]
    fit(toy(), callback)
    (weight,) = found
    assert float(weight.mean()) == pytest.approx(1.0, abs=1e-6)
    if rule == "sqrt_size":  # a channel of conv: 9 + 1 and the norm's 2; one of hidden: 64 + 1
        assert float(weight[0] / weight[-1]) == pytest.approx((12 / 65) ** 0.5, rel=1e-5)
    elif rule == "flops":  # conv: 2 * 9 * 16 and 2 * 16 * 12 for its reader; hidden: 2 * 64 and 2 * 3
        assert float(weight[0] / weight[-1]) == pytest.approx((2 * 9 * 16 + 2 * 16 * 12) / (2 * 64 + 2 * 3), rel=1e-5)


def test_a_channel_without_a_gradient_is_passed_over() -> None:
    weights = nn.Parameter(torch.ones(4))
    from prox_cases import group_penalty

    penalty = group_penalty(sgd, weights, 2, stage_at=lambda step: "prox", asked=1.0)
    penalty.after(penalty.parts[0], 0)
    assert weights.tolist() == [1.0] * 4
    weights.grad = torch.zeros(4)
    penalty.after(penalty.parts[0], 1)
    assert float(weights.detach().max()) < 1.0


@pytest.mark.parametrize("make", [sgd, lambda p: torch.optim.Adam(p)])
def test_a_channel_part_of_which_is_held_by_a_rate_of_zero_is_passed_over(make: Any) -> None:
    from lightning_prune.methods._prox_groups import Block, GroupTable, Piece
    from lightning_prune.methods._prox_parts import GroupPart
    from lightning_prune.methods._prox_penalties import GroupPenalty

    weight, bias = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3))
    rows = torch.arange(3).view(3, 1)
    table = GroupTable([Block("layer", 3, (Piece(0, 0, rows), Piece(1, 0, rows)))], [weight, bias])
    optimizer = make([{"params": [weight], "lr": 0.1}, {"params": [bias], "lr": 0.0}])
    penalty = GroupPenalty(parts=[GroupPart(optimizer, table)], stage_at=lambda step: "prox", asked=1.0)
    weight.grad, bias.grad = torch.zeros(3, 4), torch.zeros(3)
    if make is not sgd:  # whose decay would move them; Adam's metric has to be seen
        optimizer.step()
    penalty.after(penalty.parts[0], 0)
    assert weight.tolist() == [[1.0] * 4] * 3
    assert bias.tolist() == [1.0] * 3
