"""The type of every config key, and checks across keys. Values live in `conf/`."""

import math
import os
import re
from dataclasses import dataclass, is_dataclass, make_dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore

from dpo.sweep.identity import ALIASES, RECORDED, flatten
from dpo.sweep.signature import check_signature, fits, kind, no_key


@dataclass
class Lora:
    rank: int | None
    alpha: float
    targets: Any
    quantize: str | None


@dataclass
class Policy:
    path: str | None
    base: str | None
    lr: float
    max_length: int
    max_new_tokens: int
    micro_batch_tokens: int
    generation_batch_size: int
    chat_template: str | None
    date: str | None
    trust_remote_code: bool
    adapter: str | None
    lora: Lora


@dataclass
class Sharding:
    group: int | None
    offload: bool


@dataclass
class Recipe:
    batch_size: int
    lr: float
    epochs: int
    steps: int | None
    schedule: str
    warmup_steps: float


@dataclass
class Generation:
    samples_per_prompt: int
    temperature: float
    top_p: float
    pairs_per_prompt: int
    batch_size: int


@dataclass
class Pairs:
    off_policy: bool
    gap: Any
    label_temperature: float
    flip: float
    outliers: float
    outlier: str


@dataclass
class Evaluation:
    prompts: int
    temperature: float
    batch_size: int
    instructions: str | None
    log_samples: int


@dataclass
class Comparison(Evaluation):
    judge: Any
    engine: Any
    rule: Any
    baseline: str


@dataclass
class Wandb:
    mode: str
    project: str
    entity: str | None


@dataclass
class Train:
    """`python -m dpo.train`. Open groups (Any) are typed by the signature of their `_target_`: see `check`."""

    name: str
    seed: int
    beta: float
    lr: float
    loss: Any
    reference: Any
    scorer: Any
    data: Any
    policy: Policy
    judge: Any
    rule: Any
    batch_size: int
    micro_batch_tokens: int
    packed: bool
    activation_checkpointing: bool
    max_length: int
    max_new_tokens: int
    on_too_long: str
    epochs: int
    steps: int | None
    optimizer: str
    adam_betas: list[float]
    weight_decay: float
    schedule: str
    warmup_steps: float
    max_grad_norm: float
    precision: str
    device: str
    processes: int
    threads: int | None
    sharding: Sharding
    evaluate_every: int
    evaluate_prompts: int
    keep: str
    checkpoint_every: int
    checkpoints_kept: int
    sft: Recipe
    engine: Any
    generation: Generation
    pairs: Pairs
    evaluation: Comparison
    wandb: Wandb
    runs: str
    cache: str
    command: str


@dataclass
class Score(Train):
    """`python -m dpo.score`."""

    per_token: bool


@dataclass
class Generate(Train):
    """`python -m dpo.generate`."""


@dataclass
class Judge(Train):
    """`python -m dpo.judge`."""

    candidates: str | None


@dataclass
class Evaluate(Train):
    """`python -m dpo.evaluate`."""

    against: str | None
    best_of: int


@dataclass
class Show(Train):
    """`python -m dpo.show`."""

    against: str
    of: str


@dataclass
class Rounds(Train):
    """`python -m dpo.rounds`."""

    rounds: int
    held_to: str
    prompts: str


Data = make_dataclass("Data", [("report", str)], bases=(Train,))  # `python -m dpo.data`
NOT_OF_SFT = (
    *("beta", "lr", "loss", "reference", "scorer", "batch_size", "epochs", "steps", "schedule", "warmup_steps"),
    *("evaluate_prompts", "keep", "engine", "generation", "pairs", "rule"),
)
# `python -m dpo.sft`: the same keys, but for these
Sft = make_dataclass(
    "Sft",
    [
        (key, Evaluation if key == "evaluation" else expected)
        for key, expected in get_type_hints(Train).items()
        if key not in NOT_OF_SFT
    ],
)


