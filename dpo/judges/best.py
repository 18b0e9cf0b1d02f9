"""Best of n: of several responses to a prompt, the one that a judge likes best."""

import math
from collections.abc import Sequence
from itertools import combinations

from dpo.data.records import Text
from dpo.judges.comparing import Judge, Rule, compare, is_pairwise


def check_scores(judge: Judge | None) -> None:
    """Raises: ValueError if it is no judge that scores responses."""
    if judge is None or is_pairwise(judge):
        raise ValueError(
            "best of n is what the judge of pairs likes best, so judge must be one that scores each response, "
            f"found {'none' if judge is None else 'one that compares two'}; take another, such as judge=gold or "
            "judge=shorter (evaluation.judge can be any)"
        )


def best_of(judge: Judge, prompts: Sequence[Text], responses: Sequence[str], rule: Rule | None = None) -> list[int]:
    """For each of N prompts the place of the best of its responses: of those that the judge can judge the one that wins
    most often against the others, ties one half, and the first of equals. By score it is that of the highest score.

    responses: n to each prompt, in n runs through the prompts.  # (n * N,)
    """
    several = len(responses) // len(prompts)
    places = [range(row, len(responses), len(prompts)) for row in range(len(prompts))]
    pairs = [pair for same in places for pair in combinations(same, 2)]
    judgements, outcomes = compare(judge, [*prompts] * several, responses, pairs, rule)
    wins = [0.0] * len(responses)
    for (first, second), outcome in zip(pairs, outcomes, strict=True):
        if outcome:
            wins[first] += outcome["win"]
            wins[second] += 1 - outcome["win"]
    return [max(same, key=lambda place: (bool(judgements[place]), wins[place])) for same in places]


def kl_bound(n: int) -> float:
    """log n - (n - 1) / n: what KL(best of n || the policy that is sampled) is at most, in nats per response, and where
    no two samples score alike (Stiennon et al., 2009.01325; that it is a bound: Beirami et al., 2401.01879). It holds
    of any choice among n samples: they hold a response of a set A in at most 1 - (1 - P(A))^n of all cases.
    """
    return math.log(n) - (n - 1) / n
