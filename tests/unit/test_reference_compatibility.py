"""Claims, tables and figures of the study of references, on hand-made runs whose truth is known."""

import numpy as np
import pandas as pd
import pytest
from sweeps import SEEDS, curves, numbers, runs_of, student, values

from analysis import reference_compatibility as study
from analysis import seeds

SUMMARIES = study.SUMMARIES


def held_to(reference, scores, **other):
    """Rows of one policy, reference and loss at each beta of `scores`."""
    return [
        {"reference": reference, "loss": "dpo", "beta": beta, "score": one, **other} for beta, one in scores.items()
    ]


def verdicts(found: pd.DataFrame) -> dict[str, str]:
    return dict(zip(found.index.str.split(r"[.,:] ").str[0], found["verdict"], strict=True))


def means(found: pd.DataFrame) -> list[float]:
    return [numbers(text)[0] for text in found["measured"]]


# Table 3


def necessity(dpo, posterior, lengths, simpo, orpo):
    rows = held_to("initial", dpo) + held_to("reference_free", posterior)
    rows = [{**row, "length": length} for row, length in zip(rows, lengths, strict=True)]
    rows += (
        held_to("unconditional", {0.1: 0.3})
        + held_to("reference_free", simpo, loss="simpo")
        + held_to("reference_free", orpo, loss="orpo")
    )
    return runs_of(rows)


AS_PUBLISHED = necessity(
    dpo={0.01: 0.8, 0.1: 0.85, 10.0: 0.6},
    posterior={0.01: 0.5, 1.0: 0.55, 10.0: 0.7},
    lengths=[20.0, 22.0, 24.0, 30.0, 60.0, 50.0],
    simpo={1.0: 0.95, 2.0: 0.7},
    orpo={0.1: 0.9},
)
TURNED = necessity(
    dpo={0.01: 0.4, 0.1: 0.5, 10.0: 0.6},
    posterior={0.01: 0.8, 1.0: 0.75, 10.0: 0.7},
    lengths=[30.0, 60.0, 50.0, 20.0, 22.0, 24.0],
    simpo={1.0: 0.5, 2.0: 0.4},
    orpo={0.1: 0.55},
)


@pytest.mark.parametrize(
    "final,said,measured",
    [
        # the best of each; the best of the posterior from 10 on and below; lengths at betas 0.01 and 10, that both have
        (AS_PUBLISHED, "supports", [0.15, 0.15, 18.0, 0.1, 0.05]),
        (TURNED, "refutes", [-0.2, -0.1, -18.0, -0.1, -0.05]),
    ],
)
def test_claims_of_necessity(final, said, measured):
    found = study.claims_of_necessity(final)
    assert found.index.str.split(r"[.,] ").str[0].tolist() == ["4a", "4b", "4c", "Extension", "Extension"]
    assert found["verdict"].tolist() == [said] * 5
    assert means(found) == pytest.approx(measured, abs=2e-3)
    texts = found["measured"].tolist()
    assert "mean over betas 0.01, 10, tokens" in texts[2]
    assert ["SimPO" in texts[3], "ORPO" in texts[4]] == [True, True]


def test_the_end_of_a_grid_is_told():
    """The best of a method whose best beta is the last may be beyond."""
    inner, end = ({0.1: 0.5, 1.0: one, 10.0: 0.6} for one in (0.7, 0.55))
    assert study.grid_of(runs_of(held_to("initial", inner))) == "3 betas, best 1"
    assert study.grid_of(runs_of(held_to("initial", end))) == "3 betas, best 10, the end of its grid"
    assert study.grid_of(runs_of(held_to("initial", {10.0: 0.6}))) == "1 betas, best 10"


def test_settings_that_are_as_good():
    """All are called equivalent, within the margin of the score."""
    flat = {0.01: 0.6, 1.0: 0.6, 10.0: 0.6}
    found = study.claims_of_necessity(necessity(flat, flat, [20.0] * 6, flat, flat))
    assert found["verdict"].tolist() == ["equivalent", "equivalent", "undecided", "equivalent", "equivalent"]
    rows = [
        row
        for name in ("initial", "world_clean", "world_alien", "world_other_tokenizer")
        for row in held_to(name, flat)
    ]
    found = study.claims_of_compatibility(runs_of([{**row, SUMMARIES: "human"} for row in rows]))
    assert found["verdict"].tolist() == ["equivalent"] * 5
    found = study.claims_of_tuned(tuned(flat, flat, flat))
    assert found["verdict"].tolist() == ["equivalent"] * 2


