"""Whole runs that train adapters beside weights in 4 bits."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file
from test_adapters import rows, stopped
from whole_runs import frozen, losses, own, run

from dpo import evaluate, score, sft
from dpo.data.batches import collate_responses
from dpo.policy import lora
from dpo.policy import model as models
from dpo.policy.logps import sequence_logps
from dpo.sweep.plan import rehearse
from dpo.training.checkpoint import latest

NF4 = ["policy.lora.rank=4", "policy.lora.quantize=nf4", "lr=1e-2"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tiny_model) -> Path:
    """Runs of adapters beside float32 weights and beside 4 bits, with one cache."""
    directory = tmp_path_factory.mktemp("quantized")
    (directory / "base").symlink_to(tiny_model("llama", 64))
    run(directory / "lora", *given(directory, "policy.lora.quantize=null"))
    run(directory / "nf4", *given(directory))
    return directory


def given(directory: Path, *more: str) -> list[str]:
    return [*own(directory, str(directory / "base")), *NF4, *more]


def started(folder: Path) -> str:
    found: str = json.loads((folder / "initial.json").read_text())["policy"]
    return found


def entries(directory: Path, kind: str) -> int:
    return len([*(directory / "cache" / kind).glob("*/key.json")])


def test_a_run_is_held_to_the_quantized_base(directory):
    """The loss begins at ln 2, by scores of their own, though those of the float32 base are in the same cache."""
    assert losses(rows(directory / "nf4"))[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(rows(directory / "nf4"))[-1] < 0.69
    assert losses(rows(directory / "nf4")) != losses(rows(directory / "lora"))
    assert (entries(directory, "reference"), entries(directory, "quantized")) == (2, 1)
    key = json.loads(next((directory / "cache" / "quantized").glob("*/key.json")).read_text())
    assert key["weights"] == models.fingerprint(models.load(str(directory / "base"))[0])
    scored = {json.loads(one.read_text())["weights"] for one in (directory / "cache" / "reference").glob("*/key.json")}
    assert scored == {key["weights"], models.fingerprint(models.load(started(directory / "nf4"))[0])}


def test_bits_are_kept_with_what_their_base_says_beside_weights(directory, tmp_path):
    shutil.copytree(directory / "base", other := tmp_path / "base")
    said = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**said, "eos_token_id": [9]}))
    made = sft.quantized_policy(models.ModelSpec(str(other)), "nf4", str(directory / "cache"))
    assert 9 in json.loads((Path(made) / "generation_config.json").read_text())["eos_token_id"]


def test_scores_made_ahead_are_those_of_the_bits(directory):
    """`dpo.score` fills the entry that training reads; other bits have another."""
    for how, more in (("nf4", 0), ("nf4_double", 1)):
        folder, before = directory / f"scores {how}", entries(directory, "reference")
        folder.mkdir()
        overrides = given(directory, f"policy.lora.quantize={how}")
        config = frozen(folder, *[one for one in overrides if not one.startswith(("steps", "lr"))], verb="score")
        config.choices = {"reference": "initial"}
        score.run(config, folder)
        assert entries(directory, "reference") == before + more
    found, _ = run(directory / "double", *given(directory, "policy.lora.quantize=nf4_double"))
    assert losses(found)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert entries(directory, "reference") == 3


def test_what_a_run_leaves(directory):
    """Plain float32 weights that are what was trained: bits as they stand for weights, and adapters added."""
    adapter = load_file(directory / "nf4" / "adapter" / "adapter_model.safetensors")
    base, merged = (
        load_file(f"{place}/model.safetensors") for place in (started(directory / "nf4"), directory / "nf4/policy")
    )
    for name, weight in merged.items():
        a, b = (adapter.get(f"base_model.model.{name.removesuffix('weight')}lora_{side}.weight") for side in "AB")
        assert (a is None) == torch.equal(weight, base[name]) == ("proj" not in name), name
        if a is not None and b is not None:
            assert torch.allclose(weight, base[name] + 32 / 4 * b @ a, rtol=0, atol=1e-6)
    assert "quantization_config" not in json.loads((directory / "nf4" / "policy" / "config.json").read_text())
    again = models.load(models.ModelSpec(started(directory / "nf4"), adapter=str(directory / "nf4" / "adapter")))[0]
    assert models.fingerprint(again) == models.fingerprint(models.load(str(directory / "nf4" / "policy"))[0])


@pytest.mark.parametrize("keep", ["last", "best"])
def test_what_is_measured_is_what_is_saved(keep, directory, monkeypatch):
    """The policy in memory, and KL to itself without adapters, are the saved one and KL to what it began as."""
    measured: dict[str, Any] = {}
    real = evaluate.measure

    def measure(policy, kl_targets, *others):
        measured.update(policy=policy, **kl_targets)
        return real(policy, kl_targets, *others)

    monkeypatch.setattr(evaluate, "measure", measure)
    _, result = run(directory / f"measured {keep}", *given(directory, f"keep={keep}", "evaluate_every=1", "lr=0.3"))
    assert measured["kl"] is measured["policy"]
    assert len(lora.in_4_bits(measured["policy"])) == 2 * 7
    assert (result["selected_step"] < 3) == (keep == "best")
    saved = models.load(str(directory / f"measured {keep}" / "policy"))[0]
    batch = collate_responses([([5, 6, 7], [[8, 9], [9]]), ([15], [[16], [17, 3]])], packed=False)
    with torch.no_grad():
        ours, theirs = (sequence_logps(model, batch)[0] for model in (measured["policy"], saved))
        assert torch.allclose(ours, theirs, rtol=2e-5, atol=1e-5)
    monkeypatch.undo()
    config = frozen(directory / "evaluated", *_evaluated(directory, f"measured {keep}"), verb="evaluate")
    (directory / f"evaluated {keep}").mkdir()
    evaluate.run(config, directory / f"evaluated {keep}")
    again = json.loads((directory / f"evaluated {keep}" / "evaluation.json").read_text())
    assert result["kl"] == pytest.approx(again["kl"], rel=1e-3)
    assert result["kl"] > 1e-3


def _evaluated(directory: Path, name: str) -> list[str]:
    shared = ("data", "max_length", "max_new", "evaluation.prompts")
    kept = [one for one in own(directory, "") if one.startswith(shared)]
    return [*kept, f"policy.path={directory / name / 'policy'}", f"against={started(directory / name)}"]


def test_a_stopped_run_resumes_bit_equal(directory, monkeypatch):
    run(directory / "whole", *given(directory, "evaluate_every=2"))
    monkeypatch.setattr("test_adapters.given", lambda place, *more: given(place, *more))
    folder = stopped(directory, "stopped", monkeypatch)
    [file] = latest(folder / "checkpoint").glob("*.safetensors")  # type: ignore[union-attr]
    with safe_open(file, "pt") as stored:
        kept = [name for name in stored.keys() if not name.startswith("rng.")]  # noqa: SIM118
    assert {name.partition(".")[0] for name in kept} == {"model", "optimizer"}
    assert all(".lora_" in name for name in kept)
    run(folder, *given(directory, "evaluate_every=2"))
    assert losses(rows(folder)) == losses(rows(directory / "whole"))
    for name in ("policy/model.safetensors", "adapter/adapter_model.safetensors"):
        one, other = (load_file(place / name) for place in (folder, directory / "whole"))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_training_goes_on_from_an_adapter(directory):
    """On what its base and it are together, quantized anew."""
    start = f"policy.path={started(directory / 'nf4')}", f"policy.adapter={directory / 'nf4' / 'adapter'}"
    for name, more in (("from adapter", start), ("from policy", (f"policy.path={directory / 'nf4' / 'policy'}",))):
        found, _ = run(directory / name, *given(directory), *more)
        assert losses(found)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(rows(directory / "from adapter")) == losses(rows(directory / "from policy"))


@pytest.mark.parametrize(
    "more",
    [
        ["precision=bf16"],
        ["reference=live", "loss=tdpo"],
        ["reference=ema", "reference.every=2"],
        ["activation_checkpointing=true", "packed=false"],
        ["optimizer=adamw_8bit"],
    ],
    ids=" ".join,
)
def test_other_ways_to_train(more, directory):
    found, _ = run(directory / " ".join(more), *given(directory, *more))
    assert losses(found)[0] == pytest.approx(math.log(2), abs=1e-3)
    assert losses(found)[-1] < losses(found)[0]
    if "packed=false" in more:
        assert losses(found) == pytest.approx(losses(rows(directory / "nf4")), rel=1e-5)


def test_sft_beside_4_bits(directory):
    folder = directory / "sft"
    folder.mkdir()
    names = ("lr=", "steps=", "batch_size=", "policy.path")
    overrides = [one for one in given(directory) if not one.startswith(names)] + ["sft.steps=3", "sft.lr=1e-2"]
    sft.run(frozen(folder, *overrides, f"policy.base={directory / 'base'}", verb="sft"), folder)
    assert losses(rows(folder))[-1] < losses(rows(folder))[0]
    told = json.loads((folder / "adapter" / "base.json").read_text())
    assert told["path"] == started(directory / "nf4")
    again = models.load(models.ModelSpec(told["path"], adapter=str(folder / "adapter")))[0]
    assert models.fingerprint(models.load(str(folder / "policy"))[0]) == models.fingerprint(again)


def planned(directory: Path, *overrides: str) -> list[str]:
    config: Any = OmegaConf.to_container(frozen(directory / "planned", *given(directory), *overrides))
    del config["id"]
    [tried] = rehearse([config])
    found: list[str] = tried["problems"]
    return found


def test_what_is_refused_when_planned(directory, tiny_model, monkeypatch):
    """Before any model is loaded, by a message that says what to do."""
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("a model was loaded"))
    assert planned(directory) == []
    for kind, found in (("gpt2", "found a Conv1D"), ("mixtral", "found a Mixtral"), ("qwen2", "found 32 of")):
        width = 32 if kind == "qwen2" else 64
        [problem] = planned(directory, f"policy.path={tiny_model(kind, width)}")
        assert found in problem
        assert "policy.lora.quantize=null" in problem
    with pytest.raises(ValueError, match=r"policy.lora.quantize needs processes=1, got 2; use \S*quantize=null"):
        planned(directory, "processes=2")
    with pytest.raises(ValueError, match=r"needs adapters .*, got nf4 and policy.lora.rank=null; set policy.lora.rank"):
        planned(directory, "policy.lora.rank=null")
    monkeypatch.setattr(lora, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    assert "pip install -e '.[qlora]' -c constraints.txt" in planned(directory)[0]
