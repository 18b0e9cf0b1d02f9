"""Supervised fine-tuning: make the first policy from demonstrations.

    python -m dpo.sft

`dpo.train` does the same by itself, once per sweep, when it is given no policy.
"""

if __name__ == "__main__":
    from dpo.sweep import launch

    launch.command("sft")  # ends here: a run is `python -m dpo.sweep.execute`, and what it imports is slow

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo import evaluate
from dpo.cache import digest, remember
from dpo.data.batches import Batch, Batches, Tokens, collate, size, tokenize_demonstrations
from dpo.data.chats import ends
from dpo.data.instructions import read_instructions, write_outputs
from dpo.data.records import Dataset, Demonstration, write_rows
from dpo.data.tokens import state
from dpo.policy import model as models
from dpo.policy.logps import packable, sequence_logps
from dpo.results import card
from dpo.settings import Sft, check_engine, evaluation_of, judge_of, lora_of, policy_spec, quantize_of, sft_of
from dpo.sweep.directory import finish
from dpo.sweep.inputs import load
from dpo.training import distributed
from dpo.training.log import Log
from dpo.training.loop import fit
from dpo.training.optim import Recipe, optimizer, schedule

logger = logging.getLogger(__name__)


def run(config: DictConfig, directory: Path) -> None:
    """Fine-tune the base model in `directory` from its frozen config; the same call resumes.

    Writes `metrics.jsonl`, `samples.jsonl`, the policy as a Hugging Face folder in `policy/`, `responses.jsonl` and,
    last, `evaluation.json`.
    """
    began = time.monotonic()
    dataset = load(config)
    instructions = read_instructions(config.evaluation.instructions)
    judge = judge_of(config)
    base = policy_spec(config)
    models.check_length(base, "max_length", config.max_length)
    if adapters := lora_of(config):
        models.check_lora(base, adapters)
    tokenizer = models.load_tokenizer(base)
    rules = config.max_length, config.on_too_long, dataset.on_faulty
    items = tokenize_demonstrations(dataset.demonstrations, tokenizer, *rules)
    measuring, settings = evaluation_of(config), sft_of(config)
    test = evaluate.test_prompts(dataset, measuring, tokenizer)
    evaluate.questions(instructions, tokenizer, measuring.limits)  # what cannot be asked stops here, not after training
    device = distributed.join(config.device)
    if quantize := quantize_of(config):
        base = replace(base, path=quantized_policy(base, quantize, config.cache))
    model, _ = models.load(base, device, adapters)
    weights = models.fingerprint(model)
    recorded: Any = OmegaConf.to_container(config, resolve=True)
    with Log(directory, config.wandb, run_id=f"{config.name}-{config.id}", group=config.name, config=recorded) as log:

        def look(done: int) -> None:
            log.sample(done, evaluate.show(model, tokenizer, test, judge, measuring))

        train(model, tokenizer, items, settings, directory / "checkpoint", log, look, config.id)
        models.save(model, tokenizer, directory / "policy")
        outputs = evaluate.answer(model, tokenizer, instructions, measuring) if instructions else []
        answers = evaluate.respond(model, tokenizer, test, measuring, "policy")
        responses, measured = evaluate.describe(test, answers, judge)
        log.write_last(steps(settings.recipe, len(items)), "test", measured)
    if distributed.is_main():
        models.move_adapter_out(directory / "policy")
        if instructions:
            write_outputs(directory, instructions, outputs)
        write_rows(directory / "responses.jsonl", responses)
        done = {"steps": steps(settings.recipe, len(items)), "seconds": time.monotonic() - began, **measured}
        names = tuple(tokenizer.convert_ids_to_tokens(ends(tokenizer, model.generation_config)))
        facts = card.Facts(weights, None, {"train": len(items)}, not isinstance(test[0], str), names)
        card.write(directory / "policy", recorded, done, facts)
        finish(directory, "evaluation.json", done)
    distributed.leave()


def initial_policy(config: DictConfig, dataset: Dataset, device: torch.device, sampled: bool = False) -> str:
    """Folder or hub name of the policy that training starts from: `policy.path`, or the cached SFT of `policy.base`; of
    weights in 4 bits the folder of what they stand for. sampled: the engine is to sample from it.
    """
    path = _whole_policy(config, dataset, device, sampled)
    if (quantize := quantize_of(config)) is None:
        return path
    made = quantized_policy(policy_spec(config, path), quantize, config.cache)
    logger.info(f"policy: its linear weights in 4 bits, {quantize} ({made})")
    return made


def _whole_policy(config: DictConfig, dataset: Dataset, device: torch.device, sampled: bool) -> str:
    if config.policy.adapter is not None:
        path = merged_policy(policy_spec(config), config.cache, device)
        logger.info(f"policy: {config.policy.path} with the adapter {config.policy.adapter} merged into it ({path})")
        return path
    if config.policy.path is not None:
        logger.info(f"policy: {config.policy.path}")
        return str(config.policy.path)
    greet = partial(check_engine, config.engine, "handshake") if sampled else None
    path, cached = cached_policy(sft_of(config), dataset.demonstrations, device, dataset.on_faulty, greet)
    logger.info(
        f"policy: {config.policy.base} after SFT on {len(dataset.demonstrations)} demonstrations, "
        f"{'from the cache' if cached else 'trained now'} ({path})"
    )
    return path


