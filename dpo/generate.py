"""Sample candidate responses from a policy, which `dpo.judge` makes preference pairs of.

    python -m dpo.generate policy.path=/models/sft data=file data.path=pairs.jsonl

`dpo.train` does the same by itself when its data bring prompts and no pairs.
"""

if __name__ == "__main__":
    from dpo.sweep import launch

    launch.command("generate")  # ends here: a run is `python -m dpo.sweep.execute`, and what it imports is slow

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo import engines, evaluate, sft
from dpo.cache import add_answers, answers_in, digest, remember
from dpo.data.batches import truncated_prompts
from dpo.data.records import Dataset, Text, parse, write_rows
from dpo.data.tokens import decode, vocabulary
from dpo.losses.pairs import unbound
from dpo.policy import model as models
from dpo.policy.sampling import Sample, in_batches, inputs
from dpo.settings import Generation, check_engine, generation_of, policy_spec
from dpo.sweep.directory import finish
from dpo.sweep.inputs import load
from dpo.sweep.signature import instantiate
from dpo.training import distributed
from dpo.training.log import progress

SPLITS = ("train", "validation")
AT_ONCE = 8  # batches of responses, which are lost if a run is killed before they have come


@dataclass(frozen=True)
class Candidate:
    """A response to a prompt, as it was sampled."""

    prompt: Text
    fed: Text  # what the policy was fed of it: less, where the prompt is too long
    response: Sample
    tokenizer: str  # `dpo.data.tokens.vocabulary` of it
    human: bool = False  # it was written, and has no token ids
    seed: list[int] | None = None  # that of the split and its place there; None: human, or sampled before it was kept


def run(config: DictConfig, directory: Path) -> None:
    """Write `train.jsonl` and `validation.jsonl`, a candidate a line, and last `manifest.json`, into `directory`."""
    began = time.monotonic()
    found = of_initial_policy(config, load(config))
    if distributed.is_main():
        for split, some in found.items():
            write_rows(directory / f"{split}.jsonl", map(row, some))
        made = {f"{split} candidates": len(some) for split, some in found.items()}
        tokens = sum(len(one.response.response_ids) for some in found.values() for one in some)
        finish(directory, "manifest.json", {**made, "tokens": tokens, "seconds": time.monotonic() - began})
    distributed.leave()


def of_initial_policy(config: DictConfig, dataset: Dataset) -> dict[str, list[Candidate]]:
    """Candidates of the policy that training would start from, for the prompts of the data. Processes join here."""
    models.check_length(policy_spec(config), "max_length", config.max_length)
    device = distributed.join(config.device)
    check_engine(config.engine)
    start = sft.initial_policy(config, dataset, device, sampled=True)
    policy, tokenizer = models.load(policy_spec(config, start), device)
    weights = models.fingerprint(policy)
    return candidates(policy, tokenizer, dataset.prompts, generation_of(config), weights, dataset.on_faulty)


def candidates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: dict[str, list[Text]],
    settings: Generation,
    weights: str,
    on_faulty: str = "error",
) -> dict[str, list[Candidate]]:
    """`samples_per_prompt` responses to each train and validation prompt, sampled once, shared by a sweep.

    They keep the token ids that were sampled, and of a prompt that was cut what the policy was fed. weights: the
    policy's fingerprint. on_faulty: what to do with prompts that no policy can be fed: `evaluate.usable_prompts`.
    """
    sampling, n = settings.sampling, settings.samples_per_prompt
    prompts = {
        split: evaluate.usable_prompts(prompts[split], tokenizer, settings.limits, on_faulty, f"{split} prompts")
        for split in SPLITS
    }
    fed = {split: truncated_prompts(prompts[split], tokenizer, settings.limits.prompt) for split in SPLITS}
    key = {
        "weights": weights,
        "prompts": digest([prompts[split] for split in SPLITS]),
        "engine": settings.decides,
        "samples_per_prompt": n,
        "seed": settings.seed,
        **inputs(model, tokenizer, [ids for split in SPLITS for _, ids in fed[split]], sampling),
    }

    def build(folder: Path) -> None:
        own = vocabulary(tokenizer)
        with engines.closing(instantiate(settings.engine)) as engine:
            each = getattr(unbound(engine), "each", None)
            for split in SPLITS:
                given = {"sampling": sampling, "seed": (seed := seed_of(settings.seed, split))}
                samples = _sampled(
                    partial(engine, model, tokenizer, **given),
                    partial(each, model, tokenizer, **given) if each else None,
                    [ids for _, ids in fed[split] for _ in range(n)],
                    sampling.batch_size,
                    f"sampling {split} pairs",
                    folder / f"{split}.unfinished",  # which `remember` takes away
                )
                whole_and_fed = zip(prompts[split], (start for start, _ in fed[split]), strict=True)
                asked = [both for both in whole_and_fed for _ in range(n)]
                found = [
                    Candidate(prompt, start, _whole_characters(one, tokenizer), own, seed=[seed, place])
                    for place, ((prompt, start), one) in enumerate(zip(asked, samples, strict=True))
                ]
                write_rows(folder / f"{split}.jsonl", map(row, found))

    folder, _ = remember(settings.cache, "candidates", key, build, distributed.any_true)
    return read(folder)


