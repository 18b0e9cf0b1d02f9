"""Claims, tables and figures of the summarization study, on hand-made runs whose truth is known."""

import numpy as np
import pandas as pd
import pytest
from sweeps import LUCK, curves, numbers, runs_of, student, values
from test_published import run

from analysis import published, summarization
from analysis.summarization import of_dpo, of_round, of_sft

NONE = float("nan")
NOT_NOISY = ("beta", "lr", "best_of", "kl_bound")


def row(score, beta=0.1, lr=5e-4, loss="dpo", best_of=NONE, **more):
    measured = {"enough": 0.1 + score, "compression/median": 0.8 - 0.4 * score, "kl": 10 * score, "kl_bound": NONE}
    measured |= {"ended": 0.9, "valid": 0.9}
    return {"loss": loss, "beta": beta, "lr": lr, "best_of": best_of, "score": score} | measured | more


def runs(rows):
    """As `runs_of`: settings and what follows from them have no noise, win rates over the seed's own policy no luck."""
    frame = runs_of([{key: value for key, value in one.items() if key not in NOT_NOISY} for one in rows])
    number = frame["run"].str.partition(",")[0].astype(int)
    for key in NOT_NOISY:
        frame[key] = number.map(lambda at, key=key: rows[at][key])
    same = {name: frame[name] - LUCK[frame["seed"]] for name in ("score", "ended", "valid")}
    return frame.assign(untrained=False, **same)


def of_samples(n, score):
    return row(score, NONE, NONE, None, best_of=n, kl=NONE, kl_bound=float(np.log(n) - (n - 1) / n))


def world(sign=1.0):
    """Everything as claimed, or with -1 the other way round."""
    rows = [of_samples(1, 0.5), of_samples(4, 0.5 + 0.1 * sign)]
    rows += [row(0.5 + 0.05 * sign, loss="sft", lr=lr) for lr in (5e-4, 2e-3)]
    grid = {  # the interaction of beta and lr is 0.1 times the sign, the best is at beta 0.1 and lr 5e-4
        **{(0.01, 5e-4): 0.5 + 0.1 * sign, (0.1, 5e-4): 0.5 + 0.2 * sign},
        **{(0.01, 2e-3): 0.5 - 0.1 * sign + 0.1, (0.1, 2e-3): 0.5 + 0.1 * sign + 0.1},
    }
    if sign < 0:  # all below a half, and a weak constraint costs less at the high rate
        grid = {(0.01, 5e-4): 0.3, (0.1, 5e-4): 0.35, (0.01, 2e-3): 0.25, (0.1, 2e-3): 0.2}
    rows += [row(score, *setting) for setting, score in grid.items()]
    best = max(grid.values())
    frame = runs(rows)
    at_start = frame["best_of"] == 1
    # what DPO at its best has beside its score, against the untuned policy's 0.6 and 0.6
    frame.loc[at_start, "enough"] = 0.1 + best - sign * 0.2 + (frame.loc[at_start, "enough"] - 0.6)
    frame.loc[at_start, "compression/median"] += 0.8 - 0.4 * best + sign * 0.1 - 0.6
    wild = (frame["beta"] == 0.01) & (frame["lr"] == 2e-3)
    frame.loc[wild, ["ended", "valid"]] -= sign * np.array([0.1, 0.2])
    frame.loc[wild, "broken"] = 0.9
    return frame


def chains(sign=1.0):
    """Three rounds at two betas; at one of them held to the first policy, too, and one round on thrice the articles."""
    rows, marks = [], []
    for beta, start in ((0.03, 0.6), (0.1, 0.7)):
        rows += [row(start + sign * gain, beta) for gain in (0.0, 0.05, 0.1)]
        marks += [(1.0, "initial", 800), (2.0, "initial", 800), (3.0, "initial", 800)]
    rows += [row(0.7), row(0.7), row(0.7 - sign * 0.1), row(0.9, 0.3)]
    marks += [(2.0, "other", 800), (3.0, "other", 800), (1.0, "initial", 2400), (1.0, "initial", 800)]
    frame = runs(rows)
    number = frame["run"].str.partition(",")[0].astype(int)
    for place, key in enumerate(("round", "reference", "data.train")):
        frame[key] = number.map(lambda at, place=place: marks[at][place])
    return frame


@pytest.mark.parametrize("sign,said", [(1.0, "supports"), (-1.0, "refutes")])
def test_claims(sign, said):
    found = summarization.claims(world(sign), chains(sign))
    letters = ["1.", "2a", "2b", "3.", "4.", "5a", "5b", "6.", "6.", "7a", "7b", "8."]
    assert [claim[:2] for claim in found.index] == letters
    assert found["verdict"].tolist() == [said] * 12, found.to_string()
    expected = [0.7, 0.2, 0.1, 0.15, 0.1, 0.1, 0.2, 0.05, 0.05, 0.2, 0.1, 0.1]
    if sign < 0:
        expected = [0.35, -0.2, -0.1, -0.1, -0.1, -0.1, -0.2, -0.05, -0.05, -0.2, -0.1, -0.05]
    for text, mean in zip(found["measured"], expected, strict=True):
        assert numbers(text)[::3] == [pytest.approx(mean, abs=3e-3)], text
    assert "at beta 0.1, lr 0.0005 minus that at beta 0.01, lr 0.002" in found["measured"].iloc[6]
    for changed, over in (
        ({"evaluation.baseline": "human"}, "win_rate over what people wrote"),
        ({"scored_by": "alpaca_eval/length_controlled"}, "alpaca_eval/length_controlled over the initial policy"),
    ):
        first = summarization.claims(world(sign).assign(**changed)).iloc[0]
        assert first["measured"] == f"not measured: it takes win rates over it, found {over}"


