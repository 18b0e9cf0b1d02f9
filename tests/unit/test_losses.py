"""Every loss against plain numpy, exact values, finite differences; properties over every option of conf/loss."""

import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dpo.losses import Loss, PairLogps, dpo, hinge, ipo, objectives, orpo, simpo
from dpo.losses.pairs import READ, frozen, metrics, sees_whole_step, try_out
from dpo.sweep.signature import instantiate

ROOT = Path(__file__).parents[2]
EXAMPLE, ITS_PAGE = re.search(  # the loss that README adds
    r"## Add a loss.*?```python\n(.*?)```.*?```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
).groups()
OPTIONS = {"exponential": ITS_PAGE} | {page.stem: page.read_text() for page in (ROOT / "conf" / "loss").glob("*.yaml")}
OUTGROWS = ("exponential",)  # floats: faster than a power of the margin
STEEP = (
    "f_dpo",
    "chi_po",
)  # grow with a ratio of probabilities: differences of them are finite near equal models alone
STOPPED = ("kto",)  # no gradient flows through what they read of rejected responses
ASKED = {"cdpo": {"label_smoothing": 0.1}, "ld_dpo": {"alpha": 0.5}}  # options without a default
FLOATS = [name for names in READ.values() for name in names if name != "desirable"]
LN2 = math.log(2)


def pair(
    chosen: Any, rejected: Any, reference_chosen: Any = 0.0, reference_rejected: Any = 0.0, lengths: Any = (1, 1)
) -> PairLogps:
    values = [torch.as_tensor(v, dtype=torch.float64) for v in (chosen, rejected, reference_chosen, reference_rejected)]
    chosen_, rejected_, reference_chosen_, reference_rejected_ = torch.broadcast_tensors(*values)
    counts = [torch.as_tensor(length).expand(chosen_.shape) for length in lengths]
    zeros = {name: torch.zeros_like(chosen_) for name in FLOATS}
    logps = chosen_.clone(), rejected_.clone(), reference_chosen_.clone(), reference_rejected_.clone()
    return PairLogps(*logps, *counts, **zeros)


def option(name: str) -> tuple[Any, float]:
    """As in evaluation: in training some hold figures of the step that no gradient flows through."""
    page = OmegaConf.merge(OmegaConf.create(OPTIONS[name]), ASKED.get(name, {}))
    node = OmegaConf.create({"seed": 0, "loss": page}).loss
    return frozen(instantiate(node)), node.beta


def with_gradient(given: PairLogps) -> tuple[PairLogps, torch.Tensor, torch.Tensor]:
    chosen, rejected = (
        logps.clone().requires_grad_() for logps in (given.policy_chosen_logps, given.policy_rejected_logps)
    )
    return replace(given, policy_chosen_logps=chosen, policy_rejected_logps=rejected), chosen, rejected


