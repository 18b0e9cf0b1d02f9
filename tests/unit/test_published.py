"""The studies on fabricated runs that hold the published numbers, which must come out as published, cell by cell; and
on sweeps that lack something.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from analysis import kl_strength, published, reference_compatibility, token_level
from analysis.report import kept, main
from analysis.seeds import COLLAPSED

POLICIES = {"mistral-7b": "mistral_7b", "tulu-2-7b": "tulu_2_7b", "qwen2-1.5b": "qwen2_1_5b"}
REFERENCES = {"mistral-7b-instruct": "mistral_7b_instruct", "llama3-70b": "llama3_70b_instruct", "itself": "initial"}


def run(folder: Path, score: Any, measured: dict[str, Any] | None = None, **settings: Any) -> None:
    """A finished run as `dpo.train` and `dpo.results.alpaca_eval` leave it. score: in percent, or degenerate."""
    choices = {"policy": "mistral_7b", "reference": "initial", "loss": "dpo", "data": "ultrafeedback", "judge": "none"}
    choices |= {key: settings.pop(key) for key in choices if key in settings}
    config = {"seed": 0, "beta": 0.1, "lr": 5e-7, "epochs": 3, "steps": None, "policy": {"path": choices["policy"]}}
    config |= {"loss": {"_target_": f"dpo.losses.{choices['loss']}"}, **settings, "choices": choices}
    shown = {**choices, **{key: config[key] for key in ("seed", "beta", "lr", "epochs", "steps")}}
    directory = folder / ",".join(f"{key}={value}" for key, value in shown.items())
    directory.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(config), directory / "config.yaml")
    steps = 0 if config["steps"] == 0 else 5731
    broken = 0.9 if score == COLLAPSED else 0.0
    whole = {"n": 200, "broken": broken, "length": 300.0, **(measured or {}), "steps": steps}
    (directory / "evaluation.json").write_text(json.dumps(whole))
    if score is not None:
        rate = {"alpaca_eval/length_controlled": 0.001 if score == COLLAPSED else score / 100}
        (directory / "alpaca_eval_scores.json").write_text(json.dumps(rate))


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    """runs/ of the tables of experiments/table/paper_*.yaml, by their headers' commands."""
    runs = tmp_path_factory.mktemp("published")
    for policy in ("mistral-7b", "tulu-2-7b"):
        scores = published.TABLE_1[policy].drop(published.PREVIOUS)
        for beta, score in scores.items():
            accuracy = {
                "rewards/accuracies": published.TABLE_2.loc[beta, f"{policy} reward"],
                "logps/accuracies": published.TABLE_2.loc[beta, f"{policy} policy"],
                "length": published.TABLE_3.loc["SFT" if beta == "inf" else "DPO", "length"],
            }
            told = {"beta": 0.1, "steps": 0} if beta == "inf" else {"beta": float(beta)}
            run(runs / "strength", score, accuracy, policy=POLICIES[policy], **told)
    for beta, score in published.TABLE_6["qwen2-1.5b"].items():
        told = {"beta": 0.1, "steps": 0} if beta == "inf" else {"beta": float(beta)}
        run(runs / "small", score, policy="qwen2_1_5b", **told)
    for method, reference in (("DPO", "initial"), ("posterior", "reference_free"), ("likelihood", "unconditional")):
        best = published.TABLE_3.loc[method]
        for beta in (0.01, 0.1, 1, 10, 100):  # other betas are not published: let them be worse
            score = best["score"] if beta == float(best["beta"]) else best["score"] - 3
            found = {"logps/accuracies": best["policy accuracy"], "length": best["length"]}
            run(runs / "necessity", score, found, reference=reference, beta=beta)
    for name, scores in published.TABLE_4.items():
        policy, reference = str(name).split(", ")
        for beta, score in scores.items():
            fits = {"policy": POLICIES[policy], "reference": REFERENCES[reference], "beta": float(beta)}
            run(runs / "compatibility", score, **fits)
    for beta, score in published.TABLE_7.iloc[:, 0].items():
        run(runs / "tuned", score, reference="other", beta=float(beta))
    return runs


CHECKSUMS = [
    "8c32bf29ade5",
    "58b7f103ba43",
    "b0cdea67e393",
    "d8b3ca0d052c",
    "750c5ba4273e",
    "755502db6b22",
    "af5ea6871d03",
    "0c73fe35f899",
    "0e2bea29c739",
]


