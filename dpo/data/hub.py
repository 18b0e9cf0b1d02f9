"""Public data sets, one reader each; what a reader returns is described in `dpo.data.records.Dataset`.

A reader's `path` is where the rows are that it parses, in their published form: any `dpo.data.sources.Source`, and so
another revision (owner/name@revision), too. None: where they are published. Of data with splits (on the hub, or in a
folder) the published held-out split is the validation split; of a file it is `validation_path`, or a share of it.
"""

import re
from collections.abc import Callable
from typing import Any, Literal

from dpo.data.records import Dataset, OnFaulty, Preference, conversations, paired, preference, responses_of
from dpo.data.sources import Columns, Source, elsewhere, has_splits, held_out_of, placed, require
from dpo.data.texts import HUMAN, TURN

CONVERTED = "refs/convert/parquet"  # the hub's own copy of a data set that is published as a script, a folder each
FROM_FEEDBACK = Source(f"openai/summarize_from_feedback@{CONVERTED}", "train", folder="comparisons")
WEBGPT = Source(f"openai/webgpt_comparisons@{CONVERTED}", "train", folder="default")
HC3 = Source(f"Hello-SimpleAI/HC3@{CONVERTED}", "train", folder="all")
ROLES = {HUMAN: "user", TURN: "assistant"}  # of Anthropic's dialogues
SPEAKERS = re.compile(f"({HUMAN}|{TURN})")


def hh(
    path: str | None,
    validation_path: str | None,
    subset: str | None,
    chat: bool,
    validation_fraction: float,
    on_faulty: OnFaulty,
) -> Dataset:
    """Anthropic's helpful and harmless dialogues (Bai et al. 2022): the last turn of the assistant is the response.

    A prompt is the dialogue up to and with its last "Assistant:"; responses keep the space that follows it.

    path: its rows, or None: the splits train and test of Anthropic/hh-rlhf. subset: a folder of that, or of a copy of
    it here, such as "harmless-base"; None: all of them. chat: True makes chat messages of the turns, without the space
    about them. on_faulty: see `dpo.data.records.filter_pairs`; dialogues that part before their last turn are no pair.
    """
    published = Source("Anthropic/hh-rlhf", "train", folder=subset)
    if without := [some for some in (path, validation_path) if some and placed(some, published).folder != subset]:
        raise ValueError(
            f"data.subset must be a folder of {published.path} or of a copy of it here, found no {subset} in "
            f"{without[0]}; set data.subset=null"
        )
    files = path, validation_path, validation_fraction, on_faulty
    return _read(_in_turns if chat else _pair, *files, published, "test")


def ultrafeedback(
    path: str | None,
    validation_path: str | None,
    repository: str,
    validation_fraction: float,
    on_faulty: OnFaulty,
) -> Dataset:
    """UltraFeedback (2310.01377) as pairs (2310.16944): the best of four responses, by GPT-4's scores, and another.

    path: its rows, or None: the splits train_prefs and test_prefs of `repository` on the hub. on_faulty: see
    `dpo.data.records.filter_pairs`.
    """
    files = path, validation_path, validation_fraction, on_faulty
    return _read(_conversations, *files, Source(repository, "train_prefs"), "test_prefs")


def tldr(
    path: str | None,
    validation_path: str | None,
    validation_fraction: float,
    on_faulty: OnFaulty,
) -> Dataset:
    """Comparisons of summaries of Reddit posts (2009.01325): of two summaries, the one that a person chose.

    A prompt is the post under its subreddit and title, up to and with "TL;DR:"; summaries begin with a space.

    path: the comparisons, or None: the splits train and validation of openai/summarize_from_feedback. on_faulty: see
    `dpo.data.records.filter_pairs`; comparisons of news articles, which the validation split has, too, are no pair.
    """
    files = path, validation_path, validation_fraction, on_faulty
    return _read(_comparison, *files, FROM_FEEDBACK, "validation")


