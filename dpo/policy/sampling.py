"""Draw responses from a policy."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, DynamicLayer

from dpo.cache import digest
from dpo.data.chats import ends
from dpo.data.tokens import decode, state
from dpo.policy.model import vocabulary
from dpo.training.distributed import any_true, device_of
from dpo.training.log import progress
from dpo.training.loop import evaluating

SAMPLING_VERSION = 4  # part of cache keys: raise it when a change of the code changes what is sampled
READ = 4096  # tokens of prompts in one pass: what a model holds of each is many times its keys and values
LEFT = 0.75  # share of rows that are not ended, from which on the others leave the batch


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    max_new_tokens: int
    temperature: float  # 0 is greedy
    top_p: float  # 1 is off
    batch_size: int  # responses at once, which decides nothing but for rounding


@dataclass(frozen=True)
class Sample:
    """One response: its tokens end in one of `dpo.data.chats.ends` when `ended`, else they were cut at the limit. text:
    see `dpo.data.tokens.decode`.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    text: str
    ended: bool


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    seed: int,
    name: str = "sampling",
    places: Sequence[int] | None = None,
) -> list[Sample]:
    """One response per prompt (token ids), in order. name: of the progress bar, "": none.

    The random numbers of a prompt are those of the seed and of its place, in `places` or else in `prompts`: what else
    is drawn beside it decides nothing, but for rounding. A prompt that is there several times is read once. Of the
    model's generation config only the ends of turn count: penalties, top_k and such would make it another policy. Ids
    that are no token's are never drawn: a model may have rows to spare. A collective of ranks that have the same
    prompts: of a sharded model none can make a pass alone.

    Raises: RuntimeError if the model gives no finite logits, ValueError if it keeps no keys and values.
    """
    stops = ends(tokenizer, model.generation_config)
    none = torch.ones(model.config.get_text_config().vocab_size, dtype=torch.bool)
    none[vocabulary(tokenizer)] = False
    streams = range(len(prompts)) if places is None else places
    found: dict[int, Sample] = {}
    with evaluating(model), progress(total=len(prompts), name=name) as bar:
        for rows in in_batches(prompts, sampling.batch_size):
            batch = [prompts[row] for row in rows]
            generators = [np.random.default_rng([seed, streams[row]]) for row in rows]
            numbers = np.stack([one.random(sampling.max_new_tokens) for one in generators])
            drawn = _decode(model, batch, torch.from_numpy(numbers), sampling, none, stops)
            for row, prompt_ids, tokens in zip(rows, batch, drawn.tolist(), strict=True):
                found[row] = cut(prompt_ids, tokens, stops, tokenizer)
            bar.update(len(batch))
    return [found[row] for row in range(len(prompts))]


def in_batches(prompts: Sequence[list[int]], size: int) -> list[list[int]]:
    """Rows of prompts as they are sampled from, so many at once: those of one length together leave little to pad."""
    longest_first = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    return [longest_first[first : first + size] for first in range(0, len(prompts), size)]


