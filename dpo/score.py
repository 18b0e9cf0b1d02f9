"""Score the pairs of a run under its reference ahead of time: a step of its own, and never a part of training.

    python -m dpo.score reference=other reference.path=/models/large data=file data.path=pairs.jsonl policy.path=/sft

takes the settings of `dpo.train`, fills the cache that training with these pairs reads, and writes the scores beside
the pairs, for other machines and programs: `reference=precomputed reference.path=runs/scores/...` reads them again.
"""

if __name__ == "__main__":
    from dpo.sweep import launch

    launch.command("score")  # ends here: a run is `python -m dpo.sweep.execute`, and what it imports is slow

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo import generate, sft
from dpo.data.batches import Pair, mismatched
from dpo.data.kept import kept_tokens
from dpo.data.records import Dataset, Preference, called, row, write_rows
from dpo.data.treatment import Treatment, summary, treat
from dpo.data.truncation import Limits
from dpo.generate import SPLITS
from dpo.judge import cached_preferences
from dpo.judges import Judge
from dpo.losses.pairs import asked_by
from dpo.policy import model as models
from dpo.references import Precomputed, scored_ahead
from dpo.settings import (
    check_engine,
    generation_of,
    judge_of,
    limits_of,
    lora_of,
    pairing_of,
    policy_spec,
    scoring_beside,
    treatment_of,
)
from dpo.sweep.directory import finish
from dpo.sweep.inputs import load
from dpo.sweep.signature import instantiate
from dpo.training import distributed

logger = logging.getLogger(__name__)


def run(config: DictConfig, directory: Path) -> None:
    """Write `train.jsonl` and `validation.jsonl`, and last `manifest.json`, into `directory`.

    A reference without scores is passed over, so that a table's references can be scored in one line.

    A line is a pair, of chats as whole conversations, with `chosen_logprob` and `rejected_logprob` (nats, sums over the
    response; the layout of yale-nlp/RefDPO), `chosen_tokens` and `rejected_tokens` (how many the reference scored: it
    may read other tokens than the policy, and of given log-probs nobody knows), and with per_token=true the log-probs
    of the tokens. Where on_too_long=truncate cut a pair, the line holds the text that is left, which is what was
    scored, and `cut` says of what: prompt, chosen, rejected. Of responses with a label a line has the `completion` for
    the chosen one, the `mismatched` response of another prompt for the rejected one, and the `label`.
    """
    began = time.monotonic()
    pending, settings = instantiate(config.reference), scoring_beside(config)
    if not isinstance(pending, Precomputed):
        logger.info(
            f"reference={config.choices.reference} has no scores to make: it is asked at each step, or is no model"
        )
        if distributed.is_main():
            finish(directory, "manifest.json", {"seconds": time.monotonic() - began})
        return
    if settings.pool:
        scored_ahead(pending)
        settings.pool.check()
    dataset = load(config)
    pending.check(policy_spec(config), settings)
    start, policy, pairs = prepare(config, dataset, judge_of(config), *encode(config, dataset))
    reference = pending.prepare(policy_spec(config, start), policy, pairs, settings)
    logger.info(f"reference: {reference.held}")
    distributed.leave()
    if not distributed.is_main():
        return
    for split, items in pairs.items():
        rows = []
        for number, pair in enumerate(items):
            if pair.text is None:
                raise RuntimeError(f"{split} pair {number} has no text")
            scores: dict[str, Any] = named("logprob", pair.sides, reference.table[split][number].tolist())
            if reference.lengths:
                scores |= named("tokens", pair.sides, reference.lengths[split][number].tolist())
            if settings.per_token:
                both = reference.tokens[split][number :: len(items)]
                scores |= named("token_logprobs", pair.sides, [values.tolist() for values in both])
            names = dict(zip(("chosen", "rejected"), pair.sides, strict=True))
            cut = [names.get(part, part) for part in pair.cut]
            rows.append(row(pair.text) | ({"cut": cut} if cut else {}) | scores)
        write_rows(directory / f"{split}.jsonl", rows)
    result = {f"{split} pairs": len(items) for split, items in pairs.items()}
    result |= {f"{split} pairs cut": sum(bool(pair.cut) for pair in items) for split, items in pairs.items()}
    finish(directory, "manifest.json", {**result, "seconds": time.monotonic() - began})


