"""Best of n, against its closed forms: with continuous scores it beats one sample n times in n + 1."""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from scipy.integrate import quad
from sweeps import saved  # noqa: F401
from test_runs import evaluation
from test_runs import run as planned
from whole_runs import frozen, other_model, own, run

from dpo import evaluate, judges, results
from dpo.judges import best
from dpo.policy import model as models
from dpo.policy.sampling import Sample, Sampling
from dpo.settings import BestOf, baseline_best_of, policy_best_of
from dpo.sweep import inputs
from dpo.sweep.rehearse import Rehearsal
from dpo.sweep.schema import faults, number_of_samples

PROMPTS = 3000
NEAR = {"threshold": 3, "min_length_diff": 3, "tie_below_threshold": "tie"}


def as_number(prompts, responses) -> list[dict[str, float]]:
    return [{"score": float(text)} for text in responses]


@pytest.fixture
def uniform(monkeypatch) -> list[int]:
    """Every response is a number in [0, 1), by the seed and its place; how many were sampled at each call."""
    calls: list[int] = []

    def sample(model, tokenizer, prompts, sampling, seed, name):
        calls.append(len(prompts))
        numbers = [np.random.default_rng([seed, place]).random() for place in range(len(prompts))]
        return [Sample(list(ids), [1], f"{number:.12f}", True) for ids, number in zip(prompts, numbers, strict=True)]

    monkeypatch.setattr(evaluate, "sample", sample)
    return calls


@pytest.fixture
def drawn(uniform, tiny_model, tmp_path):
    """`drawn(n)`: best of n of a policy, to so many prompts."""
    from test_evaluate import feeding

    model, tokenizer = models.load(tiny_model("llama"))

    def of(n, stream="policy", judge=as_number, prompts=PROMPTS, named=None, weights="w", **changed):
        changed = {"sampling": Sampling(4, 1.0, 1.0, 4), "cache": str(tmp_path), **changed}
        settings, asked = feeding(60, **changed), [f"cats and {number}" for number in range(prompts)]
        chosen = BestOf(n, judge, None, {"judge": named or {"_target_": "a.judge"}})
        return evaluate.best_of_n(model, tokenizer, weights, asked, settings, chosen, stream)

    return of


@pytest.mark.parametrize("n", [2, 4, 9])
def test_it_beats_one_sample_n_times_in_n_plus_1(drawn, n):
    """And best of m n / (n + m) times, whose samples are others."""
    of_n, of_3 = drawn(n), drawn(3, "initial policy")
    single = [f"{np.random.default_rng([77, place]).random():.12f}" for place in range(PROMPTS)]
    for against, m in ((single, 1), ([one.text for one in of_3], 3)):
        rate = evaluate.describe(["p"] * PROMPTS, of_n, as_number, against)[1]["win_rate"]
        expected = n / (n + m)
        assert rate == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / PROMPTS))


@pytest.mark.parametrize("n", [1, 2, 5, 64])
def test_the_bound_is_the_kl_of_the_best_of_n_scores(n):
    """Their density, n u^(n - 1) where one has 1, against it."""
    exact, _ = quad(lambda u: n * u ** (n - 1) * (math.log(n) + (n - 1) * math.log(u)) if u else 0.0, 0, 1)
    assert best.kl_bound(n) == pytest.approx(exact, abs=1e-6)


def test_no_sampled_kl_is_above_the_bound():
    """Of four responses, two of which score alike: exact probabilities of the best of 3."""
    p, score = np.array([0.1, 0.2, 0.3, 0.4]), [0, 1, 1, 2]
    below = {one: sum(p[k] for k in range(4) if score[k] < one) for one in score}
    upto = {one: sum(p[k] for k in range(4) if score[k] <= one) for one in score}
    q = np.array([(upto[s] ** 3 - below[s] ** 3) * p[k] / (upto[s] - below[s]) for k, s in enumerate(score)])
    assert q.sum() == pytest.approx(1)
    assert 0 < (q * np.log(q / p)).sum() < best.kl_bound(3)


