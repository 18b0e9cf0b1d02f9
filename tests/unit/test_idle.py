"""A key that decides nothing is not given in vain: refused, or no part of what a run is."""

from dataclasses import replace

import pytest
from composing import composed

from dpo.sweep import plan as planning
from dpo.sweep.identity import flatten
from dpo.sweep.idle import IDLE
from dpo.sweep.launch import fewer
from dpo.sweep.plan import Composed, deciding_nothing, plan, resolve
from hydra_plugins.dpo_launchers import Local

FOUND = {  # overrides of one run -> what is said
    "epochs=2 steps=5": "epochs decides nothing where steps does, found 5; leave it out, or give steps=null",
    "sft.epochs=2 sft.steps=5": "sft.epochs decides nothing where sft.steps does, found 5; leave it out, or give "
    "sft.steps=null",
    "adam_betas=[0.9,0.95] optimizer=rmsprop": "adam_betas is of AdamW, found optimizer=rmsprop; leave it out",
    "pairs.outlier=shuffled": "pairs.outlier needs outliers, found none; set pairs.outliers, their share",
    "evaluate_prompts=5 evaluate_every=0": "evaluate_prompts needs evaluations on the way, found none; set "
    "evaluate_every",
    "policy.lora.alpha=8": "policy.lora.alpha is of adapters, found policy.lora.rank=null in every run; set "
    "policy.lora.rank",
}


def sweep(*runs: str, swept: str = "", verb: str = "train") -> list[Composed]:
    made = [composed(verb, *run.split()) for run in runs]
    return [replace(one, swept=frozenset(swept.split())) for one in made]


def said(*runs: str, swept: str = "", verb: str = "train") -> list[str]:
    return [one.reason for one in deciding_nothing(sweep(*runs, swept=swept, verb=verb))]


@pytest.fixture
def pairs(monkeypatch, tmp_path) -> set[float]:
    """Betas of runs whose data bring pairs; a rehearsal finds nothing else."""
    betas: set[float] = set()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        planning,
        "rehearse",
        lambda configs: [{"problems": [], "inputs": {}, "pairs": one["beta"] in betas} for one in configs],
    )
    return betas


@pytest.mark.parametrize("overrides,reason", FOUND.items())
def test_what_another_key_switches_off_is_refused(overrides, reason):
    assert said(overrides) == [reason]
    assert said(f"{overrides} beta=0.1", f"{overrides} beta=0.2") == [reason] * 2
    key, *switch = overrides.split()
    assert not said(*switch, "beta=0.1")  # it is not given
    on = {"epochs": "steps=null", "sft.epochs": "sft.steps=null", "adam_betas": "optimizer=adamw"}
    on |= {"pairs.outlier": "pairs.outliers=0.1", "evaluate_prompts": "evaluate_every=5"}
    turned = on.get(key.split("=")[0], "policy.lora.rank=8")
    assert not said(f"{key} {turned}")
    assert not said(overrides, f"{key} {turned}"), "a sweep compares runs with and without"


def test_what_a_policy_is_made_with_cannot_be_swept_beside_a_policy_that_is_there():
    """Given once it may stand in the record of a round, whose policy is that of the round before."""
    runs = ("sft.lr=1e-3 policy.path=/models/sft", "sft.lr=1e-4 policy.path=/models/sft")
    reason = "sft.lr is of a policy that is yet to be made, found policy.path=/models/sft; leave out one of the two"
    assert said(*runs, swept="sft.lr") == [reason] * 2
    assert (
        said("policy.base=a policy.path=b", "policy.base=b policy.path=b", swept="policy.base")
        == [reason.replace("sft.lr", "policy.base").replace("/models/sft", "b")] * 2
    )
    assert not said(*runs)
    assert not said("sft.lr=1e-3", "sft.lr=1e-4", swept="sft.lr")
    assert not said("sft.lr=1e-3", "sft.lr=1e-4", swept="sft.lr", verb="sft")
    assert not said(*runs, swept="sft.lr", verb="sft")  # which makes another policy of that


@pytest.mark.parametrize("key", ["generation.temperature=0.7", "engine=ray"])
def test_how_pairs_are_sampled_needs_data_without(pairs, key):
    pairs.add(0.2)
    _, [one] = plan(sweep(f"{key} beta=0.2"))
    assert one.reason.startswith(f"{key.split('=')[0]} is of pairs that are sampled, found data that bring theirs; ")
    for runs in (["beta=0.2"], [f"{key} beta=0.3"], [f"{key} beta=0.2", f"{key} beta=0.3"]):
        assert not plan(sweep(*runs))[1]


def test_every_rule_is_of_keys_that_there_are():
    keys = flatten(resolve(composed("train").config)).keys()
    for rule in IDLE:
        assert rule.switch in {*keys, "with_pairs"}
        assert all(any(f"{key}.".startswith(f"{one}.") for key in keys) for one in rule.keys)


@pytest.mark.parametrize("verb", ["generate", "judge", "score", "evaluate", "show"])
def test_runs_that_are_alike_are_one_and_this_is_told(verb, pairs, monkeypatch, capsys):
    """A command that trains nothing has one run for all betas of a grid, and none is named by a beta."""
    monkeypatch.setattr(Local, "start", lambda _, planned: 0)
    grid = [f"beta={beta} seed={seed}" for beta in (0.1, 0.2, 0.3) for seed in (0, 1)]
    runs = sweep(*grid, swept="beta seed", verb=verb)
    planned, refused = plan(runs)
    assert not refused
    assert [run.directory.name for run in planned] == ["seed=0", "seed=1"]
    with pytest.raises(SystemExit):
        Local(None).execute(runs, [])
    assert capsys.readouterr().out == f"6 combinations of overrides are 2 runs: beta decides no number of dpo.{verb}\n"


def test_what_is_told_of_fewer_runs(pairs):
    threads = sweep("beta=0.1 threads=2", "beta=1e-1 threads=3", "beta=0.2 threads=2", swept="beta threads")
    assert fewer(threads, plan(threads)[0]) == (
        "3 combinations of overrides are 2 runs: threads decides no number of dpo.train"
    )
    same = sweep("beta=0.1", "beta=1e-1", swept="beta")
    assert fewer(same, plan(same)[0]) == "2 combinations of overrides are 1 run: some have the same settings"
    others = sweep("beta=0.1", "beta=0.2", swept="beta")
    assert fewer(others, plan(others)[0]) == ""
