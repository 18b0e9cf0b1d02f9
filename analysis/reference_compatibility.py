"""Is a reference necessary, and which one fits? Tables 3, 4, 5 and 7 of 2407.13709.

    python -m analysis.reference_compatibility runs/necessity runs/compatibility runs/tuned_reference
    python -m analysis.reference_compatibility runs/paper_necessity runs/paper_compatibility \\
        runs/paper_tuned_reference runs/paper_kl_strength

prints the tables and the findings, and writes them, the figures and the numbers of each run into the first folder. A
fourth folder has the runs that the other three lack: policies before training, and held to themselves.
"""

from itertools import cycle
from math import isfinite, nan
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis import seeds
from analysis.report import Frames, main
from dpo.results import short
from dpo.results.figures import COLOURS, plain, tidy

SUMMARIES = "data.summaries"  # what makes one policy another in the embedded world: the language of its demonstrations
SETTING = ("beta", "seed", "reference", SUMMARIES)
KEYS = {  # in which the runs of each sweep may differ
    "necessity": (*SETTING, "loss"),
    "compatibility": SETTING,
    "tuned": (*SETTING, "epochs"),
}
ALL_KEYS = (*SETTING, "loss", "epochs")
OPTIONAL = (SUMMARIES, "epochs")  # keys that runs may lack
ITSELF = "initial"
FITTING = {  # policy: a stronger reference that is related to it, one that is not, and one with another tokenizer
    "human": ("world_clean", "world_alien", "world_other_tokenizer"),
    "alien": ("world_alien", "world_clean", None),
    "mistral_7b": ("mistral_7b_instruct", "llama3_70b_instruct", None),
    "tulu_2_7b": ("llama3_70b_instruct", "mistral_7b_instruct", "llama3_70b_instruct"),
}
UNTUNED = "SFT"
METHODS = {
    ("dpo", "initial"): "DPO",
    ("dpo", "reference_free"): "posterior",
    ("dpo", "unconditional"): "likelihood",
    ("simpo", "reference_free"): "SimPO",
    ("orpo", "reference_free"): "ORPO",
}


def read(
    necessity: str | Path, compatibility: str | Path, tuned: str | Path, strength: str | Path | None = None, **only: str
) -> Frames:
    """The finished runs of the sweeps by `table=necessity`, `compatibility` and `tuned_reference`, by name.

    strength: of a sweep by `kl_strength`, for runs that those lack. only: values of keys, such as policy.

    Raises: ValueError as `seeds.finished`, or if the first or third sweep is of several policies.
    """
    names = {"necessity": necessity, "compatibility": compatibility, "tuned": tuned}
    frames = {name: seeds.finished(path, KEYS[name], only, ALL_KEYS, optional=OPTIONAL) for name, path in names.items()}
    for name in ("necessity", "tuned"):
        if len(found := frames[name][policies(frames[name])].unique()) > 1:
            raise ValueError(f"one policy at a time in {names[name]}: say policy={' or policy='.join(map(str, found))}")
    if strength is None:
        return frames
    more = seeds.finished(strength, SETTING, only, ALL_KEYS, optional=OPTIONAL)
    frames["necessity"] = joined(frames["necessity"], more[more["untrained"]])
    return frames | {name: joined(frames[name], more) for name in ("compatibility", "tuned")}


def joined(own: pd.DataFrame, more: pd.DataFrame) -> pd.DataFrame:
    """The runs of `own`, and those of `more` with the same policies that `own` lacks.

    Raises: ValueError if the one and the other are scored differently.
    """
    more = more[more[policies(own)].isin(own[policies(own)])]
    if more.empty:
        return own
    if ways := {*more["scored_by"]} ^ {*own["scored_by"]}:
        raise ValueError(f"runs of one table must be scored alike, found {own['run'].iloc[0]} and others by {ways}")
    both = pd.concat([own, more], ignore_index=True)
    return both.drop_duplicates([*(key for key in (*ALL_KEYS, "policy") if key in both), "untrained"])


