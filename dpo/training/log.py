"""What a run records while it works: metrics and samples as JSON lines, a W&B mirror; and its progress bars.

`metrics.jsonl` is the record. W&B only mirrors it, and can neither ask, block nor end a run.
"""

import io
import json
import logging
import math
import netrc
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self
from urllib.parse import urlparse

from tqdm import tqdm

from dpo.training.distributed import is_main

logger = logging.getLogger(__name__)
WANDB_TIMEOUT = 20  # seconds that W&B may hold up the start or the end of a run


class Mirror(Protocol):
    """Where runs are mirrored by wandb."""

    mode: Any  # "auto", "online", "offline" or "disabled"
    project: str
    entity: str | None


class Log:
    """Rows of one run. Only rank 0 writes; a context, so that the mirror is closed with the right verdict.

    wandb: None: no mirror.
    """

    epoch_steps: int | None = None  # optimizer steps of an epoch; `fit` sets it

    def __init__(
        self,
        directory: str | Path,
        wandb: Mirror | None = None,
        run_id: str | None = None,
        group: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.directory, self.run_id = Path(directory), run_id
        self.metrics, self.samples = self.directory / "metrics.jsonl", self.directory / "samples.jsonl"
        self.mirror = _mirror(self.directory, wandb, run_id, group, config) if wandb and is_main() else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.mirror is not None:
            self._mirrored("finish", exit_code=int(kind is not None))
            self.mirror = None

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """One row, after `step` optimizer steps. A value that is not finite is written as null."""
        if not is_main():
            return
        epoch = {"epoch": step / self.epoch_steps} if self.epoch_steps else {}
        values = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        _append(self.metrics, [{"step": step, "split": split, **epoch, **values}])
        named = {f"{split}/{key}": value for key, value in values.items()}
        self._mirrored("log", {**epoch, **named}, step=step)

    def write_last(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """As `write`, in the place of the row that a process wrote which was killed before the run was finished."""
        self.rewind(step, evaluated=True, but=split)
        self.write(step, split, metrics)

    def sample(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of `samples.jsonl`, and a table of the mirror: what the model answers after `step` optimizer steps."""
        if is_main():
            _append(self.samples, [{"step": step, **row} for row in rows])
            if rows:
                self._mirrored("log", lambda: {"samples": _table(step, rows)}, step=step)

    def rewind(self, step: int, evaluated: bool, but: str = "") -> None:
        """Drop the rows that a run resumed after `step` steps will write again.

        evaluated: the evaluation of that step is done and stays, but for rows of this split.
        """
        for path in (self.metrics, self.samples):
            if is_main() and path.exists():
                rows = path.read_text(errors="replace").splitlines(keepends=True)
                unfinished = path.with_suffix(".unfinished")
                try:
                    unfinished.write_text("".join(row for row in rows if _keeps(row, step, evaluated, but)))
                    unfinished.replace(path)
                except OSError as error:
                    raise _unwritten(path, error) from error

    def _mirrored(self, method: str, *values: Any, **options: Any) -> None:
        try:
            if self.mirror is not None:
                made = [value() if callable(value) else value for value in values]
                getattr(self.mirror, method)(*made, **options)
        except Exception as error:
            logger.warning(f"wandb: off from here on, the run goes on: {_short(error)}")
            self.mirror = None


def _table(step: int, rows: Sequence[Mapping[str, Any]]) -> Any:
    """A W&B table of these rows alone, so that what is sent grows with their number and a resumed run has none to know;
    `runs.history.concat["samples"]` shows those of all steps. Text is text, chats are JSON.
    """
    import wandb

    names: Any = ["step", *dict.fromkeys(name for row in rows for name in row)]
    cells = [[step, *(row.get(name) for name in names[1:])] for row in rows]
    plain: Any = [[json.dumps(value) if isinstance(value, list | dict) else value for value in row] for row in cells]
    return wandb.Table(columns=names, data=plain, allow_mixed_types=True)


def _keeps(row: str, step: int, evaluated: bool, but: str) -> bool:
    try:
        content = json.loads(row)
    except ValueError:
        return False  # cut short when the process was killed
    if not isinstance(content, dict) or not isinstance(content.get("step"), int):
        return False  # no row of ours
    split = content.get("split")
    return content["step"] < step or (content["step"] == step and (split == "train" or (evaluated and split != but)))


def _append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    try:
        with open(path, "a") as file:
            file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    except OSError as error:
        raise _unwritten(path, error) from error


def _unwritten(path: Path, error: OSError) -> RuntimeError:
    return RuntimeError(
        f"could not write {path} (disk full?): {error}; the same command resumes from the last checkpoint"
    )


def _mirror(
    directory: Path, settings: Mirror, run_id: str | None, group: str | None, config: dict[str, Any] | None
) -> Any:
    """The W&B run, or None. The package is imported only when it is used."""
    mode = settings.mode
    if mode not in ("auto", "online", "offline", "disabled"):
        raise ValueError(f"wandb.mode must be auto, online, offline or disabled, got {mode}")
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "online") if _has_key() else "disabled"
    if mode == "online" and not _has_key():
        logger.warning("wandb: offline, for want of a key in WANDB_API_KEY or .netrc; see `wandb sync`")
        mode = "offline"
    if mode == "disabled":
        return None
    try:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        run = wandb.init(
            project=_accepted(settings.project),
            entity=settings.entity,
            group=group and _accepted(group),
            id=run_id and _accepted(run_id),
            name=_accepted(directory.name),
            config=config,
            dir=directory,
            mode=mode,
            resume="allow",
            settings=wandb.Settings(init_timeout=WANDB_TIMEOUT, finish_timeout=WANDB_TIMEOUT, console="off"),
        )
        if run.url:
            logger.info(f"wandb: {run.url}")
        return run
    except Exception as error:
        logger.warning(f"wandb: off, the run goes on without it: {_short(error)}")
        return None


def _accepted(name: str) -> str:
    """A name as W&B takes it: no slash and the like, 128 characters, of which the last tell runs apart."""
    return re.sub(r"[^\w.,+=@\[\] -]", "-", name).strip()[-128:].strip() or "-"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return bool(netrc.netrc(os.environ.get("NETRC")).authenticators(host))
    except (OSError, netrc.NetrcParseError):
        return False


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


class _Lines(tqdm):
    """In a log file, which cannot write over a bar: a line where more is done than in the last one."""

    monitor_interval = 0  # no thread: every update looks at the clock

    def display(self, *_: object, **__: object) -> None:
        if self.n != self.last_print_n:
            print(self, file=sys.stderr, flush=True)


def progress(items: Iterable[Any] | None = None, *, total: int | None = None, name: str, first: int = 0) -> tqdm:
    """Rate and time left: a bar on a terminal, elsewhere a line every 10 s and one at the end; rank 0 only.

    Wraps an iterable, or counts by `update` inside `with progress(total=..., name=...) as bar`. name "": quiet.
    """
    options = {"total": total, "initial": first, "desc": name, "disable": not (name and is_main())}
    if sys.stderr.isatty():
        return tqdm(items, dynamic_ncols=True, **options)
    return _Lines(items, mininterval=10, miniters=1, ncols=0, file=io.StringIO(), **options)
