"""What a config may name in `_target_`: our functions for its group, a package that the environment names, no other."""

import inspect
import math
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest
from omegaconf import OmegaConf

from dpo.sweep.schema import OPEN_GROUPS
from dpo.sweep.signature import PLUGINS, check_signature, fits, instantiate, kind

MINE = """
from os import system
from dpo.data.records import Dataset
from dpo.losses import Loss, PairLogps, hinge
from dpo.references import ReferenceFree

def mine(pair: PairLogps, beta: float, power: float) -> Loss:
    return hinge(pair, beta)

def unlike(pair: PairLogps, beta: float) -> float:
    return 0.0

def own(path: str) -> Dataset: ...

class Near(ReferenceFree): ...

def near() -> Near: ...
"""


class Bomb:
    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self):
        return Path.touch, (self.crater,)


@pytest.fixture
def crater(tmp_path, monkeypatch):
    """A file that appears when a plant beside it is unpickled, called or imported; the plants are on the path."""
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(Bomb(tmp_path / "crater")))
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'crater')!r}, 'w')\ndef dpo(): ...\n")
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("")
    (tmp_path / "my_package" / "losses.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("planted", "my_package", "my_package.losses"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delenv(PLUGINS, raising=False)
    return tmp_path / "crater"


def roads(crater: Path) -> list[dict]:
    """Nodes that would make the crater if they were followed."""
    bomb, touch = str(crater.with_name("bomb.pkl")), f"touch {crater}"
    nested = {"_target_": "os.system", "command": touch}
    return [
        {"_target_": "pandas.read_pickle", "filepath_or_buffer": bomb},
        {"_target_": "torch.load", "f": bomb, "weights_only": False},
        {"_target_": "os.system", "command": touch},
        {"_target_": "os.system", "_args_": [touch]},
        {"_target_": "builtins.exec", "_args_": [f"open({str(crater)!r}, 'w')"]},
        {"_target_": "subprocess.run", "args": ["touch", str(crater)]},
        {"_target_": "functools.partial", "_args_": [nested]},
        {"_target_": "hydra.utils.call", "_args_": [nested]},
        {"_target_": "dpo.queue.ask", "_args_": ["touch", str(crater)]},  # ours, but of no group
        {"_target_": "dpo.queue.ask", "command": touch},
        {"_target_": "dpo.losses.pairs.torch.load", "f": bomb, "weights_only": False},  # through a module of ours
        {"_target_": "dpo.references.Path.touch", "self": str(crater)},
        {"_target_": "dpo.references.Path", "_args_": [str(crater)]},
        {"_target_": "dpo.losses.objectives._log_odds"},
        {"_target_": "dpo.data.records.write_rows", "path": str(crater), "rows": []},
        {"_target_": "dpo.data.hub.parse", "path": bomb, "record": nested},
        {"_target_": "planted.dpo"},  # importing it is enough
        {"_target_": "dpo.losses..planted"},
        {"_target_": "planted"},
        {"_target_": ""},
        {"_target_": {"_target_": "planted.dpo"}},
        {"_target_": "dpo.losses.dpo", "beta": 0.1, "label_smoothing": nested},
        {"_target_": "dpo.losses.dpo", "beta": 0.1, "label_smoothing": 0.0, "_partial_": True, "more": nested},
        {"_target_": "dpo.losses.dpo", "beta": 0.1, "label_smoothing": 0.0, "_partial_": nested},
        {"_target_": "dpo.losses.dpo", "beta": 0.1, "label_smoothing": 0.0, "_partial_": True, "_convert_": nested},
        {"_target_": "dpo.losses.dpo", "beta": 0.1, "label_smoothing": 0.0, "_partial_": True, "_recursive_": True},
        {"_target_": "dpo.data.records.file", "path": "${oc.env:HOME}", "validation_path": nested},
    ]


def test_no_road_leads_to_code_of_others(crater):
    for node in roads(crater):
        for group in OPEN_GROUPS:
            assert check_signature(group, node), (group, node)
        for form in (node, OmegaConf.create(node)):
            try:
                called = instantiate(form)
            except Exception:
                called = None
            assert called is None or called.func.__module__ == "dpo.losses.objectives", node
    assert not crater.exists()
    assert "planted" not in sys.modules


def test_a_function_of_another_group_is_refused():
    ours = {
        "data": {"_target_": "dpo.world.language.world"},
        "judge": {"_target_": "dpo.judges.gold", "_partial_": True},
        "loss": {"_target_": "dpo.losses.dpo", "_partial_": True, "beta": 0.1, "label_smoothing": 0.0},
        "reference": {"_target_": "dpo.references.ReferenceFree"},
    }
    for group in OPEN_GROUPS:
        for other, node in ours.items():
            said = "\n".join(check_signature(group, node))
            assert ("_target_ must name a function" in said) == (group != other), (group, other)
    assert "must name a function" in check_signature("hydra.launcher", {"_target_": "os.system", "command": "true"})[0]
    metrics = {"_target_": "dpo.losses.pairs.metrics", "_partial_": True, "loss": 1}
    assert "which must return dpo.losses.pairs.Loss by its annotation" in check_signature("loss", metrics)[0]
    abstract = check_signature("reference", {"_target_": "dpo.references.ABC"})
    assert "defines no such function" in abstract[0]
    assert "loss.pair is not an option" in check_signature("loss", ours["loss"] | {"pair": 1})[0]  # given later
    assert "loss._partial_ must be true" in check_signature("loss", ours["loss"] | {"_partial_": False})[0]
    assert (
        "reference._partial_ must be false" in check_signature("reference", ours["reference"] | {"_partial_": True})[0]
    )


def test_a_package_of_the_users_own_is_named_by_the_environment(crater, monkeypatch):
    loss = {"_target_": "my_package.losses.mine", "_partial_": True, "beta": 0.1, "power": 2.0}
    assert f"named by the environment: {PLUGINS}=package" in check_signature("loss", loss)[0]
    with pytest.raises(ValueError, match="must lie in"):
        instantiate(loss)
    assert "my_package" not in sys.modules
    monkeypatch.setenv(PLUGINS, "other, my_package")
    assert check_signature("loss", loss) == []
    assert instantiate(loss).keywords == {"beta": 0.1, "power": 2.0}
    assert "loss.power must be float" in check_signature("loss", loss | {"power": "x"})[0]
    assert check_signature("data", {"_target_": "my_package.losses.own", "path": "x"}) == []
    for near in ("Near", "near"):
        assert check_signature("reference", {"_target_": f"my_package.losses.{near}"}) == []
    unlike = {"_target_": "my_package.losses.unlike", "_partial_": True, "beta": 0.1}
    assert "must return dpo.losses.pairs.Loss by its annotation, found float" in check_signature("loss", unlike)[0]
    assert "defines no such function" in check_signature("loss", loss | {"_target_": "my_package.losses.system"})[0]
    assert "must lie in" in check_signature("loss", loss | {"_target_": "my_package_2.losses.mine"})[0]


@dataclass
class Own:
    size: int


@pytest.mark.parametrize(
    "annotation, right, wrong",
    [
        (int, [0, -1], [True, 1.0, "1", None, [1]]),
        (float, [1.5, 2, math.inf, math.nan], [False, "1.5", None, [1.5]]),
        (bool, [True, False], [0, 1, "true", None]),
        (str, ["", "1"], [1, None, ["a"]]),
        (None, [None], [0, "", False]),
        (float | None, [None, 1, 0.5], [True, "x"]),
        (int | str, [1, "a"], [True, 1.5, None]),
        (Literal["a", "b"] | None, ["a", None], ["c", 1, True]),
        (Literal[1, 2], [1], [3, "1", None]),
        (list[float], [[], [1, 0.5]], [[True], ["a"], [None], "ab", 1.0, {}]),
        (list[str], [["a"]], ["a", [1]]),
        (dict[str, float], [{}, {"a": 1}], [{"a": "b"}, {"a": True}, [], "a"]),
        (list, [[1, "a"]], ["a", {}]),
        (Path, [], ["a", None]),
        (Own, [], [{"size": 1}, 1, None]),
        (pytest.Item, [], ["a", 1]),
        (Any, [None, True, {}], []),
        (inspect.Parameter.empty, [None, True, {}], []),
        (TypeVar("T"), [None, 1, "a"], []),
        (list["Unknown"], [[1], ["a"]], []),  # noqa: F821
    ],
)
def test_types(annotation, right, wrong):
    assert [value for value in right if not fits(value, annotation)] == []
    assert [value for value in wrong if fits(value, annotation)] == []


def test_types_are_written_as_a_reader_writes_them():
    assert kind(float | None) == "float | None"
    assert kind(list[float]) == "list[float]"
    assert kind(Literal["a", "b"]) == "one of a, b"
