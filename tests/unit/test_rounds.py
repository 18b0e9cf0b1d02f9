"""Rounds as plain runs: what each is composed of, what is refused, which prompts it has, and how frames show it."""

import json
from pathlib import Path
from typing import Any

import pytest
from composing import composed
from omegaconf import OmegaConf
from sweeps import saved  # noqa: F401
from test_defaults import TRAIN

from dpo import evaluate, results
from dpo.data.prompts import prompts
from dpo.data.records import write_rows
from dpo.policy import model as models
from dpo.results.rounds import as_rounds
from dpo.sweep import rounds as module
from dpo.sweep.plan import Refused, Run, resolve
from dpo.sweep.rounds import Chain, original_policy, run_chains
from dpo.sweep.signature import instantiate

START = "models/start=1,2"


def chain(*overrides: str, done: int = 0) -> Chain:
    """A chain of which so many rounds are finished."""
    first = Run(Path("runs/rounds/default"), {"policy": {"path": START}}, "default")
    later = [Run(Path(f"runs/rounds/default,round={number}"), {}, "") for number in range(2, done + 1)]
    return Chain(composed("rounds", *overrides), (first, *later)[:done])


@pytest.mark.parametrize("reference", ["initial", "live", "unconditional"])
@pytest.mark.parametrize(
    "given",
    (
        [],
        ["held_to=original", "seed=3"],
        ["prompts=same", "rounds=4", "beta=0.2"],
        [f"policy.path={START!r}", "data.seed=7"],
    ),
)
def test_a_round_is_what_its_overrides_compose(reference, given):
    for done in range(3):
        one = chain(f"reference={reference}", *given, done=done).next()
        keys = [override.partition("=")[0] for override in one.overrides]
        assert len(keys) == len({*keys})  # each is said once
        by_hand = composed("train", *one.overrides, "name=rounds")
        assert resolve(one.config) == resolve(by_hand.config)
        assert one.choices == by_hand.choices
        assert resolve(one.config).keys() == TRAIN.keys()


def test_what_a_round_is_given():
    first, second, third = (resolve(chain("seed=3", done=done).next().config) for done in range(3))
    assert (first["policy"]["path"], first["evaluation"]["baseline"], first["data"]["seed"]) == (None, "initial", 3)
    assert second["policy"]["path"] == "runs/rounds/default/policy"
    assert third["policy"]["path"] == "runs/rounds/default,round=2/policy"
    assert [one["evaluation"]["baseline"] for one in (second, third)] == [START, START]
    assert [one["data"]["seed"] for one in (second, third)] == [1003, 2003]
    assert {one["seed"] for one in (first, second, third)} == {3}  # the same samples of the same baseline
    assert {one["reference"]["_target_"] for one in (first, second, third)} == {"dpo.references.Initial"}
    held = resolve(chain("held_to=original", done=2).next().config)["reference"]
    assert held == {"_target_": "dpo.references.Frozen", "path": START}
    same = resolve(chain("prompts=same", "seed=3", done=2).next().config)
    assert same["data"] == first["data"]


def test_names_hold_the_round_and_what_it_is_held_to():
    given = ("rounds=5", "seed=1", "held_to=original", "prompts=same")
    names = [chain(*given, done=done).next().name for done in range(3)]
    assert names == [None, *(f"default,held_to=original,prompts=same,round={number}" for number in (2, 3))]


def test_the_first_policy_is_known_by_a_path_that_holds_elsewhere(tmp_path, monkeypatch):
    """In a chain that began with SFT: what the first run says it started from, from here if it lies here."""
    monkeypatch.chdir(tmp_path)
    (run := tmp_path / "runs" / "first").mkdir(parents=True)
    for place, path in ((tmp_path / "cache" / "policy", "cache/policy"), *[(tmp_path.parent, str(tmp_path.parent))]):
        place.mkdir(parents=True, exist_ok=True)
        (run / "initial.json").write_text(json.dumps({"policy": str(place)}))
        assert original_policy(Run(Path("runs/first"), {"policy": {"path": None}}, "")) == path


