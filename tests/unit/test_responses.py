"""Figures of a response's text, against counting by hand and against the allow-list as it was published."""

import re
import string

import pytest

from dpo import evaluate, judges, responses
from dpo.policy.sampling import Sample


def answer(text: str) -> Sample:
    return Sample([0], [*range(len(text.split())), 99], text, True)


def test_figures_by_hand():
    """Ten words and 39 characters; what is as long as the prompt is too long."""
    prompt = "one two six ten one two six ten one two"
    assert len(prompt) == 39
    assert responses.figures(prompt, "a b c") == {"words": 3, "compression": 0.3, "too_long": False, "invalid": False}
    for text, too_long in (("x" * 38, False), ("x" * 39, True), ("x " * 30, True)):
        assert responses.figures(prompt, text)["too_long"] is too_long
    assert responses.figures(prompt, "")["compression"] == 0
    assert responses.figures(" \n", "a b")["compression"] == 2  # a prompt without words counts as one


def test_the_text_of_a_chat_is_that_of_its_turns():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a cat?"}]
    assert responses.text_of(chat) == "Be brief.\nWhat is a cat?"
    found = responses.figures(chat, "a b c")
    assert found == {"words": 3, "compression": 0.5, "too_long": False, "invalid": False}
    assert responses.figures(chat, "x" * 24)["too_long"] is True  # 9 and 14 characters, and the break between them


@pytest.mark.parametrize(
    "text,invalid",
    [
        ("", False),
        ("Plain text, 12 %: {a|b} ~ `c` \\ \t\r\n", False),
        ("“It’s 5° – £3 or €4… ™ — ‘Æsop’”, æ", False),  # noqa: RUF001
        ("naïve café, Zürich, Ångström, façade, señor", False),  # accents are stripped first, composed or not
        ("cafe\u0301", False),
        ("straße", True),
        ("smørrebrød", True),
        ("猫", True),
        ("a 🙂", True),
        ("\ufffd", True),
        ("\x00", True),
        ("¥", True),
        ("non\u00a0breaking", True),
    ],
)
def test_characters_that_are_invalid(text, invalid):
    assert responses.is_invalid(text) is invalid


def test_the_allow_list_is_the_published_one():
    """Every character there is, against the pattern of the source as it reads."""
    permitted = string.ascii_letters + string.digits + string.whitespace + string.punctuation + "’‘–—“”…™°Ææ"  # noqa: RUF001
    pattern = re.compile(f"[^{re.escape(permitted)}\\£|\\€]")
    every = {chr(code) for code in range(0x110000)}
    assert {one for one in every if not pattern.findall(one)} == responses.ALLOWED


@pytest.mark.parametrize("correct,enough,four", [(0, 0, 0), (2, 0, 0), (3, 1, 0), (4, 1, 1), (5, 1, 1)])
def test_right_answers_of_any_judge_that_counts_them(correct, enough, four):
    def judge(prompts, responses) -> list[dict[str, float]]:
        return [{"score": 0.0, "correct": float(correct)} for _ in prompts]

    rows, found = evaluate.describe(["p"], [answer("a")], judge)
    assert (rows[0]["enough"], rows[0]["four_correct"]) == (enough, four)
    assert (found["correct"], found["enough"], found["four_correct"]) == (correct, enough, four)
    assert "enough" not in evaluate.describe(["p"], [answer("a")], judges.shorter)[1]


def test_means_and_the_median():
    """Beside their number; of the baseline what its length and gibberish are told by."""
    prompts, said = ["a b c d"] * 4, ["a", "a b", "a b c", "a b c d e ø g"]
    rows, found = evaluate.describe(prompts, [answer(text) for text in said], judges.shorter, ["a b", "ß", "a", "a"])
    assert [row["compression"] for row in rows] == [0.25, 0.5, 0.75, 1.75]
    assert [row["words"] for row in rows] == [1, 2, 3, 7]
    assert (found["n"], found["compression"], found["compression/median"]) == (4, 0.8125, 0.625)
    assert (found["words"], found["baseline/words"]) == (3.25, 1.25)
    assert (found["too_long"], found["invalid"], found["baseline/invalid"]) == (0.25, 0.25, 0.25)
    assert not {key for key in evaluate.describe(prompts, [answer("a")] * 4, judges.shorter)[1] if "baseline" in key}
