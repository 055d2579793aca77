"""Prunability: the smallest fraction of the weights that can be kept without harm to the training loss.

Kuhn, Lyle, Gomez, Rothfuss and Gal, "Robustness to pruning predicts generalization in deep neural networks",
arXiv:2103.06002, 2021:

    prunability(w) = inf { c : L(P_c'(w)) <= L(w) + tol  for all c' in [c, 1] },   tol = beta L(w)

P_c keeps the fraction c of the selected weights, without training and with BatchNorm statistics as they are.

Departures from the paper: tol = max(beta L(w), absolute), since a well trained network has a loss near 0 and a relative
tolerance alone is then noise; "for all c'" is checked on a grid from 1 downwards, then by bisection in the first
interval that fails; `perturb` scales Gaussian noise by the weight, which the abstract leaves open. Rescaling a ReLU
network (c in one layer, 1/c in the next) changes the magnitude variants.
"""

from __future__ import annotations

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

from lightning_prune.batches import batch_length
from lightning_prune.callback import PruningCallback
from lightning_prune.checks import check_choice, check_integer, check_positive, is_number
from lightning_prune.files import replacing
from lightning_prune.fit import calibration_source, log_event, mean_over_ranks
from lightning_prune.objective import LossFunction, Objective, buffers_of, evaluate, to_device
from lightning_prune.selection import kept_count
from lightning_prune.targets import check_patterns, select

__all__ = ["Prunability", "PrunabilityResult", "measure_prunability", "prunability"]

VARIANTS = ("magnitude", "magnitude_layerwise", "random", "perturb")
_RANDOM_DRAWS = 5
_BISECTIONS = 6
_GRID = tuple(round(1 - 0.05 * step, 2) for step in range(21))  # 1, 0.95, ..., 0

Loss = Callable[[Mapping[str, Tensor]], float]


@dataclass(kw_only=True)
class PrunabilityResult:
    """How much of a network its loss needs.

    Attributes:
        value: the smallest fraction kept with a loss within the tolerance, in [0, 1].
        loss: of the whole network.
        tolerance: by how much the loss may rise.
        curve: (fraction kept, loss) of every evaluation, from 1 downwards.
        variant: see `prunability`.
        relative, absolute: the two parts of the tolerance.
        samples: that the loss was measured on; None where not known.
        seed: of random variants and of the choice of samples.
    """

    value: float
    loss: float
    tolerance: float
    curve: list[tuple[float, float]] = field(default_factory=list)
    variant: str = "magnitude"
    relative: float = 0.1
    absolute: float = 0.0
    samples: int | None = None
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def sentence(self) -> str:
        """Say it in one line, for the receipt."""
        on = "" if self.samples is None else f", on {self.samples} samples"
        return (
            f"Prunability {self.value:.4g} ({self.variant}): the smallest fraction of the weights that keeps the training "
            f"loss within {self.tolerance:.3g} of {self.loss:.4g} (beta {self.relative:g}, at least {self.absolute:g}"
            f"{on}, seed {self.seed})."
        )


def prunability(
    loss: Loss,
    weights: Mapping[str, Tensor],
    variant: str = "magnitude",
    relative: float = 0.1,
    absolute: float = 0.0,
    seed: int = 0,
    scores: Mapping[str, Tensor] | None = None,
    noise: float = 1.0,
) -> PrunabilityResult:
    """Return the prunability of a network, in about 20 evaluations of its loss and one sort.

    Args:
        loss: {name: weight} -> the loss with these weights in place; float.
        weights: the selected weights by name, each of any shape S.
        variant: "magnitude" ranks all weights together by |w|; "magnitude_layerwise" keeps the same fraction of every
            tensor; "random" keeps weights at random (mean loss of 5 draws); "perturb" adds N(0, (noise |w|)^2) to the
            weights that "magnitude" would remove.
        relative: beta, tolerance as a fraction of the loss, >= 0.
        absolute: least tolerance, >= 0.
        seed: of the random variants, >= 0.
        scores: rank by these instead of |w|; higher is kept longer; each of shape S.
        noise: standard deviation of `perturb` in units of |w|, > 0.
    Returns:
        The value with its curve.
    Raises:
        ValueError: an argument breaks its rule, or there are no weights.
    """
    check_choice("variant", variant, VARIANTS)
    for name, value in (("relative", relative), ("absolute", absolute)):
        if not is_number(value) or value < 0:
            raise ValueError(f"`{name}` must be a finite number >= 0, got {value!r}.")
    check_integer("seed", seed, 0)
    check_positive("noise", noise)
    if not weights:
        raise ValueError("`weights` is empty: there is nothing to prune. Check `include` and `exclude`.")
    changed = _operator(weights, variant, seed, scores, noise)
    base = loss(weights)
    tolerance = max(relative * base, absolute)
    curve = [(1.0, base)]

    def feasible(fraction: float) -> bool:
        losses = [loss(candidate) for candidate in changed(fraction)]
        curve.append((fraction, sum(losses) / len(losses)))
        return curve[-1][1] <= base + tolerance

    good, bad = 1.0, None
    for fraction in _GRID[1:]:
        if not feasible(fraction):
            bad = fraction
            break
        good = fraction
    for _ in range(_BISECTIONS if bad is not None else 0):
        middle = (good + (bad or 0.0)) / 2
        good, bad = (middle, bad) if feasible(middle) else (good, middle)
    return PrunabilityResult(
        value=good, loss=base, tolerance=tolerance, curve=sorted(curve, reverse=True), variant=variant,
        relative=relative, absolute=absolute, seed=seed,
    )  # fmt: skip


