"""What training costs before it begins: arithmetic and memory, estimated from the shapes of a model."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dpo.policy import lora
from dpo.policy.logps import TILE

FLOAT = 4  # bytes: weights, gradients and moments are float32
COPIES = {"adamw": 4.0, "adamw_8bit": 2.5, "rmsprop": 3.0}  # of a trained weight: itself, its gradient, moments
HELD = {None: 4.0, "nf4": 0.5 + 4 / 64, "nf4_double": 0.5 + 1 / 64 + 4 / (64 * 256)}  # of a weight, with its scale
LIBRARIES = 500_000_000  # bytes of a process that has loaded no model


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. Sharded over several, weights are divided among them."""

    libraries: int
    weights: int  # with gradients and the optimizer's moments, and of a reference beside the policy
    activations: int  # kept for the backward pass of a micro-batch, with what that needs beside them
    saving: int  # on a CPU: a checkpoint's copy of weights and moments, and its bytes as they are written

    @property
    def total(self) -> int:
        return self.libraries + self.weights + self.activations + self.saving


def parameters(model: PreTrainedModel) -> int:
    return sum(weight.numel() for weight in model.parameters())


def adapters(model: PreTrainedModel, added: lora.Lora) -> int:
    """Weights of the adapters that are trained. Raises: ValueError as `lora.targets`."""
    layers: list[Any] = [model.get_submodule(name) for name in lora.targets(model, added)]
    return added.rank * sum(sum(layer.weight.shape) for layer in layers)


def forward(model: PreTrainedModel, tokens: float, scored: float) -> float:
    """FLOPs: 2 for each weight that a token is multiplied by, those of the head where a token is scored.

    Attention scores are not counted, and all experts of a mixture are.
    """
    head = model.get_output_embeddings().weight
    read = {id(head)} | {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}  # may be tied
    body = sum(weight.numel() for weight in model.parameters() if id(weight) not in read)
    return 2.0 * (body * tokens + head.numel() * scored)


def memory(
    model: PreTrainedModel,
    adapted: int | None,
    quantize: str | None,
    reference: int,
    beside: bool,
    tokens: int,
    scored: int,
    optimizer: str,
    precision: str,
    checkpointing: bool,
    packed: bool,
    device: str,
) -> Memory:
    """adapted: weights of adapters that are trained in place of the model's; None: all are. quantize: how linear layers
    are held then. reference: weights of another model, beside the policy at each step or while it scores. tokens,
    scored: of the largest micro-batch.

    A layer keeps about 10 widths and 4 feed-forward widths a token, and a backward pass has as much of one layer again;
    the head, two tiles of logits (not packed: those of all tokens) and the gradient of its weights.
    """
    config, total = model.config.get_text_config(), parameters(model)
    names = [] if quantize is None else lora.linear(model)
    linear = sum(model.get_parameter(f"{name}.weight").numel() for name in names)
    trained, frozen = (total, 0) if adapted is None else (adapted, FLOAT * (total - linear) + HELD[quantize] * linear)
    weights = frozen + FLOAT * max(COPIES[optimizer] * trained + beside * reference, trained + reference)
    width, layers, words = config.hidden_size, config.num_hidden_layers, config.vocab_size
    layer = 10 * width + 4 * (getattr(config, "intermediate_size", None) or 4 * width)
    kept = width * layers + 2 * layer if checkpointing else layer * (layers + 1)
    mixed = precision == "bf16"  # halves matrix products, not norms and sums, and has weights in bfloat16, too
    activations = kept * tokens * (2.5 if mixed else FLOAT) + 2 * (total - linear) * mixed
    activations += FLOAT * (2 * min(TILE, scored * words) if packed else tokens * words)
    activations += FLOAT * width * words * (adapted is None)
    saved = 2 * FLOAT * (COPIES[optimizer] - 1) * trained * (device == "cpu")
    return Memory(LIBRARIES, int(weights), int(activations), int(saved))


def memory_of(device: torch.device) -> int:
    """Bytes that a device has in all."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