def test_published_tables():
    """As compared with the paper by eye, table by table; what one of them repeats of another is the same."""
    tables = [getattr(published, f"TABLE_{number}") for number in range(1, 8)]
    whole = [json.dumps([one.index.name, one.to_dict("split")]) for one in tables] + [json.dumps(published.FIGURE_2)]
    whole.append(json.dumps([published.BETA_DPO.index.name, published.BETA_DPO.to_dict("split")]))
    assert [hashlib.sha256(one.encode()).hexdigest()[:12] for one in whole] == CHECKSUMS
    for policy, columns in {"mistral-7b": (0, 1), "tulu-2-7b": (2, 3)}.items():
        best = [pd.to_numeric(published.TABLE_4.iloc[:, column], errors="coerce").max() for column in columns]
        itself = pd.to_numeric(published.TABLE_1[policy], errors="coerce").max()
        assert published.TABLE_5[policy].tolist() == [published.TABLE_1[policy]["inf"], itself, *best]
    gains = (published.BETA_DPO["beta-DPO"] / published.BETA_DPO["DPO"] - 1) * 100
    assert gains.round(1).tolist() == [15.2, 13.8, 10.8]  # as the paper says
    dpo = published.TABLE_3.loc["DPO"]
    assert [dpo["score"], dpo["policy accuracy"]] == [
        *(published.TABLE_1["mistral-7b"]["0.01"], published.TABLE_2["mistral-7b policy"]["0.01"])
    ]


def printed(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.2f}"


def as_published(found: pd.Series, expected: pd.Series) -> None:
    assert found[expected.index].tolist() == [printed(value) for value in expected]


@pytest.mark.parametrize("policy", ["mistral-7b", "tulu-2-7b"])
def test_tables_1_and_2(sweeps, policy):
    tables, figures = kl_strength.study(kl_strength.read(sweeps / "strength", policy=POLICIES[policy]))
    as_published(tables["table_1"]["lr 5e-07"], published.TABLE_1[policy].drop(published.PREVIOUS))
    assert tables["table_1"].index.tolist() == published.TABLE_2.index.tolist()
    for kind in ("reward", "policy"):
        found, expected = tables["table_2"][f"lr 5e-07, {kind}"], published.TABLE_2[f"{policy} {kind}"]
        degenerate = [name for name, score in published.TABLE_1[policy].items() if score == COLLAPSED]
        assert found.drop(degenerate).tolist() == [f"{one:.3f}" for one in expected.drop(degenerate)]
    assert not figures  # no judge and no KL


def test_claims_of_strength(sweeps):
    tables, _ = kl_strength.study(kl_strength.read(sweeps / "strength", policy="mistral_7b"))
    found = tables["claims"]["measured"]
    assert set(tables["claims"]["verdict"]) == {"undecided"}  # of one seed
    expected = [  # all from Tables 1 and 2
        ("1a", ["minus that at beta 0.005: 3.890", "minus at 0.1: 2.220"]),  # 16.25 - 12.36, 16.25 - 14.03
        ("1b", ["2.220"]),
        ("1c", ["0 of 1 seeds at beta 0.005, 0 at beta 0.1"]),
        ("2a", ["from beta 0.1 to 0.005 it changes by 0.209"]),
        ("2b", ["0.065"]),  # 0.5 - 0.435
        ("2c", ["0.718"]),
    ]
    for (number, said), (claim, text) in zip(expected, found.items(), strict=True):
        assert claim.startswith(number)
        assert all(part in text for part in said), text
    tulu, _ = kl_strength.study(kl_strength.read(sweeps / "strength", policy="tulu_2_7b"))
    assert "1 of 1 seeds at beta 0.005, 0 at beta 0.1" in tulu["claims"]["measured"].iloc[2]


def test_table_6(sweeps):
    tables, _ = kl_strength.study(kl_strength.read(sweeps / "small"))
    as_published(tables["table_1"]["lr 5e-07"], published.TABLE_6["qwen2-1.5b"])


@pytest.fixture(scope="module")
def references(sweeps):
    folders = [sweeps / name for name in ("necessity", "compatibility", "tuned", "strength")]
    return reference_compatibility.study(reference_compatibility.read(*folders))[0]


def test_tables_of_references(references):
    third = references["table_3"]
    assert third.index.tolist() == published.TABLE_3.index.tolist()
    as_published(third["score"], published.TABLE_3["score"])
    assert third["policy accuracy"].tolist() == [f"{one:.3f}" for one in published.TABLE_3["policy accuracy"]]
    assert third["length"].tolist() == [f"{one:.1f}" for one in published.TABLE_3["length"]]
    assert third["beta"].tolist() == published.TABLE_3["beta"].tolist()
    for name, scores in published.TABLE_4.items():
        policy, reference = str(name).split(", ")
        as_published(references["table_4"][f"{POLICIES[policy]}, {REFERENCES[reference]}"], scores)
    for policy, scores in published.TABLE_5.items():
        as_published(references["table_5"][POLICIES[str(policy)]], scores.rename(REFERENCES))
    assert references["table_5"].index[:2].tolist() == ["SFT", "initial"]
    as_published(references["table_7"]["other"], published.TABLE_7.iloc[:, 0])


