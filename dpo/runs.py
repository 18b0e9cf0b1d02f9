"""Run directories as tidy DataFrames, a table and a figure; imports no torch.

    python -m dpo.runs runs/dev

says where a sweep stands, and draws its table and figure again.
"""

import os
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dpo import directory
from dpo.config import HOMES, decisive
from dpo.directory import configs, folders, reason, status
from dpo.squeue import queued

__all__ = ["configs", "figure", "final", "load", "over_seeds", "reason", "report", "status", "swept", "table"]
DASH = "-"
MEASURED = (  # columns of the tables, without those that carry an interval: title, metric, format
    ("accuracy", "rewards/accuracies", ".3f"),
    ("margin", "rewards/margins", ".3g"),
    ("length", "length", ".1f"),
    ("ended", "ended", ".3f"),
    ("correct", "correct", ".2f"),
    ("wrong", "wrong", ".2f"),
    ("valid", "valid", ".3f"),
)


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


MOST_BROKEN = 0.5  # share of broken responses above which a policy counts as degenerate: see dpo.evaluate.is_broken
LEAST_VALID = 0.5  # share of clauses that follow the world's grammar, below which it does
LEAST_WINS = 0.1  # win rate over the policy that training began with, below which it does


def degenerate(frame: pd.DataFrame) -> pd.Series:
    """Whether each run of `final` is degenerate: a state of its own, since a win rate of such a policy means little.

    It is where most responses are broken or most of the text is no language, or where it loses nine times in ten
    against what it was before training, as one does that ends at once. What was not measured says nothing.
    """

    def measured(name: str) -> pd.Series:
        return pd.to_numeric(frame.get(name, pd.Series(None, frame.index)), errors="coerce")

    broken, gibberish = measured("broken") > MOST_BROKEN, measured("valid") < LEAST_VALID
    return broken | gibberish | (measured("win_rate") < LEAST_WINS)


def final(path: str | Path, always: Sequence[str] = ("beta",)) -> pd.DataFrame:
    """One row per finished run: the config keys that vary and those of `always`, and `evaluation.json`.

    A damaged run is left out, with a warning.
    """
    path = Path(path)
    frozen = _sound(path)
    evaluations = {run: directory.evaluation(path / run) for run in frozen}
    keys, settings = _settings({run: config for run, config in frozen.items() if evaluations[run]}, always)
    rows = [{"run": run, **values, **_apart(evaluations[run], values)} for run, values in settings.items()]
    return _frame(rows, keys)


def swept(frame: pd.DataFrame) -> list[str]:
    """The config keys that vary between the runs of a frame made by `load` or `final`."""
    return list(frame.attrs["swept"])


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """What a reader compares, as text: one row per run of `final`."""
    always = ["beta"] if "beta" in frame else []
    if {"kl", "kl/se"} <= {*frame}:
        half = 1.96 * frame["kl/se"]
        frame = frame.assign(**{"kl/low": frame["kl"] - half, "kl/high": frame["kl"] + half})
    columns = {key: frame[key].map(short) for key in dict.fromkeys([*always, *swept(frame)])}

    def text(name: str, pattern: str, *keys: str) -> None:
        rows = zip(*(frame.get(key, pd.Series(None, frame.index)) for key in keys), strict=True)
        cells = [DASH if any(pd.isna(value) for value in row) else pattern.format(*row) for row in rows]
        columns[name] = pd.Series(cells, frame.index)

    text("n", "{:.0f}", "n")
    text("win rate [95 %]", "{:.3f} [{:.3f}, {:.3f}]", "win_rate", "win_rate/low", "win_rate/high")
    text("KL [95 %]", "{:.2f} [{:.2f}, {:.2f}]", *(f"kl{end}" for end in ("", "/low", "/high")))
    for title, name, form in MEASURED:
        text(title, f"{{:{form}}}", name)
    return pd.DataFrame(columns)


