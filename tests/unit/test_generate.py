"""On-policy pairs: the better response is the chosen one, ties make no pair, cut responses say so; sampling."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, CONFIGS, tiny_tokenizer
from omegaconf import OmegaConf
from test_settings import LONGEST, data, frozen, own, texts  # noqa: F401
from test_tokens import sentencepiece
from transformers import LlamaForCausalLM

from dpo import engines, generate, score
from dpo import judge as judging
from dpo.data.batches import collate_pairs, encode_prompts, tokenize
from dpo.data.records import Dataset, Preference, TokenIds, read, write, write_rows
from dpo.data.tokens import vocabulary
from dpo.judges import shorter
from dpo.policy import model as models
from dpo.policy import sampling
from dpo.policy.logps import sequence_logps
from dpo.policy.sampling import Sample, Sampling, sample
from dpo.settings import generation_of, pairing_of

PROMPTS = [f"\n\nHuman: {n}?\n\nAssistant:" for n in range(6)]


@pytest.fixture
def llama(tiny_model):
    return models.load(tiny_model("llama"))


def draw(llama, prompts=PROMPTS, **changed):
    model, tokenizer = llama
    options = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0, "seed": 0, "batch_size": 4, **changed}
    seed = options.pop("seed")
    return sample(model, tokenizer, encode_prompts(prompts, tokenizer, 64), Sampling(**options), seed)


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
    settings = {
        "samples_per_prompt": 4,
        "temperature": 1.0,
        "top_p": 1.0,
        "pairs_per_prompt": 2,
        "batch_size": 8,
        **changed,
    }
    values = {"generation": settings, "max_length": 64, "max_new_tokens": 8, "seed": 0, "cache": str(tmp_path)}
    values |= {"on_too_long": "error", "engine": {"_target_": "dpo.engines.transformers", "_partial_": True}}
    return OmegaConf.create({**values, "judge": {"_target_": "here"}, "rule": None, "data": {"_target_": "there"}})


def lengths(prompt: str, responses: list[str]) -> list[dict[str, float]]:
    return [{"score": float(len(response) // 10)} for response in responses]  # ties happen


def preferences(model, tokenizer, prompts, judge, config, weights, on_faulty="error"):
    """What `dpo.train` makes of prompts."""
    found = generate.candidates(model, tokenizer, prompts, generation_of(config), weights, on_faulty)
    return judging.cached_preferences(found, judge, pairing_of(config))


def test_pairs_prefer_the_higher_score(tmp_path, llama):
    pairs = preferences(*llama, {"train": PROMPTS, "validation": PROMPTS[:2]}, lengths, config(tmp_path), "w")
    assert set(pairs) == {"train", "validation"}
    for pair in pairs["train"]:
        assert len(pair.chosen) // 10 > len(pair.rejected) // 10
    per_prompt = [sum(pair.prompt == prompt for pair in pairs["train"]) for prompt in PROMPTS]
    assert max(per_prompt) <= 2
    assert {pair.prompt for pair in pairs["validation"]} <= {*PROMPTS[:2]}
    (folder,) = (path for path in (tmp_path / "pairs").iterdir() if path.is_dir())
    assert read(folder / "train.jsonl") == pairs["train"]
    assert pairs["train"][1].source == f"{folder / 'train.jsonl'}, line 2"
    assert len((folder / "train.judged.jsonl").read_text().splitlines()) == 24


def test_the_second_run_of_a_sweep_samples_nothing(tmp_path, llama, monkeypatch):
    prompts = {"train": PROMPTS, "validation": PROMPTS[:2]}
    first = preferences(*llama, prompts, lengths, config(tmp_path), "w")
    monkeypatch.setattr(engines, "sample", lambda *_, **__: pytest.fail("sampled again"))
    assert preferences(*llama, prompts, lengths, config(tmp_path), "w") == first


def test_sampling_that_was_stopped_goes_on_where_it_was(tmp_path, llama, monkeypatch):
    """What was drawn is not drawn again, the rest as it would have been; of a line that was being written nothing."""
    prompts = {"train": [*PROMPTS, *(f"{prompt} And why? {prompt}" for prompt in PROMPTS)], "validation": PROMPTS[:2]}
    monkeypatch.setattr(generate, "AT_ONCE", 1)
    whole = generate.candidates(*llama, prompts, generation_of(config(tmp_path / "whole")), "w")
    drawn: list[int] = []

    def stopping(*given, most=3, **more):
        if len(drawn) >= 8 * most:
            raise KeyboardInterrupt
        drawn.extend(given[-1])
        return sample(*given, **more)

    monkeypatch.setattr(engines, "sample", stopping)
    with pytest.raises(KeyboardInterrupt):
        generate.candidates(*llama, prompts, generation_of(config(tmp_path / "stopped")), "w")
    [kept] = tmp_path.glob("stopped/candidates/*/train.unfinished")
    assert len(kept.read_text().splitlines()) == 1 + 24
    kept.write_bytes(kept.read_bytes()[:-3])
    monkeypatch.setattr(engines, "sample", partial(stopping, most=99))
    first = drawn[:]
    assert generate.candidates(*llama, prompts, generation_of(config(tmp_path / "stopped")), "w") == whole
    assert drawn[24:32] == first[16:24]  # the batch of that line
    assert {*first[:8]} <= {*range(4 * len(PROMPTS), 8 * len(PROMPTS))}  # the longest are first: little to pad
    assert not {*drawn[32 : -4 * 2]} & {*first}
    assert not [*tmp_path.glob("stopped/candidates/*/*.unfinished")]


def test_prompts_that_cannot_be_fed_follow_the_rule_for_pairs(tmp_path, capsys):
    tokenizer = tiny_tokenizer("qwen2")
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refuses + CHAT_TEMPLATE
    chats = [[{"role": "user", "content": f"Is {n} even?"}] for n in range(6)]
    told = [{"role": "system", "content": "Be brief."}, *chats[0]]
    prompts = {"train": [*chats, told], "validation": chats[:2]}
    model, asked = policy(tokenizer), config(tmp_path)
    with pytest.raises(ValueError, match=r"1 of 7 train prompts are faulty:\n  prompt 6, .* no system"):
        preferences(model, tokenizer, prompts, lengths, asked, "w")
    found = preferences(model, tokenizer, prompts, lengths, asked, "w", "drop")
    assert "1 of 7 train prompts are faulty, 1 dropped" in capsys.readouterr().out
    assert found == preferences(model, tokenizer, prompts | {"train": chats}, lengths, asked, "w")


def test_how_the_tokenizer_was_called_before_is_no_part_of_the_key(llama):
    model, tokenizer = llama
    drawn = sampling.Sampling(8, 1.0, 1.0, 4)
    before = sampling.inputs(model, tokenizer, [[1, 2]], drawn)
    tokenizer(["a", "a longer text"], truncation=True, max_length=2)
    assert sampling.inputs(model, tokenizer, [[1, 2]], drawn) == before
    assert sampling.inputs(model, tokenizer, [[1, 3]], drawn) != before


def test_pairs_are_made_again_when_what_decides_them_changes(tmp_path, llama, monkeypatch):
    model, tokenizer = llama

    def entries(**changed) -> tuple[int, ...]:
        asked = OmegaConf.merge(config(tmp_path), changed)
        preferences(model, tokenizer, {"train": PROMPTS, "validation": PROMPTS[:2]}, lengths, asked, "w")
        return tuple(sum(path.is_dir() for path in (tmp_path / kind).iterdir()) for kind in ("candidates", "pairs"))

    assert entries() == entries() == entries(max_length=100) == (1, 1)  # no prompt is that long
    assert entries(judge={"option": 1}) == (1, 2)
    assert entries(generation={"pairs_per_prompt": 1}) == (1, 3)
    monkeypatch.setattr(judging, "JUDGES_VERSION", judging.JUDGES_VERSION + 1)
    assert entries() == (1, 4)
    monkeypatch.setattr(sampling, "SAMPLING_VERSION", sampling.SAMPLING_VERSION + 1)
    assert entries() == (2, 4)  # the same responses
    model.generation_config.eos_token_id = [model.generation_config.eos_token_id, 5]
    model.generation_config.temperature = 0.5  # not asked for
    candidates, pairs = entries()
    assert (candidates, pairs) in ((3, 4), (3, 5))  # they may end where they did
    assert entries(max_length=16) == (4, pairs + 1)  # prompts are cut
    tokenizer.add_special_tokens({"pad_token": "<pad>"})  # the text of a response is another
    assert entries()[0] == 5


def test_a_cut_response_has_no_end():
    responses = [Sample([1], [2, 3], "a b", ended=True), Sample([1], [2, 4], "a c d", ended=False)]
    some = [generate.Candidate("p", "p", one, "tokenizer") for one in responses]
    (pair,) = judging._pairs(some, [[(0, 1)]], {(0, 1): 0.0}, [{}, {}], at_most=2, seed=0)
    assert (pair.chosen, pair.chosen_ended, pair.rejected, pair.rejected_ended) == ("a c d", False, "a b", True)


def test_all_ties_are_an_error(tmp_path, llama):
    def same(prompt: str, responses: list[str]) -> list[dict[str, float]]:
        return [{"score": 0.0} for _ in responses]

    with pytest.raises(RuntimeError, match="differ to the judge"):
        preferences(*llama, {"train": PROMPTS, "validation": PROMPTS}, same, config(tmp_path), "w")


def policy(tokenizer):
    """A random Llama with a row for each of its tokens, and no more."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return LlamaForCausalLM(CONFIGS["llama"](vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)).eval()


