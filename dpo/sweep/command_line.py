"""What is typed, in Hydra's words; and what is wrong with it, in ours: what must hold, what was found, what to do."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any, get_type_hints

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Sweep
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from dpo import HOME
from dpo.sweep.identity import flatten
from dpo.sweep.schema import OPEN_GROUPS
from dpo.sweep.signature import kind, no_key, no_option

EXPERIMENTS = ("figure", "table")  # groups: folders of experiments/
GROUPS = (*OPEN_GROUPS, "policy")
NO_OPTION = r"null|true|false|[-+.\d]*|[\[{].*|.*[\]}]"  # Hydra asserts that it has a name
HOW = {  # to say what is no option
    "judge": "judge=none is no judge",
    "reference": "reference=reference_free is no reference, and reference=other reference.path=... a model of yours",
    "scorer": "scorer=here is no pool",
    "policy": "a model of yours is policy=pretrained policy.path=...",
    "data": "data of yours are data=file data.path=...",
}


def run(verb: str, task: Callable[[DictConfig], Any]) -> None:
    """Call the task with what Hydra composes of the command line for `conf/VERB.yaml`, or do what its options ask for.

    Ends the process if that cannot be composed.
    """
    _take_hydras_help()
    sys.argv[1:] = options_last(sys.argv[1:])
    if problem := refusal(sys.argv[1:]):
        sys.exit(problem)
    sys.argv[1:] = in_hydras_words(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # it raises what it would print
    try:
        hydra.main(version_base="1.3", config_path=str(HOME / "conf"), config_name=verb)(task)()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(message(error))


def options_last(arguments: Sequence[str]) -> list[str]:
    """The command line with its key=value in front of its options: Hydra's parser takes them in one place alone."""
    given, unknown = get_args_parser().parse_known_args([*arguments])
    apart = [one for one in unknown if not one.startswith("-")]
    words = [*given.overrides, *apart] if apart else []
    return [*words, *(one for one in arguments if one not in words)]


def in_hydras_words(arguments: Sequence[str]) -> list[str]:
    """The command line with the option of a group at a key as Hydra names it, null there as the value of the key, and
    an experiment appended to what the command composes: so what the experiment says wins over every page of `conf/`,
    and the command line over both. A group needs no + to be one.
    """
    found = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        bare = key.lstrip("+")
        if at := re.fullmatch(r"(?:\w+@)?evaluation[./](judge|engine|rule)", bare):
            key = f"evaluation.{at[1]}" if value.lower() == "null" else f"{at[1]}@evaluation.{at[1]}"
        elif bare in EXPERIMENTS:
            key = f"+{bare}"
        elif bare in GROUPS or bare == "hydra.launcher":
            key, value = bare.replace(".", "/"), value.removesuffix(".yaml")
        if bare == "rule":
            value = re.sub(r"(?i)\bnull\b", "none", value)
        found.append(f"{key}{equals}{value}")
    return found


def refusal(arguments: Sequence[str]) -> str | None:
    """What keeps Hydra from reading a command line, or what it would say in words of its own code."""
    given, unknown = get_args_parser().parse_known_args([*arguments])
    if unknown:
        return f"{unknown[0]} must be key=value, without dashes, or one of the options that --hydra-help lists"
    if given.multirun and given.cfg:
        return "--cfg must come without -m: it shows the config of one run"
    if given.resolve and not given.cfg:
        return "--resolve must come with --cfg job, found it alone"
    experiments = [one for one in given.overrides if one.lstrip("+").partition("=")[0] in EXPERIMENTS]
    if "," in " ".join(experiments) or len(experiments) > 1:
        return f"an experiment must be one at a time, got {' '.join(experiments)}; take a command for each"
    said = next(filter(None, map(_unread, given.overrides)), None)
    return said or no_options(given.overrides) or _twice(given.overrides)


def no_options(overrides: Sequence[str]) -> str | None:
    """What to say of `loss=null`, `loss=3`, `loss=` and `loss=[dpo]`, where Hydra speaks of a NoneType or asserts."""
    for override in overrides:
        key, _, option = override.lstrip("+").partition("=")
        group, _, at = key.partition("@")
        at = at or group
        own = re.fullmatch(r"evaluation[./](judge|engine|rule)", at)
        group = own[1] if own else group
        if group not in (*GROUPS, *EXPERIMENTS, "hydra/launcher") or (not own and re.search(r"[({]", option)):
            continue
        for one in option.strip("\"'").split(","):
            if one.lower() == "null" and (own or group == "rule"):
                continue
            if (own and one == "none") or re.fullmatch(NO_OPTION, one.strip(), re.IGNORECASE):
                got = option if re.search(r"[\[{]", option) else one or "nothing"
                how = "null is the default" if own else HOW.get(group, f"leave out {override}")
                return f"{at} must be one of its options, got {got}; {how}"
    return None


