"""The embedded world: articles of facts, noisy summaries, an exact judge and a tokenizer; no download.

An article states six facts about its subject, and a few about someone else. A good summary answers five questions
about the subject, salient facts first, in few words. Everything is text; the judge recovers facts and questions from
the article.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from typing import TYPE_CHECKING, Literal

from dpo.data.records import Dataset, Demonstration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VALUES = {
    "home": "york rome oslo lima cairo delhi",
    "job": "baker pilot nurse farmer judge tailor",
    "food": "bread rice soup cheese apples fish",
    "pet": "cat dog horse parrot rabbit turtle",
    "colour": "red blue green black white yellow",
    "drink": "tea coffee milk juice water cider",
    "sport": "tennis chess golf rowing boxing skiing",
    "music": "jazz opera blues folk rock choir",
}
ATTRIBUTES = {attribute: values.split() for attribute, values in VALUES.items()}
SALIENT = ("home", "job", "food", "pet")  # asked about four times as often as the others
NAMES = ["anna", "ben", "clara", "david", "emma", "felix", "grace", "henry"]
MAX_WORDS = 48  # the length at which a summary of enough right answers is worth no more than its answers
HUMAN_WORDS = 42  # human summaries are shorter than this, so that an imitation rarely meets the sampling limit

FACTS_PER_ARTICLE = 6
DISTRACTORS = 2  # at most, of the facts of an article: told of somebody else, with other values
QUESTIONS = 5
ENOUGH = 3  # right answers after which only brevity counts
_STATEMENTS = (
    "{name} : {attribute} {value} .",
    "{name} has {attribute} {value} .",
    "{attribute} of {name} is {value} .",
    "the {attribute} for {name} is {value} .",
)
_FILLERS = ("that is what we know today .", "more will follow .", "some say it is always so .")
_LEADS = ("this is about {name} .", "here is what it says about {name} .")
_STYLES = {
    "verbose": (
        "it says that the {attribute} is {value} .",
        "we also learn that the {attribute} is {value} .",
    ),
    "medium": ("the {attribute} is {value} .", "the {attribute} of {name} is {value} ."),
    "terse": ("{attribute} {value} .",),
}
_ALIEN = {"alien": ("{attribute} {value} here .", "{attribute} {value} always .")}  # words in the order of facts
_TAILS = ("and so on .", "there is more to say .", "that is all for now .", "as always there is more .")
Writer = Literal["human", "clean", "alien", "alien_clean"]  # of summaries


@dataclass(frozen=True)
class Verdict:
    """What the gold judge sees in one summary."""

    correct: int  # of the 5 questions
    wrong: int  # false statements about the subject
    words: int
    valid: float  # share of clauses that follow one of the world's grammars; the gibberish meter


@dataclass(frozen=True)
class _Article:
    text: str
    name: str
    facts: dict[str, str]  # attribute -> value, in the order of the article
    distractors: dict[str, str]  # what is said about somebody else


def world(summaries: Writer, demonstrations: int, train: int, validation: int, test: int, seed: int) -> Dataset:
    """Articles to summarize, and summaries to start from; pairs are sampled from the policy.

    summaries: who wrote the demonstrations, and a summary of each other article. human: noisy and wordy; clean: the
        four facts most asked for, all right, in the same language; alien and alien_clean: the same two in a grammar
        that neither of them has.
    demonstrations, train, validation, test: numbers of articles; no article is in two of them. Test articles are the
        same for every seed.
    """
    seen: set[str] = set()
    write = _WRITERS[summaries]

    def articles(split: str, n: int) -> list[_Article]:
        rng = random.Random(split)
        drawn: list[_Article] = []
        while len(drawn) < n:
            article = _draw_article(rng)
            if article.text not in seen:
                seen.add(article.text)
                drawn.append(article)
        return drawn

    found = {"test": articles("test", test)}
    for split, n in (("train", train), ("validation", validation)):
        found[split] = articles(f"{split} {seed}", n)
    rng = random.Random(f"summaries {seed}")
    demonstrations_of = articles(f"demonstrations {seed}", demonstrations)
    return Dataset(
        demonstrations=[Demonstration(article.text, write(article, rng)) for article in demonstrations_of],
        preferences={},
        prompts={split: [article.text for article in some] for split, some in found.items()},
        written={
            split: [write(article, random.Random(f"written {article.text}")) for article in some]
            for split, some in found.items()
        },
    )


def lesson(rng: random.Random, facts: int, distractors: int = DISTRACTORS) -> Demonstration:
    """What a base model is trained on: an article, and `facts` of its facts told rightly, each once.

    Half of the lessons with all facts are prose in the manner of summaries, the other half and shorter ones bare lists.
    """
    article = _draw_article(rng, distractors)
    chosen = rng.sample(list(article.facts), facts)
    if rng.random() < 0.5:
        chosen = [attribute for attribute in article.facts if attribute in chosen]
    if facts < FACTS_PER_ARTICLE or rng.random() < 0.5:
        sentences = [
            _state(_STYLES["terse"], article, attribute, article.facts[attribute], rng) for attribute in chosen
        ]
        return Demonstration(article.text, " ".join(sentences))
    chosen = chosen[: rng.randint(2, FACTS_PER_ARTICLE)]
    styles = rng.choices(list(_STYLES), k=len(chosen))
    sentences = [
        _state(_STYLES[style], article, attribute, article.facts[attribute], rng)
        for style, attribute in zip(styles, chosen, strict=True)
    ]
    return Demonstration(article.text, _framed(article, sentences, rng))


def verdict(prompt: str, response: str) -> Verdict:
    """Judge one summary of one article.

    A clause states a fact when it holds exactly one attribute and one value of that attribute and names nobody else. An
    attribute stated with two values counts as wrong, so does an unanswered question; bare values count for nothing.
    """
    name, facts = _read_article(prompt)
    stated: dict[str, set[str]] = {}
    for _, attribute, value in _statements(response.replace(".", " . ").split(), name):
        stated.setdefault(attribute, set()).add(value)
    correct = sum(stated.get(attribute) == {facts[attribute]} for attribute in _questions(prompt, tuple(facts)))
    wrong = sum(value != facts.get(attribute) for attribute, values in stated.items() for value in values)
    clauses = [clause.split() for clause in response.split(".") if clause.strip()]
    valid = sum(" ".join(clause) in _VALID for clause in clauses)
    return Verdict(correct, wrong, len(response.split()), valid / len(clauses) if clauses else 0.0)


def values_named(prompt: str, response: str) -> int:
    """Of how many of the 5 questions the right value is somewhere in the response, in whatever sentence."""
    _, facts = _read_article(prompt)
    words = set(response.split())
    return sum(facts[attribute] in words for attribute in _questions(prompt, tuple(facts)))


def values_told(prompt: str, words: list[str]) -> list[str | None]:
    """For each word of a response: "right" or "wrong" if it is the value that a clause states, else None."""
    name, facts = _read_article(prompt)
    labels: list[str | None] = [None] * len(words)
    for index, attribute, value in _statements(words, name):
        labels[index] = "right" if value == facts.get(attribute) else "wrong"
    return labels


def _statements(words: list[str], name: str) -> Iterator[tuple[int, str, str]]:
    """The facts that clauses state about `name`: where the value is, attribute, value."""
    first = 0
    for last in [index for index, word in enumerate([*words, "."]) if word == "."]:
        clause = words[first:last]
        attributes = [word for word in clause if word in ATTRIBUTES]
        if len(attributes) == 1 and not any(word in NAMES and word != name for word in clause):
            values = [index for index, word in enumerate(clause, first) if word in ATTRIBUTES[attributes[0]]]
            if len(values) == 1:
                yield values[0], attributes[0], words[values[0]]
        first = last + 1


def utility(verdict: Verdict) -> float:
    """Anyscale's preference rule as one number: more right answers win below 3 of 5, from there on fewer words do."""
    if verdict.correct < ENOUGH:
        return float(verdict.correct)
    return ENOUGH + 1 - verdict.words / MAX_WORDS


