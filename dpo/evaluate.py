"""Measure a policy: win rate and KL against another model, shape of the responses.

    python -m dpo.evaluate 'policy.path="runs/dev/beta=0.1/policy"' against=/models/sft

`dpo.train` does the same with what it trained, against what it started from.
"""

if __name__ == "__main__":
    from dpo.sweep import launch

    launch.command("evaluate")  # ends here: a run is `python -m dpo.sweep.execute`, and what it imports is slow

import contextlib
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo import engines
from dpo.cache import digest, remember
from dpo.data.batches import (
    Batch,
    Batches,
    Pair,
    PromptResponses,
    balance_by_tokens,
    collate_responses,
    encode_prompts,
    size,
)
from dpo.data.instructions import read_instructions, write_outputs
from dpo.data.records import Dataset, Text, listed, write_rows
from dpo.data.tokens import encode_alone, usable
from dpo.data.truncation import Limits, cut_prompts
from dpo.judges import JUDGES_VERSION, Judge, Rule, compare
from dpo.judges.best import best_of, kl_bound
from dpo.policy import model as models
from dpo.policy.logps import forward_tokens, packable, sequence_kl
from dpo.policy.sampling import Sample, inputs, sample
from dpo.responses import counted, figures, is_broken, is_invalid, repetition
from dpo.settings import (
    BestOf,
    Evaluation,
    baseline_best_of,
    evaluation_judge,
    evaluation_of,
    identity_of,
    policy_best_of,
    policy_spec,
)
from dpo.sweep.directory import before, finish
from dpo.sweep.inputs import load
from dpo.sweep.schema import number_of_samples
from dpo.sweep.signature import in_evaluations, instantiate
from dpo.training import distributed
from dpo.training.distributed import all_sum, any_true, device_of, gathered, is_main
from dpo.training.log import progress
from dpo.training.loop import AnyStep, passes, refuse
from dpo.win_rates import length_controlled, wilson

logger = logging.getLogger(__name__)

DIVERGED = "Training diverged, if it was finite before: lower the learning rate. Else look at these items."
TEXTS = ("prompt", "response", "baseline")  # columns of a row that have no mean
AT_ONE = "policy at temperature 1", "answers of the policy at temperature 1"  # stream and title
TO_INSTRUCTIONS = "policy to instructions", "answers of the policy to instructions"


def run(config: DictConfig, directory: Path) -> None:
    """Write `responses.jsonl` (test responses with their judgements) and last `evaluation.json` into `directory`."""
    began = time.monotonic()
    dataset, instructions = load(config), read_instructions(config.evaluation.instructions)
    spec, settings, judge = policy_spec(config), evaluation_of(config), evaluation_judge(config)
    best, beaten = policy_best_of(config), baseline_best_of(config)
    models.check_length(spec, "max_length", config.max_length)
    tokenizer = models.load_tokenizer(spec)
    test = test_prompts(dataset, settings, tokenizer)
    questions(instructions, tokenizer, settings.limits)
    against = replace(spec, path=config.evaluation.baseline, adapter=None)
    if judge:  # a model that does not belong here is refused before one is loaded
        reads_alike(against, tokenizer)
    path = before(config.against, spec.path)
    start = {} if path is None else {"kl": replace(spec, path=path, adapter=None)}
    for one in start.values():
        models.check_same_tokenizer(one.path, models.load_tokenizer(one), spec.path, tokenizer)
    device = distributed.join(config.device)
    policy, _ = models.load(spec, device)
    kl_targets = {name: models.load(one, device)[0] for name, one in start.items()}
    initial = next(((other, tokenizer, models.fingerprint(other)) for other in kl_targets.values()), None)
    others = compared_with(against, initial, dataset, test, settings, device, beaten) if judge else None
    answers = answer(policy, tokenizer, instructions, settings) if instructions else []
    if best is None:
        responses, measured = measure(policy, kl_targets, tokenizer, test, others, judge, settings)
    else:  # its probabilities are not known, so neither is its KL
        chosen = best_of_n(policy, tokenizer, models.fingerprint(policy), test, settings, best, "policy")
        responses, measured = describe(test, chosen, judge, others, settings.rule)
        measured["kl_bound"] = kl_bound(best.n)
    measured |= baseline_kl_bound(beaten) if others else {}
    if is_main():
        if instructions:
            write_outputs(directory, instructions, answers)
        write_rows(directory / "responses.jsonl", responses)
        finish(directory, "evaluation.json", {**measured, "seconds": time.monotonic() - began})
    distributed.leave()


