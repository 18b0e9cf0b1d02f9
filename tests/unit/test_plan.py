"""From combinations of overrides to run directories, in this process: what the rehearsal finds is made up."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from composing import composed
from filelock import FileLock
from omegaconf import OmegaConf
from test_launch import ROOT

from dpo.sweep import command_line, inputs, launch
from dpo.sweep import plan as planning
from dpo.sweep.directory import config as config_of
from dpo.sweep.plan import Composed, Run, plan
from hydra_plugins.dpo_launchers import Local

INPUTS = {"data": "d", "policy": "p", "reference": "r"}


@pytest.fixture
def found(tmp_path, monkeypatch) -> dict[float, dict[str, Any]]:
    """By beta, what the rehearsal finds; where nothing is put, no problem and INPUTS. Runs are planned in tmp_path."""
    tried: dict[float, dict[str, Any]] = {}
    monkeypatch.setattr(
        planning,
        "rehearse",
        lambda configs: [tried.get(one["beta"], {"problems": [], "inputs": INPUTS}) for one in configs],
    )
    monkeypatch.chdir(tmp_path)
    return tried


@pytest.fixture(scope="module")
def base() -> Composed:
    return composed("train")


def given(base: Composed, *overrides: str, swept: tuple[str, ...] = ()) -> Composed:
    """The overrides in place, as Hydra does it for plain values."""
    config = OmegaConf.merge(base.config, OmegaConf.from_dotlist(list(overrides)))
    return Composed(config, list(overrides), base.choices, frozenset(swept))


def names(planned: list[Run]) -> list[str]:
    return [str(run.directory) for run in planned]


def test_revisions_are_recorded_and_decide_nothing(base, found):
    """A run that was planned with another commit of the same rows goes on."""
    configs = []
    for commit in "12":
        found[0.2] = {"problems": [], "inputs": INPUTS, "revisions": {"some/pairs, train split": commit}}
        [run], refused = plan([given(base, "beta=0.2", "name=own", "runs=there")])
        assert not refused
        configs.append(run.config)
        run.freeze()
    assert [one["provenance"]["revisions"] for one in configs] == [{"some/pairs, train split": c} for c in "12"]
    assert configs[0]["id"] == configs[1]["id"]


def test_what_is_frozen(base, found, monkeypatch):
    monkeypatch.setattr(planning, "HOME", ROOT / "nowhere")
    [run], refused = plan([given(base, "beta=0.2", "name=own/mine", "runs=there")])
    assert not refused
    assert (str(run.directory), run.asked) == ("there/own/mine/beta=0.2", "beta=0.2")
    assert not Path("there").exists()  # a plan writes nothing
    run.freeze()
    text = (run.directory / "config.yaml").read_text()
    assert text.startswith(
        "# The settings of this run, all of them. python -m dpo.sweep.execute there/own/mine/beta=0.2\n"
    )
    frozen = config_of(run.directory)
    record = frozen.pop("provenance")
    versions = ("python", "torch", "transformers", "tokenizers", "numpy", "hydra-core", "omegaconf", "peft", "datasets")
    assert set(record) == {"inputs", "overrides", "commit", "uncommitted_changes", *versions}
    assert record["inputs"] == INPUTS
    assert record["overrides"] == ["beta=0.2", "name=own/mine", "runs=there"]
    assert record["commit"] is None
    assert frozen.pop("choices") == {
        "data": "world",
        "engine": "transformers",
        "judge": "gold",
        "loss": "dpo",
        "policy": "tiny",
        "reference": "initial",
    }
    assert next(iter(frozen)) == "id"
    assert "hydra" not in frozen
    assert (frozen["beta"], frozen["loss"]["beta"]) == (0.2, 0.2)
    assert [path.name for path in run.directory.iterdir()] == ["config.yaml"]


def test_the_code_that_a_run_is_made_with_is_recorded(base, found, tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", *who, *arguments], cwd=tmp_path / "code", capture_output=True, text=True)
        return done.stdout.strip()

    (tmp_path / "code").mkdir()
    git("init")
    git("commit", "--allow-empty", "-m", "a")
    monkeypatch.setattr(planning, "HOME", tmp_path / "code")
    for changes in (False, True):
        [run], _ = plan([given(base)])
        told = run.config["provenance"]
        assert (told["commit"], told["uncommitted_changes"]) == (git("rev-parse", "HEAD"), changes)
        (tmp_path / "code" / "new").touch()


def test_the_same_settings_again_bring_what_changes_no_number(base, found):
    """Of settings of another id the first stay."""
    for packed in (True, False):
        [run], _ = plan([given(base, f"packed={packed}", "threads=3")])
        run.freeze()
        assert config_of(run.directory)["packed"] is packed
    [another], _ = plan([given(base, "beta=0.7")])
    other = Run(run.directory, another.config | {"packed": True}, "")
    with pytest.raises(FileExistsError, match="the same command again takes another name"):
        other.freeze()
    assert config_of(run.directory)["packed"] is False


def test_a_run_of_another_identity_then_is_taken_up_again(base, found):
    """A former version took other keys for its identity; the settings are the same."""
    [run], _ = plan([given(base)])
    Run(run.directory, run.config | {"id": "0"}, "").freeze()
    [again], refused = plan([given(base, "threads=2")])
    assert (again.directory, refused) == (run.directory, [])
    again.freeze()
    assert config_of(run.directory)["id"] == run.config["id"]


def test_what_is_refused_and_why(base, found):
    """Every reason of the plan's own before the rehearsal's; of each combination all of them."""
    found[0.5] = {"problems": ["one", "two"], "inputs": {}}
    asked = ["beta=0.1", "beta=0.5", "beta=-1 lr=0", "loss.beta=0.3 beta=0.2", "+id=3", "choices.loss=x"]
    composed = [given(base, *overrides.split()) for overrides in asked[:4]]
    composed += [Composed(base.config, [override], base.choices) for override in asked[4:]]
    planned, refused = plan(composed)
    assert names(planned) == ["runs/dev/beta=0.1"]
    told = {" ".join(one.overrides): one.reason for one in refused}
    assert set(told) == {*asked[1:]}
    assert told["beta=0.5"] == "one\ntwo"
    assert told["beta=-1 lr=0"].splitlines() == ["beta must be above 0, got -1.0" + HINT, "lr must be above 0, got 0.0"]
    assert told["+id=3"].startswith("id is what a run records of itself, and cannot be given")
    assert told["choices.loss=x"].startswith("choices.loss is what a run records of itself")
    assert told["loss.beta=0.3 beta=0.2"] == "loss.beta and beta are one setting, got 0.3 and 0.2; give beta alone"


HINT = "; the limit of no constraint is a small beta such as 1e-4"


def test_a_chat_template_is_its_text_whatever_its_file(base, found, tmp_path, monkeypatch):
    """So a run needs no other file, and is the same after the file was moved; another text is another run."""
    for name, text in (("a", "{{ messages }}"), ("b", "{{ messages }}"), ("c", "{{ messages }}.")):
        (tmp_path / f"{name}.jinja").write_text(text)
    monkeypatch.setenv("HOME", str(tmp_path))
    options = [f"policy.chat_template={folder}/{name}.jinja" for folder in (tmp_path, "~") for name in "abc"]
    runs, refused = plan([given(base, option) for option in (*options, "policy.chat_template='{{ messages }}'")])
    assert not refused
    assert [run.config["policy"]["chat_template"] for run in runs] == ["{{ messages }}", "{{ messages }}."]
    digests = [hashlib.sha256(f'"{text}"'.encode()).hexdigest()[:8] for text in ("{{ messages }}", "{{ messages }}.")]
    assert [run.directory.name for run in runs] == [f"policy.chat_template={one}" for one in digests]
    [run], _ = plan([given(base, "policy.chat_template=none.jinja")])
    assert run.config["policy"]["chat_template"] == "none.jinja"  # which the rehearsal refuses


def test_names_by_what_is_swept(base, found):
    one = ("steps=9", "policy.path=m")
    planned, _ = plan([given(base, f"beta={beta}", *one, swept=("beta",)) for beta in (0.1, 0.2, 0.1)])
    assert names(planned) == ["runs/dev/beta=0.1", "runs/dev/beta=0.2"]
    for run in planned:
        run.freeze()
    again, _ = plan([given(base, "beta=0.2", *one)])
    assert names(again) == ["runs/dev/beta=0.2"]
    elsewhere, _ = plan([given(base, "beta=0.2", *one, "name=own"), given(base, "beta=0.2", *one, "runs=there")])
    full = "beta=0.2,policy.path=m,steps=9"
    assert names(elsewhere) == [f"runs/own/{full}", f"there/dev/{full}"]


def test_runs_that_were_made_from_something_else(base, found):
    """Whatever they have made, if anything."""
    betas = (0.1, 0.2, 0.3, 0.4, 0.5)
    planned, _ = plan([given(base, f"beta={beta}") for beta in betas])
    finished, saved, running, _, _ = (run.directory for run in planned)
    for run in planned:
        run.freeze()
    (finished / "evaluation.json").write_text('{"steps": 1}')
    (saved / "checkpoint" / "step-3").mkdir(parents=True)
    found[0.1] = found[0.4] = {"problems": [], "inputs": {**INPUTS, "data": "e"}}
    found[0.2] = found[0.3] = {"problems": [], "inputs": {**INPUTS, "policy": "q", "reference": "s"}}
    with FileLock(running / ".lock"):
        again, refused = plan([given(base, f"beta={beta}") for beta in betas])
    assert names(again) == names(planned)
    said = "runs/dev holds runs of these settings, but {} is not what they were made from: use another name=..., or"
    data = f"{said.format('the data')} move these runs away: beta=0.1"
    model = said.format("the model at policy.path or policy.base and what is at reference.path")
    models = f"{model} move these runs away: beta=0.2, beta=0.3"
    assert [(*one.overrides, one.reason) for one in refused] == [
        ("beta=0.1", data),
        ("beta=0.2", models),
        ("beta=0.3", models),
    ]


def test_of_many_remade_runs_three_are_named(base, found):
    betas = (0.1, 0.2, 0.3, 0.4)
    planned, _ = plan([given(base, f"beta={beta}") for beta in betas])
    for run in planned:
        run.freeze()
        (run.directory / "checkpoint" / "step-3").mkdir(parents=True)
        found[run.config["beta"]] = {"problems": [], "inputs": {}}  # nothing is known of now: nothing is said
    assert plan([given(base, f"beta={beta}") for beta in betas])[1] == []
    for beta in betas:
        found[beta] = {"problems": [], "inputs": {"data": "e"}}
    _, refused = plan([given(base, f"beta={beta}") for beta in betas])
    assert {one.reason.rpartition(": ")[2] for one in refused} == {"beta=0.1, beta=0.2, beta=0.3, and 1 more"}


def test_settings_there_and_asked_for_are_told_apart_by_value(base, found):
    """What is in a directory of that name is not touched, and every setting in which it differs is said, no other."""
    [run], _ = plan([given(base, "seed=1")])
    file = run.directory / "config.yaml"
    run.freeze()
    old = OmegaConf.load(file)
    old.update(lr=0.25, precision="bf16", packed=False, adam_betas=[0.5, 1e-7], steps=7)
    OmegaConf.save(old, file)
    planned, [refused] = plan([given(base, "seed=1")])
    assert not planned
    assert refused.reason.splitlines() == [
        "runs/dev/seed=1 holds a run of other settings; nothing was changed there. It differs in",
        "  lr: 0.25 there, 0.0005 asked for",
        "  steps: 7 there, null asked for",
        "  adam_betas: [0.5,1e-07] there, [0.9,0.99] asked for",
        "  precision: bf16 there, fp32 asked for",
        "use another name=..., or move runs/dev/seed=1 away",
    ]


def test_all_configs_are_rehearsed_where_all_is_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")  # where it is there, no other process is needed
    served = []
    monkeypatch.setattr(planning, "serve", served.append)
    monkeypatch.setattr(planning, "ask", lambda *given: [given])
    assert planning.rehearse([]) == []
    assert served == []
    some = [{"command": "train", "n": 1}, {"command": "sft"}, {"command": "train", "n": 2}]
    assert planning.rehearse(some) == [("dpo.sweep.rehearse", "trials", some)]
    assert served == [["dpo.sweep.rehearse", "dpo.sft", "dpo.train"]]


def test_an_option_at_a_key_is_named_by_the_key(monkeypatch):
    """Hydra writes group and key; `evaluation.judge=gold` is what is typed, and what a run is named by."""
    assert planning.key_of("judge@evaluation.judge=gold") == "evaluation.judge"
    assert [planning.key_of(override) for override in ("beta=0.1", "+seed=1", "~policy.date")] == [
        *("beta", "seed", "policy.date")
    ]
    seen = []
    monkeypatch.setattr(command_line.hydra, "main", lambda **_: lambda _: lambda: seen.append(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["train", "-m", "evaluation.judge=gold,hasty", "judge=hasty"])
    with pytest.raises(SystemExit):
        launch.command("train")
    assert seen == [["-m", "judge@evaluation.judge=gold,hasty", "judge=hasty"]]
    typed = ["evaluation.engine=vllm", "evaluation.rule=accurate_then_short", "evaluation.judge=null"]
    hydras = ["engine@evaluation.engine=vllm", "rule@evaluation.rule=accurate_then_short", "evaluation.judge=null"]
    assert command_line.in_hydras_words(typed) == hydras
    settings = OmegaConf.create(
        {
            "runtime": {"choices": {"judge": "hasty", "judge@evaluation.judge": "gold", "figure": None}},
            "overrides": {"task": ["judge@evaluation.judge=gold"]},
        }
    )
    made = launch._composed(OmegaConf.create(), settings)
    assert made.choices == {"judge": "hasty", "evaluation.judge": "gold"}


@pytest.mark.parametrize("option", ["policy.lora.alpha=16", "policy.lora.targets=[q_proj]"])
def test_options_of_adapters_need_adapters(base, found, option, capsys, monkeypatch):
    """In one run of a sweep at least: policy.lora.rank=null,8 compares runs with and without."""
    started: list[Run] = []
    monkeypatch.setattr(Local, "start", lambda _, planned: started.extend(planned) or 0)

    def sweep(*runs: str) -> str:
        with pytest.raises(SystemExit):
            Local(None).execute([given(base, "device=cpu", option, *one.split()) for one in runs], [])
        return capsys.readouterr().err

    said = f"{option.split('=')[0]} is of adapters, found policy.lora.rank=null in every run; set policy.lora.rank"
    assert said in sweep("beta=0.1")
    assert said in sweep("beta=0.1 policy.lora.rank=null", "beta=0.2")
    assert not started
    assert not sweep("policy.lora.rank=null", "policy.lora.rank=8")
    assert len(started) == 2


def test_all_that_a_run_is_made_from_has_words(tmp_path, tiny_model):
    """What the prompts of dpo.show were, for one."""
    llama, prompts = tiny_model("llama"), tmp_path / "prompts.jsonl"
    prompts.write_text("{}")
    values = {
        "policy": {"path": llama, "base": None},
        "against": llama,
        "of": str(prompts),
        "candidates": str(tmp_path),
    }
    values |= {"reference": {"path": llama}, "judge": {"path": llama}, "evaluation": {"baseline": llama}}
    assert inputs.models(values).keys() - planning.INPUTS.keys() == set()
    records = [{"provenance": {"inputs": {"of": content}}} for content in "ab"]
    assert planning._changed(*records) == "the file of prompts at of"