def slope_at(leaf: torch.Tensor) -> torch.Tensor:
    """The gradient of log-probs, which a loss may not read at all."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


logp = st.floats(-300, 0)
count = st.integers(1, 200)
betas = st.floats(1e-3, 10)


def log_sigmoid(x: float) -> float:
    return -float(np.logaddexp(0.0, -x))


def log_odds(x: float) -> float:
    x = min(x, -1e-6)  # where the odds would be infinite
    return x - float(np.log(-np.expm1(x)))


@settings(max_examples=200, deadline=None)
@given(logp, logp, logp, logp, count, count, betas, st.floats(0, 0.49))
def test_values_against_numpy(c, r, rc, rr, n, m, beta, smoothing):
    given_pair = pair([c], [r], rc, rr, (n, m))
    margin = (c - rc) - (r - rr)
    expected = {
        "dpo": -(1 - smoothing) * log_sigmoid(beta * margin) - smoothing * log_sigmoid(-beta * margin),
        "sums": (margin - 1 / (2 * beta)) ** 2,
        "means": ((c - rc) / n - (r - rr) / m - 1 / (2 * beta)) ** 2,
        "hinge": max(0.0, 1 - beta * margin),
        "simpo": -log_sigmoid(beta * (c / n - r / m) - beta * 0.5),
        "orpo": -c / n - beta * log_sigmoid(log_odds(c / n) - log_odds(r / m)),
    }
    found = {
        "dpo": dpo(given_pair, beta, smoothing),
        "sums": ipo(given_pair, beta, "sequence"),
        "means": ipo(given_pair, beta, "token"),
        "hinge": hinge(given_pair, beta),
        "simpo": simpo(given_pair, beta, 0.5),
        "orpo": orpo(given_pair, beta),
    }
    for name, loss in found.items():
        assert loss.losses.item() == pytest.approx(expected[name], rel=1e-9, abs=1e-9), name


def test_values_by_hand():
    """beta 0.1, log-ratios of the chosen +1 and of the rejected -1: sigmoid(0.2)."""
    loss = dpo(pair([-10.0], [-12.0], -11.0, -11.0), 0.1, 0.0)
    assert loss.losses.item() == pytest.approx(0.598138869)
    assert (loss.chosen_rewards.item(), loss.rejected_rewards.item()) == pytest.approx((0.1, -0.1))


def test_policy_equal_to_reference():
    same = pair([-10.0, -200.0], [-30.0, -7.0], [-10.0, -200.0], [-30.0, -7.0])
    assert dpo(same, 0.1, 0.0).losses.tolist() == [LN2, LN2]
    assert dpo(same, 0.1, 0.3).losses.tolist() == pytest.approx([LN2, LN2], abs=1e-15)
    assert hinge(same, 0.1).losses.tolist() == [1.0, 1.0]
    assert ipo(same, 0.1, "sequence").losses.tolist() == pytest.approx([25.0, 25.0])  # 1 / (4 tau^2)
    leaf, chosen, rejected = with_gradient(same)
    dpo(leaf, 0.1, 0.0).losses.sum().backward()
    assert chosen.grad.tolist() == pytest.approx([-0.05, -0.05])  # -beta / 2
    assert rejected.grad.tolist() == pytest.approx([0.05, 0.05])


@given(logp, logp, betas)
@settings(deadline=None)
def test_both_labels_share_one_probability(c, r, beta):
    there, back = (dpo(pair([x], [y]), beta, 0.0).losses.item() for x, y in ((c, r), (r, c)))
    assert math.exp(-there) + math.exp(-back) == pytest.approx(1)


@given(logp, logp, betas, st.floats(-50, 50))
@settings(deadline=None)
def test_a_constant_on_both_references_changes_nothing(c, r, beta, shift):
    for loss in (lambda p: dpo(p, beta, 0.1), lambda p: ipo(p, beta, "sequence"), lambda p: hinge(p, beta)):
        at, moved = (loss(pair([c], [r], s - 3.0, s - 5.0)).losses.item() for s in (0.0, shift))
        assert at == pytest.approx(moved, rel=1e-6, abs=1e-6)


def test_swapping_a_pair_is_flipping_its_label():
    for smoothing in (0.0, 0.1, 0.4):
        straight = dpo(pair([-3.0], [-5.0]), 0.7, smoothing).losses.item()
        margin = 0.7 * 2
        swapped = -smoothing * log_sigmoid(-margin) - (1 - smoothing) * log_sigmoid(margin)
        assert straight == pytest.approx(swapped)


def test_conservative_dpo_has_its_minimum_at_the_assumed_share():
    margins = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    losses = dpo(pair(margins, 0.0), 0.5, 0.2).losses
    assert margins[losses.argmin()].item() == pytest.approx(math.log(0.8 / 0.2) / 0.5, abs=1e-3)


def test_ipo_has_its_minimum_at_half_over_beta():
    assert ipo(pair([1 / 0.6], [0.0]), 0.3, "sequence").losses.item() == pytest.approx(0)


def test_small_beta_tends_to_ln_2_and_keeps_its_direction():
    leaf, chosen, _ = with_gradient(pair([-10.0], [-20.0]))
    losses = dpo(leaf, 1e-8, 0.0).losses
    losses.sum().backward()
    assert losses.item() == pytest.approx(LN2, abs=1e-6)
    assert chosen.grad.item() / 1e-8 == pytest.approx(-0.5, abs=1e-6)


def test_simpo_gamma_is_in_units_of_beta():
    p = pair([-10.0], [-30.0], lengths=(5, 10))
    assert simpo(p, 2.0, 0.5).losses.item() == pytest.approx(-log_sigmoid(2.0 * (-2 + 3) - 2.0 * 0.5))


@pytest.mark.parametrize("name", sorted(OPTIONS))
class TestEveryOption:
    """A new loss is tested on arrival."""

    @pytest.fixture(autouse=True)
    def example(self, monkeypatch):
        scope = dict(vars(objectives))
        exec(EXAMPLE, scope)
        monkeypatch.setattr(objectives, "exponential", scope["exponential"], raising=False)

    def random(self, size: int = 6, apart: float = 1.0) -> PairLogps:
        """apart: of policy and reference, 0 to 1."""
        rng = torch.Generator().manual_seed(0)
        logps = [-100 * torch.rand(size, generator=rng, dtype=torch.float64) for _ in range(4)]
        reference = [mine.lerp(other, apart) for mine, other in zip(logps[:2], logps[2:], strict=True)]
        lengths = [torch.randint(1, 60, (size,), generator=rng) for _ in range(2)]
        more = {name: torch.rand(size, generator=rng, dtype=torch.float64) for name in FLOATS}
        return PairLogps(*logps[:2], *reference, *lengths, **more, desirable=torch.ones(size, dtype=torch.bool))

    def test_gradient_is_the_finite_difference(self, name):
        loss, beta = option(name)
        given_pair = self.random(apart=0.02 if name in STEEP else 1.0)
        leaf, chosen, rejected = with_gradient(given_pair)
        loss(leaf, beta=beta).losses.sum().backward()
        leaves = {"policy_chosen_logps": chosen, "policy_rejected_logps": rejected}
        for what in leaves if name not in STOPPED else ("policy_chosen_logps",):
            gradient = slope_at(leaves[what])
            for place, slope in enumerate(gradient.tolist()):
                sides = []
                for step in (1e-6, -1e-6):
                    logps = getattr(given_pair, what).clone()
                    logps[place] += step
                    sides.append(loss(replace(given_pair, **{what: logps}), beta=beta).losses)
                assert (sides[0] - sides[1]).sum().item() / 2e-6 == pytest.approx(slope, rel=1e-4, abs=1e-5)

    def test_a_pair_is_on_its_own_and_order_does_not_matter(self, name):
        loss, beta = option(name)
        given_pair = self.random()
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        permuted = given_pair.at(order)
        exactly = {"rtol": 0.0, "atol": 1e-12 if sees_whole_step(loss) else 0.0}
        assert torch.allclose(loss(given_pair, beta=beta).losses[order], loss(permuted, beta=beta).losses, **exactly)

    @pytest.mark.parametrize("margin", [1e4, -1e4, "largest", "smallest"])
    def test_large_margins_stay_finite(self, name, margin):
        """Up to 1e4 nats; of a loss that outgrows floats, up to 50 / beta: beyond, a run stops and names the pair."""
        loss, beta = option(name)
        if isinstance(margin, str):
            margin = {"largest": 50, "smallest": -50}[margin] / beta
        values = vars(pair([min(margin, 0.0)], [min(-margin, 0.0)]))
        extreme = PairLogps(**{name: value.float() for name, value in values.items() if value is not None})
        leaf, chosen, rejected = with_gradient(replace(extreme, desirable=torch.tensor([True])))
        found = loss(leaf, beta=beta).losses
        found.sum().backward()
        for values in (found, slope_at(chosen), slope_at(rejected)):
            assert not values.isnan().any()
            assert values.isfinite().all() or (name in OUTGROWS and abs(beta * margin) > 51)

    def test_nothing_flows_into_reference_or_rewards(self, name):
        loss, beta = option(name)
        leaf, _, _ = with_gradient(self.random())
        result = loss(leaf, beta=beta)
        assert isinstance(result, Loss)
        assert not result.chosen_rewards.requires_grad
        assert not result.rejected_rewards.requires_grad
        assert {result.losses.shape, result.chosen_rewards.shape, result.rejected_rewards.shape} == {(6,)}

    def test_lower_for_a_better_policy(self, name):
        loss, beta = option(name)
        worse, better = (
            loss(
                replace(pair([chosen], [-2.0], lengths=(2, 2)), desirable=torch.tensor([True])), beta=beta
            ).losses.item()
            for chosen in (-2.0, -1.9)
        )
        assert better < worse


@pytest.mark.parametrize(
    "call,said",
    [
        (lambda p: dpo(p, 0.1, 0.5), "label_smoothing"),
        (lambda p: dpo(p, 0.1, -0.1), "label_smoothing"),
        (lambda p: ipo(p, 0.1, "mean"), "average"),
        (lambda p: simpo(p, 2.0, -1.0), "gamma_beta_ratio"),
    ],
)
def test_wrong_knobs_are_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call(pair([-1.0], [-2.0]))


def test_metrics_count_a_tie_as_one_half():
    p = pair([-1.0, -2.0, -3.0], [-2.0, -1.0, -3.0], lengths=(4, 6))
    found = metrics(p, dpo(p, 0.5, 0.0))
    assert found["rewards/accuracies"].tolist() == [1.0, 0.0, 0.5]
    assert found["rewards/ties"].tolist() == [0.0, 0.0, 1.0]
    assert found["logps/accuracies"].tolist() == [1.0, 0.0, 0.5]
    assert found["rewards/margins"].tolist() == [0.5, -0.5, 0.0]
    assert found["logratios/margins"].tolist() == [1.0, -1.0, 0.0]
    assert found["lengths/chosen"].tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    "loss,better,worse",
    [
        (lambda p: dpo(p, 0.5, 0.1), 1.0, -1.5),
        (lambda p: ipo(p, 0.25, "sequence"), 0.5, -0.75),
        (lambda p: ipo(p, 0.25, "token"), 0.5, -0.75),
        (lambda p: hinge(p, 2.0), 4.0, -6.0),
        (lambda p: simpo(p, 2.0, 0.5), -4.0, -6.0),
        (lambda p: orpo(p, 0.1), -0.2, -0.3),
    ],
)
def test_every_figure_of_a_pair(loss, better, worse):
    """By hand, of 5 and 8 tokens. Rewards are beta times the log-ratio, or the mean where there is no reference."""
    one = pair([-10.0], [-24.0], -12.0, -21.0, (5, 8))
    assert {name: value.item() for name, value in metrics(one, loss(one)).items()} == pytest.approx(
        {
            **{"rewards/chosen": better, "rewards/rejected": worse, "rewards/margins": better - worse},
            **{"rewards/accuracies": 1.0, "rewards/ties": 0.0, "logps/accuracies": 1.0},
            **{"logps/chosen": -10.0, "logps/rejected": -24.0, "lengths/chosen": 5, "lengths/rejected": 8},
            **{"logratios/chosen": 2.0, "logratios/rejected": -3.0, "logratios/margins": 5.0},
        }
    )


@pytest.mark.parametrize(
    "loss", [lambda p: dpo(p, 0.3, 0.0), lambda p: ipo(p, 0.3, "sequence"), lambda p: hinge(p, 3.0)]
)
def test_what_rounding_makes_of_equal_models_is_a_tie(loss):
    """Log-probs of the same model in batches of another shape differ in the last bits; larger gaps count in full."""
    off = torch.tensor([1e-6, -1e-6, 2e-5, -2e-5, 1e-3, -1e-3])
    p = pair(-80 * (1 - off), -40.0, -80.0, -40.0)
    found = metrics(p, loss(p))
    assert found["rewards/accuracies"].tolist() == [0.5, 0.5, 1.0, 0.0, 1.0, 0.0]
    assert found["rewards/ties"].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "loss,said",
    [
        (lambda pair, beta=1.0: Loss(torch.exp(-beta * pair.margins), pair.margins, pair.margins), "must be finite"),
        (lambda pair, beta=1.0: Loss(torch.sqrt(pair.margins**2), pair.margins, pair.margins), "must be finite"),
        (lambda pair, beta=1.0: Loss(pair.margins.mean(), pair.margins, pair.margins), "one number per pair"),
    ],
)
def test_a_loss_is_tried_before_any_run(loss, said):
    """An overflow, a gradient that is not a number at equal models, a mean where there are three pairs."""
    with pytest.raises(ValueError, match=said):
        try_out(loss)
    try_out(partial(dpo, beta=1e12, label_smoothing=0.0))
