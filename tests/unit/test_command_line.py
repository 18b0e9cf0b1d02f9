"""What is typed on a command line is taken, or refused by a sentence of ours: no traceback, no words of a grammar."""

import re
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from composing import compose
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo import HOME
from dpo.__main__ import SWEEPS
from dpo.push import main as push
from dpo.sweep import command_line, launch
from dpo.sweep.command_line import EXPERIMENTS, GROUPS, in_hydras_words, message, no_options
from dpo.sweep.identity import flatten
from dpo.sweep.signature import OF_TRL, OTHERWISE

OF_HYDRA = re.compile(r"Traceback|HYDRA_FULL_ERROR|full_key|mismatched|recognition|viable|hydra\.cc|NoneType|append to")


@pytest.fixture
def planned(monkeypatch, tmp_path) -> list[Sequence[Any]]:
    """What would be planned; nothing is."""
    found: list[Sequence[Any]] = []

    def execute(self: launch.Sweep, composed: Sequence[Any], refused: Sequence[Any]) -> None:
        launch._list(refused) if refused else found.extend(composed)
        sys.exit(int(bool(refused)))

    monkeypatch.setattr(launch.Sweep, "execute", execute)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    monkeypatch.chdir(tmp_path)
    return found


def typed(monkeypatch, capsys, verb: str, *arguments: str) -> str:
    """What a command says to a command line that it must refuse."""
    monkeypatch.setattr(sys, "argv", [verb, *arguments])
    with pytest.raises(SystemExit) as end:
        push() if verb == "push" else launch.command(verb)
    out, err = capsys.readouterr()
    assert end.value.code, out
    text = f"{out}{err}{end.value.code}"
    assert not OF_HYDRA.search(text), text
    return text


