"""What is drawn, against the model's own logits of each prompt alone; limits, batches, and the model as it was."""

import inspect
import random
from collections import Counter

import pytest
import torch
from conftest import CONFIGS, tiny_tokenizer
from torch import Tensor
from transformers import Lfm2Config, Lfm2ForCausalLM, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from dpo.data.tokens import decode
from dpo.policy import sampling
from dpo.policy.model import load, vocabulary
from dpo.policy.sampling import Sampling, sample

PROMPTS = [[1, 40], [1, *range(50, 70)], [1, 9, 12, 30]]  # their ids: BOS and text


@pytest.fixture(scope="module")
def llama():
    """A model that is sure of something, and a tokenizer with fewer tokens than it has rows."""
    tokenizer = tiny_tokenizer("llama")
    config = CONFIGS["llama"](vocab_size=len(tokenizer) + 3, eos_token_id=tokenizer.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(12)
    return model, tokenizer


def draw(llama, prompts, **changed):
    options = {"max_new_tokens": 2, "temperature": 1.0, "top_p": 1.0, "seed": 0, "batch_size": 1000, **changed}
    seed = options.pop("seed")
    return sample(*llama, prompts, Sampling(**options), seed)


@torch.no_grad()
def probabilities(llama, rows: list[list[int]], temperature: float, top_p: float) -> Tensor:
    """Of the token after each row, all of one length: the most likely ones that together have top_p, and no others."""
    model, tokenizer = llama
    tokens = vocabulary(tokenizer)
    p = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.float64)
    p[:, tokens] = (model(torch.tensor(rows)).logits[:, -1, tokens].double() / temperature).softmax(-1)
    for row in p:
        total = 0.0
        for token in row.argsort(descending=True).tolist():
            share = row[token].item()
            if total >= top_p:
                row[token] = 0
            total += share
    return p / p.sum(-1, keepdim=True)


def agree(found: list[int], expected: Tensor) -> bool:
    """Within five standard errors for each token that is likely enough, and nothing that cannot be."""
    counts, means = torch.bincount(torch.tensor(found), minlength=len(expected)), len(found) * expected
    likely = means >= 10
    assert likely.sum() > 3
    errors = ((counts - means).abs() / (means * (1 - expected)).sqrt())[likely]
    return bool((errors < 5).all()) and not counts[expected == 0].any()


@pytest.mark.parametrize("temperature,top_p", [(0.5, 0.5), (0.5, 1.0)])
def test_frequencies_at_a_temperature_within_a_nucleus(llama, temperature, top_p):
    """Of first tokens after prompts of unequal length in one batch, and of second ones after all of the first."""
    found = draw(llama, PROMPTS * 1500, temperature=temperature, top_p=top_p)
    for place, prompt in enumerate(PROMPTS):
        pairs = [one.response_ids for one in found[place::3]]
        assert agree([pair[0] for pair in pairs], probabilities(llama, [prompt], temperature, top_p)[0])
        pairs = [pair for pair in pairs if len(pair) == 2]
        firsts = sorted({pair[0] for pair in pairs})
        after = probabilities(llama, [[*prompt, first] for first in firsts], temperature, top_p)
        after = after[[firsts.index(pair[0]) for pair in pairs]]  # (draws, V)
        drawn = after.gather(1, torch.tensor(pairs)[:, 1:]).squeeze(1)
        assert drawn.all()
        mean = (after**2).sum(-1)
        spread = ((after**3).sum(-1) - mean**2).sum().sqrt()
        assert abs((drawn - mean).sum()) < 5 * spread  # probabilities of what is drawn are as large as they should be


def test_every_token_can_be_drawn(llama):
    """Without a nucleus, and none is so likely that others never come."""
    model, tokenizer = llama
    with torch.no_grad():
        model.lm_head.weight.div_(1200)
        found = draw(llama, PROMPTS[:1] * 6000, max_new_tokens=1, batch_size=3000)
        model.lm_head.weight.mul_(1200)
    assert {one.response_ids[0] for one in found} == set(vocabulary(tokenizer).tolist())


