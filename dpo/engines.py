"""Where candidate responses come from.

An engine is a function `(model, tokenizer, prompts, sampling, seed, title) -> responses`, which all processes of a run
call: prompts are token ids, and a response keeps its own. The same arguments give the same responses. One that samples
in another program reads the weights from `model.name_or_path`, on rank 0 alone (`dpo.training.distributed.on_main`).
"""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo.policy.sampling import Sample, Sampling, sample


def transformers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    seed: int,
    title: str,
) -> list[Sample]:
    """The model as it is loaded, in this process."""
    return sample(model, tokenizer, prompts, sampling, seed, title)
