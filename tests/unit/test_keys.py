"""What decides each thing that is made once and shared: a literal table for every cache, asked with no training.

A setting that decides must miss, any other must hit; and what the making reads must be in the key, or be one of those
that cannot change a number. The table is by hand: it is not asked of the code that it tests.
"""

import copy
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHAT_TEMPLATE
from omegaconf import DictConfig, OmegaConf
from whole_runs import frozen

from dpo import engines, evaluate, generate, sft
from dpo import judge as judging
from dpo.data.batches import tokenize
from dpo.data.records import Dataset, Demonstration, Preference
from dpo.data.truncation import Limits
from dpo.policy import model as models
from dpo.policy import sampling, scoring
from dpo.policy.sampling import Sample, Sampling
from dpo.policy.scoring import Scoring
from dpo.references import Initial, OtherTokenizer
from dpo.settings import (
    BestOf,
    Evaluation,
    Generation,
    Pairing,
    Sft,
    evaluation_of,
    generation_of,
    lora_of,
    pairing_of,
    policy_spec,
    scoring_of,
    sft_of,
)
from dpo.sweep.identity import flatten
from dpo.training import distributed
from dpo.training.optim import Recipe

SFT = {f"sft.{key}" for key in ("batch_size", "lr", "epochs", "steps", "schedule", "warmup_steps")}
DECIDE = {  # kind -> settings that decide what is made; all others do not
    "sft": SFT
    | {"policy.base", "policy.chat_template", "policy.date", "optimizer", "adam_betas", "weight_decay", "max_grad_norm"}
    | {"max_length", "on_too_long", "precision", "seed"},
    "candidates": {f"generation.{key}" for key in ("samples_per_prompt", "temperature", "top_p")}
    | {"max_length", "max_new_tokens", "seed", "engine._target_", "engine._partial_"},
    "pairs": {"judge._target_", "rule", "generation.pairs_per_prompt", "seed"},
    "baseline": {"evaluation.prompts", "evaluation.temperature", "evaluation.engine"}
    | {"max_length", "max_new_tokens", "seed"},
    "best_of_n": {"evaluation.prompts", "evaluation.temperature", "evaluation.engine", "judge._target_", "rule"}
    | {"max_length", "max_new_tokens", "seed"},
    "reference": {"precision"},
    "other-reference": {"precision", "policy.date"},
}
# What the making reads beside that: where and how, never what.
HOW = {
    *(
        "micro_batch_tokens",
        "packed",
        "activation_checkpointing",
        "checkpoint_every",
        "checkpoints_kept",
        "evaluate_every",
        "cache",
    ),
    *("generation.batch_size", "evaluation.batch_size"),
    *("sharding.group", "sharding.offload", "policy.trust_remote_code"),
}
OTHER = {  # setting -> another value that is valid, where one more, or one word more, is not
    **{"optimizer": "rmsprop", "schedule": "constant", "sft.schedule": "constant", "precision": "bf16"},
    **{"on_too_long": "drop", "keep": "best", "device": "cpu", "adam_betas": [0.8, 0.99]},
    **{"policy.chat_template": f"now: {CHAT_TEMPLATE}", "policy.date": "2024-07-27", "generation.top_p": 0.5},
    **{
        "max_length": 50,
        "evaluation.prompts": 1,
        "policy.path": None,
        "judge._partial_": True,
        "engine._partial_": False,
    },
    **{key: {"_target_": "dpo.judges.accurate_then_short", "_partial_": True} for key in ("rule", "evaluation.rule")},
    "evaluation.engine": {"_target_": "dpo.engines.transformers", "_partial_": True},
}
CHATS = [[{"role": "user", "content": f"Is {n} even, {'or odd, ' * n}please?"}] for n in (1, 2, 15)]
TODAY = "{{ strftime_now('%d %b %Y') }}"


RESPONSES = [Sample([7], [8, 9], "a" * nth, ended=True) for nth in range(4)]
SAMPLED = {split: [generate.Candidate("p", "p", one, "t") for one in RESPONSES] for split in ("train", "validation")}


class Asked(Exception):
    def __init__(self, root: str, kind: str, key: dict[str, Any], any_true: Any) -> None:
        self.root, self.kind, self.key, self.any_true = root, kind, key, any_true


def said(text: str, ended: bool = True) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def world(tiny_model, tmp_path_factory) -> dict[str, str]:
    """Two tiny models that print today's date, told apart by one weight."""
    model, tokenizer = models.load(tiny_model("qwen2"))
    tokenizer.chat_template = TODAY + CHAT_TEMPLATE
    folder = tmp_path_factory.mktemp("keys")
    models.save(model, tokenizer, folder / "one")
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    models.save(model, tokenizer, folder / "other")
    return {"one": str(folder / "one"), "other": str(folder / "other")}


