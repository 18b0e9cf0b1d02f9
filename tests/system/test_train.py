"""Whole runs, a few steps each: every reference, own data and models, shared stages, resuming, two processes."""

import gzip
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from ranks import together
from safetensors.torch import load_file, save_file
from test_model import copy, edit
from whole_runs import SMALL, frozen, losses, once, other_model, own, run

import dpo.references
from dpo import cache, evaluate, sft, train
from dpo.policy import model as models
from dpo.policy.logps import sequence_logps, token_logps
from dpo.policy.scoring import LIVE
from dpo.settings import sft_of
from dpo.sweep import execute as executing
from dpo.sweep.forks import Fork, serve
from dpo.sweep.signature import instantiate
from dpo.training.optim import optimizer

ROOT = Path(__file__).parents[2]


def test_a_run_in_the_world(tmp_path, capfd):
    rows, result = run(tmp_path / "run", *SMALL, "beta=0.2")
    start = next(row for row in rows if row["split"] == "validation" and row["step"] == 0)
    assert start["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert start["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert (start["rewards/accuracies"], start["rewards/ties"]) == (0.5, 1.0)  # rounding ranks nothing
    assert len(losses(rows)) == 3
    assert losses(rows)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(rows)[1] != pytest.approx(math.log(2), abs=1e-4)  # it learns
    train_rows = [row for row in rows if row["split"] == "train"]
    for row in train_rows:  # rewards are beta times the log-ratios
        assert row["rewards/margins"] == pytest.approx(0.2 * row["logratios/margins"], abs=1e-6)
        assert row["rewards/chosen"] == pytest.approx(0.2 * row["logratios/chosen"], abs=1e-6)
    assert {"win_rate", "win_rate/low", "win_rate/high", "kl", "kl/se", "kl_plain", "kl_plain/se"} <= set(result)
    assert {"rewards/accuracies", "rewards/margins", "length", "ended", "valid", "correct", "steps"} <= set(result)
    assert result["n"] == 10
    assert 0 <= result["win_rate/low"] <= result["win_rate"] <= result["win_rate/high"] <= 1
    assert not (tmp_path / "run" / "checkpoint").exists()
    models.load(str(tmp_path / "run" / "policy"))
    assert len((tmp_path / "run" / "responses.jsonl").read_text().splitlines()) == 10
    said = capfd.readouterr().out
    assert said.count("on all 10 test prompts; evaluation.prompts asks for 1000") == 1
    assert "self-check: |loss - ln 2|" in said
    assert "reference: initial policy, weights" in said


def test_a_sweep_shares_what_does_not_depend_on_beta(tmp_path, capfd):
    run(tmp_path / "a", *SMALL, "beta=0.1")
    capfd.readouterr()
    run(tmp_path / "b", *SMALL, "beta=0.5", "lr=1e-4", "loss=ipo")
    said = capfd.readouterr().out
    assert "from the cache" in said
    assert "computed in" not in said
    kinds = {kind.name: sum(entry.is_dir() for entry in kind.iterdir()) for kind in (tmp_path / "cache").iterdir()}
    assert kinds == {
        "sft": 1,
        "tokens": 2,  # training and held-out pairs
        "candidates": 1,
        "pairs": 1,
        "baseline": 1,
        "reference": 1,
    }  # one pass scores train and validation


@pytest.mark.parametrize("reference", ["initial", "other", "reference_free", "ema"])
def test_every_reference_trains(tmp_path, tiny_model, reference):
    given = [
        f"reference={reference}",
        *([f"reference.path={other_model(tmp_path, tiny_model)}"] * (reference == "other")),
    ]
    rows, result = run(tmp_path / "run", *own(tmp_path, tiny_model("llama")), *given, "beta=0.5")
    first, second, _ = losses(rows)
    assert math.isfinite(first)
    assert first != second
    at_start = first == pytest.approx(math.log(2), abs=1e-6)
    assert at_start is (reference in ("initial", "ema"))
    assert all(result[name] >= 0 for name in ("kl", *(["kl_reference"] if reference == "other" else [])))


def test_a_sweep_makes_one_pass_of_its_reference(tmp_path, tiny_model, monkeypatch):
    """What goes through the reference: the responses of all pairs once, and the few that every run compares."""
    path, rows, load = other_model(tmp_path, tiny_model), [], models.load

    def counted(which: Any, *options: Any, **more: Any) -> Any:
        model, tokenizer = load(which, *options, **more)
        if models.spec_of(which).path == path:
            model.register_forward_pre_hook(lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True)
        return model, tokenizer

    monkeypatch.setattr(models, "load", counted)
    given = [*own(tmp_path, tiny_model("llama")), "packed=false", f"reference.path={path}", "reference.max_length=96"]
    for number, varied in enumerate((["beta=0.1"], ["beta=0.5", "lr=1e-4"], ["loss=ipo", "seed=1"])):
        run(tmp_path / str(number), "reference=other_tokenizer", *given, *varied)
        assert sum(rows) == 2 * 30 + LIVE * (number + 1)


def test_a_reference_that_never_moves_is_the_cached_one(tmp_path, tiny_model):
    """Live scoring against the table: a moving reference whose first move never comes."""
    given = own(tmp_path, tiny_model("llama"))
    cached, _ = run(tmp_path / "cached", *given)
    live, _ = run(tmp_path / "live", *given, "reference=ema", "reference.every=1000")
    assert losses(cached) == pytest.approx(losses(live), abs=1e-6)
    moved, _ = run(tmp_path / "moved", *given, "reference=ema", "reference.every=1", "reference.alpha=1.0")
    assert losses(moved) == pytest.approx([math.log(2)] * 3, abs=1e-5)  # a copy of the policy at every step


@pytest.mark.parametrize("every,told", [(2, False), (3, True)])
def test_a_reference_that_has_no_time_to_move_is_told(tmp_path, tiny_model, capfd, every, told):
    """In a sweep over references it has the numbers of `initial`: after the last step it moves for nobody."""
    given = own(tmp_path, tiny_model("llama"))
    run(tmp_path / "run", *given, "steps=3", "reference=ema", f"reference.every={every}")
    assert ("reference.every=3 must be below the 3 steps of this run" in capfd.readouterr().out) is told


def test_a_reference_beside_the_policy_is_where_training_starts(tmp_path, tiny_model):
    """And not the base that SFT made that of."""
    given = [one for one in own(tmp_path, tiny_model("llama")) if not one.startswith("policy.path")]
    given += [f"policy.base={tiny_model('llama')}", "sft.steps=1", "sft.lr=1e-2", "steps=0", "reference=live"]
    [before, *_], _ = run(tmp_path / "run", *given)
    assert [before[f"logratios/{side}"] for side in ("chosen", "rejected")] == pytest.approx([0, 0], abs=1e-4)


def test_kl_to_a_baseline_takes_no_judge(tmp_path, tiny_model, capfd):
    """Of the policy that it started from it is KL itself; that there is no judge for a text to compare with is said."""
    given = own(tmp_path, tiny_model("llama"))
    shutil.copytree(tiny_model("llama"), start := tmp_path / "start")
    _, found = run(tmp_path / "start run", *given, f"evaluation.baseline={start}")
    assert found["kl_baseline"] == found["kl"] > 0
    _, other = run(tmp_path / "other run", *given, f"evaluation.baseline={other_model(tmp_path, tiny_model)}")
    assert other["kl_baseline"] != other["kl"] == found["kl"]
    assert "compares nothing" not in capfd.readouterr().out
    run(tmp_path / "human", *given, "evaluation.baseline=human")
    assert "evaluation.baseline=human compares nothing: there is no judge" in capfd.readouterr().out


def test_reference_free_is_the_log_probability_margin(tmp_path, tiny_model):
    rows, _ = run(tmp_path / "run", *own(tmp_path, tiny_model("llama")), "reference=reference_free")
    for row in rows:
        if row["split"] == "train":
            assert row["logratios/chosen"] == pytest.approx(row["logps/chosen"])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "gpt_neox"])
