"""A run that is stopped and goes on is the whole run, to the bit, whatever its reference is; and no other run.

What is measured after training is left out: it reads the policy, and nothing of the state.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from whole_runs import ROOT, frozen, other_model, own

from dpo import evaluate, sft, train
from dpo.data.records import row, write_rows
from dpo.policy import model as models
from dpo.sweep.signature import instantiate
from dpo.training.checkpoint import latest
from dpo.training.loop import Stopped

REFERENCES = {
    "initial": {},
    "other": {"path": "other"},
    "other_tokenizer": {"path": "qwen2", "max_length": 96},
    "unconditional": {},
    "precomputed": {"path": "given.jsonl"},
    "reference_free": {},
    "ema": {"every": 2, "alpha": 0.4},  # it moves before the stop and after it, where its count matters
}


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_model) -> Any:
    """A config, with all that it names beside it."""
    folder = tmp_path_factory.mktemp("resume")
    shutil.copytree(tiny_model("llama"), folder / "policy")
    shutil.copytree(tiny_model("qwen2"), folder / "qwen2")
    other_model(folder, tiny_model)
    given = [*own(folder, str(folder / "policy")), "steps=4", "evaluate_every=2", "checkpoints_kept=3"]
    config = frozen(folder / "run", *given, "adam_betas=[0.8,0.9]", "schedule=cosine", "warmup_steps=3")
    pairs = [row(pair) for split in instantiate(config.data).preferences.values() for pair in split]
    scores = [one | {"chosen_logprob": -20.0 - n, "rejected_logprob": -19.0 + n} for n, one in enumerate(pairs)]
    write_rows(folder / "given.jsonl", scores)
    OmegaConf.set_struct(config, False)
    return config


def folder(base: Any) -> Path:
    return Path(base.policy.path).parent


def asked(base: Any, reference: str) -> Any:
    node = OmegaConf.load(ROOT / "conf" / "reference" / f"{reference}.yaml")
    node.update(REFERENCES[reference])
    if "path" in REFERENCES[reference]:
        node.path = str(folder(base) / node.path)
    return OmegaConf.merge(base, {"reference": None}, {"reference": node, "id": reference})


def play(directory: Path, config: Any, stop: int | None = None) -> tuple[Any, ...]:
    """Train a run, or a part of it; returns its rows, its policy and the reference that it held at last."""
    held: list[Any] = []

    def noted(node):
        made = instantiate(node)
        if node is not None and "dpo.references" in node["_target_"]:
            prepare = made.prepare
            made.prepare = lambda *given: held.append(prepare(*given)) or held[-1]
        return made

    def stopping(log, step, split, metrics):
        write(log, step, split, metrics)
        if (step, split) == (stop, "train"):
            os.kill(os.getpid(), signal.SIGUSR1)

    write = train.Log.write
    directory.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "instantiate", noted)
        patch.setattr(train.Log, "write", stopping)
        patch.setattr(evaluate, "measure", lambda *_: ([], {"kl": 0.0}))
        patch.setattr(evaluate, "show", lambda *_: [])
        if stop is not None:
            with pytest.raises(Stopped, match=f"training stopped at step {stop} of 4"):
                train.run(config, directory)
            return ()
        train.run(config, directory)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(directory / "policy" / "model.safetensors")
    return [one | {"items_per_second": 0} for one in rows], weights, held[-1]


@pytest.fixture(scope="module")
def stopped(base) -> Callable[[str], Path]:
    """`stopped(reference)`: a run that was stopped after three of its four steps."""

    def stopped(reference: str) -> Path:
        directory = folder(base) / f"stopped-{reference}"
        if not directory.exists():
            play(directory, OmegaConf.merge(asked(base, reference), {"checkpoint_every": 1}), stop=3)
        return directory

    return stopped


@pytest.mark.parametrize("reference", REFERENCES)
def test_stopped_and_resumed_is_the_whole_run(base, stopped, tmp_path, capfd, reference):
    config = asked(base, reference)
    rows, weights, last = play(tmp_path / "whole", config)
    assert [one["step"] for one in rows if one["split"] == "train"] == [1, 2, 3, 4]
    cut = shutil.copytree(stopped(reference), tmp_path / "cut")
    newest = latest(cut / "checkpoint")
    assert newest.name == "step-3"
    assert {path.name for path in newest.parent.iterdir()} == {"step-1", "step-2", "step-3"}
    told = json.loads((newest / "about.json").read_text())
    assert set(told["inputs"]) == {"settings", "policy", "reference", "pairs"}
    assert not told["evaluated"]
    capfd.readouterr()
    again = play(cut, config)
    assert "training: resumes at step 3 of 4" in capfd.readouterr().out
    assert again[0] == rows
    assert all(torch.equal(again[1][name], weight) for name, weight in weights.items())
    if reference == "ema":
        start, _ = models.load(base.policy.path)
        assert again[2].steps == last.steps == 4
        ends = zip(again[2].model.parameters(), last.model.parameters(), start.parameters(), strict=True)
        for mine, theirs, first in ends:
            assert torch.equal(mine, theirs)
            assert not torch.equal(mine, first)


def test_killed_before_its_end_a_run_has_its_last_row_once(base, tmp_path, monkeypatch):
    config = asked(base, "reference_free")
    rows, *_ = play(tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        patch.setattr(train, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            play(tmp_path / "cut", config)
    assert play(tmp_path / "cut", config)[0] == rows


def nudged(path: Path) -> None:
    """One weight of the model is a little off."""
    model, tokenizer = models.load(str(path))
    with torch.no_grad():
        next(model.parameters())[-1, -1] += 1e-3
    models.save(model, tokenizer, path)


def edited(path: Path, line: int, **values: Any) -> None:
    rows = [json.loads(one) for one in path.read_text().splitlines()]
    rows[line] |= values
    write_rows(path, rows)


def reworded(config: Any, split: str) -> None:
    pair = instantiate(config.data).preferences[split][-1]
    edited(Path(config.data.path), int(pair.source.rpartition(" ")[2]) - 1, rejected=" Is it?")


@pytest.mark.parametrize(
    "reference,change,another",
    [
        ("other", lambda config: nudged(folder(config) / "other"), "reference"),
        ("other_tokenizer", lambda config: nudged(folder(config) / "qwen2"), "reference"),
        ("precomputed", lambda config: edited(folder(config) / "given.jsonl", -1, rejected_logprob=-1.0), "reference"),
        ("reference_free", lambda config: nudged(folder(config) / "policy"), "policy"),
        ("initial", lambda config: nudged(folder(config) / "policy"), "policy and another reference"),
        ("reference_free", lambda config: reworded(config, "train"), "pairs"),
        ("reference_free", lambda config: reworded(config, "validation"), "pairs"),
        ("ema", lambda config: config.update(id="another"), "settings"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_of_something_else_it_does_not_resume(base, stopped, tmp_path, reference, change, another):
    cut, config = shutil.copytree(stopped(reference), tmp_path / "cut"), asked(base, reference)
    own = shutil.ignore_patterns("stopped-*", "cache")
    kept = shutil.copytree(folder(base), tmp_path / "kept", ignore=own)
    try:
        change(config)
        with pytest.raises(RuntimeError, match=f"checkpoint of this run: it was made with another {another};"):
            play(cut, config)
    finally:
        shutil.copytree(kept, folder(base), dirs_exist_ok=True)


def test_an_sft_run_resumes_under_its_own_settings_alone(tmp_path, monkeypatch):
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(sft, "fit", lambda *_, **given: told.append(given))
    monkeypatch.setattr(evaluate, "respond", lambda *_: [])
    monkeypatch.setattr(evaluate, "describe", lambda *_: ([], {}))
    config = frozen(tmp_path / "run", "data.demonstrations=8", "data.test=2", "data.train=2", "data.validation=2")
    (tmp_path / "run").mkdir()
    sft.run(config, tmp_path / "run")
    assert set(told[0]["inputs"]) == {"base", "demonstrations", "settings"}
    assert told[0]["inputs"]["settings"] == config.id
    assert told[0]["directory"] == tmp_path / "run" / "checkpoint"
