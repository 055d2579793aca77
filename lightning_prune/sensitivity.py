"""Sensitivity scan: accuracy against sparsity, one layer (or one group of channels) at a time, in one pass over the data.

Li et al., "Pruning filters for efficient ConvNets", ICLR 2017, section 3.2: prune each layer alone, without training, and
look at the accuracy.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune._sweep_tables import grid
from lightning_prune.batches import batch_length
from lightning_prune.channels import Channels
from lightning_prune.checks import check_bool, check_choice, check_fraction, check_integer
from lightning_prune.dependency import channel_groups
from lightning_prune.files import replacing
from lightning_prune.fit import calibration_source, mean_over_ranks
from lightning_prune.objective import LossFunction, Objective, buffers_of, evaluate, to_device
from lightning_prune.prunability import pruners_of, read_samples
from lightning_prune.selection import keep_top, kept_count
from lightning_prune.targets import check_patterns, select

__all__ = ["Sensitivity", "SensitivityScan", "accuracy", "scan_sensitivity"]

SPARSITIES = (0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
Metric = Callable[[nn.Module, Any], Tensor]
_MIDDLE = 0.6  # of the colour scale: darker cells carry white numbers


@dataclass(kw_only=True)
class Sensitivity:
    """What pruning a single layer or group costs.

    Attributes:
        metric: "accuracy", "loss" or the name of the function given.
        dense: value of the whole network.
        sparsities: columns.
        layers: {parameter: values at the sparsities}, one layer pruned by magnitude at a time.
        groups: {group of channels: values}, the units with the smallest weights removed.
        samples: that it was measured on.
        notes: sentences.
    """

    metric: str
    dense: float
    sparsities: tuple[float, ...]
    layers: dict[str, list[float]]
    groups: dict[str, list[float]] = field(default_factory=dict)
    samples: int = 0
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def rows(self) -> list[tuple[str, list[float]]]:
        """Return what was pruned and its values, layers first."""
        return [*self.layers.items(), *((f"{name} (channels)", values) for name, values in self.groups.items())]

    def to_markdown(self) -> str:
        """Return the table."""
        header = ["pruned alone", *(f"{sparsity:g}" for sparsity in self.sparsities)]
        cells = [[name, *(f"{value:.4f}" for value in values)] for name, values in self.rows()]
        told = f"{self.metric} of the whole network: {self.dense:.4f}, on {self.samples} samples. Columns: sparsity."
        parts = ["# Sensitivity", told[0].upper() + told[1:], grid(header, cells, left=(0,)), *self.notes]
        return "\n\n".join(parts) + "\n"

    def to_csv(self) -> str:
        """Return a row per layer or group and sparsity."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["kind", "name", "sparsity", self.metric])
        for kind, held in (("layer", self.layers), ("group", self.groups)):
            for name, values in held.items():
                writer.writerows(
                    [kind, name, sparsity, value] for sparsity, value in zip(self.sparsities, values, strict=True)
                )
        return buffer.getvalue()

    def save(self, folder: Path, stem: str = "sensitivity") -> list[Path]:
        """Write table and heat map: `<stem>.json`, `.md`, `.csv` and, where matplotlib is installed, `.png`."""
        image = heat_map(self)
        contents = {
            "json": (json.dumps(self.to_dict(), indent=2) + "\n").encode(), "md": self.to_markdown().encode(),
            "csv": self.to_csv().encode(), **({"png": image} if image else {}),
        }  # fmt: skip
        for ending, content in contents.items():
            with replacing(folder / f"{stem}.{ending}") as temporary:
                temporary.write_bytes(content)
        return [folder / f"{stem}.{ending}" for ending in contents]


def accuracy(module: nn.Module, batch: Any) -> Tensor:
    """Return the fraction of a batch (inputs, classes) whose largest logit is that of its class, a scalar."""
    inputs, classes = batch
    return (module(inputs).argmax(dim=1) == classes).float().mean()


