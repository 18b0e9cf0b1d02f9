"""`dpo.score`: the reference's log-probs as files, which train another run without the reference."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import compose
from conftest import tiny_tokenizer
from omegaconf import OmegaConf

from dpo import score
from dpo.data.batches import collate, tokenize
from dpo.data.records import Preference, read, write
from dpo.policy import model as models
from dpo.policy.logps import token_logps
from dpo.sweep.identity import identity
from dpo.sweep.plan import resolve
from dpo.sweep.schema import check

ROOT = Path(__file__).parents[2]


@pytest.fixture
def given(tmp_path, tiny_model) -> list[str]:
    pairs = [Preference(f"Is {n} even?", "yes" if n % 2 == 0 else "no", f"maybe {n}") for n in range(12)]
    write(tmp_path / "pairs.jsonl", pairs[:8])
    write(tmp_path / "held_out.jsonl", pairs[8:])
    data = ["data=file", f"data.path={tmp_path / 'pairs.jsonl'}", f"data.validation_path={tmp_path / 'held_out.jsonl'}"]
    return [*data, f"policy.path={tiny_model('llama')}", "threads=1", "device=cpu", f"cache={tmp_path / 'cache'}"]


def frozen(*overrides: str, reference: str) -> Any:
    resolved = resolve(compose("score", *overrides, f"reference={reference}"))
    check(resolved)
    return OmegaConf.create({"id": identity(resolved), **resolved, "choices": {"reference": reference}})


def scored(directory: Path, *overrides: str, reference: str = "initial") -> dict[str, list[dict[str, Any]]]:
    """Lines of both files, as the verb writes them."""
    directory.mkdir()
    score.run(frozen(*overrides, reference=reference), directory)
    assert (directory / "manifest.json").exists()
    return {split: lines(directory / f"{split}.jsonl") for split in score.SPLITS}


def summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "manifest.json").read_text())


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_files_hold_what_the_model_says(tmp_path, given, tiny_model):
    rows = scored(tmp_path / "scores", *given, "per_token=true")
    assert [len(rows[split]) for split in score.SPLITS] == [8, 4]
    counts = {"train pairs": 8, "validation pairs": 4, "train pairs cut": 0, "validation pairs cut": 0}
    assert {**summary(tmp_path / "scores"), "seconds": 0} == {**counts, "seconds": 0}
    model, tokenizer = models.load(tiny_model("llama"))
    for line in rows["train"] + rows["validation"]:
        [pair] = tokenize([Preference(line["prompt"], line["chosen"], line["rejected"])], tokenizer, 200, "error")
        for name, tokens in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            index, real = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.bool)
            alone = collate([tokens], index, real, pad_id=0, packed=False)
            with torch.no_grad():
                values = token_logps(model, alone).flatten()[-len(tokens[1]) :]
            assert line[f"{name}_tokens"] == len(tokens[1])
            assert line[f"{name}_token_logprobs"] == pytest.approx(values.tolist(), abs=1e-4)
            assert line[f"{name}_logprob"] == pytest.approx(values.sum().item(), abs=1e-4)


def test_one_pass_serves_sums_and_tokens(tmp_path, given, capfd):
    """Scores with tokens are those that training reads, and scores made without have them, too."""
    said = []
    for number, per_token in enumerate(("false", "true", "false")):
        rows = scored(tmp_path / str(number), *given, f"per_token={per_token}")["train"]
        assert all(("chosen_token_logprobs" in line) is (per_token == "true") for line in rows)
        said += [line for line in capfd.readouterr().out.splitlines() if line.startswith("reference: ")]
    assert ["from the cache" in line for line in said] == [False, True, True]


def test_tokens_are_counted_as_the_reference_reads_them(tmp_path, given, tiny_model):
    other = [f"reference.path={tiny_model('qwen2')}", "max_length=8", "max_new_tokens=4", "on_too_long=truncate"]
    rows = scored(tmp_path / "scores", *given, *other, reference="other_tokenizer")
    for number, line in enumerate(rows["train"]):  # what is left in eight tokens of the policy, and no more
        assert f"Is {number} even?".endswith(line["prompt"])
        assert "prompt" in line["cut"]
        for name in ("chosen", "rejected"):
            assert (name in line["cut"]) is not line.get(f"{name}_ended", True)
            tokens = len(tiny_tokenizer("qwen2")(line[name])["input_ids"]) + line.get(f"{name}_ended", True)
            assert line[f"{name}_tokens"] == tokens
    assert any("rejected" in line["cut"] for line in rows["train"])
    assert summary(tmp_path / "scores")["train pairs cut"] == 8
    files = [f"reference.path={tmp_path / 'scores'}", *other[1:]]
    again = scored(tmp_path / "again", *given, *files, reference="precomputed")
    assert [one["chosen_logprob"] for one in again["train"]] == [one["chosen_logprob"] for one in rows["train"]]
    with pytest.raises(ValueError, match=r"found none for 8 of 8 train pairs.* 8 of them were cut"):
        scored(tmp_path / "longer", *given, *files, "max_length=9", reference="precomputed")


def test_given_scores_are_those_that_were_written(tmp_path, given, tiny_model):
    folder = tmp_path / "scores"
    rows = scored(folder, *given)
    again = scored(tmp_path / "again", *given, f"reference.path={folder}", reference="precomputed")
    for split in score.SPLITS:  # how many tokens there were nobody knows any more
        assert again[split] == [{k: v for k, v in line.items() if not k.endswith("_tokens")} for line in rows[split]]
    (folder / "validation.jsonl").unlink()
    with pytest.raises(ValueError, match="found none for 4 of 4 validation pairs"):
        scored(tmp_path / "fewer", *given, f"reference.path={folder}", reference="precomputed")


def test_chats_are_written_as_whole_conversations(tmp_path, given, tiny_model):
    def chat(text: str, role: str = "assistant") -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    pairs = [
        Preference(chat("Be brief.", "system") + chat(f"Is {n} even?", "user"), chat("yes"), chat("no"), True, n != 1)
        for n in range(3)
    ]
    for name in ("pairs.jsonl", "held_out.jsonl"):
        write(tmp_path / name, pairs)
    policy = f"policy.path={tiny_model('qwen2')}"
    rows = scored(tmp_path / "scores", *given, policy)
    for pair, line in zip(pairs, rows["train"], strict=True):
        assert (line["prompt"], line["chosen"]) == (pair.prompt, [*pair.prompt, *pair.chosen])
        assert line["rejected"] == [*pair.prompt, *pair.rejected]
    assert read(tmp_path / "scores" / "train.jsonl") == pairs
    again = scored(tmp_path / "again", *given, policy, f"reference.path={tmp_path / 'scores'}", reference="precomputed")
    assert [line["chosen_logprob"] for line in again["train"]] == [line["chosen_logprob"] for line in rows["train"]]


@pytest.mark.parametrize("reference", ["reference_free", "ema"])
def test_what_has_no_scores_is_passed_over(tmp_path, given, monkeypatch, capfd, reference):
    """So a sweep of references goes on to the next; of two processes one says so and finishes the run."""
    monkeypatch.setattr(score, "load", lambda _: pytest.fail("data were read"))
    config = frozen(*given, "processes=2", reference=reference)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        assert not (tmp_path / "evaluation.json").exists()
        monkeypatch.setenv("RANK", rank)
        score.run(config, tmp_path)
    assert summary(tmp_path).keys() == {"seconds"}
    assert capfd.readouterr().out.count(f"reference={reference} has no scores to make") == 1
