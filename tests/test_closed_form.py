"""Minimizing our losses over a table of responses reaches the optimum that theory names: no sampling, float64."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from dpo.losses import PairLogps, dpo, ipo


def world(seed: int, responses: int = 7) -> tuple[Tensor, Tensor]:
    """Reference probabilities and rewards, arbitrary."""
    rng = torch.Generator().manual_seed(seed)
    reference = torch.rand(responses, generator=rng, dtype=torch.float64) + 0.05
    return reference / reference.sum(), 2 * torch.randn(responses, generator=rng, dtype=torch.float64)


def minimize(loss, reference_logps: Tensor, rewards: Tensor) -> tuple[Tensor, float]:
    """Log-probabilities with the least population loss: every ordered pair, by its Bradley-Terry probability."""
    first, second = map(torch.tensor, zip(*itertools.permutations(range(len(rewards)), 2), strict=True))
    weights = torch.sigmoid(rewards[first] - rewards[second])
    table = torch.zeros(len(rewards), dtype=torch.float64, requires_grad=True)
    ones = torch.ones(len(first), dtype=torch.int64)
    optimizer = torch.optim.LBFGS(
        [table], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        logps = table.log_softmax(0)
        pairs = PairLogps(logps[first], logps[second], reference_logps[first], reference_logps[second], ones, ones)
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