@pytest.mark.parametrize("make", [sentencepiece, lambda: tiny_tokenizer("llama")], ids=["spaces", "bytes"])
def test_pairs_are_trained_as_they_were_sampled(tmp_path, make, monkeypatch):
    """From sampling through the file to the batch, with a decoder that leaves out leading spaces, and with one that has
    no text of a response cut inside a character: the same tokens, and the same log-probs.
    """
    tokenizer, drawn = make(), []
    model = policy(tokenizer)
    monkeypatch.setattr(engines, "sample", lambda *a, **more: drawn.extend(sample(*a, **more)) or drawn[-24:])
    long = [f"\n\nHuman: {' dogs' * 60} {n}?\n\nAssistant:" for n in range(2)]  # cut to what the policy can be fed
    prompts = {"train": [*PROMPTS[:4], *long], "validation": PROMPTS}
    made = preferences(model, tokenizer, prompts, lengths, config(tmp_path, pairs_per_prompt=6), "w")
    made = [*made["train"], *made["validation"]]
    pairs = tokenize(made, tokenizer, 64, "error")
    again = tokenize([replace(one, token_ids=None) for one in made], tokenizer, 64, "truncate")
    assert sum(one != pair for one, pair in zip(again, pairs, strict=True)) > len(pairs) / 4  # as text they are others
    with torch.no_grad():
        index, real = torch.arange(len(pairs)), torch.ones(len(pairs), dtype=torch.bool)
        logps, _ = sequence_logps(model, collate_pairs(pairs, index, real, pad_id=0, packed=False))
    sides = [(pair.text.chosen, *pair.chosen) for pair in pairs] + [
        (pair.text.rejected, *pair.rejected) for pair in pairs
    ]
    for (text, prompt_ids, ids), logp in zip(sides, logps.tolist(), strict=True):
        [whole, *_] = [
            one
            for one in drawn
            if one.prompt_ids == prompt_ids
            and one.response_ids[: len(ids)] == ids
            and len(one.response_ids) < len(ids) + 4
        ]
        assert whole.response_ids == ids or (whole.text.endswith("\ufffd") and not text.endswith("\ufffd"))
        before, after = (tokenizer.decode(some, skip_special_tokens=True) for some in (prompt_ids, prompt_ids + ids))
        assert after == before + text
        with torch.no_grad():
            every = model(torch.tensor([prompt_ids + ids])).logits[0].double().log_softmax(-1)
        places = torch.arange(len(prompt_ids) - 1, len(prompt_ids) + len(ids) - 1)
        assert logp == pytest.approx(every[places, torch.tensor(ids)].sum().item(), abs=1e-3)


