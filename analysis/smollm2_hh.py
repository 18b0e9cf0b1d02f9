"""How strong should the KL constraint be for a real model? SmolLM2 on Anthropic's dialogues, without a judge.

    python -m analysis.smollm2_hh runs/smollm2_hh

prints the tables and the findings, and writes them, the figure and the numbers of each run and pair beside the runs.
Each policy is loaded once, to rank the held-out pairs one by one.
"""

from math import nan
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis import pair_gaps, seeds
from analysis.report import Frames, main
from dpo.results import degenerate, short
from dpo.results.figures import COLOURS, colours, plain, tidy
from dpo.win_rates import wilson

RANK = "policy.lora.rank"
KEYS = ("reference", RANK, "beta", "seed")
REWARD, POLICY = "rewards/accuracies", "logps/accuracies"  # on held-out pairs, by the implicit reward and by the policy
FULL = "all weights"
BEST = "best accuracy, of the one minus the other"
SHOWN = {  # title: measure and format
    "reward accuracy": ("score", None),
    "policy accuracy": (POLICY, ".3f"),
    "KL": ("kl", ".2f"),
    "its error over responses": ("kl/se", ".2f"),
    "length": ("length", ".1f"),
    "ended": ("ended", ".3f"),
    "repetition": ("repetition", ".3f"),
    "broken": ("broken", ".3f"),
}


def read(path: str | Path, **only: str) -> Frames:
    """The numbers of a sweep by `figure=smollm2_hh`. only: values of keys.

    runs: a row per trained run. pairs: a row per held-out pair of each, see `pair_gaps.ranked`.

    Raises: ValueError as `seeds.finished`.
    """
    final = seeds.trained(seeds.finished(path, KEYS, only, shown=["lr"], scores=[REWARD], optional=[RANK]))
    return {"runs": final, "pairs": pair_gaps.of_runs(path, final, [*KEYS], numbered, "validation")}


def numbered(pairs: pd.DataFrame) -> pd.DataFrame:
    return pairs[["reward", "policy", "before"]].rename_axis("pair").reset_index()


