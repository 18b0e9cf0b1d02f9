"""Reference scores are content: order, duplicates and row numbers never matter; what decides a number is in the key."""

import copy
import json
import math
import re
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import CHAT_TEMPLATE, CONFIGS
from safetensors.torch import load_file, save_file

from dpo import cache
from dpo.data.batches import Pair, collate_pairs, tokenize
from dpo.data.records import Preference, TokenIds, row, write_rows
from dpo.data.tokens import decode, vocabulary
from dpo.losses.pairs import tie_tolerance
from dpo.policy import model as models
from dpo.policy.logps import sequence_logps
from dpo.policy.scoring import Scoring, check_against_live, score
from dpo.references import EMA, Frozen, Initial, OtherTokenizer, PrecomputedFiles, ReferenceFree, Unconditional

SEQUENCES = [([5, 6, 7], [8, 9]), ([10] * 12, [11, 12, 13, 14]), ([15], [16]), ([5, 6, 7], [8, 9])]
NAMES = [f"response {row}" for row in range(4)]
PAIRS = [Pair([5, 6, 7], [8, 9], [9]), Pair([10] * 12, [11, 12], [13, 14, 15]), Pair([15], [16], [17])]


def settings(tmp_path, **changed: Any) -> Scoring:
    values = {"precision": "fp32", "packed": True, "micro_batch_tokens": 12, "max_length": 100, "on_too_long": "error"}
    return Scoring(str(tmp_path / "cache"), **(values | changed))


@pytest.fixture
def llama(tiny_model):
    return models.load(tiny_model("llama"))[0]


def batch(rows: list[int]) -> Any:
    index, real = torch.tensor(rows), torch.ones(len(rows), dtype=torch.bool)
    return collate_pairs([PAIRS[row] for row in rows], index, real, pad_id=0, packed=False)


def test_scores_are_those_of_the_model(tmp_path, llama):
    scores = score(llama, SEQUENCES, "weights", settings(tmp_path, per_token=True), "scoring", NAMES)
    found = scores.logps
    assert not scores.cached
    with torch.no_grad():
        live, _ = sequence_logps(llama, batch_of(SEQUENCES))
    assert torch.allclose(found, live, atol=1e-5)
    assert found[0] == found[3]  # duplicates are one entry
    assert scores.lengths.tolist() == [2, 4, 1, 2]
    assert scores.token_logps is not None
    assert torch.equal(torch.stack([values.double().sum().float() for values in scores.token_logps]), found)


def batch_of(sequences: Any) -> Any:
    from dpo.data.batches import collate

    rows = len(sequences)
    return collate(sequences, torch.arange(rows), torch.ones(rows, dtype=torch.bool), pad_id=0, packed=False)


def test_look_up_is_by_content(tmp_path, llama, monkeypatch):
    first = score(llama, SEQUENCES, "weights", settings(tmp_path), "scoring", NAMES).logps
    monkeypatch.setattr("dpo.policy.scoring._score", lambda *_: pytest.fail("scored again"))
    turned = score(llama, SEQUENCES[::-1], "weights", settings(tmp_path), "scoring", NAMES)
    assert turned.cached
    assert torch.equal(turned.logps, first.flip(0))
    longer = score(llama, SEQUENCES * 2, "weights", settings(tmp_path), "scoring", NAMES * 2)
    assert longer.cached
    assert torch.equal(longer.logps, torch.cat([first, first]))


@pytest.mark.parametrize("change", ["weights", "tokens", "boundary", "precision"])
def test_what_decides_a_number_is_in_the_key(tmp_path, llama, change):
    score(llama, SEQUENCES, "weights", settings(tmp_path), "scoring", NAMES)
    sequences, weights, asked = SEQUENCES, "weights", settings(tmp_path)
    if change == "weights":
        weights = "others"
    if change == "tokens":
        sequences = [([5, 6, 7], [8, 10]), *SEQUENCES[1:]]
    if change == "boundary":  # the same tokens, but another of them is the response's first
        sequences = [([5, 6], [7, 8, 9]), *SEQUENCES[1:]]
    if change == "precision":
        asked = settings(tmp_path, precision="bf16")
    assert score(llama, sequences, weights, asked, "scoring", NAMES).cached is False


