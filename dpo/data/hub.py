"""Public data sets, one reader each; what a reader returns is described in `dpo.data.records.Dataset`."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from dpo.data.records import (
    HUMAN,
    TURN,
    Dataset,
    OnFaulty,
    Preference,
    conversations,
    filter_pairs,
    parse,
    preference,
    responses_of,
    split_pairs,
)

Made = TypeVar("Made")


def hh(
    path: str | None,
    validation_path: str | None,
    subset: str | None,
    validation_fraction: float,
    on_faulty: OnFaulty,
) -> Dataset:
    """Anthropic's helpful and harmless dialogues (Bai et al. 2022): the last turn of the assistant is the response.

    A prompt is the dialogue up to and with its last "Assistant:"; responses keep the space that follows it.

    path: its JSONL file, .gz or not, with validation_path or validation_fraction as in `dpo.data.records.file`; None:
    from the Hugging Face hub, whose test split becomes the validation split. subset: a folder on the hub such as
    "harmless-base"; None: all of them. on_faulty: see `dpo.data.records.filter_pairs`; dialogues that part before
    their last turn are no pair.
    """

    files = path, validation_path, validation_fraction, on_faulty
    return _read(_pair, *files, "Anthropic/hh-rlhf", "hh-rlhf", data_dir=subset)


def ultrafeedback(
    path: str | None,
    validation_path: str | None,
    repository: str,
    validation_fraction: float,
    on_faulty: OnFaulty,
) -> Dataset:
    """UltraFeedback (2310.01377) as pairs (2310.16944): the best of four responses, by GPT-4's scores, and another.

    path: a JSONL file of it, .gz or not, with validation_path or validation_fraction as in `dpo.data.records.file`;
    None: the splits train_prefs and test_prefs of `repository` on the hub. on_faulty: see
    `dpo.data.records.filter_pairs`.
    """

    files = path, validation_path, validation_fraction, on_faulty
    return _read(_conversations, *files, repository, repository, ("train_prefs", "test_prefs"))


def tldr(
    path: str | None,
    validation_path: str | None,
    validation_fraction: float,
    on_faulty: OnFaulty,
) -> Dataset:
    """Comparisons of summaries of Reddit posts (2009.01325): of two summaries, the one that a person chose.

    A prompt is the post under its subreddit and title, up to and with "TL;DR:"; summaries begin with a space.

    path: a JSONL file of the comparisons, .gz or not, with validation_path or validation_fraction as in
    `dpo.data.records.file`; None: the splits train and validation of openai/summarize_from_feedback on the hub.
    on_faulty: see `dpo.data.records.filter_pairs`; comparisons of news articles, which the validation split has, too,
    are no pair.
    """

    files = path, validation_path, validation_fraction, on_faulty
    repository, splits = "openai/summarize_from_feedback", ("train", "validation")
    parquet: dict[str, Any] = {"name": "comparisons", "revision": "refs/convert/parquet"}  # its own form is a script
    return _read(_comparison, *files, repository, "summarize_from_feedback", splits, **parquet)


def unpaired(
    path: str | None,
    validation_path: str | None,
    repository: str,
    validation_fraction: float,
    on_faulty: OnFaulty,
) -> Dataset:
    """Single responses with a label, desirable or not, as TRL's unpaired preferences; demonstrations are the former.

    path: a JSONL file, .gz or not, with validation_path or validation_fraction as in `dpo.data.records.file`; None: the
    splits train and test of `repository` on the hub. A row has a `prompt` and a `completion`, text or chat messages,
    and a `label`, true or false, 1 or 0; `completion_ended` may be false. on_faulty: see
    `dpo.data.records.filter_pairs`.
    """

    data = _read(_labelled, path, validation_path, validation_fraction, on_faulty, repository, repository)
    if len(found := {row.label for row in data.preferences["train"]}) < 2:
        raise ValueError(
            f"{path or repository} must have training responses of both labels, found {found.pop()} alone; add others"
        )
    return data


def _read(
    record: Callable[[dict[str, Any]], Preference | str],
    path: str | None,
    validation_path: str | None,
    validation_fraction: float,
    on_faulty: OnFaulty,
    repository: str,
    called: str,
    splits: tuple[str, str] = ("train", "test"),
    **options: Any,
) -> Dataset:
    """What `record` makes of the lines of files, see `dpo.data.records.file`; without a file, of the rows of a data set
    on the hub.

    called: that data set in messages. splits: those to train on and to hold out. options: for `load_dataset`.
    """

    def rows(file: str | None, split: str) -> list[Preference]:
        if file is None:
            found = from_hub(record, repository, split, **options)
            return filter_pairs(found, on_faulty, f"{called}, {split} split")
        return filter_pairs(parse(file, record), on_faulty, file)

    held_out = None if path is not None and validation_path is None else rows(validation_path, splits[1])
    return split_pairs(rows(path, splits[0]), held_out, validation_fraction, on_faulty)


def from_hub(
    record: Callable[[dict[str, Any]], Made], repository: str, split: str, **options: Any
) -> Iterable[tuple[str, Made]]:
    """What `record` makes of each row of a data set on the hub, and where that is.

    Raises: ValueError if the package that reads it is missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "reading from the hub needs the datasets package, found none; pip install 'dpo[hub]', or download "
            f"{repository} and set data.path to a JSONL file of it"
        ) from error
    rows = datasets.load_dataset(repository, split=split, **options)
    return ((f"row {index}", record(row)) for index, row in enumerate(rows))