def test_table_3():
    """The methods in their order at their best beta, with an interval that knows that beta was chosen."""
    start = runs_of([{"reference": "initial", "loss": "dpo", "beta": 0.1, "score": 0.5, "kl": 0.0}])
    again = start.assign(beta=1.0, score=0.9)  # the same policies, told of another beta
    final = pd.concat([AS_PUBLISHED, *(one.assign(untrained=True) for one in (start, again))])
    table = study.table_3(final)
    assert table.index.tolist() == ["SFT", "DPO", "posterior", "likelihood", "SimPO", "ORPO"]
    assert table["beta"].tolist() == ["", "0.1", "10", "0.1", "1", "0.1"]
    assert table.loc[["DPO", "posterior"], "length"].str[:4].tolist() == ["22.0", "50.0"]
    mean, _, high = student(values(start))
    assert table.loc["SFT", "score"] == f"{mean:.3f} ± {high - mean:.3f}"
    for method, reference, tried in (
        ("DPO", "initial", (0.01, 0.1, 10.0)),
        ("posterior", "reference_free", (0.01, 1.0, 10.0)),
    ):
        runs = [values(AS_PUBLISHED, reference=reference, loss="dpo", beta=beta) for beta in tried]
        mean = max(one.mean() for one in runs)
        low, high = max(student(one, looks=3)[1] for one in runs), max(student(one)[2] for one in runs)
        assert table.loc[method, "score"] == f"{mean:.3f} [{low:.3f}, {high:.3f}]"
    by_beta = study.table_3_by_beta(final)
    assert by_beta.columns.tolist() == ["DPO", "posterior", "likelihood", "SimPO", "ORPO"]
    assert by_beta.index.tolist() == ["10", "2", "1", "0.1", "0.01"]
    assert by_beta["posterior"].str[:5].tolist() == ["0.700", "", "0.550", "", "0.500"]


# Tables 4 and 5


def fitting(policy, **scores):
    return [{**row, SUMMARIES: policy} for name, grid in scores.items() for row in held_to(name, grid)]


BETTER = {
    "initial": {0.01: 0.5, 0.1: 0.7, 1.0: 0.6},
    "compatible": {0.01: 0.6, 0.1: 0.75, 1.0: 0.9},
    "foreign": {0.01: 0.4, 0.1: 0.55, 1.0: 0.5},
    "other": {0.01: 0.5, 0.1: 0.8, 1.0: 0.6},
}
WORSE = {
    "initial": {0.01: 0.7, 0.1: 0.8, 1.0: 0.75},
    "compatible": {0.01: 0.7, 0.1: 0.6, 1.0: 0.5},
    "foreign": {0.01: 0.8, 0.1: 0.95, 1.0: 0.85},
    "other": {0.01: 0.4, 0.1: 0.3, 1.0: 0.74},
}
SAID = {
    "better": ("supports", [0.2, 0.15, 0.35 / 3, 0.3, 0.1]),
    "worse": ("refutes", [-0.1, -0.15, -0.35 / 3, -0.2, -0.06]),
}


def of_policies(human, alien):
    """Two policies of the embedded world: what fits one is foreign to the other."""
    rows = fitting("human", initial=human["initial"], world_clean=human["compatible"], world_alien=human["foreign"])
    rows += fitting("human", world_other_tokenizer=human["other"])
    rows += fitting("alien", initial=alien["initial"], world_clean=alien["foreign"], world_alien=alien["compatible"])
    return runs_of(rows + fitting("alien", world_other_tokenizer=alien["other"]))


@pytest.mark.parametrize("human,alien", [("better", "worse"), ("worse", "better")])
def test_claims_of_compatibility(human, alien):
    worlds = {"better": BETTER, "worse": WORSE}
    found = study.claims_of_compatibility(of_policies(worlds[human], worlds[alien]))
    numbered = ["5a", "5b", "5c", "5d", "5e", "5a", "5b", "5c", "5d"]
    assert [claim[:2] for claim in found.index] == numbered
    assert [claim.split("(")[-1] for claim in found.index] == ["human)"] * 5 + ["alien)"] * 4
    assert found["verdict"].tolist() == [SAID[human][0]] * 5 + [SAID[alien][0]] * 4
    assert means(found) == pytest.approx([*SAID[human][1], *SAID[alien][1][:4]], abs=2e-3)