CHAT = [{"role": "user", "content": "The capital of Italy?"}], [{"role": "assistant", "content": "Rome."}]
OTHER_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize(
    "change,fields",
    [
        ({"chat_template": OTHER_TEMPLATE}, {"sequences", "chat_template"}),
        ({"max_length": 16}, {"sequences", "max_length", "texts"}),  # what is left is another text
        ({"text": "Is it Rome?"}, {"sequences", "texts"}),
        ({"weights": 1.1}, {"weights"}),
        ({}, None),
        ({"chat_template": "{# the same #}" + CHAT_TEMPLATE}, None),
    ],
    ids=["template", "truncation", "data", "weights", "nothing", "template of the same tokens"],
)
def test_a_miss_says_what_differs(tmp_path, tiny_model, capsys, change, fields):
    """Token ids decide; why they are others is told, be it the template, truncation or the data."""
    path, first = tiny_model("qwen2"), {"chat_template": None, "max_length": 40, "text": "No.", "weights": 1.0}
    for values in (first, first | change):
        asked = settings(tmp_path, max_length=values["max_length"], on_too_long="truncate")
        initial = models.ModelSpec(path, chat_template=values["chat_template"])
        policy, tokenizer = models.load(initial)
        with torch.no_grad():
            policy.model.norm.weight *= values["weights"]
        text = Preference(*CHAT, [{"role": "assistant", "content": values["text"]}])
        pairs = tokenize([text], tokenizer, asked.max_length, "truncate")
        capsys.readouterr()
        said = Initial().prepare(initial, policy, {"train": pairs}, asked)
    missed = capsys.readouterr().out
    assert ("from the cache" in said.held) is (fields is None)
    if fields is None:
        assert "is not in the cache" not in missed
    else:
        differing = set(re.findall(r"(\w+) \([^()]* there, [^()]* asked for\)", missed))
        assert differing == fields


def test_layout_and_size_of_batches_are_not_in_the_key(tmp_path, llama):
    score(llama, SEQUENCES, "weights", settings(tmp_path), "scoring", NAMES)
    asked = settings(tmp_path, micro_batch_tokens=1000, packed=False)
    assert score(llama, SEQUENCES, "weights", asked, "scoring", NAMES).cached is True


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tokens", [1, 9, 1000])
def test_every_layout_and_size_of_batches_gives_the_same_scores(tmp_path, llama, packed, tokens):
    asked = settings(tmp_path, micro_batch_tokens=tokens, packed=packed)
    many = [(prompt, response) for prompt, _ in SEQUENCES for response in ([3], [4, 5], [6] * 7, [8, 9], [2])]
    found = score(llama, many, "weights", asked, "scoring", NAMES * 5).logps
    with torch.no_grad():
        live, _ = sequence_logps(llama, batch_of(many))
    assert torch.allclose(found, live, rtol=1e-5)


def test_scoring_keeps_the_model_as_it_was(tmp_path, llama):
    llama.train()
    score(llama, SEQUENCES, "weights", settings(tmp_path), "scoring", NAMES)
    assert llama.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in llama.parameters())


def test_frozen_gives_each_row_its_own_score(tmp_path, tiny_model, llama):
    reference = Initial().prepare(
        tiny_model("llama"), llama, {"train": PAIRS, "validation": PAIRS[::-1]}, settings(tmp_path)
    )
    assert "computed in" in reference.held
    with torch.no_grad():
        live, _ = sequence_logps(llama, batch([2, 0, 1]))
    assert torch.allclose(reference.logps(batch([2, 0, 1]), "train"), live, atol=1e-5)
    assert torch.allclose(reference.logps(batch([0]), "validation"), reference.logps(batch([2]), "train"))
    assert not reference.logps(batch([0]), "train").requires_grad


def test_another_tokenizer_is_refused(tmp_path, tiny_model, llama):
    with pytest.raises(ValueError, match="must have the tokenizer of the policy"):
        Frozen(tiny_model("qwen2")).prepare(tiny_model("llama"), llama, {"train": PAIRS}, settings(tmp_path))


def own_pairs(kind: str, tiny_model: Any, **options: Any) -> list[Pair]:
    texts = [Preference("The capital of Italy?", " is Rome.", " runs"), Preference("dogs and", " cats", " Italy")]
    return tokenize(texts, models.load_tokenizer(tiny_model(kind)), 60, "error")


