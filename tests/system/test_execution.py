"""What a sweep starts, and how it ends, with processes that are made up: no run is executed."""

import io
import itertools
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from composing import compose
from filelock import FileLock
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from dpo import results
from dpo.results import tables
from dpo.sweep import launch
from dpo.sweep.launch import Execution, Grid, Sweep
from dpo.sweep.plan import Composed, Refused, Run, resolve
from hydra_plugins.dpo_launchers import Local

FINISHED = '{"steps": 1}'


class Process:
    """Ends as the files say that `ends` writes, the second time that it is asked; notes what it was started with."""

    def __init__(self, command: list[str], **how: Any) -> None:
        self.command, self.how, self.asked, self.heard = command, how, 0, []
        self.directory = Path(command[-1])
        self.pid = 4_000_000 + len(STARTED)
        well = (0, {"evaluation.json": FINISHED}, False)
        self.returncode, self.files, self.deaf = ENDS.get(self.directory.name, well)
        self.beside = sum(one.poll_ is None for one in STARTED)
        self.poll_: int | None = None
        self.status = results.status(self.directory)
        self.error = (self.directory / "error.json").exists()
        STARTED.append(self)

    def poll(self) -> int | None:
        self.asked += 1
        if self.asked == 2 and SIGNALS:
            signal.raise_signal(SIGNALS.pop(0))
            return None
        if self.asked > (5 if self.deaf else 1) and self.poll_ is None:
            for name, text in self.files.items():
                (self.directory / name).write_text(text)
            self.poll_ = self.returncode
        return self.poll_

    def send_signal(self, number: int) -> None:
        self.heard.append(number)


class Forked(Process):
    """What `dpo.sweep.forks` starts: never a run of several processes, nor one that may use a GPU."""

    def __init__(self, directory: Path, environment: dict[str, str], log: Path | None) -> None:
        super().__init__(["fork", str(directory)], env=environment, stdout=log)


STARTED: list[Process] = []
SIGNALS: list[int] = []  # that the planner gets while its first process runs
ENDS: dict[str, tuple[int, dict[str, str], bool]] = {}  # run -> exit code, files that it leaves, deaf