def test_own_data_and_model_whatever_the_batch_layout(tmp_path, tiny_model, kind):
    given = own(tmp_path, tiny_model(kind))
    packed, result = run(tmp_path / "packed", *given)
    small, _ = run(tmp_path / "small", *given, "micro_batch_tokens=70")
    again, _ = run(tmp_path / "again", *given, "activation_checkpointing=true")
    padded, _ = run(tmp_path / "padded", *given, "micro_batch_tokens=140", "packed=false")
    assert losses(packed) == pytest.approx(losses(small), rel=1e-5)
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-5)
    assert losses(packed) == losses(again)
    assert len(set(losses(packed))) == 3
    assert "win_rate" not in result  # no judge


def test_the_real_hh_pairs(tmp_path, tiny_model):
    real, some = ROOT.parent / "shared" / "data" / "hh-harmless-base-1500.jsonl.gz", tmp_path / "hh.jsonl"
    if real.exists():
        with gzip.open(real, "rt") as file:
            some.write_text("".join(itertools.islice(file, 300)))
    else:  # the same format, warts included, in a few lines
        talk = "\n\nHuman: Tell me about {n}.\n\nAssistant: Which?\n\nHuman: All of it.\n\nAssistant:"
        lines = [
            {"chosen": f"{talk.format(n=n)} It is {n}.", "rejected": talk.format(n=n) + (f" Not {n}." if n % 9 else "")}
            for n in range(60)
        ]
        some.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = [
        "data=hh",
        f"data.path={some}",
        "data.on_faulty=drop",
        "on_too_long=truncate",
        *own(tmp_path, tiny_model("llama"))[3:],
    ]
    rows, _ = run(tmp_path / "run", *given, "batch_size=4", "micro_batch_tokens=200")
    assert len(losses(rows)) == 3


