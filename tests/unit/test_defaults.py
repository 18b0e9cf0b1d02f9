"""Our defaults, as literal tables: whoever changes one changes what every run without it does, and says so here."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_config import config

CONF = Path(__file__).parents[2] / "conf"

ADAPTERS = {"adapter": None, "lora": {"rank": None, "alpha": 32, "targets": "all-linear", "quantize": None}}
SHARED = {  # of all commands
    "seed": 0,
    "data": {
        "_target_": "dpo.world.language.world",
        "summaries": "human",
        "demonstrations": 3200,
        "train": 800,
        "validation": 200,
        "test": 1000,
        "seed": 0,
    },
    "policy": {
        "path": None,
        "base": "world",
        "lr": 5e-4,
        "max_length": 128,
        "max_new_tokens": 48,
        "micro_batch_tokens": 4096,
        "generation_batch_size": 256,
        "chat_template": None,
        "date": None,
        "trust_remote_code": False,
        **ADAPTERS,
    },
    "judge": {"_target_": "dpo.judges.gold", "_partial_": True},
    "sft": {"batch_size": 32, "lr": 1e-3, "epochs": 1, "steps": None, "schedule": "cosine", "warmup_steps": 10},
    "micro_batch_tokens": 4096,
    "packed": True,
    "activation_checkpointing": False,
    "max_length": 128,
    "max_new_tokens": 48,
    "on_too_long": "error",
    "optimizer": "adamw",
    "adam_betas": [0.9, 0.99],
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "precision": "fp32",
    "device": "auto",
    "processes": 1,
    "threads": None,
    "sharding": {"group": None, "offload": False},
    "evaluate_every": 20,
    "checkpoint_every": 50,
    "checkpoints_kept": 2,
    "evaluation": {"prompts": 1000, "temperature": 1.0, "batch_size": 256, "instructions": None, "log_samples": 8},
    "wandb": {"mode": "auto", "project": "dpo", "entity": None},
    "runs": "runs",
    "cache": "cache",
}
TRAIN = {
    **SHARED,
    "rule": None,
    "name": "dev",
    "command": "train",
    "beta": 0.1,
    "lr": 5e-4,
    "loss": {"_target_": "dpo.losses.dpo", "_partial_": True, "beta": 0.1, "label_smoothing": 0.0},
    "reference": {"_target_": "dpo.references.Initial"},
    "scorer": None,
    "engine": {"_target_": "dpo.engines.transformers", "_partial_": True},
    "batch_size": 16,
    "epochs": 1,
    "steps": None,
    "schedule": "linear",
    "warmup_steps": 5,
    "evaluate_prompts": 0,
    "keep": "last",
    "generation": {"samples_per_prompt": 4, "temperature": 1.0, "top_p": 1.0, "pairs_per_prompt": 2, "batch_size": 256},
    "pairs": {
        "off_policy": False,
        "gap": None,
        "label_temperature": 0.0,
        "flip": 0.0,
        "outliers": 0.0,
        "outlier": "another",
    },
    "evaluation": {**SHARED["evaluation"], "judge": None, "engine": None, "rule": None, "baseline": "initial"},
}
SFT = {**SHARED, "name": "sft", "command": "sft"}
ROUNDS = {**TRAIN, "name": "rounds", "command": "rounds", "rounds": 3, "held_to": "previous", "prompts": "fresh"}
EVALUATE = {**TRAIN, "name": "evaluations", "command": "evaluate", "against": None, "best_of": 1}
SHOW = {**TRAIN, "name": "shown", "command": "show", "against": "initial", "of": "test"}
SHOW["evaluation"] = {**TRAIN["evaluation"], "prompts": 8}
DATA = {**TRAIN, "command": "data", "report": "data_report"}
SCORE = {**TRAIN, "name": "scores", "command": "score", "per_token": False}

PRETRAINED = {
    "path": None,
    "base": None,
    "lr": 5e-7,
    "max_length": 1024,
    "max_new_tokens": 256,
    "micro_batch_tokens": 4096,
    "generation_batch_size": 16,
    "chat_template": None,
    "date": None,
    "trust_remote_code": False,
    **ADAPTERS,
}
LARGER = {"max_length": 2048, "max_new_tokens": 1024, "micro_batch_tokens": 2048, "generation_batch_size": 8}
LARGE = {**PRETRAINED, **LARGER}
CALLED = {"_partial_": True}
DPO_INSIDE = {"_target_": "dpo.losses.dpo", **CALLED, "label_smoothing": 0.0}
IPO_INSIDE = {"_target_": "dpo.losses.ipo", **CALLED, "average": "sequence"}
ASKED = {"model": None, "temperature": 0.0, "attempts": 3}
DYNAMIC = {
    "_target_": "dpo.losses.BetaDPO",
    **CALLED,
    "beta": 0.1,
    "objective": DPO_INSIDE,
    "level": "batch",
    "alpha": 0.6,
    "scale": "reward",
    "order": "paper",
    "least_beta": 1e-3,
    "filter": "weighted",
    "filter_by": "margin",
    "keep": 0.8,
    "momentum": 0.9,
    "seed": "${seed}",
}
SPLITS = {"config": None, "split": None, "validation_split": None}
PUBLISHED = {"path": None, "validation_path": None, "validation_fraction": 0.05, "on_faulty": "drop"}
FOLDER = "runs/references/data.summaries"
OPTIONS: dict[str, dict[str, Any]] = {  # as they are written; those of the defaults are above
    "data/file": {
        "_target_": "dpo.data.records.file",
        "path": "???",
        "validation_path": None,
        **SPLITS,
        "columns": None,
        "chat": False,
        "prompt": None,
        "validation_fraction": 0.05,
        "on_faulty": "error",
    },
    "data/alpaca_eval": {
        "_target_": "dpo.data.prompts.alpaca_eval",
        "path": None,
        "train": None,
        "part": 0,
        "validation": 100,
        "test": 200,
        "on_faulty": "drop",
    },
    "data/hc3": {"_target_": "dpo.data.hub.hc3", **PUBLISHED, "chosen": "human", "chat": False},
    "data/mixture": {
        "_target_": "dpo.data.mixture.mixture",
        "sources": "???",
        "validation_fraction": 0.05,
        "on_faulty": "error",
    },
    "data/ranked": {
        "_target_": "dpo.data.ranked.ranked",
        **PUBLISHED,
        "path": "???",
        **SPLITS,
        "columns": None,
        "chat": False,
        "pairs": "best_worst",
        "on_faulty": "error",
    },
    "data/sft": {
        "_target_": "dpo.data.demonstrations.sft",
        **PUBLISHED,
        "path": "???",
        **SPLITS,
        "columns": None,
        "chat": False,
        "turns": "last",
        "on_faulty": "error",
    },
    "data/shp": {"_target_": "dpo.data.hub.shp", **PUBLISHED, "min_ratio": 2.0, "chat": False},
    "data/stack_exchange": {
        "_target_": "dpo.data.ranked.stack_exchange",
        **PUBLISHED,
        "split": "train[:1%]",
        "pairs": "all",
        "chat": False,
    },
    "data/ultrachat": {"_target_": "dpo.data.demonstrations.ultrachat", **PUBLISHED, "turns": "last"},
    "data/webgpt": {"_target_": "dpo.data.hub.webgpt", **PUBLISHED, "chat": False},
    "data/hh": {
        "_target_": "dpo.data.hub.hh",
        "path": None,
        "validation_path": None,
        "subset": None,
        "chat": False,
        "validation_fraction": 0.05,
        "on_faulty": "drop",
    },
    "data/prompts": {
        "_target_": "dpo.data.prompts.prompts",
        "path": "???",
        "config": None,
        "split": None,
        "columns": None,
        "chat": False,
        "train": None,
        "part": 0,
        "validation": 200,
        "test": 1000,
        "on_faulty": "error",
    },
    "data/tldr": {
        "_target_": "dpo.data.hub.tldr",
        "path": None,
        "validation_path": None,
        "validation_fraction": 0.05,
        "on_faulty": "drop",
    },
    "data/ultrafeedback": {
        "_target_": "dpo.data.hub.ultrafeedback",
        "path": None,
        "validation_path": None,
        "repository": "allenai/ultrafeedback_binarized_cleaned",
        "validation_fraction": 0.05,
        "on_faulty": "drop",
    },
    "data/unpaired": {
        "_target_": "dpo.data.hub.unpaired",
        "path": None,
        "validation_path": None,
        "repository": "trl-lib/kto-mix-14k",
        "config": None,
        "split": None,
        "validation_split": None,
        "columns": None,
        "chat": False,
        "validation_fraction": 0.05,
        "on_faulty": "error",
    },
    "data/cnn_dailymail": {
        "_target_": "dpo.data.prompts.cnn_dailymail",
        "path": None,
        "instruction": "Sum up this article in two sentences at most, as briefly as you can.",
        "train": None,
        "part": 0,
        "validation": 200,
        "test": 1000,
        "on_faulty": "drop",
    },
    "data/world": {**SHARED["data"], "seed": "${seed}"},
    "engine/endpoint": {
        "_target_": "dpo.engines.Endpoint",
        **CALLED,
        "served": None,
        "tolerance": 0.1,
        "cache": "${cache}",
    },
    "engine/ray": {
        "_target_": "dpo.engines.Ray",
        **CALLED,
        "cache": "${cache}",
        "trust_remote_code": "${policy.trust_remote_code}",
        "pool": {
            **{"concurrency": 1, "batch_size": 1, "num_cpus": 1.0, "num_gpus": 0.0, "resources": None},
            **{"max_restarts": 3, "max_task_retries": 3, "address": None},
        },
    },
    "engine/transformers": {"_target_": "dpo.engines.transformers", **CALLED},
    "engine/vllm": {
        "_target_": "dpo.engines.Vllm",
        **CALLED,
        "dtype": "float32",
        "tolerance": 0.1,
        "cache": "${cache}",
        "llm": {
            "max_model_len": "${max_length}",
            "gpu_memory_utilization": 0.5,
            "tensor_parallel_size": 1,
            "enforce_eager": False,
            "enable_chunked_prefill": False,
            "trust_remote_code": "${policy.trust_remote_code}",
        },
    },
    "judge/gold": SHARED["judge"],
    "judge/hasty": {"_target_": "dpo.judges.hasty", **CALLED},
    "judge/none": {"judge": None},
    "judge/pairwise": {
        "_target_": "dpo.judges.Pairwise",
        **CALLED,
        **ASKED,
        "criterion": "how well it does what was asked, truthfully and without padding",
        "max_tokens": 512,
    },
    "judge/questions": {
        "_target_": "dpo.judges.Questions",
        **CALLED,
        **ASKED,
        "max_tokens": 1024,
        "cache": "${cache}",
    },
    "judge/reward_model": {
        "_target_": "dpo.judges.RewardModel",
        **CALLED,
        "path": None,
        "max_length": 2048,
        "pool": None,
    },
    "judge/reward_model_ray": {
        "pool": {
            **{"concurrency": 1, "batch_size": 32, "num_cpus": 1.0, "num_gpus": 0.0, "resources": None},
            **{"max_restarts": 3, "max_task_retries": 3, "address": None},
        },
    },
    "judge/shorter": {"_target_": "dpo.judges.shorter", **CALLED},
    "loss/alpha_dpo": {
        "_target_": "dpo.losses.AlphaDPO",
        **CALLED,
        "beta": 2.5,
        "gamma_beta_ratio": 0.6,
        "alpha": 0.2,
        "momentum": 0.9,
    },
    "loss/aot": {"_target_": "dpo.losses.aot", **CALLED, "beta": 0.1, "label_smoothing": 0.0},
    "loss/aot_unpaired": {"_target_": "dpo.losses.aot_unpaired", **CALLED, "beta": 0.1, "label_smoothing": 0.0},
    "loss/apo_down": {"_target_": "dpo.losses.apo_down", **CALLED, "beta": 0.1},
    "loss/apo_zero": {"_target_": "dpo.losses.apo_zero", **CALLED, "beta": 0.1},
    "loss/bco": {"_target_": "dpo.losses.BCO", **CALLED, "beta": 0.1},
    "loss/beta_dpo": DYNAMIC,
    "loss/beta_ipo": {**DYNAMIC, "objective": IPO_INSIDE},
    "loss/beta_kto": {
        **DYNAMIC,
        "objective": {"_target_": "dpo.losses.kto_paired", **CALLED, "gradient_of_baseline": True},
    },
    "loss/beta_simpo": {
        **DYNAMIC,
        "beta": 2.0,
        "objective": {"_target_": "dpo.losses.simpo", **CALLED, "gamma_beta_ratio": 0.5},
    },
    "loss/cal_dpo": {"_target_": "dpo.losses.cal_dpo", **CALLED, "beta": 0.002, "weight": 0.5},
    "loss/cdpo": {"_target_": "dpo.losses.dpo", **CALLED, "beta": 0.1, "label_smoothing": "???"},
    "loss/chi_po": {"_target_": "dpo.losses.chi_po", **CALLED, "beta": 0.05, "clip": None},
    "loss/cpo": {"_target_": "dpo.losses.cpo", **CALLED, "beta": 0.1, "alpha": 1.0},
    "loss/dpo": TRAIN["loss"],
    "loss/dpop": {"_target_": "dpo.losses.dpop", **CALLED, "beta": 0.3, "penalty": 50.0},
    "loss/dr_dpo": {
        "_target_": "dpo.losses.dr_dpo",
        **CALLED,
        "beta": 0.1,
        "objective": DPO_INSIDE,
        "beta_prime": 1.0,
    },
    "loss/dr_ipo": {
        "_target_": "dpo.losses.dr_dpo",
        **CALLED,
        "beta": 0.1,
        "objective": IPO_INSIDE,
        "beta_prime": 1.0,
    },
    "loss/exo": {"_target_": "dpo.losses.exo", **CALLED, "beta": 0.1, "label_smoothing": 0.001},
    "loss/f_dpo": {"_target_": "dpo.losses.f_dpo", **CALLED, "beta": 0.1, "divergence": "js", "alpha": 0.5},
    "loss/hinge": {"_target_": "dpo.losses.hinge", **CALLED, "beta": 0.1},
    "loss/ipo": {"_target_": "dpo.losses.ipo", **CALLED, "beta": 0.1, "average": "sequence"},
    "loss/kto": {
        "_target_": "dpo.losses.kto",
        **CALLED,
        "beta": 0.1,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
    },
    "loss/kto_paired": {
        "_target_": "dpo.losses.kto_paired",
        **CALLED,
        "beta": 0.1,
        "gradient_of_baseline": True,
    },
    "loss/ld_dpo": {"_target_": "dpo.losses.ld_dpo", **CALLED, "beta": 0.1, "alpha": "???"},
    "loss/length_normalized": {"_target_": "dpo.losses.length_normalized", **CALLED, "beta": 5.0},
    "loss/nca": {"_target_": "dpo.losses.nca", **CALLED, "beta": 0.1},
    "loss/orpo": {"_target_": "dpo.losses.orpo", **CALLED, "beta": 0.1},
    "loss/r_dpo": {"_target_": "dpo.losses.r_dpo", **CALLED, "beta": 0.1, "alpha": 0.05},
    "loss/robust": {"_target_": "dpo.losses.robust", **CALLED, "beta": 0.1, "label_smoothing": 0.1},
    "loss/rpo": {"_target_": "dpo.losses.rpo", **CALLED, "beta": 0.1, "alpha": 1.0},
    "loss/sft": {"_target_": "dpo.losses.sft", **CALLED, "beta": 0.1},
    "loss/simpo": {"_target_": "dpo.losses.simpo", **CALLED, "beta": 2.0, "gamma_beta_ratio": 0.5},
    "loss/slic": {"_target_": "dpo.losses.slic", **CALLED, "beta": 0.1, "delta": 1.0},
    "loss/sppo": {"_target_": "dpo.losses.sppo", **CALLED, "beta": 0.001},
    "loss/tdpo": {"_target_": "dpo.losses.tdpo", **CALLED, "beta": 0.1, "alpha": 0.5, "stop_gradient": True},
    "loss/wpo": {"_target_": "dpo.losses.wpo", **CALLED, "beta": 0.01},
    "policy/gemma2_2b": {"path": "google/gemma-2-2b-it"},
    "policy/llama3_8b_instruct": {**LARGER, "path": "meta-llama/Meta-Llama-3-8B-Instruct"},
    "policy/olmo2_1b": {"path": "allenai/OLMo-2-0425-1B-SFT"},
    "policy/pythia_410m": {"base": "EleutherAI/pythia-410m"},
    "policy/pythia_1_4b": {"base": "EleutherAI/pythia-1.4b"},
    "policy/pythia_2_8b": {"base": "EleutherAI/pythia-2.8b"},
    "policy/qwen2_5_0_5b": {"path": "Qwen/Qwen2.5-0.5B-Instruct"},
    "policy/qwen3_0_6b": {"path": "Qwen/Qwen3-0.6B", "chat_template": None},
    "policy/smollm2_135m": {"path": "HuggingFaceTB/SmolLM2-135M-Instruct"},
    "policy/smollm2_360m": {"path": "HuggingFaceTB/SmolLM2-360M-Instruct"},
    "policy/mistral_7b": {**LARGE, "path": "HuggingFaceH4/mistral-7b-sft-beta"},
    "policy/pretrained": PRETRAINED,
    "policy/qwen2_1_5b": {**LARGE, "base": "Qwen/Qwen2-1.5B"},
    "policy/base": {**SHARED["policy"], "base": "world_base"},
    "policy/small": {**SHARED["policy"], "base": "world_small"},
    "policy/tiny": SHARED["policy"],
    "policy/tulu_2_7b": {**LARGE, "path": "allenai/tulu-2-7b"},
    "reference/precomputed": {"_target_": "dpo.references.PrecomputedFiles", "path": "???"},
    "reference/initial": {"_target_": "dpo.references.Initial"},
    "reference/llama3_70b_instruct": {
        "_target_": "dpo.references.PrecomputedFiles",
        "path": "runs/llama3_70b_instruct",
    },
    "reference/mistral_7b_instruct": {
        "_target_": "dpo.references.OtherTokenizer",
        "path": "mistralai/Mistral-7B-Instruct-v0.2",
        "max_length": None,
        "by_text": False,
    },
    "reference/ema": {"_target_": "dpo.references.EMA", "alpha": 0.6, "every": 10},
    "reference/live": {"_target_": "dpo.references.Live", "path": None},
    "reference/other": {"_target_": "dpo.references.Frozen", "path": "???"},
    "reference/other_tokenizer": {
        "_target_": "dpo.references.OtherTokenizer",
        "path": "???",
        "max_length": None,
        "by_text": False,
    },
    "reference/unconditional": {"_target_": "dpo.references.Unconditional", "path": None, "prompt": ""},
    "reference/reference_free": {"_target_": "dpo.references.ReferenceFree"},
    "reference/world_alien": {
        "_target_": "dpo.references.Frozen",
        "path": f"{FOLDER}=alien_clean,seed=${{seed}}/policy",
    },
    "reference/world_clean": {"_target_": "dpo.references.Frozen", "path": f"{FOLDER}=clean,seed=${{seed}}/policy"},
    "reference/world_other_tokenizer": {
        "_target_": "dpo.references.OtherTokenizer",
        "path": "runs/references_phrases/seed=${seed}/policy",
        "max_length": None,
        "by_text": True,
    },
    "rule/accurate_then_short": {
        "_target_": "dpo.judges.accurate_then_short",
        **CALLED,
        "threshold": 3,
        "min_length_diff": 3,
        "tie_below_threshold": "tie",
    },
    "rule/none": {"rule": None},
    "scorer/here": {"scorer": None},
    "scorer/ray": {
        "_target_": "dpo.policy.pool.Pool",
        "concurrency": 1,
        "batch_size": 4,
        "num_cpus": 1.0,
        "num_gpus": 0.0,
        "resources": None,
        "max_restarts": 3,
        "max_task_retries": 3,
        "address": None,
    },
    "scorer/vllm": {
        "_target_": "dpo.vllm_scorer.VllmScorer",
        "batch_size": 256,
        "cache": "${cache}",
        "llm": {
            "gpu_memory_utilization": 0.4,
            "tensor_parallel_size": 1,
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "trust_remote_code": "${policy.trust_remote_code}",
        },
    },
    "server/local": {
        "url": "http://localhost:8000/v1",
        "key": None,
        "concurrency": 8,
        "timeout": 120.0,
        "retries": 5,
        "requests_per_minute": None,
        "prices": None,
    },
    "reference/world_tuned": {"_target_": "dpo.references.Frozen", "path": "runs/tuned/seed=${seed}/policy"},
    "hydra/launcher/local": {"_target_": "hydra_plugins.dpo_launchers.Local", "jobs": None},
    "hydra/launcher/slurm": {
        "_target_": "hydra_plugins.dpo_launchers.Slurm",
        "_convert_": "all",
        "partition": None,
        "account": None,
        "time": "04:00:00",
        "nodes": 1,
        "gpus": 0,
        "cpus": 4,
        "memory": None,
        "array_limit": 16,
        "grace": 120,
        "restarts": 100,
        "before": [],
        "container": None,
        "python": None,
        "options": [],
        "submit": True,
    },
    "hydra/sweeper/grid": {"_target_": "hydra_plugins.dpo_launchers.Grid", "params": None},
}
TEMPLATES = tuple(
    f"policy/{name}" for name in ("mistral_7b", "qwen2_1_5b", "qwen3_0_6b", "tulu_2_7b")
)  # what they render is tested elsewhere


@pytest.mark.parametrize(
    "command,expected",
    [
        ("train", TRAIN),
        ("sft", SFT),
        ("score", SCORE),
        ("rounds", ROUNDS),
        ("data", DATA),
        ("evaluate", EVALUATE),
        ("show", SHOW),
    ],
)
def test_defaults_of_a_command(command, expected):
    assert config(command=command) == expected


def test_options():
    files = sorted(file for file in CONF.rglob("*.yaml") if file.parent != CONF)
    found: dict[str, Any] = {}
    for file in files:
        option = str(file.relative_to(CONF).with_suffix(""))
        found[option] = OmegaConf.to_container(OmegaConf.load(file))
        found[option].pop("defaults", None)
        if option in TEMPLATES:
            assert found[option]["chat_template"]
            found[option]["chat_template"] = None
    assert found == OPTIONS


def test_policies_have_the_defaults_of_a_pretrained_one():
    found = config("policy=smollm2_135m", "data=file", "data.path=x")["policy"]
    assert found == {**PRETRAINED, "path": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def test_what_is_pushed():
    page = OmegaConf.to_container(OmegaConf.load(CONF / "push.yaml"))
    assert {key: page[key] for key in page.keys() - {"defaults", "hydra"}} == {
        "run": "???",
        "repo": "???",
        "private": True,
        "dry_run": False,
    }


def test_a_default_follows_its_home():
    """Keys whose default is another key, where that is not its own default."""
    given = [
        "seed=3",
        "loss=simpo",
        "policy=pretrained",
        "policy.path=x",
        "policy.lr=3e-3",
        "policy.generation_batch_size=5",
    ]
    given += ["policy.max_length=90", "policy.max_new_tokens=30", "policy.micro_batch_tokens=70"]
    found = config(*given, "reference=world_clean")
    assert found["data"]["seed"] == 3
    assert found["beta"] == 2.0
    assert found["reference"]["path"] == "runs/references/data.summaries=clean,seed=3/policy"
    limits = {"max_length": 90, "max_new_tokens": 30, "micro_batch_tokens": 70}
    assert {key: found[key] for key in ("lr", *limits)} == {"lr": 3e-3, **limits}
    assert (found["generation"]["batch_size"], found["evaluation"]["batch_size"]) == (5, 5)
    of_sft = config("seed=3", *given[2:], "policy.base=x", command="sft")
    assert of_sft["data"]["seed"] == 3
    assert {key: of_sft[key] for key in limits} == limits
    assert of_sft["evaluation"]["batch_size"] == 5


@pytest.mark.parametrize("data", ["file", "hh", "tldr", "ultrafeedback", "shp", "ranked", "stack_exchange", "sft"])
@pytest.mark.parametrize("command", ["train", "sft", "score"])
def test_data_of_ones_own_has_a_pretrained_policy_and_no_judge(data, command):
    found = config(f"data={data}", "data.path=x", "policy.path=x", "policy.base=x", command=command)
    assert found["policy"] == {**PRETRAINED, "path": "x", "base": "x"}
    assert found["judge"] is None


@pytest.mark.parametrize("command", ["train", "sft", "score"])
def test_how_a_command_is_launched(command):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        found = compose(command, return_hydra_config=True).hydra
    assert found.launcher == OPTIONS["hydra/launcher/local"]
    assert found.sweeper == OPTIONS["hydra/sweeper/grid"]
    assert (found.output_subdir, found.run.dir) == (None, ".")
