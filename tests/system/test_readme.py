"""The README's commands: the main one executed at three steps, every other one planned."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from composing import compose

from dpo.sweep.plan import resolve
from dpo.sweep.schema import check

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"python -m dpo\.train (-m [^`\n]*)", README)
SMALL = [
    *(
        "steps=3",
        "sft.steps=3",
        "data.demonstrations=32",
        "data.train=8",
        "data.validation=4",
        "evaluation.prompts=10",
    ),
    *("evaluate_every=0", "evaluation.log_samples=1", "threads=1", "wandb.mode=disabled"),
]


@pytest.mark.long
def test_the_main_command(tmp_path):
    """It sweeps, shows a table and a figure, and does nothing twice."""
    first = COMMANDS[0].split()
    assert first == ["-m", "beta=0.01,0.02,0.1"]

    def sweep(*overrides: str) -> str:
        command = [
            sys.executable,
            "-m",
            "dpo.train",
            *overrides,
            *SMALL,
            f"runs={tmp_path}",
            f"cache={tmp_path / 'cache'}",
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = sweep(*first)
    logs = [log.read_text() for log in (tmp_path / "dev").glob("beta=*/log.txt")]  # of runs side by side
    said += "".join(logs)
    assert said.count("self-check: |loss - ln 2|") == 3
    assert said.count("reference: initial policy, weights") == 3
    assert said.count("computed in") == 1  # by the first run alone
    table = pd.read_csv(tmp_path / "dev" / "table.csv")
    assert sorted(table["beta"]) == [0.01, 0.02, 0.1]
    assert {"win_rate", "kl", "kl/se", "rewards/accuracies", "rewards/margins", "length", "ended", "valid"} <= set(
        table
    )
    assert (tmp_path / "dev" / "figure.png").stat().st_size > 10_000

    (tmp_path / "dev" / "figure.png").unlink()
    again = sweep(*first)
    assert "3 finished, 0 to do" in again
    assert "self-check" not in again
    assert [log.read_text() for log in (tmp_path / "dev").glob("beta=*/log.txt")] == logs
    assert "win rate" in again
    assert (tmp_path / "dev" / "figure.png").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_be_planned(command):
    overrides = [part for part in command.split()[1:] if not part.startswith("hydra.")]
    overrides = [part.replace(",exponential", "") for part in overrides]  # the loss that a reader adds
    assert overrides
    axes = [[f"{key}={value}" for value in values.split(",")] for key, values in (o.split("=", 1) for o in overrides)]
    for combination in itertools.product(*axes):
        check(resolve(compose("train", *combination)))
