"""Whole runs of a few steps, in the world or on a user's own pairs."""

import json
from pathlib import Path
from typing import Any

import torch
from composing import compose
from omegaconf import OmegaConf

from dpo import train
from dpo.data.records import Preference, write
from dpo.policy import model as models
from dpo.sweep.identity import identity
from dpo.sweep.plan import resolve
from dpo.sweep.schema import check

ROOT = Path(__file__).parents[1]
SMALL = [
    *(
        "data.demonstrations=32",
        "data.train=12",
        "data.validation=6",
        "data.test=10",
        "sft.steps=3",
        "max_new_tokens=40",
    ),
    *("steps=3", "batch_size=8", "evaluation.log_samples=1", "evaluate_every=0", "threads=1"),
]


def once(*keys: str) -> list[str]:
    """Overrides of which the last of a key counts, as a command line takes them."""
    return [*{key.partition("=")[0]: key for key in keys}.values()]


def frozen(directory: Path, *overrides: str, verb: str = "train") -> Any:
    """The config that a sweep would freeze for these overrides; caches beside the run directory."""
    resolved = resolve(compose(verb, *overrides, f"cache={directory.parent / 'cache'}", "wandb.mode=disabled"))
    check(resolved)
    return OmegaConf.create({"id": identity(resolved), **resolved})


def run(directory: Path, *overrides: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    directory.mkdir(exist_ok=True)
    train.run(frozen(directory, *overrides), directory)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return rows, json.loads((directory / "evaluation.json").read_text())


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows if row["split"] == "train"]


def own_pairs(path: Path) -> Path:
    pairs = [
        Preference(f"\n\nHuman: What is {n} and {n}?\n\nAssistant:", f" It is {2 * n}.", f" Is it {3 * n}?")
        for n in range(30)
    ]
    write(path, pairs)
    return path


def own(path: Path, model: str) -> list[str]:
    return [
        *("data=file", f"data.path={own_pairs(path / 'pairs.jsonl')}", "data.validation_fraction=0.2"),
        *(f"policy.path={model}", "lr=1e-3", "max_length=96", "max_new_tokens=6", "steps=3", "batch_size=8"),
        *("evaluation.prompts=4", "evaluation.log_samples=1", "evaluate_every=0"),
    ]


def other_model(path: Path, tiny_model) -> str:
    """The tiny Llama with other weights, and more rows that are no tokens."""
    model, tokenizer = models.load(tiny_model("llama"))
    model.resize_token_embeddings(model.config.vocab_size + 5, mean_resizing=False)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.02)
    models.save(model, tokenizer, path / "other")
    return str(path / "other")
