"""What pyproject.toml cannot say: a wheel carries conf/, experiments/ and the job script inside of dpo."""

import shutil
from pathlib import Path

from setuptools import setup
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


setup(cmdclass={"build_py": BuildPy})
