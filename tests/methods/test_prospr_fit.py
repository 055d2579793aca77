"""ProsPr in a Trainer: purity, determinism, variants, every kind of module, ranks."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from methods.prospr_cases import (
    QUIET,
    entropy,
    masks_after,
    pruner,
    same,
    trainer_of,
    without_curvature,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

import lightning_prune.methods.prospr as prospr
from lightning_prune import SNIP, MaskManager, ProsPr, prune
from lightning_prune.sandbox import rng_states

pytestmark = QUIET


# purity and determinism


class Counting(LightningModule):
    """Logs, counts in torchmetrics, draws noise, writes buffers and freezes a part of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.metric = MeanMetric()
        self.body[1].bias.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noise = random.random() + np.random.rand() + float(torch.rand(1))
        loss = entropy(self, batch) * (1 + 0.01 * noise)
        self.metric.update(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("metric", self.metric, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def snapshot(trainer: Trainer, module: Counting) -> list[Any]:
    """Everything that scoring may not touch, as comparable values."""
    states = rng_states()
    return [
        {name: value.tolist() for name, value in module.state_dict().items()},
        [parameter.grad for parameter in module.parameters()],
        [parameter.requires_grad for parameter in module.parameters()],
        [child.training for child in module.modules()],
        [len(child._forward_hooks) for child in module.modules()],
        [str(states["python"]), str(states["numpy"]), states["torch"].tolist()],
        [str(optimizer.state_dict()) for optimizer in trainer.optimizers],
        dict(trainer.callback_metrics),
        dict(trainer.logged_metrics),
        [float(module.metric.mean_value), float(module.metric.weight), module.metric._update_count],
        torch.is_grad_enabled(),
    ]


@pytest.mark.parametrize(
    "arguments", [{}, {"structured": True, "include": ["body.1", "body.4"]}, {"mode": "first_order"}]
)
def test_scoring_touches_nothing(loader: DataLoader, arguments: dict[str, Any]) -> None:
    class Around(ProsPr):
        def propose(self, context: Any) -> Any:
            trainer = context.objective.trainer
            context.module.body[3].eval()
            before = snapshot(trainer, context.module)
            proposal = super().propose(context)
            assert snapshot(trainer, context.module) == before
            seen.append(True)
            return proposal

    seen: list[bool] = []
    trainer_of(Around(0.5, measure=False, **arguments)).fit(Counting(), loader)
    assert seen == [True]


def test_no_sparsity_is_training_without_the_callback_bit_for_bit(dataset: TensorDataset) -> None:
    states = []
    for callbacks in ([], [pruner(0.0)]):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        module = Counting()
        trainer_of(*callbacks, max_epochs=2).fit(module, DataLoader(dataset, batch_size=4, shuffle=True))
        states.append(module.state_dict())
    assert same(*states)


def test_only_selected_weights_change_and_only_to_zero(tiny: Any, loader: DataLoader) -> None:
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    prune(tiny, pruner(), list(loader), entropy)
    masks = MaskManager.of(tiny).masks
    for name, value in tiny.state_dict().items():
        assert torch.equal(value, before[name] * masks[name] if name in masks else before[name])


def test_masks_depend_on_the_seed_and_not_on_the_global_generator(tiny_class: Any, loader: DataLoader) -> None:
    skip = 0

    def make() -> Any:
        module = tiny_class(dropout=0.5)
        torch.rand(skip)
        return module

    found = []
    for seed, draws in ((0, 0), (0, 7), (1, 0)):
        skip = draws
        found.append(masks_after(make, loader, pruner(seed=seed)))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_a_resumed_fit_does_not_score_again(
    tiny_class: Any, loader: DataLoader, tmp_path: Path, monkeypatch: Any
) -> None:
    saver = ModelCheckpoint(tmp_path, filename="last", save_top_k=-1)
    module = tiny_class()
    trainer_of(pruner(), saver, enable_checkpointing=True).fit(module, loader)
    monkeypatch.setattr(prospr, "meta_gradient", None)
    other = tiny_class()
    trainer_of(pruner(), max_epochs=2).fit(other, loader, ckpt_path=tmp_path / "last.ckpt")
    assert same(MaskManager.of(module).masks, MaskManager.of(other).masks)
    assert all(
        not p[~MaskManager.of(other).masks[n]].any() for n, p in other.named_parameters() if n.endswith("head.weight")
    )


class Recorder(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, float] = {}

    name, version = "recorder", 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.values.update({key: value for key, value in metrics.items() if key.startswith("prune/")})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def test_inner_losses_are_logged_once(tiny: Any, loader: DataLoader) -> None:
    logger = Recorder()
    trainer_of(pruner(steps=2), logger=logger).fit(tiny, loader)
    inner = [logger.values[f"prune/{name}"] for name in ("inner_loss_0", "inner_loss_1", "meta_loss")]
    assert all(0.5 < value < 3 for value in inner)
    assert len(set(inner)) == 3
    assert logger.values["prune/n_active"] == 38


# variants


def test_no_inner_step_is_snip(tiny_class: Any, loader: DataLoader) -> None:
    assert same(
        masks_after(tiny_class, loader, pruner(steps=0)),
        masks_after(tiny_class, loader, SNIP(0.8, measure=False)),
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"steps": 1}, {"mode": "first_order"}, {"new_data": False}, {"samples": 3}, {"rounds": 3},
        {"inner_momentum": 0.0}, {"inner_nesterov": True}, {"inner_weight_decay": 0.5},
        {"detach_first_momentum": True}, {"batch_size": 7}, {"scope": "layer"}, {"inner_lr": 1.5},
        {"shuffle_within_layer": True},
    ],
)  # fmt: skip
def test_every_variant_prunes_the_exact_count_and_differs(
    arguments: dict[str, Any], tiny_class: Any, loader: DataLoader
) -> None:
    plain = masks_after(tiny_class, loader, pruner())
    other = masks_after(tiny_class, loader, pruner(**arguments))
    assert sum(int(mask.sum()) for mask in other.values()) == (39 if "scope" in arguments else 38)
    assert not same(plain, other)


