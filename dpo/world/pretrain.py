"""Make a base model of the embedded world: a small transformer that looks facts up in articles.

    python -m dpo.world.pretrain --output dpo/world/base
    python -m dpo.world.pretrain --size small --output FOLDER

The first comes with the code; this command is how it was made, and measures it. The others are grown from it:
policy=small and policy=base have them made by their first run, and kept in the cache.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
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
# Articles come with one fact to look up at first. Asked for all six from the start, tiny learns none in an hour. And it
# never learns to tell whose a fact is: larger models, which begin where it ended, read more of somebody else.
CURRICULUM = ((0, 1, 2), (250, 2, 2), (300, 4, 2), (350, 6, 2), (3000, 6, 4))  # from a step on: facts, distractors


class Lessons:
    """Fresh articles for every optimizer step, drawn by the seed and the step alone; `first` were before."""

    def __init__(self, batch: int, seed: int, steps: int, tokenizer: PreTrainedTokenizerFast, first: int = 0) -> None:
        self.batch, self.seed, self.steps, self.tokenizer, self.first = batch, seed, steps, tokenizer, first

    def __len__(self) -> int:
        return self.steps

    def name(self, row: int) -> str:
        return f"lesson {row}"

    def at(self, step: int) -> tuple[list[Batch], int]:
        lesson = self.first + step
        rng = random.Random(f"lesson {self.seed} {lesson}")
        batch, (_, *asked) = self.batch, max(stage for stage in CURRICULUM if stage[0] <= lesson)
        lessons = [language.lesson(rng, *asked) for _ in range(batch)]
        tokens = tokenize_demonstrations(lessons, self.tokenizer, LONGEST, "error")
        index, valid, pad_id = torch.arange(batch), torch.ones(batch, dtype=torch.bool), models.pad_id(self.tokenizer)
        return [collate(tokens, index, valid, pad_id=pad_id, packed=False)], batch


def new(size: sizes.Size, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A transformer with weights drawn by torch's generator."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=size.layers,
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


def grown(size: sizes.Size, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A deeper transformer that computes what tiny does, Net2DeeperNet (1511.05641): layers above tiny's add nothing.

    Their last matrices, of attention and of the feed-forward network, are 0; the others are those of a new model.
    """
    model, (tiny, _) = new(size, tokenizer), models.load("world")
    model.load_state_dict(tiny.state_dict(), strict=False)
    for layer in model.model.layers[tiny.config.num_hidden_layers :]:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def train(
    name: str,
    seed: int,
    steps: int,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    device: torch.device | str = "cpu",
) -> LlamaForCausalLM:
    """A new model of a size; goes on from the checkpoint in `directory` if there is one."""
    torch.manual_seed(seed)
    size, tiny = sizes.SIZES[name], sizes.SIZES["tiny"]
    model = (new if name == "tiny" else grown)(size, tokenizer).to(device)  # type: ignore[arg-type]
    first = 0 if name == "tiny" else tiny.steps  # articles that tiny never saw

    def step(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logps, lengths = sequence_logps(model, batch)
        return -logps / lengths, {}

    optim = optimizer(model, "adamw", lr=size.lr, betas=(0.9, 0.98), weight_decay=0.01)
    with Log(directory) as log:
        fit(
            model,
            Lessons(size.batch, seed, steps, tokenizer, first),
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
    name, tokenizer = sizes.MADE[base], language.tokenizer()

    def build(folder: Path) -> None:
        if not (folder / "model").is_dir():  # it appears whole: where it is, a former attempt ended after it
            steps = sizes.SIZES[name].steps
            model = train(name, sizes.SEED, steps, tokenizer, folder, distributed.device(device))
            (folder / "quality.json").write_text(json.dumps(measure(model, tokenizer), indent=1) + "\n")
            models.save(model, tokenizer, folder / "model")
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)

    remember(cache, "base", sizes.key(name), build)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the new base model")
    parser.add_argument("--size", choices=sizes.SIZES, default="tiny", help="of the model (default: tiny)")
    parser.add_argument("--seed", type=int, default=sizes.SEED, help="of the weights and the articles")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: those of the size)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--phrases", action="store_true", help="with another tokenizer, of phrases")
    options = parser.parse_args()
    if options.phrases and options.size != "tiny":
        parser.error(f"--phrases must come with --size tiny, got {options.size}, which is grown from the shipped model")
    tokenizer = language.tokenizer(options.phrases)
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    steps = options.steps or sizes.SIZES[options.size].steps
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as directory:
        model = train(options.size, options.seed, steps, tokenizer, Path(directory))
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
