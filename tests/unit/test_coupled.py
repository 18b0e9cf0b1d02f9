"""Losses that couple the step against NumPy, over several steps of training, and what they reduce to."""

import copy
import itertools
import math
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dpo.losses import PairLogps, dpo, hinge, ipo, kto_paired, simpo
from dpo.losses.coupled import RunningMean
from dpo.losses.pairs import READ, at_least_0, frozen, metrics, try_out, unbound
from dpo.sweep.signature import check_signature, instantiate

CONF = Path(__file__).parents[2] / "conf" / "loss"
COUPLED = ("beta_dpo", "beta_ipo", "beta_kto", "beta_simpo", "dr_dpo", "dr_ipo", "alpha_dpo", "aot", "aot_unpaired")
COUPLED += ("kto", "kto_paired", "bco", "sft")
MOMENTUM = 0.9


def node(name, **options):
    """The node of conf/loss/<name>.yaml with other options."""
    page = OmegaConf.create({"seed": 0, "loss": OmegaConf.load(CONF / f"{name}.yaml")})
    return OmegaConf.to_container(page, resolve=True)["loss"] | options


def loss_of(name, **options):
    return instantiate(node(name, **options))


def pairs(size=6, seed=0, dtype=torch.float64, first=0, labels=False):
    rng = torch.Generator().manual_seed(seed)
    logps = [-30 * torch.rand(size, generator=rng, dtype=torch.float64).to(dtype) for _ in range(4)]
    lengths = [torch.randint(1, 20, (size,), generator=rng) for _ in range(2)]
    rows = torch.arange(first, first + size)
    return PairLogps(*logps, *lengths, row_ids=rows, desirable=rows % 3 == 0 if labels else None)


def equal(pair):
    """The reference is the policy."""
    sides = {side: getattr(pair, f"policy_{side}_logps") for side in ("chosen", "rejected")}
    return replace(pair, **{f"reference_{side}_logps": logps for side, logps in sides.items()})


def numbers(pair):
    return {name: value.detach().double().numpy() for name, value in vars(pair).items() if value is not None}


def margins(pair):
    n = numbers(pair)
    chosen = n["policy_chosen_logps"] - n["reference_chosen_logps"]
    return chosen - (n["policy_rejected_logps"] - n["reference_rejected_logps"])


def log_sigmoid(x):
    return -np.logaddexp(0.0, -np.asarray(x))


def running(values, momentum=MOMENTUM):
    """The moving average as a weighted mean of all there was."""
    weights = momentum ** np.arange(len(values))[::-1]
    return (weights * np.array(values)).sum() / weights.sum()


def gradient(loss, pair):
    names = ("policy_chosen_logps", "policy_rejected_logps")
    policy = {name: getattr(pair, name).clone().requires_grad_() for name in names}
    losses = loss(replace(pair, **policy)).losses
    gradients = torch.autograd.grad(losses.sum(), [*policy.values()], materialize_grads=True)
    return losses.detach(), torch.stack(gradients)


def test_a_running_mean_is_a_weighted_mean():
    for momentum in (0.0, 0.5, 0.9, 1.0):
        mean, seen = RunningMean(momentum), []
        for value in (3.0, -1.0, 4.0, 1.5):
            mean.update(torch.tensor(value))
            seen.append(value)
            assert mean.value.item() == pytest.approx(running(seen, momentum))
    for momentum in (-0.1, 1.1):
        with pytest.raises(ValueError, match="momentum must be in"):
            RunningMean(momentum)


