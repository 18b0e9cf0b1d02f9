"""Claims, tables and the figure of the study of SmolLM2 on HH, on hand-made runs whose truth is known."""

import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from composing import compose
from matplotlib.colors import to_rgba_array
from omegaconf import OmegaConf
from scipy.stats import binomtest
from sweeps import curves, numbers, runs_of, student, values
from test_published import run

from analysis import pair_gaps, seeds, smollm2_hh
from analysis.smollm2_hh import KEYS, POLICY, RANK, REWARD
from dpo import losses
from dpo.results.figures import colours
from dpo.sweep.plan import resolve

FILE = Path(__file__).parents[2] / "experiments/figure/smollm2_hh.yaml"
BETAS = [0.01, 0.1, 1.0, 10.0]
WAYS = ["all weights", "LoRA of rank 16", "all weights, reference_free"]


def of(reward, policy, kls, rank=None, reference="initial", betas=BETAS):
    """Rows of a way to train, one for each beta."""
    setting = {"reference": reference, RANK: rank, "lr": 2e-5 if rank is None else 2e-4}
    measured = {"score": reward, REWARD: reward, POLICY: policy, "kl": kls}
    return [
        {**setting, "beta": beta, **{name: of_betas[place] for name, of_betas in measured.items()}}
        for place, beta in enumerate(betas)
    ]


def runs(rows):
    return runs_of(rows).assign(scored_by=REWARD)


def world(sign=1):
    """Everything as claimed, or with -1 the other way round. Where a claim is of one accuracy, the other says no."""
    reward = {1: [0.55, 0.7, 0.6, 0.55], -1: [0.65, 0.55, 0.5, 0.65]}[sign]
    policy, kls = [0.62, 0.6, 0.58, 0.55][::sign], [40.0, 20.0, 10.0, 5.0][::sign]

    def away(numbers, off):
        return [number + sign * off for number in numbers]

    return [
        *of(away(reward, -0.1), away(policy, -0.06), kls, reference="reference_free"),
        *of(away(reward, 0.05), away(policy, -0.1), away(kls, -3.0), rank=16),
        *of(reward, policy, kls),
    ]


@pytest.mark.parametrize("sign,said", [(1, "supports"), (-1, "refutes")])
def test_claims(sign, said):
    found = smollm2_hh.claims(runs(world(sign)))
    claims = [f"{number}. {way}" for way in WAYS for number in "123"] + ["4. ", "5. ", "6. "]
    assert [claim[0] for claim in found.index] == [claim[0] for claim in claims]
    for claim, expected in zip(found.index[:9], claims, strict=False):
        assert claim.endswith(f"({expected[3:]})")
    assert found["verdict"].tolist() == [said] * 12
    means = [numbers(text)[::3] for text in found["measured"]]
    falls = sign * np.polyfit([-2, -1, 0, 1], [-40, -20, -10, -5], 1)[0]
    rises = sign * np.polyfit([-2, -1, 0, 1], [-0.62, -0.6, -0.58, -0.55], 1)[0]
    between = [0.15, 0.15] if sign > 0 else [-0.1, -0.1]
    for mean, expected in zip(means[:9], [[falls], [rises], between] * 3, strict=True):
        assert mean == pytest.approx(expected, abs=2e-3)
    for mean, expected in zip(means[9:], [[3.0] * 4, [0.05], [0.06]], strict=True):
        assert mean == pytest.approx([sign * one for one in expected], abs=3e-3)


def test_claims_without_their_runs():
    """They are listed with what they take."""
    two = of([0.6, 0.5], [0.6, 0.5], [4.0, 2.0], betas=[0.1, 1.0])
    found = smollm2_hh.claims(runs(two))
    assert [claim[0] for claim in found.index] == ["1", "2", "3", "6"]
    assert found["verdict"].tolist() == ["supports", "supports", "undecided", "undecided"]
    assert "three betas, found 2" in found["measured"].iloc[2]
    assert "not measured" in found["measured"].iloc[3]
    alone = smollm2_hh.claims(runs([{**row, RANK: 16} for row in two]))
    assert [claim[0] for claim in alone.index] == ["1", "2", "3", "4", "5", "6"]
    assert alone["measured"].iloc[3:].str.contains("not measured").all()
    one_seed = smollm2_hh.claims(runs(world()).query("seed == 0"))
    assert set(one_seed["verdict"]) == {"undecided"}


