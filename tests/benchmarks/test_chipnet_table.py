"""ChipNet beside random, magnitude and PFP's channels at equal FLOPs and equal training, on MNIST and Fashion-MNIST.

`pytest -m benchmark -s tests/benchmarks/test_chipnet_table.py` (needs LIGHTNING_PRUNE_DATA); with LIGHTNING_PRUNE_ROWS set
to a file, rows are kept there and a second run goes on where the first was stopped. LIGHTNING_PRUNE_BLOCKS=1: ResNet-8.

Every row starts from the dense network of its seed and takes as many optimizer steps: SOFT of AdamW, with gates for ChipNet
and without for the others, which prune then; and TUNE of SGD under the masks.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_prune import ChipNet, Magnitude, MaskManager, ProvableFilterPruning, RandomPruning, channel_groups
from lightning_prune.cost import CostModel
from lightning_prune.recipes.classifier import LitClassifier
from lightning_prune.recipes.data import MNIST, FashionMNIST
from lightning_prune.recipes.residual import ResNet
from lightning_prune.shrink import removable_units

FOLDER = Path(os.environ.get("LIGHTNING_PRUNE_DATA", ""))
pytestmark = [
    pytest.mark.benchmark,
    pytest.mark.timeout(14_400),
    pytest.mark.skipif(
        not all((FOLDER / name).is_dir() for name in ("mnist", "fashion_mnist")),
        reason="needs MNIST and Fashion-MNIST in LIGHTNING_PRUNE_DATA",
    ),
]
DATA: dict[str, Callable[..., Any]] = {"MNIST": MNIST, "Fashion-MNIST": FashionMNIST}
SEEDS, BUDGETS = (0, 1, 2), (0.5, 0.25, 0.1)
SAMPLES, BATCH, DENSE, SOFT, TUNE, TEST = 8192, 32, 400, 150, 250, 4000
BLOCKS = int(os.environ.get("LIGHTNING_PRUNE_BLOCKS", "3"))  # in each of three stages: 1 is ResNet-8, 3 is ResNet-20
CONTROLS: dict[str, Any] = {"random": RandomPruning, "magnitude": Magnitude, "PFP": ProvableFilterPruning}
METHODS = ("ChipNet", *CONTROLS)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)


def one_cycle(optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=total_steps)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-3)


def network() -> nn.Module:
    """A residual network of width 8 on pictures of 14 x 14."""
    return nn.Sequential(nn.AvgPool2d(2), ResNet(BLOCKS, in_channels=1, num_classes=10, width=8, shortcut="A"))


class Bench:
    """One data set: batches, dense networks by seed, and what a network gets right."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.data = DATA[name](batch_size=BATCH, subset=SAMPLES)
        self.data.prepare_data()
        self.data.setup("fit")
        self.data.setup("test")
        images, labels = zip(*self.data.test_dataloader(), strict=True)
        self.images, self.labels = torch.cat(images)[:TEST], torch.cat(labels)[:TEST]
        self.costs = CostModel(channel_groups(LitClassifier(network(), num_classes=10), torch.zeros(2, 1, 28, 28)))
        self.right: dict[int, float] = {}

    def module(self, seed: int) -> LitClassifier:
        """The dense network of a seed."""
        module = self._stored(f"{self.name}-{seed}", seed, None, lambda module: self.train(module, DENSE, seed))
        self.right.setdefault(seed, self.accuracy(module))
        return module

    def ready(self, seed: int) -> LitClassifier:
        """The dense network after as many more steps as ChipNet's soft phase has."""
        return self._stored(
            f"{self.name}-{seed}-ready",
            seed,
            self.module(seed),
            lambda module: self.train(module, SOFT, seed, soft=True),
        )

    def _stored(self, name: str, seed: int, start: LitClassifier | None, train: Callable[[Any], None]) -> LitClassifier:
        torch.manual_seed(seed)
        module = LitClassifier(network(), scheduler_interval="step", num_classes=10, input_shape=(1, 28, 28))
        path = self.folder / f"{name}-{BLOCKS}.pt"
        if not path.exists():
            if start is not None:
                module.load_state_dict(start.state_dict())
            train(module)
            torch.save(module.state_dict(), path)
        module.load_state_dict(torch.load(path, weights_only=True))
        return module

    def train(self, module: LitClassifier, steps: int, seed: int, *callbacks: Callback, soft: bool = False) -> None:
        module.make_optimizer, module.make_scheduler = (adamw, None) if soft else (sgd, one_cycle)
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        limits: dict[str, Any] = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0, "accelerator": "cpu"}
        trainer = Trainer(callbacks=[*callbacks], **limits, **quiet)
        torch.manual_seed(1000 + seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, self.data.train_dataloader())

    def flops(self, module: LitClassifier) -> float:
        """FLOPs of the network with its removed channels cut out, over those of the dense one."""
        kept = {name: int(mask.sum()) for name, mask in removable_units(module, self.costs.groups).items()}
        return self.costs.flops(kept) / self.costs.flops()

    @torch.no_grad()
    def accuracy(self, module: LitClassifier) -> float:
        flag, _ = module.training, module.eval()
        batches = zip(self.images.split(500), self.labels.split(500), strict=True)
        right = sum(int((module(x).argmax(1) == y).sum()) for x, y in batches)
        module.train(flag)
        return right / len(self.images)


