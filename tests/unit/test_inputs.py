"""A run tells its data and models by their content, and notices when they are others than it was planned with."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from whole_runs import frozen, own_pairs

from dpo import data
from dpo.data.records import Dataset, Demonstration, Preference, TokenIds, contents, texts
from dpo.policy.model import WORLD_BASE
from dpo.score import encode
from dpo.sweep import inputs
from dpo.sweep.signature import instantiate
from dpo.world.language import world

ROWS = [{"prompt": str(n), "chosen": "yes", "rejected": "no"} for n in range(40)]


def write(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_whatever_a_run_learns_from_is_told_apart():
    pair, shown = Preference("a", "b", "c"), Demonstration("a", "b")
    base = Dataset([shown], {"train": [pair]}, {"test": ["a"]})
    others = [
        replace(base, demonstrations=[]),
        replace(base, demonstrations=[replace(shown, ended=False)]),
        replace(base, preferences={"train": [Preference("a", "c", "b")]}),
        replace(base, preferences={"train": [replace(pair, chosen_ended=False)]}),
        replace(base, preferences={"train": [pair, pair]}),
        replace(base, preferences={"validation": [pair]}),
        replace(base, prompts={"test": [[{"role": "user", "content": "a"}]]}),
    ]
    assert len({contents(one) for one in [base, *others]}) == 8
    moved = replace(base, preferences={"train": [replace(pair, source="elsewhere, line 3")]})
    assert contents(moved) == contents(base)
    small = [world("human", 3, 3, 3, 3, seed) for seed in (0, 0, 1)]
    assert contents(small[0]) == contents(small[1]) != contents(small[2])


def test_pairs_that_a_policy_sampled_are_told_by_their_tokens():
    pairs = [Preference("a", "b", "c", token_ids=TokenIds("words", [1], [2, last], [3, 0])) for last in (0, 4)]
    assert len({contents(Dataset([], {"train": [pair]}, {})) for pair in pairs}) == 2


def test_scores_of_a_reference_are_told_however_deep_they_lie(tmp_path):
    """As `reference=precomputed` reads them: a sweep's folder of `dpo.score`, or a file."""
    folder = tmp_path / "scores" / "beta=1"
    folder.mkdir(parents=True)
    settings = {"policy": {"path": None, "base": "world"}, "reference": {"path": str(tmp_path / "scores")}}
    found = set()
    for logp in (-1.0, -2.0):
        write(folder / "train.jsonl", [ROWS[0] | {"chosen_logprob": logp, "rejected_logprob": -3.0}])
        found.add(inputs.models(settings)["reference"])
    assert len(found) == 2


def test_a_field_that_is_new_changes_no_digest():
    @dataclass(frozen=True)
    class Later(Preference):
        chosen_ids: tuple[int, ...] | None = None

    now, later = ({"train": [kind("a", "b", "c", True, False)]} for kind in (Preference, Later))
    assert contents(Dataset([], later, {})) == contents(Dataset([], now, {}))


def test_a_run_refuses_inputs_that_it_was_not_planned_with(tmp_path):
    pairs, model = tmp_path / "pairs.jsonl", tmp_path / "model"
    write(pairs, ROWS)
    model.mkdir()
    shutil.copy(WORLD_BASE / "config.json", model)
    weights = model / "model.safetensors"
    save_file({"some.weight": torch.zeros(2**21)}, weights)
    node = {"_target_": "dpo.data.records.file", "path": str(pairs), "validation_path": None}
    node |= {"validation_fraction": 0.2, "on_faulty": "error"}
    settings = {"data": node, "policy": {"path": str(model), "base": None}, "reference": {"path": str(pairs)}}
    record = {"data": contents(inputs.load(OmegaConf.create(settings))), **inputs.models(settings)}
    assert set(record) == {"data", "policy", "reference"}
    frozen = OmegaConf.create(settings | {"provenance": {"inputs": record}})
    OmegaConf.set_struct(frozen, True)
    assert contents(inputs.load(frozen)) == record["data"]

    write(pairs, [ROWS[0] | {"chosen": "no", "rejected": "yes"}, *ROWS[1:]])
    with pytest.raises(RuntimeError, match="found another data and another reference; put back"):
        inputs.load(frozen)
    write(pairs, ROWS)
    save_file({"some.weight": torch.cat([torch.zeros(2**20), torch.ones(2**20)])}, weights)  # of the same size
    with pytest.raises(RuntimeError, match="found another policy; put back"):
        inputs.load(frozen)
    old = OmegaConf.create(settings)  # frozen before inputs were recorded
    OmegaConf.set_struct(old, True)
    assert contents(inputs.load(old)) == record["data"]


