"""What do flipped labels cost, and which objective bears them? The claims of Dr. DPO (2407.07880).

    python -m analysis.label_noise runs/label_noise

prints the tables and the findings, and writes them, the figures and the numbers of each run beside the runs. The
paper's own numbers were not to be had, so none stand beside ours.
"""

from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis import pair_gaps, seeds
from analysis.report import Frames, main
from dpo.results import short
from dpo.results.figures import COLOURS, tidy

FLIP, PRIME = "pairs.flip", "loss.beta_prime"
KEYS = ("beta", "seed", "loss", FLIP, PRIME)
METHODS = {"dpo": "DPO", "cdpo": "cDPO", "robust": "robust DPO", "ipo": "IPO", "dr_dpo": "Dr. DPO"}
PUBLISHED_PRIME = 1.0  # beta' at which Dr. DPO is compared with others: with more tries it would be luckier
CLEAN = "rewards/accuracies"  # on held-out pairs, whose labels are never flipped
NEAR = seeds.SCORES[CLEAN][2]
SHOWN = {CLEAN: "accuracy on clean pairs", "score": "score"}


def read(path: str | Path, **only: str) -> Frames:
    """The numbers of a sweep by `table=label_noise`. only: values of keys.

    runs: a row per finished run. weights: `relative` to a clean pair, what a flipped one weighs, by run.

    Raises: ValueError as `seeds.finished`.
    """
    final = seeds.finished(path, KEYS, only, optional=[PRIME])
    noisy = compared(final)
    noisy = noisy[noisy[FLIP] > 0]
    weights = pair_gaps.of_runs(path, noisy, [*KEYS, "untrained"], relative)
    return {"runs": final, "weights": weights.reindex(columns=["run", *KEYS, "untrained", "flipped", "relative"])}


def relative(pairs: pd.DataFrame) -> pd.DataFrame:
    """The mean weight of flipped pairs as a multiple of that of clean ones, after training; `flipped`: their share."""
    mean = pairs.groupby("flipped")["weight"].mean().reindex([False, True])
    return pd.DataFrame({"flipped": [pairs["flipped"].mean()], "relative": [mean[True] / mean[False]]})


def compared(final: pd.DataFrame) -> pd.DataFrame:
    """Trained runs with the name of their method, Dr. DPO at the published beta' alone; methods in their order."""
    found = seeds.trained(final)
    order = [*METHODS, *sorted({*found["loss"]} - {*METHODS})]
    prime = found.get(PRIME, pd.Series(PUBLISHED_PRIME, found.index))
    found = found[(found["loss"] != "dr_dpo") | (prime == PUBLISHED_PRIME)]
    found = found.assign(method=found["loss"].map(lambda loss: METHODS.get(loss, loss)))
    return found.sort_values("loss", key=lambda column: column.map(order.index), kind="stable")


def at(final: pd.DataFrame, method: str, flip: float) -> pd.DataFrame:
    """The runs of a method that `compared` names at a share of flips, at all its betas."""
    return final[(final["method"] == method) & (final[FLIP] == flip)]


def over_flips(final: pd.DataFrame, value: str) -> pd.DataFrame:
    """A value of each method (columns) at its beta of best mean, which its interval allows for, by share of flips."""
    found = compared(final)
    table: dict[str, dict[str, str]] = {}
    for method, of_method in found.groupby("method", sort=False):
        for flip, same in of_method.groupby(FLIP):
            chosen = best_by(same, value)
            cell = seeds.cell(chosen, value, found=seeds.best(same, value=value))
            table.setdefault(str(method), {})[short(flip)] = cell
    order = [short(flip) for flip in sorted(found[FLIP].unique())]
    return pd.DataFrame(table).reindex(order).fillna("").rename_axis("flipped")


def best_by(same: pd.DataFrame, value: str) -> pd.DataFrame:
    """The runs at the beta of best mean value."""
    means = same.groupby("beta")[value].mean()
    return same[same["beta"] == means.idxmax()] if means.notna().any() else same


