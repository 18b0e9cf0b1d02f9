"""Composed configs for tests, by Hydra; those that choose the same options share what takes longest."""

from functools import cache
from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig

from dpo.sweep.command_line import in_hydras_words
from dpo.sweep.launch import Combinations
from dpo.sweep.plan import Composed

ROOT = Path(__file__).parents[1]


def composed(verb: str, *overrides: str) -> Composed:
    """What a sweep of `verb` makes of a combination of overrides."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return _combinations(verb).compose(in_hydras_words(overrides))


def compose(verb: str, *overrides: str) -> DictConfig:
    return composed(verb, *overrides).config


@cache
def _combinations(verb: str) -> Combinations:
    loader = GlobalHydra.instance().config_loader()
    return Combinations(loader, loader.load_configuration(verb, [], RunMode.MULTIRUN))
