"""The scripts of a cluster, executed by bash with a fake task id, beside programs that note how they are called."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dpo.sweep import execute as executing
from dpo.sweep import slurm, squeue
from dpo.sweep.directory import status
from dpo.sweep.plan import Run
from dpo.sweep.squeue import queued
from hydra_plugins.dpo_launchers import Slurm

ROOT = Path(__file__).parents[2]
NAMES = ["runs/dev/beta=0.1", "runs/dev/beta=0.2,seed=1", "runs/my dev/beta=0.3", "runs/dev/beta=0.4"]
SRUN = """#!/bin/bash
echo "srun $*" >> "$NOTES"
options=0; while [[ "$1" == --* ]]; do shift; done
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do SLURM_PROCID=$rank SLURM_LOCALID=$((rank % 2)) "$@" || code=$?; done
exit ${code:-0}
"""
PYTHON = """#!/bin/bash
echo "python $*" >> "$NOTES"
for name in RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT PYTHONUNBUFFERED OMP_NUM_THREADS MKL_NUM_THREADS \
RAYON_NUM_THREADS; do echo "$RANK $name ${!name}" >> "$NOTES"; done
[ -n "$ERROR" ] && echo "$ERROR" > "${@: -1}/error.json"
echo "said by $RANK"
[ "$CODE" -gt 128 ] && kill -$((CODE - 128)) $$
exit $CODE
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$NOTES"
[ "$1 $2" = "show hostnames" ] && printf 'node7\\nnode9\\n'
[ "$1 $2" = "show job" ] && echo "JobId=1 JobState=${STATE:-RUNNING} Requeue=1"
exit 0
"""
STUBS = {"srun": SRUN, "python": PYTHON, "scontrol": SCONTROL, "sleep": '#!/bin/bash\necho "sleep $*" >> "$NOTES"\n'}


@pytest.fixture
def site(tmp_path) -> Path:
    """A project whose programs are stubs, with four run directories and a manifest of them."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / "bin").mkdir()
    for name, text in STUBS.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    for name in NAMES:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("beta: 0.1\n")
    (tmp_path / "manifest.txt").write_text("".join(f"{name}\n" for name in NAMES))
    return tmp_path


def bash(site: Path, *command: str, **variables: str) -> tuple[int, list[str], str]:
    """Exit code, what the programs noted, what was said to the terminal."""
    notes = site / "notes"
    notes.unlink(missing_ok=True)
    fake = {"SLURM_SUBMIT_DIR": str(site), "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[7,9]", "CODE": "0"}
    fake |= {"SLURM_NTASKS": "1", "NOTES": str(notes), "PATH": f"{site / 'bin'}:/usr/bin:/bin"} | variables
    done = subprocess.run(["bash", *command], cwd=site, env=fake, capture_output=True, text=True, timeout=60)
    return done.returncode, notes.read_text().splitlines() if notes.exists() else [], done.stdout + done.stderr


def executed(notes: Sequence[str]) -> list[str]:
    return [line.removeprefix("python -m dpo.sweep.execute ") for line in notes if line.startswith("python")]


def launcher(**changed: Any) -> Slurm:
    settings = {"partition": None, "account": None, "time": "04:00:00", "nodes": 1, "gpus": 0, "cpus": 4}
    settings |= {"array_limit": 16, "grace": 120, "restarts": 100, "before": [], "container": None, "python": "python"}
    return Slurm(**{**settings, "memory": None, "options": [], "submit": True, **changed})


def planned(*names: str, **config: Any) -> list[Run]:
    settings = {"id": "0", "name": "dev", "processes": 1, "device": "cpu", **config}
    return [Run(Path(name), settings, name) for name in names]


@pytest.mark.parametrize("task", range(4))
@pytest.mark.parametrize("script", ["array.sbatch", "the launcher's"])
def test_a_task_executes_its_line_of_the_manifest(site, monkeypatch, script, task):
    command = ["slurm/array.sbatch", "manifest.txt"]
    if script != "array.sbatch":
        monkeypatch.setattr(slurm, "EXECUTE", site / "slurm" / "execute.sh")
        monkeypatch.chdir(site)
        command = [str(launcher()._write(planned(*NAMES)))]
        assert Path(command[0]).with_suffix(".txt").read_text() == (site / "manifest.txt").read_text()
    code, notes, _ = bash(site, *command, SLURM_ARRAY_TASK_ID=str(task))
    assert (code, executed(notes)) == (0, [NAMES[task]])
    assert "said by 0" in (site / NAMES[task] / "log.txt").read_text()