def test_fresh_articles_are_others_and_test_articles_stay():
    found = [instantiate(resolve(chain(done=done).next().config)["data"]).prompts for done in range(3)]
    for split in ("train", "validation"):
        assert len({article for one in found for article in one[split]}) == sum(len(one[split]) for one in found)
    assert found[0]["test"] == found[1]["test"] == found[2]["test"]


class Refuses:
    """A launcher that starts nothing."""

    def __init__(self) -> None:
        self.refused: list[Any] = []

    def check(self, planned, refused):
        assert planned == []
        self.refused = [one.reason for one in refused]
        raise SystemExit(1)


@pytest.mark.parametrize(
    "given, reason",
    [
        (["judge=none"], "judge must be one that compares the responses of each round, got none"),
        (["rounds=0"], "rounds must be above 0, got 0"),
        (["held_to=nobody"], "held_to must be one of previous, original, got nobody"),
        (["prompts=old"], "prompts must be one of fresh, same, got old"),
        (["evaluation.baseline=human"], "evaluation.baseline must be initial"),
        (
            ["reference=precomputed", "reference.path=."],
            "reference must be a model, since each round samples its pairs",
        ),
        (["reference=ema", "held_to=original"], "held_to=original needs a reference that is the policy before"),
        (["reference=reference_free", "held_to=original"], "held_to=original needs a reference"),
        (["reference=other", "reference.path=/m", "held_to=original"], "held_to=original needs a reference"),
        (["data=file", "data.path=pairs.jsonl", "judge=gold"], "prompts=fresh needs data with parts or a seed"),
        (["data=file", "data.path=pairs.jsonl", "judge=gold", "prompts=same"], "found data with pairs"),
        (["data=prompts", "data.path=pairs.jsonl", "judge=gold", "data.train=2"], "part 2, counted from 0, of 2"),
        (
            ["data=prompts", "data.path=pairs.jsonl", "judge=gold", "rounds=2", "policy=tiny"],
            "policy.path must be given",
        ),
    ],
)
def test_what_cannot_be_rounds_starts_nothing(tmp_path, monkeypatch, given, reason, tiny_model):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"What is {n}?", "chosen": "It is.", "rejected": "Is it?"} for n in range(9)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    own = [f"policy.path={tiny_model('llama')}", "data.validation=2", "data.test=2", "data.train=2"]
    given = [*(own if "data=prompts" in given else own[:1] if "data=file" in given else []), *given]
    if "policy=tiny" in given:
        given.remove(own[0])
    launcher = Refuses()
    with pytest.raises(SystemExit):
        run_chains(launcher, [composed("rounds", *given)], [])
    [problem] = launcher.refused
    assert reason in problem
    assert {path.name for path in tmp_path.iterdir()} <= {"pairs.jsonl"}


def test_prompts_of_a_file(tmp_path):
    texts = [f"What is {n}?" for n in range(20)]
    write_rows(tmp_path / "p.jsonl", [{"prompt": text, "chosen": "It.", "label": 3} for text in [*texts, *texts]])
    parts = [prompts(str(tmp_path / "p.jsonl"), 5, part, 2, 3, "drop") for part in range(3)]
    every = [prompt for one in parts for prompt in one.prompts["train"]]
    held_out = [*parts[0].prompts["test"], *parts[0].prompts["validation"]]
    assert sorted([*every, *held_out]) == sorted(texts)
    assert all(one.prompts["test"] == parts[0].prompts["test"] and len(one.prompts["train"]) == 5 for one in parts)
    assert every != [text for text in texts if text in every]  # the order of a file, which may be by source, is left
    assert (parts[0].preferences, parts[0].demonstrations, parts[0].on_faulty) == ({}, [], "drop")
    assert len(prompts(str(tmp_path / "p.jsonl"), None, 0, 2, 3, "error").prompts["train"]) == 15
    for train, part in ((5, 3), (None, 1), (16, 0), (5, -1), (0, 0)):
        with pytest.raises(ValueError, match="must have 3 prompts for test, 2 for validation, and part"):
            prompts(str(tmp_path / "p.jsonl"), train, part, 2, 3, "error")
    chats = [[{"role": "user", "content": text}] for text in texts]
    write_rows(tmp_path / "c.jsonl", [{"prompt": chat} for chat in chats])
    assert prompts(str(tmp_path / "c.jsonl"), 1, 0, 2, 3, "error").prompts["test"][0] in chats
    write_rows(tmp_path / "n.jsonl", [{"chosen": "It."}])
    with pytest.raises(ValueError, match="must have prompt; found no prompt among chosen"):
        prompts(str(tmp_path / "n.jsonl"), 1, 0, 0, 1, "error")