def test_every_prompt_has_random_numbers_of_its_own(llama):
    """Those of its seed and place, however many are drawn at once and whatever stands beside it."""
    found = [tuple(one.response_ids) for one in draw(llama, PROMPTS[:1] * 40, max_new_tokens=6)]
    assert len(set(found)) > 30
    for batch_size in (1, 7, 20):
        again = draw(llama, PROMPTS[:1] * 40, max_new_tokens=6, batch_size=batch_size)
        assert [tuple(one.response_ids) for one in again] == found
    mixed = [prompt if place % 3 else PROMPTS[1] for place, prompt in enumerate(PROMPTS[:1] * 40)]
    beside = [tuple(one.response_ids) for one in draw(llama, mixed, max_new_tokens=6, batch_size=16)]
    assert all(beside[place] == found[place] for place in range(40) if place % 3)
    other = [tuple(one.response_ids) for one in draw(llama, PROMPTS[:1] * 40, max_new_tokens=6, seed=1)]
    assert sum(one == two for one, two in zip(found, other, strict=True)) < 5


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_greedy_is_what_the_library_generates(tiny_model, kind, monkeypatch):
    """Token for token, for prompts of unequal length, in batches, read in passes, and after rows have left them."""
    model, tokenizer = load(tiny_model(kind))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    rng = random.Random(0)
    prompts = [[rng.randrange(10, 300) for _ in range(rng.randint(1, 24))] for _ in range(12)]

    def generated(ends: list[int]) -> list[list[int]]:
        """Each prompt by itself."""
        rows = [torch.tensor([ids]) for ids in prompts]
        options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": ends, "pad_token_id": 0, "use_cache": True}
        spare = sorted(set(range(model.config.vocab_size)).difference(vocabulary(tokenizer).tolist()))
        return [model.generate(row, suppress_tokens=spare, **options)[0, row.shape[1] :].tolist() for row in rows]

    free = generated([model.config.vocab_size - 1])
    model.generation_config.eos_token_id = ends = [tokenizer.eos_token_id, *(row[at] for at, row in enumerate(free))]
    expected = generated(ends)
    assert len({len(row) for row in expected}) > 1
    for tokens in (sampling.READ, 40):
        monkeypatch.setattr(sampling, "READ", tokens)
        found = draw((model, tokenizer), [*prompts, prompts[3]], max_new_tokens=16, temperature=0, batch_size=8)
        assert [one.response_ids for one in found] == [*expected, expected[3]]


@pytest.mark.parametrize("kind", ["hybrid", "recurrent"])
def test_a_model_with_recurrent_layers(kind):
    """Their states cannot be chosen by row: no row leaves. One that keeps no keys and values at all is refused."""
    tokenizer = tiny_tokenizer("llama")
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
    small = {"hidden_size": 32, "num_hidden_layers": 2, **ids}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        if kind == "recurrent":
            with pytest.raises(ValueError, match="must take past_key_values, found MambaForCausalLM"):
                draw((MambaForCausalLM(MambaConfig(**small)), tokenizer), PROMPTS)
            return
        model = Lfm2ForCausalLM(Lfm2Config(intermediate_size=48, **heads, **small)).eval()
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    prompts = [*PROMPTS, PROMPTS[0]]
    expected = [
        model.generate(torch.tensor([row]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0, len(row) :].tolist()
        for row in prompts
    ]
    assert len({len(row) for row in expected}) > 1
    found = draw((model, tokenizer), prompts, max_new_tokens=8, temperature=0)
    assert [one.response_ids for one in found] == expected


def test_batches_and_limits(llama, monkeypatch):
    """Each prompt is sampled once, at most batch_size at a time; one is read once, and what has ended no more."""
    model, tokenizer = llama
    asked, forward = [], model.forward

    def watched(input_ids, **named):
        asked.append(tuple(input_ids.shape))
        return forward(input_ids, **named)

    watched.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(model, "forward", watched)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, 77])
    prompts = [*PROMPTS, *PROMPTS, *PROMPTS[:2]]
    found = draw(llama, prompts, max_new_tokens=5, batch_size=3)
    assert [one.prompt_ids for one in found] == prompts
    read = [shape for shape in asked if shape[1] > 1]
    assert read == [(1, 21), (2, 4), (1, 2)]  # three times the longest; twice the next, and then the shortest
    assert max(rows for rows, width in asked if width == 1) == 3
    assert {len(one.response_ids) for one in found if not one.ended} == {5}
    assert all(one.response_ids[-1] in (tokenizer.eos_token_id, 77) for one in found if one.ended)

    asked.clear()
    monkeypatch.setattr(sampling, "READ", 50)  # tokens, with what fills up the rows
    draw(llama, [[*range(20, 20 + width)] for width in (15, 16, 14, 12, 13)], max_new_tokens=1)
    assert asked == [(3, 16), (2, 16)]

    asked.clear()
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, *range(30, 330)])
    ended = [len(one.response_ids) for one in draw(llama, PROMPTS[:1] * 64, max_new_tokens=8)]
    rows = [shape[0] for shape in asked[1:]]
    left = [sum(length > step for length in ended) for step in range(1, 8)]
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < 32
    assert all(few <= many <= max(few / 0.75, 1) for few, many in zip(left, rows, strict=False))


def test_the_text_of_a_response_is_that_before_its_end(llama, monkeypatch):
    """Also where the end is a token that has text."""
    model, tokenizer = llama
    drawn = draw(llama, PROMPTS * 100, max_new_tokens=6)
    [(often, _)] = Counter(one.response_ids[-2] for one in drawn if len(one.response_ids) > 1).most_common(1)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, often])
    found = draw(llama, PROMPTS * 400, max_new_tokens=6)
    ended = [one for one in found if one.ended and one.response_ids[-1] == often]
    assert len(ended) > 5
    assert any(len(one.response_ids) > 1 for one in ended)
    for one in found:
        told = one.response_ids[:-1] if one.ended else one.response_ids
        assert one.text == decode(one.prompt_ids, told, tokenizer)
        assert often not in told


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(llama, training):
    """It samples in evaluation mode, where nothing is random but the draws."""
    model, _ = llama
    own, modes = model.generation_config, []
    model.train(training)
    hook = model.register_forward_hook(lambda module, *_: modes.append(module.training))
    draw(llama, PROMPTS)
    hook.remove()
    assert set(modes) == {False}
    assert model.training is training
    assert model.generation_config is own
    model.eval()
