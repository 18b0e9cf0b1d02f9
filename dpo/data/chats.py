"""Chats to text: what a template makes of messages, which tokens are its own to write, and which one ends a turn."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property, lru_cache
from json import dumps, loads
from typing import Any

from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerBase

from dpo.data.records import Text

BREAK = "\ufdd0\ufdd1"  # two of the characters that Unicode keeps out of texts
TODAY = re.compile(r"\bstrftime_now\s*\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")
DATED = re.compile(r"\bstrftime_now\b(?!\s+is\s+(?:not\s+)?defined\b)")  # to ask for it prints nothing


@dataclass(frozen=True)
class Turn:
    """What a chat template writes after the assistant's last message."""

    tail: str  # all of it
    text: str  # what of it stands before the end
    end: int  # the token that ends the turn: the first that is added to the vocabulary; nothing after it is scored
    written: bool  # False: the template writes no such token, and the end is the tokenizer's EOS


def turn(tokenizer: PreTrainedTokenizerBase) -> Turn | None:
    """The end of turn of the tokenizer's chat template; None where it has none.

    Found by rendering a chat. Raises: ValueError if the template cannot.
    """
    if not tokenizer.chat_template:
        return None
    answer = "What was said."
    chat = [{"role": "user", "content": "What was asked?"}, {"role": "assistant", "content": answer}]
    try:
        whole = rendered(chat, tokenizer)
    except ValueError:  # it may ask for a system message
        whole = rendered([{"role": "system", "content": "What is so."}, *chat], tokenizer)
    _, separator, tail = whole.rpartition(answer)
    if not separator:
        raise ValueError("the chat template must write the assistant's messages, found it drops or rewrites them")
    added = {str(token): id for id, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}
    end = _pattern(added).search(tail)
    if end is None:
        return Turn(tail, tail, _eos(tokenizer), written=False)
    return Turn(tail, tail[: end.start()], added[end[0]], written=True)


def ends(tokenizer: PreTrainedTokenizerBase, generation_config: Any) -> list[int]:
    """The tokens at which a response ends, sorted: EOS, the end of the chat template's turns, and those that the
    model's generation config lists. Responses are sampled up to the first of them, and trained up to one of them.
    """
    listed = getattr(generation_config, "eos_token_id", None)
    more = listed if isinstance(listed, list) else [] if listed is None else [listed]
    return sorted({_eos(tokenizer), *more, *_of_template(tokenizer)})


def special(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of the tokens that decoding skips, by their text: more than the tokenizer has roles for."""
    added = {str(token): id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def control(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of the tokens that a text never becomes, by their text: special tokens, and the end of turn."""
    tokens = special(tokenizer) | {str(tokenizer.convert_ids_to_tokens(id)): id for id in _of_template(tokenizer)}
    return {token: id for token, id in tokens.items() if len(token) > 1}  # no character is kept from a text


def _of_template(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end of turn; none where the template cannot render a chat: `turn` says so where there are chats."""
    try:
        turn_end = turn(tokenizer)
    except ValueError:
        return []
    return [] if turn_end is None else [turn_end.end]


class Literal:
    """Keeps what a user typed from becoming control tokens: it gets a break, which `encoder` leaves out again."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.control = tokenizer, control(tokenizer)
        self.pattern = _pattern(self.control)
        self.first = re.compile(f"(?=(?:{self.pattern.pattern})).", re.DOTALL)
        self.eos = _eos(tokenizer)
        unknown = {tokenizer.unk_token_id} - {self.eos, tokenizer.bos_token_id}
        self.ids = set(self.control.values()) - unknown  # any text may hold what is unknown

    def text(self, value: Text) -> Text:
        if isinstance(value, str):
            return self._broken(value)
        return [{key: self._broken(words) for key, words in message.items()} for message in value]

    @cached_property
    def encoder(self) -> Tokenizer:
        """The tokenizer for texts with breaks."""
        return _encoder(self.tokenizer.backend_tokenizer.to_str(), frozenset(self.control))

    def typed(self, ids: Sequence[int], text: str) -> bool:
        """Whether there are more control tokens in ids than a template wrote in their text."""
        count = sum(id in self.ids for id in ids)
        return count > 0 and count > len(self.pattern.findall(text))

    def _broken(self, text: str) -> str:
        if BREAK in text:
            raise ValueError("text must not hold U+FDD0 followed by U+FDD1, which no text has a use for; remove them")
        return self.first.sub(rf"\g<0>{BREAK}", text) if self.pattern.search(text) else text


@lru_cache(maxsize=4)
def _encoder(state: str, control: frozenset[str]) -> Tokenizer:
    """A tokenizer that looks for control tokens first, and then leaves the breaks out."""
    definition = loads(state)
    for token in definition["added_tokens"]:
        token["normalized"] &= token["content"] not in control
    copy = Tokenizer.from_str(dumps(definition))
    copy.no_padding()
    copy.no_truncation()
    whole: Any = normalizers.Replace(BREAK, "")
    copy.normalizer = whole if copy.normalizer is None else normalizers.Sequence([whole, copy.normalizer])
    return copy


def rendered(messages: list[Any], tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    """Messages through the chat template. Raises: ValueError with what the template raises."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # a template raises what it likes
        raise ValueError(f"the chat template does not render it: {error}") from error


def as_text(prompt: Text) -> str:
    """A prompt for who reads text: that of a single turn as it is, of several with who said it."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def missing_text(messages: Text, text: str) -> str | None:
    """What a rendering lacks: each message must be in it after the one before, but for white space around it.

    Some templates write a system message before the last turn instead.
    """
    if isinstance(messages, str):
        return None
    numbered = list(enumerate(messages, start=1))
    system = [entry for entry in numbered if entry[1]["role"] == "system"]
    moved = [entry for entry in numbered if entry not in system]
    moved[-1:-1] = system
    fault = None
    for order in (numbered, moved):
        offset = 0
        for position, message in order:
            words = message["content"].strip()
            offset = text.find(words, offset)
            if offset < 0:
                reason = f"the chat template drops or rewrites part of message {position}, of the {message['role']}"
                fault = fault or reason
                break
            offset += len(words)
        else:
            return None
    return fault


def check_date(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError if the chat template prints today's date: the same run would be another tomorrow."""
    if DATED.search(tokenizer.get_chat_template()):
        raise ValueError(
            "the chat template must render a chat alike on every day, found one that prints today's date; set "
            "policy.date=2024-07-26, or any other day, to have it print that one: it stays with the policy"
        )


def dated(template: str, day: str) -> str:
    """The template with a day, 2024-07-26, in place of today's date."""
    result = TODAY.sub(lambda match: dumps(date.fromisoformat(day).strftime(match["format"])), template)
    if DATED.search(result):
        raise ValueError(
            "policy.date can stand for today's date where a chat template writes strftime_now with a format, found a "
            "template that does otherwise; give policy.chat_template"
        )
    return result


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    eos: Any = tokenizer.eos_token_id
    return int(eos)


def _pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)  # as the tokenizer looks for them
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
