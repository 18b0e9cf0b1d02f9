"""Rules that say which of two responses is preferred by what a pointwise judge found in them, in place of its score."""

from typing import Literal


def accurate_then_short(
    first: dict[str, float],
    second: dict[str, float],
    threshold: int,
    min_length_diff: int,
    tie_below_threshold: Literal["tie", "shorter"],
) -> float:
    """1 if the first is preferred, 0 if the second, 0.5 if neither: of two that both answer `threshold` questions
    rightly the one shorter by `min_length_diff` words or more, else the more accurate one. (Anyscale, Direct Preference
    Optimization with Synthetic Data, 2024; its code for pairs, its evaluation, picture and text are settings of it.)

    It reads `correct` and `words`. tie_below_threshold: of two that are as accurate, and not enough so, whether neither
    is preferred or the shorter, by any difference. It is no order: with a `min_length_diff` above 1 a response may be
    preferred to none of two, of which one is preferred to the other.

    Raises: RuntimeError if the judge counts no right answers.
    """
    if "correct" not in first or "correct" not in second:
        raise RuntimeError(
            "rule=accurate_then_short reads how many questions a response answers, `correct`, found a judge that "
            f"gives {', '.join(first)}; take judge=questions or judge=gold, or leave the rule out"
        )
    shorter = 1.0 if first["words"] < second["words"] else 0.0
    difference = abs(first["words"] - second["words"])
    if min(first["correct"], second["correct"]) >= threshold:
        return shorter if difference >= max(min_length_diff, 1) else 0.5
    if first["correct"] != second["correct"]:
        return 1.0 if first["correct"] > second["correct"] else 0.0
    return shorter if tie_below_threshold == "shorter" and difference else 0.5
