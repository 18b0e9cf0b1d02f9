"""From prompts and a judge to a better summarizer: Anyscale's case study (2024) in the embedded world.

    python -m analysis.summarization runs/summarization
    python -m analysis.summarization runs/summarization runs/rounds      with rounds, and one round of their budget

prints the tables and the findings, and writes them, the figures and the numbers of each run beside the runs.
"""

from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import seeds
from analysis.published import SUMMARIZATION
from analysis.report import Frames, main
from dpo.results import beaten, degenerate, short
from dpo.results.failures import failures
from dpo.results.figures import COLOURS, plain, tidy

SETTING = ("beta", "lr")
KEYS = (*SETTING, "seed", "loss", "best_of")
OF_ROUNDS = (*SETTING, "seed", "round", "reference", "data.train")
MEASURES = {  # columns of the results: title as in the case study, measure, format
    "three right or more": ("enough", ".3f"),
    "four right or more": ("four_correct", ".3f"),
    "median compression": ("compression/median", ".3f"),
    "mean compression": ("compression", ".3f"),
    "too long": ("too_long", ".3f"),
    "invalid characters": ("invalid", ".3f"),
    "win rate": ("score", ".3f"),
    "wrong": ("wrong", ".2f"),
    "KL": ("kl", ".1f"),
}
DETECTORS = {  # of the failures that the case study names
    "ended": ("ended", ".3f"),
    "length": ("length", ".1f"),
    "broken": ("broken", ".3f"),
    "repetition": ("repetition", ".3f"),
    "valid": ("valid", ".3f"),
    "wrong": ("wrong", ".2f"),
    "KL": ("kl", ".1f"),
}


def read(path: str | Path, rounds: str | Path | None = None, **only: str) -> Frames:
    """The finished runs of a sweep by `table=summarization`, and of one by `table=rounds`. only: values of keys.

    runs: a row per run, best of n among them. rounds: a row per round, and per run of one round on as many samples.

    Raises: ValueError as `seeds.finished`, or if there is no run of DPO.
    """
    final = seeds.finished(path, KEYS, only, optional=KEYS)  # best of n has neither beta nor loss
    final = final.reindex(columns=[*dict.fromkeys([*final, *KEYS])])
    if of_dpo(final).empty:
        raise ValueError(f"{path} must hold runs of loss=dpo, which all are compared with, found none: run them")
    if rounds is None:
        return {"runs": final}
    chains = seeds.finished(rounds, OF_ROUNDS, only, optional=["round", "data.train"])
    chains = chains.reindex(columns=[*dict.fromkeys([*chains, *OF_ROUNDS])])
    if last_round(chains) < 2:
        raise ValueError(f"{rounds} must hold rounds of dpo.rounds, found no second one; leave the folder out")
    return {"runs": final, "rounds": chains}


def named(same: pd.DataFrame) -> pd.DataFrame:
    """Runs with the name of their beta and learning rate, in one column `setting`."""
    names = [f"beta {short(beta)}, lr {short(lr)}" for beta, lr in zip(same["beta"], same["lr"], strict=True)]
    return same.assign(setting=pd.Series(names, same.index, dtype=object))


def of_dpo(final: pd.DataFrame) -> pd.DataFrame:
    """The runs of DPO at all settings."""
    return named(seeds.trained(final[final["best_of"].isna() & (final["loss"].fillna("dpo") == "dpo")]))


def of_sft(final: pd.DataFrame) -> pd.DataFrame:
    """The runs of SFT on the chosen samples, at all learning rates."""
    same = seeds.trained(final[final["loss"] == "sft"])
    return same.assign(setting=same["lr"].map(lambda lr: f"lr {short(lr)}"))


def best_of(final: pd.DataFrame, n: int) -> pd.DataFrame:
    """Best of n samples of the untuned policy; of 1 the policy itself."""
    return final[final["best_of"] == n]


def sampled(final: pd.DataFrame) -> list[int]:
    """The n of best of n above 1."""
    return sorted(int(n) for n in final["best_of"].dropna().unique() if n > 1)


def of_round(rounds: pd.DataFrame, number: int) -> pd.DataFrame:
    """A round of the chains, at all their settings: each held to the round before, on fresh prompts."""
    chains = named(rounds[(rounds["reference"] != "other") & ~offline(rounds)])
    going = chains.loc[chains["round"] > 1, "setting"].unique()
    return chains[(chains["round"] == number) & chains["setting"].isin(going)]


