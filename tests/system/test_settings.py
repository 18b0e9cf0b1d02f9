"""Every setting reaches its work: a run with all of them at unusual values, done again by other code, and spies.

Its pairs are of unequal length, gradients are clipped, warm-up and decay are on, one pair is too long, and the held-out
pairs are the other way round, so that the selected step is not the last.
"""

import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composing import compose
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoTokenizer, LlamaForCausalLM

from dpo import evaluate, score, sft, train
from dpo.data import kept
from dpo.data.batches import Batches
from dpo.policy import model as models
from dpo.policy import scoring
from dpo.settings import policy_spec
from dpo.sweep.identity import identity
from dpo.sweep.plan import resolve
from dpo.sweep.schema import check
from dpo.training import distributed
from dpo.training.distributed import ParallelLayout
from dpo.training.log import Log

ROOT = Path(__file__).parents[2]
PAIRS, HELD_OUT, LONGEST = 20, 5, 40  # LONGEST: tokens of prompt and response; one more pair has more

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }} {{ strftime_now('%Y') }}>{{ message.content }}"
    "{{ eos_token if message.role == 'assistant' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
INSTRUCTIONS = [{"instruction": "Say a.", "output": ""}, {"instruction": "Say b.", "output": ""}]


def frozen(directory: Path, *overrides: str, command: str = "train") -> Any:
    """What a sweep would freeze, and what is asked of the mirror without it."""
    directory.mkdir(parents=True)
    resolved = resolve(compose(command, *overrides, f"cache={directory.parent / 'cache'}", "wandb.mode=disabled"))
    check(resolved)
    return OmegaConf.create({"id": identity(resolved), **resolved})


