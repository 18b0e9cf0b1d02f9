"""Several responses to a prompt with a score each, and the pairs that are made of them."""

import math
import random
from collections.abc import Sequence
from functools import partial
from html.parser import HTMLParser
from itertools import combinations
from typing import Any, Literal

from dpo.cache import digest
from dpo.data.records import Dataset, OnFaulty, Preference, paired, preference
from dpo.data.sources import Columns, Source, elsewhere, placed, require
from dpo.data.texts import HUMAN, TURN

Pairs = Literal["best_worst", "best_random", "all"]


def ranked(
    path: str,
    validation_path: str | None,
    pairs: Pairs,
    validation_fraction: float,
    on_faulty: OnFaulty,
    config: str | None = None,
    split: str | None = None,
    validation_split: str | None = None,
    columns: Columns | None = None,
    chat: bool = False,
) -> Dataset:
    """Rows of a `prompt` and a list of `responses`, all text or chat messages, and of their `scores`, the higher the
    better, or `ranks`, the lower the better.

    pairs: which of a row: the best and the worst response; the best and one that is drawn among the worse ones, by a
    hash of the row, as UltraFeedback was binarized (2310.16944); or all of unequal score. columns: as in
    `dpo.data.sources.renamed`, so that {"responses": "answers.text"} reads the text of each of the answers, and
    {"responses": ["a", "b"]} two columns. Other arguments: those of `dpo.data.records.file`.
    """
    source = Source(path, split, config, columns=columns, chat=chat)
    held_out = elsewhere(source, validation_path, validation_split)
    return paired(partial(_paired, pairs=pairs), source, held_out, validation_fraction, on_faulty)


def stack_exchange(
    path: str | None,
    validation_path: str | None,
    split: str | None,
    pairs: Pairs,
    chat: bool,
    validation_fraction: float,
    on_faulty: OnFaulty,
) -> Dataset:
    """Questions of Stack Exchange and their answers, whose score is log2(1 + votes), and 1 more for the accepted one
    (2112.00861).

    A prompt is the question as a dialogue's, as in the code of DPO's authors, and the HTML of question and answers
    becomes text (`text_of`). path: its rows, or None: HuggingFaceH4/stack-exchange-preferences on the hub. split: of
    that; a slice such as "train[:1%]" reads a part. chat: True makes chat messages. Others: those of `ranked`.
    """

    def record(row: dict[str, Any]) -> list[Preference] | str:
        question, answers = row.get("question"), row.get("answers")
        texts = [one.get("text") for one in answers if isinstance(one, dict)] if isinstance(answers, list) else []
        if not all(isinstance(text, str) for text in [question, *texts]) or not texts:
            raise ValueError("must have a question and a list of answers, each with its text and pm_score")
        asked, said = text_of(str(question)), [text_of(str(text)) for text in texts]
        made: dict[str, Any] = {"scores": [one.get("pm_score") for one in answers or ()]}
        if chat:
            made["prompt"] = [{"role": "user", "content": asked}]
            made["responses"] = [[{"role": "assistant", "content": text}] for text in said]
        else:
            made |= {"prompt": f"{HUMAN} {asked}{TURN}", "responses": [f" {text}" for text in said]}
        return _paired(made, pairs)

    source = placed(path, Source("HuggingFaceH4/stack-exchange-preferences", split))
    held_out = None if validation_path is None else Source(validation_path)
    return paired(record, source, held_out, validation_fraction, on_faulty)


def _paired(row: dict[str, Any], pairs: Pairs) -> list[Preference] | str:
    """The pairs of a row, or why there is none."""
    by = "ranks" if "ranks" in row and "scores" not in row else "scores"
    require(row, ("prompt", "responses", by))
    responses, scores = row["responses"], row[by]
    if not isinstance(responses, list) or not isinstance(scores, list) or len(responses) != len(scores):
        raise ValueError(f"must have a list of responses, and one of as many {by}")
    if odd := [score for score in scores if type(score) not in (int, float) or not math.isfinite(score)]:
        raise ValueError(f"must have {by} that are finite numbers, found {odd[0]!r}")
    scores = [-rank for rank in scores] if by == "ranks" else scores
    if len(responses) < 2:
        return "there are fewer than two responses"
    if len(set(scores)) == 1:
        return "no response is better than another"
    rest = {name: value for name, value in row.items() if name not in ("responses", by)}
    return [
        preference(rest | {"chosen": responses[better], "rejected": responses[worse]})
        for better, worse in _choices(responses, scores, pairs)
    ]


def _choices(responses: Sequence[Any], scores: Sequence[float], pairs: Pairs) -> list[tuple[int, int]]:
    """Places of the better and the worse response of each pair."""
    best = scores.index(max(scores))
    if pairs == "best_worst":
        return [(best, scores.index(min(scores)))]
    if pairs == "best_random":
        worse = [place for place, score in enumerate(scores) if score < scores[best]]
        return [(best, random.Random(digest([responses, scores])).choice(worse))]
    unequal = [(one, other) for one, other in combinations(range(len(scores)), 2) if scores[one] != scores[other]]
    return [(one, other) if scores[one] > scores[other] else (other, one) for one, other in unequal]


def text_of(html: str) -> str:
    """The text of HTML: blocks parted by an empty line, and code blocks between <code> tags, as in the code of DPO's
    authors; unlike there, words in links, lists and inline code stay.
    """
    page = _Page()
    page.feed(html)
    page.close()
    return "\n\n".join(filter(None, (block.strip() for block in "".join(page.parts).split("\0"))))


class _Page(HTMLParser):
    BLOCKS = ("p", "pre", "li", "ul", "ol", "blockquote", "hr", "h1", "h2", "h3", "h4", "h5", "h6")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.in_block = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.in_block |= tag == "pre"
        self._tag(tag, f"<{tag}>")

    def handle_endtag(self, tag: str) -> None:
        self._tag(tag, f"</{tag}>")
        self.in_block &= tag != "pre"

    def _tag(self, tag: str, written: str) -> None:
        if tag in self.BLOCKS:
            self.parts.append("\0")
        elif tag == "br":
            self.parts.append("\n")
        elif tag == "code" and self.in_block:
            self.parts.append(written)

    def handle_data(self, data: str) -> None:
        self.parts.append(data)