def test_another_tokenizer_scores_the_text(tmp_path, tiny_model):
    """GPT-2's own pairs, and the same text under Qwen's tokenizer and model: its own log-probs."""
    policy, other = models.load(tiny_model("gpt2"))[0], models.load(tiny_model("qwen2"))[0]
    pairs, theirs = own_pairs("gpt2", tiny_model), own_pairs("qwen2", tiny_model)
    reference = OtherTokenizer(tiny_model("qwen2"), 60, by_text=False)
    table = reference.prepare(tiny_model("gpt2"), policy, {"train": pairs}, settings(tmp_path))
    assert "under its own tokenizer" in table.held
    for found, pair in zip(table.table["train"], theirs, strict=True):
        with torch.no_grad():
            live, _ = sequence_logps(other, batch_of([pair.chosen, pair.rejected]))
        assert torch.allclose(found, live, atol=1e-4)
    assert table.kl_target is None
    [about] = (tmp_path / "cache" / "reference").glob("*/about.json")  # told of a key that misses
    told, own = json.loads(about.read_text()), models.load_tokenizer(tiny_model("qwen2"))
    assert (told["reference"], told["tokenizer"]) == (reference.name(), vocabulary(own))
    assert (told["chat_template"], told["max_length"]) == (cache.digest(own.chat_template), 60)
    with pytest.raises(ValueError, match="per_token"):
        reference.prepare(tiny_model("gpt2"), policy, {"train": pairs}, settings(tmp_path, per_token=True))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_a_policy_held_to_itself_reads_the_text_that_was_cut(tmp_path, tiny_model, kind):
    """Through its text, as another tokenizer would: the log-ratio is 0 of every pair, cut or not."""
    policy, tokenizer = models.load(tiny_model(kind))
    words = "The capital of Italy is Rome ☃ and cats sleep. "
    asked = settings(tmp_path, on_too_long="truncate", max_length=30)

    def text(prompt: int, chosen: int, rejected: int, ended: bool = True) -> Preference:
        sides = [" ".join(words.split()[:n] * 4) for n in (prompt, chosen, rejected)]
        if kind != "qwen2":
            return Preference(sides[0], " " + sides[1], " no " + sides[2], ended)
        answers = ([{"role": "assistant", "content": side}] for side in (sides[1], "no " + sides[2]))
        return Preference([{"role": "user", "content": sides[0]}], *answers, ended)

    some = [text(1, 1, 2), text(9, 1, 1), text(9, 9, 1), text(2, 3, 9), text(9, 9, 9), text(1, 9, 1, False)]
    pairs = tokenize(some, tokenizer, 30, "truncate")
    assert {name for pair in pairs for name in pair.cut} == {"prompt", "chosen", "rejected"}
    assert not all(pair.cut for pair in pairs)
    reference = OtherTokenizer(tiny_model(kind), None, by_text=False).prepare(
        tiny_model(kind), policy, {"train": pairs}, asked
    )
    everything = collate_pairs(
        pairs, torch.arange(len(pairs)), torch.ones(len(pairs), dtype=torch.bool), pad_id=0, packed=False
    )
    with torch.no_grad():
        own, _ = sequence_logps(policy, everything)
    assert (reference.logps(everything, "train") - own).abs().max() < 1e-4
    rows = [row(pair.text) for pair in pairs]  # and log-probs of the whole text are not those of what is left
    for scored, refused in ((rows, False), ([row(one) for one in some], True)):
        write_rows(tmp_path / "scores.jsonl", [one | {"chosen_logprob": -1, "rejected_logprob": -2} for one in scored])
        given = PrecomputedFiles(str(tmp_path / "scores.jsonl"))
        if not refused:
            given.prepare("", policy, {"train": pairs}, asked)
            continue
        cut = sum(bool(pair.cut) for pair in pairs)
        with pytest.raises(ValueError, match=rf"{cut} of them were cut by on_too_long=truncate.* max_length=30"):
            given.prepare("", policy, {"train": pairs}, asked)


