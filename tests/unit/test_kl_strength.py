"""Claims, tables and the figure of the study of the KL constraint, on hand-made runs whose truth is known."""

import json

import pandas as pd
import pytest
from sweeps import SEEDS, numbers, runs_of, student, values
from test_published import run

from analysis import kl_strength
from dpo.results.figures import colours

BETAS = (0.01, 0.03, 0.1, 0.3, 1.0)
NO_HISTORY = pd.DataFrame(columns=["run", "beta", "lr", "seed", "split", "step", "kl", "win_rate"])


def trained(scores, policy=None, reward=None, lr=5e-4, **other):
    """Runs at the betas of `scores`, from the smallest."""
    columns = {"score": scores, "logps/accuracies": policy, "rewards/accuracies": reward, **other}
    columns = {name: of_betas for name, of_betas in columns.items() if of_betas}
    rows = zip(BETAS, *columns.values(), strict=False)
    return runs_of({"beta": beta, "lr": lr, **dict(zip(columns, row, strict=True))} for beta, *row in rows)


def before(accuracy, seeds=SEEDS):
    rows = runs_of([{"beta": 0.1, "lr": 5e-4, "logps/accuracies": accuracy, "rewards/accuracies": 0.5}], seeds)
    return pd.concat([rows.assign(split="validation", step=0), NO_HISTORY])


PAPER = {
    "scores": [0.5, 0.9, 0.7, 0.65, 0.6],
    "policy": [0.7, 0.6, 0.55, 0.5, 0.45],
    "reward": [0.75, 0.72, 0.7, 0.65, 0.62],
}
TURNED = {
    "scores": [0.45, 0.5, 0.62, 0.6, 0.9],
    "policy": [0.45, 0.5, 0.55, 0.6, 0.7],
    "reward": [0.62, 0.65, 0.7, 0.44, 0.75],
}


AS_SAID = ([0.4, 0.3], [0.2], "7 of 8 seeds at beta 0.01, 0 at beta 1", [0.25], [0.3], [0.62])
NOT_SO = ([0.17, -0.28], [-0.4], "0 of 8 seeds at beta 0.01, 7 at beta 1", [-0.25], [-0.3], [0.44])


@pytest.mark.parametrize(
    "world,collapses,accuracy,said,measured",
    [(PAPER, 0.01, 0.2, "supports", AS_SAID), (TURNED, 1.0, 0.8, "refutes", NOT_SO)],
)
def test_claims(world, collapses, accuracy, said, measured):
    final = trained(**world)
    final["rewards/accuracies"] = final.groupby("beta")["rewards/accuracies"].transform("mean")  # no luck about chance
    history = before(accuracy).assign(**{"logps/accuracies": accuracy})
    final.loc[(final["beta"] == collapses) & (final["seed"] < 7), "broken"] = 0.9
    found = kl_strength.claims(final, history)
    assert [claim[:2] for claim in found.index] == ["1a", "1b", "1c", "2a", "2b", "2c"]
    assert found["verdict"].tolist() == [said] * 6
    for text, expected in zip(found["measured"], measured, strict=True):
        if isinstance(expected, str):
            assert f"degenerate are {expected}: exact p = 0.016" in text
        else:
            assert numbers(text)[::3] == pytest.approx(expected, abs=1e-3), text


def test_a_step_that_is_flat_decides_nothing():
    """Accuracy must rise at every step to a smaller beta, not from one end to the other."""
    flat = {**PAPER, "policy": [0.7, 0.6, 0.55, 0.45, 0.45]}
    found = kl_strength.claims(trained(**flat), NO_HISTORY)
    assert found["verdict"].iloc[3] == "undecided"


@pytest.mark.parametrize(
    "scores,said,difference", [([0.5, 0.8, 0.9, 0.6], "refutes", -0.1), ([0.5, 0.8, 0.7, 0.6], "supports", 0.1)]
)
def test_beta_at_the_edge(scores, said, difference):
    """0.1 is not below 0.1."""
    finding = kl_strength.claims(trained(scores), NO_HISTORY).iloc[1]
    assert (finding["verdict"], numbers(finding["measured"])[0]) == (said, pytest.approx(difference, abs=1e-3))


@pytest.mark.parametrize(
    "scored_by,scale,near", [("win_rate", 1.0, 0.05), ("alpaca_eval/length_controlled", 20.0, 1.0)]
)
def test_equivalent_settings(scored_by, scale, near):
    """Betas that are as good are called so, within the margin of their score."""
    for off, said in ((0.0, "equivalent"), (2 * near, "supports")):
        scores = [one * scale for one in (0.6, 0.6, 0.6)]
        scores[1] += off
        found = kl_strength.claims(trained(scores).assign(scored_by=scored_by), NO_HISTORY)
        assert found["verdict"].iloc[:2].tolist() == [said, said]


