"""Minimizing our losses over a table of responses reaches the optimum that theory names: no sampling, float64."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from dpo import losses
from dpo.losses import PairLogps, dpo, ipo


def world(seed: int, responses: int = 7) -> tuple[Tensor, Tensor]:
    """Reference probabilities and rewards, arbitrary."""
    rng = torch.Generator().manual_seed(seed)
    reference = torch.rand(responses, generator=rng, dtype=torch.float64) + 0.05
    return reference / reference.sum(), 2 * torch.randn(responses, generator=rng, dtype=torch.float64)


def minimize(
    loss, reference_logps: Tensor, rewards: Tensor, lengths: Tensor | None = None, flipped: float = 0.0
) -> tuple[Tensor, float]:
    """Log-probabilities with the least population loss: every ordered pair, by its Bradley-Terry probability.

    flipped: share of labels that are turned round.
    """
    first, second = map(torch.tensor, zip(*itertools.permutations(range(len(rewards)), 2), strict=True))
    weights = torch.sigmoid(rewards[first] - rewards[second])
    weights = (1 - flipped) * weights + flipped * (1 - weights)
    table = reference_logps.clone().requires_grad_()
    lengths = torch.ones(len(rewards), dtype=torch.int64) if lengths is None else lengths
    optimizer = torch.optim.LBFGS(
        [table], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        logps = table.log_softmax(0)
        of = [values[rows] for values in (logps, reference_logps, lengths) for rows in (first, second)]
        pairs = PairLogps(*of)
        return (weights * loss(pairs)).sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective()
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(closure)
    return table.detach().log_softmax(0), objective().item()


@pytest.mark.parametrize("beta", [0.1, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_dpo_reaches_reference_times_exponential_reward(beta, seed):
    reference, rewards = world(seed)
    logps, value = minimize(lambda pairs: dpo(pairs, beta, 0.0).losses, reference.log(), rewards)
    normalizer = (reference * (rewards / beta).exp()).sum()
    optimum = reference * (rewards / beta).exp() / normalizer
    assert torch.allclose(logps.exp(), optimum, atol=1e-6)
    kl = (logps.exp() * (logps - reference.log())).sum().item()
    expected_reward = (logps.exp() * rewards).sum().item()
    assert expected_reward - beta * kl == pytest.approx(beta * normalizer.log().item(), abs=1e-6)
    # the floor of the loss is the entropy of the labels
    p = torch.sigmoid(rewards[:, None] - rewards[None, :])
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    assert value == pytest.approx(entropy.triu(1).sum().item(), abs=1e-8)


def test_a_smaller_beta_buys_reward_with_kl():
    reference, rewards = world(2)
    found = []
    for beta in (3.0, 1.0, 0.3):
        logps, _ = minimize(lambda pairs, beta=beta: dpo(pairs, beta, 0.0).losses, reference.log(), rewards)
        found.append(((logps.exp() * rewards).sum().item(), (logps.exp() * (logps - reference.log())).sum().item()))
    assert found == sorted(found)
    assert all(more[1] > less[1] for less, more in itertools.pairwise(found))


def test_without_a_reference_only_the_reward_counts():
    _, rewards = world(3)
    logps, _ = minimize(lambda pairs: dpo(pairs, 0.5, 0.0).losses, torch.zeros_like(rewards), rewards)
    assert torch.allclose(logps.exp(), (rewards / 0.5).softmax(0), atol=1e-6)


def test_a_constant_reward_changes_nothing():
    reference, rewards = world(4)
    at, moved = (
        minimize(lambda pairs: dpo(pairs, 0.5, 0.0).losses, reference.log(), rewards + c)[0] for c in (0.0, 5.0)
    )
    assert torch.allclose(at, moved, atol=1e-6)


def test_ipo_reaches_its_margin_for_two_responses():
    reference, rewards = world(5, responses=2)
    logps, _ = minimize(lambda pairs: ipo(pairs, 0.4, "sequence").losses, reference.log(), rewards)
    margin = (logps - reference.log())[0] - (logps - reference.log())[1]
    preferred = torch.sigmoid(rewards[0] - rewards[1]).item()
    assert margin.item() == pytest.approx((2 * preferred - 1) / (2 * 0.4), abs=1e-6)
    assert math.isfinite(margin.item())


DERIVATIVES = {
    "forward_kl": lambda u: -1 / u,
    "js": lambda u: (2 * u / (1 + u)).log(),
    "alpha": lambda u: (1 - u**-0.4) / 0.4,
    "reverse_kl": torch.log,
}


@pytest.mark.parametrize("divergence", [*DERIVATIVES, "chi-squared and KL"])
def test_another_divergence_makes_other_rewards_of_ratios(divergence):
    """r = beta f'(pi / ref) + constant (2309.16240), of chi-squared PO u + log u (2407.13399)."""
    reference, rewards = world(7)
    derivative, loss = lambda u: u + u.log(), lambda pairs: losses.chi_po(pairs, 1.5, None)
    if divergence in DERIVATIVES:
        derivative, loss = DERIVATIVES[divergence], lambda pairs: losses.f_dpo(pairs, 1.5, divergence, 0.4)
    logps, _ = minimize(lambda pairs: loss(pairs).losses, reference.log(), rewards)
    off = rewards - 1.5 * derivative(logps.exp() / reference)
    assert (off - off.mean()).abs().max() < 1e-5


def test_robust_dpo_is_dpo_on_clean_labels():
    reference, rewards = world(8)
    clean, _ = minimize(lambda pairs: dpo(pairs, 0.5, 0.0).losses, reference.log(), rewards)
    robust, _ = minimize(lambda pairs: losses.robust(pairs, 0.5, 0.2).losses, reference.log(), rewards, flipped=0.2)
    plain, _ = minimize(lambda pairs: dpo(pairs, 0.5, 0.0).losses, reference.log(), rewards, flipped=0.2)
    assert torch.allclose(robust, clean, atol=1e-5)
    assert not torch.allclose(plain, clean, atol=0.1)


def test_length_regularized_dpo_takes_a_price_per_token_off_the_reward():
    reference, rewards = world(9)
    lengths = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    logps, _ = minimize(lambda pairs: losses.r_dpo(pairs, 0.5, 0.3).losses, reference.log(), rewards, lengths)
    assert torch.allclose(logps.exp(), (reference.log() + (rewards - 0.3 * lengths) / 0.5).softmax(0), atol=1e-6)
