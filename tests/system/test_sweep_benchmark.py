"""The benchmark of planning and reading: what it measures is what it says."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
from test_launch import ROOT, built, said, states, tree  # noqa: F401

from dpo.sweep.directory import config

__all__ = ["tree"]


@pytest.fixture
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sweep_benchmark", ROOT / "benchmarks" / "sweep.py")
    assert spec
    assert spec.loader
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_runs_are_planned_and_finished_by_the_files_of_one(benchmark, tree):
    said(tree, "beta=0.5", "device=cpu", "name=real", code=0)
    files = tree / "runs" / "real" / "beta=0.5"

    def plan(**environment: str) -> None:
        line = [sys.executable, "-c", benchmark.PLAN, "-m", "beta=0.1,0.2", "device=cpu", "name=many"]
        done = subprocess.run(line, cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    plan()
    assert not (tree / "runs" / "many").exists()
    plan(FILES=str(files))
    assert states(tree / "runs" / "many") == {"beta=0.1": "finished", "beta=0.2": "finished"}
    assert config(tree / "runs" / "many" / "beta=0.2")["beta"] == 0.2
    assert "2 runs: 2 finished, 0 to do" in said(tree, "-m", "beta=0.1,0.2", "device=cpu", "name=many", code=0)


def test_rows(benchmark, monkeypatch, capsys, tmp_path):
    asked: list[tuple[Sequence[str], dict[str, str]]] = []
    monkeypatch.setattr(benchmark, "cpu_seconds", lambda *line, **more: asked.append((line, more)) or 3.0)
    benchmark.many(30, ["plan", "read"], ["wandb.mode=disabled"], Path("files"), tmp_path)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[-6:] for row in rows] == [["3.00", "s", "100.0", "ms", "a", "run"]] * 4
    assert "beta=0.001,0.002,0.003" in asked[0][0]
    assert "seed=range(10)" in asked[0][0]
    assert [more for _, more in asked] == [{}, {"FILES": "files"}, {}, {}, {}]