@pytest.fixture
def ask(world, tmp_path, monkeypatch):
    """ask(kind, config): with what `remember` is called; build: what to do with the function that makes it."""
    load, load_tokenizer, build = lru_cache(models.load), lru_cache(models.load_tokenizer), []

    def remember(root, kind, key, make, any_true=bool, about=dict):
        if build:
            build[0](make)
        raise Asked(str(root), kind, copy.deepcopy(key), any_true)

    for module in (sft, generate, judging, evaluate, scoring):
        monkeypatch.setattr(module, "remember", remember)
    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(models, "load_tokenizer", load_tokenizer)
    demonstrations = [Demonstration(chat, said("It is.")) for chat in CHATS]
    pairs = [Preference(chat, said("Yes."), said("No, never.")) for chat in CHATS]
    length = lambda prompt, texts: [{"score": float(len(text) % 3)} for text in texts]  # noqa: E731

    def ask(kind, config, making=None, **changed) -> Asked:
        build[:] = [making] if making else []
        given = {"demonstrations": demonstrations, "prompts": CHATS, "held_out": CHATS[:1], "weights": "w"}
        given |= {"sampled": SAMPLED, **changed}
        model, tokenizer = load(models.ModelSpec(world["one"], date="2024-07-26"), torch.device("cpu"))
        tokenizer = changed.get("tokenizer", tokenizer)
        with pytest.raises(Asked) as caught:  # noqa: PT012
            if kind == "sft":
                sft.cached_policy(
                    sft_of(config), given["demonstrations"], torch.device("cpu"), given.get("on_faulty", "error")
                )
            if kind == "candidates":
                prompts = {"train": given["prompts"], "validation": given["held_out"]}
                generate.candidates(model, tokenizer, prompts, generation_of(config), given["weights"])
            if kind == "pairs":
                judging.cached_preferences(given["sampled"], length, pairing_of(config))
            if kind == "baseline":
                test = evaluate.test_prompts(
                    Dataset([], {}, {"test": given["prompts"]}), evaluation_of(config), tokenizer
                )
                evaluate.baseline(model, tokenizer, given["weights"], test, evaluation_of(config))
            if kind == "best_of_n":
                test = evaluate.test_prompts(
                    Dataset([], {}, {"test": given["prompts"]}), evaluation_of(config), tokenizer
                )
                made = pairing_of(config)
                best = BestOf(given.get("n", 3), length, None, {"judge": made.judge, "rule": made.rule})
                evaluate.best_of_n(model, tokenizer, given["weights"], test, evaluation_of(config), best, "policy")
            if kind == "reference":
                Initial().prepare(
                    policy_spec(config, world["one"]),
                    model,
                    {"train": tokenize(pairs, tokenizer, 200, "error")},
                    scoring_of(config),
                )
            if kind == "other-reference":
                reference = OtherTokenizer(world[given.get("path", "one")], None, by_text=False)
                reference.prepare(
                    policy_spec(config, world["one"]),
                    model,
                    {"train": tokenize(pairs, tokenizer, 200, "error")},
                    scoring_of(config),
                )
        return caught.value

    return ask


@pytest.fixture
def settings(world, tmp_path) -> Any:
    lengths = ["max_length=60", "max_new_tokens=4", "on_too_long=truncate", "evaluation.prompts=2"]
    config = frozen(tmp_path / "run", *lengths, f"policy.base={world['one']}", "policy.date=2024-07-26", "sft.steps=1")
    return config


def changed(config: Any, key: str, world: dict[str, str]) -> Any:
    value, other = OmegaConf.select(config, key), copy.deepcopy(config)
    new = {**OTHER, "policy.base": world["other"]}.get(key)
    if key not in OTHER and new is None:
        new = not value if isinstance(value, bool) else f"{value}?" if isinstance(value, str) else (value or 0) + 1
    OmegaConf.set_struct(other, False)
    OmegaConf.update(other, key, new)
    return other


@pytest.mark.parametrize("kind", DECIDE)
def test_what_decides_misses_and_all_else_hits(ask, settings, world, kind):
    found = ask(kind, settings)
    assert (found.root, found.kind) == (settings.cache, kind.rpartition("-")[2])
    assert found.any_true is distributed.any_true  # all ranks build, or none
    assert ask(kind, settings).key == found.key
    keys = flatten(OmegaConf.to_container(settings))
    assert len(keys) > 60
    decides = {key for key in keys if ask(kind, changed(settings, key, world)).key != found.key}
    assert decides == DECIDE[kind]


