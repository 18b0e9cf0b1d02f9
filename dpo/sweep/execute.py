"""Execute one run directory from its frozen config.

    python -m dpo.sweep.execute runs/dev/beta=0.1

Exit codes: 0 finished; 1 failed, with the reason in `error.json`; 73 another process has the directory;
75 stopped, and running it again resumes.
"""

import errno
import fcntl
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dpo.bill import paid_by
from dpo.sweep.directory import damage, finished, read_yaml
from dpo.sweep.identity import identity
from dpo.sweep.schema import check
from dpo.world import sizes

FAILED, IN_USE, STOPPED = 1, 73, 75
WITHIN = 2.0  # seconds that a rank has to end by itself when another was killed
AGAIN = "plan the run again by the command that made it"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
# Threads that spin while they wait cost a run 30 times its time where there are more threads than free cores; threads
# that sleep, a tenth. Huge pages make fresh tensors cheap: a tile of logits costs a fifth more without.
BEFORE_TORCH = {"OMP_WAIT_POLICY": "passive", "THP_MEM_ALLOC_ENABLE": "1"}


def execute(directory: Path) -> int:
    """Run the verb of the directory's config; returns the exit code."""
    if not (directory / "config.yaml").is_file():
        print(f"{directory} must hold a config.yaml, found none; python -m dpo.train makes run directories")
        return FAILED
    if wrong := damage(directory):
        print(f"ValueError: {wrong}", file=sys.stderr, flush=True)
        _record(directory, "ValueError", wrong, "")
        return FAILED
    if finished(directory):
        print(f"{directory} is finished")
        return 0
    lock = FileLock(directory / ".lock")
    if _rank() == 0:
        try:
            lock.acquire(timeout=2)  # `dpo.results` holds it for a moment to see whether a run is running
        except Timeout:
            print(f"{directory} is being executed by another process; wait for it, or end it first", flush=True)
            return IN_USE
    if _ranks() == 1:  # of several, one may have failed before another looks: what starts them has taken it away
        (directory / "error.json").unlink(missing_ok=True)
    try:
        with _beside_others(directory), paid_by(directory):
            return _guarded(directory)
    finally:
        lock.release()


def _guarded(directory: Path) -> int:
    try:
        values = _frozen(directory / "config.yaml")
        for variable, value in BEFORE_TORCH.items():
            os.environ.setdefault(variable, value)
        if values.get("threads") is not None:
            os.environ.update(dict.fromkeys(THREADS, str(values["threads"])))
        if "torch" in sys.modules and THREADS[0] in os.environ:  # a fork, for which these variables come too late
            sys.modules["torch"].set_num_threads(int(os.environ[THREADS[0]].split(",")[0]))
        _checked(values, directory / "config.yaml")
        config = OmegaConf.create(values)
        OmegaConf.set_struct(config, True)
        if base := sizes.missing(config.get("policy"), config.get("cache")):  # made before the processes of a run join
            importlib.import_module("dpo.world.pretrain").pretrained(base, config.cache, config.device)
        importlib.import_module(f"dpo.{config.command}").run(config, directory)
        return 0
    except BaseException as error:  # those of torch.distributed.checkpoint are no Exception
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # one (more) must not keep us from saying why
            signal.signal(number, signal.SIG_IGN)
        stopped = isinstance(error, KeyboardInterrupt)  # or Stopped, dpo.training.loop's, which has more to say
        if killed := _killed(directory, wait=isinstance(error, RuntimeError)):  # what it broke, or torchrun's signal
            return _lost(directory, killed)
        if stopped:
            message = str(error) or "stopped on a signal; the same command resumes"
            if _rank() == 0:
                print(message, flush=True)
                _record(directory, "Stopped", message, "")
            # All ranks are stopped together, and rank 0 alone says so: at the first code that is not 0 torchrun and
            # srun end the other ranks, and rank 0 may still be writing.
            return STOPPED if _rank() == 0 else 0
        kind, message = type(error).__name__, _text(error, directory)
        full = _full(error)  # and then no file has the traceback
        if not full and not isinstance(error, ValueError | RuntimeError):
            traceback.print_exc()
        where = "" if full else f" (traceback: {directory / 'error.json'})"
        print(f"{kind}: {message}{where}", file=sys.stderr, flush=True)
        _record(directory, kind, message, traceback.format_exc())
        return FAILED