def over_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """As `table`, with a row per setting of the other keys: mean ± standard deviation over its seeds."""
    keys = [key for key in dict.fromkeys(["beta", *swept(frame)]) if key in frame and key != "seed"]
    rows = []
    for values, same in frame.groupby(keys, dropna=False, sort=False):
        row = dict(zip(keys, map(short, values), strict=True)) | {"seeds": str(len(same))}
        for title, name, form in (("win rate", "win_rate", ".3f"), ("KL", "kl", ".2f"), *MEASURED):
            known = same.get(name, pd.Series(dtype=float)).dropna()
            spread = f" ± {known.std():{form}}" if len(known) > 1 else ""
            row[title] = f"{known.mean():{form}}{spread}" if len(known) else DASH
        rows.append(row)
    return pd.DataFrame(rows)


def figure(frame: pd.DataFrame, path: str | Path) -> None:
    """Win rate and KL against beta, and one against the other, as a PNG: see `dpo.drawing`."""
    from dpo.drawing import draw  # matplotlib takes half a second that the rest does without

    draw(frame, Path(path))


def report(path: str | Path, named: Collection[str] = ()) -> None:
    """Print the table over the finished runs of `path`; write `table.csv` and `figure.png` there.

    named: damaged runs that the reader is told of elsewhere; the others are listed.
    """
    path = Path(path)
    for run, wrong in damaged(path).items():
        if run not in named:
            print(f"{run} is damaged and left out: {wrong}", flush=True)
    with warnings.catch_warnings(action="ignore", category=DamagedRun):
        frame = final(path)
    if frame.empty:
        return
    print(f"\n{table(frame).to_string(index=False)}\n")
    if "seed" in swept(frame):
        print(f"Mean ± standard deviation over seeds:\n{over_seeds(frame).to_string(index=False)}\n")
    written = [path / "table.csv"]
    unfinished = path / f"table.{os.getpid()}.unfinished"
    frame.to_csv(unfinished, index=False)
    unfinished.replace(path / "table.csv")
    if "beta" in frame and {"win_rate", "rewards/accuracies"} & {*frame}:
        written.append(path / "figure.png")
        figure(frame, written[-1])
    print(f"{len(frame)} finished in {path}: {', '.join(map(str, written))}", flush=True)


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
    return {run: config for run, config in configs(path).items() if run not in wrong}


def _settings(frozen: dict[str, dict[str, Any]], always: Sequence[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The keys that vary, and their values in each run; runs in the order of their values."""
    flat, choices = {}, {}
    for run, config in frozen.items():
        choices[run] = config.get("choices", {})
        flat[run] = choices[run] | {
            key: str(value) if isinstance(value, list) else value
            for key, value in decisive(config).items()
            if key not in HOMES and key not in choices[run] and not key.endswith(("._target_", "._partial_"))
        }
    keys: list[str] = []
    for key in sorted({key for values in flat.values() for key in values}, key=lambda key: ("." in key, key)):
        group = key.split(".")[0]
        # An option's own knob varies if it does between runs of that option: that others lack it is no news.
        by_choice: dict[Any, set[Any]] = {}
        for run, values in flat.items():
            choice = choices[run].get(group) if "." in key else None
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
    return len({seed for _, seed in of_seed}) > 1 and all(len(found) == 1 for found in of_seed.values())


def _order(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return (not number, value if number else 0.0, str(value))


def _apart(metrics: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    return {f"logged/{key}" if key in settings else key: value for key, value in metrics.items()}


def _frame(rows: list[dict[str, Any]], keys: list[str]) -> pd.DataFrame:
    frame = pd.DataFrame(rows).dropna(axis="columns", how="all")
    frame.attrs["swept"] = [key for key in keys if key in frame]
    return frame


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m dpo.runs runs/<name>")
    path = Path(sys.argv[1])
    try:
        found = folders(path)
    except ValueError as error:
        sys.exit(str(error))
    waiting: set[Path] = set()
    if shutil.which("squeue"):
        try:
            waiting = queued()
        except RuntimeError as error:
            print(error)
    states = {run.name: status(run, waiting) for run in found}
    counts = Counter(states.values())
    print(
        f"{path}: {len(states)} run{'s' if len(states) != 1 else ''}: "
        + ", ".join(f"{n} {state}" for state, n in counts.items())
    )
    for run, state in states.items():
        if state != "finished":
            print(f"  {state:9}{run}  {reason(path / run) or ''}".rstrip())
    report(path, named=states)


if __name__ == "__main__":
    main()
