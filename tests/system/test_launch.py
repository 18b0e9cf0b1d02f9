"""Sweeps of a stand-in verb, in processes as users start them: plan, refuse, run, skip, fail, stop, resume."""

import argparse
import compileall
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from composing import composed
from filelock import FileLock
from omegaconf import OmegaConf

import dpo
from dpo import results
from dpo.sweep import command_line, launch
from dpo.sweep import execute as executing
from dpo.sweep.identity import identity
from dpo.sweep.plan import Folder, Run, _given, name, plan, resolve

ROOT = Path(dpo.__file__).parents[1]

# Fails at beta 0.66, is killed at 0.67; works until a file `finish` appears when it is to be stopped.
VERB = '''
import json, os, signal, time

class Stopped(KeyboardInterrupt):
    """As that of dpo.training.loop."""

def run(config, directory):
    rank = int(os.environ.get("RANK", "0"))
    print("threads", os.environ.get("OMP_NUM_THREADS"), "gpus", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
    if config.beta == 0.66 and not os.path.exists("mended"):
        raise RuntimeError("the world is bad")
    if config.beta == 0.67 and not os.path.exists("mended"):
        os.kill(os.getpid(), signal.SIGKILL)
    if config.beta == 0.68:
        if rank == 1:
            raise RuntimeError("rank 1 is bad")
        time.sleep(600)  # until torchrun ends it because of rank 1
    (directory / f"here-{rank}").touch()
    while len(list(directory.glob("here-*"))) < int(os.environ.get("WORLD_SIZE", "1")):
        time.sleep(0.01)  # as in a collective: none is finished before all have begun
    metrics = directory / "metrics.jsonl"
    first = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    received = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: received.append(1))
    for step in range(first, config.steps or 1):
        if rank == 0:
            with open(metrics, "a") as file:
                file.write(json.dumps({"step": step, "split": "train", "loss": 0.69}) + "\\n")
        if config.steps and not os.path.exists("finish"):
            time.sleep(0.02)
        if received and rank == 1 and config.beta == 0.69:  # slow to end
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(600)
        if received:
            raise Stopped(f"stopped at step {step + 1}; the same command resumes there")
    if rank == 0:
        result = {"win_rate": 0.6, "win_rate/low": 0.5, "win_rate/high": 0.7, "kl": 1 / config.beta, "kl/se": 0.1}
        (directory / "evaluation.json").write_text(json.dumps({**result, "steps": 1}))

if __name__ == "__main__":
    from dpo.sweep import launch

    launch.command("train")
'''
ENGINES = """
from dpo.policy.sampling import Sample

def transformers(model, tokenizer, prompts, places, sampling, seed, title) -> list[Sample]: ...
"""
PAIRS = """
class Loss: ...
def try_out(loss): ...
def asked_by(loss): return ()
OF_REFERENCE = ()
"""
REFERENCES = """
class Initial:
    check = prepare = None
    def __init__(self): ...
class Frozen: ...
class PrecomputedFiles: ...
def scored_ahead(pending): ...
"""
LOSSES = """
from dpo.losses.pairs import Loss

def dpo(pair, beta: float, label_smoothing: float) -> Loss: ...
def hinge(pair, beta: float) -> Loss: ...
"""
WORLD = """
from dpo.data.records import Dataset, Demonstration

def world(summaries, demonstrations: int, train: int, validation: int, test: int, seed: int) -> Dataset:
    return Dataset([Demonstration("an article", "a summary")], {}, {"train": [str(seed)]})
"""
MADE = """
from pathlib import Path
from dpo.world import sizes

def pretrained(base, cache, device):
    print("makes", base, "for", device, flush=True)
    Path(sizes.place(base, cache)).mkdir(parents=True)
"""
NOUNS = {
    "losses/__init__": LOSSES,
    "losses/pairs": PAIRS,
    "judges": "def gold(prompts, responses) -> list[dict[str, float]]: ...",
    "engines": ENGINES,
    "references": REFERENCES,
    "world/language": WORLD,
    "world/pretrain": MADE,
    "data/__init__": "",
    "data/batches": "def check_prompts(*given): ...",
    "data/chats": "def turn(tokenizer): ...",
    "data/tokens": "def end_of_turn(tokenizer): ...",
    "policy/__init__": "",
    "policy/folder": "def check_adapter(path): ...",
    "policy/sampling": "class Sample: ...",
    "policy/scoring": "class Scoring: ...",
    "policy/lora": "class Lora: ...\ndef check_fits(*given): ...",
    "policy/model": "class ModelSpec:\n    def __init__(self, *given): ...\n"
    "def resolve_path(path): return path\ndef ask_hub(path): ...\n"
    "def check_lora(*given): ...\ndef without_weights(spec): ...\n"
    "class Tokenizer: chat_template = None\ndef load_tokenizer(spec): return Tokenizer\n"
    "def check_length(*given): ...\ndef check_template(template): ...\n"
    "def check_same_tokenizer(*given): ...",
    "results/figures": "def draw(frame, path, column): path.touch()",
    "train": VERB,
}
PROJECT = (
    *(
        "__init__.py",
        "bill.py",
        "cache.py",
        "cores.py",
        "data/lazy.py",
        "data/records.py",
        "data/texts.py",
        "data/sources.py",
        "data/instructions.py",
    ),
    "world/sizes.py",
    *("sweep/*.py", "results/*.py"),
)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A copy of the project whose nouns and verb are stand-ins without torch, compiled."""
    folder = tmp_path_factory.mktemp("tree")
    for part in ("conf", "hydra_plugins"):
        shutil.copytree(ROOT / part, folder / part)
    launcher = folder / "conf" / "hydra" / "launcher" / "local.yaml"
    launcher.write_text(launcher.read_text().replace("jobs: null", "jobs: 1"))  # however many cores there are
    texts = {file.relative_to(ROOT / "dpo"): file.read_text() for one in PROJECT for file in (ROOT / "dpo").glob(one)}
    for path, text in {**texts, **{Path(f"{module}.py"): text for module, text in NOUNS.items()}}.items():
        file = folder / "dpo" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    compileall.compile_dir(folder, quiet=1)
    return folder


@pytest.fixture
def tree(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `built` for one test."""
    for variable in (*launch.THREADS, "CUDA_VISIBLE_DEVICES", "PYTHONPATH"):
        monkeypatch.delenv(variable, raising=False)
    return shutil.copytree(built, tmp_path, dirs_exist_ok=True)


