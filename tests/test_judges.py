"""What a judge must say, and of what it is asked."""

import pytest

from dpo import judges

PROMPTS, RESPONSES = ["a", "b", "b"], ["one", "two words", "three words here"]


def test_a_judge_is_asked_once_and_of_all():
    asked = []

    def judge(prompts, responses):
        asked.append((prompts, responses))
        return judges.shorter(prompts, responses)

    assert judges.judged(judge, PROMPTS, RESPONSES) == [{"score": -1.0}, {"score": -2.0}, {"score": -3.0}]
    assert asked == [(PROMPTS, RESPONSES)]


@pytest.mark.parametrize("number", [0, 2, 4])
def test_a_judge_must_say_something_of_each_response(number):
    with pytest.raises(RuntimeError, match=f"a judgement of each of 3 responses, got {number}"):
        judges.judged(lambda *_: [{"score": 1.0}] * number, PROMPTS, RESPONSES)
