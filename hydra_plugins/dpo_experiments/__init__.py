"""Hydra accepts search path plugins from `hydra_plugins` only: this one finds `experiments/`, wherever one is."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from dpo import HOME


class Experiments(SearchPathPlugin):
    """The groups `figure` and `table`: `experiments/figure/*.yaml` and `experiments/table/*.yaml`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("experiments", f"file://{HOME / 'experiments'}")
