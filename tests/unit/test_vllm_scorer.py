"""Reference log-probs by vLLM: a double of it (`tests/vllm_double.py`), and the rounding that is kept."""

import sys

import pytest
import torch
import vllm_double
from test_config import config
from test_engine_vllm import llm  # noqa: F401, a fixture
from test_pool import PAIRS, batch
from test_reference import settings as of_scoring

from dpo import vllm_scorer
from dpo.policy import model as models
from dpo.references import Initial
from dpo.sweep.rehearse import trials
from dpo.sweep.schema import faults

OPTIONS = {key: value for key, value in vllm_double.OPTIONS.items() if key != "max_model_len"}


def scorer(tmp_path, batch_size=4):
    return vllm_scorer.VllmScorer(batch_size, str(tmp_path / "cache"), OPTIONS)


@pytest.fixture
def scored(tmp_path, tiny_model, llm):  # noqa: F811
    """The same reference, scored by the run itself, and as vLLM has scored it, by the cache that it is in."""
    model = models.load(tiny_model("llama"))[0]

    def by(folder, pool=None, **changed):
        asked = of_scoring(tmp_path / folder, pool=pool, **changed)
        return Initial().prepare(tiny_model("llama"), model, {"train": PAIRS}, asked)

    return by


def test_log_probs_are_ours(scored, tmp_path, llm):  # noqa: F811
    """Each pair's, whatever is handed over at once; kept as those of scoring here are."""
    rows = list(range(len(PAIRS)))
    ours = scored("here").logps(batch(rows), "train")
    for size in (1, 5, 100):
        reference = scored(str(size), scorer(tmp_path, size))
        theirs = reference.logps(batch(rows), "train")
        assert torch.allclose(theirs, ours, atol=1e-4, rtol=0)
        asked = llm.started[-1].asked
        assert {tuple(ids) for ids, _ in asked} == {
            (*prompt, *response) for pair in PAIRS for prompt, response in (pair.chosen, pair.rejected)
        }
        assert llm.started[-1].ended
        assert llm.started[-1].room == max(len(ids) for ids, _ in asked) + 1
        assert torch.equal(scored(str(size)).logps(batch(rows), "train"), theirs)  # from the cache
    assert len(llm.started) == 3


def test_other_log_probs_are_refused(scored, tmp_path, llm, monkeypatch):  # noqa: F811
    """No row is given away before a few are those of the model here; nothing is kept."""
    read = vllm_double.LLM._read

    def off(self, ids):
        found = read(self, ids)
        next(iter(found[-1].values())).logprob += 0.1
        return found

    monkeypatch.setattr(vllm_double.LLM, "_read", off)
    with pytest.raises(RuntimeError, match=r"log-probs of vLLM must be .*; leave out scorer=vllm"):
        scored("off", scorer(tmp_path))
    monkeypatch.undo()


def test_what_came_before_an_end_is_not_asked_again(scored, tmp_path, llm):  # noqa: F811
    """vLLM breaks down in the middle: a second start asks for the rest alone."""
    generate = llm.generate
    calls = []

    def breaks(self, prompts, sampling_params, use_tqdm=True):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise RuntimeError("EngineDeadError")
        return generate(self, prompts, sampling_params, use_tqdm)

    llm.generate = breaks
    with pytest.raises(RuntimeError, match=r"vLLM must serve .*EngineDeadError; set scorer\.llm to what it takes"):
        scored("again", scorer(tmp_path))
    rows = list(range(len(PAIRS)))
    found = scored("again", scorer(tmp_path)).logps(batch(rows), "train")
    assert torch.allclose(found, scored("here").logps(batch(rows), "train"), atol=1e-4, rtol=0)
    ids = [[tuple(one) for one, _ in started.asked] for started in llm.started]
    assert len(ids[0]) == 8
    assert not {*ids[0]} & {*ids[1]}


def test_precision_is_that_of_the_run(scored, tmp_path, llm):  # noqa: F811
    for precision in ("fp32", "bf16"):
        scored(precision, scorer(tmp_path), precision=precision)
    assert [one.dtype for one in llm.started] == ["float32", "bfloat16"]


def test_what_is_refused_when_planned(llm, tmp_path):  # noqa: F811
    told = config("scorer=vllm", "scorer.batch_size=0")
    assert trials([told])[0]["problems"] == ["scorer.batch_size must be at least 1, got 0"]
    told = config("scorer=vllm", "scorer.llm.gpu_memory_utilization=1.5")
    (problem,) = trials([told])[0]["problems"]
    assert problem == "scorer.llm.gpu_memory_utilization must be above 0 and at most 1, got 1.5"
    for command, advice in (
        ("train", "score ahead: python -m dpo.score scorer=vllm"),
        ("score", "leave processes out"),
    ):
        (problem,) = faults(config("scorer=vllm", "processes=2", command=command))
        assert problem == f"processes must be 1 with scorer=vllm, got 2; {advice}"


def test_without_vllm_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr("dpo.engines.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"scorer=vllm needs the package vllm, found none; pip install -e '.\[vllm\]'"):
        scorer(tmp_path)
