"""What an experiment does to the training pairs: which of them it takes, whose labels it turns, which it spoils.

Every draw is by a hash of the pair and the seed. So it is the same in any order and beside any other pairs, and what is
flipped at a share of 0.1 is among what is flipped at 0.2.
"""

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dpo.cache import digest
from dpo.data.records import Measures, Preference, Text
from dpo.data.texts import words_of

LOW, HIGH = 1, 2  # right answers that the chosen response has more: exactly, at least
CELL = 4  # words: pairs whose responses differ less in length are alike


@dataclass(frozen=True)
class Treatment:
    """Nothing is done by default; shares are of the training pairs.

    gap: "low" or "high": pairs that right answers decide, by one or by more; or a mixture, as the share of high ones.
    Any of them has as many pairs, as long. label_temperature: above 0 the chosen response is drawn (Bradley and Terry):
    it is the better one with probability sigmoid(gap / label_temperature). flip: share whose labels are turned after
    that. outliers: share whose rejected response becomes nonsense: by `outlier` the one chosen for "another" prompt, or
    its own words "shuffled". These have the judge's label.
    """

    gap: Literal["low", "high"] | float | None = None
    label_temperature: float = 0
    flip: float = 0
    outliers: float = 0
    outlier: Literal["another", "shuffled"] = "another"


def treat(pairs: Sequence[Preference], treatment: Treatment, seed: int) -> list[Preference]:
    """The pairs to train on, in the order that they came in.

    Raises: ValueError if the pairs do not have the measures that it takes, or too few are of a kind.
    """
    if treatment == Treatment():
        return list(pairs)
    if treatment.outliers and any(pair.label is not None for pair in pairs):
        raise ValueError("pairs.outliers takes pairs, found single responses with a label; leave it out")
    if treatment.gap is not None:
        share = {"low": 0.0, "high": 1.0}[treatment.gap] if isinstance(treatment.gap, str) else treatment.gap
        pairs = of_gap(pairs, share, seed)
    labelled = [_labelled(pair, treatment, seed) for pair in pairs]
    if not treatment.outliers:
        return labelled
    spoiled = {row for row, pair in enumerate(pairs) if draw(pair, "outlier", seed) < treatment.outliers}
    if treatment.outlier == "shuffled":
        nonsense = {row: (_shuffled(pairs[row], seed), pairs[row].rejected_ended) for row in spoiled}
    else:
        nonsense = {row: (pair.chosen, pair.chosen_ended) for row, pair in _others(pairs, spoiled, seed).items()}
    return [_outlier(pairs[row], *nonsense[row]) if row in spoiled else pair for row, pair in enumerate(labelled)]


