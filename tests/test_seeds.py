"""Intervals, differences by seed, choices without luck, and the state "degenerate", against hand-made frames."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.kl_strength import rising
from analysis.seeds import COLLAPSED, Interval, above, all_of, cell, chosen_by_others, grid, interval, paired
from analysis.token_level import end_against_rivals


def frame(**columns: list[float]) -> pd.DataFrame:
    rows = pd.DataFrame(columns)
    return rows.assign(broken=0.0)


def test_intervals_are_students():
    values = pd.Series([0.61, 0.72, 0.58, 0.69])
    found = interval(values)
    low, high = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert math.isnan(interval(values[:1]).half)
    assert interval(pd.Series([1.0, math.nan, 3.0])).seeds == 2


def test_intervals_cover():
    """A 95 % interval of 3 seeds holds the truth 95 times in 100."""
    draws = np.random.default_rng(0).normal(0.6, 0.05, (2000, 3))
    found = [interval(pd.Series(draw)) for draw in draws]
    assert np.mean([one.low <= 0.6 <= one.high for one in found]) == pytest.approx(0.95, abs=0.015)


def test_what_seeds_share_falls_out_of_a_difference():
    luck = [0.0, 0.1, 0.3]
    one = frame(seed=[0, 1, 2], score=[0.60 + x for x in luck])
    other = frame(seed=[2, 1, 0], score=[0.55 + x for x in luck[::-1]])
    found = paired(one, other)
    assert found.mean == pytest.approx(0.05)
    assert found.half == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("mean,verdict", [(0.2, "supports"), (0.05, "cannot decide"), (-0.2, "refutes")])
def test_verdicts(mean, verdict):
    assert above(Interval(mean, 0.1, 3)) == verdict
    assert above(Interval(mean + 0.5, 0.1, 3), 0.5) == verdict
    assert above(Interval(mean, math.nan, 1)) == "cannot decide"


def test_several_looks_hold_together():
    """Of ten true zeros, looked at together, one is called something else 5 times in 100 at most."""
    draws = np.random.default_rng(0).normal(0, 1, (500, 10, 5))
    seen = [any(above(interval(pd.Series(one), 10)) != "cannot decide" for one in draw) for draw in draws]
    assert np.mean(seen) < 0.07
    alone = [any(above(interval(pd.Series(one))) != "cannot decide" for one in draw) for draw in draws]
    assert np.mean(alone) > 0.3


@pytest.mark.parametrize("fall,verdict", [(0.0, "supports"), (0.2, "refutes")])
def test_rising(fall, verdict):
    """Accuracies that rise with every smaller beta, but fall at the last."""
    of_beta = {1.0: 0.5, 0.1: 0.6, 0.01: 0.7 - fall}
    chance = np.random.default_rng(0)
    rows = [(beta, seed, mean + chance.normal(0, 0.01)) for beta, mean in of_beta.items() for seed in range(8)]
    found = rising(pd.DataFrame(rows, columns=["beta", "seed", "accuracy"]), "accuracy")
    assert found.verdict == verdict
    assert ("from beta 0.1 to 0.01" in found.measured) == (verdict == "refutes")


@pytest.mark.parametrize("extra,verdict", [(0.0, "cannot decide"), (3.0, "supports"), (-3.0, "refutes")])
def test_whether_eos_falls_most(extra, verdict):
    """Where no item is special nothing is decided: the rival is chosen on other seeds."""
    chance = np.random.default_rng(1)
    rows = [
        {"seed": seed, "token": token, "end": token == "</s>", "difference": chance.normal(-1, 0.3), "occurrences": 50}
        for seed in range(6)
        for token in ["a", "b", "c", "d", "</s>"]
    ]
    items = pd.DataFrame(rows)
    items.loc[items["end"], "difference"] -= extra
    rare = items[items["token"] == "a"].assign(token="rare", occurrences=1, difference=-50.0)
    found, rivals = end_against_rivals(pd.concat([items, rare]))
    assert above(found) == verdict
    assert {*rivals} <= {"a", "b", "c", "d"}


def test_a_claim_of_parts():
    assert all_of(["supports", "supports"]) == "supports"
    assert all_of(["supports", "cannot decide"]) == "cannot decide"
    assert all_of(["supports", "cannot decide", "refutes"]) == "refutes"


def test_the_best_setting_is_chosen_by_the_other_seeds():
    """Settings that are equal but for luck: the best of each seed looks good, the one that others choose does not."""
    chance = np.random.default_rng(0)
    rows = [(seed, beta, chance.normal(0.6, 0.1)) for seed in range(200) for beta in (0.1, 1.0, 10.0)]
    runs = pd.DataFrame(rows, columns=["seed", "beta", "score"])
    assert runs.groupby("seed")["score"].max().mean() > 0.67
    picked = chosen_by_others(runs, "beta")
    assert picked["seed"].tolist() == list(range(200))
    assert picked["score"].mean() == pytest.approx(0.6, abs=0.02)
    alone = runs[runs["seed"] == 0]
    assert chosen_by_others(alone, "beta")["score"].item() == alone["score"].max()


def test_degenerate_is_a_state_of_its_own():
    healthy = frame(seed=[0, 1, 2], score=[0.6, 0.7, 0.8])
    assert cell(healthy, "score").startswith("0.700 ± 0.248")
    one = healthy.assign(broken=[0.9, 0.1, 0.1])
    assert cell(one, "score").endswith(f"(1 of 3 {COLLAPSED})")
    assert cell(healthy.assign(broken=[0.9, 0.6, 0.1]), "score") == COLLAPSED
    assert cell(healthy[:0], "score") == ""


def test_a_grid_has_a_row_per_beta_from_the_largest():
    runs = pd.DataFrame(
        {"beta": [0.1, 1.0, 0.1, 1.0], "lr": [1e-3, 1e-3, 5e-4, 5e-4], "score": [0.6, 0.7, 0.8, 0.9]}
    ).assign(broken=0.0)
    table = grid(runs, "beta", ["lr"], "score")
    assert table.index.tolist() == ["1", "0.1"]
    assert table.loc["1"].tolist() == ["0.700", "0.900"]
    missing = grid(runs[1:], "beta", ["lr"], "score")
    assert missing.loc["0.1", "0.001"] == ""
