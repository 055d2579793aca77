"""Meta-gradients through SGD by a reverse sweep of Hessian-vector products.

The inner loop, for t = 0 .. M-1 with batches B_t, learning rate eta, momentum mu and weight decay lam (torch's SGD):

    a_t = grad L(theta_t; B_t) + lam theta_t,   m_t = mu m_{t-1} + a_t   (m_0 = a_0),
    d_t = m_t, or a_t + mu m_t with nesterov,   theta_{t+1} = theta_t - eta d_t.

With v = dL(theta_M; B_M) / dtheta_{t+1}, s the adjoint of m_t (0 at the end) and H_t the Hessian of L(.; B_t) at
theta_t, going back from t = M-1 to 0:

    s <- s - eta v,      a = s            (nesterov: s <- s - eta mu v,  a = s - eta v)
    v <- v + H_t a + lam a,   s <- mu s.

At the end v = dL(theta_M) / dtheta_0. Nothing of step t is alive when step t-1 is processed: memory holds M copies of
the parameters, not M graphs. Frozen and pruned entries do not move; `moving` projects d_t, hence also a and s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_prune.checks import check_bool, check_choice, check_integer, check_positive, is_number
from lightning_prune.curvature import Losses

Tensors = tuple[Tensor, ...] | list[Tensor]
MODES = ("full", "first_order")


@dataclass(frozen=True)
class InnerSGD:
    """The optimizer of the inner loop.

    Attributes:
        steps: M, >= 0.
        lr: eta, > 0.
        momentum: mu, in [0, 1).
        nesterov: look ahead along the momentum; needs momentum > 0.
        weight_decay: lam, >= 0.
        detach_first_momentum: treat the first momentum buffer as a constant, as the authors' program does; without
            momentum it has no effect.
    Raises:
        ValueError: an attribute breaks its rule.
    """

    steps: int = 3
    lr: float = 0.1
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    detach_first_momentum: bool = False

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 0, "It counts inner optimizer steps.")
        check_positive("inner_lr", self.lr)
        check_bool("inner_nesterov", self.nesterov)
        check_bool("detach_first_momentum", self.detach_first_momentum)
        if not is_number(self.momentum) or not 0 <= self.momentum < 1:
            raise ValueError(f"`inner_momentum` must be in [0, 1), got {self.momentum!r}. Give a number such as 0.9.")
        if not is_number(self.weight_decay) or self.weight_decay < 0:
            raise ValueError(f"`inner_weight_decay` must be a finite number >= 0, got {self.weight_decay!r}.")
        if self.nesterov and self.momentum == 0:
            raise ValueError("`inner_nesterov` must be false without momentum. Give `inner_momentum` above 0.")
        if self.nesterov and self.detach_first_momentum:
            raise ValueError(
                "`detach_first_momentum` must be false with `inner_nesterov`: it is defined for plain momentum only."
            )


@dataclass
class Store:
    """Where the parameters of past steps wait: their own device, or another one (the CPU) that has more memory.

    Attributes:
        device: None keeps them where they are.
    """

    device: torch.device | str | None = None
    kept: list[dict[str, Tensor]] = field(default_factory=list)

    def push(self, point: Mapping[str, Tensor]) -> None:
        """Keep a point."""
        self.kept.append({n: x if self.device is None else x.to(self.device, copy=True) for n, x in point.items()})

    def pop(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the last point kept, on the devices of `like`, and forget it."""
        return {name: value.to(like[name].device) for name, value in self.kept.pop().items()}


def meta_gradient(
    losses: Losses,
    start: Mapping[str, Tensor],
    sgd: InnerSGD,
    wanted: Sequence[str],
    moving: Mapping[str, Tensor | None] | None = None,
    mode: str = "full",
    store: Store | None = None,
) -> tuple[dict[str, Tensor], list[float]]:
    """Return dL_M(theta_M) / dtheta_0 through the M steps of `sgd` on L_0 .. L_{M-1}.

    Args:
        losses: L_0 .. L_M; L_M is the meta-loss.
        start: theta_0 by name: everything that is trained, and everything in `wanted`.
        sgd: the inner loop.
        wanted: names whose meta-gradients are returned.
        moving: the entries that the inner loop trains, by name: None all of them, a bool mask those that are True.
            Names left out are frozen. None (no mapping) trains everything.
        mode: "full", or "first_order" (all Jacobians d theta_{t+1} / d theta_t taken as identity).
        store: where the trajectory is kept; None keeps it in place.
    Returns:
        meta-gradients by name, each of its parameter's shape, and the losses L_0 .. L_M met on the way.
    Raises:
        ValueError: an inner loss is not finite (the step is named).
    """
    check_choice("mode", mode, MODES)
    moving = dict.fromkeys(start) if moving is None else dict(moving)
    store = Store() if store is None else store
    point, history = _descend(losses, start, sgd, moving, store if mode == "full" else None)
    direct = list(dict.fromkeys([*moving, *wanted])) if mode == "full" else list(wanted)
    loss, adjoint = losses.gradient(sgd.steps, point, direct)
    history.append(_finite(loss, sgd.steps, sgd))
    if mode == "full":
        del point
        adjoint = _sweep_back(losses, start, sgd, moving, adjoint, store, wanted)
    return {name: adjoint[name] for name in wanted}, history


