"""Load and save a causal language model with its tokenizer, and name its weights."""

import hashlib
import json
import logging
import re
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from dpo.cache import digest
from dpo.data.chats import dated, ends
from dpo.policy import lora, sharded_io
from dpo.policy.attention import using_attention
from dpo.policy.folder import check, check_adapter, check_config, on_hub
from dpo.training import distributed
from dpo.world.sizes import MADE, WORLD_BASE

disable_progress_bar()  # of loading and saving: runs show their own

logger = logging.getLogger(__name__)
MODEL = "a causal language model in safetensors"
BITS = "nf4.safetensors"  # beside the folder of a quantized model
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
NO_NUMBER = ("architectures", "dtype", "transformers_version", "use_cache", *ENDS)  # in a config, decide no log-prob
RANDOM = ("dropout", "pdrop", "layerdrop", "jitter")  # in the names of a config's shares


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how it is read: what `load` takes."""

    path: str  # a Hugging Face folder, a hub name (or name@revision), or "world", which ships with the package
    trust_remote_code: bool = False  # run model code that the folder or repository brings
    chat_template: str | None = None  # in place of the tokenizer's own
    date: str | None = None  # what its chat template prints as today's
    layout: distributed.ParallelLayout | None = None  # of several processes; None: whole in each
    adapter: str | None = None  # folder of a LoRA adapter that is merged into the weights


def spec_of(model: "ModelSpec | str") -> ModelSpec:
    """A path alone is a specification with nothing special."""
    return ModelSpec(model) if isinstance(model, str) else model


def load(
    which: ModelSpec | str, device: torch.device | str = "cpu", adapters: lora.Lora | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer.

    Weights are read from safetensors only, and are float32. The model is in evaluation mode; it has no dropout, so
    training mode computes the same. With a layout each of several processes reads its part of every weight, and none
    ever holds the model whole: a collective.

    adapters: LoRA's, to be trained in place of the weights; at first the model computes what it does without. Where
    these are to be held in 4 bits, the folder is one that `dpo.sft.quantized_policy` made.
    """
    spec = spec_of(which)
    tokenizer = load_tokenizer(spec)
    path, trust_remote_code, layout = spec.path, spec.trust_remote_code, spec.layout
    source = resolve_path(path)
    parted = layout if distributed.world_size() > 1 else None
    config = _config(path, trust_remote_code)
    _silence(config)
    if spec.adapter:
        lora.check_fits(without_weights(spec), check_adapter(spec.adapter))
    try:
        read: Any = partial(sharded_io.read, parted, torch.device(device)) if parted else _read_whole
        model, faults = read(source, config, trust_remote_code, adapters)
    except RuntimeError:  # out of memory, say
        raise
    except Exception as error:  # whatever a config can make of a model's code
        raise ValueError(_no_model(path, MODEL, error)) from error
    for what, names in faults.items():
        if names:
            raise ValueError(
                f"{path} must hold every weight of a {config.model_type}, and no other, found {len(names)} {what}, "
                f"such as {names[0]}; save the model again, or take another"
            )
    if spec.adapter:
        lora.merge(model, check_adapter(spec.adapter), weights_digest(model))
    if names := broken(model):
        raise ValueError(
            f"the weights of {path} must be finite, found {len(names)} that are not, such as {names[0]}; take another "
            "checkpoint"
        )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.eval()
    if not parted:
        nn.Module.to(model, device)
    if adapters:
        trained, every = (sum(p.numel() for p in model.parameters() if p.requires_grad >= flag) for flag in (1, 0))
        every += sum(layer.weight.numel() for layer in lora.in_4_bits(model).values())  # two are in a byte
        bits = f", those of linear layers in 4 bits ({adapters.quantize})" if adapters.quantize else ""
        logger.info(f"LoRA of rank {adapters.rank}: {trained:,} weights are trained beside {every - trained:,}{bits}")
    return model, tokenizer


def _read_whole(
    source: str, config: PreTrainedConfig, trust_remote_code: bool, adapters: lora.Lora | None = None
) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """The model, and the names of weights that do not fit it, by what is the matter."""
    name, revision = on_hub(source)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name,
        **revision,
        config=config,
        dtype=torch.float32,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # to be told of them
        output_loading_info=True,
    )
    if adapters:
        if adapters.quantize is not None:
            _hold_in_4_bits(loaded[0], source)
        lora.add(loaded[0], adapters)
        lora.initialize(loaded[0], adapters)
    report = loaded[1]
    return loaded[0], {
        "missing": sorted(report["missing_keys"]),
        "of another shape": sorted(name for name, *_ in report["mismatched_keys"]),
        "that it has no place for": sorted(report["unexpected_keys"]),
    }