@contextmanager
def reads(monkeypatch):
    """The settings that are read meanwhile, by the last part of their names."""
    found: set[str] = set()
    get = object.__getattribute__

    def noted(value, name):
        if name in type(value).__dataclass_fields__:
            found.add(name)
        return get(value, name)

    attribute, item = DictConfig.__getattr__, DictConfig.__getitem__

    def note(node, key, value):
        if not isinstance(value, DictConfig) and not str(key).startswith("__"):
            found.add(str(key))
        return value

    with monkeypatch.context() as patch:
        patch.setattr(DictConfig, "__getattr__", lambda node, key: note(node, key, attribute(node, key)))
        patch.setattr(DictConfig, "__getitem__", lambda node, key: note(node, key, item(node, key)))
        for typed in (Pairing, Sft, Recipe, Generation, Sampling, Limits, Evaluation, Scoring):
            patch.setattr(typed, "__getattribute__", noted)
        yield found


@pytest.mark.parametrize("kind", ["sft", "candidates", "pairs", "baseline", "best_of_n", "reference"])
def test_what_the_making_reads_is_in_the_key_or_changes_no_number(ask, settings, tmp_path, monkeypatch, kind):
    read: set[str] = set()

    def make(build):
        with reads(monkeypatch) as found:
            build(tmp_path)
        read.update(found)

    ask(kind, settings, make)
    decides, how = ({key.rpartition(".")[2] for key in keys} for keys in (DECIDE[kind], HOW))
    assert read & decides
    read -= {"engine", "recipe", "sampling", "limits", "generation"}  # which hold the others
    assert read - decides - how == ({"top_p"} if kind in ("baseline", "best_of_n") else set())  # it is always 1


