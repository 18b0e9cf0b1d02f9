"""What Slurm says. What is queued is never remembered: a job names its manifest, a file with a run directory a line."""

import subprocess
from pathlib import Path


def ask(*command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """What one of Slurm's commands answers."""
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True)
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", f"{error}; Slurm's commands must be on the path")


def queued() -> set[Path]:
    """Run directories of this user's jobs that wait, run or end.

    Raises: RuntimeError if Slurm does not say.
    """
    done = ask("squeue", "--noheader", "--array", "--me", "--format=%K|%Z|%o")
    if done.returncode:
        raise RuntimeError(f"squeue must say what is queued, found instead: {done.stderr.strip()}; try again")
    found = set()
    for line in done.stdout.splitlines():
        task, folder, command = line.split("|", 2)
        words = command.split(" ")  # the launcher's script, or array.sbatch and a manifest; their paths may hold spaces
        names = (" ".join(words[first:]) for first in range(len(words)))
        manifest = next((path for name in names if (path := Path(folder, name).with_suffix(".txt")).is_file()), None)
        if task.isdigit() and manifest:
            directories = manifest.read_text().splitlines()
            found |= {Path(folder, name).resolve() for name in directories[int(task) :][:1]}
    return found
