"""Batches hold the right tokens in both layouts, and an epoch holds each item once, whatever the machine."""

import dataclasses

import pytest
import torch
from conftest import CHAT_TEMPLATE, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data.batches import (
    Batches,
    Pair,
    balance_by_tokens,
    collate,
    collate_pairs,
    collate_responses,
    encode_prompts,
    size,
    tokenize_demonstrations,
)
from dpo.data.records import Demonstration

SEQUENCES = [([1, 2, 3], [4, 9]), ([5], [9])]
INDEX, REAL = torch.tensor([7, 3]), torch.tensor([True, False])
ids = st.lists(st.integers(0, 9), min_size=1, max_size=6)
branches = st.tuples(ids, st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=3))


def test_padded_rows():
    batch = collate(SEQUENCES, INDEX, REAL, pad_id=9, packed=False)  # padded with EOS
    assert batch.index.tolist() == [7, 3]
    assert batch.valid.tolist() == [True, False]
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 9], [5, 9, 9, 9, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.target_positions.tolist() == [2, 3, 5]
    assert batch.labels.tolist() == [4, 9, 9]
    assert batch.sequence_ids.tolist() == [0, 0, 1]
    assert (batch.sequences, batch.shared_prefixes) == (2, ())


def test_packed_row():
    batch = collate(SEQUENCES, INDEX, REAL, pad_id=9, packed=True)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5]]  # nothing is predicted from the last token of a response
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0]]
    assert batch.attention_mask is None
    assert batch.target_positions.tolist() == [2, 3, 4]
    assert batch.labels.tolist() == [4, 9, 9]
    assert batch.sequence_ids.tolist() == [0, 0, 1]
    assert (batch.sequences, batch.shared_prefixes) == (2, ((3, (1,)), (1, (0,))))


def test_chosen_come_before_rejected():
    pairs = [Pair([1], [2, 9], [3, 9]), Pair([4, 5], [6, 9], [7, 7, 9])]
    batch = collate_pairs(pairs, INDEX, REAL, pad_id=0, packed=False)
    assert batch.input_ids.tolist() == [[1, 2, 9, 0, 0], [4, 5, 6, 9, 0], [1, 3, 9, 0, 0], [4, 5, 7, 7, 9]]
    assert batch.labels.tolist() == [2, 9, 6, 9, 3, 9, 7, 7, 9]
    assert batch.sequence_ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert batch.index.tolist() == [7, 3]
    packed = collate_pairs(pairs, INDEX, REAL, pad_id=0, packed=True)
    assert packed.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 7]]  # a prompt once, then what branches off it
    assert packed.position_ids.tolist() == [[0, 1, 1, 0, 1, 2, 2, 3]]
    assert packed.target_positions.tolist() == [0, 1, 4, 5, 0, 2, 4, 6, 7]
    assert packed.shared_prefixes == ((1, (1, 1)), (2, (1, 2)))
    assert torch.equal(packed.labels, batch.labels)
    assert torch.equal(packed.sequence_ids, batch.sequence_ids)
    assert packed.sequences == batch.sequences == 4


@given(st.lists(branches, min_size=1, max_size=4), st.booleans())
def test_both_layouts_hold_the_same_sequences(items, packed):
    """Walk back from each scored place to the tokens that it follows."""
    batch = collate_responses(items, packed=packed)
    most = max(len(responses) for _, responses in items)
    expected = [(prompt, responses[nth]) for nth in range(most) for prompt, responses in items if nth < len(responses)]
    assert batch.sequences == len(expected)
    flat, positions = batch.input_ids.flatten().tolist(), batch.position_ids.flatten().tolist()
    for sequence, (prompt, response) in enumerate(expected):
        mine = batch.sequence_ids == sequence
        assert batch.labels[mine].tolist() == response
        for nth, place in enumerate(batch.target_positions[mine].tolist()):
            assert flat[place] == [*prompt, *response][len(prompt) + nth - 1]
            assert positions[place] == len(prompt) + nth - 1
    if packed:
        assert sum(prompt + sum(responses) for prompt, responses in batch.shared_prefixes) == len(flat)
        assert len(flat) <= sum(size(item) for item in items)


def test_everything_moves():
    for packed, tensors in ((True, 7), (False, 8)):
        batch = collate(SEQUENCES, INDEX, REAL, pad_id=0, packed=packed).to("meta")
        values = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
        assert [value.device.type for value in values if isinstance(value, torch.Tensor)] == ["meta"] * tensors
        assert batch.sequences == 2


@given(st.lists(st.integers(1, 30), max_size=30), st.integers(1, 60), st.integers(1, 4))
def test_every_item_is_dealt_once_and_shares_fit(sizes, limit, multiple):
    shares = balance_by_tokens(sizes, limit, multiple)
    assert sorted(place for share in shares for place in share) == list(range(len(sizes)))
    assert len(shares) % multiple == 0
    for share in shares:
        assert sum(sizes[place] for place in share) <= limit or len(share) == 1
    assert len(shares) < max(len(sizes), 1) + multiple


def test_shares_are_few_and_even():
    assert balance_by_tokens([3, 5, 4, 3, 3], 9, 1) == [[1], [2, 4], [0, 3]]
    assert balance_by_tokens([3, 5, 4, 3, 3], 10, 1) == [[1, 3], [2, 0, 4]]
    assert balance_by_tokens([1] * 6, 6, 4) == [[0, 4], [1, 5], [2], [3]]
    assert balance_by_tokens([20, 1], 6, 1) == [[0], [1]]


def rows(items, index, real):
    assert items == [f"item {row}" for row in index.tolist()]
    return index.tolist(), real.tolist()