def _labelled(row: dict[str, Any]) -> Preference:
    """The response of a row with its label. Raises: ValueError if it is none."""
    if missing := [name for name in ("prompt", "completion", "label") if name not in row]:
        raise ValueError(f"must have prompt, completion and label; found no {' and no '.join(missing)}{_file(row)}")
    label = row["label"]
    if type(label) not in (bool, int) or label not in (0, 1):
        raise ValueError(f"label must be true or false, or 1 or 0, found {label!r}")
    prompt, [completion], [ended] = responses_of(row, ("completion",))
    return Preference(prompt, completion, completion, ended, ended, label=bool(label))


def _conversations(row: dict[str, Any]) -> Preference | str:
    """The pair of two conversations in chat messages, or why they make none."""
    if not conversations(row):
        raise ValueError("must have two conversations of at least two chat messages, chosen and rejected" + _file(row))
    parted = row["chosen"][:-1] != row["rejected"][:-1]
    return "the conversations part before their last turn" if parted else preference(row)


def _pair(row: dict[str, Any]) -> Preference | str:
    """The pair of two dialogues, or why they make none."""
    dialogues = [row.get(name) for name in ("chosen", "rejected")]
    if not all(isinstance(dialogue, str) for dialogue in dialogues):
        raise ValueError("must have two dialogues in plain text, chosen and rejected" + _file(row))
    if "prompt" in row:
        raise ValueError("must have two whole dialogues, chosen and rejected, found a prompt, too" + _file(row))
    (prompt, turn, chosen), (other, _, rejected) = (str(dialogue).rpartition(TURN) for dialogue in dialogues)
    if not turn:
        return "there is no turn of the assistant"
    if prompt != other:
        return "the dialogues part before their last turn"
    if HUMAN in chosen or HUMAN in rejected:
        return "the last turn is not the assistant's"
    return Preference(prompt + turn, chosen, rejected)


def _comparison(row: dict[str, Any]) -> Preference | str:
    """The pair of a comparison of two summaries, or why it makes none."""
    info, summaries, choice = row.get("info"), row.get("summaries"), row.get("choice")
    texts = [one.get("text") for one in summaries if isinstance(one, dict)] if isinstance(summaries, list) else []
    if not isinstance(info, dict) or choice not in (0, 1) or [type(text) for text in texts] != [str, str]:
        raise ValueError("must have info, two summaries and a choice of 0 or 1" + _file(row))
    if not info.get("post"):
        return "it is of a news article, not of a post"
    if not all(isinstance(info.get(key), str) for key in ("subreddit", "title")):
        raise ValueError("must have a subreddit and a title in info, beside the post")
    prompt = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: {info['post']}\n\nTL;DR:"
    chosen, rejected = (f" {texts[side].strip()}" for side in (choice, 1 - choice))
    return Preference(prompt, chosen, rejected)


def _file(row: dict[str, Any]) -> str:
    """What reads a line of another kind."""
    pair = {"prompt", "chosen", "rejected"} <= row.keys() or conversations(row)
    return "; lines with prompt, chosen and rejected, or with conversations, are read by data=file" if pair else ""
