"""The figures of docs/scaling.md: the arithmetic again, and its assumptions counted on real shapes, without memory."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from dpo.policy.logps import TILE

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
SIZES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
    | {"num_attention_heads": 32, "num_key_value_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    | {"num_attention_heads": 64, "num_key_value_heads": 8},
}
KEPT = {"7B": 51.5, "70B": 58}  # bytes of a layer's activations per token, in units of h
GPUS, TOKENS, USE = {"7B": 8, "70B": 64}, {"7B": 8192, "70B": 4096}, {"7B": 0.40, "70B": 0.35}


def llama(name: str, **changed: int) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SIZES[name] | changed, use_cache=False))


def forward(model: LlamaForCausalLM, tokens: int) -> torch.Tensor:
    """The states of one sequence."""
    mask = torch.zeros(1, 1, tokens, tokens, device="meta", dtype=torch.bool)  # a mask of its own cannot look at values
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    return model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state


def row(start: str) -> list[str]:
    [line] = [line for line in PAGE.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip(" *") for cell in line.split("|")[-3:-1]]


def figures(name: str) -> dict[str, str]:
    sizes = SIZES[name]
    h, layers, vocabulary = sizes["hidden_size"], sizes["num_hidden_layers"], sizes["vocab_size"]
    parameters = sum(weight.numel() for weight in llama(name).parameters())
    block = (parameters - 2 * vocabulary * h) / layers
    tokens, edges = TOKENS[name], 2 * vocabulary * h
    lines = {
        "weights, gradients": 16 * parameters / GPUS[name],
        "two blocks": 4 * block,
        "embeddings and head": 2 * edges,
        "their gradients": 6 * edges,
        "activations, all kept": KEPT[name] * h * layers * tokens,
        "activations with": 2 * h * layers * tokens,
        "and the one layer": KEPT[name] * h * tokens,
        "logits of a tile": 6 * TILE + 2 * vocabulary * h,
        "a reference that moves": 4 * parameters / GPUS[name],
    }
    lines["**sum**"] = sum(lines.values()) - lines["activations, all kept"] - lines["a reference that moves"]
    each = 2 * (parameters - edges) + 4 * layers * h * 256  # forward, per token; causal, in 512 tokens
    pair = 3 * (1024 * each + 512 * 2 * vocabulary * h)
    again = pair + 1024 * each
    rate = GPUS[name] * 989e12 * USE[name] / again
    return {start: f"{size / 1e9:.1f} GB" for start, size in lines.items()} | {
        "forward and backward": f"{pair / 1e12:.1f} TFLOP",
        "with recomputing": f"{again / 1e12:.1f} TFLOP",
        "pairs per second, recomputing": f"{rate:.0f}",
        "seconds per step": f"{ {'7B': 64, '70B': 128}[name] / rate:.1f}",
        "60,000 pairs": f"{60000 / rate / 60:.0f} min",
    }


@pytest.mark.parametrize("name", SIZES)
def test_the_tables(name):
    place = list(SIZES).index(name)
    for start, figure in figures(name).items():
        assert row(start)[place] == figure, start


@pytest.mark.parametrize("name", ["7B", pytest.param("70B", marks=pytest.mark.long)])
def test_flops(name):
    """As the counter sees them: it takes attention to be of all tokens to all."""
    model, sizes, tokens = llama(name), SIZES[name], 1024
    with FlopCounterMode(display=False) as counter:
        states = forward(model, tokens)
        once = counter.get_total_flops()
        states.sum().backward()
    h, layers, vocabulary = sizes["hidden_size"], sizes["num_hidden_layers"], sizes["vocab_size"]
    parameters = sum(weight.numel() for weight in model.parameters()) - 2 * vocabulary * h
    assert once == pytest.approx(tokens * (2 * parameters + 4 * layers * h * tokens), rel=1e-2)
    assert counter.get_total_flops() == pytest.approx(3 * once, rel=1e-2)


def kept(model: LlamaForCausalLM, tokens: int) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights aside."""
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    storages = {}

    def keep(tensor):
        if tensor.untyped_storage()._cdata not in weights:
            storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(model, tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("recompute", [False, True])
def test_activations(name, recompute):
    h, by_layers = SIZES[name]["hidden_size"], []
    for layers in (2, 4):
        model = llama(name, num_hidden_layers=layers).bfloat16()
        if recompute:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        # Without a flash kernel the matrix of attention weights is kept, too; by two lengths it is told apart.
        short, long = (kept(model, tokens) / tokens for tokens in (1024, 2048))
        by_layers.append(2 * short - long)
    assert (by_layers[1] - by_layers[0]) / 2 / h == pytest.approx(2 if recompute else KEPT[name], rel=1e-2)