@pytest.mark.parametrize("order", ["paper", "code"])
@pytest.mark.parametrize("scale", ["reward", "logratio"])
@pytest.mark.parametrize("level", ["batch", "instance", "population"])
def test_beta_dpo_against_numpy(level, scale, order):
    """Of the pairs that it says it kept, over steps; every figure that is logged."""
    beta, alpha, means, stds, floors = 0.1, 0.6, [], [], 0
    loss = loss_of("beta_dpo", level=level, scale=scale, order=order, alpha=alpha)
    for step in range(5):
        pair = pairs(10, seed=step)
        h = margins(pair)
        m = h * (beta if scale == "reward" else 1.0)
        means.append(m.mean())
        stds.append(m.std(ddof=1))
        logged = metrics(pair, found := loss(pair))
        kept = logged["kept"].numpy() > 0
        assert kept.sum() == 8
        of_step = m.mean() if order == "paper" else m[kept].mean()
        gap = {"batch": of_step, "instance": m, "population": running(means)}[level]
        betas = beta * (1 + alpha * (gap - running(means)))
        floors += np.sum(betas < 1e-3)
        betas = np.broadcast_to(np.maximum(betas, 1e-3), 10)
        expected = np.where(kept, -log_sigmoid(betas * h), 0) * 10 / 8
        assert found.losses.numpy() == pytest.approx(expected)
        assert found.chosen_rewards.numpy() - found.rejected_rewards.numpy() == pytest.approx(beta * h)
        assert logged["beta"].numpy() == pytest.approx(betas)
        assert logged["gaps/mean"].numpy() == pytest.approx(np.full(10, running(means)))
        assert logged["gaps/std"].numpy() == pytest.approx(np.full(10, running(stds)))
    assert (floors > 0) == ((level, scale) == ("batch", "logratio") or level == "instance")


def test_no_gradient_flows_through_beta():
    loss, pair, beta = loss_of("beta_dpo", keep=1.0), pairs(5), 0.1
    loss(pairs(5, seed=1))
    used = metrics(pair, copy.deepcopy(loss)(pair))["beta"][0].item()
    assert used != pytest.approx(beta)
    _, found = gradient(loss, pair)
    slope = -used / (1 + np.exp(used * margins(pair)))
    assert found.numpy() == pytest.approx(np.stack([slope, -slope]))


@pytest.mark.parametrize(
    "filter, places", [("head", [0, 1, 2, 3]), ("tail", [3, 4, 5, 6]), ("head_tail", [1, 2, 3, 4])]
)
@pytest.mark.parametrize("by", ["margin", "gradient"])
def test_what_a_filter_drops(filter, places, by):
    """4 of 7 are kept; the gradient of DPO falls with the margin, that of IPO grows with the distance from its aim."""
    pair, beta = pairs(7), 0.1
    h = margins(pair)
    for name in ("beta_dpo", "beta_ipo"):
        of_ipo = np.abs(h - 1 / (2 * beta))
        figure = h if by == "margin" else -h if name == "beta_dpo" else of_ipo
        expected = np.zeros(7)
        expected[np.argsort(figure)[places]] = 1
        loss = loss_of(name, filter=filter, filter_by=by, keep=0.6)
        assert metrics(pair, loss(pair))["kept"].tolist() == expected.tolist(), name


def test_a_share_that_has_no_binary_fraction():
    """0.29 times 100 is less than 29 in floating point."""
    pair = pairs(100)
    assert metrics(pair, loss_of("beta_dpo", keep=0.29)(pair))["kept"].sum() == 29


def test_pairs_are_drawn_by_weight_without_replacement():
    """Frequencies of every set of two of four pairs, over steps, against the exact probabilities of two draws."""
    h, number = np.array([0.0, 1.0, 3.0, 9.0]), 3000
    pair = PairLogps(
        torch.tensor(h) - 40, *torch.full((3, 4), -40.0), *torch.ones(2, 4), row_ids=torch.tensor([5, 9, 2, 7])
    )
    w = np.exp(-(((h - h.mean()) / h.std(ddof=1)) ** 2) / 2)
    exact = {
        frozenset((i, j)): w[i] * w[j] / w.sum() * (1 / (w.sum() - w[i]) + 1 / (w.sum() - w[j]))
        for i, j in itertools.combinations(range(4), 2)
    }
    assert sum(exact.values()) == pytest.approx(1)
    loss = loss_of("beta_dpo", keep=0.5)
    seen = Counter(frozenset(loss(pair).figures["kept"].nonzero().flatten().tolist()) for _ in range(number))
    off = sum((seen[some] - number * p) ** 2 / (number * p) for some, p in exact.items())
    assert off < 20.5  # chi-squared of 5 degrees of freedom: one in a thousand


