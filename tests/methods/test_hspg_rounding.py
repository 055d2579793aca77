"""Targets: kept channels rounded to a multiple, and consumers refit where channels are cut before they have faded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integration.toys import QUIET, Toy, fit, leaks, masks_of, same, toy, toy_loss, weights_of
from lightning.pytorch import Callback
from torch import nn, tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import DHSPG, HESSO, HSPG, prune
from lightning_prune.methods._hspg_plan import to_multiples

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.* left no weight in")]
TARGETS: dict[str, Any] = {"hspg": HSPG, "hesso": HESSO, "dhspg": DHSPG}
BLOCKS = tensor([0, 0, 0, 0, 0, 1, 1, 1])


class Layers(Toy):
    """Two hidden layers of 24 and 20 units behind a convolution."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.hidden, self.second, self.head = nn.Linear(64, 24), nn.Linear(24, 20), nn.Linear(20, 3)

    def forward(self, images: Any) -> Any:
        features = torch.relu(self.norm(self.conv(images))).flatten(1)
        return self.head(torch.relu(self.second(torch.relu(self.hidden(features)))))


def widths(module: Layers) -> tuple[int, ...]:
    layers = (module.conv, module.hidden, module.second)
    return tuple(int((layer.weight.detach() != 0).flatten(1).any(1).sum()) for layer in layers)


# pure


def test_blocks_lose_what_is_over_a_multiple_lowest_first() -> None:
    taken = tensor([True, False, False, False, False, False, True, False])
    assert to_multiples([4, 1, 2, 7], taken, BLOCKS, [2, 2]) == []
    assert to_multiples([4, 1, 2, 7], taken, BLOCKS, [3, 1]) == [4]
    assert to_multiples([4, 1, 2, 7], taken, BLOCKS, [4, 2]) == []
    assert to_multiples([0, 4, 1, 2, 7], tensor([False, False, False, True] + [False] * 4), BLOCKS, [2, 2]) == []


def test_whole_blocks_stay_whole_and_none_is_emptied_or_taken_beyond_what_may_leave() -> None:
    nothing = torch.zeros(8, dtype=torch.bool)
    assert to_multiples([4, 1, 7], nothing, BLOCKS, [4, 2]) == []
    taken = tensor([True, True, False, False, False, True, False, False])
    assert to_multiples([4, 3, 7, 6], taken, BLOCKS, [8, 4]) == []
    assert to_multiples([], taken, BLOCKS, [2, 2]) == []
    assert to_multiples([3, 4], taken, BLOCKS, [2, 2]) == [3]


# in a fit


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("multiple", [2, 4])
def test_kept_channels_are_a_multiple_and_never_more_than_asked(kind: str, multiple: int) -> None:
    module = toy(kind=Layers)
    fit(module, TARGETS[kind](0.45, max_ratio=0.9, round_to=multiple, end=8, measure=False))
    kept = widths(module)
    assert sum(kept) <= 48 - int(0.45 * 48)
    assert all(width % multiple == 0 or width < multiple for width in kept[1:])
    assert min(kept) >= 1
    assert leaks(module) == []


def test_rounding_takes_fewer_than_a_multiple_from_each_layer() -> None:
    plain, rounded = toy(kind=Layers), toy(kind=Layers)
    fit(plain, HSPG(0.45, end=8, measure=False))
    fit(rounded, HSPG(0.45, end=8, round_to=4, measure=False))
    assert all(0 <= one - two < 4 for one, two in zip(widths(plain), widths(rounded), strict=True))


def test_the_channels_beyond_the_target_fade_with_the_last_period() -> None:
    """They are at zero when they are committed, as all others are: nothing is cut."""
    module, before = toy(kind=Layers), Before()
    fit(module, HSPG(0.45, end=8, periods=2, round_to=4, measure=False), before)
    assert before.cut == 0


