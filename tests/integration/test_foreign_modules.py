"""Modules written without pruning in mind: Lightning's own demos, every shape of batch, the other Lightning package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from integration.contract import NAMES, Spec, read_spec, target_kept
from integration.toys import (
    QUIET,
    STEPS,
    Toy,
    Watch,
    fit,
    kept_of,
    leaks,
    make_trainer,
    masks_of,
    sgd,
    toy,
    toy_data,
    toy_loader,
)
from lightning.pytorch import LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
from lightning.pytorch.demos.transformer import LightningTransformer, Transformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Magnitude

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:.* left no weight in"),
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching"),
    pytest.mark.filterwarnings("ignore:SynFlow does not conserve flow"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch.compile looks
]


def magnitude(at: Any = "start", **arguments: Any) -> Magnitude:
    return Magnitude(0.5, at=at, measure=False, **arguments)


# Lightning's demos, under every method


class SmallTransformer(LightningTransformer):
    """Lightning's language model in miniature; `prepare_data` would download a text."""

    def __init__(self) -> None:
        super().__init__(vocab_size=11)
        self.model = Transformer(vocab_size=11, ninp=8, nhead=2, nhid=8, nlayers=1)

    def prepare_data(self) -> None:
        pass

    def train_dataloader(self) -> DataLoader:
        tokens = torch.randint(11, (8, 6), generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=2)


def boring_loss(module: Any, batch: Any) -> Tensor:
    return module.step(batch)


FOREIGN: dict[str, tuple[type[LightningModule], dict[str, Any]]] = {
    "boring": (BoringModel, {}),
    "manual": (ManualOptimBoringModel, {"loss_fn": boring_loss}),
    "transformer": (SmallTransformer, {}),
}


@pytest.fixture(params=NAMES)
def spec(request: pytest.FixtureRequest) -> Spec:
    return read_spec(request.param)


@pytest.mark.parametrize("name", FOREIGN)
def test_every_method_prunes_lightnings_demos(spec: Spec, name: str) -> None:
    kind, arguments = FOREIGN[name]
    module, watch, callback = toy(kind=kind), Watch(), spec.build(**arguments)
    trainer = make_trainer(callback, watch, limit_train_batches=4, limit_val_batches=1)
    if spec.removes_channels and name != "transformer":
        with pytest.raises(ValueError, match="there is no channel to prune"):
            trainer.fit(module)
        return
    if spec.removes_channels and spec.arguments.get("budget") is not None:  # half of the cost is in no channel
        with pytest.raises(ValueError, match="`budget` must be at least"):
            trainer.fit(module)
        return
    trainer.fit(module)
    assert watch.found == [] == leaks(module)
    if not spec.counts_weights:
        return
    assert watch.pruned_steps > 0
    assert sum(int(mask.sum()) for mask in masks_of(module).values()) == target_kept(callback, module)


def test_the_transformer_is_pruned_in_its_linear_layers_alone() -> None:
    """The projections inside nn.MultiheadAttention are plain parameters; they are pruned when they are named."""
    module = toy(kind=SmallTransformer)
    make_trainer(magnitude(), limit_train_batches=2).fit(module)
    named = {"model.transformer.encoder.layers.0.linear1.weight", "model.decoder.weight"}
    assert named < set(masks_of(module))
    assert not any("norm" in name or "embedding" in name or "bias" in name for name in masks_of(module))
    other, inner = toy(kind=SmallTransformer), "model.transformer.encoder.layers.0.self_attn.in_proj_weight"
    make_trainer(magnitude(include=[inner]), limit_train_batches=2).fit(other)
    assert kept_of(other, [inner]) == 3 * 8 * 8 // 2


# shapes of training


class DictBatches(Toy):
    """Batches are dictionaries, the step returns one too."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.loss((batch["image"], batch["label"])), "extra": batch["label"]}


class SeveralLoaders(Toy):
    """One batch of each of two loaders per step; the step takes no index."""

    def training_step(self, batch: Any) -> Tensor:
        return self.loss(batch["first"]) + self.loss(batch["second"])


class ListOfLoaders(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(self.loss(part) for part in batch)


class Collecting(Toy):
    """Lightning's advised way to have all outputs of an epoch at its end, and a counter."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.outputs: list[Tensor] = []
        self.calls, self.epochs = 0, []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.outputs.append(loss.detach())
        self.calls += 1
        return loss

    def on_train_epoch_end(self) -> None:
        self.epochs.append((len(self.outputs), self.calls))
        self.outputs.clear()


def test_scoring_leaves_no_item_in_collected_outputs(spec: Spec) -> None:
    module = toy(kind=Collecting)
    fit(module, spec.build())
    assert module.epochs == [(STEPS, STEPS), (STEPS, 2 * STEPS)]


def dict_loader() -> DataLoader:
    def collate(rows: Any) -> dict[str, Tensor]:
        images, labels = zip(*rows, strict=True)
        return {"image": torch.stack(images), "label": torch.stack(labels)}

    return DataLoader(toy_data(), batch_size=4, collate_fn=collate)


SHAPES: dict[str, tuple[type[Toy], Callable[[], Any]]] = {
    "dict-batches": (DictBatches, dict_loader),
    "dict-of-loaders": (SeveralLoaders, lambda: {"first": toy_loader(), "second": toy_loader(shuffle=True)}),
    "list-of-loaders": (ListOfLoaders, lambda: [toy_loader(), toy_loader(shuffle=True)]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_method_prunes_under_every_shape_of_batch(spec: Spec, shape: str) -> None:
    kind, make_loader = SHAPES[shape]
    module, watch, callback = toy(kind=kind), Watch(), spec.build()
    fit(module, callback, watch, loader=make_loader())
    assert watch.found == [] == leaks(module)
    if spec.counts_weights:
        assert kept_of(module, masks_of(module)) == target_kept(callback, module)


def test_a_trainer_of_pytorch_lightning_is_served() -> None:
    """The same library under its older name: classes of the two packages are not instances of each other."""
    older = pytest.importorskip("pytorch_lightning")

    class Older(older.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(36, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

        def configure_optimizers(self) -> Any:
            return sgd(self.parameters())

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    module, callback = Older(), magnitude("end")
    scheduler = older.callbacks.GradientAccumulationScheduler({0: 1, 1: 4})
    trainer = older.Trainer(max_epochs=2, accelerator="cpu", callbacks=[callback, scheduler], **quiet)
    trainer.fit(module, toy_loader())
    assert kept_of(module, masks_of(module)) == 54
    assert [event["step"] for event in callback.history] == [trainer.global_step] == [STEPS + 2]
