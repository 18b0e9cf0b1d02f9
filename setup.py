"""What pyproject.toml cannot say: a wheel carries conf/, experiments/ and the job script in dpo, and no analysis/."""

import shutil
import sys
from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """They stay at the top of the repository, where an editable install finds them."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for pattern in ("conf/**/*.yaml", "experiments/**/*.yaml", "slurm/execute.sh"):
                for file in Path().glob(pattern):
                    target = Path(self.build_lib, "dpo", file)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, target)


PACKAGES = ["dpo*", "hydra_plugins*"]  # Hydra finds plugins nowhere else
if "editable_wheel" in sys.argv:
    PACKAGES.append("analysis*")  # the notebooks of a checkout import it, wherever they are started

setup(packages=find_namespace_packages(include=PACKAGES), cmdclass={"build_py": BuildPy})
