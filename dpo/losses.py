"""Every preference objective as a function of log-probabilities.

Shared notation: a margin is (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)), in nats.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

Marked = TypeVar("Marked", bound=Any)  # a function or class
TRIED = 100.0  # nats between chosen and rejected at which a loss is tried before any run
TIE_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2}  # of matrix products in either; see `tie_tolerance`


def tie_tolerance(logps: Tensor, precision: str = "fp32") -> Tensor:
    """Nats by which two right computations of the log-prob of a response may differ: in another batch, layout or place.

    An error d of the logits moves log p of a token by at most 2 d (1 - p), which is at most 2 d |log p|. In fp32, d is
    some tens of half a last place of the largest logits, about 30: 5e-5 nats, so 1e-4 for a token. Errors of n tokens
    have either sign, and grow as sqrt(n), where |log p| grows as n: hence relative to that, of at least 10 nats.
    Measured on 30 layers and 49 thousand words: 2e-5 nats for a token, 9e-5 for a response of 200 nats. In bf16, whose
    last place is 2^16 times as large, 0.1 nats for a token: checks that allow for it see less.
    """
    return TIE_TOLERANCE[precision] * logps.detach().abs().clamp(min=10)


@dataclass(frozen=True)
class PairLogps:
    """Log-probs (nats) and lengths (tokens) of the responses of B pairs; gradients flow into the policy's."""

    policy_chosen_logps: Tensor  # (B,)
    policy_rejected_logps: Tensor  # (B,)
    reference_chosen_logps: Tensor  # (B,)
    reference_rejected_logps: Tensor  # (B,)
    chosen_lengths: Tensor  # (B,)
    rejected_lengths: Tensor  # (B,)

    @classmethod
    def zeros(cls, pairs: int) -> Self:
        """All log-probs 0, all responses one token."""
        return cls(*torch.zeros(4, pairs), *torch.ones(2, pairs, dtype=torch.int64))

    @property
    def chosen_logratios(self) -> Tensor:
        return self.policy_chosen_logps - self.reference_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        return self.policy_rejected_logps - self.reference_rejected_logps

    @property
    def margins(self) -> Tensor:
        return self.chosen_logratios - self.rejected_logratios


@dataclass(frozen=True)
class Loss:
    """Losses to average over the pairs, and the implicit rewards to report."""

    losses: Tensor  # (B,)
    chosen_rewards: Tensor  # (B,)
    rejected_rewards: Tensor  # (B,)
    tie_tolerance: Tensor | float = 0.0  # (B,), rewards that differ by no more are a tie


def whole_step(loss: Marked) -> Marked:
    """Mark a loss as one that sees all N pairs of the optimizer step at once, whatever its micro-batches and processes;
    any other gives each pair what it has alone. In validation it sees all held-out pairs at once.

    loss: a function, or a class of module, whose buffers are its state. The objective is (1/N) sum_i losses_i, so that
        a loss of all pairs together is that of each.
    """
    loss.sees_whole_step = True
    return loss


def unbound(loss: Callable[..., Loss]) -> Callable[..., Loss]:
    """The function or module of a loss whose options are bound."""
    return getattr(loss, "func", loss)


def sees_whole_step(loss: Callable[..., Loss]) -> bool:
    return getattr(unbound(loss), "sees_whole_step", False)


def frozen(loss: Callable[..., Loss]) -> Callable[..., Loss]:
    """A copy of a loss to evaluate with: in evaluation mode, and what changes in its state changes nowhere else."""
    loss = copy.deepcopy(loss)
    if isinstance(module := unbound(loss), nn.Module):
        module.eval()
    return loss


def try_out(loss: Callable[..., Loss], beta: float) -> None:
    """Try a copy of a loss on three pairs, with margins of 0, 100 and -100 nats.

    Raises: ValueError if it does not give a loss to each, the one that each has alone where it does not see the whole
    step, or one that training could not use.
    """
    loss = copy.deepcopy(loss)
    policy = -TRIED * torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])  # (2, 3): chosen and rejected
    chosen, rejected = policy.requires_grad_()
    pair = replace(PairLogps.zeros(3), policy_chosen_logps=chosen, policy_rejected_logps=rejected)
    losses = loss(pair, beta=beta).losses
    if losses.shape != (3,):
        raise ValueError(f"a loss must return one number per pair, (3,) for three pairs, got {tuple(losses.shape)}")
    gradient = torch.autograd.grad(losses.sum(), policy)[0] if losses.requires_grad else torch.zeros(0)
    if not (losses.isfinite().all() and gradient.isfinite().all()):
        shown = ", ".join(f"{value:g}" for value in losses.tolist())
        raise ValueError(
            f"the loss and its gradient must be finite on margins of 0, {TRIED:g} and {-TRIED:g} nats, got losses of "
            f"{shown} at beta {beta:g}; take another beta, or mend the loss"
        )
    singles = [PairLogps(*(value[row : row + 1] for value in vars(pair).values())) for row in range(3)]
    if not sees_whole_step(loss) and not losses.allclose(torch.cat([loss(one, beta=beta).losses for one in singles])):
        raise ValueError("a loss must give each pair what it has alone, found another; mark it with losses.whole_step")


