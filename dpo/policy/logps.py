"""Log-probability of a response. Everything from the logits on is float32, whatever dtype they were computed in; only
the sums over a response are float64 inside.

Two ways to one number, and the batch decides. Padded rows go through the model's own forward: a few plain lines, for
any model. A packed row goes the fast way: shared-prefix attention, so that a prompt is computed once for the responses
that share it, and the last feed-forward part and the head only where a token is scored, the head a tile of tokens at a
time.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import MethodType
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dpo.data.batches import Batch, PromptResponses, collate_responses, size
from dpo.losses.pairs import tie_tolerance
from dpo.policy.attention import NAME, SharedPrefixMask, Unsupported, using_attention
from dpo.policy.lora import without
from dpo.training import distributed
from dpo.training.distributed import blocks, device_of

logger = logging.getLogger(__name__)
Made = TypeVar("Made")

_PACKABLE: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()  # what `packable` found out
TILE = 2**25  # logits that are held at once: 128 MB


def sequence_logps(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sum of response token log-probabilities, and their number.  # (S,) float32 nats, (S,) int64"""
    return by_sequence(token_logps(model, batch), batch), by_sequence(torch.ones_like(batch.sequence_ids), batch)


def token_logps(model: PreTrainedModel, batch: Batch) -> Tensor:
    """log p of each scored token given those before it.  # (N,) float32 nats"""
    return _whole(model, _fast, batch) if batch.shared_prefixes else _plain(model, batch)


def forward_tokens(micro_batch_tokens: int, packed: bool) -> int:
    """Tokens of a pass that has no backward; more than those of training, where not all logits are held at once."""
    return micro_batch_tokens * (4 if packed else 1)


def by_sequence(values: Tensor, batch: Batch) -> Tensor:
    """Sum values of scored tokens over each sequence, rounded once.  # (N,) -> (S,)"""
    sums = torch.zeros(batch.sequences, dtype=torch.float64, device=values.device)
    return sums.index_add(0, batch.sequence_ids, values.double()).to(values.dtype)


def excess_tokens(batch: Batch) -> Tensor:
    """Of pairs, which scored tokens lie beyond the length of the other response.  # (N,) bool"""
    lengths = torch.bincount(batch.sequence_ids, minlength=batch.sequences)  # (S,)
    places = torch.arange(len(batch.labels), device=lengths.device) - (lengths.cumsum(0) - lengths)[batch.sequence_ids]
    return places >= lengths.roll(batch.sequences // 2)[batch.sequence_ids]


OfWords = Callable[[slice, Tensor], Tensor]  # scored tokens, log-probs of all words there (n, V) -> (n,)


def token_logps_and(model: PreTrainedModel, batch: Batch, of_words: OfWords) -> tuple[Tensor, Tensor]:
    """`token_logps`, and what `of_words` makes of the log-probs of all words, a tile of tokens at a time, which are
    computed again for its gradient.  # (N,), (N,)
    """
    return _whole(model, _and, (batch, of_words))


def _and(model: PreTrainedModel, given: tuple[Batch, OfWords]) -> tuple[Tensor, Tensor]:
    batch, of_words = given
    logps = _logps_at(model, batch)

    def tile(rows: slice) -> tuple[Tensor, Tensor]:
        words = logps(rows)
        return words.gather(-1, batch.labels[rows, None]).squeeze(-1), of_words(rows, words)

    parts = [checkpoint(tile, rows, use_reentrant=False) for rows in tiles(len(batch.labels), _rows(model))]
    of_labels, made = zip(*parts, strict=True)
    return torch.cat(of_labels), torch.cat(made)


def log_collision(_: slice, words: Tensor) -> Tensor:
    """log of the probability that two draws of the next token are the same, no gradient.  # (n, V) -> (n,)"""
    return (2 * words.detach()).logsumexp(-1)


def kl_from(reference: PreTrainedModel, batch: Batch) -> OfWords:
    """KL(reference || model) of the next token; gradients flow into the model's log-probs."""
    with torch.no_grad(), without(reference):
        theirs = _logps_by_tile(reference, batch)

    def kl(rows: slice, words: Tensor) -> Tensor:
        with torch.no_grad():
            given = theirs(rows)
        if given.shape != words.shape:
            raise ValueError(
                f"KL(reference || policy) needs as many words of both, found {given.shape[-1]} and {words.shape[-1]}"
            )
        return token_kl(given, words)

    return kl


def _plain(model: PreTrainedModel, batch: Batch) -> Tensor:
    """From all logits of the model's own forward.  # (N,)"""
    return _softmax(_logits(model, batch).float(), batch.labels)[0]


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """What each scored token is drawn from, in memory of its own.  # (N, V), compute dtype"""
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).logits.flatten(0, 1)[batch.target_positions]


