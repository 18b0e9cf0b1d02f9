"""Candidates become pairs: of one prompt, the better before the worse; the judgements are written beside them."""

import json

import pytest
from whole_runs import frozen

from dpo import generate, judge
from dpo.data.records import Dataset, Measures, Preference, read, write_rows
from dpo.data.treatment import Treatment, treat
from dpo.generate import Candidate
from dpo.judges import shorter
from dpo.policy import model as models
from dpo.policy.sampling import Sample
from dpo.settings import pairing_of


def some(*prompts: str, words: tuple[int, ...] = (2, 4, 1)) -> list[Candidate]:
    """Responses of so many words to each prompt; all prompts are cut to the same."""
    return [
        Candidate(prompt, "cut", Sample([1, 2], [3, nth], " ".join([prompt] * number), ended=nth > 0), "words")
        for prompt in prompts
        for nth, number in enumerate(words)
    ]


def test_pairs_are_of_one_prompt():
    found = some("a", "b")
    comparisons, words = judge._comparisons(found), [len(one.response.text.split()) for one in found]
    wins = {(one, other): float(words[one] < words[other]) for same in comparisons for one, other in same}
    pairs = judge._pairs(found, comparisons, wins, [{}] * len(found), 9, seed=0)
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


def test_prompts_without_a_pair_are_counted_by_reason(tmp_path, capsys):
    def judged(prompts, responses):
        """Cannot judge a b; likes all others that begin with an x alike."""
        return [{} if "b" in text else {"score": -float(len(text.split()) * ("x" not in text))} for text in responses]

    texts = {"one": ["a", "a a"], "same": ["c", "c"], "lost": ["b", "b b"], "tied": ["x", "x x"], "again": ["c", "c"]}
    found = [Candidate(p, p, Sample([1], [2], text, True), "t") for p, both in texts.items() for text in both]
    settings = pairing_of(frozen(tmp_path / "run", "judge=shorter", verb="judge"))
    judge.preferences({"train": found}, judged, settings, tmp_path)
    why = "2 whose responses are equal, 1 that could not be judged, 1 with ties alone"
    assert f"4 of 5 train prompts are in no pair: {why}" in "".join(capsys.readouterr())
    with pytest.raises(RuntimeError, match=r"differ to the judge \(1 of 1 train prompts .*: 1 with ties alone\);"):
        judge.preferences({"train": found[6:8]}, judged, settings, tmp_path)


def test_splits_draw_by_themselves(tmp_path, monkeypatch):
    """Of equal candidates each split draws other pairs, and another seed others again."""
    same, drawn = some(*"abcdefgh", words=(1, 2, 3, 4)), set()
    for seed in (0, 1):
        config = frozen(
            tmp_path / "run", "judge=shorter", "generation.pairs_per_prompt=1", f"seed={seed}", verb="judge"
        )
        both = {"train": same, "validation": same}
        for pairs in judge.preferences(both, shorter, pairing_of(config), tmp_path).values():
            drawn.add(tuple((pair.chosen, pair.rejected) for pair in pairs))
    assert len(drawn) == 4


def of_scores(found: list[Candidate], said: list[dict[str, float]]) -> list[Preference]:
    """All pairs, by the scores."""
    comparisons, order = judge._comparisons(found), {-1: 0.0, 0: 0.5, 1: 1.0}
    gaps = {(one, other): said[one]["score"] - said[other]["score"] for same in comparisons for one, other in same}
    wins = {pair: order[(gap > 0) - (gap < 0)] for pair, gap in gaps.items()}
    return judge._pairs(found, comparisons, wins, said, 99, seed=0)


def counts(score: float, correct: float) -> dict[str, float]:
    return {"score": score, "correct": correct, "enough": float(correct >= 3)}


