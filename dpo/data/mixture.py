"""Several data sets as one."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from dpo.cache import digest
from dpo.data.records import Dataset, Demonstration, OnFaulty, Preference, distinct, file, split_pairs

Item = TypeVar("Item", Preference, Demonstration)
OPTIONS = ("path", "validation_path", "config", "split", "validation_split", "columns", "prompt", "chat")  # of `file`


def mixture(sources: list[Any], validation_fraction: float, on_faulty: OnFaulty) -> Dataset:
    """The pairs of all sources, or the demonstrations where they bring these alone; held-out ones likewise.

    sources: each a path as that of `dpo.data.records.file`, or {"path": ..., "weight": ...} with further arguments of
    it, or {"data": node, "weight": ...} of any other data set. weight: how often each training pair is there, 1 where
    it is not given: 0.5 takes half of them, by a hash of the pair, so that they are the same in any mixture and among
    those of a larger weight; 2 takes each twice. Held-out pairs are all there, once. Others: see
    `dpo.data.records.file`.

    Raises: ValueError that names the source.
    """
    if not sources:
        raise ValueError("data.sources must list at least one source, found an empty list")
    parts: list[tuple[Dataset, float]] = []
    for number, source in enumerate(sources):
        try:
            parts.append(_part(source, validation_fraction, on_faulty))
        except ValueError as error:
            at = f"data.sources[{number}]"  # which has the options of `file`
            said = re.sub(rf"(?<![\w./])data\.(?=({'|'.join(OPTIONS)})\b)", f"{at}.", str(error))
            raise ValueError(f"{at}: {said}") from error
    revisions = {place: revision for part, _ in parts for place, revision in part.revisions.items()}
    if not any(part.preferences for part, _ in parts):
        shown = [one for part, weight in parts for one in _weighted(part.demonstrations, weight)]
        splits = parts[0][0].prompts
        prompts = {split: distinct(one for part, _ in parts for one in part.prompts[split]) for split in splits}
        return Dataset(shown, {}, prompts, on_faulty, revisions=revisions)
    train = [pair for part, weight in parts for pair in _weighted(part.preferences.get("train", []), weight)]
    kinds = {pair.label is None for pair in train}
    if len(kinds) > 1 or not all(part.preferences for part, _ in parts):
        raise ValueError(
            "data.sources must all bring pairs, or all single responses with a label, or all demonstrations alone, "
            "found more than one of these; train on one after the other"
        )
    held_out = [pair for part, _ in parts for pair in part.preferences["validation"]]
    return replace(split_pairs(train, held_out, validation_fraction, on_faulty), revisions=revisions)


def _part(source: Any, validation_fraction: float, on_faulty: OnFaulty) -> tuple[Dataset, float]:
    """The data of a source, and its weight."""
    asked = {"path": source} if isinstance(source, str) else source
    if not isinstance(asked, dict) or ("path" in asked) == ("data" in asked):
        raise ValueError(f"must be a path, or an object with either a path or data, found {source!r}")
    weight = asked.get("weight", 1)
    if type(weight) not in (int, float) or not 0 < weight < float("inf"):
        raise ValueError(f"weight must be a number above 0, found {weight!r}")
    known = ("data",) if "data" in asked else OPTIONS
    if odd := [key for key in asked if key not in (*known, "weight")]:
        raise ValueError(f"{odd[0]} must be one of {', '.join(known)} and weight")
    if "path" in asked:
        options = {"validation_path": None} | {key: value for key, value in asked.items() if key != "weight"}
        return file(validation_fraction=validation_fraction, on_faulty=on_faulty, **options), weight
    if not isinstance(asked["data"], Dataset):
        raise ValueError(f"data must be the node of a data set, with its _target_, found {asked['data']!r}")
    if weight != 1 and not (asked["data"].preferences or asked["data"].demonstrations):
        raise ValueError(
            f"weight must be 1 of prompts alone, each of which is taken once, found {weight}; leave it out"
        )
    return asked["data"], weight


def _weighted(items: Sequence[Item], weight: float) -> list[Item]:
    """Each as often as the weight says; what is left of it below 1 is the chance of one more, by a hash."""
    whole, rest = divmod(weight, 1)
    return [item for item in items for _ in range(int(whole) + (_drawn(item) < rest))]


def _drawn(item: Preference | Demonstration) -> float:
    """Uniform in [0, 1)."""
    texts = [item.chosen, item.rejected] if isinstance(item, Preference) else [item.response]
    return int(digest(["weight", item.prompt, *texts])[:13], 16) / 16**13
