"""What a run is made from beside its settings: its data and the models it names, told by their content.

The planner records it in the run's config (`provenance.inputs`), and the run compares it with what it finds.
"""

import hashlib
from pathlib import Path
from typing import Any

from dpo.data.records import Dataset, contents
from dpo.data.sources import jsonl_files
from dpo.policy.model import resolve_path
from dpo.sweep.directory import before
from dpo.sweep.schema import number_of_samples
from dpo.sweep.signature import instantiate
from dpo.world import sizes

CONFIG = "config.json"  # of a model
OF_DATA = ("test", "pairs")  # what `dpo.show` takes from the data; else a file of prompts
SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py")  # of what is read, no README
PLACES, BLOCK = 64, 2**16  # of a large file so many blocks of so many bytes are read


def load(config: Any) -> Dataset:
    """The data of a run.

    Raises: RuntimeError if it, or a model that the config names, is no longer what the run was planned with.
    """
    dataset: Dataset = instantiate(config.data)
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
    base = sizes.present(policy["base"], config.get("cache"))
    paths = {"policy": policy["path"] or base, "reference": reference.get("path")}
    paths |= {"against": before(config.get("against"), str(paths["policy"])), "candidates": config.get("candidates")}
    paths |= {"of": config.get("of") if config.get("of") not in OF_DATA else None}
    baseline = (config.get("evaluation") or {}).get("baseline")
    if baseline not in (None, "initial", "human") and number_of_samples(baseline) is None:
        paths["baseline"] = baseline
    local = {key: _place(path) for key, path in paths.items() if path is not None}
    judges = {"judge": config.get("judge"), "evaluation.judge": (config.get("evaluation") or {}).get("judge")}
    local |= {key: folder for key, node in judges.items() if (folder := folder_of(node)) is not None}
    local |= {"adapter": Path(policy["adapter"]).expanduser()} if policy.get("adapter") else {}
    return {key: sketch(path) for key, path in local.items() if path.exists()}


def folder_of(options: dict[str, Any] | None) -> Path | None:
    """Where the model of a judge lies that names one by `path`; None if it names none, or one on the hub."""
    path = (options or {}).get("path")
    return place if path and (place := Path(path).expanduser()).is_dir() else None


def _place(path: str) -> Path:
    """The folder of a model, or a file or folder of log-probs, which no model's config is in."""
    there = Path(path).expanduser()
    scores = there.is_file() or (there.is_dir() and next(jsonl_files(there), None) and not (there / CONFIG).exists())
    return there if scores else Path(resolve_path(path))


def sketch(path: Path) -> str:
    """Digest of a file, or of the files in a folder: names, sizes, and content; of large files at 64 places.

    Weights that were trained again differ everywhere. (A run tells its weights by all their bytes when it has them.)
    """
    files = [path]
    if path.is_dir():
        of_model = [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES]
        files = of_model if (path / CONFIG).exists() else [*jsonl_files(path)] or of_model
    lines = []
    for file in files:
        size, content = file.stat().st_size, hashlib.sha256()
        places = min(PLACES, -(-size // BLOCK))
        with open(file, "rb") as stream:
            for place in range(places):
                stream.seek((size - BLOCK) * place // (places - 1) if place else 0)
                content.update(stream.read(BLOCK))
        lines.append(f"{file.relative_to(path)} {size} {content.hexdigest()}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]