def start(tree: Path, *arguments: str, verb: str = "train") -> subprocess.Popen[str]:
    def interruptible() -> None:  # SIGINT is ignored in what a shell starts in its background, and that is inherited
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, "-m", f"dpo.{verb}", *arguments],
        cwd=tree,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=interruptible,
    )


def said(tree: Path, *arguments: str, verb: str = "train", code: int) -> str:
    process = start(tree, *arguments, verb=verb)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == code, text
    return text


def wait_for(path: Path) -> None:
    until = time.monotonic() + 600
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.02)


def states(folder: Path) -> dict[str, str]:
    return {path.parent.name: results.status(path.parent) for path in sorted(folder.glob("*/config.yaml"))}


@pytest.mark.long
def test_the_first_run_makes_the_base_model_that_is_not_there(tree):
    tiny = tree / "dpo/world/base/model.safetensors"  # from which it is grown
    tiny.parent.mkdir()
    tiny.write_text("weights")
    sweep = ["-m", "policy=small", "beta=0.01,0.1", "device=cpu"]
    text = said(tree, *sweep, code=0)
    assert re.search(
        "\nworld_small is not in cache/base: the first run that needs it makes it, about \\d+ min", f"\n{text}"
    )
    assert text.count("makes world_small for cpu") == text.count("world_small is not in") == 1
    assert text.index("is not in") < text.index("started") < text.index("makes world") < text.index("finished in")
    assert "world_small" not in said(tree, *sweep, "seed=1", code=0)
    assert "world_small" not in said(tree, "policy=small", "policy.path=.", "cache=other", code=0)
    assert not (tree / "other").exists()


