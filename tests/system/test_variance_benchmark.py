"""The sources of chance of a sweep are varied one at a time, and what is told of their spread."""

import importlib
import json
import math

import pytest
import torch
from whole_runs import SMALL, run


@pytest.fixture
def variance(monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    threads = torch.get_num_threads()
    yield importlib.import_module("variance")
    torch.set_num_threads(threads)


def call(variance, monkeypatch, folder, *options):
    keys = [*SMALL, f"cache={folder / 'cache'}", "wandb.mode=disabled"]
    monkeypatch.setattr("sys.argv", ["variance.py", "--out", str(folder / "out"), *options, *keys])
    variance.main()
    return [json.loads(line) for line in (folder / "out" / "replicates.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_a_source_alone_is_varied(variance, monkeypatch, tmp_path, capsys):
    trained, seen = variance.train, []

    def counted(seeds, overrides):
        seen.append(seeds)
        return trained(seeds, overrides)

    monkeypatch.setattr(variance, "train", counted)
    options = ["--replicates", "0-1", "beta=0.1"]
    rows = call(variance, monkeypatch, tmp_path, *options)
    found = {(row["source"], row["replicate"]): row for row in rows}
    assert [*found] == [("everything", 0), *((source, 1) for source in variance.SOURCES)]
    for row, source in ((0, "everything"), (1, "everything")):
        _, expected = run(tmp_path / f"run{row}", *SMALL, "beta=0.1", f"seed={row}")
        for name in ("win_rate", "kl", "valid", "length"):
            assert found[source, row][name] == pytest.approx(expected[name], rel=1e-5), "a replicate is no run"
    of_one = {
        source: {name for name, seed in found_seeds.items() if seed}
        for source, found_seeds in zip(["everything", *variance.SOURCES], seen, strict=True)
    }
    assert of_one == {"everything": {"policy", "pairs", "order", "evaluation"}} | {
        source: {source} for source in variance.SOURCES if source != "everything"
    }
    kls = {source: found[source, 1]["kl"] for source in variance.SOURCES}
    assert len({*kls.values(), found["everything", 0]["kl"]}) == len(kls) + 1, "a source changed nothing"
    assert kls["rounding"] == pytest.approx(found["everything", 0]["kl"], rel=1e-3)
    assert "everything" in capsys.readouterr().out
    assert call(variance, monkeypatch, tmp_path, *options) == rows, "computed again"
    with pytest.raises(SystemExit):
        call(variance, monkeypatch, tmp_path, *options, "batch_size=4")


def row(source, replicate, beta, win_rate, kl):
    values = {"win_rate": win_rate, "kl": kl, "valid": 1.0, "ended": 0.5}
    return {"source": source, "replicate": replicate, "beta": beta, **values}


def test_table_and_order(variance):
    """Means: 0.5, 0.6, 0.7 and 30, 20, 10; replicate 0 has two win rates exchanged, 2 two KLs, 3 a tie of both."""
    wins = [(0.6, 0.5, 0.7), (0.5, 0.6, 0.7), (0.5, 0.6, 0.7), (0.4, 0.7, 0.7)]
    kls = [(39, 10, 5), (31, 20, 10), (20, 30, 10), (30, 20, 20)]
    rows = [
        row("everything", replicate, beta, wins[replicate][column], kls[replicate][column])
        for replicate in range(4)
        for column, beta in enumerate(["0.01", "0.02", "0.1"])
    ]
    assert variance.in_order(rows, ["0.01", "0.02", "0.1"]) == (2, 2)
    rows += [row("rounding", 1, "0.1", 0.7 + 0.2, 5 * math.e)]
    lines = variance.table(rows).splitlines()
    assert lines[1].split() == ["everything", "0.01", "4", "0.500", "±", "0.082", "0.28", "30.5", "1.00", "0.50"]
    assert lines[4].endswith("in the order of their means: win rates in 2 seeds, KLs in 2")
    assert lines[5].split() == ["rounding", "0.1", "2", "0.800", "±", "0.141", "0.71", "8.2", "1.00", "0.50"]
