"""Every figure of a run against the same run by hand: one sequence at a time, plain logits, plain gradients."""

import gzip
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from whole_runs import SMALL, other_model, run

from dpo import evaluate, train
from dpo.policy.model import WORLD_BASE
from dpo.world import language

ASKED = "\n\nHuman: Tell me about {n} cats.\n\nAssistant:"
STEPS, BATCH = 4, 6  # of 14 pairs: windows of 6, 6 and 2, and one of the next epoch


def texts(numbers: range) -> list[dict[str, Any]]:
    """Pairs of many lengths; some responses were cut before their end."""
    words = ["Cats sleep", "dogs run", "The capital of Italy", "both of them eat", "I am well", "hello there"]
    rows = []
    for n in numbers:
        chosen, rejected = (" " + " and ".join(words[(n * k) % 6] for k in range(1, 2 + (n * m) % 4)) for m in (1, 3))
        pair = {"prompt": ASKED.format(n=n), "chosen": chosen + ".", "rejected": rejected + f", {n}?"}
        rows.append(pair | ({"chosen_ended": False} if n % 5 == 0 else {}) | {"rejected_ended": n % 3 != 0})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def loaded(path: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def sides(pair: dict[str, Any], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Ids of the prompt, and those of the chosen and of the rejected response after it."""
    prompt, found = tokenizer(pair["prompt"])["input_ids"], []
    for name in ("chosen", "rejected"):
        both = tokenizer(pair["prompt"] + pair[name])["input_ids"]
        assert both[: len(prompt)] == prompt
        found.append((prompt, both[len(prompt) :] + [tokenizer.eos_token_id] * pair.get(f"{name}_ended", True)))
    return found


def logp(model: PreTrainedModel, prompt: list[int], response: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([prompt + response])).logits[0].double()
    return sum(logits[len(prompt) - 1 + at].log_softmax(-1)[token] for at, token in enumerate(response))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# Of one pair: log-ratios of both, mean log-probs of both, lengths -> loss and the two rewards, from the papers.
Objective = Callable[..., tuple[Any, float, float]]


def smoothed(a: Any, b: Any, **_: Any) -> tuple[Any, float, float]:
    """Conservative DPO at beta 0.7: one label in five is wrong."""
    z = 0.7 * (a - b)
    return -0.8 * torch.log(torch.sigmoid(z)) - 0.2 * torch.log(torch.sigmoid(-z)), 0.7 * a, 0.7 * b


def ipo_of_means(a: Any, b: Any, n: int, m: int, **_: Any) -> tuple[Any, float, float]:
    return (a / n - b / m - 1.25) ** 2, 0.4 * a, 0.4 * b  # 1 / (2 * 0.4)


def ipo_of_sums(a: Any, b: Any, **_: Any) -> tuple[Any, float, float]:
    return (a - b - 1.25) ** 2, 0.4 * a, 0.4 * b


def rso_hinge(a: Any, b: Any, **_: Any) -> tuple[Any, float, float]:
    return torch.clamp(1 - 0.3 * (a - b), min=0), 0.3 * a, 0.3 * b


def simpo(c: Any, r: Any, **_: Any) -> tuple[Any, float, float]:
    return -torch.log(torch.sigmoid(2.5 * c - 2.5 * r - 0.75)), 2.5 * c, 2.5 * r  # gamma 0.75


def orpo(c: Any, r: Any, **_: Any) -> tuple[Any, float, float]:
    odds = [torch.exp(x) / (1 - torch.exp(x)) for x in (c, r)]
    return -c - 0.25 * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1]))), 0.25 * c, 0.25 * r


RUNS: dict[str, tuple[Objective, list[str]]] = {
    "other": (smoothed, ["loss=dpo", "loss.label_smoothing=0.2", "beta=0.7"]),
    "unconditional": (ipo_of_means, ["loss=ipo", "loss.average=token", "beta=0.4", "reference.prompt='hello there'"]),
    "ema": (rso_hinge, ["loss=hinge", "beta=0.3", "reference.alpha=0.3", "reference.every=2"]),
    "initial": (simpo, ["loss=simpo", "beta=2.5", "loss.gamma_beta_ratio=0.3"]),
    "precomputed": (orpo, ["loss=orpo", "beta=0.25"]),
    "other_tokenizer": (ipo_of_sums, ["loss=ipo", "beta=0.4"]),
}
NAMES = {  # of the figures of pairs
    "loss",
    *(f"{kind}/{of}" for kind in ("rewards", "logps", "logratios", "lengths") for of in ("chosen", "rejected")),
    *("rewards/margins", "logratios/margins", "rewards/accuracies", "rewards/ties", "logps/accuracies"),
}


class ByHand:
    """A policy and what it is held to, from the files that the run was given."""

    def __init__(self, kind: str, policy: str, other: str, theirs: str, scores: dict[str, Any]) -> None:
        self.kind, self.scores, self.objective = kind, scores, RUNS[kind][0]
        self.tokenizer, self.policy = AutoTokenizer.from_pretrained(policy), loaded(policy)
        self.alien = AutoTokenizer.from_pretrained(theirs)
        path = {"ema": policy, "initial": policy, "other_tokenizer": theirs}.get(kind, other)
        self.reference = loaded(path)

    @torch.no_grad()
    def references(self, pair: dict[str, Any]) -> list[float]:
        if self.kind == "precomputed":
            return self.scores[pair["prompt"]]
        read = sides(pair, self.alien if self.kind == "other_tokenizer" else self.tokenizer)
        if self.kind == "unconditional":
            read = [(self.tokenizer("hello there")["input_ids"], response) for _, response in read]
        return [logp(self.reference, *side).item() for side in read]

    def figures(self, pair: dict[str, Any]) -> tuple[Any, dict[str, float]]:
        """Loss of a pair, with its gradient, and all that is reported of it."""
        both = sides(pair, self.tokenizer)
        (n, m), (c, r) = ([len(response) for _, response in both]), [logp(self.policy, *side) for side in both]
        a, b = (one - other for one, other in zip((c, r), self.references(pair), strict=True))
        if self.kind in ("initial", "precomputed"):  # their losses have no reference
            loss, better, worse = self.objective(c / n, r / m)
        else:
            loss, better, worse = self.objective(a, b, n=n, m=m)
        a, b, c, r, better, worse = (float(torch.as_tensor(one).detach()) for one in (a, b, c, r, better, worse))
        tied = abs(better - worse) < 1e-5
        assert tied or abs(better - worse) > 1e-3  # else it might be one in the run
        return loss, {
            **{"loss": loss.item(), "rewards/chosen": better, "rewards/rejected": worse, "rewards/ties": float(tied)},
            **{"rewards/margins": better - worse, "rewards/accuracies": 0.5 if tied else float(better > worse)},
            **{"logps/chosen": c, "logps/rejected": r, "logps/accuracies": float(c > r)},
            **{"logratios/chosen": a, "logratios/rejected": b, "logratios/margins": a - b},
            **{"lengths/chosen": n, "lengths/rejected": m},
        }

    def means(self, pairs: list[dict[str, Any]], gradient: bool = False) -> dict[str, float]:
        found = []
        for pair in pairs:
            with torch.set_grad_enabled(gradient):
                loss, figures = self.figures(pair)
            if gradient:
                (loss / len(pairs)).backward()
            found.append(figures)
        return {name: sum(one[name] for one in found) / len(found) for name in NAMES}

    def follow(self, step: int) -> None:
        """What a moving reference does after a step."""
        if self.kind == "ema" and step in (2, 4):
            with torch.no_grad():
                for mine, policys in zip(self.reference.parameters(), self.policy.parameters(), strict=True):
                    mine.copy_(0.7 * mine + 0.3 * policys)


@pytest.mark.parametrize("kind", RUNS)
def test_training_and_validation(tmp_path, tiny_model, monkeypatch, kind):
    """Every row of metrics.jsonl, for every loss and reference, and what of it is in evaluation.json."""
    torch.manual_seed(0)  # rows that are no tokens are drawn
    train_pairs, held_out = texts(range(14)), texts(range(20, 25))
    other, theirs = other_model(tmp_path, tiny_model), tiny_model("gpt2")
    scores = {row["prompt"]: [-20.0 - n, -31.0 + 2 * n] for n, row in enumerate([*train_pairs, *held_out])}
    (folder := tmp_path / "scores" / "more").mkdir(parents=True)  # packed, and in a folder of a folder
    columns = ("chosen_logprob", "rejected_logprob")
    given = [row | dict(zip(columns, scores[row["prompt"]], strict=True)) for row in [*held_out, *train_pairs]]
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in given).encode()))
    paths = {"other": other, "unconditional": other, "other_tokenizer": theirs, "precomputed": folder.parent}
    seen: list[int] = []
    real = train.pair_logps

    def spy(policy: Any, reference: Any, batch: Any, *more: Any) -> Any:
        if torch.is_grad_enabled():
            seen.extend(batch.index[batch.valid].tolist())
        return real(policy, reference, batch, *more)

    monkeypatch.setattr(train, "pair_logps", spy)
    overrides = ["data=file", f"data.path={write(tmp_path / 'train.jsonl', train_pairs)}"]
    overrides += [f"data.validation_path={write(tmp_path / 'held.jsonl', held_out)}", f"reference={kind}"]
    overrides += [f"reference.path={paths.get(kind)}"] * (kind in paths) + RUNS[kind][1]
    overrides += [f"policy.path={tiny_model('llama')}", f"batch_size={BATCH}", f"steps={STEPS}", "max_length=128"]
    overrides += ["micro_batch_tokens=130", "lr=2e-3", "max_grad_norm=0.5", "schedule=constant", "warmup_steps=0"]
    overrides += ["evaluate_every=3", "max_new_tokens=4", "evaluation.prompts=2", "seed=5"]
    rows, result = run(tmp_path / "run", *overrides)
    assert [(row["split"], row["step"]) for row in rows] == [
        *[("validation", 0), ("train", 1), ("train", 2), ("train", 3), ("validation", 3)],
        *[("train", 4), ("validation", 4), ("test", 4)],
    ]
    windows = [seen[:6], seen[6:12], seen[12:14], seen[14:]]
    assert sorted(seen[:14]) == list(range(14))
    assert len(windows[3]) == 6

    hand = ByHand(kind, tiny_model("llama"), other, theirs, scores)
    optimizer = torch.optim.AdamW(hand.policy.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    written = iter(rows)
    for step in range(STEPS + 1):
        if step:
            optimizer.zero_grad()
            expected = hand.means([train_pairs[row] for row in windows[step - 1]], gradient=True)
            gradient = torch.cat([one.grad.flatten() for one in hand.policy.parameters()])
            expected |= {"grad_norm": gradient.norm().item(), "lr": 2e-3, "step": step, "epoch": step / 3}
            found = next(written)
            assert found.keys() == {*expected, "split", "items_per_second"}
            assert found["items_per_second"] > 0
            assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-3, abs=2e-3)
            for one in hand.policy.parameters():
                one.grad *= min(1.0, 0.5 / gradient.norm().item())
            optimizer.step()
            hand.follow(step)
        if step in (0, 3, 4):
            expected = hand.means(held_out) | {"step": step, "epoch": step / 3}
            found = next(written)
            assert found.keys() == {*expected, "split"}
            assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-3, abs=2e-3)
    assert {name: result[name] for name in NAMES} == {name: found[name] for name in NAMES}
    final = loaded(str(tmp_path / "run" / "policy"))
    trained = torch.cat([one.flatten() for one in final.parameters()])
    assert torch.allclose(trained, torch.cat([one.flatten() for one in hand.policy.parameters()]), atol=1e-3)
    assert ("kl_reference" in result) is (kind == "other")


ROUND = {"rel": 1e-3, "abs": 2e-4}
ENDS = ("", "/low", "/high")


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[Path, str]:
    """A run in the world at unusual settings: KL to two models, a judge, responses that are cut; and its reference."""
    path = tmp_path_factory.mktemp("measured")
    reference, words = loaded(str(WORLD_BASE)), AutoTokenizer.from_pretrained(WORLD_BASE)
    with torch.no_grad():
        for number, one in enumerate(reference.parameters()):
            one.add_(torch.randn(one.shape, generator=torch.Generator().manual_seed(number)), alpha=0.03)
    reference.save_pretrained(path / "reference")
    words.save_pretrained(path / "reference")
    overrides = [*SMALL, f"policy.path={WORLD_BASE}", "reference=other", f"reference.path={path / 'reference'}"]
    overrides += ["max_new_tokens=18", "lr=3e-3", "warmup_steps=0", "evaluate_prompts=4", "evaluate_every=2", "seed=2"]
    overrides += ["evaluation.log_samples=3", "evaluation.batch_size=4", "data.test=14"]
    measure, asked = evaluate.measure, []

    def spy(policy: Any, kl_targets: Any, tokenizer: Any, prompts: Any, baseline: Any, *more: Any) -> Any:
        asked.append([prompts, baseline])
        return measure(policy, kl_targets, tokenizer, prompts, baseline, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "measure", spy)
        run(path / "run", *overrides)
    (path / "asked.json").write_text(json.dumps(asked))
    return path / "run", str(path / "reference")


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def kl(policy: PreTrainedModel, kl_target: PreTrainedModel, row: dict[str, Any]) -> tuple[float, float]:
    """Of one response: the log-ratio, and the sum over its positions of sum p log (p / q)."""
    words = AutoTokenizer.from_pretrained(WORLD_BASE)
    prompt = words(row["prompt"])["input_ids"]
    response = words.convert_tokens_to_ids([*row["response"].split(), *["<eos>"] * row["ended"]])
    with torch.no_grad():
        p, q = (
            model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double().softmax(-1)
            for model in (policy, kl_target)
        )
    ratio = sum(math.log(p[at, token] / q[at, token]) for at, token in enumerate(response))
    return ratio, (p * (p / q).log()).sum().item()


def test_kl_is_that_of_the_responses(measured):
    directory, reference = measured
    rows, result = lines(directory / "responses.jsonl"), json.loads((directory / "evaluation.json").read_text())
    policy = loaded(str(directory / "policy"))
    for name, kl_target in (("kl", str(WORLD_BASE)), ("kl_reference", reference)):
        plain, exact = zip(*(kl(policy, loaded(kl_target), row) for row in rows), strict=True)
        assert result[name] == pytest.approx(np.mean(exact), **ROUND)
        assert result[f"{name}_plain"] == pytest.approx(np.mean(plain), **ROUND)
        assert result[f"{name}/se"] == pytest.approx(np.std(exact, ddof=1) / math.sqrt(14), **ROUND)
        assert result[f"{name}_plain/se"] == pytest.approx(np.std(plain, ddof=1) / math.sqrt(14), **ROUND)
        assert result[name] > 0.1
    assert abs(result["kl"] - result["kl_reference"]) > 0.1


def test_responses_are_counted_and_judged(measured):
    directory, _ = measured
    rows, result = lines(directory / "responses.jsonl"), json.loads((directory / "evaluation.json").read_text())
    assert [row["prompt"] for row in rows] == language.world("human", 1, 1, 1, 14, seed=9).prompts["test"]
    for row in rows:
        said = row["response"].split()
        tokens = said + ["<eos>"] * row["ended"]
        assert row["length"] == len(said)
        assert row["ended"] is (len(said) < 18)
        grams = Counter(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))
        assert row["repetition"] == pytest.approx(sum(n - 1 for n in grams.values()) / max(1, grams.total()))
        silent = len(said) < len(row["baseline"].split()) / 10 or not said
        assert row["broken"] is (not row["ended"] or row["repetition"] > 0.5 or silent)
        found = language.verdict(row["prompt"], row["response"])
        assert (row["correct"], row["wrong"], row["valid"]) == (found.correct, found.wrong, found.valid)
        assert (row["enough"], row["any_wrong"]) == (found.correct > 2, found.wrong != 0)
        assert row["four_correct"] == (found.correct > 3)
        assert row["words"] == len(said)
        assert row["compression"] == len(said) / len(row["prompt"].split())
        assert row["too_long"] is (len(row["response"]) >= len(row["prompt"]))
        assert row["invalid"] is False
        score, against = (
            one.correct if one.correct < 3 else 4 - one.words / 48
            for one in (found, language.verdict(row["prompt"], row["baseline"]))
        )
        assert row["score"] == score
        assert row["win"] == (np.sign(score - against) + 1) / 2
    assert {row["win"] for row in rows} == {0.0, 0.5, 1.0}
    assert {row["ended"] for row in rows} == {False, True}
    averaged = ("length", "ended", "repetition", "broken", "score", "correct", "enough", "wrong", "any_wrong", "valid")
    averaged += ("words", "compression", "too_long", "invalid", "four_correct")
    assert {name: result[name] for name in averaged} == pytest.approx(
        {name: np.mean([row[name] for row in rows]) for name in averaged}
    )
    rate = np.mean([row["win"] for row in rows])
    assert result["win_rate"] == pytest.approx(rate)
    # The rates p from which this one is 1.96 standard deviations of a share of 14 away.
    z = 1.959964**2 / 14
    ends = sorted(np.roots([1 + z, -2 * rate - z, rate**2]))
    assert (result["win_rate/low"], result["win_rate/high"]) == pytest.approx(ends, abs=1e-6)
    kls = {f"{name}{kind}" for name in ("kl", "kl_reference") for kind in ("", "/se", "_plain", "_plain/se")}
    told = {"n", "steps", "selected_step", "seconds", *(f"win_rate{x}{end}" for x in ("", "_lc") for end in ENDS)}
    ranked = {f"rewards/accuracies{end}" for end in ENDS}
    low, share, high = (result[f"rewards/accuracies{end}"] for end in ("/low", "", "/high"))
    pairs = int(re.search(r"(\d+) in validation", (directory / "policy" / "README.md").read_text())[1])
    z = 1.959964**2 / pairs
    assert (low, high) == pytest.approx(sorted(np.roots([1 + z, -2 * share - z, share**2])), abs=1e-6)
    told |= {*ranked, "compression/median", "baseline/words", "baseline/invalid"}
    assert result["compression/median"] == np.median([row["compression"] for row in rows])
    assert result["baseline/words"] == pytest.approx(np.mean([len(row["baseline"].split()) for row in rows]))
    assert result["win_rate_lc/low"] < result["win_rate_lc"] < result["win_rate_lc/high"]
    assert result.keys() == {*NAMES, *averaged, *kls, *told}
    assert (result["n"], result["steps"], result["selected_step"]) == (14, 3, 3)
    assert result["seconds"] > 0


def test_rows_of_metrics_and_samples_say_when(measured):
    directory, _ = measured
    rows, result = lines(directory / "metrics.jsonl"), json.loads((directory / "evaluation.json").read_text())
    told = [(row["split"], row["step"]) for row in rows]
    assert told == [
        *[("validation", 0), ("train", 1), ("train", 2), ("validation", 2), ("test", 2)],
        *[("train", 3), ("validation", 3), ("test", 3)],
    ]
    before, after = (row for row in rows if row["split"] == "test")
    assert before["n"] == 4
    answered = [[row[name] for row in lines(directory / "responses.jsonl")] for name in ("prompt", "baseline")]
    on_the_way = [some[:4] for some in answered]  # to the first prompts, what is compared with them in the end
    assert json.loads((directory.parent / "asked.json").read_text()) == [on_the_way, answered]
    assert {name: value for name, value in after.items() if name not in ("step", "split", "epoch")} == {
        name: result[name] for name in after if name not in ("step", "split", "epoch")
    }
    validation = next(row for row in rows if (row["split"], row["step"]) == ("validation", 3))
    assert {name: result[name] for name in NAMES} == {name: validation[name] for name in NAMES}
    samples = lines(directory / "samples.jsonl")
    prompts = [row["prompt"] for row in lines(directory / "responses.jsonl")]
    assert [(one["step"], one["prompt"]) for one in samples] == [
        (step, prompt) for step in (0, 2, 3) for prompt in prompts[:3]
    ]
    for one in samples:
        assert one["correct"] == language.verdict(one["prompt"], one["response"]).correct
        assert "win" not in one
