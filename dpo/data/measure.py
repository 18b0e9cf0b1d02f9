"""What there is to know of each pair before training, as a table: tokens, and what is odd about it.

It is worked out by all cores, and kept in the cache under the content of the pairs and the tokenizer.
"""

import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dpo.cache import digest_large, remember
from dpo.cores import cores
from dpo.data import near
from dpo.data.chats import Literal, as_text
from dpo.data.kept import decides_tokens
from dpo.data.records import Preference, Text, fault_of, row
from dpo.data.texts import words_of
from dpo.data.tokens import encoded
from dpo.training.log import progress

VERSION = 2  # part of the cache keys: raise it when a change of the code changes what is kept
AT_ONCE = 1000  # items that a process takes
ODD = {  # characters that no one typed on purpose; joiners, which some scripts and emoji need, are none of them
    "control characters": re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"),
    "replacement characters": re.compile("\ufffd"),
    "invisible characters": re.compile(  # tags are none in the flag that they spell
        "[\u00ad\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069]|(?<![\U0001f3f4\U000e0020-\U000e007e])[\U000e0000-\U000e007f]"
    ),
}
MARKERS = re.compile(  # of chat formats
    r"<\|\w+\|>|<\uff5c[\w\u2581]+\uff5c>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</?s>|<[be]os>"
)
_tokenizer: PreTrainedTokenizerBase  # of a process that measures


def measured(pairs: Sequence[Preference], tokenizer: PreTrainedTokenizerBase, cache: str) -> pd.DataFrame:
    """A row for each pair, of which nothing is cut. Of responses with a label the rejected one is no response.

    prompt, chosen, rejected: tokens, responses with their end; -1 where the pair has none. fault: why training would
    call it faulty, or None. merged: responses that merge with the end of their prompt. prefix: one response is the
    beginning of the other. alike: they differ in white space or case alone. typed: a special token of the tokenizer is
    typed in the text, markers: one of another chat format; and a column for each of ODD.
    """
    return _kept([row(pair) for pair in pairs], _pairs, pairs, tokenizer, cache)


def measured_prompts(prompts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, cache: str) -> pd.DataFrame:
    """The columns of `measured` that there are without responses, a row for each prompt."""
    return _kept(list(prompts), _prompts, prompts, tokenizer, cache)


def near_duplicates(texts: dict[str, list[str]], cache: str) -> dict[str, list[int]]:
    """By split the place in texts["train"] of another text that each is near (`dpo.data.near`), or -1; kept, too."""

    def build(folder: Path) -> None:
        sketches = {split: _sketched(some) for split, some in texts.items()}
        known = {split: () if split == "train" else (texts["train"], sketches["train"]) for split in texts}
        found = {split: near.near(some, sketches[split], *known[split]).tolist() for split, some in texts.items()}
        (folder / "places.json").write_text(json.dumps(found))

    folder, _ = remember(cache, "near", {"texts": digest_large(texts), "version": VERSION}, build, alone=True)
    return dict(json.loads((folder / "places.json").read_text()))


def _sketched(texts: Sequence[str]) -> NDArray[np.uint64]:
    parts = _spread(near.signatures, texts, None, "looking for near-duplicates")
    return np.concatenate(parts) if parts else near.signatures([])


def _kept(
    content: list[Any],
    measure: Callable[..., pd.DataFrame],
    items: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    cache: str,
) -> pd.DataFrame:
    key = {"items": digest_large(content), "version": VERSION, **decides_tokens(tokenizer)}

    def build(folder: Path) -> None:
        found = pd.concat(_spread(measure, items, tokenizer, "measuring"), ignore_index=True)
        found.to_json(folder / "rows.json", orient="split")

    folder, _ = remember(cache, "measured", key, build, alone=True)
    return pd.read_json(folder / "rows.json", orient="split")


def _spread(
    function: Callable[..., Any], items: Sequence[Any], tokenizer: PreTrainedTokenizerBase | None, title: str
) -> list[Any]:
    """What a function makes of the items, so many at once."""
    chunks = [items[first : first + AT_ONCE] for first in range(0, len(items), AT_ONCE)]
    workers = cores()
    found = []
    with progress(total=len(items), name=title) as bar:
        if len(chunks) < 3 or workers == 1:
            _begin(tokenizer)
            for chunk in chunks:
                found.append(function(chunk))
                bar.update(len(chunk))
            return found
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        with ProcessPoolExecutor(workers, context, _begin, (tokenizer, True)) as pool:
            for chunk, made in zip(chunks, pool.map(function, chunks), strict=True):
                found.append(made)
                bar.update(len(chunk))
    return found


def _begin(tokenizer: PreTrainedTokenizerBase | None, beside_others: bool = False) -> None:
    global _tokenizer
    if tokenizer is not None:
        _tokenizer = tokenizer
    if beside_others:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _pairs(pairs: Sequence[Preference]) -> pd.DataFrame:
    sides = [
        [(pair.chosen, pair.chosen_ended)] + [(pair.rejected, pair.rejected_ended)] * (pair.label is None)
        for pair in pairs
    ]
    table = _measure([pair.prompt for pair in pairs], sides)
    for place, pair in enumerate(pairs):
        chosen, rejected = (words_of(side) for side in (pair.chosen, pair.rejected))
        table["fault"][place] = fault_of(pair) or table["fault"][place]
        sound = pair.label is None and fault_of(pair) is None
        table["prefix"].append(sound and (chosen.startswith(rejected) or rejected.startswith(chosen)))
        table["alike"].append(sound and chosen.casefold().split() == rejected.casefold().split())
    return pd.DataFrame(table)


def _prompts(prompts: Sequence[Text]) -> pd.DataFrame:
    table = _measure(prompts, [[]] * len(prompts))
    return pd.DataFrame({name: column for name, column in table.items() if column})


def _measure(prompts: Sequence[Text], sides: Sequence[Sequence[tuple[Text, bool]]]) -> dict[str, list[Any]]:
    items, faults, _ = encoded(prompts, sides, _tokenizer, keep=True)
    special, by_row = Literal(_tokenizer).pattern, {item.row: item for item in items}
    names = "prompt", "chosen", "rejected", "fault", "merged", "prefix", "alike", "typed", "markers", *ODD
    table: dict[str, list[Any]] = {name: [] for name in names}
    for place, (prompt, responses) in enumerate(zip(prompts, sides, strict=True)):
        item, fault = by_row.get(place), faults.get(place)
        ids = [] if item is None else item.response_ids
        if fault is None and len(ids) == 2 and ids[0] == ids[1]:
            fault = "chosen and rejected have the same tokens"
        table["prompt"].append(-1 if item is None else len(item.prompt_ids))
        table["chosen"].append(len(ids[0]) if ids else -1)
        table["rejected"].append(len(ids[1]) if len(ids) == 2 else -1)
        table["fault"].append(fault)
        table["merged"].append(0 if item is None else item.merged)
        text = "\n".join([as_text(prompt), *(words_of(side) for side, _ in responses)])
        table["typed"].append(bool(special.search(text)))
        table["markers"].append(bool(MARKERS.search(special.sub("", text))))
        for name, pattern in ODD.items():
            table[name].append(bool(pattern.search(text)))
    return table