SCHEMAS = {
    **{"data": Data, "evaluate": Evaluate, "generate": Generate, "judge": Judge, "rounds": Rounds},
    **{"score": Score, "sft": Sft, "show": Show, "train": Train},
}  # by command, the verb that executes the run; those of rounds are of train
# Hydra copies its store for each group of options that it lists: most of what --help took. Nothing in it changes.
ConfigStore.__deepcopy__ = lambda store, _: store  # type: ignore[attr-defined]
for verb, schema in SCHEMAS.items():
    ConfigStore.instance().store(name=f"{verb}_schema", node=schema)
OPEN_GROUPS = ("data", "engine", "judge", "rule", "loss", "reference", "scorer")  # typed by what they name

_CHOICES = {
    "optimizer": ("adamw", "adamw_8bit", "rmsprop"),
    "schedule": ("constant", "linear", "cosine"),
    "sft.schedule": ("constant", "linear", "cosine"),
    "on_too_long": ("error", "drop", "truncate"),
    "precision": ("fp32", "bf16"),
    "prompts": ("fresh", "same"),
    "device": ("auto", "cpu", "cuda"),
    "held_to": ("previous", "original"),
    "keep": ("last", "best"),
    "wandb.mode": ("auto", "online", "offline", "disabled"),
    "policy.lora.quantize": (None, "nf4", "nf4_double"),
    "pairs.outlier": ("another", "shuffled"),
}
_ABOVE_ZERO = (
    *("beta", "lr", "sft.lr", "batch_size", "sft.batch_size", "micro_batch_tokens", "max_length", "max_grad_norm"),
    *("epochs", "sft.epochs", "sft.steps", "processes", "threads", "rounds", "best_of"),
    *("policy.lora.rank", "policy.lora.alpha"),
    *("generation.samples_per_prompt", "generation.temperature", "generation.top_p", "max_new_tokens"),
    *("generation.pairs_per_prompt", "generation.batch_size"),
    *("evaluation.prompts", "evaluation.batch_size", "checkpoints_kept"),
    *("data.demonstrations", "data.train", "data.validation", "data.test"),
)
PATHS = ("name", "runs", "cache", "report")
AHEAD = {"generate": "sample", "judge": "judge", "score": "score"}  # stages, and what can be done ahead by them
STAGES = (*AHEAD, "train", "rounds")  # each takes what those before it made
NAME_BYTES = 200  # of a directory's name; file systems allow 255
_NO_CLIPPING = ("max_grad_norm", math.inf)
_LEAST, _MOST = 1e-12, 1e12  # size of a number other than 0: what lies outside is a slip, or nothing in float32
_NOT_BELOW_ZERO = (
    *("seed", "steps", "weight_decay", "warmup_steps", "sft.warmup_steps", "evaluate_every", "checkpoint_every"),
    *("evaluation.log_samples", "evaluation.temperature", "evaluate_prompts"),
    *("pairs.label_temperature", "pairs.flip", "pairs.outliers"),
)


def check(config: dict[str, Any]) -> None:
    """Refuse a resolved config that no run could use; loads no model.

    Raises: ValueError with one line per problem.
    """
    if problems := [*faults(config), *misfits(config)]:
        raise ValueError("\n".join(problems))


def misfits(config: dict[str, Any]) -> list[str]:
    """What keeps the options of the open groups from their functions, which are imported for it."""
    nodes = [(group, config.get(group)) for group in OPEN_GROUPS]
    found = [problem for group, node in nodes if node is not None for problem in check_signature(group, node)]
    for group in ("judge", "engine", "rule"):
        if (other := config["evaluation"].get(group)) is not None:
            found += [f"evaluation.{problem}" for problem in check_signature(group, other)]
    return found


