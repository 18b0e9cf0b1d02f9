"""How strong should the KL constraint be? Tables 1 and 2 of 2407.13709, and the frontier of win rate against KL.

    python -m analysis.kl_strength runs/kl_strength
    python -m analysis.kl_strength runs/paper_kl_strength policy=mistral_7b

prints the tables and the findings, and writes them and the figure beside the runs.
"""

from collections.abc import Mapping
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis.report import main
from analysis.seeds import (
    Finding,
    above,
    all_of,
    below,
    cell,
    chosen_by_others,
    findings,
    finished,
    grid,
    holds,
    interval,
    paired,
)
from dpo import runs
from dpo.drawing import COLOURS, plain, tidy
from dpo.runs import degenerate, short

KEYS = ("beta", "lr", "seed")
UNTUNED = "inf"  # the row of the policy before training


def table_1(final: pd.DataFrame) -> pd.DataFrame:
    """Score by beta (rows) and learning rate. A win rate is over the policy before training, whose own is 0.5."""
    table = grid(final, "beta", ["lr"], "score", name="lr {}".format)
    itself = "0.500" if "win_rate" in final and final["score"].equals(final["win_rate"]) else ""
    return pd.concat([pd.DataFrame(itself, [UNTUNED], table.columns), table]).rename_axis("beta")


def table_2(final: pd.DataFrame, history: pd.DataFrame) -> pd.DataFrame:
    """Accuracy on held-out pairs of the implicit reward and of the policy's own log-probability, by beta."""
    before = untuned(history)
    table = {}
    for lr, of_lr in final.groupby("lr"):
        for title, value in (("reward", "rewards/accuracies"), ("policy", "logps/accuracies")):
            rows = {short(beta): cell(same, value) for beta, same in of_lr.groupby("beta")}
            rows[UNTUNED] = f"{before[value].mean():.3f}"
            table[f"lr {short(lr)}, {title}"] = rows
    order = [UNTUNED, *(short(beta) for beta in sorted(final["beta"].unique(), reverse=True))]
    return pd.DataFrame(table).reindex(order).rename_axis("beta")


def untuned(history: pd.DataFrame) -> pd.DataFrame:
    """What was measured on the held-out pairs before training: a row per seed."""
    return history[(history["split"] == "validation") & (history["step"] == 0)].groupby("seed").first().reset_index()


def at_best_lr(final: pd.DataFrame) -> pd.DataFrame:
    """The runs at the learning rate whose best beta has the best mean score."""
    means = final.groupby(["beta", "lr"])["score"].mean().unstack("beta").max(axis=1)
    return final[final["lr"] == means.idxmax()]


def rising(final: pd.DataFrame, value: str) -> Finding:
    """Whether `value` rises at every step to a smaller beta. One significant fall between two betas refutes it."""
    of_beta: dict[Any, pd.DataFrame] = dict(tuple(final.groupby("beta")))
    betas = sorted(of_beta, reverse=True)
    looks = len(betas) * (len(betas) - 1) // 2
    rise = {(a, b): paired(of_beta[b], of_beta[a], value, looks) for a, b in combinations(betas, 2)}
    falls = {pair: found for pair, found in rise.items() if above(found) == "refutes"}
    shown = min(falls, key=lambda pair: falls[pair].high) if falls else (betas[0], betas[-1])
    verdict = "refutes" if falls else all_of([above(rise[pair]) for pair in pairwise(betas)])
    change = (
        f"from beta {short(shown[0])} to {short(shown[1])} it changes by {rise[shown]} (one of {looks} pairs of betas)"
    )
    return Finding("2a. The policy's own ranking gets better with every smaller beta", change, verdict)


