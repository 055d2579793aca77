"""Read a folder of runs: a record per run, whatever became of it."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lightning_prune.receipt import Receipt

FINISHED, FAILED, UNFINISHED = "finished", "failed", "unfinished"
_ASKED = (
    "sparsity",
    "budget",
    "budget_type",
    "seed",
    "masks",
    "of",
    "prunes_trained",
)  # told apart in columns of their own
_QUIET = ("seed", "pruning", "ckpt_path", "resume")  # overrides that the receipt itself knows about
_TOLD = ("callbacks.pruning.", "sweep.")  # likewise, by how they begin; and what changes no result


@dataclass(kw_only=True)
class Run:
    """What became of one run; every figure is that of its receipt.

    Attributes:
        job: its folder, relative to the folder of all runs.
        status: "finished", "failed" (with its `error`) or "unfinished" (running still, or killed).
        error: type and message of what stopped it.
        method: name of the method; "none" for dense training.
        label: the method and every setting in which its runs differ, seed and target aside.
        control: "shuffled", "magnitude", "random" or "dense" (at equal FLOPs) for a control of other runs; else empty.
        control_of: the label of the runs that this one is a control of; empty for a run of its own and for a shared control.
        kind: "sparsity", "channel sparsity", the cost that a budget was asked of, "penalty" or "epsilon".
        asked: the sparsity, the budget (fraction that may remain), or the other number; None for "auto" and without any.
        seed: seed of the run.
        accuracy_dense, accuracy_pruned, accuracy_finetuned: test accuracy as fractions.
        sparsity, kept, total: over the selected weights.
        params_dense, params_pruned, flops_dense, flops_pruned, channels_dense, channels_pruned: of the whole model.
        bytes_dense, bytes_pruned, bytes_compressed: file sizes.
        ms_dense, ms_masked, ms_exported: median milliseconds of a forward pass.
        overrides: what set the job apart on the command line.
        arguments: those of the method.
        shared: whether this is a control of every job that names it in its `shares`, by its `job`.
    """

    job: str
    status: str = FINISHED
    error: str = ""
    method: str = ""
    label: str = ""
    control: str = ""
    control_of: str = ""
    kind: str = "sparsity"
    asked: float | None = None
    seed: int | None = None
    accuracy_dense: float | None = None
    accuracy_pruned: float | None = None
    accuracy_finetuned: float | None = None
    sparsity: float | None = None
    kept: int | None = None
    total: int | None = None
    params_dense: float | None = None
    params_pruned: float | None = None
    flops_dense: float | None = None
    flops_pruned: float | None = None
    channels_dense: float | None = None
    channels_pruned: float | None = None
    bytes_dense: int | None = None
    bytes_pruned: int | None = None
    bytes_compressed: int | None = None
    ms_dense: float | None = None
    ms_masked: float | None = None
    ms_exported: float | None = None
    overrides: str = ""
    arguments: dict[str, Any] = field(default_factory=dict, repr=False)
    shared: bool = field(default=False, repr=False)
    shares: list[str] = field(default_factory=list, repr=False)

    @property
    def is_control(self) -> bool:
        """Whether this run exists to be compared with."""
        return bool(self.control) or self.method == "random"


CONTROL_NAMES = {
    "shuffled": "shuffled", "magnitude": "magnitude", "random": "random", "dense": "dense at equal FLOPs",
}  # fmt: skip
CONTROL_FOLDERS = {f"control_{name}": name for name in CONTROL_NAMES}
COLUMNS = [item.name for item in fields(Run) if item.name not in ("arguments", "shared", "shares")]


def collect(folder: Path) -> list[Run]:
    """Return every run below a folder, in the order of their paths.

    Args:
        folder: of a sweep, or of single runs.
    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no run below it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"`folder` must be an existing folder, got {str(folder)!r}.")
    runs = [_read(path, folder) for path in _folders(folder)]
    if not runs:
        raise ValueError(
            f"`folder` must hold runs (folders with a receipt.json), got {str(folder)!r}. Run `lightning-prune -m ...`."
        )
    _name(runs)
    return runs


def _folders(folder: Path) -> list[Path]:
    marks = ("receipt.json", "job.json", ".hydra/overrides.yaml")
    found = {path.parent if mark[0] != "." else path.parent.parent for mark in marks for path in folder.rglob(mark)}
    kept = [path for path in found if "evaluations" not in path.relative_to(folder).parts]  # of a search, not runs
    return sorted(kept, key=lambda path: _natural(str(path)))


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _read(path: Path, folder: Path) -> Run:
    facts = _json(path / "job.json")
    status = str(facts.get("status", FINISHED))
    run = Run(job=path.relative_to(folder).as_posix(), status=UNFINISHED if status == "running" else status)
    run.overrides = " ".join(facts.get("overrides") or _overrides(path))
    run.error = str(facts.get("error") or "")
    run.shared = facts.get("shared") is True
    run.control = str(facts.get("control")) if run.shared else CONTROL_FOLDERS.get(path.name, "")
    run.shares = [str(job) for job in facts.get("controls") or []]
    _from_overrides(run)
    if run.status == FINISHED:
        try:
            _from_receipt(run, Receipt.load(path / "receipt.json"))
        except FileNotFoundError:
            run.status, run.error = UNFINISHED, "no receipt"
        except ValueError as error:
            run.status, run.error = FAILED, f"unreadable receipt: {error}"
    if run.status == UNFINISHED and not run.error:
        run.error = "still running, or killed"
    return run


