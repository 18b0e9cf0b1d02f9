"""Sweeps through a real Slurm of one machine, and what the launcher says without one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import cluster
import pandas as pd
import pytest
from omegaconf import OmegaConf
from test_launch import ROOT, built, said, states, tree  # noqa: F401

from dpo import results, train
from dpo.sweep import launch
from dpo.sweep.plan import Run
from hydra_plugins.dpo_launchers import Slurm

__all__ = ["tree"]
pytestmark = pytest.mark.long
SLURM = ["hydra/launcher=slurm", "hydra.launcher.cpus=1"]
SMALL = [
    *(
        "data.demonstrations=32",
        "data.train=20",
        "data.validation=4",
        "evaluation.prompts=4",
        "evaluation.log_samples=1",
    ),
    *("sft.steps=2", "max_new_tokens=40", "steps=40", "batch_size=8", "micro_batch_tokens=800", "evaluate_every=20"),
    *("checkpoint_every=10", "wandb.mode=disabled", "threads=1"),
]


@pytest.fixture(scope="module")
def slurm() -> Iterator[None]:
    """The environment of a running cluster while a test lasts."""
    if why := cluster.missing():
        pytest.skip(why)
    with cluster.running() as surroundings, pytest.MonkeyPatch.context() as patch:
        for key in ("PATH", "SLURM_CONF"):
            patch.setenv(key, surroundings[key])
        patch.setenv("MASTER_ADDR", "127.0.0.1")  # the nodes of this cluster have no names that resolve
        patch.setenv("PYTHONPATH", str(ROOT))
        yield


def wait(true: Callable[[], object], seconds: float = 600) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, queue()
        time.sleep(0.1)


def queue() -> list[str]:
    """array task, state and restarts of each job."""
    command = ["squeue", "--noheader", "--array", "--Format=ArrayTaskID:9,State:12,RestartCnt:4"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout.splitlines()


def submitted(text: str) -> str:
    found = re.search(r"submitted job (\d+)", text)
    assert found, text
    return found[1]


def steps(directory: Path) -> list[int]:
    file = directory / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [row["step"] for row in rows if row["split"] == "train"]


def send(directory: Path, number: int) -> None:
    """A signal to the python of a run, as from the kernel when memory runs out: Slurm is told nothing."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if process.read_bytes().split(b"\0")[1:-1] == [b"-m", b"dpo.sweep.execute", bytes(directory)]:
                os.kill(int(process.parent.name), number)


@pytest.mark.long
def test_the_sweep_of_a_laptop(slurm, tmp_path):
    """One task is preempted and goes on, one is killed, listed and submitted alone; then all is as without Slurm."""

    def submit() -> str:
        places = ["name=slurm", f"runs={tmp_path / 'runs'}", f"cache={tmp_path / 'cache'}"]
        return said(ROOT, "-m", "beta=0.05,0.1", *SMALL, *places, *SLURM, code=0)

    job = submitted(submit())
    folder = tmp_path / "runs" / "slurm"
    (manifest,) = (folder / "manifests").glob("*.txt")
    directories = [Path(line) for line in manifest.read_text().splitlines()]
    assert sorted(directories) == sorted(path.parent for path in folder.glob("*/config.yaml"))
    wait(lambda: (directories[0] / "metrics.jsonl").exists() and len(steps(directories[0])) > 2)
    send(directories[0], signal.SIGSTOP)  # it must not be finished before Slurm has been asked
    subprocess.run(["scancel", "--signal=USR1", f"{job}_0"], check=True, timeout=120)
    send(directories[0], signal.SIGCONT)
    wait(lambda: (directories[1] / "metrics.jsonl").exists() and len(steps(directories[1])) > 12)
    send(directories[1], signal.SIGKILL)
    wait((directories[1] / "error.json").exists)  # the job takes a moment to end
    killed = re.compile(r"failed   beta=0.1 +Killed: killed by signal 9 \(out of memory\?\)")
    assert killed.search(said(tmp_path, str(folder), verb="results", code=0))

    text = submit()  # while the other runs or waits
    assert "2 runs: " in text
    assert "1 to submit" in text
    again = submitted(text)
    wait(lambda: not queue())
    assert states(folder) == dict.fromkeys((path.name for path in directories), "finished"), log(folder)
    logs = [(directory / "log.txt").read_text() for directory in directories]
    assert "restart 0" in logs[0]
    assert "training stopped at step" in logs[0]
    assert "restart 1" in logs[0]
    assert f"job {again} " in logs[1]
    assert "training: resumes at step" in logs[1]
    assert "restart 1" not in logs[1]
    assert "2 runs: 2 finished, 0 to submit" in submit()
    assert len(pd.read_csv(folder / "table.csv")) == 2

    for directory in directories:  # the same runs, undisturbed and in this process
        config = OmegaConf.load(directory / "config.yaml")
        config.cache = str(tmp_path / "cache here")
        here = tmp_path / "runs" / "here" / directory.name
        here.mkdir(parents=True)
        OmegaConf.save(config, here / "config.yaml")
        train.run(config, here)
        assert steps(directory) == list(range(1, 41))
    tables = [results.final(tmp_path / "runs" / name).drop(columns="seconds") for name in ("slurm", "here")]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def log(folder: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in folder.glob("*/log.txt"))


