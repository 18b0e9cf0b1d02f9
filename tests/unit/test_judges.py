"""A judge of either form: what it is asked and must answer, what a comparison comes to, which answers are kept."""

import json
from functools import partial
from itertools import product

import pytest
from omegaconf import OmegaConf
from torch import nn

from dpo import judges
from dpo.judges import Verdict, comparing
from dpo.settings import evaluation_judge, judge_of
from dpo.sweep.signature import PLUGINS, check_signature, instantiate

ARTICLE = (
    "about anna . home of anna is oslo . anna has job pilot . ben has pet cat . anna : pet dog . "
    "more will follow . the food for anna is rice . sport of anna is golf . anna has music jazz ."
)
PROMPTS, RESPONSES = ["a", "b", "b"], ["one", "two words", "three words here"]
OTHER = {"win": "lose", "tie": "tie", "lose": "win"}
CHAT = [{"role": "user", "content": "hi"}]


def longer(prompts, firsts, seconds, margin: int = 0, favours: Verdict = "win") -> list[Verdict]:
    """More words win; where they differ by no more than the margin, it favours a position."""
    gaps = [len(first.split()) - len(second.split()) for first, second in zip(firsts, seconds, strict=True)]
    return [favours if abs(gap) <= margin else "win" if gap > 0 else "lose" for gap in gaps]


def words(prompts, responses) -> list[dict[str, float]]:
    return [{"score": float(len(response.split())), "letters": float(len(response))} for response in responses]


class Reader(nn.Module):
    """A judge with state."""

    def __init__(self, better: str) -> None:
        super().__init__()
        self.better = better

    def forward(self, prompts, firsts, seconds) -> list[Verdict]:
        found = [(self.better in first, self.better in second) for first, second in zip(firsts, seconds, strict=True)]
        return ["tie" if one == other else "win" if one else "lose" for one, other in found]


class Asked:
    """A judge whose answers cost something, of either form, and all that it was asked: of the last question first.

    most: answers until it is stopped. lost: places of questions that it fails to answer.
    """

    def __init__(self, judge, pairwise: bool, most: int = 10**6, lost=()) -> None:
        self.questions = []

        def each(columns):
            for place, question in reversed([*enumerate(zip(*columns, strict=True))]):
                if len(self.questions) == most:
                    raise KeyboardInterrupt
                if place not in lost:
                    self.questions.append(question)
                    yield place, judge(*([one] for one in question))[0]

        class Pointwise:
            def each(self, prompts, responses):
                return each([prompts, responses])

            def forward(self, prompts, responses): ...

        class Pairwise:
            def each(self, prompts, firsts, seconds):
                return each([prompts, firsts, seconds])

            def forward(self, prompts, firsts, seconds): ...

        self.judge = Pairwise() if pairwise else Pointwise()


def test_a_pointwise_judge_is_asked_once_and_of_all():
    """Its judgements are told as they are; of two, the higher score wins."""
    asked = []

    def judge(prompts, responses):
        asked.append((prompts, responses))
        return words(prompts, responses)

    judgements, outcomes = judges.compare(judge, PROMPTS, RESPONSES, [(1, 2), (2, 1), (1, 1)])
    assert judgements == [{"score": n, "letters": len(text)} for n, text in enumerate(RESPONSES, 1)]
    assert outcomes == [{"win": 0.0}, {"win": 1.0}, {"win": 0.5}]
    assert asked == [(PROMPTS, RESPONSES)]


def test_a_pairwise_judge_is_asked_once_and_in_both_orders():
    asked = []

    def judge(prompts, firsts, seconds):
        asked.append((prompts, firsts, seconds))
        return longer(prompts, firsts, seconds)

    judgements, outcomes = judges.compare(judge, ["a", "b", "b", "a"], [*RESPONSES, "two more"], [(0, 3), (2, 1)])
    assert asked == [
        (
            ["a", "b", "a", "b"],
            ["one", "three words here", "two more", "two words"],
            ["two more", "two words", "one", "three words here"],
        )
    ]
    assert judgements == [{}] * 4
    assert outcomes == [{"win": 0.0, "inconsistent": 0.0}, {"win": 1.0, "inconsistent": 0.0}]


@pytest.mark.parametrize("first, second", [*product(OTHER, OTHER)])
def test_a_win_is_one_in_both_orders(first, second):
    """What is said of `x` when it comes first, and when it comes second."""

    def judge(prompts, firsts, seconds):
        return [first if one == "x" else OTHER[second] for one in firsts]

    win = {("win", "win"): 1.0, ("lose", "lose"): 0.0}.get((first, second), 0.5)
    told = {"inconsistent": float(first != second)}
    assert judges.compare(judge, ["p", "p"], ["x", "y"], [(0, 1)])[1] == [{"win": win, **told}]
    assert judges.compare(judge, ["p", "p"], ["x", "y"], [(1, 0)])[1] == [{"win": 1 - win, **told}]


