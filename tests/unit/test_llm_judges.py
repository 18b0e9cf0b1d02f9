"""Judges that are language models: what they ask a server, how its answers are read, what is kept and what it costs."""

import json
import re
from collections import Counter

import pytest
from composing import compose
from serving import Served, serving

from dpo.judges import JUDGES_VERSION, compare, is_pairwise, llm
from dpo.judges.llm import answers, questions_in, shown, shuffled, verdict
from dpo.settings import judge_of
from dpo.sweep.signature import check_signature

OTHER = {"A": "B", "B": "A"}
CHAT = [{"role": "user", "content": "Where is Oslo?"}]
TALK = [*CHAT, {"role": "assistant", "content": "Where?"}, {"role": "user", "content": "Oslo."}]


def longer(text, body):
    """A judge of pairs: the longer answer, and why."""
    found = re.search(r"\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n\nDo not", text, re.DOTALL)
    first, second = (len(one) for one in found.groups())
    return f"One has {first} letters.\nVerdict: {'A' if first > second else 'B' if first < second else 'tie'}"


def written(subject):
    """Five questions in the asked form, of which the right choice is the one that the text must hold."""
    blocks = []
    for nth in range(1, 6):
        choices = "\n".join(f"{letter}) {subject}{nth}{letter}" for letter in "ABCDE")
        blocks.append(f"Q{nth}) Which of {subject}{nth}?\n{choices}\nAnswer: {'ABCDE'[nth % 5]}")
    return "\n\n".join(blocks)


def reader(text, body):
    """A judge of summaries: it writes questions on the first word of an article, and finds choices in a summary."""
    if "[Article]" in text:
        return written(text.split("[Article]\n")[1].split()[0])
    summary, asked = re.search(r"\[Text\]\n(.*)\n\n\[Questions\]\n(.*)", text, re.DOTALL).groups()
    said = []
    for block in re.split(r"\n(?=Q)", asked):
        number = re.match(r"Q(\d+)", block)[1]
        found = [letter for letter, choice in re.findall(r"([A-E])\) (\S+)", block) if choice in summary.split()]
        said.append(f"Q{number}) {found[0] if found else 'Unsure'}")
    return "\n".join(said)


@pytest.fixture
def judge(tmp_path):
    """judge(url, which): as a run gets it, whose answers are kept."""

    def judge(url, which="pairwise", **changed):
        given = [f"judge.{key}={value}" for key, value in {"model": "m", "server.url": url, **changed}.items()]
        config = compose("train", f"judge={which}", *given, f"cache={tmp_path / 'cache'}", "judge.server.retries=1")
        assert check_signature("judge", json.loads(json.dumps(_plain(config.judge)))) == []
        return judge_of(config)

    return judge


def _plain(node):
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=True)


def test_a_model_compares_pairs_in_both_orders(judge):
    served = Served("m", longer)
    with serving(served) as url:
        asked = judge(url)
        assert is_pairwise(asked)
        outcomes = compare(asked, [CHAT, CHAT, "plain"], ["no", "yes!", "x"], [(0, 1), (1, 0)])[1]
        assert outcomes == [{"win": 0.0, "inconsistent": 0.0}, {"win": 1.0, "inconsistent": 0.0}]
        asked = served.asked[1:]  # after the handshake
        texts = sorted(one["messages"][0]["content"] for one in asked)
        assert len(texts) == 2
        assert all("[Request]\nWhere is Oslo?\n\n[Answer A]\n" in text for text in texts)
        assert "[Answer A]\nno\n\n[Answer B]\nyes!\n" in texts[0]
        assert "[Answer A]\nyes!\n\n[Answer B]\nno\n" in texts[1]
        assert "by this measure: how well it does what was asked, truthfully and without padding\n" in texts[0]
        assert {(one["temperature"], one["max_tokens"], one["seed"]) for one in asked} == {(0.0, 512, 0)}


def test_several_turns_are_told_with_who_said_them(judge):
    served = Served("m", longer)
    with serving(served) as url:
        judge(url)([TALK], ["a"], ["b"])
    text = served.asked[-1]["messages"][0]["content"]
    assert "[Request]\nuser: Where is Oslo?\n\nassistant: Where?\n\nuser: Oslo.\n\n[Answer A]" in text


