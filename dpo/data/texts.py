"""A text of a record: plain, or chat messages."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from dpo.data.sources import kind

Text = str | list[dict[str, str]]  # plain text, or chat messages {"role", "content"}
TURN, HUMAN = "\n\nAssistant:", "\n\nHuman:"  # of Anthropic's dialogues
EMPTY: tuple[Any, ...] = (None, "", [], {})


def checked(value: Any, name: str) -> Text:
    """The value as text, or as chat messages. Raises: ValueError for messages with more than a role and a content."""
    if isinstance(value, str):
        _check_unicode(value, name)
        return value
    if not isinstance(value, list):
        raise ValueError(f"{name} must be text or a list of chat messages, found {kind(value)}")
    if not value:
        raise ValueError(f"{name} must hold at least one chat message, found an empty list")
    messages = []
    for position, message in enumerate(value, start=1):
        parts = [message.get(key) for key in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f'{name}: message {position} must be {{"role": text, "content": text}}')
        more = [key for key, field in message.items() if key not in ("role", "content") and field not in EMPTY]
        if more:
            raise ValueError(
                f"{name}: message {position} must have a role and a content and nothing else, found "
                f"{' and '.join(map(str, more))}; write into the content what the policy shall read; remove the rest"
            )
        _check_unicode(message["content"], name)
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be Unicode, found half a surrogate pair at {error.start}") from error


def words_of(response: Text) -> str:
    """What a response says: the text, or the content of its message."""
    return response if isinstance(response, str) else response[-1]["content"]


def distinct(prompts: Iterable[Text]) -> list[Text]:
    """Each prompt once, in order of first appearance."""
    first: dict[str, Text] = {}
    for prompt in prompts:
        first.setdefault(key(prompt), prompt)
    return list(first.values())


def opening(prompt: Text) -> Text:
    """A dialogue to the end of the user's first turn, by which its turns are known as one conversation's."""
    if isinstance(prompt, str):
        first, turn, _ = prompt.partition(TURN)
        return first + turn
    asked = next((place for place, message in enumerate(prompt, start=1) if message["role"] == "user"), len(prompt))
    return prompt[:asked]


def key(text: Text) -> str:
    return json.dumps(text, sort_keys=True)


def drawn(prompt: Text) -> float:
    """By a hash, uniform in [0, 1), the same for the same prompt everywhere."""
    return int.from_bytes(hashlib.sha256(key(prompt).encode()).digest()[:6]) / 2**48
