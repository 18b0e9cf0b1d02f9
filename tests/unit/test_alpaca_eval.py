"""AlpacaEval's files and win rates; the length-controlled one against numbers that the package itself gave."""

import gzip
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dpo.data.instructions import read_instructions, write_outputs
from dpo.results import alpaca_eval


def made_up(tasks: int = 120) -> list[dict]:
    """Annotations by a judge that likes length, with a tie and one without an answer."""
    rng, rows = np.random.default_rng(3), []
    for task in range(tasks):
        short, long = rng.integers(20, 200, 2)
        chance = 1 / (1 + np.exp(-(1.5 * np.tanh((long - short) / 60) - 0.4 + rng.normal())))
        preference = {17: None, 30: 0}.get(task, round(float(1 + chance), 6))
        rows.append(annotation(f"task {task}", "a" * int(short), "b" * int(long), preference))
    return rows


def annotation(instruction: str, baseline: str, policy: str, preference: float | None) -> dict:
    named = {"generator_1": "baseline", "generator_2": "policy", "annotator": "judge"}
    return {"instruction": instruction, "output_1": baseline, "output_2": policy, "preference": preference, **named}


def made_up_gamed(tasks: int = 120) -> pd.DataFrame:
    rng, parts = np.random.default_rng(7), []
    difficulty = rng.normal(size=tasks)
    for model, shift in (("verbose", 1.2), ("concise", -1.5)):
        longer = rng.normal(shift, 0.6, size=tasks)
        preference = 1 / (1 + np.exp(-(1.1 * np.tanh(longer) + rng.normal(size=tasks))))
        columns = {"index": range(tasks), "model": model, "preference": preference, "std_delta_len": longer}
        parts.append(pd.DataFrame(columns | {"instruction_difficulty": difficulty, "not_gamed_baseline": False}))
    return pd.concat(parts, ignore_index=True)


def test_win_rates_are_those_of_the_package():
    """get_length_controlled_winrate of alpaca_eval 0.6.6 said these of the same rows (scikit-learn 1.9.1)."""
    rows = made_up()
    raw = alpaca_eval.win_rate(rows)
    assert 100 * raw.value == pytest.approx(46.32938235294118)
    assert 100 * (raw.high - raw.low) / 2 / 1.959964 == pytest.approx(2.56309091413445)
    controlled = alpaca_eval.length_controlled(rows, rows, made_up_gamed())
    assert 100 * controlled.value == pytest.approx(45.72263212214383, abs=1e-3)
    assert controlled.low < controlled.value < controlled.high
    # The regression's own error is in it: it is about as wide as that of the raw rate, far from the package's 0.15.
    assert 0.5 < (controlled.high - controlled.low) / (raw.high - raw.low) < 1.5


def test_length_alone_wins_nothing():
    """A policy that answers as the baseline does, but longer, to a judge that looks at nothing else."""
    rng = np.random.default_rng(0)
    rows = []
    for task in range(300):
        length = int(rng.integers(50, 150))
        words = length + int(rng.integers(-20, 120))
        preference = 1 + 1 / (1 + np.exp(-2 * np.tanh((words - length) / 41)))
        rows.append(annotation(f"task {task}", "a" * length, "b" * words, float(preference)))
    gamed = made_up_gamed(300)
    gamed["preference"] = 1 / (1 + np.exp(2 * np.tanh(gamed["std_delta_len"])))  # of the baseline over the policy
    assert alpaca_eval.win_rate(rows).low > 0.6
    assert alpaca_eval.length_controlled(rows, rows, gamed).value == pytest.approx(0.5, abs=0.02)


def test_rows_find_their_instruction_in_any_order():
    rows = made_up(60)
    rows[1]["instruction"] = rows[0]["instruction"]  # twice in the list, as in the real one
    gamed = made_up_gamed(60)
    assert alpaca_eval._indices(rows, rows) == list(range(60))
    assert sorted(alpaca_eval._indices(rows[::-1], rows)) == list(range(60))
    ahead = alpaca_eval.length_controlled(rows, rows, gamed).value
    assert alpaca_eval.length_controlled([*rows[1:], rows[0]], rows, gamed).value == pytest.approx(ahead, abs=0.01)
    with pytest.raises(ValueError, match="found 1 others, such as 'task 59'"):
        alpaca_eval.length_controlled(rows, rows[:-1], gamed)
    with pytest.raises(ValueError, match="none of 10, such as number 50"):
        alpaca_eval.length_controlled(rows, rows, made_up_gamed(50))