def test_the_highest_of_each_prompt_by_hand():
    """The first of equals; the responses of a prompt are one run apart."""
    asked = []

    def judge(prompts, responses) -> list[dict[str, float]]:
        asked.extend(zip(prompts, responses, strict=True))
        return [{"score": float(len(text))} for text in responses]

    chat = [{"role": "user", "content": "hi"}]
    assert best.best_of(judge, ["p", chat], ["a", "bb", "aa", "b", "cc", "c"]) == [2, 1]
    assert asked == [("p", "a"), (chat, "bb"), ("p", "aa"), (chat, "b"), ("p", "cc"), (chat, "c")]


def test_a_rule_chooses_what_wins_most_often():
    """Of what the judge can judge; here rock, paper and scissors, where there is one scissors more."""
    beats = {(1, 0), (2, 1), (0, 2)}

    def judge(prompts, responses) -> list[dict[str, float]]:
        return [{} if text == "?" else {"score": 0.0, "is": float("rps".index(text))} for text in responses]

    def rule(first, second) -> float:
        pair = int(first["is"]), int(second["is"])
        return 1.0 if pair in beats else 0.0 if pair[::-1] in beats else 0.5

    said = ["?", "p", "s", "?", "r", "p", "s", "?"]
    assert best.best_of(judge, ["a", "b"], said, rule) == [4, 1]  # of "?", s, r, s and of p, ?, p, ?
    assert best.best_of(judge, ["a"], ["s", "p", "s", "r"], rule) == [3]
    assert best.best_of(judge, ["a"], ["s", "p", "p", "r"], rule) == [0]
    assert best.best_of(judge, ["a"], ["?", "p", "?"], rule) == [1]
    assert best.best_of(judge, ["a"], ["s", "p", "s"]) == [0]  # without it by score: the first of equals


def test_a_tie_is_half_a_win_of_either():
    """Of 8, 6 and 10 words, three apart or more: the second beats the last, and the first is as good as both."""

    def judge(prompts, responses) -> list[dict[str, float]]:
        return [{"score": 0.0, "correct": 5.0} for _ in responses]

    said = ["a " * count for count in (8, 6, 10)]
    assert best.best_of(judge, ["p"], said, partial(judges.accurate_then_short, **NEAR)) == [1]


def test_judge_and_rule_of_pairs_choose(tmp_path, tiny_model):
    given = [*own(tmp_path, tiny_model("llama")), "judge=shorter", "evaluation.baseline=best_of_4"]
    config = frozen(tmp_path / "run", *given)
    found = baseline_best_of(config)
    assert (found.n, found.rule) == (4, None)
    assert found.decides == {"judge": {"_target_": "dpo.judges.shorter", "_partial_": True}, "rule": None}
    ruled = baseline_best_of(frozen(tmp_path / "run", *given, "rule=accurate_then_short"))
    assert ruled.decides["judge"] == found.decides["judge"]
    assert ruled.decides["rule"]["_target_"] == "dpo.judges.accurate_then_short"
    assert ruled.rule({"correct": 5.0, "words": 3.0}, {"correct": 1.0, "words": 2.0}) == 1.0
    assert baseline_best_of(frozen(tmp_path / "run", *given, "evaluation.baseline=initial")) is None


def test_samples_of_few_are_among_those_of_more(drawn):
    found = [drawn(n, prompts=50) for n in (2, 4, 8)]
    assert all(len({tuple(one.prompt_ids) for one in some}) == 50 for some in found)  # each to its own prompt
    scores = [[float(one.text) for one in some] for some in found]
    assert all(a <= b <= c for a, b, c in zip(*scores, strict=True))
    assert any(a == b for a, b in zip(*scores[:2], strict=True))


