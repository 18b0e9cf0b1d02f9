"""Write docs/objectives.md, the table of conf/loss/: python docs/objectives.py

Names, sources and equations are the first paragraphs of docstrings; what an objective needs is found by trying it.
"""

import copy
import inspect
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from dpo.losses.pairs import READ, PairLogps, asked_by, sees_whole_step
from dpo.sweep.signature import instantiate

PAGE = Path(__file__).with_suffix(".md")
OPTIONS = PAGE.parents[1] / "conf" / "loss"
HEAD = """# Objectives

`python -m dpo.train loss=<name>`; `loss.<option>=` changes an option. Made by `python docs/objectives.py`.

Of a pair, in nats: `w` and `l` are log pi of the chosen and the rejected response, `a` and `b` their log-ratios
log pi - log ref, `d` = `a` - `b`: sums over tokens, or with "mean" before them means. `s` is the sigmoid, `e` is
label_smoothing.

- Reference: "no" reads none, so that any will do; it is scored for the log-ratios that are logged. "tokens" needs
  log-probs of single tokens (initial, other, live, ema, unconditional, reference_free), "live" one that is asked at
  each step (live, ema). What cannot be is refused when planned.
- Batch: "pair" gives each pair what it has alone, "step" sees all pairs of the optimizer step.
- Data: "pairs", or "labels": single responses that are desirable or not (`data=unpaired`), where of a pair the chosen
  one is desirable and the rejected one is not. `a` is then of such a response, and `b` of the response of another row
  to another prompt, in its place (see below).
- A default of ??? must be given: no published one is known.

| loss | objective | source | equation | reference | batch | data | defaults |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
TAIL = """
## KTO's baseline

KTO's z is the KL of policy and reference on responses that have nothing to do with their prompts: in the paper and in
TRL those of a batch, moved on by one prompt. Here each response of the data set is beside one other prompt, once and
for all: rows with the same prompt lie side by side, prompts in an order by hash, and each row takes the response as
many places on as the most frequent prompt has rows. So

- it is never one to the same prompt, which moving on by one can give; no prompt may have more than half of the rows;
- it is decided by the data alone, so that a reference scores it ahead of training, once for all seeds, betas and batch
  sizes; where it has no room in `max_length`, it is cut from the right, as by TRL;
- the mean is over the rows of the optimizer step, of all micro-batches and processes (`batch_size` counts rows, each of
  which costs what a pair does). TRL takes a mean of the means of devices, within a micro-batch, of responses that are
  those of the same batch. In validation it is over all held-out rows;
- the mean is held at 0 from below, and no gradient flows through it, as in both. At equal models the loss is half the
  weight, and its slope in the log-ratio is beta / 4 times the weight.

So held, z is often 0: of responses that the reference wrote, the mean log-ratio is below 0 as soon as the policy has
left it (on their own prompts it is -KL(reference || policy)). In the embedded world (`loss=kto batch_size=32
beta=0.03`, one seed) it was 0 in each of 99 steps. `logratios/mismatched` logs the mean as it is.

`rewards/chosen` and the like are means over desirable, `rewards/rejected` over undesirable rows of the step, and are
not logged where there is none; `rewards/margins` is their difference, `kl` is z (in `evaluation.json`, `kl` is the one
that is measured on samples). There is no accuracy, since no two responses are to be told apart. `pairs.flip` turns
labels.
"""


def needs(loss: partial) -> str:
    """What of a reference: found by moving its log-probs, at the second of two steps, which has statistics."""
    if "kl" in asked_by(loss):
        return "live"
    if "tails" in asked_by(loss):
        return "tokens"
    rng = torch.Generator().manual_seed(0)
    pair = PairLogps(*(-10 * torch.rand(5, generator=rng) for _ in range(4)), *torch.arange(2, 12).view(2, 5))
    more = {name: torch.rand(5, generator=rng) for what in asked_by(loss) for name in READ[what]}
    rows = torch.arange(5)
    pair = PairLogps(**{**vars(pair), **more, "row_ids": rows, "desirable": rows % 2 == 0})
    moved = PairLogps(**{**vars(pair), "reference_chosen_logps": pair.reference_chosen_logps * 2})

    def second(pair: PairLogps) -> Any:
        trained = copy.deepcopy(loss)
        return [trained(pair).losses for _ in range(2)][1]

    return "no" if torch.equal(second(pair), second(moved)) else "yes"


def row(page: Path) -> str:
    node = OmegaConf.load(page)
    options = {key: value for key, value in OmegaConf.to_container(node).items() if not key.startswith("_")}
    # Of options without a default any value will do.
    loss = instantiate({**OmegaConf.to_container(node), **{key: 0.4 for key in options if options[key] == "???"}})
    function = loss.func if inspect.isfunction(loss.func) else type(loss.func)
    name, source, equation = parts(function.__doc__)
    source = re.sub(r"(\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", source)
    defaults = ", ".join(f"{key}={shown(value)}" for key, value in options.items())
    batch = "step" if sees_whole_step(loss) else "pair"
    data = "labels" if "labels" in asked_by(loss) else "pairs"
    equation = equation.replace("|", "\\|")
    return f"| {page.stem} | {name} | {source} | `{equation}` | {needs(loss)} | {batch} | {data} | {defaults} |"


def shown(value: Any) -> Any:
    """A default; of an objective its name."""
    return "null" if value is None else value["_target_"].rpartition(".")[2] if isinstance(value, dict) else value


def parts(docstring: str | None) -> tuple[str, str, str]:
    """Name, source and equation of an objective: the first paragraph of its docstring, "name (source): equation."

    Raises: ValueError if it has another form.
    """
    paragraph = " ".join((docstring or "").split("\n\n")[0].split())
    found = re.fullmatch(r"(.+?) \((.+?)\): (.+)\.", paragraph)
    if not found:
        raise ValueError(f"a loss must begin its docstring with: name (source): equation. Found: {paragraph}")
    return found[1], found[2], found[3]


def text() -> str:
    return HEAD + "\n".join(row(page) for page in sorted(OPTIONS.glob("*.yaml"))) + "\n" + TAIL


if __name__ == "__main__":
    PAGE.write_text(text())
