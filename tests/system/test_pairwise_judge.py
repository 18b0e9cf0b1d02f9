"""Whole runs with a pairwise judge of one's own, which costs: `dpo.judge` makes pairs by it, `dpo.train` is measured by
it, and what one of them asked no other asks again.
"""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from whole_runs import SMALL, frozen

from dpo import judge, sft, train
from dpo.data.records import read
from dpo.judges import Verdict
from dpo.sweep.rehearse import Rehearsal
from dpo.sweep.signature import PLUGINS
from dpo.world import language

MARGIN = 2
MINE = ["judge._target_=test_pairwise_judge.Words", f"+judge.margin={MARGIN}"]
SPLITS = ("train", "validation")


class Words:
    """Prefers the response with more words; where they differ by no more than the margin, the one that comes first.

    What it is asked costs something: it keeps a log of it.
    """

    def __init__(self, margin: int, log: str) -> None:
        self.margin, self.log = margin, log

    def forward(self, prompts, firsts, seconds) -> list[Verdict]:
        return [verdict for _, verdict in self.each(prompts, firsts, seconds)]

    __call__ = forward

    def each(self, prompts, firsts, seconds):
        for place, (prompt, first, second) in enumerate(zip(prompts, firsts, seconds, strict=True)):
            with open(self.log, "a") as file:
                file.write(json.dumps([prompt, first, second]) + "\n")
            yield place, "win" if len(first.split()) - len(second.split()) >= -self.margin else "lose"


def decided(first: str, second: str) -> tuple[float, float]:
    """By hand: what a comparison comes to, and whether its orders disagree."""
    gap = len(first.split()) - len(second.split())
    if first == second:
        return 0.5, 0.0
    return (0.5, 1.0) if abs(gap) <= MARGIN else (float(gap > 0), 0.0)


def lines(file: Path) -> list:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Runs of `dpo.judge`, `dpo.train` and `dpo.sft`, and after each what was asked since the one before."""
    folder, patch = tmp_path_factory.mktemp("pairwise"), pytest.MonkeyPatch()
    patch.setenv(PLUGINS, "test_pairwise_judge")
    given = [*SMALL, *MINE, f"+judge.log={folder / 'asked'}", "seed=3"]
    for verb, command in (("judge", judge), ("train", train), ("sft", sft), ("again", judge)):
        (folder / "asked").write_text("")
        (folder / verb).mkdir()
        own = [one for one in given if verb != "sft" or not one.startswith(("steps=", "batch_size="))]
        config = frozen(folder / verb, *own, verb=verb.replace("again", "judge"))
        command.run(config, folder / verb)
        (folder / "asked").rename(folder / f"asked by {verb}")
    assert Rehearsal().of(OmegaConf.to_container(config))["problems"] == []
    patch.undo()
    return folder


def test_pairs_are_won_in_both_orders(made):
    asked = Counter()
    for split, prompts in zip(SPLITS, (12, 6), strict=True):
        rows, compared = (lines(made / "judge" / f"{split}.{name}.jsonl") for name in ("judged", "compared"))
        assert len(rows) == 4 * prompts
        assert "score" not in rows[0]
        expected, better = [], {}
        for start in range(0, len(rows), 4):
            assert len({row["prompt"] for row in rows[start : start + 4]}) == 1
            for first, second in combinations(range(start, start + 4), 2):
                texts = rows[first]["response"], rows[second]["response"]
                win, inconsistent = decided(*texts)
                expected.append({"first": first, "second": second, "win": win, "inconsistent": inconsistent})
                better[rows[first]["prompt"], *texts] = win
                better[rows[first]["prompt"], *texts[::-1]] = 1 - win
                if texts[0] != texts[1]:
                    asked |= Counter([(rows[first]["prompt"], *texts), (rows[first]["prompt"], *texts[::-1])])
        assert compared == expected
        assert {one["inconsistent"] for one in compared} == {0.0, 1.0}
        pairs = read(made / "judge" / f"{split}.jsonl")
        assert pairs
        assert all(better[pair.prompt, pair.chosen, pair.rejected] == 1.0 for pair in pairs)
    assert Counter(map(tuple, lines(made / "asked by judge"))) == asked


def test_training_is_on_them_and_is_measured_by_the_judge(made):
    (cached,) = (path for path in (made / "cache" / "pairs").iterdir() if path.is_dir())
    for split in SPLITS:
        for name in (f"{split}.jsonl", f"{split}.compared.jsonl"):
            assert (cached / name).read_bytes() == (made / "judge" / name).read_bytes()
    rows, result = lines(made / "train" / "responses.jsonl"), json.loads((made / "train/evaluation.json").read_text())
    assert [row["prompt"] for row in rows] == language.world("human", 1, 1, 1, 10, seed=9).prompts["test"]
    found = [decided(row["response"], row["baseline"]) for row in rows]
    assert [(row["win"], row["inconsistent"]) for row in rows] == found
    assert result["win_rate"] == pytest.approx(sum(win for win, _ in found) / 10)
    assert result["win_rate/low"] < result["win_rate"] < result["win_rate/high"]
    assert result["inconsistent"] == pytest.approx(sum(inconsistent for _, inconsistent in found) / 10)
    assert not {"score", "correct", "win"} & set(result)


def test_what_was_asked_before_is_not_asked_again(made):
    """Training asks about its own responses alone, and another run of the first command nothing."""
    rows = lines(made / "train" / "responses.jsonl")
    of_test = {(row["prompt"], *texts) for row in rows for texts in _orders(row["response"], row["baseline"])}
    assert sorted(map(tuple, lines(made / "asked by train"))) == sorted(of_test)
    assert lines(made / "asked by again") == []
    (file,) = (made / "cache" / "answers").glob("*.jsonl")
    every = [question for verb in ("judge", "train") for question in lines(made / f"asked by {verb}")]
    assert len(file.read_text().splitlines()) == 1 + len(every)


def _orders(*texts: str) -> list[tuple[str, ...]]:
    return [] if texts[0] == texts[1] else [texts, texts[::-1]]


def test_alone_there_is_nothing_to_compare(made):
    """What `dpo.sft` makes has no baseline."""
    assert lines(made / "asked by sft") == []
    result = json.loads((made / "sft" / "evaluation.json").read_text())
    assert result["n"] == 10
    assert not {"win_rate", "score", "inconsistent"} & set(result)