def test_intervals_allow_for_all_looks():
    """The learning rate is chosen on the same runs, and the pair of betas is one of all of them (Bonferroni)."""
    other = trained([0.1, 0.1, 0.1], [0.1, 0.1, 0.1], [0.1, 0.1, 0.1], lr=1e-3)
    final = pd.concat([trained([0.5, 0.9, 0.7], [0.7, 0.6, 0.5], [0.7, 0.8, 0.8]), other])
    found = kl_strength.claims(final, NO_HISTORY)["measured"]
    mine = final[final["lr"] == 5e-4]
    score = {beta: values(mine, beta=beta) for beta in BETAS[:3]}
    accuracy = {beta: values(mine, "logps/accuracies", beta=beta) for beta in BETAS[:3]}
    expected = [*student(score[0.03] - score[0.01], looks=2), *student(score[0.03] - score[0.1], looks=2)]
    assert numbers(found.iloc[0]) == pytest.approx(expected, abs=6e-4)
    assert numbers(found.iloc[3]) == pytest.approx(student(accuracy[0.01] - accuracy[0.1], looks=2 * 3), abs=6e-4)
    reward = values(mine, "rewards/accuracies", beta=0.01)
    assert numbers(found.iloc[5])[:2] == pytest.approx(student(reward, looks=2)[:2], abs=6e-4)
    assert "(lr 0.0005, of 2)" in found.iloc[0]


def test_the_learning_rate_of_the_best_beta():
    """One has the best beta of all, and the other the better mean over betas."""
    peaked, level = trained([0.2, 0.9, 0.2]), trained([0.8, 0.8, 0.8], lr=1e-3)
    for final in (pd.concat([peaked, level]), pd.concat([level, peaked])):
        assert kl_strength.at_best_lr(final)["lr"].unique().tolist() == [5e-4]
        assert numbers(kl_strength.claims(final, NO_HISTORY)["measured"].iloc[0])[::3] == pytest.approx(
            [0.7, 0.7], abs=1e-3
        )


def test_tables():
    final = pd.concat(
        [trained([0.5, 0.9], [0.7, 0.6], [0.7, 0.8]), trained([0.4, 0.8], [0.6, 0.5], [0.6, 0.7], lr=1e-3)]
    )
    untrained = runs_of([{"beta": 0.3, "lr": 3e-4, "score": 0.35}]).assign(untrained=True)
    both, history = pd.concat([final, untrained]), before(0.44)
    tables, _ = kl_strength.study({"runs": both, "history": history})
    table = tables["table_1"]
    assert (table.index.tolist(), table.columns.tolist()) == (["inf", "0.03", "0.01"], ["lr 0.0005", "lr 0.001"])
    for lr, column in ((5e-4, "lr 0.0005"), (1e-3, "lr 0.001")):
        for beta in BETAS[:2]:
            mean, _, high = student(values(final, lr=lr, beta=beta))
            assert table.loc[f"{beta:g}", column] == f"{mean:.3f} ± {high - mean:.3f}"
    assert table.loc["inf"].str.startswith("0.350 ± ").all()
    own, other = (
        kl_strength.table_1(final),
        kl_strength.table_1(final.assign(scored_by="alpaca_eval/length_controlled")),
    )
    assert (own.loc["inf"].tolist(), other.loc["inf"].tolist()) == (["0.500"] * 2, [""] * 2)
    assert kl_strength.table_1(final.assign(**{"evaluation.baseline": "human"})).loc["inf"].tolist() == [""] * 2

    table = tables["table_2"]
    assert table.index.tolist() == ["inf", "0.03", "0.01"]
    kinds = [f"lr {lr}, {kind}" for lr in ("0.0005", "0.001") for kind in ("reward", "policy")]
    assert table.columns.tolist() == kinds
    assert table.loc["inf"].tolist() == ["0.500", "0.440"] * 2
    assert [cell[:5] for cell in table.loc["0.03"]] == ["0.800", "0.600", "0.700", "0.500"]
    assert [cell[:5] for cell in table.loc["0.01"]] == ["0.700", "0.700", "0.600", "0.600"]
    assert tables["measures"].index.tolist() == ["0.0005, 0.01", "0.0005, 0.03", "0.001, 0.01", "0.001, 0.03"]
    assert tables["measures"]["policy accuracy"].str[:5].tolist() == ["0.700", "0.600", "0.600", "0.500"]