def dpo(pair: PairLogps, beta: float, label_smoothing: float) -> Loss:
    """DPO (2305.18290, Eq. 7); conservative DPO for label_smoothing > 0.

    label_smoothing: assumed probability that a label is flipped, in [0, 0.5).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    logits = beta * pair.margins  # (B,)
    losses = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    return _with_rewards(losses, pair, beta)


def ipo(pair: PairLogps, beta: float, average: str) -> Loss:
    """IPO (2310.12036): the squared distance of the margin to 1 / (2 beta).

    average: "sequence" takes sums over tokens, "token" means over tokens; beta is not portable between the two.
    """
    if average == "sequence":
        margins = pair.margins
    elif average == "token":
        margins = pair.chosen_logratios / pair.chosen_lengths.clamp(
            min=1
        ) - pair.rejected_logratios / pair.rejected_lengths.clamp(min=1)
    else:
        raise ValueError(f"average must be sequence or token, got {average}")
    return _with_rewards((margins - 1 / (2 * beta)) ** 2, pair, beta)


def hinge(pair: PairLogps, beta: float) -> Loss:
    """Hinge on the scaled margin (RSO's hinge-norm, 2309.06657)."""
    return _with_rewards(torch.relu(1 - beta * pair.margins), pair, beta)


def simpo(pair: PairLogps, beta: float, gamma_beta_ratio: float) -> Loss:
    """SimPO (2405.14734): mean token log-probabilities and a target margin, no reference.

    gamma_beta_ratio: the target margin gamma in units of beta, at least 0.
    """
    if gamma_beta_ratio < 0:
        raise ValueError(f"gamma_beta_ratio must be at least 0, got {gamma_beta_ratio}")
    chosen = pair.policy_chosen_logps / pair.chosen_lengths.clamp(min=1)  # (B,)
    rejected = pair.policy_rejected_logps / pair.rejected_lengths.clamp(min=1)  # (B,)
    losses = -logsigmoid(beta * (chosen - rejected - gamma_beta_ratio))
    return Loss(losses, (beta * chosen).detach(), (beta * rejected).detach())


def orpo(pair: PairLogps, beta: float) -> Loss:
    """ORPO (2403.07691, Eq. 6-7): likelihood of the chosen response plus beta times the odds ratio; no reference.

    Both terms are of mean token log-probabilities; beta is the paper's lambda, a weight and no KL constraint.
    """
    chosen = pair.policy_chosen_logps / pair.chosen_lengths.clamp(min=1)  # (B,)
    rejected = pair.policy_rejected_logps / pair.rejected_lengths.clamp(min=1)  # (B,)
    losses = -chosen - beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    return Loss(losses, (beta * chosen).detach(), (beta * rejected).detach())


def _log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)); certain responses count as all but certain, for their odds are infinite."""
    logps = logps.clamp(max=-1e-6)
    return logps - torch.log(-torch.expm1(logps))


def _with_rewards(losses: Tensor, pair: PairLogps, beta: float) -> Loss:
    """Rewards beta * log-ratio. They are differences of log-probs, so that equal models give no exact zeros."""
    same = beta * (tie_tolerance(pair.policy_chosen_logps) + tie_tolerance(pair.policy_rejected_logps))  # (B,)
    return Loss(losses, beta * pair.chosen_logratios.detach(), beta * pair.rejected_logratios.detach(), same)


def metrics(pair: PairLogps, loss: Loss) -> dict[str, Tensor]:
    """What is logged of each pair, (B,) per key; in accuracies a tie counts one half."""
    gaps = loss.chosen_rewards - loss.rejected_rewards  # (B,)
    ties = (gaps.abs() <= loss.tie_tolerance).float()  # (B,)
    return {
        "rewards/chosen": loss.chosen_rewards,
        "rewards/rejected": loss.rejected_rewards,
        "rewards/margins": gaps,
        "rewards/accuracies": torch.where(ties > 0, 0.5, (gaps > 0).float()),
        "rewards/ties": ties,
        "logps/chosen": pair.policy_chosen_logps,
        "logps/rejected": pair.policy_rejected_logps,
        "logps/accuracies": _ranked(pair.policy_chosen_logps, pair.policy_rejected_logps),
        "logratios/chosen": pair.chosen_logratios,
        "logratios/rejected": pair.rejected_logratios,
        "logratios/margins": pair.margins,
        "lengths/chosen": pair.chosen_lengths,
        "lengths/rejected": pair.rejected_lengths,
    }


def _ranked(better: Tensor, worse: Tensor) -> Tensor:
    return (better > worse).float() + 0.5 * (better == worse).float()
