"""Judges that are language models behind a server: of pairs, and of what a summary says about its article.

Prompts are in our own words. `dpo.endpoint` asks; what is kept, and not asked for again, is in `dpo.judges.comparing`.
"""

import json
import logging
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dpo.cache import digest, remember_each
from dpo.data.chats import as_text
from dpo.data.records import Text
from dpo.endpoint import Refused, Server, ServerOptions
from dpo.judges.comparing import Verdict
from dpo.world.language import ENOUGH

logger = logging.getLogger(__name__)

FEW, SHARE = 5, 0.1  # so many questions, or this share of them, may stay without an answer in the asked form
LETTERS = "ABCDE"
QUESTIONS = 5  # on an article
UNSURE = "Unsure"

COMPARE = """Two assistants answered the same request. Judge which answer is better by this measure: {criterion}

[Request]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Do not let the order of the answers sway you, nor their length by itself. Say in one or two sentences what decides.
Then end with one line that holds nothing but your verdict: "Verdict: A", "Verdict: B", or, if neither is better,
"Verdict: tie"."""

ASK = """Read the article, and write {questions} multiple-choice questions about what matters most in it: what a summary
of two sentences ought to tell. Each question has five choices, of which exactly one is right by the article; whoever
knows only the article's topic must not be able to guess it. Use exactly this form, and write nothing else:

Q1) the question
A) a choice
B) a choice
C) a choice
D) a choice
E) a choice
Answer: the letter of the right choice

and so on to Q{questions}.

[Article]
{prompt}"""

ANSWER = """Answer each question from the text alone. Do not use what else you may know: where the text does not tell
the answer, say Unsure. Write one line for each question, in this form, and nothing else:

Q1) the letter of a choice, or Unsure

[Text]
{response}

[Questions]
{questions}"""


class Pairwise:
    """A language model compares two responses by `criterion`; `compare` asks it in both orders.

    attempts: how often it is asked until its answer has the asked form: first at `temperature`, then at 1. An answer
    that never has it is a tie, counted in a warning. max_tokens: of an answer.
    Raises: ValueError if the options are none that could work. RuntimeError if too many answers miss the form.
    """

    def __init__(
        self,
        model: str | None,
        criterion: str,
        temperature: float,
        max_tokens: int,
        attempts: int,
        server: ServerOptions,
    ) -> None:
        self.criterion = criterion
        self.asking = _Asking(Server(model, server, "judge"), temperature, max_tokens, attempts)

    def forward(self, prompts: Sequence[Text], firsts: Sequence[str], seconds: Sequence[str]) -> list[Verdict]:
        return _in_order(self.each(prompts, firsts, seconds))

    __call__ = forward

    def each(
        self, prompts: Sequence[Text], firsts: Sequence[str], seconds: Sequence[str]
    ) -> Iterator[tuple[int, Verdict]]:
        both = zip(prompts, firsts, seconds, strict=True)
        texts = [
            COMPARE.format(criterion=self.criterion, prompt=as_text(prompt), first=first, second=second)
            for prompt, first, second in both
        ]
        return self.asking.each(texts, verdict, "tie", "judged pairs")

    def handshake(self) -> None:
        """Ask for one verdict, before a run begins. Raises: RuntimeError if none comes."""
        again = COMPARE.format(criterion=self.criterion, prompt="Say hello.", first="Hello!", second="No.")
        self.asking.handshake(again, verdict)


