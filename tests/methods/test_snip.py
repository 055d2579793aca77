"""SNIP, Iter-SNIP, FORCE, and what methods at initialization share: minimum per layer, rounds, shuffled control."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune import SNIP, MaskManager, prune
from lightning_prune.curvature import Losses
from lightning_prune.methods._prospr_batches import BatchStream, progress, resized
from lightning_prune.methods._prospr_selection import (
    keep_with_minimum,
    prune_in_rounds,
    shuffled,
    thin_layers,
)
from lightning_prune.methods.snip import sensitivity, snip_scores
from lightning_prune.objective import Objective

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*isinstance.treespec",
    "ignore:.*smaller than the logging interval",
)


def everything(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks that keep all."""
    return {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}


def quadratic(*targets: float) -> Losses:
    """L_t(w) = 1/2 |w - target_t|^2, so that dL/dw = w - target_t."""
    return Losses(lambda step: [lambda theta: 0.5 * (theta["w"] - targets[step]).square().sum()])


def fitted(module: LightningModule, loader: DataLoader, callback: Callback, epochs: int = 1) -> Trainer:
    """Fit on the CPU without files."""
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return trainer


# scores


def test_the_score_is_weight_times_gradient() -> None:
    scores = snip_scores(quadratic(1.0), {"w": torch.tensor([3.0, -2.0, 1.0, 0.0])})
    assert scores["w"].tolist() == [6.0, 6.0, 0.0, 0.0]


def test_batches_are_averaged_before_the_absolute_value() -> None:
    scores = snip_scores(quadratic(0.0, 4.0), {"w": torch.tensor([2.0, 3.0])}, count=2)
    assert scores["w"].tolist() == [0.0, 3.0]


def test_a_masked_weight_is_scored_by_what_its_return_would_change() -> None:
    mask = torch.tensor([True, False])
    values = sensitivity(quadratic(1.0), 1, {"w": torch.tensor([3.0, 5.0])}, {"w": mask})
    assert values["w"].tolist() == [3.0 * 2.0, 5.0 * -1.0]


def test_a_loss_that_is_not_finite_names_the_batch() -> None:
    with pytest.raises(ValueError, match="loss of calibration batch 1 is not finite"):
        snip_scores(quadratic(1.0, float("nan")), {"w": torch.tensor([3.0])}, count=2)


# the minimum per layer


def test_every_layer_keeps_its_best_and_the_count_stays_exact() -> None:
    scores = {"a": torch.tensor([9.0, 8.0, 7.0, 6.0]), "b": torch.tensor([1.0, 2.0, 2.0, 0.0])}
    masks = keep_with_minimum(scores, 0.5, "global", 1, everything(scores))
    assert masks["a"].tolist() == [True, True, True, False]
    assert masks["b"].tolist() == [False, True, False, False]


def test_without_a_minimum_the_ranking_alone_decides() -> None:
    scores = {"a": torch.tensor([9.0, 8.0, 7.0, 6.0]), "b": torch.tensor([1.0, 2.0, 3.0, 0.0])}
    masks = keep_with_minimum(scores, 0.5, "global", 0, everything(scores))
    assert (int(masks["a"].sum()), int(masks["b"].sum())) == (4, 0)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.98, 0.999])
@pytest.mark.parametrize("kind", ["equal", "zeros", "random"])
def test_the_count_is_exact_for_ties_and_zeros(sparsity: float, kind: str) -> None:
    make = {"equal": torch.ones, "zeros": torch.zeros, "random": torch.rand}[kind]
    scores = {"a": make(60, 50), "b": make(2000)}
    if kind == "zeros":
        scores["a"][0, :3] = 1.0
    masks = keep_with_minimum(scores, sparsity, "global", 2, everything(scores))
    assert sum(int(mask.sum()) for mask in masks.values()) == 5000 - round(5000 * sparsity)
    assert all(int(mask.sum()) >= 2 for mask in masks.values())


def test_98_percent_of_a_hundred_keeps_two() -> None:
    scores = {"a": torch.rand(100)}
    assert int(keep_with_minimum(scores, 0.98, "global", 1, everything(scores))["a"].sum()) == 2


def test_masks_are_nested_in_sparsity() -> None:
    scores = {"a": torch.rand(40), "b": torch.rand(30)}
    masks = [keep_with_minimum(scores, s, "global", 0, everything(scores)) for s in (0.9, 0.5, 0.2)]
    for small, large in pairwise(masks):
        assert all(bool((large[name] | ~small[name]).all()) for name in scores)


def test_scores_times_a_constant_give_the_same_mask() -> None:
    scores = {"a": torch.rand(40), "b": torch.rand(30)}
    scaled = {name: 8 * score for name, score in scores.items()}
    one, two = (keep_with_minimum(s, 0.7, "global", 1, everything(scores)) for s in (scores, scaled))
    assert all(torch.equal(one[name], two[name]) for name in scores)


