"""Numbers over seeds: intervals, differences seed by seed, verdicts on a claim, and cells that can say "degenerate"."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan, sqrt
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import t as student

from dpo import runs
from dpo.runs import degenerate, short

SCORES = ("alpaca_eval/length_controlled", "win_rate")
COLLAPSED = "degenerate"  # a state of a cell, neither a number nor missing


@dataclass(frozen=True)
class Interval:
    """Mean over seeds, and half the width of its 95 % interval (Student's t); nan where one seed says nothing of it."""

    mean: float
    half: float
    seeds: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half:.3f}"


@dataclass(frozen=True)
class Finding:
    """What a claim comes to here."""

    claim: str
    measured: str
    verdict: str  # supports | refutes | cannot decide


def interval(values: pd.Series, looks: int = 1) -> Interval:
    """looks: differences that are looked at together, all of which shall hold 95 times in 100 (Bonferroni)."""
    values = values.dropna()
    n = len(values)
    half = float(student.ppf(1 - 0.025 / looks, n - 1)) * float(values.std()) / sqrt(n) if n > 1 else nan
    return Interval(float(values.mean()), half, n)


def above(found: Interval, bound: float = 0.0) -> str:
    """The verdict on the claim that the mean is above `bound`."""
    if isnan(found.half):
        return "cannot decide"
    return "supports" if found.low > bound else "refutes" if found.high < bound else "cannot decide"


def below(found: Interval, bound: float = 0.0) -> str:
    """The verdict on the claim that the mean is below `bound`."""
    return above(Interval(-found.mean, found.half, found.seeds), -bound)


def holds(claim: str, what: str, found: Interval, bound: float = 0.0) -> Finding:
    """The claim that something, which `what` names and `found` measures, is above `bound`."""
    return Finding(claim, f"{what}: {found}", above(found, bound))


def all_of(verdicts: Sequence[str]) -> str:
    """The verdict on a claim of several parts: one refuted refutes it, all must hold to support it."""
    known = set(verdicts)
    return "refutes" if "refutes" in known else "supports" if known == {"supports"} else "cannot decide"


def finished(path: str | Path, keys: Sequence[str], only: Mapping[str, str]) -> pd.DataFrame:
    """`runs.final` where each key of `only` has that value, with a column `score`: the length-controlled win rate of
    AlpacaEval where `dpo.alpaca_eval` has added it to the runs, else the win rate.

    Raises: ValueError if there is no such run or score.
    """
    frame = runs.final(path, [*keys, "policy"])
    for key, value in only.items():
        if key in frame:
            frame = frame[frame[key].map(short) == value]
    if frame.empty:
        raise ValueError(
            f"{path} must hold finished runs{''.join(f' of {k}={v}' for k, v in only.items())}, found none"
        )
    known = [score for score in SCORES if score in frame and frame[score].notna().all()]
    if not known:
        raise ValueError(
            f"every run in {path} needs a win rate or, where no judge is at hand, the scores that python -m "
            f"dpo.alpaca_eval adds; {', '.join(frame['run'][:3])} have none"
        )
    return frame.assign(score=frame[known[0]])


def paired(one: pd.DataFrame, other: pd.DataFrame, value: str = "score", looks: int = 1) -> Interval:
    """`one` minus `other`, which hold a run per seed: noise that both share (SFT, pairs, test articles) falls out."""
    return interval(one.set_index("seed")[value] - other.set_index("seed")[value], looks)


def chosen_by_others(frame: pd.DataFrame, key: str, value: str = "score") -> pd.DataFrame:
    """A run per seed: at the setting of `key` that is best on average over the other seeds.

    Whoever picks the best setting and reports it on the same runs reports luck too. The choices of different seeds
    depend on each other: where settings are equal but for luck, an interval of these runs holds the truth 85 times in
    100 for five seeds, and not 95.
    """
    picked = []
    for seed, mine in frame.groupby("seed"):
        others = frame[frame["seed"] != seed] if frame["seed"].nunique() > 1 else frame
        best = others.groupby(key)[value].mean().idxmax()
        picked.append(mine[mine[key] == best])
    return pd.concat(picked) if picked else frame


def cell(same: pd.DataFrame, value: str, form: str = ".3f") -> str:
    """Mean ± 95 % interval over the seeds of a setting, or "degenerate" where most of them are.

    Where a few are, the mean holds them too and the cell says how many: without them a setting that often collapses
    would look better than it is.
    """
    if same.empty or value not in same:
        return ""
    broken = int(degenerate(same).sum())
    if 2 * broken > len(same):
        return COLLAPSED
    found = interval(same[value])
    half = "" if isnan(found.half) else f" ± {found.half:{form}}"
    return f"{found.mean:{form}}{half}" + (f" ({broken} of {len(same)} {COLLAPSED})" if broken else "")


def grid(
    frame: pd.DataFrame,
    row: str,
    columns: Sequence[str],
    value: str,
    form: str = ".3f",
    name: Callable[[Any], str] = str,
) -> pd.DataFrame:
    """A cell for each value of `row`, from the largest down, and each combination of `columns`, as text."""
    table: dict[str, dict[str, str]] = {}
    for combination, of_column in frame.groupby(list(columns), sort=False):
        title = name(", ".join(map(short, combination)))
        table[title] = {short(at): cell(same, value, form) for at, same in of_column.groupby(row)}
    order = [short(at) for at in sorted(frame[row].unique(), reverse=True)]
    return pd.DataFrame(table).reindex(order).fillna("").rename_axis(row)


def findings(found: Sequence[Finding]) -> pd.DataFrame:
    return pd.DataFrame([vars(one) for one in found], columns=["claim", "measured", "verdict"]).set_index("claim")
