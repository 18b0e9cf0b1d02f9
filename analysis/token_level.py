"""Which tokens does fine-tuning move? Figures 1 to 3 of 2407.13709, and by position and by right and wrong values.

    python -m analysis.token_level runs/kl_strength runs/necessity
    python -m analysis.token_level runs/paper_kl_strength runs/paper_necessity policy=mistral_7b

scores the held-out pairs of every finished run under its policy before and after training. The second folder, which is
optional, holds the methods of Figure 3.
"""

from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from analysis.kl_strength import at_best_lr, of_one_policy
from analysis.reference_compatibility import KEYS, OPTIONAL, methods
from analysis.report import Frames, main
from analysis.seeds import (
    Interval,
    best_minus_best,
    findings,
    finished,
    holds,
    interval,
    paired,
    trained,
    unmeasured,
)
from dpo import score
from dpo.data.chats import ends
from dpo.references import Frozen, Initial
from dpo.results import short
from dpo.results.figures import colours, tidy
from dpo.settings import policy_spec, scoring_of
from dpo.sweep.signature import instantiate
from dpo.training.log import progress
from dpo.world.language import values_told

OFTEN = 100  # occurrences from which on a token's mean is shown (the paper's)
BINS = [float(edge) for edge in np.arange(-100, 20)]  # nats; the paper's widths are not known
METHODS = ["DPO", "posterior", "likelihood"]  # of Figure 3


def tokens(run: str | Path, split: str = "validation") -> pd.DataFrame:
    """A row per response token of the held-out pairs, chosen and rejected, of one finished run.

    Columns: pair, response, position (from 0), token (its text), end (of turn), before and after (log-probs in nats
    under the initial policy and the trained one), difference. Where the articles are the embedded world's also `value`:
    "right" or "wrong" for the value that a clause states.
    """
    run = Path(run)
    config: Any = OmegaConf.load(run / "config.yaml")
    config = OmegaConf.merge(config, {"per_token": True})
    tokenizer, pairs = score.encode(config, dataset := instantiate(config.data))
    start, policy, pairs = score.prepare(config, dataset, instantiate(config.judge), tokenizer, pairs)
    given = policy_spec(config, start), policy, {split: pairs[split]}, scoring_of(config)
    before, after = Initial().prepare(*given), Frozen(str(run / "policy")).prepare(*given)
    rows, stops = [], ends(tokenizer, policy.generation_config)
    of_world = config.data._target_.endswith("language.world")
    for kind, name in enumerate(("chosen", "rejected")):
        for number, pair in enumerate(pairs[split]):
            ids = (pair.chosen, pair.rejected)[kind][1]
            frame = pd.DataFrame(
                {
                    "pair": number,
                    "response": name,
                    "position": range(len(ids)),
                    "token": [tokenizer.decode([id]) for id in ids],
                    "end": [id in stops for id in ids],
                    "before": before.tokens[split][kind * len(pairs[split]) + number].numpy(),
                    "after": after.tokens[split][kind * len(pairs[split]) + number].numpy(),
                }
            )
            if of_world and pair.text is not None:
                frame["value"] = values_told(str(pair.text.prompt), frame["token"].str.strip().tolist())
            rows.append(frame)
    found = pd.concat(rows, ignore_index=True)
    return found.assign(difference=found["after"] - found["before"])