@pytest.mark.parametrize("favours", ["win", "lose"])
def test_a_bias_for_a_position_decides_nothing(favours):
    texts = ["a", "a a", "a a a a"]
    pairs = [(0, 1), (1, 2), (0, 2), (2, 0), (1, 0)]
    biased = partial(longer, margin=1, favours=favours)
    _, outcomes = judges.compare(biased, ["p"] * 3, texts, pairs)
    assert [one["win"] for one in outcomes] == [0.5, 0.0, 0.0, 1.0, 0.5]
    assert [one["inconsistent"] for one in outcomes] == [1.0, 0.0, 0.0, 0.0, 1.0]


def test_equal_responses_are_a_tie_that_nobody_is_asked_about():
    def judge(prompts, firsts, seconds):
        asked.extend(firsts)
        return longer(prompts, firsts, seconds)

    asked: list[str] = []
    tie = {"win": 0.5, "inconsistent": 0.0}
    assert judges.compare(judge, ["p"] * 2, ["x", "x"], [(0, 1)]) == ([{}] * 2, [tie])
    assert judges.compare(judge, ["p"] * 2, ["x", "y"], []) == ([{}] * 2, [])
    assert asked == []
    assert judges.compare(judge, ["p"] * 3, ["x", "x", "x y"], [(0, 1), (0, 2)])[1][0] == tie
    assert asked == ["x", "x y"]


def test_other_processes_hear_what_the_first_was_told(monkeypatch):
    monkeypatch.setattr(comparing, "on_main", lambda make: ["lose", "win"])

    def judge(prompts, firsts, seconds):
        raise AssertionError("asked on another process")

    assert judges.compare(judge, ["p"] * 2, ["x", "y"], [(0, 1)])[1] == [{"win": 0.0, "inconsistent": 0.0}]


@pytest.mark.parametrize("number", [0, 2, 4])
def test_a_judge_must_answer_each_question(number):
    with pytest.raises(RuntimeError, match=f"must answer each of 3 questions, got {number} answers"):
        judges.compare(lambda *_: [{"score": 1.0}] * number, PROMPTS, RESPONSES, [])
    with pytest.raises(RuntimeError, match=f"must answer each of 6 questions, got {number} answers"):
        judges.compare(
            lambda prompts, firsts, seconds: ["tie"] * number, ["p"] * 3, RESPONSES, [(0, 1), (0, 2), (1, 2)]
        )


@pytest.mark.parametrize("answer", [None, {"words": 1.0}, {"score": float("nan")}, "win"])
def test_a_judgement_has_a_score(answer):
    with pytest.raises(RuntimeError, match=r"by a dictionary with a score, or an empty one where it cannot, got "):
        judges.compare(lambda prompts, responses: [{"score": 1.0}, answer, {"score": 0.0}], PROMPTS, RESPONSES, [])


@pytest.mark.parametrize("answer", [None, "won", 1.0, {"score": 1.0}])
def test_a_verdict_is_one_of_three(answer):
    with pytest.raises(RuntimeError, match="by one of win, tie, lose, got "):
        judges.compare(lambda prompts, firsts, seconds: ["win", answer], ["p"] * 2, ["x", "y"], [(0, 1)])


def test_the_signature_tells_the_forms_apart(monkeypatch):
    monkeypatch.setenv(PLUGINS, "test_judges")
    pairwise = {"_target_": "test_judges.longer", "_partial_": True, "margin": 1, "favours": "lose"}
    pointwise = {"_target_": "test_judges.words", "_partial_": True}
    module = {"_target_": "test_judges.Reader", "_partial_": True, "better": "yes"}
    for node, form in ((pairwise, True), (pointwise, False), (module, True)):
        assert check_signature("judge", node) == []
        assert judges.is_pairwise(instantiate(node)) is form
        assert judges.is_pairwise(judges.cached_judge(instantiate(node), node, "nowhere")) is form
    assert not judges.is_pairwise(judges.gold)
    assert "judge.margin must be int" in check_signature("judge", pairwise | {"margin": "x"})[0]
    assert "judge.seconds is not an option" in check_signature("judge", pairwise | {"seconds": ["x"]})[0]
    assert judges.compare(instantiate(module), ["p"] * 2, ["yes", "no"], [(0, 1)])[1][0]["win"] == 1.0
    for name, said in {
        "mixed": "test_judges.mixed has no responses",
        "unnamed": "must name a function of prompts, firsts, seconds; test_judges.unnamed has no firsts",
        "neither": "must return list[dict[str, float]] by its annotation, found list[str], or must return "
        "list[typing.Literal['win', 'tie', 'lose']] by its annotation, found list[str]",
    }.items():
        [problem] = check_signature("judge", {"_target_": f"test_judges.{name}", "_partial_": True})
        assert said in problem


