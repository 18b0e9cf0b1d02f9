"""Objectives that compare the two responses of a pair by their log-probabilities.

The first paragraph of a docstring is a row of docs/objectives.md: name (source): equation, in the notation of `pairs`.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo.losses.pairs import Loss, PairLogps, at_least_0, tie_tolerance, with_rewards

EXPONENT = 80.0  # a ratio of probabilities counts as e^80 at most, as in TRL: beyond, float32 soon has no number


# Of the margin


def dpo(pair: PairLogps, beta: float, label_smoothing: float) -> Loss:
    """DPO (2305.18290, Eq. 7): -(1 - e) log s(beta d) - e log s(-beta d).

    label_smoothing: e, the assumed probability that a label is flipped, in [0, 0.5); above 0: conservative DPO (cDPO, a
    note by E. Mitchell, 2023), whose margin has its optimum where s(beta d) = 1 - e.
    """
    _share_of_flips(label_smoothing)
    logits = beta * pair.margins  # (B,)
    losses = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    return with_rewards(losses, pair, beta)


def robust(pair: PairLogps, beta: float, label_smoothing: float) -> Loss:
    """Robust DPO, rDPO (2403.00409): (-(1 - e) log s(beta d) + e log s(-beta d)) / (1 - 2 e).

    Of labels that are flipped with probability e = label_smoothing, in [0, 0.5), its mean is that of DPO on clean ones.
    It can be negative, and has no lower bound for e > 0.
    """
    _share_of_flips(label_smoothing)
    logits = beta * pair.margins  # (B,)
    losses = -(1 - label_smoothing) * logsigmoid(logits) + label_smoothing * logsigmoid(-logits)
    return with_rewards(losses / (1 - 2 * label_smoothing), pair, beta)


def ipo(pair: PairLogps, beta: float, average: str) -> Loss:
    """IPO (2310.12036, Eq. 17): (d - 1 / (2 beta))^2.

    average: "sequence" takes sums over tokens, "token" means over tokens; beta is not portable between the two.
    """
    if average == "sequence":
        margins = pair.margins
    elif average == "token":
        chosen, rejected = pair.means(pair.chosen_logratios, pair.rejected_logratios)
        margins = chosen - rejected
    else:
        raise ValueError(f"average must be sequence or token, got {average}")
    return with_rewards((margins - 1 / (2 * beta)) ** 2, pair, beta)


def hinge(pair: PairLogps, beta: float) -> Loss:
    """Hinge on the scaled margin (RSO's hinge-norm, 2309.06657): max(0, 1 - beta d).

    RSO also samples its pairs, by rejection, which this does not.
    """
    return with_rewards(torch.relu(1 - beta * pair.margins), pair, beta)


def exo(pair: PairLogps, beta: float, label_smoothing: float) -> Loss:
    """EXO on preferences (2402.00856, Eq. 16): q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e), q = s(beta d).

    The reverse KL to labels that are flipped with probability e = label_smoothing, in (0, 0.5).
    """
    _share_of_flips(label_smoothing)
    if label_smoothing == 0:
        raise ValueError("label_smoothing must be above 0, where its logarithm is finite, got 0")
    logits = beta * pair.margins  # (B,)
    right = torch.sigmoid(logits) * (logsigmoid(logits) - math.log1p(-label_smoothing))
    wrong = torch.sigmoid(-logits) * (logsigmoid(-logits) - math.log(label_smoothing))
    return with_rewards(right + wrong, pair, beta)


def length_normalized(pair: PairLogps, beta: float) -> Loss:
    """Length-normalized DPO (Tulu 3, 2411.15124): -log s(beta (mean a - mean b)).

    beta is of means over tokens, so that 0.1 would make the loss flat.
    """
    chosen, rejected = pair.means(pair.chosen_logratios, pair.rejected_logratios)
    slope = 1 / torch.minimum(pair.chosen_lengths, pair.rejected_lengths).clamp(min=1)
    return with_rewards(-logsigmoid(beta * (chosen - rejected)), pair, beta, (chosen, rejected), slope)


def r_dpo(pair: PairLogps, beta: float, alpha: float) -> Loss:
    """Length-regularized DPO, R-DPO (2403.19159): -log s(beta d + alpha (|chosen| - |rejected|)).

    alpha: reward of a token, whatever it is, at least 0: a chosen response that is longer needs less of a log-ratio.
    Rewards are beta times the log-ratio and alpha times the length.
    """
    if alpha < 0:
        raise ValueError(f"alpha must be at least 0, got {alpha}")
    chosen, rejected = (alpha * lengths.to(pair.margins) for lengths in (pair.chosen_lengths, pair.rejected_lengths))
    loss = with_rewards(-logsigmoid(beta * pair.margins + (chosen - rejected)), pair, beta)
    return replace(loss, chosen_rewards=loss.chosen_rewards + chosen, rejected_rewards=loss.rejected_rewards + rejected)


# Of the log-ratio of each response


def dpop(pair: PairLogps, beta: float, penalty: float) -> Loss:
    """DPO-Positive, DPOP (2402.13228): -log s(beta (d - penalty max(0, -a))).

    penalty: the paper's lambda, at least 0; of a chosen response that is less probable than under the reference. One
    that is as probable, as before the first step, has none, nor a gradient of it.
    """
    if penalty < 0:
        raise ValueError(f"penalty must be at least 0, got {penalty}")
    lost = at_least_0(-pair.chosen_logratios, tie_tolerance(pair.policy_chosen_logps), slope=0)  # (B,) nats
    return with_rewards(-logsigmoid(beta * (pair.margins - penalty * lost)), pair, beta)


def f_dpo(pair: PairLogps, beta: float, divergence: str, alpha: float) -> Loss:
    """f-DPO (2309.16240): -log s(beta (f'(e^a) - f'(e^b))), f'(u) = 1 - 1 / u for forward_kl, log(2 u / (1 + u)) for
    js, (1 - u^-alpha) / alpha for alpha, log u for reverse_kl.

    divergence: one of these; reverse_kl is DPO. alpha: of divergence=alpha, in (0, 1), the paper's; TRL's is 1 - alpha.
    Rewards are beta f'. A response that is e^80 times (of alpha: e^(80 / alpha) times) less probable than under the
    reference has no gradient from forward_kl or alpha.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), got {alpha}; its limits are reverse_kl and forward_kl")
    chosen, rejected = (
        _derivative(logratios, divergence, alpha) for logratios in (pair.chosen_logratios, pair.rejected_logratios)
    )
    slope = 0.5 if divergence == "js" else 1.0
    return with_rewards(-logsigmoid(beta * (chosen - rejected)), pair, beta, (chosen, rejected), slope)


