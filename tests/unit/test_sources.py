"""Rows are the same whatever they lie in, and a place that is wrong is named."""

import gzip
import json
import os
import shutil

import datasets
import huggingface_hub
import pyarrow
import pytest

from dpo.data.demonstrations import sft
from dpo.data.hub import hh
from dpo.data.records import Measures, Preference, TokenIds, file
from dpo.data.records import row as line
from dpo.data.sources import Source, read, renamed

ROWS = [
    {"prompt": f"{n}?", "chosen": text, "rejected": f" no {n}"}
    for n, text in enumerate(
        ["NA", "null", "007", " spaced ", 'a "quoted", one\nof two lines', "été \U0001f642", "None", "1"]
    )
]
CHATS = [
    {
        "chosen": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Yes."}],
        "rejected": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "No."}],
        "score": 0.5 * n,
    }
    for n in range(8)
]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arrow(path, rows):
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


WRITERS = {
    "rows.jsonl": jsonl,
    "rows.jsonl.gz": lambda path, rows: path.write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    ),
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "rows.json.gz": lambda path, rows: path.write_bytes(gzip.compress(json.dumps(rows).encode())),
    "rows.parquet": lambda path, rows: datasets.Dataset.from_list(rows).to_parquet(path),
    "rows.arrow": arrow,
    "saved": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path),
    "rows.csv": lambda path, rows: datasets.Dataset.from_list(rows).to_csv(path),
}


@pytest.fixture
def write(tmp_path):
    def written(name, rows):
        WRITERS[name](tmp_path / name, rows)
        return str(tmp_path / name)

    return written


@pytest.mark.parametrize("name", WRITERS)
def test_pairs_are_the_same_in_every_kind_of_file(write, name):
    """To the letter: white space, line ends, and texts that a reader of tables takes for numbers or for nothing."""
    data = file(write(name, ROWS), None, 0.3, "error")
    pairs = [pair for split in ("train", "validation") for pair in data.preferences[split]]
    found = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    assert sorted(found, key=str) == sorted(ROWS, key=str)


def test_answers_that_are_numbers_stay_as_they_are_written(tmp_path):
    """Of a table that has nothing else in these columns."""
    (tmp_path / "a.csv").write_text("question,chosen,rejected\n" + "".join(f"{n},00{n},{n}.0\n" for n in range(9)))
    data = file(str(tmp_path / "a.csv"), None, 0.3, "error", columns={"prompt": "question"})
    found = {(pair.prompt, pair.chosen, pair.rejected) for some in data.preferences.values() for pair in some}
    assert found == {(f"{n}", f"00{n}", f"{n}.0") for n in range(9)}


@pytest.mark.parametrize("name", [name for name in WRITERS if not name.endswith(".csv")])
def test_so_are_conversations(write, name):
    data = file(write(name, CHATS), None, 0.3, "error")
    pairs = [pair for split in ("train", "validation") for pair in data.preferences[split]]
    assert sorted(pair.prompt[0]["content"] for pair in pairs) == [f"{n}?" for n in range(8)]
    assert {(pair.chosen[0]["content"], pair.rejected[0]["content"]) for pair in pairs} == {("Yes.", "No.")}


OPTIONAL = [  # of our own lines, each in some alone
    {},
    {"chosen_ended": False},
    {"rejected_ended": False},
    {"token_ids": TokenIds("a tokenizer", [1], [2, 3], [4])},
    {"measures": Measures(1.5, "answers", (2.0, 1.0), (5, 3), True)},
    {"measures": Measures(gap=-0.5, words=(5, 3))},
    {"score_gap": 1.0},
]


@pytest.mark.parametrize("name", WRITERS)
def test_fields_of_some_rows_are_absent_from_the_others(write, name):
    """A table has null there; CSV files have no lists."""
    given = [more for more in OPTIONAL if not name.endswith("csv") or more.keys().isdisjoint({"token_ids", "measures"})]
    pairs = [Preference(f"{n}?", " yes", " no", **more) for n, more in enumerate(given)]
    rows = [line(pair) for pair in pairs]
    rows[-1] |= {"score_chosen": 2.5, "score_rejected": 1.5, "origin": "elsewhere"}
    if "jsonl" not in name:
        names = dict.fromkeys(key for one in rows for key in one)
        rows = [{key: one.get(key) for key in names} for one in rows]
    data = file(write(name, rows), None, 0.3, "error")
    found = {pair.prompt: pair for some in data.preferences.values() for pair in some}
    for pair in pairs:
        assert {**vars(found[pair.prompt]), "source": None} == vars(pair)


