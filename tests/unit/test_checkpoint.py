import errno
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from dpo.training import checkpoint, distributed
from dpo.training.checkpoint import Checkpoints
from dpo.training.optim import optimizer, schedule

torch.set_num_threads(1)


class Toy:
    """A model some steps into training, with an extra module that has state."""

    def __init__(self, seed=0, steps=0, name="adamw", width=8):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
        self.optim = optimizer(self.model, name, 1e-2, [0.9, 0.99], 0.1)
        self.scheduler = schedule(self.optim, "cosine", 3, 20)
        self.extra = nn.Module()
        self.extra.register_buffer("count", torch.zeros(()))
        self.optim.register_step_post_hook(lambda *_: self.extra.count.add_(1))
        self.width = width
        self.train(steps)

    def train(self, steps):
        losses = []
        for _ in range(steps):
            loss = self.model(torch.randn(4, self.width)).square().mean() * random.random() * np.random.rand()
            loss.backward()
            self.optim.step()
            self.optim.zero_grad()
            self.scheduler.step()
            losses.append(loss.item())
        return losses

    @property
    def parts(self):
        return self.model, self.optim, self.scheduler

    def checkpoints(self, directory, **options):
        return Checkpoints(directory, *self.parts, extra=self.extra, **options)

    def save(self, directory, step, evaluated=False, **options):
        with self.checkpoints(directory, **options) as checkpoints:
            checkpoints.save(step, evaluated)
            checkpoints.finish()

    def restore(self, directory, **options):
        return self.checkpoints(directory, **options).restore()


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("name,width", [("adamw", 8), ("rmsprop", 8), ("adamw_8bit", 8), ("adamw_8bit", 64)])
def test_restored_continues_bit_equal(tmp_path, name, width):
    toy = Toy(steps=4, name=name, width=width)
    toy.save(tmp_path, 4, evaluated=True, inputs={"settings": "abc"})
    expected = toy.train(5)
    random.seed(9)
    np.random.seed(9)
    other = Toy(seed=9, name=name, width=width)
    assert other.restore(tmp_path, inputs={"settings": "abc"}) == (4, True)
    assert other.extra.count == 4  # the hook that PyTorch runs while it restores leaves no trace
    assert other.train(5) == expected
    assert other.scheduler.get_last_lr() == toy.scheduler.get_last_lr()
    ends = zip(toy.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in ends)
    assert other.extra.count == toy.extra.count == 9


def test_only_the_latest_is_kept_and_found(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert Toy().restore(tmp_path) == (0, False)
    toy = Toy(steps=1)
    toy.save(tmp_path, 9)
    toy.save(tmp_path, 10)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-10"
    assert names(tmp_path) == ["step-10"]
    for odd in ("step-99", "step-98.unfinished", "step-x", "other"):  # step-99 has no about.json
        (tmp_path / odd).mkdir()
    (tmp_path / "step-98.unfinished" / "about.json").touch()  # by a process that was killed before it could rename
    assert checkpoint.latest(tmp_path) == tmp_path / "step-10"


def test_the_newest_few_are_kept(tmp_path):
    (tmp_path / "step-4.unfinished").mkdir()  # by a process that was killed
    with Toy(steps=1).checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (9, 10, 11):
            checkpoints.save(step)
        checkpoints.finish()
    assert names(tmp_path) == ["step-10", "step-11"]


def test_rank_0_alone_removes_what_was_left(tmp_path, monkeypatch):
    """Another rank might come late, and take what is being written for it."""
    (tmp_path / "step-4.unfinished").mkdir()
    monkeypatch.setattr(checkpoint, "is_main", lambda: False)
    Toy(steps=1).save(tmp_path, 5)
    assert names(tmp_path) == ["step-4.unfinished", "step-5"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """What is saved is the state at the save, not what training made of it meanwhile."""
    toy, gate = Toy(steps=4), threading.Event()
    write = HuggingFaceStorageWriter.write_data

    def slow(*arguments):
        assert gate.wait(30)
        return write(*arguments)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", slow)
    with toy.checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4)
        expected = toy.train(5)
        assert checkpoint.latest(tmp_path) is None
        assert not checkpoints.failed
        gate.set()
        checkpoints.finish()
    other = Toy(seed=9)
    assert other.restore(tmp_path) == (4, False)
    assert other.train(5) == expected


def test_another_run_and_another_model_are_refused(tmp_path):
    inputs = {"settings": "a", "pairs": "b", "policy": "c"}
    Toy(steps=1).save(tmp_path, 1, inputs=inputs)
    for others in ({"settings": "d"}, {"pairs": "c"}, {"policy": "d", "pairs": "d"}, {"reference": "d"}):
        named = " and another ".join(key for key in {**inputs, **others} if key in others)
        with pytest.raises(RuntimeError, match=rf"must be a checkpoint of this run: it was made with another {named};"):
            Toy().restore(tmp_path, inputs={**inputs, **others})
    with pytest.raises(RuntimeError, match="it was made with another policy;"):
        Toy().restore(tmp_path, inputs={"settings": "a", "pairs": "b"})
    with pytest.raises(RuntimeError, match=r"must be a checkpoint of this run.*[Ss]ize"):
        Toy(width=9).restore(tmp_path, inputs=inputs)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"files": 3}', "[" * 100_000])
