"""The data report finds every fault that is planted, counts it exactly, and finds none in clean data."""

import json
import random
from dataclasses import replace

import datasets
import numpy as np
import pandas as pd
import pytest

from dpo.data import near, report
from dpo.data.__main__ import _demonstrations, figure, heard, main
from dpo.data.batches import size, tokenize
from dpo.data.demonstrations import sft
from dpo.data.hub import unpaired
from dpo.data.measure import MARKERS, ODD, measured, measured_prompts
from dpo.data.prompts import prompts
from dpo.data.records import file
from dpo.data.treatment import flipped
from dpo.data.truncation import Limits
from dpo.policy.model import load_tokenizer
from tests.composing import compose

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
FOUND = ODD | {"markers of other chat formats": MARKERS}
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
    return report.of_pairs(data, table, [], limits, on_faulty, str(tmp_path / "cache")), refused, table


def counts(findings, split="train"):
    return {one.name: one.count for one in findings if one.split == split}


def test_every_planted_fault_is_found_and_counted(tmp_path, tiny_model):
    rows, number = [clean(n) for n in range(100)], 100
    for name, plant in PLANTED.items():
        for _ in range(TIMES[name]):
            rows += plant(clean(number) | {"n": number})
            number += 1
    held_out = [clean(n) for n in range(2000, 2020)] + [clean(3), clean(4) | {"prompt": clean(4)["prompt"] + "?"}]
    held_out += [clean(n) | {"chosen": f"\x07{clean(n)['chosen']}"} for n in range(3000, 3004)]
    (findings, numbers, kept), refused, _ = reported(tmp_path, tiny_model, rows, held_out)
    found = counts(findings)
    assert {name: found.get(name) for name in PLANTED} == TIMES | {
        "near-duplicate prompts": 2 * TIMES["near-duplicate prompts"]
    }
    twice = sum(TIMES[name] for name in ("pairs that are there twice", "pairs that contradict another"))
    assert found["prompts that are there before"] == twice
    shown = counts(findings, "validation")
    assert (shown["prompts of the training split"], shown["prompts near one of the training split"]) == (1, 1)
    others = shown.keys() & PLANTED.keys()
    assert {name: shown[name] for name in others} == dict.fromkeys(others, 0) | {"control characters": 4}
    of = {one.split: one.of for one in findings if one.name == "control characters"}
    assert of == {"train": numbers["train"]["pairs"], "validation": 26}
    given = {split: some["given"] for split, some in numbers.items()}
    assert given == {"train": len(rows), "validation": 26}
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


ODDITIES = {  # finding -> texts that have it
    "control characters": ("\x00", "a\x1b[1m", "\x7f", "\x85"),
    "replacement characters": ("\ufffd",),
    "invisible characters": (
        *("co\u00adoperate", "\u200b", "\u2060", "\ufeff", "\u202e", "\u2066", "hi\U000e0068\U000e0069", "\U000e0001"),
        "\U0001f3f4\U000e0067\U000e007f and \U000e0067",
    ),
    "markers of other chat formats": (
        *("<|im_start|>", "<|eot_id|>", "[INST] a", "<<SYS>>", "<start_of_turn>", "a</s>", "<s>a", "<bos>", "<eos>"),
        *("<\uff5cend\u2581of\u2581sentence\uff5c>", "<\uff5cUser\uff5c>", "<\uff5ctool\u2581calls\u2581begin\uff5c>"),
    ),
}
PLAIN = (  # and texts that have none: scripts and emoji with joiners, a flag of tags, comparisons and HTML
    *(
        "\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\U0001f469\u200d\U0001f4bb",
        "a < b | c > d",
        "<span>",
        "<em>",
        "tab\there\r\n",
    ),
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    *("\uff5ca\uff5c", "x<s && s>y", "\u2581"),
)


@pytest.mark.parametrize("name,text", [(name, text) for name, texts in ODDITIES.items() for text in texts])
def test_each_odd_text_is_found_as_what_it_is(name, text):
    assert [one for one, pattern in FOUND.items() if pattern.search(f"Say {text}.")] == [name]


