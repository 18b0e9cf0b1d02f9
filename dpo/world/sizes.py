"""Sizes of the world's base model. tiny comes with the code; the others are pre-trained once, and kept in the cache.

As policies they stand in for a family of models such as Pythia 410M, 1.4B and 2.8B.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo.cache import entry

WORLD_BASE = Path(__file__).parent / "base"  # tiny, as it is shipped
SEED = 0
VERSION = 2  # of what decides the weights beside `Size`, tiny and the seed: growth, lessons, loop, optimizer


@dataclass(frozen=True)
class Size:
    """How deep a transformer is, and how it is pre-trained."""

    layers: int
    batch: int  # articles per optimizer step
    lr: float
    steps: int


# tiny begins with new weights, the others with tiny's in more layers, and on articles that it never saw.
SIZES = {
    "tiny": Size(2, 48, 2e-3, 3000),
    "small": Size(7, 32, 1e-3, 1200),
    "base": Size(14, 32, 1e-3, 1000),
}
MADE = {"world_small": "small", "world_base": "base"}  # what a config calls them, where the shipped one is `world`
MINUTES = {"world_small": 13, "world_base": 23}  # about, on one core


def key(size: str) -> dict[str, Any]:
    """All that decides the weights of one that is grown from tiny, for `dpo.cache.remember`."""
    tiny = hashlib.sha256((WORLD_BASE / "model.safetensors").read_bytes()).hexdigest()
    return {"size": size, **asdict(SIZES[size]), "grown_from": tiny, "seed": SEED, "version": VERSION}


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
