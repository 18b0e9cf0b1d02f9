"""Intervals, differences by seed, choices without luck, and the state "degenerate", against hand-made frames."""

import math
import runpy
import shutil

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sweeps import student
from test_published import run

from analysis import (
    coverage,
    dynamic_beta,
    kl_strength,
    label_noise,
    objectives,
    reference_compatibility,
    seeds,
    summarization,
    token_level,
)
from analysis.kl_strength import rising
from analysis.seeds import (
    COLLAPSED,
    JUDGED,
    SCORES,
    Interval,
    all_of,
    at_best,
    best,
    best_minus_best,
    cell,
    grid,
    holds,
    interval,
    margin,
    measures,
    more_often,
    paired,
    seeds_to_decide,
    to_decide,
    verdict,
)
from analysis.token_level import end_against_rivals


def frame(**columns: list[float]) -> pd.DataFrame:
    rows = pd.DataFrame(columns)
    return rows.assign(broken=0.0, scored_by="win_rate")


def test_intervals_are_students():
    values = pd.Series([0.61, 0.72, 0.58, 0.69])
    found = interval(values)
    low, high = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert (interval(values[:1]).low, interval(values[:1]).high) == (-math.inf, math.inf)
    assert str(interval(values[:0])) == "not measured"
    assert interval(pd.Series([1.0, math.nan, 3.0])).seeds == 2
    looked = interval(values, 4)
    low, high = stats.t.interval(1 - 0.05 / 4, 3, loc=values.mean(), scale=stats.sem(values))
    assert (looked.low, looked.high, looked.looks) == (pytest.approx(low), pytest.approx(high), 4)
    back = -Interval(1.0, -1.0, 1.5, 4, 2)
    assert (back.mean, back.low, back.high, back.seeds, back.looks, back.half) == (-1.0, -1.5, 1.0, 4, 2, 2.0)


def test_an_end_that_rounds_to_zero_keeps_its_sign():
    """Which says on what side of zero the interval is."""
    assert str(Interval(-0.01, -0.02, -1e-4, 3)) == "-0.010 [-0.020, -0.000]"
    assert cell(frame(seed=[0], score=[0.5]), "score", found=Interval(0.01, 1e-4, 0.02, 3)) == "0.010 [0.000, 0.020]"


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
    with pytest.raises(ValueError, match="a run per seed"):
        paired(pd.concat([one, one]), other)


def test_runs_are_paired_by_seed():
    """Whatever the order of the runs, and where each side has a seed that the other lacks."""
    luck = {0: 0.0, 1: 0.3, 2: -0.2, 3: 0.5, 4: -0.4}
    noise = {1: 0.01, 2: -0.02, 3: 0.02}
    one = frame(seed=[3, 0, 2, 1], score=[0.6 + luck[seed] for seed in (3, 0, 2, 1)])
    other = frame(seed=[1, 2, 3, 4], score=[0.5 + luck[seed] - noise.get(seed, 0) for seed in (1, 2, 3, 4)])
    for looks in (1, 3):
        found = paired(one, other, looks=looks)
        expected = student(0.1 + np.array([*noise.values()]), looks)
        assert (found.mean, found.low, found.high) == pytest.approx(expected)
        assert (found.seeds, found.looks) == (3, looks)


def symmetric(mean: float, half: float, seeds: int = 3) -> Interval:
    return Interval(mean, mean - half, mean + half, seeds)