def test_dead_entries_never_come_back_for_the_minimum() -> None:
    scores = {"a": torch.tensor([5.0, 4.0, 1.0]), "b": torch.tensor([9.0, 3.0, 2.0])}
    alive = {"a": torch.tensor([False, False, True]), "b": torch.tensor([True, True, True])}
    masks = keep_with_minimum(scores, 0.5, "global", 2, alive)
    assert (masks["a"].tolist(), masks["b"].tolist()) == ([False, False, True], [True, True, False])


def test_minima_beyond_the_target_are_refused() -> None:
    scores = {"a": torch.rand(10), "b": torch.rand(10)}
    with pytest.raises(
        ValueError, match=r"keeps 6 entries of the 2 tensors, more than the 2 .* sparsity of at most 0.7"
    ):
        keep_with_minimum(scores, 0.9, "global", 3, everything(scores))


def test_minima_beyond_one_layer_are_refused_in_layer_scope() -> None:
    scores = {"a": torch.rand(100), "b": torch.rand(10)}
    with pytest.raises(ValueError, match=r"keeps 3 entries of 'b', more than the 1"):
        keep_with_minimum(scores, 0.9, "layer", 3, everything(scores))


def test_layers_below_one_percent_are_thin() -> None:
    masks = {"thin": torch.arange(1000) < 9, "fine": torch.arange(1000) < 10}
    assert thin_layers(masks) == ["thin"]


# rounds and the shuffled control


def test_densities_fall_by_equal_factors_and_end_exactly() -> None:
    levels: list[float] = []
    scores = {"a": torch.rand(1000)}

    def keep(scores: Mapping[str, Tensor], sparsity: float, alive: Mapping[str, Tensor]) -> dict[str, Tensor]:
        levels.append(sparsity)
        return keep_with_minimum(scores, sparsity, "global", 0, alive)

    masks = prune_in_rounds(lambda masks: scores, keep, everything(scores), 0.999, rounds=3)
    assert [1 - level for level in levels] == pytest.approx([0.1, 0.01, 0.001])
    assert levels[-1] == 0.999
    assert int(masks["a"].sum()) == 1


