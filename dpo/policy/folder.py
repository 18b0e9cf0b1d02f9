"""Whether a Hugging Face folder can be a policy or a reference, by its small files and the heads of large ones.

Planning and loading both check, so that what cannot be loaded stops a sweep before its first run. Errors name the file.
"""

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
JSON = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
MORE = (  # options of LoRA in peft beside plain products of two matrices
    *("use_dora", "bias", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication"),
    *("target_parameters", "trainable_token_indices"),
)
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")  # in a config
FLOATS = ("F64", "F32", "F16", "BF16")
OTHERS = {"*.bin": "pickled weights", "*.pt*": "pickled weights", "*.gguf": "GGUF weights"}


def on_hub(source: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes: a folder as it is, or a hub name and the revision that may stand after its @.

    Raises: ValueError if what stands before the @ is a folder, which is there once.
    """
    name, at, revision = source.partition("@")
    if not at or Path(source).expanduser().is_dir():
        return source, {}
    if name == "world" or Path(name).expanduser().is_dir():
        raise ValueError(f"a folder has no revision, found {source}; take {name}")
    return (name, {"revision": revision}) if revision else (source, {})


def check(folder: Path) -> None:
    """Raise a ValueError if a file of `folder` is missing, damaged, or of what is no plain causal language model."""
    with os.scandir(folder) as files:
        state = [(file.name, file.stat() if file.is_file() else None) for file in files]
    _check(folder, frozenset((name, stat and (stat.st_size, stat.st_mtime_ns)) for name, stat in state))


@cache  # a sweep asks for each of its runs
def _check(folder: Path, state: frozenset[Any]) -> None:
    names = {name for name, _ in state}
    if ADAPTER_CONFIG in names:
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise ValueError(
            f"{folder} must hold a whole model, found {ADAPTER_CONFIG}, an adapter of {base}; to start from it, "
            f"policy.path={base} policy.adapter={folder}; else take policy/ of its run, or merge them with peft: "
            "AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().save_pretrained(folder), and save "
            "the tokenizer there, too"
        )
    if "config.json" not in names:
        raise ValueError(
            f"{folder} must hold a model's config.json, found {_some(names)} there; take the folder that "
            "save_pretrained wrote, such as policy/ of a run"
        )
    config = read_json(folder / "config.json")
    check_config(str(folder), config)
    for name in JSON:
        if name in names:
            read_json(folder / name)
    if WEIGHTS in names:
        _check_layers(folder, config, _check_weights(folder / WEIGHTS))
    elif INDEX in names:
        _check_layers(folder, config, _check_shards(folder / INDEX))
    else:
        other = next((what for pattern, what in OTHERS.items() if any(folder.glob(pattern))), _some(names))
        raise ValueError(
            f"{folder} must hold its weights in {WEIGHTS}, or in several such files with a {INDEX}, found {other}; "
            "copy all of the folder, or load the model with transformers where you trust it, and save it again"
        )


def check_adapter(path: str) -> Path:
    """The folder of a LoRA adapter, as peft writes it.

    Raises: ValueError if there is none, or one that changes more than weights.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"policy.adapter must be a folder of a LoRA adapter, found none at {folder}; check the path")
    if not (folder / ADAPTER_CONFIG).exists() and (folder / "config.json").exists():
        raise ValueError(
            f"policy.adapter must be a folder of a LoRA adapter, found a whole model in {folder}; take it alone, "
            f"policy.path={path}, or the adapter/ that lies beside it"
        )
    config = read_json(folder / ADAPTER_CONFIG)
    kind, odd = config.get("peft_type"), [key for key in MORE if config.get(key) not in (None, False, "none", [], {})]
    if kind != "LORA" or odd:
        raise ValueError(
            f"{folder} must be a plain LoRA adapter, found {', '.join(odd) or kind}; merge it with peft, and give the "
            "whole model as policy.path"
        )
    _check_weights(folder / ADAPTER)
    return folder


def check_config(path: str, config: dict[str, Any]) -> None:
    """Raise a ValueError if a model's config.json is not of a causal language model with plain float weights."""
    if (quantized := config.get("quantization_config")) is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ValueError(
            f"{path} must have float weights, found quantization_config of {method} in its config.json; all of them "
            "are trained and scored in float32: take the model that was quantized, or dequantize it and save it again"
        )
    kind, named = config.get("model_type"), config.get("architectures") or []
    if not isinstance(kind, str):
        raise ValueError(f"the config.json of {path} must have a model_type, found {kind}; take a transformers model")
    if kind not in CONFIG_MAPPING_NAMES or "AutoModelForCausalLM" in (config.get("auto_map") or {}):
        return  # the folder's own code, or a model that was registered: the library knows
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind, ())
    expected = [causal] if isinstance(causal, str) else list(causal)
    description = f"a {named[0] if named else kind} in its config.json"
    if config.get("is_encoder_decoder"):
        description += ", an encoder with a decoder"
    elif kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder"):
        description += ", an encoder, whose tokens see those after them"
    elif expected and (not named or {name.casefold() for name in expected} & {name.casefold() for name in named}):
        return
    elif (
        "text_config" in config
        and expected
        and all(name.endswith("ForConditionalGeneration") for name in named)
        and getattr(transformers, expected[0])._keys_to_ignore_on_load_unexpected
    ):
        return  # it has other inputs than text, too, whose weights the language model alone passes over
    raise ValueError(
        f"{path} must be a causal language model{f' (a {expected[0]})' if expected else ''}, found {description}; "
        "take the language model, without another head or other inputs"
    )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises: ValueError if there is none.
    """
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        _refuse(file, "a JSON object", str(error).split("\n")[0])
    if not isinstance(value, dict):
        _refuse(file, "a JSON object", f"a {type(value).__name__}")
    return value


def _check_layers(folder: Path, config: dict[str, Any], weights: set[str]) -> None:
    """What has more layers than the config says, such as some that predict further tokens, or names without numbers is
    left to the loading.
    """
    layers = next((config[key] for key in LAYERS if isinstance(config.get(key), int)), 0)
    found = len({numbers[0] for name in weights if (numbers := re.findall(r"\b\d+\b", name))})
    if 0 < found < layers:
        raise ValueError(
            f"{folder} must hold the weights of the {layers} layers that its config.json says, found those of {found}; "
            "copy all files of one model there"
        )


def _check_shards(index: Path) -> set[str]:
    content = read_json(index)
    weight_map = content.get("weight_map")
    plain = isinstance(weight_map, dict) and all(isinstance(shard, str) for shard in weight_map.values())
    if not plain or not weight_map or "metadata" not in content:
        _refuse(index, "metadata, and the file of every weight in weight_map", _some(set(content)))
    for name in sorted(set(weight_map.values())):
        file = index.with_name(Path(name).name)  # of this folder
        weights = _check_weights(file)
        if absent := sorted(weight for weight, shard in weight_map.items() if shard == name and weight not in weights):
            _refuse(file, f"the weights that {index.name} places there", f"no {absent[0]} (and {len(absent) - 1} more)")
    return set(weight_map)


def _check_weights(file: Path) -> set[str]:
    """The names in a safetensors file, whose head must cover it and hold no integer in place of a weight."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            head = json.loads(opened.read(length)) if 8 < 8 + length <= size else None
        tensors = {name: tensor for name, tensor in head.items() if name != "__metadata__"} if head else {}
        needed = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        _refuse(file, "whole safetensors", str(error))
    if not tensors or needed != size:
        _refuse(file, "whole safetensors", f"{size} bytes where its head says {needed}" if tensors else "no such head")
    weights = [f"{name} ({tensor['dtype']})" for name, tensor in tensors.items() if name.endswith("weight")]
    if others := [weight for weight in weights if not weight.endswith(tuple(f"({dtype})" for dtype in FLOATS))]:
        count, first = len(others), others[0]
        _refuse(file, "float weights", f"{count} others, such as {first}", "take the model before quantization")
    return set(tensors)


def _refuse(file: Path, must: str, found: str, advice: str = "copy or download that file again") -> NoReturn:
    """Say what is the matter with a file, in the words of its beginning where that tells more."""
    try:
        with open(file, "rb") as opened:
            beginning = opened.read(64).lstrip()
    except OSError:
        beginning, found = b"?", "no file that can be read"
    if beginning.startswith(b"version https://git-lfs"):
        found, advice = "the pointer of a file that Git LFS holds", "run git lfs pull"
    elif beginning.startswith(b"<"):
        found = "a web page"
    elif not beginning:
        found = "an empty file"
    raise ValueError(f"{file} must hold {must}, found {found}; {advice}")


def _some(names: set[str]) -> str:
    return f"{', '.join(sorted(names)[:4])}{', ...' if len(names) > 4 else ''}" if names else "nothing"
