"""Direct Preference Optimization in plain PyTorch: how strong a KL constraint, and which reference model?"""

import logging
import os
import sys
import threading
from pathlib import Path

# Where conf/, experiments/ and slurm/ lie: in a checkout beside this package, in a wheel inside of it (see setup.py).
HOME = Path(__file__).resolve().parent
HOME = HOME if (HOME / "conf").is_dir() else HOME.parent


class _Rank0(logging.Handler):
    """Bare messages on standard output, above a progress bar. Of several ranks rank 0 alone speaks."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # the process that plans does without

        try:
            if int(os.environ.get("RANK", "0")) == 0:  # known before the group is joined
                tqdm.write(self.format(record), file=sys.stdout)  # the one of now: it may be redirected
                sys.stdout.flush()
        except Exception:
            self.handleError(record)


def _own_lock() -> None:
    """Forks share the lock that tqdm writes under: one killed while it writes would stop the others for good."""
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.set_lock(threading.RLock())


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_own_lock)

# Modules log to `logging.getLogger(__name__)`. They are heard in a notebook, too, and whatever the root logger does.
_logger = logging.getLogger(__name__)
_logger.setLevel(logging.INFO)
_logger.propagate = False
_logger.handlers = [_Rank0()]
