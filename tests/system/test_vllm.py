"""The engine of vLLM, with vLLM itself: `pytest -m vllm -n 0` in an environment that has it, and this project.

Of a CPU such an environment takes torch and transformers of its own: see docs/judges.md.
"""

import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch
import vllm_double
from conftest import tiny_tokenizer
from test_generate import PROMPTS
from test_reference import settings as of_scoring
from transformers import LlamaConfig, LlamaForCausalLM
from whole_runs import frozen

from dpo import engines, generate
from dpo.data.batches import Pair, collate_pairs, encode_prompts
from dpo.data.chats import ends
from dpo.policy import model as models
from dpo.policy.sampling import Sampling, sample
from dpo.references import Initial
from dpo.vllm_scorer import VllmScorer

pytestmark = pytest.mark.vllm
GREEDY = Sampling(12, 0.0, 1.0, 8)
WARM = Sampling(12, 1.0, 0.9, 8)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """Far from uniform, in heads of a size that vLLM has on a CPU, with rows that are no token's."""
    folder, tokenizer = tmp_path_factory.mktemp("policy"), tiny_tokenizer("llama")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) + 5, **sizes, **ids))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return models.load(str(folder))


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with engines.closing(
        engines.Vllm("float32", 1e-4, str(tmp_path_factory.mktemp("cache")), vllm_double.OPTIONS)
    ) as one:
        yield one


@pytest.fixture(scope="module")
def prompts(policy):
    return encode_prompts(
        [*PROMPTS[:3], PROMPTS[0], "Rome", "user: Tell me about cats and dogs, and of Rome."], policy[1], 40
    )


def test_it_takes_what_we_give(engine):
    from vllm import LLM, EngineArgs, SamplingParams

    ours, theirs = (inspect.signature(one).parameters for one in (vllm_double.SamplingParams, SamplingParams))
    assert {name: (one.default, theirs[name].default) for name, one in ours.items()} == {
        name: (one.default, one.default) for name, one in ours.items()
    }
    taken = {*inspect.signature(LLM).parameters, *inspect.signature(EngineArgs).parameters}
    assert {*vllm_double.OPTIONS, "dtype", "generation_config"} <= taken


def test_greedy_responses_are_those_of_generate(policy, engine, prompts):
    model, tokenizer = policy
    found = engine(*policy, prompts, range(len(prompts)), GREEDY, 0, "")
    assert found == sample(*policy, prompts, GREEDY, 0, "")
    for ids, one in zip(prompts, found, strict=True):
        options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": ends(tokenizer, model.generation_config)}
        whole = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)[0].tolist()
        assert whole == ids + one.response_ids


def test_a_response_is_that_of_its_seed_and_place(policy, engine, prompts):
    many, places = prompts * 6, range(6 * len(prompts))
    found = engine(*policy, many, places, WARM, 0, "")
    assert engine(*policy, many[::-1], places[::-1], WARM, 0, "") == found[::-1]
    assert [engine(*policy, [many[place]], [place], WARM, 0, "")[0] for place in places[:5]] == found[:5]
    other = engine(*policy, many, places, WARM, 1, "")
    assert sum(new.response_ids == old.response_ids for new, old in zip(other, found, strict=True)) < 4
    assert len({tuple(one.response_ids) for one in found[:: len(prompts)]}) > 3  # of one prompt


def test_more_is_asked_for_than_vllm_reads_at_once(policy, engine, prompts):
    """Of a prompt that it reads in parts it may draw in between: on a CPU it then breaks down."""
    [longest] = sorted(prompts, key=len)[-1:]
    many = [[*longest, token] for token in range(3, 353)]
    found = engine(*policy, many, range(350), WARM, 0, "")
    assert engine(*policy, many[200:], range(200, 350), WARM, 0, "") == found[200:]


def test_samples_follow_the_policy(policy, engine, prompts):
    """Frequencies of the first token against the model's probabilities, by temperature and top-p."""
    model, tokenizer = policy
    with torch.no_grad():
        logits = model(torch.tensor(prompts[:1])).logits[0, -1, : len(tokenizer)].double().numpy()
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.5, 0.6)):
        p = np.exp((logits - logits.max()) / temperature)
        order = np.argsort(-p)
        p /= p.sum()
        p[order[np.cumsum(p[order]) - p[order] >= top_p]] = 0
        p /= p.sum()
        drawn = engine(*policy, prompts[:1] * 2000, range(2000), Sampling(1, temperature, top_p, 8), 0, "")
        counts = np.bincount([one.response_ids[0] for one in drawn], minlength=len(p)) / len(drawn)
        assert len(counts) == len(p)  # no id is that of no token
        assert (counts[p == 0] == 0).all()
        assert np.allclose(counts, p, atol=4 * (0.25 / 2000) ** 0.5)


