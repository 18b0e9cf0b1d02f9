"""Whole runs that train adapters: from the base they are held to, to a folder that loads anywhere."""

import contextlib
import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import together
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from whole_runs import frozen, losses, own, run

from dpo import evaluate, sft, train
from dpo.policy import lora
from dpo.policy import model as models
from dpo.settings import lora_of
from dpo.sweep.plan import rehearse
from dpo.training import distributed
from dpo.training.checkpoint import latest
from dpo.training.loop import Stopped

LORA = ["policy.lora.rank=4", "lr=1e-2"]
LAYOUTS = {
    "lora": [],
    "copies": ["sharding.group=1"],
    "offload": ["sharding.offload=true"],
    "live": ["reference=live", "loss=tdpo"],
    "ema": ["reference=ema", "reference.every=2"],
    "recompute": ["activation_checkpointing=true", "packed=false"],
}
ALONE = {"copies": "lora", "offload": "lora"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tiny_model) -> Path:
    """Runs of all weights and of adapters, with one cache."""
    directory = tmp_path_factory.mktemp("adapters")
    shutil.copytree(tiny_model("llama"), directory / "base")
    run(directory / "all", *own(directory, str(directory / "base")))
    run(directory / "lora", *own(directory, str(directory / "base")), *LORA)
    return directory


