"""Make a base model of the embedded world: a small transformer that looks facts up in articles.

    python -m dpo.world.pretrain --output dpo/world/base
    python -m dpo.world.pretrain --size small --output FOLDER

The first comes with the code; this command is how it was made, and measures it. policy=small and policy=base have the
others made by their first run, and kept in the cache.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo.cache import remember
from dpo.data.batches import Batch, collate, encode_prompts, tokenize_demonstrations
from dpo.policy import model as models
from dpo.policy.logps import sequence_logps
from dpo.policy.sampling import Sampling, sample
from dpo.training import distributed
from dpo.training.log import Log
from dpo.training.loop import fit
from dpo.training.optim import optimizer, schedule
from dpo.world import language, sizes

LONGEST = 144  # tokens of an article and a lesson
CHECKPOINT_EVERY = 100  # optimizer steps


class Lessons:
    """Fresh articles for every optimizer step, drawn by the seed and the step alone."""

    def __init__(self, size: sizes.Size, seed: int, steps: int, tokenizer: PreTrainedTokenizerFast) -> None:
        self.size, self.seed, self.steps, self.tokenizer = size, seed, steps, tokenizer

    def __len__(self) -> int:
        return self.steps

    def name(self, row: int) -> str:
        return f"lesson {row}"

    def at(self, step: int) -> tuple[list[Batch], int]:
        rng = random.Random(f"lesson {self.seed} {step}")
        batch, facts = self.size.batch, max(count for start, count in self.size.curriculum if start <= step)
        lessons = [language.lesson(rng, facts) for _ in range(batch)]
        tokens = tokenize_demonstrations(lessons, self.tokenizer, LONGEST, "error")
        index, valid, pad_id = torch.arange(batch), torch.ones(batch, dtype=torch.bool), models.pad_id(self.tokenizer)
        return [collate(tokens, index, valid, pad_id=pad_id, packed=False)], batch


def train(
    size: sizes.Size,
    seed: int,
    steps: int,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    device: torch.device | str = "cpu",
) -> LlamaForCausalLM:
    """A new model of a size; goes on from the checkpoint in `directory` if there is one."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.hidden // 32,
            intermediate_size=size.intermediate,
            max_position_embeddings=LONGEST,
            initializer_range=0.04,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).to(device)  # type: ignore[arg-type]

    def step(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logps, lengths = sequence_logps(model, batch)
        return -logps / lengths, {}

    optim = optimizer(model, "adamw", lr=size.lr, betas=(0.9, 0.98), weight_decay=0.01)
    with Log(directory) as log:
        fit(
            model,
            Lessons(size, seed, steps, tokenizer),
            step,
            optim,
            schedule(optim, "cosine", 50, steps),
            steps=steps,
            max_grad_norm=1.0,
            precision="fp32",
            log=log,
            directory=directory / "checkpoint",
            checkpoint_every=CHECKPOINT_EVERY,
            name="pre-training",
        )
    return model


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, articles: int = 1000
) -> dict[str, str | float]:
    """How well the model looks facts up, greedily, in articles that it has not seen."""
    rng = random.Random("measure")
    lessons = [language.lesson(rng, language.FACTS_PER_ARTICLE) for _ in range(articles)]
    prompts = [lesson.prompt for lesson in lessons]
    samples = sample(
        model,
        tokenizer,
        encode_prompts(prompts, tokenizer, LONGEST),
        Sampling(max_new_tokens=60, temperature=0, top_p=1.0, batch_size=250),
        seed=0,
        name="measuring",
    )
    verdicts = [language.verdict(str(prompt), answer.text) for prompt, answer in zip(prompts, samples, strict=True)]
    return {
        "articles": articles,
        "right answers of 5": sum(verdict.correct for verdict in verdicts) / articles,
        "wrong statements": sum(verdict.wrong for verdict in verdicts) / articles,
        "valid clauses": sum(verdict.valid for verdict in verdicts) / articles,
        "ended": sum(answer.ended for answer in samples) / articles,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def pretrained(base: str, cache: str, device: str) -> None:
    """Have a base model of another size in the cache. To be called before the processes of a run join."""
    if not distributed.is_main():
        while sizes.present(base, cache) is None:  # rank 0 makes it
            time.sleep(0.5)
        return
    size, tokenizer = sizes.SIZES[sizes.MADE[base]], language.tokenizer()

    def build(folder: Path) -> None:
        if not (folder / "model").is_dir():  # it appears whole: where it is, a former attempt ended after it
            model = train(size, sizes.SEED, size.steps, tokenizer, folder, distributed.device(device))
            (folder / "quality.json").write_text(json.dumps(measure(model, tokenizer), indent=1) + "\n")
            models.save(model, tokenizer, folder / "model")
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)

    remember(cache, "base", sizes.key(sizes.MADE[base]), build)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the new base model")
    parser.add_argument("--size", choices=sizes.SIZES, default="tiny", help="of the model (default: tiny)")
    parser.add_argument("--seed", type=int, default=sizes.SEED, help="of the weights and the articles")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: those of the size)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--phrases", action="store_true", help="with another tokenizer, of phrases")
    options = parser.parse_args()
    size, tokenizer = sizes.SIZES[options.size], language.tokenizer(options.phrases)
    steps = options.steps or size.steps
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as directory:
        model = train(size, options.seed, steps, tokenizer, Path(directory))
    command = (
        f"python -m dpo.world.pretrain --output OUTPUT --size {options.size} --seed {options.seed} --steps {steps}"
    )
    command += " --phrases" if options.phrases else ""
    quality = {"command": command} | measure(model, tokenizer)
    models.save(model, tokenizer, options.output)
    (options.output / "quality.json").write_text(json.dumps(quality, indent=1) + "\n")
    for name, figure in quality.items():
        print(f"{name:20} {figure}")


if __name__ == "__main__":
    main()
