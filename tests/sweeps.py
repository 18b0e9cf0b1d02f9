"""Hand-made frames of finished runs, as `analysis.seeds.finished` gives them, and what SciPy says of them."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy import stats

SEEDS = 8
LUCK = np.array([0.3, -0.2, 0.1, 0.0, -0.3, 0.2, -0.1, 0.0])  # of a seed, which all its runs share
NOISE = np.array([1, -1, 2, -2, 3, -3, 1, -1]) / 1000  # of a run; both have mean 0
SETTINGS = ("beta", "lr", "epochs")
SCALE = {"length": 100.0, "kl": 0.01}  # of luck and noise in what is measured, where that is not 1


def runs_of(rows: Iterable[Mapping[str, Any]], seeds: int = SEEDS) -> pd.DataFrame:
    """`seeds` runs of each row, which has settings and the means that the measures of its runs shall have."""
    found = []
    for number, row in enumerate(rows):
        for seed in range(seeds):
            moved = LUCK[seed] + NOISE[(seed + number) % SEEDS]
            values = {
                key: value + SCALE.get(key, 1.0) * moved if isinstance(value, float) and key not in SETTINGS else value
                for key, value in row.items()
            }
            found.append({"run": f"{number},{seed}", "seed": seed, **values})
    frame = pd.DataFrame(found)
    defaults = {"untrained": False, "scored_by": "win_rate", "broken": 0.0}
    return frame.assign(**{key: value for key, value in defaults.items() if key not in frame})


def values(frame: pd.DataFrame, value: str = "score", **settings: Any) -> np.ndarray:
    """What the runs of a setting measured, in the order of their seeds."""
    for key, wanted in settings.items():
        frame = frame[frame[key] == wanted]
    return frame.sort_values("seed")[value].to_numpy()


def student(differences: np.ndarray, looks: int = 1) -> tuple[float, float, float]:
    """Mean and 95 % interval, of so many that shall hold together."""
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(1 - 0.05 / looks)
    return differences.mean(), low, high


def numbers(text: str) -> list[float]:
    """The means and intervals that a finding tells of."""
    found = re.findall(r"(-?\d+\.\d+) \[(-?\d+\.\d+), (-?\d+\.\d+)\]", text)
    return [float(one) for interval in found for one in interval]


@pytest.fixture
def saved(monkeypatch):
    """The figures that are saved, once each, and not painted: that takes a second each."""
    figures = []

    def savefig(figure, path, **given):
        if figure not in figures:
            figures.append(figure)
        Path(path).write_text("")

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def curves(figure: Figure) -> list[dict[str, list[list[float]]]]:
    """What is drawn with error bars in each panel, by label: x, y, and the ends of the bars."""
    found = []
    for axis in figure.axes:
        of_panel = {}
        for drawn in axis.containers:
            line, _, bars = drawn
            bars = [np.sort(bar[:, 1]) if len(bar) else [np.nan, np.nan] for bar in bars[0].get_segments()]
            of_panel[drawn.get_label()] = [list(line.get_xdata()), list(line.get_ydata()), *np.transpose(bars).tolist()]
        found.append(of_panel)
    return found
