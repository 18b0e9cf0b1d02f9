"""From composed configs to run directories: resolve, check, name, compare with what is on disk, freeze."""

import os
import re
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from platform import python_version
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo import HOME
from dpo.sweep.command_line import message
from dpo.sweep.directory import config as config_of
from dpo.sweep.directory import configs, finished, status, to_yaml
from dpo.sweep.forks import ask, serve
from dpo.sweep.identity import ALIASES, RECORDED, flatten, identity, identity_keys, in_name, labelled
from dpo.sweep.idle import IDLE, WITH_PAIRS, idle
from dpo.sweep.schema import NAME_BYTES, faults

INPUTS = {  # what a run is made from beside its settings: see dpo.sweep.inputs
    "data": "the data",
    "policy": "the model at policy.path or policy.base",
    "adapter": "the adapter at policy.adapter",
    "reference": "what is at reference.path",
    "against": "the model at against",
    "baseline": "the model at evaluation.baseline",
    "candidates": "what is at candidates",
    "of": "the file of prompts at of",
    "judge": "the model at judge.path",
    "evaluation.judge": "the model at evaluation.judge.path",
}


@dataclass(frozen=True)
class Composed:
    """What Hydra made of one combination of overrides."""

    config: DictConfig
    overrides: Sequence[str]
    choices: dict[str, str]  # group -> option
    swept: frozenset[str] = frozenset()  # keys that were given as a list, here or in an experiment's file
    name: str | None = None  # of its directory, in place of one by its overrides


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
        """Write the directory's config.yaml; it appears whole or not at all.

        Raises: FileExistsError if another sweep has planned other settings there in the meantime.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self.directory / "config.yaml"
        unfinished = self.directory / f"config.{os.getpid()}.unfinished"
        unfinished.write_text(
            f"# The settings of this run, all of them. python -m dpo.sweep.execute {self.directory}\n"
            + to_yaml(self.config)
        )
        try:
            os.link(unfinished, file)  # fails where there is one
        except FileExistsError:
            there = config_of(self.directory)
            if self.config["id"] not in (there.get("id"), identity(there)):  # a former version had others
                raise FileExistsError(
                    f"{self.directory} was planned with other settings by another command meanwhile; the same command "
                    "again takes another name for it"
                ) from None
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)


def plan(composed: Sequence[Composed]) -> tuple[list[Run], list[Refused]]:
    """Run directories, and what speaks against them. Writes nothing.

    Overrides that come to the same identity are one run, under the name that it has on disk if it is there.
    """
    settled, refused = [], []
    for one in composed:
        try:
            if reserved := [key for key in _keys(one.overrides) if key.split(".")[0] in (*RECORDED, "command")]:
                raise ValueError(f"{reserved[0]} is what a run records of itself, and cannot be given; leave it out")
            config = resolve(one.config)
            if problems := [*_torn(one, config), *faults(config)]:
                raise ValueError("\n".join(problems))
        except (OmegaConfBaseException, ValueError) as error:
            refused.append(Refused(one.overrides, message(error)))
        else:
            settled.append((one, config))
    planned: dict[Path, Run] = {}
    folders: dict[Path, Folder] = {}
    remade: dict[tuple[Path, str], list[Run]] = {}  # folder and what changed -> runs that were made from something else
    provenance = _provenance()
    rehearsed = rehearse([config for _, config in settled])
    refused += deciding_nothing([one for one, _ in settled], [tried.get("pairs", False) for tried in rehearsed])
    for (one, config), tried in zip(settled, rehearsed, strict=True):
        if tried["problems"]:
            refused.append(Refused(one.overrides, "\n".join(tried["problems"])))
            continue
        path, id = Path(config["runs"], config["name"]), identity(config)
        if path not in folders:
            folders[path] = Folder(path)
        folder = folders[path]
        read = {"revisions": tried["revisions"]} if "revisions" in tried else {}
        record = {**provenance, "inputs": tried["inputs"], **read, "overrides": list(one.overrides)}
        frozen = {"id": id, **config, "choices": one.choices, "provenance": record}
        try:
            name, asked = folder.place(frozen, one.swept, one.name)
        except ValueError as error:
            refused.append(Refused(one.overrides, str(error)))
            continue
        run = planned.setdefault(path / name, Run(path / name, frozen, asked))
        if (changed := _changed(folder.on_disk.get(name, {}), frozen)) and _begun(run.directory):
            remade.setdefault((path, changed), []).append(run)
    for (path, changed), made in remade.items():
        names = [*dict.fromkeys(run.directory.name for run in made)]
        more = f", and {len(names) - 3} more" if len(names) > 3 else ""
        reason = f"{path} holds runs of these settings, but {changed} is not what they were made from: "
        advice = f"use another name=..., or move these runs away: {', '.join(names[:3])}{more}"
        refused += [Refused(run.config["provenance"]["overrides"], f"{reason}{advice}") for run in made]
    return list(planned.values()), refused


def deciding_nothing(composed: Sequence[Composed], with_pairs: Sequence[bool] | None = None) -> list[Refused]:
    """Combinations with keys that decide nothing: see `dpo.sweep.idle`.

    with_pairs: whether the data of each bring pairs, and of this alone; None: of what their configs say.
    """

    def value(number: int, switch: str) -> Any:
        if with_pairs is not None:
            return with_pairs[number]
        return OmegaConf.select(composed[number].config, switch, throw_on_resolution_failure=False)

    rules = [rule for rule in IDLE if (rule.switch == WITH_PAIRS) is (with_pairs is not None)]
    rules = [rule for rule in rules if not composed or rule.not_of != composed[0].config.command]
    swept = {key for one in composed for key in one.swept}
    found = idle(rules, [_keys(one.overrides) for one in composed], value, swept)
    return [Refused(composed[number].overrides, "\n".join(reasons)) for number, reasons in found.items()]


def rehearse(configs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `dpo.sweep.rehearse` finds in each config, in another process: this one is to import no torch."""
    if not configs:
        return []
    if "torch" in sys.modules:
        from dpo.sweep.rehearse import trials

        return trials(configs)
    serve(["dpo.sweep.rehearse", *sorted({f"dpo.{config['command']}" for config in configs})])
    found: list[dict[str, Any]] = ask("dpo.sweep.rehearse", "trials", configs)
    return found


