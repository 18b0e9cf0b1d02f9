"""Claims and tables of the study of a dynamic beta, on hand-made runs whose truth is known."""

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf
from sweeps import curves, numbers, runs_of, student, values

from analysis import dynamic_beta, published, seeds
from analysis.dynamic_beta import ALPHA, FILTER, GAP, KEEP, LEVEL, OUTLIERS, TEMPERATURE

BETAS = (0.01, 0.1, 1.0)
SETTINGS = (GAP, LEVEL, OUTLIERS, FILTER, KEEP, ALPHA, TEMPERATURE)


def runs(rows):
    """As `runs_of`: what is a setting has no noise."""
    frame = runs_of([{key: value for key, value in row.items() if key not in SETTINGS} for row in rows])
    number = frame["run"].str.partition(",")[0].astype(int)
    for key in {key for row in rows for key in row if key in SETTINGS}:
        frame[key] = [rows[at].get(key) for at in number]
    return frame


def of_gaps(low, high):
    """Scores that change by so much for ten times the beta."""
    slope = {"low": low, 0.5: (low + high) / 2, "high": high}
    rows = [
        {GAP: gap, "beta": beta, "score": 0.6 + slope[gap] * np.log10(beta / 0.1)} for gap in slope for beta in BETAS
    ]
    return runs(rows)


def of_levels(batch, instance, outliers=True):
    """Of a mixture of more high pairs every score is higher."""
    gains = {"population": 0.0, "batch": batch, "instance": instance}
    rows = [
        {LEVEL: level, GAP: share, OUTLIERS: 0.0, "beta": 0.1, "score": 0.5 + gains[level] + share / 10}
        for share in (0.1, 0.4)
        for level in gains
    ]
    if outliers:
        rows += [{LEVEL: level, GAP: 0.4, OUTLIERS: 0.1, "beta": 0.1, "score": 0.1} for level in gains]
    return runs(rows)


def of_filters(gain):
    """gain: of each filter, by the dynamic beta."""
    base = {"none": 0.6, "weighted": 0.62, "head": 0.58, "tail": 0.61}
    rows = []
    for name, score in base.items():
        for alpha in (0.0, 0.6):
            kind, keep = ("weighted", 1.0) if name == "none" else (name, 0.8)
            rows.append(
                {FILTER: kind, KEEP: keep, ALPHA: alpha, "score": score + (gain.get(name, 0.1) if alpha else 0.0)}
            )
    frame = runs(rows).assign(beta=0.1)
    return frame.assign(method=dynamic_beta.filtered(frame))


def of_objectives(gain):
    losses = ("beta_dpo", "beta_ipo", "beta_kto")
    rows = [{"loss": loss, ALPHA: a, "score": 0.6 + (gain if a else 0.0)} for loss in losses for a in (0.0, 0.6)]
    frame = runs(rows)
    return frame.assign(method=dynamic_beta.varied(frame))


def of_temperatures(gain):
    rows = [
        {
            TEMPERATURE: at,
            "policy.path": method,
            "score": 0.7 - at / 10 + (gain if method != dynamic_beta.PLAIN else 0.0),
        }
        for at in (0.0, 1.0)
        for method in (dynamic_beta.PLAIN, dynamic_beta.WHOLE)
    ]
    frame = runs(rows)
    return frame.assign(method=frame["policy.path"])


def of_pairs(kurtosis, wider, outlier):
    quantiles = {name: share - 0.5 for name, share in dynamic_beta.QUANTILES.items()}
    rows = [
        {LEVEL: level, GAP: share, OUTLIERS: 0.0, "outlier": False, "mean": 1.0, "kurtosis": kurtosis}
        | {"std": 2.0 + (wider if share == 0.4 and level == "population" else 0.0), **quantiles}
        for level in ("population", "batch")
        for share in (0.1, 0.4)
    ]
    rows += [{**rows[0], GAP: 0.4, OUTLIERS: 0.1, "outlier": odd, "mean": 1.0 + outlier * odd} for odd in (False, True)]
    return runs(rows)


def of_sizes(gain, low, high):
    """gain: of each policy, by beta-DPO; low, high: as in `of_gaps`, for the small and the base one."""
    rows = [
        {
            "policy": policy,
            "loss": loss,
            GAP: None,
            "beta": 0.1,
            "score": 0.5 + (gain[policy] if loss != "dpo" else 0.0),
        }
        for policy in gain
        for loss in ("dpo", "beta_dpo")
    ]
    rows += [
        {"policy": policy, "loss": "dpo", GAP: gap, "beta": beta, "score": 0.6 + slope * np.log10(beta / 0.1)}
        for policy in ("small", "base")
        for gap, slope in (("low", low), ("high", high))
        for beta in BETAS
    ]
    frame = runs(rows)
    return frame.assign(method=dynamic_beta.sized(frame))


