"""The engine of vLLM, with a double of it that samples from the weights that it is given: `tests/vllm_double.py`."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import vllm_double
from composing import compose
from omegaconf import OmegaConf
from ranks import together
from test_evaluate import feeding
from test_generate import PROMPTS, config
from whole_runs import frozen

from dpo import engines, evaluate, generate
from dpo.data.batches import encode_prompts
from dpo.data.chats import ends
from dpo.policy import model as models
from dpo.policy.sampling import Sampling, sample
from dpo.settings import generation_of
from dpo.sweep.identity import identity
from dpo.training import distributed

GREEDY = Sampling(6, 0.0, 1.0, 8)
WARM = Sampling(6, 1.0, 0.9, 8)


@pytest.fixture
def llm(monkeypatch):
    """What was started of vLLM."""
    module = vllm_double.module()
    monkeypatch.setitem(sys.modules, "vllm", module)
    for name in ("VLLM_WORKER_MULTIPROC_METHOD", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "so that it is taken back")
    return module.LLM


@pytest.fixture
def policy(tiny_model):
    return models.load(tiny_model("llama"))


@pytest.fixture
def prompts(policy):
    return encode_prompts([*PROMPTS[:2], PROMPTS[0], "Rome"], policy[1], 40)


def engine(tmp_path, dtype="float32", tolerance=1e-4, **changed):
    return engines.Vllm(dtype, tolerance, str(tmp_path), {**vllm_double.OPTIONS, **changed})


def test_greedy_responses_are_those_of_generate(policy, llm, prompts, tmp_path):
    model, tokenizer = policy
    found = engine(tmp_path)(*policy, prompts, range(4), GREEDY, 0, "")
    assert found == sample(*policy, prompts, GREEDY, 0, "")
    for ids, one in zip(prompts, found, strict=True):
        options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": ends(tokenizer, model.generation_config)}
        whole = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)[0].tolist()
        assert whole == ids + one.response_ids


def test_a_response_is_that_of_its_seed_and_place(policy, llm, prompts, tmp_path):
    """Whatever else is asked for at once; another seed draws others, and each of equal prompts."""
    one = engine(tmp_path)
    found = one(*policy, prompts, range(4), WARM, 0, "")
    assert one(*policy, prompts[:2], range(2), WARM, 0, "") == found[:2]
    assert one(*policy, prompts[:1:-1], [3, 2], WARM, 0, "") == found[:1:-1]
    other = one(*policy, prompts, range(4), WARM, 1, "")
    assert all(new.response_ids != old.response_ids for new, old in zip(other, found, strict=True))
    assert found[0].prompt_ids == found[2].prompt_ids
    assert found[0].response_ids != found[2].response_ids
    assert len(llm.started) == 1


def test_settings_arrive(policy, llm, prompts, tmp_path):
    one = engine(tmp_path)
    greedy = [said.response_ids for said in one(*policy, prompts, range(4), GREEDY, 0, "")]
    for changed in ({"top_p": 1e-6}, {"temperature": 1e-4}):
        assert [
            said.response_ids for said in one(*policy, prompts, range(4), replace(WARM, **changed), 0, "")
        ] == greedy
    assert {
        len(said.response_ids) for said in one(*policy, prompts, range(4), replace(GREEDY, max_new_tokens=2), 0, "")
    } <= {1, 2}
    one(*policy, prompts, range(4), Sampling(5, 0.7, 0.8, 1), 0, "")
    assert {(asked.max_tokens, asked.temperature, asked.top_p) for _, asked in llm.started[0].asked[-4:]} == {
        (5, 0.7, 0.8)
    }


def test_ends_are_ours(policy, llm, prompts, tmp_path):
    """Each end of the generation config ends a response, is kept, and is in no text."""
    model, tokenizer = policy
    often = sample(*policy, prompts, GREEDY, 0, "")[0].response_ids[2]
    model.generation_config.eos_token_id = [model.generation_config.eos_token_id, often]
    found = engine(tmp_path)(*policy, prompts, range(4), GREEDY, 0, "")
    assert found == sample(*policy, prompts, GREEDY, 0, "")
    assert found[0].ended
    assert found[0].response_ids[-1] == often
    assert all(one.ended == (one.response_ids[-1] in (tokenizer.eos_token_id, often)) for one in found)


def test_no_more_is_drawn_than_a_response(policy, llm, prompts, tmp_path):
    """vLLM itself stops at each of our ends, and at nothing else."""
    model, tokenizer = policy
    model.generation_config.eos_token_id = [*range(3, 200)]
    found = engine(tmp_path)(*policy, prompts * 4, range(16), replace(WARM, max_new_tokens=12), 0, "")
    [held] = llm.started
    stops = ends(tokenizer, model.generation_config)
    assert all(asked.stop_token_ids == stops and asked.ignore_eos and not asked.detokenize for _, asked in held.asked)
    assert [list(one.token_ids) for one in held.given[-16:]] == [one.response_ids for one in found]
    assert any(one.ended for one in found)


def test_ids_that_are_no_tokens_are_never_drawn(policy, llm, prompts, tmp_path):
    model, tokenizer = policy
    with torch.no_grad():
        likely = 200 * model.lm_head.weight[3]
        model.lm_head.weight[len(tokenizer) :] = torch.stack([likely, -likely, likely])
    found = engine(tmp_path)(*policy, prompts * 4, range(16), replace(WARM, top_p=1.0), 0, "")
    assert max(token for one in found for token in one.response_ids) < len(tokenizer)
    [held] = llm.started
    free = held.generate([{"prompt_token_ids": ids} for ids in prompts], [vllm_double.SamplingParams()] * 4)
    assert max(token for one in free for token in one.outputs[0].token_ids) >= len(tokenizer)


def test_a_model_without_rows_to_spare_has_no_bias(llm, tmp_path, tiny_model):
    model, tokenizer = models.load(tiny_model("llama"))
    model.resize_token_embeddings(len(tokenizer))
    engine(tmp_path)(model, tokenizer, [[5, 6]], [0], GREEDY, 0, "")
    assert all(asked.logit_bias is None for _, asked in llm.started[0].asked)


def test_it_has_the_weights_in_memory_and_no_others(policy, llm, prompts, tmp_path):
    """A policy that was trained on is written again, and the former one let go; nothing stays on disk."""
    model, _ = policy
    one = engine(tmp_path / "cache")
    with engines.closing(one):
        one(*policy, prompts, range(4), GREEDY, 0, "")
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)
        assert one(*policy, prompts, range(4), GREEDY, 0, "") == sample(*policy, prompts, GREEDY, 0, "")
        assert [held.ended for held in llm.started] == [True, False]
        assert [*(tmp_path / "cache").iterdir()] == []
        assert all(held.folder.parents[1] == tmp_path / "cache" for held in llm.started)
    assert [held.ended for held in llm.started] == [True, True]


def test_log_probs_that_are_not_the_models_are_refused(policy, llm, prompts, tmp_path, monkeypatch):
    class Other(llm):
        def __init__(self, *given, **more):
            super().__init__(*given, **more)
            with torch.no_grad():
                self.model.lm_head.weight.mul_(1.5)

    monkeypatch.setattr(sys.modules["vllm"], "LLM", Other)
    with pytest.raises(RuntimeError, match=r"must compute the log-probs of .*, found some that differ by .* nats a"):
        engine(tmp_path)(*policy, prompts, range(4), WARM, 0, "")
    assert llm.started[0].ended
    assert len(engine(tmp_path, tolerance=9.0)(*policy, prompts, range(4), WARM, 0, "")) == 4


def test_log_probs_in_another_precision_differ(policy, llm, prompts, tmp_path):
    assert engine(tmp_path, tolerance=1e-6)(*policy, prompts, range(4), GREEDY, 0, "")
    with pytest.raises(RuntimeError, match=r"must compute the log-probs .* set engine\.dtype=float32"):
        engine(tmp_path, dtype="bfloat16", tolerance=1e-6)(*policy, prompts, range(4), GREEDY, 0, "")


def test_the_handshake_draws_from_the_policy(policy, llm, prompts, tmp_path):
    """Sixteen tokens at temperature 1, where there is room for them, whatever is asked for after it."""
    for room, length in ((64, 16), (len(prompts[0]) + 8, 8)):
        engine(tmp_path, max_model_len=room)(*policy, prompts, range(4), replace(GREEDY, max_new_tokens=2), 0, "")
        ids, asked = llm.started[-1].asked[0]
        assert (ids, asked.max_tokens, asked.logprobs) == (prompts[0], length, 0)
        assert (asked.temperature, asked.top_p) == (1.0, 1.0)
        assert all(one.logprobs is None for _, one in llm.started[-1].asked[1:])


def test_a_policy_that_always_says_the_same_is_taken(policy, llm, prompts, tmp_path):
    model, _ = policy
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    found = engine(tmp_path, tolerance=1.0)(*policy, prompts, range(4), WARM, 0, "")
    assert found[0].response_ids == found[2].response_ids


def test_what_vllm_cannot_serve_is_said(policy, llm, prompts, tmp_path):
    """When it is started, with the first token (a kernel may be missing), or before anything is."""
    said = r"vLLM must serve .*, a LlamaForCausalLM, found "
    with pytest.raises(RuntimeError, match=f"{said}ValueError: max_model_len"):
        engine(tmp_path, max_model_len=5000)(*policy, prompts, range(4), WARM, 0, "")
    llm.faults.append(SystemError("heads of 8"))
    with pytest.raises(RuntimeError, match=f"{said}SystemError: heads of 8; set"):
        engine(tmp_path)(*policy, prompts, range(4), WARM, 0, "")
    assert [held.ended for held in llm.started] == [True]
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(
        ValueError, match=r"engine\.llm\.max_model_len must hold prompt and response, \d+ tokens, got 9"
    ):
        engine(tmp_path, max_model_len=9)(*policy, prompts, range(4), WARM, 0, "")
    assert len(llm.started) == 1


def test_options_that_could_not_work_are_refused(llm, tmp_path):
    for changed, said in (
        ({"tolerance": 0}, r"engine\.tolerance must be above 0, got 0"),
        ({"gpu_memory_utilization": 0.0}, r"engine\.llm\.gpu_memory_utilization must be above 0 and at most 1, got 0"),
        ({"gpu_memory_utilization": 1.5}, r"engine\.llm\.gpu_memory_utilization must be above 0 and at most 1, got 1"),
        ({"max_model_len": 0}, r"engine\.llm\.max_model_len must be at least 1, got 0"),
        ({"tensor_parallel_size": 0}, r"engine\.llm\.tensor_parallel_size must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            engine(tmp_path, **changed)


def test_without_vllm_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"engine=vllm needs the package vllm, found none; pip install -e '.\[vllm\]'"):
        engine(tmp_path)


def test_vllm_is_told_nothing_of_torchrun(policy, llm, prompts, tmp_path, monkeypatch):
    said = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    said |= {"LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD")
    engine(tmp_path)(*policy, prompts, range(4), WARM, 0, "")
    assert not said.keys() & llm.started[0].environment.keys()
    assert llm.started[0].environment["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert said.items() <= os.environ.items()


def candidates(tmp_path, policy, prompts=PROMPTS, dtype="float32", **changed):
    """What `dpo.generate` makes with this engine."""
    node = {"_target_": "dpo.engines.Vllm", "_partial_": True, "dtype": dtype, "tolerance": 0.1}
    node |= {"cache": str(tmp_path), "llm": {**vllm_double.OPTIONS, **changed.pop("llm", {})}}
    settings = OmegaConf.merge(config(tmp_path, **changed), {"engine": node})
    return generate.candidates(*policy, {"train": prompts, "validation": prompts[:2]}, generation_of(settings), "w")


def test_candidates_are_drawn_by_one_vllm_which_ends(policy, llm, tmp_path, monkeypatch):
    """They are the same in groups of any size, and whatever decides rounding alone makes none again."""
    found = candidates(tmp_path / "whole", policy)
    assert [held.ended for held in llm.started] == [True]
    assert [len(found["train"]), len(found["validation"])] == [24, 8]
    assert len({tuple(one.response.response_ids) for one in found["train"][:4]}) > 1
    monkeypatch.setattr(generate, "AT_ONCE", 1)
    assert candidates(tmp_path / "parts", policy, batch_size=3) == found
    assert candidates(tmp_path / "whole", policy, llm={"gpu_memory_utilization": 0.9, "enforce_eager": False}) == found
    assert len(llm.started) == 2
    candidates(tmp_path / "whole", policy, dtype="bfloat16")
    assert len(llm.started) == 3


def test_evaluations_are_drawn_by_it(llm, tmp_path, tiny_model):
    """Policy and baseline, each by a vLLM that has its weights; greedy as by transformers, in another cache entry."""
    folder, other = tiny_model("llama"), tmp_path / "other"
    model, tokenizer = models.load(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    models.save(model, tokenizer, other)
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": one, "chosen": " yes", "rejected": " no"}) + "\n" for one in PROMPTS)
    )
    given = ["data=file", f"data.path={tmp_path / 'pairs.jsonl'}", f"policy.path={other}", f"against={folder}"]
    given += ["judge=shorter", "max_length=60", "max_new_tokens=6", "evaluation.temperature=0", "device=cpu"]
    given += [f"cache={tmp_path / 'cache'}"]
    found = []
    for name, more in (("ours", []), ("theirs", ["engine@evaluation.engine=vllm"])):
        (tmp_path / name).mkdir()
        evaluate.run(frozen(tmp_path / name, *given, *more, verb="evaluate"), tmp_path / name)
        found.append([json.loads(line) for line in (tmp_path / name / "responses.jsonl").read_text().splitlines()])
    assert found[0] == found[1]
    assert any(row["response"] != row["baseline"] for row in found[0])
    assert [held.ended for held in llm.started] == [True] * 3  # the third is that of KL, at temperature 1
    assert len([*(tmp_path / "cache" / "baseline").glob("*/responses.json")]) == 2
    assert {asked.temperature for _, asked in llm.started[1].asked[1:]} == {0.0}
    assert {asked.temperature for _, asked in llm.started[2].asked} == {1.0}


def test_looking_at_a_policy_in_training_starts_no_vllm(policy, llm, tmp_path):
    node = {"_target_": "dpo.engines.Vllm", "_partial_": True, "dtype": "float32", "tolerance": 0.1}
    asked = feeding(60, engine={**node, "cache": str(tmp_path), "llm": vllm_double.OPTIONS}, log_samples=2)
    assert len(evaluate.show(*policy, PROMPTS, None, asked)) == 2
    assert llm.started == []
    assert len(evaluate.respond(*policy, PROMPTS, asked, "policy", title="")) == 6
    assert [held.ended for held in llm.started] == [True]
    short = {**asked.engine, "llm": {**vllm_double.OPTIONS, "max_model_len": 5}}
    for own, at in ((None, "engine"), (short, "evaluation.engine")):
        with pytest.raises(ValueError, match=f"^{at}.llm.max_model_len must hold prompt and response"):
            evaluate.respond(*policy, PROMPTS, replace(asked, engine=short, own_engine=own), "policy", title="")


def test_vllm_ends_with_an_error(policy, llm, tmp_path, monkeypatch):
    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "_whole_characters", broken)
    with pytest.raises(KeyboardInterrupt):
        candidates(tmp_path, policy)
    assert [held.ended for held in llm.started] == [True]


def test_how_vllm_is_started_is_no_part_of_a_run(llm, tmp_path):
    """What may change its numbers is."""
    for chosen, at in (("engine=vllm", "engine"), ("engine@evaluation.engine=vllm", "evaluation.engine")):
        ids = []
        for given in ("cache=c", f"{at}.llm.gpu_memory_utilization=0.3", f"{at}.cache=c", f"{at}.dtype=bfloat16"):
            ids.append(identity(OmegaConf.to_container(compose("train", chosen, given), resolve=True)))
        assert [one == ids[0] for one in ids] == [True, True, True, False]


def on_a_rank(directory: Path, folder: str) -> None:
    sys.modules["vllm"] = vllm_double.module()
    device = distributed.join("cpu")
    model, tokenizer = models.load(
        models.ModelSpec(folder, layout=distributed.ParallelLayout(None, False, "fp32")), device
    )
    prompts = encode_prompts(PROMPTS, tokenizer, 40)
    with engines.closing(engine(directory / "cache")) as one:
        found = one(model, tokenizer, prompts, range(6), WARM, 0, "")
        rest = one(model, tokenizer, prompts[4:], [4, 5], WARM, 0, "")
    (directory / f"{distributed.rank()}.txt").write_text(str([found, found[4:] == rest]))
    assert len(sys.modules["vllm"].LLM.started) == (distributed.rank() == 0)
    distributed.leave()


def test_rank_0_drives_it_for_all(policy, llm, tmp_path, tiny_model):
    """With the weights of all: each has the responses of one process."""
    together(on_a_rank, tmp_path, tiny_model("llama"), processes=2)
    alone = engine(tmp_path)(*policy, encode_prompts(PROMPTS, policy[1], 40), range(6), WARM, 0, "")
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == [str([alone, True])] * 2
