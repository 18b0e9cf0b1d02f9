"""What a judge is, and how it is asked. It is a function of whole lists, of one of two forms:

    pointwise   (prompts, responses) -> list[dict[str, float]]
    pairwise    (prompts, firsts, seconds) -> list[Verdict]

A pointwise judge gives each response to the prompt beside it a judgement. Its "score" decides preferences and win
rates, unless a rule does: higher is better, within one prompt only. Every further key is a measure of that response,
and is averaged into `evaluation.json`. An empty judgement is that of a response which it cannot judge. A pairwise judge
says of two responses to a prompt whether the first wins, ties or loses. The signature tells them apart.

A judge whose answers cost time or money is a class with a method `each`, of the same arguments. It gives the place of a
question and its answer, in any order, as they come, and each is kept: no run asks a second time. What it could not
make out it gives as `Missed`, which is kept, too, and its `otherwise` is what that counts as: see `settled`.
"""

import inspect
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Literal, TypedDict

from typing_extensions import TypeIs

from dpo.cache import remember_each
from dpo.data.records import Text
from dpo.losses.pairs import unbound
from dpo.training.distributed import on_main

logger = logging.getLogger(__name__)

JUDGES_VERSION = 2  # part of cache keys of answers and judged pairs: raise it when a change of a judge changes its say

Verdict = Literal["win", "tie", "lose"]  # of the first of two responses
Judgement = dict[str, float]
Pointwise = Callable[[Sequence[Text], Sequence[str]], list[Judgement]]
Pairwise = Callable[[Sequence[Text], Sequence[str], Sequence[str]], list[Verdict]]
Judge = Pointwise | Pairwise
Rule = Callable[[Judgement, Judgement], float]
WINS = {"win": 1.0, "tie": 0.5, "lose": 0.0}
FEW, SHARE = 5, 0.1  # so many questions, or this share of them, may stay without an answer in the asked form


class Missed(TypedDict):
    """In place of an answer that has not the asked form."""

    missed: str  # why, in the same words for all of a kind
    said: str  # how what was said begins


def compare(
    judge: Judge,
    prompts: Sequence[Text],
    responses: Sequence[str],
    pairs: Sequence[tuple[int, int]],
    rule: Rule | None = None,
) -> tuple[list[Judgement], list[dict[str, float]]]:
    """A judgement of each response, empty from a pairwise judge; and what comes of each pair of them: `win`, 1 if the
    first is better, 0 if it is worse, 0.5 for a tie. All processes of a run must call.

    A pairwise judge is asked in both orders, so that one which favours a position decides nothing: a win must be one in
    either, all else is a tie. `inconsistent` is 1 where the orders disagree. Equal responses are a tie, unasked.

    prompts: one beside each response. pairs: of responses to one prompt, by their place. Nothing comes of one with a
    response that the judge cannot judge. rule: makes `win` of two judgements, with `words` beside what the judge says;
    None: the higher score wins.
    Raises: RuntimeError if the judge does not answer each question.
    """
    if not is_pairwise(judge):
        judgements = _ask(judge, prompts, responses)
        if prompts and not any(judgements):
            raise RuntimeError(f"a judge must judge some responses, found that it could judge none of {len(prompts)}")
        words = [{**one, "words": float(len(text.split()))} for one, text in zip(judgements, responses, strict=True)]
        decide = rule or by_score
        wins = [
            {"win": decide(words[one], words[other])} if judgements[one] and judgements[other] else {}
            for one, other in pairs
        ]
        return judgements, wins
    asked = [(first, second) for first, second in pairs if responses[first] != responses[second]]
    both = [*asked, *((second, first) for first, second in asked)]
    firsts, seconds = [responses[first] for first, _ in both], [responses[second] for _, second in both]
    verdicts = _ask(judge, [prompts[first] for first, _ in both], firsts, seconds) if both else []
    decided = [WINS[verdict] for verdict in verdicts]
    outcomes = {}
    for pair, one, other in zip(asked, decided[: len(asked)], decided[len(asked) :], strict=True):
        outcomes[pair] = {"win": one, "inconsistent": 0.0} if one == 1 - other else {"win": 0.5, "inconsistent": 1.0}
    return [{} for _ in responses], [outcomes.get(pair, {"win": 0.5, "inconsistent": 0.0}) for pair in pairs]


def by_score(first: Judgement, second: Judgement) -> float:
    """1 where the first has the higher score, 0 where the second has, 0.5 where they are equal."""
    one, other = first["score"], second["score"]
    return 1.0 if one > other else 0.0 if one < other else 0.5