def measure(
    policy: PreTrainedModel,
    kl_targets: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    baseline: Sequence[str] | None,
    judge: Judge | None,
    settings: Evaluation,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row per prompt with both responses, and figures for `evaluation.json`.

    To those of `describe` come for each of `kl_targets`, by its name, `kl`: KL(policy || target) in nats per response
    (Rao-Blackwellized), and `kl_plain` (the log-ratio), each with its standard error, on samples at temperature 1. Both
    are of responses that are cut at `max_new_tokens`: what would come after it is in neither.
    """
    samples = respond(policy, tokenizer, prompts, settings, "policy")
    rows, result = describe(prompts, samples, judge, baseline, settings.rule)
    at_one = (
        samples
        if settings.sampling.temperature == 1
        else respond(policy, tokenizer, prompts, at(settings, 1.0), *AT_ONE)
    )
    read = settings.packed, settings.micro_batch_tokens
    for kl_target, model in kl_targets.items():
        plain, rao_blackwell = kl(policy, model, at_one, *read, models.vocabulary(tokenizer), kl_target)
        for name, values in ((kl_target, rao_blackwell), (f"{kl_target}_plain", plain)):
            result[name] = values.mean().item()
            spread = values.std().item() if len(values) > 1 else math.nan
            result[f"{name}/se"] = spread / math.sqrt(len(values))
    return rows, result


def describe(
    prompts: Sequence[Text],
    samples: Sequence[Sample],
    judge: Judge | None,
    baseline: Sequence[str] | None = None,
    rule: Rule | None = None,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row per prompt with its response; their number `n`, and means: `length` in tokens without the end, `ended`,
    `repetition`, `broken` (see `is_broken`), what `responses.figures` says of the text, the median of `compression`,
    the judge's measures and `responses.counted`.

    Against `baseline` responses to the same prompts also `win_rate` (ties one half), `win_rate_lc` at equal lengths,
    both with their 95 % intervals, and `words` and `invalid` of the baseline; by a judge of pairs `inconsistent`, the
    share of comparisons that it decides otherwise when the responses change places. `win` goes by the rule, see
    `compare`. What a judge cannot judge is in none of its means: then `judged` and `compared` are the numbers of
    responses that it did, and of those with a `win`.
    """
    others: Sequence[str | None] = [None] * len(prompts) if baseline is None else baseline
    rows: list[dict[str, Any]] = []
    judgements: list[dict[str, float]] = [{}] * len(prompts)
    outcomes = judgements
    if judge and baseline is None:
        judgements, _ = compare(judge, prompts, [one.text for one in samples], [])
    elif judge and baseline is not None:
        both = [*(one.text for one in samples), *baseline]
        pairs = [(row, len(prompts) + row) for row in range(len(prompts))]
        judgements, outcomes = compare(judge, [*prompts, *prompts], both, pairs, rule)
    measured = zip(prompts, samples, others, judgements[: len(prompts)], outcomes, strict=True)
    for prompt, one, against, judgement, outcome in measured:
        length = len(one.response_ids) - one.ended
        row: dict[str, Any] = {"prompt": prompt, "response": one.text, "ended": one.ended, "length": length}
        row["repetition"] = repetition(one.response_ids)
        row["broken"] = is_broken(one, against)
        row.update({**figures(prompt, one.text), **judgement, **counted(judgement)})
        if outcome:
            row.update({"baseline": against, **outcome})
        rows.append(row)
    names = {name: None for row in rows for name in row if name not in TEXTS}
    result = {name: _mean([row[name] for row in rows if name in row]) for name in names}
    result["compression/median"] = median(row["compression"] for row in rows)
    if baseline is not None:
        result["baseline/words"] = _mean([len(text.split()) for text in baseline])
        result["baseline/invalid"] = _mean([is_invalid(text) for text in baseline])
    counts = {"n": len(rows)}
    if "win" in result:
        compared = sum("win" in row for row in rows)
        low, high = wilson(rate := result.pop("win"), compared)
        result |= {"win_rate": rate, "win_rate/low": low, "win_rate/high": high}
        counts |= {"compared": compared} if compared < len(rows) else {}
        wins = [(row["win"], len(row["response"]) - len(row["baseline"])) for row in rows if "win" in row]
        rate, low, high = length_controlled(*zip(*wins, strict=True))
        result |= {"win_rate_lc": rate, "win_rate_lc/low": low, "win_rate_lc/high": high}
    judged = sum(map(bool, judgements[: len(rows)]))
    if 0 < judged < len(rows):
        counts |= {"judged": judged}
    return rows, {**counts, **result}


def test_prompts(dataset: Dataset, settings: Evaluation, tokenizer: PreTrainedTokenizerBase) -> list[Text]:
    """The first `evaluation.prompts` of the `usable_prompts`, or all if there are fewer, which is said."""
    found = usable_prompts(dataset.prompts["test"], tokenizer, settings.limits, dataset.on_faulty, "test prompts")
    asked = settings.prompts
    if len(found) < asked:
        logger.warning(f"evaluation: on all {len(found)} test prompts; evaluation.prompts asks for {asked}")
    return found[:asked]


def usable_prompts(
    prompts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, limits: Limits, on_faulty: str, what: str
) -> list[Text]:
    """The prompts to sample from: faulty ones by the rule for pairs, see `dpo.data.tokens.usable`, and by theirs, too,
    those that leave no room for a response where they are cut: on_too_long=truncate or drop leaves them out.

    what: what they are, for messages. Raises: ValueError for these with on_too_long=error, or if none is left.
    """
    return _with_room(prompts, usable(prompts, tokenizer, on_faulty, what), tokenizer, limits, what)


def _with_room(
    prompts: Sequence[Text],
    found: list[Text],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    what: str,
    must: bool = False,
) -> list[Text]:
    """Those of `found` among `prompts` that can be cut to what the policy is fed; must: all have to."""
    limit = limits.prompt
    long = [row for row, one in enumerate(encode_alone(found, tokenizer, what)) if len(one.ids) > limit]
    cut = cut_prompts([found[row] for row in long], tokenizer, [limit] * len(long))
    lengths = zip(long, encode_alone(cut, tokenizer, what) if cut else [], strict=True)
    out = {row: len(one.ids) for row, one in lengths if len(one.ids) > limit}
    if not out:
        return found
    names = [f"prompt {prompts.index(found[row])}, counted from 0: {length} tokens" for row, length in out.items()]
    said = (
        f"{len(out)} of {len(prompts)} {what} leave no room for a response, cut as far as can be, where {limit} tokens "
        "are left for them"
    )
    if must or limits.on_too_long == "error" or len(out) == len(found):
        advice = "" if must else ", or set on_too_long=drop to leave such prompts out"
        raise ValueError(f"{said}:{listed(names)}\nRaise max_length, or lower max_new_tokens{advice}.")
    logger.warning(f"tokens: {said}: dropped:{listed(names)}")
    return [prompt for row, prompt in enumerate(found) if row not in out]


def respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    settings: Evaluation,
    stream: str,
    title: str = "answers of the policy",
) -> list[Sample]:
    """One response to each test prompt; the same random numbers for all policies of a seed. All ranks have those that
    rank 0 drew: KL of others, which rounding may have made longer, would take other passes, and all ranks would wait.

    stream: which of a seed's random numbers. title: of the progress bar; "": none.
    """
    return gathered([_drawn(model, tokenizer, _encoded(prompts, tokenizer, settings), settings, stream, title)])[0]