def rank_against_the_last_round(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores that prefer what was pruned before."""
    return {name: torch.where(mask, torch.arange(8.0), torch.arange(8.0) + 10) for name, mask in masks.items()}


def test_pruned_entries_stay_pruned_unless_they_may_regrow() -> None:
    alive = {"a": torch.ones(8, dtype=torch.bool)}
    alive["a"][0] = False

    def keep(scores: Mapping[str, Tensor], sparsity: float, alive: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return keep_with_minimum(scores, sparsity, "global", 0, alive)

    stays = prune_in_rounds(rank_against_the_last_round, keep, alive, 0.5, rounds=2)
    returns = prune_in_rounds(rank_against_the_last_round, keep, alive, 0.5, rounds=2, regrow=True)
    assert stays["a"].nonzero().flatten().tolist() == [4, 5, 6, 7]
    assert returns["a"].nonzero().flatten().tolist() == [1, 5, 6, 7]


def test_shuffling_keeps_the_layer_rates_and_never_wakes_the_dead() -> None:
    generator = torch.Generator().manual_seed(0)
    alive = {"a": torch.arange(100).view(10, 10) % 2 == 0, "b": torch.ones(50, dtype=torch.bool)}
    masks = {"a": alive["a"] & (torch.arange(100).view(10, 10) < 30), "b": torch.arange(50) < 5}
    moved = shuffled(masks, alive, generator)
    assert (int(moved["a"].sum()), int(moved["b"].sum())) == (15, 5)
    assert not bool((moved["a"] & ~alive["a"]).any())
    assert not torch.equal(moved["b"], masks["b"])


# batches


def test_batches_are_cut_and_joined_to_a_size() -> None:
    batches = [{"x": torch.arange(start, start + 3)} for start in (0, 3, 6)]
    assert [batch["x"].tolist() for batch in resized(batches, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert [batch["x"].tolist() for batch in resized(batches, 2)] == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]


def test_batches_of_other_shapes_are_not_joined() -> None:
    batches = [torch.zeros(2, 3), torch.zeros(2, 4)]
    assert [tuple(batch.shape) for batch in resized(batches, 3)] == [(2, 3), (2, 4)]


def test_a_short_data_set_is_read_again_and_says_so() -> None:
    stream = BatchStream(Objective(nn.Linear(1, 1), lambda count: [1, 2, 3], loss_fn=lambda module, batch: batch))
    assert stream.take(3) == [1, 2, 3]
    assert stream.notes() == []
    assert stream.take(2) == [1, 2]
    assert stream.notes() == [
        "The calibration data were read 2 times: one pass holds too few batches for distinct ones."
    ]


def test_no_batch_at_all_is_refused() -> None:
    stream = BatchStream(Objective(nn.Linear(1, 1), lambda count: [], loss_fn=lambda module, batch: batch))
    with pytest.raises(ValueError, match="there is no calibration batch"):
        stream.take(1)


def test_the_bar_appears_only_when_work_turns_out_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    with progress("quick", 3, show=True) as advance:
        advance()
        assert advance.__self__.bar is None  # type: ignore[attr-defined]
        now[0] = 3.0
        advance()
        assert advance.__self__.bar is None  # type: ignore[attr-defined]
    with progress("slow", 10, show=True) as advance:
        now[0] = 6.0
        advance()
        assert advance.__self__.bar.tasks[0].completed == 1  # type: ignore[attr-defined]


# the callback


def test_a_fit_starts_from_the_pruned_weights_with_the_highest_sensitivity(tiny: Any, loader: DataLoader) -> None:
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    seen: dict[str, Tensor] = {}

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                seen.update({name: value.clone() for name, value in module.state_dict().items()})

    callback = SNIP(sparsity=0.9, measure=False)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[callback, Look()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(tiny, loader)
    masks = MaskManager.of(tiny).masks
    assert MaskManager.of(tiny).counts() == (19, 188)
    for name, value in seen.items():
        assert torch.equal(value, before[name] * masks[name] if name in masks else before[name])


def test_the_callback_keeps_what_the_gradient_of_its_first_batch_says(tiny: Any, dataset: Any) -> None:
    batches = [tuple(tensor[start : start + 4] for tensor in dataset.tensors) for start in (0, 4)]
    names = ["conv.weight", "hidden.weight", "head.weight"]
    weights = [dict(tiny.named_parameters())[name] for name in names]
    loss = nn.functional.cross_entropy(tiny(batches[0][0]), batches[0][1])
    scores = [(w * g).abs().detach() for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True)]
    order = torch.cat([score.flatten() for score in scores]).argsort(descending=True, stable=True)[:94]
    prune(tiny, SNIP(sparsity=0.5, min_keep_per_layer=0), batches)
    masks = MaskManager.of(tiny).masks
    kept = torch.cat([masks[name].flatten() for name in names]).nonzero().flatten()
    assert kept.tolist() == sorted(order.tolist())


def test_force_may_keep_other_weights_than_iterated_snip(tiny_class: Any, loader: DataLoader) -> None:
    masks = []
    for arguments in ({"rounds": 1}, {"rounds": 6}, {"rounds": 6, "regrow": True}):
        torch.manual_seed(0)
        module = tiny_class()
        fitted(module, loader, SNIP(sparsity=0.9, measure=False, **arguments))
        assert MaskManager.of(module).counts() == (19, 188)
        masks.append(MaskManager.of(module).masks)
    assert any(not torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert any(not torch.equal(masks[1][name], masks[2][name]) for name in masks[1])


def test_the_shuffled_control_keeps_the_layer_rates(tiny_class: Any, loader: DataLoader) -> None:
    masks = []
    for shuffle in (False, True):
        torch.manual_seed(0)
        module = tiny_class()
        callback = SNIP(sparsity=0.8, measure=False, shuffle_within_layer=shuffle)
        fitted(module, loader, callback)
        masks.append(MaskManager.of(module).masks)
    assert {n: int(m.sum()) for n, m in masks[0].items()} == {n: int(m.sum()) for n, m in masks[1].items()}
    assert any(not torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert "shuffled" in callback.receipt.notes[0]


def test_a_thin_layer_is_named(loader: DataLoader) -> None:
    class Wide(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.head = nn.Linear(16, 200), nn.Linear(200, 3)
            with torch.no_grad():
                self.wide.weight.mul_(1e-6)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.wide(images.flatten(1)).tanh())

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    with pytest.warns(UserWarning, match=r"keeps less than 1 % of wide\.weight"):
        prune(Wide(), SNIP(sparsity=0.9), loader, loss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 0}, "`rounds` must be an integer >= 1, got 0"),
        ({"batches": 0}, "`batches` must be an integer >= 1"),
        ({"batch_size": 0}, "`batch_size` must be an integer >= 1"),
        ({"micro_batch_size": 1.5}, "`micro_batch_size` must be an integer >= 1"),
        ({"regrow": 1}, "`regrow` must be true or false"),
        ({"min_keep_per_layer": -1}, "`min_keep_per_layer` must be an integer >= 0"),
        ({"shuffle_within_layer": "yes"}, "`shuffle_within_layer` must be true or false"),
        ({"scope": "block"}, "`scope` must be 'global' or 'layer'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SNIP(sparsity=0.5, **arguments)
