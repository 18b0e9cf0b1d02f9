"""A run directory: what its files say, where the run stands, and what is wrong with a file that no run writes."""

import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from omegaconf._utils import get_omega_conf_dumper, get_yaml_loader

from dpo.bill import total

logger = logging.getLogger(__name__)
SCORES = "alpaca_eval_scores.json"  # what `dpo.results.alpaca_eval` adds to a run
MADE = "manifest.json"  # of a run that makes files
MARKERS = ("evaluation.json", MADE)  # of a run that measures a policy, or one that makes files; written last
MOST = 10_000  # runs of a sweep; a cache of fewer would have a command read each of them several times
FILES = ("config.yaml", "evaluation.json", SCORES, MADE, "metrics.jsonl", "error.json")


# OmegaConf's dialect of YAML, in which 1e-3 is a number and yes is text, by libyaml where PyYAML has it: a config is
# read in a fifteenth of the time, and written in a fifth.
class _Loader(*((yaml.CSafeLoader,) if yaml.__with_libyaml__ else ()), get_yaml_loader()):  # type: ignore[misc]
    pass


class _Dumper(*((yaml.CDumper,) if yaml.__with_libyaml__ else ()), get_omega_conf_dumper()):  # type: ignore[misc]
    pass


def read_yaml(text: str) -> Any:
    """Plain values as `OmegaConf.load` reads them; interpolations stay text."""
    return yaml.load(text, _Loader)


