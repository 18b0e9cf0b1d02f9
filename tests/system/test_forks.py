"""Runs that are forked: each is a process of its own, in the environment that it was given."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A verb that says what it finds, and ends as its settings say.
VERB = """
import gc, json, os, signal, sys

def run(config, directory):
    print("said")
    found = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OWN", "PLANNER")}
    found |= {"session": os.getsid(0) == os.getpid(), "parent": os.getppid(), "stdin": sys.stdin.read()}
    found |= {"threads": sys.modules["torch"].threads, "main": sys.modules["__main__"].__dict__.get("MARK")}
    found |= {"sigint": signal.getsignal(signal.SIGINT) is signal.default_int_handler, "at": os.getcwd()}
    found |= {"imported": IMPORTED, "collects": [COLLECTED, gc.isenabled(), gc.get_freeze_count() > 1000]}
    (directory / "found.json").write_text(json.dumps(found))
    if config["end"] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if config["end"] == "fails":
        raise RuntimeError("no luck")
    if config["end"] == "waits":
        os.kill(os.getppid(), 0)
        signal.pause()

def answer(one, other):
    print("aside")
    return {"sum": one + other, "collects": gc.isenabled(), "imported": IMPORTED, "pid": os.getpid(), "began": BEGAN}

def end(code):
    os._exit(code)

IMPORTED, BEGAN, COLLECTED = os.getpid(), dict(os.environ), gc.isenabled()
sys.modules["torch"] = torch = type(sys)("torch")
torch.threads, torch.set_num_threads = None, lambda number: setattr(torch, "threads", number)
"""
PLANNER = """
import json, multiprocessing, os, sys, time
from pathlib import Path

MARK = "of the planner"
from dpo.sweep import forks

forks.METHOD = sys.argv.pop(1)
forks.FORKS = multiprocessing.get_context(forks.METHOD)

os.environ["PLANNER"] = "yes"
before = dict(os.environ)
forks.serve(["dpo.stub"])
assert dict(os.environ) == before
told = forks.ask("dpo.stub", "answer", 20, 22)
try:
    forks.ask("dpo.stub", "end", 3)
except SystemExit as error:
    told["error"] = str(error)
environment = {**os.environ, "OMP_NUM_THREADS": "2", "OWN": "1"}
runs = {}
for name in sys.argv[1:]:
    directory = Path(name)
    directory.mkdir()
    (directory / "config.yaml").write_text(json.dumps({"command": "stub", "threads": None, "end": name.split("-")[0]}))
    runs[name] = forks.Fork(directory, environment, directory / "log.txt" if "loud" not in name else None)
print("waiting", flush=True)
while any(run.poll() is None for run in runs.values()):
    for name, run in runs.items():
        if name.startswith("waits") and (Path(name) / "found.json").exists():
            run.send_signal(15 if "term" in name else 2)
    time.sleep(0.05)
