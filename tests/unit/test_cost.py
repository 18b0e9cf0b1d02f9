"""What the report says that training costs, against what torch and peft count."""

import json

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dpo.data import report
from dpo.data.__main__ import main
from dpo.data.batches import collate_pairs, mismatched, size, tokenize, tokenize_demonstrations
from dpo.data.records import Demonstration, Preference
from dpo.data.truncation import Limits
from dpo.policy import cost, lora
from dpo.policy import model as models
from dpo.policy.logps import sequence_logps
from tests.composing import compose

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
    """All but attention scores, and with them what a packed row leaves out: the last feed-forward part of prompts."""
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
    given = {"adapted": None, "quantize": None, "reference": 0, "beside": False, "tokens": 100, "scored": 40}
    given |= {"optimizer": "adamw", "precision": "fp32", "checkpointing": False, "packed": True, "device": "cuda"}
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


@pytest.fixture
def costed(tmp_path, tiny_model, monkeypatch):
    """`costed(*overrides)`: what `dpo.data` says that training costs, on 24 pairs and 8 to hold out."""
    monkeypatch.setattr("dpo.data.__main__.save", lambda *_: None)  # the figure takes longer than all else
    for name, first, last in (("train", 0, 24), ("shown", 50, 58)):
        lines = [
            {"prompt": f"Say {'so ' * (n % 7)}{n}:", "chosen": f" no{n} a", "rejected": " b"}
            for n in range(first, last)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = "data=file", f"data.path={tmp_path}/train.jsonl", f"data.validation_path={tmp_path}/shown.jsonl"
    folders = [f"report={tmp_path}/report", f"cache={tmp_path}/cache"]
    sizes = ["max_length=60", "max_new_tokens=9", "batch_size=5", "device=cpu"]

    def made(*overrides, data=pairs):
        main(compose("data", *data, *folders, *sizes, f"policy.path={tiny_model('llama')}", *overrides))
        return json.loads((tmp_path / "report" / "report.json").read_text())["cost"]

    return made


def test_flops_of_training_and_its_reference(costed, tiny_model):
    """Per token and weight 6 to train, 2 for a reference: of all pairs once, or at each step."""
    alone = costed("reference=reference_free")
    assert (alone["steps"], alone["trained"]) == (5, alone["parameters"])
    model, tokenizer = models.without_weights(tiny_model("llama")), models.load_tokenizer(tiny_model("llama"))
    splits = [[(f"Say {'so ' * (n % 7)}{n}:", f" no{n} a", " b") for n in some] for some in (range(24), range(50, 58))]
    pairs = [tokenize([Preference(*one) for one in some], tokenizer, 60, "error") for some in splits]
    tokens = [sum(size(pair.prompt_responses) for pair in some) for some in pairs]
    scored = [sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in some) for some in pairs]
    forward = [cost.forward(model, *one) for one in zip(tokens, scored, strict=True)]
    assert alone["tokens"] == tokens[0]
    assert alone["flops"] == pytest.approx(3 * forward[0])
    asked = costed("reference=initial"), costed("reference=ema"), costed("reference=live")
    expected = 3 * forward[0] + sum(forward), 4 * forward[0], 4 * forward[0]
    assert [one["flops"] for one in asked] == pytest.approx(expected)
    size_of = 4 * alone["parameters"]
    weights = [one["memory"]["weights"] for one in (alone, *asked)]
    assert weights == [4 * size_of, 4 * size_of, 5 * size_of, 5 * size_of]
    assert costed("reference=reference_free", "epochs=2")["flops"] == pytest.approx(6 * forward[0])
    again = costed("reference=reference_free", "activation_checkpointing=true")
    assert again["flops"] == pytest.approx(4 * forward[0])
    some = costed("reference=reference_free", "steps=2")
    assert (some["steps"], some["tokens"]) == (2, pytest.approx(tokens[0] * 10 / 24, abs=1))
    assert some["flops"] == pytest.approx(3 * forward[0] * 10 / 24)


@pytest.mark.parametrize("packed", [True, False])
def test_demonstrations_cost_what_their_training_takes(costed, tiny_model, tmp_path, packed):
    """By the keys of `sft`, and of no reference."""
    for name, of in (("chats", range(24)), ("chats_held_out", range(50, 58))):
        lines = [{"prompt": f"Say {'so ' * (n % 7)}{n}:", "completion": f" no{n} a"} for n in of]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = "data=sft", f"data.path={tmp_path}/chats.jsonl", f"data.validation_path={tmp_path}/chats_held_out.jsonl"
    keys = f"packed={packed}", "sft.batch_size=10", "sft.epochs=2", "loss=kto", "reference=initial"
    made = costed(*keys, data=data)
    model, tokenizer = models.without_weights(tiny_model("llama")), models.load_tokenizer(tiny_model("llama"))
    shown = [Demonstration(f"Say {'so ' * (n % 7)}{n}:", f" no{n} a") for n in range(24)]
    items = tokenize_demonstrations(shown, tokenizer, 60, "error")
    tokens, scored = (sum(map(len, some)) for some in ([ids for item in items for ids in item], [r for _, r in items]))
    assert (made["command"], made["upper_bound"], made["steps"]) == ("dpo.sft", False, 6)
    assert made["tokens"] == 2 * tokens
    assert made["flops"] == pytest.approx(3 * cost.forward(model, 2 * tokens, 2 * (scored if packed else tokens)))
    assert made["memory"]["weights"] == 4 * 4 * made["parameters"]
    longest = max(len(prompt) + len(response) for prompt, response in items)
    micro = tokens / 24 * 10 if packed else 10 * longest
    needs = needed(model, tokens=int(micro), scored=int(int(micro) * scored / tokens), packed=packed, device="cpu")
    assert made["memory"]["activations"] == pytest.approx(needs.activations, rel=0.01)


