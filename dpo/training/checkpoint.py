"""Save and resume everything, at any world size.

A checkpoint is a folder `step-<n>` that appears whole, by a rename. It is written by a thread, from a copy of the state
in CPU memory, while training goes on.
"""

import pickle
import random
import re
import shutil
import warnings
from collections.abc import Iterable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dpo.training.sharding import any_true, is_main, rank

warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process saves alone


def latest(directory: Path) -> Path | None:
    """The newest whole checkpoint in `directory`."""
    return next(reversed(_whole(directory)), None)


class Checkpoints:
    """The newest `keep` checkpoints of one training, in `directory`. All ranks make, call and leave it together.

    extra: a module with state of its own. run: what the training is, in words such as policy=0f12; a checkpoint of
    another one is refused.
    """

    def __init__(
        self,
        directory: Path,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        *,
        extra: nn.Module | None = None,
        run: str | None = None,
        keep: int = 1,
    ) -> None:
        self.directory, self.run, self.keep = directory, run, keep
        self.model, self.optimizer, self.scheduler, self.extra = model, optimizer, scheduler, extra
        # The thread's collectives and those of training would wait for each other for ever in one group.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.pending: Future[Any] | None = None
        self.step = 0  # of the newest save

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pending is not None:
            wait([self.pending])

    def save(self, step: int, evaluated: bool = False) -> None:
        """Copy the state after `step` optimizer steps, and begin to write it. evaluated: whether this step was.

        Raises what `finish` raises of the save before.
        """
        self.finish()
        self.step = step
        state = self._state()
        state["about"] = {"step": step, "evaluated": evaluated, "run": self.run}
        state[f"rng-{rank()}"] = pickle.dumps(get_rng())
        if is_main():
            _remove(self.directory.glob("*.unfinished"))  # left by a process that was killed
        written: Any = dcp.async_save(
            state,
            storage_writer=_Writer(self.directory / f"step-{step}", self.keep),
            process_group=self.group,
            no_dist=self.group is None,
        )
        self.pending = written

    @property
    def failed(self) -> bool:
        """Whether this rank knows already that the newest save cannot be written."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def finish(self) -> None:
        """Wait until the newest save is on disk.

        Raises: RuntimeError on all ranks if it cannot be written; the ones before stay as they were.
        """
        error = None if self.pending is None else self.pending.exception()
        self.pending = None
        if any_true(error is not None):
            if is_main():
                _remove(self.directory.glob("*.unfinished"))
            former, kept = latest(self.directory), "there is no earlier one: the same command starts again"
            if former:
                kept = f"the one of step {_step(former)} is intact: the same command resumes from it"
            raise RuntimeError(
                f"could not save step {self.step} in {self.directory}: {_cause(error)} (no space?); {kept}"
            ) from error

    def restore(self) -> tuple[int, bool]:
        """Load the newest checkpoint in place, if there is one; returns its step and whether that was evaluated.

        The number of processes may differ from that of the save; ranks without a saved random state keep theirs.
        """
        path = latest(self.directory)
        if path is None:
            return 0, False
        state = self._state()
        state["about"] = {"step": 0, "evaluated": False, "run": None}
        try:
            reader, mine = FileSystemReader(path), f"rng-{rank()}"
            if mine in reader.read_metadata().state_dict_metadata:
                state[mine] = b""
            dcp.load(state, storage_reader=reader, no_dist=self.group is None)
            about = state["about"]
            if about["run"] != self.run:
                raise ValueError(_other(about["run"], self.run))
        except (Exception, CheckpointException) as error:  # a CheckpointException is no Exception
            raise RuntimeError(
                f"{path} must be a checkpoint of this run: {_cause(error)}; delete it to resume from an earlier one, "
                f"or {self.directory} to start again"
            ) from error
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.extra is not None:
            self.extra.load_state_dict(state["extra"])
        if mine in state:
            set_rng(pickle.loads(state[mine]))
        return about["step"], about["evaluated"]

    def _state(self) -> dict[str, Any]:
        # Before extra's: PyTorch fills an empty optimizer state by a step at learning rate 0, hooks included.
        model_state, optimizer_state = get_state_dict(self.model, self.optimizer)
        return {
            "model": model_state,
            "optimizer": optimizer_state,
            "scheduler": self.scheduler.state_dict(),
            "extra": self.extra.state_dict() if self.extra is not None else {},
        }


class _Writer(FileSystemWriter):
    """Writes under another name, and renames when all ranks have written; then removes what is no longer kept."""

    def __init__(self, target: Path, keep: int) -> None:
        self.unfinished, self.target, self.keep = target.with_name(f"{target.name}.unfinished"), target, keep
        super().__init__(self.unfinished)

    def finish(self, metadata: Any, results: Any) -> None:
        """PyTorch calls it on one rank, and tells the others if it fails."""
        super().finish(metadata, results)
        self.unfinished.rename(self.target)
        _remove(_whole(self.target.parent)[: -self.keep])


def get_rng() -> dict[str, Any]:
    """State of every random generator of this process: Python, NumPy, PyTorch, the current CUDA device."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _whole(directory: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted((path for path in directory.glob("step-*") if _step(path) >= 0), key=_step)


def _step(path: Path) -> int:
    """The step of a whole checkpoint, -1 for anything else: PyTorch writes .metadata last."""
    name = re.fullmatch(r"step-(\d+)", path.name)
    return int(name[1]) if name and (path / ".metadata").is_file() else -1


def _other(there: str | None, run: str | None) -> str:
    changed = [word.partition("=")[0] for word in (run or "").split() if word not in (there or "").split()]
    named = f" ({' and '.join(changed)} changed)" if "=" in (there or "") else ""
    return f"its settings and inputs are {there}, those of this run are {run}{named}"


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        shutil.rmtree(path, ignore_errors=True)


def _cause(error: BaseException | None) -> BaseException | str | None:
    """What went wrong on the first rank that failed."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error or "another process failed"
