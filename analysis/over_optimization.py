"""What does the KL constraint protect from? Policies tuned by a judge that can be exploited, measured by the one meant.

    python -m analysis.over_optimization runs/over_optimization runs/over_optimization_proxy

prints the tables and the findings, and writes them, the figure and the numbers of each run beside the runs. The second
folder holds evaluations of the first one's policies by the proxy.
"""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis import seeds
from analysis.objectives import curve
from analysis.report import Frames, main
from dpo.results import beaten, degenerate, short
from dpo.results.figures import COLOURS, plain, tidy

KEYS = ("judge", "beta", "seed")
PROXY, GOLD = "hasty", "gold"  # judges of the pairs
JUDGES = {"score": "judged by gold", "proxy": "judged by the proxy"}
PAIRS = {PROXY: "pairs by the proxy", GOLD: "pairs by gold"}
UNSEEN = {"policy accuracy", "ended"}  # of the measures


def read(path: str | Path, proxy: str | Path, **only: str) -> Frames:
    """The finished runs of a sweep by `figure=over_optimization`, `proxy` the win rate of each by the proxy.

    proxy: the folder of their evaluations by it. only: values of keys.

    Raises: ValueError as `seeds.finished`, or if a run has no such evaluation.
    """
    final = seeds.finished(path, KEYS, only)
    measured = seeds.finished(
        proxy, ("seed", "policy.path"), {}, shown=["evaluation.judge", "judge"], scores=["win_rate"]
    )
    of_run = dict(zip(measured["policy.path"].map(lambda at: Path(at).parent.name), measured["win_rate"], strict=True))
    lacking = sorted({*final["run"]} - {*of_run})
    if lacking:
        raise ValueError(
            f"{proxy} must hold an evaluation of every run in {path}, found none of {', '.join(lacking[:3])}"
            f"{' and others' if len(lacking) > 3 else ''}: run the second"
            " command of experiments/figure/over_optimization.yaml"
        )
    return {"runs": final.assign(proxy=final["run"].map(of_run))}


def of_pairs(final: pd.DataFrame, judge: str) -> pd.DataFrame:
    return seeds.trained(final[final["judge"] == judge])


def table(final: pd.DataFrame) -> pd.DataFrame:
    """A row per judge of the pairs and beta, from the largest down: win rates by both judges, and other measures."""
    rows = {}
    shown = {title: one for title, one in seeds.MEASURES.items() if title not in UNSEEN}
    for judge, title in PAIRS.items():
        for beta, same in sorted(of_pairs(final, judge).groupby("beta"), reverse=True):
            row = {named: seeds.cell(same, judged) for judged, named in JUDGES.items()}
            row["proxy minus gold"] = seeds.cell(same.assign(apart=same["proxy"] - same["score"]), "apart")
            row |= {name: seeds.cell(same, value, form) for name, (value, form) in shown.items()}
            rows[title, short(beta)] = row | {"degenerate": f"{int(degenerate(same).sum())} of {len(same)}"}
    found = pd.DataFrame.from_dict(rows, orient="index")
    return found.rename_axis(["", "beta"]) if rows else found


def at(same: pd.DataFrame, beta: float) -> pd.DataFrame:
    return same[same["beta"] == beta]


def claims(final: pd.DataFrame) -> pd.DataFrame:
    """What 2210.10760 and 2406.02900 say of tuning by a proxy."""
    same, other, margin = of_pairs(final, PROXY), of_pairs(final, GOLD), seeds.margin(final)
    titles = (
        "1. By the proxy, a policy is the better the weaker the constraint",
        "2. By gold it is best at a constraint between the weakest and the strongest",
        "3. The weaker the constraint, the more the proxy overrates the policy",
        "4. Choosing beta by the proxy costs",
        "5. Pairs by gold make a better policy, each at its best beta",
    )
    betas = sorted(same["beta"].unique())
    if len(betas) < 3:
        return seeds.findings(
            [seeds.unmeasured(title, "it takes three betas with pairs by the proxy") for title in titles]
        )
    weakest, strongest = at(same, betas[0]), at(same, betas[-1])
    between = same[same["beta"].isin(betas[1:-1])]
    ends = {
        f"beta {short(beta)}": seeds.best_minus_best(between, end, looks=2)
        for beta, end in ((betas[0], weakest), (betas[-1], strongest))
    }
    apart = same.assign(apart=same["proxy"] - same["score"])
    overrated = seeds.paired(at(apart, betas[0]), at(apart, betas[-1]), "apart")
    favoured = max(betas, key=lambda beta: at(same, beta)["proxy"].mean())
    found = [
        seeds.holds(
            titles[0],
            "win rate by the proxy for a tenth of the beta",
            -seeds.interval(seeds.slopes(same, "proxy")["slope"]),
        ),
        seeds.all_hold(titles[1], "best win rate by gold between, minus that at", ends, margin),
        seeds.holds(titles[2], "proxy minus gold at the weakest, minus the same at the strongest", overrated),
        seeds.holds(
            titles[3],
            f"win rate by gold at its best beta minus that at the proxy's, {short(favoured)}",
            seeds.best_minus_best(same, at(same, favoured)),
            margin=margin,
        ),
    ]
    if other.empty:
        return seeds.findings([*found, seeds.unmeasured(titles[4], "it takes runs of judge=gold")])
    better = seeds.best_minus_best(other, same)
    return seeds.findings(
        [*found, seeds.holds(titles[4], "best win rate by gold, of the one minus the other", better, margin=margin)]
    )


def figure(final: pd.DataFrame) -> Figure:
    """Win rate by both judges against KL, means over seeds at each beta; crosses where most runs are degenerate."""
    shown = {judge: title for judge, title in PAIRS.items() if len(of_pairs(final, judge))}
    drawing = Figure(figsize=(1 + 5 * len(shown), 4.4), layout="constrained", dpi=150)
    axes = drawing.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False).ravel()
    for axis, (judge, title) in zip(axes, shown.items(), strict=True):
        tidy(axis, title, "KL to the initial policy (nats per response)", f"win rate over {beaten(final)}")
        axis.set_xscale("log")
        plain(axis.xaxis)
        axis.axhline(0.5, color="0.5", lw=1, ls="--", zorder=0)
        same = of_pairs(final, judge)
        for colour, (value, label) in zip(COLOURS, JUDGES.items(), strict=False):
            axis.plot(same["kl"], same[value], ".", color=colour, alpha=0.3, ms=4)
            curve(axis, same, label, value, color=colour)
        for beta, mean in same.groupby("beta")[["kl", *JUDGES]].mean().iterrows():
            below = mean["kl"], mean[[*JUDGES]].min()
            axis.annotate(short(beta), below, (0, -13), textcoords="offset points", fontsize=7, ha="center")
        axis.legend(frameon=False, fontsize=8)
    return drawing


def study(frames: Frames) -> tuple[dict[str, pd.DataFrame], dict[str, Figure]]:
    """Tables and figures of what `read` has read, by name."""
    final = frames["runs"]
    return {"over_optimization": table(final), "claims": claims(final)}, {"frontier": figure(final)}


if __name__ == "__main__":
    main(__doc__, read, study)