def test_flops_with_a_larger_reference(costed, tiny_model, tmp_path):
    larger = models.load(tiny_model("llama"), "cpu")
    config = larger[0].config
    config.num_hidden_layers *= 5
    type(larger[0])(config).save_pretrained(tmp_path / "larger")
    larger[1].save_pretrained(tmp_path / "larger")
    alone, own = costed("reference=reference_free"), costed("reference=initial")
    other = costed("reference=other", f"reference.path={tmp_path}/larger")
    beside = costed("reference=live", f"reference.path={tmp_path}/larger")
    size_of = 4 * cost.parameters(models.without_weights(str(tmp_path / "larger")))
    assert other["flops"] - alone["flops"] > 2 * (own["flops"] - alone["flops"])
    assert other["memory"]["weights"] == max(alone["memory"]["weights"], alone["memory"]["weights"] // 4 + size_of)
    assert beside["memory"]["weights"] == alone["memory"]["weights"] + size_of


def test_adapters_cost_less(costed, tiny_model):
    """No gradients of the model's weights, and its own policy without adapters is the live reference."""
    whole, few = (costed("reference=reference_free", f"policy.lora.rank={rank}") for rank in ("null", 2))
    added = cost.adapters(models.without_weights(tiny_model("llama")), lora.Lora(2, 32, "all-linear", 0))
    assert (few["trained"], few["parameters"]) == (added, whole["parameters"])
    assert few["flops"] == pytest.approx(whole["flops"] * 2 / 3 + 6 * added * whole["tokens"])
    assert few["memory"]["weights"] == 4 * whole["parameters"] + 4 * 4 * added
    live, ema = (costed(f"reference={name}", "policy.lora.rank=2")["memory"]["weights"] for name in ("live", "ema"))
    assert (live, ema) == (few["memory"]["weights"], few["memory"]["weights"] + 4 * whole["parameters"])
    targets = costed("reference=reference_free", "policy.lora.rank=2", "policy.lora.targets=[q_proj]")
    assert 0 < targets["trained"] < added


def test_pairs_for_a_loss_of_labels_are_twice_as_many(costed):
    pairs, labels = costed("reference=reference_free"), costed("loss=kto", "reference=reference_free")
    assert (pairs["steps"], labels["steps"]) == (5, 10)
    assert labels["tokens"] == 2 * pairs["tokens"]


def test_a_padded_micro_batch_is_as_long_as_its_longest_pair(costed, tiny_model):
    """So of batch_size pairs all are, if there is room for them."""
    tokenizer, model = models.load_tokenizer(tiny_model("llama")), models.without_weights(tiny_model("llama"))
    rows = [Preference(f"Say {'so ' * (n % 7)}{n}:", f" no{n} a", " b") for n in range(24)]
    pairs = tokenize(rows, tokenizer, 60, "error")
    longest = max(2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
    found = [costed("packed=false", *more)["memory"]["activations"] for more in ((), ("micro_batch_tokens=1",))]
    assert found == [needed(model, packed=False, tokens=n * longest).activations for n in (5, 1)]


def test_prompts_cost_at_most(costed, tmp_path):
    """Each makes pairs_per_prompt pairs, of responses of max_new_tokens."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"word {n}"}) + "\n" for n in range(40)))
    data = "data=prompts", f"data.path={tmp_path}/prompts.jsonl", "data.validation=4", "data.test=4", "judge=shorter"
    made = costed("reference=reference_free", data=data)
    assert made["upper_bound"]
    numbers = json.loads((tmp_path / "report" / "report.json").read_text())["splits"]["train"]
    assert made["steps"] == -(-2 * numbers["prompts"] // 5)
    mean = numbers["lengths"]["prompt"]["50%"]  # of like prompts
    assert made["tokens"] == pytest.approx(2 * numbers["prompts"] * (2 * 9 + mean), rel=0.02)


def test_the_table_fits_100_columns(costed, capsys):
    costed()
    said = capsys.readouterr().out.splitlines()
    table = [line for line in said if " of 24" in line]
    assert len(table) > 10
    assert len({len(line) for line in table}) == 1  # aligned
    assert 90 < max(len(line) for line in said if "/" not in line) <= 100
