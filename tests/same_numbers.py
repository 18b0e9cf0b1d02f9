"""Do this checkout and a commit of before give the same numbers, to the bit? For changes that must not move one.

    python -m tests.same_numbers main                                  # in the embedded world: 28 short runs
    python -m tests.same_numbers main data=file data.path=PAIRS policy.path=FOLDER     # a model and pairs of your own

Each of `SWEEPS` is run by both, in a folder and with a cache of its own; overrides are added to all of them. Metrics,
evaluations, responses and weights of each run are compared. Runs are told by the names of their folders, which must be
the same. Exit code 1 if anything differs.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SMALL = (
    *("data.demonstrations=256", "data.train=32", "data.validation=16", "evaluation.prompts=40", "sft.steps=10"),
    *("steps=6", "evaluate_every=3", "evaluate_prompts=10", "threads=1", "device=cpu", "wandb.mode=disabled"),
)
SWEEPS = {
    "betas": ("beta=0.01,0.1", "micro_batch_tokens=512"),
    "losses": ("loss=ipo,simpo,dr_dpo,beta_dpo,kto_paired,wpo", "batch_size=8"),
    "references": ("reference=reference_free,unconditional,live,ema", "keep=best"),
    "padded": ("packed=false", "precision=bf16,fp32"),
}
CLOCKS = ("seconds", "items_per_second")  # what a run tells of its time


def numbers(run: Path) -> dict[str, Any]:
    """What a run gave, by name: rows and figures without its times, responses, and weights as bytes."""
    found: dict[str, Any] = {}
    for file in sorted(run.glob("*.json*")):
        if file.name in ("metrics.jsonl", "evaluation.json", "responses.jsonl"):
            text = file.read_text()
            rows = map(json.loads, text.splitlines()) if file.suffix == ".jsonl" else [json.loads(text)]
            found |= {
                f"{file.name}, row {row}, {key}": value
                for row, values in enumerate(rows, 1)
                for key, value in values.items()
                if key not in CLOCKS
            }
    return found | {f"policy/{file.name}": file.read_bytes() for file in sorted(run.glob("policy/*.safetensors"))}


def differences(before: Path, now: Path) -> list[str]:
    """What is not the same in the runs of two folders, a line each; numbers as they were and are."""
    runs = sorted({file.parent.name for folder in (before, now) for file in folder.glob("*/config.yaml")})
    said = []
    for run in runs:
        one, other = numbers(before / run), numbers(now / run)
        for key in {**one, **other}:
            there, here = one.get(key, "nothing"), other.get(key, "nothing")
            if there != here:
                both = "" if bytes in (type(there), type(here)) else f": {there} then, {here} now"
                said.append(f"{before.name}/{run}: {key}{both}")
    return said or ([] if runs else [f"{before.name}: no run"])


def sweep(code: Path, folder: Path, overrides: list[str]) -> None:
    """Run all sweeps with the code of a checkout. Raises: CalledProcessError if one fails."""
    for name, varied in SWEEPS.items():
        command = [sys.executable, "-m", "dpo.train", "-m", *varied, *SMALL, f"name={name}", *overrides]
        environment = {**os.environ, "PYTHONPATH": str(code)}
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=sys.stderr)


def main(revision: str, *overrides: str) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        code, then, now = (Path(temporary, name) for name in ("code", "then", "now"))
        subprocess.run(["git", "worktree", "add", "--detach", str(code), revision], cwd=ROOT, check=True)
        try:
            for checkout, folder in ((code, then), (ROOT, now)):
                folder.mkdir()
                sweep(checkout, folder, list(overrides))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(code)], cwd=ROOT, check=True)
        said = [line for name in SWEEPS for line in differences(then / "runs" / name, now / "runs" / name)]
        runs = len([*now.glob("runs/*/*/evaluation.json")])
    print("\n".join(said[:40]) or f"{runs} runs: every number and every weight is that of {revision}")
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) > 1 else __doc__)