def test_every_file_that_is_read_counts_to_its_last_byte(tmp_path):
    """Of a model's folder, in a format that anything reads; and nothing else there."""
    shutil.copy(WORLD_BASE / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(2**23))  # larger than what is read of it
    found = set()

    def told_apart() -> bool:
        digest = inputs.sketch(tmp_path)
        new = digest not in found
        found.add(digest)
        return new

    assert told_apart()
    for place in (0, 2**23 - 1):
        content = bytearray(2**23)
        content[place] = 1
        (tmp_path / "model.safetensors").write_bytes(content)
        assert told_apart(), place
    (tmp_path / "model.safetensors").write_bytes(bytes(2**23 + 1))
    assert told_apart()
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer.model", "merges.txt", "modeling_own.py"):
        (tmp_path / name).write_text("1")
        assert told_apart(), name
        (tmp_path / name).write_text("2")
        assert told_apart(), name
    (tmp_path / "merges.txt").rename(tmp_path / "merged.txt")
    assert told_apart()
    for name in ("README.md", "scores.jsonl", "training.log"):  # of no concern to a model
        (tmp_path / name).write_text("1")
        assert not told_apart(), name


def test_policy_and_reference_are_told_at_the_paths_that_count(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for number, folder in enumerate((one, other)):
        folder.mkdir()
        shutil.copy(WORLD_BASE / "config.json", folder)
        save_file({"some.weight": torch.full((2,), float(number))}, folder / "model.safetensors")
    write(other / "pairs.jsonl", ROWS)  # a model's folder all the same

    def told(**policy):
        return inputs.models({"policy": {"path": None, "base": None, **policy}, "reference": {"path": str(other)}})

    alone = told(base=str(one))
    assert alone == {"policy": inputs.sketch(one), "reference": inputs.sketch(other)}
    assert told(path=str(one), base=str(other)) == alone
    assert alone["policy"] != alone["reference"]
    assert set(told(path="someone/on-the-hub")) == {"reference"}
    write(tmp_path / "given.jsonl.gz", ROWS)
    assert inputs.models({"policy": {"path": str(one), "base": None}, "reference": {"path": str(tmp_path)}}) == (
        {"policy": alone["policy"], "reference": inputs.sketch(tmp_path)}
    )
    others = {"reference": None, "against": str(other), "candidates": str(tmp_path)}
    assert inputs.models({"policy": {"path": str(one), "base": None}, **others}) == {
        "policy": alone["policy"],
        "against": inputs.sketch(other),
        "candidates": inputs.sketch(tmp_path),
    }
    before = inputs.sketch(tmp_path)
    write(tmp_path / "given.jsonl.gz", ROWS[1:])
    assert inputs.sketch(tmp_path) != before


def reading(path, **given):
    node = {"_target_": "dpo.data.records.file", "path": str(path), "validation_path": None}
    return node | {"validation_fraction": 0.2, "on_faulty": "drop"} | given


def test_what_a_run_has_read_is_known_of_the_same_content_read_by_the_same_code(tmp_path, monkeypatch):
    file, other, cache = tmp_path / "pairs.jsonl", tmp_path / "other.jsonl", str(tmp_path / "cache")
    write(file, [*ROWS, {"prompt": "?", "chosen": "", "rejected": "no"}])
    write(other, ROWS)
    assert inputs.known(reading(file), cache) is None
    dataset, facts = inputs.read(reading(file), cache)
    assert facts == inputs.known(reading(file), cache) == inputs.read(reading(file), cache)[1]
    assert facts["data"] == contents(dataset) == contents(instantiate(reading(file)))
    assert facts["texts"] == {split: texts(pairs) for split, pairs in dataset.preferences.items()}
    assert (facts["pairs"], facts["single"], facts["demonstrations"], facts["revisions"]) == (True, False, True, {})
    prompts = {split: [pair.prompt for pair in pairs] for split, pairs in dataset.preferences.items()}
    assert facts["alike"] == {split: [max(map(some.count, some)), len(some)] for split, some in prompts.items()}
    assert [message for _, message in facts["said"]] == [
        f"{file}: 1 of 41 pairs are faulty, 1 dropped (1 x chosen is empty)"
    ]
    apart = [{"on_faulty": "keep"}, {"validation_fraction": 0.3}, {"validation_path": str(other)}, {"path": str(other)}]
    assert [inputs.known(reading(file) | one, cache) for one in apart] == [None] * 4
    inputs.read(reading(file, validation_path=str(other)), cache)
    write(other, ROWS[1:])
    assert inputs.known(reading(file, validation_path=str(other)), cache) is None
    with monkeypatch.context() as patched:
        patched.setattr(inputs, "version", lambda name: "another")
        assert inputs.known(reading(file), cache) is None
    with monkeypatch.context() as patched:
        patched.setattr(inputs, "__file__", str(other))
        assert inputs.known(reading(file), cache) is None
    own = tmp_path / "code"
    shutil.copytree(Path(data.__file__).parent, own)
    monkeypatch.setattr(data, "__file__", str(own / "__init__.py"))
    assert inputs.known(reading(file), cache) == facts
    (own / "records.py").write_text("# otherwise\n")
    assert inputs.known(reading(file), cache) is None
    assert inputs.known(reading(tmp_path), cache) is None  # a folder
    assert inputs.known(reading(file, sources=[str(other)]), cache) is None
    assert inputs.known(reading(file, _target_="mine.file"), cache) is None


def test_a_file_that_changes_while_it_is_read_is_not_known(tmp_path, monkeypatch):
    file, cache = tmp_path / "pairs.jsonl", str(tmp_path / "cache")
    write(file, ROWS)

    def changed(node):
        dataset = instantiate(node)
        write(file, ROWS[1:])
        return dataset

    monkeypatch.setattr(inputs, "instantiate", changed)
    dataset, facts = inputs.read(reading(file), cache)
    assert facts["data"] == contents(dataset)
    assert inputs.known(reading(file), cache) is None


def test_what_is_known_is_refused_where_it_is_damaged(tmp_path):
    write(tmp_path / "pairs.jsonl", ROWS)
    inputs.read(reading(tmp_path / "pairs.jsonl"), str(tmp_path))
    [kept] = tmp_path.glob("data/*/known.json")
    kept.write_text(kept.read_text().replace("true", "false"))
    for ask in (inputs.known, inputs.read):
        with pytest.raises(RuntimeError, match=r"known\.json changed; delete that folder"):
            ask(reading(tmp_path / "pairs.jsonl"), str(tmp_path))


def test_pairs_that_are_turned_are_not_known_by_their_texts_before(tmp_path, tiny_model):
    data = ["data=file", f"data.path={own_pairs(tmp_path / 'pairs.jsonl')}", f"cache={tmp_path / 'cache'}"]
    given = [*data, "policy=tiny", f"policy.path={tiny_model('llama')}", "judge=none"]
    found = []
    for number, more in enumerate(([], ["pairs.flip=1"], [])):
        config = frozen(tmp_path / str(number), *given, *more)
        found.append([(pair.chosen_ids, pair.rejected_ids) for pair in encode(config, inputs.load(config))[1]["train"]])
    assert found[0] == found[2] == [(chosen, rejected) for rejected, chosen in found[1]]
