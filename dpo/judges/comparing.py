"""What a judge is, and how it is asked. It is a function of whole lists, of one of two forms:

    pointwise   (prompts, responses) -> list[dict[str, float]]
    pairwise    (prompts, firsts, seconds) -> list[Verdict]

A pointwise judge gives each response to the prompt beside it a judgement. Its "score" decides preferences and win
rates: higher is better, within one prompt only. Every further key is a measure of that response and is averaged into
`evaluation.json`. A pairwise judge says of two responses to a prompt whether the first wins, ties or loses.
The signature tells them apart.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Literal, TypeVar

from dpo.cache import remember_each
from dpo.data.records import Text
from dpo.training.distributed import on_main

JUDGES_VERSION = 1  # part of cache keys of answers and judged pairs: raise it when a change of a judge changes its say
AT_ONCE = 100  # answers that a costly judge is asked for at once, which are lost if it is stopped while it is asked

Verdict = Literal["win", "tie", "lose"]  # of the first of two responses
Pointwise = Callable[[Sequence[Text], Sequence[str]], list[dict[str, float]]]
Pairwise = Callable[[Sequence[Text], Sequence[str], Sequence[str]], list[Verdict]]
Judge = Pointwise | Pairwise
Marked = TypeVar("Marked", bound=Any)  # a function or class
WINS = {"win": 1.0, "tie": 0.5, "lose": 0.0}


def compare(
    judge: Judge, prompts: Sequence[Text], responses: Sequence[str], pairs: Sequence[tuple[int, int]]
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """A judgement of each response, empty from a pairwise judge; and what comes of each pair of them: `win`, 1 if the
    first is better, 0 if it is worse, 0.5 for a tie. All processes of a run must call.

    A pairwise judge is asked in both orders, so that one which favours a position decides nothing: a win must be one in
    either, all else is a tie. `inconsistent` is 1 where the orders disagree. Equal responses are a tie, unasked.

    prompts: one beside each response. pairs: of responses to one prompt, by their place.
    Raises: RuntimeError if the judge does not answer each question.
    """
    if not is_pairwise(judge):
        judgements = _ask(judge, prompts, responses)
        scores = [(judgements[first]["score"], judgements[second]["score"]) for first, second in pairs]
        return judgements, [{"win": 1.0 if one > other else 0.0 if one < other else 0.5} for one, other in scores]
    asked = [(first, second) for first, second in pairs if responses[first] != responses[second]]
    both = [*asked, *((second, first) for first, second in asked)]
    firsts, seconds = [responses[first] for first, _ in both], [responses[second] for _, second in both]
    verdicts = _ask(judge, [prompts[first] for first, _ in both], firsts, seconds) if both else []
    wins = [WINS[verdict] for verdict in verdicts]
    outcomes = {}
    for pair, one, other in zip(asked, wins[: len(asked)], wins[len(asked) :], strict=True):
        outcomes[pair] = {"win": one, "inconsistent": 0.0} if one == 1 - other else {"win": 0.5, "inconsistent": 1.0}
    return [{} for _ in responses], [outcomes.get(pair, {"win": 0.5, "inconsistent": 0.0}) for pair in pairs]


def costly(judge: Marked) -> Marked:
    """Mark a judge whose answers cost time or money. Each is asked for once and kept in the folder `cache`, under the
    judge's name and options, `JUDGES_VERSION`, the prompt and the response, or both in their order.

    So it must answer each question by itself, whatever else it is asked. It gets at most `AT_ONCE` of them at once, and
    may give None for one that it failed to answer: that is not kept, and ends the run, which asks for it again.
    """
    judge.is_costly = True
    return judge


def remembering(judge: Judge, node: Any, cache: str | Path) -> Judge:
    """A judge that is asked only what no run has asked it before, if it is marked as `costly`; any other as it is.

    node: what names it and its options in the config.
    """
    if not getattr(_function(judge), "is_costly", False):
        return judge
    pairwise = is_pairwise(judge)

    @wraps(_function(judge))
    def remembered(*columns: Sequence[Any]) -> list[Any]:
        def answer(questions: list[Any]) -> list[Any]:
            said = _complete(judge(*map(list, zip(*questions, strict=True))), len(questions))
            return [one if _is_answer(one, pairwise) else None for one in said]

        questions = [*zip(*columns, strict=True)]
        return remember_each(cache, "answers", {"judge": node, "judges": JUDGES_VERSION}, questions, answer, AT_ONCE)

    return remembered


def is_pairwise(judge: Judge) -> bool:
    function = _function(judge)
    return "firsts" in inspect.signature(getattr(function, "forward", function)).parameters


def _function(judge: Any) -> Any:
    """The function or module of a judge, whose options may be bound and whose answers may be kept."""
    return getattr(judge := inspect.unwrap(judge), "func", judge)


def _ask(judge: Judge, prompts: Sequence[Text], *responses: Sequence[str]) -> list[Any]:
    """What a judge says, asked once for all processes of a run."""
    said = _complete(on_main(lambda: judge(prompts, *responses)), len(prompts))
    pairwise = is_pairwise(judge)
    if bad := [one for one in said if not _is_answer(one, pairwise)]:
        must = f"one of {', '.join(WINS)}" if pairwise else "a dictionary with a score"
        raise RuntimeError(f"a judge must answer each question by {must}, got {bad[0]!r} ({len(bad)} of {len(said)})")
    return said


def _complete(said: list[Any], asked: int) -> list[Any]:
    if len(said) != asked:
        raise RuntimeError(f"a judge must answer each of {asked} questions, got {len(said)} answers")
    return said


def _is_answer(said: Any, pairwise: bool) -> bool:
    if pairwise:
        return isinstance(said, str) and said in WINS
    return isinstance(said, dict) and "score" in said and said["score"] == said["score"]  # no NaN
