"""Chains of rounds as users start them: of stand-ins, and of whole runs of a few steps in the world."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from omegaconf import OmegaConf
from safetensors.torch import load_file
from test_launch import NOUNS, VERB, built, said, start, states, tree, wait_for  # noqa: F401
from whole_runs import SMALL, frozen, once

from dpo import evaluate, results, train

STARTS = ["policy.path=models", "device=cpu"]
FAILS = """    if config.seed == 13 and "runs/" in config.policy.path and not os.path.exists("mended"):
        raise RuntimeError("a bad round")
    if config.beta == 0.67"""


@pytest.fixture
def chains(tree: Path) -> Path:  # noqa: F811
    """The stand-in project of test_launch; its second round fails at seed 13 until a file `mended` appears."""
    (tree / "dpo" / "train.py").write_text(VERB.replace("    if config.beta == 0.67", FAILS))
    frozen = NOUNS["references"] + "\nclass Frozen(Initial):\n    def __init__(self, path: str): ..."
    (tree / "dpo" / "references.py").write_text(frozen)
    (tree / "dpo" / "rounds.py").write_text(VERB.replace('command("train")', 'command("rounds")'))
    return tree


@pytest.mark.long
def test_a_failed_round_stops_its_chain_and_no_other(chains):
    folder = chains / "runs" / "rounds"

    def run(rounds: int, code: int) -> str:
        return said(chains, "-m", "seed=1,13", f"rounds={rounds}", *STARTS, verb="rounds", code=code)

    text = run(2, code=1)
    both = {"seed=1": "finished", "seed=13": "finished"}
    assert states(folder) == {**both, "seed=1,round=2": "finished", "seed=13,round=2": "failed"}
    assert "not finished: seed=13,round=2: RuntimeError: a bad round" in text
    text = run(3, code=1)
    assert "runs/rounds: 2 runs: 0 finished, 2 to do" in text  # round 3 of one, round 2 of the other
    assert "round 2 of 3 is not finished; the same command goes on from there" in text
    assert states(folder)["seed=1,round=3"] == "finished"
    assert "seed=13,round=3" not in states(folder)
    (chains / "mended").touch()
    assert run(3, code=0).count(" started") == 2
    assert set(states(folder).values()) == {"finished"}
    assert len(states(folder)) == 6
    assert " started" not in run(3, code=0)


def test_chains_share_the_rounds_that_are_the_same(chains):
    text = said(chains, "-m", "held_to=previous,original", "name=a,b", "rounds=2", *STARTS, verb="rounds", code=0)
    assert text.count(" started") == 6
    for folder in (chains / "runs" / "a", chains / "runs" / "b"):
        first = "policy.path=models"
        second = [f"{first},held_to={policy},round=2" for policy in ("original", "previous")]
        assert states(folder) == dict.fromkeys([first, *second], "finished")
        held = [OmegaConf.load(folder / name / "config.yaml") for name in second]
        assert [config.reference.get("path") for config in held] == ["models", None]
        assert {config.policy.path for config in held} == {f"runs/{folder.name}/{first}/policy"}


def test_a_refused_chain_starts_nothing(chains):
    text = said(chains, "-m", "judge=gold,none", "seed=1,2", *STARTS, verb="rounds", code=1)
    assert "nothing was started" in text
    assert "judge must be one that compares the responses of each round, got none" in text
    assert "(and 1 more)" in text
    assert not (chains / "runs").exists()


@pytest.mark.long
def test_a_queue_gets_one_round_at_a_time(chains):
    slurm = ["hydra/launcher=slurm", "hydra.launcher.cpus=1", "hydra.launcher.submit=false", "rounds=2", *STARTS]
    folder = chains / "runs" / "rounds"
    for number, name in ((1, "policy.path=models"), (2, "policy.path=models,round=2")):
        text = said(chains, *slurm, verb="rounds", code=0)
        assert "runs/rounds: 1 run: 0 finished, 1 to submit" in text
        assert ("round 1 of 2 is not finished; the same command goes on from there" in text) is (number == 1)
        assert states(folder)[name] == "planned"
        subprocess.run([sys.executable, "-m", "dpo.sweep.execute", f"runs/rounds/{name}"], cwd=chains, check=True)
    assert "1 run: 1 finished, 0 to submit" in said(chains, *slurm, verb="rounds", code=0)


def given(folder: Path) -> list[str]:
    cache = f"cache={folder.parent / 'cache'}"
    return once(*SMALL, "steps=4", "seed=3", "checkpoint_every=1", "wandb.mode=disabled", "device=cpu", cache)


@pytest.fixture(scope="module", params=[pytest.param(None, marks=pytest.mark.long)])
def made(tmp_path_factory) -> Path:
    """Where a chain of two rounds was made, and then a third: its runs are in `runs/rounds`."""
    folder = tmp_path_factory.mktemp("rounds") / "here"
    folder.mkdir()
    for rounds in (2, 3):
        text = said(folder, *given(folder), f"rounds={rounds}", verb="rounds", code=0)
        (folder / f"{rounds}.txt").write_text(text)
    return folder


def runs_of(folder: Path) -> list[Path]:
    where = folder / "runs" / "rounds"
    [first] = [path.parent for path in where.glob("*/config.yaml") if "round=" not in path.parent.name]
    return [first, *(where / f"{first.name},round={number}" for number in (2, 3))]


def weights(run: Path) -> dict[str, list[float]]:
    return {name: value.tolist() for name, value in load_file(run / "policy" / "model.safetensors").items()}


def numbers(run: Path) -> dict[str, float]:
    found = json.loads((run / "evaluation.json").read_text())
    return {key: value for key, value in found.items() if key != "seconds"}


def started_from(run: Path) -> Any:
    return json.loads((run / "initial.json").read_text())["policy"]


def test_the_former_end_is_the_next_start(made):
    runs = runs_of(made)
    configs = [OmegaConf.load(run / "config.yaml") for run in runs]
    assert (made / "2.txt").read_text().count(" started") == 2
    assert (made / "3.txt").read_text().count(" started") == 1  # one round more, and no other again
    assert [started_from(run) for run in runs[1:]] == [str((run / "policy").resolve()) for run in runs[:2]]
    assert [config.data.seed for config in configs] == [3, 1003, 2003]
    assert {config.command for config in configs} == {"train"}
    assert {config.evaluation.baseline for config in configs[1:]} == {started_from(runs[0])}
    rows = [[json.loads(line) for line in (run / "responses.jsonl").read_text().splitlines()] for run in runs]
    beaten = [[(row["prompt"], row["baseline"]) for row in some] for some in rows]
    assert beaten[0] == beaten[1] == beaten[2]  # the same articles, and the same answers to them
    frame = results.final(made / "runs" / "rounds")
    assert frame["round"].tolist() == [1, 2, 3]
    assert results.swept(frame) == ["round"]
    assert frame["kl"].tolist() == [numbers(runs[0])["kl"], *(numbers(run)["kl_baseline"] for run in runs[1:])]


def test_figures_of_a_round_are_over_the_first_start(made, monkeypatch):
    """As `dpo.evaluate` measures them afterwards, between the two folders."""
    first, second, _ = runs_of(made)
    monkeypatch.chdir(made)
    (afterwards := made / "afterwards").mkdir()
    own = [f"policy.path='{second / 'policy'}'", f"against='{started_from(first)}'"]
    evaluate.run(frozen(afterwards, *SMALL, "seed=3", *own, verb="evaluate"), afterwards)
    found = numbers(afterwards)
    for name in ("kl", "kl_plain", "kl/se"):
        assert numbers(second)[name.replace("kl", "kl_baseline")] == pytest.approx(found[name], abs=1e-6)
    assert numbers(second)["win_rate"] == found["win_rate"]


def test_a_round_by_hand_is_that_of_the_chain(made, monkeypatch):
    _, second, _ = runs_of(made)
    monkeypatch.chdir(made)
    there = OmegaConf.load(second / "config.yaml")
    (by_hand := made / "by-hand").mkdir()
    config = frozen(by_hand, *there.provenance.overrides, "name=rounds")
    assert config.id == there.id
    config.cache = str(made / "another cache")  # nothing that the chain has made is read, but the policy
    train.run(config, by_hand)
    assert weights(by_hand) == weights(second)
    assert numbers(by_hand) == numbers(second)


def test_a_chain_that_was_killed_ends_as_one_that_was_not(made):
    folder = made.parent / "killed"
    folder.mkdir()
    second = folder / "runs" / "rounds" / runs_of(made)[1].name
    process = start(folder, *given(folder), "rounds=2", verb="rounds")
    wait_for(second / "metrics.jsonl")
    while '"train"' not in (second / "metrics.jsonl").read_text():
        time.sleep(0.02)
    for pid in (process.pid, executing(second)):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    with FileLock(second / ".lock", timeout=60):
        assert not (second / "evaluation.json").exists()
    text = said(folder, *given(folder), "rounds=2", verb="rounds", code=0)
    assert text.count(" started") == 1
    assert weights(second) == weights(runs_of(made)[1])
    assert numbers(second) == numbers(runs_of(made)[1])


def executing(run: Path) -> int:
    """The process that holds the lock of a run."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            held = [os.readlink(f"/proc/{pid}/fd/{one}") for one in os.listdir(f"/proc/{pid}/fd")]
        except OSError:  # it has ended, or is another user's
            continue
        if str((run / ".lock").resolve()) in held:
            return int(pid)
    raise AssertionError(f"no process executes {run}")
