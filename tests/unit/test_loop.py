import contextlib
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from loops import Run, Windows
from torch import nn

from dpo.training import checkpoint, loop
from dpo.training.loop import Stopped, autocast
from dpo.training.optim import optimizer

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]


class Crash(Exception):
    pass


def weights(run):
    return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


@pytest.mark.parametrize("micro_batch_size", [8, 4, 3, 1])
def test_one_step_by_hand(tmp_path, micro_batch_size):
    run, expected = Run(tmp_path, micro_batch_size=micro_batch_size), Run(tmp_path / "other")
    run.model.eval()  # no dropout
    expected.model.eval()
    order = np.random.default_rng(0).permutation(22)[:8]
    errors = expected.model(expected.inputs[order]).squeeze(1) - expected.targets[order]
    errors.square().mean().backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in expected.model.parameters()))
    run.fit(steps=1, max_grad_norm=0.5)
    ours = torch.cat([p.grad.flatten() for p in run.model.parameters()])
    theirs = torch.cat([p.grad.flatten() for p in expected.model.parameters()])
    assert torch.allclose(ours, theirs * 0.5 / norm, atol=1e-6)
    row = run.rows[0]
    assert row["step"] == 1
    assert row["epoch"] == pytest.approx(1 / 3)
    assert row["loss"] == pytest.approx(errors.square().mean().item(), rel=1e-6)
    assert row["absolute"] == pytest.approx(errors.abs().mean().item(), rel=1e-6)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert row["lr"] == pytest.approx(0.05 / 3)
    assert norm > 0.5


@pytest.mark.parametrize("micro_batch_size", [8, 3])
def test_five_steps_by_hand(tmp_path, micro_batch_size):
    """A linear regression in NumPy: AdamW with clipping, weight decay, warm-up and decay; unequal gradients."""
    run = Run(tmp_path, micro_batch_size=micro_batch_size)
    run.model = nn.Linear(4, 1, bias=False)
    run.optim = optimizer(run.model, "adamw", 0.05, [0.6, 0.8], 0.3)
    inputs, targets = run.inputs.double().numpy(), run.targets.double().numpy()
    w = run.model.weight[0].detach().double().numpy().copy()
    first, second, rows, path = np.zeros(4), np.zeros(4), [], []
    for done, rate in enumerate((1 / 3, 2 / 3, 1, 2 / 3, 1 / 3)):
        order = np.random.default_rng(done // 3).permutation(22)[done % 3 * 8 :][:8]
        errors = inputs[order] @ w - targets[order]
        gradient = 2 * errors @ inputs[order] / len(order)
        norm = np.sqrt((gradient**2).sum())
        rows.append({"loss": (errors**2).mean(), "absolute": np.abs(errors).mean(), "grad_norm": norm})
        gradient = gradient * min(1, 1.1 / norm)
        first, second = 0.6 * first + 0.4 * gradient, 0.8 * second + 0.2 * gradient**2
        root = np.sqrt(second / (1 - 0.8 ** (done + 1)))
        w = w - 0.05 * rate * (0.3 * w + first / (1 - 0.6 ** (done + 1)) / (root + 1e-8))
        path.append(w)
    norms = [row["grad_norm"] for row in rows]
    assert min(norms) < 1.1 < max(norms)  # some are clipped, and some are not
    run.fit(steps=5, max_grad_norm=1.1, checkpoint_every=0)
    assert run.model.weight[0].tolist() == pytest.approx(path[-1], abs=1e-6)
    assert [{name: row[name] for name in rows[0]} for row in run.rows] == [pytest.approx(row, rel=1e-5) for row in rows]


def test_micro_batches_change_nothing(tmp_path):
    runs = [Run(tmp_path / str(size), micro_batch_size=size) for size in (8, 4, 3, 1)]
    for run in runs:
        run.model.eval()  # no dropout
        run.fit()
        for row, first in zip(run.rows, runs[0].rows, strict=True):
            assert row.pop("split") == "train"
            assert row == pytest.approx({key: first[key] for key in row}, rel=1e-5, abs=1e-6)
        assert torch.allclose(weights(run), weights(runs[0]), atol=1e-5)


def test_rows(run):
    run.fit()
    assert [row["step"] for row in run.rows] == list(range(1, 11))
    assert [row["epoch"] for row in run.rows] == pytest.approx([step / 3 for step in range(1, 11)])
    rates = [1 / 3, 2 / 3, *(1 - passed / 8 for passed in range(8))]
    assert [row["lr"] for row in run.rows] == pytest.approx([0.05 * rate for rate in rates])


def test_items_per_second_are_real_items(tmp_path, monkeypatch):
    """Whatever their micro-batches, by a clock that goes half a second on when it is read."""
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=itertools.count(0, 0.5).__next__))
    run = Run(tmp_path, micro_batch_size=3)
    run.fit(steps=4)
    rows = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [row["items_per_second"] for row in rows] == [16, 16, 12, 16]


