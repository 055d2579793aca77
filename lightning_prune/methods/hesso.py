"""HESSO: hybrid efficient structured sparse optimization; channels leave in even periods while the rest trains as always.

Chen, Liang, Ding, Zhu, Zharkov, "HESSO: Towards Automatic Efficient and User Friendly Any Neural Network Training and Pruning",
arXiv:2409.09085, 2024, algorithm 1.

In each of P periods K / P channels of the least saliency on the current minibatch are chosen and faded linearly,
x_g <- (left - 1) / left * x_g after each step; at its end they are committed. No penalty, no half-space.

Departures from the paper: exactly floor(sparsity * channels) leave, the lowest scores first (the authors' program slices sorted
indices); every layer keeps `min_keep` channels; groups are the channels of the dependency graph. The corrective cycle
(HESSO-CRIC) is not built.
"""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch import Trainer
from typing_extensions import override

from lightning_prune.checks import check_bool, check_fraction, check_integer
from lightning_prune.context import Context, Proposal
from lightning_prune.methods._hspg_periods import check_ratio, periods_of, propose_target
from lightning_prune.methods._hspg_plan import linear_share
from lightning_prune.methods._hspg_target import Removal
from lightning_prune.methods._hspg_variants import Hesso, hesso_saliency
from lightning_prune.methods._prox_blocks import Layout, group_parts
from lightning_prune.methods._prox_callback import ProximalCallback

__all__ = ["HESSO", "hesso_saliency"]


class HESSO(ProximalCallback):
    """Fade out channels of least importance in even periods, to an exact number.

    Args:
        sparsity: removed fraction of the channels that take part, in [0, 1).
        begin: start of the first period, int (optimizer steps) or float in [0, 1] (fraction of the fit).
        end: end of the last one, likewise.
        periods: P, >= 1.
        max_ratio: fraction of a layer's channels that may be removed, in (0, 1].
        min_keep: channels every layer keeps at least, >= 1.
        round_to: round each layer's kept channels down to a multiple of this in the end (8 or 16 runs faster), >= 1.
        refit_consumers: refit the weights that read channels cut before they are zero, by least squares on calibration data.
        **common: see `PruningCallback`.
    Raises:
        ValueError: an argument breaks its rule.
    """

    method: ClassVar[str] = "hesso"

    def __init__(
        self,
        sparsity: float,
        begin: int | float = 0.1,
        end: int | float = 0.25,
        periods: int = 10,
        max_ratio: float = 1.0,
        min_keep: int = 1,
        round_to: int = 1,
        refit_consumers: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(begin, end, **common)
        self.sparsity = check_fraction("sparsity", sparsity)
        self.periods = check_integer("periods", periods, 1)
        self.max_ratio, self.min_keep = check_ratio(max_ratio), check_integer("min_keep", min_keep, 1)
        self.round_to = check_integer("round_to", round_to, 1)
        self.refit_consumers = check_bool("refit_consumers", refit_consumers)

    @property
    @override
    def requested(self) -> dict[str, Any]:
        return {"channel_sparsity": self.sparsity}

    @override
    def make_engine(self, context: Context, trainer: Trainer) -> Removal:
        return self.removal(group_parts(context, trainer.optimizers))

    def removal(self, layout: Layout) -> Removal:
        """Return what removes the channels."""
        return Hesso(
            share=linear_share, max_ratio=self.max_ratio, min_keep=self.min_keep, round_to=self.round_to,
            **periods_of(layout, self.bounds, self.periods, self.sparsity),
        )  # fmt: skip

    @override
    def propose(self, context: Context) -> Proposal:
        """Propose what has been faded out; without training, the channels of least importance at once."""
        return propose_target(self._engine, self.removal, context, self._over, self.refit_consumers)
