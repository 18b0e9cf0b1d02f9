"""Log-probs of a reference that never moves, by row: all of them at hand, or as a pool gives them."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo.data.batches import Batch, Tokens, order_of
from dpo.policy.logps import differing, packable
from dpo.policy.model import ModelSpec
from dpo.policy.scoring import Scores, Scoring, alone, contents_of, live_logps, live_rows, score, sums

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Table:
    """A reference that never moves: log-probs by row, of the pairs of each split."""

    held: str
    fingerprint: str
    table: dict[str, Tensor]  # split -> (N, 2) float32 nats, of chosen and rejected
    lengths: dict[str, Tensor] = field(default_factory=dict)  # split -> (N, 2) int64 scored tokens, where known
    tokens: dict[str, list[Tensor]] = field(default_factory=dict)  # split -> 2N x (tokens,), chosen first, if asked for
    kl_target: str | None = None
    is_initial: bool = False
    folder: Path | None = None  # where its scores are kept
    model: PreTrainedModel | None = None

    def logps(self, batch: Batch, split: str) -> Tensor:
        return self.table[split].to(batch.index.device)[batch.index].T.reshape(-1)

    def token_logps(self, batch: Batch, split: str) -> Tensor:
        tokens, rows = self.tokens[split], batch.index.tolist()
        both = [tokens[row + off] for off in (0, len(tokens) // 2) for row in rows]
        return torch.cat(both).to(batch.index.device)

    def after_step(self, policy: PreTrainedModel) -> None:
        return None


def table_of(
    held: str,
    weights: str,
    scores: Scores,
    sequences: dict[str, Sequence[Tokens]],
    kl_target: str | None,
    is_initial: bool,
) -> Table:
    """Scores of the sequences of each split: chosen responses, then rejected ones."""
    table, lengths, tokens, first = {}, {}, {}, 0
    for split, asked in sequences.items():
        rows = slice(first, first := first + len(asked))
        table[split] = scores.logps[rows].view(2, len(asked) // 2).T.contiguous()
        lengths[split] = scores.lengths[rows].view(2, len(asked) // 2).T
        tokens[split] = (scores.token_logps or [])[rows]
    return Table(held, weights, table, lengths, tokens, kl_target, is_initial, scores.folder)


def read_first(sizes: dict[str, int], settings: Scoring) -> list[int]:
    """Rows of all sequences, those of each split chosen first, as training reads them: those that are checked, the
    first step, what is held out, and the rest of the first epoch. sizes: pairs of each split.
    """
    rows, first = [], 0
    for split, count in sizes.items():
        order = order_of(count, settings.seed, 0) if split == "train" else range(count)
        later = [
            2 if split == "train" and turn >= settings.batch_size else int(split != "train") for turn in range(count)
        ]
        rows += [(when, first + row + off) for when, row in zip(later, order, strict=True) for off in (0, count)]
        first += 2 * count
    return [*live_rows(first), *(row for _, row in sorted(rows, key=lambda turn: turn[0]))]


def stream(
    model: PreTrainedModel,
    which: ModelSpec,
    held: str,
    sequences: dict[str, Sequence[Tokens]],
    rules: tuple[Sequence[Tokens], str, Scoring, str, Sequence[str], Callable[[], dict[str, Any]]],
    kl_target: str | None,
    is_initial: bool,
) -> "Streamed":
    """Have the settings' pool score the model `which` from now on. model: the same here, which is not kept.

    rules: what `score` takes: all sequences, weights, settings, name, sources, about.
    """
    asked, weights, settings, name, sources, _ = rules
    contents, rows = contents_of(asked), live_rows(len(asked))
    packed = settings.packed and packable(model, alone(asked))
    live = rows, live_logps(model, [asked[row] for row in rows], settings)
    order = read_first({split: len(items) // 2 for split, items in sequences.items()}, settings)
    first, named = [contents[row] for row in order], dict(zip(contents, sources, strict=True))

    def work(found: Callable[[bytes, Tensor], None]) -> Scores:
        return score(settings.pool.passes(which, weights, packed, settings, name, first, named, found), *rules)

    return Streamed(held, weights, sequences, contents, work, live, settings, kl_target, is_initial)


class Streamed:
    """The same reference while a pool scores: what asks for a row that is not there yet waits for it.

    contents: of all sequences, by `content_of`. work: scores them, in a thread of its own; tells its argument the
    log-probs of each as they come.
    live: rows of all sequences, and what the model's own forward says of them; no row is given away before these are
    there and agree. What the work raises is raised by whoever waits.
    """

    model: PreTrainedModel | None = None

    def __init__(
        self,
        held: str,
        fingerprint: str,
        sequences: dict[str, Sequence[Tokens]],
        contents: Sequence[bytes],
        work: Callable[[Callable[[bytes, Tensor], None]], Scores],
        live: tuple[Sequence[int], Tensor],
        settings: Scoring,
        kl_target: str | None,
        is_initial: bool,
    ) -> None:
        self.held, self.fingerprint, self.kl_target, self.is_initial = held, fingerprint, kl_target, is_initial
        self.waited = 0.0  # seconds, of those who asked
        self._sequences, self._settings, self._live = sequences, settings, live
        self._all = contents
        found = iter(contents)
        self._contents = {split: list(islice(found, len(asked))) for split, asked in sequences.items()}
        self._unchecked = [contents[row] for row in live[0]]
        self._logps: dict[bytes, Tensor] = {}  # () float32, by content
        self._tokens: dict[bytes, Tensor] = {}  # (tokens,) float32, where asked for
        self._checked = False
        self._changed = threading.Condition()
        self._outcome: Scores | BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="scoring", daemon=True)
        self._thread.start()

    def logps(self, batch: Batch, split: str) -> Tensor:
        asked = self._asked(batch, split)
        return torch.stack([self._logps[content] for content in asked]).to(batch.index.device)

    def token_logps(self, batch: Batch, split: str) -> Tensor:
        asked = self._asked(batch, split)
        return torch.cat([self._tokens[content] for content in asked]).to(batch.index.device)

    def after_step(self, policy: PreTrainedModel) -> None:
        return None

    def finish(self) -> Table:
        """All of it, once the cache has it."""
        self._wait(lambda: isinstance(self._outcome, Scores))
        assert isinstance(self._outcome, Scores)
        return table_of(self.held, self.fingerprint, self._outcome, self._sequences, self.kl_target, self.is_initial)

    def _asked(self, batch: Batch, split: str) -> list[bytes]:
        """Contents of the batch's responses, chosen then rejected, when they are there."""
        contents, rows = self._contents[split], batch.index.tolist()
        asked = [contents[row + off] for off in (0, len(contents) // 2) for row in rows]
        self._wait(lambda: self._checked and all(content in self._logps for content in asked))
        return asked

    def _wait(self, ready: Callable[[], bool]) -> None:
        began = time.monotonic()
        with self._changed:
            while not (ready() or isinstance(self._outcome, BaseException)):
                self._changed.wait(timeout=1.0)  # signals are heard meanwhile
        self.waited += time.monotonic() - began
        if isinstance(self._outcome, BaseException):
            raise self._outcome

    def _run(self, work: Callable[[Callable[[bytes, Tensor], None]], Scores]) -> None:
        try:
            outcome: Scores | BaseException = work(self._found)
            if isinstance(outcome, Scores) and outcome.cached:  # another process scored them meanwhile
                for row, content in enumerate(self._all):
                    tokens = outcome.token_logps[row] if outcome.token_logps else None
                    self._add(content, outcome.logps[row], tokens)
        except BaseException as error:
            outcome = error
        with self._changed:
            self._outcome = outcome
            self._changed.notify_all()

    def _found(self, content: bytes, token_logps: Tensor) -> None:
        self._add(content, sums([token_logps])[0], token_logps if self._settings.per_token else None)

    def _add(self, content: bytes, logp: Tensor, token_logps: Tensor | None) -> None:
        with self._changed:
            self._logps[content] = logp
            if token_logps is not None:
                self._tokens[content] = token_logps
            if not self._checked and all(one in self._logps for one in self._unchecked):
                self._check()
            self._changed.notify_all()

    def _check(self) -> None:
        found, precision = torch.stack([self._logps[content] for content in self._unchecked]), self._settings.precision
        pool = self._settings.pool
        if wrong := differing(found, self._live[1], precision):
            raise RuntimeError(
                f"log-probs of {pool.said} must be those of the model's own forward here, found {wrong}; leave out "
                f"{pool.without}" + ", or set precision=fp32" * (precision != "fp32") + "; delete the unfinished "
                f"scores in {self._settings.cache}/reference"
            )
        off = (found - self._live[1]).abs().max().item()
        logger.info(f"reference: first log-probs are there; {len(found)} scored here differ by {off:.0e} nats at most")
        self._checked = True