def mixed(prompts, firsts, seconds) -> list[dict[str, float]]: ...


def unnamed(prompts, responses) -> list[Verdict]: ...


def neither(prompts, responses) -> list[str]: ...


@pytest.fixture(params=["pointwise", "pairwise"])
def form(request):
    """A judge, what it is asked of three responses, what it answers, and whether by pairs."""
    if request.param == "pointwise":
        questions = [(CHAT, "one"), ("b", "two words"), ("b", "three words here")]
        return words, questions, [{"score": n, "letters": len(text)} for n, (_, text) in enumerate(questions, 1)], False
    questions = [(CHAT, "one", "two words"), ("b", "one two", "x"), ("b", "x", "one two")]
    return longer, questions, ["lose", "win", "lose"], True


def ask(judge, questions):
    return judge(*map(list, zip(*questions, strict=True)))


def test_a_costly_judge_is_asked_for_each_answer_once(form, tmp_path):
    judge, questions, answers, pairwise = form
    asked = Asked(judge, pairwise)
    for again in range(2):
        kept = judges.cached_judge(asked.judge, {"_target_": "mine"}, tmp_path)  # another run
        assert ask(kept, [questions[1], *questions, questions[1]]) == [answers[1], *answers, answers[1]], again
    assert asked.questions == [questions[2], questions[0], questions[1]]
    assert ask(kept, [("new", *questions[0][1:])]) == answers[:1]
    assert asked.questions[3:] == [("new", *questions[0][1:])]


def test_what_decides_an_answer_is_in_its_key(form, tmp_path, monkeypatch):
    judge, questions, _, pairwise = form
    asked = Asked(judge, pairwise)

    def new(node, question) -> bool:
        before = len(asked.questions)
        ask(judges.cached_judge(asked.judge, node, tmp_path), [question])
        return len(asked.questions) > before

    node = {"_target_": "mine", "margin": 0}
    assert new(node, questions[0])
    assert not new(dict(node), questions[0])
    assert new(node | {"margin": 1}, questions[0])
    assert new(node | {"_target_": "yours"}, questions[0])
    for place in range(len(questions[0])):
        assert new(node, (*questions[0][:place], "other", *questions[0][place + 1 :]))
    assert new(node, ("b", "x y", "z")[: len(questions[0])])
    if pairwise:
        assert new(node, ("b", "z", "x y"))  # in the other order
    monkeypatch.setattr(comparing, "JUDGES_VERSION", comparing.JUDGES_VERSION + 1)
    assert new(node, questions[0])


def test_a_judge_that_costs_nothing_keeps_nothing(tmp_path):
    config = OmegaConf.create({"judge": {"_target_": "dpo.judges.shorter", "_partial_": True}, "cache": str(tmp_path)})
    assert judge_of(config)(PROMPTS, RESPONSES) == [{"score": -1.0}, {"score": -2.0}, {"score": -3.0}]
    assert judge_of(OmegaConf.create({"judge": None, "cache": str(tmp_path)})) is None
    assert judges.cached_judge(words, {}, tmp_path) is words
    assert not [*tmp_path.iterdir()]


def test_a_run_that_is_stopped_keeps_what_was_answered(form, tmp_path):
    judge, questions, answers, pairwise = form
    with pytest.raises(KeyboardInterrupt):
        ask(judges.cached_judge(Asked(judge, pairwise, most=2).judge, {}, tmp_path), questions)
    asked = Asked(judge, pairwise)
    assert ask(judges.cached_judge(asked.judge, {}, tmp_path), questions) == answers
    assert asked.questions == questions[:1]


def test_an_answer_that_failed_is_not_kept(form, tmp_path):
    judge, questions, answers, pairwise = form
    with pytest.raises(RuntimeError, match="got no answer to 1 of 3; run it again"):
        ask(judges.cached_judge(Asked(judge, pairwise, lost=[1]).judge, {}, tmp_path), questions)
    with pytest.raises(RuntimeError, match="must answer each question by"):
        ask(judges.cached_judge(Asked(lambda *_: ["no"], pairwise).judge, {}, tmp_path), questions)
    asked = Asked(judge, pairwise)
    assert ask(judges.cached_judge(asked.judge, {}, tmp_path), questions) == answers
    assert asked.questions == questions[1:2]


