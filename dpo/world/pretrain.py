"""Make the embedded world's base model again: a small transformer that looks facts up in articles.

    python -m dpo.world.pretrain --output dpo/world/base

The base model comes with the code; this command is how it was made, and measures it.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo.data.batches import Batch, collate, encode_prompts, tokenize_demonstrations
from dpo.policy import model as models
from dpo.policy.logps import sequence_logps
from dpo.policy.sampling import Sampling, sample
from dpo.training.log import Log
from dpo.training.loop import fit
from dpo.training.optim import optimizer, schedule
from dpo.world import language

BATCH = 48  # articles per optimizer step
LONGEST = 144  # tokens of an article and a lesson
# Articles come with one fact to look up at first. Asked for all six from the start, the model learns none in an hour.
CURRICULUM = {0: 1, 250: 2, 300: 4, 350: 6}  # from this optimizer step on: so many facts


class Lessons:
    """Fresh articles for every optimizer step, drawn by the seed and the step alone."""

    def __init__(self, seed: int, steps: int, tokenizer: PreTrainedTokenizerFast) -> None:
        self.seed, self.steps, self.tokenizer = seed, steps, tokenizer

    def __len__(self) -> int:
        return self.steps

    def name(self, row: int) -> str:
        return f"lesson {row}"

    def at(self, step: int) -> tuple[list[Batch], int]:
        rng = random.Random(f"lesson {self.seed} {step}")
        facts = max(count for start, count in CURRICULUM.items() if start <= step)
        lessons = [language.lesson(rng, facts) for _ in range(BATCH)]
        tokens = tokenize_demonstrations(lessons, self.tokenizer, LONGEST, "error")
        index, valid, pad_id = torch.arange(BATCH), torch.ones(BATCH, dtype=torch.bool), models.pad_id(self.tokenizer)
        return [collate(tokens, index, valid, pad_id=pad_id, packed=False)], BATCH


def train(seed: int, steps: int, tokenizer: PreTrainedTokenizerFast, directory: Path) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=LONGEST,
            initializer_range=0.04,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )

    def step(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logps, lengths = sequence_logps(model, batch)
        return -logps / lengths, {}

    optim = optimizer(model, "adamw", lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    with Log(directory) as log:
        fit(
            model,
            Lessons(seed, steps, tokenizer),
            step,
            optim,
            schedule(optim, "cosine", 50, steps),
            steps=steps,
            max_grad_norm=1.0,
            precision="fp32",
            log=log,
            directory=directory / "checkpoint",
            checkpoint_every=500,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the new base model")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the articles")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--phrases", action="store_true", help="with another tokenizer, of phrases")
    options = parser.parse_args()
    tokenizer = language.tokenizer(options.phrases)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as directory:
        model = train(options.seed, options.steps, tokenizer, Path(directory))
    command = f"python -m dpo.world.pretrain --output OUTPUT --seed {options.seed} --steps {options.steps}"
    command += " --phrases" if options.phrases else ""
    quality = {"command": command} | measure(model, tokenizer)
    models.save(model, tokenizer, options.output)
    (options.output / "quality.json").write_text(json.dumps(quality, indent=1) + "\n")
    for name, figure in quality.items():
        print(f"{name:20} {figure}")


if __name__ == "__main__":
    main()
