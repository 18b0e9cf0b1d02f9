"""Experiment files: their grids become runs, the command line wins over them, and no run is named after one."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from test_launch import said, states, tree  # noqa: F401

from dpo.config import check
from dpo.plan import resolve
from dpo.signature import binds

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "experiments/figure").glob("*.yaml"), *(ROOT / "experiments/table").glob("*.yaml")])

TRIAL = """\
# @package _global_
# A trial.
defaults:
  - override /loss: hinge

name: trial
lr: 3e-4
epochs: 2
hydra:
  mode: MULTIRUN
  sweeper:
    params:
      beta: 0.1,0.2
      seed: 0,1
"""


@pytest.fixture
def trial(tree: Path) -> Path:  # noqa: F811
    (tree / "experiments/table").mkdir(parents=True)
    (tree / "experiments/table/trial.yaml").write_text(TRIAL)
    return tree


def test_the_grid_of_a_file_is_run(trial):
    text = said(trial, "table=trial", "device=cpu", code=0)
    assert "runs/trial: 4 runs: 0 finished, 4 to do" in text
    names = {f"beta={beta},seed={seed}" for beta in (0.1, 0.2) for seed in (0, 1)}
    assert set(states(trial / "runs/trial")) == names
    for file in (trial / "runs/trial").glob("*/config.yaml"):
        frozen = OmegaConf.load(file)
        assert (frozen.loss._target_, frozen.lr, frozen.epochs, frozen.name) == ("dpo.losses.hinge", 3e-4, 2, "trial")
        assert not {"figure", "table"} & (set(frozen) | set(frozen.choices))
    assert "4 runs: 4 finished, 0 to do" in said(trial, "table=trial", code=0)
    # The same settings by hand are the same run.
    text = said(trial, "loss=hinge", "beta=0.1", "seed=0", "lr=3e-4", "epochs=2", "name=trial", code=0)
    assert "1 run: 1 finished, 0 to do" in text


def test_the_command_line_wins(trial):
    text = said(trial, "table=trial", "seed=5", "loss=dpo", "lr=1e-3", "name=mine", "device=cpu", code=0)
    assert "runs/mine: 2 runs: 0 finished, 2 to do" in text
    for file in (trial / "runs/mine").glob("*/config.yaml"):
        frozen = OmegaConf.load(file)
        assert (frozen.loss._target_, frozen.lr, frozen.seed, frozen.epochs) == ("dpo.losses.dpo", 1e-3, 5, 2)
    text = said(trial, "table=trial", "beta=0.1,0.3", "seed=0", "device=cpu", code=0)
    assert set(states(trial / "runs/trial")) == {"beta=0.1,seed=0", "beta=0.3,seed=0"}


def test_a_wrong_grid_starts_nothing(trial):
    text = said(trial, "table=trial", "seed=0,-1", code=1)
    assert "seed must be at least 0" in text
    assert "Could not find 'table/nope'" in said(trial, "table=nope", code=1)
    assert not (trial / "runs").exists()


def grid(file: Path) -> list[list[str]]:
    """Overrides of some runs of an experiment file: every value of every axis, with the first values of the others."""
    group, axes = file.parent.name, []
    for override in OverridesParser.create().parse_overrides(
        [f"{key}={values}" for key, values in OmegaConf.load(file).hydra.sweeper.params.items()]
    ):
        values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]
        axes.append([f"{override.get_key_element()}={value}" for value in values])
    first = [values[0] for values in axes]
    runs = [[*first[:at], value, *first[at + 1 :]] for at, values in enumerate(axes) for value in values]
    return [[f"{group}={file.stem}", *run] for run in runs]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_experiment_can_be_planned(file):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for overrides in grid(file):
            config = compose("train", overrides, return_hydra_config=True)
            assert config.hydra.mode.name == "MULTIRUN"
            assert config.name == file.stem
            check(resolve(config))
        for launcher in ("local", "slurm"):  # an experiment says nothing of the machine that it runs on
            config = compose("train", [*grid(file)[0], f"hydra/launcher={launcher}"], return_hydra_config=True)
            node: Any = OmegaConf.to_container(config.hydra.launcher)
            assert not binds("hydra.launcher", {key: value for key, value in node.items() if key != "_convert_"}, ())
    header = file.read_text().split("defaults:")[0]
    assert f"python -m dpo.train {file.parent.name}={file.stem}" in header
    index = (ROOT / "experiments/README.md").read_text()
    assert f"{file.parent.name}={file.stem}" in index