def measure_prunability(
    module: nn.Module,
    dataloader: Iterable[Any],
    loss_fn: LossFunction | None = None,
    samples: int = 5000,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str = (),
    **settings: Any,
) -> PrunabilityResult:
    """Return the prunability of a module on the first samples of a loader; the module is not changed.

    Args:
        module: any module, on any device; it is run in eval mode.
        dataloader: batches of the training set, in a fixed order and without augmentation.
        loss_fn: `loss_fn(module, batch) -> scalar`; None: the module's own `training_step`.
        samples: how many samples to use, >= 1.
        include, exclude: what counts as a weight; see `targets.select`.
        **settings: see `prunability`.
    Raises:
        ValueError: an argument breaks its rule, or there is no batch.
    """
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    objective = Objective(module, lambda count: (to_device(batch, device) for batch in dataloader), loss_fn)
    return _measured(objective, samples, include, exclude, settings)


class Prunability(Callback):
    """Measure prunability when a fit ends (or before it starts), log it and write it into the receipt.

    Args:
        when: "fit_end" or "fit_start".
        variant: see `prunability`.
        relative: beta, tolerance as a fraction of the loss, >= 0.
        absolute: least tolerance, >= 0.
        samples: training samples to use, >= 1.
        include: names or patterns of what counts as a weight; None: the weights of all linear layers and convolutions.
        exclude: names or patterns of what does not.
        loss_fn: `loss_fn(module, batch) -> scalar`; None: the module's own `training_step`.
        calibration_dataloader: batches to use; None: the training set, read separately.
        seed: of the choice of samples and of the random variants, >= 0.
    Raises:
        ValueError: an argument breaks its rule.
    """

    def __init__(
        self,
        when: str = "fit_end",
        variant: str = "magnitude",
        relative: float = 0.1,
        absolute: float = 0.0,
        samples: int = 5000,
        include: Sequence[str] | str | None = None,
        exclude: Sequence[str] | str = (),
        loss_fn: Any = None,
        calibration_dataloader: Any = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.when = check_choice("when", when, ("fit_end", "fit_start"))
        self.variant = check_choice("variant", variant, VARIANTS)
        self.relative, self.absolute = float(relative), float(absolute)
        self.samples = check_integer("samples", samples, 1)
        self.include, self.exclude = check_patterns("include", include), check_patterns("exclude", exclude) or ()
        self.loss_fn, self.calibration_dataloader = loss_fn, calibration_dataloader
        self.seed = check_integer("seed", seed, 0)
        self.result: PrunabilityResult | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.when == "fit_start":
            self._measure(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.when == "fit_end":
            self._measure(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The receipts of pruning callbacks exist now; one made later takes the sentence from the last event."""
        if self.result is None:
            return
        for pruner in pruners_of(trainer):
            held = [pruner.receipt.notes] if pruner.receipt is not None else []
            for notes in [*held, *([pruner.history[-1]["notes"]] if pruner.history else [])]:
                notes.append(self.result.sentence())

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = calibration_source(trainer, pl_module, self.calibration_dataloader, self.seed, 0)
        objective = Objective(pl_module, batches, self.loss_fn, trainer, mean_over_ranks, seed=self.seed)
        settings = {
            "variant": self.variant,
            "relative": self.relative,
            "absolute": self.absolute,
            "seed": self.seed,
        }
        self.result = _measured(objective, self.samples, self.include, self.exclude, settings)
        rank_zero_info(self.result.sentence())
        pruned = any(pruner.events for pruner in pruners_of(trainer))
        if not pruned:  # the command's receipt is written later, about another fit of this module
            pl_module.__dict__["_lightning_prune_notes"] = [f"Before pruning: {self.result.sentence()}"]
        log_event(trainer, {"prune/prunability": self.result.value})
        if trainer.is_global_zero:
            suffix = "_pruned" if pruned else ""
            with replacing(Path(trainer.default_root_dir) / f"prunability{suffix}.json") as temporary:
                temporary.write_text(json.dumps(self.result.to_dict(), indent=2) + "\n", encoding="utf-8")


def pruners_of(trainer: Trainer) -> list[PruningCallback]:
    """Return the pruning callbacks of a Trainer."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, PruningCallback)]


def read_samples(objective: Objective, samples: int) -> tuple[list[Any], int]:
    """Return the first batches of an objective until they hold so many samples, and how many they hold.

    Raises:
        ValueError: there is no batch.
    """
    held: list[Any] = []
    count = 0
    for batch in objective.batches(None):
        held.append(batch)
        count += batch_length(batch)
        if count >= samples:
            break
    if not held:
        raise ValueError("there is no batch to measure on. Give a dataloader with at least one batch.")
    return held, count


def _measured(
    objective: Objective, samples: int, include: Any, exclude: Any, settings: dict[str, Any]
) -> PrunabilityResult:
    check_integer("samples", samples, 1)
    batches, count = read_samples(objective, samples)
    names = list(select(objective.module, include, exclude))
    with objective.open() as step, torch.no_grad():
        step.eval()  # the sandbox puts the modes back
        values = {name: value.detach() for name, value in objective.parameters().items()}

        def loss(weights: Mapping[str, Tensor]) -> float:
            total = torch.zeros((), dtype=torch.float64)
            for index, batch in enumerate(batches):
                buffers = buffers_of(objective.module)
                value = evaluate(step, {**values, **weights}, buffers, batch, index, check=False)
                total += value.detach().double().cpu() * batch_length(batch)
            return float(objective.reduce((total / count).to(next(iter(values.values())).device)))

        result = prunability(loss, {name: values[name] for name in names}, **settings)
    result.samples = count
    return result


def _operator(
    weights: Mapping[str, Tensor], variant: str, seed: int, scores: Mapping[str, Tensor] | None, noise: float
) -> Callable[[float], list[dict[str, Tensor]]]:
    """Return P: fraction kept -> the weights after pruning to it (several draws of them for "random")."""
    generator = torch.Generator().manual_seed(seed)
    draws = [weight.abs() for weight in weights.values()] if scores is None else [scores[name] for name in weights]
    rankings = [_places(draws, layerwise=variant == "magnitude_layerwise")]
    if variant == "random":
        rankings = [
            _places([torch.rand(weight.shape, generator=generator) for weight in weights.values()], layerwise=False)
            for _ in range(_RANDOM_DRAWS)
        ]
    shaken = {
        name: weight + noise * weight.abs() * torch.randn(weight.shape, generator=generator).to(weight)
        for name, weight in weights.items()
    } if variant == "perturb" else {}  # fmt: skip
    total = sum(weight.numel() for weight in weights.values())

    def changed(fraction: float) -> list[dict[str, Tensor]]:
        found = []
        for ranking in rankings:
            result = {}
            for (name, weight), place in zip(weights.items(), ranking, strict=True):
                size = weight.numel() if variant == "magnitude_layerwise" else total
                kept = (place < (kept_count(size, 1 - fraction) if fraction > 0 else 0)).to(weight.device)
                result[name] = torch.where(kept, weight, shaken.get(name, torch.zeros_like(weight)))
            found.append(result)
        return found

    return changed


def _places(scores: Sequence[Tensor], layerwise: bool) -> list[Tensor]:
    """Return every weight's place in the descending order of scores, from 0; ties by order and index."""
    if layerwise:
        return [place for score in scores for place in _places([score], layerwise=False)]
    flat = torch.cat([score.detach().float().cpu().flatten() for score in scores])
    order = torch.sort(flat, descending=True, stable=True).indices
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return [
        part.view(score.shape) for part, score in zip(places.split([s.numel() for s in scores]), scores, strict=True)
    ]