def made(folder: Path, name: str, seed: int, former: str | None, measured: dict[str, Any], **more: Any) -> None:
    """A finished run; former: the run whose policy it starts from."""
    (folder / name).mkdir(parents=True)
    start = f"cache/{seed}/policy"
    config = {
        "id": name,
        "seed": seed,
        "beta": 0.1,
        "policy": {"path": former and f"runs/rounds/{former}/policy", "base": "world"},
        "evaluation": {"baseline": start if former else "initial"},
        "data": {"_target_": "w", "seed": seed if former is None else 1000 + seed, "train": 800},
        "choices": {"data": "world"},
    }
    config = OmegaConf.to_container(OmegaConf.merge(config, more))
    OmegaConf.save(OmegaConf.create(config), folder / name / "config.yaml")
    place = start if former is None else f"runs/rounds/{former}/policy"
    (folder / name / "initial.json").write_text(json.dumps({"policy": str(Path(place).resolve())}))
    common = {"win_rate/low": 0.0, "win_rate/high": 1.0, "kl/se": 0.1, "rewards/accuracies": 0.6, "steps": 3, "n": 10}
    (folder / name / "evaluation.json").write_text(json.dumps({**common, **measured}))


@pytest.fixture
def rounds(tmp_path, monkeypatch) -> Path:
    """Two rounds of two seeds, the second with a degenerate end, and a single run beside them."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/rounds")
    for seed in (0, 1):
        made(folder, f"seed={seed}", seed, None, {"win_rate": 0.6, "kl": 2.0})
        far = {"win_rate": 0.7 - 0.65 * seed, "kl": 1.0, "kl_baseline": 5.0 + seed, "kl_baseline/se": 0.2}
        made(folder, f"seed={seed},round=2", seed, f"seed={seed}", far)
    made(folder, "offline", 0, None, {"win_rate": 0.65, "kl": 3.0}, data={"train": 1600})
    return folder


def test_frames_show_rounds(rounds, saved, capsys):  # noqa: F811
    frame = results.final(rounds).set_index("run")
    assert results.swept(results.final(rounds)) == ["round", "data.train", "seed"]
    assert frame["round"].to_dict() == {
        **{"seed=0": 1, "seed=1": 1, "offline": 1},
        **{"seed=0,round=2": 2, "seed=1,round=2": 2},
    }
    assert frame.loc["seed=0,round=2", ["kl", "kl/se", "kl_start", "kl_start/se"]].tolist() == [5.0, 0.2, 1.0, 0.1]
    assert frame.loc["seed=0", "kl"] == 2.0
    assert frame["degenerate"].to_dict() == dict.fromkeys(frame.index, 0.0) | {"seed=1,round=2": 1.0}
    results.report(rounds)
    said = capsys.readouterr().out
    by_round = said.split("Mean ± standard deviation over seeds:")[1].splitlines()
    assert by_round[1].split()[:4] == ["beta", "round", "data.train", "seeds"]
    assert "degenerate" in by_round[1]
    [second] = [line for line in by_round if line.split()[:3] == ["0.1", "2", "800"]]
    assert second.endswith("0.50 ± 0.71")
    assert "5.50 ± 0.71" in second
    [axis, *_] = saved[0].axes
    assert (axis.get_xlabel(), axis.get_xscale()) == ("round", "linear")


def test_what_is_no_round_stays_as_it_is(rounds):
    """A run that goes on from another, and is compared with its own start or with people, is a run like others."""
    for name, baseline in (("mine", "initial"), ("theirs", "human"), ("odd", "runs/rounds/seed=0/policy")):
        folder = Path("runs") / name
        made(folder, "first", 0, None, {"win_rate": 0.6, "kl": 2.0})
        other = {"policy": {"path": f"runs/{name}/first/policy"}, "evaluation": {"baseline": baseline}}
        made(folder, "second", 0, "first", {"win_rate": 0.6, "kl": 2.0, "kl_baseline": 3.0}, **other)
        frame = results.final(folder)
        assert not {"round", "degenerate"} & {*frame}
        assert frame["kl"].tolist() == [2.0, 2.0]
    # from the policy of another folder
    made(Path("runs/apart"), "first", 0, "seed=0", {"win_rate": 0.6, "kl": 2.0})
    assert "round" not in results.final("runs/apart")


@pytest.mark.parametrize("path", [None, ".", "/", "m", "policy", "runs/policy", "someone/model"])
def test_wherever_a_policy_lies_a_run_is_shown(tmp_path, path):
    frozen = {"run": {"policy": {"path": path}, "evaluation": {"baseline": "initial"}}}
    assert as_rounds(tmp_path / "runs", frozen) == frozen


class Stage:
    """A launcher and all that is behind it: runs are finished when they are started, but for those that fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.finished: dict[Path, dict[str, Any]] = {}
        self.started: list[list[str]] = []
        self.refuses: set[str] = set()  # names of runs
        self.fails: dict[str, int] = {}  # names and exit codes
        monkeypatch.chdir(folder)
        monkeypatch.setattr(module, "rehearse", lambda configs: [{"problems": []}] * len(configs))
        monkeypatch.setattr(module, "status", lambda path: "finished" if path in self.finished else "planned")
        monkeypatch.setattr(module, "plan", self.plan)

    def plan(self, composed):
        runs, refused = [], []
        for one in composed:
            config = resolve(one.config)
            if (name := one.name or f"beta={config['beta']}") in self.refuses:
                refused.append(Refused(one.overrides, "there is another"))
            else:
                runs.append(Run(Path("runs") / name, {**config, "id": module.identity(config)}, ""))
        return runs, refused

    def check(self, runs, refused):
        if refused:
            raise SystemExit(" and ".join(f"{' '.join(one.overrides)}: {one.reason}" for one in refused))

    def start(self, runs):
        self.started.append([run.directory.name for run in runs])
        self.finished |= {run.directory: run.config for run in runs if run.directory.name not in self.fails}
        return max(self.fails.get(run.directory.name, 0) for run in runs)