def world(sign=1.0):
    return {
        "runs": of_gaps(-0.1 * sign, 0.05 * sign),
        "mixtures": of_levels(0.1 * sign, -0.2 * sign),
        "filters": of_filters(dict.fromkeys(("none", "weighted", "head", "tail"), 0.15 * sign)),
        "variants": of_objectives(0.1 * sign),
        "temperatures": of_temperatures(0.1 * sign),
        "pairs": of_pairs(3.0 * sign, 1.5 * sign, 4.0 * sign),
    }


MEASURED = {
    "1a": [0.1],
    "1b": [0.05],
    "1c": [0.15],
    "2a": [0.1],
    "2b": [0.2],
    "3a": [0.15] * 4,
    "3b": None,  # below
    "4.": [0.1] * 3,
    "5.": [0.1] * 2,
    "6a": [3.0],
    "6b": [1.5],
    "6c": [4.0],
}


@pytest.mark.parametrize("sign,said", [(1.0, "supports"), (-1.0, "refutes")])
def test_claims(sign, said):
    frames = world(sign)
    luck = frames["runs"].groupby("seed")["score"].transform("mean")
    frames["runs"]["score"] += 0.6 - luck  # a slope has no luck of a seed
    frames["pairs"]["kurtosis"] = 3.0 * sign + frames["pairs"]["seed"] % 2 / 100 - 0.005
    found = dynamic_beta.claims(frames)
    assert [claim[:2] for claim in found.index] == [*MEASURED]
    assert found["verdict"].tolist() == [said] * len(MEASURED)
    for text, (claim, expected) in zip(found["measured"], MEASURED.items(), strict=True):
        expected = [0.02 + sign * 0.15] if claim == "3b" else [sign * one for one in expected]
        assert numbers(text)[::3] == pytest.approx(expected, abs=3e-3), text


def test_level_is_no_verdict():
    """Nothing differs: neither for nor against, whatever is looked at."""
    found = dynamic_beta.claims(world(0.0)).drop("3b. beta-DPO is better than DPO")  # the filter alone is
    assert set(found["verdict"]) == {"undecided", "equivalent"}
    assert found["verdict"].iloc[3:6].tolist() == ["equivalent"] * 3


def test_one_part_that_fails_decides():
    """It must help with every filter."""
    frames = {"runs": of_gaps(-0.1, 0.1), "filters": of_filters({"tail": -0.1})}
    found = dynamic_beta.claims(frames)
    assert found["verdict"].iloc[3] == "refutes"
    level = {"runs": of_gaps(-0.1, 0.1), "filters": of_filters({"tail": 0.0})}
    assert dynamic_beta.claims(level)["verdict"].iloc[3] == "equivalent"


def test_slopes():
    """Least squares over the decimal logarithm, of seeds with every beta alone."""
    final = of_gaps(-0.1, 0.05)
    final.loc[(final[GAP] == "low") & (final["beta"] == 1.0), "score"] += 0.3  # no straight line
    found = dynamic_beta.slopes(final, "low").set_index("seed")["slope"]
    scores = [values(final, **{GAP: "low", "beta": beta}) for beta in BETAS]
    assert found.to_numpy() == pytest.approx((scores[2] - scores[0]) / 2, abs=1e-9)
    gone = final.drop(final[(final[GAP] == "low") & (final["seed"] == 3) & (final["beta"] == 0.1)].index)
    assert dynamic_beta.slopes(gone, "low")["seed"].tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert dynamic_beta.slopes(final[final["beta"] == 0.1], "low").empty


def test_intervals():
    """Of differences of a seed, together for all parts."""
    frames = world()
    found = dynamic_beta.claims(frames)["measured"]
    mixtures = frames["mixtures"][frames["mixtures"][OUTLIERS] == 0]
    mean = {
        level: sum(values(mixtures, **{LEVEL: level, GAP: share}) for share in (0.1, 0.4)) / 2
        for level in ("batch", "population")
    }
    assert numbers(found.iloc[3]) == pytest.approx(student(mean["batch"] - mean["population"]), abs=6e-4)
    filters = frames["filters"]
    both = [values(filters, method=f"head, {beta}") for beta in (dynamic_beta.DYNAMIC, dynamic_beta.CONSTANT)]
    head = found.iloc[5].partition("head: ")[2]
    assert numbers(head)[:3] == pytest.approx(student(both[0] - both[1], looks=4), abs=6e-4)
    hot = frames["temperatures"][frames["temperatures"][TEMPERATURE] == 1.0]
    both = [values(hot, method=name) for name in (dynamic_beta.WHOLE, dynamic_beta.PLAIN)]
    assert numbers(found.iloc[8])[3:] == pytest.approx(student(both[0] - both[1], looks=2), abs=6e-4)


