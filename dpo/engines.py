"""Where candidate responses come from.

An engine is a function `(model, tokenizer, prompts, places, sampling, seed, title) -> responses`, which all processes
of a run call: prompts are token ids, and a response keeps its own. What is drawn for a prompt goes by the seed and its
place, not by what else is asked for. One that samples in another program does so on rank 0 alone
(`dpo.training.distributed.on_main`). title: of a progress bar.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo.cache import digest, remember_each
from dpo.data.batches import collate_responses
from dpo.data.chats import ends
from dpo.endpoint import Refused, Server, ServerOptions
from dpo.policy import model as models
from dpo.policy.logps import token_logps
from dpo.policy.sampling import Sample, Sampling, cut, sample
from dpo.training.distributed import device_of, on_main

TRIED = 16  # tokens of the responses of a handshake
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

    Each response is asked for by itself, with a seed that its prompt, the run's seed and its place decide, and kept in
    the folder `cache` when it comes. First a handshake: the server must draw other tokens for another seed, the same
    for the same, and give each the log-prob that the model gives it, within `tolerance` nats in the mean.

    served: the name under which the server has the weights.
    Raises: ValueError if the options are none that could work. RuntimeError if the server is not as above.
    """

    def __init__(self, served: str | None, tolerance: float, cache: str, server: ServerOptions) -> None:
        if tolerance <= 0:
            raise ValueError(f"engine.tolerance must be above 0, got {tolerance}")
        self.tolerance, self.cache = tolerance, cache
        self.server = Server(served, server, "engine", "served")

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
        drawn, scored = on_main(lambda: self._tried(prompts[0], stops))
        self._check_weights(model, prompts[0], drawn, scored)
        asked = {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p}

        def answer(questions: list[Any]) -> Iterator[tuple[int, Tokens]]:
            one = partial(self._respond, asked=asked, stops=stops)
            return self.server.each(one, [(ids, seed_of(seed, place)) for ids, place in questions], title)

        key = {"weights": weights, "seed": seed, **asked, "stops": stops}
        questions = [[ids, place] for ids, place in zip(prompts, places, strict=True)]
        found = on_main(lambda: remember_each(self.cache, "responses", key, questions, answer))
        return [cut(ids, row, stops, tokenizer) for ids, row in zip(prompts, found, strict=True)]

    __call__ = forward

    def _respond(self, question: tuple[Tokens, int], asked: dict[str, Any], stops: Sequence[int]) -> Tokens:
        ids, seed = question
        return self._complete(ids, seed, asked, stops)[0]

    def _tried(self, prompt: Tokens, stops: Sequence[int]) -> tuple[Tokens, Logps]:
        """A response to a prompt, and its log-probs, from a server that samples as it is asked to."""
        asked = {"max_tokens": TRIED, "temperature": 1.0, "top_p": 1.0}
        here = f"the server at {self.server.options['url']}"
        try:
            first, *others = [self._complete(prompt, seed, asked, stops) for seed in (0, 0, 1, 2, 3)]
        except Refused as error:
            raise RuntimeError(f"{here} must complete token ids (vllm serve does): {error}") from None
        if others[0][0] != first[0]:
            raise RuntimeError(f"{here} must give the same tokens for the same seed, found others; take one that does")
        if all(other[0] == first[0] for other in others[1:]):
            raise RuntimeError(
                f"{here} must draw at temperature 1, found the same {len(first[0])} tokens for four seeds: it ignores "
                "temperature or seed (transformers serve does); take vllm serve, or engine=transformers"
            )
        return first

    def _check_weights(self, model: PreTrainedModel, prompt: Tokens, drawn: Tokens, scored: Logps) -> None:
        with torch.no_grad():
            batch = collate_responses([(prompt, [drawn])], packed=False).to(device_of(model))
            ours = token_logps(model, batch).tolist()
        apart = sum(abs(one - other) for one, other in zip(ours, scored, strict=True)) / len(drawn)
        if not apart <= self.tolerance:
            raise RuntimeError(
                f"the server at {self.server.options['url']} must hold the weights of {model.name_or_path}, found "
                f"log-probs that differ from its by {apart:.3g} nats a token, in {len(drawn)} tokens; serve that "
                "folder, or raise engine.tolerance if it rounds more"
            )

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


def seed_of(seed: int, place: int) -> int:
    """Which random numbers a response is drawn with: those of a run's seed and of its place among the prompts."""
    return int(digest([seed, place])[:7], 16)
