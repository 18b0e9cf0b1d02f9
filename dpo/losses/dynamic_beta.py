"""beta-DPO (2407.08639): a beta that follows the gaps of the step, and a filter of pairs, for any objective."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from dpo.losses.coupled import RunningSpread, stateless
from dpo.losses.pairs import Loss, PairLogps, whole_step


@whole_step
class BetaDPO(nn.Module):
    """beta-DPO (2407.08639): objective at beta_i = beta * (1 + alpha * (M_i - M0)), on the share keep of the pairs.

    M is the gap between the rewards of a pair at `beta`, as the objective has them; M0 and sigma are the running mean
    and standard deviation of M, this step's included. In evaluation all pairs count, at `beta`.

    objective: (pair, beta) -> Loss.
    level: what M_i is. "batch": the mean over the step; "instance": the pair's own; "population": M0, so that all of
        training has `beta`.
    alpha: in [0, 1].
    scale: "reward" as above (paper); "logratio": over beta (public code), with which alpha acts 1 / beta as strong.
    order: which pairs the mean of the step is over: "paper" all, "code" those that are kept.
    least_beta: no beta_i is below.
    filter: which pairs are kept. "weighted": drawn without replacement with weights exp(-(M_i - M0)^2 / (2 sigma^2));
        "head", "tail", "head_tail": all but those with the largest figure, the smallest, half of either.
    filter_by: that figure. "margin": M_i; "gradient": size of the gradient of the loss at `beta` in the log-probs.
    keep: in (0, 1]; 1 keeps all.
    momentum: of M0 and sigma, per step.
    seed: of the draws; that of a pair depends on seed, step and its row alone.
    """

    steps: Tensor  # () int64, optimizer steps so far

    def __init__(
        self,
        objective: Callable[..., Loss],
        level: Literal["batch", "instance", "population"],
        alpha: float,
        scale: Literal["reward", "logratio"],
        order: Literal["paper", "code"],
        least_beta: float,
        filter: Literal["weighted", "head", "tail", "head_tail"],
        filter_by: Literal["margin", "gradient"],
        keep: float,
        momentum: float,
        seed: int,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}")
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {keep}; 1 keeps all pairs")
        if least_beta <= 0:
            raise ValueError(f"least_beta must be above 0, got {least_beta}")
        if filter == "weighted" and filter_by != "margin":
            raise ValueError(
                f"filter=weighted goes by the margin, got filter_by={filter_by}; take filter=head, tail or head_tail"
            )
        self.objective, self.level, self.alpha, self.scale = stateless(objective), level, alpha, scale
        self.order, self.least_beta, self.seed = order, least_beta, seed
        self.filter, self.filter_by, self.keep = filter, filter_by, keep
        self.gaps = RunningSpread(momentum)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, pair: PairLogps, beta: float) -> Loss:
        whole = self.objective(pair, beta)
        if not self.training:
            return whole
        unit = 1.0 if self.scale == "reward" else beta
        gaps = (whole.chosen_rewards - whole.rejected_rewards) / unit  # (N,)
        self.gaps.update(gaps)
        kept = self._kept(pair, beta, gaps, torch.as_tensor(whole.tie_tolerance).mean() / unit)
        betas = self._betas(beta, gaps, kept)
        self.steps = self.steps + 1
        of_kept = betas[kept] if betas.dim() else betas
        losses = self.objective(pair.at(kept), of_kept).losses * (len(gaps) / len(kept))  # (K,), for a mean over N
        share = torch.zeros_like(gaps).index_fill(0, kept, 1.0)  # (N,)
        figures = {"beta": betas, "gaps/mean": self.gaps.mean.value, "gaps/std": self.gaps.std.value, "kept": share}
        return replace(whole, losses=torch.zeros_like(whole.losses).index_copy(0, kept, losses), figures=figures)

    def _betas(self, beta: float, gaps: Tensor, kept: Tensor) -> Tensor:
        """() float64, or (N,) for level=instance."""
        mean = self.gaps.mean.value
        if self.level == "batch":
            gaps = (gaps if self.order == "paper" else gaps[kept]).double().mean()
        elif self.level == "population":
            gaps = mean
        return (beta * (1 + self.alpha * (gaps - mean))).clamp(min=self.least_beta)

    def _kept(self, pair: PairLogps, beta: float, gaps: Tensor, rounding: Tensor) -> Tensor:
        """Places of the pairs that are kept, in order.  # (K,) int64"""
        number = max(1, int(round(self.keep * len(gaps), 6)))
        if pair.row_ids is None:
            raise ValueError("a filter draws by PairLogps.row_ids, found none")
        drawn = [random.Random(f"{self.seed} {int(self.steps)} {row}").random() for row in pair.row_ids.tolist()]
        draws = torch.tensor(drawn, dtype=torch.float64).clamp(min=1e-12)  # (N,)
        if self.filter == "weighted":  # the largest log w_i + Gumbel_i: draws one after the other by w (1903.06059)
            log_weights = -(self.gaps.standardized(gaps, rounding).double() ** 2) / 2
            first, order = 0, (log_weights - (-draws.log()).log()).argsort(descending=True)
        else:
            figures, unit = (gaps, rounding) if self.filter_by == "margin" else self._gradients(pair, beta)
            whole_units = (figures / torch.maximum(unit, 1e-6 * figures.abs().max()).clamp(min=1e-30)).round()
            order = (whole_units + draws).argsort(descending=True)  # what only rounding tells apart, draws do
            dropped = len(gaps) - number
            first = {"head": dropped, "tail": 0, "head_tail": dropped - dropped // 2}[self.filter]
        return order[first : first + number].sort().values

    @torch.enable_grad()
    def _gradients(self, pair: PairLogps, beta: float) -> tuple[Tensor, Tensor]:
        """Sizes of the gradients of the losses in the log-probs of each pair, and by what they differ at least."""
        names = ("policy_chosen_logps", "policy_rejected_logps")
        policy = {name: getattr(pair, name).detach().requires_grad_() for name in names}
        losses = self.objective(replace(pair, **policy), beta).losses
        sizes = torch.stack(torch.autograd.grad(losses.sum(), [*policy.values()])).norm(dim=0)  # (N,)
        return sizes, 1e-3 * sizes.max()
