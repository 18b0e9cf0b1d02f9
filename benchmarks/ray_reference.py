"""How long training waits for the log-probs of its reference: scored by the run itself, or by Ray actors beside it.

    pip install -e '.[ray]' -c constraints.txt && python benchmarks/ray_reference.py
    python benchmarks/ray_reference.py policy.path=/models/sft data=file data.path=pairs.jsonl steps=20

Each run is `python -m dpo.train` with the settings given, in processes of its own, from a cache that has the policy and
the pairs, and no scores. With 0 workers the wait is the scoring before training; with more it is what training waited
for rows, the start of Ray and of the actors in it.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ALONE = re.compile(r"^reference: .* computed in ([\d.]+) s;", re.MULTILINE)
BASE = ["wandb.mode=disabled", "evaluate_every=0", "evaluation.prompts=2"]


def measured(workers: int, name: str, folder: Path, settings: list[str]) -> dict[str, float]:
    """Seconds of one run, and those of them that it waited for its reference."""
    shutil.rmtree(folder / "cache" / "reference", ignore_errors=True)
    scorer = ["scorer=ray", f"scorer.concurrency={workers}"] if workers else ["scorer=here"]
    places = [f"runs={folder / 'runs'}", f"cache={folder / 'cache'}", f"name={name}"]
    line = [sys.executable, "-m", "dpo.train", *BASE, *settings, *scorer, *places]
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(line)} must end without an error, found\n{done.stdout}")
    (file,) = (folder / "runs" / name).glob("*/evaluation.json")
    result = json.loads(file.read_text())
    wait = result["reference_wait_s"] if workers else float(ALONE.findall(done.stdout)[0])
    return {"seconds": result["seconds"], "waited": wait}


def table(rows: list[tuple[int, dict[str, float]]]) -> str:
    """Means by number of workers, with the smallest and the largest."""
    lines = [f"{'workers':8}{'waited, s':>22}{'run, s':>22}"]
    for workers in sorted({workers for workers, _ in rows}):
        cells = []
        for key in ("waited", "seconds"):
            values = [row[key] for number, row in rows if number == workers]
            cells.append(f"{statistics.mean(values):.1f} [{min(values):.1f}, {max(values):.1f}]")
        lines.append(f"{workers:<8}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="of dpo.train")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repetitions", type=int, default=3)
    given = parser.parse_intermixed_args()
    rows: list[tuple[int, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        measured(0, "first", Path(folder), given.settings)  # makes the policy and the pairs
        for repetition in range(given.repetitions):
            for workers in given.workers:
                rows.append(
                    (workers, measured(workers, f"workers_{workers}_{repetition}", Path(folder), given.settings))
                )
                print(workers, rows[-1][1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
