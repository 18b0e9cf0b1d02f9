"""Log-probabilities of given responses under a model that does not move: computed once, cached by content."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from dpo.cache import digest, entry, remember
from dpo.data.batches import PromptResponses, Tokens, balance_by_tokens, collate_responses, content_of, size
from dpo.data.lazy import digests_of, mapped
from dpo.data.records import listed
from dpo.losses.pairs import TIE_TOLERANCE
from dpo.policy.logps import differing, forward_tokens, packable, token_logps
from dpo.policy.model import broken
from dpo.training import distributed
from dpo.training.log import progress
from dpo.training.loop import autocast, evaluating

SCORING_VERSION = 4  # part of the cache key: raise it when a change of the scoring code changes its numbers
LIVE = 8  # sequences that are scored again, to compare what is cached with what the model says now
# Of distinct sequences, by their digests, what `score` calls the log-probs of their tokens, in that order. It may keep
# what it has in the folder, and finds it there if it was stopped.
Passes = Callable[[Sequence[bytes], Sequence[Tokens], Path], list[Tensor]]
BRANCHES = 4  # responses that share a prompt at most: attention is worked out, and hidden, between them, too


@dataclass(frozen=True)
class Scoring:
    """How a reference scores, and where its scores are kept."""

    cache: str  # folder
    precision: str  # "fp32" or "bf16", of the matrix products
    packed: bool  # share prompts and leave out padding: never a number
    micro_batch_tokens: int  # of a forward pass: never a number
    max_length: int  # tokens of prompt and response, which a model must be able to read
    on_too_long: str  # what was done with longer ones
    per_token: bool = False  # keep the log-probs of tokens at hand, too
    pool: Any = None  # a `Pool` or `VllmScorer`, which scores beside training; None: here, before it
    seed: int = 0  # of training's first epoch, and
    batch_size: int = 1  # pairs of its steps: a pool scores first what is read first, which is never a number


@dataclass(frozen=True)
class Scores:
    """Of N responses, in the order asked for."""

    logps: Tensor  # (N,) float32 nats, sums over the response
    lengths: Tensor  # (N,) int64 tokens
    token_logps: list[Tensor] | None  # N x (tokens,) float32; None: not asked for
    cached: bool  # all of them were there already
    folder: Path  # where they are kept


def score(
    by: PreTrainedModel | Passes,
    sequences: Sequence[Tokens],
    weights: str,
    settings: Scoring,
    name: str,
    sources: Sequence[str],
    about: Callable[[], dict[str, Any]] = dict,
) -> Scores:
    """Log-probability of each response under a model, whose fingerprint is `weights`; or by what has it elsewhere.

    The cache keeps each distinct sequence once, and look-up is by content, so order, duplicates and row numbers of the
    data set never matter. sources: where each sequence came from, for messages. about: what the sequences come from,
    which decides nothing, but explains a miss.

    Raises: RuntimeError, and keeps nothing, if a log-prob is not finite; if one is missing in what is kept.
    """
    contents = contents_of(sequences)
    distinct = {content: row for row, content in sorted(enumerate(contents), key=itemgetter(1))}  # the row of each
    kept = mapped(sequences.__getitem__, [*distinct.values()])
    key = _key(distinct, weights, settings)

    def build(folder: Path) -> None:
        faulty: list[str] = []
        if isinstance(by, PreTrainedModel):
            faulty = broken(by)  # no layout of rows would help
            packed = settings.packed and not faulty and packable(by, alone(kept))
            values = _score(by, kept, settings, packed, name)
        else:
            values = by(list(distinct), kept, folder / "passes")
        finite = {content for content, logps in zip(distinct, values, strict=True) if logps.sum().isfinite()}
        if bad := [sources[row] for row, content in enumerate(contents) if content not in finite]:
            cause = f"The weights are finite; precision=fp32 or packed=false may help (precision={settings.precision})."
            if faulty:
                cause = f"{len(faulty)} of the weights are not finite, such as {faulty[0]}: take another checkpoint."
            found = f"found none for {len(bad)} of {len(contents)} responses"
            raise RuntimeError(f"{name} must be finite numbers, {found}:{listed(bad)}\n{cause}")
        table = {
            "digests": torch.from_numpy(np.frombuffer(b"".join(distinct), dtype=np.uint8).reshape(-1, 16).copy()),
            "logps": sums(values),
            "lengths": torch.tensor([len(logps) for logps in values]),
            # Asked for or not, so that one pass serves both. 4 bytes a token: 1.6 GB for 100,000 pairs of 2 x 2,000
            # tokens, of the 29 GB that a 7B policy has; read only when asked for.
            "token_logps": torch.cat(values),
        }
        if distributed.is_main():  # what others write is thrown away, and may not fit in /tmp
            save_file(table, folder / "scores.safetensors")
        shutil.rmtree(folder / "passes", ignore_errors=True)  # of a pool that was stopped, too

    folder, cached = remember(settings.cache, "reference", key, build, distributed.any_true, about)
    with safe_open(folder / "scores.safetensors", "pt") as file:  # which reads no more than it is asked for
        names = ("digests", "logps", "lengths", *(["token_logps"] if settings.per_token else []))
        table = {name: file.get_tensor(name) for name in names}
    finite = table["logps"].isfinite().tolist()
    rows = {content.tobytes(): row for row, content in enumerate(table["digests"].numpy()) if finite[row]}
    if lost := [sources[row] for row, content in enumerate(contents) if content not in rows]:
        raise RuntimeError(
            f"{folder} must hold a finite log-prob of each response, found none for {len(lost)} of {len(contents)}:"
            f"{listed(lost)}\nIt is damaged; delete it to score again."
        )
    order = [rows[content] for content in contents]
    tokens = None
    if settings.per_token:
        parts = table["token_logps"].split(table["lengths"].tolist())
        tokens = [parts[row] for row in order]
    return Scores(table["logps"][order], table["lengths"][order], tokens, cached, folder)


def is_kept(sequences: Sequence[Tokens], weights: str, settings: Scoring) -> bool:
    """Whether the cache has what `score` would give."""
    distinct = sorted({*contents_of(sequences)})
    return entry(settings.cache, "reference", _key(distinct, weights, settings)).is_dir()


def _key(distinct: Iterable[bytes], weights: str, settings: Scoring) -> dict[str, Any]:
    """What decides scores: the cache's key. distinct: sorted, by `content_of`."""
    return {
        "weights": weights,
        "sequences": digest([content.hex() for content in distinct]),  # token ids and where responses begin
        "precision": settings.precision,
        "scoring": SCORING_VERSION,
    }