def test_a_reference_that_knows_no_chats_is_told_by_its_name(tmp_path, tiny_model):
    """The policy's template, which others are given for, is not the one that is missing."""
    chats, other = tiny_model("qwen2"), tiny_model("gpt2")
    answers = ([{"role": "assistant", "content": text}] for text in ("yes", "no"))
    pairs = tokenize(
        [Preference([{"role": "user", "content": "Rome?"}], *answers)], models.load_tokenizer(chats), 90, "error"
    )
    with pytest.raises(ValueError, match=f"the tokenizer of the reference {other} must have a chat template") as error:
        OtherTokenizer(other, None, by_text=False).prepare(
            chats, models.load(chats)[0], {"train": pairs}, settings(tmp_path)
        )
    assert "policy.chat_template" not in str(error.value)


def test_what_is_too_long_under_another_tokenizer_is_an_error(tmp_path, tiny_model, monkeypatch):
    policy, pairs = models.load(tiny_model("gpt2"))[0], own_pairs("gpt2", tiny_model)
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("a model was loaded"))
    for on_too_long in ("error", "drop", "truncate"):  # it would score another data set, or another text
        asked = settings(tmp_path, on_too_long=on_too_long)
        with pytest.raises(ValueError, match=r"in the tokens of the reference .* more than 3 tokens") as error:
            OtherTokenizer(tiny_model("qwen2"), 3, by_text=False).prepare(
                tiny_model("gpt2"), policy, {"train": pairs}, asked
            )
        assert "Raise reference.max_length" in str(error.value)
        assert "every reference scores the text that the policy is trained on" in str(error.value)


def test_pairs_that_another_template_refuses_are_no_matter_of_on_faulty(tmp_path, tiny_model):
    model, tokenizer = models.load(tiny_model("qwen2"))
    refuses = "{% if 'Rome' in messages[-1].content %}{{ raise_exception('no Rome') }}{% endif %}"
    tokenizer.chat_template = refuses + CHAT_TEMPLATE
    models.save(model, tokenizer, tmp_path / "other")
    told = Preference(*CHAT, [{"role": "assistant", "content": "Paris."}], source="pairs.jsonl, line 1")
    texts = [replace(told, chosen=told.rejected), told, replace(told, source=None)]
    pairs = tokenize(texts, models.load_tokenizer(tiny_model("qwen2")), 60, "error")
    reference = OtherTokenizer(str(tmp_path / "other"), None, by_text=False)
    with pytest.raises(
        ValueError,
        match=r"2 of 3 train pairs in the tokens of the reference .*\n.* line 1: .*Rome\n  row 2, counted from 0",
    ) as error:
        reference.prepare(tiny_model("qwen2"), model, {"train": pairs}, settings(tmp_path))
    assert "Take another reference, or remove these pairs" in str(error.value)
    assert "data.on_faulty=drop" not in str(error.value)
    prior, plain = Unconditional("world", "about <sep> anna ."), [Pair([5], [6], [7])]
    with pytest.raises(ValueError, match=r"1 of 1 texts of reference.prompt are faulty") as error:
        prior.sequences(plain, "train", models.load_tokenizer("world"), models.ModelSpec("world"), settings(tmp_path))
    assert "on_faulty" not in str(error.value)


def test_a_reference_needs_the_positions_that_are_asked_of_it(tmp_path, tiny_model, monkeypatch):
    policy, pairs = models.load(tiny_model("gpt2"))[0], own_pairs("gpt2", tiny_model)
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("a model was loaded"))
    asked = settings(tmp_path)
    with pytest.raises(ValueError, match=r"reference\.max_length must be at most the 2048 positions"):
        OtherTokenizer(tiny_model("qwen2"), 3000, by_text=False).prepare(
            tiny_model("gpt2"), policy, {"train": pairs}, asked
        )
    asked = settings(tmp_path, max_length=3000)
    with pytest.raises(ValueError, match="max_length must be at most the 2048 positions"):
        Frozen(tiny_model("gpt2")).prepare(tiny_model("gpt2"), policy, {"train": pairs}, asked)


def test_prior_does_not_see_the_prompt(tmp_path, tiny_model, llama):
    prior, tokenizer = Unconditional(None, ""), models.load_tokenizer(tiny_model("llama"))
    other_prompts = [Pair([20, 21], pair.chosen_ids, pair.rejected_ids) for pair in PAIRS]
    reference = prior.prepare(
        tiny_model("llama"), llama, {"train": PAIRS, "validation": other_prompts}, settings(tmp_path)
    )
    assert torch.equal(reference.table["train"], reference.table["validation"])
    with torch.no_grad():
        live, _ = sequence_logps(llama, batch_of([([tokenizer.bos_token_id], pair.chosen_ids) for pair in PAIRS]))
    assert torch.allclose(reference.table["train"][:, 0], live, atol=1e-5)
    assert reference.kl_target is None


