"""Readers of public data sets keep every character and count every wart."""

import gzip
import json
import sys
import types
from pathlib import Path

import pytest

from dpo.data.hub import hh, tldr, ultrafeedback

REAL = Path(__file__).parents[3] / "shared" / "data" / "hh-harmless-base-1500.jsonl.gz"
START = "\n\nHuman: hi\n\nAssistant: Hello.\n\nHuman: How are you?\n\nAssistant:"
WRITTEN = [
    {"chosen": START + " Well.", "rejected": START + " Go away."},
    {"chosen": START + " ", "rejected": START + " Go away."},  # empty
    {"chosen": START + " Well.", "rejected": "\n\nHuman: hi\n\nAssistant: Who are you?"},  # part early
    *(
        {"chosen": f"\n\nHuman: {i}?\n\nAssistant: Yes.", "rejected": f"\n\nHuman: {i}?\n\nAssistant: No.\n"}
        for i in range(40)
    ),
]


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def real(tmp_path):
    """The first 1,500 dialogues of harmless-base, or a few written in their format."""
    return str(REAL) if REAL.exists() else save(tmp_path / "hh.jsonl", WRITTEN)


def test_the_real_warts_are_counted(real, capsys):
    rows, empty = (1500, 4) if real == str(REAL) else (43, 1)
    data = hh(real, None, None, 0.1, "drop")
    assert sum(map(len, data.preferences.values())) == rows - empty - 1
    printed = capsys.readouterr().out
    assert f"{empty + 1} of {rows} pairs are faulty, {empty + 1} dropped" in printed
    assert f"{empty} x chosen is empty" in printed
    assert "1 x the dialogues part before their last turn" in printed
    assert sum(map(len, hh(real, None, None, 0.1, "keep").preferences.values())) == rows - 1
    with pytest.raises(ValueError, match=f"{empty + 1} of {rows} pairs are faulty"):
        hh(real, None, None, 0.1, "error")


def test_prompt_and_response_are_the_dialogue(real):
    with gzip.open(real, "rt") if real.endswith(".gz") else open(real) as stream:
        dialogues = {(row["chosen"], row["rejected"]) for row in map(json.loads, stream)}
    for pairs in hh(real, None, None, 0.1, "drop").preferences.values():
        for pair in pairs:
            assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) in dialogues
            assert pair.prompt.startswith("\n\nHuman:")
            assert pair.prompt.endswith("\n\nAssistant:")
            assert "\n\nAssistant:" not in pair.chosen + pair.rejected
            assert pair.chosen.strip()