def batches(n, **options):
    given = {"micro_batch_tokens": 9, "seed": 0, "size": lambda item: 1 + int(item[5:]) % 4, **options}
    return Batches([f"item {row}" for row in range(n)], rows, **given)


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    micro_batch_tokens=st.integers(1, 30),
    world_size=st.integers(1, 5),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 2),
)
def test_an_epoch_holds_each_item_once(n, batch_size, micro_batch_tokens, world_size, seed, epoch):
    alone = batches(n, batch_size=batch_size, micro_batch_tokens=10**6, seed=seed)
    ranks = [
        batches(
            n,
            batch_size=batch_size,
            micro_batch_tokens=micro_batch_tokens,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    assert len(alone) == -(-n // batch_size)
    epoch_rows = []
    for step in range(epoch * len(alone), (epoch + 1) * len(alone)):
        [(window, real)], total = alone.at(step)
        assert all(real)
        assert total == len(window)
        shares = [one.at(step) for one in ranks]
        assert {count for _, count in shares} == {total}
        assert len({len(micro) for micro, _ in shares}) == 1  # as many passes on each rank
        for micro, _ in shares:
            for index, flags in micro:
                assert sum(1 + row % 4 for row in index) <= micro_batch_tokens or len(index) == 1
                assert len(set(flags)) == 1
        seen = [pair for micro, _ in shares for index, flags in micro for pair in zip(index, flags, strict=True)]
        assert sorted(row for row, flag in seen if flag) == sorted(window)
        assert {row for row, _ in seen} == set(window)
        assert len(seen) < total + world_size
        epoch_rows += window
    assert sorted(epoch_rows) == list(range(n))
    short = n % batch_size or batch_size
    assert total == short  # the last window


def test_the_window_of_a_step_is_of_seed_and_epoch():
    def order(epoch, **options):
        some = batches(30, batch_size=10, micro_batch_tokens=1000, **options)
        return [some.at(3 * epoch + step)[0][0][0] for step in range(3)]

    def windows(*given, **options):
        return [set(window) for window in order(*given, **options)]

    assert order(0) == order(0)
    assert windows(0) != windows(1) != windows(0)
    assert windows(0, seed=1) != windows(0)
    assert windows(0, seed=1) != windows(1)  # epochs of one seed are not those of the next
    assert windows(0) != [set(range(10)), set(range(10, 20)), set(range(20, 30))]


def test_random_access():
    some = batches(17, batch_size=4)
    straight = [some.at(step) for step in range(12)]
    assert [some.at(step) for step in reversed(range(12))] == straight[::-1]
    assert batches(17, batch_size=4).at(11) == straight[11]


def test_order_stays_for_good():
    same = {"batch_size": 8, "micro_batch_tokens": 8, "size": lambda _: 1}
    assert batches(8, **same).at(0) == ([([2, 4, 3, 6, 5, 0, 1, 7], [True] * 8)], 8)


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"batch_size": 4, "micro_batch_tokens": 0}, {"batch_size": 4, "seed": -1}]
    + [{"batch_size": 4, "rank": rank, "world_size": 2} for rank in (-1, 2)],
)
def test_impossible_sizes(options):
    with pytest.raises(ValueError, match=r"batch sizes|seed"):
        batches(5, **options)
    with pytest.raises(ValueError, match="at least one item"):
        batches(0, batch_size=4)


def test_a_prompt_of_just_the_limit_is_whole(capsys):
    tokenizer = tiny_tokenizer("llama")
    [ids] = encode_prompts(["Is it? Tell me."], tokenizer, 100)
    assert encode_prompts(["Is it? Tell me."], tokenizer, len(ids)) == [ids]
    assert capsys.readouterr().out == ""
    [cut] = encode_prompts(["Is it? Tell me."], tokenizer, len(ids) - 1)
    assert cut == [ids[0], *ids[2:]]  # BOS stays
    assert f"1 of 1 prompts cut from the left to {len(cut)} tokens" in capsys.readouterr().out


def test_rules_for_demonstrations():
    """Those of pairs: what is cut has no end, what is too long or faulty follows its setting."""
    tokenizer = tiny_tokenizer("llama")
    some = [Demonstration("Is it?", " Yes."), Demonstration("Is it?", " Yes.", ended=False)]
    (prompt, whole), (_, cut) = tokenize_demonstrations(some, tokenizer, 40, "error")
    assert whole == [*cut, tokenizer.eos_token_id]
    long = [*some, Demonstration("Is it?", " Yes" * 40)]
    assert tokenize_demonstrations(long, tokenizer, 40, "drop") == [(prompt, whole), (prompt, cut)]
    assert len(tokenize_demonstrations(long, tokenizer, 40, "truncate")[2][1]) == 40 - 2  # BOS and a token of text
    with pytest.raises(ValueError, match="1 of 3 demonstrations have more than 40 tokens"):
        tokenize_demonstrations(long, tokenizer, 40, "error")
    chats = tiny_tokenizer("qwen2")
    chats.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}" + CHAT_TEMPLATE
    )
    asked = [{"role": "user", "content": "Is it?"}]
    answer = [{"role": "assistant", "content": "Yes."}]
    faulty = [Demonstration(asked, answer), Demonstration([{"role": "system", "content": "Be."}, *asked], answer)]
    with pytest.raises(ValueError, match="1 of 2 demonstrations are faulty"):
        tokenize_demonstrations(faulty, chats, 40, "error")
    assert len(tokenize_demonstrations(faulty, chats, 40, "error", "drop")) == 1