def over_prime(final: pd.DataFrame, value: str) -> pd.DataFrame:
    """A value of Dr. DPO by beta' (rows) and share of flips (columns), see `primes`."""
    return seeds.grid(primes(final), PRIME, [FLIP], value, name="flipped {}".format)


def primes(final: pd.DataFrame) -> pd.DataFrame:
    """The runs of Dr. DPO at the beta that has most values of beta'."""
    found = seeds.trained(final)
    found = found[found["loss"] == "dr_dpo"]
    if PRIME not in found or found.empty:
        return found.iloc[:0].assign(**{PRIME: []})
    return found[found["beta"] == found.groupby("beta")[PRIME].nunique().idxmax()].sort_values(FLIP, kind="stable")


def claims(final: pd.DataFrame, weights: pd.DataFrame) -> pd.DataFrame:
    """What the paper claims, each method at its best beta: intervals hold it whichever that is.

    "Heavy" is the largest share of flips at which DPO and Dr. DPO were run.
    """
    found, near = compared(final), {"score": seeds.margin(final), CLEAN: NEAR}
    flips = {method: {*of_method[FLIP]} for method, of_method in found.groupby("method")}
    both = flips.get("DPO", set()) & flips.get("Dr. DPO", set())
    heavy = max(both, default=0.0)
    dpo, robust = (at(found, method, heavy) for method in ("DPO", "Dr. DPO"))
    listed = []
    for letter, (value, title) in zip("ab", SHOWN.items(), strict=True):
        fall = seeds.best_minus_best(at(found, "DPO", 0.0), dpo, value=value) if heavy else seeds.UNMEASURED
        claim = f"1{letter}. Flipped labels cost DPO {title}"
        listed.append(seeds.holds(claim, f"without flips minus at {short(heavy)}", fall, 0.0, near[value]))
    for letter, (value, title) in zip("ab", SHOWN.items(), strict=True):
        more = seeds.best_minus_best(robust, dpo, value=value) if heavy else seeds.UNMEASURED
        claim = f"2{letter}. Under flips Dr. DPO has better {title} than DPO"
        listed.append(seeds.holds(claim, f"Dr. DPO minus DPO at {short(heavy)}", more, 0.0, near[value]))
    clean = seeds.best_minus_best(at(found, "Dr. DPO", 0.0), at(found, "DPO", 0.0))
    claim = "2c. Without flips Dr. DPO is better, too"
    listed.append(seeds.holds(claim, "score of Dr. DPO minus that of DPO", clean, 0.0, near["score"]))
    listed.append(beats_all(found, heavy))
    listed += [of_prime(final, heavy), weighs_less(weights, heavy)]
    return seeds.findings(listed)


def beats_all(found: pd.DataFrame, heavy: float) -> seeds.Finding:
    """Whether Dr. DPO has the best accuracy of all. One that is significantly better refutes it."""
    claim, mine = "3. Under flips Dr. DPO ranks clean pairs best of all", at(found, "Dr. DPO", heavy)
    others = [name for name in ("cDPO", "robust DPO", "IPO") if len(at(found, name, heavy))]
    if mine.empty or not others or not heavy:
        return seeds.unmeasured(claim, "it takes Dr. DPO and another objective at the same share of flips")
    parts = {
        f"minus {name}": seeds.best_minus_best(mine, at(found, name, heavy), value=CLEAN, looks=len(others))
        for name in others
    }
    return seeds.all_hold(claim, f"accuracy of Dr. DPO at {short(heavy)}", parts, NEAR)


def of_prime(final: pd.DataFrame, heavy: float) -> seeds.Finding:
    """Whether beta' = 1 is at least as good as any other, less `NEAR`."""
    claim, found = "4. No other beta' is much better than 1 (recalled of the paper, not read again)", primes(final)
    found = found[found[FLIP] == heavy] if len(found) else found
    one = found[found[PRIME] == PUBLISHED_PRIME] if len(found) else found
    other = found[found[PRIME] != PUBLISHED_PRIME] if len(found) else found
    if one.empty or other.empty:
        return seeds.unmeasured(claim, "it takes Dr. DPO at beta' 1 and another")
    less = seeds.best_minus_best(one, other, PRIME, CLEAN)
    what = f"accuracy at beta' 1 minus that at the best other, flips {short(heavy)}"
    return seeds.holds(claim, what, less, -NEAR)


