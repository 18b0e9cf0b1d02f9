"""What a plan tries before any run starts: each option once, in its own words, and the inputs that it finds."""

import copy
from pathlib import Path
from typing import Any

import pytest
from composing import compose
from omegaconf import OmegaConf
from test_model import copy as copied
from test_model import edit
from whole_runs import frozen, other_model, own_pairs

from dpo.data import records
from dpo.data.prompts import read_prompts
from dpo.data.records import contents
from dpo.sweep import inputs, rehearse
from dpo.sweep.plan import resolve
from dpo.sweep.rehearse import Rehearsal
from dpo.sweep.signature import instantiate


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_model) -> dict:
    folder = tmp_path_factory.mktemp("rehearse")
    pairs = own_pairs(folder / "pairs.jsonl")
    given = ["data=file", f"data.path={pairs}", "policy=tiny", f"policy.path={tiny_model('llama')}", "judge=shorter"]
    return OmegaConf.to_container(frozen(folder / "run", *given, "reference=ema"))


def with_(config: dict, key: str, value: object) -> dict:
    config = copy.deepcopy(config)
    *groups, last = key.split(".")
    (config[groups[0]] if groups else config)[last] = value
    return config


def test_what_a_run_would_be_made_from_is_found(base, tiny_model, tmp_path):
    other = other_model(tmp_path, tiny_model)
    reference = {"_target_": "dpo.references.Frozen", "path": other}
    made_from = {
        "data": contents(instantiate(base["data"])),
        "policy": inputs.sketch(Path(tiny_model("llama"))),
        "reference": inputs.sketch(Path(other)),
    }
    found = Rehearsal().of(with_(base, "reference", reference))
    assert found == {"problems": [], "inputs": made_from, "pairs": True}
    assert not Rehearsal().of(with_(base, "command", "evaluate"))["pairs"]  # which trains on none


def test_text_beside_a_template_is_told_once(base, tiny_model, tmp_path, capsys):
    """That a policy reads it as it is may be meant, or forgotten."""
    told = with_(base, "policy.path", tiny_model("qwen2"))
    rehearsal = Rehearsal()
    for beta in (0.1, 0.2):
        assert rehearsal.of(with_(told, "beta", beta))["problems"] == []
    said = capsys.readouterr().out
    assert said.count("prompts are plain text, which ") == said.count("reads without its chat template") == 1
    assert Rehearsal().of(with_(told, "data.chat", True))["problems"] == []
    Rehearsal().of(base)  # which has no template
    assert "chat template" not in capsys.readouterr().out
    both = [f'{{"chosen": "{n}? yes", "rejected": "{n}? no"}}\n' for n in range(9)]
    (tmp_path / "both.jsonl").write_text("".join(both))
    begun = with_(with_(told, "data.path", str(tmp_path / "both.jsonl")), "data.prompt", "implicit")
    assert Rehearsal().of(begun)["problems"] == []
    assert "chat template" not in capsys.readouterr().out  # there data.chat=true would be refused
    parts = {"sources": [base["data"]["path"]], "validation_fraction": 0.3, "on_faulty": "error"}
    assert Rehearsal().of(with_(told, "data", {"_target_": "dpo.data.mixture.mixture", **parts}))["problems"] == []
    assert "with chat:true in data.sources they become" in capsys.readouterr().out


def test_chats_need_a_template(base, tiny_model):
    [problem] = Rehearsal().of(with_(base, "data.chat", True))["problems"]
    assert problem.startswith("prompts are chat messages, so the tokenizer must have a chat template, found none")


def test_what_another_stage_is_made_from_is_found(base, tiny_model, tmp_path):
    for name in ("train.jsonl", "validation.jsonl"):
        (tmp_path / name).write_text("{}\n")
    other = other_model(tmp_path, tiny_model)
    told = Rehearsal().of(with_(with_(base, "against", other), "candidates", str(tmp_path)))
    assert told["problems"] == []
    assert told["inputs"] == {
        "data": contents(instantiate(base["data"])),
        "policy": inputs.sketch(Path(tiny_model("llama"))),
        "against": inputs.sketch(Path(other)),
        "candidates": inputs.sketch(tmp_path),
    }
    (tmp_path / "validation.jsonl").unlink()
    [problem] = Rehearsal().of(with_(base, "candidates", str(tmp_path)))["problems"]
    assert problem == f"candidates must be a folder that dpo.generate wrote, found no validation.jsonl in {tmp_path}"