@pytest.mark.parametrize("text", PLAIN)
def test_texts_that_are_not_odd(text):
    assert not any(pattern.search(text) for pattern in FOUND.values())


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
    for row in rows[::5]:
        row["rejected"] = " " + " ".join(row["chosen"].strip(" .").split()[::-1]) + "."  # as long
    (findings, numbers, _), _, table = reported(tmp_path, tiny_model, rows, [clean(n) for n in range(5000, 5020)])
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
    assert (chosen == rejected).any()
    assert counts(findings)["the longer response is chosen"] == (chosen > rejected).sum()
    assert numbers["train"]["length_auc"] == pytest.approx(np.mean([(a > rejected).mean() + (a == rejected).mean() / 2
                                                                    for a in chosen]))  # fmt: skip


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_lengths_that_tell_the_label(tmp_path, tiny_model, longer):
    rows = [clean(n) for n in range(30)]
    for row in rows:
        row[longer] += " and more of it, and still more, and more."
    (findings, numbers, _), _, _ = reported(tmp_path, tiny_model, rows, [clean(n) for n in range(200, 220)])
    assert numbers["train"]["length_auc"] == numbers["train"]["longer_is_chosen"] == (longer == "chosen")
    said = {(one.split, one.name): (one.verdict, one.note) for one in findings}
    assert said["train", "length tells the label, AUC"] == ("look", f"{longer == 'chosen':.3f}")
    assert said["train", "the longer response is chosen"][0] == "look"
    assert said["validation", "the longer response is chosen"] == ("ok", "50.0% with ties as halves")


@pytest.mark.parametrize("on_too_long", ["error", "drop", "truncate"])
def test_a_pair_may_have_max_length_tokens(tmp_path, tiny_model, on_too_long):
    rows, held_out = [clean(n) for n in range(40)], [clean(n) for n in range(200, 220)]
    paths = [write(tmp_path / f"{name}.jsonl", some) for name, some in (("train", rows), ("held_out", held_out))]
    data = file(*paths, 0.1, "error")
    pairs = [*data.preferences["train"], *data.preferences["validation"]]
    tokenizer = load_tokenizer(tiny_model("gpt2"))
    table = measured(pairs, tokenizer, str(tmp_path))
    lengths = (table.prompt + table[["chosen", "rejected"]].max(axis=1))[:40].tolist()
    most = sorted(lengths)[-5]
    above = sum(length > most for length in lengths)
    findings, _, kept = report.of_pairs(data, table, [], Limits(most, 5, on_too_long), "error", str(tmp_path))
    assert counts(findings)[f"pairs above max_length={most}"] == above > 0
    assert len(kept["train"]) == 40 - above * (on_too_long == "drop")
    if on_too_long != "error":
        trained_on = tokenize(data.preferences["train"], tokenizer, most, on_too_long)
        sizes = report.sizes(kept["train"], Limits(most, 5, on_too_long), False, True)
        assert sizes[:, 0].tolist() == [size(pair.prompt_responses) for pair in trained_on]


def test_responses_with_a_label(tmp_path, tiny_model):
    """20 desirable ones, of which two are there twice and one is undesirable, too; all of them are the longer ones."""
    rows = [{"prompt": clean(n)["prompt"], "completion": " yes, " * 9, "label": True} for n in range(20)]
    rows += [{"prompt": clean(n)["prompt"], "completion": " no", "label": False} for n in range(100, 110)]
    rows += [rows[0], rows[1], rows[2] | {"label": False}]
    data = unpaired(write(tmp_path / "train.jsonl", rows), write(tmp_path / "shown.jsonl", rows[3:5]), "", 0.1, "error")
    pairs = [pair for some in data.preferences.values() for pair in some]
    table = measured(pairs, load_tokenizer(tiny_model("gpt2")), str(tmp_path))
    assert set(table.rejected) == {-1}
    findings, numbers, _ = report.of_pairs(data, table, [], Limits(200, 20, "error"), "error", str(tmp_path))
    found = counts(findings)
    assert (found["responses that are there twice"], found["responses that contradict another"]) == (2, 1)
    assert [name for name in found if name.startswith(("faulty", "pairs"))] == ["faulty responses"]
    assert (found["desirable responses"], found["prompts that are there before"]) == (22, 3)
    assert numbers["train"]["length_auc"] == pytest.approx((22 * 10 + 22 / 2) / (22 * 11))
    assert list(numbers["train"]["lengths"]) == ["prompt", "completion"]
    assert counts(findings, "validation")["prompts of the training split"] == 2


