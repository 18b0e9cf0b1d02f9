"""Demonstrations in the forms of TRL, and UltraChat in its published form."""

import json

import datasets
import pytest

from dpo.data.demonstrations import sft, ultrachat

TURNS = [
    ("system", "Be brief."),
    ("user", "hi"),
    ("assistant", "Hello. "),
    ("user", "How are you?"),
    ("assistant", " Well."),
]


def conversation(number: int, turns=TURNS) -> dict:
    """A row of UltraChat as it is published."""
    messages = [{"content": f"{content} {number}", "role": role} for role, content in turns]
    return {"prompt": messages[len(turns) > 1]["content"], "prompt_id": "f0e37e9f", "messages": messages}


def save(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow", "saved"])
def test_turns_of_a_conversation_to_the_letter(tmp_path, kind):
    rows = [conversation(number) for number in range(8)]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        save(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    if kind == "arrow":
        path /= "data-00000-of-00001.arrow"
    for reader in (sft, ultrachat):
        data = reader(str(path), save(tmp_path / "held.jsonl", [conversation(9)]), "last", 0.3, "error")
        assert data.preferences == {}
        assert len(data.demonstrations) == 8
        for number, shown in enumerate(data.demonstrations):
            messages = rows[number]["messages"]
            assert (shown.prompt, shown.response, shown.ended) == (
                [{"role": one["role"], "content": one["content"]} for one in messages[:4]],
                [{"role": "assistant", "content": f" Well. {number}"}],
                True,
            )
        assert data.prompts["test"] == data.prompts["validation"] == [conversation(9)["messages"][:4]]
        both = reader(str(path), save(tmp_path / "held.jsonl", [conversation(9)]), "all", 0.3, "error").demonstrations
        assert len(both) == 16
        assert both[::2][3].prompt == rows[3]["messages"][:2]
        assert both[::2][3].response == [{"role": "assistant", "content": "Hello.  3"}]
        assert both[1::2] == data.demonstrations


def test_turns_of_a_conversation_are_on_one_side(tmp_path):
    path = save(tmp_path / "rows.jsonl", [conversation(number) for number in range(40)])
    data = sft(path, None, "all", 0.3, "error")
    trained, held_out = ({json.dumps(prompt[:2]) for prompt in data.prompts[split]} for split in ("train", "test"))
    assert not trained & held_out
    assert len(trained) + len(held_out) == 40
    assert (len(data.demonstrations), len(data.prompts["test"])) == (2 * len(trained), 2 * len(held_out))


def test_prompts_and_completions(tmp_path):
    text = [{"prompt": f"{n}?", "completion": f" {n}."} for n in range(20)]
    chat = [
        {"prompt": [{"role": "user", "content": f"{n}?"}], "completion": [{"role": "assistant", "content": f"{n}."}]}
        for n in range(20)
    ]
    for rows in (text, chat):
        data = sft(save(tmp_path / "a.jsonl", rows), None, "last", 0.3, "error")
        found = [{"prompt": one.prompt, "completion": one.response} for one in data.demonstrations]
        assert 8 < len(found) < 20
        assert [row for row in rows if row in found] == found
        assert len(data.prompts["test"]) == 20 - len(found)
    cut = sft(
        save(tmp_path / "a.jsonl", [row | {"completion_ended": False} for row in text]), None, "last", 0.3, "error"
    )
    assert {one.ended for one in cut.demonstrations} == {False}
    (tmp_path / "a.csv").write_text("question,answer\n" + "".join(f"{n}?,{n}\n" for n in range(20)))
    columns = {"prompt": "question", "completion": "answer"}
    named = sft(str(tmp_path / "a.csv"), None, "last", 0.3, "error", columns=columns)
    assert all(one.response == one.prompt[:-1] for one in named.demonstrations)


def test_conversations_without_an_answer_are_counted(tmp_path, capsys):
    rows = [*map(conversation, range(9)), conversation(9, TURNS[:4]), conversation(10, TURNS[:1])]
    rows += [conversation(11, [("assistant", "hi")]), conversation(12) | {"messages": []}]
    empty = conversation(13)
    empty["messages"][-1]["content"] = " "
    data = ultrachat(save(tmp_path / "a.jsonl", [*rows, empty]), None, "last", 0.3, "drop")
    assert len(data.demonstrations) + len(data.prompts["test"]) == 9
    said = capsys.readouterr().out
    assert "5 of 14 demonstrations are faulty, 5 dropped" in said
    assert "4 x the last message is not the assistant's, after another's" in said
    assert "1 x completion is empty" in said
    none = save(tmp_path / "b.jsonl", [conversation(9, TURNS[:4])] * 2)
    for rule, kept in (
        ("error", "2 of 2 demonstrations are faulty"),
        ("drop", "one of the demonstrations must be sound"),
    ):
        with pytest.raises(ValueError, match=kept):
            sft(none, None, "last", 0.3, rule)


@pytest.mark.parametrize(
    "row,said",
    [
        (
            {"text": "The sky is blue."},
            "must have messages, or prompt and completion; found no prompt and no completion",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "found no completion; pairs of chosen and rejected are read by",
        ),
        ({"messages": "hi"}, "messages must be a list of chat messages"),
        ({"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "a"}]}, "message 1 must be"),
        (conversation(0) | {"tools": ["search"]}, "must say all that the policy reads in prompt, found tools"),
        (
            {"messages": [{"role": "user", "content": "a"}, *2 * [{"role": "assistant", "content": "b"}]]},
            "prompt must end before the assistant's turn",
        ),
    ],
)
def test_what_is_no_demonstration(tmp_path, row, said):
    with pytest.raises(ValueError, match="1 of 2 lines are no records:\n  line 2: ") as error:
        sft(save(tmp_path / "a.jsonl", [conversation(0), row]), None, "last", 0.3, "keep")
    assert said in str(error.value)


def test_ultrachat_on_the_hub(dataset_hub):
    splits = {"train_sft": 20, "test_sft": 5, "train_gen": 9, "test_gen": 9}
    files = {f"data/{split}-00000-of-00001.parquet": list(map(conversation, range(n))) for split, n in splits.items()}
    dataset_hub.publish("HuggingFaceH4/ultrachat_200k", files)
    data = ultrachat(None, None, "last", 0.1, "error")
    assert (len(data.demonstrations), len(data.prompts["test"])) == (20, 5)