def test_a_draw_is_of_seed_step_and_row_alone():
    def kept(loss, pair):
        return set(pair.row_ids[loss(pair).figures["kept"] > 0].tolist())

    pair, order = pairs(20), torch.randperm(20, generator=torch.Generator().manual_seed(1))
    straight, permuted, other = (loss_of("beta_dpo", keep=0.5, seed=seed) for seed in (0, 0, 1))
    sets = [kept(straight, pair) for _ in range(3)]
    assert [kept(permuted, pair.at(order)) for _ in range(3)] == sets
    assert len({frozenset(some) for some in sets}) == 3
    assert kept(other, pair) != sets[0]
    moved = replace(pair, row_ids=pair.row_ids + 20)
    assert {row - 20 for row in kept(loss_of("beta_dpo", keep=0.5), moved)} != sets[0]


@pytest.mark.parametrize("name", ["beta_dpo", "beta_ipo", "beta_kto"])
@pytest.mark.parametrize("filter", ["weighted", "head", "tail", "head_tail"])
@pytest.mark.parametrize("by", ["margin", "gradient"])
def test_rounding_decides_nothing(name, filter, by):
    """Where the policy is the reference, its log-probs differ from it in the last places, others in each layout."""
    if (filter, by) == ("weighted", "gradient"):
        by = "margin"
    kept, betas = [], []
    for seed in range(5):
        noise = 2e-5 * torch.randn(2, 16, generator=torch.Generator().manual_seed(seed))
        same = pairs(16)
        pair = replace(same, policy_chosen_logps=same.reference_chosen_logps + noise[0])
        pair = replace(pair, policy_rejected_logps=same.reference_rejected_logps + noise[1])
        figures = loss_of(name, filter=filter, filter_by=by)(pair).figures
        kept.append(figures["kept"].tolist())
        betas.append(figures["beta"].item())
    assert all(some == kept[0] for some in kept)
    assert 0 < sum(kept[0]) < 16
    assert betas == pytest.approx([0.1] * 5, rel=1e-4)


OBJECTIVES = {
    "beta_dpo": partial(dpo, beta=0.1, label_smoothing=0.0),
    "beta_ipo": partial(ipo, beta=0.1, average="sequence"),
    "beta_kto": partial(kto_paired, beta=0.1, gradient_of_baseline=True),
    "beta_simpo": partial(simpo, beta=2.0, gamma_beta_ratio=0.5),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("level", ["batch", "population", "instance"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_dynamics_and_filter_it_is_its_objective_to_the_bit(name, level, dtype):
    loss = loss_of(name, level=level, alpha=0.0, keep=1.0)
    for seed in range(3):
        pair = pairs(7, seed, dtype)
        for mine, theirs in zip(gradient(loss, pair), gradient(OBJECTIVES[name], pair), strict=True):
            if (name, level) == ("beta_ipo", "instance"):  # whose 1 / (2 beta) is then one of float32
                assert torch.allclose(mine, theirs, rtol=1e-5)
            else:
                assert torch.equal(mine, theirs)


def test_the_other_limits_are_exact_too():
    for seed in range(3):
        pair = pairs(7, seed, torch.float32)
        for name, options, objective in (
            ("dr_dpo", {"beta_prime": 1e12}, OBJECTIVES["beta_dpo"]),
            ("alpha_dpo", {"alpha": 0.0, "beta": 2.0, "gamma_beta_ratio": 0.5}, OBJECTIVES["beta_simpo"]),
        ):
            for mine, theirs in zip(gradient(loss_of(name, **options), pair), gradient(objective, pair), strict=True):
                assert torch.equal(mine, theirs), name


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-200, 200), min_size=1, max_size=8), st.floats(0.05, 100))
def test_dr_dpo_against_numpy(values, beta_prime):
    h = np.array(values)
    zeros = torch.zeros(len(h), dtype=torch.float64)
    pair = PairLogps(torch.tensor(h), zeros, zeros, zeros, zeros + 1, zeros + 1, row_ids=torch.arange(len(h)))
    losses, slopes = gradient(loss_of("dr_dpo", beta_prime=beta_prime), pair)
    each = -log_sigmoid(0.1 * h)
    robust = -beta_prime * (np.logaddexp.reduce(-each / beta_prime) - math.log(len(h)))
    assert losses.mean().item() == pytest.approx(robust, rel=1e-9, abs=1e-9)
    weights = np.exp(-each / beta_prime - np.logaddexp.reduce(-each / beta_prime)) * len(h)
    assert slopes[0].numpy() == pytest.approx(-weights * 0.1 / (1 + np.exp(0.1 * h)), rel=1e-9, abs=1e-12)


