"""Prompts and responses that are too long: refused, dropped, or cut.

What is cut is the text, at the tokens of the policy, and what is left is encoded again: so every reference, whatever
its tokenizer and template, reads the text that the policy is trained on, and no more. A prompt loses its beginning: of
a chat the oldest turns, whole, and then the beginning of the last one's text; a system message stays. A response loses
its end, and its end token with it.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from dpo.data.chats import BREAK, Literal
from dpo.data.records import NoneLeft, Text, listed
from dpo.data.tokens import Encoded, encode_alone, encoded, encodings

logger = logging.getLogger(__name__)
Spans = list[tuple[int, int]]  # of each token of a text its first character, and the one after its last


@dataclass(frozen=True)
class Limits:
    """How long sequences may be, in tokens."""

    max_length: int  # of prompt and response
    max_new_tokens: int  # of a sampled response
    on_too_long: str  # "error", "drop" or "truncate"

    @property
    def prompt(self) -> int:
        """What is left for the prompt of a sampled response."""
        return self.max_length - self.max_new_tokens


def fitted(
    items: Sequence[Encoded],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_too_long: str,
    what: str,
    sources: Sequence[str | None],
    advice: str,
) -> list[Encoded]:
    """Items of at most max_length tokens, by the rule of `dpo.data.batches.tokenize`; those without room are dropped.

    For messages, what: what the items are; sources: where each came from; advice: what to do when some are too long.
    """
    if on_too_long not in ("error", "drop", "truncate"):
        raise ValueError(f'on_too_long must be "error", "drop" or "truncate", got {on_too_long!r}')
    if max_length < 3:
        raise ValueError(f"max_length must hold BOS, a prompt token and a response token, got {max_length}")
    long = [item for item in items if item.length > max_length]
    if not long:
        return list(items)
    names = [source or f"row {row}, counted from 0" for row, source in enumerate(sources)]
    summary = f"{len(long)} of {len(items)} {what} have more than {max_length} tokens"
    if on_too_long == "error":
        rows = [f"{names[item.row]}: {item.length} tokens" for item in long]
        raise ValueError(f"{summary}, up to {max(item.length for item in long)}:{listed(rows)}\n{advice}")
    cut = {} if on_too_long == "drop" else _cut(long, tokenizer, max_length)
    kept = [cut.get(item.row, item) for item in items if item.length <= max_length or item.row in cut]
    if on_too_long == "drop":
        logger.warning(f"tokens: {summary}: dropped")
    else:
        sides = [zip(item.responses, cut[item.row].responses, strict=True) for item in long if item.row in cut]
        responses = sum(before != after for both in sides for before, after in both)
        logger.warning(f"tokens: {summary}: prompts cut from the left, {responses} responses from the right")
        if lost := [names[item.row] for item in long if item.row not in cut]:
            logger.warning(
                f"tokens: {len(lost)} of {len(items)} {what} have no room, cut or not: dropped:{listed(lost)}"
            )
    if not kept:
        others = "" if on_too_long == "truncate" else ", or set on_too_long=truncate"
        raise NoneLeft(f"{summary}, so none is left. Raise max_length{others}.")
    return kept


def _cut(items: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[int, Encoded]:
    """By row, what is left of items that are too long, in at most max_length tokens; without those without room."""
    room = [max_length - max(map(len, item.response_ids)) for item in items]
    prompts = cut_prompts([item.prompt for item in items], tokenizer, room)
    pending = {
        item.row: replace(item, prompt=prompt, responses=list(item.responses))
        for item, prompt in zip(items, prompts, strict=True)
    }
    whole = {item.row: [response for response, _ in item.responses] for item in items}
    literal = Literal(tokenizer)
    spans = {row: [_spans(_content(response), literal) for response in responses] for row, responses in whole.items()}
    faulty = {item.row for item in items if item.faulty}
    removed = {row: [0] * len(responses) for row, responses in whole.items()}
    done: dict[int, Encoded] = {}
    while pending:
        rows = list(pending)
        reencoded, faults, _ = encoded(
            [item.prompt for item in pending.values()],
            [item.responses for item in pending.values()],
            tokenizer,
            keep=True,
        )
        reencoded = [item for item in reencoded if not item.faulty or rows[item.row] in faulty]
        for index in faults.keys() - {item.row for item in reencoded}:  # the template does not render what is left
            del pending[rows[index]]
        for item in reencoded:
            row = rows[item.row]
            item = replace(item, row=row)
            if item.length <= max_length:
                done[row] = item
                del pending[row]
                continue
            responses = list(item.responses)
            for side, ids in enumerate(item.response_ids):
                excess = len(item.prompt_ids) + len(ids) - max_length
                if excess > 0 and not responses[side][1]:
                    removed[row][side] += excess
                if excess > 0:
                    text = _ending(whole[row][side], spans[row][side], removed[row][side])
                    responses[side] = text, False
            if all(_content(text) or ended for text, ended in responses):
                pending[row] = replace(item, responses=responses)
            else:
                del pending[row]
    return done


def cut_prompts(prompts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int]) -> list[Text]:
    """Prompts of at most so many tokens each, but of at least one token of text, where that is more."""
    cut = list(prompts)
    starts = dict(enumerate(encode_alone(prompts, tokenizer))) if prompts else {}
    pending = {row: start for row, start in starts.items() if len(start.ids) > lengths[row]}
    removed, literal = dict.fromkeys(pending, 0), Literal(tokenizer)
    while pending:
        rows = []
        for row, start in pending.items():
            removed[row] += len(start.ids) - lengths[row]
            cut[row], more = _beginning(prompts[row], removed[row], literal)
            if more:
                rows.append(row)
        reencoded = zip(rows, encode_alone([cut[row] for row in rows], tokenizer) if rows else [], strict=True)
        pending = {row: start for row, start in reencoded if len(start.ids) > lengths[row]}
    return cut


def _beginning(prompt: Text, tokens: int, literal: Literal) -> tuple[Text, bool]:
    """The prompt without its first tokens, or of a chat with no less than these off; and whether more can go."""
    if isinstance(prompt, str):
        spans = _spans(prompt, literal)
        last = len(spans) - 1  # one stays, and its character whole, of which tokens before it may be other bytes
        return prompt[min(spans[min(tokens, last) - 1][1], spans[last][0]) if last > 0 else 0 :], tokens < last
    first = next((index for index, message in enumerate(prompt) if message["role"] not in ("system", "developer")), 0)
    turns = [index for index in range(first, len(prompt)) if index == first or prompt[index]["role"] == "user"]
    removed = 0
    for start, end in pairwise(turns):
        removed += sum(len(_spans(message["content"], literal)) for message in prompt[start:end])
        if removed >= tokens:
            return [*prompt[:first], *prompt[end:]], True
    message, *rest = prompt[turns[-1] :]
    content, more = _beginning(message["content"], tokens - removed, literal)
    return [*prompt[:first], {**message, "content": str(content)}, *rest], more


def _ending(response: Text, spans: Spans, tokens: int) -> Text:
    """The response without its last tokens."""
    text = _content(response)
    kept = len(spans) - tokens
    end = len(text) if tokens == 0 else 0 if kept <= 0 else min(spans[kept - 1][1], spans[kept][0])
    return text[:end] if isinstance(response, str) else [{**response[-1], "content": text[:end]}]


def _content(response: Text) -> str:
    return response if isinstance(response, str) else response[-1]["content"]


def _spans(text: str, literal: Literal) -> Spans:
    broken = str(literal.text(text))
    [(_, encoding)] = encodings([broken], literal, special=False)
    offsets, position = [0], 0  # in the text, of each character of the broken one and its end
    while position < len(broken):
        width = len(BREAK) if broken.startswith(BREAK, position) else 1
        offsets += [offsets[-1] + (width == 1)] * width
        position += width
    return [(offsets[first], offsets[last]) for first, last in encoding.offsets]
