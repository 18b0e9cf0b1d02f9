"""Base models of other sizes than the one that comes with the code: made once, kept in the cache, refused by name."""

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from ranks import FORKS, together
from whole_runs import frozen

from dpo.cache import damages
from dpo.policy import model as models
from dpo.settings import policy_spec
from dpo.sweep import inputs
from dpo.sweep.rehearse import Rehearsal
from dpo.world import language, pretrain, sizes

LITTLE = sizes.Size(layers=3, batch=4, lr=1e-3, steps=5)


@pytest.fixture
def little(monkeypatch):
    """policy=small is a model that is made in a moment."""
    monkeypatch.setitem(sizes.SIZES, "small", LITTLE)
    monkeypatch.setattr(pretrain, "measure", lambda *_: {"right answers of 5": 0.0})


@pytest.mark.parametrize(
    "size,layers,parameters", [("tiny", 2, 341_248), ("small", 7, 1_161_728), ("base", 14, 2_310_400)]
)
def test_shapes(tmp_path, size, layers, parameters):
    model = pretrain.train(size, 0, 0, language.tokenizer(), tmp_path)
    shipped = models.load("world")[0].config
    assert model.config.num_hidden_layers == layers
    for key in ("hidden_size", "intermediate_size", "head_dim", "max_position_embeddings", "rope_parameters"):
        assert getattr(model.config, key) == getattr(shipped, key)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("size", ["small", "base"])