def test_it_is_sampled_and_judged_once(drawn, uniform):
    """Unless what decides it changes: the judge, n, the stream, weights, seed, temperature, prompts."""
    first = drawn(2, prompts=5)
    assert drawn(2, prompts=5) == first
    assert uniform == [10]
    changes = [
        {"named": {"_target_": "another.judge"}},
        {"stream": "initial policy"},
        {"weights": "v"},
        {"seed": 1},
        {"sampling": Sampling(4, 0.5, 1.0, 4)},
    ]
    for number, change in enumerate(changes, 2):
        drawn(2, **{"prompts": 5, **change})
        assert len(uniform) == number
    assert drawn(3, prompts=5) != first
    assert len(drawn(2, prompts=4)) == 4
    assert uniform[-2:] == [15, 8]


def test_what_a_config_calls_best_of_n():
    assert number_of_samples("best_of_16") == 16
    for other in (None, "initial", "human", "best_of_n", "best_of_", "/models/best_of_16", "best_of_16/policy"):
        assert number_of_samples(other) is None


def test_what_cannot_be_is_refused_when_planned(tmp_path, tiny_model, monkeypatch):
    """By a judge that compares pairs, or none; without a number, or with one sample."""
    llama = tiny_model("llama")
    given = [*own(tmp_path, llama), "judge=shorter", f"against={llama}"]
    baseline, policy = (
        OmegaConf.to_container(frozen(tmp_path / "run", *given, asked, verb="evaluate"))
        for asked in ("evaluation.baseline=best_of_4", "best_of=4")
    )
    pairwise = {"_target_": "test_best_of_n.compares", "_partial_": True}
    for config in (baseline, policy):
        assert Rehearsal().of(config)["problems"] == []
        for judge, found in ((None, "none"), (pairwise, "one that compares two")):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("DPO_PLUGINS", "test_best_of_n")
                wrong = {**config, "judge": judge}
                [problem] = Rehearsal().of(wrong)["problems"]
                assert f"judge must be one that scores each response, found {found}; take another" in problem
                of = baseline_best_of if config is baseline else policy_best_of
                with pytest.raises(ValueError, match="judge must be one that scores"):
                    of(OmegaConf.create(wrong))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DPO_PLUGINS", "test_best_of_n")
            measured = {**config, "evaluation": {**config["evaluation"], "judge": pairwise}}
            assert Rehearsal().of(measured)["problems"] == []
    for value in ("best_of_n", "best_of_1", "best_of_0", "best_of_-2"):
        [problem] = faults({**baseline, "evaluation": {**baseline["evaluation"], "baseline": value}})
        assert problem == f"evaluation.baseline=best_of_N must have a number of samples from 2, got {value}"
    [problem] = faults({**baseline, "against": None})
    assert problem.startswith("evaluation.baseline=best_of_4 samples the model at against, got none")
    [problem] = faults({**policy, "best_of": 0})
    assert problem == "best_of must be above 0, got 0"
    [problem] = faults({**policy, "evaluation": {**policy["evaluation"], "instructions": "alpaca_eval.json"}})
    assert problem.startswith("best_of must be 1 where evaluation.instructions are answered")
    (tmp_path / "best_of_4").mkdir()
    (tmp_path / "best_of_4" / "config.json").write_text("{}")  # of somebody's
    monkeypatch.chdir(tmp_path)
    assert "baseline" not in inputs.models(baseline)


def compares(prompts: list, firsts: list, seconds: list) -> list[judges.Verdict]:
    return ["tie" for _ in prompts]