def _hold_in_4_bits(model: PreTrainedModel, source: str) -> None:
    file = Path(source).with_name(BITS)
    if not file.is_file():
        raise ValueError(f"the bits of {source} must lie in {file}, found none; take a folder of sft.quantized_policy")
    from dpo.policy import nf4  # which imports bitsandbytes

    nf4.hold(model, load_file(file))


def save_quantized(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: str, folder: Path) -> None:
    """Round a model in place to what 4 bits stand for; write `policy/` with that, and beside it the bits.

    kind: see `lora.Lora`.
    """
    from dpo.policy import nf4

    save_file(nf4.quantize(model, double=kind == "nf4_double"), folder / BITS)
    save(model, tokenizer, folder / "policy")


def load_tokenizer(which: ModelSpec | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a policy, from where `load` finds it; it may lack a padding token, but not EOS, and the model
    embeds all of its tokens. It has the template and the date of the specification; `save` keeps both with the policy.
    """
    spec = spec_of(which)
    path, trust_remote_code = spec.path, spec.trust_remote_code
    check_template(spec.chat_template)
    name, revision = on_hub(resolve_path(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # the library of tokenizers raises no other
        _config(path, trust_remote_code)  # which is read first, and may be what is at fault
        raise ValueError(_no_model(path, "a tokenizer, tokenizer.json,", error)) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {path} must have an EOS token, or no response could end; set eos_token in its "
            "tokenizer_config.json"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of {path} must have a tokenizer.json, found a {type(tokenizer).__name__} without; "
            "convert it with the tokenizers library"
        )
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > (rows := getattr(_config(path, trust_remote_code).get_text_config(), "vocab_size", needed)):
        raise ValueError(
            f"the model of {path} must embed the {needed} tokens of its tokenizer, found {rows} embeddings; take "
            "the tokenizer that belongs to the model"
        )
    if spec.chat_template is not None:
        tokenizer.chat_template = spec.chat_template
    if spec.date is not None and tokenizer.chat_template:
        tokenizer.chat_template = dated(tokenizer.get_chat_template(), spec.date)
    return tokenizer


def check_template(template: str | None) -> None:
    """Raise a ValueError if what is to be a chat template writes nothing, as the path of one would."""
    if template is not None and not re.search(r"\{[{%]", template):
        raise ValueError(
            "policy.chat_template must be a file NAME.jinja, or the text of a template in Jinja, with {{ or {%, found "
            f"{template[:60]!r}; if that is a path, give that of a file that is here, and ends in .jinja"
        )


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
) -> None:
    """Write a Hugging Face folder, whole or not at all; it replaces the one that was there.

    Its generation config lists all ends of a response, so that other programs stop where sampling does. Adapters are
    merged in it, and alone in `adapter/` inside: see `beside`. For a sharded model a collective.
    """
    target = Path(directory)
    name = uuid.uuid4().hex[:8]
    if distributed.is_sharded(model):
        name = distributed.gathered([name])[0]
    unfinished = target.with_name(f"{target.name}.{name}.unfinished")
    replaced = target.with_name(f"{target.name}.{name}.replaced")
    if model.generation_config is not None:
        first, *more = ends(tokenizer, model.generation_config)
        model.generation_config.eos_token_id = [first, *more] if more else first
    try:
        _use_cache(model.config, True)  # whoever loads the folder samples from it
        if distributed.is_sharded(model):
            sharded_io.write(model, unfinished)
        else:
            (_plain(model) if lora.layers(model) else model).save_pretrained(unfinished)
        if lora.layers(model):
            lora.save(model, unfinished / "adapter", weights_digest(model))
        if not distributed.is_main():
            return
        tokenizer.save_pretrained(unfinished)
        if target.exists():
            target.rename(replaced)
        unfinished.rename(target)
    finally:
        _use_cache(model.config, False)
        if distributed.is_main():
            shutil.rmtree(unfinished, ignore_errors=True)
            if replaced.exists() and not target.exists():
                replaced.rename(target)
            elif target.exists():
                shutil.rmtree(replaced, ignore_errors=True)


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the merged weights."""
    with torch.device("meta"):
        plain = type(model)(model.config)
    state = {name: tensor for names, tensor in sharded_io.merged(model) for name in names}
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def move_adapter_out(policy: Path) -> None:
    """Move the adapter that `save` wrote into a policy's folder out of it, to stand beside."""
    if (policy / "adapter").is_dir():
        shutil.rmtree(policy.with_name("adapter"), ignore_errors=True)
        (policy / "adapter").rename(policy.with_name("adapter"))


def check_lora(which: ModelSpec | str, adapters: lora.Lora) -> None:
    """Raise a ValueError if adapters cannot be added to a model. Reads the model's config alone."""
    lora.targets(without_weights(which), adapters)


def without_weights(which: ModelSpec | str) -> PreTrainedModel:
    """The model on the meta device, where tensors have shapes and no values. Reads its config alone."""
    spec = spec_of(which)
    config = _config(spec.path, spec.trust_remote_code)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
    except Exception as error:  # whatever a config can make of a model's code
        raise ValueError(_no_model(spec.path, MODEL, error)) from error
    return model


def resolve_path(path: str) -> str:
    """Where to load from. A missing folder is an error here, before the hub is asked for it.

    Raises: ValueError if `path` can only be a folder, and is none, or if what it holds cannot be loaded.
    """
    on_hub(path)
    folder = WORLD_BASE if path == "world" else Path(path).expanduser()
    parent = folder.parent
    named = not folder.is_absolute() and not path.startswith(".") and path.count("/") < 2  # as on the hub
    local = not named or (parent != Path(".") and parent.is_dir())
    if folder.is_file():
        raise ValueError(
            f"{path} must be a folder with a model and its tokenizer, found a file; log-probs in files are read by "
            "reference=precomputed"
        )
    if re.fullmatch(r"world_\w+", path) and not folder.is_dir():
        made = " or ".join(MADE)
        raise ValueError(
            f"{path} must be world, or as policy.base {made}, or a folder of that name, found none; take one"
        )
    if local and not folder.is_dir():
        raise ValueError(f"{path} must be a folder with a model and its tokenizer, found none; check the path")
    if not folder.is_dir():
        return path
    check(folder)
    return str(folder)


def ask_hub(path: str) -> None:
    """Raise a ValueError if the hub says that it has no model of that name or revision, or none for us.

    Where it cannot be asked a line says so: the run asks again, and may have it from a cache.
    """
    name, revision = on_hub(path)
    kept = huggingface_hub.try_to_load_from_cache(name, "config.json", **revision)
    if isinstance(kept, str) or huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(name, "config.json", **revision))
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        raise ValueError(_no_model(path, MODEL, error)) from error
    except Exception as error:  # of the network, or its libraries
        why = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning(f"the hub could not be asked for {path}, its run asks again: {why}")


