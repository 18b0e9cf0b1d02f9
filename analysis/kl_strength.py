"""How strong should the KL constraint be? Tables 1, 2 and 6 of 2407.13709, and the frontier of win rate against KL.

    python -m analysis.kl_strength runs/kl_strength
    python -m analysis.kl_strength runs/paper_kl_strength policy=mistral_7b

prints the tables and the findings, and writes them, the figure and the numbers of each run beside the runs.
"""

from collections.abc import Mapping
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis import seeds
from analysis.report import Frames, main
from dpo import results
from dpo.results import beaten, short
from dpo.results.figures import colours, plain, tidy

KEYS = ("beta", "lr", "seed")
UNTUNED = "inf"  # the row of the policy before training
ACCURACIES = {"reward": "rewards/accuracies", "policy": "logps/accuracies"}


def read(path: str | Path, **only: str) -> Frames:
    """The numbers of a sweep by `figure=kl_strength`. only: values of keys, such as policy.

    runs: a row per finished run. history: what was measured before training (on the held-out pairs) and on the way.

    Raises: ValueError as `seeds.finished`, or if the runs are of several policies.
    """
    final = of_one_policy(path, only)
    history = results.load(path, KEYS)
    history = history[history["run"].isin(final["run"])].reindex(
        columns=["run", *KEYS, "split", "step", "kl", "win_rate", *ACCURACIES.values()]
    )
    start = (history["split"] == "validation") & (history["step"] == 0)
    on_the_way = (history["split"] == "test") & (history["step"] < history.groupby("run")["step"].transform("max"))
    return {"runs": final, "history": history[start | on_the_way]}


def of_one_policy(path: str | Path, only: Mapping[str, str]) -> pd.DataFrame:
    """`seeds.finished`.

    Raises: ValueError if the runs are of several policies.
    """
    final = seeds.finished(path, KEYS, only)
    if "policy" in final and len(policies := sorted(final["policy"].dropna().unique())) > 1:
        raise ValueError(f"one policy at a time: say policy={' or policy='.join(policies)}")
    return final


def table_1(final: pd.DataFrame) -> pd.DataFrame:
    """Score by beta (rows) and learning rate. A win rate is over the policy before training, whose own is 0.5."""
    trained, _ = seeds.parted(final)
    table = seeds.grid(trained, "beta", ["lr"], "score", name="lr {}".format)
    before = pd.DataFrame(seeds.before_training(final), [UNTUNED], table.columns)
    return pd.concat([before, table]).rename_axis("beta")


def table_2(final: pd.DataFrame, history: pd.DataFrame) -> pd.DataFrame:
    """Accuracy on held-out pairs of the implicit reward and of the policy's own log-probability, by beta."""
    (trained, _), before = seeds.parted(final), untuned(final, history)
    table = {}
    for lr, of_lr in trained.groupby("lr"):
        for title, value in ACCURACIES.items():
            rows = {short(beta): seeds.cell(same, value) for beta, same in of_lr.groupby("beta")}
            known = before[value].dropna()
            rows[UNTUNED] = f"{known.mean():.3f}" if len(known) else ""
            table[f"lr {short(lr)}, {title}"] = rows
    order = [UNTUNED, *(short(beta) for beta in sorted(trained["beta"].unique(), reverse=True))]
    return pd.DataFrame(table).reindex(order).fillna("").rename_axis("beta")


def untuned(final: pd.DataFrame, history: pd.DataFrame) -> pd.DataFrame:
    """What was measured on the held-out pairs before training: a row per seed."""
    start = history[(history["split"] == "validation") & (history["step"] == 0)]
    both = pd.concat([start, seeds.parted(final)[1]]).reindex(columns=["seed", *ACCURACIES.values()])
    return both.groupby("seed").first().reset_index()


def at_best_lr(trained: pd.DataFrame) -> pd.DataFrame:
    """The runs at the learning rate whose best beta has the best mean score."""
    means = trained.groupby(["beta", "lr"])["score"].mean().unstack("beta").max(axis=1)
    return trained[trained["lr"] == means.idxmax()] if len(trained) else trained


def rising(trained: pd.DataFrame, value: str, rates: int = 1) -> seeds.Finding:
    """Whether `value` rises at every step to a smaller beta. One significant fall between two betas refutes it."""
    claim = "2a. The policy's own ranking gets better with every smaller beta"
    of_beta: dict[Any, pd.DataFrame] = dict(tuple(trained.groupby("beta")))
    betas = sorted(of_beta, reverse=True)
    if len(betas) < 2 or value not in trained:
        return seeds.unmeasured(claim, f"it takes {value} at two betas or more")
    looks = len(betas) * (len(betas) - 1) // 2
    rise = {(a, b): seeds.paired(of_beta[b], of_beta[a], value, looks * rates) for a, b in combinations(betas, 2)}
    falls = {pair: found for pair, found in rise.items() if seeds.verdict(found) == "refutes"}
    shown = min(falls, key=lambda pair: falls[pair].high) if falls else (betas[0], betas[-1])
    decided = "refutes" if falls else seeds.all_of([seeds.verdict(rise[pair]) for pair in pairwise(betas)])
    change = (
        f"from beta {short(shown[0])} to {short(shown[1])} it changes by {rise[shown]} (one of {looks} pairs of betas)"
    )
    return seeds.Finding(claim, change, decided)


