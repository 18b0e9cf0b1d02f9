"""Readers of public data sets keep every character and count every wart."""

import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from test_sources import WRITERS

from dpo.data import hub
from dpo.data.hub import CONVERTED, FROM_FEEDBACK, hc3, shp, tldr, ultrafeedback, webgpt
from dpo.data.sources import read

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


def hh(path, validation_path, subset, *given):
    """As text."""
    return hub.hh(path, validation_path, subset, False, *given)


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


def test_hub_gives_its_own_splits(dataset_hub, monkeypatch, tmp_path):
    """Of a folder, if one is chosen: from the hub, from what it was offline, and from a copy here."""
    files = {"train.jsonl": WRITTEN[:30], "test.jsonl": WRITTEN[30:]}
    other = {"train.jsonl": [dialogues(n) for n in range(50, 60)], "test.jsonl": [dialogues(60)]}
    folders = (("harmless-base", files), ("helpful-base", other))
    commit = dataset_hub.publish(
        "Anthropic/hh-rlhf", {f"{folder}/{name}": rows for folder, some in folders for name, rows in some.items()}
    )
    data = hh(None, None, "harmless-base", 0.1, "drop")
    assert [len(data.preferences[split]) for split in ("train", "validation")] == [28, 13]
    assert set(data.revisions.values()) == {commit}
    assert not [path for path in dataset_hub.asked if "helpful-base" in path]
    with pytest.raises(ValueError, match="train split: 2 of 40 pairs are faulty"):
        hh(None, None, None, 0.1, "error")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    copy = str(dataset_hub.folder("Anthropic/hh-rlhf", "main"))
    for path in (None, copy):
        assert hh(path, None, "helpful-base", 0.1, "drop").preferences["train"][0].prompt.startswith("\n\nHuman: 50?")
        assert len(hh(path, None, None, 0.1, "drop").preferences["train"]) == 38
    for path in (save(tmp_path / "a.jsonl", WRITTEN[3:30]), str(tmp_path), "someone/copy"):
        with pytest.raises(ValueError, match=rf"data.subset must be a folder .* found no helpful-base in {path}; set"):
            hh(path, None, "helpful-base", 0.1, "drop")


def test_hub_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[hub\]' -c constraints.txt"):
        hh(None, None, None, 0.1, "drop")


def dialogues(number: int) -> dict:
    start = f"\n\nHuman: {number}?\n\nAssistant:"
    return {"chosen": start + " Yes.", "rejected": start + " No."}


def test_turns_as_chat(tmp_path):
    """Each word of the dialogue under who said it; what is no turn is told, and counted with other faults."""
    apart = {"chosen": "Note.\n\nHuman: hi\n\nAssistant: Hm.", "rejected": "Note.\n\nHuman: hi\n\nAssistant: No."}
    alone = {"chosen": "hi\n\nAssistant: Hm.", "rejected": "hi\n\nAssistant: No."}
    path = save(tmp_path / "hh.jsonl", [*WRITTEN, apart, alone])
    data = hub.hh(path, None, None, True, 0.3, "drop")
    pairs = [pair for split in data.preferences.values() for pair in split]
    assert len(pairs) == len(WRITTEN) - 2
    [first] = [pair for pair in pairs if len(pair.prompt) > 1]
    said = [(turn["role"], turn["content"]) for turn in first.prompt]
    assert said == [("user", "hi"), ("assistant", "Hello."), ("user", "How are you?")]
    assert first.chosen == [{"role": "assistant", "content": "Well."}]
    assert first.rejected == [{"role": "assistant", "content": "Go away."}]
    other = next(pair for pair in pairs if pair.prompt == [{"role": "user", "content": "7?"}])
    assert (other.chosen[0]["content"], other.rejected[0]["content"]) == ("Yes.", "No.")  # without the line break
    with pytest.raises(ValueError, match="line 44: the dialogue does not begin with a turn"):
        hub.hh(path, None, None, True, 0.3, "error")


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


def test_ultrafeedback_from_the_hub(dataset_hub):
    splits = {"train_prefs": range(20), "test_prefs": range(20, 25), "train_sft": range(30, 60)}
    files = {f"data/{split}-00000-of-00001.parquet": list(map(chats, numbers)) for split, numbers in splits.items()}
    dataset_hub.publish("some/repository", files)
    data = ultrafeedback(None, None, "some/repository", 0.1, "error")
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


