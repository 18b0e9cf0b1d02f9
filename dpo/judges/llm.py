"""Judges that are language models behind a server: of pairs, and of what a summary says about its article.

Prompts are in our own words. `dpo.endpoint` asks; what is kept, and not asked for again, is in `dpo.judges.comparing`.
"""

import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from dpo.cache import digest, remember_each
from dpo.data.chats import as_text
from dpo.data.records import Text
from dpo.endpoint import Refused, Server, ServerOptions
from dpo.judges.comparing import JUDGES_VERSION, Missed, Verdict, is_missed, settled, up_to_limit
from dpo.world.language import ENOUGH

logger = logging.getLogger(__name__)
Read = TypeVar("Read")

BEGINS = 200  # characters of an answer that are kept of one without the asked form
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
    that never has it is a tie, see `settled`. max_tokens: of an answer.
    Raises: ValueError if the options are none that could work. RuntimeError if too many answers miss the form.
    """

    otherwise: Verdict = "tie"

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
        return _in_order(self.each(prompts, firsts, seconds), self.otherwise)

    __call__ = forward

    def each(
        self, prompts: Sequence[Text], firsts: Sequence[str], seconds: Sequence[str]
    ) -> Iterator[tuple[int, Verdict | Missed]]:
        both = zip(prompts, firsts, seconds, strict=True)
        texts = [
            COMPARE.format(criterion=self.criterion, prompt=as_text(prompt), first=first, second=second)
            for prompt, first, second in both
        ]
        return self.asking.each(texts, verdict, "judged pairs")

    def handshake(self) -> None:
        """Ask for one verdict, before a run begins. Raises: RuntimeError if none comes."""
        again = COMPARE.format(criterion=self.criterion, prompt="Say hello.", first="Hello!", second="No.")
        self.asking.handshake(again, verdict)


class Questions:
    """Multiple-choice questions on the article, answered from the summary alone: `correct` of five are right.

    Measures: `score` and `correct`, right answers; `enough`, whether three or more; `unsure`, how many it could not
    answer: all, where it never answers in the asked form, see `settled`. An article to which no five questions come in
    that form is not judged.
    The model writes the questions, and answers them; both are asked as of `Pairwise`. Questions are kept in the folder
    `cache`, so that each article has one set of them for all responses and runs.
    (Anyscale, Direct Preference Optimization with Synthetic Data, 2024: stages 1 and 3.)
    """

    otherwise = {"score": 0.0, "correct": 0.0, "enough": 0.0, "unsure": float(QUESTIONS)}  # noqa: RUF012

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
        return _in_order(self.each(prompts, responses), self.otherwise)

    __call__ = forward

    def each(
        self, prompts: Sequence[Text], responses: Sequence[str]
    ) -> Iterator[tuple[int, dict[str, float] | Missed]]:
        asked = self.of_articles([as_text(prompt) for prompt in prompts])
        for place in (place for place, questions in enumerate(asked) if not questions):
            yield place, {}
        places = [place for place, questions in enumerate(asked) if questions]
        texts = [ANSWER.format(response=responses[place], questions=shown(asked[place])) for place in places]
        for row, found in self.asking.each(texts, partial(answers, asked=QUESTIONS), "judged summaries"):
            place = places[row]
            if is_missed(found):
                yield place, found
                continue
            right = float(sum(found.get(nth) == one["answer"] for nth, one in enumerate(asked[place], 1)))
            unsure = float(sum(nth not in found for nth in range(1, QUESTIONS + 1)))
            yield place, {"score": right, "correct": right, "enough": float(right >= ENOUGH), "unsure": unsure}

    def of_articles(self, articles: Sequence[str]) -> list[list[dict[str, Any]]]:
        """Five questions on each article, in an order of their own; none where the model wrote none in the form."""

        distinct = [*dict.fromkeys(articles)]

        def write(some: list[str]) -> Iterator[tuple[int, Any]]:
            texts = [ASK.format(questions=QUESTIONS, prompt=article) for article in some]
            return up_to_limit(self.asking.each(texts, questions_in, "written questions"), len(distinct))

        key = {**self.key, "prompt": digest(ASK), "judges": JUDGES_VERSION}
        written: list[Any] = settled(remember_each(self.cache, "questions", key, distinct, write), [])
        on = {article: shuffled(some, article) for article, some in zip(distinct, written, strict=True)}
        return [on[article] for article in articles]

    def handshake(self) -> None:
        """Ask for the answers to two questions, before a run begins. Raises: RuntimeError if none come."""
        text = "Anna lives in Oslo. She has a dog."
        two = [
            {"question": "Where does Anna live?", "choices": ["Rome", "Oslo", "Bonn", "Kiel", "Cork"], "answer": "B"}
        ]
        two += [{"question": "What is her pet?", "choices": ["cat", "fish", "dog", "hen", "cow"], "answer": "C"}]
        self.asking.handshake(ANSWER.format(response=text, questions=shown(two)), partial(answers, asked=2))


class _Asking:
    """A server that is asked again where its answer has not the asked form."""

    def __init__(self, server: Server, temperature: float, max_tokens: int, attempts: int) -> None:
        if attempts < 1 or max_tokens < 1:
            raise ValueError(f"judge.attempts and judge.max_tokens must be at least 1, got {attempts} and {max_tokens}")
        if not 0 <= temperature <= 2:
            raise ValueError(f"judge.temperature must be in [0, 2], got {temperature}")
        self.server, self.temperature, self.max_tokens, self.attempts = server, temperature, max_tokens, attempts

    def each(
        self, texts: Sequence[str], read: Callable[[str], Read], title: str
    ) -> Iterator[tuple[int, Read | Missed]]:
        """The place of each text and what `read` finds in the answer to it, as they come; last what was paid."""
        try:
            yield from self.server.each(lambda text: self._once(text, read), texts, title)
        finally:
            if texts:
                logger.info(f"{title}: {self.server.bill.said(self.server.options['prices'])}")

    def handshake(self, text: str, read: Callable[[str], Any]) -> None:
        if self.server.options["url"] is not None and is_missed(found := self._once(text, read)):
            raise RuntimeError(
                f"the judge {self.server.model} must answer in the asked form, found {found['said']!r} in "
                f"{self.attempts} attempts to a plain question, the last {found['missed']}; take another judge.model, "
                "or raise judge.max_tokens if it was cut"
            )

    def _once(self, text: str, read: Callable[[str], Read]) -> Read | Missed:
        """What is read of the first answer in the asked form; where none has it, why the last has not."""
        why = said = ""
        for attempt in range(self.attempts):
            try:
                said, cut = self.server.chat(text, self.max_tokens, attempt, 1.0 if attempt else self.temperature)
            except Refused as error:
                return {"missed": "refused by the server", "said": str(error)[:BEGINS]}
            try:
                return read(said)
            except ValueError as error:
                why = "cut at judge.max_tokens" if cut else str(error) if said.strip() else "empty"
        return {"missed": why, "said": said[:BEGINS]}


def verdict(said: str) -> Verdict:
    """The verdict of the first response that a judge's answer ends in, alone in its last line or after a sentence.

    Raises: ValueError that says why there is none. A judge that talks of verdicts has not given one.
    """
    words = r"(a tie|tie|A|B)\b"
    last = said.strip().rpartition("\n")[2]
    found = re.search(rf"(?:^|[.!?]\s)[^\w\"]*verdict\W*{words}\W*$", last, re.I) or re.search(
        rf"^\W*{words}\W*$", last, re.I
    )
    if not found:
        raise ValueError("without a verdict in the last line")
    told = {one.lower().removeprefix("a ") for one in re.findall(rf"verdict\W*{words}", said, re.I)}
    if len(told) > 1:
        raise ValueError("with several verdicts")
    said_of: dict[str, Verdict] = {"a": "win", "b": "lose", "tie": "tie", "a tie": "tie"}
    return said_of[found[1].lower()]


def questions_in(said: str) -> list[dict[str, Any]]:
    """The questions that a judge wrote, read strictly: exactly five different ones, each with five different choices
    and a letter.

    Raises: ValueError that says what they are not.
    """
    choices = "".join(rf"\s*\n\s*{letter}\) *(.+)" for letter in LETTERS)
    found = re.findall(rf"Q(\d+)\) *(.+){choices}\s*\n\s*Answer: *\(?([{LETTERS}])\b", said)
    numbers = [int(number) for number, *_ in found]
    written = len(re.findall(r"^\s*Q\d+\)", said, re.MULTILINE))
    if numbers != [*range(1, QUESTIONS + 1)] or written != QUESTIONS:
        raise ValueError(f"without {QUESTIONS} questions in the asked form")
    some = [
        {"question": text.strip(), "choices": [one.strip() for one in five], "answer": letter}
        for _, text, *five, letter in found
    ]
    if not all(len({*one["choices"]}) == len(LETTERS) for one in some):
        raise ValueError("with a choice twice")
    if len({one["question"] for one in some}) < QUESTIONS:
        raise ValueError("with a question twice")
    return some


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


def answers(said: str, asked: int) -> dict[int, str]:
    """The letter that a judge gives each of the `asked` questions that it is sure of.

    Raises: ValueError if not each of them has a line in the asked form, and one answer. "Q1) A man" is none: it may be
    the question, said again.
    """
    one = rf"(?:([{LETTERS}])(?=[).:,*\]]|\s*$)|({UNSURE})\b)"
    lines = re.findall(rf"^\W*Q(\d+)\) *\(?{one}", said, re.MULTILINE)
    found = {(int(number), letter or unsure) for number, letter, unsure in lines if int(number) <= asked}
    numbers = [number for number, _ in found]
    if len({*numbers}) < len(numbers):
        raise ValueError("with several answers to a question")
    if len(numbers) < asked:
        raise ValueError("without a line for each question")
    return {number: letter for number, letter in found if letter != UNSURE}


def _in_order(answers: Iterable[tuple[int, Any]], otherwise: Any) -> list[Any]:
    return settled([said for _, said in sorted(answers, key=lambda one: one[0])], otherwise)