def merged_policy(spec: models.ModelSpec, cache: str, device: torch.device) -> str:
    """Folder of a model with its adapter merged, which what is trained on from there starts from and is held to."""
    model, tokenizer = models.load(spec, device)

    def build(folder: Path) -> None:
        models.save(model, tokenizer, distributed.gathered([folder])[0] / "policy")

    folder, _ = remember(cache, "merged", _kept(model, tokenizer), build, distributed.any_true)
    return str(folder / "policy")


def quantized_policy(spec: models.ModelSpec, quantize: str, cache: str) -> str:
    """Folder of a model in float32 whose linear weights are those that 4 bits stand for: what training in 4 bits starts
    from and is held to. The bits lie beside it. On the CPU, since a GPU may hold no more than these.
    """
    model, tokenizer = models.load(spec)

    def build(folder: Path) -> None:
        models.save_quantized(model, tokenizer, quantize, folder)

    folder, _ = remember(cache, "quantized", _kept(model, tokenizer) | {"quantize": quantize}, build)
    return str(folder / "policy")


def _kept(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Of a key: all that a policy made of another has from it, be it weights or not."""
    return {
        "weights": models.fingerprint(model),
        "tokenizer": digest(state(tokenizer)),
        "chat_template": tokenizer.chat_template,
        "ends": ends(tokenizer, model.generation_config),
    }


def cached_policy(
    settings: Sft,
    demonstrations: list[Demonstration],
    device: torch.device,
    on_faulty: str = "error",
    before: Callable[[], None] | None = None,
) -> tuple[str, bool]:
    """Folder of the SFT policy that `dpo.train` starts from, made once per recipe; and whether it was there. before:
    called where it has to be trained: whoever needs no more than what is kept needs no server.
    """
    model, tokenizer = models.load(settings.base, device)
    items = tokenize_demonstrations(demonstrations, tokenizer, settings.max_length, settings.on_too_long, on_faulty)
    key = {
        **_kept(model, tokenizer),
        "demonstrations": digest(items),
        "recipe": asdict(settings.recipe),
        "max_length": settings.max_length,
        "precision": settings.precision,
        "seed": settings.seed,
    }

    def build(folder: Path) -> None:
        folder = distributed.gathered([folder])[0]  # rank 0's: each writes its part of checkpoint and policy there
        # The policy appears whole: where it is, a former attempt failed after it.
        if not distributed.any_true(distributed.is_main() and (folder / "policy").is_dir()):
            if before is not None:
                before()
            with Log(folder) as log:
                train(model, tokenizer, items, settings, folder / "checkpoint", log)
            models.save(model, tokenizer, folder / "policy")
        if distributed.is_main():
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)  # a policy needs nothing to resume from

    folder, cached = remember(settings.cache, "sft", key, build, distributed.any_true)
    return str(folder / "policy"), cached


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Tokens],
    settings: Sft,
    checkpoints: Path,
    log: Log,
    evaluation: Callable[[int], None] | None = None,
    identity: str | None = None,
) -> None:
    """Maximum likelihood of the responses, in place. The loss is in nats per token of the whole data set: a mean over
    each response's own tokens would weigh those of short ones more, and teach brevity.

    identity: of the settings, if `checkpoints` are a run's; a cached policy's lie under the digest of what decides it.
    """
    packed = settings.packed and packable(model, [(prompt, [response]) for prompt, response in items])
    if settings.activation_checkpointing:
        models.checkpoint_activations(model)
    mean_length = sum(len(response_ids) for _, response_ids in items) / len(items)

    def step(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logps, lengths = sequence_logps(model, batch)
        return -logps / mean_length, {"logps": logps, "lengths": lengths}

    recipe = settings.recipe
    batches = Batches(
        items,
        partial(collate, pad_id=models.pad_id(tokenizer), packed=packed),
        size=lambda tokens: size((tokens[0], [tokens[1]])),
        batch_size=recipe.batch_size,
        micro_batch_tokens=settings.micro_batch_tokens,
        seed=settings.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    last = steps(recipe, len(items))
    inputs = {"base": models.fingerprint(model), "demonstrations": digest(items)}
    if identity is not None:
        inputs["settings"] = identity
    optim = optimizer(model, recipe.optimizer, recipe.lr, recipe.adam_betas, recipe.weight_decay)
    fit(
        model,
        batches,
        step,
        optim,
        schedule(optim, recipe.schedule, recipe.warmup_steps, last),
        steps=last,
        max_grad_norm=recipe.max_grad_norm,
        precision=settings.precision,
        log=log,
        directory=checkpoints,
        checkpoint_every=settings.checkpoint_every,
        checkpoints_kept=settings.checkpoints_kept,
        evaluate=evaluation,
        evaluate_every=settings.evaluate_every,
        inputs=inputs,
        name="SFT",
    )


def steps(recipe: Recipe, demonstrations: int) -> int:
    """Optimizer steps of the recipe."""
    return recipe.steps or recipe.epochs * -(-demonstrations // recipe.batch_size)
