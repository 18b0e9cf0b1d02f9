"""The house keeps its layers, and every value its comment."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [  # imports go to a lower layer, or to the same one where it says so
    {"HOME", "training", "cache", "signature", "squeue", "directory"},
    {"config", "data.records", "alpaca_eval"},
    {
        "runs",
        "drawing",
        "losses",
        "data.chats",
        "data.tokens",
        "data.world",
        "data.hub",
        "data.batches",
        "data.truncation",
    },
    {"policy", "run"},
    {"reference", "judges", "launch", "selection", "slurm", "inputs", "rehearse", "plan"},
    {"evaluate", "generate", "pretrain"},
    {"sft"},
    {"score"},
    {"train"},
]
FILES = sorted((ROOT / "dpo").rglob("*.py"))


def part(module: str) -> str:
    """dpo.policy.logps -> policy; dpo.data.world -> data.world."""
    names = module.split(".")[1:]
    return ".".join(names[:2]) if names[0] == "data" and len(names) > 1 else names[0]


def layer(name: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if name in layer)


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from dpo.data import world` imports a module, `from dpo.cache import digest` a name
            path = ROOT / node.module.replace(".", "/")
            found |= {f"{node.module}.{a.name}" if path.is_dir() else node.module for a in node.names}
    return {module for module in found if module.startswith("dpo.")}


@pytest.mark.parametrize("file", [f for f in FILES if f.name != "__init__.py"], ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_down(file):
    mine = part(".".join(file.relative_to(ROOT).with_suffix("").parts))
    for module in imports(file):
        theirs = part(module)
        assert layer(theirs) <= layer(mine), f"{mine} must not import {theirs}"
        if mine == "training":
            assert theirs == "training"
        if mine in ("losses",):
            assert theirs == "training", "losses know no model and no data"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_file_is_read_in_one_sitting(file):
    assert len(file.read_text().splitlines()) <= 500


def test_training_does_not_know_what_a_preference_is():
    for file in (ROOT / "dpo" / "training").glob("*.py"):
        words = file.read_text().lower()
        assert not any(word in words for word in ("preference", "chosen", "rejected", "transformers import")), file


def test_every_value_has_its_comment():
    for page in sorted((ROOT / "conf").rglob("*.yaml")):
        for line in page.read_text().splitlines():
            key, _, rest = line.partition(":")
            value = rest.split("#")[0].strip()
            plain = not key.startswith(("#", "hydra", " ", "defaults", "_", "-"))
            if plain and value and page.parent.name != "hydra":
                assert "#" in line, f"{page.name}: {line}"