@pytest.fixture
def project(tree: Path) -> Path:
    """The stand-in project of test_launch, whose runs last until a file `finish` appears."""
    shutil.copytree(ROOT / "slurm", tree / "slurm")
    return tree


def test_scripts_without_the_launcher(slurm, project):
    """A run of two nodes; cancelled, it stays so. Then the manifest as an array."""
    run = project / "runs" / "dev" / "steps=2000"
    text = said(project, "steps=2000", "processes=2", *SLURM, "hydra.launcher.submit=false", code=0)
    assert "not submitted; sbatch runs/dev/manifests/" in text
    assert not queue()

    def sbatch(*arguments: str) -> str:
        command = ["sbatch", "--parsable", "--cpus-per-task=1", *arguments]
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    job = sbatch("--nodes=2", "--ntasks-per-node=1", "slurm/train.sbatch", "runs/dev/steps=2000")
    wait(lambda: (run / "log.txt").exists() and (run / "log.txt").read_text().count("threads 1 ") == 2)  # of two ranks
    wait((run / "metrics.jsonl").exists)
    subprocess.run(["scancel", job], check=True, timeout=120)
    wait(lambda: not queue())
    assert results.status(run) == "stopped"
    assert (results.reason(run) or "").startswith("stopped at step")

    (project / "finish").touch()
    (manifest,) = (project / "runs" / "dev" / "manifests").glob("*.txt")
    sbatch("--array=0-0", "slurm/array.sbatch", str(manifest.relative_to(project)))
    wait(lambda: not queue())
    assert results.status(run) == "finished", (run / "log.txt").read_text()


def silent_squeue(folder: Path) -> Path:
    program = folder / "squeue"
    program.write_text("#!/bin/sh\necho no answer >&2\nexit 1\n")
    program.chmod(0o755)
    return folder


def test_queued_and_running_are_not_submitted_again(slurm, project, tmp_path, monkeypatch):
    """In a folder whose name has a space."""
    sweep = ["-m", "beta=0.1,0.2,0.66", "steps=2000", *SLURM, "hydra.launcher.array_limit=1", "name=q"]
    sweep.append("runs='my runs'")
    folder = project / "my runs" / "q"
    text = said(project, *sweep, code=0)
    job = submitted(text)
    assert "3 runs, 1 at a time" in text
    wait((folder / "beta=0.1/metrics.jsonl").exists)
    assert "3 runs: 1 running, 2 queued, 0 to submit" in said(project, *sweep, code=0)
    text = said(project, "my runs/q", verb="results", code=0)
    assert "my runs/q: 3 runs: 1 running, 2 queued" in text
    assert "queued   beta=0.66" in text
    with monkeypatch.context() as patch:  # what is queued is not guessed
        patch.setenv("PATH", f"{silent_squeue(tmp_path)}:{os.environ['PATH']}")
        assert "found instead: no answer; try again; nothing was submitted" in said(project, *sweep, code=1)
        assert "found instead: no answer" in said(project, "my runs/q", verb="results", code=0)
    (project / "finish").touch()
    wait(lambda: not queue())
    text = said(project, "my runs/q", verb="results", code=0)
    assert "failed   beta=0.66  RuntimeError: the world is bad" in text
    (project / "mended").touch()
    text = said(project, *sweep, code=0)
    assert "3 runs: 2 finished, 1 to submit" in text
    assert submitted(text) != job
    wait(lambda: not queue())
    assert set(states(folder).values()) == {"finished"}
    assert len([*(folder / "manifests").glob("*_*.log")]) == 3 + 1  # what the jobs say, if they do


