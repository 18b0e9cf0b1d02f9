"""Shared-prefix attention, in place of a model's own and without touching its code.

A row holds shared prefixes, one after another: the tokens of a prompt, then those of each response to it. A prompt
attends to itself, a response to its prompt and to itself, both causally, and nothing else to anything. The positions of
every response continue the prompt, so each token gets what it would get in a row of its own, and a prompt is computed
once.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from dpo.data.batches import SharedPrefix

NAME = "shared_prefix"
BLOCK = 128  # tokens of a block of FlexAttention
SEEN = 2**27  # pairs of tokens that are looked at at once, for its mask
SMALLEST = 16  # values of a head that FlexAttention takes on CUDA
VARIANTS = 64  # of FlexAttention in a process: heads, dtypes, windows, with gradients and without, of each model


class Unsupported(Exception):
    """This model cannot be run on packed rows."""


class SharedPrefixMask:
    """The shared prefixes of a row, and what each token attends to: computed once for all layers of a forward pass."""

    def __init__(self, shared_prefixes: Sequence[SharedPrefix], device: torch.device) -> None:
        self.shared_prefixes, self.device = shared_prefixes, device
        self.sizes = [prompt + sum(responses) for prompt, responses in shared_prefixes]  # in tokens; their sum is T
        self.layers: set[nn.Module] = set()  # those that have attended
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}
        self._block_masks: dict[int | None, BlockMask] = {}

    def window(self, limit: int | None) -> int | None:
        """The sliding window, in positions, the token's own included; None where `limit` hides nothing."""
        longest = max(prompt + max(responses, default=0) for prompt, responses in self.shared_prefixes)
        return limit if limit and limit < longest else None

    def mask(self, index: int, first: int, window: int | None) -> Tensor:
        """What tokens of a prefix from `first` on (rows) attend to: 0, or -inf where not.  # (t - first, t) float32"""
        if (index, first, window) not in self._masks:
            branch, position = self._numbered(self.shared_prefixes[index])
            seen = attends(branch[first:, None], position[first:, None], branch, position, window)
            hidden = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
            self._masks[index, first, window] = hidden.to(self.device)
        return self._masks[index, first, window]

    def block_mask(self, window: int | None) -> BlockMask:
        """The same for the whole row, as FlexAttention wants it."""
        if window not in self._block_masks:
            self._block_masks[window] = self._blocks(window)
        return self._block_masks[window]

    def _blocks(self, window: int | None) -> BlockMask:
        """As `create_block_mask` makes it, which would hold T x T values: 40 GiB where T is 65 thousand."""
        prefix, branch, position = self._row

        def seen(_: Any, __: Any, q: Tensor, k: Tensor) -> Tensor:
            return (prefix[q] == prefix[k]) & attends(branch[q], position[q], branch[k], position[k], window)

        length, size = sum(self.sizes), BLOCK
        blocks = -(-length // size)
        keys = torch.arange(blocks * size, device=self.device)
        last, within = keys.clamp(max=length - 1), keys < length  # the last block may end beyond the row
        counts = []  # of the pairs that see each other in each pair of blocks
        for rows in keys.split(max(1, SEEN // (len(keys) * size)) * size):
            pairs = seen(None, None, last[rows, None], last) & within[rows, None] & within
            counts.append(pairs.view(-1, size, blocks, size).sum((1, 3), dtype=torch.int32))
        seeing = torch.cat(counts)  # (blocks, blocks)
        full = seeing == size**2
        partly, whole = (_listed(kind) for kind in ((seeing > 0) & ~full, full))
        return BlockMask.from_kv_blocks(*partly, *whole, BLOCK_SIZE=size, mask_mod=seen, seq_lengths=(length, length))

    @cached_property
    def _row(self) -> tuple[Tensor, Tensor, Tensor]:
        """Prefix, branch and position of each token of the row.  # (T,) each"""
        numbered = [self._numbered(prefix) for prefix in self.shared_prefixes]
        prefix = torch.repeat_interleave(torch.tensor(self.sizes))
        branch, position = (torch.cat(parts) for parts in zip(*numbered, strict=True))
        return prefix.to(self.device), branch.to(self.device), position.to(self.device)

    @staticmethod
    def _numbered(prefix: SharedPrefix) -> tuple[Tensor, Tensor]:
        """Branch, 0 for the prompt, and position of each token of a prefix.  # (t,), (t,)"""
        prompt, responses = prefix
        branch = torch.repeat_interleave(torch.tensor([prompt, *responses]))
        return branch, torch.cat([torch.arange(prompt), *(prompt + torch.arange(length) for length in responses)])


def _listed(kind: Tensor) -> tuple[Tensor, Tensor]:
    """Of each block of queries, how many blocks of keys are of a kind, and which: these first, in order.  # (b, b) bool

    # (1, 1, b), (1, 1, b, b) int32
    """
    order = kind.int().argsort(dim=-1, descending=True, stable=True)
    return kind.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


def attends(branch: Tensor, position: Tensor, key_branch: Tensor, key_position: Tensor, window: int | None) -> Tensor:
    """Whether a token at `position` of `branch` attends to one of the same prefix at `key_position` of `key_branch`."""
    seen = (position >= key_position) & ((key_branch == 0) | (key_branch == branch))
    return seen if window is None else seen & (position - key_position < window)


@contextlib.contextmanager
def using_attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Inside, the model attends by another of the library's implementations. By NAME, it goes by the `prefix_mask`
    that its forward is given and that it passes on to its layers.
    """
    former = model.config._attn_implementation
    model.config._attn_implementation = implementation
    try:
        yield
    finally:
        model.config._attn_implementation = former


def attend(
    module: nn.Module,
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, G, T, D), G divides H
    value: Tensor,  # (1, G, T, D)
    attention_mask: None,
    *,
    prefix_mask: SharedPrefixMask | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What a layer of the library calls.  # (1, T, H, D), no attention weights

    scaling: of the scores; None: 1 / sqrt(D). sliding_window: how many positions a token sees, itself included.
    softcap: scores s become softcap * tanh(s / softcap).
    """
    if prefix_mask is None:
        raise Unsupported("its layers do not pass on what shared-prefix attention needs")
    if dropout or s_aux is not None:
        raise Unsupported("its attention has dropout" if dropout else "its attention has sinks")
    prefix_mask.layers.add(module)
    window, scale = prefix_mask.window(sliding_window), query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type != "cpu":
        return _by_flex(query, key, value, prefix_mask.block_mask(window), scale, softcap).transpose(1, 2), None
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    outputs = []
    for index, (q, k, v) in enumerate(zip(*(x.split(prefix_mask.sizes, 2) for x in (query, key, value)), strict=True)):
        prompt = prefix_mask.shared_prefixes[index][0] if window is None and softcap is None else 0
        head, tail = q.split([prompt, q.shape[2] - prompt], 2)
        if prompt:  # most of the work, and the kernel leaves out what causality hides
            prefix_kv = k[:, :, :prompt], v[:, :, :prompt]
            outputs.append(scaled_dot_product_attention(head, *prefix_kv, is_causal=True, scale=scale))
        if tail.shape[2]:
            mask = prefix_mask.mask(index, prompt, window).to(q.dtype)
            outputs.append(_masked(tail, k, v, mask, scale, softcap))
    return torch.cat([output.transpose(1, 2) for output in outputs], 1), None


def _by_flex(q: Tensor, k: Tensor, v: Tensor, seen: BlockMask, scale: float, cap: float | None) -> Tensor:
    if q.shape[-1] < SMALLEST:
        raise Unsupported(f"its heads are {q.shape[-1]} wide, where FlexAttention takes {SMALLEST} or more")
    kind = q.device.type
    if torch.is_autocast_enabled(kind):  # which does not know this attention: rotation makes queries and keys float32
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))

    # A tensor: torch 2.11 fails to compile a float.
    limit = None if cap is None else torch.full((), cap, device=q.device)

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return score if limit is None else limit * torch.tanh(score / limit)

    attention = _compiled() if q.device.type == "cuda" else flex_attention
    modified = None if cap is None else capped
    output = attention(q, k, v, modified, seen, scale=scale, enable_gqa=q.shape[1] > k.shape[1])
    assert isinstance(output, Tensor)
    return output


def _compiled() -> Any:
    """FlexAttention as one kernel; without compilation it would hold all scores. Hence an error where there are more
    variants than are compiled, and no fall back.
    """
    # That of each thread by itself, and a backward pass on CUDA, which may compute a layer again, has one of its own.
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    return _kernel()


@cache
def _kernel() -> Any:
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float | None) -> Tensor:
    if cap is None:
        return scaled_dot_product_attention(q, k, v, mask, scale=scale)
    scores = cap * torch.tanh(q @ k.transpose(-1, -2) * (scale / cap))  # (1, H, t, t)
    return (scores + mask).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype) @ v


AttentionInterface.register(NAME, attend)
