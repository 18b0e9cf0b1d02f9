"""Claims, tables and the figure of the study of objectives, on hand-made runs whose truth is known."""

import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from composing import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from sweeps import SEEDS, numbers, runs_of, student, values
from test_published import run

from analysis import objectives, seeds
from dpo.sweep.plan import resolve
from dpo.sweep.rehearse import trials

ROOT = Path(__file__).parents[2]
FILE = ROOT / "experiments/table/objectives.yaml"
LOSSES = {file.stem for file in (ROOT / "conf/loss").glob("*.yaml")} - {"sft"}  # which has no beta to choose


def of(loss, scores, kls=None, **other):
    """Rows of an objective at each beta of `scores`; the win rate is the score."""
    kls = kls or [10.0 * 2**-place for place in range(len(scores))]
    return [
        {"loss": loss, "beta": beta, "score": one, "win_rate": one, "kl": kl, "valid": 0.9, **other}
        for (beta, one), kl in zip(scores.items(), kls, strict=True)
    ]


DPO = {0.01: 0.5, 0.1: 0.7, 1.0: 0.6}
ABOVE = {0.3: 0.55, 3.0: 0.8, 30.0: 0.75}
BELOW = {1.0: 0.45, 10.0: 0.5, 100.0: 0.6}
LEVEL = {0.003: 0.5, 0.03: 0.7, 0.3: 0.65}


@pytest.fixture
def final():
    return runs_of([*of("simpo", ABOVE), *of("dpo", DPO), *of("orpo", BELOW), *of("ipo", LEVEL)])


def test_each_at_its_best_beta_against_dpo(final):
    table = objectives.comparison(final)
    assert table.index.tolist() == ["dpo", "ipo", "orpo", "simpo"]
    assert table.columns[:4].tolist() == ["beta", "score", "minus DPO", "verdict"]
    assert table["beta"].tolist() == ["0.1", "0.03", "100, the end of its grid", "3"]
    assert table["verdict"].tolist() == ["", "equivalent", "worse", "better"]
    assert table["all"].tolist() == ["", "equivalent", "worse", "better"]
    assert [numbers(text)[0] for text in table["minus DPO"][1:]] == pytest.approx([0.0, -0.1, 0.1], abs=2e-3)
    assert table.loc["dpo", ["minus DPO", "seeds for it", "beta by other seeds"]].tolist() == [""] * 3
    for loss, grid, best in (("simpo", ABOVE, 3.0), ("orpo", BELOW, 100.0)):  # of three betas each: looks of three
        runs = [values(final, loss=loss, beta=beta) for beta in grid]
        others = [values(final, loss="dpo", beta=beta) for beta in DPO]
        low = max(min(student(mine - dpo, looks=3)[1] for dpo in others) for mine in runs)
        high = min(max(student(mine - dpo, looks=3)[2] for mine in runs) for dpo in others)
        mean = values(final, loss=loss, beta=best).mean() - values(final, loss="dpo", beta=0.1).mean()
        assert numbers(table.loc[loss, "minus DPO"]) == pytest.approx([mean, low, high], abs=6e-4)
        assert float(table.loc[loss, "beta by other seeds"]) == pytest.approx(mean, abs=6e-4)
    assert numbers(table.loc["simpo", "score"])[0] == pytest.approx(0.8, abs=1e-3)


def noisy(difference, spread=0.1):
    """An objective whose difference to DPO has a mean and a standard deviation over seeds, at one beta each."""
    final = runs_of([*of("dpo", {0.1: 0.6}), *of("simpo", {2.0: 0.6}), *of("ipo", {0.1: 0.6})])
    away = np.array([1, -1, 1, -1, 1, -1, 1, -1]) * spread * np.sqrt((SEEDS - 1) / SEEDS)
    dpo = final[final["loss"] == "dpo"].sort_values("seed")["score"].to_numpy()
    final.loc[final["loss"] == "simpo", "score"] = dpo + difference + away
    return final


