"""One job of a sweep: skipped if it is done, started from the dense network that all jobs of a seed share.

Every job leaves a `job.json` in its folder: what it was, how it ended, and the error if it failed. A job that was killed
is the one whose file still says "running".
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from hydra.errors import InstantiationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_prune import pipeline
from lightning_prune._sweep_controls import Control, controls_for
from lightning_prune._sweep_knob import swept_methods, with_one_cost
from lightning_prune.callback import PruningCallback
from lightning_prune.files import replacing
from lightning_prune.instantiate import instantiate_callbacks
from lightning_prune.receipt import Receipt

JOB_FILE = "job.json"
DENSE_FOLDER = "dense"
CONTROLS_FOLDER = "controls"
_OUTPUT = "${hydra:runtime.output_dir}"
_log = logging.getLogger(__name__)


def run_job(cfg: DictConfig, folder: Path, sweep_folder: Path, overrides: Sequence[str] = ()) -> float:
    """Run one job of a sweep and its controls; a failure is recorded, so that the other jobs go on.

    Args:
        cfg: the composed configuration of the job.
        folder: its own folder.
        sweep_folder: the folder of the sweep; shared dense networks go below it.
        overrides: what sets this job apart, for the tables.
    Returns:
        The final test accuracy; nan for a job that failed or logs none.
    """
    if OmegaConf.select(cfg, "search.max_drop") is not None:
        from lightning_prune._search_run import run_search

        attempt(cfg, folder, lambda: run_search(cfg, folder, sweep_folder), overrides=list(overrides))
        return result_of(folder)
    cfg = with_one_cost(cfg, overrides)
    attempt(cfg, folder, lambda: _run(_started(cfg, sweep_folder), folder), overrides=list(overrides))
    shared = []
    for control in controls_for(cfg, folder, _swept(sweep_folder)):
        if control.target is None:
            _run_control(control, folder / f"control_{control.name}", sweep_folder, overrides)
        else:
            shared.append(_shared_control(control, sweep_folder, overrides))
    if shared:
        facts = read_facts(folder)
        record(folder, facts.pop("status"), **{**facts, "controls": shared})
    return result_of(folder)


def _run_control(control: Control, place: Path, sweep_folder: Path, overrides: Sequence[str], **facts: Any) -> None:
    def work() -> None:
        # the smaller network is trained in its own place: `dense/` holds what jobs start from
        cfg = control.cfg if control.name == "dense" else _started(control.cfg, sweep_folder)
        pipeline.run(relocated(cfg, place), place)

    attempt(control.cfg, place, work, control=control.name, overrides=list(overrides), **facts)


def _shared_control(control: Control, sweep_folder: Path, overrides: Sequence[str]) -> str:
    """Run a control that several jobs share, once; return its folder, relative to that of the sweep."""
    named = f"{control.name}-{control.target:g}-seed{control.cfg.seed}-{fingerprint(control.cfg)[:6]}"
    place = sweep_folder / CONTROLS_FOLDER / named
    others = [item for item in overrides if not item.lstrip("+").startswith(("pruning=", "callbacks.pruning."))]
    told = [f"pruning={control.name}", f"callbacks.pruning.sparsity={control.target}", *others]
    with exclusive(place / ".lock"):
        _run_control(control, place, sweep_folder, told, shared=True)
    return place.relative_to(sweep_folder).as_posix()


def _swept(sweep_folder: Path) -> set[str]:
    """Which methods the sweep runs, as Hydra wrote down when it began."""
    try:
        return swept_methods(list(OmegaConf.load(sweep_folder / "multirun.yaml").hydra.overrides.task))
    except (OSError, AttributeError, OmegaConfBaseException):
        return set()


def attempt(cfg: DictConfig, folder: Path, work: Callable[[], Any], **facts: Any) -> bool:
    """Do `work` unless `folder` holds its result already; return whether the result is there.

    Args:
        cfg: what the result depends on; a folder with the result of another configuration is worked on anew.
        folder: where `work` writes its `receipt.json`.
        work: does it.
        **facts: plain values to keep in `job.json`.
    """
    facts = {"fingerprint": fingerprint(cfg), **facts}
    if finished(folder, facts["fingerprint"]):
        rank_zero_info(f"Done before: {folder}")
        return True
    started = time.time()
    record(folder, "running", pid=os.getpid(), started=started, **facts)
    _write(lambda: (folder / "receipt.json").unlink(missing_ok=True))
    try:
        work()
    except Exception as error:  # any user code may fail; the other jobs of the sweep go on
        record(folder, "failed", error=_described(error), seconds=time.time() - started, **facts)
        _log.exception("The job in %s failed.", folder)
        return False
    record(folder, "finished", seconds=time.time() - started, **facts)
    return True


def shared_dense(cfg: DictConfig, sweep_folder: Path) -> Path:
    """Return the checkpoint of the trained network that all jobs with this seed start from; train it if it is missing.

    Raises:
        RuntimeError: its training failed.
    """
    alone = _without_pruning(cfg)
    folder = sweep_folder / DENSE_FOLDER / f"seed{cfg.seed}-{fingerprint(alone)[:8]}"
    with exclusive(folder / ".lock"):
        if not attempt(alone, folder, lambda: pipeline.run(relocated(alone, folder), folder), control=DENSE_FOLDER):
            error = json.loads((folder / JOB_FILE).read_text(encoding="utf-8")).get("error")
            raise RuntimeError(f"the dense network of this job could not be trained ({error}). See {folder}.")
    return folder / "dense.ckpt"


def fingerprint(cfg: DictConfig) -> str:
    """Return a hash of everything a job's result depends on, free of where its files go."""
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    kept = {key: value for key, value in plain.items() if key not in ("sweep", "resume")}
    if (plain.get("search") or {}).get("max_drop") is None:
        kept.pop("search", None)
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def finished(folder: Path, wanted: str) -> bool:
    """Whether a folder holds the finished result of the configuration with this fingerprint."""
    facts = read_facts(folder)
    return (
        facts.get("status") == "finished" and facts.get("fingerprint") == wanted and (folder / "receipt.json").is_file()
    )


