"""What is reported of a policy, against counting by hand."""

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_tokenizer
from whole_runs import frozen, other_model, own

from dpo import evaluate, judges
from dpo.data.batches import Batches
from dpo.data.records import Dataset
from dpo.data.truncation import Limits
from dpo.policy import model as models
from dpo.policy import sampling
from dpo.policy.sampling import Sample, Sampling
from dpo.settings import Evaluation, policy_spec
from dpo.sweep.directory import before, remember_initial
from dpo.sweep.inputs import load
from dpo.world import language


def answer(text: str, ended: bool = True) -> Sample:
    words = text.split()
    return Sample([0], [*range(len(words)), *([99] if ended else [])], text, ended)


def test_a_tie_is_half_a_win():
    samples = [answer("a"), answer("a b"), answer("a b c", ended=False), answer("a b")]
    rows, found = evaluate.describe(["p"] * 4, samples, judges.shorter, ["a b", "a b", "a b", "a b"])
    assert [row["win"] for row in rows] == [1.0, 0.5, 0.0, 0.5]
    assert found["win_rate"] == 0.5
    assert (found["win_rate/low"], found["win_rate/high"]) == pytest.approx((0.1500, 0.8500), abs=1e-4)
    assert found["n"] == 4
    assert found["length"] == 2.0  # EOS is not a word
    assert found["ended"] == 0.75
    assert found["score"] == -2.0


def test_what_a_judge_cannot_judge_is_in_no_mean():
    """Of responses and of the baseline's; how many are is told, and the interval is of so many."""

    def judge(prompts: Any, responses: Any) -> list[dict[str, float]]:
        return [{} if text == "?" else {"score": -float(len(text.split()))} for text in responses]

    samples, baseline = [answer("a"), answer("?"), answer("a b c"), answer("a b")], ["a b", "a", "?", "a"]
    rows, found = evaluate.describe(["p"] * 4, samples, judge, baseline)
    assert [row.get("win") for row in rows] == [1.0, None, None, 0.0]
    assert (found["n"], found["judged"], found["compared"]) == (4, 3, 2)
    assert (found["win_rate"], found["score"]) == (0.5, -2.0)
    assert (found["win_rate/low"], found["win_rate/high"]) == pytest.approx((0.0945, 0.9055), abs=1e-4)


def test_a_pairwise_judge_decides_wins_in_both_orders():
    """It favours the first of two, where they are as long; and has nothing to say of a response alone."""

    def judge(prompts, firsts, seconds) -> list[judges.Verdict]:
        asked.append([*zip(prompts, firsts, seconds, strict=True)])
        return ["win" if len(one) <= len(other) else "lose" for _, one, other in asked[-1]]

    asked: list[list[tuple[str, str, str]]] = []
    samples, baseline = (
        [answer("a"), answer("a b c"), answer("b"), answer("a"), answer("c")],
        ["a b", "a", "a", "a", "a b"],
    )
    rows, found = evaluate.describe([*"pqrst"], samples, judge, baseline)
    assert [(row["win"], row["inconsistent"]) for row in rows] == [(1, 0), (0, 0), (0.5, 1), (0.5, 0), (1, 0)]
    assert [row["baseline"] for row in rows] == baseline
    assert (found["win_rate"], found["inconsistent"], found["n"]) == (0.6, 0.2, 5)
    assert "score" not in found
    one_order = [("p", "a", "a b"), ("q", "a b c", "a"), ("r", "b", "a"), ("t", "c", "a b")]
    assert asked == [[*one_order, *((prompt, other, one) for prompt, one, other in one_order)]]
    rows, found = evaluate.describe([*"pqrst"], samples, judge)
    assert not {"win", "win_rate", "inconsistent"} & {*rows[0], *found}
    assert len(asked) == 1


def test_the_baseline_is_sampled_again_when_what_decides_it_changes(tmp_path, tiny_model, monkeypatch):
    model, tokenizer = models.load(tiny_model("qwen2"))
    settings = feeding(60, sampling=Sampling(4, 1.0, 1.0, 4), cache=str(tmp_path))

    def entries(prompts) -> int:
        evaluate.baseline(model, tokenizer, "w", prompts, settings)
        return sum(path.is_dir() for path in (tmp_path / "baseline").iterdir())

    chat = [[{"role": "user", "content": "hi"}]]
    assert entries(chat) == entries(chat) == 1
    tokenizer.chat_template = tokenizer.chat_template.replace("user", "human")  # no such word in it
    assert entries(chat) == 1
    tokenizer.chat_template = "now: " + tokenizer.chat_template
    assert entries(chat) == 2
    monkeypatch.setattr(sampling, "SAMPLING_VERSION", sampling.SAMPLING_VERSION + 1)
    assert entries(chat) == 3