def test_seeds_that_a_verdict_takes():
    """An interval of n seeds is as wide as Student's t says."""
    found = objectives.comparison(noisy(0.07)).loc["simpo"]
    assert found["verdict"] == "undecided"
    half = seeds.half_width(np.arange(2.0, 100)) * 0.1
    assert int(found["seeds for it"]) == np.arange(2, 100)[half < 0.07][0]
    assert objectives.comparison(noisy(0.05, 2.0)).loc["simpo", "seeds for it"] == "above 1000"
    one = objectives.comparison(noisy(0.07).query("seed == 0")).loc["simpo"]
    assert one[["verdict", "seeds for it", "beta by other seeds"]].tolist() == ["undecided", "", ""]


@pytest.mark.parametrize("sign,word", [(1, "better"), (-1, "worse")])
def test_a_verdict_for_all_together_takes_more(sign, word):
    """Of two objectives, each interval is one of 97.5 %: Student's t for two looks."""
    one, two, three = (float(seeds.half_width(np.array(8.0), looks)) * 0.1 for looks in (1, 2, 3))
    for edge, expected in (((one + two) / 2, [word, "undecided"]), ((two + three) / 2, [word, word])):
        table = objectives.comparison(noisy(sign * edge))
        assert table.loc["simpo", ["verdict", "all"]].tolist() == expected


def test_a_choice_by_other_seeds_has_no_luck():
    """Two betas that are as good in truth: the best of each seed would be above, the choice of the others is not."""
    rows = pd.DataFrame(
        {"seed": seed, "beta": beta, "score": 0.5 + sign * (0.1 if seed % 2 else -0.1)}
        for seed in range(4)
        for beta, sign in ((0.1, 1), (1.0, -1))
    )
    assert objectives.chosen_by_others(rows).tolist() == pytest.approx([0.4] * 4)
    better = rows.assign(score=rows["score"] + 0.5 * (rows["beta"] == 1.0))
    assert objectives.chosen_by_others(better).tolist() == pytest.approx([1.1, 0.9, 1.1, 0.9])


@pytest.fixture
def two_steps():
    """Grids on three seeds, and on the other five that of DPO, the two best betas of SimPO, and the best one of IPO."""
    final = runs_of([*of("simpo", ABOVE), *of("dpo", DPO), *of("orpo", BELOW), *of("ipo", LEVEL)])
    others = final["loss"] + final["beta"].astype(str)
    return final[(final["seed"] < 3) | (final["loss"] == "dpo") | others.isin(["simpo3.0", "simpo30.0", "ipo0.03"])]


def test_seeds_that_chose_no_beta_compare_alone(two_steps):
    """Of five differences, by Student; what the three that chose the betas scored is no part. DPO has all its betas."""
    final = two_steps.copy()
    final.loc[(final["loss"] == "simpo") & (final["seed"] < 3) & (final["beta"] == 3.0), "score"] += 5.0  # luck
    table = objectives.comparison(final)
    new = final[final["seed"] >= 3]
    dpo = [values(new, loss="dpo", beta=beta) for beta in DPO]
    for loss, betas in (("simpo", [3.0, 30.0]), ("ipo", [0.03]), ("dpo", DPO)):
        mine = [values(new, loss=loss, beta=beta) for beta in betas]
        low = max(min(student(one - other, len(mine))[1] for other in dpo) for one in mine)
        high = min(max(student(one - other, 3)[2] for one in mine) for other in dpo)
        mean = max(one.mean() for one in mine) - max(one.mean() for one in dpo)
        if loss != "dpo":
            assert numbers(table.loc[loss, "minus DPO"]) == pytest.approx([mean, low, high], abs=6e-4)
        level = [max(student(one, looks)[at] for one in mine) for at, looks in ((0, 1), (1, len(mine)), (2, 1))]
        assert numbers(table.loc[loss, "score"]) == pytest.approx(level, abs=6e-4)
    assert table["verdict"].to_dict() == {"dpo": "", "ipo": "equivalent", "orpo": "undecided", "simpo": "better"}
    assert table.loc["orpo", "minus DPO"] == "not measured"
    assert table.loc["orpo", "score"] == ""
    assert "beta by other seeds" not in table
    assert table.loc["simpo", ["degenerate runs", "at the best beta"]].tolist() == ["0 of 19", "0 of 5"]
    found = objectives.claims(final)
    assert numbers(found["measured"].iloc[0]) == pytest.approx(numbers(table.loc["simpo", "minus DPO"]), abs=1e-9)
    low = final.assign(score=final["score"] - (final["loss"] == "simpo") * (final["seed"] >= 3))
    changed = objectives.comparison(low).loc["simpo"]
    assert changed[["beta", "verdict"]].tolist() == ["3", "worse"]
    assert numbers(changed["minus DPO"]) == pytest.approx(np.subtract(numbers(table.loc["simpo", "minus DPO"]), 1))
    other = final.assign(beta=final["beta"].where((final["loss"] != "ipo") | (final["seed"] < 3), 0.003))
    assert objectives.comparison(other).loc["ipo", "minus DPO"] == "not measured"  # at a beta that was not chosen