def test_scores_come_from_any_file_and_turn_with_their_pair(tmp_path, tiny_model):
    rows = [clean(n) | {"score_chosen": n % 3, "score_rejected": 1.0} for n in range(30)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    data = file(str(tmp_path / "train.json"), write(tmp_path / "shown.jsonl", [clean(n) for n in range(200, 210)]), 0.1,
                "error")  # fmt: skip
    pairs = data.preferences["train"]
    assert [pair.score_gap for pair in pairs] == [n % 3 - 1.0 for n in range(30)]
    data.preferences["train"] = [*pairs[:1], flipped(pairs[5]), *pairs[1:5], *pairs[6:]]  # 5: above 0
    both = [pair for some in data.preferences.values() for pair in some]
    table = measured(both, load_tokenizer(tiny_model("gpt2")), str(tmp_path))
    findings, _, _ = report.of_pairs(data, table, [], Limits(200, 20, "error"), "error", str(tmp_path))
    against = next(one for one in findings if one.name == "labels against their scores")
    assert (against.split, against.count, against.of, against.verdict) == ("train", 11, 30, "look")
    assert counts(findings)["scores that are tied"] == 10
    assert "labels against their scores" not in counts(findings, "validation")


@pytest.mark.parametrize("names", [("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating")])
def test_a_label_against_the_scores_of_the_data(tmp_path, tiny_model, names):
    """Two pairs are turned; as argilla has UltraFeedback, conversations beside a prompt in plain text."""
    rows = [
        {
            "source": "evol_instruct",
            "prompt": clean(n)["prompt"],
            **{
                side: [
                    {"role": "user", "content": clean(n)["prompt"]},
                    {"role": "assistant", "content": clean(n)[side]},
                ]
                for side in ("chosen", "rejected")
            },
            **dict(zip(names, (2.0, 4.75) if n in (3, 8) else (4.75, 2.0), strict=True)),
        }
        for n in range(20)
    ]
    paths = tmp_path / "train.parquet", tmp_path / "held_out.parquet"
    for path, some in zip(paths, (rows, rows[:2]), strict=True):
        datasets.Dataset.from_list(some).to_parquet(path)
    data = file(*map(str, paths), 0.1, "error")
    assert data.preferences["train"][0].prompt == rows[0]["chosen"][:1]
    both = [pair for some in data.preferences.values() for pair in some]
    table = measured(both, load_tokenizer(tiny_model("qwen2")), str(tmp_path))
    findings, _, _ = report.of_pairs(data, table, [], Limits(200, 20, "error"), "error", str(tmp_path))
    against = next(one for one in findings if one.name == "labels against their scores")
    assert (against.count, against.of) == (2, 20)
    assert [place.rpartition(" ")[2] for place in against.examples] == ["3", "8"]


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


def test_one_long_row_leaves_the_others_to_be_seen():
    """What is beyond an axis is said below it; of a demonstration there is nothing to compare."""
    lengths = {"prompt": [20 + n % 7 for n in range(59)] + [9000], "chosen": [10 + n % 5 for n in range(60)]}
    rows = pd.DataFrame({**lengths, "rejected": [*(12 + n % 3 for n in range(59)), 4000]})
    first, second, third = figure(rows, 150).axes
    said = "tokens\n(1 of 60 rows beyond this axis, up to "
    assert first.get_xlabel() == said + "9,000)"
    assert second.get_xlabel() == said + f"{4000 - 14:,})"
    assert 26 < first.get_xlim()[1] < 40
    assert second.get_xlim()[0] > -10
    assert sum(patch.get_height() for patch in second.patches) == 59
    assert third.get_xlabel().endswith("\n(1 of 60 rows beyond this axis, up to 13,000)")
    assert 150 < third.get_xlim()[1] < 200
    plain, fits = figure(rows[:59].drop(columns="rejected"), 150).axes
    assert [text.get_text() for text in plain.get_legend().get_texts()] == ["prompt", "completion"]
    assert (plain.get_xlabel(), len(fits.lines[0].get_xdata())) == ("tokens", 59)
    assert figure(rows[:0], 150).axes


@pytest.mark.parametrize("on_faulty", ["error", "drop"])
def test_demonstrations_are_measured_whole(tmp_path, tiny_model, monkeypatch, capsys, on_faulty):
    """Prompt and response, with what stops `dpo.sft`; of what is held out the prompts, and rows that are none."""
    monkeypatch.setattr("dpo.data.__main__.save", lambda *_: None)
    rows = [{"prompt": clean(n)["prompt"], "completion": clean(n)["chosen"]} for n in range(40)]
    for place, said in ((3, " "), (5, " ka" * 300), (7, " \x07"), (9, " \x07"), (11, " a <|endoftext|>")):
        rows[place]["completion"] = said
    rows.append(rows[20])
    held_out = [{"prompt": clean(n)["prompt"], "completion": " yes"} for n in range(200, 210)]
    held_out += [{"prompt": clean(4)["prompt"], "completion": " "}, {"messages": [{"role": "user", "content": "Hi."}]}]
    held_out.append({"prompt": clean(220)["prompt"] + "\x07", "completion": " \ufffd"})
    paths = [write(tmp_path / f"{name}.jsonl", some) for name, some in (("train", rows), ("held_out", held_out))]
    places = f"data.path={paths[0]}", f"data.validation_path={paths[1]}", f"policy.path={tiny_model('gpt2')}"
    folders = f"report={tmp_path}/report", f"cache={tmp_path}/cache", f"data.on_faulty={on_faulty}"
    main(compose("data", "data=sft", *places, *folders, "max_length=200", "max_new_tokens=20", "device=cpu"))
    made = json.loads((tmp_path / "report" / "report.json").read_text())
    found = {(one["split"], one["name"]): (one["count"], one["of"], one["verdict"]) for one in made["findings"]}
    bad = {"error": "bad", "drop": "look"}[on_faulty]
    assert {key: value for key, value in found.items() if value[0]} == {
        ("all", "completion is empty"): (1, 43, bad),
        ("all", "the last message is not the assistant's, after another's"): (1, 43, bad),
        ("train", "completion is empty"): (1, 41, bad),
        ("train", "demonstrations above max_length=200"): (1, 40, "bad"),
        ("train", "control characters"): (2, 40, "look"),
        ("train", "special tokens typed in the text"): (1, 40, "look"),
        ("train", "demonstrations that are there twice"): (1, 40, "look"),
        ("train", "prompts that are there before"): (1, 41, "ok"),
        ("test", "control characters"): (1, 12, "look"),
        ("validation", "prompts of the training split"): (1, 12, "bad"),
    }
    assert made["splits"]["train"]["lengths"]["completion"]["100%"] > 300
    assert (made["splits"]["train"]["demonstrations"], made["splits"]["test"]["prompts"]) == (40, 12)
    assert "dpo.sft: 2 steps" in capsys.readouterr().out


def test_turns_of_one_conversation_are_near_each_other(tmp_path, tiny_model):
    """And that is no finding, but a second conversation like the first is one."""
    rows = []
    for n in (*range(30), 1):
        said = [f"{clean(n)['prompt']} {clean(n + 50)['prompt']} {clean(n + 99)['prompt']}", "Yes.", "Why?", "So."]
        messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, said, strict=True)]
        rows.append({"messages": messages})
    rows[-1]["messages"][0]["content"] += " Please!"
    held_out = [{"prompt": clean(200)["prompt"], "completion": "Yes."}]
    paths = [write(tmp_path / f"{name}.jsonl", some) for name, some in (("train", rows), ("held_out", held_out))]
    data = sft(*paths, "all", 0.1, "error")
    shown = _demonstrations(data)
    assert [(one.prompt, one.chosen) for one in shown] == [(one.prompt, one.response) for one in data.demonstrations]
    table = measured(shown, load_tokenizer(tiny_model("qwen2")), str(tmp_path))
    data = replace(data, preferences={"train": shown})
    limits = Limits(500, 20, "error")
    findings, _, kept = report.of_pairs(data, table, [], limits, "error", str(tmp_path), shown=True)
    assert len(kept["train"]) == 62
    assert 0 < counts(findings)["near-duplicate prompts"] <= 4
    assert not any("label" in one.name or "contradict" in one.name for one in findings)


