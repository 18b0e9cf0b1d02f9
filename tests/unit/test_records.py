"""Records survive a round trip, faults are counted and named, and no prompt is on both sides of a split."""

import gzip
import hashlib
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data.records import (
    Dataset,
    Demonstration,
    Preference,
    TokenIds,
    distinct,
    file,
    filter_pairs,
    parse,
    read,
    split_pairs,
    write,
)
from dpo.data.texts import HUMAN, TURN, Text

text = st.text(st.characters(exclude_categories=["Cs"]))
turns = st.lists(text.map(lambda words: {"role": "user", "content": words}), min_size=1, max_size=3)
answer = text.map(lambda words: [{"role": "assistant", "content": words}])
preferences = st.one_of(
    st.builds(Preference, text, text, text, st.booleans(), st.booleans()),
    st.builds(Preference, turns, st.one_of(text, answer), st.one_of(text, answer)),
)


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(prompt="p", chosen="c", rejected="r", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def pairs(n):
    return [Preference(f"prompt {i}", "good", "bad") for i in range(n)]


@settings(max_examples=50, deadline=None)
@given(st.lists(preferences, min_size=1, max_size=5), st.sampled_from(["a.jsonl", "a.jsonl.gz"]))
def test_what_is_written_is_read(some, name):
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, name), some)
        assert read(Path(folder, name)) == some
        assert [path.name for path in Path(folder).iterdir()] == [name]


def test_whitespace_and_line_separators_stay(tmp_path):
    odd = [Preference(" a\u2028b\r\n", "\tc\u0085 ", "\n\n ☃🜚 \u0000")]
    write(tmp_path / "odd.jsonl", odd)
    assert read(tmp_path / "odd.jsonl") == odd


def test_gz_is_plain_gzip_and_equal_for_equal_records(tmp_path):
    write(tmp_path / "a.jsonl.gz", pairs(3))
    written = (tmp_path / "a.jsonl.gz").read_bytes()
    assert written[3:8] == bytes(5)  # neither name nor time
    assert json.loads(gzip.decompress(written).splitlines()[0]) == row("prompt 0", "good", "bad")


def test_unicode_is_written_to_be_read_by_people(tmp_path):
    write(tmp_path / "a.jsonl", [Preference("☃", "é", "r")])
    assert "☃" in (tmp_path / "a.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_failed_write_leaves_what_was_there(tmp_path, name):
    write(tmp_path / name, pairs(2))

    def broken():
        yield from pairs(100)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / name, broken())
    assert read(tmp_path / name) == pairs(2)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_files_of_other_makers(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row(score=3, metadata={"a": None})).encode() + b"\r\n\r\n  \n")
    chat = row(
        [{"role": "user", "content": "hi", "name": None, "tool_calls": []}],
        [{"role": "assistant", "content": "ho"}],
        "he",
    )
    path.write_bytes(path.read_bytes() + json.dumps(chat).encode())  # no line end
    assert read(path) == [
        Preference("p", "c", "r"),
        Preference([{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "ho"}], "he"),
    ]


