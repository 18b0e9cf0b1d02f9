"""Architectures of the library, small and with random weights, against their own forward of one sequence at a time, and
`generate` of one prompt at a time.
"""

import inspect
from typing import Any

import pytest
import torch
from conftest import tiny_tokenizer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
)

from dpo.data.batches import Batch, Pair, collate_pairs
from dpo.policy import lora
from dpo.policy import model as models
from dpo.policy.logps import packable, sequence_logps
from dpo.policy.lora import Lora
from dpo.policy.sampling import Sampling, sample

pytestmark = pytest.mark.long
TOKENIZER = tiny_tokenizer("qwen2")
WORDS = len(TOKENIZER) + 3  # real models have more rows than tokens, too
COMMON: dict[str, Any] = {  # under all the names that architectures have for them
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **{"vocab_size": WORDS, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    **{"shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1, "bos_token_id": None},
    **{"eos_token_id": TOKENIZER.eos_token_id, "pad_token_id": TOKENIZER.pad_token_id},
}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"head_dim": 4, "qk_rope_head_dim": 4, "qk_head_dim": 12, "first_k_dense_replace": 1}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 6}
OTHERS: dict[str, dict[str, Any]] = {  # than the library's defaults, as the published models have them
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, **ALTERNATING},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "gemma2": {"query_pre_attn_scalar": 8, **ALTERNATING},
    "gemma3_text": {"query_pre_attn_scalar": 8, **ALTERNATING},
    "gptj": {"rotary_dim": 4},
    "granite": {"logits_scaling": 8.0},
    "jamba": {"num_hidden_layers": 8, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "mistral": {"sliding_window": 6},
    "olmo3": ALTERNATING,
}
PACKED = (
    *("apertus", "arcee", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "ernie4_5", "exaone4", "gemma", "gemma2"),
    *("gemma3_text", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox", "granite", "granitemoe", "helium"),
    *("hunyuan_v1_dense", "llama", "minimax_m2", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "olmoe", "opt", "phi"),
    *("phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2"),
)
PADDED = (  # states of a recurrence, sinks, or attention that the library cannot replace
    *("bloom", "falcon", "gpt_oss", "gptj", "jamba", "lfm2", "mpt", "nemotron", "nemotron_h", "olmo_hybrid"),
    *("qwen3_5_text", "qwen3_next", "recurrent_gemma", "stablelm"),
)
TEXTS = ("What is the capital of Italy?", "Tell me about cats and dogs, and of them.", "hello")
PAIRS = [
    Pair(TOKENIZER(text).input_ids, [*TOKENIZER(f" yes {text[:9]}").input_ids, TOKENIZER.eos_token_id], [40 + row])
    for row, text in enumerate(TEXTS)
]
WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 0.7])


def made(kind: str) -> PreTrainedModel:
    empty = AutoConfig.for_model(kind)
    known = {*inspect.signature(type(empty).__init__).parameters, *empty.to_dict(), *type(empty).attribute_map}
    given = {name: value for name, value in (COMMON | OTHERS.get(kind, {})).items() if name in known}
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given))
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.08)
    return model


def batch(packed: bool) -> Batch:
    return collate_pairs(PAIRS, torch.arange(3), torch.ones(3, dtype=torch.bool), pad_id=0, packed=packed)


def gradient(model: PreTrainedModel, logps: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    (WEIGHTS * logps).sum().backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


@pytest.mark.parametrize("kind", [*PACKED, *PADDED])
def test_an_architecture(kind, tmp_path):
    made(kind).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    model, tokenizer = models.load(str(tmp_path))
    alone = []
    for prompt, response in [*(pair.chosen for pair in PAIRS), *(pair.rejected for pair in PAIRS)]:
        logits = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        alone.append(sum(logits[len(prompt) + place - 1, token] for place, token in enumerate(response)))
    expected = torch.stack(alone)
    exact = gradient(model, expected)
    assert packable(model, [pair.prompt_responses for pair in PAIRS]) == (kind in PACKED)
    for packed in (False, True) if kind in PACKED else (False,):
        logps, _ = sequence_logps(model, batch(packed))
        assert logps.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
        assert (gradient(model, logps) - exact).abs().max() < 1e-5 * exact.abs().max()
    prompts = [pair.prompt_ids for pair in PAIRS]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": tokenizer.pad_token_id}
    options["suppress_tokens"] = list(range(len(tokenizer), WORDS))
    for prompt, drawn in zip(prompts, sample(model, tokenizer, prompts, Sampling(6, 0.0, 1.0, 8), 0, ""), strict=True):
        ids = torch.tensor([prompt])
        greedy = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        assert greedy[: len(drawn.response_ids)] == drawn.response_ids


@pytest.mark.parametrize("kind", ["deepseek_v3", "falcon", "glm4_moe", "olmo_hybrid", "phi3", "phimoe", "qwen3_next"])
def test_adapters_of_an_architecture(kind, tmp_path):
    made(kind).save_pretrained(tmp_path / "start")
    TOKENIZER.save_pretrained(tmp_path / "start")
    start, _ = models.load(str(tmp_path / "start"))
    model, tokenizer = models.load(str(tmp_path / "start"), adapters=Lora(4, 8, "all-linear", seed=0))
    assert sorted(lora.layers(model)) == lora.targets(start, Lora(4, 8, "all-linear", seed=0))
    with torch.no_grad():
        assert torch.equal(sequence_logps(model, batch(False))[0], before := sequence_logps(start, batch(False))[0])
        for layer in lora.layers(model).values():
            nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
        after, _ = sequence_logps(model, batch(False))
        assert (after - before).abs().max() > 0.01
        models.save(model, tokenizer, tmp_path / "saved")
        for path, adapter in (("saved", None), ("start", str(tmp_path / "saved" / "adapter"))):
            again, _ = models.load(models.ModelSpec(str(tmp_path / path), adapter=adapter))
            assert sequence_logps(again, batch(False))[0].tolist() == pytest.approx(after.tolist(), rel=1e-5)


def test_the_language_model_of_one_that_reads_images(tmp_path):
    """The library reads it alone; so is it saved, and read again."""
    text = made("qwen3_5_text").config.to_dict()
    sight = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 32,
        "patch_size": 4,
    }
    whole = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=sight)).eval()
    whole.save_pretrained(tmp_path / "whole")
    TOKENIZER.save_pretrained(tmp_path / "whole")
    model, tokenizer = models.load(str(tmp_path / "whole"))
    models.save(model, tokenizer, tmp_path / "saved")
    again, _ = models.load(str(tmp_path / "saved"))
    ids = torch.tensor([PAIRS[0].prompt_ids])
    for one in (model, again):
        assert type(one) is Qwen3_5ForCausalLM
        assert torch.equal(one(ids).logits, whole(ids).logits)
