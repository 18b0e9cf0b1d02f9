"""Ray itself, on a CPU: what its actors score beside training, and what becomes of one that dies."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pool import OPTIONS
from test_reference import settings as of_scoring
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
from whole_runs import frozen, losses, own, run

from dpo import evaluate, generate, score
from dpo.data.batches import Pair
from dpo.judges import RewardModel, reward_model
from dpo.policy import model as models
from dpo.policy import pool as pools
from dpo.policy.pool import Pool, Worker
from dpo.policy.sampling import sample
from dpo.policy.scoring import content_of, forward, shares
from dpo.references import Initial

PAIRS = [Pair([5 + n] * (n % 5 + 1), [8, 9 + n, 11], [9 + n]) for n in range(60)]
SMALL = ["scorer.batch_size=1", "micro_batch_tokens=100", "threads=1", "device=cpu"]
MARKED = 300  # a token of one response alone, at which a worker dies
DEADLY = [*PAIRS[:40], Pair([7, 7], [8, 9], [MARKED, 9]), *PAIRS[40:]]


class Asked(Pool):
    """Notes what comes, and does what a test wants when the first is there."""

    def __init__(self, then: Any = None, **changed: Any) -> None:
        super().__init__(**{**OPTIONS, **changed})
        self.then, self.came, self.order = then, [], {}

    def passes(self, *given: Any) -> Any:
        *rest, first, sources, found = given
        self.order = {content: place for place, content in reversed([*enumerate(first)])}

        def noted(content: bytes, logps: torch.Tensor) -> None:
            if self.then is not None and not self.came:
                self.then()
            self.came.append(content)
            found(content, logps)

        return super().passes(*rest, first, sources, noted)


class Deadly(Worker):
    """An actor that some response kills, whenever it is scored."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        def deadly(model: Any, items: Any, precision: str, packed: bool) -> torch.Tensor:
            if any(MARKED in response for _, responses in items for response in responses):
                os.kill(os.getpid(), signal.SIGKILL)
            return forward(model, items, precision, packed)

        pools.forward = deadly
        return super().__call__(batch)


@pytest.fixture(scope="module")
def running():
    """A Ray of another process, and its address."""
    code = (
        "import ray, sys; ray.init(num_cpus=3, resources={'a10': 1}, include_dashboard=False, log_to_driver=False);"
        "print(ray.get_runtime_context().gcs_address, flush=True); sys.stdin.read()"
    )
    os.environ.setdefault("RAY_AUTH_TOKEN", "0" * 64)  # as those who may join a cluster have it
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_worker_niceness", "0")  # of a cluster it is what that was started with
    line = [sys.executable, "-c", code]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, process.stdout.readlines(1)[-1].strip()
        process.communicate()


def workers() -> list[int]:
    """Actors of a pool that this process, or one that it started, started."""
    parents, named = {}, []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if b"MapWorker(MapBatches" in (folder / "cmdline").read_bytes():
                    named.append(int(folder.name))
            except OSError:  # ended meanwhile
                pass

    def mine(process: int) -> bool:
        return process == os.getpid() or (process > 1 and mine(parents.get(process, 0)))

    return [process for process in named if mine(process)]


def start(tmp_path: Path, tiny_model: Any, pool: Pool | None, pairs: list[Pair] = PAIRS) -> Any:
    model, _ = models.load(tiny_model("llama"))
    asked = replace(of_scoring(tmp_path, micro_batch_tokens=10), pool=pool, batch_size=4)
    return Initial().start(tiny_model("llama"), model, {"train": pairs}, asked)


def test_a_run_beside_which_ray_scores(tmp_path, tiny_model, monkeypatch):
    """Losses and measures are those of a run that scores by itself, and the file in the cache is that of dpo.score, to
    the bit. Its loss begins at ln 2, and the next run finds the scores and starts no Ray."""
    (tmp_path / "here").mkdir()
    (tmp_path / "beside").mkdir()
    given = [*own(tmp_path, tiny_model("llama")), *SMALL[1:]]
    rows, result = run(tmp_path / "beside" / "run", *given, "scorer=ray", "scorer.batch_size=1")
    score.run(frozen(tmp_path / "here" / "scores", *given, verb="score"), _made(tmp_path / "here" / "scores"))
    files = [*sorted((tmp_path / "beside" / "cache" / "reference").glob("*/scores.safetensors"))]
    (ours,) = sorted((tmp_path / "here" / "cache" / "reference").glob("*/scores.safetensors"))
    assert [file.parent.name for file in files] == [ours.parent.name]
    assert files[0].read_bytes() == ours.read_bytes()
    assert {file.name for file in files[0].parent.iterdir()} == {file.name for file in ours.parent.iterdir()}
    assert json.loads((files[0].parent / "key.json").read_text()) == json.loads((ours.parent / "key.json").read_text())
    alone, alone_result = run(tmp_path / "here" / "run", *given)
    assert losses(rows) == losses(alone)
    assert losses(rows)[0] == pytest.approx(0.6931472, abs=1e-6)
    assert result.pop("reference_wait_s") > 0
    assert {**result, "seconds": 0} == {**alone_result, "seconds": 0}
    monkeypatch.setattr(pools, "_ray", lambda: pytest.fail("Ray was asked"))
    _, again = run(tmp_path / "beside" / "again", *given, "scorer=ray")
    assert "reference_wait_s" not in again


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


