"""The comparison set against TRL's own code where that is right, else against numpy; limits, known values, optima."""

import importlib.util
import math
import os
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_config import config
from test_losses import LN2, log_sigmoid, pair, with_gradient

from dpo import losses
from dpo.losses import PairLogps, dpo
from dpo.losses.pairs import READ, metrics, tie_tolerance, try_out
from dpo.sweep.rehearse import _together, trials

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer

ROOT = Path(__file__).parents[2]
PAIRS, PROMPT, TOKENS = 12, 3, 9
BETA = 0.3


class Given:
    """Log-probs of tokens of pairs under a policy and a reference, made up; as TRL has them, and summed, as we do."""

    def __init__(self, seed: int = 0, spread: float = 1.0) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.lengths = torch.randint(1, TOKENS + 1, (2, PAIRS), generator=rng)
        places = torch.arange(PROMPT + TOKENS)
        self.mask = ((places >= PROMPT) & (places < PROMPT + self.lengths[..., None])).long()  # (2, PAIRS, T)
        shape = (2, PAIRS, PROMPT + TOKENS - 1)
        self.policy = -3 * torch.rand(shape, generator=rng, dtype=torch.float64)
        self.reference = self.policy - spread * torch.randn(shape, generator=rng, dtype=torch.float64)
        self.sum_squares = -0.01 * torch.rand(shape, generator=rng, dtype=torch.float64)  # log sum_v p(v)^2

    def sums(self, policy: torch.Tensor) -> PairLogps:
        scored = self.mask[..., 1:]
        place = scored.cumsum(-1)
        tail = scored * (place > self.lengths.flip(0)[..., None])  # beyond the other response
        sums, tails = ([(one * of).sum(-1) for one in (policy, self.reference)] for of in (scored, tail))
        alignment = ((policy.detach() - self.sum_squares) * scored).sum(-1) / self.lengths
        more = dict(zip((*READ["tails"], *READ["alignment"]), (*tails[0], *tails[1], *alignment), strict=True))
        return PairLogps(*sums[0], *sums[1], *self.lengths, **more)

    def trl(self, policy: torch.Tensor, row: int, loss_type: str | list[str], **options) -> torch.Tensor:
        """The loss of one pair by TRL's own method, on a model that gives these log-probs."""
        types = [loss_type] if isinstance(loss_type, str) else loss_type

        def model(log_probs: torch.Tensor, **_) -> SimpleNamespace:
            none = torch.zeros_like(log_probs)
            return SimpleNamespace(
                log_probs=log_probs * self.mask[:, row, 1:],  # 0 where no label is
                log_sum_sq_probs=self.sum_squares[:, row],
                entropy=none,
                mean_logits=none,
                is_top1=none.bool(),
            )

        trainer = SimpleNamespace(
            model=SimpleNamespace(training=True, is_gradient_checkpointing=False, _modules={}),
            ref_model=lambda **_: model(self.reference[:, row]),
            accelerator=SimpleNamespace(
                device="cpu", gather=lambda value: value, gather_for_metrics=lambda value: value
            ),
            args=SimpleNamespace(gradient_checkpointing_kwargs=None),
            **{"aux_loss_enabled": False, "precompute_ref_logps": False, "loss_types": types, "loss_weights": None},
            **{"_metrics": {"train": _Anything()}, "_total_train_tokens": 0, "_tp_size": 1},
        )
        settings = {"beta": BETA, "label_smoothing": 0.0, "ld_alpha": None, "use_weighting": False}
        settings |= {
            "f_divergence_type": "reverse_kl",
            "f_alpha_divergence_coef": 0.5,
            "loss_weights": [1.0] * len(types),
        }
        vars(trainer).update(settings | options)
        mask = self.mask[:, row]
        inputs = {"completion_mask": mask, "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask)}
        return DPOTrainer._compute_loss(
            trainer, lambda **given: model(policy[:, row], **given), inputs, return_outputs=False
        )


class _Anything(dict):
    def __missing__(self, key: str) -> list[float]:
        return []


@pytest.mark.parametrize(
    "name,ours,theirs",
    [
        ("dpo", {"label_smoothing": 0.0}, {"loss_type": "sigmoid"}),
        ("hinge", {}, {"loss_type": "hinge"}),
        ("ipo", {"average": "token"}, {"loss_type": "ipo"}),
        ("length_normalized", {}, {"loss_type": "sigmoid_norm"}),
        ("robust", {"label_smoothing": 0.2}, {"loss_type": "robust", "label_smoothing": 0.2}),
        ("exo", {"label_smoothing": 0.01}, {"loss_type": "exo_pair", "label_smoothing": 0.01}),
        ("nca", {}, {"loss_type": "nca_pair"}),
        ("sppo", {}, {"loss_type": "sppo_hard"}),
        ("apo_zero", {}, {"loss_type": "apo_zero"}),
        ("apo_down", {}, {"loss_type": "apo_down"}),
        ("rpo", {"alpha": 0.7}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}),
        *(("ld_dpo", {"alpha": alpha}, {"loss_type": "sigmoid", "ld_alpha": alpha}) for alpha in (0.0, 0.4, 1.0)),
        ("wpo", {}, {"loss_type": "sigmoid", "use_weighting": True}),
        *(
            ("f_dpo", {"divergence": ours, "alpha": 0.3}, {"loss_type": "sigmoid", "f_divergence_type": theirs, **more})
            for ours, theirs, more in (
                ("forward_kl", "forward_kl", {}),
                ("js", "js_divergence", {}),
                ("alpha", "alpha_divergence", {"f_alpha_divergence_coef": 0.7}),  # 1 - the paper's
                ("reverse_kl", "reverse_kl", {}),
            )
        ),
    ],
)
def test_trl_computes_the_same(name, ours, theirs):
    """The loss of each pair, and its gradient in each token."""
    given, close = Given(), {"rtol": 1e-6, "atol": 1e-9}  # some of TRL's constants are float32
    if "f_alpha_divergence_coef" in theirs:  # which TRL has in float32 alone
        given.policy, given.reference = given.policy.float(), given.reference.float()
        close = {"rtol": 1e-5, "atol": 1e-6}
    leaf, other = (given.policy.clone().requires_grad_() for _ in range(2))
    mine = getattr(losses, name)(given.sums(leaf), BETA, **ours).losses
    expected = torch.stack([given.trl(other, row, **theirs) for row in range(PAIRS)])
    assert torch.allclose(mine, expected, **close)
    mine.sum().backward()
    expected.sum().backward()
    assert torch.allclose(leaf.grad, other.grad, **close)
    assert leaf.grad.abs().sum() > 0.01
    if name == "wpo":  # whose weights TRL does not bound by 1
        assert (torch.stack(given.sums(leaf).asked("alignment")).sum(0) < 0).all()


