"""Judge candidate responses, and pair the better with the worse.

    python -m dpo.judge candidates=runs/candidates/default judge=shorter

takes what `dpo.generate` wrote, or samples it likewise. `dpo.train data=file data.path=...` reads the pairs.
"""

if __name__ == "__main__":
    from dpo.sweep import launch

    launch.command("judge")  # ends here: a run is `python -m dpo.sweep.execute`, and what it imports is slow

import random
import time
from collections.abc import Sequence
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dpo import generate
from dpo.cache import digest, remember
from dpo.data.records import Preference, TokenIds, write, write_rows
from dpo.data.records import read as read_pairs
from dpo.generate import SPLITS, Candidate, seed_of
from dpo.judges import JUDGES_VERSION, Judge, judged
from dpo.sweep.directory import finish
from dpo.sweep.inputs import load
from dpo.sweep.signature import instantiate
from dpo.training import distributed


def run(config: DictConfig, directory: Path) -> None:
    """Write pairs in `train.jsonl` and `validation.jsonl`, every candidate with its judgement in `train.judged.jsonl`
    and `validation.judged.jsonl`, and last `manifest.json`, into `directory`.
    """
    began = time.monotonic()
    judge = instantiate(config.judge)
    if judge is None:
        raise ValueError("dpo.judge must have a judge, got judge=none; --help lists them")
    dataset = load(config)  # also where it is not sampled for: what the run was planned with must be there
    distributed.join(config.device)
    if config.candidates is not None:
        found = generate.read(Path(config.candidates))
    else:
        found = generate.of_initial_policy(config, dataset)
    pairs = preferences(found, judge, config, directory)
    if distributed.is_main():
        made = {f"{split} pairs": len(some) for split, some in pairs.items()}
        made |= {f"{split} candidates": len(some) for split, some in found.items()}
        finish(directory, "manifest.json", {**made, "seconds": time.monotonic() - began})
    distributed.leave()


def cached_preferences(found: dict[str, list[Candidate]], judge: Judge, config: Any) -> dict[str, list[Preference]]:
    """Preference pairs of candidates, judged once and shared by a sweep."""
    key = {
        "candidates": digest({split: [generate.row(one) for one in some] for split, some in found.items()}),
        "judge": OmegaConf.to_container(config.judge),
        "judges": JUDGES_VERSION,
        "pairs_per_prompt": config.generation.pairs_per_prompt,
        "seed": config.seed,
    }

    def build(folder: Path) -> None:
        preferences(found, judge, config, folder)

    folder, _ = remember(config.cache, "pairs", key, build, distributed.any_true)
    return {split: read_pairs(folder / f"{split}.jsonl") for split in SPLITS}


def preferences(
    found: dict[str, list[Candidate]], judge: Judge, config: Any, folder: Path
) -> dict[str, list[Preference]]:
    """At most `generation.pairs_per_prompt` pairs of unequal score per prompt; they, and the judgements, are written.

    Raises: RuntimeError if no two responses to a prompt differ in score.
    """
    settings, pairs = config.generation, {}
    for split, some in found.items():
        said = judged(judge, [one.prompt for one in some], [one.response.text for one in some])
        seed = seed_of(config.seed, split)
        pairs[split] = _pairs(some, [one["score"] for one in said], settings.pairs_per_prompt, seed)
        if not pairs[split]:
            raise RuntimeError(
                f"no two of the {len(some)} responses to a {split} prompt differ in score; sample more responses "
                f"(generation.samples_per_prompt, now {settings.samples_per_prompt}) or at a higher temperature (now "
                f"{settings['temperature']})"
            )
        if distributed.is_main():
            rows = ({**generate.row(one), **judgement} for one, judgement in zip(some, said, strict=True))
            write_rows(folder / f"{split}.judged.jsonl", rows)
            write(folder / f"{split}.jsonl", pairs[split])
    return pairs


def _pairs(some: Sequence[Candidate], scores: Sequence[float], at_most: int, seed: int) -> list[Preference]:
    """Pairs of unequal score, drawn at random for each prompt; candidates of one prompt follow each other."""
    rng, pairs = random.Random(seed), []
    for _, same in groupby(zip(scores, some, strict=True), key=lambda one: (one[1].prompt, one[1].response.prompt_ids)):
        unequal = [pair for pair in combinations(same, 2) if pair[0][0] != pair[1][0]]
        for pair in rng.sample(unequal, min(at_most, len(unequal))):
            (_, worse), (_, better) = sorted(pair, key=lambda one: one[0])
            good, bad = better.response, worse.response
            ids = TokenIds(better.tokenizer, good.prompt_ids, good.response_ids, bad.response_ids)
            pairs.append(Preference(better.fed, good.text, bad.text, good.ended, bad.ended, token_ids=ids))
    return pairs