class Before(Callback):
    """Counts entries that a mask zeroed although they were not zero after the optimizer's step."""

    cut = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == 7:
            self.handle = trainer.optimizers[0].register_step_post_hook(lambda *a: self.keep(pl_module))

    def keep(self, module: Any) -> None:
        self.rows = {n: p.detach().clone() for n, p in module.named_parameters() if n.split(".")[0] != "head"}
        self.handle.remove()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        made = {"conv.bias": "conv", "hidden.bias": "hidden", "second.bias": "second"}
        for name, layer in made.items():
            gone = ~masks_of(pl_module)[name]
            self.cut += int((self.rows[f"{layer}.weight"][gone] != 0).sum() + (self.rows[name][gone] != 0).sum())


def test_a_budget_is_kept_after_rounding() -> None:
    module = toy(kind=Layers)
    fit(module, HSPG(budget=0.5, budget_type="channels", round_to=4, end=8, measure=False))
    assert sum(widths(module)) <= 24
    assert all(width % 4 == 0 or width < 4 for width in widths(module)[1:])


# consumers


def many() -> DataLoader:
    """Eight batches of 64: enough to fit layers of 64 inputs."""
    images = torch.randn(512, 1, 6, 6, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(images, torch.arange(512) % 3), batch_size=64)


@pytest.mark.parametrize("kind", TARGETS)
def test_without_training_the_consumers_are_refit(kind: str) -> None:
    found = []
    for refit in (False, True):
        module = toy(kind=Layers)
        receipt = prune(module, TARGETS[kind](0.4, refit_consumers=refit, measure=False), many(), loss_fn=toy_loss)
        found.append((weights_of(module), masks_of(module), str(receipt.repair)))
        assert leaks(module) == []
    (plain, masks, said), (refit_weights, refit_masks, refit_said) = found
    assert same(masks, refit_masks)
    assert not same(plain, refit_weights)
    assert "refit by least squares" in refit_said
    assert "refit by least squares" not in said


@pytest.mark.parametrize("kind", ["hspg", "hesso"])
def test_channels_that_have_faded_leave_nothing_to_refit(kind: str) -> None:
    runs = []
    for refit in (False, True):
        module, callback = toy(kind=Layers), TARGETS[kind](0.4, end=8, refit_consumers=refit, measure=False)
        fit(module, callback)
        assert not any(event["repairs"] for event in callback.history)
        runs.append(weights_of(module))
    assert same(*runs)


def test_what_dhspg_cuts_in_the_end_is_refit() -> None:
    module = toy(kind=Layers)
    callback = DHSPG(0.4, end=8, refit_consumers=True, measure=False)  # the published penalty: nothing is zero by then
    fit(module, callback)
    assert any("refit by least squares" in repair for repair in callback.history[-1]["repairs"])
    assert leaks(module) == []


class Stop(Callback):
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= 6


def test_a_fit_that_ends_early_cuts_and_refits() -> None:
    module, callback = toy(kind=Layers), HSPG(0.4, end=11, refit_consumers=True, measure=False)
    with pytest.warns(UserWarning, match="training ended before its last planned step"):
        fit(module, callback, Stop())
    assert any("refit by least squares" in repair for repair in callback.history[-1]["repairs"])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HSPG(0.5, round_to=0), "`round_to` must be an integer >= 1"),
        (lambda: HESSO(0.5, round_to=1.5), "`round_to` must be an integer >= 1"),
        (lambda: DHSPG(0.5, round_to=-8), "`round_to` must be an integer >= 1"),
        (lambda: HSPG(0.5, refit_consumers=1), "`refit_consumers` must be true or false"),
        (lambda: HSPG(penalty=0.1, round_to=8), "`round_to` must be left out with a `penalty`, got 8"),
        (lambda: HSPG(penalty=0.1, refit_consumers=True), "`refit_consumers` must be left out with a `penalty`"),
        (lambda: HSPG(0.5, min_keep=0), "`min_keep` must be an integer >= 1"),
    ],
)
def test_arguments_out_of_range_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