def _sampled(
    engine: Callable[..., list[Sample]],
    each: Callable[..., Iterator[tuple[list[int], list[Sample]]]] | None,
    prompts: Sequence[list[int]],
    batch_size: int,
    title: str,
    kept: Path,
) -> list[Sample]:
    """A response to each prompt. Those that came are added to the file `kept`, `AT_ONCE` batches at a time or, where
    the engine has a method `each`, batch by batch, so a run that was killed goes on there. In the order in which they
    would be sampled at once, so as they would be.
    """
    known: dict[int, list[Any]] = distributed.on_main(lambda: answers_in(kept, mend=True))
    chunks = in_batches(prompts, batch_size if each else AT_ONCE * batch_size)
    left = [places for places in chunks if not all(place in known for place in places)]

    def come() -> Iterator[tuple[list[int], list[Sample]]]:
        if each is None:
            for places in left:
                yield places, engine([prompts[place] for place in places], places, title="")
        elif places := [place for some in left for place in some]:
            for rows, samples in each([prompts[place] for place in places], places):
                yield [places[row] for row in rows], samples

    with progress(total=len(prompts), name=title, first=len(known)) as bar:
        for places, few in come():
            new = {place: [one.response_ids, one.text, one.ended] for place, one in zip(places, few, strict=True)}
            if distributed.is_main():
                add_answers(kept, {}, new)
            bar.update(len(new.keys() - known.keys()))
            known |= new
    return [Sample(ids, *known[place]) for place, ids in enumerate(prompts)]


def beside_humans(found: dict[str, list[Candidate]], dataset: Dataset) -> dict[str, list[Candidate]]:
    """The candidates, and after those of each prompt what a human wrote to it.

    Raises: ValueError if the data have nothing that was written to one of the prompts.
    """
    both = {}
    for split, some in found.items():
        groups = [[*same] for _, same in groupby(some, key=lambda one: one.prompt)]
        written = dataset.written_to([same[0].prompt for same in groups], split)
        both[split] = [
            one for same, text in zip(groups, written, strict=True) for one in (*same, _human(same[0], text))
        ]
    return both


def _human(beside: Candidate, text: str) -> Candidate:
    return replace(beside, seed=None, response=Sample(beside.response.prompt_ids, [], text, ended=True), human=True)


def seed_of(seed: int, split: str) -> int:
    """What the random numbers of a split start from."""
    return int(digest([seed, split])[:8], 16)


def read(folder: Path) -> dict[str, list[Candidate]]:
    """The candidates in the files of a folder, as `dpo.generate` writes them.

    Raises: ValueError that names the lines which are none.
    """
    return {split: [one for _, one in parse(folder / f"{split}.jsonl", _candidate)] for split in SPLITS}


def row(one: Candidate) -> dict[str, Any]:
    """A candidate as a line of a file."""
    said = one.response
    return {
        "prompt": one.prompt,
        **({} if one.fed == one.prompt else {"fed": one.fed}),
        "response": said.text,
        "ended": said.ended,
        "token_ids": {"tokenizer": one.tokenizer, "prompt": said.prompt_ids, "response": said.response_ids},
        **({"human": True} if one.human else {}),
        **({"seed": one.seed} if one.seed else {}),
    }


def _candidate(line: dict[str, Any]) -> Candidate:
    try:
        ids = line["token_ids"]
        said = Sample(list(ids["prompt"]), list(ids["response"]), line["response"], line["ended"])
        fed, human, seed = line.get("fed", line["prompt"]), line.get("human", False), line.get("seed")
        return Candidate(line["prompt"], fed, said, ids["tokenizer"], human, seed)
    except (LookupError, TypeError) as error:
        raise ValueError(f"must be a candidate as dpo.generate writes it, found no {error}") from None


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