def test_a_damaged_description_is_named(tmp_path, text):
    Toy(steps=1).save(tmp_path, 1)
    (tmp_path / "step-1" / "about.json").write_text(text)
    with pytest.raises(RuntimeError, match=r"must be a checkpoint of this run: .*about\.json is damaged: "):
        Toy().restore(tmp_path)


def test_tied_weights_are_saved_once(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    optim = optimizer(model, "rmsprop", 1e-2, [0.9, 0.99], 0.0)
    with Checkpoints(tmp_path, model, optim, schedule(optim, "constant", 1, 2)) as checkpoints:
        checkpoints.save(1)
    (part,) = (tmp_path / "step-1").glob("*.safetensors")
    with safe_open(part, "pt") as file:
        assert [name for name in file.keys() if name.startswith("model.")] == ["model.0.weight"]  # noqa: SIM118


def test_files_are_on_disk_before_their_folder_has_its_name(tmp_path, monkeypatch):
    """Else a machine that fails would leave empty ones in a folder that looks whole."""
    synced, rename = [], Path.rename

    def renaming(path, target):
        if target.name == "step-1":
            assert {place.name for place in path.iterdir()} == {*synced}
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(os.readlink(f"/proc/self/fd/{file}")).name))
    monkeypatch.setattr(Path, "rename", renaming)
    Toy(steps=1).save(tmp_path, 1)
    assert {"about.json"} < {*synced}


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, crater):
        self.crater = crater

    def __reduce__(self):
        return Path.touch, (self.crater,)


@pytest.mark.parametrize("place", [".metadata", "about.json", "part", "rng", "about as a former version"])
def test_nothing_in_a_checkpoint_is_executed(tmp_path, place):
    crater = tmp_path / "crater"
    Toy(steps=2).save(tmp_path / "checkpoint", 2)
    folder = tmp_path / "checkpoint" / "step-2"
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    (part,) = folder.glob("*.safetensors")
    bomb = pickle.dumps(Bomb(crater))
    if place == "rng":
        with safe_open(part, "pt") as file:
            tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        room = len(tensors["rng.0"])
        tensors["rng.0"] = torch.frombuffer(bytearray(bomb.ljust(room)), dtype=torch.uint8)
        save_file(tensors, part, about)
    elif place == "part":
        part.write_bytes(bomb.ljust(part.stat().st_size))
    elif place == "about as a former version":
        (folder / ".metadata").write_bytes(bomb)
        (folder / "about.json").unlink()
    else:
        (folder / place).write_bytes(bomb)
    if place == ".metadata":  # which nobody reads
        assert Toy().restore(tmp_path / "checkpoint") == (2, False)
    else:
        with pytest.raises(RuntimeError, match=f"{folder} must be a checkpoint of this run"):
            Toy().restore(tmp_path / "checkpoint")
    assert not crater.exists()
    pickle.loads(bomb)  # the plant works
    assert crater.exists()