def test_the_interval_of_all_wins_is_no_point():
    """Wilson's interval for 20 of 20, from a table of it."""
    _, found = evaluate.describe(["p"] * 20, [answer("a")] * 20, judges.shorter, ["a b"] * 20)
    assert (found["win_rate"], found["win_rate/low"], found["win_rate/high"]) == pytest.approx((1, 0.8389, 1), abs=1e-4)


@pytest.mark.parametrize("ties", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("wins", [0.05, 0.3, 0.5, 0.75])
def test_the_interval_covers_the_true_rate(wins, ties):
    """Its exact probability, over all numbers of wins and ties in 20."""
    n, losses, covered = 20, 1 - wins - ties, 0.0
    for won in range(n + 1):
        for tied in range(n + 1 - won):
            low, high = evaluate.wilson((won + tied / 2) / n, n)
            if low <= wins + ties / 2 <= high:
                ways = math.comb(n, won) * math.comb(n - won, tied)
                covered += ways * wins**won * ties**tied * losses ** (n - won - tied)
    assert covered > (0.95 if ties > 0.1 else 0.92)


def feeding(room: int, on_too_long: str = "error", **changed: Any) -> Evaluation:
    sampling = changed.get("sampling", Sampling(4, 1.0, 1.0, 4))
    given = {
        "prompts": 4,
        "log_samples": 1,
        "seed": 0,
        "packed": False,
        "micro_batch_tokens": 100,
        "cache": "",
        "rule": None,
        "engine": None,
        "own_engine": None,
    }
    limits = Limits(room + sampling.max_new_tokens, sampling.max_new_tokens, on_too_long)
    return Evaluation(**{"sampling": sampling, "limits": limits, **given, **changed})


def test_fewer_test_prompts_than_asked_for_are_said(capsys):
    data = Dataset([], {}, {"test": ["a", "b", "c"]})
    words = tiny_tokenizer("gpt2")
    assert evaluate.test_prompts(data, feeding(60, prompts=2), words) == ["a", "b"]
    assert capsys.readouterr().out == ""
    assert evaluate.test_prompts(data, feeding(60), words) == ["a", "b", "c"]
    assert capsys.readouterr().out == "evaluation: on all 3 test prompts; evaluation.prompts asks for 4\n"


def test_test_prompts_without_room_follow_the_rule_for_pairs(capsys):
    """A system message is never cut; plain turns are."""
    tokenizer = tiny_tokenizer("qwen2")
    told = [{"role": "system", "content": "Be brief. " * 20}, {"role": "user", "content": "hi"}]
    fine, long = [{"role": "user", "content": "hi"}], [{"role": "user", "content": "hi " * 80}]
    data = Dataset([], {}, {"test": [fine, told, long]})
    with pytest.raises(ValueError, match=r"1 of 3 test prompts leave no room .* 40 tokens .*:\n  prompt 1, .*\nRaise"):
        evaluate.test_prompts(data, feeding(40), tokenizer)
    for rule in ("drop", "truncate"):
        capsys.readouterr()
        assert evaluate.test_prompts(data, feeding(40, rule), tokenizer) == [fine, long]
        assert "40 tokens are left for them: dropped:\n  prompt 1, counted from 0: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="1 of 1 test prompts leave no room"):
        evaluate.test_prompts(Dataset([], {}, {"test": [told]}), feeding(40, "drop"), tokenizer)


def test_an_instruction_that_cannot_be_asked_is_refused_by_what_it_is():
    tokenizer = tiny_tokenizer("qwen2")
    asked = [{"instruction": text} for text in ("hi", "Rome")]
    assert evaluate.questions([], tokenizer, feeding(40).limits) == []
    chats = [[{"role": "user", "content": text}] for text in ("hi", "Rome")]
    assert evaluate.questions(asked, tokenizer, feeding(40).limits) == chats
    tokenizer.chat_template = "{% if 'Rome' in messages[0].content %}{{ raise_exception('no') }}{% endif %}" + (
        tokenizer.chat_template
    )
    with pytest.raises(ValueError, match=r"1 of 2 instructions of evaluation.instructions are faulty") as error:
        evaluate.questions(asked, tokenizer, feeding(40, "drop").limits)
    assert "on_faulty" not in str(error.value)
    with pytest.raises(
        ValueError,
        match=r"instructions of evaluation.instructions leave no room .*\n.*\n.* or lower max_new_tokens\.$",
    ):
        evaluate.questions(asked[:1], tokenizer, feeding(8, "drop").limits)


def test_without_a_judge_only_the_shape_is_reported():
    text = {"words": 2.0, "compression": 2.0, "compression/median": 2.0, "too_long": 1.0, "invalid": 0.0}
    others = {"baseline/words": 1.0, "baseline/invalid": 0.0}
    _, found = evaluate.describe(["p"], [answer("a b")], None, ["a"])
    assert found == {"n": 1, "ended": 1.0, "length": 2.0, "repetition": 0.0, "broken": 0.0, **text, **others}
    _, found = evaluate.describe(["p"], [Sample([0], [1, 2, 3], "one two", False)], None)
    assert found == {"n": 1, "ended": 0.0, "length": 3.0, "repetition": 0.0, "broken": 1.0, **text}  # in tokens


def test_means_over_pairs_weigh_every_pair_once():
    values = [float(n) for n in range(10)]

    def collate(items, index, real):
        class One:
            def to(self, device):
                return self

        batch = One()
        batch.index, batch.valid, batch.values = index, real, torch.tensor(items)
        return batch

    faulty = Batches(
        [0.0, math.nan, 1.0, math.inf], collate, size=lambda _: 1, batch_size=4, micro_batch_tokens=2, seed=0
    )
    with pytest.raises(RuntimeError, match=r"validation loss must be finite, got nan from\n  row 1.*\n  row 3"):
        evaluate.on_pairs(lambda batch: (batch.values, {}), faulty, torch.device("cpu"))
    for size in (1, 3, 4, 10):
        batches = Batches(values, collate, size=lambda _: 1, batch_size=size, micro_batch_tokens=2, seed=0)
        means = evaluate.on_pairs(
            lambda batch: (batch.values, {"square": batch.values**2}), batches, torch.device("cpu")
        )
        assert means == pytest.approx({"loss": 4.5, "square": 28.5})


def test_a_filler_is_no_pair():
    """What a rank is given where there are fewer pairs than ranks counts nowhere."""

    class OneStep:
        def __len__(self):
            return 1

        def at(self, step):
            pairs, filler = (torch.tensor([0, 1]), [1.0, 3.0], True), (torch.tensor([0]), [math.e], False)
            batches = []
            for index, values, real in (pairs, filler):
                one = SimpleNamespace(index=index, values=torch.tensor(values), valid=torch.full(index.shape, real))
                one.to = lambda _, one=one: one
                batches.append(one)
            return batches, 2

    means = evaluate.on_pairs(lambda batch: (batch.values, {"x": -batch.values}), OneStep(), torch.device("cpu"))
    assert means == {"loss": 2.0, "x": -2.0}


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """What `sample` was called with; it answers each prompt with so many words as the call has number, and an end."""
    calls: list[dict] = []

    def sample(model, tokenizer, prompts, sampling, seed, name):
        calls.append({"model": model, "prompts": prompts, "seed": seed, "name": name, **vars(sampling)})
        word = tokenizer.convert_tokens_to_ids("a")
        return [Sample(one, [word] * len(calls) + [tokenizer.eos_token_id], "a " * len(calls), True) for one in prompts]

    monkeypatch.setattr(evaluate, "sample", sample)
    return calls


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_kl_is_of_samples_at_temperature_1(tiny_model, asked, temperature):
    """And the win rate of those at the evaluation's; all else is as the settings say, and prompts are cut."""
    tokenizer, policy = models.load_tokenizer(tiny_model("llama")), models.load(tiny_model("llama"))[0]
    settings = feeding(9, sampling=Sampling(7, temperature, 1.0, 3), seed=4)
    prompts, kl_target = ["cats and dogs", "Rome " * 20], models.load(tiny_model("llama"))[0]
    torch.nn.init.normal_(kl_target.lm_head.weight)
    rows, result = evaluate.measure(
        policy, {"kl": kl_target}, tokenizer, prompts, ["a", "a a"], judges.shorter, settings
    )
    assert [one["temperature"] for one in asked] == ([1.0] if temperature == 1 else [0.5, 1.0])
    for call in asked:
        assert (call["model"], call["max_new_tokens"], call["batch_size"]) == (policy, 7, 3)
        assert call["prompts"][0] == tokenizer("cats and dogs")["input_ids"]
        assert len(call["prompts"][1]) == 9  # 16 less 7
    assert [row["length"] for row in rows] == [1, 1]  # of the first samples
    assert [row["win"] for row in rows] == [0.5, 1.0]
    last = [(one, [tokenizer.convert_tokens_to_ids("a")] * len(asked)) for one in asked[-1]["prompts"]]
    ratios = []
    for prompt, words in last:
        ids = torch.tensor([[*prompt, *words, tokenizer.eos_token_id]])
        known = torch.tensor(sorted(tokenizer.get_vocab().values()))  # three rows of the model are no tokens
        with torch.no_grad():
            one, other = (model(ids).logits[0, len(prompt) - 1 : -1].double() for model in (policy, kl_target))
        one, other = (
            logits.gather(-1, ids[0, len(prompt) :, None]).squeeze() - logits[:, known].logsumexp(-1)
            for logits in (one, other)
        )
        ratios.append((one - other).sum().item())
    assert result["kl_plain"] == pytest.approx(sum(ratios) / 2, rel=1e-4)


def test_a_policy_is_measured_against_another(tmp_path, tiny_model, asked, monkeypatch):
    """The other's responses are the baseline, and KL is to it; both read the same tokens, as the policy is read."""
    llama, other, directory = tiny_model("llama"), other_model(tmp_path, tiny_model), tmp_path / "run"
    prints = {path: models.fingerprint(models.load(path)[0]) for path in (llama, other)}
    given = [*own(tmp_path, llama), "judge=shorter", "policy.date=2001-02-03", "device=cpu", f"against={other}"]
    held, read, kl, load = [], [], evaluate.kl, models.load
    monkeypatch.setattr(evaluate, "kl", lambda *some, **named: held.append(some[:2]) or kl(*some, **named))
    monkeypatch.setattr(models, "load", lambda which, device: read.append(which) or load(which, device))
    config = frozen(directory, *given, verb="evaluate")
    directory.mkdir()
    evaluate.run(config, directory)
    assert [models.fingerprint(call["model"]) for call in asked] == [prints[other], prints[llama]]
    assert [tuple(map(models.fingerprint, some)) for some in held] == [(prints[llama], prints[other])]
    assert read == [policy_spec(config), policy_spec(config, other)]
    [key] = (tmp_path / "cache" / "baseline").glob("*/key.json")
    assert json.loads(key.read_text())["weights"] == prints[other]  # a sweep that starts there finds it
    rows = [json.loads(line) for line in (directory / "responses.jsonl").read_text().splitlines()]
    assert {(row["baseline"], row["response"], row["win"]) for row in rows} == {("a ", "a a ", 0.0)}
    told = json.loads((directory / "evaluation.json").read_text())
    assert (told["n"], told["win_rate"], told["kl"] > 0) == (4, 0.0, True)
    strange = frozen(directory, *given, f"against={tiny_model('qwen2')}", verb="evaluate")
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="must have the tokenizer of the policy"):
        evaluate.run(strange, directory)