def _descend(
    losses: Losses,
    start: Mapping[str, Tensor],
    sgd: InnerSGD,
    moving: Mapping[str, Tensor | None],
    store: Store | None,
) -> tuple[dict[str, Tensor], list[float]]:
    """theta_M and the losses L_0 .. L_{M-1}; the points on the way go to `store`."""
    point, names, history = dict(start), list(moving), []
    velocity: Tensors = []
    for step in range(sgd.steps):
        if store is not None:
            store.push({name: point[name] for name in names})
        loss, slopes = losses.gradient(step, point, names)
        history.append(_finite(loss, step, sgd))
        here = [point[name] for name in names]
        pull: Tensors = _project([slopes[name] for name in names], moving)
        if sgd.weight_decay:
            pull = torch._foreach_add(pull, _project(here, moving), alpha=sgd.weight_decay)
        if sgd.momentum:
            velocity = torch._foreach_add(torch._foreach_mul(velocity, sgd.momentum), pull) if velocity else pull
        move = velocity if sgd.momentum else pull
        if sgd.nesterov:
            move = torch._foreach_add(pull, velocity, alpha=sgd.momentum)
        point.update(zip(names, torch._foreach_add(here, move, alpha=-sgd.lr), strict=True))
    return point, history


def _sweep_back(
    losses: Losses,
    start: Mapping[str, Tensor],
    sgd: InnerSGD,
    moving: Mapping[str, Tensor | None],
    adjoint: dict[str, Tensor],
    store: Store,
    wanted: Sequence[str],
) -> dict[str, Tensor]:
    """Carry dL_M / dtheta_M back to dL_M / dtheta_0, one Hessian-vector product per step."""
    names = list(moving)
    carried: Tensors = [torch.zeros_like(adjoint[name]) for name in names]
    for step in reversed(range(sgd.steps)):
        point = {**start, **store.pop(start)}
        if step == 0 and sgd.detach_first_momentum and sgd.momentum:
            continue  # d_0 is a constant then, and d theta_1 / d theta_0 the identity
        pushed = _project([adjoint[name] for name in names], moving)
        ahead = sgd.lr * sgd.momentum if sgd.nesterov else sgd.lr
        carried = torch._foreach_add(carried, pushed, alpha=-ahead)
        pull = torch._foreach_add(carried, pushed, alpha=-sgd.lr) if sgd.nesterov else carried
        rows = list(wanted) if step == 0 else list(adjoint)
        vector = dict(zip(names, pull, strict=True))
        product = losses.product(step, point, vector, rows)
        adjoint = {name: adjoint[name] + product[name] for name in rows}
        if sgd.weight_decay:
            adjoint = {
                name: value + sgd.weight_decay * vector[name] if name in vector else value
                for name, value in adjoint.items()
            }
        if not bool(torch.stack(torch._foreach_norm(list(adjoint.values()))).isfinite().all()):
            raise ValueError(
                f"the meta-gradient is not finite at inner step {step} of {sgd.steps}. "
                f"Choose `inner_lr` below {sgd.lr:g}."
            )
        carried = torch._foreach_mul(carried, sgd.momentum)
    return adjoint


def _project(values: list[Tensor], moving: Mapping[str, Tensor | None]) -> list[Tensor]:
    """Zero the entries that do not move."""
    return [value if mask is None else value * mask for value, mask in zip(values, moving.values(), strict=True)]


def _finite(loss: Tensor, step: int, sgd: InnerSGD) -> float:
    if not bool(loss.isfinite()):
        where = f"after {step} of {sgd.steps} inner steps" if step else "before the first inner step"
        advice = f"Choose `inner_lr` below {sgd.lr:g}." if step else "Check loss and data."
        raise ValueError(f"the loss is not finite {where}, got {float(loss)}. {advice}")
    return float(loss)