def test_restarts_are_counted(slurm, project):
    """Of a run whose rank 1 is killed by srun, since rank 0 has ended before it."""
    said(project, "steps=2000", "beta=0.69", "processes=2", *SLURM, "hydra.launcher.restarts=0", code=0)
    run = project / "runs" / "dev" / "beta=0.69,steps=2000"
    wait((run / "metrics.jsonl").exists)
    subprocess.run(["scancel", "--signal=TERM", "--name=dev"], check=True, timeout=120)
    wait(lambda: not queue())
    assert "not requeued: 0 restarts are enough" in (run / "log.txt").read_text()
    assert results.status(run) == "stopped"


def test_slurm_refuses_first(slurm, project):
    text = said(project, "-m", "beta=0.1,0.2", *SLURM, "hydra.launcher.partition=nowhere", code=1)
    assert "Slurm refuses these settings of hydra.launcher" in text
    assert "invalid partition" in text
    assert not (project / "runs").exists()


def test_job_script(project):
    more = ["account=me", "gpus=4", "nodes=2", "time=90", "memory=64G", "array_limit=3", 'options=["--qos=long"]']
    more += ['before=["module load cuda"]', 'container="apptainer exec --nv image.sif"', "submit=false"]
    text = said(
        project, "-m", "beta=0.1,0.2", "processes=8", *SLURM, *(f"hydra.launcher.{one}" for one in more), code=0
    )
    assert "runs/dev: 2 runs: 0 finished, 2 to submit" in text
    (script,) = (project / "runs" / "dev" / "manifests").glob("*.sbatch")
    lines = script.read_text().splitlines()
    for option in (
        *("job-name=dev", "array=0-1%3", "account=me", "time=90", "nodes=2", "ntasks-per-node=4", "cpus-per-task=1"),
        *("gpus-per-node=4", "mem=64G", "signal=USR1@120", "requeue", "open-mode=append", "qos=long"),
    ):
        assert f"#SBATCH --{option}" in lines
    assert "partition" not in script.read_text()
    assert lines.index("module load cuda") < len(lines) - 1
    assert lines[-1].endswith('/slurm/execute.sh "$directory" apptainer exec --nv image.sif python')
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    manifest = script.with_suffix(".txt").read_text()
    assert manifest == "runs/dev/beta=0.1\nruns/dev/beta=0.2\n"
    assert states(project / "runs" / "dev") == {"beta=0.1": "planned", "beta=0.2": "planned"}


def launcher(**changed: Any) -> Slurm:
    settings: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/hydra/launcher/slurm.yaml"))
    return Slurm(**{key: value for key, value in settings.items() if not key.startswith("_")} | changed)


def test_one_shape_for_all_tasks():
    planned = [Run(Path(str(n)), {"processes": n, "device": "cpu"}, "") for n in (1, 2)]
    [problem] = launcher().problems(planned)
    assert "processes must be one number for all runs of an array job, got [1, 2]" in problem


@pytest.mark.parametrize(
    "processes, device, given, reason",
    [
        (3, "auto", {"nodes": 2}, "processes must be a multiple of hydra.launcher.nodes=2, got 3"),
        (1, "auto", {"gpus": 2}, "hydra.launcher.gpus must be the 1 processes of a run on each node"),
        (1, "cuda", {}, "device=cuda needs GPUs; add hydra.launcher.gpus=1"),
        (1, "auto", {"cpus": 0}, "hydra.launcher.cpus must be at least 1, got 0"),
        (1, "auto", {"before": "module"}, "hydra.launcher.before must be list[str], got 'module'"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, monkeypatch, capsys, processes, device, given, reason):
    planned = [Run(tmp_path / "run", {"processes": processes, "device": device, "name": "dev"}, "run")]
    monkeypatch.setattr(launch, "plan", lambda _: (planned, []))
    monkeypatch.setattr(Slurm, "start", lambda *_: pytest.fail("it was started"))
    with pytest.raises(SystemExit) as ended:
        launcher(**given, submit=False).execute([], [])
    assert ended.value.code == 1
    assert reason in capsys.readouterr().err


def test_refused_before_anything_is_written(project, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    text = said(project, "-m", "beta=0.1,0.2", "hydra/launcher=slurm", code=1)
    assert "Slurm's commands must be on the path" in text
    assert "Traceback" not in text
    assert not (project / "runs").exists()
