"""Which settings make a run another one, and which values are none: tables by hand, not asked of the code."""

import hashlib
import json
from typing import Any

import pytest
from test_config import config

from dpo.sweep.identity import flatten, identity, identity_keys
from dpo.sweep.schema import faults

DECIDE = {  # settings that make a run of dpo.train another one
    *("seed", "beta", "lr", "batch_size", "max_length", "max_new_tokens", "on_too_long", "epochs", "steps"),
    *("optimizer", "adam_betas", "weight_decay", "schedule", "warmup_steps", "max_grad_norm", "precision", "keep"),
    *("loss._target_", "loss._partial_", "loss.beta", "loss.label_smoothing", "reference._target_"),
    *("data._target_", "data.summaries", "data.demonstrations", "data.train", "data.validation", "data.test"),
    *("data.seed", "judge._target_", "judge._partial_", "engine._target_", "engine._partial_"),
    *("policy.path", "policy.base", "policy.lr", "policy.max_length", "policy.max_new_tokens"),
    *("policy.chat_template", "policy.date", "policy.trust_remote_code"),
    *("sft.batch_size", "sft.lr", "sft.epochs", "sft.steps", "sft.schedule", "sft.warmup_steps"),
    *("generation.samples_per_prompt", "generation.temperature", "generation.top_p", "generation.pairs_per_prompt"),
    *("evaluation.prompts", "evaluation.temperature", "command"),
    *("evaluation.judge", "evaluation.baseline", "pairs.off_policy", "pairs.gap", "pairs.label_temperature"),
    *("pairs.flip", "pairs.outliers", "pairs.outlier"),
}
NOT_OF_SFT = {"beta", "lr", "batch_size", "epochs", "steps", "schedule", "warmup_steps", "keep"}
NOT_OF_SFT |= {"evaluation.judge", "evaluation.baseline"}
DO_NOT = {  # those that do not
    *("name", "runs", "cache", "wandb.mode", "wandb.project", "wandb.entity", "device", "processes", "threads"),
    *("micro_batch_tokens", "packed", "activation_checkpointing", "sharding.group", "sharding.offload"),
    *("evaluate_every", "evaluate_prompts", "checkpoint_every", "checkpoints_kept"),
    *("generation.batch_size", "evaluation.batch_size", "scorer"),
    *("evaluation.log_samples", "evaluation.instructions", "policy.micro_batch_tokens", "policy.generation_batch_size"),
}
SWITCHED = {  # those that do where the first is given
    "policy.lora.rank": ("policy.lora.rank", "policy.lora.alpha", "policy.lora.targets"),
    "policy.lora.quantize": ("policy.lora.quantize",),
    "policy.adapter": ("policy.adapter",),
    "rule": ("rule",),
    "evaluation.rule": ("evaluation.rule",),
    "evaluation.engine": ("evaluation.engine",),
}


def test_the_settings_that_make_a_run_another_one():
    train, sft, score = (config(command=command) for command in ("train", "sft", "score"))
    assert set(identity_keys(train)) == DECIDE
    off = {key for keys in SWITCHED.values() for key in keys}
    assert set(flatten(train)) - DECIDE - off == DO_NOT
    for switch, keys in SWITCHED.items():
        on = flatten(train) | {switch: 4}
        assert set(identity_keys(on)) == DECIDE | {*keys}
        assert {identity(on), identity(train)} == {identity(on | {"name": "x"}), identity(flatten(train))}
        for key in keys:
            assert identity(on | {key: 7}) != identity(on), key
        for key in keys[1:]:
            assert identity(flatten(train) | {key: 7}) == identity(train), key
    groups = ("loss.", "reference.", "engine.", "generation.", "pairs.")
    assert set(identity_keys(sft)) == {key for key in DECIDE - NOT_OF_SFT if not key.startswith(groups)}
    trained = {
        "beta",
        "lr",
        "loss.beta",
        "policy.lr",
        "epochs",
        "steps",
        "schedule",
        "warmup_steps",
        "keep",
        "batch_size",
    }
    measured = {key for key in DECIDE if key.startswith("evaluation.")}
    assert set(identity_keys(score)) == DECIDE - trained - measured | {"per_token"}
    of_loss = {key for key in DECIDE if key.startswith(("loss.", "reference."))}
    made = {key for key in DECIDE if key.startswith(("sft.", "generation.", "pairs."))}
    made |= {"optimizer", "adam_betas", "weight_decay", "max_grad_norm"}
    judged = {key for key in DECIDE if key.startswith(("judge.", "pairs."))} | {"generation.pairs_per_prompt"}
    for verb, own, unread in (
        ("generate", set(), trained | of_loss | measured | judged),
        ("judge", {"candidates"}, trained | of_loss | measured),
        ("evaluate", {"against", "best_of"}, trained | of_loss | made),
        (
            "show",
            {"against", "of"},
            trained | of_loss | made | judged | {"evaluation.judge", "evaluation.baseline"},
        ),
    ):
        assert set(identity_keys(config(command=verb))) == DECIDE - unread | own, verb
    for key, value in flatten(train).items():
        if key in off:
            continue
        other = changed(train, key, 7 if value is None else f"{value}?")
        assert (identity(other) != identity(train)) == (key in DECIDE), key
    for group in ("judge", "evaluation.judge", "engine"):  # where a server is, and what is kept beside it
        one, other = (config(*servers(group, url)) for url in ("http://a", "http://b"))
        assert identity(one) == identity(other)
        model = "served" if group == "engine" else "model"
        assert identity(changed(one, f"{group}.{model}", "m")) != identity(one)
    recorded = {"id": "0", "choices": {"loss": "ipo"}, "provenance": {"commit": "0", "inputs": {"data": "0"}}}
    assert identity(train | recorded | {"figure": None, "table": None, "hydra": {"a": 1}}) == identity(train)