@pytest.mark.long
def test_an_actor_that_is_killed_is_replaced(tmp_path, tiny_model):
    """By another, with no difference; two of them, which hold a resource of a name, give passes in their order."""
    seen: set[int] = set()

    def kill() -> None:
        seen.update(workers())
        os.kill(min(seen), signal.SIGKILL)

    pool = Asked(
        kill, concurrency=2, max_restarts=2, max_task_retries=2, num_cpus=0.5, resources={"a10": 0.5}, batch_size=2
    )
    found = start(tmp_path / "beside", tiny_model, pool).finish()
    assert len(seen) == 2
    here = start(tmp_path / "here", tiny_model, None)
    assert torch.equal(found.table["train"], here.table["train"])
    assert (found.folder / "scores.safetensors").read_bytes() == (here.folder / "scores.safetensors").read_bytes()
    check_order(pool)
    assert workers() == []


def check_order(pool: Asked) -> None:
    """Each pass came once, and none behind one whose rows training reads later."""
    distinct = dict(sorted((content_of(one), one) for pair in PAIRS for one in (pair.chosen, pair.rejected)))
    contents, came = list(distinct), iter(pool.came)
    passes = [[contents[row] for rows in share for row in rows] for share in shares(list(distinct.values()), 40)]
    assert len(passes) > 10
    for expected in sorted(passes, key=lambda one: min(pool.order[content] for content in one)):
        assert {next(came) for _ in expected} == set(expected)
    assert next(came, None) is None


@pytest.mark.long
def test_a_response_at_which_every_actor_dies_is_named(tmp_path, tiny_model, monkeypatch):
    from ray import cloudpickle

    monkeypatch.setattr(pools, "Worker", Deadly)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    pool = Asked(max_restarts=2, max_task_retries=2, batch_size=3)
    began = time.monotonic()
    beside = start(tmp_path, tiny_model, pool, DEADLY)
    with pytest.raises(RuntimeError, match=r"^scoring actors must live through every response") as error:
        beside.finish()
    assert "found that they ended 3 times at this one:\n  train row 40, counted from 0 (rejected)\n" in str(error.value)
    assert time.monotonic() - began < 300
    assert len({*pool.came}) > 8  # which are kept
    monkeypatch.setattr(pools, "Worker", Worker)
    again = Asked()
    found = start(tmp_path, tiny_model, again, DEADLY).finish()
    assert torch.equal(found.table["train"], start(tmp_path / "here", tiny_model, None, DEADLY).table["train"])


@pytest.mark.long
def test_actors_that_load_other_weights_are_refused(tmp_path, tiny_model):
    """As where another machine has another model under that path."""
    model, _ = models.load(tiny_model("llama"))
    asked = replace(of_scoring(tmp_path, micro_batch_tokens=10), pool=Pool(**OPTIONS))
    with torch.no_grad():
        next(model.parameters()).mul_(1.001)
    with pytest.raises(RuntimeError, match=r"scoring actors must start, .*an actor must load the weights"):
        Initial().prepare(tiny_model("llama"), model, {"train": PAIRS}, asked)


@pytest.mark.parametrize("given", ["127.0.0.1:1", "nowhere"])
def test_an_address_where_no_ray_is(given):
    with pytest.raises(
        ValueError, match=rf"^scorer\.address must be host:port of a running Ray, or auto, got {given}: "
    ):
        Pool(**{**OPTIONS, "address": given}).check()


@pytest.mark.long
def test_a_ray_that_runs_is_joined(tmp_path, tiny_model, running):
    """And it goes on when all is scored."""
    address = running[1]
    pool = Asked(address=address, resources={"a10": 1.0})
    pool.check()
    found = start(tmp_path / "beside", tiny_model, pool).finish()
    assert torch.equal(found.table["train"], start(tmp_path / "here", tiny_model, None).table["train"])
    assert running[0].poll() is None
    Pool(**{**OPTIONS, "address": address}).check()