def _encoded(prompts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, settings: Evaluation) -> list[list[int]]:
    return encode_prompts(prompts, tokenizer, settings.limits.prompt)


def _drawn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: list[list[int]],
    settings: Evaluation,
    stream: str,
    title: str,
) -> list[Sample]:
    seed = int(digest(["evaluation", settings.seed, stream])[:8], 16)
    if settings.engine is None:
        return sample(model, tokenizer, encoded, settings.sampling, seed, title)
    with in_evaluations("engine", settings.own_engine), engines.closing(instantiate(settings.engine)) as engine:
        return engine(model, tokenizer, encoded, range(len(encoded)), settings.sampling, seed, title)


def at(settings: Evaluation, temperature: float) -> Evaluation:
    """These settings at another temperature."""
    return replace(settings, sampling=replace(settings.sampling, temperature=temperature))


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[dict[str, str]],
    settings: Evaluation,
) -> list[str]:
    """The policy's responses to AlpacaEval's instructions."""
    prompts = questions(instructions, tokenizer, settings.limits)
    return [sample.text for sample in respond(model, tokenizer, prompts, settings, *TO_INSTRUCTIONS)]


def questions(instructions: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase, limits: Limits) -> list[Text]:
    """AlpacaEval's instructions as prompts: a user's turn, or plain text if the policy does not chat.

    Raises: ValueError if the policy cannot be fed one of them: its answers are compared with others' to all of them.
    """
    if not instructions:
        return []
    chats = tokenizer.chat_template is not None
    texts = [one["instruction"] for one in instructions]
    prompts: list[Text] = [[{"role": "user", "content": text}] if chats else text for text in texts]
    return _with_room(prompts, prompts, tokenizer, limits, "instructions of evaluation.instructions", must=True)