def test_a_task_beyond_the_manifest_executes_nothing(site):
    code, notes, said = bash(site, "slurm/array.sbatch", "manifest.txt", SLURM_ARRAY_TASK_ID="4")
    assert (code != 0, executed(notes)) == (True, [])
    assert "not in manifest.txt" in said
    code, notes, said = bash(site, "slurm/array.sbatch", SLURM_ARRAY_TASK_ID="0")
    assert (code != 0, executed(notes), "give a manifest" in said) == (True, [], True)
    code, _, said = bash(site, "slurm/execute.sh", "slurm")
    assert (code, said) == (1, "slurm must be a run directory, it has no config.yaml\n")


def test_ranks_know_each_other(site):
    many = {"SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "3", "MKL_NUM_THREADS": "1"}
    code, notes, _ = bash(site, "slurm/train.sbatch", NAMES[2], **many)
    assert (code, executed(notes)) == (0, [NAMES[2]] * 4)
    assert notes[1].startswith("srun --cpus-per-task=3 --kill-on-bad-exit=1 bash -c ")
    told = {tuple(line.split(" ", 2)) for line in notes if line[0].isdigit()}
    for rank in "0123":
        mine = {"RANK": rank, "LOCAL_RANK": str(int(rank) % 2), "WORLD_SIZE": "4", "PYTHONUNBUFFERED": "1"}
        mine |= {"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "1", "RAYON_NUM_THREADS": "3"}
        mine |= {"MASTER_ADDR": "node7", "MASTER_PORT": str(10000 + 4711)}
        assert {(rank, key, value) for key, value in mine.items()} <= told
    _, notes, _ = bash(site, "slurm/train.sbatch", NAMES[0], SLURM_JOB_ID="64711")
    assert "0 MASTER_ADDR 127.0.0.1" in notes
    assert "0 MASTER_PORT 14711" in notes
    assert not any(line.startswith("scontrol") for line in notes)
    assert "0 OMP_NUM_THREADS 1" in notes
    _, notes, _ = bash(site, "slurm/execute.sh", NAMES[0], "env", "A=b", "python")
    assert executed(notes) == [NAMES[0]]  # in what starts it in a container


@pytest.mark.parametrize(
    "code,error,requeued",
    [
        (executing.STOPPED, "", True),
        (executing.STOPPED, '{"type": "Stopped"}', True),
        (137, '{"type": "Stopped"}', True),  # rank 1 was killed while rank 0 had said so
        (137, '{"type": "RuntimeError"}', False),
        (executing.FAILED, '{"type": "Stopped"}', False),
        (executing.IN_USE, "", False),
        (0, "", False),
    ],
)
def test_what_goes_back_to_the_queue(site, code, error, requeued):
    found, notes, _ = bash(site, "slurm/execute.sh", NAMES[0], CODE=str(code), ERROR=error)
    assert found == code
    assert ("scontrol requeue 4711" in notes, "sleep 60" in notes) == (requeued, requeued)
    told = site / NAMES[0] / "error.json"
    assert (told.read_text().strip() if told.exists() else "") == error  # as python left it


def test_restarts_and_what_was_cancelled(site):
    for count, state, requeued in (("0", "RUNNING", True), ("1", "PREEMPTED", True), ("2", "RUNNING", False)):
        variables = {"CODE": "75", "RESTARTS": "2", "SLURM_RESTART_COUNT": count, "STATE": state}
        _, notes, _ = bash(site, "slurm/execute.sh", NAMES[0], **variables)
        assert ("scontrol requeue 4711" in notes) == requeued, count
    log = (site / NAMES[0] / "log.txt").read_text()
    assert "not requeued: 2 restarts are enough" in log
    assert log.count("job 4711 on node[7,9], restart") == 3  # of all attempts, one after another
    code, notes, _ = bash(site, "slurm/execute.sh", NAMES[0], CODE="75", STATE="CANCELLED")
    assert (code, "scontrol requeue 4711" in notes) == (75, False)
    _, notes, _ = bash(site, "slurm/execute.sh", NAMES[0], CODE="75", SLURM_RESTART_COUNT="99")
    assert "scontrol requeue 4711" in notes
    _, notes, _ = bash(site, "slurm/execute.sh", NAMES[0], CODE="75", SLURM_RESTART_COUNT="100")
    assert "scontrol requeue 4711" not in notes


@pytest.mark.parametrize(
    "code,message",
    [
        (137, "killed by signal 9 (out of memory?)"),
        (139, "killed by signal 11"),
        (3, "exit code 3, and it did not say why"),
    ],
)
def test_a_run_that_could_not_say_why_has_a_reason(site, code, message):
    (site / NAMES[0] / "error.json").write_text('{"type": "Stopped", "message": "of a former attempt"}')
    assert bash(site, "slurm/execute.sh", NAMES[0], CODE=str(code))[0] == code
    error = json.loads((site / NAMES[0] / "error.json").read_text())
    assert error == {"type": "Killed", "message": message, "traceback": ""}
    assert status(site / NAMES[0]) == "failed"
    assert (executing.FAILED, executing.IN_USE, executing.STOPPED) == (1, 73, 75)  # execute.sh knows them


def options(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


def test_the_job_script_holds_every_setting():
    plain = options(launcher()._script(planned("a", "b", "c"), Path("m/abc.txt")))
    assert plain == {
        **{"job-name": "dev", "array": "0-2%16", "time": "04:00:00", "nodes": "1", "ntasks-per-node": "1"},
        **{"cpus-per-task": "4", "signal": "USR1@120", "open-mode": "append", "output": "m/%A_%a.log", "requeue": ""},
    }
    asked = {"partition": "p", "account": "a", "time": 90, "nodes": 2, "gpus": 3, "cpus": 5, "memory": "64G"}
    asked |= {"array_limit": 7, "grace": 60, "restarts": 9, "before": ["module load cuda"], "options": ["--qos=long"]}
    script = launcher(**asked, container="run 'an image'", python=None)._script(
        planned("a", name="my name", processes=6), Path("m/a b.txt")
    )
    assert options(script) == {
        **{"job-name": "'my name'", "array": "0-0%7", "partition": "p", "account": "a", "time": "90", "nodes": "2"},
        **{"ntasks-per-node": "3", "cpus-per-task": "5", "gpus-per-node": "3", "mem": "64G", "signal": "USR1@60"},
        **{"open-mode": "append", "output": "m/%A_%a.log", "requeue": "", "qos": "long"},
    }
    last = script.splitlines()[-4:]
    assert last[:2] == ["module load cuda", "export RESTARTS=9"]
    assert last[3] == f"exec bash {ROOT / 'slurm' / 'execute.sh'} \"$directory\" run 'an image' python"


@pytest.mark.parametrize(
    "settings,config,said",
    [
        ({"nodes": 0}, {}, "hydra.launcher.nodes must be at least 1, got 0"),
        ({"gpus": -1}, {}, "hydra.launcher.gpus must be at least 0, got -1"),
        ({"cpus": 0}, {}, "hydra.launcher.cpus must be at least 1"),
        ({"array_limit": 0}, {}, "hydra.launcher.array_limit must be at least 1"),
        ({"grace": 0}, {}, "hydra.launcher.grace must be at least 1"),
        ({"restarts": -1}, {}, "hydra.launcher.restarts must be at least 0"),
        ({"nodes": 2}, {"processes": 3}, "processes must be a multiple of hydra.launcher.nodes=2, got 3"),
        ({"gpus": 1}, {"processes": 2, "device": "auto"}, "hydra.launcher.gpus must be the 2 processes of a run"),
        ({"gpus": 1, "nodes": 2}, {"processes": 2, "device": "cpu"}, "hydra.launcher.gpus must be the 1 processes"),
        ({}, {"processes": 2, "device": "cuda"}, "device=cuda needs GPUs; add hydra.launcher.gpus=2"),
        ({"nodes": 2, "gpus": 2}, {"processes": 4, "device": "cuda"}, None),
        ({"restarts": 0, "array_limit": 1, "cpus": 1, "grace": 1}, {"device": "auto"}, None),
    ],
)
def test_what_no_job_can_be(settings, config, said):
    problems = launcher(submit=False, **settings).problems(planned("a", "b", **config))
    assert len(problems) == (said is not None)
    assert said is None or problems[0].startswith(said)


@pytest.fixture
def asked(monkeypatch):
    """What Slurm is asked, and by program what it answers: exit code, stdout, stderr."""
    calls: list[tuple[Any, ...]] = []
    answers: dict[str, tuple[int, str, str]] = {}

    def ask(*command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        calls.append((*command, text))
        return subprocess.CompletedProcess(command, *answers.get(command[0], (0, "", "")))

    for module in (slurm, squeue):
        monkeypatch.setattr(module, "ask", ask)
    return calls, answers


def test_what_is_submitted(site, monkeypatch, capsys, asked):
    """What is finished, running, queued or damaged is not; a reason of a former attempt is gone."""
    calls, answers = asked
    monkeypatch.chdir(site)
    names = [f"runs/dev/{name}" for name in ("new", "finished", "damaged", "failed", "waits")]
    runs = planned(*names)
    for run in runs:
        run.freeze()
    Path(names[1], "evaluation.json").write_text('{"steps": 1}')
    Path(names[2], "evaluation.json").write_text("{")
    Path(names[3], "error.json").write_text('{"type": "ValueError", "message": "no"}')
    manifest = site / "runs" / "dev" / "manifests" / "0f.txt"
    manifest.parent.mkdir()
    manifest.write_text(f"{names[0]}\n{names[4]}\n")
    answers["squeue"] = 0, f"1|{site}|{manifest.with_suffix('.sbatch').relative_to(site)}\n", ""
    answers["sbatch"] = 0, "812;cluster\n", ""
    assert launcher(array_limit=9).start(runs) == 1  # one is damaged
    said = capsys.readouterr()
    assert "runs/dev: 5 runs: 1 finished, 1 damaged, 1 queued, 2 to submit\n" in said.out
    assert "submitted job 812: 2 runs, 2 at a time" in said.out
    assert f"not submitted: damaged: {names[2]}/evaluation.json must hold" in said.err
    [(_, _, script, _)] = [call for call in calls if call[0] == "sbatch"]
    assert Path(script).with_suffix(".txt").read_text() == f"{names[0]}\n{names[3]}\n"
    assert not Path(names[3], "error.json").exists()
    assert calls[0][:-1] == ("squeue", "--noheader", "--array", "--me", "--format=%K|%Z|%o")
    answers["sbatch"] = 1, "", "no such account"
    assert launcher().start(runs) == 1
    assert "sbatch refused" in capsys.readouterr().err
    answers["squeue"] = 1, "", "no answer"
    Path(names[3], "error.json").touch()
    calls.clear()
    assert launcher().start(runs) == 1
    assert "found instead: no answer; try again; nothing was submitted" in capsys.readouterr().err
    assert [call[0] for call in calls] == ["squeue"]
    assert launcher(submit=False).start(planned(names[0])) == 0  # and Slurm is not asked
    assert [call[0] for call in calls] == ["squeue"]
    assert "not submitted; sbatch runs/dev/manifests/" in capsys.readouterr().out


def test_slurm_is_asked_before_anything_is_written(asked):
    calls, answers = asked
    assert launcher().problems(planned("a", "b")) == []
    [(*command, text)] = calls
    assert command == ["sbatch", "--test-only"]
    assert "#SBATCH --array=0-1%16" in text
    answers["sbatch"] = 1, "", "invalid partition\n"
    assert launcher().problems(planned("a")) == ["Slurm refuses these settings of hydra.launcher: invalid partition"]
    assert launcher(submit=False).problems(planned("a")) == []


def test_what_is_queued_is_read_from_manifests(tmp_path, asked):
    _, answers = asked
    for folder in ("here", "my own place"):
        (tmp_path / folder / "runs").mkdir(parents=True)
        for name in ("one.txt", "my list.txt"):
            (tmp_path / folder / "runs" / name).write_text("".join(f"runs/{folder[0]}{n}\n" for n in range(3)))
    here, own = tmp_path / "here", tmp_path / "my own place"
    lines = [
        f"0|{here}|runs/one.sbatch",
        f"2|{here}|slurm/array.sbatch runs/one.txt",
        f"1|{own}|{own}/runs/my list.sbatch",
        f"7|{here}|runs/one.sbatch",  # the manifest has been written again
        f"N/A|{here}|somebody else's job",
        f"0|{here}|no/such.sbatch",
    ]
    answers["squeue"] = 0, "".join(f"{line}\n" for line in lines), ""
    assert queued() == {here / "runs" / "h0", here / "runs" / "h2", own / "runs" / "m1"}
    (here / "runs" / "h2").mkdir()
    assert status(here / "runs" / "h2", queued()) == "queued"
    (here / "runs" / "h2" / "error.json").write_text('{"type": "ValueError", "message": "no"}')
    assert status(here / "runs" / "h2", queued()) == "queued"  # again
    assert status(here / "runs" / "h2") == "failed"


def test_a_program_that_is_not_there_is_an_answer(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = squeue.ask("squeue")
    assert done.returncode == 127
    assert done.stderr.endswith("Slurm's commands must be on the path")
    assert os.environ["PATH"] == str(tmp_path)
