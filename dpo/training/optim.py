"""Optimizer and learning-rate schedule."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    batch_size: int  # items per optimizer step, of all processes
    lr: float
    epochs: int
    steps: int | None  # optimizer steps; None: those of the epochs
    schedule: str
    warmup_steps: float
    optimizer: str
    adam_betas: Sequence[float]
    weight_decay: float
    max_grad_norm: float


def optimizer(model: nn.Module, name: str, lr: float, betas: Sequence[float], weight_decay: float) -> Optimizer:
    """AdamW (decoupled weight decay), the same with its moments in 8 bits (2110.02861, bitsandbytes; weights of fewer
    than 4,096 numbers keep theirs in float32), or RMSprop (L2; no betas), over all trainable weights.

    These must be float32: in bfloat16 an AdamW step at learning rate 5e-7 is rounded away.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    other_dtypes = {p.dtype for p in parameters} - {torch.float32}
    if other_dtypes or not parameters:
        raise ValueError(
            f"all trainable weights must be float32, found {sorted(map(str, other_dtypes)) or 'none to train'}; "
            "load the model in float32 and use precision=bf16 for the matrix products"
        )
    if name == "adamw":
        beta1, beta2 = betas
        return torch.optim.AdamW(parameters, lr=lr, betas=(beta1, beta2), weight_decay=weight_decay, fused=True)
    if name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit  # a plan has looked for it

        beta1, beta2 = betas
        found: Optimizer = AdamW8bit(parameters, lr=lr, betas=(beta1, beta2), weight_decay=weight_decay)
        return found
    if name == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=lr, weight_decay=weight_decay)
    raise ValueError(f"optimizer must be adamw, adamw_8bit or rmsprop, got {name}")


def schedule(optimizer: Optimizer, name: str, warmup_steps: float, steps: int) -> LambdaLR:
    """`warmup_steps` optimizer steps of linear warm-up, then constant, or linear or cosine down to 0.

    No step is wasted: the first has a rate above 0, and 0 is reached only after the last of `steps`.
    warmup_steps: a whole number, or below 1 a share of `steps`, rounded to whole steps.
    """
    if name not in ("constant", "linear", "cosine"):
        raise ValueError(f"schedule must be constant, linear or cosine, got {name}")

    warmup = round(warmup_steps * steps) if warmup_steps < 1 else int(warmup_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        }[name]

    return LambdaLR(optimizer, factor)