def compared_with(
    which: models.ModelSpec,
    initial: tuple[PreTrainedModel, PreTrainedTokenizerBase, str] | None,
    dataset: Dataset,
    prompts: Sequence[Text],
    settings: Evaluation,
    device: torch.device,
    best: BestOf | None,
) -> list[str] | None:
    """The responses to test prompts that the policy's are compared with.

    which: a policy, or at the path "human" or "initial" what evaluation.baseline means by it. initial: the policy
    before training, its tokenizer and fingerprint; None: nobody knows it. best: where it is best of n of that one.
    Raises: ValueError if the data do not have what humans wrote.
    """
    if which.path == "human":
        return dataset.written_to(prompts, "test")
    if best is None and which.path != "initial":
        model, tokenizer = models.load(which, device)
        initial = model, tokenizer, models.fingerprint(model)
    if initial is None:
        return None
    if best is not None:
        return [one.text for one in best_of_n(*initial, prompts, settings, best, "initial policy")]
    return baseline(*initial, prompts, settings)


def reads_alike(which: models.ModelSpec, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a baseline is a policy with this tokenizer, so that KL can be measured to it."""
    if which.path in ("initial", "human") or number_of_samples(which.path) is not None:
        return False
    return models.same_tokenizer(models.load_tokenizer(which), tokenizer)


def baseline(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: str,
    prompts: Sequence[Text],
    settings: Evaluation,
) -> list[str]:
    """The responses of the initial policy, or of another, to the test prompts, sampled once and shared by a sweep."""
    encoded = _encoded(prompts, tokenizer, settings)
    key = _key(model, tokenizer, encoded, settings, weights)

    def build(folder: Path) -> None:
        samples = _drawn(model, tokenizer, encoded, settings, "initial policy", "answers of the initial policy")
        (folder / "responses.json").write_text(json.dumps([one.text for one in samples]))

    folder, _ = remember(settings.cache, "baseline", key, build, any_true)
    return json.loads((folder / "responses.json").read_text())


def best_of_n(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: str,
    prompts: Sequence[Text],
    settings: Evaluation,
    best: BestOf,
    stream: str,
) -> list[Sample]:
    """Of `best.n` samples to each test prompt the one that the judge of pairs likes best, see `judges.best`.

    Sampled at the evaluation's temperature and judged once, shared by a sweep; what is sampled for n is among what is
    sampled for more. weights: the model's fingerprint. stream: which of a seed's random numbers.
    """
    encoded = _encoded(prompts, tokenizer, settings)
    key = {
        "stream": stream,
        "n": best.n,
        **best.decides,
        "judges": JUDGES_VERSION,
        "prompts": digest(list(prompts)),  # as the judge reads them
        **_key(model, tokenizer, encoded, settings, weights),
    }

    def build(folder: Path) -> None:
        title = f"{best.n} answers of the {stream}"
        samples = _drawn(model, tokenizer, encoded * best.n, settings, f"best of n of the {stream}", title)
        kept = best_of(best.judge, prompts, [one.text for one in samples], best.rule)
        (folder / "responses.json").write_text(json.dumps([asdict(samples[place]) for place in kept]))

    folder, _ = remember(settings.cache, "best_of_n", key, build, any_true)
    return [Sample(**row) for row in json.loads((folder / "responses.json").read_text())]


def _key(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: list[list[int]],
    settings: Evaluation,
    weights: str,
) -> dict[str, Any]:
    """All that decides what is sampled of a model for an evaluation."""
    return {
        "weights": weights,
        "seed": settings.seed,
        **({} if settings.engine is None else {"engine": identity_of(settings.engine)}),
        **inputs(model, tokenizer, encoded, settings.sampling),
    }


def baseline_kl_bound(best: BestOf | None) -> dict[str, float]:
    """How far a baseline that is best of n can be from the policy that is sampled."""
    return {} if best is None else {"baseline/kl_bound": kl_bound(best.n)}


def kl(
    policy: PreTrainedModel,
    kl_target: PreTrainedModel,
    samples: Sequence[Sample],
    packed: bool,
    micro_batch_tokens: int,
    vocabulary: Tensor | None = None,
    name: str = "kl",
) -> tuple[Tensor, Tensor]:
    """Per response, two unbiased estimates of sequence KL(policy || target) in nats: the log-ratio, and the sum over
    positions of the full-vocabulary KL (Rao-Blackwellized).  # (N,), (N,)

    Responses must be the policy's own, sampled at temperature 1 without top-p. KL is that of the process cut at
    `max_new_tokens`, so a policy that never ends has less of it than its endless responses would. The second mostly has
    less spread over responses, but need not: where policies are far apart its sum varies with the length and the path
    as much as the log-ratio does.
    packed: share prompts and leave out padding, where models can. vocabulary: the `tokens` of `sequence_kl`.

    Raises: RuntimeError if one of them is not finite.
    """
    items: list[PromptResponses] = [(one.prompt_ids, [one.response_ids]) for one in samples]
    packed = packed and packable(policy, items) and packable(kl_target, items)
    tokens = forward_tokens(micro_batch_tokens, packed)
    plain, rao_blackwell = torch.zeros(2, len(samples))
    bar = progress(total=len(samples), name="KL")
    with torch.no_grad(), bar:
        for share in balance_by_tokens([size(item) for item in items], tokens, 1):
            batch = collate_responses([items[place] for place in share], packed=packed).to(device_of(policy))
            log_ratios, exact = sequence_kl(policy, kl_target, batch, vocabulary)
            plain[share], rao_blackwell[share] = log_ratios.cpu(), exact.cpu()
            bar.update(len(share))
    if bad := (~(plain + rao_blackwell).isfinite()).nonzero().flatten().tolist():
        values = ", ".join(str((plain + rao_blackwell)[row].item()) for row in bad[:3])
        refuse(name, values, bad, lambda row: f"the response to test prompt {row}, counted from 0", DIVERGED)
    return plain, rao_blackwell


def on_pairs(step: AnyStep[Batch], batches: Batches[Pair, Batch], device: torch.device) -> dict[str, float]:
    """Means of loss and metrics over the pairs of all ranks; every rank calls it.

    Raises: RuntimeError, with the pairs at fault, if a loss is not finite: no mean could be compared with another.
    """
    sums: dict[str, Tensor] = {}
    count, bad = 0, []
    for number in range(len(batches)):
        micro_batches, real = batches.at(number)
        count += real
        for batch, losses, values, _ in passes(step, micro_batches, real, device, contextlib.nullcontext()):
            bad += batch.index[batch.valid & ~losses.isfinite()].tolist()
            for name, value in {"loss": losses, **values}.items():
                sums[name] = sums.get(name, 0) + (value.double() * batch.valid).sum()
    means = dict(zip(sums, (all_sum(torch.stack([*sums.values()])) / count).tolist(), strict=True))
    if not math.isfinite(means["loss"]):
        refuse("the validation loss", str(means["loss"]), bad, batches.name, DIVERGED)
    return means


def show(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    judge: Judge | None,
    settings: Evaluation,
) -> list[dict[str, Any]]:
    """Responses to the first few test prompts, to look at while training."""
    prompts = prompts[: settings.log_samples]
    if not prompts:
        return []
    here = replace(settings, engine=None)  # no server or vLLM for a few samples between steps
    return describe(prompts, respond(policy, tokenizer, prompts, here, "", title=""), judge)[0]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