def live_rows(count: int) -> list[int]:
    """Which of `count` sequences are scored again."""
    return list(range(0, count, max(1, count // LIVE)))[:LIVE]


def live_logps(model: PreTrainedModel, sequences: Sequence[Tokens], settings: Scoring) -> Tensor:
    """What the model's own forward says now of a few sequences.  # (N,) float32"""
    return sums(_score(model, sequences, settings, packed=False, name=""))


def check_against_live(model: PreTrainedModel, sequences: Sequence[Tokens], scores: Scores, settings: Scoring) -> float:
    """By how many nats scores of a few sequences differ at most from what the model's own forward says now.

    Raises: RuntimeError if that is more than rounding explains, which says what is to blame: what is kept, if scoring
    in the same way gives the right numbers now, and else the way.
    """
    rows = live_rows(len(sequences))
    some, kept, precision = [sequences[row] for row in rows], scores.logps[rows], settings.precision
    live = live_logps(model, some, settings)
    wrong = differing(kept, live, precision)
    if not wrong:
        return (kept - live).abs().max().item()
    packed = settings.packed and packable(model, alone(some))
    again = sums(_score(model, some, settings, packed, name="")) if scores.cached else kept
    if scores.cached and not differing(again, live, precision):
        raise RuntimeError(
            f"{scores.folder} must hold the log-probs that the model gives, found {wrong}, though scoring them again "
            "gives the right ones; it is damaged, so delete it to score all of them again"
        )
    where, advice = "another batch", "such a model cannot be scored ahead of training"
    if packed:
        where, advice = "packed rows", "set packed=false to use the forward"
    elif precision != "fp32":
        advice = "set precision=fp32"
    raise RuntimeError(
        f"log-probs scored in {where} must be those of the model's own forward within {TIE_TOLERANCE[precision]:g} of "
        f"their size, found {wrong}; {advice}"
    )


def sums(token_logps: Sequence[Tensor]) -> Tensor:
    """Over each response, rounded once.  # N x (tokens,) -> (N,) float32"""
    return torch.stack([values.double().sum() for values in token_logps]).float()


def alone(sequences: Sequence[Tokens]) -> Sequence[PromptResponses]:
    """Each response by itself."""
    return mapped(lambda tokens: (tokens[0], [tokens[1]]), sequences)


def contents_of(sequences: Sequence[Tokens]) -> Sequence[bytes]:
    """`content_of` of each sequence, made only where it is not known."""
    known = digests_of(sequences)
    return [content_of(tokens) for tokens in sequences] if known is None else known


def _score(
    model: PreTrainedModel, sequences: Sequence[Tokens], settings: Scoring, packed: bool, name: str
) -> list[Tensor]:
    """Log-probs of the tokens of each response.  # N x (tokens,) float32"""
    found: list[tuple[int, Tensor]] = []
    tokens = forward_tokens(settings.micro_batch_tokens, packed)
    with evaluating(model), progress(total=len(sequences), name=name) as bar:
        for share in _share(shares(sequences, tokens)):
            values = forward(model, items_of(share, sequences), settings.precision, packed)
            found += parted(share, sequences, values)
            bar.update(sum(map(len, share)) * distributed.world_size())
    scored = dict(distributed.gathered(found))
    return [scored[row] for row in range(len(sequences))]


@torch.no_grad()
def forward(model: PreTrainedModel, items: list[PromptResponses], precision: str, packed: bool) -> Tensor:
    """One pass: log-probs of the tokens of all responses, in the order of `parted`.  # (N,) float32, on the CPU"""
    device = distributed.device_of(model)
    with autocast(precision, device):
        return token_logps(model, collate_responses(items, packed=packed).to(device)).cpu()


def items_of(share: list[list[int]], sequences: Sequence[Tokens]) -> list[PromptResponses]:
    """What a pass over a share reads."""
    return [(sequences[rows[0]][0], [sequences[row][1] for row in rows]) for rows in share]


def parted(share: list[list[int]], sequences: Sequence[Tokens], values: Tensor) -> list[tuple[int, Tensor]]:
    """What a pass over a share gave, by row.  # (N,) -> rows, with (tokens,) each"""
    order = [row for nth in zip_longest(*share) for row in nth if row is not None]
    parts = values.split([len(sequences[row][1]) for row in order])
    return [(row, part.clone()) for row, part in zip(order, parts, strict=True)]


def _share(chunks: list[list[list[int]]]) -> list[list[list[int]]]:
    """Those of this rank; some twice, so that every rank makes as many passes through a sharded model."""
    first, apart = distributed.rank(), distributed.world_size()
    return [chunks[place % len(chunks)] for place in range(first, -(-len(chunks) // apart) * apart, apart)]


def shares(sequences: Sequence[Tokens], tokens: int) -> list[list[list[int]]]:
    """Rows of the sequences, together where they continue the same prompt, in shares of at most `tokens`."""
    by_prompt: dict[bytes, list[int]] = {}
    for row, (prompt, _) in enumerate(sequences):
        by_prompt.setdefault(np.array(prompt, dtype=np.int32).tobytes(), []).append(row)
    groups = [rows[first : first + BRANCHES] for rows in by_prompt.values() for first in range(0, len(rows), BRANCHES)]
    sizes = [size((sequences[rows[0]][0], [sequences[row][1] for row in rows])) for rows in groups]
    return [[groups[place] for place in share] for share in balance_by_tokens(sizes, tokens, 1)]
