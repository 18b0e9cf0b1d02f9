"""The table and the figure over the finished runs of a folder."""

import os
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from dpo.results.failures import failures
from dpo.results.frames import DASH, DamagedRun, damaged, final, short, swept, undrawable
from dpo.sweep.directory import MADE
from dpo.win_rates import Z

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Measure = tuple[str, str, str]  # title, metric, format
MEASURED: tuple[Measure, ...] = (  # columns of the tables, without those that carry an interval
    ("accuracy", "rewards/accuracies", ".3f"),
    ("margin", "rewards/margins", ".3g"),
    ("length", "length", ".1f"),
    ("ended", "ended", ".3f"),
    ("correct", "correct", ".2f"),
    ("wrong", "wrong", ".2f"),
    ("valid", "valid", ".3f"),
)
CONTROLLED = ("LC", "win_rate_lc", ".3f")  # where it was measured: the win rate at equal lengths
DETECTORS = (  # of failures that most runs do not have: shown where a run of the table has more than `A_FEW`
    ("broken", "broken", ".3f"),
    ("repetition", "repetition", ".3f"),
    ("invalid", "invalid", ".3f"),
    ("too long", "too_long", ".3f"),
)
A_FEW = 0.1
LISTED = 5  # runs that an alarm names
OF_ROUNDS = ("degenerate", "degenerate", ".2f")  # where there are rounds: the share that `degenerate` says it of


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """What a reader compares, as text: one row per run of `final`, and no column that none of them has a value of."""
    always = ["beta"] if "beta" in frame else []
    if {"kl", "kl/se"} <= {*frame}:
        half = Z * frame["kl/se"]
        frame = frame.assign(**{"kl/low": frame["kl"] - half, "kl/high": frame["kl"] + half})
    columns = {key: frame[key].map(short) for key in dict.fromkeys([*always, *swept(frame)])}

    def text(name: str, form: str, *keys: str) -> None:
        rows = zip(*(frame.get(key, pd.Series(None, frame.index)) for key in keys), strict=True)
        cells = [_cell(form, *row) for row in rows]
        if {*cells} != {DASH}:
            columns[name] = pd.Series(cells, frame.index)

    text("n", ".0f", "n")
    text("win rate [95 %]", ".3f", "win_rate", "win_rate/low", "win_rate/high")
    for title, name, form in _controlled(frame):
        text(title, form, name)
    text("KL [95 %]", ".2f", *(f"kl{end}" for end in ("", "/low", "/high")))
    if "kl_bound" in frame:  # of best of n
        kl = columns.get("KL [95 %]", pd.Series(DASH, frame.index))
        columns["KL [95 %]"] = kl.where(kl != DASH, frame["kl_bound"].map("at most {:.2f}".format, na_action="ignore"))
        columns["KL [95 %]"] = columns["KL [95 %]"].fillna(DASH)
    for title, name, form in _measured(frame, "round" in columns):
        text(title, form, name)
    return pd.DataFrame(columns)


def _cell(form: str, value: float | None, *ends: float | None) -> str:
    """A value, with its interval if it has one: of a single response nothing tells the spread. No zero has a sign."""
    if pd.isna(value):
        return DASH
    known = ends and not any(map(pd.isna, ends))
    return f"{value:z{form}}" + (f" [{', '.join(f'{end:z{form}}' for end in ends)}]" if known else "")


def over_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """As `table`, with a row per setting of the other keys: mean ± standard deviation over its seeds."""
    keys = [key for key in dict.fromkeys(["beta", *swept(frame)]) if key in frame and key != "seed"]
    rows = []
    measures = (("win rate", "win_rate", ".3f"), *_controlled(frame), ("KL", "kl", ".2f"))
    measures += _measured(frame, "round" in keys)
    measures = tuple(one for one in measures if one[1] in frame and frame[one[1]].notna().any())
    for values, group in frame.groupby(keys, dropna=False, sort=False) if keys else [((), frame)]:
        row = dict(zip(keys, map(short, values), strict=True)) | {"seeds": str(len(group))}
        for title, name, form in measures:
            measured = group.get(name, pd.Series(dtype=float)).dropna()
            spread = f" ± {measured.std():{form}}" if len(measured) > 1 else ""
            row[title] = f"{measured.mean():z{form}}{spread}" if len(measured) else DASH
        rows.append(row)
    return pd.DataFrame(rows)


