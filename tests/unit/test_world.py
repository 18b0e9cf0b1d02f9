"""The embedded world: articles and splits, the judge by hand-made summaries, the tokenizer, the shipped base model."""

import hashlib
import json
import os
import random
import statistics
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dpo.policy import model as models
from dpo.world import language as embedded
from dpo.world.language import Verdict, tokenizer, utility, verdict, world

ARTICLE = (
    "about anna . home of anna is oslo . anna has job pilot . ben has pet cat . anna : pet dog . "
    "more will follow . the food for anna is rice . sport of anna is golf . anna has music jazz ."
)
RIGHT = "home oslo . job pilot . pet dog . food rice . sport golf . music jazz ."  # every fact, so every answer
FACTS = {*embedded.ATTRIBUTES}


@pytest.fixture(scope="module")
def dataset():
    return world("human", demonstrations=2000, train=300, validation=100, test=200, seed=0)


def test_splits_are_distinct_articles_of_the_right_number(dataset):
    splits = [*dataset.prompts.values(), [one.prompt for one in dataset.demonstrations]]
    assert [len(split) for split in splits] == [200, 300, 100, 2000]
    everything = [prompt for split in splits for prompt in split]
    assert len(set(everything)) == len(everything)
    assert dataset.preferences == {}


def test_seed_changes_every_split_but_test(dataset):
    same, other = world("human", 2000, 300, 100, 200, seed=0), world("human", 50, 300, 100, 200, seed=1)
    assert same == dataset
    assert other.prompts["test"] == dataset.prompts["test"]
    for split in ("train", "validation"):
        assert not set(other.prompts[split]) & set(dataset.prompts[split])
    assert not {one.prompt for one in other.demonstrations} & {one.prompt for one in dataset.demonstrations}
    for seed in range(20):  # whatever the seed, nothing is trained on that is tested on
        other = world("human", 100, 100, 100, 200, seed)
        trained = {*other.prompts["train"], *other.prompts["validation"], *(one.prompt for one in other.demonstrations)}
        assert not trained & set(dataset.prompts["test"])


WRITTEN = {  # by writer: the first of 200 demonstrations of seed 3, and the digest of all
    "human": (
        "music folk . music folk . food soup . food soup . it says that the pet is turtle . the colour of henry is "
        "black . home york . home york . as always there is more .",
        "d1af1fe2c6afbe4f",
    ),
    "clean": ("job nurse . food soup . pet turtle . home york .", "3ac2cce47517c0f0"),
    "alien": (
        "here is what it says about henry . music folk always . job nurse always . home york here . colour black "
        "always . that is all for now . as always there is more .",
        "7b89fd5136a77b80",
    ),
    "alien_clean": ("job nurse here . food soup here . pet turtle here . home york here .", "3814413c2c8532ca"),
}


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def test_the_world_is_this_one():
    """For good: every published figure is of these texts, questions and lessons."""
    for writer, (first, everything) in WRITTEN.items():
        made = world(writer, demonstrations=200, train=60, validation=20, test=40, seed=3)
        assert made.demonstrations[0].response == first
        assert digest([[one.prompt, one.response] for one in made.demonstrations]) == everything
        assert digest(made.prompts) == "85996cfb17c28eac"
    assert made.prompts["validation"][0] == (
        "about anna . anna : drink tea . anna : job baker . the colour for anna is green . the pet for anna is parrot "
        ". the job for david is judge . music of anna is folk . anna : home york . some say it is always so ."
    )
    unasked = []
    for prompt in made.prompts["test"][:12]:
        _, facts = embedded._read_article(prompt)
        unasked += [fact for fact, value in facts.items() if not verdict(prompt, f"{fact} {value} .").correct]
    assert " ".join(unasked) == "music drink music drink drink colour sport drink sport music music music"
    rng = random.Random(0)
    lessons = [embedded.lesson(rng, facts) for facts in (1, 2, 4, 6) * 20]
    assert digest([[one.prompt, one.response] for one in lessons]) == "502197331243ca61"


