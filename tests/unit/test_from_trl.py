"""docs/from_trl.md names options, losses and metrics that are there, here and in TRL, with the defaults of both."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import yaml
from composing import composed
from omegaconf import OmegaConf

from dpo.losses import PairLogps, dpo
from dpo.losses.pairs import metrics
from dpo.sweep.signature import OF_TRL

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "from_trl.md").read_text()
NOTHING = "-"


def table(title: str) -> list[list[str]]:
    """The rows of the table below a title, without its head."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line[1:-1].split("|") for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip().strip("`") for cell in row] for row in rows[1:]]


def test_our_options():
    one = composed("train", "data=file", "data.path=null", "policy.path=null")
    for _, _, key, default in table("Options"):
        found = one.choices[key] if key in one.choices else OmegaConf.select(one.config, key, default="absent")
        assert found == yaml.safe_load(default), key


def test_the_command_has_trls_defaults():
    [command] = re.findall(r"python -m dpo\.train (.*)", PAGE)
    config = composed("train", *command.split()).config
    said = {theirs: yaml.safe_load(default) for theirs, default, *_ in table("Options")}
    assert (config.lr, config.epochs) == (said["learning_rate"], said["num_train_epochs"])
    assert (config.warmup_steps, config.adam_betas[1]) == (said["warmup_steps"], said["adam_beta2"])
    assert (config.precision == "bf16") == said["bf16"]


def test_the_command_line_says_what_the_page_says():
    said = {theirs: ours for theirs, _, ours, _ in table("Options")}
    assert {name: said.get(name) for name in OF_TRL} == OF_TRL


def test_trls_options():
    from trl import DPOConfig, ModelConfig, ScriptArguments  # here: seconds that collecting all tests would take, too

    known = {field.name: field.default for one in (ScriptArguments, ModelConfig, DPOConfig) for field in fields(one)}
    known["bf16"] = DPOConfig(output_dir="x", use_cpu=True).bf16
    known["loss_type"] = DPOConfig(output_dir="x", use_cpu=True).loss_type
    for name, default, *_ in table("Options"):
        assert default == NOTHING or known[name] == yaml.safe_load(default), name
        assert default != NOTHING or known.get(name) is None, name
    for name, value in {"ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 512, "lora_dropout": 0.05}.items():
        assert known[name] == value
    others = {"ld_alpha", "loss_weights", "use_weighting", "f_divergence_type", "f_alpha_divergence_coef"}
    assert others | {"precompute_ref_log_probs", "disable_dropout", "dtype", "logging_steps"} <= {*known}


def test_losses():
    from trl.trainer.dpo_trainer import DPOTrainer

    theirs = re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss))
    assert sorted(theirs) == sorted(row[0] for row in table("Losses"))
    named = re.findall(r"`loss=(\w+)`", PAGE)
    assert len(named) > 15
    for name in named:
        assert (ROOT / f"conf/loss/{name}.yaml").is_file(), name


def test_metrics():
    from trl.trainer.dpo_trainer import DPOTrainer

    pair = PairLogps.zeros(2)
    ours, theirs = metrics(pair, dpo(pair, 0.1, 0.0)), inspect.getsource(DPOTrainer._compute_loss)
    for their, our, _ in table("Metrics"):
        assert their == NOTHING or f'[mode]["{their}"]' in theirs, their
        assert our in (NOTHING, *ours), our
    assert {their for their, *_ in table("Metrics")} - {NOTHING} >= {*re.findall(r'\[mode\]\["(\w+/\w+)"\]', theirs)}
