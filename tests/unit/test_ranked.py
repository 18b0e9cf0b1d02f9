"""Pairs of responses that have scores, and of Stack Exchange's answers in their published form."""

import json

import datasets
import pytest

from dpo.data.ranked import ranked, stack_exchange, text_of

SCORES = [2, 5.0, -1, 5, 0]
ALL = {(1, 0), (0, 2), (3, 0), (0, 4), (1, 2), (1, 4), (3, 2), (4, 2), (3, 4)}  # 1 and 3 are equal


def row(number: int, scores=SCORES, **other) -> dict:
    responses = [f"{number}, {place}" for place in range(len(scores))]
    return {"prompt": f"{number}?", "responses": responses, "scores": scores} | other


def save(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(path)


def taken(data) -> dict[str, list[tuple[int, int]]]:
    """Prompt -> places of chosen and rejected."""
    found: dict[str, list[tuple[int, int]]] = {}
    for pair in (pair for some in data.preferences.values() for pair in some):
        places = tuple(int(text.rpartition(", ")[2]) for text in (pair.chosen, pair.rejected))
        assert pair.chosen.startswith(pair.prompt[:-1])
        found.setdefault(pair.prompt, []).append(places)
    return found


def test_which_pairs_are_made(tmp_path):
    path = save(tmp_path / "a.jsonl", map(row, range(60)))
    best_worst, all_pairs, drawn = (
        taken(ranked(path, None, how, 0.2, "error")) for how in ("best_worst", "all", "best_random")
    )
    assert set(map(tuple, best_worst.values())) == {((1, 2),)}
    assert all(len(pairs) == len(ALL) and set(pairs) == ALL for pairs in all_pairs.values())
    assert len(best_worst) == len(all_pairs) == len(drawn) == 60
    counts = {worse: sum(pairs == [(1, worse)] for pairs in drawn.values()) for worse in (0, 2, 4)}
    assert sum(counts.values()) == 60
    assert min(counts.values()) > 8  # each of the three is drawn about as often
    assert (
        taken(ranked(save(tmp_path / "b.jsonl", map(row, reversed(range(60)))), None, "best_random", 0.2, "error"))
        == drawn
    )
    equal = save(tmp_path / "c.jsonl", [row(n, scores=[1, 3, 0, 3, 0]) for n in range(9)])
    assert set(map(tuple, taken(ranked(equal, None, "best_worst", 0.2, "error")).values())) == {((1, 2),)}  # the first


@pytest.mark.parametrize("kind", ["parquet", "json", "saved"])
def test_scores_inside_of_answers(tmp_path, kind):
    """As UltraFeedback has them: a list of objects, of which the column map reads one field each."""
    rows = [
        {
            "instruction": f"{n}?",
            "completions": [{"response": f"{n}, {p}", "overall_score": s} for p, s in enumerate(SCORES)],
        }
        for n in range(9)
    ]
    path = tmp_path / f"rows.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows))
    else:
        made = datasets.Dataset.from_list(rows)
        made.to_parquet(path) if kind == "parquet" else made.save_to_disk(path)
    columns = {"prompt": "instruction", "responses": "completions.response", "scores": "completions.overall_score"}
    found = taken(ranked(str(path), None, "best_worst", 0.2, "error", columns=columns))
    assert found == {f"{n}?": [(1, 2)] for n in range(9)}


def test_ranks_are_the_better_the_lower(tmp_path):
    """As Nectar has them."""
    texts = [{name: value for name, value in row(n).items() if name != "scores"} for n in range(9)]
    named = save(tmp_path / "a.jsonl", [one | {"ranks": [-score for score in SCORES]} for one in texts])
    scored = save(tmp_path / "b.jsonl", map(row, range(9)))
    for how in ("best_worst", "all"):
        assert taken(ranked(named, None, how, 0.3, "error")) == taken(ranked(scored, None, how, 0.3, "error"))
    both = save(tmp_path / "c.jsonl", [row(n, ranks=SCORES) for n in range(9)])  # scores say all
    assert taken(ranked(both, None, "all", 0.3, "error")) == taken(ranked(scored, None, "all", 0.3, "error"))
    odd = save(tmp_path / "d.jsonl", [{"prompt": "a", "responses": ["b"], "ranks": ["a"]}])
    with pytest.raises(ValueError, match=r"line 1: must have ranks that are finite numbers, found 'a'"):
        ranked(odd, None, "all", 0.3, "drop")


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_responses_in_columns_of_their_own(tmp_path, ending):
    """Texts stay texts in a CSV file, scores become numbers."""
    rows = [{"question": f"{n}", "one": "007", "other": f"{n}", "of_one": 1.0, "of_other": 2.5} for n in range(9)]
    path = tmp_path / f"rows.{ending}"
    if ending == "csv":
        datasets.Dataset.from_list(rows).to_csv(path)
    else:
        save(path, rows)
    columns = {"prompt": "question", "responses": ["one", "other"], "scores": ["of_one", "of_other"]}
    data = ranked(str(path), None, "all", 0.3, "error", columns=columns)
    found = {(pair.prompt, pair.chosen, pair.rejected) for some in data.preferences.values() for pair in some}
    assert found == {(f"{n}", f"{n}", "007") for n in range(9)}


def test_answers_to_one_question_lie_on_one_side(tmp_path):
    """Explain Like I'm Five has its answers in columns of one object."""
    rows = [
        {"title": f"{n}?", "answers": {"text": [f"{n}, 0", f"{n}, 1", f"{n}, 2"], "score": [1, 3, 2]}}
        for n in range(40)
    ]
    columns = {"prompt": "title", "responses": "answers.text", "scores": "answers.score"}
    data = ranked(save(tmp_path / "a.jsonl", rows), None, "all", 0.3, "error", columns=columns)
    assert taken(data) == {f"{n}?": [(1, 0), (2, 0), (1, 2)] for n in range(40)}
    sides = [{pair.prompt for pair in pairs} for pairs in data.preferences.values()]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_rows_without_a_pair_are_counted(tmp_path, capsys):
    rows = [*map(row, range(9)), row(9, [1.0, 1]), row(10, [3]), row(11, []), row(12, [1, 0], responses=["", "a"])]
    data = ranked(save(tmp_path / "a.jsonl", rows), None, "best_worst", 0.3, "drop")
    assert len(taken(data)) == 9
    said = capsys.readouterr().out
    assert "4 of 13 pairs are faulty, 4 dropped" in said
    for reason in (
        "2 x there are fewer than two responses",
        "1 x no response is better than another",
        "1 x chosen is empty",
    ):
        assert reason in said


@pytest.mark.parametrize(
    "other,said",
    [
        ({"responses": ["a", "b"]}, "must have a list of responses, and one of as many scores"),
        ({"responses": "a"}, "must have a list of responses"),
        ({"scores": [1, 2, None, 3, 4]}, "must have scores that are finite numbers, found None"),
        ({"scores": [1, 2, float("nan"), 3, 4]}, "must have scores that are finite numbers, found nan"),
        ({"scores": ["1", 2, 3, 3, 4]}, "must have scores that are finite numbers, found '1'"),
        ({"scores": [True, 2, 3, 3, 4]}, "must have scores that are finite numbers, found True"),
        ({"responses": ["a", 2, "c", "d", "e"]}, "chosen must be text or a list of chat messages, found a number"),
        ({"system": "Be brief."}, "must say all that the policy reads in prompt, found system"),
    ],
)
def test_what_is_no_list_of_responses(tmp_path, other, said):
    with pytest.raises(ValueError, match="1 of 2 lines are no records:\n  line 2: ") as error:
        ranked(save(tmp_path / "a.jsonl", [row(0), row(1, **other)]), None, "best_worst", 0.3, "keep")
    assert said in str(error.value)
    with pytest.raises(
        ValueError, match="line 1: must have prompt, responses and scores; found no responses and no sc"
    ):
        ranked(save(tmp_path / "a.jsonl", [{"prompt": "a"}]), None, "best_worst", 0.3, "keep")


HTML = """<p>Use <a href="x">this &amp; that</a>, or <code>ls</code>:</p>

<pre class="lang-sh"><code>a &lt; b
  c
</code></pre>

<ul>
<li>one</li>
<li>two<br>lines</li>
</ul>"""
TEXT = "Use this & that, or ls:\n\n<code>a < b\n  c\n</code>\n\none\n\ntwo\nlines"


def test_text_of_html():
    assert text_of(HTML) == TEXT
    assert text_of("1 &lt; 2") == "1 < 2"


def published(number: int, scores=(1, 4, 1), text="<p>{}, {}</p>") -> dict:
    """A question of Stack Exchange as it is published."""
    about = {"author": "a", "author_id": 3, "author_profile": "https://example.org/users/3", "selected": False}
    answers = [
        {"answer_id": place, **about, "pm_score": score, "text": text.format(number, place)}
        for place, score in enumerate(scores)
    ]
    where = ["https://example.org/questions/1", "https://example.org", "https://example.org/users/1/"]
    return {"qid": number, "question": f"<p>{number}?</p>", "answers": answers, "date": "2016/12/02", "metadata": where}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_stack_exchange_to_the_letter(tmp_path, capsys, kind):
    rows = [
        *map(published, range(20)),
        published(20, (2, 2)),
        published(21, (1, 0), HTML.replace("one", "{}").replace("two", "{}")),
    ]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        save(path, rows)
    else:
        made = datasets.Dataset.from_list(rows)
        made.to_parquet(path) if kind == "parquet" else made.save_to_disk(path)
    data = stack_exchange(str(path), None, "train[:1%]", "all", False, 0.2, "drop")
    found: dict[str, list] = {}
    for pair in (pair for some in data.preferences.values() for pair in some):
        found.setdefault(pair.prompt, []).append((pair.chosen, pair.rejected))
    assert len(found) == 21
    for number in range(20):
        pairs = [(f" {number}, 1", f" {number}, 0"), (f" {number}, 1", f" {number}, 2")]
        assert found[f"\n\nHuman: {number}?\n\nAssistant:"] == pairs
    [(better, worse)] = found["\n\nHuman: 21?\n\nAssistant:"]
    assert better == " " + TEXT.replace("one", "21").replace("two", "0")
    assert worse == " " + TEXT.replace("one", "21").replace("two", "1")
    assert "1 x no response is better than another" in capsys.readouterr().out


def test_stack_exchange_as_chat(tmp_path):
    path = save(tmp_path / "a.jsonl", [published(number, (1, 2)) for number in range(9)])
    for pair in stack_exchange(path, None, None, "all", True, 0.3, "error").preferences["train"]:
        [asked] = pair.prompt
        number = asked["content"][0]
        assert asked == {"role": "user", "content": f"{number}?"}
        assert pair.chosen == [{"role": "assistant", "content": f"{number}, 1"}]
        assert pair.rejected == [{"role": "assistant", "content": f"{number}, 0"}]


@pytest.mark.parametrize(
    "wrong",
    [
        {"question": None},
        {"answers": None},
        {"answers": []},
        {"answers": [{"text": 3, "pm_score": 1}]},
        {"answers": ["a"]},
    ],
)
def test_what_is_no_question(tmp_path, wrong):
    with pytest.raises(ValueError, match="line 2: must have a question and a list of answers, each with its text"):
        stack_exchange(
            save(tmp_path / "a.jsonl", [published(0), published(1) | wrong]), None, None, "all", False, 0.2, "keep"
        )


def test_a_part_of_stack_exchange_on_the_hub(dataset_hub):
    files = {f"data/{site}.com/train-00000-of-00001.parquet": list(map(published, range(20))) for site in "ab"}
    dataset_hub.publish("HuggingFaceH4/stack-exchange-preferences", files)
    data = stack_exchange(None, None, "train[:50%]", "best_worst", False, 0.2, "error")
    assert sum(map(len, data.preferences.values())) == 20
