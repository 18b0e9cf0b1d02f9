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
- A default of ??? must be given: no published one is known.

| loss | objective | source | equation | reference | batch | defaults |
| --- | --- | --- | --- | --- | --- | --- |
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
    pair = PairLogps(**{**vars(pair), **more, "row_ids": torch.arange(5)})
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
    equation = equation.replace("|", "\\|")
    return f"| {page.stem} | {name} | {source} | `{equation}` | {needs(loss)} | {batch} | {defaults} |"


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
    return HEAD + "\n".join(row(page) for page in sorted(OPTIONS.glob("*.yaml"))) + "\n"


if __name__ == "__main__":
    PAGE.write_text(text())