def test_sft_is_the_likelihood_of_a_chosen_token():
    """Of all chosen tokens of the step; the rejected ones, the reference and beta play no part."""
    pair = pairs(size=7, seed=5)
    n = numbers(pair)
    losses, (chosen, rejected) = gradient(loss_of("sft", beta=0.3), pair)
    tokens = n["chosen_lengths"].sum()
    assert losses.mean() == pytest.approx(-n["policy_chosen_logps"].sum() / tokens, rel=1e-12)
    assert (chosen / 7).tolist() == pytest.approx([-1 / tokens.item()] * 7)  # of their mean: each token weighs the same
    assert not rejected.any()
    moved = replace(pair, reference_chosen_logps=pair.reference_chosen_logps - 3)
    assert torch.equal(loss_of("sft", beta=9.0)(moved).losses, loss_of("sft", beta=0.3)(pair).losses)
    assert loss_of("sft", beta=9.0)(pair).chosen_rewards.tolist() == pytest.approx(9 * n["policy_chosen_logps"])


def test_dr_dpo_of_losses_that_have_no_exponential():
    """All of them 200 and more, and the least loss of the step as beta' goes to 0."""
    pair = replace(pairs(3, dtype=torch.float32), policy_chosen_logps=torch.tensor([-2e3, -3e3, -4e3]))
    losses, slopes = gradient(loss_of("dr_dpo", beta_prime=0.01), pair)
    assert losses.mean().item() == pytest.approx(OBJECTIVES["beta_dpo"](pair).losses.min().item(), abs=0.02)
    assert slopes.isfinite().all()
    assert slopes[0].tolist() == pytest.approx([-0.3, 0, 0])


def test_alpha_dpo_against_numpy():
    beta, gamma, alpha, means, stds = 2.5, 0.6, 0.2, [], []
    loss = loss_of("alpha_dpo")
    for step in range(4):
        n = numbers(pair := pairs(8, seed=step))
        policy, reference = (
            n[f"{of}_chosen_logps"] / n["chosen_lengths"] - n[f"{of}_rejected_logps"] / n["rejected_lengths"]
            for of in ("policy", "reference")
        )
        means.append((policy - reference).mean())
        stds.append((policy - reference).std(ddof=1))
        z = (policy - reference - running(means)) / running(stds)
        losses, slopes = gradient(loss, pair)
        logits = beta * (policy - gamma - alpha * z)
        assert losses.numpy() == pytest.approx(-log_sigmoid(logits))
        assert slopes[0].numpy() == pytest.approx(-beta / (1 + np.exp(logits)) / n["chosen_lengths"])
        logged = {name: value.item() for name, value in frozen(loss)(pair).figures.items()}
        assert logged == pytest.approx({"gaps/mean": running(means), "gaps/std": running(stds)})
    held_out = pairs(5, seed=9)
    n = numbers(held_out)
    policy, reference = (
        n[f"{of}_chosen_logps"] / n["chosen_lengths"] - n[f"{of}_rejected_logps"] / n["rejected_lengths"]
        for of in ("policy", "reference")
    )
    z = (policy - reference - running(means)) / running(stds)  # of training
    assert frozen(loss)(held_out).losses.numpy() == pytest.approx(-log_sigmoid(beta * (policy - gamma - alpha * z)))


