"""Refits between two prunings: steps along fresh gradients on a fixed support.

The quadratic of Benbaki et al. (ICML 2023, section 3) holds near the weights at which its gradients were taken. After a
stage has jumped, its kept weights are refitted by steps along the gradients of fresh, small batches, as Adam takes them
(Kingma and Ba, ICLR 2015, algorithm 1), in units of the weights' own size (Shazeer and Stern, "Adafactor", ICML 2018,
section 8): the size of a layer then needs no step length of its own.

These steps are not in the paper: they use more training samples than one stage of it, and the receipt counts them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.checks import check_fraction, check_integer, check_positive

Gradient = Callable[[Tensor], tuple[float, Tensor]]
Loss = Callable[[Tensor], float]

_TINY = 1e-12  # a gradient of this size or less moves nothing
_NOISE = 2.0  # times the loss may rise between stages, while steps are long and their noise has not died down
_TRIES = 3  # the step length is halved at most twice in one stage


@dataclass(frozen=True)
class RefitSettings:
    """How to refit.

    Attributes:
        count: steps over all stages, >= 0.
        last: share of them that follows the last stage, in [0, 1); the other stages have equal parts of the rest.
        length: first step in units of the root mean square of a tensor's kept weights, > 0; it falls to 0 linearly.
        momentum: decay of the running mean of gradients, in [0, 1).
        memory: decay of the running mean of their squares, in [0, 1).
    """

    count: int = 600
    last: float = 0.5
    length: float = 0.1
    momentum: float = 0.9
    memory: float = 0.999

    def __post_init__(self) -> None:
        check_integer("count", self.count, 0)
        check_positive("length", self.length)
        for name in ("last", "momentum", "memory"):
            check_fraction(name, getattr(self, name))


def refit_counts(count: int, stages: int, last: float = 0.5) -> list[int]:
    """Return the steps after each stage.

    Args:
        count: steps in all, >= 0.
        stages: >= 1.
        last: share of the last stage where there are several, in [0, 1).
    """
    if stages == 1:
        return [count]
    each = int(count * (1 - last)) // (stages - 1)
    return [each] * (stages - 1) + [count - each * (stages - 1)]


class Moments:
    """Running means of gradients g and of their squares, both without the bias of their start at 0.

        m <- b m + (1 - b) g,   v <- c v + (1 - c) g^2,   direction = (m / (1 - b^t)) / (sqrt(v / (1 - c^t)) + tiny)

    Args:
        like: gives shape and type.
        momentum: b in [0, 1).
        memory: c in [0, 1).
    """

    def __init__(self, like: Tensor, momentum: float, memory: float) -> None:
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)
        self.momentum, self.memory, self.steps = momentum, memory, 0

    def copy(self) -> Moments:
        """Return moments that may go on without these."""
        other = Moments.__new__(Moments)
        other.__dict__.update(self.__dict__, mean=self.mean.clone(), square=self.square.clone())
        return other

    def keep(self, support: Tensor) -> None:
        """Forget the mean gradients outside a support; bool of shape (p,)."""
        self.mean.mul_(support)

    def direction(self, gradient: Tensor) -> Tensor:
        """Take a gradient of shape (p,) in; return the direction along which the loss rises, of shape (p,)."""
        self.steps += 1
        self.mean.lerp_(gradient, 1 - self.momentum)
        self.square.mul_(self.memory).addcmul_(gradient, gradient, value=1 - self.memory)
        size = self.square.sqrt().mul_(1 / math.sqrt(1 - self.memory**self.steps)).add_(_TINY)
        return torch.div(self.mean, size, out=size).mul_(1 / (1 - self.momentum**self.steps))


class Refitter:
    """Refit after every stage of a run; what it learns of the gradients in one stage serves the next.

    Args:
        settings: how many steps, and how.
        sizes: entries of each tensor in the flat vector of p weights, in order.
        stages: number of stages, >= 1.
    Attributes:
        length: step length now; halved whenever a refit has not lowered the loss.
        troubles: how often that was.
    """

    def __init__(self, settings: RefitSettings, sizes: Sequence[int], stages: int) -> None:
        self.settings, self.sizes = settings, list(sizes)
        self.counts = refit_counts(settings.count, stages, settings.last)
        self.length, self.troubles, self.stage, self.done = settings.length, 0, 0, 0
        self._moments: Moments | None = None

    def refit(self, weights: Tensor, support: Tensor, gradient: Gradient, loss: Loss, before: float) -> Tensor:
        """Return the weights after this stage's steps; as they were if no step length lowered the loss.

        Args:
            weights: shape (p,), 0 outside the support.
            support: bool of shape (p,).
            gradient: weights -> (mean loss, mean gradient of shape (p,)) over a fresh batch of training samples.
            loss: weights -> mean loss over calibration samples that stay the same.
            before: that loss at `weights`.
        """
        count, self.stage = self.counts[self.stage], self.stage + 1
        if not count or not bool(support.any()):
            return weights
        moments = self._moments or Moments(weights, self.settings.momentum, self.settings.memory)
        moments.keep(support)
        unit = kept_sizes(weights, support, self.sizes)
        for _ in range(_TRIES):
            trial = moments.copy()
            moved = self._descend(weights, unit, gradient, count, trial)
            limit = before if self.stage == len(self.counts) else _NOISE * before
            if moved is not None and loss(moved) <= limit:
                weights, moments = moved, trial
                break
            self.length, self.troubles = self.length / 2, self.troubles + 1
        self.done, self._moments = self.done + count, moments
        return weights

    def _descend(
        self, weights: Tensor, unit: Tensor, gradient: Gradient, count: int, moments: Moments
    ) -> Tensor | None:
        """The weights after `count` steps; None once a batch has no finite loss."""
        weights = weights.clone()
        for done in range(self.done, self.done + count):
            value, slope = gradient(weights)
            if not math.isfinite(value):
                return None
            length = self.length * (1 - done / self.settings.count)
            weights.addcmul_(unit, moments.direction(slope), value=-length)
        return weights


def kept_sizes(weights: Tensor, support: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the root mean square of the kept weights of each tensor at its kept entries, 0 elsewhere; shape (p,).

    Args:
        weights: shape (p,), 0 outside the support.
        support: bool of shape (p,).
        sizes: entries of each tensor, in order.
    """
    parts = zip(weights.split(list(sizes)), support.split(list(sizes)), strict=True)
    return torch.cat([kept * (part.square().sum() / kept.sum().clamp_min(1)).sqrt() for part, kept in parts])
