"""What a sweep costs around its training: CPU seconds of its commands, of planning many runs, and of reading them.

    python benchmarks/sweep.py                       sweeps of 100, 1,000 and 10,000 runs; the first time it trains one
    python benchmarks/sweep.py --runs 1000 --only plan read

The runs are real plans, frozen as a sweep freezes them, and have the files of one real run: a link to each. A command
is counted with all processes that it starts: user and system time, which other work on the machine hardly lengthens.
"""

import argparse
import ctypes
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
ADOPT = 36  # PR_SET_CHILD_SUBREAPER of prctl(2), on Linux: what outlives its parent, as a fork server does, is ours
# Plans as the command does, and starts nothing; with FILES the runs are frozen, and finished by the files of that one.
PLAN = """
import os
from pathlib import Path
from dpo.sweep import launch

def start(self, planned):
    for run in planned if "FILES" in os.environ else ():
        run.freeze()
        for file in Path(os.environ["FILES"]).iterdir():
            if file.is_file() and file.name != "config.yaml":
                os.link(file, run.directory / file.name)
    return 0

launch.Local.start = start
launch.command("train")
"""
LOAD = "import sys; from dpo import results; results.load(sys.argv[1])"


def cpu_seconds(*command: str, **environment: str) -> float:
    """User and system time of a Python command and of all that it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    line, surroundings = [sys.executable, *command], {**os.environ, **environment}
    done = subprocess.run(line, env=surroundings, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(line)[:300]} must end without an error, found\n{done.stdout}")
    try:
        while True:
            os.wait()
    except ChildProcessError:  # none is left
        pass
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def show(what: str, seconds: float, runs: int = 1) -> None:
    each = f"{1000 * seconds / runs:10.1f} ms a run" if runs > 1 else ""
    print(f"{what:48}{seconds:8.2f} s{each}", flush=True)


def many(runs: int, parts: Sequence[str], settings: Sequence[str], files: Path, folder: Path) -> None:
    """Planning so many runs in `folder`, and reading them when they are finished."""
    grid = [f"beta={','.join(f'{(n + 1) / 1000:g}' for n in range(runs // 10))}", "seed=range(10)"]
    sweep = ["-m", *settings, *grid, f"runs={folder}", "name=many"]
    if "plan" in parts:
        show(f"plan of {runs} runs", cpu_seconds("-c", PLAN, *sweep), runs)
    if "read" in parts:
        cpu_seconds("-c", PLAN, *sweep, FILES=str(files))
        there = str(folder / "many")
        show(f"the same command when all {runs} are finished", cpu_seconds("-m", "dpo.train", *sweep), runs)
        show(f"python -m dpo.results, {runs} runs", cpu_seconds("-m", "dpo.results", there), runs)
        show(f"results.load, {runs} runs", cpu_seconds("-c", LOAD, there), runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[100, 1000, 10_000], help="of a sweep")
    parser.add_argument("--only", nargs="+", default=["command", "plan", "read", "run"], help="parts to measure")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir(), "dpo-sweep"), help="of the real run")
    given = parser.parse_args()
    ctypes.CDLL(None).prctl(ADOPT, 1, 0, 0, 0)
    settings = ["wandb.mode=disabled", f"cache={given.out / 'cache'}", "threads=1"]
    real = ["-m", "dpo.train", *settings, f"runs={given.out}", "name=real", "beta=0.1"]
    files = given.out / "real" / "beta=0.1"
    if not (files / "evaluation.json").exists():
        show("the first run: SFT, pairs, scores, DPO", cpu_seconds(*real))
    if "command" in given.only:
        show("--help", cpu_seconds("-m", "dpo.train", "--help"))
        show("plan of one run", cpu_seconds("-c", PLAN, *settings, f"runs={given.out}", "name=none"))
        show("the same command when its run is finished", cpu_seconds(*real))
    for runs in given.runs:
        with tempfile.TemporaryDirectory(dir=given.out) as folder:
            many(runs, given.only, settings, files, Path(folder))
    if "run" in given.only:
        with tempfile.TemporaryDirectory(dir=given.out) as folder:
            show("one more beta", cpu_seconds("-m", "dpo.train", *settings, f"runs={folder}", "beta=0.2"))


if __name__ == "__main__":
    main()
