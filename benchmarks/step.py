"""How fast is a DPO step, next to TRL's and to a plain padded forward?

    pip install -e '.[bench]' && python benchmarks/step.py --quick

Every contender takes each step on the same pairs from the same weights, one after another in an order that rotates, and
their losses must agree. Times are medians, spreads half the distance between quartiles; CPU work is the ratio of the
seconds that all threads worked, which a busy machine changes less. Memory is how far the peak of a process rises above
what it held before it had a model, in a process of its own for each contender. All numbers go to a JSON file.
On a GPU contenders take their steps one after another, each alone in its memory, with the micro-batch that is fastest.
The last line holds ratios to TRL as it ships with its reference precomputed: above 1 is faster, for memory below 1 is
smaller.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # both as dpo.sweep.execute sets them, for all contenders
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import torch
import transformers
from contenders import ABLATION, Ours, Trl, model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from dpo.data.batches import Pair, PromptResponses, tokenize
from dpo.data.hub import hh
from dpo.policy.scoring import _score

HH = Path(__file__).parents[2] / "shared" / "data" / "hh-harmless-base-1500.jsonl.gz"
SHAPES = {  # 14 M parameters without the embeddings for a CPU, and a billion for a GPU
    "cpu": {"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6, "intermediate_size": 1024},
    "cuda": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "intermediate_size": 8192},
}
BATCH = {"cpu": 8, "cuda": 64}  # pairs of a step
TOKENS = {"cpu": 1024, "cuda": 8192}  # of our micro-batches; the fastest of those tried on a CPU
MICRO = {"cpu": 1, "cuda": 4}  # pairs of TRL's micro-batches; the fastest of those tried on a CPU
TRIED = {"tokens": (8192, 16384), "pairs": (4, 8, 16)}  # on a GPU, of our micro-batches and TRL's
RUNS = 9  # of a sweep: 3 beta x 3 lr
WARM = 2  # pairs of a step that is not counted
OURS, TRL = "ours", "TRL, reference precomputed"
COMPACT, LIVE = "TRL, precomputed, with its head for CUDA", "TRL, live reference"
LIGER, PADDED = "TRL, precomputed, with Liger's layers", "ours, padded rows"


def workload(name: str, count: int, path: Path) -> tuple[list[Pair], int]:
    """Pairs and the size of their vocabulary. A: lengths like those of HH; A_real: HH; B: long prompts."""
    rng = np.random.default_rng(0)
    if name == "A_real":
        pairs = _hh(path)
        return [pairs[row] for row in rng.permutation(len(pairs))[:count]], 16_000

    def lengths(median: int, sigma: float, most: int) -> int:
        return int(np.clip(rng.lognormal(np.log(median), sigma), 2, most))

    pairs = []
    for _ in range(count):
        prompt = lengths(120, 0.8, 448) if name == "A" else int(rng.integers(700, 1001))
        longest, median, sigma = (512 - prompt, 70, 0.8) if name == "A" else (280, 60, 0.3)
        sizes = (prompt, lengths(median, sigma, longest), lengths(median, sigma, longest))
        pairs.append(Pair(*(rng.integers(2, 32_000, size).tolist() for size in sizes)))
    return pairs, 32_000


def _hh(path: Path) -> list[Pair]:
    """Real pairs in a byte-level BPE that is trained on them, prompts cut from the left to 512 tokens in all."""
    preferences = hh(str(path), None, None, False, 0.01, "drop").preferences["train"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = (f"{pair.prompt}{side}" for pair in preferences for side in (pair.chosen, pair.rejected))
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=16_000, special_tokens=["</s>"], show_progress=False))
    return tokenize(preferences, PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>"), 512, "truncate")


def arithmetic(policy: LlamaForCausalLM, items: list[PromptResponses]) -> float:
    """Floating-point operations that a step cannot do without on responses that share the prompt of their item: those
    of a prompt once, of the head and of the last layer's feed-forward part where a token is scored.
    """
    config, total = policy.config, 0.0
    width, layers = config.hidden_size, config.num_hidden_layers
    feed_forward = 2 * 3 * width * config.intermediate_size
    per_token = layers * (2 * 4 * width**2 + feed_forward)
    for prompt_ids, responses in items:
        prompt, sides = len(prompt_ids), [len(ids) for ids in responses]
        fed = [side - 1 for side in sides]
        seen = prompt * (prompt + 1) / 2 + sum(side * prompt + side * (side + 1) / 2 for side in fed)
        total += per_token * (prompt + sum(fed)) - feed_forward * (prompt - 1) + 4 * width * layers * seen
        total += 2 * width * config.vocab_size * sum(sides)
    return 3 * total  # the backward pass is twice the forward


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the best of a few large matrix products."""
    size = 2048 if device == "cpu" else 8192
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: one @ other, device)[0] for _ in range(6))


