"""Weights in 4 bits against the paper's numbers (2305.14314, Appendix E) in NumPy, and against the float model of what
they stand for.
"""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from dpo.data.batches import collate_responses
from dpo.policy import cost, lora
from dpo.policy import model as models
from dpo.policy.logps import packable, sequence_kl, sequence_logps
from dpo.policy.lora import Lora
from dpo.policy.model import ModelSpec
from dpo.references import EMA, Initial, Live
from dpo.sft import quantized_policy
from dpo.training.loop import autocast
from dpo.training.optim import optimizer

NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
ADAPTERS = Lora(rank=4, alpha=6, targets="all-linear", seed=3, quantize="nf4")
ITEMS = [([5, 6, 7], [[8, 9], [9]]), ([10, 11] * 6, [[11, 12, 13, 14], [13, 14, 15] * 3]), ([15], [[16], [17, 3]])]
KINDS = ("gemma2", "gpt_neox", "llama", "qwen2")  # two of them have biases


@pytest.fixture(scope="module")
def wide(tiny_model, tmp_path_factory):
    """`wide(kind)`: folder of a tiny model whose rows are whole blocks, and whose biases are not 0."""
    made = tmp_path_factory.mktemp("wide")

    def make(kind: str) -> str:
        if not (made / kind).is_dir():
            model, tokenizer = models.load(tiny_model(kind, 64))
            torch.manual_seed(1)
            for name, weight in model.named_parameters():
                if name.endswith("bias"):
                    nn.init.normal_(weight, std=0.1)
            models.save(model, tokenizer, made / kind)
        return str(made / kind)

    return make


@pytest.fixture(scope="module")
def start(wide, tmp_path_factory):
    """`start(kind, how)`: folder of what the bits of a tiny model stand for, as `dpo.train` makes it."""
    cache = tmp_path_factory.mktemp("cache")
    return lambda kind, how="nf4": quantized_policy(ModelSpec(wide(kind)), how, str(cache))


def held(path: str, how: str = "nf4", **other: Any) -> Any:
    return models.load(path, adapters=replace(ADAPTERS, quantize=how, **other))[0]


def moved(model: Any) -> Any:
    """With a B that is not 0."""
    for number, layer in enumerate(lora.layers(model).values()):
        weight = layer.lora_B["default"].weight
        weight.data.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    return model


def batch_of(packed: bool = False) -> Any:
    return collate_responses(ITEMS, packed=packed)


def rounded(weight: np.ndarray) -> np.ndarray:
    """The nearest of the 16 numbers, times the largest size in each block of 64."""
    blocks = np.pad(weight.reshape(-1), (0, -weight.size % 64)).reshape(-1, 64)
    scales = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = np.abs((blocks / scales)[..., None] - np.array(NF4)).argmin(-1)
    return (np.array(NF4)[nearest] * scales).reshape(-1)[: weight.size].reshape(weight.shape)


@pytest.mark.parametrize("how", ["nf4", "nf4_double"])
def test_what_four_bits_stand_for(how, start, wide):
    """Of linear layers; to the bit what the folder holds. Scales in 8 bits are off by less than 2 %."""
    model = held(start("llama", how), how)
    base, folder = (load_file(f"{path}/model.safetensors") for path in (wide("llama"), start("llama", how)))
    quantized = lora.in_4_bits(model)
    assert len(quantized) == 2 * 7
    for name, weight in base.items():
        if layer := quantized.get(name.removesuffix(".weight")):
            assert layer.weight.dtype == torch.uint8
            assert layer.weight.numel() == weight.numel() / 2
            assert torch.equal(layer.whole_weight(), folder[name])
            expected = torch.from_numpy(rounded(weight.numpy())).float()
            assert torch.allclose(folder[name], expected, rtol=1e-6 if how == "nf4" else 0.02, atol=0)
            assert torch.equal(folder[name], expected) == (how == "nf4")
            assert 0.01 < (folder[name] - weight).norm() / weight.norm() < 0.15
        else:
            assert torch.equal(weight, folder[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["nf4", "nf4_double"])
def test_a_step_is_that_of_the_float_model(kind, how, start):
    """Log-probs, and gradients of A and B, of plain float32 weights W + alpha / rank * B A; nothing else has one."""
    path = start(kind, how)
    model, plain = moved(held(path, how)), models.load(path)[0]
    a, b, weights = {}, {}, {}
    for name, layer in lora.layers(model).items():
        a[name], b[name] = (weight.detach().clone().requires_grad_() for weight in lora._adapters(layer))
        weights[f"{name}.weight"] = plain.get_parameter(f"{name}.weight").detach() + 6 / 4 * b[name] @ a[name]
    batch, before = batch_of(), {name: weight.clone() for name, weight in model.state_dict().items()}
    logits = functional_call(plain, weights, (batch.input_ids, batch.attention_mask, batch.position_ids)).logits
    of_tokens = logits.log_softmax(-1).flatten(0, 1)[batch.target_positions].gather(-1, batch.labels[:, None])
    expected = torch.zeros(6).index_add(0, batch.sequence_ids, of_tokens.squeeze(-1))
    expected.sum().backward()
    step = optimizer(model, "adamw", 0.01, [0.9, 0.99], 0.1)
    found, _ = sequence_logps(model, batch)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=2e-6, atol=2e-5)
    found.sum().backward()
    for name, layer in lora.layers(model).items():
        for trained, own in zip(lora._adapters(layer), (a[name], b[name]), strict=True):
            assert torch.allclose(trained.grad, own.grad, rtol=1e-4, atol=1e-5)
    step.step()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) == weight.requires_grad == (".lora_" in name), name
        assert torch.equal(weight, before[name]) == (".lora_" not in name), name