@pytest.fixture
def stage(monkeypatch, tmp_path) -> Stage:
    return Stage(monkeypatch, tmp_path)


def asked(rounds: int, *betas: float, **more: str) -> list[Any]:
    others = [f"{key}={value}" for key, value in more.items()]
    return [composed("rounds", f"rounds={rounds}", f"beta={one}", f"policy.path={START!r}", *others) for one in betas]


def test_a_round_that_cannot_be_planned_stops_its_chain_alone(stage, capsys):
    """Of two chains the second round of one is refused: the other is started."""
    stage.refuses = {"beta=0.2,round=2"}
    assert run_chains(stage, asked(2, 0.1, 0.2), []) == 1
    assert stage.started == [["beta=0.1", "beta=0.2"], ["beta=0.1,round=2"]]
    assert "stops its chain: there is another" in capsys.readouterr().err
    assert run_chains(stage, asked(2, 0.1), []) == 0
    assert stage.started[2:] == [["beta=0.1,round=2"]]  # finished, and shown once more


def test_a_first_round_that_cannot_be_planned_starts_nothing(stage):
    stage.refuses = {"beta=0.2"}
    with pytest.raises(SystemExit, match=r"beta=0\.2 .*: there is another"):
        run_chains(stage, asked(2, 0.1, 0.2), [])
    assert stage.started == []


