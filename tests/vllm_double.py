"""A module like vLLM, of one process: its `LLM` samples from the folder that it is given, token by token, in float64.

What it takes and how it understands that are vLLM's; `tests/system/test_vllm.py` compares the two.
"""

import json
import os
import random
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# Of `engine.llm`, for tiny models of tests, here and in vLLM itself
OPTIONS = {
    "max_model_len": 64,
    "gpu_memory_utilization": 0.1,
    "tensor_parallel_size": 1,
    "enforce_eager": True,
    "enable_chunked_prefill": False,
    "trust_remote_code": False,
}


@dataclass
class SamplingParams:
    """Those of vLLM's that we give, with its defaults."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    logit_bias: dict[int, float] | None = None
    detokenize: bool = True


class LLM:
    """One that was started: `asked` and `given` are questions and answers, `environment` is the one that it saw."""

    started: list["LLM"]
    faults: list[Exception]  # to come

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        generation_config: str = "auto",
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.92,
        tensor_parallel_size: int = 1,
        enforce_eager: bool = False,
        enable_chunked_prefill: bool | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        assert generation_config == "vllm"  # else the folder's own settings
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).double().eval()
        self.dtype = dtype
        if max_model_len > self.model.config.max_position_embeddings:
            raise ValueError(f"max_model_len ({max_model_len}) is greater than max_position_embeddings")
        self.eos, self.room, self.folder = AutoTokenizer.from_pretrained(model).eos_token_id, max_model_len, Path(model)
        self.config = json.loads((self.folder / "config.json").read_text())
        self.asked, self.given, self.ended, self.environment = [], [], False, dict(os.environ)
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self._end))
        self.started.append(self)

    def _end(self, timeout: float | None = None) -> None:
        self.ended = True

    def generate(self, prompts, sampling_params, use_tqdm=True):
        assert not self.ended, "it was ended"
        if self.faults:
            raise self.faults.pop()
        if callable(use_tqdm):
            bar = use_tqdm(total=len(prompts), desc="Processed prompts", dynamic_ncols=True, postfix="")
            bar.update(len(prompts))
            bar.close()
        found = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            ids = prompt["prompt_token_ids"]
            self.asked.append((ids, params))
            if len(ids) >= self.room:
                raise ValueError(f"The decoder prompt (length {len(ids)}) is longer than {self.room}")
            generator = torch.Generator().manual_seed(random.getrandbits(60) if params.seed is None else params.seed)
            drawn = [self._drawn(ids, params, generator) for _ in range(params.n)]
            read = None if params.prompt_logprobs is None else self._read(ids)
            found.append(SimpleNamespace(outputs=drawn, prompt_logprobs=read))
        self.given += [one.outputs[0] for one in found]
        return found

    @torch.no_grad()
    def _read(self, ids):
        """Log-probs of the tokens of a prompt, of which the first has none."""
        values = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        after = [{token: SimpleNamespace(logprob=float(values[at, token]))} for at, token in enumerate(ids[1:])]
        return [None, *after]

    @torch.no_grad()
    def _drawn(self, ids, params, generator):
        tokens, logprobs, stops = [], [], {*(params.stop_token_ids or []), *([] if params.ignore_eos else [self.eos])}
        while len(tokens) < min(params.max_tokens, self.room - len(ids)) and not stops & {*tokens[-1:]}:
            logits = self.model(torch.tensor([[*ids, *tokens]])).logits[0, -1]
            raw = logits.log_softmax(-1)
            for row, bias in (params.logit_bias or {}).items():
                logits[row] += min(100.0, max(-100.0, bias))
            if params.temperature == 0:
                token = int(logits.argmax())
            else:
                chances, order = (logits / params.temperature).softmax(-1).sort(descending=True)
                chances[chances.cumsum(0) - chances >= params.top_p] = 0
                token = int(order[torch.multinomial(chances, 1, generator=generator)])
            tokens.append(token)
            logprobs.append({token: SimpleNamespace(logprob=float(raw[token]))})
        return SimpleNamespace(token_ids=tuple(tokens), logprobs=None if params.logprobs is None else logprobs)


def module() -> ModuleType:
    """A new one, in which nothing was started yet."""
    made = ModuleType("vllm")
    made.__spec__ = ModuleSpec("vllm", None)
    made.SamplingParams = SamplingParams
    made.LLM = type("LLM", (LLM,), {"started": [], "faults": []})
    return made
