from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from dpo.training.optim import optimizer, schedule


def rates(name, warmup_steps, steps, lr=1.0):
    optim = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = schedule(optim, name, warmup_steps, steps)
    seen = []
    for _ in range(steps):
        seen.append(optim.param_groups[0]["lr"])
        optim.step()
        scheduler.step()
    return seen, optim.param_groups[0]["lr"]


def test_warmup_then_constant():
    seen, _ = rates("constant", 4, 7, lr=10.0)
    assert seen == pytest.approx([2, 4, 6, 8, 10, 10, 10])


def test_warmup_as_a_share_of_the_steps():
    assert rates("linear", 0.1, 40) == rates("linear", 4, 40)
    assert rates("constant", 0.25, 10) == rates("constant", 2, 10)  # 2.5, rounded to even
    assert rates("constant", 0.35, 10) == rates("constant", 4, 10)  # up
    assert rates("linear", 0.1, 3) == rates("linear", 0, 3)
    assert rates("constant", 1, 3)[0] == [0.5, 1, 1]  # a step, not all of them


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_decay_wastes_no_step(name):
    seen, after = rates(name, 2, 10)
    assert seen[2] == 1.0
    assert all(earlier > later > 0 for earlier, later in pairwise(seen[2:]))
    assert after == pytest.approx(0, abs=1e-12)


def test_linear_and_cosine_values():
    assert rates("linear", 0, 4)[0] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert rates("cosine", 0, 4)[0] == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_steps,steps", [(0, 1), (5, 1), (5, 5), (1, 1)])
def test_short_runs_have_a_positive_rate(name, warmup_steps, steps):
    seen, _ = rates(name, warmup_steps, steps)
    assert all(0 < rate <= 1 for rate in seen)


GRADIENTS = ((3.0, -1e-8), (-0.5, 4e-8), (0.25, 1e-7))  # of two weights; the second is no larger than epsilon


def stepped(name, weights, lr=0.1, betas=(0.6, 0.9), weight_decay=0.5):
    """The weights after each of three steps."""
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([weights])
    optim, path = optimizer(model, name, lr, betas, weight_decay), []
    for gradient in GRADIENTS:
        model.weight.grad = torch.tensor([gradient])
        optim.step()
        path.append(model.weight[0].tolist())
    return path


def test_adamw_steps_by_hand():
    """Decay of the weight itself, means of unequal gradients and of their squares, free of their start at 0."""
    expected, weights, first, second = [], np.array([2.0, -1.0]), np.zeros(2), np.zeros(2)
    for step, gradient in enumerate(np.array(GRADIENTS), start=1):
        first = 0.6 * first + 0.4 * gradient
        second = 0.9 * second + 0.1 * gradient**2
        mean, square = first / (1 - 0.6**step), second / (1 - 0.9**step)
        weights = weights - 0.1 * 0.5 * weights - 0.1 * mean / (np.sqrt(square) + 1e-8)
        expected.append(weights)
    np.testing.assert_allclose(stepped("adamw", [2.0, -1.0]), expected, atol=1e-6)


def test_rmsprop_steps_by_hand():
    """Decay is part of the gradient; the mean of squares forgets a hundredth a step, and has no betas."""
    expected, weights, square = [], np.array([2.0, -1.0]), np.zeros(2)
    for gradient in np.array(GRADIENTS):
        gradient = gradient + 0.5 * weights
        square = 0.99 * square + 0.01 * gradient**2
        weights = weights - 0.1 * gradient / (np.sqrt(square) + 1e-8)
        expected.append(weights)
    np.testing.assert_allclose(stepped("rmsprop", [2.0, -1.0]), expected, atol=1e-5)
    assert stepped("rmsprop", [2.0, -1.0], betas=(0.0, 0.0)) == stepped("rmsprop", [2.0, -1.0])


def test_small_rates_still_move_float32_weights():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    optim = optimizer(model, "adamw", 5e-7, [0.9, 0.99], 0.0)
    for _ in range(20):
        model.weight.grad = torch.ones(1, 1)
        optim.step()
    assert model.weight.item() == pytest.approx(1 - 20 * 5e-7, abs=2e-6)
    assert model.weight.item() < 1


def test_frozen_weights_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    optim = optimizer(model, "adamw", 0.1, [0.9, 0.99], 0.0)
    assert len(optim.param_groups[0]["params"]) == 2


@pytest.mark.parametrize("model", [nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2).requires_grad_(False)])
def test_refuses_other_weights(model):
    with pytest.raises(ValueError, match="must be float32"):
        optimizer(model, "adamw", 0.1, [0.9, 0.99], 0.0)


def test_refuses_other_names():
    with pytest.raises(ValueError, match="adamw, adamw_8bit or rmsprop, got sgd"):
        optimizer(nn.Linear(2, 2), "sgd", 0.1, [0.9, 0.99], 0.0)
    with pytest.raises(ValueError, match="constant, linear or cosine, got step"):
        rates("step", 0, 1)


def test_adamw_in_8_bits_is_adamw_but_for_rounding():
    """On a regression of 8,192 weights: as much of the way, and weights within 15 % of what AdamW moves them by."""

    def trained(name):
        model = nn.Linear(512, 16, bias=False)
        with torch.no_grad():
            model.weight.fill_(0.1)
        optim, rng = optimizer(model, name, 1e-2, (0.9, 0.99), 0.1), torch.Generator().manual_seed(0)
        target = torch.randn(16, 512, generator=rng)
        for _ in range(50):
            inputs = torch.randn(64, 512, generator=rng)
            loss = (model(inputs) - inputs @ target.T).square().mean()
            loss.backward()
            optim.step()
            optim.zero_grad()
        return model.weight.detach(), loss.item(), optim

    (plain, loss, _), (in_8_bits, its_loss, optim) = trained("adamw"), trained("adamw_8bit")
    assert its_loss == pytest.approx(loss, rel=0.02)
    assert 0 < (in_8_bits - plain).norm() < 0.15 * (plain - 0.1).norm()
    [state] = optim.state.values()
    assert {state["state1"].dtype, state["state2"].dtype} == {torch.uint8}
