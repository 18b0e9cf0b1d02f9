"""What the report says that training costs, against what torch and peft count."""

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dpo.data import report
from dpo.data.batches import collate_pairs, mismatched, size, tokenize
from dpo.data.records import Preference
from dpo.data.truncation import Limits
from dpo.policy import cost, lora
from dpo.policy import model as models
from dpo.policy.logps import sequence_logps

LIMITS = Limits(200, 20, "error")


def preferences():
    """Prompts and responses of many lengths, up to some 60 tokens."""
    words = lambda n, start: " ".join(f"w{(start + k) * 7 % 90}" for k in range(n))  # noqa: E731
    return [
        Preference(words(2 + n, n), f" {words(1 + n * 5 % 11, n)}.", f" {words(1 + n * 3 % 13, n + 1)}!")
        for n in range(16)
    ]


def table(pairs):
    """The columns of `measured` that sizes are made of, of whole pairs."""
    return pd.DataFrame(
        {
            "prompt": [len(pair.prompt_ids) for pair in pairs],
            "chosen": [len(pair.chosen_ids) for pair in pairs],
            "rejected": [len(pair.rejected_ids) if pair.label is None else -1 for pair in pairs],
        }
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("packed", [True, False])
def test_flops_of_a_forward_pass(tiny_model, kind, packed):
    """All but attention scores, and what is left out of a packed row: the last feed-forward part where none is scored."""
    model, tokenizer = models.load(tiny_model(kind), "cpu")
    pairs = tokenize(preferences()[:1], tokenizer, 200, "error")
    batch = collate_pairs(pairs, torch.arange(1), torch.ones(1, dtype=torch.bool), pad_id=0, packed=packed)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        sequence_logps(model, batch)
    scored = len(batch.labels) if packed else batch.input_ids.numel()
    whole = models.without_weights(tiny_model(kind))
    assert cost.forward(whole, batch.input_ids.numel(), scored) == pytest.approx(counted.get_total_flops(), rel=0.15)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("targets", ["all-linear", ["last"]])
def test_adapters_are_those_that_peft_makes(tiny_model, kind, targets):
    model = models.without_weights(tiny_model(kind))
    if targets == ["last"]:
        targets = [lora.targets(model, lora.Lora(3, 32, "all-linear", 0))[-1].rpartition(".")[2]]
    added = lora.Lora(3, 32, targets, 0)
    found = cost.adapters(model, added)
    lora.add(model, added)
    assert found == sum(weight.numel() for weight in model.parameters() if weight.requires_grad) > 0


@pytest.mark.parametrize("packed", [True, False])
def test_tokens_of_pairs_are_those_of_their_batches(tiny_model, packed):
    tokenizer = models.load_tokenizer(tiny_model("gpt2"))
    pairs = tokenize(preferences(), tokenizer, 200, "error")
    found = report.sizes(table(pairs), LIMITS, False, packed).tolist()
    prompts = [(1 if packed else 2) * len(pair.prompt_ids) for pair in pairs]
    scored = [len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs]
    assert found == [[prompt + some, some] for prompt, some in zip(prompts, scored, strict=True)]


def test_what_is_cut_counts_as_it_is_cut(tiny_model):
    tokenizer = models.load_tokenizer(tiny_model("gpt2"))
    whole, cut = (tokenize(preferences(), tokenizer, most, "truncate") for most in (200, 12))
    assert any(len(pair.prompt_ids) == 1 for pair in cut)  # as short as a prompt may be
    assert any("rejected" in pair.cut for pair in cut)
    found = report.sizes(table(whole), Limits(12, 5, "truncate"), False, True)
    assert found[:, 0].tolist() == [size(pair.prompt_responses) for pair in cut]


@pytest.mark.parametrize("single", [True, False])
def test_a_loss_of_labels_learns_from_responses(tiny_model, single):
    """Of a pair from two; each beside a response to another prompt."""
    tokenizer, rows = models.load_tokenizer(tiny_model("gpt2")), preferences()
    if single:
        rows = [Preference(row.prompt, row.chosen, row.chosen, label=n % 2 == 0) for n, row in enumerate(rows)]
    pairs = tokenize(rows, tokenizer, 200, "error")
    beside = mismatched(pairs, tokenizer, 200, "pairs")
    found = report.sizes(table(pairs), LIMITS, True, True)
    assert len(found) == len(beside) == len(rows) * (1 if single else 2)
    assert found[:, 0].sum() == sum(size(pair.prompt_responses) for pair in beside)
    assert found[:, 1].sum() == sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in beside)