@pytest.mark.parametrize("name", [name for name in WRITERS if not name.endswith((".csv", ".jsonl"))])
@pytest.mark.parametrize("reader", ["hh", "ultrafeedback", "tldr"])
def test_published_rows_are_the_same_in_every_kind_of_file(tmp_path, reader, name):
    read, rows = {
        "hh": (lambda path: hub.hh(path, None, None, True, 0.3, "drop"), WRITTEN),
        "ultrafeedback": (lambda path: ultrafeedback(path, None, "none", 0.3, "drop"), [*map(chats, range(20))]),
        "tldr": (lambda path: tldr(path, None, 0.3, "drop"), [comparison(number) for number in range(20)]),
    }[reader]
    WRITERS[name](tmp_path / name, rows)
    data, same = read(str(tmp_path / name)), read(save(tmp_path / "same.jsonl", rows))
    assert data.preferences == same.preferences
    assert sum(map(len, data.preferences.values())) == (41 if reader == "hh" else 20)


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


def test_tldr_from_the_hub(dataset_hub):
    splits = {"train": range(20), "validation": range(20, 25)}
    files = {f"comparisons/{split}/0000.parquet": list(map(comparison, some)) for split, some in splits.items()}
    axis = {"axis/validation/0000.parquet": [{"info": 1}]}
    dataset_hub.publish("openai/summarize_from_feedback", files | axis, CONVERTED)
    data = tldr(None, None, 0.1, "error")
    assert [len(data.preferences[split]) for split in ("train", "validation")] == [20, 5]


def test_the_hub_keeps_converted_data_in_folders(tmp_path):
    """The layout of its branch refs/convert/parquet, read by the library itself: folders, and no configurations."""
    for folder, split, rows in (("comparisons", "train", range(3)), ("comparisons", "validation", range(3, 5))):
        (tmp_path / folder / split).mkdir(parents=True)
        datasets.Dataset.from_list(list(map(comparison, rows))).to_parquet(tmp_path / folder / split / "0000.parquet")
    (tmp_path / "axis" / "test").mkdir(parents=True)
    datasets.Dataset.from_list([{"other": 1}]).to_parquet(tmp_path / "axis" / "test" / "0000.parquet")
    for split, size in (("train", 3), ("validation", 2)):
        found = read(replace(FROM_FEEDBACK, path=str(tmp_path), split=split), dict)
        assert [row["info"]["title"][:5] for _, row in found.records] == ["Title"] * size


def post(number: int, **other) -> dict:
    """A row of SHP as it is published."""
    row = {
        "post_id": f"qt3nx{number}",
        "domain": "askculinary_train",
        "upvote_ratio": 0.98,
        "history": f"Post {number}?",
    }
    sides = {"c_root_id": "h", "created_at_utc": 1636822112, "score": 340, "human_ref": "Comment A."}
    row |= {f"{name}_A": value for name, value in sides.items()}
    row |= {f"{name}_B": value for name, value in (sides | {"score": 166, "human_ref": "Comment B."}).items()}
    return row | {"labels": 1, "seconds_difference": 11194.0, "score_ratio": 2.048} | other


def question(number: int, **other) -> dict:
    """A comparison of WebGPT as it is published."""
    quotes = {"title": ["Clouds (nasa.gov)"], "extract": ["Clouds are water."]}
    tokens = {"prefix": [464, 6766], "completion": [9771, 318]}
    row = {"question": {"dataset": "eli5", "id": f"a{number}", "full_text": f"Why {number}?"}}
    for side, score in ((0, 0.25), (1, -0.25)):
        row |= {f"quotes_{side}": quotes, f"answer_{side}": f"Answer {side} [1]", f"tokens_{side}": tokens}
        row |= {f"score_{side}": score}
    return row | other


def asked(number: int, **other) -> dict:
    """A question of HC3 as it is published."""
    answers = {"human_answers": ["A person's.", "Another's."], "chatgpt_answers": ["A model's."]}
    return {"id": str(number), "question": f"Why {number}?", **answers, "source": "reddit_eli5"} | other


def ratio_2(*given):
    return shp(given[0], given[1], 2.0, False, *given[2:])


def of_people(*given):
    return hc3(given[0], given[1], "human", False, *given[2:])


def in_text(*given):
    return webgpt(given[0], given[1], False, *given[2:])


