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
from analysis.objectives import curve
from analysis.report import Frames, main
from dpo.results import degenerate, short
from dpo.results.figures import COLOURS, colours, plain, tidy

RANK = "policy.lora.rank"
KEYS = ("reference", RANK, "beta", "seed")
SCORE, POLICY = "rewards/accuracies", "logps/accuracies"  # on held-out pairs, by the implicit reward and by the policy
FULL = "all weights"
BEST = "best accuracy, of the one minus the other"
RANKS = {"initial": "reward", "reference_free": "policy"}  # reference: what its implicit reward ranks by
SHOWN = {  # title: measure and format; the score comes first
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

    runs: a row per finished run. pairs: a row per held-out pair of each, see `ranked`.

    Raises: ValueError as `seeds.finished`.
    """
    final = seeds.finished(path, KEYS, only, shown=["lr"], scores=[SCORE])
    pairs = pair_gaps.of_runs(path, seeds.trained(final), [*KEYS], ranked, "validation")
    return {"runs": final, "pairs": pairs}


def ranked(pairs: pd.DataFrame) -> pd.DataFrame:
    """Whether a pair is ranked as labelled (a tie counts one half): by the policy's log-ratio to the initial policy,
    which is the implicit reward of a run that is held to it, by the policy itself, and by the initial policy.
    """
    gaps = {"reward": pairs["gap"], "policy": pairs["policy"], "before": pairs["before"]}
    ranks = {name: (gap > 0) + 0.5 * (gap == 0) for name, gap in gaps.items()}
    return pd.DataFrame({"pair": range(len(pairs)), **ranks})


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
    """A row per way and beta, from the largest down: accuracy, KL and what tells of a policy that fell apart."""
    rows = {}
    for way, of_way in of_ways(seeds.trained(final)).items():
        for beta, same in sorted(of_way.groupby("beta"), reverse=True):
            row = {
                "lr": short(same["lr"].iloc[0]),
                "reward accuracy": seeds.cell(same, "score"),
            }
            row |= {title: seeds.cell(same, value, form) for title, (value, form) in SHOWN.items()}
            rows[way, short(beta)] = row | {"degenerate": f"{int(degenerate(same).sum())} of {len(same)}"}
    found = pd.DataFrame.from_dict(rows, orient="index")
    return found.rename_axis(["", "beta"]) if rows else found


def over_pairs(pairs: pd.DataFrame) -> pd.DataFrame:
    """A row per run: shares of held-out pairs that are ranked as labelled, and differences on the same pairs.

    The intervals are of 95 % over pairs, each by itself: of what this one run would do on other pairs of the kind. They
    know nothing of another seed.
    """
    rows, ways = {}, of_ways(pairs)
    for way, of_way in ways.items():
        for (beta, seed), run in sorted(of_way.groupby(["beta", "seed"]), reverse=True):
            run = run.set_index("pair")
            by = RANKS.get(run["reference"].iloc[0])
            full = ways.get(FULL, pairs[:0])
            other = full[(full["beta"] == beta) & (full["seed"] == seed)].set_index("pair")
            rows[way, short(beta), seed] = {
                "pairs": len(run),
                "reward accuracy": str(seeds.interval(run[by])) if by else "",
                "policy accuracy": str(seeds.interval(run["policy"])),
                "minus that before training": str(seeds.interval(run["policy"] - run["before"])),
                f"policy accuracy minus that of {FULL}": (
                    "" if way == FULL or other.empty else str(seeds.interval(run["policy"] - other["policy"]))
                ),
            }
    found = pd.DataFrame.from_dict(rows, orient="index")
    return found.rename_axis(["", "beta", "seed"]) if rows else found


def claims(final: pd.DataFrame) -> pd.DataFrame:
    """Over seeds. What 2407.13709 says of beta is asked of each way; adapters and no reference against all weights."""
    ways, margin = of_ways(seeds.trained(final)), seeds.margin(final)
    found = []
    for way, same in ways.items():
        falls, rises = (-seeds.interval(seeds.slopes(same, value)["slope"]) for value in ("kl", POLICY))
        found += [
            seeds.holds(f"1. KL falls with beta ({way})", "it falls, for ten times the beta, by", falls),
            seeds.holds(f"2. The policy ranks the better the smaller beta ({way})", "for a tenth of it", rises),
            inside(way, same, margin),
            fallen(way, same),
        ]
    full = ways.get(FULL, final[:0])
    for way, same in ways.items():
        if "LoRA" in way and "," not in way:
            shared = sorted({*full["beta"]} & {*same["beta"]})
            nearer = {
                f"beta {short(beta)}": seeds.paired(at(full, beta), at(same, beta), "kl", len(shared))
                for beta in shared
            }
            claim = f"5. {way} stays nearer to the initial policy than all weights do, at every beta"
            found += [
                seeds.all_hold(claim, "KL of all weights minus that of adapters", nearer)
                if nearer
                else seeds.unmeasured(claim, f"it takes runs of {FULL} at the same betas"),
                seeds.holds(
                    f"6. {way} ranks better than {FULL}, each at its best beta",
                    BEST,
                    seeds.best_minus_best(same, full),
                    margin=margin,
                ),
            ]
    free = ways.get(f"{FULL}, reference_free", final[:0])
    claim = "7. The reward ranks better with a reference, each at its best beta"
    found.append(seeds.holds(claim, BEST, seeds.best_minus_best(full, free), margin=margin))
    return seeds.findings(found)


def at(same: pd.DataFrame, beta: float) -> pd.DataFrame:
    return same[same["beta"] == beta]


def inside(way: str, same: pd.DataFrame, margin: float) -> seeds.Finding:
    """Whether a beta between the smallest and the largest is better than both."""
    claim, betas = f"3. The best beta lies between the ends ({way})", sorted(same["beta"].unique())
    if len(betas) < 3:
        return seeds.unmeasured(claim, f"it takes three betas, found {len(betas)}")
    between = same[same["beta"].isin(betas[1:-1])]
    ends = {
        f"beta {short(end)}": seeds.best_minus_best(between, at(same, end), looks=2) for end in (betas[0], betas[-1])
    }
    return seeds.all_hold(claim, "best accuracy between, minus that at", ends, margin)


def fallen(way: str, same: pd.DataFrame) -> seeds.Finding:
    """Whether policies fall apart at the smallest beta."""
    claim, betas = f"4. Too small a beta breaks the policy ({way})", sorted(same["beta"].unique())
    if len(betas) < 2:
        return seeds.unmeasured(claim, "it takes two betas or more")
    low, high = betas[0], betas[-1]
    return seeds.more_often(claim, at(same, low), at(same, high), (f"beta {short(low)}", f"beta {short(high)}"))


def figure(final: pd.DataFrame) -> Figure:
    """Accuracy (dashed: of the policy itself) and KL against beta, and one against the other, where betas have colours.

    Means over seeds, with 95 % intervals where there are several.
    """
    trained = seeds.trained(final)
    drawing = Figure(figsize=(15, 4.4), layout="constrained", dpi=150)
    accuracy, distance, frontier = drawing.subplots(1, 3)
    held_out, kl = "accuracy on held-out pairs", "KL to the initial policy (nats per response)"
    tidy(accuracy, "Quality", "beta", held_out)
    tidy(distance, "Distance", "beta", kl)
    tidy(frontier, "Frontier", kl, held_out)
    of_beta = colours(sorted(trained["beta"].unique()), "beta")
    for number, (way, same) in enumerate(of_ways(trained).items()):
        style = {"color": COLOURS[number % len(COLOURS)], "marker": "osD^v"[number % 5], "ms": 5, "lw": 1.6}
        for axis, value, more in (
            (accuracy, SCORE, {"label": way}),
            (accuracy, POLICY, {"ls": "--", "lw": 1, "label": f"{way}, the policy itself"}),
            (distance, "kl", {"label": way}),
        ):
            found = {beta: seeds.interval(one[value]) for beta, one in same.groupby("beta")}
            means = [one.mean for one in found.values()]
            bars = [one.half if one.seeds > 1 else nan for one in found.values()]
            axis.errorbar([*found], means, bars, **{**style, **more})
        curve(frontier, same, way, SCORE, color=style["color"], lw=1, ms=0)
        means = same.groupby("beta")[["kl", SCORE]].mean()
        points = [of_beta[beta] for beta in means.index]
        frontier.scatter(means["kl"], means[SCORE], c=points, marker=style["marker"], s=36, zorder=3)
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
    return tables, {"accuracy_and_kl": figure(final)} if len(seeds.trained(final)) else {}


if __name__ == "__main__":
    main(__doc__, read, study)