def test_gradients_are_those_of_finite_differences(start):
    model = moved(held(start("llama")))
    weight = next(iter(lora.layers(model).values())).lora_A["default"].weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    sequence_logps(model, batch_of())[0].sum().backward()
    sums = []
    with torch.no_grad():
        for step in (0.02, -0.04):
            weight.add_(direction, alpha=step)
            sums.append(sequence_logps(model, batch_of())[0].double().sum().item())
    assert (sums[0] - sums[1]) / 0.04 == pytest.approx((weight.grad * direction).sum().item(), rel=1e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_modes_compute_the_same(precision, start):
    """Training, evaluation, without gradients, after another precision: bitsandbytes' own layer would differ."""
    model, found = moved(held(start("llama"))), []
    with torch.no_grad():
        sequence_logps(model, batch_of())  # whatever comes first
    for training in (True, False):
        model.train(training)
        with autocast(precision, torch.device("cpu")):
            found.append(sequence_logps(model, batch_of())[0].detach())
            with torch.no_grad():
                found.append(sequence_logps(model, batch_of())[0])
    assert all(torch.equal(one, found[0]) for one in found)
    exact, _ = sequence_logps(model, batch_of())
    assert torch.equal(found[0], exact) == (precision == "fp32")
    plain = models.load(start("llama"))[0]
    with torch.no_grad(), lora.without(model), autocast(precision, torch.device("cpu")):
        expected, _ = sequence_logps(plain, batch_of())
        within = 1e-5 if precision == "fp32" else 1e-2
        assert torch.allclose(sequence_logps(model, batch_of())[0], expected, rtol=within)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_are_the_models_own(kind, start):
    model, found = moved(held(start(kind))), []
    assert packable(model, ITEMS)
    for packed in (True, False):
        model.zero_grad()
        values, _ = sequence_logps(model, batch_of(packed))
        values.sum().backward()
        found.append([values.detach(), *(weight.grad for weight in model.parameters() if weight.requires_grad)])
    for fast, plain in zip(*found, strict=True):
        assert torch.allclose(fast, plain, rtol=1e-4, atol=2e-5)


def test_whose_weights_they_are(start, wide):
    """The fingerprint, by which scores are kept, is that of the float model; of each way to quantize another."""
    of = {how: models.fingerprint(models.load(start("llama", how))[0]) for how in ("nf4", "nf4_double")}
    assert {how: models.fingerprint(moved(held(start("llama", how), how))) for how in of} == of
    assert len({*of.values(), models.fingerprint(models.load(wide("llama"))[0])}) == 3
    assert start("llama") == start("llama")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_what_was_trained(kind, start, wide, tmp_path):
    """Merged into what the bits stand for, or by peft on that folder; on the weights of before it is another model."""
    path = start(kind)
    model, tokenizer = moved(held(path)), models.load_tokenizer(path)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    models.save(model, tokenizer, tmp_path / "policy")
    models.move_adapter_out(tmp_path / "policy")
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    told = json.loads((tmp_path / "adapter" / "base.json").read_text())
    assert told == {"path": path, "weights": models.weights_digest(models.load(path)[0])}
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.rpartition(".lora_")[2] for name in stored} == {"A.weight", "B.weight"}
    with torch.no_grad():
        expected, _ = sequence_logps(model, batch_of())
        again = models.load(ModelSpec(path, adapter=str(tmp_path / "adapter")))[0]
        by_peft = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path / "adapter")
        for other in (models.load(str(tmp_path / "policy"))[0], again, by_peft.eval()):
            assert torch.allclose(sequence_logps(other, batch_of())[0], expected, rtol=2e-5, atol=1e-5)
        first = AutoModelForCausalLM.from_pretrained(wide(kind))
        on_first = peft.PeftModel.from_pretrained(first, tmp_path / "adapter").eval()
        assert not torch.allclose(sequence_logps(on_first, batch_of())[0], expected, rtol=1e-3)
    with pytest.raises(ValueError, match=r"is an adapter of weights \w{12}, found \w{12} at policy.path"):
        models.load(ModelSpec(wide(kind), adapter=str(tmp_path / "adapter")))
    fresh = held(path)
    lora.read(fresh, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(sequence_logps(fresh, batch_of())[0], expected)


def test_references_are_the_quantized_model(start):
    """Live and moving ones; and the KL to what the policy began as, which takes no other model."""
    path = start("llama")
    policy, plain = held(path), models.load(path)[0]
    live: Any = Live(None).prepare(path, policy, {}, None)  # type: ignore[arg-type]
    moving: Any = EMA(0.25, 1).prepare(path, policy, {}, None)  # type: ignore[arg-type]
    assert live.model is policy
    assert live.fingerprint == models.fingerprint(plain)
    assert Initial().spec(path).path == path
    moved(policy).eval()
    batch = batch_of()
    with torch.no_grad():
        assert torch.allclose(live.logps(batch, "train"), sequence_logps(plain, batch)[0], rtol=2e-6, atol=2e-5)
        for own, beside in zip(sequence_kl(policy, policy, batch), sequence_kl(policy, plain, batch), strict=True):
            assert torch.allclose(own, beside, rtol=1e-4, atol=1e-4)
            assert own.abs().min() > 1e-3
    moving.after_step(policy)
    merged = {names[0]: weight for names, weight in models.sharded_io.merged(policy)}
    before = dict(plain.named_parameters())
    for name, weight in moving.model.named_parameters():
        assert torch.allclose(weight, 0.75 * before[name] + 0.25 * merged[name], rtol=0, atol=1e-7), name


def test_layers_without_an_adapter_are_in_4_bits_too(start):
    model = held(start("llama"), targets=("q_proj",))
    assert len(lora.in_4_bits(model)) == 2 * 7
    assert len(lora.layers(model)) == 2
    assert models.fingerprint(model) == models.fingerprint(models.load(start("llama"))[0])


@pytest.mark.parametrize("kind,found", [("gpt2", "a Conv1D, transformer.h.0.attn.c_attn"), ("mixtral", "Mixtral")])
def test_models_that_stay_as_they_are(kind, found, wide, tiny_model):
    models.check_lora(wide(kind), replace(ADAPTERS, quantize=None))
    with pytest.raises(ValueError, match=f"policy.lora.quantize needs a model whose matrices .*, found .*{found}"):
        models.check_lora(wide(kind), ADAPTERS)
    with pytest.raises(ValueError, match=r"whose inputs are a multiple of 64, found 32 of model\.layers\.0\.\S*q_proj"):
        models.check_lora(tiny_model("llama"), ADAPTERS)
    for plain in KINDS:
        models.check_lora(wide(plain), ADAPTERS)


def test_what_is_missing_is_said(wide, monkeypatch):
    with pytest.raises(ValueError, match=r"the bits of \S*llama must lie in \S*nf4.safetensors, found none"):
        held(wide("llama"))
    monkeypatch.setattr(lora, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    with pytest.raises(ValueError, match=r"policy.lora.quantize needs bitsandbytes, found none; pip install -e '.\[ql"):
        models.check_lora(wide("llama"), ADAPTERS)
    models.check_lora(wide("llama"), replace(ADAPTERS, quantize=None))


@pytest.mark.parametrize("how", ["nf4", "nf4_double"])
def test_memory_is_that_of_the_bits(how, start):
    """Bytes of weights and scales, of matrices whose blocks are whole, as a model has them in float32 but for these."""
    model = held(start("llama", how), how)
    plain = models.load(start("llama", how))[0]
    found, whole = 0.0, 0
    for layer in lora.in_4_bits(model).values():
        assert layer.whole_weight().numel() % 64 == 0
        state = layer.state
        scales = state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
        found, whole = found + layer.weight.nbytes + scales, whole + layer.whole_weight().nbytes
    given: dict[str, Any] = {"reference": 0, "beside": False, "tokens": 1, "scored": 1, "optimizer": "adamw"}
    given |= {"precision": "fp32", "checkpointing": False, "packed": True, "device": "cuda"}
    estimates = [cost.memory(plain, 0, kind, **given).weights for kind in (None, how)]
    assert estimates[0] == sum(weight.nbytes for weight in plain.parameters())
    assert estimates[0] - estimates[1] == pytest.approx(whole - found, rel=2e-3)
    assert math.floor(8 * cost.HELD[how] * 1000) == {"nf4": 4500, "nf4_double": 4126}[how]