def test_a_candidate_is_read_as_it_was_written(tmp_path):
    chat = [{"role": "user", "content": "Is 1 even?"}]
    whole = generate.Candidate(chat, chat, Sample([5, 6], [7], "No", ended=False), "bytes")
    cut = generate.Candidate("a long prompt", "prompt", Sample([1], [2, 3], "a b", ended=True), "words")
    found = {"train": [cut, whole], "validation": [whole]}
    for split, some in found.items():
        write_rows(tmp_path / f"{split}.jsonl", map(generate.row, some))
    assert generate.read(tmp_path) == found
    ids = {"tokenizer": "bytes", "prompt": [5, 6], "response": [7]}
    assert generate.row(whole) == {"prompt": chat, "response": "No", "ended": False, "token_ids": ids}
    assert generate.row(cut)["fed"] == "prompt"
    for key in ("prompt", "response", "ended", "token_ids"):
        line = {name: value for name, value in generate.row(cut).items() if name != key}
        write_rows(tmp_path / "train.jsonl", [generate.row(whole), line])
        with pytest.raises(ValueError, match=f"(?s)train.jsonl.*line 2: must be a candidate .* found no '{key}'"):
            generate.read(tmp_path)


def test_a_candidate_is_drawn_again_from_its_line_alone(tmp_path, llama):
    model, tokenizer = llama
    asked = generation_of(config(tmp_path))
    found = generate.candidates(*llama, {"train": PROMPTS, "validation": PROMPTS[:2]}, asked, "w")
    rows = [row for some in found.values() for row in map(generate.row, some)]
    assert len({tuple(row["seed"]) for row in rows}) == len(rows)
    for row in rows[::5]:
        (seed, place), ids = row["seed"], row["token_ids"]
        [again] = sample(model, tokenizer, [ids["prompt"]], asked.sampling, seed, "", [place])
        assert again.response_ids[: len(ids["response"])] == ids["response"]
        p = model(torch.tensor([ids["prompt"]])).logits[0, -1, : len(tokenizer)].double().softmax(-1).cumsum(-1)
        assert int((p < np.random.default_rng(row["seed"]).random()).sum()) == ids["response"][0]


