"""Models survive a round trip, have nothing random in them, and a folder that cannot serve says why."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from dpo.data.batches import collate_responses
from dpo.policy import model as models
from dpo.policy import sharded_io
from dpo.policy.logps import packable, sequence_logps
from dpo.references import Frozen
from dpo.training import distributed

KINDS = ["gpt2", "gpt_neox", "llama", "mistral", "qwen2"]


def copy(folder, target, **config):
    """A copy of a model's folder with other values in its config.json."""
    shutil.copytree(folder, target)
    edit(target / "config.json", **config)
    return target


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("kind", KINDS)
def test_more_tokens_than_positions_are_refused(tiny_model, kind):
    """Learned positions would be an index error; rotary ones are refused, too."""
    models.check_length(tiny_model(kind), "max_length", 2048)
    with pytest.raises(ValueError, match="max_length must be at most the 2048 positions") as error:
        models.check_length(tiny_model(kind), "max_length", 2049)
    assert str(error.value).endswith("got 2049; set max_length=2048 or less")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_random_in_training(tiny_model, tmp_path, kind):
    names = ("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout", "hidden_dropout")
    folder = copy(tiny_model(kind), tmp_path / "model", **dict.fromkeys(names, 0.5))
    model, _ = models.load(str(folder))
    assert not model.training
    assert not model.config.use_cache
    input_ids = torch.arange(20)[None]
    evaluated = model(input_ids)
    assert evaluated.past_key_values is None
    torch.testing.assert_close(model.train()(input_ids).logits, evaluated.logits, rtol=0, atol=0)


def test_dropout_that_no_config_knows_is_off(tiny_model, monkeypatch):
    make = GPT2MLP.__init__

    def with_dropout(self, *sizes):
        make(self, *sizes)
        self.dropout = torch.nn.Dropout(0.5)

    monkeypatch.setattr(GPT2MLP, "__init__", with_dropout)
    model, _ = models.load(tiny_model("gpt2"))
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