def test_only_the_first_sweep():
    tables, figures = dynamic_beta.study({"runs": of_gaps(-0.1, 0.05)})
    assert {"figure_2", "figure_2_measures", "claims"} == {*tables}
    assert {*figures} == {"figure_2"}
    short_of = of_gaps(-0.1, 0.05)
    found = dynamic_beta.claims({"runs": short_of[short_of["beta"] == 0.1]})
    assert set(found["verdict"]) == {"undecided"}
    assert found["measured"].str.contains("not measured").all()


def test_tables():
    frames = world()
    frames["runs"].loc[(frames["runs"][GAP] == "low") & (frames["runs"]["beta"] == 0.01), "broken"] = 0.9
    tables, figures = dynamic_beta.study(frames)
    table = tables["figure_2"]
    assert (table.index.tolist(), {*table}) == (["1", "0.1", "0.01"], {"gap low", "gap 0.5", "gap high"})
    assert table.loc["0.01", "gap low"] == "degenerate"
    assert table["gap high"].str[:5].tolist() == ["0.650", "0.600", "0.550"]
    assert tables["figure_2_measures"].loc["low, 0.01", "degenerate"] == "8 of 8"
    assert {"correct", "wrong", "valid", "degenerate"} <= {*tables["figure_2_measures"]}
    table = tables["table_2"]  # without outliers
    assert table.columns.tolist() == ["DPO", "instance-level", "batch-level"]
    assert table.loc["0.4"].str[:5].tolist() == ["0.540", "0.340", "0.640"]
    assert table.loc["0.1"].str[:5].tolist() == ["0.510", "0.310", "0.610"]
    table = tables["filters"]
    assert table.loc["none"].str[:5].tolist() == ["0.600", "0.750"]
    assert table.loc["head"].str[:5].tolist() == ["0.580", "0.730"]
    assert tables["variants"].loc["IPO"].str[:5].tolist() == ["0.600", "0.700"]
    assert tables["figure_4"].loc["1", dynamic_beta.WHOLE].startswith("0.700")
    table = tables["beside_published"]
    assert table.loc["published, Pythia 1.4B on HH"].tolist() == ["42.78", "48.67"]
    assert [cell[:5] for cell in table.iloc[-1]] == ["60.00", "77.00"]
    over_people = dynamic_beta.beside_published(frames["filters"].assign(**{"evaluation.baseline": "human"}))
    ours = "ours, over the policy before training", "ours, over what people wrote"
    assert (table.index[-1], over_people.index[-1]) == ours
    assert len(table) == len(published.BETA_DPO) + 1

    [drawn] = curves(figures["figure_2"])
    assert drawn["high"][0] == [*BETAS]
    assert drawn["high"][1] == pytest.approx([0.55, 0.6, 0.65], abs=1e-3)
    [drawn] = curves(figures["figure_4"])
    assert drawn[dynamic_beta.PLAIN][:2] == [[0.0, 1.0], pytest.approx([0.7, 0.6], abs=1e-3)]
    [gaps] = figures["gaps"].axes
    assert "population, 0.4, 0.1, True" in [text.get_text() for text in gaps.get_xticklabels()]
    box, below, above, *_, middle, mean, beyond = [sorted(line.get_ydata()) for line in gaps.lines[:8]]
    drawn = [box[0], box[-1], *below, *above, middle[0], mean[0], *beyond]
    assert drawn == pytest.approx([-0.25, 0.25, -0.4, -0.25, 0.25, 0.4, 0.0, 1.0, -0.49, 0.49], abs=1e-3)


