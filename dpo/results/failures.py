"""Known failures of bad settings, told from what was measured of a policy: the thresholds, all of them, are here."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

BASELINE, INITIAL = "evaluation.baseline", "initial"  # whom win rates are over, and the policy before training

# A policy counts as degenerate, so that its win rate means little, with
MOST_BROKEN = 0.5  # a greater share of broken responses: see dpo.responses.is_broken
LEAST_VALID = 0.5  # a smaller share of clauses that follow the world's grammar
LEAST_WINS = 0.1  # a smaller win rate over the policy that training began with

# It looks broken, and a report says so, with that, or with
MOST_UNFINISHED = 0.2  # a greater share of responses that do not end,
LONGER = 1.1  # where they have more words than so many times the baseline's
MOST_REPEATED = 0.3  # more repetition: people have less than 0.01, a model that loops 0.4 (1908.04319)
MORE_INVALID = 0.05  # so much greater a share of responses with invalid characters than the baseline's


def degenerate(frame: pd.DataFrame) -> pd.Series:
    """Whether each run of `final` is degenerate: a state of its own, since a win rate of such a policy means little.

    It is where most responses are broken or most of the text is no language, or where it loses nine times in ten
    against what it was before training, as one does that ends at once; against people or a strong policy a sound one
    may. What was not measured says nothing.
    """
    return pd.Series([any(_degenerate(run).values()) for run in frame.to_dict("records")], frame.index, dtype=bool)


def failures(run: Mapping[Any, Any]) -> list[str]:
    """What looks broken in one run of `final`, in a reader's words; what was not measured says nothing.

    Long endings and foreign characters are told against the baseline's: where its responses are cut as often, or are in
    another language, nothing failed.
    """
    unfinished, others_words = 1 - _measured(run, "ended"), _measured(run, "baseline/words")
    length = _measured(run, "words") / others_words if others_words else math.nan
    invalid, repetition = _measured(run, "invalid"), _measured(run, "repetition")
    found = {
        f"{_percent(unfinished)} unfinished, length {length:.1f} times the baseline's": (
            unfinished > MOST_UNFINISHED and length > LONGER
        ),
        **_degenerate(run),
        f"{_percent(invalid)} with invalid characters": invalid - _measured(run, "baseline/invalid") > MORE_INVALID,
        f"repetition {repetition:.2f}": repetition > MOST_REPEATED,
    }
    return [words for words, failed in found.items() if failed]


def _degenerate(run: Mapping[Any, Any]) -> dict[str, bool]:
    """What a degenerate policy may show, in a reader's words, and whether that of a run does."""
    broken, valid, win_rate = (_measured(run, name) for name in ("broken", "valid", "win_rate"))
    over = run.get(BASELINE)
    against_itself = over is None or over != over or over == INITIAL
    return {
        f"{_percent(broken)} broken": broken > MOST_BROKEN,
        f"{_percent(valid)} of clauses valid": valid < LEAST_VALID,
        f"win rate {win_rate:.2f}": win_rate < LEAST_WINS and against_itself,
    }


def _measured(run: Mapping[Any, Any], name: str) -> float:
    value = run.get(name)
    return float(value) if isinstance(value, int | float) else math.nan


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
