"""The gates while they are soft: psi, its own optimizer, the schedule, and what is known at the end of every stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lightning_prune.cost import Kind
from lightning_prune.methods._chipnet_gates import (
    Temperature,
    anneal,
    budget_loss,
    crispness_loss,
    gate_values,
    soft_counts,
    stage_of,
)
from lightning_prune.methods._chipnet_hooks import GatedReads
from lightning_prune.methods._chipnet_layout import Layout, harden, rounded

BINS = 10
INITIAL_SPREAD = 0.01  # psi ~ U(0, 0.01): every gate starts at z = 0.70


@dataclass(frozen=True)
class Plan:
    """What the gates are trained for.

    Attributes:
        budget: remaining fraction of the cost, in (0, 1].
        kind: which cost.
        soft_steps: optimizer steps of the soft phase, >= 1.
        stages: annealing stages, >= 1.
        lr: AdamW's step size for psi, > 0.
        w_budget, w_crisp: weights of the two losses, >= 0.
        hard_from: step from which the forward pass is hard and the backward pass soft.
        min_keep: fraction of every group that stays in any case, in [0, 1); None: see `floor_within`, until gates open.
        round_to: kept channels are rounded down to a multiple of this, >= 1.
        fold: hard gates keep their z; else they are 1.
    """

    budget: float
    kind: Kind
    soft_steps: int
    stages: int
    lr: float
    w_budget: float
    w_crisp: float
    hard_from: int
    min_keep: float | None
    round_to: int
    fold: bool


class GateTraining:
    """Trains psi by the gradients that come back through the gates, and by the two losses.

    Attributes:
        psi: float32 of shape (gates,), on the module's device.
        step: optimizer steps since the soft phase began.
    """

    def __init__(self, layout: Layout, reads: GatedReads, plan: Plan, psi: Tensor) -> None:
        self.layout, self.reads, self.plan = layout, reads, plan
        self.psi = psi.detach().clone().requires_grad_()
        self.optimizer = AdamW([self.psi], lr=plan.lr, weight_decay=0.0)
        self.step = 0
        self.refresh()

    @property
    def temperature(self) -> Temperature:
        """The temperature of this step."""
        return anneal(self.step, self.plan.soft_steps, self.plan.stages)

    @property
    def stage(self) -> int:
        """The stage of this step; the number of stages once the soft phase is over."""
        return stage_of(self.step, self.plan.soft_steps, self.plan.stages)

    def values(self) -> Tensor:
        """Return z, detached, of shape (gates,)."""
        return gate_values(self.psi.detach(), self.temperature)[1]

    def hard(self) -> Tensor:
        """Return the gates that would stay if the soft phase ended now, bool of shape (gates,) on the CPU."""
        plan = self.plan
        gates = harden(self.layout, self.psi, plan.budget, plan.kind, plan.min_keep or 0.0)
        return gates if plan.round_to == 1 else rounded(self.layout, gates, self.psi, plan.round_to)

    def hard_values(self) -> Tensor:
        """Return what the gates multiply by once they are hard: 0, and for those that stay z (or 1)."""
        kept = self.hard().to(self.psi.device)
        return torch.where(kept, self.values(), 0.0) if self.plan.fold else kept.to(self.psi.dtype)

    def go_to(self, step: int) -> None:
        """Anneal to a step."""
        if step != self.step:
            self.step = step
            self.refresh()

    def refresh(self, hard: bool = False) -> None:
        """Hand the gates to the module: soft, or hard if asked or in the straight-through tail."""
        self.reads.set(self.hard_values() if hard or self.step >= self.plan.hard_from else self.values())

    def losses(self, x: Tensor, z: Tensor) -> Tensor:
        """Return w_budget L_b + w_crisp L_c, a scalar."""
        counts = soft_counts(z, self.temperature.tau).double().cpu()
        over = budget_loss(self.layout.share(counts, self.plan.kind), self.plan.budget).to(z)
        return self.plan.w_budget * over + self.plan.w_crisp * crispness_loss(x, z)

    def update(self, gradient: Tensor) -> bool:
        """Take one AdamW step on psi.

        Args:
            gradient: of the task's loss with respect to z, of shape (gates,).
        Returns:
            Whether it was taken; a gradient that is not finite (a step the scaler skips) changes nothing.
        """
        if not bool(torch.isfinite(gradient).all()):
            return False
        with torch.enable_grad():
            x, z = gate_values(self.psi, self.temperature)
            total = (z * gradient).sum() + self.losses(x, z)
            (self.psi.grad,) = torch.autograd.grad(total, [self.psi])
        self.optimizer.step()
        self.psi.grad = None
        self.refresh()
        return True

    @torch.no_grad()
    def describe(self) -> dict[str, Any]:
        """Return what the gates look like now, in plain values."""
        x, z = gate_values(self.psi, self.temperature)
        counts = soft_counts(z, self.temperature.tau).double().cpu()
        crisp = (z > 0.5).cpu()
        dense = self.layout.costs.cost(self.plan.kind)
        return {
            "stage": self.stage,
            "step": self.step,
            "soft_share": float(self.layout.share(counts, self.plan.kind)),
            "above_half_share": self.layout.hard_cost(crisp, self.plan.kind) / dense,
            "hard_share": self.layout.hard_cost(self.hard(), self.plan.kind) / dense,
            "crispness": float(crispness_loss(x, z)),
            "histogram": torch.histc(z.float().cpu(), BINS, 0.0, 1.0).long().tolist(),
        }

    def state(self) -> dict[str, Any]:
        """Return psi and its optimizer's state in plain values."""
        return {
            "psi": self.psi.detach().cpu().clone(),
            "optimizer": self.optimizer.state_dict(),
            "signature": self.layout.signature,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave.

        Raises:
            ValueError: it belongs to other channel groups.
        """
        if list(map(list, state["signature"])) != list(map(list, self.layout.signature)):
            raise ValueError(
                f"the checkpoint's gates belong to the groups {state['signature']}, this module has "
                f"{self.layout.signature}. Resume with the same model and the same `include` and `exclude`."
            )
        with torch.no_grad():
            self.psi.copy_(state["psi"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.refresh()


def initial_psi(gates: int, generator: torch.Generator) -> Tensor:
    """Return psi ~ U(0, 0.01), float32 of shape (gates,)."""
    return torch.rand(gates, generator=generator) * INITIAL_SPREAD


def scale_gradients(optimizer: Optimizer, factor: float) -> None:
    """Multiply the gradients of an optimizer's parameters by a number, in place."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients and factor != 1.0:
        torch._foreach_mul_(gradients, factor)
