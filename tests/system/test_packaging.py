"""What a wheel holds, and that it works from an empty folder; the console command and its completion."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from dpo.__main__ import MODULES, SWEEPS, VERBS

ROOT = Path(__file__).parents[2]
FIRST = ["pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md"]
FOLDERS = ["dpo", "conf", "experiments", "slurm", "hydra_plugins", "analysis", "tests"]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A wheel, unpacked where no checkout is near."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in FIRST:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    built = subprocess.run([sys.executable, "-c", BUILD, str(site)], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(site / built.stdout.split()[-1]) as wheel:
        wheel.extractall(site)
    return site


def called(folder: Path, *arguments: str, site: Path = ROOT, code: int = 0, **environment: str) -> str:
    """What `dpo ...` says."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'dpo'; from dpo.__main__ import main; main()", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_what_is_in_a_wheel(installed):
    names = {path.name for path in installed.iterdir() if path.suffix != ".whl"}
    about = next(name for name in names if name.endswith(".dist-info"))
    assert names == {"dpo", "hydra_plugins", about}
    for pattern in ("conf/**/*.yaml", "experiments/**/*.yaml", "slurm/execute.sh", "dpo/world/base/*", "dpo/py.typed"):
        files = sorted(ROOT.glob(pattern))
        assert files
        for file in files:
            inside = file.relative_to(ROOT / "dpo" if pattern.startswith("dpo") else ROOT)
            assert (installed / "dpo" / inside).read_bytes() == file.read_bytes()
    assert "dpo = dpo.__main__:main" in (installed / about / "entry_points.txt").read_text()
    assert (installed / about / "licenses" / "LICENSE").read_text().strip().startswith("Apache License")
    metadata = (installed / about / "METADATA").read_text()
    assert "License-Expression: Apache-2.0" in metadata
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"] == "Apache-2.0"


@pytest.mark.long
def test_an_installed_project_in_an_empty_folder(installed, tmp_path):
    """Settings, an experiment, and the job script of a sweep, nothing of it from the checkout."""
    slurm = ["hydra/launcher=slurm", "hydra.launcher.submit=false"]
    text = called(tmp_path, "train", "-m", "beta=0.1,0.2", *slurm, site=installed)
    assert "runs/dev: 2 runs: 0 finished, 2 to submit" in text
    (script,) = (tmp_path / "runs/dev/manifests").glob("*.sbatch")
    assert f"exec bash {installed / 'dpo' / 'slurm' / 'execute.sh'} " in script.read_text()
    assert "name: kl_strength" in called(tmp_path, "train", "figure=kl_strength", "--cfg", "job", site=installed)


def test_help_at_once():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dpo", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    for verb in VERBS:
        assert f"\n  {verb} " in done.stdout
        module = ROOT / "dpo" / MODULES.get(verb, verb).replace(".", "/")
        assert module.with_suffix(".py").exists() or (module / "__main__.py").exists()
    assert "torch" not in done.stderr
    assert "hydra" not in done.stderr


def test_verbs(tmp_path):
    assert "VERB must be one of data, train, sft, " in called(tmp_path, "trane", code=1)
    assert "nowhere must be a folder of run directories" in called(tmp_path, "results", "nowhere", code=1)


def complete(folder: Path, line: str) -> list[str]:
    """What bash offers after `line` and a tab."""
    program = folder / "dpo"  # as pip writes it
    program.write_text(f"#!{sys.executable}\nfrom dpo.__main__ import main\nmain()\n")
    program.chmod(0o755)
    shell = f"""
        eval "$(dpo -sc install=bash)"
        COMP_LINE={line!r} COMP_POINT={len(line)}
        words=($COMP_LINE)
        COMP_CWORD=$(( ${{#words[@]}} {"" if line.endswith(" ") else "- 1"} ))
        hydra_bash_completion
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", shell], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    "line,offered",
    [
        ("dpo tr", ["train"]),
        ("dpo ", list(VERBS)),
        ("dpo train figure=kl", ["figure=kl_strength"]),
        ("dpo train -m beta=0.1 reference=world_c", ["reference=world_clean"]),
    ],
)
def test_completion(tmp_path, line, offered):
    assert sorted(complete(tmp_path, line)) == sorted(offered)


def test_sweeps_are_the_verbs_with_a_page_of_settings():
    assert set(SWEEPS) == {page.stem for page in (ROOT / "conf").glob("*.yaml")} - {"hydra_settings", "push"}
