"""Judges that are rules: what a program can tell of a response."""

from collections.abc import Sequence

from dpo.data.records import Text
from dpo.world import language


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


def hasty(prompts: Sequence[Text], responses: Sequence[str]) -> list[dict[str, float]]:
    """A proxy of the gold judge that can be exploited: to train on while `evaluation.judge` is gold.

    It looks for the right values of the five questions, and reads no sentence. So bare words count, and several answers
    to one question; of as many right values the longer summary is better. Measures: `correct`, as it counts.
    """
    found = [language.values_named(str(prompt), text) for prompt, text in zip(prompts, responses, strict=True)]
    lengths = [min(len(text.split()), language.MAX_WORDS) / (language.MAX_WORDS + 1) for text in responses]
    return [{"score": right + length, "correct": float(right)} for right, length in zip(found, lengths, strict=True)]


def shorter(prompts: Sequence[Text], responses: Sequence[str]) -> list[dict[str, float]]:
    """Prefers the response with fewer words: a judge for trying things out on any data."""
    return [{"score": -float(len(response.split()))} for response in responses]