def test_the_frontier_is_of_seeds_that_ran_grids(two_steps):
    final = two_steps.copy()
    final.loc[final["seed"] >= 3, "win_rate"] = 9.0
    assert max(np.concatenate([line.get_ydata() for line in objectives.frontier(final).axes[0].lines])) < 1


def test_differences(final):
    """A point per objective in the order of its difference, with its interval; coloured where better or worse."""
    unsure = (final["loss"] == "simpo") & (final["beta"] == 30.0)  # may be the best: the upper side is wider
    final.loc[unsure, "score"] += 0.1 * (-1.0) ** final.loc[unsure, "seed"]
    axis = objectives.differences(final).axes[0]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["orpo", "ipo", "simpo"]
    for place, (loss, bars) in enumerate(zip(("orpo", "ipo", "simpo"), axis.containers, strict=True)):
        expected = numbers(objectives.comparison(final).loc[loss, "minus DPO"])
        (x,), (y,) = bars.lines[0].get_data()
        ends = bars.lines[2][0].get_segments()[0][:, 0]
        assert (y, bars.lines[0].get_color() == "0.4") == (place, loss == "ipo")
        assert [x, *ends] == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("off,word", [(0.1, "better"), (-0.1, "worse"), (0.0, "equivalent")])
def test_equal_kl(off, word):
    """One whose curve lies above at every KL is better there, though its best beta is no better, or its KL higher."""
    dpo = of("dpo", {0.01: 0.9, 0.1: 0.7, 1.0: 0.5}, [16.0, 4.0, 1.0])  # 0.2 for each factor of 4
    other = of("ipo", {0.01: 0.6 + off, 0.1: 0.8 + off}, [2.0, 8.0])
    final = runs_of([*dpo, *other], seeds=6)
    for column in ("kl", "score"):
        final[column] = final.groupby(["loss", "beta"])[column].transform("mean")
    final["kl"] = final["kl"].round(2)
    final["score"] += 0.001 * final["seed"] * (final["loss"] == "ipo") - 0.0025 * (final["loss"] == "ipo")
    level = objectives.at_equal_kl(final[final["loss"] == "ipo"], final[final["loss"] == "dpo"])
    assert level["score"].mean() == pytest.approx(off, abs=5e-3)
    row = objectives.comparison(final).loc["ipo"]
    assert row["verdict at equal KL"] == word
    assert numbers(row["minus DPO at equal KL"])[0] == pytest.approx(off, abs=5e-3)
    apart = final.assign(kl=final["kl"].where(final["loss"] == "dpo", final["kl"] * 100))
    assert objectives.comparison(apart).loc["ipo", "minus DPO at equal KL"] == "not measured"


def test_equal_kl_is_a_mean_over_its_logarithm():
    one = pd.DataFrame({"seed": 0, "kl": [16.0, 1.0, 4.0], "score": [0.7, 0.5, 0.9]})
    flat = pd.DataFrame({"seed": 0, "kl": [1.0, 16.0], "score": [0.4, 0.4]})
    assert objectives.at_equal_kl(one, flat)["score"].tolist() == pytest.approx([0.35], abs=1e-3)


