"""What is wrong, odd or worth knowing in data, counted before training: `python -m dpo.data` shows it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from dpo.data.chats import as_text
from dpo.data.measure import ODD, near_duplicates
from dpo.data.records import Dataset, Preference, Text, called
from dpo.data.truncation import Limits

QUANTILES = (0.0, 0.05, 0.5, 0.95, 0.99, 1.0)
BIASED = 0.1  # how far from one half the share of longer chosen responses may be before it is worth a look
SHOWN = 10  # examples of a finding


@dataclass(frozen=True)
class Finding:
    """A line of the report: so many of so many, whether that is bad, and what to do if it is."""

    name: str
    split: str
    count: int
    of: int
    verdict: str  # "ok", "look" (it may be meant), or "bad" (training stops, or learns what is wrong)
    advice: str
    examples: list[str] = field(default_factory=list)  # where the first of them came from
    note: str = ""  # instead of the share, in the terminal


def finding(name: str, split: str, where: Sequence[str | None], of: int, bad: str, advice: str) -> Finding:
    """where: the source of each that was found. bad: the verdict if there are some."""
    shown = [one or "?" for one in where[:SHOWN]]
    return Finding(name, split, len(where), of, bad if where else "ok", advice, shown)


def of_pairs(
    dataset: Dataset,
    table: pd.DataFrame,
    refused: Sequence[tuple[str, str]],
    limits: Limits,
    on_faulty: str,
    cache: str,
    shown: bool = False,
) -> tuple[list[Finding], dict[str, Any], dict[str, pd.DataFrame]]:
    """Findings, numbers, and by split the rows that training would learn from.

    table: `dpo.data.measure.measured` of the training pairs and then the validation pairs. refused: of rows that are no
    pairs where they are from and why. on_faulty: what training does with faulty pairs. shown: they are demonstrations,
    each as a response with a label.
    """
    found: list[Finding] = []
    numbers: dict[str, Any] = {}
    kept: dict[str, pd.DataFrame] = {}
    first = 0
    stops = {
        "error": ("bad", "training stops; mend them, or data.on_faulty=drop"),
        "drop": ("look", "they are dropped"),
    }
    verdict, advice = stops.get(on_faulty, ("bad", "they are trained on; data.on_faulty=drop leaves them out"))
    for why in dict.fromkeys(why for _, why in refused):
        places = [place for place, reason in refused if reason == why]
        found.append(finding(why, "all", places, len(table) + len(refused), verdict, advice))
    label = next((pair.label for pairs in dataset.preferences.values() for pair in pairs), None)
    kind = "demonstrations" if shown else called(label)
    for split, pairs in dataset.preferences.items():
        rows = table.iloc[first : first + len(pairs)].assign(source=[pair.source or "?" for pair in pairs])
        first += len(pairs)
        rows = rows.reset_index(drop=True)
        faulty = rows[rows.fault.notna()]
        for reason, some in faulty.groupby("fault", sort=False):
            found.append(finding(str(reason), split, list(some.source), len(rows), verdict, advice))
        if faulty.empty:
            found.append(finding(f"faulty {kind}", split, [], len(rows), verdict, advice))
        usable = rows[(rows.prompt >= 0) & (rows.fault.isna() | (on_faulty == "keep"))]
        of_split, lengths = _of_split([pairs[place] for place in usable.index], usable, split, limits, kind)
        found += of_split
        numbers[split] = {kind if shown else "pairs": len(usable), "given": len(rows), **lengths}
        kept[split] = usable[tokens(usable) <= limits.max_length] if limits.on_too_long == "drop" else usable
        kept[split] = kept[split].drop(columns="rejected") if shown else kept[split]
    prompts = {split: [pair.prompt for pair in pairs] for split, pairs in dataset.preferences.items()}
    rows_of: dict[str, set[str | None]] = {}
    for pair in dataset.preferences["train"]:
        rows_of.setdefault(as_text(pair.prompt), set()).add(pair.source)
    found += _prompts(dataset.prompts | prompts, kind, cache, rows_of)
    return found, numbers, kept


def _of_split(
    pairs: Sequence[Preference], rows: pd.DataFrame, split: str, limits: Limits, kind: str
) -> tuple[list[Finding], dict[str, Any]]:
    single = bool(pairs) and pairs[0].label is not None
    found = [_too_long(rows, tokens(rows), split, limits, kind), *_odd(rows, split)]
    advice = "look at the first; what differs may be too little to learn from"
    if not single:
        found.append(_flagged("one response begins the other", split, rows, "prefix", advice))
        found.append(_flagged("responses differ in space or case alone", split, rows, "alike", advice))
    merging = rows[rows.merged > 0]
    what = "their responses are encoded alone; begin them with a space or line break, or end prompts so"
    found.append(finding("responses merge with the prompt's end", split, list(merging.source), len(rows), "look", what))
    found += _repeated(pairs, split, kind)
    found += _labels(pairs, split)
    numbers: dict[str, Any] = {"lengths": {"prompt": quantiles(rows.prompt)}}
    if single:
        labels = np.array([pair.label for pair in pairs], dtype=bool)
        numbers["lengths"]["completion"] = quantiles(rows.chosen)
        if kind == "demonstrations":
            return found, numbers
        numbers["length_auc"] = auc(rows.chosen[labels], rows.chosen[~labels])
        share = int(labels.sum())
        far = "ok" if 0.2 <= share / len(labels) <= 0.8 else "look"
        text = "weigh the rarer label more: desirable_weight of loss=kto"
        found.append(Finding("desirable responses", split, share, len(labels), far, text))
        found.append(_by_length(split, numbers["length_auc"], len(labels)))
        return found, numbers
    numbers["lengths"] |= {name: quantiles(rows[name]) for name in ("chosen", "rejected")}
    longer = (rows.chosen > rows.rejected).mean() + (rows.chosen == rows.rejected).mean() / 2 if len(rows) else 0.5
    numbers |= {"longer_is_chosen": float(longer), "length_auc": auc(rows.chosen, rows.rejected)}
    biased = "look" if abs(longer - 0.5) > BIASED else "ok"
    text = "length alone predicts the label; see loss=r_dpo, ld_dpo or simpo, and the column LC of results"
    count, note = int((rows.chosen > rows.rejected).sum()), f"{longer:.1%} with ties as halves"
    found.append(Finding("the longer response is chosen", split, count, len(rows), biased, text, [], note))
    found.append(_by_length(split, numbers["length_auc"], len(rows)))
    return found, numbers


def _by_length(split: str, value: float, of: int) -> Finding:
    verdict = "look" if abs(value - 0.5) > BIASED else "ok"
    text = "0.5: a response's length says nothing of its label; far from it the policy may learn length"
    return Finding("length tells the label, AUC", split, of, of, verdict, text, [], f"{value:.3f}")


def of_prompts(
    dataset: Dataset, tables: dict[str, pd.DataFrame], limits: Limits, cache: str
) -> tuple[list[Finding], dict[str, Any]]:
    """The same of prompts without responses. tables: `measured_prompts` of each split; without that of the training
    split, what is said of the others is said of each alone.
    """
    found: list[Finding] = []
    numbers: dict[str, Any] = {}
    for split, table in tables.items():
        rows = table.assign(source=[f"{split} prompt {place}, counted from 0" for place in range(len(table))])
        for reason, some in rows[rows.fault.notna()].groupby("fault", sort=False):
            text = "data.on_faulty says what becomes of them: error, drop or keep"
            found.append(finding(str(reason), split, list(some.source), len(rows), "bad", text))
        usable = rows[rows.prompt >= 0]
        long = usable[usable.prompt > limits.prompt]
        text = f"they are cut from the left to max_length - max_new_tokens = {limits.prompt}; raise max_length"
        found.append(finding("prompts above the budget", split, list(long.source), len(usable), "look", text))
        found += _odd(usable, split)
        numbers[split] = {"prompts": len(usable), "given": len(rows), "lengths": {"prompt": quantiles(usable.prompt)}}
    return found + (_prompts(dataset.prompts, "responses", cache, {}) if "train" in tables else []), numbers


def tokens(rows: pd.DataFrame) -> pd.Series:
    """Of the prompt and the longer response."""
    return rows.prompt + rows[sides(rows)].max(axis=1)


def sides(rows: pd.DataFrame) -> list[str]:
    """The columns of responses: of demonstrations there is one."""
    return [name for name in ("chosen", "rejected") if name in rows]


def sizes(rows: pd.DataFrame, limits: Limits, labels: bool, packed: bool) -> NDArray[np.int64]:
    """Tokens that each item of training has in a pass, and how many of them are scored: a pair's, or of a loss that
    reads labels those of a response beside one to another prompt, as long on average; of a demonstration, which has no
    column `rejected`, its own.  # (items, 2)

    With on_too_long=truncate after the cut, see `dpo.data.batches.tokenize`.
    """
    both = rows[sides(rows)].to_numpy()
    both = np.where(both < 0, both[:, :1], both)  # a response with a label has none beside it yet
    prompts = rows.prompt.to_numpy()
    if limits.on_too_long == "truncate":
        prompts = np.minimum(prompts, np.maximum(limits.max_length - both.max(axis=1, initial=0), 1))
        both = np.minimum(both, limits.max_length - prompts[:, None])
    found = np.stack([prompts * (1 if packed else both.shape[1]) + both.sum(axis=1), both.sum(axis=1)], axis=1)
    return found.repeat(2 if labels and "rejected" in rows and (rows.rejected >= 0).any() else 1, axis=0)


def seen(items: int, batch_size: int, epochs: int, steps: int | None) -> tuple[int, int]:
    """Optimizer steps, and items that they take: the last step of an epoch has what is left."""
    each = -(-items // batch_size)
    steps = epochs * each if steps is None else steps
    whole, more = divmod(steps, max(1, each))
    return steps, whole * items + more * min(batch_size, items)


def _too_long(rows: pd.DataFrame, lengths: pd.Series, split: str, limits: Limits, kind: str) -> Finding:
    long = rows[lengths > limits.max_length]
    becomes = {"error": "training stops", "drop": "they are dropped", "truncate": "they are cut"}[limits.on_too_long]
    fits = f"; max_length={int(lengths.max())} fits all, {int(np.ceil(lengths.quantile(0.99)))} 99 %" * bool(len(long))
    verdict = "bad" if limits.on_too_long == "error" else "look"
    name = f"{kind} above max_length={limits.max_length}"
    return finding(name, split, list(long.source), len(rows), verdict, f"{becomes} (on_too_long){fits}")


def _odd(rows: pd.DataFrame, split: str) -> list[Finding]:
    clean = "remove them from the text; the policy would learn to write them"
    typed = "they stay text, and no special token; give chats as messages, or remove what was rendered"
    return [
        *(_flagged(name, split, rows, name, clean) for name in ODD),
        _flagged("special tokens typed in the text", split, rows, "typed", typed),
        _flagged("markers of other chat formats", split, rows, "markers", typed),
    ]


def _flagged(name: str, split: str, rows: pd.DataFrame, column: str, advice: str) -> Finding:
    return finding(name, split, list(rows.source[rows[column].astype(bool)]), len(rows), "look", advice)


def _repeated(pairs: Sequence[Preference], split: str, kind: str) -> list[Finding]:
    """Pairs that are there before, and those that an earlier one contradicts."""
    seen: set[str] = set()
    again, turned = [], []
    for pair in pairs:
        same, other = _identity(pair), _identity(pair, turned=True)
        again += [pair.source] * (same in seen)
        turned += [pair.source] * (other in seen and same != other)
        seen.add(same)
    against = "the same responses with the other label; keep one of the two"
    twice = finding(f"{kind} that are there twice", split, again, len(pairs), "look", "remove them: they count twice")
    if kind == "demonstrations":
        return [twice]
    return [twice, finding(f"{kind} that contradict another", split, turned, len(pairs), "bad", against)]


def _identity(pair: Preference, turned: bool = False) -> str:
    if pair.label is not None:
        return json.dumps([pair.prompt, pair.chosen, pair.label ^ turned], sort_keys=True)
    sides = [[pair.chosen, pair.chosen_ended], [pair.rejected, pair.rejected_ended]]
    return json.dumps([pair.prompt, *(reversed(sides) if turned else sides)], sort_keys=True)


def _labels(pairs: Sequence[Preference], split: str) -> list[Finding]:
    """Whether the chosen response has the higher score, where there are scores: a judge's, or columns of the data."""
    gaps = [pair.score_gap if pair.measures.gap is None else pair.measures.gap for pair in pairs]
    known = [(pair, gap) for pair, gap in zip(pairs, gaps, strict=True) if gap is not None]
    if not known:
        return []
    text = "mend or drop them, or take a loss for noisy labels: loss=robust, cdpo"
    against = [pair.source for pair, gap in known if gap < 0]
    ties = [pair.source for pair, gap in known if gap == 0]
    return [
        finding("labels against their scores", split, against, len(known), "look", text),
        finding(
            "scores that are tied", split, ties, len(known), "look", "nothing but the label tells them apart; drop"
        ),
    ]