def test_seeds_make_no_pairs_again(tmp_path, llama):
    """Candidates of before have none, and pairs that were paid for."""
    asked = config(tmp_path)
    found = generate.candidates(*llama, {"train": PROMPTS, "validation": PROMPTS}, generation_of(asked), "w")
    old = {split: [replace(one, seed=None) for one in some] for split, some in found.items()}
    assert [[generate._candidate(generate.row(one)) for one in some] for some in old.values()] == [*old.values()]
    for some in (old, found):
        judging.cached_preferences(some, lengths, pairing_of(asked))
    assert sum(path.is_dir() for path in (tmp_path / "pairs").iterdir()) == 1


def test_a_response_cut_inside_a_character_ends_before_it():
    tokenizer = tiny_tokenizer("gpt2")
    prompt, ids = tokenizer("Is it")["input_ids"], tokenizer(" Rome ☃")["input_ids"]
    for bytes_ in (1, 2):
        one = sampling.cut(prompt, ids[:-bytes_], {tokenizer.eos_token_id}, tokenizer)
        assert one.text.endswith("\ufffd")
        whole = generate._whole_characters(one, tokenizer)
        assert tokenizer.decode(whole.response_ids) == whole.text == " Rome "
        assert whole.response_ids == ids[: len(whole.response_ids)]
    one = sampling.cut(prompt, [*ids[-2:], *ids], {tokenizer.eos_token_id}, tokenizer)
    assert generate._whole_characters(one, tokenizer) == one  # broken within: what follows stays