def chi_po(pair: PairLogps, beta: float, clip: float | None) -> Loss:
    """chi-squared PO (2407.13399, Algorithm 1): -log s(clip(beta (phi(e^a) - phi(e^b)), -clip, clip)), phi(u) = u + log
    u.

    DPO with the chi-squared divergence beside the KL. clip: the algorithm's 2 R_max, above 0, beyond which a pair has
    no gradient; None: nothing is clipped. Rewards are beta phi.
    """
    if clip is not None and clip <= 0:
        raise ValueError(f"clip must be above 0, or null for none, got {clip}")
    chosen, rejected = (
        logratios.clamp(max=EXPONENT).exp() + logratios
        for logratios in (pair.chosen_logratios, pair.rejected_logratios)
    )
    logits = beta * (chosen - rejected)  # (B,)
    logits = logits if clip is None else logits.clamp(-clip, clip)
    return with_rewards(-logsigmoid(logits), pair, beta, (chosen, rejected), slope=2.0)


def apo_zero(pair: PairLogps, beta: float) -> Loss:
    """APO-zero (2408.06266, Eq. 7): 1 - s(beta a) + s(beta b).

    Chosen responses up, rejected ones down: for chosen ones that are better than the policy's own.
    """
    chosen, rejected = beta * pair.chosen_logratios, beta * pair.rejected_logratios
    return with_rewards(torch.sigmoid(-chosen) + torch.sigmoid(rejected), pair, beta)


def apo_down(pair: PairLogps, beta: float) -> Loss:
    """APO-down (2408.06266, Eq. 8): s(beta a) + 1 - s(beta d).

    Both down, rejected ones further: for chosen responses that are worse than the policy's own.
    """
    losses = torch.sigmoid(beta * pair.chosen_logratios) + torch.sigmoid(-beta * pair.margins)
    return with_rewards(losses, pair, beta)


def sppo(pair: PairLogps, beta: float) -> Loss:
    """SPPO, hard (2405.00675, Eq. 4.7): (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2.

    Of the probability that a response wins, 1 for the chosen and 0 for the rejected one (TRL's sppo_hard). The paper
    takes half of it, and the probabilities that a preference model gives fresh samples, in iterations.
    """
    target = 1 / (2 * beta)
    return with_rewards((pair.chosen_logratios - target) ** 2 + (pair.rejected_logratios + target) ** 2, pair, beta)


def nca(pair: PairLogps, beta: float) -> Loss:
    """NCA on pairs (2402.05369): -log s(beta a) - log s(-beta a) / 2 - log s(-beta b) / 2."""
    chosen, rejected = beta * pair.chosen_logratios, beta * pair.rejected_logratios
    losses = -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
    return with_rewards(losses, pair, beta)


