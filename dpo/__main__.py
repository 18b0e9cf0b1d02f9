"""The commands under one name: `dpo train ...` is `python -m dpo.train ...`.

    dpo train -m beta=0.01,0.1

`eval "$(dpo -sc install=bash)"` has the shell complete verbs, keys, groups and options.
"""

import importlib
import os
import sys

SWEEPS = {  # take key=value
    "data": "report on data before training: what is dropped, repeated or odd, and what it costs",
    "train": "train a policy on preference pairs, or with -m a sweep of them",
    "sft": "make a policy from demonstrations",
    "generate": "sample candidate responses from a policy",
    "judge": "judge candidate responses, and pair the better with the worse",
    "score": "score pairs under a reference ahead of time",
    "evaluate": "measure a policy: win rate, KL, shape of its responses",
    "show": "responses of a policy beside its reference's, and what training did to each token",
    "rounds": "train in rounds, each on responses of the policy of the one before, or with -m chains of them",
}
VERBS = SWEEPS | {
    "results": "where a sweep stands: states, table, figure",
    "push": "put the policy of a finished run on the Hugging Face hub",
    "execute": "execute one run directory from its frozen config",
    "cache": "list and check what is computed once: SFT policies, pairs, reference log-probs",
    "alpaca_eval": "win rates from AlpacaEval's annotation files",
}
MODULES = {"results": "results.__main__", "execute": "sweep.execute", "alpaca_eval": "results.alpaca_eval"}
USAGE = "usage: dpo VERB ...\n\n" + "".join(f"  {verb:12} {what}\n" for verb, what in VERBS.items())


def main() -> None:
    verb, rest = sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:]
    if verb == "-sc":  # what a shell evaluates once, and asks at every tab: Hydra answers both
        verb, rest = _completed() if "query=" in "".join(rest) else "train", sys.argv[1:]
    elif verb not in VERBS:
        print(f"{USAGE}\ndpo VERB --help says more")
        sys.exit(0 if verb in ("", "-h", "--help") else f"\nVERB must be one of {', '.join(VERBS)}, got {verb}")
    sys.argv = [sys.argv[0], *rest]
    if verb in SWEEPS:
        importlib.import_module("dpo.sweep.launch").command(verb)
    importlib.import_module(f"dpo.{MODULES.get(verb, verb)}").main()


def _completed() -> str:
    """The verb of the line that a shell asks about; of a line that has none yet, the verbs are the answer."""
    name, *words = os.environ.get("COMP_LINE", "").split(" ")
    if len(words) < 2:
        print(" ".join(VERBS))
        sys.exit(0)
    if words[0] not in SWEEPS:  # files, which the shell completes by itself
        sys.exit(0)
    os.environ["COMP_LINE"] = " ".join([name, *words[1:]])
    return words[0]


if __name__ == "__main__":
    main()