def test_token_ids_are_used_where_they_fit(tmp_path, capsys):
    tokenizer = tiny_tokenizer("qwen2")
    chats = [[{"role": "user", "content": f"Is {n} even?"}] for n in range(6)]
    found = preferences(
        policy(tokenizer), tokenizer, {"train": chats, "validation": chats[:2]}, lengths, config(tmp_path), "w"
    )["train"]
    write(tmp_path / "pairs.jsonl", found)
    assert read(tmp_path / "pairs.jsonl") == found
    capsys.readouterr()
    pairs = tokenize(found, tokenizer, 64, "error")
    assert [(pair.chosen_ids, pair.rejected_ids) for pair in pairs] == [
        (one.token_ids.chosen, one.token_ids.rejected) for one in found
    ]
    assert capsys.readouterr().out == ""
    for change in ("template", "tokenizer"):
        other = tiny_tokenizer("qwen2" if change == "template" else "llama")
        other.chat_template = "again: " + CHAT_TEMPLATE
        read_as_text = tokenize(found, other, 200, "error")
        assert (
            f"{len(found)} of {len(found)} pairs that were sampled with another tokenizer or after"
            in capsys.readouterr().out
        )
        assert read_as_text == tokenize([replace(one, token_ids=None) for one in found], other, 200, "error")
        assert all(pair.text.token_ids is None for pair in read_as_text)
    elsewhere = replace(found[0].token_ids, tokenizer="another", chosen=[5], rejected=[6])  # after the same prompt ids
    [read_as_text] = tokenize([replace(found[0], token_ids=elsewhere)], tokenizer, 64, "error")
    assert [read_as_text] == tokenize([replace(found[0], token_ids=None)], tokenizer, 64, "error")
    for change in ({"chosen": "other"}, {"token_ids": replace(found[0].token_ids, rejected=[100_000])}):
        with pytest.raises(
            ValueError, match=r"must be those of the text beside them, found others:\n  here \((ch|rej)"
        ):
            tokenize([replace(found[0], source="here", **change)], tokenizer, 64, "error")
    line = json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])
    for wrong in (5, {}, line["token_ids"] | {"prompt": []}, line["token_ids"] | {"chosen": [1.5]}):
        (tmp_path / "pairs.jsonl").write_text(json.dumps(line | {"token_ids": wrong}))
        with pytest.raises(ValueError, match="line 1: token_ids"):
            read(tmp_path / "pairs.jsonl")


def test_what_was_sampled_after_a_prompt_that_is_cut_has_no_token_ids():
    """They would be written beside a text that is not what they were sampled after."""
    tokenizer = tiny_tokenizer("llama")
    pair = Preference("cats and dogs and cats", " a.", " b.")
    [read] = tokenize([pair], tokenizer, 64, "error")
    ids = TokenIds(vocabulary(tokenizer), read.prompt_ids, read.chosen_ids, read.rejected_ids)
    size = len(read.prompt_ids) + max(len(read.chosen_ids), len(read.rejected_ids))
    [whole], [cut] = (tokenize([replace(pair, token_ids=ids)], tokenizer, size - less, "truncate") for less in (0, 1))
    assert whole.text.token_ids == ids
    assert (cut.chosen_ids, cut.cut, cut.text.token_ids) == (ids.chosen, ("prompt",), None)


WORDS = (2, 4, 4, 1, 3)  # of the responses to each prompt: two are as good as each other


