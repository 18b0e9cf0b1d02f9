"""Judges score responses to prompts: higher is better, and scores compare within a prompt only.

A judge is a function `(prompts, responses) -> judgements` of a whole list at once, one dictionary for each response to
the prompt beside it. Its "score" decides preferences and win rates; every further key is a measure of that response and
is averaged into `evaluation.json`.
"""

from collections.abc import Callable, Sequence

from dpo.data.records import Text
from dpo.training.distributed import on_main
from dpo.world import language

JUDGES_VERSION = 1  # part of the cache key of judged pairs: raise it when a change of a judge changes its scores

Judge = Callable[[Sequence[Text], Sequence[str]], list[dict[str, float]]]


def judged(judge: Judge, prompts: Sequence[Text], responses: Sequence[str]) -> list[dict[str, float]]:
    """What a judge says, asked once for all processes of a run; all of them must call.

    Raises: RuntimeError if it does not say something of each response.
    """
    said = on_main(lambda: judge(prompts, responses))
    if len(said) != len(responses):
        raise RuntimeError(f"a judge must return a judgement of each of {len(responses)} responses, got {len(said)}")
    return said


def gold(prompts: Sequence[Text], responses: Sequence[str]) -> list[dict[str, float]]:
    """The embedded world's exact judge: Anyscale's preference rule over the article's five questions.

    Measures: `correct` (how many of 5 questions the summary answers rightly), `enough` (whether three or more), `wrong`
    (how many false statements it makes), `any_wrong` (whether it makes one) and `valid` (share of clauses that follow
    the world's grammar). In `evaluation.json` the first and third are mean numbers, the second and fourth shares.
    """
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(
            "judge=gold reads articles of the embedded world, found a chat; try judge=none or judge=shorter"
        )
    verdicts = [language.verdict(str(prompt), response) for prompt, response in zip(prompts, responses, strict=True)]
    return [
        {
            "score": language.utility(verdict),
            "correct": float(verdict.correct),
            "enough": float(verdict.correct >= language.ENOUGH),
            "wrong": float(verdict.wrong),
            "any_wrong": float(verdict.wrong > 0),
            "valid": verdict.valid,
        }
        for verdict in verdicts
    ]


def shorter(prompts: Sequence[Text], responses: Sequence[str]) -> list[dict[str, float]]:
    """Prefers the response with fewer words: a judge for trying things out on any data."""
    return [{"score": -float(len(response.split()))} for response in responses]
