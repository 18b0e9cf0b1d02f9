"""How many CPU cores a process has to itself."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

OWN = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


def cores() -> int:
    """Those that it may run on, or fewer where a container has a quota: `docker run --cpus=2` shows all of a machine's
    cores, and holds up threads that are more than its share.
    """
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([there, *map(int, _quotas())]))


def _quotas() -> Iterator[float]:
    """Cores' worth of time of each group that the process is in, and of those around it."""
    lines = OWN.read_text().splitlines() if OWN.is_file() else ()
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        inside = [PurePosixPath(path), *PurePosixPath(path).parents]
        for mount in ("", "unified") if not controllers else ("cpu", controllers):  # of version 2, and of 1
            for folder in (GROUPS / mount / str(one).lstrip("/") for one in inside):
                with suppress(OSError, ValueError):  # not there, or no limit
                    yield _quota(folder, bool(controllers))


def _quota(folder: Path, first: bool) -> float:
    """Raises: OSError, ValueError if there is none."""
    if first:
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    else:
        quota, period = map(int, (folder / "cpu.max").read_text().split())  # "max 100000" where there is none
    if quota <= 0:
        raise ValueError(quota)
    return quota / period