def test_a_human_has_written_about_each_article(dataset):
    """As noisy as the demonstrations; about the same article the same, whatever else is drawn."""
    for split, texts in dataset.written.items():
        assert dataset.written_to(dataset.prompts[split], split) == texts
        again = world("human", 10, 30, 10, 200, seed=0)
        assert again.written[split] == texts[: len(again.prompts[split])]
    assert {*dataset.written} == {*dataset.prompts}
    tested = [verdict(*both).correct for both in zip(dataset.prompts["test"], dataset.written["test"], strict=True)]
    shown = [verdict(one.prompt, one.response).correct for one in dataset.demonstrations]
    assert statistics.mean(tested) == pytest.approx(statistics.mean(shown), abs=0.35)
    alien = world("alien", 10, 10, 10, 10, seed=0)
    assert all("always ." in text or "here ." in text for text in alien.written["test"])
    with pytest.raises(ValueError, match=r"each of the test prompts, found nothing for 1 of 2"):
        dataset.written_to([dataset.prompts["test"][0], ARTICLE], "test")


def test_values_are_told_right_or_wrong_by_their_own_fact():
    """`rice` is what anna eats, and no drink; the cat is somebody else's."""
    response = "home oslo . drink rice . drink tea . pet cat . food soup . job pilot judge . oslo"
    words = response.split()
    told = {at: said for at, said in enumerate(embedded.values_told(ARTICLE, words)) if said is not None}
    assert told == {1: "right", 7: "wrong", 10: "wrong", 13: "wrong"}


def test_a_phrase_is_a_token_of_the_other_tokenizer():
    plain, phrases = tokenizer(), tokenizer(phrases=True)
    text = "the home of anna is rome . pet cat ."
    assert phrases.tokenize(text) == ["the home", "of anna", "is rome", ".", "pet", "cat", "."]
    assert phrases.decode(phrases(text)["input_ids"], skip_special_tokens=True) == text
    own = phrases.convert_ids_to_tokens(phrases(text)["input_ids"])
    assert [own[0], own[-1]] == ["<bos>", "<sep>"]
    assert {word: phrases.get_vocab()[word] for word in plain.get_vocab()} == plain.get_vocab()


def test_longer_splits_begin_like_shorter_ones(dataset):
    short = world("human", demonstrations=10, train=20, validation=5, test=200, seed=0)
    assert short.prompts["train"] == dataset.prompts["train"][:20]
    assert short.demonstrations == dataset.demonstrations[:10]


def test_an_article_drawn_twice_is_used_once(monkeypatch):
    draw = embedded._draw_article
    monkeypatch.setattr(embedded, "_draw_article", lambda rng: draw(random.Random(rng.randrange(8))))
    dataset = world("human", 2, 2, 2, 2, seed=0)
    everything = [one.prompt for one in dataset.demonstrations]
    for split in dataset.prompts.values():
        everything += split
    assert len(set(everything)) == len(everything) == 8