def _fast(model: PreTrainedModel, batch: Batch) -> Tensor:
    """As `_plain`, from states at scored positions and the weights of the head.  # (N,)"""
    head, cap = _head(model)
    return HeadLogps.apply(_states(model, batch), head.weight, head.bias, batch.labels, cap)


def _whole(model: PreTrainedModel, function: Callable[[PreTrainedModel, Any], Made], batch: Any) -> Made:
    """function(model, batch) with whole weights: sharded ones are whole only in the forward of the root, or in a method
    that is registered as one.
    """
    if not isinstance(model, FSDPModule):
        return function(model, batch)
    name = f"whole{function.__name__}"
    if name not in vars(model):
        setattr(model, name, MethodType(function, model))
        register_fsdp_forward_method(model, name)
    return cast(Made, getattr(model, name)(batch))


def _states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Last hidden states where a token is scored, scaled as logits are.  # (N, hidden)"""
    prefix_mask = SharedPrefixMask(batch.shared_prefixes, batch.input_ids.device)
    with using_attention(model, NAME), _narrowed(model, batch):
        output = model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, prefix_mask=prefix_mask, use_cache=False
        )
    if len(prefix_mask.layers) < len(blocks(model)):
        raise Unsupported(
            f"{len(prefix_mask.layers)} of its {len(blocks(model))} layers attend by the library's interface"
        )
    states = output.last_hidden_state[0].index_select(0, batch.target_positions)
    return states if (scale := _scale(model)) == 1 else states * scale