@pytest.mark.parametrize(
    "needs,found",
    [
        ({"resources": {"a10": 1.0}, "concurrency": 2}, "2 scoring actors must find 1 a10 each, found 1 in all;"),
        ({"resources": {"h100": 0.5}}, "1 scoring actors must find 0.5 h100 each, found 0 in all;"),
        ({"num_gpus": 1.0}, "1 scoring actors must find 1 GPU each, found 0 in all;"),
    ],
)
def test_what_no_machine_has_is_refused_at_first_contact(running, needs, found):
    with pytest.raises(ValueError, match=f"^{found} lower scorer.concurrency, or what each takes$"):
        Pool(**{**OPTIONS, "address": running[1], **needs}).check()


@pytest.fixture(scope="module")
def judge(tiny_model, tmp_path_factory) -> str:
    """A reward model: a classifier with random weights."""
    torch.manual_seed(2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    path = tmp_path_factory.mktemp("reward") / "model"
    LlamaForSequenceClassification(LlamaConfig(vocab_size=len(tokenizer), **shape, num_labels=1)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def evaluated(folder: Path, model: str, judge: str, *given: str) -> tuple[dict[str, Any], bytes]:
    """The result of an evaluation, and its responses with their scores."""
    folder.mkdir(exist_ok=True)
    asked = [*own(folder, model), "evaluation.baseline=human", "evaluation.temperature=1"]
    asked += [f"judge.path={judge}", "judge.max_length=60", "threads=1", "device=cpu", *given]
    made = _made(folder / f"run {len(given)}")
    evaluate.run(frozen(made, *asked, verb="evaluate"), made)
    result = json.loads((made / "evaluation.json").read_text())
    return {**result, "seconds": 0}, (made / "responses.jsonl").read_bytes()


def pooled(address: str) -> list[str]:
    return ["judge=reward_model_ray", "engine=ray", *(f"{at}.pool.address={address}" for at in ("judge", "engine"))]


@pytest.mark.long
def test_an_evaluation_by_pools_is_that_of_the_run_itself(tmp_path, tiny_model, judge, running):
    """The same responses and the same scores, and so the same win rate, to the bit."""
    here = evaluated(tmp_path / "here", tiny_model("llama"), judge, "judge=reward_model")
    assert evaluated(tmp_path / "beside", tiny_model("llama"), judge, *pooled(running[1])) == here
    assert 0 <= here[0]["win_rate"] <= 1
    assert len({json.loads(line)["score"] for line in here[1].splitlines()}) > 2


def test_what_no_pool_could_do_is_refused_before_a_model_is_loaded(tmp_path, tiny_model, judge, running, monkeypatch):
    given = [tmp_path, tiny_model("llama"), judge, *pooled(running[1])]
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("a policy was loaded"))
    with pytest.raises(ValueError, match="1 sampling actors must find 1 GPU each, found 0"):
        evaluated(*given, "engine.pool.num_gpus=1")
    monkeypatch.setattr(reward_model, "load_classifier", lambda *_: pytest.fail("a judge was loaded"))
    with pytest.raises(ValueError, match="1 judging actors must find 1 h100 each, found 0"):
        evaluated(*given, "judge.pool.resources={h100: 1}", "seed=1")


class DeadlyJudging(Worker):
    """An actor that one word in a response kills."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        task = self.task

        def deadly(model: Any, tokenizer: Any, share: Any) -> bytes:
            if "Deadly" in share[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            return task(model, tokenizer, share)

        deadly.alone = task.alone
        self.task = deadly
        return super().__call__(batch)


TEXTS = [f"Well, {'it is so, ' * (n % 4)}{n}." for n in range(40)]


@pytest.mark.long
def test_a_judging_actor_that_is_killed_is_replaced(judge, running):
    again = {"max_restarts": 2, "max_task_retries": 2}
    reward = RewardModel(judge, 60, {**OPTIONS, "address": running[1], "batch_size": 4, **again})
    reward.handshake()
    found = {}
    for place, said in reward.each(["Is it?"] * len(TEXTS), TEXTS):
        if not found:
            os.kill(min(workers()), signal.SIGKILL)
        found[place] = said
    assert [found[place] for place in range(len(TEXTS))] == RewardModel(judge, 60, None)(["Is it?"] * 40, TEXTS)


@pytest.mark.long
def test_a_response_at_which_every_judging_actor_dies_is_named(judge, running, monkeypatch):
    """And the judge asks no more than it must to find it; another's weights are refused."""
    from ray import cloudpickle

    monkeypatch.setattr(pools, "Worker", DeadlyJudging)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    few = {**OPTIONS, "address": running[1], "batch_size": 8, "max_restarts": 2, "max_task_retries": 1}
    reward, texts = RewardModel(judge, 60, few), [*TEXTS[:20], "Deadly.", *TEXTS[20:]]
    came, began = [], time.monotonic()
    with pytest.raises(RuntimeError, match=r"^judging actors must live through every response") as error:
        came.extend(reward.each(["Is it?"] * len(texts), texts))
    assert "found that they ended 2 times at this one:\n  'Deadly.', a response to 'Is it?'\n" in str(error.value)
    assert time.monotonic() - began < 300
    monkeypatch.setattr(pools, "Worker", Worker)
    reward._weights = "0" * 64
    with pytest.raises(RuntimeError, match=r"judging actors must start, .*must load the weights"):
        [*reward.each(["Is it?"], ["It is."])]


class DeadlyDrawing(Worker):
    """An actor that a prompt kills which has a word like no other."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        def deadly(model: Any, tokenizer: Any, prompts: Any, *given: Any) -> Any:
            if any("Deadly" in tokenizer.decode(ids) for ids in prompts):
                os.kill(os.getpid(), signal.SIGKILL)
            return sample(model, tokenizer, prompts, *given)

        pools.sample = deadly
        return super().__call__(batch)


def candidates(directory: Path, model: str, *given: str) -> dict[str, bytes]:
    """The files of a run of dpo.generate: three responses to each of nine prompts of many lengths."""
    prompts = [" ".join(["Well?"] * (n % 4)) + f"What is {n}?" for n in range(12)]
    prompts[7] = "Deadly."  # the shortest, drawn last: of what is at hand Ray gives the last two batches late
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "prompts.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in prompts))
    asked = ["data=prompts", f"data.path={directory / 'prompts.jsonl'}", "data.validation=2", "data.test=1"]
    asked += [f"policy.path={model}", "policy.generation_batch_size=4", "generation.samples_per_prompt=3", "judge=none"]
    asked += ["max_new_tokens=6", "max_length=100", "threads=1", "device=cpu", *given]
    made = directory / "run"
    made.mkdir(exist_ok=True)
    generate.run(frozen(made, *asked, verb="generate"), made)
    assert not list((directory / "cache").glob("ray-*"))  # the copy of the weights
    return {name: (made / name).read_bytes() for name in ("train.jsonl", "validation.jsonl")}


@pytest.mark.long
@pytest.mark.parametrize("actors", [1, 2])
def test_actors_draw_the_very_text_of_the_run_itself(tmp_path, tiny_model, running, actors):
    model = tiny_model("llama")
    here = candidates(tmp_path / "here", model)
    assert len(here["train.jsonl"].splitlines()) == 27
    pool = [f"engine.pool.concurrency={actors}", f"engine.pool.address={running[1]}"]
    assert candidates(tmp_path / "beside", model, "engine=ray", *pool) == here


@pytest.mark.long
def test_a_sampling_actor_that_is_killed_is_replaced(tmp_path, tiny_model, monkeypatch):
    model, seen, add = tiny_model("qwen2"), set(), generate.add_answers

    def kill(*given: Any) -> None:
        add(*given)
        if not seen:
            seen.update(workers())
            os.kill(min(seen), signal.SIGKILL)

    here = candidates(tmp_path / "here", model)
    monkeypatch.setattr(generate, "add_answers", kill)
    assert candidates(tmp_path / "beside", model, "engine=ray") == here
    assert seen
    assert workers() == []


@pytest.mark.long
def test_a_prompt_at_which_every_actor_dies_is_named(tmp_path, tiny_model, monkeypatch):
    """What came before it is kept, and a run without that fault goes on from there."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(pools, "Worker", DeadlyDrawing)
    model, few = tiny_model("llama"), ["engine=ray", "engine.pool.max_restarts=5", "engine.pool.max_task_retries=2"]
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^sampling actors must live through every response") as error:
        candidates(tmp_path / "run", model, *few)
    assert "Deadly.'" in str(error.value)
    assert "What is" not in str(error.value)
    assert time.monotonic() - began < 300
    assert workers() == []
    [kept] = (tmp_path / "run" / "cache" / "candidates").glob("*.unfinished/train.unfinished")
    known = len(kept.read_text().splitlines()) - 1
    assert known % 4 == 0
    assert known > 0
    monkeypatch.setattr(pools, "Worker", Worker)
    drawn, add = [], generate.add_answers
    monkeypatch.setattr(generate, "add_answers", lambda *given: (drawn.append(len(given[2])), add(*given)))
    assert candidates(tmp_path / "run", model, *few) == candidates(tmp_path / "here", model)
    assert sum(drawn[: -(-(27 - known) // 4)]) == 27 - known


@pytest.mark.long
def test_ray_is_imported_only_when_chosen():
    """Not by a run, nor by the options of a pool."""
    code = (
        "import sys, dpo.train, dpo.generate, dpo.score, dpo.sweep.rehearse, dpo.policy.pool as pool;"
        f"pool.Pool(**{OPTIONS!r}).check(); assert 'ray' not in sys.modules, 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