def _prompts(
    prompts: dict[str, list[Text]], kind: str, cache: str, rows_of: dict[str, set[str | None]]
) -> list[Finding]:
    """Prompts that are there again, in their split and across; word for word, and nearly, but for turns of one
    conversation. rows_of: text of a training prompt -> where it came from, as far as that is known.
    """
    texts = {split: list(dict.fromkeys(map(as_text, some))) for split, some in prompts.items()}
    if texts.get("test") == texts.get("validation"):
        texts.pop("test", None)
    train, found = set(texts["train"]), []
    own = {split: [one for one in some if split == "train" or one not in train] for split, some in texts.items()}
    places = near_duplicates(own, cache)
    for split, some in texts.items():
        all_of = len(prompts[split])
        more = all_of - len(some)
        text = f"all their {kind} are used, so they weigh more; often meant"
        found.append(Finding("prompts that are there before", split, more, all_of, "ok", text))
        if split != "train":
            shared = [one for one in map(as_text, prompts[split]) if one in train]
            leak = "held-out numbers are of what was trained on; split by prompt"
            found.append(finding("prompts of the training split", split, _brief(shared), all_of, "bad", leak))
        near = [(one, own["train"][at]) for one, at in zip(own[split], places[split], strict=True) if at >= 0]
        alike = [one for one, other in near if rows_of.get(one, set()).isdisjoint(rows_of.get(other, ()))]
        what = "near-duplicate prompts" if split == "train" else "prompts near one of the training split"
        text = "keep one of each" if split == "train" else "held-out numbers are too good; move them to training"
        found.append(finding(what, split, _brief(alike), len(some), "look", text))
    return found


def _brief(texts: Sequence[str]) -> list[str]:
    return [text[:80] for text in texts]


def quantiles(lengths: "pd.Series[int]") -> dict[str, float]:
    """By name: "5%" -> tokens."""
    values = np.quantile(lengths, QUANTILES) if len(lengths) else [0.0] * len(QUANTILES)
    return {f"{share:.0%}": float(value) for share, value in zip(QUANTILES, values, strict=True)}


def auc(ones: ArrayLike, others: ArrayLike) -> float:
    """How often a number of the first is above one of the second, ties as halves (Mann-Whitney); 0.5 of none."""
    ours, theirs = np.asarray(ones), np.sort(np.asarray(others))
    if not len(ours) or not len(theirs):
        return 0.5
    below, up_to = np.searchsorted(theirs, ours, "left"), np.searchsorted(theirs, ours, "right")
    return float((below + up_to).mean() / 2 / len(theirs))
