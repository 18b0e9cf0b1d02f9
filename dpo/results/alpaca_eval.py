"""AlpacaEval 2: answers in its format, and win rates from its annotation files, offline.

    python -m dpo.results.alpaca_eval annotations.json --instructions alpaca_eval.json --gamed df_gamed.csv

Runs with evaluation.instructions=alpaca_eval.json write their answers; the alpaca_eval package has its judge annotate
them, in a folder of the run. Both files are of the data set tatsu-lab/alpaca_eval on the hub. Win rates are computed
here, because the package needs the network for them, and its standard error of the controlled one leaves out that of
the regression. They are kept in the run, as `alpaca_eval_scores.json`, which `dpo.results` reads.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dpo.data.instructions import Row, read_instructions, rows_of, write_json
from dpo.data.records import listed
from dpo.sweep.directory import SCORES
from dpo.win_rates import Z, sigmoid

Floats = NDArray[np.float64]

GAMED_WEIGHT = 0.1  # of a row of df_gamed.csv: 0.2, shared by the two rewritten baselines
RESAMPLES = 500


@dataclass(frozen=True)
class Rate:
    """A share with its 95 % interval; printed in percent, as AlpacaEval does."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} [{100 * self.low:.2f}, {100 * self.high:.2f}]"


def read_annotations(path: str | Path, instructions: Sequence[Row] = ()) -> list[Row]:
    """One judge's comparisons of one policy (output_2) with one baseline (output_1), one of each instruction.

    instructions: AlpacaEval's list, if known; what is there twice may be judged twice.
    Raises: ValueError if the file is none, compares several policies, holds several judges, an instruction again, or a
    preference outside of [1, 2].
    """
    rows = rows_of(path, "instruction", "output_1", "output_2", "generator_1", "generator_2")
    compared = sorted({(row["generator_1"], row["generator_2"]) for row in rows})
    if len(compared) > 1:
        raise ValueError(f"{path} must compare one policy with one baseline, found {compared}; split the file")
    judges = Counter(str(row.get("annotator")) for row in rows)
    if len(judges) > 1:
        found = ", ".join(f"{count} rows of {judge}" for judge, count in judges.most_common())
        raise ValueError(f"{path} must hold the annotations of one judge, found {found}; split the file")
    listed_times = Counter(row["instruction"] for row in instructions)
    repeated = [
        f"{times} x {instruction[:80]!r}"
        for instruction, times in Counter(row["instruction"] for row in rows).items()
        if times > max(1, listed_times[instruction])
    ]
    if repeated:
        raise ValueError(
            f"{path} must hold one annotation of each instruction, found more of {len(repeated)}:{listed(repeated)}\n"
            "Keep the row of one annotation run for each of them."
        )
    preferences = [row["preference"] for row in rows if row.get("preference") is not None]
    wrong = [value for value in preferences if not _is_preference(value)]
    if wrong or not preferences:
        found = f"{len(wrong)} others, such as {wrong[0]}" if wrong else "none"
        raise ValueError(f"{path}: preference must be from 1, baseline, to 2, policy, or 0 for a tie; found {found}")
    return rows


def _is_preference(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and (value == 0 or 1 <= value <= 2)


def judged(rows: Sequence[Row]) -> int:
    """Rows with a preference. A judge that gave none (null) decides nothing: as in the package, the plain win rate is a
    mean over the others alone, and the length-controlled one is predicted for all rows from what the others taught.
    """
    return sum(row.get("preference") is not None for row in rows)


def win_rate(rows: Sequence[Row]) -> Rate:
    """Mean preference for the policy, over the rows with one (see `judged`); ties one half."""
    preferences = _preferences(rows)
    preferences = preferences[~np.isnan(preferences)]
    half = Z * preferences.std(ddof=1) / np.sqrt(len(preferences)) if len(preferences) > 1 else np.inf
    return Rate(preferences.mean(), max(0.0, preferences.mean() - half), min(1.0, preferences.mean() + half))


def read_gamed(path: str | Path) -> pd.DataFrame:
    """The package's df_gamed.csv: the difficulty of each instruction, and judgements of the baseline made longer and
    shorter, against itself.
    """
    if not Path(path).is_file():
        raise ValueError(f"df_gamed.csv must be at {path}, found no file; check the path")
    gamed = pd.read_csv(path)
    if missing := sorted({"index", "preference", "std_delta_len", "instruction_difficulty"} - set(gamed)):
        raise ValueError(f"{path} must be AlpacaEval's df_gamed.csv, found no column {', '.join(missing)}")
    return gamed


def length_controlled(rows: Sequence[Row], instructions: Sequence[Row], gamed: pd.DataFrame) -> Rate:
    """The win rate that a logistic regression predicts for answers as long as the baseline's (2404.04475).

    P(policy wins) = sigmoid(a tanh(standardized difference of lengths) + b difficulty of the instruction + c). The
    value is that of alpaca_eval 0.6 (length_controlled_v1); the interval is a bootstrap over instructions, which fits
    the regression again at the same penalty.

    gamed: see `read_gamed`; its judgements hold a near its value for the baseline.
    """
    if find_spec("sklearn") is None:
        raise ValueError(
            "length-controlled win rates need scikit-learn, found none; pip install -e '.[alpaca_eval]' -c "
            "constraints.txt"
        )
    difficulty = gamed.drop_duplicates("index").set_index("index")["instruction_difficulty"]
    indices = _indices(rows, instructions)
    if absent := sorted(set(indices) - set(difficulty.index)):
        raise ValueError(
            f"df_gamed.csv must hold the difficulty of every instruction, found none of {len(absent)}, such as number "
            f"{absent[0]}; take both files of one version of the data set"
        )
    same_length = np.stack([np.zeros(len(rows)), difficulty[indices], np.ones(len(rows))], axis=1)  # (N, 3)
    surplus = np.array([len(row["output_1"]) - len(row["output_2"]) for row in rows], dtype=np.float64)
    own = same_length.copy()
    own[:, 0] = np.tanh(surplus / (surplus.std(ddof=1) or 1))  # above 0 where the baseline is longer
    rewritten = [np.tanh(gamed["std_delta_len"]), gamed["instruction_difficulty"], np.zeros(len(gamed))]
    features = np.concatenate([np.stack(rewritten, axis=1), own])
    preferences = np.concatenate([gamed["preference"].to_numpy(np.float64), _preferences(rows)])
    weights = np.concatenate([np.full(len(gamed), GAMED_WEIGHT), np.ones(len(rows))])
    rated = ~np.isnan(preferences)
    features, preferences, weights = features[rated], preferences[rated], weights[rated]
    penalty = min(np.logspace(-4, 4, 10), key=lambda value: _held_out_loss(features, preferences, weights, value))

    def predicted(counts: Floats) -> float:
        """For a sample that holds each of the N rows so many times."""
        times = np.concatenate([np.ones(len(gamed)), counts])[rated]
        coefficients = _fit(features[times > 0], preferences[times > 0], (weights * times)[times > 0], penalty)
        return float(np.average(sigmoid(same_length @ coefficients), weights=counts))

    resampled = np.random.default_rng(0).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=RESAMPLES)
    low, high = np.quantile([predicted(counts.astype(np.float64)) for counts in resampled], [0.025, 0.975])
    return Rate(predicted(np.ones(len(rows))), float(low), float(high))


