"""Articles to summarize, in the form in which CNN/DailyMail is published."""

import gzip
import json

import pytest

from dpo.data.prompts import alpaca_eval, cnn_dailymail, prompts

ROWS = [{"article": f" (CNN) Story {n} . ", "highlights": f"Story {n} .\nShort .", "id": f"{n:040x}"} for n in range(9)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "articles.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in [*ROWS, ROWS[3]]).encode()))
    return str(path)


def test_an_article_is_asked_for_in_one_turn(file):
    data = cnn_dailymail(file, "Be brief.", None, 0, 2, 3, "drop")
    assert {split: len(some) for split, some in data.prompts.items()} == {"test": 3, "validation": 2, "train": 4}
    every = [prompt for some in data.prompts.values() for prompt in some]
    assert sorted(prompt[0]["content"] for prompt in every) == [f"Be brief.\n\n(CNN) Story {n} ." for n in range(9)]
    assert all([turn["role"] for turn in prompt] == ["user"] for prompt in every)
    for split, some in data.prompts.items():
        for prompt, written in zip(some, data.written_to(some, split), strict=True):
            assert (
                written == prompt[0]["content"].removeprefix("Be brief.\n\n(CNN) ").removesuffix(" .") + " .\nShort ."
            )


def test_a_row_without_a_prompt_is_told_by_its_columns(tmp_path):
    (path := tmp_path / "asked.jsonl").write_text('{"question": "a", "id": 1}\n')
    with pytest.raises(ValueError, match=r"must have prompt; found no prompt among question, id; data\.columns=\{"):
        prompts(str(path), None, 0, 1, 1, "drop")
    rows = [{"question": f"{n}?", "id": n} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prompts(str(path), None, 0, 1, 1, "drop", columns={"prompt": "question"})
    assert sorted(one for some in data.prompts.values() for one in some) == [row["question"] for row in rows]


def test_parts_share_no_article(file):
    parts = [cnn_dailymail(file, "Be brief.", 2, part, 2, 3, "drop") for part in range(2)]
    assert parts[0].prompts["test"] == parts[1].prompts["test"]
    one, other = ({json.dumps(prompt) for prompt in part.prompts["train"]} for part in parts)
    assert len(one | other) == 4
    with pytest.raises(ValueError, match=r"must have 3 prompts for test, 2 for validation, and part 2, .* found 9"):
        cnn_dailymail(file, "Be brief.", 2, 2, 2, 3, "drop")


def test_rows_come_from_the_hub_where_there_is_no_file(dataset_hub):
    """Of its last version alone, of which a copy has the others, too."""
    versions = ("1.0.0", "2.0.0", "3.0.0")
    files = {f"{one}/train-00000-of-00001.parquet": ROWS if one == "3.0.0" else ROWS[:5] for one in versions}
    files |= {f"{one}/test-00000-of-00001.parquet": ROWS[:1] for one in versions}
    configs = [f"- config_name: {one}\n  data_files:\n  - split: train\n    path: {one}/train-*\n" for one in versions]
    files["README.md"] = f"---\nconfigs:\n{''.join(configs)}---\n"
    commit = dataset_hub.publish("abisee/cnn_dailymail", files)
    dataset_hub.publish("someone/copy", {"train.parquet": ROWS})
    here = str(dataset_hub.folder("abisee/cnn_dailymail", commit))
    for path in (None, f"abisee/cnn_dailymail@{commit}", here, "someone/copy"):
        assert len(cnn_dailymail(path, "Be brief.", None, 0, 2, 3, "drop").prompts["train"]) == 4
    assert not [asked for asked in dataset_hub.asked if "1.0.0" in asked]


@pytest.mark.parametrize("row", [{"text": "x"}, {"article": "x"}, {"article": " ", "highlights": "x"}, {"article": 3}])
def test_what_is_no_article_is_named(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"line 2.*must have an article and its highlights, found"):
        cnn_dailymail(str(tmp_path / "a.jsonl"), "Be brief.", None, 0, 0, 0, "drop")


def test_instructions_of_alpaca_eval_are_a_turn_each(tmp_path, dataset_hub):
    rows = [
        {"dataset": "helpful_base", "instruction": f" Name {n}. ", "output": "x", "generator": "text_davinci_003"}
        for n in range(9)
    ]
    path = tmp_path / "alpaca_eval.json"
    path.write_text(json.dumps(rows))
    data = alpaca_eval(str(path), None, 0, 2, 3, "drop")
    assert {split: len(some) for split, some in data.prompts.items()} == {"test": 3, "validation": 2, "train": 4}
    found = [prompt for some in data.prompts.values() for prompt in some]
    assert sorted(found, key=str) == [[{"role": "user", "content": f" Name {n}. "}] for n in range(9)]
    assert data.preferences == {}
    assert data.demonstrations == []
    files = {"alpaca_eval/eval/0000.parquet": rows, "annotations/eval/0000.parquet": [{"z": 1}]}
    commit = dataset_hub.publish("tatsu-lab/alpaca_eval", files, "refs/convert/parquet")
    for there in (None, f"tatsu-lab/alpaca_eval@{commit}"):
        assert len(alpaca_eval(there, None, 0, 2, 3, "drop").prompts["train"]) == 4
    path.write_text(json.dumps([{"instruction": " "}, {"prompt": "x"}]))
    with pytest.raises(ValueError, match="2 of 2 rows are no records:\n  row 0: must have an instruction in plain"):
        alpaca_eval(str(path), None, 0, 0, 0, "drop")


def test_prompts_in_a_column_of_another_name(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\n" + "".join(f"{n}?,x\n" for n in range(9)))
    data = prompts(str(tmp_path / "a.csv"), None, 0, 2, 3, "error", columns={"prompt": "question"})
    assert sorted(prompt for some in data.prompts.values() for prompt in some) == [f"{n}?" for n in range(9)]
