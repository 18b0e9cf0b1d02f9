"""Look at what training did: responses of a policy beside those of its reference, and how each token's log-prob moved.

    python -m dpo.show 'policy.path="runs/dev/beta=0.1/policy"'

writes `show.html`, a page that needs nothing else, and `tokens.jsonl`, its numbers. of=pairs shows held-out pairs.
"""

if __name__ == "__main__":
    from dpo.sweep import launch

    launch.command("show")  # ends here: a run is `python -m dpo.sweep.execute`, and what it imports is slow

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo import evaluate, score
from dpo.data.batches import Tokens
from dpo.data.prompts import read_prompts
from dpo.data.records import Dataset, write_rows
from dpo.data.tokens import pieces
from dpo.policy import model as models
from dpo.policy import scoring
from dpo.policy.scoring import Scoring
from dpo.results.side_by_side import Piece, Shown, html, lines, row
from dpo.settings import Evaluation, evaluation_of, policy_spec, scoring_of
from dpo.sweep.directory import before, finish
from dpo.sweep.inputs import load
from dpo.training import distributed

logger = logging.getLogger(__name__)
BOTH = ("policy", "reference")


def run(config: DictConfig, directory: Path) -> None:
    """Write `show.html`, `tokens.jsonl` (a response a line) and last `manifest.json` into `directory`."""
    began = time.monotonic()
    dataset, spec, settings = load(config), policy_spec(config), evaluation_of(config)
    models.check_length(spec, "max_length", config.max_length)
    tokenizer, pairs = models.load_tokenizer(spec), config.of == "pairs"
    if pairs:
        sequences = _held_out(dataset, tokenizer, settings)
    else:
        if config.of != "test":
            dataset = replace(dataset, prompts={"test": read_prompts(config.of)})
        prompts = evaluate.test_prompts(dataset, settings, tokenizer)
    against = replace(spec, path=str(before(config.against, spec.path)), adapter=None)
    models.check_same_tokenizer(against.path, models.load_tokenizer(against), spec.path, tokenizer)
    device = distributed.join(config.device)
    policy, reference = (models.load(one, device)[0] for one in (spec, against))
    if not pairs:  # those that evaluations of these models are of, at the same temperature and seed
        both = [
            evaluate.respond(model, tokenizer, prompts, settings, stream, f"answers of the {name}")
            for model, name, stream in zip((policy, reference), BOTH, ("policy", "initial policy"), strict=True)
        ]
        sequences = [(one.prompt_ids, one.response_ids) for same in zip(*both, strict=True) for one in same]
    ratios = log_ratios(policy, reference, sequences, scoring_of(config))
    names = ("chosen", "rejected") if pairs else BOTH
    found = shown(sequences, ratios, names, tokenizer)
    distributed.leave()
    if distributed.is_main():
        for line in lines(found):
            logger.info(line)
        write_rows(directory / "tokens.jsonl", map(row, found))
        title = f"{spec.path} against {against.path}"
        (directory / "show.html").write_text(html(title, found), encoding="utf-8")
        logger.info(f"written: {directory / 'show.html'}")
        made = {"responses": len(found), "tokens": sum(map(len, ratios)), "seconds": time.monotonic() - began}
        finish(directory, "manifest.json", made)


def log_ratios(
    policy: PreTrainedModel, reference: PreTrainedModel, sequences: Sequence[Tokens], settings: Scoring
) -> list[Tensor]:
    """log policy(token) - log reference(token) of each response's tokens, in float32: they add up to the log-ratio that
    losses see.  # N x (tokens,) nats
    """
    settings = replace(settings, precision="fp32", per_token=True)
    sources = [f"response {number}, counted from 0" for number in range(len(sequences))]
    found = []
    for model, name in zip((policy, reference), BOTH, strict=True):
        scores = scoring.score(model, sequences, models.fingerprint(model), settings, f"log-probs: {name}", sources)
        assert scores.token_logps is not None
        found.append(scores.token_logps)
    return [ours - theirs for ours, theirs in zip(*found, strict=True)]


def shown(
    sequences: Sequence[Tokens], ratios: Sequence[Tensor], names: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[Shown]:
    """The responses as text with numbers; those to a prompt follow each other, and have `names`."""
    found = []
    for number, ((prompt_ids, response_ids), values) in enumerate(zip(sequences, ratios, strict=True)):
        prompt = str(tokenizer.decode(prompt_ids, clean_up_tokenization_spaces=False))  # all that the policy is fed
        of_tokens, parts = iter(values.tolist()), []
        for text, ids in pieces(prompt_ids, response_ids, tokenizer):
            tokens = tokenizer.convert_ids_to_tokens(ids)
            parts.append(Piece(text, [(str(token), next(of_tokens)) for token in tokens]))
        found.append(Shown(prompt, names[number % len(names)], parts))
    return found


def _held_out(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, settings: Evaluation) -> list[Tokens]:
    """Chosen and rejected response of the first held-out pairs, in turn."""
    first = {"validation": dataset.preferences["validation"][: settings.prompts]}
    rules = settings.limits, dataset.on_faulty, False
    pairs = score.tokenized(first, tokenizer, *rules, settings.cache)["validation"]
    return [tokens for pair in pairs for tokens in (pair.chosen, pair.rejected)]
