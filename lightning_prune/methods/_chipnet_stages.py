"""What is measured and kept of the soft phase: losses with soft and hard gates, the folded weights, the certificate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_prune.context import Context
from lightning_prune.methods._chipnet_training import GateTraining
from lightning_prune.objective import Objective, buffers_of, evaluate


@dataclass
class StageProbe:
    """Compares the loss under soft gates with that under hard ones, on the same few calibration batches.

    Attributes:
        objective: the module's loss; None where there is none to be had.
        batches: what it is evaluated on.
    """

    objective: Objective | None
    batches: Sequence[Any]

    @classmethod
    def of(cls, context: Context, count: int) -> StageProbe:
        """Read the batches; without data or loss nothing will be compared."""
        if not count:
            return cls(None, ())
        try:
            return cls(context.objective, list(context.objective.batches(count)))
        except ValueError:  # no loss without the user's help, or a stream of data
            return cls(None, ())

    def losses(self, gates: GateTraining) -> dict[str, float]:
        """Return {"soft_loss", "hard_loss"}, each the mean over the batches and ranks; nothing without batches."""
        if self.objective is None or not self.batches:
            return {}
        found = {}
        try:
            for name, values in (("soft_loss", gates.values()), ("hard_loss", gates.hard_values())):
                gates.reads.set(values)
                found[name] = float(self.objective.reduce(self._mean(self.objective)))
        finally:
            gates.refresh()
        return found

    def _mean(self, objective: Objective) -> Tensor:
        with objective.open() as step, torch.no_grad():
            step.eval()
            parameters, buffers = objective.parameters(), buffers_of(objective.module)
            losses = [evaluate(step, parameters, buffers, batch, check=False).detach() for batch in self.batches]
        return torch.stack(losses).float().mean()


def scaled_weights(gates: GateTraining, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters times the soft gates on them, by name, each of its shape and dtype."""
    z = gates.values()
    flat = torch.cat([z, z.new_ones(1)])
    scaled: dict[str, Tensor] = {}
    for slot in gates.layout.slots:
        weight = scaled.get(slot.name, parameters[slot.name].detach())
        shape = [len(slot.gates) if dim == slot.dim else 1 for dim in range(weight.dim())]
        scaled[slot.name] = weight * flat[slot.gates.to(flat.device)].view(shape).to(weight)
    return scaled


def certificate_of(gates: GateTraining, hard: Tensor, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what is guaranteed of the hard budget, and how the gates came there, in plain JSON values."""
    plan, layout = gates.plan, gates.layout
    dense, cost = layout.costs.cost(plan.kind), layout.hard_cost(hard, plan.kind)
    found: dict[str, Any] = {
        "claim": f"{plan.kind} of the masked network with its removed channels cut out are at most the budget",
        "budget": plan.budget,
        "limit": plan.budget * dense,
        "cost": cost,
        "dense": dense,
        "stages": [dict(record) for record in records],
    }
    if not bool(hard.all()):
        last = int(torch.where(hard.to(gates.psi.device), -torch.inf, gates.psi.detach()).argmax())
        back = hard.clone()
        back[last] = True
        found["cost_with_the_next_channel"] = layout.hard_cost(back, plan.kind)
    return found