def _fit(features: Floats, preferences: Floats, weights: Floats, penalty: float) -> Floats:
    """Coefficients of a logistic regression on preferences: every row counts as a win and as a loss, in these shares.

    penalty: inverse strength of the L1 penalty.
    """
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=penalty, l1_ratio=1, solver="liblinear", fit_intercept=False, random_state=123)
    shares = np.concatenate([preferences * weights, (1 - preferences) * weights])
    model.fit(np.concatenate([features, features]), np.repeat([1, 0], len(features)), shares)
    return model.coef_[0]  # (3,)


def _held_out_loss(features: Floats, preferences: Floats, weights: Floats, penalty: float) -> float:
    """Log loss in five-fold cross-validation; the folds are those of the package."""
    from sklearn.model_selection import GroupKFold

    losses = []
    for rest, held in GroupKFold(5).split(features, groups=np.arange(len(features))):
        p = sigmoid(features[held] @ _fit(features[rest], preferences[rest], weights[rest], penalty))
        p, wins = p.clip(1e-15, 1 - 1e-15), preferences[held]
        losses.append(-(weights[held] * (wins * np.log(p) + (1 - wins) * np.log(1 - p))).mean())
    return float(np.mean(losses))


def _preferences(rows: Sequence[Row]) -> Floats:
    """Preference for the policy, from 0 to 1; NaN where the judge gave none."""
    given = [np.nan if row.get("preference") is None else row["preference"] for row in rows]
    preferences = np.array(given, dtype=np.float64)
    return np.where(preferences == 0, 1.5, preferences) - 1


def _indices(rows: Sequence[Row], instructions: Sequence[Row]) -> list[int]:
    """Position of each row's instruction in AlpacaEval's list, whatever the order of the rows."""
    free: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(instructions):
        free[row["instruction"]].append(index)
    indices = [free[row["instruction"]].pop(0) if free[row["instruction"]] else -1 for row in rows]
    if unknown := indices.count(-1):
        raise ValueError(
            f"every annotation must be of one of the {len(instructions)} instructions, once; found {unknown} others, "
            f"such as {rows[indices.index(-1)]['instruction'][:80]!r}"
        )
    return indices


def keep(annotations: Path, scores: dict[str, Rate], judged: int) -> None:
    """Write the scores, and how many judgements they are from, into the run that the annotations lie in, if they do."""
    for folder in annotations.absolute().parents[:2]:
        if (folder / "evaluation.json").exists():
            kept: dict[str, float] = {"alpaca_eval/judged": judged}
            for name, rate in scores.items():
                key = f"alpaca_eval/{name}"
                kept |= {key: rate.value, f"{key}/low": rate.low, f"{key}/high": rate.high}
            write_json(folder / SCORES, kept)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dpo.results.alpaca_eval", description="Win rates of annotated answers."
    )
    parser.add_argument("annotations", nargs="+", help="annotations.json of the alpaca_eval package, one per policy")
    parser.add_argument("--instructions", help="alpaca_eval.json; with --gamed for length-controlled win rates")
    parser.add_argument("--gamed", help="df_gamed.csv")
    options = parser.parse_args()
    if (options.instructions is None) != (options.gamed is None):
        parser.error("--instructions and --gamed go together: length-controlled win rates need both")
    table = []
    try:
        instructions = read_instructions(options.instructions)
        for path in options.annotations:
            rows = read_annotations(path, instructions)
            row = {"policy": rows[0]["generator_2"], "baseline": rows[0]["generator_1"]}
            row["judged"] = f"{judged(rows)} of {len(instructions or rows)}"
            scores = {"win_rate": win_rate(rows)}
            if options.gamed is not None:
                scores["length_controlled"] = length_controlled(rows, instructions, read_gamed(options.gamed))
            keep(Path(path), scores, judged(rows))
            row |= {f"{name.replace('_', ' ')}, % [95 %]": rate for name, rate in scores.items()}
            table.append(row | {"characters": f"{np.mean([len(answer['output_2']) for answer in rows]):.0f}"})
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(pd.DataFrame(table).to_string(index=False))


if __name__ == "__main__":
    main()
