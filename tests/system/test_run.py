"""A run directory is executed as it was planned, or refused; a process of it that is killed is named."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from composing import composed

from dpo.sweep import execute as executing
from dpo.sweep.identity import identity
from dpo.sweep.plan import plan

ROOT = Path(__file__).parents[2]


def planned(directory, *overrides):
    """The values of a frozen config, and a function that writes them."""
    [run], refused = plan([composed("train", *overrides, f"runs={directory}", "wandb.mode=disabled")])
    assert not refused
    run.freeze()
    return run.directory


@pytest.fixture(autouse=True)
def signals():
    """A run that ends hears no more signals; the process of the tests does."""
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    return planned(tmp_path_factory.mktemp("once"), "seed=3")


@pytest.fixture
def frozen(once, tmp_path, monkeypatch):
    """A planned run whose verb only notes with what it was called; secrets are in the environment."""
    called, directory = [], tmp_path / once.name
    shutil.copytree(once, directory)
    verb = SimpleNamespace(run=lambda config, directory: called.append(config))
    monkeypatch.setitem(sys.modules, "dpo.train", verb)
    monkeypatch.setenv("SECRET", "sesame")
    return directory, called


def changed(directory, *keys, id=True, **values):
    """Write other values; with the id that belongs to them, as somebody would who knows how."""
    config = yaml.safe_load((directory / "config.yaml").read_text())
    node = config
    for key in keys:
        node = node[key]
    node.update(values)
    if id:
        config["id"] = identity(config)
    (directory / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("threads", [3, None])
def test_threads_reach_every_library(frozen, monkeypatch, threads):
    """None: as many as whoever starts the run has set."""
    directory, _ = frozen
    names = [f"{library}_NUM_THREADS" for library in ("OMP", "MKL", "OPENBLAS", "RAYON")]
    for name in (*names, "OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE"):
        monkeypatch.setenv(name, "7")
    changed(directory, threads=threads)
    found = []
    monkeypatch.setattr(sys.modules["dpo.train"], "run", lambda *_: found.extend(os.environ[name] for name in names))
    assert executing.execute(directory) == 0
    assert found == [str(threads or 7)] * 4


def refused(directory, called, capsys):
    assert executing.execute(directory) == executing.FAILED
    assert called == []
    said = capsys.readouterr().err
    assert "ValueError" in said
    assert "sesame" not in said
    error = json.loads((directory / "error.json").read_text())
    assert error["type"] == "ValueError"
    again = ("plan the run again by the command that made it", "the same command makes the run again")
    assert any(advice in error["message"] for advice in again)
    assert str(directory / "config.yaml") in error["message"]
    return error["message"]


def test_what_was_planned_is_executed(frozen):
    directory, called = frozen
    assert executing.execute(directory) == 0
    assert called[0].seed == 3
    assert called[0].choices.loss == "dpo"


@pytest.mark.parametrize(
    "keys,values,said",
    [
        ([], {"beta": -0.1}, "beta must be above 0"),
        ([], {"beta": "weak"}, "weak"),
        ([], {"batch_size": 2.5}, "2.5"),
        ([], {"bta": 0.1}, "bta"),
        (["policy"], {"trust": True}, "trust"),
        (["policy"], {"trust_remote_code": "maybe"}, "maybe"),
        ([], {"hydra": {"launcher": {"_target_": "os.system"}}}, "hydra"),
        ([], {"command": "queue"}, "sft, show, train, got queue"),
        ([], {"command": "../train"}, "sft, show, train, got .."),
        ([], {"command": None}, "sft, show, train, got None"),
        (["loss"], {"_target_": "dpo.queue.ask"}, "loss._target_ must name a function"),
        (["data"], {"_target_": "pandas.read_pickle"}, "data._target_ must name a function"),
        (["data"], {"_args_": ["x"]}, "data._args_ is not an option of dpo.world.language.world"),
        (["judge"], {"_target_": "dpo.losses.dpo"}, "judge._target_ must name a function, got dpo.losses.dpo"),
        (["wandb"], {"project": "${oc.env:SECRET}"}, "wandb.project must be a value, got an interpolation"),
        ([], {"adam_betas": ["${oc.env:SECRET}", 0.9]}, "adam_betas must be a value, got an interpolation"),
        (["data"], {"summaries": "${oc.decode:${oc.env:SECRET}}"}, "data.summaries must be a value"),
    ],
)
def test_a_run_is_checked_as_a_plan_is(frozen, capsys, keys, values, said):
    directory, called = frozen
    changed(directory, *keys, **values)
    assert said in refused(directory, called, capsys)


def test_settings_that_are_not_those_of_the_plan_are_refused(frozen, capsys):
    directory, called = frozen
    changed(directory, beta=0.2, id=False)
    assert "found settings of another id" in refused(directory, called, capsys)
    changed(directory, beta=0.1, threads=1, id=False)  # which changes no number
    assert executing.execute(directory) == 0


@pytest.mark.parametrize(
    "text", ["", "beta: [", "- 1", "beta: ${", "\x00", "!!python/object/apply:os.system ['exit 3']"]
)
def test_a_damaged_config_is_refused(frozen, capsys, text):
    directory, called = frozen
    (directory / "config.yaml").write_text(text)
    refused(directory, called, capsys)


def test_a_full_disk_is_named(frozen, monkeypatch, capsys):
    directory, _ = frozen

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(sys.modules, "dpo.train", SimpleNamespace(run=full))
    assert executing.execute(directory) == executing.FAILED
    assert f"make room for {directory}" in json.loads((directory / "error.json").read_text())["message"]


# Two processes; one is killed, while the other is where it hears of it, or where it hears nothing.

KILLED = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
import torch
import torch.distributed as dist
from dpo.sweep import execute as executing
from dpo.training import distributed

def verb(config, directory):
    distributed.join("cpu")
    distributed.any_true(False)
    if distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[2] == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    while True:
        distributed.any_true(False)

executing._frozen = lambda file: {"command": "train", "threads": None}
executing._checked = lambda values, file: None
sys.modules["dpo.train"] = SimpleNamespace(run=verb)
signal.signal(signal.SIGTERM, signal.default_int_handler)
sys.exit(executing.execute(Path(sys.argv[1])))
"""


@pytest.mark.long
@pytest.mark.parametrize("other", ["in a collective", "deaf"])
def test_a_killed_process_ends_the_run_and_is_named(tmp_path, other):
    (tmp_path / "config.yaml").write_text("beta: 0.1\n")
    (tmp_path / ".rank-0").write_text("")  # left by a former attempt
    (tmp_path / "script.py").write_text(KILLED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(tmp_path / "script.py"), str(tmp_path), other]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    error = json.loads((tmp_path / "error.json").read_text())
    assert (error["type"], error["rank"]) == ("Killed", 1), done.stderr
    assert "process 1 of 2, counted from 0, was killed (out of memory?); the same command resumes" in error["message"]
    assert list(tmp_path.glob(".rank-*")) == []
