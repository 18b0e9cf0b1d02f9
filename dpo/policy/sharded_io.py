"""A sharded model from and to Hugging Face folders, as collectives; no process ever holds it whole."""

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from dpo.policy import lora
from dpo.policy.folder import check, on_hub
from dpo.training import distributed


def read(
    layout: distributed.ParallelLayout,
    device: torch.device,
    source: str,
    config: PreTrainedConfig,
    trust_remote_code: bool,
    adapters: lora.Lora | None = None,
) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """A float32 model of a folder or hub name, and the names of weights that do not fit it, by what is the matter.

    It is made without memory, sharded, and then filled with this rank's rows of every weight.
    """
    if not Path(source).is_dir():
        name, revision = on_hub(source)
        source = snapshot_download(name, revision=revision.get("revision"), allow_patterns=["*.safetensors", "*.json"])
        check(Path(source))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        if adapters:
            lora.add(model, adapters)
    mapping = get_model_conversion_mapping(model)
    renamed = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    joined = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    distributed.shard(model, layout, device)
    model.to_empty(device="cpu" if layout.offload else device)
    for weight in model.parameters():
        no_init: Any = weight
        no_init._is_hf_initialized = True  # the library then leaves it alone
    model.init_weights()  # makes what is in no file: rotary frequencies
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    if adapters:
        lora.initialize(model, adapters)
    reader, ours = HuggingFaceStorageReader(source), {name: one for names, one in distinct(model) for name in names}
    stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    in_files: dict[str, list[tuple[str, str | None]]] = {}  # our name -> those in the files, and the part that each is
    for name in sorted(stored, key=dot_natural_key):
        our, part = rename_source_key(name, renamed, joined, model.base_model_prefix, ours)
        in_files.setdefault(our, []).append((name, part))
    wanted: dict[str, Tensor] = {}
    faults = {"missing": [], "of another shape": [], "that it has no place for": _unknown(model, ours, in_files)}
    for names, tensor in distinct(model):
        parts = next((in_files[name] for name in names if name in in_files), [])
        if not parts:
            faults["missing"].append(names[0])
        elif parts[0][1] is not None:  # an expert of many, say
            converter = next(rule for rule in joined if parts[0][1] in rule.source_patterns)
            whole = _joined(source, names[0], parts, converter, stored)
            if whole.shape == tensor.shape:
                distributed.local(tensor).copy_(distributed.part(whole, tensor))
            else:
                faults["of another shape"].append(names[0])
        elif stored[parts[0][0]].size != tensor.shape:
            faults["of another shape"].append(names[0])
        else:
            wanted[parts[0][0]] = tensor
    if not any(faults.values()):
        dcp.load(wanted, storage_reader=reader)
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model, faults


def _unknown(model: PreTrainedModel, ours: dict[str, Tensor], names: Iterable[str]) -> list[str]:
    """Those of no weight or buffer of the model, and not of what the library passes over, too."""
    passed = "|".join([*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"])
    return sorted(name for name in {*names} - ours.keys() if not re.search(passed, name))


def _joined(
    source: str, name: str, parts: list[tuple[str, str | None]], converter: WeightConverter, stored: dict[str, Any]
) -> Tensor:
    """One weight that the files hold in several; the one thing that a process reads whole."""
    read = {part: torch.empty(stored[part].size) for part, _ in parts}
    dcp.load(read, storage_reader=HuggingFaceStorageReader(source), no_dist=True)
    for part, pattern in parts:
        converter.add_tensor(name, part, str(pattern), read[part])  # type: ignore[arg-type]  # as when it saves
    whole = converter.convert(name)[name]
    return whole[0] if isinstance(whole, list) else whole


def write(model: PreTrainedModel, folder: Path) -> None:
    """Weights, config and generation config: each rank its own parts first, which rank 0 then joins on disk."""
    state = {names[0]: tensor for names, tensor in merged(model)}
    files = distributed.in_files(state)
    writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True, enable_consolidation=True)
    dcp.save(state, storage_writer=writer)
    if distributed.is_main():
        shutil.rmtree(folder / "sharded")
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)


def distinct(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Each tensor of the state once, by its first name; tied ones have several. As if there were no adapters."""
    by_id: dict[int, tuple[list[str], Tensor]] = {}
    adapted = lora.layers(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        layer, its_own, _ = name.partition(".lora_")
        if its_own and layer in adapted:
            continue
        name = name.replace(".base_layer.", ".") if adapted else name
        by_id.setdefault(id(tensor), ([], tensor.detach()))[0].append(name)
    return sorted(by_id.values(), key=lambda item: item[0][0])


def whole_weight(name: str, tensor: Tensor, quantized: dict[str, Any]) -> Tensor:
    """A tensor of `distinct`; of one in 4 bits what they stand for. quantized: `lora.in_4_bits` of the model."""
    layer = quantized.get(name.removesuffix(".weight"))
    return tensor if layer is None else layer.whole_weight()


def merged(model: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """The same, with what adapters add, in memory of its own: W + alpha / rank * B A. A collective."""
    adapted, quantized = lora.layers(model), lora.in_4_bits(model)
    for names, tensor in distinct(model):
        tensor = whole_weight(names[0], tensor, quantized)
        if layer := adapted.get(names[0].removesuffix(".weight")):
            tensor = tensor.clone()
            distributed.local(tensor).add_(distributed.part(lora.change(layer), tensor))
        yield names, tensor
