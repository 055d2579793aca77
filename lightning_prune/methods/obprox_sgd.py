"""OBProx-SG: orthant-based proximal stochastic gradient steps for an l1 penalty.

Chen, Ding, Ji, Wang, Shi, Tu, Yi, Zhu, "Orthant Based Proximal Stochastic Gradient Method for l1-Regularized Optimization",
ECML-PKDD 2020, arXiv:2004.03639, algorithms 1 to 3.

Proximal steps find a support; orthant steps then descend f + penalty ||x||_1 inside the orthant of the current weights, where
the penalty is linear:

    z = u - a kappa penalty sign(x) / D,     z_i <- 0 unless sign(x_i) z_i > eps

so that no zero revives and what would cross zero stops there. Prox steps alone keep few zeros under gradient noise.

Departures from the paper: stages are counted in optimizer steps; the threshold is matched to momentum and Adam's metric
(`_prox_scale`); only the selected weights are penalized, no bias and no norm; at `end` zeros become masks and the penalty is
lifted.
"""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch import Trainer
from typing_extensions import override

from lightning_prune.checks import check_fraction, check_positive
from lightning_prune.context import Context
from lightning_prune.methods._prox_callback import ProximalCallback, check_penalty
from lightning_prune.methods._prox_operators import orthant_step
from lightning_prune.methods._prox_parts import tensor_parts
from lightning_prune.methods._prox_penalties import L1Penalty, Stage
from lightning_prune.schedules import Position, check_bound
from lightning_prune.targets import select

__all__ = ["OBProxSGD", "orthant_step"]


class OBProxSGD(ProximalCallback):
    """Find a support by proximal steps, then hold and sharpen it by orthant steps, all on single weights.

    Args:
        penalty: lambda >= 0 of `penalty * ||x||_1`; "auto": what takes `auto_factor` times the median weight away until
            `end` where no gradient defends it.
        prox_steps: proximal steps at the start of each cycle, int (optimizer steps) or float in [0, 1] (fraction of the fit).
        orthant_steps: orthant steps after them, likewise; None: all the rest (OBProx-SG+, the sparsest).
        begin: first step acted on, int or float likewise.
        end: when the zeros become masks and the penalty is lifted, likewise.
        eps: a weight is zeroed when it comes this near to crossing zero, in [0, 1).
        auto_factor: of "auto", > 0.
        **common: see `PruningCallback`.
    Raises:
        ValueError: an argument breaks its rule.
    """

    method: ClassVar[str] = "obprox_sgd"
    structured: ClassVar[bool] = False
    needs_step_scale = True

    def __init__(
        self,
        penalty: float | str = "auto",
        prox_steps: int | float = 0.1,
        orthant_steps: int | float | None = None,
        begin: int | float = 0.0,
        end: int | float = 0.5,
        eps: float = 0.0,
        auto_factor: float = 2.0,
        **common: Any,
    ) -> None:
        super().__init__(begin, end, **common)
        self.penalty = check_penalty(penalty)
        self.prox_steps = check_bound("prox_steps", prox_steps)
        self.orthant_steps = None if orthant_steps is None else check_bound("orthant_steps", orthant_steps)
        self.eps = check_fraction("eps", eps)
        self.auto_factor = check_positive("auto_factor", auto_factor)
        self._cycle: tuple[int, int | None] = (0, None)

    @property
    @override
    def requested(self) -> dict[str, Any]:
        return {"penalty": self.penalty}

    @override
    def check_fit(self, trainer: Trainer, position: Position, resumed: bool) -> None:
        super().check_fit(trainer, position, resumed)
        prox = self.steps_of("prox_steps", position, trainer)
        orthant = None if self.orthant_steps is None else max(1, self.steps_of("orthant_steps", position, trainer))
        self._cycle = (prox, orthant)

    @override
    def make_engine(self, context: Context, trainer: Trainer) -> L1Penalty:
        targets = select(context.module, self.include, self.exclude)
        return L1Penalty(
            parts=tensor_parts(targets, trainer.optimizers), stage_at=self.stage_at, asked=self.penalty,
            factor=self.auto_factor, eps=self.eps, deadline=self.bounds[1],
        )  # fmt: skip

    def stage_at(self, step: int) -> Stage:
        """Return what follows the step with this index: prox or orthant."""
        begin, end = self.bounds
        if not begin <= step < end:
            return "off"
        prox, orthant = self._cycle
        place = step - begin if orthant is None else (step - begin) % (prox + orthant)
        return "prox" if place < prox else "projected"
