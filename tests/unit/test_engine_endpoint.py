"""The engine behind a server: a real one on this machine that samples from the policy's weights by other code."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from serving import Served, serving
from transformers import AutoModelForCausalLM
from whole_runs import SMALL, frozen, own

from dpo import generate, sft
from dpo.engines import Endpoint, closing, seed_of
from dpo.policy import model as models
from dpo.policy.sampling import Sampling, sample
from dpo.sweep.inputs import load

OPTIONS = {"key": None, "concurrency": 3, "timeout": 60.0, "retries": 1, "requests_per_minute": None, "prices": None}
GREEDY = Sampling(6, 0.0, 1.0, 8)
WARM = Sampling(6, 1.0, 0.9, 8)
TRIES = 8  # requests of a handshake, of which one is of top_p


@pytest.fixture(scope="module")
def policy(tiny_model):
    return models.load(tiny_model("llama"))


@pytest.fixture
def served(tiny_model):
    return Served("policy", folder=tiny_model("llama"))


@pytest.fixture
def prompts(policy):
    _, tokenizer = policy
    return [tokenizer(text)["input_ids"] for text in ("hello there", "tell me about cats", "hello there", "Rome")]


def engine(url, tmp_path, **changed):
    return Endpoint("policy", changed.pop("tolerance", 1e-3), str(tmp_path), {**OPTIONS, "url": url, **changed})


def test_greedy_responses_are_those_of_this_process(policy, served, prompts, tmp_path):
    with serving(served) as url:
        found = engine(url, tmp_path)(*policy, prompts, range(4), GREEDY, 0, "sampling")
    assert found == sample(*policy, prompts, GREEDY, 0, "")


def test_a_response_is_that_of_its_seed_and_place(policy, served, prompts, tmp_path):
    """However many are asked for at once, and whatever else; another seed draws others, and each of equal prompts."""
    with serving(served) as url:
        found = engine(url, tmp_path / "a")(*policy, prompts, range(4), WARM, 0, "")
        alone = engine(url, tmp_path / "b", concurrency=1)(*policy, prompts[:2], range(2), WARM, 0, "")
        other = engine(url, tmp_path / "c")(*policy, prompts, range(4), WARM, 1, "")
        last = engine(url, tmp_path / "d")(*policy, prompts[2:], [2, 3], WARM, 0, "")
    assert alone == found[:2]
    assert last == found[2:]
    assert [one.response_ids for one in other] != [one.response_ids for one in found]
    assert found[0].response_ids != found[2].response_ids
    seeds = {seed_of(seed, place) for seed in range(30) for place in range(30)}
    assert len(seeds) == 900
    sent = served.asked[TRIES : TRIES + len(prompts)]
    assert {one["seed"] for one in sent} == {seed_of(0, place) for place in range(4)}
    for one in sent:
        assert (one["max_tokens"], one["temperature"], one["top_p"]) == (6, 1.0, 0.9)


def test_ids_that_are_no_tokens_are_never_drawn(policy, served, prompts, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy[0].name_or_path), policy[1]
    with torch.no_grad():
        likely = 200 * model.lm_head.weight[3]
        model.lm_head.weight[len(tokenizer) :] = torch.stack([likely, -likely, likely])
        served.model.lm_head.weight.copy_(model.lm_head.weight)
    with serving(served) as url:
        found = engine(url, tmp_path)(model, tokenizer, prompts * 4, range(16), replace(WARM, top_p=1.0), 0, "")
    assert max(token for one in found for token in one.response_ids) < len(tokenizer)
    assert {len(one["logit_bias"]) for one in served.asked} == {3}


def test_what_was_sampled_is_kept_as_it_comes(policy, served, prompts, tmp_path):
    with serving(served) as url:
        served.faults += ["good"] * (TRIES + 2) + [500] * 9
        with pytest.raises(RuntimeError, match="must answer, found InternalServerError"):
            engine(url, tmp_path, concurrency=1)(*policy, prompts, range(4), WARM, 0, "")
        served.faults.clear()
        paid = len(served.spent)
        assert paid == TRIES + 2
        found = engine(url, tmp_path)(*policy, prompts, range(4), WARM, 0, "")
        assert len(served.spent) == paid + TRIES + 2
        assert engine(url, tmp_path)(*policy, prompts, range(4), WARM, 0, "") == found
        assert len(served.spent) == paid + TRIES + 2 + TRIES
        for changed in (replace(WARM, temperature=0.5), replace(WARM, top_p=1.0), replace(WARM, max_new_tokens=3)):
            paid = len(served.spent)
            engine(url, tmp_path)(*policy, prompts, range(4), changed, 0, "")
            assert len(served.spent) == paid + TRIES - (changed.top_p == 1) + 4


def test_a_server_is_tried_once_and_its_bill_told(policy, served, prompts, tmp_path, capsys):
    """By all parts of a run's prompts together; other weights are tried by themselves."""
    with serving(served) as url, closing(engine(url, tmp_path)) as asked:
        for places in ([0, 1], [2, 3]):
            asked(*policy, [prompts[place] for place in places], places, WARM, 0, title="")
        assert len(served.spent) == TRIES + 4
    assert "policy: 12 requests, " in "".join(capsys.readouterr())


