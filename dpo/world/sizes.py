"""Sizes of the world's base model. tiny comes with the code; the others are pre-trained once, and kept in the cache.

As policies they stand in for a family of models such as Pythia 410M, 1.4B and 2.8B.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo.cache import entry

SEED = 0
VERSION = 1  # of what decides the weights beside `Size` and the seed: lessons, loop, optimizer


@dataclass(frozen=True)
class Size:
    """A transformer with heads of 32, and how it is pre-trained."""

    hidden: int
    layers: int
    intermediate: int
    batch: int  # articles per optimizer step
    lr: float
    steps: int
    curriculum: tuple[tuple[int, int], ...]  # from this optimizer step on: so many facts in an article to look up


# small and base are pre-trained on a quarter of tiny's articles, and are no better than it yet: docs/pairs.md.
# Articles come with one fact to look up at first. Asked for all six from the start, tiny learns none in an hour.
SIZES = {
    "tiny": Size(128, 2, 256, 48, 2e-3, 3000, ((0, 1), (250, 2), (300, 4), (350, 6))),
    "small": Size(192, 3, 384, 32, 2e-3, 1200, ((0, 1), (250, 2), (300, 4), (350, 6))),
    "base": Size(256, 4, 448, 32, 1.5e-3, 1200, ((0, 1), (400, 2), (475, 4), (550, 6))),
}
MADE = {"world_small": "small", "world_base": "base"}  # what a config calls them, where the shipped one is `world`
MINUTES = {"world_small": 13, "world_base": 23}  # about, on one core


def key(size: str) -> dict[str, Any]:
    """All that decides the weights, for `dpo.cache.remember`."""
    return {"size": size, **asdict(SIZES[size]), "seed": SEED, "version": VERSION}


def place(base: str, cache: str) -> str:
    """Where a base model is, or will be: of one that is made, its folder in the cache; any other as it is named."""
    return str(entry(cache, "base", key(MADE[base])) / "model") if base in MADE else base


def present(base: str | None, cache: str) -> str | None:
    """The same of one that need not be made first."""
    where = place(base, cache) if base is not None else None
    return where if base not in MADE or Path(str(where)).is_dir() else None


def missing(policy: Any, cache: str) -> str | None:
    """The base model that has to be made before a run with this policy (its settings) can start."""
    base = None if policy is None or policy.get("path") else policy.get("base")
    return base if base in MADE and present(base, cache) is None else None
