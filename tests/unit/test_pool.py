"""What a pool of scoring actors refuses, what it scores first, and who waits for it; Ray itself is in test_ray.py."""

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from test_config import config as config_of
from test_reference import settings as of_scoring
from whole_runs import other_model

from dpo import engines
from dpo.data.batches import Pair, collate_pairs
from dpo.policy import model as models
from dpo.policy import pool as pools
from dpo.policy import scoring
from dpo.policy.logps import sequence_logps
from dpo.policy.pool import Begun, Pool
from dpo.policy.scoring import Scoring, contents_of
from dpo.references import EMA, Frozen, Initial, Live, PrecomputedFiles, ReferenceFree, Unconditional, scored_ahead
from dpo.settings import evaluation_of, identity_of
from dpo.sweep.identity import identity
from dpo.sweep.rehearse import trials
from dpo.sweep.schema import faults
from dpo.tables import Streamed, read_first

FEW = [f"data.{part}=2" for part in ("demonstrations", "train", "validation", "test")]
AHEAD = {"engine": "generate", "judge": "judge"}  # which stage does ahead what an option says

PAIRS = [Pair([5 + n] * (n % 3 + 1), [8, 9 + n], [9 + n]) for n in range(12)]  # of more than one pass


def settings(tmp_path: Path, **changed: Any) -> Scoring:
    return of_scoring(tmp_path, micro_batch_tokens=4, **changed)


def batch(rows: list[int]) -> Any:
    index, real = torch.tensor(rows), torch.ones(len(rows), dtype=torch.bool)
    return collate_pairs([PAIRS[row] for row in rows], index, real, pad_id=0, packed=False)


OPTIONS: dict[str, Any] = {
    **{"concurrency": 1, "batch_size": 1, "num_cpus": 1.0, "num_gpus": 0.0, "resources": None},
    **{"max_restarts": 0, "max_task_retries": 0, "address": None},
}


def config(*overrides: str, command: str = "train") -> dict[str, Any]:
    """Of a world that is soon drawn."""
    return config_of(*FEW, *overrides, command=command)


class Here(Pool):
    """A pool without Ray: it scores in its thread, and may end early."""

    def __init__(self, model: Any, passes: int | None = None) -> None:
        super().__init__(**OPTIONS)
        self.model, self.most, self.asked = model, passes, []
        self.go = threading.Event()
        self.go.set()

    def stream(self, asked, task, which, weights, rows):
        self.asked.append(list(asked))
        for number, (place, items) in enumerate(asked.items()):
            self.go.wait()
            if number == self.most:
                raise RuntimeError("the pool is gone")
            yield place, task(self.model, None, items)

    def close(self):
        pass


@pytest.fixture
def llama(tiny_model):
    return models.load(tiny_model("llama"))[0]


def start(tmp_path: Path, tiny_model: Any, pool: Pool, model: Any, reference: Any = None, **changed: Any) -> Any:
    asked = replace(settings(tmp_path, **changed), pool=pool, batch_size=1)
    return (reference or Initial()).start(tiny_model("llama"), model, {"train": PAIRS}, asked)


@pytest.mark.parametrize(
    "option,value,least",
    [
        *(("concurrency", 0, 1), ("batch_size", 0, 1), ("num_cpus", -1.0, 0), ("num_gpus", -0.5, 0)),
        *(("max_restarts", -1, 0), ("max_task_retries", -1, 0), ("num_cpus", float("inf"), 0)),
    ],
)
def test_what_a_pool_cannot_be(option, value, least):
    """Minus one restart is one without end in Ray."""
    with pytest.raises(ValueError, match=rf"^scorer\.{option} must be at least {least}, got {value}$"):
        Pool(**{**OPTIONS, option: value})
    with pytest.raises(ValueError, match=r"scorer\.resources\.a10 must be at least 0, got -1"):
        Pool(**{**OPTIONS, "resources": {"a10": -1}})


