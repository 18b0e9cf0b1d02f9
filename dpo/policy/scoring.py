"""Log-probabilities of given responses under a model that does not move: computed once, cached by content."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dpo.cache import digest, remember
from dpo.data.batches import Branches, Tokens, branched, dealt, size
from dpo.data.records import listed
from dpo.policy.logps import forward_tokens, packable, token_logps
from dpo.training import sharding
from dpo.training.log import progress
from dpo.training.loop import autocast

SCORING_VERSION = 3  # part of the cache key: raise it when a change of the scoring code changes its numbers
LIVE = 8  # sequences that are scored again, to compare what is cached with what the model says now
BRANCHES = 4  # responses that share a prompt at most: attention is worked out, and hidden, between them, too


@dataclass(frozen=True)
class Scores:
    """Of N responses, in the order asked for."""

    logps: Tensor  # (N,) float32 nats, sums over the response
    lengths: Tensor  # (N,) int64 tokens
    token_logps: list[Tensor] | None  # N x (tokens,) float32; None: not asked for
    cached: bool  # all of them were there already


def score(
    model: PreTrainedModel,
    sequences: Sequence[Tokens],
    weights: str,
    settings: Any,
    name: str,
    origins: Sequence[str],
    per_token: bool = False,
    about: Callable[[], dict[str, Any]] = dict,
) -> Scores:
    """Log-probability of each response under `model`, whose fingerprint is `weights`.

    The cache keeps each distinct sequence once, and look-up is by content, so order, duplicates and row numbers of the
    data set never matter. settings: cache, precision, packed and micro_batch_tokens. origins: where each sequence came
    from, for messages. about: what the sequences come from, which decides nothing, but explains a miss.

    Raises: RuntimeError, and keeps nothing, if a log-prob is not finite; if one is missing in what is kept.
    """
    contents = [_content(tokens) for tokens in sequences]
    distinct = dict(sorted(zip(contents, sequences, strict=True)))
    key = {
        "weights": weights,
        "sequences": digest([content.hex() for content in distinct]),  # token ids and where responses begin
        "precision": settings.precision,
        "scoring": SCORING_VERSION,
    }

    def build(folder: Path) -> None:
        items = [(prompt, [response]) for prompt, response in distinct.values()]
        broken = _broken(model)  # no layout of rows would help
        packed = settings.packed and not broken and packable(model, items)
        values = _score(model, list(distinct.values()), settings, packed, name)
        finite = {content for content, logps in zip(distinct, values, strict=True) if logps.sum().isfinite()}
        if bad := [origin for origin, content in zip(origins, contents, strict=True) if content not in finite]:
            cause = f"The weights are finite; precision=fp32 or packed=false may help (precision={settings.precision})."
            if broken:
                cause = f"{len(broken)} of the weights are not finite, such as {broken[0]}: take another checkpoint."
            found = f"found none for {len(bad)} of {len(contents)} responses"
            raise RuntimeError(f"{name} must be finite numbers, {found}:{listed(bad)}\n{cause}")
        table = {
            "digests": torch.from_numpy(np.frombuffer(b"".join(distinct), dtype=np.uint8).reshape(-1, 16).copy()),
            "logps": torch.stack([logps.sum() for logps in values]),
            "lengths": torch.tensor([len(logps) for logps in values]),
            # Asked for or not, so that one pass serves both. 4 bytes a token: 1.6 GB for 100,000 pairs of 2 x 2,000
            # tokens, of the 29 GB that a 7B policy has; read only when asked for.
            "token_logps": torch.cat(values),
        }
        if sharding.is_main():  # what others write is thrown away, and may not fit in /tmp
            save_file(table, folder / "scores.safetensors")

    folder, cached = remember(settings.cache, "reference", key, build, sharding.any_true, about)
    with safe_open(folder / "scores.safetensors", "pt") as file:  # which reads no more than it is asked for
        names = ("digests", "logps", "lengths", *(["token_logps"] if per_token else []))
        table = {name: file.get_tensor(name) for name in names}
    finite = table["logps"].isfinite().tolist()
    rows = {content.tobytes(): row for row, content in enumerate(table["digests"].numpy()) if finite[row]}
    if lost := [origin for origin, content in zip(origins, contents, strict=True) if content not in rows]:
        raise RuntimeError(
            f"{folder} must hold a finite log-prob of each response, found none for {len(lost)} of {len(contents)}:"
            f"{listed(lost)}\nIt is damaged; delete it to score again."
        )
    order = [rows[content] for content in contents]
    tokens = None
    if per_token:
        parts = table["token_logps"].split(table["lengths"].tolist())
        tokens = [parts[row] for row in order]
    return Scores(table["logps"][order], table["lengths"][order], tokens, cached)


def off_by(model: PreTrainedModel, sequences: Sequence[Tokens], logps: Tensor, settings: Any) -> float:
    """The largest relative error of given log-probs of a few sequences against what the model's own forward says now,
    of 10 nats where a log-prob is less: a float32 logit of 30 is itself known to 2e-6 only, and so is a sure token.

    Raises: RuntimeError if it is more than rounding explains: 1e-6 in fp32.
    """
    some = range(0, len(sequences), max(1, len(sequences) // LIVE))[:LIVE]
    found = _score(model, [sequences[row] for row in some], settings, packed=False, name="")
    live = torch.stack([values.sum() for values in found])
    off = ((live - logps[list(some)]).abs() / live.abs().clamp(min=10)).max().item()
    if not off <= (1e-6 if settings.precision == "fp32" else 2e-2):
        raise RuntimeError(
            f"cached log-probs must agree with those of the model, found a relative error of {off:.1e}; the cache in "
            f"{settings.cache} is damaged (python -m dpo.cache {settings.cache} --verify) or the scoring is wrong"
        )
    return off


def _content(tokens: Tokens) -> bytes:
    prompt_ids, response_ids = tokens
    ids = np.array([len(prompt_ids), *prompt_ids, *response_ids], dtype="<i8")
    return hashlib.sha256(ids.tobytes()).digest()[:16]


def _broken(model: PreTrainedModel) -> list[str]:
    """Weights with values that are not finite; of a sharded model all ranks must ask."""
    local = ((name, one.to_local() if isinstance(one, DTensor) else one) for name, one in model.named_parameters())
    return [name for name, weight in local if sharding.any_true(not weight.isfinite().all())]


@torch.no_grad()
def _score(model: PreTrainedModel, sequences: Sequence[Tokens], settings: Any, packed: bool, name: str) -> list[Tensor]:
    """Log-probs of the tokens of each response.  # N x (tokens,) float32"""
    found: list[tuple[int, Tensor]] = []
    training, device = model.training, sharding.device_of(model)
    model.eval()
    tokens = forward_tokens(settings.micro_batch_tokens, packed)
    bar: progress[None] = progress(total=len(sequences), name=name)
    with bar:
        for share in _share(_shares(sequences, tokens)):
            items: list[Branches] = [(sequences[rows[0]][0], [sequences[row][1] for row in rows]) for rows in share]
            order = [row for nth in zip_longest(*share) for row in nth if row is not None]
            with autocast(settings.precision, device):
                values = token_logps(model, branched(items, packed=packed).to(device)).cpu()
            parts = values.split([len(sequences[row][1]) for row in order])
            found += [(row, part.clone()) for row, part in zip(order, parts, strict=True)]
            bar.update(len(order) * sharding.world_size())
    model.train(training)
    scored = dict(sharding.gathered(found))
    return [scored[row] for row in range(len(sequences))]


def _share(chunks: list[list[list[int]]]) -> list[list[list[int]]]:
    """Those of this rank; some twice, so that every rank makes as many passes through a sharded model."""
    first, apart = sharding.rank(), sharding.world_size()
    return [chunks[place % len(chunks)] for place in range(first, -(-len(chunks) // apart) * apart, apart)]


def _shares(sequences: Sequence[Tokens], tokens: int) -> list[list[list[int]]]:
    """Rows of the sequences, together where they continue the same prompt, in shares of at most `tokens`."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for row, (prompt, _) in enumerate(sequences):
        by_prompt.setdefault(tuple(prompt), []).append(row)
    groups = [rows[first : first + BRANCHES] for rows in by_prompt.values() for first in range(0, len(rows), BRANCHES)]
    sizes = [size((sequences[rows[0]][0], [sequences[row][1] for row in rows])) for rows in groups]
    return [[groups[place] for place in share] for share in dealt(sizes, tokens, 1)]
