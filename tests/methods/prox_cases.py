"""Small convex problems with known optima, and loops that train them with a penalty attached to any optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.methods._prox_groups import Block, GroupTable, Piece
from lightning_prune.methods._prox_parts import GroupPart, Part
from lightning_prune.methods._prox_penalties import GroupPenalty, L1Penalty

Make = Callable[[list[Tensor]], torch.optim.Optimizer]


def lasso_problem() -> tuple[np.ndarray, np.ndarray]:
    """200 samples of 30 features, 6 of which matter."""
    rng = np.random.default_rng(0)
    features, truth = rng.standard_normal((200, 30)), np.zeros(30)
    truth[:6] = [2.0, -1.5, 1.0, -1.0, 0.8, 0.6]
    return features, features @ truth + 0.5 * rng.standard_normal(200)


def group_table(weights: Tensor, size: int) -> GroupTable:
    """A vector in groups of `size` consecutive entries."""
    positions = torch.arange(weights.numel()).view(-1, size)
    return GroupTable([Block("groups", len(positions), (Piece(0, 0, positions),))], [weights])


def descend(
    weights: torch.nn.Parameter,
    optimizer: torch.optim.Optimizer,
    penalty: Any,
    gradient: Callable[[Tensor, int], Tensor],
    steps: int,
    rate: Callable[[int], float] | None = None,
) -> None:
    """Steps of an optimizer with a penalty around each, as the callback's hooks do it."""
    (part,) = penalty.parts
    for step in range(steps):
        if rate is not None:
            optimizer.param_groups[0]["lr"] = rate(step)
        weights.grad = gradient(weights.detach(), step)
        penalty.before(part, step)
        optimizer.step()
        penalty.after(part, step)


def quadratic(features: np.ndarray, targets: np.ndarray) -> Callable[[Tensor, int], Tensor]:
    """Gradient of 1 / (2 n) ||X w - y||^2."""
    gram, moment = torch.tensor(features.T @ features / len(targets)), torch.tensor(features.T @ targets / len(targets))
    return lambda weights, step: gram @ weights - moment


def start(size: int) -> torch.nn.Parameter:
    """Weights away from 0."""
    return torch.nn.Parameter(torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))


def solve_lasso(make: Make, penalty: float, steps: int, matched: bool = True) -> Tensor:
    """Minimise the Lasso with an optimizer and our prox; not `matched`: with the naive threshold a * penalty."""
    weights = start(30)
    part = (Part if matched else NaivePart)(make([weights]), [weights])
    l1 = L1Penalty([part], lambda step: "prox", penalty)
    descend(weights, part.optimizer, l1, quadratic(*lasso_problem()), steps)
    return weights.detach()


class NaivePart(Part):
    """What one would do without thinking: the learning rate is the length of the step."""

    def lengths(self) -> list[float]:
        return [self.rate(index) for index in range(len(self.tensors))]


def group_penalty(make: Make, weights: Tensor, size: int, **arguments: Any) -> GroupPenalty:
    """A group penalty on a vector."""
    return GroupPenalty(parts=[GroupPart(make([weights]), group_table(weights, size))], **arguments)


class Lines:
    """A logger that keeps what it is given; a real one, to pass the Trainer's check."""

    def __new__(cls) -> Any:
        from lightning.pytorch.loggers.logger import DummyLogger

        class Keeping(DummyLogger):
            def __init__(self) -> None:
                super().__init__()
                self.lines: list[dict[str, float]] = []

            def log_metrics(self, metrics: Any, step: int | None = None) -> None:
                self.lines.append({**metrics, "step": step})

            @property
            def save_dir(self) -> str:
                return "."

        return Keeping()