def faults(config: dict[str, Any]) -> list[str]:
    """What is wrong with a resolved config as far as it can be told without importing any function that it names."""
    if config.get("command") not in SCHEMAS:
        return [f"command must be one of {', '.join(SCHEMAS)}, got {config.get('command')}"]
    if found := [key for key, value in flatten(config).items() if "${" in str(value)]:
        return [f"{key} must be a value, got an interpolation, ${{...}}" for key in found]
    if problems := _keys(config, SCHEMAS[config["command"]]):
        return problems
    problems = [*_numbers(config), *_batches(config), *_sharding(config), *_places(config), *_best_of(config)]
    problems += [*_lora(config), *_served(config)]
    if config["policy"]["base"] is None and (config["policy"]["path"] is None or config["command"] == "sft"):
        sft = "policy.base, a model to make a policy from, must be given; add policy.base="
        train = "policy.path, an SFT policy, or policy.base, a model to make one from, must be given; add policy.path="
        problems.append((sft if config["command"] == "sft" else train) + "<Hugging Face folder or hub name>")
    if config["command"] == "judge" and config["judge"] is None:
        problems.append("judge must be one that compares responses, got none; choose one: judge=..., --help lists them")
    return problems


def number_of_samples(baseline: str | None) -> int | None:
    """The n of an evaluation.baseline such as "best_of_16"; None of any other."""
    found = re.fullmatch(r"best_of_(\d+)", str(baseline))
    return int(found[1]) if found else None


def _keys(node: Any, schema: type, prefix: str = "") -> list[str]:
    """What keeps a node from having the keys of its schema, all of them and no others, in their types."""
    if not isinstance(node, dict):
        return [f"{prefix.rstrip('.')} must hold keys, got {node!r}"]
    types, problems = get_type_hints(schema), []
    for key in node:
        if key not in types and (prefix or key not in RECORDED):
            problems.append(no_key(f"{prefix}{key}", types, flatten(node, prefix)))
    for key, expected in types.items():
        if key not in node:
            problems.append(f"{prefix}{key} must be given, found none; leave its default in place")
        elif is_dataclass(expected) and isinstance(expected, type):
            problems += _keys(node[key], expected, f"{prefix}{key}.")
        elif not fits(node[key], expected):
            problems.append(f"{prefix}{key} must be {kind(expected)}, got {node[key]!r}")
        elif not prefix and key in OPEN_GROUPS and node[key] is None and key not in ("judge", "rule", "scorer"):
            problems.append(f"{key} must be an option, got null; choose one: {key}=..., --help lists them")
    return problems


