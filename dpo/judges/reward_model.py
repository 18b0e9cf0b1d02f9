"""A judge that is a reward model: a sequence classifier with one output."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from dpo.data.records import Text
from dpo.policy.folder import on_hub
from dpo.policy.model import fingerprint
from dpo.policy.pool import Pool, PoolOptions
from dpo.training.distributed import here
from dpo.training.log import progress


class RewardModel:
    """`score` of a response: the output of a `transformers` sequence classifier of one label, in fp32, on rank 0.

    Prompt and response are read as a chat through the tokenizer's template (a plain prompt is a user's turn), or as a
    pair of texts where it has none. One at a time: with padding such a classifier may read another token than the last.

    path: folder or hub name, of safetensors. max_length: tokens; a longer one is not judged. pool: of Ray actors that
    judge in place of this process, to the same bits on the same kind of device.
    Raises: ValueError if there is no such model, it has several outputs, or the pool could not start. RuntimeError if
    actors end at some response.
    """

    def __init__(self, path: str | None, max_length: int, pool: PoolOptions | None) -> None:
        if not path:
            raise ValueError("judge.path must name a reward model, a folder or hub name, got none; add judge.path=...")
        on_hub(path)
        folder, self.judging = Path(path).expanduser(), Judging(max_length)
        self.source = str(folder.resolve() if folder.is_dir() else folder)  # actors work in another folder
        if path.startswith((".", "/", "~")) and not folder.is_dir():
            raise ValueError(f"judge.path must name a reward model, found no folder at {path}; check the path")
        self.pool = None if pool is None else _Judges(**pool)
        self._weights: str | None = None  # that actors must load

    def forward(self, prompts: Sequence[Text], responses: Sequence[str]) -> list[dict[str, float]]:
        return [said for _, said in self.each(prompts, responses)]

    __call__ = forward

    def each(self, prompts: Sequence[Text], responses: Sequence[str]) -> Iterator[tuple[int, dict[str, float]]]:
        both = [*zip(prompts, responses, strict=True)]
        answers: Iterator[tuple[int, bytes]]
        if self.pool is None:
            answers = ((place, self.judging(*self._loaded, one)) for place, one in enumerate(both))
        else:
            load = partial(load_classifier, self.source)
            answers = self.pool.stream(dict(enumerate(both)), self.judging, load, self._weights, partial(_named, both))
        try:
            for place, said in progress(answers, total=len(both), name="judged responses"):
                yield place, json.loads(said)
        finally:
            if self.pool is not None:
                self.pool.close()

    def handshake(self) -> None:
        """Load the model, before a run begins; for a pool to see which one it is. Raises: ValueError as above."""
        if self.pool is None:
            _ = self._loaded
        else:
            self.pool.check()
            self._weights = fingerprint(load_classifier(self.source, "cpu")[0])

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return load_classifier(self.source, str(here()))


def load_classifier(source: str, device: str) -> tuple[Any, Any]:
    """The model and its tokenizer. Raises: ValueError if it is no reward model."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    name, revision = on_hub(source)
    read: Any = AutoModelForSequenceClassification.from_pretrained
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **revision)
        model, report = read(name, **revision, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # whatever a config can make of a model's code
        raise ValueError(f"judge.path must name a reward model, found none to load in {source}: {error}") from error
    if model.config.num_labels != 1 or report["missing_keys"]:
        found = f"{model.config.num_labels} outputs" if model.config.num_labels != 1 else "no weights of the output"
        raise ValueError(f"judge.path must name a classifier with one output, a reward, found {found} in {source}")
    model.config.get_text_config().pad_token_id = None  # the last token is read, whatever it is
    return model.eval().to(device), tokenizer


@dataclass(frozen=True)
class Judging:
    """What is made of a prompt with its response, here or by an actor: the judgement, as JSON."""

    max_length: int

    @torch.no_grad()
    def __call__(self, model: Any, tokenizer: Any, share: Sequence[Any]) -> bytes:
        prompt, response = share
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            chat = [*turns, {"role": "assistant", "content": response}]
            fed = tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")
        elif isinstance(prompt, str):
            fed = tokenizer(prompt, response, return_tensors="pt")
        else:
            raise ValueError(f"{model.name_or_path} must have a chat template to judge chats, found none")
        if fed["input_ids"].shape[1] > self.max_length:
            return b"{}"
        return json.dumps({"score": model(**fed.to(model.device)).logits.float().item()}).encode()

    @staticmethod
    def alone(share: Any) -> list[Any]:
        return []


def _named(both: Sequence[tuple[Text, str]], place: int) -> list[str]:
    prompt, response = both[place]
    return [f"{response[:100]!r}, a response to {str(prompt)[:100]!r}"]


class _Judges(Pool):
    group, actors, without = "judge.pool", "judging actors", "judge=reward_model_ray"
    advice = "What was judged is kept. Give an actor more memory, lower judge.max_length, or leave out the response"
