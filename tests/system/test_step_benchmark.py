"""The benchmark's contenders take the same steps, so their times compare; and what is told of these times."""

import importlib
import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    importlib.import_module("contenders")
    step = importlib.import_module("step")
    monkeypatch.setitem(step.SHAPES, "cpu", SHAPE)
    return step


def losses(step, names):
    pairs, vocabulary = step.workload("A", 3, None)
    options = SimpleNamespace(device="cpu", precision="fp32")
    reference = step.model(SHAPE, vocabulary, "cpu")
    seconds, table = step.score(reference, pairs, "fp32", "cpu")
    assert seconds > 0
    found = {}
    for name in names:
        contender = step.contender(name, pairs, vocabulary, table, options)
        found[name] = [contender.step([0, 1]), contender.step([2]), contender.step([0, 1])]
    return found


@pytest.mark.long
def test_every_ablation_takes_the_same_steps(step):
    found = losses(step, [step.OURS, *step.ABLATION])
    for values in found.values():
        assert values == pytest.approx(found[step.OURS], rel=1e-4)
    assert (
        found[step.OURS][2] < found[step.OURS][0] == pytest.approx(math.log(2), rel=1e-5)
    )  # the policy is its reference


def test_our_micro_batches_take_the_same_steps(step, monkeypatch):
    """However many pairs a micro-batch holds, the loss is the mean over the pairs of the step."""
    [whole] = losses(step, [step.OURS]).values()
    monkeypatch.setitem(step.TOKENS, "cpu", 1)
    [single] = losses(step, [step.OURS]).values()
    assert single == pytest.approx(whole, rel=1e-4)


@pytest.mark.long
def test_trl_takes_the_same_steps(step):
    found = losses(step, [step.OURS, step.TRL, step.COMPACT, step.LIVE])
    for values in found.values():
        assert values == pytest.approx(found[step.OURS], rel=1e-4)


def test_arithmetic_by_hand(step):
    """One layer of width 2 and inner width 3, 5 words; a prompt of 2 tokens, responses of 2 and 1."""
    sizes = {"hidden_size": 2, "num_hidden_layers": 1, "intermediate_size": 3, "vocab_size": 5}
    policy = SimpleNamespace(config=SimpleNamespace(**sizes))
    pair = step.Pair([1, 2], [3, 4], [0])
    weights = 4 * 4 + 3 * 6  # of the layer
    seen = 1 + 2 + 3  # positions that each of the 3 tokens fed attends to
    unread = 2 * 18  # the feed-forward part at the prompt's first token
    forward = (
        2 * 3 * weights - unread + 2 * seen * (2 + 2) + 2 * 3 * 10
    )  # scores and mixing of width 2; 3 tokens scored
    assert step.arithmetic(policy, [pair.prompt_responses]) == 3 * forward
    again = 2 * 2 * weights - unread + 2 * (1 + 2) * (2 + 2)  # the prompt for the second response
    assert step.arithmetic(policy, [([1, 2], [[3, 4]]), ([1, 2], [[0]])]) == 3 * (forward + again)


def test_the_sweep_counts_scoring_as_often_as_it_happens(step):
    found = {
        "contenders": {step.OURS: {"pairs/s": 1.0}, step.TRL: {"pairs/s": 0.5}},
        "scoring, s/pair": 1.0,
        "TRL's scoring, s/pair": 2.0,
    }
    assert step.sweep_ratio(found, again=False) == pytest.approx((2 + 9 * 2) / (1 + 9))
    assert step.sweep_ratio(found, again=True) == pytest.approx((9 * 2 + 9 * 2) / (1 + 9))


def test_workloads_have_the_lengths_they_should(step):
    pairs, _ = step.workload("A", 400, None)
    prompts = torch.tensor([len(pair.prompt_ids) for pair in pairs])
    assert 100 < prompts.median() < 140
    assert max(len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs) <= 512
    pairs, _ = step.workload("B", 50, None)
    assert all(700 <= len(pair.prompt_ids) <= 1000 for pair in pairs)


