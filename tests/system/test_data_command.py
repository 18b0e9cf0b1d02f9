"""`python -m dpo.data` as users call it."""

import json
import subprocess
import sys

import pytest
from composing import compose

from dpo.data.__main__ import main

WHAT = {"name", "split", "count", "of", "verdict", "advice", "examples", "note"}


def dialogue(number):
    start = f"\n\nHuman: Tell me about cats, number {number * 7919 % 1009}.\n\nAssistant:"
    return {"chosen": f"{start} Cats sleep {number} hours.", "rejected": f"{start} Dogs run, {number} of them."}


def call(folder, *overrides):
    command = [sys.executable, "-m", "dpo.data", f"report={folder / 'report'}", f"cache={folder / 'cache'}", *overrides]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_a_report_on_dialogues(tmp_path, tiny_model):
    rows = [dialogue(n) for n in range(40)] + [{"chosen": "no turns", "rejected": "at all"}]
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = call(tmp_path, "data=hh", "data.path=hh.jsonl", f"policy.path={tiny_model('gpt2')}", "batch_size=4")
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "report" / "report.json").read_text())
    assert set(made) == {"data", "tokenizer", "splits", "findings", "cost"}
    assert all(set(one) == WHAT and one["verdict"] in ("ok", "look", "bad") for one in made["findings"])
    [refused] = [one for one in made["findings"] if one["name"] == "there is no turn of the assistant"]
    assert (refused["count"], refused["of"], refused["examples"]) == (1, 41, ["hh.jsonl, line 41"])
    given = {split: numbers["given"] for split, numbers in made["splits"].items()}
    assert sum(given.values()) == 40
    assert made["cost"]["steps"] == -(-given["train"] // 4)
    weights = 4 * 4 * made["cost"]["parameters"]  # bytes: themselves, gradients, two moments
    assert made["cost"]["memory"]["weights"] == weights
    assert "there is no turn of the assistant" in done.stdout
    assert not (tmp_path / "runs").exists()
    assert (tmp_path / "report" / "report.png").stat().st_size > 1000
    assert (tmp_path / "report" / "report.pdf").read_bytes().startswith(b"%PDF-")


def test_what_is_no_record_stops_it_as_it_stops_training(tmp_path, tiny_model):
    (tmp_path / "pairs.jsonl").write_text('{\n{"prompt": "alone"}\n')
    folders = [f"report={tmp_path / 'report'}", f"cache={tmp_path / 'cache'}"]
    given = ["data=file", f"data.path={tmp_path / 'pairs.jsonl'}", f"policy.path={tiny_model('gpt2')}", *folders]
    with pytest.raises(ValueError, match="2 of 2 lines are no records"):
        main(compose("data", *given))
    assert not (tmp_path / "report").exists()


def test_a_gpu_that_is_asked_for_must_be_here(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(dialogue(n)) + "\n" for n in range(40)))
    given = ("data=hh", "data.path=hh.jsonl", f"policy.path={tiny_model('gpt2')}", "device=cuda")
    done = call(tmp_path, *given)
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (
        1,
        "",
        [
            "nothing was started:",
            "",
            " ".join([f"report={tmp_path / 'report'}", f"cache={tmp_path / 'cache'}", *given]),
            "  device=cuda must have 1 GPU that torch sees here, found 0; use device=cpu, or another machine",
        ],
    )


def test_a_mixture_with_a_weight(tmp_path, tiny_model):
    for name in ("a", "b"):
        rows = [{"prompt": f"{name} {n}?", "chosen": f" yes, {n}", "rejected": " no"} for n in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = f"data.sources=[{tmp_path / 'a.jsonl'},{{path:{tmp_path / 'b.jsonl'},weight:2}}]"
    folders = [f"report={tmp_path / 'report'}", f"cache={tmp_path / 'cache'}"]
    main(compose("data", "data=mixture", sources, f"policy.path={tiny_model('gpt2')}", *folders))
    made = json.loads((tmp_path / "report" / "report.json").read_text())
    twice = next(one for one in made["findings"] if one["name"] == "pairs that are there twice")
    assert twice["count"] == sum(split["given"] for split in made["splits"].values()) - 40 > 0
    assert all("b.jsonl" in place for place in twice["examples"])
