"""What the commands read of a config, as the values that the code below them takes."""

from typing import Any

from dpo.policy.model import ModelSpec
from dpo.training.distributed import ParallelLayout


def policy_spec(config: Any, path: str | None = None) -> ModelSpec:
    """The policy that a run starts from, or the model that it is made from; with a path, that one, read likewise."""
    policy = config.policy
    where = path or policy.path or policy.base
    return ModelSpec(where, policy.trust_remote_code, policy.chat_template, policy.date, layout(config))


def layout(config: Any) -> ParallelLayout:
    """How a model lies on the processes of a run: what it says in `sharding`, and its precision."""
    return ParallelLayout(**config.sharding, precision=config.precision)