def policies(final: pd.DataFrame) -> str:
    """The key that makes one policy another."""
    return SUMMARIES if SUMMARIES in final else "policy"


def methods(final: pd.DataFrame) -> pd.DataFrame:
    """The runs of `table=necessity` with the name of their method, in the order of METHODS; first SFT: no steps."""
    pairs = zip(final["loss"], final["reference"], final["untrained"], strict=True)
    names = [UNTUNED if start else METHODS.get((loss, held), f"{loss}, {held}") for loss, held, start in pairs]
    named = final.assign(method=names)
    named = pd.concat(seeds.parted(named))
    order = dict.fromkeys([UNTUNED, *METHODS.values(), *sorted(names)])
    return named.sort_values("method", key=lambda column: column.map([*order].index), kind="stable")


def table_3(final: pd.DataFrame) -> pd.DataFrame:
    """Score and what else is measured, at the beta of each method that has the best mean score.

    That beta has been lucky. The interval of its score allows for it (`seeds.best`), those of the other columns do not.
    """
    rows = {}
    for method, same in methods(final).groupby("method", sort=False):
        start, shown = method == UNTUNED, same if method == UNTUNED else seeds.at_best(same)
        row = {"score": seeds.cell(shown, "score", found=None if start else seeds.best(same))}
        row |= {title: seeds.cell(shown, value, form) for title, (value, form) in seeds.MEASURES.items()}
        rows[method] = row | {"beta": "" if start else short(shown["beta"].iloc[0])}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def table_3_by_beta(final: pd.DataFrame) -> pd.DataFrame:
    """Score of each method over its grid."""
    return seeds.grid(methods(seeds.trained(final)), "beta", ["method"], "score")


def table_4(final: pd.DataFrame) -> pd.DataFrame:
    """Score by beta (rows), policy and reference (columns)."""
    return seeds.grid(seeds.trained(final), "beta", [policies(final), "reference"], "score")


def table_5(final: pd.DataFrame) -> pd.DataFrame:
    """Score at the best beta of each reference, a column for each policy, and before training."""
    table = {}
    for policy, of_policy in final.groupby(policies(final), sort=False):
        column = {UNTUNED: seeds.before_training(of_policy)}
        for reference, same in seeds.trained(of_policy).groupby("reference", sort=False):
            column[str(reference)] = seeds.cell(seeds.at_best(same), "score", found=seeds.best(same))
        table[policy] = column
    names = pd.DataFrame(table).fillna("").rename_axis("reference")
    return names.sort_index(
        key=lambda index: index.map(lambda name: [UNTUNED, ITSELF, name].index(name)), kind="stable"
    )


def of_tuned(final: pd.DataFrame) -> pd.DataFrame:
    """The runs of `table=tuned_reference` with what they are held to, as `held`: itself after an earlier DPO, itself,
    or itself over as many epochs as the earlier DPO and this one have together.
    """
    final = seeds.trained(final)
    epochs = pd.to_numeric(final.get("epochs", pd.Series(nan, final.index)))
    usual = epochs[final["reference"] != ITSELF].max()
    names = [
        f"{reference}, {number:g} epochs" if number != usual and not pd.isna(number + usual) else reference
        for reference, number in zip(final["reference"], epochs, strict=True)
    ]
    return final.assign(held=names, longer=epochs >= 2 * usual, usual=epochs.eq(usual) | epochs.isna())


def table_7(final: pd.DataFrame) -> pd.DataFrame:
    """Score by beta of a policy that is held to itself after an earlier DPO, and to itself."""
    return seeds.grid(of_tuned(final), "beta", ["held"], "score")