def servers(group, url):
    if group == "engine":
        return ["engine=endpoint", f"engine.server.url={url}", f"cache={url[-1]}"]
    return [
        f"judge{'' if group == 'judge' else '@' + group}=questions",
        f"{group}.server.url={url}",
        f"cache={url[-1]}",
    ]


@pytest.mark.parametrize(
    "command,overrides,known",
    [
        ("train", (), "689c4f9609d62caa"),
        ("sft", (), "2d35fdf4d4835f8b"),
        ("score", (), "5458d870f5503ce7"),
        ("train", ("beta=0.3", "policy=pretrained", "policy.path=x"), "557be3022332b8f6"),
        ("train", ("policy.lora.rank=8",), "a7ae3d77de313a62"),
        ("train", ("data=hh", "policy.path=x"), "bebfee5f737f0de7"),
        ("train", ("policy.lora.rank=null", "policy.lora.alpha=8", "policy.lora.targets=[x]"), "689c4f9609d62caa"),
    ],
)
def test_runs_are_those_of_before_there_was_more(command, overrides, known):
    assert identity(config(*overrides, command=command)) == known


def test_identities_do_not_move():
    """Runs that are on disk are found again: of every setting the name, its value, and nothing else."""
    told = {"beta": 0.1, "steps": None, "lr": 1.0, "betas": [0.9, 1.0], "sft": {"lr": 1e-3}, "name": "x", "clip": 1e999}
    canonical = '[["beta",0.1],["betas",[0.9,1]],["clip","inf"],["lr",1],["sft.lr",0.001],["steps",null]]'
    assert identity(told) == hashlib.sha256(canonical.encode()).hexdigest()[:16] == "abc5cc35252d068a"
    for key, value in {"beta": 0.2, "steps": 0, "lr": 2, "betas": [1, 0.9], "clip": 1, "sft": {"lr": 2e-3}}.items():
        assert identity(told | {key: value}) != identity(told), key


ABOVE_ZERO = {  # 0 is refused
    *("beta", "lr", "sft.lr", "batch_size", "sft.batch_size", "micro_batch_tokens", "max_length", "max_grad_norm"),
    *("epochs", "sft.epochs", "sft.steps", "processes", "threads", "checkpoints_kept", "max_new_tokens"),
    *("generation.samples_per_prompt", "generation.temperature", "generation.top_p", "generation.pairs_per_prompt"),
    *("generation.batch_size", "evaluation.prompts", "evaluation.batch_size", "policy.lora.rank", "policy.lora.alpha"),
    *("data.demonstrations", "data.train", "data.validation", "data.test"),
}
FROM_ZERO = {  # 0 is taken, and nothing below
    *("seed", "steps", "weight_decay", "warmup_steps", "sft.warmup_steps", "evaluate_every", "checkpoint_every"),
    *("evaluation.log_samples", "evaluation.temperature", "evaluate_prompts"),
    *("pairs.label_temperature", "pairs.flip", "pairs.outliers"),
}
BESIDE = {"data.seed", "loss.label_smoothing", "sharding.group"}  # the option's own to refuse, or said in other words
TWICE = {"loss.beta", "policy.lr", "policy.max_length", "policy.max_new_tokens"}  # said of the key that decides
UNUSED = {"policy.micro_batch_tokens", "policy.generation_batch_size"}  # defaults of what is checked