def test_dialogues_that_are_no_pair(tmp_path):
    human = [{"chosen": START + " Well.\n\nHuman: And?", "rejected": START + " Go."}]
    alone = [{"chosen": "\n\nHuman: hi", "rejected": "\n\nHuman: hi"}]
    theirs = [{"chosen": START + " Well.", "rejected": START + " Go.\n\nHuman: Why?"}]
    path = save(tmp_path / "hh.jsonl", human + alone + theirs)
    with pytest.raises(ValueError) as error:
        hh(path, None, None, 0.1, "error")
    assert "line 1: the last turn is not the assistant's" in str(error.value)
    assert "line 2: there is no turn of the assistant" in str(error.value)
    assert "line 3: the last turn is not the assistant's" in str(error.value)
    with pytest.raises(ValueError, match="line 1: must have two dialogues"):
        hh(save(tmp_path / "other.jsonl", [{"prompt": "a", "chosen": "b"}]), None, None, 0.1, "drop")
    pair = save(tmp_path / "pair.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    for reader in (lambda: hh(pair, None, None, 0.1, "drop"), lambda: ultrafeedback(pair, None, "none", 0.1, "drop")):
        with pytest.raises(ValueError, match=r"line 1: must have .* are read by data=file"):
            reader()


def test_each_turn_is_where_it_belongs(tmp_path):
    """To the letter: a dialogue, and a conversation of several turns with a system message."""
    data = hh(save(tmp_path / "hh.jsonl", [WRITTEN[0], *WRITTEN[3:5]]), None, None, 0.1, "error")
    [pair] = [pair for pairs in data.preferences.values() for pair in pairs if pair.prompt == START]
    assert (pair.chosen, pair.rejected, pair.chosen_ended, pair.rejected_ended) == (" Well.", " Go away.", True, True)
    turns = [("system", "Be brief."), ("user", "hi"), ("assistant", " Hello. "), ("user", "How are you?")]
    asked = [{"role": role, "content": content} for role, content in turns]
    good, bad, other = ({"role": "assistant", "content": words} for words in (" Well.", "Go away.", "Ho."))
    parted = [*asked[:2], other, asked[3]]
    rows = [{"prompt": "hi", "chosen": [*asked, good], "rejected": [*asked, bad]}, chats(0), chats(1)]
    data = ultrafeedback(save(tmp_path / "a.jsonl", rows), None, "none", 0.1, "error")
    [pair] = [pair for pairs in data.preferences.values() for pair in pairs if len(pair.prompt) > 1]
    assert (pair.prompt, pair.chosen, pair.rejected) == (asked, [good], [bad])
    rows = [rows[0] | {"rejected": [*parted, bad]}, *rows[1:]]
    with pytest.raises(ValueError, match="line 1: the conversations part before their last turn"):
        ultrafeedback(save(tmp_path / "b.jsonl", rows), None, "none", 0.1, "error")


@pytest.mark.parametrize("rule", ["drop", "keep"])
@pytest.mark.parametrize(
    "reader,made",
    [
        (lambda *given: hh(*given[:2], None, *given[2:]), lambda n: dialogues(n)),
        (lambda *given: ultrafeedback(*given[:2], "none", *given[2:]), lambda n: chats(n)),
        (tldr, lambda n: comparison(n)),
    ],
    ids=["hh", "ultrafeedback", "tldr"],
)
def test_readers_heed_what_they_are_told(tmp_path, reader, made, rule):
    """The file of held-out pairs or the share to hold out, and the rule for faults, which goes on to tokens."""
    rows = [made(n) for n in range(200)]
    file, held_out = save(tmp_path / "a.jsonl", rows[:150]), save(tmp_path / "b.jsonl", rows[150:])
    data = reader(file, held_out, 0.5, rule)
    assert [len(data.preferences[split]) for split in ("train", "validation")] == [150, 50]
    assert data.preferences["validation"][0].source == f"{held_out}, line 1"
    assert data.on_faulty == rule
    data = reader(file, None, 0.5, rule)
    assert 50 < len(data.preferences["validation"]) < 100
    assert data.on_faulty == rule


def test_held_out_file(tmp_path):
    train, held_out = save(tmp_path / "a.jsonl", WRITTEN[3:30]), save(tmp_path / "b.jsonl", WRITTEN[30:])
    data = hh(train, held_out, None, 0.1, "error")
    assert [len(pairs) for pairs in data.preferences.values()] == [27, 13]
    assert [one.response for one in data.demonstrations] == [" Yes."] * 27


def test_hub_gives_its_own_splits(monkeypatch):
    asked = []

    def load_dataset(name, split, data_dir=None):
        asked.append((name, data_dir, split))
        return WRITTEN[:30] if split == "train" else WRITTEN[30:]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = hh(None, None, "harmless-base", 0.1, "drop")
    assert sorted(asked) == [("Anthropic/hh-rlhf", "harmless-base", split) for split in ("test", "train")]
    assert [len(data.preferences[split]) for split in ("train", "validation")] == [28, 13]
    with pytest.raises(ValueError, match="train split: 2 of 30 pairs are faulty"):
        hh(None, None, None, 0.1, "error")


def test_hub_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'dpo\[hub\]'"):
        hh(None, None, None, 0.1, "drop")


def dialogues(number: int) -> dict:
    start = f"\n\nHuman: {number}?\n\nAssistant:"
    return {"chosen": start + " Yes.", "rejected": start + " No."}


def chats(number: int, chosen: str = "Yes.", rejected: str = "No.") -> dict:
    asked = [{"role": "user", "content": f"{number}?"}]
    sides = {
        name: [*asked, {"role": "assistant", "content": text}]
        for name, text in (("chosen", chosen), ("rejected", rejected))
    }
    return {"prompt": f"{number}?", "prompt_id": "x", "messages": sides["chosen"], "score_chosen": 8.5, **sides}


def test_ultrafeedback_pairs_are_the_last_turns(tmp_path, capsys):
    parted = chats(90) | {"rejected": chats(91)["rejected"]}
    rows = [*map(chats, range(40)), chats(40, chosen=" "), chats(41, "Same.", "Same."), parted]
    data = ultrafeedback(save(tmp_path / "a.jsonl", rows), None, "none", 0.2, "drop")
    pairs = [pair for split in ("train", "validation") for pair in data.preferences[split]]
    assert len(pairs) == 40
    assert {pair.prompt[0]["content"] for pair in pairs} == {f"{number}?" for number in range(40)}
    assert all([message["role"] for message in pair.prompt] == ["user"] for pair in pairs)
    assert {(pair.chosen[0]["content"], pair.rejected[0]["content"]) for pair in pairs} == {("Yes.", "No.")}
    assert all([message["role"] for message in pair.chosen] == ["assistant"] for pair in pairs)
    said = capsys.readouterr().out
    assert "3 of 43 pairs are faulty, 3 dropped" in said
    assert "1 x the conversations part before their last turn" in said
    with pytest.raises(ValueError, match="line 2: must have two conversations"):
        ultrafeedback(save(tmp_path / "b.jsonl", [chats(0), WRITTEN[0]]), None, "none", 0.2, "drop")
    wrong = save(tmp_path / "c.jsonl", [{name: chats(0)[name][:1] * 2 for name in ("chosen", "rejected")}])
    with pytest.raises(ValueError, match="line 1: chosen must be one message of the assistant"):
        ultrafeedback(wrong, None, "none", 0.2, "drop")


def test_ultrafeedback_from_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return [chats(number) for number in (range(20) if split == "train_prefs" else range(20, 25))]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = ultrafeedback(None, None, "some/repository", 0.1, "error")
    assert sorted(asked) == [("some/repository", "test_prefs"), ("some/repository", "train_prefs")]
    assert [len(data.preferences[split]) for split in ("train", "validation")] == [20, 5]
    assert data.preferences["validation"][1].source == "some/repository, test_prefs split, row 1"
    assert data.preferences["validation"][1].prompt == [{"role": "user", "content": "21?"}]


def comparison(number: int, choice: int = 1, texts: tuple[str, str] = (" Bad.", " Good."), **info) -> dict:
    """A row as it is published."""
    post = {
        "id": f"t3_{number}",
        "post": f"Post {number}.\nMore.",
        "title": f"Title {number}",
        "subreddit": "AskReddit",
    }
    summaries = [{"text": text, "policy": "sup2", "note": "ok"} for text in texts]
    about = {"worker": "w", "batch": "batch5", "split": "train", "extra": {"confidence": None}}
    info = {**post, "site": None, "article": None, **info}
    return {"info": info, "summaries": summaries, "choice": choice, **about}


def test_tldr_to_the_letter(tmp_path, capsys):
    rows = [
        comparison(0),
        comparison(1, choice=0, texts=("First.", "\n Second. ")),
        comparison(2, post=None, title=None, subreddit=None, site="cnndm", article="News."),
        comparison(3, texts=(" Same.", "Same.")),
        *(comparison(n) for n in range(4, 30)),
    ]
    data = tldr(save(tmp_path / "a.jsonl", rows), None, 0.1, "drop")
    found = {pair.prompt: pair for pairs in data.preferences.values() for pair in pairs}
    assert len(found) == 28
    asked = "SUBREDDIT: r/AskReddit\n\nTITLE: Title {0}\n\nPOST: Post {0}.\nMore.\n\nTL;DR:"
    first, second = found[asked.format(0)], found[asked.format(1)]
    assert (first.chosen, first.rejected) == (" Good.", " Bad.")
    assert (second.chosen, second.rejected) == (" First.", " Second.")
    said = capsys.readouterr().out
    assert "2 of 30 pairs are faulty, 2 dropped" in said
    assert "1 x it is of a news article, not of a post" in said


def test_a_post_without_a_title(tmp_path):
    with pytest.raises(ValueError, match="line 1: must have a subreddit and a title in info, beside the post"):
        tldr(save(tmp_path / "a.jsonl", [comparison(0, title=None)]), None, 0.1, "drop")


@pytest.mark.parametrize(
    "wrong",
    [{"choice": 2}, {"choice": None}, {"info": "a"}, {"summaries": 2 * ["a"]}]
    + [{"summaries": [{"text": text} for text in texts]} for texts in (["a"], ["a", None], ["a", "b", "c"])],
)
def test_what_is_no_comparison(tmp_path, wrong):
    path = save(tmp_path / "a.jsonl", [comparison(0), comparison(1) | wrong])
    with pytest.raises(ValueError, match="line 2: must have info, two summaries and a choice of 0 or 1"):
        tldr(path, None, 0.1, "drop")


def test_tldr_from_the_hub(monkeypatch):
    asked = []

    def load_dataset(repository, data_dir, revision, split):
        asked.append((repository, data_dir, revision, split))
        return [comparison(number) for number in (range(20) if split == "train" else range(20, 25))]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = tldr(None, None, 0.1, "error")
    there = ("openai/summarize_from_feedback", "comparisons", "refs/convert/parquet")
    assert sorted(asked) == [(*there, split) for split in ("train", "validation")]
    assert [len(data.preferences[split]) for split in ("train", "validation")] == [20, 5]
