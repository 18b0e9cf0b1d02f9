"""From composed configs to run directories: resolve, check, name, compare with what is on disk, freeze."""

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from platform import python_version
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo import HOME, runs
from dpo.alpaca_eval import read_instructions
from dpo.config import HOMES, check, decisive, identity, incidental
from dpo.losses import PairLogps
from dpo.policy.model import whereabouts
from dpo.signature import call


@dataclass(frozen=True)
class Composed:
    """What Hydra made of one combination of overrides."""

    config: DictConfig
    overrides: Sequence[str]
    choices: dict[str, str]  # group -> option


@dataclass(frozen=True)
class Refused:
    """A combination of overrides that cannot be a run, and why."""

    overrides: Sequence[str]
    reason: str


@dataclass(frozen=True)
class Run:
    """A planned run: where it lives, and the config that it is frozen with."""

    directory: Path
    config: dict[str, Any]
    asked: str  # the name by its overrides; the same settings may be on disk under another

    def freeze(self) -> None:
        """Write the directory's config.yaml; it appears whole or not at all."""
        self.directory.mkdir(parents=True, exist_ok=True)
        unfinished = self.directory / f"config.{os.getpid()}.unfinished"
        unfinished.write_text(
            f"# The settings of this run, all of them. python -m dpo.run {self.directory}\n"
            + OmegaConf.to_yaml(OmegaConf.create(self.config))
        )
        unfinished.replace(self.directory / "config.yaml")


def plan(composed: Sequence[Composed]) -> tuple[list[Run], list[Refused]]:
    """Run directories, and what speaks against them. Writes nothing.

    Overrides that come to the same identity are one run, under the name that it has on disk if it is there.
    """
    planned: dict[Path, Run] = {}
    refused, provenance = [], _provenance()
    on_disk: dict[Path, dict[str, Any]] = {}  # run directory -> its config
    places: dict[Path, dict[str, Path]] = {}  # folder -> identity -> run directory
    for one in composed:
        try:
            config = resolve(one.config)
            check(config)
            _rehearse(config)
        except (OmegaConfBaseException, ValueError) as error:
            refused.append(Refused(one.overrides, message(error)))
            continue
        folder, id = Path(config["runs"], config["name"]), identity(config)
        if folder not in places:
            former = {folder / name: old for name, old in runs.configs(folder).items()} if folder.is_dir() else {}
            on_disk |= former
            places[folder] = {identity(old): directory for directory, old in former.items()}
        frozen = {"id": id, **config, "choices": one.choices, "provenance": provenance}
        asked = name(one.overrides, config, one.choices)
        directory = places[folder].setdefault(id, folder / asked)
        if directory in on_disk and identity(on_disk[directory]) != id:
            refused.append(Refused(one.overrides, _differs(directory, on_disk[directory], frozen)))
            continue
        on_disk[directory] = frozen
        planned.setdefault(directory, Run(directory, frozen, asked))
    return list(planned.values()), refused


def resolve(config: DictConfig) -> dict[str, Any]:
    """A composed config as plain values.

    Raises: ValueError if a key without a default is not given.
    """
    ours = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    if missing := sorted(OmegaConf.missing_keys(ours)):
        raise ValueError("\n".join(f"{key} must be given, it has no default; add {key}=..." for key in missing))
    values: Any = OmegaConf.to_container(ours, resolve=True)
    for home, key in HOMES.items():
        group, knob = home.split(".")
        if key in values and isinstance(values.get(group), dict) and knob in values[group]:
            values[group][knob] = values[key]
    return values


def _rehearse(config: dict[str, Any]) -> None:
    """Let files, models, the loss and the reference be refused now, not in the run.

    Raises: ValueError of the function that is asked.
    """
    for key, value in config["data"].items():
        if key.endswith("path") and value is not None and not Path(value).exists():
            raise ValueError(f"data.{key} must be a file of records, found none at {value}; check the path")
    for value in (config["policy"]["path"], config["policy"]["base"]):
        if value is not None:
            whereabouts(value)
    read_instructions(config["evaluation"]["instructions"])
    if "loss" in config:
        call(config["reference"])
        call(config["loss"])(PairLogps.zeros(1), beta=config["beta"])


def name(overrides: Sequence[str], config: dict[str, Any], choices: dict[str, str]) -> str:
    """Directory name from the overrides, values as in the config: beta=0.10 and beta=1e-1 are beta=0.1."""
    parts = {}
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if not incidental(key, config):
            value = choices[key] if key in choices else OmegaConf.select(OmegaConf.create(config), key)
            parts[key] = f"{key}={_written(value)}"
    text = ",".join(parts[key] for key in sorted(parts)) or "default"
    text = re.sub(r"[^\w.,+=@\[\]-]", "_", text.replace("/", "__"))
    return text if len(text.encode()) <= 200 else f"{text[:60]}-{identity(config)}"  # file systems allow 255


def message(error: Exception) -> str:
    """What Hydra, OmegaConf or we say, without the search path and the parser's own words."""
    text = str(error).split("\nConfig search path")[0].split("\n    full_key:")[0]
    if isinstance(cause := error.__cause__, OmegaConfBaseException) and str(cause).strip():
        text = f"{text}: {message(cause)}"
    return "\n".join(line for line in text.splitlines() if line.strip())


def _written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if OmegaConf.is_list(value):
        return f"[{','.join(map(_written, value))}]"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def _differs(directory: Path, old: dict[str, Any], new: dict[str, Any]) -> str:
    before, now = decisive(old), decisive(new)
    changes = [
        f"  {key}: {_shown(before, key)} there, {_shown(now, key)} asked for"
        for key in {**before, **now}
        if _shown(before, key) != _shown(now, key)
    ]
    return "\n".join(
        (
            f"{directory} holds a run of other settings; nothing was changed there. It differs in",
            *changes,
            f"use another name=..., or move {directory} away",
        )
    )


def _shown(values: dict[str, Any], key: str) -> str:
    return _written(values[key]) if key in values else "absent"


def _provenance() -> dict[str, Any]:
    """What the run was made with; a record, no part of its identity."""
    packages = ("torch", "transformers", "tokenizers", "numpy", "hydra-core", "omegaconf")
    versions = {"python": python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        **versions,
    }


def _git(*arguments: str) -> str | None:
    root = HOME
    if not (root / ".git").exists():  # installed somewhere inside another repository
        return None
    try:
        answer = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None
