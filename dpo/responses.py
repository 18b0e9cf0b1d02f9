"""What a program can tell of a response without a judge: length against its prompt, and the marks of known failures."""

import string
import unicodedata
from collections.abc import Mapping, Sequence

from dpo.data.records import Text
from dpo.policy.sampling import Sample
from dpo.world.language import ENOUGH

# What English news is written with, once accents are stripped: ASCII and a few marks. The allow-list of Anyscale's
# summarization example (github.com/anyscale/templates, fine-tune-preference, src/utils/common.py, 2024).
ALLOWED = frozenset(string.printable + "’‘–—“”…™°Ææ£€")  # noqa: RUF001
EMPTY = 0.1  # share of the baseline's words below which a response counts as broken


def figures(prompt: Text, response: str) -> dict[str, float]:
    """`words` of the response; `compression`, their number over that of the prompt's words; `too_long`, whether it has
    at least as many characters as the prompt; `invalid`, whether one of its characters is not `ALLOWED`.

    Words are parted by whitespace. The text of a chat is that of its turns, joined by line breaks. A prompt without
    words counts as one.
    """
    words, text = len(response.split()), text_of(prompt)
    return {
        "words": words,
        "compression": words / max(1, len(text.split())),
        "too_long": len(response) >= len(text),
        "invalid": is_invalid(response),
    }


def text_of(prompt: Text) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)


def is_invalid(response: str) -> bool:
    """Whether a character is not `ALLOWED`, accents aside: gibberish in English text, and nothing in other text."""
    letters = (one for one in unicodedata.normalize("NFD", response) if not unicodedata.combining(one))
    return not ALLOWED.issuperset(letters)


def counted(judgement: Mapping[str, float]) -> dict[str, float]:
    """Of a judge that counts right answers (`correct`): whether there are three or more, `enough`, and four or more."""
    if "correct" not in judgement:
        return {}
    return {"enough": float(judgement["correct"] >= ENOUGH), "four_correct": float(judgement["correct"] >= 4)}


def is_broken(one: Sample, against: str | None = None) -> bool:
    """Whether a response did not end, is mostly repetition, or hardly says a word: none, or less than a tenth of those
    of the baseline's response. A terse one that says what it is asked for is not broken.
    """
    words = len(one.text.split())
    silent = words == 0 or (against is not None and words < EMPTY * len(against.split()))
    return not one.ended or repetition(one.response_ids) > 0.5 or silent


def repetition(tokens: Sequence[int]) -> float:
    """Share of 4-grams that were there before in the response (seq-rep-4 of Welleck et al., 1908.04319)."""
    grams = [tuple(tokens[first : first + 4]) for first in range(len(tokens) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