DIALOGUE = "\n\nHuman: hi\n\nAssistant:"
HINTED = "must have prompt, chosen and rejected; found "
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ('{"prompt": "p", ', "no JSON"),
        ('"text"', "must be a JSON object, found text"),
        ("[1]", "must be a JSON object, found a list"),
        ({"prompt": "p", "chosen": "c"}, "must have prompt, chosen and rejected; found no rejected"),
        ({"question": "p"}, "must have prompt, chosen and rejected; found no prompt and no chosen and no"),
        (row(chosen=None), "chosen must be text or a list of chat messages, found null"),
        (row(rejected=3.5), "rejected must be text or a list of chat messages, found a number"),
        (row(prompt={"role": "user"}), "prompt must be text or a list of chat messages, found an object"),
        (row(prompt=[]), "prompt must hold at least one chat message"),
        (row(prompt=["hi"]), "prompt: message 1 must be"),
        (row(prompt=[USER, {"role": "user"}]), "prompt: message 2 must be"),
        (row(prompt=[USER, {"role": "user", "content": None}]), "prompt: message 2 must be"),
        (row(prompt=[USER, ASSISTANT]), "prompt must end before the assistant's turn"),
        (row(prompt=[USER], chosen=[USER, ASSISTANT]), "chosen must be one message of the assistant"),
        (row(prompt=[USER], rejected=[USER]), "rejected must be one message of the assistant"),
        (row(None, [USER, ASSISTANT], [ASSISTANT, ASSISTANT]), "chosen and rejected must be one conversation up to"),
        (row([ASSISTANT, USER], *[[USER, ASSISTANT]] * 2), "chosen must be one message of the assistant"),
        (row(7, *[[USER, ASSISTANT]] * 2), "prompt must be text or a list of chat messages, found a number"),
        (row(prompt="hi", chosen=[ASSISTANT]), "chosen is chat messages, so prompt must be, too"),
        (row([USER | {"name": "Ann"}]), "prompt: message 1 must have a role and a content and nothing else"),
        (row([USER], [ASSISTANT | {"tool_calls": [{}], "x": 0}]), "chosen: message 1 must have a role and a content"),
        (row(tools=[{"type": "function"}]), "must say all that the policy reads in prompt, found tools"),
        (row(system="Be brief."), "must say all that the policy reads in prompt, found system"),
        ("[" * 100_000, "nested too deeply"),
        ('{"x":' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ({"chosen": DIALOGUE + " a", "rejected": DIALOGUE + " b"}, HINTED + "no prompt; dialogues like those of"),
        (
            {"prompt": "p", "completion": "c", "label": True},
            HINTED + "no chosen and no rejected; single responses with a",
        ),
        ({"messages": [USER, ASSISTANT]}, HINTED + "no prompt and no chosen and no rejected; this is data of demonstr"),
        (
            {"question": "p", "chosen": "c", "text": "t"},
            HINTED + "no prompt and no rejected among question, chosen, text; data.columns={prompt:NAME} reads one of",
        ),
        ({"chosen": "p c", "rejected": "p r"}, HINTED + "no prompt; texts that begin with their prompt are read with"),
        ({"prompt": "p", "completion": "c"}, HINTED + "no chosen and no rejected; this is data of demonstr"),
        (row(chosen_ended="no"), "chosen_ended and rejected_ended must be true or false"),
        ('{"prompt": "p", "chosen": "\\ud83d", "rejected": "r"}', "chosen must be Unicode"),
    ],
)
def test_each_malformed_record_is_named(tmp_path, bad, complaint):
    with pytest.raises(ValueError, match="1 of 2 lines") as error:
        read(lines(tmp_path / "bad.jsonl", row(), bad))
    assert f"line 2: {complaint}" in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        *("tools", "functions", "documents", "images", "videos", "audios", "system", "system_prompt", "history"),
        *("chat_template_kwargs", "chat_template"),
    ],
)
def test_what_other_formats_have_a_policy_read_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"must say all that the policy reads in prompt, found {name}, too"):
        read(lines(tmp_path / "a.jsonl", row() | {name: "x"}))
    assert read(lines(tmp_path / "a.jsonl", row() | {name: None})) == [Preference("p", "c", "r")]


def test_each_column_is_where_it_belongs(tmp_path):
    """Text, messages, and conversations of several turns, whatever `prompt` says beside them; ends and tokens."""
    asked = [{"role": "system", "content": " Be brief. "}, USER, ASSISTANT, USER]
    good, bad = ([{"role": "assistant", "content": words}] for words in (" yes\n", "no"))
    ids = {"tokenizer": "t", "prompt": [1], "chosen": [2, 3], "rejected": [4]}
    found = read(
        lines(
            tmp_path / "a.jsonl",
            row(chosen_ended=False),
            row(rejected_ended=False, token_ids=ids),
            row(asked, good, bad),
            *(row(prompt, asked + good, asked + bad) for prompt in (None, "hi", asked)),
        )
    )
    assert found == [
        Preference("p", "c", "r", chosen_ended=False, rejected_ended=True),
        Preference("p", "c", "r", True, False, token_ids=TokenIds("t", prompt=[1], chosen=[2, 3], rejected=[4])),
        *[Preference(asked, good, bad)] * 4,
    ]
    assert [pair.source for pair in found] == [f"{tmp_path / 'a.jsonl'}, line {n}" for n in range(1, 7)]


def test_a_file_is_split_by_the_share_that_is_asked_for(tmp_path):
    write(tmp_path / "a.jsonl", [Preference(f"{n}", "a", "b", n % 2 == 0) for n in range(200)])
    data = file(str(tmp_path / "a.jsonl"), None, 0.5, "keep")
    train, held_out = (data.preferences[split] for split in ("train", "validation"))
    assert 70 < len(held_out) < 130
    assert data.prompts == {
        "train": [pair.prompt for pair in train],
        **{split: [pair.prompt for pair in held_out] for split in ("validation", "test")},
    }
    assert [(one.prompt, one.ended, one.source) for one in data.demonstrations] == [
        (pair.prompt, pair.chosen_ended, pair.source) for pair in train
    ]
    assert data.on_faulty == "keep"