codes = {"told": told, "own": os.getpid(), **{name: run.returncode for name, run in runs.items()}}
run.send_signal(15)  # it is gone: nothing happens
Path("codes.json").write_text(json.dumps({**codes, "pids": [run.pid for run in runs.values()]}))
"""


@pytest.fixture(scope="module", params=["forkserver", "spawn"])
def ended(request, tmp_path_factory) -> tuple[Path, dict, str]:
    """The folder of some runs, how they ended, and what was said outside their logs."""
    folder = tmp_path_factory.mktemp("forks")
    (folder / "code/dpo").mkdir(parents=True)
    for path in (ROOT / "dpo").iterdir():
        (folder / "code/dpo" / path.name).symlink_to(path)
    (folder / "code/dpo/stub.py").write_text(VERB)
    (folder / "planner.py").write_text(PLANNER)
    (folder / "sitecustomize.py").write_text(
        "from dpo.sweep import execute\nexecute._checked = lambda *_: None\nexecute.finished = lambda _: False\n"
    )
    names = ["well", "killed", "fails", "waits", "waits-term", "well-loud"]
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{folder / 'code'}"} | {"OMP_WAIT_POLICY": "active"}
    for variable in ("OMP_NUM_THREADS", "PYTHONUNBUFFERED"):
        environment.pop(variable, None)
    command = [sys.executable, "planner.py", request.param, *names]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return (
        folder,
        json.loads((folder / "codes.json").read_text()) | {"method": request.param},
        done.stdout + done.stderr,
    )


def found(folder: Path, name: str) -> dict:
    return json.loads((folder / name / "found.json").read_text())


def test_each_ends_alone_and_says_how(ended):
    folder, codes, _ = ended
    assert [codes[name] for name in ("well", "killed", "fails", "waits", "waits-term", "well-loud")] == [
        *(0, -signal.SIGKILL, 1, 75, 75, 0)
    ]
    assert "RuntimeError: no luck" in (folder / "fails/log.txt").read_text()
    assert json.loads((folder / "fails/error.json").read_text())["message"] == "no luck"
    assert json.loads((folder / "waits-term/error.json").read_text())["type"] == "Stopped"
    assert len({*codes["pids"], codes["own"]}) == 7


def test_each_is_in_its_own_environment(ended):
    folder, codes, _ = ended
    for name in ("well", "killed", "well-loud"):
        seen = found(folder, name)
        assert (seen["OMP_NUM_THREADS"], seen["OWN"], seen["PLANNER"]) == ("2", "1", "yes")
        assert seen["OMP_WAIT_POLICY"] == "active"  # the user's own
        if codes["method"] == "forkserver":
            assert seen["threads"] == 2  # torch was imported with one
        assert (seen["session"], seen["stdin"], seen["sigint"]) == (True, "", True)
        assert seen["main"] is None  # ours is not imported again
        assert seen["at"] == str(folder)


def test_what_they_need_is_imported_once(ended):
    folder, codes, _ = ended
    imported = {name: found(folder, name)["imported"] for name in ("well", "killed", "fails")}
    if codes["method"] == "forkserver":
        assert len({*imported.values(), codes["told"]["imported"]}) == 1
        assert not {*imported.values()} & {*codes["pids"], codes["own"]}
    else:
        assert [*imported.values()] == codes["pids"][:3]


def test_garbage_is_looked_for_in_what_a_fork_makes_and_not_in_imports(ended):
    folder, codes, _ = ended
    served = codes["method"] == "forkserver"
    assert found(folder, "well")["collects"] == [not served, True, True]
    assert codes["told"]["collects"]


def test_another_process_answers(ended):
    _, codes, said = ended
    told = codes["told"]
    assert told["sum"] == 42
    assert told["pid"] not in (codes["own"], *codes["pids"])
    assert told["error"] == "dpo.stub must try the settings, but ended with exit code 3"
    assert said.partition("waiting")[0] == ""  # what an answer prints is no output
    assert "aside" in said


def test_the_server_imports_in_an_environment_for_all(ended):
    began = ended[1]["told"]["began"]
    if ended[1]["method"] == "spawn":
        assert "OMP_NUM_THREADS" not in began  # that of each run is known before it imports
        return
    assert (began["OMP_NUM_THREADS"], began["THP_MEM_ALLOC_ENABLE"], began["OMP_WAIT_POLICY"]) == ("1", "1", "active")


def test_each_speaks_into_its_log_or_for_itself(ended):
    folder, _, said = ended
    assert (folder / "well/log.txt").read_text().startswith("said")
    assert (folder / "killed/log.txt").read_text() == "said\n"  # at once, before it was killed
    assert not (folder / "well-loud/log.txt").exists()
    assert "said" in said
    assert "Warning" not in said


ASKED = """
import torch
asked = []
for name in ("is_available", "device_count", "current_device", "get_device_capability", "_lazy_init"):
    own = getattr(torch.cuda, name)
    setattr(torch.cuda, name, lambda *given, own=own, name=name, **named: asked.append(name) or own(*given, **named))
import dpo.sweep.rehearse, dpo.train, dpo.sft, dpo.score, dpo.generate, dpo.judge, dpo.evaluate
print("asked", asked)
"""


@pytest.mark.long
def test_what_the_server_imports_asks_cuda_nothing():
    """After that no fork could use a GPU."""
    done = subprocess.run([sys.executable, "-c", ASKED], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "asked []"
