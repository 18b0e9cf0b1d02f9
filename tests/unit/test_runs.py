"""Run directories as frames, table and figure."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from filelock import FileLock
from omegaconf import OmegaConf
from sweeps import saved  # noqa: F401

from dpo import results
from dpo.results import __main__ as main


def run(directory: Path, beta: float, finished: bool = True, **settings: Any) -> Path:
    """A run directory as `dpo.sweep.launch` and `dpo.train` leave it."""
    reference = settings.pop("reference", "initial")
    knobs = {"ema": {"alpha": 0.6}, "initial": {"path": None}, "reference_free": {}}[reference]
    config = {
        "id": "0",
        "name": directory.name,
        "seed": 0,
        "beta": beta,
        "lr": 5e-4,
        "micro_batch_tokens": 32,
        "loss": {"_target_": "dpo.losses.dpo", "beta": beta},
        "data": {"_target_": "dpo.world.language.world", "seed": settings.get("seed", 0)},
        "reference": {"_target_": f"dpo.references.{reference}", **knobs},
        "choices": {"loss": "dpo", "reference": reference, "data": "world"},
    } | settings
    name = ",".join([f"beta={beta}", f"reference={reference}", *(f"{k}={v}" for k, v in settings.items())])
    directory = directory / name
    directory.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(config), directory / "config.yaml")
    rows = [{"step": step, "split": "train", "loss": 0.7 - step / 100, "lr": 1e-5 * step} for step in (1, 2)]
    rows.append({"step": 2, "split": "validation", "loss": 0.69, "rewards/accuracies": 0.6})
    rows += [{"step": 2, "split": "test", "win_rate": 0.6}] if finished else []
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (directory / "evaluation.json").write_text(json.dumps(evaluation(beta)))
    return directory


def evaluation(beta: float) -> dict[str, Any]:
    win = {"n": 1000, "win_rate": 0.6, "win_rate/low": 0.55, "win_rate/high": 0.65}
    held_out = {"rewards/accuracies": 0.7, "rewards/margins": beta}
    shape = {"length": 20.25, "ended": 1.0, "valid": None, "wrong": 0.625, "steps": 2, "seconds": 3.0}
    return {**win, "kl": 1 / beta, "kl/se": 0.05, **held_out, **shape}


def test_status(tmp_path):
    directory = run(tmp_path, 0.1, finished=False)
    assert results.status(directory) == "stopped"
    assert results.reason(directory) is None
    with FileLock(directory / ".lock"):
        assert results.status(directory) == "running"
    (directory / "error.json").write_text(json.dumps({"type": "ValueError", "message": "no"}))
    assert results.status(directory) == "failed"
    assert results.reason(directory) == "ValueError: no"
    (directory / "error.json").write_text(json.dumps({"type": "Stopped", "message": "at step 3"}))
    assert results.status(directory) == "stopped"
    assert results.reason(directory) == "at step 3"
    (directory / "error.json").write_text("{")
    assert results.status(directory) == "failed"
    (directory / "evaluation.json").write_text('{"steps": 2}')
    assert results.status(directory) == "finished"
    (tmp_path / "new").mkdir()
    assert results.status(tmp_path / "new") == "planned"


def test_load_is_tidy(tmp_path):
    for beta in (0.1, 0.02):
        run(tmp_path, beta, lr=beta)
    frame = results.load(tmp_path)
    assert list(frame.columns[:5]) == ["run", "beta", "lr", "step", "split"]
    assert results.swept(frame) == ["beta", "lr"]
    assert not frame.duplicated(["run", "split", "step"]).any()
    assert frame.groupby("run").size().tolist() == [4, 4]
    assert frame["beta"].iloc[0] == 0.02  # in the order of their values
    assert "valid" not in frame  # null everywhere
    assert frame.loc[frame["split"] == "train", "logged/lr"].tolist() == [1e-5, 2e-5] * 2  # lr is a setting here
    test = frame[frame["split"] == "test"]
    assert test["kl"].tolist() == [50.0, 10.0]
    assert test["step"].tolist() == [2, 2]


def test_final_has_the_finished_runs_only(tmp_path):
    run(tmp_path, 0.1)
    run(tmp_path, 0.1, seed=1)
    run(tmp_path, 0.2, finished=False)
    frame = results.final(tmp_path)
    assert len(frame) == 2
    assert results.swept(frame) == ["seed"]  # data.seed, which follows it, is not told twice
    assert frame["beta"].tolist() == [0.1, 0.1]
    assert results.swept(results.load(tmp_path)) == ["beta", "seed"]


def test_an_option_is_a_column_and_its_own_knobs_vary_within_it(tmp_path):
    for reference in ("initial", "reference_free", "ema"):
        run(tmp_path, 0.1, reference=reference)
    assert results.swept(results.final(tmp_path)) == ["reference"]
    moved = run(tmp_path / "again", 0.1, reference="ema")
    config = OmegaConf.load(moved / "config.yaml")
    config.reference.alpha = 1.0
    OmegaConf.save(config, moved / "config.yaml")
    moved.rename(tmp_path / "other")
    frame = results.final(tmp_path)
    assert results.swept(frame) == ["reference", "reference.alpha"]
    assert sorted(frame["reference"]) == ["ema", "ema", "initial", "reference_free"]


def test_what_changes_no_number_does_not_vary(tmp_path):
    run(tmp_path, 0.1)
    run(tmp_path, 0.2, micro_batch_tokens=8)
    assert results.swept(results.load(tmp_path)) == ["beta"]


def test_a_line_that_is_cut_short_is_left_out(tmp_path):
    directory = run(tmp_path, 0.1, finished=False)
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "spl')
    assert results.load(tmp_path)["step"].tolist() == [1, 2, 2]


def test_table(tmp_path):
    run(tmp_path, 0.1)
    table = results.table(results.final(tmp_path))
    assert table.iloc[0].to_dict() == {
        "beta": "0.1",
        "n": "1000",
        "win rate [95 %]": "0.600 [0.550, 0.650]",
        "KL [95 %]": "10.00 [9.90, 10.10]",
        "accuracy": "0.700",
        "margin": "0.1",
        "length": "20.2",
        "ended": "1.000",
        "wrong": "0.62",
    }


def test_table_without_a_judge(tmp_path):
    directory = run(tmp_path, 0.1)
    result = {key: value for key, value in evaluation(0.1).items() if not key.startswith("win_rate")}
    (directory / "evaluation.json").write_text(json.dumps(result | {"kl": None}))
    columns = ["beta", "n", "accuracy", "margin", "length", "ended", "wrong"]
    assert results.table(results.final(tmp_path)).columns.tolist() == columns
    assert {"win rate", "KL"} & {*results.over_seeds(results.final(tmp_path))} == set()


def test_tables_by_hand():
    """Each column is the measure of its name; what a run alone has not measured has a dash."""
    first = {
        "beta": 0.1,
        "lr": 0.00012345,
        "n": 1000,
        "win_rate": 0.6,
        "win_rate/low": 0.55,
        "win_rate/high": 0.66,
        "kl": 10.0,
        "kl/se": 0.5,
        "rewards/accuracies": 0.71,
        "logps/accuracies": 0.72,
        "rewards/margins": 1.234,
        "logratios/margins": 12.34,
        "length": 20.25,
        "ended": 0.99,
        "correct": 3.5,
        "wrong": 0.625,
        "valid": 0.875,
    }
    second = {**first, "lr": None, "win_rate/low": None, "kl/se": None, "valid": None}
    frame = pd.DataFrame([first, second])
    frame.attrs["swept"] = ["lr"]
    expected = {
        "beta": "0.1",
        "lr": "0.00012345",
        "n": "1000",
        "win rate [95 %]": "0.600 [0.550, 0.660]",
        "KL [95 %]": "10.00 [9.02, 10.98]",
        "accuracy": "0.710",
        "margin": "1.23",
        "length": "20.2",
        "ended": "0.990",
        "correct": "3.50",
        "wrong": "0.62",
        "valid": "0.875",
    }
    less = {"lr": "-", "win rate [95 %]": "0.600", "KL [95 %]": "10.00", "valid": "-"}  # of one response, say
    assert results.table(frame).to_dict("records") == [expected, {**expected, **less}]


def test_a_chat_template_is_shown_by_its_digest(tmp_path):
    for text in ("{{ messages }}", "{{ messages }}."):
        run(tmp_path, 0.1, policy={"chat_template": text})
    digests = [hashlib.sha256(f'"{text}"'.encode()).hexdigest()[:8] for text in ("{{ messages }}", "{{ messages }}.")]
    assert sorted(results.final(tmp_path)["policy.chat_template"]) == sorted(digests)


def test_a_zero_has_no_sign():
    frame = pd.DataFrame({"beta": [0.1], "kl": [-0.001], "kl/se": [0.0001], "rewards/margins": [-0.0]})
    frame.attrs["swept"] = ["beta"]
    assert results.table(frame).to_dict("records") == [{"beta": "0.1", "KL [95 %]": "0.00 [0.00, 0.00]", "margin": "0"}]
    assert results.over_seeds(frame)["KL"].tolist() == ["0.00"]


def test_tables_over_seeds_by_hand():
    """Mean and standard deviation of the seeds of each setting, of those that have the measure."""
    frame = pd.DataFrame(
        {
            "beta": [0.1] * 4 + [1.0],
            "alpha": [None, None, None, None, 0.5],
            "seed": [0, 1, 2, 3, 0],
            "win_rate": [0.5, 0.5, 0.7, 0.9, 0.4],
            "kl": [1.0, 2.0, None, 6.0, 3.0],
            "kl/se": 0.5,
            "rewards/accuracies": [0.7, 0.7, 0.7, 0.7, 0.6],
            "valid": [None, None, None, None, 0.9],
        }
    )
    frame.attrs["swept"] = ["beta", "alpha", "seed"]
    first, second = results.over_seeds(frame).to_dict("records")
    assert {key: first[key] for key in ("beta", "alpha", "seeds")} == {"beta": "0.1", "alpha": "-", "seeds": "4"}
    assert first["win rate"] == "0.650 ± 0.191"  # the root of (2 0.15^2 + 0.05^2 + 0.25^2) / 3
    assert first["KL"] == "3.00 ± 2.65"  # of 1, 2 and 6: the root of (4 + 1 + 9) / 2
    assert first["accuracy"] == "0.700 ± 0.000"
    assert "wrong" not in first
    assert (second["alpha"], second["seeds"], second["win rate"]) == ("0.5", "1", "0.400")
    assert (first["valid"], second["valid"]) == ("-", "0.900")
    alone = frame.head(4).drop(columns=["beta", "alpha"])  # runs of a command without a beta, of which only seeds vary
    alone.attrs["swept"] = ["seed"]
    (row,) = results.over_seeds(alone).to_dict("records")
    assert (row["seeds"], row["win rate"]) == ("4", "0.650 ± 0.191")


def test_frames_by_hand(tmp_path):
    """What varies, in its order and that of its values; a row per step and split, the final one of split test."""
    for beta, size, decay, seed, noise in (
        *((10.0, 16, 0.0, 0, 0.1), (2.0, 16, 0.1, 0, 0.2)),
        *((0.5, 32, 0.0, 1, 0.1), (10.0, 32, 0.0, 1, 0.1)),
    ):
        directory = run(tmp_path, beta, batch_size=size, weight_decay=decay, seed=seed)
        config = OmegaConf.load(directory / "config.yaml")
        own = {"data": {"noise": noise, "decay": decay}, "reference": {"path": f"runs/x/seed={seed}/policy"}}
        OmegaConf.save(OmegaConf.merge(config, own), directory / "config.yaml")
    last = directory
    with open(last / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "split": "test", "win_rate": 0.58}\n')
    (last / "evaluation.json").write_text(json.dumps(evaluation(10.0) | {"win_rate": None, "extra": 7.0}))

    frame = results.final(tmp_path, ["beta", "lr"])
    keys = ["beta", "batch_size", "weight_decay", "data.noise", "seed"]
    assert results.swept(frame) == keys  # and no path, which seed alone decides, nor data.decay, which is weight_decay
    assert frame.columns[: len(keys) + 2].tolist() == ["run", *keys, "lr"]
    assert frame[["beta", "batch_size", "seed", "data.noise"]].values.tolist() == [
        *([0.5, 32, 1, 0.1], [2.0, 16, 0, 0.2], [10.0, 16, 0, 0.1], [10.0, 32, 1, 0.1])
    ]
    assert frame["lr"].tolist() == [5e-4] * 4
    assert frame["kl"].tolist() == [2.0, 0.5, 0.1, 0.1]
    assert frame["win_rate"].isna().tolist() == [False, False, False, True]
    assert frame["extra"].isna().tolist() == [True, True, True, False]

    rows = results.load(tmp_path)
    rows = rows[rows["run"] == last.name]
    where = rows[["step", "split"]].values.tolist()
    assert where == [[1, "train"], [2, "train"], [2, "validation"], [1, "test"], [2, "test"]]
    assert rows["win_rate"].tolist()[3] == 0.58
    assert rows["kl"].tolist()[4] == 0.1
    assert rows["loss"].tolist()[:3] == pytest.approx([0.69, 0.68, 0.69])


def test_a_report_says_all(tmp_path, capsys, saved):  # noqa: F811
    """The tables, what is damaged and not told of elsewhere, and the numbers as a CSV file."""
    for seed in (0, 1):
        directory = run(tmp_path / "dev", 0.1, seed=seed)
        unjudged = {key: value for key, value in evaluation(0.1 + seed).items() if not key.startswith("win_rate")}
        (directory / "evaluation.json").write_text(json.dumps(unjudged))
    broken = run(tmp_path / "dev", 0.2)
    (broken / "evaluation.json").write_text("{")
    results.report(tmp_path / "dev")
    said = capsys.readouterr().out
    assert f"{broken.name} is damaged and left out: " in said
    assert "Mean ± standard deviation over seeds:\nbeta seeds" in " ".join(said.split(" ")).replace("  ", " ")
    assert "2 finished in" in said
    written = pd.read_csv(tmp_path / "dev" / "table.csv")
    assert written["kl"].tolist() == pytest.approx([10.0, 1 / 1.1])
    assert written["seed"].tolist() == [0, 1]
    assert saved[0].axes[0].get_ylabel() == "accuracy on held-out pairs"
    results.report(tmp_path / "dev", named={broken.name})
    assert "damaged" not in capsys.readouterr().out


def test_a_report_says_where_files_are(tmp_path, capsys):
    """Of runs that measure nothing; of one run in its own folder."""
    for seed, count in ((0, "1"), (1, "2")):
        directory = run(tmp_path, 0.1, finished=False, command="judge", seed=seed)
        for name in ("train.jsonl", "manifest.json", "log.txt"):
            (directory / name).write_text('{"n": 9}')
        (directory / "metrics.jsonl").rename(directory / "show.html")
        results.report(tmp_path)
        where = tmp_path / "*" if seed else directory
        said = f"{count} finished in {tmp_path}: {where}/show.html, {where}/train.jsonl"
        assert capsys.readouterr().out.splitlines() == ["", said]


def test_a_sweep_without_beta_has_a_figure_over_another_number(tmp_path, saved):  # noqa: F811
    """As one of `dpo.evaluate` over temperatures, which says nothing of a beta; over names it has none."""
    for temperature, judge in ((0.5, "gold"), (1.0, "gold"), (1.0, "hasty")):
        mine = {"command": "evaluate", "evaluation": {"temperature": temperature}, "choices": {"judge": judge}}
        for folder in [f"of {judge}"] + ["judges"] * (temperature == 1):
            run(tmp_path / folder, 0.1, **mine, best_of=judge)
    results.report(tmp_path / "of gold")
    assert [axis.get_xlabel() for axis in saved.pop().axes[:2]] == ["evaluation.temperature"] * 2
    results.report(tmp_path / "judges")
    results.report(tmp_path / "of hasty")
    assert not saved
    assert "beta" not in pd.read_csv(tmp_path / "judges" / "table.csv")


@pytest.mark.parametrize("betas,references,seeds", [([0.1], 1, 1), ([0.01, 0.1, 1.0], 2, 2), ([0.1, 0.2], 1, 3)])
@pytest.mark.filterwarnings("error")
def test_figure(tmp_path, saved, betas, references, seeds):  # noqa: F811
    for beta in betas:
        for reference in ("initial", "reference_free")[:references]:
            for seed in range(seeds):
                run(tmp_path, beta, reference=reference, seed=seed)
    results.figure(results.final(tmp_path), tmp_path / "figure.png")
    curves = [[list(one[0].get_xdata()) for one in axis.containers] for axis in saved[0].axes]
    assert curves == [[betas] * references] * 2 + [[[1 / beta for beta in betas]] * references]
    saved[0].draw_without_rendering()
    for axis in saved[0].axes[:2] if len(betas) == 1 else ():  # the one beta, and room about it
        assert (axis.get_xlim(), axis.get_xticks().tolist()) == (pytest.approx((0, 0.2)), [0.1])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("absent", [["win_rate"], ["kl"], ["win_rate", "kl"]])
def test_figure_without_some_measures(tmp_path, saved, absent):  # noqa: F811
    for beta in (0.1, 0.2):
        directory = run(tmp_path, beta)
        result = {k: v for k, v in evaluation(beta).items() if k.split("/")[0] not in absent}
        (directory / "evaluation.json").write_text(json.dumps(result))
    results.figure(results.final(tmp_path), tmp_path / "figure.png")
    quality, distance, frontier = ([*axis.containers[0][0].get_ydata()] for axis in saved[0].axes)
    assert quality == frontier == ([0.7, 0.7] if "win_rate" in absent else [0.6, 0.6])
    assert distance == pytest.approx([math.nan, math.nan] if "kl" in absent else [10.0, 5.0], nan_ok=True)
    saved[0].draw_without_rendering()


@pytest.mark.filterwarnings("error")
def test_figure_of_a_kl_below_zero(tmp_path, saved):  # noqa: F811
    for lr in (1e-4, 1e-3):
        directory = run(tmp_path, 0.1, lr=lr)
        (directory / "evaluation.json").write_text(json.dumps(evaluation(0.1) | {"kl": -0.01}))
    results.figure(results.final(tmp_path), tmp_path / "figure.png")
    assert [axis.get_xscale() for axis in saved[0].axes] == ["log", "log", "linear"]
    saved[0].draw_without_rendering()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "knobs",
    [
        [{"knob": 0.5}, {}],  # a knob that only some runs have
        [{"knob": 1}, {"knob": None}, {"knob": "all"}],  # numbers beside nothing and words
        [{"knob": [0.9, 0.99]}, {"knob": []}, {"knob": 3}],
        [{"knob": True}, {"knob": False}],
        [{"loss": {"_target_": "dpo.losses.dpo", "beta": "weak"}, "beta": "weak"}, {}],  # beta is no number everywhere
        [{"beta": "weak"}, {"beta": "strong"}],
        [{"beta": float("nan")}, {}],
        [{"seed": 1}, {"seed": None}, {"seed": "x"}],
    ],
)
def test_table_and_figure_of_mixed_knobs(tmp_path, capsys, saved, knobs):  # noqa: F811
    for number, knob in enumerate(knobs):
        directory = run(tmp_path, 0.1 * (1 + number))
        config = OmegaConf.merge(OmegaConf.load(directory / "config.yaml"), knob)
        OmegaConf.save(config, directory / "config.yaml")
        (directory / "evaluation.json").write_text(json.dumps(evaluation(0.1) | {"kl": None if number else 1.0}))
    results.report(tmp_path)
    said = capsys.readouterr().out
    assert f"{len(knobs)} finished" in said
    for value in (value for knob in knobs for key, value in knob.items() if key == "knob"):
        assert f" {results.short(value)} " in said
    saved[0].draw_without_rendering()
    assert len(results.load(tmp_path)) == 4 * len(knobs)


def test_points_average_seeds():
    from dpo.results.figures import _points

    frame = pd.DataFrame({"beta": [0.1, 0.1, 0.2], "kl": [1.0, 3.0, 5.0], "kl/se": [0.1, 0.1, 0.5]})
    points = _points(frame, "beta", "kl")
    assert points["mean"].tolist() == [2.0, 5.0]
    assert points["high"].tolist() == pytest.approx([2 + 2**0.5, 5 + 1.959964 * 0.5])
    assert points["low"].tolist() == pytest.approx([2 - 2**0.5, 5 - 1.959964 * 0.5])


def test_command(tmp_path):
    run(tmp_path / "dev", 0.1)
    failed = run(tmp_path / "dev", 0.2, finished=False)
    (failed / "error.json").write_text(json.dumps({"type": "ValueError", "message": "no"}))
    said = command(tmp_path, "dev")
    assert said.returncode == 0
    assert "dev: 2 runs: 1 finished, 1 failed" in said.stdout
    assert "failed   beta=0.2,reference=initial  ValueError: no" in said.stdout
    assert "10.00 [9.90, 10.10]" in said.stdout
    assert pd.read_csv(tmp_path / "dev" / "table.csv")["kl"].tolist() == [10.0]
    assert (tmp_path / "dev" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert " torch" not in said.stderr  # at once: torch takes seconds
    said = command(tmp_path, "nowhere")
    assert said.returncode == 1
    assert "nowhere must be a folder of run directories" in said.stderr


@pytest.mark.parametrize(
    "folder,told",
    [
        (
            "dev/beta=0.1,reference=initial/config.yaml",
            "must be a folder of run directories, such as runs/dev, found a f",
        ),
        ("dev/beta=0.1,reference=initial", "must be a folder of run directories, found a run; take the folder that it"),
        (".", "such as runs/dev, found none in it; these have some: dev, name/of"),
        ("other", "such as runs/dev, found none in it\n"),
    ],
)
def test_a_folder_that_is_no_sweep_is_told_where_sweeps_are(tmp_path, monkeypatch, folder, told):
    run(tmp_path / "dev", 0.1)
    run(tmp_path / "name" / "of", 0.1)
    (tmp_path / "other").mkdir()
    said = command(tmp_path, folder)
    assert (said.returncode, said.stdout) == (1, "")
    assert told in said.stderr


def test_the_queue_is_asked_where_something_was_submitted(tmp_path, monkeypatch, capsys):
    """And not wherever Slurm's commands are: they may be without a cluster. A job's manifest lies beside one sweep."""
    run(tmp_path / "dev", 0.1)
    monkeypatch.setattr(sys, "argv", ["dpo.results", str(tmp_path / "dev")])
    monkeypatch.setattr("shutil.which", lambda _: "squeue")
    asked = []
    monkeypatch.setattr(main, "queued", lambda: asked.append(1) or set())
    main.main()
    assert not asked
    (tmp_path / "other" / "manifests").mkdir(parents=True)
    main.main()
    assert asked


def command(cwd: Path, path: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(results.__file__).parents[2])}
    line = [sys.executable, "-X", "importtime", "-m", "dpo.results", path]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "measured,collapsed",
    [
        ({"broken": 0.51}, True),  # most responses do not end, repeat themselves or say nothing
        ({"broken": 0.4, "win_rate": 0.6, "valid": 0.75}, False),
        ({"broken": 0.0, "win_rate": 0.04, "valid": 1.0}, True),  # two right words, and the end
        ({"broken": 0.0, "win_rate": 0.3, "valid": 1.0}, False),  # merely worse
        ({"broken": 0.0, "win_rate": 0.3, "valid": 0.2}, True),
        ({"broken": 0.5, "valid": 0.5, "win_rate": 0.1}, False),  # half is not most
        ({"broken": 0.49, "valid": 0.51, "win_rate": 0.11}, False),
        ({"valid": 0.49}, True),
        ({"win_rate": 0.09}, True),
        ({"win_rate": 0.09, "evaluation.baseline": "initial"}, True),
        ({"win_rate": 0.09, "evaluation.baseline": None}, True),  # of a run from when there was no other
        ({"win_rate": 0.09, "evaluation.baseline": "human"}, False),
        ({"broken": 0.6, "evaluation.baseline": "human"}, True),
        ({"broken": None, "win_rate": None}, False),
        ({}, False),
    ],
)
def test_what_is_degenerate(measured, collapsed):
    assert results.degenerate(pd.DataFrame([{"run": "a", **measured}])).tolist() == [collapsed]


def test_whom_a_win_rate_is_over_is_told_where_it_is_another(tmp_path):
    for whom, column, collapsed in (("initial", False, True), ("human", True, False)):
        for beta in (0.1, 0.2):
            file = run(tmp_path / whom, beta, evaluation={"baseline": whom}) / "evaluation.json"
            file.write_text(json.dumps(evaluation(beta) | {"win_rate": 0.02}))
        frame = results.final(tmp_path / whom)
        assert ("evaluation.baseline" in frame) is column
        assert "evaluation.baseline" not in results.swept(frame)
        assert results.degenerate(frame).tolist() == [collapsed, collapsed]


def of(folder: Path, command: str, **settings: Any) -> None:
    """A finished run of a command, with figures that all commands measure."""
    directory = folder / f"{command},{settings}"
    directory.mkdir(parents=True)
    config = {"command": command, "seed": 0, "choices": {}, **settings}
    OmegaConf.save(OmegaConf.create(config), directory / "config.yaml")
    name, measured = ("manifest.json", {"tokens": 9}) if command == "generate" else ("evaluation.json", {"n": 9})
    rated = {"win_rate": 0.6, "win_rate/low": 0.5, "win_rate/high": 0.7} if command == "evaluate" else {}
    (directory / name).write_text(json.dumps({**measured, **rated}))


def test_runs_of_other_commands_in_a_folder_vary_by_themselves(tmp_path, capsys, saved):  # noqa: F811
    """What `dpo.sft` lacks is no news of a sweep beside it, nor what `dpo.generate` was given; a figure has neither."""
    run(tmp_path, 0.1, command="train")
    run(tmp_path, 0.2, command="train")
    of(tmp_path, "sft", sft={"lr": 1e-3})
    for share in (0.8, 0.9):
        of(tmp_path, "generate", generation={"top_p": share})
    frame = results.final(tmp_path)
    assert results.swept(frame) == ["beta", "command"]
    assert results.table(frame)["command"].tolist() == ["-", "-", "sft"]
    assert results.swept(results.load(tmp_path)) == ["beta", "command"]
    results.report(tmp_path)
    assert "figure.png" in capsys.readouterr().out
    assert not saved[-1].legends
    of(tmp_path, "sft", sft={"lr": 1e-2})
    assert results.swept(results.final(tmp_path)) == ["beta", "command", "sft.lr"]


@pytest.mark.parametrize(
    "given,varies,drawn",
    [
        ([{}], [], False),
        ([{"judge": {"margin": 1}}, {"judge": {"margin": "wide"}}], ["judge.margin"], False),
        ([{"best_of": 2}, {"best_of": 4}], ["best_of"], True),
    ],
)
def test_what_was_measured_alone_has_no_beta(tmp_path, capsys, saved, given, varies, drawn):  # noqa: F811
    """`dpo.evaluate` trains nothing: whatever beta is in its page, a policy was not trained with it."""
    for settings in given:
        of(tmp_path, "evaluate", beta=0.1, loss={"beta": 0.1}, **settings)
    frame = results.final(tmp_path)
    assert results.swept(frame) == varies
    assert "beta" not in frame
    assert "beta" not in results.table(frame)
    results.report(tmp_path)
    assert ("figure.png" in capsys.readouterr().out) is drawn
    of(tmp_path, "sft", sft={"lr": 0.1})  # a number that varies, but of nothing that is drawn
    of(tmp_path, "sft", sft={"lr": 0.2})
    results.report(tmp_path)
    assert len(saved) == 2 * drawn


def test_what_cannot_be_drawn_is_told(tmp_path):
    of(tmp_path / "sft", "sft")
    of(tmp_path / "measured", "evaluate", beta=0.1)
    of(tmp_path / "made", "generate")
    for name, lacks in (("sft", "win rate or accuracy"), ("measured", "beta and no other"), ("made", "win rate or")):
        with pytest.raises(ValueError, match=f"a figure must have a win rate.* found no {lacks}"):
            results.figure(results.final(tmp_path / name), tmp_path / "figure.png")


def test_seeds_are_averaged_with_their_spread(tmp_path):
    for seed, win in ((0, 0.5), (1, 0.6), (2, 0.7)):
        directory = run(tmp_path, 0.1, seed=seed)
        (directory / "evaluation.json").write_text(json.dumps(evaluation(0.1) | {"win_rate": win}))
    (row,) = results.over_seeds(results.final(tmp_path)).to_dict("records")
    assert row["seeds"] == "3"
    assert row["win rate"] == "0.600 ± 0.100"
    assert "valid" not in row


@pytest.mark.parametrize("ranks", [(None, 8, 64, None), (None, 8)])
def test_adapters_beside_all_weights(tmp_path, ranks):
    """A run of all weights has no rank; what an adapter has beside its rank is no news where it does not vary."""
    for number, rank in enumerate(ranks):
        directory = run(tmp_path, 0.1 * (1 + number))
        lora = {"rank": rank, "alpha": 32 if rank else 7, "targets": "all-linear"}
        config = OmegaConf.merge(OmegaConf.load(directory / "config.yaml"), {"policy": {"lora": lora}})
        OmegaConf.save(config, directory / "config.yaml")
    frame = results.final(tmp_path)
    assert results.swept(frame) == ["beta", "policy.lora.rank"]
    assert [results.short(rank) for rank in frame["policy.lora.rank"]] == [results.short(rank) for rank in ranks]
