"""DHSPG: dual half-space projected gradient; a penalty only on the channels predicted to be redundant.

Chen, Liang, Ding, Zhu, Zharkov, "OTOv2: Automatic, Generic, User-Friendly", ICLR 2023, arXiv:2303.06862, section 4.

After plain training until `begin`, channels are ranked once by redundancy (cosine of weights and step, inverse size). The most
redundant, some more than asked for, are penalized: lambda each, or where the step would grow the channel, a lambda that still
shrinks it while the loss descends; the half-space test zeroes them until the target is met. The others never see a penalty.

Departures from the paper: the target is never overshot (the smallest <z, x> / ||x||^2 go first) and is met exactly at `end`,
where the candidates of least norm go if zeros are missing (the receipt says how many); every layer keeps `min_keep` channels.
"""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch import Trainer
from typing_extensions import override

from lightning_prune.checks import check_bool, check_fraction, check_integer, check_positive
from lightning_prune.context import Context, Proposal
from lightning_prune.methods._hspg_periods import check_ratio, periods_of, propose_target
from lightning_prune.methods._hspg_plan import linear_share
from lightning_prune.methods._hspg_target import Removal
from lightning_prune.methods._hspg_variants import Dhspg, penalty_window, published_penalty, redundancy
from lightning_prune.methods._prox_blocks import Layout, group_parts
from lightning_prune.methods._prox_callback import ProximalCallback

__all__ = ["DHSPG", "penalty_window", "redundancy"]


class DHSPG(ProximalCallback):
    """Penalize the channels predicted to be redundant until an exact number of them is zero.

    Args:
        sparsity: removed fraction of the channels that take part, in [0, 1).
        begin: when they are ranked, int (optimizer steps) or float in [0, 1] (fraction of the fit).
        end: when the target is met, likewise.
        penalty: lambda > 0; "auto": what takes twice their median norm from the candidates until `end` where no gradient
            defends them; None: 1e-3 for SGD, 1e-2 for Adam, AdamW and RMSprop (published).
        eps: of the half-space, in [0, 1).
        tolerance: fraction of the channels chosen beyond the target, in [0, 1).
        max_ratio: fraction of a layer's channels that may be removed, in (0, 1].
        min_keep: channels every layer keeps at least, >= 1.
        round_to: round each layer's kept channels down to a multiple of this in the end (8 or 16 runs faster), >= 1.
        refit_consumers: refit the weights that read channels cut before they are zero, by least squares on calibration data.
        **common: see `PruningCallback`.
    Raises:
        ValueError: an argument breaks its rule.
    """

    method: ClassVar[str] = "dhspg"

    def __init__(
        self,
        sparsity: float,
        begin: int | float = 0.15,
        end: int | float = 0.5,
        penalty: float | str | None = None,
        eps: float = 0.9,
        tolerance: float = 0.05,
        max_ratio: float = 1.0,
        min_keep: int = 1,
        round_to: int = 1,
        refit_consumers: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(begin, end, **common)
        self.sparsity = check_fraction("sparsity", sparsity)
        self.penalty = penalty if penalty is None or penalty == "auto" else check_positive("penalty", penalty)
        self.by_default = penalty is None
        self.eps, self.tolerance = check_fraction("eps", eps), check_fraction("tolerance", tolerance)
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
        published, amplify, ceiling = published_penalty(layout.parts)
        return Dhspg(
            self.penalty or published, amplify, ceiling, self.eps, self.tolerance, share=linear_share,
            max_ratio=self.max_ratio, min_keep=self.min_keep, round_to=self.round_to,
            **periods_of(layout, self.bounds, 1, self.sparsity),
        )  # fmt: skip

    @override
    def propose(self, context: Context) -> Proposal:
        """Propose what is zero; without training, the channels of least size at once."""
        return propose_target(self._engine, self.removal, context, self._over, self.refit_consumers)