def test_claims_of_references(references):
    found = references["claims_of_references"]
    assert set(found["verdict"]) == {"undecided"}  # of one seed
    expected = {
        "4a": "3.410",  # 16.25 - 12.84
        "4b": "3.000",
        "4c": "385.100",  # 744.5 - 359.4
        "5a. A stronger reference that is related to the policy helps (mistral_7b)": "4.000",  # 20.25 - 16.25
        "5b. One that is not does not (mistral_7b)": "0.880",  # 16.25 - 15.37
        "5c. It does harm at the same beta (mistral_7b)": "1.527",  # means over 0.1, 0.01 and 0.005
        "5d. The best beta of the stronger one is about 1, and not 0.01 (mistral_7b)": "3.070",
        "5a. A stronger reference that is related to the policy helps (tulu_2_7b)": "0.710",  # 11.17 - 10.46
        "5b. One that is not does not (tulu_2_7b)": "2.610",  # 10.46 - 7.85
        "5d. The best beta of the stronger one is about 1, and not 0.01 (tulu_2_7b)": "2.010",
        "5e. Another tokenizer does not forbid a gain (tulu_2_7b)": "0.710",
        "Table 7": "0.500",  # 16.75 - 16.25
    }
    for claim, number in expected.items():
        [text] = [text for name, text in found["measured"].items() if str(name).startswith(claim)]
        assert f": {number} (no interval)" in text, (claim, text)
    missing = found["measured"][found["measured"].str.contains("not measured")]
    assert [claim.split()[1] for claim in missing.index] == ["SimPO,", "ORPO,", "It"]  # and said to be so
    assert "the claim above is not controlled" in missing.iloc[-1]


def test_untrained_runs_are_no_seeds(sweeps):
    """The untrained run of a policy was told beta 0.1, and is none of its runs."""
    frames = kl_strength.read(sweeps / "strength", policy="mistral_7b")
    assert frames["runs"]["untrained"].sum() == 1
    folders = [sweeps / name for name in ("necessity", "compatibility", "tuned", "strength")]
    compatibility = reference_compatibility.read(*folders)["compatibility"]
    itself = compatibility[(compatibility["reference"] == "initial") & ~compatibility["untrained"]]
    assert len(itself) == 5 * 2


# Sweeps that lack something


def sweep(folder: Path, betas: tuple[float, ...] = (0.01, 0.1, 1.0), seeds: int = 3, lrs: tuple[float, ...] = (5e-7,)):
    for beta in betas:
        for lr in lrs:
            for seed in range(seeds):
                run(folder, 10 + beta + seed / 10, {"logps/accuracies": 0.6 - beta / 10}, beta=beta, lr=lr, seed=seed)


@pytest.mark.parametrize(
    "betas,seeds,untrained",
    [((0.1,), 1, True), ((0.1,), 3, False), ((0.1, 1.0), 3, True), ((0.01, 0.1, 1.0), 1, False)],
)
def test_small_sweeps(tmp_path, betas, seeds, untrained):
    """Every claim is listed, whatever is missing: here also the rewards, KL, a judge, and what was before training."""
    sweep(tmp_path, betas, seeds)
    if untrained:
        run(tmp_path, 5.0, {"logps/accuracies": 0.4}, steps=0, beta=0.1)
        run(tmp_path, 5.0, {"logps/accuracies": 0.4}, steps=0, beta=0.2)  # the same policy once more
    tables, _ = kl_strength.study(kl_strength.read(tmp_path))
    assert [claim.split(".")[0] for claim in tables["claims"].index] == ["1a", "1b", "1c", "2a", "2b", "2c"]
    assert tables["table_1"].loc["inf"].tolist() == ["5.00" if untrained else ""]
    assert tables["table_2"].loc["inf"].tolist() == ["", "0.400" if untrained else ""]
    assert tables["table_1"].index.tolist() == ["inf", *sorted((f"{beta:g}" for beta in betas), key=float)[::-1]]
    assert not tables["table_1"].map(lambda text: "nan" in text or "inf" in text).any(axis=None)
    assert ("not measured" in tables["claims"]["measured"].iloc[0]) == (len(betas) < 3)