def timed(act: Callable[[], Any], device: str) -> tuple[float, float, Any]:
    """Seconds on the clock and of all CPU threads, and what came of it."""
    began, worked = time.perf_counter(), time.process_time()
    outcome = act()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, time.process_time() - worked, outcome


def score(policy: LlamaForCausalLM, pairs: list[Pair], precision: str, device: str) -> tuple[float, Tensor]:
    """Seconds to score the reference our way, and its table.  # (N, 2) nats"""
    settings = SimpleNamespace(micro_batch_tokens=TOKENS[device], precision=precision)
    sequences = [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]
    seconds, _, found = timed(lambda: _score(policy, sequences, settings, packed=True, name=""), device)
    return seconds, torch.stack([values.sum() for values in found]).view(2, len(pairs)).T.contiguous()


def contender(
    name: str, pairs: list[Pair], vocabulary: int, table: Tensor, options: Any, known: bool = False, micro: int = 0
) -> Ours | Trl:
    """A contender with a model of its own; all start from the same weights. known: TRL need not score, either.
    micro: tokens of our micro-batches, pairs of TRL's; 0: the usual.
    """
    policy = model(SHAPES[options.device], vocabulary, options.device)
    if name == OURS:
        return Ours(policy, pairs, table, options.precision, micro or TOKENS[options.device])
    if name == PADDED:
        return Ours(policy, pairs, table, options.precision, micro or TOKENS[options.device], "padded")
    if name in ABLATION:
        return Ours(policy, pairs, table, options.precision, None, *ABLATION[name])
    given = table if known or name == COMPACT else None
    kind = {"live": name == LIVE, "compact": name == COMPACT, "liger": name == LIGER}
    return Trl(policy, pairs, options.precision, micro or MICRO[options.device], **kind, table=given)


def fastest(name: str, pairs: list[Pair], vocabulary: int, table: Tensor, options: Any) -> int:
    """The micro-batch with which a contender's step is fastest, of those tried that fit in memory."""
    candidate, took = contender(name, pairs, vocabulary, table, options, known=True), {}
    for micro in TRIED["tokens" if isinstance(candidate, Ours) else "pairs"]:
        candidate.micro = micro
        step = partial(candidate.step, list(range(WARM, WARM + BATCH[options.device])))
        try:
            step()
            took[micro] = timed(step, options.device)[0]
        except torch.OutOfMemoryError:
            break
    print(f"{name}: seconds by micro-batch {took}", flush=True)
    if not took:
        raise RuntimeError("none of the micro-batches tried fits in memory")
    return min(took, key=lambda size: took[size])