def test_sweep(tree):
    before = {path.name for path in tree.iterdir()}
    sweep = ["-m", "beta=0.01,0.10,1e-1,0.66,0.67", "hydra.launcher.jobs=2", "device=cpu"]
    text = said(tree, *sweep, code=1)
    folder = tree / "runs" / "dev"
    assert "runs/dev: 4 runs: 0 finished, 4 to do" in text
    assert states(folder) == {"beta=0.01": "finished", "beta=0.1": "finished"} | {
        "beta=0.66": "failed",
        "beta=0.67": "failed",
    }
    assert "not finished: beta=0.66: RuntimeError: the world is bad  (runs/dev/beta=0.66/log.txt)" in text
    assert "not finished: beta=0.67: Killed: killed by signal 9 (out of memory?)" in text
    assert {path.name for path in tree.iterdir()} - before == {"runs"}  # nothing of Hydra's
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert (folder / "beta=0.01" / "log.txt").read_text() == f"threads {threads} gpus None\n"
    assert "10.00 [9.80, 10.20]" in text
    assert len((folder / "table.csv").read_text().splitlines()) == 3
    assert (folder / "figure.png").exists()
    error = json.loads((folder / "beta=0.66" / "error.json").read_text())
    assert error["type"] == "RuntimeError"
    assert "in run" in error["traceback"]

    (tree / "mended").touch()
    frozen = (folder / "beta=0.01" / "config.yaml").read_bytes()
    text = said(tree, "-m", "beta=0.01,0.66,0.67,0.5", code=0)  # another beta, another number of jobs
    assert "runs/dev: 4 runs: 1 finished, 3 to do" in text
    assert set(states(folder).values()) == {"finished"}
    assert not (folder / "beta=0.66" / "error.json").exists()
    assert (folder / "beta=0.01" / "config.yaml").read_bytes() == frozen
    assert "runs/dev: 5 runs: 5 finished" in said(tree, "runs/dev", verb="results", code=0)
    text = said(tree, "beta=0.5", code=0)
    assert "runs/dev: 1 run: 1 finished, 0 to do" in text
    assert "started" not in text
    assert "5 finished in runs/dev" in text


def test_a_refused_grid_starts_nothing(tree):
    text = said(tree, "-m", "beta=0.01,weak,-1", "seed=0,1", code=1)
    assert "beta=weak seed=0 (and 1 more)" in text
    assert "beta must be float, got 'weak'" in text
    assert "beta=-1 seed=0 (and 1 more)" in text
    assert "beta must be above 0, got -1.0" in text
    assert "Traceback" not in text
    text = said(tree, "loss.label_smoothing=much", "hydra.launcher.jobs=0", code=1)
    assert "loss.label_smoothing must be float, got 'much'" in text
    assert "hydra.launcher.jobs must be a whole number above 0, got 0" in text
    assert "got dop; did you mean dpop?" in (text := said(tree, "loss=dop", code=1))
    assert "Traceback" not in text
    assert not (tree / "runs").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_stop_and_resume(tree, number):
    run = tree / "runs" / "dev" / "steps=2000"
    process = start(tree, "steps=2000", "device=cpu")
    wait_for(run / "metrics.jsonl")
    assert results.status(run) == "running"
    assert "is being executed by another process" in said(tree, "steps=2000", "device=cpu", code=1)
    process.send_signal(number)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + number, text
    assert "the same command resumes" in text
    assert results.status(run) == "stopped"
    assert (results.reason(run) or "").startswith("stopped at step")
    if number == signal.SIGTERM:  # by hand, as a job of a cluster's queue does
        process = start(tree, str(run), verb="sweep.execute")
        before = (run / "metrics.jsonl").stat().st_size
        while (run / "metrics.jsonl").stat().st_size == before:
            time.sleep(0.02)
        process.send_signal(number)
        process.communicate(timeout=600)
        assert process.returncode == 75
        return
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    (tree / "finish").touch()
    text = said(tree, "steps=2000", "micro_batch_tokens=512", code=0)
    assert results.status(run) == "finished"
    rows = [json.loads(row)["step"] for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(2000))
    assert steps < 2000
    assert OmegaConf.load(run / "config.yaml").micro_batch_tokens == 512