class AfterPruning(Callback):
    """Accuracy of the masked network before the first step of fine-tuning."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.accuracy = bench, float("nan")

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.accuracy = self.bench.accuracy(pl_module)


def run(bench: Bench, method: str, seed: int, budget: float) -> dict[str, float]:
    """Prune a dense network to a share of its FLOPs and fine-tune it; accuracies before and after."""
    look, common = AfterPruning(bench), {"budget_type": "flops", "measure": False, "seed": seed, "refit_bn": True}
    callback: Any
    if method == "ChipNet":
        module = bench.module(seed)
        callback = ChipNet(budget, prune_fraction=1.0, stage_batches=0, **common)
        bench.train(module, SOFT, seed, callback, soft=True)
    else:
        module, callback = bench.ready(seed), CONTROLS[method](budget=budget, **common)
    bench.train(module, TUNE, seed, callback, look)
    return {
        "dense": bench.right[seed],
        "hard": look.accuracy,
        "tuned": bench.accuracy(module),
        "flops": bench.flops(module),
    }


def wanted() -> list[tuple[str, int, float, str]]:
    """All rows; a seed is done before the next one begins."""
    return [(name, seed, budget, method) for seed in SEEDS for name in DATA for budget in BUDGETS for method in METHODS]


def test_accuracy_at_equal_flops_and_equal_fine_tuning() -> None:
    torch.set_num_threads(1)
    path = Path(os.environ.get("LIGHTNING_PRUNE_ROWS") or Path(tempfile.mkdtemp()) / "rows.jsonl")
    rows = {tuple(row["key"]): row for row in map(json.loads, path.read_text().splitlines())} if path.exists() else {}
    benches: dict[str, Bench] = {}
    for key in wanted():
        if key in rows:
            continue
        name, seed, budget, method = key
        if name not in benches:
            benches[name] = Bench(name, path.parent)
        bench = benches[name]
        rows[key] = {"key": list(key), **run(bench, method, seed, budget)}
        with path.open("a") as file:
            file.write(json.dumps(rows[key]) + "\n")
        Console(width=140).print(rows[key])
    show(rows)
    assert all(row["flops"] <= row["key"][2] + 1e-9 for row in rows.values())


def test_masks_are_carried_to_the_other_data_set(tmp_path: Path) -> None:
    """ChipNet's masks of one data set on an untrained network for the other, beside its own masks and random ones."""
    torch.set_num_threads(1)
    folder = Path(os.environ["LIGHTNING_PRUNE_ROWS"]).parent if "LIGHTNING_PRUNE_ROWS" in os.environ else tmp_path
    benches = {name: Bench(name, folder) for name in DATA}
    for name, bench in benches.items():
        host = bench.module(0)
        bench.train(host, SOFT, 0, ChipNet(0.25, prune_fraction=1.0, stage_batches=0, measure=False), soft=True)
        MaskManager.of(host).save(folder / f"{name}.safetensors")
    table = Table(title=f"test accuracy in %, untrained networks, {DENSE} steps, seed 0")
    for column in ("trained on", "dense", "masks of MNIST", "masks of Fashion-MNIST", "random channels"):
        table.add_column(column)
    for name, bench in benches.items():
        cells = []
        for masks in (None, *DATA, "random"):
            torch.manual_seed(100)
            module = LitClassifier(network(), scheduler_interval="step", num_classes=10, input_shape=(1, 28, 28))
            if masks in DATA:
                MaskManager.of(module).load(folder / f"{masks}.safetensors")
            whole = RandomPruning(budget=0.25 if masks == "random" else 1.0, budget_type="flops", measure=False)
            bench.train(module, DENSE, 0, whole)  # a budget of 1 removes nothing more, and keeps what is removed
            cells.append(f"{100 * bench.accuracy(module):.2f} ({bench.flops(module):.2f})")
        table.add_row(name, *cells)
    Console(width=140).print(table)


def show(rows: dict[Any, dict[str, Any]]) -> None:
    table = Table(title="test accuracy in %, hard-masked -> fine-tuned: mean ± standard deviation over seeds")
    for column in ("data", "budget", "dense", *METHODS):
        table.add_column(column)
    for name in DATA:
        for budget in BUDGETS:
            cells = [spread(rows, name, budget, METHODS[0], "dense")]
            for method in METHODS:
                cells.append(" -> ".join(spread(rows, name, budget, method, what) for what in ("hard", "tuned")))
            table.add_row(name, str(budget), *cells)
    Console(width=170).print(table)


def spread(rows: dict[Any, dict[str, Any]], name: str, budget: float, method: str, what: str) -> str:
    values = [100 * rows[name, seed, budget, method][what] for seed in SEEDS if (name, seed, budget, method) in rows]
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else "-"