def test_a_prompt_that_leaves_no_room_for_a_response_is_refused(tmp_path, tiny_model):
    """Of pairs that fit the model with their own prompt; nothing is scored past its positions."""
    path, positions = tiny_model("gpt2"), 2048
    policy, tokenizer = models.load(path)
    prompt = "dogs and cats"
    tokens = len(tokenizer(prompt)["input_ids"])
    for room, told in (
        (tokens, None),
        (tokens - 1, f"at most the {positions} positions of .*, found {tokens} tokens and"),
    ):
        pairs = {"train": [Pair([5], [7], [8] * (positions - room))]}
        asked = settings(tmp_path, max_length=positions)
        with pytest.raises(ValueError, match=told) if told else nullcontext():
            Unconditional(None, prompt).prepare(path, policy, pairs, asked)


def test_given_scores_are_found_by_text(tmp_path, tiny_model, llama):
    pairs, file = own_pairs("llama", tiny_model), tmp_path / "scores.jsonl"
    rows = [
        row(pair.text) | {"chosen_logprob": -1.5 - n, "rejected_logprob": -9 - n}
        for n, pair in enumerate(pairs)
        if pair.text
    ]
    write_rows(file, rows[::-1])
    reference = PrecomputedFiles(str(file))
    table = reference.prepare("", llama, {"train": pairs}, settings(tmp_path)).table
    assert table["train"].tolist() == [[-1.5, -9.0], [-2.5, -10.0]]
    write_rows(file, rows[:1])
    asked = [replace(pairs[0], cut=("prompt",)), pairs[1]]  # what is there may be cut
    with pytest.raises(ValueError, match=r"found none for 1 of 2 train pairs, such as .*dogs and.*dpo\.score$"):
        reference.prepare("", llama, {"train": asked}, settings(tmp_path))
    asked = [replace(pairs[0], text=replace(pairs[0].text, rejected=" sleeps"))]  # one of two is not enough
    with pytest.raises(ValueError, match="found none for 1 of 1 train pairs"):
        reference.prepare("", llama, {"train": asked}, settings(tmp_path))
    write_rows(file, [*rows, rows[0] | {"chosen_logprob": -3}])
    with pytest.raises(ValueError, match=r"line 3: log-prob -3.0, but -1.5"):
        reference.prepare("", llama, {"train": pairs}, settings(tmp_path))
    for logp, said in (
        (None, "must have finite chosen_logprob"),
        (-math.inf, "found .-inf"),
        (-(10**400), "too large"),
    ):
        file.write_text(json.dumps(rows[0] | {"chosen_logprob": logp}))
        with pytest.raises(ValueError, match=rf"line 1: .*{said}"):
            reference.prepare("", llama, {"train": pairs}, settings(tmp_path))
    with pytest.raises(ValueError, match="per_token=true needs a reference that is a model"):
        reference.prepare("", llama, {"train": pairs}, settings(tmp_path, per_token=True))
    with pytest.raises(ValueError, match="found none at"):
        PrecomputedFiles(str(tmp_path / "nowhere"))