@pytest.mark.parametrize(
    ("items", "epochs", "steps", "expected"),
    [(10, 1, None, (3, 10)), (10, 2, None, (6, 20)), (10, 1, 2, (2, 8)), (10, 1, 4, (4, 14)), (0, 1, None, (0, 0))],
)
def test_steps_and_the_items_of_their_batches(items, epochs, steps, expected):
    """Batches of 4: of ten items the third has two."""
    assert report.seen(items, 4, epochs, steps) == expected


def needed(model, **other):
    given = {"adapted": None, "reference": 0, "beside": False, "tokens": 100, "scored": 40, "optimizer": "adamw"}
    given |= {"precision": "fp32", "checkpointing": False, "packed": True, "device": "cuda"}
    return cost.memory(model, **given | other)


def test_weights_that_are_in_memory(tiny_model):
    """float32: each trained weight with its gradient and two moments; a reference that is asked at each step too."""
    model, tokenizer = models.load(tiny_model("llama"), "cpu")
    pairs = tokenize(preferences(), tokenizer, 200, "error")
    batch = collate_pairs(pairs, torch.arange(16), torch.ones(16, dtype=torch.bool), pad_id=0, packed=True)
    optimizer = torch.optim.AdamW(model.parameters())
    sequence_logps(model, batch)[0].sum().backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    held = sum(one.nbytes for one in [*model.parameters(), *(p.grad for p in model.parameters()), *moments])
    size = sum(weight.nbytes for weight in model.parameters())
    assert needed(model).weights == held
    assert needed(model, reference=size // 4, beside=True).weights == held + size
    assert needed(model, reference=size // 4).weights == held  # scored before there are gradients and moments
    assert needed(model, reference=9 * size // 4).weights == 10 * size  # or larger than these
    assert needed(model, adapted=100).weights == size + 4 * 4 * 100
    assert needed(model, optimizer="rmsprop").weights == 3 * size
    assert needed(model, optimizer="adamw_8bit").weights == 2.5 * size
    assert (needed(model).saving, needed(model, device="cpu").saving) == (0, 2 * 3 * size)


def test_activations_are_those_that_autograd_keeps(tiny_model):
    """Within a third; of one layer more, see `cost.memory`, and without the head."""
    model, tokenizer = models.load(tiny_model("llama"), "cpu")
    pairs = tokenize(preferences(), tokenizer, 200, "error")
    batch = collate_pairs(pairs, torch.arange(16), torch.ones(16, dtype=torch.bool), pad_id=0, packed=True)
    kept = {}
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def keep(tensor):
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor  # alive, so that no other has its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(batch.input_ids, use_cache=False).last_hidden_state.sum()
    tokens, layers = batch.input_ids.numel(), model.config.num_hidden_layers
    head = model.get_output_embeddings().weight.numel()
    found = needed(model, tokens=tokens, scored=0).activations - 4 * head
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert found * layers / (layers + 1) == pytest.approx(saved, rel=0.33)
    assert (
        needed(model, tokens=tokens, scored=0, precision="bf16").activations < needed(model, tokens=tokens).activations
    )
    fewer = needed(model, tokens=tokens, checkpointing=True).activations
    assert fewer < needed(model, tokens=tokens).activations or layers < 2
    assert needed(model, tokens=2 * tokens, scored=0).activations - 4 * head == 2 * found
    words = model.config.vocab_size
    tiles, whole = (needed(model, packed=flag).activations for flag in (True, False))
    assert whole - tiles == 4 * words * (100 - 2 * 40)