def test_the_hub_is_asked_for_every_model_once(base, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(rehearse, "ask_hub", asked.append)
    reference = {"_target_": "dpo.references.Frozen", "path": "me/reference"}
    named = {"policy.path": "me/policy", "against": "me/other", "evaluation.baseline": "me/baseline"}
    config = with_(base, "reference", reference)
    for key, value in named.items():
        config = with_(config, key, value)
    assert Rehearsal().of(config)["problems"] == []
    assert sorted(asked) == ["me/baseline", "me/other", "me/policy", "me/reference"]
    live = {"_target_": "dpo.references.Live", "path": "me/live"}
    assert Rehearsal().of(with_(base, "reference", live))["problems"] == []
    assert asked.pop() == "me/live"
    files = {"_target_": "dpo.references.PrecomputedFiles", "path": str(tmp_path)}
    (tmp_path / "scores.jsonl").write_text("{}\n")
    assert Rehearsal().of(with_(base, "reference", files))["problems"] == []
    assert len(asked) == 4  # folders here and log-probs are no business of the hub


FAULTY = {  # file of a model's folder -> what is in the way there, and what is said
    "config.json": [
        ({"num_attention_heads": 5}, "as a Hugging Face folder, found otherwise"),
        ({"hidden_act": "of_nobody"}, "as a Hugging Face folder, found otherwise"),  # which its class does not check
        ({"num_hidden_layers": 1, "vocab_size": 200}, "tokens of its tokenizer, found 200 embeddings"),
        ({"model_type": "of_nobody"}, "of_nobody"),
        ({"max_position_embeddings": 40}, "max_length must be at most the 40 positions of"),
    ],
    "tokenizer_config.json": [({"eos_token": None}, "must have an EOS token")],
    "tokenizer.json": [(None, "must hold a tokenizer, tokenizer.json, as a Hugging Face folder, found otherwise")],
}
FAULTY_CASES = [(file, *case) for file, cases in FAULTY.items() for case in cases]


def faulty(folder: Path, file: str, change: dict[str, Any] | None) -> str:
    if change is None:
        (folder / file).unlink()
        (folder / "tokenizer_config.json").unlink()
    else:
        edit(folder / file, **change)
    return str(folder)


@pytest.mark.parametrize("file,change,said", FAULTY_CASES)
@pytest.mark.parametrize("key", ["policy.path", "policy.base"])
def test_what_a_run_would_refuse_of_a_folder_is_refused_when_planned(
    base, tiny_model, tmp_path, key, file, change, said
):
    """Once, however many runs have it."""
    path = faulty(copied(tiny_model("llama"), tmp_path / "model"), file, change)
    config = with_(with_(base, "policy.path", None), key, path)
    made = rehearse.trials([config, with_(config, "beta", 0.5)])
    assert [len(one["problems"]) for one in made] == [1, 1]
    assert said in made[0]["problems"][0]
    assert path in made[0]["problems"][0]


@pytest.mark.parametrize("key", ["reference.path", "evaluation.baseline", "against"])
@pytest.mark.parametrize(
    "file,change,said",
    [case for case in FAULTY_CASES if "positions" not in case[2]] + [("kind", None, "the tokenizer")],
)
def test_another_folder_that_does_not_serve_is_refused_when_planned(
    base, tiny_model, tmp_path, key, file, change, said
):
    kind = "gpt2" if file == "kind" else "llama"
    path = copied(tiny_model(kind), tmp_path / "model")
    path = str(path) if file == "kind" else faulty(path, file, change)
    reference = {"_target_": "dpo.references.Frozen", "path": path}
    config = with_(base, "reference", reference) if key == "reference.path" else with_(base, key, path)
    found = Rehearsal().of(config)["problems"]
    if (file, key) == ("kind", "evaluation.baseline"):  # whose responses are text
        assert not found
    else:
        assert len(found) == 1
        assert said in found[0]


def test_files_at_home_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    row = {"prompt": "Is it?", "response": "yes", "token_ids": {"prompt": [1], "response": [2]}, "ended": True}
    for name in ("train", "validation"):
        records.write_rows(tmp_path / f"{name}.jsonl", [row])
    rehearse._candidates("~")
    rehearse._prompts("~/train.jsonl")
    assert read_prompts("~/train.jsonl") == ["Is it?"]
    with pytest.raises(ValueError, match=r"found no file ~/test\.jsonl"):
        rehearse._prompts("~/test.jsonl")


def test_a_chat_template_is_rendered_when_planned(base, tiny_model, tmp_path, monkeypatch):
    bad = "{{ bad(messages) }}"
    [problem] = Rehearsal().of(with_(base, "policy.chat_template", bad))["problems"]
    assert problem.startswith("policy.chat_template must render a chat, found otherwise: the chat template does not")
    [problem] = Rehearsal().of(with_(base, "policy.chat_template", "{{ broken"))["problems"]
    assert "the chat template does not render" in problem
    folder = copied(tiny_model("llama"), tmp_path / "model")
    (folder / "chat_template.jinja").write_text(bad)
    assert not Rehearsal().of(with_(base, "policy.path", str(folder)))["problems"]  # plain text does without
    monkeypatch.setattr(rehearse, "ask_hub", lambda path: None)
    on_hub = with_(with_(base, "policy.path", "me/policy"), "policy.chat_template", "/nope.jinja")
    [problem] = Rehearsal().of(on_hub)["problems"]
    assert problem.startswith("policy.chat_template must be a file NAME.jinja, or the text of a template")


def test_a_folder_is_tried_once_however_many_runs_it_has(base, monkeypatch):
    tried = []
    monkeypatch.setattr(rehearse, "without_weights", tried.append)
    configs = [with_(with_(base, "beta", beta), "max_length", n) for beta in (0.1, 0.2, 0.3) for n in (96, 97)]
    assert not any(one["problems"] for one in rehearse.trials(configs))
    assert len(tried) == 1


NO_RECORDS = "must be a file of records, a folder of them or a data set on the hub (owner/name), found none at"
ODD = {  # setting -> a value that only trying it finds out, and what is said
    "data.path": (
        "/nowhere/pairs",
        f"data.path {NO_RECORDS} /nowhere/pairs; check",
    ),
    "data.validation_path": (
        "/nowhere",
        f"data.validation_path {NO_RECORDS} /nowhere",
    ),
    "policy.path": ("/nowhere/policy", "/nowhere/policy must be a folder with a model"),
    "policy.base": ("/nowhere/base", "/nowhere/base must be a folder with a model"),
    "against": ("/nowhere/other", "/nowhere/other must be a folder with a model"),
    "evaluation.baseline": ("/nowhere/strong", "/nowhere/strong must be a folder with a model"),
    "evaluation.judge": ({"_target_": "dpo.judges.gold", "_partial_": True}, "KeyError: 'a judge of somebody'"),
    "candidates": ("/nowhere/candidates", "found no train.jsonl in /nowhere/candidates"),
    "evaluation.instructions": ("/nowhere/asked.json", "/nowhere/asked.json"),
    "reference.alpha": (2.0, "reference.alpha must be in (0, 1], got 2.0"),
    "loss.label_smoothing": (0.7, "label_smoothing must be in [0, 0.5), got 0.7"),
    "judge._target_": ("dpo.judges.gold", "KeyError: 'a judge of somebody'"),
    "loss.beta": (3.0, "beaten by 3.0"),
}


@pytest.mark.parametrize("key", ODD)
def test_every_option_is_tried(base, monkeypatch, key):
    value, said = ODD[key]

    def calls(node):
        if node["_target_"] == "dpo.judges.gold":
            raise KeyError("a judge of somebody")
        return instantiate(node)

    def tried(loss):
        if (beta := loss.keywords["beta"]) == 3.0:
            raise ValueError(f"beaten by {beta}")
        return try_out(loss)

    try_out = rehearse.try_out
    calls.__name__ = "instantiate"
    monkeypatch.setattr(rehearse, "instantiate", calls)
    monkeypatch.setattr(rehearse, "try_out", tried)
    found = Rehearsal().of(with_(base, key, value))
    assert found["inputs"] == {}
    assert len(found["problems"]) == 1
    assert said in found["problems"][0]


def test_all_that_is_wrong_is_said_at_once(base):
    wrong = with_(with_(base, "reference.alpha", 2.0), "loss.label_smoothing", 0.7)
    wrong = with_(wrong, "evaluation.baseline", "/nowhere/strong")
    said = Rehearsal().of(with_(wrong, "policy.path", "/nowhere/policy"))["problems"]
    parts = ("/nowhere/policy must be", "/nowhere/strong must be", "reference.alpha must", "label_smoothing")
    assert len(said) == len(parts)
    for part, problem in zip(parts, said, strict=True):
        assert part in problem


def test_an_option_that_does_not_fit_is_not_called(base, monkeypatch):
    called = []
    monkeypatch.setattr(rehearse, "instantiate", lambda node: called.append(node))
    [problem] = Rehearsal().of(with_(base, "loss.label_smoothing", "much"))["problems"]
    assert problem == "loss.label_smoothing must be float, got 'much'"
    assert not called


def test_pairs_of_prompts_are_not_made_where_there_are_pairs(base):
    base = with_(base, "pairs", {**base["pairs"], "off_policy": True})
    [problem] = Rehearsal().of(with_(base, "judge", None))["problems"]
    assert problem == "pairs.off_policy=true makes pairs of prompts, found data with pairs; leave it out"
    world = OmegaConf.to_container(OmegaConf.load(Path(__file__).parents[2] / "conf/data/world.yaml"))
    assert not Rehearsal().of(with_(base, "data", {**world, "seed": 0}))["problems"]


def test_prompts_without_a_judge_make_no_pairs(base):
    world = OmegaConf.to_container(OmegaConf.load(Path(__file__).parents[2] / "conf/data/world.yaml"))
    base = with_(with_(base, "data", {**world, "seed": 0}), "judge", None)
    for command in ("train", "score"):
        [problem] = Rehearsal().of(with_(base, "command", command))["problems"]
        assert problem.startswith("judge must be one that makes pairs")
    assert not Rehearsal().of(with_(base, "command", "generate"))["problems"]


def test_data_of_many_configs_are_parsed_once(base, monkeypatch):
    asked = [base, with_(base, "beta", 0.5), with_(base, "loss.label_smoothing", 0.7)]
    seen, data = [], rehearse._data

    def _data(node, cache):
        seen.append(node["path"])
        return data(node, cache)

    monkeypatch.setattr(rehearse, "_data", _data)
    found = rehearse.trials(asked)
    assert len(seen) == 1
    assert [bool(one["problems"]) for one in found] == [False, False, True]
    assert found[0] == found[1]


def test_data_that_a_run_has_read_are_not_read_again_for_a_plan(base, tmp_path, monkeypatch, capsys):
    """Until their file changes; and what was said of them is said."""
    file, config = tmp_path / "pairs.jsonl", with_(base, "cache", str(tmp_path / "cache"))
    rows = Path(base["data"]["path"]).read_text()
    file.write_text(rows + '{"prompt": "a", "chosen": "b", "rejected": ""}\n')
    config = with_(with_(config, "data.path", str(file)), "data.on_faulty", "drop")
    expected = Rehearsal().of(config)
    said = capsys.readouterr().out
    assert "1 dropped" in said
    inputs.read(config["data"], config["cache"])
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(records, "paired", None)
        assert Rehearsal().of(config) == expected
        assert capsys.readouterr().out == said
    file.write_text(rows.partition("\n")[2])
    assert Rehearsal().of(config)["inputs"]["data"] != expected["inputs"]["data"]


@pytest.mark.parametrize(
    "given, keys",
    [
        (["judge=pairwise", "judge.model=m", "rule=accurate_then_short"], ("rule", "judge")),
        (["judge=pairwise", "judge.model=m", "evaluation.rule=accurate_then_short"], ("evaluation.rule", "judge")),
        (
            ["evaluation.judge=pairwise", "evaluation.judge.model=m", "rule=accurate_then_short"],
            ("rule", "evaluation.judge"),
        ),
        (["judge=pairwise", "judge.model=m", "judge@evaluation.judge=gold"], None),
        (["judge=gold", "rule=accurate_then_short"], None),
    ],
)
def test_a_rule_needs_judgements_of_each_response(given, keys):
    found = Rehearsal().of(resolve(compose("train", *given)))["problems"]
    assert len(found) == (keys is not None)
    if keys:
        said = " must be null where the judge compares pairs, as dpo.judges.Pairwise does, found dpo.judges.accurate"
        assert found[0].startswith(f"{keys[0]}{said}")
        assert f"each response: {keys[1]}=questions, {keys[1]}=gold" in found[0]


def test_a_rule_without_a_judge_is_not_passed_over(base):
    rule = resolve(compose("train", "rule=accurate_then_short"))["rule"]
    without = with_(with_(base, "judge", None), "rule", rule)
    [problem] = Rehearsal().of(without)["problems"]
    assert problem == "rule goes by what a judge says of each response, found no judge; leave it out"
    assert not Rehearsal().of(with_(without, "evaluation.judge", base["judge"]))["problems"]


def test_what_evaluations_alone_have_is_named_by_its_key():
    rehearsal = Rehearsal()
    for at in ("", "evaluation."):
        [problem] = rehearsal.of(resolve(compose("train", f"{at}judge=reward_model")))["problems"]
        assert problem.startswith(f"{at}judge.path must name a reward model")
        assert problem.endswith(f"add {at}judge.path=...")
        given = [f"{at}engine=ray", f"{at}engine.pool.concurrency=0"]
        [problem] = rehearsal.of(resolve(compose("train", *given)))["problems"]
        assert problem == f"{at}engine.pool.concurrency must be at least 1, got 0"


def test_dpo_sft_needs_demonstrations_and_no_policy(base):
    prompts = OmegaConf.to_container(OmegaConf.load(Path(__file__).parents[2] / "conf/data/prompts.yaml"))
    prompts = {**prompts, "path": base["data"]["path"], "validation": 1, "test": 1}
    prompts.pop("defaults")
    [problem] = Rehearsal().of(with_(with_(base, "data", prompts), "command", "sft"))["problems"]
    assert problem.startswith("dpo.sft imitates demonstrations, found data without")
    told = with_(with_(with_(base, "data", prompts), "command", "train"), "policy.path", None)
    assert Rehearsal().of(told)["problems"][0].startswith("policy.path must be given where the data have no demonstr")


def test_an_option_of_a_server_is_named():
    [problem] = Rehearsal().of(resolve(compose("train", "judge=pairwise", "judge.server.concurrency=x")))["problems"]
    assert problem == "judge.server.concurrency must be int, got 'x'"
    found = Rehearsal().of(resolve(compose("train", "judge=pairwise", "+judge.server.port=3")))["problems"]
    assert found[0].startswith("judge.server must have the keys url, key, concurrency")
    twice = ["judge=pairwise", "rule=accurate_then_short"]
    assert len(Rehearsal().of(resolve(compose("train", *twice)))["problems"]) == 1


def test_the_revision_of_what_was_read_on_the_hub_is_told(base, dataset_hub):
    """Beside what a run is made from, which goes by content: the same rows of another commit are the same data."""
    rows = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(40)]
    on_hub = with_(base, "data.path", "some/pairs@main")
    commit = dataset_hub.publish("some/pairs", {"train.parquet": rows})
    one = Rehearsal().of(on_hub)
    assert one["revisions"] == {"some/pairs@main, train split": commit}
    later = dataset_hub.publish("some/pairs", {"data/train.parquet": rows})
    other = Rehearsal().of(on_hub)
    assert other["revisions"] == {"some/pairs@main, train split": later} != one["revisions"]
    assert one["inputs"] == other["inputs"]