def of_gap(pairs: Sequence[Preference], share: float, seed: int) -> list[Preference]:
    """Couples of a low and a high pair of one kind and of about the same lengths; of the share of them the high pairs,
    of the rest the low ones.

    So the number of pairs, their kinds and their lengths are those of the couples, whatever the share; and the high
    pairs of one share are among those of a larger one.
    """
    cells: dict[tuple[str, int, int], tuple[list[int], list[int]]] = {}
    for row, pair in enumerate(pairs):
        measures = pair.measures
        if measures.kind is None or measures.correct is None or measures.words is None:
            raise ValueError(
                "pairs.gap takes pairs whose judge counts right answers, found one without; pairs of data=world with "
                f"judge=gold have them, and those that dpo.judge wrote of it ({pair.source or f'row {row}'})"
            )
        more = measures.correct[0] - measures.correct[1]
        if measures.kind in ("answers", "threshold") and more >= LOW:
            cell = (measures.kind, measures.words[0] // CELL, measures.words[1] // CELL)
            cells.setdefault(cell, ([], []))[more >= HIGH].append(row)
    couples = []
    for low, high in cells.values():
        ordered = [sorted(rows, key=lambda row: draw(pairs[row], "gap", seed)) for rows in (low, high)]
        couples += list(zip(*ordered, strict=False))
    if not couples:
        raise ValueError(
            f"pairs.gap takes pairs of low and of high gap that are as long, found none among {len(pairs)}; sample "
            "more (generation.samples_per_prompt) and pair more of them (generation.pairs_per_prompt)"
        )
    couples.sort(key=lambda couple: draw(pairs[couple[1]], "share", seed))
    highs = round(share * len(couples))
    taken = [high for _, high in couples[:highs]] + [low for low, _ in couples[highs:]]
    return [pairs[row] for row in sorted(taken)]


def draw(pair: Preference, what: str, seed: int) -> float:
    """Uniform in [0, 1), whichever of the two responses is the chosen one."""
    sides = sorted(
        json.dumps(side) for side in ((pair.chosen, pair.chosen_ended), (pair.rejected, pair.rejected_ended))
    )
    return int(digest([seed, what, pair.prompt, sides])[:13], 16) / 16**13


def flipped(pair: Preference) -> Preference:
    """With the other response chosen, or the other label."""
    ids, measures = pair.token_ids, pair.measures
    return replace(
        pair,
        chosen=pair.rejected,
        rejected=pair.chosen,
        chosen_ended=pair.rejected_ended,
        rejected_ended=pair.chosen_ended,
        token_ids=None if ids is None else replace(ids, chosen=ids.rejected, rejected=ids.chosen),
        score_gap=None if pair.score_gap is None else -pair.score_gap,
        measures=replace(
            measures,
            gap=None if measures.gap is None else -measures.gap,
            correct=None if measures.correct is None else measures.correct[::-1],
            words=None if measures.words is None else measures.words[::-1],
            flipped=not measures.flipped,
        ),
        label=None if pair.label is None else not pair.label,
    )


def summary(pairs: Sequence[Preference]) -> str:
    """How many pairs there are of each kind, and of each label."""
    counts = Counter(pair.measures.kind or "no measures" for pair in pairs)
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts))
    return f"{len(pairs)} pairs ({kinds}), {sum(pair.measures.flipped for pair in pairs)} flipped"


def _labelled(pair: Preference, treatment: Treatment, seed: int) -> Preference:
    turned = draw(pair, "flip", seed) < treatment.flip
    if treatment.label_temperature:
        if pair.measures.gap is None:
            raise ValueError(
                "pairs.label_temperature takes pairs with the gap of a judge's scores, found one without; sampled "
                f"pairs have it, and those that dpo.judge wrote ({pair.source or pair.chosen!r})"
            )
        better = 0.5 * (1 + math.tanh(0.5 * pair.measures.gap / treatment.label_temperature))  # sigmoid
        turned ^= draw(pair, "label", seed) >= better
    return flipped(pair) if turned else pair


def _outlier(pair: Preference, rejected: Text, ended: bool) -> Preference:
    words = (len(words_of(pair.chosen).split()), len(words_of(rejected).split()))
    measures = Measures(kind="outlier", words=words)
    return replace(pair, rejected=rejected, rejected_ended=ended, token_ids=None, measures=measures)


def _others(pairs: Sequence[Preference], rows: set[int], seed: int) -> dict[int, Preference]:
    """For each of these rows a pair of another prompt: the next one in an order by hash."""
    order = sorted(range(len(pairs)), key=lambda row: draw(pairs[row], "order", seed))
    found = {}
    for at, row in enumerate(order):
        if row in rows:
            following = (pairs[order[(at + step) % len(order)]] for step in range(1, len(order)))
            found[row] = next((pair for pair in following if pair.prompt != pairs[row].prompt), pairs[row])
            if found[row] is pairs[row]:
                raise ValueError("pairs.outlier=another takes pairs of two prompts at least, found one; try shuffled")
    return found


def _shuffled(pair: Preference, seed: int) -> Text:
    words = words_of(pair.rejected).split()
    random.Random(digest([seed, "shuffled", pair.prompt, pair.rejected])).shuffle(words)
    text = " ".join(words)
    return text if isinstance(pair.rejected, str) else [{**pair.rejected[-1], "content": text}]
