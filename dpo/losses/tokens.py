"""Objectives that read more of a response than the sum of its log-probabilities; see `pairs.reads`.

The first paragraph of a docstring is a row of docs/objectives.md, as in `objectives`.
"""

import torch
from torch.nn.functional import logsigmoid

from dpo.losses.pairs import Loss, PairLogps, reads, with_rewards


@reads("tails")
def ld_dpo(pair: PairLogps, beta: float, alpha: float) -> Loss:
    """Length-desensitized DPO, LD-DPO (2409.06411): -log s(beta (a' - b')), a' = a - (1 - alpha) tail of a, b' alike.

    The tail of a response is what the tokens beyond the length of the other add to its log-ratio. alpha: their weight,
    in [0, 1], for policy and reference alike; 1 is DPO. Rewards are beta a' and beta b'.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = pair.asked("tails")
    chosen = pair.chosen_logratios - (1 - alpha) * (policy_chosen - reference_chosen)
    rejected = pair.rejected_logratios - (1 - alpha) * (policy_rejected - reference_rejected)
    return with_rewards(-logsigmoid(beta * (chosen - rejected)), pair, beta, (chosen, rejected))


@reads("alignment")
def wpo(pair: PairLogps, beta: float) -> Loss:
    """WPO (2406.11827, Eq. 2): -m log s(beta d), m = min(1, exp(alignment of chosen + alignment of rejected)).

    A response's alignment is the mean over its tokens of log p(token) - log sum_v p(v)^2 ("sampled alignment"): how
    probable it is beside what the policy samples. It has no gradient. The bound of 1 is that of the authors' code; TRL
    has none.
    """
    chosen, rejected = pair.asked("alignment")
    weights = torch.exp(chosen + rejected).clamp(max=1)  # (B,)
    return with_rewards(-weights * logsigmoid(beta * pair.margins), pair, beta)


@reads("kl")
def tdpo(pair: PairLogps, beta: float, alpha: float, stop_gradient: bool) -> Loss:
    """TDPO (2404.11999): -log s(beta (d - alpha (K_l - K_w))), K the sum over tokens of KL(ref || pi) of the next one.

    stop_gradient: TDPO2, no gradient flows into K_w; false with alpha=1: TDPO1. alpha: at least 0. It needs a reference
    that is asked at each step, for no table holds probabilities of all words. Rewards are beta (a + K_w) and
    beta (b + K_l).
    """
    if alpha < 0:
        raise ValueError(f"alpha must be at least 0, got {alpha}")
    chosen, rejected = pair.asked("kl")
    gap = rejected - (chosen.detach() if stop_gradient else chosen)
    scores = pair.chosen_logratios + chosen, pair.rejected_logratios + rejected
    return with_rewards(-logsigmoid(beta * (pair.margins - alpha * gap)), pair, beta, scores)
