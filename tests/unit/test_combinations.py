"""Combinations of overrides that share a composition, against Hydra, which composes each by itself."""

import copy
from collections.abc import Iterator

import pytest
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dpo import HOME
from dpo.sweep.command_line import message
from dpo.sweep.launch import Combinations, _composed
from dpo.sweep.plan import Composed


@pytest.fixture(scope="module")
def loader() -> Iterator[ConfigLoader]:
    with initialize_config_dir(str(HOME / "conf"), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


@pytest.fixture(scope="module")
def master(loader) -> DictConfig:
    return loader.load_configuration("train", ["hydra/launcher=slurm"], RunMode.MULTIRUN)


def alone(loader: ConfigLoader, master: DictConfig, overrides: list[str]) -> Composed:
    config = loader.load_sweep_config(master, overrides)
    return _composed(config, config.hydra, ["beta"])


COMBINATIONS = [
    ["beta=0.2", "seed=1", "reference=initial"],
    ["seed=2", "reference=initial", "beta=0.3"],  # the options of the first, in another order of keys
    ["beta=0.2", "reference=reference_free", "seed=1"],
    ["reference=initial", "loss=robust", "loss.beta=${lr}", "beta=1", "beta=2"],  # of two values the last counts
    [
        "loss=robust",
        "reference=initial",
        "adam_betas=[0.1,0.2]",
        "name='a b'",
        "steps=null",
        "sft={lr: 0.5, epochs: 2}",
    ],
    ["judge@evaluation.judge=gold", "data.seed=7", "wandb.mode=disabled", "evaluation.instructions=why"],
    ["+figure=kl_strength", "seed=3"],
    ["+data.more=1", "data.more=2", "beta=0.5"],  # what adds or takes away may be in the way of what comes after it
    ["loss=robust", "~loss.beta", "beta=0.5"],
    ["loss={beta: 0.7}", "beta=0.4"],  # values for a group, which choose no option
]


def test_each_is_as_hydra_composes_it(loader, master):
    combinations = Combinations(loader, master, ["beta"])
    for overrides in COMBINATIONS:
        found, expected = combinations.compose(overrides), alone(loader, master, overrides)
        assert OmegaConf.to_container(found.config) == OmegaConf.to_container(expected.config), overrides
        assert list(found.config) == list(expected.config)
        assert (found.overrides, found.choices) == (expected.overrides, expected.choices)
        assert found.swept == frozenset(["beta"])
        assert OmegaConf.is_struct(found.config)


def test_the_store_of_schemas_is_shared_and_stays_as_it_is(loader, master):
    assert copy.deepcopy(ConfigStore.instance()) is ConfigStore.instance()
    schema = OmegaConf.to_container(ConfigStore.instance().load("train_schema.yaml").node)
    first = alone(loader, master, ["beta=0.2"]).config
    first.policy.max_length, first.adam_betas, first.wandb.mode = 3, [0.1, 0.2], "offline"
    assert OmegaConf.to_container(ConfigStore.instance().load("train_schema.yaml").node) == schema
    assert alone(loader, master, []).config.wandb.mode == "auto"


@pytest.mark.parametrize(
    "overrides",
    [
        ["beta=0.2", "betta=0.1"],
        ["seed=one", "beta=0.2"],
        ["loss=none_such", "beta=0.2"],
        ["data.path=x", "+data.path=y"],
        ["beta=0.1", "~seed=3"],
    ],
)
def test_what_hydra_refuses_is_refused_in_its_words(loader, master, overrides):
    combinations = Combinations(loader, master)
    combinations.compose(["beta=0.1", "seed=1"])
    with pytest.raises(HydraException) as expected:
        alone(loader, master, overrides)
    with pytest.raises(HydraException) as found:
        combinations.compose(overrides)
    assert message(found.value) == message(expected.value)


def test_those_of_the_same_options_are_composed_once(loader, master, monkeypatch):
    combinations, asked = Combinations(loader, master), []
    compose = loader.load_sweep_config
    monkeypatch.setattr(loader, "load_sweep_config", lambda *given: (asked.append(given[1]), compose(*given))[1])
    given = [[f"beta={beta}", f"loss={loss}", "seed=5"] for beta in (0.1, 0.2, 0.3) for loss in ("dpo", "ipo")]
    composed = [combinations.compose(one) for one in given]
    assert asked == [["loss=dpo"], ["loss=ipo"]]
    assert [one.config.beta for one in composed] == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    assert [one.choices["loss"] for one in composed] == ["dpo", "ipo"] * 3
    composed[0].config.data.seed = 11
    assert combinations.compose(given[0]).config.data.seed != 11