def test_what_was_paid_for_is_not_asked_again(judge, tmp_path):
    served = Served("m", longer)
    questions = [["p"] * 3, ["a", "bb", "ccc"], ["dddd", "e", "fff"]]
    with serving(served) as url:
        assert judge(url)(*questions) == ["lose", "win", "tie"]
        paid = len(served.asked)
        assert judge(url, **{"server.concurrency": 1, "server.timeout": 9.0})(*questions) == ["lose", "win", "tie"]
        assert len(served.asked) == paid + 1  # a handshake
        again = {"criterion": "brevity", "temperature": 0.5, "max_tokens": 7, "attempts": 1}
        for key, value in again.items():
            paid = len(served.asked)
            judge(url, **{key: value})(*questions)
            assert len(served.asked) == paid + 4, key
    assert judge("null")(*questions) == ["lose", "win", "tie"]  # the server has gone
    with pytest.raises(RuntimeError, match=r"judge\.server\.url must be that of a server where"):
        judge("null")(["q"], ["a"], ["b"])
    kept = sorted((tmp_path / "cache" / "answers").glob("*.jsonl"))
    assert len(kept) == 1 + len(again)
    key = json.loads(kept[0].read_text().splitlines()[0])
    assert key["judges"] == JUDGES_VERSION
    assert "server" not in key["judge"]


def test_a_judge_in_another_process_loses_no_answer(judge, tmp_path):
    """The server dies: what it answered before is kept, and asked for no more when another stands up."""
    served = Served("m", longer)
    questions = [["p"] * 6, ["a" * n for n in range(1, 7)], ["bbb"] * 6]
    with serving(served) as url:
        asked = judge(url, **{"server.concurrency": 1})
        served.faults += ["good"] * 3 + [500] * 9
        with pytest.raises(RuntimeError, match=r"must answer, found InternalServerError: .*what was answered is kept"):
            asked(*questions)
        assert len(served.spent) == 1 + 3
        served.faults.clear()
        said = judge(url)(*questions)
    assert said == ["lose", "lose", "tie", "win", "win", "win"]
    assert len(served.spent) == 1 + 3 + 1 + 3


@pytest.mark.parametrize(
    "said, expected",
    [
        ("Verdict: A", "win"),
        ("It is better.\nVerdict: B\n", "lose"),
        ("**Verdict: tie**", "tie"),
        ("verdict: [[a]]", "win"),
        ("They differ. Verdict: B", "lose"),
        ("Verdict: A\n\nIt is shorter, too.\n\nVerdict: A", "win"),
        ("B", "lose"),
        (" (A) ", "win"),
        ("Tie.", "tie"),
        ("Verdict: a tie.", "tie"),
        ("A tie", "tie"),
    ],
)
def test_how_a_verdict_is_read(said, expected):
    assert verdict(said) == expected


NO_LAST, SEVERAL = "without a verdict in the last line", "with several verdicts"


@pytest.mark.parametrize(
    "said, why",
    [
        ("Answer A is better", NO_LAST),
        ("A or B", NO_LAST),
        ("Verdict: Absolutely", NO_LAST),
        ("Verdict: a draw", NO_LAST),
        ("Verdict: A, and no tie", NO_LAST),
        ("Verdict: A\nBut who knows", NO_LAST),
        ("", NO_LAST),
        ("Verdict:", NO_LAST),
        ("Verdict: A. No. Verdict: B", SEVERAL),
        ("Verdict: A\nVerdict: B\nVerdict: A\nVerdict: B", SEVERAL),
        ('The verdict is one of "Verdict: A", "Verdict: B".\nVerdict: tie', SEVERAL),
        # What SmolLM2-135M-Instruct has said.
        ('Also end with an interesting ending talking about "Verdict: tie".', NO_LAST),
        ("A: A\nB: B\nC: C\nD: D\nE: E\nF: F\nJ: J\nJ: J\nK: K\n", NO_LAST),
    ],
)
def test_what_talks_of_verdicts_gives_none(said, why):
    with pytest.raises(ValueError, match=why):
        verdict(said)