def to_yaml(values: dict[str, Any]) -> str:
    """As `OmegaConf.to_yaml` writes them."""
    return yaml.dump(values, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


def folders(path: Path) -> list[Path]:
    """The run directories in `path`.

    Raises: ValueError if it is no folder.
    """
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing there"
        raise ValueError(f"{path} must be a folder of run directories, such as runs/dev, found {found}")
    names = ("config.yaml", "metrics.jsonl", *MARKERS)
    return sorted({file.parent for name in names for file in path.glob(f"*/{name}")})


def no_sweep(path: Path) -> str:
    """What to say of a folder without runs."""
    if (path / "config.yaml").is_file():
        return f"{path} must be a folder of run directories, found a run; take the folder that it is in"
    below = (file for depth in ("*/*", "*/*/*") for file in path.glob(f"{depth}/config.yaml"))  # name=a/b has two parts
    sweeps = sorted({str(file.parent.parent) for file in below})
    said = f"{path} must be a folder of run directories, such as runs/dev, found none in it"
    return f"{said}; these have some: {', '.join(sweeps[:20])}{', ...' * (len(sweeps) > 20)}" if sweeps else said


def configs(path: Path) -> dict[str, dict[str, Any]]:
    """The frozen config of each run in `path` that has one which can be read."""
    found: dict[str, dict[str, Any]] = {}
    for run in folders(path):
        with suppress(ValueError):
            found[run.name] = config(run)
    return {run: values for run, values in found.items() if values}


def finished(directory: Path) -> bool:
    """Whether its last file is written."""
    return any((directory / name).exists() for name in MARKERS)


def finish(directory: Path, name: str, result: dict[str, float]) -> None:
    """Write the last file of a run, whole: its presence means that the run is finished, and needs nothing to resume
    from. name: one of MARKERS. With the sums of its bill, if servers answered to it.
    """
    if paid := total(directory):
        logger.info("bill of all parts of the run: " + ", ".join(f"{name} {paid[name]:.8g}" for name in paid))
    unfinished = directory / f"{name}.unfinished"
    finite = {key: value if math.isfinite(value) else None for key, value in {**result, **paid}.items()}
    unfinished.write_text(json.dumps(finite, indent=1) + "\n")
    unfinished.replace(directory / name)
    for folder in ("checkpoint", "selected"):
        shutil.rmtree(directory / folder, ignore_errors=True)


def remember_initial(directory: Path, policy: str) -> None:
    """Write down which policy a run started from: a folder, or a name on the hub."""
    place = str(Path(policy).resolve()) if Path(policy).exists() else policy
    (directory / "initial.json").write_text(json.dumps({"policy": place}) + "\n")


def initial(directory: Path) -> str | None:
    """That policy; None of a run that does not say."""
    file = directory / "initial.json"
    return str(json.loads(file.read_text())["policy"]) if file.is_file() else None


def before(against: str | None, policy: str) -> str | None:
    """Where the model is that a policy is measured against; "initial": what the run that made the policy started from.

    Raises: ValueError if nobody knows that, or it is gone.
    """
    if against != "initial":
        return against
    found = initial(run := Path(policy).resolve().parent)
    if found is None or (Path(found).is_absolute() and not Path(found).is_dir()):
        lacks = f"no {run / 'initial.json'}" if found is None else f"none at {found}"
        raise ValueError(
            f"against=initial is what the run of dpo.train that made policy.path={policy} started from, found {lacks}; "
            "give policy/ of such a run as policy.path, or a model: against=<folder or hub name>"
        )
    return found


def status(directory: str | Path, queued: Collection[Path] = ()) -> str:
    """finished | running | queued | failed | stopped | planned | damaged."""
    directory = Path(directory)
    if damage(directory):
        return "damaged"
    if finished(directory):
        return "finished"
    if _running(directory):
        return "running"
    if directory.resolve() in queued:
        return "queued"
    if error := _error(directory):
        return "stopped" if error["type"] == "Stopped" else "failed"
    return "stopped" if (directory / "metrics.jsonl").exists() else "planned"


def reason(directory: str | Path) -> str | None:
    """Why the run failed or counts as damaged, or where it stopped; None if it did not say."""
    directory = Path(directory)
    if wrong := damage(directory):
        return wrong
    error = _error(directory)
    if error is None:
        return None
    return error["message"] if error["type"] == "Stopped" else f"{error['type']}: {error['message']}"


def damage(directory: Path) -> str | None:
    """What is wrong with the first file that is not as a run writes it, and what to do; None if all are sound."""
    return _damage(directory, *map(_version, [*(directory / name for name in FILES), *_of_lm_eval(directory)]))


def _version(file: Path) -> tuple[int, ...]:
    """Another one for each content that a file gets."""
    try:
        about = file.stat()
    except OSError:
        return ()
    return about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns


@lru_cache(maxsize=MOST)
def _damage(directory: Path, *_: tuple[int, ...]) -> str | None:
    """A command asks several times, and reading all that runs have logged takes longer than all else that it does."""
    try:
        config(directory)
        evaluation(directory)
        manifest(directory)
        metrics(directory)
        _error(directory)
    except ValueError as error:
        return str(error)
    return None


def config(directory: Path) -> dict[str, Any]:
    """The frozen config; {} before there is one.

    Raises: ValueError if `config.yaml` is damaged.
    """
    file = directory / "config.yaml"
    advice = f"move {directory} away, and the same command makes the run again"
    content = _content(file, _parsed, "the settings of a run", advice)
    if content is None and not any((directory / name).exists() for name in ("metrics.jsonl", *MARKERS)):
        return {}
    if content is None:
        raise _damaged(file, "the settings of a run", "no such file", advice)
    if not isinstance(content, dict) or all(value is None for value in content.values()):
        raise _damaged(file, "the settings of a run", _kind(content), advice)
    choices = content.get("choices", {})
    if not isinstance(choices, dict) or not all(isinstance(one, str) for pair in choices.items() for one in pair):
        raise _damaged(file, "the settings of a run", f"choices={choices!r}", advice)
    recorded = content.get("provenance", {})
    told = [recorded.get(key, {}) if isinstance(recorded, dict) else None for key in ("overrides", "inputs")]
    words = [*(told[0] or ()), *told[1].values()] if isinstance(told[1], dict) else [None]
    if not isinstance(told[0], list | dict) or not all(isinstance(one, str) for one in words):
        raise _damaged(file, "the settings of a run", f"provenance={str(recorded)[:60]}", advice)
    try:
        json.dumps(content)
    except TypeError as error:
        raise _damaged(file, "the settings of a run", str(error), advice) from error
    return deepcopy(content)


@lru_cache(maxsize=MOST)
def _parsed(text: str) -> Any:
    """A sweep asks for each config several times."""
    return read_yaml(text)


def evaluation(directory: Path) -> dict[str, Any]:
    """What was measured after training, AlpacaEval's scores and `lm_eval` if they have been put there; {} before.

    Raises: ValueError if one of the files is damaged.
    """
    found = _numbers(directory / "evaluation.json", f"move {directory} away, and the same command makes the run again")
    if not found:
        return {}
    found |= _numbers(directory / SCORES, "delete it, and have python -m dpo.results.alpaca_eval write it again")
    return found | lm_eval(directory)


def lm_eval(directory: Path) -> dict[str, float]:
    """What lm-evaluation-harness has written below `lm_eval/`: of each task the results of the newest file.

    Keys are lm_eval/<task>/<metric>, with the filter of answers if there is one (exact_match,strict-match), and
    .../se for standard errors.
    Raises: ValueError if a file is damaged.
    """
    tasks: dict[str, dict[str, float]] = {}
    for file in _of_lm_eval(directory):
        must, advice = "the results of lm-evaluation-harness", "delete it, and run lm_eval again"
        content = _content(file, json.loads, must, advice)
        results = content.get("results") if isinstance(content, dict) else None
        if not isinstance(results, dict) or not all(isinstance(one, dict) for one in results.values()):
            raise _damaged(file, must, "no object of results by task", advice)
        for task, measured in results.items():
            tasks[task] = {}
            for key, value in measured.items():
                name, comma, filter_ = key.partition(",")  # others are the task's name and number of samples
                if comma and type(value) in (int, float) and math.isfinite(value):  # no "N/A"
                    metric = name.removesuffix("_stderr") + f",{filter_}".removesuffix(",none")
                    tasks[task][f"lm_eval/{task}/{metric}{'/se' * name.endswith('_stderr')}"] = value
    return {key: value for measured in tasks.values() for key, value in measured.items()}


def _of_lm_eval(directory: Path) -> list[Path]:
    """From the oldest to the newest: their names end in a date."""
    return sorted(directory.glob("lm_eval/**/results_*.json"), key=lambda file: file.name)


def manifest(directory: Path) -> dict[str, Any]:
    """What a run that makes files has made, in numbers; {} before, and of other runs.

    Raises: ValueError if it is damaged.
    """
    return _numbers(directory / MADE, f"move {directory} away, and the same command makes the run again")


def _numbers(file: Path, advice: str) -> dict[str, Any]:
    content = _content(file, json.loads, must := "a JSON object of numbers", advice)
    if content is not None and (not isinstance(content, dict) or not content):
        raise _damaged(file, must, _kind(content), advice)
    if odd := _odd(content or {}):
        raise _damaged(file, must, odd, advice)
    return content or {}


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`; a last line that is cut short, of a run that writes or was killed, is none.

    Raises: ValueError if another line is damaged, or all are gone.
    """
    file, must = directory / "metrics.jsonl", "JSON objects of numbers, a line each, with step and split"
    text = _content(file, str, must, advice := f"move {directory} away, and the same command makes the run again")
    rows = []
    for number, line in enumerate((text or "").splitlines(keepends=True), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if not line.endswith("\n"):
                continue
            raise _damaged(file, must, f"line {number}: {_cut(line.strip())}", advice) from None
        step, split = (row.get("step"), row.get("split")) if isinstance(row, dict) else (None, None)
        if type(step) is not int or not isinstance(split, str) or (_odd({**row, "split": 0})):
            raise _damaged(file, must, f"line {number}: {_cut(line.strip())}", advice)
        rows.append(row)
    if text is not None and not rows and (directory / "evaluation.json").exists():
        raise _damaged(file, must, "no row of a finished run", advice)
    return rows


def _content(file: Path, parse: Callable[[str], Any], must: str, advice: str) -> Any:
    """What a file holds; None if there is no such file."""
    try:
        content = parse(file.read_text(encoding="utf-8"))
        if content is not None:
            return content
        found = "null"
    except FileNotFoundError:
        return None
    except OSError as error:
        found = str(error.strerror or error)
    except UnicodeDecodeError:
        found = "bytes that are no text"
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        empty = file.stat().st_size == 0
        found = "an empty file" if empty else f"otherwise ({_cut(' '.join(str(error).split()), 100)}); is it cut short?"
    raise _damaged(file, must, found, advice)


def _damaged(file: Path, must: str, found: str, advice: str) -> ValueError:
    return ValueError(f"{file} must hold {must}, found {_cut(found, 200)}; {advice}")


def _odd(values: dict[str, Any]) -> str | None:
    """The first value that is neither a finite number nor null."""
    for key, value in values.items():
        number = type(value) in (float, int, bool) and -sys.float_info.max <= value <= sys.float_info.max
        if value is not None and not number:
            return f"{key}={_cut(repr(value))}"
    return None


def _kind(value: Any) -> str:
    return "no value in it" if isinstance(value, dict) else f"{_cut(repr(value))}, a {type(value).__name__}"


def _cut(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def _error(directory: Path) -> dict[str, str] | None:
    """Why the run ended early. What is cut short says only that it did: starting the run again replaces it."""
    file = directory / "error.json"
    try:
        error = _content(file, json.loads, "the reason of a failure", "delete it, and the same command resumes the run")
    except ValueError as wrong:
        if not file.is_file():
            raise
        error = {"type": "Failed", "message": str(wrong)}
    if error is None or (isinstance(error, dict) and {type(error.get(key)) for key in ("type", "message")} == {str}):
        return error
    return {"type": "Failed", "message": f"{file} does not hold a reason, but {_kind(error)}"}


def _running(directory: Path) -> bool:
    """Whether a process holds the lock of the directory."""
    if not (directory / ".lock").exists():
        return False
    try:
        with FileLock(directory / ".lock", timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a folder that may only be read
        return False