def test_aot_against_numpy():
    """The k-th of the sorted gaps is the loss of the pair that has this gap."""
    beta, e = 0.1, 0.2
    n = numbers(pair := pairs(9))
    ours, theirs = (n[f"{of}_chosen_logps"] - n[f"{of}_rejected_logps"] for of in ("policy", "reference"))
    chosen, rejected = (n[f"policy_{side}_logps"] - n[f"reference_{side}_logps"] for side in ("chosen", "rejected"))
    for name, better, worse in (("aot", ours, theirs), ("aot_unpaired", chosen, rejected)):
        gaps = beta * (np.sort(better) - np.sort(worse))
        expected = np.zeros(9)
        expected[np.argsort(better)] = -(1 - e) * log_sigmoid(gaps) - e * log_sigmoid(-gaps)
        found = loss_of(name, label_smoothing=e)(pair)
        assert found.losses.numpy() == pytest.approx(expected)
        assert found.chosen_rewards.numpy() == pytest.approx(beta * chosen)
        assert found.rejected_rewards.numpy() == pytest.approx(beta * rejected)


@pytest.mark.parametrize("slope", [0, 1])
def test_at_least_0_has_one_slope_where_rounding_decides(slope):
    values = torch.tensor([-1.0, -2e-3, -1e-4, 0.0, 1e-4, 2e-3, 1.0], dtype=torch.float64, requires_grad=True)
    found = at_least_0(values, torch.tensor(1e-3), slope)
    assert torch.equal(found, values.clamp(min=0))
    assert torch.autograd.grad(found.sum(), values)[0].tolist() == [0, 0, slope, slope, slope, 1, 1]


@pytest.mark.parametrize(("name", "slope"), [("dpop", 0.05), ("kto_paired", 0.025)])
def test_of_equal_models(name, slope):
    """DPOP has the gradient of DPO; KTO for pairs has half of that, and half of this through its means."""
    _, slopes = gradient(loss_of(name, beta=0.1), equal(pairs(4)))
    assert slopes.tolist() == [pytest.approx([-slope] * 4), pytest.approx([slope] * 4)]


@pytest.mark.parametrize("flows", [True, False])
@pytest.mark.parametrize("sign", [1, -1])
def test_kto_for_pairs_against_numpy(flows, sign):
    """A mean log-ratio below 0 counts as 0, and has no gradient."""
    beta = 0.1
    pair = pairs(6)
    pair = replace(pair, reference_chosen_logps=pair.policy_chosen_logps - sign * torch.arange(1, 7.0))
    n = numbers(pair)
    a, b = (n[f"policy_{side}_logps"] - n[f"reference_{side}_logps"] for side in ("chosen", "rejected"))
    above, below = max(0, a.mean()), max(0, b.mean())
    losses, slopes = gradient(loss_of("kto_paired", gradient_of_baseline=flows), pair)
    wins, loses = (1 / (1 + np.exp(-beta * x)) for x in (a - below, above - b))
    assert losses.numpy() == pytest.approx(1 - (wins + loses) / 2)
    logged = {name: value.item() for name, value in loss_of("kto_paired")(pair).figures.items()}
    assert logged == pytest.approx({"baselines/chosen": above, "baselines/rejected": below})
    of_baseline = -beta * (loses * (1 - loses)).mean() / 2 if flows and sign > 0 else 0
    assert slopes[0].numpy() == pytest.approx(-beta * wins * (1 - wins) / 2 + of_baseline)