def test_an_answer_in_no_form_is_asked_for_again(judge, capsys):
    """With another seed and at temperature 1; where none comes it is a tie, and said."""
    tries = []

    def stubborn(text, body):
        if "[Answer A]\nodd" in text or "[Answer B]\nodd" in text:
            tries.append((body["seed"], body["temperature"]))
            return "I like both."
        return longer(text, body) if body["seed"] == 1 or "hello" in text else "Well."

    with serving(Served("m", stubborn)) as url:
        said = judge(url)(["p"] * 2, ["a", "odd"], ["bb", "b"])
    assert said == ["lose", "tie"]
    assert tries == [(0, 0.0), (1, 1.0), (2, 1.0)]
    said_so = "".join(capsys.readouterr())
    assert "1 of 2 answers have not the asked form: 1 without a verdict in the last line; one begins 'I like" in said_so
    assert 'They count as "tie"' in said_so


def test_a_judge_that_never_answers_in_form_is_refused(judge):
    with (
        serving(Served("m", lambda *_: "I like both.")) as url,
        pytest.raises(RuntimeError, match=r"the judge m must answer in the asked form, found 'I like both\.' in 3"),
    ):
        judge(url)


def polite(text, body):
    """Passes the handshake, and then has no verdict."""
    return longer(text, body) if "Say hello." in text else "I like both."


def test_what_many_miss_ends_a_run_before_all_is_paid(judge):
    served, questions = Served("m", polite), (["p"] * 200, ["a"] * 200, [str(n) for n in range(200)])
    said = "21 of the first 21 of 200 answers have not the asked form: 21 without a verdict in the last line; one"
    with serving(served) as url:
        with pytest.raises(RuntimeError, match=f"{said} begins 'I like both.'"):
            judge(url, attempts=1, **{"server.concurrency": 1})(*questions)
        assert 1 + 21 <= len(served.asked) <= 1 + 21 + 3  # and what was under way
        with pytest.raises(RuntimeError, match="21 of 21 answers"):  # what was said is known
            judge(url, attempts=1)(*(column[:21] for column in questions))
        texts = [one["messages"][0]["content"] for one in served.asked]
    assert max(Counter(text for text in texts if "hello" not in text).values()) == 1


def test_a_run_that_was_stopped_counts_what_was_missed_among_all(judge, capsys):
    """Ten of a hundred may be: also where they are all that is left to ask, or were answered before it was stopped."""

    def stubborn(text, body):
        return polite(text, body) if re.search(r"\[Answer A\]\n\d*3\n", text) else longer(text, body)

    served, questions = Served("m", stubborn), (["p"] * 100, [str(n) for n in range(100)], ["x"] * 100)
    with serving(served) as url:
        asked = judge(url, attempts=1, **{"server.concurrency": 1})
        served.faults += ["good"] * 50 + [500] * 9
        with pytest.raises(RuntimeError, match="InternalServerError"):
            asked(*questions)
        served.faults.clear()
        verdicts = judge(url, attempts=1)(*questions)
    assert [n for n in range(100) if verdicts[n] == "tie" and n > 9] == [*range(13, 100, 10)]
    texts = [json.dumps(one) for one in served.spent]
    assert len({*texts}) == 101  # with the handshake, which was asked twice
    assert len(texts) == 102
    assert "10 of 100 answers have not the asked form: 10 without" in "".join(capsys.readouterr())


def test_what_was_cut_is_said_to_be(judge, capsys):
    def cut(made):
        made["choices"][0] |= {"finish_reason": "length", "message": {"role": "assistant", "content": None}}
        return made

    served = Served("m", longer)
    with serving(served) as url:
        asked = judge(url, attempts=1, **{"server.concurrency": 1})
        served.faults += [cut]
        assert asked(["p"] * 2, ["a", "b"], ["bb", "bb"]) == ["tie", "lose"]
    assert "1 of 2 answers have not the asked form: 1 cut at judge.max_tokens" in "".join(capsys.readouterr())