def test_trl_computes_the_same_sft():
    """Of one pair; of several TRL takes the mean over the tokens of a micro-batch, as `sft` over those of a step."""
    given = Given()
    for row in range(PAIRS):
        leaf, other = (given.policy.clone().requires_grad_() for _ in range(2))
        mine, expected = losses.sft(given.sums(leaf).at(slice(row, row + 1)), BETA).losses, given.trl(other, row, "sft")
        assert mine.item() == pytest.approx(expected.item(), rel=1e-12)
        mine.sum().backward()
        expected.backward()
        assert torch.allclose(leaf.grad, other.grad, rtol=1e-12)


def test_trl_computes_the_same_without_a_reference():
    sums = Given().sums(Given().policy)
    chosen, rejected = sums.policy_chosen_logps, sums.policy_rejected_logps
    means = chosen / sums.chosen_lengths, rejected / sums.rejected_lengths
    settings = {"beta": BETA, "label_smoothing": 0.0, "alpha": 0.0, "simpo_gamma": 0.6}
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), **settings)
    trainer.loss_type = "sigmoid"
    expected, *rewards = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    found = losses.cpo(sums, BETA, alpha=0.0)
    assert torch.allclose(found.losses, expected)
    assert torch.allclose(torch.stack([found.chosen_rewards, found.rejected_rewards]), torch.stack(rewards))
    trainer.loss_type = "simpo"
    expected, *rewards = CPOTrainer.cpo_loss(trainer, *means)
    found = losses.simpo(sums, BETA, gamma_beta_ratio=2.0)
    assert torch.allclose(found.losses, expected)
    assert torch.allclose(torch.stack([found.chosen_rewards, found.rejected_rewards]), torch.stack(rewards))
    odds, *rewards, _, _ = ORPOTrainer.odds_ratio_loss(trainer, *means)  # beta log sigmoid of the log odds ratio
    found = losses.orpo(sums, BETA)
    assert torch.allclose(found.losses, -means[0] - odds)
    assert torch.allclose(torch.stack([found.chosen_rewards, found.rejected_rewards]), torch.stack(rewards).double())


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_values_against_numpy():
    """What TRL has not, or has otherwise: formulas of the papers on a few pairs."""
    sums = Given().sums(Given().policy)
    c, r, rc, rr, n, m = (value.numpy() for value in list(vars(sums).values())[:6])
    a, b = c - rc, r - rr
    d, minus_log_sigmoid = a - b, partial(np.logaddexp, 0.0)  # of -x
    assert (a < 0).any()
    assert (a > 0).any()
    expected = {
        "dpo": 0.8 * minus_log_sigmoid(-BETA * d) + 0.2 * minus_log_sigmoid(BETA * d),
        "r_dpo": minus_log_sigmoid(-(BETA * d + 0.1 * (n - m))),
        "dpop": minus_log_sigmoid(-BETA * (d - 5 * np.maximum(0, rc - c))),
        "ipo": (d - 1 / (2 * BETA)) ** 2,
        "chi_po": minus_log_sigmoid(-BETA * (np.exp(a) + a - np.exp(b) - b)),
        "cal_dpo": minus_log_sigmoid(-d) + 0.5 * ((a - 1 / (2 * BETA)) ** 2 + (b + 1 / (2 * BETA)) ** 2),
        "cpo": minus_log_sigmoid(-BETA * (c - r)) - 1.5 * c,
        "slic": np.maximum(0, 1.5 - c + r) - BETA * c,
    }
    options = {
        "dpo": {"label_smoothing": 0.2},
        "r_dpo": {"alpha": 0.1},
        "dpop": {"penalty": 5.0},
        "ipo": {"average": "sequence"},
        "chi_po": {"clip": None},
        "cal_dpo": {"weight": 0.5},
        "cpo": {"alpha": 1.5},
        "slic": {"delta": 1.5},
    }
    for name, values in expected.items():
        found = getattr(losses, name)(sums, BETA, **options[name]).losses.numpy()
        assert found == pytest.approx(values, rel=1e-9), name


