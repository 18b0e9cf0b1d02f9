"""The model card of a run's policy: what it was made from and how, and what was measured, with intervals."""

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dpo.sweep.identity import identity_keys
from dpo.win_rates import Z

CARD = "README.md"
LIKELIHOOD = "Maximum likelihood of their responses: -log pi(y | x), summed over tokens (nats)."
MEASURED = {  # in this order, where they are
    "win_rate": "win rate over {baseline}, by the judge {judge}",
    "win_rate_lc": "that win rate at equal lengths",
    "kl": "KL(policy \\|\\| policy before training), nats per response",
    "kl_reference": "KL(policy \\|\\| reference), nats per response",
    "kl_baseline": "KL(policy \\|\\| baseline), nats per response",
    "rewards/accuracies": "accuracy of the implicit reward on held-out pairs",
    "loss": "loss on held-out data",
    "length": "length of a response, tokens",
    "ended": "share of responses that end by themselves",
}


@dataclass(frozen=True)
class Facts:
    """What a run knows and its config does not say."""

    initial: str  # fingerprint of the weights before training
    reference: str | None  # fingerprint of what the policy was held to; None: of a fine-tuned one, nothing
    sizes: Mapping[str, int]  # items to train on and held out, by split
    chat: bool  # prompts are chat messages
    ends: tuple[str, ...]  # tokens at which a response ends


class Row(NamedTuple):
    """A measured figure, with its 95 % interval where it has one."""

    name: str
    what: str
    value: float
    interval: tuple[float, float] | None

    @property
    def range(self) -> str:
        return f"[{self.interval[0]:.4g}, {self.interval[1]:.4g}]" if self.interval else ""


def write(policy: Path, config: Mapping[str, Any], result: Mapping[str, float], facts: Facts) -> None:
    """Write the card into the folder of a run's policy. config: of the run. result: what becomes `evaluation.json`.

    Paths are shown as they were given, but of one from the root on the last name alone: the rest is this machine's.
    """
    start, repositories = _start(config["policy"]), _repositories(config)
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+(@.+)?", start) and not Path(start).exists()
    rows = _rows(result, config)
    about = ModelCardData(
        model_name=_title(config),
        base_model=start.partition("@")[0] if on_hub else None,
        datasets=repositories or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["dpo", "preference-optimization"] if "loss" in config else ["sft"],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=repositories[0] if len(repositories) == 1 else _option(config, "data"),
                dataset_name=_option(config, "data"),
                dataset_revision=_contents(config),
                metric_type=row.name,
                metric_name=row.what.replace("\\", "") + (f", 95 % {row.range}" if row.interval else ""),
                metric_value=row.value,
            )
            for row in rows
        ],
    )
    text = _text(config, rows, facts, repositories)
    ModelCard(f"---\n{about.to_yaml()}\n---\n\n{text}").save(policy / CARD)


def _rows(result: Mapping[str, float], config: Mapping[str, Any]) -> list[Row]:
    judge = _option(config, "judge" if config["evaluation"].get("judge") is None else "evaluation.judge")
    words, found = {"judge": judge, "baseline": _shown(config["evaluation"].get("baseline"))}, []
    for name, what in MEASURED.items():
        value, low, high, error = (result.get(name + end) for end in ("", "/low", "/high", "/se"))
        if value is None or not math.isfinite(value):
            continue
        interval = (low, high) if low is not None and high is not None else None
        if error is not None and math.isfinite(error):
            interval = value - Z * error, value + Z * error
        found.append(Row(name, what.format(**words), value, interval))
    return found


def _title(config: Mapping[str, Any]) -> str:
    """No directory's name: that may spell a path of this machine."""
    return f"{config['name']}: {_learned(config)}"


def _learned(config: Mapping[str, Any]) -> str:
    """What was learned: the objective. `dpo.sft` names none."""
    if "loss" not in config:
        return "supervised fine-tuning"
    return f"{_option(config, 'loss')}, beta {config['beta']:g}"


