"""Execute one run directory from its frozen config.

    python -m dpo.run runs/dev/beta=0.1

Exit codes: 0 finished; 1 failed, with the reason in `error.json`; 73 another process has the directory;
75 stopped, and running it again resumes.
"""

import importlib
import json
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from dpo.directory import damage

FAILED, IN_USE, STOPPED = 1, 73, 75
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


def execute(directory: Path) -> int:
    """Run the verb of the directory's config; returns the exit code."""
    if not (directory / "config.yaml").is_file():
        print(f"{directory} must hold a config.yaml, found none; python -m dpo.train makes run directories")
        return FAILED
    if wrong := damage(directory):
        print(wrong, file=sys.stderr, flush=True)
        return FAILED
    if (directory / "evaluation.json").exists():
        print(f"{directory} is finished")
        return 0
    lock = FileLock(directory / ".lock")
    if _rank() == 0:
        try:
            lock.acquire(timeout=2)  # `dpo.runs` holds it for a moment to see whether a run is running
        except Timeout:
            print(f"{directory} is being executed by another process; wait for it, or end it first", flush=True)
            return IN_USE
        (directory / "error.json").unlink(missing_ok=True)
    try:
        return _guarded(directory)
    finally:
        lock.release()


def _guarded(directory: Path) -> int:
    try:
        config = OmegaConf.load(directory / "config.yaml")
        assert isinstance(config, DictConfig)
        OmegaConf.set_struct(config, True)
        # All before torch is imported. Threads that spin while they wait cost a run 30 times its time where there
        # are more threads than free cores; threads that sleep, a tenth. Huge pages make fresh tensors cheap: a tile
        # of logits costs a fifth more without.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        if config.threads is not None:
            os.environ.update(dict.fromkeys(THREADS, str(config.threads)))
        importlib.import_module(f"dpo.{config.command}").run(config, directory)
        return 0
    except BaseException as error:  # those of torch.distributed.checkpoint are no Exception
        if isinstance(error, KeyboardInterrupt):  # or Stopped, dpo.training.loop's, which has more to say
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # one more must not keep us from saying so
                signal.signal(number, signal.SIG_IGN)
            message = str(error) or "stopped on a signal; the same command resumes"
            if _rank() == 0:
                print(message, flush=True)
                _record(directory, "Stopped", message, "")
            # All ranks are stopped together, and rank 0 alone says so: at the first code that is not 0 torchrun and
            # srun end the other ranks, and rank 0 may still be writing.
            return STOPPED if _rank() == 0 else 0
        kind, message = type(error).__name__, str(error)
        if not isinstance(error, ValueError | RuntimeError):
            traceback.print_exc()
        print(f"{kind}: {message} (traceback: {directory / 'error.json'})", file=sys.stderr, flush=True)
        _record(directory, kind, message, traceback.format_exc())
        return FAILED


def _record(directory: Path, kind: str, message: str, trace: str) -> None:
    """Of several processes the first to fail tells why: the others fail because of it."""
    error = {"type": kind, "message": message, "traceback": trace, "rank": _rank()}
    with suppress(FileExistsError), open(directory / "error.json", "x") as file:
        json.dump(error, file, indent=1)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m dpo.run DIRECTORY")
    for number in (signal.SIGTERM, signal.SIGUSR1):  # until training has handlers of its own
        signal.signal(number, signal.default_int_handler)
    sys.exit(execute(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