def _from_receipt(run: Run, receipt: Receipt) -> None:
    run.method, run.seed, run.arguments = receipt.method, receipt.seed, dict(receipt.arguments)
    run.kind, run.asked = _target(receipt)
    for name in ("dense", "pruned", "finetuned"):
        setattr(run, f"accuracy_{name}", receipt.accuracy[name])
    for name in ("sparsity", "kept", "total"):
        setattr(run, name, receipt.reached[name])
    for name in ("params", "flops", "channels"):
        cost = receipt.reached[name] or {}
        setattr(run, f"{name}_dense", cost.get("dense"))
        setattr(run, f"{name}_pruned", cost.get("pruned"))
    for name in ("dense", "pruned", "compressed"):
        setattr(run, f"bytes_{name}", receipt.bytes[name])
    for name in ("dense", "masked", "exported"):
        setattr(run, f"ms_{name}", (receipt.milliseconds[name] or {}).get("median"))


def _target(receipt: Receipt) -> tuple[str, float | None]:
    requested = receipt.requested
    if requested.get("budget") is not None:
        return str(requested.get("budget_type")), float(requested["budget"])
    if requested.get("channel_sparsity") is not None:
        return "channel sparsity", float(requested["channel_sparsity"])
    for name in ("penalty", "epsilon"):
        if requested.get(name) is not None:
            value = requested[name]
            return name, float(value) if isinstance(value, (int, float)) else None  # None: "auto"
    asked = requested.get("sparsity")
    if asked is not None and receipt.arguments.get("structured") is True:
        return "channel sparsity", float(asked)
    return "sparsity", None if asked is None or receipt.method == "none" else float(asked)


def _from_overrides(run: Run) -> None:
    """What a run without a receipt was meant to be."""
    given = dict(item.lstrip("+").split("=", 1) for item in run.overrides.split() if "=" in item)
    run.method = given.get("pruning", "")
    target = next((name for name in ("sparsity", "budget") if _number(given.get(f"callbacks.pruning.{name}"))), None)
    if target is not None:
        run.asked = _number(given[f"callbacks.pruning.{target}"])
    seed = given.get("seed", "")
    run.seed = int(seed) if seed.isdecimal() else None


def _name(runs: Iterable[Run]) -> None:
    """Label every run by the settings in which runs of its kind differ, and controls by what they control."""
    runs = list(runs)
    varying = _varying(runs)
    for run in runs:
        run.label = _label(run, varying)
    by_job = {run.job: run for run in runs}
    for run in runs:
        if run.control and not run.shared:
            _belong(run, by_job.get(run.job.rpartition("/")[0]))


def _belong(run: Run, owner: Run | None) -> None:
    """A control is asked what its owner was asked, and costs a part of what its owner's dense network costs."""
    run.control_of = owner.label if owner is not None else str(run.arguments.get("of", "unknown"))
    run.label = f"{run.control_of}, {CONTROL_NAMES[run.control]}"
    if owner is None:
        return
    run.kind, run.asked = owner.kind, owner.asked
    if run.control == "dense":
        run.accuracy_finetuned = run.accuracy_dense
        for name in ("accuracy_dense", "params_dense", "flops_dense", "channels_dense", "bytes_dense", "ms_dense"):
            own = getattr(run, name)
            if name == "ms_dense":
                run.ms_masked = own
            setattr(run, name, getattr(owner, name))
        run.sparsity = run.kept = run.total = None


def _varying(runs: Iterable[Run]) -> dict[tuple[str, str], set[str]]:
    values: dict[tuple[str, str], set[str]] = defaultdict(set)
    for run in (run for run in runs if not run.control or run.shared):
        for name, value in run.arguments.items():
            values[run.method, name].add(json.dumps(value))
        for name, value in settings_of(run).items():
            values["", name].add(value)
    return values


def _label(run: Run, varying: Mapping[tuple[str, str], set[str]]) -> str:
    parts = [run.method or "unknown"]
    for name, value in run.arguments.items():
        if name not in _ASKED and len(varying[run.method, name]) > 1:
            parts.append(f"{name}={value}")
    for name, value in settings_of(run).items():
        if len(varying["", name]) > 1:
            parts.append(f"{name.rpartition('.')[2]}={value}")
    return " ".join(parts)


def settings_of(run: Run) -> dict[str, str]:
    """Overrides other than those of the method, which its receipt tells."""
    given = [item.lstrip("+").split("=", 1) for item in run.overrides.split() if "=" in item]
    return {name: value for name, value in given if name not in _QUIET and not name.startswith(_TOLD)}


def _overrides(path: Path) -> list[str]:
    try:
        lines = (path / ".hydra" / "overrides.yaml").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line.removeprefix("- ").strip("'\"") for line in lines if line.startswith("- ")]


def _json(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
