"""Claims, table and figure of the study of over-optimization, on hand-made runs whose truth is known."""

import json

import pytest
from sweeps import NOISE, SEEDS, numbers, runs_of, student, values

from analysis import over_optimization
from analysis.over_optimization import GOLD, PROXY

BETAS = (0.01, 0.1, 1.0)
BY_PROXY = (0.9, 0.8, 0.7)  # of pairs by the proxy, from the weakest constraint on
BY_GOLD = (0.5, 0.7, 0.6)


def world(by_gold=BY_GOLD, by_proxy=BY_PROXY, better=0.75):
    """Everything as claimed: the proxy likes the weakest constraint best, gold the one between."""
    rows = [
        {"judge": PROXY, "beta": beta, "score": gold, "proxy": proxy, "kl": 1 / beta, "valid": 0.9, "wrong": 1.0}
        for beta, gold, proxy in zip(BETAS, by_gold, by_proxy, strict=True)
    ]
    rows += [
        {"judge": GOLD, "beta": beta, "score": better, "proxy": 0.6, "kl": 1 / beta, "valid": 0.9, "wrong": 1.0}
        for beta in BETAS
    ]
    frame = runs_of(rows)
    return frame.assign(proxy=frame["proxy"] + NOISE[(frame["seed"] * 3 + (frame["beta"] * 100).astype(int)) % SEEDS])


def of(frame, value, beta, judge=PROXY):
    return values(frame, value, judge=judge, beta=beta)


def test_claims():
    final = world()
    found = over_optimization.claims(final)
    assert [claim[:2] for claim in found.index] == ["1.", "2.", "3.", "4.", "5."]
    assert found["verdict"].tolist() == ["supports"] * 5
    steeper, inside, overrated, cost, better = (numbers(text) for text in found["measured"])
    assert steeper[0] == pytest.approx(0.1, abs=2e-3)
    assert steeper == pytest.approx(student((of(final, "proxy", 0.01) - of(final, "proxy", 1.0)) / 2), abs=6e-4)
    gold = {beta: of(final, "score", beta) for beta in BETAS}
    assert inside == pytest.approx(
        [*student(gold[0.1] - gold[0.01], looks=2), *student(gold[0.1] - gold[1.0], looks=2)], abs=6e-4
    )
    apart = {beta: of(final, "proxy", beta) - gold[beta] for beta in BETAS}
    assert overrated == pytest.approx(student(apart[0.01] - apart[1.0]), abs=6e-4)
    # The proxy's choice is 0.01. Which beta is gold's best is not known: the lower end holds for all three.
    assert cost[:2] == pytest.approx(student(gold[0.1] - gold[0.01], looks=3)[:2], abs=6e-4)
    assert "at the proxy's, 0.01" in found["measured"].iloc[3]
    assert better[0] == pytest.approx(0.05, abs=2e-3)


def test_the_other_way_round():
    found = over_optimization.claims(world((0.8, 0.7, 0.6), (0.5, 0.6, 0.7), better=0.6))["verdict"].tolist()
    assert found == ["refutes", "refutes", "refutes", "supports", "refutes"]
    assert over_optimization.claims(world((0.5, 0.6, 0.7)))["verdict"].iloc[1] == "refutes"  # best at the strongest


def test_a_proxy_that_is_right_costs_nothing():
    found = over_optimization.claims(world(BY_GOLD, BY_GOLD, better=0.7))["verdict"]
    assert found.iloc[3] == found.iloc[4] == "equivalent"


def test_what_is_missing_is_said():
    few = world()
    found = over_optimization.claims(few[few["beta"] < 1])
    assert found["measured"].str.contains("not measured: it takes three betas").all()
    found = over_optimization.claims(few[few["judge"] == PROXY])
    assert found["measured"].iloc[4].startswith("not measured")
    assert found["verdict"].iloc[:4].tolist() == ["supports"] * 4


def test_table_and_figure():
    final = world()
    lost = (final["judge"] == PROXY) & (final["beta"] == 0.01)
    final.loc[lost & (final["seed"] < 2), "broken"] = 0.9
    tables, figures = over_optimization.study({"runs": final})
    table = tables["over_optimization"]
    assert table.index.tolist() == [
        (title, beta) for title in ("pairs by the proxy", "pairs by gold") for beta in ("1", "0.1", "0.01")
    ]
    row = table.loc[("pairs by the proxy", "0.01")]
    assert row["judged by gold"].startswith("0.500")
    assert "2 of 8 degenerate" in row["judged by gold"]
    assert row["judged by the proxy"].startswith("0.900")
    assert row["proxy minus gold"].startswith("0.400")
    assert row["degenerate"] == "2 of 8"
    assert row["wrong"].startswith("1.00")
    assert row["KL"].startswith("100.0")
    left, right = figures["frontier"].axes
    assert [axis.get_title(loc="left") for axis in (left, right)] == ["pairs by the proxy", "pairs by gold"]
    lines = {line.get_label(): line for line in left.lines}
    assert list(lines["judged by the proxy"].get_ydata()) == pytest.approx(BY_PROXY, abs=1e-3)
    assert list(lines["judged by gold"].get_ydata()) == pytest.approx(BY_GOLD, abs=1e-3)
    assert list(lines["judged by gold"].get_xdata()) == pytest.approx([100, 10, 1], abs=1e-3)
    assert {text.get_text() for text in left.texts} == {"0.01", "0.1", "1"}
    final.loc[lost, "broken"] = 0.9
    assert over_optimization.table(final).loc[("pairs by the proxy", "0.01"), "judged by gold"] == "degenerate"
    crosses = [line for line in over_optimization.figure(final).axes[0].lines if line.get_marker() == "x"]
    assert [list(line.get_ydata()) for line in crosses] == [[pytest.approx(0.5)], [pytest.approx(0.9)]]


def run(folder, config, win_rate):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "evaluation.json").write_text(json.dumps({"n": 500, "win_rate": win_rate, "kl": 1.0, "steps": 99}))


def test_each_run_is_joined_with_its_own_evaluation(tmp_path):
    """By the folder of the policy that was measured, wherever the runs lie now."""
    runs, proxy = tmp_path / "runs", tmp_path / "proxy"
    for place, beta in enumerate(BETAS):
        for seed in (0, 1):
            name = f"beta={beta},judge=hasty,seed={seed}"
            choice = {"choices": {"judge": "hasty", "evaluation.judge": "gold"}}
            run(runs / name, {"beta": beta, "seed": seed, **choice}, 0.5 + place / 100 + seed / 1000)
            config = {"command": "evaluate", "seed": seed, "policy": {"path": f"runs/over_optimization/{name}/policy"}}
            run(proxy / f"{place}{seed}", config, 0.8 + place / 100 + seed / 1000)
    final = over_optimization.read(runs, proxy)["runs"]
    assert len(final) == 6
    assert (final["proxy"] - final["score"]).tolist() == pytest.approx([0.3] * 6)
    assert final["judge"].eq("hasty").all()
    (proxy / "00" / "evaluation.json").write_text(json.dumps({"n": 500, "kl": 1.0}))
    with pytest.raises(ValueError, match=r"every run in .* needs win_rate; 00 have none"):
        over_optimization.read(runs, proxy)
    for file in (proxy / "00").iterdir():
        file.unlink()
    (proxy / "00").rmdir()
    with pytest.raises(
        ValueError, match=r"must hold an evaluation of every run in .*none of beta=0.01,judge=hasty,seed=0: run"
    ):
        over_optimization.read(runs, proxy)