def claims(final: pd.DataFrame, history: pd.DataFrame) -> pd.DataFrame:
    """The first two of the paper's claims, at the learning rate of the best mean score."""
    final = at_best_lr(final)
    best = chosen_by_others(final, "beta")
    low, high = (final[final["beta"] == end] for end in (final["beta"].min(), final["beta"].max()))
    inside = [paired(best, low), paired(best, high)]
    smaller, from_there = final[final["beta"] < 0.1], final[final["beta"] >= 0.1]
    position = paired(chosen_by_others(smaller, "beta"), chosen_by_others(from_there, "beta"))
    at_low, at_best = (one.assign(share=degenerate(one).astype(float)) for one in (low, best))
    collapse = paired(at_low, at_best, "share")
    before = interval(untuned(history)["logps/accuracies"])
    rewards = {beta: interval(same["rewards/accuracies"]) for beta, same in final.groupby("beta")}
    worst = min(rewards, key=lambda beta: rewards[beta].low)
    at = f"lr {short(final['lr'].iloc[0])}, betas {short(final['beta'].min())} to {short(final['beta'].max())}"
    return findings(
        [
            Finding(
                "1a. The best beta lies between too weak and too strong a constraint",
                f"score at the best beta (chosen on the other seeds) minus smallest: {inside[0]}, minus largest: "
                f"{inside[1]} ({at})",
                all_of([above(one) for one in inside]),
            ),
            holds("1b. It is well below 0.1", "best below 0.1 minus best from 0.1 on", position),
            holds(
                "1c. Too small a beta can collapse",
                f"{int(at_low['share'].sum())} of {len(low)} seeds are degenerate at the smallest; share minus that at "
                "the best beta",
                collapse,
            ),
            rising(final, "logps/accuracies"),
            Finding(
                "2b. It is above one half only after training with a small beta",
                f"accuracy of the policy before training: {before}",
                below(before, 0.5),
            ),
            holds(
                "2c. The implicit reward ranks better than chance at every beta",
                f"accuracy where it is lowest, at beta {short(worst)}",
                rewards[worst],
                0.5,
            ),
        ]
    )


def figure(final: pd.DataFrame, history: pd.DataFrame) -> Figure:
    """Win rate against KL: runs on their way (small dots, every evaluated step) and finished (large), by beta."""
    rates = sorted(final["lr"].unique())
    drawing = Figure(figsize=(6.5 * len(rates), 4.6), layout="constrained", dpi=150)
    betas = sorted(final["beta"].unique())
    unfinished = history["step"] < history.groupby("run")["step"].transform("max")
    on_the_way = history[(history["split"] == "test") & unfinished]
    for axis, lr in zip(drawing.subplots(1, len(rates), sharey=True, squeeze=False)[0], rates, strict=True):
        tidy(axis, f"lr {short(lr)}", "KL to the initial policy (nats per response)", "win rate over it")
        axis.set_xscale("log")
        plain(axis.xaxis)
        axis.axhline(0.5, color="0.5", lw=1, ls="--", zorder=0)
        for colour, beta in zip(COLOURS, betas, strict=False):
            ends = final[(final["lr"] == lr) & (final["beta"] == beta)]
            way = on_the_way[(on_the_way["lr"] == lr) & (on_the_way["beta"] == beta)]
            axis.plot(way["kl"], way["win_rate"], "o", color=colour, ms=3, alpha=0.35, mec="none")
            axis.plot(ends["kl"], ends["win_rate"], "o", color=colour, ms=6, mec="white", label=short(beta))
    axis.legend(title="beta", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing


def of_one_policy(path: str | Path, only: Mapping[str, str]) -> pd.DataFrame:
    """`finished`.

    Raises: ValueError if the runs are of several policies.
    """
    final = finished(path, KEYS, only)
    if len(policies := sorted(set(final.get("policy", ())))) > 1:
        raise ValueError(f"one policy at a time: say policy={' or policy='.join(policies)}")
    return final


def study(path: str | Path, **only: str) -> tuple[dict[str, pd.DataFrame], dict[str, Figure]]:
    """Tables and figures of a sweep by `figure=kl_strength`, by name. only: values of keys, such as policy."""
    final, history = of_one_policy(path, only), runs.load(path, KEYS)
    history = history[history["run"].isin(final["run"])]
    tables = {"table_1": table_1(final), "table_2": table_2(final, history), "claims": claims(final, history)}
    return tables, {"frontier": figure(final, history)} if "kl" in final and "win_rate" in final else {}


if __name__ == "__main__":
    main(__doc__, study)