def test_a_cut_or_missing_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "FILE_BYTES", 400)
    toy = Toy(steps=2)
    toy.save(tmp_path, 2)
    assert Toy(seed=9).restore(tmp_path)[0] == 2
    first, second, *_ = sorted((tmp_path / "step-2").glob("*.safetensors"))
    whole = first.read_bytes()
    first.write_bytes(whole[:-1])
    with pytest.raises(RuntimeError, match=f"{first.name} must have {len(whole)} bytes, found {len(whole) - 1}"):
        Toy().restore(tmp_path)
    first.write_bytes(whole)
    second.unlink()
    with pytest.raises(RuntimeError, match=f"{second.name} must have .* found no such file; delete it to resume"):
        Toy().restore(tmp_path)
    for file in (tmp_path / "step-2").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(RuntimeError) as raised:  # a few are enough
        Toy().restore(tmp_path)
    assert str(raised.value).count("no such file") == 3


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """Every attempt that resumed from them would fail."""
    toy = Toy(steps=2)
    toy.save(tmp_path, 2)
    with torch.no_grad():
        next(toy.model.parameters())[0] = math.inf
    with pytest.raises(RuntimeError, match=r"weights after step 3 must be finite.*step 2 is intact"):
        toy.save(tmp_path, 3)
    assert names(tmp_path) == ["step-2"]


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("broken", ["prepare_local_plan", "write_data", "finish"])
def test_full_disk_leaves_the_former_intact(tmp_path, monkeypatch, broken):
    toy = Toy(steps=2)
    toy.save(tmp_path, 2)
    toy.train(1)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint._Writer, broken, full)
        with pytest.raises(RuntimeError) as raised:
            toy.save(tmp_path, 3)
    assert str(raised.value) == (
        f"could not save step 3 in {tmp_path}: [Errno 28] No space left on device (no space?); "
        "the one of step 2 is intact: the same command resumes from it"
    )
    assert raised.value.__cause__ is not None
    assert names(tmp_path) == ["step-2"]
    assert Toy().restore(tmp_path)[0] == 2
    toy.save(tmp_path, 3)
    assert names(tmp_path) == ["step-3"]


def test_full_disk_at_the_first_save(tmp_path, monkeypatch):
    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", full)
    with pytest.raises(RuntimeError, match="there is no earlier one"):
        Toy(steps=1).save(tmp_path, 1)
    assert names(tmp_path) == []


def test_a_save_that_another_process_cannot_write_fails_here_too(tmp_path, monkeypatch):
    with Toy(steps=1).checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1)
        monkeypatch.setattr(checkpoint, "any_true", lambda flag: True)
        with pytest.raises(RuntimeError, match=r"could not save step 1 in .*: another process failed \(no space\?\)"):
            checkpoints.finish()


def test_what_cannot_be_removed_fails_no_save(tmp_path, monkeypatch):
    toy = Toy(steps=1)
    toy.save(tmp_path, 1)
    monkeypatch.setattr(os, "rmdir", full)
    toy.save(tmp_path, 2)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-2"


