"""Weights w_g of groups in a penalty sum_g w_g ||x_g||, with mean 1."""

from __future__ import annotations

import torch

from lightning_prune.methods._prox_blocks import Layout

GROUP_WEIGHTS = ("sqrt_size", "none", "flops")

__all__ = ["GROUP_WEIGHTS", "weigh"]


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


def _flops_of_one(layout: Layout, name: str, units: int) -> float:
    costs = layout.channels.costs
    return float(costs.flops() - costs.flops({name: units - 1}))
