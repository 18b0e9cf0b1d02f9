"""Responses with the log-ratio of each token: as lines for a terminal, and as a page that needs nothing else.

Prompts and responses are anybody's text: the page escapes them and allows no script, the lines have no control
characters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

RAISED, LOWERED = (107, 174, 214), (253, 141, 60)  # blue and orange, which colour-blind people tell apart
LEAST = 0.1  # nats: a smaller scale would colour rounding
SHARE = 0.95  # of tokens that the scale holds; others have its last colour
NAMED, TOLD = 3, 0.005  # tokens that a line names, and the nats of the least of them
CUT = 100  # characters of a text in a line
STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 75em; margin: 1em auto; padding: 0 1em; color: #111; background: #fff }
.prompt, .text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3em 0 }
.prompt { color: #444; border-left: 3px solid #bbb; padding-left: .8em; max-height: 16em; overflow: auto }
.both { display: grid; grid-template-columns: 1fr 1fr; gap: 1.5em; margin-bottom: 2.5em }
.text span { border-radius: 2px } .special { font: 11px monospace; color: #444 }
.scale span { display: inline-block; width: 4.5em; text-align: center }
"""


@dataclass(frozen=True)
class Piece:
    """A part of a response's text, which is empty for a special token."""

    text: str
    tokens: list[tuple[str, float]]  # as the tokenizer writes them, and their log-ratio in nats; mostly one

    @property
    def log_ratio(self) -> float:
        return math.fsum(value for _, value in self.tokens)


@dataclass(frozen=True)
class Shown:
    """A response."""

    prompt: str  # as the policy is fed it
    name: str  # whose it is, or which of a pair
    pieces: list[Piece]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def log_ratio(self) -> float:
        """log policy(response) - log reference(response), in nats."""
        return math.fsum(piece.log_ratio for piece in self.pieces)

    @property
    def tokens(self) -> int:
        return sum(len(piece.tokens) for piece in self.pieces)


def row(one: Shown) -> dict[str, Any]:
    """A response as a line of a file."""
    tokens = [token for piece in one.pieces for token in piece.tokens]
    texts = {"prompt": one.prompt, "name": one.name, "text": one.text}
    return {**texts, "tokens": [name for name, _ in tokens], "log_ratios": [value for _, value in tokens]}


def lines(found: Sequence[Shown]) -> list[str]:
    """Each response in a line with its log-ratio, and one with the tokens that moved most."""
    said = []
    for prompt, same in groupby(found, key=lambda one: one.prompt):
        said.append(f"prompt: ...{ascii(prompt)[1:-1][-CUT:]}")
        for one in same:
            said.append(f"  {one.name}: {_total(one)}: {_short(one.text)}")
            ordered = sorted(
                (piece for piece in one.pieces if abs(piece.log_ratio) >= TOLD), key=lambda piece: piece.log_ratio
            )
            moved = {"raised": ordered[: -NAMED - 1 : -1], "lowered": ordered[:NAMED]}
            for word, some in moved.items():
                some = [piece for piece in some if (piece.log_ratio > 0) == (word == "raised")]
                if some:
                    told = ", ".join(f"{_short(_label(piece))} {piece.log_ratio:+.2f}" for piece in some)
                    said.append(f"    most {word}: {told}")
    return said


def html(title: str, found: Sequence[Shown]) -> str:
    """The page: the responses to each prompt beside each other, a colour and a tooltip for each piece."""
    limit = scale(found)
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>",
        "<p>Colour: log policy(token) - log reference(token), in nats; blue: the policy finds the token likelier. "
        "Point at a token for its number. Prompts are not scored.</p>",
        _legend(limit),
    ]
    for prompt, same in groupby(found, key=lambda one: one.prompt):
        parts.append(f'<section><div class="prompt">{escape(prompt)}</div><div class="both">')
        for one in same:
            spans = "".join(_span(piece, limit) for piece in one.pieces)
            parts.append(f'<div><b>{escape(one.name)}</b>: {_total(one)}<div class="text">{spans}</div></div>')
        parts.append("</div></section>")
    return "\n".join([*parts, "</body></html>\n"])


def scale(found: Sequence[Shown]) -> float:
    """The log-ratio at the ends of the colours: that which 95 % of all tokens are within, in nats."""
    sizes = sorted(abs(piece.log_ratio) for one in found for piece in one.pieces)
    return max(LEAST, sizes[math.ceil(SHARE * len(sizes)) - 1]) if sizes else LEAST


def colour(log_ratio: float, limit: float) -> str:
    """White at 0, blue at the limit and beyond, orange at minus it."""
    share = min(1.0, abs(log_ratio) / limit)
    end = RAISED if log_ratio > 0 else LOWERED
    return "#" + "".join(f"{round(255 + share * (part - 255)):02x}" for part in end)


def _legend(limit: float) -> str:
    steps = [limit * step / 4 for step in range(-4, 5)]
    spans = [f'<span style="background:{colour(step, limit)}">{step:+.2f}</span>' for step in steps]
    return f'<p class="scale">{"".join(spans)} nats, and beyond</p>'


def _span(piece: Piece, limit: float) -> str:
    told = "; ".join(f"{name} {value:+.3f}" for name, value in piece.tokens)
    told = f"{piece.log_ratio:+.3f} nats = {told}" if len(piece.tokens) > 1 else f"{told} nats"
    kind = "" if piece.text else ' class="special"'
    style = f'style="background:{colour(piece.log_ratio, limit)}"'
    return f'<span{kind} {style} title="{escape(told)}">{escape(_label(piece))}</span>'


def _label(piece: Piece) -> str:
    return piece.text or "".join(name for name, _ in piece.tokens)


def _total(one: Shown) -> str:
    return f"{one.log_ratio:+.2f} nats over {one.tokens} token{'s' if one.tokens != 1 else ''}"


def _short(text: str) -> str:
    """As a literal, so that a terminal obeys nothing in it."""
    written = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return f"'{written[:CUT]}'" + "..." * (len(written) > CUT)
