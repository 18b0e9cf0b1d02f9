"""Where a sweep stands, and its table and figure once more: python -m dpo.results runs/dev"""

import shutil
import sys
from collections import Counter
from pathlib import Path

from dpo.results.tables import report
from dpo.sweep.directory import folders, reason, status
from dpo.sweep.squeue import queued


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m dpo.results runs/<name>")
    path = Path(sys.argv[1])
    try:
        runs = folders(path)
    except ValueError as error:
        sys.exit(str(error))
    waiting: set[Path] = set()
    if shutil.which("squeue"):
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
