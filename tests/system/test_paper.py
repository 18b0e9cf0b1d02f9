"""Experiments with large policies: their recipe, three steps of each with tiny models, and references made before."""

import itertools
import json
import math
import re

import pandas as pd
import pytest
from composing import compose, composed
from conftest import tiny_tokenizer
from omegaconf import OmegaConf
from whole_runs import ROOT, losses, run

from dpo.data.batches import encode_prompts, tokenize
from dpo.data.hub import ultrafeedback
from dpo.data.records import preference, row, write_rows
from dpo.sweep.identity import identity
from dpo.sweep.plan import _given, name, resolve

pytestmark = pytest.mark.long
POLICIES = {"mistral_7b": "mistral", "tulu_2_7b": "llama", "qwen2_1_5b": "qwen2"}


def template(policy: str) -> str:
    return OmegaConf.load(ROOT / "conf/policy" / f"{policy}.yaml").chat_template


def conversations(number: int) -> dict:
    asked = [{"role": "user", "content": f"What is {number} and {number}?"}]
    return {
        "prompt": asked[0]["content"],
        "chosen": [*asked, {"role": "assistant", "content": f"It is {2 * number}.\n"}],
        "rejected": [*asked, {"role": "assistant", "content": f"Is it {3 * number}? No idea."}],
        "score_chosen": 9.0,
        "score_rejected": 2.0,
    }


@pytest.fixture
def small(tmp_path):
    """What makes a paper-scale run small: data, instructions, steps."""
    write_rows(tmp_path / "pairs.jsonl", map(conversations, range(30)))
    write_rows(tmp_path / "held_out.jsonl", map(conversations, range(30, 40)))
    asked = [{"dataset": "vicuna", "instruction": f"Say {word}.", "output": "", "generator": "x"} for word in "ab"]
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(asked))
    return [
        *(f"data.path={tmp_path / 'pairs.jsonl'}", f"data.validation_path={tmp_path / 'held_out.jsonl'}"),
        *(f"evaluation.instructions={tmp_path / 'alpaca_eval.json'}", "evaluation.prompts=3", "max_new_tokens=6"),
        *("steps=3", "batch_size=8", "evaluate_every=1", "processes=1", "threads=1", "lr=1e-3"),
    ]


@pytest.mark.parametrize("policy,kind", POLICIES.items())
def test_three_steps_of_each_policy(tmp_path, tiny_model, small, policy, kind):
    table = "paper_small_policy" if policy == "qwen2_1_5b" else "paper_kl_strength"
    made = [f"policy.base={tiny_model(kind)}", "sft.steps=2", "sft.batch_size=8"]
    given = made if policy == "qwen2_1_5b" else [f"policy.path={tiny_model(kind)}"]
    directory = tmp_path / "run"
    rows, result = run(directory, f"table={table}", f"policy={policy}", "beta=0.5", *small, *given)
    first, *later = losses(rows)
    assert first == pytest.approx(math.log(2), abs=0.01)  # bf16
    assert len(later) == 2
    assert len({first, *later}) == 3
    validation = {row["step"]: row["loss"] for row in rows if row["split"] == "validation"}
    assert list(validation) == [0, 1, 2, 3]
    assert result["loss"] == min(validation[step] for step in (1, 2, 3)) == validation[result["selected_step"]]
    assert {"rewards/accuracies", "logps/accuracies", "kl", "broken", "length"} <= set(result)
    outputs = pd.read_json(directory / "alpaca_eval.json")
    assert outputs["instruction"].tolist() == ["Say a.", "Say b."]
    assert outputs["output"].map(type).eq(str).all()
    kept = (directory / "policy" / "chat_template.jinja").read_text()
    assert kept == template(policy)  # the policy chats as it has learned to


def scores(path, small):
    """Log-probs of another program, beside the pairs of the data set."""
    files = [part.split("=")[1] for part in small[:2]]
    pairs = ultrafeedback(*files, "none", 0.1, "error").preferences
    path.mkdir()
    for split, items in pairs.items():
        logps = {"chosen_logprob": -3.0, "rejected_logprob": -5.0}
        write_rows(path / f"{split}.jsonl", (row(pair) | logps for pair in items))
    return path