def shp(
    path: str | None,
    validation_path: str | None,
    min_ratio: float,
    chat: bool,
    validation_fraction: float,
    on_faulty: OnFaulty,
) -> Dataset:
    """Stanford Human Preferences (2110.08420): of two comments on a Reddit post, the one that was voted for more.

    A prompt is the post as a dialogue's question, "Human: ..." and "Assistant:", as in the code of DPO's authors.

    path: its rows, or None: the splits train and validation of stanfordnlp/SHP. min_ratio: of the two scores, in the
    code of DPO's authors 2; pairs of closer ones are left out. chat: True makes chat messages. Others: see above.
    """

    def record(row: dict[str, Any]) -> Preference | str:
        scores: list[Any] = [row.get(f"score_{side}") for side in "AB"]
        texts: list[Any] = [row.get(name) for name in ("history", "human_ref_A", "human_ref_B")]
        if row.get("labels") not in (0, 1) or not all(map(_is_text, texts)) or not all(map(_is_count, scores)):
            raise ValueError(f"must have history, human_ref_A and _B, score_A and _B, and labels of 0 or 1{_file(row)}")
        high, low = max(scores), min(scores)
        if low <= 0 or high / low < min_ratio:
            return f"the scores are closer than {min_ratio:g} to 1"
        return _answered(texts[0], texts[2 - row["labels"]], texts[1 + row["labels"]], chat)

    files = path, validation_path, validation_fraction, on_faulty
    return _read(record, *files, Source("stanfordnlp/SHP", "train"), "validation")


def webgpt(
    path: str | None, validation_path: str | None, chat: bool, validation_fraction: float, on_faulty: OnFaulty
) -> Dataset:
    """Comparisons of long answers (WebGPT, 2112.09332): of two answers, the one with the higher score; ties are none.

    A prompt is the question, without what the model had read on the web. path: its rows, or None: the only split of
    openai/webgpt_comparisons. chat, and other arguments: as in `shp`.
    """

    def record(row: dict[str, Any]) -> Preference | str:
        question = row.get("question")
        text: Any = question.get("full_text") if isinstance(question, dict) else None
        answers: list[Any] = [row.get(f"answer_{side}") for side in (0, 1)]
        scores: list[Any] = [row.get(f"score_{side}") for side in (0, 1)]
        if not all(map(_is_text, [text, *answers])) or not all(map(_is_count, scores)):
            raise ValueError(f"must have question.full_text, answer_0 and _1, and score_0 and _1{_file(row)}")
        if scores[0] == scores[1]:
            return "neither answer is better"
        better = int(scores[1] > scores[0])
        return _answered(text, answers[better], answers[1 - better], chat)

    return _read(record, path, validation_path, validation_fraction, on_faulty, WEBGPT, None)


def hc3(
    path: str | None,
    validation_path: str | None,
    chosen: Literal["human", "chatgpt"],
    chat: bool,
    validation_fraction: float,
    on_faulty: OnFaulty,
) -> Dataset:
    """Answers of people and of ChatGPT to one question (HC3, 2301.07597): the first of either, and `chosen` says whose
    is preferred; the data set does not.

    path: its rows, or None: the folder "all" of Hello-SimpleAI/HC3, its only split. chat, and other arguments:
    as in `shp`.
    """
    sides = ("human", "chatgpt") if chosen == "human" else ("chatgpt", "human")

    def record(row: dict[str, Any]) -> Preference | str:
        answers: list[Any] = [row.get(f"{side}_answers") for side in sides]
        if not _is_text(row.get("question")) or not all(
            isinstance(some, list) and all(map(_is_text, some)) for some in answers
        ):
            raise ValueError(f"must have a question, human_answers and chatgpt_answers, lists of text{_file(row)}")
        if not all(answers):
            return "one side has no answer"
        return _answered(row["question"], answers[0][0], answers[1][0], chat)

    return _read(record, path, validation_path, validation_fraction, on_faulty, HC3, None)