def test_the_most_samples_are_compared_with():
    final = world()
    few = final[final["best_of"] == 4].assign(best_of=2.0)
    assert summarization.claims(pd.concat([few, final])).index[-1].startswith("8. DPO is better than best of 4 ")


def test_intervals_allow_for_all_settings():
    """The best of four settings of DPO against the best of two of SFT; and what was chosen by another measure."""
    final = world()
    final["score"] += LUCK[final["seed"]]  # a spread over seeds that intervals show
    measured = summarization.claims(final)["measured"]
    dpo = values(of_dpo(final), beta=0.1, lr=5e-4)
    assert numbers(measured.iloc[0])[:2] == pytest.approx(student(dpo, looks=4)[:2], abs=6e-4)
    sft = [values(of_sft(final), lr=lr) for lr in (5e-4, 2e-3)]
    low = min(student(dpo - one, looks=4)[1] for one in sft)
    assert numbers(measured.iloc[3])[1] == pytest.approx(low, abs=6e-4)
    untuned = values(final, "enough", best_of=1)
    mine = values(of_dpo(final), "enough", beta=0.1, lr=5e-4)
    assert numbers(measured.iloc[1]) == pytest.approx(student(mine - untuned, looks=4), abs=6e-4)
    final.loc[final["beta"] == 0.01, "valid"] += LUCK[final.loc[final["beta"] == 0.01, "seed"]]
    wild, top = (values(of_dpo(final), "valid", beta=beta, lr=lr) for beta, lr in ((0.01, 2e-3), (0.1, 5e-4)))
    text = summarization.claims(final)["measured"].iloc[6]
    assert numbers(text) == pytest.approx(student(top - wild, looks=4), abs=6e-4)


def test_the_interaction_is_a_difference_of_differences():
    final = world()
    dpo = of_dpo(final)
    at = {(beta, lr): values(dpo, beta=beta, lr=lr) for beta in (0.01, 0.1) for lr in (5e-4, 2e-3)}
    both = (at[0.01, 5e-4] - at[0.1, 5e-4]) - (at[0.01, 2e-3] - at[0.1, 2e-3])
    assert numbers(summarization.claims(final)["measured"].iloc[4]) == pytest.approx(student(both), abs=6e-4)


def test_what_is_level_decides_nothing():
    final = world().assign(score=lambda runs: 0.5 + runs["seed"] / 1000, broken=0.0)
    level = final.assign(**{"enough": 0.5 + final["seed"] / 1000, "compression/median": 0.5}, ended=0.9, valid=0.9)
    verdicts = summarization.claims(level, chains().assign(score=level["score"].iloc[0]))["verdict"]
    assert not {"supports", "refutes"} & {*verdicts[1:]}


def test_what_is_missing_is_said():
    final = runs([row(0.6)])
    found = summarization.claims(final, chains().iloc[:16])  # two rounds, and nothing beside the last
    missing = found["measured"].str.contains("not measured")
    assert missing[~found.index.str.match("1|6")].all()
    assert not {"supports", "refutes"} & {*found["verdict"][missing]}
    tables, figures = summarization.study({"runs": final})
    assert {"results", "win_rate", "kl", "detectors", "claims"} == {*tables}
    assert {"knobs", "frontier"} == {*figures}


def test_rounds_have_a_second_one(tmp_path):
    for name in ("runs", "others"):
        run(tmp_path / name, None, {"win_rate": 0.5})
    with pytest.raises(ValueError, match=r"others must hold rounds of dpo.rounds, found no second one; leave"):
        summarization.read(tmp_path / "runs", tmp_path / "others")


