"""What of a config decides the numbers of a run: its keys, flat, and an identity made of them."""

import math
from functools import cache
from typing import Any

from dpo.cache import digest

# The home of a default -> the key that decides. A frozen config shows the value in force at both.
ALIASES = {"loss.beta": "beta"} | {f"policy.{key}": key for key in ("lr", "max_length", "max_new_tokens")}

# Groups of keys that are no part of a run's identity where the key that switches them on is null or false.
SWITCHES = {"policy.lora.quantize": "policy.lora.quantize", "policy.lora.": "policy.lora.rank"}  # the first that fits
SINGLE = ("policy.adapter", "rule", "evaluation.rule", "evaluation.engine", "reference.by_text")
SWITCHES |= {key: key for key in SINGLE}
OF_DATA = ("config", "split", "validation_split", "columns", "prompt", "chat")
SWITCHES |= {f"data.{key}": f"data.{key}" for key in OF_DATA}

# What a command does not read, of the keys that it has in common with `dpo.train`: no part of its runs' identities, so
# that the grid of a sweep has one run of each that differ, and none is named by what decides nothing there.
_OF_LOSS = "beta", "loss.beta", "lr", "policy.lr", "epochs", "steps", "schedule", "warmup_steps", "keep", "batch_size"
_OF_TRAINING = *_OF_LOSS, "loss", "reference"
_OF_MEASURED = (
    *(*_OF_TRAINING, "sft", "optimizer", "adam_betas", "weight_decay", "max_grad_norm"),
    *("generation", "pairs"),
)
UNREAD = {
    "generate": (*_OF_TRAINING, "evaluation", "judge", "rule", "pairs", "generation.pairs_per_prompt"),
    "judge": (*_OF_TRAINING, "evaluation"),
    "score": (*_OF_LOSS, "evaluation"),
    "evaluate": _OF_MEASURED,
    "show": (*_OF_MEASURED, "judge", "rule", "evaluation.judge", "evaluation.rule", "evaluation.baseline"),
}

RECORDED = ("id", "choices", "provenance")  # added when the config is frozen, and by nobody else

# What cannot change a number: these keys are no part of a run's identity or name.
NON_NUMERIC = (
    *("name", "runs", "cache", "wandb", "device", "processes", "threads", "micro_batch_tokens", "packed"),
    *("activation_checkpointing", "sharding", "evaluate_every", "evaluate_prompts", "checkpoint_every"),
    *("checkpoints_kept", "evaluation.log_samples", "evaluation.instructions"),
    *("generation.batch_size", "evaluation.batch_size", "scorer"),
    *(f"{group}.{key}" for group in ("judge", "evaluation.judge") for key in ("server", "cache", "pool")),
    *(f"{group}.{key}" for group in ("engine", "evaluation.engine") for key in ("server", "cache", "llm", "pool")),
    *("policy.micro_batch_tokens", "policy.generation_batch_size"),  # of keys that are listed
    *("figure", "table"),  # an experiment is what its keys say
    *RECORDED,
    "hydra",
)


def identity(config: dict[str, Any]) -> str:
    """16 hex digits over all keys of a resolved config that can change a number."""
    return digest(sorted((key, _canonical(value)) for key, value in identity_keys(config).items()))[:16]


def identity_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a resolved config that make its identity, flat: "sft.lr" -> 1e-3."""
    flat = flatten(config)
    return {key: value for key, value in flat.items() if not non_numeric(key, flat)}


def labelled(config: dict[str, Any]) -> dict[str, Any]:
    """A config as names and tables show it: with a digest of a chat template in the place of its text."""
    policy = config.get("policy")
    if not isinstance(policy, dict) or not (text := policy.get("chat_template")):
        return config
    return {**config, "policy": {**policy, "chat_template": digest(text)[:8]}}


def non_numeric(key: str, config: dict[str, Any] | None = None) -> bool:
    """Whether a key is outside a run's identity: it cannot change a number (of `config`, which may select a step)."""
    if key == "evaluate_every" and config and config.get("keep", "last") != "last":
        return False  # what is evaluated can be selected
    if config and any(below(key, one) for one in UNREAD.get(config.get("command", ""), ())):
        return True
    switch = next((one for group, one in SWITCHES.items() if key.startswith(group)), None)
    if config and switch in config and (config[switch] is None or config[switch] is False):
        return True
    return _outside(key)


def in_name(key: str, config: dict[str, Any]) -> bool:
    """Whether a run's directory may be named by a key: one that makes its identity, or switches such keys off."""
    return key in SWITCHES.values() or not non_numeric(key, config)


@cache
def _outside(key: str) -> bool:
    return any(below(key, other) for other in NON_NUMERIC)


def below(key: str, other: str) -> bool:
    """Whether a key is another one, or lies in it."""
    return key == other or key.startswith(f"{other}.")


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"sft": {"lr": 1e-3}} -> {"sft.lr": 1e-3}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _canonical(value: Any) -> Any:
    """1.0 and 1 are one value: open groups take whichever was written. JSON has no infinity."""
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value