def unpaired(
    path: str | None,
    validation_path: str | None,
    repository: str,
    validation_fraction: float,
    on_faulty: OnFaulty,
    config: str | None = None,
    split: str | None = None,
    validation_split: str | None = None,
    columns: Columns | None = None,
    chat: bool = False,
) -> Dataset:
    """Single responses with a label, desirable or not, as TRL's unpaired preferences; demonstrations are the former.

    path: None: `repository` on the hub. A row has a `prompt` and a `completion`, text or chat messages, and a `label`,
    true or false, 1 or 0; `completion_ended` may be false. split, validation_split: None, both of them: the splits
    train and test, where there are splits; with `split` alone a share of that is held out. Others: those of
    `dpo.data.records.file`.
    """
    source = Source(path or repository, split, config, columns=columns, chat=chat)
    published = validation_path is not None or split is None  # a split of its own
    if validation_split is None and published and has_splits(validation_path or source.path):
        validation_split = "test"
    held_out = elsewhere(source, validation_path, validation_split)
    data = paired(_labelled, source, held_out, validation_fraction, on_faulty, "responses")
    if len(found := {row.label for row in data.preferences["train"]}) < 2:
        raise ValueError(
            f"{path or repository} must have training responses of both labels, found {found.pop()} alone; add others"
        )
    return data


def _read(
    record: Callable[[dict[str, Any]], Preference | str | list[Preference]],
    path: str | None,
    validation_path: str | None,
    validation_fraction: float,
    on_faulty: OnFaulty,
    published: Source,
    held_out: str | None,
) -> Dataset:
    """What `record` makes of the rows at `path`, see above. held_out: a published split; None: there is none."""
    source = placed(path, published)
    shown = held_out_of(source, validation_path, published, held_out)
    return paired(record, source, shown, validation_fraction, on_faulty)


def _answered(question: str, chosen: str, rejected: str, chat: bool) -> Preference:
    """A pair of answers to a question: a dialogue as Anthropic's, as DPO's authors write it, or chat messages."""
    if not chat:
        return preference({"prompt": f"{HUMAN} {question}{TURN}", "chosen": f" {chosen}", "rejected": f" {rejected}"})
    asked, better, worse = (
        [{"role": role, "content": text}]
        for role, text in (("user", question), ("assistant", chosen), ("assistant", rejected))
    )
    return preference({"prompt": asked, "chosen": better, "rejected": worse})


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _labelled(row: dict[str, Any]) -> Preference:
    """The response of a row with its label. Raises: ValueError if it is none."""
    require(row, ("prompt", "completion", "label"), _file(row))
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
    if row.get("prompt") is not None:
        raise ValueError("must have two whole dialogues, chosen and rejected, found a prompt, too" + _file(row))
    (prompt, turn, chosen), (other, _, rejected) = (str(dialogue).rpartition(TURN) for dialogue in dialogues)
    if not turn:
        return "there is no turn of the assistant"
    if prompt != other:
        return "the dialogues part before their last turn"
    if HUMAN in chosen or HUMAN in rejected:
        return "the last turn is not the assistant's"
    return Preference(prompt + turn, chosen, rejected)


def _in_turns(row: dict[str, Any]) -> Preference | str:
    """The pair of two dialogues in chat messages."""
    pair = _pair(row)
    if isinstance(pair, str):
        return pair
    before, *turns = SPEAKERS.split(str(pair.prompt).removesuffix(TURN))
    if before.strip() or not turns:
        return "the dialogue does not begin with a turn"
    spoken = zip(turns[::2], turns[1::2], strict=True)
    prompt = [{"role": ROLES[who], "content": text.strip()} for who, text in spoken]
    better, worse = ([{"role": "assistant", "content": str(one).strip()}] for one in (pair.chosen, pair.rejected))
    return preference({"prompt": prompt, "chosen": better, "rejected": worse})


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