@pytest.mark.long
def test_work_of_the_contenders(step, monkeypatch):
    """What the rows of the ablation leave out, the passes that a step of each takes, and what none of them skips."""
    contenders = importlib.import_module("contenders")
    assert {name: (layout, logps.__name__) for name, (layout, logps) in contenders.ABLATION.items()} == {
        "plain padded forward, live reference": ("padded", "live_reference"),
        "+ reference in a table": ("padded", "all_positions"),
        "+ scored positions only": ("padded", "scored_positions"),
        "+ no padding": ("packed", "scored_positions"),
        "+ prompt shared": ("shared", "scored_positions"),
    }
    pairs, vocabulary = step.workload("A", 3, None)
    options, clipped = SimpleNamespace(device="cpu", precision="fp32"), []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda given, norm: (clipped.append(norm), clip(given, norm))[1]
    )
    forwards = {}
    for name in (step.OURS, *contenders.ABLATION, step.TRL, step.LIVE):
        contender = step.contender(name, pairs, vocabulary, torch.zeros(3, 2), options, known=True)
        passes = []
        contender.policy.model.register_forward_hook(lambda *_, passes=passes: passes.append(torch.is_grad_enabled()))
        if name == step.LIVE:  # of its reference, which is a copy
            contender.trainer.ref_model.model.register_forward_hook(
                lambda *_, passes=passes: passes.append(torch.is_grad_enabled())
            )
        clipped.clear()
        contender.step([0, 2])
        forwards[name] = (passes.count(True), passes.count(False))
        assert clipped[-1] == 1.0, name
    assert forwards == {
        step.OURS: (1, 0),
        **dict.fromkeys(contenders.ABLATION, (1, 0)),
        "plain padded forward, live reference": (1, 1),
        step.TRL: (2, 0),  # a pair at once
        step.LIVE: (2, 2),
    }


class Racer:
    """A contender whose steps take the times that it is told; wall seconds, and those of all threads."""

    def __init__(self, name, times, off=0.0):
        self.name, self.times, self.off, self.rows, self.prepared = name, times, off, [], 40.0

    def step(self, rows):
        self.rows.append(rows)
        return 0.5 + self.off


@pytest.fixture
def race(step, monkeypatch):
    """`race(racers, rounds)`: `step.race` over racers, of which 10 FLOP a step are known, at a peak of 5 FLOP/s."""
    order = []

    def timed(act, device):
        racer, number = act.func.__self__, len(act.func.__self__.rows)
        order.append(racer.name)
        return *racer.times[number], act()

    def run(racers, rounds, precision="fp32", some=(), quick=False):
        options = SimpleNamespace(device="cpu", precision=precision, quick=quick, hh=None)
        pair = SimpleNamespace(prompt_responses=([1, 2], [[3], [4]]))
        monkeypatch.setattr(step, "workload", lambda name, count, path: ([pair] * count, 7))
        monkeypatch.setattr(step, "model", lambda *given: "model")
        monkeypatch.setattr(step, "score", lambda *given: (52.0, None))
        monkeypatch.setattr(step, "contender", lambda name, *given: racers[name])
        monkeypatch.setattr(step, "matmul_peak", lambda *given: 5.0)
        monkeypatch.setattr(step, "arithmetic", lambda policy, items: 10.0 if len(items) == 8 else 60.0)
        monkeypatch.setattr(step, "timed", timed)
        return step.race("A", [*racers], rounds, list(some), options), order

    return run


def test_what_a_race_reports(step, race):
    """Medians over the steps after the first, ratios step by step, and work beside time."""
    ours = [(99.0, 99.0), (1.0, 2.0), (2.0, 3.0), (5.0, 4.0)]
    trl = [(50.0, 50.0), (3.0, 8.0), (4.0, 9.0), (20.0, 20.0)]
    racers = {step.OURS: Racer(step.OURS, ours), step.TRL: Racer(step.TRL, trl)}
    found, order = race(racers, 3)
    mine, theirs = (found["contenders"][name] for name in (step.OURS, step.TRL))
    assert (mine["steps"], mine["s/step"], mine["pairs/s"], mine["ours is faster by"]) == (3, 2.0, 8 / 2, 1.0)
    assert (theirs["s/step"], theirs["pairs/s"]) == (4.0, 2.0)
    assert theirs["ours is faster by"] == 3.0  # of 3, 2 and 4
    assert theirs["spread"] == pytest.approx((3.5 - 2.5) / 2)
    assert theirs["CPU work, ours is less by"] == 4.0  # of 4, 3 and 5
    assert (mine["utilization"], theirs["utilization"]) == (10 / 2 / 5, 10 / 4 / 5)
    assert found["scoring, s/pair"] == 52 / (2 + 8 * 3)
    assert found["TRL's scoring, s/pair"] == 40 / 26
    assert (found["rounds"], found["matmul peak, FLOP/s"]) == (3, 5.0)
    assert found["arithmetic of separate rows"] == 60 / 30
    assert order == [step.OURS, step.TRL, step.TRL, step.OURS] * 2  # nobody is always first
    assert racers[step.OURS].rows == racers[step.TRL].rows == [[0, 1], *([*range(at, at + 8)] for at in (2, 10, 18))]