def test_a_round_that_fails_stops_its_chain_alone(stage, capsys):
    """The next command goes on where each chain is: what fails last is told by the launcher."""
    stage.fails = {"beta=0.2,round=2": 1, "beta=0.1,round=3": 1}
    assert run_chains(stage, asked(3, 0.1, 0.2), []) == 1
    assert stage.started == [["beta=0.1", "beta=0.2"], ["beta=0.1,round=2", "beta=0.2,round=2"], ["beta=0.1,round=3"]]
    said = capsys.readouterr().out
    assert said.count("is not finished") == 1
    assert "beta=0.2" in said
    assert "round 2 of 3 is not finished; the same command goes on from there" in said
    stage.fails = {}
    assert run_chains(stage, asked(3, 0.1, 0.2), []) == 0
    assert stage.started[3:] == [["beta=0.2,round=2", "beta=0.1,round=3"], ["beta=0.2,round=3"]]
    for beta in (0.1, 0.2):
        made = [stage.finished[Path(f"runs/beta={beta}{name}")] for name in ("", ",round=2", ",round=3")]
        starts = [config["policy"]["path"] for config in made]
        assert starts == [START, f"runs/beta={beta}/policy", f"runs/beta={beta},round=2/policy"]
        assert [config["data"]["seed"] for config in made] == [0, 1000, 2000]


def test_no_round_follows_a_signal(stage, capsys):
    stage.fails = {"beta=0.2": 143}
    assert run_chains(stage, asked(2, 0.1, 0.2), []) == 143
    assert stage.started == [["beta=0.1", "beta=0.2"]]
    assert capsys.readouterr().out == ""  # it has said so itself


def test_a_command_of_no_overrides_is_told(stage, capsys):
    stage.fails = {"beta=0.1": 1}
    assert run_chains(stage, [composed("rounds")], []) == 1
    assert "this command: round 1 of" in capsys.readouterr().out


def test_chains_of_one_first_round_start_it_once(stage):
    assert run_chains(stage, [*asked(2, 0.1), *asked(3, 0.1)], []) == 0
    assert stage.started == [["beta=0.1"], ["beta=0.1,round=2"], ["beta=0.1,round=3"]]


def test_what_can_be_rounds_is_not_refused_and_what_cannot_is_told_by_its_overrides(stage, monkeypatch):
    held = "held_to=original"
    fits = [composed("rounds", held, f"reference={name}") for name in ("initial", "live", "unconditional")]
    fits.append(
        composed("rounds", "data=file", "data.path=pairs.jsonl", "rounds=1", "judge=gold", "policy.path=models")
    )
    assert module._unfit(fits) == []
    torn = composed("rounds", "judge=none", "seed=1")
    monkeypatch.setattr(
        module, "rehearse", lambda configs: [{"problems": ["odd"] * (one["seed"] == 5)} for one in configs]
    )
    found = module._unfit([fits[0], torn, fits[1], composed("rounds", "seed=5")])
    assert [one.overrides for one in found] == [["judge=none", "seed=1"], ["seed=5"]]
    assert found[1].reason == "odd"


def test_kl_is_to_a_baseline_that_reads_the_same_tokens(tiny_model):
    tokenizer = models.load_tokenizer(models.ModelSpec(tiny_model("llama")))
    paths = ("initial", "human", tiny_model("llama"))
    assert [evaluate.reads_alike(models.ModelSpec(path), tokenizer) for path in paths] == [False, False, True]
    tokenizer.add_tokens(["a word more"])
    assert not evaluate.reads_alike(models.ModelSpec(tiny_model("llama")), tokenizer)
    tokenizer = models.load_tokenizer(models.ModelSpec(tiny_model("llama")))
    tokenizer.eos_token = next(token for token, id in tokenizer.get_vocab().items() if id != tokenizer.eos_token_id)
    assert not evaluate.reads_alike(models.ModelSpec(tiny_model("llama")), tokenizer)
