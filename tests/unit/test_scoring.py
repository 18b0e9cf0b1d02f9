"""Scores are of the model, the text and the precision that they say, whatever was asked before."""

import gzip
import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import CHAT_TEMPLATE
from test_reference import NAMES, PAIRS, SEQUENCES, batch, batch_of, own_pairs, settings
from whole_runs import other_model

from dpo.data.batches import Pair, tokenize
from dpo.data.records import Preference, row, write_rows
from dpo.policy import model as models
from dpo.policy import scoring
from dpo.policy.live import MovingAverage
from dpo.policy.logps import sequence_logps, token_logps
from dpo.policy.scoring import check_against_live, score
from dpo.references import (
    EMA,
    Frozen,
    Initial,
    OtherTokenizer,
    PrecomputedFiles,
    ReferenceFree,
    Unconditional,
)


def live(model: Any, sequences: Any) -> torch.Tensor:
    with torch.no_grad():
        return sequence_logps(model, batch_of(sequences))[0]


def raises(*_: Any) -> None:
    raise MemoryError


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_reference_is_scored_in_the_precision_of_the_policy(tmp_path, tiny_model, monkeypatch, packed, precision):
    """When its table is made, and when that is compared with the model."""
    model, products = models.load(tiny_model("llama"))[0], []

    def spy(*given: Any) -> torch.Tensor:
        products.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return token_logps(*given)

    monkeypatch.setattr(scoring, "token_logps", spy)
    asked = settings(tmp_path, packed=packed, precision=precision)
    reference = Initial().prepare(tiny_model("llama"), model, {"train": PAIRS}, asked)
    assert len(products) > 1
    assert set(products) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert reference.table["train"].dtype == torch.float32
    assert torch.allclose(reference.table["train"][:, 0], live(model, [pair.chosen for pair in PAIRS]), rtol=1e-2)


@pytest.mark.parametrize("training", [True, False])
def test_scores_have_no_dropout_and_leave_the_mode(tmp_path, tiny_model, training):
    model, _ = models.load(tiny_model("gpt2"))
    expected = live(model, SEQUENCES)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    asked = settings(tmp_path, packed=False)
    model.train(training)
    found = score(model, SEQUENCES, "weights", asked, "scoring", NAMES).logps
    assert torch.allclose(found, expected, rtol=1e-5)
    assert {module.training for module in model.modules()} == {training}
    model.get_input_embeddings().register_forward_hook(raises)
    with pytest.raises(MemoryError):
        score(model, SEQUENCES, "others", asked, "scoring", NAMES)
    assert {module.training for module in model.modules()} == {training}


def test_what_is_scored_again_is_from_all_over(tmp_path, tiny_model):
    model, _ = models.load(tiny_model("llama"))
    many = [([5, 6, n], [7, 8]) for n in range(10, 26)]
    scores = score(model, many, "weights", settings(tmp_path), "scoring", [str(n) for n in range(16)])
    scores.logps[14] += 1
    with pytest.raises(RuntimeError, match="log-probs scored in packed rows must be those of the model's own forward"):
        check_against_live(model, many, scores, settings(tmp_path))


def test_which_model_a_reference_is(tmp_path, tiny_model):
    """Its log-probs, its origin, what KL is measured to, and whether the loss begins at ln 2."""
    path, other = tiny_model("llama"), other_model(tmp_path, tiny_model)
    said = json.loads((shutil.copytree(path, tmp_path / "flat") / "config.json").read_text())
    (tmp_path / "flat" / "config.json").write_text(json.dumps({**said, "rms_norm_eps": 0.5}))
    policy, another = (models.load(one)[0] for one in (path, other))
    prints = {one: models.fingerprint(model) for one, model in ((path, policy), (other, another))}
    chosen = [pair.chosen for pair in PAIRS]
    start = [(models.load_tokenizer(path)("dogs and")["input_ids"], pair.rejected_ids) for pair in PAIRS]
    for pending, origin, kl_target, initial in (
        (Initial(), path, None, True),
        (Frozen(path), path, path, True),
        (Frozen(other), other, other, False),
        (Unconditional(None, ""), path, None, False),
        (Unconditional(other, "dogs and"), other, None, False),
    ):
        reference = pending.prepare(path, policy, {"train": PAIRS, "validation": PAIRS[1:]}, settings(tmp_path))
        assert reference.fingerprint == prints[origin]
        assert f", weights {prints[origin][:12]}, log-probs of 3 train and 2 validation pairs" in reference.held
        assert (" without the prompt" in reference.held) is not pending.sees_prompt
        assert (reference.kl_target, reference.is_initial) == (kl_target, initial)
        model = policy if origin == path else another
        if pending.sees_prompt:
            assert torch.allclose(reference.table["train"][:, 0], live(model, chosen), rtol=1e-5)
        elif origin == other:
            assert torch.allclose(reference.table["train"][:, 1], live(model, start), rtol=1e-5)
        assert torch.equal(reference.table["validation"], reference.table["train"][1:])
        assert reference.lengths["validation"].tolist() == [[2, 3], [1, 1]]
    assert len([one for one in (tmp_path / "cache" / "reference").iterdir() if one.is_dir()]) == 4
    flat = Frozen(str(tmp_path / "flat")).prepare(path, policy, {"train": PAIRS}, settings(tmp_path))
    assert not flat.is_initial  # the same weights, which compute something else
    assert torch.allclose(flat.table["train"][:, 0], live(models.load(str(tmp_path / "flat"))[0], chosen), rtol=1e-5)
    assert (MovingAverage.is_initial, MovingAverage.kl_target, MovingAverage.fingerprint) == (True, None, "")
    assert (ReferenceFree.is_initial, ReferenceFree.kl_target, ReferenceFree.fingerprint) == (False, None, "")