def test_malformed_lines_are_counted_and_the_first_few_listed(tmp_path):
    rows = [row() if number % 2 else {"prompt": "p"} for number in range(1, 21)]
    with pytest.raises(ValueError) as error:
        read(lines(tmp_path / "bad.jsonl", *rows))
    message = str(error.value)
    assert "bad.jsonl: 10 of 20 lines" in message
    assert [f"line {number}:" in message for number in (2, 4, 6, 8, 10, 12)] == [True] * 5 + [False]
    assert "and 5 more" in message


def test_broken_files(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(row("caf\xe9"), ensure_ascii=False).encode("latin-1"))
    with pytest.raises(ValueError, match="line 1: no UTF-8"):
        read(tmp_path / "latin.jsonl")
    write(tmp_path / "whole.jsonl.gz", pairs(1000))
    (tmp_path / "half.jsonl.gz").write_bytes((tmp_path / "whole.jsonl.gz").read_bytes()[:-30])
    with pytest.raises(ValueError, match="whole gzip file"):
        read(tmp_path / "half.jsonl.gz")
    lines(tmp_path / "plain.jsonl.gz", row())
    with pytest.raises(ValueError, match="whole gzip file"):
        read(tmp_path / "plain.jsonl.gz")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match="at least one record"):
        read(tmp_path / "empty.jsonl")
    for absent in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(ValueError, match="check the path"):
            read(absent)


FAULTY = [
    ("line 1", Preference("a", "c", "r")),
    ("line 2", Preference("b", " \n", "r")),
    ("line 3", Preference("c", "", "")),
    ("line 4", Preference("d", "same", "same")),
    ("line 5", "no pair at all"),
    ("line 6", Preference("e", "same", "same", chosen_ended=False)),  # the end tells them apart
    ("line 7", Preference([USER], [ASSISTANT], "ho")),
]


def test_faulty_pairs_stop_the_run_with_their_lines():
    with pytest.raises(ValueError) as error:
        filter_pairs(FAULTY, "error", "x.jsonl")
    message = str(error.value)
    assert "x.jsonl: 5 of 7 pairs are faulty" in message
    for complaint in (
        "line 2: chosen is empty",
        "line 3: chosen and rejected are empty",
        "line 4: chosen and rejected are the same",
        "line 5: no pair at all",
        "line 7: chosen and rejected are the same",
        "on_faulty=drop",
    ):
        assert complaint in message


def test_faulty_pairs_are_dropped_or_kept_by_count(capsys):
    assert filter_pairs(FAULTY, "drop", "x.jsonl") == [FAULTY[0][1], FAULTY[5][1]]
    assert "5 of 7 pairs are faulty, 5 dropped (2 x chosen and rejected are the same, " in capsys.readouterr().out
    assert filter_pairs(FAULTY, "keep", "x.jsonl") == [pair for _, pair in FAULTY if isinstance(pair, Preference)]
    assert "5 of 7 pairs are faulty, 1 dropped" in capsys.readouterr().out
    assert filter_pairs(FAULTY[:1], "error", "x.jsonl") == [FAULTY[0][1]]
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="on_faulty"):
        filter_pairs(FAULTY, "ignore", "x.jsonl")
    with pytest.raises(ValueError, match="all of them faulty"):
        filter_pairs(FAULTY[1:3], "drop", "x.jsonl")


def test_parse_names_lines_past_blank_ones(tmp_path):
    assert parse(lines(tmp_path / "a.jsonl", {"a": 1}, "", {"a": 2}), lambda row: row["a"]) == [
        ("line 1", 1),
        ("line 3", 2),
    ]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=30, max_size=200), st.randoms())
def test_split_goes_by_prompt_alone(numbers, chance):
    some = [Preference(f"prompt {number}", f"c{i}", "r") for i, number in enumerate([*numbers, *range(30)])]
    data = split_pairs(some, None, 0.3)
    train, validation = ({pair.prompt for pair in data.preferences[split]} for split in ("train", "validation"))
    assert not train & validation
    assert [pair for pair in some if pair.prompt in train] == data.preferences["train"]
    assert [pair for pair in some if pair.prompt in validation] == data.preferences["validation"]
    shuffled = chance.sample(some, len(some)) + pairs(100)
    again = split_pairs(shuffled, None, 0.3)
    assert train <= {pair.prompt for pair in again.preferences["train"]}
    assert validation <= {pair.prompt for pair in again.preferences["validation"]}


def test_split_takes_about_the_share_asked_for():
    data = split_pairs(pairs(2000), None, 0.1)
    assert 150 < len(data.preferences["validation"]) < 250
    assert sum(map(len, data.preferences.values())) == 2000