def test_ends_are_ours(policy, engine, prompts):
    model, tokenizer = policy
    former = model.generation_config.eos_token_id
    often = sample(*policy, prompts, GREEDY, 0, "")[0].response_ids[2]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, often]
    try:
        found = engine(*policy, prompts, range(len(prompts)), GREEDY, 0, "")
        assert found == sample(*policy, prompts, GREEDY, 0, "")
    finally:
        model.generation_config.eos_token_id = former
    assert found[0].ended
    assert found[0].response_ids[-1] == often


def test_a_run_samples_its_candidates(policy, tmp_path):
    """By the command's own road; the process that vLLM was in has gone."""
    import psutil

    (tmp_path / "run").mkdir()
    pairs = tmp_path / "prompts.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"What is {n} and {n}?"}) + "\n" for n in range(8)))
    given = ["data=prompts", f"data.path={pairs}", f"policy.path={policy[0].name_or_path}", "max_length=60"]
    given += ["max_new_tokens=6", "wandb.mode=disabled", "device=cpu", "data.validation=2", "data.test=1"]
    given += ["engine=vllm", "engine.llm.gpu_memory_utilization=0.1", "engine.llm.enforce_eager=true"]
    given += ["engine.tolerance=1e-4", "generation.samples_per_prompt=3"]
    before = {one.pid for one in psutil.Process().children(recursive=True)}
    generate.run(frozen(tmp_path / "run", *given, verb="generate"), tmp_path / "run")
    new = [one for one in psutil.Process().children(recursive=True) if one.pid not in before]
    assert not [one for one in new if one.status() != "zombie" and "resource_tracker" not in " ".join(one.cmdline())]
    rows = [json.loads(line) for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 5
    assert len({tuple(one["token_ids"]["response"]) for one in rows}) > 10


def test_it_scores_a_reference(policy, prompts, tmp_path):
    """The log-probs of the run itself, within rounding; of responses of one token and of many, some of a prompt."""
    pairs = [Pair(ids, [5 + n, 9, 11] * (n + 1), [8 + n]) for n, ids in enumerate(prompts)]
    index, real = torch.arange(len(pairs)), torch.ones(len(pairs), dtype=torch.bool)
    batch = collate_pairs(pairs, index, real, pad_id=0, packed=False)
    options = {key: value for key, value in vllm_double.OPTIONS.items() if key != "max_model_len"}

    def logps(folder, pool=None):
        asked = of_scoring(tmp_path / folder, pool=pool)
        return Initial().prepare(policy[0].name_or_path, policy[0], {"train": pairs}, asked).logps(batch, "train")

    found = logps("vllm", VllmScorer(4, str(tmp_path / "copies"), options))
    assert torch.allclose(found, logps("here"), atol=1e-4, rtol=1e-6)
    assert [*(tmp_path / "copies").iterdir()] == []


def test_its_server_does_behind_the_endpoint(policy, prompts, tmp_path):
    """`vllm serve`, asked by the engine of servers: the same greedy responses, and a seed for each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "vllm.entrypoints.cli.main", "serve", policy[0].name_or_path, "--served-model-name", "policy"]
    command += ["--port", str(port), "--dtype", "float32", "--max-model-len", "64", "--enforce-eager"]
    command += ["--gpu-memory-utilization", "0.1"]
    with (tmp_path / "said.txt").open("w") as said:
        server = subprocess.Popen([sys.executable, *command], stdout=said, stderr=said, start_new_session=True)
    try:
        until = time.monotonic() + 900
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, (tmp_path / "said.txt").read_text()[-5000:]
            assert time.monotonic() < until
            time.sleep(1)
        options = {"key": None, "concurrency": 16, "timeout": 300.0, "retries": 0, "requests_per_minute": None}
        options |= {"prices": None, "url": f"http://127.0.0.1:{port}/v1"}

        def asked(name, seed, sampling, concurrency=16):
            changed = {**options, "concurrency": concurrency}
            one = engines.Endpoint("policy", 1e-4, str(tmp_path / name), changed)
            return one(*policy, prompts * 3, range(3 * len(prompts)), sampling, seed, "")

        assert asked("a", 0, GREEDY) == sample(*policy, prompts * 3, GREEDY, 0, "")
        found = asked("b", 0, WARM)
        assert asked("c", 0, WARM, concurrency=1) == found
        assert len({tuple(one.response_ids) for one in found[:: len(prompts)]}) > 1
        other = asked("d", 1, WARM)
        assert sum(new.response_ids == old.response_ids for new, old in zip(other, found, strict=True)) < 4
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def _answers(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def test_what_it_cannot_serve_is_said(tmp_path, tiny_model):
    """Heads of 8, on a CPU; and nothing stays behind."""
    model, tokenizer = models.load(tiny_model("llama"))
    one = engines.Vllm("float32", 0.1, str(tmp_path), vllm_double.OPTIONS)
    with pytest.raises(RuntimeError, match=r"vLLM must serve .*, a LlamaForCausalLM, found .*; set engine\.llm and"):
        one(model, tokenizer, [[5, 6]], [0], GREEDY, 0, "")
    assert [*tmp_path.iterdir()] == []
