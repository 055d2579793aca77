"""The control beside every job of a sweep: the same job with the same number of weights kept in every layer, at random.

Frankle et al., "Pruning neural networks at initialization: why are we missing the mark?", ICLR 2021, section 4, and
Su et al., "Sanity-checking pruning methods: random tickets can win the jackpot", NeurIPS 2020. A mask permuted inside
its layers is a random mask with the same layer rates: one control stands for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from typing_extensions import override

from lightning_prune.channels import Channels
from lightning_prune.checks import check_bool, check_choice
from lightning_prune.context import Context, Proposal
from lightning_prune.masks import read_masks
from lightning_prune.oneshot import OneShotPruning
from lightning_prune.receipt import Receipt
from lightning_prune.selection import count_kept, shuffle_within_layer

CONTROLS = ("shuffled",)
_UNCONTROLLED = ("none", "random", "shuffled")  # random masks are controls themselves


class ShuffledMasks(OneShotPruning):
    """Prune by the masks of a finished run, permuted inside every tensor (or every group of channels).

    Args:
        masks: the `masks.safetensors` of that run.
        of: name of the method that made them.
        at: when; see `OneShotPruning`.
        structured: permute which channels of each group are kept, not single weights.
        prunes_trained: whether that method prunes trained networks.
        **common: see `PruningCallback`.
    Raises:
        ValueError: the file does not hold masks.
        FileNotFoundError: there is no such file.
    """

    method: ClassVar[str] = "shuffled"

    def __init__(
        self,
        masks: str,
        of: str,
        at: Any = "start",
        structured: bool = False,
        prunes_trained: bool = True,
        **common: Any,
    ) -> None:
        kept, total = count_kept(read_masks(masks))
        super().__init__(sparsity=(total - kept) / total, at=at, **common)
        self.masks, self.of = str(masks), str(of)
        self.structured = check_bool("structured", structured)
        self.prunes_trained = check_bool("prunes_trained", prunes_trained)  # type: ignore[misc]

    @override
    def propose(self, context: Context) -> Proposal:
        """Keep as many as the run kept, somewhere else."""
        masks = {name: mask.to(_device(context)) for name, mask in read_masks(self.masks).items()}
        if not self.structured:
            return Proposal(shuffle_within_layer({name: masks[name] for name in context.weights}, context.generator))
        channels = Channels.of(context)
        kept = kept_units(channels, masks)
        return Proposal(channels.masks(shuffle_within_layer(kept, context.generator)))


def kept_units(channels: Channels, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return which units of every group some weight of its consumers is kept for.

    Args:
        channels: the channel groups of a module.
        masks: bool masks by parameter name.
    Returns:
        bool masks by group name, each of shape (units,), on the CPU.
    """
    kept = {}
    for group in channels.groups:
        alive = torch.zeros(len(group), dtype=torch.bool)
        for name, dim in group.consumers:
            mask = masks.get(name)
            used = torch.ones(channels.sizes[name], dtype=torch.bool) if mask is None else mask.cpu()
            along = used.movedim(dim, 0).flatten(1).any(1)
            alive |= along[torch.as_tensor(group.slices[name, dim])].any(1)
        kept[group.name] = alive
    return kept


def control_configs(cfg: DictConfig, folder: Path) -> list[tuple[str, DictConfig]]:
    """Return the controls of a finished job as configurations by the names of their folders.

    Args:
        cfg: the job; `sweep.controls` lists what is wanted.
        folder: the job's folder, with its receipt and its masks.
    """
    wanted = [check_choice("sweep.controls", name, CONTROLS) for name in _wanted(cfg)]
    path = folder / "masks.safetensors"
    if "shuffled" not in wanted or not path.is_file() or not (folder / "receipt.json").is_file():
        return []
    receipt = Receipt.load(folder / "receipt.json")
    if receipt.method in _UNCONTROLLED:
        return []
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    given = plain["callbacks"]["pruning"]
    plain["callbacks"]["pruning"] = {
        "_target_": f"{ShuffledMasks.__module__}.{ShuffledMasks.__name__}",
        "_convert_": "all",
        "masks": str(path),
        "of": receipt.method,
        "at": last_moment(receipt.arguments),
        "structured": is_structured(receipt),
        "prunes_trained": _prunes_trained(given),
        "seed": 1 + int(cfg.seed),
        **{key: given[key] for key in ("include", "exclude", "refit_bn", "refit_bn_batches") if key in given},
    }
    plain["measure"]["seconds"] = 0.2  # it costs what the job itself costs
    return [("control_shuffled", OmegaConf.create(plain))]


def last_moment(arguments: Mapping[str, Any]) -> Any:
    """Return when a method made its final masks: the last of its moments, the end of its ramp, or the start."""
    at = arguments.get("at", arguments.get("end", "start"))
    if isinstance(at, list):
        return at[-1][0]
    if "at" not in arguments and isinstance(at, float) and at >= 1:
        return "end"
    return at if "at" in arguments or isinstance(at, (str, float)) else "start"


def is_structured(receipt: Receipt) -> bool:
    """Whether a run removed whole channels."""
    return receipt.requested.get("budget") is not None or receipt.arguments.get("structured") is True


def _wanted(cfg: DictConfig) -> Sequence[str]:
    return list(OmegaConf.select(cfg, "sweep.controls") or [])


def _prunes_trained(node: Mapping[str, Any]) -> bool:
    from hydra.utils import get_class

    return bool(getattr(get_class(str(node["_target_"])), "prunes_trained", True))


def _device(context: Context) -> torch.device:
    return next(iter(context.weights.values())).device
