"""Processes of one group, as torchrun starts them; forked from one that has imported what takes longest.

torchrun itself is tried by test_launch, test_run and test_train: three fresh imports of torch and transformers a group.
"""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch.distributed.fsdp", "transformers.models.llama.modeling_llama", "datasets"])
LONGEST = 900  # seconds


def together(function: Callable[..., None], directory: Path, *arguments: object, processes: int) -> None:
    """Call `function(directory, *arguments)` in each process of a group of so many, one thread each.

    Raises: AssertionError with what they said, as soon as one has failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the server imports torch
    said = [directory / f"said-{processes}-{rank}.txt" for rank in range(processes)]
    ranks = []
    for rank in range(processes):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        named = {key: str(value) for key, value in (group | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items()}
        ranks.append(FORKS.Process(target=_rank, args=(function, directory, arguments, named, said[rank])))
    for one in ranks:
        one.start()
    until = time.monotonic() + LONGEST
    while running := [one for one in ranks if one.exitcode is None]:
        wait([one.sentinel for one in running], timeout=max(0.0, until - time.monotonic()))
        if any(one.exitcode for one in ranks) or time.monotonic() >= until:
            break
    for one in ranks:
        if one.exitcode is None:
            one.kill()
        one.join()
    ends = [one.exitcode for one in ranks]
    assert not any(ends), f"ended with {ends}\n" + "\n".join(file.read_text()[-5000:] for file in said)


def _rank(
    function: Callable[..., None], directory: Path, arguments: tuple[object, ...], named: dict[str, str], said: Path
) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(named)
    to = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(to, stream)
    function(directory, *arguments)
