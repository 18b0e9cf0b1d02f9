"""Log-probabilities against plain logits in float64, the fast way against the plain one, KL against enumeration."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig, JambaConfig, LlamaConfig, LlamaForCausalLM

from dpo.data.batches import Batch, Pair, collate, collate_pairs
from dpo.losses import PairLogps, dpo
from dpo.policy import attention, logps
from dpo.policy import model as models
from dpo.policy.logps import HeadLogps, log_softmax, packable, sequence_kl, sequence_logps, token_kl, token_logps
from dpo.training.distributed import blocks

KINDS = ["gpt2", "llama", "mistral", "qwen2", "gpt_neox", "gemma2"]
SEQUENCES = [([5, 6, 7], [8, 9]), ([10] * 12, [11, 12, 13, 14]), ([15], [16]), ([17, 18], [19] * 9)]
PAIRS = [
    Pair([5, 6, 7], [8, 9], [9]),
    Pair([10, 11] * 6, [11, 12, 13, 14], [13, 14, 15] * 5),
    Pair([15], [16], [17, 3]),
]


def batch(sequences=SEQUENCES, packed: bool = False, pad_id: int = 0) -> Batch:
    real = torch.ones(len(sequences), dtype=torch.bool)
    return collate(sequences, torch.arange(len(sequences)), real, pad_id=pad_id, packed=packed)


def pair_batch(rows=(0, 1, 2), packed: bool = True) -> Batch:
    real = torch.ones(len(rows), dtype=torch.bool)
    return collate_pairs([PAIRS[row] for row in rows], torch.tensor(rows), real, pad_id=0, packed=packed)


@pytest.fixture
def sharp(tiny_model):
    """A tiny model that attends to some tokens much more than to others, so that a wrong mask shows."""

    def make(kind: str):
        model, _ = models.load(tiny_model(kind))
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.4)
        return model

    return make


class Table(nn.Module):
    """Stands in for a model: the logits are given."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits)


class Sized(Table):
    """With the size of its vocabulary."""

    def __init__(self, logits: torch.Tensor, vocabulary: int) -> None:
        super().__init__(logits)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=vocabulary))


def test_five_tokens_by_hand():
    """Prompt [0, 1], response [2, 0, 1]: token t is scored by the logits at t - 1, first and last too."""
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1], [0.25, 0.5, 0.25], [0.2, 0.2, 0.6]])
    five = batch([([0, 1], [2, 0, 1])])
    assert token_logps(Table(p.log()[None]), five).exp().tolist() == pytest.approx([0.7, 0.6, 0.5])
    logps, lengths = sequence_logps(Table(p.log()[None]), five)
    assert logps.item() == pytest.approx(math.log(0.7 * 0.6 * 0.5))
    assert lengths.tolist() == [3]


def test_bfloat16_logits_are_summed_in_float32():
    logits = torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, _ = sequence_logps(Table(logits), batch())
    assert found.dtype == torch.float32
    exact = []
    for row, (prompt, response) in enumerate(SEQUENCES):
        at = logits[row].double().log_softmax(-1)
        exact.append(sum(at[len(prompt) + i - 1, token].item() for i, token in enumerate(response)))
    assert found.tolist() == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("vocabulary", [50_000, 128_256])
def test_peaked_logits_of_large_vocabularies(vocabulary):
    """To the last places of float32 in both layouts, values and gradients, and KL, where torch's own form is biased."""
    generator = torch.Generator().manual_seed(0)
    logits, others = (4 * torch.randn(1, 12, vocabulary, generator=generator) for _ in range(2))
    likely = logits[0, 1:].topk(3).indices[:, 1].tolist()  # of each position the second
    given = batch([([0, 1], likely[:10])])
    exact = logits.double().requires_grad_()
    asked = torch.tensor(likely[:10])
    expected = exact.log_softmax(-1)[0, 1:11].gather(-1, asked[:, None]).squeeze(-1)
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    plain = logits.clone().requires_grad_()
    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: (held.append(one), one)[1], lambda one: one):
        found = token_logps(Table(plain), given)
    assert sum(one.numel() for one in held) < 1.01 * 10 * vocabulary  # one copy of the scored logits, no more
    found.sum().backward()
    assert (found - expected).abs().max() < 5e-7
    assert (plain.grad - gradient).abs().max() < 5e-7
    own = logits.log_softmax(-1)[0, 1:11].gather(-1, asked[:, None]).squeeze(-1)
    assert (own - expected).mean().abs() > 10 * (found - expected).mean().abs()  # else it would do

    states = logits[0, 1:11, :16].clone().requires_grad_()  # the head, from states of which four are the logits' scale
    head = torch.randn(vocabulary, 16, generator=generator)
    fused = HeadLogps.apply(states, head, None, asked, None)
    wide = states.detach().double().requires_grad_()
    right = (wide @ head.double().T).log_softmax(-1).gather(-1, asked[:, None]).squeeze(-1)
    (slope,) = torch.autograd.grad(right.sum(), wide)
    fused.sum().backward()
    assert (fused - right).abs().max() < 1e-6 * right.abs().max()
    assert (states.grad - slope).abs().max() < 1e-5

    ours, theirs = (one.double().log_softmax(-1)[0, 1:11] for one in (logits, logits + others / 40))
    right = (ours.exp() * (ours - theirs)).sum()
    _, kl = sequence_kl(*(Sized(one, vocabulary) for one in (logits, logits + others / 40)), given)
    assert kl.item() == pytest.approx(right.item(), abs=1e-5)
    assert sequence_kl(Sized(logits, vocabulary), Sized(logits, vocabulary), given)[1].item() == 0.0
    assert (log_softmax(logits[0, 1:11]) - ours).abs().max() < 1e-7 * ours.abs().max()