def test_sampled_pairs_follow_the_settings(tmp_path, tiny_model, data, monkeypatch):  # noqa: F811
    llama, asked, judged = tiny_model("llama"), [], []

    def drawn(model, tokenizer, prompts, sampling, seed, name, places) -> list[Sample]:
        asked.append({"prompts": [ids for _, ids in sorted(zip(places, prompts, strict=True))], "seed": seed})
        asked[-1] |= vars(sampling)
        samples = []
        for place, ids in zip(places, prompts, strict=True):
            row, nth = divmod(place, len(WORDS))
            text = " ".join([f"{row}/{nth}"] * WORDS[nth])
            samples.append(Sample(ids, [100 + row, 200 + nth, 2], text, ended=nth % 2 == 0))
        return samples

    def judge(prompts, responses):
        judged.extend(dict.fromkeys(prompts))
        return [{"score": float(len(response.split()))} for response in responses]

    monkeypatch.setattr(engines, "sample", drawn)
    given = [
        "generation.samples_per_prompt=5",
        "generation.temperature=0.3",
        "generation.top_p=0.6",
        "generation.batch_size=7",
    ]
    given += ["generation.pairs_per_prompt=3", "evaluation.temperature=0.8", "evaluation.batch_size=3"]
    given += [*own(data, llama), f"policy.path={llama}", "judge=shorter"]
    model, tokenizer = models.load(llama)
    long = "Human: " + "it is " * LONGEST
    prompts = {"train": [texts(number)[0] for number in range(5)] + [long], "validation": [texts(9)[0]]}

    def sampled(name: str, *more: str):
        asked.clear()
        config = frozen(tmp_path / name / "run", *given, *more)
        return preferences(model, tokenizer, prompts, judge, config, "w")

    found = sampled("some", "seed=5")
    named = ("max_new_tokens", "temperature", "top_p", "batch_size")
    assert [[one[name] for name in named] for one in asked] == [[6, 0.3, 0.6, 7]] * 2
    assert [len(one["prompts"]) for one in asked] == [6 * 5, 5]
    assert max(len(ids) for ids in asked[0]["prompts"]) == LONGEST - 6
    fed = asked[0]["prompts"][::5]
    assert asked[0]["prompts"] == [ids for ids in fed for _ in range(5)]
    seeds = [one["seed"] for one in asked]
    assert judged == [*prompts["train"], *prompts["validation"]]  # whole

    pairs = {}
    for pair in found["train"]:
        (row, better), (other, worse) = (map(int, text.split()[0].split("/")) for text in (pair.chosen, pair.rejected))
        assert row == other
        assert pair.prompt == (prompts["train"][row] if row < 5 else tokenizer.decode(fed[5], skip_special_tokens=True))
        assert WORDS[better] > WORDS[worse]
        assert (pair.chosen_ended, pair.rejected_ended) == (better % 2 == 0, worse % 2 == 0)
        assert (pair.token_ids.prompt, pair.token_ids.chosen) == (fed[row], [100 + row, 200 + better, 2])
        assert pair.token_ids.rejected == [100 + row, 200 + worse, 2]
        pairs.setdefault(row, set()).add((better, worse))
    assert [len(pairs[row]) for row in range(6)] == [3] * 6
    assert len(set(map(frozenset, pairs.values()))) > 1  # they are drawn
    assert len(found["validation"]) == 3

    every = sampled("all", "seed=6", "generation.pairs_per_prompt=20")["validation"]
    drawn_pairs = {tuple(int(text.split()[0].split("/")[1]) for text in (one.chosen, one.rejected)) for one in every}
    assert drawn_pairs == {(one, two) for one in range(5) for two in range(5) if WORDS[one] > WORDS[two]}
    assert len(every) == 9
    assert len({*seeds, *(one["seed"] for one in asked)}) == 4


def test_sampled_pairs_are_made_by_the_rule_for_faulty_prompts(tmp_path, tiny_model, data, monkeypatch):  # noqa: F811
    llama, rules = tiny_model("llama"), []

    def candidates(*given: Any) -> Any:
        rules.append(given[-1])
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "candidates", candidates)
    config = frozen(tmp_path / "run", *own(data, llama), f"policy.path={llama}")
    dataset = Dataset([], {}, {"train": ["a"], "validation": ["b"], "test": ["c"]}, on_faulty="keep")
    with pytest.raises(KeyboardInterrupt):
        score.prepare(config, dataset, shorter, *score.encode(config, dataset))
    assert rules == ["keep"]


def test_what_an_engine_gives_is_kept_batch_by_batch(tmp_path):
    """Of an engine that gives batches as they come; it is asked once for all, and again for what is left alone."""
    prompts, asked = [[n] * (1 + n % 3) for n in range(11)], []

    def each(some, places, most=None):
        asked.append(places)
        for first in range(0, len(some), 2):
            if first == most:
                raise RuntimeError("gone")
            rows = [*range(first, min(first + 2, len(some)))]
            yield rows, [Sample(some[row], [places[row]], f"{places[row]}", True) for row in rows]

    def drawn(**given):
        return generate._sampled(None, partial(each, **given), prompts, 2, "", tmp_path / "kept")

    with pytest.raises(RuntimeError, match="gone"):
        drawn(most=4)
    assert [(one.prompt_ids, one.text) for one in drawn()] == [(ids, f"{n}") for n, ids in enumerate(prompts)]
    assert drawn() == drawn()
    order = sorted(range(11), key=lambda place: -len(prompts[place]))
    assert asked == [order, order[4:]]
