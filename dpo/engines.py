"""Where responses come from: candidates of pairs, and those of evaluations.

An engine is a function `(model, tokenizer, prompts, places, sampling, seed, title) -> responses`, which all processes
of a run call: prompts are token ids, and a response keeps its own. What is drawn for a prompt goes by the seed and its
place, not by what else is asked for. One that samples in another program does so on rank 0 alone
(`dpo.training.distributed.on_main`). title: of a progress bar. One that holds something has a method `close`; one
that works on many batches at once a method `each`, which gives them as they come; one that can tell whether it could
start, before a model is loaded, a method `check`, and one that asks a server whether it answers, before a policy is
trained, a method `handshake`.
"""

import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import TypedDict

from dpo.cache import digest, remember_each
from dpo.data.batches import collate_responses
from dpo.data.chats import ends
from dpo.endpoint import Refused, Server, ServerOptions
from dpo.losses.pairs import unbound
from dpo.policy import model as models
from dpo.policy.logps import token_logps
from dpo.policy.model import ModelSpec
from dpo.policy.pool import Draw, Pool, PoolOptions, anywhere
from dpo.policy.sampling import Sample, Sampling, cut, in_batches, sample
from dpo.training.distributed import device_of, is_main, is_sharded, on_main
from dpo.training.log import progress

logger = logging.getLogger(__name__)
TRIED = 16  # tokens of the responses of a handshake
NARROW = 1e-4  # top_p that leaves the likeliest token, and those as likely
Tokens = list[int]
Logps = list[float]


def transformers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    places: Sequence[int],
    sampling: Sampling,
    seed: int,
    title: str,
) -> list[Sample]:
    """The model as it is loaded, in this process."""
    return sample(model, tokenizer, prompts, sampling, seed, title, places)


