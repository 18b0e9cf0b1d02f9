"""What the policy is held close to.

A reference gives the log-probability of each response of a batch. One that never moves is a table, made before training
(`dpo.score` makes it ahead of time) and looked up by content; one that moves is a model beside the policy.
"""

import logging
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo.cache import digest
from dpo.data.batches import Batch, Pair, Tokens, encode_prompts, tokenize
from dpo.data.lazy import Lazy, digests_of, joined
from dpo.data.records import Preference, preference, report
from dpo.data.sources import jsonl_files, listed, parse
from dpo.data.tokens import encode_alone, encoded, vocabulary
from dpo.losses.pairs import tie_tolerance
from dpo.policy import lora
from dpo.policy import model as models
from dpo.policy.live import LiveModel, MovingAverage
from dpo.policy.model import ModelSpec, spec_of
from dpo.policy.scoring import LIVE, Scoring, check_against_live, is_kept, score
from dpo.tables import Streamed, Table, stream, table_of
from dpo.training import distributed

logger = logging.getLogger(__name__)

TOO_LONG = (
    "Raise reference.max_length if the model has more positions, or lower max_length with on_too_long=truncate or "
    "drop. These go by the policy's tokens alone: every reference scores the text that the policy is trained on, or "
    "their runs would not compare."
)
UNREAD = (
    "The tokenizer and chat template of the reference do not render them whole, which data.on_faulty does not decide: "
    "every reference of a sweep scores the same pairs. Take another reference, or remove these pairs from the data."
)


class Reference(Protocol):
    """What holds the policy. Batches name their rows by `index`."""

    held: str  # what is held close to, in words for the user
    kl_target: str | None  # a model, other than the initial policy, whose KL to the policy has a meaning
    is_initial: bool  # starts as the initial policy: then the DPO loss is ln 2 before training
    fingerprint: str  # digest of what gives its log-probs: weights, or given numbers; "" if it moves or is none

    @property
    def model(self) -> PreTrainedModel | None:
        """What its log-probs are of now; None: a table, or nothing."""

    def logps(self, batch: Batch, split: str) -> Tensor:
        """Log-probabilities of the batch's responses, chosen then rejected.  # (2B,) float32, no gradient"""

    def token_logps(self, batch: Batch, split: str) -> Tensor:
        """Those of the single tokens, if it gives "tails" and was asked.  # (N,) float32, no gradient"""

    def after_step(self, policy: PreTrainedModel) -> None:
        """Called after every optimizer step."""


class Pending(Protocol):
    """A reference as a config names it: options that are checked, and no model yet."""

    gives: tuple[str, ...]  # what a loss may ask for with `losses.reads`: "tails" (with settings.per_token), "kl"

    def check(self, initial: ModelSpec | str, settings: Scoring) -> None:
        """Refuse what small files alone can tell, before SFT or sampling. initial: the policy, or its base.

        Raises: ValueError.
        """

    def prepare(
        self, initial: ModelSpec | str, policy: PreTrainedModel, pairs: dict[str, Sequence[Pair]], settings: Scoring
    ) -> Reference:
        """The reference, before the policy is sharded or trained. pairs: those of each split."""


class Precomputed(ABC):
    """A reference that `prepare` makes a `Table` of, which `dpo.score` writes."""

    gives: tuple[str, ...] = ()

    @abstractmethod
    def check(self, initial: ModelSpec | str, settings: Scoring) -> None:
        """See `Pending`."""

    @abstractmethod
    def prepare(
        self, initial: ModelSpec | str, policy: PreTrainedModel, pairs: dict[str, Sequence[Pair]], settings: Scoring
    ) -> Table:
        """See `Pending`."""