def test_what_training_alone_needs_is_gone_when_the_policy_is_measured(tmp_path, tiny_model, monkeypatch):
    """Models are loaded for that: with gradients and moments as well it would need more memory than training."""
    optimizers, seen, measure = [], [], evaluate.measure
    monkeypatch.setattr(train, "optimizer", lambda *given: optimizers.append(optimizer(*given)) or optimizers[0])

    def measured(*given):
        [weights] = [group["params"] for group in optimizers[0].param_groups]
        seen.append([len(optimizers[0].state), sum(weight.grad is not None for weight in weights), len(weights)])
        return measure(*given)

    monkeypatch.setattr(evaluate, "measure", measured)
    run(tmp_path / "run", *own(tmp_path, tiny_model("llama")), "evaluate_every=2", "evaluate_prompts=2")
    (moments, gradients, weights), after = seen
    assert moments == gradients == weights > 0  # an evaluation on the way takes nothing from training
    assert after[:2] == [0, 0]


@pytest.mark.parametrize("checkpoint_every", [0, 2])
def test_an_interrupted_evaluation_resumes_without_training_again(tmp_path, monkeypatch, capfd, checkpoint_every):
    directory = tmp_path / "run"
    directory.mkdir()
    config = frozen(directory, *SMALL, f"checkpoint_every={checkpoint_every}")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "kl", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            train.run(config, directory)
    before = losses([json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()])
    train.run(config, directory)
    after = losses([json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()])
    assert after == before
    assert "resumes at step 3 of 3" in capfd.readouterr().out