def test_given_scores_at_home(tmp_path, tiny_model, llama, monkeypatch):
    """A path that begins with ~ is one of ours wherever a file or folder is read."""
    pairs = own_pairs("llama", tiny_model)
    write_rows(
        tmp_path / "x.jsonl", [row(pair.text) | {"chosen_logprob": -1, "rejected_logprob": -2} for pair in pairs]
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("~", "~/x.jsonl"):
        found = PrecomputedFiles(path).prepare("", llama, {"train": pairs}, settings(tmp_path)).table["train"]
        assert found.tolist() == [[-1, -2]] * 2


def test_given_scores_of_sampled_tokens_are_those_of_both_rows_and_the_tokenizer(tmp_path, llama):
    """Of one text, which other tokens or another tokenizer may say."""
    texts = [
        Preference("a", "b", "c", token_ids=TokenIds(tokenizer, [5], [6], rejected))
        for tokenizer, rejected in (("one", [7]), ("one", [8, 9]), ("two", [7]))
    ]
    rows = [row(text) | {"chosen_logprob": -1.0, "rejected_logprob": -5.0 * n} for n, text in enumerate(texts, start=1)]
    write_rows(tmp_path / "ids.jsonl", rows)
    pairs = [Pair([5], [6], text.token_ids.rejected, text=text) for text in texts]
    given = PrecomputedFiles(str(tmp_path / "ids.jsonl"))
    table = given.prepare("", llama, {"train": pairs}, settings(tmp_path)).table["train"]
    assert table.tolist() == [[-1.0, -5.0], [-1.0, -10.0], [-1.0, -15.0]]


def test_sampled_pairs_are_found_by_their_tokens(tmp_path, tiny_model, llama, capsys):
    """One text may be sampled as several rows of tokens; a reference that reads text cannot read half a character."""
    tokenizer = models.load_tokenizer(tiny_model("llama"))
    prompt, rome, letters = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("Is it", " Rome", " R o m e".replace(" ", "_"))
    )
    prompt = [tokenizer.bos_token_id, *prompt]
    split = [
        *tokenizer(" R", add_special_tokens=False)["input_ids"],
        *tokenizer("ome", add_special_tokens=False)["input_ids"],
    ]
    half = tokenizer("☃", add_special_tokens=False)["input_ids"][:1]
    texts = [
        Preference(
            "Is it", " Rome", decode(prompt, bad, tokenizer), False, False, token_ids=TokenIds(own, prompt, good, bad)
        )
        for own, good, bad in ((vocabulary(tokenizer), rome, letters), (vocabulary(tokenizer), split, [*half, *rome]))
    ]
    pairs = tokenize(texts, tokenizer, 60, "error")
    assert [pair.chosen_ids for pair in pairs] == [rome, split]
    assert [pair.unwritten for pair in pairs] == [False, True]
    scores = [{"chosen_logprob": -1.0 - n, "rejected_logprob": -5.0 - n} for n in range(2)]
    write_rows(tmp_path / "ids.jsonl", [row(pair.text) | one for pair, one in zip(pairs, scores, strict=True)])
    reference = PrecomputedFiles(str(tmp_path / "ids.jsonl")).prepare("", llama, {"train": pairs}, settings(tmp_path))
    assert reference.table["train"].tolist() == [[-1.0, -5.0], [-2.0, -6.0]]
    write_rows(tmp_path / "text.jsonl", [row(replace(texts[0], token_ids=None)) | scores[0]])
    reference = PrecomputedFiles(str(tmp_path / "text.jsonl")).prepare(
        "", llama, {"train": pairs[:1]}, settings(tmp_path)
    )
    assert reference.table["train"].tolist() == [[-1.0, -5.0]]  # of a reference that reads text
    both = [row(replace(text, token_ids=None)) | scores[0] for text in texts]
    write_rows(tmp_path / "texts.jsonl", both)  # of the second pair, too, whose text does not say its tokens
    for known in (tmp_path / "text.jsonl", tmp_path / "texts.jsonl", None):
        with pytest.raises(ValueError, match=r"found none for 1 of 2|broken characters within:\n  row 1"):
            (
                PrecomputedFiles(str(known)) if known else OtherTokenizer(tiny_model("gpt2"), None, by_text=False)
            ).prepare(tiny_model("llama"), llama, {"train": pairs}, settings(tmp_path))
    # By its text it is scored as a pair that was written.
    written = tokenize([replace(one, token_ids=None) for one in texts], tokenizer, 60, "error")
    given = tiny_model("llama"), llama
    other = OtherTokenizer(tiny_model("gpt2"), None, by_text=True)
    by_text = other.prepare(*given, {"train": pairs}, settings(tmp_path))
    assert "1 train pairs with special tokens or broken characters within are scored" in capsys.readouterr().out
    of_text = OtherTokenizer(tiny_model("gpt2"), None, by_text=False).prepare(
        *given, {"train": written}, settings(tmp_path)
    )
    assert torch.equal(by_text.table["train"], of_text.table["train"])
    # The same tokenizer reads the tokens.
    itself = OtherTokenizer(tiny_model("llama"), None, by_text=False).prepare(
        tiny_model("llama"), llama, {"train": pairs}, settings(tmp_path)
    )
    with torch.no_grad():
        own, _ = sequence_logps(llama, batch_of([pair.chosen for pair in pairs]))
    assert torch.allclose(itself.table["train"][:, 0], own, atol=1e-4)