def race(name: str, names: list[str], rounds: int, some: list[str], options: Any) -> dict[str, Any]:
    """Steps of all contenders on one workload, ours first; interleaved, on a GPU one contender after another. In
    --quick `some` take the first only.
    """
    batch, gpu = BATCH[options.device], options.device == "cuda"
    pairs, vocabulary = workload(name, WARM + batch * rounds, options.hh)
    reference = model(SHAPES[options.device], vocabulary, options.device)
    if gpu:  # kernels are compiled before they are timed
        score(reference, pairs[:batch], options.precision, options.device)
    scoring, table = score(reference, pairs, options.precision, options.device)
    steps = [list(range(first, first + batch)) for first in range(WARM, len(pairs), batch)]
    needed = [arithmetic(reference, [pairs[row].prompt_responses for row in rows]) for rows in steps]
    apart = [(prompt, [side]) for prompt, sides in (pair.prompt_responses for pair in pairs[WARM:]) for side in sides]
    separate = arithmetic(reference, apart) / sum(needed)
    del reference
    known, prepared = name != "A", 0.0  # a sweep is told of on A alone
    runs: dict[str, dict[str, list[float]]] = {one: {"s": [], "work": [], "loss": [], "peak": []} for one in names}
    held, micro, failed = {}, {}, {}
    dtype = torch.float32 if options.precision == "fp32" else torch.bfloat16
    for group in [[one] for one in names] if gpu else [names]:
        try:
            if gpu:
                _free()
                micro |= {one: fastest(one, pairs, vocabulary, table, options) for one in group}
                _free()
                torch.cuda.reset_peak_memory_stats()
            given = pairs, vocabulary, table, options, known
            all_of_them = {one: contender(one, *given, *([micro[one]] if gpu else [])) for one in group}
            for number in range(rounds + 1):
                rows = list(range(WARM)) if number == 0 else steps[number - 1]
                peak = matmul_peak(options.device, dtype) if number else 0.0  # a busy machine slows it like the steps
                turned = group[number % len(group) :] + group[: number % len(group)]
                for one in turned:
                    if options.quick and one in some and number > 1:
                        continue
                    took, worked, loss = timed(partial(all_of_them[one].step, rows), options.device)
                    found = {"s": took, "work": worked, "peak": peak} if number else {}
                    for what, value in {**found, "loss": loss}.items():
                        runs[one][what].append(value)
                _agree(
                    number, {one: run["loss"][number] for one, run in runs.items() if len(run["loss"]) > number}, dtype
                )
                print(f"{name}: step {number} of {rounds}" + f", {group[0]}" * gpu, flush=True)
            prepared = getattr(all_of_them.get(TRL), "prepared", prepared)
            held |= {one: float(torch.cuda.max_memory_allocated()) for one in group if gpu}
        except Exception as error:
            if not gpu or group == [OURS]:
                raise
            failed[group[0]] = f"{type(error).__name__}: {error}"[:500]
            print(f"{name}: {group[0]} is left out: {failed[group[0]]}", flush=True)
        all_of_them = {}
    rows_of = {}
    for one, run in runs.items():
        if one in failed:
            continue
        took, count = np.array(run["s"]), len(run["s"])
        ratios = took / np.array(runs[OURS]["s"][:count])
        rows_of[one] = {
            "steps": count,
            "s/step": float(np.median(took)),
            "pairs/s": batch / float(np.median(took)),
            "ours is faster by": float(np.median(ratios)),
            "spread": float(np.subtract(*np.percentile(ratios, [75, 25])) / 2),
            "CPU work, ours is less by": float(np.median(np.array(run["work"]) / np.array(runs[OURS]["work"][:count]))),
            "utilization": float(np.median(np.array(needed[:count]) / took / np.array(run["peak"]))),
        }
        if gpu:
            rows_of[one] |= {"micro-batch": micro[one], "memory": held[one], "losses": run["loss"]}
    return {
        "contenders": rows_of,
        "failed": failed,
        "batch": batch,
        "rounds": rounds,
        "matmul peak, FLOP/s": float(np.median([peak for run in runs.values() for peak in run["peak"]])),
        "arithmetic of separate rows": separate,
        "scoring, s/pair": scoring / len(pairs),
        "TRL's scoring, s/pair": None if known else prepared / len(pairs),
    }


def _free() -> None:
    """Give a GPU's memory back; a trainer of TRL refers to itself, so that it outlives its last use."""
    gc.collect()
    torch.cuda.empty_cache()


def _agree(number: int, losses: dict[str, float], dtype: torch.dtype) -> None:
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    off = max(abs(loss - losses[OURS]) for loss in losses.values())
    if off > tolerance:
        raise RuntimeError(f"losses of step {number} must agree within {tolerance}, found {losses}")


