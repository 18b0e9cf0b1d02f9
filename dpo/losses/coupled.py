"""Objectives that couple all pairs of the optimizer step; `dpo.losses.dynamic_beta` has beta-DPO."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from dpo.losses.objectives import dpo, simpo
from dpo.losses.pairs import Loss, PairLogps, at_least_0, reads, tie_tolerance, unbound, whole_step, with_rewards


class RunningMean(nn.Module):
    """Exponential moving average, corrected for its start: sum_k momentum^(t - k) x_k / sum_k momentum^(t - k).

    momentum: in [0, 1]; 0 is the last value, 1 the mean of all.
    """

    value: Tensor  # () float64, 0 before any update
    total: Tensor  # () float64, the denominator

    def __init__(self, momentum: float) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        self.momentum = momentum
        self.register_buffer("value", torch.zeros((), dtype=torch.float64))
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))

    def update(self, new: Tensor) -> None:
        self.total = self.momentum * self.total + 1
        self.value = self.value + (new.detach().double() - self.value) / self.total


class RunningSpread(nn.Module):
    """Running mean and standard deviation of a figure that every pair has, updated by steps."""

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.mean, self.std = RunningMean(momentum), RunningMean(momentum)

    def update(self, values: Tensor) -> None:
        """values: (N,), of all pairs of a step; one pair has no spread."""
        self.mean.update(values.mean())
        if len(values) > 1:
            self.std.update(values.std())

    def standardized(self, values: Tensor, rounding: Tensor) -> Tensor:
        """(values - mean) / std, 0 as long as no spread is known.

        rounding: the least std, so that where policy and reference are the same, noise is none.
        """
        if not self.std.total:
            return torch.zeros_like(values)
        return ((values - self.mean.value) / torch.maximum(self.std.value, rounding).clamp(min=1e-30)).to(values.dtype)


def stateless(objective: Callable[..., Loss]) -> Callable[..., Loss]:
    """An objective to build another from.

    Raises: ValueError if it has a state of its own.
    """
    if isinstance(unbound(objective), nn.Module):
        raise ValueError(f"objective must have no state of its own, got {type(unbound(objective)).__name__}")
    return objective


@whole_step
def dr_dpo(pair: PairLogps, beta: float, beta_prime: float, objective: Callable[..., Loss]) -> Loss:
    """Dr. DPO (2407.07880): -beta' * log(mean_i exp(-l_i / beta')).

    The l_i are the losses of the objective of all pairs of the step. A pair has the weight softmax_i(-l_i / beta') in
    the gradient: what the policy finds unlikely is trusted less.

    beta_prime: above 0; the larger, the closer to the mean.
    objective: (pair, beta) -> Loss.
    """
    if beta_prime <= 0:
        raise ValueError(f"beta_prime must be above 0, got {beta_prime}")
    each = stateless(objective)(pair, beta)
    losses = each.losses.double()  # (N,); a large beta' takes the difference of nearly equal numbers
    least = losses.detach().min()
    robust = least - beta_prime * torch.expm1((least - losses) / beta_prime).mean().log1p()
    return replace(each, losses=each.losses + (robust - losses.mean()).to(each.losses.dtype))  # their mean is `robust`


@whole_step
def sft(pair: PairLogps, beta: float) -> Loss:
    """SFT on the chosen responses, Preferred-FT (2305.18290, Section 6): -sum_i w_i / sum_i |chosen_i|.

    What the chosen responses teach without being compared: the mean of -log p over all their tokens of the step, where
    TRL has those of a micro-batch. beta is no part of it, and scales the rewards that are reported.
    """
    chosen, rejected = pair.policy_chosen_logps, pair.policy_rejected_logps
    losses = -chosen / pair.chosen_lengths.to(chosen).mean().clamp(min=1)  # (N,), whose mean it is
    return Loss(losses, (beta * chosen).detach(), (beta * rejected).detach())


@whole_step
class AlphaDPO(nn.Module):
    """alpha-DPO (2410.10148): -log s(beta * (mean w - mean l - gamma_beta_ratio - alpha * z)).

    SimPO, with a target margin for each pair, through which no gradient flows: z is the gap of mean token log-ratios
    between its responses, less the running mean of that, in units of its running standard deviation.

    alpha: at least 0, which is SimPO. gamma_beta_ratio: see `simpo`. momentum: of the running figures, per step.
    """

    def __init__(self, alpha: float, gamma_beta_ratio: float, momentum: float) -> None:
        super().__init__()
        if alpha < 0:
            raise ValueError(f"alpha must be at least 0, got {alpha}")
        self.alpha, self.gamma_beta_ratio = alpha, gamma_beta_ratio
        self.gaps = RunningSpread(momentum)

    def forward(self, pair: PairLogps, beta: float) -> Loss:
        base = simpo(pair, beta, self.gamma_beta_ratio)
        chosen, rejected = pair.means(pair.policy_chosen_logps, pair.policy_rejected_logps)  # (N,)
        more_likely, less_likely = pair.means(pair.chosen_logratios, pair.rejected_logratios)
        gaps = (more_likely - less_likely).detach()  # (N,)
        if self.training:
            self.gaps.update(gaps)
        lengths = torch.minimum(pair.chosen_lengths, pair.rejected_lengths).clamp(min=1)
        rounding = with_rewards(gaps, pair, 1.0).tie_tolerance / lengths  # (N,)
        margins = self.gamma_beta_ratio + self.alpha * self.gaps.standardized(gaps, rounding.mean())
        figures = {"gaps/mean": self.gaps.mean.value, "gaps/std": self.gaps.std.value}
        return replace(base, losses=-logsigmoid(beta * (chosen - rejected - margins)), figures=figures)


@whole_step
def aot(pair: PairLogps, beta: float, label_smoothing: float) -> Loss:
    """AOT for pairs (2406.05882): -log s(beta * (k-th smallest (w - l) - k-th smallest (log ref(w) - log ref(l)))).

    DPO on quantiles: gaps of the policy against gaps of the reference of the same rank in the step.

    label_smoothing: see `dpo`.
    """
    gaps = pair.policy_chosen_logps - pair.policy_rejected_logps  # (N,)
    return _transported(pair, beta, label_smoothing, gaps, pair.reference_chosen_logps - pair.reference_rejected_logps)


@whole_step
def aot_unpaired(pair: PairLogps, beta: float, label_smoothing: float) -> Loss:
    """AOT without pairs (2406.05882): -log s(beta * (k-th smallest a - k-th smallest b)).

    Log-ratios of chosen responses against those of rejected responses of the same rank in the step.

    label_smoothing: see `dpo`.
    """
    return _transported(pair, beta, label_smoothing, pair.chosen_logratios, pair.rejected_logratios)


def _transported(pair: PairLogps, beta: float, label_smoothing: float, better: Tensor, worse: Tensor) -> Loss:
    """DPO of the k-th smallest of `better` over the k-th smallest of `worse`, as the loss of the pair of the former."""
    places = better.argsort(stable=True).argsort()  # (N,)
    zeros = torch.zeros_like(better)
    moved = replace(pair, policy_chosen_logps=better, policy_rejected_logps=worse.sort().values[places])
    moved = replace(moved, reference_chosen_logps=zeros, reference_rejected_logps=zeros)
    return with_rewards(dpo(moved, beta, label_smoothing).losses, pair, beta)


@whole_step
def kto_paired(pair: PairLogps, beta: float, gradient_of_baseline: bool) -> Loss:
    """KTO for pairs (2402.01306, kto_pair of its code): 1 - (s(beta * (a - z_b)) + s(beta * (z_a - b))) / 2.

    z_a = max(0, mean a) and z_b = max(0, mean b) over the step: each side against the mean log-ratio of the other.

    gradient_of_baseline: let gradients flow into these means, as that code did; also at 0, as before the first step.
    """
    chosen, rejected = pair.chosen_logratios, pair.rejected_logratios  # (N,)
    rounding = [tie_tolerance(logps).mean() for logps in (pair.policy_chosen_logps, pair.policy_rejected_logps)]
    baselines = at_least_0(torch.stack([chosen.mean(), rejected.mean()]), torch.stack(rounding), slope=1)
    of_chosen, of_rejected = baselines if gradient_of_baseline else baselines.detach()
    wins, losses = torch.sigmoid(beta * (chosen - of_rejected)), torch.sigmoid(beta * (of_chosen - rejected))
    result = with_rewards(1 - (wins + losses) / 2, pair, beta)
    return replace(result, figures={"baselines/chosen": of_chosen, "baselines/rejected": of_rejected})


@whole_step
@reads("labels")
def kto(pair: PairLogps, beta: float, desirable_weight: float, undesirable_weight: float) -> Loss:
    """KTO (2402.01306): weight (1 - s(beta * (a - z))) of a desirable response, weight (1 - s(beta * (z - a))) of an
    undesirable one, z = max(0, mean b).

    a is the log-ratio of a response, whatever its label, and b that of a response to another prompt in its place. The
    mean is over the step, and no gradient flows through it.

    desirable_weight, undesirable_weight: above 0. Times the number of responses of their label the former should be 1
    to 4/3 times the latter (sources differ about the end).
    """
    if desirable_weight <= 0 or undesirable_weight <= 0:
        raise ValueError(f"weights must be above 0, got {desirable_weight} and {undesirable_weight}")
    [desirable] = pair.asked("labels")
    mean = pair.rejected_logratios.detach().mean()
    baseline = mean.clamp(min=0)
    gains = beta * (pair.chosen_logratios - baseline)  # (N,)
    losses = torch.where(desirable, desirable_weight * torch.sigmoid(-gains), undesirable_weight * torch.sigmoid(gains))
    return replace(with_rewards(losses, pair, beta), figures={"kl": baseline, "logratios/mismatched": mean})


@whole_step
class BCO(nn.Module):
    """BCO (2404.04656): -log s(beta * a - delta) - log s(delta - beta * b).

    delta is the mean of all rewards of training so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shift = RunningMean(momentum=1.0)

    def forward(self, pair: PairLogps, beta: float) -> Loss:
        chosen, rejected = beta * pair.chosen_logratios, beta * pair.rejected_logratios  # (N,)
        if self.training:
            self.shift.update((chosen.mean() + rejected.mean()) / 2)
        shift = self.shift.value
        losses = -logsigmoid(chosen - shift) - logsigmoid(shift - rejected)
        return replace(with_rewards(losses, pair, beta), figures={"rewards/shift": shift})
