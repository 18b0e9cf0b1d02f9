"""Judge candidate responses, and pair the better with the worse.

    python -m dpo.judge candidates=runs/candidates/default judge=shorter

takes what `dpo.generate` wrote, or samples it likewise. `dpo.train data=file data.path=...` reads the pairs.
"""

if __name__ == "__main__":
    from dpo.sweep import launch

    launch.command("judge")  # ends here: a run is `python -m dpo.sweep.execute`, and what it imports is slow

import logging
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, groupby
from pathlib import Path

from omegaconf import DictConfig

from dpo import generate
from dpo.cache import digest, remember
from dpo.data.records import Measures, Preference, TokenIds, write, write_rows
from dpo.data.records import read as read_pairs
from dpo.data.treatment import treat
from dpo.generate import SPLITS, Candidate, seed_of
from dpo.judges import JUDGES_VERSION, Judge, compare, is_pairwise
from dpo.settings import Pairing, judge_of, pairing_of, treatment_of
from dpo.sweep.directory import finish
from dpo.sweep.inputs import load
from dpo.sweep.signature import instantiate
from dpo.training import distributed

logger = logging.getLogger(__name__)


def run(config: DictConfig, directory: Path) -> None:
    """Write pairs in `train.jsonl` and `validation.jsonl`, every candidate with its judgement in `train.judged.jsonl`
    and `validation.judged.jsonl`, and last `manifest.json`, into `directory`.
    """
    began = time.monotonic()
    judge = judge_of(config)
    dataset = load(config)  # also where it is not sampled for: what the run was planned with must be there
    distributed.join(config.device)
    if config.candidates is not None:
        found = generate.read(Path(config.candidates))
    else:
        found = generate.of_initial_policy(config, dataset)
    if config.pairs.off_policy:
        found = generate.beside_humans(found, dataset)
    pairs = preferences(found, judge, pairing_of(config), directory)
    pairs["train"] = treat(pairs["train"], treatment_of(config), config.seed)
    if distributed.is_main():
        write(directory / "train.jsonl", pairs["train"])  # those that a run would train on
        made = {f"{split} pairs": len(some) for split, some in pairs.items()}
        made |= {f"{split} candidates": len(some) for split, some in found.items()}
        finish(directory, "manifest.json", {**made, "seconds": time.monotonic() - began})
    distributed.leave()


def cached_preferences(
    found: dict[str, list[Candidate]], judge: Judge, settings: Pairing
) -> dict[str, list[Preference]]:
    """Preference pairs of candidates, judged once and shared by a sweep."""
    without_seeds = {split: [generate.row(replace(one, seed=None)) for one in some] for split, some in found.items()}
    key = {
        "candidates": digest(without_seeds),  # which decide nothing more, and which those of before do not have
        "judge": settings.judge,
        "judges": JUDGES_VERSION,
        "measures": 1,  # beside each pair
        "pairs_per_prompt": settings.pairs_per_prompt,
        "seed": settings.seed,
        **({"rule": settings.rule} if settings.rule else {}),
    }

    def build(folder: Path) -> None:
        preferences(found, judge, settings, folder)

    folder, _ = remember(settings.cache, "pairs", key, build, distributed.any_true)
    return {split: read_pairs(folder / f"{split}.jsonl") for split in SPLITS}


