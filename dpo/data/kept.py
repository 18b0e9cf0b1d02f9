"""Pairs in tokens, kept in the cache: made once per data set and tokenizer, and read by all processes and runs.

An entry holds `ids.npy` (int32: of each pair the prompt, the chosen and the rejected response, one after another),
`offsets.npy` (int64: where each of these begins, and the end), `rows.npy` (int64: which row of the data a pair is),
`contents.npy` (`content_of` the chosen and the rejected sequence of each pair, 16 bytes each), `changed.json` (what of
a pair's text is not that of its row: of few) and `said.json` (the messages). The arrays are memory maps, so processes
on one machine share them: 4 bytes a token, where a list of Python's numbers has 40.
"""

import inspect
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo.cache import digest, remember
from dpo.data.batches import TOO_LONG, Pair, content_of, filter_identical, numbered
from dpo.data.lazy import Lazy
from dpo.data.records import TEXT, NoneLeft, Preference, plain, texts
from dpo.data.sources import heard

logger = logging.getLogger(__name__)
TOKENS_VERSION = 2  # part of the cache key: raise it when a change of the code changes tokens, or how they are kept
AT_ONCE = 100_000  # rows that are tokenized at once, since that takes 20 kB each: messages count by so many


def kept_tokens(
    preferences: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_too_long: str,
    on_faulty: str,
    what: str,
    apart: bool,
    cache: str,
    rows: str | None = None,
) -> Sequence[Pair]:
    """The pairs of `dpo.data.batches.tokenize`, without those of `filter_identical` where `apart`; each is made of the
    map when it is asked for, and has the text of its preference.

    What was logged when they were tokenized is logged again. One process tokenizes, also of several in one run, and
    the others wait. cache: folder. rows: `texts` of the preferences, where that is known.

    Raises: ValueError as these two, RuntimeError if the entry is damaged.
    """
    key = {
        "rows": rows or texts(preferences),
        "what": what,
        "max_length": max_length,
        "on_too_long": on_too_long,
        "on_faulty": on_faulty,
        "apart": apart,
        "version": TOKENS_VERSION,
        **decides_tokens(tokenizer),
    }

    def build(folder: Path) -> None:
        parts, lengths = [np.zeros(0, dtype=np.int32)], [np.zeros(1, dtype=np.int64)]
        numbers: list[int] = []
        contents: list[bytes] = []
        changed: dict[int, Any] = {}
        with heard() as said:
            for first in range(0, len(preferences), AT_ONCE):
                some = preferences[first : first + AT_ONCE]
                try:
                    found = numbered(some, tokenizer, max_length, on_too_long, what, TOO_LONG, on_faulty)
                    row_of = {id(pair): row for row, pair in found}
                    pairs = [pair for _, pair in found]
                    pairs = filter_identical(pairs, on_faulty, what) if apart else pairs
                except NoneLeft:
                    if not numbers and first + AT_ONCE >= len(preferences):
                        raise
                    continue
                sides = [side for pair in pairs for side in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]
                parts += [np.array(side, dtype=np.int32) for side in sides]
                lengths.append(np.array([len(side) for side in sides], dtype=np.int64))
                for pair in pairs:
                    if other := _changed(pair, some[row_of[id(pair)]]):
                        changed[len(numbers)] = other
                    contents += [content_of(pair.chosen), content_of(pair.rejected)]
                    numbers.append(first + row_of[id(pair)])
        np.save(folder / "ids.npy", np.concatenate(parts))
        np.save(folder / "offsets.npy", np.concatenate(lengths).cumsum())
        np.save(folder / "rows.npy", np.array(numbers, dtype=np.int64))
        np.save(folder / "contents.npy", np.frombuffer(b"".join(contents), dtype="V16").reshape(-1, 2))
        (folder / "changed.json").write_text(json.dumps(changed))
        (folder / "said.json").write_text(json.dumps(said))

    folder, cached = remember(cache, "tokens", key, build, alone=True)
    if cached:
        for level, message in json.loads((folder / "said.json").read_text()):
            logger.log(level, message)
    return _pairs(folder, preferences)


def decides_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What of a tokenizer and its libraries decides which tokens a text becomes; not where it lies."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # of the call before
        definition.pop(state)
    added = {str(token): [id, token.special] for id, token in tokenizer.added_tokens_decoder.items()}
    roles = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    written = inspect.getsource(inspect.getmodule(type(tokenizer)) or type(tokenizer))  # it may come with the model
    return {
        "tokenizer": digest([definition, added, roles, bool(getattr(tokenizer, "split_special_tokens", False))]),
        "tokenizer_code": digest([type(tokenizer).__name__, written]),
        "chat_template": tokenizer.chat_template,
        "libraries": {name: version(name) for name in ("jinja2", "tokenizers", "transformers")},
    }


def _changed(pair: Pair, preference: Preference) -> dict[str, Any]:
    """What a pair has that its preference does not say. Of `token_ids` that can only be that they are not its own."""
    text = {
        name: plain(value)
        for name in TEXT
        if (value := getattr(pair.text, name)) is not (before := getattr(preference, name)) and value != before
    }
    found = {"text": text, "cut": pair.cut, "unwritten": pair.unwritten}
    return {name: value for name, value in found.items() if value}


def _pairs(folder: Path, preferences: Sequence[Preference]) -> Lazy[Pair]:
    ids, offsets, rows, contents = (
        np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ("ids", "offsets", "rows", "contents")
    )
    changed = {int(number): other for number, other in json.loads((folder / "changed.json").read_text()).items()}

    def pair(number: int) -> Pair:
        start, chosen, rejected, end = offsets[3 * number : 3 * number + 4].tolist()
        tokens, text = ids[start:end].tolist(), preferences[rows[number]]
        sides = tokens[: chosen - start], tokens[chosen - start : rejected - start], tokens[rejected - start :]
        if number not in changed:
            return Pair(*sides, text)
        other = changed[number]
        text = replace(text, **other.get("text", {}))
        return Pair(*sides, text, tuple(other.get("cut", ())), other.get("unwritten", False))

    return Lazy(len(rows), pair, [(one.tobytes(), other.tobytes()) for one, other in contents])