class Frozen(Precomputed):
    """Another model that never moves, and reads the policy's token ids. Scored once, cached by content."""

    same_tokens = True  # it reads the policy's token ids
    sees_prompt = True
    gives: tuple[str, ...] = ("tails",)

    def __init__(self, path: str | None) -> None:
        if path is not None:
            models.resolve_path(path)  # a folder that is missing is found out before the first run
        self.path = path

    def spec(self, initial: ModelSpec | str) -> ModelSpec:
        """The model that is scored; it has a template of its own."""
        own = spec_of(initial)
        return own if self.path is None else replace(own, path=self.path, chat_template=None, adapter=None)

    def check(self, initial: ModelSpec | str, settings: Scoring) -> None:
        if settings.per_token and not self.same_tokens:
            raise ValueError(f"per_token=true needs a reference with the policy's tokens, found {self.name()}")
        if self.path is not None:
            tokenizer = models.load_tokenizer(self.spec(initial))
            if self.same_tokens:
                models.check_same_tokenizer(self.path, tokenizer, spec_of(initial).path, models.load_tokenizer(initial))
                models.check_length(self.spec(initial), "max_length", settings.max_length)

    def prepare(
        self, initial: ModelSpec | str, policy: PreTrainedModel, pairs: dict[str, Sequence[Pair]], settings: Scoring
    ) -> Table:
        reference = self.start(initial, policy, pairs, settings)
        return reference.finish() if isinstance(reference, Streamed) else reference

    def start(
        self, initial: ModelSpec | str, policy: PreTrainedModel, pairs: dict[str, Sequence[Pair]], settings: Scoring
    ) -> Table | Streamed:
        """The same; what a pool scores can be read meanwhile."""
        self.check(initial, settings)
        of_pairs, tokenizer = models.load_tokenizer(initial), models.load_tokenizer(self.spec(initial))
        sequences = {
            split: self.sequences(items, split, tokenizer, self.spec(initial), settings)
            for split, items in pairs.items()
        }
        model = policy
        if self.path is not None:
            model, _ = models.load(self.spec(initial), distributed.device_of(policy))
        weights, comparable = models.fingerprint(model), self.same_tokens and self.sees_prompt
        asked, began = joined([*sequences.values()]), time.monotonic()
        sources = joined(
            [
                Lazy(len(items), partial(_source, items, split, side))
                for split, items in pairs.items()
                for side in (0, 1)
            ]
        )
        about = partial(self.about, pairs, of_pairs if self.same_tokens else tokenizer, settings)
        counts = " and ".join(f"{len(items)} {split}" for split, items in pairs.items())
        held = f"{self.name()}, weights {weights[:12]}, log-probs of {counts} pairs"
        kl_target = self.path if comparable else None
        is_initial = comparable and (model is policy or weights == models.fingerprint(policy))  # reads all weights
        rules = (asked, weights, settings, "reference log-probs", sources, about)
        if settings.pool is not None and not is_kept(asked, weights, settings):
            held = f"{held} come from {settings.pool.said} while training reads them"
            return stream(model, self.spec(initial), held, sequences, rules, kl_target, is_initial)
        scores = score(model, *rules)
        where = "from the cache" if scores.cached else f"computed in {time.monotonic() - began:.1f} s"
        off = check_against_live(model, asked, scores, settings)
        held = f"{held} {where}; {LIVE} scored again differ by {off:.0e} nats at most"
        return table_of(held, weights, scores, sequences, kl_target, is_initial)

    def name(self) -> str:
        return "initial policy" if self.path is None else self.path

    def about(
        self, pairs: dict[str, Sequence[Pair]], tokenizer: PreTrainedTokenizerBase, settings: Scoring
    ) -> dict[str, Any]:
        """What the token ids that are scored come from: of a key that misses, why they are others."""
        return {
            "reference": self.name(),
            "pairs": {split: len(items) for split, items in pairs.items()},
            "texts": digest([_contents(pair.text) for items in pairs.values() for pair in items if pair.text]),
            "tokenizer": vocabulary(tokenizer),
            "chat_template": None if tokenizer.chat_template is None else digest(tokenizer.chat_template),
            "max_length": getattr(self, "max_length", settings.max_length),
            "on_too_long": settings.on_too_long,
        }

    def sequences(
        self, pairs: Sequence[Pair], split: str, tokenizer: PreTrainedTokenizerBase, spec: ModelSpec, settings: Scoring
    ) -> Sequence[Tokens]:
        """What is scored: chosen responses, then rejected ones."""
        n, known = len(pairs), digests_of(pairs)
        digests = None if known is None else [both[side] for side in (0, 1) for both in known]
        return Lazy(2 * n, lambda row: pairs[row].chosen if row < n else pairs[row - n].rejected, digests)


