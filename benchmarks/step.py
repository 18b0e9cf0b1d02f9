"""How fast is a DPO step, next to TRL's and to a plain padded forward?

    pip install -e '.[bench]' && python benchmarks/step.py --quick

Every contender takes each step on the same pairs from the same weights, one after another in an order that rotates, and
their losses must agree. Times are medians, spreads half the distance between quartiles; CPU work is the ratio of the
seconds that all threads worked, which a busy machine changes less. Memory is how far the peak of a process rises above
what it held before it had a model, in a process of its own for each contender. All numbers go to a JSON file.
The last line holds ratios to TRL as it ships with its reference precomputed: above 1 is faster, for memory below 1 is
smaller.
"""

import argparse
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
BATCH = 8  # pairs of a step
TOKENS = {"cpu": 1024, "cuda": 16384}  # of our micro-batches; the fastest of those tried
MICRO = {"cpu": 1, "cuda": 4}  # pairs of TRL's micro-batches; the fastest of those tried on a CPU
RUNS = 9  # of a sweep: 3 beta x 3 lr
WARM = 2  # pairs of a step that is not counted
OURS, TRL = "ours", "TRL, reference precomputed"
COMPACT, LIVE = "TRL, precomputed, with its head for CUDA", "TRL, live reference"


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
    preferences = hh(str(path), None, None, 0.01, "drop").preferences["train"]
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
    name: str, pairs: list[Pair], vocabulary: int, table: Tensor, options: Any, known: bool = False
) -> Ours | Trl:
    """A contender with a model of its own; all start from the same weights. known: TRL need not score, either."""
    policy = model(SHAPES[options.device], vocabulary, options.device)
    if name == OURS:
        return Ours(policy, pairs, table, options.precision, TOKENS[options.device])
    if name in ABLATION:
        return Ours(policy, pairs, table, options.precision, None, *ABLATION[name])
    given = table if known or name == COMPACT else None
    micro = MICRO[options.device]
    return Trl(policy, pairs, options.precision, micro, live=name == LIVE, compact=name == COMPACT, table=given)


def race(name: str, names: list[str], rounds: int, some: list[str], options: Any) -> dict[str, Any]:
    """Steps of all contenders on one workload, interleaved; in --quick `some` take the first only."""
    pairs, vocabulary = workload(name, WARM + BATCH * rounds, options.hh)
    reference = model(SHAPES[options.device], vocabulary, options.device)
    scoring, table = score(reference, pairs, options.precision, options.device)
    known = name != "A"  # a sweep is told of on A alone
    all_of_them = {one: contender(one, pairs, vocabulary, table, options, known) for one in names}
    seconds: dict[str, list[float]] = {one: [] for one in names}
    work: dict[str, list[float]] = {one: [] for one in names}
    peaks = []
    steps = [list(range(first, first + BATCH)) for first in range(WARM, len(pairs), BATCH)]
    dtype = torch.float32 if options.precision == "fp32" else torch.bfloat16
    for number in range(rounds + 1):
        rows = list(range(WARM)) if number == 0 else steps[number - 1]
        peaks += [matmul_peak(options.device, dtype)] * (number > 0)  # a busy machine slows it down like the steps
        turned = names[number % len(names) :] + names[: number % len(names)]
        losses = {}
        for one in turned:
            if options.quick and one in some and number > 1:
                continue
            took, worked, losses[one] = timed(partial(all_of_them[one].step, rows), options.device)
            seconds[one] += [took] * (number > 0)
            work[one] += [worked] * (number > 0)
        off = max(abs(loss - losses[OURS]) for loss in losses.values())
        tolerance = 1e-4 if options.precision == "fp32" else 2e-2
        if off > tolerance:
            raise RuntimeError(f"losses of step {number} must agree within {tolerance}, found {losses}")
        print(f"{name}: step {number} of {rounds}", flush=True)
    needed = [arithmetic(reference, [pairs[row].prompt_responses for row in rows]) for rows in steps]
    apart = [(prompt, [side]) for prompt, sides in (pair.prompt_responses for pair in pairs[WARM:]) for side in sides]
    rows_of = {}
    for one, took in seconds.items():
        count = len(took)
        ratios = np.array(took) / np.array(seconds[OURS][:count])
        rows_of[one] = {
            "steps": count,
            "s/step": float(np.median(took)),
            "pairs/s": BATCH / float(np.median(took)),
            "ours is faster by": float(np.median(ratios)),
            "spread": float(np.subtract(*np.percentile(ratios, [75, 25])) / 2),
            "CPU work, ours is less by": float(np.median(np.array(work[one]) / np.array(work[OURS][:count]))),
            "utilization": float(np.median(np.array(needed[:count]) / np.array(took) / np.array(peaks[:count]))),
        }
    trl: Any = all_of_them[TRL]
    return {
        "contenders": rows_of,
        "rounds": rounds,
        "matmul peak, FLOP/s": float(np.median(peaks)),
        "arithmetic of separate rows": arithmetic(reference, apart) / sum(needed),
        "scoring, s/pair": scoring / len(pairs),
        "TRL's scoring, s/pair": None if known else trl.prepared / len(pairs),
    }