def _decode(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    numbers: Tensor,  # (B, T) float64, in [0, 1)
    sampling: Sampling,
    none: Tensor,  # (V,), True where an id is no token's
    stops: Sequence[int],
) -> Tensor:
    """T tokens after each prompt; what comes after an end means nothing.  # (B, T)"""
    device = device_of(model)
    numbers, none, stop = numbers.to(device), none.to(device), torch.tensor(stops, device=device)
    takes = inspect.signature(model.forward).parameters
    narrow = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    if "past_key_values" not in takes:
        kind = type(model).__name__
        raise ValueError(f"a policy that is sampled from must take past_key_values, found {kind}, which does not")
    cache = _cache(model, max(map(len, prompts)) + sampling.max_new_tokens)
    selects = all(hasattr(layer, "batch_select_indices") for layer in cache.layers)  # states of a recurrence do not
    distinct = list(dict.fromkeys(map(tuple, prompts))) if selects else [*map(tuple, prompts)]
    input_ids, attended = (part.to(device) for part in _left_padded(distinct, stops[0], sampling.max_new_tokens))
    width, padded = input_ids.shape[1], not attended.all()
    positions = (attended.cumsum(-1) - 1).clamp(min=0)
    rows = torch.arange(len(prompts), device=device)  # the prompts that the rows of the cache belong to
    drawn = torch.full_like(numbers, stops[0], dtype=torch.long)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)

    def logits_after(input_ids: Tensor, attended: Tensor, positions: Tensor) -> Tensor:
        """Of the token that comes next; these go into the cache.  # (B, t), (B, T), (B, T) -> (B, V)"""
        return model(
            input_ids,
            attention_mask=attended if padded else None,
            past_key_values=cache,
            use_cache=True,
            **({"position_ids": positions[:, -input_ids.shape[1] :]} if "position_ids" in takes else {}),
            **narrow,
        ).logits[:, -1]

    rooms = [layer for layer in cache.layers if type(layer) is _Room]
    some = max(1, READ // width) if len(rooms) == len(cache.layers) else len(distinct)
    for step in range(sampling.max_new_tokens):
        read = input_ids, attended[:, : width + step], positions[:, : width + step]
        if step or some >= len(distinct):
            logits = logits_after(*read)
        else:
            passes = []
            for first in range(0, len(distinct), some):
                for room in rooms:
                    room.turn_to(slice(first, first + some), len(distinct))
                passes.append(logits_after(*(part[first : first + some] for part in read)))
            for room in rooms:
                room.turn_to(slice(None), len(distinct), width)
            logits = torch.cat(passes)
        if not step and len(distinct) < len(prompts):
            index = {prompt: row for row, prompt in enumerate(distinct)}
            owner = torch.tensor([index[tuple(prompt)] for prompt in prompts], device=device)
            cache.batch_select_indices(owner)
            logits, attended, positions = logits[owner], attended[owner], positions[owner]
        drawn[rows, step] = _drawn(logits, numbers[rows, step], none, sampling)
        ended[rows] |= torch.isin(drawn[rows, step], stop)
        if step + 1 == sampling.max_new_tokens or not any_true(not ended.all()):
            break
        left = (~ended[rows]).nonzero().squeeze(1)
        if selects and 0 < len(left) <= len(rows) * LEFT:
            cache.batch_select_indices(left)
            rows, attended, positions = rows[left], attended[left], positions[left]
        input_ids = drawn[rows, step, None]
    return drawn


def _drawn(logits: Tensor, numbers: Tensor, none: Tensor, sampling: Sampling) -> Tensor:
    """The token of each row in whose share of the probability its number falls.  # (B, V), (B,) -> (B,)"""
    if not logits.amax(-1).isfinite().all():
        raise RuntimeError(
            "the logits of a policy must be finite where it is sampled from, found some that are not; its training "
            "diverged: lower the learning rate, or take another checkpoint (precision=fp32 may help)"
        )
    logits = logits.float().masked_fill(none, -torch.inf)
    if not sampling.temperature:
        return logits.argmax(-1)
    p = (logits / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:  # the most likely tokens that together have it
        likely, order = p.sort(-1, descending=True)
        p = torch.zeros_like(p).scatter(-1, order, likely.where(likely.cumsum(-1) - likely < sampling.top_p, 0))
    below = p.double().cumsum(-1)
    return torch.searchsorted(below, numbers[:, None] * below[:, -1:], right=True).squeeze(-1)


class _Room(DynamicLayer):
    """Keys and values in memory for all that will come. The library's layer copies what it holds at every token."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.turn, self.rows = tokens, slice(None), 0

    def turn_to(self, turn: slice, rows: int, tokens: int = 0) -> None:
        """What comes next is of these of `rows` rows, and they have `tokens` tokens."""
        self.turn, self.rows = turn, rows
        if self.is_initialized:
            self.keys, self.values = (room[turn, :, :tokens] for room in self.room)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append those of new tokens; returns all.  # (B, G, t, D) -> (B, G, T, D)"""
        first = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = [
                new.new_empty(self.rows or len(new), new.shape[1], self.tokens, new.shape[-1])
                for new in (key_states, value_states)
            ]
        last = first + key_states.shape[-2]
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[self.turn, :, first:last] = new
        self.keys, self.values = (room[self.turn, :, :last] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self.room = [room[indices] for room in self.room]
        self.keys, self.values = (room[:, :, : self.get_seq_length()] for room in self.room)


def _cache(model: PreTrainedModel, tokens: int) -> DynamicCache:
    """An empty cache of `tokens`, the model's own kind where a layer does not attend to all that came before."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_Room(tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def inputs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], sampling: Sampling
) -> dict[str, Any]:
    """What decides `sample` besides the model and the seed, for a cache key."""
    return {
        "drawn": {name: getattr(sampling, name) for name in ("max_new_tokens", "temperature", "top_p")},
        "prompt_ids": digest(list(prompts)),
        "tokenizer": digest(state(tokenizer)),  # makes text of ids
        "ends": ends(tokenizer, model.generation_config),
        "sampling": SAMPLING_VERSION,
    }


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int, room: int) -> tuple[Tensor, Tensor]:
    """Ids, and which of them, and of `room` tokens after them, are attended to.  # (B, T), (B, T + room)"""
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_id)
    attended = torch.ones(len(prompts), width + room, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attended[row, : width - len(prompt)] = 0
    return input_ids, attended


def cut(prompt_ids: list[int], row: list[int], stops: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Sample:
    """The response in a row of tokens, which ends at the first of `stops`, if there is one."""
    end = next((position for position, token in enumerate(row) if token in stops), None)
    response_ids = row if end is None else row[: end + 1]
    return Sample(prompt_ids, response_ids, decode(prompt_ids, row[:end], tokenizer), ended=end is not None)
