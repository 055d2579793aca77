"""Prox-SGD: a proximal step of an l1 or group penalty after every step of any SGD or Adam.

Chen, Ji, Ding, Fang, Wang, Zhu, Liang, Shi, Yi, Tu, "Neural Network Compression via Sparse Optimization",
arXiv:2011.04868, 2020, section 3 (the baseline of HSPG); the operators are those of Parikh and Boyd, "Proximal
Algorithms", 2014, section 6.5.

    unstructured:  x <- soft(x, a kappa penalty / D)
    structured:    x_g <- argmin_z 1/2 (z - x_g)' D (z - x_g) + a kappa penalty w_g ||z||

with a the learning rate and kappa, D the length and metric of the optimizer's step (`_prox_scale`).

Departures from the paper: the threshold is matched to momentum and to Adam's metric (with plain a * penalty the fixed point
solves another problem); groups are those of the dependency graph with the norms that follow, so that a zero group is a
channel that can be removed; the largest channels of each layer, as many as must stay, see no penalty (behind a BatchNorm no
gradient defends the scale of a whole layer); at `end` zeros become masks and the penalty is lifted, which takes its bias away.
"""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch import Trainer
from typing_extensions import override

from lightning_prune.checks import check_bool, check_choice, check_integer, check_positive
from lightning_prune.context import Context
from lightning_prune.methods._hspg_periods import check_ratio
from lightning_prune.methods._prox_blocks import group_parts
from lightning_prune.methods._prox_callback import ProximalCallback, check_penalty
from lightning_prune.methods._prox_operators import (
    group_soft_threshold,
    metric_group_prox,
    shrink_factors,
    soft_threshold,
)
from lightning_prune.methods._prox_parts import tensor_parts
from lightning_prune.methods._prox_penalties import GroupPenalty, L1Penalty, Penalty, Stage
from lightning_prune.methods._prox_scale import momentum_gain
from lightning_prune.methods._prox_weights import GROUP_WEIGHTS, protect, weigh
from lightning_prune.targets import select

__all__ = [
    "ProxSGD", "group_soft_threshold", "metric_group_prox", "momentum_gain", "shrink_factors", "soft_threshold",
]  # fmt: skip


class ProxSGD(ProximalCallback):
    """Shrink weights or channels by a proximal step after every optimizer step, until some are exactly zero.

    Args:
        penalty: lambda >= 0 of `penalty * ||x||_1`, or structured of `penalty * sum_g w_g ||x_g||`; "auto": what takes
            `auto_factor` times the median weight (norm) away until `end` where no gradient defends it.
        structured: penalize whole channels.
        begin: first step acted on, int (optimizer steps) or float in [0, 1] (fraction of the fit).
        end: when the zeros become masks and the penalty is lifted, likewise.
        group_weight: w_g of a channel: "sqrt_size" (over the mean), "none" (1) or "flops" (of the channel, over the mean).
        auto_factor: of "auto", > 0.
        max_ratio: structured: fraction of a layer's channels that may become zero, in (0, 1].
        min_keep: structured: channels every layer keeps at least, >= 0. The largest, as many as must stay, see no penalty.
        **common: see `PruningCallback`.
    Raises:
        ValueError: an argument breaks its rule.
    """

    method: ClassVar[str] = "prox_sgd"
    needs_step_scale = True

    def __init__(
        self,
        penalty: float | str = "auto",
        structured: bool = False,
        begin: int | float = 0.0,
        end: int | float = 0.5,
        group_weight: str = "sqrt_size",
        auto_factor: float = 2.0,
        max_ratio: float = 0.9,
        min_keep: int = 1,
        **common: Any,
    ) -> None:
        super().__init__(begin, end, **common)
        self.penalty = check_penalty(penalty)
        self.structured = check_bool("structured", structured)
        self.group_weight = check_choice("group_weight", group_weight, GROUP_WEIGHTS)
        self.auto_factor = check_positive("auto_factor", auto_factor)
        self.max_ratio, self.min_keep = check_ratio(max_ratio), check_integer("min_keep", min_keep, 0)

    @property
    @override
    def requested(self) -> dict[str, Any]:
        return {"penalty": self.penalty}

    @override
    def make_engine(self, context: Context, trainer: Trainer) -> Penalty:
        common: dict[str, Any] = {
            "stage_at": self.stage_at, "asked": self.penalty, "factor": self.auto_factor, "deadline": self.bounds[1],
        }  # fmt: skip
        if not self.structured:
            targets = select(context.module, self.include, self.exclude)
            return L1Penalty(parts=tensor_parts(targets, trainer.optimizers), **common)
        layout = group_parts(context, trainer.optimizers)
        weigh(layout, self.group_weight)
        protect(layout, self.max_ratio, self.min_keep)
        return GroupPenalty(layout, **common)

    def stage_at(self, step: int) -> Stage:
        """Return what follows the step with this index."""
        begin, end = self.bounds
        return "prox" if begin <= step < end else "off"
