"""Chains of runs of `dpo.train`, planned as they unfold: each starts from the policy of the one before, whose responses
it is trained on. A round is a plain run: `python -m dpo.train` with the overrides in its record is the same one.
"""

import os
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from dpo import HOME
from dpo.sweep.command_line import message
from dpo.sweep.directory import before, status
from dpo.sweep.identity import identity
from dpo.sweep.plan import Composed, Refused, Run, key_of, plan, rehearse, resolve
from dpo.sweep.schema import faults

OWN = ("rounds", "held_to", "prompts")  # keys that a single run does not have
APART = 1000  # seeds of a sweep below which no two of its rounds have the same articles


@dataclass(frozen=True)
class Chain:
    """What one combination of overrides asks for, and the rounds of it that are finished."""

    composed: Composed
    done: tuple[Run, ...] = ()

    @property
    def number(self) -> int:
        """Of the next round."""
        return len(self.done) + 1

    @property
    def rounds(self) -> int:
        return int(self.composed.config.rounds)

    def next(self) -> Composed:
        """The next round, as it would be composed from a command line of `dpo.train`."""
        config, choices = deepcopy(self.composed.config), dict(self.composed.choices)
        asked, given, name = self.composed.overrides, {}, None
        if self.done:
            original = original_policy(self.done[0])
            given = {"policy.path": str(self.done[-1].directory / "policy"), "evaluation.baseline": original}
            given |= fresh_prompts(config, self.number)
            if config.held_to == "original":
                if "path" not in config.reference:  # reference=initial
                    given["reference"] = choices["reference"] = "other"
                    config.reference = OmegaConf.load(HOME / "conf" / "reference" / "other.yaml")
                given["reference.path"] = original
            own = [one for one in asked if key_of(one) in OWN and key_of(one) != "rounds"]
            name = ",".join([self.done[0].directory.name, *own, f"round={self.number}"])
        with open_dict(config):
            for key in OWN:
                config.pop(key)
        config.command = "train"
        for key, value in given.items():
            if key != "reference":
                OmegaConf.update(config, key, value)
        overrides = [one for one in asked if key_of(one) not in {*OWN, *given}]
        overrides += [
            f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}" for key, value in given.items()
        ]
        return replace(self.composed, config=config, overrides=overrides, choices=choices, name=name)


def fresh_prompts(config: DictConfig, number: int) -> dict[str, Any]:
    """The key of the data that gives a round other prompts than those before it, with its value; {} for the same."""
    if config.prompts == "same" or number == 1:
        return {}
    if "part" in config.data:
        return {"data.part": config.data.part + number - 1}
    return {"data.seed": config.data.seed + APART * (number - 1)}


def original_policy(first: Run) -> str:
    """What a first round started from: as it was given, or where SFT has put it."""
    if (path := first.config["policy"]["path"]) is not None:
        return str(path)
    place = Path(str(before("initial", str(first.directory / "policy"))))
    return os.path.relpath(place) if place.is_relative_to(Path.cwd()) else str(place)


def run_chains(launcher: Any, composed: Sequence[Composed], refused: Sequence[Refused]) -> int:
    """Start each chain's first unfinished round, and so on; returns the exit code.

    If one is refused before any has started, nothing is. A chain whose round fails stops there, the others go on.
    """
    refused = [*refused, *_unfit(composed)]
    going, code, started = [Chain(one) for one in composed] if not refused else [], 0, False
    while going or not started:
        found, more = _ahead(going)
        runs = [*{run.directory: run for _, run in found}.values()]
        if not started:
            launcher.check(runs, [*refused, *more])  # ends here if one is refused
        for one in more:
            print(f"{_said(one.overrides)} stops its chain: {one.reason}", file=sys.stderr, flush=True)
        started, going, code = True, [], max(code, int(bool(more)))
        if found:
            code = max(code, launcher.start(runs))
        if code >= 128:  # a signal
            return code
        for chain, run in found:
            if status(run.directory) == "finished":
                going += [Chain(chain.composed, (*chain.done, run))] if chain.number < chain.rounds else []
            elif chain.number < chain.rounds:
                where = f"{_said(chain.composed.overrides)}: round {chain.number} of {chain.rounds}"
                print(f"{where} is not finished; the same command goes on from there", flush=True)
    return code


def _ahead(going: Sequence[Chain]) -> tuple[list[tuple[Chain, Run]], list[Refused]]:
    """Each chain with its first round that is not finished, or its last; and what cannot be planned."""
    found, refused = [], []
    while going:
        rounds = [chain.next() for chain in going]
        runs, more = plan(rounds)
        refused += more
        planned, further = {_key(run.config): run for run in runs}, []
        for chain, one in zip(going, rounds, strict=True):
            run = planned.get(_key(resolve(one.config)))
            if run and chain.number < chain.rounds and status(run.directory) == "finished":
                further.append(Chain(chain.composed, (*chain.done, run)))
            elif run:
                found.append((chain, run))
        going = further
    return found, refused


def _key(config: dict[str, Any]) -> tuple[str, str, str]:
    """What tells a run from others of a plan."""
    return config["runs"], config["name"], identity(config)


def _unfit(composed: Sequence[Composed]) -> list[Refused]:
    """What cannot be rounds, whatever single runs could do with it."""
    settled, refused = [], []
    for one in composed:
        try:
            config = deepcopy(one.config)
            values = resolve(config)
            if problems := faults(values) or _wrong(values):
                raise ValueError("\n".join(problems))
            for key, value in fresh_prompts(config, config.rounds).items():
                OmegaConf.update(config, key, value)
            settled.append((one, resolve(config)))  # with the prompts of the last round
        except (OmegaConfBaseException, ValueError) as error:
            refused.append(Refused(one.overrides, message(error)))
    tried = rehearse([config for _, config in settled])
    found = zip(settled, tried, strict=True)
    return refused + [Refused(one.overrides, "\n".join(got["problems"])) for (one, _), got in found if got["problems"]]


def _wrong(config: dict[str, Any]) -> list[str]:
    problems, reference, data = [], config["reference"], config["data"]
    kind = str(reference["_target_"]).rpartition(".")[2]
    if config["judge"] is None:
        problems.append("judge must be one that compares the responses of each round, got none; choose one: judge=...")
    if (baseline := config["evaluation"]["baseline"]) != "initial":
        problems.append(
            f"evaluation.baseline must be initial, the policy before the first round, so that rounds compare; got "
            f"{baseline}; leave it out"
        )
    if kind == "PrecomputedFiles":
        problems.append(
            "reference must be a model, since each round samples its pairs; got log-probs of given pairs; take "
            "reference=initial or other"
        )
    if config["held_to"] == "original" and kind != "Initial" and reference.get("path", kind) is not None:
        problems.append(
            "held_to=original needs a reference that is the policy before training: reference=initial, or live or "
            f"unconditional without a path; got {kind}; leave held_to out"
        )
    if config["prompts"] == "fresh" and config["rounds"] > 1 and not {"part", "seed"} & {*data}:
        problems.append(
            f"prompts=fresh needs data with parts or a seed, such as data=prompts, got {data['_target_']}; take "
            "prompts=same"
        )
    return problems


def _said(overrides: Sequence[str]) -> str:
    return " ".join(overrides) or "this command"
