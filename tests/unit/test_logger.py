"""What `dpo` logs: bare lines on standard output, of rank 0 alone, whatever the process does with logging."""

import fcntl
import io
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import dpo

ROOT = Path(__file__).parents[2]
LOG = logging.getLogger("dpo.somewhere")


def test_messages_are_bare_lines_where_standard_output_goes_now(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    LOG.debug("nothing")
    LOG.info("100% of it")
    LOG.warning("two\nlines")
    with redirect_stdout(io.StringIO()) as redirected:
        LOG.info("elsewhere")
    assert capsys.readouterr() == ("100% of it\ntwo\nlines\n", "")
    assert redirected.getvalue() == "elsewhere\n"


@pytest.mark.parametrize(("rank", "said"), [("0", "hello\n"), ("1", ""), ("10", "")])
def test_rank_0_alone_speaks_before_the_group_is_joined(capsys, monkeypatch, rank, said):
    monkeypatch.setenv("RANK", rank)
    LOG.warning("hello")
    assert capsys.readouterr() == (said, "")


def test_what_cannot_be_written_ends_no_run(capsys, monkeypatch):
    class Full(io.StringIO):
        def write(self, _):
            raise OSError("No space left on device")

    monkeypatch.delenv("RANK", raising=False)
    with redirect_stdout(Full()):
        LOG.info("hello")
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "configure",
    [
        "logging.basicConfig(level='ERROR', format='decorated %(message)s')",
        "logging.basicConfig(level='DEBUG', stream=sys.stdout, format='decorated %(message)s')",
        "configure_log(OmegaConf.load(Path(hydra.__file__).parent / 'conf/hydra/job_logging/none.yaml'))",
        "configure_log(OmegaConf.load(Path(hydra.__file__).parent / 'conf/hydra/job_logging/stdout.yaml'), True)",
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_others_that_configure_logging_change_nothing(configure, first):
    lines = [configure, "import dpo"] if first else ["import dpo", configure]
    head = "import logging, sys, hydra\nfrom pathlib import Path\nfrom hydra.core.utils import configure_log\n"
    code = (
        f"{head}from omegaconf import OmegaConf\n{lines[0]}\n{lines[1]}\nlogging.getLogger('dpo.cache').info('hello')"
    )
    environment = {key: value for key, value in os.environ.items() if key != "RANK"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert (done.stdout, done.stderr) == ("hello\n", "")


def test_a_message_stands_above_the_progress_bar():
    code = (
        "import logging\nfrom dpo.training.log import progress\n"
        "with progress(total=2, name='training') as bar:\n"
        "    bar.update()\n    logging.getLogger('dpo.train').info('hello')\n    bar.update()"
    )
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key != "RANK"} | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], stdout=slave, stderr=slave, env=environment, check=True)
    os.close(slave)
    message, bar, rest = (shown(line) for line in os.read(master, 10_000).decode().split("\r\n"))
    assert message == "hello"
    assert bar.startswith("training: 100%")
    assert rest == ""


def shown(line):
    """A line of a terminal, on which a carriage return starts over without clearing."""
    screen = ""
    for part in line.split("\r"):
        screen = part + screen[len(part) :]
    return screen.rstrip()


@pytest.mark.parametrize("held", ["by another fork that was killed", "by another thread when it forks"])
def test_a_fork_writes_whoever_held_the_lock_of_bars(held):
    code = """
import logging, os, signal, sys, threading
import dpo
from tqdm import tqdm
log, lock = logging.getLogger("dpo.somewhere"), tqdm.get_lock()
log.info("first")
if "fork" in sys.argv[1].split():
    if (child := os.fork()) == 0:
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
else:
    thread = threading.Thread(target=lock.acquire)
    thread.start()
    thread.join()
if (child := os.fork()) == 0:
    log.info("of a fork")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    environment = {key: value for key, value in os.environ.items() if key != "RANK"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, held]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=120)
    assert done.stdout == "first\nof a fork\n"


def test_a_system_without_forks_imports_the_package():
    code = "import os\ndel os.register_at_fork\nimport dpo"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


def test_importing_the_package_again_repeats_no_message():
    assert len(logging.getLogger(dpo.__name__).handlers) == 1