def conversation(asked: str, answer: str) -> list[dict[str, str]]:
    return [{"content": asked, "role": "user"}, {"content": answer, "role": "assistant"}]


def test_files_of_refdpo_are_given_scores(tmp_path, tiny_model, llama):
    """Conversations in `chosen` and `rejected`, the question as text in `prompt`, other columns beside them."""
    asked, good, bad = "What is the capital of Italy?", "Rome is.", "Cats are."
    line = {
        "source": "evol_instruct",
        "prompt": asked,
        "chosen": conversation(asked, good),
        "chosen-rating": 5.0,
        "rejected": conversation(asked, bad),
        "rejected-rating": 2.0,
        "chosen_logprob": -312.5,
        "rejected_logprob": -287.25,
    }
    text = Preference(conversation(asked, "")[:1], conversation("", good)[1:], conversation("", bad)[1:])
    pairs = tokenize([text], models.load_tokenizer(tiny_model("qwen2")), 60, "error")
    for number, kept in enumerate((line, {key: value for key, value in line.items() if key != "prompt"})):
        write_rows(file := tmp_path / f"{number}.jsonl", [kept])
        reference = PrecomputedFiles(str(file)).prepare("", llama, {"train": pairs}, settings(tmp_path))
        assert reference.table["train"].tolist() == [[-312.5, -287.25]]


def test_a_damaged_cache_is_found_out(tmp_path, tiny_model, llama):
    asked = settings(tmp_path)
    Initial().prepare(tiny_model("llama"), llama, {"train": PAIRS}, asked)
    [file] = (tmp_path / "cache" / "reference").glob("*/scores.safetensors")
    table = load_file(file)
    for change, said in (
        (0.01, r"reference/\w+ must hold the log-probs that the model gives, found .* though scoring them again gives"),
        (math.nan, r"found none for 6 of 6:\n  train row 0, counted from 0 \(chosen\)"),
    ):
        save_file(table | {"logps": table["logps"] + change}, file)
        with pytest.raises(RuntimeError, match=r"scores\.safetensors changed; delete that folder"):
            Initial().prepare(tiny_model("llama"), llama, {"train": PAIRS}, asked)
        (file.parent / "files.json").write_text(json.dumps(cache._files(file.parent)))  # as if written so
        with pytest.raises(RuntimeError, match=said):
            Initial().prepare(tiny_model("llama"), llama, {"train": PAIRS}, asked)


@pytest.mark.parametrize("packed", [True, False])
def test_what_is_not_finite_is_not_kept(tmp_path, tiny_model, llama, packed):
    """A token that the model has no numbers for: the pairs with it are named, and so is the weight; any layout."""
    word = models.load_tokenizer(tiny_model("llama"))(" cats", add_special_tokens=False)["input_ids"]
    texts = [Preference("a", "dogs", "b", source="x.jsonl, line 7"), Preference("a", " cats", "c", source="id 8")]
    pairs = tokenize(texts, models.load_tokenizer(tiny_model("llama")), 60, "error")
    asked = settings(tmp_path, packed=packed)
    with torch.no_grad():
        llama.get_input_embeddings().weight[word[0]] = math.nan
    for _ in range(2):  # what is wrong is not kept, so it is no other error the second time
        with pytest.raises(RuntimeError) as error:
            Initial().prepare(tiny_model("llama"), llama, {"train": pairs}, asked)
        assert "found none for 1 of 4 responses:\n  id 8 (chosen)\n1 of the weights are not finite" in str(error.value)
        assert "such as model.embed_tokens.weight: take another checkpoint" in str(error.value)
        assert all(path.suffix == ".unfinished" for path in (tmp_path / "cache" / "reference").glob("*/"))


def test_finite_weights_may_give_what_is_not(tmp_path, llama):
    with torch.no_grad():
        llama.get_output_embeddings().weight *= 1e38
        llama.model.norm.weight *= 1e4
    asked = settings(tmp_path, packed=False)
    with pytest.raises(RuntimeError, match=r"response 0\n.*\n.*\n.*\nThe weights are finite; precision=fp32 or"):
        score(llama, SEQUENCES, "weights", asked, "scoring", NAMES)