def texts(number: int) -> tuple[str, str, str]:
    return (
        f"\n\nHuman: What is {number}{' and' * (number % 4)}?\n\nAssistant:",
        f" It is {'Rome' * (number % 5)}{number}.",
        f" Is{' it' * (number % 3)} {number}? No.",
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Pairs of unequal length; one of each split is too long. Held out: other prompts, and what is better is worse."""
    folder = tmp_path_factory.mktemp("data")
    names = ("prompt", "chosen", "rejected")
    rows = [dict(zip(names, texts(number), strict=True)) for number in range(PAIRS)]
    rows.append({"prompt": "Human: Why?", "chosen": " So." + " it is" * LONGEST, "rejected": " No."})
    held_out = [texts(number) for number in range(100, 100 + HELD_OUT)]
    others = [dict(zip(names, (prompt, worse, better), strict=True)) for prompt, better, worse in held_out]
    others.insert(1, {"prompt": " it is" * LONGEST, "chosen": " So.", "rejected": " No."})
    for name, some in (("pairs", rows), ("held_out", others)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (folder / "instructions.json").write_text(json.dumps(INSTRUCTIONS))
    return folder


def own(data: Path, base: str) -> list[str]:
    return [
        *("data=file", f"data.path={data / 'pairs.jsonl'}", f"data.validation_path={data / 'held_out.jsonl'}"),
        *(f"policy.base={base}", f"max_length={LONGEST}", "max_new_tokens=6", "on_too_long=drop", "threads=1"),
    ]


UNUSUAL = [
    *("seed=5", "beta=0.7", "lr=4e-3", "loss.label_smoothing=0.2", "batch_size=12", "epochs=3", "schedule=cosine"),
    *("warmup_steps=1", "adam_betas=[0.6,0.8]", "weight_decay=0.3", "max_grad_norm=0.05", "device=cpu"),
    *("evaluate_every=4", "evaluate_prompts=3", "keep=best", "checkpoint_every=2", "checkpoints_kept=3"),
    *("sft.batch_size=9", "sft.lr=3e-3", "sft.epochs=2", "sft.schedule=linear", "sft.warmup_steps=0.34"),
    *("evaluation.prompts=4", "evaluation.temperature=0.8", "evaluation.batch_size=3", "evaluation.log_samples=2"),
    *("generation.temperature=0.3", "generation.batch_size=7", "judge=shorter", "name=unusual", "sharding.group=1"),
    *(f"policy.chat_template={TEMPLATE!r}".replace("\\'", "'"), "policy.date=2001-02-03"),
    *("policy.trust_remote_code=true", "data.on_faulty=keep"),
]


@dataclass
class Run:
    """What a run left behind, and how it called what it needs."""

    directory: Path
    config: Any
    calls: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]

    def of(self, split: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["split"] == split]

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.directory / "evaluation.json").read_text())

    @property
    def policy(self) -> dict[str, Tensor]:
        return weights(self.directory / "policy")

    @property
    def sft(self) -> Path:
        (folder,) = (self.directory.parent / "cache" / "sft").glob("*/policy")
        return folder


def weights(folder: Path | str) -> dict[str, Tensor]:
    return dict(LlamaForCausalLM.from_pretrained(folder).named_parameters())


def watch(patch: pytest.MonkeyPatch, calls: dict[str, list[dict[str, Any]]], place: Any, name: str, key: str) -> None:
    """Record with what a function is called, defaults included, whether by name or by place, and in which mode."""
    function = getattr(place, name)
    signature = inspect.signature(function)

    def watched(*given: Any, **named: Any) -> Any:
        bound = signature.bind(*given, **named)
        bound.apply_defaults()
        products = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        calls.setdefault(key, []).append({**bound.arguments, "products": products, "grad": torch.is_grad_enabled()})
        return function(*given, **named)

    patch.setattr(place, name, watched)


WATCHED = [
    *((models, name) for name in ("load", "load_tokenizer", "check_length", "checkpoint_activations")),
    *((distributed, name) for name in ("join",)),
    *((train, "fit"), (sft, "fit"), (train, "optimizer"), (sft, "optimizer"), (sft, "tokenize_demonstrations")),
    *(
        (evaluate, "sample"),
        (evaluate, "kl"),
        (evaluate, "collate_responses"),
        (scoring, "collate_responses"),
        (scoring, "balance_by_tokens"),
    ),
    *((kept, "numbered"), (kept, "filter_identical")),
    *((train, "token_logps"), (sft, "sequence_logps"), (scoring, "token_logps"), (evaluate, "sequence_kl")),
    *((Log, "__init__"), (Batches, "__init__")),
]


def ran(directory: Path, *overrides: str, command: str = "train") -> Run:
    run = Run(directory, frozen(directory, *overrides, command=command))
    with pytest.MonkeyPatch.context() as patch:
        for place, name in WATCHED:
            owner = place.__name__.rpartition(".")[2]
            watch(patch, run.calls, place, name, f"{owner}.{name}")
        {"train": train, "sft": sft, "score": score}[command].run(run.config, directory)
    return run


@pytest.fixture(scope="module")
def unusual(tmp_path_factory, tiny_model, data) -> Run:
    given = [*own(data, tiny_model("llama")), f"evaluation.instructions={data / 'instructions.json'}"]
    return ran(tmp_path_factory.mktemp("unusual") / "run", *given, *UNUSUAL)


# The same again, in float64 and by plain code.


def tokens(folder: str, number: int) -> tuple[list[int], list[int], list[int]]:
    """Prompt, better and worse response."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt, *sides = texts(number)
    responses = [tokenizer(side, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for side in sides]
    return tokenizer(prompt)["input_ids"], *responses


def logps(model: LlamaForCausalLM, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Of the response of each row; what pads a row comes after all that is read.  # (rows,)"""
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    padded = torch.tensor(
        [[*prompt, *response, *[0] * (longest - len(prompt) - len(response))] for prompt, response in rows]
    )
    found = model(input_ids=padded).logits.log_softmax(-1)
    return torch.stack(
        [
            found[row, range(len(prompt) - 1, len(prompt) + len(response) - 1), response].sum()
            for row, (prompt, response) in enumerate(rows)
        ]
    )


def both(model: LlamaForCausalLM, pairs: Sequence[tuple[list[int], list[int], list[int]]]) -> Tensor:
    """Of better and worse responses.  # (2, pairs)"""
    better, worse = ([(pair[0], pair[side]) for pair in pairs] for side in (1, 2))
    return logps(model, [*better, *worse]).view(2, -1)


def windows(seed: int, items: int, size: int, epochs: int) -> list[list[int]]:
    orders = [np.random.default_rng((seed, epoch)).permutation(items).tolist() for epoch in range(epochs)]
    return [order[first : first + size] for order in orders for first in range(0, items, size)]


def adamw(model, losses, rates: Sequence[float], betas=(0.6, 0.8), decay=0.3, clip=0.05):
    """Losses and gradient norms of each step, and the weights before each and after all."""
    parameters = dict(model.named_parameters())
    first, second = ({name: torch.zeros_like(one) for name, one in parameters.items()} for _ in range(2))
    seen, norms, path = [], [], [{name: one.detach().clone() for name, one in parameters.items()}]
    for step, (loss, rate) in enumerate(zip(losses, rates, strict=True), start=1):
        seen.append(value := loss())
        gradients = torch.autograd.grad(value, list(parameters.values()))
        norms.append(norm := math.sqrt(sum(one.square().sum().item() for one in gradients)))
        assert norm > 2 * clip
        for (name, weight), gradient in zip(parameters.items(), gradients, strict=True):
            clipped = gradient * clip / norm
            first[name] = betas[0] * first[name] + (1 - betas[0]) * clipped
            second[name] = betas[1] * second[name] + (1 - betas[1]) * clipped**2
            mean, square = first[name] / (1 - betas[0] ** step), second[name] / (1 - betas[1] ** step)
            with torch.no_grad():
                weight.sub_(rate * decay * weight)
                weight.sub_(rate * mean / (square.sqrt() + 1e-8))
        path.append({name: one.detach().clone() for name, one in parameters.items()})
    assert max(norms) > 1.2 * min(norms)
    return [value.item() for value in seen], norms, path


def near(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor], within: float = 2e-3) -> bool:
    """Whether weights moved to where they should, but for so small a share of their way."""
    assert found.keys() == expected.keys()
    off = sum((found[name].double() - expected[name]).square().sum() for name in found)
    way = sum((expected[name] - start[name].double()).square().sum() for name in found)
    return bool(off < within**2 * way)


def dpo_loss(model: LlamaForCausalLM, pairs, reference: Tensor, beta: float = 0.7, smoothing: float = 0.2) -> Tensor:
    """Mean over pairs."""
    better, worse = both(model, pairs) - reference
    margins = beta * (better - worse)
    return (-(1 - smoothing) * logsigmoid(margins) - smoothing * logsigmoid(-margins)).mean()


def test_every_setting_of_a_run_reaches_its_work(unusual, tiny_model):
    run, base = unusual, tiny_model("llama")
    told = [tokens(base, number) for number in range(PAIRS)]
    held_out = [tokens(base, number) for number in range(100, 100 + HELD_OUT)]
    held_out = [(prompt, worse, better) for prompt, better, worse in held_out]

    # SFT: 20 demonstrations in batches of 9, 9 and 2, twice; two of the six steps are warm-up (0.34 of them).
    model = LlamaForCausalLM.from_pretrained(base).double()
    mean_length = sum(len(better) for _, better, _ in told) / PAIRS

    def likelihood(rows: list[int]) -> Tensor:
        return -logps(model, [told[row][:2] for row in rows]).mean() / mean_length

    steps = [lambda rows=rows: likelihood(rows) for rows in windows(5, PAIRS, 9, 2)]
    rates = [3e-3 * share for share in (1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4)]
    losses, norms, path = adamw(model, steps, rates)
    made = [json.loads(line) for line in (run.sft.parent / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in made] == pytest.approx(losses, rel=1e-4)
    assert [row["grad_norm"] for row in made] == pytest.approx(norms, rel=1e-3)
    assert [row["lr"] for row in made] == pytest.approx(rates)
    assert near(weights(run.sft), path[-1], path[0])

    # DPO: 20 pairs in batches of 12 and 8, three times; one step of warm-up, then a cosine.
    model = LlamaForCausalLM.from_pretrained(run.sft).double()
    with torch.no_grad():
        reference, held_to = both(model, told), both(model, held_out)
    validation: list[float] = []

    def step(rows: list[int]) -> Tensor:
        with torch.no_grad():
            validation.append(dpo_loss(model, held_out, held_to).item())
        return dpo_loss(model, [told[row] for row in rows], reference[:, rows])

    rates = [4e-3 * share for share in (1 / 2, *(0.5 + 0.5 * math.cos(math.pi * passed / 5) for passed in range(5)))]
    losses, norms, path = adamw(model, [lambda rows=rows: step(rows) for rows in windows(5, PAIRS, 12, 3)], rates)
    with torch.no_grad():
        validation.append(dpo_loss(model, held_out, held_to).item())
    assert [row["loss"] for row in run.of("train")] == pytest.approx(losses, rel=1e-4)
    assert [row["grad_norm"] for row in run.of("train")] == pytest.approx(norms, rel=1e-3)
    assert [row["lr"] for row in run.of("train")] == pytest.approx(rates)
    looks = {row["step"]: row["loss"] for row in run.of("validation")}
    assert looks == {step: pytest.approx(validation[step], rel=1e-4) for step in (0, 4, 6)}
    assert validation[0] < validation[4] < validation[6]
    assert near(run.policy, path[4], path[0])
    result = run.result
    assert (result["steps"], result["selected_step"], result["n"]) == (6, 4, 4)
    assert result["loss"] == pytest.approx(validation[4], rel=1e-4)
    assert [(row["step"], row["n"]) for row in run.of("test")] == [(4, 3), (6, 4)]

    check_calls(run, base)


def check_calls(run: Run, base: str) -> None:
    """What no number shows, or not which one."""
    calls, policy = run.calls, str(run.directory / "policy")
    limits = [
        (fitted["checkpoint_every"], fitted["checkpoints_kept"], fitted["evaluate_every"], fitted["precision"])
        for fitted in (*calls["sft.fit"], *calls["train.fit"])
    ]
    assert limits == [(2, 3, 4, "fp32")] * 2
    assert [given["name"] for given in calls["distributed.join"]] == ["cpu"]

    # Test prompts, temperature, top_p; then the random numbers, which all policies of a seed share.
    drawn = [
        (len(one["prompts"]), one["sampling"].temperature, one["sampling"].top_p) for one in calls["evaluate.sample"]
    ]
    baseline, shown, on_the_way, at_one = (4, 0.8, 1.0), (2, 0.8, 1.0), (3, 0.8, 1.0), (3, 1.0, 1.0)
    answers, measured, again = (2, 0.8, 1.0), (4, 0.8, 1.0), (4, 1.0, 1.0)
    assert drawn == [baseline, shown, shown, on_the_way, at_one, shown, answers, measured, again]
    assert {(one["sampling"].max_new_tokens, one["sampling"].batch_size) for one in calls["evaluate.sample"]} == {
        (6, 3)
    }
    seeds = [one["seed"] for one in calls["evaluate.sample"]]
    assert seeds[1] == seeds[2] == seeds[5]
    assert (seeds[3], seeds[4]) == (seeds[7], seeds[8])
    assert len({seeds[place] for place in (0, 1, 6, 7, 8)}) == 5
    trained = models.fingerprint(models.load(policy)[0])
    assert {models.fingerprint(one["model"]) for one in calls["evaluate.sample"][-3:]} == {trained}
    assert len({id(one["model"]) for one in calls["evaluate.sample"][:6]}) == 1
    assert models.fingerprint(calls["evaluate.sample"][0]["model"]) != trained  # the one that went on to step 6
    assert [len(one["samples"]) for one in calls["evaluate.kl"]] == [3, 4]

    for name in ("load", "load_tokenizer", "check_length"):
        assert all(one["which"].trust_remote_code for one in calls[f"model.{name}"]), name
    loads = calls["model.load"]
    assert {one["which"].layout for one in loads} == {ParallelLayout(1, False, "fp32")}
    asked = [one["which"] for one in calls["model.load_tokenizer"]]
    told = [(one.path, one.chat_template, one.date) for one in asked[:2]]
    assert told == [(base, TEMPLATE, "2001-02-03")] * 2  # of the pairs, and of SFT
    assert "<user 2001>" in AutoTokenizer.from_pretrained(policy).apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    rules = [(one["max_length"], one["on_too_long"], one["on_faulty"]) for one in calls["kept.numbered"]]
    assert rules == [(LONGEST, "drop", "keep")] * 2
    assert [one["on_faulty"] for one in calls["kept.filter_identical"]] == ["keep"] * 2
    (demonstrated,) = calls["sft.tokenize_demonstrations"]
    assert [demonstrated[name] for name in ("max_length", "on_too_long", "on_faulty")] == [LONGEST, "drop", "keep"]
    assert {(one["key"], one["length"]) for one in calls["model.check_length"]} == {("max_length", LONGEST)}
    limit = LONGEST - 6  # what is left for prompts
    longest = [max(map(len, one["prompts"])) for one in calls["evaluate.sample"]]
    assert [length == limit for length in longest] == [True] * 6 + [False] + [True] * 2  # no instruction is so long

    mirrored = [one for one in calls["Log.__init__"] if one["run_id"]]
    assert [(one["run_id"], one["group"]) for one in mirrored] == [(f"unusual-{run.config.id}", "unusual")]
    assert (mirrored[0]["config"]["lr"], mirrored[0]["wandb"].mode) == (4e-3, "disabled")


NON_NUMERIC = [
    *(
        "micro_batch_tokens=70",
        "packed=false",
        "activation_checkpointing=true",
        "evaluate_prompts=0",
        "checkpoint_every=0",
    ),
    *(
        "checkpoints_kept=1",
        "evaluation.log_samples=0",
        "device=auto",
        "threads=2",
        "name=other",
        "sharding.group=null",
    ),
]


def test_what_changes_no_number(unusual, tmp_path, tiny_model, data):
    """Rows, weights and measures are those of the run above within rounding, though nothing is done in the same way."""
    other = ran(tmp_path / "run", *own(data, tiny_model("llama")), *UNUSUAL, *NON_NUMERIC)
    assert other.config.id == unusual.config.id
    for split in ("train", "validation"):
        for one, two in zip(unusual.of(split), other.of(split), strict=True):
            assert one.pop("split") == two.pop("split")
            assert one.pop("items_per_second", 0) is not two.pop("items_per_second", None)
            assert one == pytest.approx(two, rel=2e-3, abs=1e-4)
    for mine, theirs in ((weights(other.sft), weights(unusual.sft)), (other.policy, unusual.policy)):
        assert near(mine, {name: one.double() for name, one in theirs.items()}, weights(tiny_model("llama")))
    measured, again = ({**run.result, "seconds": 0} for run in (unusual, other))
    assert measured == pytest.approx(again, rel=2e-2, abs=1e-3)

    # It was done otherwise.
    assert (len(other.calls["model.checkpoint_activations"]), unusual.calls.get("model.checkpoint_activations")) == (
        2,
        None,
    )
    for run, packed, most in ((unusual, True, (4096, 4096, 4 * 4096)), (other, False, (70, 70, 70))):
        made = run.calls["Batches.__init__"]
        assert [one["collate"].keywords["packed"] for one in made] == [packed] * 3
        assert tuple(one["micro_batch_tokens"] for one in made) == most
    for run, layouts in ((unusual, {True}), (other, {False})):
        assert {one["packed"] for one in run.calls["evaluate.collate_responses"]} == layouts
        assert {one["packed"] for one in run.calls["scoring.collate_responses"]} == layouts | {
            False
        }  # once more, to compare
    assert {one["limit"] for one in other.calls["scoring.balance_by_tokens"]} == {70}


NAMES = ("sft.sequence_logps", "train.token_logps", "scoring.token_logps", "evaluate.sequence_kl", "evaluate.sample")


def test_the_precision_is_that_of_all_matrix_products_in_training_validation_and_scoring(
    unusual, tmp_path, tiny_model, data
):
    """What is measured in the end, samples and KL, is of the weights as they are."""
    short = ["precision=bf16", "sft.steps=1", "steps=1", "evaluation.prompts=2"]
    run = ran(tmp_path / "run", *own(data, tiny_model("llama")), *short)
    for name in NAMES:
        whole = name in ("evaluate.sequence_kl", "evaluate.sample")
        assert {one["products"] for one in run.calls[name]} == {torch.float32 if whole else torch.bfloat16}, name
        assert {one["products"] for one in unusual.calls[name]} == {torch.float32}, name
    assert {one["grad"] for one in run.calls["train.token_logps"]} == {False, True}  # validation, too
    seeds, others = ({one["seed"] for one in each.calls["evaluate.sample"]} for each in (run, unusual))
    assert not seeds & others  # of seeds 0 and 5
    assert {one["which"].layout.precision for one in run.calls["model.load"]} == {"bf16"}
    assert {one["precision"] for one in (*run.calls["sft.fit"], *run.calls["train.fit"])} == {"bf16"}


def test_a_setting_alone(tmp_path, tiny_model, data, monkeypatch):
    """What the run above cannot show beside its other settings: with what training would begin."""
    begun: list[dict[str, Any]] = []

    def stop(model, batches, step, optimizer, scheduler, **named: Any) -> None:
        begun.append({"optimizer": type(optimizer), "model": models.fingerprint(model), **named})
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "fit", stop)
    monkeypatch.setattr(sft, "fit", stop)
    llama, given = tiny_model("llama"), ["steps=3", "epochs=2", "sft.steps=5", "sft.epochs=2", "optimizer=rmsprop"]
    for name, start in (("training", [f"policy.path={llama}"]), ("sft", [])):
        base = tiny_model("mistral") if name == "training" else llama  # a path is not trained again
        with pytest.raises(KeyboardInterrupt):
            train.run(frozen(tmp_path / name / "run", *own(data, base), *given, *start), tmp_path / name / "run")
    assert [one["steps"] for one in begun] == [3, 5]
    assert {one["optimizer"] for one in begun} == {torch.optim.RMSprop}
    assert {one["model"] for one in begun} == {models.fingerprint(models.load(llama)[0])}


def test_how_a_policy_is_read_is_in_its_specification(tmp_path):
    given = ["policy.base=a/base", f"policy.chat_template={TEMPLATE!r}".replace("\\'", "'"), "policy.date=2001-02-03"]
    given += [
        "policy.trust_remote_code=true",
        "sharding.group=1",
        "sharding.offload=true",
        "precision=bf16",
        "processes=2",
    ]
    config, layout = frozen(tmp_path / "run", *given, "policy.path=null"), ParallelLayout(1, True, "bf16")
    how = (True, TEMPLATE, "2001-02-03", layout)
    assert policy_spec(config) == models.ModelSpec("a/base", *how)
    config.policy.path = "a/policy"
    assert policy_spec(config) == models.ModelSpec("a/policy", *how)
    assert policy_spec(config, "another/one") == models.ModelSpec("another/one", *how)


NOT_OF_SFT = (
    *("beta", "lr", "loss.label_smoothing", "batch_size", "epochs", "schedule", "warmup_steps", "evaluate_prompts"),
    "keep",
)


def test_every_setting_of_sft_reaches_its_work(tmp_path, tiny_model, data):
    """Training itself is that of a run above."""
    llama, unused = tiny_model("llama"), tiny_model("mistral")
    given = [one for one in UNUSUAL if not one.startswith("generation.")]
    given = [one for one in given if one.split("=")[0] not in NOT_OF_SFT]
    given += [f"policy.path={llama}", "sft.steps=3", "activation_checkpointing=true"]
    run = ran(tmp_path / "run", *own(data, unused), *given, command="sft")
    calls = run.calls
    (fitted,) = calls["sft.fit"]
    limits = ("steps", "checkpoint_every", "checkpoints_kept", "evaluate_every", "precision", "max_grad_norm")
    assert [fitted[name] for name in limits] == [3, 2, 3, 4, "fp32", 0.05]
    assert run.result["steps"] == 3
    assert [row["step"] for row in run.of("test")] == [3]
    assert [row["lr"] for row in run.of("train")] == pytest.approx([1.5e-3, 3e-3, 1.5e-3])
    assert [(one["which"].path, one["which"].layout) for one in calls["model.load"]] == [
        (llama, ParallelLayout(1, False, "fp32"))
    ]
    assert len(calls["model.checkpoint_activations"]) == 1
    assert [one["name"] for one in calls["distributed.join"]] == ["cpu"]
    assert all(one["which"].trust_remote_code for name in ("load", "load_tokenizer") for one in calls[f"model.{name}"])
    asked = [one["which"] for one in calls["model.load_tokenizer"]]
    assert (asked[0].path, asked[0].chat_template, asked[0].date) == (llama, TEMPLATE, "2001-02-03")
    assert [(one["which"].path, one["key"], one["length"]) for one in calls["model.check_length"]] == [
        (llama, "max_length", LONGEST)
    ]
    (demonstrated,) = calls["sft.tokenize_demonstrations"]
    assert [demonstrated[name] for name in ("max_length", "on_too_long", "on_faulty")] == [LONGEST, "drop", "keep"]
    assert len(demonstrated["demonstrations"]) == PAIRS + 1
    drawn = [
        (len(one["prompts"]), one["sampling"].temperature, one["sampling"].batch_size)
        for one in calls["evaluate.sample"]
    ]
    assert drawn == [(2, 0.8, 3), (2, 0.8, 3), (4, 0.8, 3)]  # before training, after it, and what is measured
    (logged,) = calls["Log.__init__"]
    assert (logged["run_id"], logged["group"]) == (f"unusual-{run.config.id}", "unusual")
