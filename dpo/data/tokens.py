"""Text to tokens: prompts as a policy is fed them, responses as it would continue them.

A prompt is encoded as it is for sampling: by itself, with the tokenizer's own special tokens, or chat
messages through their template up to the assistant's turn. A response has to continue exactly these ids:
it gets the tokens that follow them when prompt and response are encoded together. Where text merges into
one token over the boundary, or the tokenizer ends prompts with a special token, it gets those that
encode it on a line of its own. One EOS is added unless the response was cut. A response to a chat is a
message, which the template renders, or plain text, which follows the template's prompt as it is: so a
policy writes it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from dpo.cache import digest
from dpo.data.records import Text


@dataclass(frozen=True)
class Prompt:
    text: str
    ids: list[int]
    chat: bool  # rendered by the chat template, which brings all special tokens
    closed: bool  # ends in a special token that the tokenizer adds, so text after it starts afresh


@dataclass(frozen=True)
class Encoded:
    """A prompt and responses to it in tokens, and the text that these stand for."""

    row: int
    prompt: Text
    responses: Sequence[tuple[Text, bool]]  # and whether each ended
    prompt_ids: list[int]
    response_ids: list[list[int]]

    @property
    def length(self) -> int:
        """Tokens of the prompt and the longest response."""
        return len(self.prompt_ids) + max(map(len, self.response_ids))


def encode(
    prompts: Sequence[Text], responses: Sequence[Sequence[tuple[Text, bool]]], tokenizer: PreTrainedTokenizerBase
) -> list[Encoded]:
    """Each prompt with its responses, which come with whether they ended; nothing is cut."""
    if not prompts:
        return []
    starts = encode_alone(prompts, tokenizer)
    texts = [
        (start, _continuation(prompt, start.text, response, ended, tokenizer))
        for prompt, start, sides in zip(prompts, starts, responses, strict=True)
        for response, ended in sides
    ]
    ids = iter(_response_ids(texts, tokenizer))
    eos = [tokenizer.eos_token_id]
    return [
        Encoded(row, prompt, sides, start.ids, [next(ids) + eos * ended for _, ended in sides])
        for row, (prompt, start, sides) in enumerate(zip(prompts, starts, responses, strict=True))
    ]


def decode(prompt_ids: list[int], response_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a response as it follows its prompt's: some decoders leave out a space that begins a text."""
    before, both = (
        str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for ids in (prompt_ids, prompt_ids + response_ids)
    )
    if both.startswith(before):
        return both[len(before) :]
    return str(tokenizer.decode(response_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what each token id means."""
    return digest(tokenizer.get_vocab())


def encode_alone(prompts: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Prompts as a policy is fed them."""
    chats = sum(not isinstance(prompt, str) for prompt in prompts)
    if chats and not tokenizer.chat_template:
        raise ValueError(
            "prompts are chat messages, so the tokenizer must have a chat template, found none; use a "
            "chat model and its tokenizer, or write the prompts as plain text"
        )
    if 0 < chats < len(prompts):
        raise ValueError(f"prompts must be all text or all chats, found {chats} chats among {len(prompts)}")
    adds_bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    texts = []
    for prompt in prompts:
        if not isinstance(prompt, str):
            texts.append(_rendered(prompt, tokenizer, add_generation_prompt=True))
        else:
            texts.append(prompt.removeprefix(tokenizer.bos_token) if adds_bos else prompt)  # BOS once, not twice
    encoded = []
    for text, (ids, encoding) in zip(texts, _tokens(texts, tokenizer, special=not chats), strict=True):
        if not ids:
            raise ValueError("each prompt must have a token, found an empty prompt; remove it or write one")
        closed = len(ids) > 1 and encoding.token_to_chars(len(ids) - 1) is None
        encoded.append(Prompt(text, ids, chat=chats > 0, closed=closed))
    return encoded


def _continuation(prompt: Text, start: str, response: Text, ended: bool, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a response as it follows the prompt's, without the end token: that is added to the ids."""
    if isinstance(response, str):
        text = response
    else:
        whole = _rendered([*prompt, *response], tokenizer, continue_final_message=not ended)
        if not whole.startswith(start):
            raise ValueError(
                "the chat template must render a conversation as its prompt followed by the response, found "
                "another beginning; write the responses as plain text, which follows the prompt as it is"
            )
        text = whole[len(start) :]
    before, end, after = text.rpartition(tokenizer.eos_token)
    return before if end and not after.strip() else text


def _response_ids(texts: Sequence[tuple[Prompt, str]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """What each text becomes after its prompt's ids, EOS not included."""
    found: dict[int, list[int]] = {}
    special = not texts[0][0].chat
    open_rows = [row for row, (prompt, _) in enumerate(texts) if not prompt.closed]
    joint = _tokens([texts[row][0].text + texts[row][1] for row in open_rows], tokenizer, special)
    for row, (ids, encoding) in zip(open_rows, joint, strict=True):
        prompt = texts[row][0]
        if ids[: len(prompt.ids)] == prompt.ids:
            last = encoding.token_to_chars(len(prompt.ids) - 1)
            if last is None or last[1] <= len(prompt.text):  # else the token holds some of the response, too
                found[row] = ids[len(prompt.ids) :]
    merged = len(open_rows) - len(found)
    if merged:
        print(
            f"tokens: {merged} of {len(texts)} responses merge with the end of their prompt when encoded "
            "together, so they are encoded alone",
            flush=True,
        )
    # Alone, but on a line of its own: some tokenizers put a space before the first word of a text.
    alone = [row for row in range(len(texts)) if row not in found]
    [line] = [ids for ids, _ in _tokens(["\n"], tokenizer, special=False)]
    on_line = _tokens(["\n" + texts[row][1] for row in alone], tokenizer, special=False)
    bare = _tokens([texts[row][1] for row in alone], tokenizer, special=False)
    for row, (ids, _), (bare_ids, _) in zip(alone, on_line, bare, strict=True):
        found[row] = ids[len(line) :] if ids[: len(line)] == line else bare_ids  # the line break merges, too
    within = [row for row, ids in found.items() if tokenizer.eos_token_id in ids]
    if within:
        raise ValueError(
            f"responses must hold {tokenizer.eos_token} only at their end, found {len(within)} of "
            f"{len(texts)} with more, such as {texts[min(within)][1][:200]!r}; nothing after it can ever be sampled"
        )
    return [found[row] for row in range(len(texts))]


def _tokens(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, special: bool
) -> Iterator[tuple[list[int], Encoding]]:
    """Ids of each text, and the encoding that knows which characters a token stands for (None: added).

    special: with the tokenizer's own special tokens, but no EOS that it adds: texts here go on.
    """
    for first in range(0, len(texts), 1000):
        chunk = list(texts[first : first + 1000])
        try:
            encoded = tokenizer(chunk, add_special_tokens=special, verbose=False)
        except Exception as error:  # the tokenizers library raises nothing more specific
            raise ValueError(
                f"the tokenizer must know every word, found one it cannot encode ({error}); a policy "
                "trained from another base may know it"
            ) from error
        for encoding in encoded.encodings or ():
            ids = encoding.ids
            while ids and ids[-1] == tokenizer.eos_token_id and encoding.token_to_chars(len(ids) - 1) is None:
                ids = ids[:-1]
            yield ids, encoding


def _rendered(messages: list[Any], tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