@pytest.mark.parametrize("error,code", [(KeyboardInterrupt, executing.STOPPED), (RuntimeError, executing.FAILED)])
def test_a_signal_while_it_ends(tmp_path, monkeypatch, error, code):
    def ended(*_):
        raise error

    (tmp_path / "config.yaml").write_text("beta: 0.1\n")
    monkeypatch.setattr(executing, "_frozen", lambda file: {"command": "train", "threads": 1})
    monkeypatch.setattr(executing, "_checked", lambda values, file: None)
    monkeypatch.setattr("dpo.train.run", ended)
    monkeypatch.setattr(executing, "_record", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    former = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        assert executing.execute(tmp_path) == code
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@pytest.mark.long
def test_processes_under_torchrun(tree):
    text = said(tree, "-m", "beta=0.5,0.68", "processes=2", "device=cpu", "hydra.launcher.jobs=2", code=1)
    assert states(tree / "runs" / "dev") == {"beta=0.5": "finished", "beta=0.68": "failed"}
    assert "beta=0.68: RuntimeError: rank 1 is bad" in text
    threads = max(1, len(os.sched_getaffinity(0)) // 4)
    assert (tree / "runs/dev/beta=0.5/log.txt").read_text().count(f"threads {threads} ") == 2


def test_gpus_are_divided(tree, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    said(tree, "-m", "beta=0.1,0.2", "hydra.launcher.jobs=2", "threads=3", code=0)
    logs = {path.read_text() for path in (tree / "runs").glob("*/*/log.txt")}
    assert logs == {"threads 3 gpus 3\n", "threads 3 gpus 5\n"}
    assert "processes must be at most the 2 GPUs, got 4" in said(tree, "processes=4", code=1)


@pytest.mark.long
def test_run_by_hand(tree):
    said(tree, "beta=0.66", code=1)
    run = tree / "runs" / "dev" / "beta=0.66"
    with FileLock(run / ".lock"):
        text = said(tree, str(run), verb="sweep.execute", code=73)
    assert "is being executed by another process" in text
    assert (run / "error.json").exists()  # of the former attempt: not ours to touch
    text = said(tree, str(run), verb="sweep.execute", code=1)
    assert f"RuntimeError: the world is bad (traceback: {run}/error.json)" in text
    assert "Traceback (" not in text
    (tree / "mended").touch()
    said(tree, str(run), verb="sweep.execute", code=0)
    assert not (run / "error.json").exists()
    assert "is finished" in said(tree, str(run), verb="sweep.execute", code=0)
    assert "must hold a config.yaml" in said(tree, "nowhere", verb="sweep.execute", code=1)


def test_data_are_parsed_once_before_any_run(tree):
    """A bad file is said once for all runs of it, and every bad file is."""
    good, pair = '{"prompt": "%d", "chosen": "yes", "rejected": "no"}\n', '{"prompt": "a", "chosen": "b"}\n'
    rows = [good % n for n in range(40)]
    (tree / "one.jsonl").write_text("".join(rows[:3]) + pair + "[]\n")
    (tree / "other.jsonl").write_text("".join(rows) + "{\n")
    sweep = ["-m", "beta=0.1,0.2,0.3", "data=file", "data.path=one.jsonl,other.jsonl", "policy.path=m"]
    text = said(tree, *sweep, code=1)
    assert text.count("line 4: must have prompt, chosen and rejected; found no rejected") == 1
    assert text.count("line 5: must be a JSON object, found a list") == 1
    assert text.count("other.jsonl: 1 of 41 lines are no records") == 1
    assert text.count("(and 2 more)") == 2
    assert not (tree / "runs").exists()


@pytest.mark.long
def test_a_run_is_finished_with_the_inputs_that_it_had(tree):
    rows = [{"prompt": str(n), "chosen": "yes", "rejected": "no"} for n in range(40)]

    def write(rows):
        (tree / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    (tree / "m").mkdir()
    (tree / "m/model.safetensors").write_bytes(200_000 * b"0")
    sweep = ["-m", "beta=0.1,0.66", "data=file", "data.path=pairs.jsonl", "policy.path=m", "name=own", "device=cpu"]
    write(rows)
    assert "not finished: beta=0.66" in said(tree, *sweep, code=1)
    assert states(tree / "runs/own") == {"beta=0.1": "finished", "beta=0.66": "failed"}
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    write([*swapped[:1], *rows[1:]])
    text = said(tree, *sweep, code=1)
    assert "runs/own holds runs of these settings, but the data is not what they were made from" in text
    assert "use another name=..., or move these runs away: beta=0.1\n" in text  # the other has made nothing yet
    assert "started" not in text.replace("nothing was started", "")
    write(rows)
    (tree / "m/model.safetensors").write_bytes(199_999 * b"0" + b"1")
    assert "but the model at policy.path or policy.base is not what they were" in said(tree, *sweep, code=1)
    (tree / "m/model.safetensors").write_bytes(200_000 * b"0")
    (tree / "m/README.md").write_text("read by nobody")
    assert "2 runs: 1 finished, 1 to do" in said(tree, *sweep, code=1)


def test_a_huge_sweep_is_refused(tree):
    text = said(tree, "-m", "seed=range(1000000000000)", "beta=0.1,0.2", code=1)
    assert "a sweep must have at most 10000 runs; seed has 10001, beta has 2 values: sweep in parts" in text


def test_python_does_not_look_into_hydras_help(monkeypatch):
    """3.14 does by `_check_help`, and refuses what is no text until it is shown."""

    def refuse(*_):
        raise ValueError("badly formed help string")

    monkeypatch.setattr(argparse.ArgumentParser, "_check_help", refuse, raising=False)
    command_line._take_hydras_help()
    parser: Any = argparse.ArgumentParser()
    parser._check_help(None)


def test_a_value_that_must_be_quoted_is_told_how(tree):
    for value in ("train[:10]", "runs/dev/beta=0.1/policy"):
        text = said(tree, f"data.split={value}", code=1)
        assert f"data.split={value} must be read whole, found what cannot be: " in text
        assert f"""is quoted twice: 'data.split="{value}"'""" in text
    text = said(tree, 'data.split="train[:10]"', code=1)  # of data without splits
    assert "must be read whole" not in text
    assert "split" in text


@pytest.mark.parametrize("mode", [[], ["-m", "beta=0.1,0.2"]])
def test_a_group_must_have_an_option(tree, mode):
    for argument in ("loss=null", "+loss=null"):
        text = said(tree, *mode, argument, code=1)
        assert f"loss must be one of its options, got null; leave out {argument}" in text
    assert "Traceback" not in text


TELL = "import atexit, sys; atexit.register(lambda: print('IMPORTED', *sys.modules, file=sys.stderr))\n"
RUN = "import runpy; sys.argv = {argv}; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"


@pytest.mark.parametrize(
    "argv",
    [
        ["dpo.train", "--help"],
        ["dpo.train", "--cfg", "job"],
        pytest.param(["dpo.sft", "-m", "seed=0,1", "hydra.launcher.jobs=0"], marks=pytest.mark.long),  # planned whole
        [],  # any application of Hydra
        ["dpo.results", "conf"],
    ],
)
def test_what_only_plans_imports_no_torch(argv):
    run = RUN.format(argv=argv) if argv else "from hydra.core.plugins import Plugins; Plugins.instance()"
    done = subprocess.run([sys.executable, "-c", TELL + run], cwd=ROOT, capture_output=True, text=True)
    imported = done.stderr.partition("IMPORTED ")[2].split()
    assert "omegaconf" in imported, done.stderr
    assert not {*imported} & {"torch", "transformers", "tokenizers"}
    assert ("pandas" in imported) == (argv[:1] == ["dpo.results"])


def test_help(tree):
    text = said(tree, "--help", code=0)
    for word in (
        "python -m dpo.train -m beta=0.01,0.1,1",
        "loss: alpha_dpo, aot",
        "reference: ema, initial",
        "hydra.launcher.jobs",
    ):
        assert word in text
    assert "beta: 0.3" in said(tree, "--cfg", "job", "beta=0.3", code=0)
    assert not (tree / "runs").exists()


# Plans, in this process and with the real configuration.


def named(*overrides: str) -> str:
    one = composed("train", *overrides)
    frozen = {**resolve(one.config), "choices": one.choices}
    return name(_given(one.overrides, frozen), "0123")


@pytest.mark.parametrize(
    "overrides,expected",
    [
        ([], "default"),
        (["beta=0.10"], "beta=0.1"),
        (["beta=1e-1"], "beta=0.1"),
        (["beta=1"], "beta=1"),
        (["lr=1e-05"], "lr=1e-05"),
        (["lr=0.00001"], "lr=1e-05"),
        (["lr=0.12345678"], "lr=0.12345678"),
        (["seed=1", "beta=0.1"], "beta=0.1,seed=1"),
        (["loss=ipo"], "loss=ipo"),
        (["adam_betas=[0.90,0.95]"], "adam_betas=[0.9,0.95]"),
        (["steps=null"], "steps=null"),
        (["loss.label_smoothing=0.1"], "loss.label_smoothing=0.1"),
        (["policy.path=/models/a b"], "policy.path=__models__a_b"),
        (["name=x", "runs=y", "cache=z", "wandb.mode=disabled", "processes=2", "micro_batch_tokens=4"], "default"),
        (["hydra.launcher.jobs=3", "beta=0.2"], "beta=0.2"),
    ],
)
def test_name(overrides, expected):
    assert named(*overrides) == expected


@pytest.mark.parametrize("letter", ["x", "é", "語"])
def test_a_long_name_is_cut_and_stays_its_own(letter):
    one, other = (name({"policy.path": 300 * letter}, id) for id in ("0" * 16, "1" * 16))
    assert one != other
    assert len(one.encode()) <= 200


class Sweeps:
    """Names that sweeps of a folder get, one after another; no file is read but those of earlier sweeps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = {**resolve(composed("train").config), "name": folder.name, "runs": str(folder.parent)}

    def __call__(self, sweep: str, swept: str = "", **defaults: Any) -> list[str]:
        """sweep: combinations of overrides, apart by |."""
        folder, names = Folder(self.folder), []
        for combination in sweep.split("|"):
            given = dict(one.split("=", 1) for one in combination.split())
            config = copy.deepcopy(self.base) | defaults
            for key, value in given.items():
                *above, last = key.split(".")
                (config[above[0]] if above else config)[last] = yaml.safe_load(value)
            overrides = [f"{key}={value}" for key, value in given.items()]
            record = {"provenance": {"overrides": overrides}, "choices": {"loss": "dpo"}}
            frozen = {"id": identity(config), **config, **record}
            names.append(folder.place(frozen, swept.split())[0])
            (self.folder / names[-1]).mkdir(parents=True, exist_ok=True)
            (self.folder / names[-1] / "config.yaml").write_text(yaml.safe_dump(frozen))
        return names


def test_a_name_holds_what_varies(tmp_path):
    sweeps, own = Sweeps(tmp_path / "runs" / "dev"), "policy.path=/models/sft steps=9"
    assert sweeps(f"beta=0.1 {own}|beta=0.2 {own}", "beta") == ["beta=0.1", "beta=0.2"]
    assert sweeps(f"beta=0.3 {own}|beta=0.1 {own}", "beta") == ["beta=0.3", "beta=0.1"]  # a beta more, later
    assert sweeps(f"beta=0.2 {own}") == ["beta=0.2"]  # without -m
    assert sweeps(f"beta=0.4 {own}") == ["beta=0.4"]
    # What the runs that are there have in common is not that of a new sweep, or of a run before any.
    assert sweeps(f"beta=0.1 {own} lr=0.25|beta=0.5 {own} lr=0.25", "beta") == ["beta=0.1,lr=0.25", "beta=0.5,lr=0.25"]
    assert sweeps(f"beta=0.1 {own}") == ["beta=0.1"]
    assert Sweeps(tmp_path / "runs" / "one")(f"beta=0.4 {own}") == ["beta=0.4,policy.path=__models__sft,steps=9"]


def test_a_name_that_another_run_has_gets_longer(tmp_path):
    sweeps = Sweeps(tmp_path / "runs" / "dev")
    assert sweeps("beta=0.1 steps=9|beta=0.2 steps=9", "beta") == ["beta=0.1", "beta=0.2"]
    assert sweeps("beta=0.1", "beta") == ["beta=0.1,steps=null"]  # what the other was given, and this one was not
    assert sweeps("beta=0.1 steps=8", "beta") == ["beta=0.1,steps=8"]
    one, other = sweeps("policy.path=a/b|policy.path=a__b", "policy.path")  # alike when written in a name
    assert one == "policy.path=a__b"
    assert other.startswith("policy.path=a__b-")
    with pytest.raises(
        ValueError, match=r"beta=0.1 holds a run of other settings.*\n  lr: 0.0005 there, 0.25 asked for"
    ):
        sweeps("beta=0.1 steps=9", "beta", lr=0.25)  # the same words, under another default
    (tmp_path / "runs/dev/beta=0.7").mkdir()
    (tmp_path / "runs/dev/beta=0.7/config.yaml").touch()  # nobody knows what it was


def test_the_same_settings_are_one_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = (["beta=0.1"], [], ["loss.beta=0.1"], ["beta=0.2"])
    planned, refused = plan([composed("train", *overrides) for overrides in given])
    assert not refused
    assert [str(run.directory) for run in planned] == ["runs/dev/beta=0.1", "runs/dev/beta=0.2"]
    assert list(tmp_path.iterdir()) == []
    planned[0].freeze()
    planned, _ = plan([composed("train")])  # found under the name that it has on disk
    assert [(str(run.directory), run.asked) for run in planned] == [("runs/dev/beta=0.1", "default")]
    record = OmegaConf.load("runs/dev/beta=0.1/config.yaml")
    assert record.choices.loss == "dpo"
    assert record.provenance.torch
    assert record.beta == record.loss.beta == 0.1


def test_a_directory_of_other_settings_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned, _ = plan([composed("train", "seed=1")])
    planned[0].freeze()
    file = tmp_path / "runs/dev/seed=1/config.yaml"
    old = OmegaConf.load(file)
    old.lr = 0.25
    old.loss.gamma = 2
    OmegaConf.save(old, file)
    before = file.read_bytes()
    planned, refused = plan([composed("train", "seed=1"), composed("train", "seed=2")])
    assert [run.asked for run in planned] == ["seed=2"]
    reason = refused[0].reason
    assert "runs/dev/seed=1 holds a run of other settings" in reason
    assert "lr: 0.25 there, 0.0005 asked for" in reason
    assert "loss.gamma: 2 there, absent asked for" in reason
    assert "seed:" not in reason
    assert "use another name=..." in reason
    assert file.read_bytes() == before


REFUSED = {  # overrides -> why, each by the function that is asked
    "+id=5": "id is what a run records of itself",
    "++provenance.inputs=null": "provenance.inputs is what a run records of itself",
    "command=sft": "command is what a run records of itself",
    "loss.beta=0.3 beta=0.1": "loss.beta and beta are one setting, got 0.3 and 0.1; give beta alone",
    "policy.max_length=64 max_length=80": "policy.max_length and max_length are one setting, got 64 and 80",
    "loss.label_smoothing=0.7": "label_smoothing must be in [0, 0.5), got 0.7",
    "loss=ipo loss.average=word": "got word",
    "reference=ema reference.alpha=2.0": "reference.alpha must be in (0, 1], got 2.0",
    "data=file policy.path=someone/model": "data.path must be given",
    "data=file data.path=no.jsonl policy.path=someone/model": "data.path must be a file of records, a folder",
    "data=hh data.validation_path=no.jsonl policy.path=someone/model": "data.validation_path must be a file",
    "policy.path=/nowhere/model": "/nowhere/model must be a folder with a model",
    "policy.base=./model": "./model must be a folder with a model",
    "reference=other reference.path=/nowhere/model": "/nowhere/model must be a folder with a model",
    "beta=0.2 policy.path=/nowhere/model": "/nowhere/model must be a folder with a model",
}


def test_the_options_own_refusals_come_first(capsys):
    planned, refused = plan([composed("train", *overrides.split()) for overrides in REFUSED])
    assert not planned
    reasons = {" ".join(one.overrides): one.reason for one in refused}
    assert {overrides: said for overrides, said in REFUSED.items() if said not in reasons[overrides]} == {}
    launch._list(refused)
    assert capsys.readouterr().err.count("/nowhere/model must be a folder") == 1  # though three have it


def test_sft_has_runs_of_its_own():
    planned, refused = plan([composed("sft", "sft.lr=0.01")])
    assert not refused
    assert str(planned[0].directory) == "runs/sft/sft.lr=0.01"


def test_two_sweeps_that_are_planned_at_once(tmp_path):
    """Names hold what varies, so both may choose one: the second is told, and the settings of the first stay."""
    one, same, other = (Run(tmp_path / "beta=0.1", {"id": id, "steps": 2}, "beta=0.1") for id in ("a", "a", "b"))
    one.freeze()
    same.freeze()
    with pytest.raises(FileExistsError, match="planned with other settings by another command meanwhile"):
        other.freeze()
    assert [path.name for path in (tmp_path / "beta=0.1").iterdir()] == ["config.yaml"]
    assert OmegaConf.load(tmp_path / "beta=0.1/config.yaml").id == "a"