def test_degenerate_runs_and_measures(final):
    assert objectives.comparison(final)["degenerate runs"].tolist() == ["0 of 24"] * 4
    fallen = (final["loss"] == "simpo") & ((final["beta"] == 0.3) | (final["beta"] == 3.0) & (final["seed"] < 2))
    final.loc[fallen, "broken"] = 0.9
    for number, column in enumerate(("wrong", "correct")):
        final[column] = final["beta"] + number
    table = objectives.comparison(final)
    assert table.loc["simpo", ["degenerate runs", "at the best beta"]].tolist() == ["10 of 24", "2 of 8"]
    assert table.loc["ipo", ["degenerate runs", "at the best beta"]].tolist() == ["0 of 24", "0 of 8"]
    for column, number in (("wrong", 3.0), ("correct", 4.0), ("valid", 0.9)):
        assert float(table.loc["simpo", column].split(" ")[0]) == pytest.approx(number, abs=2e-3)
        assert "2 of 8 degenerate" in table.loc["simpo", column]


@pytest.mark.parametrize("turned,word", [(1, "supports"), (-1, "refutes")])
def test_published_claims(turned, word):
    rows = of("dpo", {0.1: 0.5})
    for loss, published in objectives.OBJECTIVES["minus DPO"].items():
        rows += of(loss, {0.1: 0.5 + turned * np.sign(published) * 0.2, 1.0: 0.2})
    found = objectives.claims(runs_of(rows))
    names = found.index.str.split().str[0]
    assert names.tolist() == ["simpo", "ipo", "orpo", "cpo", "slic", "alpha_dpo", "beta_dpo"]  # R-DPO is as good: 0.2
    better = [f"{name} is better than DPO" in claim for name, claim in zip(names, found.index, strict=True)]
    assert better == [True, False, False, False, False, True, True]
    assert found["verdict"].tolist() == [word] * 7
    assert [numbers(text)[0] for text in found["measured"]] == pytest.approx([turned * 0.2] * 7, abs=2e-3)
    missing = objectives.claims(runs_of(of("dpo", {0.1: 0.5})))
    assert missing["verdict"].tolist() == ["undecided"] * 7
    assert "loss=simpo" in missing["measured"].iloc[0]


def test_frontier(final):
    """KL is across, the win rate upwards; a panel per family, DPO thick and black in each; crosses where degenerate."""
    final.loc[(final["loss"] == "simpo") & (final["beta"] == 30.0) & (final["seed"] < 7), "broken"] = 0.9
    tables, figures = objectives.study({"runs": final})
    assert list(tables) == ["objectives", "claims", "measures"]
    assert sorted(tables["measures"].index)[:3] == ["dpo, 0.01", "dpo, 0.1", "dpo, 1"]
    axes = {axis.get_title(loc="left"): axis for axis in figures["frontier"].axes}
    families = objectives.FAMILIES.items()
    assert list(axes) == [title for title, family in families if {"ipo", "simpo", "orpo"} & {*family}]
    for axis, loss in zip(axes.values(), ("ipo", "simpo", "orpo"), strict=True):
        lines = {line.get_label(): line for line in axis.lines}
        assert (axis.get_xscale(), axis.get_xlabel()) == ("log", "KL to the initial policy (nats per response)")
        assert axis.get_ylabel() == "win rate over the initial policy"
        assert [text.get_text() for text in axis.get_legend().get_texts()] == [loss, "DPO"]
        for label, of_loss in ((loss, loss), ("DPO", "dpo")):
            means = final[final["loss"] == of_loss].groupby("beta")[["kl", "win_rate"]].mean()
            assert list(lines[label].get_xdata()) == pytest.approx(means["kl"].tolist())
            assert list(lines[label].get_ydata()) == pytest.approx(means["win_rate"].tolist())
        assert lines["DPO"].get_color() == "black"
        assert lines["DPO"].get_linewidth() > 2 * lines[loss].get_linewidth()
        crosses = sum(len(line.get_xdata()) for line in axis.lines if line.get_marker() == "x")
        assert crosses == (1 if loss == "simpo" else 0)
    all_of = [
        *of("dpo", DPO),
        *(row for family in objectives.FAMILIES.values() for loss in family for row in of(loss, DPO)),
    ]
    every = objectives.frontier(runs_of(all_of, seeds=1)).axes
    assert [axis.get_title(loc="left") for axis in every] == list(objectives.FAMILIES)
    assert [len(axis.get_legend().get_texts()) for axis in every] == [9, 10, 6, 6, 9]
    strange = objectives.frontier(runs_of([*of("dpo", DPO), *of("mine", ABOVE)]))
    assert [axis.get_title(loc="left") for axis in strange.axes] == ["other objectives"]
    assert list(objectives.study({"runs": final.drop(columns="kl")})[1]) == ["differences"]
    assert len(objectives.frontier(runs_of(of("dpo", DPO))).axes) == 1