def of_ways(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each way to train: all weights held to the initial policy first, adapters, other references."""
    rank = pd.to_numeric(frame.get(RANK, pd.Series(nan, frame.index)))
    reference = frame.get("reference", pd.Series("initial", frame.index))
    ways = [
        (FULL if one != one else f"LoRA of rank {one:g}") + ("" if held == "initial" else f", {held}")
        for one, held in zip(rank, reference, strict=True)
    ]
    found = {str(way): same for way, same in frame.groupby(pd.Series(ways, frame.index))}
    return dict(sorted(found.items(), key=lambda item: (", " in item[0], item[0] != FULL, item[0])))


def table(final: pd.DataFrame) -> pd.DataFrame:
    """A row per way and beta, from the largest down. A response that is cut counts as broken, and accuracy and KL are
    worth seeing all the same: the share of degenerate runs is beside them.
    """
    rows = {}
    for way, of_way in of_ways(final).items():
        for beta, same in sorted(of_way.groupby("beta"), reverse=True):
            measured = {title: seeds.cell(same, value, form, counted=True) for title, (value, form) in SHOWN.items()}
            broken = f"{int(degenerate(same).sum())} of {len(same)}"
            rows[way, short(beta)] = {"lr": short(same["lr"].iloc[0]), **measured, "degenerate": broken}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["", "beta"])


def over_pairs(pairs: pd.DataFrame) -> pd.DataFrame:
    """A row per run: shares of held-out pairs that are ranked as labelled, and differences on the same pairs.

    The intervals are of 95 % over pairs, each by itself: of what this one run would do on other pairs of the kind. They
    know nothing of another seed. Rewards of pairs are log-ratios to the policy before training, so those of runs
    that were held to anything else are left out.
    """
    rows, ways, pair = {}, of_ways(pairs), ["beta", "seed", "pair"]
    full = ways.get(FULL, pairs[:0]).set_index(pair)["policy"]
    for way, of_way in ways.items():
        for (beta, seed), run in sorted(of_way.groupby(["beta", "seed"]), reverse=True):
            own = run.set_index(pair)
            rows[way, short(beta), seed] = {
                "pairs": len(run),
                "reward accuracy": "" if ", " in way else str(share(own["reward"])),
                "policy accuracy": str(share(own["policy"])),
                "minus that before training": str(seeds.interval(own["policy"] - own["before"])),
                f"minus that of {FULL}": "" if way == FULL else str(seeds.interval(own["policy"] - full)),
            }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["", "beta", "seed"])


def share(ranked: pd.Series) -> seeds.Interval:
    """The share that is ranked as labelled, with the interval that a run's own accuracy has (Wilson's)."""
    mean, n = float(ranked.mean()), len(ranked)
    return seeds.Interval(mean, *wilson(mean, n), n)


def claims(final: pd.DataFrame) -> pd.DataFrame:
    """Over seeds. What 2407.13709 says of beta is asked of each way; adapters and no reference against all weights.

    The policy's accuracy is compared across references, whose rewards are unlike.
    """
    ways, margin, found = of_ways(final), seeds.margin(final), []
    for way, same in ways.items():
        falls, rises = (-seeds.interval(seeds.slopes(same, value)["slope"]) for value in ("kl", POLICY))
        found += [
            seeds.holds(f"1. KL falls with beta ({way})", "it falls, for ten times the beta, by", falls),
            seeds.holds(f"2. The policy ranks the better the smaller beta ({way})", "for a tenth of it", rises),
            inside(way, same, margin),
        ]
    full = ways.get(FULL, final[:0])
    for way, same in ways.items():
        if way.startswith("LoRA") and "," not in way:
            claim = f"5. {way} ranks better than {FULL}, each at its best beta"
            better = seeds.best_minus_best(same, full)
            found += [nearer(way, same, full), seeds.holds(claim, BEST, better, margin=margin)]
    better = seeds.best_minus_best(full, ways.get(f"{FULL}, reference_free", final[:0]), value=POLICY)
    claim = "6. The policy ranks better with a reference, each at its best beta"
    return seeds.findings([*found, seeds.holds(claim, BEST, better, margin=margin)])


def inside(way: str, same: pd.DataFrame, margin: float) -> seeds.Finding:
    """Whether a beta between the smallest and the largest is better than both."""
    claim, betas = f"3. The best beta lies between the ends ({way})", sorted(same["beta"].unique())
    if len(betas) < 3:
        return seeds.unmeasured(claim, f"it takes three betas, found {len(betas)}")
    between = same[same["beta"].isin(betas[1:-1])]
    ends = {
        f"beta {short(end)}": seeds.best_minus_best(between, same[same["beta"] == end], looks=2)
        for end in (betas[0], betas[-1])
    }
    return seeds.all_hold(claim, "best accuracy between, minus that at", ends, margin)


def nearer(way: str, same: pd.DataFrame, full: pd.DataFrame) -> seeds.Finding:
    """Whether adapters stay nearer to the initial policy."""
    claim = f"4. {way} stays nearer to the initial policy than {FULL} do, at every beta"
    betas = sorted({*full["beta"]} & {*same["beta"]})
    if not betas:
        return seeds.unmeasured(claim, f"it takes runs of {FULL} at the same betas")
    at = {f"beta {short(beta)}": [one[one["beta"] == beta] for one in (full, same)] for beta in betas}
    parts = {name: seeds.paired(one, other, "kl", len(betas)) for name, (one, other) in at.items()}
    return seeds.all_hold(claim, f"KL of {FULL} minus that of adapters", parts)


def figure(final: pd.DataFrame) -> Figure:
    """Accuracy (dashed: of the policy itself) and KL against beta, and one against the other, where betas have colours.

    Means over seeds, with 95 % intervals where there are several.
    """
    drawing = Figure(figsize=(15, 4.4), layout="constrained", dpi=150)
    accuracy, distance, frontier = drawing.subplots(1, 3)
    held_out, kl = "accuracy on held-out pairs", "KL to the initial policy (nats per response)"
    tidy(accuracy, "Quality", "beta", held_out)
    tidy(distance, "Distance", "beta", kl)
    tidy(frontier, "Frontier", kl, held_out)
    of_beta = colours(sorted(final["beta"].unique()), "beta")
    for number, (way, same) in enumerate(of_ways(final).items()):
        style = {"color": COLOURS[number % len(COLOURS)], "marker": "osD^v"[number % 5], "ms": 5, "lw": 1.6}
        for axis, value, more in (
            (accuracy, REWARD, {"label": way}),
            (accuracy, POLICY, {"label": f"{way}, the policy itself", "ls": "--", "lw": 1}),
            (distance, "kl", {"label": way}),
        ):
            found = {beta: seeds.interval(one[value]) for beta, one in same.groupby("beta")}
            bars = [one.half if one.seeds > 1 else nan for one in found.values()]
            axis.errorbar([*found], [one.mean for one in found.values()], bars, **{**style, **more})
        means = same.groupby("beta")[["kl", REWARD]].mean()
        frontier.plot(means["kl"], means[REWARD], color=style["color"], lw=1, label=way)
        points = [of_beta[beta] for beta in means.index]
        frontier.scatter(means["kl"], means[REWARD], c=points, marker=style["marker"], s=36, zorder=3)
    for beta, colour in of_beta.items():
        frontier.plot([], [], "o", color=colour, ms=5, label=f"beta {short(beta)}")
    for axis in (accuracy, distance):
        axis.set_xscale("log")
        plain(axis.xaxis)
    accuracy.axhline(0.5, color="0.5", lw=1, ls=":", zorder=0)
    for axis in (accuracy, frontier):
        axis.legend(frameon=False, fontsize=7)
    return drawing


def study(frames: Frames) -> tuple[dict[str, pd.DataFrame], dict[str, Figure]]:
    """Tables and figures of what `read` has read, by name."""
    final = frames["runs"]
    tables = {"smollm2_hh": table(final), "over_pairs": over_pairs(frames["pairs"]), "claims": claims(final)}
    return tables, {"accuracy_and_kl": figure(final)}


if __name__ == "__main__":
    main(__doc__, read, study)