@pytest.mark.parametrize("name", sorted(page.stem for page in CONF.glob("*.yaml")))
def test_the_first_step_is_not_a_matter_of_rounding(name):
    """Where the policy is the reference, log-ratios are 0 up to rounding, which batch and device decide."""
    more = {"cdpo": {"label_smoothing": 0.1}, "ld_dpo": {"alpha": 0.5}}  # of those without a default
    exact = replace(equal(pairs(8)), **dict.fromkeys(READ["tails"], torch.zeros(8).double()))
    exact = replace(exact, **dict.fromkeys((*READ["alignment"], *READ["kl"]), torch.zeros(8).double()))
    exact = replace(exact, desirable=torch.arange(8) % 2 == 0)
    _, slopes = gradient(loss_of(name, **more.get(name, {})), exact)
    for seed in range(4):
        noise = 2e-5 * torch.rand(2, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1e-5
        policy = [exact.policy_chosen_logps + noise[0], exact.policy_rejected_logps + noise[1]]
        rounded = replace(exact, policy_chosen_logps=policy[0], policy_rejected_logps=policy[1])
        _, found = gradient(loss_of(name, **more.get(name, {})), rounded)
        assert found.numpy() == pytest.approx(slopes.numpy(), rel=5e-3, abs=5e-3 * slopes.abs().max().item())


def test_bco_against_numpy():
    beta, seen, loss = 0.1, [], loss_of("bco")
    for step in range(4):
        n = numbers(pair := pairs(5 + step, seed=step))
        a, b = (beta * (n[f"policy_{side}_logps"] - n[f"reference_{side}_logps"]) for side in ("chosen", "rejected"))
        before = np.mean(seen) if seen else 0.0
        expected = -log_sigmoid(a - before) - log_sigmoid(before - b)
        assert frozen(loss)(pair).losses.numpy() == pytest.approx(expected)
        seen.append(np.concatenate([a, b]).mean())
        expected = -log_sigmoid(a - np.mean(seen)) - log_sigmoid(np.mean(seen) - b)
        assert loss(pair).losses.numpy() == pytest.approx(expected)


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("same", [True, False])
def test_steps_of_one_pair(name, same):
    """And of a policy that is its reference."""
    loss = loss_of(name)
    for step in range(3):
        pair = pairs(1, seed=step, dtype=torch.float32, labels=name == "kto")
        if same:
            policy = {
                f"reference_{side}_logps": getattr(pair, f"policy_{side}_logps") for side in ("chosen", "rejected")
            }
            pair = replace(pair, **policy)
        for values in gradient(loss, pair):
            assert values.isfinite().all()
        assert all(values.isfinite().all() for values in metrics(pair, loss(pair)).values())


def test_a_step_of_one_pair_has_no_spread_to_learn_from():
    loss = loss_of("alpha_dpo")
    one, several = pairs(1), pairs(5)
    base = partial(simpo, beta=2.5, gamma_beta_ratio=0.6)
    for seed in range(2):
        assert torch.equal(loss(pairs(1, seed)).losses, base(pairs(1, seed)).losses)
    loss(several)
    before = loss.func.gaps.std.value.clone()
    assert not torch.equal(loss(one).losses, base(one).losses)
    assert loss.func.gaps.std.value == before > 0


@pytest.mark.parametrize("name", COUPLED)
def test_evaluation_moves_nothing_and_has_the_beta_of_the_config(name):
    loss, labels = loss_of(name), name == "kto"
    loss(pairs(6, seed=1, labels=labels))
    before = copy.deepcopy(unbound(loss).state_dict()) if isinstance(unbound(loss), torch.nn.Module) else {}
    held_out = pairs(6, labels=labels)
    found = frozen(loss)(held_out)
    if name in OBJECTIVES:
        assert torch.equal(found.losses, OBJECTIVES[name](held_out).losses)
        assert "beta" not in found.figures
    if before:
        assert unbound(loss).training
        assert all(torch.equal(value, before[key]) for key, value in unbound(loss).state_dict().items())
    assert torch.equal(frozen(loss)(held_out).losses, found.losses)


def test_a_state_that_is_saved_goes_on():
    for name in ("beta_dpo", "alpha_dpo", "bco"):
        whole, cut, resumed = (loss_of(name) for _ in range(3))
        for step in range(3):
            whole(pairs(6, seed=step))
            cut(pairs(6, seed=step))
        resumed.func.load_state_dict(cut.func.state_dict())
        for step in range(3, 5):
            assert torch.equal(whole(pairs(6, seed=step)).losses, resumed(pairs(6, seed=step)).losses)


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("beta_dpo", {"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ("beta_dpo", {"keep": 0.0}, r"keep must be in \(0, 1\], got 0.0"),
        ("beta_dpo", {"keep": 1.2}, "keep must be"),
        ("beta_dpo", {"least_beta": 0.0}, "least_beta must be above 0"),
        ("beta_dpo", {"momentum": -1.0}, "momentum must be"),
        ("beta_dpo", {"filter_by": "gradient"}, "goes by the margin, .* take filter=head, tail or head_tail"),
        ("alpha_dpo", {"alpha": -0.1}, "alpha must be at least 0"),
        ("alpha_dpo", {"gamma_beta_ratio": -0.1}, "gamma_beta_ratio must be"),
        ("dr_dpo", {"beta_prime": 0.0}, "beta_prime must be above 0"),
        ("aot", {"label_smoothing": 0.5}, "label_smoothing must be"),
        ("dr_dpo", {"objective": {"_target_": "dpo.losses.BCO", "_partial_": True}}, "no state of its own, got BCO"),
        ("beta_dpo", {"objective": {"_target_": "dpo.losses.BCO", "_partial_": True}}, "no state of its own, got BCO"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_planned(name, options, said):
    asked = node(name, **options)
    assert check_signature("loss", asked) == []
    with pytest.raises(ValueError, match=said):
        try_out(instantiate(asked))


@pytest.mark.parametrize(
    "objective, said",
    [
        ("dpo", "loss.objective must name its function in _target_, found 'dpo'"),
        (
            {"_target_": "os.system", "_partial_": True, "command": "true"},
            "loss.objective._target_ must name a function",
        ),
        (
            {"_target_": "dpo.judges.gold", "_partial_": True},
            "loss.objective._target_ must name a function, got dpo.judges",
        ),
        ({"_target_": "dpo.losses.hinge"}, "loss.objective._partial_ must be true"),
        ({"_target_": "dpo.losses.hinge", "_partial_": True, "beta": 0.1}, "loss.objective.beta is not an option"),
        ({"_target_": "dpo.losses.ipo", "_partial_": True}, "loss.objective.average must be given"),
        ({"_target_": "dpo.losses.ipo", "_partial_": True, "average": 1}, "loss.objective.average must be str, got 1"),
    ],
)
def test_an_objective_inside_of_a_loss_is_checked_as_that_is(objective, said):
    assert check_signature("loss", node("dr_dpo", objective=objective))[0].startswith(said)
    with pytest.raises(ValueError, match="must lie in"):
        instantiate(node("dr_dpo", objective={"_target_": "os.system", "_partial_": True, "command": "true"}))


def test_any_objective_goes():
    inside = {"_target_": "dpo.losses.hinge", "_partial_": True}
    for name in ("beta_dpo", "dr_dpo"):
        assert check_signature("loss", node(name, objective=inside)) == []
        pair = pairs(5)
        limit = {"beta_prime": 1e9} if name == "dr_dpo" else {"keep": 1.0, "alpha": 0.0}
        losses = loss_of(name, objective=inside, **limit)(pair).losses
        assert losses.tolist() == pytest.approx(hinge(pair, 0.1).losses.tolist(), rel=1e-6)
