"""Sample responses from a policy, judge them, and pair the better with the worse."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo import evaluate
from dpo.cache import digest, remember
from dpo.data.batches import fed_prompts
from dpo.data.records import Preference, Text, TokenIds, read, write, write_rows
from dpo.data.tokens import decode, vocabulary
from dpo.judges import JUDGES_VERSION, Judge
from dpo.policy.sampling import Sample, inputs, sample
from dpo.training.distributed import any_true


def preferences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: dict[str, list[Text]],
    judge: Judge | None,
    config: Any,
    weights: str,
    on_faulty: str = "error",
) -> dict[str, list[Preference]]:
    """On-policy preference pairs for the train and validation prompts, sampled once and shared by a sweep.

    They keep the token ids that were sampled, and of a prompt that was cut what the policy was fed. Every response is
    kept with its judgement in `<split>.candidates.jsonl`. weights: the policy's fingerprint. on_faulty: what to do with
    prompts that the policy cannot be fed, see `dpo.evaluate.fit_to_feed`.
    """
    if judge is None:
        raise ValueError(f"data={config.data._target_} has prompts but no pairs, so judge must not be none")
    splits = ("train", "validation")
    limit = config.max_length - config.max_new_tokens
    prompts = {
        split: evaluate.fit_to_feed(prompts[split], tokenizer, config, on_faulty, f"{split} prompts")
        for split in splits
    }
    fed = {split: fed_prompts(prompts[split], tokenizer, limit) for split in splits}
    key = {
        "weights": weights,
        "prompts": digest([prompts[split] for split in splits]),
        "judge": OmegaConf.to_container(config.judge),
        "judges": JUDGES_VERSION,
        "settings": OmegaConf.to_container(config.generation),
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
        **inputs(model, tokenizer, [ids for split in splits for _, ids in fed[split]]),
    }

    def build(folder: Path) -> None:
        for split in splits:
            seed = int(digest([config.seed, split])[:8], 16)
            pairs, candidates = _pairs(model, tokenizer, prompts[split], fed[split], judge, config, seed, split)
            write(folder / f"{split}.jsonl", pairs)
            write_rows(folder / f"{split}.candidates.jsonl", candidates)

    folder, _ = remember(config.cache, "pairs", key, build, any_true)
    return {split: read(folder / f"{split}.jsonl") for split in splits}


def _pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    fed: Sequence[tuple[Text, list[int]]],
    judge: Judge,
    config: Any,
    seed: int,
    split: str,
) -> tuple[list[Preference], list[dict[str, Any]]]:
    settings = config.generation
    n = settings.samples_per_prompt
    samples = sample(
        model,
        tokenizer,
        [ids for _, ids in fed for _ in range(n)],
        max_new_tokens=config.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=seed,
        batch_size=settings.batch_size,
        name=f"sampling {split} pairs",
    )
    samples = [_whole_characters(one, tokenizer) for one in samples]
    own = vocabulary(tokenizer)
    rng = random.Random(seed)
    pairs, candidates = [], []
    for row, (prompt, (start, _)) in enumerate(zip(prompts, fed, strict=True)):
        responses = samples[row * n : (row + 1) * n]
        judgements = judge(prompt, [response.text for response in responses])
        candidates += [
            {"prompt": prompt, "response": response.text, "ended": response.ended, **judgement}
            for response, judgement in zip(responses, judgements, strict=True)
        ]
        scored = [(judgement["score"], response) for judgement, response in zip(judgements, responses, strict=True)]
        decisive = [pair for pair in combinations(scored, 2) if pair[0][0] != pair[1][0]]
        for pair in rng.sample(decisive, min(settings.pairs_per_prompt, len(decisive))):
            (_, worse), (_, better) = sorted(pair, key=lambda scored: scored[0])
            ids = TokenIds(own, better.prompt_ids, better.response_ids, worse.response_ids)
            pairs.append(Preference(start, better.text, worse.text, better.ended, worse.ended, token_ids=ids))
    if not pairs:
        raise RuntimeError(
            f"no two of the {len(samples)} responses to {len(prompts)} prompts differ in score; sample more responses "
            f"(generation.samples_per_prompt, now {n}) or at a higher temperature (now {settings['temperature']})"
        )
    return pairs, candidates


def _whole_characters(response: Sample, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """A cut response without the bytes of a character that it was cut inside: no text stands for these."""
    if response.ended or not response.text.endswith("\ufffd"):
        return response
    for bytes_ in range(1, min(4, len(response.response_ids))):
        ids = response.response_ids[:-bytes_]
        text = decode(response.prompt_ids, ids, tokenizer)
        if not text.endswith("\ufffd"):
            return replace(response, response_ids=ids, text=text)
    return response