def test_other_weights_are_refused(policy, prompts, tmp_path, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    policy[1].save_pretrained(tmp_path / "other")
    with serving(Served("policy", folder=tmp_path / "other")) as url:
        with pytest.raises(RuntimeError, match=r"must hold the weights of .*, found log-probs that differ from"):
            engine(url, tmp_path)(*policy, prompts, range(4), WARM, 0, "")
        assert len(engine(url, tmp_path, tolerance=9.0)(*policy, prompts, range(4), WARM, 0, "")) == 4


def lose(key):
    def fault(body):
        choice = {name: value for name, value in body["choices"][0].items() if name != key}
        return {**body, "choices": [choice]}

    return fault


@pytest.mark.parametrize("missing", ["token_ids", "logprobs"])
def test_a_server_without_token_ids_or_log_probs_is_refused(policy, served, prompts, tmp_path, missing):
    served.stubborn = lose(missing)
    with (
        serving(served) as url,
        pytest.raises(RuntimeError, match="must answer with a completion with token_ids and logprobs, found none in 2"),
    ):
        engine(url, tmp_path)(*policy, prompts, range(4), WARM, 0, "")


class Deaf(Served):
    """It does not hear one of the settings."""

    def __init__(self, *given, setting, value, **more):
        super().__init__(*given, **more)
        self.setting, self.value = setting, value

    def drawn(self, ids, body, stops):
        return super().drawn(ids, {**body, self.setting: self.value() if callable(self.value) else self.value}, stops)


@pytest.mark.parametrize(
    "setting, value, said",
    [
        ("temperature", 1.0, "must draw the likeliest tokens at temperature 0, found others for another seed"),
        ("temperature", 0.0, "must draw at temperature 1, found the same 16 tokens for four seeds"),
        ("seed", 5, "must draw at temperature 1, found the same 16 tokens for four seeds"),
        ("top_p", 1.0, "must draw the likeliest tokens at top_p=0.0001, found those of top_p=1: it ignores it"),
        ("seed", iter(range(99)).__next__, "must give the same tokens for the same seed, found others"),
    ],
)
def test_a_server_that_ignores_a_setting_is_refused(policy, prompts, tmp_path, tiny_model, setting, value, said):
    deaf = Deaf("policy", folder=tiny_model("llama"), setting=setting, value=value)
    deaf.tokenizer.eos_token = None  # sixteen tokens, whatever they are
    with serving(deaf) as url, pytest.raises(RuntimeError, match=said):
        engine(url, tmp_path)(*policy, prompts, range(4), WARM, 0, "")


def test_a_server_that_does_not_answer_is_refused_before_a_policy_is_trained(tmp_path, monkeypatch):
    """Where the policy is there, so may be all its candidates, and then no server is needed."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(sft, "train", lambda *_: pytest.fail("trained"))
    given = [*SMALL, "engine=endpoint", "engine.served=m", "engine.server.retries=0"]
    given += ["engine.server.url=http://127.0.0.1:1/v1"]
    advice = r"127\.0\.0\.1:1/v1 must answer, found APIConnectionError.*no policy is trained before .* dpo\.sft"
    with pytest.raises(RuntimeError, match=advice):
        generate.run(frozen(tmp_path / "candidates", *given, verb="generate"), tmp_path / "candidates")
    asked: list[Any] = []
    monkeypatch.setattr(sft, "check_engine", lambda *given: asked.append(given[1]))
    monkeypatch.setattr(sft, "train", lambda *_: None)
    monkeypatch.setattr(generate, "candidates", lambda *_: {})
    config = frozen(tmp_path / "candidates", *given, verb="generate")
    for _ in range(2):  # the second time the policy is there
        generate.of_initial_policy(config, load(config))
    assert asked == ["handshake"]


def test_no_policy_is_asked_beyond_its_positions(tmp_path, monkeypatch, tiny_model):
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("a model was loaded"))
    given = [*own(tmp_path, tiny_model("llama")), "max_length=2049", "judge=shorter"]
    with pytest.raises(ValueError, match="max_length must be at most the 2048 positions"):
        generate.run(frozen(tmp_path / "candidates", *given, verb="generate"), tmp_path / "candidates")


def test_a_server_greets(served, tmp_path):
    with serving(served) as url:
        engine(url, tmp_path).handshake()
        assert len(served.spent) == 1
        with pytest.raises(RuntimeError, match=r"must serve other: .*; it serves policy; no policy is trained"):
            Endpoint("other", 1e-3, str(tmp_path), {**OPTIONS, "url": url}).handshake()


def test_an_end_must_be_among_the_tokens(policy, served, prompts, tmp_path):
    def strip(body):
        choice = body["choices"][0]
        return {**body, "choices": [{**choice, "finish_reason": "stop"}]}

    served.faults += ["good"] * 7 + [strip] * 99
    with serving(served) as url, pytest.raises(RuntimeError, match="ended without the token that ends it"):
        engine(url, tmp_path, concurrency=1)(*policy, [prompts[0]], [0], Sampling(1, 0.0, 1.0, 8), 0, "")


def test_a_prompt_longer_than_the_context_is_an_error(policy, served, prompts, tmp_path):
    with (
        serving(served) as url,
        pytest.raises(RuntimeError, match=r"longer than 400 .* of a prompt of .* or lower that"),
    ):
        engine(url, tmp_path)(*policy, [*prompts, prompts[0] * 200], range(5), WARM, 0, "")
    [kept] = tmp_path.rglob("*.jsonl")
    assert len(kept.read_text().splitlines()) >= 1
    assert all("answer" in json.loads(line) for line in kept.read_text().splitlines()[1:])


def test_options_that_could_not_work(tmp_path):
    with pytest.raises(ValueError, match=r"engine\.tolerance must be above 0, got 0"):
        engine("http://a", tmp_path, tolerance=0)
    with pytest.raises(ValueError, match=r"engine\.served must name a model that http://a serves"):
        Endpoint(None, 0.1, str(tmp_path), {**OPTIONS, "url": "http://a"})
    with pytest.raises(ValueError, match=r"engine\.server\.url must be that of the server .*, got null"):
        Endpoint("m", 0.1, str(tmp_path), {**OPTIONS, "url": None})