def test_intervals_allow_for_all_looks():
    """Adapters that have two of the four betas are compared at these, at once; an end with the two betas between."""
    rows = [row for row in world() if row[RANK] is None or row["beta"] in (0.1, 10.0)]
    final = runs(rows)
    final["kl"] += 0.2 * final["seed"] * (final[RANK] == 16)  # differences that are spread
    final["score"] += 0.01 * final["seed"] * final["beta"].isin([0.01, 10.0])
    found = smollm2_hh.claims(final)["measured"]
    full, adapters = final[final[RANK].isna() & (final["reference"] == "initial")], final[final[RANK] == 16]
    kl = [student(values(full, "kl", beta=b) - values(adapters, "kl", beta=b), looks=2) for b in (0.1, 10.0)]
    [nearer] = [text for claim, text in found.items() if claim[0] == "4"]
    assert numbers(nearer) == pytest.approx([*kl[0], *kl[1]], abs=6e-4)
    score = {beta: values(full, beta=beta) for beta in BETAS}
    for place, end in ((0, 0.01), (3, 10.0)):
        mean = score[0.1].mean() - score[end].mean()
        low = max(student(score[beta] - score[end], looks=4)[1] for beta in (0.1, 1.0))
        high = max(student(score[beta] - score[end], looks=2)[2] for beta in (0.1, 1.0))
        assert numbers(found.iloc[2])[place : place + 3] == pytest.approx([mean, low, high], abs=6e-4)


def test_settings_that_are_as_good():
    """Within the margin of accuracies, which is narrower than that of win rates."""
    level = [*of([0.6] * 4, [0.6] * 4, [4.0] * 4), *of([0.6] * 4, [0.6] * 4, [4.0] * 4, reference="reference_free")]
    for off, said in ((0.0, "equivalent"), (0.03, "supports")):
        final = runs([{**row, POLICY: row[POLICY] - off * (row["reference"] != "initial")} for row in level])
        assert smollm2_hh.claims(final)["verdict"].iloc[-1] == said


def test_table_has_numbers_of_runs_whose_samples_are_cut():
    final = runs([{**row, "broken": 1.0, "ended": 0.0} for row in world()])
    table = smollm2_hh.table(final)
    assert table.index.tolist() == [(way, beta) for way in WAYS for beta in ("10", "1", "0.1", "0.01")]
    assert table["degenerate"].tolist() == ["8 of 8"] * 12
    assert table["lr"].tolist() == ["2e-05"] * 4 + ["0.0002"] * 4 + ["2e-05"] * 4
    full = final[final[RANK].isna() & (final["reference"] == "initial")]
    for title, name, digits in (("reward accuracy", REWARD, 3), ("policy accuracy", POLICY, 3), ("KL", "kl", 2)):
        mean, _, high = student(values(full, name, beta=0.1))
        assert table.loc[("all weights", "0.1"), title] == f"{mean:.{digits}f} ± {high - mean:.{digits}f}"
    assert table.loc[("LoRA of rank 16", "1"), "reward accuracy"].startswith("0.650 ±")
    assert (table["length"] == "").all()  # not measured
    others = {"kl/se": 0.41, "length": 4.2, "ended": 0.43, "repetition": 0.44, "broken": 0.45, POLICY: 0.46}
    first = smollm2_hh.table(final.assign(**others)).iloc[0].str.partition(" ")[0]
    shown = ["policy accuracy", "its error over responses", "length", "ended", "repetition", "broken"]
    assert first[shown].tolist() == ["0.460", "0.41", "4.2", "0.430", "0.440", "0.450"]
    some = final.assign(broken=(final["seed"] < 3).astype(float))
    assert set(smollm2_hh.table(some)["degenerate"]) == {"3 of 8"}
    assert not smollm2_hh.table(some)["KL"].str.contains("degenerate").any()
    assert seeds.cell(full[full["beta"] == 0.1], POLICY) == "degenerate"  # as the other studies say


def ranks(policy, reward=None, before=None, order=None, **setting):
    """The pairs of a run, in any order of rows."""
    frame = pd.DataFrame({"policy": policy, "reward": reward or policy, "before": before or policy})
    frame = frame.rename_axis("pair").reset_index().loc[order or [*range(len(policy))]]
    return frame.assign(**{"reference": "initial", RANK: None, "beta": 0.1, "seed": 0, **setting})