def test_what_a_pool_that_samples_cannot_be(monkeypatch):
    with pytest.raises(ValueError, match=r"^engine\.pool\.concurrency must be at least 1, got 0$"):
        engines.Ray("cache", False, {**OPTIONS, "concurrency": 0})
    monkeypatch.setattr(pools, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^engine=ray needs the package ray, found none; pip install"):
        engines.Ray("cache", False, OPTIONS)


@pytest.mark.parametrize(
    "chosen,at",
    [
        *(("scorer=ray", "scorer"), ("engine=ray", "engine.pool"), ("judge=reward_model_ray", "judge.pool")),
        ("judge@evaluation.judge=reward_model_ray", "evaluation.judge.pool"),
        ("engine@evaluation.engine=ray", "evaluation.engine.pool"),
    ],
)
@pytest.mark.parametrize(
    "option,said",
    [
        *(
            ("concurrency=0", "concurrency must be at least 1, got 0"),
            ("batch_size=0", "batch_size must be at least 1"),
        ),
        *(("concurrency=-2", "concurrency must be at least 1, got -2"), ("num_cpus=-1", "num_cpus must be at least 0")),
        *(
            ("num_gpus=1.5", "num_gpus must be a part of one GPU"),
            ("resources={GPU: 1}", "resources must not name GPU"),
        ),
        *(("batch_size=many", "batch_size must be int, got 'many'"), ("max_restarts=null", "max_restarts must be int")),
        ("+actors=2", ""),
    ],
)
def test_a_plan_refuses_a_pool_that_could_not_be(chosen, at, option, said):
    """In the same words, whatever the pool is for; of those of evaluations, too."""
    path = [f"{at.removesuffix('.pool')}.path=org/reward"] if "judge" in at else []
    plus, key = ("+", option[1:]) if option[0] == "+" else ("", option)
    problems = trials([config(chosen, *path, f"{plus}{at}.{key}")])[0]["problems"]
    words = said or "actors"
    assert len(problems) == 1
    assert at.removeprefix("evaluation.") in problems[0]
    assert words in problems[0]
    assert trials([config(chosen, *path)])[0]["problems"] == []


def test_two_pools_of_a_process_take_turns(monkeypatch):
    """A Ray that was started for one has no room for the other's actors."""
    said: list[str] = []
    double = SimpleNamespace(init=lambda **_: said.append("init"), shutdown=lambda: said.append("shutdown"))
    monkeypatch.setattr(pools, "_ray", lambda: double)
    one, other = Pool(**OPTIONS), Pool(**OPTIONS)
    one._start()
    one._start()
    waiting = threading.Thread(target=other._start, daemon=True)
    waiting.start()
    waiting.join(timeout=0.3)
    other_waits = waiting.is_alive()
    one.close()
    waiting.join(timeout=60)
    other.close()
    one.close()
    assert other_waits
    assert said == ["init", "shutdown", "init", "shutdown"]


def test_an_actor_lives_on_one_machine():
    """By hand: 2 GPUs on each of two machines hold no actor of 3, though they have 4, and two of 2."""
    machines = [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 4.0, "GPU": 2.0}]
    with pytest.raises(
        ValueError, match=r"^1 scoring actors must find 3 GPU each, found 4 in all on 2 machines; lower"
    ):
        Pool(**{**OPTIONS, "num_gpus": 3.0})._check_room(machines)
    Pool(**{**OPTIONS, "num_gpus": 2.0, "concurrency": 2})._check_room(machines)
    Pool(**{**OPTIONS, "num_gpus": 0.1, "num_cpus": 0.0, "concurrency": 40})._check_room(machines[:1] * 2)


def test_evaluations_alone_sample_with_the_engine_of_the_command():
    """In dpo.evaluate engine=ray says who draws; a run that trains samples candidates with it."""
    for command, target in (("evaluate", "dpo.engines.Ray"), ("show", "dpo.engines.Ray"), ("train", None)):
        asked = OmegaConf.create(config("engine=ray", command=command))
        engine = evaluation_of(asked).engine
        assert (engine and engine._target_) == target
        assert evaluation_of(OmegaConf.create(config(command=command))).engine is None


@pytest.mark.parametrize(
    "chosen,at",
    [
        *(("engine=ray", "engine"), ("engine@evaluation.engine=ray", "evaluation.engine")),
        *(("judge=reward_model_ray", "judge"), ("judge@evaluation.judge=reward_model_ray", "evaluation.judge")),
    ],
)
def test_how_many_actors_there_are_is_no_part_of_a_run(chosen, at):
    chosen, *path = [chosen, f"{at}.path=org/reward"] if "judge" in at else [chosen]
    one = config(chosen, *path)
    other = config(chosen, *path, f"{at}.pool.concurrency=3", f"{at}.pool.max_restarts=0")
    assert identity(one) == identity(other) != identity(config())
    assert trials([one])[0]["problems"] == []
    both = [identity_of(OmegaConf.select(OmegaConf.create(values), at)) for values in (one, other)]
    assert both[0] == both[1]
    for command, ahead in (("train", at in AHEAD), ("score", at in AHEAD), (AHEAD.get(at, "evaluate"), False)):
        [problem] = faults(config(chosen, *path, "processes=2", command=command))
        assert problem.startswith(f"processes must be 1 with {at}={chosen.partition('=')[2]}, got 2; raise {at}.pool.")
        assert problem.endswith(f" ahead: python -m dpo.{AHEAD.get(at)} {chosen}") == ahead


