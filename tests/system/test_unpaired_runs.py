"""Whole runs on single responses with a label: dealt out in any way, stopped and resumed, scored ahead of training."""

import json
from dataclasses import replace

import pytest
import test_whole_step as steps
import torch
from test_score import frozen as score_config
from test_score import lines
from whole_runs import frozen, losses, own_pairs, run

from dpo import score
from dpo.data.batches import Pair, collate
from dpo.data.hub import unpaired
from dpo.data.records import Preference, read
from dpo.policy import model as models
from dpo.policy.logps import sequence_logps
from dpo.train import _tokens


def responses(path):
    """Two responses to some prompts, one to others; of both labels, and one of them long."""
    rows = [{"prompt": "Say it.", "completion": " What is it? It is what it is.", "label": 1}]
    for pair in read(own_pairs(path / "pairs.jsonl")):
        rows += [{"prompt": pair.prompt, "completion": pair.chosen, "label": True}]
        rows += [{"prompt": pair.prompt, "completion": pair.rejected, "label": 0}] * (len(rows) % 3 > 0)
    file = path / "responses.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def own(path, model, data="unpaired"):
    file = responses(path) if data == "unpaired" else own_pairs(path / "pairs.jsonl")
    return [
        *(f"data={data}", f"data.path={file}", "data.validation_fraction=0.2", "loss=kto", "loss.desirable_weight=1.2"),
        *(f"policy.path={model}", "lr=1e-3", "max_length=96", "max_new_tokens=6", "steps=4", "batch_size=8"),
        *("evaluation.prompts=4", "evaluation.log_samples=1", "evaluate_every=0", "checkpoint_every=1"),
    ]


@pytest.mark.parametrize("reference", ["initial", pytest.param("ema", marks=pytest.mark.long)])
def test_any_micro_batches_and_any_stop_are_one_run(tmp_path, tiny_model, monkeypatch, reference):
    """From half the weight of each label on; z is there as soon as the policy moves, of training and of validation."""
    given = [*own(tmp_path, tiny_model("llama")), f"reference={reference}", "evaluate_every=1", "beta=1"]
    rows = steps.dealt_out_in_every_way(tmp_path, lambda at, *more: frozen(at, *given, *more), monkeypatch)
    trained = {name: [row for row in some if row["split"] == "train"] for name, some in rows.items()}
    assert trained["rare"] == trained["whole"]
    for mine, theirs in zip(rows["small"], rows["whole"], strict=True):
        assert mine.pop("split") == theirs["split"]
        assert mine == pytest.approx({key: theirs[key] for key in mine}, rel=2e-3, abs=1e-4)
    held_out = unpaired(str(tmp_path / "responses.jsonl"), None, "none", 0.2, "error").preferences["validation"]
    desirable = sum(pair.label for pair in held_out) / len(held_out)
    first = rows["whole"][0]
    assert first["split"] == "validation"
    assert first["loss"] == pytest.approx(0.5 * (1.2 * desirable + 1 - desirable), abs=1e-4)
    assert any(row["kl"] > 0.01 for row in trained["whole"])
    assert all({"kl", "rewards/chosen"} <= row.keys() for row in rows["whole"] if row["split"] == "validation")


def test_layouts_change_no_number_and_a_run_ends_with_its_figures(tmp_path, tiny_model):
    """Of rows, and of pairs as two rows each; no accuracy, and the KL of samples where z was logged."""
    for data in ("unpaired", "file"):
        given = own(tmp_path, tiny_model("llama"), data)
        found = [run(tmp_path / f"{data}{packed}", *given, f"packed={packed}") for packed in ("true", "false")]
        assert losses(found[0][0]) == pytest.approx(losses(found[1][0]), rel=1e-4)
        result = found[0][1]
        assert {"kl", "kl/se", "rewards/chosen", "rewards/rejected", "rewards/margins", "loss"} <= result.keys()
        assert "rewards/accuracies" not in result
    assert result["rewards/margins"] == pytest.approx(result["rewards/chosen"] - result["rewards/rejected"])


@pytest.fixture
def given(tmp_path, tiny_model):
    return [*own(tmp_path, tiny_model("llama")), f"cache={tmp_path / 'cache'}", "device=cpu"]


def written(directory, *given, reference="initial"):
    directory.mkdir()
    score.run(score_config(*given, reference=reference), directory)
    return [line for split in score.SPLITS for line in lines(directory / f"{split}.jsonl")]


def test_scores_are_written_and_read_again(tmp_path, given, tiny_model):
    """Each response and the one beside it as the model says, by the names of their columns."""
    rows = written(tmp_path / "scores", *given)
    assert len(rows) == len(lines(tmp_path / "responses.jsonl"))
    model, tokenizer = models.load(tiny_model("llama"))
    for row in rows[::7]:
        assert row["label"] in (True, False)
        assert not {"chosen", "rejected"} & row.keys()
        for side in ("completion", "mismatched"):
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = [*tokenizer(row[side], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            alone = collate([(prompt, ids)], torch.zeros(1).long(), torch.ones(1).bool(), pad_id=0, packed=False)
            with torch.no_grad():
                assert row[f"{side}_logprob"] == pytest.approx(sequence_logps(model, alone)[0].item(), abs=1e-3)
            assert row[f"{side}_tokens"] == len(ids)
    again = written(tmp_path / "again", *given, f"reference.path={tmp_path / 'scores'}", reference="precomputed")
    assert again == [{key: value for key, value in row.items() if not key.endswith("_tokens")} for row in rows]
    (tmp_path / "responses.jsonl").write_text((tmp_path / "scores/train.jsonl").read_text())  # they are data, too
    assert unpaired(str(tmp_path / "responses.jsonl"), None, "none", 0.2, "error").preferences["train"]


def test_a_reference_with_another_tokenizer_reads_both_texts(tmp_path, given, tiny_model):
    """Also of a response that is cut beside another prompt."""
    words = models.load_tokenizer(tiny_model("llama"))
    longest = max(
        len(words(row["prompt"] + row["completion"])["input_ids"]) for row in lines(tmp_path / "responses.jsonl")
    )
    other = [f"reference.path={tiny_model('qwen2')}", f"max_length={longest + 1}"]
    rows = written(tmp_path / "scores", *given, *other, reference="other_tokenizer")
    assert any(row.get("mismatched_ended") is False for row in rows)
    tokenizer = models.load_tokenizer(tiny_model("qwen2"))
    for row in rows:
        ids = tokenizer(row["mismatched"])["input_ids"]
        assert row["mismatched_tokens"] == len(ids) + row.get("mismatched_ended", True)


def test_a_checkpoint_of_other_labels_is_not_resumed():
    one = Pair([5], [6], [7], Preference("p", "a", "b", label=True))
    other = replace(one, text=replace(one.text, label=False))
    digests = {_tokens({"train": [pair], "validation": []}) for pair in (one, other, replace(one, text=None))}
    assert len(digests) == 3