def offline(rounds: pd.DataFrame) -> pd.Series:
    """Which runs are one round on more articles than the rounds of chains have."""
    return rounds["data.train"] > rounds["data.train"].min()


def last_round(rounds: pd.DataFrame | None) -> int:
    return 1 if rounds is None else int(rounds["round"].fillna(1).max())


def results(final: pd.DataFrame, rounds: pd.DataFrame | None = None) -> pd.DataFrame:
    """The table of the case study: each method at its setting of best mean win rate; as published below ours.

    Where a method has several settings, the interval of its win rate holds for the best of them; others are of the runs
    shown, which were chosen by win rate.
    """
    methods = {"untuned": best_of(final, 1), "SFT on chosen": of_sft(final), "DPO": of_dpo(final)}
    if rounds is not None:
        methods |= {f"round {number}": of_round(rounds, number) for number in range(2, last_round(rounds) + 1)}
    methods |= {f"best of {n}": best_of(final, n) for n in sampled(final)}
    rows = {}
    for method, same in methods.items():
        if same.empty:
            continue
        several = "setting" in same
        top = seeds.at_best(same, "setting") if several else same
        row = {title: seeds.cell(top, value, form) for title, (value, form) in MEASURES.items()}
        if several and row["win rate"] != seeds.COLLAPSED:
            row["win rate"] = seeds.cell(top, "score", ".3f", seeds.best(same, "setting"))
        rows[f"{method}, {top['setting'].iloc[0]}" if several else method] = row
    published = {f"published, {name}": row.map("{:g} %".format) for name, row in SUMMARIZATION.iterrows()}
    table = pd.DataFrame.from_dict(rows | published, orient="index").reindex(columns=[*MEASURES])
    return table.fillna("").replace("nan %", "").rename_axis("policy")


def over_knobs(final: pd.DataFrame, value: str, form: str | None = None) -> pd.DataFrame:
    """A value of DPO by beta (rows) and learning rate (columns)."""
    return seeds.grid(of_dpo(final).sort_values("lr"), "beta", ["lr"], value, form, name="lr {}".format)


def failed(final: pd.DataFrame) -> pd.DataFrame:
    """What the detectors see in each setting of DPO and of SFT: their means, and how many runs raise an alarm."""
    rows = {}
    for loss, runs in (("DPO", of_dpo(final)), ("SFT on chosen", of_sft(final))):
        for setting, same in runs.groupby("setting", sort=False):
            row = {title: f"{same[value].mean():{form}}" for title, (value, form) in DETECTORS.items() if value in same}
            alarms = sum(bool(failures(run)) for run in same.to_dict("records"))
            broken = int(degenerate(same).sum())
            row |= {"alarms": f"{alarms} of {len(same)}", "degenerate": f"{broken} of {len(same)}"}
            rows[f"{loss}, {setting}"] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def by_round(rounds: pd.DataFrame) -> pd.DataFrame:
    """Win rate over the policy before the first round, by round and setting."""
    rows: dict[int, dict[str, str]] = {}
    for number in range(1, last_round(rounds) + 1):
        for setting, same in of_round(rounds, number).groupby("setting", sort=False):
            rows.setdefault(number, {})[str(setting)] = seeds.cell(same, "score")
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("round")


