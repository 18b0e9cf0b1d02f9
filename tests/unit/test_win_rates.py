"""Length-controlled win rates, against simulations whose truth is known and scikit-learn's regression."""

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from dpo import evaluate, judges
from dpo.policy.sampling import Sample
from dpo.win_rates import length_controlled, wilson


def drawn(rng: np.random.Generator, rate: float, effect: float, n: int, ties: float = 0.0) -> tuple[np.ndarray, ...]:
    """Wins of a policy that is mostly longer, over a judge with that effect of length; some of them are ties."""
    longer = rng.normal(60, 100, n)
    p = expit(logit(rate) + effect * np.tanh(longer / longer.std(ddof=1)))
    wins = (rng.random(n) < p).astype(float)
    return np.where(rng.random(n) < ties, 0.5, wins), longer


@pytest.mark.parametrize("rate,effect", [(0.5, 2.0), (0.7, -1.0), (0.35, 0.0)])
def test_the_rate_at_equal_lengths_is_found(rate, effect):
    """And its interval covers it in 95 of 100; the plain rate is led astray by length."""
    rng, found, covered, plain = np.random.default_rng(0), [], 0, []
    for _ in range(400):
        wins, longer = drawn(rng, rate, effect, 400)
        value, low, high = length_controlled(wins, longer)
        found.append(value)
        covered += low <= rate <= high
        plain.append(wins.mean())
    assert np.mean(found) == pytest.approx(rate, abs=0.005)
    assert 0.92 < covered / 400 < 0.98
    assert abs(np.mean(plain) - rate) > (0.08 if effect else -1)


@pytest.mark.parametrize("ties", [0.0, 0.3])
def test_coefficients_are_those_of_scikit_learn(ties):
    """With the same penalty, each tie as half a win and half a loss."""
    wins, longer = drawn(np.random.default_rng(1), 0.6, 1.5, 120, ties)
    x = np.tanh(longer / longer.std(ddof=1))[:, None]
    model = LogisticRegression(C=100, tol=1e-10, max_iter=1000)
    model.fit(np.concatenate([x, x]), np.repeat([1, 0], 120), np.concatenate([wins, 1 - wins]))
    value, low, high = length_controlled(wins, longer)
    assert value == pytest.approx(expit(model.intercept_[0]), abs=1e-6)
    p = model.predict_proba(x)[:, 1]
    both = np.concatenate([np.ones_like(x), x], axis=1)
    error = np.sqrt(np.linalg.inv(both.T @ (both * (p * (1 - p))[:, None]) + np.diag([0, 0.01]))[0, 0])
    assert logit([low, high]) == pytest.approx(model.intercept_[0] + 1.96 * error * np.array([-1, 1]), abs=1e-3)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_without_losses_or_wins_it_is_the_plain_rate(rate):
    assert length_controlled([rate] * 20, [*range(20)]) == (rate, *wilson(rate, 20))
    assert length_controlled([rate], [3]) == (rate, *wilson(rate, 1))


def test_where_no_lengths_differ_it_is_the_plain_rate():
    for longer in (0, 7):
        value, low, high = length_controlled([1, 1, 1, 0, 0.5] * 20, [longer] * 100)
        assert value == pytest.approx(0.7)
        assert logit([low, high]) == pytest.approx(logit(0.7) + 1.96 * np.array([-1, 1]) / np.sqrt(21), abs=1e-3)
    value, low, high = length_controlled([0.5], [3])
    assert value == pytest.approx(0.5)
    assert 0 < low < 0.5 < high < 1


def test_where_length_decides_all_nothing_is_left():
    """A judge that takes the shorter response: one half at equal lengths, within a wide interval."""
    longer = np.concatenate([np.arange(1, 61), -np.arange(1, 21)])
    _, low, high = length_controlled(longer < 0, longer)
    assert (longer < 0).mean() == 0.25
    assert low < 0.5 < high
    assert high - low > 2 * np.diff(wilson(0.25, 80))[0]


def test_it_stands_beside_the_win_rate():
    """Of the texts' characters, the response less the baseline."""
    texts = ["a b c", "a", "a b c d", "c d", "a b c d e", "a b", "b", "d e f"]
    baseline = ["a b", "a b", "a b c", "c", "a b", "a b c", "b", "a b c d e f g"]
    samples = [Sample([0], [1, 2], text, True) for text in texts]

    def judge(prompts, responses) -> list[dict[str, float]]:
        return [{"score": float("a b c" not in text and "d" in text)} for text in responses]

    rows, found = evaluate.describe(["p"] * 8, samples, judge, baseline)
    longer = [len(text) - len(other) for text, other in zip(texts, baseline, strict=True)]
    expected = length_controlled([row["win"] for row in rows], longer)
    assert tuple(found[f"win_rate_lc{end}"] for end in ("", "/low", "/high")) == expected
    assert 0 < found["win_rate_lc/low"] < found["win_rate_lc"] < found["win_rate_lc/high"] < 1
    assert found["win_rate_lc"] != pytest.approx(found["win_rate"], abs=1e-3)
    assert not {key for key in evaluate.describe(["p"] * 8, samples, judges.shorter)[1] if "win" in key}
