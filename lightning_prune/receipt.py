"""The receipt of a pruning run: what was asked and what was got, in counts, bytes, FLOPs and milliseconds.

Every field holds plain JSON values, so that an independent script can recompute them from the saved files.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lightning_prune import _receipt_views as views
from lightning_prune._receipt_checks import COSTS, checked, finite, plain
from lightning_prune._receipt_views import expected_kept
from lightning_prune.files import replacing

__all__ = ["Receipt", "expected_kept", "honest_notes", "layer_counts", "reached_counts", "versions"]

NO_PICTURE = "No picture was drawn: matplotlib is not installed."

_DISTRIBUTIONS = {
    "torch": "torch",
    "lightning": "lightning",
    "pytorch_lightning": "pytorch-lightning",
    "lightning_prune": "lightning-prune",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "hydra": "hydra-core",
}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages a run depends on, without importing them.

    Returns:
        Versions by name ("python", "torch", "lightning", "lightning_prune", ...); a package that is not
        installed is left out.
    """
    found = {"python": platform.python_version()}
    for name, distribution in _DISTRIBUTIONS.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    # a source checkout on the path has no metadata of its own, but its version is already loaded
    found.setdefault("lightning_prune", str(getattr(sys.modules[__package__], "__version__", "unknown")))
    return found


