"""What is done to pairs: against counts by hand and a search through all pairs; the same in any order, and nested."""

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from whole_runs import frozen, own

from dpo import score
from dpo.data import treatment
from dpo.data.records import Measures, Preference, TokenIds, read, write
from dpo.data.treatment import Treatment, draw, treat
from dpo.sweep.inputs import load

KINDS = ("answers", "threshold", "length")


def pair(number: int, kind: str = "answers", correct=(2.0, 1.0), words=(8, 8), gap=1.0) -> Preference:
    chosen, rejected = (" ".join([name, str(number), *["word"] * (n - 2)]) for name, n in zip("cr", words, strict=True))
    ids = TokenIds("t", [1], [number, 2], [number, 3])
    return Preference(
        f"prompt {number // 2}", chosen, rejected, True, False, None, ids, Measures(gap, kind, correct, words)
    )


def some(n: int, seed: int = 0) -> list[Preference]:
    """Pairs as a judge might leave them, of all kinds."""
    rng, made = random.Random(seed), []
    for number in range(n):
        kind, words = rng.choice(KINDS), (rng.randrange(2, 20), rng.randrange(2, 20))
        worse = float(rng.randrange(3))
        made.append(pair(number, kind, (worse + rng.randrange(1, 4), worse), words, gap=rng.choice([0.5, 1.0, 2.5])))
    return made


def text(one: Preference) -> tuple:
    return one.prompt, one.chosen, one.rejected


def cell(one: Preference) -> tuple:
    return one.measures.kind, one.measures.words[0] // 4, one.measures.words[1] // 4


TREATMENTS = st.builds(
    Treatment,
    st.sampled_from([None, "low", "high", 0.3]),
    st.sampled_from([0, 0.5, 2.0]),
    st.sampled_from([0, 0.2, 1]),
    st.sampled_from([0, 0.3]),
    st.sampled_from(["another", "shuffled"]),
)


def test_nothing_is_done_by_default():
    pairs = some(50)
    assert treat(pairs, Treatment(), 0) == pairs
    assert [one.measures for one in treat(pairs, Treatment(), 0)] == [one.measures for one in pairs]


def test_pairs_of_data_are_treated_with_the_seed_of_the_run(tmp_path, tiny_model):
    config = frozen(tmp_path / "run", *own(tmp_path, tiny_model("llama")), "pairs.flip=0.5", "seed=3")
    dataset = load(config)
    _, pairs = score.encode(config, dataset)
    found = {split: [pair.text.chosen for pair in some] for split, some in pairs.items()}
    whole = {split: [pair.chosen for pair in some] for split, some in dataset.preferences.items()}
    assert found["train"] == [pair.chosen for pair in treat(dataset.preferences["train"], Treatment(flip=0.5), seed=3)]
    assert found["train"] != whole["train"]
    assert found["validation"] == whole["validation"]


@given(TREATMENTS, st.integers(0, 3), st.randoms())
def test_the_order_of_the_pairs_is_no_part_of_it(what, seed, rng):
    pairs = some(60)
    found = treat(pairs, what, seed)
    mixed = rng.sample(pairs, len(pairs))
    again = treat(mixed, what, seed)
    known = {(*text(one), one.chosen_ended, one.measures) for one in found}
    assert {(*text(one), one.chosen_ended, one.measures) for one in again} == known
    place = {one.prompt + str(sorted((one.chosen, one.rejected))): row for row, one in enumerate(mixed)}
    if not what.outliers:  # they are in the order that they came in
        rows = [place[one.prompt + str(sorted((one.chosen, one.rejected)))] for one in again]
        assert rows == sorted(rows)


def test_low_and_high_are_as_many_and_as_long():
    """Against a count of each cell by hand; of both, right answers decide."""
    pairs = some(800)
    low, high = (treat(pairs, Treatment(gap), 0) for gap in ("low", "high"))
    steps = {id(one): one.measures.correct[0] - one.measures.correct[1] for one in pairs}
    assert {steps[id(one)] for one in low} == {1}
    assert {steps[id(one)] for one in high} == {2, 3}
    assert Counter(map(cell, low)) == Counter(map(cell, high))
    decided = [one for one in pairs if one.measures.kind != "length"]
    by_hand = [Counter(cell(one) for one in decided if (steps[id(one)] >= 2) == many) for many in (False, True)]
    assert Counter(map(cell, low)) == by_hand[0] & by_hand[1]
    assert len(low) > 50
    assert len({id(one) for one in low}) == len(low)
    assert not {id(one) for one in low} & {id(one) for one in high}