@pytest.mark.parametrize("name", ["rows.json", "rows.parquet"])
def test_columns_of_other_rows_are_no_refusal(write, name):
    shown = [{"prompt": f"{n}?", "completion": "a", "messages": None, "completion_ended": None} for n in range(5)]
    chat = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    shown.append({"prompt": None, "completion": None, "messages": chat, "completion_ended": False})
    data = sft(write(name, shown), None, "last", 0.3, "error")
    assert len(data.demonstrations) + len(data.prompts["test"]) == 6
    implicit = [{"prompt": None, "chosen": f"Q {n} is blue.", "rejected": f"Q {n} is green."} for n in range(5)]
    pairs = file(write(name, implicit), None, 0.3, "error", prompt="implicit").preferences["train"]
    assert pairs[0].prompt.startswith("Q")
    said = [{side: f"\n\nHuman: {n}\n\nAssistant: {side}" for side in ("chosen", "rejected")} for n in range(5)]
    dialogues = hh(write(name, [{"prompt": None, **one} for one in said]), None, None, False, 0.3, "error")
    assert {pair.chosen for pair in dialogues.preferences["train"]} == {" chosen"}


@pytest.mark.parametrize("flag", ["no", 1, [False]])
def test_whether_a_response_ended_is_true_or_false(write, flag):
    with pytest.raises(ValueError, match="row 0: chosen_ended and rejected_ended must be true or false, found"):
        file(write("rows.json", [ROWS[0] | {"chosen_ended": flag}]), None, 0.3, "error")


def test_a_row_is_named_by_its_place(write):
    data = file(write("rows.parquet", ROWS), write("rows.jsonl", ROWS[:2]), 0.3, "error")
    assert data.preferences["train"][2].source.endswith("rows.parquet, row 2")
    assert data.preferences["validation"][1].source.endswith("rows.jsonl, line 2")


def test_a_file_that_was_changed_is_read_again(write):
    """Though nothing but its content says so."""
    path = write("rows.parquet", ROWS)
    before = os.stat(path)
    first = read(Source(path), dict).records
    write("rows.parquet", [row | {"chosen": "other"} for row in ROWS])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [row["chosen"] for _, row in first] == [row["chosen"] for row in ROWS]
    assert {row["chosen"] for _, row in read(Source(path), dict).records} == {"other"}


