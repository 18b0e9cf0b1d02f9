"""Numbers over seeds: intervals, the best of a grid, verdicts on a claim, and cells that can say "degenerate".

Where a method is shown at its best beta nobody knows which that is, and the one that looks best has been lucky. So what
is estimated is the difference of the best true means, max over b of mu(b) minus max over c of nu(c), and its interval
(`best_minus_best`) holds it whichever they are. `python -m analysis.coverage` shows how often.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import inf, isfinite, isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import binomtest
from scipy.stats import t as student

from dpo import results
from dpo.results import degenerate, short
from dpo.results.failures import INITIAL
from dpo.results.frames import BEATEN
from dpo.sweep.directory import folders, no_sweep

Floats = NDArray[np.float64]

# What a run's score may be: how it is shown, its unit, and the margin within which two settings count as equivalent.
# Win rates here lie 0.1 to 0.4 apart, length-controlled ones in 2407.13709 2 to 9 points.
SCORES = {
    "alpaca_eval/length_controlled": (".2f", 100.0, 1.0),
    "win_rate": (".3f", 1.0, 0.05),
    "rewards/accuracies": (".3f", 1.0, 0.01),
}
JUDGED = ("alpaca_eval/length_controlled", "win_rate")  # the scores of a study that names no other
MEASURES = {  # beside the score: title, measure and format
    "policy accuracy": ("logps/accuracies", ".3f"),
    "length": ("length", ".1f"),
    "correct": ("correct", ".2f"),
    "wrong": ("wrong", ".2f"),
    "any wrong": ("any_wrong", ".3f"),
    "valid": ("valid", ".3f"),
    "KL": ("kl", ".1f"),
    "ended": ("ended", ".3f"),
}
COLLAPSED = "degenerate"  # a state of a cell, neither a number nor missing
UNDECIDED = "undecided"
MOST_SEEDS = 1000  # beyond which the seeds that a verdict would take are not counted


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % interval; that of one seed is infinite, since it says nothing of the spread.

    looks: of the Bonferroni correction that it holds.
    """

    mean: float
    low: float
    high: float
    seeds: int
    looks: int = 1

    @property
    def half(self) -> float:
        """The wider of its sides."""
        return max(self.mean - self.low, self.high - self.mean)

    @property
    def alike(self) -> bool:
        """Whether both of two seeds have one value, as shares of few prompts may: nothing is known of the spread."""
        return self.seeds == 2 and self.half < 1e-9

    def __neg__(self) -> "Interval":
        return Interval(-self.mean, -self.high, -self.low, self.seeds, self.looks)

    def __str__(self) -> str:
        if isnan(self.mean):
            return "not measured"
        return f"{self.mean:.3f} " + (f"[{self.low:.3f}, {self.high:.3f}]" if isfinite(self.half) else "(no interval)")


UNMEASURED = Interval(nan, -inf, inf, 0)


@dataclass(frozen=True)
class Finding:
    """What a claim comes to here."""

    claim: str
    measured: str
    verdict: str  # supports | refutes | equivalent | undecided


def half_width(seeds: Floats, looks: float = 1) -> Floats:
    """Half a 95 % interval (Student's t) in units of the standard deviation over seeds; infinite below two seeds."""
    with np.errstate(divide="ignore"):
        width = student.ppf(1 - 0.025 / looks, np.maximum(seeds - 1, 1)) / np.sqrt(seeds)
    return np.where(seeds > 1, width, inf)


def interval(values: pd.Series, looks: int = 1) -> Interval:
    """looks: differences that are looked at together, all of which shall hold 95 times in 100 (Bonferroni)."""
    known = values.dropna()
    if known.empty:
        return UNMEASURED
    mean, n = float(known.mean()), len(known)
    half = float(half_width(np.array(float(n)), looks)) * (float(known.std()) if n > 1 else 1.0)
    return Interval(mean, mean - half, mean + half, n, looks)