def test_over_pairs():
    full, adapters, before = [1, 0, 1, 1, 0, 0.5], [1, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0.5, 0]
    reward = [1, 1, 1, 1, 0, 1]
    pairs = pd.concat(
        [
            ranks(adapters, reward, before, order=[5, 3, 1, 0, 2, 4], **{RANK: 16}),
            ranks(full, reward, before),
            ranks(before, beta=1.0),
            ranks(adapters, reference="reference_free", beta=10.0),
        ]
    )
    table = smollm2_hh.over_pairs(pairs)
    assert table.index.tolist() == [(WAYS[0], "1", 0), (WAYS[0], "0.1", 0), (WAYS[1], "0.1", 0), (WAYS[2], "10", 0)]
    assert table["pairs"].tolist() == [6] * 4
    mine, theirs, start = (np.array(one, float) for one in (adapters, full, before))
    for title, ranked in (("reward accuracy", reward), ("policy accuracy", adapters)):
        ends = binomtest(sum(ranked), 6).proportion_ci(method="wilson")
        assert numbers(table.loc[(WAYS[1], "0.1", 0), title]) == pytest.approx([sum(ranked) / 6, *ends], abs=6e-4)
    shown = {
        "minus that before training": mine - start,
        "minus that of all weights": mine - theirs,
    }
    for title, expected in shown.items():
        assert numbers(table.loc[(WAYS[1], "0.1", 0), title]) == pytest.approx(student(expected), abs=6e-4), title
    assert table["minus that of all weights"].tolist()[:2] == ["", ""]
    assert table["minus that of all weights"].tolist()[3] == "not measured"  # no run of all weights at that beta
    assert table["reward accuracy"].tolist()[3] == ""  # its reward is the policy's own log-prob
    assert smollm2_hh.over_pairs(ranks(full, reference="world_clean"))["reward accuracy"].tolist() == [""]
    assert smollm2_hh.over_pairs(pairs[pairs[RANK] == 16])["minus that of all weights"].tolist() == ["not measured"]


def test_ties_are_those_of_the_runs_accuracies():
    """Of log-probs of 100 nats on either side, rounding may move a margin by 2e-3 nats; equal policies have no ties."""
    rejected = torch.full((4,), -100.0)
    zeros = vars(losses.PairLogps.zeros(4))
    chosen = {
        "policy_chosen_logps": rejected + torch.tensor([1.001, 1.0, 0.98, -2.0]),
        "reference_chosen_logps": rejected + torch.tensor([1.0, 1.001, 1.0, 0.0]),
    }
    others = dict.fromkeys(("policy_rejected_logps", "reference_rejected_logps"), rejected)
    pair = losses.PairLogps(**{**zeros, **chosen, **others})
    for beta in (0.1, 10.0):
        found = pair_gaps.ranked(lambda pair, beta=beta: losses.dpo(pair, beta, label_smoothing=0.0), pair)
        assert {name: one.tolist() for name, one in found.items()} == {
            "reward": [0.5, 0.5, 0.0, 0.0],
            "policy": [1.0, 1.0, 1.0, 0.0],
            "before": [1.0, 1.0, 1.0, 0.5],
        }


def test_what_is_read(tmp_path, monkeypatch):
    accuracy = {REWARD: 0.6, POLICY: 0.55, "kl": 3.0}
    for beta in (0.1, 1.0):
        run(tmp_path, None, accuracy, beta=beta)
    run(tmp_path, None, accuracy, beta=0.1, lr=5e-6)
    [adapters] = tmp_path.glob("*lr=5e-06*")
    config = OmegaConf.load(adapters / "config.yaml")
    OmegaConf.save(OmegaConf.merge(config, {"policy": {"lora": {"rank": 16}}}), adapters / "config.yaml")
    run(tmp_path, None, accuracy, beta=0.1, steps=0)
    asked = []

    def gaps(path, split):
        asked.append((path.name, split))
        return pd.DataFrame({"gap": [3.0, 4.0], "policy": [1, 0], "reward": [0.5, 1], "before": [0, 0]})

    monkeypatch.setattr(pair_gaps, "gaps", gaps)
    frames = smollm2_hh.read(tmp_path)
    assert sorted(zip(frames["runs"]["beta"], frames["runs"][RANK].fillna(0), strict=True)) == [
        *((0.1, 0), (0.1, 16), (1.0, 0))
    ]
    assert (frames["runs"]["score"] == 0.6).all()
    assert sorted(asked) == sorted((name, "validation") for name in frames["runs"]["run"])
    assert frames["pairs"].columns.tolist() == ["pair", "reward", "policy", "before", "run", *KEYS]
    assert frames["pairs"]["pair"].tolist() == [0, 1] * 3
    tables, figures = smollm2_hh.study(frames)
    assert (list(tables), list(figures)) == (["smollm2_hh", "over_pairs", "claims"], ["accuracy_and_kl"])
    assert len(smollm2_hh.read(tmp_path, beta="1")["runs"]) == 1
    with pytest.raises(ValueError, match="must hold runs of steps above 0, found none"):
        smollm2_hh.read(tmp_path, steps="0")