def _controlled(frame: pd.DataFrame) -> tuple[Measure, ...]:
    return (CONTROLLED,) if "win_rate_lc" in frame else ()


def _measured(frame: pd.DataFrame, has_rounds: bool) -> tuple[Measure, ...]:
    """The columns that every table has, and those that have something to say in this one."""
    shown = (one for one in DETECTORS if one[1] in frame and (pd.to_numeric(frame[one[1]]) > A_FEW).any())
    return (*MEASURED, *shown, *([OF_ROUNDS] if has_rounds else []))


def alarm(frame: pd.DataFrame) -> str | None:
    """A line that says which runs of `final` look broken, and how; None if none does: see `dpo.results.failures`."""
    broken = [(row, how) for row, run in enumerate(frame.to_dict("records")) if (how := failures(run))]
    if not broken:
        return None
    found, told = [], frame[swept(frame)].map(short)
    for row, how in broken[:LISTED]:
        settings = told.iloc[row].to_dict()
        own = {key: value for key, value in settings.items() if value != DASH}
        if told.eq(pd.Series(own))[[*own]].all(axis=1).sum() > 1:  # others have these and more
            own = {key: "null" if value == DASH else value for key, value in settings.items()}
        name = ", ".join(f"{key}={value}" for key, value in own.items()) or str(frame["run"].iloc[row])
        found.append(f"{name} ({', '.join(how)})")
    more = [f"and {len(broken) - LISTED} more"] if len(broken) > LISTED else []
    runs, look = ("run", "looks") if len(frame) == 1 else ("runs", "looks" if len(broken) == 1 else "look")
    return f"alarm: {len(broken)} of {len(frame)} {runs} {look} broken: {'; '.join([*found, *more])}"


def figure(frame: pd.DataFrame, path: str | Path, column: bool = False) -> "Figure":
    """Win rate and KL against beta, and one against the other, as a PNG and a PDF: see `dpo.results.figures`. Returns
    Matplotlib's figure, to change and save again.

    column: in the width of a paper's column.

    Raises: ValueError if there is no win rate or accuracy, or no number that it could be drawn over.
    """
    from dpo.results.figures import draw  # matplotlib takes half a second that the rest does without

    return draw(frame, Path(path), column)


def report(path: str | Path, named: Collection[str] = ()) -> None:
    """Print the table over the finished runs of `path`, and which of them look broken; write `table.csv`, and
    `figure.png` and `figure.pdf`, there. Of runs that make files and measure nothing, print where these are.

    named: damaged runs that the reader is told of elsewhere; the others are listed.
    """
    path = Path(path)
    wrong = damaged(path)
    for run, why in wrong.items():
        if run not in named:
            print(f"{run} is damaged and left out: {why}", flush=True)
    if made := sorted(file.parent for file in path.glob(f"*/{MADE}") if file.parent.name not in wrong):
        where = made[0] if len(made) == 1 else path / "*"
        files = sorted({file.name for run in made for file in run.iterdir() if file.suffix in (".jsonl", ".html")})
        print(f"\n{len(made)} finished in {path}: {', '.join(str(where / file) for file in files)}", flush=True)
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
    if not undrawable(frame):
        figure(frame, path / "figure.png")
        written += [path / "figure.png", path / "figure.pdf"]
    print(f"{len(frame)} finished in {path}: {', '.join(map(str, written))}", flush=True)
    if (said := alarm(frame)) is not None:
        print(said, flush=True)
