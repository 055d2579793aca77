"""Periods and targets of the methods that remove an exact number of channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_prune.checks import is_number
from lightning_prune.context import Context, Proposal
from lightning_prune.cost import Kind
from lightning_prune.methods._hspg_plan import Target, boundaries
from lightning_prune.methods._prox_blocks import Layout, group_parts
from lightning_prune.structured import refit_proposal

__all__ = ["check_ratio", "periods_of", "propose_target"]


def check_ratio(value: Any) -> float:
    """Return `max_ratio` if it lies in (0, 1], else raise ValueError."""
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError(f"`max_ratio` must be in (0, 1], the part of a layer that may be removed, got {value!r}.")
    return float(value)


def periods_of(
    layout: Layout,
    bounds: tuple[int, int],
    periods: int,
    sparsity: float | None,
    budget: float | None = None,
    budget_type: Kind | None = None,
) -> dict[str, Any]:
    """Return what a `Removal` needs to know: layout, target, begin and ends of periods."""
    blocks = [block for part in layout.parts for block in part.table.blocks]
    target = Target(
        [block.name for block in blocks], [block.units for block in blocks], sparsity, budget, budget_type or "flops",
        None if budget is None else layout.channels.costs,
    )  # fmt: skip
    begin, end = bounds
    begin = min(max(begin, 1), end)  # one step is measured before anything is chosen
    return {"layout": layout, "target": target, "begin": begin, "ends": boundaries(begin, end, periods)}


def propose_target(
    engine: Any, removal: Callable[[Layout], Any], context: Context, over: bool, refit: bool
) -> Proposal:
    """Return what leaves by the end of the period, or, where no optimizer trains the module, of a whole removal at once.

    Args:
        engine: what has been at work in a fit; None outside of one.
        removal: makes one from the groups.
        context: the pruning event.
        over: whether the fit has ended.
        refit: refit the consumers of channels that are cut before they are zero; those that have faded leave nothing to refit.
    """
    if engine is None:
        stand_in = torch.optim.SGD(context.module.parameters(), lr=1.0)
        engine, over = removal(group_parts(context, [stand_in])), True
    proposal = engine.propose(context, over)
    return refit_proposal(context, proposal) if refit and engine.cuts() else proposal