def test_evaluations(run):
    seen = []
    run.fit(evaluate=seen.append, evaluate_every=4)
    assert seen == [0, 4, 8, 10]
    seen.clear()
    run.fit(evaluate=seen.append, evaluate_every=4)
    assert seen == []
    other = Run(run.directory / "other")
    other.fit(evaluate=seen.append)
    assert seen == [0, 10]


def test_so_many_checkpoints_are_kept(run):
    """At their interval, which is not that of evaluations, and after the last step."""
    run.fit(checkpoint_every=3, checkpoints_kept=2, evaluate=run.evaluate, evaluate_every=2)
    assert {path.name for path in (run.directory / "checkpoint").iterdir()} == {"step-9", "step-10"}


def test_evaluation_disturbs_nothing(run, tmp_path):
    run.model[3].eval()  # modes are put back one by one
    run.fit(evaluate=run.evaluate, evaluate_every=3)
    assert [module.training for module in run.model] == [True, True, True, False]
    other = Run(tmp_path / "other")
    other.fit()
    assert torch.equal(weights(run), weights(other))
    assert [row for row in run.rows if row["split"] == "train"] == other.rows


def test_finished_run_does_nothing_again(run):
    run.fit()
    before, rows = weights(run), run.rows
    again = Run(run.directory, seed=5)
    again.fit()
    assert again.steps_begun == 0
    assert torch.equal(weights(again), before)
    assert again.rows == rows


def test_without_checkpoints_the_last_step_is_saved(run):
    def step(batch):
        assert not (run.directory / "checkpoint").exists()
        return run.step(batch)

    run.fit(step=step, checkpoint_every=0)
    assert run.saved == "step-10"


@pytest.mark.parametrize("crash_at", [2, 5, 8, 10])
def test_resumed_is_bit_equal(tmp_path, crash_at):
    whole, run = Run(tmp_path / "whole"), Run(tmp_path / "run")
    options = {"evaluate_every": 2, "checkpoint_every": 4}
    whole.fit(evaluate=whole.evaluate, **options)

    def crash(batch):
        if run.steps_begun == crash_at - 1:
            raise Crash
        return run.step(batch)

    with pytest.raises(Crash):
        run.fit(step=crash, evaluate=run.evaluate, **options)
    resumed = Run(tmp_path / "run", seed=0 if crash_at < 5 else 3)
    resumed.fit(evaluate=resumed.evaluate, **options)
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.rows == whole.rows
    assert resumed.steps_begun == 10 - (crash_at - 1) // 4 * 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_stops_after_the_step(run, tmp_path, number):
    whole = Run(tmp_path / "whole")
    whole.fit(evaluate=whole.evaluate, evaluate_every=3)

    def step(batch):
        if run.steps_begun == 5:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # torchrun and Slurm may both send it
        return run.step(batch)

    former = signal.getsignal(number)
    with pytest.raises(Stopped, match="stopped at step 6 of 10; the same command resumes"):
        run.fit(step=step, evaluate=run.evaluate, evaluate_every=3, checkpoint_every=0)
    assert signal.getsignal(number) is former
    assert run.saved == "step-6"
    assert [row["step"] for row in run.rows if row["split"] == "validation"] == [0, 3]  # 6 is still to come
    crashed = Run(tmp_path, seed=7)

    def crash(batch):
        raise Crash

    with pytest.raises(Crash):  # after the evaluation of step 6, before another checkpoint
        crashed.fit(step=crash, evaluate=crashed.evaluate, evaluate_every=3)
    resumed = Run(tmp_path, seed=8)
    resumed.fit(evaluate=resumed.evaluate, evaluate_every=3)
    assert resumed.rows == whole.rows
    assert torch.equal(weights(resumed), weights(whole))


def test_signal_during_the_last_evaluation(run):
    """The evaluation is not cut short, and what trained is kept, though checkpoints are off."""

    def evaluate(done):
        run.evaluate(done)
        if done == 10:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped, match="stopped at step 10 of 10"):
        run.fit(evaluate=evaluate, checkpoint_every=0)
    assert run.saved == "step-10"
    run.fit(evaluate=lambda done: pytest.fail("evaluated again"), checkpoint_every=0)
    assert run.steps_begun == 10