def resolve(config: DictConfig) -> dict[str, Any]:
    """A composed config as plain values, with the text of a chat template in place of its file.

    Raises: ValueError if a key without a default is not given.
    """
    ours = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    written: Any = OmegaConf.to_container(ours)
    if missing := sorted(key for key, value in flatten(written).items() if value == MISSING):
        raise ValueError("\n".join(f"{key} must be given, it has no default; add {key}=..." for key in missing))
    values: Any = OmegaConf.to_container(ours, resolve=True)
    for home, key in ALIASES.items():
        group, knob = home.split(".")
        if key in values and isinstance(values.get(group), dict) and knob in values[group]:
            values[group][knob] = values[key]
    policy = values["policy"] if isinstance(values.get("policy"), dict) else {}
    if (file := Path(os.path.expanduser(str(policy.get("chat_template"))))).suffix == ".jinja" and file.is_file():
        policy["chat_template"] = file.read_text()
    return values


def _torn(one: Composed, config: dict[str, Any]) -> list[str]:
    """Overrides of a key's home that the key itself, given too, would override in silence."""
    homes = {home: OmegaConf.select(one.config, home) for home in ALIASES if home in _keys(one.overrides)}
    return [
        f"{home} and {key} are one setting, got {given} and {config[key]}; give {key} alone"
        for home, given in homes.items()
        if (key := ALIASES[home]) in config and given != config[key]
    ]