def claims_of_necessity(final: pd.DataFrame) -> pd.DataFrame:
    """The fourth of the paper's claims, without its part on EOS (see `token_level`), and what other losses come to."""
    named, near = methods(seeds.trained(final)), seeds.margin(final)
    posterior, dpo = (named[named["method"] == name] for name in ("posterior", "DPO"))
    huge = seeds.best_minus_best(posterior[posterior["beta"] >= 10], posterior[posterior["beta"] < 10])
    longer, betas = over_betas(posterior, dpo, "length")
    found = [
        seeds.holds(
            "4a. The reference is necessary: DPO beats the posterior reward, each at its best beta",
            f"best score of DPO ({grid_of(dpo)}) minus that of posterior ({grid_of(posterior)})",
            seeds.best_minus_best(dpo, posterior),
            margin=near,
        ),
        seeds.holds(
            "4b. The posterior reward needs a huge beta", "best score from 10 on minus best below 10", huge, margin=near
        ),
        seeds.holds(
            "4c. It makes responses much longer", f"length minus that of DPO, mean over {betas}, tokens", longer
        ),
    ]
    for name in ("SimPO", "ORPO"):
        other = named[named["method"] == name]
        found.append(
            seeds.holds(
                f"Extension. {name}, which has no reference, beats DPO, each at its best beta",
                f"best score of {name} ({grid_of(other)}) minus that of DPO ({grid_of(dpo)})",
                seeds.best_minus_best(other, dpo),
                margin=near,
            )
        )
    return seeds.findings(found)


def grid_of(same: pd.DataFrame) -> str:
    """How many betas a method had, and whether the best of them may be beyond."""
    betas = sorted(same["beta"].unique())
    if not betas:
        return "no runs"
    top = seeds.at_best(same)["beta"].iloc[0]
    end = ", the end of its grid" if len(betas) > 1 and top in (betas[0], betas[-1]) else ""
    return f"{len(betas)} betas, best {short(top)}{end}"


def over_betas(one: pd.DataFrame, other: pd.DataFrame, value: str = "score") -> tuple[seeds.Interval, str]:
    """`one` minus `other`, the mean over the betas that both have, and which they are: no beta is chosen."""
    betas = sorted({*one["beta"]} & {*other["beta"]})
    if not betas or value not in one:
        return seeds.UNMEASURED, "betas that both have"
    means = []
    for side in (one, other):
        shared = side[side["beta"].isin(betas)]
        mine = seeds.wide(shared, "beta", value).dropna()  # a seed without one of the betas is out
        means.append(mine.mean(axis=1).rename(value).reset_index())
    return seeds.paired(means[0], means[1], value), f"betas {', '.join(map(short, betas))}"


def claims_of_compatibility(final: pd.DataFrame) -> pd.DataFrame:
    """The fifth of the paper's claims, for each policy."""
    found: list[seeds.Finding] = []
    for name, same in seeds.trained(final).groupby(policies(final), sort=False):
        policy = str(name)
        if policy not in FITTING:
            claim = f"5. A stronger reference helps if it fits ({policy})"
            found.append(seeds.unmeasured(claim, "FITTING lacks the policy"))
            continue
        of: dict[str, pd.DataFrame] = {
            name: same[same["reference"] == name] for name in (ITSELF, *FITTING[policy]) if name
        }
        (fits, foreign, other), near, itself = FITTING[policy], seeds.margin(final), of[ITSELF]
        stays, betas = over_betas(itself, of[foreign])
        compatible = of[fits]
        shift = seeds.paired(compatible[compatible["beta"] == 1], compatible[compatible["beta"] == 0.01])
        found += [
            seeds.holds(
                f"5a. A stronger reference that is related to the policy helps ({policy})",
                f"best score with {fits} minus with itself",
                seeds.best_minus_best(of[fits], itself),
                margin=near,
            ),
            seeds.holds(
                f"5b. One that is not does not ({policy})",
                f"best score with itself minus with {foreign}",
                seeds.best_minus_best(itself, of[foreign]),
                margin=near,
            ),
            seeds.holds(
                f"5c. It does harm at the same beta ({policy})",
                f"score with itself minus with {foreign}, mean over {betas}",
                stays,
                margin=near,
            ),
            seeds.holds(
                f"5d. The best beta of the stronger one is about 1, and not 0.01 ({policy})",
                f"score with {fits} at beta 1 minus at 0.01",
                shift,
                margin=near,
            ),
        ]
        if other:
            found.append(
                seeds.holds(
                    f"5e. Another tokenizer does not forbid a gain ({policy})",
                    f"best score with {other} minus with itself",
                    seeds.best_minus_best(of[other], itself),
                    margin=near,
                )
            )
    return seeds.findings(found)