def cal_dpo(pair: PairLogps, beta: float, weight: float) -> Loss:
    """Cal-DPO (2412.14516; its authors' code): -log s(d) + weight ((a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2).

    weight: of the calibration, at least 0, which holds the rewards beta a and beta b to 1/2 and -1/2.
    """
    if weight < 0:
        raise ValueError(f"weight must be at least 0, got {weight}")
    calibration = sppo(pair, beta).losses
    return with_rewards(-logsigmoid(pair.margins) + weight * calibration, pair, beta)


# With the likelihood of the chosen response, or without a reference


def rpo(pair: PairLogps, beta: float, alpha: float) -> Loss:
    """DPO + NLL, iterative RPO (2404.19733): -log s(beta d) - alpha mean w.

    alpha: weight of the likelihood of the chosen response, at least 0. The mean is over the tokens of each response;
    TRL's over those of a micro-batch.
    """
    if alpha < 0:
        raise ValueError(f"alpha must be at least 0, got {alpha}")
    chosen, _ = pair.means(pair.policy_chosen_logps, pair.policy_rejected_logps)
    return with_rewards(-logsigmoid(beta * pair.margins) - alpha * chosen, pair, beta)


def simpo(pair: PairLogps, beta: float, gamma_beta_ratio: float) -> Loss:
    """SimPO (2405.14734): -log s(beta (mean w - mean l - gamma / beta)).

    gamma_beta_ratio: the target margin gamma in units of beta, at least 0.
    """
    if gamma_beta_ratio < 0:
        raise ValueError(f"gamma_beta_ratio must be at least 0, got {gamma_beta_ratio}")
    chosen, rejected = pair.means(pair.policy_chosen_logps, pair.policy_rejected_logps)
    losses = -logsigmoid(beta * (chosen - rejected - gamma_beta_ratio))
    return Loss(losses, (beta * chosen).detach(), (beta * rejected).detach())


def orpo(pair: PairLogps, beta: float) -> Loss:
    """ORPO (2403.07691, Eq. 6-7): -mean w - beta log s(odds(mean w) - odds(mean l)), odds(x) = x - log(1 - e^x).

    Likelihood of the chosen response plus an odds ratio; beta is the paper's lambda, a weight and no KL constraint.
    """
    chosen, rejected = pair.means(pair.policy_chosen_logps, pair.policy_rejected_logps)
    losses = -chosen - beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    return Loss(losses, (beta * chosen).detach(), (beta * rejected).detach())


def cpo(pair: PairLogps, beta: float, alpha: float) -> Loss:
    """CPO (2401.08417, Eq. 3): -log s(beta (w - l)) - alpha w.

    alpha: weight of the likelihood of the chosen response, at least 0; TRL takes its mean over a micro-batch's tokens.
    """
    if alpha < 0:
        raise ValueError(f"alpha must be at least 0, got {alpha}")
    chosen, rejected = pair.policy_chosen_logps, pair.policy_rejected_logps
    losses = -logsigmoid(beta * (chosen - rejected)) - alpha * chosen
    return Loss(losses, (beta * chosen).detach(), (beta * rejected).detach())


def slic(pair: PairLogps, beta: float, delta: float) -> Loss:
    """SLiC-HF (2305.10425): max(0, delta - w + l) - beta w.

    beta is the paper's lambda, the weight of the likelihood of a target: here the chosen response, as in HALOs, in the
    paper an SFT answer. delta: the margin to reach, at least 0, in nats. Rewards are log-probs.
    """
    if delta < 0:
        raise ValueError(f"delta must be at least 0, got {delta}")
    chosen, rejected = pair.policy_chosen_logps, pair.policy_rejected_logps
    return Loss(torch.relu(delta - chosen + rejected) - beta * chosen, chosen.detach(), rejected.detach())


def _share_of_flips(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")


def _derivative(logratios: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(u) of a divergence at u = exp(logratios), up to a constant: 0 at u = 1.  # (B,) -> (B,)"""
    if divergence == "forward_kl":
        return -torch.expm1((-logratios).clamp(max=EXPONENT))
    if divergence == "js":
        return math.log(2) + logsigmoid(logratios)
    if divergence == "alpha":
        return -torch.expm1((-alpha * logratios).clamp(max=EXPONENT)) / alpha
    if divergence == "reverse_kl":
        return logratios
    raise ValueError(f"divergence must be forward_kl, js, alpha or reverse_kl, got {divergence}")


def _log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)); certain responses count as all but certain, for their odds are infinite."""
    logps = logps.clamp(max=-1e-6)
    return logps - torch.log(-torch.expm1(logps))
