"""Should beta follow the gap of the pairs? Figures 1b to 6, Tables 1 and 2 of beta-DPO (2407.08639).

    python -m analysis.dynamic_beta runs/dynamic_beta runs/dynamic_beta_mixtures runs/dynamic_beta_filters \\
        runs/dynamic_beta_variants runs/dynamic_beta_temperatures runs/dynamic_beta_sizes

prints the tables and the findings, and writes them, the figures and the numbers of each run into the first folder. Of
the others the last ones may be left out.
"""

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from analysis import pair_gaps, published, seeds
from analysis.report import Frames, main
from dpo.results import beaten, short
from dpo.results.figures import COLOURS, plain, tidy

GAP, LEVEL, OUTLIERS = "pairs.gap", "loss.level", "pairs.outliers"
FILTER, KEEP, ALPHA = "loss.filter", "loss.keep", "loss.alpha"
TEMPERATURE = "evaluation.temperature"
KEYS = {  # in which the runs of each sweep may differ
    "runs": ("beta", "seed", GAP),
    "mixtures": ("beta", "seed", GAP, LEVEL, OUTLIERS),
    "filters": ("beta", "seed", FILTER, KEEP, ALPHA),
    "variants": ("beta", "seed", "loss", ALPHA),
    "temperatures": ("seed", "policy.path", TEMPERATURE),
    "sizes": ("beta", "seed", "policy", "loss", GAP),
}
OPTIONAL = {"mixtures": (OUTLIERS,), "sizes": (GAP,)}  # keys that runs may lack
LEVELS = {"population": "DPO", "instance": "instance-level", "batch": "batch-level"}
OBJECTIVES = {"beta_dpo": "DPO", "beta_ipo": "IPO", "beta_kto": "KTO", "beta_simpo": "SimPO"}
QUANTILES = {"p1": 0.01, "p10": 0.1, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99}
CONSTANT, DYNAMIC = "constant beta", "dynamic beta"
METHODS = {"dpo": "DPO", "beta_dpo": "beta-DPO"}
NONE = "none"  # no filter
PLAIN, WHOLE = f"{NONE}, {CONSTANT}", f"weighted, {DYNAMIC}"  # DPO, and beta-DPO as the paper has it


def read(
    gaps: str | Path,
    mixtures: str | Path | None = None,
    filters: str | Path | None = None,
    variants: str | Path | None = None,
    temperatures: str | Path | None = None,
    sizes: str | Path | None = None,
    **only: str,
) -> Frames:
    """The numbers of the sweeps by `figure=dynamic_beta` and `table=dynamic_beta_mixtures`, `..._filters` and
    `..._variants`, a row per finished run, of evaluations of the third at several temperatures, and of `..._sizes`.

    pairs: reward gaps of the training pairs of `mixtures` after training, see `spread`. only: values of keys.

    Raises: ValueError as `seeds.finished`.
    """
    given = dict(zip(KEYS, (gaps, mixtures, filters, variants, temperatures, sizes), strict=True))
    frames = {
        name: seeds.finished(path, KEYS[name], only, optional=OPTIONAL.get(name, ()))
        for name, path in given.items()
        if path is not None
    }
    for name, label in (("filters", filtered), ("variants", varied), ("temperatures", evaluated), ("sizes", sized)):
        if name in frames:
            frames[name] = frames[name].assign(method=label(frames[name]))
    if mixtures is not None:
        frames["pairs"] = pair_gaps.of_runs(mixtures, seeds.trained(frames["mixtures"]), [*KEYS["mixtures"]], spread)
    return frames


def filtered(final: pd.DataFrame) -> list[str]:
    """The filter and whether beta moves, of each run of `table=dynamic_beta_filters`."""
    return [
        f"{NONE if keep == 1 else kind}, {DYNAMIC if alpha else CONSTANT}"
        for kind, keep, alpha in zip(final[FILTER], final[KEEP], final[ALPHA], strict=True)
    ]