SAME = pair([-10.0, -200.0], [-30.0, -7.0], [-10.0, -200.0], [-30.0, -7.0], lengths=(4, 8))


@pytest.mark.parametrize(
    "name,options,value",
    [
        ("robust", {"label_smoothing": 0.2}, LN2),
        ("length_normalized", {}, LN2),
        ("dpop", {"penalty": 50.0}, LN2),
        ("f_dpo", {"divergence": "forward_kl", "alpha": 0.5}, LN2),
        ("f_dpo", {"divergence": "js", "alpha": 0.5}, LN2),
        ("f_dpo", {"divergence": "alpha", "alpha": 0.5}, LN2),
        ("chi_po", {"clip": 1.0}, LN2),
        ("apo_zero", {}, 1.0),
        ("apo_down", {}, 1.0),
        ("sppo", {}, 1 / (2 * BETA**2)),
        ("nca", {}, 2 * LN2),
        ("cal_dpo", {"weight": 0.5}, LN2 + 1 / (4 * BETA**2)),
        ("exo", {"label_smoothing": 0.2}, -LN2 - math.log(0.2 * 0.8) / 2),
        ("r_dpo", {"alpha": 0.1}, math.log1p(math.exp(0.4))),  # the chosen response is 4 tokens shorter
    ],
)
def test_policy_equal_to_reference(name, options, value):
    loss = getattr(losses, name)(SAME, BETA, **options)
    assert loss.losses.tolist() == pytest.approx([value, value], rel=1e-12)
    if name != "r_dpo":
        assert loss.chosen_rewards.tolist() == pytest.approx([0, 0] if name != "chi_po" else [BETA, BETA])
        assert metrics(SAME, loss)["rewards/ties"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "name,options",
    [
        *(("dpo", {"label_smoothing": 0.0}), ("length_normalized", {}), ("chi_po", {"clip": None})),
        *(("f_dpo", {"divergence": kind, "alpha": 0.5}) for kind in ("forward_kl", "js", "alpha", "reverse_kl")),
    ],
)
def test_a_tie_is_as_wide_as_rounding_makes_rewards_differ(name, options):
    """At equal models whose log-probs are off by as much as two computations of them may be, either way."""
    logps = torch.tensor([[-20.0, -50.0], [-40.0, -30.0]], dtype=torch.float64)
    off = torch.stack([tie_tolerance(side) for side in logps])
    for lengths, least in (([[5, 8], [5, 8]], 0.99), ([[5, 8], [9, 2]], 0.5)):
        pair = PairLogps(logps[0] + off[0], logps[1] - off[1], *logps, *torch.tensor(lengths))
        loss = getattr(losses, name)(pair, BETA, **options)
        share = (loss.chosen_rewards - loss.rejected_rewards) / loss.tie_tolerance
        assert ((least < share) & (share < 1.01)).all()


