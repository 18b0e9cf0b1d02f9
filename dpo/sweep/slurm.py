"""Submit a sweep's runs to Slurm, as one array job, and return.

A task of the array is `slurm/execute.sh` on one run directory: one python per rank, requeued when it is stopped.
"""

import hashlib
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo import HOME
from dpo.sweep.directory import reason, status
from dpo.sweep.launch import Sweep, count
from dpo.sweep.plan import Run
from dpo.sweep.squeue import ask, queued

EXECUTE = HOME / "slurm" / "execute.sh"


@dataclass
class Slurm(Sweep):
    """One array job; `conf/hydra/launcher/slurm.yaml` explains the settings."""

    partition: str | None
    account: str | None
    time: str | int
    nodes: int
    gpus: int
    cpus: int
    memory: str | int | None
    array_limit: int
    grace: int
    restarts: int
    before: list[str]
    container: str | None
    python: str | None
    options: list[str]
    submit: bool

    def problems(self, planned: Sequence[Run]) -> list[str]:
        found = [
            f"hydra.launcher.{name} must be at least {least}, got {value}"
            for name, least in {"nodes": 1, "gpus": 0, "cpus": 1, "array_limit": 1, "grace": 1, "restarts": 0}.items()
            if (value := getattr(self, name)) < least
        ]
        shapes = sorted({run.config["processes"] for run in planned})
        if len(shapes) > 1:
            found.append(f"processes must be one number for all runs of an array job, got {shapes}; sweep them apart")
        if found or not shapes:
            return found
        share, rest = divmod(shapes[0], self.nodes)
        if rest:
            found.append(f"processes must be a multiple of hydra.launcher.nodes={self.nodes}, got {shapes[0]}")
        devices = sorted({run.config["device"] for run in planned})
        if self.gpus and (self.gpus != share or "cpu" in devices):
            found.append(
                f"hydra.launcher.gpus must be the {share} processes of a run on each node, with device=auto or cuda; "
                f"got {self.gpus} and device={', '.join(devices)}"
            )
        if not self.gpus and "cuda" in devices:
            found.append(f"device=cuda needs GPUs; add hydra.launcher.gpus={share}")
        return found or (self._refused(planned) if self.submit else [])

    def start(self, planned: Sequence[Run]) -> int:
        """Freeze and submit what is neither finished, running nor queued."""
        try:
            waiting = queued() if self.submit else set()
        except RuntimeError as error:
            print(f"{error}; nothing was submitted", file=sys.stderr)
            return 1
        states = {run.directory: status(run.directory, waiting) for run in planned}
        settled = ("finished", "running", "queued", "damaged")
        todo = [run for run in planned if states[run.directory] not in settled]
        damaged = {path.name: reason(path) for path, state in states.items() if state == "damaged"}
        folders = list(dict.fromkeys(run.directory.parent for run in planned))
        tally = Counter(state for state in states.values() if state in settled)
        where = ", ".join(map(str, folders))
        said = ", ".join(f"{n} {state}" for state, n in tally.items())
        print(f"{where}: {count(len(planned))}: {said or '0 finished'}, {len(todo)} to submit", flush=True)
        if todo:
            try:
                for run in todo:
                    run.freeze()
                    (run.directory / "error.json").unlink(missing_ok=True)
                script = self._write(todo)
            except OSError as error:
                print(f"could not write a run directory: {error}; nothing was submitted", file=sys.stderr)
                return 1
            if not self._submit(script, len(todo)):
                return 1
        for folder in folders:
            if not todo:
                self.report(folder, damaged)
            print(f"  python -m dpo.results {folder}    where it stands: table, figure, what failed and why")
        for name, wrong in damaged.items():
            print(f"not submitted: {name}: {wrong}", file=sys.stderr, flush=True)
        return int(bool(damaged))

    def _submit(self, script: Path, tasks: int) -> bool:
        if not self.submit:
            print(f"not submitted; sbatch {script} does\n  {count(tasks)} in {script.with_suffix('.txt')}")
            return True
        done = ask("sbatch", "--parsable", str(script))
        if done.returncode:
            print(f"sbatch refused {script}: {done.stderr.strip()}", file=sys.stderr)
            return False
        job = done.stdout.strip().split(";")[0]
        print(f"submitted job {job}: {count(tasks)}, {min(tasks, self.array_limit)} at a time ({script})")
        print(f"  squeue --job {job}    the queue\n  scancel {job}    save and stop; the same command resumes")
        return True

    def _refused(self, planned: Sequence[Run]) -> list[str]:
        """What Slurm says to such a job, without submitting it."""
        done = ask("sbatch", "--test-only", text=self._script(planned, Path("manifest.txt")))
        if done.returncode:
            return [f"Slurm refuses these settings of hydra.launcher: {done.stderr.strip()}"]
        return []

    def _write(self, todo: Sequence[Run]) -> Path:
        """The manifest and, beside it, the job script; named by their content."""
        lines = "".join(f"{run.directory}\n" for run in todo)
        folder = todo[0].directory.parent / "manifests"
        folder.mkdir(exist_ok=True)
        manifest = folder / f"{hashlib.sha256(lines.encode()).hexdigest()[:12]}.txt"
        manifest.write_text(lines)
        script = manifest.with_suffix(".sbatch")
        script.write_text(self._script(todo, manifest))
        return script

    def _script(self, todo: Sequence[Run], manifest: Path) -> str:
        processes = todo[0].config["processes"]
        settings = {
            "job-name": todo[0].config["name"],
            "array": f"0-{len(todo) - 1}%{self.array_limit}",
            "partition": self.partition,
            "account": self.account,
            "time": self.time,
            "nodes": self.nodes,
            "ntasks-per-node": processes // self.nodes,
            "cpus-per-task": self.cpus,
            "gpus-per-node": self.gpus or None,
            "mem": self.memory,
            "signal": f"USR1@{self.grace}",
            "open-mode": "append",
            "output": manifest.with_name("%A_%a.log"),
        }
        options = [f"--{key}={shlex.quote(str(value))}" for key, value in settings.items() if value is not None]
        start = [*shlex.split(self.container or ""), self.python or ("python" if self.container else sys.executable)]
        return "\n".join(
            (
                "#!/bin/bash",
                f"# Task i executes line i, from 0, of {manifest}.",
                *(f"#SBATCH {option}" for option in [*options, "--requeue", *self.options]),
                *self.before,
                f"export RESTARTS={self.restarts}",
                f'directory=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(manifest))})',
                f'exec bash {shlex.quote(str(EXECUTE))} "$directory" {shlex.join(start)}',
                "",
            )
        )