def test_the_baseline_is_the_one_that_is_asked_for(tmp_path, tiny_model, asked):
    """What a human wrote, another policy's responses, or the initial one's; by another judge than that of the pairs."""
    llama, other = tiny_model("llama"), other_model(tmp_path, tiny_model)
    strong = str(tmp_path / "strong")
    model, tokenizer = models.load(llama)
    torch.nn.init.normal_(model.lm_head.weight)
    models.save(model, tokenizer, tmp_path / "strong")
    given = [*own(tmp_path, llama), "judge=none", "judge@evaluation.judge=shorter", "device=cpu", f"against={other}"]
    found = {}
    for baseline in ("initial", "human", strong):
        directory = tmp_path / f"against {len(found)}"
        directory.mkdir()
        asked.clear()
        config = frozen(directory, *given, f"evaluation.baseline={baseline}", verb="evaluate")
        evaluate.run(config, directory)
        found[baseline] = [models.fingerprint(call["model"]) for call in asked][:-1]
        rows = [json.loads(line) for line in (directory / "responses.jsonl").read_text().splitlines()]
        assert all("win" in row for row in rows)
        if baseline == "human":  # the chosen responses of held-out pairs
            pairs = {one.prompt: one.chosen for one in load(config).preferences["validation"]}
            assert [row["baseline"] for row in rows] == [pairs[row["prompt"]] for row in rows]
    assert found == {
        "initial": [models.fingerprint(models.load(other)[0])],
        "human": [],
        strong: [models.fingerprint(models.load(strong)[0])],
    }