def _source(pairs: Sequence[Pair], split: str, side: int, row: int) -> str:
    pair = pairs[row]
    return f"{pair.source or f'{split} row {row}, counted from 0'} ({pair.sides[side]})"


def scored_ahead(pending: object) -> Frozen:
    """What a pool can score beside training. Raises: ValueError if that is not all that the reference gives."""
    if isinstance(pending, Frozen) and type(pending).prepare is Frozen.prepare:
        return pending
    raise ValueError(
        "a scorer needs a reference that is a model which never moves, scored once (initial, other, other_tokenizer, "
        f"unconditional), found {type(pending).__name__}; take scorer=here"
    )


class Initial(Frozen):
    """The policy before training, as in the DPO paper (2305.18290)."""

    def __init__(self) -> None:
        super().__init__(None)


class OtherTokenizer(Frozen):
    """A model that scores the text of each pair under its own tokenizer and chat template.

    max_length: tokens of prompt and response under that tokenizer; None: its positions. A longer pair is an error.
    What on_too_long=truncate cuts is the text, at the policy's tokens, so this reference reads what is left of it.
    by_text: whether a pair in which the policy sampled what its text does not say, such as a special token, is scored
    by its text all the same; False: an error.
    """

    same_tokens = False
    gives: tuple[str, ...] = ()

    def __init__(self, path: str, max_length: int | None, by_text: bool) -> None:
        super().__init__(path)
        if max_length is not None and max_length < 1:
            raise ValueError(f"reference.max_length must be at least 1 token, got {max_length}; null: its positions")
        self.max_length, self.by_text = max_length, by_text

    def check(self, initial: ModelSpec | str, settings: Scoring) -> None:
        super().check(initial, settings)
        if self.max_length is not None:
            models.check_length(self.spec(initial), "reference.max_length", self.max_length)

    def name(self) -> str:
        return f"{self.path} under its own tokenizer"

    def sequences(
        self, pairs: Sequence[Pair], split: str, tokenizer: PreTrainedTokenizerBase, spec: ModelSpec, settings: Scoring
    ) -> Sequence[Tokens]:
        most = self.max_length or models.positions_of(spec) or sys.maxsize
        texts = [pair.text for pair in pairs if pair.text is not None]
        if not tokenizer.chat_template and not all(isinstance(text.prompt, str) for text in texts):
            raise ValueError(
                f"the tokenizer of the reference {self.path} must have a chat template, since prompts are chats, "
                "found none; take a reference that chats, or write the prompts as plain text"
            )
        what = f"{split} pairs in the tokens of the reference {self.path}"
        try:
            own = tokenize(texts, tokenizer, most, "error", what, TOO_LONG)
        except ValueError:  # of faulty pairs it advises what helps the policy's tokens alone
            sides = [[(text.chosen, text.chosen_ended), (text.rejected, text.rejected_ended)] for text in texts]
            _, faults, _ = encoded([text.prompt for text in texts], sides, tokenizer, keep=False)
            named = [(texts[row].source or f"row {row}, counted from 0", faults[row]) for row in sorted(faults)]
            report(named, len(texts), len(named), "error", "tokens", what, UNREAD)
            raise
        if unread := [
            pair.source or f"row {row}, counted from 0"
            for row, (pair, read) in enumerate(zip(pairs, own, strict=True))
            if pair.unwritten and not (read.text and read.text.token_ids)
        ]:
            found = f"{len(unread)} {split} pairs with special tokens or broken characters within"
            if not self.by_text:
                raise ValueError(
                    f"a reference with another tokenizer must read what the policy sampled as text, found {found}:"
                    f"{listed(unread)}\nSet reference.by_text=true to score them by their text all the same, take a "
                    "reference with the policy's tokenizer, or leave these pairs out of the data."
                )
            logger.warning(f"reference: {found} are scored by their text:{listed(unread)}")
        return super().sequences(own, split, tokenizer, spec, settings)