def _frozen(file: Path) -> dict[str, Any]:
    """The settings in a run's config, as they are written there: nothing in them is resolved.

    Raises: ValueError if it is damaged.
    """
    try:
        values = read_yaml(file.read_text(encoding="utf-8"))
        OmegaConf.create(values)  # which refuses what begins like an interpolation, and is none
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ValueError(f"{file} must hold the settings of a run, found otherwise: {error}; {AGAIN}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold the settings of a run, found {str(values)[:40]!r}; {AGAIN}")
    return {str(key): value for key, value in values.items()}


def _checked(values: dict[str, Any], file: Path) -> None:
    """Refuse settings that a plan would refuse, or that are not those of the plan.

    Raises: ValueError.
    """
    try:
        check(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}\n{AGAIN}") from error
    if values.get("id") != identity(values):
        raise ValueError(
            f"{file} must be as it was planned, found settings of another id than {values.get('id')}; {AGAIN}"
        )


def _full(error: BaseException) -> bool:
    """Whether it is that of a full disk; one of ours says so itself."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or (not isinstance(error, RuntimeError) and "No space left" in str(error))


def _text(error: BaseException, directory: Path) -> str:
    """What an error says; of a full disk also where."""
    if not _full(error):
        return str(error)
    return f"{error}; make room for {directory} and the cache: the same command resumes"


def _record(directory: Path, kind: str, message: str, trace: str, rank: int | None = None) -> None:
    """Of several processes the first to fail tells why: the others fail because of it. A full disk cannot."""
    error = {"type": kind, "message": message, "traceback": trace, "rank": _rank() if rank is None else rank}
    with suppress(OSError), open(directory / "error.json", "x") as file:
        json.dump(error, file, indent=1)


@contextmanager
def _beside_others(directory: Path) -> Iterator[None]:
    """Of several ranks, let the others see whether this one was killed, and end it if another was.

    A rank holds the lock of its file while it lives, and takes the file away however it ends; unless it is killed.
    """
    if _ranks() == 1:
        yield
        return
    mark, ended = directory / f".rank-{_rank()}", threading.Event()

    def watch() -> None:
        while not ended.wait(1.0):  # a rank that waits for a GPU, or in a collective of one that is gone, hears nothing
            if killed := _killed(directory):
                if not ended.wait(WITHIN):  # to end by itself
                    code = _lost(directory, killed)
                    mark.unlink(missing_ok=True)
                    os._exit(code)
                return

    with open(mark, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        print(socket.gethostname(), end="", file=file, flush=True)
        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            mark.unlink(missing_ok=True)


def _killed(directory: Path, wait: bool = False) -> list[int]:
    """Other ranks of this run that ended without a word. Asked once all have joined: each has its lock by then.

    wait: for a moment, since a connection is lost a little before the lock is.
    """
    distributed = sys.modules.get("torch.distributed")
    if _ranks() == 1 or distributed is None or not distributed.is_initialized():
        return []
    others = [rank for rank in range(_ranks()) if rank != _rank()]
    until = time.monotonic() + (WITHIN if wait else 0)
    while not (found := [rank for rank in others if _abandoned(directory / f".rank-{rank}")]):
        if time.monotonic() >= until:
            break
        time.sleep(0.1)
    return found


def _abandoned(mark: Path) -> bool:
    """Of this machine's ranks alone: there are file systems that do not tell one node of another's locks."""
    try:
        with open(mark) as file:
            if file.read() != socket.gethostname():
                return False
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return mark.exists()
    except OSError:  # it is held, or was taken away
        return False


def _lost(directory: Path, killed: list[int]) -> int:
    message = (
        f"process {' and '.join(map(str, killed))} of {_ranks()}, counted from 0, was killed (out of memory?); "
        "the same command resumes"
    )
    print(f"Killed: {message}", file=sys.stderr, flush=True)
    _record(directory, "Killed", message, "", killed[0])
    for rank in killed:
        (directory / f".rank-{rank}").unlink(missing_ok=True)
    return FAILED


def _ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def begin(directory: Path) -> NoReturn:
    """Execute in this process, which ends with it."""
    for number in (signal.SIGTERM, signal.SIGUSR1):  # until training has handlers of its own
        signal.signal(number, signal.default_int_handler)
    sys.exit(execute(directory))


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m dpo.sweep.execute DIRECTORY")
    begin(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
