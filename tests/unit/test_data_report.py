"""The data report finds every fault that is planted, counts it exactly, and finds none in clean data."""

import json
import random

import numpy as np
import pytest

from dpo.cache import digest
from dpo.data import near, report
from dpo.data.__main__ import figure, heard
from dpo.data.measure import measured, measured_prompts
from dpo.data.prompts import prompts
from dpo.data.records import file
from dpo.data.truncation import Limits
from dpo.policy.model import load_tokenizer

WORDS = [
    f"{a}{b}" for a in ("ka", "lo", "mi", "nu", "pe", "ri", "so", "tu") for b in ("bar", "den", "fol", "gim", "hot")
]


def clean(number):
    rng = random.Random(number)
    say = lambda n: " ".join(rng.choices(WORDS, k=n))  # noqa: E731
    sizes = (9, 6) if number % 2 else (6, 9)
    prompt, chosen, rejected = f"{say(14)} {number}:", f" {say(sizes[0])}.", f" {say(sizes[1])}."
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


PLANTED = {  # finding -> what is done to a clean row
    "chosen is empty": lambda row: [row | {"chosen": " "}],
    "chosen and rejected are the same": lambda row: [row | {"rejected": row["chosen"]}],
    "one response begins the other": lambda row: [row | {"rejected": row["chosen"] + " more"}],
    "responses differ in space or case alone": lambda row: [row | {"rejected": row["chosen"].upper()}],
    "control characters": lambda row: [row | {"chosen": row["chosen"] + "\x07"}],
    "replacement characters": lambda row: [row | {"chosen": row["chosen"] + "\ufffd"}],
    "invisible characters": lambda row: [row | {"rejected": "\ufeff" + row["rejected"]}],
    "special tokens typed in the text": lambda row: [row | {"prompt": row["prompt"] + " <|endoftext|>:"}],
    "markers of other chat formats": lambda row: [row | {"prompt": "[INST] " + row["prompt"]}],
    "pairs that are there twice": lambda row: [row, row],
    "pairs that contradict another": lambda row: [row, row | {"chosen": row["rejected"], "rejected": row["chosen"]}],
    "near-duplicate prompts": lambda row: [row, clean(row["n"] + 500) | {"prompt": row["prompt"] + "!"}],
    "labels against their scores": lambda row: [row | {"score_chosen": 1, "score_rejected": 3}],
    "scores that are tied": lambda row: [row | {"score_chosen": 2, "score_rejected": 2.0}],
    "pairs above max_length=200": lambda row: [row | {"chosen": row["chosen"] * 40}],
}
TIMES = {name: 1 + place % 3 for place, name in enumerate(PLANTED)}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def reported(tmp_path, tiny_model, rows, held_out, on_faulty="drop", kind="gpt2"):
    paths = [write(tmp_path / f"{name}.jsonl", some) for name, some in (("train", rows), ("held_out", held_out))]
    with heard() as refused:
        data = file(*paths, 0.1, "keep")
    pairs = [pair for some in data.preferences.values() for pair in some]
    table = measured(pairs, load_tokenizer(tiny_model(kind)), str(tmp_path / "cache"))
    limits = Limits(200, 20, "drop")
    return report.of_pairs(data, table, [], limits, on_faulty), refused, table


def counts(findings, split="train"):
    return {one.name: one.count for one in findings if one.split == split}


def test_every_planted_fault_is_found_and_counted(tmp_path, tiny_model):
    rows, number = [clean(n) for n in range(100)], 100
    for name, plant in PLANTED.items():
        for _ in range(TIMES[name]):
            rows += plant(clean(number) | {"n": number})
            number += 1
    held_out = [clean(n) for n in range(2000, 2020)] + [clean(3), clean(4) | {"prompt": clean(4)["prompt"] + "?"}]
    (findings, numbers, kept), refused, _ = reported(tmp_path, tiny_model, rows, held_out)
    found = counts(findings)
    assert {name: found.get(name) for name in PLANTED} == TIMES | {
        "near-duplicate prompts": 2 * TIMES["near-duplicate prompts"]
    }
    twice = sum(TIMES[name] for name in ("pairs that are there twice", "pairs that contradict another"))
    assert found["prompts that are there before"] == twice
    shown = counts(findings, "validation")
    assert (shown["prompts of the training split"], shown["prompts near one of the training split"]) == (1, 1)
    faulty = TIMES["chosen is empty"] + TIMES["chosen and rejected are the same"]
    assert len(refused) == faulty
    assert numbers["train"]["pairs"] == len(rows) - faulty
    assert len(kept["train"]) == len(rows) - faulty - TIMES["pairs above max_length=200"]
    one = next(one for one in findings if one.name == "control characters")
    assert all(f"{tmp_path}/train.jsonl, line " in example for example in one.examples)


def test_nothing_is_found_in_clean_data(tmp_path, tiny_model):
    (findings, _, _), refused, _ = reported(
        tmp_path, tiny_model, [clean(n) for n in range(100)], [clean(n) for n in range(200, 220)]
    )
    assert not refused
    assert {one.verdict for one in findings} == {"ok"}


