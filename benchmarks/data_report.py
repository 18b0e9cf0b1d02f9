"""How long `python -m dpo.data` takes for 100,000 made-up pairs: python benchmarks/data_report.py POLICY [PAIRS]"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    policy, pairs = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 100_000
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(5000)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "pairs.jsonl")
        with open(file, "w") as lines:
            for _ in range(pairs):
                row = {name: " " + " ".join(rng.choices(words, k=12)) for name in ("prompt", "chosen", "rejected")}
                lines.write(json.dumps(row) + "\n")
        options = ["data=file", f"data.path={file}", f"policy.path={policy}", f"cache={folder}", f"report={folder}"]
        for title in ("first", "again"):
            began = time.monotonic()
            subprocess.run([sys.executable, "-m", "dpo.data", *options], check=True, stdout=subprocess.DEVNULL)
            spent = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds = time.monotonic() - began
            print(f"{title}: {seconds:.0f} s, {spent.ru_utime + spent.ru_stime:.0f} s of cores in all so far")


if __name__ == "__main__":
    main()
