"""Text to tokens: prompts as a policy is fed them, responses as it would continue them.

A prompt is encoded as it is for sampling: by itself, with the tokenizer's own special tokens, or chat
messages through their template up to the assistant's turn. A response has to continue exactly these ids:
it gets the tokens that follow them when prompt and response are encoded together. Where text merges into
one token over the boundary, or the tokenizer ends prompts with a special token, it gets those that
encode it on a line of its own. A response to a chat is a message, which the template renders, or plain text,
which follows the template's prompt as it is: so a policy writes it.

Unless it was cut, a response ends in one token, at which sampling stops, too: in a chat the end that the
template writes after it (`dpo.data.chats.Turn`), else EOS. What the template writes before that end is part of
the response. What it writes after is not: that can never be sampled.

Text is encoded as text, also where special tokens are typed in it. A template may strip the white space around
a message; a row of which it leaves out or rewrites more is faulty.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from dpo.cache import digest
from dpo.data.chats import BREAK, Literal, Turn, check_date, missing_text, rendered, turn
from dpo.data.records import Text, report

logger = logging.getLogger(__name__)
UNFED = "Write them otherwise or remove them, or take another chat template (policy.chat_template)."
TYPED = "this tokenizer makes control tokens of its text; remove the special tokens that are typed in it"


@dataclass(frozen=True)
class Prompt:
    text: str  # with breaks: see `dpo.data.chats.Literal`
    ids: list[int]
    chat: bool  # rendered by the chat template, which brings all special tokens
    closed: bool  # ends in a special token that the tokenizer adds, so text after it starts afresh
    typed: bool  # some of its text became control tokens all the same


@dataclass(frozen=True)
class Row:
    """A prompt and the responses to it as text, with breaks."""

    index: int  # in what was given
    prompt: str
    responses: list[str]


@dataclass(frozen=True)
class Encoded:
    """A prompt and responses to it in tokens, and the text that these stand for."""

    row: int
    prompt: Text
    responses: Sequence[tuple[Text, bool]]  # and whether each ended
    prompt_ids: list[int]
    response_ids: list[list[int]]
    faulty: bool = False  # the chat template lost some of it, and it is kept
    merged: int = 0  # how many of the responses merge with the end of the prompt, and are encoded alone

    @property
    def length(self) -> int:
        """Tokens of the prompt and the longest response."""
        return len(self.prompt_ids) + max(map(len, self.response_ids))


def encode(
    prompts: Sequence[Text],
    responses: Sequence[Sequence[tuple[Text, bool]]],
    tokenizer: PreTrainedTokenizerBase,
    what: str,
    sources: Sequence[str | None],
    on_faulty: str,
) -> list[Encoded]:
    """Each prompt with its responses, which come with whether they ended; nothing is cut.

    For messages, what: what the items are; sources: where each came from. on_faulty: what to do with rows that the chat
    template does not render whole, see `dpo.data.records.filter_pairs`; "keep" learns from what it renders.
    """
    items, faults, notes = encoded(prompts, responses, tokenizer, keep=on_faulty == "keep")
    names = [source or f"row {row}, counted from 0" for row, source in enumerate(sources)]
    named = [(names[row], faults[row]) for row in sorted(faults)]
    report(named, len(prompts), len(prompts) - len(items), on_faulty, "tokens", what)
    for note in notes:
        logger.info(f"tokens: {note.format(what=what)}")
    return items


def encoded(
    prompts: Sequence[Text],
    responses: Sequence[Sequence[tuple[Text, bool]]],
    tokenizer: PreTrainedTokenizerBase,
    keep: bool,
) -> tuple[list[Encoded], dict[int, str], list[str]]:
    """As `encode`, with the faults by row, and messages about `{what}` that are not logged yet.

    keep: rows that the template does not render whole are among the items, too.
    """
    if not prompts:
        return [], {}, []
    chat, literal = _chats(prompts, tokenizer), Literal(tokenizer)
    rows, faults = _texts(prompts, responses, chat, literal, keep)
    starts = _prompts([row.prompt for row in rows], chat is not None, literal)
    pairs = [(start, text) for start, row in zip(starts, rows, strict=True) for text in row.responses]
    responses_ids, merged = _response_ids(pairs, literal)
    ids = iter(zip(responses_ids, merged, strict=True))
    last = [literal.eos if chat is None else chat.end]
    items = []
    for start, row in zip(starts, rows, strict=True):
        found = [next(ids) for _ in row.responses]
        response_ids, merges = [body for body, _ in found], sum(alone for _, alone in found)
        if start.typed or None in response_ids:
            faults[row.index] = TYPED
            continue
        sides = responses[row.index]
        tokens = [(body or []) + last * ended for body, (_, ended) in zip(response_ids, sides, strict=True)]
        items.append(Encoded(row.index, prompts[row.index], sides, start.ids, tokens, row.index in faults, merges))
    notes = []
    if any(merged):
        notes.append(
            f"{sum(merged)} of {len(pairs)} responses merge with the end of their prompt when encoded together, so "
            "they are encoded alone"
        )
    typed = sum(any(BREAK in text for text in (row.prompt, *row.responses)) for row in rows)
    if typed:
        notes.append(f"special tokens are typed in {typed} of {len(prompts)} {{what}}; they stay text")
    if chat is not None and not chat.written:
        notes.append(f"the chat template writes no end of turn, so {{what}} end in {tokenizer.eos_token}")
    return items, faults, notes


def decode(prompt_ids: list[int], response_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a response as it follows its prompt's: some decoders leave out a space that begins a text."""
    before, both = (
        str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for ids in (prompt_ids, prompt_ids + response_ids)
    )
    if both.startswith(before):
        return both[len(before) :]
    return str(tokenizer.decode(response_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def pieces(
    prompt_ids: list[int], response_ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, list[int]]]:
    """The text of a response, see `decode`, in pieces with the ids that they stand for: mostly one; several, where it
    takes them to make a character. A special token has no text.
    """
    whole = decode(prompt_ids, response_ids, tokenizer)
    found: list[tuple[str, list[int]]] = []
    ids: list[int] = []
    done = 0  # characters
    for number, id in enumerate(response_ids, 1):
        ids.append(id)
        so_far = decode(prompt_ids, response_ids[:number], tokenizer)
        if number == len(response_ids) or (whole.startswith(so_far) and len(so_far) >= done):
            found.append((whole[done : len(so_far)], ids))
            ids, done = [], len(so_far)
    return found


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what each token id means."""
    return digest(tokenizer.get_vocab())


def state(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that a tokenizer is, without how the last call to it had texts padded and cut."""
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy.to_str()


def encode_alone(prompts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, what: str = "prompts") -> list[Prompt]:
    """Prompts as a policy is fed them. what: what they are, for messages.

    Raises: ValueError if some cannot be, whatever data.on_faulty: what the data brings has passed `usable` before.
    """
    encoded, faults = _alone(prompts, tokenizer, keep=True)
    if len(encoded) < len(prompts):
        faults = {index: fault for index, fault in faults.items() if index not in encoded}
        report(_named(faults), len(prompts), len(faults), "error", "tokens", what, UNFED)
    if faults:
        logger.warning(f"tokens: the chat template drops or rewrites part of {len(faults)} of {len(prompts)} {what}")
    return list(encoded.values())


def usable(prompts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, on_faulty: str, what: str) -> list[Text]:
    """The prompts that a policy can be fed: by the rules for pairs, see `encode`."""
    encoded, faults = _alone(prompts, tokenizer, keep=on_faulty == "keep")
    report(_named(faults), len(prompts), len(prompts) - len(encoded), on_faulty, "tokens", what)
    return [prompts[index] for index in encoded]


def _named(faults: dict[int, str]) -> list[tuple[str, str]]:
    return [(f"prompt {index}, counted from 0", faults[index]) for index in sorted(faults)]


def _alone(
    prompts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, keep: bool
) -> tuple[dict[int, Prompt], dict[int, str]]:
    """Encoded prompts and their faults, by index. keep: see `encoded`."""
    chat, literal = _chats(prompts, tokenizer), Literal(tokenizer)
    rows, faults = _texts(prompts, [()] * len(prompts), chat, literal, keep)
    encoded = _prompts([row.prompt for row in rows], chat is not None, literal)
    by_index = {row.index: prompt for row, prompt in zip(rows, encoded, strict=True)}
    faults |= {index: TYPED for index, prompt in by_index.items() if prompt.typed}
    return {index: prompt for index, prompt in by_index.items() if not prompt.typed}, faults


def _chats(prompts: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> Turn | None:
    """How a turn ends where prompts are chats; None where they are plain text."""
    chats = sum(not isinstance(prompt, str) for prompt in prompts)
    if 0 < chats < len(prompts):
        raise ValueError(
            f"prompts must be all text or all chats, found {chats} chats among {len(prompts)}; write all of them alike"
        )
    return end_of_turn(tokenizer) if chats else None


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> Turn | None:
    """How a turn of a chat ends. Raises: ValueError if the tokenizer reads no chats, or not alike on every day."""
    if not tokenizer.chat_template:
        raise ValueError(
            "prompts are chat messages, so the tokenizer must have a chat template, found none; use a "
            "chat model and its tokenizer, give policy.chat_template, or write the prompts as plain text"
        )
    check_date(tokenizer)
    try:
        return turn(tokenizer)
    except ValueError as error:
        raise ValueError(f"{error}; mend the template, or give another: policy.chat_template") from error


def _texts(
    prompts: Sequence[Text],
    responses: Sequence[Sequence[tuple[Text, bool]]],
    chat: Turn | None,
    literal: Literal,
    keep: bool,
) -> tuple[list[Row], dict[int, str]]:
    """Rows as they are encoded, and by index what the template lost, or why there is no text. keep: see `encoded`."""
    rows, faults = [], {}
    for index, (raw, sides) in enumerate(zip(prompts, responses, strict=True)):
        try:
            prompt = literal.text(raw)
            if isinstance(prompt, str):
                start, fault = prompt, None
            else:
                start = rendered(prompt, literal.tokenizer, add_generation_prompt=True)
                fault = missing_text(prompt, start)
            texts = []
            for side, ended in sides:
                text, less = _continuation(prompt, start, literal.text(side), ended, chat, literal.tokenizer)
                fault = fault or less
                texts.append(text)
            if fault is not None:
                faults[index] = fault
            if fault is None or keep:
                rows.append(Row(index, start, texts))
        except ValueError as error:
            faults[index] = str(error)
    return rows, faults


def _prompts(texts: Sequence[str], chat: bool, literal: Literal) -> list[Prompt]:
    encoded = []
    for text, (ids, encoding) in zip(texts, encodings(texts, literal, special=not chat), strict=True):
        if not ids:
            raise ValueError("each prompt must have a token, found an empty prompt; remove it or write one")
        closed = len(ids) > 1 and encoding.token_to_chars(len(ids) - 1) is None
        from_text = [id for position, id in enumerate(ids) if encoding.token_to_chars(position) is not None]
        typed = literal.typed(from_text, text)
        encoded.append(Prompt(text, ids, chat, closed, typed))
    return encoded


def _continuation(
    prompt: Text, start: str, response: Text, ended: bool, chat: Turn | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str | None]:
    """The text of a response as it follows the prompt's, without the end token, and what the template lost of it.

    Raises: ValueError if there is no such text.
    """
    if isinstance(response, str):
        return response, None
    if chat is None:
        raise ValueError("a response of chat messages must follow a prompt of chat messages, found plain text")
    whole = rendered([*prompt, *response], tokenizer)
    if not whole.startswith(start):
        raise ValueError(
            "the chat template must render a conversation as its prompt followed by the response, found "
            "another beginning; write the responses as plain text, which follows the prompt as it is"
        )
    if not whole.endswith(chat.tail):
        raise ValueError(f"the chat template must write {chat.tail!r} after a response, found {whole[-60:]!r}")
    text = whole[len(start) : len(whole) - len(chat.tail)]
    fault = None
    if not text.strip().endswith(response[-1]["content"].strip()):
        fault = "the chat template drops or rewrites part of the response"
    return text + chat.text * ended, fault


def _response_ids(texts: Sequence[tuple[Prompt, str]], literal: Literal) -> tuple[list[list[int] | None], list[bool]]:
    """What each text becomes after its prompt's ids, without the end; None if it becomes control tokens. And whether it
    merges with the end of its prompt.
    """
    if not texts:
        return [], []
    by_row: dict[int, list[int]] = {}
    special = not texts[0][0].chat
    open_rows = [row for row, (prompt, _) in enumerate(texts) if not prompt.closed]
    joint = encodings([texts[row][0].text + texts[row][1] for row in open_rows], literal, special)
    for row, (ids, encoding) in zip(open_rows, joint, strict=True):
        prompt = texts[row][0]
        if ids[: len(prompt.ids)] == prompt.ids:
            last = encoding.token_to_chars(len(prompt.ids) - 1)
            if last is None or last[1] <= len(prompt.text):  # else the token holds some of the response, too
                by_row[row] = ids[len(prompt.ids) :]
    merged = [not prompt.closed and row not in by_row for row, (prompt, _) in enumerate(texts)]
    # Alone, but on a line of its own: some tokenizers put a space before the first word of a text.
    alone = [row for row in range(len(texts)) if row not in by_row]
    [line] = [ids for ids, _ in encodings(["\n"], literal, special=False)]
    on_line = encodings(["\n" + texts[row][1] for row in alone], literal, special=False)
    bare = encodings([texts[row][1] for row in alone], literal, special=False)
    for row, (ids, _), (bare_ids, _) in zip(alone, on_line, bare, strict=True):
        by_row[row] = ids[len(line) :] if ids[: len(line)] == line else bare_ids  # the line break merges, too
    return [None if literal.typed(by_row[row], text) else by_row[row] for row, (_, text) in enumerate(texts)], merged


def encodings(texts: Sequence[str], literal: Literal, special: bool) -> Iterator[tuple[list[int], Encoding]]:
    """Ids of each text, and the encoding that knows which characters a token stands for (None: added).

    special: with the tokenizer's own special tokens, but no EOS that it adds: texts here go on.
    """
    for first in range(0, len(texts), 1000):
        chunk = list(texts[first : first + 1000])
        try:
            distinct = dict.fromkeys(chunk)  # pairs share prompts, and responses
            plain = [text for text in distinct if BREAK not in text]
            encoded = iter(literal.tokenizer(plain, add_special_tokens=special).encodings if plain else ())
            encodings = {
                text: literal.encoder.encode(text, add_special_tokens=special) if BREAK in text else next(encoded)
                for text in distinct
            }
        except Exception as error:  # the tokenizers library raises nothing more specific
            raise ValueError(
                f"the tokenizer must know every word, found one it cannot encode ({error}); a policy "
                "trained from another base may know it"
            ) from error
        for encoding in map(encodings.__getitem__, chunk):
            ids = encoding.ids
            while ids and ids[-1] == literal.eos and encoding.token_to_chars(len(ids) - 1) is None:
                ids = ids[:-1]
            yield ids, encoding
