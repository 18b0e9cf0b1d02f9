"""References that are asked at each step: a model beside the policy, or the policy without its adapters."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo.data.batches import Batch
from dpo.policy import lora, sharded_io
from dpo.policy.logps import by_sequence, token_logps


class AskedEachStep:
    """Its log-probs are those of its model now, as `dpo.references.Reference` wants them."""

    model: PreTrainedModel

    def logps(self, batch: Batch, split: str) -> Tensor:
        return by_sequence(self.token_logps(batch, split), batch)

    @torch.no_grad()
    def token_logps(self, batch: Batch, split: str) -> Tensor:
        with lora.without(self.model):
            return token_logps(self.model, batch)


@dataclass
class LiveModel(AskedEachStep):
    """One that never moves: what `references.Live` makes."""

    held: str
    model: PreTrainedModel
    fingerprint: str
    kl_target: str | None
    is_initial: bool

    def after_step(self, policy: PreTrainedModel) -> None:
        pass


class MovingAverage(AskedEachStep, nn.Module):
    """One that follows the policy: what `references.EMA` makes. Being a module, it is checkpointed with the policy."""

    kl_target: str | None = None
    fingerprint = ""
    is_initial = True

    def __init__(self, model: PreTrainedModel, weights: str, alpha: float, every: int) -> None:
        super().__init__()
        self.model, self.alpha, self.every = model, alpha, every
        shares = f"{alpha} of the policy and {1 - alpha:g} of itself"
        self.held = f"EMA: starts at the initial policy, weights {weights[:12]}; every {every} steps {shares}"
        self.steps: Tensor  # optimizer steps so far
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def after_step(self, policy: PreTrainedModel) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            mine = dict(self.model.named_parameters())
            for names, theirs in sharded_io.merged(policy):
                if names[0] in mine:
                    mine[names[0]].lerp_(theirs, self.alpha)