def beside(folder: Path) -> None:
    """Two runs of `dpo.train`, and beside them best of 1, 2 and 8 of the initial policy, and their figures."""
    for beta, kl in ((0.1, 8.0), (1.0, 2.0)):
        file = planned(folder, beta, command="train") / "evaluation.json"
        file.write_text(json.dumps({**evaluation(beta), "kl": kl}))
    for n, rate in ((1, 0.5), (2, 0.7), (8, 0.9)):
        settings = {"command": "evaluate", "best_of": n, "against": "sft", "policy": {"path": "sft"}}
        file = planned(folder, 0.1, **settings) / "evaluation.json"
        low_and_high = {"win_rate": rate, "win_rate/low": rate - 0.1, "win_rate/high": rate + 0.05}
        kl = {"kl_bound": best.kl_bound(n)} if n > 1 else {"kl": 0.0, "kl/se": 0.0}
        file.write_text(json.dumps({"n": 1000, **low_and_high, **kl}))


def test_beside_runs_of_a_sweep_it_is_told_by_its_number(tmp_path):
    """And not by beta and other keys, which say nothing of it."""
    beside(tmp_path)
    frame = results.final(tmp_path)
    assert results.swept(frame) == ["beta", "best_of"]
    assert frame["best_of"].tolist()[2:] == [1, 2, 8]
    assert frame["beta"].tolist()[:2] == [0.1, 1.0]
    assert frame[["beta", "best_of"]].isna().values.tolist() == [[False, True]] * 2 + [[True, False]] * 3
    table = results.table(frame)
    kls = ["8.00 [7.90, 8.10]", "2.00 [1.90, 2.10]", "0.00 [0.00, 0.00]", "at most 0.19", "at most 1.20"]
    assert table["KL [95 %]"].tolist() == kls
    assert table["best_of"].tolist() == ["-", "-", "1", "2", "8"]
    rows = results.load(tmp_path)
    assert rows["best_of"].dropna().unique().tolist() == [1, 2, 8]


def test_alone_its_number_is_a_key_like_others(tmp_path, saved):  # noqa: F811
    beside(tmp_path)
    for trained in tmp_path.glob("*command=train*"):
        trained.rename(tmp_path.parent / trained.name)
    frame = results.final(tmp_path)
    assert results.swept(frame) == ["best_of"]
    bounds = frame[frame["best_of"] > 1].dropna(axis="columns", how="all")
    for some, before in ((frame, ""), (bounds, "bound of the ")):
        some.attrs["swept"] = ["best_of"]
        results.figure(some, tmp_path / "figure.png")
        assert saved.pop().axes[1].get_ylabel() == f"{before}KL to the initial policy (nats per response)"


def test_it_is_drawn_on_the_frontier_alone(tmp_path, saved):  # noqa: F811
    """At its bound; runs of the sweep are drawn as they are without it."""
    beside(tmp_path)
    results.figure(frame := results.final(tmp_path), tmp_path / "figure.png")
    quality, distance, frontier = saved[-1].axes
    [[across, up]] = [one[0].get_data() for one in quality.containers]
    assert (list(across), list(up)) == ([0.1, 1.0], [0.6, 0.6])
    [[across, up]] = [one[0].get_data() for one in distance.containers]
    assert (list(across), list(up)) == ([0.1, 1.0], [8.0, 2.0])
    trained, several = [one[0].get_data() for one in frontier.containers]
    assert [list(one) for one in trained] == [[8.0, 2.0], [0.6, 0.6]]
    assert several[0].tolist() == pytest.approx([math.log(2) - 1 / 2, math.log(8) - 7 / 8])
    assert several[1].tolist() == [0.7, 0.9]
    assert {text.get_text() for text in frontier.texts} == {"0.1", "1", "2", "8"}
    assert [text.get_text() for text in frontier.get_legend().get_texts()] == ["best of n, at its bound of KL"]
    assert frontier.get_xscale() == "log"
    assert not saved[-1].legends
    alone = frame[frame["best_of"].isna()].dropna(axis="columns", how="all")
    alone.attrs["swept"] = ["beta"]
    results.figure(alone, tmp_path / "figure.png")
    assert len(saved[-1].axes[2].containers) == 1
    assert saved[-1].axes[2].get_legend() is None


def numbers(directory: Path) -> dict[str, float]:
    return json.loads((directory / "evaluation.json").read_text())


