"""A run directory whose files are not as a run writes them is named, once, and the other runs are shown."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from test_launch import ROOT, built, said, tree  # noqa: F401
from test_runs import command, run
from yaml import YAMLError

from dpo import results
from dpo.results import tables
from dpo.results.frames import DamagedRun
from dpo.sweep import directory
from dpo.sweep.directory import (
    MARKERS,
    SCORES,
    config,
    damage,
    evaluation,
    finish,
    finished,
    folders,
    manifest,
    read_yaml,
    to_yaml,
)

__all__ = ["tree"]
TEXTS = {
    "empty": b"",
    "cut": b'{"n": 1000, "win_ra',
    "binary": bytes(range(256)),
    "a list": b"[1, 2]\n",
    "a text": b'"finished"\n',
    "nothing": b"null\n",
    "nested": b"[" * 100_000,
}
NUMBERS = {
    "no number": b'{"win_rate": "high"}',
    "a list in it": b'{"win_rate": [0.5]}',
    "an object in it": b'{"win_rate": {"mean": 0.5}}',
    "NaN": b'{"win_rate": NaN}',
    "infinite": b'{"win_rate": 1e999}',
    "too large": b'{"win_rate": 1' + b"0" * 400 + b"}",
    "no value": b"{}",
}
ROW = b'{"step": 1, "split": "train", "loss": 0.7}\n'
ROWS = {
    "empty": b"",
    "binary": bytes(range(256)),
    "a line within": ROW + b'{"step": 2, "spl\n' + ROW,
    "a list": ROW + b"[1]\n",
    "no step": b'{"split": "train", "loss": 0.7}\n',
    "step is no number": b'{"step": "1", "split": "train", "loss": 0.7}\n',
    "split is no text": b'{"step": 1, "split": null, "loss": 0.7}\n',
    "NaN": b'{"step": 1, "split": "train", "loss": NaN}\n',
    "no number": b'{"step": 1, "split": "train", "loss": {}}\n',
}
SETTINGS = {
    "empty": b"",
    "cut": b'name: "dev\nbeta: 0.',
    "binary": bytes(range(256)),
    "a list": b"- 1\n",
    "a text": b"finished\n",
    "no mapping of choices": b"beta: 0.1\nchoices: [dpo]\n",
    "a choice that is none": b"beta: 0.1\nchoices: {loss: [dpo]}\n",
    "no record": b"beta: 0.1\nprovenance: null\n",
    "no list of overrides": b"beta: 0.1\nprovenance: {overrides: null}\n",
    "overrides of numbers": b"beta: 0.1\nprovenance: {overrides: [1, 2]}\n",
    "inputs of numbers": b"beta: 0.1\nprovenance: {overrides: [], inputs: {data: 1}}\n",
    "bytes": b"beta: 0.1\nseed: !!binary aGk=\n",
    "nested": b"a: " + b"[" * 200,
}
CASES = [
    *(("evaluation.json", what, text) for what, text in {**TEXTS, **NUMBERS}.items()),
    *((SCORES, what, text) for what, text in {**TEXTS, **NUMBERS}.items()),
    *(("manifest.json", what, text) for what, text in {**TEXTS, **NUMBERS}.items()),
    *(("metrics.jsonl", what, text) for what, text in ROWS.items()),
    *(("config.yaml", what, text) for what, text in SETTINGS.items()),
    *(
        (file, "a folder", None)
        for file in ("evaluation.json", SCORES, "manifest.json", "metrics.jsonl", "config.yaml", "error.json")
    ),
    *((file, "not to be read", Path("/proc/self/mem")) for file in ("evaluation.json", "metrics.jsonl")),
    ("config.yaml", "absent", Path("/nowhere")),
]


def spoil(file: Path, text: bytes | Path | None) -> None:
    file.unlink(missing_ok=True)
    if text is None:
        file.mkdir()
    elif isinstance(text, Path):
        file.symlink_to(text)
    else:
        file.write_bytes(text)


@pytest.mark.parametrize("file,what,text", CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_one_damaged_run(tmp_path, capsys, monkeypatch, file, what, text):
    monkeypatch.setattr(tables, "figure", lambda *_: None)  # takes a second
    run(tmp_path, 0.1)
    run(tmp_path, 0.5)
    bad = run(tmp_path, 0.2)
    assert damage(bad) is None
    spoil(bad / file, text)
    assert results.status(bad) == "damaged"
    wrong = results.reason(bad)
    assert wrong.startswith(f"{bad / file} must hold ")
    assert ", found " in wrong
    assert "; " in wrong.split(", found ")[1]
    assert len(wrong) < 600
    for frame in (results.load, results.final):
        with pytest.warns(DamagedRun) as warned:
            found = frame(tmp_path)
        assert [str(one.message) for one in warned] == [f"{bad.name} is damaged and left out: {wrong}"]
        assert set(found["beta"]) == {0.1, 0.5}
    results.report(tmp_path)
    said = capsys.readouterr().out
    assert said.count(wrong) == 1
    assert "2 finished in" in said
    if file == "config.yaml":
        assert bad.name not in results.configs(tmp_path)


@pytest.mark.parametrize("text", [*TEXTS.values(), b'{"type": "ValueError"}', b'{"type": [], "message": "no"}'])
def test_a_reason_that_cannot_be_read(tmp_path, text):
    """The run has failed all the same, and may be started again."""
    directory = run(tmp_path, 0.1, finished=False)
    (directory / "error.json").write_bytes(text)
    assert results.status(directory) == "failed"
    assert results.reason(directory).startswith(f"Failed: {directory / 'error.json'} ")


def test_what_alpaca_eval_says_joins_what_was_measured(tmp_path):
    directory = run(tmp_path, 0.1)
    (directory / SCORES).write_text('{"alpaca_eval/win_rate": 0.25, "win_rate": 0.125}')
    found = evaluation(directory)
    assert (found["alpaca_eval/win_rate"], found["win_rate"], found["length"]) == (0.25, 0.125, 20.25)
    (directory / "evaluation.json").unlink()
    assert evaluation(directory) == {}  # of a run that is not finished they say nothing


@pytest.mark.parametrize("name", MARKERS)
def test_finish_is_whole_and_drops_the_checkpoint(tmp_path, name):
    for folder in ("checkpoint", "selected"):
        (tmp_path / folder / "step-3").mkdir(parents=True)
    assert not finished(tmp_path)
    finish(tmp_path, name, {"kl": 1.0, "kl/se": math.nan, "kl_plain": math.inf})
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert json.loads((tmp_path / name).read_text()) == {"kl": 1.0, "kl/se": None, "kl_plain": None}
    assert finished(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path / 'config.yaml'} must hold the settings of a run, found no such"):
        config(tmp_path)  # a run is there, and its settings are gone


def test_a_run_that_makes_files_is_finished_by_its_manifest(tmp_path):
    """What it made is no figure of a policy; without a marker it may be started again."""
    directory = run(tmp_path, 0.1, finished=False)
    (directory / "metrics.jsonl").unlink()
    assert (manifest(directory), results.status(directory)) == ({}, "planned")
    (directory / "manifest.json").write_text('{"train pairs": 20, "seconds": 1.5}')
    assert manifest(directory) == {"train pairs": 20, "seconds": 1.5}
    assert (evaluation(directory), results.status(directory), results.reason(directory)) == ({}, "finished", None)
    (directory / "config.yaml").unlink()
    assert folders(tmp_path) == [directory]
    assert results.status(directory) == "damaged"


def test_a_last_line_that_is_cut_is_no_damage(tmp_path):
    directory = run(tmp_path, 0.1, finished=False)
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "spl')
    assert results.status(directory) == "stopped"
    (directory / "metrics.jsonl").write_text("")  # rewound to its beginning
    assert results.status(directory) == "stopped"


def test_listing(tmp_path):
    run(tmp_path / "dev", 0.1)
    spoil(run(tmp_path / "dev", 0.2) / "evaluation.json", b"")
    spoil(run(tmp_path / "dev", 0.5) / "config.yaml", None)
    done = command(tmp_path, "dev")
    assert done.returncode == 0, done.stderr
    assert "dev: 3 runs: 1 finished, 2 damaged" in done.stdout
    assert done.stdout.count("dev/beta=0.2,reference=initial/evaluation.json must hold") == 1
    assert done.stdout.count("dev/beta=0.5,reference=initial/config.yaml must hold") == 1
    assert "1 finished in dev" in done.stdout


def test_each_run_of_the_largest_sweep_is_read_once():
    for remembered in (directory._damage, directory._parsed):
        assert remembered.cache_parameters()["maxsize"] >= 10_000


@pytest.mark.long
def test_a_sweep_in_its_folder(tree):
    """It is named and not touched; every other run is made."""
    said(tree, "-m", "beta=0.1,0.2", "device=cpu", code=0)
    bad = tree / "runs" / "dev" / "beta=0.2"
    spoil(bad / "evaluation.json", b"[")
    text = said(tree, "-m", "beta=0.1,0.2,0.5", "device=cpu", code=1)
    assert "runs/dev: 3 runs: 1 finished, 1 to do" in text
    assert text.count("must hold") == 1
    assert "not finished: beta=0.2: runs/dev/beta=0.2/evaluation.json must hold" in text
    assert "2 finished in runs/dev" in text
    text = said(tree, "beta=0.5", code=0)  # a sweep without it
    assert text.count("must hold") == 1
    assert "must hold" in said(tree, "runs/dev/beta=0.2", verb="sweep.execute", code=1)
    slurm = ["-m", "beta=0.2,0.7", "hydra/launcher=slurm", "hydra.launcher.submit=false"]
    text = said(tree, *slurm, code=1)
    assert "2 runs: 1 damaged, 1 to submit" in text
    assert "not submitted: beta=0.2: runs/dev/beta=0.2/evaluation.json must hold" in text
    assert (bad / "evaluation.json").read_bytes() == b"["


@pytest.mark.long
def test_a_run_without_its_settings_gives_its_name_to_no_other(tree):
    said(tree, "-m", "beta=0.1,0.2", "device=cpu", code=0)
    bad = tree / "runs" / "dev" / "beta=0.2"
    spoil(bad / "config.yaml", b"[")
    text = said(tree, "-m", "beta=0.1,0.2", "device=cpu", code=0)
    assert "runs/dev: 2 runs: 1 finished, 1 to do" in text
    assert text.count("must hold") == 1
    assert "beta=0.2 is damaged and left out: runs/dev/beta=0.2/config.yaml must hold" in text
    assert "2 finished in runs/dev" in text
    assert (bad / "config.yaml").read_bytes() == b"["


@pytest.mark.long
def test_a_log_that_cannot_be_opened_stops_one_run(tree):
    said(tree, "beta=0.66", "device=cpu", code=1)
    (tree / "runs/dev/beta=0.66/log.txt").mkdir()
    text = said(tree, "-m", "beta=0.66,0.5,0.4", "device=cpu", "hydra.launcher.jobs=2", code=1)
    assert "not finished: beta=0.66: could not be started: [Errno 21] Is a directory" in text
    assert "2 finished in runs/dev" in text


def test_names_are_nobody_elses():
    """A file of dpo/ that is run as a script has the folder first on its path."""
    modules = {path.stem for path in (ROOT / "dpo").rglob("*.py")} | {path.name for path in (ROOT / "dpo").iterdir()}
    assert not modules & set(sys.stdlib_module_names)
    code = "import queue, concurrent.futures, multiprocessing.queues; queue.SimpleQueue"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "dpo")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_yaml_is_read_and_written_as_omegaconf_does():
    values = {"a": 1e-3, "b": 5e-324, "c": "1e-3", "d": "yes", "e": True, "f": None, "g": [1, "2", {"h": "${a}"}]}
    values |= {"i": "2024-07-26", "j": "é: 'x' # y", "k": "", "l": {}, "m": "a\nb", "n": math.inf, "o": [], "1": "0x1"}
    text = OmegaConf.to_yaml(OmegaConf.create(values))
    assert to_yaml(values) == text
    assert read_yaml(text) == values
    for text in ("a: 1e-3", "a: 2024-07-26", "a: yes", "a: on", "a: 0o17", "a: 1_0", "a: .5e3", "a: ~", "a: 1:30"):
        assert read_yaml(text) == OmegaConf.to_container(OmegaConf.create(text)), text
    with pytest.raises(YAMLError, match="found duplicate key a"):
        read_yaml("a: 1\na: 2")


def test_the_value_that_is_no_number_is_named(tmp_path):
    """Of a run that makes files as of one that measures."""
    for name, read in (("evaluation.json", directory.evaluation), ("manifest.json", directory.manifest)):
        (tmp_path / name).write_text('{"seconds": 1.0, "tokens": "many"}')
        with pytest.raises(ValueError, match="found tokens='many'"):
            read(tmp_path)