def test_what_a_run_started_from_is_known(tmp_path):
    """To measure its policy against it afterwards; whoever moved it away is told."""
    policy, run = tmp_path / "initial", tmp_path / "run"
    for folder in (policy, run):
        folder.mkdir()
    remember_initial(run, str(policy))
    assert before("initial", str(run / "policy")) == str(policy)
    assert before("elsewhere", str(run / "policy")) == "elsewhere"
    assert before(None, "any") is None
    policy.rmdir()
    with pytest.raises(ValueError, match=rf"started from, found none at {policy}; give"):
        before("initial", str(run / "policy"))
    with pytest.raises(ValueError, match=r"policy\.path=\S+ started from, found no .*initial\.json; give .*against=<"):
        before("initial", str(tmp_path / "policy"))
    remember_initial(run, "hub/name")
    assert before("initial", str(run / "policy")) == "hub/name"


def test_random_numbers_of_an_evaluation_are_these(tmp_path, tiny_model, asked):
    """For good: who changes them changes every published figure. All policies of a seed draw the same."""
    model, tokenizer = models.load(tiny_model("llama"))
    for seed in (0, 1):
        settings = feeding(57, sampling=Sampling(7, 0.5, 1.0, 3), cache=str(tmp_path), seed=seed)
        evaluate.baseline(model, tokenizer, "w", ["cats"], settings)
        evaluate.respond(model, tokenizer, ["cats"], settings, "policy")
        evaluate.answer(model, tokenizer, [{"instruction": "cats"}], settings)
        evaluate.show(model, tokenizer, ["cats", "dogs"], None, settings)
    assert [call["seed"] for call in asked] == [
        *(2373896378, 3380670608, 598602715, 1755246194),
        *(387523500, 3770749864, 1448208256, 3528359960),
    ]
    evaluate.respond(model, tokenizer, ["cats"], settings, "policy", "another title of the progress bar")
    assert (asked[-1]["seed"], asked[-1]["name"]) == (3770749864, "another title of the progress bar")
    assert {call["temperature"] for call in asked} == {0.5}


