"""What a preference objective sees, what it returns, and what is reported of it.

Shared notation, in nats: w and l are log pi of the chosen and the rejected response, a and b their log-ratios
log pi - log ref, d = a - b the margin: sums over tokens, or with "mean" before them means. s is the sigmoid.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

Marked = TypeVar("Marked", bound=Any)  # a function or class
READ = {  # what `reads` marks -> fields of `PairLogps`, those of the policy first
    "tails": (
        "policy_chosen_tails",
        "policy_rejected_tails",
        "reference_chosen_tails",
        "reference_rejected_tails",
    ),
    "alignment": ("chosen_alignment", "rejected_alignment"),
    "kl": ("chosen_kl", "rejected_kl"),
    "labels": ("desirable",),
}
OF_REFERENCE = {"tails": "log-probs of single tokens", "kl": "probabilities of all words"}  # that it must give for them
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


def at_least_0(values: Tensor, rounding: Tensor, slope: float) -> Tensor:
    """max(0, values), that near 0 has the slope at 0: where policy and reference are equal, before the first step,
    rounding would decide it, so another batch or device would take another step.

    rounding: what is within it is near, see `tie_tolerance`. slope: of max(0, x) at x = 0, from 0 to 1.
    """
    at = values.detach()
    slopes = torch.where(at.abs() <= rounding, slope, (at > 0).to(at))
    return at.clamp(min=0) + slopes * (values - at)


@dataclass(frozen=True)
class PairLogps:
    """Log-probs (nats) and lengths (tokens) of the responses of B pairs; gradients flow into the policy's."""

    policy_chosen_logps: Tensor  # (B,)
    policy_rejected_logps: Tensor  # (B,)
    reference_chosen_logps: Tensor  # (B,)
    reference_rejected_logps: Tensor  # (B,)
    chosen_lengths: Tensor  # (B,)
    rejected_lengths: Tensor  # (B,)
    row_ids: Tensor | None = None  # (B,) int64, which pairs of their data set
    # (B,) each for a loss that asks with `reads`, else None; see there
    policy_chosen_tails: Tensor | None = None
    policy_rejected_tails: Tensor | None = None
    reference_chosen_tails: Tensor | None = None
    reference_rejected_tails: Tensor | None = None
    chosen_alignment: Tensor | None = None
    rejected_alignment: Tensor | None = None
    chosen_kl: Tensor | None = None
    rejected_kl: Tensor | None = None
    desirable: Tensor | None = None  # bool

    @classmethod
    def zeros(cls, pairs: int, asked: Sequence[str] = ()) -> Self:
        """All log-probs 0, all responses one token. asked: see `reads`."""
        more = {name: torch.zeros(pairs) for what in asked for name in READ[what]}
        more["row_ids"] = torch.arange(pairs)
        if "labels" in asked:
            more["desirable"] = more["row_ids"] % 2 == 0
        return cls(*torch.zeros(4, pairs), *torch.ones(2, pairs, dtype=torch.int64), **more)

    def at(self, rows: slice | Tensor) -> Self:
        """Some of the pairs."""
        return replace(self, **{name: value[rows] for name, value in vars(self).items() if value is not None})

    @property
    def chosen_logratios(self) -> Tensor:
        return self.policy_chosen_logps - self.reference_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        return self.policy_rejected_logps - self.reference_rejected_logps

    @property
    def margins(self) -> Tensor:
        return self.chosen_logratios - self.rejected_logratios

    def means(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the tokens of the responses as means.  # (B,), (B,)"""
        return chosen / self.chosen_lengths.clamp(min=1), rejected / self.rejected_lengths.clamp(min=1)

    def asked(self, what: str) -> list[Tensor]:
        """The fields of what a loss asks for with `reads`."""
        if missing := [name for name in READ[what] if getattr(self, name) is None]:
            raise ValueError(
                f"a loss that reads {what} must be marked with losses.reads({what!r}), found no {missing[0]}"
            )
        return [getattr(self, name) for name in READ[what]]


@dataclass(frozen=True)
class Loss:
    """Losses to average over the pairs, and the implicit rewards to report."""

    losses: Tensor  # (B,)
    chosen_rewards: Tensor  # (B,)
    rejected_rewards: Tensor  # (B,)
    tie_tolerance: Tensor | float = 0.0  # (B,), rewards that differ by no more are a tie
    figures: Mapping[str, Tensor] = field(default_factory=dict)  # to log beside, of the step () or of each pair (B,)


def whole_step(loss: Marked) -> Marked:
    """Mark a loss as one that sees all N pairs of the optimizer step at once, whatever its micro-batches and processes;
    any other gives each pair what it has alone. In validation it sees all held-out pairs at once.

    loss: a function, or a class of module, whose buffers are its state. The objective is (1/N) sum_i losses_i, so that
        a loss of all pairs together is that of each.
    """
    loss.sees_whole_step = True
    return loss


def reads(*asked: str) -> Callable[[Marked], Marked]:
    """Mark a loss as one that reads more of a pair than sums over its responses, which is then there:

    "tails": log-probs of the tokens of a response beyond the length of the other, under policy and reference.
    "alignment": of each response the mean over tokens of log p(token) - log sum_v p(v)^2 under the policy, no gradient.
    "kl": of each response the sum over tokens of KL(reference || policy) of the next token, over the whole vocabulary.
    "labels": whether the chosen response is desirable. It has then no response to be compared with: chosen is any
        response, and rejected the response to another prompt, see `dpo.data.batches.mismatched`.
    """

    def mark(loss: Marked) -> Marked:
        loss.asked = asked
        return loss

    return mark


def asked_by(loss: Callable[..., Loss]) -> tuple[str, ...]:
    """What a loss reads beyond sums; see `reads`."""
    return getattr(unbound(loss), "asked", ())


def unbound(function: Any) -> Any:
    """The function or object itself, of one whose options are bound: of a loss, a judge, an engine."""
    return getattr(function, "func", function)


def sees_whole_step(loss: Callable[..., Loss]) -> bool:
    return getattr(unbound(loss), "sees_whole_step", False)


def frozen(loss: Callable[..., Loss]) -> Callable[..., Loss]:
    """A copy of a loss to evaluate with: in evaluation mode, and what changes in its state changes nowhere else."""
    loss = copy.deepcopy(loss)
    if isinstance(module := unbound(loss), nn.Module):
        module.eval()
    return loss


def try_out(loss: Callable[[PairLogps], Loss]) -> None:
    """Try a copy of a loss, its options bound, on three pairs, with margins of 0, 100 and -100 nats.

    Raises: ValueError if it does not give a loss to each, the one that each has alone where it does not see the whole
    step, or one that training could not use.
    """
    loss = copy.deepcopy(loss)
    policy = -TRIED * torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])  # (2, 3): chosen and rejected
    chosen, rejected = policy.requires_grad_()
    pair = replace(PairLogps.zeros(3, asked_by(loss)), policy_chosen_logps=chosen, policy_rejected_logps=rejected)
    losses = loss(pair).losses
    if losses.shape != (3,):
        raise ValueError(f"a loss must return one number per pair, (3,) for three pairs, got {tuple(losses.shape)}")
    gradient = torch.autograd.grad(losses.sum(), policy)[0] if losses.requires_grad else torch.zeros(0)
    if not (losses.isfinite().all() and gradient.isfinite().all()):
        shown = ", ".join(f"{value:g}" for value in losses.tolist())
        raise ValueError(
            f"the loss and its gradient must be finite on margins of 0, {TRIED:g} and {-TRIED:g} nats, got losses of "
            f"{shown}; take another beta, or mend the loss"
        )
    singles = [pair.at(slice(row, row + 1)) for row in range(3)]
    if not sees_whole_step(loss) and not losses.allclose(torch.cat([loss(one).losses for one in singles])):
        raise ValueError("a loss must give each pair what it has alone, found another; mark it with losses.whole_step")