@pytest.mark.parametrize(
    "kind,attention", [(kind, "eager") for kind in KINDS] + [(kind, "sdpa") for kind in KINDS if kind != "gemma2"]
)  # the library has no soft-cap in sdpa
def test_padding_packing_neighbours_and_order_change_nothing(sharp, kind, attention):
    model = sharp(kind)
    model.set_attn_implementation(attention)
    alone = []
    for prompt, response in SEQUENCES:  # each by itself, from the plain logits in float64
        logits = model.double()(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        alone.append(sum(logits[len(prompt) + i - 1, token].item() for i, token in enumerate(response)))
    model.float()
    turned = [2, 0, 3, 1]
    with torch.no_grad():
        padded, lengths = sequence_logps(model, batch())
        packed, packed_lengths = sequence_logps(model, batch(packed=True))
        other, _ = sequence_logps(model, batch([SEQUENCES[i] for i in turned], packed=True))
        eos_padded, _ = sequence_logps(model, batch(pad_id=9))
    assert padded.tolist() == pytest.approx(alone, rel=1e-5)
    assert packed.tolist() == pytest.approx(alone, rel=1e-5)
    assert other.tolist() == pytest.approx([alone[i] for i in turned], rel=1e-5)
    assert torch.equal(padded, eos_padded)  # masks never look at token ids
    assert lengths.tolist() == packed_lengths.tolist() == [2, 4, 1, 9]


def gradient(model, batch, weights):
    model.zero_grad()
    (weights * sequence_logps(model, batch)[0]).sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_pairs_are_those_of_the_separate_forward(sharp, kind, monkeypatch):
    model, weights = sharp(kind), torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 0.7])
    alone = sum(
        gradient(model, batch([sequence]), weights[row])
        for row, sequence in enumerate([*(pair.chosen for pair in PAIRS), *(pair.rejected for pair in PAIRS)])
    )
    values, _ = sequence_logps(model, pair_batch(packed=False))
    for tile in (logps.TILE, 5 * 400):
        monkeypatch.setattr(logps, "TILE", tile)
        packed, _ = sequence_logps(model, pair_batch())
        assert packed.tolist() == pytest.approx(values.tolist(), rel=1e-5)
        for layout in (True, False):
            found = gradient(model, pair_batch(packed=layout), weights)
            assert (found - alone).abs().max() < 1e-5 * alone.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_layer_feeds_forward_what_is_scored(sharp, kind):
    """Each such position once: the first tokens of both responses are scored at the prompt's last."""
    model, seen = sharp(kind), []
    for block in blocks(model):
        block.mlp.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    packed = pair_batch()
    sequence_logps(model, packed)
    assert seen == [packed.input_ids.shape[1], len(packed.labels) - len(PAIRS)]
    sequence_logps(model, pair_batch(packed=False))
    assert seen[2] == seen[3]


def test_pairs_in_another_order_or_alone_are_the_same(sharp):
    model = sharp("llama")
    with torch.no_grad():
        together = sequence_logps(model, pair_batch())[0].view(2, 3)
        turned = sequence_logps(model, pair_batch((2, 0, 1)))[0].view(2, 3)
        alone = torch.stack([sequence_logps(model, pair_batch((row,)))[0] for row in range(3)], 1)
    assert torch.allclose(turned, together[:, [2, 0, 1]], rtol=1e-6)
    assert torch.allclose(alone, together, rtol=1e-6)