def test_a_stopped_sft_resumes_bit_for_bit(tmp_path, monkeypatch, capfd):
    """Ctrl-C while the policy of a sweep is made: what is made is found again under the same key."""
    (tmp_path / "whole").mkdir()
    config = frozen(tmp_path / "whole" / "run", *SMALL, "sft.steps=4", "checkpoint_every=0", "micro_batch_tokens=1000")
    demonstrations = instantiate(config.data).demonstrations
    whole, _ = sft.cached_policy(sft_of(config), demonstrations, torch.device("cpu"))
    calls: list[int] = []

    def interrupted(model, batch):
        calls.append(1)
        if len(calls) == 5:  # three micro-batches a step
            os.kill(os.getpid(), signal.SIGINT)
        return sequence_logps(model, batch)

    config.cache = str(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(sft, "sequence_logps", interrupted)
        with pytest.raises(KeyboardInterrupt, match="SFT stopped at step 2 of 4; the same command resumes there"):
            sft.cached_policy(sft_of(config), demonstrations, torch.device("cpu"))
    path, cached = sft.cached_policy(sft_of(config), demonstrations, torch.device("cpu"))
    assert not cached
    assert "SFT: resumes at step 2 of 4" in capfd.readouterr().out
    first, again = (load_file(Path(folder) / "model.safetensors") for folder in (whole, path))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert {file.name for file in Path(path).parent.iterdir()} == {"policy", "metrics.jsonl", "key.json", "files.json"}


@pytest.mark.parametrize("place", ["step", "save", "entry"])
def test_a_failed_sft_keeps_what_it_has(tmp_path, monkeypatch, capfd, place):
    """An error deletes nothing that was computed: the next attempt goes on from there, bit for bit."""
    (tmp_path / "whole").mkdir()
    given = [*SMALL, "sft.steps=4", "checkpoint_every=1", "checkpoints_kept=1"]
    config = frozen(tmp_path / "whole" / "run", *given)
    demonstrations = instantiate(config.data).demonstrations
    whole, _ = sft.cached_policy(sft_of(config), demonstrations, torch.device("cpu"))
    calls: list[int] = []

    def failing(real):
        def ask(*values, **options):
            calls.append(1)
            if len(calls) == (3 if place == "step" else 1):
                raise OSError(28, "No space left on device")
            return real(*values, **options)

        return ask

    config.cache = str(tmp_path / "cache")
    module, name = {"step": (sft, "sequence_logps"), "save": (models, "save"), "entry": (cache, "_files")}[place]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing(getattr(module, name)))
        with pytest.raises(OSError, match="No space left"):
            sft.cached_policy(sft_of(config), demonstrations, torch.device("cpu"))
    capfd.readouterr()
    path, cached = sft.cached_policy(sft_of(config), demonstrations, torch.device("cpu"))
    assert not cached
    said = capfd.readouterr().out
    assert ("SFT: resumes at step 2 of 4" in said) == (place == "step")
    assert ("SFT: resumes at step 4 of 4" in said) == (place == "save")
    first, again = (load_file(Path(folder) / "model.safetensors") for folder in (whole, path))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert {file.name for file in Path(path).parent.iterdir()} == {"policy", "metrics.jsonl", "key.json", "files.json"}


def test_a_wrong_cache_is_noticed(tmp_path, tiny_model, monkeypatch):
    """Reference scores that are not those of the policy stop the run before it trains, by three checks."""

    def spoil(change) -> None:
        for scores in (tmp_path / "cache" / "reference").glob("*/scores.safetensors"):
            table = load_file(scores)
            save_file({**table, "logps": change(table["logps"])}, scores)

    def hide() -> None:
        for folder in (tmp_path / "cache" / "reference").glob("*/"):
            (folder / "files.json").write_text(json.dumps(cache._files(folder)))

    given = own(tmp_path, tiny_model("llama"))
    run(tmp_path / "a", *given)
    spoil(lambda logps: logps + 1)
    with pytest.raises(RuntimeError, match=r"scores\.safetensors changed; delete that folder"):
        run(tmp_path / "b", *given, "beta=0.3")
    hide()  # as if written so
    with pytest.raises(RuntimeError, match=r"must hold the log-probs that the model gives, .*; it is damaged"):
        run(tmp_path / "b", *given, "beta=0.3")
    with monkeypatch.context() as patch:
        patch.setattr(dpo.references, "check_against_live", lambda *_: 0.0)
        with pytest.raises(
            RuntimeError, match=r"the same model .* scores in \S+ are damaged: delete it to score again"
        ):
            run(tmp_path / "b", *given, "beta=0.3")
        patch.setattr(
            "dpo.policy.attention.attends", lambda branch, position, other, others, window: position >= others
        )
        patch.setattr(train, "packable", lambda *_: True)
        with pytest.raises(RuntimeError, match=r"the same model .*; the policy's own .* packed rows: set packed=false"):
            run(tmp_path / "b", *given, "beta=0.3")
    spoil(lambda logps: logps * math.nan)
    hide()
    with pytest.raises(RuntimeError, match="finite"):
        run(tmp_path / "c", *given, "beta=0.3")