def test_accuracy_is_a_score_where_it_is_asked_for(tmp_path):
    """A study of win rates does not show accuracies in their place; this one has them though there are win rates."""
    run(tmp_path / "unjudged", None, {REWARD: 0.6})
    with pytest.raises(ValueError, match=r"needs a win rate or, where no judge is at hand, .* have none"):
        seeds.finished(tmp_path / "unjudged", ["beta", "seed"], {})
    run(tmp_path / "judged", 12.0, {REWARD: 0.6})
    for given, score in ({}, 12.0), ({"scores": [REWARD]}, 0.6):
        found = seeds.finished(tmp_path / "judged", ["beta", "seed"], {}, **given)
        assert found["score"].tolist() == pytest.approx([score])
    run(tmp_path / "unmeasured", 12.0)
    with pytest.raises(ValueError, match=rf"needs {REWARD}; policy=mistral_7b,.* have none"):
        seeds.finished(tmp_path / "unmeasured", ["beta", "seed"], {}, scores=[REWARD])


def test_figure():
    final = runs(world())
    drawing = smollm2_hh.figure(final)
    quality, distance, _ = curves(drawing)
    frontier = drawing.axes[2]
    assert list(distance) == WAYS
    assert list(quality) == [one for way in WAYS for one in (way, f"{way}, the policy itself")]
    for way, (mask, lower) in {
        WAYS[0]: (final[RANK].isna() & (final["reference"] == "initial"), 0.55),
        WAYS[1]: (final[RANK] == 16, 0.6),
    }.items():
        same = final[mask]
        for drawn, name in (
            (quality[way], REWARD),
            (quality[f"{way}, the policy itself"], POLICY),
            (distance[way], "kl"),
        ):
            of_betas = [student(values(same, name, beta=beta)) for beta in BETAS]
            assert drawn[0] == BETAS
            for place, expected in enumerate(zip(*of_betas, strict=True), 1):
                assert drawn[place] == pytest.approx(list(expected))
        line = next(line for line in frontier.lines if line.get_label() == way)
        means = same.groupby("beta")[["kl", REWARD]].mean()
        assert line.get_xydata().tolist() == [pytest.approx(point) for point in means.to_numpy().tolist()]
        assert means[REWARD].iloc[0] == pytest.approx(lower, abs=1e-3)
    points = frontier.collections[0]
    assert points.get_facecolors() == pytest.approx(to_rgba_array([*colours(BETAS, "beta").values()]))
    assert [axis.get_xscale() for axis in drawing.axes] == ["log", "log", "linear"]
    one = curves(smollm2_hh.figure(final[final["seed"] == 0]))[0][WAYS[0]]
    assert np.isnan(one[2:]).all()  # one seed says nothing of the spread


def test_the_commands_of_the_header():
    """Each can be planned; rates are those of the way to train."""
    text = re.sub(r" \\\n# +", " ", FILE.read_text())
    given = [shlex.split(line.split("dpo.train ")[1]) for line in text.splitlines() if "-m dpo.train" in line]
    found = []
    for command in given:
        config = resolve(compose("train", *(one.split(",")[0] for one in command)))
        found.append((config["name"], config["policy"]["lora"]["rank"], config["lr"], config["data"]["chat"]))
    cpu, gpu = "smollm2_hh", "smollm2_hh_epoch"
    full = cpu, None, 2e-5, True
    assert found[:4] == [full, (cpu, 16, 2e-4, True), full, full]
    assert found[4:] == [(gpu, None, 1e-6, True), (gpu, 16, 1e-5, True)]
