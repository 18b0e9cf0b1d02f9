"""One preference-optimization run, or with -m a sweep of them.

python -m dpo.train -m beta=0.01,0.02,0.1
"""

if __name__ == "__main__":
    from dpo.sweep import launch

    launch.command("train")  # ends here: a run is `python -m dpo.sweep.execute`, and what it imports is slow

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo import evaluate
from dpo.cache import digest_large
from dpo.data.batches import Batch, Batches, Pair, brief, collate_pairs, collate_responses, size
from dpo.data.chats import ends
from dpo.data.instructions import read_instructions, write_outputs
from dpo.data.lazy import mapped
from dpo.data.records import write_rows
from dpo.losses import Loss, PairLogps, dpo
from dpo.losses.pairs import READ, asked_by, frozen, metrics, sees_whole_step, unbound
from dpo.policy import lora
from dpo.policy import model as models
from dpo.policy.best import BestCheckpoint
from dpo.policy.live import MovingAverage
from dpo.policy.logps import (
    by_sequence,
    differing,
    excess_tokens,
    forward_tokens,
    kl_from,
    log_collision,
    packable,
    sequence_logps,
    token_logps,
    token_logps_and,
)
from dpo.references import Pending, Reference, scored_ahead
from dpo.results import card
from dpo.score import encode, prepare
from dpo.settings import baseline_best_of, evaluation_of, judges_of, lora_of, policy_spec, quantize_of, scoring_beside
from dpo.sweep.directory import finish, remember_initial
from dpo.sweep.inputs import load
from dpo.sweep.signature import instantiate
from dpo.tables import Streamed, Table
from dpo.training import distributed
from dpo.training.log import Log
from dpo.training.loop import AnyStep, WholeStep, autocast, fit
from dpo.training.optim import optimizer, schedule
from dpo.win_rates import wilson

logger = logging.getLogger(__name__)


