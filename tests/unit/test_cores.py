"""Cores that a process has to itself, by what Linux tells of its control groups; and GPUs."""

import os
from pathlib import Path

import pytest

from dpo import cores as counting
from dpo.cores import cores
from dpo.sweep import gpus

V1 = "4:memory:/a\n2:cpu,cpuacct:/docker/x\n1:cpuset:/\n0::/\n"


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


@pytest.fixture
def groups(tmp_path, monkeypatch) -> Path:
    """Eight cores, and no group yet."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(8)}, raising=False)
    monkeypatch.setattr(counting, "OWN", tmp_path / "own")
    monkeypatch.setattr(counting, "GROUPS", tmp_path / "groups")
    return tmp_path / "groups"


def test_without_quotas_it_is_the_cores_that_it_may_run_on(groups, monkeypatch):
    assert cores() == 8
    counting.OWN.write_text("0::/\n")
    assert cores() == 8
    write(groups, cpu__max="max 100000")
    assert cores() == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert cores() == 3


@pytest.mark.parametrize(("quota", "expected"), [("250000", 2), ("50000", 1), ("800000", 8), ("6400000", 8)])
def test_a_quota_is_as_many_cores_as_it_is_worth(groups, quota, expected):
    """Whole ones; in the first version of control groups, too, which says -1 where there is none."""
    counting.OWN.write_text("0::/\n")
    write(groups, cpu__max=f"{quota} 100000")
    assert cores() == expected
    counting.OWN.write_text(V1)
    write(groups, cpu__max="max 100000")
    for mount in ("cpu", "cpu,cpuacct"):  # a container sees its own group as the root, whatever the path says
        write(groups / mount, cpu__cfs_quota_us=quota, cpu__cfs_period_us="100000")
        assert cores() == expected
        write(groups / mount, cpu__cfs_quota_us="-1")
        assert cores() == 8


def test_the_least_of_the_groups_around_it_counts(groups):
    counting.OWN.write_text("0::/pod/box\n")
    write(groups / "pod" / "box", cpu__max="600000 100000")
    write(groups / "pod", cpu__max="300000 100000")
    assert cores() == 3
    write(groups / "pod" / "box", cpu__max="200000 100000")
    assert cores() == 2


def test_gpus_are_found_without_their_tool(tmp_path, monkeypatch):
    """As in containers that may compute and no more. Else small runs would all go to the first one."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpus, "DEVICES", tmp_path / "dev")
    assert gpus.visible() == []
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia-modeset"):
        (tmp_path / "dev" / name).touch()
    assert gpus.visible() == ["0", "1"]
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: a)'\necho '  MIG 1g.10gb Device 0: (UUID: b)'\n")
    program.chmod(0o755)
    assert gpus.visible() == ["0"]