def test_tables_of_grids():
    final = of_policies(BETTER, WORSE)
    start = runs_of([{"reference": "initial", "loss": "dpo", "beta": 9.0, "score": 0.45, SUMMARIES: "human"}])
    both = pd.concat([final, start.assign(untrained=True)])
    table = study.table_4(both)
    references = ["initial", "world_clean", "world_alien", "world_other_tokenizer"]
    assert table.index.tolist() == ["1", "0.1", "0.01"]
    assert table.columns.tolist() == [f"{policy}, {name}" for policy in ("human", "alien") for name in references]
    assert table["human, world_clean"].str[:5].tolist() == ["0.900", "0.750", "0.600"]
    assert table["alien, world_clean"].str[:5].tolist() == ["0.850", "0.950", "0.800"]
    table = study.table_5(both)
    assert table.index.tolist() == ["SFT", *references]
    assert table["human"].str[:5].tolist() == ["0.450", "0.700", "0.900", "0.550", "0.800"]
    assert table["alien"].str[:5].tolist() == ["0.500", "0.800", "0.950", "0.700", "0.740"]
    runs = [values(final, beta=beta, reference="world_clean", **{SUMMARIES: "human"}) for beta in (0.01, 0.1, 1.0)]
    low, high = max(student(one, looks=3)[1] for one in runs), max(student(one)[2] for one in runs)
    assert table.loc["world_clean", "human"] == f"0.900 [{low:.3f}, {high:.3f}]"


def test_a_mean_over_betas():
    """Over the betas that both have, of the seeds that have them all; no beta is chosen."""
    one = runs_of(held_to("initial", {0.01: 0.5, 0.1: 0.9, 1.0: 0.7}))
    other = runs_of(held_to("world_alien", {0.1: 0.6, 1.0: 0.5, 10.0: 0.1}))
    other = other[(other["seed"] > 0) | (other["beta"] != 1.0)]  # seed 0 has no run at beta 1
    found, betas = study.over_betas(one, other)
    differences = [values(one, beta=beta)[1:] - values(other[other["seed"] > 0], beta=beta) for beta in (0.1, 1.0)]
    assert (found.mean, found.low, found.high) == pytest.approx(student(np.mean(differences, axis=0)))
    assert (found.seeds, betas) == (SEEDS - 1, "betas 0.1, 1")
    assert study.over_betas(one, other[other["beta"] == 10.0]) == (seeds.UNMEASURED, "betas that both have")


# Table 7


def tuned(other, usual, longer=None):
    rows = held_to("other", other, epochs=1) + held_to("initial", usual, epochs=1)
    return runs_of(rows + held_to("initial", longer or {}, epochs=2))


@pytest.mark.parametrize(
    "other,usual,longer,said,measured",
    [
        ({0.1: 0.8, 1.0: 0.9}, {0.1: 0.7, 1.0: 0.75}, {0.1: 0.85, 1.0: 0.95}, ["supports", "refutes"], [0.15, -0.05]),
        ({0.1: 0.6, 1.0: 0.7}, {0.1: 0.75, 1.0: 0.8}, {0.1: 0.5, 1.0: 0.55}, ["refutes", "supports"], [-0.1, 0.15]),
    ],
)
def test_claims_of_tuned(other, usual, longer, said, measured):
    final = tuned(other, usual, longer)
    found = study.claims_of_tuned(final)
    assert found["verdict"].tolist() == said
    assert means(found) == pytest.approx(measured, abs=1e-3)
    table = study.table_7(final)
    assert table.columns.tolist() == ["other", "initial", "initial, 2 epochs"]
    assert [float(cell[:5]) for cell in table.loc["1"]] == [other[1.0], usual[1.0], longer[1.0]]


# Runs of another folder


def test_runs_that_join():
    """What a table lacks comes from a sweep of strengths: of the same policies, and where there are two, one's own."""
    own = runs_of([*held_to("world_clean", {0.1: 0.9}), *held_to("initial", {0.1: 0.7})]).assign(policy="tiny")
    more = runs_of(held_to("initial", {0.1: 0.6, 1.0: 0.5})).assign(policy="tiny")
    others = more.assign(policy="large", beta=5.0)
    both = study.joined(own, pd.concat([more, others, more[more["beta"] == 1.0].assign(untrained=True)]))
    shown = both.groupby(["reference", "beta", "untrained"])["score"].mean().round(2).to_dict()
    expected = {("initial", 0.1, False): 0.7, ("initial", 1.0, False): 0.5, ("world_clean", 0.1, False): 0.9}
    assert shown == {**expected, ("initial", 1.0, True): 0.5}
    assert both["policy"].unique().tolist() == ["tiny"]
    with pytest.raises(ValueError, match="must be scored alike"):
        study.joined(own, more.assign(scored_by="alpaca_eval/length_controlled"))


