"""What training costs before it begins: arithmetic and memory, as estimates from a model's config."""

import os
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from dpo.policy.logps import TILE

FLOAT = 4  # bytes: weights, gradients and moments are float32
COPIES = {"adamw": 4, "rmsprop": 3}  # of each trained weight: itself, its gradient, the optimizer's moments


@dataclass(frozen=True)
class Cost:
    """Of one process. Sharded over several, weights and their copies are divided among them."""

    parameters: int  # all of the model
    trained: int  # of them, or of adapters beside them
    flops: float  # of all steps and of the reference
    weights: int  # bytes: weights, gradients and the optimizer's moments; those of a reference that stays in memory
    activations: int  # bytes, roughly: see `cost`


def cost(
    model: PreTrainedModel,
    trained: int | None,
    steps_tokens: float,
    reference_tokens: float,
    micro_batch_tokens: int,
    optimizer: str,
    precision: str,
    checkpointing: bool,
    held: bool,
) -> Cost:
    """model: on the meta device. trained: weights of adapters, which are trained in place of the model's; None: all.
    steps_tokens, reference_tokens: how many the policy is trained on, and how many a reference scores. held: the
    reference is a second model in memory.

    A token costs 6 operations for each weight that multiplies: 2 in the forward pass, 4 in the backward, of which 2 are
    for the gradients of weights, which adapters do without; activation checkpointing adds 2, and a reference's pass is
    2. Attention scores are not counted. A layer keeps about 10 widths and 4 feed-forward widths for each token, and
    the head two tiles of logits.
    """
    config = model.config.get_text_config()
    total = sum(weight.numel() for weight in model.parameters())
    embeddings = 0 if config.tie_word_embeddings else int(cast(Any, model.get_input_embeddings()).weight.numel())
    each = 6 + 2 * checkpointing - 2 * (trained is not None)
    flops = (total - embeddings) * (each * steps_tokens + 2.0 * reference_tokens)
    of_trained = total if trained is None else trained
    weights = FLOAT * (COPIES[optimizer] * of_trained + (trained is not None) * total + held * total)
    width, layers = config.hidden_size, config.num_hidden_layers
    feed_forward = getattr(config, "intermediate_size", None) or 4 * width
    of_layer = 10 * width + 4 * feed_forward
    kept = width * layers + of_layer if checkpointing else of_layer * layers
    size = 2 if precision == "bf16" else FLOAT
    logits = 2 * FLOAT * min(TILE, micro_batch_tokens * config.vocab_size)
    return Cost(total, of_trained, flops, weights, kept * micro_batch_tokens * size + logits)


def memory_of(device: torch.device) -> int:
    """Bytes that a device has in all."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