def test_prompts_alone(tmp_path, tiny_model):
    rows = [clean(n) for n in range(40)] + [
        {"prompt": clean(50)["prompt"] * 5},
        {"prompt": clean(51)["prompt"] + "\x00"},
    ]
    data = prompts(write(tmp_path / "prompts.jsonl", rows), None, 0, 4, 4, "error")
    tokenizer = load_tokenizer(tiny_model("gpt2"))
    tables = {split: measured_prompts(some, tokenizer, str(tmp_path)) for split, some in data.prompts.items()}
    findings, numbers = report.of_prompts(data, tables, Limits(150, 20, "error"), str(tmp_path))
    total = {name: sum(one.count for one in findings if one.name == name) for name in {one.name for one in findings}}
    assert total["prompts above the budget"] == total["control characters"] == 1
    assert sum(numbers[split]["prompts"] for split in numbers) == 42
    most = int(tables["train"].prompt.median())  # a prompt of just so many tokens fits
    findings, _ = report.of_prompts(data, tables, Limits(most + 20, 20, "error"), str(tmp_path))
    assert counts(findings)["prompts above the budget"] == (tables["train"].prompt > most).sum() > 0


def test_the_cache_goes_by_content(tmp_path, tiny_model):
    rows, held_out = [clean(n) for n in range(10)], [clean(n) for n in range(200, 210)]
    (before, _, _), _, _ = reported(tmp_path, tiny_model, rows, held_out)
    (again, _, _), _, _ = reported(tmp_path, tiny_model, rows, held_out)
    assert len([*(tmp_path / "cache" / "measured").glob("*/rows.json")]) == 1
    assert before == again
    rows[0]["chosen"] += " one more"
    reported(tmp_path, tiny_model, rows, held_out)
    assert len([*(tmp_path / "cache" / "measured").glob("*/rows.json")]) == 2
    assert len([*(tmp_path / "cache" / "near").glob("*/places.json")]) == 1  # its prompts are as they were
    rows[0]["prompt"] = rows[1]["prompt"] + "!"
    (now, _, _), _, _ = reported(tmp_path, tiny_model, rows, held_out)
    assert [counts(some)["near-duplicate prompts"] for some in (before, again, now)] == [0, 0, 2]