def test_a_reference_has_its_own_template_and_the_runs_day(tmp_path, tiny_model):
    model, tokenizer = models.load(tiny_model("qwen2"))
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE
    models.save(model, tokenizer, tmp_path / "dated")
    asked, told = settings(tmp_path, max_length=3), []  # tokens of the policy
    initial = models.ModelSpec(tiny_model("gpt2"), chat_template="{{ messages }}", date="2024-07-26")

    class Spied(OtherTokenizer):
        def sequences(self, pairs: Any, split: str, tokenizer: Any, *more: Any) -> Any:
            told.append((tokenizer.chat_template, more[0].path))
            return super().sequences(pairs, split, tokenizer, *more)

    pairs, policy = own_pairs("gpt2", tiny_model), models.load(tiny_model("gpt2"))[0]
    for path in (str(tmp_path / "dated"), tiny_model("gpt2")):
        reference = Spied(path, None, by_text=False).prepare(initial, policy, {"train": pairs}, asked)
        assert (reference.is_initial, reference.kl_target) == (False, None)  # the policy may read the text otherwise
    assert told == [('{{ "26 Jul 2024" }}' + CHAT_TEMPLATE, str(tmp_path / "dated")), (None, tiny_model("gpt2"))]
    merged = replace(initial, adapter="an adapter of the policy", trust_remote_code=True)
    assert Frozen(None).spec(merged) == merged
    assert Frozen("some/model").spec(merged) == models.ModelSpec("some/model", True, date="2024-07-26")


def test_given_log_probs_are_of_one_prompt_and_one_end(tmp_path, tiny_model):
    """Of equal texts, those told apart by the prompt or by the end of a response have numbers of their own."""
    model, tokenizer = models.load(tiny_model("llama"))
    cases = [(prompt, *ended) for prompt in "ab" for ended in ((True, True), (False, False), (True, False))]
    texts = [Preference(prompt, " is Rome", " runs", *ended) for prompt, *ended in cases]
    expected = [
        [-2.0 * (prompt == "b") - good - 0.25, -2.0 * (prompt == "b") - bad - 90] for prompt, good, bad in cases
    ]
    pairs = tokenize(texts, tokenizer, 60, "error")
    lines = [
        row(text) | dict(zip(("chosen_logprob", "rejected_logprob"), numbers, strict=True))
        for text, numbers in zip(texts, expected, strict=True)
    ]
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write_rows(tmp_path / "deep" / "a.jsonl", lines[:2])
    (tmp_path / "deep" / "er" / "b.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(line) + "\n" for line in lines[2:]).encode())
    )
    reference = PrecomputedFiles(str(tmp_path / "deep")).prepare(
        "", model, {"train": pairs, "validation": pairs[::-1]}, settings(tmp_path)
    )
    assert reference.table["train"].tolist() == expected
    assert reference.table["validation"].tolist() == expected[::-1]
    origin = reference.fingerprint
    write_rows(tmp_path / "again.jsonl", [*lines, lines[3] | {"rejected_logprob": -92}])  # within bf16 of -93
    pending = PrecomputedFiles(str(tmp_path / "again.jsonl"))
    again = pending.prepare("", model, {"train": pairs}, settings(tmp_path))
    assert again.table["train"].tolist() == expected  # the first counts
    assert again.fingerprint == origin  # of the same numbers, wherever they are
    write_rows(tmp_path / "again.jsonl", [*lines[:3], lines[3] | {"rejected_logprob": -92}, *lines[4:]])
    assert pending.prepare("", model, {"train": pairs}, settings(tmp_path)).fingerprint != origin


def test_a_moving_reference_starts_where_training_does(tmp_path, tiny_model):
    """At the policy after SFT, not at its base; and it is a model of its own, without dropout or gradient."""
    path, asked = tiny_model("gpt2"), settings(tmp_path)
    policy, _ = models.load(path)
    reference = EMA(alpha=0.25, every=3).prepare(path, policy, {}, asked)
    assert reference.model is not policy
    assert f"weights {models.fingerprint(policy)[:12]}; every 3 steps 0.25 of the policy" in reference.held
    assert not any(module.training for module in reference.model.modules())
    before = live(policy, [pair.chosen for pair in PAIRS] + [pair.rejected for pair in PAIRS])
    with torch.no_grad():
        for one in policy.parameters():
            one.add_(0.1)
    assert torch.allclose(reference.logps(batch([0, 1, 2]), "train"), before, rtol=1e-5)
    weight, start = next(policy.parameters()), next(reference.model.parameters()).clone()
    moved = []
    for _ in range(7):
        reference.after_step(policy)
        moved.append((next(reference.model.parameters()) - start).mean().item())
    after_one, after_two = 0.25 * 0.1, 0.25 * 0.1 + 0.25 * 0.75 * 0.1
    assert moved == pytest.approx([0, 0, *[after_one] * 3, after_two, after_two], abs=1e-5)
    assert reference.state_dict()["steps"].item() == 7
    assert (weight - start).mean().item() == pytest.approx(0.1, abs=1e-5)  # the policy stays


def test_a_prior_without_a_bos_begins_with_the_end_of_a_text(tmp_path, tiny_model):
    model, tokenizer = models.load(tiny_model("qwen2"))
    assert tokenizer.bos_token_id is None
    reference = Unconditional(None, "").prepare(
        tiny_model("qwen2"), model, {"train": [Pair([5], [6, 7], [8])]}, settings(tmp_path)
    )
    expected = live(model, [([tokenizer.eos_token_id], [6, 7]), ([tokenizer.eos_token_id], [8])])
    assert torch.allclose(reference.table["train"][0], expected, rtol=1e-5)