@pytest.mark.parametrize("table", ["paper_necessity", "paper_compatibility", "paper_tuned_reference"])
def test_three_steps_of_each_reference(tmp_path, tiny_model, small, table):
    page = OmegaConf.load(ROOT / "experiments/table" / f"{table}.yaml")
    references = page.hydra.sweeper.params.get("reference", "other").split(",")
    paths = {
        "mistral_7b_instruct": tiny_model("qwen2"),  # another tokenizer and template
        "llama3_70b_instruct": scores(tmp_path / "scores", small),
        "other": tiny_model("mistral"),
    }
    for reference in references:
        given = [f"reference={reference}", *([f"reference.path={paths[reference]}"] if reference in paths else [])]
        policy = ["policy=mistral_7b", f"policy.path={tiny_model('mistral')}"]
        rows, result = run(tmp_path / reference, f"table={table}", "beta=0.5", *policy, *given, *small)
        assert len(set(losses(rows))) == 3, reference
        assert result["steps"] == 3
        if reference == "llama3_70b_instruct":  # h = beta (policy margin - 2)
            start = next(row for row in rows if row["split"] == "validation")
            raw = start["logps/chosen"] - start["logps/rejected"]
            assert start["logratios/margins"] == pytest.approx(raw - 2, abs=1e-4)


@pytest.mark.parametrize(
    "policy,prompt",
    [
        ("mistral_7b", "<s><|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n"),
        ("tulu_2_7b", "<s><|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\n"),
        ("qwen2_1_5b", "<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\n"),
    ],
)
def test_where_eos_stands(policy, prompt):
    """Once at the end of the response, where it is scored, and after other turns for Mistral alone; BOS once. White
    space around a message is stripped.
    """
    tokenizer = tiny_tokenizer(POLICIES[policy])
    tokenizer.chat_template = template(policy)
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\n"}]
    said = {"prompt": asked, "chosen": [{"role": "assistant", "content": " Hello there.\n"}]}
    [pair] = tokenize([preference(said | {"rejected": said["chosen"]})], tokenizer, 200, "error")
    expected = tokenizer(prompt.replace("</s>", tokenizer.eos_token), add_special_tokens=False)["input_ids"]
    assert pair.prompt_ids == expected == encode_prompts([asked], tokenizer, 200)[0]
    assert tokenizer.decode(pair.chosen_ids[:-1]) == "Hello there."
    assert pair.chosen_ids[-1] == tokenizer.eos_token_id
    again = [*asked, said["chosen"][0], {"role": "user", "content": "And?"}]
    [ids] = encode_prompts([again], tokenizer, 200)
    assert ids.count(tokenizer.eos_token_id) == (4 if policy == "mistral_7b" else 1)


def made_by(command: str) -> list[str]:
    """The policies that a command of a header comes to."""
    verb, *overrides = command.removeprefix("python -m dpo.").split()
    overrides = [part for part in overrides if part != "-m"]
    folders = []
    for combination in itertools.product(*(spread(part) for part in overrides)):
        one = composed(verb, *combination)
        config = resolve(one.config)
        given = _given(combination, {**config, "choices": one.choices})
        varying = {key: value for key, value in given.items() if any("," in one for one in overrides if key in one)}
        folders.append(f"{config['runs']}/{config['name']}/{name(varying or given, identity(config))}/policy")
    return folders


def spread(override: str) -> list[str]:
    key, values = override.split("=")
    return [f"{key}={value}" for value in values.split(",")]


@pytest.mark.parametrize("reference", ["world_clean", "world_alien", "world_tuned", "world_other_tokenizer"])
def test_references_are_where_their_command_puts_them(reference):
    text = (ROOT / f"conf/reference/{reference}.yaml").read_text()
    *_, last = re.findall(r"^# (python -m .*)", text, re.MULTILINE)
    for seed in range(3):  # a reference for each replicate
        assert OmegaConf.create({"seed": seed, "reference": OmegaConf.create(text)}).reference.path in made_by(last)


def test_scores_of_the_large_reference_are_where_their_command_puts_them():
    header = (ROOT / "experiments/table/paper_compatibility.yaml").read_text().replace("\\\n#    ", "")
    [command] = re.findall(r"^# +(python -m dpo.score .*)", header, re.MULTILINE)
    page = OmegaConf.load(ROOT / "conf/reference/llama3_70b_instruct.yaml")
    verb, *overrides = command.removeprefix("python -m dpo.").replace(" -m ", " ").split()
    assert not any(part.startswith("policy=") for part in overrides)  # so the table's own: a folder for each inside
    config = resolve(compose(verb, *overrides))
    assert page.path == f"{config['runs']}/{config['name']}"


def test_the_tuned_reference_is_a_run_of_another_table():
    text = (ROOT / "experiments/table/paper_tuned_reference.yaml").read_text()
    command = re.findall(r"^# +(python -m .*)", text, re.MULTILINE)[0]
    assert [OmegaConf.create(text).reference.path] == made_by(command)
