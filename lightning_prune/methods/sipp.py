"""SiPP: single weights by their share in their output, ranked or sampled.

Baykal, Liebenwein, Gilitschenski, Feldman and Rus, "Sensitivity-informed provable pruning of neural networks", SIAM Journal
on Mathematics of Data Science 4(1), 2022, arXiv:1910.05422.

The sensitivity of a weight is the largest share it has, over calibration samples, in the sum of those terms of its output
that have the same signs. "deterministic" keeps the largest of the whole network. "sampled" gives every row (an output's
weights of one sign) the count that minimises the sum of error bounds, and draws from it, reweighed; "hybrid" keeps the
largest of a row where that has the smaller bound.

Departures from the authors' program: the allocation is solved by water-filling instead of a conic solver; the root in the
error bound has 12 u, which Bernstein's inequality gives, instead of 6 u; rows are drawn without replacement
(Horvitz-Thompson, systematic), which is as unbiased and keeps exact counts; biases and norms stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.batches import batch_length
from lightning_prune.checks import check_choice, check_integer, is_number
from lightning_prune.context import Context, Proposal
from lightning_prune.methods._sipp_allocation import (
    CONSTANT,
    Rows,
    choose_rows,
    row_error,
    water_filling,
    whole_numbers,
)
from lightning_prune.methods._sipp_scores import (
    equal_input_shares,
    layers_of,
    sensitivities,
    some_samples,
    weight_shares,
)
from lightning_prune.oneshot import OneShotPruning
from lightning_prune.selection import check_scores, keep_top, kept_count

__all__ = ["Rows", "SiPP", "choose_rows", "row_error", "water_filling", "weight_shares", "whole_numbers"]

VARIANTS = ("deterministic", "sampled", "hybrid")


class SiPP(OneShotPruning):
    """Remove the weights with the smallest share in their outputs, on a few calibration samples.

    Args:
        sparsity: pruned fraction of the selected weights, in [0, 1); None with pairs in `at`.
        at: when; see `OneShotPruning`.
        variant: "deterministic" ranks all weights by the mean share over positions; "sampled" draws row by row, reweighed;
            "hybrid" takes the better bound of the two in every row.
        n_calib: calibration samples, >= 1; fewer if the data has fewer.
        delta: probability with which a bound may fail, in (0, 1); it hardly moves the choice.
        max_patches: output positions per sample to look at, drawn at random, >= 1; None for all.
        max_elems: entries of the largest temporary tensor, >= 1.
        **common: see `PruningCallback`.
    Raises:
        ValueError: an argument breaks its rule.
    """

    method: ClassVar[str] = "sipp"
    shards: ClassVar[bool] = False

    def __init__(
        self,
        sparsity: float | None = None,
        at: Any = "start",
        variant: str = "deterministic",
        n_calib: int = 256,
        delta: float = 1e-2,
        max_patches: int | None = None,
        max_elems: int = 2**24,
        **common: Any,
    ) -> None:
        super().__init__(sparsity, at, **common)
        self.variant = check_choice("variant", variant, VARIANTS)
        self.n_calib = check_integer("n_calib", n_calib, 1)
        if not is_number(delta) or not 0 < delta < 1:
            raise ValueError(f"`delta` must be in (0, 1), a probability of failure such as 0.01, got {delta!r}.")
        self.delta = float(delta)
        self.max_patches = None if max_patches is None else check_integer("max_patches", max_patches, 1)
        self.max_elems = check_integer("max_elems", max_elems, 1)

    @override
    def propose(self, context: Context) -> Proposal:
        """Keep the largest shares, or draw from them."""
        layers = layers_of(context.module, context.weights)
        batches = some_samples(context.objective, self.n_calib)
        reduction = "mean" if self.variant == "deterministic" else "max"
        scores, positions = sensitivities(
            context.objective, layers, batches, reduction, self.max_patches, self.seed, self.max_elems
        )
        samples = sum(map(batch_length, batches))
        notes = []
        if samples < self.n_calib:
            notes.append(f"Shares measured on {samples} of the {self.n_calib} samples asked for.")
        for name in [name for name in context.weights if name not in scores]:
            scores[name], positions[name] = equal_input_shares(context.weights[name]), 1
            notes.append(f"{name} cannot be seen at work: its shares are those of equal inputs.")
        scores = {name: scores[name] for name in context.weights}
        check_scores(scores)
        if self.variant == "deterministic":
            return Proposal(keep_top(scores, context.target, alive=context.alive), notes=notes)
        return self._sampled(context, scores, positions, notes)

    def _sampled(
        self, context: Context, scores: Mapping[str, Tensor], positions: Mapping[str, int], notes: list[str]
    ) -> Proposal:
        """Counts by water-filling, weights by chance; what the calibration data never sees fills up the count."""
        flat = torch.cat([(s * context.alive[name]).flatten().double().cpu() for name, s in scores.items()])
        rows, groups, numbers = self._rows(context.weights, scores, positions, flat)
        budget = kept_count(len(flat), context.target)
        total = min(budget, int((flat > 0).sum()))
        scales = torch.zeros_like(flat)
        if total and len(rows.alpha):
            counts = whole_numbers(water_filling(rows, total), rows.limits, total)
            bounds = row_error(rows.alpha, counts.clamp_min(1).double()) if self.variant == "hybrid" else None
            some = groups >= 0
            scales[some] = choose_rows(flat[some], groups[some], counts, bounds, context.generator)
        ranked = {
            name: (part > 0).view(scores[name].shape).to(scores[name].device).double() + scores[name].double() / 2
            for name, part in zip(scores, scales.split(numbers), strict=True)
        }
        masks = keep_top(ranked, context.target, alive=context.alive)
        weights = {
            name: _scaled(context.weights[name], part)
            for name, part in zip(scores, scales.split(numbers), strict=True)
            if bool(((part != 0) & (part != 1)).any())
        }
        drawn = int(((scales != 0) & (scales != 1)).sum())
        return Proposal(
            masks, weights or None, [*notes, f"{drawn} of {budget} weights were kept by chance and reweighed."]
        )

    def _rows(
        self,
        weights: Mapping[str, Tensor],
        scores: Mapping[str, Tensor],
        positions: Mapping[str, int],
        flat: Tensor,
    ) -> tuple[Rows, Tensor, list[int]]:
        """The rows with a sensitivity above 0, the row of every weight (-1: none), and the sizes of the tensors."""
        labels, logs, costs, start = [], [], [], 0
        for name, score in scores.items():
            outputs, kernel = len(score), max(1, score[0, 0].numel()) if score.dim() > 2 else 1
            sign = (weights[name] < 0).flatten(1).cpu().long()
            labels.append((start + 2 * torch.arange(outputs)[:, None] + sign).flatten())
            logs += [math.log(8 * (positions[name] + 1) * kernel / self.delta)] * (2 * outputs)
            costs += [1 / outputs] * (2 * outputs)
            start += 2 * outputs
        label = torch.cat(labels)
        sums = torch.zeros(start, dtype=torch.float64).index_add_(0, label, flat)
        living = torch.zeros(start, dtype=torch.float64).index_add_(0, label, (flat > 0).double())
        used = living > 0
        place = torch.where(used, used.cumsum(0) - 1, -1)
        alpha = 2 * CONSTANT * sums * torch.tensor(logs, dtype=torch.float64)
        found = Rows(alpha[used], living[used], torch.tensor(costs, dtype=torch.float64)[used])
        return found, place[label], [score.numel() for score in scores.values()]


def _scaled(weight: Tensor, scales: Tensor) -> Tensor:
    """Weights kept by chance, reweighed; the others as they are."""
    factors = torch.where(scales > 0, scales, 1.0).view(weight.shape).to(weight.device)
    return (weight.double() * factors).to(weight.dtype)