def reason(kind: str, message: str) -> dict[str, str]:
    return {"error.json": json.dumps({"type": kind, "message": message})}


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    for kept in (STARTED, SIGNALS):
        kept.clear()
    ENDS.clear()
    monkeypatch.setattr(launch.subprocess, "Popen", Process)
    monkeypatch.setattr(launch, "Fork", Forked)
    monkeypatch.setattr(launch.time, "sleep", lambda _: None)
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda _: range(12))
    monkeypatch.setattr(tables, "figure", lambda *_: None)
    for variable in (*launch.THREADS, "CUDA_VISIBLE_DEVICES", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.delenv(variable, raising=False)
    heard = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # of which nohup, or a shell's background, has some ignored
    former = {number: signal.signal(number, signal.default_int_handler) for number in heard}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


def planned(folder: Path, *names: str, **config: Any) -> list[Run]:
    settings = {"id": "0", "command": "train", "beta": 0.1, "processes": 1, "device": "cpu", **config}
    return [Run(folder / name, settings | {"seed": number}, name) for number, name in enumerate(names)]


def test_what_is_to_do(tmp_path, capsys):
    """What is finished or damaged is not started; what another process has waits, and is no success."""
    todo = planned(tmp_path, "new", "finished", "damaged", "failed", "stopped", "running")
    for name in ("finished", "damaged", "failed", "stopped", "running"):
        Run(tmp_path / name, todo[0].config, name).freeze()
    (tmp_path / "finished" / "evaluation.json").write_text(FINISHED)
    (tmp_path / "damaged" / "evaluation.json").write_text("{")
    (tmp_path / "failed" / "error.json").write_text(reason("ValueError", "no")["error.json"])
    (tmp_path / "stopped" / "metrics.jsonl").write_text('{"step": 1, "split": "train"}\n')
    before = (tmp_path / "running" / "config.yaml").read_bytes()
    with FileLock(tmp_path / "running" / ".lock"):
        assert Execution(todo, 1, [], results.report).run() == 1
    assert [one.directory.name for one in STARTED] == ["new", "failed", "stopped"]
    assert [one.status for one in STARTED] == ["planned", "planned", "stopped"]
    assert not any(one.error for one in STARTED)  # the reason of a former attempt is gone
    assert (tmp_path / "running" / "config.yaml").read_bytes() == before
    assert results.configs(tmp_path)["stopped"]["seed"] == 4  # frozen as it is planned now
    said = capsys.readouterr()
    assert f"{tmp_path}: 6 runs: 1 finished, 4 to do\n" in said.out
    assert "[4/4] running is being executed by another process" in said.out
    assert f"not finished: damaged: {tmp_path / 'damaged' / 'evaluation.json'} must hold" in said.err
    assert "not finished: running: another process is executing it\n" in said.err
    assert said.err.count("not finished") == 2


@pytest.mark.parametrize(
    "code,files,said,verdict",
    [
        (1, reason("RuntimeError", "the world is bad"), "RuntimeError: the world is bad", "failed"),
        (75, reason("Stopped", "stopped at step 3"), "stopped at step 3", "ended early"),
        (73, reason("RuntimeError", "of the other"), "another process is executing it", "failed"),
        (-9, {}, "Killed: killed by signal 9 (out of memory?)", "failed"),
        (-15, {}, "Killed: killed by signal 15", "failed"),
        (3, {}, "Ended: exit code 3, and it did not say why", "failed"),
        (0, {}, "Ended: exit code 0, and it did not say why", "failed"),
    ],
)
def test_why_a_run_is_not_finished(tmp_path, capsys, code, files, said, verdict):
    ENDS["bad"] = code, files, False
    assert Execution(planned(tmp_path, "bad", "good"), 1, [], results.report).run() == 1
    told = capsys.readouterr()
    assert told.err == f"not finished: bad: {said}\n"
    assert f"[1/2] bad {verdict} after 0 s: {said}\n" in told.out
    assert "[2/2] good finished in 0 s" in told.out
    if not files:
        assert results.reason(tmp_path / "bad") == said  # for the next who asks


def test_all_finished_is_success(tmp_path, capsys):
    assert Execution(planned(tmp_path, "a", "b"), 5, [], results.report).run() == 0
    assert Execution(planned(tmp_path, "a", "b"), 5, [], results.report).run() == 0
    assert len(STARTED) == 2
    assert "2 runs: 2 finished, 0 to do" in capsys.readouterr().out


@pytest.mark.parametrize("numbers,sent", [([signal.SIGINT], signal.SIGINT), ([signal.SIGHUP], signal.SIGTERM)])
def test_a_signal_stops_what_runs_and_starts_no_more(tmp_path, capsys, monkeypatch, numbers, sent):
    ended: list[tuple[int, int]] = []
    monkeypatch.setattr(launch.os, "killpg", lambda pid, number: ended.append((pid, number)))
    ENDS["a"] = 75, {}, True
    SIGNALS[:] = numbers
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert Execution(planned(tmp_path, "a", "b", "c"), 1, [], results.report).run() == 128 + numbers[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    assert [(one.directory.name, one.heard) for one in STARTED] == [("a", [sent])]
    said = capsys.readouterr()
    assert "stopped, 2 runs not started; the same command resumes" in said.out
    assert said.err == "not finished: a: stopped before it could say where\n"
    assert not ended


def test_a_place_that_is_free_after_a_signal_stays_free(tmp_path, capsys):
    ENDS["a"], ENDS["b"] = (75, {}, True), (75, {}, False)  # b ends while a still saves
    SIGNALS[:] = [signal.SIGINT]
    assert Execution(planned(tmp_path, "a", "b", "c"), 2, [], results.report).run() == 128 + signal.SIGINT
    assert [one.directory.name for one in STARTED] == ["a", "b"]
    assert "stopped, 1 run not started; the same command resumes" in capsys.readouterr().out


def test_the_end_of_a_silent_run_is_told_where_the_disk_is_full(tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert launch._silent(tmp_path, -9) == "Killed: killed by signal 9 (out of memory?)"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("jobs", [1, 2])
def test_runs_side_by_side_have_a_bar(tmp_path, monkeypatch, capsys, jobs):
    """One alone has the terminal to itself. What is said is said as ever."""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    seconds = itertools.count(2, 2)
    monkeypatch.setattr(launch.time, "monotonic", lambda: float(next(seconds)))  # so it is drawn again at each look
    assert Execution(planned(tmp_path, "a", "b", "c"), jobs, [], results.report).run() == 0
    drawn = re.findall(r"\d/3 runs ended \[00:00.*?\]", terminal.getvalue())
    assert ("0/3 runs ended [00:00, a:; b:]" in drawn) == ("2/3 runs ended [00:00, c:]" in drawn) == (jobs == 2)
    assert bool(drawn) == (jobs == 2)
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if "started" in line] == [
        f"[{n}/3] {name} started" for n, name in enumerate("abc", 1)
    ]


def test_how_far_a_run_is(tmp_path):
    assert launch.stage(tmp_path / "beta=1") == "beta=1"
    (tmp_path / "beta=1").mkdir()
    (tmp_path / "beta=1" / "log.txt").write_text("")
    assert launch.stage(tmp_path / "beta=1") == "beta=1:"
    text = "x" * 500 + "\npolicy: world\ntraining:  70% 69/99 [00:10<00:04,  6.87it/s, loss=0.552]\n"
    (tmp_path / "beta=1" / "log.txt").write_text(text)
    assert launch.stage(tmp_path / "beta=1") == "beta=1: training: 70% 69/99"


@pytest.mark.parametrize(
    "command,overrides,jobs",
    [
        ("train", [], 8),
        ("train", ["processes=5"], 2),
        ("train", ["processes=16"], 1),
        ("train", ["processes=2", "threads=3"], 2),
        ("sft", [], 8),
        ("train", ["data=file", "data.path=pairs.jsonl"], 8),
        ("train", ["policy=base"], 8),
        ("evaluate", ["policy.path=tiny", "against=tiny"], 8),
        ("evaluate", ["policy.path=tiny", "against=large"], 0),
        ("train", ["policy=pythia_410m"], 0),
        ("sft", ["policy=pythia_410m"], 0),
        ("train", ["policy.path=tiny", "reference=other", "reference.path=tiny"], 8),
        ("train", ["reference=other", "reference.path=large"], 0),
        ("train", ["reference=world_tuned"], 0),  # a folder that is to be made
        *(
            ("train", [one], 0)
            for one in (
                *("policy.path=/models/sft", "scorer=ray", "scorer=vllm", "engine=ray", "judge=pairwise"),
                *("judge=reward_model", "judge@evaluation.judge=pairwise", "engine@evaluation.engine=vllm"),
                *("evaluation.baseline=/models/big", "+judge.model=/models/rm"),
            )
        ),
    ],
)
def test_what_runs_side_by_side_unless_told(tmp_path, command, overrides, jobs, monkeypatch):
    """One run a core, of 12, but at most 8, of those that load small models alone; one at a time of all others (0)."""
    monkeypatch.chdir(tmp_path)
    for folder, size in (("tiny", 10), ("large", 51_000_000)):
        (tmp_path / folder).mkdir()
        with open(tmp_path / folder / "model.safetensors", "wb") as file:
            file.truncate(size)
    more = ["judge.path=/models/reward"] if "judge=reward_model" in overrides else []
    config = resolve(compose(command, *overrides, *more))
    todo = [Run(tmp_path / name, config, name) for name in "ab"]
    assert launch.side_by_side(todo, []) == jobs
    assert launch.side_by_side(todo, ["0"]) == 0
    monkeypatch.setattr(launch.gpus, "visible", list)
    begun: list[Any] = []

    def executed(*given: Any, threads: int | None = None) -> Any:
        begun.append((given[1], threads))
        return SimpleNamespace(run=int)

    monkeypatch.setattr(launch, "Execution", executed)
    assert (Local(None).start(todo), Local(3).start(todo)) == (0, 0)
    assert begun == [(max(1, jobs), 1 if jobs else None), (3, None)]


@pytest.mark.parametrize("left", [1, 2, 3])
def test_a_run_that_is_resumed_has_as_many_threads(tmp_path, left):
    """However many others are left."""
    todo = planned(tmp_path, *"abc"[:left], device="cpu")
    assert Local(None).start(todo) == 0
    assert [one.how["env"][launch.THREADS[0]] for one in STARTED] == ["1"] * left


def test_a_second_signal_ends_them_at_once(tmp_path, monkeypatch):
    ended: list[tuple[int, int]] = []
    monkeypatch.setattr(launch.os, "killpg", lambda pid, number: ended.append((pid, number)))
    ENDS["a"] = ENDS["b"] = 75, {}, True
    SIGNALS[:] = [signal.SIGTERM, signal.SIGINT]
    assert Execution(planned(tmp_path, "a", "b"), 2, [], results.report).run() == 128 + signal.SIGTERM
    assert [one.heard for one in STARTED] == [[signal.SIGTERM]] * 2
    assert ended == [(one.pid, signal.SIGKILL) for one in STARTED]


def test_threads_and_gpus_are_divided(tmp_path, monkeypatch):
    todo = planned(tmp_path, "a", "b", "c", processes=2, device="auto")
    Execution(todo, 2, ["3", "5", "7"], results.report).run()
    environments = [one.how["env"] for one in STARTED]
    assert {one[name] for one in environments for name in launch.THREADS} == {"3"}  # 12 cores, 2 jobs, 2 processes
    assert [one["CUDA_VISIBLE_DEVICES"] for one in environments[:2]] == ["3,5", "7,3"]
    assert environments[2]["CUDA_VISIBLE_DEVICES"] in ("3,5", "7,3")  # of the place that is free first
    assert {one["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] for one in environments} == {"600"}
    assert [one.beside for one in STARTED[:2]] == [0, 1]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dpo.sweep.execute"]
    assert [one.command[1:-1] for one in STARTED] == [torchrun] * 3
    assert {one.how["start_new_session"] for one in STARTED} == {True}
    assert {one.how["stdin"] for one in STARTED} == {subprocess.DEVNULL}
    logs = [Path(one.how["stdout"].name) for one in STARTED]
    assert logs == [one.directory / "log.txt" for one in STARTED]
    STARTED.clear()
    monkeypatch.setenv("OMP_NUM_THREADS", "9")  # the user's own
    Execution(planned(tmp_path, "d", "e", "f", processes=1, device="cpu")[:1], 7, ["3"], results.report).run()
    [alone] = STARTED
    assert (alone.how["env"]["OMP_NUM_THREADS"], alone.how["env"]["MKL_NUM_THREADS"]) == ("9", "12")
    assert "CUDA_VISIBLE_DEVICES" not in alone.how["env"]
    assert alone.how["stdout"] is None  # the only one speaks for itself
    STARTED.clear()
    Execution(planned(tmp_path, *"ghijklmn", processes=2), 8, [], results.report).run()
    assert {one.how["env"]["MKL_NUM_THREADS"] for one in STARTED} == {"1"}  # at least one


@pytest.mark.parametrize(
    "config,gpus,forked",
    [
        ({}, [], True),
        ({"device": "auto"}, [], True),  # of a machine without a GPU
        ({"device": "auto"}, ["0"], False),
        ({"processes": 2}, [], False),
    ],
)
def test_runs_of_a_cpu_are_forked(tmp_path, config, gpus, forked):
    todo = planned(tmp_path, "a", "b", **config)
    Execution(todo, 1, gpus, results.report).run()
    assert [isinstance(one, Forked) for one in STARTED] == [forked] * 2
    assert {one.how["env"]["MKL_NUM_THREADS"] for one in STARTED} == {"6" if config.get("processes") == 2 else "12"}
    if gpus:
        for one in STARTED:
            assert one.command == [sys.executable, "-m", "dpo.sweep.execute", str(one.directory)]
            assert one.how["start_new_session"]
            assert one.how["stdin"] == subprocess.DEVNULL


def test_what_cannot_be_started_here(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0, ,-1,2")
    assert launch.gpus.visible() == ["0", "2"]
    for processes, device, jobs, problems in (
        (2, "auto", 1, 0),
        (3, "auto", 1, 1),
        (3, "cpu", 1, 0),
        (1, "auto", 0, 1),
        (3, "cuda", 0, 2),
    ):
        todo = planned(tmp_path, "a", processes=processes, device=device)
        assert len(Local(jobs).problems(todo)) == problems, (processes, device, jobs)
    several = planned(tmp_path, "a", processes=1) + planned(tmp_path, "b", processes=9, device="auto")
    assert "at most the 2 GPUs, got 9" in Local(1).problems(several)[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Local(1).problems(several) == []


def test_a_gpu_that_is_asked_for_must_be_here(tmp_path, monkeypatch):
    """Torch counts them, since nvidia-smi knows of none of AMD. What is finished is shown on any machine."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    seen: list[int] = []
    monkeypatch.setattr(launch.gpus, "ask", lambda *_: seen[0])
    for there, wide, refused in ((0, 1, True), (1, 1, False), (1, 2, True), (2, 2, False)):
        seen[:] = [there]
        mixed = planned(tmp_path, "a") + planned(tmp_path, "b", device="cuda", processes=wide)
        problems = Local(1).problems(mixed)
        assert len(problems) == refused, (there, wide)
    seen[:] = [0]
    [alone] = Local(1).problems(planned(tmp_path, "a", device="cuda"))
    assert alone.startswith("device=cuda must have 1 GPU that torch sees here, found 0; use device=cpu")
    monkeypatch.setattr(launch, "status", lambda _: "finished")
    assert Local(1).problems(planned(tmp_path, "a", device="cuda")) == []


def test_the_exit_code_is_that_of_what_was_started(tmp_path, monkeypatch, capsys):
    """One run that is refused keeps all from being started."""
    good, started = planned(tmp_path, "a"), []
    monkeypatch.setattr(Local, "start", lambda _, runs_: started.append(runs_) or 7)
    for refused, more, jobs, code in (([], [], 1, 7), ([Refused(["beta=1"], "no")], [], 1, 1), ([], ["x"], 1, 1)):
        monkeypatch.setattr(launch, "plan", lambda _, more=more: (good, [Refused([], one) for one in more]))
        with pytest.raises(SystemExit) as ended:
            Local(jobs).execute([], refused)
        assert ended.value.code == code
    monkeypatch.setattr(launch, "plan", lambda _: (good, []))
    for jobs in ("two", 0):
        with pytest.raises(SystemExit) as ended:
            Local(jobs).execute([], [])  # type: ignore[arg-type]
        assert ended.value.code == 1
    assert started == [good]
    said = capsys.readouterr().err
    assert "\nbeta=1\n  no\n" in said
    assert "\nthis command\n  x\n" in said
    assert "hydra.launcher.jobs must be int | None, got 'two'" in said


def test_a_reason_is_said_once_with_the_first_that_has_it(capsys):
    launch._list([Refused(["a=1", "b=2"], "no\nnever"), Refused(["c=3"], "why"), Refused(["d=4"], "no\nnever")])
    said = "nothing was started:\n\na=1 b=2 (and 1 more)\n  no\n  never\n\nc=3\n  why\n"
    assert capsys.readouterr().err == said


class Taken(Exception):
    pass


def combinations(*arguments: str, params: dict[str, str] | None = None) -> list[list[str]]:
    class Launcher:
        def launch(self, overrides: list[list[str]], first: int) -> None:
            assert first == 0
            raise Taken(overrides)

    grid = Grid(params)
    grid.parser, grid.launcher = OverridesParser.create(), Launcher()  # type: ignore[assignment]
    with pytest.raises(Taken) as taken:
        grid.sweep(list(arguments))
    return taken.value.args[0]


def test_every_combination_of_the_values_given():
    assert combinations("beta=0.1,0.2", "lr=1", "seed=range(2)") == [
        ["beta=0.1", "lr=1", "seed=0"],
        ["beta=0.1", "lr=1", "seed=1"],
        ["beta=0.2", "lr=1", "seed=0"],
        ["beta=0.2", "lr=1", "seed=1"],
    ]
    own = {"beta": "0.1,0.2", "lr": "1"}  # those of an experiment are below what the command line says
    assert combinations("beta=0.5", "lr=2,3", params=own) == [["beta=0.5", "lr=2"], ["beta=0.5", "lr=3"]]
    assert combinations("beta=1,2", "beta=3") == [["beta=3"]]
    tenths = [[f"beta={value}"] for value in (-0.1, 0, 0.1, 0.2, 0.3)]  # as they are written, and as others are named
    assert combinations("beta=range(-0.1,0.35,0.1)") == tenths
    assert combinations("beta=sort(range(-0.1,0.35,0.1))") == tenths
    assert combinations("beta=range(1e-5,3e-5,1e-5)") == [["beta=1e-05"], ["beta=2e-05"]]
    assert combinations(f"seed=range({launch.MOST})")[-1] == ["seed=9999"]
    with pytest.raises(ConfigCompositionException, match="at most 10000 runs; seed has 10001 values"):
        combinations("seed=range(10001)")
    with pytest.raises(ConfigCompositionException, match="beta must be a list of values, like beta=1,2,3"):
        combinations("beta=interval(0,1)")


def test_what_is_swept_names_the_runs(monkeypatch):
    """What differs between the combinations, and what an experiment sweeps though the command line fixes it."""
    taken: list[Any] = []

    class Loader:
        def get_group_options(self, key: str) -> list[str]:
            return ["initial", "uniform"] if key == "reference" else []

        def load_sweep_config(self, config: Any, overrides: list[str]) -> Any:
            if "+beta=bad" in overrides:
                raise ConfigCompositionException("no such value")
            return OmegaConf.create({"hydra": {"runtime": {"choices": CHOICES}, "overrides": {"task": overrides}}})

    sweep = Sweep()
    sweep.loader = Loader()  # type: ignore[assignment]
    sweep.config = OmegaConf.create({"hydra": {"sweeper": {"params": {"reference": "initial,uniform"}}}})
    monkeypatch.setattr(Sweep, "execute", lambda _, composed, refused: taken.extend((composed, refused)))
    sweep.launch([[f"+beta={beta}", "lr=1"] for beta in (1, 2)] + [["+beta=bad", "lr=1"], ["loss=null", "lr=1"]], 0)
    composed, refused = taken
    assert [one.overrides for one in composed] == [["+beta=1", "lr=1"], ["+beta=2", "lr=1"]]
    assert {one.swept for one in composed} == {frozenset({"beta", "reference"})}
    assert [one.choices for one in composed] == [{"loss": "dpo", "reference": "initial"}] * 2
    assert [(one.overrides[0], one.reason.split(";")[0]) for one in refused] == [
        ("+beta=bad", "no such value"),
        ("loss=null", "loss must be one of its options, got null"),
    ]
    taken.clear()
    sweep.launch([["beta=1", "lr=1"]], 0)
    assert taken[0][0].swept == frozenset({"reference"})
    assert isinstance(taken[0][0], Composed)


CHOICES = {"loss": "dpo", "reference": "initial", "figure": "kl", "table": None, "hydra/launcher": "local"}
