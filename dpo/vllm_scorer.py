"""Reference log-probs by vLLM, as `scorer=ray` has them by actors."""

from collections.abc import Callable, Iterator, Sequence
from math import inf
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dpo.data.batches import Tokens
from dpo.engines import LlmOptions, Vllm, closing
from dpo.policy import model as models
from dpo.policy.model import ModelSpec
from dpo.policy.pool import anywhere, each_kept
from dpo.policy.scoring import Passes, Scoring

DTYPES: dict[str, Literal["float32", "bfloat16"]] = {"fp32": "float32", "bf16": "bfloat16"}  # by precision


class VllmScorer:
    """vLLM, which this run starts with the reference's weights, and ends: it reads each sequence as a prompt.

    Within rounding its log-probs are those of the run itself, and kept as those are; no row is given away before a few
    were compared. batch_size: sequences that it is handed, and kept, at once. cache, llm: as of `dpo.engines.Vllm`;
    what it has room for goes by the longest sequence.

    Raises: ValueError if vLLM is not installed, or the options are none that could work.
    """

    said, without = "vLLM", "scorer=vllm"  # for messages

    def __init__(self, batch_size: int, cache: str, llm: LlmOptions) -> None:
        if batch_size < 1:
            raise ValueError(f"scorer.batch_size must be at least 1, got {batch_size}")
        self.batch_size, self.cache, self.llm = batch_size, cache, llm
        self._vllm("fp32", 2)

    def _vllm(self, precision: str, longest: int) -> "_Vllm":
        options: Any = {**self.llm, "max_model_len": longest + 1}  # one token is the least that it draws
        return _Vllm(DTYPES[precision], inf, self.cache, options)  # the reference itself compares log-probs

    def check(self) -> None:
        """Only vLLM itself can tell what else it takes."""

    def passes(
        self,
        which: ModelSpec,
        weights: str,
        packed: bool,
        settings: Scoring,
        name: str,
        first: Sequence[bytes],
        sources: dict[bytes, str],
        found: Callable[[bytes, Tensor], None],
    ) -> Passes:
        """See `dpo.policy.pool.Pool.passes`."""

        def run(contents: Sequence[bytes], sequences: Sequence[Tokens], folder: Path) -> list[Tensor]:
            turn = {content: number for number, content in reversed([*enumerate(first)])}
            order = sorted(range(len(sequences)), key=lambda row: turn[contents[row]])
            passes = [
                [[row] for row in order[begin : begin + self.batch_size]]
                for begin in range(0, len(order), self.batch_size)
            ]

            def made(left: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
                if not left:
                    return
                model, tokenizer = models.load(anywhere(which))
                if (read := models.fingerprint(model)) != weights:
                    raise RuntimeError(f"{which.path} must hold the weights {weights[:12]}, found {read[:12]}")
                longest = max(len(prompt) + len(response) for prompt, response in sequences)
                with closing(self._vllm(settings.precision, longest)) as vllm:
                    for place in left:
                        some = [sequences[row] for [row] in passes[place]]
                        yield place, torch.cat(vllm.logps(model, tokenizer, some))

            return each_kept(passes, "vllm", contents, sequences, folder, name, found, made)

        return run


class _Vllm(Vllm):
    group, otherwise = "scorer", "set scorer.llm to what it takes here, or leave out scorer=vllm"