def with_rewards(
    losses: Tensor,
    pair: PairLogps,
    beta: float,
    scores: tuple[Tensor, Tensor] | None = None,
    slope: Tensor | float = 1.0,
) -> Loss:
    """Rewards beta * score. They are differences of log-probs, so that equal models give no exact zeros.

    scores: of chosen and rejected, (B,) each; None: log-ratios. slope: of a score in the log-ratio at equal models.
    """
    chosen, rejected = scores or (pair.chosen_logratios, pair.rejected_logratios)
    same = tie_tolerance(pair.policy_chosen_logps) + tie_tolerance(pair.policy_rejected_logps)  # (B,)
    return Loss(losses, beta * chosen.detach(), beta * rejected.detach(), beta * slope * same)


def metrics(pair: PairLogps, loss: Loss) -> dict[str, Tensor]:
    """What is logged of each pair, (B,) per key; in accuracies a tie counts one half."""
    figures = {name: value.detach().expand(len(loss.losses)) for name, value in loss.figures.items()}
    if pair.desirable is not None:
        return _by_label(pair, loss, pair.desirable) | figures
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
        **figures,
    }


def _by_label(pair: PairLogps, loss: Loss, desirable: Tensor) -> dict[str, Tensor]:
    """Of a step whose responses have labels the means over desirable ones (chosen) and the others (rejected), as every
    response has them; where there are none of a label, there is no figure of it.
    """
    found: dict[str, Tensor] = {}
    for side, rows in (("chosen", desirable), ("rejected", ~desirable)):
        if rows.any():
            found[f"rewards/{side}"] = loss.chosen_rewards[rows].mean()
            found[f"logps/{side}"] = pair.policy_chosen_logps[rows].mean()
            found[f"logratios/{side}"] = pair.chosen_logratios[rows].mean()
            found[f"lengths/{side}"] = pair.chosen_lengths[rows].double().mean()
    for what in ("rewards", "logratios") if len(found) == 8 else ():
        found[f"{what}/margins"] = found[f"{what}/chosen"] - found[f"{what}/rejected"]
    return {name: value.detach().expand(len(desirable)) for name, value in found.items()}


def _ranked(better: Tensor, worse: Tensor) -> Tensor:
    return (better > worse).float() + 0.5 * (better == worse).float()
