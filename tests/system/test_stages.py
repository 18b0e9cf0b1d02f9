"""The stages as commands, joined by files: what they write is what `dpo.train` makes by itself."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from whole_runs import SMALL, frozen

from dpo import evaluate, generate, judge, train
from dpo import score as scoring
from dpo.data.records import read
from dpo.data.treatment import Treatment, treat
from dpo.sweep import execute as executing
from dpo.sweep import inputs
from dpo.sweep.directory import status
from dpo.sweep.rehearse import Rehearsal
from dpo.world import language

VERBS = {"evaluate": evaluate, "generate": generate, "judge": judge, "score": scoring, "train": train}


NOISE = ("pairs.flip=0.5", "pairs.outliers=0.3", "pairs.label_temperature=1")


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def numbers(file: Path) -> dict[str, float]:
    return {key: value for key, value in json.loads(file.read_text()).items() if key != "seconds"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run of each stage, and one of training, which makes all of them by itself."""
    folder = tmp_path_factory.mktemp("stages")

    def run(verb: str, name: str, *overrides: str) -> None:
        (folder / name).mkdir()
        VERBS[verb].run(frozen(folder / name, *SMALL, "seed=3", "beta=0.2", *overrides, verb=verb), folder / name)

    run("generate", "candidates")
    run("judge", "judged", f"candidates={folder / 'candidates'}")
    run("judge", "at once")
    run("judge", "judged and noisy", f"candidates={folder / 'candidates'}", *NOISE)
    run("train", "trained")
    (start,) = (folder / "cache" / "sft").glob("*/policy")
    run("evaluate", "evaluated", f"policy.path={folder / 'trained' / 'policy'}", f"against={start}")
    trained = folder / "trained" / "policy"
    run(
        "evaluate",
        "afterwards",
        f"policy.path={trained}",
        "against=initial",
        "judge=hasty",
        "judge@evaluation.judge=gold",
    )
    run("score", "scored", *NOISE)
    run("train", "noisy", *NOISE, "evaluation.baseline=human", "judge@evaluation.judge=shorter")
    run("evaluate", "alone", f"policy.path={start}", "judge=none", "evaluation.prompts=3")
    return folder