class Endpoint:
    """A server that holds the policy's weights and speaks OpenAI's protocol with token ids, as vLLM's does.

    Each response is asked for by itself (so no `n` is sent), with a seed that the run's seed and its place decide, and
    kept in the folder `cache` when it comes. At first the server must draw other tokens for another seed, the same for
    the same, no others at temperature 0, others at a tiny top_p where that is below 1, and give each the log-prob that
    the model gives it, within `tolerance` nats in the mean.

    served: the name under which the server has the weights.
    Raises: ValueError if the options are none that could work. RuntimeError if the server is not as above.
    """

    def __init__(self, served: str | None, tolerance: float, cache: str, server: ServerOptions) -> None:
        if tolerance <= 0:
            raise ValueError(f"engine.tolerance must be above 0, got {tolerance}")
        if server["url"] is None:
            raise ValueError("engine.server.url must be that of the server that has the weights, got null")
        self.tolerance, self.cache = tolerance, cache
        self.server = Server(served, server, "engine", "served")
        self._weights: str | None = None  # that it has

    def forward(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[list[int]],
        places: Sequence[int],
        sampling: Sampling,
        seed: int,
        title: str,
    ) -> list[Sample]:
        stops = ends(tokenizer, model.generation_config)
        weights = models.fingerprint(model)
        biased = {} if (bias := _against_spare_rows(model, tokenizer)) is None else {"logit_bias": bias}
        asked: dict[str, Any] = {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
        asked |= {"top_p": sampling.top_p, **biased}
        if weights != self._weights:
            self._check_weights(model, prompts[0], stops, asked)
            self._weights = weights

        def answer(questions: list[Any]) -> Iterator[tuple[int, Tokens]]:
            one = partial(self._respond, asked=asked, stops=stops)
            return self.server.each(one, [(ids, seed_of(seed, place)) for ids, place in questions], title)

        key = {"weights": weights, "seed": seed, **asked, "stops": stops}
        questions = [[ids, place] for ids, place in zip(prompts, places, strict=True)]
        found = on_main(lambda: remember_each(self.cache, "responses", key, questions, answer))
        return [cut(ids, row, stops, tokenizer) for ids, row in zip(prompts, found, strict=True)]

    __call__ = forward

    def handshake(self) -> None:
        """Have the server draw a token of whatever it holds. Raises: RuntimeError if it does not."""
        create = self.server.client.completions.create
        try:
            self.server.asked("completion", lambda body: body.choices[0], create, prompt=[0], max_tokens=1)
        except RuntimeError as error:
            advice = "no policy is trained before it answers: python -m dpo.sft makes one to serve, for policy.path"
            raise RuntimeError(f"{error}; {advice}") from None

    def close(self) -> None:
        """Say what was paid: who samples in parts shows a progress bar of its own, without it."""
        if self.server.bill.requests:
            logger.info(f"{self.server.model}: {self.server.bill.said(self.server.options['prices'])}")

    def _respond(self, question: tuple[Tokens, int], asked: dict[str, Any], stops: Sequence[int]) -> Tokens:
        ids, seed = question
        try:
            return self._complete(ids, seed, asked, stops)[0]
        except Refused as error:
            raise RuntimeError(
                f"{error}; of a prompt of {len(ids)} tokens and {asked['max_tokens']} to draw. What came is kept: "
                "serve the policy with room for max_length tokens, or lower that"
            ) from None

    def _check_weights(
        self, model: PreTrainedModel, prompt: Tokens, stops: Sequence[int], asked: dict[str, Any]
    ) -> None:
        drawn, scored = on_main(lambda: self._tried(prompt, stops, asked))
        if not (apart := _apart(model, prompt, drawn, scored)) <= self.tolerance:
            raise RuntimeError(
                f"the server at {self.server.options['url']} must hold the weights of {model.name_or_path}, found "
                f"log-probs that differ from its by {apart:.3g} nats a token, in {len(drawn)} tokens; serve that "
                "folder, or raise engine.tolerance if it rounds more"
            )

    def _tried(self, prompt: Tokens, stops: Sequence[int], asked: dict[str, Any]) -> tuple[Tokens, Logps]:
        """A response to a prompt, and its log-probs, from a server that samples as it is asked to."""
        narrow = asked["top_p"] < 1
        asked = {**asked, "max_tokens": TRIED, "temperature": 1.0, "top_p": 1.0}
        here = f"the server at {self.server.options['url']}"
        try:
            first, *others = [self._complete(prompt, seed, asked, stops) for seed in (0, 0, 1, 2, 3)]
            greedy = [self._complete(prompt, seed, {**asked, "temperature": 0.0}, stops)[0] for seed in (0, 1)]
        except Refused as error:
            raise RuntimeError(f"{here} must complete token ids (vllm serve does): {error}") from None
        if others[0][0] != first[0]:
            raise RuntimeError(f"{here} must give the same tokens for the same seed, found others; take one that does")
        if all(other[0] == first[0] for other in others[1:]):
            raise RuntimeError(
                f"{here} must draw at temperature 1, found the same {len(first[0])} tokens for four seeds: it ignores "
                "temperature or seed (transformers serve does); take vllm serve, or engine=transformers"
            )
        if greedy[0] != greedy[1]:
            raise RuntimeError(
                f"{here} must draw the likeliest tokens at temperature 0, found others for another seed: it ignores "
                "temperature; take vllm serve, or engine=transformers"
            )
        drawn = [first[0], *(other[0] for other in others[1:])]  # by seed
        seed = next(seed for seed, tokens in enumerate(drawn) if tokens != greedy[0])
        if narrow and self._complete(prompt, seed, {**asked, "top_p": NARROW}, stops)[0] == drawn[seed]:
            raise RuntimeError(
                f"{here} must draw the likeliest tokens at top_p={NARROW}, found those of top_p=1: it ignores it; set "
                "generation.top_p=1, or take vllm serve or engine=transformers"
            )
        return first

    def _complete(self, prompt: Tokens, seed: int, asked: dict[str, Any], stops: Sequence[int]) -> tuple[Tokens, Logps]:
        def read(body: Any) -> tuple[Tokens, Logps]:
            [choice] = body.choices
            tokens, logps = choice.token_ids, choice.logprobs.token_logprobs
            if choice.finish_reason == "stop" and (not tokens or tokens[-1] not in stops):
                raise TypeError("found a response that ended without the token that ends it")
            if not tokens or len(tokens) != len(logps) or not all(map(math.isfinite, logps)):
                raise TypeError(f"found {len(tokens)} token ids and {len(logps)} log-probs")
            return list(tokens), list(logps)

        return self.server.asked(
            "completion with token_ids and logprobs",
            read,
            self.server.client.completions.create,
            prompt=prompt,
            seed=seed,
            logprobs=1,
            **asked,
            extra_body={"return_token_ids": True, "stop_token_ids": [*stops]},
        )


class Ray:
    """A pool of Ray actors that each hold the model: the batches that `transformers` draws in this process, shared out.

    They read the weights from a copy in the folder `cache`, so these may be of any policy in memory. A batch is
    the same whichever actor draws it, and is given as it comes. One process of a run, which drives them.

    Raises: ValueError if the options are none that could work. RuntimeError if actors end at some response.
    """

    def __init__(self, cache: str, trust_remote_code: bool, pool: PoolOptions) -> None:
        self.pool, self.cache, self.trusts = _Drawers(**pool), cache, trust_remote_code
        self._weights: str | None = None  # of the copy
        self._copy: Path | None = None

    def forward(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[list[int]],
        places: Sequence[int],
        sampling: Sampling,
        seed: int,
        title: str,
    ) -> list[Sample]:
        found: dict[int, Sample] = {}
        with progress(total=len(prompts), name=title) as bar:
            for rows, samples in self.each(model, tokenizer, prompts, places, sampling, seed):
                found.update(zip(rows, samples, strict=True))
                bar.update(len(rows))
        return [found[row] for row in range(len(prompts))]

    __call__ = forward

    def each(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[list[int]],
        places: Sequence[int],
        sampling: Sampling,
        seed: int,
    ) -> Iterator[tuple[list[int], list[Sample]]]:
        """Rows of prompts with their responses, batch by batch, as they come."""
        batches = in_batches(prompts, sampling.batch_size)
        asked = {number: [[prompts[row], places[row]] for row in rows] for number, rows in enumerate(batches)}

        def named(number: int) -> list[str]:
            texts = [(row, tokenizer.decode(prompts[row])) for row in batches[number]]
            return [f"response {places[row]}, to {text[:100]!r}" for row, text in texts]

        load = partial(models.load, self._copied(model, tokenizer))
        for number, said in self.pool.stream(asked, Draw(sampling, seed), load, None, named):
            rows = batches[number]
            yield rows, [Sample(prompts[row], *one) for row, one in zip(rows, json.loads(said), strict=True)]

    def check(self) -> None:
        """Refuse a pool that could not start. Raises: ValueError."""
        self.pool.check()

    def close(self) -> None:
        """End the actors, and delete the copy."""
        if self._copy is not None:
            self.pool.close()
            shutil.rmtree(self._copy, ignore_errors=True)
        self._copy = self._weights = None

    def _copied(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ModelSpec:
        if (weights := models.fingerprint(model)) != self._weights or self._copy is None:
            self.close()
            self._copy = _folder(self.cache, "ray-")
            models.save(model, tokenizer, self._copy / "policy")
            self._weights = weights
        return anywhere(ModelSpec(str(self._copy / "policy"), self.trusts))


class _Drawers(Pool):
    group, actors, without = "engine.pool", "sampling actors", "engine=ray"
    advice = "Give an actor more memory, lower generation.batch_size or evaluation.batch_size, or leave out the prompt"


class LlmOptions(TypedDict):
    """What vLLM is started with, which only rounding tells: `conf/engine/vllm.yaml` says what each means."""

    gpu_memory_utilization: float
    tensor_parallel_size: int
    enforce_eager: bool
    enable_chunked_prefill: bool
    trust_remote_code: bool


class EngineOptions(LlmOptions):
    """The same, of one that draws responses."""

    max_model_len: int


class Vllm:
    """vLLM, started by this run with the weights that it has loaded, and ended by `close`.

    Each response is drawn with a seed that the run's seed and its place decide. At the start vLLM must give its tokens
    the log-probs that the model gives them, within `tolerance` nats in the mean. It reads the weights from a copy in
    the folder `cache`, so they may be of any policy in memory: merged with an adapter, sharded, trained a moment ago.

    dtype: in which vLLM computes. llm: what `vllm.LLM` is given.
    Raises: ValueError if vLLM is not installed, or the options are none that could work. RuntimeError if vLLM cannot
    serve the model, or its log-probs are others.
    """

    group, otherwise = "engine", "set engine.llm and engine.dtype to what it takes here, or take engine=transformers"

    def __init__(
        self, dtype: Literal["float32", "bfloat16", "float16"], tolerance: float, cache: str, llm: EngineOptions
    ) -> None:
        if find_spec("vllm") is None:
            raise ValueError(f"{self.group}=vllm needs the package vllm, found none; pip install -e '.[vllm]'")
        if tolerance <= 0:
            raise ValueError(f"engine.tolerance must be above 0, got {tolerance}")
        if not 0 < (share := llm["gpu_memory_utilization"]) <= 1:
            raise ValueError(f"{self.group}.llm.gpu_memory_utilization must be above 0 and at most 1, got {share}")
        for key in ("max_model_len", "tensor_parallel_size"):
            if (value := llm[key]) < 1:
                raise ValueError(f"{self.group}.llm.{key} must be at least 1, got {value}")
        self.dtype, self.tolerance, self.cache, self.options = dtype, tolerance, cache, llm
        self._llm: Any = None  # on rank 0
        self._weights: str | None = None  # that it has

    def forward(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[list[int]],
        places: Sequence[int],
        sampling: Sampling,
        seed: int,
        title: str,
    ) -> list[Sample]:
        room = self.options["max_model_len"]
        if (length := max(map(len, prompts)) + sampling.max_new_tokens) > room:
            raise ValueError(
                f"engine.llm.max_model_len must hold prompt and response, {length} tokens, got {room}; raise it"
            )
        stops = ends(tokenizer, model.generation_config)
        asked: dict[str, Any] = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop_token_ids": stops,
            "ignore_eos": True,  # but as one of these
            "logit_bias": _against_spare_rows(model, tokenizer),
            "detokenize": False,
        }
        if (weights := models.fingerprint(model)) != self._weights:
            self.close()
            self._start(model, tokenizer)
            self._check_weights(model, prompts[0], asked)
            self._weights = weights
        questions = [(ids, seed_of(seed, place)) for ids, place in zip(prompts, places, strict=True)]
        asks = partial(self._generate, model, questions, asked, title)
        found = on_main(lambda: [list(one.outputs[0].token_ids) for one in asks()])
        return [cut(ids, row, stops, tokenizer) for ids, row in zip(prompts, found, strict=True)]

    __call__ = forward

    def close(self) -> None:
        """End vLLM, which gives its memory back."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown(timeout=60)
        self._llm = self._weights = None

    def _start(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the weights, and start vLLM with them. A collective."""
        torch.cuda.empty_cache()  # what this process keeps to use again is memory that vLLM finds taken
        folder = on_main(lambda: _folder(self.cache, "vllm-"))
        try:
            if is_main() or is_sharded(model):
                models.save(model, tokenizer, folder / "policy")
            on_main(lambda: self._serve(folder / "policy", model))
        finally:
            if is_main():
                shutil.rmtree(folder, ignore_errors=True)

    def _serve(self, folder: Path, model: PreTrainedModel) -> None:
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a fork hangs where torch had threads
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        with _without_torchrun(), self._serving(model):
            from vllm import LLM

            self._llm = LLM(model=str(folder), dtype=self.dtype, generation_config="vllm", **self.options)

    @contextmanager
    def _serving(self, model: PreTrainedModel) -> Iterator[None]:
        """What vLLM and its processes raise, at the start or, of some models, with the first token, is said as ours."""
        try:
            yield
        except Exception as error:
            self.close()
            raise RuntimeError(
                f"vLLM must serve {model.name_or_path}, a {type(model).__name__}, found {type(error).__name__}: {error}"
                f"; {self.otherwise}"
            ) from error

    def _check_weights(self, model: PreTrainedModel, prompt: Tokens, asked: dict[str, Any]) -> None:
        room = self.options["max_model_len"] - len(prompt)
        asked = {**asked, "max_tokens": min(TRIED, room), "temperature": 1.0, "top_p": 1.0, "logprobs": 0}

        def tried() -> tuple[Tokens, Logps]:
            [one] = self._generate(model, [(prompt, 0)], asked, "")
            one = one.outputs[0]
            ids = list(one.token_ids)
            return ids, [given[token].logprob for token, given in zip(ids, one.logprobs, strict=True)]

        ids, logps = on_main(tried)
        if not (apart := _apart(model, prompt, ids, logps)) <= self.tolerance:
            self.close()
            raise RuntimeError(
                f"vLLM must compute the log-probs of {model.name_or_path}, found some that differ by {apart:.3g} nats "
                f"a token, in {len(ids)} tokens; set engine.dtype=float32, raise engine.tolerance if it only rounds "
                "more, or take engine=transformers"
            )

    def _generate(
        self, model: PreTrainedModel, questions: Sequence[tuple[Tokens, int]], asked: dict[str, Any], title: str
    ) -> list[Any]:
        """What vLLM gives for each prompt and seed, in order."""
        from vllm import SamplingParams

        with self._serving(model):
            found: list[Any] = self._llm.generate(
                [{"prompt_token_ids": ids} for ids, _ in questions],
                [SamplingParams(seed=seed, **asked) for _, seed in questions],
                use_tqdm=(lambda total, **_: progress(total=total, name=title)) if title else False,
            )
        return found

    def logps(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sequences: Sequence[tuple[Tokens, Tokens]]
    ) -> list[torch.Tensor]:
        """Log-probs of the tokens of each response under the model that it was first given, as it reads a prompt.

        sequences: prompts with their responses. Returns: (tokens,) float32 each.
        """
        if self._llm is None:
            self._start(model, tokenizer)
        asked = {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}  # one token is the least it draws
        read = [([*prompt, *response], 0) for prompt, response in sequences]
        found = []
        for (prompt, response), one in zip(sequences, self._generate(model, read, asked, ""), strict=True):
            given = one.prompt_logprobs[len(prompt) :]
            found.append(torch.tensor([at[token].logprob for at, token in zip(given, response, strict=True)]))
        return found


def _folder(cache: str, prefix: str) -> Path:
    """A new folder for a copy of weights, in the cache: where there is room for them."""
    Path(cache).mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=cache))