def test_runs_beside_the_main_thread(run):
    failures = []

    def work():
        try:
            run.fit()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []
    assert run.saved == "step-10"


SCRIPT = """
import sys, time
from pathlib import Path
from test_loop import FORTY, Run, Stopped
torch = sys.modules["torch"]
torch.set_num_threads(1)
run = Run(Path(sys.argv[1]))
def held(batch):  # in a step, until it may go on
    while run.steps_begun + 1 == int(sys.argv[2]) and not (run.directory / "go").exists():
        (run.directory / "here").touch()
        time.sleep(0.01)
    return run.step(batch)
try:
    run.fit(step=held, evaluate=run.evaluate, **FORTY)
except Stopped as stopped:
    print(stopped)
    sys.exit(75)
torch.save(run.model.state_dict(), run.directory / "weights.pt")
"""
FORTY = {"steps": 40, "checkpoint_every": 15, "evaluate_every": 7}


def start(directory, held_in):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT / 'tests/unit'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(directory), str(held_in)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.long
def test_a_process_is_ended_and_started_again(tmp_path):
    """Killed, then told to stop: rows and weights are those of a run that nobody disturbed."""
    whole, cut = Run(tmp_path / "whole"), Run(tmp_path / "cut")
    whole.fit(evaluate=whole.evaluate, **FORTY)
    # signal, the step in which it comes, and how many steps of this process that is
    for number, step, own in ((signal.SIGKILL, 20, 20), (signal.SIGTERM, 30, 15)):
        process = start(cut.directory, own)
        saved = cut.directory / "checkpoint" / "step-15"  # written beside training
        while not (saved.exists() and (cut.directory / "here").exists()):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        (cut.directory / "go").touch()
        said, _ = process.communicate(timeout=600)
        for file in ("here", "go"):
            (cut.directory / file).unlink()
        assert process.returncode == (75 if number == signal.SIGTERM else -number)
        assert ("resumes at step 15 of 40" in said) == (f"stopped at step {step} of 40" in said) == (step == 30)
    assert cut.saved == "step-30"
    last = start(cut.directory, 0)
    said, _ = last.communicate(timeout=600)
    assert last.returncode == 0
    assert "training: resumes at step 30 of 40" in said
    assert cut.rows == whole.rows
    end = torch.load(cut.directory / "weights.pt")
    assert all(torch.equal(weight, end[name]) for name, weight in whole.model.state_dict().items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_names_its_rows(tmp_path, value):
    run = Run(tmp_path, micro_batch_size=3)
    run.targets[[4, 17]] = value
    first = [sorted({4, 17} & set(Windows().at(step)[0][0].index.tolist())) for step in range(3)]
    faulty = next(step for step in range(3) if first[step])
    before = []

    def step(batch):
        before.append(weights(run))
        return run.step(batch)

    with pytest.raises(RuntimeError, match="must be finite") as raised:
        run.fit(step=step, checkpoint_every=1)
    assert f"optimizer step {faulty + 1} " in str(raised.value)
    assert f"from\n{''.join(f'  item {row}{chr(10)}' for row in first[faulty])}The last" in str(raised.value)
    assert torch.equal(weights(run), before[-1])
    assert not faulty or run.saved == f"step-{faulty}"


def test_gradient_that_is_not_finite_is_refused(run):
    def step(batch):
        losses, metrics = run.step(batch)
        return losses + 0 * (losses - losses.detach()).sqrt(), metrics  # the slope of a root at 0

    before = weights(run)
    with pytest.raises(RuntimeError, match=r"norm nan from\n  item"):
        run.fit(step=step)
    assert torch.equal(weights(run), before)


def test_a_step_that_diverges_is_not_saved(run):
    """The loss before it was finite, and from a checkpoint after it every step would be refused."""
    run.fit(steps=3)

    def diverge(*_):
        for weight in run.model.parameters():
            weight.data.fill_(math.inf)

    run.optim.register_step_post_hook(diverge)
    with pytest.raises(RuntimeError, match=r"weights after step 4 must be finite.*the one of step 3 is intact"):
        run.fit(steps=4)
    assert run.saved == "step-3"


def test_metric_that_is_not_finite_is_null(run):
    def step(batch):
        losses, _ = run.step(batch)
        return losses, {"odd": losses / 0}

    run.fit(steps=1, step=step)
    assert run.rows[0]["odd"] is None


def test_full_disk_stops_the_run_and_the_command_resumes(run, monkeypatch):
    write = checkpoint.HuggingFaceStorageWriter.write_data

    def full(writer, *rest):
        if "step-8" in str(writer.path):
            raise OSError(28, "No space left on device")
        return write(writer, *rest)

    monkeypatch.setattr(checkpoint.HuggingFaceStorageWriter, "write_data", full)
    with pytest.raises(RuntimeError, match=r"could not save step 8.*No space.*step 4 is intact"):
        run.fit()
    assert [path.name for path in (run.directory / "checkpoint").iterdir()] == ["step-4"]
    monkeypatch.undo()
    resumed = Run(run.directory)
    resumed.fit()
    assert resumed.steps_begun == 6
    assert [row["step"] for row in resumed.rows] == list(range(1, 11))


def test_bf16_is_autocast_with_float32_weights(run):
    dtypes = set()

    def step(batch):
        dtypes.add(run.model[0](run.inputs).dtype)
        return run.step(batch)

    run.fit(step=step, precision="bf16")
    assert dtypes == {torch.bfloat16}
    state = [value for values in run.optim.state.values() for value in values.values()]
    assert {tensor.dtype for tensor in [*run.model.parameters(), *state]} == {torch.float32}
    assert run.rows[-1]["loss"] < run.rows[0]["loss"]


def test_refusals(run):
    with pytest.raises(ValueError, match="fp32 or bf16, got fp16"):
        autocast("fp16", torch.device("cpu"))
    with pytest.raises(ValueError, match="fp32 or bf16, got fp16"):
        run.fit(precision="fp16")
    with pytest.raises(ValueError, match="max_grad_norm must be above 0"):
        run.fit(max_grad_norm=0.0)
    assert run.steps_begun == 0


def test_a_checkpoint_of_other_inputs_is_refused(tmp_path):
    Run(tmp_path).fit(steps=4, inputs={"policy": "0f", "pairs": "1e"})
    with pytest.raises(RuntimeError, match=r"must be a checkpoint of this run: it was made with another pairs;"):
        Run(tmp_path).fit(inputs={"policy": "0f", "pairs": "2d"})
    Run(tmp_path).fit(inputs={"policy": "0f", "pairs": "1e"})


def test_extra_state_is_saved(run):
    def fitted(each, **options):
        extra = nn.Module()
        extra.register_buffer("steps", torch.zeros(()))
        each.optim.register_step_post_hook(lambda *_: extra.steps.add_(1))
        each.fit(extra=extra, **options)
        return extra.steps.item()

    def step(batch):
        if run.steps_begun == 4:
            signal.raise_signal(signal.SIGTERM)
        return run.step(batch)

    with pytest.raises(Stopped):
        fitted(run, step=step)
    assert fitted(Run(run.directory)) == 10


FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


def end_at_a_file(number, pause, after_step):
    """This process is killed when it asks for a file for the `number`-th time, or a moment later: from now on, or once
    it has saved a step.
    """
    left, saved = itertools.count(number, -1), [not after_step]

    def killed():
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGKILL)

    def asked(event, given):
        if saved[0] and event in FILE_EVENTS and next(left) == 0:
            threading.Thread(target=killed).start() if pause else killed()
        elif event == "os.rename" and Path(os.fsdecode(given[1])).name.startswith("step-"):
            saved[0] = True

    sys.addaudithook(asked)


