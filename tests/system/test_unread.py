"""What a command reads of its config, seen by a spy: just that decides what a run of it is."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from composing import compose
from omegaconf import DictConfig, OmegaConf

from dpo.sweep.identity import ALIASES, UNREAD, flatten, identity, identity_keys, non_numeric
from dpo.sweep.plan import resolve

WORLD = [
    *("data.demonstrations=32", "data.train=8", "data.validation=4", "data.test=4", "sft.steps=1", "device=cpu"),
    *("generation.samples_per_prompt=2", "max_new_tokens=4", "evaluation.prompts=2", "threads=1"),
]
MODELS = {"evaluate": ("policy.path", "against"), "show": ("policy.path", "against")}
LOOKED_UP = (
    "judge",
    "reference",
    "evaluation.judge",
    "evaluation.baseline",
)  # for the record of what runs are made from


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    """The policy that all of them start from, in a cache that they share."""
    folder = tmp_path_factory.mktemp("shared")
    run("generate", folder, config("generate", folder / "cache"))
    (policy,) = (folder / "cache").glob("sft/*/policy")
    return policy


def config(verb: str, cache: Path, *overrides: str) -> DictConfig:
    values = resolve(compose(verb, *WORLD, *overrides, f"cache={cache}"))
    return OmegaConf.create({"id": identity(values), **values, "choices": {"reference": "initial"}})


def run(verb: str, directory: Path, settings: DictConfig) -> None:
    importlib.import_module(f"dpo.{verb}").run(settings, directory)


@pytest.mark.parametrize("verb", sorted(UNREAD))
def test_a_run_is_what_its_command_reads(verb, policy, tmp_path, monkeypatch):
    cache = tmp_path / "cache" if verb == "generate" else policy.parents[2]  # nothing is there of what it is to make
    settings = config(verb, cache, *(f"{key}={policy}" for key in MODELS.get(verb, ())))
    values: dict[str, Any] = OmegaConf.to_container(settings)
    read: set[str] = set()
    get = DictConfig._get_impl

    def spied(node: DictConfig, key: str, *more: Any, **named: Any) -> Any:
        read.add(str(node._get_full_key(key)))
        return get(node, key, *more, **named)

    monkeypatch.setattr(DictConfig, "_get_impl", spied)
    run(verb, tmp_path, settings)
    flat = flatten(values)
    decides = identity_keys(values).keys() - {"command", *ALIASES}
    unread = {key for key in decides if key not in read and not any(key.startswith(f"{one}.") for one in read)}
    assert unread == set()
    passed_over = {key for key in flat if non_numeric(key, flat) and not non_numeric(key, flat | {"command": "train"})}
    assert {"beta", "lr", "steps"} <= passed_over
    order = {"batch_size"} if verb == "score" else set()  # that in which a pool scores
    assert {key for key in passed_over & read if not key.startswith(LOOKED_UP)} == order