def test_a_request_that_is_too_long_is_a_tie_that_is_counted(judge, capsys):
    served = Served("m", longer)
    with serving(served) as url:
        asked = judge(url, **{"server.concurrency": 1})
        served.faults += [400]
        assert asked(["p"] * 2, ["a", "b"], ["bb", "bb"]) == ["tie", "lose"]
    said_so = "".join(capsys.readouterr())
    assert "1 of 2 answers have not the asked form: 1 refused by the server" in said_so
    assert "refused a request" in said_so


def test_questions_are_read_strictly():
    found = questions_in(written("w"))
    assert [one["question"] for one in found] == [f"Which of w{nth}?" for nth in range(1, 6)]
    assert found[1] == {"question": "Which of w2?", "choices": [f"w2{one}" for one in "ABCDE"], "answer": "C"}
    good = written("w")
    assert questions_in(f"Here they are:\n\n{good}\n") == found
    assert questions_in(good.replace("Answer: C", "Answer: (C)")) == found
    for bad in (
        "",
        good.replace("Q5)", "Q6)"),
        good.replace("Answer: C", "Answer: F"),
        good.replace("Answer: C\n", ""),
        good.replace("E) w3E\n", ""),
        good.replace("w3E", "w3A"),
        good.split("Q5)")[0],
        good + "\n\nQ6) And what?",
        good.replace("Q3)", "3."),
    ):
        with pytest.raises(ValueError, match=r"without 5 questions in the asked form|with a choice twice"):
            questions_in(bad)
    with pytest.raises(ValueError, match="with a question twice"):
        questions_in(good.replace("Which of w2?", "Which of w1?"))


def test_questions_are_shuffled_by_their_article():
    found = questions_in(written("w"))
    orders = [shuffled(found, f"article {n}") for n in range(40)]
    assert shuffled(found, "article 3") == orders[3]
    assert len({json.dumps(one) for one in orders}) == 40
    right = {one["question"]: one["choices"]["ABCDE".index(one["answer"])] for one in found}
    for some in orders:
        assert {one["question"]: one["choices"]["ABCDE".index(one["answer"])] for one in some} == right
        assert all(sorted(one["choices"]) == [f"{one['choices'][0][:2]}{letter}" for letter in "ABCDE"] for one in some)
    assert {one["answer"] for some in orders for one in some} == {*"ABCDE"}
    assert {some[0]["question"] for some in orders} == {*right}
    assert "Answer" not in shown(found)
    assert shown(found).splitlines()[:3] == ["Q1) Which of w1?", "A) w1A", "B) w1B"]


@pytest.mark.parametrize(
    "said, expected",
    [
        ("Q1) A\nQ2) Unsure\nQ3) C", {1: "A", 3: "C"}),
        ("Q1) (B) because\nQ2) C.\nQ3) D) Oslo", {1: "B", 2: "C", 3: "D"}),
        ("Sure!\n**Q1) E**\n\nQ2) A\nQ2) A\nQ3) Unsure of it\nQ4) B", {1: "E", 2: "A"}),
        ("Q1) Unsure\nQ2) Unsure\nQ3) Unsure", {}),
    ],
)
def test_how_answers_are_read(said, expected):
    assert answers(said, asked=3) == expected


@pytest.mark.parametrize(
    "said, why",
    [
        ("Q1) Absolutely\nQ2) B\nQ3) C", "without a line for each"),
        ("Q1) A man lives where?\nQ2) B\nQ3) C", "without a line for each"),
        ("Q1) A\nQ2) B", "without a line for each"),
        ("Q1) A\nQ2) B\nQ1) C\nQ3) C", "with several answers to a question"),
        ("A, B, C", "without a line for each"),
        ("", "without a line for each"),
        # What SmolLM2-135M-Instruct has said.
        ("Q2) What is Anna's pet?\nA) cat\nB) fish\nC) dog\nD) hen\nE) cow", "without a line for each"),
    ],
)
def test_what_answers_no_question(said, why):
    with pytest.raises(ValueError, match=why):
        answers(said, asked=3)