def test_what_is_read(monkeypatch):
    """The table of necessity takes only what was measured before training from the fourth folder, the others all."""
    start = runs_of(held_to("initial", {0.1: 0.5}), seeds=1).assign(untrained=True, policy="tiny")
    mine = runs_of(held_to("other", {0.1: 0.9}, epochs=1), seeds=1).assign(policy="tiny")
    more = pd.concat(
        [start, runs_of(held_to("initial", {0.1: 0.7, 1.0: 0.8}, epochs=1), seeds=1).assign(policy="tiny")]
    )
    asked = {}

    def finished(path, keys, only, shown=(), optional=()):
        asked[path] = (keys, only, shown)
        return more if path == "strength" else mine

    monkeypatch.setattr(seeds, "finished", finished)
    frames = study.read("needed", "fitting", "after", "strength", policy="tiny")
    assert {name: len(frame) for name, frame in frames.items()} == {"necessity": 2, "compatibility": 4, "tuned": 4}
    assert frames["necessity"]["untrained"].sum() == 1
    setting, every = (
        ("beta", "seed", "reference", SUMMARIES),
        ("beta", "seed", "reference", SUMMARIES, "loss", "epochs"),
    )
    keys = {"needed": (*setting, "loss"), "fitting": setting, "after": (*setting, "epochs"), "strength": setting}
    assert asked == {path: (own, {"policy": "tiny"}, every) for path, own in keys.items()}


# Figures


def test_figures():
    """Score left and length right, over beta on a logarithmic axis; a row per policy, a line per reference."""
    final = of_policies(BETTER, WORSE)
    final = final.assign(length=final["score"] * 100)
    drawing = study.figure(final, "reference", SUMMARIES)
    panels, labels = curves(drawing), [(axis.get_xlabel(), axis.get_ylabel()) for axis in drawing.axes]
    assert labels == [("beta", "win rate"), ("beta", "tokens per response")] * 2
    assert [axis.get_title(loc="left") for axis in drawing.axes] == ["human", "human", "alien", "alien"]
    assert all((axis.get_xscale(), axis.get_yscale()) == ("log", "linear") for axis in drawing.axes)
    references = ["initial", "world_clean", "world_alien", "world_other_tokenizer"]
    for place, policy in ((0, "human"), (2, "alien")):
        assert [*panels[place]] == [*panels[place + 1]] == references
        for reference in references:
            across, up, low, high = panels[place][reference]
            assert across == [0.01, 0.1, 1.0]
            for beta, *point in zip(across, up, low, high, strict=True):
                expected = student(values(final, beta=beta, reference=reference, **{SUMMARIES: policy}))
                assert point == pytest.approx(expected, abs=1e-9)
            assert panels[place + 1][reference][1] == pytest.approx([100 * one for one in up])
        shown = drawing.axes[place + 1].get_legend().get_texts()
        assert [text.get_text() for text in shown] == references
    half = [line for line in drawing.axes[0].lines if len({*line.get_ydata()}) == 1 and line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in half] == [0.5]
    many = runs_of(row for number in range(9) for row in held_to(f"reference {number}", {0.1: 0.5, 1.0: 0.5}))
    assert len(curves(study.figure(many, "reference"))[0]) == 9  # more than there are colours
    judged = study.figure(final.assign(scored_by="alpaca_eval/length_controlled"), "reference", SUMMARIES)
    assert judged.axes[0].get_ylabel() == "length-controlled win rate (%)"
    assert not [line for line in judged.axes[0].lines if line.get_linestyle() == "--"]


def test_what_a_study_shows():
    """Runs before training are in no curve, and each table has its own runs."""
    start = runs_of(held_to("initial", {0.1: 0.5})).assign(untrained=True)
    frames = {
        "necessity": pd.concat([AS_PUBLISHED, start]),
        "compatibility": pd.concat([of_policies(BETTER, WORSE), start.assign(**{SUMMARIES: "human", "beta": 7.0})]),
        "tuned": tuned({0.1: 0.8}, {0.1: 0.7}),
    }
    tables, figures = study.study(frames)
    assert [*curves(figures["necessity"])[0]] == ["DPO", "posterior", "likelihood", "SimPO", "ORPO"]
    assert curves(figures["compatibility"])[0]["initial"][0] == [0.01, 0.1, 1.0]
    assert tables["table_3"].index[0] == "SFT"
    assert tables["table_4_measures"].index[:2].tolist() == ["human, initial, 0.01", "human, initial, 0.1"]
    assert tables["table_7_measures"].index.tolist() == ["other, 0.1", "initial, 0.1"]
    assert len(tables["claims_of_references"]) == 5 + 9 + 2
