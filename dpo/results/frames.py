"""Run directories as tidy DataFrames, a table and a figure; imports no torch."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dpo.results.failures import BASELINE, INITIAL, degenerate
from dpo.results.rounds import as_rounds, to_original
from dpo.sweep import directory
from dpo.sweep.directory import configs, folders
from dpo.sweep.identity import ALIASES, SWITCHES, identity_keys

DASH = "-"


def load(path: str | Path, always: Sequence[str] = ("beta",)) -> pd.DataFrame:
    """One row per (run, split, step) of every run in `path`.

    Columns: run, the config keys that vary between runs and those of `always`, step, split, metrics.
    `evaluation.json` is the row of split "test". A metric called like a varied key is under "logged/lr" (say).
    A damaged run is left out, with a warning.
    """
    path, rows = Path(path), []
    keys, settings = _settings(_sound(path), always)
    for run, values in settings.items():
        evaluation = directory.evaluation(path / run)
        last = {"step": evaluation.pop("steps", None), "split": "test"}
        for row in directory.metrics(path / run):
            where = {"step": row.pop("step"), "split": row.pop("split")}
            if where != last:  # evaluation.json says the same and more
                rows.append({"run": run, **values, **where, **_apart(row, values)})
        if evaluation:
            rows.append({"run": run, **values, **last, **_apart(evaluation, values)})
    return _frame(rows, keys)


def final(path: str | Path, always: Sequence[str] = ("beta",)) -> pd.DataFrame:
    """One row per finished run: the config keys that vary and those of `always`, and `evaluation.json`.

    With them whom the win rate is over, where that is not the initial policy of each. Of rounds (`dpo.results.rounds`)
    win rate and KL are to the policy before the first. A damaged run is left out, with a warning.
    """
    path = Path(path)
    frozen = _sound(path)
    if any(identity_keys(config).get(BASELINE, INITIAL) != INITIAL for config in frozen.values()):
        always = (*always, BASELINE)
    evaluations = {run: directory.evaluation(path / run) for run in frozen}
    keys, settings = _settings({run: config for run, config in frozen.items() if evaluations[run]}, always)
    rows = [{"run": run, **values, **_apart(evaluations[run], values)} for run, values in settings.items()]
    frame = _frame(rows, keys)
    return frame.assign(degenerate=degenerate(frame).astype(float)) if "round" in keys else frame


def swept(frame: pd.DataFrame) -> list[str]:
    """The config keys that vary between the runs of a frame made by `load` or `final`."""
    return list(frame.attrs["swept"])


def short(value: Any) -> str:
    """A swept value as a reader writes it; a run that has none, as of another option's knob, has a dash."""
    if value is None or value != value:
        return DASH
    return f"{value:g}" if isinstance(value, float) else str(value)


def damaged(path: Path) -> dict[str, str]:
    """The runs in `path` of which a file is not as a run writes it, and what is wrong with it."""
    return {run.name: wrong for run in folders(path) if (wrong := directory.damage(run))}


class DamagedRun(UserWarning):
    """A run that no frame shows."""


def _sound(path: Path) -> dict[str, dict[str, Any]]:
    wrong = damaged(path)
    for run, why in wrong.items():
        warnings.warn(f"{run} is damaged and left out: {why}", DamagedRun, stacklevel=3)
    return as_rounds(path, {run: config for run, config in configs(path).items() if run not in wrong})


def _settings(frozen: dict[str, dict[str, Any]], always: Sequence[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The keys that vary, and their values in each run; runs in the order of their values.

    Where `dpo.evaluate` has put runs beside those of `dpo.train`, as of best of n, a key that varies among the ones
    says nothing of the others, and `best_of` tells these apart.
    """
    trained = {run: config for run, config in frozen.items() if config.get("command") != "evaluate"}
    measured = {run: config for run, config in frozen.items() if run not in trained}
    if not (trained and measured):
        return _of_one_command(frozen, always)
    keys, settings = _of_one_command(trained, always)
    more, others = _of_one_command(measured, ["best_of", *(key for key in always if key == BASELINE)])
    keys += [key for key in dict.fromkeys(["best_of", *more]) if key not in keys]
    keys.sort(key=lambda key: key == "seed")
    shown = dict.fromkeys(key for values in (*settings.values(), *others.values()) for key in values)
    return keys, {run: {key: values.get(key) for key in shown} for run, values in (settings | others).items()}


def _of_one_command(
    frozen: dict[str, dict[str, Any]], always: Sequence[str]
) -> tuple[list[str], dict[str, dict[str, Any]]]:
    flat, choices = {}, {}
    for run, config in frozen.items():
        choices[run] = config.get("choices", {})
        flat[run] = choices[run] | {
            key: str(value) if isinstance(value, list) else value
            for key, value in identity_keys(config).items()
            if key not in ALIASES and key not in choices[run] and not key.endswith(("._target_", "._partial_"))
        }
    keys: list[str] = []
    for key in sorted({key for values in flat.values() for key in values}, key=lambda key: ("." in key, key)):
        group = key.split(".")[0]
        # An option's own knob varies if it does between runs of that option: that others lack it is no news.
        by_choice: dict[Any, set[Any]] = {}
        for run, values in flat.items():
            choice = choices[run].get(group) if "." in key else None
            if key in values or key in SWITCHES.values() or not key.startswith((*SWITCHES,)):  # of what is on
                by_choice.setdefault(choice, set()).add(values.get(key))
        varies = any(len(values) > 1 for values in by_choice.values())
        if varies and not _follows(key, keys, flat) and not _replicates(key, flat, choices):
            keys.append(key)
    keys.sort(key=lambda key: (key != "beta", key == "seed"))
    shown = keys + [key for key in always if key not in keys and any(key in values for values in flat.values())]
    settings = {run: {key: values.get(key) for key in shown} for run, values in flat.items()}
    return keys, dict(sorted(settings.items(), key=lambda item: [_order(value) for value in item[1].values()]))


def _follows(key: str, others: list[str], flat: dict[str, dict[str, Any]]) -> bool:
    """Whether a nested key repeats another key in every run, as data.seed: ${seed} does."""
    return "." in key and any(all(values.get(key) == values.get(other) for values in flat.values()) for other in others)


def _replicates(key: str, flat: dict[str, dict[str, Any]], choices: dict[str, dict[str, Any]]) -> bool:
    """Whether seed alone decides a nested key of an option, as in reference.path: runs/x/seed=${seed}/policy."""
    if "." not in key:
        return False
    group = key.split(".")[0]
    of_seed: dict[Any, set[Any]] = {}
    for run, values in flat.items():
        of_seed.setdefault((choices[run].get(group), values.get("seed")), set()).add(values.get(key))
    return len({seed for _, seed in of_seed}) > 1 and all(len(values) == 1 for values in of_seed.values())


def _order(value: Any) -> tuple[bool, float, str]:
    numeric = isinstance(value, int | float)
    return (not numeric, value if numeric else 0.0, str(value))


def _apart(metrics: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    metrics = to_original(metrics) if settings.get("round", 1) > 1 else metrics
    return {f"logged/{key}" if key in settings else key: value for key, value in metrics.items()}


def _frame(rows: list[dict[str, Any]], keys: list[str]) -> pd.DataFrame:
    frame = pd.DataFrame(rows).dropna(axis="columns", how="all")
    frame.attrs["swept"] = [key for key in keys if key in frame]
    return frame