class Questions:
    """Multiple-choice questions on the article, answered from the summary alone: `correct` of five are right.

    Measures: `score` and `correct`, right answers; `enough`, whether three or more; `unsure`, how many it could not
    answer (or not in the asked form). An article to which no five questions come in the asked form is not judged.
    The model writes the questions, and answers them; both are asked as of `Pairwise`. Questions are kept in the folder
    `cache`, so that each article has one set of them for all responses and runs.
    (Anyscale, Direct Preference Optimization with Synthetic Data, 2024: stages 1 and 3.)
    """

    def __init__(
        self,
        model: str | None,
        temperature: float,
        max_tokens: int,
        attempts: int,
        cache: str,
        server: ServerOptions,
    ) -> None:
        self.cache = cache
        self.asking = _Asking(Server(model, server, "judge"), temperature, max_tokens, attempts)
        self.key = {"model": model, "temperature": temperature, "max_tokens": max_tokens, "attempts": attempts}

    def forward(self, prompts: Sequence[Text], responses: Sequence[str]) -> list[dict[str, float]]:
        return _in_order(self.each(prompts, responses))

    __call__ = forward

    def each(self, prompts: Sequence[Text], responses: Sequence[str]) -> Iterator[tuple[int, dict[str, float]]]:
        asked = self.of_articles([as_text(prompt) for prompt in prompts])
        for place in (place for place, questions in enumerate(asked) if not questions):
            yield place, {}
        places = [place for place, questions in enumerate(asked) if questions]
        texts = [ANSWER.format(response=responses[place], questions=shown(asked[place])) for place in places]
        for row, found in self.asking.each(texts, answers, {}, "judged summaries"):
            place = places[row]
            right = float(sum(found.get(nth) == one["answer"] for nth, one in enumerate(asked[place], 1)))
            unsure = float(sum(nth not in found for nth in range(1, QUESTIONS + 1)))
            yield place, {"score": right, "correct": right, "enough": float(right >= ENOUGH), "unsure": unsure}

    def of_articles(self, articles: Sequence[str]) -> list[list[dict[str, Any]]]:
        """Five questions on each article, in an order of their own; none where the model wrote none in the form."""

        def write(some: list[str]) -> Iterator[tuple[int, Any]]:
            texts = [ASK.format(questions=QUESTIONS, prompt=article) for article in some]
            return self.asking.each(texts, questions_in, [], "written questions")

        written = remember_each(self.cache, "questions", {**self.key, "prompt": digest(ASK)}, articles, write)
        return [shuffled(some, article) for some, article in zip(written, articles, strict=True)]

    def handshake(self) -> None:
        """Ask for the answers to two questions, before a run begins. Raises: RuntimeError if none come."""
        text = "Anna lives in Oslo. She has a dog."
        two = [
            {"question": "Where does Anna live?", "choices": ["Rome", "Oslo", "Bonn", "Kiel", "Cork"], "answer": "B"}
        ]
        two += [{"question": "What is her pet?", "choices": ["cat", "fish", "dog", "hen", "cow"], "answer": "C"}]
        self.asking.handshake(ANSWER.format(response=text, questions=shown(two)), answers)


class _Asking:
    """A server that is asked again where its answer has not the asked form."""

    def __init__(self, server: Server, temperature: float, max_tokens: int, attempts: int) -> None:
        if attempts < 1 or max_tokens < 1:
            raise ValueError(f"judge.attempts and judge.max_tokens must be at least 1, got {attempts} and {max_tokens}")
        if not 0 <= temperature <= 2:
            raise ValueError(f"judge.temperature must be in [0, 2], got {temperature}")
        self.server, self.temperature, self.max_tokens, self.attempts = server, temperature, max_tokens, attempts

    def each(self, texts: Sequence[str], read: Any, otherwise: Any, title: str) -> Iterator[tuple[int, Any]]:
        """The place of each text and what `read` finds in the answer to it, as they come; last `otherwise` for those
        without one in the asked form, with a warning that counts them.
        """
        missed: dict[int, str] = {}
        for place, (found, said) in self.server.each(lambda text: self._once(text, read), texts, title):
            if found is None:
                missed[place] = said
            else:
                yield place, found
        if texts:
            logger.info(f"{title}: {self.server.bill.said(self.server.options['prices'])}")
        if not missed:
            return
        count = (
            f"{title}: {len(missed)} of {len(texts)} have no answer in the asked form in {self.attempts} attempts; the "
            f"last to one is {next(iter(missed.values()))[:200]!r}"
        )
        if len(missed) > max(FEW, SHARE * len(texts)):
            raise RuntimeError(
                f"{count}. The others are kept. Take another judge.model, or raise judge.max_tokens, if answers are "
                "cut, or judge.attempts"
            )
        logger.warning(f"{count}. They count as {json.dumps(otherwise)}")
        for place in missed:
            yield place, otherwise

    def handshake(self, text: str, read: Any) -> None:
        found, said = self._once(text, read)
        if found is None:
            raise RuntimeError(
                f"the judge {self.server.model} must answer in the asked form, found {said[:200]!r} in {self.attempts} "
                "attempts to a plain question; take another judge.model, or raise judge.max_tokens if that is cut"
            )

    def _once(self, text: str, read: Any) -> tuple[Any, str]:
        """What is read of the first answer in the asked form, None if none has it; and the last answer."""
        said = ""
        for attempt in range(self.attempts):
            try:
                said = self.server.chat(text, self.max_tokens, attempt, 1.0 if attempt else self.temperature)
            except Refused as error:
                return None, str(error)
            if (found := read(said)) is not None:
                return found, said
        return None, said