def test_fifty_steps_are_those_of_the_plain_forward(sharp):
    """DPO on pairs of three prompts: the losses of both layouts, micro-batched in different ways."""

    def losses(shares: list[tuple[int, ...]], packed: bool) -> list[float]:
        model = sharp("llama")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        start = sequence_logps(model, pair_batch(packed=False))[0].detach().view(2, 3)
        found = []
        for _ in range(50):
            optimizer.zero_grad()
            found.append(0.0)
            for rows in shares:
                ours = sequence_logps(model, pair_batch(rows, packed))[0].chunk(2)
                pair = PairLogps(*ours, *start[:, list(rows)], *torch.ones(2, len(rows)))
                loss = dpo(pair, 0.1, label_smoothing=0.0).losses.sum() / 3
                loss.backward()
                found[-1] += loss.item()
            optimizer.step()
        return found

    plain = losses([(0, 1, 2)], packed=False)
    assert plain[0] == pytest.approx(math.log(2), rel=1e-6)
    assert plain[-1] < 0.9 * plain[0]
    assert losses([(0, 1, 2)], packed=True) == pytest.approx(plain, rel=1e-5)
    assert losses([(2, 0), (1,)], packed=True) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("tile", [2**25, 3 * 11])
def test_the_head_is_a_log_softmax(dtype, tolerance, bias, cap, tile, monkeypatch):
    monkeypatch.setattr(logps, "TILE", tile)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, offset = (torch.randn(size, generator=generator, dtype=dtype) for size in ((7, 5), (11, 5), (11,)))
    labels, weights = torch.randint(11, (7,), generator=generator), torch.randn(7, generator=generator)
    outcomes = []
    for fused in (True, False):
        leaves = [one.clone().requires_grad_() for one in (hidden * 9, weight, offset)]  # some probabilities underflow
        states, matrix, shift = leaves[0], leaves[1], leaves[2] if bias else None
        if fused:
            found = HeadLogps.apply(states, matrix, shift, labels, cap)
        else:
            scores = nn.functional.linear(states, matrix, shift)
            scores = scores if cap is None else cap * torch.tanh(scores / cap)
            found = scores.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
        (found * weights).sum().backward()
        outcomes.append([found, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    assert len(outcomes[0]) == 3 + bias
    for mine, plain in zip(*outcomes, strict=True):
        assert mine.dtype == dtype
        assert (mine - plain).abs().max() < tolerance * plain.abs().max()


def test_the_head_under_autocast_is_that_of_the_library(sharp):
    model, weights = sharp("llama"), torch.ones(6)
    with torch.autocast("cpu", torch.bfloat16):
        fast, _ = sequence_logps(model, pair_batch())
        plain, _ = sequence_logps(model, pair_batch(packed=False))
    assert fast.dtype == plain.dtype == torch.float32
    assert (fast - plain).abs().max() < 0.02 * plain.abs().max()
    exact = gradient(model, pair_batch(), weights)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradient(model, pair_batch(), weights)
    assert rounded.dtype == torch.float32
    assert nn.functional.cosine_similarity(rounded, exact, dim=0) > 0.99


class TestBfloat16:
    """Products in bf16, long responses: what comes after the logits loses nothing. In bf16 it would lose whole nats."""

    TEXTS = (([5, 6, 7], 256), ([9] * 20, 512), ([5, 6, 7], 700))

    def items(self) -> list[tuple[list[int], list[int]]]:
        generator = torch.Generator().manual_seed(0)
        return [(prompt, torch.randint(10, 360, (n,), generator=generator).tolist()) for prompt, n in self.TEXTS]

    @pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])  # a head of its own, a tied one, a soft-capped one
    @pytest.mark.parametrize("packed", [True, False])
    def test_a_sum_is_that_of_its_own_logits_in_float64(self, sharp, kind, packed, monkeypatch):
        model, given = sharp(kind), batch(self.items(), packed)
        head = model.get_output_embeddings()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found, lengths = sequence_logps(model, given)
            if packed:
                logits = logps._states(model, given).bfloat16() @ head.weight.bfloat16().T
                cap = model.config.get_text_config().to_dict().get("final_logit_softcapping")
                logits = logits.double() if cap is None else cap * torch.tanh(logits.double() / cap)
            else:
                rows = {"input_ids": given.input_ids, "attention_mask": given.attention_mask}
                logits = model(**rows, position_ids=given.position_ids).logits.flatten(0, 1)[given.target_positions]
                assert logits.dtype == torch.bfloat16
        at, exact = 0, []
        for _, response in self.items():
            part = logits[at : at + len(response)].double().log_softmax(-1)
            exact.append(part[range(len(response)), response].sum().item())
            at += len(response)
        assert lengths.tolist() == [256, 512, 700]
        assert found.tolist() == pytest.approx(exact, abs=5e-3)  # of thousands of nats
        rounded = [
            sum(logits[row].bfloat16().log_softmax(-1)[token] for row, token in enumerate(self.items()[0][1])).item()
        ]
        assert abs(rounded[0] - exact[0]) > 0.5  # so would a log-softmax and a sum in bf16 say

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_products_cost_little_for_each_token(self, tiny_model, kind):
        """Against the same model in float32: 0.05 nats for a token, as a mean; packed and padded."""
        model, _ = models.load(tiny_model(kind))
        for packed in (True, False):
            given = batch(self.items(), packed)
            with torch.no_grad():
                exact, lengths = sequence_logps(model, given)
                with torch.autocast("cpu", torch.bfloat16):
                    found, _ = sequence_logps(model, given)
            assert found.dtype == torch.float32
            assert ((found - exact) / lengths).abs().max() < 0.05
            assert not torch.equal(found, exact)