def check_length(which: ModelSpec | str, key: str, length: int) -> None:
    """Raise a ValueError if a model has fewer positions than `length` tokens, the value of `key`.

    Reads the model's config alone. Rotary positions could go on, but past what it was trained on they mean nothing.
    """
    path, positions = spec_of(which).path, positions_of(which)
    if positions is not None and length > positions:
        raise ValueError(
            f"{key} must be at most the {positions} positions of {path}, got {length}; set {key}={positions} or less"
        )


def positions_of(which: ModelSpec | str) -> int | None:
    """How many tokens a model can read, if its config says."""
    spec = spec_of(which)
    return getattr(_config(spec.path, spec.trust_remote_code).get_text_config(), "max_position_embeddings", None)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only what goes into each layer for the backward pass, and compute the rest again there.

    Not of the last layer: its backward pass comes first, and would have all of it in memory again at once.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), using_attention(model, model.config._attn_implementation)  # as in the forward

    options = {"use_reentrant": False, "context_fn": contexts, "preserve_rng_state": False}  # there is no dropout
    for block in distributed.blocks(model)[:-1]:
        block.forward = partial(cast(Any, checkpoint), block.forward, **options)


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256, in hex, of all that a model computes with: its weights, and what its config says of positions, norms and
    windows. For a sharded model a collective.
    """
    told = json.loads(model.config.to_json_string())
    return digest([weights_digest(model), {name: told[name] for name in told if name not in NO_NUMBER}])


def weights_digest(model: nn.Module) -> str:
    """SHA-256, in hex, of a model's weights: names, shapes, dtypes and bytes; tied weights count once, adapters do not.
    Weights in 4 bits are those that they stand for.

    For a sharded model a collective, in which each rank hashes some of the weights.
    """
    named = [(names[0], tensor) for names, tensor in sharded_io.distinct(model)]
    if distributed.is_sharded(model):
        lines = []
        for index, (name, tensor) in enumerate(named):
            whole = distributed.whole(tensor)
            if index % distributed.world_size() == distributed.rank():
                lines.append(_line(name, whole))
        lines = sorted(distributed.gathered(lines))
    else:
        quantized = lora.in_4_bits(model)
        with ThreadPoolExecutor() as pool:  # hashing large arrays releases the interpreter's lock
            lines = [*pool.map(lambda one: _line(one[0], sharded_io.whole_weight(one[0], one[1], quantized)), named)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _line(name: str, tensor: Tensor) -> str:
    flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{name} {tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(flat.numpy().data).hexdigest()}\n"


def broken(model: nn.Module) -> list[str]:
    """Names of weights with values that are not finite; for a sharded model a collective."""
    local = {name: distributed.local(p) for name, p in model.named_parameters()}
    return [name for name, weight in local.items() if distributed.any_true(not weight.isfinite().all())]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills a padded row: EOS where there is no padding token, since masks never look at token ids."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Ids of all tokens, sorted. A model may have rows to spare, or between them, that are no token's.  # (K,) int64"""
    return torch.tensor(sorted(set(tokenizer.get_vocab().values())))


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether token ids mean the same to both."""
    return one.get_vocab() == other.get_vocab() and one.eos_token_id == other.eos_token_id


def check_same_tokenizer(
    path: str, tokenizer: PreTrainedTokenizerBase, policy_path: str, policy_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise a ValueError unless the model at `path` reads the policy's token ids as the policy does."""
    if not same_tokenizer(tokenizer, policy_tokenizer):
        different = len(tokenizer.get_vocab().items() ^ policy_tokenizer.get_vocab().items())
        raise ValueError(
            f"{path} must have the tokenizer of the policy {policy_path}, found {different} other vocabulary "
            f"entries and EOS {tokenizer.eos_token} for {policy_tokenizer.eos_token}; take a model of the same "
            "family"
        )


