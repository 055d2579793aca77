"""What a penalty sum_g w_g ||x_g|| knows of every group: its weight w_g, with mean 1, and what each block keeps."""

from __future__ import annotations

import torch

from lightning_prune.methods._hspg_plan import caps
from lightning_prune.methods._prox_blocks import Layout

GROUP_WEIGHTS = ("sqrt_size", "none", "flops")

__all__ = ["GROUP_WEIGHTS", "protect", "weigh"]


def weigh(layout: Layout, rule: str) -> None:
    """Set `weight` of every part: "none" is 1, "sqrt_size" sqrt |g| (Yuan and Lin), "flops" what one channel costs."""
    if rule == "none":
        return
    for part in layout.parts:
        if rule == "sqrt_size":
            part.weight = part.table.sizes.sqrt()
        else:
            costs = [_flops_of_one(layout, block.name, block.units) for block in part.table.blocks]
            part.weight = torch.tensor(costs, dtype=part.table.dtype).to(part.table.device)[part.table.block_of]
    mean = torch.cat([part.weight.double().cpu() for part in layout.parts]).mean().item()
    for part in layout.parts:
        part.weight = part.weight / mean


def protect(layout: Layout, max_ratio: float, min_keep: int) -> None:
    """Set `keep` of every part, so that no block loses more than `max_ratio` of its groups or keeps less than `min_keep`.

    Behind a BatchNorm the scale of a whole block changes nothing, so that no gradient defends it from a penalty.
    """
    for part in layout.parts:
        units = [block.units for block in part.table.blocks]
        gone = [int(zero.sum()) for zero in part.table.by_block(part.zero).values()]
        limits = caps(units, max_ratio, min_keep, gone)
        part.keep = torch.tensor(units).sub(torch.tensor(limits)).to(part.table.device)


def _flops_of_one(layout: Layout, name: str, units: int) -> float:
    costs = layout.channels.costs
    return float(costs.flops() - costs.flops({name: units - 1}))