def memory(name: str, one: str, options: Any) -> float:
    """Bytes that two steps of a contender add to the peak of a process of its own."""
    command = [sys.executable, __file__, "--memory", name, one, "--hh", str(options.hh), "--threads"]
    command += [str(options.threads), "--precision", options.precision, "--device", options.device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that measures the memory of {one} failed: {done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def measure_memory(name: str, one: str, options: Any) -> float:
    pairs, vocabulary = workload(name, BATCH, options.hh)
    if one == TRL:
        import trl.trainer.dpo_trainer  # noqa: F401  its libraries are not its step
    before = _resident("VmRSS")
    candidate = contender(one, pairs, vocabulary, torch.zeros(BATCH, 2), options, known=True)
    for rows in ([0], list(range(BATCH))):  # after the first step the optimizer has its moments
        candidate.step(rows)
    if options.device == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    """Bytes in memory, now (VmRSS) or at their peak (VmHWM); getrusage would tell the peak of the parent, too."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return 1024.0 * int(line.split()[1])


def sweep_ratio(found: dict[str, Any], again: bool) -> float:
    """Time of a sweep by TRL over ours: an epoch a run, and scoring once, or for TRL `again` in every run."""
    ours, theirs = (found["contenders"][one]["s/step"] / BATCH for one in (OURS, TRL))
    total = found["TRL's scoring, s/pair"] * (RUNS if again else 1) + RUNS * theirs
    return total / (found["scoring, s/pair"] + RUNS * ours)


def table(name: str, found: dict[str, Any]) -> str:
    peak = found["matmul peak, FLOP/s"] / 1e9
    lines = [f"\n{name}: {found['rounds']} steps of {BATCH} pairs, matmul peak {peak:.0f} GFLOP/s; without padding and"]
    lines[0] += f" unscored logits, separate rows need {found['arithmetic of separate rows']:.2f} times our arithmetic"
    heads = f"{'ours is faster by':>18} {'CPU work':>9} {'utilization':>12}"
    lines.append(f"{'':42} {'steps':>5} {'s/step':>8} {'pairs/s':>8} {heads}")
    for one, row in found["contenders"].items():
        faster = f"{row['ours is faster by']:.2f} +- {row['spread']:.2f}"
        numbers = f"{faster:>18} {row['CPU work, ours is less by']:9.2f} {row['utilization']:12.2f}"
        lines.append(f"{one:42} {row['steps']:5} {row['s/step']:8.2f} {row['pairs/s']:8.2f} {numbers}")
    return "\n".join(lines)


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
    names = {one: [OURS, TRL, COMPACT] for one in rounds}
    names["A"] += [LIVE, *ABLATION]
    found = {one: race(one, names[one], steps, [LIVE, *ABLATION], options) for one, steps in rounds.items()}
    for one in ("A", "B"):
        found[one]["memory"] = {who: memory(one, who, options) for who in (OURS, TRL)}
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
        "machine": platform.processor() or platform.machine(),
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
