"""The benchmark's contenders take the same steps, so their times compare."""

import importlib
from types import SimpleNamespace

import pytest
import torch

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    importlib.import_module("contenders")
    step = importlib.import_module("step")
    monkeypatch.setitem(step.SHAPES, "cpu", SHAPE)
    return step


def losses(step, names):
    pairs, vocabulary = step.workload("A", 3, None)
    options = SimpleNamespace(device="cpu", precision="fp32")
    reference = step.model(SHAPE, vocabulary, "cpu")
    seconds, table = step.score(reference, pairs, "fp32", "cpu")
    assert seconds > 0
    found = {}
    for name in names:
        contender = step.contender(name, pairs, vocabulary, table, options)
        found[name] = [contender.step([0, 1]), contender.step([2]), contender.step([0, 1])]
    return found


def test_every_ablation_takes_the_same_steps(step):
    found = losses(step, [step.OURS, *step.ABLATION])
    for values in found.values():
        assert values == pytest.approx(found[step.OURS], rel=1e-4)
    assert found[step.OURS][2] < found[step.OURS][0]


def test_trl_takes_the_same_steps(step):
    found = losses(step, [step.OURS, step.TRL, step.COMPACT, step.LIVE])
    for values in found.values():
        assert values == pytest.approx(found[step.OURS], rel=1e-4)


def test_arithmetic_by_hand(step):
    """One layer of width 2 and inner width 3, 5 words; a prompt of 2 tokens, responses of 2 and 1."""
    sizes = {"hidden_size": 2, "num_hidden_layers": 1, "intermediate_size": 3, "vocab_size": 5}
    policy = SimpleNamespace(config=SimpleNamespace(**sizes))
    pair = step.Pair([1, 2], [3, 4], [0])
    weights = 4 * 4 + 3 * 6  # of the layer
    seen = 1 + 2 + 3  # positions that each of the 3 tokens fed attends to
    unread = 2 * 18  # the feed-forward part at the prompt's first token
    forward = (
        2 * 3 * weights - unread + 2 * seen * (2 + 2) + 2 * 3 * 10
    )  # scores and mixing of width 2; 3 tokens scored
    assert step.arithmetic(policy, [pair.branches]) == 3 * forward
    again = 2 * 2 * weights - unread + 2 * (1 + 2) * (2 + 2)  # the prompt for the second response
    assert step.arithmetic(policy, [([1, 2], [[3, 4]]), ([1, 2], [[0]])]) == 3 * (forward + again)


def test_the_sweep_counts_scoring_as_often_as_it_happens(step):
    found = {
        "contenders": {step.OURS: {"s/step": 8.0}, step.TRL: {"s/step": 16.0}},
        "scoring, s/pair": 1.0,
        "TRL's scoring, s/pair": 2.0,
    }
    assert step.sweep_ratio(found, again=False) == pytest.approx((2 + 9 * 2) / (1 + 9))
    assert step.sweep_ratio(found, again=True) == pytest.approx((9 * 2 + 9 * 2) / (1 + 9))


def test_workloads_have_the_lengths_they_should(step):
    pairs, _ = step.workload("A", 400, None)
    prompts = torch.tensor([len(pair.prompt_ids) for pair in pairs])
    assert 100 < prompts.median() < 140
    assert max(len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs) <= 512
    pairs, _ = step.workload("B", 50, None)
    assert all(700 <= len(pair.prompt_ids) <= 1000 for pair in pairs)
