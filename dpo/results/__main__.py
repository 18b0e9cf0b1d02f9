"""Where a sweep stands, and its table and figure once more: python -m dpo.results runs/dev"""

import argparse
import shutil
import sys
from collections import Counter
from pathlib import Path

from dpo.results.tables import report
from dpo.sweep.directory import folders, no_sweep, reason, status
from dpo.sweep.squeue import queued


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dpo.results",
        description="Where a sweep stands: its runs by state, with the reasons of those that failed, and once more the "
        "table and the figure of those that are finished (table.csv, figure.png and figure.pdf in the folder).",
    )
    parser.add_argument("folder", type=Path, help="of a sweep, runs/<name>")
    path = parser.parse_args().folder
    try:
        runs = folders(path)
        if not runs:
            raise ValueError(no_sweep(path))
    except ValueError as error:
        sys.exit(str(error))
    waiting: set[Path] = set()
    # A job has its manifest in one of the folders that it is of.
    if shutil.which("squeue") and any(path.absolute().parent.glob("*/manifests")):
        try:
            waiting = queued()
        except RuntimeError as error:
            print(error)
    states = {run.name: status(run, waiting) for run in runs}
    counts = Counter(states.values())
    print(
        f"{path}: {len(states)} run{'s' if len(states) != 1 else ''}: "
        + ", ".join(f"{n} {state}" for state, n in counts.items())
    )
    for run, state in states.items():
        if state != "finished":
            print(f"  {state:9}{run}  {reason(path / run) or ''}".rstrip())
    report(path, named=states)


if __name__ == "__main__":
    main()