def test_a_quick_race_takes_some_steps_once(step, race):
    times = [(1.0, 1.0)] * 4
    racers = {name: Racer(name, times) for name in (step.OURS, step.TRL, step.LIVE)}
    found, _ = race(racers, 3, some=[step.LIVE], quick=True)
    assert [row["steps"] for row in found["contenders"].values()] == [3, 3, 1]


@pytest.mark.parametrize("precision,near,far", [("fp32", 5e-5, 5e-4), ("bf16", 1e-2, 5e-2)])
def test_losses_that_disagree_stop_the_race(step, race, precision, near, far):
    times = [(1.0, 1.0)] * 2
    race({step.OURS: Racer(step.OURS, times), step.TRL: Racer(step.TRL, times, near)}, 1, precision)
    with pytest.raises(RuntimeError, match="losses of step 0 must agree"):
        race({step.OURS: Racer(step.OURS, times), step.TRL: Racer(step.TRL, times, far)}, 1, precision)


def test_memory_is_what_a_contender_adds(step, monkeypatch):
    """The peak over two steps, less what the process held before it had a model."""
    held = {"VmRSS": [100.0], "VmHWM": [350.0]}
    racer = Racer(step.OURS, [])
    monkeypatch.setattr(step, "_resident", lambda field: held[field].pop())
    monkeypatch.setattr(step, "workload", lambda *given: ([None] * 8, 7))
    monkeypatch.setattr(step, "contender", lambda *given, known: racer)
    options = SimpleNamespace(device="cpu", hh=None)
    assert step.measure_memory("A", step.OURS, options) == 250.0
    assert racer.rows == [[0], [*range(8)]]


def test_the_last_line(step, monkeypatch, tmp_path, capsys):
    """Ratios to TRL as it ships with its reference precomputed; without the data set its ratio is not a number."""

    def row(faster, seconds, used):
        return {"steps": 1, "s/step": seconds, "pairs/s": 8 / seconds, "ours is faster by": faster, "spread": 0.1} | {
            "CPU work, ours is less by": 1.0,
            "utilization": used,
        }

    def race(name, names, rounds, some, options):
        scale = {"A": 1.0, "B": 2.0}[name]
        rows = {step.OURS: row(1.0, 8.0, 0.5 * scale), step.TRL: row(2.5 * scale, 16.0, 0.3)}
        rows |= {other: row(9.0, 99.0, 0.1) for other in names[2:]}
        return {
            "contenders": rows,
            "failed": {},
            "batch": 8,
            "rounds": rounds,
            "matmul peak, FLOP/s": 1e9,
            "arithmetic of separate rows": 1.5,
        } | {
            "scoring, s/pair": 1.0,
            "TRL's scoring, s/pair": 2.0,
        }

    memory = {("A", step.OURS): 30e6, ("A", step.TRL): 60e6, ("B", step.OURS): 20e6, ("B", step.TRL): 80e6}
    monkeypatch.setattr(step, "race", race)
    monkeypatch.setattr(step, "memory", lambda name, one, options: memory[name, one])
    monkeypatch.setitem(sys.modules, "trl", SimpleNamespace(__version__="0"))
    threads = torch.get_num_threads()
    given = [
        "--hh",
        str(tmp_path / "none"),
        "--output",
        str(tmp_path / "out.json"),
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["step", *given])
    step.main()
    torch.set_num_threads(threads)
    *_, last = capsys.readouterr().out.splitlines()
    found = {name: float(value) for name, value in re.findall(r"(\w+)=(\S+)", last)}
    assert math.isnan(found.pop("A_real_ratio"))
    assert found == {
        **{"A_ratio": 2.5, "B_ratio": 5.0, "A_mfu": 0.5, "B_mfu": 1.0, "A_memory_ratio": 0.5, "B_memory_ratio": 0.25},
        "sweep_ratio": 2.0,  # (2 + 9 * 2) / (1 + 9)
    }
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["sweep"] == {"scored once": 2.0, "TRL scores in every run": pytest.approx(3.6)}
    assert kept["workloads"]["A"]["memory"] == {step.OURS: 30e6, step.TRL: 60e6}
