"""A preference as text; JSONL in and out."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from dpo.cache import digest_large
from dpo.data.lazy import mapped
from dpo.data.sources import SHOWN, Columns, Source, elsewhere, listed, parse, require, write_rows
from dpo.data.sources import read as read_rows
from dpo.data.texts import TURN, Text, checked, distinct, drawn, key, opening, words_of

logger = logging.getLogger(__name__)
OnFaulty = Literal["error", "drop", "keep"]  # what to do with faulty pairs and prompts: see `filter_pairs`
ENDED = {"True": True, "False": False, "None": True, "": True}  # as text: a table without any in a row, and CSV
READ = (  # what other formats have a policy read beside the prompt
    *("tools", "functions", "documents", "images", "videos", "audios", "system", "system_prompt", "history"),
    *("chat_template_kwargs", "chat_template"),
)

SCORES = (
    *(("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")),
    *(("chosen_rating", "rejected_rating"), ("chosen-rating", "rejected-rating")),
)
FAULTY = "Mend them, or set data.on_faulty=drop to leave them out or data.on_faulty=keep to train on them."


class NoneLeft(ValueError):
    """Nothing to learn from is left of some records: of others there may be."""


@dataclass(frozen=True)
class Demonstration:
    """A response to imitate. ended: False when it was cut before its end, so that no EOS is learned there."""

    prompt: Text
    response: Text
    ended: bool = True
    source: str | None = field(default=None, compare=False)  # where it came from: "pairs.jsonl, line 12"


@dataclass(frozen=True)
class TokenIds:
    """A pair as it was sampled: its responses continue these prompt ids, and end in an end token if they ended."""

    tokenizer: str  # `dpo.data.tokens.vocabulary` of it
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class Measures:
    """What is known of a pair beside its text: of pairs from elsewhere nothing, and they may be flipped.

    gap: the judge's score of the chosen response, less that of the rejected; below 0 where the pair is flipped. kind:
    what decided, "answers" (more right ones), "threshold" (more right ones, and enough of them on one side alone),
    "length" (enough on both sides), or "outlier". correct, words: right answers and words of chosen and rejected.
    """

    gap: float | None = None
    kind: str | None = None
    correct: tuple[float, float] | None = None
    words: tuple[int, int] | None = None
    flipped: bool = False  # noise has made the worse response the chosen one


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt. *_ended: False when the response was cut, so that no EOS is scored.

    label: None; or of a single response, which is the chosen one, whether it is desirable. The rejected one is then the
    same, until `dpo.data.batches.mismatched` puts a response to another prompt there.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    chosen_ended: bool = True
    rejected_ended: bool = True
    source: str | None = field(default=None, compare=False)  # where it came from: "pairs.jsonl, line 12"
    token_ids: TokenIds | None = None  # of responses that a policy sampled: their text may have other ids, too
    measures: Measures = field(default=Measures(), compare=False)
    label: bool | None = None
    score_gap: float | None = field(default=None, compare=False)  # by the data's own scores: chosen less rejected

    @property
    def sides(self) -> tuple[str, str]:
        """What a file calls the two responses."""
        return ("chosen", "rejected") if self.label is None else ("completion", "mismatched")


TEXT = tuple(one.name for one in fields(Preference) if one.compare)


@dataclass(frozen=True)
class Dataset:
    """What a run learns from. Splits: train, validation (held-out pairs), test (for win rate and KL)."""

    demonstrations: list[Demonstration]
    preferences: dict[str, list[Preference]]  # {}: sample them from the policy, on `prompts`
    prompts: dict[str, list[Text]]
    on_faulty: OnFaulty = "error"  # what to do with pairs that are found faulty when they are tokenized
    written: dict[str, list[str]] = field(default_factory=dict)  # split -> what a human responds to each of `prompts`
    revisions: dict[str, str] = field(default_factory=dict)  # what was read on the hub -> its commit
    texts: dict[str, str] = field(default_factory=dict)  # split -> `texts` of its pairs, where that is known

    def written_to(self, prompts: Sequence[Text], split: str) -> list[str]:
        """What a human responds to each of these prompts of a split.

        Raises: ValueError if nothing was written to one of them.
        """
        known = self.prompts[split] if split in self.written else []
        found = dict(zip(map(key, known), self.written.get(split, []), strict=True))
        if missing := [prompt for prompt in prompts if key(prompt) not in found]:
            raise ValueError(
                f"the data must hold what a human responds to each of the {split} prompts, found nothing for "
                f"{len(missing)} of {len(prompts)}; data=world has it for all, data with pairs for the test prompts"
            )
        return [found[key(prompt)] for prompt in prompts]


def called(label: bool | None) -> str:
    """What messages call items with such a `Preference.label`."""
    return "pairs" if label is None else "responses"


def plain(value: Any) -> Any:
    """A field of a pair as JSON has it."""
    return vars(value) if isinstance(value, TokenIds) else value


def contents(dataset: Dataset) -> str:
    """Digest of all texts and flags, in order, not of where they came from. A new field at its default changes none."""

    def rows(records: Sequence[Demonstration] | Sequence[Preference]) -> list[dict[str, Any]]:
        columns = fields(records[0]) if records else ()
        defaults = {column.name: column.default for column in columns if column.compare}
        return [
            {name: plain(getattr(row, name)) for name, default in defaults.items() if getattr(row, name) != default}
            for row in records
        ]

    preferences = {split: rows(pairs) for split, pairs in dataset.preferences.items()}
    return digest_large([rows(dataset.demonstrations), preferences, dataset.prompts])[:16]


def texts(pairs: Sequence[Preference]) -> str:
    """Digest of all that decides what tokens some pairs become, in order."""
    return digest_large(mapped(lambda pair: [plain(getattr(pair, name)) for name in TEXT], pairs))


def file(
    path: str,
    validation_path: str | None,
    validation_fraction: float,
    on_faulty: OnFaulty,
    config: str | None = None,
    split: str | None = None,
    validation_split: str | None = None,
    columns: Columns | None = None,
    prompt: Literal["implicit"] | None = None,
    chat: bool = False,
) -> Dataset:
    """Preferences of a file, folder or data set on the hub (`dpo.data.sources.Source`), in rows such as `read` reads;
    demonstrations are the chosen responses.

    validation_path: where the held-out pairs are; None: in `validation_split` of `path`, or, without one, about
    `validation_fraction` of the prompts, by a hash of what each begins with (`dpo.data.texts.opening`), so that no
    conversation is on both sides and the split stays when the file grows. columns: see `dpo.data.sources.renamed`.
    prompt: "implicit": rows have none, and it is what chosen and rejected begin with, to the last whole word. chat:
    whether plain text becomes chat messages (`dpo.data.texts.as_chat`). on_faulty: see `filter_pairs`.
    """
    if chat and prompt is not None:
        raise ValueError(
            f"data.chat=true makes a user's turn of the column prompt, found data.prompt={prompt}; drop one"
        )
    source = Source(path, split, config, columns=columns, chat=chat)
    held_out = elsewhere(source, validation_path, validation_split)
    return paired(preference if prompt is None else implicit, source, held_out, validation_fraction, on_faulty)


def paired(
    record: Callable[[dict[str, Any]], Preference | str | list[Preference]],
    source: Source,
    held_out: Source | None,
    validation_fraction: float,
    on_faulty: OnFaulty,
    what: str = "pairs",
) -> Dataset:
    """A data set of what `record` makes of the rows of a source, and of those to hold out; None: a share of the former.

    record: gives a pair, several, or the reason why there is none. what: messages call them.
    """
    revisions: dict[str, str] = {}

    def pairs(place: Source) -> list[Preference]:
        found, commits = read_rows(place, record)
        revisions.update(commits)
        each = [(where, one) for where, made in found for one in (made if isinstance(made, list) else [made])]
        return filter_pairs(each, on_faulty, str(place), what)

    shown = None if held_out is None else pairs(held_out)
    return replace(split_pairs(pairs(source), shown, validation_fraction, on_faulty), revisions=revisions)


def read(path: str | Path) -> list[Preference]:
    """Preferences of a JSONL file, .gz or not: an object a line with `prompt`, `chosen` and `rejected`.

    Each is text or chat messages; `chosen_ended` and `rejected_ended` may be false; `token_ids` holds the fields of
    `TokenIds`, of responses that a policy sampled; the fields of `Measures` are read where all of them are there.
    Further keys are ignored, unless they are something to read for a policy (`tools`, `system`, ...): then the line is
    refused. `chosen` and `rejected` may be whole conversations of chat messages, as those of UltraFeedback and
    yale-nlp/RefDPO are: the prompt is what comes before their last message, and a `prompt` in plain text is not read.
    Raises a ValueError that counts the lines which are no such records and lists the first few.
    """
    return [replace(pair, source=f"{path}, {where}") for where, pair in parse(path, preference)]


def write(path: str | Path, preferences: Iterable[Preference]) -> None:
    """Write what `read` reads."""
    write_rows(path, map(row, preferences))


def filter_pairs(
    records: Iterable[tuple[str, Preference | str]], on_faulty: str, source: str, what: str = "pairs"
) -> list[Preference]:
    """The pairs to learn from. Faulty are pairs of which a response is empty or blank, or both are the same; and, found
    when they are tokenized, pairs and prompts of which the chat template loses a part or which it refuses, those with
    typed text that becomes control tokens, and pairs of responses with the same tokens.

    records: the name of each with the pair, or with the reason why it is none. on_faulty: "error" raises;
    "drop" leaves faulty pairs out; "keep" leaves out only what is no pair. The last two log counts. what: messages call
    them.
    """
    if on_faulty not in ("error", "drop", "keep"):
        raise ValueError(f'on_faulty must be "error", "drop" or "keep", got {on_faulty!r}')
    kept, faults, total = [], [], 0
    for where, pair in records:
        total += 1
        fault = pair if isinstance(pair, str) else fault_of(pair)
        if fault is not None:
            faults.append((where, fault))
        if not isinstance(pair, str) and (fault is None or on_faulty == "keep"):
            kept.append(replace(pair, source=f"{source}, {where}"))
    report(faults, total, total - len(kept), on_faulty, source, what)
    if not kept:
        raise ValueError(f"{source} must hold {what} to learn from, found none")
    return kept


def report(
    faults: Sequence[tuple[str, str]],
    total: int,
    dropped: int,
    on_faulty: str,
    source: str,
    what: str,
    advice: str = FAULTY,
) -> None:
    """Count the faults, each the name of a record and what is wrong with it; with on_faulty="error" raise them."""
    if faults and on_faulty == "error":
        raise ValueError(
            f"{source}: {len(faults)} of {total} {what} are faulty:"
            f"{listed([f'{where}: {fault}' for where, fault in faults])}\n{advice}"
        )
    if faults:
        counts = ", ".join(f"{n} x {fault}" for fault, n in Counter(fault for _, fault in faults).most_common(SHOWN))
        said = f"{source}: {len(faults)} of {total} {what} are faulty, {dropped} dropped ({counts})"
        logger.warning(said, extra={"faults": [(f"{source}, {where}", fault) for where, fault in faults]})
    if faults and dropped == total:
        raise NoneLeft(f"{source}: one of the {what} must be sound, found {total}, all of them faulty")


def split_pairs(
    pairs: Sequence[Preference],
    held_out: Sequence[Preference] | None,
    validation_fraction: float,
    on_faulty: OnFaulty = "error",
) -> Dataset:
    """A data set of labelled pairs; validation is `held_out`, or split off by a stable hash of the prompt's `opening`.

    Where the hash leaves one side empty, it gets the prompts that came next.
    """
    if held_out is None:
        if not 0 < validation_fraction < 1:
            raise ValueError(f"data.validation_fraction must be between 0 and 1, got {validation_fraction}")
        hashes = [drawn(opening(pair.prompt)) for pair in pairs]
        _, *more = sorted(set(hashes))
        if not more:
            raise ValueError(
                f"a split must have a prompt on either side, found {len(pairs)} {called(pairs[0].label)} whose prompts "
                "all begin alike; add some of another, or give data.validation_path"
            )
        border = min(max(validation_fraction, more[0]), more[-1])  # so that neither side is empty
        train = [pair for pair, value in zip(pairs, hashes, strict=True) if value >= border]
        held_out = [pair for pair, value in zip(pairs, hashes, strict=True) if value < border]
    else:
        train = list(pairs)
        train_keys = {key(pair.prompt) for pair in train}
        shared = sum(key(pair.prompt) in train_keys for pair in held_out)
        if shared:
            what = called(held_out[0].label)
            logger.warning(f"{shared} of {len(held_out)} validation {what} have a prompt of the training {what}")
    test = distinct(pair.prompt for pair in held_out)
    good, shown = ([pair for pair in some if pair.label is not False] for some in (train, held_out))
    first = {key(pair.prompt): pair.chosen for pair in reversed(shown)}
    written = [words_of(first[key(prompt)]) for prompt in test] if len(first) == len(test) else []
    return Dataset(
        demonstrations=[Demonstration(pair.prompt, pair.chosen, pair.chosen_ended, pair.source) for pair in good],
        preferences={"train": train, "validation": list(held_out)},
        prompts={"train": distinct(pair.prompt for pair in train), "validation": test, "test": test},
        on_faulty=on_faulty,
        written={"test": written} if written else {},
    )


def conversations(row: dict[str, Any]) -> bool:
    """Whether `chosen` and `rejected` are whole conversations, the prompt's messages before the response's."""
    chosen, rejected, prompt = (row.get(name) for name in ("chosen", "rejected", "prompt"))
    if not all(isinstance(messages, list) and len(messages) > 1 for messages in (chosen, rejected)):
        return False
    return prompt is None or isinstance(prompt, str) or prompt == row["chosen"][:-1]


def preference(row: dict[str, Any]) -> Preference:
    """The pair of a line, see `read`. Raises: ValueError if it is none."""
    if conversations(row):
        before, other = (row[name][:-1] for name in ("chosen", "rejected"))
        if before != other:
            raise ValueError("chosen and rejected must be one conversation up to their last message, found two")
        row = row | {"prompt": before} | {name: row[name][-1:] for name in ("chosen", "rejected")}
    require(row, ("prompt", "chosen", "rejected"), _other_data(row))
    prompt, (chosen, rejected), ended = responses_of(row, ("chosen", "rejected"))
    pair = Preference(prompt, chosen, rejected, ended[0], ended[1])
    more: dict[str, Any] = {"measures": _measures(row), "score_gap": _score_gap(row)}
    return replace(pair, token_ids=_token_ids(row, chosen, rejected), **more)


def implicit(row: dict[str, Any]) -> Preference:
    """The pair of two texts that begin with their prompt: the words that they share. Raises: ValueError if none."""
    if row.get("prompt") is not None or conversations(row):
        raise ValueError("must have no prompt of its own where data.prompt=implicit, found one; leave that out")
    chosen, rejected = (row.get(name) for name in ("chosen", "rejected"))
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise ValueError("must have chosen and rejected in plain text, each with the prompt before the response")
    both = range(min(len(chosen), len(rejected)))
    shared = next((place for place in both if chosen[place] != rejected[place]), len(both))
    end = max(chosen.rfind(space, 0, shared) for space in " \n")  # a word that only begins alike is no part of it
    if not chosen[: max(end, 0)].strip():
        raise ValueError("chosen and rejected must begin with the same words, their prompt, found others")
    return preference({"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]})


def responses_of(row: dict[str, Any], names: Sequence[str]) -> tuple[Text, list[Text], list[bool]]:
    """The prompt of a line, its responses of these names, and whether each ended."""
    if unread := [name for name in READ if row.get(name)]:
        raise ValueError(
            f"must say all that the policy reads in prompt, found {' and '.join(unread)}, too; write it into the "
            "prompt, as a message of the system for example (data.chat=true does with system), or remove it"
        )
    prompt, *responses = (checked(row[name], name) for name in ("prompt", *names))
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise ValueError("prompt must end before the assistant's turn, found a message of the assistant last")
    for name, response in zip(names, responses, strict=True):
        if isinstance(response, str):
            continue
        if isinstance(prompt, str):
            raise ValueError(f"{name} is chat messages, so prompt must be, too; found text")
        if [message["role"] for message in response] != ["assistant"]:
            raise ValueError(
                f"{name} must be one message of the assistant, found roles "
                f"{[message['role'] for message in response]}; what comes before it belongs in prompt"
            )
    flags = [row.get(f"{name}_ended") for name in names]
    ended = [ENDED[str(flag)] for flag in flags if str(flag) in ENDED]
    if len(ended) < len(flags):
        raise ValueError(f"{' and '.join(f'{name}_ended' for name in names)} must be true or false, found {flags}")
    return prompt, responses, ended


def _measures(row: dict[str, Any]) -> Measures:
    """Those of our own files, which have them all; columns of the same names in others mean something else."""
    names = [one.name for one in fields(Measures)]
    if not all(name in row for name in names) or type(row["flipped"]) is not bool:  # null, where other rows have them
        return Measures()
    values: dict[str, Any] = {name: tuple(value) if isinstance(value := row[name], list) else value for name in names}
    return Measures(**values)


def _score_gap(row: dict[str, Any]) -> float | None:
    for names in SCORES:
        try:  # in a CSV file without one in a row they are text
            scores = [float(row[name]) for name in names if type(row[name]) in (int, float, str)]
        except (KeyError, ValueError):
            continue
        if len(scores) == 2 and all(map(math.isfinite, scores)):
            return scores[0] - scores[1]
    return None


def _token_ids(row: dict[str, Any], chosen: Text, rejected: Text) -> TokenIds | None:
    token_ids = row.get("token_ids")
    if token_ids in (None, ""):  # an empty cell of a table
        return None
    names = {column.name for column in fields(TokenIds)}
    if not isinstance(token_ids, dict) or set(token_ids) != names or not isinstance(token_ids["tokenizer"], str):
        raise ValueError(f"token_ids must be an object of {', '.join(sorted(names))}, as they were sampled")
    for name in sorted(names - {"tokenizer"}):
        ids = token_ids[name]
        if not isinstance(ids, list) or not ids or {*map(type, ids)} != {int} or min(ids) < 0:
            raise ValueError(f"token_ids.{name} must be a list of token ids, at least one")
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise ValueError("token_ids belong to responses in plain text, found chat messages")
    return TokenIds(**token_ids)


def _other_data(row: dict[str, Any]) -> str:
    """What a line is that is no pair, and what reads it."""
    if {"chosen", "rejected"} <= row.keys() and all(TURN in str(row[name]) for name in ("chosen", "rejected")):
        return "; dialogues like those of hh-rlhf are read by data=hh"
    if "prompt" not in row and all(isinstance(row.get(name), str) for name in ("chosen", "rejected")):
        return "; texts that begin with their prompt are read with data.prompt=implicit, one of its own by data.columns"
    if {"responses", "scores"} <= row.keys():
        return "; several responses with a score each are read by data=ranked"
    if "label" in row and "completion" in row:
        return "; single responses with a label are read by data=unpaired"
    if {"messages", "completion", "response", "conversations"} & row.keys() and "rejected" not in row:
        return "; this is data of demonstrations, which dpo.sft reads by data=sft"
    return ""


def row(pair: Preference) -> dict[str, Any]:
    """A preference as a line of the file; responses that are messages as whole conversations."""
    names, label = pair.sides, {} if pair.label is None else {"label": pair.label}
    texts: dict[str, Any] = {"prompt": pair.prompt, names[0]: pair.chosen, names[1]: pair.rejected}
    if not label and not any(isinstance(text, str) for text in texts.values()):
        texts |= {name: texts["prompt"] + texts[name] for name in names}
    flags = {f"{names[0]}_ended": pair.chosen_ended, f"{names[1]}_ended": pair.rejected_ended}
    sampled = {} if pair.token_ids is None else {"token_ids": asdict(pair.token_ids)}
    measured = {} if pair.measures == Measures() else asdict(pair.measures)
    return texts | label | {name: flag for name, flag in flags.items() if not flag} | sampled | measured


def fault_of(pair: Preference) -> str | None:
    chosen, rejected = words_of(pair.chosen), words_of(pair.rejected)
    empty = [name for name, text in (("chosen", chosen), ("rejected", rejected)) if not text.strip()]
    if pair.label is not None:
        return "completion is empty" if empty else None
    if empty:
        return f"{' and '.join(empty)} {'is' if len(empty) == 1 else 'are'} empty"
    if (chosen, pair.chosen_ended) == (rejected, pair.rejected_ended):
        return "chosen and rejected are the same"
    return None