@pytest.mark.parametrize(
    "loss",
    [
        partial(losses.robust, label_smoothing=0.0),
        partial(losses.r_dpo, alpha=0.0),
        partial(losses.dpop, penalty=0.0),
        partial(losses.f_dpo, divergence="reverse_kl", alpha=0.5),
        partial(losses.rpo, alpha=0.0),
        partial(losses.ld_dpo, alpha=1.0),
    ],
)
def test_limits_are_dpo_to_the_bit(loss):
    for dtype in (torch.float32, torch.float64):
        given = Given()
        sums = {name: value for name, value in vars(given.sums(given.policy)).items() if value is not None}
        pair = PairLogps(
            **{name: value.to(dtype) if value.is_floating_point() else value for name, value in sums.items()}
        )
        (leaf, *mine), (other, *theirs) = with_gradient(pair), with_gradient(pair)
        found, expected = loss(leaf, BETA), dpo(other, BETA, 0.0)
        assert torch.equal(found.losses, expected.losses)
        assert torch.equal(found.chosen_rewards, expected.chosen_rewards)
        assert torch.equal(found.rejected_rewards, expected.rejected_rewards)
        found.losses.sum().backward()
        expected.losses.sum().backward()
        for one, another in zip(mine, theirs, strict=True):
            assert torch.equal(one.grad, another.grad)


def test_limits_that_are_limits():
    """alpha -> 0 and 1 of f-DPO are the reverse and the forward KL; small log-ratios of chi-squared PO are DPO's."""
    sums = Given().sums(Given().policy)
    for alpha, divergence in ((1e-7, "reverse_kl"), (1 - 1e-9, "forward_kl")):
        found, expected = (losses.f_dpo(sums, BETA, name, alpha).losses for name in ("alpha", divergence))
        assert torch.allclose(found, expected, rtol=1e-4)
    close = pair([-10.0 + 1e-6], [-20.0 - 2e-6], -10.0, -20.0)
    found, expected = losses.chi_po(close, BETA, None).losses, dpo(close, 2 * BETA, 0.0).losses
    assert (found - LN2).item() == pytest.approx((expected - LN2).item(), rel=1e-4)


def test_swapping_a_pair_is_flipping_its_label():
    there, back = pair([-3.0], [-5.0], -4.0, -4.5), pair([-5.0], [-3.0], -4.5, -4.0)
    e = 0.2
    straight, swapped = dpo(there, BETA, e).losses, dpo(back, BETA, e).losses
    clean = {name: dpo(given, BETA, 0.0).losses for name, given in (("there", there), ("back", back))}
    assert straight.item() == pytest.approx(((1 - e) * clean["there"] + e * clean["back"]).item())
    # the mean of robust DPO over flipped labels is DPO on the clean one
    noisy = (1 - e) * losses.robust(there, BETA, e).losses + e * losses.robust(back, BETA, e).losses
    assert noisy.item() == pytest.approx(clean["there"].item())
    assert swapped.item() == pytest.approx(((1 - e) * clean["back"] + e * clean["there"]).item())


