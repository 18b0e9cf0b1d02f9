"""The sweep's figure: what lies on which axis, on what scale, with which bars, and what the legend says of it."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib import rcParams
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from sweeps import saved  # noqa: F401

from dpo import results
from dpo.results import figures

KL, WIN, ACCURACY = (
    "KL to the initial policy (nats per response)",
    "win rate over the initial policy",
    "accuracy on held-out pairs",
)


@pytest.fixture
def drawn(saved, tmp_path):  # noqa: F811
    """`drawn(frame, swept)`: the figure that `dpo.results.figure` saves, and returns."""

    def draw(frame, swept, **how):
        frame = pd.DataFrame(frame)
        frame.attrs["swept"] = swept
        (tmp_path / "kl_strength").mkdir(exist_ok=True)
        returned = results.figure(frame, tmp_path / "kl_strength" / "figure.png", **how)
        written = sorted(path.name for path in (tmp_path / "kl_strength").iterdir())
        assert written == ["figure.pdf", "figure.png"]
        assert returned is saved[-1]
        return returned

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


@pytest.mark.parametrize(
    "baseline, over",
    [
        (["human"] * 5, "what people wrote"),
        (["initial", None, *["initial"] * 3], "the initial policy"),  # None: of a run from when there was no other
        (["runs/strong/policy"] * 5, "the baseline"),
        (["initial", *["human"] * 4], "the baseline"),
    ],
)
def test_whom_a_win_rate_is_over(drawn, baseline, over):
    figure = drawn(REFERENCES.assign(**{"evaluation.baseline": baseline}), ["beta"])
    assert [axis.get_ylabel() for axis in figure.axes] == [f"win rate over {over}", KL, f"win rate over {over}"]


def test_bars_of_single_runs(drawn):
    """95 % intervals: of the win rate as it was measured, of KL from its standard error; both on the frontier."""
    figure = drawn(REFERENCES[REFERENCES["reference"] == "initial"], ["beta"])
    win = [[0.78, 0.83], [0.53, 0.58]]
    kl = [[30 - 0.979982, 30 + 0.979982], [4 - 0.979982, 4 + 0.979982]]
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
            ends = (mean - spread, mean + spread)
            if name == "kl":  # on a logarithmic axis
                ends = (mean / np.e ** (spread / mean), mean * np.e ** (spread / mean))
            assert (low, high) == pytest.approx(ends)
        [dots] = [line for line in axis.lines if line.get_linestyle() == "None" and line.get_alpha()]
        assert (list(dots.get_xdata()), list(dots.get_ydata())) == (frame["beta"].tolist(), frame[name].tolist())
    assert figure.get_suptitle() == "kl_strength, bars: one standard deviation of 3 seeds"
    alone = drawn(frame[frame["seed"] == 0], ["beta"])
    assert not [
        line for axis in alone.axes for line in axis.lines if line.get_linestyle() == "None" and line.get_alpha()
    ]


@pytest.mark.parametrize(
    "betas,seeds,bars",
    [
        ([0.1, 1.0], [0, 1], "95 % interval"),  # a seed each
        ([0.1, 0.1, 1.0], [0, 1, 0], "one standard deviation of 2 seeds, 95 % interval of single runs"),
        ([0.1] * 3 + [1.0] * 2, [0, 1, 2, 0, 1], "one standard deviation of 2 to 3 seeds"),
    ],
)
def test_the_note_on_bars_is_that_of_each_point(drawn, betas, seeds, bars):
    frame = sweep(beta=betas, seed=seeds, win_rate=[0.5 + seed / 10 for seed in seeds], kl=[1.0] * len(seeds))
    assert drawn(frame, ["beta", "seed"]).get_suptitle() == f"kl_strength, bars: {bars}"


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
        ({"beta": [0.1, 0.1], "alpha": [0.5, np.nan]}, ["alpha"], "beta"),
        ({"beta": [0.1, 0.1], "packed": [True, False]}, ["packed"], "beta"),
        ({"beta": [0.1, 0.1], "loss": ["dpo", "ipo"]}, ["loss"], "beta"),
    ],
)
def test_which_number_is_the_axis(drawn, columns, swept, axis):
    """beta, or where it is the same another number that is swept and that every run has."""
    figure = drawn({**columns, "win_rate": [0.5, 0.6], "kl": [1.0, 2.0]}, swept)
    assert [one.get_xlabel() for one in figure.axes[:2]] == [axis, axis]
    assert figure.axes[2].get_title(loc="left") == f"Frontier (numbers: {axis})"


def test_a_number_that_every_run_has_is_the_axis_before_others(drawn):
    frame = {"alpha": [0.5, np.nan, 0.7], "lr": [1.0, 2.0, 1.0], "beta": [0.1] * 3, "win_rate": [0.5, 0.6, 0.7]}
    figure = drawn({**frame, "kl": [1.0, 2.0, 3.0]}, ["alpha", "lr"])
    assert [one.get_xlabel() for one in figure.axes[:2]] == ["lr", "lr"]


def test_bars_on_a_logarithmic_axis_stay_above_0(drawn):
    """As far above as below in the logarithm, on both axes, however wide; short ones are those of a linear axis."""
    frame = sweep(beta=[0.1, 1.0], win_rate=[0.6, 0.7], kl=[20.0, 1.0]).assign(**{"kl/se": [0.1, 3.0]})
    figure = drawn(frame, ["beta"])
    assert (figure.axes[1].get_yscale(), figure.axes[2].get_xscale()) == ("log", "log")
    for axis, side in ((figure.axes[1], "y"), (figure.axes[2], "x")):
        [(across, up, sides)] = bars(axis).values()
        assert (up if side == "y" else across) == [20.0, 1.0]
        short, wide = sides[side]
        assert short == pytest.approx([20 - 0.196, 20 + 0.196], rel=1e-4)
        assert wide == pytest.approx([np.exp(-3 * 1.959964), np.exp(3 * 1.959964)])
    linear = drawn(frame.assign(kl=[9.0, 1.0]), ["beta"])
    [(_, _, sides)] = bars(linear.axes[1]).values()
    assert sides["y"][1] == pytest.approx([1 - 3 * 1.959964, 1 + 3 * 1.959964])


def test_beta_has_an_ordered_scale():
    """Each darker than the one below, whatever the order they come in; other keys have colours that differ in hue."""
    betas = [0.1, 1.0, 0.003, 0.01, 0.3, 0.02]
    found = figures.colours(betas, "beta")
    assert list(found) == betas
    light = [luminance(found[beta]) for beta in sorted(betas)]
    assert all(lighter > darker + 0.01 for lighter, darker in itertools.pairwise(light))
    assert light[0] < 0.75  # seen on white
    assert list(figures.colours(np.array([2, 1, 10]), "beta")) == [2, 1, 10]
    whole = [luminance(one) for one in figures.colours(np.array([2, 1, 10]), "beta").values()]
    assert whole[1] > whole[0] > whole[2]
    assert list(figures.colours(["dpo", "ipo"], "loss").values()) == list(figures.COLOURS[:2])


def luminance(colour):
    """Of sRGB, WCAG 2."""
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return np.dot([0.2126, 0.7152, 0.0722], parts)


def test_where_colour_stands_for_beta(drawn):
    """Of rounds, for each line; of beta alone, for the points of the frontier."""
    frame = sweep(
        round=[1, 2, 1, 2, 1, 2],
        beta=[1.0, 1.0, 0.1, 0.1, 0.5, 0.5],
        win_rate=[0.5, 0.6, 0.7, 0.6, 0.6, 0.9],
        kl=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    )
    rounds = drawn(frame, ["round", "beta"])
    expected = figures.colours([1.0, 0.1, 0.5], "beta")
    drawn_as = {one.get_label(): to_hex(one[0].get_color()) for one in rounds.axes[0].containers}
    assert drawn_as == {f"beta={beta:g}": colour for beta, colour in expected.items()}
    alone = drawn(sweep(beta=[0.1, 0.5, 1.0], win_rate=[0.5, 0.6, 0.7], kl=[3.0, 2.0, 1.0]), ["beta"])
    [points] = alone.axes[2].collections[-1:]
    assert points.get_offsets().tolist() == [[3.0, 0.5], [2.0, 0.6], [1.0, 0.7]]
    assert [to_hex(one) for one in points.get_facecolors()] == [expected[beta] for beta in (0.1, 0.5, 1.0)]


def test_beta_has_its_colour_on_the_frontier_of_several_lines_too(drawn):
    """The line tells what else is swept, and so does the edge of a point."""
    frame = sweep(
        beta=[0.1, 1.0] * 2, loss=["dpo", "dpo", "ipo", "ipo"], win_rate=[0.5, 0.6, 0.7, 0.8], kl=[2, 1, 4, 3]
    )
    points = drawn(frame, ["beta", "loss"]).axes[2].collections
    found = [one for one in points if len(one.get_facecolors()) == 2]
    assert len(found) == 2
    expected = figures.colours([0.1, 1.0], "beta")
    for one, edge in zip(found, figures.COLOURS, strict=False):
        assert [to_hex(colour) for colour in one.get_facecolors()] == [*expected.values()]
        assert {to_hex(colour) for colour in one.get_edgecolors()} == {to_hex(edge)}


@pytest.mark.parametrize("others", [[], ["loss"]])
def test_runs_without_the_number_of_the_axis_are_a_line_across(drawn, others):
    """As those that train all weights beside a sweep of ranks: in their height, and on the frontier in their place."""
    frame = sweep(
        **{"policy.lora.rank": [np.nan, 8.0, 64.0, np.nan, 8.0, 64.0]},
        beta=[0.1] * 6,
        loss=["dpo"] * 3 + ["ipo"] * 3,
        win_rate=[0.7, 0.6, 0.65, 0.9, 0.8, 0.85],
        kl=[4.0, 1.0, 2.0, 8.0, 5.0, 6.0],
    )[: 6 if others else 3]
    figure = drawn(frame, ["policy.lora.rank", *others])
    assert [axis.get_xlabel() for axis in figure.axes[:2]] == ["policy.lora.rank"] * 2
    lines = [("policy.lora.rank=null", 0.7, 4.0)]
    if others:
        lines = [("loss=dpo, policy.lora.rank=null", 0.7, 4.0), ("loss=ipo, policy.lora.rank=null", 0.9, 8.0)]
    for axis, place in zip(figure.axes, (1, 2), strict=False):
        across = [line for line in axis.get_lines() if str(line.get_label()).endswith("null")]
        assert [(line.get_label(), line.get_ydata()[0]) for line in across] == [(one[0], one[place]) for one in lines]
        assert all(np.ptp(line.get_ydata()) == 0 for line in across)
    texts = {text.get_text(): text.xy for text in figure.axes[2].texts}
    assert texts["null"] == (lines[-1][2], lines[-1][1])
    [legend] = figure.legends
    assert {text.get_text() for text in legend.get_texts()} >= {one[0] for one in lines}


def test_an_infinite_number_is_a_line_across(drawn):
    """As max_grad_norm=inf, no clipping: no axis goes so far."""
    frame = sweep(max_grad_norm=[0.5, 1.0, np.inf], beta=[0.1] * 3, win_rate=[0.6, 0.65, 0.7], kl=[1.0, 2.0, 4.0])
    figure = drawn(frame, ["max_grad_norm"])
    for axis, height in zip(figure.axes, (0.7, 4.0), strict=False):
        [across] = [line for line in axis.get_lines() if line.get_label() == "max_grad_norm=inf"]
        assert {*across.get_ydata()} == {height}
        assert axis.get_xlim()[1] < 1.1
    assert {text.get_text(): text.xy for text in figure.axes[2].texts}["inf"] == (4.0, 0.7)


@pytest.mark.parametrize("column", [False, True])
def test_numbers_of_the_frontier_do_not_collide(drawn, column):
    """Eight points that nearly coincide, of two lines: each has its number near it, and no two overlap."""
    frame = sweep(
        beta=[0.1, 0.11, 0.12, 0.13] * 2,
        reference=["a"] * 4 + ["b"] * 4,
        win_rate=[0.7, 0.7, 0.701, 0.702, 0.7005, 0.7, 0.7, 0.7015],
        kl=[5, 5, 5, 5, 5.1, 5, 5, 5],
    )
    figure = drawn(frame, ["beta", "reference"], column=column)
    labels = figure.axes[2].texts
    assert sorted(text.get_text() for text in labels) == sorted(["0.1", "0.11", "0.12", "0.13"] * 2)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in labels]
    assert not [pair for pair in itertools.combinations(range(8), 2) if boxes[pair[0]].overlaps(boxes[pair[1]])]
    for text, box in zip(labels, boxes, strict=True):
        point = figure.axes[2].transData.transform(text.xy)
        beyond = np.maximum(0, np.maximum(np.array(box.min) - point, point - np.array(box.max)))
        assert np.hypot(*beyond) * 72 / figure.dpi < 40  # points


def test_the_column_of_a_paper(drawn):
    """3.25 inches wide, panels below each other, and no type above 7 points, in the ticks either."""
    figure = drawn(REFERENCES, ["beta", "reference", "alpha"], column=True)
    assert figure.get_size_inches()[0] == 3.25
    figure.draw_without_rendering()
    lefts = [axis.get_position().x0 for axis in figure.axes]
    tops = [axis.get_position().y1 for axis in figure.axes]
    assert max(lefts) - min(lefts) < 0.1
    assert tops == sorted(tops, reverse=True)
    assert {text.get_fontsize() for text in figure.findobj(Text) if text.get_text()} == {7.0}
    assert drawn(REFERENCES, ["beta", "reference", "alpha"]).get_size_inches().tolist() == [13, 4.2]


def test_a_figure_is_saved_as_png_and_pdf_with_its_fonts(tmp_path):
    figure = Figure(figsize=(1, 1))
    figure.text(0.1, 0.5, "beta")
    written = figures.save(figure, tmp_path / "one.png")
    assert written == [tmp_path / "one.png", tmp_path / "one.pdf"]
    assert sorted(tmp_path.iterdir()) == sorted(written)
    assert written[0].read_bytes().startswith(b"\x89PNG")
    content = written[1].read_bytes()
    assert content.startswith(b"%PDF")
    assert b"/Subtype /TrueType" in content or b"/CIDFontType2" in content
    assert b"/Type3" not in content
    assert b"CreationDate" not in content  # drawn again it is the same bytes
    assert rcParams["pdf.fonttype"] == 3  # of whoever imports this