def test_a_response_that_merges_with_its_prompt(tmp_path, tiny_model):
    """The tiny tokenizer has learned "Italy" in one piece, or pieces that a cut inside the word breaks."""
    rows = [clean(n) for n in range(20)]
    rows += [clean(30) | {"prompt": "The capital of Ita", "chosen": "ly is Rome", "rejected": " is"}]
    tokenizer = load_tokenizer(tiny_model("gpt2"))
    joint, alone = tokenizer("The capital of Italy is Rome").input_ids, tokenizer("The capital of Ita").input_ids
    assert joint[: len(alone)] != alone
    (findings, _, _), _, table = reported(tmp_path, tiny_model, rows, [clean(n) for n in range(200, 220)])
    assert counts(findings)["responses merge with the prompt's end"] == 1
    assert table.merged.tolist()[:21] == [0] * 20 + [1]


def test_lengths_are_those_of_the_tokenizer(tmp_path, tiny_model):
    rows = [clean(n) for n in range(3200)]  # enough for several processes
    (_, numbers, _), _, table = reported(tmp_path, tiny_model, rows, [clean(n) for n in range(5000, 5020)])
    tokenizer = load_tokenizer(tiny_model("gpt2"))
    lengths = {name: [len(tokenizer(row[name]).input_ids) for row in rows] for name in rows[0]}
    assert table.prompt.tolist()[:3200] == lengths["prompt"]
    assert table.chosen.tolist()[:3200] == [n + 1 for n in lengths["chosen"]]  # and EOS
    assert list(numbers["train"]["lengths"]["rejected"].values()) == pytest.approx(
        np.quantile(np.array(lengths["rejected"]) + 1, [0, 0.05, 0.5, 0.95, 0.99, 1])
    )
    chosen, rejected = np.array(lengths["chosen"]), np.array(lengths["rejected"])
    assert numbers["train"]["longer_is_chosen"] == pytest.approx(
        (np.sign(chosen - rejected) / 2 + 0.5).mean(), abs=1e-12
    )


def test_auc_by_brute_force():
    rng = np.random.default_rng(0)
    ones, others = rng.integers(0, 20, 50), rng.integers(3, 25, 70)
    assert report.auc(ones, others) == pytest.approx(
        np.mean([(a > b) + (a == b) / 2 for a in ones for b in others]), abs=1e-12
    )


def test_near_duplicates_by_brute_force():
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=40)) for _ in range(150)]
    for text in texts[:50]:
        words = text.split()
        for _ in range(rng.choice([1, 1, 2, 4])):
            words[rng.randrange(40)] = "otherwise"
        texts.append(" ".join(words))

    def pieces(text):
        return {text[place : place + 8] for place in range(len(text) - 7)}

    sets = [pieces(text) for text in texts]
    alike = [
        any(len(a & b) / len(a | b) >= 0.8 for other, b in enumerate(sets) if other != place)
        for place, a in enumerate(sets)
    ]
    assert 20 < sum(alike) < 150
    assert (near.near(texts, near.signatures(texts)) >= 0).tolist() == alike
    half = near.signatures(texts[:150])
    across = near.near(texts[150:], near.signatures(texts[150:]), texts[:150], half)
    assert (across >= 0).tolist() == alike[150:]


def test_the_figure_shows_the_lengths(tmp_path, tiny_model):
    rows = [clean(n) for n in range(60)]
    (_, _, kept), _, table = reported(tmp_path, tiny_model, rows, [clean(n) for n in range(200, 220)])
    first, second, third = figure(kept["train"], 150).axes
    heights = [patch.get_height() for patch in second.patches]
    assert sum(heights) == 60
    difference = (table.chosen - table.rejected)[:60]
    centres = [patch.get_x() + patch.get_width() / 2 for patch in second.patches]
    assert np.average(centres, weights=heights) == pytest.approx(difference.mean(), abs=1)
    curve = third.lines[0]
    longest = table.prompt[:60] + table[["chosen", "rejected"]][:60].max(axis=1)
    assert curve.get_xdata().tolist() == sorted(longest)
    assert curve.get_ydata()[-1] == 1
    assert third.lines[1].get_xdata()[0] == 150
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["prompt", "chosen", "rejected"]


def test_prompts_alone(tmp_path, tiny_model):
    rows = [clean(n) for n in range(40)] + [
        {"prompt": clean(50)["prompt"] * 5},
        {"prompt": clean(51)["prompt"] + "\x00"},
    ]
    data = prompts(write(tmp_path / "prompts.jsonl", rows), None, 0, 4, 4, "error")
    tokenizer = load_tokenizer(tiny_model("gpt2"))
    tables = {split: measured_prompts(some, tokenizer, str(tmp_path)) for split, some in data.prompts.items()}
    findings, numbers = report.of_prompts(data, tables, Limits(150, 20, "error"))
    total = {name: sum(one.count for one in findings if one.name == name) for name in {one.name for one in findings}}
    assert total["prompts above the budget"] == total["control characters"] == 1
    assert sum(numbers[split]["prompts"] for split in numbers) == 42


def test_the_cache_goes_by_content(tmp_path, tiny_model):
    rows, held_out = [clean(n) for n in range(10)], [clean(n) for n in range(200, 210)]
    (before, _, _), _, _ = reported(tmp_path, tiny_model, rows, held_out)
    (again, _, _), _, _ = reported(tmp_path, tiny_model, rows, held_out)
    assert len([*(tmp_path / "cache" / "measured").glob("*/rows.json")]) == 1
    assert digest(report.as_json(before)) == digest(report.as_json(again))
    rows[0]["chosen"] += " one more"
    reported(tmp_path, tiny_model, rows, held_out)
    assert len([*(tmp_path / "cache" / "measured").glob("*/rows.json")]) == 2