def test_candidates_are_what_was_sampled(made):
    for split, prompts in (("train", 12), ("validation", 6)):
        rows = lines(made / "candidates" / f"{split}.jsonl")
        assert len(rows) == 4 * prompts
        assert len({row["prompt"] for row in rows}) == prompts
        assert all(row["prompt"] == rows[4 * (n // 4)]["prompt"] for n, row in enumerate(rows))
    words = language.tokenizer()
    for row in rows:
        ids = row["token_ids"]
        assert words.decode(ids["prompt"], skip_special_tokens=True) == row["prompt"]
        whole = words.decode(ids["prompt"] + ids["response"], skip_special_tokens=True)
        assert whole == row["prompt"] + row["response"]
        assert (ids["response"][-1] == words.eos_token_id) is row["ended"]
    every = [*lines(made / "candidates" / "train.jsonl"), *lines(made / "candidates" / "validation.jsonl")]
    tokens = sum(len(row["token_ids"]["response"]) for row in every)
    assert numbers(made / "candidates" / "manifest.json") == {
        "train candidates": 48,
        "validation candidates": 24,
        "tokens": tokens,
    }


def test_pairs_prefer_what_the_judge_prefers(made):
    """From files, at once, and within training: the same pairs."""
    (cached,) = (path for path in (made / "cache" / "pairs").iterdir() if path.is_dir())
    for split in ("train", "validation"):
        whole = (made / "judged" / f"{split}.jsonl").read_bytes()
        assert whole == (made / "at once" / f"{split}.jsonl").read_bytes() == (cached / f"{split}.jsonl").read_bytes()
        rows = lines(made / "judged" / f"{split}.judged.jsonl")
        candidates = lines(made / "candidates" / f"{split}.jsonl")
        assert [{key: row[key] for key in candidates[0]} for row in rows] == candidates
        utility = {(row["prompt"], row["response"]): row["score"] for row in rows}
        for (prompt, response), score in utility.items():
            assert score == language.utility(language.verdict(prompt, response))
        pairs = read(made / "judged" / f"{split}.jsonl")
        assert pairs
        for pair in pairs:
            assert utility[pair.prompt, pair.chosen] > utility[pair.prompt, pair.rejected]
        told = numbers(made / "judged" / "manifest.json")
        assert (told[f"{split} pairs"], told[f"{split} candidates"]) == (len(pairs), len(candidates))


def test_an_evaluation_is_that_of_the_run(made):
    mine, theirs = (numbers(made / name / "evaluation.json") for name in ("evaluated", "trained"))
    assert {"win_rate", "kl", "kl/se", "kl_plain", "length", "valid", "n"} <= set(mine)
    assert mine == {key: theirs[key] for key in mine}
    responses = "responses.jsonl"
    assert (made / "evaluated" / responses).read_bytes() == (made / "trained" / responses).read_bytes()


def test_a_finished_run_is_measured_again_against_what_it_started_from(made):
    """By gold, though it names another judge; and nobody has to know where the initial policy is."""
    mine, first = (numbers(made / name / "evaluation.json") for name in ("afterwards", "evaluated"))
    assert mine == first


def test_what_is_done_to_pairs_is_done_before_training(made):
    """To the training pairs alone, with the seed of the run; what is scored has the measures beside it."""
    done = Treatment(flip=0.5, outliers=0.3, label_temperature=1)
    train_pairs = treat(read(made / "judged" / "train.jsonl"), done, seed=3)
    found = {split: read(made / "scored" / f"{split}.jsonl") for split in ("train", "validation")}
    assert found["validation"] == read(made / "judged" / "validation.jsonl")
    assert [replace(pair, token_ids=None) for pair in found["train"]] == [
        replace(pair, token_ids=None) for pair in train_pairs
    ]
    assert [pair.measures for pair in found["train"]] == [pair.measures for pair in train_pairs]
    assert read(made / "judged and noisy" / "train.jsonl") == train_pairs
    assert {pair.measures.flipped for pair in found["train"]} == {True, False}
    assert "outlier" in {pair.measures.kind for pair in found["train"]}
    one, other = (lines(made / name / "metrics.jsonl") for name in ("trained", "noisy"))
    first = {
        (name, split): next(row["logps/chosen"] for row in rows if row["split"] == split)
        for name, rows in (("one", one), ("other", other))
        for split in ("train", "validation")
    }
    assert first["one", "validation"] == first["other", "validation"]  # before training, of the same held-out pairs
    assert first["one", "train"] != pytest.approx(first["other", "train"])


def test_a_run_is_measured_by_another_judge_against_humans(made):
    rows = lines(made / "noisy" / "responses.jsonl")
    data = language.world("human", 32, 12, 6, 10, seed=3)
    assert [row["baseline"] for row in rows] == data.written["test"]
    for row in rows:
        ours, theirs = (len(row[name].split()) for name in ("response", "baseline"))
        assert (row["score"], row["win"]) == (-ours, 0.5 + 0.5 * ((ours < theirs) - (ours > theirs)))


def test_a_policy_can_be_measured_alone(made):
    found = numbers(made / "alone" / "evaluation.json")
    assert found["n"] == 3
    assert not {"win_rate", "kl", "score"} & set(found)


def test_all_of_them_are_finished(made, capsys):
    for name in ("candidates", "judged", "trained", "evaluated"):
        (made / name / "config.yaml").write_text("command: train\n")
        assert status(made / name) == "finished"
        assert executing.execute(made / name) == 0
        assert f"{made / name} is finished" in capsys.readouterr().out


def test_what_cannot_be_is_refused_before_any_run(made, tmp_path):
    def tried(verb: str, *overrides: str) -> dict[str, Any]:
        config: Any = OmegaConf.to_container(frozen(tmp_path / "run", *SMALL, *overrides, verb=verb))
        return Rehearsal().of(config)

    must = f"candidates must be a folder that dpo.generate wrote, found no train.jsonl in {tmp_path}"
    assert tried("judge", f"candidates={tmp_path}")["problems"] == [must]
    sound = tried("judge", f"candidates={made / 'candidates'}")
    assert (sound["problems"], {*sound["inputs"]}) == ([], {"data", "policy", "candidates"})
    [away] = tried("evaluate", f"against={tmp_path / 'away'}")["problems"]
    assert "must be a folder with a model and its tokenizer, found none" in away
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(
        ValueError, match=r"line 1: must be a candidate as dpo.generate writes it, found no 'token_ids'"
    ):
        generate.read(tmp_path)


def test_candidates_are_those_that_were_planned_with(made, tmp_path):
    """As of every input: of others no pairs are made."""
    given = [*SMALL, "seed=3", f"candidates={made / 'candidates'}"]
    config = frozen(tmp_path / "run", *given, verb="judge")
    for digest, refused in ((inputs.models(config)["candidates"], False), ("of others", True)):
        planned = OmegaConf.merge(config, {"provenance": {"inputs": {"candidates": digest}}})
        (tmp_path / str(refused)).mkdir()
        with pytest.raises(RuntimeError, match="found another candidates") if refused else nullcontext():
            judge.run(planned, tmp_path / str(refused))
        assert (tmp_path / str(refused) / "manifest.json").exists() is not refused
