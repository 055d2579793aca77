"""The controls beside every job of a sweep: what its result has to beat.

`shuffled`: the same job with as many weights (or channels) kept in every layer, at random. `magnitude`: the smallest weights
at the same sparsity, or for a method that removes channels those of smallest norm under the same budget. `random`: weights
at random, the same fraction of every layer. `dense`: for a method that removes channels, its smaller network trained from
scratch for as many epochs, dense at equal FLOPs.

Magnitude and random pruning at a sparsity do not depend on the method that they control: all jobs with the same target,
seed and moment share one run of each, and where the sweep runs these methods itself, there is none.

Frankle et al., "Pruning neural networks at initialization: why are we missing the mark?", ICLR 2021, section 4, and
Su et al., "Sanity-checking pruning methods: random tickets can win the jackpot", NeurIPS 2020. A mask permuted inside
its layers is a random mask with the same layer rates: one control stands for both. Dense training of the smaller network
is the control of Liu et al., "Rethinking the value of network pruning", ICLR 2019.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune._sweep_knob import pruner_of
from lightning_prune.callback import PruningCallback
from lightning_prune.channels import Channels
from lightning_prune.checks import check_bool, check_choice
from lightning_prune.context import Context, Proposal
from lightning_prune.masks import read_masks
from lightning_prune.oneshot import OneShotPruning
from lightning_prune.receipt import Receipt
from lightning_prune.selection import count_kept, shuffle_within_layer
from lightning_prune.shrink import FORMAT as SHRUNK
from lightning_prune.shrink import load_shrunk

CONTROLS = ("shuffled", "magnitude", "random", "dense")
_BASELINES = {
    "magnitude": "lightning_prune.methods.magnitude.Magnitude",
    "random": "lightning_prune.methods.random.RandomPruning",
}
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
        budget = float((requested or {}).get("budget", 1.0))  # a line about an event names what was asked
        super().__init__(sparsity=budget if budget < 1 else (total - kept) / total, at=at, **common)
        self.masks, self.of = str(masks), str(of)
        self.structured = check_bool("structured", structured)
        self.prunes_trained = check_bool("prunes_trained", prunes_trained)  # type: ignore[misc]
        self._requested = dict(requested) if requested is not None else {"sparsity": self.sparsity}

    @property
    @override
    def requested(self) -> dict[str, Any]:
        """What the controlled run was asked."""
        return dict(self._requested)

    @property
    @override
    def removes_channels(self) -> bool:
        """As the method whose masks these are."""
        return self.structured

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


@dataclass(frozen=True, kw_only=True)
class Control:
    """A run to compare a job with.

    Attributes:
        name: one of `CONTROLS`.
        cfg: its configuration.
        target: the sparsity, where all jobs with the same configuration of it share the run; None: it is this job's own.
    """

    name: str
    cfg: DictConfig
    target: float | None = None


def controls_for(cfg: DictConfig, folder: Path, swept: Collection[str] = ()) -> list[Control]:
    """Return the controls of a finished job.

    Args:
        cfg: the job; `sweep.controls` lists what is wanted.
        folder: the job's folder, with its receipt and its masks.
        swept: methods that the sweep runs at the same targets anyway.
    """
    wanted = [check_choice("sweep.controls", name, CONTROLS) for name in _wanted(cfg)]
    if not (folder / "masks.safetensors").is_file() or not (folder / "receipt.json").is_file():
        return []
    receipt = Receipt.load(folder / "receipt.json")
    if receipt.method in _UNCONTROLLED:
        return []
    pruner = pruner_of(cfg)
    if pruner is None:
        return []
    made = []
    if "shuffled" in wanted:
        made.append(_control("shuffled", _shuffled(cfg, folder, receipt, pruner)))
    if pruner.removes_channels:
        budget = _budget(receipt)
        if "magnitude" in wanted and receipt.method != "magnitude" and budget is not None:
            made.append(_control("magnitude", _baseline(cfg, receipt, "magnitude", budget)))
        if "dense" in wanted and holds_shrunk(folder / "model.safetensors"):
            made.append(_control("dense", _dense(cfg, folder)))
        return made
    asked = receipt.requested.get("sparsity")
    for name in _BASELINES:
        if name in wanted and name != receipt.method and (asked is None or name not in swept):
            target = {"sparsity": receipt.reached["sparsity"] if asked is None else asked}
            made.append(_control(name, _baseline(cfg, receipt, name, target), asked))
    return made


def _control(name: str, plain: Any, target: float | None = None) -> Control:
    plain["measure"]["seconds"] = 0.2  # it costs what the job itself costs
    return Control(name=name, cfg=OmegaConf.create(plain), target=target)


def _shuffled(cfg: DictConfig, folder: Path, receipt: Receipt, pruner: PruningCallback) -> Any:
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    given = plain["callbacks"]["pruning"]
    plain["callbacks"]["pruning"] = {
        "_target_": f"{__name__}.{ShuffledMasks.__name__}",
        "_convert_": "all",
        "masks": str(folder / "masks.safetensors"),
        "of": receipt.method,
        "at": last_moment(receipt.arguments),
        "structured": pruner.removes_channels,
        "prunes_trained": pruner.prunes_trained,
        "requested": receipt.requested,
        "seed": 1 + int(cfg.seed),
        **{key: given[key] for key in _SHARED if key in given},
    }
    return plain


def _baseline(cfg: DictConfig, receipt: Receipt, name: str, target: dict[str, Any]) -> Any:
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    given = plain["callbacks"]["pruning"]
    plain["callbacks"]["pruning"] = {
        "_target_": _BASELINES[name],
        "_convert_": "all",
        **target,
        "at": last_moment(receipt.arguments),
        **({"seed": int(cfg.seed)} if name == "random" else {}),
        **{key: given[key] for key in _SHARED if key in given},
    }
    return plain


def _budget(receipt: Receipt) -> dict[str, Any] | None:
    """The budget under which magnitude pruning removes as many channels as the run was asked to, or without that as it did."""
    asked, channels = receipt.requested, receipt.reached["channels"]
    if asked.get("budget") is not None:
        return {"budget": asked["budget"], "budget_type": asked["budget_type"]}
    removed = asked.get("channel_sparsity", asked.get("sparsity"))
    if removed is not None:
        return {"budget": round(1 - float(removed), 12), "budget_type": "channels"}
    return {"budget": channels["pruned"] / channels["dense"], "budget_type": "channels"} if channels else None


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


def _wanted(cfg: DictConfig) -> Sequence[str]:
    return list(OmegaConf.select(cfg, "sweep.controls") or [])


def _device(context: Context) -> torch.device:
    return next(iter(context.weights.values())).device