SHIFTED = {  # losses that a constant on both reference scores changes, here of responses of unequal length
    "dpo": False,
    "robust": False,
    "exo": False,
    "hinge": False,
    "r_dpo": False,
    "rpo": False,
    "length_normalized": True,
    "dpop": True,
    "f_dpo": True,
    "chi_po": True,
    "apo_zero": True,
    "apo_down": True,
    "sppo": True,
    "nca": True,
    "cal_dpo": True,
    "cpo": False,
    "slic": False,
}
OPTIONS = {
    **{"dpo": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.1}, "exo": {"label_smoothing": 0.1}},
    **{"r_dpo": {"alpha": 0.1}, "dpop": {"penalty": 1.0}, "f_dpo": {"divergence": "js", "alpha": 0.5}},
    **{"chi_po": {"clip": None}, "cal_dpo": {"weight": 0.5}, "rpo": {"alpha": 1.0}},
    **{"cpo": {"alpha": 1.0}, "slic": {"delta": 1.0}},
}


@pytest.mark.parametrize("name", SHIFTED)
def test_a_constant_on_both_references(name):
    """Changes nothing for those of the margin alone or of no reference, and all others."""
    loss = partial(getattr(losses, name), beta=BETA, **OPTIONS.get(name, {}))
    at, moved = (loss(pair([-3.0], [-5.0], s - 2.5, s - 4.0, (4, 8))).losses.item() for s in (0.0, 0.7))
    assert (at != pytest.approx(moved, rel=1e-9)) == SHIFTED[name]


@pytest.mark.parametrize("name", SHIFTED)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("off", [1e4, -1e4])
def test_a_log_ratio_of_ten_thousand_nats_has_a_loss_and_a_gradient(name, side, off):
    """Also where the reference is the less probable; in bf16-rounded float32."""
    values = {"chosen": (-20000.0, -20000.0), "rejected": (-20000.0, -20000.0)}
    values[side] = (-20000.0, -20000.0 - off)
    (c, rc), (r, rr) = values["chosen"], values["rejected"]
    given = PairLogps(
        *(value.bfloat16().float() for value in (torch.tensor([x]) for x in (c, r, rc, rr))), *torch.ones(2, 1)
    )
    leaf, *logps = with_gradient(given)
    loss = getattr(losses, name)(leaf, BETA, **OPTIONS.get(name, {}))
    loss.losses.sum().backward()
    for value in (loss.losses, *(one.grad for one in logps if one.grad is not None)):
        assert value.isfinite().all()


@pytest.mark.parametrize(
    "name", ["dpo", "robust", "exo", "r_dpo", "dpop", "chi_po", "cal_dpo", "rpo", "cpo", "slic", "f_dpo"]
)
def test_a_wrong_option_is_refused(name):
    given = pair([-3.0], [-5.0])
    for option in OPTIONS[name]:
        wrong = {"label_smoothing": 0.5, "divergence": "kl", "clip": 0.0}.get(option, -1e-3)
        with pytest.raises(ValueError, match=option):
            getattr(losses, name)(given, BETA, **{**OPTIONS[name], option: wrong})
    if name == "exo":
        with pytest.raises(ValueError, match="label_smoothing"):
            losses.exo(given, BETA, 0.0)
    if name == "f_dpo":
        with pytest.raises(ValueError, match="alpha"):
            losses.f_dpo(given, BETA, "js", 1.0)


@pytest.mark.parametrize(
    "name,options,better,worse",
    [
        ("robust", {"label_smoothing": 0.1}, 1.0, -1.5),
        ("exo", {"label_smoothing": 0.1}, 1.0, -1.5),
        ("length_normalized", {}, 0.2, -0.1875),
        ("r_dpo", {"alpha": 0.1}, 1.5, -0.7),
        ("dpop", {"penalty": 2.0}, 1.0, -1.5),
        ("f_dpo", {"divergence": "forward_kl", "alpha": 0.5}, 0.5 * (1 - math.exp(-2)), 0.5 * (1 - math.exp(3))),
        ("f_dpo", {"divergence": "js", "alpha": 0.5}, 0.5 * (LN2 + log_sigmoid(2)), 0.5 * (LN2 + log_sigmoid(-3))),
        ("f_dpo", {"divergence": "alpha", "alpha": 0.5}, 1 - math.exp(-1), 1 - math.exp(1.5)),
        ("chi_po", {"clip": None}, 0.5 * (math.exp(2) + 2), 0.5 * (math.exp(-3) - 3)),
        ("apo_zero", {}, 1.0, -1.5),
        ("apo_down", {}, 1.0, -1.5),
        ("sppo", {}, 1.0, -1.5),
        ("nca", {}, 1.0, -1.5),
        ("cal_dpo", {"weight": 0.5}, 1.0, -1.5),
        ("rpo", {"alpha": 1.0}, 1.0, -1.5),
        ("cpo", {"alpha": 1.0}, -5.0, -12.0),
        ("slic", {"delta": 1.0}, -10.0, -24.0),
    ],
)
def test_rewards_are_the_implicit_ones(name, options, better, worse):
    """By hand, of responses of 5 and 8 tokens with log-ratios of 2 and -3, at beta 0.5."""
    found = getattr(losses, name)(pair([-10.0], [-24.0], -12.0, -21.0, (5, 8)), 0.5, **options)
    assert (found.chosen_rewards.item(), found.rejected_rewards.item()) == pytest.approx((better, worse))