def _numbers(config: dict[str, Any]) -> list[str]:
    flat, problems = flatten({key: value for key, value in config.items() if key not in RECORDED}), []
    for key, choices in _CHOICES.items():
        if key in flat and flat[key] not in choices:
            named = ", ".join("null" if one is None else one for one in choices)
            problems.append(f"{key} must be one of {named}, got {flat[key]}")
    numbers = {}
    for key, value in flat.items():
        if ALIASES.get(key) in flat:  # the same value again
            continue
        found = [one for one in (value if isinstance(value, list) else [value]) if _is_number(one)]
        if odd := [one for one in found if one and not _LEAST <= abs(one) <= _MOST and (key, one) != _NO_CLIPPING]:
            problems.append(f"{key} must be a number of size {_LEAST:g} to {_MOST:g}, got {odd[0]}")
        elif found and found[0] is value:
            numbers[key] = value
    for key in _ABOVE_ZERO:
        if key in numbers and not numbers[key] > 0:
            hint = "; the limit of no constraint is a small beta such as 1e-4" if key == "beta" else ""
            problems.append(f"{key} must be above 0, got {numbers[key]}{hint}")
    for key in _NOT_BELOW_ZERO:
        if key in numbers and numbers[key] < 0:
            problems.append(f"{key} must be at least 0, got {numbers[key]}")
        elif key in numbers and key.endswith("warmup_steps") and numbers[key] > 1 and numbers[key] % 1:
            problems.append(f"{key} must be a whole number of steps, or a share of them below 1, got {numbers[key]}")
    if not 0 < numbers.get("data.validation_fraction", 0.5) < 1:
        problems.append(f"data.validation_fraction must be between 0 and 1, got {flat['data.validation_fraction']}")
    if numbers.get("generation.top_p", 1) > 1:
        problems.append(f"generation.top_p must be in (0, 1], got {flat['generation.top_p']}; 1 is off")
    for key in ("pairs.flip", "pairs.outliers"):
        if numbers.get(key, 0) > 1:
            problems.append(f"{key} must be a share in [0, 1], got {flat[key]}")
    gap = flat.get("pairs.gap")
    if gap not in (None, "low", "high") and not (_is_number(gap) and 0 <= gap <= 1):
        problems.append(f"pairs.gap must be low, high or the share of high gap in [0, 1], null is off, got {gap}")
    if (day := flat.get("policy.date")) is not None:
        try:
            date.fromisoformat(day)
        except ValueError:
            problems.append(f"policy.date must be a day such as 2024-07-26, got {day}")
    if len(betas := flat["adam_betas"]) != 2 or not all(0 <= value < 1 for value in betas):
        problems.append(f"adam_betas must be two numbers in [0, 1), got {betas}")
    if flat["max_new_tokens"] >= flat["max_length"]:
        problems.append(
            f"max_new_tokens must be below max_length, which holds prompt and response, "
            f"got {flat['max_new_tokens']} and {flat['max_length']}"
        )
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _places(config: dict[str, Any]) -> list[str]:
    """Run directories lie in a folder of `runs`, and have names that file systems and lists of them can hold."""
    problems, name = [], config["name"]
    for key in (one for one in PATHS if one in config):
        if not config[key].strip() or any(ord(character) < 32 or ord(character) == 127 for character in config[key]):
            problems.append(f"{key} must be a path without control characters, and not empty, got {config[key]!r}")
        elif key != "name":
            places = [config[key], *map(str, Path(config[key]).absolute().parents)]
            place = next(place for place in places if os.path.exists(place))
            if not os.path.isdir(place):
                problems.append(
                    f"{key} must be a folder, or where one can be made, got {config[key]}: {place} is a file"
                )
            if config[key].startswith("~"):
                problems.append(f"{key} must be written out, ~ is not expanded here, got {config[key]}; take $HOME")
    for key, value in flatten(config).items():
        if value == "" and key not in PATHS and key.count(".") < 2 and key.split(".")[0] not in OPEN_GROUPS:
            problems.append(f"{key} must not be empty, got ''; leave it out, or give it a value")
    parts = name.split("/")
    if any(part.strip() in ("", ".", "..") for part in parts):
        problems.append(f"name must name a folder inside of runs={config['runs']}, such as dev, got {name!r}")
    elif len(max(parts, key=lambda part: len(part.encode())).encode()) > NAME_BYTES:
        problems.append(f"name must have at most {NAME_BYTES} bytes between two /, got {name!r}; take a shorter one")
    for depth in range(1, len(parts)):
        if (above := Path(config["runs"], *parts[:depth]) / "config.yaml").exists():
            problems.append(f"name must not lie inside of a run, got {name!r}, and {above} is one; take another")
    return problems


def _best_of(config: dict[str, Any]) -> list[str]:
    baseline, problems = config["evaluation"].get("baseline"), []
    if str(baseline).startswith("best_of_") and (number_of_samples(baseline) or 0) < 2:
        problems.append(f"evaluation.baseline=best_of_N must have a number of samples from 2, got {baseline}")
    if config["command"] == "evaluate" and number_of_samples(baseline) and config["against"] is None:
        problems.append(f"evaluation.baseline={baseline} samples the model at against, got none; give against=...")
    if config.get("best_of", 1) > 1 and config["evaluation"]["instructions"] is not None:
        problems.append(
            f"best_of must be 1 where evaluation.instructions are answered, which no judge here scores, got "
            f"{config['best_of']}; leave out one of the two"
        )
    return problems


def _batches(config: dict[str, Any]) -> list[str]:
    """Each process gets an item of each optimizer step."""
    key = "sft.batch_size" if config["command"] == "sft" else "batch_size"
    size, processes = flatten(config)[key], config["processes"]
    if size >= processes or size < 1:
        return []
    return [f"{key} must be at least 1 for each of {processes} processes, got {size}; try processes={size}"]