def of_best(mine: Floats, theirs: Floats, looks: float = 1) -> tuple[Floats, Floats, Floats]:
    """Mean, low and high of the best mean of `mine` minus that of `theirs`, paired by seed, at 95 %.

    mine, theirs: (..., seeds, settings), NaN where a run is missing. D(b, c), the difference of settings b and c, has
    the interval [l(b, c), h(b, c)]; that of the difference of the best is [max_b min_c l(b, c), min_c max_b h(b, c)].
    Let c* be the best of `theirs`. The lower end is wrong only if some l(b, c*) is above D(b, c*): as many looks as
    `mine` has settings, whatever `theirs` has; the upper end likewise with those of `theirs`. So a correction by the
    settings of one side is enough for each end, in ties and apart.
    """
    difference = mine[..., :, :, None] - theirs[..., :, None, :]  # (..., seeds, mine, theirs)
    known = ~np.isnan(difference)
    n = known.sum(-3).astype(np.float64)
    mean = np.where(known, difference, 0).sum(-3) / np.maximum(n, 1)
    squares = np.where(known, (difference - mean[..., None, :, :]) ** 2, 0).sum(-3)
    spread = np.where(n > 1, np.sqrt(squares / np.maximum(n - 1, 1)), 1.0)  # of one seed: any, the interval is infinite
    low = mean - spread * half_width(n, looks * mine.shape[-1])
    high = mean + spread * half_width(n, looks * theirs.shape[-1])
    return mean.min(-1).max(-1), low.min(-1).max(-1), high.max(-2).min(-1)


def best_minus_best(
    one: pd.DataFrame, other: pd.DataFrame, key: str = "beta", value: str = "score", looks: int = 1
) -> Interval:
    """`one` minus `other`, each at its best setting of `key`, with the interval of `of_best`. A setting counts where
    each side has it for a seed, so noise that both share (SFT, pairs, test articles) falls out.
    """
    if one.empty or other.empty or value not in one or value not in other:
        return UNMEASURED
    mine, theirs = wide(one, key, value), wide(other, key, value)
    seeds = mine.index.intersection(theirs.index)
    mine, theirs = (side.loc[seeds].dropna(axis="columns", how="all") for side in (mine, theirs))
    if mine.empty or theirs.empty:
        return UNMEASURED
    mean, low, high = of_best(mine.to_numpy(float), theirs.to_numpy(float), looks)
    return Interval(float(mean), float(low), float(high), len(seeds), looks * max(mine.shape[1], theirs.shape[1]))


def best(same: pd.DataFrame, key: str = "beta", value: str = "score", looks: int = 1) -> Interval:
    """The mean at the best setting of `key`, as `best_minus_best` of one side alone."""
    nothing = pd.DataFrame({"seed": same["seed"].unique(), key: 0.0, value: 0.0})
    return best_minus_best(same, nothing, key, value, looks)


def wide(frame: pd.DataFrame, key: str, value: str) -> pd.DataFrame:
    """A row per seed and a column per setting of `key`.

    Raises: ValueError if a setting has two runs of a seed.
    """
    alike = frame[frame.duplicated([key, "seed"])]
    if len(alike):
        found = alike.iloc[0]
        raise ValueError(f"each {key} must have a run per seed, found two at {key}={found[key]}, seed={found['seed']}")
    return frame.pivot(index="seed", columns=key, values=value)


def slopes(frame: pd.DataFrame, value: str = "score") -> pd.DataFrame:
    """Change of `value` for ten times the beta, by least squares, of each seed that has every beta."""
    values = wide(frame, "beta", value).dropna()
    if values.shape[1] < 2 or values.empty:
        return pd.DataFrame({"seed": [], "slope": []})
    steepness = np.polyfit(np.log10(values.columns.to_numpy(float)), values.to_numpy(float).T, 1)[0]
    return pd.DataFrame({"seed": values.index, "slope": steepness})


def at_best(frame: pd.DataFrame, key: str = "beta") -> pd.DataFrame:
    """The runs at the setting of `key` that has the best mean score: lucky ones, whose intervals do not know it."""
    return frame[frame[key] == frame.groupby(key)["score"].mean().idxmax()] if len(frame) else frame


def paired(one: pd.DataFrame, other: pd.DataFrame, value: str = "score", looks: int = 1) -> Interval:
    """`one` minus `other`, which hold a run per seed: noise that both share (SFT, pairs, test articles) falls out."""
    return best_minus_best(one.assign(all=""), other.assign(all=""), "all", value, looks)