def test_frontier():
    """KL is across, on a logarithmic axis, the win rate upwards; a panel per learning rate, a colour per beta."""
    rows = [
        {"beta": beta, "lr": lr, "score": win, "win_rate": win, "kl": kl}
        for lr, kl_scale in ((1e-3, 10.0), (5e-4, 1.0))
        for beta, win, kl in ((0.1, 0.7, 2.0 * kl_scale), (0.01, 0.9, 30.0 * kl_scale))
    ]
    final = runs_of(rows, seeds=2)
    untrained = runs_of([{"beta": 0.05, "lr": 2e-3, "score": 0.5, "win_rate": 0.5, "kl": 0.1}], seeds=1)
    way = final.assign(split="test", step=25, kl=final["kl"] / 2, win_rate=final["win_rate"] - 0.1)
    start = way.assign(split="validation", step=0, kl=77.0, win_rate=0.77)
    frames = {"runs": pd.concat([final, untrained.assign(untrained=True)]), "history": pd.concat([start, way])}
    _, figures = kl_strength.study(frames)
    axes = figures["frontier"].axes
    assert [axis.get_title(loc="left") for axis in axes] == ["lr 0.0005", "lr 0.001"]
    for axis, lr in zip(axes, (5e-4, 1e-3), strict=True):
        assert (axis.get_xscale(), axis.get_yscale()) == ("log", "linear")
        assert axis.get_xlabel() == "KL to the initial policy (nats per response)"
        assert axis.get_ylabel() == "win rate over the initial policy"
        half, *lines = axis.lines
        assert list(half.get_ydata()) == [0.5, 0.5]
        expected = [(frame, beta) for beta in (0.01, 0.1) for frame in (way, final)]
        for line, (frame, beta) in zip(lines, expected, strict=True):
            same = frame[(frame["lr"] == lr) & (frame["beta"] == beta)]
            assert list(line.get_xdata()) == same["kl"].tolist()
            assert list(line.get_ydata()) == same["win_rate"].tolist()
        light, dark = colours([0.01, 0.1], "beta").values()
        assert [line.get_color() for line in lines] == [light, light, dark, dark]
        assert lines[1].get_markersize() > lines[0].get_markersize()
    legend = axes[-1].get_legend()
    assert (legend.get_title().get_text(), [text.get_text() for text in legend.get_texts()]) == (
        "beta",
        ["0.01", "0.1"],
    )
    many = runs_of(({**rows[0], "beta": (1 + number) / 10} for number in range(9)), seeds=1)
    assert len(kl_strength.figure(many, way).axes[0].get_legend().get_texts()) == 9  # more than there are colours
    assert not kl_strength.study({**frames, "runs": frames["runs"].drop(columns="kl")})[1]  # nothing to draw


def test_what_is_read(tmp_path):
    """Of what was measured on the way: the held-out pairs before training, and test prompts before the last step."""
    run(tmp_path, 12.0, {"logps/accuracies": 0.6, "kl": 9.0}, beta=0.1)
    run(tmp_path, 12.0, {"logps/accuracies": 0.6, "kl": 9.0}, beta=1.0)
    unfinished = sorted(tmp_path.iterdir())[1]
    (unfinished / "evaluation.json").unlink()
    (unfinished / "alpaca_eval_scores.json").unlink()
    rows = [
        {"step": 0, "split": "validation", "logps/accuracies": 0.4},
        {"step": 0, "split": "test", "kl": 0.0},
        {"step": 25, "split": "train", "loss": 0.6},
        {"step": 25, "split": "validation", "logps/accuracies": 0.5},
        {"step": 25, "split": "test", "kl": 3.0},
        {"step": 5731, "split": "validation", "logps/accuracies": 0.6},
        {"step": 5731, "split": "test", "kl": 9.0},
    ]
    for folder in tmp_path.iterdir():
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    frames = kl_strength.read(tmp_path)
    assert frames["runs"][["beta", "lr", "seed", "kl", "score"]].values.tolist() == [[0.1, 5e-7, 0, 9.0, 12.0]]
    history = frames["history"]
    assert history["beta"].unique().tolist() == [0.1]
    assert history[["split", "step"]].values.tolist() == [["validation", 0], ["test", 0], ["test", 25]]
    assert history["logps/accuracies"].iloc[0] == 0.4
    assert history["kl"].tolist()[1:] == [0.0, 3.0]
