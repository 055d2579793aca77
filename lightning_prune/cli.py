"""The command `lightning-prune`: Hydra composes `conf/prune.yaml`, the pipeline runs it."""

from __future__ import annotations

import warnings

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="pkg://lightning_prune.conf", config_name="prune")
def main(cfg: DictConfig) -> float | None:
    """Prune one model as configured; returns the final test accuracy, which sweepers read."""
    from lightning_prune.pipeline import run  # torch is loaded only when there is work to do, not for --help

    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")  # our default, not the user's mistake
    return run(cfg, HydraConfig.get().runtime.output_dir)


if __name__ == "__main__":
    main()