def of_runs(path: str | Path, final: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """`tokens` of the runs of `final` in a sweep's folder, with their settings of `keys` as columns."""
    frames = []
    for _, row in progress([*final.iterrows()], name=f"tokens of the runs in {path}"):
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # each run says what it loads
            frames.append(tokens(Path(path) / row["run"]).assign(**{key: row[key] for key in keys}))
    return pd.concat(frames, ignore_index=True)


def read(strength: str | Path, necessity: str | Path | None = None, **only: str) -> Frames:
    """Mean log-probs of the tokens of a sweep by `figure=kl_strength`, at the learning rate of the best score, and of
    one by `table=necessity`; with their number as `occurrences`. only: values of keys, such as policy.

    items: difference by beta, seed and vocabulary item. positions: by beta, seed and position. values, in the embedded
    world: by beta, seed and kind of value. ends, with `necessity`: log-prob of EOS after training, by method, seed and
    response.
    """
    final = at_best_lr(trained(of_one_policy(strength, only)))
    found = of_runs(strength, final, ["beta", "seed"])
    frames = {
        "items": means(found, ["beta", "seed", "token", "end"]),
        "positions": means(found, ["beta", "seed", "position"]),
    }
    if "value" in found:
        kind = found["value"].fillna("other").where(~found["end"], "EOS")
        frames["values"] = means(found.assign(kind=kind), ["beta", "seed", "kind"])
    if necessity is None:
        return frames
    needed = methods(trained(finished(necessity, KEYS["necessity"], only, optional=OPTIONAL)))
    needed = needed[needed["method"].isin(METHODS)]
    if needed.empty:
        raise ValueError(f"{necessity} must hold trained runs of {', '.join(METHODS)}, found none")
    ends = of_runs(necessity, needed, ["method", "seed"])
    return frames | {"ends": means(ends[ends["end"]], ["method", "seed", "response"], "after")}


def means(found: pd.DataFrame, keys: list[str], value: str = "difference") -> pd.DataFrame:
    """Mean of a value and number of occurrences at each setting of `keys`.

    found: of `tokens`, a row per token, or of this function, a row per group of them.
    """
    number = found["occurrences"] if "occurrences" in found else pd.Series(1, found.index)
    sums = found[keys].assign(sums=found[value] * number, occurrences=number).groupby(keys).sum()
    return pd.DataFrame({value: sums["sums"] / sums["occurrences"], "occurrences": sums["occurrences"]}).reset_index()


def by_token(items: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Mean difference and number of occurrences of each vocabulary item, at each setting of `keys`."""
    return means(items, [*keys, "token", "end"])


def bins(items: pd.DataFrame) -> pd.DataFrame:
    """Figure 1: share of vocabulary items by their mean difference, a column for each beta."""
    clipped = items["difference"].clip(BINS[0], BINS[-1] - 1e-6)
    counts = items.assign(bin=pd.cut(clipped, BINS, right=False)).groupby(["beta", "bin"], observed=False).size()
    table = (counts / items.groupby("beta").size()).unstack("beta").rename_axis("mean difference (nats)")
    seen = np.flatnonzero(table.sum(axis=1))
    return table.iloc[seen[0] : seen[-1] + 1]


def most_moved(items: pd.DataFrame, number: int = 10) -> pd.DataFrame:
    """Figure 2: the items that fell most on average over betas, of those seen `OFTEN`, a column for each beta."""
    often = items[items["occurrences"] >= OFTEN]
    table = often.pivot_table(index="token", columns="beta", values="difference")
    return table.loc[table.mean(axis=1).sort_values().index[:number]]


def end_of_text(ends: pd.DataFrame) -> pd.DataFrame:
    """Figure 3: mean log-prob of EOS after training, and that on chosen minus on rejected; by method and seed."""
    table = ends.pivot(index=["method", "seed"], columns="response", values="after")
    table = table.reindex(columns=["chosen", "rejected"])
    mean = means(ends, ["method", "seed"], "after").set_index(["method", "seed"])["after"]
    return pd.DataFrame({"log-prob": mean, "chosen minus rejected": table["chosen"] - table["rejected"]}).reset_index()


def claims(items: pd.DataFrame) -> pd.DataFrame:
    """The third of the paper's claims, at the smallest and the largest beta of a sweep over seeds."""
    low, high = items["beta"].min(), items["beta"].max()
    by_seed = means(items, ["beta", "seed"])
    at_low = items[items["beta"] == low]
    lowered = interval(-by_seed[by_seed["beta"] == low]["difference"])
    more = paired(by_seed[by_seed["beta"] == high], by_seed[by_seed["beta"] == low], "difference")
    share = interval(at_low.groupby("seed")["difference"].apply(tenth))
    eos, rival = end_against_rivals(at_low)
    rises = "3b. The smaller beta, the more"
    return findings(
        [
            holds(
                "3a. Fine-tuning lowers the log-probability of tokens overall",
                f"mean fall per token at beta {short(low)}, nats",
                lowered,
            ),
            holds(rises, f"fall at beta {short(low)} minus that at {short(high)}, nats", more)
            if low < high
            else unmeasured(rises, "it takes two betas or more"),
            holds(
                "3c. A tenth of the vocabulary makes most of the change",
                f"its share of the change at beta {short(low)}",
                share,
                0.5,
            ),
            holds(
                "3d. EOS falls most",
                f"fall of EOS minus that of the item that falls most ({rival}) at beta {short(low)}, nats",
                eos,
            ),
        ]
    )


def tenth(differences: pd.Series) -> float:
    """Share of the change of all items that the tenth of them with the largest makes."""
    change = differences.abs().sort_values(ascending=False)
    return float(change.head(max(1, len(change) // 10)).sum() / change.sum())


def end_against_rivals(items: pd.DataFrame) -> tuple[Interval, str]:
    """By how much EOS falls more than the other item that truly falls most, whichever it is, and which seems to.

    items: at one beta. Only items that are seen `OFTEN` over all seeds, and in each of them, compete.
    """
    falls = items.assign(fall=-items["difference"])
    ends, others = falls[falls["end"]], falls[~falls["end"]].groupby("token")
    often = others["occurrences"].transform("sum") >= OFTEN
    everywhere = others["seed"].transform("nunique") == items["seed"].nunique()
    rivals = falls[~falls["end"]][often & everywhere]
    if rivals.empty:
        return interval(pd.Series(dtype=float)), "none is seen often enough"
    found = best_minus_best(ends, rivals, key="token", value="fall")
    return found, str(rivals.groupby("token")["fall"].mean().idxmax())


def claims_of_ends(ends: pd.DataFrame) -> pd.DataFrame:
    """The part of the paper's fourth claim that is about EOS. ends: of `end_of_text`."""
    posterior, found = ends[ends["method"] == "posterior"], []
    for method in ("DPO", "likelihood"):
        other = ends[ends["method"] == method]
        lower, parted = (paired(other, posterior, value) for value in ("log-prob", "chosen minus rejected"))
        found += [
            holds(
                f"4d. The posterior reward has the lowest log-prob of EOS (against {method})",
                f"{method} minus posterior, over all betas, nats",
                lower,
            ),
            holds(
                f"4e. It separates chosen from rejected least by it (against {method})",
                f"chosen minus rejected, {method} minus posterior, nats",
                parted,
            ),
        ]
    return findings(found)


def by_position(positions: pd.DataFrame) -> pd.DataFrame:
    """Extension: mean difference by position in the response, where at least `OFTEN` tokens are."""
    grouped = means(positions, ["beta", "position"])
    often = grouped[grouped["occurrences"] >= OFTEN]
    return often.pivot(index="position", columns="beta", values="difference")


def by_value(values: pd.DataFrame) -> pd.DataFrame:
    """Extension: mean difference of values that a response states, right ones and wrong ones, and of other tokens."""
    table = means(values, ["kind", "beta"]).pivot(index="kind", columns="beta", values="difference")
    return table.rename_axis("token")


def figure_1(table: pd.DataFrame) -> Figure:
    """The histogram that `bins` counts, on a logarithmic scale."""
    drawing = Figure(figsize=(7, 4), layout="constrained", dpi=150)
    axis = drawing.subplots()
    tidy(axis, "Vocabulary items by mean change", "mean log-prob after minus before (nats)", "share of items")
    axis.set_yscale("log")
    edges = [table.index[0].left, *(bin.right for bin in table.index)]
    for beta, colour in colours(table.columns, "beta").items():
        axis.stairs(table[beta], edges, lw=1.5, color=colour, label=short(beta))
    axis.legend(title="beta", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing


def bars(table: pd.DataFrame, title: str, across: str) -> Figure:
    """Horizontal bars: a group per row of `table`, a colour per column."""
    drawing = Figure(figsize=(7, 1.2 + 0.4 * len(table)), layout="constrained", dpi=150)
    axis = drawing.subplots()
    tidy(axis, title, across, "")
    if table.empty:  # no item is seen often enough
        return drawing
    height = 0.8 / len(table.columns)
    for number, (column, colour) in enumerate(colours(table.columns, str(table.columns.name)).items()):
        axis.barh(np.arange(len(table)) + number * height, table[column], height, color=colour, label=short(column))
    axis.set_yticks(np.arange(len(table)) + 0.4 - height / 2, [str(name) for name in table.index])
    axis.invert_yaxis()
    axis.legend(title=table.columns.name, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing


def lines(table: pd.DataFrame, title: str) -> Figure:
    """A line for each column of `table` over its index."""
    drawing = Figure(figsize=(7, 4), layout="constrained", dpi=150)
    axis = drawing.subplots()
    tidy(axis, title, str(table.index.name), "mean log-prob after minus before (nats)")
    for column, colour in colours(table.columns, str(table.columns.name)).items():
        axis.plot(table.index, table[column], color=colour, label=short(column))
    axis.axhline(0, color="0.5", lw=1, ls="--", zorder=0)
    if len(table):
        axis.legend(title=table.columns.name, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing


def study(frames: Frames) -> tuple[dict[str, pd.DataFrame], dict[str, Figure]]:
    """Tables and figures of what `read` has read, by name."""
    items = by_token(frames["items"], ["beta"])
    tables = {"figure_1": bins(items), "figure_2": most_moved(items), "claims_of_tokens": claims(frames["items"])}
    tables["extension_position"] = by_position(frames["positions"])
    change = "mean log-prob after minus before (nats)"
    figures = {
        "figure_1": figure_1(tables["figure_1"]),
        "figure_2": bars(tables["figure_2"], f"Most lowered tokens (seen {OFTEN} times or more)", change),
        "extension_position": lines(tables["extension_position"], "Extension: by position"),
    }
    if "values" in frames:
        tables["extension_value"] = by_value(frames["values"])
        figures["extension_value"] = bars(tables["extension_value"], "Extension: right and wrong values", change)
    if "ends" in frames:
        ends = end_of_text(frames["ends"])
        tables["claims_of_ends"] = claims_of_ends(ends)
        tables["figure_3"] = ends.groupby("method")[["log-prob", "chosen minus rejected"]].mean()
        figures["figure_3"] = bars(tables["figure_3"], "EOS after training", "log-prob (nats)")
    return tables, figures


if __name__ == "__main__":
    main(__doc__, read, study)
