"""A text of a record: plain, or chat messages."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

Text = str | list[dict[str, str]]  # plain text, or chat messages {"role", "content"}
TURN, HUMAN = "\n\nAssistant:", "\n\nHuman:"  # of Anthropic's dialogues
EMPTY: tuple[Any, ...] = (None, "", [], {})
RESPONSES = ("chosen", "rejected", "completion")
TEXTS = ("prompt", *RESPONSES)
SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's names of roles


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


def kind(value: Any) -> str:
    """The type of a value as JSON calls it."""
    names = {type(None): "null", bool: "a boolean", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def same_names(row: dict[str, Any]) -> dict[str, Any]:
    """The row with chat messages of `from` and `value`, as ShareGPT's, in `role` and `content`; one alone in a list."""

    def theirs(one: Any) -> bool:
        return isinstance(one, dict) and isinstance(one.get("from"), str) and "value" in one and "role" not in one

    def message(one: Any) -> Any:
        rest = {name: value for name, value in one.items() if name not in ("from", "value")}
        return {"role": SPEAKERS.get(one["from"], one["from"]), "content": one["value"], **rest}

    def messages(value: Any) -> Any:
        several = [value] if theirs(value) else value
        listed = isinstance(several, list) and any(map(theirs, several))
        return [message(one) if theirs(one) else one for one in several] if listed else value

    made = {name: messages(row[name]) for name in ("prompt", "messages", *RESPONSES) if name in row}
    if isinstance(responses := row.get("responses"), list):
        made["responses"] = [*map(messages, responses)]
    return row | made


def as_chat(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its plain text as chat messages: the prompt a user's turn, responses the assistant's; and what the
    column `system` says, if there is such a column, before the first message.
    """

    def said(value: Any, role: str = "assistant") -> Any:
        return [{"role": role, "content": value}] if isinstance(value, str) else value

    both = ("chosen", "rejected")
    whole = any(isinstance(row.get(name), list) and len(row[name]) > 1 for name in both)
    made = dict(row)
    if not whole:  # else both are conversations, beside which a prompt in plain text is not read
        made |= {name: said(row[name], "user" if name == "prompt" else "assistant") for name in TEXTS if name in row}
    if isinstance(responses := row.get("responses"), list):
        made["responses"] = [*map(said, responses)]
    first = {name: made[name][:1] for name in ("prompt", "messages", *both * whole) if isinstance(made.get(name), list)}
    begun = any(isinstance(one, dict) and one.get("role") == "system" for ones in first.values() for one in ones)
    system = row.get("system")
    if first and not begun and (system is None or isinstance(system, str)):  # else it is refused
        made |= {name: said(system, "system") + made[name] for name in first} if system else {}
        made.pop("system", None)
    return made


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
