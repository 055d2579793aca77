"""The command `lightning-prune`: Hydra composes `conf/prune.yaml`, the pipeline runs it."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base="1.3", config_path="pkg://lightning_prune.conf", config_name="prune")
def main(cfg: DictConfig) -> float | None:
    """Prune one model as configured; returns the final test accuracy, which sweepers read."""
    # idle threads that spin slow small networks down many times as soon as anything else runs on the machine; OpenMP reads
    # this once, when torch is loaded, and that happens only when there is work to do, not for --help
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from lightning_prune import _search_run, _sweep_jobs, pipeline

    quiet_host()
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    if hydra_cfg.mode == RunMode.MULTIRUN:
        sweep_folder = Path(hydra_cfg.sweep.dir).absolute()
        return _sweep_jobs.run_job(cfg, folder, sweep_folder, list(hydra_cfg.overrides.task))
    if OmegaConf.select(cfg, "search.max_drop") is not None:
        return _search_run.run_search(cfg, folder)
    return pipeline.run(cfg, folder)


def quiet_host() -> None:
    """Show our own lines and all warnings once; leave out Lightning's greetings."""
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")  # our default, not the user's mistake
    warnings.filterwarnings("ignore", message=r".*exists and is not empty.*")  # dense and pruned fit share the folder
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*deprecated.*")  # Lightning's call, torch's warning
    warnings.filterwarnings(
        "ignore", message=r"The dirpath has changed from.*"
    )  # a resume writes into a folder of its own
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()  # Hydra's root handler prints the same records
        logging.getLogger(name).propagate = True
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_ours_or_serious)


def _is_ours_or_serious(record: logging.LogRecord) -> bool:
    return (
        record.levelno >= logging.WARNING
        or not record.name.startswith("lightning.")
        or "lightning_prune" in record.pathname
    )


if __name__ == "__main__":
    main()