class Unconditional(Frozen):
    """The likelihood reward (2407.13709, Eq. 14-16): log-probs of responses without their prompt.

    path: the model, None: the initial policy, as in the paper. prompt: what comes before every response instead; "":
    the token that begins a text (BOS, or where there is none EOS). How the paper did that is not known.
    """

    sees_prompt = False

    def __init__(self, path: str | None, prompt: str) -> None:
        super().__init__(path)
        self.prompt = prompt

    def name(self) -> str:
        return f"{super().name()} without the prompt"

    def sequences(
        self, pairs: Sequence[Pair], split: str, tokenizer: PreTrainedTokenizerBase, spec: ModelSpec, settings: Scoring
    ) -> Sequence[Tokens]:
        if self.prompt:
            encode_alone([self.prompt], tokenizer, "texts of reference.prompt")  # refused by its name
            [start] = encode_prompts([self.prompt], tokenizer, settings.max_length)
            longest = max((len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)), default=0)
            most = models.positions_of(spec)
            if most is not None and len(start) + longest > most:  # which max_length, of whole pairs, does not see to
                raise ValueError(
                    f"reference.prompt with a response must have at most the {most} positions of {spec.path}, found "
                    f"{len(start)} tokens and {longest} of a {split} response; shorten it"
                )
        else:
            start = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
        n = len(pairs)
        return Lazy(2 * n, lambda row: (start, pairs[row].chosen_ids if row < n else pairs[row - n].rejected_ids))


class PrecomputedFiles(Precomputed):
    """Log-probs from files, for a reference that no machine here can hold: `chosen_logprob` and `rejected_logprob`
    beside each pair, the columns of yale-nlp/RefDPO, whose files do as they are. `dpo.score` writes such files.

    path: a JSONL file, or a folder with them inside, however deep. Look-up is by the text of prompt and response that
    the policy is trained on, so of a pair that on_too_long=truncate cut by what is left of it; and by token ids where
    a policy sampled them. Log-probs of a text that is there twice may differ by the rounding of bf16; the first counts.
    """

    def __init__(self, path: str) -> None:
        if not Path(path).expanduser().exists():
            raise ValueError(f"reference.path must be a file of log-probs or a folder of them, found none at {path}")
        self.path = path

    def check(self, initial: ModelSpec | str, settings: Scoring) -> None:
        if settings.per_token:
            raise ValueError("per_token=true needs a reference that is a model, not reference=precomputed")

    def prepare(
        self, initial: ModelSpec | str, policy: PreTrainedModel, pairs: dict[str, Sequence[Pair]], settings: Scoring
    ) -> Table:
        self.check(initial, settings)
        path = Path(self.path).expanduser()
        files = [*jsonl_files(path)] if path.is_dir() else [path]
        known: dict[str, float] = {}
        for file in files:
            for where, (told, logps) in parse(file, _scored):
                for content, logp in zip(_contents(told), logps, strict=True):
                    if abs(known.setdefault(content, logp) - logp) > tie_tolerance(torch.tensor(logp), "bf16"):
                        raise ValueError(f"{file}, {where}: log-prob {logp}, but {known[content]} for the same text")
        table = {}
        for split, items in pairs.items():
            asked = []
            for pair in items:
                text = pair.text
                if text and text.token_ids and not pair.unwritten and not known.keys() >= set(_contents(text)):
                    text = replace(text, token_ids=None)  # scored from the text, elsewhere
                asked += [_contents(text)] if text else []
            missing = [row for row, contents in enumerate(asked) if not known.keys() >= set(contents)]
            if missing:
                cut = sum(bool(items[row].cut) for row in missing)
                raise ValueError(
                    f"{self.path} must hold the log-probs of every pair, found none for {len(missing)} of {len(asked)} "
                    f"{split} pairs, such as {items[missing[0]].text}; score them with python -m dpo.score"
                    + f". {cut} of them were cut by on_too_long=truncate, and log-probs of another text than what is "
                    f"left are not theirs: score with this policy and max_length={settings.max_length}, or leave such "
                    "pairs out with on_too_long=drop" * bool(cut)
                )
            table[split] = torch.tensor([[known[content] for content in contents] for contents in asked])
        return Table(f"precomputed: {len(known)} log-probs from {self.path}", digest(known), table)


