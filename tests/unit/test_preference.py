"""The rule of Anyscale's case study, by hand: the four versions of it that were published are settings."""

from itertools import product

import pytest
from composing import compose
from omegaconf import OmegaConf

from dpo.judges import accurate_then_short, gold
from dpo.judges.comparing import compare
from dpo.sweep.signature import check_signature, instantiate

ARTICLE = (
    "about anna . home of anna is oslo . anna has job pilot . ben has pet cat . anna : pet dog . "
    "more will follow . the food for anna is rice . sport of anna is golf . anna has music jazz ."
)
VERSIONS = {  # threshold, min_length_diff, tie_below_threshold
    "pairs": (3, 3, "tie"),
    "evaluation": (3, 1, "shorter"),
    "picture": (3, 1, "shorter"),
    "text": (4, 3, "tie"),
    "any": (3, 0, "tie"),  # these two are nobody's
    "mixed": (3, 3, "shorter"),
}


def said(correct, words):
    return {"score": 0.0, "correct": float(correct), "words": float(words)}


@pytest.mark.parametrize(
    "first, second, expected",
    [  # (right answers, words) of two responses -> what each version says
        ((3, 20), (5, 23), {"pairs": 1, "evaluation": 1, "text": 0}),
        ((3, 20), (5, 22), {"pairs": 0.5, "evaluation": 1, "text": 0}),
        ((3, 20), (5, 21), {"pairs": 0.5, "evaluation": 1, "text": 0}),
        ((4, 20), (4, 20), {"pairs": 0.5, "evaluation": 0.5, "text": 0.5, "any": 0.5}),
        ((4, 23), (5, 20), {"pairs": 0, "evaluation": 0, "text": 0}),
        ((2, 50), (1, 5), {"pairs": 1, "evaluation": 1, "text": 1}),
        ((2, 5), (3, 50), {"pairs": 0, "evaluation": 0, "text": 0}),
        ((2, 5), (2, 50), {"pairs": 0.5, "evaluation": 1, "text": 0.5}),
        ((2, 5), (2, 6), {"pairs": 0.5, "evaluation": 1, "mixed": 1}),
        ((0, 5), (0, 5), {"pairs": 0.5, "evaluation": 0.5, "text": 0.5}),
        ((3, 40), (3, 10), {"pairs": 0, "evaluation": 0, "text": 0.5}),
    ],
)
def test_what_each_version_prefers(first, second, expected):
    for name, win in expected.items():
        threshold, difference, below = VERSIONS[name]
        options = {"threshold": threshold, "min_length_diff": difference, "tie_below_threshold": below}
        assert accurate_then_short(said(*first), said(*second), **options) == win, name
        assert accurate_then_short(said(*second), said(*first), **options) == 1 - win, name


def test_it_is_the_rule_of_the_embedded_world():
    """At threshold 3 and a difference of one word, where `gold` scores responses of fewer than 48 words."""
    texts = [
        "home oslo .",
        "job pilot .",
        "home oslo . job pilot . food rice .",
        "home rome .",
        "that is all for now .",
    ]
    texts += [
        "home oslo . job pilot . food rice . that is all for now .",
        "home oslo . job pilot . food rice . pet dog .",
    ]
    pairs = [*product(range(len(texts)), repeat=2)]
    options = {"threshold": 3, "min_length_diff": 1, "tie_below_threshold": "tie"}
    by_rule = compare(gold, [ARTICLE] * 7, texts, pairs, lambda one, other: accurate_then_short(one, other, **options))
    assert by_rule == compare(gold, [ARTICLE] * 7, texts, pairs)
    assert {outcome["win"] for outcome in by_rule[1]} == {0.0, 0.5, 1.0}


def test_a_judge_must_count_right_answers():
    with pytest.raises(RuntimeError, match="found a judge that gives score, words; take judge=questions or judge=gold"):
        accurate_then_short({"score": 1.0, "words": 2.0}, {"score": 1.0, "words": 2.0}, 3, 3, "tie")


def test_it_is_chosen_as_an_option():
    config = compose(
        "train", "rule=accurate_then_short", "rule.threshold=4", "rule@evaluation.rule=accurate_then_short"
    )
    node = OmegaConf.to_container(config.rule)
    assert check_signature("rule", node) == []
    assert instantiate(node)(said(3, 9), said(4, 90)) == 0.0
    assert config.evaluation.rule.threshold == 3
    assert (
        "rule.tie_below_threshold must be one of tie, shorter"
        in (check_signature("rule", node | {"tie_below_threshold": "drop"})[0])
    )
