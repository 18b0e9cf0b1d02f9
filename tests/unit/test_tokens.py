"""A response continues exactly the ids that a policy is fed, ends in one EOS, and is cut by one rule."""

from dataclasses import replace

import pytest
from conftest import SENTENCES, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from dpo.data import records
from dpo.data.batches import Pair, encode_prompts, filter_identical, tokenize, tokenize_demonstrations
from dpo.data.records import Demonstration, Preference, TokenIds, write
from dpo.data.tokens import vocabulary

KINDS = ["gpt2", "gpt_neox", "llama", "mistral", "qwen2"]
PROMPT = "\n\nHuman: What is the capital of Italy?\n\nAssistant:"
PAIRS = [Preference(PROMPT, " The capital of Italy is Rome.", " Cats ☃"), Preference("Tell me:", " dogs run\n", " \n ")]
CHAT = [{"role": "system", "content": "hello there"}, {"role": "user", "content": "how are you?"}]


def answer(words):
    return [{"role": "assistant", "content": words}]


def ended_prompts(template, *more):
    """A tokenizer that puts special tokens around every text."""
    tokenizer = tiny_tokenizer("llama")
    tokenizer.add_special_tokens({"sep_token": "<sep>"})
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>", "<sep>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    return tokenizer


def sentencepiece():
    """As in Llama 2 and Mistral: a space is put before the first word of every text."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", "</s>"]
    bpe.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_is_what_the_tokenizer_makes_of_it(kind):
    tokenizer = tiny_tokenizer(kind)
    pairs = tokenize(PAIRS, tokenizer, 200, "error")
    assert [pair.prompt_ids for pair in pairs] == [tokenizer(pair.prompt)["input_ids"] for pair in PAIRS]
    assert encode_prompts([pair.prompt for pair in PAIRS], tokenizer, 200) == [pair.prompt_ids for pair in pairs]
    if kind in ("llama", "mistral"):
        assert [pair.prompt_ids.count(tokenizer.bos_token_id) for pair in pairs] == [1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_responses_are_the_continuation_and_one_eos(kind, capsys):
    tokenizer = tiny_tokenizer(kind)
    for pair, ids in zip(PAIRS, tokenize(PAIRS, tokenizer, 200, "error"), strict=True):
        for text, (prompt_ids, response_ids) in ((pair.chosen, ids.chosen), (pair.rejected, ids.rejected)):
            assert prompt_ids + response_ids == [*tokenizer(pair.prompt + text)["input_ids"], tokenizer.eos_token_id]
            assert response_ids.count(tokenizer.eos_token_id) == 1
            assert tokenizer.decode(response_ids[:-1]) == text
    assert capsys.readouterr().out == ""


def test_merged_boundary_keeps_the_prompt_and_is_counted(capsys):
    tokenizer = tiny_tokenizer("gpt2")
    prompt, response = "The capi", "tal of Italy"
    [[pair]] = [tokenize([Preference(prompt, response, " of Italy")], tokenizer, 200, "error")]
    joint = tokenizer(prompt + response)["input_ids"]
    assert pair.prompt_ids == tokenizer(prompt)["input_ids"] != joint[: len(pair.prompt_ids)]  # it does merge
    assert pair.chosen_ids == [*tokenizer(response)["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(pair.prompt_ids + pair.chosen_ids[:-1]) == prompt + response
    assert "1 of 2 responses merge with the end of their prompt" in capsys.readouterr().out


def test_response_alone_gets_no_space_of_the_tokenizers_own(capsys):
    tokenizer = sentencepiece()
    prompt, responses = "The capi", ("tal of Italy", "tal of Italy is Rome.")
    assert tokenizer.decode(tokenizer("tal", add_special_tokens=False)["input_ids"]) == "tal"
    [pair] = tokenize([Preference(prompt, *responses)], tokenizer, 200, "error")
    assert "2 of 2 responses merge" in capsys.readouterr().out
    for text, (prompt_ids, response_ids) in zip(responses, (pair.chosen, pair.rejected), strict=True):
        assert tokenizer.decode(prompt_ids + response_ids, skip_special_tokens=True) == prompt + text


def test_token_over_the_boundary_that_looks_like_the_prompts():
    tokenizer = sentencepiece()  # neighbouring unknown characters become one unknown token
    unknown = tokenizer.unk_token_id
    [pair] = tokenize([Preference("The ☃", "☃ is Rome", "☃")], tokenizer, 200, "error")
    assert pair.prompt_ids[-1] == unknown == pair.chosen_ids[0]
    assert pair.rejected_ids == [unknown, tokenizer.eos_token_id]


def test_line_break_that_merges_with_the_response(capsys):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # words merge, too
    bpe.decoder = decoders.ByteLevel()
    texts = ["Italy?\n\nHuman"] * 3 + ["\n\n\nHuman"] * 2  # "?\n\n" becomes a token, and so does "\n\n\n"
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    [pair] = tokenize([Preference("Italy?", "\n\nHuman", "\n\n")], tokenizer, 200, "error")
    assert "2 of 2 responses merge" in capsys.readouterr().out
    assert pair.prompt_ids == tokenizer("Italy?")["input_ids"]
    for text, ids in (("\n\nHuman", pair.chosen_ids), ("\n\n", pair.rejected_ids)):
        assert ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def test_closed_prompt_is_followed_by_the_response_alone(capsys):
    tokenizer = ended_prompts("<s> $A <sep>")
    [pair] = tokenize([Preference("The capi", "tal", " of")], tokenizer, 200, "error")
    bare = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("The capi", "tal", " of")]
    eos, sep = tokenizer.eos_token_id, tokenizer.sep_token_id
    assert pair == Pair([tokenizer.bos_token_id, *bare[0], sep], [*bare[1], eos], [*bare[2], eos])
    assert capsys.readouterr().out == ""  # nothing merges


def test_prompt_does_not_end_in_eos_when_the_tokenizer_adds_one():
    plain = tokenize(PAIRS, tiny_tokenizer("llama"), 200, "error")
    assert tokenize(PAIRS, ended_prompts("<s> $A </s>"), 200, "error") == plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("said", [" Rome{} and", " Rome{}", "{}", " Rome {}\n "])
def test_special_tokens_that_are_typed_stay_text(kind, said, capsys):
    tokenizer = tiny_tokenizer(kind)
    for token in set(tokenizer.all_special_tokens):
        text = said.format(token)
        [pair] = tokenize([Preference(token + PROMPT, text, " Cats")], tokenizer, 200, "error")
        assert "special tokens are typed in 1 of 1 pairs; they stay text" in capsys.readouterr().out
        assert encode_prompts([token + PROMPT], tokenizer, 200) == [pair.prompt_ids]
        bos = kind in ("llama", "mistral")
        assert not set(tokenizer.all_special_ids) & {*pair.prompt_ids[bos:], *pair.chosen_ids[:-1]}
        assert tokenizer.decode(pair.prompt_ids[bos:]) == token + PROMPT
        assert tokenizer.decode(pair.chosen_ids[:-1], skip_special_tokens=True) == text  # so judges see it
        assert pair.chosen_ids[-1] == tokenizer.eos_token_id
    tokenize([Preference(PROMPT, " <s", " Cats")], tokenizer, 200, "error")
    assert capsys.readouterr().out == ""


def test_cut_response_gets_no_eos():
    tokenizer = tiny_tokenizer("gpt2")
    cut = Preference(PROMPT, " Rome", " Cats", chosen_ended=False)
    [pair] = tokenize([cut], tokenizer, 200, "error")
    assert pair.chosen_ids == tokenizer(" Rome")["input_ids"]
    assert pair.rejected_ids[-1] == tokenizer.eos_token_id
    [ended, open_ended] = tokenize_demonstrations(
        [Demonstration(PROMPT, " Rome"), Demonstration(PROMPT, " Rome", ended=False)], tokenizer, 200, "error"
    )
    assert ended == (pair.prompt_ids, [*pair.chosen_ids, tokenizer.eos_token_id])
    assert open_ended == pair.chosen


def test_empty_response_is_eos_and_empty_prompt_is_bos():
    tokenizer = tiny_tokenizer("llama")
    [pair] = tokenize([Preference("", "", " b")], tokenizer, 200, "error")
    assert pair.chosen == ([tokenizer.bos_token_id], [tokenizer.eos_token_id])
    with pytest.raises(ValueError, match="empty prompt"):
        tokenize([Preference("", "a", "b")], tiny_tokenizer("gpt2"), 200, "error")
    assert tokenize([], tokenizer, 200, "error") == []


def test_word_that_the_tokenizer_does_not_know():
    words = Tokenizer(models.WordLevel({"known": 0, "</s>": 1}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    with pytest.raises(ValueError, match="must know every word"):
        tokenize([Preference("known", " known", " foreign")], tokenizer, 200, "error")


def test_chat_goes_through_the_template(capsys):
    tokenizer = tiny_tokenizer("qwen2")
    message, text = (
        tokenize([Preference(CHAT, chosen, rejected)], tokenizer, 200, "error")
        for chosen, rejected in ((answer("I am well"), answer("")), ("I am well", ""))
    )
    assert message == text
    prompt_ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert encode_prompts([CHAT], tokenizer, 200) == [message[0].prompt_ids] == [prompt_ids]
    assert message[0].chosen_ids == [*tokenizer("I am well")["input_ids"], tokenizer.eos_token_id]
    assert message[0].rejected_ids == [tokenizer.eos_token_id]
    [cut] = tokenize([Preference(CHAT, answer("I am"), "I", False, False)], tokenizer, 200, "error")
    assert tokenizer.decode(cut.chosen_ids) == "I am"
    assert tokenizer.decode(cut.rejected_ids) == "I"
    assert capsys.readouterr().out == ""  # nothing merges


@pytest.mark.parametrize("after", [" over. ", " over. <|im_end|>\n"])
def test_what_a_template_puts_after_a_turn(after):
    tokenizer = tiny_tokenizer("qwen2")
    tokenizer.chat_template = tiny_tokenizer("qwen2").chat_template.replace("<|im_end|>\n", after)
    [ended] = tokenize([Preference(CHAT, answer("I am"), answer("well"))], tokenizer, 200, "error")
    assert tokenizer.decode(ended.chosen_ids) == "I am over. <|im_end|>"
    [cut] = tokenize([Preference(CHAT, answer("I am"), answer("well"), False, False)], tokenizer, 200, "error")
    assert tokenizer.decode(cut.chosen_ids) == "I am"


def test_template_that_brings_bos_gets_no_second_one(capsys):
    tokenizer = tiny_tokenizer("llama")
    tokenizer.chat_template = (
        "<s>{% for message in messages %}[{{ message['role'] }}]\n{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n{% endif %}"
    )
    [pair] = tokenize([Preference(CHAT, answer("well"), answer("I am well"))], tokenizer, 200, "error")
    assert pair.prompt_ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(pair.prompt_ids) == "<s>[system]\nhello there[user]\nhow are you?[assistant]\n"
    assert [tokenizer.decode(ids) for ids in (pair.chosen_ids, pair.rejected_ids)] == ["well</s>", "I am well</s>"]
    assert capsys.readouterr().out == ""


def test_chats_that_cannot_be_rendered():
    pairs = [Preference(CHAT, answer("a"), answer("b"))]
    with pytest.raises(ValueError, match="must have a chat template"):
        tokenize(pairs, tiny_tokenizer("gpt2"), 200, "error")
    tokenizer = tiny_tokenizer("qwen2")
    with pytest.raises(ValueError, match="all text or all chats"):
        tokenize([*pairs, *PAIRS], tokenizer, 200, "error")
    tokenizer.chat_template = "{% if add_generation_prompt %}think{% else %}{{ messages[-1]['content'] }}{% endif %}"
    with pytest.raises(ValueError, match="another beginning"):
        tokenize(pairs, tokenizer, 200, "error")


words = st.integers(1, 12).map(lambda n: " Rome" * n)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(words, words, words, st.booleans()), min_size=1, max_size=4), st.integers(3, 80))
def test_truncation_rule(texts, max_length):
    for kind in ("gpt2", "llama"):
        tokenizer = tiny_tokenizer(kind)
        some = [Preference(prompt[1:], chosen, rejected, ended) for prompt, chosen, rejected, ended in texts]
        whole = tokenize(some, tokenizer, 10**6, "error")
        cut = tokenize(some, tokenizer, max_length, "truncate")
        bos = int(kind == "llama")
        for before, after in zip(whole, cut, strict=True):
            longest = max(len(before.chosen_ids), len(before.rejected_ids))
            spare = max(max_length - longest, bos + 1)  # tokens of the prompt
            kept = min(spare, len(before.prompt_ids))
            prompt_ids = before.prompt_ids[:bos] + before.prompt_ids[len(before.prompt_ids) - (kept - bos) :]
            room = max_length - kept
            assert after == Pair(prompt_ids, before.chosen_ids[:room], before.rejected_ids[:room])
            assert after.chosen_ids
            assert after.rejected_ids
        fits = [len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) <= max_length for p in whole]
        if any(fits):
            dropped = tokenize(some, tokenizer, max_length, "drop")
            assert dropped == [pair for pair, fit in zip(whole, fits, strict=True) if fit]


def test_a_character_of_several_tokens_is_kept_whole_or_not_at_all():
    """Cut at each of its tokens: what is left ends at a character, and is no longer than it may be."""
    tokenizer = tiny_tokenizer("gpt2")
    snow = Preference("a", "x" + 6 * "☃", "y" + 5 * "☃", True)
    [whole] = tokenize([snow], tokenizer, 100, "error")
    seen = set()
    for max_length in range(4, len(whole.prompt_ids) + len(whole.chosen_ids)):
        [pair] = tokenize([snow], tokenizer, max_length, "truncate")
        tokens = len(pair.chosen_ids) - pair.text.chosen_ended
        snowmen = len(pair.text.chosen) - 1
        assert pair.text.chosen == "x" + snowmen * "☃"
        assert len(pair.prompt_ids) + len(pair.chosen_ids) <= max_length
        assert tokens == len(tokenizer(pair.text.chosen, add_special_tokens=False).input_ids)
        assert tokens + 3 > max_length - len(pair.prompt_ids) - 1  # one more would not have fitted
        seen.add(snowmen)
    assert seen == set(range(7))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(*[st.text("aé☃ Rome\n<", max_size=40)] * 3, st.booleans()), min_size=1, max_size=4),
    st.integers(32, 60),
)
def test_what_is_left_of_a_pair_is_a_text_of_its_own(texts, max_length):
    """It is a part of the text that was there, and whoever reads it, this tokenizer too, reads the same tokens."""
    for kind in ("gpt2", "qwen2", "sentencepiece"):
        tokenizer, chat = (sentencepiece() if kind == "sentencepiece" else tiny_tokenizer(kind)), kind == "qwen2"
        some = [
            Preference([*CHAT[:1], {**CHAT[1], "content": prompt}], answer("x" + chosen), answer("y" + rejected), ended)
            if chat
            else Preference("a" + prompt, "x" + chosen, "y" + rejected, ended)
            for prompt, chosen, rejected, ended in texts
        ]
        # One that fits in any case: of a chat the template and the system message alone may fill all there is.
        pairs = tokenize([*some, replace(some[0], **short(chat))], tokenizer, max_length, "truncate")[:-1]
        assert tokenize([pair.text for pair in pairs], tokenizer, max_length, "error") == pairs
        whole = {id(one): pair for one, pair in zip(some, tokenize(some, tokenizer, 10**6, "error"), strict=True)}
        rows = iter(some)
        for pair in pairs:
            found, was = (
                pair.text,
                next(one for one in rows if content(one.chosen).startswith(content(pair.text.chosen))),
            )
            assert content(was.prompt).endswith(content(found.prompt))
            assert content(was.rejected).startswith(content(found.rejected))
            assert ("prompt" in pair.cut) == (found.prompt != was.prompt)
            assert ("rejected" in pair.cut) == ((found.rejected, found.rejected_ended) != (was.rejected, True))
            assert "rejected" not in pair.cut or not found.rejected_ended
            if not pair.cut:
                assert pair == whole[id(was)]


def short(chat):
    responses = {"chosen": answer("x"), "rejected": answer("y")} if chat else {"chosen": "x", "rejected": "y"}
    return {"prompt": CHAT[1:2] if chat else "a", **responses}


def content(text):
    return text if isinstance(text, str) else text[-1]["content"]


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_a_response_loses_its_end(kind):
    """Plain text and a message; the other response, which fits, stays as it is."""
    tokenizer, said = tiny_tokenizer(kind), "The capital of Italy is Rome, and cats sleep."
    prompt, sides = (CHAT, (answer(said), answer("I"))) if kind == "qwen2" else ("Rome:", (said, "I"))
    for texts, cut in ((sides, "chosen"), (sides[::-1], "rejected")):
        [whole] = tokenize([Preference(prompt, *texts)], tokenizer, 200, "error")
        least = 1 if kind == "gpt2" else len(whole.prompt_ids)  # of a chat the last turn's text is cut at first
        [pair] = tokenize([Preference(prompt, *texts)], tokenizer, least + 6, "truncate")
        ids, text = getattr(pair, f"{cut}_ids"), content(getattr(pair.text, cut))
        assert ids == getattr(whole, f"{cut}_ids")[: len(ids)]
        assert 6 <= len(ids) < len(getattr(whole, f"{cut}_ids"))
        assert tokenizer.decode(ids) == text
        assert said.startswith(text)
        other = {"chosen": "rejected", "rejected": "chosen"}[cut]
        assert getattr(pair, f"{other}_ids") == getattr(whole, f"{other}_ids")
        assert {cut} <= set(pair.cut) <= {cut, "prompt"}
        assert (getattr(pair.text, f"{cut}_ended"), getattr(pair.text, f"{other}_ended")) == (False, True)


def test_a_chat_loses_no_turn_more_than_its_text_asks_for():
    tokenizer = tiny_tokenizer("qwen2")
    told = [{"role": "developer", "content": "hello there"}]
    turns = [{"role": "user", "content": "Tell me about cats and dogs."}, *answer("Cats sleep, dogs run.")]
    last = [{"role": "user", "content": "What is the capital of Italy?"}]
    some = [Preference([*told, *turns, *turns, *last], answer("Rome"), answer("cats"))]
    [whole] = tokenize(some, tokenizer, 1000, "error")
    longest = len(whole.prompt_ids) + max(len(whole.chosen_ids), len(whole.rejected_ids))
    spoken = sum(len(tokenizer(message["content"])["input_ids"]) for message in turns)
    for less, kept in ((0, 2), (1, 1), (spoken, 1), (2 * spoken, 0)):
        [pair] = tokenize(some, tokenizer, longest - less, "truncate")
        assert pair.text.prompt == [*told, *turns * kept, *last]


def test_a_chat_loses_its_oldest_turns(capsys):
    tokenizer = tiny_tokenizer("qwen2")
    turns = [{"role": "user", "content": "Tell me about cats and dogs."}, *answer("Cats sleep, dogs run.")]
    prompt = [CHAT[0], *turns, *turns, {"role": "user", "content": "What is the capital of Italy?"}]
    some = [Preference(prompt, answer("Rome"), answer("cats"))]
    [whole] = tokenize(some, tokenizer, 1000, "error")
    found = []
    for length in range(len(whole.prompt_ids) + len(whole.chosen_ids), 2, -1):
        try:
            [pair] = tokenize(some, tokenizer, length, "truncate")
        except ValueError:
            break
        assert tokenizer.decode(pair.prompt_ids).startswith(
            "<|im_start|>system\nhello there<|im_end|>\n<|im_start|>user\n"
        )
        assert tokenizer.decode(pair.prompt_ids).endswith("<|im_end|>\n<|im_start|>assistant\n")
        if pair.text.prompt not in found:
            found.append(pair.text.prompt)
    last = "What is the capital of Italy?"
    assert found[:3] == [prompt, [CHAT[0], *prompt[3:]], [CHAT[0], *prompt[5:]]]
    assert all(len(one) == 2 and last.endswith(one[1]["content"]) for one in found[3:])
    assert found[-1][1]["content"] == "?"
    assert "1 of 1 pairs have no room, cut or not: dropped:\n  row 0, counted from 0" in capsys.readouterr().out


def test_too_long_pairs_are_counted(capsys):
    tokenizer = tiny_tokenizer("gpt2")
    some = [Preference(PROMPT, " Rome" * n, " Cats") for n in (1, 100, 1, 150)]
    with pytest.raises(ValueError, match="2 of 4 pairs have more than 60 tokens") as error:
        tokenize(some, tokenizer, 60, "error")
    n = len(tokenizer(PROMPT + " Rome" * 100)["input_ids"]) + 1
    assert f"\n  row 1, counted from 0: {n} tokens\n  row 3, counted from 0: " in str(error.value)
    assert str(error.value).endswith("Raise max_length, or set on_too_long=truncate or on_too_long=drop.")
    assert len(tokenize(some, tokenizer, 60, "drop")) == 2
    assert "2 of 4 pairs have more than 60 tokens: dropped" in capsys.readouterr().out
    tokenize(some, tokenizer, 60, "truncate")
    assert "prompts cut from the left, 2 responses from the right" in capsys.readouterr().out
    [short, *_] = tokenize(some[:1], tokenizer, 200, "error")
    exact = len(short.prompt_ids) + max(len(short.chosen_ids), len(short.rejected_ids))
    assert tokenize(some[:2], tokenizer, exact, "drop") == [short]
    assert tokenize(some[:1], tokenizer, exact, "error") == [short]  # which just fits
    with pytest.raises(ValueError, match="so none is left"):
        tokenize(some[1:2], tokenizer, 60, "drop")
    with pytest.raises(ValueError, match="on_too_long"):
        tokenize(some, tokenizer, 60, "cut")
    with pytest.raises(ValueError, match="max_length must"):
        tokenize(some, tokenizer, 2, "truncate")


def test_too_long_pairs_are_named_as_in_their_file(tmp_path):
    """After a split, and after a faulty pair was dropped, the line is still that of the file."""
    file, tokenizer = tmp_path / "pairs.jsonl", tiny_tokenizer("gpt2")
    long = (7, 30)
    some = [Preference(f"{n} {PROMPT}", " Rome" * (100 if n in long else 1), " Cats" * (n != 3)) for n in range(40)]
    write(file, some)
    data = records.file(str(file), None, 0.3, "drop")
    for pair in data.preferences["train"] + data.preferences["validation"]:
        assert pair.source == f"{file}, line {some.index(pair) + 1}"
    with pytest.raises(ValueError, match="train pairs have more than 60 tokens") as error:
        tokenize(data.preferences["train"], tokenizer, 60, "error", "train pairs")
    assert f"\n  {file}, line 8: " in str(error.value)
    with pytest.raises(ValueError, match="demonstrations have more than 60 tokens") as error:
        tokenize_demonstrations(data.demonstrations, tokenizer, 60, "error")
    assert f"\n  {file}, line 8: " in str(error.value)


def test_pairs_that_truncation_makes_the_same_are_faulty(capsys):
    tokenizer = tiny_tokenizer("gpt2")
    some = [Preference(PROMPT, " Rome" * 30 + " Cats", " Rome" * 30 + " dogs", source="a, line 7"), PAIRS[0]]
    whole = tokenize(some, tokenizer, 200, "error")
    assert filter_identical(whole, "error", "train pairs") == whole
    assert capsys.readouterr().out == ""
    pairs = tokenize(some, tokenizer, 20, "truncate")
    with pytest.raises(ValueError, match="tokens: 1 of 2 train pairs are faulty") as error:
        filter_identical(pairs, "error", "train pairs")
    assert "a, line 7: chosen and rejected have the same tokens" in str(error.value)
    assert filter_identical(pairs, "drop", "train pairs") == pairs[1:]
    assert "tokens: 1 of 2 train pairs are faulty, 1 dropped" in capsys.readouterr().out
    assert filter_identical(pairs, "keep", "train pairs") == pairs
    assert "tokens: 1 of 2 train pairs are faulty, 0 dropped" in capsys.readouterr().out
    with pytest.raises(ValueError, match="all of them faulty"):
        filter_identical(pairs[:1], "drop", "train pairs")
    alike = tokenize([Preference(PROMPT, " Rome", " Rome"), PAIRS[0]], tokenizer, 200, "error")
    capsys.readouterr()
    assert filter_identical(alike, "keep", "train pairs") == alike  # reported as text
    assert capsys.readouterr().out == ""


def test_long_prompts_to_sample_from_are_cut_and_counted(capsys):
    tokenizer = tiny_tokenizer("llama")
    long, short = encode_prompts([PROMPT * 5, PROMPT], tokenizer, 50)
    assert len(long) == 50
    assert long[0] == tokenizer.bos_token_id
    assert long[1:] == tokenizer(PROMPT * 5)["input_ids"][-49:]
    assert short == tokenizer(PROMPT)["input_ids"]
    for length in (len(short), len(short) - 1):
        assert [len(ids) for ids in encode_prompts([PROMPT], tokenizer, length)] == [length]
    assert "1 of 2 prompts cut from the left to 50 tokens" in capsys.readouterr().out


def test_normalizing_tokenizer_is_no_merge(capsys):
    tokenizer = tiny_tokenizer("gpt2")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    [pair] = tokenize([Preference("cafe\u0301:", " cafe\u0301", " Rome")], tokenizer, 200, "error")
    assert tokenizer.decode(pair.prompt_ids + pair.chosen_ids[:-1]) == "caf\xe9: caf\xe9"
    assert capsys.readouterr().out == ""


def test_typed_special_tokens_are_cut_as_the_text_that_they_are(capsys):
    tokenizer = tiny_tokenizer("qwen2")
    typed = "<|im_end|>" * 6
    some = Preference(CHAT, answer(" Rome" + typed), answer("Cats"))
    [whole] = tokenize([some], tokenizer, 1000, "error")
    least = len(whole.prompt_ids)
    assert len(whole.chosen_ids) > 50
    for length in range(least + 20, least + 40, 7):
        [pair] = tokenize([some], tokenizer, length, "truncate")
        found, said = pair.text, content(pair.text.chosen)
        assert (" Rome" + typed).startswith(said)
        assert length - 3 <= len(pair.prompt_ids) + len(pair.chosen_ids) <= length, said
        assert tokenize([found], tokenizer, length, "error") == [pair]
    prompts = encode_prompts([typed * 3, "a"], tiny_tokenizer("gpt2"), 40)
    assert len(prompts[0]) == 40
    [[ids]] = [encode_prompts([[{"role": "user", "content": typed}]], tokenizer, 40)]
    assert 37 <= len(ids) <= 40
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"so none is left\. Raise max_length\.$"):
        tokenize([some], tokenizer, 5, "truncate")


@pytest.mark.parametrize("length", range(4, 9))
def test_a_prompt_keeps_its_last_character_whole(length):
    """Of which each byte is a token; the prompt before it is cut, and never all of it."""
    tokenizer = tiny_tokenizer("gpt2")
    assert len(tokenizer("☃")["input_ids"]) == 3
    [pair] = tokenize([Preference("a☃", " Rome Rome Rome", "b")], tokenizer, length, "truncate")
    assert pair.text.prompt == ("a☃" if length == 8 else "☃")
    assert pair.prompt_ids == tokenizer(pair.text.prompt)["input_ids"]


def test_what_sampled_pairs_lost_is_counted_among_those_that_are_left(capsys):
    tokenizer = chat_that_refuses("Refused")
    [pair] = tokenize([Preference(CHAT, "a", "b")], tokenizer, 200, "error")
    own = TokenIds(vocabulary(tokenizer), pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    refused = [{"role": "user", "content": "Refused"}]
    some = [Preference(CHAT, "a", "b", token_ids=own), Preference(refused, "a", "b", token_ids=own)]
    capsys.readouterr()
    assert len(tokenize(some, tokenizer, 200, "error", on_faulty="drop")) == 1
    assert "sampled with another tokenizer" not in capsys.readouterr().out


def chat_that_refuses(words):
    tokenizer = tiny_tokenizer("qwen2")
    rule = f"{{% if messages[-1].content == '{words}' %}}{{{{ raise_exception('no') }}}}{{% endif %}}"
    tokenizer.chat_template = rule + tokenizer.chat_template
    return tokenizer


def test_sampled_tokens_that_decoding_skips_are_unwritten():
    tokenizer = tiny_tokenizer("gpt2")
    tokenizer.add_tokens([AddedToken("<repo_name>", special=True)])
    repo = tokenizer.convert_tokens_to_ids("<repo_name>")
    assert repo not in tokenizer.all_special_ids
    [pair] = tokenize([Preference("Tell me:", " dogs", " Cats")], tokenizer, 200, "error")
    for extra in ([], [repo]):
        ids = TokenIds(vocabulary(tokenizer), pair.prompt_ids, [*extra, *pair.chosen_ids], pair.rejected_ids)
        [found] = tokenize([replace(pair.text, token_ids=ids)], tokenizer, 200, "error")
        assert found.chosen_ids == [*extra, *pair.chosen_ids]
        assert found.unwritten == bool(extra)


def test_responses_that_merge_are_counted_once(capsys):
    tokenizer = tiny_tokenizer("gpt2")
    some = [Preference("Rome " * 30 + "The capi", "tal of Italy" + " Rome" * 60, " of Italy" + " Cats" * 60)]
    tokenize(some, tokenizer, 40, "truncate")
    assert capsys.readouterr().out.count("responses merge with the end of their prompt") == 1


def test_rows_that_a_template_loses_only_once_cut_have_no_room(capsys):
    tokenizer = tiny_tokenizer("qwen2")
    kept = "(m.content if m.content.endswith('.') else 'short')"
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content if m.role == 'user' else KEPT)"
        " + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}".replace("KEPT", kept)
    )
    long = Preference(CHAT[1:], answer(" Rome" * 40 + "."), answer(" Cats" * 40 + "."))
    fits = Preference(CHAT[1:], "a", "b")  # plain text follows as it is
    for rule in ("keep", "drop"):
        assert [pair.text for pair in tokenize([long, fits], tokenizer, 30, "truncate", on_faulty=rule)] == [fits]
        assert "1 of 2 pairs have no room, cut or not: dropped" in capsys.readouterr().out
    asked = [{"role": "user", "content": "Rome " * 20 + "?"}]
    faulty = Preference(asked, answer(" Rome"), answer("Cats."))  # the template loses it, cut or not
    found = tokenize([faulty, fits], tokenizer, 30, "truncate", on_faulty="keep")
    assert [pair.cut for pair in found] == [("prompt",), ()]