def run(config: DictConfig, directory: Path) -> None:
    """Train one policy in `directory` from its frozen config; the same call resumes.

    Writes `metrics.jsonl`, `samples.jsonl`, the policy as a Hugging Face folder in `policy/`, `responses.jsonl` (test
    responses with their judgements) and, last, `evaluation.json`.
    """
    began = time.monotonic()
    dataset = load(config)  # bad records stop here, before any model is loaded
    instructions = read_instructions(config.evaluation.instructions)
    (of_pairs, judge), loss = judges_of(config), instantiate(config.loss)
    best = baseline_best_of(config)
    pending: Pending = instantiate(config.reference)
    scoring, measuring = replace(scoring_beside(config), per_token="tails" in asked_by(loss)), evaluation_of(config)
    pending.check(policy_spec(config), scoring)
    make: Callable[..., Any] = pending.prepare
    if scoring.pool:
        make = scored_ahead(pending).start
        scoring.pool.check()
    if adapters := lora_of(config):
        models.check_lora(policy_spec(config), adapters)
    tokenizer, pairs = encode(config, dataset)
    test = evaluate.test_prompts(dataset, measuring, tokenizer)
    evaluate.questions(instructions, tokenizer, measuring.limits)  # what cannot be asked stops here, not after training
    against = policy_spec(config, config.evaluation.baseline)
    alike = evaluate.reads_alike(against, tokenizer)  # a baseline that cannot be read stops here
    start, policy, pairs = prepare(config, dataset, of_pairs, tokenizer, pairs)
    logger.info(brief(pairs["train"]))
    weights, device, in_4_bits = models.fingerprint(policy), distributed.device_of(policy), quantize_of(config)
    if distributed.is_main():
        remember_initial(directory, start)
    initial = policy, tokenizer, weights
    others = evaluate.compared_with(against, initial, dataset, test, measuring, device, best) if judge else None
    baseline = {"kl_baseline": str(against.path)} if test and alike else {}
    if judge is None and against.path != "initial" and not baseline:
        logger.warning(f"evaluation.baseline={against.path} compares nothing: there is no judge of evaluations")
    reference: Reference = make(policy_spec(config, start), policy, pairs, scoring)
    logger.info(f"reference: {reference.held}")
    packed = config.packed and packable(policy, mapped(lambda pair: pair.prompt_responses, pairs["train"]))

    def batches(split: str, batch_size: int, tokens: int, seed: int) -> Batches[Pair, Batch]:
        return Batches(
            pairs[split],
            partial(collate_pairs, pad_id=models.pad_id(tokenizer), packed=packed),
            size=lambda pair: size(pair.prompt_responses),
            batch_size=batch_size,
            micro_batch_tokens=tokens,
            seed=seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )

    train = batches("train", config.batch_size, config.micro_batch_tokens, config.seed)
    tokens = forward_tokens(config.micro_batch_tokens, packed)
    held_out = batches("validation", len(pairs["validation"]), tokens, seed=0)

    if config.activation_checkpointing:
        models.checkpoint_activations(policy)
    optim = optimizer(policy, config.optimizer, config.lr, config.adam_betas, config.weight_decay)
    logger.info(
        self_check(policy, reference, train.at(0)[0][0].to(device), pairs["train"], config.precision, config.beta)
    )
    optim.register_step_post_hook(lambda *_: reference.after_step(policy))
    steps = config.epochs * len(train) if config.steps is None else config.steps
    if isinstance(reference, MovingAverage) and 0 < steps <= reference.every:
        logger.warning(
            f"reference.every={reference.every} must be below the {steps} steps of this run for the reference to move "
            "before the last; it stays the initial policy"
        )

    on_held_out: dict[int, dict[str, float]] = {}  # after the step that was validated last

    def validate(done: int) -> dict[str, float]:
        if done not in on_held_out:
            on_held_out.clear()
            with torch.no_grad(), autocast(config.precision, device):
                step = step_of(policy, reference, frozen(loss), "validation")
                on_held_out[done] = evaluate.on_pairs(step, held_out, device)
        return on_held_out[done]

    def measure(model: PreTrainedModel, prompts: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Against `evaluation.baseline`, on the first test prompts; loads what KL is measured to. A policy in 4 bits is
        that itself, without its adapters: in float32 it may not fit where it is trained.
        """
        paths = {} if in_4_bits else {"kl": start}
        paths |= ({"kl_reference": reference.kl_target} if reference.kl_target else {}) | baseline
        kl_targets = {"kl": model} if in_4_bits else {}
        kl_targets |= {name: models.load(policy_spec(config, path), device)[0] for name, path in paths.items()}
        first = None if others is None else others[:prompts]
        rows, found = evaluate.measure(model, kl_targets, tokenizer, test[:prompts], first, judge, measuring)
        return rows, {**found, **(evaluate.baseline_kl_bound(best) if others else {})}

    parts = {"reference": reference, "loss": unbound(loss)}
    state = nn.ModuleDict({name: part for name, part in parts.items() if isinstance(part, nn.Module)})
    selection = BestCheckpoint(directory)
    settings: Any = OmegaConf.to_container(config, resolve=True)
    with Log(directory, config.wandb, run_id=f"{config.name}-{config.id}", group=config.name, config=settings) as log:

        def look(done: int) -> None:
            log.write(done, "validation", on_pairs := validate(done))
            if done and config.keep == "best":
                selection.update(done, on_pairs, policy, tokenizer)
            log.sample(done, evaluate.show(policy, tokenizer, test, judge, measuring))
            if config.evaluate_prompts and 0 < done < steps:
                log.write(done, "test", measure(policy, config.evaluate_prompts)[1])

        fit(
            policy,
            train,
            step_of(policy, reference, loss, "train"),
            optim,
            schedule(optim, config.schedule, config.warmup_steps, steps),
            steps=steps,
            max_grad_norm=config.max_grad_norm,
            precision=config.precision,
            log=log,
            directory=directory / "checkpoint",
            checkpoint_every=config.checkpoint_every,
            checkpoints_kept=config.checkpoints_kept,
            evaluate=look,
            evaluate_every=config.evaluate_every,
            extra=state,
            inputs={
                "settings": config.id,
                "policy": weights,
                "reference": reference.fingerprint,
                "pairs": _tokens(pairs),
            },
        )
        optim.zero_grad()
        optim.state.clear()  # three of training's four copies of the weights; what follows loads models of its own
        streamed: dict[str, float] = {}
        if isinstance(reference, Streamed):
            reference.finish()  # and nothing is left to score when a run has ended
            streamed = {"reference_wait_s": reference.waited}
            logger.info(f"training waited {reference.waited:.1f} s for reference log-probs; all are in the cache now")
        selection.update(steps, validate(steps), policy, tokenizer)  # keep=best: unless a former one is better
        selection.finalize(directory / "policy")
        logger.info(f"policy of step {selection.step} of {steps}, validation loss {selection.metrics['loss']:.4f}")
        if in_4_bits:
            lora.read(trained := policy, directory / "adapter")
        else:
            trained, _ = models.load(policy_spec(config, str(directory / "policy")), device)
        answers = evaluate.answer(trained, tokenizer, instructions, measuring) if instructions else []
        responses, measured = measure(trained, len(test))
        chosen = {"steps": steps, "selected_step": selection.step}
        ranked = selection.metrics.get("rewards/accuracies", math.nan)
        bounds = wilson(ranked, len(pairs["validation"])) if math.isfinite(ranked) else ()
        interval = dict(zip(("rewards/accuracies/low", "rewards/accuracies/high"), bounds, strict=False))
        told = {**streamed, **selection.metrics, **interval, **measured}
        result = {**chosen, "seconds": time.monotonic() - began, **told}
        log.write_last(steps, "test", measured)
    if distributed.is_main():
        if instructions:
            write_outputs(directory, instructions, answers)
        write_rows(directory / "responses.jsonl", responses)
        sizes = {split: len(items) for split, items in pairs.items()}
        names = tuple(tokenizer.convert_ids_to_tokens(ends(tokenizer, trained.generation_config)))
        facts = card.Facts(weights, reference.fingerprint, sizes, not isinstance(test[0], str), names)
        card.write(directory / "policy", settings, result, facts)
        finish(directory, "evaluation.json", result)
    distributed.leave()


def _tokens(pairs: dict[str, Sequence[Pair]]) -> str:
    """Digest of all pairs as they are trained on."""
    return digest_large({split: mapped(_learned, items) for split, items in pairs.items()})


def _learned(pair: Pair) -> Any:
    return pair.prompt_responses if pair.label is None else (*pair.prompt_responses, pair.label)


def step_of(
    policy: PreTrainedModel, reference: Reference, loss: Callable[[PairLogps], Loss], split: str
) -> AnyStep[Batch]:
    """Losses and metrics of pairs: (B,) of a micro-batch, or (N,) of the optimizer step if the loss sees it whole."""

    asked = asked_by(loss)

    def values(batch: Batch) -> dict[str, Tensor]:
        found = vars(pair_logps(policy, reference, batch, split, asked))
        return {name: value for name, value in found.items() if value is not None}

    def outputs(batch: Batch) -> dict[str, Tensor]:
        return policy_values(policy, reference, batch, asked)  # no log-probs of the reference, which do not change

    def losses(values: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        result = loss(pair := PairLogps(**values))
        return result.losses, metrics(pair, result)

    return WholeStep(values, outputs, losses) if sees_whole_step(loss) else lambda batch: losses(values(batch))


def pair_logps(
    policy: PreTrainedModel, reference: Reference, batch: Batch, split: str, asked: Sequence[str] = ()
) -> PairLogps:
    """Log-probabilities of a batch of pairs under policy and reference. asked: what more, see `losses.reads`."""
    of_policy, lengths = policy_values(policy, reference, batch, asked), torch.ones_like(batch.sequence_ids)
    of_reference = _of_pairs(("reference_chosen_logps", "reference_rejected_logps"), reference.logps(batch, split))
    if "tails" in asked:
        tails = by_sequence(reference.token_logps(batch, split) * excess_tokens(batch), batch)
        of_reference |= _of_pairs(READ["tails"][2:], tails)
    of_both = _of_pairs(("chosen_lengths", "rejected_lengths"), by_sequence(lengths, batch))
    return PairLogps(**of_policy, **of_reference, **of_both, row_ids=batch.index, desirable=batch.desirable)


def policy_values(
    policy: PreTrainedModel, reference: Reference, batch: Batch, asked: Sequence[str]
) -> dict[str, Tensor]:
    """What of that depends on the policy.  # name -> (B,)"""
    values: dict[str, Tensor] = {}
    tokens = None  # (N,)
    if "alignment" in asked:
        tokens, same = token_logps_and(policy, batch, log_collision)
        means = by_sequence(tokens.detach() - same, batch) / by_sequence(torch.ones_like(same), batch)
        values |= _of_pairs(READ["alignment"], means)
    if "kl" in asked:
        assert reference.model is not None, "a plan refuses a reference that gives no kl"
        tokens, kls = token_logps_and(policy, batch, kl_from(reference.model, batch))
        values |= _of_pairs(READ["kl"], by_sequence(kls, batch))
    tokens = token_logps(policy, batch) if tokens is None else tokens
    if "tails" in asked:
        values |= _of_pairs(READ["tails"][:2], by_sequence(tokens * excess_tokens(batch), batch))
    return values | _of_pairs(("policy_chosen_logps", "policy_rejected_logps"), by_sequence(tokens, batch))


def _of_pairs(names: Sequence[str], of_sequences: Tensor) -> dict[str, Tensor]:
    """Chosen, then rejected.  # (2B,) -> name -> (B,)"""
    return dict(zip(names, of_sequences.chunk(2), strict=True))


@torch.no_grad()
def self_check(
    policy: PreTrainedModel,
    reference: Reference,
    batch: Batch,
    pairs: Sequence[Pair],
    precision: str,
    beta: float,
) -> str:
    """How far the DPO loss of the first batch is from ln 2 before training. pairs: those that the batch is made of.

    Raises RuntimeError when the reference is, or starts as, the initial policy, and their log-probs differ by more than
    rounding explains.
    """
    with autocast(precision, batch.index.device):
        pair = pair_logps(policy, reference, batch, "train")
    off = dpo(pair, beta, label_smoothing=0.0).losses.mean().sub(math.log(2)).abs().item()
    if not reference.is_initial:
        return f"self-check: |loss - ln 2| = {off:.1e} before training; the reference is not the initial policy"
    ours = torch.cat([pair.policy_chosen_logps, pair.policy_rejected_logps])  # (2B,)
    theirs = torch.cat([pair.reference_chosen_logps, pair.reference_rejected_logps])
    wrong = differing(ours, theirs, precision)
    if distributed.any_true(bool(wrong)):  # all ranks go through the forward of a sharded model
        alike = collate_responses([pairs[row].prompt_responses for row in batch.index.tolist()], packed=False).to(
            batch.index.device
        )
        with autocast(precision, batch.index.device):
            forward, _ = sequence_logps(policy, alike)
        blamed = "the forward agrees with the policy; the reference is another model than it says"
        if differing(ours, forward, precision):
            blamed = "the policy's own forward gives others than its packed rows: set packed=false"
        elif isinstance(reference, Table):
            blamed = f"scores in {reference.folder} are damaged: delete it to score again"
        raise RuntimeError(
            "policy and reference are the same model before training, so their log-probs of a response must agree, "
            f"found {wrong or 'others on another process'}; {blamed}"
        )
    worst = (ours - theirs).abs().max().item()
    return f"self-check: |loss - ln 2| = {off:.1e}, policy equal to reference (log-probs within {worst:.1e} nats)"
