"""The controls beside every job of a sweep: what its result has to beat.

`shuffled`: the same job with as many weights (or channels) kept in every layer, at random. `magnitude`: for a method that
removes channels, those of smallest norm under the same budget. `dense`: for such a method, its smaller network trained
from scratch for as many epochs, dense at equal FLOPs.

Frankle et al., "Pruning neural networks at initialization: why are we missing the mark?", ICLR 2021, section 4, and
Su et al., "Sanity-checking pruning methods: random tickets can win the jackpot", NeurIPS 2020. A mask permuted inside
its layers is a random mask with the same layer rates: one control stands for both. Dense training of the smaller network
is the control of Liu et al., "Rethinking the value of network pruning", ICLR 2019.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.channels import Channels
from lightning_prune.checks import check_bool, check_choice
from lightning_prune.context import Context, Proposal
from lightning_prune.masks import read_masks
from lightning_prune.oneshot import OneShotPruning
from lightning_prune.receipt import Receipt
from lightning_prune.selection import count_kept, shuffle_within_layer
from lightning_prune.shrink import FORMAT as SHRUNK
from lightning_prune.shrink import load_shrunk

CONTROLS = ("shuffled", "magnitude", "dense")
_UNCONTROLLED = ("none", "random", "shuffled")  # random masks are controls themselves
_SHARED = ("include", "exclude", "refit_bn", "refit_bn_batches")


class ShuffledMasks(OneShotPruning):
    """Prune by the masks of a finished run, permuted inside every tensor (or every group of channels).

    Args:
        masks: the `masks.safetensors` of that run.
        of: name of the method that made them.
        at: when; see `OneShotPruning`.
        structured: permute which channels of each group are kept, not single weights.
        prunes_trained: whether that method prunes trained networks.
        requested: what that run was asked, for the receipt; None: the sparsity of its masks.
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
        requested: dict[str, Any] | None = None,
        **common: Any,
    ) -> None:
        kept, total = count_kept(read_masks(masks))
        super().__init__(sparsity=(total - kept) / total, at=at, **common)
        self.masks, self.of = str(masks), str(of)
        self.structured = check_bool("structured", structured)
        self.prunes_trained = check_bool("prunes_trained", prunes_trained)  # type: ignore[misc]
        self._requested = dict(requested) if requested is not None else {"sparsity": self.sparsity}

    @property
    @override
    def requested(self) -> dict[str, Any]:
        """What the controlled run was asked."""
        return dict(self._requested)

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
    if not (folder / "masks.safetensors").is_file() or not (folder / "receipt.json").is_file():
        return []
    receipt = Receipt.load(folder / "receipt.json")
    if receipt.method in _UNCONTROLLED:
        return []
    made: dict[str, Any] = {}
    if "shuffled" in wanted:
        made["shuffled"] = _shuffled(cfg, folder, receipt)
    if "magnitude" in wanted and receipt.method != "magnitude" and _budget(receipt) is not None:
        made["magnitude"] = _magnitude(cfg, receipt)
    if "dense" in wanted and is_structured(receipt) and holds_shrunk(folder / "model.safetensors"):
        made["dense"] = _dense(cfg, folder)
    for plain in made.values():
        plain["measure"]["seconds"] = 0.2  # it costs what the job itself costs
    return [(f"control_{name}", OmegaConf.create(plain)) for name, plain in made.items()]


def _shuffled(cfg: DictConfig, folder: Path, receipt: Receipt) -> Any:
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    given = plain["callbacks"]["pruning"]
    plain["callbacks"]["pruning"] = {
        "_target_": f"{__name__}.{ShuffledMasks.__name__}",
        "_convert_": "all",
        "masks": str(folder / "masks.safetensors"),
        "of": receipt.method,
        "at": last_moment(receipt.arguments),
        "structured": is_structured(receipt),
        "prunes_trained": _prunes_trained(given),
        "requested": receipt.requested,
        "seed": 1 + int(cfg.seed),
        **{key: given[key] for key in _SHARED if key in given},
    }
    return plain


def _magnitude(cfg: DictConfig, receipt: Receipt) -> Any:
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    given = plain["callbacks"]["pruning"]
    plain["callbacks"]["pruning"] = {
        "_target_": "lightning_prune.methods.magnitude.Magnitude",
        "_convert_": "all",
        **(_budget(receipt) or {}),
        "at": last_moment(receipt.arguments),
        **{key: given[key] for key in _SHARED if key in given},
    }
    return plain


def _budget(receipt: Receipt) -> dict[str, Any] | None:
    """The budget under which magnitude pruning removes as much as the run was asked to."""
    asked = receipt.requested
    if asked.get("budget") is not None:
        return {"budget": asked["budget"], "budget_type": asked["budget_type"]}
    if asked.get("channel_sparsity") is not None:
        return {"budget": round(1 - float(asked["channel_sparsity"]), 12), "budget_type": "channels"}
    return None


def _dense(cfg: DictConfig, folder: Path) -> Any:
    """The smaller network, from scratch, for the epochs of the dense training and of the fine-tuning together."""
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    epochs = int(plain["dense"]["max_epochs"]) + int(plain["trainer"]["max_epochs"])
    plain["callbacks"] = {name: node for name, node in plain["callbacks"].items() if name != "pruning"}
    plain["model"] = {
        "_target_": f"{__name__}.{fresh_model.__name__}",
        "_recursive_": False,
        "model": plain["model"],
        "weights": str(folder / "model.safetensors"),
    }
    plain["dense"] = {**plain["dense"], "enabled": True, "max_epochs": epochs}
    plain["ckpt_path"] = None
    return plain


def fresh_model(model: Any, weights: str) -> nn.Module:
    """Return the shrunk module of a file with untrained weights.

    Args:
        model: configuration of the dense module.
        weights: file of the shrunk one.
    Raises:
        ValueError: a parameter belongs to a module that has no `reset_parameters`.
    """
    from hydra.utils import instantiate

    small = load_shrunk(lambda: instantiate(model), weights)
    for name, module in small.named_modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        elif next(module.parameters(recurse=False), None) is not None:
            raise ValueError(
                f"{name or type(module).__name__!r} holds parameters and has no `reset_parameters`, so the smaller network "
                "cannot be trained from scratch. Leave 'dense' out of `sweep.controls`."
            )
    return small


def holds_shrunk(path: Path) -> bool:
    """Whether a safetensors file holds a shrunk module."""
    if not path.is_file():
        return False
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("format") == SHRUNK


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
    asked = receipt.requested
    counts_channels = asked.get("budget") is not None or asked.get("channel_sparsity") is not None
    return counts_channels or receipt.arguments.get("structured") is True


def _wanted(cfg: DictConfig) -> Sequence[str]:
    return list(OmegaConf.select(cfg, "sweep.controls") or [])


def _prunes_trained(node: Mapping[str, Any]) -> bool:
    from hydra.utils import get_class

    return bool(getattr(get_class(str(node["_target_"])), "prunes_trained", True))


def _device(context: Context) -> torch.device:
    return next(iter(context.weights.values())).device