def test_columns_have_other_names(write):
    nested = [{"question": {"text": f"{n}?"}, "answers": [{"words": "yes"}, {"words": "no"}]} for n in range(4)]
    asked = {"prompt": "question.text", "responses": "answers.words"}
    assert renamed(nested[1], asked) == {"prompt": "1?", "responses": ["yes", "no"]}
    assert renamed({"a.b": 1, "a": {"b": 2}, "c": 3}, {"x": "a.b"}) == {"x": 1, "a": {"b": 2}, "c": 3}
    assert renamed({"a": 1, "b": 2}, {"a": "b", "b": "a"}) == {"a": 2, "b": 1}
    rated = {"a": "yes", "b": "no", "of": {"a": 2, "b": 1}}
    several = {"responses": ["a", "b"], "scores": ["of.a", "of.b"]}
    assert renamed(rated | {"id": 3}, several) == {"id": 3, "responses": ["yes", "no"], "scores": [2, 1]}
    with pytest.raises(ValueError, match=r"must have of\.c, which data\.columns reads as scores; found a, b, of"):
        renamed(rated, several | {"scores": ["of.a", "of.c"]})
    flat = [{"history": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in ROWS]
    for name in ("rows.csv", "rows.parquet", "rows.jsonl"):  # `history` read as the prompt hides no second one
        columns = {"prompt": "history", "chosen": "good", "rejected": "bad"}
        data = file(write(name, flat), None, 0.3, "error", columns=columns)
        found = {(pair.prompt, pair.chosen) for some in data.preferences.values() for pair in some}
        assert found == {(row["prompt"], row["chosen"]) for row in ROWS}
    with pytest.raises(
        ValueError, match=r"must have goood, which data\.columns reads as chosen; found history, good, bad"
    ):
        file(write("rows.parquet", flat), None, 0.3, "error", columns=columns | {"chosen": "goood"})


def test_splits_are_named(tmp_path):
    splits = {"train": ROWS[:5], "test": ROWS[5:]}
    folder = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    folder.save_to_disk(tmp_path / "saved")
    copy = tmp_path / "copy"  # of a repository
    copy.mkdir()
    for name, rows in splits.items():
        datasets.Dataset.from_list(rows).to_parquet(copy / f"{name}-00000-of-00001.parquet")
    for place in (str(tmp_path / "saved"), str(copy)):
        data = file(place, None, 0.3, "error", validation_split="test")
        assert [pair.chosen for pair in data.preferences["train"]] == [row["chosen"] for row in ROWS[:5]]
        assert [pair.chosen for pair in data.preferences["validation"]] == [row["chosen"] for row in ROWS[5:]]
        assert data.preferences["validation"][0].source == f"{place}, test split, row 0"
        turned = file(place, None, 0.3, "error", split="test", validation_split="train")
        assert len(turned.preferences["train"]) == 3
        with pytest.raises(ValueError, match=r"dev split must be readable, found: .*dev.*train.*, .*test.*; check"):
            file(place, None, 0.3, "error", split="dev")
        with pytest.raises(ValueError, match=r"must be readable, found: .*config"):
            file(place, None, 0.3, "error", config="easy")


WRONG = {  # file and its content -> what is said
    "none.jsonl": (None, "must be a file of records, a folder of them or a data set on the hub"),
    "none.parquet": (None, "must be a file of records, a folder of them or a data set on the hub"),
    "cut.parquet": (b"PAR1", "cut.parquet must be readable, found: Parquet"),
    "cut.json": (b'[{"prompt": "a"', "cut.json must be readable, found: "),
    "cut.arrow": (b"ARROW1", "cut.arrow must be readable, found: "),
    "table.xlsx": (b"x", r"table.xlsx must be readable, found: an ending that is none of .jsonl, .json, .csv"),
    "empty.csv": (b"prompt,chosen,rejected\n", "empty.csv must be readable, found: .*no data"),
    "no.csv": (b"prompt,chosen\na,b\nc,d\n", "2 of 2 rows are no records:\n  row 0: must have prompt, chosen and rej"),
    "list.json": (
        b'[{"prompt": 1, "chosen": "b", "rejected": "c"}]',
        "1 of 1 rows are no records:\n  row 0: prompt must be text or a list of chat messages, found a number",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_file_of_records_is_named(tmp_path, name):
    content, said = WRONG[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        file(str(tmp_path / name), None, 0.3, "error")
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "saved"])
@pytest.mark.parametrize("option", [{"split": "test"}, {"validation_split": "test"}, {"config": "a"}])
def test_a_file_has_no_splits(write, name, option):
    with pytest.raises(ValueError, match="must be on the hub or a folder to have splits and configurations; leave"):
        file(write(name, ROWS), None, 0.3, "error", **option)


def numbered(start, count):
    return [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(start, start + count)]


CONFIGURED = "".join(
    f"- config_name: {name}\n  data_files:\n"
    + "".join(f"  - split: {split}\n    path: {name}/{split}.jsonl\n" for split in ("train", "test"))
    for name in ("easy", "hard")
)


@pytest.fixture
def published(dataset_hub):
    """Commits of main and v1 of a data set of two configurations; at v1 they have fewer rows."""
    commits = []
    for revision, count in (("main", 30), ("v1", 20)):
        files = {
            f"{name}/{split}.jsonl": numbered(start, count if split == "train" else 5)
            for name, start in (("easy", 0), ("hard", 500))
            for split in ("train", "test")
        }
        readme = f"---\nconfigs:\n{CONFIGURED}---\n"
        commits.append(dataset_hub.publish("some/pairs", {**files, "README.md": readme}, revision))
    return commits


def prompts_of(data):
    return {split: sorted(int(pair.prompt[:-1]) for pair in pairs) for split, pairs in data.preferences.items()}


def test_a_data_set_on_the_hub(published, monkeypatch):
    """Any revision, configuration, split and slice, with its commit; offline the same, and no other in its place."""
    for offline in (False, True):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        for name, commit, count in (("some/pairs", published[0], 30), ("some/pairs@v1", published[1], 20)):
            data = file(name, None, 0.3, "error", "hard", "train[:10]", "test")
            assert prompts_of(data) == {"train": [*range(500, 510)], "validation": [*range(500, 505)]}
            assert data.revisions == {f"{name}, {split} split": commit for split in ("test", "train[:10]")}
            data = file(f"some/pairs@{commit}", None, 0.3, "error", "easy")
            assert sorted(n for some in prompts_of(data).values() for n in some) == [*range(count)]
            assert data.revisions == {f"some/pairs@{commit}, train split": commit}
        for name, said in (("some/pairs@nope", "Revision Not Found"), ("nobody/nothing", "Repository Not Found")):
            said = "Cannot find an appropriate cached snapshot" if offline else said
            with pytest.raises(
                ValueError, match=rf"^{name}, train split must be readable, found: .*{said}.*; check the"
            ):
                file(name, None, 0.3, "error")
    with pytest.raises(ValueError, match=r"Config name is missing. .*'easy', 'hard'"):
        file("some/pairs", None, 0.3, "error")
    with pytest.raises(ValueError, match='Unknown split "dev"'):
        file("some/pairs", None, 0.3, "error", "easy", "dev")


def test_a_folder_has_no_revision(write, tmp_path, monkeypatch):
    """Nor is it looked for on the hub, where another may have its name."""
    write("saved", ROWS)
    monkeypatch.chdir(tmp_path.parent)
    for folder in (f"{tmp_path.name}/saved", str(tmp_path / "saved")):
        assert file(folder, None, 0.3, "error").preferences["train"]
        with pytest.raises(ValueError, match=rf"^data must have no revision .* found {folder}@v1; take {folder}$"):
            file(f"{folder}@v1", None, 0.3, "error")
    shutil.copytree(tmp_path / "saved", tmp_path / "saved@v1")  # whose name it is
    assert file(str(tmp_path / "saved@v1"), None, 0.3, "error").preferences["train"]


def test_what_an_ended_download_left_is_no_data_set(published, dataset_hub, monkeypatch):
    place = dataset_hub.root / "some/pairs" / published[1] / "easy" / "test.jsonl"
    content = place.read_text()
    place.unlink()  # as the listing was made before that
    monkeypatch.setattr(dataset_hub, "listed", ["easy/test.jsonl"])
    with pytest.raises(ValueError, match="must be readable"):
        file("some/pairs@v1", None, 0.3, "error", "easy")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="is incomplete: 1 file"):
        file("some/pairs@v1", None, 0.3, "error", "easy")
    monkeypatch.undo()
    place.write_text(content)


def test_prompts_in_front_of_both_texts(write):
    """As TRL has them without a column for the prompt; a word that only begins alike belongs to the responses."""
    rows = [
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        {"chosen": "Q: 1?\n\nyes", "rejected": "Q: 1?\n\nno"},
    ]
    data = file(write("rows.parquet", rows), None, 0.3, "error", prompt="implicit")
    found = [(p.prompt, p.chosen, p.rejected) for some in data.preferences.values() for p in some]
    assert sorted(found) == [
        ("Q: 1?\n", "\nyes", "\nno"),
        ("The sky is", " blue.", " black."),
        ("The sky is", " blue.", " green."),
    ]
    for row, said in (
        ({"chosen": "yes", "rejected": "no"}, "must begin with the same words"),
        ({"chosen": "yes, yes", "rejected": "yellow no"}, "must begin with the same words"),
        (ROWS[0], "must have no prompt of its own"),
        ({"chosen": ["a"], "rejected": "a"}, "must have chosen and rejected in plain text"),
    ):
        with pytest.raises(ValueError, match=f"line 1: .*{said}"):
            file(write("rows.jsonl", [row]), None, 0.3, "error", prompt="implicit")
    with pytest.raises(ValueError, match="found no prompt"):  # unless it is asked for
        file(write("rows.parquet", rows), None, 0.3, "error")