def test_clipped_pairs_have_no_gradient():
    leaf, chosen, _ = with_gradient(pair([-3.0, -3.0], [-5.0, -5.0], [-3.1, -5.5], -5.0))
    losses.chi_po(leaf, 1.0, clip=1.0).losses.sum().backward()
    assert chosen.grad[0] < 0
    assert chosen.grad[1] == 0


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha"])
def test_a_vanished_response_has_no_gradient(divergence):
    leaf, chosen, _ = with_gradient(pair([-200.0], [-5.0], -5.0, -5.0))
    losses.f_dpo(leaf, BETA, divergence, 0.9).losses.sum().backward()
    assert chosen.grad.item() == 0


def test_try_out_passes_where_ratios_overflow():
    for name in ("f_dpo", "chi_po", "dpop", "sppo", "cal_dpo"):
        try_out(partial(getattr(losses, name), beta=BETA, **OPTIONS.get(name, {})))
    try_out(partial(losses.f_dpo, beta=BETA, divergence="forward_kl", alpha=0.5))


def with_kl(chosen: float, rejected: float) -> tuple[PairLogps, torch.Tensor, torch.Tensor]:
    kls = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (chosen, rejected)]
    return replace(pair([-10.0], [-24.0], -12.0, -21.0), chosen_kl=kls[0], rejected_kl=kls[1]), *kls


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_tdpo(stop_gradient):
    """By hand, of log-ratios of 2 and -3: TDPO1 and TDPO2 have one value at alpha 1, and other gradients."""
    for alpha in (0.5, 1.0):
        given, chosen, rejected = with_kl(0.4, 1.6)
        found = losses.tdpo(given, 0.5, alpha, stop_gradient)
        logit = 0.5 * (5 - alpha * 1.2)
        assert found.losses.item() == pytest.approx(-log_sigmoid(logit))
        assert (found.chosen_rewards.item(), found.rejected_rewards.item()) == pytest.approx((1.2, -0.7))
        found.losses.sum().backward()
        slope = 0.5 * alpha / (1 + math.exp(logit))  # more KL on the rejected response costs
        assert rejected.grad.item() == pytest.approx(slope)
        assert (chosen.grad is None) if stop_gradient else (chosen.grad.item() == pytest.approx(-slope))


def test_tdpo_without_its_kl_is_dpo():
    given, *_ = with_kl(0.4, 1.6)
    assert torch.equal(losses.tdpo(given, BETA, 0.0, True).losses, dpo(given, BETA, 0.0).losses)
    same = replace(SAME, chosen_kl=torch.zeros(2), rejected_kl=torch.zeros(2))
    found = losses.tdpo(same, BETA, 0.5, True)
    assert found.losses.tolist() == [LN2, LN2]
    assert metrics(same, found)["rewards/ties"].tolist() == [1.0, 1.0]


def test_wpo_weighs_a_pair_by_its_alignment():
    """exp of the two, at most 1."""
    given = pair([-10.0] * 3, [-24.0] * 3, -12.0, -21.0)
    chosen, rejected = (torch.tensor(value, dtype=torch.float64) for value in ([-1.0, 0.0, 3.0], [-2.0, 0.0, -1.0]))
    found = losses.wpo(replace(given, chosen_alignment=chosen, rejected_alignment=rejected), BETA)
    plain = dpo(given, BETA, 0.0)
    assert torch.allclose(found.losses, plain.losses * torch.tensor([math.exp(-3), 1, 1], dtype=torch.float64))
    assert torch.equal(found.losses[1:], plain.losses[1:])
    assert torch.equal(found.chosen_rewards, plain.chosen_rewards)


