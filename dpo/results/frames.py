"""Run directories as tidy DataFrames, and what tables and figures ask of these; imports no torch."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dpo.results.failures import BASELINE, INITIAL, degenerate
from dpo.results.rounds import as_rounds, to_original
from dpo.sweep import directory
from dpo.sweep.directory import configs, folders
from dpo.sweep.identity import ALIASES, SWITCHES, identity_keys, labelled

DASH = "-"
BEATEN = {INITIAL: "the initial policy", "human": "what people wrote"}  # by win rates; any other: "the baseline"


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


def horizontal(frame: pd.DataFrame) -> str | None:
    """What a figure has across: the round, or beta, or if it is the same everywhere another number that is swept, best
    one that every run has; None where there is none of these.
    """
    types = pd.api.types
    numeric = [
        key
        for key in swept(frame)
        if key != "seed" and types.is_numeric_dtype(frame[key]) and not types.is_bool_dtype(frame[key])
    ]
    if "round" in numeric:
        return "round"
    several = [key for key in numeric if frame[key].nunique() > 1]
    if "beta" in numeric or not several:
        return "beta" if "beta" in frame else None
    return min(several, key=lambda key: frame[key].isna().sum())


def trained(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """What a figure shows: runs of `dpo.train`, and best of n beside them; where none trained, all of them and none.
    Those of `dpo.sft` beside others have no place there: they were compared with nothing.
    """
    if "command" in frame:
        frame = _only(frame, frame["command"].isna())
    number = pd.to_numeric(frame.get("best_of", pd.Series(None, frame.index)), errors="coerce")
    if number.isna().all() or number.notna().all():
        return frame, None
    return _only(frame, number.isna()), frame[number > 1].assign(best_of=number)


def _only(frame: pd.DataFrame, some: pd.Series) -> pd.DataFrame:
    found = frame[some].dropna(axis="columns", how="all")
    found.attrs["swept"] = [key for key in frame.attrs["swept"] if key in found]
    return found


def undrawable(frame: pd.DataFrame) -> str | None:
    """What these runs lack to be drawn; None if they can be."""
    shown, _ = trained(frame)
    if not {"win_rate", "rewards/accuracies"} & {*shown}:
        return "win rate or accuracy"
    return None if horizontal(shown) else "beta and no other number that varies"


def beaten(frame: pd.DataFrame) -> str:
    """Whom the win rates of a frame made by `final` are over, in a reader's words."""
    over = {*frame.get(BASELINE, pd.Series(INITIAL, frame.index)).fillna(INITIAL)}
    return BEATEN.get(over.pop(), "the baseline") if len(over) == 1 else "the baseline"


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

    Where runs of several commands are in a folder, a key that varies among the ones says nothing of the others:
    `best_of` of `dpo.evaluate` and `command` of `dpo.sft` tell these apart.
    """
    by_command: dict[str, dict[str, dict[str, Any]]] = {}
    for run, config in sorted(frozen.items(), key=lambda item: _command(item[1]) != "train"):
        by_command.setdefault(_command(config), {})[run] = config
    keys: list[str] = []
    settings: dict[str, dict[str, Any]] = {}
    for command, runs in by_command.items():
        own = []
        if command != "train" and len(by_command) > 1:
            own = ["best_of" if command == "evaluate" else "command"]
        varying, found = _of_one_command(runs, [*own, *always])
        keys += [key for key in dict.fromkeys([*own, *varying]) if key not in keys]
        settings |= found
    keys.sort(key=lambda key: key == "seed")
    shown = dict.fromkeys(key for values in settings.values() for key in values)
    return keys, {run: {key: values.get(key) for key in shown} for run, values in settings.items()}


def _command(config: dict[str, Any]) -> str:
    return str(config.get("command", "train"))


def _of_one_command(
    frozen: dict[str, dict[str, Any]], always: Sequence[str]
) -> tuple[list[str], dict[str, dict[str, Any]]]:
    flat, choices = {}, {}
    for run, config in frozen.items():
        choices[run] = config.get("choices", {})
        flat[run] = choices[run] | {
            key: str(value) if isinstance(value, list) else value
            for key, value in identity_keys(labelled(config)).items()
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