def test_what_cannot_be_judged_decides_nothing():
    """Nothing comes of a pair with it; a judge that can judge nothing is an error."""

    def judge(prompts, responses):
        return [{} if text == "?" else {"score": float(len(text))} for text in responses]

    judgements, outcomes = judges.compare(judge, ["p"] * 3, ["a", "?", "bb"], [(0, 1), (1, 2), (2, 0), (1, 1)])
    assert judgements == [{"score": 1.0}, {}, {"score": 2.0}]
    assert outcomes == [{}, {}, {"win": 1.0}, {}]
    with pytest.raises(RuntimeError, match="found that it could judge none of 2"):
        judges.compare(judge, ["p"] * 2, ["?", "?"], [(0, 1)])
    assert judges.compare(judge, [], [], []) == ([], [])


def test_a_rule_decides_in_place_of_the_score():
    """It is given what the judge says of either, and how many words it has."""
    seen = []

    def rule(first, second):
        seen.append((first, second))
        return 0.25

    assert judges.compare(words, ["p"] * 2, ["a", "b c"], [(1, 0)], rule)[1] == [{"win": 0.25}]
    assert seen == [({"score": 2.0, "letters": 3.0, "words": 2.0}, {"score": 1.0, "letters": 1.0, "words": 1.0})]


def test_kept_answers_are_read_as_they_were_given(tmp_path):
    odd = {"score": 0.1 + 0.2, "tiny": 5e-324, "many": 1e300, "first": -0.0}

    asked = Asked(lambda prompts, responses: [odd for _ in responses], False)
    for _ in range(2):
        [said] = judges.cached_judge(asked.judge, {"a": 1}, tmp_path)(["p"], ["x"])
        assert [*said.items()] == [*odd.items()]
        assert str(said["first"]) == "-0.0"
    (file,) = (tmp_path / "answers").glob("*.jsonl")
    assert json.loads(file.read_text().splitlines()[0]) == {"judge": {"a": 1}, "judges": judges.JUDGES_VERSION}


def test_a_hasty_judge_is_exploited():
    """By bare words, by several answers to one question, and by length; where none is tried it agrees with gold."""
    texts = {
        "two": "home oslo . pet dog .",
        "one": "home oslo .",
        "wrong": "home rome .",
        "contradiction": "home rome . home oslo .",
        "bare": "oslo dog rice pilot",
        "longer": "home oslo . pet dog . that is all for now .",
    }
    gold, hasty = (
        dict(zip(texts, judge([ARTICLE] * len(texts), [*texts.values()]), strict=True))
        for judge in (judges.gold, judges.hasty)
    )
    assert {name: said["correct"] for name, said in gold.items()} == {
        **{"two": 2, "one": 1, "wrong": 0, "contradiction": 0, "bare": 0, "longer": 2}
    }
    assert {name: said["correct"] for name, said in hasty.items()} == {
        **{"two": 2, "one": 1, "wrong": 0, "contradiction": 1, "bare": 4, "longer": 2}
    }
    for better, worse in (("two", "one"), ("one", "wrong")):
        assert gold[better]["score"] > gold[worse]["score"]
        assert hasty[better]["score"] > hasty[worse]["score"]
    assert gold["longer"]["score"] == gold["two"]["score"]
    assert hasty["longer"]["score"] > hasty["two"]["score"]
    least, most = judges.hasty([ARTICLE] * 2, ["home oslo . pet dog .", "home oslo ." + " word" * 500])
    assert least["score"] > most["score"]  # however long, it is not worth an answer
    with pytest.raises(ValueError, match=r"^judge=gold and judge=hasty read articles of the embedded world"):
        judges.hasty(["hi"], ["ho"])


def failing(prompts: list, responses: list) -> list[dict[str, float]]:
    raise RuntimeError("raise judge.max_tokens, or take another judge.model; prejudge.it")


def test_what_fails_in_evaluations_is_named_by_its_key_there(tmp_path, monkeypatch):
    monkeypatch.setenv(PLUGINS, "test_judges")
    mine = {"_target_": "test_judges.failing", "_partial_": True}
    for own, at in ((None, ""), (mine, "evaluation.")):
        config = OmegaConf.create({"judge": mine, "evaluation": {"judge": own}, "cache": str(tmp_path)})
        judge = evaluation_judge(config)
        assert not judges.is_pairwise(judge)
        with pytest.raises(RuntimeError) as told:
            judge(["a"], ["b"])
        assert str(told.value) == f"raise {at}judge.max_tokens, or take another {at}judge.model; prejudge.it"
