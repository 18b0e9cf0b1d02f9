"""On-policy pairs: the better response is the chosen one, ties make no pair, cut responses say so; sampling."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from dpo import generate
from dpo.data.batches import encode_prompts
from dpo.data.records import read
from dpo.policy import model as models
from dpo.policy import sampling
from dpo.policy.sampling import Sample, sample

PROMPTS = [f"\n\nHuman: {n}?\n\nAssistant:" for n in range(6)]


@pytest.fixture
def llama(tiny_model):
    return models.load(tiny_model("llama"))


def draw(llama, prompts=PROMPTS, **changed):
    model, tokenizer = llama
    options = {"max_new_tokens": 8, "temperature": 1.0, "seed": 0, "batch_size": 4, **changed}
    return sample(model, tokenizer, encode_prompts(prompts, tokenizer, 64), **options)


def test_a_seed_decides_and_disturbs_nothing(llama):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = draw(llama)
    assert torch.equal(torch.get_rng_state(), state)
    assert draw(llama) == first
    assert draw(llama, seed=1) != first


def test_greedy_is_the_most_likely_token_with_and_without_neighbours(llama):
    model, _ = llama
    found = draw(llama, temperature=0.0)
    for one in found:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([one.prompt_ids + one.response_ids])).logits[0]
        start = len(one.prompt_ids) - 1
        assert logits[start : start + len(one.response_ids)].argmax(-1).tolist() == one.response_ids
    assert draw(llama, prompts=PROMPTS[2:3], temperature=0.0) == found[2:3]


def test_samples_follow_the_policy(llama):
    """Frequencies of the first token against the model's probabilities."""
    model, tokenizer = llama
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # far from uniform
        ids = encode_prompts(PROMPTS[:1], tokenizer, 64)
        p = model(input_ids=torch.tensor(ids)).logits[0, -1].softmax(-1)
    found = draw(llama, prompts=PROMPTS[:1] * 4000, max_new_tokens=1, batch_size=1000)
    counts = torch.bincount(torch.tensor([one.response_ids[0] for one in found]), minlength=len(p)) / len(found)
    top = p.topk(5).indices
    assert torch.allclose(counts[top], p[top], atol=4 * (0.25 / 4000) ** 0.5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_that_are_no_tokens_are_never_drawn(llama, temperature):
    model, tokenizer = llama
    likely = torch.zeros(model.config.vocab_size)
    likely[len(tokenizer) :] = 50.0
    model.lm_head.bias = torch.nn.Parameter(likely)
    assert len(likely) > len(tokenizer)
    drawn = draw(llama, temperature=temperature)
    assert max(token for one in drawn for token in one.response_ids) < len(tokenizer)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(llama, temperature, value):
    """Drawn from, they are an error of the library's; greedy, token 0 for ever."""
    with torch.no_grad():
        llama[0].model.norm.weight[:] = value
    with pytest.raises(RuntimeError, match=r"logits of a policy must be finite .* lower the learning rate"):
        draw(llama, temperature=temperature)


def test_ended_means_eos(llama):
    model, tokenizer = llama
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 30
    for one in draw(llama, prompts=PROMPTS * 20):
        assert one.ended == (one.response_ids[-1] == tokenizer.eos_token_id)
        assert one.response_ids.count(tokenizer.eos_token_id) == one.ended
        assert one.ended or len(one.response_ids) == 8
        assert tokenizer.eos_token not in one.text


def test_the_models_own_generation_settings_change_nothing(llama, tmp_path):
    """Real models bring penalties and a top_k; at temperature 1 samples must be the policy's all the same."""
    model, tokenizer = llama
    plain = draw(llama)
    own = model.generation_config
    own.update(
        do_sample=True, no_repeat_ngram_size=1, repetition_penalty=5.0, top_k=3, min_new_tokens=8, suppress_tokens=[7]
    )
    assert draw(llama) == plain
    models.save(model, tokenizer, tmp_path / "policy")  # where they stay, for users of the policy
    assert models.load(str(tmp_path / "policy"))[0].generation_config.repetition_penalty == 5.0


def test_ends_of_turn_of_the_generation_config_count(llama):
    model, _ = llama
    often = draw(llama)[0].response_ids[2]
    model.generation_config.eos_token_id = [model.generation_config.eos_token_id, often]
    one = draw(llama)[0]
    assert one.ended
    assert one.response_ids[-1] == often


def config(tmp_path: Path, **changed) -> OmegaConf:
    settings = {"samples": 4, "temperature": 1.0, "top_p": 1.0, "pairs_per_prompt": 2, "batch_size": 8, **changed}
    values = {"generation": settings, "max_length": 64, "max_new_tokens": 8, "seed": 0, "cache": str(tmp_path)}
    return OmegaConf.create({**values, "judge": {"_target_": "here"}, "data": {"_target_": "there"}})


def lengths(prompt: str, responses: list[str]) -> list[dict[str, float]]:
    return [{"score": float(len(response) // 10)} for response in responses]  # ties happen


def test_pairs_prefer_the_higher_score(tmp_path, llama):
    pairs = generate.preferences(*llama, {"train": PROMPTS, "validation": PROMPTS[:2]}, lengths, config(tmp_path), "w")
    assert set(pairs) == {"train", "validation"}
    for pair in pairs["train"]:
        assert len(pair.chosen) // 10 > len(pair.rejected) // 10
    per_prompt = [sum(pair.prompt == prompt for pair in pairs["train"]) for prompt in PROMPTS]
    assert max(per_prompt) <= 2
    (folder,) = (path for path in (tmp_path / "pairs").iterdir() if path.is_dir())
    assert read(folder / "train.jsonl") == pairs["train"]
    assert pairs["train"][1].origin == f"{folder / 'train.jsonl'}, line 2"
    assert len((folder / "train.candidates.jsonl").read_text().splitlines()) == 24


def test_the_second_run_of_a_sweep_samples_nothing(tmp_path, llama, monkeypatch):
    prompts = {"train": PROMPTS, "validation": PROMPTS[:2]}
    first = generate.preferences(*llama, prompts, lengths, config(tmp_path), "w")
    monkeypatch.setattr(generate, "sample", lambda *_, **__: pytest.fail("sampled again"))
    assert generate.preferences(*llama, prompts, lengths, config(tmp_path), "w") == first


def test_pairs_are_made_again_when_what_decides_them_changes(tmp_path, llama, monkeypatch):
    model, tokenizer = llama

    def entries(**changed) -> int:
        asked = OmegaConf.merge(config(tmp_path), changed)
        generate.preferences(model, tokenizer, {"train": PROMPTS, "validation": PROMPTS[:2]}, lengths, asked, "w")
        return sum(path.is_dir() for path in (tmp_path / "pairs").iterdir())

    assert entries() == entries() == entries(max_length=100) == 1  # no prompt is that long
    assert entries(judge={"option": 1}) == 2
    monkeypatch.setattr(generate, "JUDGES_VERSION", generate.JUDGES_VERSION + 1)
    assert entries() == 3
    monkeypatch.setattr(sampling, "SAMPLING_VERSION", sampling.SAMPLING_VERSION + 1)
    assert entries() == 4
    model.generation_config.eos_token_id = [model.generation_config.eos_token_id, 5]
    assert entries() == 5
    assert entries(max_length=16) == 6  # prompts are cut
    tokenizer.add_special_tokens({"pad_token": "<pad>"})  # the text of a response is another
    assert entries() == 7


def test_a_cut_response_has_no_end(monkeypatch):
    responses = [Sample([1], [2, 3], "a b", ended=True), Sample([1], [2, 4], "a c d", ended=False)]
    monkeypatch.setattr(generate, "sample", lambda *_, **__: responses)
    settings = SimpleNamespace(samples=2, temperature=1.0, top_p=1.0, pairs_per_prompt=2, batch_size=2)
    asked = SimpleNamespace(generation=settings, max_length=8, max_new_tokens=2)
    judge = lambda prompt, texts: [{"score": float(len(text))} for text in texts]  # noqa: E731
    (pair,), _ = generate._pairs(None, None, ["p"], [[1]], judge, asked, 0, "train")
    assert (pair.chosen, pair.chosen_ended, pair.rejected, pair.rejected_ended) == ("a c d", False, "a b", True)


def test_all_ties_are_an_error(tmp_path, llama):
    def same(prompt: str, responses: list[str]) -> list[dict[str, float]]:
        return [{"score": 0.0} for _ in responses]

    with pytest.raises(RuntimeError, match="differ in score"):
        generate.preferences(*llama, {"train": PROMPTS, "validation": PROMPTS}, same, config(tmp_path), "w")