class Folder:
    """The runs of one folder, by name: those on disk, and those that are planned into it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.on_disk = configs(path) if path.is_dir() else {}
        self.runs = dict(self.on_disk)
        self.names = {identity(config): name for name, config in self.on_disk.items()}
        self.values: dict[str, set[str]] = {}  # what a key is in the runs on disk
        self.by_words = {_words(config) if _recorded(config) else name: name for name, config in self.on_disk.items()}

    def place(self, frozen: dict[str, Any], swept: Collection[str], wanted: str | None = None) -> tuple[str, str]:
        """The name of a run, which is the one on disk if it is there, and the name that its overrides ask for.

        wanted: another name than theirs.

        Raises: ValueError if the same overrides have made a run of other settings.
        """
        given = _given(frozen["provenance"]["overrides"], frozen)
        names = [wanted, f"{wanted}-{frozen['id']}"] if wanted else self._names(frozen, given, swept)
        if there := self.names.get(frozen["id"]):
            return there, names[0]
        if same := self.by_words.get(_words(frozen)) or self.by_words.get(names[1]):
            raise ValueError(_differs(self.path / same, self.on_disk[same], frozen))
        taken = (name in self.runs or (self.path / name / "config.yaml").exists() for name in names)
        name = next(name for name, gone in zip(names, taken, strict=True) if not gone)
        self.runs[name], self.names[frozen["id"]] = frozen, name
        return name, name

    def _names(self, frozen: dict[str, Any], given: dict[str, str], swept: Collection[str]) -> list[str]:
        """Names for a run; the first that no other run has is the one to take.

        The first holds what varies: the keys that are swept, and of the other overrides those in which the runs on disk
        are not all like this one. The next holds all overrides, the third also what the run of that name was given.
        """
        varying = {key: value for key, value in given.items() if key in swept or self._on_disk(key) - {value}}
        id, everything = frozen["id"], name(given, frozen["id"])
        known = flatten(frozen)
        more = {key: _shown(frozen, key) for key, _ in _words(self.runs.get(everything, {})) if key in known}
        return [name(varying or given, id), everything, name({**more, **given}, id), name(given, id, cut=True)]

    def _on_disk(self, key: str) -> set[str]:
        if key not in self.values:
            self.values[key] = {_shown(config, key) for config in self.on_disk.values()}
        return self.values[key]


def name(values: dict[str, str], id: str, cut: bool = False) -> str:
    """A directory's name from keys and values; where it is too long, or `cut` asks for it, it ends in the identity."""
    text = ",".join(f"{key}={values[key]}" for key in sorted(values)) or "default"
    text = re.sub(r"[^\w.,+=@\[\]-]", "_", text.replace("/", "__"))
    if len(text.encode()) <= NAME_BYTES and not cut:
        return text
    return f"{text.encode()[:60].decode(errors='ignore')}-{id}"


def _given(overrides: Sequence[str], frozen: dict[str, Any]) -> dict[str, str]:
    """The overrides that decide a number, with the values that the config has: beta=0.10 and beta=1e-1 are beta=0.1."""
    flat = flatten(frozen)
    return {key: _shown(frozen, key) for key in _keys(overrides) if in_name(key, flat)}


def _words(frozen: dict[str, Any]) -> frozenset[tuple[str, str]]:
    """What a run was asked for by."""
    return frozenset(_given(frozen["provenance"]["overrides"], frozen).items()) if _recorded(frozen) else frozenset()


def _recorded(frozen: dict[str, Any]) -> bool:
    return "overrides" in frozen.get("provenance", {})  # not in runs of former versions: there they are the name


def key_of(override: str) -> str:
    """The key that an override gives a value; of judge@evaluation.judge=gold, which names group and key, the key."""
    group, _, key = override.lstrip("+~").partition("=")[0].partition("@")
    return key or group


def _keys(overrides: Sequence[str]) -> list[str]:
    return [key_of(override) for override in overrides]


def _changed(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What two runs of the same settings were made from that is not the same, in words."""
    before, now = (config.get("provenance", {}).get("inputs", {}) for config in (old, new))
    return " and ".join(INPUTS[key] for key in before if before[key] != now.get(key, before[key]))


def _begun(directory: Path) -> bool:
    """Whether a run has made something that can be resumed or read."""
    made = finished(directory) or any(directory.glob("checkpoint/step-*"))
    return made or status(directory) == "running"


def _written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def _differs(directory: Path, old: dict[str, Any], new: dict[str, Any]) -> str:
    before, now = (identity_keys(labelled(config)) for config in (old, new))
    shown = [(key, *(_written(values.get(key, "absent")) for values in (before, now))) for key in {**before, **now}]
    changes = [f"  {key}: {there} there, {asked} asked for" for key, there, asked in shown if there != asked]
    return "\n".join(
        (
            f"{directory} holds a run of other settings; nothing was changed there. It differs in",
            *changes,
            f"use another name=..., or move {directory} away",
        )
    )


def _shown(frozen: dict[str, Any], key: str) -> str:
    """The value of a key, or the option of a group."""
    if key in frozen.get("choices", {}):
        return str(frozen["choices"][key])
    value: Any = labelled(frozen)
    for part in key.split("."):
        value = value.get(part, "absent") if isinstance(value, dict) else "absent"
    return _written(value)


def _provenance() -> dict[str, Any]:
    """What the run was made with; a record, no part of its identity."""
    packages = ("torch", "transformers", "tokenizers", "numpy", "hydra-core", "omegaconf", "peft", "datasets")
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
