import fcntl
import json
import math
import os
import pty
import stat
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpo.training.log import Log, _accepted, _has_key, progress

ROOT = Path(__file__).parents[2]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_rows(tmp_path):
    with Log(tmp_path) as log:
        log.write(0, "validation", {"loss": 0.5})
        log.epoch_steps = 4
        log.write(1, "train", {"loss": 0.1, "bad": math.nan, "worse": -math.inf})
        assert rows(log.metrics) == [  # readable before the log is closed
            {"step": 0, "split": "validation", "loss": 0.5},
            {"step": 1, "split": "train", "epoch": 0.25, "loss": 0.1, "bad": None, "worse": None},
        ]
        log.sample(1, [{"prompt": "é", "response": "\n"}])
    assert rows(tmp_path / "samples.jsonl") == [{"step": 1, "prompt": "é", "response": "\n"}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_only_rank_0_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with Log(tmp_path, SimpleNamespace(mode="offline", project="p", entity=None)) as log:
        log.write(1, "train", {"loss": 0.1})
        log.sample(1, [{"prompt": ""}])
        log.rewind(0, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("evaluated", [False, True])
def test_rewind(tmp_path, evaluated):
    log = Log(tmp_path)
    for step in range(4):
        log.write(step, "train", {"loss": step})
        log.write(step, "validation", {"loss": step})
        log.sample(step, [{"response": "a"}])
    # Killed while writing, on a disk that failed
    log.metrics.write_text(log.metrics.read_text() + '[1]\n{"split": "train"}\n{"step": 2, "spl')
    log.rewind(2, evaluated)
    written = [(step, split) for step in range(3) for split in ("train", "validation")]
    kept = [(row["step"], row["split"]) for row in rows(log.metrics)]
    assert kept == written[: 6 if evaluated else 5]
    assert [row["step"] for row in rows(log.samples)] == ([0, 1, 2] if evaluated else [0, 1])
    log.rewind(-1, False)
    assert log.metrics.read_text() == log.samples.read_text() == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_the_last_row_takes_the_place_of_a_former_one(tmp_path):
    log = Log(tmp_path)
    for step, split in ((1, "train"), (1, "test"), (2, "train"), (2, "validation"), (2, "test")):
        log.write(step, split, {"kl": step})
    log.sample(2, [{"response": "a"}])
    before = rows(log.metrics)
    log.write_last(2, "test", {"kl": 5})
    assert rows(log.metrics) == [*before[:-1], {"step": 2, "split": "test", "kl": 5}]
    assert rows(log.samples) == [{"step": 2, "response": "a"}]


def test_full_disk_is_named(tmp_path):
    log = Log(tmp_path)
    log.metrics.symlink_to("/dev/full")
    with pytest.raises(RuntimeError, match=r"metrics\.jsonl \(disk full\?\).*No space left"):
        log.write(1, "train", {"loss": 0.1})


SCRIPT = """
import sys, json
from types import SimpleNamespace
from pathlib import Path
from dpo.training import log
from dpo.training.log import Log
log.WANDB_TIMEOUT = int(sys.argv[3])
settings = SimpleNamespace(mode=sys.argv[2], project="toys/of: me?", entity=None)
with Log(Path(sys.argv[1]), settings, run_id="a'b/c", group="sweeps/" + 150 * "x", config={"beta": 0.1}) as log:
    for step in range(3):
        log.write(step, "train", {"loss": 0.5})
        log.sample(step, [{"prompt": "é" * 1000, "response": step, "win": None}])
    mirrored = log.mirror is not None
imported = "wandb" in sys.modules
print(json.dumps([imported, mirrored]))
"""


def mirrored(directory, mode, timeout=600, **environment):
    """Output lines, and whether wandb was imported and used; in a process without a terminal or stdin."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_ERROR_REPORTING": "false", **environment}
    run = subprocess.run(
        f'exec "{sys.executable}" -c "$SCRIPT" "{directory}" {mode} {timeout} <&-',
        shell=True,
        capture_output=True,
        text=True,
        env={**environment, "SCRIPT": SCRIPT},
        timeout=900,
    )
    assert run.returncode == 0, run.stderr
    *lines, last = run.stdout.splitlines()
    assert len(rows(directory / "metrics.jsonl")) == 3
    return [*lines, *run.stderr.splitlines()], *json.loads(last)


@pytest.fixture
def run_directory(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    return directory


@pytest.mark.long
@pytest.mark.parametrize("mode", ["auto", "disabled"])
def test_without_a_key_nothing_is_made(run_directory, mode):
    said, imported, used = mirrored(run_directory, mode)
    assert (said, imported, used) == ([], False, False)
    assert sorted(os.listdir(run_directory)) == ["metrics.jsonl", "samples.jsonl"]


@pytest.mark.long
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_offline(run_directory, mode):
    said, _, used = mirrored(run_directory, mode)
    assert used
    assert len(said) == (mode == "online")
    assert all("wandb: offline, for want of a key" in line for line in said)
    assert len(list(run_directory.glob("wandb/offline-run-*-a-b-c/run-a-b-c.wandb"))) == 1
    tables = [
        json.loads(file.read_text())
        for file in run_directory.glob("wandb/offline-run-*/files/media/table/samples_*.json")
    ]
    assert sorted(table["data"] for table in tables) == [[[step, "é" * 1000, step, None]] for step in range(3)]


@pytest.mark.long
def test_dead_server_turns_the_mirror_off(run_directory):
    said, _, used = mirrored(
        run_directory, "auto", timeout=2, WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9"
    )
    assert not used
    assert len(said) == 1
    assert said[0].startswith("wandb: off, the run goes on without it: ")


@pytest.mark.long
def test_wandb_mode_is_heeded_by_auto(run_directory):
    _, imported, used = mirrored(run_directory, "auto", WANDB_API_KEY="0" * 40, WANDB_MODE="disabled")
    assert not used
    assert not imported


def test_a_failing_mirror_is_dropped_with_one_line(tmp_path, capsys):
    log = Log(tmp_path)

    def fail(*_, **__):
        raise ConnectionError("gone\nfor good")

    log.mirror = SimpleNamespace(log=fail, finish=fail)
    with log:
        log.write(1, "train", {"loss": 0.1})
        log.write(2, "train", {"loss": 0.1})
    assert capsys.readouterr().out == "wandb: off from here on, the run goes on: ConnectionError: gone\n"
    assert len(rows(log.metrics)) == 2


def test_the_mirror_gets_named_values_and_the_verdict(tmp_path):
    calls = []
    log = Log(tmp_path)
    log.epoch_steps = 2
    log.mirror = SimpleNamespace(
        log=lambda values, step: calls.append((values, step)),
        finish=lambda exit_code: calls.append(exit_code),
    )

    def fails():
        with log:
            log.write(1, "train", {"loss": 0.1, "kl": math.nan})
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert calls == [({"epoch": 0.5, "train/loss": 0.1, "train/kl": None}, 1), 1]


def test_the_mirror_gets_a_table_of_each_steps_samples(tmp_path):
    """Those of that step alone, or what is sent would grow with the square of their number; chats as JSON."""
    calls = []
    log = Log(tmp_path)
    log.mirror = SimpleNamespace(log=lambda values, step: calls.append((values, step)))
    chat = [{"role": "user", "content": "é"}]
    log.sample(2, [{"prompt": chat, "response": "a", "win": 1}, {"prompt": chat, "response": "b", "score": 0.5}])
    log.sample(4, [{"prompt": "p", "response": "c", "ended": True, "win": 0.5}])
    log.sample(6, [])
    assert [(list(values), step) for values, step in calls] == [(["samples"], 2), (["samples"], 4)]
    first, second = (values["samples"] for values, _ in calls)
    assert first.columns == ["step", "prompt", "response", "win", "score"]
    assert first.data == [[2, json.dumps(chat), "a", 1, None], [2, json.dumps(chat), "b", None, 0.5]]
    assert second.columns == ["step", "prompt", "response", "ended", "win"]
    assert second.data == [[4, "p", "c", True, 0.5]]
    assert rows(log.samples)[0]["prompt"] == chat


def test_a_table_that_cannot_be_made_ends_the_mirror_and_not_the_run(tmp_path, capsys, monkeypatch):
    log = Log(tmp_path)
    log.mirror = SimpleNamespace(log=lambda values, step: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    log.sample(2, [{"prompt": "p"}])
    assert log.mirror is None
    assert capsys.readouterr().out.startswith("wandb: off from here on, the run goes on: AttributeError")
    assert len(rows(log.samples)) == 1


def test_online_with_a_key(tmp_path, monkeypatch, capsys):
    asked = {}
    wandb = SimpleNamespace(
        Settings=lambda **settings: settings,
        init=lambda **options: asked.update(options) or SimpleNamespace(url="https://toy", finish=lambda **_: None),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with Log(tmp_path, SimpleNamespace(mode="auto", project="p", entity="e"), "id", "group", {"beta": 0.1}):
        assert capsys.readouterr().out == "wandb: https://toy\n"
    settings = asked.pop("settings")
    assert asked == {
        **{"project": "p", "entity": "e", "group": "group", "id": "id", "config": {"beta": 0.1}},
        **{"name": tmp_path.name, "dir": tmp_path, "mode": "online", "resume": "allow"},
    }
    assert settings == {"init_timeout": 20, "finish_timeout": 20, "console": "off"}


def test_the_end_of_a_long_name_tells_runs_apart():
    assert _accepted("runs/of: me?,beta=0.1") == "runs-of- me-,beta=0.1"
    assert _accepted("x" * 100 + "y" * 128) == "y" * 128
    assert _accepted(" / ") == "-"


def test_refuses_other_modes(tmp_path):
    with pytest.raises(ValueError, match="got on"):
        Log(tmp_path, SimpleNamespace(mode="on", project="p", entity=None))


def test_key_from_netrc(tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    assert not _has_key()
    netrc.write_text("machine example.org login user password x\n")
    netrc.chmod(stat.S_IRUSR | stat.S_IWUSR)
    assert not _has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://example.org")
    assert _has_key()
    netrc.write_text("nonsense\n")
    assert not _has_key()


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=1e9)
    monkeypatch.setattr("tqdm.std.time", lambda: now.seconds)
    return now


def test_progress_lines(capfd, clock):
    for item in progress(range(6), name="scoring"):
        clock.seconds += 4 + item % 2
    assert capfd.readouterr().err.split("\n") == [
        "scoring:  50% 3/6 [00:13<00:13,  4.33s/it]",
        "scoring: 100% 6/6 [00:27<00:00,  4.53s/it]",
        "",
    ]


def test_progress_counts_from_a_resumed_step(capfd, clock):
    with progress(total=30, name="training", first=10) as bar:
        for loss in (0.693147, 0.5):
            clock.seconds += 8
            bar.set_postfix(loss=loss, refresh=False)
            bar.update()
    assert capfd.readouterr().err.split("\n") == [
        "training:  40% 12/30 [00:16<02:24,  8.00s/it, loss=0.5]",  # which is the last one, too
        "",
    ]


def test_progress_is_quiet_when_short_and_on_other_ranks(capfd, monkeypatch):
    with progress(name="sampling") as bar:
        bar.update(32)
    assert len(capfd.readouterr().err.splitlines()) == 1
    monkeypatch.setenv("RANK", "1")
    list(progress([1, 2], name="sampling"))
    assert capfd.readouterr().err == ""


def test_progress_is_a_bar_on_a_terminal():
    code = "from dpo.training.log import progress\nfor _ in progress([1, 2], name='training'): pass"
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], stderr=slave, env=environment, check=True)
    os.close(slave)
    shown = os.read(master, 10_000).decode()
    assert "training: 100%" in shown
    assert "2/2" in shown
