"""`dpo.score`: the reference's log-probs as files, which train another run without the reference."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dpo import score
from dpo.config import check, identity
from dpo.data.batches import collate, tokenize
from dpo.data.records import Preference, write
from dpo.plan import resolve
from dpo.policy import model as models
from dpo.policy.logps import token_logps

ROOT = Path(__file__).parent.parent


@pytest.fixture
def given(tmp_path, tiny_model) -> list[str]:
    pairs = [Preference(f"Is {n} even?", "yes" if n % 2 == 0 else "no", f"maybe {n}") for n in range(12)]
    write(tmp_path / "pairs.jsonl", pairs[:8])
    write(tmp_path / "held_out.jsonl", pairs[8:])
    data = ["data=file", f"data.path={tmp_path / 'pairs.jsonl'}", f"data.validation_path={tmp_path / 'held_out.jsonl'}"]
    return [*data, f"policy.path={tiny_model('llama')}", "threads=1", "device=cpu", f"cache={tmp_path / 'cache'}"]


def scored(directory: Path, *overrides: str, reference: str = "initial") -> dict[str, list[dict[str, Any]]]:
    """Lines of both files, as the verb writes them."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        resolved = resolve(compose("score", [*overrides, f"reference={reference}"]))
    check(resolved)
    directory.mkdir()
    frozen = {"id": identity(resolved), **resolved, "choices": {"reference": reference}}
    score.run(OmegaConf.create(frozen), directory)
    assert (directory / "evaluation.json").exists()
    return {
        split: [json.loads(line) for line in (directory / f"{split}.jsonl").read_text().splitlines()]
        for split in score.SPLITS
    }


def test_files_hold_what_the_model_says(tmp_path, given, tiny_model):
    rows = scored(tmp_path / "scores", *given, "per_token=true")
    assert [len(rows[split]) for split in score.SPLITS] == [8, 4]
    model, tokenizer = models.load(tiny_model("llama"))
    for line in rows["train"]:
        [pair] = tokenize([Preference(line["prompt"], line["chosen"], line["rejected"])], tokenizer, 200, "error")
        for name, tokens in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            index, real = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.bool)
            alone = collate([tokens], index, real, pad_id=0, packed=False)
            with torch.no_grad():
                values = token_logps(model, alone).flatten()[-len(tokens[1]) :]
            assert line[f"{name}_tokens"] == len(tokens[1])
            assert line[f"{name}_token_logprobs"] == pytest.approx(values.tolist(), abs=1e-4)
            assert line[f"{name}_logprob"] == pytest.approx(values.sum().item(), abs=1e-4)


def test_given_scores_are_those_that_were_written(tmp_path, given, tiny_model):
    folder = tmp_path / "scores"
    rows = scored(folder, *given)
    again = scored(tmp_path / "again", *given, f"reference.path={folder}", reference="given")
    assert again == rows
    (folder / "validation.jsonl").unlink()
    with pytest.raises(ValueError, match="found none for 4 of 4 validation pairs"):
        scored(tmp_path / "fewer", *given, f"reference.path={folder}", reference="given")


def test_two_processes_score_as_one(tmp_path, given):
    alone = scored(tmp_path / "alone", *given, "per_token=true")
    command = [sys.executable, "-m", "dpo.score", *given, "per_token=true", "processes=2"]
    command += [f"cache={tmp_path / 'cache2'}", f"runs={tmp_path}", "name=two"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for split in score.SPLITS:
        [file] = (tmp_path / "two").glob(f"*/{split}.jsonl")
        for row, one in zip(map(json.loads, file.read_text().splitlines()), alone[split], strict=True):
            for name, value in one.items():
                assert row[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5)), name


@pytest.mark.parametrize("reference", ["uniform", "moving"])
def test_what_has_no_scores_is_refused(tmp_path, given, reference):
    with pytest.raises(ValueError, match=f"reference={reference} has no scores"):
        scored(tmp_path / "scores", *given, reference=reference)
