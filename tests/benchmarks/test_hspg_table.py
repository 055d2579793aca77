"""Group sparsity, FLOPs after cutting and accuracy: half-space projections beside the prox, HESSO, magnitude and random.

`HSPG_TABLE_ROWS=rows.jsonl pytest -m benchmark -s tests/benchmarks/test_hspg_table.py` (needs LIGHTNING_PRUNE_DATA)

Four convolutions with BatchNorm on images of half the resolution, 300 steps of Nesterov SGD with a cosine schedule for every
row. Channels are gone by half of the fit; the rest is fine-tuning. The callbacks' engines run in a plain loop, in the order of
the Trainer's hooks. Rows are kept in the file and not measured again, unless what they are measured with has changed.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import DHSPG, HESSO, HSPG, Magnitude, MaskManager, ProxSGD, RandomPruning, prune, shrink
from lightning_prune.channels import trace_channels
from lightning_prune.context import Context, event_generator
from lightning_prune.measure import count_flops
from lightning_prune.methods._prox_callback import ProximalCallback
from lightning_prune.methods._prox_penalties import Penalty
from lightning_prune.methods._prox_scale import future_rates, reach
from lightning_prune.oneshot import OneShotPruning
from lightning_prune.recipes.data import MNIST, FashionMNIST
from lightning_prune.targets import select

FOLDER = Path(os.environ.get("LIGHTNING_PRUNE_DATA", ""))
pytestmark = [
    pytest.mark.benchmark,
    pytest.mark.timeout(10800),
    pytest.mark.skipif(not (FOLDER / "mnist").is_dir(), reason="needs MNIST and Fashion-MNIST in LIGHTNING_PRUNE_DATA"),
]
SEEDS, SPARSITIES, STEPS, BATCH = (0, 1, 2), (0.5, 0.7, 0.9), 300, 32
DATA = {"mnist": MNIST, "fashion_mnist": FashionMNIST}
FACTORS = {0.5: 2.7, 0.7: 3.6, 0.9: 8.0}  # of penalty="auto": it gives what it gives, as the table says


def channels(s: float) -> dict[str, Any]:
    return {"budget": 1.0 - s, "budget_type": "channels", "at": 0.5, "refit_consumers": False, "measure": False}


METHODS: dict[str, Any] = {
    "dense": lambda s, seed: None,
    "HSPG, target": lambda s, seed: HSPG(s, max_ratio=0.95, measure=False),
    "HSPG, penalty": lambda s, seed: HSPG(
        penalty="auto", auto_factor=FACTORS[s], eps=0.9, max_ratio=0.95, measure=False
    ),
    "ProxSGD": lambda s, seed: ProxSGD("auto", structured=True, auto_factor=FACTORS[s], max_ratio=0.95, measure=False),
    "DHSPG": lambda s, seed: DHSPG(s, penalty="auto", max_ratio=0.95, measure=False),
    "HESSO": lambda s, seed: HESSO(s, end=0.5, measure=False),
    "magnitude": lambda s, seed: Magnitude(**channels(s)),
    "random": lambda s, seed: RandomPruning(seed=seed, **channels(s)),
}


class FourBlocks(nn.Module):
    """Four convolutions with BatchNorm, 112 channels."""

    def __init__(self, widths: tuple[int, ...] = (16, 24, 32, 40)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in zip((1, *widths), widths, (2, 1, 2, 1), strict=False):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(widths[-1], 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean(dim=(2, 3)))


def halves(loader: DataLoader) -> TensorDataset:
    """All images of a loader at half the resolution, with their classes."""
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    return TensorDataset(functional.avg_pool2d(images, 2), labels)


def prepared(name: str) -> tuple[TensorDataset, TensorDataset]:
    """6000 training images and the whole test set."""
    data = DATA[name](batch_size=2000, subset=6000)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    training = DataLoader(data.train_dataloader().dataset, batch_size=2000)
    return halves(training), halves(data.test_dataloader())


def train(module: nn.Module, data: TensorDataset, method: Any) -> None:
    """Train with what the callback's hooks do at every step."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    manager, engine = MaskManager.of(module), None
    manager.attach([optimizer])
    if isinstance(method, ProximalCallback):
        penalized = "penalty" in method.requested
        method._bounds = (0 if penalized else STEPS // 10, STEPS // 2)
        method._switch = STEPS // 4
        engine = method.make_engine(context_of(module), SimpleNamespace(optimizers=[optimizer]))
        manager.projections.append(lambda optimizer: engine.after(engine.parts[0], step))
    for step, index in enumerate(torch.randint(len(data), (STEPS, BATCH))):
        if step == STEPS // 2 and isinstance(method, OneShotPruning):
            prune(module, method, example_input=data.tensors[0][:2])
        advance(engine, module, optimizer, schedule, step)
        optimizer.zero_grad()
        functional.cross_entropy(module(data.tensors[0][index]), data.tensors[1][index]).backward()
        manager.mask_gradients(optimizer)
        if engine is not None:
            engine.before(engine.parts[0], step)
        optimizer.step()
        schedule.step()
    advance(engine, module, optimizer, schedule, STEPS)


def advance(engine: Any, module: nn.Module, optimizer: Any, schedule: Any, step: int) -> None:
    """What the callback does between steps: commit, settle, choose."""
    if engine is None or getattr(engine, "committed_all", False):
        return
    if engine.due(step):
        MaskManager.of(module).set_masks(engine.propose(context_of(module), over=False).masks)
        engine.committed_all = engine.committed(over=False)
    if step >= STEPS // 10 and not getattr(engine, "committed_all", False):
        engine.advance(step)
    if not engine.settled:
        (rates,) = future_rates(optimizer, [(schedule, 1)], STEPS // 2 - step)
        matched = optimizer.param_groups[0] if isinstance(engine, Penalty) else {}
        engine.settle({optimizer: [reach(rates, matched, 0)]})


def context_of(module: nn.Module) -> Context:
    """A pruning event on this module, without data."""
    targets = select(module)
    weights = {name: weight.detach() for name, weight in targets.items()}
    example = ((torch.zeros(2, 1, 14, 14),), {})
    return Context(
        module, weights, MaskManager.of(module).alive(targets), 0.0, 0, event_generator(0, 0), no_data, example
    )


def no_data() -> Any:
    raise ValueError("no data here")


def measure(data: TensorDataset, test: TensorDataset, method: Any, seed: int) -> dict[str, float]:
    """Train with a method; return accuracy, FLOPs and channels left after cutting, and how far cutting moves the outputs."""
    torch.manual_seed(seed)
    module = FourBlocks()
    train(module, data, method)
    module.eval()
    images, labels = test.tensors
    convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    widths = tuple(max(1, int(layer.weight.detach().flatten(1).any(1).sum())) for layer in convolutions)
    with torch.no_grad():
        right = module(images).argmax(1) == labels
        few = images[:256]
        cut = shrink(module, few[:2]) if method is not None and seed == 0 else module  # seeds repeat the same cutting
        moved = (cut(few) - module(few)).abs().max()
    return {
        "accuracy": float(right.double().mean()),
        "flops": count_flops(FourBlocks(widths), few[:1]) / count_flops(FourBlocks(), few[:1]),
        "removed": 1.0 - sum(widths) / 112,
        "moved": float(moved),
    }


def setup(method: str, sparsity: float) -> str:
    """What a row is measured with: a row of other settings is another row."""
    factor = f", factor {FACTORS[sparsity]}" if method in ("HSPG, penalty", "ProxSGD") else ""
    return f"{STEPS} steps of {BATCH}{factor}"


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Every row, measured or read from the file."""
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = {(*(row.get(part) for part in ("data", "seed", "method", "sparsity", "setup")),): row for row in known}
    for seed in SEEDS:
        for name in DATA:
            data = None
            for method, build in METHODS.items():
                for sparsity in (0.0,) if method == "dense" else SPARSITIES:
                    key = (name, seed, method, sparsity, setup(method, sparsity))
                    if key not in found:
                        data = prepared(name) if data is None else data
                        row = {"data": name, "seed": seed, "method": method, "sparsity": sparsity, "setup": key[-1]}
                        row |= measure(*data, build(sparsity, seed), seed)
                        with path.open("a") as file:
                            file.write(json.dumps(row) + "\n")
                        found[key] = row
                    yield found[key]


def spread(values: list[float], scale: float = 100.0) -> str:
    """Mean and half the range."""
    return f"{scale * statistics.mean(values):.1f} ± {scale * (max(values) - min(values)) / 2:.1f}"


def test_channels_flops_and_accuracy_beside_the_controls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    example = context_of(FourBlocks())
    groups = trace_channels(example)  # every network is alike: traced once
    monkeypatch.setattr("lightning_prune.channels.trace_channels", lambda context: groups)
    every = list(rows(Path(os.environ.get("HSPG_TABLE_ROWS", tmp_path / "rows.jsonl"))))
    for name in DATA:
        table = Table(title=f"{name}: accuracy in % / channels removed in % / FLOPs left in %, {len(SEEDS)} seeds")
        for column in ("method", *map(str, SPARSITIES)):
            table.add_column(column)
        for method in METHODS:
            cells = []
            for sparsity in (0.0,) if method == "dense" else SPARSITIES:
                chosen = [r for r in every if (r["data"], r["method"], r["sparsity"]) == (name, method, sparsity)]
                parts = [spread([row["accuracy"] for row in chosen])]
                parts += [f"{100 * statistics.mean(row[key] for row in chosen):.1f}" for key in ("removed", "flops")]
                cells.append(" / ".join(parts))
            table.add_row(method, *cells)
        Console(width=130).print(table)
    assert max(row["moved"] for row in every) < 1e-3
    exact = [row for row in every if row["method"] in ("HSPG, target", "HESSO", "DHSPG")]
    assert all(row["removed"] == pytest.approx(int(row["sparsity"] * 112 + 1e-9) / 112) for row in exact)
