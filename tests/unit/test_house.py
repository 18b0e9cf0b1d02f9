"""The house keeps its layers, and every value its comment."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = [  # imports go to a lower layer or stay in theirs, and never in a circle
    {"HOME", "bill", "cache", "cores", "endpoint", "training"},
    {"data", "losses", "policy", "responses", "win_rates", "world"},
    {"engines", "references", "tables", "judges", "vllm_scorer"},
    {"sweep"},
    {"results"},
    {"settings", "evaluate", "generate", "judge", "sft", "world.pretrain"},
    {"score", "train", "rounds", "push", "show", "data.__main__"},
]
PRINTING = {
    *("dpo.__main__", "dpo.results.tables"),
    *(f"dpo.sweep.{module}" for module in ("execute", "launch", "rounds", "slurm")),
}
FILES = sorted((ROOT / "dpo").rglob("*.py"))


def module(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def layer(name: str) -> int:
    parts = name.split(".")[1:]
    return next(n for n, layer in enumerate(LAYERS) if layer & {".".join(parts[:2]), *parts[:1]} - _outranked(parts))


def _outranked(parts: list[str]) -> set[str]:
    return {parts[0]} if any(".".join(parts[:2]) in layer for layer in LAYERS) and len(parts) > 1 else set()


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from dpo.data import batches` imports a module, `from dpo.cache import digest` a name
            path = ROOT / node.module.replace(".", "/")
            modules = {a.name for a in node.names if (path / a.name).is_dir() or (path / f"{a.name}.py").is_file()}
            found |= {f"{node.module}.{name}" for name in modules}
            if len(modules) < len(node.names):
                found.add(f"{node.module}.HOME" if node.module == "dpo" else node.module)
    return {name for name in found if name.startswith("dpo.")}


@pytest.mark.parametrize("file", [f for f in FILES if f != ROOT / "dpo/__main__.py"], ids=lambda f: module(f))
def test_imports_go_down(file):
    mine = module(file)
    for theirs in imports(file):
        assert layer(theirs) <= layer(mine), f"{mine} must not import {theirs}"
        if mine.startswith("dpo.training"):
            assert theirs.startswith("dpo.training")
        assert not mine.startswith("dpo.losses") or theirs.startswith("dpo.losses"), "losses know no model and no data"


COMMANDS = {
    "dpo/data/__main__.py",
    "dpo/settings.py",
    *(f"dpo/{verb}.py" for verb in ("evaluate", "generate", "judge", "push", "score", "sft", "show", "train")),
}


@pytest.mark.parametrize("file", FILES, ids=lambda f: module(f))
def test_only_commands_see_the_config(file):
    """Below them functions take what they need, typed."""
    if str(file.relative_to(ROOT)) in COMMANDS or "sweep" in file.parts:
        return
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.arg) and node.arg in ("config", "settings"):
            assert node.annotation is not None, node.arg
            assert ast.unparse(node.annotation) not in ("Any", "DictConfig"), f"{file}, line {node.lineno}"


def test_no_imports_in_a_circle():
    assert list(TopologicalSorter({module(file): imports(file) - {module(file)} for file in FILES}).static_order())


def test_there_are_seven_layers_at_most():
    assert len(LAYERS) <= 7


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_file_is_read_in_one_sitting(file):
    assert len(file.read_text().splitlines()) <= 500


def test_training_does_not_know_what_a_preference_is():
    for file in (ROOT / "dpo" / "training").glob("*.py"):
        words = file.read_text().lower()
        assert not any(word in words for word in ("preference", "chosen", "rejected", "transformers import")), file


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_commands_print_their_results_and_all_else_is_logged(file):
    """`main` and a few modules of the command line print; a run has ranks, and a progress bar."""
    tree = ast.parse(file.read_text())
    commands = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    printed = {node for command in commands for node in _prints(command)}
    assert module(file) in PRINTING or not _prints(tree) - printed, "log it: logging.getLogger(__name__)"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("getLogger"):
            one = ast.unparse(node)
            hushed = f"{one}.setLevel(" in ast.unparse(tree)
            assert one == "logging.getLogger(__name__)" or hushed, "a logger outside `dpo` is not heard"


def _prints(tree: ast.AST) -> set[ast.Call]:
    """Calls of a bare `print`; one to a file or to standard error says where it goes."""
    calls = {node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"}
    return {call for call in calls if not any(keyword.arg == "file" for keyword in call.keywords)}


def test_every_value_has_its_comment():
    for page in sorted((ROOT / "conf").rglob("*.yaml")):
        for line in page.read_text().splitlines():
            key, _, rest = line.partition(":")
            value = rest.split("#")[0].strip()
            plain = not key.startswith(("#", "hydra", " ", "defaults", "_", "-"))
            if plain and value and page.parent.name != "hydra":
                assert "#" in line, f"{page.name}: {line}"


def test_lines_of_the_readme_have_at_most_100_characters():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 100]


@pytest.mark.parametrize("file", FILES, ids=lambda f: module(f))
def test_an_assert_does_nothing_but_tell_a_type(file):
    """`python -O` leaves them out, with whatever a property or a call in them would do."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Assert):
            assert re.fullmatch(r"isinstance\([\w., ]+\)|[\w.]+ is not None", ast.unparse(node.test)), ast.unparse(node)