def varied(final: pd.DataFrame) -> list[str]:
    """The objective and whether beta moves, of each run of `table=dynamic_beta_variants`."""
    return [
        f"{OBJECTIVES.get(loss, loss)}, {DYNAMIC if alpha else CONSTANT}"
        for loss, alpha in zip(final["loss"], final[ALPHA], strict=True)
    ]


def sized(final: pd.DataFrame) -> list[str]:
    """The objective of each run of `table=dynamic_beta_sizes`."""
    return [METHODS.get(loss, loss) for loss in final["loss"]]


def of_sizes(final: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Its trained runs on all pairs, of Table 1, and those on pairs of low or high gap, of Figure 1b."""
    found = seeds.trained(final)
    apart = found[GAP].notna() if GAP in found else pd.Series(False, found.index)
    return found[~apart], found[apart]


def evaluated(final: pd.DataFrame) -> list[str]:
    """What `filtered` says of the run whose policy each evaluation is of.

    Raises: ValueError if that run is not here, or has no filter.
    """
    files = [Path(path).parent / "config.yaml" for path in final["policy.path"]]
    if lacking := [file for file in files if not file.is_file()]:
        raise ValueError(
            f"evaluations must be of policies of runs by table=dynamic_beta_filters, which are read, found no "
            f"{lacking[0]}; call this where these runs lie"
        )
    configs = [OmegaConf.load(file) for file in files]
    keys = {key: [OmegaConf.select(config, key) for config in configs] for key in (FILTER, KEEP, ALPHA)}
    seeds.complete(
        "the folders of policy.path", pd.DataFrame(keys).assign(run=[str(file.parent) for file in files]), [*keys]
    )
    return filtered(pd.DataFrame(keys))


def spread(pairs: pd.DataFrame) -> pd.DataFrame:
    """Reward gaps of the pairs of a run, of outliers and of the others: mean, standard deviation, excess kurtosis (0 of
    a normal distribution) and quantiles.
    """
    found = pairs.assign(outlier=pairs["kind"] == "outlier").groupby("outlier")["gap"]
    frame = pd.DataFrame({"mean": found.mean(), "std": found.std(), "kurtosis": found.apply(pd.Series.kurt)})
    return frame.assign(**{name: found.quantile(share) for name, share in QUANTILES.items()}).reset_index()


def over_beta(final: pd.DataFrame) -> pd.DataFrame:
    """Figures 1b and 2: score by beta (rows) and gap of the pairs."""
    return seeds.grid(seeds.trained(final), "beta", [GAP], "score", name="gap {}".format)


def table_2(mixtures: pd.DataFrame) -> pd.DataFrame:
    """Score by the share of pairs of high gap (rows) and the level of beta, without outliers."""
    return seeds.grid(named(usual(mixtures)), GAP, ["method"], "score")


def usual(mixtures: pd.DataFrame) -> pd.DataFrame:
    """Trained runs without outliers."""
    found = seeds.trained(mixtures) if "untrained" in mixtures else mixtures
    return found[found[OUTLIERS].fillna(0) == 0] if OUTLIERS in found else found


def named(mixtures: pd.DataFrame) -> pd.DataFrame:
    found = mixtures.assign(method=mixtures[LEVEL].map(lambda level: LEVELS.get(level, level)))
    return found.sort_values("method", key=lambda column: column.map([*LEVELS.values()].index), kind="stable")


def of_methods(final: pd.DataFrame) -> pd.DataFrame:
    """Figure 5: score of each filter or objective (rows) with a constant and with a dynamic beta."""
    parts = seeds.trained(final)["method"].str.split(", ", n=1, expand=True)
    table: dict[str, dict[str, str]] = {CONSTANT: {}, DYNAMIC: {}}
    for (row, column), same in seeds.trained(final).assign(row=parts[0], column=parts[1]).groupby(["row", "column"]):
        table[str(column)][str(row)] = seeds.cell(same, "score")
    return pd.DataFrame(table).fillna("").rename_axis("method")


def over_temperature(temperatures: pd.DataFrame) -> pd.DataFrame:
    """Figure 4: score by sampling temperature (rows) and method."""
    return seeds.grid(temperatures, TEMPERATURE, ["method"], "score")


def beside_published(filters: pd.DataFrame) -> pd.DataFrame:
    """Win rates in percent of DPO and beta-DPO: Table 1 of the paper, and ours, which is over another baseline."""
    paper = published.BETA_DPO.map("{:.2f}".format).rename(index="published, {} on HH".format)
    ours = seeds.trained(filters)
    ours = ours.assign(score=ours["score"] * (100 if ours["scored_by"].eq("win_rate").all() else 1))
    cells = {"DPO": ours[ours["method"] == PLAIN], "beta-DPO": ours[ours["method"] == WHOLE]}
    row = {name: seeds.cell(same, "score", ".2f") for name, same in cells.items()}
    over = beaten(filters).replace("initial policy", "policy before training")
    return pd.concat([paper, pd.DataFrame(row, index=[f"ours, over {over}"])]).rename_axis("policy")


def slopes(final: pd.DataFrame, gap: str) -> pd.DataFrame:
    """Change of the score for ten times the beta, by least squares, of each seed that has every beta of this gap."""
    same = seeds.trained(final)
    return seeds.slopes(same[same[GAP].map(short) == gap])


def averaged(frame: pd.DataFrame, over: str, value: str = "score") -> pd.DataFrame:
    """The mean of a value over all settings of `over`, of each seed that has all of them."""
    whole = seeds.wide(frame, over, value).dropna()
    return whole.mean(axis=1).rename(value).reset_index()


def claims_of_gaps(final: pd.DataFrame) -> list[seeds.Finding]:
    """That the score falls with beta where gaps are low, and rises where they are high."""
    low, high = slopes(final, "low"), slopes(final, "high")
    what = "change of the score for ten times the beta"
    return [
        seeds.holds("1a. With low gaps a smaller beta is better", f"less the {what}", -seeds.interval(low["slope"])),
        seeds.holds("1b. With high gaps a larger beta is better", what, seeds.interval(high["slope"])),
        seeds.holds(
            "1c. High gaps want a larger beta than low ones do",
            f"{what}, of high gaps minus of low",
            seeds.paired(high, low, "slope"),
        ),
    ]


def claims_of_mixtures(mixtures: pd.DataFrame) -> list[seeds.Finding]:
    """That the batch's beta helps and the pair's hurts, on average over the shares of high pairs."""
    found, near = usual(mixtures), seeds.margin(mixtures)
    of_level = {level: averaged(found[found[LEVEL] == level], GAP) for level in LEVELS}
    plain_dpo, what = of_level["population"], "mean score over mixtures"
    batch, instance = (seeds.paired(of_level[level], plain_dpo) for level in ("batch", "instance"))
    return [
        seeds.holds("2a. A beta of each batch is better than DPO", f"{what}, minus DPO", batch, 0.0, near),
        seeds.holds("2b. A beta of each pair is worse than DPO", f"{what}, DPO minus it", -instance, 0.0, near),
    ]


def with_and_without(claim: str, final: pd.DataFrame) -> seeds.Finding:
    """That the dynamic beta is better than the constant one in every row of `of_methods`."""
    found = {str(name): same for name, same in seeds.trained(final).groupby("method", sort=False)}
    rows = [one.partition(", ")[0] for one in found if one.endswith(DYNAMIC)]
    rows = [row for row in rows if f"{row}, {CONSTANT}" in found]
    if not rows:
        return seeds.unmeasured(claim, "it takes runs with a constant and with a dynamic beta")
    parts = {
        row: seeds.paired(found[f"{row}, {DYNAMIC}"], found[f"{row}, {CONSTANT}"], looks=len(rows)) for row in rows
    }
    return seeds.all_hold(claim, "score with it minus without", parts, seeds.margin(final))


def claims_of_filters(filters: pd.DataFrame) -> list[seeds.Finding]:
    found = seeds.trained(filters)
    gain = seeds.paired(found[found["method"] == WHOLE], found[found["method"] == PLAIN])
    near = seeds.margin(filters)
    return [
        with_and_without("3a. The dynamic beta helps with every filter", filters),
        seeds.holds("3b. beta-DPO is better than DPO", "score of it minus DPO's", gain, 0.0, near),
    ]


def claim_of_temperatures(temperatures: pd.DataFrame) -> seeds.Finding:
    claim = "5. beta-DPO is better than DPO at every sampling temperature"
    mine, theirs = (temperatures[temperatures["method"] == one] for one in (WHOLE, PLAIN))
    known = sorted({*mine[TEMPERATURE]} & {*theirs[TEMPERATURE]})
    if not known:
        return seeds.unmeasured(claim, "it takes both at the same temperatures")
    parts = {
        short(at): seeds.paired(mine[mine[TEMPERATURE] == at], theirs[theirs[TEMPERATURE] == at], looks=len(known))
        for at in known
    }
    return seeds.all_hold(claim, "score of it minus DPO's at", parts, seeds.margin(temperatures))


def claims_of_sizes(final: pd.DataFrame) -> list[seeds.Finding]:
    """That beta-DPO is better with every policy, and that larger ones show what the tiny one shows of gaps."""
    same, by_gap = of_sizes(final)
    claim = "7. beta-DPO is better than DPO with every size of policy"
    mine, theirs = (same[same["method"] == one] for one in ("beta-DPO", "DPO"))
    known = [size for size in mine["policy"].unique() if size in {*theirs["policy"]}]
    if not known:
        return [seeds.unmeasured(claim, "it takes both with the same policies")]
    parts = {
        size: seeds.paired(mine[mine["policy"] == size], theirs[theirs["policy"] == size], looks=len(known))
        for size in known
    }
    found = [seeds.all_hold(claim, "score of it minus DPO's", parts, seeds.margin(final))]
    for size, of_size in by_gap.groupby("policy", sort=False):
        for one in claims_of_gaps(of_size):
            found.append(seeds.Finding(f"{size}: {one.claim}", one.measured, one.verdict))
    return found


def claims_of_pairs(pairs: pd.DataFrame) -> list[seeds.Finding]:
    """Of the reward gaps after plain DPO."""
    of_dpo = pairs[pairs[LEVEL] == "population"]
    found = usual(of_dpo)
    shares = sorted(found[GAP].unique())
    low, high = (
        (found[found[GAP] == share] for share in (shares[0], shares[-1])) if len(shares) > 1 else (found[:0],) * 2
    )
    spoiled = of_dpo[of_dpo[OUTLIERS].fillna(0) > 0] if OUTLIERS in of_dpo else of_dpo[:0]
    odd = spoiled["outlier"].astype(bool)
    tails = seeds.interval(averaged(found, GAP, "kurtosis")["kurtosis"])
    ends = f" from {short(shares[0])} to {short(shares[-1])}" if len(shares) > 1 else ""
    return [
        seeds.holds("6a. Reward gaps have heavy tails", "excess kurtosis, 0 of a normal distribution", tails),
        seeds.holds(
            "6b. They are wider the more pairs are of high gap",
            f"change of their standard deviation{ends}",
            seeds.paired(high, low, "std"),
        ),
        seeds.holds(
            "6c. Outliers have larger gaps than others (no claim of the paper)",
            "mean gap of outliers minus that of the rest",
            seeds.paired(spoiled[odd], spoiled[~odd], "mean"),
        ),
    ]


def claims(frames: Frames) -> pd.DataFrame:
    """What the paper claims, of the sweeps that there are."""
    found = claims_of_gaps(frames["runs"])
    if "mixtures" in frames:
        found += claims_of_mixtures(frames["mixtures"])
    if "filters" in frames:
        found += claims_of_filters(frames["filters"])
    if "variants" in frames:
        found.append(with_and_without("4. The dynamic beta helps other objectives, too", frames["variants"]))
    if "temperatures" in frames:
        found.append(claim_of_temperatures(frames["temperatures"]))
    if "pairs" in frames:
        found += claims_of_pairs(frames["pairs"])
    if "sizes" in frames:
        found += claims_of_sizes(frames["sizes"])
    return seeds.findings(found)


def curves(final: pd.DataFrame, across: str, line: str, title: str) -> Figure:
    """Score against `across`, a line for each value of `line`, bars: 95 % intervals."""
    drawing = Figure(figsize=(7, 4.4), layout="constrained", dpi=150)
    axis: Any = drawing.subplots()
    tidy(axis, f"score over {title}", title, "score")
    if across == "beta":
        axis.set_xscale("log")
        plain(axis.xaxis)
    for colour, (key, same) in zip(cycle(COLOURS), final.groupby(final[line].map(short), sort=False), strict=False):
        points = [(x, seeds.interval(one["score"])) for x, one in same.groupby(across)]
        xs, found = zip(*points, strict=True)
        half = [one.half if one.seeds > 1 else 0.0 for one in found]
        axis.errorbar(xs, [one.mean for one in found], half, color=colour, marker="o", ms=5, capsize=2, label=key)
    axis.legend(title=line, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing


def boxes(pairs: pd.DataFrame) -> Figure:
    """Reward gaps after training by setting: box p25 to p75, whiskers p10 to p90, dots p1 and p99, means over seeds."""
    known = [key for key in (LEVEL, GAP, OUTLIERS, "outlier") if key in pairs]
    means = pairs.groupby(known, sort=False, dropna=False)[[*QUANTILES, "mean"]].mean()
    drawing = Figure(figsize=(2 + 0.5 * len(means), 4.8), layout="constrained", dpi=150)
    axis: Any = drawing.subplots()
    tidy(axis, "reward gaps after training", " | ".join(known), "beta * (log-ratio chosen - rejected)")
    stats = [
        {"label": ", ".join(map(short, setting if isinstance(setting, tuple) else (setting,))), "med": row["p50"]}
        | {"q1": row["p25"], "q3": row["p75"], "whislo": row["p10"], "whishi": row["p90"]}
        | {"mean": row["mean"], "fliers": [row["p1"], row["p99"]]}
        for setting, row in means.iterrows()
    ]
    axis.bxp(stats, showmeans=True)
    axis.tick_params(axis="x", rotation=90)
    return drawing


def study(frames: Frames) -> tuple[dict[str, pd.DataFrame], dict[str, Figure]]:
    """Tables and figures of what `read` has read, by name."""
    settings: dict[str, Sequence[str]] = {"runs": [GAP, "beta"], "mixtures": [LEVEL, GAP]}
    tables: dict[str, pd.DataFrame] = {}
    figures: dict[str, Figure] = {}
    shown: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
        **{"runs": over_beta, "mixtures": table_2, "filters": of_methods, "variants": of_methods},
        "temperatures": over_temperature,
    }
    titles = {"runs": "figure_2", "mixtures": "table_2", "filters": "filters", "variants": "variants"}
    for name, make in shown.items():
        if name in frames:
            title = titles.get(name, "figure_4")
            tables[title] = make(frames[name])
            whole = usual(frames[name])
            keys = settings.get(name, ["method"] if name != "temperatures" else ["method", TEMPERATURE])
            tables[f"{title}_measures"] = seeds.states(whole, keys)
    if "filters" in frames:
        tables["beside_published"] = beside_published(frames["filters"])
    figures["figure_2"] = curves(seeds.trained(frames["runs"]), "beta", GAP, "beta")
    if "temperatures" in frames:
        figures["figure_4"] = curves(frames["temperatures"], TEMPERATURE, "method", "sampling temperature")
    if "pairs" in frames:
        figures["gaps"] = boxes(frames["pairs"])
    if "sizes" in frames:
        same, by_gap = of_sizes(frames["sizes"])
        tables["table_1"] = seeds.grid(same, "policy", ["method"], "score")
        tables["table_1_measures"] = seeds.states(same, ["policy", "method"])
        if len(by_gap):
            lines = by_gap.assign(line=by_gap["policy"] + ", gap " + by_gap[GAP].map(short))
            tables["figure_1b"] = seeds.grid(lines, "beta", ["line"], "score")
            tables["figure_1b_measures"] = seeds.states(lines, ["line", "beta"])
            figures["figure_1b"] = curves(lines, "beta", "line", "beta")
    return tables | {"claims": claims(frames)}, figures


if __name__ == "__main__":
    main(__doc__, read, study)
