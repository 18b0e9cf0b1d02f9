"""A report on data before training: what is dropped, repeated or odd, how long it is, and what training on it costs.

    python -m dpo.data data=file data.path=pairs.jsonl policy.path=/models/sft

takes the keys of `dpo.train`, loads a tokenizer and no weights, and writes report.json, report.png and report.pdf.
"""

if __name__ == "__main__":
    from dpo.sweep import launch

    launch.command("data")  # ends here: it calls `main` of this module, imported

import json
import logging
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from omegaconf import DictConfig, OmegaConf

from dpo.data import records, report
from dpo.data.measure import measured, measured_prompts
from dpo.data.records import Dataset, Preference
from dpo.data.texts import key
from dpo.policy import cost
from dpo.policy import model as models
from dpo.references import EMA, Frozen, Live
from dpo.results.figures import COLOURS, save, tidy
from dpo.score import needs_labels, treated
from dpo.settings import limits_of, lora_of, policy_spec, quantize_of, treatment_of
from dpo.sweep.signature import instantiate
from dpo.training import distributed

MARKS, WIDTH = {"ok": " ", "look": "?", "bad": "!"}, 100


def main(config: DictConfig) -> None:
    """Raises: ValueError if the data cannot be read at all, as training would."""
    spec, limits = policy_spec(config), limits_of(config)
    tokenizer = models.load_tokenizer(spec)
    node: Any = OmegaConf.to_container(config.data, resolve=True)
    on_faulty = node.get("on_faulty", "error")
    with heard() as refused:  # all faulty pairs are read, and counted here
        dataset = instantiate(node | ({"on_faulty": "keep"} if "on_faulty" in node else {}))
    of = "pairs" if dataset.preferences else "prompts"
    if of == "pairs":
        dataset.preferences.update(treated(dataset.preferences, treatment_of(config), config.seed))
    elif shown := _demonstrations(dataset):
        of, dataset = "demonstrations", replace(dataset, preferences={"train": shown})
    findings: list[report.Finding] = []
    splits: dict[str, Any] = {}
    tables: dict[str, pd.DataFrame] = {}
    if of != "prompts":
        pairs = [pair for split in dataset.preferences.values() for pair in split]
        table = measured(pairs, tokenizer, config.cache)
        known = {pair.source for pair in pairs}
        refused = [(where, why) for where, why in refused if where not in known]
        alone = of == "demonstrations"
        findings, splits, tables = report.of_pairs(dataset, table, refused, limits, on_faulty, config.cache, alone)
    if of != "pairs":
        asked = {name: some for name, some in dataset.prompts.items() if of == "prompts" or name == "test"}
        tables |= {name: measured_prompts(some, tokenizer, config.cache) for name, some in asked.items()}
        more, numbers = report.of_prompts(dataset, {name: tables[name] for name in asked}, limits, config.cache)
        findings, splits = findings + more, splits | numbers
    made = {
        "data": config.data.get("path") or config.data._target_,
        "tokenizer": spec.path,
        "splits": splits,
        "findings": [asdict(one) for one in findings],
        "cost": _cost(config, tables, of),
    }
    folder = Path(config.report)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(made, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    save(figure(tables["train"], config.max_length), folder / "report.png")
    print(*lines(made, findings), f"{folder}/report.json has examples of each, {folder}/report.png lengths", sep="\n")


def _demonstrations(dataset: Dataset) -> list[Preference]:
    """Those of the training prompts, as `dpo.sft` learns from them, each as a response with a label; none of data with
    demonstrations beside its prompts, as the world's.
    """
    prompts = {key(prompt) for prompt in dataset.prompts["train"]}
    if all(key(one.prompt) not in prompts for one in dataset.demonstrations):
        return []
    return [
        Preference(one.prompt, one.response, one.response, one.ended, one.ended, one.source, label=True)
        for one in dataset.demonstrations
    ]


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


def _cost(config: DictConfig, tables: dict[str, pd.DataFrame], of: str) -> dict[str, Any]:
    """Of pairs; of demonstrations, by `dpo.sft`; of prompts at most, with as many pairs as may be made of them, and
    responses as long as they may be.
    """
    limits, spec, sizes = limits_of(config), policy_spec(config), {}
    recipe = config.sft if of == "demonstrations" else config
    for split in {"train", "validation"} & tables.keys():
        rows, copies = tables[split][tables[split].prompt >= 0], 1
        if of == "prompts":
            copies, most = config.generation.pairs_per_prompt, config.max_new_tokens
            rows = rows.assign(prompt=rows.prompt.clip(upper=limits.prompt), chosen=most, rejected=most)
        sizes[split] = report.sizes(rows, limits, needs_labels(config), config.packed).repeat(copies, axis=0)
    train = sizes["train"]
    steps, items = report.seen(len(train), recipe.batch_size, recipe.epochs, recipe.steps)
    tokens, scored = train.mean(axis=0) * items if len(train) else (0.0, 0.0)

    policy, added = models.without_weights(spec), lora_of(config)
    reference = None if of == "demonstrations" else instantiate(config.reference)
    adapted = None if added is None else cost.adapters(policy, added)
    asked = reference.scored if isinstance(reference, Live) else reference  # the model, as a table
    scores, moves = isinstance(asked, EMA | Frozen), isinstance(reference, EMA | Live)
    other = models.without_weights(asked.spec(spec)) if isinstance(asked, Frozen) and asked.path else policy
    apart = isinstance(reference, EMA) or other is not policy or (moves and adapted is None)
    passes = [] if not scores else [(tokens, scored)] if moves else [one.sum(axis=0) for one in sizes.values()]
    flops = cost.forward(policy, tokens, scored if config.packed else tokens)
    flops *= (3 if adapted is None else 2) + config.activation_checkpointing
    flops += 6.0 * (adapted or 0) * tokens
    flops += sum(cost.forward(other, every, some if config.packed else every) for every, some in passes)

    share = scored / tokens if tokens else 0.0
    longest, mean = int(train[:, 0].max(initial=0)), tokens / max(1, items)
    micro = max(longest, int(min(config.micro_batch_tokens, mean * recipe.batch_size)))
    if not config.packed:  # each is padded to the longest, and a micro-batch goes by sizes without that
        each = mean if of == "demonstrations" else mean / 2 + scored / max(1, items) / 2
        micro = int(max(1, min(recipe.batch_size, config.micro_batch_tokens / max(1.0, each))) * longest)
    added_to = adapted, quantize_of(config)
    how = config.optimizer, config.precision, config.activation_checkpointing, config.packed
    device = distributed.device(config.device)
    of_other = cost.parameters(other) * (scores and apart)
    memory = cost.memory(policy, *added_to, of_other, moves, micro, int(micro * share), *how, device.type)
    return {
        "command": "dpo.sft" if of == "demonstrations" else "dpo.train",
        "upper_bound": of == "prompts",
        "steps": steps,
        "tokens": int(tokens),
        "flops": float(flops),
        "parameters": cost.parameters(policy),
        "trained": cost.parameters(policy) if adapted is None else adapted,
        "memory": vars(memory),
        "device": str(device),
        "device_memory": cost.memory_of(device),
    }


def lines(made: dict[str, Any], findings: Sequence[report.Finding]) -> Iterator[str]:
    """The terminal's table, in 100 columns."""
    yield f"{made['data']}\nin tokens of {made['tokenizer']}"
    yield f"\n  {'tokens':24}" + "".join(f"{name:>8}" for name in ("min", "5%", "50%", "95%", "99%", "max"))
    for split, numbers in made["splits"].items():
        for name, values in numbers["lengths"].items():
            yield f"  {f'{split} {name}':24}" + "".join(f"{value:8,.0f}" for value in values.values())
    yield "\n  ! stops or misleads training   ? worth a look   (held-out lines that are fine are in report.json)"
    shown = [one for one in findings if one.verdict != "ok" or one.split in ("train", "all")]
    for one in sorted(shown, key=lambda one: ["bad", "look", "ok"].index(one.verdict)):
        said = one.note or f"{one.count:,} of {one.of:,}"
        yield f"{MARKS[one.verdict]} {one.split:10} {one.name:53} {said:>32}"
        if one.verdict != "ok":
            yield from textwrap.wrap(one.advice, WIDTH, initial_indent=" " * 15, subsequent_indent=" " * 15)
    of, memory = made["cost"], cost.Memory(**made["cost"]["memory"])
    bound, fits = "at most " * of["upper_bound"], memory.total < of["device_memory"]
    yield f"\n  {of['command']}: {bound}{of['steps']:,} steps, {of['tokens']:,} tokens, {of['flops']:.1e} FLOPs"
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in vars(memory).items())
    whole = f"{memory.total / 1e9:.1f} of the {of['device_memory'] / 1e9:.0f} GB of {of['device']}"
    yield f"{' ' if fits else '!'} memory: about {whole} ({parts})"
    if not fits:
        yield "  lower micro_batch_tokens, set activation_checkpointing=true or policy.lora.rank, or use more processes"


