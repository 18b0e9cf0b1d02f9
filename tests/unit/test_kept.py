"""Tokens from the cache are those of plain tokenizing, and made again where anything that decides them changed."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import CHAT_TEMPLATE, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from ranks import FORKS
from tokenizers.normalizers import Lowercase

from dpo import cache
from dpo.cache import digest, digest_large
from dpo.data import kept
from dpo.data.batches import TOO_LONG, content_of, filter_identical, tokenize
from dpo.data.kept import kept_tokens
from dpo.data.lazy import Lazy, digests_of, joined
from dpo.data.records import Measures, Preference, TokenIds, texts
from dpo.data.tokens import vocabulary
from dpo.references import Initial

PROMPT = "\n\nHuman: What is the capital of Italy?\n\nAssistant:"
TEXTS = [
    Preference(PROMPT, " The capital of Italy is Rome.", " Cats ☃", source="a, line 1", measures=Measures(gap=1.5)),
    Preference("Tell me:", " dogs run\n", " \n ", chosen_ended=False),
    Preference(PROMPT * 9, " Rome", " Cats" * 40),  # too long
    Preference(PROMPT, " Rome" * 30 + " Cats", " Rome" * 30 + " dogs"),  # the same when it is cut
    Preference(PROMPT, " no", " no"),  # the same
    Preference("And?", " yes", " no", label=True),
]
CHATS = [
    Preference([{"role": "user", "content": one.prompt}], *([{"role": "assistant", "content": said}] for said in sides))
    for one in TEXTS[:3]
    for sides in [(one.chosen, one.rejected)]
]


def sampled(tokenizer):
    """As a policy sampled it: one end token is not what the text would become."""
    prompt, eos = tokenizer("Is it?")["input_ids"], tokenizer.eos_token_id
    yes, no = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" yes", " no"))
    ids = TokenIds(vocabulary(tokenizer), prompt, [*yes, eos], [*no, eos])
    return [Preference("Is it?", " yes", " no", token_ids=ids), Preference("Is it?", " yes" * 50, " no", token_ids=ids)]


def everything(pairs):
    """Fields that equality passes over, too."""
    return [(pair, pair.text, pair.cut, pair.unwritten, pair.text.source, pair.text.measures) for pair in pairs]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("what", ["texts", "chats", "sampled"])
@pytest.mark.parametrize("rules", [(300, "error", "keep"), (60, "truncate", "drop"), (60, "drop", "drop")])
@pytest.mark.parametrize("at_once", [100, 3])
def test_kept_tokens_are_those_of_plain_tokenizing(tmp_path, monkeypatch, capsys, kind, what, rules, at_once):
    """The first time and the second; so are the texts, and what is said of them."""
    tokenizer = tiny_tokenizer(kind)
    if what == "chats":
        tokenizer.chat_template = CHAT_TEMPLATE
    some = {"texts": TEXTS, "chats": CHATS, "sampled": sampled(tokenizer)[:1] * 3}[what]
    monkeypatch.setattr(kept, "AT_ONCE", at_once)
    expected = []
    for first in range(0, len(some), at_once):
        plain = tokenize(some[first : first + at_once], tokenizer, *rules[:2], "train pairs", TOO_LONG, rules[2])
        expected += filter_identical(plain, rules[2], "train pairs")
    said = capsys.readouterr().out
    assert ("have more than" in said) == (what != "sampled" and rules[0] == 60)
    for _ in range(2):
        found = kept_tokens(some, tokenizer, *rules, "train pairs", True, str(tmp_path))
        assert everything(found) == everything(expected)
        assert {type(id) for pair in found for id in (*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids)} == {int}
        assert [line for line in capsys.readouterr().out.splitlines() if "not in the cache" not in line] == (
            said.splitlines()
        )


def test_a_cut_response_is_not_as_it_was_sampled(tmp_path):
    tokenizer = tiny_tokenizer("gpt2")
    some = [sampled(tokenizer)[0], replace(TEXTS[2], token_ids=sampled(tokenizer)[0].token_ids)]
    for _ in range(2):
        whole, cut = kept_tokens(some, tokenizer, 60, "truncate", "error", "train pairs", True, str(tmp_path))
        assert whole.text.token_ids == some[0].token_ids
        assert cut.text.token_ids is None
        assert cut.cut
    assert everything([whole, cut]) == everything(tokenize(some, tokenizer, 60, "truncate"))


def test_faulty_pairs_are_refused_each_time(tmp_path):
    tokenizer = tiny_tokenizer("gpt2")
    for _ in range(2):
        with pytest.raises(ValueError, match="have the same tokens"):
            kept_tokens(TEXTS, tokenizer, 300, "error", "error", "train pairs", True, str(tmp_path))


def test_what_tells_sequences_is_kept_with_them(tmp_path):
    """It is what they would be told by, in the order that a reference asks for them."""
    tokenizer = tiny_tokenizer("gpt2")
    for _ in range(2):
        found = kept_tokens(TEXTS, tokenizer, 60, "truncate", "drop", "train pairs", True, str(tmp_path))
        assert [*digests_of(found)] == [(content_of(pair.chosen), content_of(pair.rejected)) for pair in found]
        asked = Initial().sequences(found, "train", tokenizer, None, None)
        assert [*digests_of(joined([asked, asked]))] == 2 * [content_of(one) for one in asked]
    assert digests_of(joined([asked, Lazy(1, asked.__getitem__)])) is None  # of some they are not known


def test_known_texts_are_taken_for_the_key(tmp_path):
    rules = tiny_tokenizer("gpt2"), 300, "error", "error", "train pairs", True, str(tmp_path)
    kept_tokens(TEXTS[:2], *rules)
    kept_tokens(TEXTS[:2], *rules, texts(TEXTS[:2]))
    assert entries(tmp_path) == 1
    kept_tokens(TEXTS[:2], *rules, "others")
    assert entries(tmp_path) == 2


def entries(folder):
    return len(list(Path(folder, "tokens").glob("*/key.json")))


def test_what_decides_tokens_makes_them_anew_and_nothing_else(tmp_path, monkeypatch):
    def ask(some=TEXTS[:2], change=lambda tokenizer: None, rules=(300, "error", "error"), apart=True):
        tokenizer = tiny_tokenizer("gpt2")
        change(tokenizer)
        before = entries(tmp_path)
        kept_tokens(some, tokenizer, *rules, "train pairs", apart, str(tmp_path))
        return entries(tmp_path) - before

    def state(tokenizer):
        """Of another call, and of another folder."""
        tokenizer.backend_tokenizer.enable_padding()
        tokenizer.backend_tokenizer.enable_truncation(7)
        tokenizer.name_or_path = "elsewhere"

    one, other = TEXTS[:2]
    assert ask() == 1
    assert not ask()
    assert not ask(change=state)
    assert not ask([replace(one, source="b, line 9"), replace(other, measures=Measures(gap=2.0))])
    texts = [
        *(replace(one, **{name: f"{getattr(one, name)}!"}) for name in ("prompt", "chosen", "rejected")),
        *(replace(one, **{name: False}) for name in ("chosen_ended", "rejected_ended")),
        replace(one, label=True),
        replace(one, token_ids=TokenIds("another", [1], [2], [3])),
    ]
    for changed in texts:
        assert ask([changed, other]) == 1, changed
    assert ask([other, one]) == 1
    assert ask([one]) == 1
    assert ask(rules=(299, "error", "error")) == 1
    assert ask(rules=(300, "drop", "error")) == 1
    assert ask(rules=(300, "error", "drop")) == 1
    assert ask(apart=False) == 1
    assert ask(change=lambda tokenizer: setattr(tokenizer, "chat_template", CHAT_TEMPLATE)) == 1
    assert ask(change=lambda tokenizer: setattr(tokenizer.backend_tokenizer, "normalizer", Lowercase())) == 1
    assert ask(change=lambda tokenizer: tokenizer.add_tokens(["Italy"])) == 1
    assert ask(change=lambda tokenizer: tokenizer.add_special_tokens({"sep_token": "Rome"})) == 1
    assert ask(change=lambda tokenizer: setattr(tokenizer, "eos_token", tokenizer.convert_ids_to_tokens(5))) == 1
    monkeypatch.setattr(kept, "version", lambda name: "another")
    assert ask() == 1
    monkeypatch.setattr(kept, "TOKENS_VERSION", 0)
    assert ask() == 1
    monkeypatch.setattr(kept.inspect, "getsource", lambda module: "another")
    assert ask() == 1
    assert not ask()


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damaged_tokens_are_refused_and_made_again_when_deleted(tmp_path, monkeypatch, damage):
    """Also where the file is large: nothing else tells what is in it."""
    monkeypatch.setattr(cache, "LARGE", 0)
    asked = TEXTS[:2], tiny_tokenizer("gpt2"), 300, "error", "error", "train pairs", True, str(tmp_path)
    found = [*kept_tokens(*asked)]
    [file] = tmp_path.glob("tokens/*/ids.npy")
    content = file.read_bytes()
    file.unlink()  # what `found` maps stays as it is
    if damage != "gone":
        file.write_bytes(content[:-4] if damage == "cut" else content[:-4] + b"\0\0\0\1")
    with pytest.raises(RuntimeError, match=r"ids\.npy (changed|is missing); delete that folder"):
        kept_tokens(*asked)
    for one in file.parent.iterdir():
        one.unlink()
    file.parent.rmdir()
    assert [*kept_tokens(*asked)] == found


def _ask(folder: str, rank: str) -> list[list[int]]:
    os.environ |= {"RANK": rank, "WORLD_SIZE": "2"}
    plain = kept.numbered

    def counted(*arguments):
        (Path(folder) / f"tokenized by {os.getpid()}").touch()
        return plain(*arguments)

    kept.numbered = counted
    pairs = kept_tokens(TEXTS[:2], tiny_tokenizer("gpt2"), 300, "error", "error", "train pairs", True, folder)
    return [pair.chosen_ids for pair in pairs]


def test_of_processes_and_ranks_that_ask_at_once_one_tokenizes(tmp_path):
    """Whichever comes first: no rank waits for another, which may be on its way."""
    with FORKS.Pool(3) as pool:
        found = pool.starmap(_ask, [(str(tmp_path), rank) for rank in ("1", "2", "1")])
    plain = [pair.chosen_ids for pair in tokenize(TEXTS[:2], tiny_tokenizer("gpt2"), 300, "error")]
    assert found == [plain] * 3
    assert len(list(tmp_path.glob("tokenized by *"))) == entries(tmp_path) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=30,
)


@given(JSON)
def test_the_digest_in_pieces_is_the_digest(value):
    at_once, cache.AT_ONCE = cache.AT_ONCE, 2
    try:
        assert digest_large(value) == digest(value)
        if isinstance(value, list):
            assert digest_large(Lazy(len(value), value.__getitem__)) == digest(value)
    finally:
        cache.AT_ONCE = at_once


def test_items_are_made_when_they_are_asked_for():
    made = []
    squares = Lazy(4, lambda number: made.append(number) or number**2)
    assert len(squares) == 4
    assert not made
    assert (squares[1], squares[-1], squares[1:3], made) == (1, 9, [1, 4], [1, 3, 1, 2])
    assert [*squares] == [0, 1, 4, 9]
    with pytest.raises(IndexError):
        squares[4]
    assert [*joined([[], squares, [], [7]])] == [0, 1, 4, 9, 7]
    assert joined([squares, [7]])[-1] == 7


def test_a_part_of_which_nothing_is_left_does_not_stop_the_others(tmp_path, monkeypatch):
    """Where the rows are divided decides nothing; of no rows at all it is refused."""
    monkeypatch.setattr(kept, "AT_ONCE", 1)
    same, long, sound = TEXTS[4], TEXTS[2], TEXTS[0]
    for number, some in enumerate(([same, sound], [sound, long], [long, sound, same])):
        rules = tiny_tokenizer("gpt2"), 60, "drop", "drop", "train pairs", True, str(tmp_path / str(number))
        assert [pair.text for pair in kept_tokens(some, *rules)] == [sound]
        with pytest.raises(ValueError, match=r"none is left|one of the train pairs must be sound"):
            kept_tokens([one for one in some if one is not sound], *rules)