def test_best_of_n_is_measured_as_a_policy(tmp_path, tiny_model):
    """By the judge of evaluations, chosen by that of pairs; in place of KL is its bound."""
    llama, other = tiny_model("llama"), other_model(tmp_path, tiny_model)
    given = [*own(tmp_path, llama), "judge=shorter", "device=cpu", f"against={other}", "evaluation.prompts=6"]
    made = {}
    for name, asked in (
        ("one", []),
        ("many", ["best_of=5"]),
        ("beaten", ["evaluation.baseline=best_of_5"]),
        ("both", ["best_of=3", "evaluation.baseline=best_of_5"]),
    ):
        (directory := tmp_path / name).mkdir()
        evaluate.run(frozen(directory, *given, *asked, verb="evaluate"), directory)
        rows = [json.loads(line) for line in (directory / "responses.jsonl").read_text().splitlines()]
        made[name] = rows, numbers(directory)
    assert {"kl", "kl/se"} <= {*made["one"][1]}
    assert not {"kl_bound", "baseline/kl_bound"} & {*made["one"][1]}
    rows, found = made["many"]
    assert found["kl_bound"] == pytest.approx(math.log(5) - 0.8)
    assert not {"kl", "baseline/kl_bound"} & {*found}
    assert [row["baseline"] for row in rows] == [row["baseline"] for row in made["one"][0]]
    assert all(row["score"] == -len(row["response"].split()) for row in rows)
    assert found["score"] > made["one"][1]["score"]
    _, found = made["beaten"]
    assert found["baseline/kl_bound"] == pytest.approx(math.log(5) - 0.8)
    assert "kl" in found
    assert found["win_rate"] < made["one"][1]["win_rate"]
    assert made["both"][1]["kl_bound"] == pytest.approx(math.log(3) - 2 / 3)
    assert [row["baseline"] for row in made["both"][0]] == [row["baseline"] for row in made["beaten"][0]]
    keys = [json.loads(file.read_text()) for file in (tmp_path / "cache" / "best_of_n").glob("*/key.json")]
    weights = {path: models.fingerprint(models.load(path, torch.device("cpu"))[0]) for path in (llama, other)}
    assert {(key["weights"], key["stream"], key["n"]) for key in keys} == {
        (weights[llama], "policy", 5),
        (weights[llama], "policy", 3),
        (weights[other], "initial policy", 5),
    }
    (directory := tmp_path / "ruled").mkdir()
    config = frozen(directory, *given, "best_of=5", "evaluation.rule=accurate_then_short", verb="evaluate")
    with pytest.raises(RuntimeError, match="rule=accurate_then_short reads"):  # which is asked, and not the score
        evaluate.run(config, directory)


def test_a_run_is_measured_against_best_of_n(tmp_path, tiny_model):
    """Of the policy that it started from; on the way, too."""
    given = [*own(tmp_path, tiny_model("llama")), "judge=shorter", "judge@evaluation.judge=shorter", "device=cpu"]
    rows, found = run(
        tmp_path / "run", *given, "evaluation.baseline=best_of_3", "evaluate_prompts=2", "evaluate_every=2"
    )
    assert found["baseline/kl_bound"] == pytest.approx(math.log(3) - 2 / 3)
    assert [row["baseline/kl_bound"] for row in rows if row["split"] == "test"] == [found["baseline/kl_bound"]] * 2
    assert "kl_baseline" not in found
    [key] = (tmp_path / "cache" / "best_of_n").glob("*/key.json")
    assert json.loads(key.read_text())["weights"] == models.fingerprint(models.load(tiny_model("llama"))[0])
    kept = [row["text"] for row in json.loads((key.parent / "responses.json").read_text())]
    lines = [json.loads(line) for line in (tmp_path / "run" / "responses.jsonl").read_text().splitlines()]
    assert [row["baseline"] for row in lines] == kept
