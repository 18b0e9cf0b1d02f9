"""A judge that is a reward model: a sequence classifier with one output."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dpo.data.records import Text
from dpo.policy.folder import on_hub
from dpo.training.log import progress


class RewardModel:
    """`score` of a response: the output of a `transformers` sequence classifier of one label, in fp32, on rank 0.

    Prompt and response are read as a chat through the tokenizer's template (a plain prompt is a user's turn), or as a
    pair of texts where it has none. One at a time: with padding such a classifier may read another token than the last.

    path: folder or hub name, of safetensors. max_length: tokens; a longer one is not judged.
    Raises: ValueError if there is no such model, or it has several outputs.
    """

    def __init__(self, path: str | None, max_length: int) -> None:
        if not path:
            raise ValueError("judge.path must name a reward model, a folder or hub name, got none; add judge.path=...")
        self.source, self.max_length = str(Path(path).expanduser()), max_length
        if path.startswith((".", "/", "~")) and not Path(self.source).is_dir():
            raise ValueError(f"judge.path must name a reward model, found no folder at {path}; check the path")

    def forward(self, prompts: Sequence[Text], responses: Sequence[str]) -> list[dict[str, float]]:
        return [said for _, said in self.each(prompts, responses)]

    __call__ = forward

    def each(self, prompts: Sequence[Text], responses: Sequence[str]) -> Iterator[tuple[int, dict[str, float]]]:
        both = zip(prompts, responses, strict=True)
        for place, (prompt, response) in enumerate(progress([*both], total=len(prompts), name="judged responses")):
            yield place, self._judgement(prompt, response)

    def handshake(self) -> None:
        """Load the model, before a run begins. Raises: ValueError as above."""
        assert self._loaded

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        name, revision = on_hub(self.source)
        read: Any = AutoModelForSequenceClassification.from_pretrained
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **revision)
            model, report = read(name, **revision, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
        except Exception as error:  # whatever a config can make of a model's code
            raise ValueError(
                f"judge.path must name a reward model, found none to load in {self.source}: {error}"
            ) from error
        if model.config.num_labels != 1 or report["missing_keys"]:
            found = f"{model.config.num_labels} outputs" if model.config.num_labels != 1 else "no weights of the output"
            raise ValueError(
                f"judge.path must name a classifier with one output, a reward, found {found} in {self.source}"
            )
        model.config.get_text_config().pad_token_id = None  # the last token is read, whatever it is
        return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer

    @torch.no_grad()
    def _judgement(self, prompt: Text, response: str) -> dict[str, float]:
        model, tokenizer = self._loaded
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            chat = [*turns, {"role": "assistant", "content": response}]
            fed = tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")
        elif isinstance(prompt, str):
            fed = tokenizer(prompt, response, return_tensors="pt")
        else:
            raise ValueError(f"{self.source} must have a chat template to judge chats, found none")
        if fed["input_ids"].shape[1] > self.max_length:
            return {}
        return {"score": model(**fed.to(model.device)).logits.float().item()}