def weighs_less(weights: pd.DataFrame, heavy: float) -> seeds.Finding:
    """Whether a flipped pair weighs less against a clean one in Dr. DPO than in DPO, at the same beta."""
    claim = "5. Dr. DPO gives flipped pairs less weight than DPO does"
    if weights.empty or not heavy:
        return seeds.unmeasured(claim, "it takes runs with flipped pairs")
    known = weights[weights[FLIP] == heavy]
    mine = known[(known["loss"] == "dr_dpo") & (known[PRIME] == PUBLISHED_PRIME)]
    theirs = known[known["loss"] == "dpo"]
    betas = sorted({*mine["beta"]} & {*theirs["beta"]})
    if not betas:
        return seeds.unmeasured(claim, "it takes DPO and Dr. DPO at the same beta and share of flips")
    parts = {}
    for beta in betas:
        dpo, robust = (one[one["beta"] == beta] for one in (theirs, mine))
        parts[f"beta {short(beta)}"] = seeds.paired(dpo, robust, "relative", len(betas))
    return seeds.all_hold(claim, "weight of a flipped pair in units of a clean one, DPO minus Dr. DPO", parts)


def weight_table(weights: pd.DataFrame) -> pd.DataFrame:
    """What a flipped pair weighs in units of a clean one, after training, by method and share of flips; by beta."""
    return seeds.grid(compared(weights), FLIP, ["method", "beta"], "relative")


def figures(final: pd.DataFrame) -> dict[str, Figure]:
    """Accuracy on clean pairs, and score, against the share of flips; accuracy against beta'."""
    found = compared(final)
    drawn = {
        "flips": curves(found, FLIP, "method", "share of labels flipped", {m: m for m in found["method"].unique()})
    }
    ours = primes(final)
    if len(ours) and ours[PRIME].nunique() > 1:
        names = {flip: f"{short(flip)} flipped" for flip in sorted(ours[FLIP].unique())}
        drawn["beta_prime"] = curves(ours, PRIME, FLIP, "beta'", names, log=True)
    return drawn


def curves(found: pd.DataFrame, across: str, line: str, title: str, names: dict[Any, str], log: bool = False) -> Figure:
    """A panel for each of `SHOWN`, a line for each value of `line`, at its beta of best mean, bars: 95 % intervals."""
    drawing = Figure(figsize=(11, 4.4), layout="constrained", dpi=150)
    for axis, (value, up) in zip(drawing.subplots(1, 2), SHOWN.items(), strict=True):
        tidy(axis, up, title, up)
        if log:
            axis.set_xscale("log")
        for colour, (key, name) in zip(cycle(COLOURS), names.items(), strict=False):
            points = []
            for x, same in found[found[line] == key].groupby(across):
                if value in same and same[value].notna().any():
                    middle = seeds.interval(best_by(same, value)[value])
                    points.append((x, middle.mean, middle.half if middle.seeds > 1 else 0.0))
            if points:
                axis.errorbar(*zip(*points, strict=True), color=colour, marker="o", ms=5, capsize=2, lw=1.6, label=name)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing


def study(frames: Frames) -> tuple[dict[str, pd.DataFrame], dict[str, Figure]]:
    """Tables and figures of what `read` has read, by name."""
    final, weights = frames["runs"], frames["weights"]
    tables = {
        "accuracy": over_flips(final, CLEAN),
        "score": over_flips(final, "score"),
        "measures": seeds.states(compared(final), ["method", FLIP, "beta"]),
    }
    if len(primes(final)):
        tables["beta_prime"] = over_prime(final, CLEAN)
    if len(weights):
        tables["weights"] = weight_table(weights)
    return tables | {"claims": claims(final, weights)}, figures(final)


if __name__ == "__main__":
    main(__doc__, read, study)
