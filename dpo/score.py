"""Score the pairs of a run under its reference ahead of time: a step of its own, and never a part of training.

    python -m dpo.score reference=other reference.path=/models/large data=file data.path=pairs.jsonl policy.path=/sft

takes the settings of `dpo.train`, fills the cache that training with these pairs reads, and writes the scores beside
the pairs, for other machines and programs: `reference=precomputed reference.path=runs/scores/...` reads them again.
"""

if __name__ == "__main__":
    from dpo.sweep import launch

    launch.command("score")  # ends here: a run is `python -m dpo.sweep.execute`, and what it imports is slow

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo import generate, sft
from dpo.data.batches import TOO_LONG, Pair, tokenize, told_apart
from dpo.data.records import Dataset, Preference, row, write_rows
from dpo.generate import SPLITS
from dpo.judge import cached_preferences
from dpo.judges import Judge
from dpo.policy import model as models
from dpo.references import Precomputed
from dpo.settings import policy_spec
from dpo.sweep.directory import finish
from dpo.sweep.inputs import load
from dpo.sweep.signature import instantiate
from dpo.training import distributed
from dpo.training.log import say


def run(config: DictConfig, directory: Path) -> None:
    """Write `train.jsonl` and `validation.jsonl`, and last `manifest.json`, into `directory`.

    A reference without scores is passed over, so that a table's references can be scored in one line.

    A line is a pair, of chats as whole conversations, with `chosen_logprob` and `rejected_logprob` (nats, sums over the
    response; the layout of yale-nlp/RefDPO), `chosen_tokens` and `rejected_tokens` (how many the reference scored: it
    may read other tokens than the policy, and of given log-probs nobody knows), and with per_token=true the log-probs
    of the tokens. Where on_too_long=truncate cut a pair, the line holds the text that is left, which is what was
    scored, and `cut` says of what: prompt, chosen, rejected.
    """
    began = time.monotonic()
    reference = instantiate(config.reference)
    if not isinstance(reference, Precomputed):
        say(f"reference={config.choices.reference} has no scores to make: it moves with the policy, or is no model")
        if distributed.is_main():
            finish(directory, "manifest.json", {"seconds": time.monotonic() - began})
        return
    dataset = load(config)
    reference.check(policy_spec(config), config)
    start, policy, pairs = prepare(config, dataset, instantiate(config.judge), *encode(config, dataset))
    say(f"reference: {reference.prepare(policy_spec(config, start), policy, pairs, config)}")
    distributed.leave()
    if not distributed.is_main():
        return
    for split, items in pairs.items():
        rows = []
        for number, pair in enumerate(items):
            if pair.text is None:
                raise RuntimeError(f"{split} pair {number} has no text")
            scores: dict[str, Any] = named("logprob", reference.table[split][number].tolist())
            if reference.lengths:
                scores |= named("tokens", reference.lengths[split][number].tolist())
            if config.per_token:
                both = reference.tokens[split][number :: len(items)]
                scores |= named("token_logprobs", [values.tolist() for values in both])
            rows.append(row(pair.text) | ({"cut": list(pair.cut)} if pair.cut else {}) | scores)
        write_rows(directory / f"{split}.jsonl", rows)
    result = {f"{split} pairs": len(items) for split, items in pairs.items()}
    result |= {f"{split} pairs cut": sum(bool(pair.cut) for pair in items) for split, items in pairs.items()}
    finish(directory, "manifest.json", {**result, "seconds": time.monotonic() - began})


def named(what: str, of_both: Sequence[Any]) -> dict[str, Any]:
    """The columns of what was found for the chosen and the rejected response."""
    return dict(zip((f"chosen_{what}", f"rejected_{what}"), of_both, strict=True))


def encode(config: DictConfig, dataset: Dataset) -> tuple[PreTrainedTokenizerBase, dict[str, list[Pair]]]:
    """The policy's tokenizer, and the pairs that the data brings in tokens: bad ones stop here, before any model."""
    models.check_length(policy_spec(config), "max_length", config.max_length)
    tokenizer = models.load_tokenizer(policy_spec(config))
    return tokenizer, tokenized(dataset.preferences, tokenizer, config, dataset.on_faulty)


def tokenized(
    preferences: dict[str, list[Preference]], tokenizer: PreTrainedTokenizerBase, config: DictConfig, on_faulty: str
) -> dict[str, list[Pair]]:
    rules, found = (config.max_length, config.on_too_long), {}
    for split in SPLITS:
        if split in preferences:
            what = f"{split} pairs"
            pairs = tokenize(preferences[split], tokenizer, *rules, what, TOO_LONG, on_faulty)
            found[split] = told_apart(pairs, on_faulty, what)
    return found


def prepare(
    config: DictConfig,
    dataset: Dataset,
    judge: Judge | None,
    tokenizer: PreTrainedTokenizerBase,
    pairs: dict[str, list[Pair]],
) -> tuple[str, PreTrainedModel, dict[str, list[Pair]]]:
    """Where the initial policy is, that policy, and the pairs of both splits in tokens. tokenizer, pairs: of `encode`.

    The policy is trained first, and the pairs are sampled from it, where the config and the data bring none. Several
    processes join here.
    """
    device = distributed.join(config.device)
    start = sft.initial_policy(config, dataset, device)
    rule = dataset.on_faulty
    policy, _ = models.load(policy_spec(config, start), device)
    if not pairs:
        if judge is None:
            raise ValueError(f"data={config.data._target_} has prompts but no pairs, so judge must not be none")
        found = generate.candidates(policy, tokenizer, dataset.prompts, config, models.fingerprint(policy), rule)
        pairs = tokenized(cached_preferences(found, judge, config), tokenizer, config, rule)
    return start, policy, pairs
