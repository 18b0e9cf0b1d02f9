"""Is a reference necessary, and which one fits? Tables 3, 4, 5 and 7 of 2407.13709.

    python -m analysis.reference_compatibility runs/necessity runs/compatibility runs/tuned_reference

prints the tables and the findings, and writes them and the figures into the first folder.
"""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis.report import main
from analysis.seeds import Finding, cell, chosen_by_others, findings, finished, grid, holds, interval, paired
from dpo.drawing import COLOURS, plain, tidy
from dpo.runs import short

SUMMARIES = "data.summaries"  # what makes one policy another in the embedded world: the language of its demonstrations
KEYS = ("beta", "seed", "reference", "loss", SUMMARIES)
ITSELF = "initial"
TUNED = "world_tuned"
OTHER_TOKENIZER = "world_other_tokenizer"
SPEAKS = "human"  # the policy whose language that one was taught
COMPATIBLE = {"human": "world_clean", "alien": "world_alien"}  # policy -> the stronger reference of its language
UNTUNED = "SFT"
METHODS = {
    ("dpo", "initial"): "DPO",
    ("dpo", "uniform"): "posterior",
    ("dpo", "prior"): "likelihood",
    ("simpo", "uniform"): "SimPO",
    ("orpo", "uniform"): "ORPO",
}


def methods(final: pd.DataFrame) -> pd.DataFrame:
    """The runs of `table=necessity` with the name of their method, in the order of METHODS; SFT: runs of no steps."""
    names = [METHODS.get(pair) for pair in zip(final["loss"], final["reference"], strict=True)]
    names = [UNTUNED if steps == 0 else name for steps, name in zip(final["steps"], names, strict=True)]
    named = final.assign(method=pd.Categorical(names, [UNTUNED, *METHODS.values()])).dropna(subset="method")
    return named.sort_values("method", kind="stable").astype({"method": str})