def test_a_model_asks_and_answers_questions(judge, tmp_path):
    served = Served("m", reader)
    summaries = ["xy1B xy2C xy3D", "xy1B xy2A", "", "ab1B ab2C ab3D ab4E ab5A"]
    prompts = ["xy and more", "xy and more", "xy and more", "ab and more"]
    with serving(served) as url:
        found = judge(url, "questions")(prompts, summaries)
        assert [(one["correct"], one["unsure"], one["enough"]) for one in found] == [
            *((3.0, 2.0, 1.0), (1.0, 3.0, 0.0), (0.0, 5.0, 0.0), (5.0, 0.0, 1.0))
        ]
        assert [one["score"] for one in found] == [one["correct"] for one in found]
        assert sum("[Article]" in one["messages"][0]["content"] for one in served.asked) == 2  # of two articles
        assert len(served.asked) == 1 + 2 + 4
        shownto = [
            one["messages"][0]["content"] for one in served.asked if "[Questions]" in one["messages"][0]["content"]
        ]
        assert not any("and more" in text or "Answer:" in text for text in shownto)  # nothing but the summary
        judge(url, "questions")(["xy and more"], ["xy1B"])  # another run: its questions are known
        assert sum("[Article]" in one["messages"][0]["content"] for one in served.asked) == 2
        assert len(served.asked) == 1 + 2 + 4 + 1 + 1
    assert [file.parent.name for file in (tmp_path / "cache").rglob("*.jsonl")].count("questions") == 1


def test_answers_in_no_form_are_unsure(judge):
    def answer(text, body):
        return "I cannot say." if "[Text]\nodd" in text else reader(text, body)

    with serving(Served("m", answer)) as url:
        found = judge(url, "questions")(["xy and more"] * 2, ["xy1B xy2C xy3D", "odd xy1B"])
    assert found[1] == {"score": 0.0, "correct": 0.0, "enough": 0.0, "unsure": 5.0}


def test_an_article_without_questions_is_not_judged(judge, capsys):
    def answer(text, body):
        return "No." if "[Article]\nodd" in text else reader(text, body)

    with serving(Served("m", answer)) as url:
        asked = judge(url, "questions")
        judgements, outcomes = compare(asked, ["xy", "xy", "odd", "odd"], ["xy1B", "", "a", "b"], [(0, 1), (2, 3)])
    assert judgements[2:] == [{}, {}]
    assert outcomes == [{"win": 1.0}, {}]
    said_so = "".join(capsys.readouterr())
    assert (
        "1 of 2 answers have not the asked form: 1 without 5 questions in the asked form; one begins 'No.'" in said_so
    )
    assert "They count as []" in said_so


def test_prompts_and_options_are_part_of_what_is_kept(judge, monkeypatch):
    served = Served("m", reader)
    with serving(served) as url:
        judge(url, "questions")(["xy"], ["xy1B"])
        monkeypatch.setattr(llm, "ASK", llm.ASK.replace("Read the article", "Read this article"))
        judge(url, "questions")(["xy"], ["xy1C"])
        for changed in ({"attempts": 5}, {"max_tokens": 999}, {"temperature": 0.5}):
            judge(url, "questions", **changed)(["xy"], ["xy1C"])
    assert sum("[Article]" in one["messages"][0]["content"] for one in served.asked) == 5


@pytest.mark.parametrize("which", ["pairwise", "questions"])
@pytest.mark.parametrize(
    "changed, said",
    [
        ({"attempts": 0}, "judge.attempts and judge.max_tokens must be at least 1, got 0 and"),
        ({"max_tokens": 0}, "judge.attempts and judge.max_tokens must be at least 1"),
        ({"temperature": 3.0}, r"judge.temperature must be in \[0, 2\], got 3.0"),
        ({"model": "null"}, "judge.model must name a model"),
    ],
)
def test_options_are_checked_before_anything_is_asked(judge, which, changed, said):
    with pytest.raises(ValueError, match=said):
        judge("http://127.0.0.1:1/v1", which, **changed)
