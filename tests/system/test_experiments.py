"""Experiment files: their grids become runs, the command line wins over them, and no run is named after one."""

import math
from pathlib import Path
from typing import Any

import pytest
from composing import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from test_launch import built, said, states, tree  # noqa: F401

from dpo.sweep.identity import flatten
from dpo.sweep.plan import resolve
from dpo.sweep.schema import check

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "experiments/figure").glob("*.yaml"), *(ROOT / "experiments/table").glob("*.yaml")])

TRIAL = """\
# @package _global_
# A trial.
defaults:
  - override /loss: hinge

name: trial
lr: 3e-4
epochs: 2
hydra:
  mode: MULTIRUN
  sweeper:
    params:
      beta: 0.1,0.2
      seed: 0,1
"""


@pytest.fixture
def trial(tree: Path) -> Path:  # noqa: F811
    (tree / "experiments/table").mkdir(parents=True)
    (tree / "experiments/table/trial.yaml").write_text(TRIAL)
    return tree


@pytest.mark.long
def test_the_grid_of_a_file_is_run(trial):
    text = said(trial, "table=trial", "device=cpu", code=0)
    assert "runs/trial: 4 runs: 0 finished, 4 to do" in text
    names = {f"beta={beta},seed={seed}" for beta in (0.1, 0.2) for seed in (0, 1)}
    assert set(states(trial / "runs/trial")) == names
    for file in (trial / "runs/trial").glob("*/config.yaml"):
        frozen = OmegaConf.load(file)
        assert (frozen.loss._target_, frozen.lr, frozen.epochs, frozen.name) == ("dpo.losses.hinge", 3e-4, 2, "trial")
        assert not {"figure", "table"} & (set(frozen) | set(frozen.choices))
    assert "4 runs: 4 finished, 0 to do" in said(trial, "table=trial", code=0)
    # The same settings by hand are the same run.
    text = said(trial, "loss=hinge", "beta=0.1", "seed=0", "lr=3e-4", "epochs=2", "name=trial", code=0)
    assert "1 run: 1 finished, 0 to do" in text


@pytest.mark.long
def test_the_command_line_wins(trial):
    text = said(trial, "table=trial", "seed=5", "loss=dpo", "lr=1e-3", "name=mine", "device=cpu", code=0)
    assert "runs/mine: 2 runs: 0 finished, 2 to do" in text
    for file in (trial / "runs/mine").glob("*/config.yaml"):
        frozen = OmegaConf.load(file)
        assert (frozen.loss._target_, frozen.lr, frozen.seed, frozen.epochs) == ("dpo.losses.dpo", 1e-3, 5, 2)
    text = said(trial, "table=trial", "beta=0.1,0.3", "seed=0", "device=cpu", code=0)
    assert set(states(trial / "runs/trial")) == {"beta=0.1,seed=0", "beta=0.3,seed=0"}


def test_a_wrong_grid_starts_nothing(trial):
    text = said(trial, "table=trial", "seed=0,-1", code=1)
    assert "seed must be at least 0" in text
    assert ", got nope; take one" in said(trial, "table=nope", code=1)
    assert not (trial / "runs").exists()


def axes(file: Path) -> dict[str, list[str]]:
    """The values of each axis of an experiment's grid, as written."""
    found = {}
    params = OmegaConf.load(file).hydra.sweeper.params
    for override in OverridesParser.create().parse_overrides([f"{key}={values}" for key, values in params.items()]):
        values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]
        found[override.get_key_element()] = values
    return found


def grid(file: Path) -> list[list[str]]:
    """Overrides of some runs of an experiment, in which each value of each axis occurs."""
    found = {key: values[:1] if key == "seed" else values for key, values in axes(file).items()}
    runs = [
        [f"{key}={values[n % len(values)]}" for key, values in found.items()]
        for n in range(max(map(len, found.values()), default=1))
    ]
    return [[f"{file.parent.name}={file.stem}", *run] for run in runs]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_experiment_can_be_planned(file):
    for overrides in grid(file):
        config = compose("train", *overrides)
        assert config.name == file.stem
        check(resolve(config))
    page = OmegaConf.load(file)
    assert page.hydra.mode == "MULTIRUN"
    assert {*page.hydra} == {"mode", "sweeper"}  # it says nothing of the machine that it runs on
    assert "launcher" not in str(page.defaults)
    header = file.read_text().split("defaults:")[0]
    assert f"python -m dpo.train {file.parent.name}={file.stem}" in header
    index = (ROOT / "experiments/README.md").read_text()
    assert f"{file.parent.name}={file.stem}" in index