def test_what_decided_a_pair_stands_beside_it():
    """By the judge's words on the two responses: right answers below three, above it on one side, on both."""
    said = {"0 a": counts(0, 0), "1 b c": counts(1, 1), "2 d": counts(3.5, 3), "3 e f g": counts(3.25, 4)}
    found = [Candidate("p", "p", Sample([1], [nth], text, True), "t") for nth, text in enumerate(said)]
    pairs = {pair.chosen[0] + pair.rejected[0]: pair.measures for pair in of_scores(found, [*said.values()])}
    assert pairs == {
        "10": Measures(1, "answers", (1, 0), (3, 2)),
        "20": Measures(3.5, "threshold", (3, 0), (2, 2)),
        "30": Measures(3.25, "threshold", (4, 0), (4, 2)),
        "21": Measures(2.5, "threshold", (3, 1), (2, 3)),
        "31": Measures(2.25, "threshold", (4, 1), (4, 3)),
        "23": Measures(0.25, "length", (3, 4), (2, 4)),
    }
    [silent] = of_scores(found[:2], shorter([], ["0 a", "1 b c"]))  # a judge that counts no answers
    assert silent.measures == Measures(1, words=(2, 3))


def test_humans_are_paired_with_samples_alone():
    """The judge says who is better; the text of both is tokenized, and the sampled pairs are those without humans."""
    found, prompts = some("a", "b"), ["b", "a"]
    data = Dataset([], {}, {"train": prompts}, written={"train": ["b b b", "a a a"]})
    both = generate.beside_humans({"train": found}, data)["train"]
    assert [one for one in both if not one.human] == found
    assert [(one.prompt, one.response.text, one.response.ended) for one in both if one.human] == [
        *(("a", "a a a", True), ("b", "b b b", True)),
    ]
    assert [generate._candidate(generate.row(one)) for one in both] == both
    pairs = of_scores(both, shorter([], [one.response.text for one in both]))
    assert sorted((pair.chosen, pair.rejected) for pair in pairs) == sorted(
        [("a", "a a a"), ("a a", "a a a"), ("a a a", "a a a a"), ("b", "b b b"), ("b b", "b b b"), ("b b b", "b b b b")]
    )
    assert {pair.token_ids for pair in pairs} == {None}
    with pytest.raises(ValueError, match="found nothing for 1 of 2; data=world has it for all"):
        generate.beside_humans({"train": some("a", "c")}, data)


def test_files_hold_what_would_be_trained_on(tmp_path):
    """What is done to training pairs is done to their file; the held-out ones, and all candidates, stay."""
    made = {"train": some(*"abcdefghijkl"), "validation": some("m", "n")}
    for split, candidates in made.items():
        write_rows(tmp_path / f"{split}.jsonl", map(generate.row, candidates))
    files = {}
    for name, more in {
        "plain": [],
        "noisy": ["pairs.flip=0.5", "pairs.outliers=0.3", "pairs.outlier=shuffled"],
    }.items():
        run = tmp_path / name
        run.mkdir()
        given = [f"candidates={tmp_path}", "judge=shorter", "device=cpu", *more]
        judge.run(frozen(run, *given, verb="judge"), run)
        files[name] = {path.name: path.read_bytes() for path in run.glob("*.jsonl")}
    changed = {name for name, content in files["plain"].items() if content != files["noisy"][name]}
    assert changed == {"train.jsonl"}
    found = read(tmp_path / "noisy" / "train.jsonl")
    expected = treat(
        read(tmp_path / "plain" / "train.jsonl"), Treatment(flip=0.5, outliers=0.3, outlier="shuffled"), seed=0
    )
    assert found == expected
    assert [pair.measures for pair in found] == [pair.measures for pair in expected]
    assert {pair.measures.kind for pair in found} == {None, "outlier"}
    assert {pair.measures.flipped for pair in found} == {True, False}


def test_a_judge_is_needed_before_anything_starts(tmp_path):
    frozen(tmp_path / "run", "judge=none", verb="generate")
    with pytest.raises(ValueError, match=r"^judge must be one that compares responses, got none; choose one: judge="):
        frozen(tmp_path / "run", "judge=none", verb="judge")
