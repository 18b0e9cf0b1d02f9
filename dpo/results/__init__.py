"""What runs gave: tidy frames of their numbers, tables and figures. Reads run directories, and needs nothing else."""

from dpo.results.frames import degenerate, final, load, short, swept
from dpo.results.tables import figure, over_seeds, report, table
from dpo.sweep.directory import configs, reason, status

__all__ = [
    "configs", "degenerate", "figure", "final", "load", "over_seeds", "reason", "report", "short", "status", "swept",
    "table",
]  # fmt: skip