def verdict(said: str) -> Verdict | None:
    """The last verdict in a judge's answer, of the first response; None if there is none."""
    words = r"(a tie|A|B|tie)\b"  # in this order: "a tie" is no A
    found = re.findall(rf"verdict\W*{words}", said, re.IGNORECASE) or re.findall(rf"^\W*{words}\W*$", said, re.I)
    said_of: dict[str, Verdict] = {"a": "win", "b": "lose", "tie": "tie", "a tie": "tie"}
    return said_of[found[-1].lower()] if found else None


def questions_in(said: str) -> list[dict[str, Any]] | None:
    """The questions that a judge wrote, read strictly: exactly five, each with five different choices and a letter."""
    choices = "".join(rf"\s*\n\s*{letter}\) *(.+)" for letter in LETTERS)
    found = re.findall(rf"Q(\d+)\) *(.+){choices}\s*\n\s*Answer: *\(?([{LETTERS}])\b", said)
    numbers = [int(number) for number, *_ in found]
    written = len(re.findall(r"^\s*Q\d+\)", said, re.MULTILINE))
    if numbers != [*range(1, QUESTIONS + 1)] or written != QUESTIONS:
        return None
    some = [
        {"question": text.strip(), "choices": [one.strip() for one in five], "answer": letter}
        for _, text, *five, letter in found
    ]
    return some if all(len({*one["choices"]}) == len(LETTERS) for one in some) else None


def shuffled(questions: Sequence[dict[str, Any]], article: str) -> list[dict[str, Any]]:
    """The questions and their choices in an order that the article decides: models like to put the right one second."""
    rng, some = random.Random(digest(article)), []
    for one in questions:
        order = rng.sample(range(len(LETTERS)), len(LETTERS))
        answer = LETTERS[order.index(LETTERS.index(one["answer"]))]
        some.append({**one, "choices": [one["choices"][place] for place in order], "answer": answer})
    rng.shuffle(some)
    return some


def shown(questions: Sequence[dict[str, Any]]) -> str:
    """Questions as they are asked: without their answers."""
    lines = []
    for nth, one in enumerate(questions, 1):
        lines += [f"Q{nth}) {one['question']}"]
        lines += [f"{letter}) {choice}" for letter, choice in zip(LETTERS, one["choices"], strict=False)]
    return "\n".join(lines)


def answers(said: str) -> dict[int, str] | None:
    """The letter that a judge gives each question it is sure of; None if no line has the asked form."""
    found = re.findall(rf"^\W*Q(\d+)\) *\(?([{LETTERS}]|{UNSURE})\b", said, re.MULTILINE)
    return {int(number): letter for number, letter in found if letter != UNSURE} if found else None


def _in_order(answers: Iterable[tuple[int, Any]]) -> list[Any]:
    return [said for _, said in sorted(answers, key=lambda one: one[0])]