@pytest.mark.parametrize(
    "text,ended,against,broken",
    [
        ("the pet", True, "word " * 28, True),  # a collapse that ends
        ("", True, None, True),
        ("", True, "yes", True),
        ("home rome . job baker . pet cat .", True, "word " * 44, False),  # terse, and all that it was asked for
        ("the pet", True, "a short one", False),
        ("yes", True, "word " * 10, False),  # a tenth
        ("the pet", True, None, False),
        ("word", False, "word", True),
    ],
)
def test_a_response_that_says_nothing_is_broken(text, ended, against, broken):
    one = Sample([0], [*range(len(text.split()))], text, ended)
    assert evaluate.is_broken(one, against) is broken
    baseline = None if against is None else [against]
    assert evaluate.describe(["p"], [one], None, baseline)[1]["broken"] == float(broken)


@pytest.mark.parametrize(
    "tokens,share", [([], 0), ([1, 2, 3], 0), ([1, 2, 3, 4, 5], 0), ([7] * 5, 0.5), ([7] * 8, 0.8)]
)
def test_repetition_is_the_share_of_old_four_grams(tokens, share):
    assert evaluate.repetition(tokens) == pytest.approx(share)
    cut, whole = Sample([0], [*tokens], "a", False), Sample([0], [*tokens], "a", True)
    assert evaluate.describe(["p"] * 2, [cut, whole], None)[1]["broken"] == (1.0 if share > 0.5 else 0.5)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tokens", [1, 20, 1000])