def table_3(final: pd.DataFrame) -> pd.DataFrame:
    """Score, the policy's ranking accuracy, length and share of ended responses, at the best beta of each method.

    beta is chosen for each seed by the other seeds; the column shows the choices.
    """
    rows = {}
    for method, same in methods(final).groupby("method", sort=False):
        best = chosen_by_others(same, "beta")
        rows[method] = {
            "score": cell(best, "score"),
            "policy accuracy": cell(best, "logps/accuracies"),
            "length": cell(best, "length", ".1f"),
            "KL": cell(best, "kl", ".1f"),
            "ended": cell(best, "ended"),
            "beta": "" if method == UNTUNED else ", ".join(short(beta) for beta in sorted(best["beta"].unique())),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def table_3_by_beta(final: pd.DataFrame) -> pd.DataFrame:
    """Score of each method over its grid."""
    named = methods(final)
    return grid(named[named["method"] != UNTUNED], "beta", ["method"], "score")


def table_4(final: pd.DataFrame) -> pd.DataFrame:
    """Score by beta (rows), policy and reference (columns)."""
    return grid(final, "beta", [policies(final), "reference"], "score")


def policies(final: pd.DataFrame) -> str:
    """The key that makes one policy another."""
    return SUMMARIES if SUMMARIES in final else "policy"


def table_5(final: pd.DataFrame) -> pd.DataFrame:
    """Score at the best beta of each reference (chosen for each seed by the others), a column for each policy."""
    table = {
        policy: {
            reference: cell(chosen_by_others(same, "beta"), "score")
            for reference, same in of_policy.groupby("reference", sort=False)
        }
        for policy, of_policy in final.groupby(policies(final), sort=False)
    }
    return pd.DataFrame(table).rename_axis("reference")


def table_7(final: pd.DataFrame) -> pd.DataFrame:
    """Score by beta of a policy that is held to itself after an earlier DPO."""
    return grid(final, "beta", ["reference"], "score")


def claims_of_necessity(final: pd.DataFrame) -> pd.DataFrame:
    """The fourth of the paper's claims, without its part on EOS: see `token_level`."""
    named = methods(final)
    posterior, dpo = (named[named["method"] == name] for name in ("posterior", "DPO"))
    best, best_dpo = chosen_by_others(posterior, "beta"), chosen_by_others(dpo, "beta")
    is_huge = posterior["beta"] >= 10
    huge = paired(chosen_by_others(posterior[is_huge], "beta"), chosen_by_others(posterior[~is_huge], "beta"))
    difference, longer = paired(best_dpo, best), paired(best, best_dpo, "length")
    return findings(
        [
            holds(
                "4a. The reference is necessary: DPO beats the posterior reward, each at its best beta",
                "score of DPO minus posterior",
                difference,
            ),
            holds(
                "4b. The posterior reward needs a huge beta",
                "score at its best beta from 10 on minus at its best below 10",
                huge,
            ),
            holds("4c. It makes responses much longer", "length at its best beta minus that of DPO, tokens", longer),
        ]
    )


def claims_of_compatibility(final: pd.DataFrame) -> pd.DataFrame:
    """The fifth of the paper's claims, for each policy of the embedded world."""
    found: list[Finding] = []
    for policy, fits in COMPATIBLE.items():
        of_policy = final[final[policies(final)] == policy]
        if of_policy.empty:
            continue
        at_best = {
            name: chosen_by_others(of_policy[of_policy["reference"] == name], "beta")
            for name in (ITSELF, OTHER_TOKENIZER, *COMPATIBLE.values())
        }
        foreign = next(name for kind, name in COMPATIBLE.items() if kind != policy)
        gain, harm = paired(at_best[fits], at_best[ITSELF]), paired(at_best[ITSELF], at_best[foreign])
        across = paired(at_best[OTHER_TOKENIZER], at_best[ITSELF])
        all_betas = {name: over_betas(of_policy[of_policy["reference"] == name]) for name in (ITSELF, foreign)}
        everywhere = paired(all_betas[ITSELF], all_betas[foreign])
        compatible = of_policy[of_policy["reference"] == fits]
        shift = paired(compatible[compatible["beta"] == 1], compatible[compatible["beta"] == 0.01])
        found += [
            holds(
                f"5a. A stronger reference of the same language helps ({policy})",
                f"best score with {fits} minus with itself",
                gain,
            ),
            holds(
                f"5b. One of another language does not ({policy})", f"best score with itself minus with {foreign}", harm
            ),
            holds(
                f"5c. It does harm at the same beta ({policy})",
                f"mean score over betas with itself minus with {foreign}",
                everywhere,
            ),
            holds(
                f"5d. The best beta of the stronger one is about 1, and not 0.01 ({policy})",
                f"score with {fits} at beta 1 minus at 0.01",
                shift,
            ),
        ]
        if policy == SPEAKS:
            found.append(
                holds(
                    f"5e. Another tokenizer does not forbid a gain ({policy})",
                    f"best score with {OTHER_TOKENIZER} minus with itself",
                    across,
                )
            )
    return findings(found)


def over_betas(same: pd.DataFrame) -> pd.DataFrame:
    """The mean score of each seed over its betas."""
    return same.groupby("seed")["score"].mean().reset_index()


def claim_of_tuned(final: pd.DataFrame) -> pd.DataFrame:
    """What Table 7 shows for one policy: 16.75 held to itself after DPO, 16.25 held to itself (published)."""
    tuned, itself = (chosen_by_others(final[final["reference"] == name], "beta") for name in (TUNED, ITSELF))
    gain = paired(tuned, itself)
    return findings(
        [
            holds(
                "Table 7. Itself after DPO is a better reference than itself",
                "best score held to itself after DPO minus held to itself",
                gain,
            )
        ]
    )


def figure(final: pd.DataFrame, columns: str, panels: str | None = None) -> Figure:
    """Score and length against beta, a line for each of `columns`, a row for each of `panels`."""
    groups = list(final.groupby(panels, sort=False)) if panels else [("", final)]
    drawing = Figure(figsize=(11, 3.8 * len(groups)), layout="constrained", dpi=150)
    for axes, (title, rows) in zip(drawing.subplots(len(groups), 2, squeeze=False), groups, strict=True):
        for axis, value, label in zip(axes, ("score", "length"), ("score", "tokens per response"), strict=True):
            tidy(axis, str(title), "beta", label)
            axis.set_xscale("log")
            plain(axis.xaxis)
            for colour, (name, line) in zip(COLOURS, rows.groupby(columns, sort=False), strict=False):
                points = {beta: interval(same[value]) for beta, same in line.groupby("beta")}
                means, halves = [one.mean for one in points.values()], [one.half for one in points.values()]
                axis.errorbar(list(points), means, halves, color=colour, marker="o", ms=4, capsize=2, label=str(name))
        axes[0].axhline(0.5, color="0.5", lw=1, ls="--", zorder=0)
        axes[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing


def study(
    necessity: str | Path, compatibility: str | Path, tuned: str | Path, **only: str
) -> tuple[dict[str, pd.DataFrame], dict[str, Figure]]:
    """Tables and figures of the sweeps by `table=necessity`, `compatibility` and `tuned_reference`, by name.

    only: values of keys, such as policy.
    """
    needed, fitting, after = (finished(path, KEYS, only) for path in (necessity, compatibility, tuned))
    claims = [claims_of_necessity(needed), claims_of_compatibility(fitting), claim_of_tuned(after)]
    tables = {
        "table_3": table_3(needed),
        "table_3_by_beta": table_3_by_beta(needed),
        "table_4": table_4(fitting),
        "table_5": table_5(fitting),
        "table_7": table_7(after),
        "claims_of_references": pd.concat(claims),
    }
    figures = {
        "necessity": figure(methods(needed[needed["steps"] != 0]), "method"),
        "compatibility": figure(fitting, "reference", policies(fitting)),
    }
    return tables, figures


if __name__ == "__main__":
    main(__doc__, study)