def test_what_is_given_beside_the_settings_decides_too(ask, settings, world, monkeypatch):
    """Texts, weights, the tokenizer, the code's own versions."""
    base = {kind: ask(kind, settings).key for kind in DECIDE}

    def missed(kind, config=settings, **given):
        return ask(kind, config, **given).key != base[kind]

    answers = [Demonstration(CHATS[0], said("It is.")), Demonstration(CHATS[1], said("It is."))]
    assert missed("sft", demonstrations=answers)
    silent = changed(settings, "policy.chat_template", world)
    silent.policy.chat_template = "{# renders the same, and is saved with the policy #}" + TODAY + CHAT_TEMPLATE
    assert missed("sft", silent)
    assert missed("sft", changed(settings, "policy.base", world))
    second = copy.deepcopy(settings)
    second.adam_betas = [settings.adam_betas[0], 0.95]
    assert missed("sft", second)
    asked: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(sft, "tokenize_demonstrations", lambda *given: asked.append(given) or [])
        ask("sft", settings, on_faulty="drop")
    assert asked[0][2:] == (60, "truncate", "drop")
    assert missed("candidates", weights="v")
    assert missed("baseline", weights="v")
    assert missed("best_of_n", weights="v")
    assert missed("best_of_n", n=4)
    assert missed("other-reference", path="other")
    for prompts in (CHATS[:2], [*CHATS[:2], [{"role": "user", "content": "?"}]]):
        assert missed("candidates", prompts=prompts)
    assert missed("baseline", prompts=CHATS[1:])
    assert missed("baseline", prompts=[CHATS[0], CHATS[2]])
    assert missed("candidates", held_out=CHATS[1:2])
    cut = [[[{"role": "user", "content": f"{word} 15 even, {'or odd, ' * 15}please?"}]] for word in ("Is", "Was")]
    one, other = (ask("best_of_n", settings, prompts=prompts).key for prompts in cut)
    assert one["prompt_ids"] == other["prompt_ids"]
    assert one != other
    for split in ("prompts", "held_out"):  # fed the same, and judged by all of their text
        one, other = (ask("candidates", settings, **{split: prompts}).key for prompts in cut)
        assert one["prompt_ids"] == other["prompt_ids"]
        assert one != other
    one, other = (ask("candidates", settings, prompts=CHATS[:place], held_out=CHATS[place:]).key for place in (1, 2))
    assert one != other
    plain = copy.deepcopy(models.load_tokenizer(models.ModelSpec(world["one"], date="2024-07-26")))
    plain.add_special_tokens({"pad_token": "<pad>"})
    for kind in ("candidates", "baseline", "best_of_n"):
        assert missed(kind, tokenizer=plain)
    longer = copy.deepcopy(settings)
    longer.max_length, longer.max_new_tokens = 61, 5  # so that prompts are cut to as much as before
    assert {kind for kind in DECIDE if missed(kind, longer)} == {"sft", "candidates", "baseline", "best_of_n"}
    graded = copy.deepcopy(settings)
    OmegaConf.set_struct(graded, False)
    graded.judge.strict = True
    assert missed("pairs", graded)
    assert missed("best_of_n", graded)
    assert not missed("baseline", graded)
    for other in (SAMPLED["train"][:3], SAMPLED["train"][::-1]):
        assert missed("pairs", sampled=SAMPLED | {"validation": other})
    for module, version, kinds in (
        (judging, "JUDGES_VERSION", {"pairs"}),
        (evaluate, "JUDGES_VERSION", {"best_of_n"}),
        (sampling, "SAMPLING_VERSION", {"candidates", "baseline", "best_of_n"}),
        (scoring, "SCORING_VERSION", {"reference", "other-reference"}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, version, getattr(module, version) + 1)
            assert {kind for kind in DECIDE if missed(kind)} == kinds
    model, _ = models.load(models.ModelSpec(world["one"], date="2024-07-26"), torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(model.generation_config, "eos_token_id", [model.generation_config.eos_token_id, 9])
        assert {kind for kind in DECIDE if missed(kind)} == {"candidates", "baseline", "best_of_n"}
    with monkeypatch.context() as patch:  # these weights compute something else
        patch.setattr(model.config, "rms_norm_eps", 0.5)
        assert {kind for kind in DECIDE if missed(kind)} == {"reference"}  # the others are given its fingerprint
    started_from, _ = models.load(sft_of(settings).base, torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(started_from.generation_config, "eos_token_id", [started_from.generation_config.eos_token_id, 9])
        assert {kind for kind in DECIDE if missed(kind)} == {"sft"}  # which is saved with the policy
    with monkeypatch.context() as patch:
        patch.setattr(started_from.config, "rms_norm_eps", 0.5)  # of the other reference's folder, too
        assert {kind for kind in DECIDE if missed(kind)} == {"sft", "other-reference"}
    with monkeypatch.context() as patch:
        patch.setattr(started_from.config, "dtype", torch.bfloat16)  # of the files; in memory it is float32
        patch.setattr(started_from.config, "use_cache", True)
        assert not missed("sft")
    with torch.no_grad():
        next(model.parameters())[-1, -1] += 1e-6  # the policy's own weights
    assert missed("reference")


def _into(folder: Path, build: Any) -> None:
    build(folder)


def test_the_splits_of_pairs_have_random_numbers_of_their_own(ask, settings, tmp_path, monkeypatch):
    seeds = {"candidates": [], "pairs": []}

    def sample(model: Any, tokenizer: Any, prompts: Any, sampling: Any, seed: int, *_: Any) -> list[Any]:
        seeds["candidates"].append(seed)
        return [Sample(ids, [1], "a", ended=True) for ids in prompts]

    monkeypatch.setattr(engines, "sample", sample)
    monkeypatch.setattr(generate, "write_rows", lambda *_: None)
    monkeypatch.setattr(judging, "_pairs", lambda *given: seeds["pairs"].append(given[-1]) or ["a pair"])
    monkeypatch.setattr(judging, "write", lambda *_: None)
    for number in (0, 1):
        config = copy.deepcopy(settings)
        config.seed = number
        (folder := tmp_path / str(number)).mkdir()
        for kind in seeds:
            ask(kind, config, partial(_into, folder))
    assert len(set(seeds["candidates"])) == len(seeds["candidates"]) == 4
    assert seeds["candidates"] == seeds["pairs"]


@pytest.mark.parametrize("place", [0, 2**20, -1])
def test_the_fingerprint_of_a_large_weight_sees_every_byte(place):
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.zeros(3 * 2**20, dtype=torch.uint8), requires_grad=False)
    before = models.weights_digest(module)
    module.weight[place] = 1
    assert models.weights_digest(module) != before


def test_a_cached_policy_lies_where_its_key_says(ask, settings, tmp_path):
    """No checkpoint is kept, and the next attempt trains nothing where the policy is there."""
    made: list[Path] = []

    def make(build):
        build(tmp_path)
        made.append(tmp_path / "policy" / "model.safetensors")
        before = made[0].stat().st_mtime_ns
        build(tmp_path)
        assert made[0].stat().st_mtime_ns == before

    ask("sft", settings, make)
    assert not (tmp_path / "checkpoint").exists()


def test_configs_from_before_a_key_are_read(settings):
    """A study reads runs that were frozen when there were no rules and no adapters."""
    former = OmegaConf.to_container(settings)
    del former["rule"], former["evaluation"]["rule"], former["policy"]["lora"], former["policy"]["adapter"]
    config = OmegaConf.create(former)
    assert pairing_of(config) == pairing_of(settings)
    assert evaluation_of(config) == evaluation_of(settings)
    assert (policy_spec(config), lora_of(config)) == (policy_spec(settings), None)
