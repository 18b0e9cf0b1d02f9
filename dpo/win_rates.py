"""Win rates over a baseline: their interval, and what they would be at equal lengths."""

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964  # of a 95 % interval
PENALTY = 0.01  # L2, on the effect of length alone: it decides nothing but where length alone tells wins from losses


def wilson(rate: float, n: int) -> tuple[float, float]:
    """95 % score interval (Wilson 1927) of a win rate over n responses.

    With wins and losses alone it is that of a binomial share; ties, as halves, only lessen the variance, so with them
    it is wider than it need be. Unlike the mean plus or minus two errors it says something of 20 wins in 20.
    """
    z2 = Z**2
    middle = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def length_controlled(wins: Sequence[float], longer: Sequence[float]) -> tuple[float, float, float]:
    """The win rate at equal lengths, and its 95 % interval: sigmoid(c) of the logistic regression

        P(win) = sigmoid(c + a tanh(d / s)),   d: `longer`, s: standard deviation of d

    which is the length term of AlpacaEval 2 (Dubois et al., 2404.04475, Eq. 2) without a term of the instruction. A tie
    counts as half a win and half a loss. The interval is c plus or minus 1.96 standard errors from the inverse Hessian
    (delta method), so with ties it is wider than it need be.

    Without wins, or without losses, it is the plain rate and `wilson`'s interval; where no lengths differ, the plain
    rate.

    wins: 1, 0, or 0.5 for a tie.  # (N,)
    longer: by how many characters each response is longer than the baseline's.  # (N,)
    """
    y, d = np.asarray(wins, dtype=np.float64), np.asarray(longer, dtype=np.float64)
    if (rate := float(y.mean())) in (0.0, 1.0):
        return rate, *wilson(rate, len(y))
    spread = d.std(ddof=1) if len(d) > 1 else 0.0
    x = np.stack([np.ones(len(d)), np.tanh(d / (spread or 1.0)) if spread else np.zeros(len(d))], axis=1)  # (N, 2)
    penalty = np.diag([0.0, PENALTY])

    def objective(w: np.ndarray) -> float:
        return float((np.logaddexp(0, x @ w) - y * (x @ w)).sum() + w @ penalty @ w / 2)

    def hessian(w: np.ndarray) -> np.ndarray:
        p = sigmoid(x @ w)
        return x.T @ (x * (p * (1 - p))[:, None]) + penalty

    w = np.zeros(2)
    for _ in range(100):  # Newton's method; convex, with one minimum
        step = np.linalg.solve(hessian(w), x.T @ (sigmoid(x @ w) - y) + penalty @ w)
        while objective(w - step) > objective(w) + 1e-12:
            step /= 2
        w = w - step
        if np.abs(step).max() < 1e-10:
            break
    half = Z * math.sqrt(np.linalg.inv(hessian(w))[0, 0])
    low, middle, high = (float(sigmoid(w[0] + shift)) for shift in (-half, 0.0, half))
    return middle, low, high


def sigmoid(logits: np.ndarray | float) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -np.asarray(logits)))