def run_script(script, directory):
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parents[1]}"}
    code = "from test_checkpoint import *\n" + script
    command = [sys.executable, "-c", code, str(directory)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


LIMITED = """
import resource
toy = Toy(steps=2, width=100)
directory = Path(sys.argv[1])
toy.save(directory, 2)
toy.train(1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
toy.save(directory, 3)
"""


def test_a_write_that_fails_half_way(tmp_path):
    done = run_script(LIMITED, tmp_path)
    assert done.returncode == 1
    assert "RuntimeError: could not save step 3" in done.stderr
    assert "step 2 is intact" in done.stderr
    assert names(tmp_path) == ["step-2"]
    assert Toy(width=100).restore(tmp_path)[0] == 2


KILLED = """
toy = Toy(steps=2)
directory = Path(sys.argv[1])
toy.save(directory, 2)
checkpoint._Writer.finish = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
toy.save(directory, 3)
"""


def test_killed_while_saving(tmp_path):
    assert run_script(KILLED, tmp_path).returncode == -signal.SIGKILL
    assert names(tmp_path) == ["step-2", "step-3.unfinished"]
    toy = Toy()
    assert toy.restore(tmp_path)[0] == 2
    toy.train(1)
    toy.save(tmp_path, 3)
    assert names(tmp_path) == ["step-3"]


def test_ranks_wait_as_long_for_a_save_as_for_all_else(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.new_group", lambda **options: asked.append(options))
    Toy().checkpoints(tmp_path)
    assert asked == [{"backend": "gloo", "timeout": distributed.TIMEOUT}]


def test_random_state_round_trip():
    random.gauss(0, 1), np.random.randn()  # of two that they draw, one is kept
    state = checkpoint.get_rng()
    first = random.gauss(0, 1), np.random.randn(), random.random(), np.random.rand(), torch.rand(()).item()
    checkpoint.set_rng(state)
    assert (random.gauss(0, 1), np.random.randn(), random.random(), np.random.rand(), torch.rand(()).item()) == first


def test_the_random_state_of_a_device_is_that_of_where_there_is_one(monkeypatch):
    """A run that began on a CPU goes on on a GPU, and the reverse."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    of_cpu, taken = checkpoint.get_rng(), []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor([7, 8], dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: taken.append(state.tolist()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    of_gpu = checkpoint.get_rng()
    assert (of_cpu.get("cuda"), of_gpu["cuda"]) == (None, [7, 8])
    checkpoint.set_rng(of_cpu)
    assert taken == []
    checkpoint.set_rng(of_gpu)
    assert taken == [[7, 8]]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checkpoint.set_rng(of_gpu)
    assert taken == [[7, 8]]


def test_a_rank_has_its_own_random_state(tmp_path, monkeypatch):
    """Of two processes, the second saves and takes back its own; a third, which was not there, keeps the one it has."""
    toy = Toy(steps=1)
    monkeypatch.setattr(checkpoint, "rank", lambda: 1)
    monkeypatch.setattr(checkpoint, "world_size", lambda: 2)
    toy.save(tmp_path, 1)
    (part,) = (tmp_path / "step-1").glob("*.safetensors")
    with safe_open(part, "pt") as file:
        assert {name for name in file.keys() if name.startswith("rng")} == {"rng.1"}  # noqa: SIM118
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    other = Toy(seed=5)
    other.restore(tmp_path)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected
    monkeypatch.setattr(checkpoint, "rank", lambda: 2)
    torch.manual_seed(3)
    random.seed(3)
    kept = random.getstate(), torch.get_rng_state()
    other.restore(tmp_path)
    assert random.getstate() == kept[0]
    assert torch.equal(torch.get_rng_state(), kept[1])


def test_all_that_the_optimizer_and_the_schedule_hold_is_taken_back(tmp_path):
    """Also what training set to another value than it began with."""
    toy = Toy(steps=4)
    toy.optim.param_groups[0]["weight_decay"] = 0.25
    toy.save(tmp_path, 4)
    other = Toy(seed=9)
    other.restore(tmp_path)
    assert other.optim.param_groups[0]["weight_decay"] == 0.25
    assert other.scheduler.state_dict() == toy.scheduler.state_dict()
    for mine, theirs in zip(other.model.parameters(), toy.model.parameters(), strict=True):
        mine, theirs = other.optim.state[mine], toy.optim.state[theirs]
        assert set(mine) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_save_that_fails_is_known_before_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", full)
    with Toy(steps=1).checkpoints(tmp_path) as checkpoints:
        assert not checkpoints.failed
        checkpoints.save(7)
        while not checkpoints.pending.done():
            pass
        assert checkpoints.failed
        with pytest.raises(RuntimeError, match="could not save step 7"):
            checkpoints.finish()
        assert not checkpoints.failed
