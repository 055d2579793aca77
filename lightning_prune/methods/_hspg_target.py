"""Engines that remove groups until a target is met exactly: periods of choosing, fading out, and holding at zero.

In every period some groups are chosen (`leaving`) and faded to zero within it; at its end they are committed. What chooses
and what fades is the difference between TargetHSPG, HESSO and DHSPG.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_prune.context import Context, Proposal
from lightning_prune.methods._hspg_plan import Target, caps, normalised, removable, to_multiples
from lightning_prune.methods._prox_blocks import Layout, load_zeros, zeros_of
from lightning_prune.methods._prox_operators import outside_half_space
from lightning_prune.methods._prox_parts import GroupPart
from lightning_prune.methods._prox_report import Zeros, group_zeros

__all__ = ["Removal", "TargetHalfSpace"]


class Removal:
    """What the engines with an exact target share.

    Args:
        layout: the groups.
        target: what to reach.
        ends: steps at which periods end, in order; the last is the deadline.
        begin: step at which the first period begins.
        share: progress through the periods in (0, 1] -> share of the removals due at the period's end.
        max_ratio: fraction of a block that may be removed, in (0, 1].
        min_keep: groups every block keeps at least, >= 1.
        round_to: the last period rounds the kept channels of each block down to a multiple of this, >= 1.
    Attributes:
        leaving: per part, bool of shape (G,): groups that are being faded out.
        agree: makes a choice that of the first rank, on all of them.
    """

    learns_metric = False
    unit = "group"

    def __init__(
        self,
        layout: Layout,
        target: Target,
        ends: list[int],
        begin: int,
        share: Callable[[float], float],
        max_ratio: float = 1.0,
        min_keep: int = 1,
        round_to: int = 1,
    ) -> None:
        self.layout, self.goal, self.ends, self.begin, self.share = layout, target, ends, begin, share
        self.parts = layout.parts
        self.multiples = [1] * len(target.units) if round_to == 1 else multiples(layout, round_to)
        self.agree: Callable[[Tensor], Tensor] = lambda chosen: chosen
        self.period = 0
        self.leaving = [torch.zeros_like(part.zero) for part in self.parts]
        self._chosen = False
        self._busy = False  # whether anything leaves in this period
        counts = [part.table.by_block(part.zero) for part in self.parts]
        gone = [int(zero.sum()) for count in counts for zero in count.values()]
        self.limits = caps(target.units, max_ratio, min_keep, gone)
        target.check(self.limits, "Lower the sparsity (raise the budget), raise `max_ratio` or lower `min_keep`.")

    # what differs

    def measure(self, index: int, part: GroupPart, step: int) -> None:
        """Look at a step, before anything is changed; `part.previous` holds the weights before it."""

    def scores(self) -> Tensor:
        """Return a score for every group of all parts, of shape (G,), on the CPU; the lowest leave first."""
        raise NotImplementedError

    def fade(self, index: int, part: GroupPart, left: int) -> None:
        """Bring what leaves nearer to zero; `left` steps of the period are left, this one included."""
        raise NotImplementedError

    def finish(self, index: int, part: GroupPart) -> None:
        """At the last step of a period: what leaves is gone."""
        part.zero = part.zero | self.leaving[index]

    # the fit

    @property
    def target(self) -> float:
        """Sparsity or budget asked for at the end of this period."""
        return self.goal.at(self._share())

    @property
    def final_target(self) -> float:
        """Sparsity or budget asked for at the end."""
        return self.goal.at(1.0)

    @property
    def settled(self) -> bool:
        """Whether there is no penalty left to settle."""
        return True

    @property
    def done(self) -> bool:
        """Whether the target has been met."""
        return self.period >= len(self.ends)

    def due(self, step: int) -> bool:
        """Whether a period has ended that has not been committed."""
        return not self.done and step >= self.ends[self.period]

    def before(self, part: GroupPart, step: int) -> None:
        """Keep the weights before the step."""
        if not self.done:
            part.remember()

    @torch.no_grad()
    def after(self, part: GroupPart, step: int) -> None:
        """Measure, fade out what leaves, hold at zero what has left."""
        if self.done:
            return
        part.steps += 1
        index = self.parts.index(part)
        self.measure(index, part, step)
        if self._busy:
            left = max(1, self.ends[self.period] - step)
            self.fade(index, part, left)
            if left == 1:
                self.finish(index, part)
            part.table.scale_((~part.zero).to(part.table.dtype))

    def advance(self, step: int) -> None:
        """Choose what leaves in the period that begins."""
        if not self.done and not self._chosen and step >= self.begin:
            self.choose()

    def choose(self, last: bool = False) -> None:
        """Fill `leaving` up to what this period (or, if `last`, the whole fit) asks for."""
        gone = torch.cat([(part.zero | out).cpu() for part, out in zip(self.parts, self.leaving, strict=True)])
        block_of = self._block_of()
        order = removable(self.scores(), block_of, gone, self.limits)
        chosen = torch.zeros_like(gone)
        chosen[self.goal.chosen(order, block_of, gone, 1.0 if last else self._share())] = True
        if last or self.period == len(self.ends) - 1:
            chosen[to_multiples(order, gone | chosen, block_of, self.multiples)] = True
        parts = self.agree(chosen).split([part.table.count for part in self.parts])
        self.leaving = [out | new.to(out.device) for out, new in zip(self.leaving, parts, strict=True)]
        self._chosen = True
        self._busy = any(bool((out | part.zero).any()) for out, part in zip(self.leaving, self.parts, strict=True))

    def zeros(self) -> Zeros:
        """Return how many groups of each block are exactly zero."""
        return group_zeros(self.parts)

    def penalized(self) -> float | None:
        """There is no penalty."""
        return None

    def cuts(self) -> bool:
        """Whether the proposal just made removes groups that are not zero yet."""
        return any(
            bool(((part.zero | out) & part.nonzero()).any()) for part, out in zip(self.parts, self.leaving, strict=True)
        )

    def propose(self, context: Context, over: bool) -> Proposal:
        """Return masks without what has left by the end of this period; `over`: by the end of the fit."""
        if over or not self._chosen:
            self.choose(last=over)
        kept = {}
        for part, out in zip(self.parts, self.leaving, strict=True):
            kept.update({name: mask.cpu() for name, mask in part.table.by_block(~(part.zero | out)).items()})
        channels = self.layout.channels
        last = over or self.period == len(self.ends) - 1
        return Proposal(channels.masks(kept), notes=[*self.layout.notes(kept)] if last else [])

    def committed(self, over: bool) -> bool:
        """Go on to the next period: what was leaving is gone. Returns whether that was the last."""
        for part, out in zip(self.parts, self.leaving, strict=True):
            part.zero = part.zero | out
        self.leaving = [torch.zeros_like(part.zero) for part in self.parts]
        self._chosen = False
        self.period = len(self.ends) if over else self.period + 1
        return self.done

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        leaving = {
            name: out.cpu().clone()
            for part, outs in zip(self.parts, self.leaving, strict=True)
            for name, out in part.table.by_block(outs).items()
        }
        return {
            "period": self.period,
            "chosen": self._chosen,
            "busy": self._busy,
            "zero": zeros_of(self.parts),
            "leaving": leaving,
            "steps": [part.steps for part in self.parts],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        load_zeros(self.parts, state["zero"])
        self.leaving = [part.table.joined(state["leaving"]) for part in self.parts]
        self.period, self._chosen, self._busy = int(state["period"]), bool(state["chosen"]), bool(state["busy"])
        for part, steps in zip(self.parts, state["steps"], strict=True):
            part.steps = int(steps)

    def live(self) -> Tensor:
        """Groups that are neither gone nor leaving, of shape (G,), on the CPU."""
        return torch.cat([~(part.zero | out).cpu() for part, out in zip(self.parts, self.leaving, strict=True)])

    def _share(self) -> float:
        return self.share((min(self.period, len(self.ends) - 1) + 1) / len(self.ends))

    def _block_of(self) -> Tensor:
        """The block of every group of all parts."""
        first, found = 0, []
        for part in self.parts:
            found.append(part.table.block_of.cpu() + first)
            first += len(part.table.blocks)
        return torch.cat(found)


def multiples(layout: Layout, round_to: int) -> list[int]:
    """Return for every block the number of which its kept groups are a multiple: `round_to` over positions per group."""
    widths = {group.name: group.width for group in layout.channels.groups}
    names = [block.name for part in layout.parts for block in part.table.blocks]
    return [round_to // math.gcd(round_to, widths[name]) for name in names]


class TargetHalfSpace(Removal):
    """TargetHSPG: groups of the least running saliency, faded by feed-forward, gone early when they leave the half-space.

    Args:
        saliency: "taylor" is the running mean of |<x_g, gradient_g>|, "magnitude" ||x_g|| / sqrt |g|.
        beta: of the running mean, in [0, 1).
        normalise: "block" divides by the mean of the block, "global" ranks as it is.
        eps: of the half-space, in [0, 1).
        **common: see `Removal`.
    """

    def __init__(
        self,
        saliency: str = "taylor",
        beta: float = 0.95,
        normalise: str = "block",
        eps: float = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.saliency, self.beta, self.normalise, self.eps = saliency, beta, normalise, eps
        self.running = [torch.zeros(part.table.count, dtype=part.table.dtype) for part in self.parts]
        self.running = [value.to(part.table.device) for value, part in zip(self.running, self.parts, strict=True)]

    def measure(self, index: int, part: GroupPart, step: int) -> None:
        """Update the running mean of |<x_g, gradient_g>|."""
        if self.saliency == "taylor":
            now = part.table.dot(part.previous, part.gradients()).abs()
            self.running[index] = torch.lerp(now, self.running[index], self.beta)

    def scores(self) -> Tensor:
        """Running saliency, or magnitude where none has been measured yet."""
        measured = [bool(running.any()) for running in self.running]
        if self.saliency == "taylor" and all(measured):
            scores = torch.cat([running.cpu() for running in self.running])
        else:
            scores = torch.cat([(part.norms() / part.table.sizes.sqrt()).cpu() for part in self.parts])
        return normalised(scores, self._block_of(), self.live()) if self.normalise == "block" else scores

    def fade(self, index: int, part: GroupPart, left: int) -> None:
        """x_g <- x_g - x_g' / left, with x' the weights before the step; early zeros where <x_g, x_g'> < eps ||x_g'||^2."""
        leaving = self.leaving[index]
        share = part.table.spread(leaving.to(part.table.dtype) / left, outside=0.0)
        weights = [tensor.detach() for tensor in part.tensors]
        torch._foreach_addcmul_(weights, part.previous, share, -1.0)
        products = part.table.dot(weights, part.previous)
        squares = part.table.dot(part.previous, part.previous)
        part.zero = part.zero | (leaving & outside_half_space(products, squares, self.eps, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        running = {
            name: value.cpu().clone()
            for part, values in zip(self.parts, self.running, strict=True)
            for name, value in part.table.by_block(values).items()
        }
        return {**super().state_dict(), "running": running}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        super().load_state_dict(state)
        self.running = [part.table.joined(state["running"]) for part in self.parts]