def preferences(
    found: dict[str, list[Candidate]], judge: Judge, settings: Pairing, folder: Path
) -> dict[str, list[Preference]]:
    """At most `pairs_per_prompt` pairs per prompt, none a tie; they and the judgements are written.

    What a pairwise judge says of two lines of `train.judged.jsonl`, counted from 0, is in `train.compared.jsonl`.
    Raises: RuntimeError if all are ties.
    """
    pairs = {}
    for split, some in found.items():
        comparisons = _comparisons(some)
        asked = [pair for same in comparisons for pair in same]
        texts = [one.response.text for one in some]
        judgements, outcomes = compare(judge, [one.prompt for one in some], texts, asked, instantiate(settings.rule))
        if judgements and not is_pairwise(judge) and (lost := sum(not judgement for judgement in judgements)):
            logger.warning(f"{lost} of {len(some)} {split} candidates could not be judged: they are in no pair")
        told = {pair: outcome.get("win") for pair, outcome in zip(asked, outcomes, strict=True)}
        wins = {pair: 0.5 if win is None else win for pair, win in told.items()}
        seed = seed_of(settings.seed, split)
        pairs[split] = _pairs(some, comparisons, wins, judgements, settings.pairs_per_prompt, seed)
        unpaired = _unpaired(some, comparisons, told)
        whys = ", ".join(f"{number} {why}" for why, number in unpaired.most_common())
        said = f"{unpaired.total()} of {len(comparisons)} {split} prompts are in no pair: {whys}"
        if not pairs[split]:
            raise RuntimeError(
                f"no two of the {len(some)} responses to a {split} prompt differ to the judge ({said}); sample more "
                "responses (generation.samples_per_prompt), at a higher temperature (generation.temperature), or to "
                "more prompts"
            )
        if unpaired:
            logger.info(said)
        if distributed.is_main():
            rows = ({**generate.row(one), **judgement} for one, judgement in zip(some, judgements, strict=True))
            write_rows(folder / f"{split}.judged.jsonl", rows)
            if is_pairwise(judge):
                compared = zip(asked, outcomes, strict=True)
                decided = ({"first": first, "second": second, **outcome} for (first, second), outcome in compared)
                write_rows(folder / f"{split}.compared.jsonl", decided)
            write(folder / f"{split}.jsonl", pairs[split])
    return pairs


def _comparisons(some: Sequence[Candidate]) -> list[list[tuple[int, int]]]:
    """For each prompt any two of its candidates, by their places; candidates of one prompt follow each other.

    Where a human is among them, any two of a human's and a sampled one.
    """
    same = groupby(range(len(some)), key=lambda row: (some[row].prompt, some[row].response.prompt_ids))
    both = [[*combinations(rows, 2)] for _, rows in same]
    mixed = [[(one, other) for one, other in pairs if some[one].human != some[other].human] for pairs in both]
    return [few or all_ for few, all_ in zip(mixed, both, strict=True)]


def _unpaired(
    some: Sequence[Candidate],
    comparisons: Sequence[Sequence[tuple[int, int]]],
    told: dict[tuple[int, int], float | None],
) -> Counter[str]:
    """How many prompts are in no pair, by reason. told: what came of each comparison; None: nothing."""
    reasons: Counter[str] = Counter()
    for same in comparisons:
        if any(told[pair] not in (None, 0.5) for pair in same):
            continue
        if all(some[one].response.text == some[other].response.text for one, other in same):
            reasons["whose responses are equal"] += 1
        elif all(told[pair] is None for pair in same):
            reasons["that could not be judged"] += 1
        else:
            reasons["with ties alone"] += 1
    return reasons


def _pairs(
    some: Sequence[Candidate],
    comparisons: Sequence[Sequence[tuple[int, int]]],
    wins: dict[tuple[int, int], float],
    judgements: Sequence[dict[str, float]],
    at_most: int,
    seed: int,
) -> list[Preference]:
    """Pairs of candidates, drawn at random for each prompt from its comparisons that one of the two won."""
    rng, pairs = random.Random(seed), []
    for same in comparisons:
        unequal = [pair for pair in same if wins[pair] != 0.5]
        for first, second in rng.sample(unequal, min(at_most, len(unequal))):
            places = (first, second) if wins[first, second] > 0.5 else (second, first)
            better, worse = (some[place] for place in places)
            good, bad = better.response, worse.response
            ids = TokenIds(better.tokenizer, good.prompt_ids, good.response_ids, bad.response_ids)
            sampled = None if better.human or worse.human else ids
            made = Preference(better.fed, good.text, bad.text, good.ended, bad.ended, token_ids=sampled)
            said_of_better, said_of_worse = (judgements[place] for place in places)
            pairs.append(replace(made, measures=_measures(said_of_better, said_of_worse, made)))
    return pairs


def _measures(better: dict[str, float], worse: dict[str, float], pair: Preference) -> Measures:
    """What a judge's words about its two responses say of a pair; it may score them and count right answers, or not."""
    words = (len(str(pair.chosen).split()), len(str(pair.rejected).split()))
    gap = better["score"] - worse["score"] if "score" in better else None
    if not all({"correct", "enough"} <= one.keys() for one in (better, worse)):
        return Measures(gap, words=words)
    kind = ("answers", "threshold", "length")[round(better["enough"] + worse["enough"])]
    return Measures(gap, kind, (better["correct"], worse["correct"]), words)
