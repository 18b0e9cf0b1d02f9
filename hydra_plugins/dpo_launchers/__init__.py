"""Hydra accepts launchers and sweepers from `hydra_plugins` only: these are those of `dpo.sweep`."""

from collections.abc import Collection
from pathlib import Path

from dpo.sweep import launch, slurm


def report(folder: Path, named: Collection[str]) -> None:
    """The table and figure at the end of a sweep."""
    from dpo import results  # pandas, which what only plans does without

    results.report(folder, named)


class Local(launch.Local):
    """`hydra/launcher=local`."""

    report = staticmethod(report)


class Slurm(slurm.Slurm):
    """`hydra/launcher=slurm`."""

    report = staticmethod(report)


class Grid(launch.Grid):
    """`hydra/sweeper=grid`."""