def test_experts_have_nothing_random_and_no_loss_of_their_own(tiny_model):
    """In training mode Mixtral's router would jitter; and what it puts out is no part of any objective."""
    model, _ = models.load(tiny_model("mixtral"))
    assert (model.config.output_router_logits, model.config.router_jitter_noise) == (False, 0.0)
    items = [([5, 6, 7] * 4, [[8, 9], [10, 11, 12]]), ([13], [[14], [15, 16]])]
    assert packable(model, items)
    plain, _ = sequence_logps(model, collate_responses(items, packed=False))
    model.train()
    for packed in (True, False):
        logps, _ = sequence_logps(model, collate_responses(items, packed=packed))
        assert logps.tolist() == pytest.approx(plain.tolist(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_model_is_the_same(tiny_model, tmp_path, kind):
    model, tokenizer = models.load(tiny_model(kind))
    models.save(model, tokenizer, tmp_path / "policy")
    assert json.loads((tmp_path / "policy" / "config.json").read_text())["use_cache"] is True
    assert not model.config.use_cache  # training goes on without
    again, its_tokenizer = models.load(str(tmp_path / "policy"))
    assert models.fingerprint(again) == models.fingerprint(model)
    assert its_tokenizer("Human: cats ☃")["input_ids"] == tokenizer("Human: cats ☃")["input_ids"]
    assert its_tokenizer.chat_template == tokenizer.chat_template
    assert list(tmp_path.iterdir()) == [tmp_path / "policy"]
    assert not list((tmp_path / "policy").glob("*.bin"))
    models.check_same_tokenizer("a", its_tokenizer, "b", tokenizer)


def test_generation_config_is_kept(tiny_model, tmp_path):
    folder = copy(tiny_model("qwen2"), tmp_path / "model")
    GenerationConfig(eos_token_id=[0, 1], temperature=0.6, do_sample=True).save_pretrained(folder)
    model, tokenizer = models.load(str(folder))
    models.save(model, tokenizer, tmp_path / "policy")
    kept = models.load(str(tmp_path / "policy"))[0].generation_config
    assert (kept.eos_token_id, kept.temperature) == ([0, 1], 0.6)
    assert kept.use_cache is not False  # training turns the cache off, sampling wants it
    assert json.loads((tmp_path / "policy" / "generation_config.json").read_text()).get("use_cache") is not False


def test_save_replaces_whole_or_not_at_all(tiny_model, tmp_path, monkeypatch):
    model, tokenizer = models.load(tiny_model("gpt2"))
    models.save(model, tokenizer, tmp_path / "policy")
    (tmp_path / "policy" / "note").touch()
    before = models.fingerprint(model)
    with torch.no_grad():
        model.transformer.wte.weight += 1
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            models.save(model, tokenizer, tmp_path / "policy")
    rename = Path.rename

    def fail(path, target):
        if path.suffix == ".unfinished":
            raise OSError("input/output error")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="input/output"):
            models.save(model, tokenizer, tmp_path / "policy")
    assert models.fingerprint(models.load(str(tmp_path / "policy"))[0]) == before
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    models.save(model, tokenizer, tmp_path / "policy")
    assert models.fingerprint(models.load(str(tmp_path / "policy"))[0]) == models.fingerprint(model) != before
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    assert not (tmp_path / "policy" / "note").exists()


def test_code_that_a_folder_brings_is_not_executed(tiny_model, tmp_path):
    """Not by default: of a policy as of a reference, whose model and tokenizer name it."""
    folder, crater = tmp_path / "model", tmp_path / "crater"
    shutil.copytree(tiny_model("llama"), folder)
    (folder / "planted.py").write_text(f"open({str(crater)!r}, 'w')\nclass Planted: ...\n")
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text()) | {"model_type": "planted", "tokenizer_class": "Planted"}
        content["auto_map"] = dict.fromkeys(classes, "planted.Planted") | {"AutoTokenizer": [None, "planted.Planted"]}
        (folder / name).write_text(json.dumps(content))
    for load in (models.load, models.load_tokenizer):
        with pytest.raises(ValueError):
            load(str(folder))
    assert not crater.exists()


def test_code_that_is_trusted_is_asked_for(tiny_model, monkeypatch):
    """Of config, weights and tokenizer, and of none of them otherwise."""
    asked = []
    for place in (models.AutoConfig, models.AutoModelForCausalLM, models.AutoTokenizer):

        def watched(*given, name=place.__name__, real=place.from_pretrained, **named):
            asked.append((name, named["trust_remote_code"]))
            return real(*given, **named)

        monkeypatch.setattr(place, "from_pretrained", watched)
    for trusted in (True, False):
        asked.clear()
        models.load(models.ModelSpec(tiny_model("llama"), trust_remote_code=trusted))
        names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
        assert set(asked) == {(name, trusted) for name in names}


@pytest.mark.parametrize("name", ["attn_pdrop", "hidden_dropout", "encoder_layerdrop", "router_jitter_noise"])
def test_shares_that_are_random_are_off_by_any_name(name):
    config = LlamaConfig(**{name: 0.5}, initializer_range=0.5)
    models._silence(config)
    assert (getattr(config, name), config.initializer_range) == (0.0, 0.5)


def test_fingerprint_sees_every_weight(tiny_model):
    found = set()
    model, _ = models.load(tiny_model("llama"))
    for weight in [None, *model.parameters()]:
        with torch.no_grad():
            if weight is not None:  # the last bit of one number
                number = weight.view(-1)[-1:]
                number.copy_(torch.nextafter(number, torch.tensor(torch.inf)))
        found.add(models.fingerprint(model))
    assert len(found) == 1 + len(list(model.parameters()))


def test_fingerprint_sees_what_the_weights_are_computed_with(tiny_model):
    model, _ = models.load(tiny_model("llama"))
    found = {models.fingerprint(model)}
    for name, value in (("rms_norm_eps", 0.5), ("rope_parameters", {"rope_theta": 5.0, "rope_type": "default"})):
        setattr(model.config, name, value)
        found.add(models.fingerprint(model))
    assert len(found) == 3
    for name, value in (("use_cache", True), ("dtype", torch.bfloat16), ("pad_token_id", 7), ("eos_token_id", 9)):
        setattr(model.config, name, value)
        assert models.fingerprint(model) in found


