"""LoRA (2106.09685): weights W stay as they are, W + alpha / rank * B A computes, and the small B and A are trained.

peft's layers take the places of the model's, so that its class and its ways to a log-prob stay. They are there before a
model is sharded: FSDP2 would not sum the gradients of those that come later.
"""

import json
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo.cache import digest
from dpo.policy.folder import ADAPTER, ADAPTER_CONFIG, read_json
from dpo.training import distributed

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it; it misses kernels that are not used here
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # in configs
ALL, NAME = "all-linear", "default"  # as peft calls all targets, and an adapter
BLOCK = 64  # weights in 4 bits that share a scale, as in the paper
BASE = "base.json"  # beside an adapter: whose it is
PREFIX = "base_model.model."  # of the names in peft's files


@dataclass(frozen=True)
class Lora:
    """The adapters that a training adds."""

    rank: int
    alpha: float  # they add alpha / rank * B A
    targets: str | Sequence[str]  # ALL, or ends of the names of linear layers
    seed: int  # of the first A; the first B is 0
    quantize: str | None = None  # "nf4" or "nf4_double": what is not trained is held in 4 bits, see `dpo.policy.nf4`


def targets(model: PreTrainedModel, lora: Lora) -> list[str]:
    """The names of the layers that get an adapter, in a model of which no weight is looked at.

    They are given to peft one by one: by itself it would take a router and fused experts for linear layers, too.

    Raises: ValueError if there are none, others are asked for, or the rank is above that of every one's weight.
    """
    if find_spec("peft") is None:
        raise ValueError("policy.lora needs peft, found none; pip install -e '.[lora]' -c constraints.txt")
    if lora.quantize is not None:
        _check_quantized(model)
    head, modules, linear_ones = model.get_output_embeddings(), dict(model.named_modules()), linear(model)
    known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear_ones)) or "which there are none"
    found = linear_ones if lora.targets == ALL else []
    for target in () if lora.targets == ALL else lora.targets:
        named = [name for name in modules if f".{name}".endswith(f".{target}")]
        if any(modules[name] is head or isinstance(modules[name], nn.Embedding) for name in named):
            raise ValueError(
                f"policy.lora.targets must be linear layers between embeddings and head, got {target}: the head's "
                f"weight is read as it is; take of {known}"
            )
        if not named or not {*named} <= {*linear_ones}:
            wrong = f"a {type(modules[named[0]]).__name__}" if named else "no layer of that name"
            raise ValueError(f"policy.lora.targets must name linear layers, of {known}; found {wrong}: {target}")
        found += named
    if not found:
        raise ValueError(f"policy.lora needs linear layers beside the head, found none in {type(model).__name__}")
    most = max(min(_sizes(modules[name])) for name in found)
    if lora.rank > most:
        raise ValueError(
            f"policy.lora.rank must be at most {most}, the rank that a weight of these layers can have, got "
            f"{lora.rank}; set policy.lora.rank={most} or less"
        )
    return sorted({*found})


def _sizes(module: Any) -> tuple[int, ...]:
    """How many inputs and outputs a linear layer has, also one whose weight is in 4 bits."""
    return (*module.weight.shape,) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def linear(model: PreTrainedModel) -> list[str]:
    """The names of all linear layers but the head, and the routers that some mixtures make of one."""
    head, modules, config = model.get_output_embeddings(), model.named_modules(), model.config.get_text_config()
    experts = {getattr(config, name, None) for name in EXPERTS}
    found = [(name, one) for name, one in modules if isinstance(one, nn.Linear | Conv1D) and one is not head]
    return [name for name, one in found if isinstance(one, Conv1D) or one.out_features not in experts]


def _check_quantized(model: PreTrainedModel) -> None:
    """Raise a ValueError if most of a model could not be held in 4 bits. No weight is looked at."""
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "policy.lora.quantize needs bitsandbytes, found none; pip install -e '.[qlora]' -c constraints.txt"
        )
    for name, module in model.named_modules():
        own = [weight for weight in module.parameters(recurse=False) if weight.dim() > 1]
        if isinstance(module, nn.Linear) and module.in_features % BLOCK:  # bitsandbytes 0.50 reads such wrong on a CPU
            raise ValueError(
                f"policy.lora.quantize needs linear layers whose inputs are a multiple of {BLOCK}, found "
                f"{module.in_features} of {name}; leave it out: policy.lora.quantize=null"
            )
        if own and not isinstance(module, nn.Linear | nn.Embedding):
            raise ValueError(
                "policy.lora.quantize needs a model whose matrices are those of linear layers and embeddings, found a "
                f"{type(module).__name__}, {name}, in {type(model).__name__}; leave it out: policy.lora.quantize=null"
            )


def add(model: PreTrainedModel, lora: Lora) -> None:
    """Put adapters into a model, which may have no memory yet; they alone require gradients. Then `initialize`."""
    names = targets(model, lora)
    from peft import LoraConfig

    options: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
    config: Any = model.config
    kind, config.model_type = config.model_type, ""  # by which peft knows mixtures whose experts were linear layers
    try:  # once, and takes the fused ones for dense and shared layers of the same names
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.filterwarnings("ignore", "fan_in_fan_out")  # of GPT-2's layers, which it finds out by itself
            model.add_adapter(LoraConfig(target_modules=names, **options))
    finally:
        config.model_type = kind


