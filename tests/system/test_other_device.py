"""Runs on a device that refuses what a GPU refuses: see `tests.other_device`. They give what they give on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from whole_runs import SMALL, frozen, once, own, run

ROOT = Path(__file__).parents[2]
CLOCKS = ("seconds", "items_per_second")


def elsewhere(directory, *overrides):
    """The rows and figures of a run on that device, and what it said."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(frozen(directory, *overrides)))
    command = [sys.executable, "-m", "tests.other_device", str(directory)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return rows, json.loads((directory / "evaluation.json").read_text()), done.stdout


def assert_alike(directory, *overrides, rel=2e-3):
    rows, result = run(directory / "here", *overrides)
    others, other, said = elsewhere(directory / "there" / "run", *overrides)
    assert "of padded rows, since" not in said
    for row, same in zip([*rows, result], [*others, other], strict=True):
        assert [*same] == [*row]
        numbers = {key for key, value in row.items() if isinstance(value, float) and key not in CLOCKS}
        for key in numbers:
            assert same[key] == pytest.approx(row[key], rel=rel, abs=rel, nan_ok=True), key


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("loss=tdpo", "reference=live", "micro_batch_tokens=256"), id="tokens"),
        pytest.param(("packed=false", "policy.lora.rank=4", "reference=ema"), id="padded", marks=pytest.mark.long),
        pytest.param(("loss=beta_dpo", "evaluation.baseline=best_of_2"), id="coupled", marks=pytest.mark.long),
    ],
)
def test_a_run_in_the_world(tmp_path, overrides):
    assert_alike(tmp_path, *once(*SMALL, *overrides))


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        ("gemma2", "fp32"),  # capped scores, sliding windows
        pytest.param("llama", "bf16", marks=pytest.mark.long),
        *(pytest.param(kind, "fp32", marks=pytest.mark.long) for kind in ("gpt2", "gpt_neox", "mistral", "qwen2")),
    ],
)
def test_a_run_of_other_models(tmp_path, tiny_model, kind, precision):
    rel = {"fp32": 2e-3, "bf16": 5e-2}[precision]
    assert_alike(tmp_path, *own(tmp_path, tiny_model(kind, 64)), "threads=1", f"precision={precision}", rel=rel)
