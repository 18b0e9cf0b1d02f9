"""LoRA against W + alpha / rank * B A by hand, and against peft's own files, merging and loading."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM, Glm4MoeConfig, PhimoeConfig

from dpo.data.batches import collate_responses
from dpo.policy import lora
from dpo.policy import model as models
from dpo.policy.logps import packable, sequence_logps
from dpo.policy.lora import Lora
from dpo.policy.model import ModelSpec
from dpo.policy.sharded_io import distinct, merged
from dpo.references import EMA, Live
from dpo.training.optim import optimizer

ADAPTERS = Lora(rank=4, alpha=6, targets="all-linear", seed=3)
ITEMS = [([5, 6, 7], [[8, 9], [9]]), ([10, 11] * 6, [[11, 12, 13, 14], [13, 14, 15] * 3]), ([15], [[16], [17, 3]])]
KINDS = ("gemma2", "gpt2", "gpt_neox", "llama", "mixtral", "qwen2")


def adapted(path: str, adapters: Lora = ADAPTERS) -> Any:
    return models.load(path, adapters=adapters)[0]


def moved(model: Any) -> Any:
    """With a B that is not 0."""
    for number, layer in enumerate(lora.layers(model).values()):
        weight = layer.lora_B["default"].weight
        weight.data.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    return model


def padded() -> Any:
    return collate_responses(ITEMS, packed=False)


def test_a_step_by_hand(tiny_model):
    """Gradients through W + alpha / rank * B A of the plain model, and a step of AdamW from its equations."""
    model, plain = moved(adapted(tiny_model("llama"))), models.load(tiny_model("llama"))[0]
    scale, lr, before = 6 / 4, 0.01, {name: weight.clone() for name, weight in model.state_dict().items()}
    a, b, weights = {}, {}, {}
    for name, layer in lora.layers(model).items():
        a[name] = layer.lora_A["default"].weight.detach().clone().requires_grad_()
        b[name] = layer.lora_B["default"].weight.detach().clone().requires_grad_()
        weights[f"{name}.weight"] = plain.get_parameter(f"{name}.weight").detach() + scale * b[name] @ a[name]
    batch = padded()
    logits = functional_call(plain, weights, (batch.input_ids, batch.attention_mask, batch.position_ids)).logits
    logps = logits.log_softmax(-1).flatten(0, 1)[batch.target_positions].gather(-1, batch.labels[:, None]).sum()
    logps.backward()

    step = optimizer(model, "adamw", lr, [0.9, 0.99], 0.1)
    values, _ = sequence_logps(model, batch)
    assert values.sum().item() == pytest.approx(logps.item(), rel=1e-6)
    values.sum().backward()
    step.step()
    for name, layer in lora.layers(model).items():
        for side, own in (("A", a[name]), ("B", b[name])):
            trained = getattr(layer, f"lora_{side}")["default"].weight
            assert torch.allclose(trained.grad, own.grad, rtol=1e-4, atol=1e-6)
            # The first step of AdamW: the moments, corrected, are the gradient and its square.
            after = own * (1 - lr * 0.1) - lr * trained.grad / (trained.grad.abs() + 1e-8)
            assert torch.allclose(trained, after, rtol=1e-5, atol=1e-7)
    held = {id(weight) for group in step.param_groups for weight in group["params"]}
    assert held == {id(weight) for layer in lora.layers(model).values() for weight in lora._adapters(layer)}
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]) == (".lora_" not in name), name


@pytest.mark.parametrize("kind", KINDS)
def test_at_first_and_without_adapters_a_model_is_the_base_to_the_bit(kind, tiny_model):
    plain, model = models.load(tiny_model(kind))[0], adapted(tiny_model(kind))
    assert type(model) is type(plain)
    assert models.fingerprint(model) == models.fingerprint(plain)
    with torch.no_grad():
        expected = sequence_logps(plain, padded())[0]
        assert torch.equal(sequence_logps(model, padded())[0], expected)
        moved(model)
        assert not torch.equal(sequence_logps(model, padded())[0], expected)
        with lora.without(model):
            assert torch.equal(sequence_logps(model, padded())[0], expected)
        assert not torch.equal(sequence_logps(model, padded())[0], expected)
        with lora.without(plain):
            assert torch.equal(sequence_logps(plain, padded())[0], expected)
    assert models.fingerprint(model) == models.fingerprint(plain)
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == {
        name for name, _ in model.named_parameters() if ".lora_" in name
    }


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_are_the_models_own(kind, tiny_model):
    model, found = moved(adapted(tiny_model(kind))), []
    assert packable(model, ITEMS)
    for packed in (True, False):
        model.zero_grad()
        values, _ = sequence_logps(model, collate_responses(ITEMS, packed=packed))
        values.sum().backward()
        found.append([values.detach(), *(weight.grad for weight in model.parameters() if weight.requires_grad)])
    for fast, plain in zip(*found, strict=True):
        assert torch.allclose(fast, plain, rtol=1e-4, atol=2e-5)


def test_where_a_begins():
    """Uniform within 1 / sqrt(inputs), another one for each layer and seed; B is 0."""
    model = torch.nn.Module()
    found = {}
    for seed in (0, 1):
        for name in ("one", "two"):
            layer = model.__dict__["_modules"][name] = torch.nn.Module()
            layer.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(4096, 8, bias=False)})
            layer.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(8, 5, bias=False)})
        lora.initialize(model, replace(ADAPTERS, seed=seed))
        for name, layer in lora.layers(model).items():
            a, b = lora._adapters(layer)
            found[name, seed] = a.detach().clone()
            assert (b == 0).all()
            assert 0.999 / 64 < a.max() <= 1 / 64
            assert a.std().item() == pytest.approx(1 / math.sqrt(3 * 4096), rel=0.02)
    assert len({tuple(one.flatten()[:9].tolist()) for one in found.values()}) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_loads_anywhere(kind, tiny_model, tmp_path):
    """Merged as a plain folder, and the adapter in peft, to the log-probs of training."""
    path = tiny_model(kind)
    model, tokenizer = moved(adapted(path)), models.load_tokenizer(path)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    models.save(model, tokenizer, tmp_path / "policy")
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    models.move_adapter_out(tmp_path / "policy")
    models.move_adapter_out(tmp_path / "policy")  # nothing is left to do
    assert not (tmp_path / "policy" / "adapter").exists()
    with torch.no_grad():
        expected, _ = sequence_logps(model, padded())
        whole = models.load(str(tmp_path / "policy"))[0]
        by_peft = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path / "adapter")
        again = models.load(ModelSpec(path, adapter=str(tmp_path / "adapter")))[0]
        of_library = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
        for other in (whole, by_peft.eval(), again, of_library.eval()):
            assert torch.allclose(sequence_logps(other, padded())[0], expected, rtol=2e-5, atol=1e-5)
    assert models.fingerprint(whole) == models.fingerprint(again)
    told = json.loads((tmp_path / "adapter" / "base.json").read_text())
    assert told == {"path": str(Path(path).resolve()), "weights": models.weights_digest(models.load(path)[0])}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 6, told["path"])
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(one.numel() for one in stored.values()) == sum(
        weight.numel() for weight in model.parameters() if weight.requires_grad
    )


@pytest.mark.parametrize(
    "kind,options", [("llama", {}), ("gpt2", {"fan_in_fan_out": True}), ("llama", {"use_rslora": True})]
)
def test_an_adapter_that_peft_wrote(kind, options, tiny_model, tmp_path):
    path, targets = tiny_model(kind), ["c_attn", "c_proj"] if kind == "gpt2" else ["q_proj", "down_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=targets, init_lora_weights=False, **options)
    whole = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), config)
    whole.save_pretrained(tmp_path / "adapter")
    expected = dict(whole.merge_and_unload().named_parameters())
    found = dict(models.load(ModelSpec(path, adapter=str(tmp_path / "adapter")))[0].named_parameters())
    assert found.keys() == expected.keys()
    base = dict(models.load(path)[0].named_parameters())
    assert sum(not torch.equal(weight, base[name]) for name, weight in found.items()) == (6 if kind == "gpt2" else 4)
    for name, weight in found.items():
        assert torch.allclose(weight, expected[name], rtol=0, atol=1e-7), name


def test_an_adapter_of_others_is_refused(tiny_model, tmp_path, monkeypatch):
    path = tiny_model("llama")
    models.save(moved(adapted(path)), models.load_tokenizer(path), tmp_path / "policy")
    models.move_adapter_out(tmp_path / "policy")
    folder = tmp_path / "adapter"
    with pytest.raises(ValueError, match=r"is an adapter of weights \w{12}, found \w{12} at policy.path"):
        models.load(ModelSpec(str(tmp_path / "policy"), adapter=str(folder)))  # merged already
    with pytest.raises(ValueError, match=r"is an adapter of weights"):
        models.load(ModelSpec(tiny_model("qwen2"), adapter=str(folder)))
    (folder / "base.json").unlink()
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", None)  # no weight is read before
    with pytest.raises(ValueError, match=r"found one of other layers: base_model.model.model.layers"):
        models.load(ModelSpec(tiny_model("gpt2"), adapter=str(folder)))
    stored = load_file(folder / "adapter_model.safetensors")
    name = min(stored)
    for more, said in (
        ("base_model.model.lm_head.weight", r"found one of other layers: base_model.model"),
        (name.replace("lora_A.weight", "lora_B.bias"), r"must hold an A and a B for each layer, found \S*lora_B.bias"),
    ):
        save_file({**stored, more: stored[name].clone()}, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=said):
            models.load(ModelSpec(path, adapter=str(folder)))
    save_file({key: one for key, one in stored.items() if key != name}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="found one of other layers"):
        models.load(ModelSpec(path, adapter=str(folder)))
    rank, inputs = stored[name].shape
    for shape in ((rank, inputs + 1), (rank + 1, inputs)):
        save_file({**stored, name: torch.zeros(shape)}, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=rf"has {inputs} inputs and \d+ outputs, found A of \[{shape[0]}"):
            models.load(ModelSpec(path, adapter=str(folder)))


@pytest.mark.parametrize(
    "change,said",
    [
        ({"peft_type": "IA3"}, "must be a plain LoRA adapter, found IA3; merge it with peft"),
        ({"use_dora": True}, "found use_dora"),
        ({"modules_to_save": ["lm_head"], "bias": "all"}, "found bias, modules_to_save"),
        ({"rank_pattern": {"q_proj": 3}}, "found rank_pattern"),
    ],
)
def test_an_adapter_of_another_kind(change, said, tiny_model, tmp_path):
    path = tiny_model("llama")
    lora.save(adapted(path), tmp_path / "adapter", "")
    config = json.loads((file := tmp_path / "adapter" / "adapter_config.json").read_text())
    models.check_adapter(str(tmp_path / "adapter"))
    file.write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=said):
        models.load(ModelSpec(path, adapter=str(tmp_path / "adapter")))


def test_a_folder_that_is_no_adapter(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"policy.adapter must be a folder of a LoRA adapter, found none at"):
        models.check_adapter(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"found a whole model in \S+; take it alone, policy\.path=\S+llama, or"):
        models.check_adapter(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"adapter_config.json must hold a JSON object"):
        models.check_adapter(str(tmp_path))
    lora.save(adapted(tiny_model("llama")), tmp_path / "adapter", "")
    with open(tmp_path / "adapter" / "adapter_model.safetensors", "r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors must hold whole safetensors"):
        models.check_adapter(str(tmp_path / "adapter"))


KNOWN = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"


@pytest.mark.parametrize(
    "targets,said",
    [
        (["q_proj", "attn"], f"must name linear layers, of {KNOWN}; found no layer of that name: attn"),
        (["proj"], "found no layer of that name: proj"),
        (["self_attn"], "found a LlamaAttention: self_attn"),
        (["lm_head"], "must be linear layers between embeddings and head, got lm_head"),
        (["q_proj", "embed_tokens"], "must be linear layers between embeddings and head, got embed_tokens"),
    ],
)
def test_layers_that_get_no_adapter(targets, said, tiny_model):
    with pytest.raises(ValueError, match=f"policy.lora.targets {said}|{said}"):
        models.check_lora(tiny_model("llama"), replace(ADAPTERS, targets=targets))
    models.check_lora(tiny_model("llama"), replace(ADAPTERS, targets=["q_proj", "layers.1.mlp.up_proj"]))


@pytest.mark.parametrize(
    "kind,targets,most", [("llama", ["k_proj"], 16), ("llama", "all-linear", 32), ("gpt2", "all-linear", 32)]
)
def test_a_rank_is_that_of_a_weight_at_most(kind, targets, most, tiny_model):
    """Larger ones are found out before any memory is taken, which is what they would need."""
    models.check_lora(tiny_model(kind), replace(ADAPTERS, targets=targets, rank=most))
    with pytest.raises(ValueError, match=rf"policy.lora.rank must be at most {most}, .* got {10**9}; set policy.lora"):
        models.check_lora(tiny_model(kind), replace(ADAPTERS, targets=targets, rank=10**9))


@pytest.mark.parametrize("kind", KINDS)
def test_which_layers_get_one(kind, tiny_model):
    """All linear ones but the head; of a mixture of experts those of attention, since the others are no layers."""
    model = adapted(tiny_model(kind))
    assert not any("head" in name or "emb" in name for name in lora.layers(model))
    each = {"gpt2": 4, "gpt_neox": 4, "mixtral": 4}.get(kind, 7)
    assert len(lora.layers(model)) == 2 * each
    one = adapted(tiny_model("llama"), replace(ADAPTERS, targets=["q_proj", "layers.1.mlp.up_proj"]))
    assert sorted(name.removeprefix("model.layers.") for name in lora.layers(one)) == [
        *("0.self_attn.q_proj", "1.mlp.up_proj", "1.self_attn.q_proj"),
    ]


def test_dense_and_shared_layers_of_a_mixture_keep_theirs():
    """peft would take fused experts for them, whose weights were linear layers once."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "n_routed_experts": 4}
    model = AutoModelForCausalLM.from_config(Glm4MoeConfig(first_k_dense_replace=1, pad_token_id=0, **sizes, **heads))
    linear, weights = lora.linear(model), dict(model.named_parameters())
    lora.add(model, ADAPTERS)
    assert model.config.model_type == "glm4_moe"
    assert sorted(lora.layers(model)) == sorted(linear)
    assert {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.shared_experts.up_proj"} <= {*linear}
    assert {names[0] for names, _ in merged(model)} >= {*weights}
    assert all("lora_" in name for name, weight in model.named_parameters() if weight.requires_grad)
    phi = AutoModelForCausalLM.from_config(PhimoeConfig(num_local_experts=4, pad_token_id=0, **sizes, **heads))
    assert any("router" in name for name, layer in phi.named_modules() if isinstance(layer, torch.nn.Linear))
    assert not any("router" in name for name in lora.linear(phi))


def test_without_peft_nothing_is_loaded(tiny_model, monkeypatch):
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    monkeypatch.setattr(models, "_read_whole", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=r"policy.lora needs peft, found none; pip install -e '.\[lora\]'"):
        models.check_lora(tiny_model("llama"), ADAPTERS)


def test_a_moving_reference_follows_the_whole_weights(tiny_model):
    """Not A and B each: their product would be another."""
    path = tiny_model("llama")
    policy, base = moved(adapted(path)), dict(models.load(path)[0].named_parameters())
    moving: Any = EMA(0.25, 1).prepare(path, policy, {}, None)  # type: ignore[arg-type]
    moving.after_step(policy)
    weights = {names[0]: weight for names, weight in merged(policy)}
    for name, weight in moving.model.named_parameters():
        assert torch.allclose(weight, 0.75 * base[name] + 0.25 * weights[name], rtol=0, atol=1e-7), name
    assert {names[0] for names, _ in distinct(policy)} == {*weights}


def test_a_live_reference_is_the_policy_without_adapters(tiny_model, tmp_path):
    path = tiny_model("llama")
    policy, plain = adapted(path), models.load(path)[0]
    live: Any = Live(None).prepare(path, policy, {}, None)  # type: ignore[arg-type]
    assert live.model is policy
    assert live.is_initial
    assert "initial policy without its adapters, weights " in live.held
    assert live.fingerprint == models.fingerprint(plain)
    moved(policy)
    for packed in (True, False):
        batch = collate_responses(ITEMS, packed=packed)
        with torch.no_grad():
            assert torch.equal(live.logps(batch, "train"), sequence_logps(plain, batch)[0])
    assert sum(weight.requires_grad for weight in policy.parameters()) == 2 * len(lora.layers(policy))
    shutil.copytree(path, tmp_path / "other")
    other: Any = Live(str(tmp_path / "other")).prepare(path, policy, {}, None)  # type: ignore[arg-type]
    assert other.model is not policy
    assert other.is_initial  # the same weights, wherever they are
    assert f"{tmp_path / 'other'} beside the policy, weights {live.fingerprint[:12]}" in other.held