def result_of(folder: Path) -> float:
    """Return the final test accuracy in a folder; nan where there is none."""
    try:
        accuracy = Receipt.load(folder / "receipt.json").accuracy
    except (OSError, ValueError):
        return math.nan
    final = accuracy["finetuned"] if accuracy["finetuned"] is not None else accuracy["dense"]
    return math.nan if final is None else float(final)


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the `job.json` of a folder; empty if there is none that can be read."""
    try:
        facts = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def record(folder: Path, status: str, **facts: Any) -> None:
    """Write the `job.json` of a folder (on the first rank)."""

    def write() -> None:
        with replacing(folder / JOB_FILE) as temporary:
            text = json.dumps({"status": status, **facts}, indent=2, ensure_ascii=False, default=str)
            temporary.write_text(text + "\n", encoding="utf-8")

    _write(write)


def relocated(cfg: DictConfig, folder: Path) -> DictConfig:
    """Return a copy of a configuration whose files go to `folder` instead of the folder of Hydra's job."""
    return OmegaConf.create(_replaced(OmegaConf.to_container(cfg, resolve=False), str(folder)))


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a file that only one process of this machine can hold; it is freed when the process ends, however it ends.

    Further ranks of one job do not wait: the first one holds it for all. Where the system has no `flock`, nobody waits.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    if _rank() != 0:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _described(error: BaseException) -> str:
    """Type and message; of what a constructor raised, not of Hydra's wrapper around it."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _run(cfg: DictConfig, folder: Path) -> None:
    """The main job; one that only trains dense leaves its `dense.ckpt` like a run of its own."""
    pipeline.run(cfg, folder)
    if not pruners_by_name(cfg) and str(cfg.ckpt_path).endswith(".ckpt"):
        with replacing(folder / "dense.ckpt") as temporary:
            shutil.copyfile(cfg.ckpt_path, temporary)


def _started(cfg: DictConfig, sweep_folder: Path) -> DictConfig:
    """The job, with the shared dense network as its start where it starts from a trained one."""
    cfg = cast(DictConfig, OmegaConf.create(OmegaConf.to_container(cfg, resolve=False)))
    given = cfg.ckpt_path is not None or cfg.resume is not None
    if not given and pipeline.starts_trained(cfg, list(pruners_by_name(cfg).values())):
        cfg.ckpt_path = str(shared_dense(cfg, sweep_folder))
    return cfg


def pruners_by_name(cfg: DictConfig) -> dict[str, PruningCallback]:
    """Return the pruning callbacks of a configuration by name, built to be looked at."""
    nodes = OmegaConf.to_container(relocated(cfg, Path("unused")).callbacks, resolve=True)
    assert isinstance(nodes, dict)
    found = {name: pipeline.pruners_of(instantiate_callbacks({name: node})) for name, node in nodes.items()}
    return {str(name): pruners[0] for name, pruners in found.items() if pruners}


def _without_pruning(cfg: DictConfig) -> DictConfig:
    """The dense training that all jobs with this seed share: nothing in it depends on how a job prunes."""
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    pruners = {"pruning", *pruners_by_name(cfg)}
    plain["callbacks"] = {name: node for name, node in (plain.get("callbacks") or {}).items() if name not in pruners}
    plain["trainer"]["max_epochs"] = plain["dense"]["max_epochs"]
    plain["dense"]["enabled"] = True
    plain["measure"]["seconds"] = 0.2
    plain.pop("search", None)
    return OmegaConf.create({**plain, "ckpt_path": None, "resume": None})


def _replaced(value: Any, folder: str) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, folder) for item in value]
    return value.replace(_OUTPUT, folder) if isinstance(value, str) else value


def _write(work: Callable[[], Any]) -> None:
    if _rank() == 0:
        work()


def _rank() -> int:
    return int(getattr(rank_zero_only, "rank", 0) or 0)
