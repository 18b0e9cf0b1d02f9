"""What runs gave: tidy frames of their numbers, tables and figures. Reads run directories, and needs nothing else."""

from dpo.results.failures import degenerate, failures
from dpo.results.frames import beaten, final, load, short, swept
from dpo.results.tables import alarm, figure, over_seeds, report, table
from dpo.sweep.directory import configs, reason, status

__all__ = [
    "alarm", "beaten", "configs", "degenerate", "failures", "figure", "final", "load", "over_seeds", "reason", "report",
    "short", "status", "swept", "table",
]  # fmt: skip
