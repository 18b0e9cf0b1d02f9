"""The sweep's figure: what lies on which axis, on what scale, with which bars, and what the legend says of it."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from sweeps import saved  # noqa: F401

from dpo.results import figures

KL, WIN, ACCURACY = (
    "KL to the initial policy (nats per response)",
    "win rate over the initial policy",
    "accuracy on held-out pairs",
)


@pytest.fixture
def drawn(saved, tmp_path):  # noqa: F811
    """`drawn(frame, swept)`: the figure that `dpo.results.figures.draw` saves."""

    def draw(frame, swept):
        frame = pd.DataFrame(frame)
        frame.attrs["swept"] = swept
        (tmp_path / "kl_strength").mkdir(exist_ok=True)
        figures.draw(frame, tmp_path / "kl_strength" / "figure.png")
        assert [path.name for path in (tmp_path / "kl_strength").iterdir()] == ["figure.png"]
        return saved[-1]

    return draw


def bars(axis):
    """{label: x, y and the halves of the bars} of one panel; without a label, in their order."""
    found = {}
    for number, container in enumerate(axis.containers):
        line, _, segments = container
        sides = {}
        for segment in segments:
            ends = np.array(segment.get_segments())
            sideways = np.ptp(ends[0, :, 0]) > 0
            sides["x" if sideways else "y"] = np.sort(ends[..., 0 if sideways else 1]).tolist()
        label = container.get_label()
        found[number if label.startswith("_") else label] = (list(line.get_xdata()), list(line.get_ydata()), sides)
    return found


def sweep(**columns):
    frame = pd.DataFrame(columns)
    win = frame["win_rate"]
    return frame.assign(**{"win_rate/low": win - 0.02, "win_rate/high": win + 0.03, "kl/se": 0.5})


REFERENCES = sweep(
    beta=[0.01, 0.1, 1.0, 0.1, 1.0],
    reference=["reference_free", "reference_free", "reference_free", "initial", "initial"],
    alpha=[np.nan, np.nan, np.nan, 0.5, 0.5],
    win_rate=[0.5, 0.7, 0.6, 0.8, 0.55],
    kl=[60.0, 40.0, 20.0, 30.0, 4.0],
    **{"rewards/accuracies": [0.1, 0.2, 0.3, 0.4, 0.5]},
)


def test_what_lies_on_which_axis(drawn):
    figure = drawn(REFERENCES, ["beta", "reference", "alpha"])
    quality, distance, frontier = figure.axes
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["Quality", "Distance", "Frontier (numbers: beta)"]
    labels = [(axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes]
    assert labels == [("beta", WIN), ("beta", KL), (KL, WIN)]
    names = ["reference=reference_free, alpha=-", "reference=initial, alpha=0.5"]  # in the order of the runs
    assert [*bars(quality)] == [*bars(distance)] == names
    uniform, initial = bars(quality).values()
    assert uniform[:2] == ([0.01, 0.1, 1.0], [0.5, 0.7, 0.6])
    assert initial[:2] == ([0.1, 1.0], [0.8, 0.55])
    uniform, initial = bars(distance).values()
    assert uniform[:2] == ([0.01, 0.1, 1.0], [60.0, 40.0, 20.0])
    assert initial[:2] == ([0.1, 1.0], [30.0, 4.0])
    uniform, initial = bars(frontier).values()
    assert uniform[:2] == ([60.0, 40.0, 20.0], [0.5, 0.7, 0.6])
    assert initial[:2] == ([30.0, 4.0], [0.8, 0.55])
    told = {text.get_text(): text.xy for text in frontier.texts[:3]}
    assert told == {"0.01": (60.0, 0.5), "0.1": (40.0, 0.7), "1": (20.0, 0.6)}
    for axis in figure.axes:
        assert [to_hex(one[0].get_color()) for one in axis.containers] == list(figures.COLOURS[:2])
    half = [[line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == "--"] for axis in figure.axes]
    assert half == [[0.5], [], [0.5]]
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names


def test_bars_of_single_runs(drawn):
    """95 % intervals: of the win rate as it was measured, of KL from its standard error; both on the frontier."""
    figure = drawn(REFERENCES[REFERENCES["reference"] == "initial"], ["beta"])
    win = [[0.78, 0.83], [0.53, 0.58]]
    kl = [[30 - 0.98, 30 + 0.98], [4 - 0.98, 4 + 0.98]]
    quality, distance, frontier = (next(iter(bars(axis).values()))[2] for axis in figure.axes)
    assert np.array(quality["y"]) == pytest.approx(np.array(win))
    assert np.array(distance["y"]) == pytest.approx(np.array(kl))
    assert np.array(frontier["x"]) == pytest.approx(np.array(kl))
    assert np.array(frontier["y"]) == pytest.approx(np.array(win))
    assert figure.get_suptitle() == "kl_strength, bars: 95 % interval"
    assert not figure.legends


def test_bars_over_seeds(drawn):
    """One standard deviation between seeds about their mean, and a dot for each."""
    frame = sweep(
        beta=[0.1] * 3 + [1.0] * 3,
        seed=[0, 1, 2] * 2,
        win_rate=[0.5, 0.6, 0.7, 0.6, 0.6, 0.9],
        kl=[1.0, 2.0, 6.0, 0.1, 0.2, 0.3],
    )
    figure = drawn(frame, ["beta", "seed"])
    for axis, name in zip(figure.axes, ("win_rate", "kl"), strict=False):
        [(across, up, sides)] = bars(axis).values()
        assert across == [0.1, 1.0]
        for at, mean, (low, high) in zip(across, up, sides["y"], strict=True):
            same = frame[frame["beta"] == at][name].to_numpy()
            assert mean == pytest.approx(same.mean())
            spread = np.sqrt(((same - same.mean()) ** 2).sum() / 2)
            assert (low, high) == pytest.approx((mean - spread, mean + spread))
        [dots] = [line for line in axis.lines if line.get_linestyle() == "None" and line.get_alpha()]
        assert (list(dots.get_xdata()), list(dots.get_ydata())) == (frame["beta"].tolist(), frame[name].tolist())
    assert figure.get_suptitle() == "kl_strength, bars: one standard deviation of 3 seeds"
    alone = drawn(frame[frame["seed"] == 0], ["beta"])
    assert not [
        line for axis in alone.axes for line in axis.lines if line.get_linestyle() == "None" and line.get_alpha()
    ]


def test_scales_of_the_axes(drawn):
    """beta is logarithmic; KL where it spreads over a factor of 10 and is above 0; quality never if it spreads less."""
    figure = drawn(REFERENCES, ["beta", "reference"])
    assert [(axis.get_xscale(), axis.get_yscale()) for axis in figure.axes] == [
        *(("log", "linear"), ("log", "log"), ("log", "linear"))
    ]
    for axis in figure.axes[:2]:
        assert axis.get_xticks().tolist() == [0.01, 0.1, 1.0]
        assert [text.get_text() for text in axis.get_xticklabels()] == ["0.01", "0.1", "1"]
    near = drawn(REFERENCES.assign(kl=[9.0, 8.0, 7.0, 6.0, 1.0]), ["beta", "reference"])
    assert [(axis.get_xscale(), axis.get_yscale()) for axis in near.axes[1:]] == [
        ("log", "linear"),
        ("linear", "linear"),
    ]
    below = drawn(REFERENCES.assign(kl=[60.0, 8.0, 7.0, 6.0, -1.0]), ["beta", "reference"])
    assert below.axes[1].get_yscale() == "linear"
    narrow = drawn(sweep(beta=[0.1, 0.2], win_rate=[0.5, 0.6], kl=[1.0, 2.0]), ["beta"])
    assert [(axis.get_xscale(), axis.get_yscale()) for axis in narrow.axes] == [
        *(("log", "linear"), ("log", "linear"), ("linear", "linear"))
    ]
    many = [0.01 * (1 + number) for number in range(9)]
    crowded = drawn(sweep(beta=many, win_rate=[0.5] * 9, kl=[1.0] * 9), ["beta"])
    assert crowded.axes[0].get_xticks().tolist() != many


def test_without_a_judge_accuracy_is_drawn(drawn):
    frame = REFERENCES[["beta", "kl", "kl/se", "rewards/accuracies"]][:3]
    figure = drawn(frame, ["beta"])
    assert [axis.get_ylabel() for axis in figure.axes] == [ACCURACY, KL, ACCURACY]
    [(across, up, _)] = bars(figure.axes[0]).values()
    assert (across, up) == ([0.01, 0.1, 1.0], [0.1, 0.2, 0.3])
    assert not [line for axis in figure.axes for line in axis.lines if line.get_linestyle() == "--"]


@pytest.mark.parametrize(
    "columns,swept,axis",
    [
        ({"beta": [0.1, 0.2], "lr": [1.0, 2.0], "seed": [0, 1]}, ["beta", "lr", "seed"], "beta"),
        ({"beta": [0.1, 0.1], "lr": [1.0, 2.0], "seed": [0, 1]}, ["lr", "seed"], "lr"),
        ({"beta": [0.1, 0.1], "seed": [0, 1]}, ["seed"], "beta"),
        ({"beta": [0.1, 0.1], "alpha": [0.5, np.nan], "lr": [1.0, 2.0]}, ["alpha", "lr"], "lr"),
        ({"beta": [0.1, 0.1], "packed": [True, False]}, ["packed"], "beta"),
        ({"beta": [0.1, 0.1], "loss": ["dpo", "ipo"]}, ["loss"], "beta"),
    ],
)
def test_which_number_is_the_axis(drawn, columns, swept, axis):
    """beta, or where it is the same another number that is swept and that every run has."""
    figure = drawn({**columns, "win_rate": [0.5, 0.6], "kl": [1.0, 2.0]}, swept)
    assert [one.get_xlabel() for one in figure.axes[:2]] == [axis, axis]
    assert figure.axes[2].get_title(loc="left") == f"Frontier (numbers: {axis})"