@pytest.mark.parametrize(
    "line,said",
    [
        ("train bta=0.1", "bta is not a key of this command; did you mean beta?"),
        ("train BETA=0.1", "did you mean beta?"),
        ("train -m sft.lrr=1,2", "sft.lrr is not a key of this command; did you mean sft.lr?"),
        ("train loss.gamma=1", "loss.gamma is not a key of this command; loss has beta, label_smoothing"),
        ("train loss/beta=1", "did you mean loss.beta?"),
        ("train policy.dtype=bfloat16", "this command; weights are float32, and precision=bf16 is that of products"),
        ("train policy.attn_implementation=sdpa", "this command; attention is that of the shared prefix, see docs/m"),
        ("sft policy.revision=v1", "it stands after a name on the hub: policy.path=name@revision"),
        ("generate prompts=p.jsonl", "are data=prompts data.path=FILE, or with python -m dpo.show of=FILE"),
        ("train max_steps=9", "max_steps is not a key of this command; here it is steps"),
        ("train sft.max_steps=9", "sft.max_steps is not a key of this command; here it is sft.steps"),
        ("sft learning_rate=1", "learning_rate is not a key of this command; here it is sft.lr"),
        ("train ref_model=x", "ref_model is not a key of this command; here it is reference"),
        ("train loss.learning_rate=1", "here it is lr"),
        ("train gradient_accumulation_steps=4", "batch_size is that of a step, and micro_batch_tokens what is in memo"),
        ("train launcher=slurm", "launcher is not a key of this command; --help lists the keys"),
        ("train hydra.launcher.jbs=2", "did you mean hydra.launcher.jobs?"),
        ("sft beta=0.1", "beta is not a key of this command"),
        ("sft steps=2", "steps is not a key of this command; did you mean sft.steps?"),
        ("train policy.rank=8", "policy.rank is not a key of this command; did you mean policy.lora.rank?"),
        ("train temperature=1", "did you mean generation.temperature or evaluation.temperature?"),
        ("sft loss=dpo", "loss is not a key of this command"),
        ("sft evaluation.judge=gold", "evaluation.judge is not a key of this command"),
        ("sft figure=kl_strength", "In 'figure/kl_strength': evaluate_prompts is not a key of this command"),
        ("push rum=x", "rum is not a key of this command; did you mean run?"),
        ("push run=a=b", "is quoted twice: 'run=\"a=b\"'"),
        ("push runs/dev/x user/name", "runs/dev/x must be key=value"),
        ("train loss=dop", "got dop; did you mean dpop?"),
        ("train loss=", "loss must be one of its options, got nothing"),
        ("train loss=[dpo,ipo]", "loss must be one of its options, got [dpo,ipo]"),
        ("train policy=/models/sft", "got /models/sft; a model of yours is policy=pretrained policy.path=..."),
        ("data data=pairs.jsonl", "got pairs.jsonl; data of yours are data=file data.path=..."),
        ("train +beta=0.1", "beta must be given without +"),
        ("train seed=1e3", "seed must be int, got 1000.0"),
        ("train steps=None", "steps must be int | None, got 'None'; none is written null"),
        ("train sft=3", "sft must be a group of keys, got 3"),
        ("train beta=0.1,0.2", "beta=0.1,0.2 must be one value, found several; -m runs each"),
        ("train seed=range(3)", "seed=range(3) must be one value, found several; -m runs each"),
        ("train -m seed=range(3,0)", "seed must have values to sweep, found none"),
        ("train -m beta=glob(*)", "beta must have values to sweep, found none"),
        ("train -m beta=0.1,", "beta=0.1, must be read whole"),
        ("train -m seed=range(3),5", "seed=range(3),5 must be values between commas or one range, found both; write"),
        ("train -m seed=5,interval(0,1)", "seed=5,interval(0,1) must be values between commas or one range, found"),
        ("train max_grad_norm=.inf", "max_grad_norm must be float, got '.inf'; on a command line that is inf"),
        ("train beta=0.1 seed=0 beta=0.2", "beta must be given once, found beta=0.1 and beta=0.2; leave one out"),
        ("train -m beta=0.1 ++beta=1,2", "beta must be given once, found beta=0.1 and ++beta=1,2"),
        ("train loss=ipo loss=dpo", "loss must be given once, found loss=ipo and loss=dpo"),
        ("train evaluation.judge=gold judge@evaluation.judge=hasty", "evaluation.judge must be given once, found eval"),
        ("train betas=[0.9,0.99] adam_betas=[0.9,0.98]", "adam_betas must be given once, found"),
        ("push run=a run=b repo=c/d", "run must be given once, found run=a and run=b"),
        ("train adam_betas=(0.9,0.95)", "adam_betas=(0.9,0.95) must be read whole"),
        ("train policy.path=~/x", "policy.path=~/x must be read whole"),
        ("train name=é", "name=é must be read whole"),
        ("train beta = 0.1", "beta must be key=value, without spaces"),
        ("train =0.1", "=0.1 must be key=value"),
        ("train --beta=0.1", "--beta=0.1 must be key=value, without dashes"),
        ("train -m --cfg job", "--cfg must come without -m"),
        ("train --resolve", "--resolve must come with --cfg job"),
        ("train figure=kl_strength table=rounds", "an experiment must be one at a time"),
        ("train -m figure=kl_strength,dynamic_beta", "an experiment must be one at a time"),
        ("train hydra/launcher=basic", "hydra/launcher must be local or slurm"),
        ("train +hydra.launcher.foo=1", "hydra.launcher.foo is not an option of"),
        ("train hydra/launcher=null", "hydra/launcher must be one of its options, got null"),
        ("train --config-dir nowhere", "nowhere' not found"),
    ],
)
def test_what_is_typed_wrongly_is_told_in_one_sentence(line, said, planned, monkeypatch, capsys):
    assert said in typed(monkeypatch, capsys, *line.split())
    assert not planned


