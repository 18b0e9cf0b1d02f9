"""What a loss may ask for beyond sums over responses, against plain logits in float64, through the call of training."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from test_logps import pair_batch
from test_reference import PAIRS, settings
from torch import nn

from dpo import losses
from dpo.data.batches import collate_pairs
from dpo.losses import dpo
from dpo.losses.pairs import READ, asked_by
from dpo.policy import logps
from dpo.policy import model as models
from dpo.references import EMA, Initial, Live, ReferenceFree, Unconditional
from dpo.train import pair_logps, policy_values, step_of

KINDS = ["llama", "gpt2", "gemma2"]  # gemma2 has a soft-cap, gpt2 ties its head
ASKED = ("tails", "alignment", "kl")


def sharp(path: str, seed: int) -> nn.Module:
    model, _ = models.load(path)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


class Model:
    """A reference that is a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def logps(self, batch, split):
        return logps.sequence_logps(self.model, batch)[0]

    @torch.no_grad()
    def token_logps(self, batch, split):
        return logps.token_logps(self.model, batch)


def words(model: nn.Module, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-probs of all words at each token of a response."""
    ids = torch.tensor([[*prompt, *response]])
    return model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)


def plain(policy: nn.Module, reference: nn.Module, pairs) -> dict[str, torch.Tensor]:
    found: dict[str, list[torch.Tensor]] = {}
    for one in pairs:
        responses = {"chosen": one.chosen_ids, "rejected": one.rejected_ids}
        for (side, ids), other in zip(responses.items(), reversed(responses.values()), strict=True):
            mine, theirs = (words(model, one.prompt_ids, ids) for model in (policy, reference))
            for name, each in (("policy", mine), ("reference", theirs)):
                tokens = each[torch.arange(len(ids)), ids]
                found.setdefault(f"{name}_{side}_logps", []).append(tokens.sum())
                found.setdefault(f"{name}_{side}_tails", []).append(tokens[len(other) :].sum())
            tokens = mine[torch.arange(len(ids)), ids]
            found.setdefault(f"{side}_alignment", []).append((tokens - (mine.exp() ** 2).sum(-1).log()).mean())
            found.setdefault(f"{side}_kl", []).append((theirs.exp() * (theirs - mine)).sum())
    return {name: torch.stack(values) for name, values in found.items()}


@pytest.mark.parametrize("tile", [2**25, 300])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked_for_is_there(tiny_model, monkeypatch, kind, packed, tile):
    """Values, and gradients in the weights of what has one; of some tokens at a time, too."""
    from test_logps import PAIRS as pairs

    monkeypatch.setattr(logps, "TILE", tile)
    policy, reference = (sharp(tiny_model(kind), seed) for seed in (1, 2))
    found = pair_logps(policy, Model(reference), pair_batch(packed=packed), "train", ASKED)
    expected = plain(policy, reference, pairs)
    for name, value in expected.items():
        assert torch.allclose(getattr(found, name).double(), value, rtol=1e-4, atol=1e-4), name
    assert found.policy_rejected_tails[1] != 0
    weights = [*policy.parameters()]
    for names in (READ["kl"], READ["tails"][:2], ("policy_chosen_logps", "policy_rejected_logps")):
        mine, other = (
            torch.autograd.grad(
                sum((1 + place) * values[name].sum() for place, name in enumerate(names)), weights, **KEEP
            )
            for values in (vars(found), expected)
        )
        for one, another in zip(mine, other, strict=True):
            assert torch.allclose(one, another, rtol=1e-3, atol=1e-3 * another.abs().max().item() + 1e-6)
    assert not found.chosen_alignment.requires_grad
    assert not found.reference_chosen_tails.requires_grad


KEEP = {"retain_graph": True, "materialize_grads": True, "allow_unused": True}


def test_what_is_not_asked_for_costs_nothing(tiny_model):
    policy, _ = models.load(tiny_model("llama"))
    values = pair_logps(policy, Model(policy), pair_batch(), "train")
    assert all(getattr(values, name) is None for names in READ.values() for name in names)
    assert policy_values(policy, Model(policy), pair_batch(), ()).keys() == {
        "policy_chosen_logps",
        "policy_rejected_logps",
    }


def other_batch(rows):
    real = torch.ones(len(rows), dtype=torch.bool)
    return collate_pairs([PAIRS[row] for row in rows], torch.tensor(rows), real, pad_id=0, packed=False)


@pytest.mark.parametrize("made", [Initial, partial(Live, None), partial(EMA, 0.5, 1), ReferenceFree])
def test_every_reference_gives_the_tokens_of_its_sums(tmp_path, tiny_model, made):
    """In the order of the batch, whatever rows it has."""
    path = tiny_model("llama")
    policy, _ = models.load(path)
    reference = made().prepare(path, policy, {"train": PAIRS}, settings(tmp_path, per_token=True))
    batch = other_batch([2, 0])
    tokens = reference.token_logps(batch, "train")
    assert torch.allclose(logps.by_sequence(tokens, batch), reference.logps(batch, "train"), rtol=0, atol=1e-5)
    free = isinstance(reference, ReferenceFree)
    expected = torch.zeros(len(tokens)) if free else logps.token_logps(policy, batch).detach()
    assert torch.allclose(tokens, expected, atol=1e-5)


def test_tokens_of_held_out_pairs_are_their_own(tmp_path, tiny_model):
    """Of a reference that is the policy, where no two rows or splits have the same tails."""
    path = tiny_model("llama")
    policy, _ = models.load(path)
    splits = {"train": PAIRS[:2], "validation": PAIRS[::-1]}
    reference = Initial().prepare(path, policy, splits, settings(tmp_path, per_token=True))
    for split, pairs in splits.items():
        rows = torch.arange(len(pairs))
        batch = collate_pairs(pairs, rows, rows >= 0, pad_id=0, packed=False)
        found = pair_logps(policy, reference, batch, split, ("tails",))
        for side in ("chosen", "rejected"):
            ours, theirs = (getattr(found, f"{whose}_{side}_tails") for whose in ("policy", "reference"))
            assert torch.allclose(ours, theirs, atol=1e-5)
        assert found.policy_chosen_tails.count_nonzero() + found.policy_rejected_tails.count_nonzero() == 2


def test_a_reference_that_reads_no_prompt_gives_its_own_tokens(tmp_path, tiny_model):
    path = tiny_model("llama")
    policy, _ = models.load(path)
    reference = Unconditional(None, "").prepare(path, policy, {"train": PAIRS}, settings(tmp_path, per_token=True))
    batch = other_batch([1, 2])
    tokens = reference.token_logps(batch, "train")
    assert torch.allclose(logps.by_sequence(tokens, batch), reference.logps(batch, "train"), atol=1e-5)
    assert not torch.allclose(tokens, logps.token_logps(policy, batch).detach(), atol=1e-3)


def test_a_live_reference_is_the_model_at_its_path(tmp_path, tiny_model):
    policy, _ = models.load(tiny_model("llama"))
    moved = sharp(tiny_model("llama"), 3)
    moved.save_pretrained(tmp_path / "other")
    models.load_tokenizer(tiny_model("llama")).save_pretrained(tmp_path / "other")
    own, other = (
        Live(path).prepare(tiny_model("llama"), policy, {}, settings(tmp_path))
        for path in (None, str(tmp_path / "other"))
    )
    with pytest.raises(ValueError, match="must have the tokenizer of the policy"):
        Live(tiny_model("qwen2")).check(tiny_model("llama"), settings(tmp_path))
    assert (own.is_initial, own.kl_target) == (True, None)
    assert (other.is_initial, other.kl_target) == (False, str(tmp_path / "other"))
    assert other.fingerprint == models.fingerprint(moved) != own.fingerprint
    batch = other_batch([0, 1])
    before = logps.sequence_logps(policy, batch)[0].detach()
    expected = logps.sequence_logps(moved, batch)[0].detach()
    assert torch.allclose(other.logps(batch, "train"), expected, atol=1e-5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    own.after_step(policy)
    assert torch.allclose(own.logps(batch, "train"), before, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in own.model.parameters())


@pytest.mark.parametrize(
    "loss",
    [
        partial(losses.ld_dpo, beta=0.1, alpha=1.0),
        partial(losses.tdpo, beta=0.1, alpha=0.0, stop_gradient=True),
    ],
)
def test_limits_are_dpo_in_the_step_of_training(tiny_model, loss):
    policy, reference = (sharp(tiny_model("llama"), seed) for seed in (1, 2))
    batch = pair_batch(packed=False)
    found, expected = (
        step_of(policy, Model(reference), one, "train")(batch)[0]
        for one in (loss, partial(dpo, beta=0.1, label_smoothing=0.0))
    )
    assert torch.allclose(found, expected, rtol=1e-6)
    if asked_by(loss) == ("tails",):
        assert torch.equal(found, expected)


def test_a_loss_of_the_whole_step_may_ask_too(tiny_model):
    """Two passes of gradient caching: what has a gradient is computed again, with what was asked."""
    marked = losses.whole_step(losses.reads("kl", "tails")(lambda pair, beta: losses.tdpo(pair, beta, 1.0, False)))
    policy, reference = (sharp(tiny_model("llama"), seed) for seed in (1, 2))
    step = step_of(policy, Model(reference), partial(marked, beta=0.1), "train")
    values, outputs = step.values(pair_batch()), step.outputs(pair_batch())
    assert {name for name, value in values.items() if value.requires_grad} == outputs.keys()
    for name, value in outputs.items():
        assert torch.allclose(value, values[name], atol=1e-6)
    alone = losses.tdpo(
        replace(pair_logps(policy, Model(reference), pair_batch(), "train", ("kl",))), 0.1, 1.0, False
    ).losses
    assert torch.allclose(step.losses(values)[0], alone, atol=1e-6)


def test_kl_is_of_as_many_words(tiny_model):
    policy, other = models.load(tiny_model("llama"))[0], models.load(tiny_model("gpt2"))[0]
    if policy.config.vocab_size == other.config.vocab_size:
        other.resize_token_embeddings(policy.config.vocab_size + 1)
    with pytest.raises(ValueError, match="as many words of both"):
        pair_logps(policy, Model(other), pair_batch(packed=False), "train", ("kl",))
