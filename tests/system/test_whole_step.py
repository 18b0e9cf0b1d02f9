"""A loss that sees all pairs of the optimizer step, against all pairs at once in float64, on one process and on two."""

import json
import math
import os
import signal
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from loops import Run
from ranks import together
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForCausalLM
from whole_runs import frozen as frozen_config
from whole_runs import own

from dpo import evaluate
from dpo import train as dpo_train
from dpo.data.batches import Batches, Pair, collate_pairs, size
from dpo.data.records import Preference
from dpo.losses import Loss, PairLogps, dpo, whole_step
from dpo.losses.pairs import asked_by, frozen, sees_whole_step, try_out, unbound
from dpo.policy.logps import sequence_logps
from dpo.sweep import rehearse
from dpo.sweep.signature import PLUGINS, check_signature, instantiate
from dpo.train import step_of
from dpo.training import distributed
from dpo.training.log import Log
from dpo.training.loop import Stopped, WholeStep, fit
from dpo.training.optim import schedule

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
WHOLE = distributed.ParallelLayout(group=None, offload=False, precision="fp32")
CPU = torch.device("cpu")
BETA, LR, STEPS, WINDOW = 0.3, 0.02, 5, 14  # 33 pairs are windows of 14, 14 and 5
LAYOUTS = {1: 10_000, 4: 75, 14: 1}  # micro-batches of the first step of one process -> micro_batch_tokens
LOSSES = ("log_mean_exp", "running", "whole_dpo")


# Two losses, and DPO on their road


@whole_step
def log_mean_exp(pair: PairLogps, beta: float, temperature: float) -> Loss:
    """Dr. DPO (2407.07880): -t log mean exp(-l / t) of the DPO losses l of all pairs."""
    each = dpo(pair, beta, label_smoothing=0.0)
    total = -temperature * ((-each.losses / temperature).logsumexp(0) - math.log(len(each.losses)))
    return replace(each, losses=total.expand(len(each.losses)))


@whole_step
class Running(nn.Module):
    """DPO of margins less their running mean, in units of their spread over the step."""

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, pair: PairLogps, beta: float) -> Loss:
        self.calls += 1  # in evaluation, too
        if self.training:
            self.mean = self.mean.lerp(pair.margins.detach().mean(), 1 - self.momentum)
        scaled = beta * (pair.margins - self.mean) / (1 + pair.margins.std())
        return replace(dpo(pair, beta, label_smoothing=0.0), losses=-logsigmoid(scaled))


@whole_step
def whole_dpo(pair: PairLogps, beta: float) -> Loss:
    return dpo(pair, beta, label_smoothing=0.0)


def loss_of(name):
    options = {"log_mean_exp": {"temperature": 0.5}, "whole_dpo": {}, "dpo": {"label_smoothing": 0.0}}
    functions = {"log_mean_exp": log_mean_exp, "whole_dpo": whole_dpo, "dpo": dpo}
    return (
        partial(Running(0.8), beta=BETA) if name == "running" else partial(functions[name], beta=BETA, **options[name])
    )


# What is trained: a tiny model on random pairs


def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 41, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False))


def pairs(number=33, seed=1, labels=False):
    """labels: with one, of which a third are desirable."""
    rng = torch.Generator().manual_seed(seed)

    def some(least, most):
        return torch.randint(3, 41, (int(torch.randint(least, most, (), generator=rng)),), generator=rng).tolist()

    texts = [Preference("", "", "", label=row % 3 == 0) if labels else None for row in range(number)]
    return [Pair(some(2, 9), some(1, 12), some(1, 12), text) for text in texts]


class Table:
    """A reference of fixed numbers, that counts how often a row is read."""

    def __init__(self, number=33):
        self.table, self.read = -20 * torch.rand(number, 2, generator=torch.Generator().manual_seed(2)), Counter()

    def logps(self, batch, split):
        self.read.update(batch.index[batch.valid].tolist())
        return self.table[batch.index].T.reshape(-1)


