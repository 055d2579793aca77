"""What ChipNet refuses or warns about, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integration.toys import (
    QUIET,
    STEPS,
    Toy,
    fit,
    same,
    toy,
    toy_loader,
    weights_of,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from methods.chipnet_cases import Saver, chipnet
from torch import Tensor, nn

from lightning_prune import ChipNet, prune

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*exists and is not empty")]


# refusals


@pytest.mark.parametrize("budget", [0, 0.0, -0.1, 1.5, 25, None, "half", True, float("nan")])
def test_a_budget_outside_of_zero_to_one_is_refused(budget: Any) -> None:
    with pytest.raises(ValueError, match=r"`budget` must be in \(0, 1\]"):
        ChipNet(budget)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget_type": "energy"}, "`budget_type` must be one of"),
        ({"prune_fraction": 0.0}, r"`prune_fraction` must be a float in \(0, 1\].*got 0.0"),
        ({"prune_fraction": 1.5}, r"`prune_fraction` must be a float in \(0, 1\]"),
        ({"prune_fraction": True}, "`prune_fraction` must be"),
        ({"begin": -1}, "`begin` must be an int >= 0"),
        ({"begin": 0.6, "prune_fraction": 0.6}, r"`begin` \+ `prune_fraction` must not exceed 1, got 0.6 \+ 0.6"),
        ({"stages": 0}, "`stages` must be an integer >= 1"),
        ({"travel": 0.0}, "`travel` must be a finite number above 0"),
        ({"gate_lr": -1.0}, "`gate_lr` must be a finite number above 0"),
        ({"w_budget": -1.0}, "`w_budget` must be a finite number >= 0"),
        ({"w_crisp": float("inf")}, "`w_crisp` must be a finite number >= 0"),
        ({"bn_soft": "eval"}, "`bn_soft` must be one of 'frozen', 'train'"),
        ({"weight_rate": 1.5}, r"`weight_rate` must be a number in \[0, 1\], got 1.5"),
        ({"refit_consumers": None}, "`refit_consumers` must be true or false"),
        ({"ste_last": 1.0}, r"`ste_last` must be in \[0, 1\)"),
        ({"min_keep": 1.0}, r"`min_keep` must be in \[0, 1\)"),
        ({"round_to": 0}, "`round_to` must be an integer >= 1"),
        ({"fold": 1}, "`fold` must be true or false"),
        ({"coupling": "none"}, "`coupling` must be one of 'graph', 'per_layer'"),
        ({"coupling": "per_layer", "round_to": 8}, "`round_to` must be 1 with coupling='per_layer'"),
        ({"stage_batches": -1}, "`stage_batches` must be an integer >= 0"),
        ({"hard_validation": None}, "`hard_validation` must be true or false"),
        ({"preset": "paper"}, "`preset` must be one of 'reference'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChipNet(0.5, **arguments)


def test_a_budget_below_the_smallest_cost_is_refused_before_anything_changes() -> None:
    module = toy()
    before = weights_of(module)
    with pytest.raises(ValueError, match=r"`budget` must be at least 0\.\d+ for 'flops'.*got 0.01"):
        fit(module, chipnet(0.01))
    assert same(weights_of(module), before)
    assert all(not child._forward_pre_hooks for child in module.modules())


def test_few_soft_steps_are_named_with_the_step_size_that_works() -> None:
    with pytest.warns(UserWarning, match=r"6 soft steps are few \(below 100\).*6\.67 per step.*gate_lr=6\.67"):
        fit(toy(), ChipNet(0.5, measure=False))


def test_gates_that_cannot_cross_are_named() -> None:
    with pytest.warns(UserWarning, match=r"cannot cross: 6 soft steps of 0\.001.*0\.006.*gate_lr=6\.67"):
        fit(toy(), chipnet(gate_lr=1e-3))


def test_a_travel_that_is_too_short_is_named() -> None:
    with pytest.warns(UserWarning, match=r"cannot cross: 6 soft steps of 0\.5 move psi by at most 3"):
        fit(toy(), ChipNet(0.5, travel=3.0, measure=False))


def test_a_network_without_channels_is_refused() -> None:
    class Single(Toy):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.conv = self.norm = self.hidden = nn.Identity()
            self.head = nn.Linear(36, 3)

    with pytest.raises(ValueError, match=r"there is no channel to prune: 'head\.weight'"):
        fit(toy(kind=Single), chipnet())


def test_weights_that_are_all_read_past_their_modules_are_refused() -> None:
    class Sneaky(Toy):
        def forward(self, images: Tensor) -> Tensor:
            features = torch.relu(self.norm(self.conv(images))).flatten(1)
            hidden = torch.relu(nn.functional.linear(features, self.hidden.weight)) + 0 * self.hidden(features)
            return nn.functional.linear(hidden, self.head.weight) + 0 * self.head(hidden)

    with pytest.raises(ValueError, match=r"there is no channel to gate.*read outside of the modules that hold them"):
        fit(toy(kind=Sneaky), chipnet())


def test_training_that_diverges_is_stopped_with_a_remedy() -> None:
    class Diverging(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (1.0 if batch_idx < 2 else float("nan"))

    with pytest.raises(ValueError, match=r"gates is not finite at step 2: training diverges.*bn_soft='train'"):
        fit(toy(kind=Diverging), chipnet())


def test_pruning_at_once_is_refused() -> None:
    with pytest.raises(ValueError, match="learns its gates in a fit"):
        prune(toy(), chipnet(), toy_loader())


def test_a_fit_of_unknown_length_needs_steps() -> None:
    with pytest.raises(MisconfigurationException, match=r"`begin` and `prune_fraction` must be ints"):
        fit(toy(), chipnet(), max_epochs=-1)


def test_a_soft_phase_beyond_the_fit_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="beyond the fit of 12 optimizer steps"):
        fit(toy(), chipnet(prune_fraction=13))


def test_going_on_from_a_dense_checkpoint_past_the_beginning_is_refused(tmp_path: Path) -> None:
    fit(toy(), Saver(tmp_path), enable_checkpointing=True)
    with pytest.raises(MisconfigurationException, match=r"`begin` \(step 0\) lies before step 6"):
        fit(toy(), chipnet(), ckpt_path=tmp_path / f"step={STEPS}.ckpt")
