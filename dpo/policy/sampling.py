"""Draw responses from a policy."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpo.cache import digest
from dpo.data.chats import ends
from dpo.data.tokens import decode
from dpo.policy.model import vocabulary
from dpo.training.distributed import device_of, world_size
from dpo.training.log import progress

SAMPLING_VERSION = 3  # part of cache keys: raise it when a change of the code changes what is sampled


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    max_new_tokens: int
    temperature: float  # 0 is greedy
    top_p: float  # 1 is off
    batch_size: int  # responses at once, which decides the random numbers, too


@dataclass(frozen=True)
class Sample:
    """One response: its tokens end in one of `dpo.data.chats.ends` when `ended`, else they were cut at the limit. text:
    see `dpo.data.tokens.decode`.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    text: str
    ended: bool


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    seed: int,
    name: str = "sampling",
) -> list[Sample]:
    """One response per prompt (token ids), in order. name: of the progress bar, "": none.

    The same seed, prompts and batch_size give the same responses, and the caller's random state stays as it was. Of the
    model's generation config only the ends of turn count: penalties, top_k and such would make it another policy.
    Ids that are no token's are never drawn: a model may have rows to spare.

    Raises: RuntimeError if the model gives no finite logits.
    """
    stops = ends(tokenizer, model.generation_config)
    tokens = vocabulary(tokenizer).tolist()
    config = GenerationConfig(
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature if sampling.temperature > 0 else None,
        top_p=sampling.top_p if sampling.temperature > 0 else None,
        top_k=0 if sampling.temperature > 0 else None,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops),
        suppress_tokens=sorted(set(range(model.config.get_text_config().vocab_size)).difference(tokens)) or None,
        use_cache=True,
    )
    device = device_of(model)
    samples = []
    bar = progress(total=len(prompts), name=name)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _set(model, config), bar:
        torch.manual_seed(seed)
        for first in range(0, len(prompts), sampling.batch_size):
            batch = prompts[first : first + sampling.batch_size]
            input_ids, attention_mask = _left_padded(batch, config.pad_token_id)
            width = input_ids.shape[1]
            generate: Any = model.generate
            generated = generate(
                input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=config,
                logits_processor=[_finite],
                synced_gpus=world_size() > 1,  # of a sharded model no rank can make a pass alone
            )
            for prompt_ids, row in zip(batch, generated[:, width:].tolist(), strict=True):
                samples.append(_cut(prompt_ids, row, stops, tokenizer))
            bar.update(len(batch))
    return samples


def inputs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]]
) -> dict[str, str | int | list[int]]:
    """What decides `sample` besides the weights and its options, for a cache key."""
    return {
        "prompt_ids": digest(list(prompts)),
        "tokenizer": digest(_state(tokenizer)),  # makes text of ids
        "ends": ends(tokenizer, model.generation_config),
        "sampling": SAMPLING_VERSION,
    }


def _state(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that a tokenizer is, without how the last call to it had texts padded and cut."""
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy.to_str()


@contextmanager
def _set(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, and `config` in place of the model's own, from which `generate` takes what is not set."""
    training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)


def _finite(_: Tensor, logits: Tensor) -> Tensor:
    """The logits, if they are finite: greedy sampling would take others without a word."""
    if not logits.amax(-1).isfinite().all():
        raise RuntimeError(
            "the logits of a policy must be finite where it is sampled from, found some that are not; its training "
            "diverged: lower the learning rate, or take another checkpoint (precision=fp32 may help)"
        )
    return logits


def _left_padded(prompts: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_id)
    attention_mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1
    return input_ids, attention_mask


def _cut(prompt_ids: list[int], row: list[int], stops: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Sample:
    end = next((position for position, token in enumerate(row) if token in stops), None)
    response_ids = row if end is None else row[: end + 1]
    return Sample(prompt_ids, response_ids, decode(prompt_ids, row[:end], tokenizer), ended=end is not None)
