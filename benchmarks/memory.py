"""Peak resident memory of a short training beside what `python -m dpo.data` expects, on a CPU of a Linux machine:

python benchmarks/memory.py data=hh data.path=pairs.jsonl policy.path=FOLDER [more keys of dpo.train]
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SHORT = ("steps=2", "evaluate_every=0", "evaluation.prompts=2", "max_new_tokens=8", "wandb.mode=disabled", "device=cpu")


def descendants(pid: int) -> Iterator[int]:
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield from (int(child), *descendants(int(child)))


def main() -> None:
    keys = [*{key.partition("=")[0]: key for key in (*SHORT, *sys.argv[1:])}.values()]
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.Popen(
            [sys.executable, "-m", "dpo.train", *keys, f"runs={folder}", f"cache={folder}/cache"],
            stdout=subprocess.DEVNULL,
        )
        peak = 0.0
        while run.poll() is None:
            try:
                for pid in [*descendants(run.pid)]:
                    if found := re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()):
                        peak = max(peak, int(found[1]) * 1024 / 1e9)
            except OSError:
                pass  # one that ended meanwhile
            time.sleep(0.02)
        if run.returncode:
            sys.exit(f"dpo.train ended with {run.returncode}")
        report = [sys.executable, "-m", "dpo.data", *keys, f"cache={folder}/cache", f"report={folder}"]
        subprocess.run(report, check=True, stdout=subprocess.DEVNULL)
        expected = sum(json.loads(Path(folder, "report.json").read_text())["cost"]["memory"].values()) / 1e9
    print(f"peak {peak:.2f} GB, expected {expected:.2f} GB: {peak / expected:.2f}")


if __name__ == "__main__":
    main()
