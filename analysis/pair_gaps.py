"""How far apart a finished run holds the two responses of each of its training pairs, and what each pair weighs."""

from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import OmegaConf

from dpo import score
from dpo.losses import Loss, PairLogps
from dpo.losses.pairs import frozen, metrics
from dpo.references import Frozen, Initial
from dpo.settings import judge_of, policy_spec, scoring_of
from dpo.sweep.inputs import load
from dpo.sweep.signature import instantiate
from dpo.training.log import progress


def gaps(run: str | Path, split: str = "train") -> pd.DataFrame:
    """A row per pair of one finished run, as it was treated, with its label. The reference is the policy before
    training, whatever the run was held to.

    Columns: `kind` and `flipped` (see docs/pairs.md), `gap`, the reward gap after training, beta * (log-ratio of chosen
    less that of rejected), and those of `weights` and `ranked`, under the run's objective as evaluation has it.
    """
    run = Path(run)
    config: Any = OmegaConf.load(run / "config.yaml")
    dataset = load(config)
    start, policy, pairs = score.prepare(config, dataset, judge_of(config), *score.encode(config, dataset))
    given = policy_spec(config, start), policy, {split: pairs[split]}, scoring_of(config)
    before, after = Initial().prepare(*given), Frozen(str(run / "policy")).prepare(*given)
    (chosen, rejected), (chosen_before, rejected_before) = after.table[split].T, before.table[split].T
    rows, lengths = torch.arange(len(pairs[split])), after.lengths[split].T
    pair = PairLogps(chosen, rejected, chosen_before, rejected_before, lengths[0], lengths[1], rows)
    measures = [one.text.measures if one.text else None for one in pairs[split]]
    loss = frozen(instantiate(config.loss))
    return pd.DataFrame(
        {
            "kind": [one.kind if one else None for one in measures],
            "flipped": [bool(one and one.flipped) for one in measures],
            "gap": (config.beta * pair.margins).numpy(),
            "weight": weights(loss, pair).numpy(),
            **{name: ranks.numpy() for name, ranks in ranked(loss, pair).items()},
        }
    )


def weights(loss: Callable[[PairLogps], Loss], pair: PairLogps) -> torch.Tensor:
    """Share of each pair in the gradient in the log-probs of chosen responses; they sum to 1. One batch of all pairs.

    # (N,)
    """
    chosen = pair.policy_chosen_logps.clone().requires_grad_()
    loss(replace(pair, policy_chosen_logps=chosen)).losses.mean().backward()
    slopes = torch.zeros_like(chosen) if chosen.grad is None else chosen.grad.abs()
    return slopes / slopes.sum()


def ranked(loss: Callable[[PairLogps], Loss], pair: PairLogps) -> dict[str, torch.Tensor]:
    """1 where a pair is ranked as labelled, one half in ties, which are those of a run's own accuracies: by the
    `reward`, by the `policy`, and by the reference, which is the policy `before` training here.

    # (N,) each
    """
    start = replace(
        pair, policy_chosen_logps=pair.reference_chosen_logps, policy_rejected_logps=pair.reference_rejected_logps
    )
    after, before = (metrics(one, loss(one)) for one in (pair, start))
    policy = "logps/accuracies"
    return {"reward": after["rewards/accuracies"], "policy": after[policy], "before": before[policy]}


def of_runs(
    path: str | Path,
    final: pd.DataFrame,
    keys: list[str],
    summary: Callable[[pd.DataFrame], pd.DataFrame],
    split: str = "train",
) -> pd.DataFrame:
    """What `summary` makes of the pairs of each run of `final` in a sweep's folder, with its settings of `keys`."""
    frames = []
    for _, row in progress([*final.iterrows()], name=f"pairs of the runs in {path}"):
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # each run says what it loads
            found = summary(gaps(Path(path) / row["run"], split))
        frames.append(found.assign(**{key: row[key] for key in ["run", *keys] if key in row}))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