def test_a_wrong_border_would_show(sharp, monkeypatch):
    """Responses that see each other give other numbers: the tests above can fail."""
    model = sharp("llama")
    with torch.no_grad():
        right = sequence_logps(model, pair_batch())[0]
        monkeypatch.setattr(attention, "attends", lambda branch, position, other, others, window: position >= others)
        assert not torch.allclose(sequence_logps(model, pair_batch())[0], right, rtol=1e-3)


ITEMS = [pair.prompt_responses for pair in PAIRS]
SMALL = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
SCALED = {
    "granite": lambda: GraniteConfig(logits_scaling=8.0, num_hidden_layers=2, initializer_range=0.4, **SMALL),
    "cohere": lambda: CohereConfig(logit_scale=0.25, num_hidden_layers=2, initializer_range=0.4, **SMALL),
}


class TestPackable:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_usual_models_are(self, sharp, kind):
        assert packable(sharp(kind), ITEMS)

    def test_a_wrong_mask_falls_back_and_says_so(self, sharp, monkeypatch, capfd):
        monkeypatch.setattr(attention, "attends", lambda branch, position, other, others, window: position >= others)
        assert not packable(sharp("llama"), ITEMS)
        said = capfd.readouterr().out
        assert "since packed ones of LlamaForCausalLM have others than its own forward: -" in said

    @pytest.mark.parametrize("kind", SCALED)
    def test_scaled_logits_are_packed(self, kind):
        torch.manual_seed(1)
        policy, reference = (AutoModelForCausalLM.from_config(SCALED[kind]()).eval() for _ in range(2))
        assert packable(policy, ITEMS)
        (packed, kl), (plain, expected) = (
            (sequence_logps(policy, one)[0], sequence_kl(policy, reference, one)[1])
            for one in (pair_batch(), pair_batch(packed=False))
        )
        assert packed.tolist() == pytest.approx(plain.tolist(), rel=1e-5)
        assert kl.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
        weights = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 0.7])
        found, exact = (gradient(policy, pair_batch(packed=layout), weights) for layout in (True, False))
        assert (found - exact).abs().max() < 1e-5 * exact.abs().max()

    def test_layers_of_several_kinds_fall_back(self, capfd):
        """One of eight of this one attends, the others have states."""
        config = JambaConfig(
            num_key_value_heads=2, num_experts=2, num_hidden_layers=8, use_mamba_kernels=False, **SMALL
        )
        model = AutoModelForCausalLM.from_config(config).eval()
        assert len(blocks(model)) == 8
        assert not packable(model, ITEMS)
        assert "1 of its 8 layers attend" in capfd.readouterr().out

    def test_layers_that_attend_in_their_own_way_fall_back_and_say_so_once(self, sharp, capfd):
        model = sharp("llama")
        forward = model.model.layers[1].self_attn.forward

        def own_way(*args, prefix_mask, **kwargs):
            model.config._attn_implementation = "eager"
            return forward(*args, **kwargs)

        model.model.layers[1].self_attn.forward = own_way
        for _ in range(2):
            assert not packable(model, ITEMS)
        said = capfd.readouterr().out
        assert said.count("1 of its 2 layers") == 1
        assert said.startswith("log-probs: of padded rows, since LlamaForCausalLM")

    def test_a_forward_that_needs_a_mask_falls_back_and_says_why(self, sharp, capfd):
        model = sharp("llama")
        forward = model.model.forward
        model.model.forward = lambda *given, attention_mask=None, **named: forward(
            *given, attention_mask=attention_mask.to("cpu"), **named
        )
        assert not packable(model, ITEMS)
        assert "cannot be given packed ones: AttributeError" in capfd.readouterr().out

    def test_another_head_falls_back(self, sharp):
        class Scaled(nn.Linear):
            pass

        model = sharp("llama")
        model.lm_head.__class__ = Scaled
        assert not packable(model, ITEMS)