def _text(config: Mapping[str, Any], rows: list[Row], facts: Facts, repositories: list[str]) -> str:
    policy, made, preferences = config["policy"], config.get("provenance", {}), "loss" in config
    recipe = config if preferences else config["sft"]
    revisions = [*dict.fromkeys(made.get("revisions", {}).values())]
    sources = repositories or [_shown(config["data"].get("path"))]
    lora = policy.get("lora") or {}
    first = [_shown(_start(policy)), *(["after SFT"] if preferences and not policy["path"] else [])]
    if lora.get("quantize"):
        first.append(f"linear weights in 4 bits ({lora['quantize']})")
    held = {}
    if preferences:
        reference = config["reference"]
        held["reference"] = ", ".join([_option(config, "reference"), *filter(None, [_shown(reference.get("path"))])])
        held["its digest"] = f"`{facts.reference}`"
    given = {
        "policy before training": ", ".join(first),
        "its weights": f"`{facts.initial}`",
        "trained": f"adapters (LoRA) of rank {lora['rank']}, merged" if lora.get("rank") else "all weights",
        "loss": _learned(config),
        **held,
        "data": ", ".join([_option(config, "data"), *filter(None, sources)]),
        **({"its revision": ", ".join(f"`{one}`" for one in revisions)} if revisions else {}),
        "its size": ", ".join(f"{size} in {split}" for split, size in facts.sizes.items()),
        "digest of its content": f"`{_contents(config)}`",
        "optimizer": f"{config['optimizer']}, {recipe['batch_size']} per step, {config['precision']}",
        "learning rate": f"{recipe['lr']:g} at its peak, {recipe['schedule']}",
        "seed": config["seed"],
    }
    settings = {key: _shown(value) for key, value in identity_keys(dict(config)).items()}
    versions = [f"{key} {value}" for key, value in made.items() if isinstance(value, str) and key != "commit"]
    changed = ", with uncommitted changes" if made.get("uncommitted_changes") else ""
    taught, of_kl, of_ties = LIKELIHOOD, "", ""
    if preferences:
        taught, of_kl, of_ties = _equation(config["loss"]), ", those of KL at 1,", " Ties count one half."
    said = '[{"role": "user", "content": "..."}]' if facts.chat else '"..."'
    return f"""# {_title(config)}

A causal language model that was trained on {"preferences" if preferences else "demonstrations"}. {taught}

```python
from transformers import pipeline

generate = pipeline("text-generation", model="...")  # this repository, or its folder
print(generate({said}, max_new_tokens={config["max_new_tokens"]}))
```

A response ends in {" or ".join(f"`{end}`" for end in facts.ends)}: the generation config lists that.

## What it was made from

| | |
|---|---|
{_table((key, value) for key, value in given.items())}

## What was measured

Responses were sampled at temperature {config["evaluation"]["temperature"]:g}{of_kl} and cut at
{config["max_new_tokens"]} tokens.{of_ties} Intervals are those of prompts and pairs alone: another seed
gives another policy.

| | | 95 % |
|---|---|---|
{_table((row.what, f"{row.value:.4g}", row.range) for row in rows)}

## Settings

All that can change a number:

```yaml
{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=math.inf)}```

Code: commit {made.get("commit") or "unknown"}{changed}; {", ".join(versions) or "versions unknown"}.
"""


def _table(rows: Any) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def _start(policy: Mapping[str, Any]) -> str:
    return str(policy["path"] or policy["base"])


def _option(config: Mapping[str, Any], group: str) -> str:
    """The option that was chosen, or, of a run that does not say, the function."""
    function = ((config.get(group) or {}).get("_target_") or "none").rpartition(".")[2]
    return str(config.get("choices", {}).get(group) or function)


def _contents(config: Mapping[str, Any]) -> str:
    return str(config.get("provenance", {}).get("inputs", {}).get("data", "unknown"))


def _repositories(config: Mapping[str, Any]) -> list[str]:
    """The data sets that were read on the hub."""
    read = config.get("provenance", {}).get("revisions", {})
    return sorted({place.partition(",")[0].partition("@")[0] for place in read})


def _shown(value: Any) -> Any:
    """A value, but of a place on this machine its last name."""
    if isinstance(value, list):
        return [_shown(one) for one in value]
    if isinstance(value, dict):
        return {key: _shown(one) for key, one in value.items()}
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _equation(loss: Mapping[str, Any]) -> str:
    """What the function of a loss says of itself first."""
    place, _, name = loss["_target_"].rpartition(".")
    said = inspect.getdoc(getattr(import_module(place), name)) or ""
    return " ".join(said.split("\n\n")[0].split())