def memory(name: str, one: str, options: Any) -> float:
    """Bytes that two steps of a contender add to the peak of a process of its own."""
    command = [sys.executable, __file__, "--memory", name, one, "--hh", str(options.hh), "--threads"]
    command += [str(options.threads), "--precision", options.precision, "--device", options.device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that measures the memory of {one} failed: {done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def measure_memory(name: str, one: str, options: Any) -> float:
    batch = BATCH[options.device]
    pairs, vocabulary = workload(name, batch, options.hh)
    if one == TRL:
        import trl.trainer.dpo_trainer  # noqa: F401  its libraries are not its step
    before = _resident("VmRSS")
    candidate = contender(one, pairs, vocabulary, torch.zeros(batch, 2), options, known=True)
    for rows in ([0], list(range(batch))):  # after the first step the optimizer has its moments
        candidate.step(rows)
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    """Bytes in memory, now (VmRSS) or at their peak (VmHWM); getrusage would tell the peak of the parent, too."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return 1024.0 * int(line.split()[1])


def sweep_ratio(found: dict[str, Any], again: bool) -> float:
    """Time of a sweep by TRL over ours: an epoch a run, and scoring once, or for TRL `again` in every run."""
    ours, theirs = (1 / found["contenders"][one]["pairs/s"] for one in (OURS, TRL))
    total = found["TRL's scoring, s/pair"] * (RUNS if again else 1) + RUNS * theirs
    return total / (found["scoring, s/pair"] + RUNS * ours)


def table(name: str, found: dict[str, Any]) -> str:
    peak = found["matmul peak, FLOP/s"] / 1e9
    steps = f"{found['rounds']} steps of {found['batch']} pairs"
    lines = [f"\n{name}: {steps}, matmul peak {peak:.0f} GFLOP/s; without padding and"]
    lines[0] += f" unscored logits, separate rows need {found['arithmetic of separate rows']:.2f} times our arithmetic"
    heads = f"{'ours is faster by':>18} {'CPU work':>9} {'utilization':>12}"
    lines.append(f"{'':42} {'steps':>5} {'s/step':>8} {'pairs/s':>8} {heads}")
    for one, row in found["contenders"].items():
        faster = f"{row['ours is faster by']:.2f} +- {row['spread']:.2f}"
        numbers = f"{faster:>18} {row['CPU work, ours is less by']:9.2f} {row['utilization']:12.2f}"
        lines.append(f"{one:42} {row['steps']:5} {row['s/step']:8.2f} {row['pairs/s']:8.2f} {numbers}")
    return "\n".join(lines + [f"{one} is left out: {why}" for one, why in found["failed"].items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps: seven minutes on two cores")
    parser.add_argument("--hh", type=Path, default=HH, help="a JSONL file of HH; without one A_real is left out")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--memory", nargs=2, metavar=("WORKLOAD", "CONTENDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.precision = options.precision or ("fp32" if options.device == "cpu" else "bf16")
    torch.set_num_threads(options.threads)
    if options.memory:
        print(measure_memory(*options.memory, options))
        return
    import trl

    began = time.perf_counter()
    rounds = {"A": 3, "A_real": 3, "B": 2} if options.quick else {"A": 7, "A_real": 9, "B": 4}
    if not options.hh.exists():
        print(f"A_real is left out: there is no {options.hh}")
        del rounds["A_real"]
    gpu = options.device == "cuda"
    names = {one: [OURS, TRL, LIGER] if gpu else [OURS, TRL, COMPACT] for one in rounds}  # TRL's head for CUDA is used
    names["A"] += [LIVE, PADDED] if gpu else [LIVE, *ABLATION]
    names["B"] += [PADDED] * gpu
    found = {}
    for one, steps in rounds.items():
        found[one] = race(one, names[one], steps, [LIVE, *ABLATION], options)
        options.output.write_text(json.dumps({"workloads": found}, indent=1) + "\n")  # what there is, if it is stopped
        if one != "A_real":
            who = found[one]["contenders"]
            found[one]["memory"] = {o: who[o]["memory"] if gpu else memory(one, o, options) for o in (OURS, TRL)}
    sweeps = {"scored once": sweep_ratio(found["A"], False), "TRL scores in every run": sweep_ratio(found["A"], True)}
    for one, numbers in found.items():
        print(table(one, numbers))
    for one in ("A", "B"):
        print(
            f"{one}: peak memory "
            + ", ".join(f"{who} {size / 1e6:.0f} MB" for who, size in found[one]["memory"].items())
        )
    print(f"A: a sweep of {RUNS} runs, ours is faster by: " + ", ".join(f"{who} {r:.2f}" for who, r in sweeps.items()))
    machine = {
        "machine": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "device": options.device,
        "threads": options.threads,
        "precision": options.precision,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "seconds": time.perf_counter() - began,
    }
    print(f"{machine['seconds']:.0f} s in all")
    options.output.write_text(json.dumps({**machine, "workloads": found, "sweep": sweeps}, indent=1) + "\n")

    def number(workload: str, who: str, what: str) -> float:
        return found[workload]["contenders"][who][what] if workload in found else float("nan")

    last = {f"{one}_ratio": number(one, TRL, "ours is faster by") for one in ("A", "A_real", "B")}
    last |= {f"{one}_mfu": number(one, OURS, "utilization") for one in ("A", "B")}
    last |= {f"{one}_memory_ratio": found[one]["memory"][OURS] / found[one]["memory"][TRL] for one in ("A", "B")}
    print(" ".join(f"{name}={value:.2f}" for name, value in {**last, "sweep_ratio": sweeps["scored once"]}.items()))


if __name__ == "__main__":
    main()