class TestKl:
    """A language model small enough to list all it can say: 4 tokens, one of them EOS, cut after 4."""

    EOS, LENGTH = 3, 4

    def models(self, rows=(4, 4)) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
        made = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            made.append(
                LlamaForCausalLM(
                    LlamaConfig(
                        vocab_size=rows[seed],
                        hidden_size=16,
                        intermediate_size=16,
                        num_hidden_layers=1,
                        num_attention_heads=2,
                        initializer_range=1.0,
                    )
                ).eval()
            )
        return made[0], made[1]

    def strings(self) -> list[list[int]]:
        open_ended = [list(s) for n in range(self.LENGTH) for s in itertools.product(range(self.EOS), repeat=n)]
        ended = [[*s, self.EOS] for s in open_ended]
        return ended + [list(s) for s in itertools.product(range(self.EOS), repeat=self.LENGTH)]

    @pytest.mark.parametrize("packed", [False, True])
    def test_both_estimates_have_the_exact_mean_and_one_has_less_spread(self, packed, monkeypatch):
        monkeypatch.setattr(logps, "TILE", 4 * 50)  # several tiles
        policy, reference = self.models()
        everything = batch([([0], response) for response in self.strings()], packed)
        with torch.no_grad():
            mine, theirs = (sequence_logps(model, everything)[0].double() for model in (policy, reference))
        p = mine.exp()
        assert p.sum().item() == pytest.approx(1, abs=1e-5)  # all that can be said has been listed
        exact = (p * (mine - theirs)).sum().item()
        plain, rao_blackwell = (estimate.double() for estimate in sequence_kl(policy, reference, everything))
        assert (p * plain).sum().item() == pytest.approx(exact, abs=1e-5)
        assert (p * rao_blackwell).sum().item() == pytest.approx(exact, abs=1e-5)
        assert exact > 0.05
        spread = [(p * (estimate - exact) ** 2).sum().item() for estimate in (plain, rao_blackwell)]
        assert spread[1] < spread[0]
        assert rao_blackwell.min() >= 0
        assert plain.min() < 0

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("rows", [(7, 5), (5, 7), (6, 6), (4, 7)])
    def test_rows_that_are_no_tokens_count_for_neither_model(self, packed, rows, monkeypatch):
        """Against plain logits in NumPy: the process that is sampled never draws such a row."""
        monkeypatch.setattr(logps, "TILE", 7 * 50)
        policy, reference = self.models(rows)
        strings = self.strings()
        everything = batch([([0], response) for response in strings], packed)

        def by_token(model, response: list[int]) -> np.ndarray:  # (tokens, 4)
            with torch.no_grad():
                z = model(torch.tensor([[0, *response[:-1]]])).logits[0, :, :4].double().numpy()
            return z - np.log(np.exp(z).sum(-1, keepdims=True))

        p, log_ratios, by_rule = [], [], []
        for response in strings:
            mine, theirs = by_token(policy, response), by_token(reference, response)
            at = range(len(response)), response
            p.append(np.exp(mine[at].sum()))
            log_ratios.append((mine[at] - theirs[at]).sum())
            by_rule.append((np.exp(mine) * (mine - theirs)).sum())
        assert sum(p) == pytest.approx(1)
        plain, rao_blackwell = sequence_kl(policy, reference, everything, torch.arange(4))
        assert plain.tolist() == pytest.approx(log_ratios, rel=1e-5, abs=5e-5)
        assert rao_blackwell.tolist() == pytest.approx(by_rule, rel=1e-5, abs=1e-5)
        assert np.dot(p, rao_blackwell.numpy()) == pytest.approx(np.dot(p, log_ratios), abs=1e-4)  # KL, both ways

    def test_no_distance_to_itself(self):
        policy, _ = self.models()
        for packed in (False, True):
            plain, rao_blackwell = sequence_kl(policy, policy, batch([([0], [1, 2, 3])], packed))
            assert plain.tolist() == rao_blackwell.tolist() == [0.0]


def test_token_kl_has_its_direction():
    policy, reference = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])
    expected = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert token_kl(policy.log(), reference.log()).item() == pytest.approx(expected, abs=1e-6)
