"""Candidates become pairs: of one prompt, the better before the worse; the judgements are written beside them."""

import json

import pytest
from test_train import frozen

from dpo import generate, judge
from dpo.data.records import read, write_rows
from dpo.generate import Candidate
from dpo.judges import shorter
from dpo.policy import model as models
from dpo.policy.sampling import Sample


def some(*prompts: str, words: tuple[int, ...] = (2, 4, 1)) -> list[Candidate]:
    """Responses of so many words to each prompt; all prompts are cut to the same."""
    return [
        Candidate(prompt, "cut", Sample([1, 2], [3, nth], " ".join([prompt] * number), ended=nth > 0), "words")
        for prompt in prompts
        for nth, number in enumerate(words)
    ]


def test_pairs_are_of_one_prompt():
    found = some("a", "b")
    pairs = judge._pairs(found, [one["score"] for one in shorter([], [one.response.text for one in found])], 9, seed=0)
    assert sorted((pair.chosen, pair.rejected) for pair in pairs) == [
        *(("a", "a a"), ("a", "a a a a"), ("a a", "a a a a")),
        *(("b", "b b"), ("b", "b b b b"), ("b b", "b b b b")),
    ]
    assert {pair.prompt for pair in pairs} == {"cut"}


def test_candidates_are_read_from_their_folder(tmp_path, monkeypatch):
    """And nothing is sampled; each split has its own."""
    folder, run = tmp_path / "candidates", tmp_path / "run"
    made = {"train": some("a", "b"), "validation": some("c", words=(3, 3, 5))}
    for directory in (folder, run):
        directory.mkdir()
    for split, candidates in made.items():
        write_rows(folder / f"{split}.jsonl", map(generate.row, candidates))
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("a model was loaded"))
    given = [f"candidates={folder}", "judge=shorter", "generation.pairs_per_prompt=2", "device=cpu"]
    judge.run(frozen(run, *given, verb="judge"), run)
    pairs = {split: read(run / f"{split}.jsonl") for split in made}
    assert [pair.chosen.split()[0] for pair in pairs["train"]] == ["a", "a", "b", "b"]
    assert [(pair.chosen, pair.rejected) for pair in pairs["validation"]] == [("c c c", "c c c c c")] * 2
    for split, candidates in made.items():
        rows = [json.loads(line) for line in (run / f"{split}.judged.jsonl").read_text().splitlines()]
        scores = [-float(len(one.response.text.split())) for one in candidates]
        assert rows == [generate.row(one) | {"score": score} for one, score in zip(candidates, scores, strict=True)]
    told = json.loads((run / "manifest.json").read_text())
    counts = {"train pairs": 4, "validation pairs": 2, "train candidates": 6, "validation candidates": 3}
    assert {key: told[key] for key in counts} == counts


def test_splits_draw_by_themselves(tmp_path, monkeypatch):
    """Of equal candidates each split draws other pairs, and another seed others again."""
    same, drawn = some(*"abcdefgh", words=(1, 2, 3, 4)), set()
    for seed in (0, 1):
        config = frozen(
            tmp_path / "run", "judge=shorter", "generation.pairs_per_prompt=1", f"seed={seed}", verb="judge"
        )
        for pairs in judge.preferences({"train": same, "validation": same}, shorter, config, tmp_path).values():
            drawn.add(tuple((pair.chosen, pair.rejected) for pair in pairs))
    assert len(drawn) == 4


def test_a_judge_is_needed(tmp_path):
    with pytest.raises(ValueError, match=r"dpo.judge must have a judge, got judge=none"):
        judge.run(frozen(tmp_path / "run", "judge=none", verb="judge"), tmp_path)