def test_every_objective_has_a_panel():
    assert sorted(loss for family in objectives.FAMILIES.values() for loss in family) == sorted(LOSSES - {"dpo"})


def test_what_is_read(tmp_path):
    for loss in ("dpo", "ipo"):
        for beta in (0.1, 1.0):
            run(tmp_path, 12.0, {"kl": 9.0, "wrong": 0.5}, beta=beta, loss=loss)
    frame = objectives.read(tmp_path)["runs"]
    assert sorted(frame["loss"] + frame["beta"].astype(str)) == ["dpo0.1", "dpo1.0", "ipo0.1", "ipo1.0"]
    assert {"kl", "wrong", "score", "seed"} <= {*frame}
    with pytest.raises(ValueError, match="must hold runs of loss=dpo, which all are compared with, found none"):
        objectives.read(tmp_path, loss="ipo")


def commands():
    """The overrides of each command of training in the header of the experiment."""
    lines = [line.split("# ")[1].split("  (")[0] for line in FILE.read_text().splitlines() if "dpo.train" in line]
    return [shlex.split(line)[3:] for line in lines]


def grids(apart=False):
    """Objective: its betas, by the commands of the header, and what else they give it. apart: on seeds of their own."""
    params, found = dict(OmegaConf.load(FILE).hydra.sweeper.params), {}
    for given in commands():
        assert given[0] == "table=objectives"
        if apart != any(one.startswith("seed=") for one in given):
            continue
        both = [*(f"{key}={value}" for key, value in params.items()), *given[1:]]
        parsed = OverridesParser.create().parse_overrides(both)
        axes = {
            one.get_key_element(): list(one.sweep_string_iterator()) if one.is_sweep_override() else [str(one.value())]
            for one in parsed
        }
        assert axes["seed"] == [str(seed) for seed in (range(3, 10) if apart else range(3))]
        more = [f"{key}={values[0]}" for key, values in axes.items() if key not in ("loss", "beta", "seed")]
        for loss in axes["loss"]:
            assert loss not in found
            found[loss] = (axes["beta"], more)
    return found


def test_each_objective_is_confirmed_at_the_best_betas_of_its_grid():
    """With the options that it had on the grid, at the betas that the kept runs of the grids choose; DPO at all."""
    found, confirmed = grids(), grids(apart=True)
    assert {*confirmed} == {*found}
    kept = pd.read_csv(ROOT / "analysis/frames/objectives/runs.csv")
    chosen = objectives.of_losses(kept[kept["seed"] < 3])
    assert confirmed.pop("dpo") == found["dpo"]
    for loss, (betas, more) in confirmed.items():
        assert more == found[loss][1]
        best = chosen[loss].groupby("beta")["score"].mean().nlargest(objectives.CHOSEN)
        assert {*map(float, betas)} == {*best.index}


@pytest.mark.long
def test_the_commands_run_every_objective_on_a_comparable_grid():
    """Five betas each, from the lowest to the highest by a factor of a hundred, by steps of about half a decade."""
    found = grids()
    assert {*found} == LOSSES
    for betas, _ in found.values():
        numbers_of = np.array(betas, float)
        assert numbers_of[-1] / numbers_of[0] == pytest.approx(100)
        assert len(numbers_of) == 5
        assert (np.diff(np.log10(numbers_of)) > 0.45).all()
    configs = []
    for loss, (betas, more) in found.items():
        given = ["table=objectives", f"loss={loss}", f"beta={betas[0]}", "seed=0", *more]
        configs.append(resolve(compose("train", *given)))
        assert (configs[-1]["beta"], configs[-1]["name"]) == (float(betas[0]), "objectives")
    assert [tried["problems"] for tried in trials(configs)] == [[]] * len(LOSSES)