def in_a_group(directory, given):
    train.run(frozen(directory, *given), directory)


@pytest.mark.long
@pytest.mark.parametrize("reference,kind", [("initial", "qwen2"), ("ema", "llama")])
def test_two_processes_are_one(tmp_path, tiny_model, reference, kind):
    """Uneven last window, two micro-batches, a cached and a live sharded reference, embeddings tied and not.

    The first as a user starts it, under torchrun; the other forked, since fresh imports take longer than the run.
    """
    given = [*own(tmp_path, tiny_model(kind)), f"reference={reference}", "batch_size=10", "micro_batch_tokens=150"]
    given += ["evaluate_prompts=2", "evaluate_every=3"]  # KL of the sharded policy, too
    given += ["epochs=2", "steps=null", *(["reference.every=2"] if reference == "ema" else [])]
    given += ["evaluate_every=2", "keep=best"]  # gathers the policy while it trains
    alone, one = run(tmp_path / "alone", *given)
    given += ["processes=2", "activation_checkpointing=true", "threads=1"]
    if reference == "ema":
        (tmp_path / "two" / "run").mkdir(parents=True)  # with a cache of its own
        together(in_a_group, tmp_path / "two" / "run", given, processes=2)
    else:
        places = ["name=two", f"runs={tmp_path}", f"cache={tmp_path / 'cache2'}"]
        command = [sys.executable, "-m", "dpo.train", *once(*given, *places)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
    (directory,) = (path.parent for path in (tmp_path / "two").glob("*/evaluation.json"))
    both = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert losses(both) == pytest.approx(losses(alone), rel=1e-5)
    on_the_way = [[row["kl"] for row in rows if row["split"] == "test"] for rows in (alone, both)]
    assert len(on_the_way[0]) > 1
    assert on_the_way[0] == pytest.approx(on_the_way[1], rel=1e-3, abs=1e-6)  # nats; the first is 3e-4
    norms = [[row["grad_norm"] for row in rows if row["split"] == "train"] for rows in (alone, both)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    two = json.loads((directory / "evaluation.json").read_text())
    assert two["kl"] == pytest.approx(one["kl"], rel=1e-3)
    assert two["rewards/accuracies"] == pytest.approx(one["rewards/accuracies"])
    assert two["selected_step"] == one["selected_step"]


def test_bf16_stays_near_fp32(tmp_path, tiny_model):
    given = own(tmp_path, tiny_model("llama"))
    exact, _ = run(tmp_path / "fp32", *given)
    rounded, _ = run(tmp_path / "bf16", *given, "precision=bf16")
    assert losses(rounded) == pytest.approx(losses(exact), abs=0.02)
    assert losses(rounded) != losses(exact)
    model, _ = models.load(str(tmp_path / "bf16" / "policy"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_sft_is_a_verb_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ})  # to which a run adds
    given = ["sft.steps=4", "data.demonstrations=32", "evaluation.prompts=10", "evaluation.log_samples=2", "threads=1"]
    directory = tmp_path / "sft" / "beta=0.1,seed=0"
    directory.mkdir(parents=True)
    OmegaConf.save(frozen(directory, *given, verb="sft"), directory / "config.yaml")
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # which a run that has ended hears no more
    former = {number: signal.getsignal(number) for number in numbers}
    assert executing.execute(directory) == 0
    for number, handler in former.items():
        signal.signal(number, handler)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert len(losses(rows)) == 4
    assert losses(rows)[-1] < losses(rows)[0]
    assert json.loads((directory / "evaluation.json").read_text())["steps"] == 4
    trained, _ = run(
        tmp_path / "next", *SMALL, f'policy.path="{directory / "policy"}"'
    )  # quoted, since it holds = and ,
    assert losses(trained)[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.long
def test_killed_again_and_again(tmp_path):
    """A real run, killed at moments of chance: its rows, its policy and what is measured are those of a whole one."""
    for name in ("whole", "cut"):
        directory = tmp_path / name
        directory.mkdir()
        OmegaConf.save(frozen(directory, *SMALL, "steps=300", "checkpoint_every=1"), directory / "config.yaml")
    serve(["dpo.train"])
    reached, rng, log = set(), random.Random(0), tmp_path / "log.txt"

    def start(name: str) -> Fork:
        log.write_text("")
        return Fork(tmp_path / name, {**os.environ, "OMP_NUM_THREADS": "1"}, log)

    def end(name: str) -> None:
        process = start(name)
        while process.poll() is None:
            time.sleep(0.1)
        assert process.returncode == 0, log.read_text()

    def saved() -> set[str]:
        return {path.name for path in (tmp_path / "cut" / "checkpoint").glob("step-*")}

    end("whole")
    for kills in range(8):
        process = start("cut")
        while process.poll() is None and "self-check" not in log.read_text():
            time.sleep(0.01)
        while kills % 2 and saved() <= reached and process.poll() is None:  # every other time it gets a step further
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        while process.poll() is None:
            time.sleep(0.01)
        assert process.returncode == -signal.SIGKILL
        reached |= saved()
    assert len(reached) >= 4
    end("cut")
    rows = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    rows = [[json.loads(row) | {"items_per_second": 0} for row in kept] for kept in rows]
    assert rows[0] == rows[1]
    ends = [load_file(tmp_path / name / "policy" / "model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(one, ends[1][key]) for key, one in ends[0].items())
    measured = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("whole", "cut")]
    assert measured[0] | {"seconds": 0} == measured[1] | {"seconds": 0}


def test_sft_resumes_from_its_own_base_and_demonstrations_alone(tmp_path, monkeypatch):
    told: list[dict[str, str]] = []
    monkeypatch.setattr(sft, "fit", lambda *_, inputs, **__: told.append(inputs))
    model, tokenizer = models.load("world")
    config: Any = frozen(tmp_path / "run", *SMALL)
    rows = [([1, 20, 2], [21, 3]), ([1, 22, 2], [23, 3])]
    log: Any = None
    for items in (rows, rows, [rows[0], ([1, 22, 2], [24, 3])]):
        sft.train(model, tokenizer, items, sft_of(config), tmp_path, log)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    sft.train(model, tokenizer, rows, sft_of(config), tmp_path, log)
    assert told[0] == told[1]
    assert [{key for key in told[0] if one[key] != told[0][key]} for one in told[2:]] == [{"demonstrations"}, {"base"}]


def test_bad_pairs_stop_before_any_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("a model was loaded"))
    path = tmp_path / "pairs.jsonl"
    directory = tmp_path / "run"
    directory.mkdir()
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}\n')
    given = ["data=file", f"data.path={path}", "policy.path=somewhere"]
    with pytest.raises(ValueError, match="line 2: must have prompt, chosen and rejected; found no rejected"):
        train.run(frozen(directory, *given), directory)
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    with pytest.raises(ValueError, match="1 of 1 pairs are faulty"):
        train.run(frozen(directory, *given), directory)


@pytest.mark.parametrize("verb", ["train", "sft"])
def test_what_cannot_be_asked_stops_before_any_model_is_loaded(tmp_path, tiny_model, monkeypatch, verb):
    """Plain-text pairs never see the template, which prints the date; the instructions of the evaluation do."""
    tokenizer = models.load_tokenizer(tiny_model("qwen2"))
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    shutil.copytree(tiny_model("qwen2"), tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "asked.json").write_text('[{"instruction": "How are you?", "output": "Well."}]')
    directory, given = tmp_path / "run", own(tmp_path, str(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"prints today's date; set policy\.date"):
        (train if verb == "train" else sft).run(
            frozen(directory, *given, f"evaluation.instructions={tmp_path / 'asked.json'}"), directory
        )


@pytest.mark.parametrize("start", ["path", "base"])
def test_long_pairs_stop_before_any_model_is_loaded(tmp_path, tiny_model, monkeypatch, start):
    """And so before SFT, where that makes the policy: which responses are rejected matters to it in nothing else."""
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("a model was loaded"))
    directory, given = tmp_path / "run", own(tmp_path, tiny_model("llama"))
    directory.mkdir()
    given += ["policy.path=null", f"policy.base={tiny_model('llama')}"] if start == "base" else []
    with pytest.raises(ValueError, match="train pairs have more than 12 tokens") as error:
        train.run(frozen(directory, *given, "max_length=12"), directory)
    assert f"{tmp_path / 'pairs.jsonl'}, line " in str(error.value)
    with pytest.raises(ValueError, match="max_length must be at most the 2048 positions"):
        train.run(frozen(directory, *given, "max_length=2049"), directory)


@pytest.mark.parametrize(
    "kind,overrides,said",
    [
        ("gpt2", ["reference=other"], "must have the tokenizer of the policy"),
        ("llama", ["reference=other", "max_length=3000"], "max_length must be at most the 2048 positions of"),
        ("llama", ["reference=other_tokenizer", "reference.max_length=3000"], "reference.max_length must be at most"),
    ],
)
def test_a_reference_that_cannot_serve_stops_before_sft(tmp_path, tiny_model, monkeypatch, kind, overrides, said):
    monkeypatch.setattr(sft, "cached_policy", lambda *_: pytest.fail("SFT was begun"))
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    base = ["policy.path=null", f"policy.base={tiny_model('llama')}", f"reference.path={tiny_model(kind)}"]
    config = frozen(tmp_path / "run", *own(tmp_path, "x"), *base, *overrides)
    with pytest.raises(ValueError, match=said):
        train.run(config, tmp_path / "run")


@pytest.mark.parametrize(
    "given", [["reference=other", "reference.path={}"], ["judge=shorter", "evaluation.baseline={}"]]
)
@pytest.mark.parametrize(
    "file,change,said",
    [
        ("config.json", {"vocab_size": 200}, r"must embed the \d+ tokens of its tokenizer, found 200 embeddings"),
        ("tokenizer_config.json", {"eos_token": None}, "must have an EOS token"),
    ],
)
def test_a_second_model_that_cannot_be_read_stops_before_the_first(
    tmp_path, tiny_model, monkeypatch, given, file, change, said
):
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    other = copy(tiny_model("llama"), tmp_path / "model")
    edit(other / file, **change)
    given = [one.format(other) for one in given]
    for verb, command in (("train", train), ("evaluate", evaluate)):
        if verb == "train" or "judge=shorter" in given:
            config = frozen(tmp_path / "run", *own(tmp_path, tiny_model("llama")), *given, verb=verb)
            with pytest.raises(ValueError, match=said):
                command.run(config, tmp_path / "run")


@pytest.mark.parametrize("split,advice", [("train", "The last checkpoint"), ("validation", "Training diverged, if")])
def test_a_loss_that_is_not_finite_names_its_pair(tmp_path, tiny_model, monkeypatch, split, advice):
    def spoilt(model, batch):
        tokens = token_logps(model, batch)
        if torch.is_grad_enabled() is not (split == "train"):
            return tokens
        bad = (batch.index == 5).repeat(2)  # chosen and rejected
        return tokens.masked_fill(bad[batch.sequence_ids], math.nan)

    monkeypatch.setattr(train, "token_logps", spoilt)
    given = own(tmp_path, tiny_model("llama"))
    pair = instantiate(frozen(tmp_path / "run", *given).data).preferences[split][5]
    assert pair.source.startswith(f"{tmp_path / 'pairs.jsonl'}, line ")
    with pytest.raises(RuntimeError, match="must be finite") as error:
        run(tmp_path / "run", *given)
    assert f"from\n  {pair.source}\n{advice}" in str(error.value)
