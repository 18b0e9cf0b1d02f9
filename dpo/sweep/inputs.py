"""What a run is made from beside its settings: its data and the models it names, told by their content.

The planner records it in the run's config (`provenance.inputs`), and the run compares it with what it finds.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dpo import cache as caches
from dpo import data
from dpo.cache import digest, entry, intact, remember, sha256
from dpo.data.records import Dataset, Preference, contents, texts
from dpo.data.sources import heard, jsonl_files
from dpo.data.texts import key as key_of
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
    """The data of a run, with what is known of their texts.

    Raises: RuntimeError if it, or a model that the config names, is no longer what the run was planned with.
    """
    node: Any = OmegaConf.to_container(config.data, resolve=True) if OmegaConf.is_config(config.data) else config.data
    dataset, facts = read(node, config.get("cache"))
    recorded = (config.get("provenance") or {}).get("inputs") or {}
    found = {"data": facts["data"], **models(config)} if recorded else {}
    if changed := [key for key, value in recorded.items() if found.get(key, value) != value]:
        raise RuntimeError(
            f"a run must have the inputs that it was planned with, found another {' and another '.join(changed)}; put "
            "back what was there, or plan it again by the command that made it"
        )
    return replace(dataset, texts=facts.get("texts", {}))


def read(node: dict[str, Any], cache: str | None) -> tuple[Dataset, dict[str, Any]]:
    """The data that a node of a config names, and what is known of them, which is kept: see `known`."""
    before = _source(node)
    with heard() as said:
        dataset: Dataset = instantiate(node)
    after = _source(node)
    if cache is None or after is None or after != before:  # a file that changes meanwhile is told by neither
        return dataset, facts_of(dataset)

    def build(folder: Path) -> None:
        of_texts = {split: texts(pairs) for split, pairs in dataset.preferences.items()}
        (folder / "known.json").write_text(json.dumps({**facts_of(dataset), "texts": of_texts, "said": said}))

    folder, _ = remember(cache, "data", after, build, alone=True)
    return dataset, dict(json.loads((folder / "known.json").read_text()))


def facts_of(dataset: Dataset) -> dict[str, Any]:
    """What `known` says of data, but for their texts and messages."""
    return {
        "data": contents(dataset),
        "pairs": bool(dataset.preferences),
        "single": any(pair.label is not None for pair in dataset.preferences.get("train", ())),
        "alike": {split: [_most(some), len(some)] for split, some in dataset.preferences.items()},
        "demonstrations": bool(dataset.demonstrations),
        "plain": any(isinstance(prompt, str) for some in dataset.prompts.values() for prompt in some),
        "revisions": dataset.revisions,
    }


def _most(pairs: Sequence[Preference]) -> int:
    """How many have the prompt that most have."""
    return max(Counter(key_of(pair.prompt) for pair in pairs).values(), default=0)


def known(node: dict[str, Any], cache: str) -> dict[str, Any] | None:
    """What is known of data that a run has read before, with the same content and by the same code; else None.

    `data`: their digest; `texts` of the pairs of each split; whether they bring `pairs`, `single` responses with a
    label and `demonstrations`; how many pairs of each split have one prompt at most, and how many there are (`alike`);
    whether some prompts are `plain`, no chats; `revisions` on the hub; and what was `said` of them (levels, messages).

    Raises: RuntimeError if that is damaged.
    """
    key = _source(node)
    if key is None or not (folder := entry(cache, "data", key)).is_dir():
        return None
    return dict(json.loads((intact(folder) / "known.json").read_text()))


def _source(node: dict[str, Any]) -> dict[str, Any] | None:
    """All that decides what a node reads; None where more does than files here, read by our own code."""
    files = {key: Path(path).expanduser() for key, path in node.items() if key.endswith("path") and path is not None}
    ours = str(node["_target_"]).startswith("dpo.data.") and "sources" not in node
    if not ours or not files or not all(file.is_file() for file in files.values()):
        return None
    code = [Path(caches.__file__), Path(__file__), *sorted(Path(data.__file__).parent.glob("*.py"))]
    return {
        "node": node,
        "files": {key: sha256(file) for key, file in files.items()},
        "code": digest([sha256(file) for file in code]),
        "libraries": {name: version(name) for name in ("datasets", "pyarrow") if find_spec(name)},
    }


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