def test_weights_digest_sees_names_shapes_and_dtypes_and_ties_once():
    def of(**weights):
        module = torch.nn.Module()
        for name, weight in weights.items():
            setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
        return models.weights_digest(module)

    zeros, half = torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)
    assert len({of(a=zeros), of(b=zeros), of(a=zeros.view(2, 2)), of(a=half), of(a=zeros, b=zeros)}) == 5
    assert of(a=half) != of(a=half.to(torch.float16))  # of the same shape and bytes
    assert of(a=zeros, b=half) == of(b=half, a=zeros)
    scalar = torch.tensor(1.0)
    assert of(a=scalar) != of(a=scalar[None])
    tied = torch.nn.Module()
    tied.a = tied.b = torch.nn.Parameter(zeros)
    assert models.weights_digest(tied) == of(a=zeros)
    assert of(a=torch.arange(6.0).view(2, 3).T) == of(a=torch.arange(6.0).view(2, 3).T.contiguous())
    assert of(a=torch.arange(8.0)[::2]) == of(a=2 * torch.arange(4.0))


def test_bf16(tiny_model, tmp_path):
    model, tokenizer = models.load(tiny_model("gpt2"))
    full = models.fingerprint(model)
    models.save(model.to(torch.bfloat16), tokenizer, tmp_path / "half")
    half, _ = models.load(str(tmp_path / "half"))
    assert {weight.dtype for weight in half.parameters()} == {torch.float32}
    assert len({full, models.fingerprint(model), models.fingerprint(half)}) == 3
    assert models.fingerprint(half.to(torch.bfloat16)) == models.fingerprint(model)


def test_device(tiny_model):
    model, _ = models.load(tiny_model("gpt2"), "meta")
    assert {weight.device.type for weight in model.parameters()} == {"meta"}


def test_padding_needs_no_token(tiny_model):
    for kind, name in (("gpt2", "eos_token_id"), ("qwen2", "pad_token_id")):
        model, tokenizer = models.load(tiny_model(kind))
        rows = model.get_input_embeddings().num_embeddings
        assert models.pad_id(tokenizer) == getattr(tokenizer, name)
        assert (len(tokenizer), rows) == (len(tokenizer), len(tokenizer) + 3)  # nothing was added or resized


def test_the_shipped_base_has_a_name(tiny_model, monkeypatch):
    monkeypatch.setattr(models, "WORLD_BASE", Path(tiny_model("llama")))
    assert models.load("world")[0].config.model_type == "llama"
    monkeypatch.setattr(models, "WORLD_BASE", Path("/nowhere"))
    with pytest.raises(ValueError, match="world must be a folder"):
        models.load("world")


def test_missing_folders_and_hub_names(tmp_path, monkeypatch, offline):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("/absent/folder", "./absent", "runs/absent", str(tmp_path / "absent")):
        with pytest.raises(ValueError, match=f"{path} must be a folder .* check the path"):
            models.load(path)
    with pytest.raises(ValueError, match=r"nobody/nothing must be .* the hub did not give it.*run `hf download"):
        models.load("nobody/nothing")