def changed(base: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {**base, first: changed(base[first], rest, value) if rest else value}


def test_the_least_value_of_every_number(base):
    base = base | {"processes": 1}
    numbers = {
        key for key, value in flatten(base).items() if isinstance(value, int | float) and not isinstance(value, bool)
    }
    assert numbers == ABOVE_ZERO | FROM_ZERO | BESIDE | TWICE | UNUSED
    for key in sorted(ABOVE_ZERO | FROM_ZERO):
        for value in (-1, 0, 1):
            refused = any(
                said.startswith((f"{key} must be above 0", f"{key} must be at least 0"))
                for said in faults(changed(base, key, value))
            )
            assert refused == (value < 0 or (value == 0 and key in ABOVE_ZERO)), (key, value)


@pytest.fixture(scope="module")
def base() -> dict[str, Any]:
    return config("processes=4", "sft.steps=3", "steps=3", "threads=1", "sharding.group=1", "policy.lora.rank=4")


@pytest.mark.parametrize(
    "key,taken,refused",
    [
        ("warmup_steps", [0.5, 1, 2, 1.0], [1.5]),
        ("generation.top_p", [0.1, 1.0], [1.01]),
        ("data.validation_fraction", [0.01, 0.99], [0, 1, 1.5, -0.1]),
        ("adam_betas", [[0, 0], [0.9, 0.999]], [[0.9, 1.0], [1.0, 0.9], [-0.1, 0.9], [0.9, 0.9, 0.9]]),
        ("max_new_tokens", [1, 127], [128, 129]),
        ("batch_size", [4, 5], [3, 1]),
        ("sharding.group", [1, 2, 4, None], [0, 3, 8, -2]),
        ("beta", [1e-12, 1e12, 1], [9e-13, 1.1e12, -1]),
        ("policy.date", ["2024-02-29", None], ["2023-02-29", "29.2.2024"]),
        ("policy.base", ["world"], [None]),
        ("policy.path", ["somewhere", None], []),
        ("pairs.gap", [None, "low", "high", 0, 0.4, 1], ["both", -0.1, 1.1, True]),
        ("policy.lora.targets", ["all-linear", ["q_proj"]], ["q_proj", [], [""], None, [3]]),
        ("policy.adapter", [None], ["somewhere"]),
        ("pairs.flip", [0, 0.4, 1], [-0.1, 1.1]),
        ("pairs.outliers", [0, 0.4, 1], [-0.1, 1.1]),
        ("name", ["a", "a/b", "é" * 100, "a b"], ["", " ", ".", "..", "a/", "/a", "a/../b", "é" * 101, "a\x7f"]),
        ("cache", ["a", "/tmp/x"], ["", "a\0"]),
    ],
)
def test_where_values_end(key, taken, refused, base):
    for value in taken:
        assert faults(changed(base, key, value)) == [], value
    for value in refused:
        problems = faults(changed(base, key, value))
        assert problems, value
        assert all(key in said for said in problems), (value, problems)


def test_every_word_is_one_of_its_choices(base):
    choices: dict[str, tuple[Any, ...]] = {
        "optimizer": ("adamw", "adamw_8bit", "rmsprop"),
        "schedule": ("constant", "linear", "cosine"),
        "sft.schedule": ("constant", "linear", "cosine"),
        "on_too_long": ("error", "drop", "truncate"),
        "precision": ("fp32", "bf16"),
        "device": ("auto", "cpu", "cuda"),
        "keep": ("last", "best"),
        "wandb.mode": ("auto", "online", "offline", "disabled"),
        "pairs.outlier": ("another", "shuffled"),
        "policy.lora.quantize": (None, "nf4", "nf4_double"),
    }
    base = changed(base, "processes", 1)  # adamw_8bit and 4 bits take no more
    for key, words in choices.items():
        assert [faults(changed(base, key, word)) for word in words] == [[]] * len(words), key
        named = ", ".join(word or "null" for word in words)
        assert faults(changed(base, key, "other")) == [f"{key} must be one of {named}, got other"]


def test_one_default_in_two_places_is_set_in_both():
    """The key decides; its home in a group shows the value in force."""
    own = config("loss.beta=0.3", "policy.lr=0.25", "policy.max_length=99", "policy.max_new_tokens=9")
    assert (own["beta"], own["lr"], own["max_length"], own["max_new_tokens"]) == (0.3, 0.25, 99, 9)
    given = config("beta=0.3", "lr=0.25", "max_length=99", "max_new_tokens=9")
    assert given == own
    sft = config("max_length=99", "max_new_tokens=9", command="sft")
    assert (sft["policy"]["max_length"], sft["policy"]["max_new_tokens"]) == (99, 9)
    assert json.loads(json.dumps(sft)) == sft
