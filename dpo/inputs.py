"""What a run is made from beside its settings: its data and the models it names, told by their content.

The planner records it in the run's config (`provenance.inputs`), and the run compares it with what it finds.
"""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from dpo.data.records import Dataset, contents
from dpo.policy.model import whereabouts
from dpo.signature import call

SUFFIXES = (".safetensors", ".json", ".jsonl", ".gz", ".jinja", ".model", ".txt", ".py")  # of what is read, no README
PLACES, BLOCK = 64, 2**16  # of a large file so many blocks of so many bytes are read


def load(config: Any) -> Dataset:
    """The data of a run.

    Raises: RuntimeError if it, or a model that the config names, is no longer what the run was planned with.
    """
    dataset: Dataset = call(config.data)
    recorded = (config.get("provenance") or {}).get("inputs") or {}
    found = {"data": contents(dataset), **models(config)} if recorded else {}
    if changed := [key for key, value in recorded.items() if found.get(key, value) != value]:
        raise RuntimeError(
            f"a run must have the inputs that it was planned with, found another {' and another '.join(changed)}; put "
            "back what was there, or plan it again by the command that made it"
        )
    return dataset


def models(config: Any) -> dict[str, str]:
    """Digests of the folders and files that a config names as its policy and reference; none of what is on the hub."""
    policy, reference = config["policy"], config.get("reference") or {}
    paths = {"policy": policy["path"] or policy["base"], "reference": reference.get("path")}
    given = {key: Path(path) for key, path in paths.items() if path is not None}
    local = {key: path if path.is_file() else Path(whereabouts(str(path))) for key, path in given.items()}
    return {key: sketch(path) for key, path in local.items() if path.exists()}


@lru_cache
def sketch(path: Path) -> str:
    """Digest of a file, or of the files in a folder: names, sizes, and content; of large files at 64 places.

    Weights that were trained again differ everywhere. (A run tells its weights by all their bytes when it has them.)
    """
    files = [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES] if path.is_dir() else [path]
    lines = []
    for file in files:
        size, content = file.stat().st_size, hashlib.sha256()
        places = min(PLACES, -(-size // BLOCK))
        with open(file, "rb") as stream:
            for place in range(places):
                stream.seek((size - BLOCK) * place // (places - 1) if place else 0)
                content.update(stream.read(BLOCK))
        lines.append(f"{file.name if path.is_dir() else ''} {size} {content.hexdigest()}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]