def batches(items, window, tokens, seed=0):
    return Batches(
        items,
        partial(collate_pairs, pad_id=0, packed=False),
        size=lambda pair: size(pair.prompt_responses),
        batch_size=window,
        micro_batch_tokens=tokens,
        seed=seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


def train(directory, name, micro_batches=4, steps=STEPS, reference=None, loss=None, evaluate=None, disturb=None):
    """A run of `fit`, resumed if there is a checkpoint; returns its model, loss and reference."""
    directory.mkdir(parents=True, exist_ok=True)
    model = distributed.shard(llama(), WHOLE, CPU)
    loss, reference = loss or loss_of(name), reference or Table()
    optim = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    step = step_of(model, reference, loss, "train")
    with Log(directory) as log:
        fit(
            model,
            batches(pairs(labels="labels" in asked_by(loss)), WINDOW, LAYOUTS[micro_batches], seed=5),
            disturb(step) if disturb else step,
            optim,
            schedule(optim, "constant", 0, STEPS),
            steps=steps,
            max_grad_norm=2.0,
            precision="fp32",
            log=log,
            directory=directory / "checkpoint",
            checkpoint_every=3,
            extra=unbound(loss) if isinstance(unbound(loss), nn.Module) else None,
            evaluate=evaluate and partial(evaluate, model, reference, loss),
            evaluate_every=1,
        )
    return model, loss, reference


def rows_of(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "items_per_second"} for row in rows]


def weights(model):
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: value.clone() for name, value in state.items()}


def brute_force(loss):
    """In float64, with all pairs of a step in one batch and no passes: rows, weights and the loss."""
    model, reference = llama().double(), Table()
    if isinstance(unbound(loss), nn.Module):
        unbound(loss).double()
    optim = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    rows, windows = [], batches(pairs(labels="labels" in asked_by(loss)), WINDOW, 10_000, seed=5)
    for step in range(STEPS):
        [batch], total = windows.at(step)
        assert total == len(batch.index) == (14, 14, 5)[step % 3]
        (chosen, rejected), lengths = (values.chunk(2) for values in sequence_logps(model, batch))
        pair = PairLogps(chosen, rejected, *reference.table.double()[batch.index].T, *lengths, row_ids=batch.index)
        pair = replace(pair, desirable=batch.desirable)
        result = loss(pair)
        found = result.losses.mean()
        optim.zero_grad()
        found.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optim.step()
        row = {"loss": found, "grad_norm": norm}
        row |= {name: figure.double().mean() for name, figure in result.figures.items()}
        if (good := batch.desirable) is None:
            row |= {"logratios/margins": pair.margins.mean(), "rewards/chosen": result.chosen_rewards.mean()}
            row |= {"lengths/chosen": lengths[0].double().mean(), "logps/rejected": rejected.mean()}
        else:  # means over the rows of a label
            row |= {"rewards/chosen": result.chosen_rewards[good].mean(), "logps/rejected": chosen[~good].mean()}
            row |= {"lengths/chosen": lengths[0][good].double().mean()}
            row["logratios/margins"] = pair.chosen_logratios[good].mean() - pair.chosen_logratios[~good].mean()
        rows.append({key: value.item() for key, value in row.items()})
    return rows, model.state_dict(), loss


# What the two processes do


def told_by(function, *given, **options):
    try:
        function(*given, **options)
    except RuntimeError as error:
        return str(error)
    return "finished"


def spoilt(row):
    reference = Table()
    reference.table[row, 1] = math.nan
    return reference


