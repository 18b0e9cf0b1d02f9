"""Records to tokens, and tokens to batches in an order that can be resumed and sharded."""

import hashlib
import heapq
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dpo.cache import digest
from dpo.data.chats import special
from dpo.data.records import Demonstration, Measures, Preference, Text, called, fault_of, listed, report
from dpo.data.tokens import Encoded, decode, encode, encode_alone, vocabulary
from dpo.data.treatment import flipped
from dpo.data.truncation import cut_prompts, fitted

logger = logging.getLogger(__name__)
TOO_LONG = "Raise max_length, or set on_too_long=truncate or on_too_long=drop."
Tokens = tuple[list[int], list[int]]  # prompt ids, response ids; the response ends in an end token unless it was cut
PromptResponses = tuple[list[int], list[list[int]]]  # prompt ids, and those of the responses to it
SharedPrefix = tuple[int, tuple[int, ...]]  # how many tokens a prompt has, and each response that continues it
Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Pair:
    """A preference in tokens; both responses continue the same prompt ids."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    text: Preference | None = field(default=None, compare=False)  # what these tokens say; None for made-up pairs
    cut: tuple[str, ...] = field(default=(), compare=False)  # which of prompt, chosen and rejected on_too_long cut
    unwritten: bool = field(default=False, compare=False)  # sampled tokens that the text does not say: half a character

    @property
    def source(self) -> str | None:
        return self.text.source if self.text else None

    @property
    def label(self) -> bool | None:
        return self.text.label if self.text else None

    @property
    def sides(self) -> tuple[str, str]:
        return self.text.sides if self.text else ("chosen", "rejected")

    @property
    def chosen(self) -> Tokens:
        return self.prompt_ids, self.chosen_ids

    @property
    def rejected(self) -> Tokens:
        return self.prompt_ids, self.rejected_ids

    @property
    def prompt_responses(self) -> PromptResponses:
        return self.prompt_ids, [self.chosen_ids, self.rejected_ids]


@dataclass(frozen=True)
class Batch:
    """B items, S sequences of a prompt and a response, N scored tokens. S = 2B for pairs (chosen first), else B.

    Packed: one row of shared prefixes, each a prompt and then the responses that continue it; the last token of a
    response is left out, since nothing is predicted from it. Padded: a right-padded row for each sequence.
    """

    index: Tensor  # (B,) int64, row of the item in its data set
    valid: Tensor  # (B,) bool, False for a filler that lets every rank make as many passes
    input_ids: Tensor  # (R, T) int64, R = 1 or S
    position_ids: Tensor  # (R, T) int64, those of a response continue its prompt's
    attention_mask: Tensor | None  # (R, T) int64, 0 on padding; None: packed
    shared_prefixes: tuple[SharedPrefix, ...]  # of a packed batch
    target_positions: Tensor  # (N,) int64, where in input_ids, flattened, each scored token is predicted
    labels: Tensor  # (N,) int64, that token
    sequence_ids: Tensor  # (N,) int64, its sequence
    sequences: int  # S
    desirable: Tensor | None = None  # (B,) bool, of pairs with a label

    def to(self, device: torch.device | str) -> "Batch":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in tensors.items()}
        return replace(self, **moved)


def content_of(tokens: Tokens) -> bytes:
    """By what a sequence is known: a digest of its token ids, and of where the response begins."""
    prompt_ids, response_ids = tokens
    ids = np.array([len(prompt_ids), *prompt_ids, *response_ids], dtype="<i8")
    return hashlib.sha256(ids.tobytes()).digest()[:16]


def tokenize(
    preferences: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_too_long: str,
    what: str = "pairs",
    advice: str = TOO_LONG,
    on_faulty: str = "error",
) -> list[Pair]:
    """Preferences in tokens, by the rules of `dpo.data.tokens`, or in those that they were sampled as.

    max_length: tokens of the prompt and the longer response. on_too_long: "error", "drop", or "truncate": the
    prompt is cut from the left down to one token (and BOS), alike for both responses; if that is not enough,
    responses are cut from the right and lose their end. The text of a pair is cut with it, see `dpo.data.truncation`.
    what, advice: for messages. on_faulty: see `dpo.data.tokens.encode`.
    """
    return [pair for _, pair in numbered(preferences, tokenizer, max_length, on_too_long, what, advice, on_faulty)]


def numbered(
    preferences: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_too_long: str,
    what: str,
    advice: str,
    on_faulty: str,
) -> list[tuple[int, Pair]]:
    """As `tokenize`, each pair with the number of its preference, from 0."""
    sides = [[(pair.chosen, pair.chosen_ended), (pair.rejected, pair.rejected_ended)] for pair in preferences]
    prompts, sources = [pair.prompt for pair in preferences], [pair.source for pair in preferences]
    encoded = encode(prompts, sides, tokenizer, what, sources, on_faulty)
    encoded = _as_sampled(encoded, preferences, tokenizer, what)
    encoded = fitted(encoded, tokenizer, max_length, on_too_long, what, sources, advice)
    return [(item.row, _pair(item, preferences[item.row], tokenizer)) for item in encoded]


def filter_identical(pairs: Sequence[Pair], on_faulty: str, what: str) -> list[Pair]:
    """The pairs to learn from: one whose responses have the same tokens is faulty, see `dpo.data.records.filter_pairs`.
    It would have the loss ln 2 and no gradient. With on_faulty="keep" those whose text is faulty were reported with it.
    """
    faults = []
    for row, pair in enumerate(pairs):
        reported = on_faulty == "keep" and not pair.cut and pair.text is not None and fault_of(pair.text) is not None
        if pair.chosen_ids == pair.rejected_ids and not reported:
            fault = "chosen and rejected have the same tokens" + " after on_too_long=truncate" * bool(pair.cut)
            faults.append((pair.source or f"row {row}, counted from 0", fault))
    kept = [pair for pair in pairs if on_faulty == "keep" or pair.chosen_ids != pair.rejected_ids]
    report(faults, len(pairs), len(pairs) - len(kept), on_faulty, "tokens", what)
    return kept


def brief(pairs: Sequence[Pair]) -> str:
    """What a run says of its training pairs before it begins."""
    sizes = [(len(pair.chosen_ids), len(pair.rejected_ids), len(pair.prompt_ids)) for pair in pairs]
    longest = max(prompt + max(chosen, rejected) for chosen, rejected, prompt in sizes)
    said = f"data: {len(pairs)} training {called(pairs[0].label)}, the longest of {longest} tokens"
    if pairs[0].label is None:
        longer = sum((chosen > rejected) + (chosen == rejected) / 2 for chosen, rejected, _ in sizes) / len(sizes)
        said += f"; the longer response is chosen in {longer:.0%}"
    return said + "; python -m dpo.data with the same keys says more"


def mismatched(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int, what: str) -> list[Pair]:
    """What a loss learns from that reads labels: responses with a label, where a pair is two of them, the chosen one
    desirable and the rejected one not; and in the place of the rejected one the response of another row to another
    prompt, cut to max_length.

    Which row is decided by the data alone: rows with the same prompt side by side, prompts in an order by hash, it is
    as many places on as there are rows with one prompt at most. So each response is beside one other prompt, in any
    batches, and a reference can score it ahead of training.
    """
    rows = [row for pair in pairs for row in ([pair] if pair.label is not None else _by_label(pair))]
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for place, row in enumerate(rows):
        by_prompt.setdefault(tuple(row.prompt_ids), []).append(place)
    check_prompts(most := max(map(len, by_prompt.values())), len(rows), what)
    order = [place for prompt in sorted(by_prompt, key=digest) for place in by_prompt[prompt]]
    other = {place: rows[order[(at + most) % len(rows)]] for at, place in enumerate(order)}
    beside = [_beside(row, other[place], tokenizer, max_length) for place, row in enumerate(rows)]
    cut = sum(len(row.rejected_ids) < len(other[place].chosen_ids) for place, row in enumerate(beside))
    desirable = sum(row.label is True for row in rows)
    said = f", of which {cut} are cut to {max_length} tokens beside another prompt" * bool(cut)
    logger.info(f"tokens: {what} are {desirable} desirable and {len(rows) - desirable} undesirable responses{said}")
    return beside


def check_prompts(most: int, rows: int, what: str) -> None:
    """Raise a ValueError if `most` of so many rows have one prompt, and not each a row of another."""
    if 2 * most > rows:
        raise ValueError(
            f"of {what} at most half may have the same prompt, or some have no response to another beside them; found "
            f"{most} of {rows}. Add responses to other prompts."
        )


def _by_label(pair: Pair) -> tuple[Pair, Pair]:
    """The chosen response as desirable, and the rejected one as undesirable."""
    assert pair.text is not None, "pairs of data have a text"
    undesirable, turned = replace(flipped(pair.text), label=False), {"chosen": "rejected", "rejected": "chosen"}
    cut = tuple(turned.get(name, name) for name in pair.cut)
    other = replace(pair, chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids, text=undesirable, cut=cut)
    return replace(pair, text=replace(pair.text, label=True)), other


def _beside(row: Pair, other: Pair, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Pair:
    """A row with the response of another in the place of the rejected one."""
    assert row.text is not None, "pairs of data have a text"
    assert other.text is not None, "pairs of data have a text"
    ids, text, ended = other.chosen_ids[: max_length - len(row.prompt_ids)], other.text.chosen, other.text.chosen_ended
    if short := len(ids) < len(other.chosen_ids):
        text, ended = decode(row.prompt_ids, ids, tokenizer), False
    own, theirs = row.text.token_ids, other.text.token_ids
    sampled = None if own is None or theirs is None else replace(own, rejected=ids)
    unwritten = row.unwritten or other.unwritten or "\ufffd" in text
    content = replace(row.text, rejected=text, rejected_ended=ended, token_ids=sampled, measures=Measures())
    cut = tuple(name for name in row.cut if name != "rejected") + ("rejected",) * (short or "chosen" in other.cut)
    return replace(row, rejected_ids=ids, text=content, cut=cut, unwritten=unwritten)


def _as_sampled(
    items: Sequence[Encoded], preferences: Sequence[Preference], tokenizer: PreTrainedTokenizerBase, what: str
) -> list[Encoded]:
    """With the ids of the sampled responses, where they are this tokenizer's and continue the same prompt ids.

    Raises: ValueError if they are not in its vocabulary, or not those of the text.
    """
    sampled = sum(preferences[item.row].token_ids is not None for item in items)
    if not sampled:
        return list(items)
    own, known, updated, wrong = vocabulary(tokenizer), set(tokenizer.get_vocab().values()), [], []
    for item in items:
        pair = preferences[item.row]
        ids = pair.token_ids
        if ids is None or ids.tokenizer != own or ids.prompt != item.prompt_ids:
            updated.append(item)
            continue
        updated.append(replace(item, response_ids=[ids.chosen, ids.rejected]))
        sides = zip(("chosen", "rejected"), (ids.chosen, ids.rejected), item.responses, strict=True)
        for name, response_ids, (text, ended) in sides:
            body = response_ids[: len(response_ids) - ended]
            if not known.issuperset(response_ids) or decode(ids.prompt, body, tokenizer) != text:
                wrong.append(f"{pair.source or f'row {item.row}, counted from 0'} ({name})")
    if wrong:
        raise ValueError(
            f"token_ids of {what} must be those of the text beside them, found others:{listed(wrong)}\nLeave "
            "token_ids out where the text was changed, and it is encoded anew."
        )
    others = sampled - sum(new is not old for new, old in zip(updated, items, strict=True))
    if others:
        logger.warning(
            f"tokens: {others} of {sampled} {what} that were sampled with another tokenizer or after other prompt ids "
            "are encoded from their text"
        )
    return updated


def _pair(item: Encoded, preference: Preference, tokenizer: PreTrainedTokenizerBase) -> Pair:
    """A pair with the text that its tokens say, and the ids that it was sampled as if these are its tokens."""
    names = ("chosen", "rejected")
    texts = {"prompt": item.prompt, **dict(zip(names, (text for text, _ in item.responses), strict=True))}
    ended = {f"{name}_ended": flag for name, (_, flag) in zip(names, item.responses, strict=True)}
    changed = {name for name, value in {**texts, **ended}.items() if value != getattr(preference, name)}
    cut = tuple(name for name in texts if changed & {name, f"{name}_ended"})
    ids, unwritten = preference.token_ids, False
    if ids is not None and (cut or item.response_ids != [ids.chosen, ids.rejected]):
        ids = None
    if ids is not None:
        skipped = set(special(tokenizer).values())  # by decoding
        ended_ids = zip(item.response_ids, item.responses, strict=True)
        bodies = [response_ids[: len(response_ids) - flag] for response_ids, (_, flag) in ended_ids]
        unwritten = any(skipped.intersection(body) for body in bodies) or any(
            "\ufffd" in text for name, text in texts.items() if name != "prompt"
        )
    content: dict[str, Any] = {**texts, **ended}
    chosen, rejected = item.response_ids
    return Pair(item.prompt_ids, chosen, rejected, replace(preference, **content, token_ids=ids), cut, unwritten)


def tokenize_demonstrations(
    demonstrations: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_too_long: str,
    on_faulty: str = "error",
) -> list[Tokens]:
    """Demonstrations in tokens, by the rules of `tokenize`."""
    sides = [[(demonstration.response, demonstration.ended)] for demonstration in demonstrations]
    prompts = [demonstration.prompt for demonstration in demonstrations]
    sources = [demonstration.source for demonstration in demonstrations]
    encoded = encode(prompts, sides, tokenizer, "demonstrations", sources, on_faulty)
    encoded = fitted(encoded, tokenizer, max_length, on_too_long, "demonstrations", sources, TOO_LONG)
    return [(item.prompt_ids, item.response_ids[0]) for item in encoded]


def encode_prompts(prompts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """Prompt ids to sample from, the same as in `tokenize`; longer ones are cut from the left and counted."""
    return [ids for _, ids in truncated_prompts(prompts, tokenizer, max_length)]


def truncated_prompts(
    prompts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[tuple[Text, list[int]]]:
    """What is left of each prompt in at most max_length tokens, and its ids: see `encode_prompts`.

    Raises: ValueError if a chat is longer with a single token of its last turn.
    """
    encoded = [prompt.ids for prompt in encode_alone(prompts, tokenizer)]
    long = [row for row, ids in enumerate(encoded) if len(ids) > max_length]
    if not long:
        return list(zip(prompts, encoded, strict=True))
    cut = cut_prompts([prompts[row] for row in long], tokenizer, [max_length] * len(long))
    shorter = {row: (text, start.ids) for row, text, start in zip(long, cut, encode_alone(cut, tokenizer), strict=True)}
    if (longest := max(len(ids) for _, ids in shorter.values())) > max_length:
        raise ValueError(
            f"prompts must leave room for a response, found one of {longest} tokens, cut as far as can be, where "
            f"{max_length} are left for it; raise max_length, or lower max_new_tokens"
        )
    logger.warning(f"tokens: {len(long)} of {len(encoded)} prompts cut from the left to {max_length} tokens")
    return [shorter.get(row, (prompt, encoded[row])) for row, prompt in enumerate(prompts)]


def collate(tokens: Sequence[Tokens], index: Tensor, valid: Tensor, *, pad_id: int, packed: bool) -> Batch:
    """A batch of one sequence an item."""
    return collate_responses(
        [(prompt, [response]) for prompt, response in tokens], index, valid, pad_id=pad_id, packed=packed
    )


def collate_pairs(pairs: Sequence[Pair], index: Tensor, valid: Tensor, *, pad_id: int, packed: bool) -> Batch:
    """A batch of two sequences a pair: those of the chosen responses, then those of the rejected ones."""
    items, labels = [pair.prompt_responses for pair in pairs], [pair.label for pair in pairs]
    batch = collate_responses(items, index, valid, pad_id=pad_id, packed=packed)
    return batch if None in labels else replace(batch, desirable=torch.tensor(labels))


def collate_responses(
    items: Sequence[PromptResponses],
    index: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    pad_id: int = 0,  # masked
    packed: bool,
) -> Batch:
    """A batch of prompts with any number of responses each. Its sequences are the first response to every prompt, then
    the second ones, and so on.
    """
    most = max(len(responses) for _, responses in items)
    order = [(nth, item) for nth in range(most) for item in range(len(items)) if nth < len(items[item][1])]
    responses = [items[item][1][nth] for nth, item in order]
    prompts = [items[item][0] for _, item in order]
    return Batch(
        index=torch.arange(len(items)) if index is None else index,
        valid=torch.ones(len(items), dtype=torch.bool) if valid is None else valid,
        **(_one_row(items, order) if packed else _padded_rows(prompts, responses, pad_id)),
        labels=torch.tensor([token for response in responses for token in response]),
        sequence_ids=torch.repeat_interleave(torch.tensor([len(response) for response in responses])),
        sequences=len(order),
    )


def _one_row(items: Sequence[PromptResponses], order: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Fields of a packed batch. order: of each sequence, which response to which item."""
    ids: list[int] = []
    positions: list[int] = []
    targets: dict[tuple[int, int], list[int]] = {}
    for item, (prompt, responses) in enumerate(items):
        ids += prompt
        positions += range(len(prompt))
        last = len(ids) - 1  # the first token of every response is predicted here
        for nth, response in enumerate(responses):
            fed = response[:-1]
            targets[nth, item] = [last, *range(len(ids), len(ids) + len(fed))][: len(response)]
            ids += fed
            positions += range(len(prompt), len(prompt) + len(fed))
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "attention_mask": None,
        "shared_prefixes": tuple(
            (len(prompt), tuple(len(response[:-1]) for response in responses)) for prompt, responses in items
        ),
        "target_positions": torch.tensor([position for sequence in order for position in targets[sequence]]),
    }


