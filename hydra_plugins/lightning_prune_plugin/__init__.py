"""Put our configurations on Hydra's search path, so that `pruning: magnitude` is found in any Hydra application."""

import hashlib
import re

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf


class LightningPruneSearchPathPlugin(SearchPathPlugin):
    """Append `pkg://lightning_prune.conf`; files of the user's own application win over ours."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra once at every start."""
        search_path.append(provider="lightning-prune", path="pkg://lightning_prune.conf")


def job_name(overrides: str) -> str:
    """Name the folder of a sweep's job by what sets it apart, so that a job finds its own result again.

    Args:
        overrides: Hydra's `override_dirname`: all overrides of the job in a fixed order.
    Returns:
        Method, target and seed where given, and a hash of everything: "magnitude-0.9-seed1-3f2a1c".
    """
    given = dict(re.findall(r"(?:^|,)(pruning|callbacks\.pruning\.(?:sparsity|budget)|seed)=([\w.-]+)", overrides))
    seed = f"seed{given['seed']}" if "seed" in given else ""
    parts = [given.get("pruning", ""), *(value for key, value in given.items() if key.startswith("callbacks.")), seed]
    digest = hashlib.sha256(overrides.encode()).hexdigest()[:6]
    return "-".join([*(part for part in parts if part), digest])


# here, because every process that runs a job loads the plugins, whichever launcher started it
OmegaConf.register_new_resolver("lightning_prune.job_name", job_name, replace=True)