def two_processes(directory):
    distributed.join("cpu")
    told = {}
    for name in LOSSES:
        for number in LAYOUTS:
            model, loss, reference = train(directory / f"two-{name}-{number}", name, number)
            state = weights(model)
            if distributed.is_main():
                torch.save(state, directory / f"two-{name}-{number}.pt")
            if name == "running":
                told[f"mean-{number}"] = unbound(loss).mean.item()
            told[f"read-{name}-{number}"] = sum(reference.read.values())
    train(directory / "two-dpo", "dpo", 4)
    train(directory / "two-resumed", "running", 4, steps=3)
    told["resumed"] = unbound(train(directory / "two-resumed", "running", 4)[1]).calls.item()
    told["spoilt"] = told_by(train, directory / "spoilt", "log_mean_exp", 4, reference=spoilt(11))
    told["validation"] = validated(llama(), partial(Running(0.8), beta=BETA), 75)
    distributed.leave()
    (directory / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(told))


def validated(model, loss, tokens):
    with torch.no_grad():
        step = step_of(model, Table(), frozen(loss), "validation")
        return evaluate.on_pairs(step, batches(pairs(), 33, tokens), CPU)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """`one[name, micro_batches]`: directory, model, loss and reference of a run of one process."""
    folder = tmp_path_factory.mktemp("one")
    found = {}
    for name in (*LOSSES, "dpo"):
        for number in LAYOUTS:
            found[name, number] = folder / f"{name}-{number}", *train(folder / f"{name}-{number}", name, number)
    return found