def test_the_regression_is_of_each_row_with_its_own_instruction(monkeypatch):
    """Lengths, difficulties and wins, whatever the order of the rows; one without a preference teaches nothing."""
    rows, gamed, fitted = made_up(60), made_up_gamed(60), []

    def fit(features, chances, weights, penalty):
        fitted.append((features[weights == 1], chances[weights == 1]))  # no rewritten baselines
        return np.zeros(3)

    monkeypatch.setattr(alpaca_eval, "_fit", fit)
    monkeypatch.setattr(alpaca_eval, "_held_out_loss", lambda *_: 0.0)
    assert alpaca_eval.length_controlled(rows[::-1], rows, gamed).value == 0.5
    features, chances = fitted[-1]
    known = [row for row in rows[::-1] if row["preference"] is not None]
    difficulty = [gamed["instruction_difficulty"][int(row["instruction"].split()[1])] for row in known]
    assert features[:, 1].tolist() == difficulty
    assert ((features[:, 0] > 0) == [len(row["output_1"]) > len(row["output_2"]) for row in known]).all()
    assert chances.tolist() == [row["preference"] - 1 if row["preference"] else 0.5 for row in known]


def test_the_interval_is_over_instructions(monkeypatch):
    """Of a regression that says the same of every resample: that of the mean of what it predicts."""
    rows, gamed = made_up(400), made_up_gamed(400)
    monkeypatch.setattr(alpaca_eval, "RESAMPLES", 5000)
    monkeypatch.setattr(alpaca_eval, "_fit", lambda *_: np.array([0.0, 1.0, 0.0]))
    monkeypatch.setattr(alpaca_eval, "_held_out_loss", lambda *_: 0.0)
    found = alpaca_eval.length_controlled(rows, rows, gamed)
    predicted = 1 / (1 + np.exp(-gamed["instruction_difficulty"][:400]))
    assert found.value == pytest.approx(predicted.mean())
    half = 1.96 * predicted.std() / 20
    assert (found.value - found.low, found.high - found.value) == pytest.approx((half, half), rel=0.06)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"preference": 2.5}, "found 1 others, such as 2.5"),
        ({"preference": 0.5}, "found 1 others, such as 0.5"),
        ({"preference": "2"}, "found 1 others, such as 2"),
        ({"preference": True}, "found 1 others, such as True"),
        ({"generator_2": "another"}, "one policy with one baseline"),
        ({"output_2": None}, "instruction, output_1, output_2"),
    ],
)
def test_other_files_are_refused(tmp_path, change, message):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps([*made_up(3)[1:], made_up(1)[0] | change]))
    with pytest.raises(ValueError, match=message):
        alpaca_eval.read_annotations(path)


@pytest.mark.parametrize("text", ["", "{}", "[]", "[1]", '[{"instruct": "a"}]', '[{"instruction": 3}]'])
def test_instructions_are_checked(tmp_path, monkeypatch, text):
    path = tmp_path / "alpaca_eval.json"
    path.write_text(text)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"must be JSON|must be a JSON list of objects"):
        read_instructions("~/alpaca_eval.json")
    with pytest.raises(ValueError, match="must be"):
        read_instructions(str(path))
    with pytest.raises(ValueError, match="found no file"):
        read_instructions(str(tmp_path / "other.json"))
    assert read_instructions(None) == []


def test_outputs_are_what_the_package_reads(tmp_path):
    instructions = [
        {"dataset": "vicuna", "instruction": "Say é.", "output": "no", "generator": "x"},
        {"instruction": "b"},
    ]
    directory = tmp_path / "sweep" / "beta=0.1"
    directory.mkdir(parents=True)
    write_outputs(directory, instructions, ["é", ""])
    frame = pd.read_json(directory / "alpaca_eval.json")
    assert list(frame) == ["dataset", "instruction", "output", "generator", "datasplit"]
    assert frame.iloc[0].tolist() == ["vicuna", "Say é.", "é", "sweep/beta=0.1", "eval"]
    assert frame["output"].tolist() == ["é", ""]


