"""The study of tokens: how it reads them, and claims, tables and figures on hand-made ones whose truth is known."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from sweeps import numbers
from test_published import run

from analysis import token_level
from dpo.results.figures import colours

SEEDS = 6
WOBBLE = np.array([3, -3, 1, -1, 2, -2]) / 100  # of a seed, in nats


def items(differences, occurrences=50):
    """{beta: {token: mean difference}} over seeds; EOS, which ends a turn, four times as often as the others."""
    return pd.DataFrame(
        {
            "beta": beta,
            "seed": seed,
            "token": token,
            "end": token == "EOS",
            "difference": mean + WOBBLE[(seed + number) % SEEDS],
            "occurrences": occurrences * (4 if token == "EOS" else 1),
        }
        for beta, of_beta in differences.items()
        for number, (token, mean) in enumerate(of_beta.items())
        for seed in range(SEEDS)
    )


# Reading


class Scored:
    """A reference of which the log-probs of the tokens are known, chosen responses first."""

    def __init__(self, base, path=None):
        self.base, self.path = base, path

    def prepare(self, start, policy, asked, config):
        self.asked = (start, policy, asked, config.per_token)
        [(split, pairs)] = asked.items()
        responses = [pair.chosen[1] for pair in pairs] + [pair.rejected[1] for pair in pairs]
        rows = enumerate(responses)
        self.tokens = {split: [self.base - 10 * row - torch.arange(float(len(ids))) for row, ids in rows]}
        return self


@pytest.mark.parametrize("world", ["dpo.world.language.world", "dpo.data.hub.hh"])
def test_tokens(monkeypatch, tmp_path, world):
    """A row per token of each response, chosen ones first, with its own log-probs before and after."""
    config = {"data": {"_target_": world}, "judge": {"_target_": "judge"}, "per_token": False}
    OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")
    text = SimpleNamespace(prompt="an article")
    pairs = [
        SimpleNamespace(chosen=([1], [5, 6, 9]), rejected=([1], [7, 9]), text=text),
        SimpleNamespace(chosen=([2], [8]), rejected=([2], [6, 5]), text=text),
    ]
    other, made = {"train": [], "validation": pairs[:1], "test": pairs}, []
    tokenizer = SimpleNamespace(decode=lambda ids: "abcdefghij"[ids[0]])
    policy = SimpleNamespace(generation_config="settings")
    monkeypatch.setattr(token_level, "policy_spec", lambda config, path: path)
    monkeypatch.setattr(token_level, "scoring_of", lambda config: config)
    monkeypatch.setattr(token_level, "instantiate", lambda node: node._target_)
    monkeypatch.setattr(token_level.score, "encode", lambda config, dataset: (tokenizer, other))
    monkeypatch.setattr(token_level.score, "prepare", lambda *given: ("start", policy, other))
    monkeypatch.setattr(token_level, "ends", lambda *given: {9} if given == (tokenizer, "settings") else {})
    monkeypatch.setattr(token_level, "values_told", lambda prompt, words: [f"{prompt}: {word}" for word in words])
    monkeypatch.setattr(token_level, "Initial", lambda: made.append(Scored(-1.0)) or made[-1])
    monkeypatch.setattr(token_level, "Frozen", lambda path: made.append(Scored(-1.5, path)) or made[-1])
    found = token_level.tokens(tmp_path, "test")
    by_response = {
        key: (same["position"].tolist(), "".join(same["token"]), same["end"].tolist(), same["before"].tolist())
        for key, same in found.groupby(["response", "pair"])
    }
    assert by_response == {
        ("chosen", 0): ([0, 1, 2], "fgj", [False, False, True], [-1.0, -2.0, -3.0]),
        ("chosen", 1): ([0], "i", [False], [-11.0]),
        ("rejected", 0): ([0, 1], "hj", [False, True], [-21.0, -22.0]),
        ("rejected", 1): ([0, 1], "gf", [False, False], [-31.0, -32.0]),
    }
    assert (found["after"] - found["before"]).tolist() == found["difference"].tolist() == [-0.5] * len(found)
    if world.endswith("world"):
        assert found["value"].tolist() == [f"an article: {token}" for token in found["token"]]
    else:
        assert "value" not in found
    assert [one.path for one in made] == [None, str(tmp_path / "policy")]
    assert [one.asked for one in made] == [("start", policy, {"test": pairs}, True)] * 2


def spoken(run):
    """Of each run one pair, whose chosen response ends and holds a right and a wrong value."""
    config = OmegaConf.load(run / "config.yaml")
    rows = [
        ("chosen", 0, "a", False, None, -1.0),
        ("chosen", 1, "b", False, "right", -2.0),
        ("chosen", 2, "a", False, "wrong", -4.0),
        ("chosen", 3, "</s>", True, None, -8.0),
        ("rejected", 0, "a", False, None, -3.0),
        ("rejected", 1, "</s>", True, "right", -6.0),
    ]
    found = pd.DataFrame(rows, columns=["response", "position", "token", "end", "value", "difference"])
    shift = config.seed / 10 + config.beta + (0 if config.lr > 5e-7 else 100)
    found["difference"] -= shift
    return found.assign(pair=0, before=-1.0, after=found["difference"] - 1)


def test_what_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(token_level, "tokens", spoken)
    for beta in (0.1, 1.0):
        for lr, score in ((5e-7, 11.0), (1e-6, 12.0)):
            for seed in range(2):
                run(tmp_path / "strength", score, beta=beta, lr=lr, seed=seed)
    run(tmp_path / "strength", 5.0, beta=0.2, steps=0, lr=1e-6)
    for seed, reference in enumerate(("initial", "reference_free", "unconditional")):
        run(tmp_path / "necessity", 10.0, reference=reference, seed=seed, lr=1e-6)
    run(tmp_path / "necessity", 10.0, reference="reference_free", loss="simpo", lr=1e-6)
    run(tmp_path / "necessity", 5.0, steps=0, seed=1, lr=1e-6)
    frames = token_level.read(tmp_path / "strength", tmp_path / "necessity")
    found = frames["items"].set_index(["beta", "seed", "token", "end"])
    assert len(found) == 2 * 2 * 3
    mean, occurrences = found.loc[(1.0, 1, "a", False)]
    assert (mean, occurrences) == (pytest.approx(-(1 + 4 + 3) / 3 - 1.1), 3)
    found = frames["positions"].set_index(["beta", "seed", "position"])["difference"]
    assert found.loc[0.1, 0].tolist() == pytest.approx([-2.1, -4.1, -4.1, -8.1])
    found = frames["values"].set_index(["beta", "seed", "kind"])["difference"]
    assert found.loc[0.1, 0].to_dict() == pytest.approx({"EOS": -7.1, "other": -2.1, "right": -2.1, "wrong": -4.1})
    ends = frames["ends"].set_index(["method", "seed", "response"])["after"].to_dict()
    expected = {("DPO", 0): 0.1, ("posterior", 1): 0.2, ("likelihood", 2): 0.3}
    assert ends == pytest.approx(
        {
            (*key, side): -1 - at - shift
            for key, shift in expected.items()
            for side, at in (("chosen", 8), ("rejected", 6))
        }
    )
    assert {*token_level.read(tmp_path / "strength")} == {"items", "positions", "values"}


def test_a_mean_of_means():
    """Counts each token once, however the tokens are grouped before."""
    rng = np.random.default_rng(0)
    raw = pd.DataFrame({"beta": 0.1, "seed": rng.integers(0, 3, 60), "token": [*"aab"] * 20})
    raw["difference"] = rng.normal(size=60)
    grouped = token_level.means(raw, ["beta", "seed", "token"])
    again = token_level.means(grouped, ["token"]).set_index("token")
    assert again["difference"].to_dict() == pytest.approx(raw.groupby("token")["difference"].mean().to_dict())
    assert again["occurrences"].to_dict() == {"a": 40, "b": 20}


# Tables


def test_tables():
    often = pd.DataFrame(
        [
            *(("EOS", beta, -9.0 * scale, 400) for beta, scale in ((0.1, 1.0), (1.0, 0.5))),
            *(("hundred", beta, -5.0 * scale, 100) for beta, scale in ((0.1, 1.0), (1.0, 0.5))),
            *(("rare", beta, -50.0, 99) for beta in (0.1, 1.0)),
            *(("up", beta, 2.0 * scale, 200) for beta, scale in ((0.1, 1.0), (1.0, 0.5))),
        ],
        columns=["token", "beta", "difference", "occurrences"],
    )
    shown = token_level.most_moved(often)
    assert shown.index.tolist() == ["EOS", "hundred", "up"]
    assert shown[0.1].tolist() == [-9.0, -5.0, 2.0]
    assert token_level.most_moved(often, 1).index.tolist() == ["EOS"]

    spread = pd.DataFrame({"beta": 0.1, "difference": [-150.0, -3.0, -2.5, 30.0]})
    table = token_level.bins(pd.concat([spread, pd.DataFrame({"beta": [1.0], "difference": [-3.0]})]))
    assert table.sum().tolist() == pytest.approx([1.0, 1.0])
    seen = {bin.left: share for bin, share in table[0.1].items() if share}
    assert seen == {-100: 0.25, -3: 0.5, 18: 0.25}  # an edge belongs to the bin above it
    assert table[1.0][table[1.0] > 0].index[0].left == -3
    assert len(token_level.bins(spread.iloc[1:3])) == 1  # from the first that is seen to the last

    positions = pd.DataFrame(
        {"beta": 0.1, "seed": [0, 1, 0, 1], "position": [0, 0, 1, 1], "difference": [-1.0, -2.0, -3.0, -4.0]}
    ).assign(occurrences=[30, 90, 30, 60])
    assert token_level.by_position(positions)[0.1].to_dict() == {0: pytest.approx(-1.75)}
    of_values = pd.DataFrame(
        {"beta": 0.1, "seed": [0, 1, 0], "kind": ["right", "right", "wrong"], "difference": [-1.0, -3.0, -7.0]}
    ).assign(occurrences=[30, 10, 5])
    assert token_level.by_value(of_values)[0.1].to_dict() == {"right": -1.5, "wrong": -7.0}


# Claims

OTHERS = [f"w{number}" for number in range(18)]
AS_PUBLISHED = {
    1.0: {"EOS": -4.0, "Sure": -3.0, **dict.fromkeys(OTHERS, -0.1)},
    0.01: {"EOS": -9.0, "Sure": -6.0, **dict.fromkeys(OTHERS, -0.1)},
}
TURNED = {
    1.0: {"EOS": -1.0, "Sure": -1.0, **dict.fromkeys(OTHERS, -1.0)},
    0.01: {"EOS": 3.0, "Sure": 2.0, **dict.fromkeys(OTHERS, 2.0)},
}


@pytest.mark.parametrize(
    "world,said,measured",
    [
        # mean fall; more of it than at beta 1; what the two items that moved most of 20 made; EOS against the next
        (AS_PUBLISHED, "supports", [(36 + 6 + 1.8) / 23, (20 + 3) / 23, 15 / 16.8, 3.0]),
        (TURNED, "refutes", [-(12 + 38) / 23, -(12 + 38 + 23) / 23, 5 / 41, -1.0]),
    ],
)
def test_claims(world, said, measured):
    found = token_level.claims(items(world))
    assert [claim[:2] for claim in found.index] == ["3a", "3b", "3c", "3d"]
    assert found["verdict"].tolist() == [said] * 4
    assert [numbers(text)[0] for text in found["measured"]] == pytest.approx(measured, abs=0.02)
    assert all("beta 0.01" in text for text in found["measured"])


def test_a_tenth_of_the_items():
    """By size of their change, falls and rises alike; one at least."""
    changes = pd.Series([10.0, -6.0, *[0.5] * 18])
    assert token_level.tenth(changes) == pytest.approx(16 / 25)
    assert token_level.tenth(changes[:4]) == pytest.approx(10 / 17)


def test_who_competes_with_eos():
    """Neither an item that is rare, nor one that a seed lacks, however far they fall."""
    world = items({0.01: {"EOS": -3.0, "Sure": -2.0}})
    rare = items({0.01: {"rare": -50.0}}, occurrences=16)  # 96 times over all seeds
    missing = items({0.01: {"some": -50.0}})
    missing = missing[missing["seed"] > 0]
    for others in (world, pd.concat([world, rare]), pd.concat([world, missing]), pd.concat([rare, missing, world])):
        found, rival = token_level.end_against_rivals(others)
        assert (rival, found.mean) == ("Sure", pytest.approx(1.0, abs=0.01))
    found, rival = token_level.end_against_rivals(world[world["end"]])
    assert (rival, found.seeds) == ("none is seen often enough", 0)


ENDS = {"DPO": (-10.0, -20.0), "posterior": (-30.0, -31.0), "likelihood": (-12.0, -20.0)}


@pytest.mark.parametrize("other,said,sign", [("posterior", "supports", 1), ("DPO", "refutes", -1)])
def test_claims_of_ends(other, said, sign):
    """EOS has its lowest log-prob under the posterior reward, which tells chosen from rejected least by it; or not."""
    names = {"DPO": "posterior" if other == "DPO" else "DPO", "posterior": other, "likelihood": "likelihood"}
    world = {names[name]: ENDS[name] for name in ENDS}
    if other == "DPO":
        world["likelihood"] = (-29.0, -30.5)
    rows = [
        (method, seed, response, mean + WOBBLE[(seed + place) % SEEDS], number)
        for place, (method, means) in enumerate(world.items())
        for (response, number), mean in zip((("chosen", 10), ("rejected", 30)), means, strict=True)
        for seed in range(SEEDS)
    ]
    frame = pd.DataFrame(rows, columns=["method", "seed", "response", "after", "occurrences"])
    ends = token_level.end_of_text(frame)
    shown = ends.groupby("method")[["log-prob", "chosen minus rejected"]].mean()
    for method, (chosen, rejected) in world.items():
        mean = (10 * chosen + 30 * rejected) / 40
        assert shown.loc[method].tolist() == pytest.approx([mean, chosen - rejected], abs=0.01)
    found = token_level.claims_of_ends(ends)
    order = [(claim[:2], claim.split("against ")[1].rstrip(")")) for claim in found.index]
    assert order == [("4d", "DPO"), ("4e", "DPO"), ("4d", "likelihood"), ("4e", "likelihood")]
    assert found["verdict"].tolist() == [said] * 4
    assert [numbers(text)[0] for text in found["measured"]][:2] == pytest.approx([13.25 * sign, 9.0 * sign], abs=0.02)


# Figures


def test_figures():
    """Bins across and shares on a logarithmic axis; bars beside the names of their rows; a colour for each column."""
    table = token_level.bins(pd.DataFrame({"beta": [0.1, 0.1, 1.0], "difference": [-3.0, -1.5, -1.5]}))
    [axis] = token_level.figure_1(table).axes
    assert (axis.get_xscale(), axis.get_yscale()) == ("linear", "log")
    assert axis.get_xlabel() == "mean log-prob after minus before (nats)"
    steps = [patch.get_data() for patch in axis.patches]
    assert [list(step.edges) for step in steps] == [[-3, -2, -1]] * 2
    assert [list(step.values) for step in steps] == [[0.5, 0.5], [0.0, 1.0]]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["0.1", "1"]

    table = pd.DataFrame({0.1: [-9.0, -5.0], 1.0: [-4.0, -2.0]}, index=["EOS", "Sure"]).rename_axis(columns="beta")
    [axis] = token_level.bars(table, "title", "nats").axes
    assert (axis.get_xlabel(), axis.yaxis_inverted()) == ("nats", True)
    names = dict(zip(axis.get_yticks(), [text.get_text() for text in axis.get_yticklabels()], strict=True))
    shades = list(colours([0.1, 1.0], "beta").values())
    for number, (beta, container) in enumerate(zip((0.1, 1.0), axis.containers, strict=True)):
        for bar in container.patches:
            [name] = [name for at, name in names.items() if abs(bar.get_y() + bar.get_height() / 2 - at) < 0.4]
            assert bar.get_width() == table.loc[name, beta]
        assert container.get_label() == f"{beta:g}"
        assert "#{:02x}{:02x}{:02x}".format(*(round(255 * one) for one in bar.get_facecolor()[:3])) == shades[number]

    [axis] = token_level.lines(table.reset_index(drop=True).rename_axis("position"), "title").axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axis.lines[:2]}
    assert (axis.get_xlabel(), drawn) == ("position", {"0.1": [-9.0, -5.0], "1": [-4.0, -2.0]})

    many = pd.DataFrame({number / 10: [-1.0] for number in range(9)}, index=["EOS"])  # more than there are colours
    assert len(token_level.bars(many, "title", "nats").axes[0].containers) == 9
    assert len(token_level.lines(many.reset_index(drop=True), "title").axes[0].get_legend().get_texts()) == 9
    table = token_level.bins(pd.DataFrame({"beta": many.columns, "difference": -1.0}))
    assert len(token_level.figure_1(table).axes[0].patches) == 9