# What each experiment comes to, key by key where that is not a default: first as published (2407.13709), then our own.
PUBLISHED = {
    "lr": 5e-7,
    "batch_size": 32,
    "epochs": 3,
    "steps": None,
    "optimizer": "adamw",
    "adam_betas": [0.9, 0.999],
    "weight_decay": 0.01,
    "schedule": "linear",
    "warmup_steps": 0.1,
    "max_grad_norm": 1.0,
    "max_length": 2048,
    "precision": "bf16",
    "evaluate_every": 500,
    "keep": "best",
    "processes": 8,
    "loss._target_": "dpo.losses.dpo",
    "loss.label_smoothing": 0.0,
    "reference._target_": "dpo.references.Initial",
    "data._target_": "dpo.data.hub.ultrafeedback",
    "data.repository": "allenai/ultrafeedback_binarized_cleaned",
    "policy.lr": 5e-7,
    "policy.max_length": 2048,
}
PAPER = {
    **PUBLISHED,
    "on_too_long": "truncate",
    "checkpoint_every": 500,
    "max_new_tokens": 1024,
    "policy.max_new_tokens": 1024,
    **dict.fromkeys(["micro_batch_tokens", "policy.micro_batch_tokens"], 2048),
    **dict.fromkeys(["policy.generation_batch_size", "generation.batch_size", "evaluation.batch_size"], 8),
    "evaluation.prompts": 200,
    "evaluation.temperature": 0.7,
    "evaluation.log_samples": 0,
    "data.on_faulty": "drop",
    "data.validation_fraction": 0.05,
    "judge": None,
}
MISTRAL = {"policy.path": "HuggingFaceH4/mistral-7b-sft-beta", "policy.base": None}
TULU = {"policy.path": "allenai/tulu-2-7b", "policy.base": None}
QWEN = {
    "policy.path": None,
    "policy.base": "Qwen/Qwen2-1.5B",
    "sft.batch_size": 32,
    "sft.lr": 2e-5,
    "sft.warmup_steps": 0.1,
}
SIBLING = {
    "reference._target_": "dpo.references.OtherTokenizer",
    "reference.path": "mistralai/Mistral-7B-Instruct-v0.2",
    "reference.by_text": False,
}
LARGE = {"reference._target_": "dpo.references.PrecomputedFiles", "reference.path": "runs/llama3_70b_instruct"}
PRIOR = {"reference._target_": "dpo.references.Unconditional", "reference.path": None, "reference.prompt": ""}
TUNED = "runs/paper_kl_strength/beta=0.01,policy=mistral_7b/policy"
HH = {  # 2407.08639, as its code has it
    "data._target_": "dpo.data.hub.hh",
    "data.chat": False,
    **{"data.on_faulty": "drop", "data.validation_fraction": 0.05, "on_too_long": "truncate", "judge": None},
    **{"policy.path": None, "policy.base": "EleutherAI/pythia-2.8b", "beta": 0.1, "epochs": 1},
    **{"batch_size": 64, "lr": 5e-7, "optimizer": "rmsprop", "schedule": "constant", "warmup_steps": 150},
    **{"sft.batch_size": 64, "sft.lr": 5e-7, "sft.schedule": "constant", "sft.warmup_steps": 150, "sft.epochs": 1},
    **{"max_grad_norm": 10.0, "precision": "bf16", "processes": 8, "evaluate_every": 312, "checkpoint_every": 500},
    **{"max_length": 512, "policy.max_length": 512, "policy.lr": 5e-7},
    **dict.fromkeys(["max_new_tokens", "policy.max_new_tokens"], 256),
    **dict.fromkeys(["policy.generation_batch_size", "generation.batch_size", "evaluation.batch_size"], 16),
    **{"evaluation.baseline": "human", "evaluation.log_samples": 0},
}
BETA_DPO = {
    **{"loss._target_": "dpo.losses.BetaDPO", "loss.label_smoothing": "missing", "loss.seed": 0},
    **{"loss.objective._target_": "dpo.losses.dpo", "loss.objective._partial_": True},
    **{"loss.objective.label_smoothing": 0.0, "loss.level": "batch", "loss.alpha": 0.6, "loss.keep": 0.8},
    **{"loss.momentum": 0.9, "loss.scale": "reward", "loss.order": "paper", "loss.least_beta": 1e-3},
    **{"loss.filter": "weighted", "loss.filter_by": "margin"},
}
TLDR = {  # 2406.02900
    **{"data._target_": "dpo.data.hub.tldr", "data.on_faulty": "drop", "data.validation_fraction": 0.05},
    **{"judge": None, "policy.path": None, "policy.base": "EleutherAI/pythia-6.9b", "beta": 0.5, "loss.beta": 0.5},
    **{"batch_size": 128, "epochs": 1, "lr": 5e-7, "optimizer": "rmsprop", "schedule": "constant"},
    **{
        "warmup_steps": 150,
        "policy.lr": 5e-7,
        "precision": "bf16",
        "processes": 8,
        "on_too_long": "truncate",
        "evaluate_every": 145,
    },
    **{"evaluate_prompts": 256, "checkpoint_every": 145, "evaluation.baseline": "human", "evaluation.prompts": 256},
    **dict.fromkeys(["max_length", "policy.max_length"], 1024),
    **dict.fromkeys(["max_new_tokens", "policy.max_new_tokens"], 256),
    **dict.fromkeys(["policy.generation_batch_size", "generation.batch_size", "evaluation.batch_size"], 16),
    "evaluation.log_samples": 0,
}
WORLD = {"threads": 1, "evaluate_every": 0}
FROZEN = {"reference._target_": "dpo.references.Frozen"}
GAPS = {
    "steps": 100,
    "data.validation": 20,
    "generation.samples_per_prompt": 8,
    "generation.pairs_per_prompt": 28,
    "evaluation.prompts": 500,
}
RECIPES = {
    "table=paper_kl_strength policy=mistral_7b": PAPER | MISTRAL,
    "table=paper_kl_strength policy=tulu_2_7b": PAPER | TULU,
    "table=paper_necessity policy=mistral_7b reference=reference_free": {
        **PAPER,
        **MISTRAL,
        "reference._target_": "dpo.references.ReferenceFree",
    },
    "table=paper_necessity policy=mistral_7b reference=unconditional": PAPER | MISTRAL | PRIOR,
    "table=paper_compatibility policy=tulu_2_7b reference=mistral_7b_instruct": PAPER | TULU | SIBLING,
    "table=paper_compatibility policy=mistral_7b reference=llama3_70b_instruct": PAPER | MISTRAL | LARGE,
    "table=paper_small_policy policy=qwen2_1_5b": PAPER | QWEN,
    "table=paper_tuned_reference policy=mistral_7b": PAPER | MISTRAL | FROZEN | {"reference.path": TUNED},
    "table=paper_alpha_dpo beta=2.5": {
        **PAPER,
        "data.repository": "allenai/ultrafeedback_binarized_cleaned",  # not read: data.path is given
        "policy.path": "meta-llama/Meta-Llama-3-8B-Instruct",
        "policy.base": None,
        "loss._target_": "dpo.losses.AlphaDPO",
        **{"loss.gamma_beta_ratio": 0.6, "loss.alpha": 0.2, "loss.momentum": 0.9, "loss.label_smoothing": "missing"},
        **{"beta": 2.5, "loss.beta": 2.5, "lr": 1e-6, "policy.lr": 1e-6, "seed": 42},
        **{"batch_size": 128, "epochs": 1, "schedule": "cosine", "weight_decay": 0.0, "keep": "last"},
    },
    "table=paper_beta_dpo policy.base=EleutherAI/pythia-2.8b loss=beta_dpo": HH | BETA_DPO,
    "table=paper_beta_dpo policy.base=EleutherAI/pythia-2.8b loss=dpo": HH,
    "table=paper_tldr policy.base=EleutherAI/pythia-6.9b loss=ipo beta=0.5": TLDR
    | {"loss._target_": "dpo.losses.ipo", "loss.average": "sequence", "loss.label_smoothing": "missing"},
    "figure=kl_strength": WORLD | {"evaluate_every": 25, "evaluate_prompts": 250},
    "table=necessity reference=unconditional": WORLD | PRIOR,
    "table=objectives loss=dpo": {**WORLD, "evaluation.prompts": 500},
    "table=label_noise": {**WORLD, "evaluation.prompts": 500},
    "figure=dynamic_beta": {**WORLD, **GAPS},
    "figure=over_optimization": {
        **WORLD,
        "evaluation.prompts": 500,
        "evaluation.judge._target_": "dpo.judges.gold",
        "evaluation.judge._partial_": True,
    },
    "figure=smollm2_hh": {
        **{"data._target_": "dpo.data.hub.hh", "data.on_faulty": "drop", "data.validation_fraction": 0.05},
        **{"data.subset": "harmless-base", "data.chat": True, "judge": None},
        **{"policy.path": "HuggingFaceTB/SmolLM2-135M-Instruct", "policy.base": None, "policy.lr": 2e-5},
        **{"policy.max_length": 320, "policy.max_new_tokens": 192, "max_length": 320, "max_new_tokens": 192},
        **dict.fromkeys(["policy.generation_batch_size", "generation.batch_size", "evaluation.batch_size"], 16),
        **{"steps": 16, "lr": 2e-5, "schedule": "cosine", "warmup_steps": 0.1, "on_too_long": "drop", "threads": 1},
        **{"evaluate_every": 0, "checkpoint_every": 0, "evaluation.prompts": 32, "evaluation.log_samples": 0},
    },
    "table=dynamic_beta_mixtures loss=dpo": {**WORLD, **GAPS, "loss.keep": 1},
    "table=dynamic_beta_filters loss=dpo": {**WORLD, "loss.filter_by": "gradient", "evaluation.prompts": 500},
    "table=dynamic_beta_variants loss=dpo": {**WORLD, "loss.keep": 1, "evaluation.prompts": 500},
    "table=dynamic_beta_sizes": {**WORLD, "evaluation.prompts": 500},
    "table=compatibility reference=world_clean seed=3": {
        **WORLD,
        **FROZEN,
        "reference.path": "runs/references/data.summaries=clean,seed=3/policy",
        **{"seed": 3, "data.seed": 3},
    },
    "table=tuned_reference reference=world_tuned seed=2": {
        **WORLD,
        **FROZEN,
        "reference.path": "runs/tuned/seed=2/policy",
        **{"seed": 2, "data.seed": 2},
    },
}