def test_a_mixture_has_its_share_and_is_as_long():
    pairs = some(800)
    high = {text(one) for one in treat(pairs, Treatment("high"), 0)}
    cells, before = Counter(map(cell, treat(pairs, Treatment("low"), 0))), set()
    for share in (0, 0.1, 0.4, 0.75, 1):
        found = treat(pairs, Treatment(share), 0)
        mine = {text(one) for one in found if text(one) in high}
        assert len(found) == len(high)
        assert len(mine) == round(share * len(high))
        assert Counter(map(cell, found)) == cells
        assert before <= mine
        before = mine
    assert [*map(text, treat(pairs, Treatment(0), 0))] == [*map(text, treat(pairs, Treatment("low"), 0))]
    assert before == high
    assert {text(one) for one in treat(pairs, Treatment("high"), 1)} != high


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_a_share_of_labels_is_turned(share):
    pairs = some(4000)
    found = treat(pairs, Treatment(flip=share), 0)
    turned = [one.measures.flipped for one in found]
    assert sum(turned) == pytest.approx(share * 4000, abs=4 * math.sqrt(share * (1 - share) * 4000))
    for one, was, flipped in zip(found, pairs, turned, strict=True):
        assert (one.prompt, {one.chosen, one.rejected}) == (was.prompt, {was.chosen, was.rejected})
        assert (one.chosen == was.rejected) is flipped
        assert (one.measures == was.measures) is not flipped
    more = [one.measures.flipped for one in treat(pairs, Treatment(flip=0.5), 0)]
    assert all(later for later, now in zip(more, turned, strict=True) if now)
    other = [one.measures.flipped for one in treat(pairs, Treatment(flip=share), 1)]
    both = sum(one and two for one, two in zip(turned, other, strict=True))
    assert both == pytest.approx(share**2 * 4000, abs=4 * share * math.sqrt(4000))  # another seed draws anew


def test_all_of_a_pair_is_turned():
    was = Preference(
        "p", "a b", "c", True, False, "here", TokenIds("t", [1], [2], [3]), Measures(2.5, "answers", (3, 1), (2, 1))
    )
    assert treatment.flipped(was) == Preference("p", "c", "a b", False, True, "here", TokenIds("t", [1], [3], [2]))
    assert treatment.flipped(was).measures == Measures(-2.5, "answers", (1, 3), (1, 2), flipped=True)
    assert treatment.flipped(treatment.flipped(was)).measures == was.measures
    plain = Preference("p", [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}])
    assert treatment.flipped(plain).measures == Measures(flipped=True)  # of pairs from elsewhere nothing else is known
    assert draw(plain, "flip", 0) == draw(treatment.flipped(plain), "flip", 0)


def test_labels_are_drawn_by_bradley_and_terry():
    for temperature in (0.5, 2.0):
        for gap in (0.5, 1.0, 3.0):
            pairs = [pair(number, gap=gap) for number in range(3000)]
            found = treat(pairs, Treatment(label_temperature=temperature), 0)
            better = 1 / (1 + math.exp(-gap / temperature))
            kept = sum(not one.measures.flipped for one in found)
            assert kept == pytest.approx(3000 * better, abs=4 * math.sqrt(3000 * better * (1 - better)))
    cold = treat(some(500), Treatment(label_temperature=1e-9), 0)
    assert not any(one.measures.flipped for one in cold)


def test_a_label_that_is_turned_twice_is_right():
    pairs = [pair(number) for number in range(2000)]
    drawn, noisy, both = (
        [one.measures.flipped for one in treat(pairs, what, 0)]
        for what in (Treatment(label_temperature=2), Treatment(flip=0.3), Treatment(label_temperature=2, flip=0.3))
    )
    assert [one != two for one, two in zip(drawn, noisy, strict=True)] == both
    assert any(one and two for one, two in zip(drawn, noisy, strict=True))