def given(directory: Path, *more: str) -> list[str]:
    return [*own(directory, str(directory / "base")), *LORA, *more]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_begins_at_its_base_and_shares_its_scores(directory):
    assert losses(rows(directory / "lora"))[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(rows(directory / "lora"))[-1] < 0.69
    assert len([*(directory / "cache" / "reference").glob("*/scores.safetensors")]) == 1


def test_what_a_run_leaves(directory):
    """Merged weights, of which those without an adapter are the base's to the bit; and the adapter beside."""
    names = {path.name for path in (directory / "lora").iterdir()} - {
        path.name for path in (directory / "all").iterdir()
    }
    assert names == {"adapter"}
    base, merged = (load_file(directory / place / "model.safetensors") for place in ("base", "lora/policy"))
    adapter = load_file(directory / "lora" / "adapter" / "adapter_model.safetensors")
    for name, weight in merged.items():
        a, b = (adapter.get(f"base_model.model.{name.removesuffix('weight')}lora_{side}.weight") for side in "AB")
        assert (a is None) == torch.equal(weight, base[name]) == ("proj" not in name), name
        if a is not None and b is not None:
            assert torch.allclose(weight, base[name] + 32 / 4 * b @ a, rtol=0, atol=1e-6)
    policy, _ = models.load(str(directory / "lora" / "policy"))
    assert policy.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape[0] == 1


def stopped(directory: Path, name: str, monkeypatch, *more: str) -> Path:
    """A run that is stopped after its second step, and left there."""
    folder, show, looks = directory / name, evaluate.show, iter((0, 2))

    def stop(*arguments):
        if next(looks) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return show(*arguments)

    monkeypatch.setattr(evaluate, "show", stop)
    with contextlib.suppress(Stopped):
        run(folder, *given(directory, "evaluate_every=2", *more))
        raise AssertionError("it was not stopped")
    monkeypatch.setattr(evaluate, "show", show)
    return folder


@pytest.mark.parametrize("reference", ["initial", "ema", "live"])
def test_a_stopped_run_resumes_bit_equal(directory, reference, monkeypatch):
    more = [f"reference={reference}", *(["reference.every=2"] if reference == "ema" else [])]
    run(directory / f"{reference}, whole", *given(directory, "evaluate_every=2", *more))
    folder = stopped(directory, f"{reference}, stopped", monkeypatch, *more)
    [file] = latest(folder / "checkpoint").glob("*.safetensors")  # type: ignore[union-attr]
    with safe_open(file, "pt") as stored:
        kept = [name for name in stored.keys() if not name.startswith(("extra.", "rng."))]  # noqa: SIM118
    assert {name.partition(".")[0] for name in kept} == {"model", "optimizer"}
    assert all(".lora_" in name for name in kept)
    run(folder, *given(directory, "evaluate_every=2", *more))
    assert losses(rows(folder)) == losses(rows(directory / f"{reference}, whole"))
    places = [folder, directory / f"{reference}, whole"]
    for file in ("policy/model.safetensors", "adapter/adapter_model.safetensors"):
        one, other = (load_file(place / file) for place in places)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_of_other_base_weights_is_refused(directory, tmp_path, monkeypatch):
    shutil.copytree(directory / "base", tmp_path / "base")
    folder = stopped(tmp_path, "run", monkeypatch)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    model, tokenizer = models.load(str(tmp_path / "base"))
    model.get_parameter("model.norm.weight").data += 0.01
    models.save(model, tokenizer, tmp_path / "base")
    assert weights.keys() == load_file(tmp_path / "base" / "model.safetensors").keys()
    with pytest.raises(RuntimeError, match="made with another policy and another reference"):
        run(folder, *given(tmp_path, "evaluate_every=2"))


def test_the_base_is_in_memory_once(directory, monkeypatch):
    """With the table of `initial` and with `live`, whose losses are those of a model beside the policy, to the bit."""
    read, loaded = models.load, []
    monkeypatch.setattr(models, "load", lambda which, *more: loaded.append(which) or read(which, *more))
    for reference in ("initial", "live"):
        loaded.clear()
        more = ["loss=tdpo"] if reference == "live" else []
        config = frozen(directory / "once", *given(directory, f"reference={reference}", *more))
        (directory / f"once {reference}").mkdir()
        train.run(config, directory / f"once {reference}")
        during = [one for one in loaded if "policy" not in one.path]
        assert len(during) == 2  # to train, and after it to measure KL to
    run(directory / "beside", *given(directory, "reference=live", f"reference.path={directory / 'base'}", "loss=tdpo"))
    assert losses(rows(directory / "once live")) == losses(rows(directory / "beside"))


def test_the_best_policy_keeps_its_adapter(directory):
    run(directory / "best", *given(directory, "keep=best", "evaluate_every=1"))
    policy = models.load(str(directory / "best" / "policy"))[0]
    again = models.load(models.ModelSpec(str(directory / "base"), adapter=str(directory / "best" / "adapter")))[0]
    assert models.fingerprint(policy) == models.fingerprint(again)


def test_a_policy_with_an_adapter_is_measured_against_its_base(directory):
    """Which has no adapter, be it the baseline or what KL is to: all is as for the merged policy."""
    base, found = directory / "base", []
    for name, start in (
        ("by adapter", [f"policy.adapter={directory / 'lora' / 'adapter'}"]),
        ("merged", [f"policy.path={directory / 'lora' / 'policy'}"]),
    ):
        asked = [f"against={base}", f"evaluation.baseline={base}", "judge=shorter", *start]
        (folder := directory / name).mkdir()
        evaluate.run(frozen(folder, *own(directory, str(base)), *asked, verb="evaluate"), folder)
        measured = json.loads((folder / "evaluation.json").read_text())
        found.append(({**measured, "seconds": 0}, (folder / "responses.jsonl").read_text()))
    assert found[0] == found[1]
    assert found[0][0]["kl"] > 0.01


def test_training_goes_on_from_an_adapter(directory):
    """What it starts from, and is held to, is base and adapter merged, as a policy of its own."""
    adapter = f"policy.adapter={directory / 'lora' / 'adapter'}"
    for name, start in (("from adapter", [adapter]), ("from policy", [f"policy.path={directory / 'lora' / 'policy'}"])):
        found, result = run(directory / name, *given(directory), *start)
        assert losses(found)[0] == pytest.approx(math.log(2), abs=1e-6)
        assert result["kl"] >= 0
    told = [json.loads((directory / name / "initial.json").read_text()) for name in ("from adapter", "from policy")]
    assert "merged" in told[0]["policy"]
    assert losses(rows(directory / "from adapter")) == losses(rows(directory / "from policy"))
    assert len({models.fingerprint(models.load(one["policy"])[0]) for one in told}) == 1


def test_a_merged_policy_is_that_of_its_base_as_it_is_read(directory, tmp_path):
    """With another template, or where the base's folder says another thing beside weights, it is another policy."""
    spec = models.ModelSpec(str(directory / "base"), adapter=str(directory / "lora" / "adapter"))
    cache = str(directory / "cache")
    for template in ("{{ messages[0].content }}", "{{ messages[-1].content }}"):
        made = sft.merged_policy(replace(spec, chat_template=template), cache, torch.device("cpu"))
        assert models.load_tokenizer(made).chat_template == template
    sft.merged_policy(spec, cache, torch.device("cpu"))
    for file, key, value in (
        ("generation_config.json", "eos_token_id", [1, 9]),
        ("config.json", "rms_norm_eps", 0.5),
        ("tokenizer.json", "normalizer", {"type": "Lowercase"}),
    ):
        shutil.copytree(directory / "base", other := tmp_path / file)
        said = json.loads((other / file).read_text())
        (other / file).write_text(json.dumps({**said, key: value}))
        made = sft.merged_policy(replace(spec, path=str(other)), cache, torch.device("cpu"))
        assert json.loads((Path(made) / file).read_text())[key] == value


@pytest.mark.parametrize(
    "more",
    [
        ["precision=bf16"],
        ["loss=dr_dpo", "micro_batch_tokens=60"],
        ["reference=reference_free"],
        ["reference=unconditional"],
        ["optimizer=rmsprop", "weight_decay=0.1"],
    ],
    ids=" ".join,
)
def test_other_ways_to_train(more, directory):
    """Frozen weights stay what they are to the bit, and adapters learn."""
    found, _ = run(directory / " ".join(more), *given(directory, *more))
    if not any(one.startswith("reference") for one in more):
        assert losses(found)[0] == pytest.approx(math.log(2), abs=1e-3)
    assert losses(found)[-1] < losses(found)[0]
    base, merged = (
        load_file(place / "model.safetensors") for place in (directory / "base", directory / " ".join(more) / "policy")
    )
    assert {name for name in base if not torch.equal(base[name], merged[name])} == {
        name for name in base if "proj" in name
    }


def test_seeds_have_other_adapters(directory):
    began = [frozen(directory / "seeds", *given(directory, f"seed={seed}")) for seed in (0, 1)]
    a = [load_first(directory, lora_of(config)) for config in began]
    assert not torch.equal(*a)
    assert torch.equal(a[0], load_first(directory, lora_of(began[0])))


def load_first(directory: Path, adapters: Any) -> torch.Tensor:
    model = models.load(str(directory / "base"), adapters=adapters)[0]
    return next(iter(lora.layers(model).values())).lora_A["default"].weight.detach()


def test_sft_of_adapters(directory):
    folder = directory / "sft"
    folder.mkdir()
    names = ("lr=", "steps=", "batch_size=")
    overrides = [one for one in given(directory) if not one.startswith(names)] + ["sft.steps=3", "sft.lr=1e-2"]
    config = frozen(folder, *overrides, f"policy.base={directory / 'base'}", verb="sft")
    sft.run(config, folder)
    assert losses(rows(folder))[-1] < losses(rows(folder))[0]
    again = models.load(models.ModelSpec(str(directory / "base"), adapter=str(folder / "adapter")))[0]
    assert models.fingerprint(models.load(str(folder / "policy"))[0]) == models.fingerprint(again)


@pytest.mark.parametrize(
    "overrides,said",
    [
        (["policy.lora.targets=[nothing]"], "found no layer of that name: nothing"),
        (["policy.lora.rank=100000"], "policy.lora.rank must be at most 32, the rank that a weight .* got 100000"),
        (["policy.lora.targets=[lm_head]"], "must be linear layers between embeddings and head, got lm_head"),
        (["policy.adapter=nowhere"], "policy.adapter must be a folder of a LoRA adapter, found none at nowhere"),
        (["policy.path={1}", "policy.adapter={0}/lora/adapter"], "must be an adapter of .*, found one of other layers"),
        (["policy.path={0}/lora/adapter"], r"policy.path=\S*/base policy.adapter=\S*/lora/adapter"),
        (["reference=other", "reference.path={0}/lora/adapter"], "must hold a whole model, found adapter_config.json"),
    ],
)
def test_what_is_refused_when_planned(overrides, said, directory, tiny_model):
    overrides = [one.format(directory, tiny_model("gpt2")) for one in overrides]
    config: Any = frozen(directory / "refused", *given(directory), *overrides)
    [tried] = rehearse([{key: value for key, value in _plain(config).items() if key != "id"}])
    assert len(tried["problems"]) == 1
    with pytest.raises(ValueError, match=said):
        raise ValueError(tried["problems"][0])


def _plain(config: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    found: Any = OmegaConf.to_container(config)
    return found


def test_no_peft_is_found_out_when_planned(directory, monkeypatch):
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    config = _plain(frozen(directory / "refused", *given(directory)))
    del config["id"]
    assert "pip install -e '.[lora]' -c constraints.txt" in rehearse([config])[0]["problems"][0]
    config["policy"]["lora"]["rank"] = None
    assert rehearse([config])[0]["problems"] == []


def several(directory: Path) -> None:
    """What each of two processes does."""
    leave, distributed.leave = distributed.leave, lambda: None  # one group for all runs
    for name in LAYOUTS:
        folder = directory / "2" / name
        folder.mkdir(parents=True, exist_ok=True)
        train.run(config_of(directory, name, 2), folder)
    layout = distributed.ParallelLayout(group=None, offload=False, precision="fp32")
    spec = models.ModelSpec(str(directory / "base"), layout=layout)
    model = models.load(spec, adapters=lora.Lora(4, 8, "all-linear", 0))[0]
    parts = [weight for name, weight in model.named_parameters() if ".lora_" in name]
    told = {"sharded": all(isinstance(weight, DTensor) for weight in parts), "base": models.fingerprint(model)}
    told["a"] = {
        name: layer.lora_A["default"].weight.full_tensor().tolist() for name, layer in lora.layers(model).items()
    }
    adapter = str(directory / "2" / "lora" / "adapter")
    told["merged"] = models.fingerprint(models.load(models.ModelSpec(spec.path, layout=layout, adapter=adapter))[0])
    (directory / f"2-rank-{distributed.rank()}.json").write_text(json.dumps(told))
    leave()


def config_of(directory: Path, name: str, processes: int) -> Any:
    more = [*LAYOUTS[name], "steps=4", "epochs=9", "batch_size=12", "micro_batch_tokens=100", f"processes={processes}"]
    return frozen(directory / str(processes) / name, *given(directory, *more))


@pytest.mark.long
def test_two_processes_train_as_one(directory):
    for name in LAYOUTS.keys() - ALONE:
        (directory / "1" / name).mkdir(parents=True)
        train.run(config_of(directory, name, 1), directory / "1" / name)
    together(several, directory, processes=2)
    for name in LAYOUTS:
        one, two = (rows(directory / place) for place in (f"1/{ALONE.get(name, name)}", f"2/{name}"))
        assert losses(two) == pytest.approx(losses(one), rel=1e-5), name
        norms = [[row["grad_norm"] for row in some if row["split"] == "train"] for some in (two, one)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4), name
        places = [directory / place for place in (f"1/{ALONE.get(name, name)}", f"2/{name}")]
        policies = [models.load(str(place / "policy"))[0].state_dict() for place in places]
        adapters = [load_file(place / "adapter" / "adapter_model.safetensors") for place in places]
        for alone, sharded in (policies, adapters):
            assert alone.keys() == sharded.keys()
            assert all(torch.allclose(alone[key], sharded[key], rtol=0, atol=1e-4) for key in alone), name
    told = [json.loads((directory / f"2-rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0] == told[1]
    assert told[0]["sharded"]
    model = models.load(str(directory / "base"), adapters=lora.Lora(4, 8, "all-linear", 0))[0]
    assert told[0]["base"] == models.fingerprint(models.load(str(directory / "base"))[0])
    for name, layer in lora.layers(model).items():
        assert torch.equal(torch.tensor(told[0]["a"][name]), layer.lora_A["default"].weight)
    assert told[0]["merged"] == models.fingerprint(models.load(str(directory / "2" / "lora" / "policy"))[0])
