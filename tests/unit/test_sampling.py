"""What is drawn, against the model's own logits of each prompt alone; limits, batches, and the model as it was."""

import itertools
from collections import Counter

import pytest
import torch
from conftest import CONFIGS, tiny_tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from dpo.data.tokens import decode
from dpo.policy.model import vocabulary
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
    """In its batch, and those of one batch are not those of the next."""
    found = [tuple(one.response_ids) for one in draw(llama, PROMPTS[:1] * 40, max_new_tokens=6, batch_size=20)]
    assert len(set(found)) > 30
    assert found[:20] != found[20:]


def test_batches_and_limits(llama, monkeypatch):
    """Each prompt is sampled once, in order, in batches of the size that is asked for."""
    model, tokenizer = llama
    asked, generate = [], model.generate

    def watched(input_ids, **named):
        asked.append((tuple(input_ids.shape), named["generation_config"]))
        return generate(input_ids, **named)

    monkeypatch.setattr(model, "generate", watched)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, 77])
    prompts = list(itertools.islice(itertools.cycle(PROMPTS), 8))
    found = draw(llama, prompts, max_new_tokens=5, batch_size=3)
    assert [one.prompt_ids for one in found] == prompts
    assert [shape for shape, _ in asked] == [(3, 21), (3, 21), (2, 21)]
    assert {len(one.response_ids) for one in found if not one.ended} == {5}
    assert {tuple(config.eos_token_id) for _, config in asked} == {(tokenizer.eos_token_id, 77)}


def test_the_text_of_a_response_is_that_before_its_end(llama, monkeypatch):
    """Also where the end is a token that has text."""
    model, tokenizer = llama
    [(often, _)] = Counter(one.response_ids[1] for one in draw(llama, PROMPTS * 100)).most_common(1)
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
