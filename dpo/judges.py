"""Judges score the responses to one prompt: higher is better, and scores compare within a prompt only.

A judge is a function `(prompt, responses) -> judgements`, one dictionary per response. Its "score" decides preferences
and win rates; every further key is a measure of that response and is averaged into `evaluation.json`.
"""

from collections.abc import Callable

from dpo.data.records import Text
from dpo.world import language

JUDGES_VERSION = 1  # part of the cache key of judged pairs: raise it when a change of a judge changes its scores

Judge = Callable[[Text, list[str]], list[dict[str, float]]]


def gold(prompt: Text, responses: list[str]) -> list[dict[str, float]]:
    """The embedded world's exact judge: Anyscale's preference rule over the article's five questions.

    Measures: `correct` (how many of 5 questions the summary answers rightly), `enough` (whether three or more), `wrong`
    (how many false statements it makes), `any_wrong` (whether it makes one) and `valid` (share of clauses that follow
    the world's grammar). In `evaluation.json` the first and third are mean numbers, the second and fourth shares.
    """
    if not isinstance(prompt, str):
        raise ValueError(
            "judge=gold reads articles of the embedded world, found a chat; try judge=none or judge=shorter"
        )
    verdicts = [language.verdict(prompt, response) for response in responses]
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


def shorter(prompt: Text, responses: list[str]) -> list[dict[str, float]]:
    """Prefers the response with fewer words: a judge for trying things out on any data."""
    return [{"score": -float(len(response.split()))} for response in responses]
