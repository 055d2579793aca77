"""Collect a sweep into tables and a Pareto picture: `sweep.csv`, `sweep.md`, `pareto.png`, `pareto.svg`.

`SweepReport` does so when a Hydra multirun ends, `lightning-prune-sweep DIR` at any later time.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lightning_prune._sweep_read import Run

__all__ = ["SweepReport", "collect", "main", "report"]


def collect(folder: str | os.PathLike[str]) -> list[Run]:
    """Return every run below a folder with the figures of its receipt, failed and unfinished ones too.

    Args:
        folder: of a sweep, or of single runs.
    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no run below it.
    """
    from lightning_prune import _sweep_read

    return _sweep_read.collect(Path(folder))


def report(folder: str | os.PathLike[str]) -> tuple[list[Run], list[Path]]:
    """Write `sweep.csv` (a row per run), `sweep.md` (mean and spread over seeds) and the Pareto picture.

    Args:
        folder: of a sweep, or of single runs; the files go there.
    Returns:
        The runs, and the paths of the files written.
    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no run below it.
    """
    from lightning_prune import _sweep_pictures, _sweep_tables
    from lightning_prune.files import replacing

    folder = Path(folder)
    runs = collect(folder)
    images = _sweep_pictures.pictures(_sweep_tables.cells_of(runs))
    page = _sweep_tables.markdown(runs, list(images))
    contents = {"sweep.csv": _sweep_tables.csv_text(runs).encode(), "sweep.md": page.encode(), **images}
    for name in {"pareto.png", "pareto.svg"} - set(images):  # one of an earlier report would not fit the table
        (folder / name).unlink(missing_ok=True)
    for name, content in contents.items():
        with replacing(folder / name) as temporary:
            temporary.write_bytes(content)
    return runs, [folder / name for name in contents]


class SweepReport(Callback):
    """Hydra callback: when a multirun ends, report on its folder; a failed run makes the command fail, after all ran."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra once, after all jobs."""
        if _is_further_rank():
            return
        if not show(config.hydra.sweep.dir):
            raise SystemExit(1)


def show(folder: str | os.PathLike[str]) -> bool:
    """Write the report on a folder and print its tables; return whether every run has a result."""
    from rich.console import Console

    runs, written = report(folder)
    console = Console()
    console.print(Path(folder, "sweep.md").read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)
    console.print(f"Written to {folder}: {', '.join(path.name for path in written)}", markup=False, highlight=False)
    return all(run.status == "finished" for run in runs)


def _is_further_rank() -> bool:
    ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return any(rank.isdecimal() and int(rank) > 0 for rank in ranks)


def main(arguments: list[str] | None = None) -> int:
    """Rebuild the tables and pictures of a folder of runs; returns 1 if a run has no result, 2 if there is none at all."""
    parser = argparse.ArgumentParser(prog="lightning-prune-sweep", description=__doc__)
    parser.add_argument("folder", nargs="+", help="folders of runs, such as multirun/2026-01-31/12-00-00")
    whole = True
    for folder in parser.parse_args(arguments).folder:
        try:
            whole = show(folder) and whole
        except (FileNotFoundError, ValueError) as error:
            parser.exit(2, f"lightning-prune-sweep: {error}\n")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