def test_a_tail_counts_less():
    """Log-ratios of 2 and -3, of which 0.5 and -1 lie beyond the other response; at alpha 0.25."""
    given = pair([-10.0], [-24.0], -12.0, -21.0)
    tails = [torch.tensor([value], dtype=torch.float64) for value in (-3.0, -9.0, -3.5, -8.0)]
    found = losses.ld_dpo(replace(given, **dict(zip(READ["tails"], tails, strict=True))), 0.5, 0.25)
    better, worse = 2 - 0.75 * 0.5, -3 + 0.75 * 1
    assert found.losses.item() == pytest.approx(-log_sigmoid(0.5 * (better - worse)))
    assert (found.chosen_rewards.item(), found.rejected_rewards.item()) == pytest.approx((0.5 * better, 0.5 * worse))


@pytest.mark.parametrize("name,option", [("ld_dpo", {"alpha": 1.1}), ("tdpo", {"alpha": -0.1, "stop_gradient": True})])
def test_a_wrong_weight_is_refused(name, option):
    with pytest.raises(ValueError, match="alpha"):
        getattr(losses, name)(pair([-3.0], [-5.0]), BETA, **option)


def test_what_was_not_asked_for_is_not_there():
    def unmarked(pair: PairLogps) -> losses.Loss:
        return losses.tdpo(pair, BETA, 1.0, False)

    with pytest.raises(ValueError, match=r"must be marked with losses.reads\('kl'\), found no chosen_kl"):
        try_out(unmarked)
    try_out(losses.reads("kl")(unmarked))


@pytest.fixture
def table():
    spec = importlib.util.spec_from_file_location("objectives_table", ROOT / "docs" / "objectives.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_the_docs_is_up_to_date(table):
    assert (ROOT / "docs" / "objectives.md").read_text() == table.text(), "python docs/objectives.py writes it again"


def test_the_table_says_what_each_objective_needs(table):
    rows = [line.strip("| ").split(" | ") for line in table.text().splitlines() if line.startswith("| ")][2:]
    found = {cells[0]: cells[4] for cells in rows}
    assert found.keys() == {page.stem for page in (ROOT / "conf" / "loss").glob("*.yaml")}
    assert {name for name, reference in found.items() if reference == "no"} >= {"simpo", "orpo", "cpo", "slic"}
    assert not {name for name, reference in found.items() if reference == "no"} & {*SHIFTED} - {"cpo", "slic"}
    assert (found["tdpo"], found["ld_dpo"], found["wpo"]) == ("live", "tokens", "yes")
    whole = losses.whole_step(lambda pair, beta: dpo(pair, beta, 0.0))
    assert table.needs(partial(whole, beta=0.1)) == "yes"


def test_a_row_needs_name_source_and_equation(table):
    assert table.parts("A, B (1, Eq. 2): f(x).\n\n    More.") == ("A, B", "1, Eq. 2", "f(x)")
    with pytest.raises(ValueError, match="must begin its docstring"):
        table.parts("Something else.")


@pytest.mark.parametrize(
    "given,said",
    [
        (["loss=tdpo"], "needs probabilities of all words under the reference, found dpo.references.Initial"),
        (["loss=ld_dpo", "loss.alpha=0.5", "reference=precomputed", "reference.path=."], "single tokens"),
        (["loss=ld_dpo", "loss.alpha=0.5", "reference=other_tokenizer", "reference.path=some/model"], "OtherTokenizer"),
        (["loss=ld_dpo", "loss.alpha=0.5"], None),
        (["loss=tdpo", "reference=live"], None),
        (["loss=tdpo", "reference=ema"], None),
        (["loss=wpo", "reference=precomputed", "reference.path=."], None),
    ],
)
def test_a_loss_and_a_reference_must_fit(given, said):
    asked = config(*given)
    if said is None:
        _together(asked["loss"], asked["reference"], single=False)
    else:
        with pytest.raises(ValueError, match=said):
            _together(asked["loss"], asked["reference"], single=False)


def test_what_does_not_fit_is_refused_when_planned():
    refused, accepted = trials([config("loss=tdpo"), config("loss=tdpo", "reference=live")])
    assert "needs probabilities of all words" in refused["problems"][0]
    assert accepted["problems"] == []
