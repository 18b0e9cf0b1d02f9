"""What CONTRIBUTING.md shows works where it says to write it, and its table names files that are there."""

import json
import re
import textwrap
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo import references
from dpo.policy.sampling import Sampling
from dpo.sweep.signature import check_signature, instantiate

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = [textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```", PAGE, re.DOTALL | re.MULTILINE)]
EXAMPLES = {  # name -> module, group, options
    "forum": ("dpo.data.hub", "data", {"validation_path": None, "validation_fraction": 0.5, "on_faulty": "drop"}),
    "longer": ("dpo.judges.rules", "judge", {}),
    "fuller": ("dpo.judges.rules", "judge", {"margin": 1}),
    "greedy": ("dpo.engines", "engine", {}),
    "Tempered": ("dpo.references", "reference", {"path": None, "share": 0.5}),
}


def written(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], dict[str, Any]]:
    """The example's node, after it was written into its module; and the names that its code sees."""
    home, group, options = EXAMPLES[name]
    [block] = [block for block in BLOCKS if re.search(rf"^(def|class) {name}\b", block, re.MULTILINE)]
    module = import_module(home)
    scope = dict(vars(module))
    exec(block, scope)
    monkeypatch.setattr(module, name, scope[name], raising=False)
    node = {"_target_": f"{home}.{name}", **options} | ({"_partial_": True} if group in ("judge", "engine") else {})
    return node, scope


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_has_the_signature_of_its_group(name, monkeypatch):
    node, _ = written(name, monkeypatch)
    assert check_signature(EXAMPLES[name][1], node | ({"path": "x"} if name == "forum" else {})) == []


def test_every_example_is_tried():
    assert len(BLOCKS) == len(EXAMPLES)


def test_the_data_set(tmp_path, monkeypatch):
    rows = [{"question": f"{row}?", "a": "no", "b": "yes", "votes_a": 0, "votes_b": row - 1} for row in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    node, _ = written("forum", monkeypatch)
    data = instantiate({**node, "path": str(tmp_path / "rows.jsonl")})
    pairs = {pair.prompt: (pair.chosen, pair.rejected) for split in data.preferences.values() for pair in split}
    assert pairs == {f"{row}?": ("yes", "no") if row else ("no", "yes") for row in range(9) if row != 1}


def test_the_judges(monkeypatch):
    longer = instantiate(written("longer", monkeypatch)[0])
    assert longer(["?", "?"], ["a b", "c"]) == [{"score": 2.0, "words": 2.0}, {"score": 1.0, "words": 1.0}]
    fuller = instantiate(written("fuller", monkeypatch)[0])
    assert fuller(["?"] * 3, ["a b c", "a", "a b"], ["a", "a b c", "a"]) == ["win", "lose", "tie"]


def test_the_engine(monkeypatch):
    node, scope = written("greedy", monkeypatch)
    scope["sample"] = lambda *given: given
    sampling = Sampling(max_new_tokens=4, temperature=0.7, top_p=1.0, batch_size=2)
    found = instantiate(node)("model", "tokenizer", [[1]], [0], sampling, 3, "title")
    assert found == ("model", "tokenizer", [[1]], replace(sampling, temperature=0.0), 3, "title", [0])


def test_the_reference(monkeypatch):
    node, _ = written("Tempered", monkeypatch)
    table = references.Table("the initial policy", "weights", {"train": torch.tensor([[-4.0, -6.0]])})
    monkeypatch.setattr(references.Frozen, "prepare", lambda *_: table)
    made = instantiate(node).prepare("initial", None, {}, None)
    assert made.table["train"].tolist() == [[-2.0, -3.0]]
    assert made.fingerprint != "weights"
    with pytest.raises(ValueError, match=r"reference\.share must be above 0"):
        instantiate({**node, "share": 0.0})


def test_a_part_is_one_file_of_code_and_its_page():
    rows = [row.strip("|").split("|") for row in PAGE.splitlines() if row.startswith(("| a ", "| an "))]
    assert len(rows) == 6
    for _, touched, tests in rows:
        code, page = sorted(re.findall(r"`(.*?)`", touched), key=lambda file: file.endswith(".yaml"))
        assert page.endswith("/<name>.yaml")
        assert (ROOT / page).parent.is_dir()
        assert code == "analysis/<name>.py" or (ROOT / code).is_file()
        assert all(any(ROOT.glob(f"tests/*/{file}")) for file in re.findall(r"`(.*?)`", tests) if "<" not in file)
