"""Put our configurations on Hydra's search path, so that `pruning: magnitude` is found in any Hydra application."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class LightningPruneSearchPathPlugin(SearchPathPlugin):
    """Append `pkg://lightning_prune.conf`; files of the user's own application win over ours."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra once at every start."""
        search_path.append(provider="lightning-prune", path="pkg://lightning_prune.conf")