def test_variants_that_only_save_memory_change_no_mask(tiny_class: Any, loader: DataLoader) -> None:
    def make() -> Any:
        module = tiny_class()
        module.norm = nn.Identity()
        return module

    plain = masks_after(make, loader, pruner())
    for arguments in (
        {"micro_batch_size": 2},
        {"trajectory_device": "cpu"},
        {"backend": "forward_over_reverse"},
    ):
        assert same(plain, masks_after(make, loader, pruner(**arguments)))


def test_no_inner_rate_takes_that_of_the_optimizer(tiny_class: Any, loader: DataLoader) -> None:
    callback = pruner(inner_lr=None)
    assert same(masks_after(tiny_class, loader, callback), masks_after(tiny_class, loader, pruner(inner_lr=0.05)))
    assert any(note.endswith("with inner_lr 0.05.") for note in callback.history[0]["notes"])


def test_too_little_data_is_read_again_and_noted(tiny: Any, loader: DataLoader) -> None:
    callback = pruner(steps=7)
    trainer_of(callback).fit(tiny, loader)
    assert any("were read 2 times" in note for note in callback.history[0]["notes"])


# modules


class Tied(LightningModule):
    """Two layers that share a weight, one that is frozen, one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(6, 2)
        self.frozen.weight.requires_grad_(False)


def tied_loss(module: Any, batch: Tensor) -> Tensor:
    return module.frozen(module.second(torch.tanh(module.first(batch)))).square().mean()


def test_frozen_tied_and_unused_weights_are_scored() -> None:
    module = Tied()
    batches = [torch.randn(8, 6) for _ in range(4)]
    frozen = module.frozen.weight.clone()
    prune(module, pruner(0.5, min_keep_per_layer=0), batches, tied_loss)
    masks = MaskManager.of(module).masks
    assert {name: mask.numel() for name, mask in masks.items()} == {
        "first.weight": 36, "idle.weight": 36, "frozen.weight": 12,
    }  # fmt: skip
    assert int(masks["idle.weight"].sum()) == 0  # scores of exactly 0 go first
    assert int(masks["first.weight"].sum()) + int(masks["frozen.weight"].sum()) == 42
    assert torch.equal(module.frozen.weight, frozen * masks["frozen.weight"])


def test_a_tied_weight_is_scored_by_its_total_derivative() -> None:
    module = Tied()
    batch = torch.randn(8, 6)
    first, second = (module.first.weight.detach().clone().requires_grad_() for _ in range(2))
    frozen = module.frozen.weight.detach().clone().requires_grad_()
    hidden = nn.functional.linear(torch.tanh(nn.functional.linear(batch, first, module.first.bias)), second)
    loss = nn.functional.linear(hidden + module.second.bias, frozen, module.frozen.bias).square().mean()
    slopes = torch.autograd.grad(loss, [first, second, frozen])
    scores = torch.cat([(first * (slopes[0] + slopes[1])).flatten(), (frozen * slopes[2]).flatten()]).abs()
    expected = sorted(scores.argsort(descending=True, stable=True)[:24].tolist())
    prune(module, pruner(0.5, steps=0, include=["first", "frozen"]), [batch], tied_loss)
    masks = MaskManager.of(module).masks
    kept = torch.cat([masks["first.weight"].flatten(), masks["frozen.weight"].flatten()])
    assert kept.nonzero().flatten().tolist() == expected


def test_half_precision_is_scored_in_single_precision(tiny_class: Any, loader: DataLoader) -> None:
    batches = list(loader)
    torch.manual_seed(0)
    module = tiny_class().bfloat16()
    seen: set[torch.dtype] = set()

    def loss(module: Any, batch: Any) -> Tensor:
        seen.add(batch[0].dtype)
        seen.add(module.head.weight.dtype)
        return entropy(module, batch)

    prune(module, pruner(), [(images.bfloat16(), labels) for images, labels in batches], loss)
    assert seen == {torch.float32}
    assert module.head.weight.dtype == torch.bfloat16
    assert MaskManager.of(module).counts() == (38, 188)


def test_compiled_modules_are_scored_eagerly(tiny_class: Any, loader: DataLoader) -> None:
    masks = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = tiny_class()
        if compiled:
            module.hidden = torch.compile(module.hidden, backend="eager")
        prune(module, pruner(), list(DataLoader(loader.dataset, batch_size=4)), entropy)
        masks.append(MaskManager.of(module).masks)
    assert same(*masks)


def test_a_module_without_second_derivatives_is_pruned_to_first_order(tiny: Any, loader: DataLoader) -> None:
    prune(tiny, pruner(mode="first_order"), list(loader), without_curvature)
    assert MaskManager.of(tiny).counts() == (38, 188)


def test_fused_attention_is_scored_by_a_kernel_that_has_second_derivatives() -> None:
    module = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        return module(batch).square().mean()

    prune(module, pruner(0.9), [torch.randn(3, 5, 8) for _ in range(4)], loss)
    kept, total = MaskManager.of(module).counts()
    assert (kept, total) == (320 - 288, 320)


# ranks


class Record(Callback):
    """Writes the masks of this rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save(MaskManager.of(pl_module).masks, self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork (POSIX)")
def test_two_ranks_score_as_one_process_with_their_batches_together(
    tiny_class: Any, dataset: TensorDataset, tmp_path: Path
) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        module = tiny_class()
        module.norm = nn.Identity()  # its statistics would be those of each rank
        return module

    callback = pruner(steps=2, inner_weight_decay=0.01)
    trainer = trainer_of(callback, Record(tmp_path), strategy="ddp_fork", devices=2)
    trainer.fit(make(), DataLoader(dataset, batch_size=4))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))  # ranks take every second sample of it
    together = [tuple(tensor[part] for tensor in dataset.tensors) for part in order.split(8)]
    alone = make()
    prune(alone, pruner(steps=2, inner_weight_decay=0.01), together, entropy)
    assert same(ranks[0], ranks[1])
    assert same(ranks[0], MaskManager.of(alone).masks)
