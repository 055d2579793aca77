"""Small modules, loaders and watchers shared by contract and integration tests; subprocess scripts import it too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.masks import MaskManager
from lightning_prune.sandbox import rng_states

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

SAMPLES, BATCH = 24, 4
STEPS = SAMPLES // BATCH  # optimizer steps per epoch

# Lightning's hints about speed and about settings that a small test chooses on purpose
QUIET = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        r".*does not have many workers",
        r".*Consider setting `persistent_workers=True`",
        r"The number of training batches .* is smaller than the logging interval",
        r"You defined a `validation_step` but have no `val_dataloader`",
        r"Be aware that when using `ckpt_path`",
        r"Using ModelCheckpoint with manual optimization and every_n_train_steps",
        r"Checkpoint directory .* exists and is not empty",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated",
    )
]


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with momentum and weight decay: both bring pruned weights back unless something stops them."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-2)


def _muon(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Muon([parameter for parameter in parameters if parameter.ndim == 2], lr=0.05)


optimizers: dict[str, MakeOptimizer] = {
    "sgd": sgd,
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=1e-2),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=1e-2),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.9),
}
if hasattr(torch.optim, "Muon"):  # since torch 2.9
    optimizers["muon"] = _muon


class Toy(LightningModule):
    """A classifier of 1 x 6 x 6 images in three classes.

    Prunable: conv.weight (4, 1, 3, 3) = 36, hidden.weight (12, 64) = 768, head.weight (3, 12) = 36, 840 in all.
    """

    TOTAL = 840

    def __init__(self, make_optimizer: MakeOptimizer = sgd, dropout: float = 0.0) -> None:
        super().__init__()
        self.make_optimizer = make_optimizer
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(64, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.norm(self.conv(images))).flatten(1)
        return self.head(self.dropout(torch.relu(self.hidden(features))))

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class TwoOptimizers(Toy):
    """Manual optimization: per batch one step of the first optimizer and two of the second."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        for optimizer in (first, second, second):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        rest = [*self.conv.parameters(), *self.norm.parameters(), *self.head.parameters()]
        return self.make_optimizer(self.hidden.parameters()), optimizers["adamw"](rest)


def toy_loss(module: Any, batch: Any) -> Tensor:
    """Stands for a user's `loss_fn`."""
    return module.loss(batch)


def toy(seed: int = 0, kind: Callable[..., Any] = Toy, **arguments: Any) -> Any:
    """Return a module whose weights depend on `seed` alone."""
    torch.manual_seed(seed)
    return kind(**arguments)


def toy_data() -> TensorDataset:
    """24 images of 1 x 6 x 6 with labels in {0, 1, 2}, the same every time."""
    generator = torch.Generator().manual_seed(7)
    return TensorDataset(torch.randn(SAMPLES, 1, 6, 6, generator=generator), torch.arange(SAMPLES) % 3)


def toy_loader(shuffle: bool = False, **arguments: Any) -> DataLoader:
    """Six batches of four."""
    return DataLoader(toy_data(), batch_size=BATCH, shuffle=shuffle, **arguments)


class ResumableLoader(DataLoader):
    """Six batches of four that go on where a checkpoint left off, in an order that depends on the epoch alone."""

    def __init__(self) -> None:
        super().__init__(toy_data(), batch_size=BATCH)
        self.epoch, self.position = 0, 0

    def __iter__(self) -> Iterator[Any]:
        if self.position == STEPS:
            self.epoch, self.position = self.epoch + 1, 0
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch))
        while self.position < STEPS:
            chosen = order[self.position * BATCH :][:BATCH]
            self.position += 1
            yield [tensor[chosen] for tensor in self.dataset.tensors]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


def make_trainer(*callbacks: Callback, **settings: Any) -> Trainer:
    """Return a silent two-epoch CPU Trainer."""
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    defaults: dict[str, Any] = {**quiet, "max_epochs": 2, "accelerator": "cpu", "devices": 1}
    return Trainer(**{**defaults, **settings}, callbacks=list(callbacks))


def fit(module: Any, *callbacks: Callback, loader: Any = None, ckpt_path: Any = None, **settings: Any) -> Trainer:
    """Train `module` and return the Trainer; `settings` go to it."""
    trainer = make_trainer(*callbacks, **settings)
    trainer.fit(module, toy_loader() if loader is None else loader, ckpt_path=ckpt_path)
    return trainer


def expected_kept(total: int, sparsity: float) -> int:
    """Return kept = n - floor(s n + 1e-9), written out again."""
    return total - math.floor(sparsity * total + 1e-9)


def masks_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the masks in force."""
    return MaskManager.of(module).masks


def leaks(module: nn.Module, masks: Mapping[str, Tensor] | None = None) -> list[str]:
    """Name the tensors of `module` that hold something else than 0 at a pruned entry."""
    masks = masks_of(module) if masks is None else masks
    parameters = {name.replace("_orig_mod.", ""): p for name, p in module.named_parameters()}
    return [name for name, mask in masks.items() if bool((parameters[name].detach()[~mask] != 0).any())]


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the whole state dict."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def kept_of(module: nn.Module, names: Iterable[str]) -> int:
    """Count the entries of the named tensors that are not 0."""
    parameters = dict(module.named_parameters())
    return sum(int((parameters[name] != 0).sum()) for name in names)


def same(one: Any, two: Any) -> bool:
    """Whether two trees of tensors and plain values are equal bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, Mapping):
        return isinstance(two, Mapping) and list(one) == list(two) and all(same(one[k], two[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


class Watch(Callback):
    """Looks at the weights after every optimizer step and every batch; keeps what leaked and how often it looked."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.steps = 0
        self.pruned_steps = 0
        self._handles: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self._handles:  # after the hooks of the pruning callbacks
            hook = self._hook(pl_module)
            self._handles = [optimizer.register_step_post_hook(hook) for optimizer in trainer.optimizers]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.found += leaks(pl_module)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, module: Any) -> Callable[..., None]:
        def look(*args: Any) -> None:
            self.steps += 1
            self.pruned_steps += any(not bool(mask.all()) for mask in masks_of(module).values())
            self.found += leaks(module)

        return look


class RandomTrace(Callback):
    """Keeps the batches and the global random states of a fit, to compare two fits."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.states += [batch, rng_states()]

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.states.append(rng_states())
