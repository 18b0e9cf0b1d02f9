"""Prompts without responses, to sample pairs on."""

from typing import Any

from dpo.cache import digest
from dpo.data.records import Dataset, OnFaulty, Text, distinct, responses_of
from dpo.data.sources import Columns, Source, placed, read, require

ALPACA_EVAL = Source("tatsu-lab/alpaca_eval@refs/convert/parquet", "test", folder="alpaca_eval")  # its split eval
CNN_DAILYMAIL = Source("abisee/cnn_dailymail", folder="3.0.0")


def prompts(
    path: str,
    train: int | None,
    part: int,
    validation: int,
    test: int,
    on_faulty: OnFaulty,
    config: str | None = None,
    split: str | None = None,
    columns: Columns | None = None,
    chat: bool = False,
) -> Dataset:
    """Those of a `dpo.data.sources.Source`, of pairs or of anything else with a `prompt` (text, or chat messages).

    They are taken in the order of their hashes: first `test`, then `validation`, then parts of `train`, of
    which this is number `part`, from 0; None: one part of all that are left. No prompt is in two of them.

    columns, chat: those of `dpo.data.records.file`.
    Raises: ValueError if there are too few.
    """
    source = Source(path, split, config, columns=columns, chat=chat)
    found, revisions = read(source, _prompt)
    splits = _parted(path, [one for _, one in found], train, part, validation, test)
    return Dataset([], {}, splits, on_faulty, revisions=revisions)


def alpaca_eval(
    path: str | None, train: int | None, part: int, validation: int, test: int, on_faulty: OnFaulty
) -> Dataset:
    """AlpacaEval's instructions (805), a user's turn each.

    path: its alpaca_eval.json or another list with `instruction`; None: tatsu-lab/alpaca_eval on the hub. Others are
    those of `prompts`.
    """
    place = placed(path, ALPACA_EVAL)
    found, revisions = read(place, _instruction)
    splits = _parted(place.path, [one for _, one in found], train, part, validation, test)
    return Dataset([], {}, splits, on_faulty, revisions=revisions)


def read_prompts(path: str) -> list[Text]:
    """The `prompt` of each row of a file.

    Raises: ValueError that names the rows which have none.
    """
    return [one for _, one in read(Source(path), _prompt)[0]]


def cnn_dailymail(
    path: str | None,
    instruction: str,
    train: int | None,
    part: int,
    validation: int,
    test: int,
    on_faulty: OnFaulty,
) -> Dataset:
    """News articles to summarize (CNN/DailyMail 3.0.0, train split): a user's turn each, `instruction` and the article.

    What people wrote, its highlights, is what evaluation.baseline=human and pairs.off_policy compare with.
    path: rows with `article` and `highlights`; None: abisee/cnn_dailymail on the hub. Others are
    those of `prompts`.
    Raises: ValueError as `prompts` does.
    """
    source = placed(path, CNN_DAILYMAIL)
    rows, revisions = read(source, _article)
    asked: dict[str, tuple[Text, str]] = {}
    for _, (article, highlights) in rows:
        asked.setdefault(article, ([{"role": "user", "content": f"{instruction}\n\n{article}"}], highlights))
    human = {digest(prompt): highlights for prompt, highlights in asked.values()}
    splits = _parted(source.path, [prompt for prompt, _ in asked.values()], train, part, validation, test)
    written = {split: [human[digest(prompt)] for prompt in some] for split, some in splits.items()}
    return Dataset([], {}, splits, on_faulty, written, revisions)


def _parted(
    called: str, found: list[Text], train: int | None, part: int, validation: int, test: int
) -> dict[str, list[Text]]:
    """The splits that `prompts` describes."""
    found = sorted(distinct(found), key=digest)
    held_out, size = test + validation, len(found) - test - validation if train is None else train
    first = held_out + part * size
    if size < 1 or part < 0 or first + size > len(found):
        raise ValueError(
            f"{called} must have {test} prompts for test, {validation} for validation, and part {part}, counted from "
            f"0, of {'all others' if train is None else train} for training, found {len(found)}; give a number as "
            "data.train, lower it, data.validation or data.test, or take fewer parts"
        )
    return {"test": found[:test], "validation": found[test:held_out], "train": found[first : first + size]}


def _prompt(row: dict[str, Any]) -> Text:
    require(row, ("prompt",))
    return responses_of(row, ())[0]


def _instruction(row: dict[str, Any]) -> Text:
    if not isinstance(asked := row.get("instruction"), str) or not asked.strip():
        raise ValueError(f"must have an instruction in plain text, found {', '.join(row) or 'nothing'}")
    return responses_of({"prompt": [{"role": "user", "content": asked}]}, ())[0]


def _article(row: dict[str, Any]) -> tuple[str, str]:
    texts = row.get("article"), row.get("highlights")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"must have an article and its highlights, found {', '.join(row) or 'nothing'}")
    return str(texts[0]).strip(), str(texts[1]).strip()