def claims_of_tuned(final: pd.DataFrame) -> pd.DataFrame:
    """What Table 7 shows for one policy: 16.75 held to itself after DPO, 16.25 held to itself (published). The earlier
    DPO is training, too, which the paper does not control for.
    """
    held, near = of_tuned(final), seeds.margin(final)
    itself = held["reference"] == ITSELF
    tuned = held[~itself]
    control = "Extension. It is a better one than itself over as many epochs as both trainings have"
    longer = held[itself & held["longer"]]
    what = "best score held to itself after DPO minus held to itself"
    return seeds.findings(
        [
            seeds.holds(
                "Table 7. Itself after DPO is a better reference than itself",
                what,
                seeds.best_minus_best(tuned, held[itself & held["usual"]]),
                margin=near,
            ),
            seeds.unmeasured(
                control, f"no runs of reference={ITSELF} over twice the epochs, so the claim above is not controlled"
            )
            if longer.empty
            else seeds.holds(
                control, f"{what} over twice the epochs", seeds.best_minus_best(tuned, longer), margin=near
            ),
        ]
    )


def figure(final: pd.DataFrame, columns: str, panels: str | None = None) -> Figure:
    """Score and length against beta, a line for each of `columns`, a row for each of `panels`."""
    won = final["scored_by"].eq("win_rate").all()
    shown = {"score": "win rate" if won else "length-controlled win rate (%)", "length": "tokens per response"}
    final = final.reindex(columns=[*dict.fromkeys([*final, *shown])])
    groups = list(final.groupby(panels, sort=False)) if panels else [("", final)]
    drawing = Figure(figsize=(11, 3.8 * len(groups)), layout="constrained", dpi=150)
    for axes, (title, rows) in zip(drawing.subplots(len(groups), 2, squeeze=False), groups, strict=True):
        for axis, (value, label) in zip(axes, shown.items(), strict=True):
            tidy(axis, str(title), "beta", label)
            axis.set_xscale("log")
            plain(axis.xaxis)
            for colour, (name, line) in zip(cycle(COLOURS), rows.groupby(columns, sort=False), strict=False):
                points = {beta: seeds.interval(same[value]) for beta, same in line.groupby("beta")}
                means = [one.mean for one in points.values()]
                halves = [one.half if isfinite(one.half) else 0.0 for one in points.values()]
                axis.errorbar(list(points), means, halves, color=colour, marker="o", ms=4, capsize=2, label=str(name))
        if won:
            axes[0].axhline(0.5, color="0.5", lw=1, ls="--", zorder=0)
        axes[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing


def study(frames: Frames) -> tuple[dict[str, pd.DataFrame], dict[str, Figure]]:
    """Tables and figures of what `read` has read, by name."""
    needed, fitting, after = (frames[name] for name in ("necessity", "compatibility", "tuned"))
    claims = [claims_of_necessity(needed), claims_of_compatibility(fitting), claims_of_tuned(after)]
    tables = {
        "table_3": table_3(needed),
        "table_3_by_beta": table_3_by_beta(needed),
        "table_4": table_4(fitting),
        "table_4_measures": seeds.measures(seeds.trained(fitting), [policies(fitting), "reference", "beta"]),
        "table_5": table_5(fitting),
        "table_7": table_7(after),
        "table_7_measures": seeds.measures(of_tuned(after), ["held", "beta"]),
        "claims_of_references": pd.concat(claims),
    }
    figures = {
        "necessity": figure(methods(seeds.trained(needed)), "method"),
        "compatibility": figure(seeds.trained(fitting), "reference", policies(fitting)),
    }
    return tables, figures


if __name__ == "__main__":
    main(__doc__, read, study)