def test_articles_and_questions_do_not_depend_on_the_hash_seed():
    code = (
        "from dpo.world.language import world, verdict\n"
        "d = world('human', 20, 20, 5, 5, 3)\n"
        "print(d, [verdict(one.prompt, one.response) for one in d.demonstrations])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert runs[0] == runs[1] != ""


def test_judge_finds_all_questions_answered():
    assert verdict(ARTICLE, RIGHT) == Verdict(correct=5, wrong=0, words=18, valid=1.0)


def test_judge_asks_five_of_the_six_facts():
    facts = RIGHT.removesuffix(" .").split(" . ")
    assert len(facts) == 6
    answered = [verdict(ARTICLE, f"{fact} .").correct for fact in facts]
    assert sorted(answered) == [0, 1, 1, 1, 1, 1]


def test_salient_facts_are_asked_for_more_often(dataset):
    asked: dict[bool, list[int]] = {True: [], False: []}
    for prompt in dataset.prompts["train"]:
        _, facts = embedded._read_article(prompt)
        for attribute, value in facts.items():
            salient = attribute in embedded.SALIENT
            asked[salient].append(verdict(prompt, f"{attribute} {value} .").correct)
    assert statistics.mean(asked[True]) > statistics.mean(asked[False]) + 0.1


@pytest.mark.parametrize(
    "response, correct, wrong, valid",
    [
        ("it says that the home is oslo .", 1, 0, 1.0),
        ("the home of anna is oslo .", 1, 0, 1.0),
        ("home oslo . home oslo .", 1, 0, 1.0),  # twice the same counts once
        ("home oslo . home rome .", 0, 1, 1.0),  # two answers to one question are no answer
        ("home rome . home lima .", 0, 2, 1.0),
        ("pet cat .", 0, 1, 1.0),  # the pet of the other person in the article
        ("colour red .", 0, 1, 1.0),  # about a fact that the article does not hold
        ("oslo .", 0, 0, 0.0),  # a bare value
        ("home .", 0, 0, 0.0),
        ("the home of ben is oslo .", 0, 0, 1.0),  # about somebody else
        ("home oslo rome .", 0, 0, 0.0),  # listing values
        ("home job oslo .", 0, 0, 0.0),
        ("home oslo", 1, 0, 1.0),  # the last period may be missing
        ("home oslo is is .", 1, 0, 0.0),  # a fact, in no sentence of the world
        ("home oslo . is the and . what more", 1, 0, 1 / 3),
        ("here is what it says about anna . home oslo . and so on .", 1, 0, 1.0),
        ("", 0, 0, 0.0),
        (". . .", 0, 0, 0.0),
    ],
)
def test_judge_by_hand(response, correct, wrong, valid):
    asked_and_told = verdict(ARTICLE, response)
    assert verdict(ARTICLE, "home oslo .").correct == 1  # the home is asked for in this article
    assert (asked_and_told.correct, asked_and_told.wrong) == (correct, wrong)
    assert asked_and_told.valid == pytest.approx(valid)
    assert asked_and_told.words == len(response.split())


@given(st.lists(st.sampled_from(sorted(tokenizer().get_vocab())), max_size=48))
@settings(max_examples=200, deadline=None)
def test_judge_takes_any_words(words):
    told = verdict(ARTICLE, " ".join(words))
    assert 0 <= told.correct <= 5
    assert 0.0 <= told.valid <= 1.0
    assert told.words == len(words)


@pytest.mark.parametrize(
    "prompt", ["", "hello world", "about nobody . home of anna is oslo .", "about anna . anna has pet ."]
)
def test_judge_refuses_what_is_no_article(prompt):
    with pytest.raises(ValueError, match="embedded world"):
        verdict(prompt, "home oslo .")


def test_utility_orders_like_the_rule():
    def of(correct: int, words: int) -> float:
        return utility(Verdict(correct, 0, words, 1.0))

    assert of(2, 40) == of(2, 10) == 2.0  # below three right answers brevity does not count
    assert of(0, 5) < of(1, 40) < of(2, 40) < of(3, 40)
    assert of(3, 12) == of(5, 12) > of(5, 13)  # from three on nothing else does
    assert of(4, 12) == pytest.approx(3.75)
    assert of(3, 48) >= 3.0 > of(2, 1)  # 48 words are the most that is ever sampled


def test_human_summaries_are_noisy(dataset):
    told = [verdict(one.prompt, one.response) for one in dataset.demonstrations]
    assert all(verdict.valid == 1.0 for verdict in told)
    assert 0.6 < statistics.mean(one.correct >= 3 for one in told) < 0.8
    assert 0.25 < statistics.mean(one.wrong for one in told) < 0.50
    assert 27 < statistics.mean(one.words for one in told) < 33
    assert max(one.words for one in told) < embedded.MAX_WORDS


def test_the_alien_writers_are_as_good_in_a_language_of_their_own():
    clauses, right = {}, {}
    for writer in ("human", "alien", "clean", "alien_clean"):
        told = world(writer, demonstrations=400, train=1, validation=1, test=1, seed=0).demonstrations
        clauses[writer] = {clause for one in told for clause in one.response.split(" .") if set(clause.split()) & FACTS}
        verdicts = [verdict(one.prompt, one.response) for one in told]
        right[writer] = statistics.mean(one.correct for one in verdicts)
        assert all(one.valid == 1.0 for one in verdicts)
    assert not (clauses["human"] | clauses["clean"]) & (clauses["alien"] | clauses["alien_clean"])
    assert right["alien"] == pytest.approx(right["human"], abs=0.15)
    assert right["alien_clean"] == pytest.approx(right["clean"], abs=0.15)
    assert right["clean"] > right["human"]


def test_a_lesson_is_right(dataset):
    rng = random.Random(0)
    for facts in (1, 2, 4, 6) * 25:
        lesson = embedded.lesson(rng, facts)
        told = verdict(lesson.prompt, lesson.response)
        assert (told.wrong, told.valid) == (0, 1.0)
        assert told.correct >= min(facts, 2) - 1  # one fact of six is not asked for; prose may tell two of them only


def test_text_survives_the_tokenizer(dataset):
    words = tokenizer()
    for one in dataset.demonstrations:
        prompt = words(one.prompt)["input_ids"]
        assert [prompt[0], prompt[-1]] == [words.bos_token_id, words.sep_token_id]
        assert words.decode(prompt, skip_special_tokens=True) == one.prompt
        response = words(one.response, add_special_tokens=False)["input_ids"]
        assert len(response) == len(one.response.split())
        assert words.decode(response, skip_special_tokens=True) == one.response
    special = {words.pad_token_id, words.bos_token_id, words.sep_token_id, words.eos_token_id}
    assert len(special) == 4
    with pytest.raises(Exception, match="UNK"):
        words("hello")


def test_the_base_model_ships_with_the_world():
    folder = models.WORLD_BASE
    shipped = AutoTokenizer.from_pretrained(folder)
    assert shipped.get_vocab() == tokenizer().get_vocab()
    assert shipped(ARTICLE)["input_ids"] == tokenizer()(ARTICLE)["input_ids"]
    assert shipped.decode(shipped(ARTICLE)["input_ids"], skip_special_tokens=True) == ARTICLE
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 4 * 2**20
    model, _ = models.load("world")
    assert model.get_input_embeddings().num_embeddings == len(shipped)
    assert model.generation_config.eos_token_id == shipped.eos_token_id
    quality = json.loads((folder / "quality.json").read_text())
    assert quality["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def looked_up(lesson, model, words):
    """What the model finds most likely at each token of the response, and that token."""
    prompt = words(lesson.prompt)["input_ids"]
    response = words(lesson.response, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        return model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist(), response


def test_the_base_model_looks_facts_up():
    """The measured quality, on a few articles: a base model of another vocabulary or training would fail."""
    model, words = models.load("world")
    rng = random.Random("look up")
    right = total = 0
    for _ in range(40):
        lesson = embedded.lesson(rng, 4)
        best, response = looked_up(lesson, model, words)
        values = {value for values in embedded.ATTRIBUTES.values() for value in values}
        told = [(guess, token) for guess, token in zip(best, response, strict=True) if words.decode(token) in values]
        right += sum(guess == token for guess, token in told)
        total += len(told)
    assert total == 160
    assert right / total > 0.9


def test_the_base_model_cannot_tell_whose_a_fact_is():
    """Why larger ones read more of somebody else: all else it looks up without a mistake."""
    model, words = models.load("world")
    rng = random.Random("whose")
    wrong, found = {True: 0, False: 0}, {True: 0, False: 0}
    for _ in range(100):
        lesson = embedded.lesson(rng, 6)
        best, response = looked_up(lesson, model, words)
        for guess, token in zip(best, response, strict=True):
            for values in embedded.ATTRIBUTES.values():
                if words.decode(token) in values:
                    told = {*values} & {*lesson.prompt.split()}
                    assert words.decode(guess) in told
                    found[len(told) > 1] += 1
                    wrong[len(told) > 1] += guess != token
    assert found[False] > 300
    assert wrong[False] == 0
    assert found[True] > 60
    assert 0.3 < wrong[True] / found[True] < 0.7