def verdict(found: Interval, bound: float = 0.0, margin: float = 0.0) -> str:
    """On the claim that the mean is above `bound`. equivalent: the whole interval is within `margin` of it, which is
    stricter than two one-sided tests of 5 %; that zero is inside an interval says no such thing. Two seeds with
    one value, other than the bound, decide nothing.
    """
    if found.alike and abs(found.mean - bound) > 1e-9:
        return UNDECIDED
    if found.low > bound:
        return "supports"
    if found.high < bound:
        return "refutes"
    return "equivalent" if bound - margin < found.low and found.high < bound + margin else UNDECIDED


def seeds_to_decide(found: Interval, bound: float = 0.0, margin: float = 0.0) -> int | None:
    """Seeds with which an interval of this mean and spread leaves `bound` out, or is within `margin` of it.

    A guess, as good as the mean. None if nothing is known of the spread, or `MOST_SEEDS` are not enough.
    """
    if not isfinite(found.half):
        return None
    away = abs(found.mean - bound)
    n = np.arange(2.0, MOST_SEEDS + 1)
    spread = found.half / float(half_width(np.array(float(found.seeds)), found.looks))
    enough = n[spread * half_width(n, found.looks) < max(away, margin - away)]
    return int(enough[0]) if len(enough) else None


def holds(claim: str, what: str, found: Interval, bound: float = 0.0, margin: float = 0.0) -> Finding:
    """The claim that something, which `what` names and `found` measures, is above `bound`."""
    decided = verdict(found, bound, margin)
    return Finding(claim, f"{what}: {found}{to_decide([(found, bound)], decided, margin)}", decided)


def to_decide(parts: Sequence[tuple[Interval, float]], decided: str, margin: float = 0.0) -> str:
    """The seeds that an undecided claim takes, each part of which is above its bound."""
    measured = [(found, bound) for found, bound in parts if isfinite(found.half)]
    if decided != UNDECIDED or len(measured) < len(parts):
        return ""
    if any(found.alike for found, _ in measured):
        return " (both seeds are alike: nothing is known of the spread)"
    needed = [seeds_to_decide(found, bound, margin) for found, bound in measured]
    known = [one for one in needed if one is not None]
    return f" (about {max(known)} seeds decide)" if len(known) == len(needed) else f" (above {MOST_SEEDS} seeds decide)"


def unmeasured(claim: str, needs: str) -> Finding:
    """A claim for which runs are missing: listed all the same, with what it takes."""
    return Finding(claim, f"not measured: {needs}", UNDECIDED)


