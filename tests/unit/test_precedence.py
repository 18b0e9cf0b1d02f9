"""What decides a key: the command line, else an experiment, else the page of the command, whatever the command."""

import sys
from typing import Any

import pytest
from composing import compose
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from dpo import HOME
from dpo.__main__ import SWEEPS
from dpo.sweep.launch import command

OTHER: dict[type, Any] = {bool: True, int: 17, str: "other"}  # values that no page has


def own(verb: str) -> dict[str, Any]:
    """Other values for the keys of a command's page, which an experiment may say."""
    page: Any = OmegaConf.to_container(OmegaConf.load(HOME / "conf" / f"{verb}.yaml"))
    plain = {key: value for key, value in page.items() if type(value) in OTHER and "${" not in str(value)}
    return {key: OTHER[type(value)] for key, value in plain.items() if key != "command"}


@pytest.mark.parametrize("verb", SWEEPS)
def test_a_table_wins_over_the_page_of_every_command(verb):
    says = own(verb)
    ConfigStore.instance().store(name=f"of_{verb}", group="table", package="_global_", node=says)
    found = compose(verb, f"table=of_{verb}")
    assert says
    assert {key: found[key] for key in says} == says


@pytest.mark.parametrize("verb", sorted({*SWEEPS} - {"data"}))  # which has no name
def test_the_command_line_wins_over_both(verb, monkeypatch, capsys):
    def name(*given: str) -> str:
        monkeypatch.setattr(sys, "argv", [verb, *given, "--cfg", "job"])
        with pytest.raises(SystemExit) as end:
            command(verb)
        assert not end.value.code
        return str(OmegaConf.create(capsys.readouterr().out)["name"])

    page = OmegaConf.load(HOME / "conf" / f"{verb}.yaml").name
    assert [name(), name("table=rounds"), name("name=mine", "table=rounds")] == [page, "rounds", "mine"]
    if verb != "sft":  # which has none of most tables' keys
        assert name("table=summarization") == "summarization"
