"""Random pruning: the control that every other method has to beat at the same sparsity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.channels import Channels, shares
from lightning_prune.context import Context, Proposal
from lightning_prune.selection import Scope, check_layer_floor, check_scope, keep_top
from lightning_prune.structured import StructuredOneShot

__all__ = ["RandomPruning", "random_scores"]


def random_scores(weights: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Score every weight by an independent uniform number.

    Args:
        weights: parameters by name, each of any shape S.
        generator: CPU source of randomness; the same state gives the same scores on every device.
    Returns:
        float32 scores in [0, 1) under the same names, each of shape S, on the weight's device.
    """
    return {name: torch.rand(weight.shape, generator=generator).to(weight.device) for name, weight in weights.items()}


class RandomPruning(StructuredOneShot):
    """Remove weights at random, or channels under a budget.

    Args:
        sparsity: pruned fraction of the selected weights, in [0, 1); None with a budget or with pairs in `at`.
        at: when; see `StructuredOneShot`.
        scope: "global" draws from all weights together, "layer" prunes the same fraction of every tensor
            (of every channel group).
        layer_floor: fraction of every tensor that stays in any case, in [0, 1 - sparsity].
        **common: `budget` and what goes with it, see `StructuredOneShot`; and see `PruningCallback`.
    Raises:
        ValueError: an argument breaks its rule.
    """

    method: ClassVar[str] = "random"

    def __init__(
        self,
        sparsity: float | None = None,
        at: Any = "start",
        scope: Scope = "layer",
        layer_floor: float = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(sparsity, at, **common)
        check_scope(scope)
        self.scope: Scope = scope
        self.layer_floor = check_layer_floor(layer_floor, self.sparsity or 0.0)

    @override
    def propose_weights(self, context: Context) -> Proposal:
        """Keep the luckiest weights."""
        scores = random_scores(context.weights, context.generator)
        return Proposal(keep_top(scores, context.target, self.scope, self.layer_floor, context.alive))

    @override
    def unit_scores(self, context: Context, channels: Channels) -> dict[str, Tensor]:
        """Independent uniform numbers."""
        scores = {group.name: torch.rand(len(group), generator=context.generator) for group in channels.groups}
        return shares(scores) if self.scope == "layer" else scores