def test_a_larger_one_begins_as_tiny(tmp_path, size):
    """Net2Net: the same function, in more layers, each of which has a gradient."""
    tiny, _ = models.load("world")
    model = pretrain.train(size, 0, 0, language.tokenizer(), tmp_path)
    rng = random.Random(0)
    text = [f"{one.prompt} {one.response}" for one in (language.lesson(rng, 6) for _ in range(8))]
    ids = language.tokenizer()(text, padding=True, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = tiny(ids).logits
    found = model(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    found.logsumexp(-1).sum().backward()
    for layer in model.model.layers:
        assert layer.self_attn.o_proj.weight.grad.norm() > 0
        assert layer.mlp.down_proj.weight.grad.norm() > 0
    again, other = (pretrain.train(size, seed, 0, language.tokenizer(), tmp_path / str(seed)) for seed in (0, 1))
    assert models.fingerprint(model) == models.fingerprint(again) != models.fingerprint(other)


def test_tiny_is_made_as_ever(tmp_path, monkeypatch):
    """Its recipe is the one that the shipped model was made with; the curriculum decides each of its batches."""
    assert sizes.SIZES["tiny"] == sizes.Size(layers=2, batch=48, lr=2e-3, steps=3000)
    config = OmegaConf.load(models.WORLD_BASE / "config.json")
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (128, 2, 256)
    lessons = asked_for(monkeypatch, tmp_path, "tiny")
    for step, facts in ((0, 1), (249, 1), (250, 2), (299, 2), (300, 4), (349, 4), (350, 6), (2999, 6)):
        assert read(lessons.at(step)) == drawn(f"lesson 0 {step}", facts, 48)


@pytest.mark.parametrize("size", ["small", "base"])
def test_larger_ones_go_on_with_articles_that_tiny_never_saw(tmp_path, monkeypatch, size):
    lessons = asked_for(monkeypatch, tmp_path, size)
    batch = sizes.SIZES[size].batch
    assert len(lessons) == sizes.SIZES[size].steps
    for step in (0, len(lessons) - 1):
        assert read(lessons.at(step)) == drawn(f"lesson 0 {3000 + step}", 6, batch, distractors=4)


def asked_for(monkeypatch, directory: Path, size: str) -> pretrain.Lessons:
    """What a size is trained on."""
    found = []
    monkeypatch.setattr(pretrain, "fit", lambda model, lessons, *_, **__: found.append(lessons))
    pretrain.train(size, 0, sizes.SIZES[size].steps, language.tokenizer(), directory)
    return found[0]


def read(batches) -> list[str]:
    [batch], articles = batches
    assert articles == len(batch.index)
    return [language.tokenizer().decode(ids[ids != 0], skip_special_tokens=True) for ids in batch.input_ids]


def drawn(seed: str, facts: int, batch: int, distractors: int = 2) -> list[str]:
    rng = random.Random(seed)
    return [f"{one.prompt} {one.response}" for one in (language.lesson(rng, facts, distractors) for _ in range(batch))]


def test_keys():
    """Literal: a model that was made stays where it is, until its recipe changes."""
    found = {name: sizes.place(name, "cache") for name in sizes.MADE}
    assert found == KEYS
    assert sizes.place("world", "cache") == "world"
    assert sizes.present("world", "cache") == "world"
    assert sizes.present(None, "cache") is None
    assert sizes.MINUTES.keys() == sizes.MADE.keys()


KEYS = {
    "world_small": "cache/base/4d7ee99a554fdd553b67/model",
    "world_base": "cache/base/882a3aeef8df8c8d7c71/model",
}


@pytest.mark.parametrize("field", ["layers", "batch", "lr", "steps"])
def test_all_of_a_size_is_in_its_key(monkeypatch, little, field):
    before = sizes.place("world_small", "cache")
    monkeypatch.setitem(sizes.SIZES, "small", replace(LITTLE, **{field: 64}))
    assert sizes.place("world_small", "cache") != before


def test_what_it_is_grown_from_is_in_its_key(monkeypatch, tmp_path):
    before = sizes.place("world_small", "cache")
    monkeypatch.setattr(sizes, "WORLD_BASE", tmp_path)
    (tmp_path / "model.safetensors").write_bytes((models.WORLD_BASE / "model.safetensors").read_bytes())
    assert sizes.place("world_small", "cache") == before
    with open(tmp_path / "model.safetensors", "ab") as file:
        file.write(b"\0")
    assert sizes.place("world_small", "cache") != before


def test_it_is_made_once_and_found_again(tmp_path, monkeypatch, little):
    config = frozen(tmp_path / "run", "policy=small")
    assert sizes.present("world_small", config.cache) is None
    pretrain.pretrained("world_small", config.cache, "cpu")
    folder = Path(policy_spec(config).path)
    assert str(folder) == sizes.present("world_small", config.cache)
    assert damages(folder.parent) == []
    assert {path.name for path in folder.parent.iterdir()} == {
        *("model", "quality.json", "metrics.jsonl", "key.json", "files.json")
    }
    model, tokenizer = models.load(policy_spec(config))
    assert model.config.num_hidden_layers == 3
    assert models.fingerprint(model) != models.fingerprint(models.load("world")[0])
    assert tokenizer.get_vocab() == language.tokenizer().get_vocab()
    monkeypatch.setattr(pretrain, "train", None)
    pretrain.pretrained("world_small", config.cache, "cpu")


def test_what_a_run_is_made_from_is_known_once_it_is_there(tmp_path, little):
    config = OmegaConf.to_container(frozen(tmp_path / "run", "policy=small"))
    before = Rehearsal().of(config)
    assert before["problems"] == []
    assert "policy" not in before["inputs"]
    pretrain.pretrained("world_small", config["cache"], "cpu")
    after = Rehearsal().of(config)
    assert after["problems"] == []
    assert after["inputs"]["policy"] == inputs.sketch(Path(sizes.place("world_small", config["cache"])))
    Path(sizes.place("world_small", config["cache"]), "model.safetensors").unlink()
    [problem] = Rehearsal().of(config)["problems"]
    assert "must hold its weights in model.safetensors" in problem


@pytest.mark.parametrize("key,value", [("policy.base", "world_huge"), ("policy.path", "world_small")])
def test_another_size_is_refused_before_any_run(tmp_path, key, value):
    config = OmegaConf.to_container(frozen(tmp_path / "run", "policy=small", f"{key}={value}"))
    [problem] = Rehearsal().of(config)["problems"]
    assert problem == (
        f"{value} must be world, or as policy.base world_small or world_base, or a folder of that name, found none; "
        "take one"
    )


def test_another_size_is_refused_by_the_command(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pretrain", "--size", "huge", "--output", "nowhere"])
    with pytest.raises(SystemExit):
        pretrain.main()
    assert "argument --size: invalid choice: 'huge'" in capsys.readouterr().err


def test_what_is_grown_has_the_tokenizer_of_tiny(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pretrain", "--size", "small", "--phrases", "--output", "nowhere"])
    with pytest.raises(SystemExit):
        pretrain.main()
    assert "--phrases must come with --size tiny, got small" in capsys.readouterr().err


def test_no_steps_are_not_the_default_number(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pretrain", "--steps", "0", "--output", "nowhere"])
    with pytest.raises(SystemExit):
        pretrain.main()
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err


def _patched(directory: Path, lost_at: int | None = None) -> None:
    """In a process of its own: counts lessons in a file, and is killed at one of them once a checkpoint is written."""
    torch.set_num_threads(1)
    sizes.SIZES["small"] = LITTLE
    pretrain.measure = lambda *_: {}
    pretrain.CHECKPOINT_EVERY = 2
    at = pretrain.Lessons.at

    def counted(lessons: pretrain.Lessons, step: int):
        with open(directory / "lessons.txt", "a") as file:
            file.write(f"{step}\n")
        if step == lost_at:
            until = time.monotonic() + 60
            while not [*directory.glob("cache/base/*/checkpoint/step-2")] and time.monotonic() < until:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return at(lessons, step)

    pretrain.Lessons.at = counted
    if os.environ.get("RANK") == "0":
        time.sleep(1)  # the other rank is there first
    pretrain.pretrained("world_small", str(directory / "cache"), "cpu")
    assert Path(sizes.place("world_small", str(directory / "cache")), "config.json").exists()


def _lessons(directory: Path) -> list[int]:
    return [int(line) for line in (directory / "lessons.txt").read_text().split()]


def _apart(directory: Path, *, processes: int, lost_at: int | None = None) -> list[int | None]:
    """Exit codes of processes that know nothing of each other."""
    several = [FORKS.Process(target=_patched, args=(directory, lost_at)) for _ in range(processes)]
    for one in several:
        one.start()
    for one in several:
        one.join()
    return [one.exitcode for one in several]


@pytest.mark.long
def test_processes_make_it_once(tmp_path):
    assert _apart(tmp_path, processes=2) == [0, 0]
    assert _lessons(tmp_path) == [0, 1, 2, 3, 4]


def test_ranks_make_it_once(tmp_path):
    together(_patched, tmp_path, processes=2)
    assert _lessons(tmp_path) == [0, 1, 2, 3, 4]


def test_it_goes_on_where_it_was_killed(tmp_path, little):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (killed, whole):
        folder.mkdir()
    assert _apart(killed, processes=1, lost_at=3) == [-signal.SIGKILL]
    assert _apart(killed, processes=1) == _apart(whole, processes=1) == [0]
    assert _lessons(killed) == [0, 1, 2, 3, 2, 3, 4]
    weights = [Path(sizes.place("world_small", str(at / "cache")), "model.safetensors") for at in (killed, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