def test_wrong_scores_of_packed_rows_are_found_out_by_the_plain_forward(tmp_path, tiny_model, llama, monkeypatch):
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.mul_(9.0)  # it attends to some tokens much more than to others
    monkeypatch.setattr("dpo.policy.scoring.packable", lambda *_: True)
    monkeypatch.setattr(
        "dpo.policy.attention.attends", lambda branch, position, other, others, window: others <= position
    )
    long = [Pair([5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15])]
    for _ in range(2):  # computed now, and then from the cache: it is not to blame either time
        with pytest.raises(
            RuntimeError, match=r"log-probs scored in packed rows must be .*; set packed=false"
        ) as error:
            Initial().prepare(tiny_model("llama"), llama, {"train": long}, settings(tmp_path))
        assert "damaged" not in str(error.value)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
@pytest.mark.parametrize("sharpness", [1, 60])
def test_cached_and_live_scores_agree_within_rounding(tmp_path, tiny_model, kind, sharpness):
    """In fp32, long responses and sure single tokens (logits up to 30), of every architecture, packed against plain."""
    model, _ = models.load(tiny_model(kind))
    head = copy.deepcopy(model.get_output_embeddings())  # embeddings that are tied to it stay
    with torch.no_grad():
        head.weight.mul_(sharpness)
        model.set_output_embeddings(head)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(10, 350, (8, 60), generator=generator).tolist()
        sure = [model(torch.tensor([ids])).logits[0, -1].argmax().item() for ids in drawn]
    sequences = [(ids, [token]) for ids, token in zip(drawn, sure, strict=True)]
    sequences += [
        (ids[:length], ids[length:]) for ids, length in zip(drawn, (3, 9, 20, 30, 40, 50, 55, 58), strict=True)
    ]
    asked = settings(tmp_path, micro_batch_tokens=100)
    names = [str(row) for row in range(len(sequences))]
    scores = score(model, sequences, "weights", asked, "scoring", names)
    for first in range(0, len(sequences), 8):  # all of them, 8 at a time
        rows = slice(first, first + 8)
        part = replace(scores, logps=scores.logps[rows])
        assert check_against_live(model, sequences[rows], part, asked) <= 1e-6 * part.logps.abs().clamp(min=10).max()
    for factor, wrong in ((0.5, False), (2, True)):
        moved = replace(scores, logps=scores.logps - factor * tie_tolerance(scores.logps), cached=True)
        with pytest.raises(RuntimeError, match="damaged, so delete it") if wrong else nullcontext():
            check_against_live(model, sequences, moved, asked)


def test_uniform_is_zero():
    assert ReferenceFree().logps(batch([0, 1]), "train").tolist() == [0.0] * 4


def test_moving_follows_the_policy_by_alpha(tmp_path, tiny_model, llama):
    reference = EMA(alpha=0.25, every=2).prepare(tiny_model("llama"), llama, {}, settings(tmp_path))
    start = [parameter.clone() for parameter in llama.parameters()]
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(1.0)
    reference.after_step(llama)
    for mine, former in zip(reference.model.parameters(), start, strict=True):
        assert torch.equal(mine, former)  # not yet
        assert not mine.requires_grad
    reference.after_step(llama)
    for mine, former in zip(reference.model.parameters(), start, strict=True):
        assert torch.allclose(mine, former + 0.25, atol=1e-6)
    assert "steps" in reference.state_dict()


@pytest.mark.parametrize("alpha,every", [(0.0, 1), (1.5, 1), (0.5, 0)])
def test_moving_refuses_what_does_not_move(alpha, every):
    with pytest.raises(ValueError, match="reference"):
        EMA(alpha, every)


@pytest.mark.parametrize("most", [0, -1])
def test_a_reference_that_may_read_nothing_is_refused(most):
    with pytest.raises(ValueError, match=rf"reference\.max_length must be at least 1 token, got {most}"):
        OtherTokenizer("someone/model", most, by_text=False)
    assert OtherTokenizer("someone/model", 1, by_text=False).max_length == 1


@pytest.mark.parametrize("path", ["runs/references/beta=0.1/policy", "/nowhere/model", "./model", "dpo/model"])
def test_a_missing_folder_is_found_out_before_the_run(path):
    with pytest.raises(ValueError, match="must be a folder with a model"):
        Frozen(path)
    assert Frozen("someone/model").path == "someone/model"  # may be on the hub
