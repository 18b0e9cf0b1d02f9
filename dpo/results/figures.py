"""The figure over the finished runs of a sweep."""

import math
import os
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from dpo.results.frames import short

COLOURS = ("#2a6f97", "#d1495b", "#e09f3e", "#3c8d53", "#7b5ea7", "#8c6d46", "#5f6b76", "#d16ba5")


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Win rate and KL against beta, and one against the other, a colour for each setting of the other keys.

    Seeds are averaged: dots are single runs, bars one standard deviation between seeds. Without seeds, bars
    are the 95 % interval of the measurement. Without a judge, held-out accuracy replaces the win rate.

    Best of n has its bound of KL where others have their KL. Beside runs of `dpo.train` it is on the frontier alone.
    """
    if "kl_bound" in frame:
        frame = frame.assign(kl=frame.get("kl", frame["kl_bound"]).fillna(frame["kl_bound"]))
    frame, best = _trained(frame)
    swept = frame.attrs["swept"]
    x, y = _axis(frame), "win_rate" if "win_rate" in frame else "rewards/accuracies"
    frame = frame.assign(**{x: pd.to_numeric(frame[x], errors="coerce")})  # what is no number has no place on an axis
    labels = {
        x: x,
        "kl": "KL to the initial policy (nats per response)",
        "win_rate": "win rate over the initial policy",
        "rewards/accuracies": "accuracy on held-out pairs",
    }
    panels = (("Quality", x, y), ("Distance", x, "kl"), (f"Frontier (numbers: {x})", "kl", y))
    drawing = Figure(figsize=(13, 4.2), layout="constrained", dpi=150)
    axes = drawing.subplots(1, 3)
    for axis, (title, across, up) in zip(axes, panels, strict=True):
        shown = frame if best is None or across == x else pd.concat([frame, best])
        tidy(axis, title, labels[across], labels[up])
        _scale(axis, "x", shown.get(across), log=across == x != "round")
        _scale(axis, "y", frame.get(up), log=False)
        if up == "win_rate":
            axis.axhline(0.5, color="0.5", lw=1, ls="--", zorder=0)

    others = [key for key in swept if key not in (x, "seed")]
    groups = list(frame.groupby(others, dropna=False, sort=False)) if others else [((), frame)]
    for index, (values, rows) in enumerate(groups):
        style: dict[str, Any] = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": "osD^v"[index // len(COLOURS) % 5],
        }
        label = ", ".join(f"{key}={short(value)}" for key, value in zip(others, values, strict=True))
        quality, distance = _points(rows, x, y), _points(rows, x, "kl")
        for axis, name, points in ((axes[0], y, quality), (axes[1], "kl", distance)):
            _curve(axis, points.index, points, label=label, **style)
            if name in rows and len(rows) > len(points):
                axis.plot(rows[x], rows[name], "o", color=style["color"], alpha=0.3, ms=3.5, mec="none")
        _curve(axes[2], distance["mean"], quality, across=distance, **style)
        _named(axes[2], distance, quality, style["color"])

    if best is not None and y == "win_rate":
        quality, distance = _points(best, "best_of", "win_rate"), _points(best, "best_of", "kl")
        _curve(
            axes[2], distance["mean"], quality, color="0.3", marker="*", ls=":", label="best of n, at its bound of KL"
        )
        _named(axes[2], distance, quality, "0.3")
        axes[2].legend(loc="best", frameon=False, fontsize=8)
    _ticks(axes[:2], frame[x])
    if others:
        handles = axes[0].get_legend_handles_labels()
        drawing.legend(*handles, loc="outside lower center", ncols=min(len(groups), 4), frameon=False)
    seeds = frame["seed"].nunique() if "seed" in swept else 1
    bars = "95 % interval" if seeds == 1 else f"one standard deviation of {seeds} seeds"
    drawing.suptitle(f"{path.parent.name}, bars: {bars}", x=0.005, ha="left", fontsize=9, color="0.35")
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    drawing.savefig(unfinished, format="png")
    unfinished.replace(path)


def _trained(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Runs of `dpo.train`, and best of n beside them; where none of the folder trained, all of them and none."""
    number = pd.to_numeric(frame.get("best_of", pd.Series(None, frame.index)), errors="coerce")
    if number.isna().all() or number.notna().all():
        return frame, None
    trained = frame[number.isna()].dropna(axis="columns", how="all")
    trained.attrs["swept"] = [key for key in frame.attrs["swept"] if key in trained]
    return trained, frame[number > 1].assign(best_of=number)


def _named(axis: Any, across: pd.DataFrame, up: pd.DataFrame, color: str) -> None:
    """Each point by its number."""
    for value, *where in zip(up.index, across["mean"], up["mean"], strict=True):
        if not any(map(math.isnan, where)):
            near = {"xytext": (4, 5), "textcoords": "offset points"}
            axis.annotate(f"{value:g}", where, color=color, fontsize=7, **near)


def tidy(axis: Any, title: str, across: str, up: str) -> None:
    """Titles and a quiet grid."""
    axis.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axis.set(xlabel=across, ylabel=up)
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _axis(frame: pd.DataFrame) -> str:
    """The round, or beta, or if it is the same everywhere another number that is swept, and that every run has."""
    types = pd.api.types
    numeric = [
        key
        for key in frame.attrs["swept"]
        if key != "seed" and types.is_numeric_dtype(frame[key]) and not types.is_bool_dtype(frame[key])
    ]
    whole = [key for key in numeric if frame[key].notna().all()]
    if "round" in numeric:
        return "round"
    return "beta" if "beta" in numeric or not whole else whole[0]


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
            half = 1.96 * row.get(f"{name}/se", 0.0)
            low, high = row.get(f"{name}/low", mean - half), row.get(f"{name}/high", mean + half)
        points[value] = (mean, low, high)
    return pd.DataFrame.from_dict(points, orient="index", dtype=float, columns=["mean", "low", "high"])


def _curve(axis: Any, x: Any, points: pd.DataFrame, across: pd.DataFrame | None = None, **style: Any) -> None:
    def bars(ends: pd.DataFrame) -> list[Any]:
        return [
            (ends["mean"] - ends["low"]).clip(0).fillna(0),
            (ends["high"] - ends["mean"]).clip(0).fillna(0),
        ]

    sideways = None if across is None else bars(across)
    axis.errorbar(x, points["mean"], bars(points), sideways, lw=1.6, ms=5, elinewidth=1, capsize=2, **style)


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
    for axis in axes if 1 < len(distinct) <= 8 else ():
        # By hand: where all points but one lack a height, it depends on the processor whether Matplotlib finds a range.
        scale = axis.xaxis.get_transform()
        first, last = scale.transform([distinct[0], distinct[-1]])
        margin = 0.05 * (last - first)
        axis.autoscale(enable=False, axis="x")
        axis.set_xlim(scale.inverted().transform([first - margin, last + margin]))
        axis.set_xticks(distinct, [f"{value:g}" for value in distinct])
        axis.tick_params(axis="x", which="minor", bottom=False)