@pytest.mark.parametrize(
    "line",
    [
        "judge=gold evaluation.judge=hasty",
        "loss=ipo loss.beta=0.2",
        "figure=kl_strength beta=0.1 lr=1e-3",
    ],
)
def test_what_is_given_twice_by_two_names_is_taken(line, planned, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", *line.split()])
    with pytest.raises(SystemExit) as end:
        launch.command("train")
    assert not end.value.code
    assert planned
    assert command_line._twice(["~data", "data=hh"]) is None


@pytest.mark.parametrize(
    "group", [*GROUPS, *EXPERIMENTS, "hydra/launcher", *map("evaluation.{}".format, ("judge", "rule"))]
)
def test_a_group_that_is_given_what_is_no_option(group):
    for value in ("3", "-1", "0.1", "true", "", "[a,b]", *([] if group in ("rule", "evaluation.rule") else ["null,x"])):
        if "null" in value and group.startswith("evaluation"):
            continue
        for plus in ("", "+", "++"):
            said = str(no_options([f"{plus}{group}={value}"]))
            assert said.startswith(f"{group} must be one of its options, got "), (group, value)
    assert no_options([f"{group}=some_name", f"{group}=glob(*)" if "." not in group else "a=b"]) is None


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_has_its_spellings(group):
    for option in sorted(file.stem for file in (HOME / "conf" / group).glob("*.yaml")):
        for spelling in (f"{group}={option}", f"+{group}={option}", f"++{group}={option}", f"{group}={option}.yaml"):
            assert in_hydras_words([spelling]) == [f"{group}={option}"]
            assert no_options([spelling]) is None
        if group in ("judge", "engine", "rule") and option != "none":
            for at in (
                f"evaluation.{group}",
                f"evaluation/{group}",
                f"{group}@evaluation.{group}",
                f"+evaluation.{group}",
            ):
                assert in_hydras_words([f"{at}={option}"]) == [f"{group}@evaluation.{group}={option}"]


@pytest.mark.parametrize("verb", sorted(SWEEPS))
def test_a_key_that_is_misspelt_is_told_the_near_one(verb):
    config = compose(verb)
    for key in (keys := flatten(OmegaConf.to_container(config))):
        if len(last := key.rpartition(".")[2]) > 3 and last[0] != "_" and key[:-1] not in keys:
            with pytest.raises(OmegaConfBaseException) as error:
                OmegaConf.update(config, key[:-1], 1)
            assert f"{key[:-1]} is not a key of this command; did you mean " in message(error.value), key


def test_names_of_other_programs_lead_to_keys_that_are_there():
    config: Any = OmegaConf.to_container(compose("train"))
    keys = {*config, *flatten(config)}
    assert {*OF_TRL.values()} <= keys
    assert not {*OF_TRL, *OTHERWISE} & keys


@pytest.mark.parametrize("verb", sorted(SWEEPS))
def test_each_key_says_its_type(verb):
    config = compose(verb)
    open_groups = {*GROUPS} - {"policy"}
    for key in flatten(OmegaConf.to_container(config)):
        if {*key.split(".")} & open_groups or key in ("policy.lora.targets", "pairs.gap") or key.startswith("data"):
            continue
        with pytest.raises(OmegaConfBaseException) as error:
            OmegaConf.update(config, key, 3 if key == "adam_betas" else [["x"]])
        assert re.match(rf"{re.escape(key)} must be \w[\w |\[\]]*, got ", message(error.value)), message(error.value)


@pytest.mark.parametrize(
    "given,values", [("evaluation.judge", "null,shorter"), ("evaluation.rule", "x,null"), ("rule", "null,x")]
)
def test_null_is_a_value_of_a_sweep(given, values, planned, monkeypatch):
    values = values.replace("x", "accurate_then_short")
    monkeypatch.setattr(sys, "argv", ["train", "-m", f"{given}={values}"])
    with pytest.raises(SystemExit):
        launch.command("train")
    assert [OmegaConf.select(one.config, given) is None for one in planned] == [
        one == "null" for one in values.split(",")
    ]


def test_null_at_a_key_is_none_of_its_own():
    for typed in (
        "evaluation.judge=null",
        "evaluation.judge=Null",
        "judge@evaluation.judge=null",
        "++evaluation.judge=null",
    ):
        assert in_hydras_words([typed])[0].lower() == "evaluation.judge=null"
    assert "null is the default" in str(no_options(["evaluation.judge=none"]))


def test_keys_may_stand_on_both_sides_of_an_option(planned, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "beta=0.1", "-m", "seed=0,1"])
    with pytest.raises(SystemExit):
        launch.command("train")
    assert [(one.config.beta, one.config.seed) for one in planned] == [(0.1, 0), (0.1, 1)]


def test_an_override_is_recorded_as_it_was_typed(planned, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "name=${nope}"])
    with pytest.raises(SystemExit):
        launch.command("train")
    assert [one.overrides for one in planned] == [["name=${nope}"]]