def figure(rows: pd.DataFrame, max_length: int) -> Figure:
    """Lengths of training rows: by part, of pairs chosen less rejected, and what a budget would hold."""
    rows = rows[rows.prompt >= 0]
    drawing = Figure(figsize=(13, 4), layout="constrained", dpi=120)
    parts = [name for name in ("prompt", *report.sides(rows)) if (rows[name] >= 0).any()]
    compared = "rejected" in parts
    by_part, *middle, fits = drawing.subplots(1, 3 if compared else 2)
    longest = rows[parts].max(axis=1)
    end, beyond = _end(longest)
    for name, colour in zip(parts, COLOURS, strict=False):
        label = "completion" if name == "chosen" and not compared else name
        by_part.hist(rows[name], bins=40, range=(0, end + 1), histtype="step", lw=1.6, color=colour, label=label)
    if parts:
        by_part.legend(frameon=False)
    tidy(by_part, "Lengths", f"tokens{beyond}", "training rows")
    for axis in middle:
        gaps = rows.chosen - rows.rejected
        end, beyond = _end(gaps.abs())
        axis.hist(gaps, bins=41, range=(-end - 1, end + 1) if beyond else None, color=COLOURS[0])
        axis.axvline(0, color="0.5", lw=1, ls="--")
        tidy(axis, "Chosen less rejected", f"tokens{beyond}", "training pairs")
    lengths = np.sort(report.tokens(rows) if "chosen" in rows else rows.prompt)
    end, beyond = _end(lengths, 1.05 * max_length)
    fits.plot(lengths, np.arange(1, len(lengths) + 1) / max(1, len(lengths)), color=COLOURS[0])
    fits.axvline(max_length, color=COLOURS[1], lw=1, ls="--")
    if beyond:
        fits.set_xlim(0, end)
    tidy(fits, f"Fits (dashed: max_length={max_length})", f"tokens of prompt and response{beyond}", "share of rows")
    return drawing


def _end(lengths: ArrayLike, least: float = 1) -> tuple[float, str]:
    """Where an axis of lengths ends, and what it says of those beyond: few, which would leave no room to all others."""
    ordered = np.sort(np.asarray(lengths))
    end = float(max(least, ordered[int(0.99 * (len(ordered) - 1))] if len(ordered) else 0))
    if (most := ordered.max(initial=0)) <= 2 * end:
        return max(end, most), ""
    return end, f"\n({(ordered > end).sum():,} of {len(ordered):,} rows beyond this axis, up to {most:,})"