def message(error: Exception) -> str:
    """What Hydra, OmegaConf or we say, in our words where it is of a key, a value or an option."""
    text, cause = str(error).split("\nConfig search path")[0], error.__cause__ or error.__context__
    text = text.split("\n    full_key:")[0]
    if isinstance(error, MissingConfigException) and (group := re.search(r"Available options in '(.*)':", text)):
        got = str(error.missing_cfg_file).removeprefix(f"{group[1]}/")
        return no_option(group[1], got, error.options or (), HOW.get(group[1], "take one"))
    if several := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.*)'", text):
        key, _, value = several[1].partition("=")
        how = f"one list is [a,b], and one text with commas is quoted twice: '{key}=\"{value}\"'"
        return f"{several[1]} must be one value, found several; -m runs each ({how})"
    where = found[0] if (found := re.match(r"In '[^']*': ", text)) else ""
    of = error if isinstance(error, OmegaConfBaseException) else cause
    if isinstance(of, ConfigKeyError | ConfigAttributeError) and of.full_key:
        known = of.parent_node if isinstance(of.parent_node, DictConfig) else ()
        return where + no_key(of.full_key, [str(key) for key in known], _all_keys(of.parent_node))
    if isinstance(of, ValidationError) and is_dataclass(of.object_type) and isinstance(of.object_type, type):
        expected = get_type_hints(of.object_type).get(of.key)
        of_what = "a group of keys" if is_dataclass(expected) else kind(expected)
        hint = "; none is written null" if str(of.value).lower() in ("none", "") and "None" in of_what else ""
        if "float" in of_what and (found := re.fullmatch(r"([-+]?)\.(inf|nan)", str(of.value).lower())):
            hint = f"; on a command line that is {found[1]}{found[2]}"
        return f"{where}{of.full_key} must be {of_what}, got {of.value!r}{hint}"
    if found := re.match(r"Could not append to config. An item is already at '(.*)'", text):
        return f"{found[1]} must be given without +, since it is there already"
    if found := re.match(r"Could not override '(?:[^'@]*@)?(.*)'\.", text):
        return no_key(found[1], ())
    if isinstance(cause, OmegaConfBaseException) and str(cause).strip():
        text = f"{text}: {message(cause)}"
    return "\n".join(line for line in text.splitlines() if line.strip())


def _all_keys(node: Any) -> list[str]:
    """The keys of the whole config that a node is of, but for Hydra's own."""
    root = node._get_root() if isinstance(node, DictConfig) else None
    values: Any = OmegaConf.to_container(root) if isinstance(root, DictConfig) else {}
    return [key for key in flatten(values) if not key.startswith("hydra.")]


def _twice(overrides: Sequence[str]) -> str | None:
    """What to say of a key that is given twice, of which Hydra takes the last."""
    given: dict[str, str] = {}
    for override, word in zip(overrides, in_hydras_words(overrides), strict=True):
        key = word.partition("=")[0].lstrip("+").rpartition("@")[2]
        if given.setdefault(key, override) is not override:
            return f"{key} must be given once, found {given[key]} and {override}; leave one out"
    return None


def _unread(argument: str) -> str | None:
    """What to say of an argument that is no key=value, or whose value Hydra's grammar does not take as it is, such as
    train[:10] or a path with a =.
    """
    key, equals, value = argument.partition("=")
    if not key.lstrip("+~") or not (equals or key.startswith("~")):
        return f"{argument} must be key=value, without spaces; --help lists the keys"
    try:
        read = OverridesParser.create().parse_override(argument).value()
    except HydraException:
        return (
            f"{argument} must be read whole, found what cannot be: several values are a,b and a list is [a,b], both "
            f"without spaces; a text with other characters is quoted twice: '{key}=\"{value}\"'"
        )
    if isinstance(read, ChoiceSweep) and any(isinstance(one, Sweep) for one in read.list):
        return f"{argument} must be values between commas or one range, found both; write all values: {key}=a,b,c"
    return None


def _take_hydras_help() -> None:
    """Python 3.14 looks into a help text when it is added, and one of Hydra 1.3's is no text until it is shown."""
    parser: Any = argparse.ArgumentParser
    parser._check_help = lambda *_: None