def cached_judge(judge: Judge, node: Any, cache: str | Path) -> Judge:
    """A judge that is asked only what no run has asked it before, if its answers cost something; any other as it is.

    They are kept in the folder `cache`, under the judge's name and options, `JUDGES_VERSION`, the prompt and the
    response, or both in their order. So it must answer each question by itself, whatever else it is asked.

    node: what names it and the options that decide its answers.
    """
    each: Callable[..., Iterator[tuple[int, Any]]] | None = getattr(_function(judge), "each", None)
    if each is None:
        return judge
    pairwise, otherwise = is_pairwise(judge), getattr(_function(judge), "otherwise", None)

    @wraps(_function(judge).forward)
    def remembered(*columns: Sequence[Any]) -> list[Any]:
        questions = [*zip(*columns, strict=True)]

        def answer(some: list[Any]) -> Iterator[tuple[int, Any]]:
            for place, said in up_to_limit(each(*map(list, zip(*some, strict=True))), len(questions)):
                yield place, said if is_missed(said) else _checked(said, pairwise)

        kept = remember_each(cache, "answers", {"judge": node, "judges": JUDGES_VERSION}, questions, answer)
        return settled(kept, otherwise)

    return remembered


def is_missed(said: Any) -> TypeIs[Missed]:
    return isinstance(said, dict) and "missed" in said


def settled(answers: Sequence[Any], otherwise: Any) -> list[Any]:
    """The answers, with `otherwise` for those that were missed, which a warning counts by their reasons.

    Raises: RuntimeError if these are more than `FEW` and than the share `SHARE`.
    """
    if missed := [one for one in answers if is_missed(one)]:
        if len(missed) > _limit(len(answers)):
            raise _too_many(missed, f"of {len(answers)}")
        logger.warning(f"{_counted(missed, f'of {len(answers)}')}. They count as {json.dumps(otherwise)}")
    return [otherwise if is_missed(one) else one for one in answers]


def up_to_limit(answers: Iterator[tuple[int, Any]], total: int) -> Iterator[tuple[int, Any]]:
    """The places and answers, until more are missed than `settled` takes of `total`: the rest is not to be paid for."""
    missed = []
    for number, (place, said) in enumerate(answers, 1):
        yield place, said
        missed += [said] if is_missed(said) else []
        if len(missed) > _limit(total):
            raise _too_many(missed, f"of the first {number} of {total}")


def _limit(total: int) -> float:
    return max(FEW, SHARE * total)


def _counted(missed: Sequence[Missed], of: str) -> str:
    whys = ", ".join(f"{count} {why}" for why, count in Counter(one["missed"] for one in missed).most_common())
    return f"judge: {len(missed)} {of} answers have not the asked form: {whys}; one begins {missed[-1]['said']!r}"


def _too_many(missed: Sequence[Missed], of: str) -> RuntimeError:
    return RuntimeError(
        f"{_counted(missed, of)}. At most {FEW}, or {SHARE:.0%}, may be so. All that was answered is kept for these "
        "options; take another judge.model, or raise judge.max_tokens, if answers are cut, or judge.attempts"
    )


def is_pairwise(judge: Judge) -> bool:
    function = _function(judge)
    return "firsts" in inspect.signature(getattr(function, "forward", function)).parameters


def _function(judge: Any) -> Any:
    """The function or module of a judge, whose options may be bound and whose answers may be kept."""
    return unbound(inspect.unwrap(judge))


def _ask(judge: Judge, prompts: Sequence[Text], *responses: Sequence[str]) -> list[Any]:
    """What a judge says, asked once for all processes of a run."""
    said = on_main(lambda: judge(prompts, *responses))
    if len(said) != len(prompts):
        raise RuntimeError(f"a judge must answer each of {len(prompts)} questions, got {len(said)} answers")
    pairwise = is_pairwise(judge)
    return [_checked(one, pairwise) for one in said]


def _checked(said: Any, pairwise: bool) -> Any:
    """An answer, if it is one."""
    if pairwise:
        if isinstance(said, str) and said in WINS:
            return said
        raise RuntimeError(f"a judge of pairs must answer each question by one of {', '.join(WINS)}, got {said!r}")
    if isinstance(said, dict) and (not said or ("score" in said and said["score"] == said["score"])):  # no NaN
        return said
    raise RuntimeError(
        f"a judge must answer each question by a dictionary with a score, or an empty one where it cannot, got {said!r}"
    )