def _config(path: str, trust_remote_code: bool) -> PreTrainedConfig:
    name, revision = on_hub(resolve_path(path))
    try:
        values, _ = PreTrainedConfig.get_config_dict(name, **revision)
    except OSError as error:
        raise ValueError(_no_model(path, MODEL, error)) from error
    check_config(path, values)
    try:
        return AutoConfig.from_pretrained(name, **revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a class of configs checks
        raise ValueError(_no_model(path, MODEL, error)) from error


def _no_model(path: str, what: str, error: Exception) -> str:
    said = re.sub(r"^\d+ Client Error.*\n+", "", str(error).strip())  # of the hub: what it means is below
    reason = re.sub(r"([:,]|\bor)\s*\n\s*", r"\1 ", said).split("\n")[0].strip() or type(error).__name__
    if "trust_remote_code" in str(error):
        return (
            f"{path} must need no code but the library's, found code of its own; read it, and where you trust it set "
            "policy.trust_remote_code=true"
        )
    if Path(path).expanduser().is_dir():
        return (
            f"{path} must hold {what} as a Hugging Face folder, found otherwise: {reason.rstrip('.')}; copy all its "
            "files there, or take another"
        )
    advice = "Check the spelling, the network and HF_TOKEN."
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        name, revision = on_hub(path)
        wanted = " ".join([name, *(f"--revision {value}" for value in revision.values())])
        advice = (
            f"HF_HUB_OFFLINE forbids to ask it: run `hf download {wanted}` where there is a network, or unset that."
        )
    return (
        f"{path} must be a folder with {what}, or the name of one on the Hugging Face hub; there is no such "
        f"folder, and the hub did not give it: {reason} {advice}"
    )


def _silence(config: PreTrainedConfig) -> None:
    """Turn off what is random in training mode (dropout, dropped layers, a router's jitter), the key-value cache, and
    the router logits that an auxiliary loss would take: the objective is the loss of the config, and nothing beside.
    """
    _use_cache(config, False)
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            _silence(value)
        elif any(word in name for word in RANDOM) and isinstance(value, float):
            setattr(config, name, 0.0)
        elif name == "output_router_logits":
            setattr(config, name, False)


def _use_cache(config: PreTrainedConfig, on: bool) -> None:
    config.use_cache = on
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            _use_cache(value, on)
