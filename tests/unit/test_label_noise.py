"""Claims and tables of the study of flipped labels, on hand-made runs whose truth is known."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit, softmax
from sweeps import curves, numbers, runs_of, student, values

from analysis import label_noise, pair_gaps
from analysis.label_noise import CLEAN, FLIP, PRIME
from dpo import losses
from dpo.data.batches import Pair
from dpo.data.records import Measures, Preference

NO_WEIGHTS = pd.DataFrame(columns=["run", "beta", "seed", "loss", FLIP, PRIME, "untrained", "flipped", "relative"])
SETTINGS = [FLIP, PRIME]


def row(loss, flip, score, accuracy, beta=0.1, prime=None):
    prime = 1.0 if loss == "dr_dpo" and prime is None else prime
    return {"loss": loss, FLIP: flip, "beta": beta, PRIME: prime, "score": score, CLEAN: accuracy}


def runs(rows):
    """As `runs_of`: what is a setting has no noise."""
    frame = runs_of([{key: value for key, value in one.items() if key not in SETTINGS} for one in rows])
    number = frame["run"].str.partition(",")[0].astype(int)
    for key in SETTINGS:
        frame[key] = number.map(lambda at, key=key: rows[at][key])
    return frame


def world(sign=1.0):
    """Everything as claimed, or with -1 the other way round."""
    rows = []
    for flip, heavy in ((0.0, 0.0), (0.2, 0.5), (0.4, 1.0)):
        for loss, better in (("dpo", 0.0), ("dr_dpo", 0.1), ("ipo", 0.01), ("robust", 0.03), ("cdpo", 0.02)):
            change = sign * (better - 0.2 * heavy)
            rows += [row(loss, flip, 0.6 + 1.5 * change, 0.7 + change, 0.1)]
            rows += [row(loss, flip, 0.4 + 1.5 * change, 0.5 + change, 0.3)]
        rows += [
            row("dr_dpo", flip, 0.5, 0.7 + sign * (0.1 - 0.2 * heavy) - sign * 0.05, 0.1, prime)
            for prime in (0.3, 10.0)
        ]
    return runs(rows)


def weighed(dpo, dr_dpo, betas=(0.1, 0.3)):
    of = {"dpo": dpo, "dr_dpo": dr_dpo}
    rows = [
        {
            "loss": loss,
            FLIP: flip,
            PRIME: 1.0 if loss == "dr_dpo" else None,
            "beta": beta,
            "relative": 1 + (value - 1) * flip / 0.4,
        }
        for loss, value in of.items()
        for beta in betas
        for flip in (0.2, 0.4)
    ]
    return runs(rows)


AS_SAID = ([0.2], [0.3], [0.1], [0.15], [0.15], [0.08, 0.07, 0.09], [0.05], [1.0, 1.0])


@pytest.mark.parametrize("sign,said", [(1.0, "supports"), (-1.0, "refutes")])
def test_claims(sign, said):
    heavier, lighter = (1.5, 0.5) if sign > 0 else (0.5, 1.5)
    found = label_noise.claims(world(sign), weighed(heavier, lighter))
    assert [claim[:2] for claim in found.index] == ["1a", "1b", "2a", "2b", "2c", "3.", "4.", "5."]
    assert found["verdict"].tolist() == [said] * 8
    more = runs([row("cdpo", 0.5, 0.9, 0.9, 0.1)])  # a share of flips that DPO was not run at
    assert label_noise.claims(pd.concat([world(sign), more]), weighed(heavier, lighter)).equals(found)
    for text, expected in zip(found["measured"], AS_SAID, strict=True):
        assert numbers(text)[::3] == pytest.approx([sign * one for one in expected], abs=2e-3), text
    assert found["measured"].iloc[:5].str.contains("0.4|score").all()


def test_what_is_level_decides_nothing():
    """Differences of nothing: equivalent where the intervals are narrow, and never for or against."""
    final = world().assign(**{CLEAN: world()["seed"] / 100, "score": world()["seed"] / 100})
    found = label_noise.claims(final, weighed(1.0, 1.0))["verdict"]
    assert found.iloc[:6].tolist() == ["equivalent"] * 6
    assert found.iloc[6] == "supports"  # no other beta' is better by more than the margin
    assert found.iloc[7] == "undecided"


def test_what_is_missing_is_said():
    final = runs([row("dpo", 0.0, 0.6, 0.7)])
    found = label_noise.claims(final, NO_WEIGHTS)
    assert set(found["verdict"]) == {"undecided"}
    assert found["measured"].str.contains("not measured").all()


def test_intervals_allow_for_all_looks():
    """Both betas of both sides, and three others that Dr. DPO must beat."""
    final = world()
    text = label_noise.claims(final, NO_WEIGHTS)["measured"]
    mine = {one: values(final, CLEAN, **{"loss": one, FLIP: 0.4, "beta": 0.1}) for one in ("dpo", "cdpo")}
    best = values(final[final[PRIME] == 1.0], CLEAN, **{FLIP: 0.4, "beta": 0.1})
    assert numbers(text.iloc[2]) == pytest.approx(student(best - mine["dpo"], looks=2), abs=6e-4)
    assert numbers(text.iloc[5])[:3] == pytest.approx(student(best - mine["cdpo"], looks=2 * 3), abs=6e-4)
    weights = weighed(1.5, 0.5)
    text = label_noise.claims(final, weights)["measured"].iloc[7]
    sides = [values(weights, "relative", **{"loss": one, FLIP: 0.4, "beta": 0.3}) for one in ("dpo", "dr_dpo")]
    assert numbers(text)[3:] == pytest.approx(student(sides[0] - sides[1], looks=2), abs=6e-4)


def test_other_values_of_beta_prime_are_no_further_tries():
    final = world()
    final.loc[final[PRIME].isin([0.3, 10.0]), [CLEAN, "score"]] = 0.99
    table = label_noise.study({"runs": final, "weights": NO_WEIGHTS})[0]
    assert table["accuracy"].loc["0.4", "Dr. DPO"].startswith("0.600")
    assert label_noise.claims(final, NO_WEIGHTS)["verdict"].iloc[6] == "refutes"


def test_tables():
    final = world()
    final.loc[(final["loss"] == "ipo") & (final[FLIP] == 0.4) & (final["seed"] < 6), "broken"] = 0.9
    final.loc[(final["loss"] == "dpo") & (final[FLIP] == 0.4) & (final["seed"] < 2), "broken"] = 0.9
    tables, figures = label_noise.study({"runs": final, "weights": weighed(1.5, 0.5)})
    assert {"accuracy", "score", "measures", "beta_prime", "weights", "claims"} == {*tables}
    accuracy = tables["accuracy"]
    assert accuracy.columns.tolist() == ["DPO", "cDPO", "robust DPO", "IPO", "Dr. DPO"]
    assert accuracy.index.tolist() == ["0", "0.2", "0.4"]
    assert accuracy.loc["0"].str[:5].tolist() == ["0.700", "0.720", "0.730", "0.710", "0.800"]
    assert tables["score"].loc["0.2"].str[:5].tolist() == ["0.450", "0.480", "0.495", "0.465", "0.600"]
    assert accuracy.loc["0.4", "IPO"] == "degenerate"
    assert "2 of 8 degenerate" in accuracy.loc["0.4", "DPO"]
    measured = tables["measures"]
    assert measured.loc["DPO, 0.4, 0.1", "degenerate"] == "2 of 8"
    assert measured.loc["IPO, 0.4, 0.3", "degenerate"] == "6 of 8"
    assert measured.loc["Dr. DPO, 0, 0.1", "degenerate"] == "0 of 8"
    assert {"correct", "wrong", "valid"} <= {*measured}
    prime = tables["beta_prime"]
    assert (prime.index.tolist(), prime.columns.tolist()) == (
        ["10", "1", "0.3"],
        ["flipped 0", "flipped 0.2", "flipped 0.4"],
    )
    assert prime["flipped 0.4"].str[:5].tolist() == ["0.550", "0.600", "0.550"]
    weights = tables["weights"]
    assert weights.loc["0.4"].str[:5].tolist() == ["1.500", "1.500", "0.500", "0.500"]

    flips, primes = curves(figures["flips"]), curves(figures["beta_prime"])
    assert [axis.get_ylabel() for axis in figures["flips"].axes] == ["accuracy on clean pairs", "score"]
    assert flips[0]["DPO"][0] == [0.0, 0.2, 0.4]
    assert flips[0]["DPO"][1] == pytest.approx([0.7, 0.6, 0.5], abs=1e-3)
    assert flips[1]["Dr. DPO"][1] == pytest.approx([0.75, 0.6, 0.45], abs=1e-3)
    assert primes[0]["0.4 flipped"][0] == [0.3, 1.0, 10.0]
    assert primes[0]["0.4 flipped"][1] == pytest.approx([0.55, 0.6, 0.55], abs=1e-3)
    assert figures["beta_prime"].axes[0].get_xscale() == "log"
    final.loc[(final["loss"] == "dpo") & (final["beta"] == 0.1), "score"] -= 0.5  # the other beta has the best score
    flips = curves(label_noise.figures(final)["flips"])
    assert flips[0]["DPO"][1] == pytest.approx([0.7, 0.6, 0.5], abs=1e-3)
    assert flips[1]["DPO"][1] == pytest.approx([0.4, 0.25, 0.1], abs=1e-3)


def test_weight_of_flipped_pairs():
    """Their mean over that of clean ones, and not shares of a sum, which would follow their number."""
    pairs = pd.DataFrame({"flipped": [False, False, False, True], "weight": [0.1, 0.2, 0.3, 0.4]})
    assert label_noise.relative(pairs).values.tolist() == [[0.25, pytest.approx(2.0)]]


def test_weights_are_gradients():
    """sigmoid(-beta h) of DPO, and that times softmax(-loss / beta') of Dr. DPO."""
    margins = np.array([-3.0, -0.5, 0.0, 2.0, 9.0])
    pair = losses.PairLogps.zeros(5)
    pair = losses.PairLogps(**{**vars(pair), "policy_chosen_logps": torch.tensor(margins, dtype=torch.float32)})

    def dpo(pair):
        return losses.dpo(pair, 0.3, label_smoothing=0.0)

    def robust(pair):
        return losses.dr_dpo(pair, 0.3, beta_prime=0.5, objective=lambda pair, beta: losses.dpo(pair, beta, 0.0))

    slopes = expit(-0.3 * margins)
    assert pair_gaps.weights(dpo, pair).numpy() == pytest.approx(slopes / slopes.sum(), rel=1e-5)
    robustly = slopes * softmax(np.log(expit(0.3 * margins)) / 0.5)
    assert pair_gaps.weights(robust, pair).numpy() == pytest.approx(robustly / robustly.sum(), rel=1e-4)


def test_gaps_are_those_of_the_table_of_each_policy(tmp_path, monkeypatch):
    """By hand: two pairs whose responses have other lengths, which length-normalized DPO reads. The second is ranked
    rightly by its mean log-ratios alone.
    """
    (tmp_path / "config.yaml").write_text(
        "beta: 2.0\nloss: {_target_: dpo.losses.length_normalized, _partial_: true, beta: 2.0}\n"
    )
    before, after = np.array([[-7.0, -6.0], [-2.0, -9.0]]), np.array([[-3.0, -8.0], [-1.8, -8.6]])
    lengths = np.array([[2, 5], [1, 4]])
    asked = []

    def scored_by(logps):
        def prepare(start, policy, pairs, settings):
            asked.append({split: len(items) for split, items in pairs.items()})
            table = {"validation": torch.tensor(logps, dtype=torch.float32)}
            return SimpleNamespace(table=table, lengths={"validation": torch.tensor(lengths)})

        return SimpleNamespace(prepare=prepare)

    measures = [Measures(kind="length", flipped=True), None]
    pairs = [Pair([1], [2], [3], text=Preference("a", "b", "c", measures=one)) for one in measures]
    given = "start", "policy", {"train": pairs[:1], "validation": pairs}
    monkeypatch.setattr(pair_gaps, "load", lambda config: "data")
    monkeypatch.setattr(pair_gaps, "judge_of", lambda config: "judge")
    monkeypatch.setattr(pair_gaps, "policy_spec", lambda config, start: start)
    monkeypatch.setattr(pair_gaps, "scoring_of", lambda config: None)
    monkeypatch.setattr(pair_gaps.score, "encode", lambda config, data: ("tokenizer", "pairs"))
    monkeypatch.setattr(pair_gaps.score, "prepare", lambda *_: given)
    monkeypatch.setattr(pair_gaps, "Initial", lambda: scored_by(before))
    monkeypatch.setattr(pair_gaps, "Frozen", lambda path: scored_by(after) if path.endswith("/policy") else None)
    found = pair_gaps.gaps(tmp_path, "validation")
    assert asked == [{"validation": 2}] * 2
    ratios = after - before
    assert found["gap"].tolist() == pytest.approx((2 * (ratios[:, 0] - ratios[:, 1])).tolist(), rel=1e-5)
    means = ratios / lengths
    slopes = expit(-2 * (means[:, 0] - means[:, 1])) / lengths[:, 0]
    assert found["weight"].tolist() == pytest.approx((slopes / slopes.sum()).tolist(), rel=1e-5)
    assert found["reward"].tolist() == [1.0, 1.0]
    assert (found["before"].tolist(), found["policy"].tolist()) == ([0.0, 1.0], [1.0, 1.0])
    assert (found["kind"].fillna("").tolist(), found["flipped"].tolist()) == (["length", ""], [True, False])