def test_sizes():
    """beta-DPO is better with two of three policies; of gaps the larger policies show what the paper claims."""
    gain = {"tiny": 0.1, "small": 0.2, "base": -0.1}
    frames = {"runs": of_gaps(-0.1, 0.05), "sizes": of_sizes(gain, -0.1, 0.05)}
    tables, figures = dynamic_beta.study(frames)
    table = tables["table_1"]
    assert (table.index.tolist(), [*table]) == (["tiny", "small", "base"], ["DPO", "beta-DPO"])
    assert table["DPO"].str[:5].tolist() == ["0.500"] * 3
    assert table["beta-DPO"].str[:5].tolist() == ["0.600", "0.700", "0.400"]
    assert tables["table_1_measures"].index.tolist()[:2] == ["tiny, DPO", "tiny, beta-DPO"]
    table = tables["figure_1b"]
    assert (table.index.tolist(), [*table][:2]) == (["1", "0.1", "0.01"], ["small, gap low", "small, gap high"])
    assert table["base, gap high"].str[:5].tolist() == ["0.650", "0.600", "0.550"]
    [drawn] = curves(figures["figure_1b"])
    assert drawn["base, gap low"][1] == pytest.approx([0.7, 0.6, 0.5], abs=1e-3)
    found = tables["claims"].iloc[3:]
    assert found.index.str[:9].tolist() == [
        *("7. beta-D", "small: 1a", "small: 1b", "small: 1c", "base: 1a.", "base: 1b.", "base: 1c.")
    ]
    assert found["verdict"].tolist()[0] == "refutes"
    assert found["verdict"].tolist()[3::3] == ["supports"] * 2
    assert numbers(found["measured"].iloc[0])[::3] == pytest.approx([*gain.values()], abs=3e-3)
    means = [student(values(frames["sizes"], policy=p, loss="beta_dpo", beta=0.1) - of_dpo(frames, p), 3) for p in gain]
    assert numbers(found["measured"].iloc[0]) == pytest.approx(np.array(means).ravel(), abs=6e-4)
    better = dynamic_beta.claims({**frames, "sizes": of_sizes(dict.fromkeys(gain, 0.1), -0.1, 0.05)})
    assert better["verdict"].iloc[3] == "supports"


def of_dpo(frames, policy):
    frame = frames["sizes"]
    return values(frame[frame[GAP].isna()], policy=policy, loss="dpo")


def test_sizes_without_runs_by_gap():
    """The figure's runs may be missing, and with them the column that tells them."""
    frame = of_sizes({"tiny": 0.1}, -0.1, 0.05)
    frame = frame[frame[GAP].isna()].drop(columns=GAP)
    tables, figures = dynamic_beta.study({"runs": of_gaps(-0.1, 0.05), "sizes": frame})
    assert "figure_1b" not in {*tables, *figures}
    assert tables["table_1"].index.tolist() == ["tiny"]
    one = dynamic_beta.claims({"runs": of_gaps(-0.1, 0.05), "sizes": frame[frame["loss"] == "dpo"]})
    assert "not measured" in one["measured"].iloc[3]


def test_spread():
    """Moments and quantiles, of outliers and of the others."""
    gap = np.random.default_rng(0).laplace(size=4000)
    pairs = pd.DataFrame({"kind": ["outlier"] * 1000 + ["answers"] * 3000, "gap": gap})
    found = dynamic_beta.spread(pairs).set_index("outlier")
    for odd, part in ((True, gap[:1000]), (False, gap[1000:])):
        row = found.loc[odd]
        assert (row["mean"], row["std"]) == (pytest.approx(part.mean()), pytest.approx(part.std(ddof=1)))
        assert row["kurtosis"] == pytest.approx(((part - part.mean()) ** 4).mean() / part.var() ** 2 - 3, rel=0.02)
        assert [row["p1"], row["p50"], row["p90"]] == pytest.approx(np.quantile(part, [0.01, 0.5, 0.9]))


def test_an_evaluation_is_of_the_run_that_made_its_policy(tmp_path):
    paths = []
    for kind, keep, alpha in (("weighted", 1, 0.0), ("weighted", 0.8, 0.6), ("head", 0.8, 0.6)):
        folder = tmp_path / f"{kind},{keep}"
        folder.mkdir()
        config = {"loss": {"filter": kind, "keep": keep, "alpha": alpha}}
        OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
        paths.append(str(folder / "policy"))
    found = dynamic_beta.evaluated(pd.DataFrame({"policy.path": paths}))
    assert found == [dynamic_beta.PLAIN, dynamic_beta.WHOLE, "head, dynamic beta"]
    with pytest.raises(ValueError, match=r"must be of policies of runs by table=dynamic_beta_filters.*found no .*away"):
        dynamic_beta.evaluated(pd.DataFrame({"policy.path": [*paths, str(tmp_path / "away" / "policy")]}))
    OmegaConf.save(OmegaConf.create({"loss": {}}), tmp_path / "head,0.8" / "config.yaml")
    with pytest.raises(ValueError, match=r"each run in the folders of policy.path must have loss.filter.*head,0.8;"):
        dynamic_beta.evaluated(pd.DataFrame({"policy.path": paths}))


def test_mean_over_settings_is_of_whole_seeds():
    frame = pd.DataFrame({"at": [1, 2, 1], "seed": [0, 0, 1], "score": [1.0, 3.0, 5.0]})
    assert dynamic_beta.averaged(frame, "at").values.tolist() == [[0.0, 2.0]]
    assert seeds.interval(dynamic_beta.averaged(frame, "at")["score"]).seeds == 1
