"""Each policy of conf/policy that is on the hub: composed, and three steps of its architecture in small, with random
weights and a tokenizer that has the special tokens of its family and a chat template that does what its family's does.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import compose
from conftest import GROUPED, SENTENCES, SMALL
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    Gemma2Config,
    GenerationConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from whole_runs import ROOT, losses, run

from dpo.data.batches import tokenize
from dpo.data.records import Preference, write
from dpo.policy import model as models

SPARE = 5  # rows of the embeddings that are no token's
ASKED, ANSWER = [{"role": "user", "content": "how are you?"}], "I am well, 日本"
CHATML = (
    "{{% if messages[0].role != 'system' %}}{{{{ '<|im_start|>system\n{0}<|im_end|>\n' }}}}{{% endif %}}"
    "{{% for m in messages %}}{{{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"
)
THINKING = (  # a last answer begins with an empty thought, unless it has one
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (  # it has the assistant go on after each chat
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
OLMO = (  # the last turn has no line break after its end
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|assistant|>\n' + m.content + eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% else %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    config: type[PreTrainedConfig]
    options: dict[str, Any]  # of the config
    special: dict[str, str]  # special tokens by their role
    end: str  # of a turn
    listed: tuple[str, ...]  # ends in the generation config
    prompt: str | None  # what a question becomes; None: there are no chats
    template: str | None = None  # that of the folder; None: that of conf/policy, or none
    more: tuple[str, ...] = ()  # tokens without a role
    begins: bool = False  # the tokenizer puts BOS before a text
    pieces: str | None = None  # "llama" or "gemma": SentencePiece's, as in their tokenizer.json; None: byte-level BPE

    @property
    def tied(self) -> bool:
        return bool(self.options.get("tie_word_embeddings", False))


IM, END, START = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
LLAMA_2 = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TIED, FREE = GROUPED | {"tie_word_embeddings": True}, GROUPED | {"tie_word_embeddings": False}
CAPPED = {
    "attn_logit_softcapping": 0.5,
    "final_logit_softcapping": 3.0,
    "sliding_window": 8,
    "query_pre_attn_scalar": 8,
}
TURN = f"{IM}user\nhow are you?{END}\n{IM}assistant\n"
PYTHIA = Family(
    GPTNeoXConfig,
    SMALL | {"intermediate_size": 48, "tie_word_embeddings": False},
    {"bos_token": START, "eos_token": START, "unk_token": START},
    *(START, (START,), None),
    more=("<|padding|>",),
)
SMOL = Family(
    LlamaConfig,
    TIED,
    {"bos_token": IM, "eos_token": END, "unk_token": START, "pad_token": END},
    *(END, (END,), f"{IM}system\nBe kind{END}\n{TURN}"),
    template=CHATML.format("Be kind"),
)
QWEN = {"eos_token": END, "pad_token": START}
FAMILIES = {
    "pythia_410m": PYTHIA,
    "pythia_1_4b": PYTHIA,
    "pythia_2_8b": PYTHIA,
    "mistral_7b": Family(
        MistralConfig, FREE | {"sliding_window": 8}, LLAMA_2, "</s>", ("</s>",),
        "<s><|user|>\nhow are you?</s>\n<|assistant|>\n", begins=True, pieces="llama",
    ),
    "tulu_2_7b": Family(
        LlamaConfig, FREE, LLAMA_2, "</s>", ("</s>",),
        "<s><|user|>\nhow are you?\n<|assistant|>\n", more=("<pad>",), begins=True, pieces="llama",
    ),
    "qwen2_1_5b": Family(
        Qwen2Config, TIED, {"eos_token": START, "pad_token": START}, START, (START,),
        "<|user|>\nhow are you?\n<|assistant|>\n", more=(IM, END),
    ),
    "qwen2_5_0_5b": Family(
        Qwen2Config, TIED, QWEN, END, (END, START),
        f"{IM}system\nBe good{END}\n{TURN}", CHATML.format("Be good"), (IM,),
    ),
    "qwen3_0_6b": Family(
        Qwen3Config, TIED | {"head_dim": 16}, QWEN, END, (END, START),
        f"{TURN}<think>\n\n</think>\n\n", THINKING, (IM, "<think>", "</think>"),
    ),
    "llama3_8b_instruct": Family(
        LlamaConfig, FREE, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        "<|eot_id|>", ("<|end_of_text|>", "<|eot_id|>"),
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhow are you?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        LLAMA_3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), begins=True,
    ),
    "gemma2_2b": Family(
        Gemma2Config, TIED | CAPPED | {"head_dim": 16},
        {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"},
        "<end_of_turn>", ("<eos>",), "<bos><start_of_turn>user\nhow are you?<end_of_turn>\n<start_of_turn>model\n",
        GEMMA, ("<start_of_turn>", "<end_of_turn>"), begins=True, pieces="gemma",
    ),
    "smollm2_135m": SMOL,
    "smollm2_360m": replace(SMOL, options=TIED | {"num_key_value_heads": 1}),
    "olmo2_1b": Family(
        Olmo2Config, FREE | {"num_key_value_heads": 4},
        {"bos_token": START, "eos_token": START, "unk_token": START, "pad_token": "<|pad|>"},
        START, (START,), f"{START}<|user|>\nhow are you?\n<|assistant|>\n", OLMO, (IM, END),
    ),
}  # fmt: skip
LOCAL = {"base", "small", "tiny", "pretrained"}  # of the embedded world, and a user's own


def byte_level(tokens: list[str]) -> Tokenizer:
    bpe = Tokenizer(tokenizer_models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learn = trainers.BpeTrainer(
        vocab_size=320 + len(tokens), special_tokens=tokens, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(SENTENCES, learn)
    return bpe


def sentence_pieces(tokens: list[str], family: str) -> Tokenizer:
    """A space is ▁, which Llama 2's have before each text, too; a character that no piece has is its bytes."""
    bpe = Tokenizer(tokenizer_models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces, first = normalizers.Replace(" ", "▁"), normalizers.Prepend("▁")
    bpe.normalizer = normalizers.Sequence([first, spaces]) if family == "llama" else spaces
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    learn = trainers.BpeTrainer(vocab_size=120 + len(tokens), special_tokens=tokens, show_progress=False)
    bpe.train_from_iterator(SENTENCES, learn)
    made = json.loads(bpe.to_str())
    vocabulary = made["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    bpe = Tokenizer.from_str(json.dumps(made | {"pre_tokenizer": None}))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    bpe.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if family == "llama" else parts)
    return bpe


def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    tokens = list(dict.fromkeys([*family.special.values(), *family.more]))
    bpe = sentence_pieces(tokens, family.pieces) if family.pieces else byte_level(tokens)
    if family.begins:
        bos = family.special["bos_token"]
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **family.special)
    tokenizer.add_tokens([AddedToken(one, special="think" not in one, normalized=False) for one in family.more])
    tokenizer.chat_template = family.template
    return tokenizer


def folder_of(family: Family, target: Path) -> Path:
    tokenizer = tokenizer_of(family)
    ids = {f"{role}_id": tokenizer.convert_tokens_to_ids(token) for role, token in family.special.items()}
    ids = {"bos_token_id": None, "pad_token_id": None} | {k: v for k, v in ids.items() if k != "unk_token_id"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            family.config(**family.options, **ids, vocab_size=len(tokenizer) + SPARE, initializer_range=0.1)
        )
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.convert_tokens_to_ids([*family.listed]))
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def test_every_policy_of_the_hub_is_tried():
    assert set(FAMILIES) == {file.stem for file in (ROOT / "conf/policy").glob("*.yaml")} - LOCAL


