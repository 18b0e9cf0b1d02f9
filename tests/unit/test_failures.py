"""Which runs a report says look broken, on hand-made runs on both sides of each threshold."""

import json
from pathlib import Path

import pandas as pd
import pytest
from sweeps import saved  # noqa: F401
from test_runs import evaluation, run

from dpo import results

FINE = {
    "n": 1000,
    **{"ended": 0.97, "words": 25.0, "baseline/words": 25.0, "broken": 0.04, "repetition": 0.02, "invalid": 0.01},
    **{"baseline/invalid": 0.02, "valid": 0.98, "win_rate": 0.7, "too_long": 0.0, "win_rate_lc": 0.6612},
}


@pytest.mark.parametrize(
    "measured,said",
    [
        ({}, []),
        ({"ended": 0.59, "words": 80.0}, ["41 % unfinished, length 3.2 times the baseline's"]),
        ({"ended": 0.79, "words": 28.0}, ["21 % unfinished, length 1.1 times the baseline's"]),
        ({"ended": 0.81, "words": 80.0}, []),  # long, but it ends
        ({"ended": 0.1, "words": 27.0}, []),  # cut as the baseline's responses are
        ({"ended": 0.1, "words": 80.0, "baseline/words": None}, []),  # nobody knows how long they are meant to be
        ({"ended": 0.1, "words": 80.0, "baseline/words": 0.0}, []),
        ({"broken": 0.51}, ["51 % broken"]),
        ({"broken": 0.5}, []),
        ({"valid": 0.49}, ["49 % of clauses valid"]),
        ({"valid": 0.5}, []),
        ({"invalid": 0.08}, ["8 % with invalid characters"]),
        ({"invalid": 0.06}, []),
        ({"invalid": 1.0, "baseline/invalid": 0.99}, []),  # another language
        ({"invalid": 1.0, "baseline/invalid": None}, []),
        ({"repetition": 0.31}, ["repetition 0.31"]),
        ({"repetition": 0.29}, []),
        ({"win_rate": 0.09}, ["win rate 0.09"]),
        ({"win_rate": 0.11}, []),
        ({"win_rate": 0.09, "evaluation.baseline": "initial"}, ["win rate 0.09"]),
        ({"win_rate": 0.09, "evaluation.baseline": None}, ["win rate 0.09"]),
        ({"win_rate": 0.09, "evaluation.baseline": "human"}, []),
        ({"broken": 0.6, "valid": 0.1, "repetition": 0.5}, ["60 % broken", "10 % of clauses valid", "repetition 0.50"]),
    ],
)
def test_failures_of_one_run(measured, said):
    assert results.failures({**FINE, **measured}) == said
    frame = pd.DataFrame([{**FINE, **measured}, FINE])
    assert [results.failures(row) for row in frame.to_dict("records")] == [said, []]
    assert bool(said) or not results.degenerate(frame).any()  # what is degenerate looks broken


def test_what_was_not_measured_says_nothing():
    assert results.failures({"n": 10}) == []
    assert results.failures(dict.fromkeys(FINE)) == []


def sweep(folder: Path, *measured: dict, **settings) -> pd.DataFrame:
    for number, figures in enumerate(measured):
        file = run(folder, 10.0**-number, **settings) / "evaluation.json"
        file.write_text(json.dumps({**evaluation(0.1), **FINE, **figures}))
    return results.final(folder)


def test_one_line_says_which_runs_look_broken_and_how(tmp_path, capsys, saved):  # noqa: F811
    frame = sweep(tmp_path, {}, {"broken": 0.6}, {"ended": 0.59, "words": 80.0, "repetition": 0.4})
    line = (
        "alarm: 2 of 3 runs look broken: beta=0.01 (41 % unfinished, length 3.2 times the baseline's, repetition "
        "0.40); beta=0.1 (60 % broken)"
    )
    assert results.alarm(frame) == line
    results.report(tmp_path)
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_null_is_told_where_it_tells_runs_apart():
    """As of a sweep of adapters beside all weights; what another option's knob has no value of is left out."""
    rank, option = [None, 8.0, None, 8.0], ["dpo", "dpo", "ipo", "ipo"]
    frame = pd.DataFrame({"run": [*"abcd"], "loss": option, "policy.lora.rank": rank, "broken": [0.6, 0.6, 0.0, 0.0]})
    frame.attrs["swept"] = ["loss", "policy.lora.rank"]
    said = "loss=dpo, policy.lora.rank=null (60 % broken); loss=dpo, policy.lora.rank=8 (60 % broken)"
    assert results.alarm(frame) == f"alarm: 2 of 4 runs look broken: {said}"
    alone = frame.iloc[[0, 3]]
    alone.attrs["swept"] = frame.attrs["swept"]
    assert results.alarm(alone) == "alarm: 1 of 2 runs looks broken: loss=dpo (60 % broken)"


def test_no_line_where_none_does(tmp_path, capsys, saved):  # noqa: F811
    assert results.alarm(sweep(tmp_path, {}, {})) is None
    results.report(tmp_path)
    assert "alarm" not in capsys.readouterr().out


def test_the_line_counts_and_does_not_grow(tmp_path):
    assert results.alarm(sweep(tmp_path / "one", {"broken": 0.6})) == (
        "alarm: 1 of 1 run looks broken: beta=1.0,reference=initial (60 % broken)"
    )
    said = results.alarm(sweep(tmp_path / "two", {"broken": 0.6}, {}))
    assert said == "alarm: 1 of 2 runs looks broken: beta=1 (60 % broken)"
    said = results.alarm(sweep(tmp_path / "many", *[{"broken": 0.6}] * 8))
    assert said.startswith("alarm: 8 of 8 runs look broken: beta=1e-07 (60 % broken); ")
    assert said.endswith("; and 3 more")
    assert said.count("beta=") == 5


def test_detectors_are_columns_where_they_have_something_to_say(tmp_path):
    fine = results.table(sweep(tmp_path / "fine", {}, {}))
    assert fine["LC"].tolist() == ["0.661", "0.661"]
    names = {"broken", "repetition", "invalid", "too long"}
    assert not names & {*fine.columns}
    for name, key in (("broken", "broken"), ("repetition",) * 2, ("invalid",) * 2, ("too long", "too_long")):
        table = results.table(sweep(tmp_path / name, {key: 0.1512}, {}))
        assert names & {*table.columns} == {name}
        assert table[name].tolist() == [f"{FINE[key]:.3f}", "0.151"]
    sweep(tmp_path / "seeds", {"broken": 0.2, "win_rate_lc": 0.5})
    frame = sweep(tmp_path / "seeds", {"broken": 0.4, "win_rate_lc": 0.6}, seed=1)
    (row,) = results.over_seeds(frame).to_dict("records")
    assert (row["broken"], row["LC"]) == ("0.300 ± 0.141", "0.550 ± 0.071")
