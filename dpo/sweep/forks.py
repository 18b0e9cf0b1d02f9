"""Processes that begin with everything imported, which takes longer than the rest of a short run.

A server imports once and forks for each plan and each run, so a run still has a process of its own, and fails or is
killed alone. The process that plans imports no torch: --help, completion and other Hydra applications are quick.
"""

import gc
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

from dpo.sweep.execute import BEFORE_TORCH, THREADS, begin

# Elsewhere a fork of what has imported torch may crash in the system's own libraries: there each begins afresh.
METHOD = "forkserver" if sys.platform == "linux" else "spawn"
FORKS: Any = multiprocessing.get_context(METHOD)


def serve(modules: Iterable[str]) -> None:
    """Start the server, if it does not run yet; it imports these modules.

    It must not ask CUDA anything: what is forked afterwards could not use it.
    """
    if METHOD != "forkserver":
        return
    FORKS.set_forkserver_preload(["dpo.sweep.uncollected", *modules])
    former = dict(os.environ)
    try:
        os.environ.update({**dict.fromkeys(THREADS, "1"), **BEFORE_TORCH, **former})
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(former)


def ask(module: str, function: str, *arguments: Any) -> Any:
    """What a function returns that is called in such a process. Raises: SystemExit if it ends without."""
    ours, theirs = FORKS.Pipe(duplex=False)
    process = _started(_answer, theirs, module, function, arguments)
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"{module} must try the settings, but ended with exit code {process.exitcode}") from None


class Fork:
    """A run in such a process, with what a `subprocess.Popen` has; its output goes into the file `log`, or to ours."""

    def __init__(self, directory: Path, environment: Mapping[str, str], log: Path | None) -> None:
        self.process = _started(_run, directory, dict(environment), log)
        self.pid = self.process.pid or 0

    def poll(self) -> int | None:
        return self.process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


def _started(function: Callable[..., None], *arguments: Any) -> Any:
    # a daemon would be ended when we are; a run goes on without us
    process = FORKS.Process(target=function, args=arguments, daemon=False)
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        process.start()  # which would have our own main module imported again there
    finally:
        sys.modules["__main__"] = main
    return process


def _collect() -> None:
    """Look for garbage again, but not in what is imported: a search of all that takes a quarter of a second."""
    gc.freeze()
    gc.enable()


def _answer(connection: Connection, module: str, function: str, arguments: Any) -> None:
    _collect()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the planner has it, too, and says so
    with redirect_stdout(sys.stderr):
        connection.send(getattr(importlib.import_module(module), function)(*arguments))


def _run(directory: Path, environment: Mapping[str, str], log: Path | None) -> None:
    _collect()
    os.setsid()  # Ctrl-C comes once, from the planner
    os.environ.clear()
    os.environ.update(environment)
    if log:
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        for stream in (1, 2):
            os.dup2(file, stream)
    for text in (sys.stdout, sys.stderr):
        text.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    begin(directory)