def tokenizer(phrases: bool = False) -> "PreTrainedTokenizerFast":
    """One token a word; an article is encoded as <bos> article <sep>, and a summary ends in <eos>.

    phrases: another tokenizer of the same text, with one token for `the home`, `of anna`, `is rome` and the like.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors  # not needed for articles or the judge
    from transformers import PreTrainedTokenizerFast

    words = sorted(
        {
            word
            for text in (*_STATEMENTS, *_FILLERS, *_LEADS, *_TAILS, *sum(_STYLES.values(), ()))
            for word in text.split()
        }.union(NAMES, ATTRIBUTES, *ATTRIBUTES.values()).difference(("{name}", "{attribute}", "{value}"))
    )
    joined = {"the": [*ATTRIBUTES], "of": NAMES, "is": [*chain.from_iterable(ATTRIBUTES.values())]}
    pairs = [f"{first} {second}" for first, seconds in joined.items() for second in seconds] if phrases else []
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<bos>", "<sep>", "<eos>", *words, *pairs])}
    words_only = Tokenizer(models.WordLevel(vocabulary))  # no unknown token: a foreign word is an error
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if phrases:
        phrase = Regex(r"|".join([*(rf"\b{pair}\b" for pair in pairs), r"\S+"]))
        words_only.pre_tokenizer = pre_tokenizers.Split(phrase, behavior="removed", invert=True)
    words_only.post_processor = processors.TemplateProcessing(
        single="<bos> $A <sep>", special_tokens=[(token, vocabulary[token]) for token in ("<bos>", "<sep>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words_only,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        sep_token="<sep>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _draw_article(rng: random.Random, most: int = DISTRACTORS) -> _Article:
    name, other = rng.sample(NAMES, 2)
    facts = {
        attribute: rng.choice(ATTRIBUTES[attribute]) for attribute in rng.sample(list(ATTRIBUTES), FACTS_PER_ARTICLE)
    }
    distractors = {
        attribute: rng.choice([value for value in ATTRIBUTES[attribute] if value != facts[attribute]])
        for attribute in rng.sample(list(facts), rng.randint(0, most))
    }
    statements = [(name, *fact) for fact in facts.items()] + [(other, *fact) for fact in distractors.items()]
    rng.shuffle(statements)
    sentences = [
        rng.choice(_STATEMENTS).format(name=who, attribute=attribute, value=value)
        for who, attribute, value in statements
    ]
    if rng.random() < 0.5:
        sentences.insert(rng.randint(0, len(sentences)), rng.choice(_FILLERS))
    in_order = {attribute: value for who, attribute, value in statements if who == name}
    return _Article(" ".join([f"about {name} .", *sentences]), name, in_order, distractors)


@lru_cache(maxsize=100_000)
def _read_article(text: str) -> tuple[str, dict[str, str]]:
    """The subject and its facts, from the words of the article alone."""
    sentences = [sentence.split() for sentence in text.split(" .") if sentence]
    about, name = sentences[0] if sentences and len(sentences[0]) == 2 else ("", "")
    facts = {}
    for sentence in sentences[1:]:
        attribute = next((word for word in sentence if word in ATTRIBUTES), None)
        if attribute is not None and name in sentence:
            facts[attribute] = next((word for word in sentence if word in ATTRIBUTES[attribute]), "")
    if about != "about" or name not in NAMES or len(facts) != FACTS_PER_ARTICLE or not all(facts.values()):
        raise ValueError(
            f"judge=gold and judge=hasty read articles of the embedded world (`about NAME . ...` with "
            f"{FACTS_PER_ARTICLE} facts about NAME), found {text[:60]!r}; other data needs another judge, for example "
            "judge=shorter or judge=none"
        )
    return name, facts


@lru_cache(maxsize=100_000)
def _questions(text: str, facts_of: tuple[str, ...]) -> frozenset[str]:
    """The attributes that are asked for: five without replacement, salient ones four times as likely each draw.

    Drawn by a hash of the article, so they never depend on who asks, or when.
    """
    rng = random.Random(hashlib.sha256(text.encode()).hexdigest())
    # Efraimidis-Spirakis: the largest u ** (1 / weight) are a weighted draw without replacement
    keys = {attribute: rng.random() ** (1 / (4 if attribute in SALIENT else 1)) for attribute in sorted(facts_of)}
    return frozenset(sorted(keys, key=lambda attribute: keys[attribute])[-QUESTIONS:])


def _noisy(article: _Article, rng: random.Random, styles: Mapping[str, tuple[str, ...]]) -> str:
    """What a hurried human writes: three to five facts, some wrong, wordy, with repetitions and ramblings."""
    sentences = []
    chosen = rng.sample(list(article.facts), rng.randint(3, 5))
    if rng.random() < 0.8:
        chosen = [attribute for attribute in article.facts if attribute in chosen]
    style = rng.choices(list(styles), weights=(0.3, 0.4, 0.3)[: len(styles)])[0]
    for attribute in chosen:
        kept = style if rng.random() < 0.7 else rng.choice(list(styles))
        value = article.facts[attribute]
        if rng.random() < 0.1:
            others = [other for other in ATTRIBUTES[attribute] if other != value]
            distracted = attribute in article.distractors and rng.random() < 0.5
            value = article.distractors[attribute] if distracted else rng.choice(others)
        sentence = _state(styles[kept], article, attribute, value, rng)
        sentences += [sentence] * (2 if rng.random() < 0.08 else 1)
    summary = _framed(article, sentences, rng)
    return summary if len(summary.split()) < HUMAN_WORDS else _noisy(article, rng, styles)


def _clean(article: _Article, rng: random.Random, styles: Mapping[str, tuple[str, ...]]) -> str:
    """What a careful human writes: four facts, salient ones first, and nothing else."""
    style = rng.choice(list(styles))
    best = sorted(article.facts, key=lambda attribute: attribute not in SALIENT)[:4]
    return " ".join(_state(styles[style], article, fact, article.facts[fact], rng) for fact in best)


def _framed(article: _Article, sentences: list[str], rng: random.Random) -> str:
    """A lead-in, now and then, and up to three empty sentences at the end."""
    lead = [rng.choice(_LEADS).format(name=article.name)] if rng.random() < 0.3 else []
    tails = [rng.choice(_TAILS) for _ in range(3) if rng.random() < 0.35]
    return " ".join([*lead, *sentences, *tails])


def _state(templates: tuple[str, ...], article: _Article, attribute: str, value: str, rng: random.Random) -> str:
    return rng.choice(templates).format(name=article.name, attribute=attribute, value=value)


def _valid_clauses() -> frozenset[str]:
    templates = [*_LEADS, *_TAILS, *sum(_STYLES.values(), ()), *_ALIEN["alien"]]
    return frozenset(
        template.format(name=name, attribute=attribute, value=value).removesuffix(" .")
        for template in templates
        for name in NAMES
        for attribute, values in ATTRIBUTES.items()
        for value in values
    )


_VALID = _valid_clauses()
_WRITERS = {
    "human": partial(_noisy, styles=_STYLES),
    "clean": partial(_clean, styles={style: _STYLES[style] for style in ("medium", "terse")}),
    "alien": partial(_noisy, styles=_ALIEN),
    "alien_clean": partial(_clean, styles=_ALIEN),
}
