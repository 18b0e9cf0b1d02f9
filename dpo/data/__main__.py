"""A report on data before training: what is dropped, repeated or odd, how long it is, and what training on it costs.

    python -m dpo.data data=file data.path=pairs.jsonl policy.path=/models/sft

takes the keys of `dpo.train`, loads a tokenizer and no weights, and writes report.json and report.png.
"""

if __name__ == "__main__":
    from dpo.sweep import launch

    launch.command("data")  # ends here: it calls `main` of this module, imported

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import nn

from dpo.data import records, report
from dpo.data.measure import measured, measured_prompts
from dpo.policy import model as models
from dpo.policy.cost import cost, memory_of
from dpo.references import EMA, Frozen, Live
from dpo.results.figures import COLOURS, tidy
from dpo.score import treated
from dpo.settings import limits_of, policy_spec, treatment_of
from dpo.sweep.signature import instantiate
from dpo.training import distributed

MARKS = {"ok": " ", "look": "?", "bad": "!"}


def main(config: DictConfig) -> None:
    """Raises: ValueError if the data cannot be read at all, as training would."""
    spec, limits = policy_spec(config), limits_of(config)
    tokenizer = models.load_tokenizer(spec)
    on_faulty = config.data.get("on_faulty", "error")
    with heard() as refused:  # all faulty pairs are read, and counted here
        dataset = instantiate({**config.data, **({"on_faulty": "keep"} if "on_faulty" in config.data else {})})
    tables: dict[str, pd.DataFrame]
    if dataset.preferences:
        dataset.preferences.update(treated(dataset.preferences, treatment_of(config), config.seed))
        pairs = [pair for split in dataset.preferences.values() for pair in split]
        table = measured(pairs, tokenizer, config.cache)
        known = {pair.source for pair in pairs}
        refused = [(where, why) for where, why in refused if where not in known]
        findings, splits, tables = report.of_pairs(dataset, table, refused, limits, on_faulty)
    else:
        tables = {name: measured_prompts(some, tokenizer, config.cache) for name, some in dataset.prompts.items()}
        findings, splits = report.of_prompts(dataset, tables, limits)
    made = {
        "data": config.data.get("path") or config.data._target_,
        "tokenizer": spec.path,
        "splits": splits,
        "findings": report.as_json(findings),
        "cost": _cost(config, tables, bool(dataset.preferences)),
    }
    folder = Path(config.report)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(made, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    figure(tables["train"], config.max_length).savefig(folder / "report.png")
    print(
        "\n".join([*lines(made, findings), f"{folder}/report.json has examples of each, {folder}/report.png lengths"])
    )


@contextmanager
def heard() -> Iterator[list[tuple[str, str]]]:
    """What readers say of faulty rows, in place of their log lines: where, and why."""
    found: list[tuple[str, str]] = []

    def listen(record: logging.LogRecord) -> bool:
        found.extend(getattr(record, "faults", ()))
        return False

    records.logger.addFilter(listen)
    try:
        yield found
    finally:
        records.logger.removeFilter(listen)


def _cost(config: DictConfig, tables: dict[str, pd.DataFrame], paired: bool) -> dict[str, Any]:
    """Of pairs; of prompts at most, with as many pairs as may be made of them, and responses as long as they may be."""
    sizes = {}
    for split in {"train", "validation"} & tables.keys():
        rows = tables[split][tables[split].prompt >= 0]
        if paired:
            responses = rows.chosen + rows.rejected.where(rows.rejected >= 0, rows.chosen)
            sizes[split] = (rows.prompt * (1 if config.packed else 2) + responses).to_numpy()
        else:
            of_pair = rows.prompt * (1 if config.packed else 2) + 2 * config.max_new_tokens
            sizes[split] = np.repeat(of_pair.to_numpy(), config.generation.pairs_per_prompt)
    train = sizes["train"]
    count, mean = len(train), float(train.mean()) if len(train) else 0.0
    steps = config.steps if config.steps is not None else config.epochs * -(-count // config.batch_size)
    trained_on = mean * min(steps * config.batch_size, steps * count)
    if config.steps is None:
        trained_on = mean * count * config.epochs
    reference = instantiate(config.reference)
    moving = isinstance(reference, EMA | Live)
    scored = trained_on if moving else sum(map(float, (one.sum() for one in sizes.values())))
    scored *= isinstance(reference, EMA | Live | Frozen)
    model = models.without_weights(policy_spec(config))
    adapters = None
    if config.policy.lora.rank is not None:
        linear = [
            one for one in model.modules() if isinstance(one, nn.Linear) and one is not model.get_output_embeddings()
        ]
        adapters = sum(config.policy.lora.rank * sum(layer.weight.shape) for layer in linear)
    longest = int(train.max()) if count else 0
    micro = max(longest, min(config.micro_batch_tokens, round(mean * config.batch_size)))
    how = config.optimizer, config.precision, config.activation_checkpointing, moving
    expected = cost(model, adapters, trained_on, scored, micro, *how)
    device = distributed.device(config.device)
    return {
        "upper_bound": not paired,
        "steps": steps,
        "tokens": int(trained_on),
        **vars(expected),
        "device": str(device),
        "device_memory": memory_of(device),
    }


def lines(made: dict[str, Any], findings: Sequence[report.Finding]) -> Iterator[str]:
    """The terminal's table."""
    yield f"{made['data']}, in tokens of {made['tokenizer']}"
    yield f"\n  {'tokens':24}" + "".join(f"{name:>8}" for name in ("min", "5%", "50%", "95%", "99%", "max"))
    for split, numbers in made["splits"].items():
        for name, values in numbers["lengths"].items():
            yield f"  {f'{split} {name}':24}" + "".join(f"{value:8.0f}" for value in values.values())
    yield "\n  ! stops or misleads training   ? worth a look   (held-out lines that are fine are in report.json)"
    shown = [one for one in findings if one.verdict != "ok" or one.split in ("train", "all")]
    for one in sorted(shown, key=lambda one: ["bad", "look", "ok"].index(one.verdict)):
        said = one.note or f"{one.count:,} of {one.of:,}"
        yield f"{MARKS[one.verdict]} {one.split:10} {one.name:45} {said:>28}  {one.advice}"
    of, bound = made["cost"], "at most " * made["cost"]["upper_bound"]
    needed = of["weights"] + of["activations"]
    fits = needed < of["device_memory"]
    yield f"\n  {bound}{of['steps']:,} steps, {of['tokens']:,} tokens, {of['flops']:.1e} FLOPs: fewer epochs are fewer"
    yield (
        f"{' ' if fits else '!'} about {needed / 1e9:.1f} GB of {of['device']}'s {of['device_memory'] / 1e9:.0f}: "
        "if too much, lower micro_batch_tokens, or set activation_checkpointing=true, policy.lora.rank or processes"
    )


def figure(rows: pd.DataFrame, max_length: int) -> Figure:
    """Lengths of training pairs: by part, chosen less rejected, and what a budget would hold."""
    rows = rows[rows.prompt >= 0]
    drawing = Figure(figsize=(13, 4), layout="constrained", dpi=120)
    axes = drawing.subplots(1, 3)
    paired = "chosen" in rows
    parts = [name for name in ("prompt", "chosen", "rejected") if name in rows and (rows[name] >= 0).any()]
    most = max((int(rows[name].max()) for name in parts), default=1)
    for name, colour in zip(parts, COLOURS, strict=False):
        axes[0].hist(rows[name], bins=40, range=(0, most + 1), histtype="step", lw=1.6, color=colour, label=name)
    axes[0].legend(frameon=False)
    tidy(axes[0], "Lengths", "tokens", "training rows")
    if "rejected" in parts:
        axes[1].hist(rows.chosen - rows.rejected, bins=41, color=COLOURS[0])
        axes[1].axvline(0, color="0.5", lw=1, ls="--")
    tidy(axes[1], "Chosen less rejected", "tokens", "training pairs")
    lengths = np.sort(report.tokens(rows) if paired else rows.prompt)
    axes[2].plot(lengths, np.arange(1, len(lengths) + 1) / max(1, len(lengths)), color=COLOURS[0])
    axes[2].axvline(max_length, color=COLOURS[1], lw=1, ls="--")
    tidy(axes[2], f"Fits (dashed: max_length={max_length})", "tokens of prompt and response", "share of rows")
    return drawing