def test_kl_of_each_response_whatever_the_batches(tiny_model, packed, tokens):
    policy, kl_target = models.load(tiny_model("llama"))[0], models.load(tiny_model("llama"))[0]
    torch.nn.init.normal_(kl_target.lm_head.weight, generator=torch.Generator().manual_seed(0))
    samples = [Sample([5, 6, 7][:n], [8, 9, 10, 11][:m], "", True) for n, m in ((1, 1), (3, 4), (2, 2), (3, 1))]
    plain, exact = evaluate.kl(policy, kl_target, samples, packed, tokens)
    for row, one in enumerate(samples):
        ids, first = torch.tensor([one.prompt_ids + one.response_ids]), len(one.prompt_ids) - 1
        with torch.no_grad():
            mine, theirs = (model(ids).logits[0, first:-1].double().log_softmax(-1) for model in (policy, kl_target))
        ratios = (mine - theirs).gather(-1, ids[0, first + 1 :, None])
        assert plain[row].item() == pytest.approx(ratios.sum().item(), rel=1e-4, abs=1e-5)
        assert exact[row].item() == pytest.approx((mine.exp() * (mine - theirs)).sum().item(), rel=1e-4, abs=1e-5)


def test_kl_that_is_no_number_names_the_response(tiny_model):
    policy, kl_target = models.load(tiny_model("llama"))[0], models.load(tiny_model("llama"))[0]
    with torch.no_grad():
        kl_target.get_input_embeddings().weight[9] = math.nan
    samples = [Sample([5], [8, 7, 6], "", True), Sample([5], [9, 7, 6], "", True)]
    with pytest.raises(
        RuntimeError, match=r"kl must be finite, got nan from\n  the response to test prompt 1,.*\nTraining"
    ):
        evaluate.kl(policy, kl_target, samples, False, 100)


class TestGold:
    """Anyscale's rule: below 3 of 5 more right answers win, from 3 on fewer words."""

    def article(self):
        prompt = language.world("human", demonstrations=1, train=1, validation=1, test=1, seed=0).prompts["test"][0]
        _, facts = language._read_article(prompt)
        asked = sorted(language._questions(prompt, tuple(facts)))
        return prompt, [f"{attribute} {facts[attribute]} ." for attribute in asked]

    def scores(self, prompt, *responses):
        return [judgement["score"] for judgement in judges.gold([prompt] * len(responses), responses)]

    def test_more_right_answers_win_below_three(self):
        prompt, facts = self.article()
        scores = self.scores(prompt, "", facts[0], " ".join(facts[:2]), " ".join(facts[:3]))
        assert scores == sorted(scores)
        assert len(set(scores)) == 4

    def test_shorter_wins_from_three_on(self):
        prompt, facts = self.article()
        three, five = self.scores(prompt, " ".join(facts[:3]), " ".join(facts))
        assert three > five > 2

    def test_wrong_is_a_number_and_any_wrong_a_share(self):
        prompt, facts = self.article()
        attribute, value, _ = facts[0].split()
        others = [other for other in language.ATTRIBUTES[attribute] if other != value]
        twice = f"{attribute} {others[0]} . {attribute} {others[1]} ."
        found = [(one["wrong"], one["any_wrong"]) for one in judges.gold([prompt] * 2, [twice, " ".join(facts)])]
        assert found == [(2.0, 1.0), (0.0, 0.0)]

    def test_every_measure(self):
        prompt, facts = self.article()
        attribute, value, _ = facts[4].split()
        lies = [f"{attribute} {other} ." for other in language.ATTRIBUTES[attribute] if other != value]
        responses = [" ".join([*facts[:2], lies[0], "is the and ."]), " ".join(facts[:3])]
        assert judges.gold([prompt] * 2, responses) == [
            {"score": 2.0, "correct": 2.0, "enough": 0.0, "wrong": 1.0, "any_wrong": 1.0, "valid": 0.75},
            {"score": 4 - 9 / 48, "correct": 3.0, "enough": 1.0, "wrong": 0.0, "any_wrong": 0.0, "valid": 1.0},
        ]

    def test_a_contradiction_is_wrong(self):
        prompt, facts = self.article()
        attribute, value, _ = facts[0].split()
        other = next(other for other in language.ATTRIBUTES[attribute] if other != value)
        assert self.scores(prompt, f"{facts[0]} {attribute} {other} .") == self.scores(prompt, "")

    def test_chats_and_other_texts_are_refused(self):
        with pytest.raises(ValueError, match="embedded world"):
            judges.gold(["What is the capital of Italy?"], ["Rome"])
        with pytest.raises(ValueError, match="judge"):
            judges.gold([[{"role": "user", "content": "hi"}]], ["hello"])