def claims(final: pd.DataFrame, history: pd.DataFrame) -> pd.DataFrame:
    """The first two of the paper's claims, at the learning rate of the best mean score.

    It is chosen on the same runs, so each interval holds at all learning rates together (Bonferroni).
    """
    every, _ = seeds.parted(final)
    trained, rates = at_best_lr(every), max(1, every["lr"].nunique())
    of_beta: dict[Any, pd.DataFrame] = dict(tuple(trained.groupby("beta")))
    found, betas = [inside(of_beta, rates, seeds.margin(final))], sorted(of_beta)
    smaller, from_there = trained[trained["beta"] < 0.1], trained[trained["beta"] >= 0.1]
    position = seeds.best_minus_best(smaller, from_there, looks=rates)
    what = "best score below 0.1 minus best from 0.1 on"
    found.append(seeds.holds("1b. The best beta is well below 0.1", what, position, margin=seeds.margin(final)))
    collapse = "1c. Too small a beta can collapse"
    if len(betas) > 1:
        low, high = betas[0], betas[-1]
        names = (f"beta {short(low)}", f"beta {short(high)}")
        found.append(seeds.more_often(collapse, of_beta[low], of_beta[high], names))
    else:
        found.append(seeds.unmeasured(collapse, "it takes two betas or more"))
    found.append(rising(trained, "logps/accuracies", rates))
    before = seeds.interval(untuned(final, history)["logps/accuracies"])
    found.append(
        seeds.holds(
            "2b. Before training it is below one half",
            "one half minus the accuracy of the policy before training",
            seeds.Interval(0.5 - before.mean, 0.5 - before.high, 0.5 - before.low, before.seeds),
        )
    )
    always = "2c. The implicit reward ranks better than chance at every beta"
    if "rewards/accuracies" in trained and len(betas):
        wrong = trained.assign(wrong=-trained["rewards/accuracies"])
        lowest = -seeds.best(wrong, value="wrong", looks=rates)
        found.append(seeds.holds(always, "its lowest accuracy over betas", lowest, 0.5))
    else:
        found.append(seeds.unmeasured(always, "no run has rewards/accuracies"))
    return seeds.findings(found)


def inside(of_beta: dict[Any, pd.DataFrame], rates: int, margin: float) -> seeds.Finding:
    """Whether a beta between the smallest and the largest is better than both."""
    claim, betas = "1a. The best beta lies between too weak and too strong a constraint", sorted(of_beta)
    if len(betas) < 3:
        return seeds.unmeasured(claim, f"it takes three betas or more, found {len(betas)}")
    between = pd.concat([of_beta[beta] for beta in betas[1:-1]])
    parts = [seeds.best_minus_best(between, of_beta[end], looks=rates) for end in (betas[0], betas[-1])]
    decided = seeds.all_of([seeds.verdict(one, 0.0, margin) for one in parts])
    at = f"lr {short(between['lr'].iloc[0])}" + (f", of {rates}" if rates > 1 else "")
    return seeds.Finding(
        claim,
        f"best score between minus that at beta {short(betas[0])}: {parts[0]}, minus at {short(betas[-1])}: {parts[1]}"
        f"{seeds.to_decide([(one, 0.0) for one in parts], decided, margin)} ({at})",
        decided,
    )


def figure(final: pd.DataFrame, history: pd.DataFrame) -> Figure:
    """Win rate against KL: runs on their way (small dots, every evaluated step) and finished (large), by beta."""
    rates = sorted(final["lr"].unique())
    drawing = Figure(figsize=(6.5 * len(rates), 4.6), layout="constrained", dpi=150)
    betas = sorted(final["beta"].unique())
    on_the_way = history[(history["split"] == "test") & history["run"].isin(final["run"])]
    for axis, lr in zip(drawing.subplots(1, len(rates), sharey=True, squeeze=False)[0], rates, strict=True):
        tidy(axis, f"lr {short(lr)}", "KL to the initial policy (nats per response)", f"win rate over {beaten(final)}")
        axis.set_xscale("log")
        plain(axis.xaxis)
        axis.axhline(0.5, color="0.5", lw=1, ls="--", zorder=0)
        for beta, colour in colours(betas, "beta").items():
            ends = final[(final["lr"] == lr) & (final["beta"] == beta)]
            way = on_the_way[(on_the_way["lr"] == lr) & (on_the_way["beta"] == beta)]
            axis.plot(way["kl"], way["win_rate"], "o", color=colour, ms=3, alpha=0.35, mec="none")
            axis.plot(ends["kl"], ends["win_rate"], "o", color=colour, ms=6, mec="white", label=short(beta))
    axis.legend(title="beta", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing


def study(frames: Frames) -> tuple[dict[str, pd.DataFrame], dict[str, Figure]]:
    """Tables and figures of what `read` has read, by name."""
    final, history = frames["runs"], frames["history"]
    trained, _ = seeds.parted(final)
    tables = {"table_1": table_1(final), "measures": seeds.measures(trained, ["lr", "beta"])}
    tables |= {"table_2": table_2(final, history), "claims": claims(final, history)}
    drawn = {"kl", "win_rate"} <= set(trained.dropna(axis="columns", how="all")) and len(trained)
    return tables, {"frontier": figure(trained, history)} if drawn else {}


if __name__ == "__main__":
    main(__doc__, read, study)
