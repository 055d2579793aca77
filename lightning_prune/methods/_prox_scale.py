"""How far one optimizer step goes for a given gradient: what the threshold of a proximal step has to match.

A prox with threshold a * penalty after a step of another length solves another problem. At a fixed point of

    SGD with momentum mu and dampening tau:  d = kappa g,        kappa = (1 - tau) / (1 - mu)
    Adam, AdamW, RMSprop:                    d_i = kappa g_i / D_i,  D_i = sqrt(second moment) + eps

so x = prox(x - a d) is optimal for f + penalty if and only if the threshold is a * kappa * penalty in the metric D.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer, RMSprop


def check_steps(optimizer: Optimizer, scaled: bool) -> None:
    """Raise MisconfigurationException for an optimizer that no proximal step can follow.

    Args:
        optimizer: any.
        scaled: whether the length of its steps must be known.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise MisconfigurationException(
            "LBFGS evaluates the loss several times within one step and keeps curvature that a projection makes wrong. "
            "Use SGD or Adam, or prune at once with a one-shot method."
        )
    if scaled and not isinstance(optimizer, (SGD, Adam, torch.optim.AdamW, RMSprop)):
        raise MisconfigurationException(
            f"`penalty` needs an optimizer whose step has a known scale (SGD, Adam, AdamW, RMSprop), got {name}: the "
            "threshold cannot be matched to its steps. Use the target form, HSPG(sparsity=...), which needs none."
        )


def has_metric(optimizer: Optimizer) -> bool:
    """Whether the optimizer scales every weight's step by itself."""
    return not isinstance(optimizer, SGD)


def momentum_gain(group: dict[str, Any], steps: int) -> float:
    """Return the sum of what `steps` steps at a constant gradient 1 move per step, exactly: kappa after warm-up.

    Args:
        group: a param group of SGD or RMSprop (others: 1).
        steps: steps taken with this buffer, >= 1.
    """
    momentum, dampening = float(group.get("momentum", 0.0)), float(group.get("dampening", 0.0))
    if momentum == 0.0:
        return 1.0
    gain = (1.0 - dampening) / (1.0 - momentum)
    start = 1.0  # torch's first buffer is the gradient itself, without dampening
    buffer = gain + momentum ** (steps - 1) * (start - gain)
    return 1.0 + momentum * buffer if group.get("nesterov") else buffer


def metric_of(optimizer: Optimizer, group: dict[str, Any], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return D_i > 0 for every entry of `parameters` after a step of Adam or RMSprop (or a subclass of them).

    Args:
        optimizer: it has stepped every one of `parameters` at least once.
        group: the param group they are in.
        parameters: tensors of that group.
    """
    states = [optimizer.state[parameter] for parameter in parameters]
    if isinstance(optimizer, RMSprop):
        moments = [state["square_avg"] for state in states]
        if group["centered"]:
            averages = [state["grad_avg"] for state in states]
            moments = list(torch._foreach_addcmul(moments, averages, averages, -1.0))
        roots = torch._foreach_sqrt(moments)
    else:
        key = "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
        steps = torch.stack([state["step"] for state in states]).double()
        corrections = (1.0 - float(group["betas"][1]) ** steps).unbind()
        roots = torch._foreach_div([state[key] for state in states], list(corrections))
        torch._foreach_sqrt_(roots)
    torch._foreach_add_(roots, float(group["eps"]))
    return list(roots)


@dataclass
class _StandIn:
    """What a scheduler sees of an optimizer."""

    param_groups: list[dict[str, Any]]
    defaults: dict[str, Any]
    state: dict[Any, Any]

    def step(self) -> None:
        """Schedulers look whether it has been wrapped."""


def future_rates(optimizer: Optimizer, schedulers: Iterable[tuple[Any, int]], steps: int) -> list[list[float]]:
    """Return the learning rate of every param group at each of the next `steps` steps.

    Schedulers are copied onto a stand-in and run ahead; one that cannot be (it waits for a metric) counts as constant.

    Args:
        optimizer: as it is now.
        schedulers: (scheduler of this optimizer, optimizer steps between two of its own).
        steps: >= 0.
    Returns:
        one list of `steps` numbers per param group.
    """
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    stand_in = _StandIn([{**group, "params": []} for group in groups], dict(optimizer.defaults), {})
    copies = []
    for scheduler, interval in schedulers:
        try:
            copies.append((copy.deepcopy(scheduler, {id(optimizer): stand_in}), interval))
        except Exception:  # any user's scheduler; a constant rate is the guess then
            continue
    rates: list[list[float]] = [[] for _ in groups]
    for step in range(1, steps + 1):
        for group, known in zip(stand_in.param_groups, rates, strict=True):
            known.append(float(group["lr"]))
        copies = [entry for entry in copies if step % entry[1] or _advanced(entry[0])]
    return rates


def _advanced(scheduler: Any) -> bool:
    """Step a copied scheduler; False if it cannot be stepped blindly."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.step()
    except Exception:
        return False
    return True


def reach(rates: Sequence[float], group: dict[str, Any], steps_before: int) -> float:
    """Return sum_t a_t kappa_t: how far a constant unit gradient would move a weight, in the metric of the optimizer."""
    return math.fsum(rate * momentum_gain(group, steps_before + index) for index, rate in enumerate(rates, 1))