ANSWERED = {  # reader -> a row, rows with the pair each makes, those that make none, and those that are no rows
    ratio_2: (
        post,
        [({}, ("A", "B")), ({"labels": 0, "score_A": 3, "score_B": 6}, ("B", "A")), ({"score_A": 332}, ("A", "B"))],
        [
            ({"score_A": 331}, "the scores are closer than 2 to 1"),
            ({"score_B": 0}, "the scores are closer than 2 to 1"),
        ],
        [{"labels": 2}, {"history": None}, {"human_ref_B": 3}, {"score_A": None}, {"score_A": "3"}, {"labels": None}],
    ),
    in_text: (
        question,
        [({}, ("0", "1")), ({"score_0": -1.0, "score_1": 1.0}, ("1", "0"))],
        [({"score_0": 0.0, "score_1": 0.0}, "neither answer is better")],
        [{"question": "Why?"}, {"question": None}, {"answer_0": None}, {"score_1": None}, {"score_1": float("nan")}],
    ),
    of_people: (
        asked,
        [({}, ("A person's", "A model's"))],
        [({"human_answers": []}, "one side has no answer"), ({"chatgpt_answers": []}, "one side has no answer")],
        [{"question": None}, {"human_answers": "A."}, {"chatgpt_answers": [None]}, {"human_answers": None}],
    ),
}
SAID = {ratio_2: " Comment {}.", in_text: " Answer {} [1]", of_people: " {}."}
ASKED = {ratio_2: "Post {}?", in_text: "Why {}?", of_people: "Why {}?"}


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "saved"])
@pytest.mark.parametrize("reader", ANSWERED, ids=lambda reader: reader.__name__)
def test_answers_to_a_question_to_the_letter(tmp_path, capsys, reader, kind):
    made, pairs, none, _ = ANSWERED[reader]
    rows = [made(number, **other) for number, (other, _) in enumerate([*pairs, *none])]
    rows += [made(number) for number in range(len(rows), 30)]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        save(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    data = reader(str(path), None, 0.1, "drop")
    found = {pair.prompt: (pair.chosen, pair.rejected) for some in data.preferences.values() for pair in some}
    for number, (_, (chosen, rejected)) in enumerate(pairs):
        prompt = f"\n\nHuman: {ASKED[reader].format(number)}\n\nAssistant:"
        assert found[prompt] == (SAID[reader].format(chosen), SAID[reader].format(rejected))
    assert len(found) == 30 - len(none)
    said = capsys.readouterr().out
    assert f"{len(none)} of 30 pairs are faulty, {len(none)} dropped ({len(none)} x {none[0][1]}" in said


@pytest.mark.parametrize("reader", ANSWERED, ids=lambda reader: reader.__name__)
def test_what_is_no_answer_to_a_question(tmp_path, reader):
    made, _, _, wrong = ANSWERED[reader]
    path = save(tmp_path / "a.jsonl", [made(0), *(made(number, **other) for number, other in enumerate(wrong))])
    with pytest.raises(
        ValueError, match=f"{len(wrong)} of {len(wrong) + 1} lines are no records:\n  line 2: must have"
    ):
        reader(path, None, 0.1, "keep")


def test_answers_as_chat_and_whose_is_preferred(tmp_path):
    rows = save(tmp_path / "a.jsonl", [asked(number) for number in range(9)])
    data = hc3(rows, None, "chatgpt", True, 0.3, "error")
    for pair in data.preferences["train"]:
        assert [message["role"] for message in pair.prompt] == ["user"]
        assert pair.prompt[0]["content"].startswith("Why ")
        assert pair.chosen == [{"role": "assistant", "content": "A model's."}]
        assert pair.rejected == [{"role": "assistant", "content": "A person's."}]
    closer = save(tmp_path / "b.jsonl", [post(n, score_A=200) for n in range(9)])
    assert sum(map(len, shp(closer, None, 1.0, False, 0.3, "error").preferences.values())) == 9


@pytest.mark.parametrize(
    "reader,made,name,revision,files",
    [
        (ratio_2, post, "stanfordnlp/SHP", "main", ["askhr/train.json", "askhr/validation.json"]),
        (in_text, question, "openai/webgpt_comparisons", CONVERTED, ["default/train/0000.parquet"]),
        (of_people, asked, "Hello-SimpleAI/HC3", CONVERTED, ["all/train/0000.parquet"]),
    ],
    ids=["shp", "webgpt", "hc3"],
)
def test_where_they_are_published(dataset_hub, reader, made, name, revision, files):
    """There, at another revision of it and in a copy of it here, where another folder has other rows; and elsewhere."""
    rows = [[made(number) for number in range(20 * nth, 20 * nth + 20 - 7 * nth)] for nth, _ in enumerate(files)]
    published = dict(zip(files, rows, strict=True))
    beside = {} if revision == "main" else {"finance/train/0000.parquet": [made(number) for number in range(90, 99)]}
    commit = dataset_hub.publish(name, published | beside, revision)
    dataset_hub.publish("someone/copy", {Path(file).name: some for file, some in published.items()} if not beside else
                        {"train.parquet": rows[0]})  # fmt: skip
    for path in (None, f"{name}@{commit}", str(dataset_hub.folder(name, commit)), "someone/copy"):
        data = reader(path, None, 0.1, "error")
        assert sum(map(len, data.preferences.values())) == sum(map(len, rows))
        assert bool(data.revisions) == (path is None or "/hub/" not in path)
    if len(files) == 2:
        assert len(data.preferences["validation"]) == len(rows[1])
