"""Save and resume everything, at any world size.

A checkpoint is a folder `step-<n>` that appears whole, by a rename. It is written by a thread, from a copy of the state
in CPU memory, while training goes on. It holds safetensors and JSON, so that a file from elsewhere can be wrong, but
can execute nothing: tensors in parts as the processes hold them, and in `about.json`, written last, all else.
"""

import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, wait
from itertools import chain
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dpo.training.distributed import TIMEOUT, any_true, in_files, is_main, rank, world_size

warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process saves alone

ABOUT = "about.json"


def latest(directory: Path) -> Path | None:
    """The newest whole checkpoint in `directory`."""
    return next(reversed(_whole(directory)), None)


class Checkpoints:
    """The newest `keep` checkpoints of one training, in `directory`. All ranks make, call and leave it together.

    extra: a module with state of its own. inputs: what the training depends on, as digests; a checkpoint with others is
    refused.
    """

    def __init__(
        self,
        directory: Path,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        *,
        extra: nn.Module | None = None,
        inputs: Mapping[str, str] | None = None,
        keep: int = 1,
    ) -> None:
        self.directory, self.inputs, self.keep = directory, dict(inputs or {}), keep
        self.model, self.optimizer, self.scheduler, self.extra = model, optimizer, scheduler, extra
        # The thread's collectives and those of training would wait for each other for ever in one group.
        self.group = dist.new_group(backend="gloo", timeout=TIMEOUT) if dist.is_initialized() else None
        self.pending: Future[Any] | None = None
        self.step = 0  # of the newest save

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pending is not None:
            wait([self.pending])

    def save(self, step: int, evaluated: bool = False) -> None:
        """Copy the state after `step` optimizer steps, and begin to write it. evaluated: whether this step was.

        Raises what `finish` raises of the save before; RuntimeError if the weights are not finite, since every attempt
        that resumed from them would fail.
        """
        self.finish()
        self.step = step
        local = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in self.model.parameters())
        if any_true(not all(weight.isfinite().all() for weight in local)):
            raise RuntimeError(f"weights after step {step} must be finite, found otherwise; {self._kept()}")
        model, optimizer = get_state_dict(self.model, self.optimizer)
        tensors = self._tensors(model, optimizer)
        tensors[f"rng.{rank()}"] = torch.frombuffer(bytearray(json.dumps(get_rng()).encode()), dtype=torch.uint8)
        about = {"step": step, "evaluated": evaluated, "inputs": self.inputs, "optimizer": optimizer["param_groups"]}
        about["scheduler"] = self.scheduler.state_dict()
        files = in_files(tensors) | {f"rng.{index}": 1 for index in range(world_size())}
        if is_main():
            _remove(self.directory.glob("*.unfinished"))  # left by a process that was killed
        written: Any = dcp.async_save(
            tensors,
            storage_writer=_Writer(self.directory / f"step-{step}", files, about, self.keep),
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
            raise RuntimeError(
                f"could not save step {self.step} in {self.directory}: {_cause(error)} (no space?); {self._kept()}"
            ) from error

    def _kept(self) -> str:
        if former := latest(self.directory):
            return f"the one of step {_step(former)} is intact: the same command resumes from it"
        return "there is no earlier one: the same command starts again"

    def restore(self) -> tuple[int, bool]:
        """Load the newest checkpoint in place, if there is one; returns its step and whether that was evaluated.

        The number of processes may differ from that of the save; ranks without a saved random state keep theirs.
        """
        path = latest(self.directory)
        if path is None:
            return 0, False
        rng_name = f"rng.{rank()}"
        try:
            about = _about(path)
            recorded = about.get("inputs", {})
            if changed := [key for key in self.inputs | recorded if recorded.get(key) != self.inputs.get(key)]:
                raise ValueError(f"it was made with another {' and another '.join(changed)}")
            model, optimizer = get_state_dict(self.model, self.optimizer)
            tensors = self._tensors(model, optimizer)
            reader = HuggingFaceStorageReader(str(path))
            if saved := reader.read_metadata().state_dict_metadata.get(rng_name):
                tensors[rng_name] = torch.empty(cast(TensorStorageMetadata, saved).size, dtype=torch.uint8)
            dcp.load(tensors, storage_reader=reader, no_dist=self.group is None)  # in place
            _take_numbers(optimizer["state"])
            optimizer["param_groups"] = about["optimizer"]
            set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
            self.scheduler.load_state_dict(about["scheduler"])
            if rng_name in tensors:
                set_rng(json.loads(bytes(tensors[rng_name].tolist())))
        except (Exception, CheckpointException) as error:  # a CheckpointException is no Exception
            raise RuntimeError(
                f"{path} must be a checkpoint of this run: {_cause(error)}; delete it to resume from an earlier one, "
                f"or {self.directory} to start again"
            ) from error
        return about["step"], about["evaluated"]

    def _tensors(self, model: dict[str, Any], optimizer: dict[str, Any]) -> dict[str, Tensor]:
        """All that is trained and its optimizer's, where it lies in memory."""
        # After the optimizer's, which PyTorch makes, if it is empty, by a step at learning rate 0, hooks included.
        frozen = {name for name, weight in self.model.named_parameters() if not weight.requires_grad}
        names = [name for name in _distinct(self.model) if name in model and name not in frozen]
        tensors = {f"model.{name}": model[name] for name in names}
        for name, values in optimizer["state"].items():
            tensors |= _flat(cast(Any, values), f"optimizer.{name}")
        if self.extra is not None:
            extra = self.extra.state_dict()
            tensors |= {f"extra.{name}": extra[name] for name in _distinct(self.extra) if name in extra}
        return tensors


def _flat(values: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    """The tensors of a weight's optimizer state. A whole number (bitsandbytes' step) becomes one, which can be loaded
    in place.
    """
    tensors: dict[str, Tensor] = {}
    for key, value in values.items():
        if isinstance(value, dict):  # bitsandbytes' moments
            tensors |= _flat(value, f"{prefix}.{key}")
        else:
            values[key] = tensors[f"{prefix}.{key}"] = torch.as_tensor(value)
    return tensors


def _take_numbers(states: Any) -> None:
    """Whole numbers of the optimizer's states, which `_flat` had made tensors, are numbers again."""
    for values in states.values():
        for key, value in values.items():
            if isinstance(value, Tensor) and not (value.dim() or value.is_floating_point()):
                values[key] = value.item()


class _Writer(HuggingFaceStorageWriter):
    """Writes under another name, and renames when all ranks have written; then removes what is no longer kept."""

    def __init__(self, target: Path, files: dict[str, int], about: dict[str, Any], keep: int) -> None:
        self.unfinished, self.target, self.keep = target.with_name(f"{target.name}.unfinished"), target, keep
        self.about = json.dumps(about)  # now: training goes on
        super().__init__(str(self.unfinished), files, save_distributed=True)

    def finish(self, metadata: Any, results: Any) -> None:
        """PyTorch calls it on one rank, and tells the others if it fails."""
        about = json.loads(self.about) | {"files": {file.name: file.stat().st_size for file in _parts(self.unfinished)}}
        with open(self.unfinished / ABOUT, "x") as file:
            json.dump(about, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        self.unfinished.rename(self.target)
        _remove(_whole(self.target.parent)[: -self.keep])


def _about(path: Path) -> dict[str, Any]:
    """What a checkpoint is beside its tensors, if its files are there as they were written.

    Raises: ValueError that names the files that are not.
    """
    if not (path / ABOUT).exists():
        raise ValueError("it was written by a former version, which pickled it, and is not read")
    try:
        about = json.loads((path / ABOUT).read_text())
        sizes = dict(about["files"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path / ABOUT} is damaged: {error}") from error
    actual = {file.name: file.stat().st_size for file in _parts(path)}
    damaged = [
        f"{name} must have {sizes.get(name, 0)} bytes, found {actual.get(name, 'no such file')}"
        for name in sorted({*sizes, *actual})
        if sizes.get(name) != actual.get(name)
    ]
    if damaged:
        raise ValueError(f"{'; '.join(damaged[:3])}")
    return about


def _parts(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def _distinct(module: nn.Module) -> list[str]:
    """The names in a module's state; of tied weights the first."""
    return [name for name, _ in chain(module.named_parameters(), module.named_buffers())]


def get_rng() -> dict[str, Any]:
    """State of every random generator of this process, as JSON can hold it: Python, NumPy, PyTorch, the CUDA device."""
    kind, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}
    state["torch"] = torch.get_rng_state().tolist()
    return state | ({"cuda": torch.cuda.get_rng_state().tolist()} if torch.cuda.is_available() else {})


def set_rng(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))


def _whole(directory: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted((path for path in directory.glob("step-*") if _step(path) >= 0), key=_step)


def _step(path: Path) -> int:
    """The step of a whole checkpoint, -1 for anything else; one that was pickled counts, and is refused when read."""
    name = re.fullmatch(r"step-(\d+)", path.name)
    return int(name[1]) if name and any((path / marker).is_file() for marker in (ABOUT, ".metadata")) else -1


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        shutil.rmtree(path, ignore_errors=True)


def _cause(error: BaseException | None) -> BaseException | str | None:
    """What went wrong on the first rank that failed."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error or "another process failed"
