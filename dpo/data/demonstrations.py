"""Demonstrations to imitate: supervised fine-tuning."""

from dataclasses import replace
from functools import partial
from typing import Any, Literal

from dpo.data.records import Dataset, OnFaulty, Preference, paired, responses_of
from dpo.data.sources import Columns, Source, elsewhere, held_out_of, placed, require

Turns = Literal["last", "all"]
ULTRACHAT = Source("HuggingFaceH4/ultrachat_200k", "train_sft")


def sft(
    path: str,
    validation_path: str | None,
    turns: Turns,
    validation_fraction: float,
    on_faulty: OnFaulty,
    config: str | None = None,
    split: str | None = None,
    validation_split: str | None = None,
    columns: Columns | None = None,
    chat: bool = False,
) -> Dataset:
    """Demonstrations in TRL's forms: rows of a `prompt` and a `completion`, text or chat messages, or of `messages`, a
    conversation.

    turns: of a conversation, the assistant's turns that are imitated, each a demonstration of its own with what came
    before it. Other arguments: those of `dpo.data.records.file`; held-out prompts are those of evaluation.
    """
    source = Source(path, split, config, columns=columns, chat=chat)
    held_out = elsewhere(source, validation_path, validation_split)
    return _shown(turns, source, held_out, validation_fraction, on_faulty)


def ultrachat(
    path: str | None, validation_path: str | None, turns: Turns, validation_fraction: float, on_faulty: OnFaulty
) -> Dataset:
    """Conversations of UltraChat (2305.14233) that were filtered for Zephyr (2310.16944).

    path: its rows, or None: the splits train_sft and test_sft of HuggingFaceH4/ultrachat_200k on the hub. turns: see
    `sft`.
    """
    source = placed(path, ULTRACHAT)
    held_out = held_out_of(source, validation_path, ULTRACHAT, "test_sft")
    return _shown(turns, source, held_out, validation_fraction, on_faulty)


def _shown(
    turns: Turns, source: Source, held_out: Source | None, validation_fraction: float, on_faulty: OnFaulty
) -> Dataset:
    data = paired(partial(_turns, turns=turns), source, held_out, validation_fraction, on_faulty, "demonstrations")
    return replace(data, preferences={})


def _turns(row: dict[str, Any], turns: Turns) -> list[Preference] | str:
    """The demonstrations of a row as single responses that are desirable, or why there is none."""
    if row.get("messages") is None:
        pairs = "; pairs of chosen and rejected are read by data=file" if "chosen" in row else ""
        require(row, ("prompt", "completion"), pairs, instead="messages, or ")
        prompt, [completion], [ended] = responses_of(row, ("completion",))
        return [Preference(prompt, completion, completion, ended, ended, label=True)]
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages must be a list of chat messages")
    rest = {name: value for name, value in row.items() if name not in ("messages", "prompt")}
    said = [place for place, message in enumerate(messages) if message.get("role") == "assistant" and place > 0]
    if not said or said[-1] != len(messages) - 1:
        return "the last message is not the assistant's, after another's"
    demonstrations: list[Any] = []
    for place in said if turns == "all" else said[-1:]:
        demonstrations += _turns(rest | {"prompt": messages[:place], "completion": messages[place : place + 1]}, turns)
    return demonstrations