class ReferenceFree:
    """Every response equally likely: reference-free DPO, the posterior reward of 2407.13709, Eq. 9-10."""

    held = "reference-free: every response equally likely"
    kl_target: str | None = None
    fingerprint = ""
    is_initial = False
    model: PreTrainedModel | None = None
    gives = ("tails",)

    def check(self, initial: ModelSpec | str, settings: Scoring) -> None:
        pass

    def prepare(
        self, initial: ModelSpec | str, policy: PreTrainedModel, pairs: dict[str, Sequence[Pair]], settings: Scoring
    ) -> Reference:
        return self

    def logps(self, batch: Batch, split: str) -> Tensor:
        return torch.zeros(batch.sequences, device=batch.index.device)

    def token_logps(self, batch: Batch, split: str) -> Tensor:
        return torch.zeros(len(batch.labels), device=batch.index.device)

    def after_step(self, policy: PreTrainedModel) -> None:
        pass


class Live:
    """A model that never moves, asked at each step, for what no table holds. path: None: the initial policy."""

    gives = ("tails", "kl")

    def __init__(self, path: str | None) -> None:
        self.scored = Frozen(path)  # the same model, as a table

    def check(self, initial: ModelSpec | str, settings: Scoring) -> None:
        self.scored.check(initial, settings)

    def prepare(
        self, initial: ModelSpec | str, policy: PreTrainedModel, pairs: dict[str, Sequence[Pair]], settings: Scoring
    ) -> Reference:
        alone = self.scored.path is not None or not lora.layers(policy)
        device = distributed.device_of(policy)
        model = models.load(self.scored.spec(initial), device)[0].requires_grad_(False) if alone else policy
        weights, where = models.fingerprint(model), "beside the policy" if alone else "without its adapters"
        held, same = f"{self.scored.name()} {where}, weights {weights[:12]}", weights == models.fingerprint(policy)
        return LiveModel(held, model, weights, self.scored.path, same)


class EMA:
    """A reference that follows the policy: every `every` optimizer steps, alpha * policy + (1 - alpha) * itself
    (TR-DPO, 2404.09656). alpha: in (0, 1]; 1 copies the policy.
    """

    gives = ("tails", "kl")

    def __init__(self, alpha: float, every: int) -> None:
        if not 0 < alpha <= 1:
            raise ValueError(f"reference.alpha must be in (0, 1], got {alpha}; 1 copies the policy")
        if every < 1:
            raise ValueError(f"reference.every must be at least 1 optimizer step, got {every}")
        self.alpha, self.every = alpha, every

    def check(self, initial: ModelSpec | str, settings: Scoring) -> None:
        pass

    def prepare(
        self, initial: ModelSpec | str, policy: PreTrainedModel, pairs: dict[str, Sequence[Pair]], settings: Scoring
    ) -> Reference:
        model, _ = models.load(initial, distributed.device_of(policy))
        weights = models.fingerprint(policy)
        return MovingAverage(model.requires_grad_(False).eval(), weights, self.alpha, self.every)


def _scored(row: dict[str, Any]) -> tuple[Preference, list[float]]:
    """A pair and the log-probs of its two responses."""
    if "mismatched" in row:  # a response with a label, and one to another prompt
        names = {"completion": "chosen", "mismatched": "rejected"}
        row = {name.replace(side := name.partition("_")[0], names.get(side, side)): row[name] for name in row}
    logps = [row.get(name) for name in ("chosen_logprob", "rejected_logprob")]
    if not all(isinstance(logp, int | float) and math.isfinite(logp) for logp in logps):
        raise ValueError(f"must have finite chosen_logprob and rejected_logprob, found {logps}")
    return preference(row), [float(logp) for logp in logps if logp is not None]


def _contents(pair: Preference) -> tuple[str, str]:
    """What a log-prob belongs to: the texts, whether an end token follows, and the ids if they were sampled."""
    ids = pair.token_ids
    chosen, rejected = ([], []) if ids is None else ([[ids.tokenizer, some]] for some in (ids.chosen, ids.rejected))
    return digest([pair.prompt, pair.chosen, pair.chosen_ended, *chosen]), digest(
        [pair.prompt, pair.rejected, pair.rejected_ended, *rejected]
    )