@contextlib.contextmanager
def _narrowed(model: PreTrainedModel, batch: Batch) -> Iterator[None]:
    """Inside, the feed-forward part of the last layer, where a model calls it `mlp`, works at scored positions only.

    Nothing reads what the layer puts out elsewhere.
    """
    mlp: Any = getattr(next(reversed(blocks(model)), None), "mlp", None)
    positions = batch.target_positions.unique()  # the first tokens of a prompt's responses share one

    def narrow(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:  # (1, T, hidden) -> (1, positions, hidden)
        if len(args) != 1:
            raise Unsupported("its feed-forward parts take more than states")
        return args[0].index_select(1, positions)

    def widen(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out.new_zeros(1, batch.input_ids.shape[1], out.shape[-1]).index_copy(1, positions, out)

    with contextlib.ExitStack() as hooks:
        if mlp is not None:
            hooks.enter_context(mlp.register_forward_pre_hook(narrow))
            hooks.enter_context(mlp.register_forward_hook(widen))
        yield


def _head(model: PreTrainedModel) -> tuple[nn.Linear, float | None]:
    """The output layer, and the soft-cap of its logits."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise Unsupported(f"its output layer is a {type(head).__name__}, not a Linear")
    return head, getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def _scale(model: PreTrainedModel) -> float:
    """What logits are multiplied by: Cohere's models have a name for it, Granite's one for its inverse."""
    config = model.config.get_text_config()
    return float(getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1))


class HeadLogps(torch.autograd.Function):
    """log p of `labels` under softmax(hidden @ weight.T + bias), without ever holding tokens x vocabulary.

    Tokens are taken in tiles of at most TILE logits. Only the last tile outlives the forward, so that its gradient
    costs two matrix products; the tiles before it, if any, are computed again. cap: logits z become
    cap * tanh(z / cap).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        labels: Tensor,  # (N,)
        cap: float | None,
    ) -> Tensor:  # (N,) float32
        kind = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        ctx.cap, ctx.tile = cap, None
        rounded = weight.to(ctx.dtype)  # once for all tiles
        logps = hidden.new_empty(len(labels), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for rows in tiles(len(labels), len(weight)):
            ctx.tile = None  # before the next is made
            logps[rows], *ctx.tile = _head_softmax(hidden[rows], rounded, bias, labels[rows], cap, ctx.dtype)
        if not any(ctx.needs_input_grad):
            ctx.tile = None
        ctx.save_for_backward(hidden, weight, bias, labels)
        return logps

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = d_bias = None
        rounded = weight.to(ctx.dtype)
        for rows in reversed(tiles(len(labels), len(weight))):
            tile, ctx.tile = ctx.tile, None
            if tile is None:
                _, *tile = _head_softmax(hidden[rows], rounded, bias, labels[rows], ctx.cap, ctx.dtype)
            exponentials, totals, slope = tile
            # d log p(label) / d logits = onehot(label) - probabilities
            d_logits = exponentials.mul_(-gradient[rows, None] / totals)  # (n, V)
            d_logits.scatter_add_(1, labels[rows, None], gradient[rows, None].to(d_logits.dtype))
            if slope is not None:
                d_logits *= slope
            d_logits = d_logits.to(ctx.dtype)
            if d_hidden is not None:
                d_hidden[rows] = (d_logits @ rounded).to(hidden.dtype)
            if ctx.needs_input_grad[1]:
                product = (d_logits.T @ hidden[rows].to(ctx.dtype)).to(weight.dtype)
                d_weight = product if d_weight is None else d_weight.add_(product)
            if ctx.needs_input_grad[2]:
                d_bias = d_logits.sum(0, dtype=bias.dtype) + (0 if d_bias is None else d_bias)
        return d_hidden, d_weight, d_bias, None, None


def tiles(tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, TILE // vocabulary)
    return [slice(first, first + size) for first in range(0, tokens, size)]


def _head_softmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, cap: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `_softmax`, and the slope of the soft-cap.  # (n,), (n, V), (n, 1), (n, V) or None"""
    logits = _tile_logits(hidden, weight, bias, cap, dtype)
    slope = None if cap is None else 1 - (logits / cap) ** 2
    return *_softmax(logits, labels), slope


def _softmax(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p of the labels, and for their gradient exp(logits - largest) and its sum. Uses `logits` up.

    As `log_softmax`, without holding it for all words.  # (n, V), (n,) -> (n,), (n, V), (n, 1)
    """
    logits -= logits.detach().amax(-1, keepdim=True)
    picked = logits[torch.arange(len(labels), device=labels.device), labels]  # of which autograd keeps no logits
    exponentials = logits.exp_()
    totals = exponentials.sum(-1, keepdim=True)
    return picked - totals.squeeze(-1).log(), exponentials, totals


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probs of all words. torch's own adds the exponentials one after another: of peaked logits (sd 4) it is off by
    2e-5 for 128 thousand words on a CPU, all in one direction, where this is off by 5e-7.  # (n, V) -> (n, V)
    """
    logits = logits - logits.amax(-1, keepdim=True)
    return logits - logits.exp().sum(-1, keepdim=True).log()


def _tile_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None, dtype: torch.dtype
) -> Tensor:  # (n, V) float32
    logits = hidden.to(dtype) @ weight.to(dtype).T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if bias is not None:
        logits += bias
    return logits if cap is None else cap * logits.div_(cap).tanh_()


def token_kl(policy: Tensor, reference: Tensor) -> Tensor:
    """KL(policy || reference) of next-token distributions, given as log-probs.  # (..., V) -> (...) nats"""
    return (policy.exp() * (policy - reference)).sum(-1).clamp(min=0)  # rounding alone can make it negative


@torch.no_grad()
def sequence_kl(
    policy: PreTrainedModel, reference: PreTrainedModel, batch: Batch, tokens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Two estimates of KL(policy || reference) per response, each unbiased when the policy sampled it at temperature 1.

    The log-ratio of the response, and the sum over its positions of the next-token KL (Rao-Blackwellized: the chain
    rule with each token's expectation in closed form; never negative, mostly with less spread over responses).
    # (S,), (S,) float32 nats

    tokens: ids that can be sampled, (K,) int64; None: all. Both models' next-token distributions are taken over these
    alone, renormalized: the rows that a model has to spare belong to no token, and the two may have other numbers of
    them (Qwen2.5 3B and 7B).

    reference: without its adapters, if it has some; so it may be the policy, which is then held to what it began as.
    """
    of_policy = _logps_by_tile(policy, batch)
    with without(reference):
        by_tile = of_policy, _logps_by_tile(reference, batch)
    ratios, kls = [], []
    for rows in tiles(len(batch.labels), max(_rows(policy), _rows(reference))):
        labels = batch.labels[rows, None]  # (n, 1)
        (ours, of_label), (others, to_label) = (_among(logps(rows), labels, tokens) for logps in by_tile)
        ratios.append((of_label - to_label).squeeze(-1))
        kls.append(token_kl(ours, others))
    return by_sequence(torch.cat(ratios), batch), by_sequence(torch.cat(kls), batch)


def _among(logps: Tensor, labels: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probs over `tokens`, and those of `labels`, given that it is one of `tokens`.  # (n, K), (n, 1)"""
    picked = logps.gather(-1, labels)
    if tokens is None or len(tokens) == logps.shape[-1]:
        return logps, picked
    kept = logps.index_select(-1, tokens.to(logps.device))
    total = kept.logsumexp(-1, keepdim=True)
    return kept - total, picked - total


def _rows(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)


def _logps_by_tile(model: PreTrainedModel, batch: Batch) -> Callable[[slice], Tensor]:
    """`_logps_at`, to be asked when the model's weights may no longer be whole; for no gradients."""
    return _whole(model, _kept, batch)


def _kept(model: PreTrainedModel, batch: Batch) -> Callable[[slice], Tensor]:
    return _logps_at(model, batch, keep=isinstance(model, FSDPModule))


def _logps_at(model: PreTrainedModel, batch: Batch, keep: bool = False) -> Callable[[slice], Tensor]:
    """Log-probs of the whole vocabulary at some of the scored positions.  # (n,) -> (n, V) float32

    keep: in memory of their own the weights that it takes.
    """
    if not batch.shared_prefixes:
        logits = _logits(model, batch)
        return lambda rows: log_softmax(logits[rows].float())
    states, (head, cap) = _states(model, batch), _head(model)
    weight, bias = (None if one is None else one.clone() if keep else one for one in (head.weight, head.bias))
    return lambda rows: log_softmax(_tile_logits(states[rows], weight, bias, cap, states.dtype))


def packable(model: PreTrainedModel, items: Sequence[PromptResponses]) -> bool:
    """Whether packed batches give this model's own log-probs: tried once a model, on four items, the longest among
    them, in float32 or the dtype that sharded weights are gathered in. For a sharded model a collective.

    Warns once if the model does not let its attention be replaced, or if the log-probs differ by more than rounding
    explains.
    """
    if model not in _PACKABLE:
        _PACKABLE[model] = _packable(model, items)
    return _PACKABLE[model]


@torch.no_grad()
def _packable(model: PreTrainedModel, items: Sequence[PromptResponses]) -> bool:
    by_size = sorted(range(len(items)), key=[size(item) for item in items].__getitem__)
    tried = [items[by_size[index * (len(by_size) - 1) // 3]] for index in range(4)]
    packed, padded = (collate_responses(tried, packed=flag).to(device_of(model)) for flag in (True, False))
    try:
        fast, _ = sequence_logps(model, packed)
    except (Unsupported, AttributeError, TypeError, ValueError) as reason:  # the others: what a model makes of no mask
        distributed.reshard(model)
        cause = str(reason) if isinstance(reason, Unsupported) else repr(reason)
        return _padded(f"{type(model).__name__} cannot be given packed ones: {cause}")
    plain, _ = sequence_logps(model, padded)
    precision = "fp32" if _whole(model, _dtype, packed) == torch.float32 else "bf16"
    if wrong := differing(fast, plain, precision):
        return _padded(f"packed ones of {type(model).__name__} have others than its own forward: {wrong}")
    return True


def differing(actual: Tensor, expected: Tensor, precision: str) -> str:
    """The two log-probs that differ most, in words; "" if they all agree within rounding.  # (S,), (S,)"""
    excess = ((actual - expected).abs() / tie_tolerance(expected, precision)).nan_to_num(nan=torch.inf)  # (S,)
    worst = excess.argmax()
    if excess[worst] <= 1:
        return ""
    return f"{actual[worst].item():.7g} nats for {expected[worst].item():.7g}"


def _dtype(model: PreTrainedModel, _: Batch) -> torch.dtype:
    return _head(model)[0].weight.dtype


@cache
def _padded(why: str) -> bool:
    """False, which is told once."""
    logger.warning(f"log-probs: of padded rows, since {why}")
    return False
