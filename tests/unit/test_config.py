"""Every option composes and fits its function; what cannot be run is refused with the reason; identity."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
from composing import compose
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo.sweep.identity import ALIASES, flatten, identity
from dpo.sweep.plan import resolve
from dpo.sweep.schema import OPEN_GROUPS, Sft, Train, check, faults

CONF = Path(__file__).parents[2] / "conf"


def config(*overrides: str, command: str = "train") -> dict[str, Any]:
    return resolve(compose(command, *overrides))


def problems(*overrides: str, command: str = "train") -> str:
    with pytest.raises(ValueError) as error:
        check(config(*overrides, command=command))
    return str(error.value)


@pytest.mark.parametrize("key", ["judge", "engine"])
def test_a_page_with_a_word_in_the_place_of_a_function_is_told(key):
    values = config("processes=2")  # which asks whether it is a pool
    values["evaluation"][key] = "gold"
    with pytest.raises(ValueError, match=f"evaluation.{key} must name its function in _target_, found 'gold'"):
        check(values)


def test_a_missing_optimizer_is_told_ahead(monkeypatch):
    check(config("optimizer=adamw_8bit"))
    monkeypatch.setattr("dpo.sweep.schema.find_spec", lambda name: None)
    assert "optimizer=adamw_8bit needs bitsandbytes; pip install" in problems("optimizer=adamw_8bit")


def options() -> list[tuple[str, str]]:
    groups = [*OPEN_GROUPS, "policy"]
    return [(group, file.stem) for group in groups for file in sorted((CONF / group).glob("*.yaml"))]


@pytest.mark.parametrize("command", ["train", "sft"])
def test_defaults_pass(command):
    check(config(command=command))


@pytest.mark.parametrize("group,option", options())
def test_every_option_passes(group, option):
    given = [f"{group}={option}"]
    page = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{option}.yaml"))
    asked = 0.4 if group == "loss" else "[somewhere]" if option == "mixture" else "somewhere"
    given += [f"{group}.{key}={asked}" for key, value in page.items() if value == "???"]
    check(config(*given, *([] if "policy.path=somewhere" in given else ["policy.path=somewhere"])))


@pytest.mark.parametrize("schema,command", [(Train, "train"), (Sft, "sft")])
def test_every_key_is_typed_and_has_a_value(schema, command):
    page = OmegaConf.load(CONF / f"{command}.yaml")
    groups = {"policy", *OPEN_GROUPS} & set(schema.__annotations__)
    assert set(page) - {"defaults", "hydra"} | groups == set(schema.__annotations__)


def test_both_pages_have_one_sft_recipe():
    assert OmegaConf.load(CONF / "train.yaml").sft == OmegaConf.load(CONF / "sft.yaml").sft


@pytest.mark.parametrize(
    "overrides,said",
    [
        (["beta=0"], "beta must be above 0"),
        (["beta=-0.1"], "beta must be above 0"),
        (["beta=nan"], "beta must be a number of size 1e-12 to 1e+12, got nan"),
        (["beta=inf"], "beta must be a number of size"),
        (["lr=0"], "lr must be above 0"),
        (["batch_size=0"], "batch_size must be above 0"),
        (["processes=0"], "processes must be above 0"),
        (["threads=0"], "threads must be above 0"),
        (["warmup_steps=-1"], "warmup_steps must be at least 0"),
        (["warmup_steps=1.5"], "warmup_steps must be a whole number of steps, or a share of them below 1, got 1.5"),
        (["sft.warmup_steps=2.5"], "sft.warmup_steps must be a whole number"),
        (["keep=first"], "keep must be one of last, best, got first"),
        (["adam_betas=[0.9,1.0]"], "adam_betas must be two numbers"),
        (["adam_betas=[0.9]"], "adam_betas must be two numbers"),
        (["optimizer=sgd"], "optimizer must be one of adamw, adamw_8bit, rmsprop, got sgd"),
        (["schedule=step"], "schedule must be one of"),
        (["sft.schedule=step"], "sft.schedule must be one of"),
        (["precision=fp16"], "precision must be one of"),
        (["device=tpu"], "device must be one of"),
        (["wandb.mode=maybe"], "wandb.mode must be one of"),
        (["on_too_long=ignore"], "on_too_long must be one of"),
        (["generation.top_p=1.5"], "generation.top_p must be in (0, 1]"),
        (["max_length=40"], "max_new_tokens must be below max_length"),
        (["processes=17"], "batch_size must be at least 1 for each of 17 processes, got 16; try processes=16"),
        (["micro_batch_tokens=0"], "micro_batch_tokens must be above 0"),
        (["processes=4", "sharding.group=3"], "sharding.group must divide the 4 processes, got 3; null is all of them"),
        (["sharding.offload=true"], "sharding.offload needs several processes, got 1"),
        (["optimizer=adamw_8bit", "processes=2"], "optimizer=adamw_8bit needs processes=1, got 2"),
        (["policy.lora.quantize=nf4"], "got nf4 and policy.lora.rank=null; set policy.lora.rank"),
        (["policy.lora.rank=8", "policy.lora.quantize=int4"], "must be one of null, nf4, nf4_double, got int4"),
        (["policy=pretrained"], "add policy.path="),
        (["engine@evaluation.engine=endpoint"], "evaluation.engine must not be endpoint in a run that trains"),
        (["+loss.gama=1"], "loss.gama is not an option of dpo.losses.dpo, which has beta, label_smoothing"),
        (["~loss.label_smoothing"], "loss.label_smoothing must be given"),
        (["loss.label_smoothing=much"], "loss.label_smoothing must be float, got 'much'"),
        (["loss._target_=dpo.losses.dop"], "loss._target_ must name a function, got dpo.losses.dop"),
        (["reference=ema", "reference.every=1.5"], "reference.every must be int, got 1.5"),
        (["reference=other"], "reference.path must be given"),
        (["data.train=true"], "data.train must be int, got True"),
        (["data.summaries=foo"], "data.summaries must be one of human, clean, alien, alien_clean, got 'foo'"),
        (["data.train=-3"], "data.train must be above 0, got -3"),
        (["data.test=0"], "data.test must be above 0"),
        (
            ["data=file", "data.path=somewhere", "data.on_faulty=foo"],
            "data.on_faulty must be one of error, drop, keep, got 'foo'",
        ),
        (["data=hh", "data.on_faulty=foo"], "data.on_faulty must be one of error, drop, keep, got 'foo'"),
        (["policy.date=yesterday"], "policy.date must be a day such as 2024-07-26, got yesterday"),
        (
            ["data=ultrafeedback", "data.validation_fraction=2"],
            "data.validation_fraction must be between 0 and 1, got 2",
        ),
        (["beta=-1", "lr=-1"], "beta must be above 0, got -1.0"),
    ],
)
def test_refused(overrides, said):
    assert said in problems(*overrides)


def test_all_problems_are_said_at_once():
    assert len(problems("beta=-1", "optimizer=sgd", "batch_size=1", "processes=2").splitlines()) == 3


def test_sft_divides_its_own_batch():
    assert "sft.batch_size must be at least 1 for each" in problems("processes=33", command="sft")
    check(config("processes=33", "batch_size=33"))  # inside dpo.train a process may have no demonstration of a step


def test_sft_needs_a_base():
    said = problems("policy=pretrained", "policy.path=somewhere", command="sft")
    assert "policy.base, a model to make a policy from, must be given" in said


@pytest.mark.parametrize(
    "override", ["beta=weak", "seed=1.5", "batch_size=2.5", "packed=maybe", "bta=0.1", "loss=dop", "loss.gama=1"]
)
def test_hydra_refuses_types_and_unknown_keys(override):
    with pytest.raises((ConfigCompositionException, OmegaConfBaseException), match=r"."):
        config(override)


def test_data_of_ones_own_brings_its_policy_and_judge():
    own = config("data=file", "data.path=x.jsonl", "policy.path=/some/folder")
    check(own)
    assert own["judge"] is None
    assert own["policy"]["path"] == "/some/folder"
    assert own["lr"] < 1e-5  # that of policy=pretrained


def test_the_command_line_wins_over_what_data_brings():
    own = config("data=file", "data.path=x.jsonl", "judge=shorter", "policy=tiny")
    assert own["judge"]["_target_"] == "dpo.judges.shorter"
    assert own["policy"]["base"] == "world"


def test_no_number_is_beyond_arithmetic():
    """Neither NaN nor infinite, denormal or huge, whichever key it is; infinity may say that nothing is clipped."""
    base = config()
    for key, value in flatten(base).items():
        if isinstance(value, bool) or not isinstance(value, float | int) or ALIASES.get(key) in base:
            continue
        for odd in (math.nan, math.inf, 1e-320, 1e30) if isinstance(value, float) else (10**13,):
            changed: dict[str, Any] = copy.deepcopy(base)
            node = changed
            for part in key.split(".")[:-1]:
                node = node[part]
            node[key.split(".")[-1]] = odd
            refused = any(f"{key} must be a number of size" in said for said in faults(changed))
            assert refused != (key == "max_grad_norm" and odd == math.inf), (key, odd)


@pytest.mark.parametrize(
    "override,said",
    [
        ("+key=1", "key is not a key of this command"),
        ("++key=1", "key is not a key of this command"),
        ("+batch_sise=1", "batch_sise is not a key of this command; did you mean batch_size?"),
        ("+sft.foo=1", "sft.foo is not a key"),
        ("+policy.foo=1", "policy.foo is not a key"),
        ("+loss.foo=1", "loss.foo is not an option"),
        ("~lr", "lr must be given"),
        ("~adam_betas", "adam_betas must be given"),
        ("loss.beta=[1]", "beta must be float, got [1]"),
        (
            "command=foo",
            "command must be one of data, evaluate, generate, judge, rounds, score, sft, show, train, got",
        ),
        ("command=score", "per_token must be given"),
        ("adam_betas=[0.9,nan]", "adam_betas must be a number of size"),
        ("loss.label_smoothing=nan", "loss.label_smoothing must be a number of size"),
        ("data.train=1e13", "data.train must be a number of size"),
        ("name=''", "name must be a path without control characters, and not empty"),
        ("runs=' '", "runs must be a path"),
        ('name="a\\tb"', "name must be a path without control characters"),
        ("policy.path=''", "policy.path must not be empty"),
        ("evaluation.baseline=''", "evaluation.baseline must not be empty"),
        (f"cache={__file__}/x", "cache must be a folder, or where one can be made, got"),
        ("cache='~/x'", "cache must be written out, ~ is not expanded here"),
        (f"runs={__file__}", "runs must be a folder, or where one can be made, got"),
        ("name=../x", "name must name a folder inside of runs=runs"),
        ("name=/tmp/x", "name must name a folder inside of runs"),
        ("name=.", "name must name a folder inside of runs"),
        ("name=a//b", "name must name a folder inside of runs"),
        ("name=a/..", "name must name a folder inside of runs"),
        (f"name='{'é' * 101}'", "name must have at most 200 bytes"),
    ],
)
def test_what_is_no_config_of_the_command(override, said):
    assert said in problems(override.replace("\\t", "\t"))


def test_names_may_nest_but_not_inside_of_a_run(tmp_path):
    check(config("name=a/b", f"runs={tmp_path}"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.yaml").touch()
    assert "name must not lie inside of a run" in problems("name=a/b", f"runs={tmp_path}")


@pytest.mark.parametrize("written", ["0.1", "0.10", "1e-1", "1.0e-1"])
def test_one_value_is_one_identity(written):
    assert identity(config(f"beta={written}")) == identity(config("beta=0.1"))


def test_the_home_of_a_default_is_no_second_setting():
    assert identity(config("loss.beta=0.3")) == identity(config("beta=0.3")) != identity(config("beta=0.4"))
    assert config("beta=0.3")["loss"]["beta"] == 0.3
    assert set(ALIASES) <= set(flatten(config()))


def test_what_is_evaluated_decides_where_it_is_selected():
    best = ["keep=best"]
    assert identity(config(*best, "evaluate_every=7")) != identity(config(*best))
    assert identity(config(*best, "evaluation.log_samples=2")) == identity(config(*best))


def test_identity_allows_infinity():
    assert identity(config("max_grad_norm=inf")) != identity(config())
    assert math.isinf(config("max_grad_norm=inf")["max_grad_norm"])


def test_open_groups_take_whole_numbers_for_floats():
    check(config("loss.label_smoothing=0"))
    assert identity(config("loss.label_smoothing=0")) == identity(config("loss.label_smoothing=0.0"))


@pytest.mark.parametrize("command,given", [("sft", "y"), ("rounds", "y"), ("train", "null"), ("score", "null")])
def test_an_adapter_needs_its_base(command, given):
    said = problems("policy.adapter=x", f"policy.path={given}", command=command)
    path = None if given == "null" else given
    assert said.startswith("policy.adapter needs the model that it is of, policy.path, and a command other than sft")
    advice = "give policy.path" if path is None else "merge it with peft"
    assert f"got path {path} of {command}; {advice}" in said
    check(config("policy.adapter=x", "policy.path=y", command="train" if command in ("sft", "rounds") else command))


def test_a_reference_that_scores_no_odd_pairs_is_the_one_of_before():
    """So runs of before there was such an option are found again."""
    given = "reference=other_tokenizer", "reference.path=x"
    before = config(*given)
    del before["reference"]["by_text"]
    assert identity(before) == identity(config(*given)) != identity(config(*given, "reference.by_text=true"))


@pytest.mark.parametrize("key", ["config", "split", "validation_split", "columns", "prompt", "chat"])
def test_options_of_data_that_are_off_are_no_part_of_a_run(key):
    """So runs of before there were such options are found again."""
    given = "data=hh" if key == "chat" else "data=file", "data.path=x", "policy.path=x"
    before = config(*given)
    del before["data"][key]
    assert identity(before) == identity(config(*given))
    on = {"columns": "{prompt: question}", "chat": "true"}.get(key, "implicit")
    assert identity(config(*given, f"data.{key}={on}")) != identity(before)


def test_a_server_answers_for_a_policy_that_is_there():
    """A run without steps, and an evaluation, have the policy that the server was started with."""
    served = "engine@evaluation.engine=endpoint"
    check(config(served, "evaluation.engine.served=m", "steps=0"))
    check(config(served, "evaluation.engine.served=m", command="evaluate"))