def test_tables():
    final = world()
    tables, _ = summarization.study({"runs": final, "rounds": chains()})
    found = tables["results"]
    assert found.index.tolist() == [
        *("untuned", "SFT on chosen, lr 0.0005", "DPO, beta 0.1, lr 0.0005"),
        *("round 2, beta 0.1, lr 0.0005", "round 3, beta 0.1, lr 0.0005", "best of 4"),
        *("published, DPO", "published, untuned", "published, GPT-4o"),
    ]
    assert found["win rate"].str[:5].tolist() == [
        "0.500",
        "0.550",
        "0.700",
        "0.750",
        "0.800",
        "0.600",
        "74 %",
        "",
        "64.8 ",
    ]
    assert found["three right or more"].str[:5].tolist()[:3] == ["0.600", "0.650", "0.800"]
    assert found.loc["published, DPO"].tolist()[:6] == ["65.43 %", "25.71 %", "11.58 %", "13 %", "0 %", "0 %"]
    shares = {"four_correct": 0.41, "compression": 0.42, "too_long": 0.43, "invalid": 0.44, "wrong": 0.45}
    cells = summarization.results(final.assign(**shares)).loc["DPO, beta 0.1, lr 0.0005"].drop("win rate")
    assert cells.str.partition(" ")[0].tolist() == ["0.800", "0.410", "0.520", "0.420", "0.430", "0.440", "0.45", "7.0"]
    low = student(values(of_dpo(final), beta=0.1, lr=5e-4), looks=4)[1]  # of the best of four
    assert numbers(found["win rate"].iloc[2])[1] == pytest.approx(low, abs=6e-4)
    knobs = tables["win_rate"]
    assert (knobs.index.tolist(), knobs.columns.tolist()) == (["0.1", "0.01"], ["lr 0.0005", "lr 0.002"])
    assert knobs["lr 0.0005"].str[:5].tolist() == ["0.700", "0.600"]
    assert knobs.loc["0.01", "lr 0.002"] == "degenerate"
    assert tables["kl"]["lr 0.0005"].str[:3].tolist() == ["7.0", "6.0"]
    detected = tables["detectors"]
    assert detected.loc["DPO, beta 0.01, lr 0.002", ["alarms", "degenerate", "broken"]].tolist() == [
        "8 of 8",
        "8 of 8",
        "0.900",
    ]
    assert detected.loc["SFT on chosen, lr 0.002", ["alarms", "degenerate"]].tolist() == ["0 of 8", "0 of 8"]
    rounds = tables["rounds"]
    assert rounds.columns.tolist() == ["beta 0.03, lr 0.0005", "beta 0.1, lr 0.0005"]
    assert rounds["beta 0.1, lr 0.0005"].str[:5].tolist() == ["0.700", "0.750", "0.800"]
    assert rounds["beta 0.03, lr 0.0005"].str[:5].tolist() == ["0.600", "0.650", "0.700"]
    equal = tables["equal_budget"]
    assert equal.index.tolist() == ["previous", "original", "one round"]
    assert equal["score"].str[:5].tolist() == ["0.800", "0.700", "0.600"]


def test_published_numbers():
    """As in the table of the case study, in percent: counts over 1,050 articles, whole ones or with half a tie."""
    table = published.SUMMARIZATION
    counts = table[["three right or more", "four right or more", "invalid characters", "win rate"]] * 10.5
    off = counts - (2 * counts).round() / 2
    assert (off.abs() < 0.11).where(counts.notna(), True).all().all()
    assert table.sum().tolist() == pytest.approx([145.72, 49.23, 32.36, 36.70, 0.0, 0.10, 138.8])


def test_figures():
    figures = summarization.study({"runs": world(), "rounds": chains()})[1]
    score, kl = curves(figures["knobs"])
    assert [axis.get_ylabel() for axis in figures["knobs"].axes] == ["win rate", "KL (nats per response)"]
    assert [axis.get_yscale() for axis in figures["knobs"].axes] == ["linear", "log"]
    assert score["lr 0.0005"][0] == [0.01, 0.1]
    assert score["lr 0.0005"][1] == pytest.approx([0.6, 0.7], abs=1e-3)
    assert kl["lr 0.002"][1] == pytest.approx([5.0, 7.0], abs=1e-2)
    assert min(kl["lr 0.002"][2]) > 0
    for panel, value in ((score, "score"), (kl, "kl")):
        _, mean, low, high = (one[1] for one in panel["lr 0.0005"])
        assert (mean, low, high) == pytest.approx(student(values(of_dpo(world()), value, beta=0.1, lr=5e-4)))
    [axis] = figures["frontier"].axes
    lines = {line.get_label(): np.transpose(line.get_data()) for line in axis.get_lines()}
    assert lines["DPO, lr 0.0005 (numbers: beta)"] == pytest.approx(np.array([[6.0, 0.6], [7.0, 0.7]]), abs=1e-2)
    assert lines["rounds, beta 0.1, lr 0.0005"] == pytest.approx(
        np.array([[7.0, 0.7], [7.5, 0.75], [8.0, 0.8]]), abs=1e-2
    )
    assert lines["best of n, at its bound of KL"] == pytest.approx(np.array([[np.log(4) - 0.75, 0.6]]), abs=1e-3)
    assert len(lines["SFT on chosen (numbers: lr)"]) == 2
    told = [text.get_text() for text in axis.texts]
    assert told == ["0.01", "0.1", "0.01", "0.1", "0.0005", "0.002", "1", "2", "3", "1", "2", "3", "4"]


def test_only_chains_with_a_second_round_are_rounds():
    """Held to the round before: a round on more articles is no first round, one at a beta without a second neither."""
    rounds = chains()
    for number in (1, 2, 3):
        found = of_round(rounds, number)
        assert found["setting"].unique().tolist() == ["beta 0.03, lr 0.0005", "beta 0.1, lr 0.0005"]
        assert len(found) == 16
    final = world()
    assert len(of_dpo(final)) == 4 * 8
    assert pd.isna(of_dpo(final)["best_of"]).all()
