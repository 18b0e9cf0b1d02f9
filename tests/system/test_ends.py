"""How the process of a run ends: its exit code, the reason that it leaves, what it touches. No verb is executed."""

import fcntl
import json
import os
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from filelock import FileLock

from dpo.sweep import execute as executing
from dpo.sweep.directory import status
from dpo.sweep.identity import identity


@pytest.fixture
def verb(monkeypatch):
    """`verb.run` notes its calls, and raises what is put in `ends`; the settings are taken as they are."""
    verb = SimpleNamespace(called=[], ends=None, environment={})

    def run(config: Any, directory: Path) -> None:
        verb.called.append((config, directory))
        verb.environment = dict(os.environ)
        if verb.ends is not None:
            raise verb.ends

    verb.run = run
    monkeypatch.setitem(sys.modules, "dpo.train", verb)
    monkeypatch.setattr(executing, "_checked", lambda values, file: None)
    for name in (*executing.THREADS, "OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield verb
    for number, handler in former.items():
        signal.signal(number, handler)


def directory(path: Path, **settings: Any) -> Path:
    (path / "config.yaml").write_text(yaml.safe_dump({"command": "train", "beta": 0.1, "threads": None, **settings}))
    return path


def told(path: Path) -> tuple[str, str, int]:
    error = json.loads((path / "error.json").read_text())
    return error["type"], error["message"], error["rank"]


def test_a_run_that_ends_well(tmp_path, verb):
    (tmp_path / "error.json").write_text('{"type": "ValueError", "message": "of a former attempt"}')
    assert executing.execute(directory(tmp_path, threads=3)) == 0
    [(config, where)] = verb.called
    assert (config.beta, where) == (0.1, tmp_path)
    assert not (tmp_path / "error.json").exists()
    assert {verb.environment[name] for name in executing.THREADS} == {"3"}
    assert (verb.environment["OMP_WAIT_POLICY"], verb.environment["THP_MEM_ALLOC_ENABLE"]) == ("passive", "1")


def test_threads_are_left_as_they_are(tmp_path, verb, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    executing.execute(directory(tmp_path))
    assert verb.environment["OMP_NUM_THREADS"] == "7"
    assert verb.environment["OMP_WAIT_POLICY"] == "active"
    assert "MKL_NUM_THREADS" not in verb.environment


def test_what_is_not_executed(tmp_path, verb, capsys):
    assert executing.execute(tmp_path) == 1
    assert "must hold a config.yaml, found none" in capsys.readouterr().out
    directory(tmp_path)
    with FileLock(tmp_path / ".lock"):
        (tmp_path / "error.json").write_text('{"type": "ValueError", "message": "of the other"}')
        assert executing.execute(tmp_path) == 73
        assert (tmp_path / "error.json").exists()
    (tmp_path / "evaluation.json").write_text('{"steps": 1}')
    with FileLock(tmp_path / ".lock"):  # as for a moment by who looks
        assert status(tmp_path) == "finished"
    assert executing.execute(tmp_path) == 0
    assert "is finished" in capsys.readouterr().out
    (tmp_path / "error.json").unlink()
    (tmp_path / "evaluation.json").write_text("{")
    assert executing.execute(tmp_path) == 1
    assert told(tmp_path)[0] == "ValueError"
    assert "evaluation.json must hold" in told(tmp_path)[1]
    assert verb.called == []


@pytest.mark.parametrize(
    "error,code,kind,message",
    [
        (KeyboardInterrupt("stopped at step 3"), 75, "Stopped", "stopped at step 3"),
        (KeyboardInterrupt(), 75, "Stopped", "stopped on a signal; the same command resumes"),
        (ValueError("no"), 1, "ValueError", "no"),
        (SystemExit(5), 1, "SystemExit", "5"),
        (OSError(28, "No space left"), 1, "OSError", "[Errno 28] No space left; make room for {} and the cache: the "),
        (OSError(122, "Quota"), 1, "OSError", "[Errno 122] Quota; make room for {} and the cache: the same command "),
        (OSError(2, "No such file"), 1, "FileNotFoundError", "[Errno 2] No such file"),
        (RuntimeError("No space left on device (told)"), 1, "RuntimeError", "No space left on device (told)"),
    ],
)
def test_why_it_ended(tmp_path, verb, capsys, error, code, kind, message):
    verb.ends = error
    assert executing.execute(directory(tmp_path)) == code
    found = told(tmp_path)
    assert (found[0], found[2]) == (kind, 0)
    assert found[1].startswith(message.format(tmp_path))
    assert message in found[1] or "{}" in message
    trace = json.loads((tmp_path / "error.json").read_text())["traceback"]
    assert ("in run" in trace) == (kind != "Stopped")
    said = capsys.readouterr()
    assert found[1] in (said.out if kind == "Stopped" else said.err)
    full = isinstance(error, OSError) and "make room" in message
    assert ("Traceback" in said.err) == (kind not in ("ValueError", "RuntimeError", "Stopped") and not full)
    assert ("(traceback: " in said.err) == (kind != "Stopped" and not full)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        assert signal.getsignal(number) == signal.SIG_IGN


def test_of_several_ranks_the_first_reason_stays_and_rank_0_alone_says_that_it_stopped(tmp_path, verb, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    directory(tmp_path)
    for rank, code in (("1", 0), ("0", 75)):
        monkeypatch.setenv("RANK", rank)
        verb.ends = KeyboardInterrupt(f"of rank {rank}")
        assert executing.execute(tmp_path) == code
        assert (tmp_path / "error.json").exists() == (rank == "0")
    assert told(tmp_path) == ("Stopped", "of rank 0", 0)
    (tmp_path / "error.json").unlink()
    verb.ends = RuntimeError("of rank 1")
    for rank in ("1", "0"):  # one may have failed before another has begun
        monkeypatch.setenv("RANK", rank)
        assert executing.execute(tmp_path) == 1
    assert told(tmp_path) == ("RuntimeError", "of rank 1", 1)
    monkeypatch.setenv("RANK", "1")
    verb.ends = None
    with FileLock(tmp_path / ".lock"):  # which rank 0 has
        assert executing.execute(tmp_path) == 0
    assert told(tmp_path) == ("RuntimeError", "of rank 1", 1)
    assert not list(tmp_path.glob(".rank-*"))


def test_a_mark_without_its_process_is_that_of_a_killed_one(tmp_path, monkeypatch):
    mark = tmp_path / ".rank-1"
    assert not executing._abandoned(mark)  # it ended by itself
    mark.write_text(socket.gethostname())
    assert executing._abandoned(mark)
    with open(mark) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not executing._abandoned(mark)
    mark.write_text("another machine")
    assert not executing._abandoned(mark)
    mark.write_text(socket.gethostname())
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    assert executing._killed(tmp_path) == []  # no rank has joined
    joined = SimpleNamespace(is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "torch.distributed", joined)
    assert executing._killed(tmp_path) == [1]
    assert executing._lost(tmp_path, [1]) == 1
    assert told(tmp_path)[0] == "Killed"
    assert told(tmp_path)[1].startswith("process 1 of 3, counted from 0, was killed")
    assert told(tmp_path)[2] == 1
    assert not mark.exists()


def test_settings_are_those_of_their_id(tmp_path, monkeypatch):
    monkeypatch.setattr(executing, "check", lambda values: None)
    values = {"beta": 0.1, "threads": 3}
    executing._checked(values | {"id": identity(values)}, tmp_path)
    executing._checked(values | {"id": identity(values), "threads": 4}, tmp_path)
    for wrong in ({"beta": 0.2}, {"id": "0"}, {"id": None}):
        with pytest.raises(ValueError, match="must be as it was planned"):
            executing._checked(values | {"id": identity(values)} | wrong, tmp_path)