@pytest.fixture(scope="module")
def expected():
    return {name: brute_force(loss_of(name)) for name in LOSSES}


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.long)])
def two(tmp_path_factory, request):
    directory = tmp_path_factory.mktemp("two")
    together(two_processes, directory, processes=request.param)
    return directory, [json.loads((directory / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def close(directory, state, expected):
    rows, exact, _ = expected
    found = rows_of(directory)
    assert len(found) == len(rows) == STEPS
    for ours, theirs in zip(found, rows, strict=True):
        assert {key: ours[key] for key in theirs} == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert all(torch.allclose(state[key], exact[key].float(), atol=1e-5) for key in exact)


@pytest.mark.parametrize("number", LAYOUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_one_process_is_all_pairs_at_once(one, expected, name, number):
    directory, model, loss, _ = one[name, number]
    assert len(batches(pairs(), WINDOW, LAYOUTS[number], seed=5).at(0)[0]) == number
    close(directory, weights(model), expected[name])
    if name == "running":
        assert unbound(loss).mean.item() == pytest.approx(unbound(expected[name][2]).mean.item(), rel=1e-5)
        assert unbound(loss).calls == STEPS  # once a step, whatever its micro-batches


@pytest.mark.parametrize("number", LAYOUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_are_all_pairs_at_once(two, expected, name, number):
    directory, told = two
    close(directory / f"two-{name}-{number}", torch.load(directory / f"two-{name}-{number}.pt"), expected[name])
    if name == "running":
        assert told[0][f"mean-{number}"] == told[1][f"mean-{number}"]
        mean = unbound(expected[name][2]).mean.item()
        assert told[0][f"mean-{number}"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("number", LAYOUTS)
def test_dpo_on_this_road_is_dpo(one, number):
    """To the bit where there are several micro-batches: the same products in the same order."""
    (mine, model, *_), (theirs, other, *_) = one["whole_dpo", number], one["dpo", number]
    assert rows_of(mine) == rows_of(theirs)
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(model).items())


def test_dpo_of_two_processes_on_this_road_is_dpo(two):
    directory, _ = two
    assert rows_of(directory / "two-whole_dpo-4") == rows_of(directory / "two-dpo")


def test_a_reference_is_read_once_a_step(one, two):
    for name in LOSSES:
        for number in LAYOUTS:
            assert one[name, number][3].read.total() == 14 + 14 + 5 + 14 + 14
            assert sum(told[f"read-{name}-{number}"] for told in two[1]) == 61


def counted(step, seen):
    def values(batch):
        seen.append(("values", torch.is_grad_enabled()))
        return step.values(batch)

    def outputs(batch):
        seen.append(("outputs", torch.is_grad_enabled()))
        return step.outputs(batch)

    return WholeStep(values, outputs, step.losses)


def test_one_micro_batch_is_one_pass_and_the_first_of_two_keeps_no_graph(tmp_path):
    seen = []
    train(tmp_path / "one", "log_mean_exp", 1, steps=1, disturb=lambda step: counted(step, seen))
    assert seen == [("values", True)]
    seen.clear()
    train(tmp_path / "four", "log_mean_exp", 4, steps=1, disturb=lambda step: counted(step, seen))
    assert seen == [("values", False)] * 4 + [("outputs", True)] * 4


def test_pairs_come_in_the_order_of_their_rows(tmp_path):
    seen = []

    @whole_step
    def noted(pair):
        seen.append(pair.reference_chosen_logps.tolist())
        return whole_dpo(pair, BETA)

    train(tmp_path / "run", "noted", 4, loss=noted)
    windows = batches(pairs(), WINDOW, 10_000, seed=5)
    for step, found in enumerate(seen):
        assert found == Table().table[windows.at(step)[0][0].index.sort().values, 0].tolist()
        assert all(not torch.equal(torch.tensor(found), torch.tensor(others)) for others in seen[:step])


def test_stopped_and_resumed_is_the_whole_run(one, tmp_path):
    whole, model, loss, _ = one["running", 4]
    train(tmp_path / "run", "running", 4, steps=3)
    again, resumed, _ = train(tmp_path / "run", "running", 4)
    assert rows_of(tmp_path / "run") == rows_of(whole)
    assert all(torch.equal(value, weights(model)[name]) for name, value in weights(again).items())
    assert unbound(resumed).state_dict() == unbound(loss).state_dict()
    assert unbound(loss).mean != 0


def test_two_processes_resume_alike(two):
    directory, told = two
    assert rows_of(directory / "two-resumed") == rows_of(directory / "two-running-4")
    assert [one["resumed"] for one in told] == [STEPS] * 2


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("number", LAYOUTS)
def test_the_pair_behind_a_loss_that_is_not_finite_is_named(tmp_path, name, number):
    windows = batches(pairs(), WINDOW, 10_000, seed=5)
    step = next(step for step in range(3) if 11 in windows.at(step)[0][0].index)
    said = told_by(train, tmp_path / "run", name, number, reference=spoilt(11))
    assert f"optimizer step {step + 1} must be finite, got nan" in said
    assert "from\n  row 11, counted from 0\nThe last" in said


def test_two_processes_name_the_pair(two):
    assert two[1][0]["spoilt"] == two[1][1]["spoilt"]
    assert "must be finite, got nan and norm nan from\n  row 11, counted from 0\nThe last" in two[1][0]["spoilt"]


def test_where_no_pair_alone_is_at_fault_all_are_named(tmp_path):
    @whole_step
    def rooted(pair):
        return Loss((pair.margins - 1e9).sqrt(), pair.margins.detach(), pair.margins.detach())

    said = told_by(train, tmp_path / "run", "rooted", 4, loss=rooted)
    assert said.count("\n  row ") == 14


@pytest.mark.parametrize("tokens", LAYOUTS.values())
def test_validation_sees_all_held_out_pairs_and_leaves_the_state_alone(two, tokens):
    model, loss = llama(), Running(0.8)
    loss.mean += 3
    [batch], _ = batches(pairs(), 33, 10_000).at(0)
    with torch.no_grad():
        logps, lengths = sequence_logps(model.double(), batch)
    chosen, rejected = Table().table.double()[batch.index].T
    pair = PairLogps(*logps.chunk(2), chosen, rejected, *lengths.chunk(2), row_ids=batch.index)
    for mean in (3.0, 0.0):
        loss.mean.fill_(mean)
        found = validated(llama(), partial(loss, beta=BETA), tokens)
        scaled = BETA * (pair.margins - mean) / (1 + pair.margins.std())
        assert found["loss"] == pytest.approx(-logsigmoid(scaled).mean().item(), rel=1e-5)
        assert found["rewards/margins"] == pytest.approx(BETA * pair.margins.mean().item(), rel=1e-5)
        assert (loss.mean, loss.calls, loss.training) == (mean, 0, True)
    assert all(told["validation"] == pytest.approx(found, rel=1e-5, abs=1e-6) for told in two[1])


def test_validation_changes_no_training(one, tmp_path):
    def look(model, reference, loss, done):
        step = step_of(model, reference, frozen(loss), "validation")
        evaluate.on_pairs(step, batches(pairs(), 33, 75), CPU)

    model, loss, _ = train(tmp_path / "run", "running", 4, evaluate=look)
    directory, other, untouched, _ = one["running", 4]
    assert rows_of(tmp_path / "run") == rows_of(directory)
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(model).items())
    assert unbound(loss).state_dict() == unbound(untouched).state_dict()


def test_validation_names_the_pair():
    step, held_out = step_of(llama(), spoilt(11), loss_of("log_mean_exp"), "validation"), batches(pairs(), 33, 75)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"validation loss .*got nan from\n  row 11, counted.*\nTr"):
        evaluate.on_pairs(step, held_out, CPU)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("micro_batch_size", [8, 3, 1])
def test_both_passes_draw_the_same_random_numbers(tmp_path, micro_batch_size, precision):
    """A regression with dropout, and fillers; on this road it is itself, to the bit, and draws no more."""
    plain, ours = (Run(tmp_path / name, micro_batch_size=micro_batch_size) for name in ("plain", "ours"))

    def errors(batch):
        return {"errors": ours.model(ours.inputs[batch.index]).squeeze(1).float() - ours.targets[batch.index]}

    def squares(values):
        return values["errors"].square(), {"absolute": values["errors"].abs()}

    plain.fit(precision=precision)
    ours.fit(precision=precision, step=WholeStep(errors, errors, squares))
    assert ours.rows == plain.rows
    for mine, theirs in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


# What marks a loss, and what a plan tries


def test_the_mark_is_seen_with_options_bound_or_not():
    for loss in (log_mean_exp, partial(log_mean_exp, temperature=1.0), Running(0.5), partial(Running(0.5), beta=1.0)):
        assert sees_whole_step(loss)
    assert not any(map(sees_whole_step, (dpo, partial(dpo, label_smoothing=0.0), nn.Identity())))


def test_a_copy_is_frozen():
    bound = partial(Running(0.5), beta=1.0)
    for loss in (bound, bound.func):
        copied = frozen(loss)
        assert not unbound(copied).training
        unbound(copied).mean += 1
        assert (bound.func.mean, bound.func.training) == (0, True)
    assert frozen(partial(dpo, label_smoothing=0.1)).keywords == {"label_smoothing": 0.1}


def test_a_loss_that_sees_other_pairs_must_be_marked():
    def coupled(pair):
        return log_mean_exp(pair, 0.1, temperature=1.0)

    with pytest.raises(ValueError, match=r"a loss must give each pair what it has alone.*whole_step"):
        try_out(coupled)
    try_out(whole_step(coupled))


def test_a_trial_is_on_several_pairs_and_leaves_no_trace():
    loss = Running(0.5)  # the spread of one pair is no number
    try_out(partial(loss, beta=0.2))
    assert (loss.mean, loss.calls) == (0, 0)

    @whole_step
    def broken(pair):
        return replace(whole_dpo(pair, 0.1), losses=pair.margins / (pair.margins.std() - pair.margins.std()))

    with pytest.raises(ValueError, match="must be finite"):
        try_out(broken)


@pytest.fixture
def node(monkeypatch):
    monkeypatch.setenv(PLUGINS, "test_whole_step")
    return {"_target_": "test_whole_step.Running", "_partial_": True, "beta": 0.2, "momentum": 0.5}


def test_a_config_names_a_module_as_it_names_a_function(node):
    assert check_signature("loss", node) == []
    assert "loss.gain is not an option" in check_signature("loss", node | {"gain": 1.0})[0]
    assert "loss.momentum must be float" in check_signature("loss", node | {"momentum": "x"})[0]
    assert "loss.pair is not an option" in check_signature("loss", node | {"pair": 1})[0]
    without = {key: value for key, value in node.items() if key != "momentum"}
    assert "loss.momentum must be given" in check_signature("loss", without)[0]
    bound = instantiate(node)
    assert bound.keywords == {"beta": 0.2}
    assert bound.func.momentum == 0.5
    assert sees_whole_step(bound)
    assert instantiate(node).func is not bound.func
    rehearse._loss(node)


def asked(directory, model, *more):
    """A whole run with a loss of a module, and a reference that follows the policy."""
    named = ["loss._target_=test_whole_step.Running", "+loss.momentum=0.5", "~loss.label_smoothing", "beta=0.5"]
    moving = ["reference=ema", "reference._target_=dpo.references.EMA", "reference.every=2", "reference.alpha=0.4"]
    given = [*own(directory.parent, model), *named, *moving, "evaluation.prompts=2", "evaluation.log_samples=0"]
    return frozen_config(directory, *given, "checkpoint_every=1", "evaluate_every=1", "steps=4", *more)


def dealt_out_in_every_way(tmp_path, config_of, monkeypatch):
    """Rows of whole runs of `config_of(directory, *overrides)`, by name: as it is, in small micro-batches, validated
    rarely; and one that is stopped and resumed, which must be the whole one.
    """
    monkeypatch.setattr(evaluate, "measure", lambda *_: ([], {}))
    write, rows, ends = Log.write, {}, {}

    def stopping(log, step, split, metrics):
        write(log, step, split, metrics)
        if (step, split) == (3, "train"):
            os.kill(os.getpid(), signal.SIGUSR1)

    for name, more in (
        ("whole", []),
        ("cut", []),
        ("small", ["micro_batch_tokens=120"]),
        ("rare", ["evaluate_every=0"]),
    ):
        directory = tmp_path / name
        directory.mkdir()
        config = config_of(directory, *more)
        if name == "cut":
            monkeypatch.setattr(Log, "write", stopping)
            with pytest.raises(Stopped, match="stopped at step 3 of 4"):
                dpo_train.run(config, directory)
            monkeypatch.setattr(Log, "write", write)
        dpo_train.run(config, directory)
        rows[name], ends[name] = rows_of(directory), load_file(directory / "policy" / "model.safetensors")
    assert rows["cut"] == rows["whole"]
    assert all(torch.equal(value, ends["whole"][key]) for key, value in ends["cut"].items())
    return rows


def test_a_whole_run_with_a_loss_that_has_state(tmp_path, tiny_model, monkeypatch):
    """Stopped and resumed, in one micro-batch or several, often validated or not: what reference and loss hold is in
    the checkpoint, and moves in training alone.
    """
    monkeypatch.setenv(PLUGINS, "test_whole_step")
    rows = dealt_out_in_every_way(tmp_path, lambda at, *more: asked(at, tiny_model("llama"), *more), monkeypatch)
    assert [(row["split"], row["step"]) for row in rows["whole"]][:3] == [
        ("validation", 0),
        ("train", 1),
        ("validation", 1),
    ]
    trained = [[row for row in rows[name] if row["split"] == "train"] for name in ("rare", "whole")]
    assert trained[0] == trained[1]
    for mine, theirs in zip(rows["small"], rows["whole"], strict=True):
        assert mine.pop("split") == theirs["split"]
        assert mine == pytest.approx({key: theirs[key] for key in mine}, rel=2e-4, abs=2e-5)