@pytest.mark.long
def test_the_command(tmp_path, monkeypatch, capsys):
    names = {"annotations": made_up(40), "instructions": made_up(40)}
    for name, rows in names.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    made_up_gamed(40).to_csv(tmp_path / "df_gamed.csv", index=False)

    def said(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["dpo.results.alpaca_eval", *arguments])
        monkeypatch.chdir(tmp_path)
        alpaca_eval.main()
        return capsys.readouterr().out

    raw = said("annotations.json")
    assert "length-controlled" not in raw
    assert not list(tmp_path.rglob(alpaca_eval.SCORES))  # the annotations are not in a run
    both = said("annotations.json", "--instructions", "instructions.json", "--gamed", "df_gamed.csv")
    assert str(alpaca_eval.win_rate(made_up(40))) in raw
    assert str(alpaca_eval.length_controlled(made_up(40), made_up(40), made_up_gamed(40))) in both
    judged = tmp_path / "runs/sweep/beta=0.1/judge"
    judged.mkdir(parents=True)
    (judged / "annotations.json").write_text(json.dumps(made_up(40)))
    (judged.parent / "evaluation.json").write_text("{}")
    said(str(judged / "annotations.json"), "--instructions", "instructions.json", "--gamed", "df_gamed.csv")
    kept = json.loads((judged.parent / "alpaca_eval_scores.json").read_text())
    controlled = alpaca_eval.length_controlled(made_up(40), made_up(40), made_up_gamed(40))
    assert kept["alpaca_eval/length_controlled"] == controlled.value
    assert kept["alpaca_eval/win_rate/low"] == alpaca_eval.win_rate(made_up(40)).low
    with pytest.raises(SystemExit):
        said("annotations.json", "--gamed", "df_gamed.csv")
    (tmp_path / "df_gamed.csv").write_text("index\n1\n")
    with pytest.raises(SystemExit, match="found no column instruction_difficulty, preference, std_delta_len"):
        said("annotations.json", "--instructions", "instructions.json", "--gamed", "df_gamed.csv")


DATA = Path(__file__).parents[3] / "shared/data"


def real(model: str) -> list[dict]:
    """The published annotations where they are at hand, else as many made-up ones."""
    file = DATA / f"alpaca-eval-{model}.annotations.json.gz"
    return json.loads(gzip.decompress(file.read_bytes())) if file.exists() else made_up(805)


@pytest.mark.parametrize(
    "model,published",
    [("OpenHermes-2.5-Mistral-7B", 10.340415705751552), ("Mixtral-8x7B-Instruct-v0.1_concise", 13.744040154795034)],
)
def test_one_row_per_instruction_of_one_judge(tmp_path, model, published):
    """The leaderboard's win rate from the published file; none where rows were appended or a second judge was."""
    rows, path = real(model), tmp_path / "annotations.json"

    def read(changed: list[dict], instructions: Sequence[dict] = ()) -> list[dict]:
        path.write_text(json.dumps(changed))
        return alpaca_eval.read_annotations(path, instructions)

    if (DATA / "alpaca-eval-leaderboard.csv").exists():
        assert 100 * alpaca_eval.win_rate(read(rows)).value == pytest.approx(published, rel=1e-12)
    first = re.escape(repr(rows[0]["instruction"][:80]))
    with pytest.raises(ValueError, match=f"found more of 1:\n  2 x {first}"):
        read([*rows, rows[0] | {"preference": 2}])
    with pytest.raises(ValueError, match="found more of 805:"):
        read(rows * 2)
    assert len(read([*rows, rows[0]], [*rows, rows[0]])) == 806  # AlpacaEval asks it twice
    with pytest.raises(ValueError, match=f"found 805 rows of {rows[0]['annotator']}, 805 rows of second; split"):
        read([*rows, *(row | {"annotator": "second"} for row in rows)])


def test_rows_without_a_preference_are_counted(tmp_path, monkeypatch, capsys):
    """As in the package: the rate is that of the others. How many they are is said and kept."""
    rows = [annotation(f"task {n}", "a", "bb", preference) for n, preference in enumerate([2, 1, None, 2, None])]
    (tmp_path / "evaluation.json").write_text("{}")
    (tmp_path / "annotations.json").write_text(json.dumps(rows))
    assert alpaca_eval.judged(rows) == 3
    assert alpaca_eval.win_rate(rows).value == pytest.approx(2 / 3)
    monkeypatch.setattr(sys, "argv", ["dpo.results.alpaca_eval", str(tmp_path / "annotations.json")])
    alpaca_eval.main()
    head, line = (" ".join(line.split()) for line in capsys.readouterr().out.splitlines())
    assert head == "policy baseline judged win rate, % [95 %] characters"
    assert line == "policy baseline 3 of 5 66.67 [1.33, 100.00] 2"
    assert json.loads((tmp_path / alpaca_eval.SCORES).read_text())["alpaca_eval/judged"] == 3


def test_what_is_no_file_is_called_by_name(tmp_path):
    with pytest.raises(ValueError, match=f"df_gamed.csv must be at {tmp_path}, found no file"):
        alpaca_eval.read_gamed(tmp_path)
