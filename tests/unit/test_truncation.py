"""What is left of texts that are too long, by hand; the rule itself, on texts at random, is in test_tokens.py."""

from dataclasses import replace

import pytest
from conftest import tiny_tokenizer

from dpo.data.batches import tokenize
from dpo.data.records import Preference
from dpo.data.tokens import encode_alone
from dpo.data.truncation import cut_prompts

FITS = Preference("a", "b", "c")


def asks(words, role="user"):
    return {"role": role, "content": words}


def lengths(prompts, tokenizer):
    return [len(prompt.ids) for prompt in encode_alone(prompts, tokenizer)]


def test_what_is_said_of_pairs_that_are_too_long(capsys):
    tokenizer = tiny_tokenizer("gpt2")
    some = [FITS, *(Preference("a", " Rome" * n, " Cats" * n) for n in (30, 50, 40))]
    longest = 1 + len(tokenizer(" Rome" * 50)["input_ids"]) + 1
    with pytest.raises(ValueError, match=f"3 of 4 pairs have more than 9 tokens, up to {longest}:\n"):
        tokenize(some, tokenizer, 9, "error")
    with pytest.raises(ValueError, match=r"so none is left\. Raise max_length, or set on_too_long=truncate\.$"):
        tokenize(some[1:], tokenizer, 9, "drop")
    capsys.readouterr()
    tokenize([*some, Preference("a", "b", " Rome" * 50)], tokenizer, 9, "truncate")
    assert "prompts cut from the left, 7 responses from the right" in capsys.readouterr().out


def test_a_response_of_which_nothing_is_left_has_no_room(capsys):
    """Two tokens are less than the character's three; the other response, which fits, does not save the pair."""
    tokenizer = tiny_tokenizer("gpt2")
    snow = Preference("a", "☃☃", "b")
    for lost in (snow, replace(snow, chosen="b", rejected="☃☃")):
        pairs = tokenize([FITS, Preference("a", " Rome Rome Rome", "b"), lost], tokenizer, 3, "truncate")
        assert [pair.text and pair.text.rejected for pair in pairs] == ["c", "b"]
        assert all(pair.chosen_ids and pair.rejected_ids for pair in pairs)
        assert "1 of 3 pairs have no room, cut or not: dropped:\n  row 2, counted from 0" in capsys.readouterr().out


def test_a_response_that_says_nothing_is_not_one_that_was_cut_to_nothing():
    tokenizer = tiny_tokenizer("gpt2")
    [pair] = tokenize([Preference("a", " Rome" * 30, "")], tokenizer, 10, "truncate")
    assert pair.rejected_ids == [tokenizer.eos_token_id]
    assert pair.cut == ("chosen",)


def test_each_prompt_has_a_room_of_its_own():
    tokenizer = tiny_tokenizer("gpt2")
    prompts = [" Rome" * 9, " Rome" * 7, " Rome" * 5]
    assert lengths(prompts, tokenizer) == [9, 7, 5]
    for room in ((8, 2, 6), (3, 7, 4), (9, 8, 1)):
        cut = cut_prompts(prompts, tokenizer, room)
        assert cut == [" Rome" * min(some, whole) for some, whole in zip(room, (9, 7, 5), strict=True)]


def test_a_chat_loses_of_its_last_turn_what_earlier_turns_do_not_make_up():
    """And of that turn the beginning of the question: what was said after it, as by a tool, stays."""
    tokenizer = tiny_tokenizer("qwen2")
    first = [asks("Tell me about cats and dogs."), asks("Cats sleep, dogs run.", "assistant")]
    question, told = asks("What is the capital of Italy?"), asks("Rome", "tool")
    ids = tokenizer(question["content"])["input_ids"]
    gone = sum(len(tokenizer(message["content"])["input_ids"]) for message in first)
    [whole] = lengths([[*first, question, told]], tokenizer)
    for more in range(1, 4):
        [cut] = cut_prompts([[*first, question, told]], tokenizer, [whole - gone - more])
        assert cut == [asks(tokenizer.decode(ids[more:])), told]


def test_a_chat_that_begins_with_an_answer_loses_that_at_first():
    tokenizer = tiny_tokenizer("qwen2")
    prompt = [asks("Be kind.", "system"), asks("hello there", "assistant"), asks("how are you today?")]
    [whole] = lengths([prompt], tokenizer)
    assert cut_prompts([prompt], tokenizer, [whole - 1]) == [[prompt[0], prompt[2]]]
    [alone] = lengths([[prompt[1]]], tokenizer)
    [[cut]] = cut_prompts([[prompt[1]]], tokenizer, [alone - 1])
    assert cut["role"] == "assistant"
    assert prompt[1]["content"].endswith(cut["content"])


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_typed_special_tokens_are_cut_by_characters_of_the_text(kind):
    """Each of which is a token here: as many characters go as tokens, wherever the breaks are."""
    tokenizer = tiny_tokenizer(kind)
    typed = tokenizer.eos_token * 3
    [whole] = lengths([typed], tokenizer)
    for less in range(1, whole):
        [cut] = cut_prompts([typed], tokenizer, [whole - less])
        assert lengths([cut], tokenizer) == [whole - less]
        assert typed.endswith(cut)
