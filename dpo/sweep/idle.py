"""Overrides that decide nothing, since another key switches off what they are of.

A sweep over such a key would measure one run again and again, so a plan refuses it. What a command as a whole leaves
unread is no part of its runs' identities instead (`dpo.sweep.identity.UNREAD`): several commands take the same keys.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from dpo.sweep.identity import below


@dataclass(frozen=True)
class Idle:
    """Keys that decide nothing where `switch` has one of the values `off`, or any but these if `off` is turned."""

    keys: tuple[str, ...]  # or those below them
    switch: str
    off: tuple[Any, ...]
    said: str  # of {key} and the switch's {value}
    turned: bool = False
    alone: bool = True  # given with one value they are refused, too
    not_of: str = ""  # a command that does go by them

    def holds(self, value: Any) -> bool:
        """Of the switch's value."""
        return (value in self.off) is not self.turned


WITH_PAIRS = "with_pairs"  # no key: what was found in the data
SETS = "{key} decides nothing where {switch} does, found {value}; leave it out, or give {switch}=null"
IDLE = (
    Idle(
        ("policy.lora.alpha", "policy.lora.targets"),
        "policy.lora.rank",
        (None,),
        "{key} is of adapters, found policy.lora.rank=null in every run; set policy.lora.rank",
    ),
    # the record of a round has both: a chain's first policy was made so, its later ones are the rounds'
    Idle(
        ("sft", "policy.base"),
        "policy.path",
        (None,),
        "{key} is of a policy that is yet to be made, found policy.path={value}; leave out one of the two",
        turned=True,
        alone=False,
        not_of="sft",
    ),
    Idle(("epochs",), "steps", (None,), SETS, turned=True),
    Idle(("sft.epochs",), "sft.steps", (None,), SETS, turned=True),
    Idle(("adam_betas",), "optimizer", ("rmsprop",), "{key} is of AdamW, found optimizer={value}; leave it out"),
    Idle(("pairs.outlier",), "pairs.outliers", (0,), "{key} needs outliers, found none; set {switch}, their share"),
    Idle(
        ("evaluate_prompts",),
        "evaluate_every",
        (0,),
        "{key} needs evaluations on the way, found none; set {switch}",
    ),
    Idle(
        ("engine", "generation"),
        WITH_PAIRS,
        (True,),
        "{key} is of pairs that are sampled, found data that bring theirs; leave it out (evaluations have an engine of "
        "their own: evaluation.engine)",
    ),
)


def idle(
    rules: Sequence[Idle], given: Sequence[Collection[str]], value: Callable[[int, str], Any], swept: Collection[str]
) -> dict[int, list[str]]:
    """What to say of combinations, by number, that give a key which decides nothing in any of those that give it.

    given: the keys of each combination. value: of a switch in one of them, by number. swept: keys with several values.
    Of all combinations, since policy.lora.rank=null,8 compares runs with and without.
    """
    found: dict[int, list[str]] = {}
    for key in sorted({key for keys in given for key in keys}):
        for rule in rules:
            if any(below(key, one) for one in rule.keys) and (rule.alone or key in swept):
                switch = {number: value(number, rule.switch) for number, keys in enumerate(given) if key in keys}
                for number in switch if all(map(rule.holds, switch.values())) else ():
                    said = rule.said.format(key=key, switch=rule.switch, value=switch[number])
                    found.setdefault(number, []).append(said)
    return found
