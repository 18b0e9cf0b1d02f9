"""Which objective is best? Each at its best beta against DPO, and both on the frontier of win rate against KL.

    python -m analysis.objectives runs/objectives

prints the tables and the findings, and writes them, the figures and the numbers of each run beside the runs.

A beta that the same runs choose and compare has been lucky. Seeds that ran the `CHOSEN` best betas of each objective,
where others ran its grid, had no part in that choice: where there are such, they alone compare. They may run all of
DPO's grid, since its own choice is a part of every comparison.
"""

from itertools import cycle
from math import isfinite, nan
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import seeds
from analysis.published import OBJECTIVES
from analysis.report import Frames, main
from dpo.results import beaten, degenerate, short
from dpo.results.figures import COLOURS, plain, tidy

KEYS = ("loss", "beta", "seed")
DPO = "dpo"
FAMILIES = {  # a panel of the frontier each
    "DPO's margin in another loss": ("cdpo", "robust", "hinge", "exo", "f_dpo", "chi_po", "wpo", "tdpo"),
    "a target, or each response by itself": (
        *("ipo", "sppo", "cal_dpo", "apo_zero", "apo_down", "nca", "bco", "kto", "kto_paired"),
    ),
    "lengths count": ("simpo", "alpha_dpo", "length_normalized", "r_dpo", "ld_dpo"),
    "likelihood of the chosen response": ("rpo", "dpop", "cpo", "slic", "orpo"),
    "all pairs of a step": (
        *("beta_dpo", "beta_ipo", "beta_kto", "beta_simpo", "dr_dpo", "dr_ipo", "aot", "aot_unpaired"),
    ),
}
CHOSEN = 2  # betas of each objective that other seeds run: three seeds that choose one often miss the best
SAID = {"supports": "better", "refutes": "worse"}  # of the claim that an objective is better than DPO


def read(path: str | Path, **only: str) -> Frames:
    """The finished runs of a sweep by `table=objectives`. only: values of keys.

    Raises: ValueError as `seeds.finished`, or if no run is of DPO, which all are compared with.
    """
    final = seeds.finished(path, KEYS, only)
    if DPO not in set(seeds.trained(final)["loss"]):
        raise ValueError(f"{path} must hold runs of loss={DPO}, which all are compared with, found none: run them")
    return {"runs": final}