@pytest.fixture(scope="module")
def composed():
    """`composed(*overrides)`: the keys of a run, flat; without those of its chat template."""

    def compose_run(*overrides: str) -> dict[str, Any]:
        keys = flatten(resolve(compose("train", *overrides)))
        return {key: value for key, value in keys.items() if key != "policy.chat_template"}

    return compose_run


@pytest.fixture(scope="module")
def defaults(composed):
    return composed()


@pytest.mark.parametrize("given", RECIPES)
def test_recipes(composed, defaults, given):
    found, expected = composed(*given.split()), RECIPES[given]
    groups = ("data.", "judge.", "reference.", "loss.", "evaluation.judge")  # another option has other keys
    differ = {key for key, value in found.items() if defaults.get(key) != value or key not in defaults} - {"name"}
    differ = {key for key in differ if found[key] is not None or key in defaults or key in expected}
    assert {key: found.get(key, "missing") for key in differ | {*expected}} == expected
    gone = {key for key in defaults if key not in found}
    assert all(key.startswith(groups) for key in gone)


TEN = [*map(str, range(10))]
SEEDS = TEN[:5]
SELF = ["0.1", "0.05", "0.02", "0.01", "0.005"]
OTHER = ["10", "1", "0.1", "0.01", "0.005"]
GRIDS = {
    "paper_kl_strength": {"policy": ["mistral_7b", "tulu_2_7b"], "beta": SELF},  # Tables 1 and 2
    "paper_necessity": {  # Table 3; which betas were tried is not known, but the best are 0.01, 100 and 0.01
        "policy": ["mistral_7b"],
        "reference": ["initial", "reference_free", "unconditional"],
        "beta": ["0.01", "0.1", "1", "10", "100"],
    },
    "paper_compatibility": {  # Tables 4 and 5
        "policy": ["mistral_7b", "tulu_2_7b"],
        "reference": ["mistral_7b_instruct", "llama3_70b_instruct"],
        "beta": OTHER,
    },
    "paper_small_policy": {"policy": ["qwen2_1_5b"], "beta": [*SELF, "0.001"]},  # Table 6
    "paper_tuned_reference": {"policy": ["mistral_7b"], "beta": OTHER},  # Table 7
    "paper_alpha_dpo": {"beta": ["2.5"]},  # 2410.10148
    "paper_beta_dpo": {  # Table 1 of 2407.08639
        "policy.base": [f"EleutherAI/pythia-{size}" for size in ("410m", "1.4b", "2.8b")],
        "loss": ["dpo", "beta_dpo"],
    },
    "paper_tldr": {
        "policy.base": [f"EleutherAI/pythia-{size}" for size in ("1b", "2.8b", "6.9b")],
        "loss": ["dpo", "ipo", "hinge"],
        "beta": ["0.5"],
    },
    "paper_summarization": {"beta": ["0.01", "0.03", "0.05"]},
    "kl_strength": {
        "beta": ["0.003", "0.01", "0.02", "0.1", "0.3", "1"],
        "lr": ["0.0005", "0.001"],
        "seed": TEN,
    },
    "necessity": {
        "reference": ["initial", "reference_free", "unconditional"],
        "beta": ["0.01", "0.1", "0.3", "1", "10", "100"],
        "seed": SEEDS,
    },
    "rounds": {"seed": TEN},
    "summarization": {
        "beta": ["0.01", "0.03", "0.1", "0.3"],
        "lr": ["0.000125", "0.0005", "0.002"],
        "seed": SEEDS,
    },
    "compatibility": {
        "data.summaries": ["human", "alien"],
        "reference": ["initial", "world_clean", "world_alien", "world_other_tokenizer"],
        "beta": ["10", "1", "0.3", "0.1", "0.01"],
        "seed": SEEDS,
    },
    "objectives": {  # those whose beta is of DPO's scale; tests/unit/test_objectives_study.py has the others
        "loss": [
            *("dpo", "robust", "hinge", "exo", "f_dpo", "chi_po", "wpo", "dr_dpo", "beta_dpo", "aot"),
            *("apo_zero", "apo_down", "nca", "bco", "kto_paired", "beta_kto", "dpop", "rpo", "slic", "r_dpo"),
        ],
        "beta": ["0.01", "0.03", "0.1", "0.3", "1"],
        "seed": [str(seed) for seed in range(3)],
    },
    "tuned_reference": {
        "reference": ["initial", "world_tuned"],
        "beta": ["10", "1", "0.3", "0.1", "0.01"],
        "seed": SEEDS,
    },
    "label_noise": {
        "loss": ["dpo", "ipo", "dr_dpo"],
        "pairs.flip": ["0", "0.1", "0.2", "0.3", "0.4"],
        "beta": ["0.1", "0.3"],
        "seed": SEEDS,
    },
    "over_optimization": {
        "judge": ["hasty", "gold"],
        "beta": ["0.003", "0.01", "0.03", "0.1", "0.3", "1", "3", "10"],
        "seed": SEEDS,
    },
    "smollm2_hh": {"reference": ["initial", "reference_free"], "beta": ["0.01", "0.1", "1", "10"], "seed": ["0"]},
    "dynamic_beta": {
        "pairs.gap": ["low", "0.5", "high"],
        "beta": ["0.01", "0.03", "0.1", "0.3", "1"],
        "seed": TEN,
    },
    "dynamic_beta_mixtures": {
        "pairs.gap": ["0.1", "0.2", "0.3", "0.4"],
        "loss.level": ["population", "instance", "batch"],
        "seed": TEN,
    },
    "dynamic_beta_filters": {
        "loss.filter": ["head", "tail", "head_tail"],
        "loss.alpha": ["0", "0.6"],
        "seed": SEEDS,
    },
    "dynamic_beta_sizes": {
        "policy": ["tiny", "small", "base"],
        "loss": ["dpo", "beta_dpo"],
        "seed": SEEDS,
    },
    "dynamic_beta_variants": {
        "loss": ["beta_dpo", "beta_ipo", "beta_kto"],
        "loss.alpha": ["0", "0.6"],
        "seed": SEEDS,
    },
}


def test_grids():
    """Every published row has its run, and the index of experiments says how many runs there are."""
    assert {file.stem: {key: [*map(str, values)] for key, values in axes(file).items()} for file in FILES} == GRIDS
    index = (ROOT / "experiments/README.md").read_text()
    for name, grid in GRIDS.items():
        if name.startswith("paper_"):
            assert f"table={name}` |" in index
            [line] = [line for line in index.splitlines() if f"table={name}` |" in line]
            assert line.endswith(f"| {math.prod(map(len, grid.values()))} |")
