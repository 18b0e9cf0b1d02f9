"""Texts of other makers in our form: plain text as chat messages, and messages under ShareGPT's names."""

import json

import pytest
from datasets import Dataset

from dpo.data.demonstrations import sft
from dpo.data.hub import unpaired
from dpo.data.mixture import mixture
from dpo.data.prompts import prompts
from dpo.data.ranked import ranked
from dpo.data.records import file
from dpo.data.texts import as_chat, same_names


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


FOUR = assistant("4")
SYSTEM = {"role": "system", "content": "Be brief."}
PAIR = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "id": "x"}
CHAT = {"prompt": [user("2 + 2?")], "chosen": [assistant("4")], "rejected": [assistant("5")], "id": "x"}
TURNS = {"messages": [user("2 + 2?"), FOUR]}
WHOLE = {"prompt": "2 + 2?", "chosen": [user("2 + 2?"), assistant("4")], "rejected": [user("2 + 2?"), assistant("5")]}


@pytest.mark.parametrize(
    "row,made",
    [
        (PAIR, CHAT),
        (PAIR | {"system": "Be brief."}, CHAT | {"prompt": [SYSTEM, user("2 + 2?")]}),
        (PAIR | {"system": ""}, CHAT),
        (PAIR | {"system": None}, CHAT),
        (CHAT, CHAT),
        (PAIR | {"prompt": [SYSTEM, user("2 + 2?")]}, CHAT | {"prompt": [SYSTEM, user("2 + 2?")]}),
        (CHAT | {"system": "Be brief."}, CHAT | {"prompt": [SYSTEM, user("2 + 2?")]}),
        (CHAT | {"system": 7}, CHAT | {"system": 7}),  # is refused, by its name
        (CHAT | {"prompt": [SYSTEM], "system": "Be bold."}, CHAT | {"prompt": [SYSTEM], "system": "Be bold."}),  # too
        (
            WHOLE | {"system": "Be brief."},
            {"prompt": "2 + 2?", **{name: [SYSTEM, *WHOLE[name]] for name in ("chosen", "rejected")}},
        ),
        (TURNS | {"system": "Be brief."}, {"messages": [SYSTEM, *TURNS["messages"]]}),
        (TURNS, TURNS),
        (WHOLE, WHOLE),
        ({"prompt": "a", "completion": "4", "label": 1}, {"prompt": [user("a")], "completion": [FOUR], "label": 1}),
        ({"prompt": 3, "responses": ["4", [FOUR], 5]}, {"prompt": 3, "responses": [[FOUR], [FOUR], 5]}),  # is refused
    ],
)  # fmt: skip
def test_plain_text_as_chat(row, made):
    assert as_chat(row) == made


def test_names_of_others():
    theirs = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    ours = [SYSTEM, user("a"), assistant("b")]
    assert same_names({"prompt": theirs, "n": 3, "empty": []}) == {"prompt": ours, "n": 3, "empty": []}
    assert same_names({"chosen": theirs[2]}) == {"chosen": [assistant("b")]}  # one message alone, in no list
    weighted = {"from": "tool", "value": "a", "weight": 0}  # refused as another's message with a weight is
    assert same_names({"prompt": [weighted]}) == {"prompt": [{"role": "tool", "content": "a", "weight": 0}]}
    for kept in ([user("a")], [{"from": "x"}], [{"role": "user", "content": "a", "from": "x", "value": "y"}], ["a", 3]):
        assert same_names({"prompt": kept}) == {"prompt": kept}
    assert same_names({"prompt": {"from": "x"}}) == {"prompt": {"from": "x"}}
    elsewhere = {"meta": {"from": ["x"], "value": 1}, "prompt": [{"from": ["x"], "value": 1}]}
    assert same_names(elsewhere) == elsewhere
    assert same_names({"responses": [[theirs[2]], theirs[2]]}) == {"responses": [[assistant("b")]] * 2}


def save(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def plain(n: int) -> dict:
    one = {
        "prompt": f"{n}?",
        "chosen": f"yes {n}",
        "rejected": f"no {n}",
        "completion": f"yes {n}",
        "label": n % 2 == 0,
    }
    return (
        one | {"responses": [f"a {n}", f"b {n}"], "scores": [n % 3, 1.5]} | ({"system": "Be brief."} if n % 4 else {})
    )


def by_hand(n: int) -> dict:
    row = plain(n)
    before = [SYSTEM] if row.pop("system", "") else []
    said = {name: [assistant(row[name])] for name in ("chosen", "rejected", "completion")}
    return (
        row | said | {"prompt": [*before, user(f"{n}?")], "responses": [[assistant(f"a {n}")], [assistant(f"b {n}")]]}
    )


READERS = {
    "file": lambda path, **chat: file(path, None, 0.3, "error", **chat),
    "ranked": lambda path, **chat: ranked(path, None, "all", 0.3, "error", **chat),
    "unpaired": lambda path, **chat: unpaired(path, None, "none", 0.3, "error", **chat),
    "prompts": lambda path, **chat: prompts(path, None, 0, 3, 3, "error", **chat),
    "sft": lambda path, **chat: sft(path, None, "last", 0.3, "error", **chat),
    "mixture": lambda path, **chat: mixture([{"path": path, **chat}], 0.3, "error"),
}


@pytest.mark.parametrize("kind", READERS)
def test_every_reader_makes_chats_of_text(tmp_path, kind):
    texts, chats = (save(tmp_path / f"{made.__name__}.jsonl", map(made, range(24))) for made in (plain, by_hand))
    found, expected = READERS[kind](texts, chat=True), READERS[kind](chats)
    assert found == expected
    assert not any(isinstance(prompt, str) for some in found.prompts.values() for prompt in some)
    assert READERS[kind](chats, chat=True) == expected  # what is a chat stays one


@pytest.mark.parametrize("kind", [kind for kind in READERS if kind != "mixture"])
def test_every_reader_knows_the_names_of_others(tmp_path, kind):
    def theirs(n: int) -> dict:
        row = by_hand(n)
        named = {"user": "human", "assistant": "gpt", "system": "system"}
        said = {name: value for name, value in row.items() if isinstance(value, list) and isinstance(value[0], dict)}

        def turned(messages: list) -> list:
            return [{"from": named[one["role"]], "value": one["content"]} for one in messages]

        return (
            row
            | {name: turned(messages) for name, messages in said.items()}
            | {"responses": [*map(turned, row["responses"])]}
        )

    ours, others = (save(tmp_path / f"{made.__name__}.jsonl", map(made, range(24))) for made in (by_hand, theirs))
    assert READERS[kind](others) == READERS[kind](ours)


def test_what_the_system_says_in_a_csv_file_is_text(tmp_path):
    """Though a reader of tables may take it for a number."""
    rows = [{"system": "7", "prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(9)]
    Dataset.from_list(rows).to_csv(tmp_path / "a.csv")
    data = file(str(tmp_path / "a.csv"), None, 0.3, "error", chat=True)
    assert {pair.prompt[0]["content"] for pair in data.preferences["train"]} == {"7"}


def test_a_prompt_that_is_no_column_is_no_turn(tmp_path):
    path = save(tmp_path / "a.jsonl", [{"chosen": f"{n}? yes", "rejected": f"{n}? no"} for n in range(9)])
    with pytest.raises(ValueError, match=r"data\.chat=true makes .* column prompt, found data\.prompt=implicit; drop"):
        file(path, None, 0.3, "error", prompt="implicit", chat=True)
