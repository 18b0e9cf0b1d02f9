"""A sharded model from and to Hugging Face folders; no process ever holds it whole. All ranks must call."""

import shutil
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
from transformers.core_model_loading import WeightRenaming, rename_source_key

from dpo.training import sharding


def read(
    layout: sharding.Layout, device: torch.device, source: str, config: PreTrainedConfig, trust_remote_code: bool
) -> tuple[PreTrainedModel, list[str]]:
    """A float32 model of a folder or hub name, and the weights that it lacks.

    It is made without memory, sharded, and then filled with this rank's rows of every weight.
    """
    if not Path(source).is_dir():
        source = snapshot_download(source, allow_patterns=["*.safetensors", "*.json"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    renamed = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    sharding.shard(model, layout, device)
    model.to_empty(device="cpu" if layout.offload else device)
    for weight in model.parameters():
        no_init: Any = weight
        no_init._is_hf_initialized = True  # the library then leaves it alone
    model.init_weights()  # makes what is in no file: rotary frequencies
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    reader, ours = HuggingFaceStorageReader(source), model.state_dict()
    in_files = {  # our name -> that in the files
        rename_source_key(name, renamed, [], model.base_model_prefix, ours)[0]: name
        for name in reader.read_metadata().state_dict_metadata
    }
    wanted, missing = {}, []
    for names, tensor in distinct(model):
        found = next((in_files[name] for name in names if name in in_files), None)
        if found is None:
            missing.append(names[0])
        else:
            wanted[found] = tensor
    if not missing:
        dcp.load(wanted, storage_reader=reader)
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model, sorted(missing)


def write(model: PreTrainedModel, folder: Path) -> None:
    """Weights, config and generation config: each rank its own parts first, which rank 0 then joins on disk."""
    state = {names[0]: tensor for names, tensor in distinct(model)}
    files = sharding.in_files(state)
    writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True, enable_consolidation=True)
    dcp.save(state, storage_writer=writer)
    if sharding.is_main():
        shutil.rmtree(folder / "sharded")
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)


def distinct(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Each tensor of the state once, by its first name; tied ones have several."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), ([], tensor.detach()))[0].append(name)
    return sorted(found.values(), key=lambda item: item[0][0])