def of_losses(final: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The trained runs of each objective, DPO first."""
    found = {str(loss): same for loss, same in seeds.trained(final).groupby("loss")}
    return {DPO: found.pop(DPO)} | found


def fresh(final: pd.DataFrame) -> set[int]:
    """The seeds that ran fewer betas of each objective but DPO than others: those compare, these choose."""
    trained = seeds.trained(final)
    others = trained[trained["loss"] != DPO]
    betas = others.groupby(["seed", "loss"])["beta"].nunique().groupby("seed").max()
    return {*betas.index[betas < betas.max()]}


def comparing(final: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The runs of each objective that compare, DPO first: all, or where some seeds are `fresh`, theirs: all of DPO, and
    of the others those at the betas that are best on the seeds that choose.
    """
    losses, new, found = of_losses(final), fresh(final), {}
    for loss, same in losses.items():
        compares = same["seed"].isin(new)
        best = same[~compares].groupby("beta")["score"].mean().nlargest(CHOSEN)
        found[loss] = same[compares & ((loss == DPO) | same["beta"].isin(best.index))]
    return found if new else losses


def minus_dpo(runs: dict[str, pd.DataFrame], loss: str, looks: int = 1) -> seeds.Interval:
    """Score of an objective at its best beta minus that of DPO at its own, seed by seed, of the runs that compare: an
    interval that holds whichever betas are the best (`seeds.best_minus_best`).
    """
    return seeds.best_minus_best(runs[loss], runs[DPO], looks=looks)


def chosen_by_others(same: pd.DataFrame) -> pd.Series:
    """Score of each seed at the beta that is best on the mean of all other seeds, which its own luck did not choose."""
    scores = seeds.wide(same, "beta", "score")
    if len(scores) < 2:
        return pd.Series(nan, scores.index)
    return pd.Series({seed: scores.loc[seed, scores.drop(seed).mean().idxmax()] for seed in scores.index})


def at_equal_kl(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Score of `one` minus that of `other` on each seed, the mean over the logarithms of KL that both reach.

    A curve goes through the betas of a seed in the order of their KL, so no beta is chosen. NaN where they share no KL.
    """
    rows = []
    for seed in sorted({*one["seed"]} & {*other["seed"]}):
        curves = []
        for side in (one, other):
            points = side[(side["seed"] == seed) & (side["kl"] > 0)].sort_values("kl")
            curves.append((np.log(points["kl"].to_numpy(float)), points["score"].to_numpy(float)))
        difference = nan
        if all(len(kl) for kl, _ in curves):
            low, high = max(kl[0] for kl, _ in curves), min(kl[-1] for kl, _ in curves)
            if low < high:
                shared = np.linspace(low, high, 101)
                mine, theirs = (np.interp(shared, kl, score) for kl, score in curves)
                difference = float(np.trapezoid(mine - theirs, shared) / (high - low))
        rows.append({"seed": seed, "score": difference})
    return pd.DataFrame(rows, columns=["seed", "score"])


def said(found: seeds.Interval, margin: float) -> str:
    """better | worse | equivalent | undecided: whether an objective is better than DPO."""
    decided = seeds.verdict(found, 0.0, margin)
    return SAID.get(decided, decided)


def needed(found: seeds.Interval, margin: float) -> str:
    """The seeds that a verdict takes, if mean and spread stay what they are."""
    number = seeds.seeds_to_decide(found, 0.0, margin)
    return str(number) if number else f"above {seeds.MOST_SEEDS}" if isfinite(found.half) else ""


def comparison(final: pd.DataFrame) -> pd.DataFrame:
    """A row per objective: its best beta, and its score there minus that of DPO at its own (`minus_dpo`).

    Intervals hold at 95 % for each objective; "all" is the verdict of intervals that hold for all objectives together
    (Bonferroni). "beta by other seeds", where none is `fresh`, is the difference with betas that no seed chooses for
    itself: a mean without luck, of which an interval would be too narrow. What else is measured is at the best beta.
    """
    losses, margin, new, rows = of_losses(final), seeds.margin(final), fresh(final), {}
    runs = comparing(final)
    dpo, measured = losses[DPO], "kl" in final and final["kl"].notna().any()
    for loss, same in losses.items():
        top, betas = seeds.at_best(runs[loss]), sorted(same["beta"].unique())
        best = top["beta"].iloc[0] if len(top) else nan
        end = len(betas) > 1 and best in (betas[0], betas[-1])
        broken = f"{int(degenerate(same).sum())} of {len(same)}"
        row = {"beta": short(best) + (", the end of its grid" if end else "")}
        row |= {"score": seeds.cell(top, "score", found=seeds.best(runs[loss]))}
        if loss != DPO:
            found, together = (minus_dpo(runs, loss, looks) for looks in (1, len(losses) - 1))
            by_others = nan if new else (chosen_by_others(same) - chosen_by_others(dpo)).mean()
            row |= {"minus DPO": str(found), "verdict": said(found, margin), "seeds for it": needed(found, margin)}
            row |= {"all": said(together, margin)}
            if not new:
                row |= {"beta by other seeds": "" if np.isnan(by_others) else f"{by_others:.3f}"}
            if measured:
                level = seeds.interval(at_equal_kl(same, dpo)["score"])
                row |= {"minus DPO at equal KL": str(level), "verdict at equal KL": said(level, margin)}
                row |= {"seeds for that": needed(level, margin)}
        row |= {"degenerate runs": broken, "at the best beta": f"{int(degenerate(top).sum())} of {len(top)}"}
        rows[loss] = row | {title: seeds.cell(top, value, form) for title, (value, form) in seeds.MEASURES.items()}
    table = pd.DataFrame.from_dict(rows, orient="index").fillna("").rename_axis("objective")
    return table.reindex(columns=[*max(rows.values(), key=len)])  # DPO's own row lacks some


def claims(final: pd.DataFrame) -> pd.DataFrame:
    """What is published of objectives against DPO, where they lie further apart than two equivalent settings."""
    runs, margin, found = comparing(final), seeds.margin(final), []
    far = OBJECTIVES["minus DPO"].abs() > seeds.SCORES["alpaca_eval/length_controlled"][2]
    for loss, published in OBJECTIVES[far].iterrows():
        more, told = published["minus DPO"] > 0, f"{published['minus DPO']:+.1f}: {published['measured']}"
        claim = f"{loss} is {'better' if more else 'worse'} than DPO, each at its best beta (published {told})"
        if loss not in runs:
            found.append(seeds.unmeasured(claim, f"it takes runs of loss={loss}"))
            continue
        above = minus_dpo(runs, str(loss))
        what = f"best score of {loss} minus that of DPO" if more else f"best score of DPO minus that of {loss}"
        found.append(seeds.holds(claim, what, above if more else -above, margin=margin))
    return seeds.findings(found)


def differences(final: pd.DataFrame) -> Figure:
    """`minus_dpo` of each objective with its interval, in order; grey where it counts as equivalent to DPO."""
    margin = seeds.margin(final)
    runs = comparing(final)
    found = {loss: minus_dpo(runs, loss) for loss in runs if loss != DPO}
    order = sorted((loss for loss in found if isfinite(found[loss].half)), key=lambda loss: found[loss].mean)
    drawing = Figure(figsize=(6.5, 1.2 + 0.22 * len(order)), layout="constrained", dpi=150)
    axis = drawing.subplots()
    tidy(axis, "Each objective at its best beta", "score minus that of DPO at its own", "")
    axis.axvspan(-margin, margin, color="0.92", zorder=0)
    axis.axvline(0, color="0.5", lw=1, ls="--", zorder=1)
    for place, loss in enumerate(order):
        one = found[loss]
        colour = COLOURS[0] if said(one, margin) in SAID.values() else "0.4"
        sides = [[one.mean - one.low], [one.high - one.mean]]
        axis.errorbar(one.mean, place, xerr=sides, fmt="o", color=colour, ms=4, lw=1.4)
    axis.set_yticks(range(len(order)), order)
    return drawing


def frontier(final: pd.DataFrame) -> Figure:
    """Win rate against KL: a curve through the means of each objective, a panel per family, each with DPO.

    Of the seeds that ran the grids: a mean of other seeds at one beta would put a kink into its curve.
    """
    losses = of_losses(final[~final["seed"].isin(fresh(final))])
    known = {loss for family in FAMILIES.values() for loss in family}
    panels = FAMILIES | {"other objectives": tuple(loss for loss in losses if loss not in {*known, DPO})}
    shown = {title: [one for one in family if one in losses] for title, family in panels.items()}
    shown = {title: family for title, family in shown.items() if family} or {"": []}
    rows = -(-len(shown) // 3)
    drawing = Figure(figsize=(14, 4.6 * rows), layout="constrained", dpi=150)
    axes = drawing.subplots(rows, min(3, len(shown)), sharex=True, sharey=True, squeeze=False).ravel()
    for axis, (title, family) in zip(axes, shown.items(), strict=False):
        tidy(axis, title, "KL to the initial policy (nats per response)", f"win rate over {beaten(final)}")
        axis.set_xscale("log")
        plain(axis.xaxis)
        axis.tick_params(labelbottom=True, labelleft=True)
        axis.axhline(0.5, color="0.5", lw=1, ls="--", zorder=0)
        for colour, loss in zip(cycle(COLOURS), family, strict=False):
            curve(axis, losses[loss], loss, color=colour, lw=1.2, ms=4)
        curve(axis, losses[DPO], "DPO", color="black", lw=2.6, ms=6, zorder=5)
        axis.legend(frameon=False, fontsize=8)
    for axis in axes[len(shown) :]:
        axis.remove()
    return drawing


def curve(axis: Axes, same: pd.DataFrame, label: str, value: str = "win_rate", **style: object) -> None:
    """Mean `value` against mean KL at each beta, in the order of betas; crosses where most runs are degenerate."""
    of_beta = same.assign(broken_run=degenerate(same)).groupby("beta")
    means = of_beta[["kl", value]].mean()
    axis.plot(means["kl"], means[value], marker="o", label=label, **style)  # type: ignore[arg-type]
    fallen = means[of_beta["broken_run"].mean() > 0.5]
    axis.plot(fallen["kl"], fallen[value], "x", color="red", ms=9, zorder=6)


def study(frames: Frames) -> tuple[dict[str, pd.DataFrame], dict[str, Figure]]:
    """Tables and figures of what `read` has read, by name."""
    final = frames["runs"]
    trained = seeds.trained(final)
    tables = {"objectives": comparison(final), "claims": claims(final)}
    tables |= {"measures": seeds.measures(trained, ["loss", "beta"])}
    drawn = {"kl", "win_rate"} <= set(trained.dropna(axis="columns", how="all"))
    return tables, {"differences": differences(final)} | ({"frontier": frontier(final)} if drawn else {})


if __name__ == "__main__":
    main(__doc__, read, study)