def scan_sensitivity(
    module: nn.Module,
    dataloader: Iterable[Any],
    metric: Metric | None = accuracy,
    loss_fn: LossFunction | None = None,
    sparsities: Sequence[float] = SPARSITIES,
    samples: int = 2000,
    groups: bool = True,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str = (),
) -> Sensitivity:
    """Prune every layer alone to every sparsity, and every group of channels; the module is not changed.

    Args:
        module: any module, on any device; it is run in eval mode.
        dataloader: batches to measure on.
        metric: `metric(module, batch) -> scalar mean over the batch`; None measures the loss.
        loss_fn: `loss_fn(module, batch) -> scalar`, without a metric; None: the module's own `training_step`.
        sparsities: pruned fractions, each in (0, 1).
        samples: how many samples to use, >= 1.
        groups: scan groups of channels too, where the module can be traced.
        include, exclude: which layers; see `targets.select`.
    Returns:
        Values by layer and by group.
    Raises:
        ValueError: an argument breaks its rule, or there is no batch.
    """
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    function = metric if metric is not None else loss_fn
    objective = Objective(module, lambda count: (to_device(batch, device) for batch in dataloader), function)
    name = "loss" if metric is None else getattr(metric, "__name__", "metric")
    return _scanned(objective, name, check_sparsities(sparsities), samples, groups, include, exclude)


