"""Runs of a folder that train on from the policy of another of its runs, as those of `dpo.rounds`."""

from copy import deepcopy
from pathlib import Path
from typing import Any

from dpo.sweep.directory import initial

FOLLOW = (("policy", "path"), ("evaluation", "baseline"), ("data", "seed"), ("data", "part"))  # from chain and round
KLS = {"kl": "kl_start", "kl_baseline": "kl"}  # as a single run calls them: as a later round does


def as_rounds(path: Path, frozen: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The configs with the `round` of each, if there is a second, and the keys that follow from it as in the first."""
    former = {run: _former(path, config, frozen) for run, config in frozen.items()}
    if not any(former.values()):
        return frozen
    found = deepcopy(frozen)
    for run, config in found.items():
        first, number = run, 1
        while (earlier := former[first]) is not None and number <= len(frozen):
            first, number = earlier, number + 1
        config["round"] = number
        for group, key in FOLLOW:
            if key in config.get(group, {}) and key in frozen[first].get(group, {}):
                config[group][key] = frozen[first][group][key]
    return found


def to_original(metrics: dict[str, Any]) -> dict[str, Any]:
    """What a later round measured, with `kl` to the policy before the first, and `kl_start` to its own start."""
    if "kl_baseline" not in metrics:
        return metrics
    names = {f"{old}{end}": f"{new}{end}" for old, new in KLS.items() for end in ("", "/se", "_plain", "_plain/se")}
    return {names.get(key, key): value for key, value in metrics.items()}


def _former(path: Path, config: dict[str, Any], frozen: dict[str, dict[str, Any]]) -> str | None:
    """The run of the folder from whose policy this one starts, if both are measured against the same policy."""
    *_, folder, run, policy = ("", "", "", *Path(str(config.get("policy", {}).get("path"))).parts)
    if (folder, policy) != (path.resolve().name, "policy") or run not in frozen:
        return None
    mine, its = (one.get("evaluation", {}).get("baseline", "initial") for one in (config, frozen[run]))
    start = frozen[run].get("policy", {}).get("path")
    same = {its} if its != "initial" else {start, initial(path / run)}
    return run if {mine, str(Path(mine).resolve())} & same else None
