"""Prompts without responses, to sample pairs on."""

from typing import Any

from dpo.cache import digest
from dpo.data.records import Dataset, OnFaulty, Text, distinct, parse, responses_of


def prompts(path: str, train: int | None, part: int, validation: int, test: int, on_faulty: OnFaulty) -> Dataset:
    """Those of a JSONL file, of pairs or of anything else with a `prompt` (text, or chat messages) on every line.

    They are taken in the order of their hashes: first `test`, then `validation`, then parts of `train`, of
    which this is number `part`, from 0; None: one part of all that are left. No prompt is in two of them.

    Raises: ValueError if there are too few.
    """
    found = sorted(distinct(one for _, one in parse(path, _prompt)), key=digest)
    held_out, size = test + validation, len(found) - test - validation if train is None else train
    first = held_out + part * size
    if size < 1 or part < 0 or first + size > len(found):
        raise ValueError(
            f"{path} must have {test} prompts for test, {validation} for validation, and part {part}, counted from 0, "
            f"of {'all others' if train is None else train} for training, found {len(found)}; give a number as "
            "data.train, lower it, data.validation or data.test, or take fewer parts"
        )
    splits = {"test": found[:test], "validation": found[test:held_out], "train": found[first : first + size]}
    return Dataset([], {}, splits, on_faulty)


def _prompt(row: dict[str, Any]) -> Text:
    if "prompt" not in row:
        raise ValueError("must have a prompt, found none")
    return responses_of(row, ())[0]