def layer_counts(masks: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Count the kept weights of every masked tensor.

    Args:
        masks: bool tensors by parameter name, True = kept, each of its parameter's shape.

    Returns:
        One {name, shape, kept, total} per mask, in order; kept and total are integers.

    Raises:
        ValueError: if a mask is not a bool tensor.
    """
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise ValueError(f"`masks` must be bool tensors, got {mask.dtype} for {name!r}. Use `mask.bool()`.")
    return [
        {"name": name, "shape": list(mask.shape), "kept": int(mask.sum()), "total": mask.numel()}
        for name, mask in masks.items()
    ]


def reached_counts(
    masks: Mapping[str, Tensor],
    *,
    params: Mapping[str, int] | None = None,
    flops: Mapping[str, int] | None = None,
    volume: Mapping[str, int] | None = None,
    channels: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Build the receipt's `reached`: sparsity = (total - kept) / total over all masks, costs where known.

    Args:
        masks: bool tensors by parameter name, True = kept; without any the sparsity is 0.
        params: {"dense", "pruned"} parameters of the whole model; pruned counts the non-zero ones.
        flops: {"dense", "pruned"} FLOPs really executed: equal where zeros only sit in dense tensors.
        volume: {"dense", "pruned"} activation elements.
        channels: {"dense", "pruned"} channels.

    Returns:
        {sparsity, kept, total, params, flops, volume, channels}.

    Raises:
        ValueError: if a mask is not a bool tensor.
    """
    layers = layer_counts(masks)
    kept, total = (sum(layer[key] for layer in layers) for key in ("kept", "total"))
    sparsity = (total - kept) / total if total else 0.0
    costs = dict(zip(COSTS, (params, flops, volume, channels), strict=True))
    return {"sparsity": sparsity, "kept": kept, "total": total, **plain(costs, "reached")}


def _no_counts() -> dict[str, Any]:
    return reached_counts({})


@dataclass(kw_only=True)
class Receipt:
    """What was asked of a pruning run and what came of it.

    Args:
        method: class name of the method.
        arguments: its constructor arguments.
        seed: seed of the run; None when none was set.
        command: shell command of the run; None outside the command line.
        versions: see `versions`.
        requested: {"sparsity"} or {"budget", "budget_type"}; empty for methods without a target.
        reached: see `reached_counts`.
        layers: see `layer_counts`.
        accuracy: {"dense", "pruned", "finetuned"}, each a fraction in [0, 1] or None.
        bytes: {"dense", "pruned", "compressed"} file sizes, each an int or None.
        milliseconds: {"dense", "masked", "exported"}, each {median, low, high, batch_size, threads} or None.
        repair: what the repair after pruning did; None without one.
        certificate: the method's certificate; None without one.
        notes: sentences.

    Raises:
        ValueError: if a field holds something else than plain JSON values, an unknown key, or counts that
            contradict each other. Keys left out of a nested mapping become None.
    """

    method: str
    arguments: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    command: str | None = None
    versions: dict[str, str] = field(default_factory=versions)
    requested: dict[str, Any] = field(default_factory=dict)
    reached: dict[str, Any] = field(default_factory=_no_counts)
    layers: list[dict[str, Any]] = field(default_factory=list)
    accuracy: dict[str, Any] = field(default_factory=dict)
    bytes: dict[str, Any] = field(default_factory=dict)
    milliseconds: dict[str, Any] = field(default_factory=dict)
    repair: Any = None
    certificate: Any = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, value in self._checked().items():
            setattr(self, name, value)

    def _checked(self) -> dict[str, Any]:
        return checked({item.name: getattr(self, item.name) for item in fields(self)})

    def to_dict(self) -> dict[str, Any]:
        """Return a copy in plain JSON values; a nan or infinity becomes None, and a note says which did."""
        lost: list[str] = []
        result = {name: finite(value, name, lost) for name, value in self._checked().items()}
        result["notes"] += lost
        return result

    def to_json(self) -> str:
        """Return the receipt as indented, strictly valid JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Receipt:
        """Build a receipt from what `to_dict` returned.

        Raises:
            ValueError: if a key is unknown or missing, or a value breaks the rules of the class.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"`values` must be a mapping, got {type(values).__name__}. Give a receipt's dictionary.")
        known = [item.name for item in fields(cls)]
        unknown, missing = (
            sorted(map(str, set(values) - set(known))),
            [name for name in known if name not in values],
        )
        if unknown or missing:
            raise ValueError(
                f"`values` must hold exactly the fields of a receipt, got unknown {unknown} and missing "
                f"{missing}. The fields are {', '.join(known)}."
            )
        return cls(**values)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Receipt:
        """Read a `receipt.json`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not the JSON of a receipt; the message names the file.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"`path` must be a receipt in JSON, got {os.fspath(path)!r}: {error}") from error

    def save(self, folder: str | os.PathLike[str], picture: bool = True) -> list[Path]:
        """Write `receipt.json`, `receipt.md` and, where matplotlib is installed, `receipt.png`.

        Each file is written under a temporary name and then moved into place: a failure leaves the old one. A
        `receipt.png` of an earlier receipt is removed when no new one is drawn.

        Args:
            folder: made when it does not exist.
            picture: draw the picture; without matplotlib a note says that there is none.

        Returns:
            Paths of the files written.
        """
        self._checked()
        image = views.png(self) if picture else None
        if picture and image is None:
            self._add_note(NO_PICTURE)
        contents = {"receipt.json": self.to_json().encode(), "receipt.md": self.to_markdown().encode()}
        if image is not None:
            contents["receipt.png"] = image
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            with replacing(target / name) as temporary:
                temporary.write_bytes(content)
        if image is None:
            (target / "receipt.png").unlink(missing_ok=True)
        return [target / name for name in contents]

    def to_table(self) -> Table:
        """Return the main table: dense, pruned and fine-tuned side by side."""
        return views.main_table(self)

    def layer_table(self) -> Table:
        """Return the kept weights of every layer as a table."""
        return views.layer_table(self)

    def to_markdown(self) -> str:
        """Return both tables, the notes and the command as Markdown."""
        return views.markdown(self)

    def show(self, console: Console | None = None, layers: bool = False) -> None:
        """Print the main table and the notes.

        Args:
            console: where to print; None means standard output.
            layers: print the table of layers too.
        """
        console = console or Console()
        console.print(self.to_table())
        if layers:
            console.print(self.layer_table())
        for note in self.notes:
            console.print(Text(f"- {note}"))

    def _add_note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)


def honest_notes(receipt: Receipt, reason: str = "") -> list[str]:
    """Return the plain truths that belong into `receipt.notes`; the receipt itself stays as it is.

    Whether the target was met, by count: kept = total - floor(sparsity * total + 1e-9). That zeros in dense
    tensors save no time, where nothing was physically removed. The measured medians. A compressed size that
    is missing.

    Args:
        receipt: the filled receipt.
        reason: why a sparsity target was missed, the end of a sentence ("earlier masks had removed more").

    Returns:
        Sentences, none twice.
    """
    return views.honest_sentences(receipt, reason)
