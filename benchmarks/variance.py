"""Where does the spread of a sweep between seeds come from? One source of chance is varied at a time.

    python benchmarks/variance.py                                 everything, then each source, at three betas
    python benchmarks/variance.py --sources rounding order --replicates 1-5 beta=0.01,0.1 batch_size=32

A run's `seed` decides all of them at once. Here each source has a seed of its own: that of the source which is looked
at is the number of the replicate, and those of the others are 0. Replicate 0 is the run of `dpo.train` with seed 0,
whatever the source. Other keys are those of `dpo.train`. A line per replicate and beta goes to OUT/replicates.jsonl;
the same command again computes what is missing, and prints the table of all that is there.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # both as dpo.sweep.execute sets them
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dpo import evaluate, sft
from dpo.data.batches import Batches, collate_pairs, size
from dpo.data.records import Dataset
from dpo.policy import model as models
from dpo.score import encode, prepare
from dpo.settings import evaluation_of, judge_of, policy_spec, scoring_of
from dpo.sweep.inputs import load
from dpo.sweep.plan import resolve
from dpo.sweep.signature import instantiate
from dpo.train import step_of
from dpo.training.log import Log
from dpo.training.loop import fit
from dpo.training.optim import optimizer, schedule

CONF = Path(__file__).parents[1] / "conf"
SOURCES = {
    "everything": "one seed for all but rounding, as in a run",
    "policy": "articles, demonstrations and SFT; pairs change with the policy that they are sampled from",
    "pairs": "which responses are sampled and paired; the policy and the articles stay",
    "order": "which pairs come in which optimizer step",
    "rounding": "a ten-millionth of each weight that training starts from",
    "evaluation": "the responses that are measured; the trained policy stays",
}
ROUNDING = 1e-7  # about that of fp32
CPU = torch.device("cpu")


class Trained(NamedTuple):
    """A policy after DPO, the path of the one before it, and what they were made from."""

    policy: Any
    start: str
    tokenizer: Any
    dataset: Dataset
    seconds: float  # of CPU


def seeds_of(source: str, replicate: int) -> dict[str, int]:
    """The seed of every source for a replicate of one of them."""
    varied = {"policy", "pairs", "order", "evaluation"} if source == "everything" else {source}
    return {name: replicate if name in varied else 0 for name in SOURCES if name != "everything"}


def config(seed: int, overrides: list[str]) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        found = OmegaConf.create(resolve(compose("train", [*overrides, f"seed={seed}"], return_hydra_config=True)))
    OmegaConf.set_struct(found, True)
    return found


def train(seeds: dict[str, int], overrides: list[str]) -> Trained:
    """What `dpo.train.run` does up to its last step, without looks on the way."""
    began = time.process_time()
    of_policy, settings = (config(seeds[source], overrides) for source in ("policy", "pairs"))
    dataset, judge = load(of_policy), judge_of(settings)
    tokenizer, pairs = encode(settings, dataset)
    settings.policy.path = sft.initial_policy(of_policy, dataset, CPU)
    start, policy, pairs = prepare(settings, dataset, judge, tokenizer, pairs)
    pending = instantiate(settings.reference)
    reference = pending.prepare(policy_spec(settings, start), policy, pairs, scoring_of(settings))
    batches = Batches(
        pairs["train"],
        partial(collate_pairs, pad_id=models.pad_id(tokenizer), packed=settings.packed),
        size=lambda pair: size(pair.prompt_responses),
        batch_size=settings.batch_size,
        micro_batch_tokens=settings.micro_batch_tokens,
        seed=seeds["order"],
        rank=0,
        world_size=1,
    )
    if seeds["rounding"]:
        shake(policy, seeds["rounding"])
    optim = optimizer(policy, settings.optimizer, settings.lr, settings.adam_betas, settings.weight_decay)
    optim.register_step_post_hook(lambda *_: reference.after_step(policy))
    steps = settings.epochs * len(batches) if settings.steps is None else settings.steps
    with tempfile.TemporaryDirectory() as folder, Log(folder) as log:
        fit(
            policy,
            batches,
            step_of(policy, reference, instantiate(settings.loss), "train"),
            optim,
            schedule(optim, settings.schedule, settings.warmup_steps, steps),
            steps=steps,
            max_grad_norm=settings.max_grad_norm,
            precision=settings.precision,
            log=log,
            directory=Path(folder) / "checkpoint",
        )
    return Trained(policy, start, tokenizer, dataset, time.process_time() - began)


@torch.no_grad()
def shake(model: torch.nn.Module, seed: int) -> None:
    """Change each weight by about as much as it is rounded."""
    rng = torch.Generator().manual_seed(seed)
    for weights in model.parameters():
        weights *= 1 + ROUNDING * torch.randn(weights.shape, generator=rng)


def measure(trained: Trained, seed: int, overrides: list[str]) -> dict[str, float]:
    """The figures of `evaluation.json` but those on pairs. seed: of the responses, the policy's and the baseline's."""
    settings = config(seed, overrides)
    measuring, judge = evaluation_of(settings), judge_of(settings)
    initial, _ = models.load(policy_spec(settings, trained.start), CPU)
    test = evaluate.test_prompts(trained.dataset, measuring, trained.tokenizer)
    baseline = evaluate.baseline(initial, trained.tokenizer, models.fingerprint(initial), test, measuring)
    return evaluate.measure(trained.policy, {"kl": initial}, trained.tokenizer, test, baseline, judge, measuring)[1]


def in_order(rows: list[dict[str, Any]], betas: list[str]) -> tuple[int, int]:
    """Of how many replicates at all betas the win rates, and the KLs, stand in the order of their means."""
    found = []
    for name in ("win_rate", "kl"):
        values = {(row["replicate"], row["beta"]): row[name] for row in rows}
        replicates = sorted({at for at, _ in values if all((at, beta) in values for beta in betas)})
        means = [statistics.mean(values[at, beta] for at in replicates) for beta in betas] if replicates else []
        ranked = sorted(range(len(means)), key=lambda column: means[column])
        in_turn = [[values[at, betas[column]] for column in ranked] for at in replicates]
        found.append(sum(row == sorted(row) and len({*row}) == len(row) for row in in_turn))
    return found[0], found[1]


def table(rows: list[dict[str, Any]]) -> str:
    """Means and standard deviations over replicates, by source and beta. The spread of KL is that of its logarithm."""
    lines = ["source       beta   n  win rate       sd of ln KL median KL  valid  ended"]
    base = {row["beta"]: row for row in rows if row["replicate"] == 0}
    for source in SOURCES:
        mine = [row for row in rows if row["source"] == source and row["replicate"]]
        betas = sorted({row["beta"] for row in mine}, key=float)
        mine += [{**base[beta], "source": source} for beta in betas if beta in base]
        for beta in betas:
            some = [row for row in mine if row["beta"] == beta]
            if len(some) < 2:
                continue
            wins, logs = [row["win_rate"] for row in some], [math.log(row["kl"]) for row in some]
            shape = "".join(f"{statistics.mean(row[name] for row in some):7.2f}" for name in ("valid", "ended"))
            lines.append(
                f"{source:<11}{beta:>6}{len(some):>4}  {statistics.mean(wins):.3f} ± {statistics.stdev(wins):.3f} "
                f"{statistics.stdev(logs):12.2f}{math.exp(statistics.median(logs)):10.1f}{shape}"
            )
        if source == "everything" and len(betas) > 1:
            wins, kls = in_order(mine, betas)
            lines.append(f"{'':<11}in the order of their means: win rates in {wins} seeds, KLs in {kls}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", nargs="+", choices=[*SOURCES], default=[*SOURCES])
    parser.add_argument("--replicates", default="0-9", help="first-last (0-9)")
    parser.add_argument("--out", type=Path, default=Path("runs/variance"), help="a folder for each set of keys")
    parser.add_argument("keys", nargs="*", help="of dpo.train; beta may be a list")
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    given = dict(key.split("=", 1) for key in args.keys)
    betas = given.pop("beta", "0.01,0.02,0.1").split(",")
    keys = [f"{key}={value}" for key, value in given.items()]
    first, last = map(int, args.replicates.split("-"))
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "replicates.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if other := [row["keys"] for row in rows if row["keys"] != keys]:
        parser.error(f"{file} must hold replicates with the keys {keys}, found {other[0]}; name another --out")
    for source in args.sources:
        once: dict[str, Trained] = {}  # policies that all replicates share
        for replicate in range(first, last + 1):
            for beta in betas:
                same = [row for row in rows if (row["replicate"], row["beta"]) == (replicate, beta)]
                if any(row["source"] == source or replicate == 0 for row in same):
                    continue
                seeds, overrides = seeds_of(source, replicate), [*keys, f"beta={beta}"]
                if beta not in once or source != "evaluation":
                    once[beta] = train(seeds, overrides)
                began = time.process_time()
                found = measure(once[beta], seeds["evaluation"], overrides)
                seconds = {"train": once[beta].seconds, "evaluate": time.process_time() - began}
                made_by = {"source": source, "replicate": replicate, "beta": beta, "keys": keys}
                rows.append({**made_by, "cpu": seconds, **found})
                with file.open("a") as lines:
                    lines.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
