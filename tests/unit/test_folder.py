"""Every folder that cannot be a policy or a reference says which file is the matter, before anything is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS
from safetensors.torch import load_file, save_file
from test_model import copy, edit
from transformers import Qwen2ForSequenceClassification

from dpo.policy import model as models
from dpo.policy.folder import check, check_config
from dpo.references import Frozen

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n"
PAGE = b"<!DOCTYPE html><html>404</html>"


@pytest.fixture
def folder(tiny_model, tmp_path):
    return copy(tiny_model("llama"), tmp_path / "model")


def shards(folder: Path, **index) -> None:
    """The weights in two files, and an index of them."""
    weights = load_file(folder / WEIGHTS)
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    places = {name: names[number % 2] for number, name in enumerate(weights)}
    for file in names:
        save_file({name: weights[name] for name in weights if places[name] == file}, folder / file, {"format": "pt"})
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places} | index))


@pytest.mark.parametrize(
    "name", [WEIGHTS, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize(
    "damage,said",
    [
        (lambda file: file[: len(file) // 2], ""),
        (lambda file: file[:3], ""),
        (lambda file: file + b"x", ""),
        (lambda _: b"", "an empty file"),
        (lambda _: b"[]", ""),
        (lambda _: LFS, "git lfs pull"),
        (lambda _: PAGE, "a web page"),
        (None, "no file that can be read"),  # a link to nothing, as an ended download leaves it
    ],
)
def test_a_damaged_file_is_named_before_anything_is_loaded(folder, name, damage, said):
    file = folder / name
    content = file.read_bytes()
    file.unlink()
    if damage is None:
        file.symlink_to("/nowhere/file")
    else:
        file.write_bytes(damage(content))
    for ask in (models.resolve_path, models.load, Frozen):  # what planning asks, a run, a reference
        with pytest.raises(ValueError, match=f"{file} must hold .*{said}"):
            ask(str(folder))
    file.unlink()
    file.write_bytes(content)
    models.load(str(folder))  # what was found is not held against a folder that is mended


def test_shards(folder):
    shards(folder)
    check(folder)
    models.load(str(folder))
    second = folder / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=f"{second} must hold whole safetensors, found {len(whole) - 40} bytes"):
        check(folder)
    second.unlink()
    with pytest.raises(ValueError, match=f"{second} must hold whole safetensors, found no file"):
        check(folder)
    shutil.copy(folder / "model-00001-of-00002.safetensors", second)
    with pytest.raises(ValueError, match=f"{second} must hold the weights that {INDEX} places there, found no "):
        check(folder)


@pytest.mark.parametrize("index", [{"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_an_index_without_places(folder, index):
    shards(folder, **index)
    with pytest.raises(ValueError, match=rf"{folder / INDEX} must hold metadata, and the file of every weight"):
        check(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_no_floats(folder, dtype):
    weights = load_file(folder / WEIGHTS)
    weights["model.norm.weight"] = weights["model.norm.weight"].to(dtype)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{WEIGHTS} must hold float weights, .* model\.norm\.weight"):
        check(folder)


@pytest.mark.parametrize(
    "name,said", [("pytorch_model.bin", "pickled"), ("model.gguf", "GGUF"), ("notes.txt", "config.json, ")]
)
def test_other_weights(folder, name, said):
    (folder / WEIGHTS).rename(folder / name)
    with pytest.raises(ValueError, match=f"{folder} must hold its weights in {WEIGHTS}, .* found {said}"):
        check(folder)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("sharded", [False, True])
def test_fewer_layers_than_the_config_says(tiny_model, tmp_path, kind, sharded):
    folder = copy(tiny_model(kind), tmp_path / "model")
    if sharded:
        shards(folder)
    check(folder)
    edit(folder / "config.json", **{"num_hidden_layers" if kind == "llama" else "n_layer": 4})
    with pytest.raises(ValueError, match=r"weights of the 4 layers that its config.json says, found those of 2; copy"):
        check(folder)


def test_no_model_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"must hold a model's config\.json, found nothing there"):
        check(tmp_path)


@pytest.mark.parametrize("beside", [False, True])
def test_an_adapter(folder, beside):
    """Beside whole weights, too: where peft is installed, the library would load the adapter's base instead."""
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    if not beside:
        (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"adapter of some/base; .* policy.path=some/base policy.adapter=.*merge_and_"):
        check(folder)


def test_quantized(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match=r"must have float weights, found quantization_config of fp8"):
        check(folder)


def test_another_head_on_tied_weights(tmp_path):
    """A reward model of tied embeddings has every weight of the language model, so nothing else would tell."""
    Qwen2ForSequenceClassification(CONFIGS["qwen2"](vocab_size=400, pad_token_id=0)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(a Qwen2ForCausalLM\), found a Qwen2ForSequenceClassification"):
        check(tmp_path)


@pytest.mark.parametrize(
    "config,said",
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "with"),
        ({"model_type": "bart", "architectures": ["BartForConditionalGeneration"], "is_encoder_decoder": True}, "with"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "an encoder"),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, "an encoder"),
        ({"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}, "a Qwen2VLForCond"),
        ({"model_type": "vit"}, "a vit"),
        ({"model_type": "llama", "architectures": ["LlamaModel"]}, "a LlamaModel"),
        (
            {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForSequenceClassification"], "text_config": {}},
            "a Qwen3_5ForSequenceClassification",
        ),
        ({"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"]}, "a Qwen3_5ForCond"),
        (
            {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"], "text_config": {}},
            "a Llama4ForConditionalGeneration",
        ),
    ],
)
def test_what_is_no_causal_language_model(config, said):
    with pytest.raises(ValueError, match=f"x must be a causal language model.* found .*{said}"):
        check_config("x", config)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"model_type": "llama", "architectures": ["LLaMAForCausalLM"]},  # as the first conversions wrote it
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        {"model_type": "bert", "architectures": ["BertLMHeadModel"], "is_decoder": True},
        {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},  # the class of its text, too
        {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": {}},
        {"model_type": "of_mine", "auto_map": {"AutoConfig": "a.A"}},
    ],
)
def test_causal_language_models(config):
    check_config("x", config)


def test_code_of_its_own_needs_trust(folder):
    edit(folder / "config.json", model_type="of_mine", auto_map={"AutoConfig": "own.Config"})
    with pytest.raises(ValueError, match=r"code of its own; .* set policy\.trust_remote_code=true"):
        models.load(str(folder))


@pytest.mark.parametrize(
    "changed,said",
    [
        ({"vocab_size": 1000}, r"2 of another shape, such as lm_head\.weight"),
        ({"attention_bias": True}, r"8 missing, such as model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"num_hidden_layers": 1}, r"9 that it has no place for, such as model\.layers\.1"),
    ],
)
def test_weights_of_another_config(folder, changed, said):
    edit(folder / "config.json", **changed)
    with pytest.raises(ValueError, match=f"every weight of a llama, and no other, found {said}"):
        models.load(str(folder))


def test_weights_that_are_not_finite(folder):
    weights = load_file(folder / WEIGHTS)
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=r"must be finite, found 1 that are not, such as model\.norm\.weight"):
        models.load(str(folder))
