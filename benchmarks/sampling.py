"""Tokens per second of `dpo.policy.sampling.sample`, and of `model.generate` of transformers on the same prompts.

On a CPU it is the seconds that it worked, on a GPU those of the clock.

    python benchmarks/sampling.py --model runs/sft/policy                   # articles of the embedded world
    python benchmarks/sampling.py --model /models/smollm2 --prompts prompts.jsonl --batch-size 16 --max-new-tokens 128
    python benchmarks/sampling.py --model runs/sft/policy --vllm            # by the clock, in an environment with vLLM

Both draw at temperature 1 in batches of one size, by turns; `generate` gets the prompts in their order, and sorted.
vLLM gets them all at once, and is started before the first turn.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from dpo.data.batches import encode_prompts
from dpo.data.chats import ends
from dpo.engines import Vllm
from dpo.policy import model as models
from dpo.policy.sampling import Sampling, sample
from dpo.world import language


def generate(model: Any, tokenizer: Any, prompts: list[list[int]], sampling: Sampling) -> int:
    """The library's own way; returns how many tokens it drew up to the end of each response."""
    tokens, stops = 0, ends(tokenizer, model.generation_config)
    for first in range(0, len(prompts), sampling.batch_size):
        batch = prompts[first : first + sampling.batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[stops[0]] * (width - len(row)) + row for row in batch], device=model.device)
        attended = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=model.device)
        options = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "use_cache": True}
        options |= {"eos_token_id": stops, "pad_token_id": stops[0], "max_new_tokens": sampling.max_new_tokens}
        for row in model.generate(ids, attention_mask=attended, **options)[:, width:].tolist():
            tokens += next((place + 1 for place, token in enumerate(row) if token in stops), len(row))
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a policy")
    parser.add_argument("--prompts", type=Path, help='JSONL with a "prompt" a line; without: articles of the world')
    parser.add_argument("--n", type=int, default=512, help="how many prompts")
    parser.add_argument("--samples", type=int, default=1, help="responses to each")
    parser.add_argument("--batch-size", type=int, default=256, help="batch size")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="at which a response is cut")
    parser.add_argument("--turns", type=int, default=3, help="how often each is timed")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--vllm", action="store_true", help="engine=vllm, too; of another process: by the clock")
    parser.add_argument("--bf16", action="store_true", help="weights in bfloat16; the project samples in float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = models.load(options.model, options.device)
    model = model.bfloat16() if options.bf16 else model
    clock, unit = time.process_time, "CPU second"
    if options.device == "cuda" or options.vllm:
        clock, unit = time.perf_counter, "second"
    if options.prompts:
        texts = [json.loads(line)["prompt"] for line in options.prompts.read_text().splitlines()[: options.n]]
    else:
        rng = random.Random(0)
        texts = [language.lesson(rng, language.FACTS_PER_ARTICLE).prompt for _ in range(options.n)]
    prompts = [ids for ids in encode_prompts(texts, tokenizer, 1_000) for _ in range(options.samples)]
    sampling = Sampling(options.max_new_tokens, 1.0, 1.0, options.batch_size)
    ways = {
        "generate": lambda: generate(model, tokenizer, prompts, sampling),
        "generate, sorted": lambda: generate(model, tokenizer, sorted(prompts, key=len), sampling),
        "ours": lambda: sum(len(one.response_ids) for one in sample(model, tokenizer, prompts, sampling, 0, "")),
    }
    if options.vllm:
        room = max(map(len, prompts)) + options.max_new_tokens
        llm: Any = {"max_model_len": room, "gpu_memory_utilization": 0.3, "tensor_parallel_size": 1}
        llm |= {"enforce_eager": options.device == "cpu", "enable_chunked_prefill": False, "trust_remote_code": False}
        dtype: Any = "bfloat16" if options.bf16 else "float32"
        engine, few = Vllm(dtype, 0.1, "cache", llm), prompts[: options.batch_size]
        engine(model, tokenizer, few, range(len(few)), sampling, 1, "")

        def by_vllm() -> int:
            drawn = engine(model, tokenizer, prompts, range(len(prompts)), sampling, 0, "")
            return sum(len(one.response_ids) for one in drawn)

        ways["vLLM"] = by_vllm
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.turns + (options.device == "cuda")):
        for name, way in ways.items():
            began = clock()
            rate = way() / (clock() - began)  # tokens are counted on the CPU, so the GPU is done
            rates[name] += [rate] * (turn > 0 or options.device == "cpu")  # a GPU warms up
    for name, found in rates.items():
        ratios = [one / base for one, base in zip(found, rates["generate"], strict=True)]
        print(f"{name:18} {statistics.median(found):8.0f} tokens per {unit}, {statistics.median(ratios):.2f} times "
              f"({min(ratios):.2f} to {max(ratios):.2f}) of generate")  # fmt: skip
    if options.vllm:
        engine.close()


if __name__ == "__main__":
    main()
