"""Every form of the family on the toy, which has four channels and twelve hidden units, and a watcher of its zeros."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback

from lightning_prune import DHSPG, HESSO, HSPG, OBProxSGD, ProxSGD

GROUPS = 16
TARGETS: dict[str, Any] = {
    "hspg": lambda s, **more: HSPG(s, max_ratio=1.0, measure=False, **more),
    "hesso": lambda s, **more: HESSO(s, measure=False, **more),
    "dhspg": lambda s, **more: DHSPG(s, measure=False, **more),
}
FORMS: dict[str, Any] = {
    **{name: lambda name=name, **more: TARGETS[name](0.5, **more) for name in TARGETS},
    "budget": lambda **more: HSPG(budget=0.5, measure=False, **more),
    "prox trial": lambda **more: HSPG(penalty="auto", switch=4, measure=False, **more),
    "subgradient trial": lambda **more: HSPG(penalty="auto", switch=4, trial="subgradient", measure=False, **more),
    "orthant": lambda **more: OBProxSGD("auto", prox_steps=2, measure=False, **more),
    "orthant, cycles": lambda **more: OBProxSGD("auto", prox_steps=2, orthant_steps=2, measure=False, **more),
    "prox, channels": lambda **more: ProxSGD("auto", structured=True, measure=False, **more),
    "prox, weights": lambda **more: ProxSGD("auto", measure=False, **more),
}
NO_REVIVAL = [name for name in FORMS if name not in ("orthant, cycles", "prox, channels", "prox, weights")]


def widths(module: Any) -> tuple[int, int]:
    """Channels and units that are not all zero in what makes them."""
    makes = (module.conv.weight.flatten(1), module.hidden.weight)
    conv, hidden = (int((weight.detach() != 0).any(1).sum()) for weight in makes)
    return conv, hidden


class Zeros(Callback):
    """Keeps after every batch which weights are zero, how many channels are left, and the method's clock."""

    def __init__(self, method: Any = None) -> None:
        self.method = method
        self.seen: list[torch.Tensor] = []
        self.widths: list[tuple[int, int]] = []
        self.clock: list[tuple[int, bool, int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append(torch.cat([p.detach().flatten() == 0 for p in pl_module.parameters()]))
        self.widths.append(widths(pl_module))
        if self.method is not None:
            self.clock.append((self.method._step, self.method.finished, trainer.global_step))