def test_without_ray_a_pool_is_refused(monkeypatch):
    monkeypatch.setattr(pools, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^scorer=ray needs the package ray, found none; pip install"):
        Pool(**OPTIONS)


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    Pool(**{**OPTIONS, "num_gpus": 0.5, "concurrency": 2}).check()
    with pytest.raises(ValueError, match=r"^3 scoring actors must find 0.5 GPU each, found 1 in all; lower"):
        Pool(**{**OPTIONS, "num_gpus": 0.5, "concurrency": 3}).check()


@pytest.mark.parametrize("reference", [EMA(0.5, 2), Live(None), ReferenceFree(), PrecomputedFiles(__file__)])
def test_what_a_pool_cannot_score(reference):
    with pytest.raises(ValueError, match=rf"^a scorer needs a reference .*, found {type(reference).__name__}; take"):
        scored_ahead(reference)


def test_a_reference_that_makes_something_of_its_scores_is_not_streamed():
    class Tempered(Frozen):
        def prepare(self, *given: Any) -> Any:
            return super().prepare(*given)

    with pytest.raises(ValueError, match="found Tempered"):
        scored_ahead(Tempered(None))
    for fine in (Initial(), Unconditional(None, "")):
        assert scored_ahead(fine) is fine


@pytest.mark.parametrize("command", ["train", "score"])
def test_a_plan_refuses_what_no_run_could_use(command):
    fine = config("scorer=ray", command=command)
    assert trials([fine])[0]["problems"] == []
    (problem,) = trials([config("scorer=ray", "reference=ema", command=command)])[0]["problems"]
    assert problem.startswith("a scorer needs a reference")
    (problem,) = trials([config("scorer=ray", "scorer.max_restarts=-1", command=command)])[0]["problems"]
    assert problem.startswith("scorer.max_restarts must be at least 0")
    (problem,) = trials([config("scorer=ray", "scorer.resources={a10: x}", command=command)])[0]["problems"]
    assert problem.startswith("scorer.resources must be dict[str, float] | None")
    (problem,) = faults(config("scorer=ray", "processes=2", command=command))
    assert problem.startswith("processes must be 1 with scorer=ray, got 2; raise scorer.concurrency")
    assert problem.endswith("or score ahead: python -m dpo.score scorer=ray") == (command == "train")


def test_what_is_read_first_is_scored_first(tmp_path):
    """By hand: 3 training pairs in the order 2, 0, 1 of seed 0, in steps of one, and 2 held-out ones."""
    asked = replace(settings(tmp_path), seed=0, batch_size=1)
    found = read_first({"train": 3, "validation": 2}, asked)
    order = found[8:]  # after those that are checked
    first, second, third = np.random.default_rng((0, 0)).permutation(3).tolist()
    assert found[:8] == list(range(8))
    assert order == [first, first + 3, 6, 8, 7, 9, second, second + 3, third, third + 3]
    seeded = np.random.default_rng((3, 0)).permutation(12).tolist()
    assert read_first({"train": 12}, replace(asked, seed=3))[8::2] == seeded
    assert read_first({"train": 3, "validation": 2}, replace(asked, batch_size=2))[8:12] == [
        first,
        first + 3,
        second,
        second + 3,
    ]


@pytest.mark.parametrize("packed", [True, False])
def test_scores_of_a_pool_are_those_of_the_run(tmp_path, tiny_model, llama, packed):
    """The file in the cache to the bit, and each batch; with tokens where they are asked for."""
    here = Initial().prepare(
        tiny_model("llama"), llama, {"train": PAIRS}, settings(tmp_path / "a", packed=packed, per_token=True)
    )
    beside = start(tmp_path / "b", tiny_model, Here(llama), llama, packed=packed, per_token=True)
    assert isinstance(beside, Streamed)
    for rows in ([2, 0], [1]):
        assert torch.equal(beside.logps(batch(rows), "train"), here.logps(batch(rows), "train"))
        assert torch.equal(beside.token_logps(batch(rows), "train"), here.token_logps(batch(rows), "train"))
    table = beside.finish()
    assert torch.equal(table.table["train"], here.table["train"])
    assert torch.equal(table.lengths["train"], here.lengths["train"])
    assert (beside.fingerprint, beside.is_initial, beside.kl_target) == (here.fingerprint, True, None)
    one, two = (table.folder.relative_to(tmp_path / x) for x, table in (("a", here), ("b", table)))
    assert one == two
    assert (
        here.folder.joinpath("scores.safetensors").read_bytes()
        == (tmp_path / "b" / one / "scores.safetensors").read_bytes()
    )
    assert {file.name for file in (tmp_path / "b" / one).iterdir()} == {file.name for file in here.folder.iterdir()}
    again = start(tmp_path / "b", tiny_model, Here(None), llama, packed=packed)
    assert "from the cache" in again.held


def test_each_split_has_its_own_scores(tmp_path, tiny_model, llama):
    """Of a model that KL can be measured to; the pool hears whose each sequence is, and not to pack for a model that
    cannot be packed.
    """
    other = Frozen(other_model(tmp_path, tiny_model))
    splits = {"train": PAIRS, "validation": PAIRS[4:7]}
    here = other.prepare(tiny_model("llama"), llama, splits, settings(tmp_path / "a", per_token=True))
    pool, told = Here(models.load(other.path)[0]), []
    passes, pool.passes = pool.passes, lambda *given: told.append(given) or passes(*given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpo.tables.packable", lambda *_: False)
        asked = replace(settings(tmp_path / "b", per_token=True), pool=pool, batch_size=1)
        beside = other.start(tiny_model("llama"), llama, splits, asked)
    for split, rows in (("validation", [2, 0]), ("train", [5, 1])):
        for given in (beside, here, beside.finish()):
            live = sequence_logps(pool.model, batch([4 + row if split == "validation" else row for row in rows]))[0]
            asked_of = batch(rows)
            assert torch.allclose(given.logps(asked_of, split), live, atol=1e-4)
            lengths = [
                len(side)
                for name in ("chosen_ids", "rejected_ids")
                for side in (getattr(splits[split][row], name) for row in rows)
            ]
            tokens = given.token_logps(asked_of, split).split(lengths)
            assert torch.allclose(torch.stack([some.sum() for some in tokens]), live, atol=1e-4)
    assert (beside.kl_target, beside.finish().kl_target, beside.finish().is_initial) == (other.path, other.path, False)
    [(which, _, packed, _, _, _, sources, _)] = told
    assert which == other.spec(tiny_model("llama"))
    assert packed is False
    [content] = contents_of([PAIRS[8].rejected])
    assert sources[content] == "train row 8, counted from 0 (rejected)"


@pytest.mark.parametrize("precision,advice", [("fp32", False), ("bf16", True)])
def test_who_is_told_of_other_log_probs_hears_what_may_help(tmp_path, tiny_model, llama, precision, advice):
    other, _ = models.load(tiny_model("llama"))
    with torch.no_grad():
        other.lm_head.weight *= 30  # more than bfloat16 rounds
    with pytest.raises(RuntimeError, match="leave out scorer=ray") as error:
        start(tmp_path, tiny_model, Here(other), llama, precision=precision).finish()
    assert ("or set precision=fp32" in str(error.value)) is advice


def test_who_asks_waits_and_is_counted(tmp_path, tiny_model, llama):
    pool = Here(llama)
    pool.go.clear()
    beside = start(tmp_path, tiny_model, pool, llama)
    assert beside.waited == 0
    threading.Timer(0.3, pool.go.set).start()
    beside.logps(batch([0]), "train")
    assert beside.waited > 0.2
    beside.finish()
    done = beside.waited
    beside.logps(batch([0, 1, 2]), "train")
    assert beside.waited - done < 0.1


def test_a_step_waits_for_all_of_its_rows(tmp_path, tiny_model, llama):
    """Those that are compared come first, all others when the pool goes on."""
    pool = Here(llama)
    beside = start(tmp_path, tiny_model, pool, llama)
    beside.finish()
    lost = beside._logps.pop(beside._contents["train"][12])  # of the first pair the rejected response
    waiting = threading.Thread(target=beside.logps, args=(batch([0]), "train"), daemon=True)
    waiting.start()
    waiting.join(timeout=0.3)
    assert waiting.is_alive()
    beside._logps[beside._contents["train"][12]] = lost
    waiting.join()


def test_what_ends_the_pool_is_raised_where_it_is_waited_for(tmp_path, tiny_model, llama):
    beside = start(tmp_path, tiny_model, Here(llama, passes=0), llama)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the pool is gone"):
            beside.logps(batch([0]), "train")
    with pytest.raises(RuntimeError, match="the pool is gone"):
        beside.finish()


@pytest.mark.parametrize("then", ["pool", "here"])
def test_what_was_scored_is_kept_when_a_pool_ends(tmp_path, tiny_model, llama, then):
    """The next pool scores what is left; a run without one scores all, and leaves no rest of it."""
    stopped = Here(llama, passes=2)
    with pytest.raises(RuntimeError, match="the pool is gone"):
        start(tmp_path, tiny_model, stopped, llama).finish()
    assert not list((tmp_path / "cache" / "reference").glob("*/scores.safetensors"))
    if then == "pool":
        second = Here(llama)
        table = start(tmp_path, tiny_model, second, llama).finish()
        assert second.asked == [stopped.asked[0][2:]]
    else:
        table = Initial().prepare(tiny_model("llama"), llama, {"train": PAIRS}, settings(tmp_path))
    fresh = Initial().prepare(tiny_model("llama"), llama, {"train": PAIRS}, settings(tmp_path / "fresh"))
    assert torch.equal(table.table["train"], fresh.table["train"])
    assert sorted(file.name for file in table.folder.iterdir()) == sorted(file.name for file in fresh.folder.iterdir())


def test_what_another_layout_kept_is_not_taken(tmp_path, tiny_model, llama, monkeypatch):
    """Though its passes are over the same rows."""
    monkeypatch.setattr(pools, "shares", lambda sequences, tokens: scoring.shares(sequences, 4 * 4))
    with pytest.raises(RuntimeError, match="the pool is gone"):
        start(tmp_path, tiny_model, Here(llama, passes=2), llama, packed=False).finish()
    second = Here(llama)
    start(tmp_path, tiny_model, second, llama).finish()
    distinct = [one for pair in PAIRS for one in (pair.chosen, pair.rejected)]
    assert len(second.asked[0]) == len(scoring.shares(distinct, 4 * 4))


def test_no_log_prob_of_another_model_is_given_away(tmp_path, tiny_model, llama):
    other, _ = models.load(other_model(tmp_path, tiny_model))
    beside = start(tmp_path, tiny_model, Here(other), llama)
    with pytest.raises(RuntimeError, match=r"^log-probs of a pool of 1 must be those of the model's own forward here"):
        beside.logps(batch([0]), "train")
    assert not list((tmp_path / "cache" / "reference").glob("*/scores.safetensors"))


def test_nothing_is_given_away_before_it_was_checked(tmp_path, tiny_model, llama):
    """Though all of it is there."""
    pool = Here(llama)
    beside = start(tmp_path, tiny_model, pool, llama)
    beside.finish()
    beside._checked = False
    waiting = threading.Thread(target=beside.logps, args=(batch([0]), "train"), daemon=True)
    waiting.start()
    waiting.join(timeout=0.3)
    assert waiting.is_alive()
    beside._checked = True
    waiting.join()


def test_a_pool_that_waited_for_another_process_reads_what_that_scored(tmp_path, tiny_model, llama, monkeypatch):
    expected = Initial().prepare(tiny_model("llama"), llama, {"train": PAIRS}, settings(tmp_path))
    monkeypatch.setattr("dpo.references.is_kept", lambda *_: False)  # not yet, when it was asked
    beside = start(tmp_path, tiny_model, pool := Here(llama), llama, per_token=True)
    beside.finish()
    assert len(beside._logps) == len({*beside._all})  # else who asks would wait without end
    assert torch.equal(beside.logps(batch([2, 1]), "train"), expected.logps(batch([2, 1]), "train"))
    assert beside.token_logps(batch([2, 1]), "train").shape == (6,)
    assert pool.asked == []


def test_who_was_at_what():
    begun = Begun()
    assert [begun.begin("3"), begun.begin("4"), begun.begin("3")] == [False, False, True]
    begun.end("4")
    assert begun.begin("4") is False
    assert begun.left() == {"3": 2, "4": 1}


@pytest.mark.parametrize(
    "left,named",
    [
        ({"0": 4, "0/1": 3, "2": 1}, ["at this one:", "b"]),
        ({"0": 4, "2": 1}, ["at one of these 2:", "a", "b"]),
        ({"2": 1}, ["at this one:", "c"]),
    ],
)
def test_which_rows_are_named(left, named):
    told = Pool(**OPTIONS)._named(ValueError("x\nThe actor died"), left, lambda place: ["c"] if place else ["a", "b"])
    assert all(part in str(told) for part in named)
    assert "The actor died" in str(told)
    assert ("\n  a" in str(told)) is ("a" in named)
    assert ("\n  c" in str(told)) is ("c" in named)