@torch.no_grad()
def initialize(model: nn.Module, lora: Lora) -> None:
    """As the paper and peft: A uniform with variance 1 / (3 inputs), B 0. The same whatever the layout of processes."""
    for name, layer in layers(model).items():
        a, b = _adapters(layer)
        rng = torch.Generator().manual_seed(int(digest([lora.seed, name])[:8], 16))
        distributed.local(a).copy_(distributed.part(torch.empty(a.shape).uniform_(-1, 1, generator=rng), a))
        distributed.local(a).div_(math.sqrt(a.shape[1]))
        distributed.local(b).zero_()


def layers(model: nn.Module) -> dict[str, Any]:
    """The layers that have an adapter, by the name that each has without."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def in_4_bits(model: nn.Module) -> dict[str, Any]:
    """The layers whose weight is, by the name that each has without an adapter."""
    held = {name: module for name, module in model.named_modules() if hasattr(module, "whole_weight")}
    return {name.removesuffix(".base_layer"): module for name, module in held.items()}


def change(layer: Any) -> Tensor:
    """alpha / rank * B A: what an adapter adds to the weight of its layer, whole. A collective."""
    a, b = (distributed.whole(weight.detach()) for weight in _adapters(layer))
    return _turned(layer.scaling[NAME] * (b @ a), layer.get_base_layer())


@contextmanager
def without(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a model computes what it does without its adapters, if it has any. For no gradients."""
    adapted = bool(layers(model))
    if adapted:
        model.disable_adapters()
    try:
        yield
    finally:
        if adapted:
            model.enable_adapters()


def save(model: PreTrainedModel, folder: Path, weights: str) -> None:
    """Write the adapters in peft's format, and BASE: whose they are, and the digest `weights` of it. A collective."""
    tensors = {name: distributed.whole(weight.detach()).cpu().contiguous() for name, weight in _in_file(model)}
    if distributed.is_main():
        path, config = Path(str(model.name_or_path)), model.peft_config[NAME]
        config.base_model_name_or_path = str(path.resolve()) if path.exists() else str(path)
        config.save_pretrained(folder)
        save_file(tensors, folder / ADAPTER, {"format": "pt"})
        told = {"path": config.base_model_name_or_path, "weights": weights}
        (folder / BASE).write_text(json.dumps(told, indent=1) + "\n")


@torch.no_grad()
def read(model: PreTrainedModel, folder: Path) -> None:
    """Give a model's adapters the weights of those that `save` wrote of it."""
    stored = load_file(folder / ADAPTER)
    for name, weight in _in_file(model):
        weight.copy_(stored[name])


@torch.no_grad()
def merge(model: PreTrainedModel, folder: Path, weights: str) -> None:
    """Add an adapter of a folder to the weights of a model, each process to its part. weights: their digest.

    Raises: ValueError if it is an adapter of others.
    """
    config, stored = read_json(folder / ADAPTER_CONFIG), load_file(folder / ADAPTER)
    theirs = read_json(folder / BASE)["weights"] if (folder / BASE).exists() else weights
    if theirs != weights:
        raise ValueError(
            f"{folder} is an adapter of weights {theirs[:12]}, found {weights[:12]} at policy.path; take the model "
            f"that its {BASE} names"
        )
    for name, module in check_fits(model, folder).items():
        a, b = (stored[f"{name}.lora_{side}.weight"].float() for side in "AB")
        scale = config["lora_alpha"] / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
        weight: Any = module.weight
        distributed.local(weight).add_(distributed.part(_turned(scale * (b @ a), module), weight))


def check_fits(model: PreTrainedModel, folder: Path) -> dict[str, nn.Module]:
    """The layers that an adapter of a folder changes, by their names there. No weight is looked at.

    Raises: ValueError if it is of other layers, or of other sizes.
    """
    modules, found = dict(model.named_modules()), {}
    with safe_open(folder / ADAPTER, "pt") as file:
        names = file.keys()
        shapes = {name: file.get_slice(name).get_shape() for name in names}
    for name in sorted({name.rpartition(".lora_")[0] for name in shapes}):
        a, b = (shapes.pop(f"{name}.lora_{side}.weight", None) for side in "AB")
        module: Any = modules.get(name.removeprefix(PREFIX))
        weight = getattr(module, "weight", None)
        if not a or not b or weight is None:
            raise ValueError(
                f"{folder} must be an adapter of {model.name_or_path}, found one of other layers: "
                f"{name or min(shapes)}; take the model that it was trained on"
            )
        inputs, outputs = weight.shape if isinstance(module, Conv1D) else (*weight.shape[::-1],)
        if (a[1], b[0], a[0]) != (inputs, outputs, b[1]):
            raise ValueError(
                f"{folder} must be an adapter of {model.name_or_path}, whose {name.removeprefix(PREFIX)} has {inputs} "
                f"inputs and {outputs} outputs, found A of {a} and B of {b}; take the model that it was trained on"
            )
        found[name] = module
    if shapes:
        raise ValueError(f"{folder} must hold an A and a B for each layer, found {min(shapes)}; merge it with peft")
    return found


def _in_file(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model's adapters, by the names that they have in peft's files."""
    for name, layer in layers(model).items():
        for side, weight in zip("AB", _adapters(layer), strict=True):
            yield f"{PREFIX}{name}.lora_{side}.weight", weight


def _adapters(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A[NAME].weight, layer.lora_B[NAME].weight  # (rank, inputs), (outputs, rank)


def _turned(delta: Tensor, module: Any) -> Tensor:
    """As the module holds its weight: a Conv1D's is (inputs, outputs)."""
    return delta.T if isinstance(module, Conv1D) else delta