@pytest.mark.parametrize("name", FAMILIES)
def test_three_steps(tmp_path, name):
    family, asked = FAMILIES[name], compose("train", "data=file", "data.path=x", f"policy={name}").policy
    key = "path" if asked.path else "base"
    folder = folder_of(family, tmp_path / "model")
    chats = family.prompt is not None
    prompts = [f"What is {n} and {n}?" for n in range(14)]
    pairs = [
        Preference([{"role": "user", "content": prompt}], said(f"It is {2 * n}."), said(f"Is it {3 * n}?"))
        if chats
        else Preference(f"\n\nHuman: {prompt}\n\nAssistant:", f" It is {2 * n}.", f" Is it {3 * n}?")
        for n, prompt in enumerate(prompts)
    ]
    write(tmp_path / "pairs.jsonl", pairs)
    rows, result = run(
        tmp_path / "run",
        *("data=file", f"data.path={tmp_path / 'pairs.jsonl'}", "data.validation_fraction=0.2", f"policy={name}"),
        *(f"policy.{key}={folder}", "lr=1e-3", "max_length=200", "max_new_tokens=3", "steps=3", "batch_size=4"),
        *("evaluation.prompts=2", "evaluation.log_samples=1", "evaluate_every=0", "sft.steps=1", "sft.batch_size=4"),
        *("warmup_steps=0", "threads=1"),
    )
    found = losses(rows)
    assert found[0] == pytest.approx(math.log(2), abs=1e-5)
    assert len(set(found)) == len(found) == 3
    assert result["steps"] == 3
    before, after = (models.load(str(place))[0] for place in (folder, tmp_path / "run" / "policy"))
    shapes = [{one: tuple(weight.shape) for one, weight in model.named_parameters()} for model in (before, after)]
    assert shapes[0] == shapes[1]  # nothing was resized, tied weights are
    assert ("lm_head.weight" in shapes[1] or "embed_out.weight" in shapes[1]) != family.tied
    trained, tokenizer = models.load(str(tmp_path / "run" / "policy"))
    listed = trained.generation_config.eos_token_id
    listed = tokenizer.convert_ids_to_tokens(listed if isinstance(listed, list) else [listed])
    assert set(listed) == {family.end, *family.listed, family.special["eos_token"]}
    spec = models.ModelSpec(str(folder), chat_template=asked.chat_template)
    for reader in (models.load_tokenizer(spec), tokenizer):  # as it was trained, and as it is left
        question = ASKED if chats else "\n\nHuman: how are you?\n\nAssistant:"
        answer = said(ANSWER) if chats else f" {ANSWER}"
        [pair] = tokenize([Preference(question, answer, answer)], reader, 200, "error")
        text = family.prompt or question
        assert pair.prompt_ids == reader(text, add_special_tokens=False)["input_ids"]
        both = reader(text + (ANSWER if chats else f" {ANSWER}"), add_special_tokens=False)["input_ids"]
        assert [*pair.prompt_ids, *pair.chosen_ids] == [*both, reader.convert_tokens_to_ids(family.end)]
        assert reader.decode(pair.chosen_ids[:-1]).strip() == ANSWER


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