@pytest.mark.parametrize(
    "mean,half,said",
    [
        *[(0.2, 0.1, "supports"), (-0.2, 0.1, "refutes"), (0.05, 0.1, "undecided"), (0.0, 0.1, "undecided")],
        *[(0.01, 0.03, "equivalent"), (-0.01, 0.03, "equivalent"), (0.03, 0.04, "undecided"), (0.03, 0.01, "supports")],
        *[(0.1, 0.1, "undecided"), (-0.1, 0.1, "undecided"), (0.0, 0.05, "undecided")],  # to touch is not to pass
        *[(-0.05, 0.1, "undecided"), (0.2, math.inf, "undecided"), (math.nan, math.inf, "undecided")],
    ],
)
def test_verdicts(mean, half, said):
    """Equivalent is what the whole interval says, and never its holding zero alone."""
    assert verdict(symmetric(mean, half), 0.0, 0.05) == said
    assert verdict(symmetric(mean + 0.5, half), 0.5, 0.05) == said
    if said == "equivalent":
        assert verdict(symmetric(mean, half)) == "undecided"  # without a margin


@pytest.mark.parametrize(
    "mean,seeds,said", [(0.1, 2, "undecided"), (0.04, 2, "undecided"), (0.0, 2, "equivalent"), (0.1, 3, "supports")]
)
def test_two_seeds_of_one_value_decide_nothing(mean, seeds, said):
    """Shares of forty prompts often have the same difference twice, as chance wants it; the same numbers have none."""
    found = interval(pd.Series([0.3 + mean - 0.3] * seeds))
    assert verdict(found, 0.0, 0.05) == said
    assert verdict(-found, 0.0, 0.05) == {"supports": "refutes"}.get(said, said)
    told = holds("a claim", "what", found, margin=0.05).measured
    assert ("both seeds are alike" in told) is (said == "undecided")


@pytest.mark.parametrize("mean,near", [(0.06, 0.05), (0.0, 0.05), (0.03, 0.0)])
def test_the_seeds_that_decide(mean, near):
    """With so many of the same mean and spread there is a verdict, with one fewer there is none."""
    spread = 0.1
    found = symmetric(mean, spread * stats.t.ppf(0.975, 4) / math.sqrt(5), 5)
    needed = seeds_to_decide(found, 0.0, near)
    said = [
        verdict(symmetric(mean, spread * stats.t.ppf(0.975, n - 1) / math.sqrt(n), n), 0.0, near)
        for n in (needed, needed - 1)
    ]
    assert said[0] in ("supports", "equivalent")
    assert said[1] == "undecided"
    assert f"(about {needed} seeds decide)" in holds("a claim", "what", found, margin=near).measured
    assert seeds_to_decide(symmetric(mean + 0.7, found.half, 5), 0.7, near) == needed
    assert seeds_to_decide(symmetric(0.0, 0.1)) is None
    assert seeds_to_decide(symmetric(0.1, math.inf, 1)) is None


def test_the_seeds_that_decide_together():
    """As many as the hardest part takes, and with several looks as many as it takes to hold them all."""
    spread = 0.1
    alone, together = (
        Interval(0.06, 0.06 - half, 0.06 + half, 5, looks)
        for looks in (1, 6)
        for half in [spread * stats.t.ppf(1 - 0.025 / looks, 4) / math.sqrt(5)]
    )
    expected = [
        next(n for n in range(2, 1000) if spread * stats.t.ppf(1 - 0.025 / looks, n - 1) / math.sqrt(n) < 0.06)
        for looks in (1, 6)
    ]
    assert [seeds_to_decide(alone), seeds_to_decide(together)] == expected
    parts = [(alone, 0.0), (together, 0.0)]
    assert (
        to_decide(parts, "undecided") == to_decide(parts[::-1], "undecided") == f" (about {expected[1]} seeds decide)"
    )
    assert to_decide(parts, "supports") == ""


def test_several_looks_hold_together():
    """Of ten true zeros, looked at together, one is called something else 5 times in 100 at most."""
    draws = np.random.default_rng(0).normal(0, 1, (150, 10, 5))
    seen = [any(verdict(interval(pd.Series(one), 10)) != "undecided" for one in draw) for draw in draws]
    assert np.mean(seen) < 0.07
    alone = [any(verdict(interval(pd.Series(one))) != "undecided" for one in draw) for draw in draws]
    assert np.mean(alone) > 0.3


