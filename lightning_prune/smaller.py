"""The smaller module behind a receipt: dead channels cut out, counted and kept for saving.

Cutting needs tracing and verification, so it is tried only where a mask has emptied a whole slab of a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_prune.cost import CostModel
from lightning_prune.dependency import channel_groups
from lightning_prune.masks import DTensor, MaskManager
from lightning_prune.shrink import report_of, shrink

__all__ = ["Smaller", "smaller_copy"]

Example = tuple[tuple[Any, ...], dict[str, Any]]
_SHOWN = 3


@dataclass(frozen=True)
class Smaller:
    """A shrunk copy of a pruned module.

    Attributes:
        module: the copy; None if nothing could be cut.
        costs: "volume" and "channels" -> {dense, pruned}, for the example it was traced with.
        notes: sentences for the receipt: what stayed whole though its channels are gone, and why.
    """

    module: nn.Module | None = None
    costs: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def smaller_copy(module: nn.Module, example: Example, time_limit: float = 60.0) -> Smaller:
    """Cut the masked channels of a module out of a copy of it.

    Args:
        module: the masked module; it stays as it is.
        example: (args, kwargs) of one forward call.
        time_limit: seconds for the search, > 0.
    Returns:
        The copy and its costs; without a copy where no mask empties a slab or nothing can be cut (notes say why).
    """
    if not _empties_a_slab(MaskManager.of(module).masks) or any(isinstance(p, DTensor) for p in module.parameters()):
        return Smaller()
    args, kwargs = example
    try:
        groups = channel_groups(module, args, kwargs)
        small = shrink(module, args, groups=groups, example_kwargs=kwargs, time_limit=time_limit)
    except Exception as error:  # any user code may run while tracing; a finished training must survive it
        return Smaller(notes=[f"No smaller module was made: {type(error).__name__}: {error}"])
    report = report_of(small)
    refused = [f"Channels of {name!r} are masked but not cut out: {why}." for name, why in report.refused.items()]
    notes = [*refused[:_SHOWN], *([f"So are {len(refused) - _SHOWN} more groups."] if len(refused) > _SHOWN else [])]
    if not report.units:
        return Smaller(notes=notes)
    costs = CostModel(groups)
    kept = {name: after for name, (_, after) in report.units.items()}
    counts = {
        "volume": {"dense": int(costs.volume()), "pruned": int(costs.volume(kept))},
        "channels": {"dense": int(costs.channels()), "pruned": int(costs.channels(kept))},
    }
    return Smaller(small, counts, notes)


def _empties_a_slab(masks: Mapping[str, Tensor]) -> bool:
    """Whether some weight lost an output or an input as a whole."""
    return any(
        not bool(mask.any(tuple(d for d in range(mask.dim()) if d != dim)).all())
        for mask in masks.values()
        if mask.dim() > 1
        for dim in (0, 1)
    )
