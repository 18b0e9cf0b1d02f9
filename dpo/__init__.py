"""Direct Preference Optimization in plain PyTorch: how strong a KL constraint, and which reference model?"""

from pathlib import Path

# Where conf/, experiments/ and slurm/ lie: in a checkout beside this package, in a wheel inside of it (see setup.py).
HOME = Path(__file__).resolve().parent
HOME = HOME if (HOME / "conf").is_dir() else HOME.parent