@pytest.mark.parametrize("kind", ["another", "shuffled"])
def test_outliers_are_nonsense_and_flagged(kind):
    pairs = some(3000)
    found = treat(pairs, Treatment(flip=0.5, outliers=0.2, outlier=kind), 0)
    outliers = [(one, was) for one, was in zip(found, pairs, strict=True) if one.measures.kind == "outlier"]
    assert len(outliers) == pytest.approx(600, abs=4 * math.sqrt(3000 * 0.2 * 0.8))
    chosen_of = {one.chosen: one.prompt for one in pairs}
    for one, was in outliers:
        assert (one.prompt, one.chosen, one.chosen_ended) == (was.prompt, was.chosen, was.chosen_ended)
        assert one.token_ids is None
        assert one.measures == Measures(kind="outlier", words=(len(one.chosen.split()), len(one.rejected.split())))
        if kind == "another":
            assert chosen_of[one.rejected] != one.prompt
            assert one.rejected_ended is True
        else:
            assert sorted(one.rejected.split()) == sorted(was.rejected.split())
            assert one.rejected_ended is False
    if kind == "shuffled":
        assert sum(one.rejected != was.rejected for one, was in outliers) > 400
    else:
        assert len({one.rejected for one, _ in outliers}) > 400  # not all the same
    rest = [one.measures.flipped for one in found if one.measures.kind != "outlier"]
    assert sum(rest) == pytest.approx(len(rest) / 2, abs=4 * math.sqrt(len(rest)) / 2)
    fewer = {
        text(one) for one in treat(pairs, Treatment(outliers=0.1, outlier=kind), 0) if one.measures.kind == "outlier"
    }
    assert len(fewer) > 200
    assert fewer <= {text(one) for one, _ in outliers}


def test_outliers_of_chats():
    chats = [
        Preference(
            [{"role": "user", "content": f"{n}?"}],
            [{"role": "assistant", "content": f"yes {n}"}],
            [{"role": "assistant", "content": f"no no {n} a b c"}],
        )
        for n in range(2)
    ]
    swapped = treat(chats, Treatment(outliers=1), 0)
    assert [one.rejected for one in swapped] == [chats[1].chosen, chats[0].chosen]
    for one, was in zip(treat(chats, Treatment(outliers=1, outlier="shuffled"), 0), chats, strict=True):
        [message] = one.rejected
        assert message["role"] == "assistant"
        assert sorted(message["content"].split()) == sorted(was.rejected[0]["content"].split())
    with pytest.raises(ValueError, match="takes pairs of two prompts at least, found one"):
        treat(chats[:1], Treatment(outliers=1), 0)


def test_what_the_pairs_lack_is_said():
    bare = [replace(one, measures=Measures()) for one in some(9)]
    with pytest.raises(ValueError, match=r"pairs\.gap takes pairs whose judge counts right answers"):
        treat(bare, Treatment("low"), 0)
    with pytest.raises(ValueError, match=r"pairs\.label_temperature takes pairs with the gap"):
        treat(bare, Treatment(label_temperature=1), 0)
    assert sum(one.measures.flipped for one in treat(bare, Treatment(flip=1), 0)) == 9  # which any pair takes
    with pytest.raises(ValueError, match=r"found none among 9; sample more \(generation\.samples_per_prompt\)"):
        treat([pair(number) for number in range(9)], Treatment("low"), 0)


def test_measures_are_kept_in_the_file(tmp_path):
    found = treat(some(40), Treatment(flip=0.5, outliers=0.3), 0)
    write(tmp_path / "pairs.jsonl", found)
    assert [one.measures for one in read(tmp_path / "pairs.jsonl")] == [one.measures for one in found]
    (tmp_path / "theirs.jsonl").write_text(
        '{"prompt": "p", "chosen": "a", "rejected": "b", "gap": "wide", "kind": 3}\n'
    )
    assert read(tmp_path / "theirs.jsonl") == [Preference("p", "a", "b")]
    assert read(tmp_path / "theirs.jsonl")[0].measures == Measures()


def test_what_was_done_is_said():
    said = treatment.summary(treat([pair(0), pair(3, "length")], Treatment(flip=1), 0))
    assert said == "2 pairs (1 answers, 1 length), 2 flipped"