def test_a_key_that_no_run_has(tmp_path):
    sweep(tmp_path, lrs=(5e-7, 1e-6))
    for wrong, said in (({"polcy": "mistral_7b"}, "is policy meant"), ({"bet": "1"}, "is beta meant")):
        with pytest.raises(ValueError, match=said):
            kl_strength.read(tmp_path, **wrong)
    with pytest.raises(ValueError, match="they differ in beta, lr, policy, seed"):
        kl_strength.read(tmp_path, xyz="1")
    assert (
        len(kl_strength.read(tmp_path, lr="1e-6")["runs"])
        == len(kl_strength.read(tmp_path, lr="0.000001")["runs"])
        == 9
    )
    assert len(kl_strength.read(tmp_path, epochs="3")["runs"]) == 18  # a key that does not vary


@pytest.mark.parametrize("arguments", [["polcy=mistral_7b"], ["."], ["path=x"], ["nowhere"]])
def test_the_command_line_of_a_study(tmp_path, monkeypatch, arguments):
    sweep(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["study", ".", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main("usage", kl_strength.read, kl_strength.study)
    assert stopped.value.code
    assert not list(tmp_path.glob("*.csv"))


def test_the_command_line_of_a_study_writes(tmp_path, monkeypatch, capsys):
    """What it reads of all folders, with the keys that it is told, is written into the first."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    asked = []

    def read(one, two, **only):
        asked.append((one, two, only))
        return {"runs": pd.DataFrame({"run": ["a"], "score": [0.5]})}

    def study(frames):
        table = pd.DataFrame({"score": ["0.500"]}, index=pd.Index(["0.1"], name="beta"))
        return {"table_1": table, "table_2": table[:0]}, {"frontier": Figure()}

    monkeypatch.setattr(sys, "argv", ["study", str(folders[0]), "policy=a=b", str(folders[1])])
    main("usage", read, study)
    assert asked == [(*folders, {"policy": "a=b"})]
    assert "table_1" in (said := capsys.readouterr().out)
    assert "0.500" in said
    assert "\ntable_2\nno rows: it takes more runs, or larger ones\n" in said
    tables = ["one/table_1.csv", "one/table_2.csv"]
    written = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.*"))
    assert written == ["one/frames/runs.csv", "one/frontier.pdf", "one/frontier.png", *tables]
    assert pd.read_csv(folders[0] / "table_1.csv").to_dict("list") == {"beta": [0.1], "score": [0.5]}
    assert pd.read_csv(folders[0] / "frames" / "runs.csv").to_dict("list") == {"run": ["a"], "score": [0.5]}


def test_a_step_is_training(tmp_path):
    sweep(tmp_path)
    run(tmp_path, 5.0, beta=5.0, steps=1)
    assert not kl_strength.read(tmp_path)["runs"]["untrained"].any()


def test_two_runs_are_no_two_seeds(tmp_path):
    sweep(tmp_path)
    run(tmp_path, 12.0, beta=0.1, seed=0, epochs=1)
    with pytest.raises(ValueError, match=r"must differ in beta, lr, seed, found .* one epochs at a time: say epochs="):
        kl_strength.read(tmp_path)
    assert len(kl_strength.read(tmp_path, epochs="3")["runs"]) == 9


def test_runs_without_a_score_are_named(tmp_path):
    sweep(tmp_path, seeds=1)
    run(tmp_path, None, beta=10.0)
    with pytest.raises(ValueError, match=r"adds; policy=mistral_7b,.*beta=10.0.* have none"):
        kl_strength.read(tmp_path)


def test_a_measure_of_some_seeds(tmp_path):
    """A mean over two of three seeds says so."""
    for seed, length in enumerate([300.0, None, 310.0]):
        run(tmp_path, 12.0 + seed, {"length": length, "logps/accuracies": 0.6}, reference="reference_free", seed=seed)
    frame = reference_compatibility.read(tmp_path, tmp_path, tmp_path)["necessity"]
    [row] = reference_compatibility.table_3(frame).to_dict("records")
    assert row["length"] == "305.0 ± 63.5 (of 2 of 3 seeds)"
    assert row["KL"] == row["wrong"] == ""
    assert row["score"].startswith("13.00 [")


def test_a_policy_of_ones_own(tmp_path):
    """Its claim is listed, though nobody said which reference fits it; other losses have rows, too."""
    needed, fitting = tmp_path / "needed", tmp_path / "fitting"
    for folder in (needed, fitting):
        for reference in ("initial", "other"):
            run(folder, 12.0, {"length": 300.0}, policy="mine", reference=reference)
    run(needed, 12.0, policy="mine", loss="hinge")
    tables, _ = reference_compatibility.study(reference_compatibility.read(needed, fitting, fitting))
    assert tables["claims_of_references"].index.str.contains("(mine)", regex=False).sum() == 1
    assert tables["table_3"].index.tolist() == ["DPO", "dpo, other", "hinge, initial"]
    with pytest.raises(ValueError, match="one loss at a time: say loss=dpo or loss=hinge"):
        reference_compatibility.read(needed, needed, fitting)


@pytest.mark.parametrize("control", [False, True])
def test_the_control_of_equal_compute(tmp_path, control):
    """A policy that is held to itself over twice the epochs has seen as much as one held to itself after DPO."""
    tuned, others = tmp_path / "tuned", tmp_path / "others"
    run(others, 12.0)
    for seed in range(5):
        for beta in (0.1, 1.0):
            run(tuned, 15 + seed + beta, reference="other", beta=beta, seed=seed)
            run(tuned, 12 + seed + beta, beta=beta, seed=seed)
            if control:
                run(tuned, 18 + seed + beta, beta=beta, seed=seed, epochs=6)
    final = reference_compatibility.read(others, others, tuned)["tuned"]
    first, second = reference_compatibility.claims_of_tuned(final)["verdict"]
    assert (first, second) == ("supports", "refutes" if control else "undecided")
    columns = reference_compatibility.table_7(final).columns
    assert sorted(columns) == ["initial", *(["initial, 6 epochs"] if control else []), "other"]


def test_numbers_of_runs_outlive_them(tmp_path, sweeps):
    """A study of the CSV files beside a notebook is that of the runs."""
    sweep(tmp_path / "runs")
    for study, folders in (
        (kl_strength, [str(tmp_path / "runs")]),
        (reference_compatibility, [str(sweeps / name) for name in ("necessity", "compatibility", "tuned", "strength")]),
    ):
        place = tmp_path / study.__name__
        first, _ = study.study(kept(place, study.read, *folders))
        again, _ = study.study(kept(place, study.read, *(f"{folder}.gone" for folder in folders)))
        for name, table in first.items():
            pd.testing.assert_frame_equal(table, again[name], check_dtype=False)
    with pytest.raises(ValueError, match="found neither"):
        kept(tmp_path / "nowhere", kl_strength.read, "runs/gone")


def spoken(run: Path, split: str = "validation") -> pd.DataFrame:
    """As `token_level.tokens`: EOS falls by 3, `sure` by 2, others little; without training, nothing."""
    config = OmegaConf.load(run / "config.yaml")
    falls = {"</s>": 3.0, "sure": 2.0, "null": 0.5, "a": 0.1}
    rows = [
        {"pair": pair, "response": response, "position": at, "token": token, "end": token == "</s>"}
        for pair in range(40)
        for response in ("chosen", "rejected")
        for at, token in enumerate(["null", "a", "sure", "</s>"])
    ]
    found = pd.DataFrame(rows)
    scale = 0.0 if config.steps == 0 else 1.0 - config.beta / 10 + config.seed / 100
    return found.assign(before=-1.0, difference=-scale * found["token"].map(falls)).assign(
        after=lambda frame: frame["before"] + frame["difference"]
    )


@pytest.mark.parametrize("betas,seeds", [((0.1, 1.0), 3), ((0.1,), 1)])
def test_tokens_of_small_sweeps(tmp_path, monkeypatch, betas, seeds):
    monkeypatch.setattr(token_level, "tokens", spoken)
    sweep(tmp_path / "strength", betas, seeds)
    run(tmp_path / "strength", 5.0, steps=0, beta=0.1)
    for seed in range(seeds):
        for reference in ("initial", "reference_free"):
            run(tmp_path / "necessity", 10.0, reference=reference, seed=seed)
    run(tmp_path / "necessity", 5.0, steps=0, beta=0.1)
    frames = kept(tmp_path / "kept", token_level.read, str(tmp_path / "strength"), str(tmp_path / "necessity"))
    tables, _ = token_level.study(frames)
    often = ["</s>", "sure", "null", "a"] if seeds == 3 else []  # of one seed 80 times each, and not 100
    assert tables["figure_2"].index.tolist() == often
    claims = tables["claims_of_tokens"]
    assert [claim.split(".")[0] for claim in claims.index] == ["3a", "3b", "3c", "3d"]
    decided = ["supports", "supports", "supports", "supports"]
    assert claims["verdict"].tolist() == (decided if seeds == 3 else ["undecided"] * 4)
    assert "(sure)" in claims["measured"].iloc[3] or seeds == 1
    assert len(tables["claims_of_ends"]) == 4  # without runs of the likelihood reward, too
    assert tables["figure_3"].index.tolist() == ["DPO", "posterior"]