@pytest.mark.long
def test_killed_fifty_times(tmp_path):
    """Between any two uses of a file; rows and weights are those of a run that nobody disturbed."""
    whole, cut = Run(tmp_path / "whole"), tmp_path / "cut"
    whole.fit(steps=400, evaluate=whole.evaluate, evaluate_every=7)
    rng, reached, halves = random.Random(0), [], 0

    def train(kills):
        run = Run(cut, seed=kills if reached[-1:] > [0] else 0)  # once resumed, nothing depends on how it was begun
        run.fit(steps=400, evaluate=run.evaluate, evaluate_every=7, checkpoint_every=1, checkpoints_kept=2)
        torch.save(weights(run), tmp_path / "weights.pt")

    for kills in range(51):
        number, pause = rng.randrange(60), rng.choice((0.0, 0.0, rng.uniform(0.0, 0.002)))
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                if kills < 50:
                    end_at_a_file(number, pause, after_step=kills % 2)
                train(kills)
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == (signal.SIGKILL if kills < 50 else 0)
        newest = checkpoint.latest(cut / "checkpoint")
        reached.append(int(newest.name.removeprefix("step-")) if newest else 0)
        halves += len(list((cut / "checkpoint").glob("*.unfinished")))
    assert len(set(reached)) > 25
    assert halves > 5
    assert reached == sorted(reached)
    assert torch.equal(torch.load(tmp_path / "weights.pt"), weights(whole))
    assert Run(cut).rows == whole.rows