@pytest.mark.parametrize(
    "broken,other,said", [(6, 0, "supports"), (5, 0, "undecided"), (4, 0, "undecided"), (0, 6, "refutes"), (0, 0, "")]
)
def test_rare_events_are_judged_exactly(broken, other, said):
    """Six seeds of ten against none: chance 2 / 2^6. Four: 1/8, where Student's interval of zeros and ones is sure."""
    one, two = (frame(seed=[*range(10)]).assign(broken=[1.0] * n + [0.0] * (10 - n)) for n in (broken, other))
    found = more_often("a claim", one, two, ("here", "there"))
    assert found.verdict == (said or "undecided")
    assert f"{broken} of 10 seeds at here, {other} at there: exact p = " in found.measured
    p = {6: 0.03125, 5: 0.0625, 4: 0.125, 0: 1.0}[max(broken, other)]
    assert f"p = {p:.3f}" in found.measured
    needed = {5: " (about 12 seeds decide)", 4: " (about 15 seeds decide)"}.get(broken, "")
    assert found.measured.endswith(f"p = {p:.3f}{needed}")


def test_rare_events_are_paired_by_seed():
    """A seed that collapses in both says nothing (McNemar), whatever the order of the runs."""
    order = [4, 0, 7, 2, 6, 1, 5, 3]
    one = frame(seed=order, score=[0.5] * 8).assign(broken=[0.9 if seed < 7 else 0.0 for seed in order])
    other = frame(seed=[*range(8)], score=[0.5] * 8).assign(broken=[0.9] * 3 + [0.0] * 5)
    found = more_often("a claim", one, other, ("here", "there"))
    assert found.verdict == "undecided"  # 4 against 0, and not 7 against 0
    assert "7 of 8 seeds at here, 3 at there: exact p = 0.125" in found.measured
    crossed = more_often("a claim", one, other.assign(broken=[0.0] * 7 + [0.9]), ("here", "there"))
    p = 2 * sum(math.comb(8, few) for few in (0, 1)) / 2**8
    assert f"7 of 8 seeds at here, 1 at there: exact p = {p:.3f}" in crossed.measured
    both = frame(seed=[*range(8)], score=[0.5] * 8)
    one, other = both.assign(broken=[0.9] * 6 + [0.0] * 2), both.assign(broken=[0.0] * 6 + [0.9] * 2)
    found = more_often("a claim", one, other, ("here", "there"))
    least = next(n for n in range(8, 99) if stats.binomtest(6 * n // 8, 6 * n // 8 + 2 * n // 8).pvalue < 0.05)
    assert found.measured.endswith(f" (about {least} seeds decide)")  # so many more collapse on either side


def test_simulated_sweeps_are_what_they_say():
    """Their means, their spread, what the runs of a seed share, and a collapse that costs nothing on average."""
    mine, theirs = coverage.sweeps(("tie", "apart"), 5, 4, 0.7, False, 0.0, 4000)
    assert mine.mean((0, 1)) == pytest.approx(0.7, abs=0.003)
    assert theirs.mean((0, 1)) == pytest.approx([0.7, 0.6, 0.5, 0.4], abs=0.003)
    assert mine.std((0, 1)) == pytest.approx(0.05, rel=0.03)
    for one, other in ((mine[..., 0], mine[..., 3]), (mine[..., 1], theirs[..., 2])):
        assert np.corrcoef(one.ravel(), other.ravel())[0, 1] == pytest.approx(0.7, abs=0.02)
    mine, _ = coverage.sweeps(("apart", "apart"), 5, 4, 0.5, True, 0.0, 4000)
    assert mine.std((0, 1)) == pytest.approx(np.array([1, 2, 3, 4]) * 0.05, rel=0.03)
    mine, _ = coverage.sweeps(("apart", "apart"), 5, 4, 0.5, False, 0.3, 4000)
    assert mine.mean((0, 1)) == pytest.approx([0.7, 0.6, 0.5, 0.4], abs=0.01)
    assert (mine[..., 3] < 0.3).mean() == pytest.approx(0.3, abs=0.02)


def test_chosen_by_others_by_hand():
    """Each seed at the beta that the other seeds' mean is best at, and the interval of SciPy."""
    rng, held = np.random.default_rng(0), []
    sides = rng.normal(0, 0.1, (2, 60, 5, 3))
    for trial in range(60):
        picked = []
        for side in sides[:, trial]:
            rows = [[other for other in range(5) if other != seed] for seed in range(5)]
            picked.append([side[seed, np.mean(side[others], axis=0).argmax()] for seed, others in enumerate(rows)])
        _, low, high = student(np.subtract(*picked))
        held.append(low <= 0 <= high)
    assert coverage.chosen_by_others(*sides) == pytest.approx(np.mean(held))
    assert 0 < np.mean(held) < 1


def test_the_simulation_takes_no_arguments(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["coverage", "runs/dev"])
    with pytest.raises(SystemExit):
        runpy.run_path(coverage.__file__, run_name="__main__")
    assert "unrecognized arguments: runs/dev" in capsys.readouterr().err


def test_intervals_of_the_best_hold_the_truth():
    """In ties, apart, with uneven and shared noise and collapses: 94 times in 100 at least, for 5 seeds and for 10."""
    table = coverage.table(trials=400, betas=(3, 6))
    assert len(table) == 64
    assert table["best minus best"].min() >= 0.94, table
    assert table["chosen by others"].min() < 0.82  # what looks fair is not
    # The correction is what it takes, and all that it takes, where one side ties and the other does not.
    mine, theirs = coverage.sweeps(("tie", "apart"), 10, 6, 0.0, False, 0.0, 2000)
    assert coverage.held(mine, theirs) < 0.985
    assert coverage.held(mine, theirs, looks=1 / 6) < 0.92


def test_the_best_of_a_grid():
    """By hand: two settings against one, of two seeds."""
    one = frame(beta=[0.1, 0.1, 1.0, 1.0], seed=[0, 1, 0, 1], score=[0.6, 0.7, 0.8, 0.6])
    other = frame(beta=[5.0, 5.0], seed=[0, 1], score=[0.5, 0.5])
    found = best_minus_best(one, other)
    once, twice = (stats.t.ppf(1 - 0.025 / looks, 1) / math.sqrt(2) for looks in (1, 2))
    means, spreads = (0.15, 0.2), (math.sqrt(0.005), math.sqrt(0.02))
    assert found.mean == pytest.approx(0.2)
    assert found.low == pytest.approx(max(mean - twice * spread for mean, spread in zip(means, spreads, strict=True)))
    assert found.high == pytest.approx(max(mean + once * spread for mean, spread in zip(means, spreads, strict=True)))
    back = best_minus_best(other, one)
    assert (back.mean, back.low, back.high) == pytest.approx((-found.mean, -found.high, -found.low))
    assert best(one).mean == pytest.approx(0.7)
    assert (found.looks, back.looks) == (2, 2)
    assert at_best(one)["beta"].unique().tolist() == [1.0]
    lucky = frame(beta=[0.1, 0.1, 1.0, 1.0], seed=[0, 1, 0, 1], score=[0.9, 0.1, 0.6, 0.7])
    assert at_best(lucky)["beta"].unique().tolist() == [1.0]  # the best mean, not the best run
    fallen = frame(beta=[0.1] * 3 + [1.0] * 3, seed=[0, 1, 2] * 2, score=[0.0, 0.7, 0.7, 0.6, 0.6, 0.6])
    assert at_best(fallen)["beta"].unique().tolist() == [1.0]  # nor the best median
    missing = best_minus_best(one[one["seed"] == 0], other)
    assert (missing.mean, missing.low, missing.seeds) == (pytest.approx(0.3), -math.inf, 1)
    with pytest.raises(ValueError, match=r"a run per seed, found two at beta=0\.1"):
        best_minus_best(pd.concat([one, one]), other)


@pytest.mark.parametrize("fall,said", [(0.0, "supports"), (0.2, "refutes")])
def test_rising(fall, said):
    """Accuracies that rise with every smaller beta, but fall at the last."""
    of_beta = {1.0: 0.5, 0.1: 0.6, 0.01: 0.7 - fall}
    rng = np.random.default_rng(0)
    rows = [(beta, seed, mean + rng.normal(0, 0.01)) for beta, mean in of_beta.items() for seed in range(8)]
    found = rising(pd.DataFrame(rows, columns=["beta", "seed", "accuracy"]), "accuracy")
    assert found.verdict == said
    assert ("from beta 0.1 to 0.01" in found.measured) == (said == "refutes")


@pytest.mark.parametrize("extra,said", [(0.0, "undecided"), (3.0, "supports"), (-3.0, "refutes")])
def test_whether_eos_falls_most(extra, said):
    """Where no item is special nothing is decided: any of the others may be the rival."""
    rng = np.random.default_rng(1)
    rows = [
        {"seed": seed, "token": token, "end": token == "</s>", "difference": rng.normal(-1, 0.3), "occurrences": 50}
        for seed in range(6)
        for token in ["a", "b", "c", "d", "</s>"]
    ]
    items = pd.DataFrame(rows)
    items.loc[items["end"], "difference"] -= extra
    rare = items[items["token"] == "a"].assign(token="rare", occurrences=1, difference=-50.0)
    found, rival = end_against_rivals(pd.concat([items, rare]))
    assert verdict(found) == said
    assert rival in {"a", "b", "c", "d"}


def test_a_claim_of_parts():
    assert all_of(["supports", "supports"]) == "supports"
    assert all_of(["supports", "undecided"]) == all_of(["equivalent", "undecided"]) == "undecided"
    assert all_of(["supports", "undecided", "refutes"]) == "refutes"
    assert all_of(["supports", "equivalent"]) == "equivalent"  # as good as one of the ends, at least


def test_degenerate_is_a_state_of_its_own():
    healthy = frame(seed=[0, 1, 2], score=[0.6, 0.7, 0.8])
    assert cell(healthy, "score").startswith("0.700 ± 0.248")
    one = healthy.assign(broken=[0.9, 0.1, 0.1])
    assert cell(one, "score") == f"0.700 ± 0.248 (1 of 3 {COLLAPSED})"  # the mean holds that seed, too
    assert cell(one[:2], "score").endswith(f"(1 of 2 {COLLAPSED})")  # half is not most
    assert cell(healthy.assign(broken=[0.9, 0.6, 0.1]), "score") == COLLAPSED
    assert cell(healthy[:0], "score") == ""


def test_scores_and_their_margins():
    """AlpacaEval's comes first, in percent; each has its own format and margin of equivalence."""
    assert [*SCORES.items()] == [
        *(("alpaca_eval/length_controlled", (".2f", 100.0, 1.0)), ("win_rate", (".3f", 1.0, 0.05))),
        ("rewards/accuracies", (".3f", 1.0, 0.01)),
    ]
    assert JUDGED == ("alpaca_eval/length_controlled", "win_rate")
    found = frame(seed=[0], score=[16.25])
    assert (margin(found), cell(found, "score")) == (0.05, "16.250")
    found = found.assign(scored_by="alpaca_eval/length_controlled")
    assert (margin(found), cell(found, "score")) == (1.0, "16.25")


def test_measures_are_what_they_say():
    shown = {
        "logps/accuracies": 0.61,
        "length": 20.25,
        "correct": 3.25,
        "wrong": 0.5,
        "any_wrong": 0.44,
        "valid": 0.875,
        "kl": 12.34,
        "ended": 0.99,
    }
    others = {"rewards/accuracies": 0.7, "kl_reference": 7.0, "kl_plain": 8.0}
    found = frame(seed=[0], score=[0.6]).assign(lr=5e-4, beta=0.1, **shown, **others)
    table = measures(found, ["lr", "beta"])
    assert table.rename_axis("").to_dict("index") == {
        "0.0005, 0.1": {
            "score": "0.600",
            "policy accuracy": "0.610",
            "length": "20.2",
            "correct": "3.25",
            "wrong": "0.50",
            "any wrong": "0.440",
            "valid": "0.875",
            "KL": "12.3",
            "ended": "0.990",
        }
    }


def test_a_grid_has_a_row_per_beta_from_the_largest():
    runs = pd.DataFrame(
        {"beta": [0.1, 1.0, 0.1, 1.0], "lr": [1e-3, 1e-3, 5e-4, 5e-4], "score": [0.6, 0.7, 0.8, 0.9]}
    ).assign(broken=0.0, scored_by="win_rate")
    table = grid(runs, "beta", ["lr"], "score")
    assert table.index.tolist() == ["1", "0.1"]
    assert table.loc["1"].tolist() == ["0.700", "0.900"]
    missing = grid(runs[1:], "beta", ["lr"], "score")
    assert missing.loc["0.1", "0.001"] == ""


@pytest.mark.parametrize(
    ("study", "folders", "lacking"),
    [
        (dynamic_beta, 1, "pairs.gap"),
        (dynamic_beta, 2, "pairs.gap"),
        (label_noise, 1, "pairs.flip"),
    ],
)
def test_runs_of_another_sweep_are_refused(tmp_path, study, folders, lacking):
    """They would end in a KeyError, or be in no table."""
    for beta in (0.1, 1.0):
        run(tmp_path, None, {"win_rate": 0.5}, beta=beta)
    with pytest.raises(
        ValueError, match=rf"each run in .* must have {lacking}, .* found none in any of them; take the"
    ):
        study.read(*[tmp_path] * folders)


def test_one_run_without_a_key_is_refused(tmp_path):
    """Of what is optional none is; nor is a policy before training."""
    run(tmp_path, None, {"win_rate": 0.5}, pairs={"gap": "low"})
    run(tmp_path, None, {"win_rate": 0.5}, beta=1.0)
    run(tmp_path, None, {"win_rate": 0.5}, beta=10.0, steps=0)
    keys = ["beta", "seed", "pairs.gap"]
    with pytest.raises(ValueError, match=r"must have pairs.gap, .* found none in policy=mistral_7b,.*,beta=1.0,"):
        seeds.finished(tmp_path, keys, {})
    assert len(seeds.finished(tmp_path, keys, {}, optional=["pairs.gap"])) == 3
    assert len(seeds.finished(tmp_path, keys, {"pairs.gap": "low"})) == 1
    [lacking] = tmp_path.glob("*beta=1.0*")
    shutil.rmtree(lacking)
    assert len(seeds.finished(tmp_path, keys, {})) == 2


@pytest.mark.parametrize("study", [kl_strength, objectives, reference_compatibility, summarization, token_level])
def test_a_study_takes_trained_runs(tmp_path, study):
    run(tmp_path, None, {"win_rate": 0.5}, steps=0)
    with pytest.raises(ValueError, match="must hold runs of steps above 0, found none: train some"):
        study.read(*[tmp_path] * (3 if study is reference_compatibility else 1))


def test_a_folder_of_sweeps_is_refused(tmp_path):
    """By the names of those in it."""
    (tmp_path / "dev" / "beta=0.1").mkdir(parents=True)
    (tmp_path / "dev" / "beta=0.1" / "config.yaml").write_text("{}")
    with pytest.raises(ValueError, match=rf"found none in it; these have some: {tmp_path / 'dev'}$"):
        seeds.finished(tmp_path, ("beta",), {})
    with pytest.raises(ValueError, match="must hold finished runs, found none"):
        seeds.finished(tmp_path / "dev", ("beta",), {})
