"""Several data sets as one: who is in it and how often, whatever the order of rows."""

import json

import pytest

from dpo.data.demonstrations import sft
from dpo.data.mixture import mixture
from dpo.data.records import Dataset, Preference, contents, file
from dpo.sweep.signature import check_signature, instantiate


def pairs(name: str, number: int = 400) -> list[dict]:
    return [{"prompt": f"{name} {n}?", "chosen": "yes", "rejected": "no"} for n in range(number)]


def save(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(path)


def counted(data: Dataset, name: str) -> dict[str, int]:
    """Prompt -> how many training pairs it has."""
    prompts = [pair.prompt for pair in data.preferences["train"] if pair.prompt.startswith(name)]
    return {prompt: prompts.count(prompt) for prompt in prompts}


@pytest.fixture
def two(tmp_path):
    return save(tmp_path / "a.jsonl", pairs("a")), save(tmp_path / "b.jsonl", pairs("b"))


def test_a_weight_of_one_is_each_once(two):
    data = mixture(list(two), 0.1, "error")
    alone = [file(path, None, 0.1, "error") for path in two]
    for split in ("train", "validation"):
        assert data.preferences[split] == [pair for one in alone for pair in one.preferences[split]]
    assert [one.response for one in data.demonstrations] == ["yes"] * len(data.preferences["train"])
    assert data.prompts["test"] == [prompt for one in alone for prompt in one.prompts["test"]]


def test_weights_take_and_repeat_training_pairs(two, tmp_path):
    def mixed(weight, first=two[0]):
        return mixture([{"path": first, "weight": weight}, two[1]], 0.1, "error")

    whole = counted(mixed(1), "a")
    half, more, twice = (counted(mixed(weight), "a") for weight in (0.5, 0.7, 2.5))
    assert 0.4 < len(half) / len(whole) < 0.6
    assert set(half.values()) == {1}
    assert half.keys() < more.keys() < whole.keys()
    assert {prompt for prompt, count in twice.items() if count == 3} == half.keys()
    assert {prompt for prompt, count in twice.items() if count == 2} == whole.keys() - half.keys()
    assert counted(mixed(0.5, save(tmp_path / "c.jsonl", pairs("a")[::-1])), "a") == half
    for weight in (0.5, 2):  # the other source, and what is held out, are as they were
        assert counted(mixed(weight), "b") == counted(mixed(1), "b")
        assert mixed(weight).preferences["validation"] == mixed(1).preferences["validation"]
    assert len({contents(mixed(weight)) for weight in (0.5, 0.7, 1, 2)}) == 4
    same = [{"prompt": f"a {n // 10}?", "chosen": f"yes {n}", "rejected": "no"} for n in range(400)]
    kept = counted(mixed(0.5, save(tmp_path / "d.jsonl", same)), "a")
    assert len(kept) > 20
    assert max(kept.values()) < 10  # pairs of one prompt are drawn one by one


def test_other_data_and_options_in_a_mixture(tmp_path):
    dialogues = [
        {"chosen": f"\n\nHuman: {n}?\n\nAssistant: Y", "rejected": f"\n\nHuman: {n}?\n\nAssistant: N"}
        for n in range(40)
    ]
    (tmp_path / "c.csv").write_text("q,chosen,rejected\n" + "".join(f"c {n}?,yes,no\n" for n in range(40)))
    (tmp_path / "d.csv").write_text("q,chosen,rejected\n" + "".join(f"b {n}?,yes,no\n" for n in range(400)))
    shares = {"validation_fraction": 0.1, "on_faulty": "error"}
    hh = {"_target_": "dpo.data.hub.hh", "path": save(tmp_path / "hh.jsonl", dialogues), "validation_path": None}
    node = {
        "_target_": "dpo.data.mixture.mixture",
        "sources": [
            {"data": hh | {"subset": None, "chat": False} | shares, "weight": 2},
            {"path": str(tmp_path / "c.csv"), "columns": {"prompt": "q"}, "validation_path": str(tmp_path / "d.csv")},
        ],
        **shares,
    }
    assert check_signature("data", node) == []
    data = instantiate(node)
    assert set(counted(data, "\n\nHuman:").values()) == {2}
    assert len(counted(data, "c ")) == 40
    assert sum(pair.prompt.startswith("b ") for pair in data.preferences["validation"]) == 400


def test_demonstrations_are_mixed_too(tmp_path):
    rows = [{"prompt": f"{n}?", "completion": f"{n}."} for n in range(200)]
    other = [{"prompt": f"o {n}?", "completion": f"{n}."} for n in range(200)]
    both = [
        sft(save(tmp_path / f"{n}.jsonl", some), None, "last", 0.1, "error") for n, some in enumerate((rows, other))
    ]
    data = mixture([{"data": both[0], "weight": 0.5}, {"data": both[1]}], 0.1, "error")
    assert data.preferences == {}
    assert data.demonstrations[-len(both[1].demonstrations) :] == both[1].demonstrations
    assert 60 < len(data.demonstrations) - len(both[1].demonstrations) < 120
    assert data.prompts["test"] == both[0].prompts["test"] + both[1].prompts["test"]


def test_prompts_alone_have_no_weight():
    """They are asked once each, so a share of them would be taken in silence."""
    some = Dataset([], {}, {"train": ["a?", "b?"], "validation": [], "test": []})
    assert mixture([{"data": some}], 0.1, "error").prompts["train"] == ["a?", "b?"]
    with pytest.raises(ValueError, match=r"data.sources\[0\]: weight must be 1 of prompts alone.* found 0.5"):
        mixture([{"data": some, "weight": 0.5}], 0.1, "error")


def test_revisions_of_all_are_told():
    part = [{"data": Dataset([], {"train": [], "validation": []}, {}, revisions={name: name})} for name in "ab"]
    some = {split: [Preference(split, "b", "c")] for split in ("train", "validation")}
    part += [{"data": Dataset([], some, {})}]
    assert mixture(part, 0.1, "error").revisions == {"a": "a", "b": "b"}


WRONG = {
    "nothing": ([], "data.sources must list at least one source, found an empty list"),
    "number": ([3], r"data.sources\[0\]: must be a path, or an object with either a path or data, found 3"),
    "neither": ([{"weight": 1}], r"data.sources\[0\]: must be a path, or an object"),
    "both": ([{"path": "a", "data": {}}], r"data.sources\[0\]: must be a path, or an object"),
    "weight": ([{"path": "a", "weight": 0}], r"data.sources\[0\]: weight must be a number above 0, found 0"),
    "truth": ([{"path": "a", "weight": True}], r"data.sources\[0\]: weight must be a number above 0, found True"),
    "key": (
        [{"path": "a", "revision": "x"}],
        r"data.sources\[0\]: revision must be one of path, validation_path, config",
    ),
    "node": ([{"data": {"path": "x"}}], r"data.sources\[0\]: data must be the node of a data set, with its _target_"),
    "path": (["none.jsonl"], r"data.sources\[0\]: data must be a file of records, .* found none at none.jsonl"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_source_that_is_wrong_is_named(name):
    with pytest.raises(ValueError, match=WRONG[name][1]):
        mixture(WRONG[name][0], 0.1, "error")


def test_pairs_and_demonstrations_do_not_mix(two, tmp_path):
    shown = sft(
        save(tmp_path / "s.jsonl", [{"prompt": f"{n}?", "completion": "a"} for n in range(9)]),
        None,
        "last",
        0.3,
        "drop",
    )
    with pytest.raises(
        ValueError, match="must all bring pairs, or all single responses with a label, or all demonstrat"
    ):
        mixture([two[0], {"data": shown}], 0.1, "error")


def test_an_option_of_a_source_is_named_by_its_place(tmp_path):
    rows = save(tmp_path / "a.jsonl", [{"question": "q", "chosen": "yes", "rejected": "no"}])
    with pytest.raises(ValueError) as error:
        mixture([{"path": rows, "split": None, "columns": {"prompt": "ask"}}], 0.1, "error")
    assert f"data.sources[0]: {rows}: 1 of 1 lines" in str(error.value)
    assert "must have ask, which data.sources[0].columns reads as prompt" in str(error.value)
