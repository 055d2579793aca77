"""CHITA: combinatorial pruning of a trained network, one-shot, multi-stage (CHITA++) and gradual with fine-tuning.

Benbaki, Chen, Meng, Hazimeh, Ponomareva, Zhao, Mazumder, "Fast as CHITA: Neural Network Pruning with Combinatorial
Optimization", ICML 2023. The loss around the current weights is a quadratic made of per-sample gradients (equation 3);
its minimiser with k nonzeros chooses and repairs the kept weights at once (section 3); CHITA++ repeats this over stages
of growing sparsity (section 4). Problem, solvers and stages are in the private files beside this one.

Departures from the paper, each with its reason:
- `ridge` is a multiple of the mean squared norm of the gradient rows, so that one default serves networks of all scales.
- Weights may be measured in units of their own gradients (`metric`), so that no layer is favoured for its scale. Under
  BatchNorm the scale of a layer is free and its gradients say little; there the default leaves weights in their own units.
- The ridge is chosen in each stage by the loss on held-out calibration samples, and raised where the quadratic does not
  hold.
- BatchNorm takes the statistics of the batch in refits and wherever losses are compared; its running statistics, which
  the rows need, are re-estimated at the start of each stage.
- A stage that does worse on held-out samples than the largest weights alone gives way to them.
- After a stage the kept weights take steps along the gradients of fresh batches (`refits`). It is training data well
  used, not pruning; `refits=0` leaves it out.
- By default the sparsity goes from one half to the target in six stages of the geometric schedule.
- The first-order term may come from a larger batch of its own (`gradient_samples`).
- A weight that was pruned in an earlier event never returns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.progress import Progress
from torch import Tensor
from typing_extensions import override

from lightning_prune._scratch import check_folder
from lightning_prune.batch_norm import batch_norms
from lightning_prune.batches import count_samples
from lightning_prune.checks import check_bool, check_choice, check_fraction, check_integer, check_positive
from lightning_prune.context import Context, Proposal
from lightning_prune.masks import DTensor
from lightning_prune.methods._chita_refit import RefitSettings
from lightning_prune.methods._chita_room import check_disk, check_memory
from lightning_prune.methods._chita_stages import (
    ALGORITHMS,
    SCHEDULES,
    Stage,
    StageSettings,
    run_stages,
    stage_sparsities,
)
from lightning_prune.oneshot import OneShotPruning
from lightning_prune.sample_gradients import GradientSource
from lightning_prune.selection import kept_count
from lightning_prune.targets import named_tensors

__all__ = ["CHITA", "check_memory", "prune_in_stages"]

METRIC = 0.5  # of networks without BatchNorm
RIDGES = (1e-4, 1e-3, 1e-2)
HELD_SAMPLES = 256  # by which stages compare losses, or by twice as many as the rows of a stage read
LEAST_HELD = 64  # if that is fewer, but by so many at least
SETTLE_SAMPLES = 256  # on which BatchNorm statistics are re-estimated before the rows of a stage
PASSES = 10  # refits read the data at most so many times
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def prune_in_stages(
    source: GradientSource,
    weights: Tensor,
    alive: Tensor,
    sparsities: Sequence[float],
    rows: int,
    samples_per_row: int,
    settings: StageSettings,
    dtype: torch.dtype = torch.float32,
    gradient_samples: int | None = None,
    refit_samples: int = 128,
    offload: str | None = None,
) -> Iterator[Stage]:
    """Run CHITA++: solve a stage for every sparsity, each around the result of the one before; yield each stage.

    Args:
        source: open source of gradients whose p columns are the prunable weights.
        weights: trained values, shape (p,).
        alive: bool of shape (p,); weights that are False are gone already and count as pruned.
        sparsities: of all p weights, in order; the last one is the target.
        rows: gradient rows n of each stage, >= 1.
        samples_per_row: samples averaged in one row (m), >= 1.
        settings: how a stage is solved and refitted.
        dtype: storage of the rows.
        gradient_samples: samples of a separate batch for the first-order term; None takes the mean of the rows.
        refit_samples: samples in each gradient of a refit, >= 1.
        offload: folder for a scratch file that holds the rows; the stages are then solved on the CPU. None: in memory.
    """
    weights, alive = (weights, alive) if offload is None else (weights.cpu(), alive.cpu())
    normed = bool(batch_norms(source.objective.module))

    def matrix(at: Tensor) -> tuple[Tensor, int]:
        source.at(at)
        if at is not weights:  # there the module's own statistics are right
            source.refit_batch_norm(SETTLE_SAMPLES)
        return source.rows(rows, samples_per_row, dtype, offload), source.samples

    def gradient(at: Tensor) -> tuple[float, Tensor]:
        source.at(at)
        value, slope = source.mean(refit_samples, check=False, train_norms=normed)
        return value, slope.to(at.device)

    held = min(HELD_SAMPLES, max(LEAST_HELD, 2 * rows * samples_per_row))

    def loss(at: Tensor) -> float:
        source.at(at)
        return source.held_loss(held, train_norms=normed)

    def mean(at: Tensor) -> Tensor:
        source.at(at)
        return source.mean(gradient_samples or 1)[1].to(at.device)

    count = settings.refit.count
    if count:
        most = (
            PASSES * count_samples(source.objective.batches(None), 1 + count * refit_samples // PASSES) // refit_samples
        )
        settings = replace(settings, refit=replace(settings.refit, count=min(count, most)))
    yield from run_stages(
        weights, sparsities, matrix, gradient, loss, settings, _or_none(alive), source.sizes,
        mean if gradient_samples else None,
    )  # fmt: skip


def _or_none(alive: Tensor) -> Tensor | None:
    return None if bool(alive.all()) else alive


class CHITA(OneShotPruning):
    """Prune a trained network by combinatorial optimization on per-sample gradients, and repair the kept weights.

    Args:
        sparsity: pruned fraction of the selected weights, in [0, 1); None with pairs in `at`.
        at: when; see `OneShotPruning`. A list of pairs with fine-tuning in between is the paper's gradual pipeline.
        num_grads: gradient rows n per stage, >= 1.
        grad_batch: samples averaged in one row (m), >= 1.
        stages: 1 is CHITA, more are CHITA++.
        schedule: how sparsity grows over the stages: "exp", "poly", "linear", "const" or "mfac".
        base_level: sparsity of the first of several stages, in [0, 1).
        polish: further stages at the final sparsity, >= 0.
        ridge: damping as a multiple of the mean squared row norm, > 0; None: chosen in each stage by the loss on
            held-out calibration samples.
        metric: weights are measured in units of their root mean square gradient to this power, in [0, 1]; 0: not; None:
            0.5, or 0 in a network with BatchNorm.
        first_order: use the gradient of the loss, not only its curvature.
        gradient_samples: samples of a separate batch for the first-order term, >= 1; None: the mean of the rows.
        algorithm: "bso" (one exact solve), "iht" (hard thresholding and swaps first), "block" (exact solves in blocks),
            "obs" (scores of single weights, then one exact solve), "woodfisher" (the same scores and the updates of
            single weights; with several stages of schedule="mfac" this is M-FAC's pruning).
        block_size: weights in a block of "block", >= 1.
        grad_dtype: storage of the gradient matrix, "float32" or "bfloat16" (half the memory).
        offload: folder for a scratch file that holds the gradient matrix where it is larger than memory; stages are
            then solved on the CPU, a few columns at a time. None: it is held in memory.
        refits: steps along fresh gradients on the chosen supports, half of them after the last stage, >= 0; fewer where
            they would read the data more than ten times.
        refit_samples: samples in each of their gradients, >= 1.
        refit_bn: re-estimate BatchNorm statistics after pruning.
        **common: see `PruningCallback`.
    Raises:
        ValueError: an argument breaks its rule.
    """

    method: ClassVar[str] = "chita"
    shards: ClassVar[bool] = False

    def __init__(
        self,
        sparsity: float | None = None,
        at: Any = "start",
        num_grads: int = 64,
        grad_batch: int = 16,
        stages: int = 6,
        schedule: str = "mfac",
        base_level: float = 0.5,
        polish: int = 0,
        ridge: float | None = None,
        metric: float | None = None,
        first_order: bool = True,
        gradient_samples: int | None = None,
        algorithm: str = "bso",
        block_size: int = 500,
        grad_dtype: str = "float32",
        offload: str | None = None,
        refits: int = 660,
        refit_samples: int = 128,
        refit_bn: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(sparsity=sparsity, at=at, refit_bn=refit_bn, **common)
        self.num_grads = check_integer("num_grads", num_grads, 1)
        self.grad_batch = check_integer("grad_batch", grad_batch, 1)
        self.stages = check_integer("stages", stages, 1)
        self.schedule = check_choice("schedule", schedule, SCHEDULES)
        self.base_level = check_fraction("base_level", base_level)
        self.polish = check_integer("polish", polish, 0)
        self.ridge = None if ridge is None else check_positive("ridge", ridge)
        self.metric = metric
        self.first_order = check_bool("first_order", first_order)
        self.gradient_samples = (
            None if gradient_samples is None else check_integer("gradient_samples", gradient_samples, 1)
        )
        self.algorithm = check_choice("algorithm", algorithm, ALGORITHMS)
        self.block_size = check_integer("block_size", block_size, 1)
        self.grad_dtype = check_choice("grad_dtype", grad_dtype, tuple(DTYPES))
        self.offload = None if offload is None else check_folder("offload", offload)
        self.refits = check_integer("refits", refits, 0)
        self.refit_samples = check_integer("refit_samples", refit_samples, 1)
        self.settings = StageSettings(
            RIDGES if self.ridge is None else (self.ridge,),
            METRIC if metric is None else metric,
            first_order,
            algorithm,
            RefitSettings(count=refits),
            block_size=block_size,
        )

    @override
    def propose(self, context: Context) -> Proposal:
        """Choose the support and the values of the kept weights; where nothing has to go, nothing is touched."""
        if self._nothing_to_remove(context):
            return Proposal(dict(context.alive))
        check_whole_parameters(context)
        sparsities = self._sparsities(context)
        with GradientSource(context.objective, list(context.weights)) as source:
            rows, samples = self._plan(source)
            self._check_room(rows, source)
            flat = torch.cat([weight.flatten().float() for weight in context.weights.values()])
            alive = torch.cat([mask.flatten() for mask in context.alive.values()])
            fallbacks: list[float] = []
            with progress(context, source, len(sparsities) * rows * samples + self.refits * self.refit_samples):
                weights, support = self._solve(source, flat, alive, sparsities, (rows, samples), fallbacks)
        moved = float((weights - flat)[support].norm())
        masks, values = unflatten(context.weights, weights, support)
        return Proposal(masks, values, notes_of(source, len(sparsities), moved, len(fallbacks)))

    def _nothing_to_remove(self, context: Context) -> bool:
        total = sum(mask.numel() for mask in context.alive.values())
        return sum(int(mask.sum()) for mask in context.alive.values()) <= kept_count(total, context.target)

    def _sparsities(self, context: Context) -> list[float]:
        """The sparsity after each stage; what is gone already is where the first one starts."""
        total = sum(mask.numel() for mask in context.alive.values())
        gone = 1.0 - sum(int(mask.sum()) for mask in context.alive.values()) / total
        base = min(max(self.base_level, gone), context.target)
        return stage_sparsities(self.schedule, self.stages, context.target, base, self.polish)

    def _plan(self, source: GradientSource) -> tuple[int, int]:
        """(rows, samples in each): as asked, or what the calibration data have."""
        rows, samples = source.plan(self.num_grads, self.grad_batch)
        if rows < self.num_grads:
            what = "batches" if source.whole else "samples"
            rank_zero_warn(
                f"`num_grads`={self.num_grads} gradients are more than the {rows} calibration {what}; using all of them."
            )
        return rows, samples

    def _check_room(self, rows: int, source: GradientSource) -> None:
        dtype = DTYPES[self.grad_dtype]
        device = source.device if self.offload is None else torch.device("cpu")
        if self.offload is not None:
            check_disk(rows, source.width, dtype, check_folder("offload", self.offload))
        check_memory(rows, source.width, dtype, device, self.algorithm == "block", self.offload is not None)

    def _solve(
        self,
        source: GradientSource,
        flat: Tensor,
        alive: Tensor,
        sparsities: list[float],
        plan: tuple[int, int],
        fallbacks: list[float],
    ) -> tuple[Tensor, Tensor]:
        dtype = DTYPES[self.grad_dtype]
        plain = self.metric is None and batch_norms(source.objective.module)
        settings = replace(self.settings, metric=0.0) if plain else self.settings
        for stage in prune_in_stages(
            source, flat, alive, sparsities, *plan, settings, dtype, self.gradient_samples, self.refit_samples,
            self.offload,
        ):  # fmt: skip
            if math.isnan(stage.ridge):
                fallbacks.append(float(int(stage.support.sum())))
        return stage.weights.to(flat.device), stage.support.to(flat.device)


def unflatten(
    weights: Mapping[str, Tensor], flat: Tensor, support: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (masks, values) by name from the flat vectors of shape (p,), each of its weight's shape and dtype."""
    sizes = [weight.numel() for weight in weights.values()]
    masks, values = {}, {}
    parts = zip(weights.items(), flat.split(sizes), support.split(sizes), strict=True)
    for (name, weight), value, mask in parts:
        masks[name], values[name] = mask.view(weight.shape), value.view(weight.shape).to(weight.dtype)
    return masks, values


def notes_of(source: GradientSource, stages: int, moved: float, fallbacks: int) -> list[str]:
    """Return what the receipt says about a run of all stages."""
    rows = "whole batches" if source.whole else f"{source.samples} samples"
    notes = [
        f"{stages} stage(s) of {source.rows_given} gradient rows of {rows}; "
        f"{source.samples_used} samples read; kept weights moved by {moved:.4g}."
    ]
    if fallbacks:
        notes.append(
            f"{fallbacks} stage(s) chose by magnitude, where the quadratic did worse on held-out samples. "
            "More stages or a larger ridge may help."
        )
    return notes


@contextmanager
def progress(context: Context, source: GradientSource, total: int) -> Iterator[None]:
    """Show a bar of the samples read where bars are drawn; `total` is how many they are likely to be."""
    if not context.show_progress:
        yield
        return
    objective, before = context.objective, context.objective.advance
    with Progress(transient=True) as bar:
        task = bar.add_task("CHITA, samples read", total=total)
        objective.advance = lambda: bar.update(task, completed=min(source.samples_used, total))
        try:
            yield
        finally:
            objective.advance = before


def check_whole_parameters(context: Context) -> None:
    """Raise MisconfigurationException if a selected parameter is sharded: its gradients are spread over ranks."""
    parameters = named_tensors(context.module)
    if any(isinstance(parameters[name], DTensor) for name in context.weights):
        raise MisconfigurationException(
            "chita cannot score sharded parameters (FSDP). Prune before sharding with `prune(...)`, or use a magnitude "
            "method."
        )
