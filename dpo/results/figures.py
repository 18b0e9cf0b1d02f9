"""The figure over the finished runs of a sweep, and what the figures of the studies share."""

import math
import os
from collections.abc import Iterable
from itertools import cycle
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text

from dpo.results.frames import beaten, horizontal, short, trained, undrawable
from dpo.win_rates import Z

COLOURS = ("#2a6f97", "#d1495b", "#e09f3e", "#3c8d53", "#7b5ea7", "#8c6d46", "#5f6b76", "#d16ba5")
COLUMN, SMALL = 3.25, 7.0  # inches and points: a column of a paper with two, and type in it
PLACES = [(side * (4 + far), height * (5 + far)) for far in (0, 6, 12, 20) for height in (1, -2) for side in (1, -1)]
FONTS: Any = {"pdf.fonttype": 42, "ps.fonttype": 42}  # whole fonts in the file, which conferences ask for


def draw(frame: pd.DataFrame, path: Path, column: bool = False) -> Figure:
    """Win rate and KL against beta, and one against the other, a colour for each setting of the other keys. Returns
    what is written, for who would change it.

    Seeds are averaged: dots are single runs, bars one standard deviation between seeds. Without seeds, bars
    are the 95 % interval of the measurement. On a logarithmic axis they are mean * exp(+- bar / mean), which is above 0
    and nearly the same where it is short. Without a judge, held-out accuracy replaces the win rate.

    Best of n has its bound of KL where others have their KL. Beside runs of `dpo.train` it is on the frontier alone.

    column: panels below each other in the width of a paper's column, in its size of type.

    Raises: ValueError if there is nothing to draw.
    """
    if lacks := undrawable(frame):
        must = "a figure must have a win rate or an accuracy of finished runs over a number"
        raise ValueError(f"{must}, found no {lacks}; dpo.results.table shows what they have")
    size: Any = {"font.size": SMALL} if column else {}
    with rc_context(size):
        save(drawing := _drawn(frame, path.parent.name, column), path)
    return drawing