@contextmanager
def _without_torchrun() -> Iterator[None]:
    """What torchrun says of this run's processes is not said to those that are started here."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    said = {name: value for name, value in os.environ.items() if name in ours or name.startswith("TORCHELASTIC_")}
    for name in said:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(said)


@contextmanager
def closing(engine: Any) -> Iterator[Any]:
    """The engine, which lets go in the end what it holds."""
    try:
        yield engine
    finally:
        if close := getattr(unbound(engine), "close", None):
            close()


def _against_spare_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[int, float] | None:
    """What keeps a sampler from the rows of the head that are no token's, as `sample` does; None: there are none."""
    rows = {*range(model.config.get_text_config().vocab_size)} - {*models.vocabulary(tokenizer).tolist()}
    return dict.fromkeys(sorted(rows), -100.0) or None


def _apart(model: PreTrainedModel, prompt: Tokens, drawn: Tokens, scored: Logps) -> float:
    """How far log-probs of a response are from those of the model: the mean distance of a token's, in nats."""
    with torch.no_grad():
        batch = collate_responses([(prompt, [drawn])], packed=False).to(device_of(model))
        ours = token_logps(model, batch).tolist()
    return sum(abs(one - other) for one, other in zip(ours, scored, strict=True)) / len(drawn)


def seed_of(seed: int, place: int) -> int:
    """Which random numbers a response is drawn with: those of a run's seed and of its place among the prompts."""
    return int(digest([seed, place])[:7], 16)