def test_pickled_weights_are_refused(tiny_model, tmp_path, offline):
    folder = copy(tiny_model("gpt2"), tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        models.load(str(folder))


def test_missing_weights_are_refused(tiny_model, tmp_path):
    folder = copy(tiny_model("llama"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        models.load(str(folder))


def test_folders_without_a_part(tiny_model, tmp_path, offline):
    said = {"config.json": "", "tokenizer.json": " must hold a tokenizer, tokenizer.json, .* and convert; copy all"}
    for name in said:
        folder = copy(tiny_model("llama"), tmp_path / name)
        for path in folder.glob("tokenizer*" if name.startswith("tokenizer") else name):
            path.unlink()
        with pytest.raises(ValueError, match=str(folder) + said[name]):
            models.load(str(folder))


def test_a_config_that_its_own_class_refuses(tiny_model, tmp_path):
    folder = copy(tiny_model("llama"), tmp_path / "model")
    edit(folder / "config.json", hidden_size=33)
    with pytest.raises(
        ValueError, match=r"model must hold a causal .* found otherwise: .*\(33\) is not a multiple .*; copy"
    ):
        models.load(str(folder))


def test_tokenizer_without_eos_is_refused(tiny_model, tmp_path):
    folder = copy(tiny_model("llama"), tmp_path / "model")
    edit(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ValueError, match="must have an EOS token"):
        models.load(str(folder))


@pytest.mark.parametrize("given", ["/nope.jinja", "", "chat"])
def test_a_path_is_no_chat_template(tiny_model, given):
    with pytest.raises(ValueError, match=f"policy.chat_template must be a file .* found '{given}'; if that is"):
        models.load_tokenizer(models.ModelSpec(tiny_model("llama"), chat_template=given))
    models.load_tokenizer(models.ModelSpec(tiny_model("llama"), chat_template="{% if true %}chat{% endif %}"))


def test_tokenizer_larger_than_the_model_is_refused(tiny_model, tmp_path, monkeypatch):
    model, tokenizer = models.load(tiny_model("llama"))
    tokenizer.add_tokens(["one", "two", "three"])
    models.save(model, tokenizer, tmp_path / "fits")
    models.load(str(tmp_path / "fits"))  # the rows to spare
    tokenizer.add_tokens(["four"])
    models.save(model, tokenizer, tmp_path / "model")
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", None)  # no weight is read before
    with pytest.raises(ValueError, match="must embed the"):
        models.load(str(tmp_path / "model"))


def test_tokenizers_that_differ_are_refused(tiny_model):
    llama, gpt2 = (models.load_tokenizer(tiny_model(kind)) for kind in ("llama", "gpt2"))
    with pytest.raises(ValueError, match="reference must have the tokenizer of the policy policy"):
        models.check_same_tokenizer("reference", gpt2, "policy", llama)
    other = models.load_tokenizer(tiny_model("llama"))
    other.eos_token = "Rome"  # one of its tokens
    assert other.get_vocab() == llama.get_vocab()
    with pytest.raises(ValueError, match=r"found 0 other vocabulary entries and EOS Rome for </s>"):
        models.check_same_tokenizer("reference", other, "policy", llama)
    more = models.load_tokenizer(tiny_model("llama"))
    more.add_tokens(["one"])
    with pytest.raises(ValueError, match=r"found 1 other vocabulary entries"):
        models.check_same_tokenizer("reference", more, "policy", llama)


def test_the_ids_of_tokens_may_leave_some_out(tiny_model):
    class Sparse:
        def get_vocab(self):
            return {"a": 7, "b": 0, "c": 3, "same as c": 3}

        def __len__(self):
            return 4

    assert models.vocabulary(Sparse()).tolist() == [0, 3, 7]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("packed", [True, False])
def test_recomputed_gradients_are_the_same(tiny_model, kind, packed):
    model, _ = models.load(tiny_model(kind))
    batch = collate_responses([([5, 6, 7] * 4, [[8, 9], [10, 11, 12]]), ([13], [[14], [15, 16]])], packed=packed)
    within = next(
        child for child in models.distributed.blocks(model)[0].children() if "Attention" in type(child).__name__
    )
    passes = []
    within.register_forward_hook(lambda *_: passes.append(model.config._attn_implementation))
    gradients = []
    for again in (False, True):
        if again:
            models.checkpoint_activations(model)
        model.zero_grad()
        sequence_logps(model, batch)[0].sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(mine, other) for mine, other in zip(*gradients, strict=True))
    assert len(passes) == 3  # once, and then once more in the backward pass
    assert len(set(passes)) == 1


def test_recomputing_keeps_less_and_changes_no_gradient(tiny_model):
    kept, gradients = [], []
    for again in (False, True):
        model, _ = models.load(tiny_model("llama"))
        if again:
            models.checkpoint_activations(model)
        weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
        sizes = {}

        def keep(tensor, weights=weights, sizes=sizes):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                sizes[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(torch.arange(100)[None]).logits
        logits.square().mean().backward()
        kept.append(sum(sizes.values()))
        gradients.append([weight.grad for weight in model.parameters()])
    assert kept[1] < 0.6 * kept[0]  # the last of two layers is kept
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.fixture
def hub(tiny_model, tmp_path, monkeypatch, offline):
    """The cache of a hub that cannot be asked, with two commits of one model; the newer has another vocabulary, too."""
    place = tmp_path / "hub" / "models--someone--tiny"
    for commit, kind in (("a" * 40, "gpt_neox"), ("b" * 40, "llama")):
        shutil.copytree(tiny_model(kind), place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("b" * 40)
    (place / "refs" / "first").write_text("a" * 40)
    for constants in (huggingface_hub.constants, huggingface_hub.file_download.constants):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return "someone/tiny"


@pytest.mark.parametrize("revision,kind", [("", "llama"), (f"@{'a' * 40}", "gpt_neox"), ("@first", "gpt_neox")])
def test_a_revision_is_of_config_tokenizer_and_weights(hub, tiny_model, revision, kind):
    expected, tokenizer = models.load(tiny_model(kind))
    found, its_tokenizer = models.load(hub + revision)
    assert models.fingerprint(found) == models.fingerprint(expected)
    assert type(found) is type(expected)
    assert its_tokenizer.bos_token == tokenizer.bos_token
    assert models.positions_of(hub + revision) == 2048
    sharded = snapshot_of(hub + revision)
    assert sharded.endswith(("b" if kind == "llama" else "a") * 40)


def snapshot_of(source):
    """What each of several processes reads its part from."""
    seen = []

    def stop(folder):
        seen.append(str(folder))
        raise RuntimeError("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded_io, "check", stop)
        with pytest.raises(RuntimeError, match="enough"):
            sharded_io.read(None, torch.device("cpu"), source, None, False)
    return seen[0]


def test_a_revision_that_is_not_there_is_named(hub):
    with pytest.raises(ValueError, match="run `hf download someone/tiny --revision second` where there is a network"):
        models.load(f"{hub}@second")


@pytest.mark.parametrize("given", ["model@deadbeef", "me/model@v1", "model@", "{}/model@v1", "world@v1"])
def test_a_folder_has_no_revision(tiny_model, tmp_path, monkeypatch, given):
    """Relative as hub names are, too: the library would load the folder, and pass over the revision."""
    for place in ("model", "me/model"):
        copy(tiny_model("llama"), tmp_path / place)
    monkeypatch.chdir(tmp_path)
    given = given.format(tmp_path)
    for ask in (models.resolve_path, models.load, Frozen):  # what planning asks, a run, a reference
        with pytest.raises(ValueError, match=f"a folder has no revision, found {given}; take {given.split('@')[0]}$"):
            ask(given)


def test_a_folder_may_have_an_at_in_its_name(tiny_model, tmp_path):
    folder = copy(tiny_model("llama"), tmp_path / "step@100")
    assert models.fingerprint(models.load(str(folder))[0]) == models.fingerprint(models.load(tiny_model("llama"))[0])


def test_the_way_of_several_processes_reads_the_same_folder(tmp_path, tiny_model):
    """Weights to the bit, and the ends of a response that the generation config lists beside EOS."""
    model, tokenizer = models.load(tiny_model("llama"))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 9]
    models.save(model, tokenizer, tmp_path / "model")
    layout = distributed.ParallelLayout(group=None, offload=False, precision="fp32")
    read, faults = sharded_io.read(layout, torch.device("cpu"), str(tmp_path / "model"), model.config, False)
    assert not any(faults.values())
    assert models.fingerprint(read) == models.fingerprint(model)
    assert {*read.generation_config.eos_token_id} == {tokenizer.eos_token_id, 9}