def _drawn(frame: pd.DataFrame, folder: str, column: bool) -> Figure:
    bounded = "kl_bound" in frame and "kl" not in frame
    if "kl_bound" in frame:
        frame = frame.assign(kl=frame.get("kl", frame["kl_bound"]).fillna(frame["kl_bound"]))
    frame, best = trained(frame)
    swept = frame.attrs["swept"]
    x, y = str(horizontal(frame)), "win_rate" if "win_rate" in frame else "rewards/accuracies"
    numbers = pd.to_numeric(frame[x], errors="coerce")
    beyond = "inf" if np.isinf(numbers).any() else "null"
    frame = frame.assign(**{x: numbers.where(np.isfinite(numbers))})  # what is no number has no place on an axis
    labels = {
        x: x,
        "kl": f"{'bound of the ' * bounded}KL to the initial policy (nats per response)",
        "win_rate": f"win rate over {beaten(frame)}",
        "rewards/accuracies": "accuracy on held-out pairs",
    }
    panels = (("Quality", x, y), ("Distance", x, "kl"), (f"Frontier (numbers: {x})", "kl", y))
    drawing = Figure(figsize=(COLUMN, 6.9) if column else (13, 4.2), layout="constrained", dpi=300 if column else 150)
    axes = drawing.subplots(*((3, 1) if column else (1, 3)))
    for axis, (title, across, up) in zip(axes, panels, strict=True):
        shown = frame if best is None or across == x else pd.concat([frame, best])
        tidy(axis, title, labels[across], labels[up])
        _scale(axis, "x", shown.get(across), log=across == x != "round")
        _scale(axis, "y", frame.get(up), log=False)
        if up == "win_rate":
            axis.axhline(0.5, color="0.5", lw=1, ls="--", zorder=0)

    others = [key for key in swept if key not in (x, "seed")]
    groups = list(frame.groupby(others, dropna=False, sort=False)) if others else [((), frame)]
    of_beta = colours(frame.get("beta", pd.Series(dtype=float)).unique(), "beta")
    ordered = of_beta if others == ["beta"] else {}
    named: list[Any] = []
    for index, (values, rows) in enumerate(groups):
        style: dict[str, Any] = {
            "color": ordered.get(values[0], "0.5") if ordered else COLOURS[index % len(COLOURS)],
            "marker": "osD^v"[0 if ordered else index // len(COLOURS) % 5],
        }
        label = ", ".join(f"{key}={short(value)}" for key, value in zip(others, values, strict=True))
        quality, distance = _points(rows, x, y), _points(rows, x, "kl")
        for axis, name, points in ((axes[0], y, quality), (axes[1], "kl", distance)):
            _curve(axis, points.index, points, label=label, **style)
            if name in rows and len(rows) > len(points):
                axis.plot(rows[x], rows[name], "o", color=style["color"], alpha=0.3, ms=3.5, mec="none")
        _curve(axes[2], distance["mean"], quality, across=distance, **style)
        named += _named(axes[2], distance, quality, style["color"])
        if x == "beta" and not quality.empty:
            edge = style["color"] if others else "none"
            axes[2].scatter(
                distance["mean"], quality["mean"], c=[of_beta[beta] for beta in quality.index], ec=edge, s=30, zorder=3
            )
        bare = rows[rows[x].isna()]  # as runs that train all weights have no rank
        for axis, name in ((axes[0], y), (axes[1], "kl")):
            if name in bare and bare[name].notna().any():
                said = ", ".join(filter(None, (label, f"{x}={beyond}")))
                axis.axhline(bare[name].mean(), color=style["color"], lw=1.2, ls=":", label=said)
        if not bare.empty:
            far, good = (pd.DataFrame({"mean": [bare.get(name, bare[x]).mean()]}, [beyond]) for name in ("kl", y))
            axes[2].plot(far, good, style["marker"], color=style["color"], mfc="white", ms=5)
            named += _named(axes[2], far, good, style["color"])

    if best is not None and y == "win_rate":
        quality, distance = _points(best, "best_of", "win_rate"), _points(best, "best_of", "kl")
        _curve(
            axes[2], distance["mean"], quality, color="0.3", marker="*", ls=":", label="best of n, at its bound of KL"
        )
        named += _named(axes[2], distance, quality, "0.3")
        axes[2].legend(loc="best", frameon=False, fontsize=8)
    _ticks(axes[:2], frame[x])
    handles, labels = axes[0].get_legend_handles_labels()
    if labels:
        below: Any = {"loc": "outside lower center", "ncols": 1 if column else min(len(labels), 4), "frameon": False}
        drawing.legend(handles, labels, **below)
    drawing.suptitle(f"{folder}, bars: {_bars(frame, [x, *others])}", x=0.005, ha="left", fontsize=9, color="0.35")
    for text in drawing.findobj(Text) if column else ():
        text.set_fontsize(min(text.get_fontsize(), SMALL))
    apart(drawing, named)
    return drawing


def _bars(frame: pd.DataFrame, keys: list[str]) -> str:
    """What the bars are: of each point by how many runs it has."""
    runs = frame.groupby(keys, dropna=False, sort=False).size()
    if runs.max() == 1:
        return "95 % interval"
    several = sorted({*runs[runs > 1]})
    of = f"{several[0]} to {several[-1]}" if len(several) > 1 else f"{several[0]}"
    return f"one standard deviation of {of} seeds{', 95 % interval of single runs' * int(runs.min() == 1)}"


def save(drawing: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG and as PDF, whose fonts are embedded; each whole. path: of either."""
    written = [path.with_suffix(f".{kind}") for kind in ("png", "pdf")]
    for file in written:
        unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
        with rc_context(FONTS):
            undated = {"CreationDate": None} if file.suffix == ".pdf" else {}  # the same figure is the same bytes
            drawing.savefig(unfinished, format=file.suffix[1:], metadata=undated)
        unfinished.replace(file)
    return written


def colours(values: Iterable[Any], key: str) -> dict[Any, str]:
    """A colour for each value of a key: of betas (key "beta") in their order from light to dark, on a scale that
    colour-blind people read and that prints in grey; of others from those that are told apart.
    """
    values = list(values)
    if key != "beta":
        return dict(zip(values, cycle(COLOURS), strict=False))
    scale, ordered = colormaps["viridis_r"], sorted(values, key=_as_number)
    places = np.linspace(0.12, 1, len(ordered)) if len(ordered) != 1 else [0.6]  # lighter ones are lost on white
    found = {value: to_hex(scale(place)) for value, place in zip(ordered, places, strict=True)}
    return {value: found[value] for value in values}


def _as_number(value: Any) -> float:
    return float(value) if isinstance(value, Real) else math.inf


def _named(axis: Any, across: pd.DataFrame, up: pd.DataFrame, color: str) -> list[Any]:
    """Each point by its number."""
    found = []
    for value, *where in zip(up.index, across["mean"], up["mean"], strict=True):
        if not any(map(math.isnan, where)):
            near: Any = {"xytext": (4, 5), "textcoords": "offset points"}
            near["path_effects"] = [withStroke(linewidth=2, foreground="white")]  # above lines
            found.append(axis.annotate(short(value), where, color=color, fontsize=7, **near))
    return found


def apart(drawing: Figure, labels: list[Any]) -> None:
    """Move each label to the first of `PLACES` about its point where it covers neither one before it nor another's
    point; where there is none it stays the farthest away.
    """
    if not labels:
        return
    drawing.draw_without_rendering()  # which places the axes
    points = [label.axes.transData.transform(label.xy) for label in labels]
    taken: list[Any] = []
    for number, label in enumerate(labels):
        others = [point for other, point in enumerate(points) if other != number]
        for offset in PLACES:
            label.set(position=offset, horizontalalignment="left" if offset[0] > 0 else "right")
            box = label.get_window_extent().padded(1)
            if not any(box.overlaps(one) for one in taken) and not any(box.contains(*point) for point in others):
                break
        taken.append(box)


def tidy(axis: Any, title: str, across: str, up: str) -> None:
    """Titles and a quiet grid."""
    axis.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axis.set(xlabel=across, ylabel=up)
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _points(rows: pd.DataFrame, x: str, name: str) -> pd.DataFrame:
    """Mean and the ends of its bar at each x."""
    points = {}
    for value, group in rows.groupby(x):
        if name not in group:
            mean = low = high = float("nan")
        elif len(group) > 1:
            mean = group[name].mean()
            low, high = mean - group[name].std(), mean + group[name].std()
        else:
            row = group.iloc[0]
            mean = row[name]
            half = Z * row.get(f"{name}/se", 0.0)
            low, high = row.get(f"{name}/low", mean - half), row.get(f"{name}/high", mean + half)
        points[value] = (mean, low, high)
    return pd.DataFrame.from_dict(points, orient="index", dtype=float, columns=["mean", "low", "high"])


def _curve(axis: Any, x: Any, points: pd.DataFrame, across: pd.DataFrame | None = None, **style: Any) -> None:
    def bars(ends: pd.DataFrame, scale: str) -> list[Any]:
        mean = ends["mean"]
        below = (mean - ends["low"]).clip(0).fillna(0)
        above = (ends["high"] - mean).clip(0).fillna(0)
        if scale == "log":
            below, above = mean * -np.expm1(-below / mean), mean * np.expm1(above / mean)
        return [below, above]

    sideways = None if across is None else bars(across, axis.get_xscale())
    axis.errorbar(
        x, points["mean"], bars(points, axis.get_yscale()), sideways, lw=1.6, ms=5, elinewidth=1, capsize=2, **style
    )


def _scale(axes: Any, which: str, values: pd.Series | None, log: bool) -> None:
    """Logarithmic where asked or where values spread over a factor of 10, if all are above 0."""
    if values is None or values.nunique() < 2 or not (values.dropna() > 0).all():
        return
    if log or values.max() > 10 * values.min():
        axes.set(**{f"{which}scale": "log"})
        plain(getattr(axes, f"{which}axis"))


def plain(axis: Any) -> None:
    """Numbers of a logarithmic axis as a reader writes them."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def _ticks(axes: Any, values: pd.Series) -> None:
    """The values that were run, where there are few."""
    distinct = sorted(values.dropna().unique())
    for axis in axes if 1 <= len(distinct) <= 8 else ():
        # By hand: where all points but one lack a height, it depends on the processor whether Matplotlib finds a range.
        scale = axis.xaxis.get_transform()
        first, last = scale.transform([distinct[0], distinct[-1]])
        margin = 0.05 * (last - first) or abs(first) or 1.0  # of a single value: from 0 to twice it
        axis.autoscale(enable=False, axis="x")
        axis.set_xlim(scale.inverted().transform([first - margin, last + margin]))
        axis.set_xticks(distinct, [f"{value:g}" for value in distinct])
        axis.tick_params(axis="x", which="minor", bottom=False)