def _padded_rows(prompts: Sequence[list[int]], responses: Sequence[list[int]], pad_id: int) -> dict[str, Any]:
    """Fields of a padded batch."""
    rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    lengths, starts = (torch.tensor([len(ids) for ids in lists])[:, None] for lists in (rows, prompts))  # (S, 1)
    position_ids = torch.arange(int(lengths.max())).expand(len(rows), -1)  # (S, T)
    kept = position_ids < lengths  # (S, T)
    input_ids = torch.full(kept.shape, pad_id)
    input_ids[kept] = torch.tensor([token for row in rows for token in row])
    return {
        "input_ids": input_ids,
        "position_ids": position_ids * kept,
        "attention_mask": kept.long(),
        "shared_prefixes": (),
        "target_positions": (kept & (position_ids >= starts)).flatten().nonzero().squeeze(1) - 1,
    }


def size(item: PromptResponses) -> int:
    """Tokens, those of the prompt once."""
    prompt, responses = item
    return len(prompt) + sum(map(len, responses))


class Batches(Generic[Item, Made]):
    """Micro-batches of every optimizer step, by random access: to resume is to ask for the next step.

    Each epoch is a permutation of the items that only the seed and the epoch decide, cut into windows of batch_size
    items, the last one shorter; a window is a step, whatever the world size. Within it items are dealt to micro-batches
    of at most micro_batch_tokens; a longer item has one of its own.
    """

    def __init__(
        self,
        items: Sequence[Item],
        collate: Callable[[list[Item], Tensor, Tensor], Made],
        *,
        size: Callable[[Item], int],
        batch_size: int,
        micro_batch_tokens: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not items:
            raise ValueError("batches need at least one item, found none")
        if batch_size < 1 or micro_batch_tokens < 1:
            raise ValueError(f"batch sizes must be at least 1, got {batch_size} and {micro_batch_tokens}")
        if seed < 0 or not 0 <= rank < world_size:
            raise ValueError(f"need seed >= 0 and 0 <= rank < world_size, got {seed}, {rank} and {world_size}")
        self.items, self.collate, self.sizes = items, collate, [size(item) for item in items]
        self.batch_size, self.micro_batch_tokens = batch_size, micro_batch_tokens
        self.seed, self.rank, self.world_size = seed, rank, world_size

    def __len__(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-len(self.items) // self.batch_size)

    def name(self, row: int) -> str:
        """Where an item came from, if it knows: for messages."""
        return getattr(self.items[row], "source", None) or f"row {row}, counted from 0"

    def at(self, step: int) -> tuple[list[Made], int]:
        """This rank's micro-batches of optimizer step `step`, from 0, and the step's number of real items."""
        epoch, window = divmod(step, len(self))
        order = order_of(len(self.items), self.seed, epoch)
        rows = order[window * self.batch_size : (window + 1) * self.batch_size]
        shares = balance_by_tokens([self.sizes[row] for row in rows], self.micro_batch_tokens, self.world_size)
        batches = []
        for share in shares[self.rank :: self.world_size]:
            own = [rows[index] for index in share] or rows[:1]  # a filler, where there are fewer items than ranks
            valid = torch.full((len(own),), bool(share))
            batches.append(self.collate([self.items[row] for row in own], torch.tensor(own), valid))
        return batches, len(rows)


def order_of(items: int, seed: int, epoch: int) -> list[int]:
    """Rows in the order in which an epoch reads them."""
    return np.random.default_rng((seed, epoch)).permutation(items).tolist()


def balance_by_tokens(sizes: Sequence[int], limit: int, multiple: int) -> list[list[int]]:
    """Indices of the items in shares of at most `limit` and about equal size; an item above it has a share of its own.

    The largest items go first, each to the smallest share. There are as few shares as that allows, but a multiple of
    `multiple`; some may be empty.
    """
    largest_first = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    minimum = sum(min(tokens, limit) for tokens in sizes)
    count = multiple * max(1, -(-minimum // (limit * multiple)))
    while True:
        shares: list[list[int]] = [[] for _ in range(count)]
        smallest = [(0, share) for share in range(count)]  # a heap
        for index in largest_first:
            total, share = smallest[0]
            shares[share].append(index)
            heapq.heapreplace(smallest, (total + sizes[index], share))
        if all(total <= limit or len(shares[share]) == 1 for total, share in smallest):
            return shares
        count += multiple