def _sharding(config: dict[str, Any]) -> list[str]:
    processes, group, problems = config["processes"], config["sharding"]["group"], []
    if group is not None and (group < 1 or processes % group):
        problems.append(f"sharding.group must divide the {processes} processes, got {group}; null is all of them")
    if config["sharding"]["offload"] and processes == 1:
        problems.append("sharding.offload needs several processes, got 1; use processes=2 or more")
    if processes > 1:
        problems += [f"processes must be 1 with {one}, got {processes}; {advice}" for one, advice in _alone(config)]
    if config["optimizer"] == "adamw_8bit" and find_spec("bitsandbytes") is None:
        problems.append("optimizer=adamw_8bit needs bitsandbytes; pip install -e '.[8bit]' -c constraints.txt")
    elif config["optimizer"] == "adamw_8bit" and processes > 1:  # it does not know FSDP2's weights
        problems.append(f"optimizer=adamw_8bit needs processes=1, got {processes}; use adamw, or policy.lora.rank")
    return problems


def _alone(config: dict[str, Any]) -> list[tuple[str, str]]:
    """What works beside a single process, and what to do where there are several."""
    scorer = config.get("scorer")
    found: list[tuple[str, str | None, str | None]] = []
    if scorer is not None:
        vllm = scorer["_target_"].endswith("VllmScorer")
        found.append(("scorer=vllm", None, "score") if vllm else ("scorer=ray", "scorer", "score"))
    for group, one, verb in (("engine", "engine=ray", "generate"), ("judge", "judge=reward_model_ray", "judge")):
        for at, node in (("", config.get(group)), ("evaluation.", config["evaluation"].get(group))):
            if isinstance(node, dict) and node.get("pool"):
                found.append((f"{at}{one}", f"{at}{group}.pool", None if at else verb))
    advised = []
    for one, pool, ahead in found:
        ways = [f"raise {pool}.concurrency, whose actors are what works at once"] if pool else []
        if ahead and config["command"] in STAGES[STAGES.index(ahead) + 1 :]:
            ways.append(f"{AHEAD[ahead]} ahead: python -m dpo.{ahead} {one}")
        advised.append((one, ", or ".join(ways or ["leave processes out"])))
    return advised


def _served(config: dict[str, Any]) -> list[str]:
    """A server has the weights that it was started with, so none has those that a run is yet to train."""
    trains = config["command"] in ("train", "rounds") and config["steps"] != 0
    engine = config["evaluation"].get("engine")
    if not trains or not isinstance(engine, dict) or engine.get("_target_") != "dpo.engines.Endpoint":
        return []
    return [
        "evaluation.engine must not be endpoint in a run that trains, since no server holds what it will have trained; "
        "take vllm, or serve the trained policy and call dpo.evaluate with it"
    ]


def _lora(config: dict[str, Any]) -> list[str]:
    policy, problems = config["policy"], []
    targets = policy["lora"]["targets"]
    named = isinstance(targets, list) and targets and all(isinstance(one, str) and one for one in targets)
    if targets != "all-linear" and not named:
        problems.append(f"policy.lora.targets must be all-linear or names of layers: [q_proj,v_proj], got {targets}")
    if (quantize := policy["lora"]["quantize"]) is not None and policy["lora"]["rank"] is None:
        problems.append(
            f"policy.lora.quantize needs adapters to train beside what it holds in 4 bits, got {quantize} and "
            "policy.lora.rank=null; set policy.lora.rank"
        )
    if quantize is not None and config["processes"] > 1:  # FSDP2 does not know the scales of its blocks
        problems.append(
            f"policy.lora.quantize needs processes=1, got {config['processes']}; use policy.lora.quantize=null"
        )
    if policy["adapter"] is not None and (policy["path"] is None or config["command"] in ("sft", "rounds")):
        advice = "give policy.path" if policy["path"] is None else "merge it with peft, and take the whole model"
        problems.append(
            "policy.adapter needs the model that it is of, policy.path, and a command other than sft and rounds, got "
            f"path {policy['path']} of {config['command']}; {advice}"
        )
    return problems