def more_often(claim: str, one: pd.DataFrame, other: pd.DataFrame, names: tuple[str, str]) -> Finding:
    """The claim that runs of `one` are degenerate more often than those of `other`, by an exact two-sided test of the
    seeds of which only one is (McNemar 1947): an interval of a few zeros and ones would be none.
    """
    pairs = pd.DataFrame({"one": degenerate(one.set_index("seed")), "other": degenerate(other.set_index("seed"))})
    pairs = pairs.dropna().astype(bool)
    if pairs.empty:
        return unmeasured(claim, "it takes runs of both, of the same seeds")
    only, only_other = int((pairs["one"] & ~pairs["other"]).sum()), int((~pairs["one"] & pairs["other"]).sum())
    p = exact(only, only_other)
    decided = UNDECIDED if p >= 0.05 else "supports" if only > only_other else "refutes"
    n = len(pairs)
    needed = (seeds for seeds in range(n, MOST_SEEDS) if exact(only * seeds // n, only_other * seeds // n) < 0.05)
    more = f" (about {next(needed, MOST_SEEDS)} seeds decide)" if decided == UNDECIDED and only != only_other else ""
    counts = f"{pairs['one'].sum()} of {n} seeds at {names[0]}, {pairs['other'].sum()} at {names[1]}"
    return Finding(claim, f"degenerate are {counts}: exact p = {p:.3f}{more}", decided)


def exact(one: int, other: int) -> float:
    """Two-sided binomial p of so many against so many, at even chances."""
    return float(binomtest(one, one + other).pvalue) if one + other else 1.0


def all_of(verdicts: Sequence[str]) -> str:
    """The verdict on a claim of several parts: one refuted refutes it, all must hold to support it."""
    known = set(verdicts)
    if "refutes" in known or UNDECIDED in known:
        return "refutes" if "refutes" in known else UNDECIDED
    return "supports" if known == {"supports"} else "equivalent"


def all_hold(claim: str, what: str, parts: Mapping[str, Interval], margin: float = 0.0) -> Finding:
    """The claim that each of the parts is above 0, whose intervals hold together if they have as many looks."""
    decided = all_of([verdict(found, 0.0, margin) for found in parts.values()])
    told = ", ".join(f"{name}: {found}" for name, found in parts.items())
    return Finding(
        claim, f"{what}, {told}{to_decide([(one, 0.0) for one in parts.values()], decided, margin)}", decided
    )


def finished(
    path: str | Path,
    keys: Sequence[str],
    only: Mapping[str, str],
    shown: Sequence[str] = (),
    scores: Sequence[str] = JUDGED,
    optional: Sequence[str] = (),
) -> pd.DataFrame:
    """`results.final` where each key of `only` has that value, with columns `score`, the first of `scores` that every
    run has, `scored_by`, which of them, and `untrained`, whether the run has measured a policy before training
    (steps=0).

    shown: further settings that are columns. scores: of `SCORES`. That of AlpacaEval, in percent, is there where
    `dpo.results.alpaca_eval` has added it to the runs. A study without a judge asks for the accuracy on held-out pairs.
    optional: those of `keys` that a run may lack.

    Raises: ValueError if there is no such run, key or score, none is trained, a trained run lacks a key that is not
    optional, or two runs differ in none of `keys`.
    """
    frame = results.final(path, [*dict.fromkeys([*keys, *shown, "policy", *only])])
    for key, value in only.items():
        if key not in frame and len(frame):
            known = sorted(column for column in {*results.swept(frame), *keys, "policy"} if column in frame)
            near = get_close_matches(key, known, 1)
            raise ValueError(
                f"{key}={value} must name a key of the runs in {path}, found none called {key}; "
                + (f"is {near[0]} meant?" if near else f"they differ in {', '.join(known)}")
            )
        frame = frame[frame[key].map(lambda found, wanted=value: same_value(found, wanted))] if len(frame) else frame
    if frame.empty:
        if not folders(Path(path)):
            raise ValueError(no_sweep(Path(path)))
        raise ValueError(
            f"{path} must hold finished runs{''.join(f' of {k}={v}' for k, v in only.items())}, found none"
        )
    steps = frame.get("steps", pd.Series(nan, frame.index))
    frame = frame.assign(untrained=pd.to_numeric(steps, errors="coerce") == 0)
    if trained(frame).empty:
        raise ValueError(f"{path} must hold runs of steps above 0, found none: train some")
    complete(path, trained(frame), [key for key in keys if key not in optional])
    apart(path, frame, [key for key in keys if key in frame])
    known = [score for score in scores if score in frame and frame[score].notna().all()]
    if not known:
        unscored = frame[frame.reindex(columns=list(scores)).isna().all(axis=1)]["run"].tolist()
        needed = "a win rate or, where no judge is at hand, the scores that python -m dpo.results.alpaca_eval adds"
        lacking = ", ".join(unscored[:3]) or "some have one, some the other: all"
        asked = needed if scores is JUDGED else " or ".join(scores)
        raise ValueError(f"every run in {path} needs {asked}; {lacking} have none")
    return frame.assign(score=frame[known[0]] * SCORES[known[0]][1], scored_by=known[0])


def trained(final: pd.DataFrame) -> pd.DataFrame:
    return final[~final["untrained"]]


def parted(final: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The trained runs, and one untrained run (steps=0) per seed: beta and lr, which it was told, are nothing to it."""
    return trained(final), final[final["untrained"]].drop_duplicates("seed")


def before_training(final: pd.DataFrame) -> str:
    """The cell of the policy before training. A win rate over it is one half, its own."""
    return cell(parted(final)[1], "score") or ("0.500" if over_initial(final) else "")


def over_initial(final: pd.DataFrame) -> bool:
    """Whether all scores are win rates over the policy before training."""
    return bool(final["scored_by"].eq("win_rate").all()) and results.beaten(final) == BEATEN[INITIAL]


def same_value(found: Any, wanted: str) -> bool:
    """Whether a setting has the value that a command line names: 5e-4 is 0.0005."""
    try:
        return float(found) == float(wanted)
    except (TypeError, ValueError):
        return short(found) == wanted


def complete(path: str | Path, frame: pd.DataFrame, keys: Sequence[str]) -> None:
    """Raise if a run has no value of a key by which a study tells runs apart: it would be in none of its tables."""
    lacking = frame.reindex(columns=list(keys)).isna()
    for key in keys:
        if without := frame["run"][lacking[key]].tolist():
            raise ValueError(
                f"each run in {path} must have {key}, by which this study tells runs apart, found none in "
                f"{'any of them' if len(without) == len(frame) else without[0]}; take the folder of the study's own "
                "sweep (experiments/README.md lists them), or leave others out by KEY=VALUE"
            )


def apart(path: str | Path, frame: pd.DataFrame, keys: list[str]) -> None:
    """Raise if two runs would count as two seeds of one setting."""
    policy = [key for key in ("policy",) if key in frame]
    alike = frame[frame.duplicated([*keys, *policy, "untrained"], keep=False) & ~frame["untrained"]]
    if len(alike):
        twins = next(iter(alike.groupby([*keys, *policy], dropna=False)["run"]))[1].tolist()
        others = [key for key in results.swept(frame) if key in alike and key not in keys and alike[key].nunique() > 1]
        said = " or ".join(f"{others[0]}={short(value)}" for value in alike[others[0]].unique()) if others else ""
        raise ValueError(
            f"the runs in {path} must differ in {', '.join(keys)}, found {' and '.join(twins[:2])}"
            + (f"; one {others[0]} at a time: say {said}" if others else "; move one of them away")
        )


def margin(frame: pd.DataFrame) -> float:
    """Within which two settings of these runs count as equivalent, in their score."""
    return SCORES[frame["scored_by"].iloc[0]][2] if len(frame) else 0.0


def cell(
    same: pd.DataFrame, value: str, form: str | None = None, found: Interval | None = None, counted: bool = False
) -> str:
    """Mean ± 95 % interval over the seeds of a setting, or "degenerate" where most of them are.

    Where a few are, the mean holds them too and the cell says how many: without them a setting that often collapses
    would look better than it is. It also says where not all seeds have the value. found: another interval of it.
    counted: the table counts degenerate runs in a column of its own, so the cell has its number without a word of them.
    """
    if same.empty or value not in same or same[value].isna().all():
        return ""
    if form is None:
        form = SCORES[same["scored_by"].iloc[0]][0] if value == "score" else ".3f"
    broken, known = 0 if counted else int(degenerate(same).sum()), int(same[value].notna().sum())
    if 2 * broken > len(same):
        return COLLAPSED
    half = f" ± {interval(same[value]).half:{form}}" if known > 1 else ""
    text = f"{same[value].mean():{form}}{half}"
    if found is not None and isfinite(found.half):
        text = f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"
    notes = [f"{broken} of {len(same)} {COLLAPSED}"] if broken else []
    notes += [f"of {known} of {len(same)} seeds"] if known < len(same) else []
    return text + (f" ({', '.join(notes)})" if notes else "")


def grid(
    frame: pd.DataFrame,
    row: str,
    columns: Sequence[str],
    value: str,
    form: str | None = None,
    name: Callable[[Any], str] = str,
) -> pd.DataFrame:
    """A cell for each value of `row`, from the largest down, and each combination of `columns`, as text."""
    table: dict[str, dict[str, str]] = {}
    for combination, of_column in frame.groupby(list(columns), sort=False):
        title = name(", ".join(map(short, combination)))
        table[title] = {short(at): cell(same, value, form) for at, same in of_column.groupby(row)}
    order = [short(at) for at in sorted(frame[row].unique(), reverse=True)]
    return pd.DataFrame(table).reindex(order).fillna("").rename_axis(row)


def measures(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """A row per setting of `keys`: score, and what else was measured, without which a score says little."""
    rows = {}
    for setting, same in frame.groupby(list(keys), sort=False):
        found = {title: cell(same, value, form) for title, (value, form) in MEASURES.items()}
        rows[", ".join(map(short, setting))] = {"score": cell(same, "score")} | found
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(", ".join(keys))


def states(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """`measures`, and how many runs of a setting are degenerate."""
    broken = frame.assign(runs=degenerate(frame)).groupby(list(keys), sort=False)["runs"]
    return measures(frame, keys).assign(degenerate=[f"{int(runs.sum())} of {len(runs)}" for _, runs in broken])


def findings(found: Sequence[Finding]) -> pd.DataFrame:
    return pd.DataFrame([vars(one) for one in found], columns=["claim", "measured", "verdict"]).set_index("claim")
