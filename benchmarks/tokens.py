"""What the start of a run on a large data set costs: CPU seconds and memory, by part.

    python benchmarks/tokens.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data hh.jsonl.gz --pairs 60000

Pairs are those of a file in the form of Anthropic's dialogues, again and again, each prompt with a number of its own,
in the form of UltraFeedback: conversations of chat messages (`--plain`: text). Three processes do what a run does until
it trains: with lists of tokens as `dpo.data.batches.tokenize` makes them, without and with their entry in the cache.
"""

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def write(source: str, pairs: int, plain: bool, target: Path) -> None:
    from dpo.data import hub, records

    found = hub.hh(source, None, None, False, 0.01, "drop").preferences["train"]
    rows = []
    for number in range(pairs):
        one = found[number % len(found)]
        prompt = f"No. {number} {one.prompt}"
        if plain:
            rows.append({"prompt": prompt, "chosen": one.chosen, "rejected": one.rejected})
        else:
            asked = [{"role": "user", "content": prompt.removesuffix(records.TURN)}]
            sides = {"chosen": one.chosen.strip(), "rejected": one.rejected.strip()}
            rows.append({name: [*asked, {"role": "assistant", "content": said}] for name, said in sides.items()})
    records.write_rows(target, rows)


def start(kept: bool, model: str, file: str, folder: str) -> None:
    """The parts of a run's start that go over its data."""
    from dpo.cache import digest
    from dpo.data.batches import filter_identical, size, tokenize
    from dpo.data.kept import kept_tokens
    from dpo.data.lazy import joined
    from dpo.policy.model import load_tokenizer
    from dpo.policy.scoring import contents_of
    from dpo.references import Initial
    from dpo.sweep import inputs
    from dpo.train import _tokens

    gc.freeze()  # what is imported, as in a run that is forked
    began = last = time.process_time()

    def part(name: str) -> None:
        nonlocal last
        now, status = time.process_time(), Path("/proc/self/status").read_text().splitlines()
        own, mapped = (
            next(int(line.split()[1]) / 1000 for line in status if line.startswith(field))
            for field in ("RssAnon", "RssFile")
        )
        print(f"    {name:34}{now - last:8.2f} s   {own:7.0f} MB of its own, {mapped:5.0f} MB of files", flush=True)
        last = now

    part("imported")
    tokenizer = load_tokenizer(model)
    node = {"_target_": "dpo.data.records.file", "path": file, "validation_path": None}
    data, facts = inputs.read({**node, "validation_fraction": 0.02, "on_faulty": "drop"}, folder if kept else None)
    part("data, and what tells it")
    rules = tokenizer, 1024, "truncate"
    pairs = {}
    for split, some in data.preferences.items():
        if kept:
            pairs[split] = kept_tokens(some, *rules, "drop", f"{split} pairs", True, folder, facts["texts"].get(split))
        else:
            pairs[split] = filter_identical(tokenize(some, *rules, on_faulty="drop"), "drop", split)
    part("tokens")
    tokens = sum(size(pair.prompt_responses) for items in pairs.values() for pair in items)
    part("sizes")
    _tokens(pairs)
    part("digest of the tokens")
    none: Any = None
    asked = joined([Initial().sequences(items, split, *[none] * 3) for split, items in pairs.items()])
    digest(sorted(content.hex() for content in contents_of(asked)))
    part("where the reference's scores lie")
    print(f"    {'all':34}{last - began:8.2f} s   {tokens / 1e6:.1f} M tokens", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="whose tokenizer")
    parser.add_argument("--data", required=True, help="a JSONL file of Anthropic's dialogues")
    parser.add_argument("--pairs", type=int, default=60_000)
    parser.add_argument("--plain", action="store_true", help="text, not chat messages")
    parser.add_argument("--only", nargs="+", default=["lists", "cold", "warm"], choices=["lists", "cold", "warm"])
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir(), "dpo-tokens"), help="of the cache")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.out) as folder:
        file = given.out / f"{given.pairs}{'-plain' * given.plain}.jsonl"
        write(given.data, given.pairs, given.plain, file)
        for name in given.only:
            where = folder if "cold" in given.only else str(given.out)
            code = "import sys; from benchmarks.tokens import start; start(sys.argv[1] != 'lists', *sys.argv[2:])"
            print(f"{name}: {given.pairs} pairs, {file.stat().st_size / 1e6:.0f} MB", flush=True)
            line = [sys.executable, "-c", code, name, given.model, str(file), where]
            subprocess.run(line, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


if __name__ == "__main__":
    main()
