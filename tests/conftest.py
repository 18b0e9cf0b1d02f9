"""Tiny models of several families with a tokenizer trained on the spot, as Hugging Face folders."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

torch.set_num_threads(1)  # with more, tiny models are several times slower on a busy machine
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # no test measures time
settings.load_profile("busy")

SENTENCES = [
    "\n\nHuman: What is the capital of Italy?\n\nAssistant: The capital of Italy is Rome.",
    "\n\nHuman: Tell me about cats and dogs.\n\nAssistant: Cats sleep, dogs run, and both of them eat.",
    "user assistant system: hello there, how are you today? I am well, thank you for asking me that.",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# GPT-2 and GPT-NeoX have one special token for everything and no padding, Llama and Mistral put BOS before a
# text, Qwen2 has a chat template whose turns end in EOS.
SPECIAL = {
    "gemma2": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    "gpt2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "gpt_neox": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "llama": {"bos_token": "<s>", "eos_token": "</s>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>"},
    "mixtral": {"bos_token": "<s>", "eos_token": "</s>"},
    "qwen2": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 2048}
GROUPED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
CONFIGS = {
    "gpt2": lambda **ids: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=2048, **ids),  # dropout 0.1
    "gpt_neox": lambda **ids: GPTNeoXConfig(
        intermediate_size=48,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        tie_word_embeddings=False,
        **SMALL,
        **ids,
    ),
    "llama": lambda **ids: LlamaConfig(attention_dropout=0.1, **GROUPED, **ids),
    "mistral": lambda **ids: MistralConfig(sliding_window=8, **GROUPED, **ids),
    "mixtral": lambda **ids: MixtralConfig(
        num_local_experts=4, output_router_logits=True, router_jitter_noise=0.1, **GROUPED, **ids
    ),
    "gemma2": lambda **ids: Gemma2Config(
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        **GROUPED,
        **ids,
    ),
    "qwen2": lambda **ids: Qwen2Config(tie_word_embeddings=True, **GROUPED, **ids),
}


@pytest.fixture
def dataset_hub(tmp_path):
    """Data sets are read from what a test publishes here, see `dataset_hub.Hub`."""
    from dataset_hub import of_datasets

    with of_datasets(tmp_path / "hub") as hub:
        yield hub


def tiny_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens with the special tokens of the family."""
    special = dict.fromkeys([*SPECIAL[kind].values(), *(["<|im_start|>"] if kind == "qwen2" else [])])
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        ),
    )
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    if kind in ("llama", "mistral", "mixtral"):
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **SPECIAL[kind])
    if kind == "qwen2":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Callable[..., str]:
    """`tiny_model(kind)`: folder of a random model of that family, made once; equal in every session. width: of its
    states.
    """
    made: dict[tuple[str, int], Path] = {}

    def make(kind: str, width: int = SMALL["hidden_size"]) -> str:
        if (kind, width) not in made:
            tokenizer = tiny_tokenizer(kind)
            config = CONFIGS[kind](
                vocab_size=len(tokenizer) + 3,  # real models have more rows than tokens, too
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            if width != SMALL["hidden_size"]:
                config.hidden_size, config.intermediate_size, config.head_dim = width, 2 * width, width // 4
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
            made[kind, width] = tmp_path_factory.mktemp("models") / kind
            model.save_pretrained(made[kind, width])
            tokenizer.save_pretrained(made[kind, width])
        return str(made[kind, width])

    return make


SLOWEST = (
    *("slurm", "layouts", "train", "launch", "studies", "chains", "coupled_steps", "real_model"),
    *("whole_step", "readme", "step_benchmark", "reports", "stages", "experiments", "sharding", "directory"),
)


def pytest_collection_modifyitems(items):
    """The files that take longest first: of two processes none is left with one when the other has ended."""
    place = {f"test_{name}": number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return _skips_nothing((yield))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return _skips_nothing((yield))


def _skips_nothing(report):
    """Where SKIP_NOTHING is set, as in CI, what a test wants and does not find is an error."""
    if report.skipped and os.environ.get("SKIP_NOTHING"):
        report.outcome = "failed"
        report.longrepr = f"skipped, where nothing may be: {report.longrepr}"
    return report
