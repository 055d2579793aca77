"""SNIP, Iter-SNIP and FORCE: connection sensitivity at initialization.

SNIP: Lee, Ajanthan and Torr, "SNIP: single-shot network pruning based on connection sensitivity", ICLR 2019, eq. 4.
Iter-SNIP and FORCE: de Jorge et al., "Progressive skeletonization: trimming more fat from a network at initialization",
ICLR 2021.

Departures from the papers' programs: only weights are pruned, no biases; the module is scored as it is about to be
trained (its own weights, training flags and loss) and goes on from the same weights; scores are not divided by their
sum, which changes no rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.checks import check_bool, check_integer
from lightning_prune.context import Context, Proposal
from lightning_prune.curvature import Losses, point_of, replayed_losses
from lightning_prune.methods._prospr_batches import BatchStream, check_optional, noise_seed, progress
from lightning_prune.methods._prospr_selection import InitialPruning, Masks, prune_in_rounds
from lightning_prune.selection import Scope

__all__ = ["SNIP", "sensitivity", "snip_scores"]


def sensitivity(losses: Losses, count: int, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Masks:
    """Return the gradient of the mean loss with respect to a multiplier of every weight, w * dL/dw, taken at m * w.

    Args:
        losses: L_0 .. L_{count-1}.
        count: number of losses averaged, >= 1.
        weights: w by name, each of any shape S.
        masks: bool m by the same names, of shape S.
    Returns:
        signed values by name, of shape S; at a masked entry: what its return would change.
    Raises:
        ValueError: a loss is not finite.
    """
    point = {name: weight * masks[name] for name, weight in weights.items()}
    total: Masks = {}
    for step in range(count):
        loss, grads = losses.gradient(step, point)
        if not bool(loss.isfinite()):
            raise ValueError(
                f"the loss of calibration batch {step} is not finite, got {float(loss)}. Check loss and data."
            )
        total = {name: grad if step == 0 else total[name] + grad for name, grad in grads.items()}
    return {name: weights[name] * grad / count for name, grad in total.items()}


def snip_scores(losses: Losses, weights: Mapping[str, Tensor], count: int = 1) -> dict[str, Tensor]:
    """Score every weight by its connection sensitivity |w * dL/dw|.

    Args:
        losses: L_0 .. L_{count-1}, averaged before the absolute value.
        weights: w by name, each of any shape S.
        count: number of losses, >= 1.
    Returns:
        scores >= 0 by name, of shape S.
    """
    everything = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    return {name: value.abs() for name, value in sensitivity(losses, count, weights, everything).items()}


class SNIP(InitialPruning):
    """Remove the weights whose removal would change the loss least, before training starts.

    Args:
        sparsity: pruned fraction of the selected weights, in [0, 1); None with pairs in `at`.
        at: when; see `OneShotPruning`.
        rounds: above 1 the masked network is scored again after each step of an exponential schedule (Iter-SNIP), >= 1.
        regrow: weights pruned in an earlier round may return (FORCE).
        batches: batches averaged per score, >= 1.
        batch_size: samples per batch, >= 1; None takes the training loader's batches.
        micro_batch_size: samples evaluated at a time, >= 1; None takes whole batches.
        **initial: see `InitialPruning`.
    Raises:
        ValueError: an argument breaks its rule.
    """

    method: ClassVar[str] = "snip"

    def __init__(
        self,
        sparsity: float | None = None,
        at: Any = "start",
        rounds: int = 1,
        regrow: bool = False,
        batches: int = 1,
        batch_size: int | None = None,
        micro_batch_size: int | None = None,
        scope: Scope = "global",
        min_keep_per_layer: int = 1,
        shuffle_within_layer: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(sparsity, at, scope, min_keep_per_layer, shuffle_within_layer, **common)
        self.rounds = check_integer("rounds", rounds, 1)
        self.regrow = check_bool("regrow", regrow)
        self.batches = check_integer("batches", batches, 1)
        self.batch_size = check_optional("batch_size", batch_size)
        self.micro_batch_size = check_optional("micro_batch_size", micro_batch_size)

    @override
    def propose(self, context: Context) -> Proposal:
        """Keep the largest |w * dL/dw|, in as many rounds as asked."""
        stream = BatchStream(context.objective, self.batch_size)
        weights = {name: value for name, value in point_of(context.module).items() if name in context.weights}
        with (
            progress("SNIP", self.rounds * self.batches, context.show_progress) as context.objective.advance,
            replayed_losses(
                context.objective,
                noise_seed(context.generator),
                micro_batch_size=self.micro_batch_size,
            ) as losses,
        ):

            def score(masks: Masks) -> Masks:
                values = sensitivity(losses(stream.take(self.batches)), self.batches, weights, masks)
                return {name: value.abs() for name, value in values.items()}

            masks = prune_in_rounds(score, self.keep, context.alive, context.target, self.rounds, self.regrow)
        masks, notes = self.settle(masks, context.alive, context.generator)
        return Proposal(masks, notes=[*notes, *stream.notes()])
