"""The studies and their notebooks, executed on small sweeps of whole runs."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from composing import composed
from nbclient import NotebookClient
from omegaconf import OmegaConf

from analysis import kl_strength, pair_gaps, reference_compatibility, token_level
from dpo import sft, train
from dpo.sweep.identity import identity
from dpo.sweep.plan import _given, name, resolve
from dpo.sweep.schema import check

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
TINY = [
    *("data.demonstrations=32", "data.train=8", "data.validation=6", "data.test=8", "sft.steps=2", "threads=1"),
    *("max_new_tokens=40", "evaluation.log_samples=0", "wandb.mode=disabled"),
]
SWEEPS = {  # name: grids, each a run per combination
    "references": ("sft", [["data.summaries=clean,alien_clean"]]),
    "kl_strength": ("train", [["beta=0.1,1", "lr=1e-3", "seed=0,1", "evaluate_every=1", "evaluate_prompts=4"]]),
    "necessity": (
        "train",
        [
            ["reference=initial,reference_free,unconditional", "beta=0.1,10"],
            ["reference=reference_free", "loss=simpo,orpo", "beta=1"],
            ["reference=initial", "beta=0.1", "steps=0"],
        ],
    ),
    "compatibility": (
        "train",
        [["data.summaries=human,alien", "reference=initial,world_clean,world_alien", "beta=0.1,1"]],
    ),
    "tuned_reference": ("train", [["reference=initial,world_clean", "beta=0.1"]]),
}


def combinations(grid: list[str]) -> list[list[str]]:
    runs: list[list[str]] = [[]]
    for axis in grid:
        key, values = axis.split("=")
        runs = [[*run, f"{key}={value}"] for run in runs for value in values.split(",")]
    return runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `runs/` of every sweep, a few steps each."""
    folder, before = tmp_path_factory.mktemp("studies"), Path.cwd()
    os.chdir(folder)
    for sweep, (verb, grids) in SWEEPS.items():
        for overrides in [run for grid in grids for run in combinations(grid)]:
            seed = [] if any(one.startswith("seed") for one in overrides) else ["seed=0"]
            small = ["batch_size=8", "evaluate_every=0", "steps=2"] if verb == "train" else []
            one = composed(verb, *small, *TINY, *overrides, *seed, f"name={sweep}")
            config, groups = resolve(one.config), one.choices
            check(config)
            choices = {group: groups[group] for group in ("loss", "reference", "data") if group in groups}
            id = identity(config)
            directory = Path("runs") / sweep / name(_given([*overrides, *seed], {**config, "choices": choices}), id)
            directory.mkdir(parents=True)
            frozen = OmegaConf.create({"id": id, **config, "choices": choices})
            OmegaConf.save(frozen, directory / "config.yaml")
            {"sft": sft, "train": train}[verb].run(frozen, directory)
    os.chdir(before)
    return folder


@pytest.fixture
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def test_strength(inside):
    tables, figures = kl_strength.study(kl_strength.read("runs/kl_strength"))
    assert tables["table_1"].index.tolist() == ["inf", "1", "0.1"]
    assert (tables["measures"].loc["0.001, 0.1", ["correct", "wrong", "any wrong", "valid", "KL"]] != "").all()
    assert tables["table_2"].loc["inf"].str.match(r"0\.\d{3}$").all()
    assert {*tables["claims"]["verdict"]} <= {"supports", "refutes", "equivalent", "undecided"}
    [axis] = figures["frontier"].axes
    points = sum(len(line.get_xdata()) for line in axis.lines[1:])
    assert points == 4 + 4  # finished, and one look on the way of each


def test_scores_of_alpaca_eval_take_the_place_of_win_rates(inside, tmp_path):
    """As at paper scale: no judge, annotations of the answers instead, and several policies in a sweep."""
    sweep = tmp_path / "paper"
    shutil.copytree("runs/kl_strength", sweep)
    for number, run in enumerate(sorted(path for path in sweep.iterdir() if path.is_dir())):
        measured = json.loads((run / "evaluation.json").read_text())
        judged = ("win_rate", "score", "correct", "enough", "wrong", "any_wrong", "valid")
        unjudged = {key: value for key, value in measured.items() if not key.startswith(judged)}
        (run / "evaluation.json").write_text(json.dumps(unjudged))
        config: Any = OmegaConf.load(run / "config.yaml")
        config.choices.policy = ["mistral_7b", "tulu_2_7b"][number % 2]  # one seed each
        OmegaConf.save(config, run / "config.yaml")
    with pytest.raises(ValueError, match=r"dpo.results.alpaca_eval adds; beta=0.1,.* have none"):
        kl_strength.read(sweep)
    for run in sweep.glob("*/evaluation.json"):
        (run.parent / "alpaca_eval_scores.json").write_text('{"alpaca_eval/length_controlled": 0.125}')
    with pytest.raises(ValueError, match="policy=mistral_7b or policy=tulu_2_7b"):
        kl_strength.read(sweep)
    with pytest.raises(ValueError, match="finished runs of policy=qwen, found none"):
        kl_strength.read(sweep, policy="qwen")
    tables, figures = kl_strength.study(kl_strength.read(sweep, policy="mistral_7b"))
    assert tables["table_1"]["lr 0.001"].tolist() == ["", "12.50", "12.50"]
    assert not figures
    tables, _ = token_level.study(token_level.read(sweep, policy="tulu_2_7b"))
    assert tables["figure_2"].shape[1] == 2