def named(what: str, sides: Sequence[str], of_both: Sequence[Any]) -> dict[str, Any]:
    """The columns of what was found for both responses."""
    return {f"{side}_{what}": value for side, value in zip(sides, of_both, strict=True)}


def encode(config: DictConfig, dataset: Dataset) -> tuple[PreTrainedTokenizerBase, dict[str, Sequence[Pair]]]:
    """The policy's tokenizer, and the pairs that the data brings in tokens: bad ones stop here, before any model."""
    models.check_length(policy_spec(config), "max_length", config.max_length)
    tokenizer = models.load_tokenizer(policy_spec(config))
    preferences = treated(dataset.preferences, treatment_of(config), config.seed)
    known = dataset.texts if preferences is dataset.preferences else {}
    rules = limits_of(config), dataset.on_faulty, needs_labels(config), config.cache, known
    return tokenizer, tokenized(preferences, tokenizer, *rules)


def needs_labels(config: DictConfig) -> bool:
    """Whether the loss learns from responses with labels, not from pairs."""
    return "labels" in asked_by(instantiate(config.loss))


def treated(preferences: dict[str, list[Preference]], treatment: Treatment, seed: int) -> dict[str, list[Preference]]:
    """What is trained on, and held-out pairs as they are."""
    if treatment == Treatment() or not preferences:
        return preferences
    train = treat(preferences["train"], treatment, seed)
    logger.info("pairs: of %d for training %s", len(preferences["train"]), summary(train))
    return {**preferences, "train": train}


def tokenized(
    preferences: dict[str, list[Preference]],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    on_faulty: str,
    labels: bool,
    cache: str,
    texts: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Sequence[Pair]]:
    """What a loss learns from; labels: see `dpo.data.batches.mismatched`. cache: folder that keeps the tokens. texts:
    `dpo.data.records.texts` of splits, where that is known.
    """
    rules = limits.max_length, limits.on_too_long, on_faulty
    found: dict[str, Sequence[Pair]] = {}
    for split in SPLITS:
        if split in preferences:
            some = preferences[split]
            what = f"{split} {called(some[0].label)}"
            apart = not labels or some[0].label is None
            pairs = kept_tokens(some, tokenizer, *rules, what, apart, cache, texts.get(split))
            found[split] = mismatched(pairs, tokenizer, limits.max_length, what) if labels else pairs
    return found


def prepare(
    config: DictConfig,
    dataset: Dataset,
    judge: Judge | None,
    tokenizer: PreTrainedTokenizerBase,
    pairs: dict[str, Sequence[Pair]],
) -> tuple[str, PreTrainedModel, dict[str, Sequence[Pair]]]:
    """Where the initial policy is, that policy, and the pairs of both splits in tokens. tokenizer, pairs: of `encode`.

    The policy is trained first, and the pairs are sampled from it, where the config and the data bring none. Several
    processes join here.
    """
    device = distributed.join(config.device)
    if not pairs:
        check_engine(config.engine)
    start = sft.initial_policy(config, dataset, device, sampled=not pairs)
    rule = dataset.on_faulty
    policy, _ = models.load(policy_spec(config, start), device, lora_of(config))
    if not pairs:
        if judge is None:
            raise ValueError(f"data={config.data._target_} has prompts but no pairs, so judge must not be none")
        weights, settings = models.fingerprint(policy), generation_of(config)
        found = generate.candidates(policy, tokenizer, dataset.prompts, settings, weights, rule)
        if config.pairs.off_policy:
            found = generate.beside_humans(found, dataset)
        preferences = treated(cached_preferences(found, judge, pairing_of(config)), treatment_of(config), config.seed)
        pairs = tokenized(preferences, tokenizer, settings.limits, rule, needs_labels(config), config.cache)
    return start, policy, pairs