def of_equal_budget(rounds: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The last round of the chains, held to the round before or to the first policy, which is then no initial one; and
    one round on as many samples, at whose setting all are.
    """
    single = named(rounds[offline(rounds)])
    last = named(rounds[rounds["round"] == last_round(rounds)])
    last = last[last["setting"].isin(single["setting"])]
    original = last["reference"] == "other"
    return {"previous": last[~original], "original": last[original], "one round": single}


def claims(final: pd.DataFrame, rounds: pd.DataFrame | None = None) -> pd.DataFrame:
    """What the case study says, and what it does not (ours)."""
    dpo, sft, untuned, margin = of_dpo(final), of_sft(final), best_of(final, 1), seeds.margin(final)
    top, settings = seeds.at_best(dpo, "setting"), dpo["setting"].nunique()
    best, claim = seeds.best(dpo, "setting"), "1. DPO beats the untuned policy (published 74 %)"
    found = [seeds.holds(claim, "win rate", best, 0.5, margin)]
    if not seeds.over_initial(final):
        measured = f"{final['scored_by'].iloc[0]} over {beaten(final)}"
        found = [seeds.unmeasured(claim, f"it takes win rates over it, found {measured}")]
    for letter, value, claim, sign in (
        ("a", "enough", "more often has three right answers (published 65 % against 43 %)", 1),
        ("b", "compression/median", "is more concise in the median (published 0.116 against 0.127)", -1),
    ):
        # Of the runs with the best win rate, whichever they are: so many looks.
        difference = seeds.paired(top, untuned, value, looks=settings)
        what = f"{value} of DPO minus that of the untuned" if sign > 0 else f"{value} of the untuned minus that of DPO"
        found.append(seeds.holds(f"2{letter}. DPO {claim}", what, difference if sign > 0 else -difference))
    more = seeds.best_minus_best(dpo, sft, "setting")
    what = "best win rate of DPO minus that of SFT"
    found.append(seeds.holds("3. DPO is better than SFT on the chosen samples", what, more, margin=margin))
    found += [together(dpo), *breaks(dpo)]
    if rounds is not None:
        found += of_rounds(rounds)
    for n in sampled(final)[-1:]:
        over = seeds.best_minus_best(dpo, best_of(final, n).assign(setting="best"), "setting")
        claim, what = f"8. DPO is better than best of {n} of the untuned policy (ours)", "best win rate of DPO minus it"
        found.append(seeds.holds(claim, what, over, margin=margin))
    return seeds.findings(found)


def together(dpo: pd.DataFrame) -> seeds.Finding:
    """Whether beta and learning rate work on each other, at the corners of the grid: of the claim that they must be
    tuned together what can be measured with an interval.
    """
    claim = "4. beta and the learning rate must be tuned together: a weak constraint costs more at a high rate"
    betas, rates = sorted(dpo["beta"].unique()), sorted(dpo["lr"].unique())
    if len(betas) < 2 or len(rates) < 2:
        return seeds.unmeasured(claim, "it takes two betas at two learning rates")
    score = {
        (beta, rate): dpo[(dpo["beta"] == beta) & (dpo["lr"] == rate)].set_index("seed")["score"]
        for beta in (betas[0], betas[-1])
        for rate in (rates[0], rates[-1])
    }
    low, high = (score[betas[0], rate] - score[betas[-1], rate] for rate in (rates[0], rates[-1]))
    what = (
        f"win rate at beta {short(betas[0])} minus that at {short(betas[-1])}, "
        f"at lr {short(rates[0])} minus the same at {short(rates[-1])}"
    )
    return seeds.holds(claim, what, seeds.interval(low - high))


def breaks(dpo: pd.DataFrame) -> list[seeds.Finding]:
    """Whether the weakest constraint at the highest rate fails as the case study says of bad settings: beside the best
    setting, which it may be itself.
    """
    wild = dpo[(dpo["beta"] == dpo["beta"].min()) & (dpo["lr"] == dpo["lr"].max())]
    top, settings = seeds.at_best(dpo, "setting"), dpo["setting"].nunique()
    found = []
    for letter, value, claim in (("a", "ended", "do not end"), ("b", "valid", "end in gibberish")):
        claim = f"5{letter}. Responses of bad settings {claim}"
        if {*top["setting"]} == {*wild["setting"]}:
            needs = "it takes a better setting than the smallest beta at the highest learning rate"
            found.append(seeds.unmeasured(claim, needs))
            continue
        less = seeds.paired(top, wild, value, looks=settings)
        names = f"at {top['setting'].iloc[0]} minus that at {wild['setting'].iloc[0]}"
        found.append(seeds.holds(claim, f"share {value} {names}", less))
    return found


def of_rounds(rounds: pd.DataFrame) -> list[seeds.Finding]:
    """What further rounds are good for, at the best setting of each; and whom a later one is held to."""
    found, margin, what = [], seeds.margin(rounds), "best win rate of it minus that of the other"
    for number in range(2, last_round(rounds) + 1):
        gain = seeds.best_minus_best(of_round(rounds, number), of_round(rounds, number - 1), "setting")
        found.append(seeds.holds(f"6. Round {number} improves on round {number - 1}", what, gain, margin=margin))
    of = of_equal_budget(rounds)
    more, nearer = (seeds.paired(of["previous"], of[name]) for name in ("one round", "original"))
    claim, what = (
        "7a. Rounds are better than one round on as many samples",
        "win rate of the last minus that of one round",
    )
    found.append(seeds.holds(claim, what, more, margin=margin))
    claim = "7b. A later round should be held to the round before, not to the first policy (ours)"
    return [*found, seeds.holds(claim, "win rate of the last rounds, previous minus original", nearer, margin=margin)]


def figures(final: pd.DataFrame, rounds: pd.DataFrame | None) -> dict[str, Figure]:
    """Win rate and KL of DPO over its two knobs; and the frontier, with SFT, rounds and best of n."""
    return {"knobs": knobs(final), "frontier": frontier(final, rounds)}


def knobs(final: pd.DataFrame) -> Figure:
    """A panel for the win rate and one for KL, a line for each learning rate; bars: 95 % intervals over seeds."""
    dpo = of_dpo(final)
    drawing = Figure(figsize=(11, 4.2), layout="constrained", dpi=150)
    panels = zip(drawing.subplots(1, 2), (("score", "win rate"), ("kl", "KL (nats per response)")), strict=True)
    for axis, (value, title) in panels:
        tidy(axis, title, "beta", title)
        axis.set_xscale("log")
        plain(axis.xaxis)
        if value == "kl":
            axis.set_yscale("log")
            plain(axis.yaxis)
        else:
            axis.axhline(0.5, color="0.5", lw=1, ls="--", zorder=0)
        for colour, (rate, same) in zip(cycle(COLOURS), dpo.groupby("lr"), strict=False):
            means = {beta: seeds.interval(runs[value]) for beta, runs in same.groupby("beta") if value in runs}
            points = [(beta, one.mean, one.half if one.seeds > 1 else 0.0) for beta, one in means.items()]
            if points:
                across, up, bars = map(np.array, zip(*points, strict=True))
                below = np.minimum(bars, 0.9 * up) if value == "kl" else bars  # a logarithm has no place for less
                style = {"color": colour, "marker": "o", "ms": 5, "capsize": 2, "lw": 1.6}
                axis.errorbar(across, up, [below, bars], label=f"lr {short(rate)}", **style)
    axis.legend(frameon=False)
    return drawing


def frontier(final: pd.DataFrame, rounds: pd.DataFrame | None) -> Figure:
    """Mean win rate against mean KL: lines through the betas of a learning rate, rounds, and best of n at its bound."""
    drawing = Figure(figsize=(7.5, 5), layout="constrained", dpi=150)
    axis = drawing.subplots()
    tidy(axis, "Frontier", "KL to the untuned policy (nats per response)", f"win rate over {beaten(final)}")
    axis.set_xscale("log")
    plain(axis.xaxis)
    axis.axhline(0.5, color="0.5", lw=1, ls="--", zorder=0)
    colours = cycle(COLOURS)
    for rate, same in of_dpo(final).groupby("lr"):
        path(axis, same, "beta", f"DPO, lr {short(rate)} (numbers: beta)", color=next(colours), marker="o")
    if len(sft := of_sft(final)):
        path(axis, sft, "lr", "SFT on chosen (numbers: lr)", color="0.45", marker="s")
    chains = [] if rounds is None else [of_round(rounds, number) for number in range(1, last_round(rounds) + 1)]
    for setting, same in pd.concat(chains).groupby("setting", sort=False) if chains else ():
        path(axis, same, "round", f"rounds, {setting}", color=next(colours), marker="D", ls="--")
    if sampled(final):
        best = final[final["best_of"] > 1].assign(kl=lambda runs: runs["kl_bound"])
        path(axis, best, "best_of", "best of n, at its bound of KL", color="black", marker="*", ls=":")
    axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing


def path(axis: Axes, same: pd.DataFrame, along: str, label: str, **style: str) -> None:
    """A line through the means of the runs at each value of `along`, which stands beside them."""
    means = same.groupby(along)[["kl", "score"]].mean()
    axis.plot(means["kl"], means["score"], label=label, lw=1.3, ms=5, **style)  # type: ignore[arg-type]
    for value, kl, score in means.itertuples():
        at = (kl, score)
        axis.annotate(f"{value:g}", at, (4, 4), textcoords="offset points", fontsize=6, color=style["color"])


def study(frames: Frames) -> tuple[dict[str, pd.DataFrame], dict[str, Figure]]:
    """Tables and figures of what `read` has read, by name."""
    final, rounds = frames["runs"], frames.get("rounds")
    tables = {
        "results": results(final, rounds),
        "win_rate": over_knobs(final, "score"),
        "kl": over_knobs(final, "kl", ".1f"),
        "detectors": failed(final),
    }
    if rounds is not None:
        same = [runs.assign(held_to=name) for name, runs in of_equal_budget(rounds).items()]
        tables |= {"rounds": by_round(rounds), "equal_budget": seeds.measures(pd.concat(same), ["held_to"])}
    return tables | {"claims": claims(final, rounds)}, figures(final, rounds)


if __name__ == "__main__":
    main(__doc__, read, study)