def test_references(inside):
    folders = ("runs/necessity", "runs/compatibility", "runs/tuned_reference")
    tables, _ = reference_compatibility.study(reference_compatibility.read(*folders))
    assert tables["table_3"].index.tolist() == ["SFT", "DPO", "posterior", "likelihood", "SimPO", "ORPO"]
    assert "SFT" not in tables["table_3_by_beta"]
    assert tables["table_4"].shape == (2, 6)
    assert tables["table_5"].index.tolist() == ["SFT", "initial", "world_alien", "world_clean"]
    assert (tables["table_3"][["score", "correct", "wrong", "valid", "KL"]] != "").all(axis=None)
    assert len(tables["claims_of_references"]) == (3 + 2) + (5 + 4) + 2


def test_tokens_are_those_of_the_pairs(inside):
    """Their sums are the log-ratios that the run itself measured on the same pairs."""
    [run, *_] = sorted(Path("runs/kl_strength").iterdir())
    found = token_level.tokens(run)
    sums = found.groupby(["response", "pair"])["difference"].sum()
    measured = pd.read_json(run / "evaluation.json", typ="series")
    for response in ("chosen", "rejected"):
        assert sums[response].mean() == pytest.approx(measured[f"logratios/{response}"], abs=1e-4)
    assert set(found["value"].dropna()) <= {"right", "wrong"}
    last = found.groupby(["response", "pair"])["position"].transform("max") == found["position"]
    assert found[found["end"]].index.isin(found[last].index).all()


def test_gaps_are_those_of_the_pairs(inside):
    """The run itself measured the same on its held-out pairs."""
    [run, *_] = sorted(Path("runs/kl_strength").iterdir())
    found = pair_gaps.gaps(run, "validation")
    measured = pd.read_json(run / "evaluation.json", typ="series")
    assert found["gap"].mean() == pytest.approx(measured["rewards/margins"], abs=1e-5)
    for ranks, accuracy in (("reward", "rewards/accuracies"), ("policy", "logps/accuracies")):
        assert found[ranks].mean() == pytest.approx(measured[accuracy], abs=1e-6)
    assert found["weight"].sum() == pytest.approx(1.0, abs=1e-5)
    assert not found["flipped"].any()


def test_figures_of_tokens(inside):
    tables, figures = token_level.study(token_level.read("runs/kl_strength", "runs/necessity"))
    assert tables["figure_1"].sum().tolist() == pytest.approx([1.0, 1.0])
    assert tables["figure_3"].index.tolist() == ["DPO", "likelihood", "posterior"]
    assert {"figure_1", "figure_2", "figure_3", "extension_position", "extension_value"} == {*figures}
    assert len(tables["claims_of_ends"]) == 4


STUDIES = ["kl_strength", "reference_compatibility", "token_level"]
# Whose numbers are beside the notebook.
KEPT = ["dynamic_beta", "kl_strength", "label_noise", "objectives", "over_optimization", "reference_compatibility"]
KEPT += ["smollm2_hh", "summarization", "token_level"]


def test_notebooks(inside):
    """One after another in one kernel, which forgets in between what their cells have defined."""
    cells: list[Any] = []
    notebooks = [nbformat.read(ROOT / f"analysis/{study}.ipynb", as_version=4) for study in STUDIES]
    for study, notebook in zip(STUDIES, notebooks, strict=True):
        text = "\n".join(cell.source for cell in notebook.cells)
        assert "published" in text or study == "token_level"
        first: Any = next(cell for cell in notebook.cells if cell.cell_type == "code")
        first.source = first.source.replace("Path(analysis.__file__).parents[1]", repr(str(inside)))
        for cell in notebook.cells:
            cell.id = f"{study}-{cell.id}"
        cells += [*notebook.cells, nbformat.v4.new_code_cell("%reset -f")]
    whole = nbformat.v4.new_notebook(cells=cells, metadata=notebooks[0].metadata)
    NotebookClient(whole, timeout=900, kernel_name="python3").execute()
    shows_all(whole)


@pytest.mark.parametrize("study", KEPT)
def test_a_notebook_of_kept_numbers(tmp_path, study):
    """Whoever has not the runs sees what they gave: its tables come from the CSV files beside it."""
    shutil.copytree(ROOT / "analysis/frames", tmp_path / "analysis/frames")
    notebook = nbformat.read(ROOT / f"analysis/{study}.ipynb", as_version=4)
    saved = [
        output["data"]["text/html"] for cell in notebook.cells for output in cell.get("outputs", []) if tables(cell)
    ]
    first: Any = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = first.source.replace("Path(analysis.__file__).parents[1]", repr(str(tmp_path)))
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    shows_all(notebook)
    found = [
        output["data"]["text/html"] for cell in notebook.cells for output in cell.get("outputs", []) if tables(cell)
    ]
    assert found == saved != []


def tables(cell: Any) -> bool:
    return cell.source.startswith("tables[") and ".style" not in cell.source  # whose ids are drawn


@pytest.mark.parametrize("study", sorted({*STUDIES, *KEPT}))
def test_saved_outputs(study):
    """What a reader on the web sees: every table and figure, and nothing else."""
    notebook = nbformat.read(ROOT / f"analysis/{study}.ipynb", as_version=4)
    shows_all(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type in ("stream", "error")]


def shows_all(notebook: Any) -> None:
    """Tables are HTML and figures images, not the names of objects."""
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source.startswith(("tables[", "figures[", "published.", "pd.")):
            kind = "image/png" if cell.source.startswith("figures[") else "text/html"
            assert [kind in output.get("data", {}) for output in cell.outputs] == [True], cell.source