class SensitivityScan(Callback):
    """Scan when a fit ends (or before it starts) and write table and heat map into the Trainer's folder.

    Args:
        when: "fit_end" or "fit_start".
        metric: `metric(module, batch) -> scalar`; "accuracy" for batches of (inputs, classes); "loss".
        sparsities: pruned fractions, each in (0, 1).
        samples: samples to use, >= 1.
        groups: scan groups of channels too, where the module can be traced.
        include: names or patterns of the layers; None: all linear layers and convolutions.
        exclude: names or patterns of layers to leave out.
        calibration_dataloader: batches to use; None: the validation set, else the training set, read separately.
        seed: of the choice of samples, >= 0.
    Raises:
        ValueError: an argument breaks its rule.
    """

    def __init__(
        self,
        when: str = "fit_end",
        metric: Any = "accuracy",
        sparsities: Sequence[float] = SPARSITIES,
        samples: int = 2000,
        groups: bool = True,
        include: Sequence[str] | str | None = None,
        exclude: Sequence[str] | str = (),
        calibration_dataloader: Any = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.when = check_choice("when", when, ("fit_end", "fit_start"))
        if not callable(metric):
            check_choice("metric", metric, ("accuracy", "loss"))
        self.metric = metric
        self.sparsities = check_sparsities(sparsities)
        self.samples = check_integer("samples", samples, 1)
        self.groups = check_bool("groups", groups)
        self.include, self.exclude = check_patterns("include", include), check_patterns("exclude", exclude) or ()
        self.calibration_dataloader = calibration_dataloader
        self.seed = check_integer("seed", seed, 0)
        self.result: Sensitivity | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.when == "fit_start":
            self._scan(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.when == "fit_end":
            self._scan(trainer, pl_module)

    def _scan(self, trainer: Trainer, pl_module: LightningModule) -> None:
        given = self.calibration_dataloader
        source = given if given is not None else trainer.val_dataloaders or None
        batches = calibration_source(trainer, pl_module, source, self.seed, 0)
        metric = accuracy if self.metric == "accuracy" else None if self.metric == "loss" else self.metric
        objective = Objective(pl_module, batches, metric, trainer, mean_over_ranks, seed=self.seed)
        name = self.metric if isinstance(self.metric, str) else getattr(self.metric, "__name__", "metric")
        self.result = _scanned(objective, name, self.sparsities, self.samples, self.groups, self.include, self.exclude)
        if trainer.is_global_zero:
            suffix = "_pruned" if any(pruner.events for pruner in pruners_of(trainer)) else ""
            written = self.result.save(Path(trainer.default_root_dir), f"sensitivity{suffix}")
            rank_zero_info(f"Sensitivity of every layer: {', '.join(path.name for path in written)}")


def check_sparsities(sparsities: Any) -> tuple[float, ...]:
    """Return sparsities as a tuple of fractions in (0, 1), else raise ValueError."""
    if isinstance(sparsities, (str, int, float)) or not list(sparsities):
        raise ValueError(f"`sparsities` must list fractions in (0, 1), got {sparsities!r}. Give such as [0.5, 0.9].")
    return tuple(check_fraction("sparsities", value) for value in sparsities)


def heat_map(held: Sensitivity) -> bytes | None:
    """Draw a row per layer or group and a column per sparsity; None where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = held.rows()
    values = [row for _, row in rows]
    figure = Figure(figsize=(3.6 + 0.9 * len(held.sparsities), 1.4 + 0.32 * len(rows)), facecolor="white", dpi=120)
    axes = figure.add_subplot()
    everything = [held.dense, *(value for row in values for value in row)]
    low, high = min(everything), max(everything)
    axes.imshow(values, aspect="auto", cmap="Blues_r" if held.metric != "loss" else "Blues", vmin=low, vmax=high)
    axes.set_xticks(range(len(held.sparsities)), [f"{sparsity:g}" for sparsity in held.sparsities])
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_xlabel("sparsity of this layer or group alone")
    axes.set_title(f"{held.metric}; whole network {held.dense:.4f}", loc="left", size=10)
    for row, numbers in enumerate(values):
        for column, value in enumerate(numbers):
            level = (value - low) / (high - low) if high > low else 1.0
            dark = level < 1 - _MIDDLE if held.metric != "loss" else level > _MIDDLE
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", size=8, color="white" if dark else "black")
    figure.tight_layout()
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _scanned(
    objective: Objective,
    metric: str,
    sparsities: Sequence[float],
    samples: int,
    groups: bool,
    include: Any,
    exclude: Any,
) -> Sensitivity:
    batches, count = read_samples(objective, check_integer("samples", samples, 1))
    weights = {name: weight.detach() for name, weight in select(objective.module, include, exclude).items()}
    cases: dict[tuple[str, str], list[dict[str, Tensor]]] = {
        ("layer", name): [keep_top({name: weight.abs()}, sparsity) for sparsity in sparsities]
        for name, weight in weights.items()
    }
    notes: list[str] = []
    if groups:
        try:
            cases.update(_group_cases(objective, batches[0], weights, sparsities))
        except ValueError as error:
            notes.append(f"Groups of channels were not scanned: {error}")
    dense, values = _evaluated(objective, batches, count, cases)
    return Sensitivity(
        metric=metric, dense=dense, sparsities=tuple(sparsities), samples=count, notes=notes,
        layers={name: numbers for (kind, name), numbers in values.items() if kind == "layer"},
        groups={name: numbers for (kind, name), numbers in values.items() if kind == "group"},
    )  # fmt: skip


def _group_cases(
    objective: Objective, batch: Any, weights: Mapping[str, Tensor], sparsities: Sequence[float]
) -> dict[tuple[str, str], list[dict[str, Tensor]]]:
    """Masks that remove the units with the smallest weights of one group at a time."""
    module = objective.module
    example = batch if isinstance(module, LightningModule) else batch[0] if isinstance(batch, (list, tuple)) else batch
    all_groups = channel_groups(module, example)
    channels = Channels(module, all_groups, {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()})
    norms = channels.unit_norms()
    return {
        ("group", name): [channels.masks({name: _keep_units(score, sparsity)}) for sparsity in sparsities]
        for name, score in norms.items()
    }


def _keep_units(score: Tensor, sparsity: float) -> Tensor:
    """Keep the units of highest score, at least one."""
    kept = torch.zeros(len(score), dtype=torch.bool)
    order = torch.sort(score, descending=True, stable=True).indices
    kept[order[: max(1, kept_count(len(score), sparsity))]] = True
    return kept


def _evaluated(
    objective: Objective, batches: Sequence[Any], count: int, cases: Mapping[tuple[str, str], list[dict[str, Tensor]]]
) -> tuple[float, dict[tuple[str, str], list[float]]]:
    """The metric of the whole network and of every case: each batch is read once and used for all."""
    module = objective.module
    with objective.open() as step, torch.no_grad():
        step.eval()  # the sandbox puts the modes back
        parameters = {name: value.detach() for name, value in objective.parameters().items()}
        flat = [None, *(masks for held in cases.values() for masks in held)]
        totals = torch.zeros(len(flat), dtype=torch.float64)
        for index, batch in enumerate(batches):
            size = batch_length(batch)
            for place, masks in enumerate(flat):
                pruned = {name: parameters[name] * mask for name, mask in (masks or {}).items() if not bool(mask.all())}
                value = evaluate(step, {**parameters, **pruned}, buffers_of(module), batch, index, check=False)
                totals[place] += value.detach().double().cpu() * size
        device = next(iter(parameters.values())).device
        means = objective.reduce((totals / count).float().to(device)).tolist()
    values = iter(means[1:])
    return means[0], {key: [next(values) for _ in held] for key, held in cases.items()}