def test_split_is_the_same_in_every_process():
    names = [pair.prompt for pair in split_pairs(pairs(30), None, 0.2).preferences["validation"]]
    assert names == [
        "prompt 4",
        "prompt 7",
        "prompt 9",
        "prompt 13",
        "prompt 14",
        "prompt 16",
        "prompt 20",
        "prompt 26",
    ]  # of this hash, for good


def dialogue(begins: str, turns: int, chat: bool) -> Text:
    """A prompt that ends in the user's turn of this number."""
    said = [begins, *(f"turn {n} of {begins}" for n in range(2 * turns - 2))]
    if not chat:
        return "".join(f"{(HUMAN, TURN)[place % 2]} {text}" for place, text in enumerate(said)) + TURN
    roles = ["user", "assistant"] * turns
    system = {"role": "system", "content": "Be brief."}
    return [system, *({"role": role, "content": text} for role, text in zip(roles, said, strict=False))]


@pytest.mark.parametrize("chat", [False, True])
def test_a_conversation_is_on_one_side(chat):
    """Its first turn decides, and so where a single turn has always been."""
    prompts = {n: [dialogue(f"Who is number {n}?", turns, chat) for turns in (1, 2, 4)] for n in range(40)}
    some = [Preference(prompt, "good", "bad") for three in prompts.values() for prompt in three]
    data = split_pairs(some, None, 0.3)
    held_out = [pair.prompt for pair in data.preferences["validation"]]
    assert {sum(prompt in held_out for prompt in three) for three in prompts.values()} == {0, 3}
    single = split_pairs(some[::3], None, 0.3).preferences["validation"]
    assert [pair.prompt for pair in single] == held_out[::3]
    places = [hashlib.sha256(json.dumps(three[0], sort_keys=True).encode()).hexdigest() for three in prompts.values()]
    assert held_out[::3] == [prompts[n][0] for n, place in enumerate(places) if int(place[:12], 16) / 2**48 < 0.3]
    with pytest.raises(ValueError, match="found 3 pairs whose prompts all begin alike"):
        split_pairs(some[:3], None, 0.3)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_share_must_be_one(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_pairs(pairs(30), None, fraction)


@pytest.mark.parametrize("fraction", [1e-9, 0.05, 0.5, 0.999999999])
@pytest.mark.parametrize("n", [2, 3, 7])
def test_a_split_has_a_prompt_on_either_side(n, fraction):
    data = split_pairs([*pairs(n), *pairs(n)], None, fraction)
    train, validation = ({pair.prompt for pair in data.preferences[split]} for split in ("train", "validation"))
    assert train
    assert validation
    assert not train & validation
    assert sum(map(len, data.preferences.values())) == 2 * n
    again = split_pairs(pairs(n)[::-1], None, fraction)
    assert {pair.prompt for pair in again.preferences["validation"]} == validation


def test_split_without_one_side_says_what_to_do():
    with pytest.raises(ValueError, match=r"data\.validation_path"):
        split_pairs(pairs(1), None, 0.05)


def test_file_gives_demonstrations_pairs_and_prompts(tmp_path, capsys):
    train = lines(
        tmp_path / "train.jsonl",
        row("a", "1", "2"),
        row("a", "3", "4", chosen_ended=False),
        row("b", "5", "6"),
        row("c", "", "6"),
    )
    held_out = lines(tmp_path / "held_out.jsonl", row("b", "7", "8"), row("d", "7", "8"), row("d", "9", "8"))
    assert file(str(train), str(held_out), 0.05, "drop") == Dataset(
        demonstrations=[Demonstration("a", "1"), Demonstration("a", "3", ended=False), Demonstration("b", "5")],
        preferences={
            "train": [
                Preference("a", "1", "2"),
                Preference("a", "3", "4", chosen_ended=False),
                Preference("b", "5", "6"),
            ],
            "validation": [Preference("b", "7", "8"), Preference("d", "7", "8"), Preference("d", "9", "8")],
        },
        prompts={"train": ["a", "b"], "validation": ["b", "d"], "test": ["b", "d"]},
        on_faulty="drop",
        written={"test": ["7", "7"]},
    )
    printed = capsys.readouterr().out
    assert "train.jsonl: 1 of 4 pairs are faulty, 1 dropped (1 x chosen is empty)" in printed
    assert "1 of 3 validation pairs have a prompt of the training pairs" in printed
    with pytest.raises(ValueError, match=r"train\.jsonl: 1 of 4"):
        file(str(train), str(held_out), 0.05, "error")


def test_distinct_knows_chats_by_content():
    chats = [[{"role": "user", "content": "a"}], [{"content": "a", "role": "user"}], "a", "b", "a"]
    assert distinct(chats) == [chats[0], "a", "b"]
